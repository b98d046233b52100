"""Figures of how experts share patches: how many a patch has, and which are chosen together.

Arrays in, a matplotlib Figure out. They describe; none of them tests anything.
Axes: L MoE layers, E experts, K choices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moevision.analysis.describe import expected_co_activation
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
from moevision.analysis.palette import EXPERT_COLOURS, ink_on
from moevision.errors import UserError

Ints = npt.NDArray[np.integer]
_NUMBERED = 16  # experts: up to here every bar and cell carries its number
_RANKS = 4  # choices whose weights are drawn; Soft MoE has as many as experts
_NOBODY = "#D55E00"


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
