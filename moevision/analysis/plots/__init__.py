"""All figures of the analysis under one address, one function each: data in, a matplotlib Figure out.

| question | figure |
|---|---|
| where does each patch of this image go? | `plot_overlay` |
| which experts does one patch pass through? | `plot_path` |
| how sure is the router of it? | `plot_certainty` |
| how busy is each expert? | `plot_load` |
| how much weight does each choice get? | `plot_gate_weights` |
| how many experts does a patch have? | `plot_experts_per_patch` |
| which experts are chosen together? | `plot_co_activation` |
| which classes use which expert? | `plot_class_experts` |
| which parts of an image go where? | `plot_part_experts` |
| where in the image does each expert work? | `plot_positions` |
| what does an expert get? | `plot_gallery` |
| what do experts tell, and what as much? | `plot_specialization` |
| what changes without one expert? | `plot_effects` |

`save_figure` writes one as PNG, `figure_png` gives the bytes; in a notebook a figure shows itself. No pyplot, no global
state: figures may be drawn in several threads.
"""

from __future__ import annotations

from moevision.analysis.plots.charts import (
    plot_class_experts,
    plot_co_activation,
    plot_effects,
    plot_experts_per_patch,
    plot_gate_weights,
    plot_load,
    plot_part_experts,
    plot_positions,
    plot_specialization,
)
from moevision.analysis.plots.images import plot_certainty, plot_gallery, plot_overlay, plot_path
from moevision.analysis.plots.style import figure_png, save_figure

__all__ = [
    "figure_png",
    "plot_certainty",
    "plot_class_experts",
    "plot_co_activation",
    "plot_effects",
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
