"""A layer's own rule of choice, for scores in which nothing is learned: what its baselines are put through.

Information depends on how many experts a patch has and on how evenly it takes from them, so a baseline has to choose as
the layer does and differ from it in its scores only:

- token choice: each patch has the K experts with the largest score;
- expert choice: each expert takes the C patches of every picture that suit it best, by the softmax over experts;
- Soft MoE: each expert reads the softmax over patches, each patch takes the softmax over experts.

Where there is a softmax the scores are first scaled so that it is as undecided as the layer is on average.

Axes: I images, P patches, K choices, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moevision.analysis.contingency import choice_counts
from moevision.analysis.trace import LayerTrace, RoutingTrace
from moevision.layers.routing import Kind as RoutingKind

Floats = npt.NDArray[np.floating[Any]]
_MOST_DECIDED, _STEPS = 1e6, 60  # of the search for a scale
_SAMPLE = 4096  # patches that it looks at


class Chosen(NamedTuple):
    """As `LayerTrace` says it.

    Attributes:
        expert_index: [I, P, K] int16.
        reads: [I, P, K]; None for 1.
        takes: [I, P, K]; None for 1.
    """

    expert_index: npt.NDArray[np.int16]
    reads: npt.NDArray[Any] | None = None
    takes: npt.NDArray[Any] | None = None


@dataclass(frozen=True)
class Rule:
    """How a layer chooses.

    Attributes:
        kind: who chooses.
        num_experts: E.
        top_k: K of token choice, C of expert choice, 0 for Soft MoE.
        entropy_bits: mean entropy of the layer's router; 0 for token choice, which needs none.
    """

    kind: RoutingKind
    num_experts: int
    top_k: int
    entropy_bits: float = 0.0

    @classmethod
    def of(cls, layer: LayerTrace) -> Rule:
        """The rule of a traced layer."""
        if layer.kind == "token_choice":
            return cls(layer.kind, layer.num_experts, layer.top_k)
        entropy = float(np.asarray(layer.entropy_bits, dtype=np.float64).mean())
        taken = round(float(layer.counts().mean())) if layer.kind == "expert_choice" else 0
        return cls(layer.kind, layer.num_experts, taken, entropy)

    def scale(self, scores: Floats) -> float:
        """What to multiply scores [..., E] by, so that their softmax has the layer's mean entropy."""
        if self.kind == "token_choice":
            return 1.0
        flat = np.asarray(scores, dtype=np.float64).reshape(-1, self.num_experts)
        flat = flat[:: -(-len(flat) // _SAMPLE)]
        unit = flat / max(float(flat.std(-1).mean()), 1e-12)
        low, high = 1 / _MOST_DECIDED, _MOST_DECIDED
        for _ in range(_STEPS):
            middle = float(np.sqrt(low * high))
            low, high = (low, middle) if _mean_entropy_bits(middle * unit) < self.entropy_bits else (middle, high)
        return low / max(float(flat.std(-1).mean()), 1e-12)

    def apply(self, scores: npt.NDArray[Any], scale: float) -> Chosen:
        """What scores [I, P, E] choose.

        Args:
            scores: larger is better.
            scale: from `scale`.
        """
        if self.kind == "token_choice":
            return Chosen(np.argsort(scores, axis=-1)[..., ::-1][..., : self.top_k].astype(np.int16))
        everyone = np.broadcast_to(np.arange(self.num_experts, dtype=np.int16), scores.shape)
        logits = scale * np.asarray(scores, dtype=np.float64)
        affinity = _log_softmax(logits, -1)
        takes = np.exp(affinity).astype(np.float32)
        if self.kind == "soft":
            return Chosen(everyone, np.exp(_log_softmax(logits, 1)).astype(np.float32), takes)
        rank = np.argsort(np.argsort(-affinity, axis=1, kind="stable"), axis=1)
        taken = rank < self.top_k
        return Chosen(everyone, taken, takes * taken)


def rules_of(trace: RoutingTrace) -> dict[Rule, list[int | None]]:
    """The rules of the layers, each with the layers that it stands beside; [None] where it is the same for all."""
    found: dict[Rule, list[int | None]] = {}
    for layer in trace.layers:
        found.setdefault(Rule.of(layer), []).append(layer.layer)
    return found if len(found) > 1 else {rule: [None] for rule in found}


@dataclass(frozen=True)
class Assignments:
    """The experts that one baseline gives to patches.

    Attributes:
        layer: block index that it stands beside; None where it is the same for every layer.
        seed: of what is random in it.
        expert_index: [I', P, K] int16, best first.
        images: [I'] rows of the trace that it was measured on.
        num_experts: E.
        reads: [I', P, K] how much of the patch each expert reads, as in `LayerTrace`; 1 if None.
        takes: [I', P, K] how much the patch takes from each; 1 if None.
    """

    layer: int | None
    seed: int
    expert_index: npt.NDArray[np.int16]
    images: npt.NDArray[np.int64]
    num_experts: int
    reads: npt.NDArray[Any] | None = None
    takes: npt.NDArray[Any] | None = None

    def counts(self) -> Floats:
        """[I', P, E] what each expert reads of each patch: its choices, where tokens choose."""
        return choice_counts(self.expert_index, self.num_experts, self.reads)

    def patch_takes(self) -> Floats:
        """[I', P, E] what each patch takes from each expert: the same, where tokens choose."""
        return choice_counts(self.expert_index, self.num_experts, self.takes)


def _log_softmax(x: Floats, axis: int) -> Floats:
    shifted = x - x.max(axis, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis, keepdims=True))
    return result


def _mean_entropy_bits(logits: Floats) -> float:
    logs = _log_softmax(logits, -1)
    return float(-(np.exp(logs) * logs).sum(-1).mean() / np.log(2))
