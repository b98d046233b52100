"""Splits are stratified, seeded, recorded, and free of leaks."""

import csv
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moevision.data.collection import FileCollection, Sample
from moevision.data.folder import read_folder
from moevision.data.splits import (
    Splits,
    SplitSettings,
    byte_identical,
    is_copy,
    make_splits,
    read_splits,
    stratified_cut,
    write_splits,
)
from moevision.errors import UserError
from tests.data.conftest import names, refusal, split_of, splits_of_groups


def cut(root: Path, *fractions: float, **settings: Any) -> Splits:
    return make_splits(read_folder(root), SplitSettings(*fractions, **settings))


def per_class(splits: Splits) -> dict[str, list[int]]:
    """Split -> number of images of each class."""
    counts = {
        split: Counter(sample.label for sample in samples)
        for split, samples in splits.samples.items()
    }
    return {split: [count[label] for label in sorted(count)] for split, count in counts.items()}


def test_unsplit_folder_is_cut_by_class(image_folder):
    collection = read_folder(image_folder({"cat": 40, "dog": 25, "elk": 3}))
    splits = make_splits(collection, SplitSettings(val_fraction=0.1, test_fraction=0.2))
    # test: round(40 x 0.2) = 8, round(25 x 0.2) = 5, at least 1 of 3; val: 4, round(2.5) = 2 (to even), 1
    assert per_class(splits) == {"train": [28, 18, 1], "val": [4, 2, 1], "test": [8, 5, 1]}
    assert len(split_of(splits)) == 68
    names(splits.sentences()[1], "val: 7 images", "at random", "seed 0")
    names(splits.sentences()[-1], "--data.group_by")
    grouped = make_splits(collection, SplitSettings(group_by=r"(\w+/\d\d\d)"))
    assert "them together" not in " ".join(grouped.sentences())
    assert not splits.warnings


def under(split: str, cat: int, dog: int) -> dict[str, int]:
    return {f"{split}/cat": cat, f"{split}/dog": dog}


GIVEN = under("Train", 5, 4) | under("validation", 3, 2) | under("test", 1, 1)


@pytest.mark.parametrize(
    ("folders", "fractions", "expected"),
    [
        (under("train", 20, 10), {}, [[16, 8], [2, 1], [2, 1]]),
        (GIVEN, {}, [[5, 4], [3, 2], [1, 1]]),
        (
            under("train", 20, 10) | under("test", 4, 3),
            {"test_fraction": 0},
            [[18, 9], [2, 1], [4, 3]],
        ),
        (
            under("train", 20, 10) | under("test", 4, 3),
            {"test_fraction": 0.5},
            [[18, 9], [2, 1], [4, 3]],
        ),
        (
            under("train", 20, 10) | under("valid", 4, 3),
            {"val_fraction": 0.2},
            [[16, 8], [4, 2], [4, 3]],
        ),
    ],
)
def test_given_splits_stay_and_val_without_test_is_the_test_set(
    image_folder, folders, fractions, expected
):
    splits = cut(image_folder(folders), **fractions)
    assert per_class(splits) == dict(zip(("train", "val", "test"), expected, strict=True))
    val, test = splits.sentences()[1:3]
    if "test/cat" in folders:
        names(test, "test: ", "dataset gives them")
    if "valid/cat" in folders:
        names(val, "cut from the dataset's train set")
        names(test, "dataset's val set", "never selected on")


def test_the_seed_decides_the_cut_and_a_new_file_moves_few_others(image_folder):
    root = image_folder({"cat": 60, "dog": 60})
    first = split_of(cut(root, seed=1))
    assert split_of(cut(root, seed=1)) == first != split_of(cut(root, seed=2))
    (root / "cat/extra.png").write_bytes((root / "cat/000.png").read_bytes() + b" ")
    second = split_of(cut(root, seed=1))
    assert sum(second[name] != split for name, split in first.items()) <= 2


def set_of_copies(name: str) -> str:
    """The image of which a file is a copy."""
    return name.replace("copy_", "").partition("_")[0].removesuffix(".png")


def test_identical_files_stay_on_one_side(image_folder):
    root = image_folder({"cat": 30, "dog": 30})
    for number in range(4):
        for copy in range(2):
            shutil.copy(root / f"cat/{number:03d}.png", root / f"cat/copy_{number:03d}_{copy}.png")
    seen = set()
    for seed in range(8):
        splits = cut(root, 0.2, 0.2, seed)
        assert all(len(side) == 1 for side in splits_of_groups(splits, set_of_copies))
        seen |= {split for name, split in split_of(splits).items() if "copy" in name}
    assert seen == {"train", "val", "test"}  # they are not simply kept out of the small splits
    careless = cut(root, 0.2, 0.2, 0, check_duplicates=False)
    assert any(len(side) > 1 for side in splits_of_groups(careless, set_of_copies))


def test_copies_are_dropped_from_train_where_the_splits_are_given(image_folder):
    root = image_folder({"train/cat": 10, "train/dog": 10, "test/cat": 4, "test/dog": 4})
    shutil.copy(root / "test/cat/000.png", root / "train/cat/leak.png")
    shutil.copy(root / "test/cat/001.png", root / "train/cat/000.png")
    splits = cut(root)
    assert not {"train/cat/leak.png", "train/cat/000.png"} & set(split_of(splits))
    assert len(splits.samples["test"]) == 8
    assert [s.sample_id for s in splits.unused] == ["train/cat/000.png", "train/cat/leak.png"]
    (warning,) = splits.warnings
    names(warning, "2 train images", "not used", "in test", "train/cat/000.png")


def test_contradictory_copies_are_told(image_folder):
    root = image_folder({"cat": 10, "dog": 10})
    shutil.copy(root / "cat/000.png", root / "dog/cat_after_all.png")
    (warning,) = cut(root).warnings
    names(warning, "1 images", "several classes", "byte-identical files")


def test_only_files_of_equal_size_are_read_and_empty_ones_are_no_copies(tmp_path, monkeypatch):
    contents = {"a": b"xx", "b": b"xy", "c": b"xx", "d": b"xxx", "e": b"", "f": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files, real, read = FileCollection(["cat"], {}, root=tmp_path), FileCollection.stored, []
    monkeypatch.setattr(
        FileCollection, "stored", lambda self, sample: read.append(sample) or real(self, sample)
    )
    a, b, c, *others = (Sample(name, 0) for name in contents)
    assert byte_identical(files, [a, b, c, *others]) == [[a, c]]
    assert read == [a, b, c]


def test_group_by_parent(image_folder):
    root = image_folder({f"{kind}/patient{n}": 3 for kind in ("cat", "dog") for n in range(10)})
    splits = cut(root, 0.2, 0.2, group_by="parent")
    sides = splits_of_groups(splits, lambda name: name.rpartition("/")[0])
    assert all(len(side) == 1 for side in sides)
    assert per_class(splits)["test"] == [6, 6]  # 2 of 10 patients with 3 images each
    names(splits.together, "one folder", "--data.group_by parent", "20 groups")


def test_group_by_regex_also_across_classes_and_given_splits(image_folder):
    root = image_folder({"train/cat": 12, "train/dog": 12, "test/cat": 2, "test/dog": 2})
    # The last digit is the person: 000, 010 -> 0, ...; test holds persons 0 and 1
    splits = cut(root, 0.2, group_by=r"(\d)\.png$")
    sides = splits_of_groups(splits, lambda name: name[-5])
    assert Counter(split for (split,) in sides)["test"] == 2
    assert len(sides) == 10
    names(splits.together, "path agrees in", r"(\d)\.png$", "10 groups")


@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 2)), min_size=1, max_size=60),
    st.integers(0, 3),
)
def test_cut_is_a_partition_that_respects_groups(pictures, seed):
    samples = [Sample(f"{number}", label) for number, (_, label) in enumerate(pictures)]
    groups = {f"{number}": f"//{group}" for number, (group, _) in enumerate(pictures)}
    try:
        parts = stratified_cut(samples, groups, {"test": 0.2, "val": 0.2}, seed, "abc")
    except UserError:
        return  # some class has too few groups
    splits = Splits(parts, {})
    assert split_of(splits).keys() == groups.keys()
    assert sum(map(len, parts.values())) == len(samples)
    assert all(len(side) == 1 for side in splits_of_groups(splits, groups.__getitem__))
    for part in parts.values():
        assert {s.label for s in part} == {s.label for s in samples}


@given(st.lists(st.integers(3, 50), min_size=2, max_size=4), st.integers(0, 3))
def test_cut_of_single_images_is_exact(sizes, seed):
    samples = [
        Sample(f"{label}/{n}", label) for label, size in enumerate(sizes) for n in range(size)
    ]
    parts = stratified_cut(samples, {}, {"test": 0.25, "val": 0.1}, seed, "abcd")
    for label, size in enumerate(sizes):
        for part, share in (("test", 0.25), ("val", 0.1)):
            assert sum(s.label == label for s in parts[part]) == max(1, round(share * size))


@pytest.fixture
def saved(image_folder, tmp_path):
    """A folder, the file in which its split is written, and the split."""

    def save(folders: dict[str, int], **settings: Any) -> tuple[Path, Path, Splits]:
        root, table = image_folder(folders), tmp_path / "splits.csv"
        if "test/cat" in folders:
            shutil.copy(root / "test/cat/000.png", root / "train/cat/leak.png")
        splits = cut(root, **settings)
        write_splits(table, splits, ["cat", "dog"])
        return root, table, splits

    return save


def test_splits_csv_repeats_the_split(saved):
    root, table, first = saved(under("train", 20, 20) | under("test", 3, 3), seed=5)
    with table.open() as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 47
    assert {"split": "unused", "class": "cat", "path": "train/cat/leak.png"} in rows
    again, class_names = read_splits(table, read_folder(root))
    assert again.samples == first.samples
    assert class_names == ["cat", "dog"]
    assert not again.warnings  # the dropped copy is known
    names(again.sentences()[2], "test: 6 images", "listed in splits.csv")


@pytest.mark.parametrize(
    ("names", "there", "copied", "expected"),
    [
        (20, True, 20, (True, True)),
        (20, False, 20, (True, True)),
        (19, True, 19, (False, True)),  # a copy of a part: images of the training are among them
        (19, False, 19, (False, True)),
        (20, True, 10, (False, True)),
        (20, True, 9, (False, False)),  # other images that are numbered alike
        (0, True, 0, (False, False)),
    ],
)
def test_images_of_a_run_are_known_by_name_and_size(
    image_folder, saved, names, there, copied, expected
):
    """Of 20 images; whether a folder is a whole copy, and whether it is one of a part."""
    root, table, _ = saved({"cat": 10, "dog": 10})
    other = image_folder({"cat": 20, "dog": 20}, size=(9, 9), name="other")
    paths = sorted(path.relative_to(root) for path in root.rglob("*.png"))
    for number, path in enumerate(paths):
        if number < copied:
            shutil.copy(root / path, other / path)
        elif number >= names:
            (other / path).unlink()
    known = read_folder(root) if there else None
    found = [is_copy(table, read_folder(other), lambda: known, part=part) for part in (False, True)]
    assert tuple(found) == expected


def test_files_that_came_or_went_are_told_and_left_out(image_folder, saved):
    root, table, first = saved({"cat": 20, "dog": 20})
    gone = first.samples["train"][0].sample_id
    (root / gone).unlink()
    image_folder({"ant": 3}, size=(9, 9))  # a new class that sorts before the others
    shutil.copy(root / "ant/000.png", root / "dog/new.png")
    again, class_names = read_splits(table, read_folder(root))
    assert class_names == ["cat", "dog"]
    assert again.samples["train"] == first.samples["train"][1:]
    assert again.samples["test"] == first.samples["test"]
    vanished, appeared = again.warnings
    names(vanished, "1 images listed", str(table), "vanished", gone)
    names(appeared, "4 images", "left out", "ant/000.png")


def test_splits_csv_of_another_dataset_is_refused(image_folder, saved):
    root, table, _ = saved({"cat": 5, "dog": 5})
    with refusal("images of the", "no longer there", "another run folder"):
        read_splits(table, read_folder(image_folder({"elk": 5, "fox": 5}, name="others")))
    row, long = b"split,class,path\ntrain,cat,", b"x" * 140_000
    for data in (b"a,b\n1,2\n", b"\xff\xfe", row + b"\0\xe9", row + b'"' + long):
        table.write_bytes(data)
        with refusal("splits.csv", "split,class,path", "delete it"):
            read_splits(table, read_folder(root))
