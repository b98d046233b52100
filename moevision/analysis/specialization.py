"""What experts tell about class, position and part, in bits beside everything that tells as much without learning.

"Above chance" is a low bar: a router that was never trained sorts patches by colour, and colour differs between
classes. So each number stands beside

- the null of `information.py`, permuted over images;
- the baselines (`measure_baselines`), in which no router has learned anything, on held-out images;
- other trainings of the same recipe, whose experts are matched before their choices are compared.

What follows from that is said in `questions.py`, where every training stands against its own controls. "Above a
baseline" means that the interval of the difference of the two estimates lies above 0; it is put together from their own
intervals (Zou and Donner, Statistics in Medicine 27, 2008, 1693-1702, "MOVER"), as if they were independent. They rest
on the same images, which makes this a little strict.

The baselines:

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

Where tokens don't choose (expert choice, Soft MoE) every expert reads equally much of every image, which says nothing
about the class: there the class is asked of how much the patches take from each expert, and place and part of what the
experts read (`LayerTrace`). The estimators need no whole numbers, only whole images.

Axes: B images of a batch, I images, P patches, K choices, E experts, D width.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import entr, log_softmax, softmax
from torch import nn

from moevision.analysis.collect import collect_routing, layer_inputs, network_input
from moevision.analysis.images import PictureSet, Remembered, aligned_pictures, image_patches, read_images
from moevision.analysis.information import (
    Estimate,
    choice_counts,
    class_information,
    halves_by_class,
    part_information,
    position_information,
)
from moevision.analysis.trace import LayerTrace, RoutingTrace
from moevision.errors import UserError
from moevision.layers import moe_layers
from moevision.layers.routing import Kind as RoutingKind
from moevision.layers.routing import RouteBy
from moevision.models.io import SavedModel

if TYPE_CHECKING:
    from sklearn.cluster import KMeans

About = Literal["class", "class_given_position", "position", "part"]
ABOUTS: tuple[About, ...] = get_args(About)
_OF_IMAGES: tuple[About, ...] = ("class", "class_given_position")
_BASELINE_PERMUTATIONS = 100  # a baseline's null is only subtracted; its tail isn't needed

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]
Json = dict[str, Any]

ABOUT_WORDS = {
    "class": "the class",
    "class_given_position": "the class, position held fixed",
    "position": "the position",
    "part": "the part, beyond what position tells",
}
BASELINE_WORDS = {
    "untrained": "the same model untrained",
    "hash": "a hash of the patch's pixels",
    "hash_position": "a hash of the patch's position",
    "kmeans_colour": "clusters of the patch's mean colour",
    "kmeans_input": "clusters of the layer's input (learned, but by no router)",
}
_SPECIALIZATION = {
    "class": "class specialization",
    "class_given_position": "class specialization at fixed positions",
    "position": "position specialization",
    "part": "part specialization beyond position",
}


@dataclass(frozen=True)
class LayerSpecialization:
    """What the choice of expert in one layer tells about one thing, beside its comparisons.

    Attributes:
        layer: block index.
        about: what the experts are asked about.
        estimate: excess information with its interval.
        baselines: name -> excess in bits of each seed.
        seeds: excess in bits of each other training.
        above_null: the estimate's interval lies above 0 and its p-value is at most 0.05.
        above_baselines: it exceeds every baseline; None if there is none.
        sentence: the result in words.
    """

    layer: int
    about: About
    estimate: Estimate
    baselines: Mapping[str, tuple[float, ...]]
    seeds: tuple[float, ...]
    above_null: bool
    above_baselines: bool | None
    sentence: str

    @property
    def name(self) -> str:
        """The layer as it is shown, such as "L4"."""
        return f"L{self.layer}"

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON primitives, the estimate's fields beside the others."""
        return {
            "layer": self.layer,
            "name": self.name,
            "about": self.about,
            **self.estimate.to_json(),
            "baselines": {name: list(values) for name, values in self.baselines.items()},
            "seeds": list(self.seeds),
            "above": {"null": self.above_null, "baselines": self.above_baselines},
            "sentence": self.sentence,
        }


def specialization(
    trace: RoutingTrace,
    *,
    baselines: Mapping[str, Sequence[Assignments]] | None = None,
    seeds: Sequence[RoutingTrace] = (),
    parts: Ints | None = None,
    about: Sequence[About] = ABOUTS,
    num_permutations: int = 200,
    seed: int = 0,
) -> list[LayerSpecialization]:
    """Ask every layer about class, position, class given position, and part.

    Args:
        trace: routing of held-out images. Without two labelled classes nothing is asked about classes.
        baselines: from `measure_baselines` on the same trace.
        seeds: routing of other trainings on the same images.
        parts: [I, P] the part that each patch shows (`describe.majority_part`); negative: unknown. None: not asked.
        about: what to ask.
        num_permutations: of the nulls.
        seed: of everything drawn.

    Returns:
        One result per layer and question, in that order.

    Raises:
        UserError: another training was traced on other images or has other layers.
    """
    for other in seeds:
        if other.picture_names != trace.picture_names or len(other.layers) != len(trace.layers):
            raise UserError(
                "Other trainings must be of the same recipe and traced on the same images, in the same order: "
                "collect their traces with the same data and limit."
            )
    asked = [what for what in about if _can_ask(what, trace, parts)]
    ask = _Asker(trace, parts, num_permutations, seed)
    results = []
    for place, layer in enumerate(trace.layers):
        others = [other.layers[place] for other in seeds]
        for what in asked:
            own = ask.layer(what, layer)
            basis = {name: tuple(ask.baseline(what, layer.layer, each)) for name, each in (baselines or {}).items()}
            again = tuple(ask.layer(what, other) for other in others)
            results.append(_result(layer, what, own, basis, again))
    return results


def exceeds(a: Estimate, b: Estimate) -> bool:
    """Whether the interval of a - b lies above 0 (MOVER, from the two intervals)."""
    return a.value_bits - b.value_bits > math.hypot(a.value_bits - a.low, b.high - b.value_bits)


class _Asker:
    """Estimates, each computed once: most baselines are the same for every layer."""

    def __init__(self, trace: RoutingTrace, parts: Ints | None, num_permutations: int, seed: int) -> None:
        self.labels, self.grid, self.parts = np.asarray(trace.labels), trace.grid, parts
        self.num_permutations, self.seed = num_permutations, seed
        self.known: dict[tuple[About, int], Estimate] = {}

    def layer(self, about: About, layer: LayerTrace) -> Estimate:
        """Of a router."""
        amount = layer.takes if about in _OF_IMAGES else layer.reads
        counts = choice_counts(np.asarray(layer.expert_index), layer.num_experts, np.asarray(amount))
        return self._estimate(about, counts, np.arange(len(counts)), self.num_permutations)

    def baseline(self, about: About, layer: int, baselines: Sequence[Assignments]) -> Iterator[Estimate]:
        """Of the baselines that a layer is compared with, without those whose images can't answer."""
        for each in baselines:
            if each.layer in (None, layer) and self._can_answer(about, each.images):
                key = (about, id(each))
                if key not in self.known:
                    counts = each.patch_takes() if about in _OF_IMAGES else each.counts()
                    self.known[key] = self._estimate(about, counts, each.images, _BASELINE_PERMUTATIONS)
                yield self.known[key]

    def _can_answer(self, about: About, images: Ints) -> bool:
        """Whether so few images are enough: clusters are measured on one half of them."""
        if about == "part" and self.parts is not None and not (self.parts[images] >= 0).any():
            return False
        return int((self.labels[images] >= 0).sum() if about in _OF_IMAGES else len(images)) >= 2

    def _estimate(self, about: About, counts: Floats, images: Ints, num_permutations: int) -> Estimate:
        if about == "position":
            return position_information(counts, self.grid, num_permutations=num_permutations, seed=self.seed)
        if about == "part" and self.parts is not None:
            return part_information(counts, self.parts[images], num_permutations=num_permutations, seed=self.seed)
        given = about == "class_given_position"
        labels = self.labels[images]
        return class_information(
            counts, labels, given_position=given, num_permutations=num_permutations, seed=self.seed
        )


def _can_ask(about: About, trace: RoutingTrace, parts: Ints | None) -> bool:
    if about == "part":
        return parts is not None
    labels = np.asarray(trace.labels)
    return about == "position" or len(np.unique(labels[labels >= 0])) > 1


def _result(
    layer: LayerTrace,
    about: About,
    own: Estimate,
    baselines: Mapping[str, tuple[Estimate, ...]],
    seeds: tuple[Estimate, ...],
) -> LayerSpecialization:
    every = [each for estimates in baselines.values() for each in estimates]
    above_null = _above_null(own)
    above_baselines = all(exceeds(own, each) for each in every) if every else None
    bits = {name: tuple(each.value_bits for each in estimates) for name, estimates in baselines.items() if estimates}
    seed_bits = tuple(each.value_bits for each in seeds)
    sentence = sentence_of(layer.name, about, own, bits, seed_bits, above_null, above_baselines, layer.kind)
    if layer.route_by == "image":
        sentence = sentence.replace("the patch's", "the image's")  # in the words of a baseline
    return LayerSpecialization(layer.layer, about, own, bits, seed_bits, above_null, above_baselines, sentence)


def _above_null(estimate: Estimate) -> bool:
    return estimate.low > 0 and estimate.p_value <= 0.05


def teller(about: str, kind: RoutingKind) -> str:
    """What tells something about the class, the position or the part, as the subject of a sentence."""
    if kind == "token_choice":
        return "the choice of expert"
    if about in _OF_IMAGES:
        return "how much patches take from each expert"
    return "which expert takes a patch" if kind == "expert_choice" else "how much each expert reads"


def sentence_of(
    layer: str,
    about: str,
    estimate: Estimate,
    baselines: Mapping[str, Sequence[float]],
    seeds: Sequence[float],
    above_null: bool,
    above_baselines: bool | None,
    kind: RoutingKind = "token_choice",
) -> str:
    """The result in words: bits above chance first, then the baseline that comes closest, then other trainings.

    Args:
        layer: as it is shown, such as "L4".
        about: a key of `ABOUT_WORDS`.
        estimate: of the layer.
        baselines: name -> excess in bits of each seed.
        seeds: excess in bits of other trainings.
        above_null: whether it exceeds shuffled images.
        above_baselines: whether it exceeds every baseline; None: not compared.
        kind: who chooses in the layer.
    """
    value, interval = signed(estimate.value_bits), f"95 % CI {signed(estimate.low)} to {signed(estimate.high)}"
    if not above_null:
        where = "" if kind == "token_choice" else f" in {teller(about, kind)}"
        return (
            f"{layer}: no {_SPECIALIZATION[about]}{where} ({value} bits above chance, {interval}, "
            f"n = {estimate.n_images:,})."
        )
    told = (
        f"{layer}: {teller(about, kind)} tells {value} bits about {ABOUT_WORDS[about]} ({interval}, "
        f"{percent(estimate.share_of_entropy)} of the maximum, n = {estimate.n_images:,}), more than shuffled images "
        f"(p = {estimate.p_value:.2g})."
    )
    others = f" Other trainings: {span(seeds)} bits." if seeds else ""
    if above_baselines is None:
        return f"{told} It was not compared with routing without learning.{others}"
    name, bits = max(((name, max(values)) for name, values in baselines.items()), key=lambda pair: pair[1])
    give, words = "give" if name.startswith("kmeans") else "gives", BASELINE_WORDS.get(name, name)
    how = "less" if above_baselines else "as much or more" if bits >= estimate.value_bits else "too close to tell apart"
    return f"{told} {words[0].upper()}{words[1:]} {give} {signed(bits)} bits, {how}.{others}"


def signed(value: float, digits: int = 3) -> str:
    """With a true minus sign, and none in front of 0."""
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"


def percent(share: float) -> str:
    """0.1234 -> `12.3 %`."""
    return f"{100 * share:.1f} %".replace("-", "−") if round(100 * share, 1) else "0.0 %"


def span(values: Sequence[float], form: Callable[[float], str] = signed) -> str:
    """`0.123 to 0.456`; one number where both are the same."""
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


BASELINES = tuple(BASELINE_WORDS)
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
    """All baselines of a model on the images of a trace.

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
    if "hash" in names or "hash_position" in names:
        found |= {name: hashes for name, hashes in _hashes(pictures, trace, seeds).items() if name in names}
    if "kmeans_colour" in names or "kmeans_input" in names:
        clusters = _clusters(model, pictures, trace, seeds, seed, with_input="kmeans_input" in names)
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
    rules = rules_of(trace)
    keys: dict[RouteBy, npt.NDArray[np.uint64]] = {}  # [I, P]
    for unit in dict.fromkeys(rule.route_by for rule in rules):
        grid = trace.grid if unit == "token" else (1, 1)
        hashes = np.stack([_patch_hashes(pictures.image(int(image)), grid) for image in images])
        keys[unit] = np.broadcast_to(hashes, (len(images), patches))
    place = np.arange(patches, dtype=np.uint64)[None]  # of every image

    def draw(rule: Rule, layers: Sequence[int | None], keys: npt.NDArray[np.uint64]) -> Iterator[Assignments]:
        for seed in range(seeds):
            scores: npt.NDArray[Any] = hash_scores(keys, rule.num_experts, seed)
            if rule.kind != "token_choice":
                scores = scores / 2.0**64
            index, *amounts = (
                each if each is None else np.broadcast_to(each, (len(images), *each.shape[1:]))
                for each in rule.apply(scores, rule.scale(scores))
            )
            assert index is not None
            for layer in layers:
                yield Assignments(layer, seed, index, images, rule.num_experts, *amounts)

    return {
        "hash": [each for rule, layers in rules.items() for each in draw(rule, layers, keys[rule.route_by])],
        "hash_position": [
            each for rule, layers in rules.items() if rule.route_by == "token" for each in draw(rule, layers, place)
        ],
    }


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
    model: SavedModel, pictures: PictureSet, trace: RoutingTrace, seeds: int, seed: int, with_input: bool
) -> dict[str, list[Assignments]]:
    """K-means of colours and of each layer's input, fitted on half of the images, applied to the others."""
    half, rng = halves_by_class(np.asarray(trace.labels), seed), np.random.default_rng(seed)
    fitted, measured = np.flatnonzero(~half), np.flatnonzero(half)
    per_image = max(1, _FIT_TOKENS // max(1, len(fitted)))
    sample: dict[int | RouteBy, list[Floats]] = {}
    for features in _features(model, pictures, trace, fitted, with_input):
        for source, tokens in features.items():
            taken = rng.permuted(np.tile(np.arange(tokens.shape[1]), (len(tokens), 1)), axis=1)[:, :per_image]  # [B, p]
            sample.setdefault(source, []).append(np.take_along_axis(tokens, taken[..., None], 1))  # [B, p, D]
    found: dict[str, list[Assignments]] = {"kmeans_colour": [], "kmeans_input": []}
    asked: list[tuple[str, int | RouteBy, Rule, list[int | None]]] = [
        ("kmeans_colour", rule.route_by, rule, layers) for rule, layers in rules_of(trace).items()
    ]
    asked += [
        ("kmeans_input", layer.layer, Rule.of(layer), [layer.layer]) for layer in trace.layers if layer.layer in sample
    ]
    clusterings = [
        _Clustering(name, source, rule, layers, s, np.concatenate(sample[source]))
        for name, source, rule, layers in asked
        for s in range(seeds)
    ]
    for features in _features(model, pictures, trace, measured, with_input):
        for clustering in clusterings:
            clustering.look(features[clustering.source])
    for clustering in clusterings:
        found[clustering.name] += clustering.assignments(measured)
    return found


class _Clustering:
    """E clusters of what patches look like, as experts of some layers."""

    def __init__(
        self,
        name: str,
        source: int | RouteBy,
        rule: Rule,
        layers: Sequence[int | None],
        seed: int,
        tokens: Floats,
    ) -> None:
        self.name, self.source, self.rule, self.layers, self.seed = name, source, rule, layers, seed
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
