"""Figures of how the choices fall: load of each expert, gate weights by depth, which experts are chosen together.

Arrays in, a matplotlib Figure out. They describe; none of them tests anything.
Axes: L MoE layers, E experts, K choices, Q quantiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moevision.analysis.figures.style import (
    BELOW_ABOVE,
    COLUMN_INCHES,
    INK,
    PAGE_INCHES,
    SMALL,
    SOFT,
    bare,
    calm,
    colour_bar,
    expert_chips,
    heading,
    hex_of,
    new_figure,
    panel_title,
    percent,
)
from moevision.analysis.palette import EXPERT_COLOURS, expert_colours, ink_on
from moevision.analysis.tables import QUANTILES, expected_co_activation
from moevision.errors import UserError

Ints = npt.NDArray[np.integer]
_NUMBERED = 16  # experts: up to here every bar and cell carries its number


def plot_load(
    counts: npt.ArrayLike,
    layer_names: Sequence[str],
    *,
    requested: npt.ArrayLike | None = None,
    highlight: int | None = None,
) -> Figure:
    """Load bars, one panel per MoE layer, with the ideal line and how much busier the busiest expert is.

    Args:
        counts: [L, E] choices that each expert computed, over all images.
        layer_names: [L] such as "L4".
        requested: [L, E] choices that fell on it before capacity; what was dropped stands hollow on top.
        highlight: the one expert in colour.

    Raises:
        UserError: shapes that don't fit, or a layer without any choice.
    """
    load = np.asarray(counts, dtype=np.float64)
    wanted = load if requested is None else np.asarray(requested, dtype=np.float64)
    if load.ndim != 2 or load.shape[0] != len(layer_names) or wanted.shape != load.shape:
        raise UserError(f"Load bars need counts [layers, experts]; got {load.shape} for {len(layer_names)} layers.")
    if (wanted.sum(1) <= 0).any() or (load.sum(1) <= 0).any():
        raise UserError("A layer without a single choice has no load to draw; give counts of at least one image.")
    layers, experts = load.shape
    columns = min(layers, 2 if experts > 8 else 4)
    rows = -(-layers // columns)
    figure = new_figure(COLUMN_INCHES if columns == 1 and experts <= 8 else PAGE_INCHES, 0.25 + 1.5 * rows)
    highest = float((wanted / wanted.sum(1, keepdims=True)).max())
    for place, name in enumerate(layer_names):
        axes = figure.add_subplot(rows, columns, place + 1)
        _draw_load(axes, load[place], wanted[place], highest, highlight)
        panel_title(axes, name, f"slowest ÷ mean {load[place].max() / load[place].mean():.2f}")
        if place % columns == 0:
            axes.set_ylabel("share of choices", fontsize=SMALL, color=SOFT)
        if place >= layers - columns:
            axes.set_xlabel("expert", fontsize=SMALL, color=SOFT)
    hollow = "" if requested is None else " Hollow: dropped by capacity."
    note = f"Dashed: equal load, 1 ÷ {experts} = {1 / experts:.1%}. Expert numbers of two layers are unrelated.{hollow}"
    heading(figure, "How busy each expert is", note)
    return figure


def _draw_load(
    axes: Axes, load: npt.NDArray[np.float64], wanted: npt.NDArray[np.float64], highest: float, highlight: int | None
) -> None:
    experts, total = len(load), wanted.sum()
    calm(axes)
    colours = expert_colours(experts, highlight)
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


def plot_gate_weights(
    quantiles: npt.ArrayLike, layer_names: Sequence[str], *, levels: Sequence[float] = QUANTILES
) -> Figure:
    """Gate weights by depth: per MoE layer the distribution of the weight of the 1st .. Kth choice.

    Args:
        quantiles: [L, 5, K] from `gate_weight_quantiles` of each layer.
        layer_names: [L] such as "L4", in order of depth.
        levels: the five quantile levels, rising: a thin line spans the outer, a thick one the inner two.
    """
    values = np.asarray(quantiles, dtype=np.float64)
    if values.ndim != 3 or values.shape[:2] != (len(layer_names), 5) or len(levels) != 5:
        raise UserError(
            f"Gate weights need quantiles [layers, 5, choices]; got {values.shape}, {len(layer_names)} layers."
        )
    layers, _, choices = values.shape
    figure = new_figure(COLUMN_INCHES if layers * choices <= 12 else PAGE_INCHES, 2.1)
    axes = figure.add_subplot()
    calm(axes)
    step = min(0.2, 0.7 / choices)
    for choice in range(choices):
        x = np.arange(layers) + (choice - (choices - 1) / 2) * step
        low, lower, middle, upper, high = values[:, :, choice].T
        colour = EXPERT_COLOURS[choice % len(EXPERT_COLOURS)]
        axes.vlines(x, low, high, color=colour, linewidth=1.0)
        axes.vlines(x, lower, upper, color=colour, linewidth=4.5, alpha=0.45)
        axes.plot(x, middle, "o", markersize=4, color=colour, markeredgecolor="white", markeredgewidth=0.6,
                  label=_ordinal(choice + 1), zorder=4)  # fmt: skip
        axes.plot(x, middle, "-", color=colour, linewidth=0.8, alpha=0.5)
    axes.set(ylim=(0, min(1.05, 1.1 * float(values.max()))), xlim=(-0.5, layers - 0.5))
    axes.set_xticks(range(layers), layer_names)
    axes.set_ylabel("gate weight", fontsize=SMALL, color=SOFT)
    axes.set_xlabel("MoE layer, from shallow to deep", fontsize=SMALL, color=SOFT)
    if choices > 1:
        legend = axes.legend(title="choice", fontsize=SMALL, title_fontsize=SMALL, frameon=False, labelcolor=INK,
                             loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.0)  # fmt: skip
        legend.get_title().set_color(INK)
    spans = [f"{levels[4 - place] - levels[place]:.0%}" for place in (1, 0)]
    note = f"Dot: median patch; thick: middle {spans[0]} of patches; thin: middle {spans[1]}."
    heading(figure, "How much weight each choice gets", note)
    return figure


def _ordinal(number: int) -> str:
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number, 'th') }"


def plot_co_activation(counts: Ints, top_k: int, *, layer_name: str) -> Figure:
    """Which experts are chosen for the same patch: conditional shares for all pairs, coloured by their excess.

    Args:
        counts: [E, E] from `co_activation`.
        top_k: K of the layer, at least 2.
        layer_name: such as "L4".
    """
    table = np.asarray(counts, dtype=np.float64)
    experts = len(table)
    if top_k < 2 or table.shape != (experts, experts):
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
    axes.set_ylabel("of the patches that chose ...", fontsize=SMALL, color=SOFT, labelpad=14)
    axes.set_xlabel("... the share that also chose ... (%)", fontsize=SMALL, color=SOFT)
    bar = colour_bar(axes, picture, "share ÷ share that the loads alone give", FuncFormatter(_times))
    bar.set_ticks(list(range(-int(reach), int(reach) + 1)))
    chance = (top_k - 1) / (experts - 1)
    note = (
        f"All pairs of the {top_k} choices. Were all pairs as frequent, every cell would be {chance:.1%}; "
        "colour allows for unequal loads."
    )
    heading(figure, f"{layer_name}: experts chosen together", note)
    return figure


def _times(power: float, _position: int | None = None) -> str:
    """A colour bar's label: 2 ** power as a factor."""
    return f"{2.0**power:g}×"
