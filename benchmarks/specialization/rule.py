"""What the records say together: answers over seeds, experts matched between them, and the rule that chooses a setting.

The rule and its limits stand in protocol.md; they were fixed before any run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.queue import is_dirty
from benchmarks.specialization.arms import CLASS, CONFIRMING_SEEDS, DATA_SETS, SEEDS, Record
from moevision.analysis.questions import A_LITTLE_WORD, NOT_MEASURED, NOT_SHOWN, NOTHING, YES

MOST_LOADED, LEAST_LOADED, VISIBLE = 1.5, 0.25, 0.75
CHOOSING = "cats_vs_dogs"  # the real photos
Layer = Mapping[str, Any]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Setting:
    """One MoE layer of one arm, over its seeds.

    Attributes:
        data, arm, unit: of the runs and of the question.
        layer: its name, such as "L11".
        runs: the runs' records, by seed.
        layers: what each run's record says of the layer.
    """

    data: str
    arm: str
    unit: str
    layer: str
    runs: Sequence[Record]
    layers: Sequence[Layer]

    @property
    def name(self) -> str:
        """As in "vmoe_top_k-image, L11"."""
        return f"{self.arm}, {self.layer}"

    def each(self, value: Callable[[Layer], float]) -> list[float]:
        """A number of every seed."""
        return [value(layer) for layer in self.layers]

    def answer(self, question: int) -> str:
        """The weakest answer of any seed."""
        found = {layer["answers"][question]["answer"] for layer in self.layers}
        return next(word for word in (NOT_MEASURED, NOTHING, NOT_SHOWN, A_LITTLE_WORD, YES) if word in found)

    @property
    def place(self) -> int:
        """Of the layer among those asked."""
        return [layer["name"] for layer in self.runs[0]["answers"][self.unit]].index(self.layer)

    @property
    def kappa(self) -> float | None:
        """Mean agreement of two seeds' experts after matching, beyond chance; None with fewer than two."""
        routes = [[[int(digit) for digit in image] for image in run["routes"][self.place]] for run in self.runs]
        experts = len(self.layers[0]["load"]["share"])
        pairs = [matched_kappa(np.array(a), np.array(b), experts) for a, b in combinations(routes, 2)]
        return float(np.mean(pairs)) if pairs else None


def matched_kappa(first: Array, second: Array, num_experts: int, seed: int = 0) -> float:
    """Agreement of two routers' choices [I, ...] of E experts on the same images, after their experts are paired.

    The pairing (Hungarian method) is found on one half of the images and its agreement measured on the other: the best
    of E! pairings agrees by chance too.
    """
    from scipy.optimize import linear_sum_assignment

    half = np.random.default_rng(seed).permutation(len(first))
    fitted, measured = half[: len(half) // 2], half[len(half) // 2 :]
    _, order = linear_sum_assignment(pair_counts(first[fitted], second[fitted], num_experts), maximize=True)
    return cohen_kappa(pair_counts(first[measured], second[measured], num_experts)[:, order])


def pair_counts(a: Array, b: Array, num_experts: int) -> Array:
    """[E, E]: how often `a` has expert i where `b` has expert j."""
    pairs = a.astype(np.int64).ravel() * num_experts + b.ravel()  # cell of the table, row-major
    return np.bincount(pairs, minlength=num_experts**2).reshape(num_experts, num_experts)


def cohen_kappa(table: Array) -> float:
    """Cohen's kappa of a square table: agreement beyond what the margins give; 0 where nothing could disagree."""
    share = table / table.sum()
    observed, expected = float(np.trace(share)), float(share.sum(1) @ share.sum(0))
    return (observed - expected) / (1 - expected) if expected < 1 - 1e-12 else 0.0


def settings_of(records: Sequence[Record], data: str, unit: str, split: str | None = None) -> list[Setting]:
    """All settings of a data set in the order of the arms, as far as they were run.

    Args:
        records: all records; those of a changed tree are left out.
        data: the data set.
        unit: what is asked about, one of its `units`.
        split: whose images; those that everything is asked about if None.
    """
    split = split or DATA_SETS[data].asked[0]
    found = []
    for arm in DATA_SETS[data].arms:
        key = (data, arm, split)
        own = [run for run in records if (run["data"], run["arm"], run["split"]) == key and not is_dirty(run)]
        runs = sorted(own, key=lambda run: int(run["seed"]))
        for place, layer in enumerate(runs[0]["answers"][unit] if runs else ()):
            found.append(Setting(data, arm, unit, layer["name"], runs, [run["answers"][unit][place] for run in runs]))
    return found


def guess(layer: Layer) -> float:
    """Share of patches (images) whose class is guessed right from their expert."""
    return float(layer["readings"][0]["guess"]["value"])


def max_over_mean(layer: Layer) -> float:
    """Busiest expert over the mean."""
    return float(layer["load"]["max_over_mean"])


def least_over_mean(layer: Layer) -> float:
    """Idlest expert over the mean."""
    return float(min(layer["load"]["share"]) * len(layer["load"]["share"]))


def above_before(layer: Layer) -> bool:
    """Whether the interval of the bits about the class lies above that of the same router before training."""
    before = next(reading for reading in layer["controls"]["before"] if reading["unit"] == "patch")
    own = next(reading for reading in layer["same"]["before"] if reading["unit"] == "patch")
    return bool(own["bits"]["low"] > before["bits"]["high"])


def swap_costs(layer: Layer) -> bool:
    """Whether the interval of the accuracy lost by the swap lies above 0."""
    return layer["swap"] is not None and layer["swap"]["points"]["low"] > 0


CONDITIONS: dict[str, Callable[[Layer], bool]] = {
    f"max/mean at most {MOST_LOADED}": lambda layer: max_over_mean(layer) <= MOST_LOADED,
    f"no expert below {LEAST_LOADED} of the mean": lambda layer: least_over_mean(layer) >= LEAST_LOADED,
    f"class guessed right from the expert: at least {100 * VISIBLE:.0f} %": lambda layer: guess(layer) >= VISIBLE,
    "more bits than before training": above_before,
    "the swap costs accuracy": swap_costs,
}
"""The rule: all of these in every seed. Name -> whether one layer of one run keeps it."""


def failures(setting: Setting) -> list[str]:
    """The conditions that some seed of a setting doesn't keep."""
    return [name for name, kept in CONDITIONS.items() if not all(kept(layer) for layer in setting.layers)]


def choose(settings: Sequence[Setting]) -> Setting | None:
    """Of those that keep all conditions the one whose worst seed guesses best; the earlier one of equals."""
    able = [setting for setting in settings if not failures(setting)]
    return max(able, key=lambda setting: min(setting.each(guess)), default=None)


def decided(records: Sequence[Record], data: str = CHOOSING) -> bool:
    """Whether all runs that the rule looks at are there, or no run that is left could change what it says."""
    done = {(run["arm"], run["seed"]) for run in records
            if (run["data"], run["split"]) == (data, DATA_SETS[data].asked[0]) and not is_dirty(run)}  # fmt: skip
    if all((arm, seed) in done for arm in DATA_SETS[data].arms for seed in SEEDS):
        return True
    arms = {arm for arm, _ in done}
    return arms == set(DATA_SETS[data].arms) and all(map(failures, settings_of(records, data, CLASS)))


def chosen(records: Sequence[Record]) -> Setting | None:
    """The one setting on real photos; None where none keeps the rule, or it isn't decided."""
    if not decided(records):
        return None
    return choose(settings_of(records, CHOOSING, CLASS))


def confirmation(records: Sequence[Record], setting: Setting) -> Setting | None:
    """The same setting, trained anew, on photos that no choice has seen; None as long as a seed is missing."""
    split = DATA_SETS[setting.data].confirming
    found = settings_of(records, setting.data, setting.unit, split)
    same = next((each for each in found if (each.arm, each.layer) == (setting.arm, setting.layer)), None)
    return same if same is not None and {run["seed"] for run in same.runs} == set(CONFIRMING_SEEDS) else None
