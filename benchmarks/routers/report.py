"""Tables and figure of the routers' record; differences are called by the rule in `study.py`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.markdown import table
from benchmarks.study import Contrast, Row, contrasts
from moevision.train.plots import BLUE, INK, ORANGE, SOFT, save, style_axes, title
from moevision.words import flops

TWIN, HASH = "dense twin", "hash"
TOLERANCE = 0.01
"""Validation accuracy by which a row's own learning rate must beat the common one, chosen after three seeds.

It is more than one standard error of such an accuracy: .007 with CIFAR-10's 5 000 images at 46 %, .009 with the 2 000
drawn pets at 80 %.
"""
TITLES = {"cifar10": "CIFAR-10", "synthetic_pets": "drawn pets"}


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
    common = max(
        sorted(shared), key=lambda lr: statistics.fmean(rates[lr] for rates in tried.values())
    )
    chosen = {}
    for row, rates in tried.items():
        best = max(rates, key=lambda lr: rates[lr])
        chosen[row] = best if rates[best] - rates[common] > TOLERANCE else common
    return chosen


def rows_of(record: dict[str, Any], dataset: str) -> list[Row]:
    """Every row with a finished tuning, in the record's order."""
    rows = []
    for name, lr in chosen_rates(tuned(record["runs"], dataset)).items():
        keys = {"dataset": dataset, "row": name, "lr": lr}
        rows.append(Row(name, lr, [run for run in record["runs"] if keys.items() <= run.items()]))
    return rows


def tables(record: dict[str, Any]) -> str:
    """Markdown: one table of accuracies and one of loads per data set, and one of costs."""
    parts = []
    for dataset in (name for name in TITLES if rows_of(record, name)):
        rows = rows_of(record, dataset)
        parts += [f"### {TITLES[dataset]}", accuracy_table(rows), load_table(rows)]
    return "\n\n".join([*parts, cost_table(record)])


def against(rows: Sequence[Row], reference: str) -> dict[str, Contrast]:
    """Every other row minus the reference, by name."""
    pairs = [(row.name, reference) for row in rows if row.name != reference]
    found = contrasts({row.name: row.by_seed for row in rows}, pairs)
    return {contrast.first: contrast for contrast in found}


def accuracy_table(rows: Sequence[Row]) -> str:
    """Differences to the dense twin and to `hash`, which learns nothing, with verdicts; the largest first."""
    to_twin, to_hash = against(rows, TWIN), against(rows, HASH)
    lines = []
    for row in sorted(
        rows, key=lambda row: -(to_twin[row.name].mean if row.name in to_twin else 0.0)
    ):
        lines.append(
            [
                row.name if row.name == TWIN else f"`{row.name}`",
                *(said(found.get(row.name), len(row.runs)) for found in (to_twin, to_hash)),
                f"{100 * row.mean:.1f}",
                str(len(row.runs)),
                f"{row.lr:g}",
            ]
        )
    heads = [
        "router",
        "points above the dense twin",
        "points above `hash`",
        "test top-1, %",
        "seeds",
        "lr",
    ]
    return table(heads, lines)


def said(contrast: Contrast | None, seeds: int) -> str:
    """Mean, interval and verdict of a contrast; its seeds where they aren't all of the row's."""
    if contrast is None:
        return ""
    fewer = f" ({len(contrast.gaps)} seeds)" if len(contrast.gaps) != seeds else ""
    return f"{contrast.interval}: {contrast.verdict}{fewer}"


def load_table(rows: Sequence[Row]) -> str:
    """Hard counts in eval mode over the whole test split, per MoE layer, mean over seeds."""
    lines = []
    for row in rows:
        if row.name == TWIN:
            continue
        experts = len(row.runs[0]["layers"][0]["counts"])
        lines.append(
            [
                f"`{row.name}`",
                each(row.layers("max_over_mean"), "{:.2f}"),
                each([100 * share for share in row.layers("unrouted")], "{:.1f}"),
                f"{max(max(layer['dead'] for layer in run['layers']) for run in row.runs)} of {experts}",
            ]
        )
    return table(["router", "load max/mean", "tokens without expert, %", "dead experts"], lines)


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
        lines.append(
            [
                name if name == TWIN else f"`{name}`",
                f"{cost['active_parameters'] / 1e6:.2f} M",
                f"{cost['total_parameters'] / 1e6:.2f} M",
                flops(cost["flops_per_image"]),
                flops(cost["router_flops_per_image"]),
                f"{own['to_twin']:.2f} ({low:.2f} to {high:.2f})" if own else "",
            ]
        )
    heads = [
        "router",
        "active parameters",
        "all",
        "active FLOPs/image",
        "router's",
        "training images/s ÷ the twin's",
    ]
    return table(heads, lines)


def draw(record: dict[str, Any], out: Path) -> None:
    """For each data set the differences to the dense twin and the worst layer's load, a dot per seed."""
    by_dataset = {name: rows for name in TITLES if (rows := rows_of(record, name))}
    figure = Figure(figsize=(6.4, 4.2 * len(by_dataset)), dpi=150, layout="constrained")
    panels = figure.subplots(len(by_dataset), 2, sharey="row", squeeze=False, width_ratios=[3, 2])
    for (dataset, rows), (accuracy, load) in zip(by_dataset.items(), panels, strict=True):
        found = against(rows, TWIN)
        names = sorted(found, key=lambda name: found[name].mean)
        for y, name in enumerate(names):
            contrast, runs = found[name], next(row.runs for row in rows if row.name == name)
            color = SOFT if contrast.verdict == "not told apart" else BLUE
            dots = {"s": 14, "alpha": 0.75, "linewidths": 0}
            accuracy.scatter(
                [100 * gap for gap in contrast.gaps], [y] * len(contrast.gaps), color=color, **dots
            )
            accuracy.plot([100 * contrast.mean] * 2, [y - 0.3, y + 0.3], color=color, linewidth=2)
            worst = [max(layer["max_over_mean"] for layer in run["layers"]) for run in runs]
            load.scatter(worst, [y] * len(worst), color=ORANGE, **dots)
        for axes, nothing in ((accuracy, 0.0), (load, 1.0)):
            style_axes(axes)
            axes.grid(axis="x", color="#e8e8e8", linewidth=0.8)
            axes.axvline(nothing, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        accuracy.set_xlabel("test top-1, points above the dense twin", fontsize=8, color=INK)
        load.set_xlabel("load max/mean", fontsize=8, color=INK)
        title(
            accuracy,
            TITLES[dataset],
            "a dot per seed, bar: mean; grey: not told apart from the twin",
        )
        accuracy.set_yticks(range(len(names)), names)
    save(figure, out)
