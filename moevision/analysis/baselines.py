"""Routing in which nothing was learned by a router: what every number about experts must exceed.

- `untrained`: the same architecture freshly initialised, seen by the same pictures. Noisy top-k routers start at zero
  (arXiv:1701.06538, appendix A), where ties would send every patch to the same experts; they get random weights here.
- `hash`: experts drawn by a hash of the patch's pixels: the same content goes to the same experts, nothing else counts.
- `hash_position`: experts drawn by a hash of the patch's position, the same in every picture.
- `kmeans_colour`: E clusters of the patch's mean colour.
- `kmeans_input`: E clusters of what the trained layer receives: what routing by similarity alone would tell. The tokens
  are learned, the clusters know nothing of classes.

Each gives a patch as many experts as the model does (the K nearest clusters), since information depends on K. Clusters
are fitted on one half of the pictures and measured on the other.

Axes: I images, P patches, K choices, E experts, D width, T tokens.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from moevision.analysis.information import choice_counts
from moevision.analysis.pictures import PictureSet
from moevision.analysis.tokens import Remembered, image_patches, layer_inputs, network_input, read_images
from moevision.analysis.trace import RoutingTrace, collect_routing
from moevision.errors import UserError
from moevision.layers.moe import moe_layers
from moevision.models.hub import SavedModel

if TYPE_CHECKING:
    from sklearn.cluster import KMeans

NAMES = ("untrained", "hash", "hash_position", "kmeans_colour", "kmeans_input")
_FIT_TOKENS = 20_000  # enough for E centres; more only costs time
_BATCH = 64
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # keeps 0, a fixed point of the mixing, out of it

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Assignments:
    """The experts that one baseline gives to patches.

    Attributes:
        layer: block index that it stands beside; None where it is the same for every layer.
        seed: of what is random in it.
        expert_index: [I', P, K] int16, best first.
        images: [I'] rows of the trace that it was measured on.
        num_experts: E.
    """

    layer: int | None
    seed: int
    expert_index: npt.NDArray[np.int16]
    images: npt.NDArray[np.int64]
    num_experts: int

    def counts(self) -> Floats:
        """[I', P, E] choices of each patch."""
        return choice_counts(self.expert_index, self.num_experts)


def measure_baselines(
    model: SavedModel,
    pictures: PictureSet,
    trace: RoutingTrace,
    *,
    seeds: int = 5,
    names: Sequence[str] = NAMES,
    seed: int = 0,
) -> Mapping[str, list[Assignments]]:
    """All baselines of a model on the pictures of a trace.

    Args:
        model: the trained model.
        pictures: the pictures of `trace`; others are ignored.
        trace: its routing.
        seeds: how many of each: untrained models, hashes, clusterings.
        names: which of `NAMES`.
        seed: of the two halves.

    Raises:
        UserError: for an unknown name, or if the trace is about other pictures or another model.
    """
    unknown = set(names) - set(NAMES)
    if unknown or seeds < 1:
        raise UserError(f"Choose at least one seed and baselines among {', '.join(NAMES)}; got {sorted(unknown)}.")
    if [layer.layer_index for layer in moe_layers(model.net)] != [layer.layer for layer in trace.layers]:
        raise UserError("This trace has other MoE layers than the model: collect it again with this model.")
    rows = _rows_of(trace, pictures)
    pictures = Remembered(pictures)
    found: dict[str, list[Assignments]] = {}
    if "untrained" in names:
        found["untrained"] = [each for s in range(seeds) for each in _untrained(model, pictures, trace, s)]
    if "hash" in names or "hash_position" in names:
        found |= {name: hashes for name, hashes in _hashes(pictures, trace, rows, seeds).items() if name in names}
    if "kmeans_colour" in names or "kmeans_input" in names:
        clusters = _clusters(model, pictures, trace, rows, seeds, seed, with_input="kmeans_input" in names)
        found |= {name: each for name, each in clusters.items() if name in names}
    return found


def fresh_copy(net: nn.Module, seed: int) -> nn.Module:
    """The same architecture with newly drawn weights, as an untrained model starts, but with random routers.

    Nothing of the trained weights or statistics is left; torch's generator is put back.
    """
    fresh = copy.deepcopy(net)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in fresh.modules():
            if hasattr(module, "reset_parameters"):
                cast(Any, module).reset_parameters()
        if hasattr(fresh, "init_weights"):
            cast(Any, fresh).init_weights()
        for layer in moe_layers(fresh):
            weight = layer.router.weight
            if not weight.detach().any():
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)  # LeCun, as V-MoE's router starts
    return fresh.eval()


def _rows_of(trace: RoutingTrace, pictures: PictureSet) -> npt.NDArray[np.int64]:
    """For each row of the trace the index of its picture."""
    place = {pictures.picture_name(index): index for index in range(len(pictures))}
    missing = [name for name in trace.picture_names if name not in place]
    if missing:
        raise UserError(f"The trace is about other pictures ({missing[0]} is not among these): give those it is about.")
    return np.array([place[name] for name in trace.picture_names])


def _untrained(model: SavedModel, pictures: PictureSet, trace: RoutingTrace, seed: int) -> Iterator[Assignments]:
    routing = collect_routing(replace(model, net=fresh_copy(model.net, seed)), pictures, progress=False)
    row = {name: index for index, name in enumerate(routing.picture_names)}
    chosen = np.array([row[name] for name in trace.picture_names])
    for layer in routing.layers:
        index = np.asarray(layer.expert_index)[chosen]
        yield Assignments(layer.layer, seed, index, np.arange(len(trace)), layer.num_experts)


def _hashes(
    pictures: PictureSet, trace: RoutingTrace, rows: npt.NDArray[np.int64], seeds: int
) -> dict[str, list[Assignments]]:
    layer, images, patches = trace.layers[0], np.arange(len(trace)), trace.grid[0] * trace.grid[1]
    content = np.stack([_patch_hashes(pictures.image(int(row)), trace.grid) for row in rows])
    place = np.broadcast_to(np.arange(patches, dtype=np.uint64), content.shape)

    def draw(keys: npt.NDArray[np.uint64], seed: int) -> Assignments:
        index = hashed_experts(keys, layer.num_experts, layer.top_k, seed)
        return Assignments(None, seed, index, images, layer.num_experts)

    return {
        "hash": [draw(content, seed) for seed in range(seeds)],
        "hash_position": [draw(place, seed) for seed in range(seeds)],
    }


def _patch_hashes(image: npt.NDArray[np.uint8], grid: tuple[int, int]) -> npt.NDArray[np.uint64]:
    digests = [hashlib.blake2b(patch.tobytes(), digest_size=8).digest() for patch in image_patches(image, grid)]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def hashed_experts(keys: npt.NDArray[np.uint64], num_experts: int, top_k: int, seed: int) -> npt.NDArray[np.int16]:
    """[..., K] experts with the largest score, a hash of (key, seed, expert) (rendezvous hashing)."""
    expert = _mix(np.arange(seed * num_experts, (seed + 1) * num_experts, dtype=np.uint64) + _GOLDEN)
    scores = _mix(np.asarray(keys, np.uint64)[..., None] ^ expert)
    best = np.argsort(scores, axis=-1)[..., ::-1][..., :top_k]
    return best.astype(np.int16)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _clusters(
    model: SavedModel,
    pictures: PictureSet,
    trace: RoutingTrace,
    rows: npt.NDArray[np.int64],
    seeds: int,
    seed: int,
    with_input: bool,
) -> dict[str, list[Assignments]]:
    """K-means of colours and of each layer's input, fitted on half of the rows of the trace, applied to the others."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(rows))
    fitted, measured = np.sort(order[: len(rows) // 2]), np.sort(order[len(rows) // 2 :])
    per_image = max(1, _FIT_TOKENS // max(1, len(fitted)))
    sample: dict[int | None, list[Floats]] = {}
    for features in _features(model, pictures, trace, rows[fitted], with_input):
        for layer, tokens in features.items():
            taken = rng.permuted(np.tile(np.arange(tokens.shape[1]), (len(tokens), 1)), axis=1)[:, :per_image]
            sample.setdefault(layer, []).append(np.take_along_axis(tokens, taken[..., None], 1))
    first = trace.layers[0]
    means = {
        layer: [_fit(np.concatenate(parts), first.num_experts, s) for s in range(seeds)]
        for layer, parts in sample.items()
    }
    nearest: dict[tuple[int | None, int], list[npt.NDArray[np.int16]]] = {}
    for features in _features(model, pictures, trace, rows[measured], with_input):
        for layer, tokens in features.items():
            for s, mean in enumerate(means[layer]):
                distance = mean.transform(tokens.reshape(-1, tokens.shape[-1]))
                best = np.argsort(distance, axis=1)[:, : first.top_k].astype(np.int16)
                nearest.setdefault((layer, s), []).append(best.reshape(*tokens.shape[:2], -1))
    found: dict[str, list[Assignments]] = {"kmeans_colour": [], "kmeans_input": []}
    for (layer, s), parts in nearest.items():
        assigned = Assignments(layer, s, np.concatenate(parts), measured, first.num_experts)
        found["kmeans_colour" if layer is None else "kmeans_input"].append(assigned)
    return found


def _fit(tokens: Floats, num_clusters: int, seed: int) -> KMeans:
    from sklearn.cluster import KMeans  # not needed, and slow to import, for anything else here

    return KMeans(num_clusters, n_init=1, random_state=seed).fit(tokens.reshape(-1, tokens.shape[-1]))


def _features(
    model: SavedModel, pictures: PictureSet, trace: RoutingTrace, indices: npt.NDArray[np.int64], with_input: bool
) -> Iterator[dict[int | None, Floats]]:
    """Per batch the mean colours (None -> [B, P, 3]) and, if wanted, each MoE layer's input (block -> [B, P, D])."""
    for start in range(0, len(indices), _BATCH):
        images = read_images(pictures, indices[start : start + _BATCH])
        colours = [image_patches(image, trace.grid).mean((1, 2), dtype=np.float32) / 255 for image in images]
        features: dict[int | None, Floats] = {None: np.stack(colours)}
        if with_input:
            for block, tokens in layer_inputs(model.net, network_input(model, images)).items():
                features[block] = tokens.float().cpu().numpy()
        yield features
