"""The data module's promises, on small generated folders."""

import csv
import dataclasses
import hashlib
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from PIL import Image

from moevision.config import Data, Framing
from moevision.data import ImageDataModule
from moevision.data.collection import readable_class_names
from moevision.data.folder import read_folder
from moevision.data.transforms import square_pixels
from tests.data.conftest import names, ready, refusal

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def epoch_of(data: ImageDataModule, epoch: int = 0) -> list[dict[str, torch.Tensor]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def equal(first: list[dict[str, torch.Tensor]], second: list[dict[str, torch.Tensor]]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(first, second, strict=True)
    )


def position(batch: int, batch_size: int, world_size: int) -> dict[str, int]:
    """A state of the module, in epoch 1."""
    return {"epoch": 1, "batch": batch, "batch_size": batch_size, "world_size": world_size}


def indices(batches: Iterable[dict[str, torch.Tensor]]) -> list[int]:
    return [index for batch in batches for index in batch["index"].tolist()]


def by_index(batches: Iterable[dict[str, torch.Tensor]]) -> dict[int, bytes]:
    return {
        int(index): image.numpy().tobytes()
        for batch in batches
        for index, image in zip(batch["index"], batch["image"], strict=True)
    }


# What a batch is


@pytest.mark.parametrize(
    ("per_class", "batch_size", "sizes"), [(20, 10**9, [32]), (5, 64, [6]), (5, 4, [4])]
)
def test_no_batch_is_larger_than_the_training_set_and_a_small_set_is_one_batch(
    image_folder, per_class, batch_size, sizes
):
    """What measures a step by `batch_size` takes no more memory than the step; a last batch of 2 is dropped."""
    data = ready(image_folder({"cat": per_class, "dog": per_class}), batch_size=batch_size)
    assert data.batch_size == sizes[0]
    assert [len(batch["label"]) for batch in epoch_of(data)] == sizes


def test_batches_and_what_is_known_after_setup(image_folder):
    data = ready(image_folder({"cat": 30, "dog": 20}), val_fraction=0.2, test_fraction=0.2)
    batch = next(iter(data.train_dataloader()))
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "image": (torch.float32, (8, 3, 16, 16)),
        "label": (torch.int64, (8,)),
        "index": (torch.int64, (8,)),
    }
    assert (data.class_names, data.num_classes) == (["cat", "dog"], 2)
    assert data.class_counts == {
        "train": {"cat": 18, "dog": 12},
        "val": {"cat": 6, "dog": 4},
        "test": {"cat": 6, "dog": 4},
    }
    names(data.split_note, "train: 30 images", "all images", "seed 0", "val: 10")
    for index, label in zip(batch["index"].tolist(), batch["label"].tolist(), strict=True):
        assert data.sample_id("train", index).startswith(data.class_names[label])
    assert data.bad_images == []


def test_evaluation_pixels_by_hand(image_folder):
    """Without augmentation training images are prepared alike: the linear probe is measured on them."""
    root = image_folder({"cat": 5, "dog": 5}, size=(24, 12))
    data = ready(root, fit="pad")
    for split, loader in (("val", data.val_dataloader()), ("train", data.plain_loader("train"))):
        (batch,) = loader
        for row, index in enumerate(batch["index"].tolist()):
            image = Image.open(root / data.sample_id(split, index))
            pixels = square_pixels(image, 16, Framing("pad", IMAGENET_MEAN))
            expected = (pixels / 255 - IMAGENET_MEAN) / IMAGENET_STD
            np.testing.assert_allclose(batch["image"][row].permute(1, 2, 0), expected, atol=1e-5)
            assert np.abs(expected[:4]).max() < 0.02  # between borders of 4 px in the mean colour
        assert equal([batch], list(loader))


def test_synthetic_pets_is_the_default():
    data = ImageDataModule(image_size=16, batch_size=8, train_size=16, val_size=8, test_size=8)
    data.setup("fit")
    assert {"cat", "dog"} <= set(data.class_names)
    assert data.class_counts["train"] == dict.fromkeys(data.class_names, 2)
    assert data.crop_mode == "pad"
    assert data.sample_id("val", 3) == "val/000003"
    assert len(epoch_of(data)) == 2


# Exactness


@pytest.mark.parametrize(
    "options",
    [
        {"crop": "pad"},
        {"crop": "random_resized"},
        {
            "crop": "random_resized",
            "augment": "trivialaugment",
            "random_erasing": 0.5,
            "mixup": 0.5,
            "cutmix": 1.0,
        },
    ],
    ids=["pad", "random_resized", "everything"],
)
def test_pixels_depend_neither_on_workers_nor_on_the_cache(image_folder, options):
    root = image_folder({"cat": 20, "dog": 20}, size=(40, 30))
    data = ready(root, **options)
    expected = epoch_of(data, 1)
    assert by_index(expected) != by_index(epoch_of(data, 2))
    for other in ({"num_workers": 2}, {"num_workers": 2, "cache_mb": 0}, {"cache_mb": 0}):
        assert equal(expected, epoch_of(ready(root, **other, **options), 1)), other
    uncached = ready(root, cache_mb=0, **options)
    assert equal(list(data.test_dataloader()), list(uncached.test_dataloader()))


def test_a_worker_that_is_not_forked_gets_the_buffers_and_no_copies(image_folder):
    """Arrays over the cached buffers would be pickled as copies; the tensors themselves are shared."""
    dataset = ready(image_folder({"cat": 10, "dog": 10})).contents.datasets["train"]
    before = list(map(dataset.pixels, range(len(dataset))))
    sent = pickle.dumps(dataset.cache)
    held = sum(image.nbytes for image in before)
    assert held < len(sent) < 2 * held
    received = pickle.loads(sent)
    assert all(np.array_equal(received.image(row), image) for row, image in enumerate(before))


@pytest.mark.parametrize(("processes", "kept"), [(1, True), (3, True), (4, False)])
def test_the_memory_for_decoded_images_is_that_of_all_processes(image_folder, processes, kept):
    """80 images of 64 x 64 px take 0.94 MiB, and each process keeps all of them."""
    data = ImageDataModule(
        str(image_folder({"cat": 40, "dog": 40})), image_size=64, crop="pad", cache_mb=3
    )
    data.local_world_size = processes
    data.setup("fit")
    assert 80 * 3 * 64**2 / 2**20 == 0.9375
    assert (data.contents.datasets["train"].cache is not None) is kept


@pytest.fixture(scope="module")
def forty_photos(tmp_path_factory) -> tuple[Path, dict[int, bytes]]:
    """Photos of several sizes, and the training pixels of their epoch 1, one image a batch."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(40):
        folder = root / ("cat" if number % 2 else "dog")
        folder.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return root, by_index(
        epoch_of(ready(root, batch_size=1, crop="random_resized", random_erasing=0.5), 1)
    )


@given(batch_size=st.integers(1, 32), start=st.integers(0, 31), cached=st.booleans())
@settings(deadline=None, max_examples=25)
def test_pixels_depend_on_neither_batch_size_nor_starting_point(
    forty_photos, batch_size, start, cached
):
    root, alone = forty_photos
    options = {"crop": "random_resized", "random_erasing": 0.5, "cache_mb": 64 * cached}
    data = ready(root, batch_size=batch_size, **options)
    data.load_state_dict(position(start // batch_size, batch_size, 1))
    found = by_index(list(data.train_dataloader()))
    assert len(found) == (32 // batch_size - start // batch_size) * batch_size
    assert found == {index: alone[index] for index in found}


def test_the_loader_counts_the_time_it_is_waited_for(image_folder, monkeypatch):
    """A slow decoder's time is waiting; what the caller does between two batches isn't."""
    data = ready(image_folder({"cat": 10, "dog": 10}), cache_mb=0, num_workers=0)
    loader = data.train_dataloader()
    assert loader.wait_s == 0
    clock = [0.0]
    monkeypatch.setattr("moevision.data.loader.time.monotonic", lambda: clock[0])

    def slow(self, index):
        clock[0] += 0.25
        return np.zeros((3, 16, 16), np.uint8)

    monkeypatch.setattr("moevision.data.loader.ImageDataset.pixels", slow)
    for _ in loader:
        clock[0] += 100  # a training step
    assert loader.wait_s == 16 * 0.25  # two batches of 8 of the 16 training images


def test_loaders_leave_the_global_generator_alone(image_folder):
    data = ready(image_folder({"cat": 10, "dog": 10}), mixup=0.4)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(data.train_dataloader()), list(data.val_dataloader())
    assert torch.equal(torch.rand(3), expected)


def test_training_batches_alone_have_soft_targets(image_folder):
    data = ready(image_folder({"cat": 20, "dog": 20}), mixup=0.8, cutmix=1.0)
    batch = next(iter(data.train_dataloader()))
    assert (batch["target"].shape, batch["label"].dtype) == ((8, 2), torch.int64)
    for loader in (data.val_dataloader(), data.plain_loader("train")):
        assert "target" not in next(iter(loader))


class Recorder(LightningModule):
    """Writes down which images it sees, and fits one number to their pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch["index"].tolist()))
        outputs = batch["image"].mean(dim=(2, 3)) @ self.weight
        return (outputs - batch["label"]).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAlways(Checkpoint):
    """Saves where ModelCheckpoint may: after each step and after each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, trainer: Trainer, name: str) -> None:
        trainer.save_checkpoint(self.folder / f"{name}.ckpt", weights_only=False)

    def on_train_batch_end(self, trainer, *_):
        self.save(trainer, f"step{trainer.global_step}")

    def on_train_epoch_end(self, trainer, *_):
        self.save(trainer, f"epoch{trainer.current_epoch}")

    def on_train_end(self, trainer, *_):
        self.save(trainer, "end")


def fit(root: Path, folder: Path, epochs: int, resume: Path | None = None, **options) -> Recorder:
    model = Recorder()
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_epochs=epochs, callbacks=[SaveAlways(folder)], accelerator="cpu", **quiet)
    data = ImageDataModule(str(root), image_size=16, batch_size=8, **options)
    trainer.fit(model, data, ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(folder / "finished.ckpt", weights_only=False)
    return model


def test_resume_goes_on_exactly(image_folder, tmp_path):
    root = image_folder({"cat": 20, "dog": 20})  # 32 training images, 4 batches
    whole = fit(root, tmp_path / "whole", 3)
    assert len(whole.seen) == 12
    fit(root, tmp_path / "short", 2)
    # within an epoch, on its last batch, on the first of the next, within a later one; and after one or all epochs
    steps = {f"whole/step{step}": step for step in (2, 4, 5, 10)}
    for name, step in {**steps, "whole/epoch1": 8, "short/end": 8, "short/finished": 8}.items():
        workers = 2 * (step == 2)
        checkpoint = tmp_path / f"{name}.ckpt"
        resumed = fit(root, tmp_path / "longer", 3, checkpoint, num_workers=workers)
        assert resumed.seen == whole.seen[step:], name
        assert torch.equal(resumed.weight, whole.weight), name


def test_state_is_the_next_position_and_a_changed_batch_size_is_told(image_folder):
    data = ready(image_folder({"cat": 20, "dog": 20}))
    assert data.state_dict() == position(0, 8, 1) | {"epoch": 0}
    smaller = ready(image_folder({}), batch_size=4)
    with pytest.warns(UserWarning, match="batch_size 8 .* 4:"):
        smaller.load_state_dict(position(2, 8, 1))
    assert indices(smaller.train_dataloader()) == indices(epoch_of(data, 1))[16:]
    assert indices(epoch_of(smaller)) == indices(epoch_of(data))


def test_what_all_processes_have_read_is_read_by_none_of_another_number(image_folder):
    """Two processes read two batches of 4 each, 16 images; one goes on behind them. And the other way round."""
    root = image_folder({"cat": 20, "dog": 20})  # 32 of them for training
    rest = indices(epoch_of(ready(root), 1))[16:]
    alone = ready(root, batch_size=4)
    with pytest.warns(UserWarning, match="world_size 2 .* 1:"):
        alone.load_state_dict(position(2, 4, 2))
    assert indices(alone.train_dataloader()) == rest
    seen = []
    for rank in (0, 1):
        one_of_two = ready(root)
        one_of_two.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        with pytest.warns(UserWarning, match="world_size 1 .* 2:"):
            one_of_two.load_state_dict(position(2, 8, 1))  # 16 as well
        seen += indices(one_of_two.train_dataloader())
    assert sorted(seen) == sorted(rest)


# Classes


def test_wordnet_folders_become_words(image_folder):
    data = ready(image_folder({"n02102040": 5, "n01440764": 5}))
    assert data.class_names == ["tench", "English springer"]
    # ImageNet's two cranes, the bird and the machine, and a folder that is no WordNet id
    assert readable_class_names(["n02012849", "n03126707"]) == [
        "crane (n02012849)",
        "crane (n03126707)",
    ]
    assert readable_class_names(["n01440764", "cat"]) == ["n01440764", "cat"]


@pytest.mark.parametrize(
    ("classes", "weights", "expected"),
    [
        ({"cat": 20, "dog": 40}, "none", None),
        # 16 + 32 = 48 training images: 48 / (2 x 16) and 48 / (2 x 32)
        ({"cat": 20, "dog": 40}, "auto", [1.5, 0.75]),
        # 1 and 2.5, divided by their mean over the images, (16 x 1 + 32 x 2.5) / 48 = 2
        ({"cat": 20, "dog": 40}, {"dog": 2.5}, [0.5, 1.25]),
        ({"1": 10, "7": 10}, {7: 2.5}, [1.0 / 1.75, 2.5 / 1.75]),  # as YAML reads {7: 2.5}
    ],
)
def test_class_weights_by_hand(image_folder, classes, weights, expected):
    found = ready(image_folder(classes, size=(8, 8)), class_weights=weights).class_weight_tensor()
    assert (found if found is None else found.tolist()) == (expected and pytest.approx(expected))


def test_imbalance_is_told_with_both_remedies(image_folder):
    root = image_folder({"cat": 40, "dog": 10}, size=(8, 8))
    with pytest.warns(UserWarning, match="'cat' has 32 .* 'dog' only 8"):
        data = ready(root)
    (warning,) = data.warnings
    names(warning, "--data.class_weights auto", "--data.balanced_sampling true")
    assert f"warning: {warning}" in data.describe()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ready(root, class_weights="auto")
        balanced = ready(root, balanced_sampling=True)
    labels = torch.cat([batch["label"] for batch in balanced.train_dataloader()])
    assert labels.bincount().tolist() == [20, 20]


def test_describe(image_folder):
    text = ready(image_folder({"cat": 30, "dog": 20})).describe()
    assert re.search(r"^class +train +val +test$", text, re.MULTILINE)
    assert re.search(r"^cat +24 +3 +3$", text, re.MULTILINE)
    assert re.search(r"^all +40 +5 +5$", text, re.MULTILINE)
    names(text, "2 classes from", "16 x 16", "kept in memory", "augmentation light", "crop pad")


def test_what_the_central_square_leaves_out_is_said(image_folder):
    """Of 30 x 20 pixels a third; nothing of squares, nor where `fit` keeps all of an image."""
    oblong = image_folder({"cat": 30, "dog": 20}, size=(30, 20))
    (line,) = [line for line in ready(oblong).describe().splitlines() if "such an image" in line]
    names(line, "100 % of the images", "without 33 %", "--data.fit pad", "squash")
    assert "such an image" not in ready(oblong, fit="pad").describe()
    squares = image_folder({"cat": 30, "dog": 20}, name="squares")
    assert "such an image" not in ready(squares).describe()


def test_a_damaged_image_has_no_shape(image_folder):
    root = image_folder({"cat": 30, "dog": 20}, size=(30, 20))
    damage(root, ["cat/003.png"])
    names(ready(root, cache_mb=0, max_bad_fraction=0.5).describe(), "100 % of the images")


def test_file_list_sha256_by_hand(image_folder):
    data = ready(image_folder({"cat": 4, "dog": 4}))
    lines = [
        f"{split}\t{sample.sample_id}\t{sample.label}\n"
        for split, dataset in data.contents.datasets.items()
        for sample in dataset.samples
    ]
    assert data.file_list_sha256() == hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
    assert ready(image_folder({}), seed=1).file_list_sha256() != data.file_list_sha256()


def test_the_order_has_a_seed_of_its_own(image_folder):
    root = image_folder({"cat": 20, "dog": 20})
    plain, same, other = (ready(root, order_seed=seed) for seed in (None, 0, 1))
    assert plain.file_list_sha256() == same.file_list_sha256() == other.file_list_sha256()
    assert equal(epoch_of(plain), epoch_of(same))
    assert not equal(epoch_of(plain), epoch_of(other))
    first, second = (by_index(epoch_of(data)) for data in (plain, other))
    both = first.keys() & second.keys()  # the last batch is dropped
    assert any(first[index] != second[index] for index in both), "other crops and flips, too"


# Bad files


def damage(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).write_bytes(f"{name} is not a picture".encode())


@pytest.mark.parametrize(
    "options", [{}, {"cache_mb": 0}, {"cache_mb": 0, "num_workers": 2}], ids=str
)
def test_bad_files_are_skipped_counted_and_listed(image_folder, tmp_path, options):
    root = image_folder({"train/cat": 30, "train/dog": 30, "test/cat": 10, "test/dog": 10})
    damage(root, ["train/cat/003.png", "test/dog/001.png"])
    data = ready(root, run_dir=tmp_path / "run", max_bad_fraction=0.06, **options)
    assert [len(batch["label"]) for batch in epoch_of(data)] == [8] * (
        54 // 8
    )  # the next stands in
    tested = indices(data.test_dataloader())
    assert len(tested) == len(set(tested)) == 19
    list(data.val_dataloader())  # the cut by class puts each training image into train or val
    bad = {path: (reason, split) for path, reason, split in data.bad_images}
    assert bad.keys() == {"train/cat/003.png", "test/dog/001.png"}
    assert all("not a JPEG" in reason for reason, _ in bad.values())
    assert bad["test/dog/001.png"][1] == "test"
    assert bad["train/cat/003.png"][1] in ("train", "val")
    with (tmp_path / "run/bad_images.csv").open() as handle:
        assert {row["path"] for row in csv.DictReader(handle)} == bad.keys()
    names(data.describe(), "2 of", "can't be used")


@pytest.mark.parametrize("cache_mb", [64, 0])
def test_too_many_bad_files_stop_the_run(image_folder, cache_mb):
    root = image_folder({"cat": 20, "dog": 20})
    damage(root, [f"cat/{number:03d}.png" for number in range(20)])
    data = ImageDataModule(str(root), image_size=16, batch_size=8, cache_mb=cache_mb, crop="pad")
    with refusal("of 32 train", "share of 0.05", "--data.max_bad_fraction", ".png: it is", "cat/"):
        data.setup(), list(data.train_dataloader())


def test_a_batch_without_a_good_image_is_left_out(image_folder):
    root = image_folder({"train/cat": 10, "train/dog": 10, "test/cat": 4, "test/dog": 4})
    damage(root, ["test/cat/000.png", "test/cat/001.png", "test/dog/003.png"])
    data = ready(root, batch_size=2, max_bad_fraction=0.5)
    for loader in (data.test_dataloader(), data.plain_loader("test")):
        assert [batch["index"].tolist() for batch in loader] == [[2, 3], [4, 5], [6]]
    assert len(list(data.train_dataloader())) == len(data.train_dataloader())  # others stand in


# Where the data are


def test_what_can_not_be_read_is_said(image_folder, monkeypatch):
    """The system's refusals are made up: root, who runs tests in containers, may read anything."""
    root = image_folder({"cat/more": 4, "cat": 4, "dog": 8}, size=(160, 160))  # 75 KiB each
    shut = "/more"

    def refusing(real):
        def call(path, *args, **options):
            if Path(path).as_posix().endswith(shut):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **options)

        return call

    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    monkeypatch.setattr(Path, "open", refusing(Path.open))
    monkeypatch.setattr(Path, "is_file", refusing(Path.is_file))
    collection = read_folder(root)
    assert len(collection.samples["all"]) == 12
    names(collection.notes[0], "1 folders", "can't be read")
    shut = "dog/003.png"
    unprobed = [collection.probe(sample) == b"" for sample in collection.samples["all"]]
    assert np.flatnonzero(unprobed).tolist() == [7]
    shut = ".json"  # a folder that can't be entered
    with refusal("can't be read", "(Permission denied)", "permit"):
        ready(root)


def test_imagenet_is_a_folder(image_folder, tmp_path):
    folders = {
        f"{split}/{wnid}": 4 for split in ("train", "val") for wnid in ("n01440764", "n02102040")
    }
    data = ready("imagenet", root=str(image_folder(folders)))
    assert data.class_counts["test"] == {"tench": 4, "English springer": 4}


@pytest.fixture
def fake_cifar10(tmp_path, monkeypatch) -> np.ndarray:
    """CIFAR-10's files with 20 + 10 random images; their MD5 sums replace those torchvision checks."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 3 * 32 * 32), dtype=np.uint8)

    def dump(name: str, content: dict) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def part(rows: slice) -> dict:
        return {"data": pixels[rows], "labels": [row % 2 for row in range(30)[rows]]}

    monkeypatch.setattr(CIFAR10, "train_list", [dump("data_batch_1", part(slice(0, 20)))])
    monkeypatch.setattr(CIFAR10, "test_list", [dump("test_batch", part(slice(20, 30)))])
    name, md5 = dump("batches.meta", {"label_names": ["cat", "sea_horse"]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return pixels.reshape(30, 3, 32, 32)


def test_cifar10_through_torchvision(fake_cifar10, tmp_path):
    data = ready("cifar10", root=str(tmp_path), image_size=32)
    assert data.class_names == ["cat", "sea horse"]
    assert {split: sum(counts.values()) for split, counts in data.class_counts.items()} == {
        "train": 18,
        "val": 2,
        "test": 10,
    }
    names(data.split_note, "test: 10 images", "dataset gives them")
    assert data.crop_mode == "pad"
    batch = next(iter(data.test_dataloader()))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = torch.from_numpy(fake_cifar10[20]) / 255
    torch.testing.assert_close(batch["image"][0], (pixels - mean) / std)
    assert data.sample_id("test", 0) == "test/00000"


def test_pets_cat_dog_through_torchvision(tmp_path, image_folder):
    # Oxford-IIIT Pet's layout: images/<Breed>_<n>.jpg and lists "<name> <breed> <1 cat | 2 dog> <n>"
    base = tmp_path / "oxford-iiit-pet"
    (base / "images").mkdir(parents=True)
    (base / "annotations").mkdir()
    drawn = iter(sorted(image_folder({"all": 24}).rglob("*.png")))
    for split in ("trainval", "test"):
        lines = []
        for breed, (name, kind) in enumerate((("Birman", 1), ("beagle", 2)), start=1):
            for number in range(6):
                stem = f"{name}_{split}{number}"
                shutil.copy(next(drawn), base / f"images/{stem}.jpg")
                lines.append(f"{stem} {breed} {kind} 1")
        (base / f"annotations/{split}.txt").write_text("\n".join(lines))
    data = ready("pets_cat_dog", root=str(tmp_path))
    assert [name.lower() for name in data.class_names] == ["cat", "dog"]
    assert data.class_counts["test"] == dict.fromkeys(data.class_names, 6)
    index = next(i for i in range(12) if "beagle" in data.sample_id("test", i))
    assert data.contents.datasets["test"].samples[index].label == 1


# Arguments


def test_every_argument_is_documented_and_parses_from_text():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ImageDataModule, "data")
    names = {action.dest for action in parser._actions if action.dest.startswith("data.")}
    fields = {f"data.{field.name}": field.metadata["help"] for field in dataclasses.fields(Data)}
    assert len(names) == 36
    assert names == fields.keys()
    assert not [name for name, text in fields.items() if len(text) < 20]
    config = parser.parse_args(
        ['--data.class_weights={"cat": 2}', "--data.mean=[0.1,0.2,0.3]", "--data.crop=pad"]
    )
    data = ImageDataModule(**config.data)
    assert data.class_weights == {"cat": 2.0}
    assert data.mean == (0.1, 0.2, 0.3)
