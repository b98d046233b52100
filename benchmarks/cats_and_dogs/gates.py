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
        aux: weights of the router's losses; none are 0.
    """

    title: str
    experts: int
    aux: Mapping[str, float] = field(default_factory=dict)


_BALANCE = {"importance": 0.05, "load": 0.05}
GATES = {
    "dense": Gate("dense, no gate", 0),
    "alone": Gate("learned alone", 2),
    "balanced": Gate("learned with balance", 2, _BALANCE),
    "class": Gate("supervised by the class", 2, {"label": 1.0}),
    "balanced-4": Gate("learned with balance, 4 experts", 4, _BALANCE),
}
FEW = [gate for gate, spec in GATES.items() if spec.experts <= 2]
LEARN = {"experts": "experts alone", "blocks": "last blocks"}
"""What is trained beside routers and classifier: the experts in a frozen network, or all of the last blocks."""


@dataclass(frozen=True)
class Job:
    """One run; `trunk` says whose weights stay: `pretrained`, or `bundled`, the explorer's, where it is to be shown."""

    gate: str
    learn: str
    seed: int
    trunk: str = "pretrained"

    @property
    def name(self) -> str:
        """What its record is called."""
        return f"{self.gate}-{self.learn}-{self.trunk}-s{self.seed}"


def queue(records: Sequence[Record]) -> Iterator[Job]:
    """All runs: seed by seed those of two experts; those to be shown, once these decide it; those of four."""
    yield from (Job(gate, learn, seed) for seed in SEEDS for learn in LEARN for gate in FEW)
    if (shown := to_show(records)) is not None:
        yield from (Job(gate, shown[1], 0, "bundled") for gate in (shown[0], "dense"))
    yield from (Job(gate, learn, seed) for seed in SEEDS for learn in LEARN for gate in GATES if gate not in FEW)


def runs_of(records: Sequence[Record], gate: str, learn: str, trunk: str = "pretrained") -> list[Record]:
    """The clean runs of a gate, by seed."""
    key = (gate, learn, trunk)
    own = [run for run in records if (run["gate"], run["learn"], run["trunk"]) == key and not is_dirty(run)]
    return sorted(own, key=lambda run: int(run["seed"]))


def to_show(records: Sequence[Record]) -> tuple[str, str] | None:
    """Gate and what learns: `balanced` where it holds, else `class`; None before the runs of two experts are there."""
    if any(len(runs_of(records, gate, learn)) < len(SEEDS) for gate in FEW for learn in LEARN):
        return None
    held = [("balanced", learn) for learn in LEARN if holds(records, "balanced", learn)]
    return (held or [("class", "experts")])[0]


def holds(records: Sequence[Record], gate: str, learn: str) -> bool:
    """Whether in one layer the experts of every seed are separate and different."""
    layers = [run["layers"] for run in runs_of(records, gate, learn)]
    return any(all(separate(each) and different(each) for each in same) for same in zip(*layers, strict=True))


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
