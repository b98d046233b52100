"""One split as a torch dataset: decoded or cached pixels in, augmented batches out.

A batch is fetched as a whole (``__getitems__``), so that its random numbers are drawn at once. A file that can't be
decoded never stops a run: its reason travels with the batch, which goes on without it, and the main process is told.

Axis legend: B batch, H height, W width (images differ in size), S = ``image_size``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor
from torch.utils.data import Dataset

from moevision.data.collection import Collection, Sample
from moevision.data.images import BadImageError
from moevision.data.transforms import Pixels, TrainTransform, base_pixels, base_side, square_pixels
from moevision.limits import usable_cores

# where all files are unreadable the run should say so soon, instead of trying every one for one image
_MAX_TRIES = 100


@dataclass(frozen=True, slots=True)
class BadImage:
    """An image that couldn't be used: its split, its index there, and why."""

    split: str
    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class RawBatch:
    """The good images of a batch to be, and the bad ones met on the way.

    Attributes:
        pixels: uint8 [B, 3, S, S].
        label: class of each.
        index: index of each in its split.
        epoch: epoch number of each; 0 in evaluation.
        bad: images that couldn't be used.
    """

    pixels: Tensor
    label: list[int]
    index: list[int]
    epoch: list[int]
    bad: list[BadImage]


class ImageDataset(Dataset[RawBatch]):
    """Images of one split.

    Keys are ``(epoch, index)`` when a transform is given (training) and plain indices otherwise. In training
    the next readable image stands in for a bad one, so that batches keep their size and a resumed run its
    position; in evaluation a bad image is left out of its batch.
    """

    def __init__(
        self,
        split: str,
        collection: Collection,
        samples: Sequence[Sample],
        *,
        image_size: int,
        square: bool,
        seed: int = 0,
        transform: TrainTransform | None = None,
    ) -> None:
        """Describe the split; nothing is read yet.

        Args:
            split: "train", "val" or "test".
            collection: where images are opened.
            samples: the split's images.
            image_size: side of the images, S.
            square: whether images are prepared to S x S, or kept larger for random resized crops.
            seed: seed of the augmentation.
            transform: augmentation; None for evaluation.
        """
        self.split = split
        self.collection = collection
        self.samples = samples
        self.image_size = image_size
        self.square = square
        self.seed = seed
        self.transform = transform
        self.cache: PixelCache | None = None

    def __len__(self) -> int:
        """Number of images, bad ones included."""
        return len(self.samples)

    def decode(self, index: int) -> Pixels:
        """Read and prepare one image, uint8 [H, W, 3]; raises `BadImageError`."""
        prepare, side = (square_pixels, self.image_size) if self.square else (base_pixels, base_side(self.image_size))
        return prepare(self.collection.open(self.samples[index], side), self.image_size)

    def fill_cache(self, on_progress: Callable[[int], None], chunk_size: int = 512) -> dict[int, str]:
        """Decode everything into memory, on all processor cores that this process may use.

        Args:
            on_progress: called with the number of images done since the last call.
            chunk_size: images per buffer.

        Returns:
            Index and reason of the images that can't be used.
        """
        cache = PixelCache(planar=self.square)
        with ThreadPoolExecutor(min(16, usable_cores())) as pool:
            for start in range(0, len(self), chunk_size):
                indices = range(start, min(start + chunk_size, len(self)))
                # a few images per task: handing over small ones costs as much as decoding them
                tasks = [indices[i : i + 32] for i in range(0, len(indices), 32)]
                cache.extend(list(chain.from_iterable(pool.map(self._attempt, tasks))))
                on_progress(len(indices))
        self.cache = cache
        return cache.bad

    def _attempt(self, indices: Sequence[int]) -> list[Pixels | str]:
        """Images, or the reasons why they can't be used."""
        results: list[Pixels | str] = []
        for index in indices:
            try:
                results.append(self.decode(index))
            except BadImageError as error:
                results.append(error.reason)
        return results

    def pixels(self, indices: Sequence[int]) -> list[Pixels | str]:
        """Prepared pixels uint8 [3, H, W] of each image, or the reason why it can't be used."""
        if self.cache is not None:
            return self.cache.take(indices)
        return [found if isinstance(found, str) else found.transpose(2, 0, 1) for found in self._attempt(indices)]

    def _stand_in(self, index: int, bad: list[BadImage]) -> tuple[int, Pixels] | None:
        """The next image after ``index`` that can be used, and its pixels; bad ones met on the way go into ``bad``."""
        for candidate in islice(chain(range(index + 1, len(self)), range(index)), _MAX_TRIES - 1):
            (found,) = self.pixels([candidate])
            if not isinstance(found, str):
                return candidate, found
            bad.append(BadImage(self.split, candidate, found))
        return None

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> RawBatch:
        """The images of a batch; see the class for what a bad one yields. DataLoader calls this."""
        keyed = [key if isinstance(key, tuple) else (0, key) for key in keys]
        images: list[Pixels] = []
        bad: list[BadImage] = []
        indices, epochs, drawn = [], [], []
        for (epoch, key_index), found in zip(keyed, self.pixels([index for _, index in keyed]), strict=True):
            index, image = key_index, found
            if isinstance(image, str):
                bad.append(BadImage(self.split, index, image))
                stand_in = self._stand_in(index, bad) if self.transform is not None else None
                if stand_in is None:
                    continue
                index, image = stand_in
            images.append(image)
            indices.append(index)
            epochs.append(epoch)
            drawn.append(key_index)
        if self.transform is not None:
            # the key stays the drawn one: a stand-in doesn't repeat its own augmentation in this epoch
            pixels = self.transform(images, self.seed, epochs, drawn)  # [B, 3, S, S]
        else:
            pixels = torch.empty(len(images), 3, self.image_size, self.image_size, dtype=torch.uint8)
            for row, prepared in zip(pixels.numpy(), images, strict=True):
                row[:] = prepared
        return RawBatch(pixels, [self.samples[index].label for index in indices], indices, epochs, bad)

    def __getitem__(self, key: int | tuple[int, int]) -> RawBatch:
        """A batch of one key."""
        return self.__getitems__([key])


class PixelCache:
    """Decoded images of one split in a few large uint8 buffers.

    Thousands of small tensors would be copied into every worker process as soon as their reference counts
    are touched; views into a few large buffers are shared. The buffers are torch's, which workers that are not
    forked share too.
    """

    def __init__(self, *, planar: bool) -> None:
        """Start empty.

        Args:
            planar: whether the channels of an image lie one after the other, [3, H, W], the fast order for shifted
                copies; otherwise together, [H, W, 3], the fast order for resizing. Only time depends on it.
        """
        self._planar = planar
        self._chunks: list[Tensor] = []
        self._views: list[Pixels] = []  # the same memory as arrays, which are sliced faster
        self._where: list[tuple[int, int, int, int]] = []
        self.bad: dict[int, str] = {}

    def extend(self, images: Sequence[Pixels | str]) -> None:
        """Add the next images, uint8 [H, W, 3] each, or the reason why one is missing."""
        chunk = torch.empty(sum(p.size for p in images if not isinstance(p, str)), dtype=torch.uint8)
        offset = 0
        for image in images:
            if isinstance(image, str):
                self.bad[len(self._where)] = image
                self._where.append((0, 0, 0, 0))
                continue
            height, width, _ = image.shape
            stored = image.transpose(2, 0, 1) if self._planar else image
            chunk.numpy()[offset : offset + image.size].reshape(stored.shape)[:] = stored
            self._where.append((len(self._chunks), offset, height, width))
            offset += image.size
        self._chunks.append(chunk)

    def take(self, indices: Sequence[int]) -> list[Pixels | str]:
        """Pixels uint8 [3, H, W] of each image, a view that must not be written to, or the reason why it is missing."""
        if len(self._views) < len(self._chunks):
            self._views = [chunk.numpy() for chunk in self._chunks]
        taken: list[Pixels | str] = []
        for index in indices:
            if index in self.bad:
                taken.append(self.bad[index])
                continue
            chunk, offset, height, width = self._where[index]
            stored = self._views[chunk][offset : offset + 3 * height * width]
            if self._planar:
                taken.append(stored.reshape(3, height, width))
            else:
                taken.append(stored.reshape(height, width, 3).transpose(2, 0, 1))
        return taken

    def __getstate__(self) -> dict[str, object]:
        """Without the views: where workers aren't forked, tensors are shared with them and arrays would be copied."""
        return {**vars(self), "_views": []}
