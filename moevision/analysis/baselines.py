"""Baselines: the choices of routers that have learned nothing, of the images that a trained one has routed.

"Above chance" is a low bar: a router that was never trained sorts patches by colour, and colour differs between
classes. What a router tells is therefore compared with what these tell (`readings`, `questions`):

- `untrained`: the same architecture freshly initialised, seen by the same images. Noisy top-k routers start at zero
  (arXiv:1701.06538, appendix A), where ties would send every patch to the same experts; they get random weights here.
- `kmeans_input`: E clusters of what the trained layer receives: what routing by similarity alone would tell. The tokens
  are learned, the clusters know nothing of classes. Where images are routed as a whole, it is their mean patch.

Information depends on how many experts a patch has and on how evenly it takes from them, so a baseline chooses as the
layer does (`Rule`) and differs from it in its scores only:

- token choice: each patch has the K experts with the largest score;
- expert choice: each expert takes the C patches of every image that suit it best, by the softmax over experts;
- Soft MoE: each patch takes the softmax over experts.

Where there is a softmax the scores are first scaled so that it is as undecided as the layer is on average. Clusters are
fitted on one half of the images and measured on the other; the nearer a cluster, the larger its score. A router that is
not learned is the same in an untrained model.

Axes: B images of a batch, I images, P patches, K choices, E experts, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from scipy.special import entr, log_softmax, softmax
from torch import nn

from moevision.analysis.collect import collect_routing, layer_inputs, network_input
from moevision.analysis.images import PictureSet, Remembered, aligned_pictures, read_images
from moevision.analysis.information import Array, Floats, Ints, halves_by_class
from moevision.analysis.trace import LayerTrace, RoutingTrace
from moevision.errors import UserError
from moevision.layers import moe_layers
from moevision.layers.routing import Kind as RoutingKind
from moevision.models.io import SavedModel

if TYPE_CHECKING:
    from sklearn.cluster import KMeans

_FIT_TOKENS = 20_000  # of a clustering: enough for E centres; more only costs time
_BATCH = 64
_MOST_DECIDED, _STEPS = 1e6, 60  # of the search for a scale
_SAMPLE = 4096  # patches that the search looks at


def measure_baselines(
    model: SavedModel, pictures: PictureSet, trace: RoutingTrace, *, seeds: int = 5, seed: int = 0
) -> Mapping[str, list[Assignments]]:
    """The choices of the baselines `untrained` and `kmeans_input` on the images of a trace.

    Args:
        model: the trained model.
        pictures: the images of `trace`; others are ignored.
        trace: its routing.
        seeds: how many of each: untrained models, clusterings.
        seed: of the two halves.

    Raises:
        UserError: if the trace is about one image, other images or another model.
    """
    if len(trace) < 2:
        raise UserError("Baselines need at least two images, to fit and to measure clusters: give more images.")
    if [layer.layer_index for layer in moe_layers(model.net)] != [layer.layer for layer in trace.layers]:
        raise UserError("This trace has other MoE layers than the model: collect it again with this model.")
    pictures = Remembered(aligned_pictures(pictures, trace))  # image i is row i of the trace
    untrained = []
    for s in range(seeds):
        routing = collect_routing(replace(model, net=fresh_copy(model.net, s)), pictures, progress=False)
        for own in routing.layers:
            untrained.append(
                Assignments(own.layer, s, own.expert_index, np.arange(len(trace)), own.num_experts, own.takes)
            )
    return {"untrained": untrained, "kmeans_input": _clusters(model, pictures, trace, seeds, seed)}


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
            weight = getattr(layer.router, "weight", None)
            if weight is not None and not weight.detach().any():
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)  # LeCun, as V-MoE's router starts
    return fresh.eval()


def _clusters(model: SavedModel, pictures: PictureSet, trace: RoutingTrace, seeds: int, seed: int) -> list[Assignments]:
    """K-means of each layer's input, fitted on half of the images, applied to the others."""
    half, rng = halves_by_class(np.asarray(trace.labels), seed), np.random.default_rng(seed)
    fitted, measured = np.flatnonzero(~half), np.flatnonzero(half)
    per_image = max(1, _FIT_TOKENS // max(1, len(fitted)))
    sample: dict[int, list[Floats]] = {layer.layer: [] for layer in trace.layers}
    for inputs in router_inputs(model, pictures, trace, fitted, _BATCH):
        places = np.tile(np.arange(trace.grid[0] * trace.grid[1]), (len(next(iter(inputs.values()))), 1))  # [B, P]
        for _ in {layer.route_by for layer in trace.layers}:
            rng.permuted(places, axis=1)  # a draw that earlier versions made: clusters are those of their reports
        for block, tokens in inputs.items():
            taken = rng.permuted(places, axis=1)[:, :per_image]
            sample[block].append(np.take_along_axis(tokens, taken[..., None], 1))  # [B, p, D]

    clusterings = []
    for layer in trace.layers:
        tokens, rule = np.concatenate(sample[layer.layer]), Rule.of(layer)
        for s in range(seeds):
            means = fit_clusters(tokens.reshape(-1, tokens.shape[-1]), rule.num_experts, s)
            chosen: list[Chosen] = []
            clusterings.append((layer.layer, s, rule, means, rule.scale(nearness(means, tokens)), chosen))
    for inputs in router_inputs(model, pictures, trace, measured, _BATCH):
        for block, _, rule, means, scale, chosen in clusterings:
            chosen.append(rule.apply(nearness(means, inputs[block]), scale))
    found = []
    for block, s, rule, _, _, chosen in clusterings:
        index = np.concatenate([each.expert_index for each in chosen])
        takes = None
        if rule.kind != "token_choice":  # every patch names all experts: once is enough
            index = np.broadcast_to(index[:1, :1].copy(), index.shape)
            takes = np.concatenate([cast(Floats, each.takes) for each in chosen])
        found.append(Assignments(block, s, index, measured, rule.num_experts, takes))
    return found


def nearness(means: KMeans, tokens: Floats) -> Floats:
    """[B, P, E] how near patches [B, P, D] are to each cluster."""
    distance = means.transform(tokens.reshape(-1, tokens.shape[-1]))
    scores: Floats = -np.square(distance).reshape(*tokens.shape[:2], -1)
    return scores


def fit_clusters(tokens: Floats, num_clusters: int, seed: int) -> KMeans:
    """K-means of tokens [T, D]."""
    from sklearn.cluster import KMeans  # not needed, and slow to import, for anything else here

    return KMeans(num_clusters, n_init=1, random_state=seed).fit(tokens)


def router_inputs(
    model: SavedModel, pictures: PictureSet, trace: RoutingTrace, indices: Sequence[int] | Ints, batch_size: int
) -> Iterator[dict[int, Floats]]:
    """Per batch what each MoE layer routes by: block -> [B, P, D]; everywhere their mean where images are routed."""
    for start in range(0, len(indices), batch_size):
        images = read_images(pictures, indices[start : start + batch_size])
        found = {}
        for block, tokens in layer_inputs(model.net, network_input(model, images)).items():
            if trace.layer(block).route_by == "image":
                tokens = tokens.mean(1, keepdim=True).expand_as(tokens)
            found[block] = tokens.float().cpu().numpy()
        yield found


class Chosen(NamedTuple):
    """Experts [I, P, K] int16, and how much the patch takes from each [I, P, K]; None for 1."""

    expert_index: Ints
    takes: Array | None = None


@dataclass(frozen=True)
class Rule:
    """How a layer chooses."""

    kind: RoutingKind  # who chooses
    num_experts: int  # E
    top_k: int  # K of token choice, C of expert choice, 0 for Soft MoE
    entropy_bits: float = 0.0  # mean entropy of the layer's router; 0 for token choice, which needs none

    @classmethod
    def of(cls, layer: LayerTrace) -> Rule:
        """The rule of a traced layer."""
        if layer.kind == "token_choice":
            return cls(layer.kind, layer.num_experts, layer.top_k)
        entropy = float(np.asarray(layer.entropy_bits, dtype=np.float64).mean())
        taken = round(float(layer.counts().mean())) if layer.kind == "expert_choice" else 0
        return cls(layer.kind, layer.num_experts, taken, entropy)

    def scale(self, scores: Floats) -> float:
        """What to multiply scores [..., E] by, so that their softmax has the layer's mean entropy."""
        if self.kind == "token_choice":
            return 1.0
        flat = np.asarray(scores, dtype=np.float64).reshape(-1, self.num_experts)
        flat = flat[:: -(-len(flat) // _SAMPLE)]
        unit = flat / max(float(flat.std(-1).mean()), 1e-12)
        low, high = 1 / _MOST_DECIDED, _MOST_DECIDED
        for _ in range(_STEPS):
            middle = float(np.sqrt(low * high))
            entropy = entr(softmax(middle * unit, -1)).sum(-1).mean() / np.log(2)
            low, high = (low, middle) if entropy < self.entropy_bits else (middle, high)
        return low / max(float(flat.std(-1).mean()), 1e-12)

    def apply(self, scores: Array, scale: float) -> Chosen:
        """What scores [I, P, E] choose.

        Args:
            scores: larger is better.
            scale: from `scale`.
        """
        if self.kind == "token_choice":
            return Chosen(np.argsort(scores, axis=-1)[..., ::-1][..., : self.top_k].astype(np.int16))
        everyone = np.broadcast_to(np.arange(self.num_experts, dtype=np.int16), scores.shape)
        logits = scale * np.asarray(scores, dtype=np.float64)
        affinity = log_softmax(logits, -1)
        takes = np.exp(affinity).astype(np.float32)
        if self.kind == "soft":
            return Chosen(everyone, takes)
        rank = np.argsort(np.argsort(-affinity, axis=1, kind="stable"), axis=1)
        return Chosen(everyone, takes * (rank < self.top_k))


@dataclass(frozen=True)
class Assignments:
    """The experts that one baseline gives to patches."""

    layer: int | None  # block index of the layer it is compared with; None where it is the same for every layer
    seed: int  # of what is random in it
    expert_index: Ints  # [I', P, K] int16, best first
    images: Ints  # [I'] rows of the trace that it was measured on
    num_experts: int  # E
    takes: Array | None = None  # [I', P, K] how much the patch takes from each; 1 if None
