"""`LayerTrace`: what one MoE layer decided about every patch of a set of pictures.

Axes: I images, P patches (row-major in a grid of rows x columns; class and register tokens are left out), K choices
best first, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LAYER_ARRAYS = ("expert_index", "kept", "combine_weight", "probs", "margin", "entropy_bits")
_CHUNK = 64  # images that are counted or copied at once


@dataclass(frozen=True)
class LayerTrace:
    """One MoE layer's decisions about all patches.

    Attributes:
        layer: index of the transformer block, counted from 0.
        expert_index: [I, P, K] int16, the chosen experts, best first (requested: before any capacity).
        kept: [I, P, K] bool, False where an expert's capacity dropped the choice.
        combine_weight: [I, P, K] float32, the gate weight of each choice; a dropped one keeps its number here.
        probs: [I, P, E] float16, softmax of the router's clean scores. Rounding changes a probability by at most one
            part in 2048 (and those below 6.1e-5 by at most 3e-8); `margin` and `entropy_bits` are not affected.
        margin: [I, P] float32, the best minus the second-best router probability; 1 with a single expert.
        entropy_bits: [I, P] float32, entropy of the router's probabilities, 0 to log2 E bits.
    """

    layer: int
    expert_index: npt.NDArray[np.int16]
    kept: npt.NDArray[np.bool_]
    combine_weight: npt.NDArray[np.float32]
    probs: npt.NDArray[np.float16]
    margin: npt.NDArray[np.float32]
    entropy_bits: npt.NDArray[np.float32]

    @property
    def name(self) -> str:
        """The layer as it is shown, such as "L4"."""
        return f"L{self.layer}"

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.probs.shape[-1])

    @property
    def top_k(self) -> int:
        """K."""
        return int(self.expert_index.shape[-1])

    def first_choice(self) -> npt.NDArray[np.int16]:
        """[I, P]: the expert that each patch wants most, kept or not."""
        return self.expert_index[:, :, 0]

    def select(self, images: slice | npt.NDArray[np.int64]) -> LayerTrace:
        """The same of some images."""
        return LayerTrace(self.layer, **{name: getattr(self, name)[images] for name in LAYER_ARRAYS})

    def counts(self) -> npt.NDArray[np.int64]:
        """[I, E]: how many choices of each image every expert computes (kept ones)."""
        counts = np.empty((len(self.expert_index), self.num_experts), np.int64)
        for part in chunks(len(counts)):
            counts[part] = self._tally(part, np.arange(part.stop - part.start)[:, None, None])
        return counts

    def patch_counts(self) -> npt.NDArray[np.int64]:
        """[P, E]: how many choices every expert computes at each place of the grid (kept ones), over all images."""
        places = np.arange(self.expert_index.shape[1])[:, None]
        counts = np.zeros((len(places), self.num_experts), np.int64)
        for part in chunks(len(self.expert_index)):
            counts += self._tally(part, places)
        return counts

    def _tally(self, part: slice, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Kept choices per row and expert of some images; `rows` broadcasts to [images, P, K]."""
        choices = (rows * self.num_experts + self.expert_index[part])[self.kept[part]]
        counts = np.bincount(choices, minlength=rows.size * self.num_experts)
        return counts.reshape(rows.size, self.num_experts)


def chunks(images: int) -> Iterator[slice]:
    """Slices that cover all images, a few at a time: arrays that are mapped from a file aren't read whole."""
    for start in range(0, images, _CHUNK):
        yield slice(start, min(start + _CHUNK, images))
