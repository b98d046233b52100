"""What gradients the sorted rows of the routed backends have: one, taken by `backward`. More of them need "dense"."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from moevision.errors import UserError


def refuse_transforms() -> None:
    """Raise a UserError inside of `torch.func.grad`, `vmap` and their like, which can't see through sorted rows."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise UserError(
            'torch.func and vmap need an MoE layer without data-dependent shapes: build it with backend="dense".'
        )


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the `backward` of an autograd.Function: `once_differentiable` with an error that says what to do.

    It is raised, too, where the second gradient would come from a saved tensor only, for which torch's gives 0.
    """

    @wraps(backward)
    def once(ctx: Any, *gradients: Tensor) -> Any:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return found
        used = (*gradients, *(x for x in ctx.saved_tensors if x is not None))
        found = found if isinstance(found, tuple) else (found,)
        return tuple(None if x is None else _Refuse.apply(x, *used) for x in found)  # type: ignore[no-untyped-call]

    return once


class _Refuse(torch.autograd.Function):
    """A gradient that can be used, but not differentiated again."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, *used: Tensor) -> Tensor:
        return found.view_as(found)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise UserError(
            'Gradients of gradients need an MoE layer without custom backward passes: build it with backend="dense".'
        )
