"""A checkpoint of a training is a model: that of the same weights in the run's `model/`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from moevision.data import SyntheticPets
from moevision.models.io import load_model
from moevision.train.checkpoint import load_trained
from tests.shared import refused, succeeded
from tests.train.quiet import logged


@pytest.fixture(scope="module")
def run(tmp_path_factory, cli):
    """One epoch on drawn pets; best.ckpt holds the weights that `model/` was written from."""
    folder = tmp_path_factory.mktemp("trained")
    sizes = (
        "--data.image_size=32",
        "--data.train_size=16",
        "--data.val_size=8",
        "--data.test_size=8",
    )
    model = ("--model.arch.name=test_vit_moe", "--ema.decay=0.5", f"--runs_root={folder}")
    assert cli("fit", "synthetic_pets", *sizes, *model, "--trainer.max_epochs=1").code == 0
    return folder / "synthetic_pets"


def test_a_checkpoint_is_the_model_of_its_weights(run):
    """Classes, colour statistics, and logits; with a moving average, which `model/` holds too."""
    found, expected = load_trained(str(run / "checkpoints" / "best.ckpt")), load_model(str(run))
    assert found.class_names == expected.class_names
    assert (found.image_size, found.mean, found.std) == (32, expected.mean, expected.std)
    image = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(found.net(image), expected.net(image))


def test_predict_reads_it(run, cli, tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    said = [
        cli("predict", str(model), str(tmp_path), "--format=json")
        for model in (run, run / "checkpoints/best.ckpt")
    ]
    (finished,), (so_far,) = (json.loads(each.out) for each in said)
    assert so_far["class"] == finished["class"]
    assert (finished["calibrated"], so_far["calibrated"]) == (
        True,
        False,
    )  # by the validation images, at the end


COLOURS = [[0.5] * 3] * 2
ODD = [
    ("data", None, "last.ckpt"),
    ("data", 5, "last.ckpt"),
    ("data", {"class_names": ["cat"] * 7, "mean_std": COLOURS}, "no names"),
    ("data", {"class_names": [1] * 8, "mean_std": COLOURS}, "no names"),
    ("data", {"class_names": ["cat"] * 8, "mean_std": [[0.5] * 2] * 2}, "last.ckpt"),
    ("num_classes", 10**6, "last.ckpt"),
    ("image_size", 10**6, "last.ckpt"),
    ("optim", "x", "last.ckpt"),
    ("arch", {"name": "test_vit_moe", "embed_dim": 8192}, "last.ckpt"),
    ("arch", {"name": "test_vit_moe", "depth": 10**9}, "last.ckpt"),
    ("arch", [1], "last.ckpt"),
]


@pytest.mark.parametrize(("name", "value", "said"), ODD)
def test_odd_records_are_one_sentence(name, value, said, run, cli, tmp_path):
    """Without memory for a model that the weights aren't."""
    file = tmp_path / "last.ckpt"
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    state["moevision" if name == "data" else "hyper_parameters"][name] = value
    torch.save(state, file)
    outcome = cli("predict", file, tmp_path)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome.err
    assert said in outcome.err


def test_other_images_are_tested_under_the_classes_of_the_model(run, cli, own_folder):
    """The run's eight test images as a folder: its classes are in alphabetical order, and nothing is cut off."""
    pets = SyntheticPets(8, 32, 0, "test")
    assert [*pets.classes] != sorted(pets.classes)
    for index in range(8):
        place = Path("pets", "test", pets.classes[pets.label(index)])
        place.mkdir(parents=True)
        Image.fromarray(pets.image(index)).save(place / "0.png")
    shutil.copytree("pets/test", "split/train")
    shutil.copytree("pets/test", "split/val")
    given = ("--runs_root=again", "--ckpt_path", run / "checkpoints" / "best.ckpt")
    assert cli("test", *given).code == 0
    for folder, said, split in (
        ("pets/test", "test: 8 images, all of these data, which are not the run's.", "test"),
        ("split", "test: 8 images, val of these data, which are not the run's.", "test"),
        ("split/val", "val: 8 images, all of these data, which are not the run's.", "validate"),
    ):
        outcome = succeeded(cli(split, folder, *given))
        assert said in outcome.out
        assert outcome.out.count(" images, ") == 1
    assert logged(Path("again/test-test"), "test/loss") == pytest.approx(
        logged(Path("again/synthetic_pets-test"), "test/loss"), rel=1e-4
    )
    assert logged(Path("again/split-test"), "test/loss") == logged(
        Path("again/test-test"), "test/loss"
    )

    Path("pets/test/cat").rename("pets/test/lion")
    refused(cli("test", "pets/test", *given), "pets/test", "the class 'cat'")
