"""Baselines: the choices of routers that have learned nothing, of the images that a trained one has routed.

"Above chance" is a low bar: a router that was never trained sorts patches by colour, and colour differs between
classes. What a router tells is therefore compared with what these tell (`readings`, `questions`):

- `untrained`: the same architecture freshly initialised, seen by the same images. Noisy top-k routers start at zero
  (arXiv:1701.06538, appendix A), where ties would send every patch to the same experts; they get random weights here.
- `hash`: experts drawn by a hash of the patch's pixels: the same content goes to the same experts, nothing else counts.
- `hash_position`: experts drawn by a hash of the patch's position, the same in every image.
- `kmeans_colour`: E clusters of the patch's mean colour.
- `kmeans_input`: E clusters of what the trained layer receives: what routing by similarity alone would tell. The tokens
  are learned, the clusters know nothing of classes.

Where images are routed as a whole, it is the image's pixels, mean colour and mean patch, and there is no position.

Information depends on how many experts a patch has and on how evenly it takes from them, so a baseline chooses as the
layer does (`Rule`) and differs from it in its scores only:

- token choice: each patch has the K experts with the largest score;
- expert choice: each expert takes the C patches of every image that suit it best, by the softmax over experts;
- Soft MoE: each expert reads the softmax over patches, each patch takes the softmax over experts.

Where there is a softmax the scores are first scaled so that it is as undecided as the layer is on average. Clusters are
fitted on one half of the images and measured on the other; the nearer a cluster, the larger its score. A router that is
not learned is the same in an untrained model.

Axes: B images of a batch, I images, P patches, K choices, E experts, D width.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import entr, log_softmax, softmax
from torch import nn

from moevision.analysis.collect import collect_routing, layer_inputs, network_input
from moevision.analysis.images import PictureSet, Remembered, aligned_pictures, image_patches, read_images
from moevision.analysis.information import Floats, choice_counts, halves_by_class
from moevision.analysis.trace import LayerTrace, RoutingTrace
from moevision.errors import UserError
from moevision.layers import moe_layers
from moevision.layers.routing import Kind as RoutingKind
from moevision.layers.routing import RouteBy
from moevision.models.io import SavedModel

if TYPE_CHECKING:
    from sklearn.cluster import KMeans

BASELINES: Final = ("untrained", "hash", "hash_position", "kmeans_colour", "kmeans_input")
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # keeps 0, a fixed point of the mixing, out of it
_FIT_TOKENS = 20_000  # of a clustering: enough for E centres; more only costs time
_BATCH = 64
_MOST_DECIDED, _STEPS = 1e6, 60  # of the search for a scale
_SAMPLE = 4096  # patches that the search looks at


def measure_baselines(
    model: SavedModel,
    pictures: PictureSet,
    trace: RoutingTrace,
    *,
    seeds: int = 5,
    names: Sequence[str] = BASELINES,
    seed: int = 0,
) -> Mapping[str, list[Assignments]]:
    """The choices of baselines on the images of a trace.

    Args:
        model: the trained model.
        pictures: the images of `trace`; others are ignored.
        trace: its routing.
        seeds: how many of each: untrained models, hashes, clusterings.
        names: which of `BASELINES`.
        seed: of the two halves.

    Raises:
        UserError: for an unknown name, or if the trace is about one image, other images or another model.
    """
    if len(trace) < 2:
        raise UserError("Baselines need at least two images, to fit and to measure clusters: give more images.")
    unknown = set(names) - set(BASELINES)
    if unknown or seeds < 1:
        raise UserError(f"Choose at least one seed and baselines among {', '.join(BASELINES)}; got {sorted(unknown)}.")
    if [layer.layer_index for layer in moe_layers(model.net)] != [layer.layer for layer in trace.layers]:
        raise UserError("This trace has other MoE layers than the model: collect it again with this model.")
    pictures = Remembered(aligned_pictures(pictures, trace))  # image i is row i of the trace
    found: dict[str, list[Assignments]] = {}
    if "untrained" in names:
        found["untrained"] = [each for s in range(seeds) for each in _untrained(model, pictures, trace, s)]
    if {"hash", "hash_position"} & set(names):
        found |= _hashes(pictures, trace, seeds)
    if {"kmeans_colour", "kmeans_input"} & set(names):
        found |= _clusters(model, pictures, trace, seeds, seed, names)
    return {name: found[name] for name in BASELINES if name in names}


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


def _untrained(model: SavedModel, pictures: PictureSet, trace: RoutingTrace, seed: int) -> Iterator[Assignments]:
    routing = collect_routing(replace(model, net=fresh_copy(model.net, seed)), pictures, progress=False)
    images = np.arange(len(trace))
    for own in routing.layers:
        yield Assignments(own.layer, seed, own.expert_index, images, own.num_experts, own.reads, own.takes)


def _hashes(pictures: PictureSet, trace: RoutingTrace, seeds: int) -> dict[str, list[Assignments]]:
    images, patches = np.arange(len(trace)), trace.grid[0] * trace.grid[1]
    place = np.arange(patches, dtype=np.uint64)[None]  # of every image
    found: dict[str, list[Assignments]] = {"hash": [], "hash_position": []}
    for rule, layers in rules_of(trace).items():
        grid = trace.grid if rule.route_by == "token" else (1, 1)
        pixels = np.stack([_patch_hashes(pictures.image(int(image)), grid) for image in images])
        keys = {"hash": np.broadcast_to(pixels, (len(images), patches))}
        if rule.route_by == "token":
            keys["hash_position"] = place
        for name, key in keys.items():
            for seed in range(seeds):
                scores: npt.NDArray[Any] = hash_scores(key, rule.num_experts, seed)
                if rule.kind != "token_choice":
                    scores = scores / 2.0**64
                index, *amounts = (
                    each if each is None else np.broadcast_to(each, (len(images), *each.shape[1:]))
                    for each in rule.apply(scores, rule.scale(scores))
                )
                assert index is not None
                found[name] += [Assignments(layer, seed, index, images, rule.num_experts, *amounts) for layer in layers]
    return found


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


def _clusters(
    model: SavedModel, pictures: PictureSet, trace: RoutingTrace, seeds: int, seed: int, names: Sequence[str]
) -> dict[str, list[Assignments]]:
    """K-means of colours and of each layer's input, fitted on half of the images, applied to the others."""
    half, rng = halves_by_class(np.asarray(trace.labels), seed), np.random.default_rng(seed)
    fitted, measured = np.flatnonzero(~half), np.flatnonzero(half)
    per_image = max(1, _FIT_TOKENS // max(1, len(fitted)))
    with_input = "kmeans_input" in names
    sample: dict[int | RouteBy, list[Floats]] = {}
    for features in _features(model, pictures, trace, fitted, with_input):
        for source, tokens in features.items():
            taken = rng.permuted(np.tile(np.arange(tokens.shape[1]), (len(tokens), 1)), axis=1)[:, :per_image]  # [B, p]
            sample.setdefault(source, []).append(np.take_along_axis(tokens, taken[..., None], 1))  # [B, p, D]
    clusterings: dict[str, list[_Clustering]] = {"kmeans_colour": [], "kmeans_input": []}
    if "kmeans_colour" in names:
        clusterings["kmeans_colour"] = [
            _Clustering(rule.route_by, rule, layers, s, np.concatenate(sample[rule.route_by]))
            for rule, layers in rules_of(trace).items()
            for s in range(seeds)
        ]
    if with_input:
        clusterings["kmeans_input"] = [
            _Clustering(layer.layer, Rule.of(layer), [layer.layer], s, np.concatenate(sample[layer.layer]))
            for layer in trace.layers
            for s in range(seeds)
        ]
    for features in _features(model, pictures, trace, measured, with_input):
        for clustering in (each for every in clusterings.values() for each in every):
            clustering.look(features[clustering.source])
    return {name: [found for each in every for found in each.assignments(measured)]
            for name, every in clusterings.items()}  # fmt: skip


class _Clustering:
    """E clusters of what patches look like, as experts of some layers."""

    def __init__(
        self, source: int | RouteBy, rule: Rule, layers: Sequence[int | None], seed: int, tokens: Floats
    ) -> None:
        self.source, self.rule, self.layers, self.seed = source, rule, layers, seed
        self.mean = fit_clusters(tokens.reshape(-1, tokens.shape[-1]), rule.num_experts, seed)
        self.scale = rule.scale(self._scores(tokens))
        self.chosen: list[Chosen] = []

    def look(self, tokens: Floats) -> None:
        """Choose for the patches of a batch [B, P, D]."""
        self.chosen.append(self.rule.apply(self._scores(tokens), self.scale))

    def assignments(self, images: npt.NDArray[np.int64]) -> list[Assignments]:
        """All choices, one for each of the layers."""
        index, *amounts = (None if each[0] is None else np.concatenate(each) for each in zip(*self.chosen, strict=True))
        assert index is not None
        if self.rule.kind != "token_choice":  # every patch names all experts: once is enough
            index = np.broadcast_to(index[:1, :1].copy(), index.shape)
        return [Assignments(layer, self.seed, index, images, self.rule.num_experts, *amounts) for layer in self.layers]

    def _scores(self, tokens: Floats) -> Floats:
        """[B, P, E]: the nearer a cluster, the better."""
        distance = self.mean.transform(tokens.reshape(-1, tokens.shape[-1]))
        scores: Floats = -np.square(distance).reshape(*tokens.shape[:2], -1)
        return scores


def fit_clusters(tokens: Floats, num_clusters: int, seed: int) -> KMeans:
    """K-means of tokens [T, D]."""
    from sklearn.cluster import KMeans  # not needed, and slow to import, for anything else here

    return KMeans(num_clusters, n_init=1, random_state=seed).fit(tokens)


def _features(
    model: SavedModel, pictures: PictureSet, trace: RoutingTrace, indices: npt.NDArray[np.int64], with_input: bool
) -> Iterator[dict[int | RouteBy, Floats]]:
    """Per batch what layers may route by: mean colours, and, if wanted, each MoE layer's input (block -> [B, P, D]).

    Mean colours [B, P, 3] are under what the layers route, of each patch or everywhere of the image.
    """
    units = dict.fromkeys(layer.route_by for layer in trace.layers)
    for start in range(0, len(indices), _BATCH):
        images = read_images(pictures, indices[start : start + _BATCH])
        colours = [image_patches(image, trace.grid).mean((1, 2), dtype=np.float32) / 255 for image in images]
        colour = np.stack(colours)
        whole = np.broadcast_to(colour.mean(1, keepdims=True), colour.shape)
        features: dict[int | RouteBy, Floats] = {unit: whole if unit == "image" else colour for unit in units}
        if with_input:
            for block, tokens in layer_inputs(model.net, network_input(model, images)).items():
                if trace.layer(block).route_by == "image":
                    tokens = tokens.mean(1, keepdim=True).expand_as(tokens)
                features[block] = tokens.float().cpu().numpy()
        yield features


class Chosen(NamedTuple):
    """As `LayerTrace` says it.

    Attributes:
        expert_index: [I, P, K] int16.
        reads: [I, P, K]; None for 1.
        takes: [I, P, K]; None for 1.
    """

    expert_index: npt.NDArray[np.int16]
    reads: npt.NDArray[Any] | None = None
    takes: npt.NDArray[Any] | None = None


@dataclass(frozen=True)
class Rule:
    """How a layer chooses.

    Attributes:
        kind: who chooses.
        num_experts: E.
        top_k: K of token choice, C of expert choice, 0 for Soft MoE.
        entropy_bits: mean entropy of the layer's router; 0 for token choice, which needs none.
        route_by: what it chooses for.
    """

    kind: RoutingKind
    num_experts: int
    top_k: int
    entropy_bits: float = 0.0
    route_by: RouteBy = "token"

    @classmethod
    def of(cls, layer: LayerTrace) -> Rule:
        """The rule of a traced layer."""
        if layer.kind == "token_choice":
            return cls(layer.kind, layer.num_experts, layer.top_k, route_by=layer.route_by)
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

    def apply(self, scores: npt.NDArray[Any], scale: float) -> Chosen:
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
            return Chosen(everyone, softmax(logits, 1).astype(np.float32), takes)
        rank = np.argsort(np.argsort(-affinity, axis=1, kind="stable"), axis=1)
        taken = rank < self.top_k
        return Chosen(everyone, taken, takes * taken)


def rules_of(trace: RoutingTrace) -> dict[Rule, list[int | None]]:
    """The rules of the layers, each with the blocks of its layers; [None] where one rule holds for all."""
    found: dict[Rule, list[int | None]] = {}
    for layer in trace.layers:
        found.setdefault(Rule.of(layer), []).append(layer.layer)
    return found if len(found) > 1 else {rule: [None] for rule in found}


@dataclass(frozen=True)
class Assignments:
    """The experts that one baseline gives to patches.

    Attributes:
        layer: block index of the layer it is compared with; None where it is the same for every layer.
        seed: of what is random in it.
        expert_index: [I', P, K] int16, best first.
        images: [I'] rows of the trace that it was measured on.
        num_experts: E.
        reads: [I', P, K] how much of the patch each expert reads, as in `LayerTrace`; 1 if None.
        takes: [I', P, K] how much the patch takes from each; 1 if None.
    """

    layer: int | None
    seed: int
    expert_index: npt.NDArray[np.int16]
    images: npt.NDArray[np.int64]
    num_experts: int
    reads: npt.NDArray[Any] | None = None
    takes: npt.NDArray[Any] | None = None

    def counts(self) -> Floats:
        """[I', P, E] what each expert reads of each patch: its choices, where tokens choose."""
        return choice_counts(self.expert_index, self.num_experts, self.reads)

    def patch_takes(self) -> Floats:
        """[I', P, E] what each patch takes from each expert: the same, where tokens choose."""
        return choice_counts(self.expert_index, self.num_experts, self.takes)
