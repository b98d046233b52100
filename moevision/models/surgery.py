"""Expert surgery: prune or merge the experts of a trained model, or collapse it to a dense one, without training.

Nothing here looks at pictures. What the functions decide on is an `ExpertUse` per layer (`measure_use`), which should
come from other pictures than those on which the result is tested. All return a new model, which saves and reloads under
its registered name.

Sources
    Li et al. 2024 (M-SMoE), arXiv:2310.01334: the most used experts stay, each other one joins the one whose router
    logits are most like its own; the weights of a group are aligned and averaged by use.

Axes: E experts, K choices of a token, H hidden units of one expert, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import nn

from moevision.errors import UserError
from moevision.layers import MoEMlp
from moevision.models.alignment import State, average_experts, expert_of
from moevision.models.expert_use import ExpertUse
from moevision.models.regroup import Groups, Use, numbered_layers, regrouped, state_of, use_of, with_mlps

How = Literal["average", "most_used"]


def prune_experts(
    model: nn.Module,
    keep: Mapping[int, Sequence[int]] | None = None,
    *,
    remove: int | None = None,
    use: Use | None = None,
) -> nn.Module:
    """Take experts away with their router rows; a token that chose one goes to its next-best expert.

    An expert that no token uses leaves without a trace where gates are a softmax over the kept choices
    (`noisy_top_k`). Where they are a softmax over all experts (`vmoe_top_k`), the gates of the others grow by
    1 / (1 - its probability).

    Args:
        model: a converted model.
        keep: block index -> experts to keep, whose order stays; layers that aren't named stay as they are.
        remove: instead of `keep`: take so many experts away in every layer, those with the fewest choices in `use`
            (of equal ones the later).
        use: what `remove` decides on.

    Returns:
        A new model; K, the hidden width and everything else are kept.

    Raises:
        UserError: if there is no such layer or expert, fewer than K experts would be left, or the router can't do with
            fewer experts (slots, hand-made gates).
    """
    layers = numbered_layers(model)
    if keep is None and remove is not None and remove >= 0:
        left = {block: max(layer.router.num_experts - remove, 0) for block, layer in layers.items()}
        keep = {block: most_used(use_of(use, block, layer), left[block]) for block, layer in layers.items()}
    elif keep is None or remove is not None:
        raise UserError("Say which experts to prune: keep={block: [experts]}, or remove=N, a number from 0.")
    return regrouped(model, {block: [[one] for one in experts] for block, experts in keep.items()}, None, align=False)


def merge_experts(
    model: nn.Module,
    groups: Mapping[int, Groups] | None = None,
    *,
    to: int | None = None,
    use: Use | None = None,
    align: bool = True,
) -> nn.Module:
    """Replace groups of experts by their averages.

    Weights, router rows and whatever else the router has for each expert are averaged with the experts' choices as
    weights (equally without `use`), hidden units aligned first. One row can't say what several did: to keep the gates
    of a softmax its logit would have to be the logsumexp of the group's, which is not linear in the token. So a merged
    expert is chosen less often than its members together, and a token that chose two of them gets its next-best expert
    too. Merging equal experts with equal rows changes nothing where a token has one expert with gate 1.

    Args:
        model: a converted model.
        groups: block index -> groups of experts; every expert of the layer is in one of them. Layers that aren't named
            stay as they are.
        to: instead of `groups`: leave so many experts in every layer, grouped by `similar_groups`.
        use: what `to` decides on, and the weights of the averages.
        align: bring the hidden units of each expert into the order of the group's most used one first.

    Returns:
        A new model; K, the hidden width and everything else are kept.

    Raises:
        UserError: if the groups are no partition of a layer's experts, fewer than K experts would be left, or the
            router can't do with fewer experts (slots, hand-made gates).
    """
    layers = numbered_layers(model)
    if groups is None and to is not None and to > 0:
        groups = {block: similar_groups(use_of(use, block, layer), to) for block, layer in layers.items()}
    elif groups is None or to is not None:
        raise UserError("Say which experts to merge: groups={block: [[experts], ...]}, or to=N, a number from 1.")
    for block, parts in groups.items():
        everyone = set(range(layers[block].router.num_experts)) if block in layers else set()
        missing = sorted(everyone - {expert for part in parts for expert in part})
        if missing or not all(parts):
            what = f"leave out the experts {missing}" if missing else "include an empty one"
            raise UserError(f"The groups of block {block} {what}: put each expert into one group.")
    return regrouped(model, groups, use, align=align)


def similar_groups(use: ExpertUse, number: int) -> list[list[int]]:
    """M-SMoE's groups of one layer: its most used experts, each with those that are most like it.

    Alike are experts whose router logits correlate over tokens (`ExpertUse.alike`).

    Returns:
        `number` groups (as many as there are experts, if those are fewer); each begins with its most used expert.
    """
    dominant = most_used(use, number)
    groups = {expert: [expert] for expert in dominant}
    for expert in range(len(use.counts)):
        if expert not in groups:
            groups[dominant[int(use.alike[expert, dominant].argmax())]].append(expert)
    return list(groups.values())


def most_used(use: ExpertUse, number: int) -> list[int]:
    """The `number` experts with the most choices, of equal ones the earlier, in ascending order."""
    order: list[int] = use.counts.argsort(descending=True, stable=True).tolist()
    return sorted(order[:number])


def collapse_to_dense(
    model: nn.Module, how: How = "average", *, use: Use | None = None, align: bool = True
) -> nn.Module:
    """Replace every MoE layer by one plain MLP of an expert's hidden width.

    With `use` experts count by the gates that they had, and the output is scaled by the mean sum of a token's gates, so
    that the layer keeps its magnitude: with V-MoE's router that sum is below 1, since its softmax is over all experts.
    Without `use` experts count equally and nothing is scaled. Shared experts are kept exactly, as further hidden units.

    Args:
        model: a converted model, of any router.
        how: `average` of all experts, or the `most_used` one, that with the largest sum of gates.
        use: what the experts did.
        align: before averaging, bring hidden units into the order of the most used expert (the first, without `use`).

    Returns:
        A new dense model. Where its MLPs are as wide as those of the dense architecture it is that architecture (for
        `vit_moe` its `base`), else it saves under the same name with the hidden widths as `twin`.

    Raises:
        UserError: if the model has no MoE layer, `how` is unknown, or `most_used` has no `use`.
    """
    layers = numbered_layers(model)
    if how not in get_args(How):
        raise UserError(f"There is no way to collapse named {how!r}: choose {' or '.join(get_args(How))}.")
    known = {
        block: use_of(use, block, layer) for block, layer in layers.items() if use is not None or how == "most_used"
    }
    mlps = {block: _mlp_state(layer, how, known.get(block), align) for block, layer in layers.items()}
    return with_mlps(model, mlps)


@torch.no_grad()
def _mlp_state(layer: MoEMlp, how: How, use: ExpertUse | None, align: bool) -> State:
    """State of the plain MLP that stands for a MoE layer."""
    experts = state_of(layer.experts)
    gates = torch.ones(layer.router.num_experts) if use is None else use.gate_sum
    if how == "most_used":
        mlp = expert_of(experts, int(gates.argmax()))
    else:
        mlp = average_experts(experts, range(len(gates)), gates, align=align)
    if use is not None:
        mlp = {name: value * use.gate_total if name.startswith("fc2.") else value for name, value in mlp.items()}
    return mlp if layer.shared is None else side_by_side(mlp, state_of(layer.shared))


def side_by_side(first: State, second: State) -> State:
    """The MLP whose output is the sum of two: their hidden units side by side, their output biases added."""
    both = {"fc2.weight": torch.cat([first["fc2.weight"], second["fc2.weight"]], dim=1)}
    both |= {name: torch.cat([first[name], second[name]]) for name in ("fc1.weight", "fc1.bias") if name in first}
    return both | {name: first[name] + second[name] for name in ("fc2.bias",) if name in first}
