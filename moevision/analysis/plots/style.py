"""The calm style that all routing figures share: sizes, type, titles, expert chips, colour bars.

Figures are drawn on matplotlib's Figure objects, never through pyplot, whose global state isn't safe in a thread, and
are laid out for print: a figure is one column (3.5 in) or one page (7.2 in) wide at its natural size (wider only for
many experts), with no text under 6 points but for numbers in crowded cells.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import Formatter
from PIL import Image

from moevision.analysis.palette import BLACK, EXPERT_COLOURS, FADED, HIGHLIGHT, NEUTRAL, WHITE
from moevision.errors import UserError
from moevision.files import write_bytes_atomic

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

AMOUNT: Final = LinearSegmentedColormap.from_list("moevision_amount", ["#F5F8FA", "#9CC5DF", "#2F83B5", "#0B3C5D"])
"""From nothing (nearly white) to much (dark blue); also right in grey print."""


NOTEBOOK_DPI = 110
"""Sharp enough on a screen, and small in a saved notebook."""
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
    figure = NotebookFigure(figsize=(width_inches, height_inches), dpi=200, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05, wspace=0.03, hspace=0.03)  # type: ignore[union-attr, call-arg]
    return figure


def figure_png(figure: Figure, dots_per_inch: float | None = None) -> bytes:
    """The figure as PNG; `dots_per_inch` other than its own makes it larger or smaller."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white", dpi=dots_per_inch or "figure")
    return buffer.getvalue()


def save_figure(figure: Figure, out: str | Path) -> None:
    """Write the figure as PNG, whole or not at all."""
    write_bytes_atomic(Path(out), figure_png(figure))


def heading(figure: Figure, text: str, note: str = "") -> None:
    """What the figure shows, in bold, and below it in grey how to read it, on room that is added above the figure.

    Lines are broken to the figure's width. Call it once, after the figure has its size.
    """
    width, height = figure.get_size_inches()
    measure = min(width, PAGE_INCHES) - 0.15  # a longer line is hard to read
    bold = wrap(text, measure, FontProperties(size=LARGE, weight="bold"))
    plain = wrap(note, measure, FontProperties(size=NORMAL - 0.5))
    room = 0.1 + _LINE_INCHES * (len(bold) + len(plain))
    figure.set_size_inches(width, height + room)
    figure.get_layout_engine().set(rect=(0, 0, 1, height / (height + room)))  # type: ignore[union-attr, call-arg]
    for place, line in enumerate([*bold, *plain]):
        y = 1 - (0.06 + _LINE_INCHES * place) / (height + room)
        is_bold = place < len(bold)
        figure.text(
            0.05 / width, y, line, va="top", in_layout=False, parse_math=False, color=INK if is_bold else SOFT,
            fontsize=LARGE if is_bold else NORMAL - 0.5, fontweight="bold" if is_bold else "normal",
        )  # fmt: skip


def wrap(text: str, width_inches: float, font: FontProperties) -> list[str]:
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


def calm(axes: Axes, grid: Literal["x", "y", "both"] = "y") -> None:
    """Light grid, no box, quiet ticks: the data is the darkest thing in the figure."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.grid(axis=grid, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=SMALL, labelcolor=INK)


def bare(axes: Axes) -> None:
    """No ticks and no box, for images and maps."""
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def colour_bar(
    axes: Axes | Sequence[Axes], mappable: ScalarMappable, label: str, formatter: Formatter | str
) -> Colorbar:
    """A thin bar beside `axes` (one, or all that share it), named with its unit."""
    parent = axes if isinstance(axes, Axes) else list(axes)
    figure = axes.figure if isinstance(axes, Axes) else next(iter(axes)).figure
    aspect = float(np.clip(9 * figure.get_figure(root=True).get_size_inches()[1], 20, 60))  # about 0.08 in wide
    bar = figure.colorbar(mappable, ax=parent, shrink=0.75, aspect=aspect, pad=0.02, format=formatter)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL, labelcolor=INK, length=0)
    bar.set_label(label, fontsize=SMALL, color=SOFT)
    return bar


def expert_chips(axes: Axes, num_experts: int, side: str = "top") -> None:
    """Name the columns (or rows) 0..E - 1 of a map by chips: the expert's colour and its number.

    Of many experts every fourth is named, without a chip.

    Args:
        axes: whose x (or y) data coordinates are expert indices.
        num_experts: E.
        side: "top" names columns, "left" rows.
    """
    top = side == "top"
    (axes.set_xticks if top else axes.set_yticks)([])
    crowded = num_experts > _CHIPS
    for expert in range(0, num_experts, 4 if crowded else 1):
        colour = expert_colour(expert, num_experts)
        axes.annotate(
            str(expert), (expert, 1.0) if top else (0.0, expert), (0, 7) if top else (-8, 0),
            xycoords=("data", "axes fraction") if top else ("axes fraction", "data"), textcoords="offset points",
            ha="center", va="center", fontsize=SMALL, color=INK if crowded else ink_on(colour), annotation_clip=False,
            bbox=None if crowded else {"boxstyle": "round,pad=0.25", "facecolor": colour, "edgecolor": "none"},
        )  # fmt: skip


def percent(share: float, _position: int | None = None) -> str:
    """A tick's label: a share as a percentage, with as many decimals as it has."""
    return f"{100 * share:.3g}%"


def hex_of(colour: npt.ArrayLike) -> str:
    """`#RRGGBB` of a colour with channels in [0, 1]; an alpha channel is ignored."""
    return "#" + "".join(f"{round(float(channel) * 255):02X}" for channel in np.asarray(colour)[:3])


def rgb_of(colour: str) -> npt.NDArray[np.float64]:
    """[3] channels in [0, 1] of a colour's name."""
    return np.array(to_rgb(colour), dtype=np.float64)


def expert_colour(expert: int, num_experts: int, highlight: int | None = None) -> str:
    """The colour of one expert's cells, bars and chips, as `#RRGGBB`.

    Args:
        expert: index in 0..num_experts - 1.
        num_experts: E of the layer; it decides between a palette and numbers on grey.
        highlight: the one expert to show; all others fade.

    Raises:
        UserError: an expert that the layer doesn't have.
    """
    for index in (expert,) if highlight is None else (expert, highlight):
        if not 0 <= index < num_experts:
            raise UserError(f"There is no expert {index}: the layer has experts 0 to {num_experts - 1}.")
    if highlight is not None and expert != highlight:
        return FADED
    if num_experts <= len(EXPERT_COLOURS):
        return EXPERT_COLOURS[expert]
    return HIGHLIGHT if expert == highlight else NEUTRAL


def expert_colours(num_experts: int) -> list[str]:
    """[E] colours of a layer's experts, in order."""
    return [expert_colour(expert, num_experts) for expert in range(num_experts)]


def ink_on(colour: str) -> str:
    """Black or white, whichever is read more easily on `colour` (`#RRGGBB`).

    The better of the two always has a contrast of at least √21 ≈ 4.58, more than the 4.5 of WCAG's level AA.
    """
    return max(WHITE, BLACK, key=lambda ink: contrast(ink, colour))


def contrast(one: str, other: str) -> float:
    """Contrast of two colours (`#RRGGBB`), from 1 (equal) to 21 (black on white), as WCAG 2.2 defines it.

    https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio
    """
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    """WCAG relative luminance of `#RRGGBB`, from 0 (black) to 1 (white)."""
    red, green, blue = (_linear(int(colour[start : start + 2], 16) / 255) for start in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _linear(channel: float) -> float:
    """An sRGB channel in [0, 1] with its gamma undone."""
    return channel / 12.92 if channel <= 0.04045 else float(((channel + 0.055) / 1.055) ** 2.4)
