"""The figure of what happens without an expert, beside the same change at random.

Numbers in, a matplotlib Figure out. Axes: E experts, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moevision.analysis.figures.style import INK, PAGE_INCHES, RULE, SMALL, SOFT, calm, heading, new_figure, panel_title
from moevision.analysis.palette import EXPERT_COLOURS, expert_colour
from moevision.errors import UserError

_CONTROL = "#9AA0A6"


def plot_effects(
    deltas: Sequence[npt.ArrayLike],
    controls: Sequence[npt.ArrayLike],
    layer_names: Sequence[str],
    class_names: Sequence[str],
    *,
    what: str,
) -> Figure:
    """Change of the true class's logit without each expert: one small mark per class, a large one for their mean.

    Args:
        deltas: per layer [E, C], mean over pictures of a class.
        controls: per layer [E, C], the same with as many random choices taken away instead.
        layer_names: such as "L4".
        class_names: [C]; the one that changes most is named.
        what: the intervention in words, such as "its patches go to their next-best expert".

    Raises:
        UserError: if the arrays don't fit each other.
    """
    effects = [np.asarray(delta, dtype=np.float64) for delta in deltas]
    chance = [np.asarray(control, dtype=np.float64) for control in controls]
    if [array.shape for array in effects] != [array.shape for array in chance] or len(effects) != len(layer_names):
        raise UserError("Effects need one [experts, classes] array per layer, and a control of the same shape each.")
    columns = min(2 if effects[0].shape[0] > 8 else 3, len(effects))
    rows = -(-len(effects) // columns)
    figure = new_figure(PAGE_INCHES, 0.55 + 1.75 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in panels.flat[len(effects) :]:
        axes.set_visible(False)
    for place, (axes, effect, control) in enumerate(zip(panels.flat, effects, chance, strict=False)):
        _draw_layer(axes, effect, control)
        _name_largest(axes, effect, class_names, 0.2 * max(float(np.ptp(array)) for array in effects))
        panel_title(axes, layer_names[place])
        axes.set_xlabel("expert taken away", fontsize=SMALL, color=SOFT)
        if place % columns == 0:
            axes.set_ylabel("change of logit", fontsize=SMALL, color=SOFT)
    style = {"linestyle": "none", "marker": "o"}
    marks = [
        Line2D([], [], color=INK, markersize=5, label="mean of the classes", **style),  # type: ignore[arg-type]
        Line2D([], [], color=INK, markersize=2.5, alpha=0.55, label="one class", **style),  # type: ignore[arg-type]
        Line2D([], [], color=_CONTROL, markersize=4, marker="_", linestyle="none", label="as many choices at random"),
    ]
    figure.legend(handles=marks, loc="outside lower left", ncols=3, fontsize=SMALL, frameon=False, labelcolor=INK)
    heading(figure, "Without one expert", f"Change of the true class's logit; {what}.")
    return figure


def _draw_layer(axes: Axes, effect: npt.NDArray[np.float64], control: npt.NDArray[np.float64]) -> None:
    calm(axes)
    axes.axhline(0, color=RULE, linewidth=1.0)
    experts, classes = effect.shape
    spread = _spread(classes)
    for expert in range(experts):
        colour = expert_colour(expert, experts) if experts <= len(EXPERT_COLOURS) else INK
        axes.plot(expert + 0.28, control[expert].mean(), "_", color=_CONTROL, markersize=7, markeredgewidth=2.2)
        axes.vlines(expert + 0.28, control[expert].min(), control[expert].max(), color=_CONTROL, linewidth=1)
        axes.plot(expert - 0.12 + spread, effect[expert], "o", color=colour, markersize=2.2, alpha=0.55)
        axes.plot(expert - 0.12, effect[expert].mean(), "o", color=colour, markersize=5, markeredgecolor="white")
    axes.set_xticks(range(experts))
    axes.set_xlim(-0.6, experts - 0.1)


def _name_largest(axes: Axes, effect: npt.NDArray[np.float64], class_names: Sequence[str], least: float) -> None:
    """The class that changes most without an expert, beside its mark, if that is at least `least` away from zero."""
    spread = _spread(effect.shape[1])
    for expert, row in enumerate(effect):
        label = int(np.abs(row).argmax())
        if abs(row[label]) >= max(least, 1e-6):
            place = (expert - 0.12 + spread[label], row[label])
            style = {"textcoords": "offset points", "va": "center", "fontsize": SMALL - 0.5, "color": SOFT}
            axes.annotate(class_names[label], place, (4, 0), parse_math=False, **style)  # type: ignore[arg-type]


def _spread(classes: int) -> npt.NDArray[np.float64]:
    """How far each class stands to the side of its expert."""
    return np.linspace(-0.16, 0.16, classes) if classes > 1 else np.zeros(1)
