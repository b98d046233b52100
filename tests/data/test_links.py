"""Symbolic links in a folder of images: circles end, a file counts once in its class, conflicts and leaks are told."""

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from moevision.commands.predict import images_at
from moevision.data.collection import FileCollection
from moevision.data.folder import read_folder, walk
from moevision.data.splits import SplitSettings, make_splits
from moevision.train.recipe import count_images
from tests.data.conftest import names, refusal, split_of, splits_of_groups
from tests.shared import TINY, run_cli, succeeded

pytestmark = pytest.mark.deep


def counts(collection: FileCollection) -> dict[str, int]:
    labels = Counter(sample.label for sample in collection.samples["all"])
    return {name: labels[label] for label, name in enumerate(collection.class_names)}


@pytest.fixture
def pets(image_folder) -> Path:
    return image_folder({"cat": 20, "dog": 20})


@pytest.mark.parametrize(
    ("place", "target"),
    [
        ("cat/self", "."),
        ("cat/up", ".."),
        ("cat/root", "/"),
        ("cat/a/deep", "../../cat"),
        ("cat/a/deeper", "../.."),
        ("all", "."),
        ("all", ".."),
        ("cat/again.png", "000.png"),
        ("cat/twice.png", "again.png"),
    ],
)
def test_a_link_that_leads_back_changes_nothing(pets, place, target):
    plain = read_folder(pets)
    (pets / "cat" / "a").mkdir()
    (pets / "cat" / "again.png").symlink_to("000.png")
    (pets / place).unlink(missing_ok=True)
    (pets / place).symlink_to(target)
    linked = read_folder(pets)
    assert linked.samples == plain.samples
    assert linked.class_names == ["cat", "dog"]
    names(linked.notes[-1], "links", "their class", "already")


def test_links_in_a_circle_end(pets):
    for here, there in (("cat", "dog"), ("dog", "cat")):
        (pets / here / "other").symlink_to(f"../{there}")
    collection = read_folder(pets)
    assert counts(collection) == {"cat": 40, "dog": 40}
    for check in (True, False):
        (warning,) = make_splits(collection, SplitSettings(check_duplicates=check)).warnings
        names(warning, "40 images", "several classes", "or links")


def test_a_link_to_nothing_is_a_bad_image(pets):
    (pets / "cat" / "gone.png").symlink_to("missing")
    assert counts(read_folder(pets)) == {
        "cat": 21,
        "dog": 20,
    }  # it can't be read, which the run will say


def test_a_link_to_itself_is_a_bad_image(pets):
    (pets / "cat" / "loop.png").symlink_to("loop.png")
    (pets / "cat" / "gone.png").symlink_to("missing")
    (pets / "cat" / "loop").symlink_to("loop")
    assert counts(read_folder(pets)) == {
        "cat": 22,
        "dog": 20,
    }  # they can't be read, which the run will say


def test_two_names_of_one_folder_are_a_conflict(pets):
    (pets / "puppy").symlink_to("dog")
    collection = read_folder(pets)
    assert counts(collection) == {"cat": 20, "dog": 20, "puppy": 20}
    for check in (True, False):
        splits = make_splits(collection, SplitSettings(check_duplicates=check))
        names(splits.warnings[0], "20 images", "several classes")
        # a file and its other name stay on one side
        sides = splits_of_groups(splits, lambda name: name.replace("puppy/", "dog/"))
        assert all(len(side) == 1 for side in sides)


@pytest.mark.parametrize("check", [True, False])
def test_val_that_leads_to_train_is_refused(image_folder, check):
    root = image_folder({"train/cat": 4, "train/dog": 4})
    (root / "val").symlink_to("train")
    with refusal("every train image", "'cat'", "another split"):
        make_splits(read_folder(root), SplitSettings(check_duplicates=check))


@pytest.mark.parametrize("check", [True, False])
def test_a_linked_image_of_another_split_is_a_leak(image_folder, check):
    root = image_folder({"train/cat": 6, "train/dog": 6, "test/cat": 3, "test/dog": 3})
    (root / "train" / "cat" / "leak.png").symlink_to("../../test/cat/000.png")
    (root / "train" / "dog" / "more").symlink_to("../../test/dog")
    splits = make_splits(read_folder(root), SplitSettings(check_duplicates=check))
    assert sorted(sample.sample_id for sample in splits.unused) == [
        "train/cat/leak.png",
        *(f"train/dog/more/00{number}.png" for number in range(3)),
    ]
    names(splits.warnings[0], "4 train images", "not used", "links to them")


def test_farms_of_links_are_as_the_files_behind_them(pets, tmp_path):
    """Every image a link to a store, every class a link to a folder: as content-addressed caches have them."""
    plain = read_folder(pets)
    farm, classes = tmp_path / "farm", tmp_path / "classes"
    classes.mkdir()
    for name in plain.class_names:
        (farm / name).mkdir(parents=True)
        (classes / name).symlink_to(pets / name)
    ids = [sample.sample_id for sample in plain.samples["all"]]
    for name in ids:
        (farm / name).symlink_to(pets / name)
    for root in (farm, classes):
        linked = read_folder(root)
        assert (linked.samples, linked.notes) == (plain.samples, [])
        settings = SplitSettings()
        assert make_splits(linked, settings).samples == make_splits(plain, settings).samples
        assert count_images(root) == 40
        assert list(images_at([str(root)])) == [root / name for name in ids]


def test_a_real_path_goes_before_a_link(pets, tmp_path):
    """An id must not depend on a link beside it."""
    shutil.move(pets / "cat" / "000.png", pets / "cat" / "z.png")
    (pets / "cat" / "000.png").symlink_to("z.png")
    (pets / "dog" / "z").mkdir()
    shutil.move(pets / "dog" / "000.png", pets / "dog" / "z" / "000.png")
    (pets / "dog" / "a").symlink_to("z")
    ids = split_of(read_folder(pets)).keys()
    assert {"cat/z.png", "dog/z/000.png"} <= ids
    assert len(ids) == 40


def test_hard_links_are_files_of_their_own(pets):
    """A copy of the folder on another disk has two files; both must have the same ids there and here."""
    os.link(pets / "cat" / "000.png", pets / "cat" / "hard.png")
    os.link(pets / "cat" / "001.png", pets / "dog" / "hard.png")
    collection = read_folder(pets)
    assert counts(collection) == {"cat": 21, "dog": 21}
    [warning] = make_splits(collection, SplitSettings()).warnings
    names(warning, "1 images", "several classes")


def test_hidden_folders_stay_hidden(pets):
    for name in (".thumbnails", "@eaDir"):
        shutil.copytree(pets / "dog", pets / "cat" / name)
    assert counts(read_folder(pets)) == {"cat": 20, "dog": 20}
    assert sum(1 for _ in walk(pets)) == 40


def test_predict_ends_and_tells_of_every_name(pets):
    (pets / "cat" / "self").symlink_to("..")
    (pets / "cat" / "again.png").symlink_to("000.png")
    (pets / "cat" / "gone.png").symlink_to("missing")
    assert len(list(images_at([str(pets)]))) == 42


def test_a_path_with_dots_is_read(pets, monkeypatch):
    assert read_folder(pets / "cat" / "..").samples == read_folder(pets).samples
    monkeypatch.chdir(pets)
    assert read_folder(Path()).samples == read_folder(pets).samples


def test_fit_of_a_folder_that_holds_itself(drawn_pets, tmp_path):
    """Twenty cats once were 820, and the test accuracy 1.0000."""
    root = Path(shutil.copytree(drawn_pets, tmp_path / "pets"))
    (root / "cat" / "self").symlink_to(".")
    options = (*TINY, f"--runs_root={tmp_path / 'runs'}", "--trainer.max_epochs=1")
    outcome = succeeded(run_cli("fit", root, *options))
    assert "1 links in" in outcome.out
    assert len((tmp_path / "runs" / "pets" / "splits.csv").read_text().splitlines()) == 1 + 40
