"""The game: without an expert the headline is the result; named experts, whole photos that are sorted, and sharing.

The explorer answers in this process; what its page says is compared with what it answers.
"""

from dataclasses import replace
from urllib.parse import urlencode

import pytest
from PIL import Image

from moevision.demo.models import open_entries
from moevision.demo.service import Explorer
from tests.browser.conftest import (
    CONTROLLED,
    MOBILE,
    PHONE,
    answered,
    answering,
    clipped,
    counts,
    each,
    faded,
    no_sideways_scroll,
    press,
    serious,
    take_away,
    told,
)
from tests.demo.conftest import FALLS
from tests.shared import says

pytestmark = pytest.mark.needs("chromium", "playwright")

HOME = "http://127.0.0.1:7861/"
PRIMARY = "[data-box=said] .mv-primary"
OPENED = "[data-part=air][hidden]"
# A card of emoji pages, made up: the expert that gets smileys, and what new pages cost without it.
EMOJI = {
    "data_kind": "emoji_pages",
    "names": [{"layer": 1, "expert": 0, "name": "smileys", "share": 0.69}],
    "without": {
        "smileys": {"experts": [0], "pages": 1000, "own": [0.9, 0.54], "others": [0.86, 0.86]}
    },
}


@pytest.fixture(scope="module")
def entries(games_home, routers_home):
    found = [*open_entries(None, home=games_home), *open_entries(None, home=routers_home)]
    return {entry.card.id: entry for entry in found}


@pytest.fixture
def play(visits_at, entries):
    """Opens a page of these models, of which the first one is shown; `card` has more facts on that one's card."""

    def play(*models, query="", card=None, **options):
        first, *others = (entries[model] for model in models)
        first = replace(first, card=replace(first.card, **(card or {})))
        explorer = Explorer([first, *others])
        options = {"door": False, "reduced_motion": "reduce", **options}

        def before(one):
            answering(HOME, explorer)(one)
            if first.card.sorting:
                one.shown = ".mv-sorted"

        begin = visits_at(HOME, before)
        page = begin(f"?{urlencode(query)}" if query else "", **options).page
        page.visit.explorer = explorer
        return page

    return play


def route(page, picture, **asked):
    picture = {"kind": "example", "id": picture}
    return page.visit.explorer.answer("route", {"model": "game", "picture": picture, **asked})


def guess(view):
    best = view["prediction"]["moe"][0]
    return f"{best['class']} {100 * best['p']:.0f} %"


def take(page, then):
    """Press the one thing to try, and wait for the headline that comes of it."""
    press(page, f"{PRIMARY}, [data-action=all-away]", f"h1:text-is('{then}')")


ALL = [[layer, expert] for layer in (1, 3) for expert in range(4)]
RESULTS = [
    ("pets/test/11", "Take expert 0 away", "Without expert 0 this bear becomes a mouse.", ""),
    ("pets/test/2", "Take experts 2 and 3 away", "Without experts 2 and 3 the answer becomes rabbit.", ""),
    ("pets/test/5", "Take all 8 away", "Without eight experts the answer stays bear.",
     "All of L1 and L3 away: still bear. This answer doesn't need these layers."),
]  # fmt: skip


@pytest.mark.parametrize(("picture", "button", "headline", "finding"), RESULTS)
def test_one_click_makes_the_headline_the_result(play, picture, button, headline, finding):
    page = play("game", query={"picture": picture})
    away = FALLS[picture]["away"] or ALL
    page.click(f"button:text-is('{button}')")
    page.wait_for_selector(f"h1:text-is('{headline}')")
    assert page.visit.question("route")["away"] == away
    before, after = route(page, picture), route(page, picture, away=away)
    assert told(page, "[data-box=badge] s") == guess(before)
    assert told(page, "[data-box=badge] b") == guess(after)
    assert (guess(before)[:4] == guess(after)[:4]) == bool(finding)
    assert finding in told(page)
    layer = page.locator("[data-change=flow-layer] option:checked").text_content()
    assert layer == ("L3" if finding else "L1")
    assert counts(page).count("away") == (4 if finding else len(away))
    # A link opens on the same: what the model says with all experts is asked for once.
    page.wait_for_function("location.search.includes('away=')")
    page.visit.requests.clear()
    page.goto(page.url)
    page.wait_for_selector(f"h1:text-is('{headline}')")
    assert told(page, "[data-box=badge]") == f"{guess(before)} {guess(after)}"
    assert [question.get("away") for question in page.visit.questions("route")] == [away, None]


def test_an_image_that_was_chosen_says_from_how_many_and_how_good_the_model_is(play):
    chosen = {"picture": "pets/test/11", "away": [[1, 0]], "chosen": {"right": 11, "change": 4}}
    page = play("game", card={"matters": chosen})
    take(page, RESULTS[0][2])
    found = "This image was chosen: of 11 named right, 4 change without one expert."
    assert f"{found} The model: 12.5 % of test images right" in told(page)


def test_who_takes_more_away_than_it_takes_is_told(play):
    page = play("game")  # opens on the photo whose answer falls, in its layer
    page.focus(".mv-flow-box:not(:disabled) >> nth=-1")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector(f"h1:text-is('{RESULTS[0][2]}')")
    assert "Record" not in told(page)
    page.keyboard.press("+")  # the next layer
    take_away(page, 1)
    assert "Record: fewest experts away: you 1, best 1." in told(page)
    press(page, "[data-box=said] [data-action=put-back]", PRIMARY)
    assert page.is_hidden("[data-box=badge]")


def test_of_an_image_that_no_card_tells_of_the_fewest_are_searched(play, entries):
    """The first two of the explorer's images by its own search: one whose answer falls, and one whose doesn't."""
    explorer = Explorer([entries["game"]])
    ids = [one.id for one in entries["game"].examples.usable(0, 12) if one.id not in FALLS]
    fewest = {
        id: explorer.answer("fewest", {"picture": {"kind": "example", "id": id}})["away"]
        for id in ids
    }
    falling = next(id for id in ids if fewest[id])
    best = len(fewest[falling])
    page = play("game", query={"picture": falling})
    page.wait_for_selector(f"[data-box=said]:has-text('The fewest: {best}.')")
    press(page, "[data-box=said] [data-action=fall]", "[data-box=said]:has-text('Record')")
    assert page.visit.question("route")["away"] == fewest[falling]
    assert f"Record: fewest experts away: you {best}, best {best}." in told(page)
    assert page.visit.question("fewest") == {
        "model": "game",
        "picture": {"kind": "example", "id": falling},
    }
    still = [id for id in ids if fewest[id] is None]
    if still:
        page = play("game", query={"picture": still[0]})
        page.wait_for_selector("[data-box=said]:has-text('nor any two or three')")


def test_several_experts_away_stand_beside_as_many_patches_at_random(play):
    page = play("game", query={"picture": "pets/test/2"})
    take(page, RESULTS[1][2])
    page.wait_for_selector(CONTROLLED)
    picture = {"kind": "example", "id": "pets/test/2"}
    asked = {"model": "game", "picture": picture, "away": FALLS["pets/test/2"]["away"]}
    effect = page.visit.explorer.answer("what_if", asked)
    mean = sum(effect["control"]["delta_ps"]) / effect["control"]["n"]
    assert f"at random: {effect['target']} {100 * (effect['before'][0]['p'] + mean):.0f}" in told(
        page
    )


def test_a_link_to_another_model_opens_the_image_whose_experts_matter(play):
    """Not that with which the first model opens."""
    shown = "[data-action=example][aria-pressed=true]"
    for query, image in (("", "pets/test/0"), ({"model": "game"}, "pets/test/11")):
        page = play("many", "game", query=query)
        assert page.locator(shown).first.get_attribute("data-id") == image


def test_a_link_to_a_model_that_is_not_there_says_so(play):
    page = play("game", query={"model": "<b>none"})
    assert says(page.text_content(".mv-toast"), "no model <b>none")
    assert says(told(page, "h1"), "share this")


def plural_patches(count):
    return "1 patch" if count == 1 else f"{count} patches"


LATER = [("game", "second choice"), ("choice", "also"), ("soft", None), ("many", "second choice")]


@pytest.mark.parametrize(("model", "word"), LATER)
def test_a_box_tells_of_later_choices_and_is_never_shut_with_work(play, model, word):
    page = play(model, query={"picture": "pets/test/1"})
    asked = {"model": model, "picture": {"kind": "example", "id": "pets/test/1"}}
    layer = page.visit.explorer.answer("route", asked)["layers"][-1]
    shut = each(page, ".mv-flow-box", "one.disabled")
    if word is None:  # each patch takes from all
        shares = page.locator(".mv-flow-box [data-part=amount]").all_text_contents()
        assert sum(float(share.split()[0]) for share in shares) == pytest.approx(100, abs=3)
        assert not any(shut)
        return
    experts = range(layer["num_experts"])
    first = [sum(row[:1] == [expert] for row in layer["experts"]) for expert in experts]
    assert counts(page) == first
    for expert, box in enumerate(page.locator(".mv-flow-box").all()):
        later = layer["counts"][expert] - first[expert]
        found = box.locator("em, [data-part=amount]").all_text_contents()
        amount = [plural_patches(first[expert])] if first[expert] else []
        assert found == (amount + ([f"{word} for {later}"] if later else []) or ["none"])
        assert shut[expert] == (layer["counts"][expert] == 0)


def test_experts_of_emoji_have_counted_names_and_a_record(play):
    page = play("game", card=EMOJI)
    names = page.locator(".mv-flow-box small b").all_text_contents()
    assert names == ["69 % smileys", "mixed", "mixed", "mixed"]
    assert says(page.text_content(".mv-flow-head p"), "each of 16 emoji")
    assert page.locator("[data-part=amount]").first.text_content().endswith(" emoji")
    assert page.text_content(PRIMARY) == "Take the smileys’ expert away"
    take(page, RESULTS[0][2])
    record = "On 1,000 new pages: smileys 90 → 54 % right, all others 86 → 86 %."
    assert record in told(page)


@pytest.mark.parametrize("screen", [{}, MOBILE], ids=["wide", "phone"])
def test_the_longer_of_two_bars_is_the_larger_probability(play, screen):
    """Names of other lengths stand before bars of one length and one left edge."""
    page = play("game", card=EMOJI, **screen)
    name = "document.querySelector('.mv-flow-answer li span').textContent = 'a very long name'"
    page.evaluate(name)
    tracks = each(
        page, ".mv-flow-answer .mv-bar", "[one.getBoundingClientRect().x, one.offsetWidth]"
    )
    assert len(tracks) == 2
    assert tracks[0] == tracks[1]
    assert tracks[0][1] >= 40


def test_what_is_being_typed_stays_while_the_control_comes(play):
    """The words of the result are written again when as many moves at random were measured."""
    page = play("game", card=EMOJI)
    take(page, RESULTS[0][2])
    page.locator("[data-change=typed]").press_sequentially("\N{DOG FACE}")
    page.wait_for_selector(CONTROLLED)
    assert page.input_value("[data-change=typed]") == "\N{DOG FACE}"


def test_whole_photos_are_sorted_and_ones_own_with_them(play, tmp_path):
    page = play("two", "game")
    assert told(page, ".mv-flow h1") == "Expert 0 takes the cats. Expert 1 takes the dogs."
    boxes = page.locator(".mv-sorted > section").all()
    heads = [" ".join(box.locator("h2").text_content().split()) for box in boxes]
    assert heads == ["0 37 of 40 cats", "1 38 of 42 dogs"]
    assert [box.locator("p").text_content() for box in boxes] == ["and 4 dogs", "and 3 cats"]
    assert [box.locator("li").count() for box in boxes] == [3, 1]
    assert page.locator(".mv-strays span").all_text_contents() == ["dog here"]
    assert "on 82 of 82 photos" in told(page, "[data-box=sorting]")
    assert page.is_hidden("[data-box=main]")
    Image.new("RGB", (80, 60), "teal").save(tmp_path / "own.png")
    page.set_input_files("[data-box=file]", tmp_path / "own.png")
    page.wait_for_selector(".mv-mine")
    view = page.visit.explorer.answer("route", page.visit.question("route"))
    expert = view["layers"][-1]["experts"][0][0]
    assert boxes[expert].locator(".mv-mine").count() == 1
    answer = view["prediction"]["moe"][0]["class"]
    mine = f"Yours goes to expert {expert}, and the answer is {answer}."
    assert mine in told(page, "[data-box=sorting] [role=status]")
    press(page, "[data-action=door]", ".mv-cell")
    assert page.is_visible(".mv-sorted")
    press(page, "[data-key=sort-untold]", "[data-box=sorting]", state="hidden")
    assert page.text_content("h1:visible").startswith("Four experts share")


def top(page, selector):
    return page.locator(selector).bounding_box()["y"] + page.evaluate("scrollY")


@pytest.mark.parametrize("size", [{}, MOBILE], ids=["wide", "phone"])
@pytest.mark.parametrize("card", [{}, EMOJI], ids=["photos", "emoji"])
def test_button_and_share_are_on_the_first_screen_and_nothing_moves(play, size, card):
    page = play("game", card=card, **size)
    photo = top(page, "[data-part=photo]")
    for button in (PRIMARY, "[data-action=share-card]"):
        box = page.locator(button).bounding_box()
        assert 0 <= box["y"] <= (844 if size else 900) - box["height"]
        assert top(page, "[data-part=photo]") == pytest.approx(photo, abs=1)
        if button == PRIMARY:
            take(page, RESULTS[0][2])


@pytest.mark.parametrize("query", [{"embed": 1}, {"embed": 1, "away": "1.0", "mode": "expert"}])
def test_a_frame_has_photo_and_boxes_only(play, query):
    page = play("game", query=query)
    rest = ".mv-flow-pick, .mv-flow-end, .mv-depth, .mv-footer, .mv-detail, .mv-cell"
    assert page.locator(f":is({rest}):visible").count() == 0
    assert page.locator(":is(.mv-canvas, .mv-flow-box):visible").count() == 5
    assert page.get_attribute("[data-mode=regions]", "aria-pressed") == "true"


SHARE = """outcome => {
  navigator.canShare = () => true;
  navigator.share = async ({ files: [file], text }) => {
    window.shared = [file.type, text];
    if (outcome) throw new DOMException("no", outcome);
  };
}"""


def test_a_card_is_shared_where_the_change_is(play):
    """As a file where the device has no menu for that, else by its menu, which may be left without a choice."""
    page = play("game")
    take(page, RESULTS[0][2])
    page.evaluate("navigator.canShare = undefined")
    with page.expect_download() as waiting:
        page.click("[data-action=share-card]")
    with Image.open(waiting.value.path()) as card:
        assert (card.format, card.size) == ("PNG", (1200, 630))
    page.wait_for_selector(".mv-toast:has-text('Card saved')")
    page.wait_for_function("location.search.includes('away=')")
    for outcome, words in (("", "Shared."), ("AbortError", "Not shared.")):
        page.evaluate(SHARE, outcome)
        press(page, "[data-action=share-card]", f".mv-toast:text-is('{words}')")
        assert page.evaluate("window.shared") == ["image/png", f"{RESULTS[0][2]} {page.url}"]


def test_many_experts_stand_in_rows_of_eight_and_are_told_by_number(play):
    page = play("many")
    columns = "getComputedStyle(one).gridTemplateColumns.split(' ').length"
    assert each(page, ".mv-flow-boxes", columns) == [8]
    assert each(page, ".mv-flow-box .mv-chip", "Number(one.textContent)") == list(range(32))
    expert = max(range(32), key=counts(page).__getitem__)
    layer = page.visit.explorer.start_views()[0]["layers"][-1]
    page.hover(f".mv-flow-box[data-expert='{expert}']")
    assert each(page, ".mv-lit", "Number(one.dataset.expert)") == [expert]
    first = [row[0] for row in layer["experts"]]
    assert faded(page, first) == [one != expert for one in first]


STATES = {  # by name: models, query, and what is pressed
    "opening": (["game"], None, None),
    "after the click": (["game"], None, PRIMARY),
    "sorting": (["two", "game"], None, None),
    "details": (["game"], {"patch": 5}, None),
    "many": (["many"], None, None),
}


@pytest.mark.parametrize("width", [390, 320])
@pytest.mark.parametrize("state", STATES)
def test_a_phone_scrolls_nothing_sideways(play, state, width):
    page = in_state(play, state, **{**MOBILE, "viewport": {**PHONE, "width": width}})
    assert no_sideways_scroll(page)
    assert clipped(page, ".mv :is(h1, h2, p, li, small, button)") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", STATES)
def test_axe_finds_nothing_serious(play, state, scheme):
    assert serious(in_state(play, state, color_scheme=scheme)) == []


def in_state(play, state, **options):
    models, query, button = STATES[state]
    page = play(*models, query=query, **options)
    if button:
        press(page, button, "[data-action=share-card]")
    answered(page)
    return page
