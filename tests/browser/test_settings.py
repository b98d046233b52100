"""M7 to M9: other colourings, capacity, k, and the switch between versions of the model."""

import pytest

from tests.browser.conftest import (
    CHANGED,
    FIRST,
    at,
    each,
    example,
    experts_of,
    fills,
    numbers,
)
from tests.shared import says

pytestmark = pytest.mark.needs("chromium", "playwright")

MINUS = "\N{MINUS SIGN}"


def test_entropy_stands_in_the_patches(visit, ask):
    layer = ask("route", picture=FIRST)["layers"][1]
    page = visit().page
    page.click("[data-mode=entropy]")
    # One decimal is shown.
    assert [float(text) for text in numbers(page)] == pytest.approx(layer["entropy"], abs=0.0501)
    opacities = [fill[3] for fill in fills(page)]
    assert opacities.index(max(opacities)) == layer["entropy"].index(max(layer["entropy"]))


def hatched(page):
    return page.evaluate(
        "[...document.querySelectorAll('.mv-cell.mv-hatched')].map((one) => Number(one.dataset.patch))"
    )


def test_capacity_is_off_until_asked_for_and_shows_what_it_drops(visit, ask):
    page = visit("?mode=drops").page  # a colouring of earlier versions: each patch shows it
    at(page, "mode=expert")
    assert page.input_value("[data-change=capacity]") == ""
    assert "route" not in page.visit.asked  # the view that came with the page has no limit
    assert hatched(page) == []
    page.select_option("[data-change=capacity]", "1")
    page.wait_for_selector(CHANGED)
    assert page.visit.question("route")["capacity"] == 1
    layer = ask("route", picture=FIRST, capacity=1.0)["layers"][1]
    dropped = [kept.count(False) for kept in layer["kept"]]
    assert sum(dropped) > 0
    assert hatched(page) == [p for p, kept in enumerate(layer["kept"]) if not kept[0]] != []
    assert "hatched: dropped by capacity" in page.text_content(".mv-box-legend")
    assert "capacity factor 1" in page.text_content("[data-box=said]")
    patch = dropped.index(max(dropped))
    page.click(f".mv-cell[data-patch='{patch}']")
    assert page.locator(".mv-part-kept .mv-lost-row").count() == dropped[patch]


def test_another_k_is_marked(visit, ask):
    page = visit().page
    page.select_option("[data-change=topk]", "3")
    page.wait_for_selector(CHANGED)
    assert page.visit.question("route")["top_k"] == 3
    assert says(page.text_content("[data-box=said]"), "top-2", "k = 3")
    assert page.locator(".mv-card-rows [data-expert]:not(.mv-away)").count() == 3
    page.select_option("[data-change=topk]", "")
    page.wait_for_selector(CHANGED, state="detached")
    assert page.visit.question("route")["top_k"] is None
    assert numbers(page) == experts_of(ask("route", picture=FIRST)["layers"][1])


def test_one_switch_shows_the_untrained_model_and_the_trained_one_again(visit, ask):
    page = visit().page
    for variant in ("untrained", "trained"):
        page.click(f"[data-variant={variant}]")
        layer = ask("route", picture=FIRST, variant=variant)["layers"][1]
        assert numbers(page) == experts_of(layer)
        pressed = each(page, "[data-variant][aria-pressed=true]", "one.dataset.variant")
        assert pressed == [variant]


def test_the_latest_of_two_quick_choices_wins(visit, ask):
    one = visit()
    click = "all => all.forEach(one => document.querySelector(one).click())"
    one.page.evaluate(click, [example(3), example(5)])
    view = ask("route", picture={**FIRST, "id": "pets/test/5"})
    assert numbers(one.page) == experts_of(view["layers"][1])
