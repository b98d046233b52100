"""The data sets, arms and runs of the study, as protocol.md has them.

Axes: E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SEEDS, CONFIRMING_SEEDS = (0, 1, 2), (10, 11, 12)
CLASS = "class"  # the question about a data set's own classes
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way to route.

    Attributes:
        router: its name.
        unit: `token` or `image`.
        layers: `last2` or `every2`.
        aux: weights of its balance losses.
        options: further options of the router.
    """

    router: str
    unit: str
    layers: str = "last2"
    aux: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


_BALANCE: dict[str, dict[str, Any]] = {
    "vmoe_top_k": {"aux": {"importance": 0.05, "load": 0.05}},
    "noisy_top_k": {"aux": {"importance": 0.05, "load": 0.05}},
    "switch": {"aux": {"load_balancing": 0.05}},
    "bias_balanced": {"options": {"bias_rate": 0.01}},
}
EVERY2 = ("vmoe_top_k", "bias_balanced")
UNITS = ("token", "image")
ARMS: dict[str, Arm] = {
    **{f"{router}-{unit}": Arm(router, unit, **own) for router, own in _BALANCE.items() for unit in UNITS},
    **{
        f"{router}-{unit}-every2": Arm(router, unit, "every2", **_BALANCE[router])
        for router in EVERY2
        for unit in UNITS
    },
    **{f"unbalanced-{unit}": Arm("vmoe_top_k", unit, aux={"importance": 0.0, "load": 0.0}) for unit in UNITS},
}


@dataclass(frozen=True)
class DataSet:
    """What one data set's runs share.

    Attributes:
        arms: names of its arms, in order.
        experts: E; one expert per token or image.
        depth: blocks of the trunk.
        trunk_seeds: whether every seed has a trunk of its own; else all share that of seed 0.
        trunk_steps: optimizer steps of a trunk.
        trunk_optim: fields of `OptimizerConfig` for them.
        batch: images per step, of trunks and arms.
        images: training images of an arm, each with an augmentation of its own and seen once.
        optim: fields of `OptimizerConfig` for an arm.
        asked: the split whose images the arms are asked about, and how many images at most.
        confirming: the split that confirms; None: nothing is chosen here.
        units: name of a question -> the classes that it takes together, each group by name; none for `class`.
        bf16: whether training runs under bf16 autocast.
        run_s: CPU seconds of one run by placement, as measured for the protocol.
        trunk_s: CPU seconds of a trunk with its tokens.
    """

    arms: Sequence[str]
    experts: int
    depth: int
    trunk_seeds: bool
    trunk_steps: int
    trunk_optim: Mapping[str, Any]
    batch: int
    images: int
    optim: Mapping[str, Any]
    asked: tuple[str, int]
    confirming: str | None
    units: Mapping[str, Mapping[str, Sequence[str]]]
    bf16: bool
    run_s: Mapping[str, int]
    trunk_s: int

    @property
    def steps(self) -> int:
        """Optimizer steps of an arm."""
        return self.images // self.batch

    @property
    def precision(self) -> str:
        """Of training."""
        return "bf16" if self.bf16 else "fp32"


_VEHICLES = ("airplane", "automobile", "ship", "truck")
_ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
# On photos one more router in every other block would cost as much as all runs on the other data sets.
_ON_PHOTOS = tuple(name for name in ARMS if name not in ("bias_balanced-token-every2", "bias_balanced-image-every2"))
_MUON = {"name": "muon", "lr": 6e-3}
DATA_SETS: dict[str, DataSet] = {
    "pets": DataSet(
        arms=tuple(ARMS), experts=8, depth=6, trunk_seeds=True, trunk_steps=300, trunk_optim=_MUON, batch=64,
        images=8192, optim={"lr": 1e-3}, asked=("test", 1000), confirming=None, units={CLASS: {}}, bf16=False,
        run_s={"last2": 15, "every2": 25}, trunk_s=190,
    ),
    "cifar10": DataSet(
        arms=tuple(ARMS), experts=8, depth=6, trunk_seeds=True, trunk_steps=300, trunk_optim=_MUON, batch=64,
        images=8192, optim={"lr": 1e-3}, asked=("test", 1000), confirming=None,
        units={CLASS: {}, "animal or vehicle": {"animal": _ANIMALS, "vehicle": _VEHICLES}}, bf16=False,
        run_s={"last2": 20, "every2": 30}, trunk_s=170,
    ),
    "cats_vs_dogs": DataSet(
        arms=_ON_PHOTOS, experts=4, depth=12, trunk_seeds=False, trunk_steps=144,
        trunk_optim={"lr": 3e-4, "layer_decay": 0.75}, batch=32, images=3072, optim={"lr": 3e-4}, asked=("val", 512),
        confirming="test", units={CLASS: {}}, bf16=True, run_s={"last2": 85, "every2": 260}, trunk_s=400,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One run: an arm on a data set, asked about the images of one split."""

    data: str
    arm: str
    seed: int
    split: str

    @property
    def name(self) -> str:
        """What its record is called."""
        return f"{self.data}-{self.arm}-{self.split}-s{self.seed}"

    @property
    def trunk_seed(self) -> int:
        """Of the trunk that it starts from."""
        return self.seed if DATA_SETS[self.data].trunk_seeds else 0

    @property
    def seconds(self) -> int:
        """CPU seconds that it takes, by the protocol's measurement."""
        return DATA_SETS[self.data].run_s[ARMS[self.arm].layers]


def queue(chosen: Mapping[str, str | None], data: Sequence[str] = tuple(DATA_SETS)) -> Iterator[Job]:
    """All runs in order: seed by seed, and at last those that confirm what was chosen.

    Args:
        chosen: data set -> the arm that the rule has chosen; None: none, or not decided yet.
        data: data sets to run.
    """
    for name in data:
        for seed in SEEDS:
            yield from (Job(name, arm, seed, DATA_SETS[name].asked[0]) for arm in DATA_SETS[name].arms)
    for name in data:
        split, arm = DATA_SETS[name].confirming, chosen.get(name)
        if split is not None and arm is not None:
            yield from (Job(name, arm, seed, split) for seed in CONFIRMING_SEEDS)
