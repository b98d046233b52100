"""One split as a torch dataset: decoded or cached pixels in, augmented records and normalised batches out.

Work per picture is kept to the random transforms on uint8; conversion to float and normalisation happen once
per batch. A file that can't be decoded never stops a run: its record carries the reason instead of pixels,
the batch goes on without it, and the main process is told.

Axis legend: B batch, C classes, H height, W width, S = ``image_size``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moevision.data.augment import BatchMixer, TrainTransform, base_pixels, normalize, square_pixels
from moevision.data.cache import PixelCache
from moevision.data.images import BadImageError
from moevision.data.sources import Collection, Sample

Batch = dict[str, Tensor]

# where all files are unreadable the run should say so soon, instead of trying every one for one picture
_MAX_STAND_INS = 100


@dataclass(frozen=True, slots=True)
class BadImage:
    """A picture that couldn't be used: its split, its index there, and why."""

    split: str
    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class Record:
    """One picture of a batch to be: uint8 pixels [3, S, S], or None, and the bad ones met on the way."""

    pixels: Tensor | None
    label: int
    index: int
    epoch: int
    bad: tuple[BadImage, ...] = ()


class ImageDataset(Dataset[Record]):
    """Pictures of one split.

    Keys are ``(epoch, index)`` when a transform is given (training) and plain indices otherwise. In training
    the next readable picture stands in for a bad one, so that batches keep their size and a resumed run its
    position; in evaluation a bad picture is left out of its batch.
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
            collection: where pictures are opened.
            samples: the split's pictures.
            image_size: side of the pictures, S.
            square: whether pictures are prepared to S x S, or kept larger for random resized crops.
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
        """Number of pictures, bad ones included."""
        return len(self.samples)

    def decode(self, index: int) -> npt.NDArray[np.uint8]:
        """Read and prepare one picture, uint8 [H, W, 3]; raises `BadImageError`."""
        prepare = square_pixels if self.square else base_pixels
        return prepare(self.collection.open(self.samples[index]), self.image_size)

    def fill_cache(self, on_progress: Callable[[int], None], chunk_size: int = 512) -> dict[int, str]:
        """Decode everything into memory, on all processor cores that this process may use.

        Args:
            on_progress: called with the number of pictures done since the last call.
            chunk_size: pictures per buffer.

        Returns:
            Index and reason of the pictures that can't be used.
        """
        cache = PixelCache()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with ThreadPoolExecutor(min(16, cores)) as pool:
            for start in range(0, len(self), chunk_size):
                indices = range(start, min(start + chunk_size, len(self)))
                # a few pictures per task: handing over small ones costs as much as decoding them
                tasks = [indices[i : i + 32] for i in range(0, len(indices), 32)]
                cache.extend(list(chain.from_iterable(pool.map(self._attempt, tasks))))
                on_progress(len(indices))
        self.cache = cache
        return cache.bad

    def _attempt(self, indices: Sequence[int]) -> list[npt.NDArray[np.uint8] | str]:
        """Pictures, or the reasons why they can't be used."""
        results: list[npt.NDArray[np.uint8] | str] = []
        for index in indices:
            try:
                results.append(self.decode(index))
            except BadImageError as error:
                results.append(error.reason)
        return results

    def pixels(self, index: int) -> Tensor:
        """Prepared pixels uint8 [3, H, W], from the cache if there is one; raises `BadImageError`."""
        if self.cache is None:
            return torch.from_numpy(self.decode(index)).permute(2, 0, 1)
        if index in self.cache.bad:
            raise BadImageError(self.samples[index].sample_id, self.cache.bad[index])
        return self.cache[index]

    def __getitem__(self, key: int | tuple[int, int]) -> Record:
        """The record of one key; see the class for what a bad picture yields."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        bad: list[BadImage] = []
        tries = _MAX_STAND_INS if self.transform is not None else 1
        for candidate in islice(chain(range(index, len(self)), range(index)), tries):
            try:
                pixels = self.pixels(candidate)
            except BadImageError as error:
                bad.append(BadImage(self.split, candidate, error.reason))
                continue
            if self.transform is not None:
                # the key stays the drawn one: a stand-in doesn't repeat its own augmentation in this epoch
                pixels = self.transform(pixels, self.seed, epoch, index)
            return Record(pixels, self.samples[candidate].label, candidate, epoch, tuple(bad))
        return Record(None, self.samples[index].label, index, epoch, tuple(bad))


class Collate:
    """Turns records into a batch: stack, normalise, mix."""

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], seed: int = 0, mixer: BatchMixer | None = None
    ) -> None:
        """Remember the normalisation (per channel, in units of [0, 1]), the seed and the mixer."""
        self.mean, self.std, self.seed, self.mixer = mean, std, seed, mixer

    def __call__(self, records: Sequence[Record]) -> dict[str, Any]:
        """Build the batch dict.

        Returns:
            ``image`` float32 [B, 3, S, S], ``label`` int64 [B], ``index`` int64 [B], with a mixer ``target``
            float32 [B, C], and ``bad``, a list of `BadImage` that `ImageLoader` takes out. Without a single
            good picture only ``bad`` is there.
        """
        bad = [entry for record in records for entry in record.bad]
        good = [(record.pixels, record) for record in records if record.pixels is not None]
        if not good:
            return {"bad": bad}
        image = normalize(torch.stack([pixels for pixels, _ in good]), self.mean, self.std)
        batch: dict[str, Any] = {
            "image": image,
            "label": torch.tensor([record.label for _, record in good]),
            "index": torch.tensor([record.index for _, record in good]),
            "bad": bad,
        }
        if self.mixer is not None:
            first = good[0][1]
            batch["image"], batch["target"] = self.mixer(image, batch["label"], self.seed, first.epoch, first.index)
        return batch


class ImageLoader(DataLoader[Record]):
    """A DataLoader that reports bad pictures in the main process and skips batches without a good one."""

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        on_bad: Callable[[list[BadImage]], None] | None = None,
        **options: Any,  # DataLoader's own
    ) -> None:
        """Pass on DataLoader's options; ``on_bad`` is called with the bad pictures of a batch."""
        super().__init__(dataset, **options)
        self.on_bad = on_bad

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # collation turns records into batches
        """Yield batches of tensors only."""
        for batch in super().__iter__():
            bad = batch.pop("bad")
            if bad and self.on_bad is not None:
                self.on_bad(bad)
            if batch:
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Empty: the position is in `ImageDataModule`'s state.

        That this method and the next exist tells Lightning that a resumed epoch goes on where it stopped;
        otherwise it warns that it doesn't.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore, see `state_dict`."""
