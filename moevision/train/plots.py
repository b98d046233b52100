"""The plots of a run, curves.png (metrics over training) and confusion.png (confusion matrix), and their style.

Figures are made as matplotlib `Figure` objects, never through pyplot, whose global state isn't thread-safe.
Colours: Okabe & Ito, "Color Universal Design" (2008), which people with any common colour vision can tell apart.

Shapes: S points of one curve, n test images, C classes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.signal import lfilter
from sklearn.metrics import confusion_matrix

from moevision.files import read_csv, write_bytes_atomic
from moevision.types import Floats, Ints, Keywords, Pixels
from moevision.words import percent

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
# Of layers, in this order.
OKABE_ITO = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")
INK, SOFT, GRID = "#333333", "#808080", "#e8e8e8"
_TITLE: Keywords = {"fontsize": 10.5, "color": INK, "fontweight": "bold"}
_LABEL: Keywords = {"fontsize": 9, "color": INK}
_SMALL: Keywords = {"fontsize": 8, "color": INK}
_TICKS: Keywords = {"length": 0, "labelsize": 8, "labelcolor": INK}
_LOAD_METRIC = re.compile(r"moe/(.+)/load_max")  # group 1: block index
# Most classes for which a confusion matrix shows:
_MAX_CLASSES_WITH_COUNTS = 5  # counts in its cells
_MAX_CLASSES_WITH_PERCENT = 20  # percentages in its cells
_MAX_CLASSES_WITH_NAMES = 60  # class names on its axes


class Curve(NamedTuple):
    """One metric at S steps."""

    steps: Floats  # [S]
    values: Floats  # [S]


def plot_curves(metrics_csv: Path, out: Path) -> None:
    """Draw training loss, validation accuracy, expert load and learning rate over the steps of one run.

    The panel of a metric that was never logged is left out; without any panel no file is written.
    """
    curves = read_metrics(metrics_csv)
    matches = {name: _LOAD_METRIC.fullmatch(name) for name in curves}
    loads = {match[1]: curves[name] for name, match in matches.items() if match}
    # Each group of parameters has a column of its own. They differ by a factor only: the first is drawn.
    rates = [curve for name, curve in curves.items() if name.startswith("lr")]

    panels: list[Callable[[Axes], None]] = []
    if "train/loss" in curves:
        panels.append(partial(_draw_loss, train=curves["train/loss"], val=curves.get("val/loss")))
    for metric, text in {"top1": "top-1 accuracy", "map": "mean average precision"}.items():
        if val := curves.get(f"val/{metric}"):
            test = curves.get(f"test/{metric}")
            panels.append(partial(_draw_accuracy, val=val, test=test, name=text))
    if loads:
        panels.append(partial(_draw_loads, loads=loads))
    if rates:
        panels.append(partial(_draw_rate, rate=rates[0]))
    if panels:
        last_step = max(curve.steps[-1] for curve in curves.values())
        save(_draw_panels(panels, last_step), out)


def _draw_panels(panels: Sequence[Callable[[Axes], None]], last_step: float) -> Figure:
    # Up to three panels stand side by side, four as 2 x 2.
    columns = len(panels) if len(panels) < 4 else 2
    rows = len(panels) // columns

    figure = Figure(figsize=(5.4 * columns, 3.4 * rows), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]

    for number, draw in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        style_axes(axes)
        axes.set_xlim(0, max(1.0, last_step))
        if number > len(panels) - columns:  # in the last row
            axes.set_xlabel("optimizer step", **_LABEL)
        draw(axes)
    return figure


def read_metrics(metrics_csv: Path) -> dict[str, Curve]:
    """Read each logged metric of a metrics.csv, whose cells are mostly empty, as a curve sorted by step.

    Expert loads logged by the test are skipped: validation logs them under the same names.
    """
    rows = read_csv(metrics_csv)
    names = [name for name in (rows[0] if rows else ()) if name not in ("step", "epoch")]
    curves: dict[str, Curve] = {}
    for name in names:
        points = []
        for row in rows:
            # Only the test's row has its accuracy.
            accuracy = row.get("test/top1") or row.get("test/map")
            is_test_load = name.startswith("moe/") and accuracy
            if row["step"] and row[name] and not is_test_load:
                points.append((float(row["step"]), float(row[name])))
        if points:
            steps, values = np.array(sorted(points), dtype=np.float64).T
            curves[name] = Curve(steps, values)
    return curves


def moving_average(values: Floats, span: float) -> Floats:
    """Exponential moving average with weight 2 / (span + 1) on the newest value, without start-up bias.

    Non-finite values become NaN (a gap in the line) and have no influence on later averages. `values` and result: [S].
    """
    is_finite = np.isfinite(values)
    decay = 1 - 2.0 / (span + 1.0)
    # The sum of the weights of the first 1, 2, … values.
    weight_sums = 1 - decay ** np.arange(1, is_finite.sum() + 1)

    smoothed = np.full(values.shape, np.nan)
    # The filter is y[t] = decay · y[t - 1] + (1 - decay) · x[t] from y = 0. Dividing by the sum of the weights removes
    # the bias towards this 0.
    smoothed[is_finite] = lfilter([1 - decay], [1, -decay], values[is_finite]) / weight_sums
    return smoothed


def style_axes(axes: Axes) -> None:
    """A plain style: light horizontal grid, no frame but the bottom line, no tick marks."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(**_TICKS)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def title(axes: Axes, text: str, note: str = "") -> None:
    """Set a left-aligned title; `note`, in grey below it, says how to read the panel."""
    axes.set_title(text, loc="left", **_TITLE, pad=20 if note else 8)
    if note:
        axes.text(0, 1.03, note, transform=axes.transAxes, fontsize=8, color=SOFT, va="bottom")


def save(figure: Figure, out: Path) -> None:
    """Write the figure as PNG, atomically: never half a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    write_bytes_atomic(out, buffer.getvalue())


def _line(axes: Axes, curve: Curve, color: str, **style: Any) -> None:
    """Draw a curve, with dots if it has few points: a single one, of a run of one epoch, would have no line to see."""
    num_points = curve.steps.size
    defaults: Keywords = {"color": color, "linewidth": 1.8, "clip_on": False}
    if num_points <= 30:
        defaults |= {"marker": "o", "markersize": 5.0 if num_points == 1 else 3.5}
    axes.plot(curve.steps, curve.values, **{**defaults, **style})


def _legend(axes: Axes, columns: int = 1) -> None:
    axes.legend(
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        ncols=columns,
        handlelength=1.4,
        columnspacing=1.2,
    )


def _dashed_line(axes: Axes, height: float) -> None:
    axes.axhline(height, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)


def _draw_loss(axes: Axes, train: Curve, val: Curve | None) -> None:
    span = max(1.0, 0.04 * train.steps.size)  # points: 4 % of the curve
    if span > 1:
        axes.plot(train.steps, train.values, color=BLUE, linewidth=0.8, alpha=0.22)
    smoothed = Curve(train.steps, moving_average(train.values, span))
    _line(axes, smoothed, BLUE, label="training")
    if val is not None:
        _line(axes, val, ORANGE, label="validation")
        _legend(axes)

    note = f"bold: moving average over about {span:.0f} points" if span > 1 else "every logged step"
    num_nonfinite = np.sum(~np.isfinite(train.values))
    if num_nonfinite:
        note += f"; {num_nonfinite} values weren't finite"
    title(axes, "loss", note)


def _draw_accuracy(axes: Axes, val: Curve, test: Curve | None, name: str) -> None:
    _line(axes, val, GREEN)
    values = val.values  # all that are drawn: [S], below with the test's
    note = "validation"
    if np.isfinite(values).any():
        note += f", best {percent(float(np.nanmax(values)))}"
    if test is not None:
        accuracy = test.values[-1]
        _dashed_line(axes, accuracy)
        note += f"; dashed: test {percent(accuracy)}"
        values = np.append(values, test.values)
    title(axes, name, note)

    # The axis spans the drawn values, rounded outwards to multiples of 0.1; where they are equal, 0.1 of the range.
    finite = values[np.isfinite(values)]
    lowest, highest = 0.0, 1.0
    if finite.size:
        lowest = min(0.9, np.floor(10 * finite.min()) / 10)
        highest = np.ceil(10 * finite.max()) / 10
    axes.set_ylim(lowest, max(lowest + 0.1, highest))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, 0, " %"))


def _draw_loads(axes: Axes, loads: dict[str, Curve]) -> None:
    for index, (layer, curve) in enumerate(loads.items()):
        # Layers beyond the number of colours repeat the colours with dashed lines.
        repeats, color_index = divmod(index, len(OKABE_ITO))
        style = (0, (3, 1.5)) if repeats else "-"
        _line(axes, curve, OKABE_ITO[color_index], label=f"block {layer}", linestyle=style)
    _dashed_line(axes, 1.0)

    # No load is below 1. The axis reaches 1.55 at least, so that small imbalances look small.
    highest = max(float(np.nanmax(curve.values, initial=1.0)) for curve in loads.values())
    axes.set_ylim(0.95, max(1.55, 1.08 * highest))
    _legend(axes, columns=1 if len(loads) <= 4 else 2)
    note = "busiest expert, per MoE layer; dashed: 1 = every expert equally busy"
    title(axes, "max/mean load", note)


def _draw_rate(axes: Axes, rate: Curve) -> None:
    _line(axes, rate, SOFT, marker="o" if rate.steps.size == 1 else "")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=True)
    axes.yaxis.get_offset_text().set_fontsize(8)
    title(axes, "learning rate")


def plot_confusion(
    labels: Ints,
    predictions: Ints,
    class_names: list[str],
    out: Path,
) -> None:
    """Draw the confusion matrix: of each true class (row), the fraction of images predicted as each class (column).

    Cells have percentages up to 20 classes, and counts too up to 5. The axes have class names up to 60 classes, and
    class indices beyond. `labels` and `predictions` are [n], `class_names` [C].
    """
    counts = confusion_matrix(labels, predictions, labels=range(len(class_names)))  # [C, C]
    images_per_class = counts.sum(axis=1)  # [C]
    with np.errstate(invalid="ignore"):
        row_fractions = counts / images_per_class[:, None]  # [C, C]; NaN for a class without images

    # A matrix of more classes is larger, up to the width of a page.
    side = np.clip(2.8 + 0.42 * len(class_names), 4.2, 10.5)  # inches
    figure = Figure(figsize=(side + 0.6, side), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    cells = _draw_cells(axes, row_fractions)
    _label_classes(axes, class_names, images_per_class)
    accuracy = percent(float(np.mean(labels == predictions)))
    title(axes, f"{images_per_class.sum():,} images, {accuracy} correct")

    if len(class_names) <= _MAX_CLASSES_WITH_PERCENT:
        _write_cells(axes, counts, row_fractions)
    else:
        _add_colour_bar(figure, axes, cells)
    save(figure, out)


def plot_examples(rows: Mapping[str, Sequence[Pixels | str]], out: Path) -> None:
    """Draw rows of images below their titles.

    An image is uint8 [3, S, S]; or, if it can't be read, the reason, which is written in its place.
    """
    if not rows:
        return
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(1.5 * columns, 1.8 * len(rows)), dpi=150, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, (text, images) in zip(grid, rows.items(), strict=True):
        title(row[0], _escape_mathtext(text))
        for axes, image in zip(row, images, strict=False):
            if isinstance(image, str):
                axes.text(0, 0.3, fill(_escape_mathtext(image), 20), **_SMALL)
            else:
                axes.imshow(image.transpose(1, 2, 0))
    save(figure, out)


def _escape_mathtext(text: str) -> str:
    """The text for matplotlib, which reads a formula between two dollar signs."""
    return text.replace("$", r"\$")


def _draw_cells(axes: Axes, row_fractions: Floats) -> AxesImage:
    """Colour the cells by `row_fractions` [C, C]."""
    axes.set_facecolor("#d9d9d9")  # visible in the rows of NaN
    axes.spines[:].set_visible(False)
    axes.tick_params(**_TICKS)
    exponent = 1.0
    if len(row_fractions) > _MAX_CLASSES_WITH_PERCENT:
        # With many classes no single confusion is frequent; a square-root scale keeps a few percent visible.
        exponent = 0.5
    norm = PowerNorm(exponent, 0, 1)
    return axes.imshow(row_fractions, cmap="Blues", norm=norm, interpolation="nearest")


def _label_classes(axes: Axes, class_names: Sequence[str], images_per_class: Ints) -> None:
    num_classes = len(class_names)
    only_percent = _MAX_CLASSES_WITH_COUNTS < num_classes <= _MAX_CLASSES_WITH_PERCENT
    unit = " (% of the true class)" if only_percent else ""
    axes.set_xlabel(f"predicted class{unit}", **_LABEL)
    if num_classes > _MAX_CLASSES_WITH_NAMES:
        axes.set_ylabel("true class", **_LABEL)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(10, integer=True))
        return

    axes.set_ylabel("true class (number of images)", **_LABEL)
    short_names = (name if len(name) <= 22 else f"{name[:21]}…" for name in class_names)
    names = list(map(_escape_mathtext, short_names))
    names_with_counts = [
        f"{name} ({count:,})" for name, count in zip(names, images_per_class, strict=True)
    ]
    fontsize = 8 if num_classes <= 40 else 6
    axes.set_xticks(
        range(num_classes),
        names,
        rotation=45,
        ha="right",
        rotation_mode="anchor",
        fontsize=fontsize,
    )
    axes.set_yticks(range(num_classes), names_with_counts, fontsize=fontsize)


def _write_cells(axes: Axes, counts: Ints, row_fractions: Floats) -> None:
    """Write percentages into the cells; cells of 0 images stay empty, so that confusions stand out."""
    for row, column in np.argwhere(row_fractions > 0):  # False for NaN
        fraction = row_fractions[row, column]
        text = "<1" if fraction < 0.005 else f"{100 * fraction:.0f}"
        if len(counts) <= _MAX_CLASSES_WITH_COUNTS:
            text = f"{counts[row, column]:,}\n{text} %"
        color = "white" if fraction > 0.55 else INK
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)


def _add_colour_bar(figure: Figure, axes: Axes, cells: AxesImage) -> None:
    bar = figure.colorbar(cells, ax=axes, shrink=0.6, aspect=32, pad=0.015)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, 0, " %"))
    bar.outline.set_visible(False)
    bar.ax.tick_params(**_TICKS)
    bar.set_label("share of the true class", **_SMALL)
