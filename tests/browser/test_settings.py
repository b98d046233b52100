"""M7 to M9: other colourings, loads, capacity, k, and the switch between versions of the model."""

import numpy as np
import pytest

from tests.browser.conftest import (
    CHANGED,
    FIRST,
    each,
    example,
    experts_of,
    figures,
    fills,
    numbers,
    press,
)
from tests.demo.test_computation import unpacked
from tests.shared import says

pytestmark = pytest.mark.needs("chromium", "playwright")

MINUS = "\N{MINUS SIGN}"
OFF = "off the training distribution"


@pytest.mark.parametrize("mode", ["entropy", "margin"])
def test_entropy_and_margin_stand_in_the_patches(visit, ask, mode):
    layer = ask("route", picture=FIRST)["layers"][1]
    page = visit().page
    page.click(f"[data-mode={mode}]")
    # One decimal is shown.
    assert [float(text) for text in numbers(page)] == pytest.approx(layer[mode], abs=0.0501)
    opacities = [fill[3] for fill in fills(page)]
    assert opacities.index(max(opacities)) == layer[mode].index(max(layer[mode]))


def test_loads_beside_the_equal_share(visit, ask):
    layer = ask("route", picture=FIRST)["layers"][1]
    page = visit().page
    assert each(page, ".mv-loadcount", "Number(one.textContent)") == layer["counts"]
    assert sum(layer["counts"]) == 16 * 2
    text = page.text_content(".mv-box-loads")
    assert f"{max(layer['counts']) / 8:.2f}" in text
    assert "equal share, 8 each" in text
    assert page.locator(".mv-ideal").count() == 1


def test_capacity_is_off_until_asked_for_and_shows_what_it_drops(visit, ask):
    page = visit("?mode=drops").page
    assert not page.is_checked("[data-change=limit]")
    assert "route" not in page.visit.asked  # the view that came with the page has no limit
    assert set(numbers(page)) == {""}
    page.check("[data-change=limit]")
    page.wait_for_selector(CHANGED)
    assert page.visit.question("route")["capacity"] == 1
    layer = ask("route", picture=FIRST, capacity=1.0)["layers"][1]
    dropped = [kept.count(False) for kept in layer["kept"]]
    assert sum(dropped) > 0
    assert numbers(page) == [f"×{count}" if count else "" for count in dropped]
    assert page.locator(".mv-off:visible").text_content() == OFF
    patch = dropped.index(max(dropped))
    page.click(f".mv-cell[data-patch='{patch}']")
    assert page.locator(".mv-part-kept .mv-lost-row").count() == dropped[patch]
    assert f"Hatched: {sum(dropped)} dropped" in page.text_content(".mv-box-loads")


def test_another_k_is_marked(visit, ask):
    page = visit().page
    assert page.locator(".mv-off:visible").count() == 0
    page.press("[data-change=topk]", "ArrowRight")
    page.wait_for_selector(CHANGED)
    assert page.visit.question("route")["top_k"] == 3
    assert page.locator(".mv-off:visible").text_content() == OFF
    assert says(page.text_content("[data-box=said]"), "top-2", "k = 3")
    assert page.locator(".mv-card-rows [data-expert]:not(.mv-away)").count() == 3
    press(page, "[data-action=as-trained]", CHANGED, state="detached")
    assert page.visit.question("route")["top_k"] is None
    assert numbers(page) == experts_of(ask("route", picture=FIRST)["layers"][1])


def test_noise_can_be_switched_on_drawn_again_and_off(visit, ask):
    def drawn(seed):
        return experts_of(ask("route", picture=FIRST, noise=seed)["layers"][1])

    page = visit("?patch=5").page
    page.check("[data-change=noise]")
    page.wait_for_selector(CHANGED)
    assert page.visit.question("route")["noise"] == 1
    assert "draw 1" in page.text_content("[data-part=noise]")
    assert numbers(page) == drawn(1)
    values = {name: unpacked(value)[5] for name, value in one_layer(ask, noise=1).items()}
    texts = page.locator("[data-n=score]").all_text_contents()
    shown = [text.replace(MINUS, "-").split() for text in texts]
    assert [float(clean) for clean, _ in shown] == pytest.approx(values["scores"], abs=0.0051)
    assert [float(noise) for _, noise in shown] == pytest.approx(values["noise"], abs=0.0051)
    assert says(page.text_content("[data-part=say]"), "noise of size", "1/4")
    noisy = np.exp(values["scores"] + values["noise"])
    assert figures(page, "share") == pytest.approx(100 * noisy / noisy.sum(), abs=0.51)
    press(page, "[data-action=redraw]", "[data-box=said]:has-text('draw 2')")
    page.wait_for_function("location.search.includes('noise=2')")
    assert numbers(page) == drawn(2)
    page.click("[data-key=chip-1]")
    press(page, ".mv-box-hand [data-kind=force]", ".mv-results:has-text('measured without noise')")
    assert "what_if" not in page.visit.asked
    page.uncheck("[data-change=noise]")
    page.wait_for_selector(".mv-results[role=note]")  # measured
    assert page.visit.question("what_if")["noise"] is None
    press(page, "[data-action=undo]", ".mv-results", state="detached")
    page.click("[data-key=chip-1]")
    assert not page.is_checked("[data-change=noise]")
    assert numbers(page) == experts_of(ask("route", picture=FIRST)["layers"][1])


def one_layer(ask, **settings):
    numbers = ask("route", picture=FIRST, **settings)["layers"][1]["computation"]
    return {name: numbers[name] for name in ("scores", "noise")}


def test_one_switch_shows_the_unbalanced_and_the_untrained_model(visit, ask):
    page = visit().page
    for variant in ("unbalanced", "untrained"):
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
