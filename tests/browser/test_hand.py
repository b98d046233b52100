"""What is changed other than by taking experts away: told below the boxes, beside its control, and undone there."""

import pytest

from tests.browser.conftest import (
    CHANGED,
    FIRST,
    experts_of,
    numbers,
    press,
    result,
    said,
    take_away,
    told,
)
from tests.shared import says

pytestmark = pytest.mark.needs("chromium", "playwright")

FIELDS = {"layer": 3, "expert": 1, "fill": "next_best", "seed": 0}

MEASURED = "[data-box=said] [data-part=class]"
FORCE = ".mv-box-hand [data-action=hand]"
TOP = "document.querySelector('.mv-flow-row').getBoundingClientRect().top + scrollY"  # the photo sticks
ALL = {"kind": "random", "layer": None, "expert": None}
SOME = "Patches go to random experts"


@pytest.mark.parametrize(
    ("word", "change", "words"),
    [
        ("random.3.any.next_best.0", {**ALL, "layer": 3}, f"{SOME} in L3"),
        ("random.all.any.next_best.0", ALL, f"{SOME} in every layer"),
    ],
)
def test_random_experts_are_asked_for_by_a_link(visit, ask, word, change, words):
    expected = ask("what_if", picture=FIRST, intervention={**FIELDS, **change})
    page = visit(f"?do={word}").page
    page.wait_for_selector(MEASURED)
    assert words in told(page)
    assert result(expected) in told(page)
    assert word in page.url
    press(page, "[data-action=as-is]", CHANGED, state="detached")


def test_an_expert_is_changed_told_linked_and_undone(visit, ask):
    change = {**FIELDS, "kind": "force"}
    expected = ask("what_if", picture=FIRST, intervention=change)
    page = visit().page
    top = page.evaluate(TOP)
    page.click("[data-key=chip-1]")
    page.click(FORCE)
    page.wait_for_selector(MEASURED)
    assert page.visit.question("what_if")["intervention"] == change
    assert page.visit.asked.count("route") == 1  # which is shown while the effect is measured
    text = told(page)
    assert "Every patch in L3 goes to L3·E1" in text
    assert result(expected) in text
    assert result(expected) in said(page)
    assert says(page.text_content(".mv-flow-answer"), "The changed model says")
    assert page.evaluate(TOP) == top  # nothing jumps
    assert numbers(page) == ["1"] * 16  # of the expert in the hand alone
    page.wait_for_function("location.search.includes('do=force.3.1.next_best.0')")
    linked = visit("?" + page.url.partition("?")[2]).page
    linked.wait_for_selector(MEASURED)
    assert told(linked) == text
    assert numbers(linked) == numbers(page)
    press(page, "[data-action=as-is]", CHANGED, state="detached")
    page.wait_for_function("!location.search.includes('do=')")
    page.go_back()  # the change has a place in the history
    page.wait_for_selector(CHANGED)
    page.go_forward()
    page.wait_for_selector(CHANGED, state="detached")
    press(page, "[data-key=chip-1]", "[data-box=progress]", state="hidden")
    assert numbers(page) == experts_of(ask("route", picture=FIRST)["layers"][1])


def test_the_keyboard_changes_an_expert_and_keeps_its_place(visit):
    page = visit().page
    page.press("[data-key=chip-2]", "Enter")
    assert page.evaluate("document.activeElement.dataset.key") == "chip-2"
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.key") == "hand":
            break
    page.keyboard.press("Enter")
    page.wait_for_selector("[data-key=hand][aria-pressed=true]")
    page.wait_for_selector(MEASURED)
    assert page.evaluate("document.activeElement.dataset.key") == "hand"
    page.keyboard.press("Enter")  # once more: undone
    page.wait_for_selector(CHANGED, state="detached")
    assert page.evaluate("document.activeElement.dataset.key") == "hand"


def test_the_expert_of_the_pinned_patch_comes_into_the_hand(visit, ask):
    expert = ask("route", picture=FIRST)["layers"][1]["experts"][5][0]
    page = visit("?patch=5").page
    page.click(".mv-where [data-action=highlight]")
    assert f"expert {expert}" in page.text_content(".mv-box-hand")


def test_what_an_absence_does_is_told_over_more_images(visit, ask):
    change = {**FIELDS, "kind": "ablate"}
    effect = ask("what_if", picture=FIRST, intervention=change)
    one = visit()
    take_away(one.page, 1)
    assert one.question("route")["away"] == [[3, 1]]
    one.page.wait_for_selector(MEASURED)
    assert result(effect) in told(one.page)
    assert one.page.text_content("h1").startswith("Without expert 1 ")
    one.page.click("[data-action=hand-class]")
    name = effect["target"]
    over = ask("class_effect", **{"class": name, "intervention": change})["class_effect"]
    one.page.wait_for_selector(f"[data-part=class]:has-text('Over {over['n']} images of {name}')")
