"""How the gain of experts depends on what must be remembered.

    python benchmarks/doses/recompute.py

prints every measured number of README.md, from runs.jsonl and prices.json, and what other pages quote of them. The code
that ran the study is benchmarks/doses of the commits that the records name; it has left the tree. Arms and rules are in
protocol.md.

A record is one training of one arm with one seed. Runs with seed 100 tune an arm's learning rate on validation images
and count nowhere else. Arms of a cell, which is a task, a dose and a time, are compared by test accuracy, seed by seed,
with Student's t.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import ttest_1samp

FOLDER = Path(__file__).parent
STUDY = "benchmarks/doses/README.md"
TUNING_SEED = 100
Run = dict[str, Any]


class Interval(NamedTuple):
    """A mean and both ends of Student's 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def points(self) -> str:
        """`+4.6 (+4.1 to +5.2)`, of shares."""
        mean, low, high = (signed(100 * value, 1) for value in self)
        return f"{mean} ({low} to {high})"

    @property
    def nats(self) -> str:
        """`+0.100 (+0.092 to +0.108)`, of losses."""
        mean, low, high = (signed(value, 3) for value in self)
        return f"{mean} ({low} to {high})"


def signed(value: float, digits: int) -> str:
    """With its sign, a true minus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def interval(values: Sequence[float]) -> Interval:
    """The mean of values and its 95 % interval."""
    return Interval(fmean(values), *ttest_1samp(values, 0).confidence_interval(0.95))


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for their number (Holm 1979)."""
    order = np.argsort(p_values)
    scaled = np.sort(p_values) * np.arange(len(p_values), 0, -1)
    return np.minimum(np.maximum.accumulate(scaled), 1.0)[order.argsort()].tolist()


@dataclass(frozen=True)
class Cell:
    """The runs that had the same time for the same task."""

    task: str
    dose: str
    seconds: float

    @cached_property
    def runs(self) -> list[Run]:
        """All of them, by rate and seed."""
        key = (self.task, self.dose, self.seconds)
        own = [run for run in RUNS if (run["task"], run["dose"], run["seconds"]) == key]
        return sorted(own, key=lambda run: (run["lr"], run["seed"]))

    @cached_property
    def arms(self) -> list[str]:
        """Those that ran seeds, in their order."""
        names = dict.fromkeys(run["arm"] for run in self.runs)
        return [arm for arm in names if len(self.of_arm(arm)) > 1]

    def has(self, *arms: str) -> bool:
        """Whether the seeds of arms were run, and those of the strongest dense one."""
        return {*arms, self.strongest} <= {*self.arms}

    def tuned(self, arm: str) -> dict[float, float]:
        """Learning rate -> accuracy on the validation images; of photos the loss."""
        name = "val_loss" if self.task == "photos" else "val_top1"
        tuning = [run for run in self.runs if (run["arm"], run["seed"]) == (arm, TUNING_SEED)]
        return {run["lr"]: run[name] for run in tuning}

    @cached_property
    def strongest(self) -> str:
        """The dense arm of equal time that is best on the validation images at its own rate."""
        names = dict.fromkeys(run["arm"] for run in self.runs)
        dense = [arm for arm in names if arm.startswith("dense") and not arm.endswith("steps")]
        sign = -1 if self.task == "photos" else 1
        best = {arm: max(sign * value for value in self.tuned(arm).values()) for arm in dense}
        return max(best, key=lambda arm: best[arm], default="")

    def of_arm(self, arm: str) -> list[Run]:
        """The runs of an arm that count, by seed."""
        return [run for run in self.runs if run["arm"] == arm and run["seed"] != TUNING_SEED]

    def values(self, arm: str, name: str = "test_top1") -> list[float]:
        """One value of each seed."""
        return [run[name] for run in self.of_arm(arm)]

    def contrast(self, arm: str, other: str = "", name: str = "test_top1") -> list[float]:
        """An arm minus another, else the strongest dense one, in every seed that both have."""
        control = {run["seed"]: run[name] for run in self.of_arm(other or self.strongest)}
        return [
            run[name] - control[run["seed"]] for run in self.of_arm(arm) if run["seed"] in control
        ]

    def gain(self, arm: str, other: str = "") -> Interval:
        """Its contrast with the interval."""
        return interval(self.contrast(arm, other))


RUNS: list[Run] = [
    json.loads(line) for line in (FOLDER / "runs.jsonl").read_text(encoding="utf-8").splitlines()
]
STEP_MS: dict[str, float] = json.loads((FOLDER / "prices.json").read_text(encoding="utf-8"))[
    "step_ms"
]
EXPERTS = "moe-32-half"
CONTROL = "dense-4-hidden"  # of photos
TEXTURES, SOUND = Cell("textures", "4096", 6.4), Cell("characters", "sound", 6.4)
RADICAL = Cell("characters", "radical", 6.4)
MOSAICS, PHOTOS = Cell("mosaics", "1024", 21.0), Cell("photos", "", 16.0)
PRIMARY = (  # what, cell, arm with experts, what the trial had
    ("4,096 textures", TEXTURES, EXPERTS, "+38.7"),
    ("characters by their first sound", SOUND, EXPERTS, "+11.2"),
    ("one mosaic an image", MOSAICS, "moe-8-full-hidden", ""),
    ("Tiny-ImageNet at 32 px", PHOTOS, "moe-32-half-hidden", "−1.5"),
)

GATES = ("colour", "position", "hash", "image")
GATED = (  # cell, the arm whose learned gate gives way to the others
    (TEXTURES, EXPERTS),
    (SOUND, EXPERTS),
    (MOSAICS, "moe-8-full-hidden"),
    (PHOTOS, "moe-32-half-hidden"),
)

SHOWN = (  # in the picture beside the textures
    ("Chinese by first sound", SOUND, EXPERTS),
    ("Chinese by radical", RADICAL, EXPERTS),
    ("photos, Tiny-ImageNet", PHOTOS, "moe-32-half-hidden"),
    ("mosaics, same classifier", MOSAICS, "moe-8-full-hidden"),
    ("mosaics, plain classifier", MOSAICS, "moe-8-full-plain"),
)


# ---- tables


def row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def mean_and_sd(values: Sequence[float]) -> str:
    """In percent."""
    return f"{100 * fmean(values):.1f} ± {100 * stdev(values):.1f}"


def primary_rows() -> list[str]:
    """The four contrasts of the protocol."""
    contrasts = [cell.contrast(arm) for _, cell, arm, _ in PRIMARY]
    adjusted = holm([ttest_1samp(values, 0).pvalue for values in contrasts])
    rows = []
    for (name, cell, arm, trial), values, p in zip(PRIMARY, contrasts, adjusted, strict=True):
        dense, experts = (f"`{a}` | {mean_and_sd(cell.values(a))}" for a in (cell.strongest, arm))
        rows.append(row([name, dense, experts, interval(values).points, f"{p:.1g}", trial]))
    return rows


def texture_cells() -> list[Cell]:
    """Those of textures, by time and dose."""
    names = {(run["seconds"], int(run["dose"])) for run in RUNS if run["task"] == "textures"}
    cells = [Cell("textures", str(dose), seconds) for seconds, dose in sorted(names)]
    return [cell for cell in cells if cell.has(EXPERTS)]


def dose_rows() -> list[str]:
    """Accuracy and gain by time and number of textures."""
    rows = []
    for cell in texture_cells():
        steps, seeds = cell.of_arm(cell.strongest)[0]["steps"], len(cell.of_arm(EXPERTS))
        names = [f"{cell.seconds:g}", f"{int(cell.dose):,}", f"{steps}", f"`{cell.strongest}`"]
        right = [mean_and_sd(cell.values(arm)) for arm in (cell.strongest, EXPERTS)]
        rows.append(row([*names, *right, cell.gain(EXPERTS).points, f"{seeds}"]))
    return rows


def without_gates(cell: Cell) -> list[str]:
    """The arms of a cell that ran the seeds, but for those with another gate than the learned one."""
    return [arm for arm in cell.arms if arm.rpartition("-")[2] not in GATES]


def gate_rows() -> list[str]:
    """What the gate sees: accuracy without experts, and with the same experts chosen in different ways."""
    rows = []
    for cell, learned in GATED:
        arms = [cell.strongest, learned, *(f"{learned}-{gate}" for gate in GATES)]
        rows.append(
            row([f"{cell.task}, `{learned}`", *(mean_and_sd(cell.values(a)) for a in arms)])
        )
    return rows


def gate_gain_rows() -> list[str]:
    """The same minus the strongest dense model, in points."""
    rows = []
    for cell, learned in GATED:
        arms = [learned, *(f"{learned}-{gate}" for gate in GATES)]
        rows.append(row([cell.task, *(cell.gain(arm).points for arm in arms)]))
    return rows


def arm_rows(cell: Cell) -> list[str]:
    """Every arm of a cell that ran the seeds, the best first, minus the strongest dense one."""
    ranked = sorted(without_gates(cell), key=lambda arm: -fmean(cell.values(arm)))
    rows = []
    for arm in ranked:
        runs = cell.of_arm(arm)
        price, base = (STEP_MS.get(f"{cell.task} {name}") for name in (arm, cell.strongest))
        size = f"{runs[0]['lr']:g} | {runs[0]['steps']} | {runs[0]['parameters'] / 1e6:.2f} M"
        time = f"{price / base:.2f}" if price and base else ""
        gain = cell.gain(arm).points if arm != cell.strongest else ""
        right = mean_and_sd(cell.values(arm))
        rows.append(row([f"`{arm}`", size, time, right, gain, f"{len(runs)}"]))
    return rows


def photo_rows() -> list[str]:
    """Accuracy and loss of Tiny-ImageNet; the difference of both from `dense-4-hidden`."""
    rows = []
    for arm in without_gates(PHOTOS):
        runs = PHOTOS.of_arm(arm)
        cpu_s = fmean(run["cpu_s"] for run in runs)
        cost = f"{runs[0]['lr']:g} | {runs[0]['steps']} | {cpu_s:.0f}"
        found = f"{mean_and_sd(PHOTOS.values(arm))} | {fmean(PHOTOS.values(arm, 'test_loss')):.3f}"
        gains = ["", ""]
        if arm != PHOTOS.strongest:
            more_loss = interval(PHOTOS.contrast(arm, name="test_loss"))
            gains = [PHOTOS.gain(arm).points, more_loss.nats]
        rows.append(row([f"`{arm}`", cost, found, *gains, f"{len(runs)}"]))
    return rows


def tuning_rows() -> list[str]:
    """For each cell and arm, the validation by rate."""
    rates = sorted({run["lr"] for run in RUNS if run["seed"] == TUNING_SEED})
    keys = dict.fromkeys((run["task"], run["dose"], run["seconds"]) for run in RUNS)
    rows = []
    for cell in (Cell(*key) for key in keys):
        scale, digits = (1, 3) if cell.task == "photos" else (100, 1)
        for arm in dict.fromkeys(run["arm"] for run in cell.runs):
            tuned = cell.tuned(arm)
            found = (f"{scale * tuned[lr]:.{digits}f}" if lr in tuned else "" for lr in rates)
            rows.append(row([f"{cell.task} {cell.dose}, {cell.seconds:g} s `{arm}`", *found]))
    return rows


def price_rows() -> list[str]:
    """CPU milliseconds of a training step, of the arms that were run."""
    used = {f"{run['task']} {run['arm']}" for run in RUNS}
    prices = {tuple(name.split()): ms for name, ms in STEP_MS.items() if name in used}
    return [row([f"{task} `{arm}`", f"{ms:.1f}"]) for (task, arm), ms in prices.items()]


# ---- sentences


def of_textures(seconds: float) -> str:
    """The gains of one time, by the number of textures."""
    cells = [cell for cell in texture_cells() if cell.seconds == seconds]
    gains = (f"{cell.gain(EXPERTS).points} on {int(cell.dose):,}" for cell in cells)
    return f"in {seconds:g} CPU seconds {', '.join(gains)} textures"


def of_sound() -> str:
    """Both controls of characters by their first sound."""
    return (
        f"{SOUND.gain(EXPERTS).points} points from `{SOUND.strongest}`, the strongest on the validation font, and "
        f"{SOUND.gain(EXPERTS, 'dense-2').points} from `dense-2` ({len(SOUND.of_arm('dense-2'))} seeds)"
    )


def of_radical() -> list[str]:
    """Characters by radical, and how much more experts gain by sound."""
    sound, radical = (cell.contrast(EXPERTS) for cell in (SOUND, RADICAL))
    more = [first - second for first, second in zip(sound, radical, strict=False)]  # common seeds
    return [
        f"by radical {RADICAL.gain(EXPERTS).points} points from `{RADICAL.strongest}`",
        f"sound less radical: {interval(more).points} points",
    ]


def of_mosaics() -> list[str]:
    """Where an image is one thing to remember, with the same classifier as dense and with a plain one."""
    hidden, plain = (MOSAICS.gain(f"moe-8-full-{name}").points for name in ("hidden", "plain"))
    return [
        f"{hidden} points with the hidden layer in their classifier, too",
        f"{plain} points without it",
    ]


def of_gate() -> list[str]:
    """The learned gate less the others."""
    colour, place = (
        TEXTURES.gain(EXPERTS, f"{EXPERTS}-{gate}").points for gate in ("colour", "position")
    )
    characters = SOUND.gain(EXPERTS, f"{EXPERTS}-colour").points
    photos = PHOTOS.gain("moe-32-half-hidden", "moe-32-half-hidden-position").points
    return [
        f"on textures it is {place} points from the gate by place and {colour} from k-means of colours",
        f"on characters {characters} points from the gate by darkness",
        f"on photos it is {photos} points from the gate by place",
    ]


def of_parameters() -> str:
    """The falsifier of textures: dense width with the experts' parameters, at equal steps."""
    arm = "dense-64-steps"
    run = TEXTURES.of_arm(arm)[0]
    return (
        f"`{arm}`, {run['parameters'] / 1e6:.2f} M parameters, {run['steps']} steps in {run['cpu_s']:.0f} CPU seconds, "
        f"has {mean_and_sd(TEXTURES.values(arm))} %, {TEXTURES.gain(arm, 'dense-4').points} points from `dense-4` in "
        f"as many steps, {TEXTURES.gain(arm).points} from `{TEXTURES.strongest}`"
    )


def of_photos() -> str:
    """Tiny-ImageNet with the same classifier."""
    gain = PHOTOS.gain("moe-32-half-hidden").points
    return f"with a hidden layer in both classifiers, {gain} points"


def of_width() -> list[str]:
    """The falsifier of photos: dense width at the steps of the control, and a linear classifier."""
    texts = []
    for words, arm in (
        ("twice the width", "dense-8-hidden-steps"),
        ("four times the width", "dense-16-hidden-steps"),
        ("a linear classifier over all places", "dense-4-plain-steps"),
    ):
        loss = interval(PHOTOS.contrast(arm, CONTROL, "test_loss")).nats
        texts.append(f"{words}: {PHOTOS.gain(arm, CONTROL).points} points, {loss} nats")
    return texts


def of_prices() -> list[str]:
    """What a step costs."""
    dense, experts = (STEP_MS[f"textures {arm}"] for arm in ("dense-4", EXPERTS))
    return [
        f"A step of `{EXPERTS}` takes {experts / dense:.2f} times that of `dense-4`, which takes {dense:.0f} ms here",
    ]


def of_cpu_time() -> str:
    """CPU seconds that the trainings took, experts and the strongest dense arm of 4,096 textures."""
    experts, dense = (
        fmean(run["cpu_s"] for run in TEXTURES.of_arm(arm)) for arm in (EXPERTS, TEXTURES.strongest)
    )
    return f"On the busy machine `{EXPERTS}` took {experts:.1f} and `{TEXTURES.strongest}` {dense:.1f} CPU seconds"


def of_row() -> str:
    """The row of docs/results.md."""
    place = TEXTURES.gain(EXPERTS, f"{EXPERTS}-position").points
    return (
        "| The more there is to remember, the more they help | up to a point, on tasks made for it | On drawn "
        f"textures, at equal time, experts minus the strongest dense model, in points: {of_textures(1.6)}; "
        f"{of_textures(6.4)}; {of_textures(25.6)}; minus the same experts chosen by place, {place} "
        "(3 to 5 seeds; [doses](../benchmarks/doses/README.md)). |"
    )


def of_readme() -> str:
    """The two ends."""
    textures, photos = TEXTURES.gain(EXPERTS).points, PHOTOS.gain("moe-32-half-hidden").points
    experts, dense = (100 * fmean(TEXTURES.values(arm)) for arm in (EXPERTS, TEXTURES.strongest))
    return (
        f"On 4,096 drawn textures, in {TEXTURES.seconds} CPU seconds, experts are {textures} points ahead "
        f"({experts:.1f} against {dense:.1f} %), on Tiny-ImageNet's photos, in {PHOTOS.seconds:g}, {photos}"
    )


def statements() -> dict[str, list[str]]:
    """Page -> what it says, with the numbers of the records."""
    return {
        STUDY: [
            of_textures(1.6),
            of_textures(6.4),
            of_textures(25.6),
            of_sound(),
            *of_radical(),
            of_photos(),
            *of_width(),
            *of_mosaics(),
            *of_gate(),
            of_parameters(),
            *gate_rows(),
            *gate_gain_rows(),
            *of_prices(),
            of_cpu_time(),
            *primary_rows(),
            *dose_rows(),
            *arm_rows(TEXTURES),
            *arm_rows(SOUND),
            *arm_rows(RADICAL),
            *arm_rows(MOSAICS),
            *photo_rows(),
            *price_rows(),
            *tuning_rows(),
        ],
        "README.md": [of_readme()],
        "docs/results.md": [of_row()],
        "docs/guides/when-experts.md": [of_textures(6.4)],
    }


if __name__ == "__main__":
    print(json.dumps(statements(), indent=1, ensure_ascii=False))
