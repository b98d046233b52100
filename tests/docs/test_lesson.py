"""The lesson: the file in docs/ is what its sources make, asks for nothing, and its numbers are the models'."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moevision.demo.html import modules
from moevision.demo.models import bundled_model, bundled_photos
from moevision.demo.view import route_image
from tests.shared import load_script, says

DOCS = Path(__file__).parents[2] / "docs"
PAGE, SOURCES = DOCS / "lesson.html", DOCS / "lesson"
lesson = load_script(SOURCES / "build.py")


@pytest.fixture(scope="module")
def numbers():
    return json.loads((SOURCES / lesson.NUMBERS).read_text())


@pytest.mark.needs("photos")
def test_the_committed_page_is_made_of_its_sources():
    """Else: python docs/lesson/build.py docs/lesson.html."""
    assert PAGE.read_text(encoding="utf-8") == lesson.lesson_html()


def test_every_source_is_used():
    own = {name for name in modules("lesson.js", lesson.read_module) if (SOURCES / name).exists()}
    assert {*own, "lesson.css", lesson.NUMBERS} == {
        file.name for file in SOURCES.iterdir() if file.suffix in (".js", ".css", ".json")
    }


def test_the_page_can_load_nothing():
    text = PAGE.read_text(encoding="utf-8")
    assert says(text, "default-src 'none';", "img-src data:;")
    # links to the explorer: linkExplorer
    assert re.findall(r"""(?:src|href)=["'](?!#|\$|data:)[^"']*|@import|url\(""", text) == []


def test_steps_take_40_minutes_and_leave_5_for_questions():
    text = (SOURCES / "lesson_steps.js").read_text()
    minutes, alone = (
        list(map(int, re.findall(rf"^      {name}: (\d+),$", text, re.M)))
        for name in ("minutes", "alone")
    )
    assert (len(minutes), sum(minutes), sum(alone)) == (10, 40, 10)
    assert "const QUESTIONS = 5;" in (SOURCES / "lesson.js").read_text()


@pytest.mark.needs("photos")
def test_a_photo_is_routed_as_the_model_does(numbers):
    """On another processor a patch whose two best experts are as good as equal may change sides."""
    photos = bundled_photos("cats_vs_dogs")
    names = map(photos.picture_name, range(len(photos)))
    index = next(index for index, name in enumerate(names) if lesson.PHOTOS[0] in name)
    view = route_image(bundled_model("cats_vs_dogs"), photos.image(index))
    for layer in view.layers:
        said = numbers["photos"][0]["first"][str(layer.facts.layer)]
        best = layer.expert_index[:, 0]
        agree = [str(expert) == digit for expert, digit in zip(best, said, strict=True)]
        assert sum(agree) >= len(said) - 4
    layer, gate = view.layer(lesson.LAYER), numbers["gate"]
    assert gate["patch"] == lesson.GATE_PATCH
    assert layer.computation.scores[lesson.GATE_PATCH] == pytest.approx(gate["scores"], abs=0.02)
    assert layer.combine_weight[lesson.GATE_PATCH] == pytest.approx(gate["weights"], abs=0.01)


def test_the_ablation_was_chosen_on_validation(numbers):
    without = numbers["without"]
    experts = {row["name"]: row for row in without["experts"]}
    telling, quiet = (experts[without[kind]["name"]] for kind in ("telling", "quiet"))
    changes = [row["changed_validation"] for row in experts.values()]
    assert (telling["changed_validation"], quiet["changed_validation"]) == (max(changes), 0)
    unchanged = [row["work"] for row in experts.values() if not row["changed_validation"]]
    assert quiet["work"] == max(unchanged)
    assert without["telling"]["answer"] != without["shown"]["label"] == without["quiet"]["answer"]


def test_what_experts_bring_is_what_the_study_recorded(numbers):
    """And the lesson's words hold: better at equal steps, no difference shown at equal time."""
    found = lesson.sparsity()
    assert numbers["sparsity"] == found
    assert found["seeds"]["moe"] == found["seeds"]["twin"]
    assert found["right"]["moe"] > found["right"]["twin"]
    assert says(found["verdict"], "not told apart")


def test_training_made_maps_tidier_than_chance_alone(numbers):
    """The lesson's words: neighbours agree about as often before as after, and by more than chance after."""
    of = numbers["neighbours"]
    assert abs(of["after"] - of["before"]) < 0.05
    assert of["after"] - of["shuffled_after"] > of["before"] - of["shuffled_before"] > 0


@pytest.mark.needs("photos")
def test_the_router_game_adds_up_to_what_the_model_says(numbers):
    """Pieces shared out in one forward pass, each patch forced on its own, give the sum of the recorded parts."""
    game, model = numbers["game"], bundled_model("cats_vs_dogs")
    photo = lesson.bundled_folder("cats_vs_dogs") / "examples" / game["photo"]
    images = lesson.network_input(model, np.stack([lesson.model_input(photo, model.image_size)]))
    layer = lesson.numbered_layers(model.net)[lesson.LAYER]
    choice = np.random.default_rng(0).integers(0, 4, 16)
    row, column = np.divmod(np.arange(144), 12)
    wanted = torch.tensor([game["experts"][choice[piece]] for piece in row // 3 * 4 + column // 3])

    def each_its_own(
        _module, _inputs, routing
    ):  # the expert first, the patch's best other one second; gates by rank
        index = routing.expert_index.clone()
        first, second = index[0, 1:].unbind(-1)  # behind the class token
        index[0, 1:] = torch.stack([wanted, torch.where(first == wanted, second, first)], -1)
        return replace(routing, expert_index=index)

    handle = layer.router.register_forward_hook(each_its_own)
    with torch.inference_mode():
        logits = model.net(images)[0]
    handle.remove()
    label = model.class_names.index(game["label"])
    parts = game["bias"] + sum(game["parts"][piece][expert] for piece, expert in enumerate(choice))
    assert float(logits[label] - logits[1 - label]) == pytest.approx(parts, abs=0.02)
