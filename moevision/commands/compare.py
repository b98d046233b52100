"""`moevision compare RUN RUN…`: two trainings, or several seeds of two recipes, on the same test images.

Nothing is computed with a model: fit leaves every test image's answer in the run folder, in predictions_test.csv.

Two runs are compared image by image (McNemar's exact test, Tango's interval): that covers the choice of test images,
and not the luck of a training. Several seeds are compared seed by seed (Student's t of the differences): that covers
the luck of training, and not the choice of test images, which all runs share.

All accuracies are shares in [0, 1]; `Gap` is in points.
"""

from __future__ import annotations

import csv
import math
import os
import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table

from moevision.commands.data import run_of
from moevision.data.named import SYNTHETIC
from moevision.errors import UserError, refuse_equal_seeds
from moevision.files import refuse_foreign, write_json_atomic
from moevision.models.safe_files import read_json, read_yaml
from moevision.names import shown
from moevision.train.differences import LEVEL, POWER, Gap, detectable_on
from moevision.train.report import (
    PairedDifference,
    RunSummary,
    accuracy_interval,
    duration,
    flops,
    paired_difference,
    paired_macro_difference,
    percent,
    points,
    read_summary,
)
from moevision.train.resume import is_finished, is_free, resume_command

PREDICTIONS: Final = "predictions_test.csv"
SCHEMA: Final = "moevision.compare/1"
# Besides what may change while a run goes on: what a seed changes, and what is only watched.
_NO_RECIPE = ("seed_everything", "data.order_seed", "record_routing", "log_routers", "check_memory")
# These may change too while a run goes on, and yet make another recipe.
_RECIPE = ("guard", "data.path")
_LISTED = 6  # options that differ


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: as it was given.
        summary: its summary.json.
        options: its config.yaml, flat: `model.arch.router` -> value.
        code: version and commit that trained it.
        images: [n] names of the test images, sorted.
        labels: [n] class of each in words.
        correct: [n] whether it was classified correctly.
    """

    folder: Path
    summary: RunSummary
    options: Mapping[str, Any]
    code: tuple[str, str]
    images: tuple[str, ...]
    labels: tuple[str, ...]
    correct: npt.NDArray[np.bool_]

    @classmethod
    def read(cls, address: str) -> Run:
        """Read a run folder.

        Raises:
            UserError: if it is none, isn't finished, or has no predictions.
        """
        folder = run_of(address)
        if not is_finished(folder, with_twin=False):
            raise UserError(f"{folder} is not finished: go on with `{resume_command(folder)}`, then compare.")
        summary = read_summary(folder / "summary.json")
        images, labels, correct = _predictions(folder / PREDICTIONS)
        if (len(images), int(correct.sum())) != (summary.test.total, summary.test.correct):
            raise UserError(
                f"{folder / PREDICTIONS} has {correct.sum():,} of {len(images):,} images right and summary.json says "
                f"{summary.test.correct:,} of {summary.test.total:,}: they are not of one training, restore them."
            )
        options = dict(_flat(read_yaml(folder / "config.yaml")))
        return cls(folder, summary, options, _code(folder), images, labels, correct)

    @property
    def name(self) -> str:
        """Of the folder; the dense twin's with that of its run."""
        folder = self.folder.resolve()
        return f"{folder.parent.name}/{folder.name}" if folder.name == "twin" else folder.name

    @property
    def seed(self) -> int | None:
        """Of everything that a training draws."""
        return self.summary.seed

    @property
    def accuracy(self) -> float:
        """Share of the test images that it classifies correctly."""
        return self.summary.test.accuracy

    @property
    def recipe(self) -> dict[str, str]:
        """What makes the training, but for its seed: options as text; those that are null are left out."""
        return {name: _text(name, value) for name, value in self.options.items()
                if value is not None and is_of_recipe(name)}  # fmt: skip


def is_of_recipe(option: str) -> bool:
    """Whether runs that differ in this option are of different recipes."""
    if option.startswith(_RECIPE):
        return True
    return not (is_free(option) or option.startswith(_NO_RECIPE))


def _text(name: str, value: Any) -> str:
    return str(Path(str(value)).expanduser().resolve()) if name == "data.path" and value != SYNTHETIC else str(value)


def _flat(tree: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict):
        yield before, tree
        return
    for name, value in tree.items():
        yield from _flat(value, f"{before}.{name}" if before else str(name))


def _code(folder: Path) -> tuple[str, str]:
    try:
        known = read_json(folder / "provenance.json")
        return str(known["moevision"]), str(known["code"]["git_commit"] or "")
    except (OSError, ValueError, TypeError, KeyError):  # it says only whether two are the same
        return "", ""


def _predictions(file: Path) -> tuple[tuple[str, ...], tuple[str, ...], npt.NDArray[np.bool_]]:
    """Names, labels and whether the prediction is right, by name."""
    try:
        with file.open(newline="", encoding="utf-8") as handle:
            rows = sorted(
                {row["image"]: (row["label"], row["correct"] == "1") for row in csv.DictReader(handle)}.items()
            )
    except FileNotFoundError:
        raise UserError(f"{file} is not there, which fit leaves: restore it, or train the run again.") from None
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise UserError(
            f"{file} can't be read ({type(error).__name__}): restore it, or train the run again."
        ) from error
    correct = np.array([right for _, (_, right) in rows], dtype=bool)
    return tuple(image for image, _ in rows), tuple(label for _, (label, _) in rows), correct


# ---- which runs stand on which side


def sides(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Two runs as they are; more, by their recipe, those with a seed that both recipes have, in its order.

    Raises:
        UserError: if these are not two recipes, one has a seed twice, or fewer than two seeds are common.
    """
    if len(runs) == 2:
        return [runs[0]], [runs[1]]
    recipes: list[list[Run]] = []
    for run in runs:
        known = next((recipe for recipe in recipes if recipe[0].recipe == run.recipe), None)
        recipes.append([run]) if known is None else known.append(run)
    if len(recipes) != 2:
        found = "one recipe" if len(recipes) == 1 else f"{len(recipes)} recipes"
        names = "; ".join(", ".join(run.name for run in recipe) for recipe in recipes)
        options = sorted({name for recipe in recipes for name in differing(recipes[0][0], recipe[0])})
        differ = f" They differ in {', '.join(options[:_LISTED])}." if options else ""
        raise UserError(
            f"These runs are of {found}, by everything in config.yaml but the seed ({names}).{differ} Give two runs, "
            "or several seeds of two recipes."
        )
    for recipe in recipes:
        refuse_equal_seeds((run.name, run.seed) for run in recipe)
    by_seed = [{run.seed: run for run in recipe if run.seed is not None} for recipe in recipes]
    common = sorted(by_seed[0].keys() & by_seed[1].keys())
    if len(common) < 2:
        raise UserError(
            f"The recipes have {len(common)} seed{'s' * (len(common) != 1)} in common and need two: "
            f"{' and '.join(_seeds(recipe) for recipe in recipes)}. Train the missing ones (--seed_everything N), or "
            "compare two runs."
        )
    first, second = ([seeds[seed] for seed in common] for seeds in by_seed)
    return first, second


def _seeds(runs: Sequence[Run]) -> str:
    return f"seed{'s' * (len(runs) > 1)} {', '.join(str(run.seed) for run in runs)}"


def differing(first: Run, second: Run) -> dict[str, tuple[str, str]]:
    """Options of the recipe that differ, with the value of either; `null` where it isn't set."""
    one, other = first.recipe, second.recipe
    return {
        name: (one.get(name, "null"), other.get(name, "null"))
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    }


def check_test_images(runs: Sequence[Run]) -> None:
    """Refuse runs that were not tested on the same images.

    Raises:
        UserError: if a name or a label differs, or drawn images have another seed.
    """
    first = runs[0]
    for run in runs[1:]:
        where = f"{first.name} and {run.name} were not tested on the same images"
        if apart := set(first.images) ^ set(run.images):
            count = len(set(first.images) | set(run.images))
            raise UserError(f"{where}: {len(apart):,} of {count:,} are in one of them only, such as {min(apart)!r}.")
        if first.labels != run.labels:
            raise UserError(f"{where}: they have the same names and other labels.")
        seeds = [each.options.get("data.seed") for each in (first, run) if each.options.get("data.path") == SYNTHETIC]
        if len(set(seeds)) > 1 or len(seeds) == 1:
            raise UserError(f"{where}: drawn images depend on --data.seed, which must be the same.")


# ---- the comparison


@dataclass(frozen=True)
class Comparison:
    """A minus B.

    Attributes:
        a, b: the runs of either side, those of one seed at the same place.
        unbalanced: whether balanced accuracy is compared, because classes differ in size or the runs chose by it.
        by_seed: the difference of each pair on the test images.
        gap: over seeds; None for two runs.
    """

    a: Sequence[Run]
    b: Sequence[Run]
    unbalanced: bool
    by_seed: Sequence[PairedDifference]
    gap: Gap | None

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Comparison:
        """Compare runs.

        Raises:
            UserError: if they can't be compared.
        """
        if len(runs) < 2:
            raise UserError("One run is nothing to compare: give two, or several seeds of two recipes.")
        twice = [run for place, run in enumerate(runs) if run.folder.resolve() in
                 [other.folder.resolve() for other in runs[:place]]]  # fmt: skip
        if twice:
            raise UserError(f"{twice[0].folder} is given twice: leave one out.")
        check_test_images(runs)
        a, b = sides(runs)
        unbalanced = any(run.summary.unbalanced for run in runs)
        labels = np.unique(np.array(a[0].labels), return_inverse=True)[1]
        by_seed = [
            paired_macro_difference(one.correct, other.correct, labels)
            if unbalanced
            else paired_difference(one.correct, other.correct)
            for one, other in zip(a, b, strict=True)
        ]
        gap = Gap.of([100 * pair.difference for pair in by_seed]) if len(a) > 1 else None
        return cls(a, b, unbalanced, by_seed, gap)

    @property
    def measure(self) -> str:
        """What is compared."""
        return "balanced accuracy" if self.unbalanced else "accuracy"

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the difference, as shares: over seeds, or over images."""
        if self.gap is not None:
            return self.gap.low / 100, self.gap.high / 100
        return self.by_seed[0].low, self.by_seed[0].high

    @property
    def difference(self) -> float:
        """A minus B as a share."""
        return statistics.fmean(pair.difference for pair in self.by_seed)

    @property
    def told_apart(self) -> bool:
        """At 5 %: by the t-test over seeds; of two runs by McNemar's test, of balanced accuracy by its interval."""
        if self.gap is not None:
            return self.gap.p_value < LEVEL
        low, high = self.interval
        return not low <= 0 <= high if self.unbalanced else self.by_seed[0].p_value < LEVEL

    @property
    def detectable(self) -> float:
        """The difference that would have been found with 80 % power, a share; NaN: none."""
        if self.gap is not None:
            return self.gap.detectable / 100
        (pair,) = self.by_seed
        if not self.unbalanced:
            return detectable_on(pair.n, pair.only_a + pair.only_b)
        normal = statistics.NormalDist()
        ratio = (normal.inv_cdf(1 - LEVEL / 2) + normal.inv_cdf(POWER)) / normal.inv_cdf(1 - LEVEL / 2)
        return ratio * (pair.high - pair.low) / 2

    @property
    def verdict(self) -> str:
        """`A is better`, `B is better`, or `not told apart`, which is not the same as equal."""
        if not self.told_apart:
            return "not told apart"
        return "A is better" if self.difference > 0 else "B is better"

    @property
    def sentences(self) -> list[str]:
        """What was found and how sure it is."""
        low, high = self.interval
        known = not math.isnan(low)
        bounds = f" (95 % interval {points(low)} to {points(high)})" if known else ""
        images = f"{self.by_seed[0].n:,} test images"
        found = [f"A − B: {points(self.difference)} points of {self.measure}{bounds}, on the same {images}."]
        if self.gap is None:
            (pair,) = self.by_seed
            found.append(
                f"Only A is right on {pair.only_a:,} of them, only B on {pair.only_b:,}: McNemar's exact p = "
                f"{_p(pair.p_value)}{', of plain accuracy' if self.unbalanced else ''}."
            )
        else:
            p = f"p = {_p(self.gap.p_value)}" if known else "equal differences have no interval and no p"
            found.append(f"Paired t-test over {len(self.a)} seeds: {p}.")
        reach = f": this cannot exclude ±{100 * max(abs(low), abs(high)):.1f} points" if known else ""
        found.append({"A is better": "A is better.", "B is better": "B is better."}.get(
            self.verdict, f"Not told apart{reach}."))  # fmt: skip
        what = images if self.gap is None else f"{len(self.a)} seeds with this spread"
        if not math.isnan(self.detectable):
            size = f"{100 * self.detectable:.1f} points"
            found.append(f"A difference of {size} would have been found with 80 % power ({what}, level 5 %).")
        elif self.gap is None:
            found.append(f"No difference would have been found with 80 % power ({what}): test on more.")
        return [*found, self.limit]

    @property
    def limit(self) -> str:
        """What the interval doesn't cover."""
        if self.gap is None:
            return "One training each: another seed moves both, which the interval doesn't cover. Give several seeds."
        return "The interval covers the luck of training, not the choice of test images, which all runs share."

    @property
    def notes(self) -> list[str]:
        """What else the reader should know."""
        runs, notes = [*self.a, *self.b], []
        options = differing(self.a[0], self.b[0])
        listed = [f"{name} ({one}, {other})" for name, (one, other) in options.items()]
        more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
        if listed:
            notes.append(f"A and B differ in {'; '.join(listed[:_LISTED])}{more}.")
        else:
            notes.append(f"A and B are one recipe, with the seeds {self.a[0].seed} and {self.b[0].seed}.")
        if "data.path" in options:
            notes.append("The test images have the same names in both folders; their pixels were not compared.")
        machines = sorted({f"{run.summary.device}, {run.summary.precision}" for run in runs})
        if len(machines) > 1:
            notes.append(f"Times are not comparable, they are of {'; '.join(machines)}.")
        if len({run.code for run in runs}) > 1:
            notes.append("The runs were trained by different versions of moevision, see provenance.json.")
        return notes


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


# ---- what is printed and written


def run(chosen: Namespace) -> None:
    """Compare, print, and write JSON where asked to."""
    if chosen.json is not None:
        refuse_foreign(chosen.json, SCHEMA.encode(), "--json")
    runs = [Run.read(address) for address in chosen.runs]
    comparison = Comparison.of(runs)
    left_out = [run.name for run in runs if run not in [*comparison.a, *comparison.b]]
    _print(comparison, left_out)
    if chosen.json is not None:
        try:
            write_json_atomic(chosen.json, facts(comparison))
        except OSError as error:
            raise UserError(f"{chosen.json} can't be written ({error.strerror}): give --json another place.") from error
        print(f"Every number is in {shown(str(chosen.json))}")


def _print(comparison: Comparison, left_out: Sequence[str]) -> None:
    console = Console()
    if console.width < 110 and not console.is_terminal:
        console = Console(width=110)  # a file has room for all columns
    table = Table("", *(shown(name) for name in _headings(comparison)), box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, cells in rows(comparison):
        table.add_row(name, *cells)
    console.print(table, markup=False)
    if comparison.gap is not None:
        for one, other, pair in zip(comparison.a, comparison.b, comparison.by_seed, strict=True):
            said = (
                f"seed {one.seed}: {shown(one.name)} − {shown(other.name)} = {points(pair.difference)} "
                f"({points(pair.low)} to {points(pair.high)}, over images)"
            )
            console.print(said, markup=False, highlight=False)
    for sentence in comparison.sentences:
        console.print(sentence, markup=False, highlight=False)
    console.print()
    left = [f"Left out, without a partner of the same seed: {', '.join(left_out)}."] if left_out else []
    for note in [*comparison.notes, *left]:
        console.print(f"note: {shown(note)}", markup=False, highlight=False)


def _headings(comparison: Comparison) -> tuple[str, str]:
    both = []
    for letter, runs in (("A", comparison.a), ("B", comparison.b)):
        others = f" and {len(runs) - 1} more" if runs[1:] else ""
        both.append(f"{letter}: {runs[0].name}{others}")
    return both[0], both[1]


def rows(comparison: Comparison) -> Iterator[tuple[str, list[str]]]:
    """Accuracy and cost of both sides, with their names; of several seeds the mean. What neither knows is left out."""
    both = (comparison.a, comparison.b)

    def row(name: str, value: Callable[[RunSummary], float | None], text: Callable[[float], str]) -> None:
        cells = []
        for side in both:
            known = [number for run in side if (number := value(run.summary)) is not None]
            cells.append(text(statistics.fmean(known)) if known else "")
        if any(cells):
            found.append((name, cells))

    found: list[tuple[str, list[str]]] = [("test accuracy", [_accuracy(side) for side in both])]
    if comparison.unbalanced:
        row("balanced accuracy", lambda run: run.test.balanced_accuracy, percent)
    found.append(("seeds" if comparison.gap else "seed", [", ".join(str(run.seed) for run in side) for side in both]))
    row("FLOPs of one image", lambda run: run.cost.flops_per_image + run.cost.router_flops_per_image, _count)
    row("parameters", lambda run: run.cost.total_parameters, _count)
    row("active parameters", lambda run: run.cost.active_parameters, _count)
    row("epochs", lambda run: run.epochs, lambda value: f"{value:g}")
    row("training", lambda run: run.duration_s, duration)
    row("training, CPU time", lambda run: run.cpu_s, duration)
    row("training, images/s", lambda run: run.images_per_s, lambda value: f"{value:,.0f}")
    row("one image, ms", lambda run: run.ms_per_image, lambda value: f"{value:.1f}")
    row("busiest expert / mean", lambda run: max((layer.max_over_mean for layer in run.layers), default=None),
        lambda value: f"{value:.2f}")  # fmt: skip
    yield from found


def _count(value: float) -> str:
    return flops(round(value))


def _accuracy(side: Sequence[Run]) -> str:
    """With its 95 % interval over images, or ± its standard deviation over seeds."""
    accuracies = [run.accuracy for run in side]
    if side[1:]:
        return f"{percent(statistics.fmean(accuracies))} ± {100 * statistics.stdev(accuracies):.1f}"
    low, high = accuracy_interval(side[0].summary.test.correct, side[0].summary.test.total)
    return f"{percent(accuracies[0])} ({percent(low)} to {percent(high)})"


def facts(comparison: Comparison) -> dict[str, Any]:
    """Everything as JSON primitives; differences are shares, null where there is none."""
    gap = comparison.gap
    return {
        "schema": SCHEMA,
        "measure": comparison.measure,
        "verdict": comparison.verdict,
        "difference": comparison.difference,
        "interval": [_known(value) for value in comparison.interval],
        "detectable": _known(comparison.detectable),
        "p_value": _known(comparison.by_seed[0].p_value if gap is None else gap.p_value),
        "by_seed": [
            {"seeds": [one.seed, other.seed], **asdict(pair)}
            for one, other, pair in zip(comparison.a, comparison.b, comparison.by_seed, strict=True)
        ],
        "a": [_facts(run) for run in comparison.a],
        "b": [_facts(run) for run in comparison.b],
        "differ_in": differing(comparison.a[0], comparison.b[0]),
        "sentences": comparison.sentences,
        "notes": comparison.notes,
    }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _facts(run: Run) -> dict[str, Any]:
    made = run.summary
    return {
        "run": os.fspath(run.folder),
        "seed": run.seed,
        "correct": made.test.correct,
        "total": made.test.total,
        "accuracy": run.accuracy,
        "interval": accuracy_interval(made.test.correct, made.test.total),
        "balanced_accuracy": made.test.balanced_accuracy,
        **asdict(made.cost),
        "epochs": made.epochs,
        "steps": made.steps,
        "train_s": made.duration_s,
        "cpu_s": made.cpu_s,
        "images_per_s": made.images_per_s,
        "ms_per_image": made.ms_per_image,
        "max_over_mean": [layer.max_over_mean for layer in made.layers],
        "device": made.device,
        "precision": made.precision,
    }
