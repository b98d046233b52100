"""Pages that a visitor types: what is drawn, what its class is, and what is refused."""

from itertools import combinations

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


def test_the_fewest_experts_are_those_of_a_search_one_by_one(explorer):
    """Every set of at most three of eight, each asked for by itself: none smaller changes the answer."""
    own = ask(explorer, PAGE)["prediction"]["moe"][0]["class"]

    def changes(experts):
        view = ask(explorer, PAGE, away=[[0, expert] for expert in experts])
        return view["prediction"]["moe"][0]["class"] != own

    sets = [chosen for size in (1, 2, 3) for chosen in combinations(range(8), size)]
    changing = [chosen for chosen in sets if changes(chosen)]
    found = ask(explorer, PAGE, "fewest")["away"]
    if not changing:
        assert found is None
    else:
        assert tuple(expert for _, expert in found) in changing
        assert len(found) == len(changing[0])


def test_several_experts_away_are_measured_beside_as_many_emoji_at_random(explorer):
    """The answer is the view's; the emoji that are moved are those that the experts had. One alone is an ablation."""
    experts = [one for (one,) in ask(explorer, PAGE)["layers"][0]["experts"]]
    pair = sorted(set(experts), key=experts.count)[-2:]
    away = [[0, expert] for expert in pair]
    effect = ask(explorer, PAGE, "what_if", away=away)
    after = ask(explorer, PAGE, away=away)["prediction"]["moe"][0]
    assert effect["after"][0]["class"] == after["class"]
    assert effect["after"][0]["p"] == pytest.approx(after["p"], abs=1e-4)
    assert effect["moved"] == sum(expert in pair for expert in experts)
    assert effect["control"]["n"] == 20
    assert says(effect["sentence"], f"L0·E{pair[0]}", f"L0·E{pair[1]}", f"{effect['moved']} patch")

    change = {"kind": "ablate", "layer": 0, "expert": pair[0]}
    alone = ask(explorer, PAGE, "what_if", intervention=change)
    assert ask(explorer, PAGE, "what_if", away=[[0, pair[0]]]) == alone


def test_a_search_that_would_take_long_is_refused(explorer, monkeypatch):
    monkeypatch.setattr("moevision.demo.service.MOST_SEARCHED", 1e6)
    assert says(ask(explorer, PAGE, "fewest")["error"], "Pages of emoji", "too large")


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
