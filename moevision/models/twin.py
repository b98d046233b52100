"""The dense twin that a Mixture of Experts is compared with.

Axes: D width, H hidden width of one expert, E experts, K choices of a token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

from timm.layers import Mlp
from torch import nn

from moevision.errors import UserError
from moevision.layers import MoEMlp, moe_layers
from moevision.models.convert import scale_by_depth

Match = Literal["active_flops", "total_params"]


def dense_twin(model: nn.Module, match: Match = "active_flops") -> nn.Module:
    """A dense copy of a MoE model: every MoE layer becomes a freshly initialised `Mlp`, the rest is copied.

    Args:
        model: a converted model.
        match: `active_flops` gives the Mlp K·H hidden units, what one token computes (is sparse better at the same
            cost?); `total_params` gives it E·H, what is stored (what does sparsity save?). Shared experts add theirs.

    Returns:
        A new model, which saves under the same registered name with `twin=match`.

    Raises:
        UserError: if the model is not a converted one, or `match` is unknown.
    """
    if not moe_layers(model) or not hasattr(model, "moe_config"):
        raise UserError(f"{type(model).__name__} is not a MoE model: convert it first, or create a vit_moe model.")
    twin = copy.deepcopy(model)
    make_dense(twin, match)
    cast(Any, twin)._model_args = {**getattr(model, "_model_args", {}), "twin": match}
    return twin


def make_dense(model: nn.Module, match: Match | Sequence[int]) -> None:
    """Replace the MoE layers of `model` by dense MLPs, in place.

    Args:
        model: a converted model.
        match: as in `dense_twin`, or the hidden width of each MLP, which is how `collapse_to_dense` saves its result.

    Raises:
        UserError: if `match` is unknown, or has not one width for each MoE layer.
    """
    layers = moe_layers(model)
    if isinstance(match, str):
        if match not in get_args(Match):
            raise UserError(f"There is no twin {match!r}: choose {' or '.join(get_args(Match))}.")
        widths = [_twin_width(layer, match) for layer in layers]
    else:
        widths = list(match)
    if len(widths) != len(layers):
        raise UserError(f"twin={widths} has {len(widths)} widths for {len(layers)} MoE layers: give one for each.")
    state = cast(Any, model)
    for number, hook in list(state.patch_embed._forward_pre_hooks.items()):
        if any(getattr(hook, "__self__", None) is layer.router for layer in layers):
            del state.patch_embed._forward_pre_hooks[number]  # no router reads the image any more
    for index, block in enumerate(state.blocks):
        if isinstance(block.mlp, MoEMlp):
            block.mlp = _mlp_like(block.mlp, widths.pop(0))
            if getattr(model, "fix_init", False):
                scale_by_depth(block.mlp.fc2.weight, index)
    state.moe_config = {**state.moe_config, "twin": match}


def _twin_width(moe: MoEMlp, match: Match) -> int:
    units = moe.num_shared_experts + (moe.router.top_k if match == "active_flops" else moe.router.num_experts)
    width: int = units * moe.experts.fc1.out_features
    return width


def _mlp_like(moe: MoEMlp, hidden_features: int) -> Mlp:
    fc1, fc2 = moe.experts.fc1, moe.experts.fc2
    mlp = Mlp(
        fc1.in_features,
        hidden_features,
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
