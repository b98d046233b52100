"""What an intervention does to a prediction, beside what the same change does where it shouldn't matter.

Beside the change of one image's logit (`effect`) stand
- the control: as many assignments of tokens to experts, drawn at random in the same layers from all experts, are taken
  away with the same fill, once per draw (assignments of patches and of prefix tokens are matched separately; where
  images are routed as a whole, whole experts of an image, and with K = 1 there is none beside an ablation);
- the mean over images of a class (`class_effect`).

An effect is measured inside the interventions that are open already (another k, say): before and after both have them.
Every JSON and sentence names the kind of intervention and, for an ablation, its fill.

Axes: B images of a batch, R rows, I images, N tokens (prefix tokens first), K choices, E experts, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean, stdev

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor, nn

from moevision.analysis.collect import network_input
from moevision.analysis.images import PictureSet
from moevision.analysis.information import Json, Pixels
from moevision.analysis.intervention import (
    Decision,
    Edit,
    Fill,
    Intervention,
    apply_edits,
    computed_pairs,
    per_image_capacity,
    run_repeated,
)
from moevision.data.images import BadImageError
from moevision.errors import UserError
from moevision.layers import MoEMlp, routing_lock
from moevision.layers.routing import Kind as RoutingKind
from moevision.models.io import SavedModel

Taken = dict[
    MoEMlp, Tensor
]  # in order of depth, [B, 2] int64: assignments of prefix tokens, and of patches


@torch.inference_mode()
def effect(
    model: SavedModel,
    image: Pixels,
    intervention: Intervention,
    *,
    target: int | str | None = None,
    num_controls: int = 20,
    seed: int = 0,
) -> Effect:
    """Measure what an intervention changes for one image, uint8 [S, S, 3] as the model, in eval mode, sees it.

    `target` is the class whose logit is followed, as index or name; the predicted one (before) if None. The control is
    drawn `num_controls` times, at least 2, by `seed`. A UserError for a layer, expert or class that the model hasn't.
    """
    if num_controls < 2:
        raise UserError(f"num_controls={num_controls} gives no spread: take at least 2 draws.")
    net, x = model.net, network_input(model, np.stack([image]))
    with routing_lock(net):
        before = net(x)[0].double()
        after, taken, has_control = run_under(net, x, intervention)
        index = int(before.argmax()) if target is None else _class_index(model.class_names, target)
        kinds: set[RoutingKind] = {layer.router.kind for layer in intervention.edits(net)}
        keys = [(seed, draw) for draw in range(num_controls)]
        logits = run_compared(net, x, intervention, taken, keys) if has_control else None
    moved_prefix, moved = (
        int(sum(counts[0, part] for counts in taken.values())) for part in (0, 1)
    )
    # Where layers differ in who chooses, words for tokens are right in a wider sense.
    routing = kinds.pop() if len(kinds) == 1 else "token_choice"
    control = None
    if logits is not None:
        changes = logits - before, logits.softmax(-1) - before.softmax(-1)
        of_target = (tuple(change[:, index].tolist()) for change in changes)
        control = Control(control_in_words(intervention, moved, routing), *of_target)
    return Effect(
        intervention=intervention,
        class_names=tuple(model.class_names),
        target=index,
        before_logits=tuple(before.tolist()),
        after_logits=tuple(after[0].tolist()),
        moved=moved,
        moved_prefix=moved_prefix,
        control=control,
        routing=routing,
    )


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
    all), `batch_size` go through the model at once; `seed` is of that draw and of the control. A UserError for a layer,
    expert or class that the model hasn't, and where no image of the class can be read.
    """
    index = _class_index(model.class_names, target)
    name, net = model.class_names[index], model.net
    if name not in pictures.class_names:
        raise UserError(
            f"{pictures.name} has no class {name!r}: its classes are {', '.join(pictures.class_names)}."
        )
    label = pictures.class_names.index(name)
    chosen = [number for number in range(len(pictures)) if pictures.label(number) == label]
    if limit is not None and len(chosen) > limit:
        chosen = sorted(np.random.default_rng(seed).choice(chosen, limit, replace=False).tolist())
    rows: list[
        Tensor
    ] = []  # [B, 4]: change of logit and probability, control's change of logit, patches moved
    unreadable, has_control = 0, True
    for start in range(0, len(chosen), batch_size):
        readable: dict[int, Pixels] = {}
        for number in chosen[start : start + batch_size]:
            try:
                readable[number] = pictures.image(number)
            except BadImageError:  # reported in the result
                unreadable += 1
        if not readable:
            continue
        x = network_input(model, np.stack(list(readable.values())))
        with routing_lock(net):
            before = net(x).double()
            after, taken, has_control = run_under(net, x, intervention)
            control = before
            if has_control:
                control = run_compared(
                    net, x, intervention, taken, [(seed, number) for number in readable]
                )
        delta_p = after.softmax(-1) - before.softmax(-1)
        moved = sum(counts[:, 1] for counts in taken.values())
        deltas = [after - before, delta_p, control - before]
        rows.append(
            torch.stack(
                [*(delta[:, index] for delta in deltas), torch.as_tensor(moved).to(before)], -1
            )
        )
    if not rows:
        raise UserError(
            f"There is no readable image of {name!r}: take another class or other images."
        )
    logits, ps, controls, moved_patches = torch.cat(rows).T.tolist()
    return ClassEffect(
        class_name=name,
        intervention=intervention,
        delta_logits=tuple(logits),
        delta_ps=tuple(ps),
        control_delta_logits=tuple(controls) if has_control else None,
        moved=sum(moved_patches) / len(moved_patches),
        unreadable=unreadable,
    )


def _class_index(class_names: Sequence[str], target: int | str) -> int:
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
    """Take assignments away at random, from any expert; each image of the batch by its own draw.

    `numbers` [B][2] says how many of prefix tokens, and of patches; `keys` [B] are the seeds of the draws. Where images
    are routed as a whole, as many experts of an image are taken, each for all of its tokens.
    """
    routing = decision.settle()
    kept, index = routing.kept.cpu().numpy(), routing.expert_index.cpu().numpy()  # [B, N, K]
    away = np.zeros(decision.removed.shape, dtype=bool)  # [B, N, E]
    for image, (wanted, key) in enumerate(zip(numbers, keys, strict=True)):
        rng = np.random.default_rng(tuple(key))
        if routing.route_by == "image":
            experts = index[image, 0][kept[image, 0]]
            number = min(round(sum(wanted) / len(away[image])), len(experts))
            away[image][:, rng.choice(experts, number, replace=False)] = True
            continue
        token, choice = kept[image].nonzero()  # every kept assignment of the image
        for number, part in zip(
            wanted, (token < num_prefix_tokens, token >= num_prefix_tokens), strict=True
        ):
            candidates = np.flatnonzero(part)
            drawn = rng.choice(candidates, min(number, len(candidates)), replace=False)
            away[image, token[drawn], index[image, token[drawn], choice[drawn]]] = True
    mask = torch.from_numpy(away).to(decision.removed.device)
    if fill == "zero":
        return replace(decision, silenced=decision.silenced | mask)
    return replace(decision, removed=decision.removed | mask)


def run_under(net: nn.Module, x: Tensor, intervention: Intervention) -> tuple[Tensor, Taken, bool]:
    """Logits [B, C] under the intervention, the assignments that it takes from their experts, whether it has a control.

    An ablation has none where a layer gives an image one expert: as many random choices are the ablation. What it takes
    are the expert's own choices, not those that a capacity of the model then drops elsewhere: the control has such
    consequences too.
    """
    taken: Taken = {}
    prefix, alone = int(getattr(net, "num_prefix_tokens", 0)), []

    def counted(layer: MoEMlp, edit: Edit, decision: Decision) -> Decision:
        after: Decision = edit(decision)
        routing = decision.settle()
        pairs = computed_pairs(routing)
        alone.append(routing.route_by == "image" and routing.expert_index.shape[-1] == 1)
        gone = (
            (after.removed | after.silenced)
            if intervention.kind == "ablate"
            else ~computed_pairs(after.settle())
        )
        lost = (pairs & gone).sum(-1)  # [B, N, E] -> [B, N] assignments of each token
        taken[layer] = torch.stack([lost[:, :prefix].sum(1), lost[:, prefix:].sum(1)], -1)  # [B, 2]
        return after

    edits = {
        layer: partial(counted, layer, edit) for layer, edit in intervention.edits(net).items()
    }
    with apply_edits(net, edits):
        logits = net(x).double()
    return logits, taken, not (intervention.kind == "ablate" and any(alone))


def run_compared(
    net: nn.Module,
    x: Tensor,
    intervention: Intervention,
    taken: Taken,
    keys: Sequence[tuple[int, int]],
) -> Tensor:
    """Logits [R, C] of one batch in which every row has its own draw of the control.

    x is [R, 3, S, S], or [1, 3, S, S] for R times the same image; `taken` is what the intervention takes from experts
    by image of x, `keys` the seed of each draw of its control.
    """
    prefix = int(getattr(net, "num_prefix_tokens", 0))

    def edit(decision: Decision, layer: MoEMlp, place: int) -> Decision:
        numbers = taken[layer].expand(len(keys), 2).tolist()
        seeds = [(*key, place) for key in keys]
        return remove_random_experts(decision, numbers, seeds, prefix, control_fill(intervention))

    edits: dict[MoEMlp, Edit] = {
        layer: partial(edit, layer=layer, place=place) for place, layer in enumerate(taken)
    }
    if len(x) > 1:
        with apply_edits(net, edits):
            logits: Tensor = net(x).double()
        return logits
    with per_image_capacity(net), apply_edits(net, edits):
        return run_repeated(
            net, x, torch.zeros(len(keys), dtype=torch.int64), next(iter(taken))
        ).double()


@dataclass(frozen=True)
class Control:
    """The same number of assignments taken away at random: what, with its fill, and the target's changes by draw."""

    what: str
    delta_logits: tuple[float, ...]
    delta_ps: tuple[float, ...]

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
        deltas = {
            "n": len(self.delta_logits),
            "deltas": list(self.delta_logits),
            "delta_ps": list(self.delta_ps),
        }
        return {"what": self.what, **deltas, "mean": self.mean, "sd": self.sd}


@dataclass(frozen=True)
class ClassEffect:
    """The effect on images of one class, each measured on the logit of that class."""

    class_name: str  # the class
    intervention: Intervention  # what was changed
    delta_logits: tuple[float, ...]  # [I] change of the logit, by image
    delta_ps: tuple[float, ...]  # [I] change of the probability
    # [I] the same with the control, one draw for each image; None where there is no control
    control_delta_logits: tuple[float, ...] | None
    moved: float  # mean number of patch assignments that the intervention takes from their experts
    unreadable: int = 0  # images of the class that could not be read, and are not among I

    def to_json(self) -> Json:
        """Means over images and their standard deviations (null for one image, and without a control)."""
        several, controls = len(self.delta_logits) > 1, self.control_delta_logits
        return {
            "class": self.class_name,
            "n": len(self.delta_logits),
            "intervention": self.intervention.to_json(),
            "delta_p": fmean(self.delta_ps),
            "delta_logit": fmean(self.delta_logits),
            "sd_logit": stdev(self.delta_logits) if several else None,
            "control_delta_logit": None if controls is None else fmean(controls),
            "control_sd_logit": None if controls is None or not several else stdev(controls),
            "moved": self.moved,
            "unreadable": self.unreadable,
        }


@dataclass(frozen=True)
class Effect:
    """The effect on one image."""

    intervention: Intervention  # what was changed
    class_names: tuple[str, ...]  # [C]
    target: int  # index of the class that the changes below are about
    before_logits: tuple[float, ...]  # [C]
    after_logits: tuple[float, ...]  # [C]
    moved: int  # patch assignments that the intervention takes from their experts, in the layers that it acts on
    moved_prefix: int  # the same of class and register tokens
    # the same number taken away at random; None where as many random choices are the change itself
    control: Control | None
    routing: RoutingKind = "token_choice"  # who chooses in the layers that it acts on

    @property
    def before(self) -> tuple[float, ...]:
        """[C] probabilities before."""
        return tuple(softmax(self.before_logits).tolist())

    @property
    def after(self) -> tuple[float, ...]:
        """[C] probabilities after."""
        return tuple(softmax(self.after_logits).tolist())

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
        """All of it in one sentence that names the kind of intervention."""
        before, after = self.before[self.target], self.after[self.target]
        change = effect_in_words(self.intervention, self.moved, self.routing)
        old, new = f"{before:.2f}", f"{after:.2f}"
        moves = (
            f"stays at {old}"
            if old == new
            else f"{'falls' if after < before else 'rises'} from {old} to {new}"
        )
        parts = [
            f"For this image: {change} {self.class_names[self.target]} {moves} (logit {_signed(self.delta_logit)})"
        ]
        any_moved = self.moved or self.moved_prefix
        if any_moved and self.control is None:
            parts.append(
                "no control: as many random choices are these, since an image has one expert"
            )
        elif any_moved and self.control is not None:
            spread = f"{_signed(self.control.mean)} ± {self.control.sd:.2f}"
            parts.append(
                f"{self.control.what} changes the logit by {spread} ({len(self.control.delta_logits)} draws)"
            )
        return "; ".join(parts) + "."

    def to_json(self) -> Json:
        """Every number, with the five likeliest classes before and after."""

        def top5(probabilities: Sequence[float]) -> list[Json]:
            best = sorted(range(len(probabilities)), key=lambda index: -probabilities[index])[:5]
            return [{"class": self.class_names[index], "p": probabilities[index]} for index in best]

        return {
            "schema": "moevision.effect/1",
            "intervention": self.intervention.to_json(),
            "routing": self.routing,
            "before": top5(self.before),
            "after": top5(self.after),
            "target": self.class_names[self.target],
            "delta_p": self.delta_p,
            "delta_logit": self.delta_logit,
            "moved": self.moved,
            "moved_prefix": self.moved_prefix,
            "control": None if self.control is None else self.control.to_json(),
            "sentence": self.sentence,
        }


def _signed(value: float) -> str:
    text = f"{value:+.2f}".replace("-", "−")
    return "0.00" if text in ("+0.00", "−0.00") else text


def effect_in_words(
    intervention: Intervention, moved: int, routing: RoutingKind = "token_choice"
) -> str:
    """What was changed, as the start of a sentence; `moved` patch assignments were taken from their experts."""
    layer = "every MoE layer" if intervention.layer is None else f"L{intervention.layer}"
    assignments, one = f"{moved} patch assignment{'' if moved == 1 else 's'}", moved == 1
    match intervention.kind:
        case "ablate":
            patches = f"{moved} patch{'' if one else 'es'}"
            if intervention.fill == "zero":
                gone = f"its output set to zero for {patches}"
            elif routing == "soft":
                gone = f"its weight in {patches} shared out among the other experts"
            elif routing == "expert_choice":
                gone = f"{patches} {'loses' if one else 'lose'} it, and no expert takes its place"
            else:
                gone = f"{patches} {'goes to its' if one else 'go to their'} next-best expert"
            return f"without {layer}·E{intervention.expert} ({gone})"
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
            what = "patches for the experts of" if routing == "expert_choice" else "routing in"
            return f"with random {what} {layer} (seed {intervention.seed}, {assignments} moved)"
        case "top_k":
            return f"with k = {intervention.top_k} in {layer} ({assignments} dropped)"
        case "capacity":
            return (
                f"with capacity factor {intervention.factor:g} in {layer} ({assignments} dropped)"
            )


def control_in_words(
    intervention: Intervention, moved: int, routing: RoutingKind = "token_choice"
) -> str:
    """What the control does, with its fill."""
    layer = "every MoE layer" if intervention.layer is None else f"L{intervention.layer}"
    assignments = f"{moved} random patch assignment{'' if moved == 1 else 's'} of {layer}"
    if control_fill(intervention) == "zero":
        return f"setting {assignments} to zero"
    return {
        "soft": f"taking {assignments} away and sharing out their weight among the other experts",
        "expert_choice": f"taking {assignments} away",
        "token_choice": f"moving {assignments} to the next-best expert",
    }[routing]


def control_fill(intervention: Intervention) -> Fill:
    """The control takes away as the intervention does: what is dropped is dropped there, what is moved is moved."""
    drops = intervention.kind in ("top_k", "capacity")
    return "zero" if drops else intervention.fill
