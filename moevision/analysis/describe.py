"""What a trace shows: counts and shares for the figures, what an expert's patches are, which classes use it, its name.

Parts are counted by *requested* choices, what the router wants, before any capacity; loads, galleries and the map of
classes by those that are computed. Where tokens don't choose, `expert_index` names all experts and `amount` ([I, P, K],
`LayerTrace.requested_share`) says what each counts: whether it took the patch, or how much of it it reads. Whether a
pattern is more than chance is tested over images, since patches of one image are not independent: of classes here, of
what experts tell in `information` and `readings`.

The top patches of an expert alone mislead: the best eight of ten thousand patches look alike for any expert. So a
gallery shows as many random patches of the same expert. An expert of Soft MoE reads something of every patch: its
weight is how much of the patch it reads, and random patches are drawn in proportion.

`class_expert_map`: labels are permuted over images. A table of C x E cells invites one to look at its largest cell, so
a cell counts only if it is further from the mean than the *largest* cell of 95 % of the permuted tables (the
max-statistic: Westfall and Young 1993; Nichols and Holmes, Hum. Brain Mapp. 15, 2002, 1-25). The chance that a table
without any pattern shows a single coloured cell is then 5 %.

`part_stands_out` asks the same of parts: the images' masks are permuted over the routing, so that chance keeps where in
an image a part lies. Rare parts vary more, so each cell is measured in its own standard deviations.

Axes: I images, P patches (row-major in a grid of rows x columns), K choices best first, E experts, L MoE layers,
C classes, S pixels of a side, R resamples or permutations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moevision.analysis.collect import collect_routing
from moevision.analysis.images import PictureSet
from moevision.analysis.information import (
    JsonDataclass,
    choice_counts,
    permuted_labels,
    sums_by_class,
)
from moevision.analysis.readings import RecordedLayer, cluster_choices, recording_of
from moevision.analysis.trace import LayerTrace, RoutingTrace
from moevision.errors import UserError
from moevision.models.io import SavedModel
from moevision.types import Array, Flags, Floats, Ints, Json, Pixels
from moevision.words import percent

_LEVEL = 0.95  # of a map: 1 minus the chance of any false cell


def part_fractions(part_masks: Pixels, grid: tuple[int, int], num_parts: int) -> Floats:
    """[I, P, parts]: which share of each patch's pixels belongs to each part, from masks [I, S, S] of part numbers."""
    rows, columns = grid
    images, height, width = part_masks.shape
    is_part = part_masks[..., None] == np.arange(num_parts)  # [I, S, S, parts]
    tiles = is_part.reshape(images, rows, height // rows, columns, width // columns, num_parts)
    fractions: Floats = tiles.mean((2, 4), dtype=np.float32)  # [I, rows, columns, parts]
    return fractions.reshape(images, rows * columns, num_parts)


def majority_part(fractions: Floats) -> Ints:
    """[I, P]: the part with most pixels in each patch (the lower number of two that tie), from `part_fractions`."""
    result: Ints = fractions.argmax(-1).astype(np.int16)
    return result


def part_expert_table(
    expert_index: Ints, fractions: Floats, num_experts: int, amount: Array | None = None
) -> Floats:
    """[parts, E]: patches of each part that went to each expert; a patch counts for its parts by their area.

    From chosen experts [I, P, K] and `part_fractions` [I, P, parts]. Each choice carries 1/K of its patch, so that row
    sums are each part's area in patches; or its amount [I, P, K], and row sums are what all experts read of a part.
    """
    shares = _patch_shares(expert_index, num_experts, amount)
    return fractions.reshape(-1, fractions.shape[2]).T @ shares


def _patch_shares(expert_index: Ints, num_experts: int, amount: Array | None) -> Floats:
    """[I · P, E] float64: how much of each patch went to each expert; a choice carries its amount, or 1/K."""
    counts = choice_counts(expert_index, num_experts, amount)
    shares = counts.reshape(-1, num_experts).astype(np.float64)
    if amount is None:
        shares /= expert_index.shape[2]
    return shares


def part_stands_out(
    expert_index: Ints,
    fractions: Floats,
    num_experts: int,
    amount: Array | None = None,
    *,
    num_permutations: int = 400,
) -> Flags:
    """[parts, E] bool: which experts get another share of a part than if masks belonged to other images.

    The arguments are those of `part_expert_table`, and R permutations.
    """
    shares = _patch_shares(expert_index, num_experts, amount)
    observed = _expert_shares(fractions, shares)

    rng = np.random.default_rng(0)
    permuted = np.stack(
        [_expert_shares(rng.permutation(fractions), shares) for _ in range(num_permutations)]
    )  # [R, parts, E]
    mean = permuted.mean(0)
    spread = permuted.std(0, ddof=1)
    largest = _deviations(permuted, mean, spread).max((1, 2))  # [R]
    threshold = np.quantile(largest, _LEVEL, method="higher")
    result: Flags = _deviations(observed, mean, spread) > threshold
    return result


def _expert_shares(area: Floats, shares: Floats) -> Floats:
    """[parts, E] each expert's share of a part, from areas [I, P, parts] and shares of patches [I · P, E]."""
    table = area.reshape(len(shares), -1).T @ shares
    result: Floats = table / np.maximum(table.sum(1, keepdims=True), 1e-12)
    return result


def _deviations(shares: Floats, mean: Floats, spread: Floats) -> Floats:
    """Distances of shares [..., parts, E] from the mean in standard deviations; 0 where nothing varies."""
    return np.abs(shares - mean) / np.where(spread > 0, spread, np.inf)


class GalleryPatch(NamedTuple):
    """A patch of an image of the trace, and the gate weight of the expert in it (Soft MoE: how much of it it reads)."""

    image: int
    patch: int
    weight: float


class ExpertGallery(NamedTuple):
    """The patches of one expert."""

    expert: int  # index of the expert in its layer
    top: list[GalleryPatch]  # heaviest first, at most one of each image
    # drawn from all patches that the expert computed, in order of image and patch
    random: list[GalleryPatch]


def layer_gallery(layer: LayerTrace, count: int = 8, seed: int = 0) -> list[ExpertGallery]:
    """The gallery of every expert of a layer, in order; an expert that nothing is routed to has an empty one."""
    return [
        ExpertGallery(
            expert,
            top_patches(layer, expert, count),
            random_patches(layer, expert, count, seed),
        )
        for expert in range(layer.num_experts)
    ]


def top_patches(layer: LayerTrace, expert: int, count: int = 8) -> list[GalleryPatch]:
    """The patches in which an expert's gate weight is largest, at most one of each image.

    Choices that capacity dropped don't count: the expert has not computed them. Of equal weights the earlier image
    and patch comes first, so the answer does not depend on the platform.
    """
    images, patches, weights = _routed(layer, expert)
    heaviest = np.lexsort((patches, images, -weights))
    # The first of each image, in order of weight.
    _, first = np.unique(images[heaviest], return_index=True)
    best = heaviest[np.sort(first)[:count]]
    return _as_patches(images[best], patches[best], weights[best])


def random_patches(
    layer: LayerTrace, expert: int, count: int = 8, seed: int = 0
) -> list[GalleryPatch]:
    """Patches drawn without replacement from all that an expert computed: evenly, or (Soft MoE) as it reads them.

    Layers and experts of one seed are drawn independently.
    """
    images, patches, weights = _routed(layer, expert)
    rng = np.random.default_rng([seed, layer.layer, expert])
    probs = None
    available = len(images)
    if layer.kind == "soft":
        total = float(weights.sum(dtype=np.float64))
        probs = weights.astype(np.float64) / max(total, 1e-12)
        available = int((probs > 0).sum())
    drawn = rng.choice(len(images), size=min(count, available), replace=False, p=probs)
    drawn = np.sort(drawn)
    return _as_patches(images[drawn], patches[drawn], weights[drawn])


def _routed(layer: LayerTrace, expert: int) -> tuple[Ints, Ints, Floats]:
    """Image, patch and weight of everything that an expert computed, in order of image and patch."""
    images, patches, choices = np.nonzero((layer.expert_index == expert) & layer.kept)
    weights = layer.combine_weight if layer.read_weight is None else layer.read_weight
    return images, patches, weights[images, patches, choices]


def _as_patches(images: Ints, patches: Ints, weights: Floats) -> list[GalleryPatch]:
    return [
        GalleryPatch(int(image), int(patch), round(float(weight), 4))
        for image, patch, weight in zip(images, patches, weights, strict=True)
    ]


def fractions_of_parts(pictures: PictureSet, grid: tuple[int, int]) -> Floats | None:
    """[I, P, parts]: share of each patch's pixels that belong to each part; None where images have no parts."""
    if not pictures.part_names:
        return None
    fractions = []
    for index in range(len(pictures)):
        mask = pictures.part_mask(index)
        if mask is None:
            raise UserError(
                f"{pictures.name} names parts, but the image {pictures.picture_name(index)} has no mask."
            )
        fractions.append(part_fractions(mask[None], grid, len(pictures.part_names))[0])
    return np.stack(fractions)


@dataclass(frozen=True)
class ClassExpertMap(JsonDataclass):
    """Shares of one layer's experts in the choices of each class."""

    layer: int  # block index
    class_names: tuple[str, ...]  # [C] rows of the table
    n_images: Ints  # [C] images of each class
    # [C, E] expert e's share of the kept choices in an image (of the weights, where tokens don't choose), averaged over
    # the images of class c; nan for a class without images
    share: Floats
    mean_share: Floats  # [E] the same, averaged over all images
    excess: Floats  # [C, E] `share` minus `mean_share`
    # how large an excess the largest cell of a table reaches by chance (`level` of the permuted tables)
    threshold: float
    significant: Flags  # [C, E] bool, cells whose excess is larger than that in absolute value
    p_value: Floats  # [C, E] corrected for the whole table
    level: float = _LEVEL  # 1 minus the family-wise error

    def to_json(self) -> Json:
        """The fields as JSON primitives; null stands for a class without images."""
        return {"name": f"L{self.layer}", **super().to_json()}


def class_expert_map(
    trace: RoutingTrace, layer: int, *, num_permutations: int = 1000, seed: int = 0
) -> ClassExpertMap:
    """The class x expert table of the MoE layer in that block, with its max-statistic threshold of R permutations.

    A UserError if that block has no MoE layer, or there are fewer than two labelled images.
    """
    labelled = trace.labels >= 0
    if labelled.sum() < 2:
        raise UserError(
            "A map of classes and experts needs at least two images with a known class: give more images."
        )
    labels = trace.labels[labelled]
    shares = image_shares(trace.layer(layer).image_takes())[labelled]  # [I, E]
    num_classes = len(trace.class_names)
    n_images = np.bincount(labels, minlength=num_classes)
    mean_share = shares.mean(0)
    # 0 / 0: a class without images has no share.
    with np.errstate(invalid="ignore"):
        share = sums_by_class(labels[None], shares, num_classes)[0] / n_images[:, None]
    excess = share - mean_share
    size = np.abs(np.nan_to_num(excess))

    largest = _largest_of_permuted(shares - mean_share, labels, n_images, num_permutations, seed)
    threshold = float(np.quantile(largest, _LEVEL, method="higher"))
    as_large = (largest >= size[..., None] - 1e-12).sum(-1)
    p_value = (1 + as_large) / (1 + len(largest))
    return ClassExpertMap(
        layer=layer,
        class_names=tuple(trace.class_names),
        n_images=n_images,
        share=share,
        mean_share=mean_share,
        excess=excess,
        threshold=threshold,
        significant=size > threshold + 1e-12,
        p_value=np.where(np.isnan(excess), np.nan, p_value),
    )


def image_shares(takes: Array) -> Floats:
    """[I, E] each expert's share of what an image takes (`LayerTrace.image_takes`); equal shares where that is 0."""
    total = takes.sum(1, keepdims=True)
    return np.where(total > 0, takes / np.where(total > 0, total, 1), 1 / takes.shape[1])


def _largest_of_permuted(
    centred: Floats, labels: Ints, n_images: Ints, num_permutations: int, seed: int
) -> Floats:
    """[R] the largest absolute excess in each permuted table."""
    present = n_images > 0
    per_class = n_images[present, None]
    numbers = len(n_images) * len(labels)  # one-hot classes
    largest = []
    for permuted in permuted_labels(labels, num_permutations, numbers, seed):
        excess = sums_by_class(permuted, centred, len(n_images))[:, present] / per_class
        largest.append(np.abs(excess).max((1, 2)))
    return np.concatenate(largest)


# ---- names of experts
#
# Drawn images know what each patch shows (the group of an emoji, an ear). An expert is named after a part only if more
# than half of its patches show it; else it is "mixed". Clusters of what the layer reads may have names too, so each
# name stands beside that of k-means with as many clusters.

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
