"""What the convolutional stem gives, and what width and depth give: eight models, each trained for one epoch.

    python -m benchmarks stem --cifar path/to/cifar10     # the trainings; goes on where it stopped
    python -m benchmarks stem --report                    # README.md's tables

Every combination of two stems, two widths and two depths, under the recipe of `configs/cifar10.yaml` with one epoch.
The effect of one of them is the mean difference over the four combinations of the other two, seed by seed.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import HERE, Record, about, argument_parser, count, positive, read_record
from benchmarks.markdown import table
from benchmarks.queue import fill_readme, refuse_changes
from benchmarks.study import Contrast, Row, contrasts, evaluate, make_task, open_data, train
from benchmarks.subject import Subject, find_subject
from moevision.efficiency import measure_cost
from moevision.words import flops

FOLDER = HERE / "stem"
CONFIG, STEPS, PRECISION = "cifar10", 351, "bf16-mixed"
FACTORS: dict[str, tuple[Any, Any]] = {"stem": ("patch", "wide_stages"), "embed_dim": (64, 128), "depth": (2, 4)}
"""Argument of the model: the value that comes first in a difference's name is the second one here."""

Arm = Mapping[str, Any]
Runs = Sequence[Mapping[str, Any]]


def arms() -> list[Arm]:
    """All combinations."""
    return [dict(zip(FACTORS, values, strict=True)) for values in product(*FACTORS.values())]


def subject_of(arm: Arm) -> Subject:
    """The recipe with another model."""
    recipe = find_subject(CONFIG)
    return replace(recipe, arch={**recipe.arch, **arm})


def study(record: Record, options: Namespace) -> None:
    """Do the runs that the record lacks, seed by seed."""
    data, origin = open_data("cifar10", options.cifar), about()
    data.batch_size = find_subject(CONFIG).batch_size
    for seed, arm in product(range(options.seeds), arms()):
        key = {**arm, "seed": seed}
        if record.find(**key) is not None:
            continue
        subject = subject_of(arm).given(num_classes=data.num_classes)
        task = make_task(subject, seed)
        train(task, data, options.steps, seed, precision=PRECISION)
        run = {**key, **evaluate(task, data, PRECISION), **vars(measure_cost(task.net, subject.image_size)), **origin}
        record.add(run)
        print(f"seed {seed}  {', '.join(map(str, arm.values()))}: test {run['test_top1']:.3f}", flush=True)


def parts_of(runs: Runs) -> list[str]:
    """The README's tables: what each of the three gives, then the models."""
    return [effect_table(runs), arm_table(runs)]


def effects(runs: Runs) -> list[Contrast]:
    """Each factor's difference over all combinations of the others, by seed; judged together."""
    means, pairs = {}, []
    for factor, values in FACTORS.items():
        first, second = (f"{factor} {value}" for value in reversed(values))
        pairs.append((first, second))
        for value in values:
            of = [run for run in runs if run[factor] == value]
            means[f"{factor} {value}"] = {seed: mean_of(of, seed) for seed in complete_seeds(runs)}
    return contrasts(means, pairs)


def effect_table(runs: Runs) -> str:
    """The same as a table."""
    rows = [[f"`{each.first}` − `{each.second}`", each.interval, each.shown_p, each.verdict] for each in effects(runs)]
    return table(["difference", "points (95 %)", "p, adjusted", "verdict"], rows, "lrrl")


def complete_seeds(runs: Runs) -> list[int]:
    """Those that all combinations have."""
    seeds = [run["seed"] for run in runs]
    return [seed for seed in sorted(set(seeds)) if seeds.count(seed) == len(arms())]


def mean_of(runs: Runs, seed: int) -> float:
    """Mean test accuracy of one seed's runs."""
    return statistics.fmean(run["test_top1"] for run in runs if run["seed"] == seed)


def arm_table(runs: Runs) -> str:
    """Accuracy and cost of every combination."""
    rows = []
    for arm in arms():
        own = [dict(run) for run in runs if all(run[name] == value for name, value in arm.items())]
        if own:
            row, cost = Row("", 0.0, own), own[0]
            forward = flops(cost["flops_per_image"] + cost["router_flops_per_image"])
            size = f"{cost['active_parameters'] / 1e6:.2f} M of {cost['total_parameters'] / 1e6:.2f} M"
            stem, *numbers = arm.values()
            rows.append([f"`{stem}`", *map(str, numbers), row.spread, row.seeds, forward, size])
    heads = ["stem", "width", "depth", "test top-1, % ± SD", "seeds", "FLOPs/image", "active parameters"]
    return table(heads, rows)


def main() -> None:
    """Train or report."""
    parser = argument_parser("stem", __doc__)
    parser.add_argument("--cifar", default="cifar10", help="CIFAR-10 as a folder, or a name (%(default)s)")
    parser.add_argument("--steps", type=positive, default=STEPS, help="of 128 images (%(default)s: one epoch)")
    parser.add_argument("--seeds", type=count, default=3, metavar="N", help="(%(default)s)")
    parser.add_argument("--threads", type=positive, default=1, help="(%(default)s)")
    parser.add_argument("--report", action="store_true", help="write the README's tables instead")
    parser.add_argument("--out", type=Path, default=FOLDER / "record.json", help="the record (%(default)s)")
    parser.add_argument("--readme", type=Path, default=FOLDER / "README.md", help="where tables go (%(default)s)")
    parser.add_argument("--allow-dirty", action="store_true", help="try it out with uncommitted changes")
    options = parser.parse_args()
    if options.report:
        fill_readme(options.readme, parts_of(read_record(options.out)["runs"]))
        return
    refuse_changes(FOLDER / "README.md", allowed=options.allow_dirty)
    torch.set_num_threads(options.threads)
    recipe = {"config": CONFIG, "steps": options.steps, "precision": PRECISION, "factors": FACTORS}
    study(Record(options.out, recipe), options)
