"""What is recorded of a model's routing, and what its experts tell about classes and parts, beside its controls.

What this module owns: recordings, baselines, and readings as numbers. It asks `information` for every statistic, and
leaves to `questions` what changed routes cost and every sentence about the numbers.

A model that isn't ours takes part through a `Recording`: chosen experts and labels, and whatever else is known.
`recording_of` makes one of a model of this package.

A reading is of a patch or of the image (the histogram of its experts, by a probe on held-out images), of the first
choice or of all choices, of all patches or, where parts are known, of object and background apart. Patches of one image
are not independent, so every interval and every shuffling is over images.

Axes: I images, P patches (1 where images are routed as a whole), K choices best first, E experts, C classes, V values
that are predicted, D width, p patches whose inputs are known, T tokens, R images that are run again, N patches whose
value is known.
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

from moevision.analysis.collect import collect_routing, layer_inputs, network_input
from moevision.analysis.images import PictureSet, aligned_pictures, cached, read_images
from moevision.analysis.information import (
    Array,
    Estimate,
    Flags,
    Floats,
    Interval,
    Ints,
    Json,
    Numbers,
    choice_counts,
    class_information,
    entropy_bits,
    halves_by_class,
    part_information,
    ratio_interval,
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

if TYPE_CHECKING:
    from sklearn.cluster import KMeans

Run = Callable[[int, Ints, Ints], Array]
"""(index of the layer, images [R], their experts [R, P, K]) -> logits [R, C] with those routes; gates stay by rank.

A choice ~e, which is negative, is one of expert e that adds nothing to the layer's output; an image all of whose
choices are such is left with the residual alone.
"""

_INPUT_TOKENS = 20_000  # whose inputs are kept of each layer
_BATCH = 32

ChoiceSet = Literal["first", "all"]
"""Which choices of a patch count: its first, or all."""


@dataclass(frozen=True)
class RecordedLayer:
    """What is known of one MoE layer of any model.

    Attributes:
        name: as pages show it, such as "L3".
        choices: [I, P, K] the experts of each patch, best first; P is 1 where images are routed as a whole.
        num_experts: E.
        amounts: [I, P, K] what a choice counts: whether it was kept, or what the patch takes; 1 if None.
        tokens_choose: False for expert choice and Soft MoE, which have no first choice and no route to be forced.
        by_image: all patches of an image share one choice.
        inputs: [I, p, D] what the router receives of some patches; None: no probe, no clusters.
        positions: [p] which patches those are; None: all in order.
        before: choices of the same router before training; one entry for each start that is known.
        untrained: choices of the same model with freshly drawn weights, in place of `before` where that isn't known.
        clusters: choices by clusters of the layer's input; made from `inputs` if None and those are of all patches.
        cluster_start: the router was started from clusters of its input.
        read: whether any logit reads these patches: with a class-token head it doesn't read those of the last block.
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
        return int(np.shape(self.choices)[1])

    @property
    def primary(self) -> ChoiceSet:
        """The choices that answers are about."""
        return "first" if self.tokens_choose else "all"

    def counts(self, which: ChoiceSet) -> Floats:
        """[I, P, E] of the first choices, or of all."""
        return patch_counts(self.choices, self.amounts, self.num_experts, which)


@dataclass(frozen=True)
class Recording:
    """The routing of any model on labelled images: what `three_questions` asks.

    Attributes:
        labels: [I] classes; negative: unknown.
        layers: the MoE layers, in order of depth.
        class_names: [C].
        parts: [I, P] the part that each patch shows; negative: unknown. None: not asked.
        objects: [I, P] whether a patch shows the object (background otherwise); None: not told apart.
        run: runs the model again with forced routes, for the swap test; None: not measured.

    Raises:
        UserError: arrays that don't belong together.
    """

    labels: Ints
    layers: Sequence[RecordedLayer]
    class_names: Sequence[str]
    parts: Ints | None = None
    objects: Flags | None = None
    run: Run | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise UserError(
                "A recording without a layer tells nothing: give the choices of at least one MoE layer."
            )
        for layer in self.layers:
            self._check(layer)

    def _check(self, layer: RecordedLayer) -> None:
        images = len(self.labels)
        shape = np.shape(layer.choices)
        has_axes = len(shape) == 3 and shape[0] == images
        if not has_axes or np.max(layer.choices, initial=0) >= layer.num_experts:
            raise UserError(
                f"The choices of {layer.name} are {list(shape)}: give [images, patches, choices], {images} images, "
                f"experts 0 to {layer.num_experts - 1}."
            )
        if layer.inputs is None:
            return
        patches = layer.num_patches if layer.positions is None else len(layer.positions)
        if layer.inputs.shape[:2] != (images, patches):
            raise UserError(f"The inputs of {layer.name} must be [images, {patches}, width].")


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
    """The recording of a model of ours.

    Args:
        model: the model, in eval mode.
        pictures: the images, in the order of the trace.
        trace: their routing.
        baselines: from `measure_baselines`: `untrained` stands for the router before training, `kmeans_input` for the
            clusters.
        before: routing of the same images by the model before it was trained, in place of `untrained`.
        parts: [I, P] the part that each patch shows.
        part_names: names of the parts; `background` is told apart from the object.
        swap: whether the swap test can be made.
        seed: of the patches whose inputs are kept.

    Raises:
        UserError: `before` has other layers or is about other images.
    """
    if before is not None and (
        before.picture_names != trace.picture_names or len(before.layers) != len(trace.layers)
    ):
        raise UserError(
            "The model before training must have the same MoE layers, and be traced on the same images."
        )
    layers = _with_inputs(model, pictures, trace, seed)
    for index, classifier_reads in enumerate(routes_read(model.net)):
        block = trace.layers[index].layer
        untrained = _of_block(baselines, "untrained", block)
        old = [] if before is None else [Assignments.of(before.layers[index], 0)]
        layers[index] = replace(
            layers[index],
            before=old,
            untrained=() if old else untrained,
            clusters=_of_block(baselines, "kmeans_input", block) or None,
            cluster_start=from_clusters(model.net),
            read=classifier_reads,
        )

    objects = None
    if parts is not None and "background" in part_names:
        objects = np.asarray(parts) != list(part_names).index("background")

    refused = [refusal("swap", layer.router) for layer in moe_layers(model.net)]
    run = None
    if swap and trace.accuracy is not None and not any(refused):
        run = partial(run_forced, model, pictures, [layer.layer for layer in trace.layers])
    return Recording(np.asarray(trace.labels), layers, trace.class_names, parts, objects, run)


def _with_inputs(
    model: SavedModel, pictures: PictureSet, trace: RoutingTrace, seed: int
) -> list[RecordedLayer]:
    """Each layer's choices with its input at the same random patches of every image."""
    rng = np.random.default_rng(seed)
    num_patches = math.prod(trace.grid)
    num_inputs = min(num_patches, max(1, _INPUT_TOKENS // max(1, len(trace))))
    positions = np.sort(rng.permutation(num_patches)[:num_inputs])

    batches: dict[int, list[Floats]] = {layer.layer: [] for layer in trace.layers}
    for inputs in router_inputs(model, pictures, trace, range(len(trace)), _BATCH):
        for layer in trace.layers:
            patches = [0] if layer.route_by == "image" else positions
            batches[layer.layer].append(inputs[layer.layer][:, patches])  # [B, p, D]

    layers = []
    for layer in trace.layers:
        recorded = replace(choices_of(layer), inputs=np.concatenate(batches[layer.layer]))
        if not recorded.by_image and num_inputs < num_patches:
            recorded = replace(recorded, positions=positions)
        layers.append(recorded)
    return layers


def choices_of(layer: LayerTrace) -> RecordedLayer:
    """The choices of a traced layer alone."""
    by_image = layer.route_by == "image"
    patches = slice(None, 1) if by_image else slice(None)
    return RecordedLayer(
        layer.name,
        np.asarray(layer.expert_index)[:, patches],
        layer.num_experts,
        np.asarray(layer.combine_share)[:, patches],
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

    Prefix tokens keep their experts. The blocks before the layer compute an image once for all rows of a batch that
    are the same image.
    """
    layer = numbered_layers(model.net)[blocks[index]]
    prefix = int(getattr(model.net, "num_prefix_tokens", 0))
    logits = []
    for start in range(0, len(images), _BATCH):
        batch = slice(start, start + _BATCH)
        unique, rows = np.unique(images[batch], return_inverse=True)
        pixels = network_input(model, read_images(pictures, unique))
        routes = torch.from_numpy(experts[batch].astype(np.int64))
        edit = methodcaller("choose", routes.to(pixels.device), prefix)
        with per_image_capacity(model.net), apply_edits(model.net, {layer: edit}):
            output = run_repeated(model.net, pixels, torch.from_numpy(rows), first=layer)
        logits.append(output.float().cpu().numpy())
    return np.concatenate(logits)


# ---- baselines: the choices of routers that have learned nothing, of the images that a trained one has routed
#
# "Above chance" is a low bar: a router that was never trained sorts patches by colour, and colour differs between
# classes. What a router tells is therefore compared with what these tell:
# - `untrained`: the same architecture freshly initialised, seen by the same images. Noisy top-k routers start at zero
#   (arXiv:1701.06538, appendix A), where ties would send every patch to the same experts; they get random weights here;
# - `kmeans_input`: E clusters of what the trained layer receives: what routing by similarity alone would tell. Where
#   images are routed as a whole, it is their mean patch.
# A baseline chooses as the layer does (`RoutingRule`), since information depends on how many experts a patch has and on
# how evenly it takes from them, and differs from it in its scores only. Where there is a softmax the scores are first
# scaled so that it is as undecided as the layer is on average. Clusters are fitted on one half of the images and
# measured on the other; the nearer a cluster, the larger its score.

_FIT_TOKENS = 20_000  # of a clustering: enough for E centres; more only costs time
_FIT_BATCH = 64
_LARGEST_SCALE = 1e6  # of the search for a scale
_SEARCH_STEPS = 60
_SEARCH_PATCHES = 4096


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
        raise UserError(
            "Baselines need at least two images, to fit and to measure clusters: give more images."
        )
    blocks = [layer.layer_index for layer in moe_layers(model.net)]
    if blocks != [layer.layer for layer in trace.layers]:
        raise UserError(
            "This trace has other MoE layers than the model: collect it again with this model."
        )
    # Image i is row i of the trace.
    pictures = cached(aligned_pictures(pictures, trace))

    untrained = []
    for weight_seed in range(seeds):
        fresh = replace(model, net=fresh_copy(model.net, weight_seed))
        fresh_trace = collect_routing(fresh, pictures, progress=False)
        untrained += [Assignments.of(layer, weight_seed) for layer in fresh_trace.layers]
    clusters = _measure_clusters(model, pictures, trace, seeds, seed)
    return {"untrained": untrained, "kmeans_input": clusters}


def fresh_copy(net: nn.Module, seed: int) -> nn.Module:
    """The same architecture with newly drawn weights, as an untrained model starts, but with random routers.

    Nothing of the trained weights is left (the rule `colour` keeps its colours); the CPU's generator is put back.
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
                # LeCun, as V-MoE's router starts.
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return fresh.eval()


def _measure_clusters(
    model: SavedModel, pictures: PictureSet, trace: RoutingTrace, seeds: int, seed: int
) -> list[Assignments]:
    """K-means of each layer's input, fitted on half of the images, applied to the others."""
    in_measured_half = halves_by_class(np.asarray(trace.labels), seed)
    fitted = np.flatnonzero(~in_measured_half)
    measured = np.flatnonzero(in_measured_half)

    tokens = _sampled_tokens(model, pictures, trace, fitted, seed)
    clusterings = [
        Clustering.fit(tokens[layer.layer], RoutingRule.of(layer), cluster_seed, layer.layer)
        for layer in trace.layers
        for cluster_seed in range(seeds)
    ]
    for inputs in router_inputs(model, pictures, trace, measured, _FIT_BATCH):
        for clustering in clusterings:
            clustering.route(inputs[cast(int, clustering.layer)])
    return [clustering.assignments(measured) for clustering in clusterings]


def _sampled_tokens(
    model: SavedModel, pictures: PictureSet, trace: RoutingTrace, images: Ints, seed: int
) -> dict[int, Floats]:
    """What each layer receives of random patches of some images: block -> [T, D]."""
    rng = np.random.default_rng(seed)
    per_image = max(1, _FIT_TOKENS // max(1, len(images)))
    sample: dict[int, list[Floats]] = {layer.layer: [] for layer in trace.layers}
    for inputs in router_inputs(model, pictures, trace, images, _FIT_BATCH):
        for block, tokens in inputs.items():
            order = rng.random(tokens.shape[:2]).argsort(1)  # [B, P]
            patches = order[:, :per_image, None]
            sampled = np.take_along_axis(tokens, patches, 1)  # [B, p, D]
            sample[block].append(sampled.reshape(-1, tokens.shape[-1]))
    return {block: np.concatenate(batches) for block, batches in sample.items()}


@dataclass
class Clustering:
    """K-means clusters of a layer's input as a router: the nearer a cluster, the larger its score."""

    layer: int | None  # its block; None where there is one layer
    seed: int
    rule: RoutingRule
    means: KMeans
    scale: float  # of the scores
    batches: list[Routes] = field(default_factory=list)  # what was routed so far

    @classmethod
    def fit(
        cls, tokens: Floats, rule: RoutingRule, seed: int, layer: int | None = None
    ) -> Clustering:
        """As many clusters of tokens [T, D] as experts."""
        means = fit_clusters(tokens, rule.num_experts, seed)
        return cls(layer, seed, rule, means, rule.scale(nearness(means, tokens)))

    def route(self, tokens: Floats) -> None:
        """Choose experts for the patches [B, P, D] of further images."""
        self.batches.append(self.rule.apply(nearness(self.means, tokens), self.scale))

    def assignments(self, images: Ints) -> Assignments:
        """The choices for all `images` that were routed."""
        index = np.concatenate([routes.expert_index for routes in self.batches])
        amounts = None
        if self.rule.kind != "token_choice":
            # Every patch names all experts: they are stored once.
            index = np.broadcast_to(index[:1, :1].copy(), index.shape)
            amounts = np.concatenate([cast(Floats, routes.amounts) for routes in self.batches])
        return Assignments(self.layer, self.seed, index, images, self.rule.num_experts, amounts)


def nearness(means: KMeans, tokens: Floats) -> Floats:
    """[..., E] how near tokens [..., D] are to each cluster."""
    distance = means.transform(tokens.reshape(-1, tokens.shape[-1]))
    return cast(Floats, -np.square(distance).reshape(*tokens.shape[:-1], -1))


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
    """Per batch what each MoE layer routes by: block -> [B, P, D]; everywhere their mean where images are routed."""
    for start in range(0, len(indices), batch_size):
        images = read_images(pictures, indices[start : start + batch_size])
        received = {}
        for block, tokens in layer_inputs(model.net, network_input(model, images)).items():
            if trace.layer(block).route_by == "image":
                tokens = tokens.mean(1, keepdim=True).expand_as(tokens)
            received[block] = tokens.float().cpu().numpy()
        yield received


class Routes(NamedTuple):
    """Experts [I, P, K] int16, and what each choice counts [I, P, K]; None for 1."""

    expert_index: Ints
    amounts: Floats | None = None


@dataclass(frozen=True)
class RoutingRule:
    """How a layer chooses experts by scores."""

    kind: RoutingKind  # who chooses
    num_experts: int  # E
    top_k: int  # K of token choice, C of expert choice, 0 for Soft MoE
    entropy_bits: float = 0.0  # mean entropy of the layer's router; token choice needs none

    @classmethod
    def of(cls, layer: LayerTrace) -> RoutingRule:
        """The rule of a traced layer."""
        if layer.kind == "token_choice":
            return cls(layer.kind, layer.num_experts, layer.top_k)
        entropy = float(np.asarray(layer.entropy_bits, dtype=np.float64).mean())
        capacity = round(float(layer.counts().mean())) if layer.kind == "expert_choice" else 0
        return cls(layer.kind, layer.num_experts, capacity, entropy)

    def scale(self, scores: Floats) -> float:
        """What to multiply scores [..., E] by, so that their softmax has the layer's mean entropy.

        Found by bisection of its logarithm, after the scores were divided by their standard deviation.
        """
        if self.kind == "token_choice":
            return 1.0
        scores = np.asarray(scores, dtype=np.float64).reshape(-1, self.num_experts)
        scores = scores[:: math.ceil(len(scores) / _SEARCH_PATCHES)]
        spread = max(float(scores.std(-1).mean()), 1e-12)
        unit = scores / spread

        low = 1 / _LARGEST_SCALE
        high = _LARGEST_SCALE
        for _ in range(_SEARCH_STEPS):
            middle = math.sqrt(low * high)
            entropy = entr(softmax(middle * unit, -1)).sum(-1).mean() / np.log(2)
            if entropy < self.entropy_bits:
                high = middle
            else:
                low = middle
        return low / spread

    def apply(self, scores: Array, scale: float) -> Routes:
        """What scores [I, P, E] choose, the larger the better, multiplied by the `scale`."""
        if self.kind == "token_choice":
            best_first = np.argsort(scores, axis=-1)[..., ::-1]
            return Routes(best_first[..., : self.top_k].astype(np.int16))

        experts = np.arange(self.num_experts, dtype=np.int16)
        all_experts = np.broadcast_to(experts, scores.shape)
        log_affinity = log_softmax(scale * np.asarray(scores, dtype=np.float64), -1)
        weights = np.exp(log_affinity).astype(np.float32)
        if self.kind == "soft":
            return Routes(all_experts, weights)

        # Expert choice: each expert takes its best patches of the image.
        order = np.argsort(-log_affinity, axis=1, kind="stable")
        rank = np.argsort(order, axis=1)
        is_taken = rank < self.top_k
        return Routes(all_experts, weights * is_taken)


@dataclass(frozen=True)
class Assignments:
    """The experts that one baseline gives to patches."""

    layer: int | None  # block of the layer that it is compared with; None: it is the same for all
    seed: int  # of what is random in it
    expert_index: Ints  # [I', P, K] int16, best first
    images: Ints  # [I'] rows of the trace that it was measured on
    num_experts: int  # E
    amounts: Array | None = None  # [I', P, K] what each choice counts; 1 if None

    @classmethod
    def of(cls, layer: LayerTrace, seed: int) -> Assignments:
        """The choices of a traced layer on all images of its trace."""
        images = np.arange(len(layer.expert_index))
        return cls(
            layer.layer, seed, layer.expert_index, images, layer.num_experts, layer.combine_share
        )


def _of_block(
    baselines: Mapping[str, Sequence[Assignments]] | None, name: str, block: int
) -> list[Assignments]:
    """The assignments of one baseline to the layer of one block."""
    assignments = (baselines or {}).get(name, ())
    return [assigned for assigned in assignments if assigned.layer in (None, block)]


# ---- what is read off it

_CONTROL_PERMUTATIONS = 50  # a control's null is only subtracted
_PROBE_TOKENS = 6_000  # that a linear probe is fitted on
_PROBE_CLASSES = 100  # more take minutes to fit
_CLUSTER_TOKENS = 20_000  # that clusters are fitted on
_PRIOR = 1e-3  # share of the prior in a probe's prediction: an excluded class costs 10 bits


@dataclass(frozen=True)
class Reading(Numbers):
    """What experts tell, read in one way."""

    of: str  # `class` or `part`
    unit: str  # `patch`: the choice of one; `image`: the histogram of all its patches, by a probe on held-out images
    choices: ChoiceSet  # `first` or `all`
    where: str  # `everywhere`, `object` or `background`
    # share guessed right from the expert, the guess of each expert coming from the other half of the images
    guess: Interval
    chance: float  # share of the most frequent class (part)
    bits: Interval  # above shuffled images; of the image: above the class frequencies, on held-out images
    p_value: float | None = None  # of the shuffling; None where held-out images were used instead


@dataclass(frozen=True)
class Load(Numbers):
    """How evenly a layer uses its experts; a class x expert table never stands without it."""

    share: Floats  # [E] of all choices
    class_share: Floats  # [C, E] share of each class's choices; NaN for a class without images

    @classmethod
    def of(cls, counts: Floats, labels: Ints, num_classes: int) -> Load:
        """The load of counts [I, P, E] on images of these classes [I]."""
        by_image = counts.sum(1, dtype=np.float64)  # [I, E]
        one_hot = (labels[:, None] == np.arange(num_classes)).astype(np.float64)  # [I, C]
        table = one_hot.T @ by_image  # [C, E]
        total = max(by_image.sum(), 1e-12)
        with np.errstate(invalid="ignore"):
            class_share = table / table.sum(1, keepdims=True)
        return cls(by_image.sum(0) / total, class_share)

    @property
    def max_over_mean(self) -> float:
        """Busiest expert over the mean."""
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
    """What the controls of a layer tell, beside the router on the same images."""

    # name of a control -> what each of its seeds tells, of a patch and of the image
    readings: Mapping[str, Sequence[Reading]] = field(default_factory=dict)
    # name of a control -> the same of the router, on the images of that control
    same: Mapping[str, tuple[Reading, Reading]] = field(default_factory=dict)
    # bits by which the router exceeds the best of them; None where there is none
    gain: float | None = None
    exceeded: bool = True  # whether it exceeds each of them (interval of the difference above 0)


@dataclass(frozen=True)
class LayerReadings:
    """Everything that was read off one layer of one training."""

    layer: RecordedLayer
    load: Load  # how evenly its experts are used
    reason: str | None = None  # why nothing else was read; None where it was
    readings: Sequence[Reading] = ()  # that of the answers first
    probe: Reading | None = None  # of the linear probe's balanced groups; None without inputs
    controls: Controls = Controls()  # those of the layer
    # what a probe tells, or without one what so many experts could tell at most
    most_bits: float = math.nan


def measure_layer(
    recording: Recording, index: int, *, permutations: int, cluster_seeds: int, seed: int
) -> LayerReadings:
    """Read one layer of one training; the arguments are those of `three_questions`."""
    layer = recording.layers[index]
    labels = np.asarray(recording.labels)
    load = Load.of(layer.counts("all"), labels, len(recording.class_names))
    labelled = labels[labels >= 0]
    if len(np.unique(labelled)) < 2:
        return LayerReadings(layer, load, "fewer than two classes have images")

    # The router itself, what the answers are about first.
    selections = _selections(recording, layer, labels, seed)
    primary = selections[0]
    readings = []
    for selection in selections:
        readings.append(selection.read_patches(permutations, seed))
        readings.append(selection.read_images())
    parts = recording.parts
    if parts is not None and layer.num_patches > 1 and len(np.unique(parts[parts >= 0])) > 1:
        readings.append(primary.read_parts(parts, permutations, seed))

    # What it is compared with.
    probe = _probe_reading(layer, primary, seed)
    clusters = layer.clusters
    if clusters is None:
        clusters = cluster_choices(layer, cluster_seeds, seed)
    controls = {"before": layer.before, "untrained": layer.untrained, "clusters": clusters}
    compared = _compare(primary, controls, permutations, seed)

    if probe is not None and probe.bits.value > 0:
        most_bits = probe.bits.value
    else:
        class_bits = entropy_bits(np.bincount(labelled))
        most_bits = min(class_bits, math.log2(max(2, layer.num_experts)))
    return LayerReadings(layer, load, None, readings, probe, compared, most_bits)


def _probe_reading(layer: RecordedLayer, router: _Selection, seed: int) -> Reading | None:
    """What the linear probe's balanced groups tell; None where it can't be fitted."""
    labels = router.labels
    if layer.inputs is None or len(np.unique(labels)) > _PROBE_CLASSES:
        return None
    target = np.broadcast_to(labels[:, None], layer.inputs.shape[:2])
    groups = probe_groups(layer.inputs, target, layer.num_experts, router.halves, seed)
    return _Selection(groups, labels, router.halves).read_patches(_CONTROL_PERMUTATIONS, seed)


@dataclass(frozen=True)
class _Selection:
    """Which choices of which images are read."""

    counts: Floats  # [I', P, E]
    labels: Ints  # [I']
    halves: Flags  # [I'] which half of the images an image is in
    choices: ChoiceSet = "first"
    where: str = "everywhere"

    def on_images(self, images: Ints, seed: int) -> _Selection:
        """The same of some images, which are divided into halves anew."""
        labels = self.labels[images]
        return replace(
            self,
            counts=self.counts[images],
            labels=labels,
            halves=halves_by_class(labels, seed),
        )

    def read_patches(self, permutations: int, seed: int) -> Reading:
        """What the choice of one patch tells about the class."""
        target = np.broadcast_to(self.labels[:, None], self.counts.shape[:2])
        estimate = class_information(
            self.counts, self.labels, num_permutations=permutations, seed=seed
        )
        return self._of_patches("class", target, estimate)

    def read_parts(self, parts: Ints, permutations: int, seed: int) -> Reading:
        """What the choice of one patch tells about the part [I', P] that it shows."""
        estimate = part_information(self.counts, parts, num_permutations=permutations, seed=seed)
        return self._of_patches("part", parts, estimate)

    def _of_patches(self, of: str, target: Ints, estimate: Estimate) -> Reading:
        guess, chance = guess_from_experts(self.counts, target, self.halves)
        bits = Interval(estimate.value_bits, estimate.low, estimate.high)
        return Reading(of, "patch", self.choices, self.where, guess, chance, bits, estimate.p_value)

    def read_images(self) -> Reading:
        """What a probe reads off the histogram of the image, on held-out images."""
        labelled = self.labels >= 0
        sums = self.counts[labelled].sum(1)  # [I'', E]
        histogram = sums / np.maximum(sums.sum(1, keepdims=True), 1e-12)
        guess, chance, bits = probe_histogram(
            histogram, self.labels[labelled], self.halves[labelled]
        )
        return Reading("class", "image", self.choices, self.where, guess, chance, bits)


def _selections(
    recording: Recording, layer: RecordedLayer, labels: Ints, seed: int
) -> list[_Selection]:
    """Everything that is read of a layer, what the answers are about first."""
    halves = halves_by_class(labels, seed)
    counts = {layer.primary: layer.counts(layer.primary), "all": layer.counts("all")}
    if layer.counts("first").sum() == counts["all"].sum():
        counts = {layer.primary: counts[layer.primary]}

    masks = {"everywhere": np.ones(layer.choices.shape[:2], bool)}  # [I, P]
    if recording.objects is not None and layer.num_patches > 1:
        masks["object"] = np.asarray(recording.objects, bool)
        masks["background"] = ~masks["object"]

    selections = []
    for where, mask in masks.items():
        for choices, choice_count in counts.items():
            masked = choice_count * mask[..., None]
            selections.append(_Selection(masked, labels, halves, choices, where))
    return selections


def _compare(
    router: _Selection,
    controls: Mapping[str, Sequence[Assignments]],
    permutations: int,
    seed: int,
) -> Controls:
    """The controls, and by how much the router exceeds the best of them."""
    readings: dict[str, list[Reading]] = {}
    same: dict[str, tuple[Reading, Reading]] = {}
    gains = []
    exceeded = True
    measured_on: Ints | None = None
    for name, assignments in controls.items():
        for control in assignments:
            images = np.asarray(control.images)
            # Clusters are measured on half of the images, few of which may have a label.
            if (router.labels[images] >= 0).sum() < 2:
                continue
            # Controls of the same images follow each other, so the router is read once on them.
            if measured_on is None or not np.array_equal(images, measured_on):
                measured_on = images
                on_images = router.on_images(images, seed)
                router_patch = on_images.read_patches(permutations, seed)
                router_image = on_images.read_images()
            same[name] = (router_patch, router_image)

            counts = patch_counts(
                control.expert_index, control.amounts, control.num_experts, router.choices
            )
            selection = replace(on_images, counts=counts[:, : router.counts.shape[1]])
            reading = selection.read_patches(_CONTROL_PERMUTATIONS, seed)
            readings.setdefault(name, []).extend([reading, selection.read_images()])
            exceeded &= router_patch.bits.significantly_above(reading.bits)
            gains.append(router_patch.bits.value - reading.bits.value)
    return Controls(readings, same, min(gains, default=None), exceeded)


def patch_counts(
    choices: Ints, amounts: Array | None, num_experts: int, which: ChoiceSet
) -> Floats:
    """[I, P, E] of all choices [I, P, K], or of the first alone (which counts 1 where it counts at all)."""
    choices = np.asarray(choices)
    if amounts is None:
        amounts = np.ones(choices.shape, np.float32)
    amounts = np.where(choices >= 0, np.asarray(amounts, np.float32), 0)
    if which == "first":
        choices = choices[..., :1]
        amounts = (amounts[..., :1] > 0).astype(np.float32)
    return choice_counts(choices, num_experts, amounts)


def guess_from_experts(counts: Floats, target: Ints, halves: Flags) -> tuple[Interval, float]:
    """How often the class (part) is right that an expert's choices mostly are of, in the other half of the images.

    From counts [I, P, E], the class or part of each patch [I, P] (negative: left out) and which half an image is in.
    Beside the share guessed right, with an interval over images, is that of always guessing the most frequent value.
    """
    image, patch = (target >= 0).nonzero()  # [N]
    values, ranks = np.unique(target[image, patch], return_inverse=True)
    chosen = counts[image, patch].astype(np.float64)  # [N, E]
    correct = np.zeros(len(chosen))
    for fit, test in _folds(halves[image]):
        table = np.zeros((len(values), chosen.shape[1]))  # [V, E]
        np.add.at(table, ranks[fit], chosen[fit])
        # An expert without a choice guesses the most frequent value.
        most_frequent = table.sum(1).argmax()
        has_choices = table.sum(0) > 0
        best = np.where(has_choices, table.argmax(0), most_frequent)  # [E]
        hits = ranks[test, None] == best
        correct[test] = (chosen[test] * hits).sum(1)

    images = len(counts)
    total = chosen.sum(1)
    correct_by_image = np.bincount(image, correct, images).astype(np.float64)
    total_by_image = np.bincount(image, total, images).astype(np.float64)
    guess = ratio_interval(correct_by_image, total_by_image)
    frequency = np.bincount(ranks, total)  # [V]
    return guess, float(frequency.max() / max(frequency.sum(), 1e-12))


def probe_histogram(
    histogram: Floats, labels: Ints, halves: Flags
) -> tuple[Interval, float, Interval]:
    """What logistic regression tells from the histograms [I, E] of held-out images.

    It is the share guessed right, that of the most frequent class, and the bits about the class: the mean of log2 of
    the predicted over the prior probability of the true class.
    """
    values, ranks = np.unique(labels, return_inverse=True)
    num_values = len(values)
    correct = np.zeros(len(labels))
    bits = np.zeros(len(labels))
    for fit, test in _folds(halves):
        if not (fit.any() and test.any()):
            continue
        frequency = np.bincount(ranks[fit], minlength=num_values)
        prior = (frequency + 1) / (fit.sum() + num_values)  # [V]
        probs = _predict(histogram[fit], ranks[fit], histogram[test], num_values)
        probs = (1 - _PRIOR) * probs + _PRIOR * prior
        truth = ranks[test]
        correct[test] = probs.argmax(1) == truth
        bits[test] = np.log2(probs / prior)[np.arange(len(truth)), truth]
    chance = float(np.bincount(ranks).max() / len(ranks))
    return ratio_interval(correct), chance, ratio_interval(bits)


def probe_groups(inputs: Floats, target: Ints, num_groups: int, halves: Flags, seed: int) -> Floats:
    """[I, p, E] one-hot: patches dealt to as many balanced groups as experts, by a linear probe of their input.

    The probe is fitted to the target [I, p] (negative: not fitted) on one half of the images and applied to the other.
    Its patches are put in the order of the class that it predicts (and of its certainty in each) and cut into groups of
    equal size.
    """
    images, patches, width = inputs.shape
    rng = np.random.default_rng(seed)
    values = np.unique(target[target >= 0])
    groups = np.zeros((images, patches), np.int64)
    for fit, test in _folds(halves):
        tokens = inputs[fit].reshape(-1, width)
        labels = target[fit].ravel()
        sample = rng.permutation(np.flatnonzero(labels >= 0))[:_PROBE_TOKENS]
        ranks = np.searchsorted(values, labels[sample])
        queries = inputs[test].reshape(-1, width)
        probs = _predict(tokens[sample], ranks, queries, len(values))  # [T, V]

        # Patches in order of their predicted class, and of its certainty within the class.
        order = np.lexsort((probs.max(1), probs.argmax(1)))
        group = np.empty(len(order), np.int64)
        group[order] = np.arange(len(order)) * num_groups // max(1, len(order))
        groups[test] = group.reshape(-1, patches)
    return cast(Floats, (groups[..., None] == np.arange(num_groups)).astype(np.float32))


def _folds(halves: Flags) -> Iterator[tuple[Flags, Flags]]:
    """Each half once to be fitted on and once to be tested on."""
    yield ~halves, halves
    yield halves, ~halves


def _predict(features: Floats, ranks: Ints, queries: Floats, num_values: int) -> Floats:
    """[N, V] probabilities of queries [N, D] by logistic regression on standardised features."""
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
    """Choices by k-means clusters of the layer's input, as many as experts.

    There are none where not all patches' inputs are known, or fewer than experts. The clusters see no label, so they
    are fitted to the same patches that they deal out.
    """
    if layer.inputs is None or layer.positions is not None or not layer.tokens_choose:
        return []
    inputs = layer.inputs.astype(np.float32)
    tokens = inputs.reshape(-1, inputs.shape[-1])
    if len(tokens) < layer.num_experts:
        return []
    sample = np.random.default_rng(seed).permutation(len(tokens))[:_CLUSTER_TOKENS]
    rule = RoutingRule("token_choice", layer.num_experts, layer.choices.shape[2])
    images = np.arange(len(inputs))
    assignments = []
    for number in range(seeds):
        clustering = Clustering.fit(tokens[sample], rule, seed + number)
        clustering.route(inputs)
        assignments.append(clustering.assignments(images))
    return assignments
