"""The page's texts: complete, and inert whatever a name says."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import moevision.demo
from moevision.analysis import plots
from moevision.demo import route_image
from moevision.demo.html import APP_STYLES, CORE_STYLES, DOCS, app_page, modules, view_html

ASSETS = Path(moevision.demo.__file__).parent / "assets"
LESSON = Path(__file__).parents[2] / "docs" / "lesson"
HOSTILE = "</script><img src=x onerror=alert(1)> & \" ' ${1} {{2}} \u2028"


@pytest.fixture(scope="module")
def view(make, pixels):
    return route_image(make(), pixels).to_json()


class Page(HTMLParser):
    """Elements of a page with their attributes, and the text of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self._inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1] += data


def embedded(page, name):
    """The JSON constant that a page's script starts with."""
    return constant(Page(page).scripts[0], name)


def test_every_asset_is_used():
    used = {*modules("app.js"), *CORE_STYLES, *APP_STYLES}
    assert used == {file.name for file in ASSETS.iterdir() if not file.name.endswith(".d.ts")}
    assert set(modules("core.js")) < used


def test_a_page_of_its_own_has_the_rules_of_the_stage(view):
    """Its checkbox stood against its words: the rule was among those of the server's page."""
    assert 'class="mv-check"' in (ASSETS / "core.js").read_text(encoding="utf-8")
    assert ".mv-check {" in view_html(view, full_page=True)


def constant(script, name):
    """A constant of the page's script that is written as JSON."""
    line = next(line for line in script.splitlines() if line.startswith(f"const {name} = "))
    return json.loads(line.removeprefix(f"const {name} = ").removesuffix(";"))


def opened(*examples, views=()):
    return app_page({"models": [{"examples": list(examples)}]}, views)


def test_modules_stand_behind_what_they_import():
    order = modules("app.js")
    for place, name in enumerate(order):
        imported = re.findall(r'from "\./([\w-]+\.js)"', DOCS.sub("", (ASSETS / name).read_text()))
        assert set(imported) <= set(order[:place]), name
    script = Page(opened().text).scripts[0]
    assert not re.search(r"^\s*(import|export)\b", script, re.M)


def test_modules_mean_the_same_in_one_scope():
    """No two declare one name, and they import and export in the forms that the page leaves out."""
    text = {name: DOCS.sub("", (ASSETS / name).read_text()) for name in modules("app.js")}
    names = r"^(?:export )?(?:async )?(?:function|class|const|let|var) (\w+)"
    whole = "\n".join(text.values())
    several = re.findall(r"^const \[([\w, ]+)\] =", whole, re.M)
    declared = re.findall(names, whole, re.M) + [
        name for each in several for name in each.split(", ")
    ]
    assert len(set(declared)) == len(declared)
    assert len(declared) > 100
    for name, module in text.items():
        rest = re.sub(r'^import \{[^}]*\} from "\./[\w-]+\.js";\n', "", module, flags=re.M)
        assert not re.search(
            r"^import\b|\bimport\(|^export (?!(async )?(function|class|const) )", rest, re.M
        ), name


def test_the_page_has_the_colours_of_the_figures():
    script = Page(opened().text).scripts[0]
    assert constant(script, "PALETTE") == list(plots.EXPERT_COLOURS)
    assert constant(script, "NEUTRAL") == plots.NEUTRAL
    assert constant(script, "HIGHLIGHT") == plots.EXPERT_COLOURS[0]


@pytest.mark.parametrize(
    "file", sorted([*ASSETS.iterdir(), *LESSON.glob("lesson*")]), ids=lambda file: file.name
)
def test_an_asset_is_read_in_one_sitting_and_reaches_for_nothing_outside(file):
    text = DOCS.sub("", file.read_text(encoding="utf-8"))  # JSDoc says `@import` of a type
    assert file.suffix != ".css" or text.count("{") == text.count(
        "}"
    )  # else what follows is read as part of a rule
    assert len(text.splitlines()) <= 400 or file.name.endswith((".d.ts", ".json"))
    assert not re.findall(
        r"(?:https?:)?//[\w-]+\.\w+|@import|url\(\s*['\"]?(?!\$)[\w/]|XMLHttpRequest|WebSocket",
        text,
    )
    assert len(re.findall(r"\bfetch\(", text)) == len(re.findall(r"fetch\(`\$\{home\}api/", text))


def test_the_document_shows_its_images_first_and_lets_its_own_script_run_only(view):
    hostile = {"id": HOSTILE, "thumb": '"><script>alert(1)</script>'}
    page = opened(hostile, views=[{**view, "picture": {**view["picture"], "id": HOSTILE}}])
    found = Page(page.text)
    (script,) = found.scripts
    assert (
        page.policy
        == f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    )
    images = [attrs["src"] for tag, attrs in found.elements if tag == "img"]
    assert images == [hostile["thumb"]]
    assert page.text.index("<img") < page.text.index("<script>")
    assert constant(script, "VIEWS")[0]["picture"]["id"] == HOSTILE


def test_a_page_holds_the_view_and_asks_for_nothing(view):
    page = view_html(view, full_page=True)
    assert embedded(page, "VIEW") == view
    found = Page(page)
    policy = next(attrs["content"] for tag, attrs in found.elements if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert not [attrs for _, attrs in found.elements if "src" in attrs or "href" in attrs]
    assert [tag for tag, _ in found.elements].count("script") == 1
    assert page.startswith("<!doctype html>")
    assert 'lang="en"' in page


def test_no_name_becomes_markup(view):
    hostile = {**view, "picture": {**view["picture"], "label": HOSTILE, "name": HOSTILE}}
    page = view_html(hostile, full_page=True)
    assert embedded(page, "VIEW") == hostile
    tags = [tag for tag, _ in Page(page).elements]
    assert tags == [tag for tag, _ in Page(view_html(view, full_page=True)).elements]
    assert "img" not in tags


def test_a_notebook_gets_the_same_page_in_a_frame_of_its_own(view):
    frame = view_html(view, full_page=False)
    (element,) = Page(frame).elements
    tag, attrs = element
    assert tag == "iframe"
    assert (
        attrs["sandbox"] == "allow-scripts"
    )  # without allow-same-origin it can't reach the notebook
    assert attrs["srcdoc"] == view_html(view, full_page=True)


def test_a_number_that_json_cannot_say_is_refused(view):
    layers = [{**view["layers"][0], "slowest": float("nan")}, *view["layers"][1:]]
    with pytest.raises(ValueError, match="JSON"):
        view_html({**view, "layers": layers}, full_page=True)
