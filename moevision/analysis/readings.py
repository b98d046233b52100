"""What is recorded of a model's routing, and what its experts tell about classes and parts, beside its controls.

A model that isn't ours takes part through a `Recording`: chosen experts and labels, and whatever else is known.
`recording_of` makes one of a model of this package.

A reading is of a patch or of the image (the histogram of its experts, by a probe on held-out images), of the first
choice or of all choices, of all patches or, where parts are known, of object and background apart. Patches of one image
are not independent, so every interval and every shuffling is over images.

Sources: Agresti and Min, Statistics in Medicine 24 (2005) 729-740 (interval of a difference of paired proportions,
which stays wide where no image changes); Zou and Donner, Statistics in Medicine 27 (2008) 1693-1702 (`exceeds`).

Axes: I images, P patches (1 where images are routed as a whole), K choices best first, E experts, C classes, V values
asked about, D width, p patches whose inputs are known, R images that are run again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import methodcaller
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from scipy.special import entr, log_softmax, softmax
from torch import nn

from moevision.analysis.collect import collect_routing, layer_inputs, network_input
from moevision.analysis.images import PictureSet, aligned_pictures, cached, read_images
from moevision.analysis.information import (
    LEVEL,
    Array,
    Estimate,
    Flags,
    Floats,
    Ints,
    Json,
    Numbers,
    choice_counts,
    class_information,
    entropy_bits,
    halves_by_class,
    part_information,
    students_quantile,
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
from moevision.layers import MoEMlp, moe_layers
from moevision.layers.routing import Kind as RoutingKind
from moevision.models.convert import routes_read
from moevision.models.io import SavedModel, from_clusters
from moevision.words import signed

if TYPE_CHECKING:
    from sklearn.cluster import KMeans

Run = Callable[[int, Ints, Ints], Array]
"""(place of the layer, images [R], their experts [R, P, K]) -> logits [R, C] with those routes; gates stay by rank.

A choice ~e, which is negative, is one of expert e that adds nothing to the layer's output; an image all of whose
choices are such is left with the residual alone.
"""

_INPUT_TOKENS = 20_000  # whose inputs are kept of each layer
_BATCH = 32


@dataclass(frozen=True)
class RecordedLayer:
    """What is known of one MoE layer of any model.

    Attributes:
        name: as it is shown, such as "L3".
        choices: [I, P, K] the experts of each patch, best first; P is 1 where images are routed as a whole.
        num_experts: E.
        amounts: [I, P, K] what a choice counts: whether it was kept, or what the patch takes; 1 if None.
        tokens_choose: False for expert choice and Soft MoE, which have no first choice and no route to be forced.
        by_image: all patches of an image share one choice.
        inputs: [I, p, D] what the router receives of some patches; None: no probe, no clusters.
        positions: [p] which patches those are; None: all in order.
        before: choices of the same router before training; one entry for each start that is known.
        untrained: choices of the same model with freshly drawn weights, which stands for it where that isn't known.
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
        images = len(self.labels)
        for layer in self.layers:
            shape = np.shape(layer.choices)
            if (
                len(shape) != 3
                or shape[0] != images
                or np.max(layer.choices, initial=0) >= layer.num_experts
            ):
                raise UserError(
                    f"The choices of {layer.name} are {list(shape)}: give [images, patches, choices], {images} images, "
                    f"experts 0 to {layer.num_experts - 1}."
                )
            if layer.inputs is not None and layer.inputs.shape[:2] != (images, _count(layer)):
                raise UserError(
                    f"The inputs of {layer.name} must be [images, {_count(layer)}, width]."
                )
        if not self.layers:
            raise UserError(
                "A recording without a layer tells nothing: give the choices of at least one MoE layer."
            )


def _count(layer: RecordedLayer) -> int:
    return np.shape(layer.choices)[1] if layer.positions is None else len(layer.positions)


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
    patches = trace.grid[0] * trace.grid[1]
    kept = min(patches, max(1, _INPUT_TOKENS // max(1, len(trace))))
    positions = np.sort(np.random.default_rng(seed).permutation(patches)[:kept])
    inputs: dict[int, list[Floats]] = {layer.layer: [] for layer in trace.layers}
    for batch in router_inputs(model, pictures, trace, range(len(trace)), _BATCH):
        for layer in trace.layers:
            inputs[layer.layer].append(
                batch[layer.layer][:, [0] if layer.route_by == "image" else positions]
            )
    found = baselines or {}
    layers = []
    for place, (layer, read) in enumerate(zip(trace.layers, routes_read(model.net), strict=True)):
        mine = {
            name: [each for each in found.get(name, ()) if each.layer in (None, layer.layer)]
            for name in ("untrained", "kmeans_input")
        }
        old = []
        if before is not None:
            ago = before.layers[place]
            old = [
                Assignments(
                    layer.layer,
                    0,
                    ago.expert_index,
                    np.arange(len(before)),
                    ago.num_experts,
                    ago.takes,
                )
            ]
        layers.append(
            replace(
                choices_of(layer),
                inputs=np.concatenate(inputs[layer.layer]),
                positions=None if layer.route_by == "image" or kept == patches else positions,
                before=old,
                untrained=() if old else mine["untrained"],
                clusters=mine["kmeans_input"] or None,
                cluster_start=from_clusters(model.net),
                read=read,
            )
        )
    objects = None
    if parts is not None and "background" in part_names:
        objects = np.asarray(parts) != list(part_names).index("background")
    run = None
    if (
        swap
        and trace.accuracy is not None
        and not any(refusal("swap", each.router) for each in moe_layers(model.net))
    ):
        run = partial(run_forced, model, pictures, [layer.layer for layer in trace.layers])
    return Recording(np.asarray(trace.labels), layers, trace.class_names, parts, objects, run)


def choices_of(layer: LayerTrace) -> RecordedLayer:
    """The choices of a traced layer alone."""
    one = slice(None, 1) if layer.route_by == "image" else slice(None)
    return RecordedLayer(
        layer.name,
        np.asarray(layer.expert_index)[:, one],
        layer.num_experts,
        np.asarray(layer.takes)[:, one],
        tokens_choose=layer.kind == "token_choice",
        by_image=layer.route_by == "image",
    )


@torch.inference_mode()
def run_forced(
    model: SavedModel,
    pictures: PictureSet,
    blocks: Sequence[int],
    place: int,
    images: Ints,
    experts: Ints,
) -> Floats:
    """Logits [R, C] of images [R] whose patches go to these experts [R, P, K] in one layer; see `Run`.

    The blocks before the layer compute an image once for all its neighbours in the list that are the same image.
    """
    layer, logits = numbered_layers(model.net)[blocks[place]], []
    prefix = int(getattr(model.net, "num_prefix_tokens", 0))
    for start in range(0, len(images), _BATCH):
        part = slice(start, start + _BATCH)
        each, rows = np.unique(images[part], return_inverse=True)
        pixels = network_input(model, read_images(pictures, each))
        again = partial(run_repeated, model.net, rows=torch.from_numpy(rows), first=layer)
        logits.append(forced_logits(model.net, layer, pixels, experts[part], prefix, again))
    return np.concatenate(logits)


@torch.inference_mode()
def forced_logits(
    net: nn.Module,
    layer: MoEMlp,
    inputs: torch.Tensor,
    experts: Ints,
    prefix: int = 0,
    run: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Floats:
    """Logits [R, C] of `net(inputs)` while the patches go to these experts [R, P, K] in one of its layers; see `Run`.

    The first `prefix` tokens stay where they are. `run` stands for `net`.
    """
    wanted = torch.from_numpy(experts.astype(np.int64)).to(inputs.device)
    with per_image_capacity(net), apply_edits(net, {layer: methodcaller("choose", wanted, prefix)}):
        logits: Floats = (run or net)(inputs).float().cpu().numpy()
    return logits


# ---- baselines: the choices of routers that have learned nothing, of the images that a trained one has routed
#
# "Above chance" is a low bar: a router that was never trained sorts patches by colour, and colour differs between
# classes. What a router tells is therefore compared with what these tell:
# - `untrained`: the same architecture freshly initialised, seen by the same images. Noisy top-k routers start at zero
#   (arXiv:1701.06538, appendix A), where ties would send every patch to the same experts; they get random weights here;
# - `kmeans_input`: E clusters of what the trained layer receives: what routing by similarity alone would tell. Where
#   images are routed as a whole, it is their mean patch.
# A baseline chooses as the layer does (`Rule`), since information depends on how many experts a patch has and on how
# evenly it takes from them, and differs from it in its scores only. Where there is a softmax the scores are first
# scaled so that it is as undecided as the layer is on average. Clusters are fitted on one half of the images and
# measured on the other; the nearer a cluster, the larger its score.

_FIT_TOKENS = 20_000  # of a clustering: enough for E centres; more only costs time
_FIT_BATCH = 64
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
        raise UserError(
            "Baselines need at least two images, to fit and to measure clusters: give more images."
        )
    if [layer.layer_index for layer in moe_layers(model.net)] != [
        layer.layer for layer in trace.layers
    ]:
        raise UserError(
            "This trace has other MoE layers than the model: collect it again with this model."
        )
    pictures = cached(aligned_pictures(pictures, trace))  # image i is row i of the trace
    untrained = [
        Assignments(
            own.layer, s, own.expert_index, np.arange(len(trace)), own.num_experts, own.takes
        )
        for s in range(seeds)
        for own in collect_routing(
            replace(model, net=fresh_copy(model.net, s)), pictures, progress=False
        ).layers
    ]
    return {"untrained": untrained, "kmeans_input": _clusters(model, pictures, trace, seeds, seed)}


def fresh_copy(net: nn.Module, seed: int) -> nn.Module:
    """The same architecture with newly drawn weights, as an untrained model starts, but with random routers.

    Nothing of the trained weights is left (the rule `colour` keeps its colours); the CPU's generator is put back.
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
                nn.init.normal_(
                    weight, std=weight.shape[1] ** -0.5
                )  # LeCun, as V-MoE's router starts
    return fresh.eval()


def _clusters(
    model: SavedModel, pictures: PictureSet, trace: RoutingTrace, seeds: int, seed: int
) -> list[Assignments]:
    """K-means of each layer's input, fitted on half of the images, applied to the others."""
    half, rng = halves_by_class(np.asarray(trace.labels), seed), np.random.default_rng(seed)
    fitted, measured = np.flatnonzero(~half), np.flatnonzero(half)
    per_image = max(1, _FIT_TOKENS // max(1, len(fitted)))
    sample: dict[int, list[Floats]] = {layer.layer: [] for layer in trace.layers}
    for inputs in router_inputs(model, pictures, trace, fitted, _FIT_BATCH):
        places = np.tile(
            np.arange(trace.grid[0] * trace.grid[1]), (len(next(iter(inputs.values()))), 1)
        )  # [B, P]
        for _ in {layer.route_by for layer in trace.layers}:
            rng.permuted(
                places, axis=1
            )  # a draw that earlier versions made: clusters are those of their reports
        for block, tokens in inputs.items():
            taken = rng.permuted(places, axis=1)[:, :per_image]
            sample[block].append(np.take_along_axis(tokens, taken[..., None], 1))  # [B, p, D]

    clusterings = []
    for layer in trace.layers:
        tokens, rule = np.concatenate(sample[layer.layer]), Rule.of(layer)
        for s in range(seeds):
            means = fit_clusters(tokens.reshape(-1, tokens.shape[-1]), rule.num_experts, s)
            chosen: list[Chosen] = []
            clusterings.append(
                (layer.layer, s, rule, means, rule.scale(nearness(means, tokens)), chosen)
            )
    for inputs in router_inputs(model, pictures, trace, measured, _FIT_BATCH):
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
    model: SavedModel,
    pictures: PictureSet,
    trace: RoutingTrace,
    indices: Sequence[int] | Ints,
    batch_size: int,
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
    entropy_bits: float = (
        0.0  # mean entropy of the layer's router; 0 for token choice, which needs none
    )

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
        """What scores [I, P, E] choose, the larger the better, multiplied by the `scale`."""
        if self.kind == "token_choice":
            return Chosen(
                np.argsort(scores, axis=-1)[..., ::-1][..., : self.top_k].astype(np.int16)
            )
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

    layer: (
        int | None
    )  # block index of the layer it is compared with; None where it is the same for every layer
    seed: int  # of what is random in it
    expert_index: Ints  # [I', P, K] int16, best first
    images: Ints  # [I'] rows of the trace that it was measured on
    num_experts: int  # E
    takes: Array | None = None  # [I', P, K] how much the patch takes from each; 1 if None


# ---- what is read off it

Choices = Literal["first", "all"]

_CONTROL_PERMUTATIONS = 50  # a control's null is only subtracted
_PROBE_TOKENS = 6_000  # that a linear probe is fitted on
_PROBE_CLASSES = 100  # more take minutes to fit
_CLUSTER_TOKENS = 20_000  # that clusters are fitted on
_PRIOR = (
    1e-3  # of a probe's prediction: a class that it excludes costs 10 bits, not infinitely many
)


class Interval(NamedTuple):
    """A mean over images with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Reading(Numbers):
    """What experts tell, read in one way."""

    of: str  # `class` or `part`
    unit: str  # `patch`: the choice of one; `image`: the histogram of all its patches, by a probe on held-out images
    choices: Choices  # `first` or `all`
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
    gain: float | None = (
        None  # bits by which the router exceeds the best of them; None where there is none
    )
    exceeded: bool = True  # whether it exceeds each of them (interval of the difference above 0)


@dataclass(frozen=True)
class LayerReadings:
    """Everything that was read off one layer of one training."""

    layer: RecordedLayer
    load: Load  # how evenly its experts are used
    why: str | None = None  # why nothing else was read; None where it was
    readings: Sequence[Reading] = ()  # that of the answers first
    estimate: Estimate | None = None  # the bits of the first of them
    probe: Reading | None = (
        None  # the same of the linear probe's balanced groups; None without inputs
    )
    controls: Controls = Controls()  # those of the layer
    most_bits: float = (
        math.nan
    )  # what a probe tells, or without one what so many experts could tell at most


def measure_layer(
    recording: Recording, place: int, *, permutations: int, cluster_seeds: int, seed: int
) -> LayerReadings:
    """Read one layer of one training; the arguments are those of `three_questions`."""
    layer, labels = recording.layers[place], np.asarray(recording.labels)
    counts = {
        choices: counts_of(layer.choices, layer.amounts, layer.num_experts, choices)
        for choices in get_args(Choices)
    }
    load = load_of(counts["all"], labels, len(recording.class_names))
    known = labels[labels >= 0]
    if len(np.unique(known)) < 2:
        return LayerReadings(layer, load, "fewer than two classes have images")
    reader = _Reader(recording, labels, halves_by_class(labels, seed), seed)
    readings, estimate = _read(reader, layer, counts, permutations)
    probe = None
    if layer.inputs is not None and len(np.unique(labels)) <= _PROBE_CLASSES:
        target = np.broadcast_to(labels[:, None], layer.inputs.shape[:2])
        groups = probe_groups(layer.inputs, target, layer.num_experts, reader.halves, seed)
        probe, _ = reader.patch(groups, _CONTROL_PERMUTATIONS)
    controls = _compare(reader, layer, counts[_primary(layer)], permutations, cluster_seeds)
    most = probe.bits.value if probe is not None else 0.0
    if most <= 0:
        most = min(entropy_bits(np.bincount(known)), math.log2(max(2, layer.num_experts)))
    return LayerReadings(layer, load, None, readings, estimate, probe, controls, most)


def _primary(layer: RecordedLayer) -> Choices:
    """The choices that the answers are about."""
    return "first" if layer.tokens_choose else "all"


@dataclass(frozen=True)
class _Reader:
    """Reads counts of choices [I', P, E], of all images or of some."""

    recording: Recording  # with the parts
    labels: Ints  # [I]
    halves: Flags  # [I] which half an image is in
    seed: int  # of what is shuffled

    def patch(
        self,
        counts: Floats,
        permutations: int,
        *,
        of: str = "class",
        choices: Choices = "first",
        where: str = "everywhere",
        images: Ints | None = None,
    ) -> tuple[Reading, Estimate]:
        """What the choice of one patch tells."""
        rows = np.arange(len(self.labels)) if images is None else images
        if of == "part":
            target = np.asarray(self.recording.parts)[rows]
            estimate = part_information(
                counts, target, num_permutations=permutations, seed=self.seed
            )
        else:
            labels = self.labels[rows]
            target = np.broadcast_to(labels[:, None], counts.shape[:2])
            estimate = class_information(
                counts, labels, num_permutations=permutations, seed=self.seed
            )
        guess, chance = guess_from_experts(counts, target, self._halves_of(rows))
        bits = Interval(estimate.value_bits, estimate.low, estimate.high)
        return Reading(of, "patch", choices, where, guess, chance, bits, estimate.p_value), estimate

    def image(
        self,
        counts: Floats,
        *,
        choices: Choices = "first",
        where: str = "everywhere",
        images: Ints | None = None,
    ) -> Reading:
        """What a probe reads off the histogram of the image, on held-out images."""
        rows = np.arange(len(self.labels)) if images is None else images
        known = self.labels[rows] >= 0
        sums = counts[known].sum(1)
        histogram = sums / np.maximum(sums.sum(1, keepdims=True), 1e-12)
        guess, chance, bits = probe_histogram(
            histogram, self.labels[rows][known], self._halves_of(rows)[known]
        )
        return Reading("class", "image", choices, where, guess, chance, bits)

    def _halves_of(self, rows: Ints) -> Flags:
        """Halves of some images: clusters are measured on one half of all, which is divided again."""
        return (
            self.halves
            if len(rows) == len(self.labels)
            else halves_by_class(self.labels[rows], self.seed)
        )


def _read(
    reader: _Reader, layer: RecordedLayer, counts: Mapping[Choices, Floats], permutations: int
) -> tuple[list[Reading], Estimate]:
    """All readings, that of the answers first, and its bits."""
    primary, patches = _primary(layer), layer.choices.shape[1]
    order = (
        [primary]
        if counts["first"].sum() == counts["all"].sum()
        else list(dict.fromkeys((primary, "all")))
    )
    asked: list[tuple[str, Flags | None]] = [("everywhere", None)]
    objects = reader.recording.objects
    if objects is not None and patches > 1:
        asked += [("object", np.asarray(objects, bool)), ("background", ~np.asarray(objects, bool))]
    readings, estimates = [], []
    for where, mask in asked:
        for choices in order:
            own = counts[choices] if mask is None else counts[choices] * mask[..., None]
            reading, estimate = reader.patch(own, permutations, choices=choices, where=where)
            readings += [reading, reader.image(own, choices=choices, where=where)]
            estimates.append(estimate)
    parts = reader.recording.parts
    if parts is not None and patches > 1 and len(np.unique(parts[parts >= 0])) > 1:
        readings.append(reader.patch(counts[primary], permutations, of="part", choices=primary)[0])
    return readings, estimates[0]


def _compare(
    reader: _Reader, layer: RecordedLayer, counts: Floats, permutations: int, cluster_seeds: int
) -> Controls:
    """The controls, and by how much the router exceeds the best of them."""
    choices, patches = _primary(layer), counts.shape[1]
    clusters = layer.clusters
    if clusters is None:
        clusters = cluster_choices(layer, cluster_seeds, reader.seed)
    readings: dict[str, list[Reading]] = {}
    same: dict[str, tuple[Reading, Reading]] = {}
    gains, exceeded = [], True
    known: dict[bytes, tuple[Reading, Estimate, Reading]] = {}
    for name, controls in {
        "before": layer.before,
        "untrained": layer.untrained,
        "clusters": clusters,
    }.items():
        for control in controls:
            images = np.asarray(control.images)
            if (reader.labels[images] >= 0).sum() < 2:  # of the half that clusters are measured on
                continue
            some: dict[str, Any] = {"choices": choices, "images": images}
            key = images.tobytes()
            if (
                key not in known
            ):  # clusters are measured on half of the images, and so the router there
                mine = counts[images]
                known[key] = (*reader.patch(mine, permutations, **some), reader.image(mine, **some))
            own, own_estimate, own_image = known[key]
            same[name] = (own, own_image)
            index, amounts = (
                x if x is None else x[:, :patches] for x in (control.expert_index, control.takes)
            )
            theirs = counts_of(cast(Ints, index), amounts, control.num_experts, choices)
            reading, estimate = reader.patch(theirs, _CONTROL_PERMUTATIONS, **some)
            readings[name] = [*readings.get(name, []), reading, reader.image(theirs, **some)]
            exceeded &= exceeds(own_estimate, estimate)
            gains.append(own_estimate.value_bits - estimate.value_bits)
    return Controls(readings, same, min(gains) if gains else None, exceeded)


def exceeds(a: Estimate, b: Estimate) -> bool:
    """Whether the interval of a - b lies above 0: put together from both intervals as if a and b were independent.

    They rest on the same images, which makes this a little strict (MOVER: Zou and Donner).
    """
    return a.value_bits - b.value_bits > math.hypot(a.value_bits - a.low, b.high - b.value_bits)


def counts_of(choices: Ints, amounts: Array | None, num_experts: int, which: Choices) -> Floats:
    """[I, P, E] of all choices, or of the first alone (which counts 1 where it counts at all)."""
    index = np.asarray(choices)
    amount = (
        np.ones(index.shape, np.float32) if amounts is None else np.asarray(amounts, np.float32)
    )
    amount = np.where(index >= 0, amount, 0)
    if which == "first":
        index, amount = index[..., :1], (amount[..., :1] > 0).astype(np.float32)
    return choice_counts(index, num_experts, amount)


def load_of(counts: Floats, labels: Ints, num_classes: int) -> Load:
    """The load of counts [I, P, E] on images of these classes [I]."""
    by_image = counts.sum(1, dtype=np.float64)  # [I, E]
    one_hot = labels[:, None] == np.arange(num_classes)
    table = one_hot.T.astype(np.float64) @ by_image
    with np.errstate(invalid="ignore"):
        return Load(
            by_image.sum(0) / max(by_image.sum(), 1e-12), table / table.sum(1, keepdims=True)
        )


def guess_from_experts(counts: Floats, target: Ints, halves: Flags) -> tuple[Interval, float]:
    """How often the class (part) is right that an expert's choices mostly are of, in the other half of the images.

    From counts [I, P, E], the class or part of each patch [I, P] (negative: left out) and which half an image is in.
    Beside the share guessed right, with an interval over images, is that of always guessing the most frequent value.
    """
    image, patch = (target >= 0).nonzero()  # [N]
    values, ranks = np.unique(target[image, patch], return_inverse=True)
    own = counts[image, patch].astype(np.float64)  # [N, E]
    hits = np.zeros(len(own))
    for half in (True, False):
        fit = halves[image] != half
        known = np.zeros((len(values), own.shape[1]))  # [V, E]
        np.add.at(known, ranks[fit], own[fit])
        best = np.where(known.sum(0) > 0, known.argmax(0), known.sum(1).argmax())  # [E]
        hits[~fit] = (own[~fit] * (ranks[~fit, None] == best)).sum(1)
    right, total = (
        np.bincount(image, each, len(counts)).astype(np.float64) for each in (hits, own.sum(1))
    )  # [I]
    frequency = np.bincount(ranks, own.sum(1))
    return ratio_interval(right, total), float(frequency.max() / max(frequency.sum(), 1e-12))


def ratio_interval(part: Floats, whole: Floats) -> Interval:
    """Sum of part [I] over sum of whole [I], with its interval over images (linearised, Student's quantile)."""
    n, total = len(part), max(float(whole.sum()), 1e-12)
    ratio = float(part.sum()) / total
    deviation = part - ratio * whole
    half = (
        students_quantile(n - 1)
        * math.sqrt(n / max(1, n - 1) * float(np.square(deviation).sum()))
        / total
    )
    return Interval(ratio, ratio - half, ratio + half)


def paired_interval(loss: Floats) -> Interval:
    """Mean of losses [I] between -1 and 1 (Agresti and Min's interval): no image that changes is no proof of none."""
    n, total = len(loss), float(loss.sum())
    centre = total / (n + 2)
    half = (
        NormalDist().inv_cdf((1 + LEVEL) / 2)
        * math.sqrt(max(0.0, float(np.square(loss).sum()) + 1 - total * total / (n + 2)))
        / (n + 2)
    )
    return Interval(total / n, max(-1.0, centre - half), min(1.0, centre + half))


def probe_histogram(
    histogram: Floats, labels: Ints, halves: Flags
) -> tuple[Interval, float, Interval]:
    """What logistic regression tells from the histograms [I, E] of held-out images.

    It is the share guessed right, that of the most frequent class, and the bits about the class: the mean of log2 of
    the predicted over the prior probability of the true class.
    """
    values, ranks = np.unique(labels, return_inverse=True)
    right, bits = np.zeros(len(labels)), np.zeros(len(labels))
    for half in (True, False):
        fit, test = halves != half, halves == half
        if not (fit.any() and test.any()):
            continue
        prior = (np.bincount(ranks[fit], minlength=len(values)) + 1) / (fit.sum() + len(values))
        predicted = (1 - _PRIOR) * _predict(
            histogram[fit], ranks[fit], histogram[test], len(values)
        ) + _PRIOR * prior
        right[test] = predicted.argmax(1) == ranks[test]
        bits[test] = np.log2(predicted / prior)[np.arange(test.sum()), ranks[test]]
    ones = np.ones(len(labels))
    return (
        ratio_interval(right, ones),
        float(np.bincount(ranks).max() / len(ranks)),
        ratio_interval(bits, ones),
    )


def probe_groups(inputs: Floats, target: Ints, num_groups: int, halves: Flags, seed: int) -> Floats:
    """[I, p, E] one-hot: patches dealt to as many balanced groups as experts, by a linear probe of their input.

    The probe is fitted to the target [I, p] (negative: not fitted) on one half of the images and applied to the other.
    Its patches are put in the order of the class that it predicts (and of its certainty in each) and cut into groups of
    equal size.
    """
    images, patches, width = inputs.shape
    groups = np.zeros((images, patches), np.int64)
    values, rng = np.unique(target[target >= 0]), np.random.default_rng(seed)
    for half in (True, False):
        fit, test = halves != half, halves == half
        tokens, wanted = inputs[fit].reshape(-1, width), target[fit].ravel()
        chosen = rng.permutation(np.flatnonzero(wanted >= 0))[:_PROBE_TOKENS]
        ranks = np.searchsorted(values, wanted[chosen])
        predicted = _predict(tokens[chosen], ranks, inputs[test].reshape(-1, width), len(values))
        order = np.lexsort((predicted.max(1), predicted.argmax(1)))
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order)) * num_groups // max(1, len(order))
        groups[test] = place.reshape(-1, patches)
    dealt: Floats = (groups[..., None] == np.arange(num_groups)).astype(np.float32)
    return dealt


def _predict(known: Floats, ranks: Ints, asked: Floats, num_values: int) -> Floats:
    """[N, V] probabilities by logistic regression on standardised features."""
    from sklearn.linear_model import (
        LogisticRegression,
    )  # slow to import, and not needed for anything else here

    found = np.zeros((len(asked), num_values))
    present = np.unique(ranks)
    if len(present) < 2:
        found[:, present] = 1
        return found
    mean, spread = known.mean(0), known.std(0) + 1e-6
    probe = LogisticRegression(max_iter=200, tol=1e-3).fit((known - mean) / spread, ranks)
    found[:, probe.classes_] = probe.predict_proba((asked - mean) / spread)
    return found


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
    rule, images = (
        Rule("token_choice", layer.num_experts, layer.choices.shape[2]),
        np.arange(len(inputs)),
    )
    found = []
    for number in range(seeds):
        means = fit_clusters(tokens[sample], layer.num_experts, seed + number)
        chosen = rule.apply(nearness(means, inputs), 1.0).expert_index
        found.append(Assignments(None, number, chosen, images, layer.num_experts))
    return found


def range_words(values: Sequence[float], form: Callable[[float], str] = signed) -> str:
    """`0.123 to 0.456`; one number where both are the same."""
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"


def join_words(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
