"""The scrubber over the recorded moments of a training: what it shows is the file's, and no step asks the server."""

import json
from urllib.parse import parse_qsl, quote

import numpy as np
import pytest

from tests.browser.conftest import (
    MOBILE,
    alone,
    at,
    counts,
    each,
    fills,
    no_sideways_scroll,
    numbers,
    press,
    saved,
    violations,
)
from tests.shared import says

pytestmark = pytest.mark.needs("chromium", "playwright")

SLIDER = "[data-change=moment]"
WHEN = ["before training", "after 10 of 100 steps", "after training"]


def scrub(page, key, words):
    page.press(SLIDER, key)
    page.wait_for_selector(f"[data-part=when]:text-is('{words}')")


def first_choices(recorded, moment, image, layer=3):
    return [str(expert) for expert in recorded.first_choice(layer)[moment, image]]


def image_of(page, recorded, key="picture"):
    name = dict(parse_qsl(page.url.partition("?")[2]))[key].removeprefix("data/")
    return recorded.image_names.index(name)


def test_a_moment_is_what_was_recorded_then(photos, recorded):
    page = photos(until="location.search.includes('picture=')").page
    image = image_of(page, recorded)
    assert page.get_attribute(SLIDER, "aria-valuetext") == "after training"
    trained = page.text_content(".mv-box-card")
    page.visit.rest()
    page.visit.requests.clear()
    scrub(page, "Home", "before training")
    for moment, words in enumerate(["before training", "after 10 of 100 steps"]):
        assert numbers(page) == first_choices(recorded, moment, image)
        weights = recorded.weights[3][moment, image].astype(float)
        assert [fill[3] for fill in fills(page)] == pytest.approx(0.65 * weights.max(-1), abs=0.005)
        p = recorded.probabilities[moment, image].astype(float)
        best = page.locator(".mv-flow-answer li").first
        assert page.text_content("[data-part=when]") == words
        assert says(page.text_content(".mv-flow-answer"), "The model said")
        assert best.get_attribute("data-class") == recorded.class_names[p.argmax()]
        assert best.locator("b").text_content() == f"{100 * p.max():.0f} %"
        first = recorded.first_choice(3)[moment, image].tolist()
        assert counts(page) == [first.count(expert) for expert in range(4)]
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(200)
    # The last moment is the model itself, with all that is known of it.
    assert page.get_attribute(SLIDER, "aria-valuetext") == "after training"
    assert page.text_content(".mv-box-card") == trained
    assert page.visit.asked == ["history"]
    assert page.evaluate("document.activeElement.dataset.change") == "moment"


def test_nothing_of_another_moment_stands_there(photos):
    page = photos("?tab=about").page
    assert page.locator("[data-mode]:visible").count() > 1
    scrub(page, "Home", "before training")
    # The card's sums are the trained model's.
    assert page.locator(".mv-part").count() == 0
    assert not page.is_visible(".mv-box-card")
    assert page.locator(".mv-facts").count() == 0
    assert page.locator("[data-mode]:visible").all_text_contents() == ["Regions", "Each patch"]
    below = "getComputedStyle(document.querySelector('.mv-panel'), '::before').content"
    assert "the trained model" in page.evaluate(below)
    press(page, "[data-action=to-trained]", ".mv-part")
    assert page.evaluate(below) == "none"


def told(page):
    return page.locator(".mv-film [data-part=told]").all_text_contents()


def words(history, moment, layer=1):
    """By hand, over all recorded images: a choice is a weight above 0, the class is the first part of a name."""
    best = [history.class_names[each] for each in history.probabilities[moment].argmax(-1)]
    right = sum(
        name.split("/")[0] == said for name, said in zip(history.image_names, best, strict=True)
    )
    taken = np.count_nonzero(history.weights[(1, 3)[layer]][moment], axis=(0, 1))
    return f"{right} of 3 right, busiest expert {100 * taken.max() / taken.sum():.0f} %"


def test_the_film_runs_on_an_axis_of_steps(photos, recorded):
    """10 of the 40 steps to the end are a quarter of the axis; keys go from moment to moment."""
    page = photos(reduced_motion="reduce").page
    page.wait_for_selector(SLIDER)
    assert told(page) == [words(recorded, 2)]
    where = ".mv-chart > i"
    for moment, (key, left) in enumerate([("Home", 0), ("ArrowRight", 25), ("ArrowRight", 100)]):
        page.press(SLIDER, key)
        page.wait_for_selector(f"{SLIDER}[aria-valuetext='{WHEN[moment]}']")
        assert each(page, where, "one.style.left") == [f"{left}%"]
        assert told(page) == [words(recorded, moment)]
        thumb = page.locator(SLIDER).bounding_box()
        line = page.locator(where).first.bounding_box()
        at = thumb["x"] + 8 + (thumb["width"] - 16) * left / 100  # a thumb is 16 px wide
        assert line["x"] + line["width"] / 2 == pytest.approx(at, abs=1.5)
    # By the pointer: the moment that lies nearest, wherever it is let go.
    page.mouse.click(thumb["x"] + 0.4 * thumb["width"], thumb["y"] + thumb["height"] / 2)
    page.wait_for_selector(f"{SLIDER}[aria-valuetext='{WHEN[1]}']")
    # The bands of each chart are one per expert; their heights at the first moment add up to all of it.
    ends = "[one.points[0].y, one.points.getItem(one.points.numberOfItems - 1).y]"
    first = each(page, ".mv-chart:first-child polygon", ends)
    loads = np.count_nonzero(recorded.weights[3][0], axis=(0, 1))
    assert [low - high for high, low in first] == pytest.approx(100 * loads / loads.sum(), abs=0.2)
    page.keyboard.press("-")  # the layer before
    page.wait_for_selector(".mv-box-time:has-text('expert of L1')")
    assert told(page) == [words(recorded, 1, 0)]


@pytest.mark.parametrize("phone", [False, True])
def test_the_film_plays_where_the_photo_is_in_sight(photos, phone):
    """Both in one screen of 1440 x 900 and of 390 x 844, before and while it runs."""
    page = photos(**(MOBILE if phone else {"viewport": {"width": 1440, "height": 900}})).page
    parts = [".mv-flow-photo", "[data-action=run]", ".mv-chart"]
    assert max(places(page, parts)) <= (844 if phone else 900)
    before = page.locator("[data-action=run]").bounding_box()
    press(page, "[data-action=run]", ".mv-past")
    assert page.locator("[data-action=run]").bounding_box()["y"] == pytest.approx(
        before["y"], abs=1
    )
    page.wait_for_selector("[data-action=run]:text-is('Play')")


def places(page, selectors):
    """Where each ends, in px from the top of the screen; none begins above it."""
    boxes = [page.locator(selector).first.bounding_box() for selector in selectors]
    assert all(box["y"] >= 0 for box in boxes)
    return [box["y"] + box["height"] for box in boxes]


def test_a_moment_that_comes_late_does_not_bring_back_the_image_before(photos, recorded, hold):
    page = photos().page
    held = hold(page, "history")
    page.press(SLIDER, "Home")
    held.wait()
    before = page.get_attribute(".mv-picture", "alt")
    page.click(".mv-rail [data-action=example] >> nth=1")
    page.wait_for_function("alt => document.querySelector('.mv-picture').alt !== alt", arg=before)
    held.release()
    assert page.get_attribute(".mv-picture", "alt") != before


def test_a_link_and_a_reload_carry_the_moment(photos, recorded):
    page = photos("?step=10&patch=5", then=f"{SLIDER}[aria-valuetext='after 10 of 100 steps']").page
    page.wait_for_function("location.search.includes('step=10')")
    assert numbers(page) == first_choices(recorded, 1, image_of(page, recorded))
    start = page.evaluate("history.length")
    # Another example keeps the moment, and is a place in the history; a moment is none.
    other = page.get_attribute(".mv-rail [data-action=example] >> nth=1", "data-id")
    page.click(".mv-rail [data-action=example] >> nth=1")
    at(page, "step=10", quote(other, safe=""))
    scrub(page, "Home", "before training")
    page.wait_for_function("location.search.includes('step=0')")
    assert page.evaluate("history.length") == start + 1
    page.go_back()
    page.wait_for_selector(f"{SLIDER}[aria-valuetext='after 10 of 100 steps']")
    scrub(page, "End", "after training")
    page.wait_for_function("!location.search.includes('step=')")
    strange = photos("?step=11").page
    assert strange.get_attribute(SLIDER, "aria-valuetext") == "after training"


def test_play_runs_through_the_moments(photos):
    page = photos().page
    page.evaluate("""() => {
      const words = document.querySelector("[data-part=when]");
      window.seen = [];
      new MutationObserver(() => seen.push(words.textContent)).observe(words, { childList: true });
    }""")
    press(page, "[data-action=run]", until="window.seen.at(-1) === 'after training'")
    seen = page.evaluate("window.seen.filter((word, at) => word !== window.seen[at - 1])")
    assert [word for word in seen if word != "loading…"] == WHEN
    page.wait_for_selector("[data-action=run]:text-is('Play')")


def test_without_motion_there_is_a_scrubber_and_no_play(photos):
    page = photos(reduced_motion="reduce").page
    assert page.locator("[data-action=run]:visible").count() == 0
    scrub(page, "Home", "before training")
    assert {*each(page, ".mv-cell", "getComputedStyle(one).transitionDuration")} == {"0s"}


@pytest.mark.parametrize("query", ["?k=1", "?do=ablate.3.1.zero.0", "?away=3.1"])
def test_of_a_changed_model_nothing_was_recorded(photos, query):
    page = photos(query).page
    assert says(page.text_content(".mv-box-time"), "without changes")
    assert page.locator(SLIDER).count() == 0


def test_a_moment_can_not_be_changed(photos, recorded):
    """Its experts weren't kept: what is taken away would be of the trained model, as if it had been of this one."""
    page = photos().page
    page.visit.rest()
    scrub(page, "Home", "before training")

    def refused(control):
        page.locator(control).first.click()
        page.wait_for_selector(".mv-toast:visible")
        assert says(page.text_content(".mv-toast"), "Only the trained")
        page.evaluate("document.querySelector('.mv-toast').hidden = true")

    def shown():
        return page.locator(".mv-flow-answer").inner_text(), counts(page), len(page.visit.asked)

    before = shown()
    refused(".mv-flow-box:not(:disabled)")
    assert shown() == before
    assert says(page.text_content("[data-box=said]"), "Only the trained")
    assert "Take it away" not in page.locator(".mv-flow-box").first.get_attribute("aria-label")
    assert page.text_content("[data-part=when]") == "before training"
    page.click("[data-key=chip-0]")
    refused("[data-action=hand]")
    page.click("[data-box=said] [data-action=to-trained]")
    page.wait_for_selector("[data-part=when]:text-is('after training')")
    page.locator(".mv-flow-box:not(:disabled)").first.click()
    page.wait_for_function("location.search.includes('away=')")


def test_a_model_without_a_history_has_no_scrubber(visit):
    assert visit().page.text_content(".mv-box-time") == ""


def test_an_exported_page_has_the_scrubber_without_a_server(photos, new_visit, recorded, tmp_path):
    served = photos().page
    page = alone(new_visit, served, tmp_path).page
    scrub(page, "Home", "before training")
    before = first_choices(recorded, 0, image_of(served, recorded))
    assert numbers(page) == before
    # It opens where its address says, and follows it.
    page.goto(f"{page.visit.address}#step=0&patch=2")
    page.reload()
    page.wait_for_selector(".mv-past")
    assert numbers(page) == before
    assert page.get_attribute(".mv-pinned", "data-patch") == "2"
    page.evaluate("location.hash = '#expert=L3.E1'")
    page.wait_for_selector("[data-key=chip-1][aria-pressed=true]")
    assert page.locator(".mv-past").count() == 0
    page.evaluate("location.hash = '#layer=3'")
    page.wait_for_selector(".mv-legend-key [aria-pressed=true]", state="detached")
    assert numbers(page) == served.locator(".mv-mark").all_text_contents()
    assert page.visit.complaints == []


def test_exports_say_which_moment_they_are_of(photos):
    page = photos("?step=0", then=f"{SLIDER}[aria-valuetext='before training']").page
    view = json.loads(saved(page, "json").path().read_text())
    assert view["moment"] == {"step": 0, "total_steps": 100}
    assert {layer["computation"] for layer in view["layers"]} == {None}


@pytest.mark.parametrize(("scheme", "width"), [("dark", 390), ("light", 1440)])
def test_axe_finds_nothing_and_nothing_scrolls_sideways(photos, scheme, width):
    page = photos(color_scheme=scheme, viewport={"width": width, "height": 844}).page
    scrub(page, "Home", "before training")
    assert violations(page, ".mv-columns") == []
    assert no_sideways_scroll(page)
