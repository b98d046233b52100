"""curves.png (how a training went) and confusion.png (which class is taken for which) of a run, and their style.

Drawn on matplotlib's Figure objects, never through pyplot, whose global state isn't safe in a thread.
Colours: Okabe & Ito, "Color Universal Design" (2008), told apart under every common colour vision.
Axes: S points of one curve, n test images, C classes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.signal import lfilter
from sklearn.metrics import confusion_matrix

from moevision.files import read_csv, write_bytes_atomic
from moevision.words import percent

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
OKABE_ITO = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")
INK, SOFT, GRID = "#333333", "#808080", "#e8e8e8"
_TITLE: dict[str, Any] = {"fontsize": 10.5, "color": INK, "fontweight": "bold"}
_LABEL: dict[str, Any] = {"fontsize": 9, "color": INK}
_SMALL: dict[str, Any] = {"fontsize": 8, "color": INK}
_TICKS: dict[str, Any] = {"length": 0, "labelsize": 8, "labelcolor": INK}
_LOAD = re.compile(r"moe/(.+)/load_max")
# Classes up to which a confusion matrix has counts and percentages in its cells, and names at its axes.
_MAX_COUNTED = 5
_MAX_NUMBERED = 20
_MAX_NAMED = 60


class Curve(NamedTuple):
    """One metric at S steps."""

    steps: npt.NDArray[np.float64]  # [S]
    values: npt.NDArray[np.float64]  # [S]


def plot_curves(metrics_csv: Path, out: Path) -> None:
    """Draw training loss, validation accuracy, expert load and learning rate over the steps of one run.

    A metric that was never logged leaves its panel out; nothing is written where none was.
    """
    curves = read_metrics(metrics_csv)
    matches = {name: _LOAD.fullmatch(name) for name in curves}
    loads = {match[1]: curves[name] for name, match in matches.items() if match}
    rates = [curve for name, curve in curves.items() if name.startswith("lr")]

    panels: list[Callable[[Axes], None]] = []
    if "train/loss" in curves:
        panels.append(partial(_draw_loss, train=curves["train/loss"], val=curves.get("val/loss")))
    if "val/top1" in curves:
        panels.append(partial(_draw_accuracy, val=curves["val/top1"], test=curves.get("test/top1")))
    if loads:
        panels.append(partial(_draw_loads, loads=loads))
    if rates:
        panels.append(partial(_draw_rate, rate=rates[0]))
    if panels:
        last_step = max(float(curve.steps[-1]) for curve in curves.values())
        save(_draw_panels(panels, last_step), out)


def _draw_panels(panels: Sequence[Callable[[Axes], None]], last_step: float) -> Figure:
    columns = len(panels) if len(panels) < 4 else 2
    rows = len(panels) // columns
    figure = Figure(figsize=(5.4 * columns, 3.4 * rows), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]
    for number, draw in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        calm(axes)
        axes.set_xlim(0, max(1.0, last_step))
        is_in_last_row = number > len(panels) - columns
        if is_in_last_row:
            axes.set_xlabel("optimizer step", **_LABEL)
        draw(axes)
    return figure


def read_metrics(metrics_csv: Path) -> dict[str, Curve]:
    """Read a sparse metrics.csv: each logged metric as (steps [S], values [S]) by rising step.

    Of the test only its own metrics: the experts' loads have one name there and in validation.
    """
    rows = read_csv(metrics_csv)
    names = [name for name in (rows[0] if rows else ()) if name not in ("step", "epoch")]
    curves: dict[str, Curve] = {}
    for name in names:
        points = []
        for row in rows:
            is_load_of_test = name.startswith("moe/") and row.get("test/top1")
            if row["step"] and row[name] and not is_load_of_test:
                points.append((float(row["step"]), float(row[name])))
        if points:
            steps, values = np.array(sorted(points), dtype=np.float64).T
            curves[name] = Curve(steps, values)
    return curves


def moving_average(values: npt.NDArray[np.float64], span: float) -> npt.NDArray[np.float64]:
    """Exponential moving average with weight 2 / (span + 1) on the newest value, without start-up bias.

    Non-finite values are passed over: they give NaN (a gap in the line) and don't spoil what follows.
    """
    finite = np.isfinite(values)
    decay = 1 - 2.0 / (span + 1.0)
    total_weight = 1 - decay ** np.arange(1, finite.sum() + 1)
    smoothed = np.full(values.shape, np.nan)
    smoothed[finite] = lfilter([1 - decay], [1, -decay], values[finite]) / total_weight
    return smoothed


def calm(axes: Axes) -> None:
    """Light grid, no box, quiet ticks."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(**_TICKS)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def title(axes: Axes, text: str, note: str = "") -> None:
    """A left-aligned title; `note` stands behind it in grey and says how to read the panel."""
    axes.set_title(text, loc="left", **_TITLE, pad=20 if note else 8)
    if note:
        axes.text(0, 1.03, note, transform=axes.transAxes, fontsize=8, color=SOFT, va="bottom")


def save(figure: Figure, out: Path) -> None:
    """Write the figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    write_bytes_atomic(out, buffer.getvalue())


def _line(axes: Axes, curve: Curve, color: str, **style: Any) -> None:
    """A line; a lone point (a run of one epoch) would have no line, so it gets a dot."""
    points = curve.steps.size
    look: dict[str, Any] = {"color": color, "linewidth": 1.8, "clip_on": False}
    if points <= 30:
        look |= {"marker": "o", "markersize": 5.0 if points == 1 else 3.5}
    axes.plot(curve.steps, curve.values, **{**look, **style})


def _legend(axes: Axes, columns: int = 1) -> None:
    axes.legend(
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        ncols=columns,
        handlelength=1.4,
        columnspacing=1.2,
    )


def _dashed(axes: Axes, height: float) -> None:
    axes.axhline(height, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)


def _draw_loss(axes: Axes, train: Curve, val: Curve | None) -> None:
    span = max(1.0, 0.04 * train.steps.size)
    if span > 1:
        axes.plot(train.steps, train.values, color=BLUE, linewidth=0.8, alpha=0.22)
    smoothed = Curve(train.steps, moving_average(train.values, span))
    _line(axes, smoothed, BLUE, label="training")
    if val is not None:
        _line(axes, val, ORANGE, label="validation")
        _legend(axes)
    note = f"bold: moving average over about {span:.0f} points" if span > 1 else "every logged step"
    bad = int(np.sum(~np.isfinite(train.values)))
    if bad:
        note += f"; {bad} values weren't finite"
    title(axes, "loss", note)


def _draw_accuracy(axes: Axes, val: Curve, test: Curve | None) -> None:
    _line(axes, val, GREEN)
    values = val.values
    note = "validation"
    if np.isfinite(values).any():
        note += f", best {percent(np.nanmax(values))}"
    if test is not None:
        accuracy = test.values[-1]
        _dashed(axes, accuracy)
        note += f"; dashed: test {percent(accuracy)}"
        values = np.append(values, test.values)
    title(axes, "top-1 accuracy", note)

    # The axis ends at whole tenths around what is drawn.
    finite = values[np.isfinite(values)]
    lowest, highest = 0.0, 1.0
    if finite.size:
        lowest = min(0.9, np.floor(10 * finite.min()) / 10)
        highest = np.ceil(10 * finite.max()) / 10
    axes.set_ylim(lowest, max(lowest + 0.1, highest))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, 0, " %"))


def _draw_loads(axes: Axes, loads: dict[str, Curve]) -> None:
    for index, (layer, curve) in enumerate(loads.items()):
        round_, color = divmod(index, len(OKABE_ITO))
        style = (0, (3, 1.5)) if round_ else "-"
        _line(axes, curve, OKABE_ITO[color], label=f"block {layer}", linestyle=style)
    _dashed(axes, 1.0)
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
    labels: npt.NDArray[np.integer],
    predictions: npt.NDArray[np.integer],
    class_names: list[str],
    out: Path,
) -> None:
    """Draw, per true class (row), the share of its images that got each prediction (column).

    Up to 20 classes the cells carry percentages, up to 5 also counts; up to 60 the classes are named, beyond that the
    axes count them. `labels` and `predictions` are [n], `class_names` [C].
    """
    counts = confusion_matrix(labels, predictions, labels=range(len(class_names)))  # [C, C]
    images = counts.sum(axis=1)  # [C]
    with np.errstate(invalid="ignore"):
        share = counts / images[:, None]  # a class without images has a row of NaN
    side = float(np.clip(2.8 + 0.42 * len(class_names), 4.2, 10.5))
    figure = Figure(figsize=(side + 0.6, side), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    cells = _draw_cells(axes, share)
    _label_classes(axes, class_names, images)
    accuracy = percent(np.mean(np.equal(labels, predictions)))
    title(axes, f"{images.sum():,} images, {accuracy} correct")
    if len(class_names) <= _MAX_NUMBERED:
        _number_cells(axes, counts, share)
    else:
        _add_colour_bar(figure, axes, cells)
    save(figure, out)


def _draw_cells(axes: Axes, share: npt.NDArray[np.float64]) -> AxesImage:
    axes.set_facecolor("#d9d9d9")  # shows through where a class has no images
    axes.spines[:].set_visible(False)
    axes.tick_params(**_TICKS)
    norm = Normalize(0, 1)
    if len(share) > _MAX_NUMBERED:
        # With many classes no single mix-up is frequent; the square root keeps a few percent visible.
        norm = PowerNorm(0.5, 0, 1)
    masked = np.ma.masked_invalid(share)
    return axes.imshow(masked, cmap="Blues", norm=norm, interpolation="nearest")


def _label_classes(axes: Axes, class_names: Sequence[str], images: npt.NDArray[np.integer]) -> None:
    classes = len(class_names)
    unit = " (% of the true class)" if _MAX_COUNTED < classes <= _MAX_NUMBERED else ""
    axes.set_xlabel(f"predicted class{unit}", **_LABEL)
    if classes > _MAX_NAMED:
        axes.set_ylabel("true class", **_LABEL)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(10, integer=True))
        return

    axes.set_ylabel("true class (number of images)", **_LABEL)
    names = [name if len(name) <= 22 else f"{name[:21]}…" for name in class_names]
    # matplotlib would read a dollar sign as mathematics.
    names = [name.replace("$", r"\$") for name in names]
    counted = [f"{name} ({count:,})" for name, count in zip(names, images, strict=True)]
    size = 8 if classes <= 40 else 6
    axes.set_xticks(
        range(classes), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=size
    )
    axes.set_yticks(range(classes), counted, fontsize=size)


def _number_cells(
    axes: Axes, counts: npt.NDArray[np.integer], share: npt.NDArray[np.float64]
) -> None:
    """Write percentages into the cells; empty ones stay empty, so that what is mixed up stands out."""
    for row, column in np.argwhere(share > 0):  # not NaN
        value = share[row, column]
        text = "<1" if value < 0.005 else f"{100 * value:.0f}"
        if len(counts) <= _MAX_COUNTED:
            text = f"{counts[row, column]:,}\n{text} %"
        color = "white" if value > 0.55 else INK
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)


def _add_colour_bar(figure: Figure, axes: Axes, cells: AxesImage) -> None:
    bar = figure.colorbar(cells, ax=axes, shrink=0.6, aspect=32, pad=0.015)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, 0, " %"))
    bar.outline.set_visible(False)
    bar.ax.tick_params(**_TICKS)
    bar.set_label("share of the true class", **_SMALL)
