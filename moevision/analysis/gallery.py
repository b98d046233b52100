"""Which patches show what an expert does: its heaviest patches, and random ones beside them.

Top patches alone flatter: some eight of ten thousand patches will look alike for any expert, so a gallery shows as many
random patches of the same expert. An expert of Soft MoE reads something of every patch: its weight is how much of the
patch it reads, and random patches are drawn in proportion. Everything here is a pure function of a trace; cutting the
patches out of pictures is `pictures.patch_crop`, drawing them `plots.expert_gallery`.

Axes: I images, P patches (row-major in the grid), K choices best first, E experts, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from moevision.errors import UserError

if TYPE_CHECKING:
    from moevision.analysis.trace import LayerTrace, RoutingTrace


class GalleryPatch(NamedTuple):
    """One patch of one picture.

    Attributes:
        image: index of the picture in the trace.
        patch: index of the patch in its grid.
        weight: the gate weight that the expert has in it; Soft MoE: how much of it the expert reads.
    """

    image: int
    patch: int
    weight: float


class ExpertGallery(NamedTuple):
    """The patches of one expert.

    Attributes:
        expert: index of the expert in its layer.
        top: heaviest first, at most one of each picture.
        random: drawn from all patches that the expert computed, in order of picture and patch.
    """

    expert: int
    top: list[GalleryPatch]
    random: list[GalleryPatch]


def layer_gallery(layer: LayerTrace, count: int = 8, seed: int = 0) -> list[ExpertGallery]:
    """The gallery of every expert of a layer, in order; an expert that nothing is routed to has an empty one."""
    experts = range(layer.num_experts)
    return [ExpertGallery(e, top_patches(layer, e, count), random_patches(layer, e, count, seed)) for e in experts]


def top_patches(layer: LayerTrace, expert: int, count: int = 8) -> list[GalleryPatch]:
    """The patches in which an expert's gate weight is largest, at most one of each picture.

    Choices that capacity dropped don't count: the expert has not computed them. Of equal weights the earlier picture
    and patch comes first, so the answer does not depend on the platform.

    Args:
        layer: the trace of one layer.
        expert: index in 0..E - 1.
        count: how many, fewer if the expert is in fewer pictures.
    """
    images, patches, weights = _routed(layer, expert)
    heaviest = np.lexsort((patches, images, -weights))
    _, first = np.unique(images[heaviest], return_index=True)  # the heaviest patch of each picture
    best = heaviest[np.sort(first)[:count]]
    return _as_patches(images[best], patches[best], weights[best])


def random_patches(layer: LayerTrace, expert: int, count: int = 8, seed: int = 0) -> list[GalleryPatch]:
    """Patches drawn without replacement from all that an expert computed: evenly, or (Soft MoE) as it reads them.

    Args:
        layer: the trace of one layer.
        expert: index in 0..E - 1.
        count: how many, fewer if the expert has fewer.
        seed: other seeds give other patches; layers and experts of one seed are drawn independently.
    """
    images, patches, weights = _routed(layer, expert)
    rng = np.random.default_rng([seed, layer.layer, expert])
    chance = None
    if layer.kind == "soft":
        chance = weights.astype(np.float64) / max(float(weights.sum(dtype=np.float64)), 1e-12)
    size = min(count, len(images) if chance is None else int((chance > 0).sum()))
    drawn = np.sort(rng.choice(len(images), size=size, replace=False, p=chance))
    return _as_patches(images[drawn], patches[drawn], weights[drawn])


def first_choice_paths(trace: RoutingTrace) -> npt.NDArray[np.int16]:
    """[I, P, L]: the expert that each patch gave most weight to in each MoE layer, in order of depth; -1 for none."""
    return np.stack([np.asarray(layer.first_choice(), dtype=np.int16) for layer in trace.layers], axis=-1)


def patches_on_path(
    trace: RoutingTrace, path: Sequence[int], *, label: int | None = None, count: int = 8, seed: int = 0
) -> list[GalleryPatch]:
    """Random patches whose first choice is `path`, at most one of each picture as long as pictures suffice.

    Args:
        trace: the routing of a set of pictures.
        path: [L] an expert for each MoE layer, in order of depth.
        label: only of pictures of this class.
        count: how many, fewer if fewer take this path.
        seed: other seeds give other patches.

    Returns:
        Patches with the weight of the last layer's first choice, in order of picture and patch.

    Raises:
        UserError: if the path is not one expert per MoE layer.
    """
    if len(path) != len(trace.layers):
        raise UserError(f"A path through this model names {len(trace.layers)} experts, one per MoE layer: {path}.")
    on_path = (first_choice_paths(trace) == np.asarray(path)).all(-1)
    if label is not None:
        on_path &= (trace.labels == label)[:, None]
    images, patches = np.nonzero(on_path)
    chosen = spread_over_pictures(images, count, np.random.default_rng(seed))
    weights = np.asarray(trace.layers[-1].combine_weight)[images[chosen], patches[chosen], 0]
    return _as_patches(images[chosen], patches[chosen], weights)


def spread_over_pictures(images: npt.NDArray[np.intp], count: int, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """Positions in `images` of random entries, sorted; a picture's second entry only fills up what others can't.

    Args:
        images: [N] the picture of each entry.
        count: how many, fewer if there are fewer.
        rng: draws them.
    """
    order = rng.permutation(len(images))
    _, first = np.unique(images[order], return_index=True)
    once = np.zeros(len(order), dtype=bool)
    once[first] = True
    return np.sort(np.concatenate([order[once], order[~once]])[:count])


def _routed(
    layer: LayerTrace, expert: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """Picture, patch and weight of everything that an expert computed, in order of picture and patch."""
    if not 0 <= expert < layer.num_experts:
        raise UserError(f"There is no expert {expert}: the layer has experts 0 to {layer.num_experts - 1}.")
    images, patches, choices = np.nonzero((layer.expert_index == expert) & layer.kept)
    weights = layer.combine_weight if layer.read_weight is None else layer.read_weight
    return images, patches, np.asarray(weights)[images, patches, choices]


def _as_patches(
    images: npt.NDArray[np.intp], patches: npt.NDArray[np.intp], weights: npt.NDArray[np.floating]
) -> list[GalleryPatch]:
    return [GalleryPatch(int(i), int(p), round(float(w), 4)) for i, p, w in zip(images, patches, weights, strict=True)]
