"""`moevision compare RUN RUN…`: two trainings, or several seeds of two recipes, on the same test images.

Two runs are compared image by image (McNemar's exact test, Tango's interval): that covers the choice of test images,
and not the luck of a training. Several seeds are compared seed by seed (Student's t of the differences): that covers
the luck of training, and not the choice of test images, which all runs share. Accuracies are shares in [0, 1].
"""

from __future__ import annotations

import csv
import math
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from inspect import signature
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final

import lightning as L
import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.stats import norm

from moevision.commands.data import run_of
from moevision.config import MORE, WRITTEN, flatten
from moevision.data.named import SYNTHETIC
from moevision.errors import UserError, escape_controls, refuse_equal_seeds
from moevision.files import read_csv, refuse_foreign, write_json_atomic
from moevision.models.safe_files import read_yaml
from moevision.stats import (
    LEVEL,
    POWER,
    Gap,
    PairedDifference,
    detectable_on,
    paired_difference,
    paired_macro_difference,
    shown_to_differ,
)
from moevision.train.report import RunSummary, read_summary, template
from moevision.train.resume import is_finished, is_free, resume_command
from moevision.words import duration, flops, percent, points

PREDICTIONS: Final = "predictions_test.csv"
_SCHEMA: Final = "moevision.compare/1"
# Besides what may change while a run goes on: what a seed changes, and what is only watched.
_NO_RECIPE = ("seed_everything", "data.order_seed", "record_routing", "check_memory", *WRITTEN)
# These may change too while a run goes on, and yet make another recipe; max_time ended an earlier version's.
_RECIPE = ("guard", "data.path", "trainer.max_time", "trainer.callbacks")
_LISTED = 6  # options that differ
_TRAINERS = {
    name: each.default for name, each in signature(L.Trainer).parameters.items() if name in MORE
}
_ACCURACIES = ("correct", "total", "accuracy", "interval", "balanced_accuracy")
_COSTS = ("epochs", "steps", "cpu_s", "images_per_s", "ms_per_image", "device", "precision")


def run(chosen: Namespace) -> None:
    """Compare, print, and write JSON where asked to."""
    if chosen.json is not None:
        refuse_foreign(chosen.json, _SCHEMA.encode(), "--json")
    runs = [read_run(address) for address in chosen.runs]
    check_test_images(runs)
    found = compare(*paired_runs(runs))
    _print(found, [run.name for run in runs if run not in [*found.a, *found.b]])
    if chosen.json is not None:
        write_json_atomic(chosen.json, facts(found))
        print(f"Every number is in {escape_controls(str(chosen.json))}")


# ---- the runs


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: its options flat, and of each of its n test images, sorted, name, class and success."""

    folder: Path
    summary: RunSummary
    options: Mapping[str, Any]
    images: tuple[str, ...]
    labels: tuple[str, ...]
    correct: npt.NDArray[np.bool_]

    @property
    def name(self) -> str:
        """Of the folder; the dense twin's with that of its run."""
        folder = self.folder.resolve()
        return f"{folder.parent.name}/{folder.name}" if folder.name == "twin" else folder.name

    @cached_property
    def recipe(self) -> dict[str, str]:
        """What makes the training, but for its seed: options as text, without nulls and the Trainer's own defaults."""
        recipe = {"images per step": str(self.summary.batch_size)}
        for option, value in self.options.items():
            of_recipe = option.startswith(_RECIPE) or not (
                is_free(option) or option.startswith(_NO_RECIPE)
            )
            usual = value is None or _TRAINERS.get(option.removeprefix("trainer.")) == value
            if usual or not of_recipe:
                continue
            if option == "data.path" and value != SYNTHETIC:
                value = Path(str(value)).expanduser().resolve()
            recipe[option] = str(value)
        return recipe


def read_run(address: str) -> FinishedRun:
    """Read a run folder; a UserError if it isn't finished."""
    folder = run_of(address)
    if not is_finished(folder, with_twin=False):
        raise UserError(
            f"{folder} is not finished: go on with `{resume_command(folder)}`, then compare."
        )
    summary, file = read_summary(folder / "summary.json"), folder / PREDICTIONS
    try:
        rows = sorted((row["image"], row["label"], row["correct"] == "1") for row in read_csv(file))
        images, labels, correct = zip(*rows, strict=True)
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise UserError(
            f"{file} can't be read ({error}): restore it, or train the run again."
        ) from error
    return FinishedRun(
        folder, summary, flatten(read_yaml(folder / "config.yaml")), images, labels, np.array(correct)
    )


def differing(first: FinishedRun, second: FinishedRun) -> dict[str, tuple[str, str]]:
    """Options of the recipe that differ, with the value of either; `null` where it isn't set."""
    one, other = first.recipe, second.recipe
    return {
        name: (one.get(name, "null"), other.get(name, "null"))
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    }


def check_test_images(runs: Sequence[FinishedRun]) -> None:
    """Refuse runs that were not tested on the same images, and a run beside itself."""
    if len(runs) < 2:
        raise UserError("One run is nothing to compare: give two, or several seeds of two recipes.")
    for place, run in enumerate(runs):
        if any(run.folder.samefile(other.folder) for other in runs[:place]):
            raise UserError(f"{run.folder} is given twice: leave one out.")
    first = runs[0]
    for run in runs[1:]:
        where = f"{first.name} and {run.name} were not tested on the same images"
        if apart := set(first.images) ^ set(run.images):
            count = len(set(first.images) | set(run.images))
            raise UserError(
                f"{where}: {len(apart):,} of {count:,} are in one of them only, such as {min(apart)!r}."
            )
        if first.labels != run.labels:
            raise UserError(f"{where}: they have the same names and other labels.")
        seeds = [
            each.options.get("data.seed")
            for each in (first, run)
            if each.options.get("data.path") == SYNTHETIC
        ]
        if len(set(seeds)) > 1 or len(seeds) == 1:
            raise UserError(f"{where}: drawn images depend on --data.seed, which must be the same.")


def paired_runs(runs: Sequence[FinishedRun]) -> tuple[list[FinishedRun], list[FinishedRun]]:
    """Two runs as they are; more, by their recipe, those with a seed that both recipes have, in its order."""
    if len(runs) == 2:
        return [runs[0]], [runs[1]]
    recipes: list[list[FinishedRun]] = []
    for run in runs:
        known = next((recipe for recipe in recipes if recipe[0].recipe == run.recipe), None)
        recipes.append([run]) if known is None else known.append(run)
    if len(recipes) != 2:
        names = "; ".join(", ".join(run.name for run in recipe) for recipe in recipes)
        options = sorted(
            {name for recipe in recipes for name in differing(recipes[0][0], recipe[0])}
        )
        raise UserError(
            f"These runs are of {'one recipe' if len(recipes) == 1 else f'{len(recipes)} recipes'}, by everything in "
            f"config.yaml but the seed ({names})."
            + (f" They differ in {', '.join(options[:_LISTED])}." if options else "")
            + " Give two runs, or several seeds of two recipes."
        )
    for recipe in recipes:
        refuse_equal_seeds((run.name, run.summary.seed) for run in recipe)
    one, other = (
        {run.summary.seed: run for run in recipe if run.summary.seed is not None}
        for recipe in recipes
    )
    common = sorted(one.keys() & other.keys())
    if len(common) < 2:
        have = (f"seed{'s' * (len(recipe) > 1)} {_seeds(recipe)}" for recipe in recipes)
        raise UserError(
            f"The recipes have {len(common)} seed{'s' * (len(common) != 1)} in common and need two: "
            f"{' and '.join(have)}. Train the missing ones (--seed_everything N), or compare two runs."
        )
    return [one[seed] for seed in common], [other[seed] for seed in common]


def _seeds(runs: Sequence[FinishedRun]) -> str:
    return ", ".join(str(run.summary.seed) for run in runs)


# ---- the comparison


@dataclass(frozen=True)
class Comparison:
    """A minus B; differences are shares, NaN where one isn't known.

    `low` and `high` are 95 % of the difference: over seeds, or of two runs over images.
    """

    a: Sequence[FinishedRun]
    b: Sequence[FinishedRun]
    unbalanced: bool  # whether balanced accuracy is compared, because classes differ in size or the runs chose by it
    by_seed: Sequence[
        PairedDifference
    ]  # the difference of each pair on the test images; `difference` is their mean
    difference: float
    low: float
    high: float
    p_value: float  # of the t-test over seeds, or of McNemar's test
    differ: bool  # at 5 %: by the p-value; of two runs' balanced accuracies by the interval
    detectable: float  # the difference that would have been found with 80 % power

    @property
    def measure(self) -> str:
        """What is compared."""
        return "balanced accuracy" if self.unbalanced else "accuracy"

    @property
    def verdict(self) -> str:
        """`A is better`, `B is better`, or `no difference found`, which is not the same as equal."""
        if not self.differ:
            return "no difference found"
        return "A is better" if self.difference > 0 else "B is better"

    @property
    def simpler(self) -> str | None:
        """The side without experts; None where both have some, or neither."""
        dense = [
            letter for letter, side in (("A", self.a), ("B", self.b)) if not side[0].summary.layers
        ]
        return dense[0] if len(dense) == 1 else None


def compare(a: Sequence[FinishedRun], b: Sequence[FinishedRun]) -> Comparison:
    """Compare one run with one, or pairs of runs of the same seeds."""
    unbalanced = any(run.summary.unbalanced for run in [*a, *b])
    labels = np.unique(np.array(a[0].labels), return_inverse=True)[1]
    by_seed = [
        paired_macro_difference(one.correct, other.correct, labels)
        if unbalanced
        else paired_difference(one.correct, other.correct)
        for one, other in zip(a, b, strict=True)
    ]
    difference = fmean(pair.difference for pair in by_seed)
    if len(a) > 1:
        gap = Gap.of([100 * pair.difference for pair in by_seed])
        low, high, p, detectable = gap.low / 100, gap.high / 100, gap.p_value, gap.detectable / 100
        return Comparison(
            a, b, unbalanced, by_seed, difference, low, high, p, p < LEVEL, detectable
        )
    (pair,) = by_seed
    low, high, p, differ = (
        pair.low,
        pair.high,
        pair.p_value,
        shown_to_differ(pair, balanced=unbalanced),
    )
    if unbalanced:
        detectable = (1 + norm.ppf(POWER) / norm.ppf(1 - LEVEL / 2)) * (high - low) / 2
    else:
        detectable = detectable_on(pair.n, pair.only_a + pair.only_b)
    return Comparison(
        a, b, unbalanced, by_seed, difference, low, high, p, differ, float(detectable)
    )


def comparison_text(found: Comparison) -> list[list[str]]:
    """Sentences on what was found, how sure it is and what the interval doesn't cover; and notes on the rest."""
    machines = sorted(
        {f"{run.summary.device}, {run.summary.precision}" for run in [*found.a, *found.b]}
    )
    text = template("compare.txt.jinja").render(
        found=found, options=differing(found.a[0], found.b[0]), machines=machines
    )
    return [part.splitlines() for part in text.split("---\n")]


# ---- what is printed and written


def _print(found: Comparison, left_out: Sequence[str]) -> None:
    console = Console()
    if console.width < 110 and not console.is_terminal:
        console = Console(width=110)  # a file has room for all columns

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    table = Table("", box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0))
    for letter, side in (("A", found.a), ("B", found.b)):
        others = f" and {len(side) - 1} more" if side[1:] else ""
        table.add_column(escape_controls(f"{letter}: {side[0].name}{others}"), justify="right")
    for row in _rows(found):
        table.add_row(*row)
    console.print(table, markup=False)
    if found.a[1:]:
        for one, other, pair in zip(found.a, found.b, found.by_seed, strict=True):
            say(
                f"seed {one.summary.seed}: {escape_controls(one.name)} − {escape_controls(other.name)} = "
                f"{points(pair.difference)} ({points(pair.low)} to {points(pair.high)}, over images)"
            )
    sentences, notes = comparison_text(found)
    for sentence in sentences:
        say(sentence)
    console.print()
    left = (
        [f"Left out, without a partner of the same seed: {', '.join(left_out)}."]
        if left_out
        else []
    )
    for note in [*notes, *left]:
        say(f"note: {escape_controls(note)}")


def _rows(found: Comparison) -> Iterator[tuple[str, str, str]]:
    """Accuracy and cost of both sides, with their names; of several seeds the mean. What neither knows is left out."""
    rows: list[tuple[str, Callable[[RunSummary], float | None], Callable[[float], str]]] = [
        (
            "FLOPs of one image",
            lambda run: run.cost.flops_per_image + run.cost.router_flops_per_image,
            flops,
        ),
        ("parameters", lambda run: run.cost.total_parameters, flops),
        ("active parameters", lambda run: run.cost.active_parameters, flops),
        ("epochs", lambda run: run.epochs, "{:g}".format),
        ("training", lambda run: run.duration_s, duration),
        ("training, CPU time", lambda run: run.cpu_s, duration),
        ("training, images/s", lambda run: run.images_per_s, "{:,.0f}".format),
        ("one image, ms", lambda run: run.ms_per_image, "{:.1f}".format),
        (
            "max/mean load",
            lambda run: max((x.max_over_mean for x in run.layers), default=None),
            "{:.2f}".format,
        ),
    ]
    yield "test accuracy", _accuracy(found.a), _accuracy(found.b)
    if found.unbalanced:
        rows.insert(0, ("balanced accuracy", lambda run: run.test.balanced_accuracy, percent))
    yield "seeds" if found.a[1:] else "seed", _seeds(found.a), _seeds(found.b)
    for name, value, text in rows:
        known = [
            [number for run in side if (number := value(run.summary)) is not None]
            for side in (found.a, found.b)
        ]
        if any(known):
            one, other = (text(fmean(numbers)) if numbers else "" for numbers in known)
            yield name, one, other


def _accuracy(side: Sequence[FinishedRun]) -> str:
    """With its 95 % interval over images, or ± its standard deviation over seeds."""
    accuracies = [run.summary.test.accuracy for run in side]
    if side[1:]:
        return f"{percent(fmean(accuracies))} ± {100 * stdev(accuracies):.1f}"
    low, high = side[0].summary.test.interval
    return f"{percent(accuracies[0])} ({percent(low)} to {percent(high)})"


def facts(found: Comparison) -> dict[str, Any]:
    """Everything as JSON primitives; differences are shares, null where there is none."""

    def known(value: float) -> float | None:
        return None if math.isnan(value) else value

    def of_run(run: FinishedRun) -> dict[str, Any]:
        made = run.summary
        return {
            "run": os.fspath(run.folder),
            "seed": made.seed,
            **{name: getattr(made.test, name) for name in _ACCURACIES},
            **asdict(made.cost),
            **{name: getattr(made, name) for name in _COSTS},
            "train_s": made.duration_s,
            "max_over_mean": [layer.max_over_mean for layer in made.layers],
        }

    return {
        "schema": _SCHEMA,
        "measure": found.measure,
        "verdict": found.verdict,
        "difference": found.difference,
        "interval": [known(found.low), known(found.high)],
        "detectable": known(found.detectable),
        "p_value": known(found.p_value),
        "by_seed": [
            {"seeds": [one.summary.seed, other.summary.seed], **asdict(pair)}
            for one, other, pair in zip(found.a, found.b, found.by_seed, strict=True)
        ],
        "a": [of_run(run) for run in found.a],
        "b": [of_run(run) for run in found.b],
        "differ_in": differing(found.a[0], found.b[0]),
        **dict(zip(("sentences", "notes"), comparison_text(found), strict=True)),
    }
