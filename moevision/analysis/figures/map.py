"""Heatmaps of expert use: by class, by drawn part, by position in the picture.

Arrays in, a matplotlib Figure out.
Axes: C classes (or parts), E experts, P patches (row-major in a grid of rows x columns).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from moevision.analysis.figures.style import (
    AMOUNT,
    BELOW_ABOVE,
    BLANK,
    COLUMN_INCHES,
    INK,
    PAGE_INCHES,
    SMALL,
    SOFT,
    bare,
    colour_bar,
    expert_chips,
    heading,
    hex_of,
    new_figure,
    percent,
)
from moevision.analysis.palette import expert_colour, ink_on
from moevision.errors import UserError
from moevision.layers.routing import Kind as RoutingKind

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
_NUMBERED = 16  # experts: up to here every cell carries its number
_LONGEST_NAME = 20


def plot_class_experts(
    share: npt.ArrayLike,
    significant: npt.ArrayLike,
    class_names: Sequence[str],
    *,
    layer_name: str,
    excess: npt.ArrayLike | None = None,
    max_classes: int = 25,
    threshold: float | None = None,
    kind: RoutingKind = "token_choice",
) -> Figure:
    """Class × expert heatmap of one layer: shares in the cells, colour only where a cell stands above the null.

    Classes are grouped by the expert that they use most above the mean, so that a pattern shows as a diagonal.

    Args:
        share: [C, E] share of a class's choices that falls on each expert; rows sum to 1. A row of NaN, a class
            without images, is left out.
        significant: [C, E] bool, which cells stand above the null.
        class_names: [C] in words.
        layer_name: such as "L4".
        excess: [C, E] share minus what it is compared with; by default minus the mean over classes.
        max_classes: of more classes, those with the largest effect are shown.
        threshold: the smallest |excess| that counts as significant, to be stated.
        kind: who chooses in the layer: where tokens don't, shares are of the weight that patches take.
    """
    shares, flags, above, names = _class_arrays(share, significant, excess, class_names)
    classes = len(shares)
    # Classes with a significant cell come first, larger effects before smaller ones.
    effect = np.abs(above).max(1) + np.where(flags, np.abs(above), 0).max(1)
    kept = np.sort(np.argsort(-effect, kind="stable")[:max_classes])
    best = above[kept].argmax(1)
    order = kept[np.lexsort((-above[kept].max(1), best))]
    figure = _share_map(shares[order], above[order], flags[order], [names[row] for row in order])
    shown = "" if classes <= max_classes else f" {len(order)} of {classes} classes, those with the largest effect."
    limit = "" if threshold is None else f" by {100 * threshold:.1f} points or more"
    what = "choices" if kind == "token_choice" else "weights"
    cells = (
        f"Cells: share of the class's {what} (%)." if shares.shape[1] <= _NUMBERED else f"Share of a class's {what}."
    )
    if flags.any():
        note = (
            f"{cells} Coloured: differs from the mean{limit}, more than chance "
            f"over images gives in any cell ({int(flags.sum())} of {flags.size} cells).{shown}"
        )
    else:
        note = (
            f"{cells} No cell stands above chance over images, "
            f"so none is coloured: no class was found to use an expert more than others do.{shown}"
        )
    heading(figure, f"{layer_name}: which classes use which expert", note)
    return figure


def plot_part_experts(
    table: npt.ArrayLike,
    part_names: Sequence[str],
    *,
    layer_name: str,
    significant: npt.ArrayLike | None = None,
    kind: RoutingKind = "token_choice",
) -> Figure:
    """Part × expert heatmap of one layer: where the patches of each part of a picture go.

    Args:
        table: [parts, E] from `part_expert_table`: patches of each part that went to each expert.
        part_names: in words; parts that don't occur are left out.
        layer_name: such as "L4".
        significant: [parts, E] bool; without it every cell is coloured and the figure says that nothing is tested.
        kind: who chooses in the layer: where tokens don't, the table counts what experts read.
    """
    counts = np.asarray(table, dtype=np.float64)
    if counts.ndim != 2 or len(counts) != len(part_names) or counts.sum() <= 0:
        raise UserError(
            f"A part map needs counts [parts, experts] with a name each; {counts.shape}, {len(part_names)}."
        )
    area = counts.sum(1) / counts.sum()
    order = np.argsort(-area, kind="stable")
    order = order[area[order] > 0]
    shares = counts[order] / counts[order].sum(1, keepdims=True)
    above = shares - counts.sum(0) / counts.sum()
    flags = np.ones_like(shares, dtype=bool) if significant is None else np.asarray(significant, dtype=bool)[order]
    names = [f"{part_names[part]} ({_percent(area[part])})" for part in order]
    figure = _share_map(shares, above, flags, names)
    tested = "Nothing is tested here." if significant is None else "Grey cells don't stand above the null."
    of, bracket = ("the part's area", "the part's area")
    if kind != "token_choice":
        of, bracket = "what experts read of the part", "the part's share of all that they read"
    note = f"Cells: share of {of} (%); colour: against all patches. In brackets: {bracket}. {tested}"
    heading(figure, f"{layer_name}: which parts go to which expert", note)
    return figure


def plot_positions(
    share: npt.ArrayLike, grid: tuple[int, int], *, layer_name: str, kind: RoutingKind = "token_choice"
) -> Figure:
    """Position × expert: one small map of the grid per expert, all on one scale.

    Args:
        share: [E, P] from `position_share`: share of the choices at each position that falls on the expert.
        grid: (rows, columns) of patches.
        layer_name: such as "L4".
        kind: who chooses in the layer.
    """
    shares = np.asarray(share, dtype=np.float64)
    if shares.ndim != 2 or shares.shape[1] != grid[0] * grid[1]:
        raise UserError(f"Position maps need shares [experts, patches] of the grid {grid}; got {shares.shape}.")
    experts = len(shares)
    columns = min(experts, 4 if experts <= 8 else 8)
    rows = -(-experts // columns)
    width = COLUMN_INCHES if columns <= 4 else PAGE_INCHES
    side = (width - 0.7) / columns
    figure = new_figure(width, rows * (side * grid[0] / grid[1] + 0.22))
    panels = figure.subplots(rows, columns, squeeze=False)
    norm = Normalize(0, max(float(shares.max()), 2 / experts))
    for expert, axes in enumerate(panels.flat):
        bare(axes)
        if expert >= experts:
            axes.set_visible(False)
            continue
        axes.imshow(shares[expert].reshape(grid), cmap=AMOUNT, norm=norm, interpolation="nearest")
        colour = expert_colour(expert, experts)
        axes.set_title(str(expert), fontsize=SMALL, color=ink_on(colour), pad=4,
                       bbox={"boxstyle": "round,pad=0.2", "facecolor": colour, "edgecolor": "none"})  # fmt: skip
    scale = ScalarMappable(norm, AMOUNT)
    scale.set_array([])
    what = {"soft": "reading done there", "expert_choice": "takings made there"}.get(kind, "choices made there")
    bar = colour_bar(list(panels.flat), scale, f"share of the {what}", FuncFormatter(percent))
    bar.ax.axhline(1 / experts, color=INK, linewidth=1.2)
    note = (
        f"One map of the picture per expert, one scale for all: {shares.min():.1%} to {shares.max():.1%}. "
        f"Line in the bar: equal use, {1 / experts:.1%}."
    )
    heading(figure, f"{layer_name}: where in the picture each expert works", note)
    return figure


def _share_map(shares: Floats, above: Floats, flags: Flags, names: Sequence[str]) -> Figure:
    """Rows x experts: shares written in the cells, the excess as colour where flagged, grey elsewhere."""
    rows, experts = shares.shape
    label = 0.075 * min(max(len(name) for name in names), _LONGEST_NAME + 8) + 0.1
    cell = 0.29 if experts <= _NUMBERED else 0.1
    figure = new_figure(
        float(np.clip(label + cell * experts + 0.85, COLUMN_INCHES, 12.0)), max(1.0, 0.19 * rows + 0.55)
    )
    axes = figure.add_subplot()
    axes.set_facecolor(BLANK)
    reach = max(0.01, float(np.abs(np.where(flags, above, 0)).max()))
    norm = TwoSlopeNorm(0, -reach, reach)
    picture = axes.imshow(np.ma.masked_where(~flags, above), cmap=BELOW_ABOVE, norm=norm, aspect="auto")
    _rule_cells(axes, rows, experts)
    if experts <= _NUMBERED:
        digits = 1 if float(np.ptp(shares)) < 0.03 else 0  # whole numbers would all be the same
        for row, column in np.ndindex(rows, experts):
            colour = hex_of(BELOW_ABOVE(norm(above[row, column]))) if flags[row, column] else BLANK
            ink = ink_on(colour) if flags[row, column] else SOFT
            text = f"{100 * shares[row, column]:.{digits}f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=SMALL, color=ink)
    axes.set_yticks(range(rows), [_short(name) for name in names], parse_math=False)
    axes.tick_params(length=0, labelsize=SMALL, labelcolor=INK)
    expert_chips(axes, experts)
    if flags.any():
        colour_bar(axes, picture, "difference (points)", FuncFormatter(_points))
    return figure


def _rule_cells(axes: Axes, rows: int, columns: int) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.vlines(np.arange(columns - 1) + 0.5, -0.5, rows - 0.5, color="white", linewidth=0.8)
    axes.hlines(np.arange(rows - 1) + 0.5, -0.5, columns - 0.5, color="white", linewidth=0.8)


def _class_arrays(
    share: npt.ArrayLike, significant: npt.ArrayLike, excess: npt.ArrayLike | None, names: Sequence[str]
) -> tuple[Floats, Flags, Floats, list[str]]:
    """Shares, flags, excess and names of the classes that have images (the others have no share to compare)."""
    shares, flags = np.asarray(share, dtype=np.float64), np.asarray(significant, dtype=bool)
    above = shares if excess is None else np.asarray(excess, dtype=np.float64)
    if shares.ndim != 2 or flags.shape != shares.shape or above.shape != shares.shape or len(names) != len(shares):
        raise UserError(
            f"A class map needs shares, flags and excess [classes, experts] and a name per class; "
            f"got {shares.shape}, {flags.shape}, {above.shape} and {len(names)} names."
        )
    known: Flags = np.asarray(np.isfinite(shares).all(axis=1))
    if not known.any():
        raise UserError("No class has an image, so there is no share to draw; give images whose class is known.")
    shares, above = shares[known], above[known]
    kept_names = [name for name, there in zip(names, known, strict=True) if there]
    return shares, flags[known], above - shares.mean(0) if excess is None else above, kept_names


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}" if share >= 0.001 else "<0.1%"


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME + 8 else name[: _LONGEST_NAME + 7] + "…"


def _points(share: float, _position: int | None = None) -> str:
    """A colour bar's label: a difference of shares in percentage points, with a true minus sign."""
    return f"{100 * share:+.3g}".replace("-", "−") if share else "0"
