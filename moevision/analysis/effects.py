"""What an intervention on the routing does to a prediction, compared with a random change of the same size.

`effect` measures one image, `class_effect` the images of a class. Both also measure a control: the intervention takes a
number of assignments (token to expert) from their experts, and the control takes away equally many, drawn at random
from all experts of the same layers, with the same fill: what takes the place of a removed expert, the token's next best
one or zero. Assignments of patches and of prefix tokens are matched separately. Where an image is routed as a whole,
the control removes whole experts of that image; if such an image has only one expert (K = 1), a random ablation is the
ablation itself, so an ablation has no control.

Interventions that are already active, such as another k, stay active in the forward passes before and after.
Every JSON object and sentence names the kind of intervention and, for an ablation, its fill.

`answers_without` takes away each small set of experts, to find the smallest that changes an answer.
`patch_contributions` says what the answer rests on, without changing anything.

Axes: B images of a batch, R rows of a batch of controls, I images of a class, N tokens (prefix tokens first), P
patches, K choices, E experts, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from statistics import fmean, stdev
from typing import Any, cast

import numpy as np
import torch
from scipy.special import expit, softmax
from torch import Tensor, nn

from moevision.analysis.collect import network_input
from moevision.analysis.images import PictureSet
from moevision.analysis.intervention import (
    Decision,
    Edit,
    Fill,
    Intervention,
    apply_edits,
    computed_pairs,
    numbered_layers,
    per_image_capacity,
    run_repeated,
)
from moevision.data.images import BadImageError
from moevision.errors import UserError
from moevision.layers import MoEMlp, routing_lock
from moevision.layers.routing import Kind as RoutingKind
from moevision.models.io import SavedModel
from moevision.models.shares import PatchShares, patch_shares
from moevision.types import Floats, Json, Pixels

_SETS_AT_ONCE = 64  # in one forward pass

MovedCounts = dict[MoEMlp, Tensor]
"""Layer, in order of depth -> [B, 2] int64: how many assignments of prefix tokens, and of patches, are taken away."""


@torch.inference_mode()
def effect(
    model: SavedModel,
    image: Pixels,
    intervention: Intervention,
    *,
    also: Sequence[Intervention] = (),
    target: int | str | None = None,
    num_controls: int = 20,
    seed: int = 0,
) -> Effect:
    """Measure what an intervention changes for one image, uint8 [S, S, 3] as the model, in eval mode, sees it.

    `also` are further ablations of the same fill, applied together with an ablation.

    `target` is the class, as index or name, whose logit is measured; if None, the class that the model predicts without
    the intervention. The control is drawn `num_controls` times, at least 2, from `seed`. A UserError for a layer, an
    expert or a class that the model doesn't have.
    """
    net = model.net
    x = network_input(model, np.stack([image]))  # [1, 3, S, S]
    with routing_lock(net):
        before = net(x)[0].double()  # [C]
        after, moved, has_control = run_under(net, x, intervention, also)
        kinds: set[RoutingKind] = {layer.router.kind for layer in moved}
        index = int(before.argmax()) if target is None else class_index(model.class_names, target)
        moved_prefix, moved_patches = _sum_over_layers(moved)[0].tolist()  # [2]
        # Layers of several kinds are worded as token choice.
        routing = kinds.pop() if len(kinds) == 1 else "token_choice"

        control = None
        if has_control:
            keys = [(seed, draw) for draw in range(num_controls)]
            control_logits = run_compared(net, x, intervention, moved, keys)  # [draws, C]
            delta_ps = model.probabilities(control_logits) - model.probabilities(
                before
            )  # [draws, C]
            control = Control(
                what=control_in_words(intervention, moved_patches, routing),
                delta_logits=tuple((control_logits - before)[:, index].tolist()),
                delta_ps=tuple(delta_ps[:, index].tolist()),
            )
    return Effect(
        intervention=intervention,
        class_names=tuple(model.class_names),
        target=index,
        before_logits=tuple(before.tolist()),
        after_logits=tuple(after[0].tolist()),
        moved=moved_patches,
        moved_prefix=moved_prefix,
        control=control,
        routing=routing,
        also=tuple(also),
        multilabel=bool(model.thresholds),
    )


@torch.inference_mode()
def patch_contributions(
    model: SavedModel, images: Sequence[Pixels], classes: Sequence[int | str] | None = None
) -> PatchShares:
    """The exact share of each patch in the logits of images, uint8 [S, S, 3] as the model sees them.

    `patches.sum(1) + prefix + bias` are the logits [B, C]; `margins()` are the shares [B, P] in the likeliest class's
    logit minus the second's. They are shares of the last tokens, in which attention has mixed the patches.

    Args:
        model: one whose classifier is linear in the mean of the patches; a LayerNorm may be before or behind the mean.
        images: all in one batch.
        classes: those to report, as indices or names; all if None.

    Raises:
        UserError: for another classifier, or a class that the model doesn't have.

    Examples:
        >>> from moevision.demo import bundled_model
        >>> model = bundled_model("pets")
        >>> shares = patch_contributions(model, [np.zeros((64, 64, 3), np.uint8)], ["cat"])
        >>> shares.patches.shape
        torch.Size([1, 64, 1])
    """
    tokens = cast(Any, model.net).forward_features(network_input(model, np.stack(images)))
    shares = patch_shares(model.net, tokens)
    if classes is None:
        return shares
    indices = [class_index(model.class_names, name) for name in classes]
    return PatchShares(*(part[..., indices] for part in shares))  # classes are the last axis of all


@torch.inference_mode()
def class_effect(
    model: SavedModel,
    pictures: PictureSet,
    target: int | str,
    intervention: Intervention,
    *,
    limit: int | None = 100,
    seed: int = 0,
    batch_size: int = 32,
) -> ClassEffect:
    """Measure what an intervention changes on average over images of one class, for a model in eval mode.

    `target` is an index or name of the model's classes. At most `limit` of its `pictures` are drawn at random (None:
    all), and `batch_size` go through the model at once; `seed` seeds that draw and the control. A UserError for a
    layer, an expert or a class that the model doesn't have, and if no image of the class can be read.
    """
    net = model.net
    index = class_index(model.class_names, target)
    name = model.class_names[index]
    images = _images_of_class(pictures, name, limit, seed)

    delta_logits: list[float] = []
    delta_ps: list[float] = []
    control_delta_logits: list[float] = []
    moved_patches: list[int] = []
    for start in range(0, len(images), batch_size):
        pixels = _read_images(pictures, images[start : start + batch_size])
        if not pixels:
            continue
        x = network_input(model, np.stack(list(pixels.values())))  # [B, 3, S, S]

        with routing_lock(net):
            before = net(x).double()  # [B, C]
            after, moved, has_control = run_under(net, x, intervention)
            if has_control:
                keys = [(seed, image) for image in pixels]
                control_logits = run_compared(net, x, intervention, moved, keys)  # [B, C]
                control_delta_logits += (control_logits - before)[:, index].tolist()

        delta_p = model.probabilities(after) - model.probabilities(before)
        delta_logits += (after - before)[:, index].tolist()
        delta_ps += delta_p[:, index].tolist()
        moved_patches += _sum_over_layers(moved)[:, 1].tolist()

    if not delta_logits:
        raise UserError(
            f"There is no readable image of {name!r}: take another class or other images."
        )
    return ClassEffect(
        class_name=name,
        intervention=intervention,
        delta_logits=tuple(delta_logits),
        delta_ps=tuple(delta_ps),
        control_delta_logits=tuple(control_delta_logits) or None,
        moved=fmean(moved_patches),
        unreadable=len(images) - len(delta_logits),
    )


ExpertSet = tuple[int, tuple[int, ...]]
"""A layer, by block number, and some of its experts."""


def expert_sets(layers: Mapping[int, MoEMlp], largest: int) -> list[ExpertSet]:
    """All sets of 1 to `largest` experts of one layer, layer after layer, the smaller ones first."""
    return [
        (layer, chosen)
        for layer, moe in layers.items()
        for size in range(1, min(largest, moe.router.num_experts) + 1)
        for chosen in combinations(range(moe.router.num_experts), size)
    ]


@torch.inference_mode()
def answers_without(model: SavedModel, image: Pixels, largest: int) -> tuple[Tensor, Tensor]:
    """Probabilities [C] of an image, uint8 [S, S, 3], and [sets, C] without each of `expert_sets`, in their order."""
    net = model.net
    x = network_input(model, image[None])  # [1, 3, S, S]
    layers = numbered_layers(net)
    rows = []
    with routing_lock(net):
        before = model.probabilities(net(x)[0])
        for layer, moe in layers.items():
            sets = expert_sets({layer: moe}, largest)
            is_away = torch.zeros(len(sets), moe.router.num_experts, dtype=torch.bool)  # [sets, E]
            for row, (_, chosen) in enumerate(sets):
                is_away[row, list(chosen)] = True
            for batch in is_away.split(_SETS_AT_ONCE):
                same_image = torch.zeros(len(batch), dtype=torch.int64)
                with per_image_capacity(net), apply_edits(net, {moe: remove_by_row(batch)}):
                    logits = run_repeated(net, x, same_image, moe)
                    rows.append(model.probabilities(logits))
    return before, torch.cat(rows)


def remove_by_row(is_away: Tensor) -> Edit:
    """An edit that takes other experts, `is_away` [B, E], away from each image of a batch."""

    def edit(decision: Decision) -> Decision:
        return decision.take_away(is_away[:, None, :].to(decision.removed.device), "next_best")

    return edit


def fewest_experts(before: Tensor, sets: Sequence[ExpertSet], without: Tensor) -> ExpertSet | None:
    """The smallest set without which the class is another one; of equal sizes the one that costs the class most.

    `before` [C] and `without` [sets, C] are probabilities of one image.
    """
    own = int(before.argmax())
    changing = [
        (len(chosen), float(row[own]), layer, chosen)
        for (layer, chosen), row in zip(sets, without, strict=True)
        if int(row.argmax()) != own
    ]
    if not changing:
        return None
    _, _, layer, chosen = min(changing)
    return layer, chosen


def _images_of_class(pictures: PictureSet, name: str, limit: int | None, seed: int) -> list[int]:
    """Indices of the images of a class, at most `limit` of them drawn at random."""
    if name not in pictures.class_names:
        raise UserError(
            f"{pictures.name} has no class {name!r}: its classes are {', '.join(pictures.class_names)}."
        )
    label = pictures.class_names.index(name)
    images = [index for index in range(len(pictures)) if pictures.label(index) == label]
    if limit is None or len(images) <= limit:
        return images
    drawn: list[int] = np.random.default_rng(seed).choice(images, limit, replace=False).tolist()
    return sorted(drawn)


def _read_images(pictures: PictureSet, indices: Sequence[int]) -> dict[int, Pixels]:
    """Index -> pixels of the images at these indices that can be read."""
    pixels = {}
    for index in indices:
        with suppress(BadImageError):  # counted in `ClassEffect.unreadable`
            pixels[index] = pictures.image(index)
    return pixels


def _sum_over_layers(moved: MovedCounts) -> Tensor:
    """[B, 2] counts of prefix tokens and of patches, summed over the layers."""
    return torch.stack(list(moved.values())).sum(0)


def class_index(class_names: Sequence[str], target: int | str) -> int:
    """The index of a class, given as index or name; a UserError if the model has no such class."""
    if isinstance(target, str) and target in class_names:
        return list(class_names).index(target)
    if isinstance(target, int) and 0 <= target < len(class_names):
        return target
    raise UserError(
        f"The model has no class {target!r}: choose one of {', '.join(class_names[:20])}."
    )


def remove_random_experts(
    decision: Decision,
    numbers: Sequence[Sequence[int]],
    keys: Sequence[Sequence[int]],
    num_prefix_tokens: int,
    fill: Fill,
) -> Decision:
    """Take assignments away at random, from any expert; each image of the batch has its own draw.

    `numbers` [B][2] are how many assignments of prefix tokens, and of patches, an image loses; `keys` [B] seed the
    draws. Where an image is routed as a whole, whole experts are removed for all of its tokens, so many that about the
    same number of assignments goes.
    """
    routing = decision.to_routing()
    is_kept = routing.kept.cpu().numpy()  # [B, N, K]
    expert_index = routing.expert_index.cpu().numpy()  # [B, N, K]
    removed = np.zeros(decision.removed.shape, dtype=bool)  # [B, N, E]

    for image, (counts, key) in enumerate(zip(numbers, keys, strict=True)):
        rng = np.random.default_rng(tuple(key))
        if routing.route_by == "image":
            # The image's experts, [K or fewer]: every token has the same.
            experts = expert_index[image, 0][is_kept[image, 0]]
            num_tokens = removed.shape[1]
            count = min(round(sum(counts) / num_tokens), len(experts))  # of experts to remove
            removed[image][:, rng.choice(experts, count, replace=False)] = True
            continue

        # Every kept assignment of the image: its token and its expert, [assignments] each.
        tokens, choices = is_kept[image].nonzero()
        experts = expert_index[image, tokens, choices]
        is_prefix = tokens < num_prefix_tokens
        for count, is_candidate in zip(counts, (is_prefix, ~is_prefix), strict=True):
            candidates = np.flatnonzero(is_candidate)
            drawn = rng.choice(candidates, min(count, len(candidates)), replace=False)
            removed[image, tokens[drawn], experts[drawn]] = True

    return decision.take_away(torch.from_numpy(removed).to(decision.removed.device), fill)


def run_under(
    net: nn.Module, x: Tensor, intervention: Intervention, also: Sequence[Intervention] = ()
) -> tuple[Tensor, MovedCounts, bool]:
    """Logits [B, C] under the interventions, how many assignments they move, whether there is a control.

    An ablation has no control where a layer gives each image a single expert, because a random draw from it would be
    the ablation itself. For an ablation only the assignments to the expert itself are counted. Others that are dropped
    as a consequence, by a capacity of the model, aren't: the control has such consequences too.
    """
    num_prefix_tokens = int(getattr(net, "num_prefix_tokens", 0))
    ablates = intervention.kind == "ablate"
    edits_of_layer: dict[MoEMlp, list[Edit]] = {
        layer: [] for layer in numbered_layers(net).values()
    }
    for one in (intervention, *also):
        for layer, edit in one.edits(net).items():
            edits_of_layer[layer].append(edit)
    edits = {
        layer: _CountedEdit(layer_edits, ablates, num_prefix_tokens)
        for layer, layer_edits in edits_of_layer.items()
        if layer_edits
    }
    with apply_edits(net, edits):
        logits = net(x).double()

    # The forward pass has filled these in.
    moved = {layer: edit.moved for layer, edit in edits.items()}
    one_expert = any(edit.one_expert for edit in edits.values())
    return logits, moved, not (ablates and one_expert)


@dataclass
class _CountedEdit:
    """Edits of a layer, in turn, and how many assignments they take from their experts."""

    edits: list[Edit]
    ablates: bool
    num_prefix_tokens: int
    moved: Tensor = field(init=False)  # [B, 2] assignments of prefix tokens, and of patches
    one_expert: bool = False  # whether the layer gives an image one expert

    def __call__(self, decision: Decision) -> Decision:
        after = decision
        for edit in self.edits:
            after = edit(after)
        routing = decision.to_routing()
        # [B, N, E]: of an ablation what it takes away itself, of others all that isn't computed any more
        is_gone = (
            after.removed | after.silenced if self.ablates else ~computed_pairs(after.to_routing())
        )
        moved_by_token = (computed_pairs(routing) & is_gone).sum(-1)  # [B, N]
        prefix_and_patches = moved_by_token.tensor_split([self.num_prefix_tokens], dim=1)
        self.moved = torch.stack([part.sum(1) for part in prefix_and_patches], -1)
        self.one_expert = routing.route_by == "image" and routing.expert_index.shape[-1] == 1
        return after


def run_compared(
    net: nn.Module,
    x: Tensor,
    intervention: Intervention,
    moved: MovedCounts,
    keys: Sequence[tuple[int, int]],
) -> Tensor:
    """Logits [R, C] under the control, in one batch of which every row has its own draw.

    x is [R, 3, S, S], or [1, 3, S, S] for R draws of the same image. `moved` counts the assignments that the
    intervention takes from experts for each image of x; `keys` [R] seed the draws.
    """
    edits: dict[MoEMlp, Edit] = {}
    for layer_number, (layer, counts) in enumerate(moved.items()):
        edits[layer] = partial(
            remove_random_experts,
            numbers=counts.expand(len(keys), 2).tolist(),
            keys=[(*key, layer_number) for key in keys],  # each layer draws independently
            num_prefix_tokens=int(getattr(net, "num_prefix_tokens", 0)),
            fill=control_fill(intervention),
        )

    # Every row is another image.
    if len(x) > 1:
        with apply_edits(net, edits):
            logits: Tensor = net(x).double()
        return logits

    # Draws of one image: what comes before the first changed layer is computed once, and draws share no capacity.
    image_of_row = torch.zeros(len(keys), dtype=torch.int64)  # [R], all the only image
    first_layer = next(iter(moved))
    with per_image_capacity(net), apply_edits(net, edits):
        return run_repeated(net, x, image_of_row, first_layer).double()


@dataclass(frozen=True)
class Control:
    """The effect on one image of taking the same number of assignments away at random, in several draws."""

    what: str  # the random change and its fill, in words
    delta_logits: tuple[float, ...]  # [draws] change of the target's logit
    delta_ps: tuple[float, ...]  # [draws] change of the target's probability

    @property
    def mean(self) -> float:
        """Mean change of the logit."""
        return fmean(self.delta_logits)

    @property
    def sd(self) -> float:
        """Standard deviation of the change of the logit over the draws."""
        return stdev(self.delta_logits)

    def to_json(self) -> Json:
        """Every number."""
        return {
            "what": self.what,
            "n": len(self.delta_logits),
            "deltas": list(self.delta_logits),
            "delta_ps": list(self.delta_ps),
            "mean": self.mean,
            "sd": self.sd,
        }


@dataclass(frozen=True)
class ClassEffect:
    """The effect on I images of one class, each measured on the logit of that class."""

    class_name: str
    intervention: Intervention
    delta_logits: tuple[float, ...]  # [I] change of the logit, by image
    delta_ps: tuple[float, ...]  # [I] change of the probability
    # [I] the same with the control, one draw for each image; None where there is no control
    control_delta_logits: tuple[float, ...] | None
    moved: float  # mean number of patch assignments that the intervention takes from their experts
    unreadable: int = 0  # images of the class that could not be read, not counted in I

    def to_json(self) -> Json:
        """Means over images and their standard deviations (null for one image, and without a control)."""
        controls = self.control_delta_logits or ()
        return {
            "class": self.class_name,
            "n": len(self.delta_logits),
            "intervention": self.intervention.to_json(),
            "delta_p": fmean(self.delta_ps),
            "delta_logit": fmean(self.delta_logits),
            "sd_logit": _sd(self.delta_logits),
            "control_delta_logit": fmean(controls) if controls else None,
            "control_sd_logit": _sd(controls),
            "moved": self.moved,
            "unreadable": self.unreadable,
        }


def _sd(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Effect:
    """Logits of one image before and after an intervention, and its control."""

    intervention: Intervention
    class_names: tuple[str, ...]  # [C]
    target: int  # index of the class that the changes below are about
    before_logits: tuple[float, ...]  # [C]
    after_logits: tuple[float, ...]  # [C]
    moved: int  # patch assignments that the intervention takes from their experts, in the layers that it acts on
    moved_prefix: int  # the same for the assignments of class and register tokens
    # effect of taking the same number away at random; None where that would be the intervention itself (`run_under`)
    control: Control | None
    routing: RoutingKind = "token_choice"  # how the layers that it acts on route
    also: tuple[Intervention, ...] = ()  # further ablations that belong to the change
    multilabel: bool = False  # whether each label has a probability of its own

    @property
    def before(self) -> tuple[float, ...]:
        """[C] probabilities before."""
        return tuple(self._probabilities(self.before_logits))

    @property
    def after(self) -> tuple[float, ...]:
        """[C] probabilities after."""
        return tuple(self._probabilities(self.after_logits))

    def _probabilities(self, logits: Sequence[float]) -> Sequence[float]:
        probabilities: Floats = softmax(logits)
        if self.multilabel:
            probabilities = expit(logits)
        return cast(list[float], probabilities.tolist())

    @property
    def delta_logit(self) -> float:
        """Change of the target's logit."""
        return self.after_logits[self.target] - self.before_logits[self.target]

    @property
    def delta_p(self) -> float:
        """Change of the target's probability."""
        return self.after[self.target] - self.before[self.target]

    @property
    def sentence(self) -> str:
        """The effect and its control in one sentence that names the kind of intervention."""
        before = self.before[self.target]
        after = self.after[self.target]
        outcome = f"stays at {before:.2f}"
        if f"{before:.2f}" != f"{after:.2f}":
            outcome = f"{'falls' if after < before else 'rises'} from {before:.2f} to {after:.2f}"
        change = effect_in_words(self.intervention, self.moved, self.routing)
        if self.also:
            names = [f"L{each.layer}·E{each.expert}" for each in (self.intervention, *self.also)]
            change = (
                f"without {', '.join(names)} ({quantity(self.moved, 'patch assignment')} moved)"
            )
        name = self.class_names[self.target]
        sentence = f"For this image: {change} {name} {outcome} (logit {_signed(self.delta_logit)})"

        control = self.control
        if not self.moved and not self.moved_prefix:
            return f"{sentence}."
        if control is None:
            return f"{sentence}; no control: an image has one expert, so a random one would be the same."
        spread = f"{_signed(control.mean)} ± {control.sd:.2f}"
        draws = len(control.delta_logits)
        return f"{sentence}; {control.what} changes the logit by {spread} ({draws} draws)."

    def to_json(self) -> Json:
        """Every number, with the five likeliest classes before and after."""
        return {
            "schema": "moevision.effect/1",
            "intervention": self.intervention.to_json(),
            "routing": self.routing,
            "before": self._top5(self.before),
            "after": self._top5(self.after),
            "target": self.class_names[self.target],
            "delta_p": self.delta_p,
            "delta_logit": self.delta_logit,
            "moved": self.moved,
            "moved_prefix": self.moved_prefix,
            "control": None if self.control is None else self.control.to_json(),
            "sentence": self.sentence,
        }

    def _top5(self, probabilities: Sequence[float]) -> list[Json]:
        best = sorted(range(len(probabilities)), key=lambda index: -probabilities[index])[:5]
        return [{"class": self.class_names[index], "p": probabilities[index]} for index in best]


def _signed(value: float) -> str:
    text = f"{value:+.2f}".replace("-", "−")
    return "0.00" if text in ("+0.00", "−0.00") else text


def effect_in_words(
    intervention: Intervention, moved: int, routing: RoutingKind = "token_choice"
) -> str:
    """What was changed, as the start of a sentence; `moved` patch assignments were taken from their experts."""
    layer = _layer_in_words(intervention)
    assignments = quantity(moved, "patch assignment")
    match intervention.kind:
        case "ablate":
            consequence = _ablation_in_words(intervention.fill, moved, routing)
            return f"without {layer}·E{intervention.expert} ({consequence})"
        case "force":
            return f"with every token of {layer} sent first to E{intervention.expert} ({assignments} moved)"
        case "swap":
            pair = f"E{intervention.expert} and E{intervention.other}"
            if routing == "soft":
                return f"with the slots of {pair} of {layer} swapped"
            return f"with {pair} of {layer} swapped ({assignments} moved)"
        case "random" if routing == "soft":
            return f"with the slots of {layer} dealt out to its experts at random (seed {intervention.seed})"
        case "random":
            subject = "patches for the experts of" if routing == "expert_choice" else "routing in"
            return f"with random {subject} {layer} (seed {intervention.seed}, {assignments} moved)"
        case "top_k":
            return f"with k = {intervention.top_k} in {layer} ({assignments} dropped)"
        case "capacity":
            return (
                f"with capacity factor {intervention.factor:g} in {layer} ({assignments} dropped)"
            )


def _ablation_in_words(fill: Fill, moved: int, routing: RoutingKind) -> str:
    patches = quantity(moved, "patch", "patches")
    if fill == "zero":
        return f"its output set to zero for {patches}"
    if routing == "soft":
        return f"its weight in {patches} shared out among the other experts"
    if routing == "expert_choice":
        return f"{patches} {'loses' if moved == 1 else 'lose'} it, and no expert takes its place"
    return f"{patches} {'goes to its' if moved == 1 else 'go to their'} next-best expert"


def _layer_in_words(intervention: Intervention) -> str:
    return "every MoE layer" if intervention.layer is None else f"L{intervention.layer}"


def quantity(number: int, singular: str, plural: str = "") -> str:
    """As in "1 patch" and "8 patches"; the plural has an s if it isn't given."""
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def control_in_words(
    intervention: Intervention, moved: int, routing: RoutingKind = "token_choice"
) -> str:
    """The random change of the control and its fill, in words; `moved` patch assignments are taken away."""
    assignments = f"{quantity(moved, 'random patch assignment')} of {_layer_in_words(intervention)}"
    if control_fill(intervention) == "zero":
        return f"setting {assignments} to zero"
    return {
        "soft": f"taking {assignments} away and sharing out their weight among the other experts",
        "expert_choice": f"taking {assignments} away",
        "token_choice": f"moving {assignments} to the next-best expert",
    }[routing]


def control_fill(intervention: Intervention) -> Fill:
    """The fill of the control: zero for interventions that drop assignments, else that of the intervention."""
    drops = intervention.kind in ("top_k", "capacity")
    return "zero" if drops else intervention.fill
