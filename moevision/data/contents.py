"""A dataset as one run reads it: splits, counts and warnings, images that can't be used, and images kept in memory."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import median

import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import Progress
from torch import Tensor

from moevision.data.choices import Choices
from moevision.data.collection import SPLITS, Collection, DrawnCollection, Sample
from moevision.data.dataset import BadImage, ImageDataset
from moevision.data.images import BadImageError
from moevision.data.splits import Cut, Splits, make_splits, read_splits, write_splits
from moevision.data.transforms import CropMode
from moevision.errors import UserError
from moevision.files import write_text_atomic
from moevision.names import csv_name, name_bytes, shown

ClassCounts = dict[str, dict[str, int]]
_MANY_IMAGES = 2000  # decoding more than this takes long enough for a progress bar
_MAX_RATIO = 3  # between the largest and the smallest class, before it is worth a warning
_MAX_ROWS = 20
_NUM_PROBES = 32
_SMALL_SIDE = 96  # px; up to here objects fill the frame and are shifted (pad) rather than cropped


def is_main_process() -> bool:
    """Whether this process writes the files of the run."""
    return int(getattr(rank_zero_only, "rank", 0) or 0) == 0


def split_collection(
    collection: Collection,
    cut: Cut,
    run_dir: Path | None,
    choices: Choices = Choices(),  # noqa: B008
) -> tuple[Splits, list[str]]:
    """Split a collection, or take its split from ``splits.csv`` of the run folder.

    Args:
        collection: the labelled images.
        cut: how to cut what the collection doesn't come with.
        run_dir: the run folder; None keeps no record. Drawn images need none, unless some are left out or relabelled.
        choices: which training images are used, and as what; a ``splits.csv`` that is there holds them already.

    Returns:
        The splits and the class names that their labels index.
    """
    if isinstance(collection, DrawnCollection) and not choices:
        return make_splits(collection, cut), collection.class_names
    table = None if run_dir is None else run_dir / "splits.csv"
    if table is not None and table.exists():
        return read_splits(table, collection)
    splits = choices.apply(make_splits(collection, cut), collection.class_names)
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
        """Stable name of an image: its path relative to the dataset."""
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
        """SHA-256 over the sorted (split, relative path, label) of all images, in hexadecimal."""
        return self._sha256_with(lambda dataset, sample: sample.label)

    def file_sizes_sha256(self) -> str:
        """SHA-256 over the sorted (split, relative path, stored bytes) of all images, in hexadecimal."""
        return self._sha256_with(lambda dataset, sample: dataset.collection.size_bytes(sample))

    def _sha256_with(self, number: Callable[[ImageDataset, Sample], int]) -> str:
        lines = sorted(
            f"{split}\t{sample.sample_id}\t{number(dataset, sample)}\n"
            for split, dataset in self.datasets.items()
            for sample in dataset.samples
        )
        return hashlib.sha256(name_bytes("".join(lines))).hexdigest()

    def describe(self, title: str, augmentation: str) -> str:
        """What the data are, in lines: splits, images per class, pixels, warnings.

        Args:
            title: first line, after the number of classes.
            augmentation: how training images are changed, in words.
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


class Quarantine:
    """Counts the bad images of a run once each, and stops it when they pass a share of a split."""

    def __init__(
        self,
        name_of: Callable[[str, int], str],
        sizes: dict[str, int],
        max_fraction: float,
        table: Path | None = None,
    ) -> None:
        """Start empty.

        Args:
            name_of: (split, index) -> sample id.
            sizes: number of images per split.
            max_fraction: largest share of a split that may be bad.
            table: file to write them to (columns path, reason, split), None for nowhere.
        """
        self.name_of, self.sizes, self.max_fraction, self.table = name_of, sizes, max_fraction, table
        self._reasons: dict[tuple[str, int], str] = {}

    def entries(self) -> list[tuple[str, str, str]]:
        """(path, reason, split) of every bad image, in the order they were met."""
        return [(self.name_of(split, index), reason, split) for (split, index), reason in self._reasons.items()]

    def add(self, bad: Sequence[BadImage]) -> None:
        """Record bad images.

        Args:
            bad: the images; known ones are ignored.

        Raises:
            UserError: if more than ``max_fraction`` of a split is bad.
        """
        new = {(entry.split, entry.index): entry.reason for entry in bad}
        if new.keys() <= self._reasons.keys():
            return
        self._reasons = {**self._reasons, **new}
        if self.table is not None:
            self._write(self.table)
        for split, count in Counter(split for split, _ in self._reasons).items():
            if count > self.max_fraction * self.sizes[split]:
                raise UserError(self._too_many(split, count))

    def _too_many(self, split: str, count: int) -> str:
        """The sentence that stops the run."""
        first = [f"{name}: {reason}" for name, reason, where in self.entries() if where == split][:3]
        return (
            f"{count} of {self.sizes[split]} {split} images can't be used, more than the allowed share of "
            f"{self.max_fraction:g} (--data.max_bad_fraction): mend or remove them, first {'; '.join(first)}"
        )

    def _write(self, table: Path) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", "reason", "split"])
        writer.writerows([csv_name(path), csv_name(reason), split] for path, reason, split in self.entries())
        write_text_atomic(table, text.getvalue())


def count_classes(samples: Mapping[str, Sequence[Sample]], class_names: Sequence[str]) -> ClassCounts:
    """Images per split and class name, unreadable ones included."""
    counts: ClassCounts = {}
    for split, members in samples.items():
        labels = Counter(sample.label for sample in members)
        counts[split] = {name: labels[label] for label, name in enumerate(class_names)}
    return counts


def balance_warnings(train: Mapping[str, int], weighted: bool, balanced_sampling: bool) -> list[str]:
    """Warnings: classes of very different size that nothing compensates, or that two options compensate."""
    if weighted and balanced_sampling:
        return ["class_weights and balanced_sampling both favour rare classes: use one of them"]
    largest, smallest = max(train, key=lambda name: train[name]), min(train, key=lambda name: train[name])
    if weighted or balanced_sampling or train[largest] <= _MAX_RATIO * train[smallest]:
        return []
    return [
        f"class {largest!r} has {train[largest]} training images and {smallest!r} only {train[smallest]}: "
        "consider --data.class_weights auto or --data.balanced_sampling true"
    ]


def class_weight_tensor(weights: str | dict[str, float], train: Mapping[str, int]) -> Tensor | None:
    """Weights of the loss per class, float32 [C].

    Args:
        weights: "none"; "auto", which gives class c the weight N / (C n_c), so that the mean over the N
            training images is 1; or a weight per class name, 1 for names left out.
        train: training images per class, in the order of the labels.

    Raises:
        UserError: if a name is unknown or a weight isn't above 0.
    """
    if weights == "none":
        return None
    counts = torch.tensor(list(train.values()))
    if not isinstance(weights, dict):
        return counts.sum() / (len(train) * counts)
    weights = {shown(name): weight for name, weight in weights.items()}
    for name, weight in weights.items():
        if name not in train:
            raise UserError(f"--data.class_weights names {name!r}: the classes are {', '.join(train)}")
        if not 0 < weight < math.inf:  # 0 makes the loss of a batch with such classes alone 0 / 0
            raise UserError(f"--data.class_weights gives {name!r} the weight {weight:g}: use more than 0, such as 0.01")
    return torch.tensor([float(weights.get(name, 1.0)) for name in train])


def count_table(counts: ClassCounts) -> list[str]:
    """Lines of a table with a row per class and a column per split; many classes are summed up."""
    names = list(next(iter(counts.values())))
    rows = {name: [split[name] for split in counts.values()] for name in names}
    if len(names) > _MAX_ROWS:
        rows = {
            f"{what} of the {len(names)} classes": [choose(split.values()) for split in counts.values()]
            for what, choose in (("smallest", min), ("largest", max))
        }
    rows = {**rows, "all": [sum(split.values()) for split in counts.values()]}
    width = max(len("class"), *map(len, rows))
    lines = [f"{'class':<{width}}" + "".join(f"{split:>9}" for split in counts)]
    lines += [f"{name:<{width}}" + "".join(f"{count:>9,}" for count in row) for name, row in rows.items()]
    return lines


def choose_crop(collection: Collection, samples: Sequence[Sample]) -> CropMode:
    """The crop that suits the images: "pad" for small and drawn ones, "random_resized" for photos."""
    if isinstance(collection, DrawnCollection):
        return "pad"
    short_sides = []
    for sample in samples[:: max(1, len(samples) // _NUM_PROBES)]:
        try:
            short_sides.append(min(collection.open(sample).size))
        except BadImageError:  # counted when it is decoded in its turn
            continue
    return "random_resized" if short_sides and median(short_sides) > _SMALL_SIDE else "pad"


def estimate_bytes(datasets: Iterable[ImageDataset]) -> float:
    """Bytes of all prepared images; exact for square ones, else scaled up from a few."""
    total = 0.0
    for dataset in datasets:
        mean_bytes = 3.0 * dataset.image_size**2
        if not dataset.square:
            seen = []
            for index in range(0, len(dataset), max(1, len(dataset) // _NUM_PROBES)):
                try:
                    seen.append(dataset.decode(index).nbytes)
                except BadImageError:  # counted when it is decoded in its turn
                    continue
            mean_bytes = sum(seen) / len(seen) if seen else mean_bytes
        total += len(dataset) * mean_bytes
    return total
