"""The page with routers whose patches don't choose: experts that choose patches, and slots that mix them (Soft MoE)."""

import pytest

from moevision.demo.galleries import Galleries
from moevision.demo.models import open_entries
from moevision.demo.service import Explorer
from tests.browser.conftest import (
    CHANGED,
    FIRST,
    PHONE,
    at,
    each,
    figures,
    fills,
    no_sideways_scroll,
    numbers,
    said,
    serious,
    take_away,
)
from tests.shared import says

pytestmark = pytest.mark.needs("chromium", "playwright")

SLOTS = 3


@pytest.fixture
def address(server):
    return server.doors["other"]


@pytest.fixture(scope="module")
def ask(routers_home):
    entries = open_entries(None, home=routers_home)
    explorer = Explorer(entries, Galleries(entries))

    def ask(model, name, **request):
        answer = explorer.answer(name, {"model": model, "picture": FIRST, **request})
        assert "error" not in answer, answer
        return answer

    return ask


@pytest.fixture
def visit(visits_at, address):
    return visits_at(address)


def shown_numbers(page):
    return [float(text) for text in page.locator(".mv-mark").all_text_contents()]


def visible_modes(page):
    return each(page, "[data-mode]:visible", "one.dataset.mode")


def test_a_patch_of_expert_choice_has_several_experts_or_none(visit, ask):
    layer = ask("choice", "route")["layers"][1]
    page = visit("?model=choice").page
    texts = [
        "–" if not e else f"{e[0]}+{len(e) - 1}" if len(e) > 1 else str(e[0])
        for e in layer["experts"]
    ]
    assert numbers(page) == texts
    nobody = texts.index("–")
    several = next(patch for patch, text in enumerate(texts) if "+" in text)
    page.click(f".mv-cell[data-patch='{nobody}']")
    assert says(said(page), "no expert took")
    card = page.text_content(".mv-box-card")
    assert says(card, "No expert took", "as it came")
    assert "full" not in card
    page.click(f".mv-cell[data-patch='{several}']")
    took = page.locator(".mv-card-rows [data-expert]:not(.mv-away) .mv-chip").all_text_contents()
    assert took == [str(expert) for expert in sorted(layer["experts"][several])]
    assert visible_modes(page) == ["regions", "expert", "entropy", "rests"]


def test_what_may_be_changed_where_experts_choose(visit):
    page = visit("?model=choice&expert=L3.E1").page
    # No token has a first choice: nothing can be forced.
    assert page.locator(".mv-box-hand button").count() == 0
    assert page.locator("[data-change=capacity]").count() == 0
    assert "on average" in page.text_content(".mv-settings")
    page.select_option("[data-change=topk]", "2")
    page.wait_for_selector(CHANGED)
    assert page.visit.question("route")["top_k"] == 2
    assert says(page.text_content("[data-box=said]"), "Trained with 1", "k = 2")
    take_away(page, 1)
    page.wait_for_selector("h1:has-text('Without expert 1')")
    page.wait_for_selector("[data-box=said] [data-part=class]")
    assert page.visit.question("route")["away"] == [[3, 1]]
    change = {"kind": "ablate", "layer": 3, "expert": 1}
    assert page.visit.question("what_if")["intervention"] == change


def test_soft_patches_take_from_every_expert(visit, ask):
    layer = ask("soft", "route")["layers"][1]
    page = visit("?model=soft&patch=5&mode=expert").page
    assert numbers(page) == [str(experts[0]) for experts in layer["experts"]]
    assert f"all {6 * SLOTS} slots" in page.text_content(".mv-box-legend")
    assert "false" not in page.text_content(".mv-box-card")  # it has no switch for noise
    shown = figures(page, "share")
    weights = dict(zip(layer["experts"][5], layer["weights"][5], strict=True))
    assert shown == pytest.approx([100 * weights[expert] for expert in range(6)], abs=0.0551)
    assert sum(shown) == pytest.approx(100, abs=0.6)
    assert visible_modes(page) == ["regions", "expert", "reads", "entropy", "rests"]
    # the other layer has a router of its own, and its own number of experts
    page.keyboard.press("-")
    assert visible_modes(page) == ["regions", "expert", "entropy", "rests"]
    assert page.locator(".mv-legend-key .mv-pick").count() == 4
    assert says(page.text_content(".mv-settings"), "all slots")


def test_the_image_is_coloured_by_what_an_expert_reads(visit, ask):
    layer = ask("soft", "route")["layers"][1]
    page = visit("?model=soft&patch=5").page
    page.click("[data-mode=reads]")
    first = [experts[0] for experts in layer["experts"]]  # as long as no expert is in the hand
    means = [sum(row) / 16 for row in layer["reads"]]
    expected = [layer["reads"][expert][patch] / means[expert] for patch, expert in enumerate(first)]
    assert shown_numbers(page) == pytest.approx(expected, abs=0.0505)
    page.click("[data-key=chip-4]")
    reads = layer["reads"][4]
    assert shown_numbers(page) == pytest.approx([value / means[4] for value in reads], abs=0.0505)
    opacities = [fill[3] for fill in fills(page)]
    assert opacities.index(max(opacities)) == reads.index(max(reads))
    at(page, "mode=reads", "expert=L3.E4")
    numbers = shown_numbers(page)
    page.reload()
    page.wait_for_selector("[data-mode=reads][aria-pressed=true]")
    assert shown_numbers(page) == numbers
    # as a link of an earlier version named one of its slots
    page.goto(page.url.partition("?")[0] + "?model=soft&layer=3&patch=5&mode=slots&slot=4.2.takes")
    page.wait_for_selector("[data-mode=reads][aria-pressed=true]")
    assert shown_numbers(page) == numbers


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_either(visit, scheme):
    for query in ("?model=soft&mode=reads&expert=L3.E1", "?model=choice&mode=expert"):
        look = {"color_scheme": scheme, "reduced_motion": "reduce", "viewport": PHONE}
        page = visit(query, then=".mv-card", **look).page
        assert serious(page) == []
        assert no_sideways_scroll(page)
