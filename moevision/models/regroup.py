"""A model with other experts: each new expert is the average of a group of old ones (of one, if it is kept).

What `prune_experts` and `merge_experts` have in common.

Axes: E experts, K choices of a token.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from moevision.errors import UserError
from moevision.layers import HandmadeRouter, MoEMlp, TopKRouter, moe_layers
from moevision.models.alignment import State, average_experts, shares
from moevision.models.convert import convert_to_moe, one_or_list
from moevision.models.expert_use import ExpertUse
from moevision.models.twin import make_dense
from moevision.models.vit_moe import MOE_ARGUMENTS

Use = Mapping[int, ExpertUse]
Groups = Sequence[Sequence[int]]


def regrouped(model: nn.Module, groups: Mapping[int, Groups], use: Use | None, *, align: bool) -> nn.Module:
    """A copy of the model whose experts are averages of groups of its experts.

    Args:
        model: a converted model.
        groups: block index -> groups; experts in no group are gone, layers that aren't named stay as they are. New
            experts stand in the order of the first expert of each group.
        use: experts are averaged by their choices; equally if None.
        align: bring hidden units into one order before averaging.

    Raises:
        UserError: if there is no such layer or expert, fewer than K experts would be left, or the router can't do
            without an expert.
    """
    layers = numbered_layers(model)
    strangers = sorted(set(groups) - set(layers))
    if strangers:
        raise UserError(f"Block {strangers[0]} is no MoE layer: choose among {', '.join(map(str, layers))}.")
    parts = {
        # Sorted, so that a layer of as many experts as before is the same layer.
        block: sorted(map(list, groups.get(block, [[expert] for expert in range(layer.router.num_experts)])))
        for block, layer in layers.items()
    }
    for block, layer in layers.items():
        _check_groups(block, layer, parts[block])
    new = _with_experts(model, [len(parts[block]) for block in layers])
    for block, layer in layers.items():
        weights = torch.ones(layer.router.num_experts) if use is None else use_of(use, block, layer).counts
        target: MoEMlp = cast(Any, new).blocks[block].mlp
        if layer.shared is not None and target.shared is not None:
            target.shared.drop.p = layer.shared.drop.p  # not that of the experts, which convert_to_moe has seen
        target.load_state_dict(_averaged_state(layer, target, parts[block], weights, align))
    return new


def _check_groups(block: int, layer: MoEMlp, groups: Groups) -> None:
    number, top_k = layer.router.num_experts, layer.router.top_k
    members = [expert for group in groups for expert in group]
    if len(set(members)) < len(members) or not set(members) <= set(range(number)):
        raise UserError(f"Block {block} has the experts 0 to {number - 1}, not {members}: name each at most once.")
    if len(groups) < top_k:
        raise UserError(
            f"Block {block} would have {len(groups)} experts and a token takes {top_k}: leave at least {top_k}, "
            "or collapse the model to a dense one."
        )
    if len(groups) < number and not isinstance(layer.router, TopKRouter):
        if isinstance(layer.router, HandmadeRouter):
            why = "it gives tokens to a fixed number of experts by a rule, not by a learned row for each"
        else:
            why = "every expert takes tokens into slots, so that none is unused and no token has a next-best one"
        raise UserError(
            f"The router of block {block} ({type(layer.router).__name__}) can't do with fewer experts: {why}. "
            "Collapse the model to a dense one instead."
        )


def _with_experts(model: nn.Module, num_experts: Sequence[int]) -> nn.Module:
    """A copy with so many experts in each MoE layer, freshly drawn; it saves and reloads under the model's name."""
    given = {
        "num_experts": one_or_list(list(num_experts), None),
        # As a number: by default it would follow from K and the width of the dense MLP.
        "expert_hidden": one_or_list([layer.experts.fc1.out_features for layer in moe_layers(model)], None),
    }
    new = copy.deepcopy(model)
    config = {**cast(Any, model).moe_config, **given}
    with torch.random.fork_rng(devices=[]):
        make_dense(new, "active_flops")  # convert_to_moe reads widths, biases and dropout from dense MLPs
        convert_to_moe(new, config.pop("moe_layers"), **config)
    cast(Any, new)._model_args = {**getattr(model, "_model_args", {}), **given}
    return new


def with_mlps(model: nn.Module, mlps: Mapping[int, State]) -> nn.Module:
    """A copy of the model with plain MLPs of these weights in its MoE blocks; it saves and reloads."""
    new = copy.deepcopy(model)
    widths = [len(mlps[block]["fc1.weight"]) for block in numbered_layers(model)]
    with torch.random.fork_rng(devices=[]):
        make_dense(new, widths)
        arguments = getattr(model, "_model_args", {})
        for block, state in mlps.items():
            cast(Any, new).blocks[block].mlp.load_state_dict(state)
        cast(Any, new)._model_args = {**arguments, "twin": widths}
        if getattr(model, "pretrained_cfg", None):
            _become_plain(new, arguments)
    return new


def _become_plain(dense: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Where the architecture without experts has MLPs of the same widths, let `dense` be that architecture."""
    state = cast(Any, dense)
    own = {name: value for name, value in arguments.items() if name not in (*MOE_ARGUMENTS, "moe_layers", "twin")}
    name = own.pop("base", None)
    if name is None:
        name, own["moe_layers"] = state.pretrained_cfg["architecture"], []
    plain: Any = timm.create_model(name, **{**own, "num_classes": state.num_classes})
    if [block.mlp.fc1.out_features for block in plain.blocks] != [b.mlp.fc1.out_features for b in state.blocks]:
        return
    for block, its in zip(state.blocks, plain.blocks, strict=True):  # experts may have had another dropout
        block.mlp.drop1.p, block.mlp.drop2.p = its.mlp.drop1.p, its.mlp.drop2.p
    state._model_args = own
    state.pretrained_cfg = state.default_cfg = {**state.pretrained_cfg, "architecture": name}
    del state.moe_config
    if hasattr(plain, "moe_config"):
        state.moe_config = plain.moe_config


@torch.no_grad()
def _averaged_state(old: MoEMlp, new: MoEMlp, groups: Groups, weights: Tensor, align: bool) -> State:
    """State of the new layer: what there is for each expert is averaged by group, the rest copied."""
    experts = state_of(old.experts)
    merged = [average_experts(experts, group, weights[list(group)], align=align) for group in groups]
    state = {f"experts.{name}": torch.stack([one[name] for one in merged]) for name in experts}
    mixing = torch.zeros(len(groups), old.router.num_experts, dtype=torch.float64)
    for place, group in enumerate(groups):
        mixing[place, group] = shares(weights[list(group)])
    before = state_of(old)
    for name, tensor in new.state_dict().items():
        if name in state:
            continue
        if tensor.shape == before[name].shape:  # it doesn't depend on E, or E is as before
            state[name] = before[name]
        else:
            rows = before[name].double()
            state[name] = torch.tensordot(mixing.to(rows.device), rows, dims=1).to(tensor.dtype)
    return state


def numbered_layers(model: nn.Module) -> dict[int, MoEMlp]:
    """The MoE layers by block index.

    Raises:
        UserError: if the model isn't a converted one.
    """
    layers = moe_layers(model)
    if not layers or not hasattr(model, "moe_config"):
        raise UserError(f"{type(model).__name__} has no experts to operate on: give a MoE model, not a dense one.")
    return {cast(int, layer.layer_index): layer for layer in layers}


def use_of(use: Use | None, block: int, layer: MoEMlp) -> ExpertUse:
    """The use of one layer's experts.

    Raises:
        UserError: if it isn't known, or is of another number of experts.
    """
    if use is None or block not in use:
        raise UserError(
            f"How the experts of block {block} are used must be known: give use=measure_use(model, images)."
        )
    known, number = len(use[block].counts), layer.router.num_experts
    if known != number:
        raise UserError(f"The use of block {block} is of {known} experts, not {number}: measure it on this model.")
    return use[block]


def state_of(module: nn.Module) -> State:
    """A module's state, detached."""
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}
