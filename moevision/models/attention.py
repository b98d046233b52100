"""Which of timm's two implementations of attention a model uses: torch's fused one, or products one after the other.

The fused one is the faster at inference everywhere, and in training on a GPU. On a CPU its backward pass falls behind
in bfloat16 as long as there are few tokens: forward and backward of 64 images of 65 tokens took 3.4 times as long as
the plain products, of 32 images of 197 tokens 1.6 times; in float32 both are alike (docs/performance.md).

Axis: N tokens of an image.
"""

from __future__ import annotations

import torch
from torch import nn

SHORT = 300
"""N up to which plain products were the faster in bfloat16 with and without a matrix unit; at 577 that turns."""


def trains_unfused(device: torch.device | str, dtype: torch.dtype, tokens: int) -> bool:
    """Whether attention is trained faster without the fused kernel.

    Args:
        device: where the model is.
        dtype: dtype of queries, keys and values.
        tokens: N.
    """
    return torch.device(device).type == "cpu" and dtype == torch.bfloat16 and tokens <= SHORT


def set_fused_attention(model: nn.Module, fused: bool) -> None:
    """Choose for every attention of `model` that has timm's switch; both compute the same up to rounding.

    Args:
        model: any timm model.
        fused: whether `scaled_dot_product_attention` is used, where the model used it before the first call: timm
            leaves it off where it is untested (Swin), and where the environment says `TIMM_FUSED_ATTN=0`.
    """
    for module in model.modules():
        before = getattr(module, "fused_attn", None)
        if isinstance(before, bool):
            allowed: bool = vars(module).setdefault("_fused_attn_allowed", before)
            setattr(module, "fused_attn", fused and allowed)  # noqa: B010 (torch says that attributes are tensors)


def num_patches(model: nn.Module) -> int | None:
    """Patches of an image, before any are dropped; None for a model without a patch embedding."""
    count = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    return count if isinstance(count, int) else None
