"""The lesson in a browser, from its file and offline: by keyboard, on a projector, wide and narrow, light and dark."""

import time
from pathlib import Path

import pytest

from tests.browser.conftest import no_sideways_scroll, press, violations
from tests.shared import says

pytestmark = pytest.mark.needs("chromium", "playwright")

PAGE = (Path(__file__).parents[2] / "docs" / "lesson.html").as_uri()


@pytest.fixture
def lesson(new_visit):
    def open(hash="", **options):
        one = new_visit(offline=True, door=False, **options)
        one.page.goto(PAGE + hash)
        return one

    return open


def shown(page):
    return page.locator(".ls-step:visible").evaluate_all("steps => steps.map(step => step.id)")


def test_the_projector_goes_through_the_lesson_by_arrow_keys(lesson):
    page = lesson().page
    assert len(shown(page)) == 8
    assert page.locator(".ls-answer:visible").count() == 0
    page.press("[data-projector] >> nth=0", "Enter")
    for step in range(1, 9):
        assert shown(page) == [f"step-{step}"]
        assert page.evaluate("document.activeElement.id") == f"title-{step}"
        page.keyboard.press("ArrowRight")
        assert page.locator(".ls-answer:visible").count() == 1
        page.keyboard.press("PageDown" if step % 2 else "ArrowRight")
    assert shown(page) == ["step-8"]
    page.keyboard.press("ArrowLeft")
    assert page.url.endswith("#projector-7")
    assert page.locator("[aria-expanded=true]:visible").text_content() == "Hide the answer"
    page.keyboard.press("Escape")
    assert len(shown(page)) == 8
    assert page.visit.complaints == []
    assert page.visit.strangers(PAGE) == []


def test_the_toy_collapses_and_recovers_as_the_slider_moves(lesson):
    """Where motion is unwanted, 800 steps are made at once. The slider keeps its arrow keys on the projector."""
    page = lesson("#projector-4", reduced_motion="reduce").page
    facts = page.locator("[data-play-box=facts]")
    assert says(facts.text_content(), "4 of 4", "at work")
    page.click("[data-play=run]")
    assert page.text_content("[data-play-box=steps]") == "800 steps"
    assert facts.text_content().startswith("1 of 4")
    page.focus("[data-play=balance]")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    assert page.text_content("[data-play-box=balance]") == "0.3"
    assert shown(page) == ["step-4"]
    assert page.locator(".ls-answer:visible").count() == 0
    page.click("[data-play=run]")
    assert page.text_content("[data-play-box=steps]") == "1600 steps"
    assert says(facts.text_content(), "4 of 4", "at work")
    assert page.text_content(".ls-play [role=status]") == f"1600 steps. {facts.text_content()}"


def test_a_slider_that_moves_ends_the_collapse_late_as_well(lesson):
    """While the router trains, and after it has stopped: each move is worth 800 more steps, and so is another press."""
    page = lesson("#step-4", reduced_motion="reduce").page  # its first 1 600 steps at once
    steps = page.locator("[data-play-box=steps]")

    def ended(count):
        page.wait_for_function(
            f"document.querySelector('[data-play-box=steps]').textContent === '{count} steps' && "
            "document.querySelector('[data-play=run]').textContent === 'Train'"
        )

    page.click("[data-play=run]")
    ended(800)
    assert page.text_content("[data-play-box=facts]").startswith("1 of 4")
    page.click("[data-play=run]")
    ended(1600)
    page.emulate_media(reduced_motion="no-preference")
    page.click("[data-play=run]")
    page.locator("[data-play=balance]").fill("1")
    page.wait_for_function("document.querySelector('[data-play=run]').textContent === 'Pause'")
    page.click("[data-play=run]")
    moved = int(steps.text_content().split()[0])
    assert moved < 2400
    page.locator("[data-play=balance]").fill("4")  # goes on by itself
    ended(moved + 800)
    assert page.text_content("[data-play-box=facts]").startswith("4 of 4")


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (1440, 900), (1920, 1080)])
def test_question_and_figure_are_seen_at_once(lesson, width, height):
    """On a projector, above its bar; the toy stays in sight when its answer is shown."""
    page = lesson(
        "#projector-1", viewport={"width": width, "height": height}, reduced_motion="reduce"
    ).page

    def fits(part):
        box = page.locator(f".ls-now {part}").bounding_box()
        return (
            box["y"] >= 0
            and box["y"] + box["height"] <= page.locator(".ls-bar").bounding_box()["y"]
        )

    for step in range(1, 9):
        assert shown(page) == [f"step-{step}"]
        assert [part for part in (".ls-ask", ".ls-look") if not fits(part)] == [], step
        page.keyboard.press("ArrowRight")
        assert step != 4 or all(
            fits(part) for part in (".ls-answer", "[data-plane]", "[data-curve]")
        )
        page.keyboard.press("ArrowRight")


def test_printed_it_is_a_worksheet_of_closed_answers(lesson):
    page = lesson().page
    page.locator("[data-reveal]").nth(3).click()
    page.emulate_media(media="print")
    assert (
        page.locator(".ls-answer:visible, [data-right]:visible, .ls-teacher:visible").count() == 0
    )
    assert page.locator(".ls-lines:visible").count() == 8
    page.emulate_media(media="screen")
    page.click(".ls-teacher summary")
    page.emulate_media(media="print")
    assert page.locator(".ls-teacher tbody tr:visible").count() == 8


def test_emoji_are_sorted_by_hand_and_then_fly_to_the_routers_boxes(lesson):
    page = lesson(reduced_motion="reduce").page
    said = page.locator("[data-game-said]")
    for emoji in range(16):
        page.click(f"[data-pick='{emoji // 4}']")
        page.click(f"[data-emoji='{emoji}']")
        if emoji == 14:
            assert says(said.text_content(), "Box D", "1 of 16 left")
    assert page.get_attribute("[data-emoji='5']", "aria-label") == "spaghetti: box B"
    assert says(said.text_content(), "Your sorting", "%")
    rows = page.locator("[data-game-costs] tbody tr")
    firsts = ["you", "the router", "chance, mean of 200"]
    assert page.locator("[data-game-costs] tbody th").all_text_contents() == firsts
    assert rows.nth(0).text_content().count("2.0×") == 1  # four of sixteen: twice a fair share
    assert rows.nth(1).text_content().endswith("16 of 16")
    router = page.locator("[data-flow=router]")
    assert router.locator(".mv-flow-box").count() == 0
    page.locator("#step-1 [data-choice]").nth(0).click()
    page.locator("#step-1 [data-reveal]").click()
    assert says(router.locator("h1").text_content(), "Eight experts share this page")
    assert router.locator(".mv-flow-box[data-expert='2']").text_content().split("symbols")[1]
    assert (
        page.locator("#step-1 [aria-pressed=true][data-choice='0']").count() == 1
    )  # a wrong guess stays
    page.click("[data-deal=none]")
    assert rows.count() == 0
    assert page.visit.complaints == []


def test_an_expert_is_taken_away_and_the_headline_is_the_result(lesson):
    page = lesson("#step-7", reduced_motion="reduce").page
    flow = page.locator("[data-flow=away]")
    assert says(flow.locator("h1").text_content(), "Eight experts")
    flow.locator(".mv-flow-box[data-expert='1']").click()  # before the answer nothing happens
    assert says(flow.locator("h1").text_content(), "Eight experts")
    page.locator("#step-7 [data-reveal]").click()
    assert flow.locator("h1").text_content() == "Without expert 2 the symbols become food."
    assert says(flow.locator(".mv-flow-say").text_content(), "symbols", "at random", "put it back")
    flow.locator(".mv-flow-box[data-expert='1']").click()
    assert flow.locator("h1").text_content() == "Without expert 1 the symbols stay symbols."
    flow.locator(".mv-flow-box[data-expert='1']").click()
    assert says(flow.locator("h1").text_content(), "Eight experts")
    page.locator("#step-7 [data-reveal]").click()
    flow.locator(".mv-flow-box[data-expert='2']").click()
    assert says(flow.locator("h1").text_content(), "Eight experts")
    assert page.visit.complaints == []


def test_the_emoji_fly_where_motion_is_wanted(lesson):
    page = lesson().page
    page.locator("#step-1 [data-reveal]").click()
    air = page.locator("[data-flow=router] [data-part=air]")
    air.wait_for(state="visible")
    air.wait_for(state="hidden")


def test_the_toy_trains_by_the_clock(lesson):
    """On a machine that draws four frames in a second 800 steps take seconds, too; by frames it would be 104."""
    page = lesson("#step-4").page
    page.evaluate(
        """window.requestAnimationFrame = (draw) => setTimeout(() => draw(performance.now()), 250)"""
    )
    page.click("[data-play=run]")
    until = time.monotonic() + 40
    steps = page.locator("[data-play-box=steps]")
    while steps.text_content() != "800 steps":
        assert time.monotonic() < until, steps.text_content()
        page.wait_for_timeout(250)
    assert page.text_content("[data-play-box=facts]").startswith("1 of 4")


def test_the_explorer_serves_the_lesson_which_links_back(new_visit, server):
    one = new_visit(door=False, reduced_motion="reduce")
    one.page.goto(f"{server.url}lesson.html")
    assert one.page.locator(".ls-step").count() == 8
    press(one.page, "nav a[data-explore]", ".mv-flow-box")
    assert one.page.url.startswith(f"{server.url}?model=")
    assert one.complaints == []


def test_alone_it_takes_six_steps_of_ten_minutes(lesson):
    page = lesson().page
    page.click("[data-alone]")
    assert shown(page) == ["step-1", "step-2", "step-4", "step-5", "step-7", "step-8"]
    assert page.url.endswith("#alone")
    page.reload()
    assert len(shown(page)) == 6
    page.click("[data-alone]")
    assert len(shown(page)) == 8


def test_the_row_of_experts_grows_and_one_is_lit(lesson):
    page = lesson("#step-2").page
    page.locator("[data-size]").fill("6")
    assert page.text_content("[data-sizes-box=count]") == "64"
    assert page.locator(".ls-sizes > .ls-columns >> nth=0").locator(".ls-lit").count() == 1
    assert page.locator(".ls-sizes > .ls-columns >> nth=1").locator(".ls-lit").count() == 64


@pytest.mark.parametrize(("scheme", "width"), [("light", 1440), ("dark", 390)])
def test_axe_finds_nothing_and_nothing_scrolls_sideways(lesson, scheme, width):
    page = lesson(
        color_scheme=scheme, viewport={"width": width, "height": 900}, reduced_motion="reduce"
    ).page
    page.click("[data-choice='0'] >> nth=0")
    page.click("[data-deal=random]")
    page.click(".ls-teacher summary")
    for button in page.locator("[data-reveal]").all():
        button.click()
    assert violations(page) == []
    assert no_sideways_scroll(page)
