"""Pages that a visitor types: what is drawn, what its class is, and what is refused."""

import pytest

from moevision.data.emoji import draw_page, split_emoji
from moevision.demo.models import open_entries
from moevision.demo.service import Explorer
from moevision.demo.view import route_image
from tests.demo import hostile
from tests.shared import says

PAGE = "🐶🐱🐭🐹🐰🦊🐻🐼🐨🐯🦁🐮🍎🍕🚗😀"


@pytest.fixture(scope="module")
def explorer():
    """Of the two bundled models whose images are drawn."""
    entries = [one for one in open_entries(None) if one.card.id in ("emoji", "pets")]
    explorer = Explorer(entries)
    yield explorer
    explorer.close()


def ask(explorer, text, name="route", model="emoji", **more):
    picture = {"kind": "page", "text": text}
    return explorer.answer(name, {"model": model, "picture": picture, **more})


def test_a_typed_page_is_routed_as_it_is_drawn(explorer):
    view = ask(explorer, PAGE)
    saved = explorer.entries["emoji"].variants["trained"].saved
    drawn = route_image(saved, draw_page(split_emoji(PAGE))).to_json()
    assert view["prediction"]["moe"] == drawn["prediction"]["moe"]
    assert view["layers"][0]["experts"] == drawn["layers"][0]["experts"]
    assert view["picture"]["src"] == drawn["picture"]["src"]
    assert view["picture"]["label"] == "animals"  # twelve of sixteen
    assert view["picture"]["name"] == PAGE


def test_white_space_between_emoji_changes_nothing(explorer):
    assert ask(explorer, "\n ".join(PAGE)) == ask(explorer, PAGE)


def test_whatever_an_image_can_be_asked_a_typed_page_can(explorer):
    expert = ask(explorer, PAGE)["layers"][0]["experts"][0][0]
    away = ask(explorer, PAGE, away=[[0, expert]])
    assert away["layers"][0]["experts"][0][0] != expert
    change = {"kind": "ablate", "layer": 0, "expert": expert}
    assert ask(explorer, PAGE, "what_if", intervention=change)["target"] == "animals"
    assert "moevision.view/2" in ask(explorer, PAGE, "export_html")["html"]


def test_emoji_to_choose_from_make_a_page(explorer):
    offered = explorer.answer("emoji", {"model": "emoji"})
    assert (offered["fewest"], offered["most"]) == (12, 16)
    for group in offered["groups"]:
        assert len(group["emoji"]) == 24
        assert ask(explorer, "".join(group["emoji"][:16]))["picture"]["label"] == group["name"]


@pytest.mark.parametrize("text", [text for text in hostile.TYPED if text != "🐶" * 12])
def test_what_is_no_page_is_a_sentence(explorer, text):
    refused = ask(explorer, text)
    assert refused["code"] == "bad_request"
    assert says(refused["error"])
    assert len(refused["error"]) < 200
    assert refused["error"].encode("utf-8").decode().isprintable()


@pytest.mark.parametrize("value", [None, 3, ["🐶"] * 12, {"text": PAGE}])
def test_a_text_is_a_text(explorer, value):
    assert ask(explorer, value)["code"] == "bad_request"


def test_another_model_has_no_pages(explorer):
    for refused in (
        ask(explorer, PAGE, model="pets"),
        explorer.answer("emoji", {"model": "pets"}),
    ):
        assert "Drawn pets" in refused["error"]
