"""`moevision cut`: which experts stay, what is measured beside them, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torchvision.transforms.v2.functional import normalize, to_dtype, to_image

from moevision.commands.cut import verdict
from moevision.commands.demo import open_explorer
from moevision.data.images import safe_open
from moevision.errors import DataWarning
from moevision.layers import forward_routing, moe_layers
from moevision.models.cut import cut
from moevision.models.io import describe, load_model, save_model
from tests.shared import assert_names, draw_folder, refused, says, succeeded

CLASSES = ["cat", "dog", "fox"]


def draw_splits(root: Path, classes: list[str], per_class: int) -> Path:
    """As many images of each class in train/, val/ and test/."""
    for name in classes:
        for number, file in enumerate(
            sorted(draw_folder(root / "all", [name], 3 * per_class).rglob("*.png"))
        ):
            place = root / ("train", "val", "test")[number % 3] / name / file.name
            place.parent.mkdir(parents=True, exist_ok=True)
            file.rename(place)
    shutil.rmtree(root / "all")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return draw_splits(tmp_path_factory.mktemp("cut") / "images", CLASSES, 12)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that was not trained; its experts differ much."""
    torch.manual_seed(3)
    net = timm.create_model("test_vit_moe", num_classes=3, router="vmoe_top_k").eval()
    with torch.no_grad():
        for moe in moe_layers(net):
            for value in (*moe.experts.parameters(), *moe.router.parameters()):
                value.normal_()
    saved = replace(describe(net), class_names=CLASSES)
    path = tmp_path_factory.mktemp("cut") / "model"
    save_model(saved, path)
    return path


@pytest.fixture(scope="module")
def record(cli, folder, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("cut") / "small"
    options = ("--classes", "fox", "cat", "--experts", 2, "--data", folder, "--out", out)
    outcome = succeeded(cli("cut", model, *options))
    return json.loads((out / "cut.json").read_text()), outcome.out, out


def inputs(folder: Path, model, classes) -> tuple[torch.Tensor, torch.Tensor]:
    """The test images of some classes, read without the package's data code, and their labels."""
    files = [(file, name) for name in classes for file in sorted((folder / name).iterdir())]
    images = torch.stack([to_dtype(to_image(safe_open(file)), scale=True) for file, _ in files])
    labels = torch.tensor([list(classes).index(name) for _, name in files])
    return normalize(images, list(model.mean), list(model.std)), labels


@torch.inference_mode()
def test_experts_are_those_that_the_classes_use_most(record, folder, model):
    source = load_model(str(model))
    x, _ = inputs(folder / "train", source, ["cat", "fox"])
    _, routings = forward_routing(source.net, x)
    for moe, routing in zip(moe_layers(source.net), routings, strict=True):
        most = torch.bincount(routing.expert_index.flatten(), minlength=4).argsort(descending=True)
        assert record[0]["experts"][str(moe.layer_index)] == sorted(most[:2].tolist())


@torch.inference_mode()
def test_numbers_are_those_of_the_models(record, folder, model):
    numbers, text, out = record
    source = load_model(str(model))
    x, y = inputs(folder / "test", source, ["cat", "fox"])
    kept = {int(layer): experts for layer, experts in numbers["experts"].items()}
    right = numbers["right"]
    expected = {
        "all": source.net(x)[:, [0, 2]],
        "kept": cut(source, [0, 2], kept).net(x),
    }
    for name, logits in expected.items():
        assert right[name] == pytest.approx(float((logits.argmax(-1) == y).float().mean())), name
    for moe in moe_layers(source.net):
        moe.experts.fc2.weight.zero_()
        moe.experts.fc2.bias.zero_()
    without = source.net(x)[:, [0, 2]].argmax(-1)
    assert right["none"] == pytest.approx(float((without == y).float().mean()))
    assert len(right["random"]) == 10
    assert numbers["test_images"] == 24
    assert numbers["bytes"] == (out / "model.safetensors").stat().st_size
    assert_names(text, "2 of 3 classes (cat, fox)", "at random", "none", "demo")
    small = load_model(str(out))
    assert small.class_names == ["cat", "fox"]
    assert numbers["costs"]["after"]["parameters"] == sum(v.numel() for v in small.net.parameters())


def test_a_cut_model_predicts_and_can_be_cut_again(cli, record, folder, tmp_path):
    _, _, out = record
    image = next((folder / "test" / "fox").iterdir())
    table = succeeded(cli("predict", out, image)).out
    says(table, "fox")
    two = draw_splits(tmp_path / "two", ["cat", "fox"], 12)
    again = ("--classes", "cat", "fox", "--data", two, "--out", tmp_path / "again")
    succeeded(cli("cut", out, *again))
    numbers = json.loads((tmp_path / "again" / "cut.json").read_text())
    assert numbers["right"]["others"] is None
    assert all(len(experts) <= 2 for experts in numbers["experts"].values())


def test_the_explorer_shows_it_beside_its_source(record, folder, model):
    """One image, asked of both: each answers with its own classes, by its own experts."""
    _, text, out = record
    says(text, f"moevision demo {out} {model}")
    with pytest.warns(
        DataWarning, match="dog"
    ):  # images of a class that the cut model doesn't know
        explorer = open_explorer([str(out), str(model)], str(folder), None)
    try:
        models = explorer.answer("boot", {})["models"]
        assert [one["id"] for one in models] == ["own", "own-1"]
        picture = {"kind": "example", "id": models[0]["examples"][0]["id"]}
        views = [
            explorer.answer("route", {"model": one["id"], "picture": picture}) for one in models
        ]
    finally:
        explorer.close()
    assert [len(view["prediction"]["moe"]) for view in views] == [2, 3]
    experts = [[layer["num_experts"] for layer in view["layers"]] for view in views]
    assert experts == [[2, 2], [4, 4]]


@pytest.mark.parametrize(
    ("right", "sentence"),
    [
        ({"all": 0.9, "kept": 0.895, "none": 0.5}, "With the cut −0.5 points."),
        ({"all": 0.9, "kept": 0.91, "none": 0.5}, "With the cut +1.0 points."),
        (
            {"all": 0.9, "kept": 0.85, "none": 0.5},
            "Don't: with the cut −5.0 points. Try --experts 2",
        ),
        ({"all": 0.9, "kept": 0.9, "none": 0.895}, "need no expert here: without any −0.5 points"),
    ],
)
def test_the_verdict(right, sentence):
    says(verdict(right, 1), sentence)


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (["cat", "fos"], ["'fos'", "fox"]),
        (["cat", "cat"], ["one class", "--classes"]),
        (["cat", "\x1b[31m"], ["no class", "cat"]),
    ],
)
def test_classes_that_cannot_be_kept(cli, model, folder, tmp_path, classes, words):
    out = tmp_path / "out"
    refused(cli("cut", model, "--classes", *classes, "--data", folder, "--out", out), *words)
    assert not out.exists()


def test_without_images_of_other_classes_the_rest_is_measured(cli, model, tmp_path):
    """A folder of the kept classes alone: the experts that others use are not compared."""
    own = draw_splits(tmp_path / "own", ["cat", "fox"], 12)
    options = ("--classes", "cat", "fox", "--experts", 2, "--data", own, "--out", tmp_path / "out")
    outcome = succeeded(cli("cut", model, *options))
    assert json.loads((tmp_path / "out" / "cut.json").read_text())["right"]["others"] is None
    assert "other classes" not in outcome.out


def test_refusals_name_the_way_on(cli, model, folder, tmp_path):
    keep = ("cut", model, "--classes", "cat", "dog")
    refused(cli(*keep, "--out", tmp_path / "a"), "--data", "train/")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("mine")
    refused(cli(*keep, "--data", folder, "--out", tmp_path / "b"), "is there already", "--out")
    (tmp_path / "file").write_text("mine")
    refused(cli(*keep, "--data", folder, "--out", tmp_path / "file"), "--out")
    refused(cli(*keep, "--data", folder, "--out", tmp_path / "file" / "below"), "file")
    other = draw_splits(tmp_path / "other", ["owl", "bear"], 3)
    refused(cli(*keep, "--data", other, "--out", tmp_path / "c"), "classes to keep", "--data")
