"""What experts respond to: the routing of whole sets of images, and what can be said about it.

- images and traces: `images`, `collect` (run the model), `trace`, `describe` (counts, galleries, classes)
- is it more than chance: `questions` (three answers about any model, the swap test), from `readings` of what is
  recorded of it and of its baselines; `information`; `audit` (suspicions about any model's routers)
- what if, and what an answer rests on: `intervention`, `effects`
- what it looks like: `plots` (all figures) and `report` (`moevision analyze`); `good_data` (`moevision data score`)

The names below load on first use, so that a trace can be collected without figures or statistics being imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moevision.analysis.audit import Audited
    from moevision.analysis.collect import Choices, Table, collect_routing
    from moevision.analysis.describe import class_expert_map
    from moevision.analysis.effects import class_effect, effect, patch_contributions
    from moevision.analysis.images import PictureSet, open_pictures, patch_crop
    from moevision.analysis.intervention import Intervention, intervene
    from moevision.analysis.questions import three_questions
    from moevision.analysis.readings import (
        RecordedLayer,
        Recording,
        measure_baselines,
        recording_of,
    )
    from moevision.analysis.trace import LayerTrace, RoutingTrace

_NAMES = {
    "audit": ("Audited",),
    "collect": ("Choices", "Table", "collect_routing"),
    "describe": ("class_expert_map",),
    "effects": ("class_effect", "effect", "patch_contributions"),
    "images": ("PictureSet", "open_pictures", "patch_crop"),
    "intervention": ("Intervention", "intervene"),
    "questions": ("three_questions",),
    "readings": ("RecordedLayer", "Recording", "measure_baselines", "recording_of"),
    "trace": ("LayerTrace", "RoutingTrace"),
}

__all__ = [
    "Audited",
    "Choices",
    "Intervention",
    "LayerTrace",
    "PictureSet",
    "RecordedLayer",
    "Recording",
    "RoutingTrace",
    "Table",
    "class_effect",
    "class_expert_map",
    "collect_routing",
    "effect",
    "intervene",
    "measure_baselines",
    "open_pictures",
    "patch_contributions",
    "patch_crop",
    "recording_of",
    "three_questions",
]


def __getattr__(name: str) -> object:
    """Import the module that defines ``name``."""
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
