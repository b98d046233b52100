"""Recordings of routing, and readings: how much experts, and control routers, tell about classes and parts.

This module has recordings, baselines, and readings as numbers. Statistics come from `information`; `questions` measures
what changed routes cost, and puts the numbers into sentences.

- recording: chosen experts and labels of a set of images, and optionally more. `recording_of` makes one from a model of
  this package; a model from elsewhere can be analysed by filling in a `Recording`.
- baseline, control: a router that has learned nothing from labels, measured on the same images for comparison.
- reading: how well the class or part can be told from the experts. It is of one patch, or of the whole image (the
  histogram of its experts, read by a probe on held-out images); of the first choice or of all choices; of all patches
  or, where parts are known, of the object or the background only.

Patches of one image are not independent, so every interval and every permutation test is over images.

Axes: I images, P patches (1 where images are routed as a whole), K choices best first, E experts, C classes, V distinct
classes or parts that are predicted, D width, p patches whose inputs are recorded, T tokens, R images that are run
again, N patches whose class or part is known.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import methodcaller
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import numpy as np
import torch
from scipy.special import entr, log_softmax, softmax
from torch import nn

from moevision.analysis.collect import Hooked, collect_routing, layer_inputs, network_input
from moevision.analysis.images import PictureSet, aligned_pictures, cached, read_images
from moevision.analysis.information import (
    Estimate,
    Interval,
    JsonDataclass,
    choice_counts,
    class_information,
    entropy_bits,
    halves_by_class,
    part_information,
    ratio_interval,
    sums_by_class,
)
from moevision.analysis.intervention import (
    apply_edits,
    numbered_layers,
    per_image_capacity,
    refusal,
    run_repeated,
)
from moevision.analysis.trace import LayerTrace, RoutingTrace
from moevision.errors import UserError
from moevision.layers import moe_layers
from moevision.layers.routing import Kind as RoutingKind
from moevision.models.convert import routes_read
from moevision.models.io import SavedModel, from_clusters
from moevision.types import Array, Flags, Floats, Ints, Json

if TYPE_CHECKING:
    from sklearn.cluster import KMeans

Run = Callable[[int, Ints, Ints], Array]
"""(index of the layer, images [R], their experts [R, P, K]) -> logits [R, C] with those routes.

The gate weight stays with the rank of a choice. A negative entry ~e stands for expert e whose output is left out; an
image with negative entries alone gets nothing from the layer, only the residual connection.
"""

_RECORDED_INPUTS = 20_000  # patches, over all images, whose inputs are recorded for each layer
_BATCH = 32  # images per forward pass
_CHECKED = (
    8  # images on which a hook must answer as unforced when it is forced to the block's own choices
)
_TOLERANCE = 1e-3  # of their probabilities

ChoiceSet = Literal["first", "all"]
"""Which choices of a patch are counted: its first, or all."""


@dataclass(frozen=True)
class RecordedLayer:
    """What is known of one MoE layer of any model.

    Attributes:
        name: as pages show it, such as "L3".
        choices: [I, P, K] the experts of each patch, best first; P is 1 where images are routed as a whole.
        num_experts: E.
        amounts: [I, P, K] the weight with which each choice is counted: 0 or 1 for dropped or kept, or the share of the
            expert in what the patch takes. None: every choice counts 1.
        tokens_choose: False for expert choice and Soft MoE, which have no first choice, and whose routes can't be
            forced.
        by_image: all patches of an image share one choice.
        inputs: [I, p, D] input of the router at some patches. None: no probe is fitted, and no clusters.
        positions: [p] which patches `inputs` has; None: all, in order.
        before: choices of the same router before training, one entry for each known initialisation. All entries of a
            control are of the same images.
        untrained: choices of the same model with freshly drawn weights, used if `before` is empty.
        clusters: choices by clusters of the layer's input. If None they are made from `inputs`, which must then have
            all patches.
        cluster_start: the router was initialised from clusters of its input.
        read: whether any logit depends on the layer's output for patches. A class-token head doesn't read that of the
            last block.
    """

    name: str
    choices: Ints
    num_experts: int
    amounts: Array | None = None
    tokens_choose: bool = True
    by_image: bool = False
    inputs: Floats | None = None
    positions: Ints | None = None
    before: Sequence[Assignments] = ()
    untrained: Sequence[Assignments] = ()
    clusters: Sequence[Assignments] | None = None
    cluster_start: bool = False
    read: bool = True

    @property
    def num_patches(self) -> int:
        """P."""
        return int(self.choices.shape[1])

    @property
    def primary(self) -> ChoiceSet:
        """The choices that the three answers are about: the first, or all where there is no first."""
        return "first" if self.tokens_choose else "all"

    def counts(self, which: ChoiceSet) -> Floats:
        """[I, P, E] how much each patch chose each expert, by its first choice or by all."""
        return patch_counts(self.choices, self.amounts, self.num_experts, which)


@dataclass(frozen=True)
class Recording:
    """The routing of any model on labelled images: the input of `three_questions`.

    Attributes:
        labels: [I] classes; negative: unknown.
        layers: the MoE layers, in order of depth.
        class_names: [C].
        parts: [I, P] the part that each patch shows; negative: unknown. None: there is no reading of parts.
        objects: [I, P] whether a patch shows the object (background otherwise); None: there are no separate readings.
        run: runs the model again with forced routes, for the swap test; None: not measured.
        why_no_run: why there is none, as the end of a sentence.

    Raises:
        UserError: arrays that don't belong together.
    """

    labels: Ints
    layers: Sequence[RecordedLayer]
    class_names: Sequence[str]
    parts: Ints | None = None
    objects: Flags | None = None
    run: Run | None = None
    why_no_run: str = "routes were not forced"

    def __post_init__(self) -> None:
        if not self.layers:
            raise UserError(
                "A recording without a layer tells nothing: give the choices of at least one MoE layer."
            )
        images = len(self.labels)
        for layer in self.layers:
            shape = layer.choices.shape
            has_axes = len(shape) == 3 and shape[0] == images
            if not has_axes or np.max(layer.choices, initial=0) >= layer.num_experts:
                raise UserError(
                    f"The choices of {layer.name} are {list(shape)}: give [images, patches, choices], {images} images, "
                    f"experts 0 to {layer.num_experts - 1}."
                )


def recording_of(
    model: SavedModel,
    pictures: PictureSet,
    trace: RoutingTrace,
    *,
    baselines: Mapping[str, Sequence[Assignments]] | None = None,
    before: RoutingTrace | None = None,
    parts: Ints | None = None,
    part_names: Sequence[str] = (),
    swap: bool = True,
    seed: int = 0,
) -> Recording:
    """The recording of a model of this package, or of one with a hook (`moevision.analysis.collect.hooked`).

    Args:
        model: the model, in eval mode.
        pictures: the images, in the order of the trace.
        trace: their routing.
        baselines: from `measure_baselines`: `untrained` becomes `RecordedLayer.untrained`, `kmeans_input` becomes
            `RecordedLayer.clusters`.
        before: routing of the same images by the model before it was trained; it replaces `untrained`.
        parts: [I, P] the part that each patch shows.
        part_names: names of the parts. One named `background` gives `Recording.objects`: all other parts.
        swap: whether to include `Recording.run`, by which the swap test runs the model again.
        seed: random seed of the choice of patches whose inputs are recorded.

    Raises:
        UserError: `before` has other layers or other images than `trace`; a hook gives other logits when it is forced
            to a block's own choices.
    """
    if before is not None and (
        before.picture_names != trace.picture_names or len(before.layers) != len(trace.layers)
    ):
        raise UserError(
            "The model before training must have the same MoE layers, and be traced on the same images."
        )

    inputs, positions = _recorded_inputs(model, pictures, trace, seed)
    layers: list[RecordedLayer] = []
    for layer, classifier_reads in zip(trace.layers, layers_read(model.net, trace), strict=True):
        block = layer.layer
        untrained = _assignments_of_block(baselines, "untrained", block)
        at_start = []
        if before is not None:
            at_start.append(Assignments.of(before.layers[len(layers)], 0))
        recorded = replace(
            choices_of(layer),
            inputs=inputs.get(block),
            positions=None if layer.route_by == "image" else positions,
            before=at_start,
            untrained=() if at_start else untrained,
            clusters=_assignments_of_block(baselines, "kmeans_input", block) or None,
            cluster_start=from_clusters(model.net),
            read=classifier_reads,
        )
        layers.append(recorded)

    objects = None
    if parts is not None and "background" in part_names:
        objects = parts != list(part_names).index("background")

    recording = Recording(trace.labels, layers, trace.class_names, parts, objects)
    run = partial(run_forced, model, pictures, [layer.layer for layer in trace.layers])
    if isinstance(model.net, Hooked):
        return _with_hook(recording, model.net, trace, run)
    refusals = [refusal("swap", layer.router) for layer in moe_layers(model.net)]
    if swap and trace.accuracy is not None and not any(refusals):
        return replace(recording, run=run)
    return recording


def layers_read(net: nn.Module, trace: RoutingTrace) -> list[bool]:
    """Whether a logit reads each layer's patches; of a model from elsewhere, where it isn't known, True."""
    return [True] * len(trace.layers) if isinstance(net, Hooked) else routes_read(net)


def _with_hook(recording: Recording, net: Hooked, trace: RoutingTrace, run: Run) -> Recording:
    """The recording of a model from elsewhere: choices that aren't computed are negative, and it may have `run`."""
    layers = []
    for layer in recording.layers:
        computed = cast(Array, layer.amounts) > 0
        layers.append(replace(layer, choices=np.where(computed, layer.choices, ~layer.choices)))
    recording = replace(recording, layers=layers)
    if not net.can_force:
        return replace(recording, why_no_run="the hook takes no forced routes")
    if trace.accuracy is None:
        return replace(recording, why_no_run="the hook returns no logits of these classes")

    images = np.arange(min(_CHECKED, len(trace)))
    for index, layer in enumerate(layers):
        if not layer.tokens_choose:
            continue
        choices = layer.choices[images]
        logits = run(index, images, choices)
        if not np.allclose(softmax(logits, -1), trace.probabilities[images], atol=_TOLERANCE):
            raise UserError(
                f"The hook, forced to block {index}'s own experts, returns other logits than unforced: compute these "
                "experts, each with the weight that it has unforced."
            )
        without = run(index, images, ~np.maximum(choices, 0))
        layers[index] = replace(layer, read=bool((without != logits).any()))
    return replace(recording, layers=layers, run=run)


def _recorded_inputs(
    model: SavedModel, pictures: PictureSet, trace: RoutingTrace, seed: int
) -> tuple[dict[int, Floats], Ints | None]:
    """Each layer's input at some patches: block -> [I, p, D], and which they are, [p]; None: all, in order.

    They are random ones, the same in every image and layer.
    """
    rng = np.random.default_rng(seed)
    num_patches = math.prod(trace.grid)
    num_inputs = min(num_patches, max(1, _RECORDED_INPUTS // max(1, len(trace))))
    positions = np.sort(rng.permutation(num_patches)[:num_inputs])

    batches: dict[int, list[Floats]] = {layer.layer: [] for layer in trace.layers}
    for inputs in router_inputs(model, pictures, trace, range(len(trace)), _BATCH):
        for block, tokens in inputs.items():
            patches = [0] if trace.layer(block).route_by == "image" else positions
            batches[block].append(tokens[:, patches])  # [B, p, D]
    recorded = {block: np.concatenate(parts) for block, parts in batches.items() if parts}
    return recorded, positions if num_inputs < num_patches else None


def choices_of(layer: LayerTrace) -> RecordedLayer:
    """A traced layer as a `RecordedLayer` with its choices only, without inputs and controls."""
    by_image = layer.route_by == "image"
    patches = slice(None, 1) if by_image else slice(None)
    return RecordedLayer(
        layer.name,
        layer.expert_index[:, patches],
        layer.num_experts,
        layer.combine_share[:, patches],
        tokens_choose=layer.kind == "token_choice",
        by_image=by_image,
    )


@torch.inference_mode()
def run_forced(
    model: SavedModel,
    pictures: PictureSet,
    blocks: Sequence[int],
    index: int,
    images: Ints,
    experts: Ints,
) -> Floats:
    """Logits [R, C] of images [R] whose patches go to these experts [R, P, K] in one layer; see `Run`.

    Prefix tokens keep their experts. An image that occurs several times in a batch passes the blocks before the layer
    once.
    """
    layer = None
    if not isinstance(model.net, Hooked):
        layer = numbered_layers(model.net)[blocks[index]]
    prefix = int(getattr(model.net, "num_prefix_tokens", 0))
    logits = []
    for start in range(0, len(images), _BATCH):
        batch = slice(start, start + _BATCH)
        distinct_images, distinct_index = np.unique(images[batch], return_inverse=True)
        pixels = network_input(model, read_images(pictures, distinct_images))

        routes = torch.from_numpy(experts[batch].astype(np.int64)).to(pixels.device)  # [B, P, K]
        if layer is None:
            output, _ = model.net(pixels[distinct_index], {blocks[index]: routes})
            logits.append(output.float().cpu().numpy())
            continue
        edit = methodcaller("choose", routes, prefix)
        with per_image_capacity(model.net), apply_edits(model.net, {layer: edit}):
            output = run_repeated(model.net, pixels, torch.from_numpy(distinct_index), first=layer)
        logits.append(output.float().cpu().numpy())
    return np.concatenate(logits)


# ---- baselines: choices of routers that have learned nothing, on the images of a trained router's trace
#
# A router that was never trained sorts patches by colour already, and colour differs between classes: "above chance"
# says little. A trained router is therefore compared with two baselines:
# - `untrained`: the same architecture, freshly initialised, on the same images. Noisy top-k routers start at zero
#   (arXiv:1701.06538, appendix A), where ties would send every patch to the same experts; here they get random weights.
# - `kmeans_input`: E k-means clusters of the trained layer's input, which is routing by similarity alone. Where images
#   are routed as a whole, the input is the mean of an image's patches.
# Information depends on how many experts a patch has, and on how evenly it takes from them. A baseline therefore
# chooses by the layer's own rule (`RoutingRule`) and has other scores only. The score of a cluster is its nearness.
# Before a softmax, scores are scaled to the layer's mean entropy. Clusters are fitted on one half of the images and
# measured on the other.

_FIT_PATCHES = 20_000  # that a clustering is fitted on: enough for E centres; more only cost time
_FIT_BATCH = 64  # images per forward pass
_LARGEST_SCALE = 1e6  # upper end of the search for a scale; the lower end is its reciprocal
_SEARCH_STEPS = 60  # of that search
_SEARCH_PATCHES = 4096  # patches whose mean entropy is compared in that search


def measure_baselines(
    model: SavedModel, pictures: PictureSet, trace: RoutingTrace, *, seeds: int = 5, seed: int = 0
) -> Mapping[str, list[Assignments]]:
    """The choices of the baselines `untrained` and `kmeans_input` on the images of a trace.

    Args:
        model: the trained model.
        pictures: the images of `trace`; others are ignored.
        trace: the routing of the trained model.
        seeds: the number of untrained models, and of clusterings of each layer.
        seed: random seed of the division into two halves.

    Raises:
        UserError: if the trace has one image only, or other images than `pictures`.
    """
    if len(trace) < 2:
        raise UserError(
            "Baselines need at least two images, to fit and to measure clusters: give more images."
        )
    # Now image i of the pictures is image i of the trace.
    pictures = cached(aligned_pictures(pictures, trace))

    untrained = []
    for weight_seed, net in enumerate(_untrained_nets(model.net, seeds)):
        fresh_model = replace(model, net=net)
        fresh_trace = collect_routing(fresh_model, pictures, progress=False)
        untrained += [Assignments.of(layer, weight_seed) for layer in fresh_trace.layers]
    clusters = _measure_clusters(model, pictures, trace, seeds, seed)
    return {"untrained": untrained, "kmeans_input": clusters}


def _untrained_nets(net: nn.Module, seeds: int) -> Iterator[nn.Module]:
    """The same architecture with fresh weights, for each seed; of a model from elsewhere what it gives."""
    if isinstance(net, Hooked):
        yield from net.untrained
        return
    for seed in range(seeds):
        yield fresh_copy(net, seed)


def fresh_copy(net: nn.Module, seed: int) -> nn.Module:
    """The same architecture with newly drawn weights, in eval mode; routers that start at zero get random weights.

    None of the trained weights remain (the router `colour`, a fixed rule, keeps its colours). The state of the CPU's
    random generator is restored.
    """
    fresh = copy.deepcopy(net)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in fresh.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        init_weights = getattr(fresh, "init_weights", None)
        if init_weights is not None:
            init_weights()
        for layer in moe_layers(fresh):
            weight = getattr(layer.router, "weight", None)
            if weight is not None and not weight.detach().any():
                # LeCun initialisation, as in V-MoE's router.
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return fresh.eval()


def _measure_clusters(
    model: SavedModel, pictures: PictureSet, trace: RoutingTrace, seeds: int, seed: int
) -> list[Assignments]:
    """Choices by k-means clusters of each layer's input, fitted on half of the images and applied to the other half."""
    in_measured_half = halves_by_class(trace.labels, seed)
    fit_images = np.flatnonzero(~in_measured_half)
    measured_images = np.flatnonzero(in_measured_half)

    tokens_of_block = _sampled_tokens(model, pictures, trace, fit_images, seed)
    clusterings = [
        Clustering.fit(tokens, RoutingRule.of(trace.layer(block)), cluster_seed, block)
        for block, tokens in tokens_of_block.items()
        for cluster_seed in range(seeds)
        if len(tokens) >= trace.layer(block).num_experts
    ]
    for inputs in router_inputs(model, pictures, trace, measured_images, _FIT_BATCH):
        for clustering in clusterings:
            clustering.route(inputs[cast(int, clustering.layer)])
    return [clustering.assignments(measured_images) for clustering in clusterings]


def _sampled_tokens(
    model: SavedModel, pictures: PictureSet, trace: RoutingTrace, images: Ints, seed: int
) -> dict[int, Floats]:
    """Input of each layer at random patches of some images: block -> [T, D]."""
    rng = np.random.default_rng(seed)
    per_image = max(1, _FIT_PATCHES // max(1, len(images)))
    sampled_batches: dict[int, list[Floats]] = {layer.layer: [] for layer in trace.layers}
    for inputs in router_inputs(model, pictures, trace, images, _FIT_BATCH):
        for block, tokens in inputs.items():
            random_order = rng.random(tokens.shape[:2]).argsort(1)  # [B, P]
            patches = random_order[:, :per_image, None]
            sampled = np.take_along_axis(tokens, patches, 1)  # [B, p, D]
            sampled_batches[block].append(sampled.reshape(-1, tokens.shape[-1]))
    return {block: np.concatenate(batches) for block, batches in sampled_batches.items() if batches}


@dataclass
class Clustering:
    """A router by k-means clusters of a layer's input, one cluster per expert: the nearer, the larger its score."""

    layer: int | None  # block index; None if not given
    seed: int
    rule: RoutingRule
    kmeans: KMeans
    scale: float  # factor of the scores, see `RoutingRule.scale`
    batches: list[Routes] = field(default_factory=list)  # routes of the images so far

    @classmethod
    def fit(
        cls, tokens: Floats, rule: RoutingRule, seed: int, layer: int | None = None
    ) -> Clustering:
        """Fit one cluster per expert to tokens [T, D]."""
        kmeans = fit_clusters(tokens, rule.num_experts, seed)
        return cls(layer, seed, rule, kmeans, rule.scale(nearness(kmeans, tokens)))

    def route(self, tokens: Floats) -> None:
        """Choose experts for the patches [B, P, D] of further images, and add the routes to `batches`."""
        self.batches.append(self.rule.apply(nearness(self.kmeans, tokens), self.scale))

    def assignments(self, images: Ints) -> Assignments:
        """The choices in all `batches`; `images` [I'] are the indices of their images in the trace."""
        index, amounts = (np.concatenate(arrays) for arrays in zip(*self.batches, strict=True))
        return Assignments(self.layer, self.seed, index, images, self.rule.num_experts, amounts)


def nearness(kmeans: KMeans, tokens: Floats) -> Floats:
    """[..., E] negative squared distance of tokens [..., D] to the centre of each cluster."""
    distance = kmeans.transform(tokens.reshape(-1, tokens.shape[-1]))
    result: Floats = -np.square(distance).reshape(*tokens.shape[:-1], -1)
    return result


def fit_clusters(tokens: Floats, num_clusters: int, seed: int) -> KMeans:
    """K-means of tokens [T, D]."""
    from sklearn.cluster import KMeans  # slow to import

    return KMeans(num_clusters, n_init=1, random_state=seed).fit(tokens)


def router_inputs(
    model: SavedModel,
    pictures: PictureSet,
    trace: RoutingTrace,
    indices: Sequence[int] | Ints,
    batch_size: int,
) -> Iterator[dict[int, Floats]]:
    """Router inputs of each MoE layer, by batch: block -> [B, P, D]; where images are routed, P times their mean."""
    for start in range(0, len(indices), batch_size):
        images = read_images(pictures, indices[start : start + batch_size])
        received = {}
        for block, tokens in layer_inputs(model.net, network_input(model, images)).items():
            if trace.layer(block).route_by == "image":
                tokens = tokens.mean(1, keepdim=True).expand_as(tokens)
            received[block] = tokens.float().cpu().numpy()
        yield received


class Routes(NamedTuple):
    """Chosen experts [I, P, K] int16, and the weight with which each choice is counted [I, P, K]."""

    expert_index: Ints
    amounts: Floats


@dataclass(frozen=True)
class RoutingRule:
    """The rule by which a layer turns scores into choices of experts."""

    kind: RoutingKind  # whether tokens choose experts, experts choose tokens, or neither (Soft MoE)
    num_experts: int  # E
    # token choice: experts of a patch; expert choice: patches of an image that one expert takes; Soft MoE: 0
    top_k: int
    entropy_bits: float = 0.0  # mean entropy of the router; not used by token choice

    @classmethod
    def of(cls, layer: LayerTrace) -> RoutingRule:
        """The rule of a traced layer."""
        if layer.kind == "token_choice":
            return cls(layer.kind, layer.num_experts, layer.top_k)
        entropy = float(layer.entropy_bits.mean(dtype=np.float64))
        capacity = round(float(layer.counts().mean())) if layer.kind == "expert_choice" else 0
        return cls(layer.kind, layer.num_experts, capacity, entropy)

    def scale(self, scores: Floats) -> float:
        """Factor for scores [..., E] with which their softmax has the mean entropy of the layer's router.

        It is found by bisection on a logarithmic axis, on scores that were divided by their standard deviation.
        """
        if self.kind == "token_choice":
            return 1.0
        scores = scores.astype(np.float64).reshape(-1, self.num_experts)
        scores = scores[:: math.ceil(len(scores) / _SEARCH_PATCHES)]
        spread = max(float(scores.std(-1).mean()), 1e-12)
        unit_scores = scores / spread

        # The larger the factor, the smaller the entropy.
        low = 1 / _LARGEST_SCALE
        high = _LARGEST_SCALE
        for _ in range(_SEARCH_STEPS):
            middle = math.sqrt(low * high)
            entropy = entr(softmax(middle * unit_scores, -1)).sum(-1).mean() / np.log(2)
            if entropy < self.entropy_bits:
                high = middle
            else:
                low = middle
        return low / spread

    def apply(self, scores: Array, scale: float) -> Routes:
        """The routes for scores [I, P, E] (larger is better), which are multiplied by `scale` before a softmax."""
        if self.kind == "token_choice":
            best = np.argsort(scores, axis=-1)[..., ::-1][..., : self.top_k].astype(np.int16)
            return Routes(best, np.ones(best.shape, np.float32))

        experts = np.arange(self.num_experts, dtype=np.int16)
        all_experts = np.broadcast_to(experts, scores.shape)  # [I, P, E]
        log_affinity = log_softmax(scale * scores.astype(np.float64), -1)
        weights = np.exp(log_affinity).astype(np.float32)
        if self.kind == "soft":
            return Routes(all_experts, weights)

        # Expert choice: each expert takes its best patches of the image.
        order = np.argsort(-log_affinity, axis=1, kind="stable")
        rank = np.argsort(order, axis=1)  # [I, P, E] of a patch in its image, for each expert
        is_taken = rank < self.top_k
        return Routes(all_experts, weights * is_taken)


@dataclass(frozen=True)
class Assignments:
    """The experts that one baseline chooses for the patches of I' images."""

    layer: int | None  # block of the layer that it is compared with; None: not given
    seed: int  # random seed of its weights or clusters
    expert_index: Ints  # [I', P, K] int16, best first
    images: Ints  # [I'] indices of its images in the trace
    num_experts: int  # E
    amounts: Array | None = None  # [I', P, K] weight of each choice in counts; None: 1

    @classmethod
    def of(cls, layer: LayerTrace, seed: int) -> Assignments:
        """The choices of a traced layer on all images of its trace."""
        images = np.arange(len(layer.expert_index))
        return cls(
            layer.layer, seed, layer.expert_index, images, layer.num_experts, layer.combine_share
        )


def _assignments_of_block(
    baselines: Mapping[str, Sequence[Assignments]] | None, name: str, block: int
) -> list[Assignments]:
    """The assignments of one baseline that are compared with the layer in a block."""
    assignments = (baselines or {}).get(name, ())
    return [assigned for assigned in assignments if assigned.layer == block]


# ---- readings: what the experts tell about classes and parts

_CONTROL_PERMUTATIONS = 50  # few, since controls need no p-value
_PROBE_PATCHES = 6_000  # patches that a linear probe is fitted on
_PROBE_CLASSES = 100  # most classes that a linear probe is fitted to; more take minutes
_CLUSTER_PATCHES = 20_000  # patches that clusters are fitted on
# Probability of the prior that is mixed into a probe's predictions: a class that it excludes costs 10 bits, not
# infinitely many.
_PRIOR_SHARE = 1e-3


@dataclass(frozen=True)
class Reading(JsonDataclass):
    """One measurement of what experts tell about the class or the part."""

    of: str  # what they tell about: `class` or `part`
    # what it is told from: `patch`, the choice of one patch; `image`, the histogram of the choices of all its patches
    unit: str
    choices: ChoiceSet  # which choices are counted: `first` or `all`
    where: str  # which patches are counted: `everywhere`, `object` or `background`
    # share of correct guesses. Patch: each expert guesses its most frequent class in the other half of the images.
    # Image: a probe guesses that was fitted on the other half.
    guess: Interval
    chance: float  # share of the most frequent class (part), which is always guessing that
    # information. Patch: above the mean of permuted images. Image: that of the probe above the class frequencies.
    bits: Interval
    p_value: float | None = None  # of the permutation test; None for the image, which has none


@dataclass(frozen=True)
class Load(JsonDataclass):
    """How evenly a layer uses its experts; shown beside every class x expert table."""

    share: Floats  # [E] of all choices
    class_share: Floats  # [C, E] share of each class's choices; NaN for a class without images

    @classmethod
    def of(cls, counts: Floats, labels: Ints, num_classes: int) -> Load:
        """The load by counts [I, P, E], for images of the classes `labels` [I]."""
        image_counts = counts.sum(1, dtype=np.float64)  # [I, E]
        (class_counts,) = sums_by_class(labels[None], image_counts, num_classes)  # [C, E]
        total = max(image_counts.sum(), 1e-12)
        with np.errstate(invalid="ignore"):
            class_share = class_counts / class_counts.sum(1, keepdims=True)
        return cls(image_counts.sum(0) / total, class_share)

    @property
    def max_over_mean(self) -> float:
        """Load of the busiest expert, divided by the mean load."""
        return float(self.share.max() * len(self.share))

    @property
    def effective(self) -> float:
        """Effective number of experts: exp of the entropy of the loads, E where all are used alike."""
        return float(2 ** entropy_bits(self.share))

    @property
    def words(self) -> str:
        """As in "max/mean load 1.20, in effect 7.6 of 8 experts"."""
        return f"max/mean load {self.max_over_mean:.2f}, in effect {self.effective:.1f} of {len(self.share)} experts"

    def to_json(self) -> Json:
        """The shares, and what follows from them."""
        return {
            **super().to_json(),
            "max_over_mean": self.max_over_mean,
            "effective_experts": self.effective,
        }


@dataclass(frozen=True)
class Controls:
    """The readings of a layer's controls, and the readings of its router on the same images."""

    # name of a control -> for each of its seeds a reading of patches, then one of images
    readings: Mapping[str, Sequence[Reading]] = field(default_factory=dict)
    # name of a control -> the router's readings of patches and of images, on the images of that control
    same: Mapping[str, tuple[Reading, Reading]] = field(default_factory=dict)
    # bits of the router's patches minus those of the best control; None without controls
    gain: float | None = None
    # whether the router exceeds every control: the interval of each difference lies above 0
    exceeded: bool = True


@dataclass(frozen=True)
class LayerReadings:
    """All readings of one layer of one training."""

    layer: RecordedLayer
    load: Load  # how evenly its experts are used
    reason: str | None = None  # why there are no readings; None if there are
    readings: Sequence[Reading] = ()  # the first is the one that the answers are about
    # a linear probe of the router's input, which deals patches to E balanced groups, read as experts are; None without
    # inputs, or with too many classes
    probe: Reading | None = None
    controls: Controls = Controls()
    # the largest information to be expected: that of the probe, or else the bound by the numbers of classes and experts
    most_bits: float = math.nan


def measure_layer(
    recording: Recording, index: int, *, permutations: int, cluster_seeds: int, seed: int
) -> LayerReadings:
    """All readings of one layer of one training; for the arguments see `three_questions`."""
    layer = recording.layers[index]
    labels = recording.labels
    load = Load.of(layer.counts("all"), labels, len(recording.class_names))
    labelled = labels[labels >= 0]
    if len(np.unique(labelled)) < 2:
        return LayerReadings(layer, load, "fewer than two classes have images")

    # Readings of the router; those that the answers are about come first.
    selections = _selections(recording, layer, labels, seed)
    primary = selections[0]
    readings = []
    for selection in selections:
        readings.append(selection.read_patches(permutations, seed))
        readings.append(selection.read_images())
    parts = recording.parts
    if parts is not None and layer.num_patches > 1 and len(np.unique(parts[parts >= 0])) > 1:
        readings.append(primary.read_parts(parts, permutations, seed))

    # Readings of what the router is compared with.
    probe = _probe_reading(layer, primary, seed)
    clusters = layer.clusters
    if clusters is None:
        clusters = cluster_choices(layer, cluster_seeds, seed)
    controls = {"before": layer.before, "untrained": layer.untrained, "clusters": clusters}
    compared = _compare_with_controls(primary, controls, permutations, seed)

    if probe is not None and probe.bits.value > 0:
        most_bits = probe.bits.value
    else:
        class_bits = entropy_bits(np.bincount(labelled))
        most_bits = min(class_bits, math.log2(max(2, layer.num_experts)))
    return LayerReadings(layer, load, None, readings, probe, compared, most_bits)


def _probe_reading(layer: RecordedLayer, router: _Selection, seed: int) -> Reading | None:
    """The reading of the linear probe's groups (`probe_groups`) in the place of experts; None if it can't be fitted."""
    labels = router.labels
    if layer.inputs is None or len(np.unique(labels)) > _PROBE_CLASSES:
        return None
    target = np.broadcast_to(labels[:, None], layer.inputs.shape[:2])
    groups = probe_groups(layer.inputs, target, layer.num_experts, router.halves, seed)
    return _Selection(groups, labels, router.halves).read_patches(_CONTROL_PERMUTATIONS, seed)


@dataclass(frozen=True)
class _Selection:
    """Choices, of some images and patches, that a reading is made from."""

    counts: Floats  # [I', P, E] see `RecordedLayer.counts`; 0 at patches that aren't read
    labels: Ints  # [I']
    halves: Flags  # [I'] which half of the images an image is in, for fitting on one and testing on the other
    choices: ChoiceSet = "first"
    where: str = "everywhere"

    def on_images(self, images: Ints, seed: int) -> _Selection:
        """The selection restricted to some images, which are divided into halves anew."""
        labels = self.labels[images]
        return replace(
            self,
            counts=self.counts[images],
            labels=labels,
            halves=halves_by_class(labels, seed),
        )

    def read_patches(self, permutations: int, seed: int) -> Reading:
        """The reading of single patches about the class."""
        target = np.broadcast_to(self.labels[:, None], self.counts.shape[:2])
        estimate = class_information(
            self.counts, self.labels, num_permutations=permutations, seed=seed
        )
        return self._of_patches("class", target, estimate)

    def read_parts(self, parts: Ints, permutations: int, seed: int) -> Reading:
        """The reading of single patches about the part [I', P] that they show."""
        estimate = part_information(self.counts, parts, num_permutations=permutations, seed=seed)
        return self._of_patches("part", parts, estimate)

    def _of_patches(self, of: str, target: Ints, estimate: Estimate) -> Reading:
        guess, chance = guess_from_experts(self.counts, target, self.halves)
        bits = Interval(estimate.value_bits, estimate.low, estimate.high)
        return Reading(of, "patch", self.choices, self.where, guess, chance, bits, estimate.p_value)

    def read_images(self) -> Reading:
        """The reading of whole images about the class, by a probe of the histogram of their experts."""
        labelled = self.labels >= 0
        sums = self.counts[labelled].sum(1)  # [I'', E] of the labelled images
        histogram = sums / np.maximum(sums.sum(1, keepdims=True), 1e-12)
        guess, chance, bits = probe_histogram(
            histogram, self.labels[labelled], self.halves[labelled]
        )
        return Reading("class", "image", self.choices, self.where, guess, chance, bits)


def _selections(
    recording: Recording, layer: RecordedLayer, labels: Ints, seed: int
) -> list[_Selection]:
    """Every combination of choices and patches that is read of a layer; the one of the answers comes first."""
    halves = halves_by_class(labels, seed)
    counts = {layer.primary: layer.counts(layer.primary), "all": layer.counts("all")}
    if layer.counts("first").sum() == counts["all"].sum():  # first choices are all choices
        counts = {layer.primary: counts[layer.primary]}

    masks = {"everywhere": np.ones(layer.choices.shape[:2], bool)}  # [I, P]
    if recording.objects is not None and layer.num_patches > 1:
        masks |= {"object": recording.objects, "background": ~recording.objects}

    selections = []
    for where, mask in masks.items():
        for choices, patch_count in counts.items():
            masked = patch_count * mask[..., None]
            selections.append(_Selection(masked, labels, halves, choices, where))
    return selections


def _compare_with_controls(
    router: _Selection,
    controls: Mapping[str, Sequence[Assignments]],
    permutations: int,
    seed: int,
) -> Controls:
    """The readings of all controls, and by how much the router's patches exceed the best of them."""
    readings: dict[str, list[Reading]] = {}
    router_readings: dict[str, tuple[Reading, Reading]] = {}
    gains = []
    exceeded = True
    for name, assignments in controls.items():
        # Clusters are measured on half of the images, few of which may have a label.
        if not assignments or (router.labels[assignments[0].images] >= 0).sum() < 2:
            continue
        on_images = router.on_images(assignments[0].images, seed)
        router_patch = on_images.read_patches(permutations, seed)
        router_readings[name] = (router_patch, on_images.read_images())
        readings[name] = []
        for control in assignments:
            counts = patch_counts(
                control.expert_index, control.amounts, control.num_experts, router.choices
            )
            selection = replace(on_images, counts=counts[:, : router.counts.shape[1]])
            reading = selection.read_patches(_CONTROL_PERMUTATIONS, seed)
            readings[name] += [reading, selection.read_images()]
            exceeded &= router_patch.bits.significantly_above(reading.bits)
            gains.append(router_patch.bits.value - reading.bits.value)
    return Controls(readings, router_readings, min(gains, default=None), exceeded)


def patch_counts(
    choices: Ints, amounts: Array | None, num_experts: int, which: ChoiceSet
) -> Floats:
    """[I, P, E] sum of the amounts of all choices [I, P, K]; or of the first alone, as 1 if its amount isn't 0."""
    if amounts is None:
        amounts = np.ones(choices.shape, np.float32)
    amounts = np.where(choices >= 0, amounts, 0).astype(np.float32)
    if which == "first":
        choices = choices[..., :1]
        amounts = (amounts[..., :1] > 0).astype(np.float32)
    return choice_counts(choices, num_experts, amounts)


def guess_from_experts(counts: Floats, target: Ints, halves: Flags) -> tuple[Interval, float]:
    """How often the class (part) of a patch is guessed correctly from its expert.

    An expert's guess is the most frequent class among the patches that chose it in the other half of the images.

    Args:
        counts: [I, P, E] how much each patch chose each expert.
        target: [I, P] class or part of each patch; negative: left out.
        halves: [I] which half an image is in.

    Returns:
        The share of correct guesses, with an interval over images; and the share by always guessing the most frequent
        class.
    """
    image_index, patch_index = (target >= 0).nonzero()  # [N]
    # Classes are renumbered: `ranks` [N] are indices into the V `values` that occur.
    values, ranks = np.unique(target[image_index, patch_index], return_inverse=True)
    chosen = counts[image_index, patch_index].astype(np.float64)  # [N, E]
    correct = np.zeros(len(chosen))
    for in_fit, in_test in _folds(halves[image_index]):
        value_counts = np.zeros((len(values), chosen.shape[1]))  # [V, E]
        np.add.at(value_counts, ranks[in_fit], chosen[in_fit])

        # An expert that no patch chose guesses the most frequent class.
        most_frequent = value_counts.sum(1).argmax()
        has_choices = value_counts.sum(0) > 0
        guessed_rank = np.where(has_choices, value_counts.argmax(0), most_frequent)  # [E]
        is_correct = ranks[in_test, None] == guessed_rank  # [N', E]
        correct[in_test] = (chosen[in_test] * is_correct).sum(1)

    num_images = len(counts)
    total_amount = chosen.sum(1)
    correct_by_image = np.bincount(image_index, correct, num_images).astype(np.float64)
    total_by_image = np.bincount(image_index, total_amount, num_images).astype(np.float64)
    guess = ratio_interval(correct_by_image, total_by_image)
    frequency = np.bincount(ranks, total_amount)  # [V]
    return guess, float(frequency.max() / max(frequency.sum(), 1e-12))


def probe_histogram(
    histogram: Floats, labels: Ints, halves: Flags
) -> tuple[Interval, float, Interval]:
    """How well logistic regression predicts the class [I] from histograms of experts [I, E], on held-out images.

    Returns:
        The share of correct predictions; the share of the most frequent class; and the bits about the class, which are
        the mean log2 of the true class's predicted probability over its prior probability.
    """
    values, ranks = np.unique(labels, return_inverse=True)
    num_values = len(values)
    correct = np.zeros(len(labels))
    bits = np.zeros(len(labels))
    for in_fit, in_test in _folds(halves):
        if not (in_fit.any() and in_test.any()):
            continue

        frequency = np.bincount(ranks[in_fit], minlength=num_values)  # [V]
        prior = (frequency + 1) / (in_fit.sum() + num_values)  # [V]
        probs = _predict(histogram[in_fit], ranks[in_fit], histogram[in_test], num_values)
        probs = (1 - _PRIOR_SHARE) * probs + _PRIOR_SHARE * prior  # [I', V]

        true_rank = ranks[in_test]
        correct[in_test] = probs.argmax(1) == true_rank
        bits[in_test] = np.log2(probs / prior)[np.arange(len(true_rank)), true_rank]
    chance = float(np.bincount(ranks).max() / len(ranks))
    return ratio_interval(correct), chance, ratio_interval(bits)


def probe_groups(inputs: Floats, target: Ints, num_groups: int, halves: Flags, seed: int) -> Floats:
    """Divide patches into groups of equal size, one per expert, by a linear probe of their input: [I, p, E] one-hot.

    The probe is fitted to the target [I, p] (negative: not fitted) on one half of the images and applied to the other.
    The patches are sorted by the predicted class, within a class by the probability of it, and cut into equal groups.
    """
    images, patches, width = inputs.shape
    rng = np.random.default_rng(seed)
    values = np.unique(target[target >= 0])
    groups = np.zeros((images, patches), np.int64)
    for in_fit, in_test in _folds(halves):
        tokens = inputs[in_fit].reshape(-1, width)
        labels = target[in_fit].ravel()
        sample = rng.permutation(np.flatnonzero(labels >= 0))[:_PROBE_PATCHES]
        ranks = np.searchsorted(values, labels[sample])
        queries = inputs[in_test].reshape(-1, width)
        probs = _predict(tokens[sample], ranks, queries, len(values))  # [T, V]

        # Patches in order of their predicted class, and of its certainty within the class.
        order = np.lexsort((probs.max(1), probs.argmax(1)))
        group_of_token = np.empty(len(order), np.int64)
        group_of_token[order] = np.arange(len(order)) * num_groups // max(1, len(order))
        groups[in_test] = group_of_token.reshape(-1, patches)
    result: Floats = (groups[..., None] == np.arange(num_groups)).astype(np.float32)
    return result


def _folds(halves: Flags) -> Iterator[tuple[Flags, Flags]]:
    """(mask to fit on, mask to test on), for either half as the one to test on."""
    yield ~halves, halves
    yield halves, ~halves


def _predict(features: Floats, ranks: Ints, queries: Floats, num_values: int) -> Floats:
    """Probabilities [N, V] of queries [N, D] by logistic regression on features, both standardised by the features."""
    from sklearn.linear_model import LogisticRegression  # slow to import

    probs = np.zeros((len(queries), num_values))
    present = np.unique(ranks)
    if len(present) < 2:
        probs[:, present] = 1
        return probs

    mean = features.mean(0)
    spread = features.std(0) + 1e-6
    probe = LogisticRegression(max_iter=200, tol=1e-3).fit((features - mean) / spread, ranks)
    probs[:, probe.classes_] = probe.predict_proba((queries - mean) / spread)
    return probs


def cluster_choices(layer: RecordedLayer, seeds: int, seed: int = 0) -> list[Assignments]:
    """Choices by k-means clusters of the layer's input, one cluster per expert, for each seed.

    Empty unless the inputs of all patches are recorded, and tokens choose, and there are at least as many patches as
    experts. The clusters see no label, so they are fitted to the same patches that they are then applied to.
    """
    if layer.inputs is None or layer.positions is not None or not layer.tokens_choose:
        return []

    inputs = layer.inputs.astype(np.float32)
    tokens = inputs.reshape(-1, inputs.shape[-1])
    if len(tokens) < layer.num_experts:
        return []

    sample = np.random.default_rng(seed).permutation(len(tokens))[:_CLUSTER_PATCHES]
    rule = RoutingRule("token_choice", layer.num_experts, layer.choices.shape[2])
    images = np.arange(len(inputs))
    assignments = []
    for number in range(seeds):
        clustering = Clustering.fit(tokens[sample], rule, seed + number)
        clustering.route(inputs)
        assignments.append(clustering.assignments(images))
    return assignments
