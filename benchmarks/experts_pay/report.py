"""The verdict of the protocol and its tables, from the records alone.

Accuracies are shares; differences are in points, with Student's 95 % interval over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy.stats import t as student

from benchmarks.experts_pay.arms import MOE, STEMS, TASKS, stem_of
from benchmarks.experts_pay.knockout import MIXED, names_of
from benchmarks.experts_pay.runs import (
    MOE_OF_TASK,
    SEEDS,
    TUNING_SEED,
    arms_of,
    best_rate,
    is_tuned,
    strongest_dense,
    tuned,
)
from benchmarks.markdown import table
from benchmarks.study import holm
from moevision.data.emoji import GROUPS
from moevision.words import points

Record = dict[str, Any]
NAMED_SEEDS = 6  # in which at least half of the experts must have names


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and both ends of Student's 95 % interval."""
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return fmean(values), fmean(values) - half, fmean(values) + half


def interval_text(values: Sequence[float]) -> str:
    """`+4.6 (+4.1 to +5.2)`, in points."""
    mean, low, high = interval(values)
    return f"{points(mean)} ({points(low)} to {points(high)})"


def of_arm(records: Sequence[Record], arm: str) -> list[Record]:
    """The runs of an arm that count, by seed."""
    runs = [run for run in records if run["arm"] == arm and run["seed"] != TUNING_SEED]
    return sorted(runs, key=lambda run: run["seed"])


def contrast(records: Sequence[Record], arm: str, dense: str, split: str = "test") -> list[float]:
    """An arm's accuracy minus the dense control's, in every seed that both have."""
    control = {run["seed"]: run[f"{split}_top1"] for run in of_arm(records, dense)}
    return [
        run[f"{split}_top1"] - control[run["seed"]]
        for run in of_arm(records, arm)
        if run["seed"] in control
    ]


def missed(run: Record, first: str, second: str) -> float:
    """The mean over a run's named groups, of which there are some, of one loss minus another."""
    groups = run["knock_out"]["without"].values()
    return fmean(group[first] - group[second] for group in groups)


def named_share(run: Record) -> float:
    """The share of experts that have a name."""
    return float(np.mean(names_of(np.array(run["experts"])) != MIXED))


def holds(records: Sequence[Record], arm: str, dense: str) -> bool:
    """The protocol's (a) and (b) for one number of experts."""
    runs = of_arm(records, arm)
    if not all(run["knock_out"]["without"] for run in runs):
        return False
    tests = [
        contrast(records, arm, dense),
        [missed(run, "away", "random") for run in runs],
        [missed(run, "named", "others") for run in runs],
    ]
    return all(interval(values)[1] > 0 for values in tests)


def ships(records: Sequence[Record], dense: str) -> str | None:
    """The fewest experts for which the gate holds and half are named in 6 of 8 seeds; None if there are none."""
    by_experts = sorted(MOE, key=lambda arm: int(arm.split("-")[-1]))
    for arm in by_experts:
        named = sum(named_share(run) >= 0.5 for run in of_arm(records, arm))
        if holds(records, arm, dense) and named >= NAMED_SEEDS:
            return arm
    return None


def tables(records: list[Record]) -> str:
    """Everything that the page shows."""
    parts = []
    for task in TASKS:
        of_task = [record for record in records if record["task"] == task]
        if of_task:
            parts += tables_of_task(of_task, task)
    return "\n\n".join(parts)


def tables_of_task(records: list[Record], task: str) -> list[str]:
    """Rates, accuracy and contrasts; for pages of groups also what is missed, names and the verdict."""
    parts = [f"### {task}", tuning_table(records, arms_of(task))]
    moe = [arm for arm in MOE_OF_TASK[task] if len(of_arm(records, arm)) > 1]
    if not all(is_tuned(records, arm) for arm in arms_of(task)) or not moe:
        return parts
    parts.append(accuracy_table(records, moe))
    if task != "groups":
        return parts
    parts += [missed_table(records, moe), knock_out_table(records, moe), names_table(records, moe)]
    if all(len(of_arm(records, arm)) == len(SEEDS) for arm in MOE):
        parts.append(f"Ships: {ships(records, strongest_dense(records))}.")
    return parts


def tuning_table(records: list[Record], arms: Sequence[str]) -> str:
    """Accuracy on the tuning pages by learning rate."""
    rates = sorted({lr for arm in arms for lr in tuned(records, arm)})
    rows = []
    for arm in arms:
        found = tuned(records, arm)
        cells = (f"{100 * found[lr]:.1f}" if lr in found else "" for lr in rates)
        rows.append([f"`{arm}`", *cells])
    return table(["arm", *(f"{lr:g}" for lr in rates)], rows)


def accuracy_table(records: list[Record], moe: Sequence[str]) -> str:
    """Accuracy of the dense controls and of the experts, and the contrasts with both."""
    strongest = strongest_dense(records)
    contrasts = {arm: contrast(records, arm, strongest) for arm in moe}
    adjusted = dict(zip(moe, holm([two_sided_p(contrasts[arm]) for arm in moe]), strict=True))
    rows = []
    for arm in (*(strongest_dense(records, stem) for stem in STEMS), *moe):
        runs = of_arm(records, arm)
        row = [
            f"`{arm}`",
            f"{best_rate(records, arm):g}",
            f"{fmean(run['steps'] for run in runs):.0f}",
            f"{runs[0]['parameters'] / 1e6:.2f} M",
            mean_and_sd([run["test_top1"] for run in runs]),
            mean_and_sd([run["unseen_top1"] for run in runs]),
        ]
        if arm in moe:
            same_stem = strongest_dense(records, stem_of(arm))
            row += [
                interval_text(contrast(records, arm, same_stem)),
                interval_text(contrasts[arm]),
                f"{adjusted[arm]:.1g}",
            ]
        else:
            row += [""] * 3
        rows.append(row)
    header = [
        "arm",
        "rate",
        "steps",
        "parameters",
        "test, % ± SD",
        "unseen emoji, % ± SD",
        "− dense of the same stem, points",
        f"− `{strongest}`, points",
        "p (Holm)",
    ]
    return table(header, rows)


def missed_table(records: list[Record], moe: Sequence[str]) -> str:
    """What own pages lose beyond the two controls, and in how many seeds at least half of the experts have names."""
    rows = []
    for arm in moe:
        runs = [run for run in of_arm(records, arm) if run["knock_out"]["without"]]
        named = [named_share(run) for run in of_arm(records, arm)]
        enough = len(runs) > 1
        rows.append(
            [
                f"`{arm}`",
                interval_text([missed(run, "away", "random") for run in runs]) if enough else "",
                interval_text([missed(run, "named", "others") for run in runs]) if enough else "",
                ", ".join(f"{100 * share:.0f}" for share in named),
                f"{sum(share >= 0.5 for share in named)} of {len(named)}",
            ]
        )
    header = [
        "arm",
        "away − random, points",
        "named − others, points",
        "experts with a name, % by seed",
        "half named, seeds",
    ]
    return table(header, rows)


def knock_out_table(records: list[Record], moe: Sequence[str]) -> str:
    """For each group, over seeds with a named expert: own and other pages without it."""
    rows = []
    for arm in moe:
        for index, group in enumerate(GROUPS):
            runs = [run for run in of_arm(records, arm) if group in run["knock_out"]["without"]]
            if not runs:
                rows.append([f"`{arm}`", group, "0", "", "", "", ""])
                continue
            found = [run["knock_out"]["without"][group] for run in runs]
            before = [run["knock_out"]["with_all"] for run in runs]
            after = [entry["accuracy_by_class"] for entry in found]
            rows.append(
                [
                    f"`{arm}`",
                    group,
                    str(len(runs)),
                    f"{fmean(len(entry['experts']) for entry in found):.1f}",
                    change([row[index] for row in before], [row[index] for row in after]),
                    change(
                        [mean_of_others(row, index) for row in before],
                        [mean_of_others(row, index) for row in after],
                    ),
                    f"{100 * fmean(entry['random'] for entry in found):.1f}",
                ]
            )
    header = [
        "arm",
        "group",
        "seeds with a named expert",
        "experts",
        "own pages, %",
        "other pages, %",
        "lost, as many at random, points",
    ]
    return table(header, rows)


def names_table(records: list[Record], moe: Sequence[str]) -> str:
    """Bits and names of experts, and of the controls."""
    rows = []
    for arm in moe:
        runs = of_arm(records, arm)
        rows.append(
            [
                f"`{arm}`",
                f"{fmean(run['bits'] for run in runs):.2f}",
                *(
                    f"{fmean(run['control_bits'][name] for run in runs):.2f}"
                    for name in ("input_clusters", "pixel_clusters", "untrained_router")
                ),
                *(
                    f"{100 * fmean(named_control(run, name) for run in runs):.0f}"
                    for name in ("input_clusters", "pixel_clusters")
                ),
            ]
        )
    header = [
        "arm",
        "bits",
        "clusters of the input",
        "clusters of pixels",
        "untrained router",
        "named clusters of the input, %",
        "named clusters of pixels, %",
    ]
    return table(header, rows)


def named_control(run: Record, name: str) -> float:
    """The share of a control's clusters that have a name."""
    return float(np.mean(names_of(np.array(run["controls"][name])) != MIXED))


def mean_and_sd(values: Sequence[float]) -> str:
    """In percent; of one value without the deviation."""
    text = f"{100 * fmean(values):.1f}"
    return f"{text} ± {100 * stdev(values):.1f}" if len(values) > 1 else text


def change(before: Sequence[float], after: Sequence[float]) -> str:
    """`90 → 54`, in percent."""
    return f"{100 * fmean(before):.0f} → {100 * fmean(after):.0f}"


def mean_of_others(by_class: Sequence[float], index: int) -> float:
    """Accuracy on the pages of all other classes, which have equally many pages."""
    return fmean(value for label, value in enumerate(by_class) if label != index)


def two_sided_p(values: Sequence[float]) -> float:
    """Of the paired t-test."""
    error = stdev(values) / math.sqrt(len(values))
    return 2 * float(student.sf(abs(fmean(values)) / error, len(values) - 1))
