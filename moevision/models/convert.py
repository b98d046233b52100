"""From a dense timm ViT to a Mixture of Experts, which routes of it are read, and its dense twin.

A class-token head reads one token. What the last block computes for the patches then reaches no logit: their routes
there get no gradient from the classes and change no answer, however they look. Two ways out: pool over the patches, or
leave the last block dense.

Axes: B images, N tokens (prefix tokens such as the class token first, then patches), D width, H hidden width of one
expert, E experts, K choices of a token.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from typing import Any, Literal, cast, get_args

import timm
import torch
from timm.layers import Mlp
from timm.models.eva import Eva
from torch import Tensor, nn

from moevision.config import RouterOptions
from moevision.errors import UserError
from moevision.layers import MoEMlp, PackedLinear, capacity_of, moe_layers, router_kind
from moevision.layers.baselines import ColourRouter, HashRouter, PositionRouter
from moevision.layers.experts import Backend
from moevision.layers.routing import evaluating, routed_unit

Match = Literal["active_flops", "total_params"]


def moe_layer_indices(moe_layers: str | Sequence[int], depth: int) -> list[int]:
    """Indices of the MoE blocks, counting from 0.

    `every2` = 1, 3, 5, ...; `last2` = the last two of those (V-MoE's "Last-2"); `all`; or a list.
    """
    odd = list(range(1, depth, 2))
    named = {"every2": odd, "last2": odd[-2:], "all": list(range(depth))}
    if isinstance(moe_layers, str):
        if moe_layers not in named:
            raise UserError(
                f"There is no placement {moe_layers!r}: use {', '.join(named)} or a list of block numbers."
            )
        return named[moe_layers]
    outside = [index for index in moe_layers if not 0 <= index < depth]
    if outside:
        raise UserError(
            f"moe_layers={list(moe_layers)} does not fit {depth} blocks: they are 0 to {depth - 1}."
        )
    return sorted(set(moe_layers))


def convert_to_moe(
    vit: nn.Module,
    layers: str | Sequence[int] = "every2",
    num_experts: int | Sequence[int] = 8,
    top_k: int | Sequence[int] | None = None,
    router: str | Sequence[str] = "noisy_top_k",
    *,
    expert_hidden: int | Sequence[int] | None = None,
    backend: Backend = "auto",
    copy_weights: bool = False,
    num_shared_experts: int = 0,
    expert_drop: float | None = None,
    **router_options: Any,
) -> nn.Module:
    """Replace the MLPs of some blocks of a timm ViT by MoE layers, in place.

    By default the experts are freshly initialised and one expert has the dense MLP's hidden width / (K + shared), so
    that a token costs what it cost before. With `copy_weights` every expert starts as a copy of the MLP that it
    replaces, at full width ("sparse upcycling", arXiv:2212.05055): with gates that sum to 1 the output is unchanged.
    With a fraction 1/G of that width, G experts in a row share an MLP out among them (`_share_out`).

    Args:
        vit: a timm model whose `blocks[i].mlp` is a plain `timm.layers.Mlp` (ViT, DeiT, AugReg, ...).
        layers: `every2`, `last2`, `all`, or a list of block indices counting from 0. Where the classifier reads the
            class token alone, routes of patches in the last block change no answer:
            `read_layer_indices` leaves it out.
        num_experts: E; like the next three one value for all MoE layers, or one per MoE layer.
        top_k: K; by default the router's own.
        router: a name of `moevision.layers.ROUTERS`.
        expert_hidden: hidden width H of one expert.
        backend: how the experts are computed.
        copy_weights: start every expert as a copy of the dense MLP, or of a part of its hidden units.
        num_shared_experts: experts that every token passes besides the routed ones.
        expert_drop: dropout inside the experts, in the place of the MLP's.
        **router_options: see `moevision.layers.RouterOptions`; a router ignores what only another layer's can use.

    Returns:
        `vit` itself. It carries a JSON-ready `moe_config`, saves under the registered name `vit_moe`, and its
        `no_weight_decay()` names the experts' biases.

    Raises:
        UserError: if the model has no such blocks or has experts already, a block's MLP is not a plain one, or an
            option doesn't fit. The model is then as it was.
    """
    blocks = getattr(vit, "blocks", None)
    parts = hasattr(vit, "num_prefix_tokens") and hasattr(vit, "patch_embed")
    if not (isinstance(blocks, nn.Sequential | nn.ModuleList) and parts):
        raise UserError(
            f"{type(vit).__name__} has no transformer blocks behind a patch_embed to convert: give a timm ViT or DeiT."
        )
    if moe_layers(vit):
        raise UserError(
            f"{type(vit).__name__} has experts already: convert all layers in one call."
        )
    if copy_weights and num_shared_experts:
        raise UserError(
            "A shared expert on top of copies would double the output: leave num_shared_experts out."
        )
    indices = moe_layer_indices(layers, len(blocks))
    of_layer = {
        "num_experts": num_experts,
        "top_k": top_k,
        "router": router,
        "hidden_features": expert_hidden,
    }
    shared = {
        "backend": backend,
        "num_shared_experts": num_shared_experts,
        "expert_drop": expert_drop,
    }
    # As in timm, an option that is None was not given.
    options = {name: value for name, value in router_options.items() if value is not None}
    plans = _plan(vit, indices, of_layer, shared, options, copy_weights)
    _check_twin(vit, indices)
    # All of them first: a layer that can't be made leaves the model as it was.
    experts = [
        _moe_like(vit, index, plan, copy_weights)
        for index, plan in zip(indices, plans, strict=True)
    ]
    if not isinstance(getattr(vit, "patch_drop", None), nn.Identity | None) and any(
        isinstance(moe.router, HashRouter | PositionRouter | ColourRouter) for moe in experts
    ):
        raise UserError(
            "Fixed rules route by the patch's place, which dropped patches change: leave patch_drop_rate at 0."
        )
    for index, moe in zip(indices, experts, strict=True):
        blocks[index].mlp = moe
    state = cast(Any, vit)
    for moe in experts:
        moe.router.num_prefix_tokens = int(state.num_prefix_tokens)
        if moe.router.sees_image:
            # A hook on this module, once per forward pass: it is outside compiled and checkpointed blocks.
            state.patch_embed.register_forward_pre_hook(moe.router.look)
    # The experts' biases must not decay: two dimensions are a weight to timm's optimizers. A plain function of names:
    # one that holds the model would be a reference cycle.
    packed = [
        f"{name}.bias" for name, module in vit.named_modules() if isinstance(module, PackedLinear)
    ]
    state.no_weight_decay = partial(set, {*getattr(vit, "no_weight_decay", set)(), *packed})
    written = {
        name: one_or_list([plan[name] for plan in plans], given) for name, given in of_layer.items()
    }
    if not copy_weights and expert_hidden is None and "twin" not in getattr(vit, "_model_args", {}):
        written["hidden_features"] = None  # follows from the MLP
    if any("slots_per_expert" in plan for plan in plans):
        options["slots_per_expert"] = one_or_list(
            [plan.get("slots_per_expert") for plan in plans], None
        )
    _set_address(
        vit,
        moe_layers=indices,
        num_experts=written["num_experts"],
        top_k=written["top_k"],
        router=written["router"],
        expert_hidden=written["hidden_features"],
        backend=backend,
        **({"num_shared_experts": num_shared_experts} if num_shared_experts else {}),
        **({} if expert_drop is None else {"expert_drop": expert_drop}),
        **options,
    )
    return vit


def _plan(
    vit: nn.Module,
    indices: list[int],
    of_layer: dict[str, Any],
    shared: dict[str, Any],
    options: dict[str, Any],
    copy_weights: bool,
) -> list[dict[str, Any]]:
    lists = {name: _per_layer(name, value, len(indices)) for name, value in of_layer.items()}
    slots = _per_layer("slots_per_expert", options.get("slots_per_expert"), len(indices))
    routers = lists["router"]
    useful = {name for router in routers for name in router_kind(router).options}
    useless = sorted(
        options.keys() - (useful if routers else {field.name for field in fields(RouterOptions)})
    )
    if useless:
        names = " and ".join(dict.fromkeys(map(repr, routers))) or "A model without MoE layers"
        raise UserError(f"The router {names} has no use for {', '.join(useless)}: leave it out.")
    plans = []
    for place, index in enumerate(indices):
        plan = {name: values[place] for name, values in lists.items()} | shared
        kind, dense_hidden = router_kind(plan["router"]), plain_mlp(vit, index).out_features
        if plan["top_k"] is None:
            plan["top_k"] = kind.top_k
        plan["hidden_features"] = _expert_hidden(index, plan, dense_hidden, copy_weights)
        plan |= {name: value for name, value in options.items() if name in kind.options}
        if "slots_per_expert" in kind.options:
            # So many that a token costs as much as with K experts; kept when the image's size changes.
            tokens = int(cast(Any, vit).patch_embed.num_patches) + int(
                cast(Any, vit).num_prefix_tokens
            )
            plan["slots_per_expert"] = slots[place] or capacity_of(
                1.0, tokens, plan["top_k"], plan["num_experts"]
            )
        plans.append(plan)
    return plans


def _expert_hidden(index: int, plan: dict[str, Any], dense_hidden: int, copy_weights: bool) -> int:
    """Hidden width of one expert: what was asked, or what costs as much as the dense MLP (as wide, for copies)."""
    if plan["top_k"] < 1:
        raise UserError(f"top_k is {plan['top_k']}: it must be at least 1 expert.")
    asked, units = plan["hidden_features"], plan["top_k"] + plan["num_shared_experts"]
    if (
        copy_weights and asked is not None
    ):  # experts of that width share the dense MLP out among them
        parts, rest = divmod(dense_hidden, asked) if 0 < asked <= dense_hidden else (0, 1)
        if rest:
            raise UserError(
                f"The MLP in block {index} has {dense_hidden} hidden units, which experts of {asked} can't share: use "
                f"a whole part of it, such as expert_hidden {dense_hidden // 2}, or leave expert_hidden out."
            )
        if plan["num_experts"] % parts:
            raise UserError(
                f"{plan['num_experts']} experts make no groups of {parts}, each of which holds the MLP in block "
                f"{index}: change num_experts or expert_hidden."
            )
    hidden = int(asked or (dense_hidden if copy_weights else dense_hidden // units))
    if hidden < 1:
        raise UserError(
            f"top_k={units} leaves an expert no hidden unit: choose a smaller top_k or set expert_hidden."
        )
    return hidden


def _per_layer(name: str, value: Any, count: int) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise UserError(
            f"{name}={list(value)} has {len(value)} entries for {count} MoE layers: give one for each."
        )
    return list(value)


def one_or_list(values: list[Any], given: Any) -> Any:
    """What to write down: one value if all layers have the same."""
    if not values:
        return given
    return values[0] if all(value == values[0] for value in values) else values


def plain_mlp(vit: nn.Module, index: int) -> nn.Linear:
    """The first map of a block's MLP, fc1."""
    mlp: Any = getattr(cast(Any, vit).blocks[index], "mlp", None)
    if type(mlp) is Mlp and isinstance(mlp.fc1, nn.Linear) and isinstance(mlp.norm, nn.Identity):
        return mlp.fc1
    has = (
        "no MLP of its own"
        if mlp is None
        else f"a {type(mlp).__name__} that is gated, convolutional or has a norm"
    )
    raise UserError(
        f"Block {index} of {type(vit).__name__} has {has}: it can't be converted, since experts take the place of "
        "plain two-layer MLPs."
    )


def _dense_arguments(vit: nn.Module) -> dict[str, Any]:
    """What timm wrote down of a model, but for experts that it was given in its time and a twin."""
    others = {"twin", *getattr(vit, "moe_config", {})}
    return {
        name: value for name, value in getattr(vit, "_model_args", {}).items() if name not in others
    }


def _check_twin(vit: nn.Module, indices: Sequence[int]) -> None:
    """Raise a UserError where a dense twin would keep an MLP of a width that its name doesn't build."""
    if not indices or "twin" not in getattr(vit, "_model_args", {}):
        return
    twin = cast(Any, vit)
    with torch.device("meta"):
        plain: Any = timm.create_model(
            twin.pretrained_cfg["architecture"],
            **{**_dense_arguments(vit), "moe_layers": [], "num_classes": twin.num_classes},
        )
    for index, (block, its) in enumerate(zip(twin.blocks, plain.blocks, strict=True)):
        if index not in indices and block.mlp.fc1.out_features != its.mlp.fc1.out_features:
            raise UserError(
                "This dense twin has MLPs of another width where its experts were: convert all of those blocks, or a "
                "twin of the same active FLOPs."
            )


def _set_address(vit: nn.Module, **moe_config: Any) -> None:
    """`moe_config`, and timm's own record under a registered name: what rebuilds the model."""
    state, arguments = cast(Any, vit), _dense_arguments(vit)
    state.moe_config = moe_config
    pretrained_cfg = getattr(vit, "pretrained_cfg", None)
    if pretrained_cfg is None:
        # Being built under a registered name, which writes down what was given; the slot count must outlive a resize.
        if "slots_per_expert" in moe_config:
            state._model_args = {"slots_per_expert": moe_config["slots_per_expert"]}
        return
    name = str(pretrained_cfg["architecture"])
    if not name.startswith(("vit_moe", "test_vit_moe")):
        arguments["base"] = name
        state.pretrained_cfg = state.default_cfg = {**pretrained_cfg, "architecture": "vit_moe"}
    elif not moe_config["moe_layers"]:  # as it was, a twin for instance
        return
    state._model_args = arguments | {
        key: value for key, value in moe_config.items() if value is not None
    }


def _moe_like(vit: nn.Module, index: int, plan: dict[str, Any], copy_weights: bool) -> MoEMlp:
    mlp = cast(Any, vit).blocks[index].mlp
    moe = MoEMlp(
        mlp.fc1.in_features,
        out_features=mlp.fc2.out_features,
        act_layer=lambda: copy.deepcopy(mlp.act),
        bias=(mlp.fc1.bias is not None, mlp.fc2.bias is not None),
        drop=(mlp.drop1.p, mlp.drop2.p),
        device=mlp.fc1.weight.device,
        dtype=mlp.fc1.weight.dtype,
        **plan,
    )
    moe.layer_index = index
    if copy_weights:
        parts = len(mlp.fc1.weight) // int(moe.experts.fc1.out_features)
        (_share_out if parts > 1 else _copy)(mlp, moe, parts)
    else:
        scale_by_depth(vit, moe, index)
    return moe.train(mlp.training)


@torch.no_grad()
def _copy(mlp: Mlp, moe: MoEMlp, _parts: int) -> None:
    for dense, packed in ((mlp.fc1, moe.experts.fc1), (mlp.fc2, moe.experts.fc2)):
        packed.weight.copy_(dense.weight)  # broadcasts over the experts
        if packed.bias is not None:
            packed.bias.copy_(cast(torch.Tensor, dense.bias))


@torch.no_grad()
def _share_out(mlp: Mlp, moe: MoEMlp, parts: int) -> None:
    """Let every `parts` experts in a row hold the dense MLP together: virtual groups, arXiv:2410.07524.

    The hidden units of an MLP are a sum, so that any division of them can be added up again. Each group draws its own
    (the paper's groups are copies of one another). The experts of a group get one router row, so that they come into a
    token's choice together; a gate of 1/parts is made up for by fc2, whose bias stays, as gates sum to 1.
    """
    if moe.router.rows is None:
        raise UserError(
            f"The router {moe.router_name!r} has no learned row for each expert, so it can't send a token to all parts "
            "of an MLP: leave expert_hidden out, or choose another router."
        )
    fc1, fc2 = moe.experts.fc1, moe.experts.fc2
    for group in range(moe.router.num_experts // parts):
        units = torch.randperm(len(cast(nn.Linear, mlp.fc1).weight)).chunk(parts)
        for expert, own in enumerate(units, start=group * parts):
            fc1.weight[expert] = mlp.fc1.weight[own]  # [H, D]
            fc2.weight[expert] = parts * mlp.fc2.weight[:, own]  # [D, H]
            if fc1.bias is not None:
                fc1.bias[expert] = cast(torch.Tensor, mlp.fc1.bias)[own]
    if fc2.bias is not None:
        fc2.bias.copy_(cast(torch.Tensor, mlp.fc2.bias))
    rows = moe.router.rows
    # Where noise is learned rows start at zero, and every group would tie with every other.
    if not rows.is_meta and not rows.any():
        nn.init.normal_(rows, std=rows.shape[1] ** -0.5)
    rows.copy_(rows[::parts].repeat_interleave(parts, 0))


@torch.no_grad()
def scale_by_depth(vit: nn.Module, mlp: Any, index: int) -> None:
    """Timm's `fix_init` of the outputs of an MLP or MoE layer made after it ran; BEiT and EVA always have it."""
    if getattr(vit, "fix_init", hasattr(vit, "fix_init_weight")):
        for each in (mlp, getattr(mlp, "shared", None)):
            if each is not None:
                each.fc2.weight.div_(math.sqrt(2.0 * (index + 1)))


# ---- which routes the classifier reads


def reads_class_token_only(vit: nn.Module) -> bool:
    """Whether the classifier of a timm ViT reads class and distillation tokens, and no patch."""
    return getattr(vit, "global_pool", None) == "token"


def pool_patches(vit: nn.Module) -> nn.Module:
    """Let the classifier of a timm ViT read the mean of all patches instead of the class token, in place.

    The final norm stays in front of the pooling, where its trained weights belong. The classifier starts anew. A model
    that doesn't read the class token stays as it is.
    """
    if not reads_class_token_only(vit):
        return vit
    state = cast(Any, vit)
    try:
        state.reset_classifier(state.num_classes, global_pool="avg")
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(
            f"{type(vit).__name__} can't pool over patches ({error}): leave --model.arch.global_pool out."
        ) from error
    state._model_args = {
        **getattr(vit, "_model_args", {}),
        "global_pool": "avg",
    }  # what rebuilds the model
    if hasattr(vit, "fc_norm"):  # timm itself would move the norm behind the pooling
        state._model_args["use_fc_norm" if isinstance(vit, Eva) else "fc_norm"] = False
    return vit


def read_layer_indices(vit: nn.Module, layers: str | Sequence[int]) -> list[int]:
    """Indices of the MoE blocks of `moe_layer_indices`, of which every patch's route reaches the classifier.

    A named placement leaves out the last block where only the class token is read; `last2` is then the last two odd
    blocks before it. A list is taken as it is.
    """
    depth = len(cast(Any, vit).blocks)
    if isinstance(layers, str) and reads_class_token_only(vit):
        return moe_layer_indices(layers, depth - 1)
    return moe_layer_indices(layers, depth)


def routes_read(model: nn.Module) -> list[bool]:
    """For each MoE layer, whether what it computes for patches reaches the classifier.

    Measured, not looked up: zeros are added to the output of every MoE layer in one pass over one image of noise, and
    the features that the classifier reads have a gradient with respect to those at some patch, or at none.

    Args:
        model: any converted model. Call it before the model is shared between threads.
    """
    layers = moe_layers(model)
    if not layers:
        return []
    zeros: list[Tensor] = []

    def add_zeros(_layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        zeros.append(torch.zeros_like(output, requires_grad=True))
        return output + zeros[-1]

    with evaluating(model), torch.enable_grad(), ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(add_zeros))
        parameter, state = next(model.parameters()), cast(Any, model)
        height, width = getattr(getattr(model, "patch_embed", None), "img_size", None) or (224, 224)
        noise = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(
            parameter
        )
        if hasattr(
            model, "forward_features"
        ):  # what a classifier reads: a new one may be zero, and hide everything
            features = state.forward_head(
                state.forward_features(noise), pre_logits=True
            ).float()  # [1, D]
        else:
            features = state(noise).float()
        # Against random directions: a plain sum is constant behind a LayerNorm.
        weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(1)).to(
            features.device
        )
        gradients = torch.autograd.grad((features * weights).sum(), zeros, allow_unused=True)
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    read = []
    for layer, gradient in zip(layers, gradients, strict=True):
        # Where an image decides once for all its tokens, the class token's part carries that route too.
        start = 0 if routed_unit(layer.router) == "image" else prefix
        read.append(gradient is not None and bool(gradient[:, start:].any()))
    return read


def layers_that_miss_classifier(model: nn.Module) -> list[int]:
    """Block numbers of the MoE layers whose routes of patches no classifier reads."""
    read = routes_read(model)
    return [
        cast(int, layer.layer_index)
        for layer, is_read in zip(moe_layers(model), read, strict=True)
        if not is_read
    ]


def block_to_pool(model: nn.Module) -> int | None:
    """Number of a last block whose patches choose experts unread, where the model could pool over patches instead.

    By the model's structure, without a pass over an image: `layers_that_miss_classifier` measures it.
    """
    last = next(reversed(moe_layers(model)), None)
    if last is None or last.router.rows is None or routed_unit(last.router) == "image":
        return None
    end = len(cast(Any, model).blocks) - 1
    could_pool = reads_class_token_only(model) and not hasattr(
        model, "dist_token"
    )  # a distilled model can't
    return end if last.layer_index == end and could_pool else None


# ---- the dense twin


def dense_twin(model: nn.Module, match: Match = "active_flops") -> nn.Module:
    """A dense copy of a MoE model: every MoE layer becomes a freshly initialised `Mlp`, the rest is copied.

    Args:
        model: a converted model.
        match: `active_flops` gives the Mlp K·H hidden units, what one token computes (is sparse better at the same
            cost?); `total_params` gives it E·H, what is stored (what does sparsity save?). Shared experts add theirs.
            Soft MoE computes K·H with its default slots only, and mixes them besides: `measure_cost` of both tells.

    Returns:
        A new model, which saves under the same registered name with `twin=match`.

    Raises:
        UserError: if the model is not a converted one, or `match` is unknown.
    """
    if not moe_layers(model) or not hasattr(model, "moe_config"):
        raise UserError(
            f"{type(model).__name__} is not a MoE model: convert it first, or create a vit_moe model."
        )
    twin = copy.deepcopy(model)
    make_dense(twin, match)
    cast(Any, twin)._model_args = {**getattr(model, "_model_args", {}), "twin": match}
    return twin


def make_dense(model: nn.Module, match: Match) -> None:
    """Replace the MoE layers of `model` by dense MLPs, in place; `match` and errors are those of `dense_twin`."""
    layers = moe_layers(model)
    if match not in get_args(Match):
        raise UserError(f"There is no twin {match!r}: choose {' or '.join(get_args(Match))}.")
    state = cast(Any, model)
    for number, hook in list(state.patch_embed._forward_pre_hooks.items()):
        if any(getattr(hook, "__self__", None) is layer.router for layer in layers):
            del state.patch_embed._forward_pre_hooks[number]  # no router reads the image any more
    for index, block in enumerate(state.blocks):
        if isinstance(block.mlp, MoEMlp):
            moe = block.mlp
            units = moe.router.top_k if match == "active_flops" else moe.router.num_experts
            # With an `expert_drop` the MLP's own dropout is known by the one behind the experts.
            drop = (moe.drop if "expert_drop" in state.moe_config else moe.experts.drop).p
            block.mlp = _mlp_like(
                moe, (units + moe.num_shared_experts) * moe.experts.fc1.out_features, drop
            )
            scale_by_depth(model, block.mlp, index)
    state.moe_config = {**state.moe_config, "twin": match}


def _mlp_like(moe: MoEMlp, hidden_features: int, drop: float) -> Mlp:
    fc1, fc2 = moe.experts.fc1, moe.experts.fc2
    mlp = Mlp(
        fc1.in_features,
        hidden_features,
        fc2.out_features,
        act_layer=cast(Any, lambda: copy.deepcopy(moe.experts.act)),
        bias=(fc1.bias is not None, fc2.bias is not None),
        drop=(drop, moe.drop.p),
        device=fc1.weight.device,
        dtype=fc1.weight.dtype,
    )
    for linear in (mlp.fc1, mlp.fc2):  # timm's ViT initialisation, which experts use too
        nn.init.trunc_normal_(linear.weight, std=0.02)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    return mlp.train(moe.training)
