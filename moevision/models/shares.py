"""What a logit rests on: the exact share of each patch, where the classifier is linear in the mean of the patches.

A mean is a sum, and a linear layer of a sum is the sum of its parts, so each token's part of a logit can be read off
(Zhou et al. 2016, arXiv:1512.04150, section 2). A LayerNorm before the mean belongs to the tokens. One behind it
subtracts the mean over channels, which is linear too, and divides by one number per image, by which all shares are
divided. So no gradient and no second pass is needed.

A share belongs to a token after all blocks, in which attention has mixed the patches.

Axes: B images, N tokens (prefix tokens first), P patches, D width, C classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from moevision.errors import UserError


class PatchShares(NamedTuple):
    """Parts of logits: `patches` summed over patches, plus `prefix`, plus `bias`, are the logits."""

    patches: Tensor  # [B, P, C] of each patch
    prefix: Tensor  # [B, C] of class and register tokens; 0 where the mean leaves them out
    bias: Tensor  # [C] of no token

    def margins(self) -> Tensor:
        """[B, P] shares of the likeliest class's logit minus the second's (of one class: of its logit)."""
        logits = self.patches.sum(1) + self.prefix + self.bias
        best = logits.topk(min(2, logits.shape[1])).indices[:, None]  # [B, 1, 2]
        shares = self.patches.gather(-1, best.expand(-1, self.patches.shape[1], -1))  # [B, P, 2]
        return shares[..., 0] - shares[..., 1:].sum(-1)


def shares_refusal(net: nn.Module) -> str | None:
    """Why the logits of a model have no exact shares, as a sentence; None if they have."""
    vit = cast(Any, net)
    if getattr(type(net), "forward_head", None) is not VisionTransformer.forward_head:
        head = "a classifier of its own"
    elif vit.global_pool != "avg":
        head = f"global_pool={vit.global_pool!r}"
    elif isinstance(vit.fc_norm, nn.Identity | nn.LayerNorm) and isinstance(vit.head, nn.Linear):
        return None
    else:
        head = f"{type(vit.fc_norm).__name__} and {type(vit.head).__name__} behind the mean"
    return (
        f"Patches have no exact shares in this answer, since {type(net).__name__} has {head}: train with "
        "--model.arch.global_pool avg, the mean of all patches in front of one linear layer."
    )


def patch_shares(net: nn.Module, tokens: Tensor) -> PatchShares:
    """The shares of the tokens [B, N, D] that `net.forward_features` returns, in their dtype.

    Raises:
        UserError: if the classifier isn't linear in the mean of the tokens.
    """
    reason = shares_refusal(net)
    if reason is not None:
        raise UserError(reason)
    vit = cast(Any, net)
    num_prefix_tokens = vit.num_prefix_tokens
    if not vit.pool_include_prefix:
        tokens = tokens[:, num_prefix_tokens:]
        num_prefix_tokens = 0

    norm = vit.fc_norm
    parts = tokens / tokens.shape[1]  # [B, N, D], whose sum is the mean
    if isinstance(norm, nn.LayerNorm):
        variance = parts.sum(1, keepdim=True).var(-1, correction=0, keepdim=True)  # [B, 1, 1]
        parts = (parts - parts.mean(-1, keepdim=True)) / (variance + norm.eps).sqrt()
        if norm.elementwise_affine:
            parts = parts * norm.weight

    shares = parts @ vit.head.weight.T  # [B, N, C]
    prefix = shares[:, :num_prefix_tokens].sum(1)
    bias = vit.head(norm(torch.zeros_like(tokens[0, 0])))  # a LayerNorm makes its bias of zeros
    return PatchShares(shares[:, num_prefix_tokens:], prefix, bias)
