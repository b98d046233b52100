"""M3 to M5: experts, classes and comparisons say what the service says."""

from urllib.parse import urlencode

import pytest

from tests.browser.conftest import at, change_answer, choose_layer, each, press
from tests.shared import says

pytestmark = pytest.mark.needs("chromium", "playwright")


def test_cards_show_the_heaviest_and_random_patches(visit, ask):
    answer = ask("experts", layer=3)
    page = visit(then=".mv-card").page
    cards = page.locator(".mv-card").all()
    assert each(page, ".mv-card h2", "one.textContent") == ["L3·E0", "L3·E1", "L3·E2", "L3·E3"]
    for card, expert in zip(cards, answer["experts"], strict=True):
        counts = [gallery.locator("img").count() for gallery in card.locator(".mv-gallery").all()]
        assert counts == [len(expert["top"]), len(expert["random"])] == [8, 8]
        assert f"{expert['load_share'] * 100:.1f} % of all choices" in card.text_content()


def test_a_patch_on_a_card_opens_its_picture(visit, ask):
    patch = ask("experts", layer=3)["experts"][0]["random"][0]
    page = visit(then=".mv-card").page
    page.locator(".mv-card").first.locator(".mv-gallery").nth(1).locator("button").first.click()
    at(page, urlencode({"picture": patch["picture"]}), f"patch={patch['patch']}")
    assert page.locator(".mv-pinned").get_attribute("data-patch") == str(patch["patch"])


def test_while_another_variant_is_waited_for_the_cards_are_of_the_one_that_is_shown(visit, hold):
    one = visit()
    one.page.wait_for_selector(".mv-card")
    held = hold(one.page, "route")
    one.page.click("[data-variant=untrained]")
    held.wait()
    choose_layer(one.page, 0)
    one.page.wait_for_selector(".mv-card h2:has-text('L1·E0')")
    assert {question["variant"] for question in one.questions("experts")} == {"trained"}
    held.release()


def open_changed_classes(page, change):
    """Open the tab Classes with an answer of the service that `change` has changed."""
    change_answer(page, "classes", change)
    press(page, "[data-tab=classes]", ".mv-heat td")


def test_a_class_without_images_has_no_numbers(visit, ask):
    answer = ask("classes")

    def empty_the_dogs(data):
        for layer in data["layers"]:
            layer["share"][1] = layer["excess"][1] = [None] * 4
        return data

    page = visit().page
    open_changed_classes(page, empty_the_dogs)
    row = page.locator(".mv-heat tbody tr").nth(1)
    assert row.locator("th").text_content().strip() == answer["class_names"][1] == "dog"
    assert row.locator("td").all_text_contents() == ["no images"]
    assert page.locator(".mv-heat thead .mv-chip").all_text_contents() == ["0", "1", "2", "3"]


def test_the_heatmap_colours_only_what_stands_above_the_null(visit, ask):
    layer = ask("classes")["layers"][1]
    # Random weights know no class, so nothing stands out: let the service say that every third cell does.
    flags = [[(row + expert) % 3 == 0 for expert in range(4)] for row in range(8)]

    def say_so(data):
        data["layers"][1]["significant"] = flags
        return data

    page = visit().page
    open_changed_classes(page, say_so)
    styles = each(page, ".mv-heat td", "one.getAttribute('style')")
    assert [bool(style) for style in styles] == [flag for row in flags for flag in row]
    signs = each(page, ".mv-heat td", "one.querySelector('sup')?.textContent")
    excess = [value for row in layer["excess"] for value in row]
    for sign, style, value in zip(signs, styles, excess, strict=True):
        assert sign == (None if not style else "+" if value > 0 else "−")
    shares = [100 * share for row in layer["share"] for share in row]
    assert each(page, ".mv-heat td", "parseInt(one.textContent)") == pytest.approx(shares, abs=0.51)
    told = [one["sentence"] for one in layer["answers"]]
    shown = page.locator(".mv-answer").all_text_contents()
    assert shown == [sentence.replace("`", "") for sentence in told]
    lines = page.locator(".mv-answer").first.locator("span").all_text_contents()
    assert len(lines) == 1 + told[0].count("; "), "one for each number"
    assert page.locator(".mv-answer code").count() == "".join(told).count("`") / 2
    bits = "".join(told).count("bits")
    assert page.locator(".mv-panel").text_content().count("bits") == bits  # one kind of them


def test_a_cell_of_the_heatmap_opens_its_pictures(visit, ask):
    answer = ask("classes")
    page = visit("?tab=classes").page
    names = [name.strip() for name in page.locator(".mv-heat th[scope=row]").all_text_contents()]
    assert names == answer["class_names"]
    press(page, "[data-action=cell] >> nth=0", ".mv-thumbs img")
    asked = page.visit.question("cell")
    assert (asked["class"], asked["expert"]) == (answer["class_names"][0], 0)
    cell = ask("cell", **{name: asked[name] for name in ("layer", "expert", "class")})
    assert page.locator(".mv-thumbs img").count() == len(cell["pictures"]) > 0


def test_two_classes_are_compared(visit, ask):
    answer = ask("compare", a="fox", b="pig")
    page = visit("?tab=compare").page  # where it was in earlier versions
    page.wait_for_selector("[data-tab=classes][aria-selected=true]")
    page.select_option("[data-change=compare-a]", "fox")
    page.select_option("[data-change=compare-b]", "pig")
    press(page, "[data-action=compare-run]", ".mv-forest")
    rows = [row for layer in answer["layers"] for row in layer["experts"]]
    assert len(rows) == 8
    stands = each(page, ".mv-forest li", "one.classList.contains('mv-stands')")
    assert stands == [row["significant"] for row in rows]
    shown = page.locator(".mv-forest .mv-num").all_text_contents()
    points = [float(text.removesuffix(" pts").replace("−", "-")) for text in shown]
    assert points == pytest.approx([100 * row["difference"] for row in rows], abs=0.051)
    assert page.text_content("[data-part=classes] .mv-sentence") == answer["sentence"]
    assert ("a result too" in page.text_content(".mv-panel")) == (not any(stands))


def test_a_class_is_not_compared_with_itself(visit):
    one = visit("?tab=classes")
    one.page.select_option("[data-change=compare-b]", "cat")
    one.page.click("[data-action=compare-run]")
    assert "two different classes" in one.page.text_content(".mv-panel [role=alert]")
    assert "compare" not in one.asked


def test_a_late_comparison_does_not_stand_for_another(visit, hold):
    page = visit("?tab=classes").page
    held = hold(page, "compare")
    for name in ("fox", "pig"):
        page.select_option("[data-change=compare-b]", name)
        page.click("[data-action=compare-run]")
    held.wait(2)
    held.routes.reverse()
    held.release()
    page.wait_for_selector(".mv-forest")
    assert "of pig" in page.text_content("[data-part=classes]")


def test_mistakes_are_shown_with_their_routes(visit):
    """The model of the tests says one class for all: let the service say that it made a mistake."""
    layers = [{"name": "L1", "to_label": 0.25, "to_other": 0.1}]
    pictures = [{"id": "pets/test/8", "thumb": "data:image/png;base64,AA=="}]
    group = {"label": "cat", "called": "<b>dog", "images": 4}
    group |= {"layers": layers, "pictures": pictures}
    page = visit("?tab=classes").page
    change_answer(page, "mistakes", lambda _: {"groups": [group]})
    press(page, "[data-action=mistakes]", "[data-part=cell]:has-text('4 of cat, called <b>dog')")
    text = " ".join(page.text_content("[data-part=cell]").split())
    assert says(text, "of cat", "of <b>dog", "L1 0.25", "0.10")
    page.click("[data-part=cell] [data-action=example]")
    at(page, "test%2F8")
