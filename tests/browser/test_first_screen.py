"""What a newcomer sees: Simple, two images, a counted sentence; and the way to everything else."""

import re

import pytest

from tests.demo.serving import asked_for

pytestmark = pytest.mark.needs("chromium", "playwright")

WORDS = 150
RESEARCH = ("bits", "entropy", "margin", "twin", "residual", "capacity", "drops", "slowest")
# The numbers in the patches are the image's, and a screen reader's words are no text to be read.
READ = """() => {
  const grids = [...document.querySelectorAll('.mv-grid, .mv-hidden')];
  grids.forEach((grid) => { grid.style.display = 'none'; });
  const text = document.querySelector('.mv').innerText;
  grids.forEach((grid) => { grid.style.display = ''; });
  return text;
}"""


@pytest.fixture
def newcomer(visit):
    one = visit(level=None)
    one.page.wait_for_selector(".mv-question")
    return one


def test_simple_is_a_pair_a_counted_sentence_and_few_words(newcomer, ask, look):
    page = newcomer.page
    assert page.locator("[data-slot]").count() == 2
    counted = ask("classes")
    assert f"{counted['n_images']} " in page.text_content(".mv-question")
    assert "L3" in page.text_content(".mv-question")
    read = page.evaluate(READ)
    assert [word for word in RESEARCH if word in read.lower()] == []
    assert len([word for word in read.split() if any(map(str.isalpha, word))]) <= WORDS
    assert "2 of 4 experts ran for this patch" in read
    assert look.no_sideways_scroll(page)
    assert "experts" not in newcomer.asked  # what is below waits until it is asked for
    look.open_tab(page, "experts")
    assert page.locator(".mv-card:visible").count() == 4


def test_research_shows_the_rest_and_is_remembered_and_linked(newcomer, visit):
    page = newcomer.page
    page.click("[data-level=research]")
    read = page.evaluate(READ).lower()
    assert [word for word in RESEARCH if word not in read] == []
    page.wait_for_function("location.search.includes('level=research')")
    link = page.url.partition("?")[2]
    page.goto(page.url.partition("?")[0])
    page.wait_for_selector("[data-mode=entropy]:visible")
    other = visit("?" + link, level="simple").page
    assert other.locator("[data-level=research][aria-pressed=true]").count() == 1
    assert other.locator("[data-slot]").count() == 2


def test_the_sentence_of_another_network_waits_for_its_own_count(newcomer):
    """What was counted over the trained network's images doesn't stand above the untrained one's."""
    page = newcomer.page
    computing = {"status": "computing", "layers": [], "class_names": [], "n_images": 0, "note": ""}

    def still_counts(route):
        if asked_for(route.request) == "classes" and route.request.post_data_json["variant"] == "untrained":
            return route.fulfill(json=computing)
        return route.continue_()

    page.route(re.compile(r"/api/\w+$"), still_counts)
    page.click("[data-variant=untrained]")
    page.wait_for_function("location.search.includes('variant=untrained')")
    page.wait_for_selector("[data-box=main][aria-busy=false]")
    assert page.locator(".mv-question").count() == 0
    assert "Counting" in page.text_content(".mv-asking")
