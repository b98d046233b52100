"""All figures of the analysis, one function each: arrays (or an image and its trace) in, a matplotlib Figure out.

In a notebook a figure shows itself. Figures are drawn on matplotlib's Figure objects, never through pyplot, whose
global state isn't safe in a thread, and are laid out for print: one column (3.5 in) or one page (7.2 in) wide at
natural size (wider only for many experts), with no text under 6 points but for numbers in crowded cells. Nothing is
decided here: statistics come from `describe`.

Colours of experts: the first seven are Okabe & Ito's, "Color Universal Design" (2008), told apart under every common
colour vision, with the values of matplotlib's `color_sequences["okabe_ito"]`. The eighth is the grey of Tol's "bright"
scheme (SRON technical note, 2021) instead of their black. No palette of more than about eight colours is safe: beyond
that an expert is a number on grey. A colour never stands alone, the number is
always with it; and equal numbers in two layers are two unrelated experts. The explorer's `palette.js` has the same.

Axes: L MoE layers, C classes (or parts), E experts, K choices, P patches (row-major in a grid of rows x columns),
S pixels of a side. Those of the arguments named `layer_names` are such as "L4".
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from moevision.analysis.describe import ExpertGallery, GalleryPatch, layer_gallery
from moevision.analysis.images import PictureSet, patch_crop
from moevision.analysis.information import Flags, Floats, Pixels
from moevision.analysis.readings import Load
from moevision.analysis.trace import LayerTrace, RoutingTrace
from moevision.errors import escape_controls
from moevision.layers.routing import Kind as RoutingKind
from moevision.words import percent

EXPERT_COLOURS: Final = (
    "#0072B2",  # blue
    "#D55E00",  # vermillion
    "#009E73",  # bluish green
    "#CC79A7",  # reddish purple
    "#E69F00",  # orange
    "#56B4E9",  # sky blue
    "#F0E442",  # yellow
    "#BBBBBB",  # light grey, in place of black, which can't be seen on dark fur and in dark mode
)
"""Colour of expert 0, 1, ... in a layer of up to eight experts."""

NEUTRAL: Final = "#C9CDD2"  # every expert of a layer with more than eight
COLUMN_INCHES: Final = 3.5
PAGE_INCHES: Final = 7.2
INK: Final = "#333333"
SOFT: Final = "#6B6B6B"
RULE: Final = "#BBBBBB"
GRID: Final = "#E8E8E8"
BLANK: Final = "#F1F2F4"  # cells that hold nothing worth a colour
SMALL, NORMAL, LARGE = 6.5, 7.5, 8.5  # points
_LINE_INCHES = 0.145
_CHIPS = 20  # experts: up to here each has a chip at the edge of a map

BELOW_ABOVE: Final = LinearSegmentedColormap.from_list(
    "moevision_below_above", ["#8A3F00", "#D98A4E", "#F7F7F7", "#5FA3CC", "#00466F"]
)
"""Brown below, white at, blue above the value to compare with; told apart under every common colour vision."""

NOTEBOOK_DPI = 110  # sharp enough on a screen, and small in a saved notebook
_LARGE: Final = 100_000  # bytes


class NotebookFigure(Figure):
    """A figure that shows itself as a cell's result; matplotlib's own needs pyplot for that, which is global state."""

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, bytes]:
        """PNG; of a figure with a photo, which a PNG makes large, JPEG."""
        png = figure_png(self, NOTEBOOK_DPI)
        if len(png) < _LARGE:
            return {"image/png": png}
        buffer = io.BytesIO()
        with Image.open(io.BytesIO(png)) as drawn:
            drawn.convert("RGB").save(buffer, "JPEG", quality=90, optimize=True)
        return {"image/jpeg": buffer.getvalue()}


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty white figure with constrained layout, 200 dots per inch."""
    figure = NotebookFigure(
        figsize=(width_inches, height_inches), dpi=200, facecolor="white", layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05, wspace=0.03, hspace=0.03)  # type: ignore[union-attr, call-arg]
    return figure


def figure_png(figure: Figure, dots_per_inch: float | None = None) -> bytes:
    """The figure as PNG, at its own or another number of dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white", dpi=dots_per_inch or "figure")
    return buffer.getvalue()


def figure_heading(figure: Figure, text: str, note: str = "") -> None:
    """What the figure shows, in bold, and below it in grey how to read it, on room that is added above the figure.

    Lines are broken to the figure's width. Call it once, after the figure has its size.
    """
    width, height = figure.get_size_inches()
    # A longer line than a page's is hard to read. At a notebook's resolution letters are up to 7.3 % wider than drawn.
    measure = (min(width, PAGE_INCHES) - 0.15) / 1.075
    bold = wrap_text(text, measure, FontProperties(size=LARGE, weight="bold"))
    plain = wrap_text(note, measure, FontProperties(size=NORMAL - 0.5))
    room = 0.1 + _LINE_INCHES * (len(bold) + len(plain))
    figure.set_size_inches(width, height + room)
    figure.get_layout_engine().set(rect=(0, 0, 1, height / (height + room)))  # type: ignore[union-attr, call-arg]
    for place, line in enumerate([*bold, *plain]):
        y = 1 - (0.06 + _LINE_INCHES * place) / (height + room)
        is_bold = place < len(bold)
        figure.text(
            0.05 / width,
            y,
            line,
            va="top",
            in_layout=False,
            parse_math=False,
            color=INK if is_bold else SOFT,
            fontsize=LARGE if is_bold else NORMAL - 0.5,
            fontweight="bold" if is_bold else "normal",
        )


def wrap_text(text: str, width_inches: float, font: FontProperties) -> list[str]:
    """Lines of at most `width_inches` in this font (a longer word stands alone); none for an empty text."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        points, _, _ = text_to_path.get_text_width_height_descent(longer, font, ismath=False)
        if lines and points <= 72 * width_inches:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def panel_title(axes: Axes, text: str, note: str = "") -> None:
    """A panel's name in bold and, behind it in grey, what is to be said about it."""
    axes.set_title(text, loc="left", fontsize=NORMAL, fontweight="bold", color=INK, pad=4)
    if note:
        axes.set_title(note, loc="right", fontsize=SMALL, color=SOFT, pad=4)


def quiet_axes(axes: Axes, grid: Literal["x", "y", "both"] = "y") -> None:
    """Light grid, no box, quiet ticks: the data is the darkest thing in the figure."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.grid(axis=grid, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=SMALL, labelcolor=INK)


def hide_axes(axes: Axes) -> None:
    """No ticks and no box, for images and maps."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def add_text(
    axes: Axes, x: float, y: float, text: str, ink: str, size: float = SMALL, **style: Any
) -> None:
    """A word or number whose middle is at (x, y)."""
    axes.text(x, y, text, ha="center", **{"va": "center", "fontsize": size, "color": ink, **style})


def chip(colour: str, pad: float = 0.25) -> dict[str, str]:
    """The box of an expert's number, in its colour."""
    return {"boxstyle": f"round,pad={pad}", "facecolor": colour, "edgecolor": "none"}


def expert_chips(axes: Axes, num_experts: int) -> None:
    """Name the columns 0..E - 1 of a map by chips: the expert's colour and its number.

    Of many experts every fourth is named, without a chip.
    """
    crowded = num_experts > _CHIPS
    axes.set_xticks([])
    for expert in range(0, num_experts, 4 if crowded else 1):
        colour = expert_colour(expert, num_experts)
        axes.annotate(
            str(expert),
            (expert, 1.0),
            (0, 7),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=SMALL,
            color=INK if crowded else ink_on(colour),
            annotation_clip=False,
            bbox=None if crowded else chip(colour),
        )


def rgb_of(colour: str) -> Floats:
    """[3] channels in [0, 1] of a colour's name."""
    return np.array(to_rgb(colour), dtype=np.float64)


def expert_colour(expert: int, num_experts: int) -> str:
    """`#RRGGBB` of one expert of E; of many, none has a colour of its own."""
    return EXPERT_COLOURS[expert] if num_experts <= len(EXPERT_COLOURS) else NEUTRAL


def expert_colours(num_experts: int) -> list[str]:
    """[E] colours of a layer's experts, in order."""
    return [expert_colour(expert, num_experts) for expert in range(num_experts)]


def ink_on(colour: str) -> str:
    """Black or white, whichever is read more easily on `colour` (`#RRGGBB`), by WCAG's relative luminance L.

    The contrasts (L + 0.05) / 0.05 and 1.05 / (L + 0.05) are equal, √21 ≈ 4.58, at L = 0.179: more than level AA's 4.5.
    """
    channels = rgb_of(colour)
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return "#000000" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "#FFFFFF"


# ---- figures of numbers

_NUMBERED = 16  # experts: up to here every bar and cell carries its number
_LONGEST_NAME = 28
_MOST_CLASSES = 25  # of more, those with the largest effect are shown
_CONTROL = "#9AA0A6"


def plot_load(
    counts: Sequence[npt.ArrayLike],
    layer_names: Sequence[str],
    *,
    requested: Sequence[npt.ArrayLike] | None = None,
    kinds: Sequence[RoutingKind] | None = None,
) -> Figure:
    """Load bars, one panel per MoE layer, with the ideal line and how much busier the busiest expert is.

    From [E] choices that each expert computed (Soft MoE: weight that patches took) and were `requested` before
    capacity, by layer; what was dropped stands hollow on top. `kinds`: who chooses in each layer; tokens if None.
    """
    loads = [np.asarray(load, dtype=np.float64) for load in counts]
    wanted = (
        loads if requested is None else [np.asarray(load, dtype=np.float64) for load in requested]
    )
    kinds = kinds or ["token_choice"] * len(loads)
    experts, layers = max(len(load) for load in loads), len(loads)
    # a long name needs room beside its ratio
    columns = min(layers, 2 if experts > 8 or max(map(len, layer_names)) > 6 else 4)
    rows = -(-layers // columns)
    figure = new_figure(
        PAGE_INCHES if columns > 1 or experts > 8 else COLUMN_INCHES, 0.25 + 1.5 * rows
    )
    highest = max(float((each / each.sum()).max()) for each in wanted)
    for place, (name, load, kind) in enumerate(zip(layer_names, loads, kinds, strict=True)):
        axes = figure.add_subplot(rows, columns, place + 1)
        _draw_load(axes, load, wanted[place], highest)
        ratio = "max/mean weight" if kind == "soft" else "max/mean load"
        panel_title(axes, name, f"{ratio} {load.max() / load.mean():.2f}")
        if place % columns == 0:
            axes.set_ylabel(
                "share of weight" if kind == "soft" else "share of choices",
                fontsize=SMALL,
                color=SOFT,
            )
        if place >= layers - columns:
            axes.set_xlabel("expert", fontsize=SMALL, color=SOFT)
    sizes = {len(load) for load in loads}
    equal = f", 1 ÷ {experts} = {percent(1 / experts)}" if len(sizes) == 1 else ""
    note = [f"Dashed: equal load{equal}. Expert numbers of two layers are unrelated."]
    if requested is not None:
        note.append("Hollow: dropped by capacity.")
    if "expert_choice" in kinds:
        note.append("Where experts choose, all take as many tokens of every image.")
    if "soft" in kinds:
        note.append(
            "Soft MoE: all compute as many slots; bars show the weight that patches take from each."
        )
    title = (
        "How busy each expert is" if set(kinds) != {"soft"} else "How much comes from each expert"
    )
    figure_heading(figure, title, " ".join(note))
    return figure


def _draw_load(axes: Axes, load: Floats, wanted: Floats, highest: float) -> None:
    experts, total = len(load), wanted.sum()
    quiet_axes(axes)
    colours = expert_colours(experts)
    axes.bar(
        range(experts),
        wanted / total,
        0.78,
        color="none",
        edgecolor=SOFT,
        linewidth=0.5 * (wanted > load),
    )
    axes.bar(range(experts), load / total, 0.78, color=colours)
    axes.axhline(1 / experts, color=INK, linewidth=0.9, linestyle=(0, (4, 2.5)))
    axes.set(ylim=(0, max(1.18 * highest, 1.4 / experts)), xlim=(-0.6, experts - 0.4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.set_xticks(range(0, experts, 1 if experts <= _NUMBERED else 4))
    if experts > _NUMBERED:
        return
    for expert, share in enumerate(load / total):
        inside = (
            share > 0.3 / experts
        )  # else the bar is too low for a number, which then stands above it
        text = f"{100 * share:.0f}" if share >= 0.005 or share == 0 else "<1"
        axes.annotate(
            text,
            (expert, 0 if inside else share),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=SMALL - 0.5,
            color=ink_on(colours[expert]) if inside else INK,
        )


def plot_class_experts(
    share: npt.ArrayLike,
    significant: npt.ArrayLike,
    class_names: Sequence[str],
    *,
    layer_name: str,
    excess: npt.ArrayLike | None = None,
    threshold: float | None = None,
    kind: RoutingKind = "token_choice",
) -> Figure:
    """Class × expert heatmap of one layer: shares [C, E] in the cells, colour only where a cell stands above the null.

    Classes are grouped by the expert that they use most above the mean, so that a pattern shows as a diagonal; one
    without images (NaN) is left out. `excess` [C, E] is the share minus what it is compared with, by default the mean
    over classes; `threshold` the smallest |excess| that counts as significant, to be stated.
    """
    shares, flags = np.asarray(share, dtype=np.float64), np.asarray(significant, dtype=bool)
    known: Flags = np.asarray(np.isfinite(shares).all(1))
    above = shares if excess is None else np.asarray(excess, dtype=np.float64)
    shares, flags, above = shares[known], flags[known], above[known]
    if excess is None:
        above = above - shares.mean(0)
    names = [name for name, there in zip(class_names, known, strict=True) if there]
    # Classes with a significant cell come first, larger effects before smaller ones.
    effect = np.abs(above).max(1) + np.where(flags, np.abs(above), 0).max(1)
    kept = np.sort(np.argsort(-effect, kind="stable")[:_MOST_CLASSES])
    best = above[kept].argmax(1)
    order = kept[np.lexsort((-above[kept].max(1), best))]
    figure = _share_map(shares[order], above[order], flags[order], [names[row] for row in order])
    shown = (
        f" {len(order)} of {len(shares)} classes, those with the largest effect."
        if len(kept) < len(shares)
        else ""
    )
    limit = "" if threshold is None else f" by {100 * threshold:.1f} points or more"
    what = "choices" if kind == "token_choice" else "weights"
    cells = (
        f"Cells: share of the class's {what} (%)."
        if shares.shape[1] <= _NUMBERED
        else f"Share of a class's {what}."
    )
    found = "No cell stands above chance over images, so none is coloured: no class was found to use an expert more"
    if flags.any():
        found = f"Coloured: differs from the mean{limit}, more than chance over images gives in any cell"
    found += f" ({int(flags.sum())} of {flags.size} cells)." if flags.any() else " than others do."
    # Without the load two busy experts and two classes look like specialization.
    overall = (shares - above).mean(0)  # [E]
    load = Load(overall / overall.sum(), shares).words
    figure_heading(
        figure,
        f"{layer_name}: which classes use which expert",
        f"{cells} {found}{shown} Load: {load}.",
    )
    return figure


def plot_part_experts(
    table: npt.ArrayLike,
    part_names: Sequence[str],
    *,
    layer_name: str,
    kind: RoutingKind = "token_choice",
) -> Figure:
    """Part × expert heatmap of one layer: where the patches of each part of an image go.

    From the table [parts, E] of `part_expert_table`: where tokens don't choose, it counts what experts read. Parts that
    don't occur are left out.
    """
    counts = np.asarray(table, dtype=np.float64)
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
    figure_heading(figure, f"{layer_name}: which parts go to which expert", note)
    return figure


def _share_map(shares: Floats, above: Floats, flags: Flags, names: Sequence[str]) -> Figure:
    """Rows x experts: shares written in the cells, the excess as colour where flagged, grey elsewhere."""
    rows, experts = shares.shape
    label = 0.075 * min(max(len(name) for name in names), _LONGEST_NAME) + 0.1
    cell = 0.29 if experts <= _NUMBERED else 0.1
    figure = new_figure(
        float(np.clip(label + cell * experts + 0.85, COLUMN_INCHES, 12.0)),
        max(1.0, 0.19 * rows + 0.55),
    )
    axes = figure.add_subplot()
    axes.set_facecolor(BLANK)
    reach = max(0.01, float(np.abs(np.where(flags, above, 0)).max()))
    norm = TwoSlopeNorm(0, -reach, reach)
    cells = axes.imshow(
        np.ma.masked_where(~flags, above), cmap=BELOW_ABOVE, norm=norm, aspect="auto"
    )
    axes.spines[:].set_visible(False)
    axes.vlines(np.arange(experts - 1) + 0.5, -0.5, rows - 0.5, color="white", linewidth=0.8)
    axes.hlines(np.arange(rows - 1) + 0.5, -0.5, experts - 0.5, color="white", linewidth=0.8)
    if experts <= _NUMBERED:
        digits = 1 if float(np.ptp(shares)) < 0.03 else 0  # whole numbers would all be the same
        for row, column in np.ndindex(rows, experts):
            colour = to_hex(BELOW_ABOVE(norm(above[row, column]))) if flags[row, column] else BLANK
            ink = ink_on(colour) if flags[row, column] else SOFT
            add_text(axes, column, row, f"{100 * shares[row, column]:.{digits}f}", ink)
    short = [
        name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…" for name in names
    ]
    axes.set_yticks(range(rows), short, parse_math=False)
    axes.tick_params(length=0, labelsize=SMALL, labelcolor=INK)
    expert_chips(axes, experts)
    if flags.any():
        aspect = float(np.clip(9 * figure.get_size_inches()[1], 20, 60))  # about 0.08 in wide
        bar = figure.colorbar(
            cells, ax=axes, shrink=0.75, aspect=aspect, pad=0.02, format=FuncFormatter(_points)
        )
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=SMALL, labelcolor=INK, length=0)
        bar.set_label("difference (points)", fontsize=SMALL, color=SOFT)
    return figure


def _percent(share: float) -> str:
    return percent(share, 0 if share >= 0.1 else 1) if share >= 0.001 else "<0.1 %"


def _points(share: float, _position: int | None = None) -> str:
    """A colour bar's label: a difference of shares in percentage points, with a true minus sign."""
    return f"{100 * share:+.3g}".replace("-", "−") if share else "0"


def plot_effects(
    deltas: Sequence[npt.ArrayLike],
    controls: Sequence[npt.ArrayLike],
    layer_names: Sequence[str],
    class_names: Sequence[str],
    *,
    what: str,
) -> Figure:
    """Change of the true class's logit without each expert: one small mark per class, a large one for their mean.

    Per layer [E, C] means over images of a class, and the same with as many random choices taken away instead (NaN
    without a control). `what` is the intervention in words, such as "its patches go to their next-best expert".
    """
    effects = [np.asarray(delta, dtype=np.float64) for delta in deltas]
    chance = [np.asarray(control, dtype=np.float64) for control in controls]
    columns = min(2 if effects[0].shape[0] > 8 else 3, len(effects))
    rows = -(-len(effects) // columns)
    figure = new_figure(PAGE_INCHES, 0.55 + 1.75 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(effects) :]:
        axes.set_visible(False)
    least = 0.2 * max(float(np.ptp(array)) for array in effects)
    for place, (axes, effect, control) in enumerate(zip(grid.flat, effects, chance, strict=False)):
        _draw_effects(axes, effect, control, class_names, least)
        panel_title(axes, layer_names[place])
        axes.set_xlabel("expert taken away", fontsize=SMALL, color=SOFT)
        if place % columns == 0:
            axes.set_ylabel("change of logit", fontsize=SMALL, color=SOFT)
    style = {"linestyle": "none", "marker": "o"}
    marks = [
        Line2D([], [], color=INK, markersize=5, label="mean of the classes", **style),  # type: ignore[arg-type]
        Line2D([], [], color=INK, markersize=2.5, alpha=0.55, label="one class", **style),  # type: ignore[arg-type]
        Line2D(
            [],
            [],
            color=_CONTROL,
            markersize=4,
            marker="_",
            linestyle="none",
            label="as many choices at random",
        ),
    ]
    figure.legend(
        handles=marks,
        loc="outside lower left",
        ncols=3,
        fontsize=SMALL,
        frameon=False,
        labelcolor=INK,
    )
    figure_heading(figure, "Without one expert", f"Change of the true class's logit; {what}.")
    return figure


def _draw_effects(
    axes: Axes, effect: Floats, control: Floats, class_names: Sequence[str], least: float
) -> None:
    """One layer; the class that changes most without an expert is named where it is `least` away from zero."""
    quiet_axes(axes)
    axes.axhline(0, color=RULE, linewidth=1.0)
    experts, classes = effect.shape
    spread = (
        np.linspace(-0.16, 0.16, classes) if classes > 1 else np.zeros(1)
    )  # classes stand side by side
    for expert, (row, chance) in enumerate(zip(effect, control, strict=True)):
        colour = expert_colour(expert, experts) if experts <= len(EXPERT_COLOURS) else INK
        axes.plot(
            expert + 0.28, chance.mean(), "_", color=_CONTROL, markersize=7, markeredgewidth=2.2
        )
        axes.vlines(expert + 0.28, chance.min(), chance.max(), color=_CONTROL, linewidth=1)
        axes.plot(expert - 0.12 + spread, row, "o", color=colour, markersize=2.2, alpha=0.55)
        axes.plot(
            expert - 0.12, row.mean(), "o", color=colour, markersize=5, markeredgecolor="white"
        )
    for expert, row in enumerate(effect):
        label = int(np.abs(row).argmax())
        if abs(row[label]) >= max(least, 1e-6):
            axes.annotate(
                class_names[label],
                (expert - 0.12 + spread[label], row[label]),
                (4, 0),
                parse_math=False,
                textcoords="offset points",
                va="center",
                fontsize=SMALL - 0.5,
                color=SOFT,
            )
    axes.set_xticks(range(experts))
    axes.set_xlim(-0.6, experts - 0.1)


# ---- figures of images

_PER_ROW = 4  # panels side by side
_MOST_EXPERTS = 16
_GAP, _NAME = 0.5, 1.5  # widths between top and random patches and of the expert's name, in patches


def plot_overlay(picture: Pixels, trace: RoutingTrace, image: int = 0) -> Figure:
    """An image [S, S, 3] as the model saw it, and per MoE layer the expert of every patch.

    Colour and number are the expert, opacity is its gate weight; `image` is the picture's number in the trace.
    """
    shown = trace.layers
    columns = min(1 + len(shown), _PER_ROW)
    rows = -(-(1 + len(shown)) // columns)
    side = max(PAGE_INCHES / max(columns, 3), 0.13 * max(trace.grid) + 0.2)
    figure = new_figure(side * columns, (side + 0.12) * rows)
    axes = figure.add_subplot(rows, columns, 1)
    axes.imshow(picture)
    hide_axes(axes)
    panel_title(axes, "image")
    for place, layer in enumerate(shown, start=2):
        axes = figure.add_subplot(rows, columns, place)
        _draw_experts(axes, picture, layer, image, trace.grid)
        panel_title(axes, layer.name, _first_choices(layer, image))
    words = {
        "token_choice": "Colour and number: the patch's first choice; opacity: grows with its gate weight; × dropped "
        "by capacity.",
        "expert_choice": "Experts choose: colour and number are the expert with the largest weight of those that took "
        "the patch; opacity: grows with that weight; · no expert took it.",
        "soft": "Soft MoE: colour and number are the expert that the patch takes most from; opacity: grows with that "
        "weight, from an equal share to all of it.",
    }
    said = " ".join(
        text for kind, text in words.items() if any(each.kind == kind for each in shown)
    )
    note = f"{said} Equal colours in two layers are unrelated experts."
    figure_heading(figure, f"Where each patch goes: {verdict_on(trace, image)}", note)
    return figure


def _first_choices(layer: LayerTrace, image: int) -> str:
    of_image = layer.select(slice(image, image + 1))
    first = of_image.first_choice()
    used = f"{np.unique(first[first >= 0]).size} of {layer.num_experts} experts"
    if layer.kind == "expert_choice":
        return f"no expert: {(first < 0).sum()} of {first.size} patches"
    return f"{used} come first somewhere" if layer.kind == "soft" else f"{used} are a first choice"


def _draw_experts(
    axes: Axes, picture: Pixels, layer: LayerTrace, image: int, grid: tuple[int, int]
) -> None:
    rows, columns = grid
    first = np.asarray(layer.expert_index[image, :, 0], dtype=np.int64)
    kept = np.asarray(layer.kept[image, :, 0], dtype=bool)
    weight = np.clip(np.asarray(layer.combine_weight[image, :, 0], dtype=np.float64), 0, 1)
    palette = np.stack([rgb_of(colour) for colour in expert_colours(layer.num_experts)])
    if layer.kind == "soft":  # the largest of E weights that sum to 1 is never below 1 / E
        weight = np.clip((layer.num_experts * weight - 1) / max(1, layer.num_experts - 1), 0, 1)
    alpha = np.where(kept, 0.12 + 0.75 * weight, 0.0)
    # The image pale and without its colours, so that those on top mean one thing: [S, S] in [0.55, 1].
    pale = 0.55 + 0.45 * (picture.astype(np.float64) @ (0.299, 0.587, 0.114) / 255)
    overlay = np.concatenate([palette[first], alpha[:, None]], axis=1).reshape(rows, columns, 4)
    # Data units are patches.
    axes.imshow(pale, cmap="gray", vmin=0, vmax=1, extent=(-0.5, columns - 0.5, rows - 0.5, -0.5))
    axes.imshow(overlay, interpolation="nearest")
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    hide_axes(axes)
    axes.vlines(np.arange(columns - 1) + 0.5, -0.5, rows - 0.5, color="white", linewidth=0.5)
    axes.hlines(np.arange(rows - 1) + 0.5, -0.5, columns - 0.5, color="white", linewidth=0.5)
    ground = (
        pale[..., None]
        .repeat(3, -1)
        .reshape(rows, pale.shape[0] // rows, columns, -1, 3)
        .mean((1, 3))
    )
    shade = alpha[:, None] * palette[first] + (1 - alpha[:, None]) * ground.reshape(-1, 3)
    points = 72 * axes.figure.get_figure(root=True).get_size_inches()[0] / _PER_ROW / columns
    size = float(np.clip(0.5 * points, 4.5, 8.5))
    for patch, (row, column) in enumerate(np.ndindex(rows, columns)):
        text = str(first[patch]) if kept[patch] else "·" if layer.kind == "expert_choice" else "×"
        add_text(axes, column, row, text, ink_on(to_hex(shade[patch])), size)


def verdict_on(trace: RoutingTrace, image: int) -> str:
    """What the image is and what the model takes it for."""
    guess, label = int(trace.predictions[image]), int(trace.labels[image])
    words = [] if label < 0 else [trace.class_names[label]]
    if guess >= 0:  # a model without a head predicts nothing
        names = trace.prediction_names or trace.class_names
        words.append(f"predicted {names[guess]} ({percent(trace.probabilities[image, guess], 0)})")
    return ", ".join(words) or escape_controls(trace.picture_names[image])


def plot_gallery(
    pictures: PictureSet,
    trace: RoutingTrace,
    layer: int,
    *,
    experts: Sequence[int] | None = None,
    count: int = 8,
    seed: int = 0,
) -> Figure:
    """One row per expert (or the 16 busiest): its heaviest patches, and as many random ones, outlined in context."""
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
    hide_axes(axes)
    soft = routing.kind == "soft"
    for left, name in (
        (_NAME, "read most" if soft else "largest gate weight"),
        (_NAME + count + _GAP, "random patches"),
    ):
        axes.text(left + 0.03, -0.15, name, fontsize=SMALL + 0.5, fontweight="bold", color=INK)
    for row, expert in enumerate(shown):
        share = float(loads[expert] / max(1, loads.sum()))
        _draw_row(axes, galleries[expert], row, share, routing.num_experts)
        for start, patches in (
            (_NAME, galleries[expert].top),
            (_NAME + count + _GAP, galleries[expert].random),
        ):
            for place, patch in enumerate(patches):
                _draw_patch(axes, pictures, patch, trace.grid, start + place, 1.06 * row)
    fewer = (
        ""
        if len(shown) == routing.num_experts
        else f" {len(shown)} of {routing.num_experts} experts."
    )
    drawn = (
        "drawn as much as the expert reads of them"
        if soft
        else "drawn evenly from all that the expert computes"
    )
    share_of = "the weight that patches take" if soft else "choices"
    note = f"Left: at most one per image. Right: {drawn}. Under the number: its share of {share_of}.{fewer}"
    figure_heading(figure, f"{routing.name}: what each expert gets", note)
    return figure


def _draw_row(axes: Axes, gallery: ExpertGallery, row: int, share: float, num_experts: int) -> None:
    """The expert's chip, and a word where nothing is routed to it."""
    y, colour = 1.06 * row, expert_colour(gallery.expert, num_experts)
    add_text(
        axes, 0.65, y + 0.34, str(gallery.expert), ink_on(colour), SMALL + 1, bbox=chip(colour, 0.3)
    )
    add_text(axes, 0.65, y + 0.83, percent(share), SOFT, SMALL - 0.5)
    if not gallery.top:
        width = axes.get_xlim()[1] - _NAME
        axes.add_patch(Rectangle((_NAME, y + 0.02), width, 0.96, facecolor=BLANK, edgecolor="none"))
        axes.text(
            _NAME + 0.2,
            y + 0.5,
            "no patch goes to this expert",
            va="center",
            fontsize=SMALL,
            color=SOFT,
        )


def _draw_patch(
    axes: Axes, pictures: PictureSet, patch: GalleryPatch, grid: tuple[int, int], x: float, y: float
) -> None:
    """A crop of one unit, with its patch, which is in the middle, outlined in white on black."""
    crop = patch_crop(pictures.image(patch.image), grid, patch.patch)
    axes.imshow(
        crop, extent=(x + 0.02, x + 0.98, y + 0.98, y + 0.02), interpolation="nearest", zorder=2
    )
    side = 0.96 / 3  # one patch around it on each side
    corner = (x + 0.5 - side / 2, y + 0.5 - side / 2)
    for width, colour in ((1.5, "black"), (0.7, "white")):
        axes.add_patch(
            Rectangle(corner, side, side, fill=False, edgecolor=colour, linewidth=width, zorder=3)
        )
