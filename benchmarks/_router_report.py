"""Tables and figure of `routers.py`, from its record alone.

Two rows are called a tie unless their means differ by more than Tukey's honest significant difference
q(0.95; rows, df) · s / √n: if all rows were equally good and spread alike, the chance of *any* false difference in a
table would be 5 %. A seed fixes initial weights, order and augmentation for all rows alike, so it is a block: s² is
what is left after the means of rows and of seeds, with (rows - 1)(seeds - 1) degrees of freedom. It covers the luck of
training, not that of the choice of test pictures, which all rows share.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.stats import studentized_range

from moevision.train.markdown import flops, points, table
from moevision.train.plots import BLUE, INK, ORANGE, calm, save, title

TWIN = "dense twin"
TOLERANCE = 0.01
"""Validation accuracy by which a row's own learning rate must beat the common one, fixed before the runs.

It is more than one standard error of such an accuracy: .007 with CIFAR-10's 5 000 images at 46 %, .009 with the 2 000
drawn pets at 80 %.
"""
TITLES = {"cifar10": "CIFAR-10", "synthetic_pets": "drawn pets"}


@dataclass(frozen=True)
class Row:
    """The chosen learning rate of one row on one data set, and its runs, one per seed."""

    name: str
    lr: float
    runs: list[dict[str, Any]]

    @property
    def accuracies(self) -> list[float]:
        """Test accuracy of every seed."""
        return [run["test_top1"] for run in self.runs]

    @property
    def mean(self) -> float:
        """Mean test accuracy."""
        return statistics.fmean(self.accuracies)

    def layers(self, quantity: str) -> list[float]:
        """Mean over seeds of a quantity of every MoE layer."""
        found = [[layer[quantity] for layer in run["layers"]] for run in self.runs]
        return [statistics.fmean(values) for values in zip(*found, strict=True)]


def tuned(runs: Sequence[dict[str, Any]], dataset: str) -> dict[str, dict[float, float]]:
    """For every row the validation accuracy of each learning rate that was tried with seed 0."""
    found: dict[str, dict[float, float]] = {}
    for run in runs:
        if run["dataset"] == dataset and run["seed"] == 0:
            found.setdefault(run["row"], {})[run["lr"]] = run["val_top1"]
    return found


def rate_beyond(tried: dict[float, float]) -> float | None:
    """The next learning rate if the best so far is the largest or the smallest one, None if it lies between."""
    best = max(tried, key=lambda lr: tried[lr])
    return 2 * best if best == max(tried) else best / 2 if best == min(tried) else None


def chosen_rates(tried: dict[str, dict[float, float]]) -> dict[str, float]:
    """The rate of every row: the one best on average, unless the row's own best is better by more than TOLERANCE.

    A row whose best rate so far is the largest or the smallest one that it tried has none.
    """
    tried = {row: rates for row, rates in tried.items() if rate_beyond(rates) is None}
    if not tried:
        return {}
    shared = set.intersection(*(set(rates) for rates in tried.values()))
    common = max(sorted(shared), key=lambda lr: statistics.fmean(rates[lr] for rates in tried.values()))
    chosen = {}
    for row, rates in tried.items():
        best = max(rates, key=lambda lr: rates[lr])
        chosen[row] = best if rates[best] - rates[common] > TOLERANCE else common
    return chosen


def rows_of(record: dict[str, Any], dataset: str) -> list[Row]:
    """Every row with a finished tuning, best mean first."""
    rows = []
    for name, lr in chosen_rates(tuned(record["runs"], dataset)).items():
        keys = {"dataset": dataset, "row": name, "lr": lr}
        rows.append(Row(name, lr, [run for run in record["runs"] if keys.items() <= run.items()]))
    return sorted(rows, key=lambda row: -row.mean)


def tie_width(rows: Sequence[Row]) -> float:
    """Tukey's honest significant difference of two means, blocked by the seeds that all rows have; inf with one."""
    shared = set.intersection(*({run["seed"] for run in row.runs} for row in rows)) if rows else set()
    if len(shared) < 2 or len(rows) < 2:
        return math.inf
    found = np.array([[run["test_top1"] for run in row.runs if run["seed"] in shared] for row in rows])
    left = found - found.mean(0) - found.mean(1, keepdims=True) + found.mean()
    df = (len(rows) - 1) * (len(shared) - 1)
    return float(studentized_range.ppf(0.95, len(rows), df) * math.sqrt((left**2).sum() / df / len(shared)))


def tables(record: dict[str, Any]) -> str:
    """Markdown: one table of accuracies and one of loads per data set, and one of costs."""
    parts = []
    for dataset in (name for name in TITLES if rows_of(record, name)):
        rows = rows_of(record, dataset)
        parts += [f"### {TITLES[dataset]}", accuracy_table(rows), verdict(rows), load_table(rows)]
    return "\n\n".join([*parts, cost_table(record)])


def accuracy_table(rows: Sequence[Row]) -> str:
    """Mean ± SD over seeds, and the difference to the dense twin with the verdict."""
    width = tie_width(rows)
    twin = next((row.mean for row in rows if row.name == TWIN), None)
    lines = []
    for row in rows:
        spread = f" ± {100 * statistics.stdev(row.accuracies):.1f}" if len(row.runs) > 1 else ""
        against = ""
        if twin is not None and row.name != TWIN:
            difference = row.mean - twin
            word = "tie" if abs(difference) <= width else "above" if difference > 0 else "below"
            against = f"{points(difference)}, {word}"
        seeds = ", ".join(f"{100 * value:.1f}" for value in row.accuracies)
        name = row.name if row.name == TWIN else f"`{row.name}`"
        lines.append([name, f"{100 * row.mean:.1f}{spread}", seeds, against, f"{row.lr:g}"])
    return table(["router", "test top-1, % ± SD", "seeds", "to the dense twin", "lr"], lines)


def verdict(rows: Sequence[Row]) -> str:
    """How far apart two rows must be, and which ones the best does not beat."""
    width = tie_width(rows)
    if math.isinf(width):
        return "One seed so far: no difference can be told from luck."
    near = ", ".join(row.name for row in rows[1:] if rows[0].mean - row.mean <= width) or "none"
    return (
        f"Two rows differ if their means are more than {100 * width:.1f} points apart (Tukey, {len(rows)} rows, "
        f"{min(len(row.runs) for row in rows)} seeds as blocks). The best, {rows[0].name}, ties with: {near}."
    )


def load_table(rows: Sequence[Row]) -> str:
    """Hard counts in eval mode over the whole test split, per MoE layer, mean over seeds."""
    lines = []
    for row in rows:
        if row.name == TWIN:
            continue
        experts = len(row.runs[0]["layers"][0]["counts"])
        lines.append([
            f"`{row.name}`",
            each(row.layers("max_over_mean"), "{:.2f}"),
            each(row.layers("cv_squared"), "{:.2g}"),
            f"{max(row.layers('cv_squared_floor')):.1g}",
            each([100 * share for share in row.layers("dropped")], "{:.1f}"),
            each([100 * share for share in row.layers("unrouted")], "{:.1f}"),
            f"{max(max(layer['dead'] for layer in run['layers']) for run in row.runs)} of {experts}",
            f"{each(row.layers('entropy_bits'), '{:.2f}')} of {math.log2(experts):.0f}",
        ])  # fmt: skip
    heads = ["router", "load max/mean", "CV²", "by chance", "choices dropped, %", "tokens without expert, %",
             "dead experts", "router entropy, bits"]  # fmt: skip
    return table(heads, lines)


def each(values: Sequence[float], form: str) -> str:
    """One value per MoE layer."""
    return ", ".join(form.format(value) for value in values)


def cost_table(record: dict[str, Any]) -> str:
    """Parameters, FLOPs per image, and training speed if it was measured."""
    speed = record.get("speed", {}).get("rows", {})
    lines = []
    for name, cost in record.get("cost", {}).items():
        own = speed.get(name)
        low, high = own["to_twin_quartiles"] if own else ("", "")
        lines.append([
            name if name == TWIN else f"`{name}`",
            f"{cost['active_parameters'] / 1e6:.2f} M",
            f"{cost['total_parameters'] / 1e6:.2f} M",
            flops(cost["flops_per_image"]),
            flops(cost["router_flops_per_image"]),
            f"{own['images_per_s']:.0f}" if own else "",
            f"{own['to_twin']:.2f} ({low:.2f} to {high:.2f})" if own else "",
        ])  # fmt: skip
    heads = ["router", "active parameters", "all", "active FLOPs/image", "router's", "training images/s", "to the twin"]
    return table(heads, lines)


def draw(record: dict[str, Any], out: Path) -> None:
    """For each data set the accuracies and the worst layer's load max/mean, a dot per seed; routers in one order."""
    by_dataset = {name: rows for name in TITLES if (rows := rows_of(record, name))}
    names = [row.name for row in next(iter(by_dataset.values()))][::-1]
    figure = Figure(figsize=(5.6 * len(by_dataset), 4.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2 * len(by_dataset), sharey=True, squeeze=False, width_ratios=[3, 2] * len(by_dataset))[
        0
    ]
    for place, (dataset, rows) in enumerate(by_dataset.items()):
        accuracy, load = panels[2 * place : 2 * place + 2]
        for row in (row for row in rows if row.name in names):
            y = names.index(row.name)
            dots = {"color": INK if row.name == TWIN else BLUE, "s": 14, "alpha": 0.75, "linewidths": 0}
            accuracy.scatter(row.accuracies, [y] * len(row.runs), **dots)
            accuracy.plot([row.mean] * 2, [y - 0.3, y + 0.3], color=dots["color"], linewidth=2)
            worst = [max(layer["max_over_mean"] for layer in run["layers"]) for run in row.runs if run["layers"]]
            load.scatter(worst, [y] * len(worst), **{**dots, "color": ORANGE})
        for axes in (accuracy, load):
            calm(axes)
            axes.grid(axis="x", color="#e8e8e8", linewidth=0.8)
        twin = next((row for row in rows if row.name == TWIN), None)
        width = tie_width(rows)
        if twin is not None and math.isfinite(width):
            accuracy.axvspan(twin.mean - width, twin.mean + width, color="#f2f2f2", zorder=0)
        accuracy.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        accuracy.xaxis.set_major_formatter(PercentFormatter(1.0, 0))
        accuracy.set_xlabel("test top-1", fontsize=8, color=INK)
        load.axvline(1.0, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
        load.set_xlabel("load max/mean", fontsize=8, color=INK)
        title(accuracy, TITLES[dataset], "a dot per seed, bar: mean; grey: ties with the twin")
    panels[0].set_yticks(range(len(names)), names)
    save(figure, out)
