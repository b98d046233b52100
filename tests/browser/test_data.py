"""The tab Data: a ranked image on the stage, in the address and after a reload; whatever its name."""

from urllib.parse import quote

import pytest

from moevision.demo.models import open_entries
from moevision.demo.service import Explorer
from tests.browser.conftest import answering, no_sideways_scroll
from tests.demo.conftest import HOSTILE
from tests.shared import says

pytestmark = pytest.mark.needs("chromium", "playwright")

HOME = "http://127.0.0.1:7860/"  # where the links of `data score` lead; nothing listens there
FIRST, SHOWN = ".mv-ranked li:first-child button", "location.search.includes('picture=train')"
PHONE = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}


@pytest.fixture(scope="module")
def scored(scored_run):
    return Explorer(open_entries(str(scored_run)))


@pytest.fixture
def visit_run(visits_at, scored):
    """Opens visits of an explorer that answers in this process."""
    return visits_at(HOME, answering(HOME, scored))


def first_card(page, list_name):
    page.wait_for_selector(f"[aria-pressed=true]:text-is('{list_name}')")
    page.wait_for_selector(".mv-ranked")
    return page.locator(FIRST)


def test_a_ranked_image_comes_onto_the_stage_and_stays_there(visit_run, scored):
    doubtful = scored.answer("data", {"list": "doubtful"})["entries"]
    page = visit_run().page
    assert "data" not in page.visit.asked  # before the tab is opened
    page.click("[data-tab=data]")
    card = first_card(page, "Doubtful labels")
    assert says(page.text_content(".mv-panel .mv-lead"), "no verdicts")
    assert page.locator(".mv-ranked li").count() == len(doubtful)
    first = doubtful[0]
    shown = f"cat{first['value']}right {first['right']} of {first['visits']} times"
    assert card.text_content() == shown
    assert HOSTILE in card.get_attribute("aria-label")
    card.focus()
    page.keyboard.press("Enter")
    page.wait_for_function(SHOWN)
    assert page.locator(FIRST).get_attribute("aria-pressed") == "true"
    assert page.evaluate("document.activeElement.ariaLabel").startswith("Open cat/<img")
    assert HOSTILE in page.locator(".mv-picture").get_attribute("alt")
    assert page.visit.question("route")["picture"] == {"kind": "example", "id": f"train/{HOSTILE}"}
    page.select_option("[data-change=data-class]", "cat")
    page.click("[data-list=easiest]")
    easiest = scored.answer("data", {"list": "easiest", "class": "cat"})["entries"]
    assert easiest[0]["name"] in first_card(page, "Easiest").get_attribute("aria-label")
    page.wait_for_function("location.search.includes('list=easiest')")
    page.reload()
    assert easiest[0]["name"] in first_card(page, "Easiest").get_attribute("aria-label")
    assert page.input_value("[data-change=data-class]") == "cat"
    assert page.locator(".mv-ranked button").count() == len(easiest)
    assert HOSTILE in page.locator(".mv-picture").get_attribute("alt")
    assert page.locator(".mv img[src=x]").count() == 0


def test_a_link_of_the_page_of_data_score_on_a_phone(visit_run):
    link = f"?picture={quote(f'train/{HOSTILE}')}&tab=data&list=nope&class=nope"
    page = visit_run(link, **PHONE).page
    assert first_card(page, "Doubtful labels").get_attribute("aria-pressed") == "true"
    assert page.locator(".mv-canvas").count() == 1
    assert no_sideways_scroll(page)


def test_without_scores_there_is_no_such_tab(visit):
    page = visit("?tab=data").page
    assert page.locator("[data-tab]").all_text_contents() == ["Experts", "Classes", "About"]
    assert page.get_attribute("[data-tab=experts]", "aria-selected") == "true"
