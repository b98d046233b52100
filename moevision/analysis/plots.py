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
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.typing import ColorType
from PIL import Image

from moevision.analysis.describe import ExpertGallery, layer_gallery
from moevision.analysis.images import PictureSet, patch_crop
from moevision.analysis.readings import Load
from moevision.analysis.trace import LayerTrace, RoutingTrace
from moevision.errors import escape_controls
from moevision.layers.routing import Kind as RoutingKind
from moevision.types import Flags, Floats, Pixels
from moevision.words import percent

EXPERT_COLOURS = (
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

NEUTRAL = "#C9CDD2"  # every expert of a layer with more than eight
COLUMN_INCHES = 3.5
PAGE_INCHES = 7.2
INK = "#333333"
SOFT = "#6B6B6B"
RULE = "#BBBBBB"
GRID = "#E8E8E8"
BLANK = "#F1F2F4"  # cells that hold nothing worth a colour
SMALL, NORMAL, LARGE = 6.5, 7.5, 8.5  # points
Style = dict[str, Any]  # keyword arguments of matplotlib
SOFT_TEXT: Style = {"fontsize": SMALL, "color": SOFT}
_LINE_INCHES = 0.145
_CHIPS = 20  # experts: up to here each has a chip at the edge of a map

BELOW_ABOVE = LinearSegmentedColormap.from_list(
    "moevision_below_above", ["#8A3F00", "#D98A4E", "#F7F7F7", "#5FA3CC", "#00466F"]
)
"""Brown below, white at, blue above the value to compare with; told apart under every common colour vision."""

NOTEBOOK_DPI = 110  # sharp enough on a screen, and small in a saved notebook
_LARGE = 100_000  # bytes


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
    line_inches = (min(width, PAGE_INCHES) - 0.15) / 1.075
    bold = FontProperties(size=LARGE, weight="bold")
    plain = FontProperties(size=NORMAL - 0.5)
    lines = [(line, bold, INK) for line in wrap_text(text, line_inches, bold)]
    lines += [(line, plain, SOFT) for line in wrap_text(note, line_inches, plain)]

    total = height + 0.1 + _LINE_INCHES * len(lines)
    figure.set_size_inches(width, total)
    figure.get_layout_engine().set(rect=(0, 0, 1, height / total))  # type: ignore[union-attr, call-arg]
    x = 0.05 / width
    y = 1 - 0.06 / total
    for line, font, colour in lines:
        style: Style = {"va": "top", "font": font, "color": colour}
        figure.text(x, y, line, in_layout=False, parse_math=False, **style)
        y -= _LINE_INCHES / total


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
        axes.set_title(note, loc="right", pad=4, **SOFT_TEXT)


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
    axes.text(x, y, text, ha="center", va="center", fontsize=size, color=ink, **style)


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
        style: Style = {"color": ink_on(colour), "bbox": chip(colour)}
        if crowded:
            style = {"color": INK}
        axes.annotate(
            str(expert),
            (expert, 1.0),
            (0, 7),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=SMALL,
            annotation_clip=False,
            **style,
        )


def rgb_of(colour: ColorType) -> Floats:
    """[3] channels in [0, 1] of a colour."""
    return np.array(to_rgb(colour))


def expert_colour(expert: int, num_experts: int) -> str:
    """`#RRGGBB` of one expert of E; of many, none has a colour of its own."""
    return EXPERT_COLOURS[expert] if num_experts <= len(EXPERT_COLOURS) else NEUTRAL


def expert_colours(num_experts: int) -> list[str]:
    """[E] colours of a layer's experts, in order."""
    return [expert_colour(expert, num_experts) for expert in range(num_experts)]


def ink_on(colour: ColorType) -> str:
    """Black or white, whichever is read more easily on `colour`, by WCAG's relative luminance L.

    The contrasts (L + 0.05) / 0.05 and 1.05 / (L + 0.05) are equal at L = √(1.05 · 0.05) − 0.05 ≈ 0.179; there they are
    √21 ≈ 4.58, more than level AA's 4.5.
    """
    channels = rgb_of(colour)
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    return "#000000" if luminance > (1.05 * 0.05) ** 0.5 - 0.05 else "#FFFFFF"


# ---- figures of numbers

_NUMBERED = 16  # experts: up to here every bar and cell carries its number
_LONGEST_NAME = 28
_MOST_CLASSES = 25  # of more, those with the largest effect are shown
_CONTROL = "#9AA0A6"


def _as_floats(arrays: Sequence[npt.ArrayLike]) -> list[Floats]:
    return [np.asarray(array, dtype=np.float64) for array in arrays]


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
    loads = _as_floats(counts)
    requests = loads if requested is None else _as_floats(requested)
    kinds = kinds or ["token_choice"] * len(loads)
    experts = max(len(load) for load in loads)
    layers = len(loads)

    most_columns = 4
    if experts > 8 or max(map(len, layer_names)) > 6:  # a long name needs room beside its ratio
        most_columns = 2
    columns = min(layers, most_columns)
    rows = -(-layers // columns)
    wide = columns > 1 or experts > 8
    figure = new_figure(PAGE_INCHES if wide else COLUMN_INCHES, 0.25 + 1.5 * rows)
    highest = max(float((request / request.sum()).max()) for request in requests)
    for index, (name, load, kind) in enumerate(zip(layer_names, loads, kinds, strict=True)):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw_load(axes, load, requests[index], highest)
        ratio, unit = ("load", "choices") if kind != "soft" else ("weight", "weight")
        panel_title(axes, name, f"max/mean {ratio} {load.max() / load.mean():.2f}")
        if index % columns == 0:
            axes.set_ylabel(f"share of {unit}", **SOFT_TEXT)
        if index >= layers - columns:
            axes.set_xlabel("expert", **SOFT_TEXT)

    equal = ""
    if len({len(load) for load in loads}) == 1:
        equal = f", 1 ÷ {experts} = {percent(1 / experts)}"
    notes = [f"Dashed: equal load{equal}. Expert numbers of two layers are unrelated."]
    if any(np.any(request > load) for request, load in zip(requests, loads, strict=True)):
        notes.append("Hollow: dropped by capacity.")
    if "expert_choice" in kinds:
        notes.append("Where experts choose, all take as many tokens of every image.")
    if "soft" in kinds:
        notes.append(
            "Soft MoE: all compute as many slots; bars show the weight that patches take from each."
        )
    title = "How busy each expert is"
    if set(kinds) == {"soft"}:
        title = "How much comes from each expert"
    figure_heading(figure, title, " ".join(notes))
    return figure


def _draw_load(axes: Axes, load: Floats, requested: Floats, highest: float) -> None:
    experts = len(load)
    shares = load / requested.sum()
    colours = expert_colours(experts)
    dropped = requested > load
    quiet_axes(axes)
    axes.bar(
        range(experts),
        requested / requested.sum(),
        0.78,
        color="none",
        edgecolor=SOFT,
        linewidth=0.5 * dropped,
    )
    axes.bar(range(experts), shares, 0.78, color=colours)
    axes.axhline(1 / experts, color=INK, linewidth=0.9, linestyle=(0, (4, 2.5)))
    axes.set(ylim=(0, max(1.18 * highest, 1.4 / experts)), xlim=(-0.6, experts - 0.4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    if experts > _NUMBERED:
        axes.set_xticks(range(0, experts, 4))
        return
    axes.set_xticks(range(experts))
    for expert, share in enumerate(shares):
        text = f"{100 * share:.0f}"
        if 0 < share < 0.005:
            text = "<1"
        y, ink = 0.0, ink_on(colours[expert])
        if share <= 0.3 / experts:  # the bar is too low for a number, which stands above it
            y, ink = share, INK
        axes.annotate(
            text,
            (expert, y),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=SMALL - 0.5,
            color=ink,
        )


def plot_class_experts(
    share: npt.ArrayLike,
    significant: npt.ArrayLike,
    class_names: Sequence[str],
    *,
    layer_name: str,
    excess: npt.ArrayLike,
    threshold: float,
    kind: RoutingKind = "token_choice",
) -> Figure:
    """Class × expert heatmap of one layer: shares [C, E] in the cells, colour only where a cell stands above the null.

    Classes are grouped by the expert that they use most above the mean, so that a pattern shows as a diagonal; one
    without images (NaN) is left out. `excess` [C, E] is the share minus the mean over classes; `threshold` the smallest
    |excess| that counts as significant, to be stated.
    """
    shares = np.asarray(share, dtype=np.float64)
    flags = np.asarray(significant, dtype=bool)
    has_images = np.isfinite(shares).all(1)
    shares = shares[has_images]
    flags = flags[has_images]
    above = np.asarray(excess, dtype=np.float64)[has_images]
    names = np.array(class_names, dtype=object)[has_images]

    # Classes with a significant cell come first, larger effects before smaller ones.
    effect = np.abs(above).max(1) + np.where(flags, np.abs(above), 0).max(1)
    largest = np.sort(np.argsort(-effect, kind="stable")[:_MOST_CLASSES])
    by_expert = np.lexsort((-above[largest].max(1), above[largest].argmax(1)))
    order = largest[by_expert]
    figure = _share_map(shares[order], above[order], flags[order], names[order].tolist())

    unit = "choices" if kind == "token_choice" else "weights"
    cells = f"Share of a class's {unit}."
    if shares.shape[1] <= _NUMBERED:
        cells = f"Cells: share of the class's {unit} (%)."
    result = (
        "No cell stands above chance over images, so none is coloured: no class was found to use an expert more than "
        "others do."
    )
    if flags.any():
        result = (
            f"Coloured: differs from the mean by {100 * threshold:.1f} points or more, more than chance over images "
            f"gives in any cell ({int(flags.sum())} of {flags.size} cells)."
        )
    if len(order) < len(shares):
        result += f" {len(order)} of {len(shares)} classes, those with the largest effect."
    # Without the load two busy experts and two classes look like specialization.
    overall = (shares - above).mean(0)  # [E]
    load = Load(overall / overall.sum(), shares).words
    title = f"{layer_name}: which classes use which expert"
    figure_heading(figure, title, f"{cells} {result} Load: {load}.")
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

    whole = "the part's area"
    bracket = "the part's area"
    if kind != "token_choice":
        whole = "what experts read of the part"
        bracket = "the part's share of all that they read"
    note = f"Cells: share of {whole} (%); colour: against all patches. In brackets: {bracket}. Nothing is tested here."
    figure_heading(figure, f"{layer_name}: which parts go to which expert", note)
    return figure


def _share_map(shares: Floats, above: Floats, flags: Flags, names: Sequence[str]) -> Figure:
    """Rows x experts: shares written in the cells, the excess as colour where flagged, grey elsewhere."""
    rows, experts = shares.shape
    numbered = experts <= _NUMBERED
    short = [
        name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…" for name in names
    ]
    label_inches = 0.075 * max(map(len, short)) + 0.1
    cell_inches = 0.29 if numbered else 0.1
    width = np.clip(label_inches + cell_inches * experts + 0.85, COLUMN_INCHES, 12.0)
    figure = new_figure(float(width), max(1.0, 0.19 * rows + 0.55))
    axes = figure.add_subplot()
    axes.set_facecolor(BLANK)

    reach = max(0.01, float(np.abs(np.where(flags, above, 0)).max()))
    norm = TwoSlopeNorm(0, -reach, reach)
    coloured = np.ma.masked_where(~flags, above)
    cells = axes.imshow(coloured, cmap=BELOW_ABOVE, norm=norm, aspect="auto")
    axes.spines[:].set_visible(False)
    grid_lines(axes, rows, experts, linewidth=0.8)
    if numbered:
        digits = 1 if np.ptp(shares) < 0.03 else 0  # whole numbers would all be the same
        for row, expert in np.ndindex(rows, experts):
            ink = SOFT
            if flags[row, expert]:
                ink = ink_on(BELOW_ABOVE(norm(above[row, expert])))
            add_text(axes, expert, row, f"{100 * shares[row, expert]:.{digits}f}", ink)
    axes.set_yticks(range(rows), short, parse_math=False)
    axes.tick_params(length=0, labelsize=SMALL, labelcolor=INK)
    expert_chips(axes, experts)
    if flags.any():
        _colour_bar(figure, axes, cells)
    return figure


def _colour_bar(figure: Figure, axes: Axes, cells: AxesImage) -> None:
    aspect = float(np.clip(9 * figure.get_size_inches()[1], 20, 60))  # about 0.08 in wide
    bar = figure.colorbar(
        cells, ax=axes, shrink=0.75, aspect=aspect, pad=0.02, format=FuncFormatter(_points)
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL, labelcolor=INK, length=0)
    bar.set_label("difference (points)", **SOFT_TEXT)


def grid_lines(axes: Axes, rows: int, columns: int, linewidth: float) -> None:
    """White lines between cells whose middles are at whole numbers."""
    style: Style = {"color": "white", "linewidth": linewidth}
    axes.vlines(np.arange(columns - 1) + 0.5, -0.5, rows - 0.5, **style)
    axes.hlines(np.arange(rows - 1) + 0.5, -0.5, columns - 0.5, **style)


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
    effects = _as_floats(deltas)
    chance = _as_floats(controls)
    columns = min(2 if len(effects[0]) > 8 else 3, len(effects))
    rows = -(-len(effects) // columns)
    figure = new_figure(PAGE_INCHES, 0.55 + 1.75 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(effects) :]:
        axes.set_visible(False)

    least = max(1e-6, 0.2 * max(float(np.ptp(effect)) for effect in effects))
    for index, effect in enumerate(effects):
        axes = grid.flat[index]
        _draw_effects(axes, effect, chance[index], class_names, least)
        panel_title(axes, layer_names[index])
        axes.set_xlabel("expert taken away", **SOFT_TEXT)
        if index % columns == 0:
            axes.set_ylabel("change of logit", **SOFT_TEXT)

    mark: Style = {"linestyle": "none", "marker": "o", "color": INK}
    control_mark: Style = {"linestyle": "none", "marker": "_", "color": _CONTROL}
    figure.legend(
        handles=[
            Line2D([], [], markersize=5, label="mean of the classes", **mark),
            Line2D([], [], markersize=2.5, alpha=0.55, label="one class", **mark),
            Line2D([], [], markersize=4, label="as many choices at random", **control_mark),
        ],
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
    reach = 0.16 if classes > 1 else 0
    spread = np.linspace(-reach, reach, classes)  # classes stand side by side
    for expert in range(experts):
        by_class = effect[expert]
        by_chance = control[expert]
        colour = EXPERT_COLOURS[expert] if experts <= len(EXPERT_COLOURS) else INK
        x = expert + 0.28
        axes.plot(x, by_chance.mean(), "_", color=_CONTROL, markersize=7, markeredgewidth=2.2)
        axes.vlines(x, by_chance.min(), by_chance.max(), color=_CONTROL, linewidth=1)
        x = expert - 0.12
        axes.plot(x + spread, by_class, "o", color=colour, markersize=2.2, alpha=0.55)
        axes.plot(x, by_class.mean(), "o", color=colour, markersize=5, markeredgecolor="white")
        label = int(np.abs(by_class).argmax())
        if abs(by_class[label]) >= least:
            axes.annotate(
                class_names[label],
                (x + spread[label], by_class[label]),
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
# In patches: between top and random ones, the width of the expert's name, the height of a row.
_GAP, _NAME, _ROW = 0.5, 1.5, 1.06
_OVERLAY_NOTES: dict[RoutingKind, str] = {
    "token_choice": "Colour and number: the patch's first choice; opacity: grows with its gate weight; × dropped by "
    "capacity.",
    "expert_choice": "Experts choose: colour and number are the expert with the largest weight of those that took the "
    "patch; opacity: grows with that weight; · no expert took it.",
    "soft": "Soft MoE: colour and number are the expert that the patch takes most from; opacity: grows with that "
    "weight, from an equal share to all of it.",
}


def plot_overlay(picture: Pixels, trace: RoutingTrace, image: int = 0) -> Figure:
    """An image [S, S, 3] as the model saw it, and per MoE layer the expert of every patch.

    Colour and number are the expert, opacity is its gate weight; `image` is the picture's number in the trace.
    """
    panels = 1 + len(trace.layers)
    columns = min(panels, _PER_ROW)
    rows = -(-panels // columns)
    side = max(PAGE_INCHES / max(columns, 3), 0.13 * max(trace.grid) + 0.2)
    figure = new_figure(side * columns, (side + 0.12) * rows)
    axes = figure.add_subplot(rows, columns, 1)
    axes.imshow(picture)
    hide_axes(axes)
    panel_title(axes, "image")
    for number, layer in enumerate(trace.layers, start=2):
        axes = figure.add_subplot(rows, columns, number)
        of_image = layer.select(slice(image, image + 1))
        _draw_experts(axes, picture, of_image, trace.grid)
        panel_title(axes, layer.name)

    kinds = {layer.kind for layer in trace.layers}
    notes = [note for kind, note in _OVERLAY_NOTES.items() if kind in kinds]
    notes.append("Equal colours in two layers are unrelated experts.")
    title = f"Where each patch goes: {verdict_on(trace, image)}"
    figure_heading(figure, title, " ".join(notes))
    return figure


def _draw_experts(axes: Axes, picture: Pixels, layer: LayerTrace, grid: tuple[int, int]) -> None:
    """The first choice of each patch over the image, of a layer's routing of that image alone."""
    rows, columns = grid
    first = layer.expert_index[0, :, 0]  # [P]
    palette = np.array([rgb_of(colour) for colour in expert_colours(layer.num_experts)])
    colours = palette[first]  # [P, 3]
    opacity = _opacity(layer)[:, None]  # [P, 1]
    overlay = np.concatenate([colours, opacity], axis=1)  # [P, 4]
    # The image pale and without its colours, so that those on top mean one thing: [S, S] in [0.55, 1].
    luma = picture.astype(np.float64) @ (0.299, 0.587, 0.114) / 255
    pale = 0.55 + 0.45 * luma

    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)  # data units are patches
    axes.imshow(pale, cmap="gray", vmin=0, vmax=1, extent=extent)
    axes.imshow(overlay.reshape(rows, columns, 4), interpolation="nearest", extent=extent)
    hide_axes(axes)
    grid_lines(axes, rows, columns, linewidth=0.5)

    tiles = pale.reshape(rows, len(pale) // rows, columns, -1)
    patch_luma = tiles.mean((1, 3)).reshape(-1, 1)  # [P, 1]
    shades = opacity * colours + (1 - opacity) * patch_luma
    _number_patches(axes, layer, shades.reshape(rows, columns, 3))


def _number_patches(axes: Axes, layer: LayerTrace, shades: Floats) -> None:
    """The number of each patch's first choice, black or white by the shade behind it, [rows, columns, 3]."""
    rows, columns, _ = shades.shape
    first = layer.expert_index[0, :, 0]
    kept = layer.kept[0, :, 0]
    unrouted = "·" if layer.kind == "expert_choice" else "×"
    width = axes.figure.get_figure(root=True).get_size_inches()[0]
    points = 72 * width / _PER_ROW / columns
    size = float(np.clip(0.5 * points, 4.5, 8.5))
    for patch, (row, column) in enumerate(np.ndindex(rows, columns)):
        text = str(first[patch]) if kept[patch] else unrouted
        add_text(axes, column, row, text, ink_on(tuple(shades[row, column])), size)


def _opacity(layer: LayerTrace) -> Floats:
    """[P] of the first choices of one image, by their weights; 0 where no expert computed them."""
    weight = layer.combine_weight[0, :, 0]
    if layer.kind == "soft":  # the largest of E weights that sum to 1 is never below 1 / E
        weight = (layer.num_experts * weight - 1) / max(1, layer.num_experts - 1)
    opacity = 0.12 + 0.75 * np.clip(weight, 0, 1)
    return np.where(layer.kept[0, :, 0], opacity, 0.0)


def verdict_on(trace: RoutingTrace, image: int) -> str:
    """What the image is and what the model takes it for."""
    guess = int(trace.predictions[image])
    label = int(trace.labels[image])
    facts = []
    if label >= 0:
        facts.append(trace.class_names[label])
    if guess >= 0:  # a model without a head predicts nothing
        names = trace.prediction_names or trace.class_names
        facts.append(f"predicted {names[guess]} ({percent(trace.probabilities[image, guess], 0)})")
    return ", ".join(facts) or escape_controls(trace.picture_names[image])


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
    if experts is None:
        busiest = np.argsort(-loads, kind="stable")[:_MOST_EXPERTS]
        experts = np.sort(busiest).tolist()

    width = _NAME + 2 * count + _GAP
    height = _ROW * len(experts)
    figure = new_figure(PAGE_INCHES, PAGE_INCHES / width * (height + 0.55))
    axes = figure.add_subplot()
    axes.set(xlim=(0, width), ylim=(height, -0.5), aspect="equal")
    hide_axes(axes)
    soft = routing.kind == "soft"
    second = _NAME + count + _GAP  # where random patches begin
    style: Style = {"fontsize": SMALL + 0.5, "fontweight": "bold", "color": INK}
    axes.text(_NAME + 0.03, -0.15, "read most" if soft else "largest gate weight", **style)
    axes.text(second + 0.03, -0.15, "random patches", **style)
    for row, expert in enumerate(experts):
        gallery = galleries[expert]
        y = _ROW * row
        share = float(loads[expert] / max(1, loads.sum()))
        _draw_expert(axes, gallery, y, share, routing.num_experts)
        for start, patches in ((_NAME, gallery.top), (second, gallery.random)):
            for index, patch in enumerate(patches):
                crop = patch_crop(pictures.image(patch.image), trace.grid, patch.patch)
                _draw_patch(axes, crop, start + index, y)

    drawn = "drawn evenly from all that the expert computes"
    unit = "choices"
    if soft:
        drawn = "drawn as much as the expert reads of them"
        unit = "the weight that patches take"
    note = f"Left: at most one per image. Right: {drawn}. Under the number: its share of {unit}."
    if len(experts) < routing.num_experts:
        note += f" {len(experts)} of {routing.num_experts} experts."
    figure_heading(figure, f"{routing.name}: what each expert gets", note)
    return figure


def _draw_expert(
    axes: Axes, gallery: ExpertGallery, y: float, share: float, num_experts: int
) -> None:
    """The expert's chip, and a word where nothing is routed to it."""
    colour = expert_colour(gallery.expert, num_experts)
    box = chip(colour, 0.3)
    add_text(axes, 0.65, y + 0.34, str(gallery.expert), ink_on(colour), SMALL + 1, bbox=box)
    add_text(axes, 0.65, y + 0.83, percent(share), SOFT, SMALL - 0.5)
    if not gallery.top:
        width = axes.get_xlim()[1] - _NAME
        axes.add_patch(Rectangle((_NAME, y + 0.02), width, 0.96, facecolor=BLANK, edgecolor="none"))
        text = "no patch goes to this expert"
        axes.text(_NAME + 0.2, y + 0.5, text, va="center", **SOFT_TEXT)


def _draw_patch(axes: Axes, crop: Pixels, x: float, y: float) -> None:
    """A crop of one unit, with its patch, which is in the middle, outlined in white on black."""
    extent = (x + 0.02, x + 0.98, y + 0.98, y + 0.02)
    axes.imshow(crop, extent=extent, interpolation="nearest", zorder=2)
    side = 0.96 / 3  # one patch around it on each side
    corner = (x + 0.5 - side / 2, y + 0.5 - side / 2)
    frame = Rectangle(corner, side, side, fill=False, edgecolor="white", linewidth=0.7, zorder=3)
    frame.set_path_effects([withStroke(linewidth=1.5, foreground="black")])
    axes.add_patch(frame)


# ---- what an answer rests on

_STRONGEST = 0.85  # opacity of the strongest patch, under which the photo stays visible


def heat_image(pixels: Pixels, shares: Floats, grid: tuple[int, int]) -> Image.Image:
    """A photo [H, W, 3] in grey, and on it each patch by its share [P]: blue above 0, brown below.

    The largest share has the strongest colour, so that two images can't be compared.
    """
    relative = shares / max(np.abs(shares).max(), np.finfo(np.float32).tiny)  # -1 to 1
    colours = BELOW_ABOVE(0.5 + np.sign(relative) / 3, bytes=True)  # [P, 4]
    colours[:, 3] = np.round(255 * _STRONGEST * np.abs(relative))
    patches = Image.fromarray(colours.reshape(*grid, 4))
    photo = Image.fromarray(pixels).convert("L").convert("RGBA")
    overlay = patches.resize(photo.size, Image.Resampling.NEAREST)
    return Image.alpha_composite(photo, overlay).convert("RGB")
