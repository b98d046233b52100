"""Figures of one picture: which expert each patch goes to, how sure the router is.

A picture and its trace in, a matplotlib Figure out.
Axes: P patches (row-major in a grid of rows x columns), K choices, E experts, L MoE layers, S pixels of a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from moevision.analysis.figures.style import (
    AMOUNT,
    PAGE_INCHES,
    bare,
    colour_bar,
    heading,
    hex_of,
    new_figure,
    panel_title,
    rgb_of,
)
from moevision.analysis.palette import expert_colours, ink_on
from moevision.layers.routing import Kind as RoutingKind
from moevision.names import shown

if TYPE_CHECKING:
    from moevision.analysis.trace import LayerTrace, RoutingTrace

Picture = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
_PER_ROW = 4  # panels side by side


def plot_overlay(
    picture: Picture,
    trace: RoutingTrace,
    image: int = 0,
    *,
    layers: Sequence[int] | None = None,
    highlight: int | None = None,
) -> Figure:
    """The picture, and per MoE layer the expert of every patch: colour and number, opacity = gate weight.

    Args:
        picture: uint8 [S, S, 3], the image as the model saw it.
        trace: routing of one or more images.
        image: which of them is `picture`.
        layers: block indices of the layers to show; all of the trace by default.
        highlight: the one expert to colour (in each layer).
    """
    shown = _layers(trace, layers)
    columns = min(1 + len(shown), _PER_ROW)
    rows = -(-(1 + len(shown)) // columns)
    side = max(PAGE_INCHES / max(columns, 3), 0.13 * max(trace.grid) + 0.2)
    figure = new_figure(side * columns, (side + 0.12) * rows)
    axes = figure.add_subplot(rows, columns, 1)
    axes.imshow(picture)
    bare(axes)
    panel_title(axes, "picture")
    for place, layer in enumerate(shown, start=2):
        axes = figure.add_subplot(rows, columns, place)
        _draw_experts(axes, picture, layer, image, trace.grid, highlight)
        panel_title(axes, layer.name, _first_choices(layer, image))
    heading(figure, f"Where each patch goes: {verdict_on(trace, image)}", _overlay_note({each.kind for each in shown}))
    return figure


def _first_choices(layer: LayerTrace, image: int) -> str:
    """What there is to say about a panel."""
    of_image = layer.select(slice(image, image + 1))
    first = of_image.first_choice()
    used = f"{np.unique(first[first >= 0]).size} of {layer.num_experts} experts"
    if layer.kind == "expert_choice":
        return f"no expert: {(first < 0).sum()} of {first.size} patches"
    return f"{used} come first somewhere" if layer.kind == "soft" else f"{used} are a first choice"


def _overlay_note(kinds: set[RoutingKind]) -> str:
    """How to read the overlay."""
    words = {
        "token_choice": "Colour and number: the patch's first choice; opacity: grows with its gate weight; × dropped "
        "by capacity.",
        "expert_choice": "Experts choose: colour and number are the expert with the largest weight of those that took "
        "the patch; opacity: grows with that weight; · no expert took it.",
        "soft": "Soft MoE: colour and number are the expert that the patch takes most from; opacity: grows with that "
        "weight, from an equal share to all of it.",
    }
    said = " ".join(text for kind, text in words.items() if kind in kinds)
    return f"{said} Equal colours in two layers are unrelated experts."


def _draw_experts(
    axes: Axes, picture: Picture, layer: LayerTrace, image: int, grid: tuple[int, int], highlight: int | None
) -> None:
    rows, columns = grid
    first = np.asarray(layer.expert_index[image, :, 0], dtype=np.int64)
    kept = np.asarray(layer.kept[image, :, 0], dtype=bool)
    weight = np.clip(np.asarray(layer.combine_weight[image, :, 0], dtype=np.float64), 0, 1)
    palette = np.stack([rgb_of(colour) for colour in expert_colours(layer.num_experts, highlight)])
    if layer.kind == "soft":  # the largest of E weights that sum to 1 is never below 1 / E
        weight = np.clip((layer.num_experts * weight - 1) / max(1, layer.num_experts - 1), 0, 1)
    alpha = np.where(kept, 0.12 + 0.75 * weight, 0.0)
    pale = _pale(picture, 0.55)
    overlay = np.concatenate([palette[first], alpha[:, None]], axis=1).reshape(rows, columns, 4)
    _over(axes, pale, overlay, grid)
    ground = pale[..., None].repeat(3, -1).reshape(rows, pale.shape[0] // rows, columns, -1, 3).mean((1, 3))
    shade = alpha[:, None] * palette[first] + (1 - alpha[:, None]) * ground.reshape(-1, 3)
    points = 72 * axes.figure.get_figure(root=True).get_size_inches()[0] / _PER_ROW / columns
    size = float(np.clip(0.5 * points, 4.5, 8.5))
    for patch, (row, column) in enumerate(np.ndindex(rows, columns)):
        text = str(first[patch]) if kept[patch] else "·" if layer.kind == "expert_choice" else "×"
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=ink_on(hex_of(shade[patch])))


def _over(axes: Axes, pale: Floats, overlay: npt.ArrayLike, grid: tuple[int, int], **style: object) -> None:
    """A pale picture with one translucent cell per patch on it, thin white lines between; data units are patches."""
    rows, columns = grid
    axes.imshow(pale, cmap="gray", vmin=0, vmax=1, extent=(-0.5, columns - 0.5, rows - 0.5, -0.5))
    axes.imshow(overlay, interpolation="nearest", **style)  # type: ignore[arg-type]
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    bare(axes)
    axes.vlines(np.arange(columns - 1) + 0.5, -0.5, rows - 0.5, color="white", linewidth=0.5)
    axes.hlines(np.arange(rows - 1) + 0.5, -0.5, columns - 0.5, color="white", linewidth=0.5)


def _pale(picture: Picture, darkest: float) -> Floats:
    """[S, S] in [darkest, 1]: the picture without its colours, so that those on top mean one thing."""
    grey = picture.astype(np.float64) @ (0.299, 0.587, 0.114) / 255
    return darkest + (1 - darkest) * grey


def plot_certainty(
    picture: Picture, trace: RoutingTrace, image: int = 0, *, layers: Sequence[int] | None = None
) -> Figure:
    """How sure the router is of each patch: entropy of its probabilities and margin of the best expert, on the picture.

    Args:
        picture: uint8 [S, S, 3], the image as the model saw it.
        trace: routing of one or more images.
        image: which of them is `picture`.
        layers: block indices of the layers to show; all of the trace by default.
    """
    shown = _layers(trace, layers)
    columns = min(len(shown), _PER_ROW)
    blocks = -(-len(shown) // columns)
    side = PAGE_INCHES / max(columns + 1.6, 3.6)
    figure = new_figure(side * (columns + 1) + 0.75, 2 * blocks * (side + 0.1))
    cells = figure.add_gridspec(2 * blocks, columns + 1)
    axes = figure.add_subplot(cells[0, 0])
    axes.imshow(picture)
    bare(axes)
    panel_title(axes, "picture")
    most = float(np.log2(max(layer.num_experts for layer in shown)))
    for row, (name, limit, label, form) in enumerate(
        (
            ("entropy", most, f"bits (0 decided, {most:.3g} undecided)", "%.1f"),
            ("margin", 1.0, "best − second-best", "%.1f"),
        )
    ):
        norm, drawn = Normalize(0, limit), []
        for place, layer in enumerate(shown):
            values = np.asarray((layer.entropy_bits if row == 0 else layer.margin)[image], dtype=np.float64)
            axes = figure.add_subplot(cells[row * blocks + place // columns, 1 + place % columns])
            _over(axes, _pale(picture, 0.6), values.reshape(trace.grid), trace.grid, cmap=AMOUNT, norm=norm, alpha=0.78)
            panel_title(axes, layer.name, f"mean {name} {values.mean():.2f}")
            drawn.append(axes)
        bar = ScalarMappable(norm, AMOUNT)
        bar.set_array([])
        colour_bar(drawn, bar, label, form)
    note = (
        "Entropy of the router's probabilities over all experts, and how far the best is ahead of the second. "
        "Low entropy alone isn't specialization: a collapsed router is sure as well."
    )
    heading(figure, f"How sure the router is: {verdict_on(trace, image)}", note)
    return figure


def _layers(trace: RoutingTrace, blocks: Sequence[int] | None) -> list[LayerTrace]:
    return list(trace.layers) if blocks is None else [trace.layer(block) for block in blocks]


def verdict_on(trace: RoutingTrace, image: int) -> str:
    """What the picture is and what the model takes it for."""
    guess, label = int(trace.predictions[image]), int(trace.labels[image])
    words = [] if label < 0 else [trace.class_names[label]]
    if guess >= 0:  # a model without a head predicts nothing
        names = trace.prediction_names or trace.class_names
        words.append(f"predicted {names[guess]} ({float(trace.probabilities[image, guess]):.0%})")
    return ", ".join(words) or shown(trace.picture_names[image])
