"""M10, M11 and one's own images: what leaves the page and what enters it."""

import base64
import io
import json
from pathlib import Path
from urllib.parse import parse_qsl

import pytest
from PIL import Image

from moevision.data import SyntheticPets
from tests.browser.conftest import (
    CHANGED,
    FIRST,
    alone,
    at,
    choose_layer,
    clipped,
    each,
    experts_of,
    fills,
    numbers,
    open_tab,
    press,
    said,
    saved,
    take_away,
)
from tests.shared import says

pytestmark = pytest.mark.needs("chromium", "playwright")

FORMATS = Path(__file__).parents[1] / "fixtures" / "formats"
OLD_LINKS = {}
for _file in sorted(FORMATS.glob("*/links.json")):
    OLD_LINKS |= json.loads(_file.read_text())
SENT = "() => !location.search.includes('picture=')"  # one's own image is in no link


def test_nothing_is_saved_before_an_image_is_chosen(visit, empty_stage):
    page = visit().page
    empty_stage(page)
    for kind in ("card", "json", "page"):
        page.click(".mv-menu summary")
        press(page, f"[data-action=export-{kind}]", ".mv-toast:has-text('Nothing is on the stage')")


def test_the_view_is_saved_as_json(visit, ask):
    data = json.loads(saved(visit().page, "json").path().read_text(encoding="utf-8"))
    assert data["schema"] == "moevision.view/2"
    assert data == ask("route", picture=FIRST)


def test_the_saved_page_works_alone_and_says_that_an_expert_is_away(
    visit, new_visit, ask, tmp_path
):
    one = alone(new_visit, visit("?away=3.1").page, tmp_path)
    page = one.page
    assert page.text_content("h1").startswith("Without expert 1 ")
    page.click(".mv-cell[data-patch='5']")
    assert said(page).startswith("row 2, column 2: expert")
    page.keyboard.press("-")
    assert numbers(page) == experts_of(ask("route", picture=FIRST, away=[[3, 1]])["layers"][0])
    assert one.complaints == []
    assert one.strangers(one.address) == []


def test_the_saved_page_is_of_the_image_on_the_stage(visit, hold):
    """Another one may have been chosen, and not be here yet."""
    one = visit()
    held = hold(one.page, "route")
    one.page.click("[data-action=example][data-id='pets/test/4']")
    held.wait()
    saved(one.page, "page")
    assert one.question("export_html")["picture"] == FIRST
    held.release()


def test_a_notebook_shows_the_same_view(new_visit, pixels, make):
    from moevision.demo import route_image

    view = route_image(make(), pixels)
    # A sandboxed frame has no storage to note an earlier visit in.
    one = new_visit(offline=True, door=False)
    one.page.set_content(f"<h1>notebook</h1>{view._repr_html_()}")
    frame = one.page.frame_locator("iframe")
    frame.locator(".mv-cell[data-patch='5']").click()
    marks = frame.locator(".mv-mark").all_text_contents()
    assert marks == [str(choices[0]) for choices in view.to_json()["layers"][-1]["experts"]]
    assert frame.locator("[data-live]").text_content().startswith("row 2, column 2")
    foot = frame.locator(".mv-footnote").text_content()
    assert says(foot, "top-2 of 4 experts")
    assert "accuracy" not in foot  # nothing is told of an unnamed model's
    assert one.complaints == []


VIEW_ENDS = "document.querySelector('.mv-flow').getBoundingClientRect().bottom"


@pytest.mark.parametrize("width", [760, 940, 1200, 1440])
def test_a_notebook_shows_all_of_the_view_at_once(new_visit, width):
    """Photo, boxes and details of the bundled model; the picture of the sums is scrolled to."""
    from moevision.demo import route_image
    from moevision.demo.models import bundled_model

    image = SyntheticPets(1, 64, split="test").image(0)
    view = route_image(bundled_model("pets"), image, dense=bundled_model("pets", "dense"))
    page = new_visit(offline=True, viewport={"width": width, "height": 1500}).page
    page.set_content(f"<style>body {{ margin: 0 }}</style>{view._repr_html_()}")
    page.frame_locator("iframe").locator(".mv-cell").first.wait_for()
    page_of_view = page.frames[1]
    assert page_of_view.evaluate(f"{VIEW_ENDS} <= window.innerHeight")
    assert page_of_view.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert clipped(page_of_view, ".mv-side div, .mv-side ol") == []


def test_more_experts_than_colours_are_told_by_number(new_visit, pixels, make, tmp_path):
    from moevision.analysis.plots import EXPERT_COLOURS, NEUTRAL
    from moevision.demo import route_image
    from moevision.demo.html import view_html

    def rgb(colour):
        return tuple(int(colour[start : start + 2], 16) for start in (1, 3, 5))

    view = route_image(make(num_experts=12), pixels).to_json()
    layer = view["layers"][-1]
    (tmp_path / "view.html").write_text(view_html(view, full_page=True), encoding="utf-8")
    page = new_visit(offline=True).page
    page.goto((tmp_path / "view.html").as_uri())
    assert numbers(page) == experts_of(layer)
    assert {fill[:3] for fill in fills(page)} == {rgb(NEUTRAL)}
    expert = layer["experts"][0][0]
    page.click(f"[data-key=chip-{expert}]")
    bright = [fill[:3] == rgb(EXPERT_COLOURS[0]) for fill in fills(page)]
    assert bright == [expert in choices for choices in layer["experts"]]


def test_a_link_reproduces_the_view(visit):
    page = visit().page
    press(page, ".mv-rail [data-action=example] >> nth=4", "[data-box=progress]", state="hidden")
    press(page, "[data-variant=untrained]", "[data-box=progress]", state="hidden")
    page.select_option("[data-change=topk]", "3")
    page.wait_for_selector(CHANGED)
    choose_layer(page, 0)
    page.click(".mv-cell[data-patch='11']")
    page.click("[data-mode=entropy]")
    open_tab(page, "classes")
    words = ["variant=untrained", "k=3", "layer=1", "patch=11", "mode=entropy", "tab=classes"]
    at(page, *words)
    other = visit("?" + page.url.partition("?")[2]).page
    assert numbers(other) == numbers(page)
    pressed = ".mv-pinned, [data-mode][aria-pressed=true], [role=tab][aria-selected=true]"
    data = "[one.dataset, one.ariaLabel]"
    assert each(other, pressed, data) == each(page, pressed, data)
    assert page.locator(pressed).count() == 3
    for one in (page, other):
        assert one.input_value("[data-change=flow-layer]") == "0"
    for box in (".mv-box-where", ".mv-flow-answer", ".mv-flow-boxes"):
        assert other.text_content(box) == page.text_content(box)


def test_back_and_forward_walk_through_what_was_looked_at(visit, tmp_path):
    file = tmp_path / "own.png"
    Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 60).convert("RGB").save(file)
    page = visit("?patch=3").page
    start = page.evaluate("history.length")

    def settled(*words):
        at(page, *words)
        page.wait_for_selector("[data-box=progress]", state="hidden")
        return page.get_attribute(".mv-picture", "src")

    first = settled("picture=pets%2Ftest%2F0")
    page.click("[data-action=example][data-id='pets/test/4']")
    second = settled("picture=pets%2Ftest%2F4")
    choose_layer(page, 0)  # no place of its own
    settled("layer=1")
    page.set_input_files("[data-box=file]", file)
    page.wait_for_function(SENT)
    own = page.get_attribute(".mv-picture", "src")
    assert len({first, second, own}) == 3
    open_tab(page, "about")
    settled("tab=about")
    assert page.evaluate("history.length") == start + 3
    page.go_back()
    page.wait_for_selector(".mv-card")
    assert page.get_attribute(".mv-picture", "src") == own
    page.go_back()
    assert settled("picture=pets%2Ftest%2F4", "layer=1") == second
    page.go_back()
    assert settled("picture=pets%2Ftest%2F0", "layer=3", "patch=3") == first
    assert page.locator(".mv-pinned").get_attribute("data-patch") == "3"
    page.go_forward()
    assert settled("picture=pets%2Ftest%2F4") == second
    page.go_forward()
    page.wait_for_function(SENT)
    page.wait_for_function("own => document.querySelector('.mv-picture').src === own", arg=own)


def test_an_expert_has_a_link_and_a_place_in_the_history(visit):
    page = visit("?expert=L1.E2").page
    pressed = ".mv-legend-key [aria-pressed=true]"
    assert page.locator(pressed).get_attribute("data-expert") == "2"
    assert page.input_value("[data-change=flow-layer]") == "0"
    start = page.evaluate("history.length")
    press(page, "[data-key=chip-3]", until="location.search.includes('expert=L1.E3')")
    page.click(".mv-cell[data-patch='5']")  # no place of its own
    page.wait_for_function("location.search.includes('patch=5')")
    assert page.evaluate("history.length") == start + 1
    page.go_back()
    page.wait_for_selector(f"{pressed}[data-expert='2']")


def test_a_link_reproduces_an_intervention(visit, ask):
    page = visit("?do=ablate.3.1.zero.0").page
    change = {"kind": "ablate", "layer": 3, "expert": 1, "fill": "zero", "seed": 0}
    layer = ask("route", picture=FIRST, intervention=change)["layers"][1]
    assert numbers(page) == experts_of(layer)
    assert says(page.text_content("[data-box=said]"), "get nothing")


STRANGE = (
    "?picture=pets/test/999999",
    "?model=nothing&variant=odd&layer=77&patch=-5&mode=x&k=99&capacity=1e9&tab=zz&do=ablate.9.9",
    "?layer=<img src=x onerror=alert(1)>&patch=1e3&k=NaN&do=<b>",
)


@pytest.mark.parametrize("query", STRANGE)
def test_a_link_from_elsewhere_still_opens(visit, ask, query):
    page = visit(query).page
    assert numbers(page) == experts_of(ask("route", picture=FIRST)["layers"][1])


# Of two images the first is shown; what Compare and What if had stands under Classes and Experts, and on the stage.
NEAREST = {
    "picture2": None,
    "tab": {"compare": "classes", "whatif": None},
    "do": {"ablate.3.1.next_best.0": None},
}


@pytest.mark.parametrize("link", OLD_LINKS)
def test_a_link_of_an_earlier_version_opens_the_nearest_view(visit, link):
    """The page asks the server for just that, and its own link still names all of it that there is."""
    one = visit(link)
    named = OLD_LINKS[link][0]
    request = one.question("route")
    assert len(one.questions("route")) == 1
    assert {key: request[key] for key in named} == named
    wished = {
        key: (NEAREST.get(key) or {}).get(value, None if NEAREST.get(key, 0) is None else value)
        for key, value in parse_qsl(link[1:])
    }
    one.page.wait_for_function("!location.search.includes('picture2')")
    words = dict(parse_qsl(one.page.url.partition("?")[2]))
    assert {
        key: value for key, value in wished.items() if value is not None
    }.items() <= words.items()


def test_a_link_with_a_change_opens_on_the_image_and_measures_then(new_visit, server, hold, ask):
    one = new_visit()
    held = hold(one.page, "what_if")
    one.open(server.url + "?do=ablate.3.1.next_best.0&tab=whatif")
    held.wait()
    assert numbers(one.page) == experts_of(ask("route", picture=FIRST, away=[[3, 1]])["layers"][1])
    assert says(one.page.text_content("[data-box=said]"), "Measuring it", "at random")
    assert one.page.locator(".mv-flow-box").count() == 4
    held.release()
    one.page.wait_for_selector("[data-box=said]:has-text('moved at random:')")
    one.page.wait_for_function("location.search.includes('away=3.1')")  # as it is said today
    assert one.complaints == []


def test_ones_own_picture_is_made_small_before_it_is_sent(visit, tmp_path):
    file = tmp_path / "holiday.png"
    Image.effect_mandelbrot((1600, 900), (-2, -1, 1, 1), 60).convert("RGB").save(file)
    one = visit()
    one.page.set_input_files("[data-box=file]", file)
    one.page.wait_for_function(SENT)
    sent = one.question("route")["picture"]
    assert sent["kind"] == "upload"
    with Image.open(io.BytesIO(base64.b64decode(sent["data"].partition(",")[2]))) as picture:
        assert picture.size == (512, 512)
    # The stage shows the sharp original, and the model's 32 px when that is asked for.
    assert one.page.get_attribute(".mv-picture", "src") == sent["data"]
    one.page.check("[data-change=as-seen]")
    seen = one.page.get_attribute(".mv-picture", "src")
    with Image.open(io.BytesIO(base64.b64decode(seen.partition(",")[2]))) as picture:
        assert picture.size == (32, 32)
    assert says(one.page.get_attribute(".mv-picture", "alt"), "the model sees")
    assert says(one.page.text_content("[data-box=said]"), "doesn't look like")


def test_an_image_that_shows_nothing_and_a_file_that_is_none_get_a_sentence(visit, tmp_path):
    Image.new("RGB", (3000, 3)).save(tmp_path / "line.png")
    (tmp_path / "notes.png").write_text("no image")
    for name, words in (("line.png", "3000 × 3 px"), ("notes.png", "can't read")):
        page = visit(door=False).page
        page.set_input_files("[data-box=file]", tmp_path / name)
        page.wait_for_selector("[role=alert]:visible")
        assert says(page.text_content("[role=alert]"), words)
        assert "route" not in page.visit.asked


def test_three_tabs_stay_apart(visit, ask, tmp_path):
    """One browser, one visitor: images, changes and own images belong to a tab."""
    file = tmp_path / "own.png"
    Image.new("RGB", (64, 64), "teal").save(file)
    one = visit()
    tabs = [one.page, *(one.context.new_page() for _ in range(2))]
    for tab, number in zip(tabs[1:], (2, 5), strict=True):
        tab.goto(one.page.url.partition("?")[0] + f"?picture=pets/test/{number}")
        tab.wait_for_selector(".mv-cell")
    take_away(tabs[1], 1)
    tabs[2].set_input_files("[data-box=file]", file)
    tabs[2].wait_for_selector(".mv-own [aria-pressed=true]")
    changed = ask("route", picture={"kind": "example", "id": "pets/test/2"}, away=[[3, 1]])
    assert numbers(tabs[1]) == experts_of(changed["layers"][1])
    assert numbers(tabs[0]) == experts_of(ask("route", picture=FIRST)["layers"][1])
    assert [tab.locator(".mv-own button").count() for tab in tabs] == [0, 0, 1]
    assert tabs[0].locator("[data-action=put-back]").count() == 0
