"""The cells of the protocol in order of importance, their runs, and what each records."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.doses.arms import evaluate, heaviest_loads, train
from benchmarks.doses.tasks import Characters, Mosaics, Photos, Textures
from benchmarks.routers.report import rate_beyond

TUNING_SEED = 100
WIDTHS = ("dense-1", "dense-2", "dense-4", "dense-8")
TWO = ("moe-8-full", "moe-32-half")
RATES = (0.008, 0.016, 0.032)
LOW_RATES = (0.002, 0.004, 0.008)
Records = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """One training. `dose` is how much there is to remember, or what a character's class is."""

    task: str
    dose: str
    seconds: float
    arm: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """What its record is called."""
        return f"{self.task} {self.dose} {self.seconds:g} {self.arm} {self.lr:g} {self.seed}"


@dataclass(frozen=True)
class Cell:
    """Arms that get the same time on the same task: of the dense ones the strongest runs the seeds, and all others."""

    task: str
    dose: str
    seconds: float
    dense: tuple[str, ...]
    others: tuple[str, ...]
    seeds: int
    rates: tuple[float, ...] = RATES

    def runs(self, records: Records) -> Iterator[Run]:
        """Tuning, then seeds, as far as these records decide them."""
        own = [
            record
            for record in records
            if (record["task"], record["dose"], record["seconds"])
            == (self.task, self.dose, self.seconds)
        ]
        best = {}
        for arm in (*self.dense, *self.others):
            tuned = tuned_rates(own, arm)
            for lr in self.rates:
                yield self.run(arm, lr, TUNING_SEED)
            if not set(self.rates) <= tuned.keys():
                continue
            beyond = rate_beyond(tuned)
            if beyond is None:
                best[arm] = max(sorted(tuned), key=lambda lr: tuned[lr])
            else:
                yield self.run(arm, beyond, TUNING_SEED)
        if not best.keys() >= {*self.dense, *self.others}:
            return
        strongest = max(self.dense, key=lambda arm: max(tuned_rates(own, arm).values()))
        for seed in range(self.seeds):
            for arm in (strongest, *self.others):
                yield self.run(arm, best[arm], seed)

    def run(self, arm: str, lr: float, seed: int) -> Run:
        """One of its runs."""
        return Run(self.task, self.dose, self.seconds, arm, lr, seed)


HIDDEN = "dense-4-hidden"
GATES = ("position", "hash", "image", "colour")
SIZES = (  # the whole grid but those that run anyway
    *("moe-8-half", "moe-16-half", "moe-64-half", "moe-32-full"),
    *("moe-8-full-k2", "moe-32-half-k2", "moe-16-full"),
    *("moe-64-full", "moe-8-half-k2", "moe-16-half-k2", "moe-64-half-k2"),
    *("moe-16-full-k2", "moe-32-full-k2", "moe-64-full-k2"),
)
NARROW, EXPERTS = ("dense-1", "dense-2", "dense-4"), ("moe-32-half",)


def gated(arm: str) -> tuple[str, ...]:
    """An arm with each of the other gates."""
    return tuple(f"{arm}-{gate}" for gate in GATES)


def main_cells(seeds: int) -> list[Cell]:
    """The primary contrasts and the lines of the doses."""
    return [
        Cell("textures", "4096", 6.4, NARROW, EXPERTS, seeds),
        Cell("characters", "sound", 6.4, NARROW, EXPERTS, seeds),
        *(Cell("textures", dose, 1.6, NARROW, EXPERTS, seeds) for dose in ("1024", "64", "4096")),
        *(Cell("textures", dose, 6.4, NARROW, EXPERTS, seeds) for dose in ("64", "1024")),
        Cell("photos", "", 16.0, (HIDDEN,), ("moe-32-half-hidden",), seeds, LOW_RATES),
        Cell("mosaics", "1024", 21.0, (HIDDEN,), ("moe-8-full-hidden",), seeds, LOW_RATES),
        Cell("characters", "radical", 6.4, NARROW, EXPERTS, seeds),
    ]


CELLS = (
    *main_cells(3),
    Cell("characters", "sound", 6.4, ("dense-2",), EXPERTS, 3),
    Cell("textures", "4096", 6.4, WIDTHS, ("moe-8-full", "moe-32-half-position"), 3),
    Cell("mosaics", "1024", 21.0, (HIDDEN,), ("moe-8-full-plain",), 3, LOW_RATES),
    # The falsifiers, then gates, more textures and time, sizes; then seeds to five.
    Cell(
        *("photos", "", 16.0, (HIDDEN,)),
        ("dense-16-hidden-steps", "dense-4-plain-steps", "dense-8-hidden-steps"),
        *(3, LOW_RATES),
    ),
    Cell("textures", "4096", 6.4, ("dense-4",), ("dense-64-steps",), 3, (0.004, 0.008, 0.016)),
    Cell("textures", "4096", 6.4, WIDTHS, ("moe-32-half-hash", "moe-32-half-image"), 3),
    Cell("textures", "4096", 6.4, WIDTHS, ("moe-32-half-colour", "moe-8-full-k2"), 3),
    Cell("characters", "sound", 6.4, NARROW, gated("moe-32-half"), 3),
    Cell("mosaics", "1024", 21.0, (HIDDEN,), gated("moe-8-full-hidden"), 3, LOW_RATES),
    Cell("photos", "", 16.0, (HIDDEN,), gated("moe-32-half-hidden"), 3, LOW_RATES),
    Cell("textures", "16384", 6.4, NARROW, EXPERTS, 3),
    *(Cell("textures", dose, 25.6, WIDTHS[1:], EXPERTS, 3) for dose in ("4096", "16384", "1024")),
    Cell("textures", "4096", 6.4, WIDTHS, SIZES, 3),
    Cell("characters", "random", 6.4, NARROW, EXPERTS, 5),
    *main_cells(5),
    Cell("characters", "sound", 6.4, ("dense-2",), EXPERTS, 5),
    Cell("characters", "sound", 6.4, ("dense-4",), ("dense-64-steps",), 3, (0.004, 0.008, 0.016)),
    Cell("mosaics", "1024", 21.0, (HIDDEN,), ("dense-4-plain",), 3, LOW_RATES),
    *(Cell("textures", dose, 6.4, WIDTHS, TWO, 5) for dose in ("1024", "64")),
    Cell("characters", "sound", 6.4, NARROW, ("moe-8-full", *SIZES), 3),
)


def priced_arms() -> list[tuple[str, str]]:
    """All (task, arm) whose time is given, once each."""
    pairs = ((cell.task, arm) for cell in CELLS for arm in (*cell.dense, *cell.others))
    return list(dict.fromkeys(pair for pair in pairs if not pair[1].endswith("-steps")))


def next_runs(records: Records) -> Iterator[Run]:
    """All runs in order of importance, as far as these records decide them."""
    for cell in CELLS:
        yield from cell.runs(records)


def tuned_rates(records: Records, arm: str) -> dict[float, float]:
    """Learning rate -> accuracy on the validation images; of photos minus the loss, whose seeds differ less."""
    return {
        record["lr"]: -record["val_loss"] if record["task"] == "photos" else record["val_top1"]
        for record in records
        if record["arm"] == arm and record["seed"] == TUNING_SEED
    }


@lru_cache(maxsize=1)
def drawn_task(task: str, dose: str, seed: int, glyphs: Path) -> Any:
    """What a run's seed draws; kept for all arms of one seed."""
    if task == "textures":
        return Textures(int(dose), seed)
    if task == "mosaics":
        return Mosaics(int(dose), seed)
    return Characters(dose, seed, glyphs)


@lru_cache(maxsize=1)
def photos(archive: Path, cache: Path) -> Photos:
    """Tiny-ImageNet."""
    return Photos(archive, cache)


def record_of(run: Run, step_ms: dict[str, float], options: Namespace) -> dict[str, Any]:
    """Train and test; a tuning run sees no test image."""
    priced = run.arm
    if run.arm.endswith("-steps"):  # as many steps as the dense arm of its task takes
        priced = HIDDEN if run.task == "photos" else "dense-4"
    steps = round(1000 * run.seconds / step_ms[f"{run.task} {priced}"])
    if run.task == "photos":
        data: Any = photos(options.photos, options.work / "photos.npz")
        data.start()
    else:
        data = drawn_task(run.task, run.dose, run.seed, options.glyphs)
    net, cpu_s = train(data, run.task, run.arm, run.lr, run.seed, steps)
    split = "val" if run.seed == TUNING_SEED else "test"
    return {
        "task": run.task,
        "dose": run.dose,
        "seconds": run.seconds,
        "arm": run.arm,
        "lr": run.lr,
        "seed": run.seed,
        "steps": steps,
        "cpu_s": round(cpu_s, 2),
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        **evaluate(net, data, split),
        "heaviest_loads": heaviest_loads(net, data),
        **({"known_top1": data.known_top1()} if hasattr(data, "known_top1") else {}),
        **({"glyphs_sha256": data.sha256} if isinstance(data, Characters) else {}),
    }
