"""One split as batches: the order in which it is read, decoded or cached pixels, and batches as the model gets them.

A resumed run must see the images that an uninterrupted one would have seen next, with the same random crops. Both
follow from never asking a global random generator: the order is a pure function of ``(seed, epoch)``, the position in
it is a plain offset, and every yielded key carries its epoch, from which the dataset derives the augmentation of that
image (see ``transforms.py``). A batch is fetched as a whole (``__getitems__``), so that its random numbers are drawn at
once. A file that can't be decoded never stops a run: its reason travels with the batch, which goes on without it, and
the main process is told.

Axis legend: B batch, C classes, H height, W width (images differ in size), S = ``image_size``; n = images of the split,
world = number of processes, rank = this process.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from moevision.config import Framing
from moevision.data.collection import Collection, Sample
from moevision.data.images import BadImageError
from moevision.data.transforms import (
    BatchMixer,
    TrainTransform,
    base_pixels,
    base_side,
    hash_u64,
    normalize,
    square_pixels,
    stack,
)
from moevision.limits import usable_cores
from moevision.types import Pixels, State

SHM = Path("/dev/shm")  # shared memory through which DataLoader workers pass batches on Linux
Key = tuple[int, int]  # epoch (offset where an image is repeated within it), index
Batch = dict[str, Any]
Decoded = Pixels | str  # an image, or the reason why it can't be used
_WORKER_TIMEOUT_S = 1800.0  # after which workers that gave no batch count as stuck
_PREFETCH_FACTOR = 2  # batches that each worker prepares ahead, DataLoader's default
# Added to the epoch of a key each time an image is drawn again within one epoch, so that every repeat gets its own
# augmentation. Larger than any number of epochs; odd, since images are mirrored in turn by the parity of the epoch.
_REPEAT_OFFSET = 2**31 + 1
# Where all files are unreadable the run should say so soon, instead of trying every one for one image.
_MAX_TRIES = 100
_IMAGES_PER_BUFFER = 512


@dataclass(eq=False, repr=False)
class PositionSampler(Sampler[Key]):
    """Yields ``(epoch, index)`` in an order that depends on ``(seed, epoch)`` alone, from any start position.

    Processes take every ``world``-th index of the common order and drop the tail, so all get equally many.
    ``len`` stays the full length of an epoch even when a resumed epoch yields only its rest, because
    Lightning derives the number of batches from it.
    """

    num_samples: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    # of the n images: every class is drawn equally often
    balanced_labels: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self.epoch = 0
        self.start = 0
        # the epoch that is being read; `ImageDataModule` saves it as the position of a checkpoint
        self.running_epoch: int | None = None

    def __len__(self) -> int:
        return self.num_samples // self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to be read next; Lightning calls this before each one.

        The same epoch keeps its start position: on resume Lightning calls this after ``seek``.
        """
        if epoch != self.epoch:
            self.epoch = epoch
            self.start = 0

    def seek(self, epoch: int, start: int) -> None:
        """Let the next iteration begin at position ``start`` of ``epoch`` (counted on this process)."""
        self.epoch = epoch
        self.start = start
        self.running_epoch = None

    def keys(self, epoch: int) -> list[Key]:
        """Keys of what this process reads in ``epoch``, in order; repeats of an image differ by `_REPEAT_OFFSET`."""
        generator = torch.Generator()
        generator.manual_seed(hash_u64(self.seed, epoch))
        if self.balanced_labels is None:
            order = torch.randperm(self.num_samples, generator=generator)
        else:
            order = balanced_order(torch.as_tensor(self.balanced_labels), generator)
        draws: Counter[int] = Counter()
        keys = []
        for index in order.tolist():
            keys.append((epoch + draws[index] * _REPEAT_OFFSET, index))
            draws[index] += 1
        return keys[self.rank :: self.world_size][: len(self)]

    def __iter__(self) -> Iterator[Key]:
        keys = self.keys(self.epoch)[self.start :]
        self.running_epoch = self.epoch
        self.start = 0
        yield from keys


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """An order [n] of n images: each class equally often; in a class every image once before any comes again."""
    n = len(labels)
    classes, counts = labels.unique(return_counts=True)
    images_of_class = labels.argsort(stable=True).split(counts.tolist())
    # n need not divide by the number of classes: a random choice of them gets one draw more
    quota, remainder = divmod(n, len(classes))
    classes_with_one_more = torch.randperm(len(classes), generator=generator)[:remainder].tolist()
    draws = []
    for position, images in enumerate(images_of_class):
        class_quota = quota + (position in classes_with_one_more)
        rounds = [images[:0]]  # so that a quota of 0 can be concatenated, too
        for _ in range(ceil(class_quota / len(images))):
            rounds.append(images[torch.randperm(len(images), generator=generator)])
        draws.append(torch.cat(rounds)[:class_quota])
    pool = torch.cat(draws)
    return pool[torch.randperm(n, generator=generator)]


def eval_batches(
    num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """This process's batches of indices; together they cover a split once, in order.

    Every process gets the same number of batches (collective operations inside an evaluation step would
    otherwise wait for ever), which is why sizes may differ by one when there are several processes.
    """
    indices = list(range(rank, num_samples, world_size))
    if world_size == 1:
        return list(BatchSampler(indices, batch_size, drop_last=False))
    # As many batches as the largest share needs.
    largest_share = ceil(num_samples / world_size)
    num_batches = ceil(largest_share / batch_size)
    return [batch.tolist() for batch in np.array_split(indices, num_batches)]


def fitting_workers(num_workers: int, batch_bytes: int, processes: int = 1) -> int:
    """At most `num_workers` for each of so many processes, fewer where shared memory has no room for their batches.

    A worker that finds no room (Docker gives 64 MB) loses its batch, and the training would wait for it for ever.
    """
    if not (num_workers and SHM.is_dir()):
        return num_workers
    max_batches = shutil.disk_usage(SHM).free // (batch_bytes * processes)
    max_prefetched = max_batches - 1  # one more is in use
    return max(0, min(num_workers, max_prefetched // _PREFETCH_FACTOR))


@dataclass(frozen=True)
class BadImage:
    """An image that couldn't be used: its split, its index there, and why."""

    split: str
    index: int
    reason: str


@dataclass(eq=False, repr=False)
class ImageDataset(Dataset[Batch]):
    """Images of one split; nothing is read before it is asked for.

    Keys are ``(epoch, index)`` when a transform is given (training) and plain indices otherwise. In training
    the next readable image replaces a bad one, so that batches keep their size and a resumed run its
    position; in evaluation a bad image is left out of its batch.
    """

    split: str
    collection: Collection
    samples: Sequence[Sample]
    image_size: int
    framing: Framing
    # of the normalisation, in units of [0, 1]; `framing` has the mean, which also fills borders
    std: Sequence[float]
    square: bool  # whether images are prepared to S x S, or kept larger for random resized crops
    seed: int  # of the augmentation
    transform: TrainTransform | None  # None: for evaluation
    mixer: BatchMixer | None
    num_labels: int = 0  # C of multi-hot targets, where images have several labels; else 0
    cache: PixelCache | None = field(default=None, init=False)

    def __len__(self) -> int:
        return len(self.samples)

    def pixels(self, index: int) -> Decoded:
        """Prepared pixels of an image, uint8 [3, H, W], or the reason why it can't be used."""
        if self.cache is not None:
            return self.cache.image(index)
        min_side, prepare = self.image_size, square_pixels  # the decoder may reduce an image so far
        if not self.square:
            min_side, prepare = base_side(self.image_size), base_pixels
        try:
            image = self.collection.open(self.samples[index], min_side)
        except BadImageError as error:
            return error.reason
        return prepare(image, self.image_size, self.framing).transpose(2, 0, 1)

    def fill_cache(self, on_progress: Callable[[int], None]) -> list[BadImage]:
        """Decode everything into memory, on all processor cores that this process may use; returns the bad images.

        ``on_progress`` gets the number of images done since its last call.
        """
        cache = PixelCache()
        bad = []
        # Each thread holds a decoded image, which may be large: at most 16.
        with ThreadPoolExecutor(min(16, usable_cores())) as pool:
            for indices in BatchSampler(range(len(self)), _IMAGES_PER_BUFFER, drop_last=False):
                images = list(pool.map(self.pixels, indices))
                cache.extend(images)
                for index, image in zip(indices, images, strict=True):
                    if isinstance(image, str):
                        bad.append(BadImage(self.split, index, image))
                on_progress(len(indices))
        self.cache = cache
        return bad

    def _candidates(self, index: int) -> Iterable[int]:
        """An image, and in training those that replace it, in this order, if it is bad."""
        if self.transform is None:
            return [index]
        # Those behind it, then from the first one on.
        return islice(chain(range(index, len(self)), range(index)), _MAX_TRIES)

    def __getitems__(self, keys: Sequence[int | Key]) -> Batch:
        """A batch, as DataLoader asks for it; see the class for what a bad image yields.

        It has ``image`` float32 [B, 3, S, S], ``label`` and ``index`` int64 [B]; with a mixer or several labels of an
        image also ``target`` float32 [B, C].
        ``bad`` is a list of `BadImage` that `ImageLoader` takes out; without a good image there is nothing else.
        """
        images: list[Pixels] = []
        indices: list[int] = []
        good_keys: list[Key] = []
        bad: list[BadImage] = []
        for key in keys:
            epoch, drawn = key if isinstance(key, tuple) else (0, key)
            for index in self._candidates(drawn):
                image = self.pixels(index)
                if not isinstance(image, str):
                    images.append(image)
                    indices.append(index)
                    good_keys.append((epoch, drawn))
                    break
                bad.append(BadImage(self.split, index, image))
        if not images:
            return {"bad": bad}

        # A replacement is augmented by the key of the image that it replaces: not as where it is drawn itself.
        epochs, drawn_indices = zip(*good_keys, strict=True)
        if self.transform is None:
            pixels = torch.from_numpy(stack(images, self.image_size))
        else:
            pixels = self.transform(images, self.seed, epochs, drawn_indices)
        batch: Batch = {
            "image": normalize(pixels, self.framing.mean, self.std),
            "label": torch.tensor([self.samples[index].label for index in indices]),
            "index": torch.tensor(indices),
            "bad": bad,
        }
        if self.num_labels:
            batch["target"] = self._multi_hot(indices)
        if self.mixer is not None:  # the first image seeds the mixing of the whole batch
            batch["image"], batch["target"] = self.mixer(
                batch["image"],
                batch["target"] if self.num_labels else batch["label"],
                self.seed,
                epochs[0],
                indices[0],
            )
        return batch

    def _multi_hot(self, indices: Sequence[int]) -> Tensor:
        """Targets [B, C]: 1 for each label that an image has."""
        target = torch.zeros(len(indices), self.num_labels)
        for row, index in enumerate(indices):
            target[row, list(self.samples[index].all_labels)] = 1
        return target


class StoredImage(NamedTuple):
    """Where the pixels of an image are in the buffers."""

    buffer: int
    offset: int
    height: int
    width: int


class PixelCache:
    """Decoded images of one split in a few large uint8 buffers.

    Thousands of small tensors would be copied into every worker process as soon as their reference counts
    are touched; views into a few large buffers are shared. They are torch's, which workers that are spawned
    share, too.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._images: list[StoredImage | str] = []  # or the reason why one is missing

    def extend(self, images: Sequence[Decoded]) -> None:
        """Add the next images, uint8 [3, H, W] each, or the reason why one is missing."""
        size = sum(image.size for image in images if not isinstance(image, str))
        buffer = torch.empty(size, dtype=torch.uint8)
        pixels = buffer.numpy()
        offset = 0
        for image in images:
            if isinstance(image, str):
                self._images.append(image)
                continue
            _, height, width = image.shape
            self._images.append(StoredImage(len(self._buffers), offset, height, width))
            pixels[offset : offset + image.size].reshape(image.shape)[:] = image
            offset += image.size
        self._buffers.append(buffer)

    def image(self, index: int) -> Decoded:
        """Pixels uint8 [3, H, W], a view that must not be written to, or the reason why the image is missing."""
        stored = self._images[index]
        if isinstance(stored, str):
            return stored
        buffer, offset, height, width = stored
        size = 3 * height * width
        return self._buffers[buffer].numpy()[offset : offset + size].reshape(3, height, width)


class ImageLoader(DataLoader[Batch]):
    """A DataLoader that reports bad images in the main process and skips batches without a good one.

    `wait_s` are the seconds that the main process has waited for batches, over all iterations.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        on_bad: Callable[[list[BadImage]], None],
        **options: Any,  # DataLoader's own
    ) -> None:
        """Report to ``on_bad``; a worker that gives nothing for half an hour is taken for stuck."""
        timeout = _WORKER_TIMEOUT_S if options["num_workers"] else 0
        # `__getitems__` returns a whole batch: `dict` collates nothing.
        super().__init__(dataset, timeout=timeout, collate_fn=dict, **options)
        self.on_bad = on_bad
        self.wait_s = 0.0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]  # not DataLoader's own iterator
        batches = super().__iter__()
        while True:
            started = time.monotonic()
            batch: Batch | None = next(batches, None)
            self.wait_s += time.monotonic() - started
            if batch is None:
                return
            bad = batch.pop("bad")
            if bad:
                self.on_bad(bad)
            if batch:
                yield batch

    # Without these two methods Lightning warns that a training can't go on within an epoch.
    def state_dict(self) -> State:
        """Empty: the position is in `ImageDataModule`'s state."""
        return {}

    def load_state_dict(self, state_dict: State) -> None:
        """Nothing to restore, see `state_dict`."""
