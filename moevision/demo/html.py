"""Build HTML pages from the files in `assets/`: the explorer, pages to save, and iframes for notebooks.

There is no build step. `assets/` holds CSS and ES modules, which editors, `tsc` and node read as they are. A page is
one file whose Content-Security-Policy allows only its inline script. So `script_of` concatenates the modules, each
after those that it imports, and removes `import`, `export` and JSDoc. All modules then share one scope, and
tests/demo/test_html.py tests that no two of them declare the same name.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from moevision import __version__
from moevision.errors import json_text

CORE_STYLES = ("explorer_base.css", "explorer_flow.css", "explorer_stage.css")
APP_STYLES = ("explorer.css", "explorer_tabs.css")
_EMPTY_MAIN = '<main class="mv" data-mv></main>'
VIEW_SCHEMA = "moevision.view/2"
OFFLINE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Content-Security-Policy of a saved page: it loads nothing from elsewhere, even if the script has a bug."""

_IMPORT = re.compile(r'^import \{[^}]*\} from "\.[\w./]*/([\w-]+\.js)";\n', re.M)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|class|const) )", re.M)
DOCS = re.compile(r"^ */\*\*(?:(?!\*/).)*\*/\n", re.M | re.S)
"""JSDoc above a declaration: for readers and tsc, removed from the page."""
_COMMENT_OR_INDENT = re.compile(r"^ *//.*\n|^ +", re.M)


@cache
def read_asset(name: str) -> str:
    """The text of a file in `assets/`."""
    return (files("moevision") / "demo" / "assets" / name).read_text(encoding="utf-8")


def links() -> dict[str, str | None]:
    """Links from `[project.urls]`, None if it has none, and a BibTeX entry to cite.

    They lead to the lesson, the code, and `live`, the explorer without a server.
    """
    urls = dict(url.split(", ", 1) for url in metadata("moevision").get_all("Project-URL") or ())
    code = urls.get("Repository")

    site = urls.get("Documentation", "").rstrip("/")
    lesson = None
    live = None
    if site:
        lesson = f"{site}/lesson.html"
        live = f"{site}/live/"
    if lesson_file():
        lesson = "lesson.html"

    title = "moevision: sparse vision transformers whose routing can be seen"  # as in CITATION.cff
    citation = f"@software{{moevision,\n  title = {{{title}}},\n  version = {{{__version__}}},"
    if code:
        citation += f"\n  url = {{{code}}},"
    return {"lesson": lesson, "code": code, "live": live, "cite": citation + "\n}"}


class Document(NamedTuple):
    """The text of a page, and the `script-src` of its Content-Security-Policy, which allows its own script only."""

    text: str
    policy: str


def app_page(
    boot: Mapping[str, Any],
    views: Sequence[Mapping[str, Any]],
    *,
    read: Callable[[str], str] = read_asset,
    style: str = "",
) -> Document:
    """The explorer's page: a placeholder until the script runs, and the script with the data of the first screen.

    `boot` is the answer to the request "boot", and `views` are the views of the images shown first. `read` is that of
    `script_of`; `style` is CSS to add.
    """
    start_call = "startApp(document.querySelector('[data-mv]'), BOOT, VIEWS);"
    script = script_of("app.js", start_call, read=read, BOOT=boot, VIEWS=views)
    thumbs = {row["id"]: row["thumb"] for model in boot["models"] for row in model["examples"]}
    sources = [thumbs.get(view["picture"]["id"], "") for view in views]
    body = _render("opening.html.jinja", sources=sources)
    css = read_css((*CORE_STYLES, *APP_STYLES)) + style
    text = document("See inside a Mixture of Experts", css, body, script, policy="")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Document(text, f"script-src 'sha256-{digest}'")


def login_page(query: str, wrong: bool) -> str:
    """The form that asks for user and password; `wrong` shows an error, and `query` is kept for the page after it."""
    body = _render("login.html.jinja", query=query, wrong=wrong)
    return document("moevision explorer", read_css(CORE_STYLES), body, "", policy="")


def lesson_file() -> Path | None:
    """The file of the lesson: inside the package in a wheel, in docs/ in a checkout; None if there is none."""
    package = Path(str(files("moevision")))
    for folder in (package, package.parent / "docs"):
        if (folder / "lesson.html").is_file():
            return folder / "lesson.html"
    return None


def lesson_page() -> str | None:
    """The lesson with a link back to the explorer; None if there is no lesson."""
    file = lesson_file()
    if file is None:
        return None
    return file.read_text(encoding="utf-8").replace('"explorer/cat.html"', '"./"')


def view_html(
    view: Mapping[str, Any], *, full_page: bool, history: Mapping[str, Any] | None = None
) -> str:
    """One view, JSON of the schema `moevision.view/2`, as HTML that needs neither server nor network.

    With `full_page` it is a document to save, else an iframe to show in a notebook. The iframe isolates style and
    script, and is sandboxed, so that the script can't reach the notebook. With the image's `history`, the answer to the
    request "history", the page also shows how its routing changed during training.
    """
    picture = view["picture"]
    title = html.escape(f"Routing of {picture.get('label') or picture['name']}")
    start_call = "startStatic(document.querySelector('[data-mv]'), VIEW, { moments: HISTORY });"
    page = _static_page(title, "core.js", start_call, VIEW=view, HISTORY=history)
    return page if full_page else _iframe(page, 1900)


def flow_html(view: Mapping[str, Any]) -> str:
    """The explorer's opening animation for one view, as an iframe: patches fly to their experts. It needs no server."""
    start_call = "startStatic(document.querySelector('[data-mv]'), VIEW, { details: false });"
    page = _static_page("Routing", "core.js", start_call, VIEW=view)
    experts = max(layer["num_experts"] for layer in view["layers"])

    # One box per expert, at most four side by side. With fewer columns boxes are wider and therefore higher.
    columns = min(4, experts)
    rows = -(-experts // columns) * 4 / columns  # in heights of a box in four columns
    return _iframe(page, 700, rows)


def sorting_html(
    view: Mapping[str, Any], sorting: Mapping[str, Any], photos: Sequence[Mapping[str, Any]]
) -> str:
    """Whole photos sorted into the boxes of two experts, and the view's image among them, as an iframe.

    `sorting` is that of the model's card, and `photos` are its photos with `thumb` and `label`.
    """
    start_call = "startSorting(document.querySelector('[data-mv]'), VIEW, SORTING, PHOTOS);"
    constants = {"VIEW": view, "SORTING": sorting, "PHOTOS": photos}
    return _iframe(_static_page("Routing", "app_sorting.js", start_call, **constants), 700, rows=2)


def _static_page(title: str, entry: str, start_call: str, **constants: Any) -> str:
    """A page without a server: the script of the module `entry`, see `script_of`, fills it."""
    script = script_of(entry, start_call, **constants)
    return document(title, read_css(CORE_STYLES), _EMPTY_MAIN, script)


def _iframe(page: str, height: int, rows: float = 0) -> str:
    """A document as an iframe of `height` px: a sandboxed document can't tell its height to the page around it.

    With `rows` of boxes, the frame is higher on a narrow screen such as a phone's, where the photo is above the boxes.
    """
    css_height = f"{height}px"
    if rows:
        # From 816 px on, the second term of min() is 0 or less, so `height` is used. Below, that term is very large, so
        # the first one is used: photo (100vw), texts (370px) and boxes (34vw each).
        css_height = f"max({height}px,min(100vw + 370px + {rows:g} * 34vw,(816px - 100vw) * 999))"
    return (
        f'<iframe title="Patch routing" sandbox="allow-scripts" srcdoc="{html.escape(page)}" '
        f'style="width:100%;height:{css_height};border:1px solid #8884;border-radius:8px"></iframe>'
    )


def document(title: str, style: str, body: str, script: str, *, policy: str = OFFLINE) -> str:
    """A page in one file; `title` and `body` are HTML, and `script` runs after them.

    `policy` is its Content-Security-Policy, by default one that loads nothing. It is empty for a page that a server
    sends with a policy of its own; such a page has a description and an icon instead.
    """
    return _render(
        "page.html.jinja", title=title, style=style, body=body, script=script, policy=policy
    )


def _render(template: str, **values: Any) -> str:
    """A template filled with values, which are HTML or escaped there."""
    folder = Path(__file__).with_name("templates")
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return pages.get_template(template).render(values)


def script_of(
    entry: str, start_call: str, *, read: Callable[[str], str] = read_asset, **constants: Any
) -> str:
    """The module `entry` and all that it imports, as one function that is called at once and ends with `start_call`.

    The function begins with `constants` as JSON. `read` returns the text of a module by its name.
    """
    lines = [f"const {name} = {_inline_json(value)};" for name, value in constants.items()]
    sources = (DOCS.sub("", read(name)) for name in modules(entry, read))
    joined = "\n".join(_EXPORT.sub("", _IMPORT.sub("", source)) for source in sources)
    # `</script` in a text would end the page's script element; `<\/` means the same inside JavaScript.
    joined = _COMMENT_OR_INDENT.sub("", joined).replace("</script", "<\\/script")
    return "\n".join(["(() => {", '"use strict";', *lines, joined, start_call, "})();"])


def modules(entry: str, read: Callable[[str], str] = read_asset) -> tuple[str, ...]:
    """Names of the module `entry` and of all that it imports; each comes after those that it imports, `entry` last."""
    order: list[str] = []

    def visit(name: str) -> None:
        if name not in order:
            for imported in _IMPORT.findall(read(name)):
                visit(imported)
            order.append(name)

    visit(entry)
    return tuple(order)


def _inline_json(value: Any) -> str:
    """JSON that is safe inside a script element: `<`, `>` and `&` are written as escapes."""
    text = json_text(value, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def read_css(names: tuple[str, ...]) -> str:
    """Style sheets of `assets/`, concatenated, without comments."""
    return without_comments("\n".join(map(read_asset, names)))


def without_comments(css: str) -> str:
    """A style sheet without its comments `/* ... */`."""
    return re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL)
