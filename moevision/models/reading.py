"""Which tokens of a ViT its classifier reads, and so which routes can change an answer.

A class-token head reads one token. What the last block computes for the patches then reaches no logit: their routes
there get no gradient from the classes and change no answer, however they look. Two ways out: pool over the patches, or
leave the last block dense.

Axes: B images, N tokens (prefix tokens such as the class token first, then patches), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from moevision.errors import UserError
from moevision.layers import moe_layers
from moevision.layers.routing import evaluating, routed_unit
from moevision.models.convert import moe_layer_indices


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
    # What rebuilds the model; timm itself would move the norm behind the pooling.
    state._model_args = {**getattr(vit, "_model_args", {}), "global_pool": "avg", "fc_norm": False}
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

    hooks = [layer.register_forward_hook(add_zeros) for layer in layers]
    try:
        with evaluating(model), torch.enable_grad():
            features = _features(model, _noise(model)).float()  # [1, D]
            # Against random directions: a plain sum is constant behind a LayerNorm.
            weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(1)).to(features.device)
            gradients = torch.autograd.grad((features * weights).sum(), zeros, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    read = []
    for layer, gradient in zip(layers, gradients, strict=True):
        # Where an image decides once for all its tokens, the class token's part carries that route too.
        start = 0 if routed_unit(layer.router) == "image" else prefix
        read.append(gradient is not None and bool(gradient[:, start:].any()))
    return read


def unread_layers(model: nn.Module) -> list[int]:
    """Block numbers of the MoE layers whose routes of patches no classifier reads."""
    read = routes_read(model)
    return [cast(int, layer.layer_index) for layer, is_read in zip(moe_layers(model), read, strict=True) if not is_read]


def block_to_pool(model: nn.Module) -> int | None:
    """Number of a last block whose patches choose experts unread, where the model could pool over patches instead.

    By the model's structure, without a pass over an image: `unread_layers` measures it.
    """
    last = next(reversed(moe_layers(model)), None)
    if last is None or last.router.rows is None or routed_unit(last.router) == "image":
        return None
    end = len(cast(Any, model).blocks) - 1
    could_pool = reads_class_token_only(model) and not hasattr(model, "dist_token")  # a distilled model can't
    return end if last.layer_index == end and could_pool else None


def _noise(model: nn.Module) -> Tensor:
    parameter = next(model.parameters())
    height, width = getattr(getattr(model, "patch_embed", None), "img_size", None) or (224, 224)
    image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    return image.to(parameter.device, parameter.dtype)


def _features(model: nn.Module, image: Tensor) -> Tensor:
    """What the classifier reads, [1, D]; a new classifier may be zero, and would hide everything."""
    state = cast(Any, model)
    if not hasattr(state, "forward_features"):
        return cast(Tensor, state(image))
    return cast(Tensor, state.forward_head(state.forward_features(image), pre_logits=True))
