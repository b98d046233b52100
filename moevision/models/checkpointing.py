"""Gradient checkpointing of chosen blocks: what a block keeps for the backward pass is computed again there.

timm checkpoints all blocks or none (`set_grad_checkpointing`), and so does this for all of them. Chosen ones get a
`forward` of their own: names of modules and weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moevision.errors import UserError


def checkpoint_blocks(net: nn.Module, blocks: bool | Sequence[int]) -> None:
    """Compute blocks again in the backward pass, for less memory and more time (arXiv:1604.06174).

    Args:
        net: a timm ViT, MoE or dense.
        blocks: all or none of its `blocks`, or indices of those.

    Raises:
        UserError: for a block that isn't there.
    """
    known: Any = cast(Any, net).blocks
    chosen = set[int]() if isinstance(blocks, bool) else {*blocks}
    if missing := sorted(chosen - {*range(len(known))}):
        raise UserError(
            f"--model.grad_checkpointing names block {missing[0]}, and the model has blocks 0 to {len(known) - 1}."
        )
    cast(Any, net).set_grad_checkpointing(blocks is True)
    for index, block in enumerate(known):
        vars(block).pop("forward", None)
        if index in chosen:
            block.forward = partial(_again, block.forward)


def checkpointed_blocks(net: nn.Module) -> tuple[int, ...]:
    """Indices of the blocks that are computed again."""
    blocks: Any = cast(Any, net).blocks
    if getattr(net, "grad_checkpointing", False):
        return tuple(range(len(blocks)))
    return tuple(index for index, block in enumerate(blocks) if "forward" in vars(block))


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
