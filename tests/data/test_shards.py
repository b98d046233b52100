"""Tar shards: written to the end whatever interrupts, read as the folder that they were made of."""

import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from moevision.analysis.images import open_pictures
from moevision.data import ImageDataModule, shards
from moevision.data.folder import read_folder
from moevision.data.images import BadImageError
from moevision.data.open import open_collection
from moevision.data.shards import INDEX, open_shards, verify_shards, write_shards
from moevision.errors import UserError
from moevision.train.recipe import count_images

KIB = 1024
FEW = 3 * KIB  # bytes of a shard: about four of the noise images


def ready(path, **options):
    data = ImageDataModule(str(path), image_size=16, batch_size=8, **options)
    data.setup()
    return data


def written(root, out, **options):
    """The names and bytes of all files that are written."""
    write_shards(read_folder(root), out, shard_bytes=FEW, **options)
    return content(out)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def pictures(image_folder):
    """An unsplit folder in which an image stands twice, and a file is damaged."""
    root = image_folder({"cat": 10, "dog": 9})
    shutil.copy(root / "dog" / "001.png", root / "dog" / os.fsdecode(b"\xff copy.of\n001.PNG"))
    (root / "cat" / "bad.jpg").write_bytes(b"no image")
    return root


# ---- what we write, and read


@pytest.mark.parametrize("given", [False, True])
def test_shards_are_read_as_the_folder(pictures, image_folder, tmp_path, given):
    """Ids, classes, split, sizes and the batches of two epochs, from memory and from the shards."""
    root = image_folder({f"{part}/{name}": 8 for part in ("train", "val") for name in ("n02", "n01")}, name="given")
    root = root if given else pictures
    out = tmp_path / "shards"
    write_shards(read_folder(root), out, shard_bytes=FEW)
    assert len(list(out.glob("*.tar"))) > 4
    assert count_images(out) == count_images(root) == (32 if given else 21)
    for options in ({"cache_mb": 0, "crop": "random_resized"}, {"num_workers": 1}):
        folder, tars = (ready(path, max_bad_fraction=0.2, **options) for path in (root, out))
        assert tars.class_names == folder.class_names
        assert tars.split_note == folder.split_note
        assert tars.warnings == folder.warnings
        assert tars.file_list_sha256() == folder.file_list_sha256()
        assert tars.file_sizes_sha256() == folder.file_sizes_sha256()
        for _ in range(2):
            for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
                batches = [list(getattr(data, loader)()) for data in (folder, tars)]
                for one, other in zip(*batches, strict=True):
                    assert all(torch.equal(one[name], other[name]) for name in ("image", "label", "index"))
        assert tars.bad_images == folder.bad_images
        assert len(tars.bad_images) == (0 if given else 1)


def test_every_image_is_evaluated_once(pictures, tmp_path):
    write_shards(read_folder(pictures), tmp_path / "shards", shard_bytes=FEW)
    data = ready(tmp_path / "shards", test_fraction=0.5, max_bad_fraction=0.5)
    indices = torch.cat([batch["index"] for batch in data.test_dataloader()]).tolist()
    bad = [name for name, _, split in data.bad_images if split == "test"]
    seen = [data.sample_id("test", index) for index in indices]
    assert sorted([*seen, *bad]) == sorted(sample.sample_id for sample in data.contents.datasets["test"].samples)


def test_any_program_reads_the_tars(pictures, tmp_path):
    """KEY.cls and the file as it is; the key is the place in the folder's order, the tars' order is another."""
    files = written(pictures, tmp_path / "shards")
    collection = read_folder(pictures)
    held, keys = {}, []
    for name, data in files.items():
        if name.endswith(".tar"):
            assert name.startswith("all-")
            assert len(data) % tarfile.RECORDSIZE == 0
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                for member in archive:
                    key, _, ending = member.name.partition(".")
                    held[key, ending] = archive.extractfile(member).read()
                    keys += [int(key)] if ending == "cls" else []
    assert len(held) == 2 * 21
    assert sorted(keys) == list(range(21)) != keys
    for place, sample in enumerate(collection.given["all"]):
        ending = "jpg" if "bad" in sample.sample_id else "png"
        assert held[f"{place:08d}", "cls"] == str(sample.label).encode()
        assert held[f"{place:08d}", ending] == (pictures / sample.sample_id).read_bytes()


def test_columns_of_a_table_and_its_groups_go_along(pictures, tmp_path):
    rows = [f"{part}/{number:03d}.png,{part},{number // 3},x{number}" for part in ("cat", "dog") for number in range(9)]
    table = pictures / "list.csv"
    table.write_text("\n".join(["path,label,group,patient", *rows]) + "\n")
    source = open_collection(str(table), root="", download=False, image_size=16, seed=0, sizes={})
    write_shards(source, tmp_path / "shards")
    for options in ({}, {"group_by": "patient"}):
        folder, tars = ready(table, **options), ready(tmp_path / "shards", **options)
        assert tars.split_note == folder.split_note
        assert "Kept in one split" in tars.split_note
        assert tars.file_list_sha256() == folder.file_list_sha256()


def test_pixels_without_files_are_stored_as_png(tmp_path):
    """As CIFAR-10 comes from torchvision; shards of shards are the same shards."""
    import numpy as np

    from moevision.data.collection import ArrayCollection, Sample

    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    given = {"train": [Sample(f"train/{number}", number % 2) for number in range(6)]}
    arrays = ArrayCollection(["one", "other"], given, arrays={"train": pixels})
    write_shards(arrays, tmp_path / "a")
    tars = open_shards(tmp_path / "a")
    assert tars.given == given
    for sample, expected in zip(given["train"], pixels, strict=True):
        assert np.array_equal(np.asarray(tars.open(sample)), expected)
    write_shards(tars, tmp_path / "b")
    assert (tmp_path / "b" / "train-00000.tar").read_bytes() == (tmp_path / "a" / "train-00000.tar").read_bytes()


def test_pictures_of_the_analysis(pictures, tmp_path):
    write_shards(read_folder(pictures), tmp_path / "shards")
    folder, tars = (open_pictures(path, 16, split="all", limit=4) for path in (pictures, tmp_path / "shards"))
    assert [tars.picture_name(i) for i in range(4)] == [folder.picture_name(i) for i in range(4)]
    assert all((tars.image(i) == folder.image(i)).all() for i in range(4))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted by /proc")
def test_few_files_are_open_and_none_is_pickled(pictures, tmp_path, monkeypatch):
    write_shards(read_folder(pictures), tmp_path / "shards", shard_bytes=1)  # an image each
    monkeypatch.setattr(shards, "_OPEN_FILES", 2)
    before = len(os.listdir("/proc/self/fd"))
    collection = open_shards(tmp_path / "shards")
    for _ in range(2):
        for sample in collection.given["all"]:
            assert len(collection.stored(sample)) == collection.size_bytes(sample)
        assert len(os.listdir("/proc/self/fd")) == before + 2
        collection = pickle.loads(pickle.dumps(collection))  # as a worker that isn't forked gets it
    del collection
    assert len(os.listdir("/proc/self/fd")) == before


def test_nothing_is_said_when_python_ends(pictures, tmp_path, monkeypatch):
    """Modules are None by then; what fails in `__del__` is a warning, and so an error here."""
    write_shards(read_folder(pictures), tmp_path / "shards")
    collection = open_shards(tmp_path / "shards")
    collection.stored(collection.given["all"][0])
    monkeypatch.setattr(shards, "os", None)
    del collection


# ---- written whole or not at all


def test_a_conversion_that_stops_leaves_nothing(pictures, tmp_path):
    """The folder has its name once all of it is there; the same command then writes the same bytes."""
    whole = written(pictures, tmp_path / "whole")
    out = tmp_path / "out" / "shards"

    left = iter([0] * 5 + [1])

    def stop(done):
        if next(left):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(pictures, out, on_progress=stop)
    assert list(out.parent.iterdir()) == []
    assert written(pictures, out) == whole


def test_what_is_not_written_over(pictures, tmp_path):
    with pytest.raises(UserError, match="is there already: give --out a new folder"):
        write_shards(read_folder(pictures), pictures / "cat")
    with pytest.raises(UserError, match="drawn when it is opened"):
        write_shards(open_collection("synthetic_pets", root="", download=False, image_size=16, seed=0,
                                     sizes={"train": 2, "val": 2, "test": 2}), tmp_path / "drawn")  # fmt: skip
    collection = read_folder(pictures)
    (pictures / "dog" / "003.png").rename(pictures / "gone.png")
    with pytest.raises(UserError, match=r"The image dog/003\.png can't be read \(there is no such file"):
        write_shards(collection, tmp_path / "new")


# ---- damaged afterwards


def flip(path, place=600):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_shards_that_are_not_whole(pictures, tmp_path):
    out = tmp_path / "shards"
    written(pictures, out)
    first = min(out.glob("*.tar"))
    before = first.read_bytes()
    flip(first)
    with pytest.raises(UserError, match=r"all-00000\.tar was changed: its SHA-256 isn't that of its index"):
        verify_shards(out)
    for data, words in (
        (before[:-100], r"all-00000\.tar is missing or was changed: it has [\d,]+ of [\d,]+ bytes; copy it again"),
        (before + b"x", r"all-00000\.tar is missing or was changed: it has [\d,]+ of [\d,]+ bytes"),
    ):
        first.write_bytes(data)
        with pytest.raises(UserError, match=words):
            open_shards(out)
    first.unlink()
    with pytest.raises(UserError, match=r"all-00000\.tar is missing or was changed: it has 0 of"):
        open_shards(out)
    first.write_bytes(before)
    verify_shards(out)


def test_a_shard_that_ends_while_it_is_read(pictures, tmp_path):
    """Its images count as bad ones, as a file does that vanishes from a folder."""
    out = tmp_path / "shards"
    written(pictures, out)
    collection = open_shards(out)
    first = min(out.glob("*.tar"))
    first.write_bytes(first.read_bytes()[:100])
    bad = 0
    for sample in collection.given["all"]:
        try:
            collection.open(sample)
        except BadImageError as error:
            bad += error.reason == "its shard can't be read (all-00000.tar was cut short; copy it again)"
    assert bad >= 3


@pytest.mark.parametrize(
    "change",
    [
        lambda held: held["shards"][0].update(file="../other.tar"),
        lambda held: held["shards"][0].update(sha256=""),
        lambda held: held.pop("class_names"),
    ],
)
def test_an_index_that_no_program_wrote(pictures, tmp_path, change):
    out = tmp_path / "shards"
    written(pictures, out)
    held = json.loads((out / INDEX).read_text())
    change(held)
    (out / INDEX).write_text(json.dumps(held))
    with pytest.raises(UserError, match="can't be read as an index of shards"):
        open_shards(out)


def test_an_index_of_tars_that_others_made(tmp_path):
    """Version 0.1 wrote such; it has no hashes, and the tars are converted now."""
    root = tmp_path
    shard = {"file": "imagenet1k-train-0000.tar", "bytes": 1, "sha256": "", "plan": "", "modified_ns": 5}
    held = {"moevision_shards": 1, "class_names": ["a"], "shards": [shard], "splits": {}}
    (root / INDEX).write_text(json.dumps(held))
    with pytest.raises(
        UserError, match=f"{INDEX} can't be read as an index .* delete it, and run `moevision data shard`"
    ):
        open_shards(root)
