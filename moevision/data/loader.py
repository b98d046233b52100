"""The order in which a split is read, and its batches as the model gets them: normalised, mixed, counted and timed.

A resumed run must see the images that an uninterrupted one would have seen next, with the same random crops. Both
follow from never asking a global random generator: the order is a pure function of ``(seed, epoch)``, the position in
it is a plain offset, and every yielded key carries its epoch, from which the dataset derives the augmentation of that
image (see ``transforms.py``).

Axis legend: B batch, C classes, S = ``image_size``; n = images of the split, world = number of processes, rank = this
process.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from moevision.data.dataset import BadImage, ImageDataset, RawBatch
from moevision.data.transforms import BatchMixer, hash_u64, normalize
from moevision.errors import UserError

Batch = dict[str, Tensor]
SHM = Path("/dev/shm")  # through which Linux' data workers hand over batches
_NO_BATCH_S = 1800.0  # after which the workers are taken for stuck
_AHEAD = 2  # batches that each worker prepares ahead, DataLoader's own number
# Between the epochs of two keys of one image: more than there are epochs, and odd, so that it is mirrored in turn.
_AGAIN = 2**31 + 1


class PositionSampler(Sampler[tuple[int, int]]):
    """Yields ``(epoch, index)`` in an order that depends on ``(seed, epoch)`` alone, from any start position.

    Processes take every ``world``-th index of the common order and drop the tail, so all get equally many.
    ``len`` stays the full length of an epoch even when a resumed epoch yields only its rest, because
    Lightning derives the number of batches from it.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        balanced_labels: Sequence[int] | None = None,
    ) -> None:
        """Remember what the order depends on.

        Args:
            num_samples: number of images in the split, n.
            seed: seed of the order.
            rank: index of this process, in [0, world_size).
            world_size: number of processes that share the epoch.
            balanced_labels: labels of the n images; when given, every class is drawn equally often.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, {world_size}), got {rank}")
        if balanced_labels is not None and len(balanced_labels) != num_samples:
            raise ValueError(f"expected {num_samples} balanced_labels, got {len(balanced_labels)}")
        self.num_samples = num_samples
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0
        self.running_epoch: int | None = None
        self._class_members: list[torch.Tensor] | None = None
        if balanced_labels is not None:
            labels = torch.as_tensor(balanced_labels)
            self._class_members = [(labels == label).nonzero().flatten() for label in labels.unique()]

    def __len__(self) -> int:
        """Number of indices this process draws in a whole epoch."""
        return self.num_samples // self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to be read next; Lightning calls this before each one.

        A repeated epoch keeps the start position: on resume the call comes after ``seek``.
        """
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def seek(self, epoch: int, start: int) -> None:
        """Let the next iteration begin at position ``start`` of ``epoch`` (counted on this process)."""
        self.epoch, self.start = epoch, start
        self.running_epoch = None

    def order(self, epoch: int) -> list[int]:
        """The indices that this process reads in ``epoch``, in order."""
        return [index for _, index in self.keys(epoch)]

    def keys(self, epoch: int) -> list[tuple[int, int]]:
        """The keys of those indices; an image that comes again has another epoch in its key, for another crop."""
        generator = torch.Generator()
        generator.manual_seed(hash_u64(self.seed, epoch))
        if self._class_members is None:
            keys = [(epoch, index) for index in torch.randperm(self.num_samples, generator=generator).tolist()]
        else:
            seen: Counter[int] = Counter()
            keys = []
            for index in self._balanced_order(generator).tolist():
                keys.append((epoch + seen[index] * _AGAIN, index))
                seen[index] += 1
        return keys[self.rank :: self.world_size][: len(self)]

    def _balanced_order(self, generator: torch.Generator) -> torch.Tensor:
        """N draws, each class equally often; within a class every image once before any comes again."""
        assert self._class_members is not None
        num_classes = len(self._class_members)
        # n need not divide by the number of classes: a random choice of them gets one draw more
        extra = torch.randperm(num_classes, generator=generator)[: self.num_samples % num_classes].tolist()
        drawn = []
        for label, members in enumerate(self._class_members):
            quota = self.num_samples // num_classes + (label in extra)
            rounds = -(-quota // len(members))
            shuffled = [members[torch.randperm(len(members), generator=generator)] for _ in range(rounds)]
            drawn.append(torch.cat(shuffled)[:quota] if shuffled else members[:0])
        pool = torch.cat(drawn)
        return pool[torch.randperm(len(pool), generator=generator)]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield the keys from the start position to the end of the epoch."""
        # set_epoch may be called while this iterator is alive: hold the epoch in a local name
        epoch, start = self.epoch, self.start
        self.running_epoch, self.start = epoch, 0
        yield from self.keys(epoch)[start:]


def eval_batches(num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """Batches of indices that cover a split once over all processes, in order.

    Every process gets the same number of batches (collective operations inside an evaluation step would
    otherwise wait for ever), which is why sizes may differ by one when there are several processes.

    Args:
        num_samples: number of images in the split.
        batch_size: largest batch.
        rank: index of this process.
        world_size: number of processes.

    Returns:
        This process's batches, at most ``batch_size`` indices each.
    """
    own = list(range(rank, num_samples, world_size))
    if world_size == 1:
        return [own[i : i + batch_size] for i in range(0, num_samples, batch_size)]
    longest = -(-num_samples // world_size)
    count = -(-longest // batch_size)
    bounds = [len(own) * i // count for i in range(count + 1)]
    return [own[a:b] for a, b in pairwise(bounds)]


def fitting_workers(asked: int, batch_bytes: int, processes: int = 1) -> int:
    """How many data workers have room for their batches in shared memory, of those that were asked for.

    A worker that finds no room (Docker gives 64 MB) loses its batch, and the training would wait for it for ever.

    Args:
        asked: number of workers.
        batch_bytes: size of the largest batch.
        processes: number of processes on this machine that have as many workers each.
    """
    if not (asked and SHM.is_dir()):
        return asked
    batches = shutil.disk_usage(SHM).free // (batch_bytes * processes)
    return max(0, min(asked, (batches - 1) // _AHEAD))  # one more is in use


class Collate:
    """Turns images into a batch: normalise, mix."""

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], seed: int = 0, mixer: BatchMixer | None = None
    ) -> None:
        """Remember the normalisation (per channel, in units of [0, 1]), the seed and the mixer."""
        self.mean, self.std, self.seed, self.mixer = mean, std, seed, mixer

    def __call__(self, raw: RawBatch) -> dict[str, Any]:
        """Build the batch dict.

        Returns:
            ``image`` float32 [B, 3, S, S], ``label`` int64 [B], ``index`` int64 [B], with a mixer ``target``
            float32 [B, C], and ``bad``, a list of `BadImage` that `ImageLoader` takes out. Without a single
            good image only ``bad`` is there.
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

    Attributes:
        wait_s: seconds that the main process has waited for batches, over all iterations.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        on_bad: Callable[[list[BadImage]], None] | None = None,
        in_step: bool = False,
        **options: Any,  # DataLoader's own
    ) -> None:
        """Pass on DataLoader's options.

        Args:
            dataset: the images.
            on_bad: called with the bad images of a batch.
            in_step: other processes wait for every batch, so that none may be skipped.
            options: of DataLoader.
        """
        super().__init__(dataset, timeout=_NO_BATCH_S if options.get("num_workers") else 0, **options)
        self.on_bad, self.in_step, self.samples = on_bad, in_step, dataset.samples
        self.wait_s = 0.0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # collation makes batches
        """Yield batches of tensors only.

        Raises:
            UserError: a batch without a good image, where other processes wait for it, or no batch for half an hour.
        """
        batches = super().__iter__()
        while True:
            started = time.monotonic()
            try:
                batch: dict[str, Any] | None = next(batches, None)
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
                raise UserError(
                    f"The data workers gave no batch for {self.timeout:g} s, see above if they said why: use "
                    "--data.num_workers 0."
                ) from error
            self.wait_s += time.monotonic() - started
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

    def state_dict(self) -> dict[str, Any]:
        """Empty: the position is in `ImageDataModule`'s state.

        That this method and the next exist tells Lightning that a resumed epoch goes on where it stopped;
        otherwise it warns that it doesn't.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore, see `state_dict`."""
