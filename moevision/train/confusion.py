"""confusion.png of a run folder: which class is taken for which, and how often.

Axis legend: n test images, C classes.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moevision.errors import UserError
from moevision.train.plots import INK, SOFT, save, title

_MAX_NUMBERED, _MAX_NAMED = (
    20,
    60,
)  # classes: cells carry numbers up to the first, axes names up to the second
_LONGEST_NAME = 22
_LISTED_MIXUPS = 15


def plot_confusion(
    labels: npt.NDArray[np.integer], predictions: npt.NDArray[np.integer], class_names: list[str], out: Path
) -> None:
    """Draw, per true class (row), the share of its images that got each prediction (column).

    Up to 20 classes the cells carry percentages and up to 60 the classes are named; beyond that the axes
    count classes, and the most frequent mix-ups are written beside the picture.

    Args:
        labels: [n] true class of each image.
        predictions: [n] predicted class of each image.
        class_names: [C] in words.
        out: the PNG to write (whole or not at all).

    Raises:
        UserError: no images, lengths that differ, or a class number without a name.
    """
    share, images = row_normalised_confusion(labels, predictions, len(class_names))
    classes = len(class_names)
    listed = classes > _MAX_NAMED
    side = float(np.clip(2.8 + 0.42 * classes, 4.2, 10.5))
    figure = Figure(figsize=(side + (3.4 if listed else 0.6), side), dpi=150, layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=(side, 2.6)) if listed else figure.add_gridspec(1, 1)
    axes = figure.add_subplot(grid[0, 0])
    axes.set_facecolor("#d9d9d9")  # shows through where a class has no images
    # With many classes no single mix-up is frequent; the square root keeps a few percent visible.
    norm = PowerNorm(0.5, 0, 1) if classes > _MAX_NUMBERED else Normalize(0, 1)
    picture = axes.imshow(np.ma.masked_invalid(share), cmap="Blues", norm=norm, interpolation="nearest")
    _label_classes(axes, class_names, images)
    if classes <= _MAX_NUMBERED:
        _write_shares(axes, share)
    title(axes, f"{images.sum():,} images, {np.mean(np.equal(labels, predictions)):.1%} correct")
    bar = figure.colorbar(picture, ax=axes, shrink=0.6, aspect=32, pad=0.015)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, 0))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, labelcolor=INK, length=0)
    bar.set_label("share of the true class", fontsize=8, color=INK)
    if listed:
        _list_mixups(figure.add_subplot(grid[0, 1]), share, images, class_names)
    save(figure, out)


def row_normalised_confusion(
    labels: npt.NDArray[np.integer], predictions: npt.NDArray[np.integer], num_classes: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Share [C, C] of each true class (row) that got each prediction (column), and images per class [C].

    A class without images has a row of NaN: nothing is known about it, which isn't the same as zero.

    Raises:
        UserError: no images, lengths that differ, or a class number outside 0..num_classes - 1.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.size == 0 or labels.shape != predictions.shape or labels.ndim != 1:
        raise UserError(
            "a confusion matrix needs one label and one prediction for each of at least one image, "
            f"got shapes {labels.shape} and {predictions.shape}"
        )
    both = np.concatenate([labels, predictions])
    if both.min() < 0 or both.max() >= num_classes:
        raise UserError(f"labels and predictions must lie in 0..{num_classes - 1}, got {both.min()}..{both.max()}")
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(counts, (labels, predictions), 1)
    images = counts.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return counts / images[:, None].astype(np.float64), images


def worst_mixups(share: npt.NDArray[np.float64], limit: int) -> list[tuple[int, int, float]]:
    """The most frequent confusions as (true class, predicted class, share of the true class), worst first."""
    wrong = np.nan_to_num(share, copy=True)
    np.fill_diagonal(wrong, 0.0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    pairs = [(int(i) // len(share), int(i) % len(share)) for i in order]
    return [(true, got, float(wrong[true, got])) for true, got in pairs if wrong[true, got] > 0]


def _short(name: str) -> str:
    # A class name may hold a dollar sign, which matplotlib would read as mathematics.
    shown = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
    return shown.replace("$", r"\$")


def _label_classes(axes: Axes, class_names: list[str], images: npt.NDArray[np.int64]) -> None:
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0, labelsize=8, labelcolor=INK)
    axes.set_xlabel("predicted class", fontsize=9, color=INK)
    axes.set_ylabel("true class (number of images)", fontsize=9, color=INK)
    places = np.arange(len(class_names))
    if len(class_names) > _MAX_NAMED:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(10, integer=True))
        axes.set_ylabel("true class", fontsize=9, color=INK)
        return
    size = 8 if len(class_names) <= 40 else 6
    axes.set_xticks(places, [_short(name) for name in class_names], rotation=45, ha="right", fontsize=size,
                    rotation_mode="anchor")  # fmt: skip
    rows = [f"{_short(name)} ({n:,})" for name, n in zip(class_names, images, strict=True)]
    axes.set_yticks(places, rows, fontsize=size)


def _write_shares(axes: Axes, share: npt.NDArray[np.float64]) -> None:
    """Percentages in the cells; empty cells stay empty, so that what is mixed up stands out."""
    for (row, column), value in np.ndenumerate(share):
        if value > 0:  # False for NaN as well
            text = "<1" if value < 0.005 else f"{100 * value:.0f}"
            color = "white" if value > 0.55 else INK
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)


def _list_mixups(
    axes: Axes, share: npt.NDArray[np.float64], images: npt.NDArray[np.int64], class_names: list[str]
) -> None:
    axes.axis("off")
    title(axes, "most frequent mix-ups")
    for place, (true, got, part) in enumerate(worst_mixups(share, _LISTED_MIXUPS)):
        top = 0.97 - place / (_LISTED_MIXUPS + 1)
        axes.text(0, top, f"{_short(class_names[true])} → {_short(class_names[got])}", fontsize=8, color=INK)
        note = f"{part:.0%} of {images[true]:,} (class {true} → {got})"
        axes.text(0, top - 0.02, note, fontsize=7, color=SOFT)
