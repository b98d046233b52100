"""Slot weights of Soft MoE for one picture: what each slot reads of the patches, and what each patch takes from it.

There are two numbers per patch and slot, up to some ten thousand per layer. So a view carries the mean over the slots
of an expert only, and a page asks for the slots of one expert when somebody looks at them.

Axes: P patches, N tokens (patches and prefix tokens), E experts, S slots of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moevision.layers import SoftRouting

UNIT: Final = 1e-5  # of the whole numbers in `maps`: an even share of 1,000 patches has three digits left
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SlotWeights:
    """The slots of one layer, for the patches of one picture.

    Attributes:
        dispatch: [P, E, S] what each slot reads of each patch; with the prefix tokens it would sum to 1 over P.
        combine: [P, E, S] what each patch takes from each slot; sums to 1 over all slots.
    """

    dispatch: npt.NDArray[np.float32]
    combine: npt.NDArray[np.float32]

    @classmethod
    def of(cls, routing: SoftRouting) -> SlotWeights:
        """The slots of a batch of one picture, prefix tokens left out."""
        first = routing.num_prefix_tokens
        dispatch, combine = (
            weight[0, first:].float().cpu().numpy() for weight in (routing.dispatch_weight, routing.slot_weight)
        )
        return cls(dispatch, combine)

    @property
    def reads(self) -> Floats:
        """[E, P] what an expert reads: the mean over its slots."""
        mean: Floats = self.dispatch.mean(2, dtype=np.float64).T
        return mean

    def maps(self, expert: int) -> dict[str, Any]:
        """The slots of one expert as JSON.

        Returns:
            `unit`, the value of 1 in `reads` and `takes`, which are [S][P] whole numbers; and for each slot
            `reads_patches`, over how many patches its reading is spread (2 to the entropy in bits: 1 if it reads one
            patch, P if all evenly), and `reads_prefix`, its share of class and register tokens.
        """
        reads, takes = (weight[:, expert].T.astype(np.float64) for weight in (self.dispatch, self.combine))
        return {
            "unit": UNIT,
            "reads": np.round(reads / UNIT).astype(int).tolist(),
            "takes": np.round(takes / UNIT).astype(int).tolist(),
            "reads_patches": np.round(spread(reads), 2).tolist(),
            "reads_prefix": np.round(np.maximum(1 - reads.sum(1), 0), 4).tolist(),
        }


def spread(weights: Floats) -> Floats:
    """[...] over how many of [..., P] entries a weight is spread: 2 to the entropy of their shares."""
    total = np.maximum(weights.sum(-1, keepdims=True), np.finfo(np.float64).tiny)
    share = weights / total
    bits = -np.sum(share * np.log2(np.where(share > 0, share, 1)), axis=-1)
    patches: Floats = np.exp2(bits)
    return patches
