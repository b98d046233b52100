"""What turns an image into tokens in a model that learns from scratch: convolutions in the place of cut-out patches.

Both keep the patch grid, so that a token still is one square of the image. Axes: B images, D width, G patches a side.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import ConvNormAct, HybridEmbed
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

from moevision.errors import UserError


def conv_stem(embed_dim: int, patch_size: int) -> Callable[..., HybridEmbed]:
    """A constructor for timm's `embed_layer`: stride-2 convolutions with the patch grid of plain patches.

    3x3 convolutions halve the image until one place is one patch, doubling the channels up to D, and a 1x1
    convolution follows, with BatchNorm and GELU between them (the paper has ReLU). In eval mode BatchNorm uses its
    running statistics, so a prediction does not depend on batch-mates; in training it does. That was measured to be
    worth it: on SyntheticPets two epochs gave 97.5 % with BatchNorm, 93.0 % with one GroupNorm over all channels and
    87.4 % with LayerNorm over channels (one seed, 1 000 test images, `configs/quickstart.yaml`).

    Args:
        embed_dim: D.
        patch_size: side of a patch in pixels, a power of two.

    Raises:
        UserError: if patch_size is not a power of two of at least 2.
    """
    steps = _halvings("conv", patch_size)
    channels = (*(max(16, embed_dim // 2 ** (steps - 1 - step)) for step in range(steps)), embed_dim)

    def backbone(in_chans: int, **factory: Any) -> nn.Module:
        kernels, strides = (*[3] * steps, 1), (*[2] * steps, 1)
        return ConvStem(
            in_chans, steps + 1, channels, kernel_size=kernels, stride=strides, act_layer=nn.GELU, **factory
        )

    return partial(_embed, backbone)


def stage_stem(embed_dim: int, patch_size: int) -> Callable[..., HybridEmbed]:
    """A constructor for timm's `embed_layer`: the first stages of a small ResNet, as fast CIFAR-10 recipes use them.

    Widths D/4, D/2, D, max pooling between them, and two residual 3x3 convolutions in all but the first and, with
    fewer than three poolings, the last (after ResNet-9 and airbench, arXiv:2404.00498). At patch_size 16 and more the
    first convolution strides over what three poolings leave. BatchNorm as in `conv_stem`.

    Args:
        embed_dim: D, divisible by 4.
        patch_size: side of a patch in pixels, a power of two of at least 4.

    Raises:
        UserError: if D or patch_size doesn't fit.
    """
    return _stages("stages", embed_dim, patch_size, (4, 2, 1), pool_first=False)


def wide_stage_stem(embed_dim: int, patch_size: int) -> Callable[..., HybridEmbed]:
    """`stage_stem` for accuracy before speed: widths D/2, D, D, the last two with residual convolutions after pooling.

    Args:
        embed_dim: D, divisible by 4.
        patch_size: side of a patch in pixels, a power of two of at least 4.

    Raises:
        UserError: if D or patch_size doesn't fit.
    """
    return _stages("wide_stages", embed_dim, patch_size, (2, 1, 1), pool_first=True)


def _stages(
    stem: str, embed_dim: int, patch_size: int, parts: tuple[int, ...], *, pool_first: bool
) -> Callable[..., HybridEmbed]:
    """Stages of widths D / parts; with `pool_first` residual convolutions follow the pooling, in the last stage too."""
    pools = min(3, _halvings(stem, patch_size))
    if pools < 2 or embed_dim % 4:
        raise UserError(
            f"stem={stem!r} needs patches of at least 4 px and a width divisible by 4: "
            f"they are {patch_size} and {embed_dim}."
        )
    widths, stride = [embed_dim // part for part in parts], patch_size // 2**pools

    def backbone(in_chans: int, **factory: Any) -> nn.Module:
        stages = []
        for stage, (before, width) in enumerate(zip((in_chans, *widths), widths, strict=False)):
            layers = [_conv(before, width, stride if stage == 0 else 1, **factory)]
            if stage == 1 or (stage == 2 and (pool_first or pools == 3)):
                layers.append(Residual(width, **factory))
            if stage < pools:
                layers.insert(1 if pool_first else len(layers), nn.MaxPool2d(2))
            stages.append(nn.Sequential(*layers))
        return Stages(*stages)

    return partial(_embed, backbone)


class Stages(nn.Sequential):
    """Stages in a row, computed channels last, as the convolutions of a CPU like it."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D, G, G]."""
        out: Tensor = super().forward(x.contiguous(memory_format=torch.channels_last))  # type: ignore[no-untyped-call]
        return out


class Residual(nn.Module):
    """x + two 3x3 convolutions of x, each with BatchNorm and GELU.

    Args:
        width: channels.
        **factory: `device` and `dtype`.
    """

    def __init__(self, width: int, **factory: Any) -> None:
        super().__init__()
        self.conv1 = _conv(width, width, **factory)
        self.conv2 = _conv(width, width, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, H, W] of the same shape."""
        out: Tensor = x + self.conv2(self.conv1(x))
        return out


STEMS: dict[str, Callable[[int, int], Callable[..., HybridEmbed]]] = {
    "conv": conv_stem,
    "stages": stage_stem,
    "wide_stages": wide_stage_stem,
}
"""Stems by name, beside timm's `patch`."""


def _conv(before: int, width: int, stride: int = 1, **factory: Any) -> nn.Module:
    layer: nn.Module = ConvNormAct(before, width, 3, stride=stride, act_layer=nn.GELU, **factory)
    return layer


def _halvings(stem: str, patch_size: int) -> int:
    steps = patch_size.bit_length() - 1
    if steps < 1 or 2**steps != patch_size:
        raise UserError(f"stem={stem!r} halves the image step by step: patch_size={patch_size} is no power of two.")
    return steps


def _embed(
    make_backbone: Callable[..., nn.Module],
    *,
    in_chans: int,
    patch_size: int,
    embed_dim: int,
    bias: bool,
    **kwargs: Any,
) -> HybridEmbed:
    # patch_size and bias are how timm calls an embed_layer: the backbone knows the first, and its convolutions decide
    # on theirs.
    factory = {key: kwargs[key] for key in ("device", "dtype") if key in kwargs}
    backbone = make_backbone(in_chans, **factory)
    return HybridEmbed(backbone, patch_size=1, in_chans=in_chans, embed_dim=embed_dim, proj=False, **kwargs)
