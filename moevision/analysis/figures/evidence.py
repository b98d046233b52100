"""Specialization against everything that it has to beat: chance, an untrained model, hash routing, colour clusters.

The numbers come from `specialization.py`; nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from moevision.analysis.figures.style import INK, PAGE_INCHES, SMALL, SOFT, calm, heading, new_figure, panel_title
from moevision.errors import UserError

_ABOUT = {
    "class": "expert ↔ class",
    "position": "expert ↔ position",
    "class_given_position": "expert ↔ class, given position",
    "part": "expert ↔ drawn part",
}
# Marker and colour of each comparison; shape and colour both tell them apart.
_BASELINES = {
    "untrained": ("untrained model", "o", "#7A7A7A"),
    "hash": ("hash of the patch", "x", "#000000"),
    "hash_position": ("hash of the position", "+", "#000000"),
    "kmeans_colour": ("k-means on colour", "s", "#D55E00"),
    "kmeans_input": ("k-means on the layer's input", "^", "#009E73"),
}
_TRAINED, _NULL = "#0072B2", "#DADDE1"


class _Result(Protocol):
    """`specialization.LayerSpecialization`, of which only the JSON form is read."""

    def to_json(self) -> Mapping[str, Any]: ...


Row = Mapping[str, Any]


def plot_specialization(results: Sequence[_Result | Row]) -> Figure:
    """Excess mutual information of each layer with its interval, beside null, baselines and other training seeds.

    One panel for each of class, position, class given position and part that occurs, one row per layer.

    Args:
        results: of `specialization.specialization`, in any order, or their JSON form as a report or atlas holds it.
    """
    table: list[Row] = [result if isinstance(result, Mapping) else result.to_json() for result in results]
    abouts = _in_order(_ABOUT, (row["about"] for row in table))
    if not abouts:
        raise UserError("There is no specialization to draw: give the results of moevision.analysis.specialization.")
    columns = min(2, len(abouts))
    rows = -(-len(abouts) // columns)
    names = _in_order(_BASELINES, (name for row in table for name in row["baselines"]))
    layers = sorted({int(row["layer"]) for row in table})
    height = 0.45 + len(layers) * (0.3 + 0.065 * len(names))
    figure = new_figure(PAGE_INCHES * (0.62 if columns == 1 else 1), rows * height + 0.4)
    for place, about in enumerate(abouts, start=1):
        axes = figure.add_subplot(rows, columns, place)
        _draw_panel(axes, [row for row in table if row["about"] == about], layers, names)
        panel_title(axes, _ABOUT.get(about, about))
        if place > len(abouts) - columns:
            axes.set_xlabel("excess mutual information (bits)", fontsize=SMALL, color=SOFT)
    handles = _legend_handles(names, any(row["seeds"] for row in table))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=2 * columns, fontsize=SMALL, frameon=False, labelcolor=INK
    )
    images = sorted({int(row["n_images"]) for row in table})
    note = (
        f"Held-out images: {' / '.join(f'{count:,}' for count in images)}. Zero is what labels permuted over images "
        "give. “Learned”: above chance and every comparison, in every training."
    )
    heading(figure, "What the experts know beyond chance, and what gets there without learning", note)
    return figure


def _in_order(known: Mapping[str, object], found: Iterable[str]) -> list[str]:
    """The names found, each once: known ones in the order of this file, then any others, so that none is lost."""
    names = dict.fromkeys(found)
    return [*(name for name in known if name in names), *(name for name in names if name not in known)]


def _other(name: str) -> tuple[str, str, str]:
    """Words, marker and colour of a comparison that this file doesn't know."""
    return name, "v", "#CC79A7"


def _draw_panel(axes: Axes, table: Sequence[Row], layers: Sequence[int], names: Sequence[str]) -> None:
    """One row per layer: the trained model and other seeds on the upper lane, each comparison on one below."""
    calm(axes, "x")
    lanes = np.linspace(-0.28, 0.32, 1 + len(names)) if names else np.zeros(1)
    # One comparison far off (a hash of the position tells all about it) must not squeeze the rest: it goes to the edge,
    # with the largest of its values, which is the one that sentence and table tell.
    edge = 2.5 * max(max(row["high"], row["value_bits"], *row["seeds"]) for row in table)
    for row in table:
        place, learned, seeds = layers.index(int(row["layer"])), bool(row["verdict"]), list(row["seeds"])
        y, reach = place + lanes[0], 1.96 * row["null_sd"]
        axes.add_patch(Rectangle((-reach, place - 0.42), 2 * reach, 0.84, facecolor=_NULL, edgecolor="none", zorder=1))
        axes.plot(seeds, [y] * len(seeds), "D", markersize=4, color="white", markeredgecolor=_TRAINED,
                  markeredgewidth=0.9, zorder=4)  # fmt: skip
        axes.plot([row["low"], row["high"]], [y, y], color=_TRAINED, linewidth=1.6, solid_capstyle="butt", zorder=3)
        axes.plot([row["value_bits"]], [y], "D", markersize=5.5, color=_TRAINED, zorder=5)
        for lane, name in zip(lanes[1:], names, strict=True):
            values = [float(value) for value in row["baselines"].get(name, ())]
            _, marker, colour = _BASELINES.get(name, _other(name))
            far = [value for value in values if value > edge > 0]
            near = [value for value in values if value not in far] + [edge] * bool(far)
            axes.plot(near, [place + lane] * len(near), marker, markersize=3.6, color=colour, alpha=0.85,
                      markeredgewidth=1.0 if marker in "x+" else 0.0, linestyle="none", zorder=4)  # fmt: skip
            if far:
                axes.annotate(f"{max(far):.2f} →", (edge, place + lane), (-4, 0), textcoords="offset points",
                              ha="right", va="center", fontsize=SMALL - 0.5, color=colour)  # fmt: skip
        axes.annotate(
            f"{row['value_bits']:.3f} bits\n{'learned' if learned else 'learned: not shown'}".replace("-", "−"),
            (1.0, place), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
            fontsize=SMALL, color=INK if learned else SOFT, fontweight="bold" if learned else "normal", linespacing=1.3,
        )  # fmt: skip
    axes.axvline(0, color="#9AA0A6", linewidth=0.8, zorder=2)
    axes.set(ylim=(len(layers) - 0.5, -0.5))
    axes.set_yticks(range(len(layers)), [f"L{layer}" for layer in layers])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, -0.03 * (right - left)), right + 0.03 * (right - left))


def _legend_handles(names: Sequence[str], with_seeds: bool) -> list[Line2D | Patch]:
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=_TRAINED, marker="D", markersize=5, linewidth=1.6, label="trained, 95 % interval")
    ]
    if with_seeds:
        handles.append(Line2D([], [], color="white", marker="D", markersize=4, markeredgecolor=_TRAINED,
                              linestyle="none", label="other training seeds"))  # fmt: skip
    handles.append(Patch(facecolor=_NULL, label="chance, 95 % of permutations"))
    for name in names:
        label, marker, colour = _BASELINES.get(name, _other(name))
        handles.append(Line2D([], [], color=colour, marker=marker, markersize=4, linestyle="none", label=label))
    return handles
