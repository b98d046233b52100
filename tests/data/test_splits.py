"""Splits are stratified, seeded, recorded, and free of leaks."""

import csv
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moevision.data.collection import Collection, Sample
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
from tests.data.conftest import names, refusal


def per_class(splits: Splits) -> dict[str, dict[int, int]]:
    return {
        split: dict(Counter(s.label for s in samples)) for split, samples in splits.samples.items()
    }


def split_of(splits: Splits) -> dict[str, str]:
    return {s.sample_id: split for split, samples in splits.samples.items() for s in samples}


def test_unsplit_folder_is_cut_by_class(image_folder):
    collection = read_folder(image_folder({"cat": 40, "dog": 25, "elk": 3}))
    splits = make_splits(collection, SplitSettings(val_fraction=0.1, test_fraction=0.2))
    # test: round(40 x 0.2) = 8, round(25 x 0.2) = 5, at least 1 of 3; val: 4, round(2.5) = 2 (to even), 1
    assert per_class(splits) == {
        "train": {0: 28, 1: 18, 2: 1},
        "val": {0: 4, 1: 2, 2: 1},
        "test": {0: 8, 1: 5, 2: 1},
    }
    assert sum(len(samples) for samples in splits.samples.values()) == len(split_of(splits)) == 68
    names(splits.sentences()[1], "val: 7 images", "at random", "seed 0")
    names(splits.sentences()[-1], "--data.group_by")
    grouped = make_splits(collection, SplitSettings(group_by=r"(\w+/\d\d\d)"))
    assert "them together" not in " ".join(grouped.sentences())
    assert not splits.warnings


def test_the_seed_decides_the_cut_and_a_new_file_moves_few_others(image_folder):
    root = image_folder({"cat": 60, "dog": 60})
    first = split_of(make_splits(read_folder(root), SplitSettings(seed=1)))
    assert split_of(make_splits(read_folder(root), SplitSettings(seed=1))) == first
    assert split_of(make_splits(read_folder(root), SplitSettings(seed=2))) != first
    shutil.copy(root / "cat/000.png", root / "cat/extra.png")
    (root / "cat/extra.png").write_bytes((root / "cat/000.png").read_bytes() + b" ")
    second = split_of(make_splits(read_folder(root), SplitSettings(seed=1)))
    assert sum(second[name] != split for name, split in first.items()) <= 2


def test_a_test_fraction_of_zero_is_for_data_with_a_test_set(image_folder):
    given = image_folder({"train/a": 8, "train/b": 8, "test/a": 2, "test/b": 2})
    splits = make_splits(read_folder(given), SplitSettings(test_fraction=0.0))
    assert {split: len(samples) for split, samples in splits.samples.items()} == {
        "train": 14,
        "val": 2,
        "test": 4,
    }


def test_given_val_without_test_is_the_test_set(image_folder):
    root = image_folder({"train/cat": 20, "train/dog": 10, "valid/cat": 4, "valid/dog": 3})
    splits = make_splits(read_folder(root), SplitSettings(val_fraction=0.2))
    assert per_class(splits) == {"train": {0: 16, 1: 8}, "val": {0: 4, 1: 2}, "test": {0: 4, 1: 3}}
    assert {name.split("/")[0] for name, split in split_of(splits).items() if split == "test"} == {
        "valid"
    }
    names(splits.sentences()[2], "dataset's val set", "never selected on")
    names(splits.sentences()[1], "dataset's train set")


def test_given_test_stays_and_val_is_cut_from_train(image_folder):
    root = image_folder({"train/cat": 10, "train/dog": 10, "test/cat": 4, "test/dog": 3})
    splits = make_splits(read_folder(root), SplitSettings(val_fraction=0.2, test_fraction=0.5))
    assert per_class(splits) == {"train": {0: 8, 1: 8}, "val": {0: 2, 1: 2}, "test": {0: 4, 1: 3}}
    names(splits.sentences()[2], "test: 7 images", "dataset gives them")


def test_three_given_splits_stay(image_folder):
    folders = {
        "Train/a": 5,
        "Train/b": 4,
        "validation/a": 3,
        "validation/b": 2,
        "test/a": 1,
        "test/b": 1,
    }
    splits = make_splits(read_folder(image_folder(folders)), SplitSettings())
    assert per_class(splits) == {"train": {0: 5, 1: 4}, "val": {0: 3, 1: 2}, "test": {0: 1, 1: 1}}


def test_train_alone_counts_as_unsplit(image_folder):
    splits = make_splits(
        read_folder(image_folder({"train/cat": 10, "train/dog": 10})), SplitSettings()
    )
    assert {split: len(samples) for split, samples in splits.samples.items()} == {
        "train": 16,
        "val": 2,
        "test": 2,
    }


def copy_files(root: Path, sets: int, copies: int) -> None:
    """Give each of the first images of a class some byte-identical copies."""
    for number in range(sets):
        for copy in range(copies):
            shutil.copy(root / f"cat/{number:03d}.png", root / f"cat/copy_{number}_{copy}.png")


def sides_of_copies(splits: Splits, sets: int) -> list[set[str]]:
    sides = split_of(splits)
    return [
        {
            sides[name]
            for name in sides
            if name == f"cat/{n:03d}.png" or name.startswith(f"cat/copy_{n}_")
        }
        for n in range(sets)
    ]


def test_identical_files_stay_on_one_side(image_folder):
    root = image_folder({"cat": 30, "dog": 30})
    copy_files(root, sets=4, copies=2)
    collection = read_folder(root)
    seen = set()
    for seed in range(8):
        sides = sides_of_copies(make_splits(collection, SplitSettings(0.2, 0.2, seed)), 4)
        assert all(len(side) == 1 for side in sides)
        seen |= set.union(*sides)
    assert seen == {"train", "val", "test"}  # they are not simply kept out of the small splits
    careless = SplitSettings(0.2, 0.2, 0, check_duplicates=False)
    assert any(len(side) > 1 for side in sides_of_copies(make_splits(collection, careless), 4))


def test_copies_are_dropped_from_train_where_the_splits_are_given(image_folder):
    root = image_folder({"train/cat": 10, "train/dog": 10, "test/cat": 4, "test/dog": 4})
    shutil.copy(root / "test/cat/000.png", root / "train/cat/leak.png")
    shutil.copy(root / "test/cat/001.png", root / "train/cat/000.png")
    splits = make_splits(read_folder(root), SplitSettings())
    assert not {"train/cat/leak.png", "train/cat/000.png"} & set(split_of(splits))
    assert len(splits.samples["test"]) == 8
    assert [s.sample_id for s in splits.unused] == ["train/cat/000.png", "train/cat/leak.png"]
    (warning,) = splits.warnings
    names(warning, "2 train images", "not used", "in test", "train/cat/000.png")


def test_contradictory_copies_are_told(image_folder):
    root = image_folder({"cat": 10, "dog": 10})
    shutil.copy(root / "cat/000.png", root / "dog/cat_after_all.png")
    splits = make_splits(read_folder(root), SplitSettings())
    (warning,) = splits.warnings
    names(warning, "1 images", "several classes", "byte-identical files")


def test_empty_files_are_not_copies_of_each_other(image_folder):
    root = image_folder({"cat": 10, "dog": 10})
    for name in ("cat/000.png", "cat/001.png", "dog/000.png"):
        (root / name).write_bytes(b"")
    collection = read_folder(root)
    assert byte_identical(collection, collection.samples["all"]) == []


def test_only_files_of_equal_size_are_hashed(tmp_path):
    class Fake(Collection):
        def __init__(self, contents: dict[str, bytes]) -> None:
            super().__init__(["a"], {})
            self.contents, self.hashed = contents, []

        def open(self, sample, short_side=None):
            raise AssertionError("no picture needs to be decoded")

        def size_bytes(self, sample):
            return len(self.contents[sample.sample_id])

        def stored(self, sample):
            self.hashed.append(sample.sample_id)
            return self.contents[sample.sample_id]

    fake = Fake({"a": b"xx", "b": b"xy", "c": b"xx", "d": b"xxx", "e": b""})
    sets = byte_identical(fake, [Sample(name, 0) for name in fake.contents])
    assert [[sample.sample_id for sample in members] for members in sets] == [["a", "c"]]
    assert fake.hashed == ["a", "b", "c"]


def test_group_by_parent(image_folder):
    root = image_folder({f"{kind}/patient{n}": 3 for kind in ("cat", "dog") for n in range(10)})
    splits = make_splits(read_folder(root), SplitSettings(0.2, 0.2, group_by="parent"))
    sides: dict[str, set[str]] = {}
    for name, split in split_of(splits).items():
        sides.setdefault(name.rpartition("/")[0], set()).add(split)
    assert all(len(side) == 1 for side in sides.values())
    assert per_class(splits)["test"] == {0: 6, 1: 6}  # 2 of 10 patients with 3 images each


def test_group_by_regex_also_across_classes_and_given_splits(image_folder):
    root = image_folder({"train/cat": 12, "train/dog": 12, "test/cat": 2, "test/dog": 2})
    # The last digit is the person: 000, 010 -> 0, ...; test holds persons 0 and 1
    splits = make_splits(read_folder(root), SplitSettings(0.2, group_by=r"(\d)\.png$"))
    persons = {
        split: {name[-5] for name, side in split_of(splits).items() if side == split}
        for split in splits.samples
    }
    assert persons["test"] == {"0", "1"}
    assert not persons["train"] & (persons["val"] | persons["test"])
    assert not persons["val"] & persons["test"]
    assert persons["train"] | persons["val"] == set("23456789")


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
    assert sorted(s for part in parts.values() for s in part) == sorted(samples)
    sides = {(groups[s.sample_id], split) for split, part in parts.items() for s in part}
    assert len(sides) == len({group for group, _ in sides})
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


def saved(root: Path, table: Path, cut: SplitSettings) -> Splits:
    collection = read_folder(root)
    splits = make_splits(collection, cut)
    write_splits(table, splits, collection.class_names)
    return splits


def test_splits_csv_repeats_the_split(image_folder, tmp_path):
    root, table = (
        image_folder({"train/cat": 20, "train/dog": 20, "test/cat": 3, "test/dog": 3}),
        tmp_path / "splits.csv",
    )
    shutil.copy(root / "test/cat/000.png", root / "train/cat/leak.png")
    first = saved(root, table, SplitSettings(seed=5))
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
    image_folder, tmp_path, names, there, copied, expected
):
    """Of 20 images; whether a folder is a whole copy, and whether it is one of a part."""
    root, table = image_folder({"cat": 10, "dog": 10}), tmp_path / "splits.csv"
    saved(root, table, SplitSettings())
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


def test_files_that_came_or_went_are_told_and_left_out(image_folder, tmp_path):
    root, table = image_folder({"cat": 20, "dog": 20}), tmp_path / "splits.csv"
    first = saved(root, table, SplitSettings())
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


def test_splits_csv_of_another_dataset_is_refused(image_folder, tmp_path):
    table = tmp_path / "splits.csv"
    saved(image_folder({"cat": 5, "dog": 5}), table, SplitSettings())
    with refusal("images of the", "no longer there", "another run folder"):
        read_splits(table, read_folder(image_folder({"elk": 5, "fox": 5}, name="others")))
    for data in (
        b"a,b\n1,2\n",
        b"\xff\xfe",
        b"split,class,path\ntrain,cat,\0\xe9",
        b'split,class,path\n"' + b"x" * 140_000,
    ):
        table.write_bytes(data)
        with refusal("splits.csv", "split,class,path", "delete it"):
            read_splits(table, read_folder(tmp_path / "pictures"))
