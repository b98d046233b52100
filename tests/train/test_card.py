"""The model card says what was measured and what was not, and nothing that its reader has no business to know."""

import io
import json
import math
import re
import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard

import moevision
from moevision.commands.predict import predict_batch
from moevision.data.folder import DATASET_NAMES
from moevision.data.named import UNKNOWN, terms_of
from moevision.models.io import SavedModel, load_model, save_model
from moevision.train.finish import _write_summary
from moevision.train.report import (
    WeightsOrigin,
    gather_facts,
    model_card,
    read_summary,
    without_path,
)
from tests.shared import missing

Facts = dict[str, Any]


@pytest.fixture(scope="module")
def facts(tiny_run: Path) -> Facts:
    return gather_facts(tiny_run, read_summary(tiny_run / "summary.json"))


def header(card: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert found
    return yaml.safe_load(found[1])


def test_fit_leaves_the_card_beside_the_model(tiny_run, facts):
    """Written anew once the twin is known; the twin's own card is that of a dense model."""
    written = (tiny_run / "model" / "README.md").read_text()
    assert written == model_card(facts)
    assert "its dense twin: " in written
    twin = (tiny_run / "twin" / "model" / "README.md").read_text()
    assert "without experts" in twin
    assert "mixture-of-experts" not in header(twin)["tags"]
    assert "dense twin" not in twin
    assert "forward_routing" not in twin, "its program asks for no routing"


def test_the_header_is_what_the_hub_expects(tiny_run, facts):
    card = ModelCard(model_card(facts))
    test = json.loads((tiny_run / "summary.json").read_text())["test"]
    (result,) = card.data.eval_results
    assert result.metric_value == pytest.approx(test["correct"] / test["total"], abs=5e-5)
    assert (result.task_type, result.metric_type, result.dataset_type) == (
        "image-classification",
        "accuracy",
        "imagefolder",
    )
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "unknown",
        "timm",
        "image-classification",
    )
    assert "datasets" not in header(str(card))


def test_the_header_names_data_and_start_that_the_hub_knows(facts):
    """Addresses as huggingface.co has them; timm's own record names the licence of its weights."""
    start = WeightsOrigin(
        "deit_tiny_patch16_224", "timm/deit_tiny_patch16_224.fb_in1k", "apache-2.0"
    )
    card = model_card(
        facts | {"start": start, "summary": replace(facts["summary"], data="cifar10")}
    )
    assert header(card)["datasets"] == ["uoft-cs/cifar10"]
    assert header(card)["base_model"] == "timm/deit_tiny_patch16_224.fb_in1k"
    assert not missing(card, "deit_tiny_patch16_224 (", "timm records it", ": apache-2.0)")
    assert not missing(card, "states no licence", "cite Krizhevsky 2009")
    drawn = ModelCard(
        model_card(facts | {"summary": replace(facts["summary"], data="synthetic_pets")})
    )
    assert drawn.data.eval_results[0].dataset_type == "synthetic_pets"


def test_what_was_measured_is_in_it(tiny_run, facts):
    card, summary = model_card(facts), json.loads((tiny_run / "summary.json").read_text())
    test, cost = summary["test"], summary["cost"]
    assert (
        f"**{100 * test['correct'] / test['total']:.1f} % of {test['total']} test images recognised**"
        in card
    )
    assert f"| parameters, total | {cost['total_parameters']:,} |" in card
    for layer in summary["layers"]:
        assert (
            f"| block {layer['layer']} | 4 | {layer['max_over_mean']:.2f} | {layer['cv_squared']:.2g} |"
            in card
        )
        assert f"| block {layer['layer']} | noisy_top_k | 4 | 2 |" in card
    twin = summary["twin"]["difference"]
    assert f"**{100 * twin['difference']:+.1f} percentage points**".replace("-", "−") in card
    assert "Seed: 0." in card
    assert f"| torch | {version('torch')} |" in card
    assert f"| moevision | {moevision.__version__} |" in card
    assert not missing(card, "1 file of", "not be read")
    assert "Classes: cat, dog." in card


def test_what_was_not_measured_is_said(facts):
    card = model_card(facts)
    limits = card.partition("## Limits")[2].partition("##")[0]
    for words in ("spread over seeds", "specialize in", "Energy"):
        assert re.search(f"^- .*{words}.*not measured", limits, re.M), words
    assert "dense twin" not in limits
    assert UNKNOWN in card
    alone = model_card(facts | {"summary": replace(facts["summary"], twin=None)})
    assert not missing(alone, "how good", "a dense model")
    assert any("dense twin" in line and "not measured" in line for line in alone.splitlines())


def test_routers_that_choose_otherwise(tiny_run, facts, tmp_path):
    torch.manual_seed(0)
    net = timm.create_model(
        "test_vit_moe", num_classes=2, router=["soft", "expert_choice"], capacity_factor=None
    )
    run = shutil.copytree(
        tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("twin", "checkpoints")
    )
    save_model(SavedModel(net.eval(), ["a", "b"], 32, (0.5,) * 3, (0.5,) * 3), run / "model")
    card = model_card(gather_facts(run, facts["summary"]))
    assert "| block 1 | soft | 4 | 2 |" in card
    assert "| block 3 | expert_choice | 4 | 2 |" in card
    assert "| slots per expert | 8, – |" in card
    assert not missing(card, "every token", "of all experts")


def test_a_model_by_image_says_so(facts):
    by_image = "By image: one choice per image and layer, for all its tokens."
    assert by_image not in model_card(facts)
    card = model_card(facts | {"options": {**facts["options"], "route_by": "image"}})
    assert by_image in card
    assert "| route by | image |" in card


def test_nothing_private(tiny_run, facts):
    """No path of this computer, no name of an image; a class name can't break the table that it stands in."""
    note = "3 pictures stand in several classes as byte-identical files (for example dog/jane doe.png): keep each"
    odd = facts | {
        "class_names": ["a|b", "<script>"],
        "summary": replace(facts["summary"], notes=[note]),
    }
    card = model_card(odd)
    assert str(tiny_run.parent) not in card
    assert "broken.png" not in card
    assert "jane" not in card
    assert note.replace(" (for example dog/jane doe.png)", "") in card
    assert not missing(
        card, "a folder called “pets”", "moevision fit …/pets ", "--model.arch.name=test_vit_moe"
    )
    assert r"Classes: a\|b, &lt;script>." in card


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("/home/jane/cats", "…/cats"),
        ("--data.path=/home/jane/cats/", "--data.path=…/cats"),
        (r"C:\Users\jane\cats", "…/cats"),
        ("~/cats", "…/cats"),
        ("local-dir:/home/jane/model", "…/model"),
        ("hf-hub:timm/vit", "hf-hub:timm/vit"),
        ("--trainer.max_epochs=3", "--trainer.max_epochs=3"),
        ("quickstart", "quickstart"),
    ],
)
def test_paths_are_shortened(word, shown):
    assert without_path(word) == shown


def test_terms_are_known_or_said_to_be_unknown():
    """A folder that bears a name is not the dataset."""
    for name in DATASET_NAMES:
        assert terms_of(name).terms != UNKNOWN, name
    assert "CC BY-SA 4.0" in terms_of("pets").terms
    assert "non-commercial" in terms_of("imagenet").terms
    assert "non-commercial" in terms_of("imagenette").terms
    assert terms_of("./pets").terms == UNKNOWN
    assert terms_of("/home/jane/cifar10").title == "own images (a folder called “cifar10”)"


def test_the_program_in_the_card_works(tiny_run, drawn_pets, tmp_path, monkeypatch):
    """Run as a reader would, in the folder of the card: the same classes as `moevision predict`, and the routing."""
    shutil.copytree(tiny_run / "model", tmp_path / "model")
    picture = next((drawn_pets / "cat").iterdir())
    shutil.copy(picture, tmp_path / "model" / "image.jpg")
    monkeypatch.chdir(tmp_path / "model")
    program = re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    with redirect_stdout(io.StringIO()) as out:
        exec(compile(program[1], "README.md", "exec"), {})
    # timm knows no temperature
    (expected,) = predict_batch(replace(load_model(str(tiny_run)), temperature=None), [picture])
    lines = out.getvalue().splitlines()
    for line, name, probability in zip(
        lines[:2], expected.classes, expected.probabilities, strict=True
    ):
        assert line == f"{name}: {probability:.1%}"
    assert lines[2:] == ["1 (4, 4) torch.Size([1, 16, 4])", "3 (4, 4) torch.Size([1, 16, 4])"]


def test_start_from_pretrained_weights(tiny_run, facts, tmp_path):
    """What timm's registry says of its own weights; of a folder only the name."""
    shutil.copytree(
        tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("twin", "checkpoints")
    )
    config = tmp_path / "run" / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    record = timm.get_pretrained_cfg("deit_tiny_patch16_224")
    expected = {
        "deit_tiny_patch16_224": WeightsOrigin(
            "deit_tiny_patch16_224", record.hf_hub_id, record.license
        ),
        "hf-hub:timm/vit_tiny@main": WeightsOrigin("hf-hub:timm/vit_tiny@main", "timm/vit_tiny"),
        str(tmp_path / "secret" / "weights"): WeightsOrigin("…/weights"),
    }
    for source, start in expected.items():
        settings["model"]["arch"]["pretrained"] = source
        config.write_text(yaml.safe_dump(settings))
        assert gather_facts(tmp_path / "run", facts["summary"])["start"] == start


def test_a_test_loss_that_is_not_finite_lets_a_run_be_finished(tiny_run, facts, tmp_path):
    """One test image whose logits aren't finite is enough. JSON has no NaN: summary.json says null."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    layers = [replace(layer, entropy_bits=math.nan) for layer in facts["summary"].layers]
    test = replace(facts["summary"].test, loss=math.nan)
    _write_summary(replace(facts["summary"], test=test, layers=layers), run)
    assert json.loads((run / "summary.json").read_text())["test"]["loss"] is None
    assert "| loss | not finite |" in (run / "summary.md").read_text()
    again = read_summary(run / "summary.json")
    assert math.isnan(again.test.loss)
    assert math.isnan(again.layers[0].entropy_bits)
    assert (run / "model" / "README.md").read_text() == model_card(gather_facts(run, again))
