"""`LayerTrace`: what one MoE layer decided about every patch of a set of pictures.

Two questions can be asked of a patch and an expert, and where tokens choose they are one: the choice counts 1.

- `reads`: how much of the patch does the expert compute? Expert choice: 1 where it took the patch. Soft MoE: the
  dispatch weight, summed over the expert's slots. In a picture these add up to the same for every expert, so they can
  say where and what an expert reads, and nothing about the class of a picture.
- `takes`: how much of the patch's output comes from the expert? Expert choice and Soft MoE: its weight there. That
  differs between pictures, so questions about classes are asked of it.

Axes: I images, P patches (row-major in a grid of rows x columns; class and register tokens are left out), K choices
best first (all E experts where tokens don't choose), E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moevision.layers.routing import Kind as RoutingKind

LAYER_ARRAYS = ("expert_index", "kept", "combine_weight", "probs", "margin", "entropy_bits")
_CHUNK = 64  # images that are counted or copied at once

Numbers = npt.NDArray[Any]


@dataclass(frozen=True)
class LayerTrace:
    """One MoE layer's decisions about all patches.

    Attributes:
        layer: index of the transformer block, counted from 0.
        expert_index: [I, P, K] int16, the chosen experts, best first (requested: before any capacity). Expert choice:
            those that took the patch come first. Soft MoE: the largest weight first.
        kept: [I, P, K] bool, whether the expert computes the patch: False where its capacity dropped the choice;
            expert choice: where it did not take the patch.
        combine_weight: [I, P, K] float32, the gate weight of each choice; a dropped one keeps its number here.
        probs: [I, P, E] float16, the router's clean affinities (softmax of its scores). Rounding changes one by at most
            one part in 2048 (and those below 6.1e-5 by at most 3e-8); `margin` and `entropy_bits` are not affected.
        margin: [I, P] float32, the best minus the second-best router probability; 1 with a single expert.
        entropy_bits: [I, P] float32, entropy of the router's probabilities, 0 to log2 E bits.
        kind: who chooses: tokens, experts, or (Soft MoE) nobody.
        read_weight: [I, P, K] float32, Soft MoE only: how much of the patch the slots of each expert read.
    """

    layer: int
    expert_index: npt.NDArray[np.int16]
    kept: npt.NDArray[np.bool_]
    combine_weight: npt.NDArray[np.float32]
    probs: npt.NDArray[np.float16]
    margin: npt.NDArray[np.float32]
    entropy_bits: npt.NDArray[np.float32]
    kind: RoutingKind = "token_choice"
    read_weight: npt.NDArray[np.float32] | None = None

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

    @property
    def experts_per_patch(self) -> float:
        """How many experts compute a patch, on average."""
        return float(np.asarray(self.kept).sum() / max(1, np.asarray(self.margin).size))

    @property
    def reads(self) -> Numbers:
        """[I, P, K] how much of the patch each of `expert_index` reads, see above."""
        return self._reads(slice(None))

    @property
    def takes(self) -> Numbers:
        """[I, P, K] how much the patch takes from each of `expert_index`, see above."""
        return self._takes(slice(None))

    @property
    def wanted(self) -> Numbers | None:
        """[I, P, K] what each of `expert_index` counts where the router's wish is asked for: 1 (None) or `reads`."""
        return None if self.kind == "token_choice" else self.reads

    def arrays(self) -> dict[str, Numbers]:
        """Its arrays by name."""
        found = {name: getattr(self, name) for name in LAYER_ARRAYS}
        return found if self.read_weight is None else {**found, "read_weight": self.read_weight}

    def first_choice(self) -> npt.NDArray[np.int16]:
        """[I, P]: the expert that each patch wants most, kept or not.

        Expert choice: of those that took the patch the one with the largest weight; -1 where none did.
        """
        first = self.expert_index[:, :, 0]
        if self.kind != "expert_choice":
            return first
        taken: npt.NDArray[np.int16] = np.where(self.kept[:, :, 0], first, np.int16(-1))
        return taken

    def select(self, images: slice | npt.NDArray[np.int64]) -> LayerTrace:
        """The same of some images."""
        return LayerTrace(self.layer, kind=self.kind, **{name: array[images] for name, array in self.arrays().items()})

    def counts(self) -> Numbers:
        """[I, E]: the load, int64: how many choices of each image every expert computes.

        Soft MoE, where every expert computes as many slots: float64, the sum of the weights that patches take.
        """
        return self._sums(self._takes if self.kind == "soft" else self._reads)

    def image_takes(self) -> Numbers:
        """[I, E]: what each image takes from every expert; what questions about classes are asked of."""
        return self._sums(self._takes)

    def patch_counts(self) -> Numbers:
        """[P, E]: how much every expert reads at each place of the grid (a choice counts 1), over all images."""
        places = np.arange(self.expert_index.shape[1])[:, None]
        parts = chunks(len(self.expert_index))
        empty = self._tally(slice(0), places, self._reads(slice(0)))
        total: Numbers = sum((self._tally(part, places, self._reads(part)) for part in parts), start=empty)
        return total

    def kept_per_patch(self) -> npt.NDArray[np.int64]:
        """[K + 1]: how many patches are computed by 0, 1, ... K experts."""
        counts: npt.NDArray[np.int64] = np.bincount(np.asarray(self.kept).sum(-1).ravel(), minlength=self.top_k + 1)
        return counts

    def _reads(self, part: slice) -> Numbers:
        return self.kept[part] if self.read_weight is None else self.read_weight[part] * self.kept[part]

    def _takes(self, part: slice) -> Numbers:
        return self.kept[part] if self.kind == "token_choice" else self.combine_weight[part] * self.kept[part]

    def _sums(self, amount: Callable[[slice], Numbers]) -> Numbers:
        """[I, E] amounts [I, P, K] by image and expert."""
        rows = [
            self._tally(part, np.arange(part.stop - part.start)[:, None, None], amount(part))
            for part in chunks(len(self.expert_index))
        ]
        return np.concatenate([self._tally(slice(0), np.zeros((0, 1, 1), int), amount(slice(0))), *rows])

    def _tally(self, part: slice, rows: npt.NDArray[np.int64], amount: Numbers) -> Numbers:
        """Amounts [images, P, K] of some images by row and expert; `rows` broadcasts to the same."""
        cells = rows * self.num_experts + self.expert_index[part]
        length = rows.size * self.num_experts
        if amount.dtype == bool:
            return np.bincount(cells[amount], minlength=length).reshape(rows.size, self.num_experts)
        sums = np.bincount(cells.ravel(), weights=amount.ravel().astype(np.float64), minlength=length)
        return sums.reshape(rows.size, self.num_experts)


def chunks(images: int) -> Iterator[slice]:
    """Slices that cover all images, a few at a time: arrays that are mapped from a file aren't read whole."""
    for start in range(0, images, _CHUNK):
        yield slice(start, min(start + _CHUNK, images))
