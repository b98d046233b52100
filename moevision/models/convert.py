"""From a dense timm ViT to a Mixture of Experts, and to the dense twin that it is compared with.

Axes: D width, H hidden width of one expert, E experts, K choices of a token.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from timm.layers import Mlp
from torch import nn

from moevision.errors import UserError
from moevision.layers import MoEMlp
from moevision.layers.experts import Backend

Match = Literal["active_flops", "total_params"]


def moe_layer_indices(moe_layers: str | Sequence[int], depth: int) -> list[int]:
    """Indices of the MoE blocks, counting from 0.

    Args:
        moe_layers: `every2` = 1, 3, 5, ...; `last2` = the last two of those (V-MoE's "Last-2"); `all`; or a list.
        depth: number of blocks.

    Raises:
        UserError: for an unknown placement, or an index outside the model.
    """
    odd = list(range(1, depth, 2))
    named = {"every2": odd, "last2": odd[-2:], "all": list(range(depth))}
    if isinstance(moe_layers, str):
        if moe_layers not in named:
            raise UserError(f"There is no placement {moe_layers!r}: use {', '.join(named)} or a list of block numbers.")
        return named[moe_layers]
    outside = [index for index in moe_layers if not 0 <= index < depth]
    if outside:
        raise UserError(f"moe_layers={list(moe_layers)} does not fit {depth} blocks: they are 0 to {depth - 1}.")
    return sorted(set(moe_layers))


def convert_to_moe(
    vit: nn.Module,
    layers: str | Sequence[int] = "every2",
    num_experts: int = 8,
    top_k: int = 2,
    router: str = "noisy_top_k",
    *,
    expert_hidden: int | None = None,
    backend: Backend = "auto",
    copy_weights: bool = False,
) -> nn.Module:
    """Replace the MLPs of some blocks of a timm ViT by MoE layers, in place.

    By default the experts are freshly initialised and one expert has the dense MLP's hidden width / K, so that a
    token costs what it cost before. With `copy_weights` every expert starts as a copy of the MLP that it replaces,
    at full width ("sparse upcycling", arXiv:2212.05055): with gates that sum to 1 the output is unchanged.

    Args:
        vit: a timm model whose `blocks[i].mlp` is a plain `timm.layers.Mlp` (ViT, DeiT, AugReg, ...).
        layers: `every2`, `last2`, `all`, or a list of block indices counting from 0.
        num_experts: E.
        top_k: K.
        router: name of the router.
        expert_hidden: hidden width H of one expert.
        backend: how the experts are computed.
        copy_weights: start every expert as a copy of the dense MLP.

    Returns:
        `vit` itself. It carries a JSON-ready `moe_config` and saves under the registered name `vit_moe`.

    Raises:
        UserError: if the model has no such blocks, or a block's MLP is not a plain one.
    """
    blocks = getattr(vit, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        raise UserError(f"{type(vit).__name__} has no transformer blocks to convert: give a timm ViT or DeiT.")
    indices = moe_layer_indices(layers, len(blocks))
    for index in indices:
        mlp = getattr(blocks[index], "mlp", None)
        if type(mlp) is not Mlp or not isinstance(mlp.norm, nn.Identity) or not isinstance(mlp.fc1, nn.Linear):
            raise UserError(
                f"Block {index} of {type(vit).__name__} has {type(mlp).__name__} where a plain MLP is needed: "
                "gated, normed and convolutional MLPs, and blocks that are MoE already, can't be converted."
            )
        if copy_weights and expert_hidden not in (None, mlp.fc1.out_features):
            raise UserError(
                f"Copies of the MLP in block {index} have {mlp.fc1.out_features} hidden units, not "
                f"{expert_hidden}: leave expert_hidden out."
            )
    if copy_weights and indices:
        expert_hidden = cast(Any, blocks)[indices[0]].mlp.fc1.out_features
    for index in indices:
        blocks[index].mlp = _moe_like(vit, index, num_experts, top_k, router, expert_hidden, backend, copy_weights)
    _set_address(
        vit,
        moe_layers=indices,
        num_experts=num_experts,
        top_k=top_k,
        router=router,
        expert_hidden=expert_hidden,
        backend=backend,
    )
    return vit


def _set_address(vit: nn.Module, **moe_config: Any) -> None:
    """Leave what rebuilds the model: `moe_config`, and timm's own record under the registered name `vit_moe`."""
    state = cast(Any, vit)
    state.moe_config = moe_config
    pretrained_cfg = getattr(vit, "pretrained_cfg", None)
    if pretrained_cfg is None or str(pretrained_cfg.get("architecture", "")).startswith(("vit_moe", "test_vit_moe")):
        return  # built under a registered name, which does this itself
    given = {key: value for key, value in moe_config.items() if value is not None}
    state._model_args = {**getattr(vit, "_model_args", {}), "base": pretrained_cfg["architecture"], **given}
    state.pretrained_cfg = {**pretrained_cfg, "architecture": "vit_moe"}
    state.default_cfg = state.pretrained_cfg


def _moe_like(
    vit: nn.Module,
    index: int,
    num_experts: int,
    top_k: int,
    router: str,
    expert_hidden: int | None,
    backend: Backend,
    copy_weights: bool,
) -> MoEMlp:
    mlp = cast(Any, vit).blocks[index].mlp
    hidden = expert_hidden or mlp.fc1.out_features // top_k
    if hidden < 1:
        raise UserError(f"top_k={top_k} leaves an expert no hidden unit: choose a smaller top_k or set expert_hidden.")
    moe = MoEMlp(
        mlp.fc1.in_features,
        hidden,
        mlp.fc2.out_features,
        act_layer=lambda: copy.deepcopy(mlp.act),
        bias=(mlp.fc1.bias is not None, mlp.fc2.bias is not None),
        drop=(mlp.drop1.p, mlp.drop2.p),
        num_experts=num_experts,
        top_k=top_k,
        router=router,
        backend=backend,
        device=mlp.fc1.weight.device,
        dtype=mlp.fc1.weight.dtype,
    )
    moe.layer_index = index
    if copy_weights:
        _copy_into_experts(mlp, moe)
    elif getattr(vit, "fix_init", False):
        scale_by_depth(moe.experts.fc2.weight, index)
    return moe.train(mlp.training)


@torch.no_grad()
def _copy_into_experts(mlp: Mlp, moe: MoEMlp) -> None:
    for dense, packed in ((mlp.fc1, moe.experts.fc1), (mlp.fc2, moe.experts.fc2)):
        packed.weight.copy_(dense.weight)  # broadcasts over the experts
        if packed.bias is not None:
            packed.bias.copy_(cast(torch.Tensor, dense.bias))


@torch.no_grad()
def scale_by_depth(weight: torch.Tensor, index: int) -> None:
    """Timm's `fix_init`, applied to a layer made after it ran."""
    weight.div_(math.sqrt(2.0 * (index + 1)))


def dense_twin(model: nn.Module, match: Match = "active_flops") -> nn.Module:
    """A dense copy of a MoE model: every MoE layer becomes a freshly initialised `Mlp`, the rest is copied.

    Args:
        model: a converted model.
        match: `active_flops` gives the Mlp K·H hidden units, what one token computes (is sparse better at the same
            cost?); `total_params` gives it E·H, what is stored (what does sparsity save?).

    Returns:
        A new model, which saves under the same registered name with `twin=match`.

    Raises:
        UserError: if the model is not a converted one, or `match` is unknown.
    """
    if not hasattr(model, "moe_config"):
        raise UserError(f"{type(model).__name__} is not a MoE model: convert it first, or create a vit_moe model.")
    twin = copy.deepcopy(model)
    make_dense(twin, match)
    cast(Any, twin)._model_args = {**getattr(model, "_model_args", {}), "twin": match}
    return twin


def make_dense(model: nn.Module, match: Match) -> None:
    """Replace the MoE layers of `model` by dense MLPs, in place (see `dense_twin`)."""
    if match not in get_args(Match):
        raise UserError(f"There is no twin {match!r}: choose {' or '.join(get_args(Match))}.")
    state = cast(Any, model)
    for index, block in enumerate(state.blocks):
        if isinstance(block.mlp, MoEMlp):
            block.mlp = _mlp_like(block.mlp, match)
            if getattr(model, "fix_init", False):
                scale_by_depth(block.mlp.fc2.weight, index)
    state.moe_config = {**state.moe_config, "twin": match}


def _mlp_like(moe: MoEMlp, match: Match) -> Mlp:
    fc1, fc2 = moe.experts.fc1, moe.experts.fc2
    units = moe.router.top_k if match == "active_flops" else moe.router.num_experts
    mlp = Mlp(
        fc1.in_features,
        units * fc1.out_features,
        fc2.out_features,
        act_layer=cast(Any, lambda: copy.deepcopy(moe.experts.act)),
        bias=(fc1.bias is not None, fc2.bias is not None),
        drop=(moe.experts.drop.p, moe.drop.p),
        device=fc1.weight.device,
        dtype=fc1.weight.dtype,
    )
    for linear in (mlp.fc1, mlp.fc2):  # timm's ViT initialisation, which experts use too
        nn.init.trunc_normal_(linear.weight, std=0.02)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    return mlp.train(moe.training)
