"""Forward passes that measure an intervention and its control.

The control of an intervention takes as many assignments of tokens to experts away, drawn at random in the same layers
from all experts, with the same fill. All its draws are rows of one batch.

Axes: B pictures of a batch, R rows, N tokens (prefix tokens first), K choices, E experts, C classes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from moevision.analysis.decision import Decision, Edit, computed_pairs, each_row
from moevision.analysis.effect_words import control_fill
from moevision.analysis.intervention import Fill, Intervention, edited
from moevision.analysis.ranking import Capacity, Ranking
from moevision.layers import ColourRouter, MoEMlp, moe_layers

Taken = dict[MoEMlp, Tensor]  # in order of depth, [B, 2] int64: assignments of prefix tokens, and of patches


def take_away_random(
    decision: Decision,
    numbers: Sequence[Sequence[int]],
    keys: Sequence[Sequence[int]],
    num_prefix_tokens: int,
    fill: Fill,
) -> Decision:
    """Take assignments away at random, from any expert; each image of the batch by its own draw.

    Args:
        decision: of B images.
        numbers: [B][2] how many assignments of prefix tokens, and of patches.
        keys: [B] seeds of the draws.
        num_prefix_tokens: tokens in front of the patches.
        fill: `next_best` or `zero`.
    """
    routing = decision.settle()
    kept, index = routing.kept.cpu().numpy(), routing.expert_index.cpu().numpy()
    away = np.zeros(decision.removed.shape, dtype=bool)
    for image, (wanted, key) in enumerate(zip(numbers, keys, strict=True)):
        rng = np.random.default_rng(tuple(key))
        token, choice = kept[image].nonzero()
        for number, part in zip(wanted, (token < num_prefix_tokens, token >= num_prefix_tokens), strict=True):
            candidates = np.flatnonzero(part)
            drawn = rng.choice(candidates, min(number, len(candidates)), replace=False)
            away[image, token[drawn], index[image, token[drawn], choice[drawn]]] = True
    mask = torch.from_numpy(away).to(decision.removed.device)
    if fill == "zero":
        return replace(decision, silenced=decision.silenced | mask)
    return replace(decision, removed=decision.removed | mask)


def run_under(net: nn.Module, x: Tensor, intervention: Intervention) -> tuple[Tensor, Taken]:
    """Logits [B, C] under the intervention, and the assignments that it takes from their experts.

    Of an ablation only the expert's own count, not those that a capacity of the model then drops elsewhere: the control
    has such consequences too.
    """
    taken: Taken = {}
    prefix = int(getattr(net, "num_prefix_tokens", 0))

    def counted(layer: MoEMlp, edit: Edit, decision: Decision) -> Decision:
        after: Decision = edit(decision)
        pairs = computed_pairs(decision.settle())
        gone = (after.removed | after.silenced) if intervention.kind == "ablate" else ~computed_pairs(after.settle())
        lost = (pairs & gone).sum(-1)
        taken[layer] = torch.stack([lost[:, :prefix].sum(1), lost[:, prefix:].sum(1)], -1)
        return after

    edits = {layer: partial(counted, layer, edit) for layer, edit in intervention.edits(net).items()}
    with edited(net, edits):
        return net(x).double(), taken


def run_compared(
    net: nn.Module,
    x: Tensor,
    intervention: Intervention,
    taken: Taken,
    others: Sequence[Intervention],
    keys: Sequence[tuple[int, int]],
) -> Tensor:
    """Logits of one batch in which every row has its own change: rows of `others` first, then draws of the control.

    Args:
        net: the network.
        x: [R, 3, S, S], or [1, 3, S, S] for R times the same picture.
        intervention: whose control is drawn.
        taken: what the intervention takes from experts, by picture of x.
        others: interventions on the same layer.
        keys: seed of each draw.

    Returns:
        [R, C], R = others + draws.
    """
    prefix = int(getattr(net, "num_prefix_tokens", 0))
    of_others = [other.edits(net) for other in others]
    count = len(others) + len(keys)

    def edit(decision: Decision, layer: MoEMlp, place: int) -> Decision:
        own = [edits[layer] for edits in of_others] + [_unchanged] * len(keys)
        numbers = taken[layer].expand(len(keys), 2).tolist()
        return take_away_random(
            each_row(own)(decision),
            numbers=[[0, 0]] * len(others) + numbers,
            keys=[(0,)] * len(others) + [(*key, place) for key in keys],
            num_prefix_tokens=prefix,
            fill=control_fill(intervention),
        )

    edits: dict[MoEMlp, Edit] = {layer: partial(edit, layer=layer, place=place) for place, layer in enumerate(taken)}
    if len(x) > 1:
        with edited(net, edits):
            logits: Tensor = net(x).double()
        return logits
    # Rows of one picture must not share a capacity that the model shares over its batch.
    shared = [layer for layer in moe_layers(net) if (own := Capacity.own(layer.router)) and own.whole_batch]
    with edited(net, dict.fromkeys(shared, Ranking.apart)), edited(net, edits):
        return _repeated(net, x, count, next(iter(taken))).double()


def _unchanged(decision: Decision) -> Decision:
    return decision


def _repeated(net: nn.Module, x: Tensor, times: int, first: MoEMlp) -> Tensor:
    """Run one picture `times` times, as one picture up to the block that holds `first`: until there all rows agree."""
    blocks, thread = getattr(net, "blocks", None), threading.get_ident()
    by_colour = any(isinstance(layer.router, ColourRouter) for layer in moe_layers(net))  # looks at the pictures again
    if blocks is None or first.layer_index is None or by_colour:
        logits: Tensor = net(x.expand(times, -1, -1, -1))
        return logits

    def repeat(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if threading.get_ident() != thread:  # a plain forward pass elsewhere, which waits for no lock
            return inputs
        return (inputs[0].expand(times, -1, -1), *inputs[1:])

    hook = blocks[first.layer_index].register_forward_pre_hook(repeat)
    try:
        logits = net(x)
    finally:
        hook.remove()
    return logits
