"""`ImageDataModule`: any folder of images, table or named dataset as Lightning batches.

For a given seed it yields the same images in the same order with the same pixels, whatever the number of workers
and wherever the run was resumed. No image is in two splits, nothing is selected by test results, and a damaged file
stops no run.

Axes: C classes.
"""

from __future__ import annotations

import hashlib
import math
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, median

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import BatchSampler

from moevision.config import Data, Framing
from moevision.data.collection import (
    SPLITS,
    Collection,
    DrawnCollection,
    Sample,
    SplitSamples,
    check_same_classes,
)
from moevision.data.images import BadImageError, full_size
from moevision.data.loader import (
    SHM,
    BadImage,
    ImageDataset,
    ImageLoader,
    PositionSampler,
    eval_batches,
    fitting_workers,
)
from moevision.data.named import open_collection
from moevision.data.scores import apply_lists
from moevision.data.splits import (
    Splits,
    SplitSettings,
    evaluation_split,
    is_copy,
    make_splits,
    read_splits,
    write_splits,
)
from moevision.data.transforms import BatchMixer, CropMode, TrainTransform
from moevision.errors import (
    AT_LEAST_0,
    AT_LEAST_1,
    SEED,
    DataWarning,
    UserError,
    check_ranges,
    escape_controls,
    escape_csv_cell,
    name_bytes,
)
from moevision.files import csv_text, write_text_atomic
from moevision.types import Keywords, State
from moevision.words import percent

ClassCounts = dict[str, dict[str, int]]  # split -> class name -> images
# Training images from which on scores.csv (losses, margins, ... of each image) is kept only if asked for: memory.
_MAX_SCORED = 200_000
_MAX_WITHOUT_PROGRESS = 2000  # images; decoding more takes long enough for a progress bar
_MAX_CLASS_RATIO = 3  # largest class over smallest, in images; above it there is a warning
_MAX_ROWS = 20  # of the table of classes
_MAX_WORKERS = 256  # processes: no machine has use for more, and small ones end in swapping
_NUM_PROBES = 32  # images that are read to estimate sizes
_NUM_SHAPES = 100  # images whose shape is looked at
# An image isn't square if its central square leaves out more than this; said if more than this share of images is so.
_MIN_CUT = 0.05
_SMALL_SIDE = 96  # px; in images up to this size objects fill the frame, so they are shifted ("pad") and not cropped
_RANGES = (
    (*AT_LEAST_1, ("image_size", "batch_size", "train_size", "val_size", "test_size")),
    (*AT_LEAST_0, ("cache_mb", "mixup", "cutmix")),
    (
        f"at least 0 and at most {_MAX_WORKERS}",
        lambda x: 0 <= x <= _MAX_WORKERS,
        ("num_workers",),
    ),
    (
        "between 0 and 1",
        lambda x: 0 <= x <= 1,
        ("min_crop_scale", "random_erasing", "max_bad_fraction"),
    ),
    (*SEED, ("seed", "order_seed")),
)
_STAGE_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}


def is_main_process() -> bool:
    """Whether this process writes the files of the run."""
    return int(getattr(rank_zero_only, "rank", 0) or 0) == 0


@dataclass(eq=False, repr=False)
class ImageDataModule(Data, LightningDataModule):
    """Images of one folder, table or named dataset, split, augmented and batched; nothing is read before ``setup``.

    Its arguments are the fields of `moevision.config.Data`, which says what each of them is.
    """

    __hash__ = object.__hash__
    __eq__ = object.__eq__  # not by fields: of two equal modules only one may have read its images

    def __post_init__(self) -> None:
        LightningDataModule.__init__(self)
        self.keep_file = None if self.keep is None else Path(self.keep).expanduser()
        self.relabel_file = None if self.relabel is None else Path(self.relabel).expanduser()
        self.run_dir: Path | None = None
        # `val` or `test`, if all images are only evaluated, by a run that was trained on other data; else None.
        self.evaluated_as: str | None = None
        self.crop_mode: CropMode = "pad"
        self._contents: Contents | None = None
        self._class_weights: Tensor | None = None
        self.sampler: PositionSampler | None = None
        # Where the next training loader begins: epoch, and images of it that this process has read already.
        self._start = (0, 0)
        self.local_world_size = 1  # processes of this training on this machine
        check_ranges(self, _RANGES, "--data.")
        if self.scores and self.mixes:
            raise UserError(
                "--data.scores true needs images that aren't mixed with others: set --data.mixup and --data.cutmix to 0"
            )
        if not all(0 < deviation < math.inf for deviation in self.std):
            raise UserError(f"--data.std is {self.std}: every channel's deviation must be above 0")

    def _open_collection(self, download: bool) -> Collection:
        return open_collection(
            self.path,
            root=self.root,
            download=download,
            image_size=self.image_size,
            seed=self.seed,
            sizes={"train": self.train_size, "val": self.val_size, "test": self.test_size},
            columns=(self.image_column, self.label_column),
        )

    def is_of(self, run_dir: Path, path: str) -> bool:
        """Whether these images are, or copy a part of, the data at `path` that the run in `run_dir` was trained on."""
        table = run_dir / "splits.csv"
        if self.path == path:
            return True
        if not table.exists():
            return False
        data_of_run = replace(self, path=path)

        # Opened only where the files themselves don't tell.
        def collection_of_run() -> Collection | None:  # None if it is no longer there
            if not Path(path).expanduser().exists():
                return None
            return data_of_run._open_collection(download=False)

        return is_copy(table, self._open_collection(download=False), collection_of_run, part=True)

    def prepare_data(self) -> None:
        """Fetch the dataset if asked to; Lightning calls this in one process only."""
        if self.download:
            self._open_collection(download=True)

    def setup(self, stage: str | None = None) -> None:
        """Read the file list, split it, and decode what fits into memory."""
        if self._contents is None:
            download = self.download and self.trainer is None
            self._contents = self._read(self._open_collection(download))
            num_train = len(self._contents.datasets["train"])
            if num_train:
                self.batch_size = min(self.batch_size, num_train)
            self._limit_workers(self._contents)
            for sentence in self._contents.warnings:
                rank_zero_warn(sentence, category=DataWarning)
        self._contents.fill_caches(_STAGE_SPLITS.get(stage or "", SPLITS))

    def _read(self, collection: Collection) -> Contents:
        """Split the collection, and describe a dataset per split."""
        splits, class_names = self._split(collection)
        counts = count_classes(splits.samples, class_names)
        num_images = None
        if collection.multilabel:
            num_images = len(splits.samples["train"])
        self._class_weights = class_weight_tensor(self.class_weights, counts["train"], num_images)
        balance_notes = balance_warnings(
            counts["train"], self._class_weights is not None, self.balanced_sampling
        )
        self.crop_mode = (
            choose_crop(collection, splits.samples["train"]) if self.crop == "auto" else self.crop
        )
        bad_images_file = None
        if self.run_dir is not None and is_main_process():
            bad_images_file = self.run_dir / "bad_images.csv"

        notes = [*collection.notes, *splits.warnings, *balance_notes]
        return Contents(
            datasets=self._datasets(collection, splits.samples, len(class_names)),
            class_names=class_names,
            counts=counts,
            sentences=splits.sentences(),
            warnings=list(map(escape_controls, notes)),
            unreadable=UnreadableImages(splits.samples, self.max_bad_fraction, bad_images_file),
            cache_mb=self.cache_mb // self.local_world_size,
        )

    def _split(self, collection: Collection) -> tuple[Splits, list[str]]:
        """The split and its class names, from the run's splits.csv if it has one."""
        if self.evaluated_as is not None:
            return evaluation_split(self.evaluated_as, collection), collection.class_names
        has_lists = self.keep_file is not None or self.relabel_file is not None

        # The splits of drawn images follow from the settings and need no file, unless some are left out or relabelled.
        table = None
        if self.run_dir is not None and (has_lists or not isinstance(collection, DrawnCollection)):
            table = self.run_dir / "splits.csv"
        if table is not None and table.exists():
            return read_splits(table, collection)  # with --data.keep and --data.relabel applied

        settings = SplitSettings(
            self.val_fraction, self.test_fraction, self.seed, self.group_by, self.check_duplicates
        )
        splits = make_splits(collection, settings)
        splits = apply_lists(splits, collection.class_names, self.keep_file, self.relabel_file)
        if table is not None and is_main_process():
            write_splits(table, splits, collection.class_names)
        return splits, collection.class_names

    def _datasets(
        self, collection: Collection, samples: SplitSamples, num_classes: int
    ) -> dict[str, ImageDataset]:
        """A dataset per split; training images are augmented and mixed."""
        datasets = {}
        num_labels = 0
        if collection.multilabel:
            num_labels = num_classes
        for split, split_samples in samples.items():
            datasets[split] = ImageDataset(
                split,
                collection,
                split_samples,
                image_size=self.image_size,
                framing=self.framing,
                std=self.std,
                square=True,
                seed=self._order_seed,
                transform=None,
                mixer=None,
                num_labels=num_labels,
            )
        train = datasets["train"]
        # Random resized crops are cut from larger images, others from the square that the model sees.
        train.square = self.crop_mode == "pad" or self.augment == "none"
        train.transform = TrainTransform(self, self.crop_mode)
        if self.mixes:
            train.mixer = BatchMixer(self.mixup, self.cutmix, num_classes)
        return datasets

    def _limit_workers(self, contents: Contents) -> None:
        """Reduce the number of data workers to those whose batches fit into shared memory."""
        # float32 pixels and a soft label for each image, and 16 KiB for the small tensors of a batch
        image_bytes = 4 * (3 * self.image_size**2 + len(contents.class_names))
        batch_bytes = self.batch_size * image_bytes + 2**14
        workers = fitting_workers(self.num_workers, batch_bytes, self.local_world_size)
        if workers < self.num_workers:
            contents.warnings.append(
                f"{SHM} has room for the batches of {workers} of {self.num_workers} data workers: the others are left "
                "out (start the container with --shm-size=2g)"
            )
            self.num_workers = workers

    @property
    def framing(self) -> Framing:
        """How images become square."""
        return Framing(self.fit, self.mean)

    @property
    def contents(self) -> Contents:
        """What ``setup`` has read."""
        if self._contents is None:
            raise RuntimeError("the data have not been read yet: call setup() first")
        return self._contents

    @property
    def class_names(self) -> list[str]:
        """Class names in words; labels index them."""
        return self.contents.class_names

    def number_classes(self, names: list[str]) -> None:
        """Renumber the labels so that they index `names`, a model's class names; raises UserError for other classes."""
        check_same_classes("the model", names, self.path, self.class_names)
        new_labels = [names.index(name) for name in self.class_names]
        for dataset in self.contents.datasets.values():
            dataset.samples = [sample.renumbered(new_labels) for sample in dataset.samples]
        self.contents.class_names = names

    @property
    def num_classes(self) -> int:
        """Number of classes, C."""
        return len(self.class_names)

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several labels; batches then have a multi-hot `target` [B, C]."""
        return self.contents.datasets["train"].collection.multilabel

    @property
    def class_counts(self) -> ClassCounts:
        """Images per split and class name, unreadable ones included; an image counts for each of its labels."""
        return self.contents.counts

    @property
    def split_note(self) -> str:
        """One sentence per split: how many images, and where they come from."""
        return " ".join(self.contents.sentences)

    @property
    def warnings(self) -> list[str]:
        """Sentences about images that were left out, and about what to know before training."""
        return self.contents.warnings

    @property
    def bad_images(self) -> list[tuple[str, str, str]]:
        """(path, reason, split) of the images that couldn't be used so far."""
        return self.contents.unreadable.entries()

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed with one another."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def keeps_scores(self) -> bool:
        """Whether training keeps scores of its images."""
        if self.mixes or self.multilabel:
            return False
        if self.scores is None:
            return len(self.contents.datasets["train"]) < _MAX_SCORED
        return self.scores

    def sample_id(self, split: str, index: int) -> str:
        """Stable name of an image: its path relative to the dataset."""
        return self.contents.datasets[split].samples[index].sample_id

    def file_list_sha256(self) -> str:
        """SHA-256 over the sorted (split, relative path, label) of all images, in hexadecimal."""
        return self.contents.sha256_with(lambda dataset, sample: sample.labels or sample.label)

    def file_sizes_sha256(self) -> str:
        """SHA-256 over the sorted (split, relative path, file size in bytes) of all images, in hexadecimal."""
        return self.contents.sha256_with(
            lambda dataset, sample: dataset.collection.size_bytes(sample)
        )

    def class_weight_tensor(self) -> Tensor | None:
        """Weights of the loss per class, float32 [C], or None: see the function `class_weight_tensor`."""
        return self._class_weights

    def describe(self) -> str:
        """Several lines of text about the data: splits, images per class, pixels, warnings."""
        contents = self.contents
        storage = "kept in memory" if contents.fits_memory else "decoded as needed"
        total = "all"
        if self.multilabel:
            total = "all labels"
        lines = [
            f"{self.num_classes} classes from {self.path}",
            *contents.sentences,
            *count_table(contents.counts, total),
            f"{self.image_size} x {self.image_size} pixels, {storage}; augmentation {self.augment}, crop "
            f"{self.crop_mode}",
        ]
        lines += self._describe_cut()
        lines += [f"warning: {sentence}" for sentence in contents.warnings]
        if bad := self.bad_images:
            path, reason, split = bad[0]
            lines.append(
                f"warning: {len(bad)} of the images can't be used, the first ({split}) is {path}: {reason}"
            )
        return "\n".join(map(escape_controls, lines))

    def _describe_cut(self) -> list[str]:
        """What the central square of an image leaves out, by some training images, if many aren't square."""
        dataset = self.contents.datasets["train"]
        if self.fit != "crop" or not dataset.samples:
            return []
        cut_shares = []  # of each image
        for sample in dataset.samples[:: math.ceil(len(dataset) / _NUM_SHAPES)]:
            with suppress(BadImageError):
                size, _ = full_size(dataset.collection.open(sample, self.image_size))
                cut_shares.append(1 - min(size) / max(size))
        oblong = [share for share in cut_shares if share > _MIN_CUT]
        if len(oblong) <= _MIN_CUT * len(cut_shares):
            return []
        return [
            f"{percent(len(oblong) / len(cut_shares), 0)} of the images aren't square: predictions see their "
            f"central square, without {percent(fmean(oblong), 0)} of such an image. --data.fit pad keeps all of it, "
            "with borders, squash squeezes it; details get smaller, so compare on validation."
        ]

    @property
    def _order_seed(self) -> int:
        return self.seed if self.order_seed is None else self.order_seed

    def _rank_and_world(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _loader_options(self) -> Keywords:
        return {
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": _leave_signals_to_the_main_process,
            # Its own generator: otherwise every new iterator would draw from the global one and change its state.
            "generator": torch.Generator().manual_seed(self._order_seed),
            "on_bad": self.contents.unreadable.add,
        }

    def train_dataloader(self) -> ImageLoader:
        """Shuffled, augmented batches, from the position of the checkpoint if the run was resumed."""
        rank, world_size = self._rank_and_world()
        connector = getattr(self.trainer, "_accelerator_connector", None)
        if world_size > 1 and getattr(connector, "use_distributed_sampler", False):
            raise UserError(
                "Give Trainer use_distributed_sampler=False: the images are shared out already."
            )

        dataset = self.contents.datasets["train"]
        labels = [sample.label for sample in dataset.samples] if self.balanced_sampling else None
        self.sampler = PositionSampler(
            len(dataset),
            seed=self._order_seed,
            rank=rank,
            world_size=world_size,
            balanced_labels=labels,
        )
        self.sampler.seek(*self._start)
        self._start = (0, 0)  # another fit with this module begins at the first image

        return ImageLoader(
            dataset,
            sampler=self.sampler,
            batch_size=self.batch_size,
            drop_last=len(self.sampler) >= self.batch_size,
            **self._loader_options(),
        )

    def train_batches(self, world_size: int) -> int:
        """Batches of a training epoch on each of `world_size` processes."""
        num_images = len(self.contents.datasets["train"]) // world_size  # of one process
        # The last batch is dropped unless it is the only one.
        return max(num_images // self.batch_size, int(num_images > 0))

    def _eval_dataloader(self, split: str) -> ImageLoader:
        dataset = self.contents.datasets.get(split)
        if dataset is None:
            raise UserError(f"there is no {split} set: splits.csv lists no image of it")
        batches = eval_batches(len(dataset), self.batch_size, *self._rank_and_world())
        return ImageLoader(dataset, batch_sampler=batches, **self._loader_options())

    def val_dataloader(self) -> ImageLoader:
        """Validation batches, in order, without randomness."""
        return self._eval_dataloader("val")

    def test_dataloader(self) -> ImageLoader:
        """Test batches, in order, without randomness."""
        return self._eval_dataloader("test")

    def plain_loader(self, split: str, indices: Sequence[int] | None = None) -> ImageLoader:
        """Batches of a split, or of its images `indices`, without shuffling and augmentation; all on this process."""
        dataset = self.contents.datasets[split]
        if split == "train":
            dataset = replace(dataset, square=True, transform=None, mixer=None)
        if indices is None:
            indices = range(len(dataset))
        batches = BatchSampler(indices, self.batch_size, drop_last=False)
        return ImageLoader(dataset, batch_sampler=batches, **self._loader_options())

    def state_dict(self) -> State:
        """Position of the next training batch: epoch, and number in it, in batches of `batch_size` · `world_size`."""
        sampler = self.sampler
        # Before an epoch that begins, or at a place within it where a run goes on.
        epoch, start = self._start if sampler is None else (sampler.epoch, sampler.start)
        batch = start // self.batch_size
        # Within an epoch that is being read.
        if sampler is not None and sampler.running_epoch is not None and self.trainer is not None:
            epoch = sampler.running_epoch
            batch = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
            if batch >= self.trainer.num_training_batches:  # the epoch is over: the next one starts
                epoch, batch = epoch + 1, 0
        _, world_size = self._rank_and_world()
        return {
            "epoch": epoch,
            "batch": batch,
            "batch_size": self.batch_size,
            "world_size": world_size,
        }

    def load_state_dict(self, state_dict: State) -> None:
        """Let training go on at the position `state_dict`; warns if batch size or number of processes changed."""
        _, world_size = self._rank_and_world()
        for name, value in {"batch_size": self.batch_size, "world_size": world_size}.items():
            if state_dict[name] != value and getattr(self.trainer, "training", True):
                rank_zero_warn(
                    f"the run began with {name} {state_dict[name]} and goes on with {value}: the order of "
                    "the images can't be repeated exactly"
                )
        # Images of the epoch that all processes together have read; each has its share of them.
        num_read = state_dict["batch"] * state_dict["batch_size"] * state_dict["world_size"]
        self._start = (int(state_dict["epoch"]), int(num_read // world_size))


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Let workers ignore signals that a terminal or a cluster sends to every process.

    They must go on until the main process, which may save a checkpoint first, ends.
    """
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


@dataclass
class Contents:
    """The split dataset that `ImageDataModule.setup` has read."""

    datasets: dict[str, ImageDataset]  # split -> dataset
    class_names: list[str]  # class names in words; labels index them
    counts: ClassCounts  # split -> class name -> number of images
    sentences: list[str]  # one sentence per split, how many images it has and where they come from
    warnings: list[str]  # sentences about what the user should know
    unreadable: UnreadableImages  # images that turned out to be damaged
    cache_mb: int  # MiB; decoded images are kept in memory if those of all splits fit

    @cached_property
    def fits_memory(self) -> bool:
        """Whether the prepared pixels of all splits fit into ``cache_mb``."""
        return estimate_bytes(self.datasets.values()) <= self.cache_mb * 2**20

    def fill_caches(self, splits: Sequence[str]) -> None:
        """Decode the images of `splits` into memory if all splits fit, with a progress bar if there are many."""
        datasets = [
            dataset
            for split, dataset in self.datasets.items()
            if split in splits and dataset.cache is None
        ]
        if not datasets or not self.fits_memory:
            return
        count = sum(map(len, datasets))
        is_quick = count <= _MAX_WITHOUT_PROGRESS
        with Progress(disable=is_quick or not is_main_process(), transient=True) as progress:
            task = progress.add_task("decoding images", total=count)
            for dataset in datasets:
                bad = dataset.fill_cache(lambda done: progress.update(task, advance=done))
                self.unreadable.add(bad)

    def sha256_with(self, value_of: Callable[[ImageDataset, Sample], object]) -> str:
        """SHA-256 over the sorted (split, relative path, `value_of`) of all images, in hexadecimal."""
        lines = [
            f"{split}\t{sample.sample_id}\t{value_of(dataset, sample)}\n"
            for split, dataset in self.datasets.items()
            for sample in dataset.samples
        ]
        return hashlib.sha256(name_bytes("".join(sorted(lines)))).hexdigest()


class UnreadableImages:
    """Collects the damaged images of a run, and stops it when they are more than a share of a split."""

    def __init__(
        self,
        samples: SplitSamples,
        max_fraction: float,
        table: Path | None = None,
    ) -> None:
        """``table`` is the CSV file that they are written to (columns path, reason, split), if any."""
        self.samples = samples
        self.max_fraction = max_fraction
        self.table = table
        self._reasons: dict[tuple[str, int], str] = {}  # (split, index) -> reason

    def entries(self) -> list[tuple[str, str, str]]:
        """(path, reason, split) of every bad image, in the order in which they were found."""
        return [
            (self.samples[split][index].sample_id, reason, split)
            for (split, index), reason in self._reasons.items()
        ]

    def add(self, bad: Sequence[BadImage]) -> None:
        """Record bad images, each once; raises UserError if more than ``max_fraction`` of a split is bad."""
        new = {(entry.split, entry.index): entry.reason for entry in bad}
        if new.keys() <= self._reasons.keys():
            return
        self._reasons = {**self._reasons, **new}
        if self.table is not None:
            rows = [[escape_csv_cell(cell) for cell in entry] for entry in self.entries()]
            write_text_atomic(self.table, csv_text(("path", "reason", "split"), rows))
        for split, count in Counter(split for split, _ in self._reasons).items():
            self._check_share(split, count)

    def _check_share(self, split: str, count: int) -> None:
        size = len(self.samples[split])
        if count <= self.max_fraction * size:
            return
        entries = [f"{path}: {reason}" for path, reason, where in self.entries() if where == split]
        raise UserError(
            f"{count} of {size} {split} images can't be used, more than the allowed share of {self.max_fraction:g} "
            f"(--data.max_bad_fraction): mend or remove them, first {'; '.join(entries[:3])}"
        )


def count_classes(samples: SplitSamples, class_names: Sequence[str]) -> ClassCounts:
    """Images per split and class name."""
    counts = {}
    for split, split_samples in samples.items():
        label_counts = Counter(label for sample in split_samples for label in sample.all_labels)
        counts[split] = {name: label_counts[label] for label, name in enumerate(class_names)}
    return counts


def balance_warnings(
    train: Mapping[str, int], weighted: bool, balanced_sampling: bool
) -> list[str]:
    """Warn if class sizes differ a lot and no option compensates that.

    `train` are the training images per class; `weighted` says whether the loss has class weights.
    """
    largest = max(train, key=train.__getitem__)
    smallest = min(train, key=train.__getitem__)
    if weighted or balanced_sampling or train[largest] <= _MAX_CLASS_RATIO * train[smallest]:
        return []
    return [
        f"class {largest!r} has {train[largest]} training images and {smallest!r} only {train[smallest]}: "
        "consider --data.class_weights auto or --data.balanced_sampling true"
    ]


def class_weight_tensor(
    weights: str | dict[str, float], train: Mapping[str, int], num_images: int | None = None
) -> Tensor | None:
    """Weights of the loss per class, float32 [C]; `train` are the training images n_c per class, sorted by label.

    "auto" weighs class c by 1 / n_c; a dictionary has the weights of some classes, the others get 1. Only ratios count:
    weights are divided by their mean over the N training images, so that "auto" is N / (C n_c).

    Where images have several labels (`num_images` is N), a weight is that of the images with the label beside those
    without: "auto" is (N - n_c) / n_c, at least 1 / N, and a dictionary's weights stay as they are.
    """
    if weights == "none":
        return None
    counts = torch.tensor(list(train.values()))  # [C]
    if not isinstance(weights, dict):
        if num_images is not None:
            return ((num_images - counts) / counts).clamp_min(1 / num_images)
        return _with_mean_1(1 / counts, counts)

    # YAML reads a class called 7 as a number.
    by_name = {escape_controls(str(name)): float(weight) for name, weight in weights.items()}
    for name, weight in by_name.items():
        if name not in train:
            raise UserError(
                f"--data.class_weights names {name!r}: the classes are {', '.join(train)}"
            )
        if not 0 < weight < math.inf:
            raise UserError(
                f"--data.class_weights gives {name!r} the weight {weight:g}: use more than 0, such as 0.01"
            )
    by_class = torch.tensor([by_name.get(name, 1.0) for name in train])
    if num_images is not None:
        return by_class
    return _with_mean_1(by_class, counts)


def _with_mean_1(weights: Tensor, counts: Tensor) -> Tensor:
    """Scale weights [C] so that their mean over all images is 1; each class has `counts` [C] images."""
    return weights * counts.sum() / (weights * counts).sum()


def count_table(counts: ClassCounts, total: str = "all") -> list[str]:
    """Lines of a table with a row per class and a column per split; of many classes only the extremes and the sum.

    `total` is the name of the sum's row.
    """
    columns = [list(split.values()) for split in counts.values()]
    class_names = list(next(iter(counts.values())))
    # Class name -> its number in each split.
    rows = dict(zip(class_names, zip(*columns, strict=True), strict=True))
    if len(class_names) > _MAX_ROWS:
        rows = {
            f"smallest of the {len(class_names)} classes": tuple(map(min, columns)),
            f"largest of the {len(class_names)} classes": tuple(map(max, columns)),
        }
    rows[total] = tuple(map(sum, columns))
    width = max(len("class"), *map(len, rows))
    lines = [f"{'class':<{width}}" + "".join(f"{split:>9}" for split in counts)]
    for name, row in rows.items():
        lines.append(f"{name:<{width}}" + "".join(f"{count:>9,}" for count in row))
    return lines


def choose_crop(collection: Collection, samples: Sequence[Sample]) -> CropMode:
    """The crop that suits the images: "pad" for small and drawn ones, "random_resized" for photos."""
    if isinstance(collection, DrawnCollection):
        return "pad"
    short_sides = []
    for sample in samples[:: max(1, len(samples) // _NUM_PROBES)]:
        try:
            short_sides.append(min(collection.open(sample).size))
        except BadImageError:  # it is reported when it is decoded for a batch
            continue
    return "random_resized" if short_sides and median(short_sides) > _SMALL_SIDE else "pad"


def estimate_bytes(datasets: Iterable[ImageDataset]) -> float:
    """Bytes of all prepared images: exact if they are square, else by the mean of a few of them."""
    total = 0.0
    for dataset in datasets:
        image_bytes = 3.0 * dataset.image_size**2
        if not dataset.square:
            step = max(1, len(dataset) // _NUM_PROBES)
            probes = map(dataset.pixels, range(0, len(dataset), step))
            sizes = [
                image.nbytes for image in probes if not isinstance(image, str)
            ]  # str: unreadable
            if sizes:
                image_bytes = fmean(sizes)
        total += len(dataset) * image_bytes
    return total
