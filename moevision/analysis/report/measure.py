"""The stages of the report between the routing and the figures: specialization, stability, interventions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from moevision.analysis.agreement import consistency, expert_similarity, match_experts
from moevision.analysis.baselines import measure_baselines
from moevision.analysis.classes import ClassExpertMap, class_expert_map
from moevision.analysis.collect import collect_routing
from moevision.analysis.describe import fractions_of_parts, majority_part
from moevision.analysis.report.effects import measure_effects
from moevision.analysis.specialization import LayerSpecialization, is_open, specialization, verdict_of
from moevision.analysis.trace import RoutingTrace

if TYPE_CHECKING:
    from moevision.analysis.images import PictureSet
    from moevision.models.hub import SavedModel

Json = dict[str, Any]


class Effort(Protocol):
    """How thoroughly to measure: the part of `ReportSettings` that counts here."""

    @property
    def permutations(self) -> int:
        """Shuffles behind each chance level."""

    @property
    def seed(self) -> int:
        """Of everything drawn at random."""

    @property
    def quick(self) -> bool:
        """Less of everything."""


class Stages(Protocol):
    """A progress bar over stages."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """The scope of one stage."""


@dataclass(frozen=True)
class Results:
    """What was measured.

    Attributes:
        information: specialization of each layer, about everything that was asked.
        maps: block index -> class x expert map; empty with fewer than two labelled classes.
        parts: [I, P, parts] share of each patch that belongs to each part; None where pictures have none.
        stability: per layer agreement under changes and with other trainings, and similarity of its experts.
        effects: from `measure_effects`.
        skipped: `what` was left out and `why`.
    """

    information: Sequence[LayerSpecialization]
    maps: dict[int, ClassExpertMap]
    parts: npt.NDArray[np.float32] | None
    stability: list[Json]
    effects: Json
    skipped: list[dict[str, str]] = field(default_factory=list)

    def to_json(self, trace: RoutingTrace) -> Json:
        """Every number, and the verdict that follows from them."""
        names = {layer.layer: layer.name for layer in trace.layers}
        return {
            "verdict": verdict_of(self.information, list(names.items())),
            "specialization": [{**entry.to_json(), "open": is_open(entry)} for entry in self.information],
            "maps": [found.to_json() for found in self.maps.values()],
            "stability": self.stability,
            "effects": self.effects,
            "skipped": self.skipped,
        }


def measure(
    model: SavedModel,
    pictures: PictureSet,
    trace: RoutingTrace,
    others: Sequence[tuple[str, SavedModel]],
    effort: Effort,
    stages: Stages,
) -> Results:
    """Run the stages.

    Args:
        model: the model that the trace is of.
        pictures: in the order of the trace.
        trace: their routing.
        others: names and models of other trainings of the same recipe.
        effort: how thoroughly.
        stages: tells the user.
    """
    parts = fractions_of_parts(pictures, trace.grid)
    with stages.stage("measuring what needs no learning"):
        baselines = measure_baselines(model, pictures, trace, seeds=2 if effort.quick else 5)
    with stages.stage("looking at other trainings"):
        seeds = [collect_routing(other, pictures, progress=False, name=name) for name, other in others]
    with stages.stage("asking the experts"):
        information = specialization(
            trace,
            baselines=baselines,
            seeds=seeds,
            parts=None if parts is None else majority_part(parts),
            num_permutations=effort.permutations,
            seed=effort.seed,
        )
    with stages.stage("mapping classes to experts"):
        maps = _maps(trace, effort)
    with stages.stage("mirroring and cropping"):
        stability = _stability(model, pictures, trace, seeds, effort.seed)
    with stages.stage("taking experts away"):
        effects = measure_effects(model, pictures, trace, budget_s=30 if effort.quick else 180, seed=effort.seed)
    skipped = []
    if effects["why"]:
        skipped.append({"what": "Taking experts away was left out", "why": effects["why"]})
    return Results(information, maps, parts, stability, effects, skipped)


def _maps(trace: RoutingTrace, effort: Effort) -> dict[int, ClassExpertMap]:
    if len(np.unique(trace.labels[trace.labels >= 0])) < 2:
        return {}
    settings = {"num_permutations": effort.permutations, "seed": effort.seed}
    return {layer.layer: class_expert_map(trace, layer.layer, **settings) for layer in trace.layers}


def _stability(
    model: SavedModel, pictures: PictureSet, trace: RoutingTrace, seeds: Sequence[RoutingTrace], seed: int
) -> list[Json]:
    found = []
    changes = consistency(model, pictures, seed=seed)
    for layer in trace.layers:
        similarity = expert_similarity(model, pictures, layer.layer, seed=seed)
        pairs = np.argwhere(np.triu(np.ones_like(similarity, dtype=bool), 1))
        values = similarity[tuple(pairs.T)]
        first, second = pairs[values.argmax()]
        found.append(
            {
                "layer": layer.layer,
                "name": layer.name,
                "similarity": similarity.tolist(),
                "similarity_mean": float(values.mean()),
                "similarity_most": float(values.max()),
                "most_similar": f"E{first} and E{second}",
                "matches": [
                    {"run": other.model, **asdict(match_experts(layer, other.layer(layer.layer)))} for other in seeds
                ],
                "consistency": [change.to_json() for change in changes if change.layer == layer.layer],
            }
        )
    return found
