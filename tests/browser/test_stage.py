"""M1 and M2: the overlay of every layer, and everything about one patch. None of it asks the server."""

import pytest

from moevision.analysis.plots import EXPERT_COLOURS
from tests.browser.conftest import (
    FIRST,
    choose_layer,
    each,
    experts_of,
    fills,
    numbers,
    open_tab,
    said,
)
from tests.shared import says

pytestmark = pytest.mark.needs("chromium", "playwright")

STRENGTH = 0.65  # of the overlay when nobody has moved its slider


@pytest.fixture
def layers(ask):
    return ask("route", picture=FIRST)["layers"]


@pytest.fixture
def quiet(visit):
    """A visit with a tab open whose contents don't depend on the layer: whatever is asked, the stage asks it."""
    one = visit()
    open_tab(one.page, "about")
    one.rest()
    one.requests.clear()
    yield one
    assert one.asked == []
    one.page.reload()  # the manners of `visit` count the requests of a whole visit
    one.page.wait_for_selector(".mv-cell")


def rgb(colour):
    return tuple(int(colour[start : start + 2], 16) for start in (1, 3, 5))


def test_overlay_shows_expert_and_weight_of_every_patch_in_every_layer(quiet, layers):
    page = quiet.page
    for index, layer in enumerate(layers):
        choose_layer(page, index)
        assert numbers(page) == experts_of(layer)
        shown = fills(page)
        colours = [rgb(EXPERT_COLOURS[choices[0]]) for choices in layer["experts"]]
        assert [fill[:3] for fill in shown] == colours
        weights = [STRENGTH * weights[0] for weights in layer["weights"]]
        assert [fill[3] for fill in shown] == pytest.approx(weights, abs=0.005)  # 8 bits


def test_the_picture_is_large_and_crisp(quiet):
    page = quiet.page
    assert page.locator(".mv-canvas").bounding_box()["width"] >= 448
    page.check("[data-change=as-seen]")
    page.wait_for_selector(".mv-picture:not(.mv-sharp)")
    assert each(page, ".mv-picture", "getComputedStyle(one).imageRendering") == ["pixelated"]


def test_a_click_pins_and_arrows_move(quiet, layers):
    page, layer = quiet.page, layers[1]
    page.click(".mv-cell[data-patch='5']")
    expert, weight = layer["experts"][5][0], layer["weights"][5][0]
    assert said(page) == f"row 2, column 2: expert {expert}, weight {weight:.2f}"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert said(page).startswith("row 3, column 3: expert")
    assert page.locator(".mv-pinned").get_attribute("data-patch") == "10"
    assert page.locator("[aria-selected=true].mv-cell").get_attribute("data-patch") == "10"
    assert page.evaluate("document.activeElement.dataset.patch") == "10"
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")  # at the edge already
    assert page.evaluate("document.activeElement.dataset.patch") == "8"
    page.keyboard.press("Escape")
    assert page.locator(".mv-pinned").count() == 0


def test_plus_and_minus_need_no_focus(visit, layers):
    page = visit().page
    assert page.evaluate("document.activeElement === document.body")
    page.keyboard.press("-")
    assert numbers(page) == experts_of(layers[0])
    page.click("[role=tab][data-tab=classes]")
    page.focus("[data-change=model]")  # a field keeps its keys
    page.keyboard.press("+")
    assert numbers(page) == experts_of(layers[0])


def test_plus_and_minus_change_the_layer(quiet, layers):
    page = quiet.page
    page.click(".mv-cell[data-patch='10']")
    page.keyboard.press("-")
    assert says(said(page), "Layer L1", "row 3, column 3", "expert")
    assert numbers(page) == experts_of(layers[0])
    page.keyboard.press("-")  # there is none before the first
    page.keyboard.press("+")
    assert numbers(page) == experts_of(layers[1])


def test_a_patch_is_told_with_how_sure_the_router_was(quiet, layers):
    page, layer = quiet.page, layers[1]
    page.click(".mv-cell[data-patch='6']")
    facts = page.locator(".mv-facts b").all_text_contents()
    assert float(facts[0]) == pytest.approx(layer["margin"][6], abs=0.0051)
    assert float(facts[1]) == pytest.approx(layer["entropy"][6], abs=0.0051)
    assert says(" ".join(page.text_content(".mv-box-where").split()), "whole image")


def test_hover_outlines_a_patch_and_shows_its_path(quiet, layers):
    page = quiet.page
    page.hover(".mv-cell[data-patch='2']")
    assert page.locator(".mv-cell.mv-hover").get_attribute("data-patch") == "2"
    assert "row 1, column 3" in page.text_content(".mv-where")
    way = page.locator(".mv-way").all()  # one of each layer
    found = [one.locator(".mv-chip").all_text_contents() for one in way]
    assert found == [[str(expert) for expert in layer["experts"][2]] for layer in layers]
    assert page.locator(".mv-zoom").count() == 1


def test_one_expert_can_be_highlighted(quiet, layers):
    page = quiet.page
    page.click("[data-key=chip-3]")
    layer = layers[1]
    uses = [3 in choices for choices in layer["experts"]]
    assert 0 < sum(uses) < 16
    pairs = zip(layer["experts"], layer["weights"], strict=True)
    weight = [STRENGTH * dict(zip(*both, strict=True)).get(3, 0) for both in pairs]
    assert len(set(weight)) > 2
    # As without highlighting: the stronger, the more of the patch is the expert's.
    assert [fill[3] for fill in fills(page)] == pytest.approx(weight, abs=0.005)
    page.click("[data-key=chip-3]")
    assert all(fill[3] > 0 for fill in fills(page))
