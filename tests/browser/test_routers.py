"""The page with routers whose patches don't choose: experts that choose patches, and slots that mix them (Soft MoE)."""

import re

import pytest

from moevision.demo.galleries import Galleries
from moevision.demo.models import DataOptions, open_entries
from moevision.demo.service import Explorer
from tests.browser.conftest import axe

pytestmark = pytest.mark.needs("chromium", "playwright")

FIRST = {"kind": "example", "id": "pets/test/0"}
PHONE = {"width": 390, "height": 844}
SLOTS = 3


@pytest.fixture
def address(server):
    return server.doors["other"]


@pytest.fixture(scope="module")
def ask(routers_home):
    entries = open_entries(None, DataOptions(), home=routers_home)
    explorer = Explorer(entries, Galleries(entries))

    def ask(model, name, **request):
        answer = explorer.answer(name, {"model": model, "picture": FIRST, **request})
        assert "error" not in answer, answer
        return answer

    return ask


@pytest.fixture
def visit(new_visit, address):
    """Opens visits and holds each of them to the same manners: no complaint, no request to anywhere else."""
    visits = []

    def begin(query, **options):
        visits.append(new_visit(**options))
        visits[-1].open(address + query)
        return visits[-1]

    yield begin
    for one in visits:
        assert one.complaints == []
        assert one.strangers(address) == []


def serious(page):
    violations = axe(page)
    found = [one for one in violations if one["impact"] in ("serious", "critical")]
    return [f"{one['id']}: {node['html'][:200]}" for one in found for node in one["nodes"]]


def shown_numbers(page):
    return [float(text) for text in page.locator("[data-slot='0'] .mv-mark").all_text_contents()]


def visible_modes(page):
    return page.locator("[data-mode]:visible").evaluate_all("buttons => buttons.map(one => one.dataset.mode)")


def test_a_patch_of_expert_choice_has_several_experts_or_none(visit, ask, look):
    layer = ask("choice", "route")["layers"][1]
    page = visit("?model=choice").page
    texts = ["–" if not e else f"{e[0]}+{len(e) - 1}" if len(e) > 1 else str(e[0]) for e in layer["experts"]]
    assert look.numbers(page) == texts
    nobody, several = texts.index("–"), next(patch for patch, text in enumerate(texts) if "+" in text)
    page.click(f".mv-cell[data-patch='{nobody}']")
    assert look.said(page).endswith("no expert took it")
    card = page.text_content(".mv-box-card")
    assert "No expert took this patch: it goes on as it came" in card
    assert "full" not in card
    page.click(f".mv-cell[data-patch='{several}']")
    took = page.locator(".mv-card-rows [data-expert]:not(.mv-away) .mv-chip").all_text_contents()
    assert took == [str(expert) for expert in sorted(layer["experts"][several])]
    assert visible_modes(page) == ["expert", "takers", "entropy", "margin"]
    page.click("[data-mode=takers]")
    assert look.numbers(page) == [str(len(experts)) for experts in layer["experts"]]
    # 16 patches, 4 experts that take 4 each
    assert page.locator(".mv-loadcount").all_text_contents() == ["4"] * 4
    assert f"{texts.count('–')} with no expert" in page.text_content(".mv-box-loads")


def test_what_may_be_changed_where_experts_choose(visit, look):
    one = visit("?model=choice&tab=whatif&expert=L3.E1")
    page = one.page
    page.wait_for_selector(".mv-form")
    kinds = page.locator(".mv-box-hand [data-kind]").evaluate_all("all => all.map(one => one.dataset.kind)")
    assert kinds == ["ablate"]
    assert page.locator("[data-action=hand-swap]").count() == 1
    assert "no token has a first choice" in page.text_content(".mv-panel")
    assert page.locator("[data-change=limit]").count() == 0
    assert "on average" in page.text_content(".mv-settings")
    page.focus("[data-change=topk]")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("[role=note]")
    assert one.question("route")["top_k"] == 2
    assert "Trained with 1 expert per patch on average, shown is 2." in page.text_content("[role=note]")
    assert page.locator(".mv-loadcount").all_text_contents() == ["8"] * 4
    page.click("[data-kind=ablate]")
    page.wait_for_selector(".mv-stripplot")
    assert "keep the other experts that took them" in page.text_content(".mv-results")


def test_soft_patches_take_from_every_expert(visit, ask, look):
    layer = ask("soft", "route")["layers"][1]
    page = visit("?model=soft&patch=5").page
    assert look.numbers(page) == [str(experts[0]) for experts in layer["experts"]]
    assert f"all {6 * SLOTS} slots" in page.text_content(".mv-box-legend")
    assert "false" not in page.text_content(".mv-box-card")  # it has no switch for noise
    shown = [float(text.removesuffix(" %")) for text in page.locator("[data-n=share]").all_text_contents()]
    weights = dict(zip(layer["experts"][5], layer["weights"][5], strict=True))
    assert shown == pytest.approx([100 * weights[expert] for expert in range(6)], abs=0.0551)
    assert sum(shown) == pytest.approx(100, abs=0.6)
    assert visible_modes(page) == ["expert", "slots", "entropy", "margin"]
    # the other layer has a router of its own, and its own number of experts
    page.keyboard.press("-")
    page.click(".mv-layer[data-index='0']")
    assert visible_modes(page) == ["expert", "entropy", "margin", "drops"]
    assert page.locator(".mv-loadbar").count() == 4
    assert "every token takes from all slots" in page.text_content(".mv-settings")


def test_a_slot_shows_what_it_reads_and_what_patches_take_from_it(visit, ask, look):
    maps = ask("soft", "slots", layer=3, expert=4)
    one = visit("?model=soft&patch=5")
    page = one.page
    assert "slots" not in one.asked
    page.click("[data-mode=slots]")
    page.click("[data-action=soft-expert][data-expert='4']")
    page.wait_for_selector("[data-pick='2']")
    assert one.question("slots")["expert"] == 4
    page.click("[data-pick='2']")
    reads = [value * maps["unit"] for value in maps["reads"][2]]
    # Multiples of an even share, with one or two decimals.
    assert shown_numbers(page) == pytest.approx([value / (sum(reads) / 16) for value in reads], abs=0.0505)
    assert f"an even mean of {maps['reads_patches'][2]:.0f} of the 16" in page.text_content(".mv-box-slots")
    opacities = [fill[3] for fill in look.fills(page)]
    assert opacities.index(max(opacities)) == reads.index(max(reads))
    page.click("[data-side=takes]")
    takes = [value * maps["unit"] for value in maps["takes"][2]]
    assert shown_numbers(page) == pytest.approx([value * 6 * SLOTS for value in takes], abs=0.0505)
    facts = page.locator(".mv-facts dd").all_text_contents()[-2:]
    assert [float(text.removesuffix(" %")) for text in facts] == pytest.approx(
        [100 * reads[5], 100 * takes[5]], abs=0.051
    )
    page.wait_for_function("location.search.includes('slot=4.2.takes')")
    numbers = shown_numbers(page)
    page.reload()
    page.wait_for_selector("[data-pick='2'][aria-pressed=true]")
    page.wait_for_function("document.querySelector('.mv-mark').textContent !== ''")
    assert shown_numbers(page) == numbers


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_either(visit, look, scheme):
    for query in ("?model=soft&mode=slots&slot=1.0.reads", "?model=choice&mode=takers"):
        page = visit(query, color_scheme=scheme, reduced_motion="reduce", viewport=PHONE).page
        page.wait_for_selector(".mv-card")
        assert serious(page) == []
        assert look.no_sideways_scroll(page)


def test_slots_that_can_not_be_had_are_asked_for_again(new_visit, address):
    page = new_visit().open(address + "?model=soft")
    broken = re.compile(r"/api/\w+$")
    page.route(broken, lambda route: route.abort())
    page.click("[data-mode=slots]")
    page.wait_for_selector("[data-action=soft-again]")
    page.unroute(broken)
    page.click("[data-action=soft-again]")
    page.wait_for_selector("[data-pick='0']")


def test_two_pictures_have_slots_of_their_own(visit, ask):
    page = visit("?model=soft&picture2=pets/test/1&mode=slots&slot=0.1.reads").page
    for place in (0, 1):
        maps = ask("soft", "slots", layer=3, expert=0, picture={"kind": "example", "id": f"pets/test/{place}"})
        reads = maps["reads"][1]
        page.wait_for_function(f"document.querySelector('[data-slot=\"{place}\"] .mv-mark').textContent !== ''")
        texts = page.locator(f"[data-slot='{place}'] .mv-mark").all_text_contents()
        assert [float(text) for text in texts] == pytest.approx([16 * v / sum(reads) for v in reads], abs=0.0505)
