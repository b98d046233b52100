"""The lesson in a browser, from its file and offline: by keyboard, on a projector, wide and narrow, light and dark."""

from pathlib import Path

import pytest

from tests.browser.conftest import axe

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
    one = lesson()
    page = one.page
    assert len(shown(page)) == 9
    assert page.locator(".ls-answer:visible").count() == 0
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the first button is the projector
    for step in range(1, 10):
        assert shown(page) == [f"step-{step}"]
        assert page.evaluate("document.activeElement.id") == f"title-{step}"
        page.keyboard.press("ArrowRight")
        assert page.locator(".ls-answer:visible").count() == 1
        page.keyboard.press("PageDown" if step % 2 else "ArrowRight")
    assert shown(page) == ["step-9"]
    page.keyboard.press("ArrowLeft")
    assert page.url.endswith("#projector-8")
    assert page.locator("[aria-expanded=true]:visible").text_content() == "Hide the answer"
    page.keyboard.press("Escape")
    assert len(shown(page)) == 9
    assert one.complaints == []
    assert one.strangers(PAGE) == []


def test_the_toy_trains_and_balance_shares_the_work(lesson):
    """Where motion is unwanted, all 800 steps are made at once. The slider keeps its arrow keys on the projector."""
    page = lesson("#projector-4", reduced_motion="reduce").page
    facts = page.locator("[data-play-box=facts]")
    page.click("[data-play=run]")
    assert page.text_content("[data-play-box=steps]") == "800 of 800 steps"
    without = facts.text_content()
    page.focus("[data-play=balance]")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.text_content("[data-play-box=balance]") == "0.1"
    assert shown(page) == ["step-4"]
    assert page.locator(".ls-answer:visible").count() == 0
    page.click("[data-play=run]")
    assert facts.text_content().startswith("4 of 4 experts at work")
    assert not without.startswith("4 of 4")
    assert page.text_content("[role=status]") == f"800 steps. {facts.text_content()}"


@pytest.mark.parametrize(("scheme", "width"), [("light", 1440), ("dark", 390)])
def test_axe_finds_nothing_and_nothing_scrolls_sideways(lesson, look, scheme, width):
    page = lesson(color_scheme=scheme, viewport={"width": width, "height": 900}, reduced_motion="reduce").page
    page.click("[data-choice='0'] >> nth=0")
    for button in page.locator("[data-reveal]").all():
        button.click()
    found = axe(page)
    assert [f"{one['id']}: {node['html'][:200]}" for one in found for node in one["nodes"]] == []
    assert look.no_sideways_scroll(page)
