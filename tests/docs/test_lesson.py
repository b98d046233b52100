"""The lesson: the file in docs/ is what its sources make, asks for nothing, and its numbers are the model's."""

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moevision.demo.html import modules
from moevision.demo.models import bundled_folder, bundled_model, read_card
from tests.shared import load_script, says

DOCS = Path(__file__).parents[2] / "docs"
PAGE, SOURCES = DOCS / "lesson.html", DOCS / "lesson"
lesson = load_script(SOURCES / "build.py")


@pytest.fixture(scope="module")
def numbers():
    return json.loads((SOURCES / lesson.NUMBERS).read_text())


@pytest.fixture(scope="module")
def card():
    return read_card(bundled_folder(lesson.MODEL) / "card.json")


@pytest.fixture(scope="module")
def page(card):
    number = int(card.matters["picture"].rpartition("/")[2])
    return lesson.Pages(bundled_model(lesson.MODEL), number, 1)


def test_the_committed_page_is_made_of_its_sources():
    """Else: python docs/lesson/build.py docs/lesson.html."""
    assert PAGE.read_text(encoding="utf-8") == lesson.lesson_html()


def test_every_source_is_used():
    own = {name for name in modules("lesson.js", lesson.read_module) if (SOURCES / name).exists()}
    assert {*own, "lesson.css", lesson.NUMBERS} == {
        file.name for file in SOURCES.iterdir() if file.suffix in (".js", ".css", ".json")
    }


def test_the_lesson_draws_with_the_explorers_view():
    """Its modules call for no canvas of patches of their own: flight, boxes and sums are the explorer's."""
    taken = set(modules("lesson.js", lesson.read_module))
    assert {"core.js", "core_flow.js", "core_mosaic.js", "core_card.js"} <= taken
    own = [file.read_text() for file in SOURCES.glob("lesson*.js")]
    assert not any("drawImage" in source for source in own)


def test_the_page_can_load_nothing():
    text = PAGE.read_text(encoding="utf-8")
    assert says(text, "default-src 'none';", "img-src data:;")
    # links to the explorer: linkExplorer
    assert (
        re.findall(r"""(?:src|href)=["'](?!#|\$|data:)[^"']*|@import|url\((?!['"]\$\{)""", text)
        == []
    )


def test_steps_take_40_minutes_and_leave_5_for_questions():
    text = (SOURCES / "lesson_steps.js").read_text()
    minutes, alone = (
        list(map(int, re.findall(rf"^ +{name}: (\d+),$", text, re.M)))
        for name in ("minutes", "alone")
    )
    assert (len(minutes), sum(minutes), sum(alone)) == (8, 40, 10)
    assert "const QUESTIONS = 5;" in (SOURCES / "lesson.js").read_text()


def test_the_page_of_the_lesson_is_the_one_that_the_explorer_opens(numbers, card, page):
    """Views, sorting and gate are of that page, with the model's answers."""
    matters = card.matters
    whole, without = numbers["views"]["all"], numbers["views"]["without"]
    assert numbers["chosen"] == matters["chosen"]
    assert whole["prediction"]["moe"][0]["class"] == matters["before"]["class"]
    ((_, telling),) = matters["away"]
    after = without[telling]["prediction"]["moe"][0]
    assert (after["class"], after["p"]) == pytest.approx(
        (matters["after"]["class"], matters["after"]["p"]), abs=0.005
    )
    own = page.experts()[0].tolist()
    assert numbers["sorting"]["own"] == own
    assert [first for (first,) in whole["layers"][0]["experts"]] == own
    changes = [one["before"][0]["class"] != one["after"][0]["class"] for one in numbers["effects"]]
    assert changes.index(True) == telling
    assert sum(changes) == 1
    assert numbers["gate"] == lesson._gate(page)


def test_steps_have_a_right_and_a_wrong_choice(numbers):
    """The words of steps 1 and 7 hold: most symbols, not all, go together; a busy expert isn't missed."""
    own, symbols = numbers["sorting"]["own"], numbers["page"]["of_group"]
    counts = np.bincount([own[symbol] for symbol in symbols])
    assert 2 < counts.max() < len(symbols)
    claimed = numbers["taken"]["experts"][counts.argmax()]
    assert claimed["group"] == numbers["page"]["group"]
    assert claimed["named"]
    assert claimed["share"] < 0.9  # "all, or nearly all" is wrong
    assert min(own.count(expert) for expert in set(own)) < max(map(own.count, own))


def test_names_are_those_that_the_explorer_shows(numbers, card):
    """Counted on other pages."""
    shown = {name["expert"]: name["name"] for name in card.names}
    counted = {one["expert"]: one for one in numbers["taken"]["experts"]}
    assert {expert: one["group"] for expert, one in counted.items() if one["named"]} == shown
    for name in card.names:
        assert counted[name["expert"]]["share"] == pytest.approx(name["share"], abs=0.03)
    assert sum(one["load"] for one in counted.values()) == pytest.approx(1, abs=0.001)


def test_the_layers_below_sort_and_clusters_do_it_best(numbers):
    """The words of step 6."""
    guessed = numbers["guessed"]
    order = [guessed[name] for name in ("chance", "random", "trained", "clusters")]
    assert order == sorted(order)
    assert guessed["random_best"] < guessed["trained"]
    assert guessed["random"] > 2 * guessed["chance"]


def test_it_matters_who_computes_what(numbers):
    right = numbers["right"]
    assert max(max(right["one"]), right["random"]) < right["all"] / 2


def test_counts_are_the_models(numbers):
    """On fewer pages than were counted."""
    few = lesson.Pages(bundled_model(lesson.MODEL), 0, 200)
    experts = few.experts()
    symbols = experts == numbers["taken"]["experts"][2]["expert"]
    group = lesson.GROUPS.index(numbers["taken"]["experts"][2]["group"])
    assert (few.groups[symbols] == group).mean() == pytest.approx(
        numbers["taken"]["experts"][2]["share"], abs=0.06
    )
    assert few.accuracy() == pytest.approx(numbers["right"]["all"], abs=0.06)


def test_what_experts_bring_is_what_the_study_recorded(numbers):
    """And the lesson's words hold: ahead with 55 kinds, behind with this model's stem."""
    found = lesson.pays()
    assert numbers["pays"] == found
    assert found["kinds"].startswith("+")
    assert "(+" in found["kinds"]
    assert found["named"].startswith("−")
    assert "to −" in found["named"]
    intervals = numbers["model"]["accuracy_interval"]
    assert intervals["dense"][1] > intervals["moe"][0]  # they overlap


def test_what_an_expert_says_is_added_without_a_layer_scale(page):
    """The words of step 3: weight times output, on top of what was there."""
    (block,) = page.saved.net.blocks
    assert isinstance(block.ls2, torch.nn.Identity)
    (layer,) = lesson.numbered_layers(page.saved.net).values()
    assert layer.router.top_k == 1
    assert layer.num_shared_experts == 0


def test_a_sorting_by_hand_is_what_the_model_would_say(numbers, page):
    """All emoji in one pass, each sent to an expert of its own: the mean of the recorded parts, normed and read."""
    net = page.saved.net
    (layer,) = lesson.numbered_layers(net).values()
    choice = np.random.default_rng(0).integers(0, numbers["model"]["experts"], 16)

    def each_its_own(_module, _inputs, routing):  # gates stay those of the first choice
        return replace(routing, expert_index=torch.tensor(choice)[None, :, None])

    handle = layer.router.register_forward_hook(each_its_own)
    with torch.inference_mode():
        wanted = net(page.input)[0].softmax(0).numpy()
    handle.remove()

    sorting = numbers["sorting"]
    parts, head, bias = (unpacked(sorting[name]) for name in ("parts", "head", "bias"))
    mean = parts.reshape(16, -1, parts.shape[1])[np.arange(16), choice].mean(0)
    normed = (mean - mean.mean()) / np.sqrt(mean.var() + sorting["eps"])
    powers = np.exp(head @ normed + bias)
    assert powers / powers.sum() == pytest.approx(wanted, abs=0.01)


def unpacked(packed):
    whole = np.frombuffer(base64.b64decode(packed["data"]), "<i2")
    return whole.reshape(packed["shape"]) * packed["unit"]
