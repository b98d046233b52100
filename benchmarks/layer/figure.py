"""The figure of a layer's record: bars for chosen shapes, curves for the growth preset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from moevision.train.plots import BLUE, GREEN, INK, OKABE_ITO, ORANGE, SOFT, calm, save, title

DENSE = "dense k·H"
CENTRE = {"experts": 8, "tokens": 16384, "width": 192}
Json = Mapping[str, Any]


def draw(record: Json, out: Path) -> None:
    """Write it as PNG."""
    save(_growth(record) if record["settings"]["preset"] == "growth" else _bars(record), out)


def _ratios(comparison: Json) -> dict[str, Json]:
    """Time ÷ dense of everything but the dense MLPs, by name."""
    rows = [
        row
        for row in comparison["rows"]
        if "ratio_to" in row and not row["name"].startswith("dense")
    ]
    return {row["name"]: row["ratio_to"][DENSE] for row in rows}


def _bars(record: Json) -> Figure:
    """One panel per shape, a horizontal bar per candidate with its quartiles."""
    comparisons: Sequence[Json] = record["comparisons"]
    columns = min(3, len(comparisons))
    lines = -(-len(comparisons) // columns)
    tallest = max(len(_ratios(comparison)) for comparison in comparisons)
    figure = Figure(
        figsize=(1.8 + 3.6 * columns, lines * (1.2 + 0.26 * tallest)), dpi=150, layout="constrained"
    )
    for place, comparison in enumerate(comparisons, start=1):
        axes = figure.add_subplot(lines, columns, place)
        ratios = _ratios(comparison)
        _draw_bars(axes, ratios)
        if (place - 1) % columns and list(ratios) == list(_ratios(comparisons[place - 2])):
            axes.set_yticklabels([])
        title(
            axes,
            "T {tokens:,}, D {width}, E {experts}, k {top_k}, {precision}".format(**comparison),
        )
        if place > len(comparisons) - columns:
            axes.set_xlabel(
                "forward + backward time ÷ dense MLP of equal active FLOPs", fontsize=8, color=SOFT
            )
    return figure


def _draw_bars(axes: Axes, ratios: Mapping[str, Json]) -> None:
    calm(axes)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#e8e8e8", linewidth=0.8)
    longest = max((ratio["quartile_3"] for ratio in ratios.values()), default=1.0)
    for place, (name, ratio) in enumerate(ratios.items()):
        middle, end = ratio["median"], max(ratio["median"], ratio["quartile_3"])
        axes.barh(
            place,
            middle,
            height=0.62,
            color=BLUE if name.startswith("moevision") else "#B9C2CC",
            zorder=2,
        )
        axes.plot(
            [ratio["quartile_1"], ratio["quartile_3"]],
            [place, place],
            color=INK,
            linewidth=1.2,
            zorder=3,
        )
        axes.text(end + 0.02 * longest, place, f"{middle:.2f}", va="center", fontsize=8, color=INK)
    axes.axvline(1.0, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    axes.set_yticks(range(len(ratios)), list(ratios), fontsize=8)
    axes.set_ylim(len(ratios) - 0.4, -0.6)
    axes.set_xlim(0, 1.14 * max(1.0, longest))
    axes.xaxis.set_major_locator(MaxNLocator(4))


def _growth(record: Json) -> Figure:
    """Ratio against experts, tokens and width, one size at a time."""
    figure = Figure(figsize=(11.4, 3.5), dpi=150, layout="constrained")
    sweeps = (
        ("experts", "experts E", (1, 2)),
        ("tokens", "tokens T", (2,)),
        ("width", "width D", (2,)),
    )
    for place, (key, label, choices) in enumerate(sweeps, start=1):
        axes = figure.add_subplot(1, 3, place, sharey=figure.axes[0] if figure.axes else None)
        calm(axes)
        lines = sweep(record, key, choices)
        for number, (name, points) in enumerate(lines.items()):
            colour = (BLUE, ORANGE, GREEN, *OKABE_ITO[3:])[number % 7]
            xs, ratios = zip(*sorted(points.items()), strict=True)
            low, middle, high = (
                [ratio[end] for ratio in ratios] for end in ("quartile_1", "median", "quartile_3")
            )
            axes.plot(xs, middle, color=colour, marker="o", markersize=4, linewidth=1.8, label=name)
            axes.fill_between(xs, low, high, color=colour, alpha=0.16, linewidth=0)
        _log_axis(axes, sorted({x for points in lines.values() for x in points}))
        axes.axhline(1.0, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(label, fontsize=9, color=INK)
        fixed = {"experts": "E = 8", "tokens": "T = 16 384", "width": "D = 192"}
        note = ", ".join(
            [text for other, text in fixed.items() if other != key]
            + record["settings"]["precision"][:1]
        )
        title(axes, f"time ÷ dense against {label.split()[0]}", f"{note}; band: quartiles")
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def sweep(record: Json, key: str, choices: Sequence[int]) -> dict[str, dict[int, Json]]:
    """Ratios by line name and size, at the other sizes of the centre."""
    lines: dict[str, dict[int, Json]] = {}
    for comparison in record["comparisons"]:
        at_centre = all(
            comparison[other] == value for other, value in CENTRE.items() if other != key
        )
        precision = comparison["precision"] == record["settings"]["precision"][0]
        if at_centre and precision and comparison["top_k"] in choices:
            for name, ratio in _ratios(comparison).items():
                line = f"{name.removeprefix('moevision ')}, k = {comparison['top_k']}"
                lines.setdefault(line, {})[comparison[key]] = ratio
    return lines


def _log_axis(axes: Axes, ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1024:.0f}k" if value >= 1024 else f"{value:g}")
    )
