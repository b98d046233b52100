"""A dataset as it was read for one run: its splits, counts and warnings, and its pictures kept in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from rich.progress import Progress

from moevision.data.dataset import BadImage, ImageDataset
from moevision.data.overview import count_classes, count_table
from moevision.data.probe import estimate_bytes
from moevision.data.quarantine import Quarantine
from moevision.data.sources import SPLITS, Collection, DrawnCollection
from moevision.data.split_file import read_splits, write_splits
from moevision.data.splits import Cut, Splits, make_splits
from moevision.names import name_bytes, shown

_MANY_IMAGES = 2000  # decoding more than this takes long enough for a progress bar


def is_main_process() -> bool:
    """Whether this process writes the files of the run."""
    return int(getattr(rank_zero_only, "rank", 0) or 0) == 0


def split_collection(collection: Collection, cut: Cut, run_dir: Path | None) -> tuple[Splits, list[str]]:
    """Split a collection, or take its split from ``splits.csv`` of the run folder.

    Args:
        collection: the labelled pictures.
        cut: how to cut what the collection doesn't come with.
        run_dir: the run folder; None keeps no record. Drawn pictures need none.

    Returns:
        The splits and the class names that their labels index.
    """
    if isinstance(collection, DrawnCollection):
        return make_splits(collection, cut), collection.class_names
    table = None if run_dir is None else run_dir / "splits.csv"
    if table is not None and table.exists():
        return read_splits(table, collection)
    splits = make_splits(collection, cut)
    if table is not None and is_main_process():
        write_splits(table, splits, collection.class_names)
    return splits, collection.class_names


class Contents:
    """The datasets of a run and what is known about them.

    Attributes:
        datasets: split -> dataset.
        class_names: class names in words; labels index them.
        counts: split -> class name -> number of images.
        sentences: one sentence per split, how many images it has and where they come from.
        warnings: sentences about what the user should know.
    """

    def __init__(
        self,
        datasets: dict[str, ImageDataset],
        class_names: list[str],
        splits: Splits,
        warnings: Sequence[str],
        *,
        cache_mb: int,
        max_bad_fraction: float,
        run_dir: Path | None,
    ) -> None:
        """Hold what was read; ``cache_mb`` is in MiB, ``run_dir`` receives bad_images.csv."""
        self.datasets = datasets
        self.class_names = class_names
        self.counts = count_classes(splits.samples, class_names)
        self.sentences = splits.sentences()
        self.warnings = list(map(shown, warnings))
        self.cache_mb = cache_mb
        sizes = {split: len(samples) for split, samples in splits.samples.items()}
        table = run_dir / "bad_images.csv" if run_dir is not None and is_main_process() else None
        self.quarantine = Quarantine(self.sample_id, sizes, max_bad_fraction, table)

    def sample_id(self, split: str, index: int) -> str:
        """Stable name of a picture: its path relative to the dataset."""
        return self.datasets[split].samples[index].sample_id

    @cached_property
    def fits_memory(self) -> bool:
        """Whether the prepared pixels of all splits fit into ``cache_mb``."""
        return estimate_bytes(self.datasets.values()) <= self.cache_mb * 2**20

    def fill_caches(self, wanted: Sequence[str] = SPLITS) -> None:
        """Decode the wanted splits into memory if everything fits, with a progress bar if that takes long."""
        datasets = [self.datasets[split] for split in wanted if split in self.datasets]
        datasets = [dataset for dataset in datasets if dataset.cache is None]
        count = sum(map(len, datasets))
        if not datasets or not self.fits_memory:
            return
        with Progress(disable=count <= _MANY_IMAGES or not is_main_process(), transient=True) as progress:
            task = progress.add_task("decoding images", total=count)
            for dataset in datasets:
                bad = dataset.fill_cache(lambda done: progress.update(task, advance=done))
                self.quarantine.add([BadImage(dataset.split, i, reason) for i, reason in bad.items()])

    def file_list_sha256(self) -> str:
        """SHA-256 over the sorted (split, relative path, label) of all pictures, in hexadecimal."""
        lines = sorted(
            f"{split}\t{sample.sample_id}\t{sample.label}\n"
            for split, dataset in self.datasets.items()
            for sample in dataset.samples
        )
        return hashlib.sha256(name_bytes("".join(lines))).hexdigest()

    def file_sizes_sha256(self) -> str:
        """SHA-256 over the sorted (split, relative path, stored bytes) of all pictures, in hexadecimal."""
        lines = sorted(
            f"{split}\t{sample.sample_id}\t{dataset.collection.size_bytes(sample)}\n"
            for split, dataset in self.datasets.items()
            for sample in dataset.samples
        )
        return hashlib.sha256(name_bytes("".join(lines))).hexdigest()

    def describe(self, title: str, augmentation: str) -> str:
        """What the data are, in lines: splits, images per class, pixels, warnings.

        Args:
            title: first line, after the number of classes.
            augmentation: how training pictures are changed, in words.
        """
        size = self.datasets["train"].image_size
        where = "kept in memory" if self.fits_memory else "decoded as needed"
        lines = [f"{len(self.class_names)} classes from {title}", *self.sentences, *count_table(self.counts)]
        lines.append(f"{size} x {size} pixels, {where}; {augmentation}")
        lines += [f"warning: {sentence}" for sentence in self.warnings]
        bad = self.quarantine.entries()
        if bad:
            path, reason, split = bad[0]
            lines.append(f"warning: {len(bad)} images can't be used, the first ({split}) is {path}: {reason}")
        return "\n".join(map(shown, lines))
