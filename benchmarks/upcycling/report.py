"""Table and figure of the upcycling record; differences are called by the rule in `study.py`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.markdown import table
from benchmarks.study import Row, contrasts
from moevision.train.plots import GREEN, INK, ORANGE, SOFT, calm, save, title

LABELS = {
    "dense": ("dense, n", SOFT),
    "in one": ("dense, n + m in one schedule", INK),
    "continued": ("dense, n, restarted, m", GREEN),
    "upcycled": ("dense, n, upcycled, m", ORANGE),
}
RESTARTED = ("continued", "upcycled")


def runs_of(record: dict[str, Any], arm: str) -> dict[int, dict[str, Any]]:
    """The finished runs of one arm by seed."""
    return {run["seed"]: run for run in record["runs"] if run["arm"] == arm}


def spent(record: dict[str, Any], run: dict[str, Any]) -> tuple[float, float, float]:
    """FLOPs, CPU seconds and wall seconds of training, those of the dense start included."""
    end = run["curve"][-1]
    own = (run["steps"] * run["train_flops_per_step"], end["cpu_s"], end["wall_s"])
    if run["arm"] not in RESTARTED:
        return own
    before = spent(record, runs_of(record, "dense")[run["seed"]])
    return own[0] + before[0], own[1] + before[1], own[2] + before[2]


def tables(record: dict[str, Any]) -> str:
    """Markdown: accuracy and cost of every arm, and the two differences that matter."""
    return "\n\n".join([accuracy_table(record), *differences(record)])


def accuracy_table(record: dict[str, Any]) -> str:
    """Accuracy and cost of every arm."""
    lines = []
    for arm, (label, _) in LABELS.items():
        runs = list(runs_of(record, arm).values())
        if not runs:
            continue
        row = Row(label, 0.0, runs)
        costs = [statistics.fmean(values) for values in zip(*(spent(record, run) for run in runs), strict=True)]
        loads = [max(layer["max_over_mean"] for layer in run["layers"]) for run in runs if run["layers"]]
        lines.append([
            label,
            row.spread,
            row.seeds,
            f"{costs[0] / 1e12:.2f} T",
            f"{costs[1]:.0f} s",
            f"{runs[0]['active_parameters'] / 1e6:.2f} M of {runs[0]['total_parameters'] / 1e6:.2f} M",
            f"{statistics.fmean(loads):.2f}" if loads else "",
        ])  # fmt: skip
    heads = ["training", "test top-1, % ± SD", "seeds", "training FLOPs", "CPU time", "active parameters",
             "load max/mean, worst layer"]  # fmt: skip
    return table(heads, lines)


def differences(record: dict[str, Any]) -> list[str]:
    """A sentence on the upcycled model minus each of its two rivals."""
    accuracies = {
        label: Row(label, 0.0, list(runs_of(record, arm).values())).by_seed for arm, (label, _) in LABELS.items()
    }
    pairs = [(LABELS["upcycled"][0], LABELS[other][0]) for other in ("continued", "in one")]
    return [contrast.sentence for contrast in contrasts(accuracies, pairs)]


def draw(record: dict[str, Any], out: Path) -> None:
    """Validation accuracy against training FLOPs and against CPU time: a thin line per seed, thick for the mean."""
    figure = Figure(figsize=(10.4, 4.0), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, what, unit in zip(
        panels, (0, 1), ("training FLOPs, 10¹²", "training time, s of one CPU thread"), strict=True
    ):
        calm(axes)
        for arm, (label, color) in LABELS.items():
            curves = [curve_of(record, run, what) for run in runs_of(record, arm).values()]
            for curve in curves:
                axes.plot(*curve, color=color, linewidth=0.8, alpha=0.35)
            if curves:
                mean = np.mean(curves, axis=0)
                axes.plot(*mean, color=color, linewidth=2, label=label, marker="o", markersize=3.5)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, 0))
        axes.set_xlabel(unit, fontsize=9, color=INK)
        axes.set_xlim(left=0)
    pictures = record["settings"]["pictures"]
    title(panels[0], "validation top-1", f"the same {pictures} images; thin: seeds, thick: mean")
    panels[1].legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower right")
    save(figure, out)


def curve_of(record: dict[str, Any], run: dict[str, Any], what: int) -> np.ndarray:
    """[2, points]: TFLOPs (what = 0) or CPU seconds (1) from the very start, and accuracy."""
    before = spent(record, runs_of(record, "dense")[run["seed"]])[what] if run["arm"] in RESTARTED else 0.0
    own = [point["step"] * run["train_flops_per_step"] if what == 0 else point["cpu_s"] for point in run["curve"]]
    scale = 1e-12 if what == 0 else 1.0
    return np.array([[scale * (before + value) for value in own], [point["val_top1"] for point in run["curve"]]])
