"""Images that aren't square: what `--data.fit` does, from training to every use of the model."""

import base64
import csv
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from moevision.analysis.images import open_pictures
from moevision.config import Framing
from moevision.data import SyntheticPets
from moevision.data.images import safe_open
from moevision.data.transforms import square_pixels
from moevision.demo.facts import sharp_square
from moevision.demo.models import open_entries
from moevision.demo.service import Explorer, _open
from moevision.demo.view import route_image
from moevision.models.io import SavedModel, load_model, save_model
from moevision.train.checkpoint import load_trained
from tests.shared import succeeded


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Drawn pets on the left of images of 64 x 32 px, so that their central squares show half of them."""
    root = tmp_path_factory.mktemp("wide")
    pets = SyntheticPets(160, 32)
    for index in range(len(pets)):
        if (name := pets.classes[pets.label(index)]) in ("cat", "dog"):
            (root / name).mkdir(exist_ok=True)
            image = np.full((32, 64, 3), 255, np.uint8)
            image[:, :32] = pets.image(index)
            Image.fromarray(image).save(root / name / f"{index:04d}.png")
    return root


@pytest.mark.parametrize("fit", ["pad", pytest.param("squash", marks=pytest.mark.deep)])
def test_every_use_of_a_model_prepares_images_as_its_training_did(
    cli, wide, fit, tiny, tmp_path, own_folder
):
    succeeded(cli("fit", wide, *tiny, "--data.fit", fit, "--name=wide"))
    model = load_model("runs/wide")
    assert model.framing == Framing(fit, model.mean)
    assert load_trained("runs/wide/checkpoints/best.ckpt").framing == model.framing
    assert json.loads((tmp_path / "runs/wide/model/config.json").read_text())["pretrained_cfg"][
        "crop_mode"
    ] in (
        "border",
        "squash",
    )

    with open("runs/wide/predictions_test.csv", newline="") as file:
        tested = {row["image"]: row for row in csv.DictReader(file)}
    predicted = cli("predict", "runs/wide", *(wide / name for name in tested))
    view_of = open_pictures(wide, 32, framing=model.framing, run_dir="runs/wide")
    for row, (name, expected) in zip(
        csv.DictReader(predicted.out.splitlines()), tested.items(), strict=True
    ):
        assert row["class"] == expected["prediction"]
        assert float(row["probability"]) == pytest.approx(float(expected["probability"]), abs=2e-4)
        pixels = square_pixels(safe_open(wide / name), 32, model.framing)
        seen = view_of.image(
            [view_of.picture_name(index) for index in range(len(view_of))].index(name)
        )
        assert np.array_equal(seen, pixels)
        assert np.array_equal(route_image(model, wide / name).picture.pixels, pixels)
        assert not np.array_equal(pixels, square_pixels(safe_open(wide / name), 32))

    entry = open_entries("runs/wide")[0]
    assert (
        Explorer([entry]).boot({})["limits"]["fit"] == fit
    )  # the page squares a visitor's image by it
    upload = "data:image/png;base64," + base64.b64encode((wide / name).read_bytes()).decode()
    assert np.array_equal(_open(upload, entry.examples).pixels, pixels)

    # Saved again, as upcycle does, it stays.
    save_model(model, tmp_path / "again")
    assert load_model(str(tmp_path / "again")).fit == fit


def test_the_example_of_a_server_prepares_images_so_too(tmp_path, monkeypatch, own_folder):
    """deploy/litserve_app.py, beside a package litserve that only has its class."""
    monkeypatch.setitem(sys.modules, "litserve", SimpleNamespace(LitAPI=object))
    net = timm.create_model("test_vit", num_classes=2, img_size=32).eval()
    save_model(
        SavedModel(net, ["a", "b"], 32, (0.5,) * 3, (0.5,) * 3, fit="pad"),
        tmp_path / "runs" / "pets" / "model",
    )
    server = runpy.run_path(str(Path(__file__).parents[2] / "deploy" / "litserve_app.py"))[
        "Classifier"
    ]()
    server.setup("cpu")
    Image.new("RGB", (40, 20), "red").save("red.png")
    pixels = server.decode_request({"image": SimpleNamespace(file="red.png")})
    assert np.array_equal(
        pixels.permute(1, 2, 0), square_pixels(safe_open("red.png"), 32, Framing("pad", (0.5,) * 3))
    )


def test_a_padded_photo_under_the_patches_keeps_its_long_side():
    """The explorer shows up to 672 px of it."""
    image = Image.new("RGB", (600, 300))
    assert sharp_square(image, 32, Framing("pad")).shape == (600, 600, 3)
    assert sharp_square(image, 32).shape == (300, 300, 3)


def test_a_model_of_timms_says_how_it_was_trained(tmp_path):
    net = timm.create_model("test_vit", num_classes=2, img_size=32).eval()
    save_model(SavedModel(net, ["a", "b"], 32, (0.5,) * 3, (0.5,) * 3), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for mode, fit in (("squash", "squash"), ("border", "pad"), ("center", "crop")):
        config["pretrained_cfg"]["crop_mode"] = mode
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert load_model(str(tmp_path)).fit == fit
        torch.manual_seed(0)
