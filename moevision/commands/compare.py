"""`moevision compare RUN RUN…`: two trainings, or several seeds of two recipes, on the same test images.

Two runs are compared image by image (McNemar's exact test, Tango's interval): their interval covers the choice of test
images, but not the variation between training seeds. Several seeds are compared seed by seed (Student's t of the
differences): that interval covers the variation between seeds, but not the choice of test images, which all runs share.
Accuracies are shares in [0, 1].
"""

from __future__ import annotations

import csv
import math
import os
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.stats import norm

from moevision.commands.data import run_of
from moevision.config import OBSOLETE_KEYS, flatten
from moevision.data.named import DRAWN
from moevision.errors import UserError, escape_controls, refuse_equal_seeds
from moevision.files import read_csv, require_own_file, write_json_atomic
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
from moevision.types import Flags, Json, Keywords
from moevision.words import duration, flops, percent, points

PREDICTIONS = "predictions_test.csv"
_SCHEMA = "moevision.compare/1"
# A recipe is the options that decide how a model is trained, except for the seed. An option that may change when a run
# is resumed (`is_free`) isn't part of a recipe. These prefixes of option names are the exceptions.
# Not part of a recipe although not free: the seeds, and options that only observe the training.
_OUTSIDE_RECIPE = (
    "seed_everything",
    "data.order_seed",
    "record_routing",
    "check_memory",
    *OBSOLETE_KEYS,
)
# Part of a recipe although free. Earlier versions ended a training at trainer.max_time, so that it decided the result.
_INSIDE_RECIPE = ("guard", "data.path", "trainer.max_time", "trainer.callbacks")
_MAX_LISTED_OPTIONS = 6  # in a sentence on options that differ
_ACCURACIES = ("correct", "total", "accuracy", "interval", "balanced_accuracy")
_COSTS = ("epochs", "steps", "cpu_s", "images_per_s", "ms_per_image", "device", "precision")


def run(args: Namespace) -> None:
    """Compare, print, and write JSON where asked to."""
    if args.json is not None:
        require_own_file(args.json, _SCHEMA.encode(), "--json")
    runs = [read_run(address) for address in args.runs]
    check_test_images(runs)
    comparison = compare(*paired_runs(runs))
    compared = [*comparison.a, *comparison.b]
    _print(comparison, left_out=[run.name for run in runs if run not in compared])
    if args.json is not None:
        write_json_atomic(args.json, facts(comparison))
        print(f"Every number is in {escape_controls(str(args.json))}")


# ---- the runs


@dataclass(frozen=True)
class FinishedRun:
    """A finished run with its predictions for n test images, which are sorted by name."""

    folder: Path
    summary: RunSummary
    options: Mapping[str, Any]  # dotted option name -> value
    images: tuple[str, ...]  # [n] names
    labels: tuple[str, ...]  # [n] names of the true classes
    correct: Flags  # [n] whether the predicted class is the true one

    @property
    def name(self) -> str:
        """Name of the run's folder; for a dense twin, `RUN/twin`."""
        folder = self.folder.resolve()
        return f"{folder.parent.name}/{folder.name}" if folder.name == "twin" else folder.name

    @cached_property
    def recipe(self) -> dict[str, str]:
        """Every option that decides the training, except for its seed, as text.

        Options that are null are left out.
        """
        values = {"images per step": str(self.summary.batch_size)}
        for name, value in self.options.items():
            is_outside = is_free(name) or name.startswith(_OUTSIDE_RECIPE)
            if value is None or (is_outside and not name.startswith(_INSIDE_RECIPE)):
                continue
            if name == "data.path" and value not in DRAWN:
                value = Path(str(value)).expanduser().resolve()
            values[name] = str(value)
        return values


def read_run(address: str) -> FinishedRun:
    """Read a run by the path of its folder, or of the model in it; a UserError if the run isn't finished."""
    folder = run_of(address)
    if not is_finished(folder, with_twin=False):
        raise UserError(
            f"{folder} is not finished: go on with `{resume_command(folder)}`, then compare."
        )

    file = folder / PREDICTIONS
    try:
        rows = sorted((row["image"], row["label"], row["correct"]) for row in read_csv(file))
        images, labels, correct = zip(*rows, strict=True)
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise UserError(
            f"{file} can't be read ({error}): restore it, or train the run again."
        ) from error

    return FinishedRun(
        folder=folder,
        summary=read_summary(folder / "summary.json"),
        options=flatten(read_yaml(folder / "config.yaml")),
        images=images,
        labels=labels,
        correct=np.array(correct) == "1",
    )


def differing(a: FinishedRun, b: FinishedRun) -> dict[str, tuple[str, str]]:
    """Options in which two recipes differ: name -> (value of a, value of b), `null` where it isn't set."""
    options = {}
    for name in sorted(a.recipe.keys() | b.recipe.keys()):
        value_a = a.recipe.get(name, "null")
        value_b = b.recipe.get(name, "null")
        if value_a != value_b:
            options[name] = (value_a, value_b)
    return options


def check_test_images(runs: Sequence[FinishedRun]) -> None:
    """Refuse fewer than two runs, a run that is given twice, and runs that were tested on different images."""
    if len(runs) < 2:
        raise UserError("One run is nothing to compare: give two, or several seeds of two recipes.")

    for index, run in enumerate(runs):
        if any(run.folder.samefile(other.folder) for other in runs[:index]):
            raise UserError(f"{run.folder} is given twice: leave one out.")

    for run in runs[1:]:
        difference = _difference_of_images(runs[0], run)
        if difference:
            raise UserError(
                f"{runs[0].name} and {run.name} were not tested on the same images: {difference}"
            )


def _difference_of_images(a: FinishedRun, b: FinishedRun) -> str:
    """A description of how the test images of two runs differ; empty if they are the same."""
    images_of_a = set(zip(a.images, a.labels, strict=True))
    images_of_b = set(zip(b.images, b.labels, strict=True))
    in_one_only = images_of_a ^ images_of_b
    if in_one_only:
        name, label = min(in_one_only)
        return (
            f"{len(in_one_only):,} of {len(images_of_a | images_of_b):,} are in one of them only, such as {name!r} "
            f"with the label {label!r}."
        )

    # Drawn images have the same names whatever they show.
    path_of_a, path_of_b = a.options.get("data.path"), b.options.get("data.path")
    same_seed = a.options.get("data.seed") == b.options.get("data.seed")
    if {path_of_a, path_of_b} & DRAWN.keys():
        if path_of_a != path_of_b:
            return f"they were drawn as {path_of_a} and as {path_of_b}."
        if not same_seed:
            return "drawn images depend on --data.seed, which must be the same."
    return ""


def paired_runs(runs: Sequence[FinishedRun]) -> tuple[list[FinishedRun], list[FinishedRun]]:
    """The runs of side A and of side B; the i-th of both have the same seed where there are more than two runs.

    Two runs are a side each, whatever their recipe and seed. More are divided by their recipe, of which there must be
    two; seeds that only one recipe has are left out.
    """
    if len(runs) == 2:
        return [runs[0]], [runs[1]]

    runs_of_recipe = defaultdict(list)
    for run in runs:
        runs_of_recipe[frozenset(run.recipe.items())].append(run)
    groups = list(runs_of_recipe.values())
    if len(groups) != 2:
        raise UserError(_not_two_recipes(groups))

    by_seed = []
    for group in groups:
        refuse_equal_seeds((run.name, run.summary.seed) for run in group)
        by_seed.append({run.summary.seed: run for run in group if run.summary.seed is not None})
    a, b = by_seed

    common = sorted(a.keys() & b.keys())
    if len(common) < 2:
        seeds = [f"seed{'s' * (len(group) > 1)} {_seeds(group)}" for group in groups]
        raise UserError(
            f"The recipes have {len(common)} seed{'s' * (len(common) != 1)} in common and need two: "
            f"{' and '.join(seeds)}. Train the missing ones (--seed_everything N), or compare two runs."
        )
    return [a[seed] for seed in common], [b[seed] for seed in common]


def _not_two_recipes(groups: Sequence[Sequence[FinishedRun]]) -> str:
    """The error message for groups of runs, one for each recipe, that are one group or more than two."""
    number = "one recipe" if len(groups) == 1 else f"{len(groups)} recipes"
    names = "; ".join(", ".join(run.name for run in group) for group in groups)
    options = {name for group in groups for name in differing(groups[0][0], group[0])}
    differ = ""
    if options:
        differ = f" They differ in {', '.join(sorted(options)[:_MAX_LISTED_OPTIONS])}."
    return (
        f"These runs are of {number}, by everything in config.yaml but the seed ({names}).{differ} Give two runs, or "
        "several seeds of two recipes."
    )


def _seeds(runs: Sequence[FinishedRun]) -> str:
    return ", ".join(str(run.summary.seed) for run in runs)


# ---- the comparison


@dataclass(frozen=True)
class Comparison:
    """Accuracy of side A minus that of side B, as a share in [-1, 1]; NaN where a number can't be computed.

    The uncertainty is that over seeds; where each side is a single run, that over test images.
    """

    a: Sequence[FinishedRun]
    b: Sequence[FinishedRun]
    # whether balanced accuracy is compared: classes differ in size, or the runs selected their weights by it
    unbalanced: bool
    by_seed: Sequence[PairedDifference]  # of each pair of runs, on the test images
    difference: float  # mean over the pairs
    low: float  # ends of the 95 % interval
    high: float
    p_value: float  # of the t-test over seeds, or of McNemar's test
    # whether the difference is significant at 5 %: by the interval for balanced accuracies of two runs, else by p_value
    differ: bool
    detectable: float  # smallest difference that this design finds with 80 % power

    @property
    def measure(self) -> str:
        """Name of the accuracy that is compared."""
        if self.a[0].summary.test.multilabel:
            return "accuracy (images with all labels right)"
        return "balanced accuracy" if self.unbalanced else "accuracy"

    @property
    def verdict(self) -> str:
        """`A is better`, `B is better`, or `no difference found`, which is not the same as equal."""
        if not self.differ:
            return "no difference found"
        return "A is better" if self.difference > 0 else "B is better"

    @property
    def simpler(self) -> str | None:
        """The side without experts, "A" or "B"; None if both sides have experts, or neither has."""
        has_experts = bool(self.a[0].summary.layers), bool(self.b[0].summary.layers)
        return {(False, True): "A", (True, False): "B"}.get(has_experts)


def compare(a: Sequence[FinishedRun], b: Sequence[FinishedRun]) -> Comparison:
    """Compare a single run with another, or pairs of runs of the same seeds."""
    unbalanced = any(run.summary.unbalanced for run in [*a, *b])
    # [n] int; every run has the same test images.
    _, labels = np.unique(np.array(a[0].labels), return_inverse=True)

    by_seed = []
    for run_a, run_b in zip(a, b, strict=True):
        if unbalanced:
            pair = paired_macro_difference(run_a.correct, run_b.correct, labels)
        else:
            pair = paired_difference(run_a.correct, run_b.correct)
        by_seed.append(pair)

    if len(a) > 1:
        certainty = _certainty_over_seeds(by_seed)
    else:
        certainty = _certainty_over_images(by_seed[0], balanced=unbalanced)
    return Comparison(
        a=a,
        b=b,
        unbalanced=unbalanced,
        by_seed=by_seed,
        difference=fmean(pair.difference for pair in by_seed),
        **certainty,
    )


def _certainty_over_seeds(pairs: Sequence[PairedDifference]) -> Keywords:
    """Fields of `Comparison` from Student's t; `Gap` computes in percentage points."""
    gap = Gap.of([100 * pair.difference for pair in pairs])
    return {
        "low": gap.low / 100,
        "high": gap.high / 100,
        "p_value": gap.p_value,
        "differ": gap.p_value < LEVEL,
        "detectable": gap.detectable / 100,
    }


def _certainty_over_images(pair: PairedDifference, *, balanced: bool) -> Keywords:
    """Fields of `Comparison` from the test images of two runs."""
    if balanced:
        # Half the interval is z(1 - level / 2) standard errors, and z(1 - level / 2) + z(power) of them are detected.
        z_ratio = norm.ppf(POWER) / norm.ppf(1 - LEVEL / 2)
        detectable = (1 + z_ratio) * (pair.high - pair.low) / 2
    else:
        detectable = detectable_on(pair.n, pair.only_a + pair.only_b)
    return {
        "low": pair.low,
        "high": pair.high,
        "p_value": pair.p_value,
        "differ": shown_to_differ(pair, balanced=balanced),
        "detectable": float(detectable),
    }


def comparison_text(comparison: Comparison) -> list[list[str]]:
    """Two lists: sentences on the result and its uncertainty, and notes on options and machines that differ."""
    summaries = [run.summary for run in [*comparison.a, *comparison.b]]
    text = template("compare.txt.jinja").render(
        comparison=comparison,
        options=differing(comparison.a[0], comparison.b[0]),
        machines=sorted({f"{summary.device}, {summary.precision}" for summary in summaries}),
    )
    # The template separates the two by a line `---`.
    return [part.splitlines() for part in text.split("---\n")]


# ---- what is printed and written


def _print(comparison: Comparison, left_out: Sequence[str]) -> None:
    console = Console()
    if console.width < 110 and not console.is_terminal:
        console = Console(width=110)  # a file has room for all columns
    print_line = partial(console.print, markup=False, highlight=False)
    num_seeds = len(comparison.a)

    table = Table("", box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0))
    others = f" and {num_seeds - 1} more" if num_seeds > 1 else ""
    for letter, side in (("A", comparison.a), ("B", comparison.b)):
        table.add_column(escape_controls(f"{letter}: {side[0].name}{others}"), justify="right")
    for row in _rows(comparison):
        table.add_row(*row)
    console.print(table, markup=False)

    if num_seeds > 1:
        for a, b, pair in zip(comparison.a, comparison.b, comparison.by_seed, strict=True):
            print_line(
                f"seed {a.summary.seed}: {escape_controls(a.name)} − {escape_controls(b.name)} = "
                f"{points(pair.difference)} ({points(pair.low)} to {points(pair.high)}, over images)"
            )

    sentences, notes = comparison_text(comparison)
    for sentence in sentences:
        print_line(sentence)
    console.print()

    if left_out:
        notes.append(f"Left out, without a partner of the same seed: {', '.join(left_out)}.")
    for note in notes:
        print_line(f"note: {escape_controls(note)}")


# Rows of the table below the accuracy: name -> how a number becomes text.
_ROW_FORMATS: dict[str, Callable[[float], str]] = {
    "balanced accuracy": percent,
    "FLOPs of one image": flops,
    "parameters": flops,
    "active parameters": flops,
    "epochs": "{:g}".format,
    "training": duration,
    "training, CPU time": duration,
    "training, images/s": "{:,.0f}".format,
    "one image, ms": "{:.1f}".format,
    "max/mean load": "{:.2f}".format,
}


def _row_values(run: RunSummary) -> dict[str, float | None]:
    """The numbers of a run by the names of `_ROW_FORMATS`; None where the run didn't record one."""
    return {
        "balanced accuracy": run.test.balanced_accuracy,
        "FLOPs of one image": run.cost.flops_per_image + run.cost.router_flops_per_image,
        "parameters": run.cost.total_parameters,
        "active parameters": run.cost.active_parameters,
        "epochs": run.epochs,
        "training": run.duration_s,
        "training, CPU time": run.cpu_s,
        "training, images/s": run.images_per_s,
        "one image, ms": run.ms_per_image,
        "max/mean load": max((layer.max_over_mean for layer in run.layers), default=None),
    }


def _rows(comparison: Comparison) -> Iterator[tuple[str, str, str]]:
    """Rows of the table: name, text of A, text of B, each a mean over seeds; rows that both lack are left out."""
    a, b = comparison.a, comparison.b
    yield "test accuracy", _accuracy(a), _accuracy(b)
    yield "seeds" if len(a) > 1 else "seed", _seeds(a), _seeds(b)

    for name, to_text in _ROW_FORMATS.items():
        if name == "balanced accuracy" and not comparison.unbalanced:
            continue
        text_a = _mean_text(a, name, to_text)
        text_b = _mean_text(b, name, to_text)
        if text_a or text_b:
            yield name, text_a, text_b


def _mean_text(side: Sequence[FinishedRun], name: str, to_text: Callable[[float], str]) -> str:
    """The mean over the runs that recorded this number; empty if none did."""
    values = []
    for run in side:
        value = _row_values(run.summary)[name]
        if value is not None:
            values.append(value)
    return to_text(fmean(values)) if values else ""


def _accuracy(side: Sequence[FinishedRun]) -> str:
    """Accuracy of one run with its 95 % interval over images, or the mean of several ± their standard deviation."""
    accuracies = [run.summary.test.accuracy for run in side]
    if len(side) > 1:
        return f"{percent(fmean(accuracies))} ± {100 * stdev(accuracies):.1f}"
    low, high = side[0].summary.test.interval
    return f"{percent(accuracies[0])} ({percent(low)} to {percent(high)})"


def facts(comparison: Comparison) -> Json:
    """The whole comparison as JSON primitives; differences are shares, null where they are NaN."""
    sentences, notes = comparison_text(comparison)
    pairs = zip(comparison.a, comparison.b, comparison.by_seed, strict=True)
    return {
        "schema": _SCHEMA,
        "measure": comparison.measure,
        "verdict": comparison.verdict,
        "difference": comparison.difference,
        "interval": [_null_if_nan(comparison.low), _null_if_nan(comparison.high)],
        "detectable": _null_if_nan(comparison.detectable),
        "p_value": _null_if_nan(comparison.p_value),
        "by_seed": [
            {"seeds": [a.summary.seed, b.summary.seed], **asdict(pair)} for a, b, pair in pairs
        ],
        "a": [_facts_of_run(run) for run in comparison.a],
        "b": [_facts_of_run(run) for run in comparison.b],
        "differ_in": differing(comparison.a[0], comparison.b[0]),
        "sentences": sentences,
        "notes": notes,
    }


def _null_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _facts_of_run(run: FinishedRun) -> Json:
    summary = run.summary
    return {
        "run": os.fspath(run.folder),
        "seed": summary.seed,
        **{name: getattr(summary.test, name) for name in _ACCURACIES},
        **asdict(summary.cost),
        **{name: getattr(summary, name) for name in _COSTS},
        "train_s": summary.duration_s,
        "max_over_mean": [layer.max_over_mean for layer in summary.layers],
    }
