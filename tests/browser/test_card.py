"""The computation card: its numbers are the view's, in every step, for every router, without a server.

That the view's numbers are the model's is held by tests/demo/test_computation.py; here they are unpacked anew.
"""

import numpy as np
import pytest

from moevision.demo import route_image
from moevision.demo.html import view_html
from moevision.layers import ROUTERS
from tests.browser.conftest import axe
from tests.demo.test_computation import shaken, unpacked

pytestmark = pytest.mark.needs("chromium", "playwright")

STEPS = ["scores", "shares", "kept", "outputs", "sum"]
PATCH = 6


@pytest.fixture
def card(new_visit, make, pixels, tmp_path):
    """Opens an exported page of a model with a router; gives the visit and the JSON of the layer that is shown."""
    visits = []

    def begin(arguments=None, view=None, **options):
        view = view or route_image(shaken(make(**(arguments or {}))), pixels).to_json()
        file = tmp_path / f"{len(visits)}.html"
        file.write_text(view_html(view, full_page=True), encoding="utf-8")
        visits.append(new_visit(offline=True, **options))
        page = visits[-1].page
        page.goto(file.as_uri())
        page.click(f".mv-cell[data-patch='{PATCH}']")
        return page, view["layers"][-1]

    yield begin
    for one in visits:
        assert one.complaints == []
        assert one.strangers("file:") == []


def go(page, step):
    page.click(f"[data-step='{STEPS.index(step)}']")
    assert page.get_attribute(".mv-box-card", "data-at") == step


def rows(page):
    """Number beside each expert, by expert."""
    script = "items => items.map(one => [Number(one.dataset.expert), one.querySelector('.mv-num').textContent])"
    return dict(page.eval_on_selector_all(".mv-card-rows li", script))


def told(page):
    return page.text_content("[data-part=told]")


def length(value):
    """Three figures."""
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def number(text):
    return float(text.replace("\N{MINUS SIGN}", "-").split()[0])


def test_every_step_has_the_numbers_of_the_view(card):
    page, layer = card()
    numbers = {name: value if value is None else unpacked(value) for name, value in layer["computation"].items()}
    experts, weights = layer["experts"][PATCH], layer["weights"][PATCH]
    go(page, "scores")
    shown = rows(page)
    assert [number(shown[e]) for e in range(4)] == pytest.approx(numbers["scores"][PATCH].tolist(), abs=0.0051)
    go(page, "shares")
    shown = rows(page)
    assert [number(shown[e]) for e in range(4)] == pytest.approx([100 * p for p in layer["probs"][PATCH]], abs=0.51)
    go(page, "kept")
    shown = rows(page)
    assert [number(shown[e]) for e in experts] == pytest.approx(weights, abs=0.0051)
    assert [e for e in range(4) if not shown[e]] == sorted({0, 1, 2, 3} - set(experts))
    missing = 1 - sum(weights)
    assert missing > 0.005
    assert f"The other {missing:.2f} belongs to experts that weren't kept, and is left out." in told(page)
    go(page, "outputs")
    shown = rows(page)
    assert [number(shown[e]) for e in experts] == pytest.approx(
        numbers["outputs"][PATCH].tolist(), abs=0.0051, rel=0.0051
    )
    go(page, "sum")
    text = told(page)
    assert text.startswith(" + ".join(f"{w:.2f}·E{e}(x)" for e, w in zip(experts, weights, strict=True)))
    assert f"has length {length(numbers['total'][PATCH])}" in text
    before, after = (length(numbers[name][PATCH]) for name in ("before", "after"))
    assert f"Added to the residual stream ({before}) that gives {after}." in " ".join(text.split())
    assert "layer scale" not in text  # these blocks have none
    assert "2 of 4 experts ran for this patch" in text
    assert text.endswith("the other two cost memory, no time.")


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_walks_through_all_steps_in_its_own_words(card, router):
    page, layer = card({"router": router})
    assert page.locator("[data-change=noise]").count() == 0  # nobody is there who could draw it
    for step in ("scores", "shares", "kept"):
        go(page, step)
        assert page.text_content("[data-part=say]").strip() == layer["steps"][step]
    go(page, "sum")
    assert page.text_content("[data-part=say]").strip() == layer["steps"]["weights"]
    ran = sum(layer["kept"][PATCH])
    expected = {"soft": "All 4 experts ran, each on its slots"}.get(router, f"{ran or 'None'} of 4 experts ran")
    assert expected in told(page) or (not ran and "No expert took this patch" in told(page))


def test_a_full_expert_is_told_with_the_weight_that_it_turned_away(card, make, pixels):
    view = route_image(shaken(make(eval_capacity_factor=0.5)), pixels).to_json()
    layer = view["layers"][-1]
    patch = next(p for p, kept in enumerate(layer["kept"]) if kept == [False, True])
    page, _ = card(view=view)
    page.click(f".mv-cell[data-patch='{patch}']")
    go(page, "kept")
    expert, weight = layer["experts"][patch][0], layer["weights"][patch][0]
    assert rows(page)[expert] == f"{weight:.2f} full"
    assert f"{weight:.2f} was L3·E{expert}'s: it was full, and nobody else gets it." in told(page)
    go(page, "sum")
    assert "1 of 4 experts ran for this patch" in told(page)


def test_keys_pointer_and_play_walk_through_the_steps(card, look):
    page, layer = card()
    page.focus("[data-step='4']")
    page.keyboard.press("Home")
    assert page.get_attribute(".mv-box-card", "data-at") == "scores"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.get_attribute(".mv-box-card", "data-at") == "kept"
    assert page.evaluate("document.activeElement.dataset.step") == "2"
    weights = [
        f"expert {e} {w:.2f}" for e, w in sorted(zip(layer["experts"][PATCH], layer["weights"][PATCH], strict=True))
    ]
    assert look.said(page).startswith(f"Kept, step 3 of 5, {', '.join(weights)}.")
    assert page.locator(".mv-pinned").get_attribute("data-patch") == str(PATCH)  # arrows of the card move no patch
    page.hover("[data-step='3']")
    assert page.get_attribute(".mv-box-card", "data-at") == "outputs"
    page.click("[data-action=play]")
    page.wait_for_selector(".mv-box-card[data-at=shares]")
    page.wait_for_selector(".mv-box-card[data-at=sum]")
    assert (
        page.locator("[data-step][aria-checked=true]").count() == page.locator("[data-step][tabindex='0']").count() == 1
    )


def test_a_step_stays_when_patch_and_layer_change(card):
    page, _ = card()
    go(page, "scores")
    before = rows(page)
    page.click(".mv-cell[data-patch='9']")
    assert page.get_attribute(".mv-box-card", "data-at") == "scores"
    assert rows(page) != before
    page.click(".mv-layer[data-index='0']")
    assert page.get_attribute(".mv-box-card", "data-at") == "scores"


def test_calm_where_motion_is_unwanted(card):
    page, _ = card(reduced_motion="reduce")
    assert page.locator("[data-action=play]:visible").count() == 0
    assert page.eval_on_selector(".mv-card-bar i", "bar => getComputedStyle(bar).transitionDuration") == "0s"


def test_many_experts_show_the_eight_that_matter(card):
    page, layer = card({"num_experts": 12})
    shown = rows(page)
    assert len(shown) == 8
    assert set(layer["experts"][PATCH]) <= set(shown)
    assert set(np.argsort(layer["probs"][PATCH])[-6:].tolist()) <= set(shown)
    assert "(4 more experts aren't shown.)" in page.text_content("[data-part=say]")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_axe_finds_nothing_and_nothing_scrolls_sideways(card, look, scheme, width):
    page, _ = card(color_scheme=scheme, viewport={"width": width, "height": 844}, reduced_motion="reduce")
    for step in STEPS:
        go(page, step)
        found = axe(page, ".mv-inspector")
        assert [f"{one['id']}: {node['html'][:200]}" for one in found for node in one["nodes"]] == []
        assert look.no_sideways_scroll(page)


def test_a_view_of_an_older_version_has_no_card(card, make, pixels):
    view = route_image(make(), pixels).to_json()
    for layer in view["layers"]:
        del layer["computation"]
    page, _ = card(view=view)
    assert page.locator(".mv-box-card:visible").count() == 0
    experts, weights = view["layers"][-1]["experts"][PATCH], view["layers"][-1]["weights"][PATCH]
    assert f"expert {experts[0]}, weight {weights[0]:.2f}" in page.text_content(".mv-older")
