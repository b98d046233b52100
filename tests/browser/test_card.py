"""The picture of the computation: its numbers are the view's and add up as they are shown, for every router, offline.

That the view's numbers are the model's is held by tests/demo/test_computation.py; here they are unpacked anew.
"""

import numpy as np
import pytest

from moevision.demo import route_image
from moevision.demo.html import view_html
from moevision.layers import ROUTERS
from tests.browser.conftest import each, figures, no_sideways_scroll, told, violations
from tests.demo.test_computation import shaken, unpacked
from tests.shared import says

pytestmark = pytest.mark.needs("chromium", "playwright")

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
        page.mouse.move(1, 1)  # what the pointer passes over is followed
        return page, view["layers"][-1]

    yield begin
    for one in visits:
        assert one.complaints == []
        assert one.strangers("file:") == []


def adds_up(page):
    """The sums of the picture, with the numbers that stand there and nothing else; 0.00051: the last figure rounded."""
    gates, given, others = figures(page, "gate"), figures(page, "given"), figures(page, "others")
    (total,) = figures(page, "total")
    own = sum(g * y for g, y in zip(gates, given, strict=True))
    assert total == pytest.approx(own + sum(others), abs=5.1e-4)
    (before,), (after,) = figures(page, "before"), figures(page, "after")
    scale = figures(page, "scale") or [1]
    assert after == pytest.approx(total * scale[0] + before, abs=5.1e-4)
    return total, after


MODELS = ({}, {"init_values": 0.1}, {"num_shared_experts": 2}, {"top_k": 4})


@pytest.mark.parametrize("arguments", MODELS, ids=str)
def test_the_numbers_on_the_screen_add_up_and_are_the_views(card, arguments):
    page, layer = card(arguments)
    given = layer["computation"].items()
    numbers = {name: unpacked(one) for name, one in given if one and "data" in one}
    scores = figures(page, "score")
    assert scores == pytest.approx(numbers["scores"][PATCH].tolist(), abs=0.0051)
    shares = np.exp(scores) / np.exp(scores).sum()
    assert figures(page, "share") == pytest.approx(100 * shares, abs=0.5 + 100 * 0.01)
    of = layer["computation"]["channels"]
    experts, weights = layer["experts"][PATCH], layer["weights"][PATCH]
    order = np.argsort(experts)
    assert figures(page, "gate") == pytest.approx(np.array(weights)[order], abs=5.1e-4)
    options = page.locator("[data-change=channel] option").all_text_contents()
    assert [int(text) for text in options] == of["index"]
    for place in (0, 5):
        page.select_option("[data-change=channel]", index=place)
        total, after = adds_up(page)
        names = ("read", "outputs", "total", "before", "after")
        rows = {name: unpacked(of[name])[PATCH] for name in names}
        assert figures(page, "read") == pytest.approx([rows["read"][place]], abs=5.1e-4)
        assert figures(page, "given") == pytest.approx(rows["outputs"][order, place], abs=5.1e-4)
        assert total == pytest.approx(rows["total"][place], abs=3e-3)
        assert after == pytest.approx(rows["after"][place], abs=3e-3)
        assert f"Number {of['index'][place]}: " in told(page, "[data-part=told]")
    assert (len(figures(page, "scale")) == 1) == ("init_values" in arguments)
    assert says(told(page, "[data-part=say]"), f"{len(experts)} of 4", "experts ran")
    missing = 1 - sum(weights)
    if missing > 0.005:
        assert says(told(page, "[data-part=say]"), f"The other {missing:.2f}", "left out")


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_is_drawn_in_its_own_words_and_adds_up(card, router):
    page, layer = card({"router": router})
    assert page.locator("[data-change=noise]").count() == 0  # nobody is there who could draw it
    ran = sum(layer["kept"][PATCH])
    for step in ("scores", "shares", "kept", *(["weights"] if ran else [])):
        assert " ".join(layer["steps"][step].split()) in told(page, "[data-part=say]")
    words = {"soft": "All 4 experts ran, each on its slots"}
    assert words.get(router, f"{ran or 'None'} of 4 experts ran") in told(page, "[data-part=say]")
    assert page.locator(".mv-network").count() == ran
    adds_up(page)
    assert ran or says(told(page, "[data-part=told]"), "No expert took")
    assert len(figures(page, "score")) == (4 if layer["learned"] else 0)


def test_a_full_expert_is_told_with_the_weight_that_it_turned_away(card, make, pixels):
    view = route_image(shaken(make(eval_capacity_factor=0.5)), pixels).to_json()
    layer = view["layers"][-1]
    patch = next(p for p, kept in enumerate(layer["kept"]) if kept == [False, True])
    page, _ = card(view=view)
    page.click(f".mv-cell[data-patch='{patch}']")
    expert, weight = layer["experts"][patch][0], layer["weights"][patch][0]
    assert f"{weight:.2f} full" in page.text_content(".mv-part-kept")
    assert says(told(page, "[data-part=say]"), f"{weight:.2f}", f"L3·E{expert}'s", "was full")
    assert says(told(page, "[data-part=say]"), "1 of 4", "experts ran")
    adds_up(page)


def test_many_experts_of_a_patch_are_one_term(card):
    page, layer = card({"num_experts": 12, "top_k": 6})
    assert page.locator(".mv-network").count() == 5
    assert "2 others" in page.text_content(".mv-part-kept")
    adds_up(page)
    rows = each(page, ".mv-card-rows [data-expert]", "Number(one.dataset.expert)")
    assert len(rows) == 8
    assert set(layer["experts"][PATCH]) <= set(rows)
    assert says(page.text_content(".mv-part-rows"), "4 more experts")


def test_the_pointer_chooses_the_number(card):
    page, layer = card()
    assert "row 2, column 3" in page.text_content(".mv-part-patch")
    page.hover(".mv-part-sum [data-at='3']")
    number = layer["computation"]["channels"]["index"][3]
    assert told(page, "[data-part=told]").startswith(f"Number {number}: ")
    at, cells = (page.locator(f".mv-box-card .mv-{name}").count() for name in ("at", "cells"))
    assert at == cells > 4


def test_lines_join_the_parts(card):
    page, _ = card()
    # patch to numbers, numbers to 4 directions, 2 networks in and out, sum, stream, on
    assert page.locator(".mv-wires path").count() == 1 + 4 + 2 * 2 + 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1440])
def test_axe_finds_nothing_and_nothing_scrolls_sideways(card, scheme, width):
    size = {"width": width, "height": 844}
    page, _ = card(color_scheme=scheme, viewport=size, reduced_motion="reduce")
    assert violations(page, ".mv-box-card") == []
    assert no_sideways_scroll(page)
    assert (page.locator(".mv-wires path").count() > 0) == (width > 390)


def test_a_view_of_an_older_version_has_no_picture(card, make, pixels):
    view = route_image(make(), pixels).to_json()
    for layer in view["layers"]:
        del layer["computation"]
    page, _ = card(view=view)
    assert page.locator(".mv-box-card:visible").count() == 0
