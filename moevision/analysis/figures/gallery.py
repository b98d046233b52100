"""The expert gallery: what an expert gets, its heaviest patches beside random ones, each in its surroundings.

Axes: E experts. Which patches are shown is decided in `gallery.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moevision.analysis.describe import ExpertGallery, GalleryPatch, layer_gallery
from moevision.analysis.figures.style import BLANK, INK, PAGE_INCHES, SMALL, SOFT, bare, heading, new_figure
from moevision.analysis.images import patch_crop
from moevision.analysis.palette import expert_colour, ink_on

if TYPE_CHECKING:
    from moevision.analysis.images import PictureSet
    from moevision.analysis.trace import RoutingTrace

_MOST_EXPERTS = 16
_GAP, _NAME = 0.5, 1.5  # widths between top and random patches and of the expert's name, in patches


def plot_gallery(
    pictures: PictureSet,
    trace: RoutingTrace,
    layer: int,
    *,
    experts: Sequence[int] | None = None,
    count: int = 8,
    context: int = 1,
    seed: int = 0,
) -> Figure:
    """One row per expert: its heaviest patches, and as many random ones, in context and outlined.

    Args:
        pictures: the pictures that the trace was made of.
        trace: routing of all of them.
        layer: block index of the MoE layer.
        experts: which to show; all by default, or the 16 busiest of more.
        count: patches of each kind.
        context: patches shown around each.
        seed: of the random patches.
    """
    routing = trace.layer(layer)
    loads = routing.counts().sum(0)
    galleries = layer_gallery(routing, count, seed)
    shown = list(experts) if experts is not None else list(range(routing.num_experts))
    if experts is None and len(shown) > _MOST_EXPERTS:
        shown = sorted(np.argsort(-loads, kind="stable")[:_MOST_EXPERTS].tolist())
    units = _NAME + 2 * count + _GAP
    figure = new_figure(PAGE_INCHES, PAGE_INCHES / units * (1.06 * len(shown) + 0.55))
    axes = figure.add_subplot()
    axes.set(xlim=(0, units), ylim=(1.06 * len(shown), -0.5), aspect="equal")
    bare(axes)
    soft = routing.kind == "soft"
    for left, name in (
        (_NAME, "read most" if soft else "largest gate weight"),
        (_NAME + count + _GAP, "random patches"),
    ):
        axes.text(left + 0.03, -0.15, name, fontsize=SMALL + 0.5, fontweight="bold", color=INK)
    for row, expert in enumerate(shown):
        share = float(loads[expert] / max(1, loads.sum()))
        _draw_row(axes, galleries[expert], row, share, routing.num_experts)
        for start, patches in ((_NAME, galleries[expert].top), (_NAME + count + _GAP, galleries[expert].random)):
            for place, patch in enumerate(patches):
                _draw_patch(axes, pictures, patch, trace.grid, context, start + place, 1.06 * row)
    fewer = "" if len(shown) == routing.num_experts else f" {len(shown)} of {routing.num_experts} experts."
    drawn = "drawn as much as the expert reads of them" if soft else "drawn evenly from all that the expert computes"
    share_of = "the weight that patches take" if soft else "choices"
    note = f"Left: at most one per picture. Right: {drawn}. Under the number: its share of {share_of}.{fewer}"
    heading(figure, f"{routing.name}: what each expert gets", note)
    return figure


def _draw_row(axes: Axes, gallery: ExpertGallery, row: int, share: float, num_experts: int) -> None:
    """The expert's chip, and a word where nothing is routed to it."""
    y, colour = 1.06 * row, expert_colour(gallery.expert, num_experts)
    axes.text(0.65, y + 0.34, str(gallery.expert), ha="center", va="center", fontsize=SMALL + 1, color=ink_on(colour),
              bbox={"boxstyle": "round,pad=0.3", "facecolor": colour, "edgecolor": "none"})  # fmt: skip
    axes.text(0.65, y + 0.83, f"{share:.1%}", ha="center", va="center", fontsize=SMALL - 0.5, color=SOFT)
    if not gallery.top:
        width = axes.get_xlim()[1] - _NAME
        axes.add_patch(Rectangle((_NAME, y + 0.02), width, 0.96, facecolor=BLANK, edgecolor="none"))
        axes.text(_NAME + 0.2, y + 0.5, "no patch goes to this expert", va="center", fontsize=SMALL, color=SOFT)


def _draw_patch(
    axes: Axes, pictures: PictureSet, patch: GalleryPatch, grid: tuple[int, int], context: int, x: float, y: float
) -> None:
    """A crop of one unit, with its patch, which is in the middle, outlined in white on black."""
    crop = patch_crop(pictures.image(patch.image), grid, patch.patch, context)
    axes.imshow(crop, extent=(x + 0.02, x + 0.98, y + 0.98, y + 0.02), interpolation="nearest", zorder=2)
    side = 0.96 / (1 + 2 * context)
    corner = (x + 0.5 - side / 2, y + 0.5 - side / 2)
    for width, colour in ((1.5, "black"), (0.7, "white")):
        axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=colour, linewidth=width, zorder=3))
