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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from moevision.config import Framing
from moevision.data.collection import Collection, Sample
from moevision.data.images import BadImageError
from moevision.data.transforms import (
    BatchMixer,
    Pixels,
    TrainTransform,
    base_pixels,
    base_side,
    hash_u64,
    normalize,
    square_pixels,
)
from moevision.errors import UserError
from moevision.limits import usable_cores

SHM = Path("/dev/shm")  # through which Linux' data workers hand over batches
Key = tuple[int, int]  # epoch, index
Decoded = Pixels | str  # an image, or the reason why it can't be used
_NO_BATCH_S = 1800.0  # after which the workers are taken for stuck
_AHEAD = 2  # batches that each worker prepares ahead, DataLoader's own number
# Between the epochs of two keys of one image: more than there are epochs, and odd, so that it is mirrored in turn.
_AGAIN = 2**31 + 1
# Where all files are unreadable the run should say so soon, instead of trying every one for one image.
_MAX_TRIES = 100
_CACHED_AT_ONCE = 512  # images per buffer
_DECODED_AT_ONCE = 32  # images per task of a thread


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
        self.running_epoch: int | None = None

    def __len__(self) -> int:
        return self.num_samples // self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to be read next; Lightning calls this before each one.

        A repeated epoch keeps the start position: on resume the call comes after ``seek``.
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
        """What this process reads in ``epoch``, in order; an image that comes again has another epoch in its key."""
        generator = torch.Generator()
        generator.manual_seed(hash_u64(self.seed, epoch))
        if self.balanced_labels is None:
            order = torch.randperm(self.num_samples, generator=generator)
        else:
            order = balanced_order(torch.as_tensor(self.balanced_labels), generator)
        draws: Counter[int] = Counter()
        keys = []
        for index in order.tolist():
            keys.append((epoch + draws[index] * _AGAIN, index))
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
    gets_more = torch.randperm(len(classes), generator=generator)[:remainder].tolist()
    draws = []
    for number, images in enumerate(images_of_class):
        class_quota = quota + (number in gets_more)
        rounds = [images[:0]]
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
    largest_share = ceil(num_samples / world_size)
    num_batches = ceil(largest_share / batch_size)
    bounds = [len(indices) * number // num_batches for number in range(num_batches + 1)]
    return [indices[start:stop] for start, stop in pairwise(bounds)]


def fitting_workers(num_workers: int, batch_bytes: int, processes: int = 1) -> int:
    """How many data workers have room for their batches in the shared memory of so many processes.

    A worker that finds no room (Docker gives 64 MB) loses its batch, and the training would wait for it for ever.
    """
    if not (num_workers and SHM.is_dir()):
        return num_workers
    batches = shutil.disk_usage(SHM).free // (batch_bytes * processes)
    waiting = batches - 1  # one more is in use
    return max(0, min(num_workers, waiting // _AHEAD))


@dataclass(frozen=True, slots=True)
class BadImage:
    """An image that couldn't be used: its split, its index there, and why."""

    split: str
    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class RawBatch:
    """The good images of a batch to be, and the bad ones met on the way."""

    pixels: Tensor  # uint8 [B, 3, S, S]
    label: list[int]  # class of each
    index: list[int]  # index of each in its split
    epoch: list[int]  # epoch number of each; 0 in evaluation
    bad: list[BadImage]  # images that couldn't be used


@dataclass(eq=False, repr=False)
class ImageDataset(Dataset[RawBatch]):
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
    square: bool  # whether images are prepared to S x S, or kept larger for random resized crops
    seed: int  # of the augmentation
    transform: TrainTransform | None  # None: for evaluation
    cache: PixelCache | None = field(default=None, init=False)

    def __len__(self) -> int:
        return len(self.samples)

    def decode(self, index: int) -> Pixels:
        """Read and prepare one image, uint8 [H, W, 3]; raises `BadImageError`."""
        sample = self.samples[index]
        if self.square:
            image = self.collection.open(sample, self.image_size)
            return square_pixels(image, self.image_size, self.framing)
        image = self.collection.open(sample, base_side(self.image_size))
        return base_pixels(image, self.image_size, self.framing)

    def fill_cache(self, on_progress: Callable[[int], None]) -> dict[int, str]:
        """Decode everything into memory, on all processor cores that this process may use.

        ``on_progress`` gets the number of images done since its last call; returns index and reason of the bad ones.
        """
        cache = PixelCache(planar=self.square)
        with ThreadPoolExecutor(min(16, usable_cores())) as pool:
            for indices in BatchSampler(range(len(self)), _CACHED_AT_ONCE, drop_last=False):
                # a few images per task: handing over small ones costs as much as decoding them
                tasks = BatchSampler(indices, _DECODED_AT_ONCE, drop_last=False)
                images = chain.from_iterable(pool.map(self._attempt, tasks))
                cache.extend(list(images))
                on_progress(len(indices))
        self.cache = cache
        return cache.bad

    def _attempt(self, indices: Sequence[int]) -> list[Decoded]:
        results: list[Decoded] = []
        for index in indices:
            try:
                results.append(self.decode(index))
            except BadImageError as error:
                results.append(error.reason)
        return results

    def pixels(self, indices: Sequence[int]) -> list[Decoded]:
        """Prepared pixels uint8 [3, H, W] of each image, or the reason why it can't be used."""
        if self.cache is not None:
            return self.cache.take(indices)
        images: list[Decoded] = []
        for image in self._attempt(indices):
            images.append(image if isinstance(image, str) else image.transpose(2, 0, 1))
        return images

    def _replacement(self, index: int, bad: list[BadImage]) -> tuple[int, Pixels] | None:
        """The next image after ``index`` that can be used, and its pixels; bad ones met on the way go into ``bad``."""
        others = chain(range(index + 1, len(self)), range(index))
        for candidate in islice(others, _MAX_TRIES - 1):
            (image,) = self.pixels([candidate])
            if not isinstance(image, str):
                return candidate, image
            bad.append(BadImage(self.split, candidate, image))
        return None

    def __getitems__(self, keys: Sequence[int | Key]) -> RawBatch:
        """The images of a batch; see the class for what a bad one yields. DataLoader calls this."""
        epoch_keys = [key if isinstance(key, tuple) else (0, key) for key in keys]
        decoded = self.pixels([index for _, index in epoch_keys])
        images: list[Pixels] = []
        indices: list[int] = []
        good_keys = []
        bad: list[BadImage] = []
        for key, image in zip(epoch_keys, decoded, strict=True):
            _, index = key
            if isinstance(image, str):
                bad.append(BadImage(self.split, index, image))
                replacement = None
                if self.transform is not None:
                    replacement = self._replacement(index, bad)
                if replacement is None:
                    continue
                index, image = replacement
            images.append(image)
            indices.append(index)
            good_keys.append(key)
        return RawBatch(
            pixels=self._transformed(images, good_keys),
            label=[self.samples[index].label for index in indices],
            index=indices,
            epoch=[epoch for epoch, _ in good_keys],
            bad=bad,
        )

    def _transformed(self, images: Sequence[Pixels], keys: Sequence[Key]) -> Tensor:
        """Images uint8 [3, H, W] as a batch uint8 [B, 3, S, S]."""
        if self.transform is not None:
            # The key stays the drawn one: a replacement doesn't repeat its own augmentation in this epoch.
            epochs = [epoch for epoch, _ in keys]
            return self.transform(images, self.seed, epochs, [index for _, index in keys])
        pixels = torch.empty(len(images), 3, self.image_size, self.image_size, dtype=torch.uint8)
        for row, image in zip(pixels.numpy(), images, strict=True):
            row[:] = image
        return pixels


class StoredImage(NamedTuple):
    """Where the pixels of an image are in the buffers."""

    buffer: int
    offset: int
    height: int
    width: int


class PixelCache:
    """Decoded images of one split in a few large uint8 buffers.

    Thousands of small tensors would be copied into every worker process as soon as their reference counts
    are touched; views into a few large buffers are shared. The buffers are torch's, which workers that are not
    forked share too.
    """

    def __init__(self, *, planar: bool) -> None:
        """``planar`` stores [3, H, W], the fast order for shifted copies; otherwise [H, W, 3], fast for resizing."""
        self._planar = planar
        self._buffers: list[Tensor] = []
        self._views: list[Pixels] = []  # the same memory as arrays, which are sliced faster
        self._images: list[StoredImage] = []
        self.bad: dict[int, str] = {}

    def extend(self, images: Sequence[Decoded]) -> None:
        """Add the next images, uint8 [H, W, 3] each, or the reason why one is missing."""
        size = sum(image.size for image in images if not isinstance(image, str))
        buffer = torch.empty(size, dtype=torch.uint8)
        pixels = buffer.numpy()
        offset = 0
        for image in images:
            if isinstance(image, str):
                self.bad[len(self._images)] = image
                self._images.append(StoredImage(0, 0, 0, 0))
                continue
            height, width, _ = image.shape
            self._images.append(StoredImage(len(self._buffers), offset, height, width))
            if self._planar:
                image = image.transpose(2, 0, 1)
            pixels[offset : offset + image.size].reshape(image.shape)[:] = image
            offset += image.size
        self._buffers.append(buffer)

    def take(self, indices: Sequence[int]) -> list[Decoded]:
        """Pixels uint8 [3, H, W] of each image, a view that must not be written to, or the reason why it is missing."""
        if len(self._views) < len(self._buffers):
            self._views = [buffer.numpy() for buffer in self._buffers]
        images: list[Decoded] = []
        for index in indices:
            if index in self.bad:
                images.append(self.bad[index])
                continue
            buffer, offset, height, width = self._images[index]
            pixels = self._views[buffer][offset : offset + 3 * height * width]
            if self._planar:
                images.append(pixels.reshape(3, height, width))
            else:
                images.append(pixels.reshape(height, width, 3).transpose(2, 0, 1))
        return images

    def __getstate__(self) -> dict[str, object]:
        """Without the views: where workers aren't forked, tensors are shared with them and arrays would be copied."""
        return {**vars(self), "_views": []}


@dataclass
class Collate:
    """Turns images into a batch: normalise (per channel, in units of [0, 1]), mix."""

    mean: Sequence[float]
    std: Sequence[float]
    seed: int = 0
    mixer: BatchMixer | None = None

    def __call__(self, raw: RawBatch) -> dict[str, Any]:
        """The batch: ``image`` float32 [B, 3, S, S], ``label`` and ``index`` int64 [B], with a mixer ``target`` [B, C].

        ``bad`` is a list of `BadImage` that `ImageLoader` takes out; without a single good image it stands alone.
        """
        if not raw.index:
            return {"bad": raw.bad}
        batch: dict[str, Any] = {
            "image": normalize(raw.pixels, self.mean, self.std),
            "label": torch.tensor(raw.label),
            "index": torch.tensor(raw.index),
            "bad": raw.bad,
        }
        if self.mixer is not None:
            batch["image"], batch["target"] = self.mixer(
                batch["image"], batch["label"], self.seed, raw.epoch[0], raw.index[0]
            )
        return batch


class ImageLoader(DataLoader[RawBatch]):
    """A DataLoader that reports bad images in the main process and skips batches without a good one.

    `wait_s` are the seconds that the main process has waited for batches, over all iterations.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        on_bad: Callable[[list[BadImage]], None] | None = None,
        in_step: bool = False,
        **options: Any,  # DataLoader's own
    ) -> None:
        """Report to ``on_bad``; ``in_step``: other processes wait for every batch, so that none may be skipped."""
        timeout = _NO_BATCH_S if options.get("num_workers") else 0
        super().__init__(dataset, timeout=timeout, **options)
        self.on_bad = on_bad
        self.in_step = in_step
        self.samples = dataset.samples
        self.wait_s = 0.0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]  # collation makes batches
        batches = super().__iter__()
        while True:
            batch = self._next(batches)
            if batch is None:
                return
            bad = batch.pop("bad")
            if bad and self.on_bad is not None:
                self.on_bad(bad)
            if batch:
                yield batch
            elif self.in_step:
                names = ", ".join(self.samples[entry.index].sample_id for entry in bad)
                raise UserError(
                    f"No image of a batch of {len(bad)} can be used ({names}), and the other processes would wait for "
                    "its results for ever: remove or repair these files."
                )

    def _next(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
        """The next batch, None at the end; the time until it is there is waited."""
        started = time.monotonic()
        try:
            batch = next(batches, None)
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            raise UserError(
                f"The data workers gave no batch for {self.timeout:g} s, see above if they said why: use "
                "--data.num_workers 0."
            ) from error
        self.wait_s += time.monotonic() - started
        return batch

    # That these two exist tells Lightning that a resumed epoch goes on where it stopped, else it warns that it doesn't.
    def state_dict(self) -> dict[str, Any]:
        """Empty: the position is in `ImageDataModule`'s state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore, see `state_dict`."""
