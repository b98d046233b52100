"""Figures of how the choices fall: load of each expert, gate weights by depth.

Arrays in, a matplotlib Figure out. They describe; none of them tests anything.
Axes: L MoE layers, E experts, K choices, Q quantiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moevision.analysis.describe import QUANTILES
from moevision.analysis.figures.style import (
    COLUMN_INCHES,
    INK,
    PAGE_INCHES,
    SMALL,
    SOFT,
    calm,
    heading,
    new_figure,
    panel_title,
    percent,
)
from moevision.analysis.palette import EXPERT_COLOURS, expert_colours, ink_on
from moevision.errors import UserError
from moevision.layers.routing import Kind as RoutingKind

Ints = npt.NDArray[np.integer]
_NUMBERED = 16  # experts: up to here every bar and cell carries its number
_RANKS = 4  # choices whose weights are drawn; Soft MoE has as many as experts
_NOBODY = "#D55E00"


def plot_load(
    counts: Sequence[npt.ArrayLike],
    layer_names: Sequence[str],
    *,
    requested: Sequence[npt.ArrayLike] | None = None,
    highlight: int | None = None,
    kinds: Sequence[RoutingKind] | None = None,
) -> Figure:
    """Load bars, one panel per MoE layer, with the ideal line and how much busier the busiest expert is.

    Args:
        counts: per layer [E] choices that each expert computed, over all images (Soft MoE: weight that patches took).
        layer_names: [L] such as "L4".
        requested: per layer [E] choices that fell on it before capacity; what was dropped stands hollow on top.
        highlight: the one expert in colour.
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
        _draw_load(axes, load, wanted[place], highest, highlight)
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
        words.append("Where experts choose, all take as many tokens of every picture.")
    if "soft" in kinds:
        words.append("Soft MoE: all compute as many slots; bars show the weight that patches take from each.")
    return " ".join(words)


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
    quantiles: Sequence[npt.ArrayLike], layer_names: Sequence[str], *, levels: Sequence[float] = QUANTILES
) -> Figure:
    """Gate weights by depth: per MoE layer the distribution of the weight of the 1st .. Kth choice.

    Args:
        quantiles: per layer [5, K] from `gate_weight_quantiles`; K may differ, nan for a rank that no patch has.
        layer_names: [L] such as "L4", in order of depth.
        levels: the five quantile levels, rising: a thin line spans the outer, a thick one the inner two.
    """
    values = [np.asarray(layer, dtype=np.float64) for layer in quantiles]
    shapes = [layer.shape for layer in values]
    if len(values) != len(layer_names) or any(len(s) != 2 or s[0] != 5 for s in shapes) or len(levels) != 5:
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
    spans = [f"{levels[4 - place] - levels[place]:.0%}" for place in (1, 0)]
    fewer = "" if choices == most else f" The largest {choices} of {most} weights of a patch."
    note = f"Dot: median patch; thick: middle {spans[0]} of patches; thin: middle {spans[1]}.{fewer}"
    heading(figure, "How much weight each choice gets", note)
    return figure


def _ordinal(number: int) -> str:
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number, 'th') }"
