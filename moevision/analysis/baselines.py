"""Routing in which nothing was learned by a router: what every number about experts must exceed.

- `untrained`: the same architecture freshly initialised, seen by the same pictures. Noisy top-k routers start at zero
  (arXiv:1701.06538, appendix A), where ties would send every patch to the same experts; they get random weights here.
- `hash`: experts drawn by a hash of the patch's pixels: the same content goes to the same experts, nothing else counts.
- `hash_position`: experts drawn by a hash of the patch's position, the same in every picture.
- `kmeans_colour`: E clusters of the patch's mean colour.
- `kmeans_input`: E clusters of what the trained layer receives: what routing by similarity alone would tell. The tokens
  are learned, the clusters know nothing of classes.

Each chooses by the layer's own rule (`baseline_rule.py`), since information depends on how many experts a patch has.
Clusters are fitted on one half of the pictures and measured on the other. A router that is not learned is the same in
an untrained model.

Axes: I images, P patches, K choices, E experts, D width, T tokens.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from moevision.analysis.baseline_clusters import cluster_patches
from moevision.analysis.baseline_rule import Assignments, rules_of
from moevision.analysis.collect import collect_routing
from moevision.analysis.images import PictureSet, Remembered, image_patches
from moevision.analysis.trace import RoutingTrace
from moevision.errors import UserError
from moevision.layers import SigmoidRouter, moe_layers
from moevision.models.hub import SavedModel

NAMES = ("untrained", "hash", "hash_position", "kmeans_colour", "kmeans_input")
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # keeps 0, a fixed point of the mixing, out of it

__all__ = ["NAMES", "Assignments", "fresh_copy", "hash_scores", "measure_baselines"]


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
        clusters = cluster_patches(model, pictures, trace, rows, seeds, seed, with_input="kmeans_input" in names)
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
            if isinstance(layer.router, SigmoidRouter) and layer.router.bias is not None:
                layer.router.bias.zero_()
            weight = getattr(layer.router, "weight", None)
            if weight is not None and not weight.detach().any():
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
        own = layer.select(chosen)
        yield Assignments(
            layer.layer,
            seed,
            np.asarray(own.expert_index),
            np.arange(len(trace)),
            layer.num_experts,
            own.reads,
            own.takes,
        )


def _hashes(
    pictures: PictureSet, trace: RoutingTrace, rows: npt.NDArray[np.int64], seeds: int
) -> dict[str, list[Assignments]]:
    images, patches = np.arange(len(trace)), trace.grid[0] * trace.grid[1]
    content = np.stack([_patch_hashes(pictures.image(int(row)), trace.grid) for row in rows])
    place = np.broadcast_to(np.arange(patches, dtype=np.uint64), content.shape)

    def draw(keys: npt.NDArray[np.uint64]) -> list[Assignments]:
        found = []
        for rule, layers in rules_of(trace).items():
            for seed in range(seeds):
                scores: npt.NDArray[Any] = hash_scores(keys, rule.num_experts, seed)
                if rule.kind != "token_choice":
                    scores = scores / 2.0**64
                chosen = rule.apply(scores, rule.scale(scores))
                found += [
                    Assignments(layer, seed, chosen[0], images, rule.num_experts, *chosen[1:]) for layer in layers
                ]
        return found

    return {"hash": draw(content), "hash_position": draw(place)}


def _patch_hashes(image: npt.NDArray[np.uint8], grid: tuple[int, int]) -> npt.NDArray[np.uint64]:
    digests = [hashlib.blake2b(patch.tobytes(), digest_size=8).digest() for patch in image_patches(image, grid)]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def hash_scores(keys: npt.NDArray[np.uint64], num_experts: int, seed: int) -> npt.NDArray[np.uint64]:
    """[..., E] a hash of (key, seed, expert): the experts of a key are those with the largest (rendezvous hashing)."""
    expert = _mix(np.arange(seed * num_experts, (seed + 1) * num_experts, dtype=np.uint64) + _GOLDEN)
    return _mix(np.asarray(keys, np.uint64)[..., None] ^ expert)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
