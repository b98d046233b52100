"""The figure of a layer's record: a bar for each candidate, a panel for each shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moevision.train.plots import BLUE, INK, SOFT, save, style_axes, title

DENSE = "dense k·H"
Json = Mapping[str, Any]


def draw(record: Json, out: Path) -> None:
    """Write one panel per shape as PNG, a horizontal bar per candidate with its quartiles."""
    comparisons: Sequence[Json] = record["comparisons"]
    columns = min(3, len(comparisons))
    lines = -(-len(comparisons) // columns)
    tallest = max(len(_ratios(comparison)) for comparison in comparisons)
    size = (1.8 + 3.6 * columns, lines * (1.2 + 0.26 * tallest))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    for place, comparison in enumerate(comparisons, start=1):
        axes = figure.add_subplot(lines, columns, place)
        ratios = _ratios(comparison)
        _draw_bars(axes, ratios)
        if (place - 1) % columns and list(ratios) == list(_ratios(comparisons[place - 2])):
            axes.set_yticklabels([])
        shape = "T {tokens:,}, D {width}, E {experts}, k {top_k}, {precision}"
        title(axes, shape.format(**comparison))
        if place > len(comparisons) - columns:
            label = "forward + backward time ÷ dense MLP of equal active FLOPs"
            axes.set_xlabel(label, fontsize=8, color=SOFT)
    save(figure, out)


def _ratios(comparison: Json) -> dict[str, Json]:
    """Time ÷ dense of everything but the dense MLPs, by name."""
    rows = [
        row
        for row in comparison["rows"]
        if "ratio_to" in row and not row["name"].startswith("dense")
    ]
    return {row["name"]: row["ratio_to"][DENSE] for row in rows}


def _draw_bars(axes: Axes, ratios: Mapping[str, Json]) -> None:
    style_axes(axes)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#e8e8e8", linewidth=0.8)
    longest = max((ratio["quartile_3"] for ratio in ratios.values()), default=1.0)
    for place, (name, ratio) in enumerate(ratios.items()):
        low, middle, high = (ratio[name] for name in ("quartile_1", "median", "quartile_3"))
        color = BLUE if name.startswith("moevision") else "#B9C2CC"
        axes.barh(place, middle, height=0.62, color=color, zorder=2)
        axes.plot([low, high], [place, place], color=INK, linewidth=1.2, zorder=3)
        end = max(middle, high)
        axes.text(end + 0.02 * longest, place, f"{middle:.2f}", va="center", fontsize=8, color=INK)
    axes.axvline(1.0, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    axes.set_yticks(range(len(ratios)), list(ratios), fontsize=8)
    axes.set_ylim(len(ratios) - 0.4, -0.6)
    axes.set_xlim(0, 1.14 * max(1.0, longest))
    axes.xaxis.set_major_locator(MaxNLocator(4))
