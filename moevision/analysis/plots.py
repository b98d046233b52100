"""All figures of the analysis under one address, one function each: data in, a matplotlib Figure out.

| question | figure |
|---|---|
| where does each patch of this picture go? | `plot_overlay` |
| which experts does one patch pass through? | `plot_path` |
| how sure is the router of it? | `plot_certainty` |
| how busy is each expert? | `plot_load` |
| how much weight does each choice get? | `plot_gate_weights` |
| how many experts does a patch have? | `plot_experts_per_patch` |
| which experts are chosen together? | `plot_co_activation` |
| which classes use which expert? | `plot_class_experts` |
| which parts of a picture go where? | `plot_part_experts` |
| where in the picture does each expert work? | `plot_positions` |
| what does an expert get? | `plot_gallery` |
| is any of it learned? | `plot_specialization` |

`save_figure` writes one as PNG, `figure_png` gives the bytes; in a notebook a figure shows itself. No pyplot, no global
state: figures may be drawn in several threads.
"""

from __future__ import annotations

from moevision.analysis.figures.evidence import plot_specialization
from moevision.analysis.figures.gallery import plot_gallery
from moevision.analysis.figures.load import plot_gate_weights, plot_load
from moevision.analysis.figures.map import plot_class_experts, plot_part_experts, plot_positions
from moevision.analysis.figures.path import plot_path
from moevision.analysis.figures.picture import plot_certainty, plot_overlay
from moevision.analysis.figures.sharing import plot_co_activation, plot_experts_per_patch
from moevision.analysis.figures.style import figure_png, save_figure

__all__ = [
    "figure_png",
    "plot_certainty",
    "plot_class_experts",
    "plot_co_activation",
    "plot_experts_per_patch",
    "plot_gallery",
    "plot_gate_weights",
    "plot_load",
    "plot_overlay",
    "plot_part_experts",
    "plot_path",
    "plot_positions",
    "plot_specialization",
    "save_figure",
]
