"""The gates that stand side by side, their runs, and what protocol.md calls separate, different and fit to be shown.

Axes: C classes, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.queue import is_dirty

Record = Mapping[str, Any]
Layer = Mapping[str, Any]
SEEDS = range(3)
SEPARATE = 0.9  # of a class's photos in its own experts


@dataclass(frozen=True)
class Gate:
    """What decides which expert a photo gets.

    Attributes:
        title: in tables.
        experts: E; 0 is the dense model.
        aux: weights of balance losses; none are 0.
        by_class: whether the router's logits are trained on the class.
    """

    title: str
    experts: int
    aux: Mapping[str, float] = field(default_factory=dict)
    by_class: bool = False


_BALANCE = {"importance": 0.05, "load": 0.05}
GATES = {
    "dense": Gate("dense, no gate", 0),
    "alone": Gate("learned alone", 2),
    "balanced": Gate("learned with balance", 2, _BALANCE),
    "class": Gate("supervised by the class", 2, by_class=True),
    "balanced-4": Gate("learned with balance, 4 experts", 4, _BALANCE),
}
FEW = [gate for gate, spec in GATES.items() if spec.experts <= 2]


@dataclass(frozen=True)
class Job:
    """One run; `trunk` says whose blocks stand before the trained ones: `pretrained`, or `bundled` (to be shown)."""

    gate: str
    seed: int
    trunk: str = "pretrained"

    @property
    def name(self) -> str:
        """What its record is called."""
        return f"{self.gate}-{self.trunk}-s{self.seed}"


def queue(records: Sequence[Record]) -> Iterator[Job]:
    """All runs: seed by seed those of two experts; those to be shown, once these decide the gate; those of four."""
    yield from (Job(gate, seed) for seed in SEEDS for gate in FEW)
    if (gate := shown_gate(records)) is not None:
        yield from (Job(each, 0, "bundled") for each in (gate, "dense"))
    yield from (Job(gate, seed) for seed in SEEDS for gate in GATES if gate not in FEW)


def runs_of(records: Sequence[Record], gate: str, trunk: str = "pretrained") -> list[Record]:
    """The clean runs of a gate, by seed."""
    own = [run for run in records if (run["gate"], run["trunk"]) == (gate, trunk) and not is_dirty(run)]
    return sorted(own, key=lambda run: int(run["seed"]))


def shown_gate(records: Sequence[Record]) -> str | None:
    """`balanced` where it keeps the protocol's rule in every seed, else `class`; None before these runs are there."""
    if any(len(runs_of(records, gate)) < len(SEEDS) for gate in FEW):
        return None
    return "balanced" if any(kept(records, "balanced").values()) else "class"


def kept(records: Sequence[Record], gate: str) -> dict[str, bool]:
    """By layer whether every seed's experts are separate and different."""
    found: dict[str, bool] = {}
    for run in runs_of(records, gate):
        for layer in run["layers"]:
            found[layer["name"]] = found.get(layer["name"], True) and separate(layer) and different(layer)
    return found


def separate(layer: Layer) -> bool:
    """Whether at least `SEPARATE` of each class's photos are in its own experts."""
    return min(in_own(layer)) >= SEPARATE


def in_own(layer: Layer) -> list[float]:
    """[C] share of a class's photos in experts that see more of it than of the other; equal ones count for the first.

    Where all photos go to one expert that is 1 for the first class and 0 for the second.
    """
    first, second = layer["share"]
    of_first = [a >= b for a, b in zip(first, second, strict=True)]
    return [
        sum(share for share, own in zip(first, of_first, strict=True) if own),
        sum(share for share, own in zip(second, of_first, strict=True) if not own),
    ]


def different(layer: Layer) -> bool:
    """Whether the layer contributes, and exchanging its experts costs log-loss (intervals above 0)."""
    swap = layer["swap"]
    return swap is not None and min(cost["log_loss"]["low"] for cost in (swap["without"], swap)) > 0


def own_experts(layer: Layer) -> tuple[int, int]:
    """The expert that leans most to the first class, and the one that leans most to the second: always two."""
    first, second = layer["share"]
    order = sorted(range(len(first)), key=lambda e: second[e] - first[e])
    return order[0], order[-1]
