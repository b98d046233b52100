"""From the pictures of a batch to what the model gets: normalised once per batch, mixed, counted, and timed.

Axis legend: B batch, C classes, S = ``image_size``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from moevision.data.augment import normalize
from moevision.data.dataset import BadImage, ImageDataset, Pictures
from moevision.data.mix import BatchMixer

Batch = dict[str, Tensor]


class Collate:
    """Turns pictures into a batch: normalise, mix."""

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], seed: int = 0, mixer: BatchMixer | None = None
    ) -> None:
        """Remember the normalisation (per channel, in units of [0, 1]), the seed and the mixer."""
        self.mean, self.std, self.seed, self.mixer = mean, std, seed, mixer

    def __call__(self, pictures: Pictures) -> dict[str, Any]:
        """Build the batch dict.

        Returns:
            ``image`` float32 [B, 3, S, S], ``label`` int64 [B], ``index`` int64 [B], with a mixer ``target``
            float32 [B, C], and ``bad``, a list of `BadImage` that `ImageLoader` takes out. Without a single
            good picture only ``bad`` is there.
        """
        if not pictures.index:
            return {"bad": pictures.bad}
        batch: dict[str, Any] = {
            "image": normalize(pictures.pixels, self.mean, self.std),
            "label": torch.tensor(pictures.label),
            "index": torch.tensor(pictures.index),
            "bad": pictures.bad,
        }
        if self.mixer is not None:
            batch["image"], batch["target"] = self.mixer(
                batch["image"], batch["label"], self.seed, pictures.epoch[0], pictures.index[0]
            )
        return batch


class ImageLoader(DataLoader[Pictures]):
    """A DataLoader that reports bad pictures in the main process and skips batches without a good one.

    Attributes:
        wait_s: seconds that the main process has waited for batches, over all iterations.
    """

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
        self.wait_s = 0.0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # collation makes batches
        """Yield batches of tensors only."""
        batches = super().__iter__()
        while True:
            started = time.monotonic()
            batch: dict[str, Any] | None = next(batches, None)
            self.wait_s += time.monotonic() - started
            if batch is None:
                return
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
