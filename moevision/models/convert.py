"""Conversion of a dense timm ViT to a Mixture of Experts, which of its routes the classifier reads, and its dense twin.

A class-token head reads one token. The last block's output for patches then reaches no logit: their routes there get no
gradient from the classification loss and change no answer. There are two remedies: pool over the patches, or leave the
last block dense.

Axes: B images, N tokens (prefix tokens such as the class token first, then patches), D width, H hidden width of one
expert, E experts, K choices of a token.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.eva import Eva
from torch import Tensor, nn

from moevision.errors import UserError
from moevision.layers import MoEMlp, PackedLinear, capacity_of, moe_layers, router_kind
from moevision.layers.baselines import ColourRouter, HashRouter, PositionRouter
from moevision.layers.experts import Backend
from moevision.layers.routing import evaluating, routed_unit
from moevision.types import Keywords, TimmModel

if TYPE_CHECKING:
    from moevision.stats import SetScores

Match = Literal["active_flops", "total_params"]


def moe_layer_indices(moe_layers: str | Sequence[int], depth: int) -> list[int]:
    """Indices of the MoE blocks, counting from 0.

    `every2` = 1, 3, 5, ...; `last2` = the last two of those (V-MoE's "Last-2"); `all`; or a list.
    """
    if isinstance(moe_layers, str):
        odd = list(range(1, depth, 2))
        placements = {"every2": odd, "last2": odd[-2:], "all": list(range(depth))}
        if moe_layers not in placements:
            raise UserError(
                f"There is no placement {moe_layers!r}: use {', '.join(placements)} or a list of block numbers."
            )
        return placements[moe_layers]
    outside = [index for index in moe_layers if not 0 <= index < depth]
    if outside:
        raise UserError(
            f"moe_layers={list(moe_layers)} does not fit {depth} blocks: they are 0 to {depth - 1}."
        )
    return sorted(set(moe_layers))


def convert_to_moe(
    vit: TimmModel,
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
    replaces ("sparse upcycling", arXiv:2212.05055): with gates that sum to 1 the output is unchanged.

    Args:
        vit: a timm model whose `blocks[i].mlp` is a plain `timm.layers.Mlp` (ViT, DeiT, AugReg, ...).
        layers: `every2`, `last2`, `all`, or a list of block indices counting from 0. Where the classifier reads the
            class token alone, routes of patches in the last block change no answer:
            `read_layer_indices` leaves it out.
        num_experts: E; like the next three one value for all MoE layers, or one per MoE layer.
        top_k: K; by default the router's own.
        router: a name of `moevision.layers.ROUTERS`.
        expert_hidden: hidden width H of one expert; copies have that of the dense MLP.
        backend: how the experts are computed.
        copy_weights: start every expert as a copy of the dense MLP.
        num_shared_experts: experts that every token passes besides the routed ones.
        expert_drop: dropout inside the experts; by default that of the MLP.
        **router_options: see `moevision.layers.RouterOptions`. Where layers have different routers, each gets those
            that it can use.

    Returns:
        `vit` itself. It carries a JSON-ready `moe_config`, saves under the registered name `vit_moe`, and its
        `no_weight_decay()` names the experts' biases.

    Raises:
        UserError: if the model has no such blocks or has experts already, a block's MLP is not a plain one, or an
            option doesn't fit. The model is then as it was.
    """
    check_convertible(vit)
    if copy_weights and num_shared_experts:
        raise UserError(
            "A shared expert on top of copies would double the output: leave num_shared_experts out."
        )
    indices = moe_layer_indices(layers, len(vit.blocks))
    per_layer = {
        "num_experts": num_experts,
        "top_k": top_k,
        "router": router,
        "hidden_features": expert_hidden,
    }
    shared_arguments = {
        "backend": backend,
        "num_shared_experts": num_shared_experts,
        "expert_drop": expert_drop,
    }
    # As in timm, None means that an option was not given.
    options = {name: value for name, value in router_options.items() if value is not None}

    # Build all layers before replacing any MLP, so that an error leaves the model unchanged.
    arguments = _layer_arguments(vit, indices, per_layer, options)
    moes = []
    for index, layer_arguments in zip(indices, arguments, strict=True):
        layer_arguments |= shared_arguments
        layer_arguments["hidden_features"] = _expert_hidden(
            layer_arguments, plain_mlp(vit, index).out_features, copy_weights
        )
        moes.append(_moe_like(vit, index, layer_arguments, copy_weights))
    _check_patch_drop(vit, moes)

    for moe in moes:
        vit.blocks[moe.layer_index].mlp = moe
        moe.router.num_prefix_tokens = int(vit.num_prefix_tokens)
        if moe.router.sees_image:
            # The router gets the image by a hook on patch_embed, which runs once per forward pass, outside of compiled
            # and checkpointed blocks.
            vit.patch_embed.register_forward_pre_hook(moe.router.look)
    _exclude_biases_from_decay(vit)

    # Record the arguments that build this model again.
    moe_config: Keywords = {"moe_layers": indices}
    for name, value in per_layer.items():
        moe_config[name] = one_or_list([layer[name] for layer in arguments], value)
    moe_config["expert_hidden"] = moe_config.pop("hidden_features")
    if not copy_weights and expert_hidden is None and "twin" not in getattr(vit, "_model_args", {}):
        moe_config["expert_hidden"] = None  # follows from the width of the MLP
    moe_config["backend"] = backend
    if num_shared_experts:
        moe_config["num_shared_experts"] = num_shared_experts
    if expert_drop is not None:
        moe_config["expert_drop"] = expert_drop
    moe_config |= options

    slots = [layer.get("slots_per_expert") for layer in arguments]
    if any(slots):
        moe_config["slots_per_expert"] = one_or_list(slots, None)
    _record_model_arguments(vit, moe_config)
    return cast(nn.Module, vit)


def check_convertible(vit: nn.Module) -> None:
    """Raise a UserError unless this is a dense timm ViT."""
    name = type(vit).__name__
    if moe_layers(vit):
        raise UserError(
            f"{name} has experts already: convert all layers in one call, or train it on with `moevision fit FOLDER "
            "--pretrained`."
        )
    blocks = getattr(vit, "blocks", None)
    has_parts = hasattr(vit, "num_prefix_tokens") and hasattr(vit, "patch_embed")
    if not (isinstance(blocks, nn.Sequential | nn.ModuleList) and has_parts):
        raise UserError(
            f"{name} has no transformer blocks behind a patch_embed to convert: give a timm ViT, DeiT or EVA-style "
            "model."
        )


def _check_patch_drop(vit: nn.Module, moes: Sequence[MoEMlp]) -> None:
    """Raise a UserError for patch dropping together with routers that go by the position of patches."""
    if isinstance(getattr(vit, "patch_drop", None), nn.Identity | None):
        return
    if any(isinstance(moe.router, HashRouter | PositionRouter | ColourRouter) for moe in moes):
        raise UserError(
            "Fixed rules route by the patch's place, which dropped patches change: leave patch_drop_rate at 0."
        )


def _exclude_biases_from_decay(vit: TimmModel) -> None:
    """Add the experts' biases to `no_weight_decay()`: as they have two dimensions, timm would take them for weights."""
    names: set[str] = set(getattr(vit, "no_weight_decay", set)())
    for name, module in vit.named_modules():
        if isinstance(module, PackedLinear):
            names.add(f"{name}.bias")
    # A partial of the names alone: a function that refers to the model would make a reference cycle.
    vit.no_weight_decay = partial(set, names)


def _layer_arguments(
    vit: TimmModel, indices: list[int], per_layer: Keywords, options: Keywords
) -> list[Keywords]:
    """Arguments of `MoEMlp` for each layer: its values of `per_layer`, and the options that its router can use."""
    count = len(indices)
    columns = {name: _per_layer(name, value, count) for name, value in per_layer.items()}
    slots = _per_layer("slots_per_expert", options.get("slots_per_expert"), count)
    # An option that only some routers can use is left out for the others; one that none can use is refused by them.
    useful = {name for router in columns["router"] for name in router_kind(router).options}

    tokens = vit.patch_embed.num_patches + vit.num_prefix_tokens
    layers = []
    for position in range(count):
        arguments = {name: values[position] for name, values in columns.items()}
        kind = router_kind(arguments["router"])
        if arguments["top_k"] is None:
            arguments["top_k"] = kind.top_k
        arguments |= {
            name: value
            for name, value in options.items()
            if name in kind.options or name not in useful
        }
        if "slots_per_expert" in kind.options:
            # By default as many slots as cost the same as K experts per token, whatever the image size becomes.
            default = capacity_of(1.0, tokens, arguments["top_k"], arguments["num_experts"])
            arguments["slots_per_expert"] = slots[position] or default
        layers.append(arguments)
    return layers


def _expert_hidden(arguments: Keywords, dense_hidden: int, copy_weights: bool) -> int:
    """Hidden width of one expert: as given, or else so that a token costs what it costs in the dense MLP.

    With `copy_weights` it is that of the dense MLP.
    """
    expert_hidden = arguments["hidden_features"]
    if copy_weights:
        if expert_hidden not in (None, dense_hidden):
            raise UserError(
                f"Experts that start as copies have the {dense_hidden} hidden units of their MLP: leave "
                f"expert_hidden (it is {expert_hidden}) out."
            )
        return dense_hidden
    active = arguments["top_k"] + arguments["num_shared_experts"]
    return int(expert_hidden or dense_hidden // active)


def _per_layer(name: str, value: Any, count: int) -> list[Any]:
    """One value for each of `count` layers, from one for all or a list."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise UserError(
            f"{name}={list(value)} has {len(value)} entries for {count} MoE layers: give one for each."
        )
    return list(value)


def one_or_list(values: list[Any], default: Any) -> Any:
    """One value if all are equal, or else the list; `default` without values."""
    if not values:
        return default
    return values[0] if all(value == values[0] for value in values) else values


def plain_mlp(vit: TimmModel, index: int) -> nn.Linear:
    """The layer fc1 of a block's MLP; a UserError if that isn't a plain two-layer MLP."""
    mlp: Any = getattr(vit.blocks[index], "mlp", None)
    if type(mlp) is Mlp and isinstance(mlp.fc1, nn.Linear) and isinstance(mlp.norm, nn.Identity):
        return mlp.fc1
    problem = "no MLP of its own"
    if mlp is not None:
        problem = f"a {type(mlp).__name__} that is gated, convolutional or has a norm"
    raise UserError(
        f"Block {index} of {type(vit).__name__} has {problem}: it can't be converted, since experts take the place of "
        "plain two-layer MLPs."
    )


def dense_arguments(vit: nn.Module) -> Keywords:
    """The arguments that timm recorded for a model, without those of its twin and of its experts."""
    arguments = dict(getattr(vit, "_model_args", {}))
    for name in ("twin", *getattr(vit, "moe_config", {})):
        arguments.pop(name, None)
    return arguments


def _record_model_arguments(vit: TimmModel, moe_config: Keywords) -> None:
    """Set `moe_config` and timm's attributes: the name and arguments with which timm builds the model again."""
    arguments = dense_arguments(vit)
    vit.moe_config = moe_config
    pretrained_cfg = getattr(vit, "pretrained_cfg", None)
    if pretrained_cfg is None:
        # Timm is just building the model under a registered name, and records the arguments afterwards. Only the number
        # of slots is added, so that it doesn't change with the image size.
        if "slots_per_expert" in moe_config:
            vit._model_args = {"slots_per_expert": moe_config["slots_per_expert"]}
        return
    name = str(pretrained_cfg["architecture"])
    if not name.startswith(("vit_moe", "test_vit_moe")):
        arguments["base"] = name
        vit.pretrained_cfg = {**pretrained_cfg, "architecture": "vit_moe"}
        vit.default_cfg = vit.pretrained_cfg
    elif not moe_config["moe_layers"]:  # unchanged, a twin for instance
        return
    arguments |= {name: value for name, value in moe_config.items() if value is not None}
    vit._model_args = arguments


def _moe_like(vit: TimmModel, index: int, arguments: Keywords, copy_weights: bool) -> MoEMlp:
    """A MoE layer in place of a block's MLP: same widths, activation, dropout, device, dtype and mode."""
    mlp = vit.blocks[index].mlp
    moe = MoEMlp(
        mlp.fc1.in_features,
        out_features=mlp.fc2.out_features,
        act_layer=lambda: copy.deepcopy(mlp.act),
        bias=(mlp.fc1.bias is not None, mlp.fc2.bias is not None),
        drop=(mlp.drop1.p, mlp.drop2.p),
        device=mlp.fc1.weight.device,
        dtype=mlp.fc1.weight.dtype,
        **arguments,
    )
    moe.layer_index = index
    if copy_weights:
        _copy_weights(mlp, moe)
    else:
        scale_by_depth(vit, moe, index)
    return moe.train(mlp.training)


@torch.no_grad()
def _copy_weights(mlp: Mlp, moe: MoEMlp) -> None:
    """Copy the weights and biases of an MLP into every expert."""
    for dense, packed in ((mlp.fc1, moe.experts.fc1), (mlp.fc2, moe.experts.fc2)):
        packed.weight.copy_(dense.weight)  # broadcasts over the experts
        if packed.bias is not None:
            packed.bias.copy_(cast(Tensor, dense.bias))


@torch.no_grad()
def scale_by_depth(vit: nn.Module, mlp: Any, index: int) -> None:
    """Scale the output weights of a new MLP or MoE layer by depth as timm's `fix_init` does, which ran before.

    Only where the model has that option on; BEiT and EVA always have it.
    """
    if getattr(vit, "fix_init", hasattr(vit, "fix_init_weight")):
        for module in (mlp, getattr(mlp, "shared", None)):
            if module is not None:
                module.fc2.weight.div_(math.sqrt(2.0 * (index + 1)))


# ---- which routes the classifier reads


def reads_class_token_only(vit: nn.Module) -> bool:
    """Whether the classifier of a timm ViT reads class and distillation tokens, and no patch."""
    return getattr(vit, "global_pool", None) == "token"


def pool_patches(vit: TimmModel) -> nn.Module:
    """Let the classifier of a timm ViT read the mean of all patches instead of the class token, in place.

    The final norm stays in front of the pooling, where its trained weights belong. The classifier starts anew. A model
    that doesn't read the class token stays as it is.
    """
    if not reads_class_token_only(vit):
        return cast(nn.Module, vit)
    try:
        vit.reset_classifier(vit.num_classes, global_pool="avg")
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(
            f"{type(vit).__name__} can't pool over patches ({error}): leave --model.arch.global_pool out."
        ) from error

    # Recorded for building the model again, with the norm before the pooling, where timm would put it behind.
    vit._model_args = {**getattr(vit, "_model_args", {}), "global_pool": "avg"}
    if hasattr(vit, "fc_norm"):
        argument = "use_fc_norm" if isinstance(vit, Eva) else "fc_norm"
        vit._model_args[argument] = False
    return cast(nn.Module, vit)


def read_layer_indices(vit: TimmModel, layers: str | Sequence[int]) -> list[int]:
    """As `moe_layer_indices`, but only blocks of which the routes of patches reach the classifier.

    A named placement leaves out the last block where only the class token is read; `last2` is then the last two odd
    blocks before it. A list is taken as it is.
    """
    depth = len(vit.blocks)
    if isinstance(layers, str) and reads_class_token_only(vit):
        return moe_layer_indices(layers, depth - 1)
    return moe_layer_indices(layers, depth)


def routes_read(model: nn.Module) -> list[bool]:
    """For each MoE layer, whether what it computes for patches reaches the classifier.

    It is measured by a gradient, in one pass over one image of noise: zeros are added to the output of every MoE layer.
    A layer is read if the features that the classifier reads have a gradient with respect to its zeros at any patch.

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
        features = pooled(model, _noise_image(model)).float()  # [1, D]
        # Projected on a random direction, since the plain sum of features behind a LayerNorm is constant.
        generator = torch.Generator().manual_seed(1)
        directions = torch.randn(features.shape, generator=generator).to(features.device)
        total = (features * directions).sum()
        gradients = torch.autograd.grad(total, zeros, allow_unused=True)

    read = []
    for layer, gradient in zip(layers, gradients, strict=True):
        first_patch = int(getattr(model, "num_prefix_tokens", 0))
        if routed_unit(layer.router) == "image":
            # All tokens of an image share one route, so it also counts if the class token is read.
            first_patch = 0
        read.append(gradient is not None and bool(gradient[:, first_patch:].any()))
    return read


def pooled(net: TimmModel, images: Tensor) -> Tensor:
    """The input [B, D] of the classifier of a timm model, for images [B, 3, H, W]."""
    tokens = net.forward_features(images)
    result: Tensor = net.forward_head(tokens, pre_logits=True)
    return result


def with_mirror(
    net: nn.Module, images: Tensor, logits: Tensor, *, several_labels: bool = False
) -> Tensor:
    """Logits [B, C] of the mean of two probabilities: of images, whose logits are given, and of their mirror images.

    The mean of logits is as good (benchmarks/second_opinions).
    """
    views = torch.stack([logits, net(images.flip(-1))]).float()  # [2, B, C]
    if several_labels:
        log_p, log_not_p = F.logsigmoid(views), F.logsigmoid(-views)
        return log_p.logsumexp(0) - log_not_p.logsumexp(0)
    return views.log_softmax(-1).logsumexp(0)


def set_members(logits: Tensor, sets: SetScores, coverage: float) -> Tensor:
    """[B, C]: which classes the prediction set of each image has, from logits [B, C]."""
    probabilities = (logits.float() / sets.temperature).softmax(-1)
    return probabilities >= sets.threshold(coverage)


def _noise_image(model: TimmModel) -> Tensor:
    """[1, 3, H, W] of the size and dtype that a model takes, on its device."""
    size = model.patch_embed.img_size or (224, 224)
    noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    return noise.to(next(model.parameters()))


def layers_that_miss_classifier(model: nn.Module) -> list[int]:
    """Block indices of the MoE layers whose routes of patches the classifier doesn't read."""
    layers = zip(moe_layers(model), routes_read(model), strict=True)
    return [cast(int, layer.layer_index) for layer, is_read in layers if not is_read]


def block_to_pool(model: TimmModel) -> int | None:
    """Index of the last block if its patches choose experts, the classifier doesn't read them, and pooling is possible.

    Determined from the model's structure; `layers_that_miss_classifier` measures it by a pass over an image.
    """
    last = next(reversed(moe_layers(model)), None)
    if last is None or last.router.rows is None or routed_unit(last.router) == "image":
        return None
    if hasattr(model, "dist_token") or not reads_class_token_only(model):
        return None  # a distilled model can't pool
    last_index = len(model.blocks) - 1
    return last_index if last.layer_index == last_index else None


# ---- the dense twin


def dense_twin(model: nn.Module, match: Match = "active_flops") -> nn.Module:
    """A dense copy of a MoE model: every MoE layer becomes a freshly initialised `Mlp`, the rest is copied.

    Args:
        model: a converted model.
        match: `active_flops` gives the Mlp K·H hidden units, what one token computes (is sparse better at the same
            cost?); `total_params` gives it E·H, what is stored (what does sparsity save?). Hidden units of shared
            experts are added. Soft MoE costs K·H only with its default number of slots, and mixing them costs extra:
            compare both models by `measure_cost`.

    Returns:
        A new model, which saves under the same registered name with `twin=match`.

    Raises:
        UserError: if the model is not a converted one, or `match` is unknown.
    """
    if not moe_layers(model):
        raise UserError(
            f"{type(model).__name__} is not a MoE model: convert it first, or create a vit_moe model."
        )
    twin = copy.deepcopy(model)
    make_dense(twin, match)
    cast(Any, twin)._model_args = {**getattr(model, "_model_args", {}), "twin": match}
    return twin


def make_dense(model: TimmModel, match: Match) -> None:
    """Replace the MoE layers of `model` by dense MLPs, in place; `match` and errors are those of `dense_twin`."""
    if match not in get_args(Match):
        raise UserError(f"There is no twin {match!r}: choose {' or '.join(get_args(Match))}.")
    model.patch_embed._forward_pre_hooks.clear()  # by which routers get the image

    for index, block in enumerate(model.blocks):
        moe = block.mlp
        if not isinstance(moe, MoEMlp):
            continue
        experts = moe.router.top_k if match == "active_flops" else moe.router.num_experts
        hidden = (experts + moe.num_shared_experts) * moe.experts.fc1.out_features
        block.mlp = _mlp_like(moe, hidden)
        scale_by_depth(model, block.mlp, index)
    model.moe_config = {**model.moe_config, "twin": match}


def _mlp_like(moe: MoEMlp, hidden_features: int) -> Mlp:
    """A dense MLP in place of a MoE layer, with new weights."""
    fc1, fc2 = moe.experts.fc1, moe.experts.fc2
    mlp = Mlp(
        fc1.in_features,
        hidden_features,
        fc2.out_features,
        act_layer=cast(Any, lambda: copy.deepcopy(moe.experts.act)),
        bias=(fc1.bias is not None, fc2.bias is not None),
        drop=moe.drop.p,  # that of the original MLP, whatever `expert_drop` is
        device=fc1.weight.device,
        dtype=fc1.weight.dtype,
    )
    for linear in (mlp.fc1, mlp.fc2):  # timm's ViT initialisation, which experts use too
        nn.init.trunc_normal_(linear.weight, std=0.02)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    return mlp.train(moe.training)
