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

from moevision.analysis.effect_result import control_fill
from moevision.analysis.intervention import Fill, Intervention, edited
from moevision.analysis.ranking import Edit, Ranking, each_row
from moevision.layers import MoEMlp, Routing

Taken = dict[MoEMlp, Tensor]  # in order of depth, [B, 2] int64: assignments of prefix tokens, and of patches


def take_away_random(
    ranking: Ranking,
    numbers: Sequence[Sequence[int]],
    keys: Sequence[Sequence[int]],
    num_prefix_tokens: int,
    fill: Fill,
) -> Ranking:
    """Take assignments away at random, from any expert; each image of the batch by its own draw.

    Args:
        ranking: of B images.
        numbers: [B][2] how many assignments of prefix tokens, and of patches.
        keys: [B] seeds of the draws.
        num_prefix_tokens: tokens in front of the patches.
        fill: `next_best` or `zero`.
    """
    routing = ranking.settle()
    kept, index = routing.kept.cpu().numpy(), routing.expert_index.cpu().numpy()
    away = np.zeros(ranking.removed.shape, dtype=bool)
    for image, (wanted, key) in enumerate(zip(numbers, keys, strict=True)):
        rng = np.random.default_rng(tuple(key))
        token, choice = kept[image].nonzero()
        for number, part in zip(wanted, (token < num_prefix_tokens, token >= num_prefix_tokens), strict=True):
            candidates = np.flatnonzero(part)
            drawn = rng.choice(candidates, min(number, len(candidates)), replace=False)
            away[image, token[drawn], index[image, token[drawn], choice[drawn]]] = True
    mask = torch.from_numpy(away).to(ranking.removed.device)
    if fill == "zero":
        return replace(ranking, silenced=ranking.silenced | mask)
    return replace(ranking, removed=ranking.removed | mask)


def run_under(net: nn.Module, x: Tensor, intervention: Intervention) -> tuple[Tensor, Taken]:
    """Logits [B, C] under the intervention, and the assignments that it takes from their experts."""
    taken: Taken = {}
    prefix = int(getattr(net, "num_prefix_tokens", 0))

    def counted(layer: MoEMlp, edit: Edit, ranking: Ranking) -> Ranking:
        after = edit(ranking)
        lost = (_computed(ranking.settle()) & ~_computed(after.settle())).sum(-1)
        taken[layer] = torch.stack([lost[:, :prefix].sum(1), lost[:, prefix:].sum(1)], -1)
        return after

    edits = {layer: partial(counted, layer, edit) for layer, edit in intervention.edits(net).items()}
    with edited(net, edits):
        return net(x).double(), taken


def _computed(routing: Routing) -> Tensor:
    """[B, N, E] bool: which expert computes which token."""
    return torch.zeros_like(routing.logits, dtype=torch.bool).scatter(-1, routing.expert_index, routing.kept)


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

    def edit(ranking: Ranking, layer: MoEMlp, place: int) -> Ranking:
        own = [edits[layer] for edits in of_others] + [_unchanged] * len(keys)
        numbers = taken[layer].expand(len(keys), 2).tolist()
        return take_away_random(
            each_row(own)(ranking),
            numbers=[[0, 0]] * len(others) + numbers,
            keys=[(0,)] * len(others) + [(*key, place) for key in keys],
            num_prefix_tokens=prefix,
            fill=control_fill(intervention),
        )

    edits = {layer: partial(edit, layer=layer, place=place) for place, layer in enumerate(taken)}
    with edited(net, edits):
        return (_repeated(net, x, count, next(iter(taken))) if len(x) == 1 else net(x)).double()


def _unchanged(ranking: Ranking) -> Ranking:
    return ranking


def _repeated(net: nn.Module, x: Tensor, times: int, first: MoEMlp) -> Tensor:
    """Run one picture `times` times, as one picture up to the block that holds `first`: until there all rows agree."""
    blocks, thread = getattr(net, "blocks", None), threading.get_ident()
    if blocks is None or first.layer_index is None:
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
