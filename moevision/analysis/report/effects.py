"""What happens without each expert, class by class, beside its control: the numbers of the report.

Axes: E experts, C classes, L MoE layers.
"""

from __future__ import annotations

import time
from collections import defaultdict
from statistics import fmean
from typing import TYPE_CHECKING, Any

from moevision.analysis.effects import class_effect
from moevision.analysis.intervention import Intervention
from moevision.layers.routing import Kind as RoutingKind

if TYPE_CHECKING:
    from moevision.analysis.images import PictureSet
    from moevision.analysis.trace import RoutingTrace
    from moevision.models.hub import SavedModel

Json = dict[str, Any]
_LEAST, _MOST = 3, 40  # pictures of a class
_WHAT: dict[RoutingKind, str] = {
    "token_choice": "an expert's patches go to their next-best expert",
    "expert_choice": "where experts choose, an expert's patches lose it and no other takes its place",
    "soft": "in Soft MoE an expert's weight is shared out among the others",
}


def measure_effects(
    model: SavedModel, pictures: PictureSet, trace: RoutingTrace, *, budget_s: float, seed: int = 0
) -> Json:
    """Take every expert away, one at a time, and follow the true class of pictures of each class.

    How many pictures of a class are used follows from the time that a first call takes.

    Args:
        model: the model that the trace is of.
        pictures: labelled pictures.
        trace: their routing.
        budget_s: about how long all of it may take, in seconds.
        seed: of the pictures and of the control.

    Returns:
        `what` was done in words, `pictures_per_class`, `rows` (each layer, expert and class) and `experts` (means over
        the classes and the class that changes most); both lists are empty, and `why` says why, where it takes too long
        or no class of the model has pictures.
    """
    classes = [
        name for label, name in enumerate(trace.class_names)
        if name in model.class_names and (trace.labels == label).sum() >= _LEAST
    ]  # fmt: skip
    calls = len(classes) * sum(layer.num_experts for layer in trace.layers)
    what = "; ".join(_WHAT[kind] for kind in dict.fromkeys(layer.kind for layer in trace.layers))
    if not classes:
        return _nothing(what, f"no class of the model has {_LEAST} pictures here")
    first = Intervention("ablate", layer=trace.layers[0].layer, expert=0)
    start = time.perf_counter()
    class_effect(model, pictures, classes[0], first, limit=_LEAST, seed=seed)
    each_s = (time.perf_counter() - start) / _LEAST
    per_class = min(_MOST, int(budget_s / (each_s * calls)))
    if per_class < _LEAST:
        minutes = each_s * calls * _LEAST / 60
        return _nothing(what, f"even {_LEAST} pictures of each class would take about {minutes:.0f} minutes")
    rows = [
        _row(model, pictures, name, Intervention("ablate", layer=layer.layer, expert=expert), per_class, seed)
        for layer in trace.layers
        for expert in range(layer.num_experts)
        for name in classes
    ]
    loads = {layer.layer: layer.counts().sum(0) for layer in trace.layers}
    shares = {
        (layer, e): count / max(load.sum(), 1e-12) for layer, load in loads.items() for e, count in enumerate(load)
    }
    return {
        "what": what,
        "why": None,
        "pictures_per_class": per_class,
        "rows": rows,
        "experts": _by_expert(rows, shares),
    }


def _row(model: SavedModel, pictures: PictureSet, name: str, intervention: Intervention, limit: int, seed: int) -> Json:
    effect = class_effect(model, pictures, name, intervention, limit=limit, seed=seed).to_json()
    return {"layer": intervention.layer, "expert": intervention.expert, **effect}


def _by_expert(rows: list[Json], shares: dict[tuple[int, int], float]) -> list[Json]:
    """Means over classes, and the class whose logit changes most."""
    grouped: dict[tuple[int, int], list[Json]] = defaultdict(list)
    for row in rows:
        grouped[row["layer"], row["expert"]].append(row)
    found = []
    for (layer, expert), own in grouped.items():
        strongest = max(own, key=lambda row: abs(row["delta_logit"]))
        found.append(
            {
                "layer": layer,
                "expert": expert,
                "name": f"L{layer}·E{expert}",
                "share": float(shares[layer, expert]),
                **{name: fmean(row[name] for row in own) for name in ("delta_logit", "control_delta_logit", "delta_p")},
                "strongest_class": strongest["class"],
                "strongest_delta_logit": strongest["delta_logit"],
                "strongest_control_delta_logit": strongest["control_delta_logit"],
            }
        )
    return found


def _nothing(what: str, why: str) -> Json:
    return {"what": what, "why": why, "pictures_per_class": 0, "rows": [], "experts": []}
