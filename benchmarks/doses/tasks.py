"""What has to be learned: textures, characters, mosaics (drawn without end) and photos of Tiny-ImageNet.

A task gives batches of a split, "train", "val" or "test"; images are float32 around 0. A drawn task's seed decides what
is to be remembered.

Axes: B images, M things to remember, C classes, P = 16 places of an image, S pixels of a place's side.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

GRID = 4
PLACES = GRID**2


class Drawn:
    """16 things an image, a share of them from the image's class, the others from all; anywhere."""

    num_classes = 16
    test_size = 8192
    share: float
    of_class: list[Tensor]  # the things of each class

    @property
    def class_of(self) -> Tensor:
        """The class of each thing, [M]."""
        classes = torch.empty(sum(map(len, self.of_class)), dtype=torch.long)
        for label, things in enumerate(self.of_class):
            classes[things] = label
        return classes

    def choose(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Things [B, P] and labels [B]."""
        labels = torch.randint(self.num_classes, (count,), generator=generator)
        sizes = torch.tensor([len(things) for things in self.of_class])
        padded = torch.nn.utils.rnn.pad_sequence(self.of_class, batch_first=True)  # [C, largest]
        draws = torch.rand(count, PLACES, generator=generator)
        own = padded[labels[:, None], (draws * sizes[labels][:, None]).long()]
        other = torch.randint(int(sizes.sum()), (count, PLACES), generator=generator)
        is_own = torch.rand(count, PLACES, generator=generator) < self.share
        return torch.where(is_own, own, other), labels

    def known_top1(self) -> float:
        """The accuracy of who knows every thing's class and names the most frequent one."""
        things, labels = self.choose(self.test_size, Generator().manual_seed(7))
        votes = F.one_hot(self.class_of[things], self.num_classes).sum(1)  # [B, C]
        return round(float((votes.argmax(-1) == labels).float().mean()), 4)


def noise_like(images: Tensor, bank: Tensor, generator: Generator) -> Tensor:
    """A stretch of a bank of normal numbers: as good as new ones, and much cheaper."""
    start = int(torch.randint(len(bank) - images.numel(), (1,), generator=generator))
    return bank[start : start + images.numel()].view(images.shape)


def on_grid(things: Tensor) -> Tensor:
    """[B, P, channels, S, S] -> images [B, channels, 4 S, 4 S]."""
    count, _, channels, side, _ = things.shape
    grid = things.view(count, GRID, GRID, channels, side, side).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(count, channels, GRID * side, GRID * side)


def jittered(images: Tensor, by: float, generator: Generator) -> Tensor:
    """Each image's contrast and its channels' brightness changed by normal numbers of this SD."""
    contrast = 1 + by * torch.randn(len(images), 1, 1, 1, generator=generator)
    brightness = by * torch.randn(len(images), images.shape[1], 1, 1, generator=generator)
    return images * contrast + brightness


class Textures(Drawn):
    """M drawn textures of 8 x 8 px, each of a random class."""

    share = 0.3

    def __init__(self, amount: int, seed: int) -> None:
        draw = Generator().manual_seed(20_000 + seed)
        self.of_class = list(torch.randperm(amount, generator=draw).view(-1, 16).T)
        coarse = torch.randn(amount, 3, 4, 4, generator=draw)
        tiles = F.interpolate(coarse, size=(8, 8), mode="bilinear", align_corners=False)
        self.tiles = tiles / tiles.std()
        self.noise = 0.3 * torch.randn(2_000_000, generator=draw)

    def batch(self, split: str, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Images [B, 3, 32, 32] and labels [B]; all splits are draws of one distribution."""
        things, labels = self.choose(count, generator)
        images = jittered(on_grid(self.tiles[things]), 0.1, generator)
        return images + noise_like(images, self.noise, generator), labels


class Characters(Drawn):
    """960 Chinese characters of 16 px in real fonts, one font a page; other fonts for validation and for the test.

    The class is the first sound of the Mandarin reading, the radical, or random.
    """

    share = 0.7

    def __init__(self, kind: str, seed: int, glyphs: Path) -> None:
        draw = np.random.default_rng(seed)
        record = np.load(glyphs)
        self.sha256 = hashlib.sha256(record["glyphs"].tobytes()).hexdigest()
        chosen = chosen_characters(record, kind, draw)
        sizes = [len(characters) for characters in chosen]
        self.of_class = list(torch.arange(sum(sizes)).split(sizes))
        pixels = record["glyphs"][:, np.concatenate(chosen)]
        self.glyphs = torch.from_numpy(pixels).float()[:, :, None] / 255  # [fonts, M, 1, S, S]
        self.fonts = {
            split: torch.from_numpy(np.flatnonzero(record["split"] == split))
            for split in ("train", "val", "test")
        }
        self.noise = 0.15 * torch.randn(3_000_000, generator=Generator().manual_seed(seed))

    def batch(self, split: str, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Images [B, 1, 64, 64], moved by at most 1 px, and labels [B]."""
        things, labels = self.choose(count, generator)
        fonts = self.fonts[split]
        font = fonts[torch.randint(len(fonts), (count, 1), generator=generator)]
        images = shifted(on_grid(self.glyphs[font, things]), 1, generator)
        contrast = 1 + 0.2 * torch.randn(count, 1, 1, 1, generator=generator)
        images = 3 * contrast * (images - 0.25)
        return images + noise_like(images, self.noise, generator), labels


def chosen_characters(
    record: Any, kind: str, draw: np.random.Generator, per_class: int = 60
) -> list[np.ndarray]:
    """For each of 16 classes, up to 60 characters: those of the 16 most frequent sounds or radicals, or any."""
    if kind == "random":
        return list(draw.permutation(len(record["sound"]))[: 16 * per_class].reshape(16, -1))
    names, counts = np.unique(record[kind], return_counts=True)
    largest = names[np.argsort(-counts)][:16]
    return [draw.permutation(np.flatnonzero(record[kind] == name))[:per_class] for name in largest]


def shifted(images: Tensor, by: int, generator: Generator) -> Tensor:
    """Each image moved by up to `by` pixels in both directions; what comes in is 0."""
    count, _, height, width = images.shape
    padded = F.pad(images, (by, by, by, by)).permute(0, 2, 3, 1)
    down, right = torch.randint(2 * by + 1, (2, count, 1), generator=generator)
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    moved = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


class Mosaics:
    """An image is one thing to remember: M mosaics of 4 x 4 tiles out of 16 textures, each of a random class."""

    num_classes = 16
    test_size = 8192

    def __init__(self, amount: int, seed: int) -> None:
        draw = Generator().manual_seed(10_000 + seed)
        self.cells = torch.randint(16, (amount, PLACES), generator=draw)
        self.labels = torch.randperm(amount, generator=draw) % self.num_classes
        coarse = torch.randn(16, 3, 3, 3, generator=draw)
        tiles = F.interpolate(coarse, size=(8, 8), mode="bicubic", align_corners=False)
        tiles = tiles - tiles.mean((1, 2, 3), keepdim=True)
        tiles = tiles + 0.6 * torch.randn(16, 3, 1, 1, generator=draw)
        self.tiles = torch.cat([tiles / tiles.std(), torch.zeros(1, 3, 8, 8)])  # the last: left out
        self.noise = 0.3 * torch.randn(2_000_000, generator=draw)

    def batch(self, split: str, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Images [B, 3, 32, 32], 15 % of their tiles left out, moved by at most 2 px, and labels [B]."""
        mosaics = torch.randint(len(self.cells), (count,), generator=generator)
        is_left_out = torch.rand(count, PLACES, generator=generator) < 0.15
        images = on_grid(self.tiles[torch.where(is_left_out, 16, self.cells[mosaics])])
        images = jittered(shifted(images, 2, generator), 0.2, generator)
        return images + noise_like(images, self.noise, generator), self.labels[mosaics]


class Photos:
    """Tiny-ImageNet at 32 px: 95,000 photos of 200 classes; 5,000 for validation, the official 10,000 for the test."""

    num_classes = 200

    def __init__(self, archive: Path, cache: Path) -> None:
        pixels = read_photos(archive, cache)
        order = torch.randperm(len(pixels["train"]), generator=Generator().manual_seed(12_345))
        images, labels = (
            torch.from_numpy(pixels[name])[order] for name in ("train", "train_labels")
        )
        self.splits = {
            "val": (images[:5000], labels[:5000]),
            "train": (images[5000:], labels[5000:]),
            "test": tuple(torch.from_numpy(pixels[name]) for name in ("test", "test_labels")),
        }
        sample = self.splits["train"][0][:20_000].float() / 255
        self.mean, self.std = sample.mean((0, 1, 2)), sample.std((0, 1, 2))
        self.start()

    def start(self) -> None:
        """Begin with a new epoch."""
        self.left = torch.empty(0, dtype=torch.long)

    def batch(self, split: str, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Training images [B, 3, 32, 32], moved by at most 2 px, half of them mirrored, and labels [B]."""
        images, labels = self.splits[split]
        if len(self.left) < count:
            self.left = torch.cat([self.left, torch.randperm(len(images), generator=generator)])
        index, self.left = self.left[:count], self.left[count:]
        chosen = self.normalized(images[index])
        is_mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
        chosen = torch.where(is_mirrored, chosen.flip(-1), chosen)
        return shifted(chosen, 2, generator), labels[index]

    def normalized(self, images: Tensor) -> Tensor:
        """uint8 [B, 32, 32, 3] -> [B, 3, 32, 32] around 0."""
        return ((images.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2).contiguous()


def read_photos(archive: Path, cache: Path) -> Any:
    """Pixels and labels of both splits, decoded once."""
    if not cache.exists():
        photos: dict[str, list[tuple[str, Any]]] = {"train": [], "val": []}
        with tarfile.open(archive) as files:
            for member in files:
                if member.name.endswith(".JPEG"):
                    _, split, folder, _ = member.name.split("/")
                    content = io.BytesIO(cast(Any, files.extractfile(member)).read())
                    image = np.asarray(Image.open(content).convert("RGB"))
                    photos[split].append((folder, image))
        folders = sorted({folder for folder, _ in photos["train"]})
        arrays = {}
        for split, name in (("train", "train"), ("val", "test")):
            arrays[name] = np.stack([image for _, image in photos[split]])
            labels = [folders.index(folder) for folder, _ in photos[split]]
            arrays[f"{name}_labels"] = np.array(labels)
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, **arrays)
    return np.load(cache)
