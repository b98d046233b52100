"""Figures of images: which expert each patch goes to, how sure the router is, the path of a patch, expert galleries.

An image and its trace in, a matplotlib Figure out.
Axes: P patches (row-major in a grid of rows x columns), K choices, E experts, L MoE layers, S pixels of a side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moevision.analysis.describe import ExpertGallery, GalleryPatch, layer_gallery
from moevision.analysis.images import PictureSet, patch_crop
from moevision.analysis.palette import EXPERT_COLOURS
from moevision.analysis.plots.style import (
    AMOUNT,
    BLANK,
    GRID,
    INK,
    PAGE_INCHES,
    SMALL,
    SOFT,
    bare,
    calm,
    colour_bar,
    expert_colour,
    expert_colours,
    heading,
    hex_of,
    ink_on,
    new_figure,
    panel_title,
    rgb_of,
)
from moevision.analysis.trace import LayerTrace, RoutingTrace
from moevision.errors import UserError
from moevision.layers.routing import Kind as RoutingKind
from moevision.names import shown

Picture = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
_PER_ROW = 4  # panels side by side
_MOST_EXPERTS = 16
_GAP, _NAME = 0.5, 1.5  # widths between top and random patches and of the expert's name, in patches


def plot_overlay(
    picture: Picture,
    trace: RoutingTrace,
    image: int = 0,
    *,
    layers: Sequence[int] | None = None,
) -> Figure:
    """The image, and per MoE layer the expert of every patch: colour and number, opacity = gate weight.

    Args:
        picture: uint8 [S, S, 3], the image as the model saw it.
        trace: routing of one or more images.
        image: which of them is `picture`.
        layers: block indices of the layers to show; all of the trace by default.
    """
    shown = _layers(trace, layers)
    columns = min(1 + len(shown), _PER_ROW)
    rows = -(-(1 + len(shown)) // columns)
    side = max(PAGE_INCHES / max(columns, 3), 0.13 * max(trace.grid) + 0.2)
    figure = new_figure(side * columns, (side + 0.12) * rows)
    axes = figure.add_subplot(rows, columns, 1)
    axes.imshow(picture)
    bare(axes)
    panel_title(axes, "image")
    for place, layer in enumerate(shown, start=2):
        axes = figure.add_subplot(rows, columns, place)
        _draw_experts(axes, picture, layer, image, trace.grid)
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


def _draw_experts(axes: Axes, picture: Picture, layer: LayerTrace, image: int, grid: tuple[int, int]) -> None:
    rows, columns = grid
    first = np.asarray(layer.expert_index[image, :, 0], dtype=np.int64)
    kept = np.asarray(layer.kept[image, :, 0], dtype=bool)
    weight = np.clip(np.asarray(layer.combine_weight[image, :, 0], dtype=np.float64), 0, 1)
    palette = np.stack([rgb_of(colour) for colour in expert_colours(layer.num_experts)])
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
    """A pale image with one translucent cell per patch on it, thin white lines between; data units are patches."""
    rows, columns = grid
    axes.imshow(pale, cmap="gray", vmin=0, vmax=1, extent=(-0.5, columns - 0.5, rows - 0.5, -0.5))
    axes.imshow(overlay, interpolation="nearest", **style)  # type: ignore[arg-type]
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    bare(axes)
    axes.vlines(np.arange(columns - 1) + 0.5, -0.5, rows - 0.5, color="white", linewidth=0.5)
    axes.hlines(np.arange(rows - 1) + 0.5, -0.5, columns - 0.5, color="white", linewidth=0.5)


def _pale(picture: Picture, darkest: float) -> Floats:
    """[S, S] in [darkest, 1]: the image without its colours, so that those on top mean one thing."""
    grey = picture.astype(np.float64) @ (0.299, 0.587, 0.114) / 255
    return darkest + (1 - darkest) * grey


def plot_certainty(
    picture: Picture, trace: RoutingTrace, image: int = 0, *, layers: Sequence[int] | None = None
) -> Figure:
    """How sure the router is of each patch: entropy of its probabilities and margin of the best expert, on the image.

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
    panel_title(axes, "image")
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
    """What the image is and what the model takes it for."""
    guess, label = int(trace.predictions[image]), int(trace.labels[image])
    words = [] if label < 0 else [trace.class_names[label]]
    if guess >= 0:  # a model without a head predicts nothing
        names = trace.prediction_names or trace.class_names
        words.append(f"predicted {names[guess]} ({float(trace.probabilities[image, guess]):.0%})")
    return ", ".join(words) or shown(trace.picture_names[image])


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
        pictures: the images that the trace was made of.
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
    note = f"Left: at most one per image. Right: {drawn}. Under the number: its share of {share_of}.{fewer}"
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
