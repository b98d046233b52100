"""`ImageDataModule`: any folder of images, or a dataset by name, as Lightning batches.

For a given seed it yields the same images in the same order with the same pixels, whatever the number of workers
and wherever the run was resumed. No image is on two sides of a split, nothing is selected on the set that is
reported, and a damaged file stops no run. This class is a thin shell: `Contents` holds what was read.

Axis legend: B batch, C classes, S = ``image_size``.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from moevision.config import Data
from moevision.data.choices import Choices
from moevision.data.contents import (
    ClassCounts,
    Contents,
    balance_warnings,
    choose_crop,
    class_weight_tensor,
    count_classes,
    split_collection,
)
from moevision.data.dataset import ImageDataset
from moevision.data.loader import SHM, Collate, ImageLoader, PositionSampler, eval_batches, fitting_workers
from moevision.data.shards import INDEX, find_index, is_shards
from moevision.data.sources import DATASET_NAMES, SPLITS, Collection, open_collection
from moevision.data.splits import Cut, is_copy
from moevision.data.transforms import BatchMixer, CropMode, TrainTransform
from moevision.errors import AT_LEAST_0, AT_LEAST_1, SEED, DataWarning, UserError, check_ranges

_MANY_IMAGES = 200_000  # from here on scores are kept only if asked for: they take memory
_STAGE_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}


@dataclass(eq=False, repr=False)
class ImageDataModule(Data, LightningDataModule):
    """Images of one folder, table or named dataset, split, augmented and batched; nothing is read before ``setup``.

    Its arguments are the fields of `moevision.config.Data`, which says what each of them is.

    Raises:
        UserError: If a value is out of range.
    """

    __hash__ = object.__hash__
    __eq__ = object.__eq__  # one's images are read already, another's not

    def __post_init__(self) -> None:
        LightningDataModule.__init__(self)
        self.columns = (self.image_column, self.label_column)
        kept, relabelled = (None if file is None else Path(file).expanduser() for file in (self.keep, self.relabel))
        self.choices = Choices(kept, relabelled)
        self.run_dir: Path | None = None
        self.crop_mode: CropMode = "pad"
        self._contents: Contents | None = None
        self._class_weights: Tensor | None = None
        self.sampler: PositionSampler | None = None
        self._start = (0, 0)
        self.processes = 1  # of this training on this machine
        self.in_step = False  # whether processes wait for one another at every batch of an evaluation
        self._check_arguments()

    def _check_arguments(self) -> None:
        """Refuse values that no run could use."""
        ranges = (
            (*AT_LEAST_1, ("image_size", "batch_size", "train_size", "val_size", "test_size")),
            (*AT_LEAST_0, ("num_workers", "cache_mb", "mixup", "cutmix")),
            ("between 0 and 1", lambda x: 0 <= x <= 1, ("min_crop_scale", "random_erasing", "max_bad_fraction")),
            (*SEED, ("seed", "order_seed")),
        )
        check_ranges(self, ranges, "--data.")
        if self.scores and self.mixes:
            raise UserError(
                "--data.scores true needs images that aren't mixed with others: set --data.mixup and --data.cutmix to 0"
            )
        if not all(0 < each < math.inf for each in self.std):
            raise UserError(f"--data.std is {self.std}: every channel's deviation must be above 0")

    def is_of_run(self, table: Path, path: str) -> bool:
        """Whether these are the images of a run, or a copy of them.

        Args:
            table: the run's splits.csv.
            path: where its images were.

        Raises:
            UserError: if the images or the table can't be read.
        """
        place, other = (None if each in DATASET_NAMES else Path(each).expanduser() for each in (path, self.path))
        if path == self.path or (place and other and place.resolve() == other.resolve()):
            return True
        is_there = place is not None and place.exists()
        return is_copy(
            table, self._open_collection(False), lambda: self._open_collection(False, path) if is_there else None
        )

    def _open_collection(self, download: bool, path: str | None = None) -> Collection:
        sizes = {"train": self.train_size, "val": self.val_size, "test": self.test_size}
        return open_collection(
            path or self.path,
            root=self.root,
            download=download,
            image_size=self.image_size,
            seed=self.seed,
            sizes=sizes,
            columns=self.columns,
        )

    def prepare_data(self) -> None:
        """Fetch the dataset if asked to, and index tar shards; Lightning calls this in one process only."""
        if self.download:
            self._open_collection(download=True)
        elif is_shards(folder := Path(self.path).expanduser()) and not (folder / INDEX).is_file():
            find_index(folder)

    def setup(self, stage: str | None = None) -> None:
        """Read the file list, split it, and decode what fits into memory.

        Args:
            stage: "fit", "validate", "test", or None for all splits.

        Raises:
            UserError: If the data are missing, laid out otherwise, or too many files are bad.
        """
        if self._contents is None:
            self._contents = self._read(self._open_collection(self.download and self.trainer is None))
            self.batch_size = max(1, min(self.batch_size, len(self._contents.datasets["train"])))
            self._limit_workers(self._contents)
            for sentence in self._contents.warnings:
                rank_zero_warn(sentence, category=DataWarning)
        self._contents.fill_caches(_STAGE_SPLITS.get(stage or "", SPLITS))

    def _read(self, collection: Collection) -> Contents:
        """Split the collection and describe a dataset per split."""
        cut = Cut(self.val_fraction, self.test_fraction, self.seed, self.group_by, self.check_duplicates)
        splits, class_names = split_collection(collection, cut, self.run_dir, self.choices)
        train = count_classes(splits.samples, class_names)["train"]
        self._class_weights = class_weight_tensor(self.class_weights, train)
        imbalance = balance_warnings(train, self._class_weights is not None, self.balanced_sampling)
        self.crop_mode = choose_crop(collection, splits.samples["train"]) if self.crop == "auto" else self.crop
        datasets = {
            split: ImageDataset(
                split,
                collection,
                samples,
                image_size=self.image_size,
                square=split != "train" or self.crop_mode == "pad" or self.augment == "none",
                seed=self._order_seed,
                transform=self._train_transform() if split == "train" else None,
            )
            for split, samples in splits.samples.items()
        }
        return Contents(
            datasets,
            class_names,
            splits,
            [*collection.notes, *splits.warnings, *imbalance],
            cache_mb=self.cache_mb,
            max_bad_fraction=self.max_bad_fraction,
            run_dir=self.run_dir,
        )

    def _limit_workers(self, contents: Contents) -> None:
        """Leave out data workers for whose batches the shared memory has no room."""
        # float32 pixels and a soft target; and a page or two for each small tensor
        batch_bytes = self.batch_size * 4 * (3 * self.image_size**2 + len(contents.class_names)) + 2**14
        workers = fitting_workers(self.num_workers, batch_bytes, self.processes)
        if workers < self.num_workers:
            contents.warnings.append(
                f"{SHM} has room for the batches of {workers} of {self.num_workers} data workers: the others are left "
                "out (start the container with --shm-size=2g)"
            )
            self.num_workers = workers

    def _train_transform(self) -> TrainTransform:
        return TrainTransform(
            self.image_size,
            augment=self.augment,
            crop=self.crop_mode,
            min_crop_scale=self.min_crop_scale,
            hflip=self.hflip,
            random_erasing=self.random_erasing,
            mean=self.mean,
        )

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

    @property
    def num_classes(self) -> int:
        """Number of classes, C."""
        return len(self.class_names)

    @property
    def class_counts(self) -> ClassCounts:
        """Images per split and class name, unreadable ones included."""
        return self.contents.counts

    @property
    def split_note(self) -> str:
        """One sentence per split: how many images, and where they come from."""
        return " ".join(self.contents.sentences)

    @property
    def warnings(self) -> list[str]:
        """Sentences about what was left out while reading, or should be known before training."""
        return self.contents.warnings

    @property
    def bad_images(self) -> list[tuple[str, str, str]]:
        """(path, reason, split) of the images that couldn't be used so far."""
        return self.contents.quarantine.entries()

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed with one another."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def keeps_scores(self) -> bool:
        """Whether training keeps scores of its images."""
        few = len(self.contents.datasets["train"]) < _MANY_IMAGES
        return not self.mixes and (few if self.scores is None else self.scores)

    def sample_id(self, split: str, index: int) -> str:
        """Stable name of an image: its path relative to the dataset."""
        return self.contents.sample_id(split, index)

    def file_list_sha256(self) -> str:
        """SHA-256 over the sorted (split, relative path, label) of all images, in hexadecimal."""
        return self.contents.file_list_sha256()

    def file_sizes_sha256(self) -> str:
        """SHA-256 over the sorted (split, relative path, stored bytes) of all images, in hexadecimal."""
        return self.contents.file_sizes_sha256()

    def class_weight_tensor(self) -> Tensor | None:
        """Weights of the loss per class, float32 [C], or None; "auto" has mean 1 over the training images."""
        return self._class_weights

    def describe(self) -> str:
        """What the data are, in lines: splits, images per class, pixels, warnings."""
        return self.contents.describe(self.path, f"augmentation {self.augment}, crop {self.crop_mode}")

    @property
    def _order_seed(self) -> int:
        return self.seed if self.order_seed is None else self.order_seed

    def _rank_and_world(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _loader_options(self, mixer: BatchMixer | None = None) -> dict[str, Any]:
        """What all loaders have in common."""
        return {
            "num_workers": self.num_workers,
            "collate_fn": Collate(self.mean, self.std, self._order_seed, mixer),
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": _leave_signals_to_the_main_process,
            # own generator: otherwise every new iterator would draw from, and so move, the global one
            "generator": torch.Generator().manual_seed(self._order_seed),
            "on_bad": self.contents.quarantine.add,
        }

    def train_dataloader(self) -> ImageLoader:
        """Shuffled, augmented batches, from the position that a checkpoint recorded."""
        rank, world_size = self._rank_and_world()
        connector = getattr(self.trainer, "_accelerator_connector", None)
        if world_size > 1 and getattr(connector, "use_distributed_sampler", False):
            raise UserError("set --trainer.use_distributed_sampler false: the images are shared out already")
        dataset = self.contents.datasets["train"]
        labels = [sample.label for sample in dataset.samples] if self.balanced_sampling else None
        self.sampler = PositionSampler(
            len(dataset), seed=self._order_seed, rank=rank, world_size=world_size, balanced_labels=labels
        )
        self.sampler.seek(*self._start)
        self._start = (0, 0)  # used up: another fit with this module begins at the beginning
        mixer = BatchMixer(self.mixup, self.cutmix, self.num_classes) if self.mixes else None
        return ImageLoader(
            dataset,
            sampler=self.sampler,
            batch_size=self.batch_size,
            drop_last=len(self.sampler) >= self.batch_size,
            **self._loader_options(mixer),
        )

    def train_batches(self, world_size: int | None = None) -> int:
        """Batches of a training epoch, for each of so many processes; None: of those of the trainer."""
        own = len(self.contents.datasets["train"]) // (world_size or self._rank_and_world()[1])
        return max(own // self.batch_size, int(own > 0))  # see drop_last above

    def _eval_dataloader(self, split: str) -> ImageLoader:
        dataset = self.contents.datasets.get(split)
        if dataset is None:
            raise UserError(f"there is no {split} set: splits.csv lists no image of it")
        batches = eval_batches(len(dataset), self.batch_size, *self._rank_and_world())
        return ImageLoader(dataset, in_step=self.in_step, batch_sampler=batches, **self._loader_options())

    def val_dataloader(self) -> ImageLoader:
        """Validation batches, in order, without randomness."""
        return self._eval_dataloader("val")

    def test_dataloader(self) -> ImageLoader:
        """Test batches, in order, without randomness."""
        return self._eval_dataloader("test")

    def plain_loader(self, split: str, indices: Sequence[int] | None = None) -> ImageLoader:
        """Batches of a split (or of some of its images) in order, prepared as for evaluation, on this process alone."""
        known = self.contents.datasets[split]
        dataset = known
        if split == "train":
            dataset = ImageDataset(
                split, known.collection, known.samples, image_size=self.image_size, square=True, seed=self.seed
            )
        wanted = list(range(len(dataset)) if indices is None else indices)
        batches = [wanted[start : start + self.batch_size] for start in range(0, len(wanted), self.batch_size)]
        return ImageLoader(dataset, batch_sampler=batches, **{**self._loader_options(), "persistent_workers": False})

    def state_dict(self) -> dict[str, Any]:
        """Where training stands: {epoch, batch} of the next batch, and what gives these numbers a meaning."""
        sampler = self.sampler
        epoch, start = self._start if sampler is None else (sampler.epoch, sampler.start)
        batch = start // self.batch_size
        if sampler is not None and sampler.running_epoch is not None and self.trainer is not None:
            epoch = sampler.running_epoch
            batch = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
            if batch >= self.trainer.num_training_batches:  # the last batch of an epoch: the next one starts
                epoch, batch = epoch + 1, 0
        _, world_size = self._rank_and_world()
        return {"epoch": epoch, "batch": batch, "batch_size": self.batch_size, "world_size": world_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's position; another batch size or process count gets a warning."""
        now = {"batch_size": self.batch_size, "world_size": self._rank_and_world()[1]}
        for name, value in now.items():
            if state_dict[name] != value:
                rank_zero_warn(
                    f"the run began with {name} {state_dict[name]} and goes on with {value}: the order of "
                    "the images can't be repeated exactly"
                )
        read = state_dict["batch"] * state_dict["batch_size"] * state_dict["world_size"]  # by all processes
        self._start = (int(state_dict["epoch"]), int(read // now["world_size"]))


def _leave_signals_to_the_main_process(worker: int) -> None:
    """A terminal or a cluster signals every process: workers go on until the main process, which may save, ends."""
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
