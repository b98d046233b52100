"""The figure of one patch's path through the MoE layers.

A picture and its trace in, a matplotlib Figure out.
Axes: P patches (row-major in a grid of rows x columns), K choices, E experts, L MoE layers, S pixels of a side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moevision.analysis.figures.picture import verdict_on
from moevision.analysis.figures.style import (
    GRID,
    INK,
    PAGE_INCHES,
    SMALL,
    SOFT,
    bare,
    calm,
    heading,
    new_figure,
    panel_title,
)
from moevision.analysis.palette import EXPERT_COLOURS, expert_colour, ink_on
from moevision.errors import UserError

if TYPE_CHECKING:
    from moevision.analysis.trace import LayerTrace, RoutingTrace

Picture = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
_PER_ROW = 4  # panels side by side


def plot_path(picture: Picture, trace: RoutingTrace, image: int, patch: int) -> Figure:
    """The path of one patch through the MoE layers: all K choices and the whole router distribution.

    Args:
        picture: uint8 [S, S, 3], the image as the model saw it.
        trace: routing of one or more images.
        image: which of them is `picture`.
        patch: index of the patch, row-major.
    """
    rows, columns = trace.grid
    if not 0 <= patch < rows * columns:
        raise UserError(
            f"There is no patch {patch}: the {rows} x {columns} grid has patches 0 to {rows * columns - 1}."
        )
    experts = max(layer.num_experts for layer in trace.layers)
    height = float(np.clip(0.24 * experts, 1.9, 6.5))
    figure = new_figure(PAGE_INCHES * (0.7 if len(trace.layers) <= 4 else 1), height)
    left, right = figure.subplots(1, 2, width_ratios=(1.75, figure.get_size_inches()[0] - 1.75))
    left.imshow(picture, extent=(-0.5, columns - 0.5, rows - 0.5, -0.5))
    for width, colour in ((3.0, "white"), (1.3, INK)):
        left.add_patch(
            Rectangle((patch % columns - 0.5, patch // columns - 0.5), 1, 1, fill=False, ec=colour, lw=width)
        )
    bare(left)
    left.set_anchor("N")
    panel_title(left, f"row {patch // columns + 1}, column {patch % columns + 1}")
    _draw_path(right, trace, image, patch, experts)
    soft = any(layer.kind == "soft" for layer in trace.layers)
    lines = "the largest of each layer" if soft else "first choices, thin ones the others"
    note = (
        f"Discs: {'experts' if soft else 'chosen experts'} and their gate weights; the thick line joins {lines}. "
        "Grey dots: router probability (area). Equal numbers in two layers are unrelated experts."
    )
    heading(figure, f"The path of one patch: {verdict_on(trace, image)}", note)
    return figure


def _draw_path(axes: Axes, trace: RoutingTrace, image: int, patch: int, experts: int) -> None:
    calm(axes, "both")
    x = np.arange(len(trace.layers))
    dense = experts > 24
    for place, layer in enumerate(trace.layers):
        probs = np.asarray(layer.probs[image, patch], dtype=np.float64)
        axes.scatter(np.full(len(probs), place), np.arange(len(probs)), s=60 * probs + 1.5, color="#B9BEC4", zorder=2)
    for choice in reversed(range(max(layer.top_k for layer in trace.layers))):
        there = [place for place, layer in enumerate(trace.layers) if _is_drawn(layer, image, patch, choice)]
        at = {place: int(trace.layers[place].expert_index[image, patch, choice]) for place in there}
        if choice == 0 or not any(layer.kind == "soft" for layer in trace.layers):
            line = [at.get(place, np.nan) for place in range(len(x))]  # interrupted where a layer has no such choice
            axes.plot(x, line, color=INK if choice == 0 else "#9AA0A6", linewidth=1.8 if choice == 0 else 0.8, zorder=3)
        for place, expert in at.items():
            layer = trace.layers[place]
            lit = expert if choice == 0 and layer.num_experts > len(EXPERT_COLOURS) else None
            weight = float(layer.combine_weight[image, patch, choice])
            colour, kept = expert_colour(expert, layer.num_experts, lit), bool(layer.kept[image, patch, choice])
            size = (5.0 if dense else 8.0) + (3.0 if dense else 6.0) * weight
            axes.plot(place, expert, "o", markersize=size, color=colour if kept else "white", zorder=4,
                      markeredgecolor="white" if kept else INK, markeredgewidth=0.8)  # fmt: skip
            axes.text(place, expert, str(expert), ha="center", va="center_baseline", zorder=5,
                      fontsize=SMALL - (2.5 if dense else 0), color=ink_on(colour) if kept else INK)  # fmt: skip
            label = f"{weight:.2f}" if kept else "dropped"
            axes.annotate(label, (place, expert), (size / 2 + 1.5, 0), textcoords="offset points", va="center",
                          fontsize=SMALL - 0.5, color=INK if choice == 0 else SOFT, zorder=4,
                          bbox={"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none"})  # fmt: skip
    for place, layer in enumerate(trace.layers):
        if layer.kind == "expert_choice" and not layer.kept[image, patch].any():
            axes.text(place, (layer.num_experts - 1) / 2, "no expert", rotation=90, ha="center", va="center",
                      fontsize=SMALL, color=SOFT, zorder=4,
                      bbox={"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none"})  # fmt: skip
    axes.set(xlim=(-0.35, len(x) - 0.45), ylim=(experts - 0.4, -0.6))
    axes.set_xticks(x, [layer.name for layer in trace.layers])
    axes.set_yticks(range(0, experts, 1 if experts <= 16 else 4))
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_ylabel("expert", fontsize=SMALL, color=SOFT)
    axes.set_xlabel("MoE layer, from shallow to deep", fontsize=SMALL, color=SOFT)


def _is_drawn(layer: LayerTrace, image: int, patch: int, choice: int) -> bool:
    """Whether the layer has such a choice: one that capacity dropped counts, an expert that took nothing doesn't."""
    return choice < layer.top_k and (layer.kind != "expert_choice" or bool(layer.kept[image, patch, choice]))
