"""`ImageDataModule`: any folder of images, or a dataset by name, as Lightning batches.

What it promises: the same pictures in the same order with the same pixels for a given seed, whatever the number
of workers and wherever the run was resumed; no image on two sides of a split; nothing selected on the set that
is reported; and no run that a damaged file stops.

Axis legend: B batch, C classes, S = ``image_size``.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.progress import Progress
from torch import Tensor

from moevision.data.augment import Augment, BatchMixer, TrainTransform
from moevision.data.dataset import BadImage, Collate, ImageDataset, ImageLoader
from moevision.data.named import open_collection
from moevision.data.overview import (
    ClassCounts,
    balance_warnings,
    class_weight_tensor,
    count_classes,
    count_table,
)
from moevision.data.probe import choose_crop, estimate_bytes
from moevision.data.quarantine import Quarantine
from moevision.data.sampler import PositionSampler, eval_batches
from moevision.data.sources import SPLITS, Collection, DrawnCollection
from moevision.data.splits import Splits, make_splits, read_splits, write_splits
from moevision.errors import UserError

_STAGE_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}


class ImageDataModule(LightningDataModule):
    """Images of one folder or named dataset, split, augmented and batched."""

    def __init__(
        self,
        path: str = "synthetic_pets",
        root: str = "data",
        download: bool = False,
        image_size: int = 64,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        group_by: str | None = None,
        check_duplicates: bool = True,
        augment: Augment = "light",
        crop: Literal["auto", "pad", "random_resized"] = "auto",
        min_crop_scale: float = 0.25,
        hflip: bool = True,
        random_erasing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        class_weights: Literal["none", "auto"] | dict[str, float] = "none",
        balanced_sampling: bool = False,
        cache_mb: int = 4096,
        max_bad_fraction: float = 0.05,
        train_size: int = 16_000,
        val_size: int = 1_000,
        test_size: int = 2_000,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
    ) -> None:
        """Describe the data; nothing is read before ``setup``.

        Args:
            path: A folder with one subfolder per class (also inside train/, val/, test/), or one of synthetic_pets,
                cifar10, cifar100, imagenette, pets, pets_cat_dog, flowers102, food101, imagenet.
            root: Folder in which named datasets live.
            download: Fetch a named dataset that is not in root.
            image_size: Side of the square pictures the model sees, in pixels.
            batch_size: Pictures per batch and process.
            num_workers: Processes that prepare batches; 0 prepares them in the main process.
            seed: Seed of the split, the order, the augmentation and the drawn pictures.
            val_fraction: Share of the images cut for validation, where the dataset has no validation set.
            test_fraction: Share cut for the test, where the dataset came unsplit; 0 cuts none.
            group_by: Keep files together on one side of the split: "parent" (their folder), or a regular expression
                with one group that is searched in the relative path.
            check_duplicates: Keep byte-identical files on one side of the split.
            augment: Random changes of training pictures: none, light (crop and flip), or in addition
                randaugment (arXiv:1909.13719) or trivialaugment (arXiv:2103.10158).
            crop: How training pictures are cropped: pad (by image_size / 8, for small pictures), random_resized
                (for photos), or auto (pad when the pictures' short side is at most 96 pixels or they are drawn).
            min_crop_scale: Smallest share of a picture's area that a random_resized crop keeps.
            hflip: Mirror half of the training pictures.
            random_erasing: Probability that a random rectangle of a training picture is erased (arXiv:1708.04896).
            mixup: Alpha of Mixup's Beta distribution (arXiv:1710.09412); 0 is off.
            cutmix: Alpha of CutMix's Beta distribution (arXiv:1905.04899); 0 is off. With both, each batch gets
                one of the two at random.
            class_weights: Weights of the loss per class: none, auto (inverse frequency, mean 1 over the images),
                or a weight per class name (1 for names left out).
            balanced_sampling: Draw every class equally often in training.
            cache_mb: Keep the decoded pictures in memory if they fit into this many MiB.
            max_bad_fraction: Stop when a larger share of a split's images can't be read.
            train_size: Number of training pictures of synthetic_pets.
            val_size: Number of validation pictures of synthetic_pets.
            test_size: Number of test pictures of synthetic_pets.
            mean: Mean per colour channel that is subtracted, for pixels in [0, 1]; ImageNet's by default.
            std: Deviation per colour channel that is divided by; ImageNet's by default.

        Raises:
            UserError: If a value is out of range.
        """
        super().__init__()
        self.path, self.root, self.download = path, root, download
        self.image_size, self.batch_size, self.num_workers, self.seed = (
            image_size,
            batch_size,
            num_workers,
            seed,
        )
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.group_by, self.check_duplicates = group_by, check_duplicates
        self.augment, self.crop, self.min_crop_scale, self.hflip = augment, crop, min_crop_scale, hflip
        self.random_erasing, self.mixup, self.cutmix = random_erasing, mixup, cutmix
        self.class_weights, self.balanced_sampling = class_weights, balanced_sampling
        self.cache_mb, self.max_bad_fraction = cache_mb, max_bad_fraction
        self.train_size, self.val_size, self.test_size = train_size, val_size, test_size
        self.mean, self.std = mean, std
        self.run_dir: Path | None = None
        self.class_names: list[str] = []
        self.class_counts: ClassCounts = {}
        self.split_sentences: list[str] = []
        self.warnings: list[str] = []
        self.datasets: dict[str, ImageDataset] = {}
        self.sampler: PositionSampler | None = None
        self._position = {"epoch": 0, "batch": 0, "batch_size": batch_size}
        self._check_arguments()

    def _check_arguments(self) -> None:
        """Refuse values that no run could use."""
        bounds = {
            **dict.fromkeys(("image_size", "batch_size", "train_size", "val_size", "test_size"), (1, None)),
            **dict.fromkeys(("num_workers", "cache_mb", "mixup", "cutmix"), (0, None)),
            **dict.fromkeys(("min_crop_scale", "random_erasing", "max_bad_fraction"), (0, 1)),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                allowed = f"at least {low}" if high is None else f"between {low} and {high}"
                raise UserError(f"--data.{name} is {value:g}: it must be {allowed}")
        if min(self.std) <= 0:
            raise UserError(f"--data.std is {self.std}: every channel's deviation must be above 0")

    def _open_collection(self, download: bool) -> Collection:
        return open_collection(
            self.path,
            root=self.root,
            download=download,
            image_size=self.image_size,
            seed=self.seed,
            sizes={"train": self.train_size, "val": self.val_size, "test": self.test_size},
        )

    def prepare_data(self) -> None:
        """Fetch the dataset if asked to; Lightning calls this in one process only."""
        if self.download:
            self._open_collection(download=True)

    def setup(self, stage: str | None = None) -> None:
        """Read the file list, split it, and decode what fits into memory.

        Args:
            stage: "fit", "validate", "test", or None for all splits.

        Raises:
            UserError: If the data are missing, laid out otherwise, or too many files are bad.
        """
        if not self.datasets:
            self._read(self._open_collection(self.download and self.trainer is None))
        wanted = _STAGE_SPLITS.get(stage or "", SPLITS)
        datasets = [self.datasets[split] for split in wanted if split in self.datasets]
        if self.fits_memory:
            self._fill_caches([dataset for dataset in datasets if dataset.cache is None])

    def _read(self, collection: Collection) -> None:
        """Split the collection and build the datasets."""
        self.warnings = list(collection.notes)
        splits, self.class_names = self._split(collection)
        self.warnings += splits.warnings
        self.split_sentences = splits.sentences()
        self.class_counts = count_classes(splits.samples, self.class_names)
        weighted = class_weight_tensor(self.class_weights, self.class_counts["train"]) is not None
        self.warnings += balance_warnings(self.class_counts["train"], weighted, self.balanced_sampling)
        self.crop_mode = (
            choose_crop(collection, splits.samples["train"]) if self.crop == "auto" else self.crop
        )
        for split, samples in splits.samples.items():
            training = split == "train"
            square = not training or self.crop_mode == "pad" or self.augment == "none"
            self.datasets[split] = ImageDataset(
                split,
                collection,
                samples,
                image_size=self.image_size,
                square=square,
                seed=self.seed,
                transform=self._train_transform() if training else None,
            )
        sizes = {split: len(samples) for split, samples in splits.samples.items()}
        self._quarantine = Quarantine(self.sample_id, sizes, self.max_bad_fraction)
        for sentence in self.warnings:
            rank_zero_warn(sentence)

    def _split(self, collection: Collection) -> tuple[Splits, list[str]]:
        """The splits and their class names, from splits.csv of the run folder if it is there."""
        table = (
            None
            if self.run_dir is None or isinstance(collection, DrawnCollection)
            else self.run_dir / "splits.csv"
        )
        if table is not None and table.exists():
            return read_splits(table, collection)
        splits = make_splits(
            collection,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            seed=self.seed,
            group_by=self.group_by,
            check_duplicates=self.check_duplicates and not isinstance(collection, DrawnCollection),
        )
        if table is not None and rank_zero_only.rank == 0:
            write_splits(table, splits, collection.class_names)
        return splits, collection.class_names

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

    @cached_property
    def fits_memory(self) -> bool:
        """Whether the prepared pixels of all splits fit into ``cache_mb``."""
        return estimate_bytes(self.datasets.values()) <= self.cache_mb * 2**20

    def _fill_caches(self, datasets: list[ImageDataset]) -> None:
        """Decode into memory, with a progress bar if it will take a while."""
        count = sum(len(dataset) for dataset in datasets)
        silent = count <= 2000 or rank_zero_only.rank != 0
        with Progress(disable=silent, transient=True) as progress:
            task = progress.add_task("decoding images", total=count)
            for dataset in datasets:
                dataset.fill_cache(lambda done: progress.update(task, advance=done))
                assert dataset.cache is not None
                self._on_bad([BadImage(dataset.split, i, reason) for i, reason in dataset.cache.bad.items()])

    def _on_bad(self, bad: list[BadImage]) -> None:
        """Record bad pictures met by a loader, in the main process."""
        writes = self.run_dir is not None and rank_zero_only.rank == 0
        self._quarantine.add(bad, self.run_dir / "bad_images.csv" if writes and self.run_dir else None)

    @property
    def bad_images(self) -> list[tuple[str, str, str]]:
        """(path, reason, split) of the pictures that couldn't be used so far."""
        return self._quarantine.entries() if self.datasets else []

    @property
    def num_classes(self) -> int:
        """Number of classes, C."""
        return len(self.class_names)

    def sample_id(self, split: str, index: int) -> str:
        """Stable name of a picture: its path relative to the dataset."""
        return self.datasets[split].samples[index].sample_id

    def file_list_sha256(self) -> str:
        """SHA-256 over the sorted (split, relative path, label) of all pictures, in hexadecimal."""
        lines = sorted(
            f"{split}\t{sample.sample_id}\t{sample.label}\n"
            for split, dataset in self.datasets.items()
            for sample in dataset.samples
        )
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def class_weight_tensor(self) -> Tensor | None:
        """Weights of the loss per class, float32 [C], or None; "auto" has mean 1 over the training images."""
        return class_weight_tensor(self.class_weights, self.class_counts["train"])

    @property
    def split_note(self) -> str:
        """One sentence per split: how many images, and where they come from."""
        return " ".join(self.split_sentences)

    def describe(self) -> str:
        """What the data are, in lines: splits, images per class, pixels, warnings."""
        where = "kept in memory" if self.fits_memory else "decoded as needed"
        pixels = f"{self.image_size} x {self.image_size} pixels, {where}"
        lines = [f"{self.num_classes} classes from {self.path}", *self.split_sentences]
        lines += count_table(self.class_counts)
        lines.append(f"{pixels}; augmentation {self.augment}, crop {self.crop_mode}")
        lines += [f"warning: {sentence}" for sentence in self.warnings]
        if self.bad_images:
            path, reason, split = self.bad_images[0]
            lines.append(
                f"warning: {len(self.bad_images)} images can't be used, first {split} {path}: {reason}"
            )
        return "\n".join(lines)

    def _rank_and_world(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _loader(self, dataset: ImageDataset, mixer: BatchMixer | None = None, **order: Any) -> ImageLoader:
        loader = ImageLoader(
            dataset,
            num_workers=self.num_workers,
            collate_fn=Collate(self.mean, self.std, self.seed, mixer),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            # own generator: otherwise every new iterator would draw from, and so move, the global one
            generator=torch.Generator().manual_seed(self.seed),
            **order,
        )
        loader.on_bad = self._on_bad
        return loader

    def train_dataloader(self) -> ImageLoader:
        """Shuffled, augmented batches, from the position a checkpoint recorded."""
        rank, world_size = self._rank_and_world()
        if world_size > 1 and self.trainer._accelerator_connector.use_distributed_sampler:
            raise UserError("set --trainer.use_distributed_sampler false: the images are shared out already")
        dataset = self.datasets["train"]
        labels = [sample.label for sample in dataset.samples] if self.balanced_sampling else None
        self.sampler = PositionSampler(
            len(dataset), seed=self.seed, rank=rank, world_size=world_size, balanced_labels=labels
        )
        self.sampler.seek(self._position["epoch"], self._position["batch"] * self._position["batch_size"])
        mixer = BatchMixer(self.mixup, self.cutmix, self.num_classes) if self.mixup or self.cutmix else None
        drop_last = len(self.sampler) >= self.batch_size
        return self._loader(
            dataset, mixer, sampler=self.sampler, batch_size=self.batch_size, drop_last=drop_last
        )

    def _eval_dataloader(self, split: str) -> ImageLoader:
        if split not in self.datasets:
            raise UserError(
                f"there is no {split} set: set --data.{split}_fraction above 0, or give the folder {split}/"
            )
        dataset = self.datasets[split]
        return self._loader(
            dataset, batch_sampler=eval_batches(len(dataset), self.batch_size, *self._rank_and_world())
        )

    def val_dataloader(self) -> ImageLoader:
        """Validation batches, in order, without randomness."""
        return self._eval_dataloader("val")

    def test_dataloader(self) -> ImageLoader:
        """Test batches, in order, without randomness."""
        return self._eval_dataloader("test")

    def state_dict(self) -> dict[str, Any]:
        """Where training stands, as {epoch, batch} of the next batch, and what makes the numbers comparable."""
        epoch, batch = self._position["epoch"], self._position["batch"]
        if self.sampler is not None and self.sampler.running_epoch is not None and self.trainer is not None:
            epoch = self.sampler.running_epoch
            batch = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
            if batch >= self.trainer.num_training_batches:  # the last batch of an epoch: the next one starts
                epoch, batch = epoch + 1, 0
        _, world_size = self._rank_and_world()
        return {"epoch": epoch, "batch": batch, "batch_size": self.batch_size, "world_size": world_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's position; a changed batch size or process count is reported, not refused."""
        now = {"batch_size": self.batch_size, "world_size": self._rank_and_world()[1]}
        for name, value in now.items():
            if state_dict[name] != value:
                rank_zero_warn(
                    f"the run was started with {name} {state_dict[name]} and goes on with {value}, so it can't "
                    "repeat the pictures' order exactly"
                )
        self._position = {key: int(state_dict[key]) for key in ("epoch", "batch", "batch_size")}
        if self.sampler is not None:
            self.sampler.seek(self._position["epoch"], self._position["batch"] * self._position["batch_size"])
