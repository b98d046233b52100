"""What an intervention does to a prediction, beside what the same change does where it shouldn't matter.

One picture is called one picture. Beside its change of logit stand
- the control: as many assignments of tokens to experts, drawn at random in the same layer from all experts, are taken
  away with the same fill, once per draw (assignments of patches and of prefix tokens are matched separately);
- the same intervention on every other expert of that layer;
- the mean over pictures of a class (`class_effect`).

An effect is measured inside the interventions that are open already (another k, say): before and after both have them.

Axes: B pictures of a batch, N tokens (prefix tokens first), K choices, E experts, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moevision.analysis.collect import network_input
from moevision.analysis.control import run_compared, run_under
from moevision.analysis.decision import routing_kind
from moevision.analysis.effect_result import (
    ClassEffect,
    Control,
    Effect,
    OtherExpert,
)
from moevision.analysis.effect_words import control_in_words
from moevision.analysis.intervention import Intervention, numbered_layers
from moevision.data.images import BadImageError
from moevision.errors import UserError
from moevision.layers import routing_lock
from moevision.layers.routing import Kind as RoutingKind
from moevision.models.hub import SavedModel

if TYPE_CHECKING:
    from moevision.analysis.images import PictureSet

__all__ = ["ClassEffect", "Control", "Effect", "OtherExpert", "class_effect", "effect"]

Pixels = npt.NDArray[np.uint8]


@torch.inference_mode()
def effect(
    model: SavedModel,
    image: Pixels,
    intervention: Intervention,
    *,
    target: int | str | None = None,
    num_controls: int = 20,
    seed: int = 0,
    class_effect: ClassEffect | None = None,
) -> Effect:
    """Measure what an intervention changes for one picture.

    Args:
        model: the model, in eval mode.
        image: uint8 [S, S, 3], as the model sees it.
        intervention: what to change.
        target: the class whose logit is followed, as index or name; the predicted one (before) if None.
        num_controls: random draws of the control, at least 2.
        seed: of the control.
        class_effect: put into the result, and so into its sentence and JSON.

    Raises:
        UserError: if the model has no such layer, expert or class, or the picture is no uint8 [S, S, 3].
    """
    if num_controls < 2:
        raise UserError(f"num_controls={num_controls} gives no spread: take at least 2 draws.")
    net, x = model.net, _to_input(model, [image])
    with routing_lock(net):
        before = net(x)[0].double()
        after, taken = run_under(net, x, intervention)
        index = int(before.argmax()) if target is None else _class_index(model.class_names, target)
        others = _on_other_experts(net, intervention)
        keys = [(seed, draw) for draw in range(num_controls)]
        logits = run_compared(net, x, intervention, taken, others, keys)
    delta_logits = (logits - before)[:, index].tolist()
    delta_ps = (logits.softmax(-1) - before.softmax(-1))[:, index].tolist()
    moved_prefix, moved = (int(sum(counts[0, part] for counts in taken.values())) for part in (0, 1))
    count, routing = len(others), _kind_of(net, intervention)
    control = control_in_words(intervention, moved, routing)
    return Effect(
        intervention=intervention,
        class_names=tuple(model.class_names),
        target=index,
        before_logits=tuple(before.tolist()),
        after_logits=tuple(after[0].tolist()),
        moved=moved,
        moved_prefix=moved_prefix,
        control=Control(control, tuple(delta_logits[count:]), tuple(delta_ps[count:])),
        others=tuple(
            OtherExpert(other.expert or 0, other.where, delta_logit, delta_p)
            for other, delta_logit, delta_p in zip(others, delta_logits[:count], delta_ps[:count], strict=True)
        ),
        class_effect=class_effect,
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
    """Measure what an intervention changes on average over pictures of one class.

    Args:
        model: the model, in eval mode.
        pictures: where the class is looked for.
        target: the class, as index into `model.class_names` or name.
        intervention: what to change.
        limit: so many pictures at most, drawn at random; all of the class if None.
        seed: of that draw, and of the control.
        batch_size: pictures per forward pass.

    Raises:
        UserError: if the model has no such layer, expert or class, or there is no readable picture of it.
    """
    index = _class_index(model.class_names, target)
    name, net = model.class_names[index], model.net
    chosen = _pictures_of(pictures, name, limit, seed)
    rows: list[Tensor] = []  # [B, 4]: change of logit and probability, control's change of logit, patches moved
    unreadable = 0
    for start in range(0, len(chosen), batch_size):
        batch = chosen[start : start + batch_size]
        readable = {number: image for number in batch if (image := _read(pictures, number)) is not None}
        unreadable += len(batch) - len(readable)
        if not readable:
            continue
        x = _to_input(model, list(readable.values()))
        with routing_lock(net):
            before = net(x).double()
            after, taken = run_under(net, x, intervention)
            control = run_compared(net, x, intervention, taken, [], [(seed, number) for number in readable])
        delta_p = after.softmax(-1) - before.softmax(-1)
        moved = sum(counts[:, 1] for counts in taken.values())
        deltas = [after - before, delta_p, control - before]
        rows.append(torch.stack([*(delta[:, index] for delta in deltas), torch.as_tensor(moved).to(before)], -1))
    if not rows:
        raise UserError(f"There is no readable picture of {name!r}: take another class or other pictures.")
    logits, ps, controls, moved_patches = torch.cat(rows).T.tolist()
    return ClassEffect(
        class_name=name,
        intervention=intervention,
        delta_logits=tuple(logits),
        delta_ps=tuple(ps),
        control_delta_logits=tuple(controls),
        moved=sum(moved_patches) / len(moved_patches),
        unreadable=unreadable,
    )


def _on_other_experts(net: nn.Module, intervention: Intervention) -> list[Intervention]:
    if intervention.kind not in ("ablate", "force") or intervention.layer is None:
        return []
    num_experts = numbered_layers(net)[intervention.layer].router.num_experts
    return [replace(intervention, expert=expert) for expert in range(num_experts) if expert != intervention.expert]


def _kind_of(net: nn.Module, intervention: Intervention) -> RoutingKind:
    """Who chooses in the layers that it acts on; where they differ, words for tokens are right in a wider sense."""
    kinds = {routing_kind(layer.router) for layer in intervention.edits(net)}
    return kinds.pop() if len(kinds) == 1 else "token_choice"


def _to_input(model: SavedModel, images: Sequence[Pixels]) -> Tensor:
    """uint8 pictures [S, S, 3] -> [B, 3, S, S] on the device and in the dtype of the model."""
    for image in images:
        if image.dtype != np.uint8 or image.shape != (model.image_size, model.image_size, 3):
            raise UserError(
                f"The picture is {image.dtype} {list(image.shape)}: give uint8 [{model.image_size}, "
                f"{model.image_size}, 3], as moevision.data.augment.square_pixels makes it."
            )
    return network_input(model, np.stack(images))


def _class_index(class_names: Sequence[str], target: int | str) -> int:
    if isinstance(target, str) and target in class_names:
        return list(class_names).index(target)
    if isinstance(target, int) and 0 <= target < len(class_names):
        return target
    raise UserError(f"The model has no class {target!r}: choose one of {', '.join(class_names[:20])}.")


def _pictures_of(pictures: PictureSet, name: str, limit: int | None, seed: int) -> list[int]:
    """Indices of the pictures of a class, or of `limit` of them."""
    if name not in pictures.class_names:
        raise UserError(f"{pictures.name} has no class {name!r}: its classes are {', '.join(pictures.class_names)}.")
    label = pictures.class_names.index(name)
    found = [number for number in range(len(pictures)) if pictures.label(number) == label]
    if limit is None or len(found) <= limit:
        return found
    return sorted(np.random.default_rng(seed).choice(found, limit, replace=False).tolist())


def _read(pictures: PictureSet, number: int) -> Pixels | None:
    try:
        return pictures.image(number)
    except BadImageError:  # counted, and reported in the result
        return None
