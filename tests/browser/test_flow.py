"""The opening: few words, one photo, its patches in the boxes of their experts; one expert away, and several."""

from pathlib import Path

import pytest
from PIL import Image

from moevision.demo.html import app_page, flow_html, read_css
from moevision.demo.models import bundled_folders, open_entries
from moevision.demo.service import Explorer
from tests.browser.conftest import (
    AWAY,
    CONTROLLED,
    FIRST,
    MOBILE,
    SERVER_CALL,
    counts,
    each,
    faded,
    firsts,
    no_sideways_scroll,
    press,
    result,
    saved,
    take_away,
    told,
    violations,
)
from tests.shared import says

pytestmark = pytest.mark.needs("chromium", "playwright")

ROOT = Path(__file__).parents[2]
WORDS, IN_A_BOX, CONTROLS = 70, 7, 14
SORTING_WORDS = 110  # of the page of sorted photos, which says what it doesn't show
CONTROL = ":is(button, select, input, summary, a[href]):not(:disabled)"
# What is seen without scrolling; a screen reader's words are no text to be read.
SEEN = """selector => [...document.querySelectorAll(selector)].filter((one) => {
  const { top, bottom, width } = one.getBoundingClientRect();
  return one.checkVisibility({ visibilityProperty: true }) && width > 1 && bottom > 0 && top < innerHeight;
})"""
READ = f"""() => ({SEEN})('.mv :is(h1, h2, p, li, button, label)')
  .filter((one) => !one.closest('.mv-flow-box') && !one.parentElement.closest('p, li, button, label'))
  .map((one) => one.querySelector('select') ? `${{one.firstChild.textContent}} L3` : one.innerText)
  .join(' ')"""
FRAMES = Path(__file__).with_name("flight.js").read_text(encoding="utf-8")
LANDED = "[data-part=air][hidden]"


def first_screen(page):
    """Its text without what stands in the boxes, the most words of a box, and its controls, boxes included."""
    controls = f"() => ({SEEN})('.mv {CONTROL}').map((one) => one.ariaLabel ?? one.textContent)"
    in_a_box = [len(words(text)) for text in each(page, ".mv-flow-box:visible", "one.innerText")]
    return page.evaluate(READ), max(in_a_box, default=0), page.evaluate(controls)


def words(text):
    return [word for word in text.split() if any(map(str.isalnum, word))]


@pytest.fixture
def newcomer(visit):
    one = visit(door=False, reduced_motion="reduce")
    one.page.wait_for_selector(LANDED, state="attached")
    return one


def test_the_first_screen_has_few_words_and_controls_and_a_large_photo(newcomer):
    page = newcomer.page
    text, _, controls = first_screen(page)
    assert says(text, "Four experts share", "this cat.")
    assert 30 < len(words(text)) <= WORDS, text
    assert 5 < len(controls) <= CONTROLS, controls
    photo = page.locator("[data-part=photo]").bounding_box()
    assert photo["width"] >= 0.45 * page.locator(".mv-flow-row").bounding_box()["width"]
    assert photo["y"] + photo["height"] <= 900
    assert violations(page) == []
    assert no_sideways_scroll(page)
    assert page.locator(".mv-cell:visible").count() == 0
    assert {"experts", "classes", "what_if"}.isdisjoint(newcomer.asked)


@pytest.fixture(scope="module")
def bundled():
    """The document that each bundled model would open with."""
    entries = open_entries(None)
    explorer = Explorer(entries)
    boot = explorer.boot({})

    def document(model):
        ordered = sorted(boot["models"], key=lambda one: one["id"] != model)
        picture = {"kind": "example", "id": ordered[0]["examples"][0]["id"]}
        view = explorer.answer("route", {"model": model, "picture": picture})
        first = {"model": model, "picture": picture["id"]}
        return app_page({**boot, "models": ordered, "default": first, "whole": True}, [view]).text

    yield document
    explorer.close()


@pytest.mark.parametrize("model", [folder.name for folder in bundled_folders()])
@pytest.mark.parametrize("size", [{}, MOBILE], ids=["wide", "phone"])
def test_the_first_screen_of_every_bundled_model_is_as_short(new_visit, bundled, model, size):
    page = new_visit(door=False, reduced_motion="reduce", **size).page
    document = {"body": bundled(model), "content_type": "text/html"}
    page.route("http://localhost/*", lambda route: route.fulfill(**document))
    page.goto("http://localhost/")
    page.wait_for_selector(LANDED, state="attached")
    text, in_a_box, controls = first_screen(page)
    most = SORTING_WORDS if page.is_visible(".mv-sorted") else WORDS
    boxes = page.locator(".mv-flow-box:visible").count()  # each is read as one word
    assert len(words(text)) + boxes <= most, text
    assert in_a_box <= IN_A_BOX
    assert 2 <= len(controls) <= CONTROLS, controls


def test_a_phone_shows_the_photo_first(visit):
    page = visit(door=False, **MOBILE).page
    photo = page.locator("[data-part=photo]").bounding_box()
    assert (photo["y"] <= 300, photo["width"] >= 350) == (True, True)
    assert no_sideways_scroll(page)


def test_pointing_at_a_box_leaves_its_part_of_the_photo(newcomer, ask):
    page = newcomer.page
    first, each = firsts(ask)
    expert = each.index(max(each))
    page.hover(f".mv-flow-box[data-expert='{expert}']")
    assert faded(page, first) == [mine != expert for mine in first]
    page.mouse.move(5, 5)
    assert not any(faded(page, first))


def test_another_image_ends_the_flight_of_the_first(visit, tmp_path):
    """Its patches don't stay in the air above a photo that somebody brings meanwhile."""
    page = visit(door=False).page
    page.click("[data-action=fly]")
    page.wait_for_selector("[data-part=air]:not([hidden])")
    Image.new("RGB", (80, 60), "teal").save(tmp_path / "own.png")
    page.set_input_files("[data-box=file]", tmp_path / "own.png")
    page.wait_for_selector("h1:text-is('Four experts share this photo.')")
    page.wait_for_selector("[data-part=air]", state="hidden", timeout=3_000)


def test_experts_are_taken_away_one_by_one_and_put_back(newcomer, ask):
    page = newcomer.page
    _, each = firsts(ask)
    assert counts(page) == each
    gone = each.index(max(each))
    take_away(page, gone)
    _, moved = firsts(ask, away=[[3, gone]])
    moved[gone] = "away"
    assert counts(page) == moved
    page.wait_for_selector(CONTROLLED)
    change = {"kind": "ablate", "layer": 3, "expert": gone}
    measured = ask("what_if", picture=FIRST, intervention=change)
    assert (
        told(page, ".mv-flow-say p")
        == f"1 expert away: {result(measured)}; each circle is one draw."
    )
    assert page.locator(".mv-flow-answer em").count() == measured["control"]["n"]
    other = next(box for box, count in enumerate(moved) if count and box != gone)
    take_away(page, other)
    assert "2 experts away" in page.text_content(".mv-flow-say")
    page.wait_for_function("away => location.search.includes(away)", arg=f"3.{gone}_3.{other}")
    link = page.url
    press(page, "[data-box=said] [data-action=put-back]", AWAY, state="detached")
    assert counts(page) == each
    page.goto(link)
    page.wait_for_selector(AWAY)
    assert page.locator(AWAY).count() == 2


def test_without_any_expert_the_layer_adds_nothing(newcomer, ask):
    page = newcomer.page
    everything = ask("route", picture=FIRST, away=[[3, expert] for expert in range(4)])
    assert not any(any(row) for row in everything["layers"][1]["kept"])
    page.goto(page.url.partition("?")[0] + "?away=3.0_3.1_3.2_3.3")
    page.wait_for_selector(".mv-flow-say:has-text('4 experts away')")
    assert counts(page) == ["away"] * 4


def test_a_card_is_as_large_as_posts_show_it_and_has_the_photo(visit):
    page = visit(then="[data-part=image].mv-sharp").page
    with Image.open(saved(page, "card").path()) as card:
        assert card.size == (1200, 630)
        photo = card.convert("RGB").crop((0, 0, 630, 630))
        assert len(photo.getcolors(2**20)) > 10_000  # sharp
        assert card.convert("RGB").getpixel((1190, 10)) == (251, 251, 249)  # paper


REPORT = (ROOT / "moevision" / "analysis" / "templates" / "page.css").read_text(encoding="utf-8")


SHOWN = [(width, REPORT) for width in (360, 390, 600, 780, 830, 1100, 1280)]


@pytest.mark.parametrize(("width", "sheet"), [*SHOWN, (360, ""), (600, "")])
def test_a_framed_view_is_seen_whole_at_any_width(new_visit, ask, width, sheet):
    """In a report's column and in anybody's page: a frame can't ask its view how high it is, nor may that grow.

    Of an image without a label the page shows all classes, the frame the likeliest two."""
    shown = ask("route", picture=FIRST)
    shown = {**shown, "picture": {**shown["picture"], "label": None}}
    assert len(shown["prediction"]["moe"]) > 4
    view = flow_html(shown)
    size = {"width": width, "height": 900}
    page = new_visit(door=False, viewport=size, reduced_motion="reduce").page
    style = f"<style>{read_css(('explorer_base.css',))}{sheet}</style>"
    body = f'<body class="mv"><div class="page"><nav></nav><main>{view}</main></div>'
    page.set_content(f"<!doctype html>{style}{body}")
    page.frame_locator("iframe").locator(".mv-flow-box").first.wait_for()
    height = "[document.documentElement.scrollHeight, innerHeight]"
    for _ in range(3):
        page.wait_for_timeout(300)
        needed, given = page.frames[1].evaluate(height)
        assert needed <= given


def test_a_framed_view_shows_the_layer_that_is_chosen(new_visit, ask):
    page = new_visit(door=False, reduced_motion="reduce").page
    page.set_content(f"<!doctype html>{flow_html(ask('route', picture=FIRST))}")
    frame = page.frame_locator("iframe")
    for layer in (0, 1):
        frame.locator("[data-change=flow-layer]").select_option(str(layer))
        assert counts(frame) == firsts(ask, layer)[1]


@pytest.mark.alone
def test_the_flight_is_smooth(visit):
    """Median of a frame in three flights, ms."""
    page = visit(door=False).page
    page.wait_for_selector(LANDED, state="attached")
    for _ in range(3):
        frames = sorted(page.evaluate(FRAMES))
        assert frames[len(frames) // 2] <= 20


def test_a_server_that_is_gone_gets_a_sentence_and_a_way_on(new_visit, server):
    page = new_visit(door=False).open(server.url)
    page.route(SERVER_CALL, lambda route: route.abort())
    other = ".mv-flow-pick [data-action=example] >> nth=1"
    press(page, other, "[data-action=retry]:visible")
    assert "doesn't answer" in page.text_content("[role=alert]")
    page.unroute(SERVER_CALL)
    press(page, "[data-action=retry]", "[data-action=retry]", state="detached")
    assert page.get_attribute(other, "aria-pressed") == "true"


def test_a_model_without_images_asks_for_one(new_visit, server, empty_stage):
    page = new_visit().open(server.url)
    empty_stage(page)
    page.click("[data-action=door]")
    assert page.is_visible("[data-box=blank] [data-action=choose]")
    assert page.is_hidden("[data-box=flow]")  # it would show the former model's image


def test_the_control_of_one_expert_is_asked_for_once(visit, ask):
    _, each = firsts(ask)
    page = visit(f"?away=3.{each.index(max(each))}").page
    page.wait_for_selector(CONTROLLED)
    page.select_option("[data-change=flow-layer]", "0")
    page.select_option("[data-change=flow-layer]", "1")
    page.wait_for_selector(CONTROLLED)
    assert page.visit.asked.count("what_if") == 1


def test_who_clicks_on_waits_for_no_control(visit, ask):
    """One expert away, another one too, the first one back: only what is looked at then is measured."""
    _, each = firsts(ask)
    most = each.index(max(each))
    one = visit(door=False)
    other = one.page.evaluate(
        """async (most) => {
          const press = async (box, away) => {
            box.click();
            while (parseInt(document.querySelector(".mv-flow-say").textContent) !== away)
              await new Promise(requestAnimationFrame);
          };
          const box = (rest) => document.querySelector(`.mv-flow-box${rest}`);
          await press(box(`[data-expert="${most}"]`), 1);
          const other = Number(box(":not([disabled], [aria-pressed=true])").dataset.expert);
          await press(box(`[data-expert="${other}"]`), 2);
          await press(box(`[data-expert="${most}"]`), 1);
          return other;
        }""",
        most,
    )
    one.page.wait_for_selector(CONTROLLED)
    assert [asked["intervention"]["expert"] for asked in one.questions("what_if")] == [other]


def test_the_door_opens_on_everything_else_and_stays_open(visit):
    page = visit(door=False).page
    press(page, "[data-action=door]", ".mv-cell")
    assert page.get_attribute("[data-action=door]", "aria-expanded") == "true"
    page.reload()
    page.wait_for_selector(".mv-cell")
    press(page, "[data-action=door]", ".mv-cell", state="hidden")
    page.wait_for_function("!location.search.includes('patch=')")
    page.reload()
    page.wait_for_selector(".mv-flow-box")
    assert page.locator(".mv-cell:visible").count() == 0


FORCED = {"kind": "force", "layer": 3, "expert": 1}
RANDOM = {"kind": "random"}
SWAPPED = {"kind": "swap", "layer": 3, "expert": 1, "other": 2}
UNTRAINED = "Not trained: its weights are random, so its predictions mean nothing."
CHANGED = [
    ("?variant=untrained", UNTRAINED, {"variant": "untrained"}),
    ("?do=force.3.1.next_best.0", "Every patch in L3 goes to L3·E1.", {"intervention": FORCED}),
    ("?do=random.all.any.next_best.0", "random experts in every layer.", {"intervention": RANDOM}),
    ("?do=swap.3.1-2.next_best.0", "E1 and E2 compute each other's", {"intervention": SWAPPED}),
    ("?k=1", "Trained with top-2; shown is k = 1.", {"top_k": 1}),
    ("?capacity=0.5", "Trained with no limit; shown is capacity factor 0.5.", {"capacity": 0.5}),
]


@pytest.mark.parametrize(("query", "words", "asked"), CHANGED)
def test_the_opening_says_what_is_not_the_trained_model(visit, ask, query, words, asked):
    """A link may show any of these to somebody who doesn't know of it; one click shows the model as it is."""
    page = visit(query, door=False, reduced_motion="reduce").page
    assert words in page.text_content("[data-box=said]")
    model = asked.get("variant", "changed")
    assert " ".join(page.text_content(".mv-flow-answer p").split()) == f"The {model} model says"
    best = page.locator(".mv-flow-answer b").first
    assert best.text_content() == shown_share(ask("route", picture=FIRST, **asked))
    page.click("[data-action=as-is]")
    page.wait_for_selector(".mv-flow-answer p:text-is('The model says')")
    assert best.text_content() == shown_share(ask("route", picture=FIRST))
    page.wait_for_function("() => !/variant|do=|k=|capacity/.test(location.search)")


def shown_share(view):
    return f"{100 * view['prediction']['moe'][0]['p']:.0f} %"
