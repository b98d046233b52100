"""Vision transformers with Mixture-of-Experts MLPs, under names that timm can create, save and load.

Sources: V-MoE (Riquelme et al. 2021, arXiv:2106.05974) for sparse MLPs in a ViT and where to put them;
timm's VisionTransformer for everything else, behind one of the stems below. Names exist after
`import moevision.models`.

Axes: B images, C classes, D width, N tokens of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, cast

import timm
import torch
from timm.layers import ConvNormAct, HybridEmbed, use_fused_attn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moevision.config import RouterOptions
from moevision.errors import UserError
from moevision.layers import Routing, forward_routing
from moevision.models.convert import Match, convert_to_moe, make_dense
from moevision.types import Keywords, TimmModel

MOE_ARGUMENTS = (
    "num_experts",
    "top_k",
    "router",
    "expert_hidden",
    "backend",
    "num_shared_experts",
    "expert_drop",
    *(field.name for field in fields(RouterOptions)),
)

# The fields of timm's `pretrained_cfg` that say where its weights are, all empty: the weights of a saved model are read
# from its own folder, whatever its config.json says here.
NO_SOURCE: Keywords = {
    **dict.fromkeys(("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")),
    "custom_load": False,
}


# ---- stems: convolutions that turn an image into tokens, instead of timm's patch embedding, to train from scratch
#
# All keep the patch grid: G x G tokens, each for one square of the image.


def conv_stem(embed_dim: int, patch_size: int) -> Callable[..., HybridEmbed]:
    """A constructor for timm's `embed_layer`, for width D and a patch size in pixels that is a power of two.

    3x3 convolutions of stride 2 halve the image down to the G x G grid and double the channels up to D; a 1x1
    convolution follows. Between them are BatchNorm and GELU (the paper has ReLU). In eval mode BatchNorm uses its
    running statistics, so that a prediction does not depend on the other images of its batch; in training the outputs
    do. BatchNorm was the most accurate: on SyntheticPets two epochs gave 97.5 % with BatchNorm, 93.0 % with one
    GroupNorm over all channels and 87.4 % with LayerNorm over channels (one seed, 1 000 test images,
    `configs/quickstart.yaml`).
    """
    steps = _halvings("conv", patch_size)
    channels = [max(16, embed_dim // 2**step) for step in reversed(range(steps))]  # ..., D / 2, D

    def backbone(in_chans: int, **factory: Any) -> nn.Module:
        return ConvStem(
            in_chans,
            depth=steps + 1,
            channels=(*channels, embed_dim),
            kernel_size=(*[3] * steps, 1),
            stride=(*[2] * steps, 1),
            act_layer=nn.GELU,
            **factory,
        )

    return partial(_embed, backbone)


def conv_patch_stem(embed_dim: int, patch_size: int) -> Callable[..., HybridEmbed]:
    """A constructor for timm's `embed_layer`: the first two convolutions of `conv_stem`, then timm's patch embedding.

    The convolutions, of D/4 and D/2 channels, halve the image twice; a patch of what they made is a quarter as large. A
    token sees edges and corners wherever they lie in its patch, and what the patch shows is left to the blocks.
    """
    if patch_size % 4 or embed_dim % 4:
        raise UserError(
            f"stem='conv_patch' needs a patch size and a width divisible by 4: "
            f"they are {patch_size} and {embed_dim}."
        )

    def backbone(in_chans: int, **factory: Any) -> nn.Module:
        return nn.Sequential(
            _conv(in_chans, embed_dim // 4, stride=2, **factory),
            _conv(embed_dim // 4, embed_dim // 2, stride=2, **factory),
        )

    return partial(_embed, backbone, projected_patch=patch_size // 4)


def stage_stem(embed_dim: int, patch_size: int) -> Callable[..., HybridEmbed]:
    """A constructor for timm's `embed_layer`: the first stages of a small ResNet, as fast CIFAR-10 recipes use them.

    Three stages of the widths D/4, D/2 and D, each with a 3x3 convolution, and then max pooling by 2: in all three
    stages, or in the first two at patch_size 4. A residual pair of 3x3 convolutions is in the second stage and, if it
    pools, in the third (after ResNet-9 and airbench, arXiv:2404.00498). From patch_size 16 on the stride of the first
    convolution does the rest of the reduction. BatchNorm as in `conv_stem`.
    """
    return _stages("stages", embed_dim, patch_size, (4, 2, 1), pool_first=False)


def wide_stage_stem(embed_dim: int, patch_size: int) -> Callable[..., HybridEmbed]:
    """`stage_stem`, slower and more accurate: widths D/2, D, D; the last two stages are residual, after the pooling."""
    return _stages("wide_stages", embed_dim, patch_size, (2, 1, 1), pool_first=True)


def _stages(
    stem: str, embed_dim: int, patch_size: int, divisors: tuple[int, ...], *, pool_first: bool
) -> Callable[..., HybridEmbed]:
    """Three stages of width D / divisor.

    With `pool_first` the pooling is before a stage's residual convolutions, and the last stage always has these.
    """
    pools = min(3, _halvings(stem, patch_size))
    if pools < 2 or embed_dim % 4:
        raise UserError(
            f"stem={stem!r} needs patches of at least 4 px and a width divisible by 4: "
            f"they are {patch_size} and {embed_dim}."
        )
    widths = [embed_dim // divisor for divisor in divisors]
    first_stride = patch_size // 2**pools

    def backbone(in_chans: int, **factory: Any) -> nn.Module:
        stages = []
        channels = in_chans
        for stage, width in enumerate(widths):
            layers = [_conv(channels, width, first_stride if stage == 0 else 1, **factory)]
            pooling = [nn.MaxPool2d(2)] if stage < pools else []
            if pool_first:
                layers += pooling
            if stage == 1 or (stage == 2 and (pool_first or pools == 3)):
                layers.append(Residual(width, **factory))
            if not pool_first:
                layers += pooling
            stages.append(nn.Sequential(*layers))
            channels = width
        return Stages(*stages)

    return partial(_embed, backbone)


class Stages(nn.Sequential):
    """A sequence of stages in channels-last memory format, in which convolutions are faster on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D, G, G]."""
        out: Tensor = super().forward(x.contiguous(memory_format=torch.channels_last))  # type: ignore[no-untyped-call]
        return out


class Residual(nn.Module):
    """x + two 3x3 convolutions of x, each with BatchNorm and GELU."""

    def __init__(self, width: int, **factory: Any) -> None:
        super().__init__()
        self.conv1 = _conv(width, width, **factory)
        self.conv2 = _conv(width, width, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, H, W] -> [B, width, H, W]."""
        result: Tensor = x + self.conv2(self.conv1(x))
        return result


STEMS: dict[str, Callable[[int, int], Callable[..., HybridEmbed]]] = {
    "conv": conv_stem,
    "conv_patch": conv_patch_stem,
    "stages": stage_stem,
    "wide_stages": wide_stage_stem,
}
"""Stems by name, beside timm's `patch`."""


def _conv(in_chans: int, width: int, stride: int = 1, **factory: Any) -> nn.Module:
    return ConvNormAct(in_chans, width, 3, stride=stride, act_layer=nn.GELU, **factory)


def _halvings(stem: str, patch_size: int) -> int:
    """How often the image is halved to get one token per patch."""
    steps = patch_size.bit_length() - 1
    if steps < 1 or 2**steps != patch_size:
        raise UserError(
            f"stem={stem!r} halves the image step by step: patch_size={patch_size} is no power of two."
        )
    return steps


def _embed(
    make_backbone: Callable[..., nn.Module],
    *,
    projected_patch: int | None = None,
    in_chans: int,
    patch_size: int,
    embed_dim: int,
    bias: bool,
    **options: Any,
) -> HybridEmbed:
    # timm passes patch_size and bias to every embed_layer. They aren't needed here: the backbone has reduced the image,
    # to one token per patch, or so far that squares of `projected_patch` of its outputs are projected to one.
    factory = {name: options[name] for name in ("device", "dtype") if name in options}
    return HybridEmbed(
        make_backbone(in_chans, **factory),
        patch_size=projected_patch or 1,
        in_chans=in_chans,
        embed_dim=embed_dim,
        proj=projected_patch is not None,
        **options,
    )


# ---- the model


class VisionTransformerMoE(VisionTransformer):
    """timm's VisionTransformer with MoE layers in some blocks.

    The arguments are those of timm's VisionTransformer, those of `convert_to_moe` (without `copy_weights`; `layers` is
    called `moe_layers`, and an empty list gives timm's ViT), and two more:

    - `stem`: `patch` (timm's patch embedding), `conv` (arXiv:2106.14881), `conv_patch` (its first half, then patches),
      `stages` or `wide_stages` (for hybrids that learn small images from scratch).
    - `twin`: build the dense model that matches this one in `active_flops` or `total_params` instead.

    Raises:
        UserError: if patches don't tile the image, or if top_k, num_experts, router, placement or stem are invalid.
    """

    def __init__(
        self,
        *,
        moe_layers: str | Sequence[int] = "every2",
        stem: str = "patch",
        twin: Match | None = None,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        **kwargs: Any,
    ) -> None:
        check_patches(img_size, patch_size)
        if stem in STEMS:
            kwargs["embed_layer"] = STEMS[stem](embed_dim, patch_size)
        elif stem != "patch":
            names = ", ".join(map(repr, ("patch", *STEMS)))
            raise UserError(f"There is no stem {stem!r}: choose {names}.")
        moe_arguments = _pop_moe_arguments(kwargs)
        super().__init__(img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, **kwargs)
        convert_to_moe(self, moe_layers, **moe_arguments)
        if twin is not None:
            make_dense(self, twin)

    def forward_routing(self, x: Tensor) -> tuple[Tensor, list[Routing]]:
        """Logits [B, C] and one `Routing` per MoE layer for images x [B, 3, H, W]; see `moevision.forward_routing`."""
        return forward_routing(self, x)


def _pop_moe_arguments(arguments: Keywords) -> Keywords:
    return {name: arguments.pop(name) for name in MOE_ARGUMENTS if name in arguments}


def check_patches(
    img_size: int | tuple[int, int], patch_size: int, otherwise: str = ", or another patch_size"
) -> None:
    """Raise a UserError unless whole patches tile the image (timm would silently cut off the rest).

    `otherwise` ends the message: the other remedy.
    """
    sides = img_size if isinstance(img_size, tuple | list) else (img_size, img_size)
    if any(side % patch_size for side in sides):
        nearest = max(patch_size, round(sides[0] / patch_size) * patch_size)
        raise UserError(
            f"Patches of {patch_size} px do not tile an image of {sides[0]} x {sides[1]} px: "
            f"use an image size that is a multiple of {patch_size}, such as {nearest}{otherwise}."
        )


def _build(
    model_class: Callable[..., Any], variant: str, pretrained: bool, arguments: Keywords
) -> Any:
    feature_cfg = {"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"}
    return build_model_with_cfg(
        model_class,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        **arguments,
    )


_HYBRID_SIZE = {
    "embed_dim": 128,
    "num_heads": 4,
    "class_token": False,
    "global_pool": "avg",
    "moe_layers": "all",
    # LayerScale (arXiv:2103.17239): at first the blocks change the stem's features only a little.
    "init_values": 0.1,
}
_CONV_STEM = {"class_token": False, "global_pool": "avg", "stem": "conv"}
# Name -> image size, and arguments of VisionTransformerMoE; parameters and FLOPs are in docs/reference/models.md.
_MODELS: dict[str, tuple[int, Keywords]] = {
    # For tests: 4 experts of which 2 are active.
    "test_vit_moe": (
        32, {**_CONV_STEM, "num_experts": 4, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    ),
    "vit_moe_micro_patch4_32": (32, {**_CONV_STEM, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3}),
    # From scratch: convolutional stages, then MoE blocks of width 128 on 64 tokens; patches of 8 px give 16 tokens,
    # which is faster.
    "vit_moe_hybrid_patch4_32": (32, {**_HYBRID_SIZE, "stem": "stages", "patch_size": 4, "depth": 4}),
    "vit_moe_hybrid_patch8_32": (32, {**_HYBRID_SIZE, "stem": "stages", "patch_size": 8, "depth": 2}),
    "vit_moe_hybrid_patch16_128": (128, {**_HYBRID_SIZE, "stem": "stages", "patch_size": 16, "depth": 4}),
    # The most accurate at 32 px. Without LayerScale: after nine epochs it made no difference (benchmarks/accuracy).
    "vit_moe_hybrid_wide_patch4_32": (
        32, {**_HYBRID_SIZE, "stem": "wide_stages", "patch_size": 4, "depth": 2, "init_values": None}
    ),
    # ViT-Ti, -S and -B with experts in every other block.
    "vit_moe_tiny_patch16_224": (224, {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}),
    "vit_moe_small_patch16_224": (224, {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}),
    "vit_moe_base_patch16_224": (224, {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}),
}  # fmt: skip
# Stem -> name of the module that is the model's first convolution.
_FIRST_CONV = {"conv": "patch_embed.backbone.0.conv", "stages": "patch_embed.backbone.0.0.conv"}
_FIRST_CONV["wide_stages"] = _FIRST_CONV["stages"]


def _cfg(size: int, stem: str = "patch") -> Keywords:
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": _FIRST_CONV.get(stem, "patch_embed.proj"),
        "classifier": "head",
    }


_CFGS = {
    f"{name}.untrained": _cfg(size, arguments.get("stem", "patch"))
    for name, (size, arguments) in _MODELS.items()
}
default_cfgs = generate_default_cfgs({**_CFGS, "vit_moe.untrained": _cfg(224)})


def _register(name: str) -> None:
    """Define the function that creates a model of `_MODELS`, under the model's name, and register it in timm."""
    size, arguments = _MODELS[name]
    if size != 224:
        arguments = {"img_size": size, **arguments}

    def create(pretrained: bool = False, **kwargs: Any) -> VisionTransformerMoE:
        result: VisionTransformerMoE = _build(
            VisionTransformerMoE, name, pretrained, arguments | kwargs
        )
        return result

    create.__name__ = name
    create.__qualname__ = name
    create.__module__ = __name__
    globals()[name] = register_model(create)


for _name in _MODELS:
    _register(_name)


@register_model
def vit_moe(
    pretrained: bool = False, base: str = "vit_tiny_patch16_224", **kwargs: Any
) -> nn.Module:
    """Any timm ViT with plain MLPs, converted: `create_model("vit_moe", base="deit_tiny_patch16_224", top_k=1)`.

    The arguments are those of `base`, and those of `VisionTransformerMoE` for experts, `moe_layers` and `twin`.
    """
    if kwargs.get("pretrained_cfg") is None:
        base_cfg = timm.get_pretrained_cfg(base)
        if base_cfg is None:
            raise UserError(
                f"timm has no architecture {base!r} to convert: see `timm.list_models('*vit*')`."
            )
        no_weights = {**NO_SOURCE, "tag": None, "architecture": "vit_moe"}
        kwargs["pretrained_cfg"] = base_cfg.to_dict() | no_weights
    result: nn.Module = _build(_convert_base, "vit_moe", pretrained, {**kwargs, "base": base})
    return result


def _convert_base(base: str, twin: Match | None = None, **kwargs: Any) -> nn.Module:
    moe_arguments = _pop_moe_arguments(kwargs)
    moe_layers = kwargs.pop("moe_layers", "every2")
    vit = convert_to_moe(timm.create_model(base, **kwargs), moe_layers, **moe_arguments)
    if twin is not None:
        make_dense(vit, twin)
    return vit


# timm computes attention with torch's fused kernel, or unfused, as separate matrix products. The fused kernel is faster
# at inference on every device, and in training on a GPU. On a CPU in bfloat16 its backward pass is slower for few
# tokens: forward and backward of 64 images of 65 tokens took 3.4 times as long as unfused, of 32 images of 197 tokens
# 1.6 times; in float32 both take the same time (benchmarks/performance).
SHORT = 300
"""Most tokens N for which unfused attention is taken to train faster in bfloat16 on a CPU.

On CPUs with and without a matrix unit it was faster up to this N; at 577 tokens the fused kernel was.
"""


def trains_unfused(device: torch.device | str, dtype: torch.dtype, tokens: int) -> bool:
    """Whether attention over N tokens, on this device and in this dtype, trains faster without the fused kernel."""
    return torch.device(device).type == "cpu" and dtype == torch.bfloat16 and tokens <= SHORT


def set_fused_attention(model: nn.Module, fused: bool) -> None:
    """Turn the fused kernel on or off in every attention of `model` that has timm's `fused_attn`, up to rounding alike.

    Under `TIMM_FUSED_ATTN=0` it stays off.
    """
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            cast(Any, module).fused_attn = fused and use_fused_attn()


def num_patches(model: nn.Module) -> int | None:
    """Patches of an image, before any are dropped; None for a model without a patch embedding."""
    count = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    return count if isinstance(count, int) else None


# ---- gradient checkpointing of chosen blocks: activations are computed again in the backward pass instead of stored
#
# For all blocks timm's `set_grad_checkpointing` is used. If only some are chosen, each gets an instance attribute
# `forward`, which wraps its method, so that no name of a module or weight changes.


def checkpoint_blocks(net: TimmModel, blocks: bool | Sequence[int]) -> None:
    """Checkpoint blocks of a timm ViT: less memory, more time (arXiv:1604.06174).

    `blocks` is True for all, False for none, or a list of indices.
    """
    chosen = set[int]() if isinstance(blocks, bool) else set(blocks)
    missing = chosen - set(range(len(net.blocks)))
    if missing:
        raise UserError(
            f"--model.grad_checkpointing names block {min(missing)}, and the model has blocks 0 to "
            f"{len(net.blocks) - 1}."
        )
    net.set_grad_checkpointing(blocks is True)
    for index, block in enumerate(net.blocks):
        vars(block).pop("forward", None)  # of an earlier call
        if index in chosen:
            block.forward = partial(_checkpointed, block.forward)


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
