"""Figures of numbers: load, gate weights, co-activation, maps by class, part and place, specialization, effects.

Arrays in, a matplotlib Figure out. Nothing is decided here: statistics come from `specialization.py` and `describe.py`.
Axes: L MoE layers, C classes (or parts), E experts, K choices, P patches (row-major in a grid of rows x columns),
Q quantiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moevision.analysis.describe import QUANTILES, expected_co_activation
from moevision.analysis.palette import EXPERT_COLOURS
from moevision.analysis.plots.style import (
    AMOUNT,
    BELOW_ABOVE,
    BLANK,
    COLUMN_INCHES,
    INK,
    PAGE_INCHES,
    RULE,
    SMALL,
    SOFT,
    bare,
    calm,
    colour_bar,
    expert_chips,
    expert_colour,
    expert_colours,
    heading,
    hex_of,
    ink_on,
    new_figure,
    panel_title,
    percent,
)
from moevision.analysis.readings import Load
from moevision.errors import UserError
from moevision.layers.routing import Kind as RoutingKind

Ints = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Row = Mapping[str, Any]
_NUMBERED = 16  # experts: up to here every bar and cell carries its number
_RANKS = 4  # choices whose weights are drawn; Soft MoE has as many as experts
_LONGEST_NAME = 20
_NOBODY = "#D55E00"
_CONTROL = "#9AA0A6"
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


def plot_load(
    counts: Sequence[npt.ArrayLike],
    layer_names: Sequence[str],
    *,
    requested: Sequence[npt.ArrayLike] | None = None,
    kinds: Sequence[RoutingKind] | None = None,
) -> Figure:
    """Load bars, one panel per MoE layer, with the ideal line and how much busier the busiest expert is.

    Args:
        counts: per layer [E] choices that each expert computed, over all images (Soft MoE: weight that patches took).
        layer_names: [L] such as "L4".
        requested: per layer [E] choices that fell on it before capacity; what was dropped stands hollow on top.
        kinds: who chooses in each layer; tokens if None.

    Raises:
        UserError: shapes that don't fit, or a layer without any choice.
    """
    loads = [np.asarray(load, dtype=np.float64) for load in counts]
    wanted = loads if requested is None else [np.asarray(load, dtype=np.float64) for load in requested]
    kinds = kinds or ["token_choice"] * len(loads)
    shapes = [load.shape for load in loads]
    if (
        not len(loads) == len(layer_names) == len(kinds)
        or [w.shape for w in wanted] != shapes
        or {load.ndim for load in loads} != {1}
    ):
        raise UserError(f"Load bars need counts [layers, experts]; got {shapes} for {len(layer_names)} layers.")
    if any(load.sum() <= 0 for load in (*loads, *wanted)):
        raise UserError("A layer without a single choice has no load to draw; give counts of at least one image.")
    layers, experts = len(loads), max(len(load) for load in loads)
    columns = min(layers, 2 if experts > 8 else 4)
    rows = -(-layers // columns)
    figure = new_figure(COLUMN_INCHES if columns == 1 and experts <= 8 else PAGE_INCHES, 0.25 + 1.5 * rows)
    highest = max(float((each / each.sum()).max()) for each in wanted)
    for place, (name, load, kind) in enumerate(zip(layer_names, loads, kinds, strict=True)):
        axes = figure.add_subplot(rows, columns, place + 1)
        _draw_load(axes, load, wanted[place], highest)
        ratio = "largest ÷ mean" if kind == "soft" else "slowest ÷ mean"
        panel_title(axes, name, f"{ratio} {load.max() / load.mean():.2f}")
        if place % columns == 0:
            axes.set_ylabel("share of weight" if kind == "soft" else "share of choices", fontsize=SMALL, color=SOFT)
        if place >= layers - columns:
            axes.set_xlabel("expert", fontsize=SMALL, color=SOFT)
    heading(figure, "How busy each expert is" if set(kinds) != {"soft"} else "How much comes from each expert",
            _load_note([len(load) for load in loads], set(kinds), requested is not None))  # fmt: skip
    return figure


def _load_note(experts: Sequence[int], kinds: set[RoutingKind], dropped: bool) -> str:
    """How to read the bars."""
    equal = f", 1 ÷ {experts[0]} = {1 / experts[0]:.1%}" if len(set(experts)) == 1 else ""
    words = [f"Dashed: equal load{equal}. Expert numbers of two layers are unrelated."]
    if dropped:
        words.append("Hollow: dropped by capacity.")
    if "expert_choice" in kinds:
        words.append("Where experts choose, all take as many tokens of every image.")
    if "soft" in kinds:
        words.append("Soft MoE: all compute as many slots; bars show the weight that patches take from each.")
    return " ".join(words)


def _draw_load(axes: Axes, load: npt.NDArray[np.float64], wanted: npt.NDArray[np.float64], highest: float) -> None:
    experts, total = len(load), wanted.sum()
    calm(axes)
    colours = expert_colours(experts)
    axes.bar(range(experts), wanted / total, 0.78, color="none", edgecolor=SOFT, linewidth=0.5 * (wanted > load))
    axes.bar(range(experts), load / total, 0.78, color=colours)
    axes.axhline(1 / experts, color=INK, linewidth=0.9, linestyle=(0, (4, 2.5)))
    axes.set(ylim=(0, max(1.18 * highest, 1.4 / experts)), xlim=(-0.6, experts - 0.4))
    axes.yaxis.set_major_formatter(FuncFormatter(percent))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.set_xticks(range(0, experts, 1 if experts <= _NUMBERED else 4))
    if experts > _NUMBERED:
        return
    for expert, share in enumerate(load / total):
        inside = share > 0.3 / experts  # else the bar is too low for a number, which then stands above it
        text = f"{share:.0%}" if share >= 0.005 or share == 0 else "<1%"
        axes.annotate(text, (expert, 0 if inside else share), (0, 3), textcoords="offset points", ha="center",
                      fontsize=SMALL - 0.5, color=ink_on(colours[expert]) if inside else INK)  # fmt: skip


def plot_gate_weights(quantiles: Sequence[npt.ArrayLike], layer_names: Sequence[str]) -> Figure:
    """Gate weights by depth: per MoE layer the distribution of the weight of the 1st .. Kth choice.

    Args:
        quantiles: per layer [5, K] from `gate_weight_quantiles`; K may differ, nan for a rank that no patch has.
        layer_names: [L] such as "L4", in order of depth.
    """
    values = [np.asarray(layer, dtype=np.float64) for layer in quantiles]
    shapes = [layer.shape for layer in values]
    if len(values) != len(layer_names) or any(len(s) != 2 or s[0] != 5 for s in shapes):
        raise UserError(f"Gate weights need quantiles [layers, 5, choices]; got {shapes}, {len(layer_names)} layers.")
    layers, most = len(values), max(layer.shape[1] for layer in values)
    choices = min(most, _RANKS)
    figure = new_figure(COLUMN_INCHES if layers * choices <= 12 else PAGE_INCHES, 2.1)
    axes = figure.add_subplot()
    calm(axes)
    step = min(0.2, 0.7 / choices)
    for choice in range(choices):
        there = [place for place in range(layers) if choice < values[place].shape[1]]
        there = [place for place in there if np.isfinite(values[place][:, choice]).all()]
        if not there:
            continue
        x = np.array(there) + (choice - (choices - 1) / 2) * step
        low, lower, middle, upper, high = np.stack([values[place][:, choice] for place in there], axis=-1)
        colour = EXPERT_COLOURS[choice % len(EXPERT_COLOURS)]
        axes.vlines(x, low, high, color=colour, linewidth=1.0)
        axes.vlines(x, lower, upper, color=colour, linewidth=4.5, alpha=0.45)
        axes.plot(x, middle, "o", markersize=4, color=colour, markeredgecolor="white", markeredgewidth=0.6,
                  label=_ordinal(choice + 1), zorder=4)  # fmt: skip
        axes.plot(x, middle, "-", color=colour, linewidth=0.8, alpha=0.5)
    highest = max(float(np.nanmax(layer)) for layer in values)
    axes.set(ylim=(0, min(1.05, 1.1 * highest)), xlim=(-0.5, layers - 0.5))
    axes.set_xticks(range(layers), layer_names)
    axes.set_ylabel("gate weight", fontsize=SMALL, color=SOFT)
    axes.set_xlabel("MoE layer, from shallow to deep", fontsize=SMALL, color=SOFT)
    if choices > 1:
        legend = axes.legend(title="choice", fontsize=SMALL, title_fontsize=SMALL, frameon=False, labelcolor=INK,
                             loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.0)  # fmt: skip
        legend.get_title().set_color(INK)
    spans = [f"{QUANTILES[4 - place] - QUANTILES[place]:.0%}" for place in (1, 0)]
    fewer = "" if choices == most else f" The largest {choices} of {most} weights of a patch."
    note = f"Dot: median patch; thick: middle {spans[0]} of patches; thin: middle {spans[1]}.{fewer}"
    heading(figure, "How much weight each choice gets", note)
    return figure


def _ordinal(number: int) -> str:
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number, 'th') }"


def plot_experts_per_patch(counts: Sequence[npt.ArrayLike], layer_names: Sequence[str]) -> Figure:
    """How many experts compute a patch: bars, one panel per MoE layer.

    Args:
        counts: per layer [K + 1] patches that 0, 1, ... K experts compute (`LayerTrace.kept_per_patch`).
        layer_names: [L] such as "L4".
    """
    tables = [np.asarray(count, dtype=np.float64) for count in counts]
    if len(tables) != len(layer_names) or any(table.ndim != 1 or table.sum() <= 0 for table in tables):
        raise UserError(f"Experts per patch need counts [layers, K + 1]; got {[table.shape for table in tables]}.")
    last = max(int(np.flatnonzero(table)[-1]) for table in tables)
    columns = min(len(tables), 4)
    rows = -(-len(tables) // columns)
    figure = new_figure(COLUMN_INCHES if columns == 1 else PAGE_INCHES, 0.25 + 1.5 * rows)
    for place, (table, name) in enumerate(zip(tables, layer_names, strict=True)):
        axes = figure.add_subplot(rows, columns, place + 1)
        calm(axes)
        share = np.pad(table, (0, max(0, last + 1 - len(table))))[: last + 1] / table.sum()
        axes.bar(range(last + 1), share, 0.78, color=[_NOBODY, *[EXPERT_COLOURS[0]] * last])
        for number, height in enumerate(share):
            text = f"{height:.0%}" if height >= 0.005 or height == 0 else "<1%"
            axes.annotate(text, (number, height), (0, 2), textcoords="offset points", ha="center",
                          fontsize=SMALL - 0.5, color=INK)  # fmt: skip
        axes.set(ylim=(0, 1.18 * max(float((t / t.sum()).max()) for t in tables)), xlim=(-0.6, last + 0.6))
        axes.yaxis.set_major_formatter(FuncFormatter(percent))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_xticks(range(0, last + 1, 1 if last < _NUMBERED else 4))
        mean = float((np.arange(len(table)) * table).sum() / table.sum())
        panel_title(axes, name, f"mean {mean:.2f}")
        if place % columns == 0:
            axes.set_ylabel("share of patches", fontsize=SMALL, color=SOFT)
        if place >= len(tables) - columns:
            axes.set_xlabel("experts that compute a patch", fontsize=SMALL, color=SOFT)
    note = "Orange: patches that no expert computes; they pass the layer by the residual path alone."
    heading(figure, "How many experts a patch has", note)
    return figure


def plot_co_activation(counts: Ints, top_k: int | None, *, layer_name: str) -> Figure:
    """Which experts are chosen for the same patch: conditional shares for all pairs, coloured by their excess.

    Args:
        counts: [E, E] from `co_activation`.
        top_k: K of the layer, at least 2; None where experts choose, so that patches have different numbers of them.
        layer_name: such as "L4".
    """
    table = np.asarray(counts, dtype=np.float64)
    experts = len(table)
    if (top_k is not None and top_k < 2) or table.shape != (experts, experts):
        raise UserError(
            f"Co-activation needs counts [E, E] of a layer with at least two choices, not {table.shape}, k = {top_k}."
        )
    chosen = np.diagonal(table)[:, None]
    share = np.divide(table, chosen, out=np.full_like(table, np.nan), where=chosen > 0)
    expected = expected_co_activation(counts)
    with np.errstate(divide="ignore", invalid="ignore"):
        times = np.log2(table / expected)
    np.fill_diagonal(times, np.nan)
    reach = 2.0  # a quarter to four times
    side = float(np.clip(0.29 * experts, 1.7, 6.0))
    figure = new_figure(max(COLUMN_INCHES, side + 1.1), side + 0.45)
    axes = figure.add_subplot()
    norm = TwoSlopeNorm(0, -reach, reach)
    picture = axes.imshow(np.ma.masked_invalid(np.clip(times, -reach, reach)), cmap=BELOW_ABOVE, norm=norm)
    bare(axes)
    expert_chips(axes, experts)
    expert_chips(axes, experts, "left")
    if experts <= _NUMBERED:
        for i, j in zip(*np.nonzero(np.isfinite(times) | (table == 0)), strict=True):
            if i != j and np.isfinite(share[i, j]):
                colour = hex_of(BELOW_ABOVE(norm(np.clip(times[i, j], -reach, reach))))
                axes.text(
                    j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=SMALL, color=ink_on(colour)
                )
    chose = "chose" if top_k else "have"
    axes.set_ylabel(f"of the patches that {chose} ...", fontsize=SMALL, color=SOFT, labelpad=14)
    axes.set_xlabel(f"... the share that also {chose} ... (%)", fontsize=SMALL, color=SOFT)
    bar = colour_bar(axes, picture, "share ÷ share that the loads alone give", FuncFormatter(_times))
    bar.set_ticks(list(range(-int(reach), int(reach) + 1)))
    note = "All pairs of experts that took the same patch; colour allows for how often each is in a pair."
    if top_k:
        note = (
            f"All pairs of the {top_k} choices. Were all pairs as frequent, every cell would be "
            f"{(top_k - 1) / (experts - 1):.1%}; colour allows for unequal loads."
        )
    heading(figure, f"{layer_name}: experts {'chosen' if top_k else 'that take patches'} together", note)
    return figure


def _times(power: float, _position: int | None = None) -> str:
    """A colour bar's label: 2 ** power as a factor."""
    return f"{2.0**power:g}×"


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
    # Without the load two busy experts and two classes look like specialization.
    overall = (shares - above).mean(0)  # [E]
    load = Load(overall / overall.sum(), shares).words
    heading(figure, f"{layer_name}: which classes use which expert", f"{note} Load: {load}.")
    return figure


def plot_part_experts(
    table: npt.ArrayLike,
    part_names: Sequence[str],
    *,
    layer_name: str,
    kind: RoutingKind = "token_choice",
) -> Figure:
    """Part × expert heatmap of one layer: where the patches of each part of an image go.

    Args:
        table: [parts, E] from `part_expert_table`: patches of each part that went to each expert.
        part_names: in words; parts that don't occur are left out.
        layer_name: such as "L4".
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
    names = [f"{part_names[part]} ({_percent(area[part])})" for part in order]
    figure = _share_map(shares, above, np.ones_like(shares, dtype=bool), names)
    of, bracket = ("the part's area", "the part's area")
    if kind != "token_choice":
        of, bracket = "what experts read of the part", "the part's share of all that they read"
    note = f"Cells: share of {of} (%); colour: against all patches. In brackets: {bracket}. Nothing is tested here."
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
    what = {"soft": "reading done there", "expert_choice": "patches taken there"}.get(kind, "choices made there")
    bar = colour_bar(list(panels.flat), scale, f"share of the {what}", FuncFormatter(percent))
    bar.ax.axhline(1 / experts, color=INK, linewidth=1.2)
    note = (
        f"One map of the image per expert, one scale for all: {shares.min():.1%} to {shares.max():.1%}. "
        f"Line in the bar: equal use, {1 / experts:.1%}."
    )
    heading(figure, f"{layer_name}: where in the image each expert works", note)
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


class _Result(Protocol):
    """`specialization.LayerSpecialization`, of which only the JSON form is read."""

    def to_json(self) -> Mapping[str, Any]: ...


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
        _draw_specialization(axes, [row for row in table if row["about"] == about], layers, names)
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
        "give."
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


def _draw_specialization(axes: Axes, table: Sequence[Row], layers: Sequence[int], names: Sequence[str]) -> None:
    """One row per layer: the trained model and other seeds on the upper lane, each comparison on one below."""
    calm(axes, "x")
    lanes = np.linspace(-0.28, 0.32, 1 + len(names)) if names else np.zeros(1)
    # One comparison far off (a hash of the position tells all about it) must not squeeze the rest: it goes to the edge,
    # with the largest of its values, which is the one that sentence and table tell.
    edge = 2.5 * max(max(row["high"], row["value_bits"], *row["seeds"]) for row in table)
    for row in table:
        place, seeds, above = layers.index(int(row["layer"])), list(row["seeds"]), row["above"]
        exceeds, told = bool(above["null"] and above["baselines"]), "not compared"
        if above["baselines"] is not None:
            told = "above all controls" if exceeds else "not above all controls"
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
            f"{row['value_bits']:.3f} bits\n{told}".replace("-", "−"),
            (1.0, place), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
            fontsize=SMALL, color=INK if exceeds else SOFT, fontweight="bold" if exceeds else "normal", linespacing=1.3,
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


def plot_effects(
    deltas: Sequence[npt.ArrayLike],
    controls: Sequence[npt.ArrayLike],
    layer_names: Sequence[str],
    class_names: Sequence[str],
    *,
    what: str,
) -> Figure:
    """Change of the true class's logit without each expert: one small mark per class, a large one for their mean.

    Args:
        deltas: per layer [E, C], mean over images of a class.
        controls: per layer [E, C], the same with as many random choices taken away instead; NaN without a control.
        layer_names: such as "L4".
        class_names: [C]; the one that changes most is named.
        what: the intervention in words, such as "its patches go to their next-best expert".

    Raises:
        UserError: if the arrays don't fit each other.
    """
    effects = [np.asarray(delta, dtype=np.float64) for delta in deltas]
    chance = [np.asarray(control, dtype=np.float64) for control in controls]
    if [array.shape for array in effects] != [array.shape for array in chance] or len(effects) != len(layer_names):
        raise UserError("Effects need one [experts, classes] array per layer, and a control of the same shape each.")
    columns = min(2 if effects[0].shape[0] > 8 else 3, len(effects))
    rows = -(-len(effects) // columns)
    figure = new_figure(PAGE_INCHES, 0.55 + 1.75 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in panels.flat[len(effects) :]:
        axes.set_visible(False)
    for place, (axes, effect, control) in enumerate(zip(panels.flat, effects, chance, strict=False)):
        _draw_effects(axes, effect, control)
        _name_largest(axes, effect, class_names, 0.2 * max(float(np.ptp(array)) for array in effects))
        panel_title(axes, layer_names[place])
        axes.set_xlabel("expert taken away", fontsize=SMALL, color=SOFT)
        if place % columns == 0:
            axes.set_ylabel("change of logit", fontsize=SMALL, color=SOFT)
    style = {"linestyle": "none", "marker": "o"}
    marks = [
        Line2D([], [], color=INK, markersize=5, label="mean of the classes", **style),  # type: ignore[arg-type]
        Line2D([], [], color=INK, markersize=2.5, alpha=0.55, label="one class", **style),  # type: ignore[arg-type]
        Line2D([], [], color=_CONTROL, markersize=4, marker="_", linestyle="none", label="as many choices at random"),
    ]
    figure.legend(handles=marks, loc="outside lower left", ncols=3, fontsize=SMALL, frameon=False, labelcolor=INK)
    heading(figure, "Without one expert", f"Change of the true class's logit; {what}.")
    return figure


def _draw_effects(axes: Axes, effect: npt.NDArray[np.float64], control: npt.NDArray[np.float64]) -> None:
    calm(axes)
    axes.axhline(0, color=RULE, linewidth=1.0)
    experts, classes = effect.shape
    spread = _spread(classes)
    for expert in range(experts):
        colour = expert_colour(expert, experts) if experts <= len(EXPERT_COLOURS) else INK
        axes.plot(expert + 0.28, control[expert].mean(), "_", color=_CONTROL, markersize=7, markeredgewidth=2.2)
        axes.vlines(expert + 0.28, control[expert].min(), control[expert].max(), color=_CONTROL, linewidth=1)
        axes.plot(expert - 0.12 + spread, effect[expert], "o", color=colour, markersize=2.2, alpha=0.55)
        axes.plot(expert - 0.12, effect[expert].mean(), "o", color=colour, markersize=5, markeredgecolor="white")
    axes.set_xticks(range(experts))
    axes.set_xlim(-0.6, experts - 0.1)


def _name_largest(axes: Axes, effect: npt.NDArray[np.float64], class_names: Sequence[str], least: float) -> None:
    """The class that changes most without an expert, beside its mark, if that is at least `least` away from zero."""
    spread = _spread(effect.shape[1])
    for expert, row in enumerate(effect):
        label = int(np.abs(row).argmax())
        if abs(row[label]) >= max(least, 1e-6):
            place = (expert - 0.12 + spread[label], row[label])
            style = {"textcoords": "offset points", "va": "center", "fontsize": SMALL - 0.5, "color": SOFT}
            axes.annotate(class_names[label], place, (4, 0), parse_math=False, **style)  # type: ignore[arg-type]


def _spread(classes: int) -> npt.NDArray[np.float64]:
    """How far each class stands to the side of its expert."""
    return np.linspace(-0.16, 0.16, classes) if classes > 1 else np.zeros(1)
