"""The arms of the study, their learning rates, and the order of their runs, as protocol.md has them.

Axes: E experts, K choices.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from benchmarks import flops
from benchmarks.places import HYBRID, PLACES
from benchmarks.queue import is_dirty
from benchmarks.routers.report import rate_beyond
from benchmarks.subject import Subject, find_subject
from moevision.efficiency import measure_cost

EPOCHS = {"cpu": 1}
STEPS_PER_EPOCH = 351  # 45 000 training images in batches of 128, the rest left out
TUNING_SEEDS = (100, 101)
TIERS = (1, 2, 3, 4)
FACTORS = (0.5, 1.0, 2.0)
UNBALANCED = {"importance": 0.0, "load": 0.0, "load_balancing": 0.0, "z": 0.0}
Record = Mapping[str, Any]


MODEL = {"name": HYBRID}
"""The study's model; the rest of its recipe is configs/cifar10.yaml, which trains a wider one, and `RECIPE`."""
RECIPE = {"optim.weight_decay": 0.05, "optim.warmup_fraction": 0.2, "label_smoothing": 0.2}
"""What the config says already, said again: the config may change, a study may not."""


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        arch, aux: what it changes in `model.arch` and `model.aux` of configs/cifar10.yaml.
        tuned_as: the arm whose learning rate it takes; None: it is tuned itself.
        base_lr: the middle of the rates that are tried.
        tuning_seeds: seeds of the tuning runs.
        batch: images per optimizer step.
        guard: whether the stability guard watches.
    """

    arch: Mapping[str, Any] = field(default_factory=dict)
    aux: Mapping[str, Any] = field(default_factory=dict)
    tuned_as: str | None = "moe"
    base_lr: float = 6e-3
    tuning_seeds: Sequence[int] = TUNING_SEEDS
    batch: int = 128
    guard: bool = True

    def subject(self, name: str = "") -> Subject:
        """The model and its recipe, for measuring."""
        base = find_subject("cifar10")
        aux = {**base.aux, **self.aux}
        return replace(base, name=name, arch={**base.arch, **MODEL, **self.arch}, aux=aux, batch_size=self.batch)


TWIN = {"twin": "active_flops"}
_LEARNS_NOTHING = {
    name: {"arch": {"router": name}, "aux": UNBALANCED} for name in ("hash", "position", "colour", "random")
}


def _places(base_lr: float, arch: Mapping[str, Any], aux: Mapping[str, Any] = MappingProxyType({})) -> Arm:
    """An arm whose classifier reads every place, tuned around the rate of the arm that pools."""
    return Arm({"name": PLACES[HYBRID], **arch}, aux, tuned_as=None, base_lr=base_lr, tuning_seeds=TUNING_SEEDS[:1])


ARMS: dict[str, Arm] = {
    "moe": Arm(tuned_as=None),
    "twin": Arm(TWIN, tuned_as=None),
    "hash": Arm(**_LEARNS_NOTHING["hash"], tuned_as=None),
    "position": Arm(**_LEARNS_NOTHING["position"], tuned_as=None),
    "unbalanced": Arm(aux=UNBALANCED, tuned_as=None),
    "importance": Arm(aux={**UNBALANCED, "importance": 0.1}),
    "load": Arm(aux={**UNBALANCED, "load": 0.1}),
    "z": Arm(aux={**UNBALANCED, "z": 0.001}),
    "bias": Arm({"router": "bias_balanced"}, UNBALANCED),
    "rho10": Arm({"moe_layers": [3]}, tuned_as=None),
    "twin-time": Arm(TWIN, tuned_as="twin"),
    "twin-places": _places(24e-3, TWIN),
    "position-places": _places(12e-3, **_LEARNS_NOTHING["position"]),
    "moe-places": _places(12e-3, {}),
    "hash-places": _places(6e-3, **_LEARNS_NOTHING["hash"]),
    "twin-again": Arm(TWIN, tuned_as="twin"),
    "position-again": Arm(**_LEARNS_NOTHING["position"], tuned_as="position"),
    "moe-again": Arm(),
    "hash-again": Arm(**_LEARNS_NOTHING["hash"], tuned_as="hash"),
    "colour": Arm(**_LEARNS_NOTHING["colour"]),
    "random": Arm(**_LEARNS_NOTHING["random"]),
    "twin-parameters": Arm({"twin": "total_params"}),
}
LEARNED_NOTHING = ("hash", "position")
BALANCE = ("unbalanced", "importance", "load", "moe", "z", "bias")
PLACES_ARMS = ("twin-places", "position-places", "moe-places", "hash-places")
AGAIN = ("twin-again", "position-again", "moe-again", "hash-again")
STAGES: tuple[tuple[int, Sequence[str], range], ...] = (
    (1, ("moe", "twin"), range(6)),
    (1, LEARNED_NOTHING, range(6)),
    (2, ("rho10", "twin-time"), range(5)),
    (4, PLACES_ARMS, range(5)),
    (4, AGAIN, range(1)),
    (1, ("unbalanced", "importance", "load", "z", "bias"), range(6)),
    (1, ("moe", "twin", *LEARNED_NOTHING), range(6, 8)),
    (3, ("colour", "random", "twin-parameters"), range(5)),
)


@dataclass(frozen=True)
class Job:
    """One run; `lr` is None as long as the runs that decide it aren't done."""

    device: str
    tier: int
    arm: str
    seed: int
    lr: float | None

    @property
    def name(self) -> str:
        """What its folder and its record are called."""
        return f"{self.device}-{self.arm}-lr{self.lr:g}-s{self.seed}"


def queue(records: Sequence[Record], device: str, tiers: Sequence[int] = TIERS) -> Iterator[Job]:
    """All runs of a device in order; `records` say which rates are tried and which one is chosen."""
    tuned = set()
    for tier, arms, seeds in STAGES:
        if tier not in tiers:
            continue
        for arm in (ARMS[arm].tuned_as or arm for arm in arms):
            if arm not in tuned:
                tuned.add(arm)
                for lr in rates_to_try(records, device, arm):
                    yield from (Job(device, tier, arm, seed, lr) for seed in ARMS[arm].tuning_seeds)
        for seed in seeds:
            yield from (Job(device, tier, arm, seed, rate_of(records, device, arm)) for arm in arms)


def validation(records: Sequence[Record], seeds: Sequence[int], **keys: Any) -> dict[float, float]:
    """Mean validation accuracy of every learning rate whose runs of these seeds are all done; a failed run counts 0.

    `keys` are what the records of these runs have.
    """
    found: dict[float, dict[int, float]] = {}
    for run in records:
        if keys.items() <= run.items() and run["seed"] in seeds and not is_dirty(run):
            found.setdefault(run["lr"], {})[run["seed"]] = 0.0 if run["failed"] else run["val_top1"]
    return {lr: statistics.fmean(of.values()) for lr, of in found.items() if of.keys() >= set(seeds)}


def rates_around(middle: float, tried: Mapping[float, float]) -> list[float]:
    """Half, once and twice a rate and, once they are done, one beyond whichever edge wins."""
    rates = [factor * middle for factor in FACTORS]
    while all(lr in tried for lr in rates):
        edges_first = sorted(rates, key=lambda lr: lr not in (min(rates), max(rates)))  # an edge that ties wins
        further = rate_beyond({lr: tried[lr] for lr in edges_first})
        if further is None:
            break
        rates.append(further)
    return rates


def best_rate(middle: float, tried: Mapping[float, float]) -> float | None:
    """The best of `rates_around`, the lowest of those that tie; None if it isn't decided."""
    if any(lr not in tried for lr in rates_around(middle, tried)):
        return None
    return max(sorted(tried), key=lambda lr: tried[lr])


def rates_to_try(records: Sequence[Record], device: str, arm: str) -> list[float]:
    """The rates of an arm's tuning runs, as far as these records decide them."""
    return rates_around(ARMS[arm].base_lr, _tried(records, device, arm))


def rate_of(records: Sequence[Record], device: str, arm: str) -> float | None:
    """The learning rate of an arm, or of the one that it is tuned as; None if it isn't decided."""
    arm = ARMS[arm].tuned_as or arm
    return best_rate(ARMS[arm].base_lr, _tried(records, device, arm))


def _tried(records: Sequence[Record], device: str, arm: str) -> dict[float, float]:
    return validation(records, ARMS[arm].tuning_seeds, device=device, arm=arm)


def progress(records: Sequence[Record], device: str, tiers: Sequence[int] = TIERS) -> tuple[int, int]:
    """How many runs of the queue are done, and how many are missing; further learning rates aren't foreseen."""
    jobs = list(queue(records, device, tiers))
    done = {(run["arm"], run["seed"], run["lr"]) for run in records if run["device"] == device}
    left = sum((job.arm, job.seed, job.lr) not in done for job in jobs)
    return len(jobs) - left, left


def cost_of(arm: str) -> dict[str, float]:
    """Parameters and FLOPs per image of an arm on CIFAR-10, and ρ."""
    subject = ARMS[arm].subject(arm)
    return {**vars(measure_cost(subject.build().eval(), subject.image_size)), "routed_share": routed_share(subject)}


def routed_share(subject: Subject) -> float:
    """ρ, the share of all FLOPs of an image that are in routed experts."""
    return flops.routed_share(subject.build().eval(), subject.image_size)
