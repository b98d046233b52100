"""The domains, their images, and what the frozen trunk makes of them: tokens, kept once for all arms.

Axes: I images, N tokens, D width, C classes of a set of domains.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.queue import is_dirty
from benchmarks.specialization.trunk import PHOTO_BASE, before, evaluated, training_batches
from moevision.data import ImageDataModule, SyntheticPets
from moevision.models.io import create_from

SIDE, FIRST, SEEDS = 140, 10, range(3)  # px; the first block with experts
VALIDATION = 400  # images of a source at most
CATS = ("cat", "dog")
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGENETTE = ("tench", "English springer", "cassette player", "chain saw", "church", "French horn", "garbage truck",
              "gas pump", "golf ball", "parachute")  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Images, and how many of them are used.

    Attributes:
        classes: names in the order of the labels.
        settings: of `ImageDataModule`.
        test: images of the test split at most.
        copies: augmented ones of a training image.
    """

    classes: tuple[str, ...]
    settings: dict[str, Any]
    test: int
    copies: int = 1


SOURCES = {
    "cats": Source(CATS, {}, 832, copies=3),
    "imagenette": Source(IMAGENETTE, {"val_fraction": 0.4}, 1000),
    "cifar10": Source(CIFAR, {"val_fraction": 0.88, "test_fraction": 0.01, "cache_mb": 0}, 1000),
    "pets": Source(tuple(SyntheticPets.classes), {"train_size": 1800, "val_size": 300}, 500),
}
DOMAINS = {
    "cats and dogs": ("cats", CATS),
    "Imagenette": ("imagenette", IMAGENETTE),
    "CIFAR-10 without cat and dog": ("cifar10", tuple(name for name in CIFAR if name not in CATS)),
    "drawn pets": ("pets", SOURCES["pets"].classes),
    "Imagenette, machines": (
        "imagenette", ("cassette player", "chain saw", "French horn", "garbage truck", "gas pump")
    ),
    "Imagenette, outdoors": ("imagenette", ("tench", "English springer", "church", "golf ball", "parachute")),
    "CIFAR-10, animals": ("cifar10", ("bird", "cat", "deer", "dog", "frog", "horse")),
}  # fmt: skip
"""A domain's source and classes."""
SETS = {
    "sources": ("cats and dogs", "Imagenette", "CIFAR-10 without cat and dog"),
    "far": ("CIFAR-10, animals", "Imagenette, machines", "drawn pets"),
    "imagenette": ("Imagenette, machines", "Imagenette, outdoors"),
}
"""Domains of a set in the order in which they come; the last one is the one that is added later."""


@dataclass(frozen=True)
class Job:
    """One run on a set of domains: `experts` and what needs no training of MLPs, tuned `heads`, or `dense` models."""

    set: str
    seed: int
    trains: str = "experts"

    @property
    def name(self) -> str:
        """What its record is called."""
        return f"{self.set}-{self.trains}-s{self.seed}"


def queue(_: Sequence[Any] = ()) -> Iterator[Job]:
    """All runs: those that decide, seed by seed; then the dense models, of one seed."""
    yield from (Job(name, seed, trains) for trains in ("heads", "experts") for seed in SEEDS for name in SETS)
    yield from (Job(name, 0, "dense") for name in SETS)


def runs_of(records: Sequence[Any], name: str) -> list[Any]:
    """The clean runs of a set, by seed: one record with the answers and times of all that has this seed."""
    own = [run for run in records if run["set"] == name and "trains" in run and not is_dirty(run)]
    found = []
    for first in sorted((run for run in own if run["trains"] == "experts"), key=lambda run: int(run["seed"])):
        same = [run for run in own if run["seed"] == first["seed"]]
        parts = ("predicted", "earlier", "cpu_s")
        found.append({**first, **{part: {k: v for run in same for k, v in run[part].items()} for part in parts}})
    return found


class Images(NamedTuple):
    """What the frozen trunk makes of images.

    Attributes:
        tokens: bf16 [I, N, D] before block `FIRST`.
        seen: [I, 4 D]: `summary` of these tokens, then that of the trunk's last ones.
        labels: [I], in the set's classes.
        domains: [I], of the set.
    """

    tokens: Tensor
    seen: Tensor
    labels: Tensor
    domains: Tensor


def owners(domains: Sequence[str]) -> Tensor:
    """[C] the domain of each class of a set."""
    return torch.tensor([place for place, name in enumerate(domains) for _ in DOMAINS[name][1]])


def images_of(domains: Sequence[str], split: str, options: Namespace) -> Images:
    """The images of a set's domains, one domain after another."""
    parts, start = [], 0
    for place, name in enumerate(domains):
        source, classes = DOMAINS[name]
        found = _cached(source, split, options)
        new = torch.full((len(SOURCES[source].classes),), -1)
        for number, each in enumerate(classes):
            new[SOURCES[source].classes.index(each)] = start + number
        labels = new[found["labels"]]
        rows = labels >= 0
        parts.append(
            Images(found["tokens"][rows], found["seen"][rows], labels[rows], torch.full((int(rows.sum()),), place))
        )
        start += len(classes)
    return Images(*map(torch.cat, zip(*parts, strict=True)))


def trunk_of(options: Namespace) -> nn.Module:
    """The pretrained ViT-S/14, in eval mode."""
    return create_from(PHOTO_BASE, 2, SIDE, weights=options.pretrained).eval()


def summary(tokens: Tensor) -> Tensor:
    """Class token and mean patch [I, 2 D] of tokens [I, N, D]."""
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)


def _cached(source: str, split: str, options: Namespace) -> dict[str, Tensor]:
    """Tokens, summaries and labels of a source's split, computed once; augmented copies of `train`."""
    file: Path = options.work / f"tokens-{source}-{split}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            save_file(_computed(source, split, options), file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
    return load_file(file)


@torch.no_grad()
def _computed(source: str, split: str, options: Namespace) -> dict[str, Tensor]:
    spec, vit = SOURCES[source], cast(Any, trunk_of(options))
    path = "synthetic_pets" if source == "pets" else str(getattr(options, source))
    sizes = {"test_size": spec.test} if source == "pets" else {}
    data = ImageDataModule(
        path=path, image_size=SIDE, batch_size=32, crop="random_resized", min_crop_scale=0.5, augment="light",
        **spec.settings, **sizes,
    )  # fmt: skip
    data.setup("fit")
    if split == "train":
        batches = islice(training_batches(data), spec.copies * data.train_batches())
        images = ((batch["image"], batch["label"]) for batch in batches)
    else:
        images = evaluated(data, split, spec.test if split == "test" else VALIDATION)
    assert tuple(data.class_names) == spec.classes
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.autocast("cpu", torch.bfloat16):
        for pixels, labels in images:
            tokens = ends = before(vit, FIRST, pixels)
            for block in vit.blocks[FIRST:]:
                ends = block(ends)
            seen = torch.cat([summary(tokens.float()), summary(vit.norm(ends).float())], 1)
            found.append((tokens.bfloat16(), seen, labels.clone()))
    return dict(zip(("tokens", "seen", "labels"), map(torch.cat, zip(*found, strict=True)), strict=True))
