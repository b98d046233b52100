"""Tables and figures of the saving record.

Differences of accuracy are called by the rule in `study.py`; speeds are quartiles over rounds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from benchmarks.study import Row, contrasts
from moevision.train.plots import BLUE, GREEN, GRID, INK, ORANGE, SOFT, calm, save, title
from moevision.train.report import flops, table

MOE = "MoE"
SAVING = (MOE, "dense, equal FLOPs", "dense, equal parameters")
LEVERS = ("checkpointing", "patch drop 25 %", "patch drop 50 %")
TRAINED_LEVERS = LEVERS[1:]
COLORS = dict(zip((*SAVING, *LEVERS), (ORANGE, SOFT, INK, GREEN, BLUE, BLUE), strict=True))
PHASES = ("train", "infer")
WEIGHT_BYTES = 4  # per parameter in fp32


def tables(record: dict[str, Any]) -> str:
    """Markdown: both questions, and how equal the times were."""
    return "\n\n".join([
        "### What sparsity saves", saving_table(record), *differences(equal_time(record, SAVING)),
        "### The same time", time_table(record),
        "### What the levers cost", levers_table(record), *lever_differences(record),
    ])  # fmt: skip


def lever_differences(record: dict[str, Any]) -> list[str]:
    """What leaving patches out changes, at the same time and at the same steps."""
    kinds = (("time", equal_time(record, (MOE, *TRAINED_LEVERS))), ("steps", same_steps(record)))
    return [f"At the same {kind}: {text}" for kind, rows in kinds for text in differences(rows, minus_first=True)]


def row_of(record: dict[str, Any], arm: str, steps: int | None) -> Row:
    """The finished runs of one arm with so many steps, by seed."""
    runs = [run for run in record["runs"] if (run["arm"], run["steps"]) == (arm, steps)]
    return Row(arm, 0.0, sorted(runs, key=lambda run: run["seed"]))


def equal_time(record: dict[str, Any], arms: Sequence[str]) -> list[Row]:
    """Runs of the arms' own step counts, without arms that have none yet."""
    steps = record.get("budget", {}).get("steps", {})
    return [row for arm in arms if (row := row_of(record, arm, steps.get(arm))).runs]


def same_steps(record: dict[str, Any]) -> list[Row]:
    """The MoE and the patch-dropping arms, all with the steps of the MoE."""
    steps = record.get("budget", {}).get("steps", {}).get(MOE)
    return [row for arm in (MOE, *TRAINED_LEVERS) if (row := row_of(record, arm, steps)).runs]


def differences(rows: Sequence[Row], *, minus_first: bool = False) -> list[str]:
    """A sentence on the first row minus each other one, or on each other one minus the first."""
    first, *others = [row.name for row in rows] or [""]
    pairs = [(other, first) if minus_first else (first, other) for other in others]
    return [contrast.sentence for contrast in contrasts({row.name: row.by_seed for row in rows}, pairs)]


def with_spread(row: Row) -> str:
    """Mean ± SD over seeds in per cent, and the seeds."""
    return f"{row.spread} ({row.seeds})" if row.runs else ""


def cpu_time(row: Row) -> str:
    """What the trainings really took, by CPU time: lowest to highest."""
    spent = [run["cpu_s"] for run in row.runs]
    return f"{min(spent):.0f} to {max(spent):.0f} s" if spent else ""


def images_per_s(record: dict[str, Any], phase: str, arm: str) -> float:
    """Images/s of one thread by CPU time, the median over the measurements that set the budget."""
    step_ms = [speed[phase][arm]["cpu_ms"][1] for speed in of_budget(record)]
    return 1000 * record["settings"]["batch"] / statistics.median(step_ms) if step_ms else math.nan


def speed_ratio(record: dict[str, Any], phase: str, arm: str) -> float:
    """Images/s over the MoE's, pair by pair in the rounds of the same measurements."""
    ratios = [speed[phase][arm]["cpu_ratio"][1] for speed in of_budget(record)]
    return statistics.median(ratios) if ratios else math.nan


def of_budget(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The measurements of speed that set the budget: the code that was measured is the code that was trained."""
    return [record["speed"][number] for number in record.get("budget", {}).get("measurements", [])]


def memory(record: dict[str, Any], arm: str) -> float:
    """Peak training memory in MiB without the program itself: what training added to the built model, plus its weights.

    The median over fresh processes.
    """
    if "memory" not in record:
        return math.nan
    found = record["memory"][arm]
    added = [peak - before for peak, before in zip(found["peak_mib"], found["before_mib"], strict=True)]
    return statistics.median(added) + WEIGHT_BYTES * record["cost"][arm]["total_parameters"] / 2**20


def saving_table(record: dict[str, Any]) -> str:
    """Cost and accuracy of the MoE and its two twins."""
    steps, lines = record.get("budget", {}).get("steps", {}), []
    for arm in SAVING:
        cost = record["cost"][arm]
        lines.append([
            arm,
            f"{cost['total_parameters'] / 1e6:.2f} M",
            f"{cost['active_parameters'] / 1e6:.2f} M",
            flops(cost["flops_per_image"] + cost["router_flops_per_image"]),
            *(f"{images_per_s(record, phase, arm):.0f} ({speed_ratio(record, phase, arm):.2f})" for phase in PHASES),
            f"{memory(record, arm):.0f} MiB",
            with_spread(row_of(record, arm, steps.get(arm))),
        ])  # fmt: skip
    heads = ["model", "parameters", "active", "FLOPs/image", "training images/s (÷ the MoE's)", "inference",
             "peak memory, whole process", "test top-1, % ± SD (seeds)"]  # fmt: skip
    return table(heads, lines)


def time_table(record: dict[str, Any]) -> str:
    """The steps that fitted into the budget, and what they really took."""
    steps, lines = record.get("budget", {}).get("steps", {}), []
    for arm in (*SAVING, *TRAINED_LEVERS):
        lines.append([arm, str(steps.get(arm, "")), cpu_time(row_of(record, arm, steps.get(arm)))])
    return table(["training", "steps in the budget", "CPU time they took"], lines)


def levers_table(record: dict[str, Any]) -> str:
    """Speed and memory of each lever relative to the MoE without it, and accuracy where training changes."""
    steps = record.get("budget", {}).get("steps", {})
    lines = []
    for arm in (MOE, *LEVERS):
        trained = arm == MOE or arm in TRAINED_LEVERS
        same, timed = row_of(record, arm, steps.get(MOE)), row_of(record, arm, steps.get(arm))
        lines.append([
            "none" if arm == MOE else arm,
            f"{speed_ratio(record, 'train', arm):.2f}",
            f"{memory(record, arm) / memory(record, MOE):.2f}",
            with_spread(same) if trained else "same gradients",
            with_spread(timed) if trained else "",
        ])  # fmt: skip
    heads = ["lever", "training images/s ÷ without", "peak memory ÷ without",
             f"test top-1, %, all {steps.get(MOE, '')} steps", "test top-1, %, same time"]  # fmt: skip
    return table(heads, lines)


def draw_saving(record: dict[str, Any], out: Path) -> None:
    """What the MoE and its twins need, and what they reach in the same time."""
    figure = Figure(figsize=(12.0, 2.7), dpi=150, layout="constrained")
    panels = figure.subplots(1, 5, sharey=True, width_ratios=[1, 1, 1, 1, 1.35])
    total = {arm: record["cost"][arm] for arm in SAVING}
    bars(panels[0], {arm: total[arm]["total_parameters"] / 1e6 for arm in SAVING}, "{:.2f} M", "parameters", "stored")
    per_image = {a: (c["flops_per_image"] + c["router_flops_per_image"]) / 1e6 for a, c in total.items()}
    bars(panels[1], per_image, "{:.0f} M", "FLOPs per image", "forward")
    bars(panels[2], {arm: memory(record, arm) for arm in SAVING}, "{:.0f} MiB", "peak memory", "of training")
    speeds = {arm: images_per_s(record, "train", arm) for arm in SAVING}
    bars(panels[3], speeds, "{:.0f}", "images/s", "training, one thread; more is better")
    rows = equal_time(record, SAVING)
    budget = record.get("budget", {}).get("budget_s", math.nan)
    dots(panels[4], rows, list(SAVING))
    title(panels[4], "test top-1", f"after {budget:g} s each; a dot per seed, bar: mean")
    panels[0].set_yticks(range(len(SAVING)), SAVING)
    panels[0].set_ylim(len(SAVING) - 0.5, -0.5)
    save(figure, out)


def draw_levers(record: dict[str, Any], out: Path) -> None:
    """Speed and memory with each lever relative to without, and accuracy at equal steps and equal time."""
    arms = (MOE, *LEVERS)
    figure = Figure(figsize=(12.0, 3.0), dpi=150, layout="constrained")
    panels = figure.subplots(1, 4, sharey=True, width_ratios=[1, 1, 1.2, 1.2])
    speeds = {arm: speed_ratio(record, "train", arm) for arm in arms}
    bars(panels[0], speeds, "{:.2f} ×", "training images/s", "÷ without; more is better")
    used = {arm: memory(record, arm) / memory(record, MOE) for arm in arms}
    bars(panels[1], used, "{:.2f} ×", "peak memory", "÷ without; less is better")
    steps = record.get("budget", {}).get("steps", {})
    dots(panels[2], same_steps(record), list(arms))
    title(panels[2], "test top-1, same steps", f"{steps.get(MOE, '')} each; a dot per seed, bar: mean")
    dots(panels[3], equal_time(record, (MOE, *TRAINED_LEVERS)), list(arms))
    counts = ", ".join(str(steps.get(arm, "")) for arm in (MOE, *TRAINED_LEVERS))
    title(panels[3], "test top-1, same time", f"{counts} steps")
    for axes, words in zip(panels[2:], ("same gradients, not trained", "not trained"), strict=True):
        axes.text(0.5, arms.index("checkpointing"), words, fontsize=7.5, color=SOFT, ha="center", va="center",
                  transform=axes.get_yaxis_transform(), backgroundcolor="white")  # fmt: skip
    low = min(axes.get_xlim()[0] for axes in panels[2:])
    high = max(axes.get_xlim()[1] for axes in panels[2:])
    for axes in panels[2:]:
        axes.set_xlim(low, high)  # one scale, so that both can be read against each other
    panels[0].set_yticks(range(len(arms)), ["none", *LEVERS])
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    save(figure, out)


def bars(axes: Axes, values: dict[str, float], form: str, name: str, note: str) -> None:
    """A horizontal bar per arm with its figure beside it; from zero, so that lengths can be compared."""
    calm(axes)
    axes.grid(visible=False)
    for place, (arm, value) in enumerate(values.items()):
        if math.isnan(value):
            continue
        axes.barh(place, value, height=0.55, color=COLORS[arm])
        axes.text(value, place, f" {form.format(value)}", va="center", fontsize=8, color=INK)
    known = [value for value in values.values() if not math.isnan(value)]
    axes.set_xlim(0, 1.42 * max(known, default=1.0))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    title(axes, name, note)


def dots(axes: Axes, rows: Sequence[Row], order: list[str]) -> None:
    """Accuracy of every seed and the mean."""
    calm(axes)
    axes.grid(visible=False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    for row in rows:
        y = order.index(row.name)
        axes.scatter(row.accuracies, [y] * len(row.runs), s=18, color=COLORS[row.name], alpha=0.75, linewidths=0)
        axes.plot([row.mean] * 2, [y - 0.28, y + 0.28], color=COLORS[row.name], linewidth=2)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, 0))
