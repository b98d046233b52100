"""Which models and images the explorer offers: bundled ones with their cards, and someone's own run."""

import csv
import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import moevision
from moevision.analysis import open_pictures
from moevision.analysis.collect import network_input
from moevision.analysis.images import data_settings, read_images
from moevision.data import SyntheticPets
from moevision.demo import route_image
from moevision.demo.atlas import load_atlas
from moevision.demo.galleries import Galleries
from moevision.demo.models import (
    Card,
    bundled_folder,
    bundled_folders,
    card_of_run,
    open_entries,
    read_card,
)
from moevision.demo.service import Explorer
from moevision.errors import DataWarning, UserError
from moevision.models.history import RoutingHistory
from moevision.models.io import load_model
from moevision.models.ood import FILE as STRANGERS
from tests.demo import hostile
from tests.shared import says


def megabytes(files):
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def test_what_the_package_carries_fits():
    """Models in 44 MB, an installed package below 50: of the largest model a weight has eight bits."""
    folders = bundled_folders()
    assert folders
    assert (
        megabytes(file for folder in folders for file in folder.rglob("*")) <= 44
    )  # pages of emoji have 1
    package = Path(moevision.__file__).parent
    assert (
        0 < megabytes(file for file in package.rglob("*") if "__pycache__" not in file.parts) < 50
    )
    for folder in folders:
        card = read_card(folder / "card.json")
        assert card.id == folder.name
        assert 0 < card.recognized < 1
        assert (folder / "trained" / STRANGERS).is_file()
        assert card.licence
        assert card.recipe
        assert {"moe", "dense"} <= set(card.accuracy)


@pytest.mark.deep
def test_a_wheel_of_the_package_fits(tmp_path):
    """40 MB, a wheel being a zip."""
    package = Path(moevision.__file__).parent
    with zipfile.ZipFile(tmp_path / "wheel.zip", "w", zipfile.ZIP_DEFLATED) as wheel:
        for file in package.rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                wheel.write(file)
    assert 1e6 < (tmp_path / "wheel.zip").stat().st_size <= 40e6


@pytest.mark.needs("photos")
def test_the_photo_model_has_eight_bits_a_weight():
    """Norms, biases, positions and the patch cut keep two bytes, 1.4 % of its weights, and so has a factor for 64."""
    folder = bundled_folder("photos") / "trained"
    weights = sum(value.numel() for value in load_model(str(folder)).net.parameters())
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json",
        "model.int8",
        STRANGERS,
    ]
    assert weights < (folder / "model.int8").stat().st_size < 1.06 * weights


@pytest.mark.needs("photos")
def test_the_photo_models_former_name_answers_for_one_version():
    with pytest.warns(FutureWarning, match="'photos' now, with other classes"):
        assert bundled_folder("cats_vs_dogs") == bundled_folder("photos")


def test_a_request_may_have_a_former_name(home, tiny_run):
    explorer = Explorer(open_entries(None, home=home))
    picture = {"kind": "upload", "data": hostile.uri(hostile.picture_bytes("PNG"))}
    view = explorer.answer("route", {"model": "cats_vs_dogs", "picture": picture})
    assert view["model"]["id"] == "photos"
    own = Explorer(open_entries(str(tiny_run)))  # which has no such model
    answer = own.answer("route", {"model": "cats_vs_dogs", "picture": picture})
    assert says(answer["error"], "one of own")


@pytest.mark.parametrize(
    "name", [pytest.param("photos", marks=pytest.mark.needs("photos")), "cifar10"]
)
def test_several_experts_are_seen_in_every_bundled_photo(name):
    """Three at least, in each layer of the model as it is carried, take a twentieth of the photo's patches or more.

    But for the cat whose face fills the photo: an expert that takes 46 % of cats' patches takes nearly all of its.
    """
    (folder,) = (folder for folder in bundled_folders() if folder.name == name)
    history = RoutingHistory.load(folder / "history.safetensors")
    for layer, weights in history.weights.items():
        for image, first in zip(history.image_names, history.first_choice(layer)[-1], strict=True):
            shares = np.bincount(first.ravel(), minlength=weights.shape[-1]) / first.size
            if (name, Path(image).name) == ("photos", "chelsea.jpg"):
                assert shares.argmax() == 5
                assert shares.max() > 0.9
            else:
                assert (shares >= 0.05).sum() >= 3


@pytest.mark.deep
def test_every_bundled_model_has_recorded_moments_of_the_first_examples():
    for entry in open_entries(None):
        if entry.card.id == "cats_vs_dogs_two":  # trained by its study, which records no moments
            assert entry.history is None
            continue
        history = RoutingHistory.load(entry.history)
        assert 8 <= len(history) <= 24
        assert history.pretrained == ("--pretrained" in entry.card.recipe)
        first = {entry.examples.id_of_name(name) for name in history.image_names}
        assert len(first) >= 8
        # The image that the page opens with is the first; that of the drawn pets was chosen after their training.
        opening = entry.examples.opening
        others = [id for id in entry.examples.all_ids if id in first or id != opening]
        assert first == set(others[: len(first)])
        assert opening in first or opening is None or entry.card.id == "pets"


def test_bundled_models_answer_in_the_words_of_today():
    for file in [file for folder in bundled_folders() for file in folder.glob("atlas*.json")]:
        for layer in load_atlas(file)["layers"]:
            experts, training, function = layer["answers"]
            assert says(experts["sentence"], "different experts: ")
            assert says(training["sentence"], "Training the router")
            assert re.match("The (experts do|layer contributes)", function["sentence"])
            without = (
                "without it|without the layer .* points of accuracy|leaving the layer out costs"
            )
            assert re.search(without, function["sentence"])
            assert says(layer["load_words"], "in effect")


def test_accuracy_in_words():
    card = Card("x", "X", accuracy={"moe": 0.9876, "dense": 0.5})
    assert says(card.accuracy_text("trained"), "98.8 %", "dense twin: 50.0 %")
    assert "random" in card.accuracy_text("untrained")
    card = Card("x", "X", accuracy={"moe": 0.6}, test_images=1020)
    assert says(card.accuracy_text("trained"), "60.0 %", "1,020 test images")
    assert says(Card("x", "X").accuracy_text("trained"), "not known")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "damaged"),
        ("\x00", "damaged"),
        ("[]", "no model card"),
        ('{"id": "x"}', "no model card"),
        ('{"id": "x", "title": "X", "colour": 1}', "no model card"),
    ],
)
def test_a_damaged_card(tmp_path, text, words):
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(UserError, match=words):
        read_card(tmp_path / "card.json")


def test_no_bundled_model(tmp_path):
    with pytest.raises(UserError, match="carries no model"):
        open_entries(None, home=tmp_path)


def test_own_model_with_own_data(draw, tmp_path, tiny_run):
    entry = open_entries(str(tiny_run), str(draw(tmp_path / "own", per_class=6)))[0]
    assert entry.card.title == "pets"
    assert 0 <= entry.card.accuracy["moe"] <= 1
    assert entry.dense is not None
    assert list(entry.variants) == ["trained", "untrained"]
    assert entry.examples.has_pictures
    explorer = Explorer([entry])
    view = explorer.answer(
        "route", {"picture": {"kind": "example", "id": entry.examples.all_ids[0]}}
    )
    assert view["picture"]["label"] in ("cat", "dog")
    assert view["picture"]["id"].startswith("data/")
    same = route_image(
        load_model(str(tiny_run)), entry.examples.find(entry.examples.all_ids[0]).pixels
    ).to_json()
    assert view["layers"] == same["layers"]


def test_data_goes_to_the_model_of_photos(home, drawn_pets):
    photos, pets = open_entries(None, str(drawn_pets), home=home)
    assert (photos.card.id, pets.card.id) == (
        "photos",
        "pets",
    )  # the page opens on what the user brought
    assert pets.examples.all_ids[0].startswith("pets/")
    assert photos.examples.all_ids[0].startswith("data/")
    assert photos.examples.pictures.class_names == tuple(SyntheticPets.classes)
    boot = Explorer([photos, pets]).answer("boot", {})
    assert boot["default"] == {"model": "photos", "picture": photos.examples.all_ids[0]}


@pytest.mark.deep
def test_nothing_was_trained_on_a_folder_so_all_its_images_are_shown(
    home, drawn_pets, tiny_run, draw, tmp_path
):
    files = {file.relative_to(drawn_pets).as_posix() for file in drawn_pets.rglob("*.png")}
    assert len(files) == 40
    photos = open_entries(None, str(drawn_pets), home=home)[0]
    assert photos.examples.names == files
    assert photos.shown == f"All 40 images of {drawn_pets.name}"
    assert sorted(photos.examples.all_ids) == sorted(f"data/{name}" for name in files)
    galleries = Galleries([photos], limit=8)  # of images that nobody named
    galleries.start()
    galleries.thread.join(120)
    assert len(galleries.gallery(photos.variants["trained"]).pictures) == 40
    galleries.close()
    few = draw(
        tmp_path / "few", per_class=3
    )  # with names of the run's images, as numbers are, but most are missing
    assert len(open_entries(str(tiny_run), str(few))[0].examples.names) == 6
    # A dataset known by name has a test set of its own, and the bundled model learned from the rest.
    drawn = open_entries(None, "synthetic_pets", home=home)[0]
    assert drawn.card.id == "pets"
    assert len(drawn.examples.pictures) == 2000
    assert drawn.shown == ""


@pytest.mark.filterwarnings(
    "ignore::moevision.errors.DataWarning"
)  # about the broken image in the folder
def test_a_run_shows_what_it_held_out_when_its_own_folder_is_named(tiny_run, tmp_path, monkeypatch):
    """The tiny run cut 30 % of its folder off as a test set; its own splits.csv says which."""
    with (tiny_run / "splits.csv").open(newline="", encoding="utf-8") as rows:
        held_out = {row["path"] for row in csv.DictReader(rows) if row["split"] == "test"}
    assert open_entries(str(tiny_run))[0].examples.names == held_out
    folder = Path(data_settings(tiny_run)["path"])
    assert 0 < len(held_out) < len(list(folder.rglob("*.png")))
    monkeypatch.chdir(folder.parent)
    copy = shutil.copytree(folder, tmp_path / "moved")
    for name in (str(folder), f"{folder}/", folder.name, str(copy)):
        assert open_entries(str(tiny_run), name)[0].examples.names == held_out


def test_a_run_whose_pictures_are_gone(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    config = (run / "config.yaml").read_text()
    folder = next(
        line.split(": ", 1)[1] for line in config.splitlines() if line.strip().startswith("path: ")
    )
    (run / "config.yaml").write_text(config.replace(folder, str(tmp_path / "gone")))
    with pytest.warns(DataWarning, match="no images"):
        entry = open_entries(str(run))[0]
    assert not entry.examples.has_pictures
    assert entry.examples.on_first_screen()  # gradio's photos
    with pytest.raises(UserError, match="gone"):
        open_entries(str(run), str(tmp_path / "gone"))


@pytest.mark.filterwarnings("ignore::moevision.errors.DataWarning")  # no images of the model's own
def test_named_datasets_are_looked_for_in_root_and_never_fetched(tiny_run, tmp_path, monkeypatch):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        config.replace(f"path: {data_settings(tiny_run)['path']}", "path: cifar10")
    )
    own = str(data_settings(run)["root"])
    asked = []

    def nothing(path, *, root, download, **options):
        asked.append((path, root, download))
        raise UserError("not there")

    monkeypatch.setattr("moevision.analysis.images.open_collection", nothing)
    open_entries(str(run))
    open_entries(str(run), None, "elsewhere")
    for name in ("cifar10", "imagenette"):
        with pytest.raises(UserError, match="not there"):
            open_entries(str(run), name, "elsewhere")
    assert asked == [
        ("cifar10", own, False),
        ("cifar10", "elsewhere", False),
        ("cifar10", "elsewhere", False),
        ("imagenette", "elsewhere", False),
    ]


def test_the_card_of_a_run_and_of_a_hub_model(tiny_run):
    test = json.loads((tiny_run / "summary.json").read_text())["test"]
    assert card_of_run(str(tiny_run)).accuracy["moe"] == test["correct"] / test["total"]
    assert card_of_run("hf-hub:user/name").title == "name"


@pytest.mark.deep
@pytest.mark.parametrize(("variant", "key"), [("trained", "moe"), ("dense", "dense")])
def test_the_card_of_drawn_pets_says_what_is_measured(variant, key):
    """All 2 000 test images again; another processor may round one or two of them to another answer."""
    folder = next(folder for folder in bundled_folders() if folder.name == "pets")
    card = read_card(folder / "card.json")
    model = load_model(str(folder / variant))
    pictures = open_pictures("synthetic_pets", model.image_size)
    assert len(pictures) == card.test_images == 2_000
    right = 0
    for start in range(0, 2_000, 100):
        rows = range(start, start + 100)
        with torch.inference_mode():
            answers = model.net(network_input(model, read_images(pictures, rows))).argmax(-1)
        right += sum(
            int(answer) == pictures.label(row) for answer, row in zip(answers, rows, strict=True)
        )
    assert right / 2_000 == pytest.approx(card.accuracy[key], abs=0.00101)


def test_a_damaged_summary(tiny_run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("data: {}\n")
    (tmp_path / "run" / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="mend it"):
        card_of_run(str(tmp_path / "run"))
    summary = json.loads((tiny_run / "summary.json").read_text())
    assert (
        card_of_run(str(tiny_run)).accuracy["moe"]
        == summary["test"]["correct"] / summary["test"]["total"]
    )
    assert card_of_run("hf-hub:user/name").title == "name"


# ---- what a card says of single examples


@pytest.fixture(scope="module")
def bundled():
    """An explorer of the package's own models."""
    explorer = Explorer(open_entries(None))
    yield explorer
    explorer.close()


def answer_of(explorer, model, picture, away):
    """The likeliest class of an example without those experts."""
    asked = {"kind": "example", "id": picture}
    view = explorer.answer("route", {"model": model, "picture": asked, "away": away})
    return view["prediction"]["moe"][0]


@pytest.mark.deep
def test_a_cards_smallest_sets_are_what_the_explorer_answers(bundled):
    """The last falling example of each model, and the first that stays; no single expert does what takes two."""
    seen = set()
    for model, entry in bundled.entries.items():
        every = [[r.layer, e] for r in entry.facts.routers for e in range(r.num_experts)]
        for id, fall in reversed(entry.card.falls.items()):
            kind = (model, len(fall["away"] or ()))
            if kind in seen:
                continue
            seen.add(kind)
            if fall["away"] is None:
                assert answer_of(bundled, model, id, every) == fall["all"]
                continue
            assert answer_of(bundled, model, id, []) == fall["before"]
            assert answer_of(bundled, model, id, fall["away"]) == fall["after"]
            assert fall["before"]["class"] != fall["after"]["class"]
            if len(fall["away"]) > 1:
                alone = {answer_of(bundled, model, id, [one])["class"] for one in every}
                assert alone == {fall["before"]["class"]}
    assert {model for model, _ in seen} == set(bundled.entries)
    assert {size for _, size in seen} >= {0, 1}
