"""Names of experts: the part that most of an expert's patches show, where the parts of patches are known.

Drawn images know what each patch shows (the group of an emoji, an ear). An expert is named after a part only if more
than half of its patches show it; else it is "mixed". Clusters of what the layer reads may have names too, so each name
stands beside that of k-means with as many clusters.

Axes: I images, P patches, E experts, M parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moevision.analysis.collect import collect_routing
from moevision.analysis.describe import fractions_of_parts, majority_part
from moevision.analysis.images import PictureSet
from moevision.analysis.readings import RecordedLayer, cluster_choices, recording_of
from moevision.models.io import SavedModel
from moevision.types import Ints
from moevision.words import percent

NAMED_ABOVE = 0.5  # share of an expert's patches that show one part


class ExpertName(NamedTuple):
    """What an expert takes."""

    part: str  # that most of its patches show
    share: float  # of its patches
    num_patches: int

    @property
    def is_named(self) -> bool:
        """Whether more than half of its patches show the part."""
        return self.share > NAMED_ABOVE


class LayerNames(NamedTuple):
    """The experts of a layer, and the clusters of its input; without clusters where they can't be made."""

    layer: str
    experts: list[ExpertName]
    clusters: list[ExpertName]


def name_experts(
    first_choice: Ints, parts: Ints, num_experts: int, part_names: Sequence[str]
) -> list[ExpertName]:
    """What each expert takes, from each patch's expert and part, both [I, P]."""
    table = np.zeros((num_experts, len(part_names)), np.int64)
    np.add.at(table, (first_choice.ravel(), parts.ravel()), 1)
    patches = table.sum(1)
    share = table.max(1) / np.maximum(patches, 1)
    most = table.argmax(1)
    return [
        ExpertName(part_names[most[expert]], float(share[expert]), int(patches[expert]))
        for expert in range(num_experts)
    ]


def names_in_layers(model: SavedModel, pictures: PictureSet) -> list[LayerNames]:
    """The names of the experts of every layer whose tokens choose; none where the images have no parts."""
    trace = collect_routing(model, pictures, progress=False)
    fractions = fractions_of_parts(pictures, trace.grid)
    if fractions is None:
        return []
    parts, part_names = majority_part(fractions), pictures.part_names
    recording = recording_of(model, pictures, trace, swap=False)
    return [
        _names_in_layer(layer, parts, part_names)
        for layer in recording.layers
        if layer.tokens_choose and not layer.by_image
    ]


def _names_in_layer(layer: RecordedLayer, parts: Ints, part_names: Sequence[str]) -> LayerNames:
    experts = name_experts(layer.choices[:, :, 0], parts, layer.num_experts, part_names)
    clusters = []
    if assignments := cluster_choices(layer, seeds=1):
        choice = np.asarray(assignments[0].expert_index)[:, :, 0]
        clusters = name_experts(choice, parts, layer.num_experts, part_names)
    return LayerNames(layer.name, experts, clusters)


def describe_names(layers: Sequence[LayerNames], unit: str) -> list[str]:
    """Lines for a terminal: the share of its `unit` that an expert is named after, beside the purest such cluster."""
    lines = []
    for layer in layers:
        lines += [f"layer {layer.layer}"] if len(layers) > 1 else []
        lines += [
            f"  expert {number:<3} {_describe(expert, layer.clusters, unit)}"
            for number, expert in enumerate(layer.experts)
        ]
    return lines


def _describe(expert: ExpertName, clusters: Sequence[ExpertName], unit: str) -> str:
    if expert.num_patches == 0:
        return "takes nothing"
    if not expert.is_named:
        return f"mixed: {expert.part} {percent(expert.share, 0)}"
    text = f"{expert.part}, {percent(expert.share, 0)} of its {unit}"
    if not clusters:  # too many patches to keep what the layer reads
        return text
    rivals = [cluster.share for cluster in clusters if cluster.part == expert.part]
    return f"{text} (clusters: {percent(max(rivals), 0) if rivals else 'none'})"
