"""AdamW, and Muon for matrices with AdamW for the rest, as one optimizer; both work on sharded weights, too.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a weight matrix by the
nearest semi-orthogonal matrix, so that every direction moves equally far. A step is scaled by 0.2 · sqrt(max(out, in))
(Liu et al. 2025, arXiv:2502.16982, §2.2): it is then about as large as one of AdamW at the same learning rate.

A matrix is one linear map [out, in]. A convolution [out, in, h, w] is the map [out, in · h · w]; experts [E, out, in]
are E maps, each made orthogonal by itself. timm's own `Muon` (1.0.31) takes a stack of experts for one map
[E, out · in], hence this class around timm's iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from timm.optim.muon import get_lr_scale, zeropower_via_newtonschulz
from torch import Tensor, nn

from moevision.layers import PackedLinear, moe_layers
from moevision.layers.experts import local
from moevision.train.parallel import by_mesh, full, shard_like

# Coefficients of five Newton-Schulz iterations, x <- a x + b (x xᵀ) x + c (x xᵀ)² x, each fitted to what the one
# before leaves (https://leloykun.github.io/ponder/muon-opt-coeffs; timm's "quintic").
_ITERATIONS = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


class AdamW(torch.optim.AdamW):
    """torch's AdamW, which also takes groups of weights on several meshes: its fused step wants one at a time.

    Groups stay as they were given for schedule and state, so that a checkpoint doesn't depend on the layout.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        self.param_groups = by_mesh(self._step_first(groups))
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def _step_first(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Update what isn't AdamW's; the groups that are."""
        return groups


class Muon(AdamW):
    """Muon for groups with `matrices: True`, AdamW for the others.

    A matrix that is sharded is gathered for its update (one at a time, every process then computes the same and keeps
    its part). Experts [E, out, in] are gathered only where they are sharded within their matrices. An expert without a
    gradient, which no token chose, only decays.

    Args:
        params: parameter groups.
        lr: learning rate of both.
        betas: decay of AdamW's moments.
        momentum: decay of Muon's momentum, with Nesterov's look ahead.
        bfloat16: multiply in bfloat16 on a CPU, too, as a training under its autocast does; a GPU always does.
        **kwargs: what `torch.optim.AdamW` takes besides.
    """

    bfloat16 = False  # also of a copy, which keeps groups and state alone

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), momentum: float = 0.95, *,
        bfloat16: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(params, lr=lr, betas=betas, **kwargs)
        self.bfloat16 = bfloat16
        for group in self.param_groups:
            group.setdefault("matrices", False)
            group.setdefault("momentum", momentum)

    def _step_first(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for group in groups:
            if group["matrices"]:
                self._step_matrices(group)
        return [group for group in groups if not group["matrices"]]

    def _step_matrices(self, group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(weight)
                state["step"] = torch.zeros(())  # torch's AdamW looks for one in every state that it loads
            state["step"] += 1
            average = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
            update = weight.grad.lerp(average, momentum)
            shape = as_matrices(update).shape
            gather = full if weight.ndim != 3 or _cut_within(weight) else local
            whole = gather(update)
            if weight.ndim == 3:
                # What little is left of an idle expert's momentum would move it as far as a gradient.
                idle = (gather(weight.grad) == 0).flatten(1).all(1)  # [E]
                whole = whole.masked_fill(idle[:, None, None], 0)
            whole = orthogonal(as_matrices(whole), self.bfloat16).view_as(whole)
            update = whole if gather is local else local(shard_like(whole, update))
            own = local(weight)
            own.mul_(1 - lr * group["weight_decay"])
            own.add_(update, alpha=-lr * get_lr_scale(shape))


def _cut_within(experts: Tensor) -> bool:
    """Whether experts [E, out, in] are sharded within their matrices, as where processes don't divide E."""
    return any(getattr(placement, "dim", 0) > 0 for placement in getattr(experts, "placements", ()))


def as_matrices(weight: Tensor) -> Tensor:
    """The linear maps of a weight: [out, in] and [E, out, in] as they are, a convolution as [out, in · h · w]."""
    return weight.flatten(1) if weight.ndim == 4 else weight


def orthogonal(matrices: Tensor, bfloat16: bool = False) -> Tensor:
    """The nearest semi-orthogonal matrix of each, up to a few percent of its singular values.

    Args:
        matrices: [out, in] or [E, out, in]. Those that are zero, such as an unused expert's gradient, stay zero.
        bfloat16: see `Muon`.
    """
    if not matrices.numel():  # a process that holds no part of these experts
        return matrices
    # bfloat16 suffices, but only GPUs are sure to multiply it fast: a CPU with AVX2 is far slower than in float32.
    fast = bfloat16 or matrices.is_cuda
    dtype = torch.bfloat16 if fast else torch.promote_types(matrices.dtype, torch.float32)
    return zeropower_via_newtonschulz(matrices, len(_ITERATIONS), _ITERATIONS, dtype=dtype).to(matrices.dtype)


def matrices_of(net: nn.Module) -> set[str]:
    """Names of the weights that Muon moves: the linear maps and convolutions between the image and the classifier.

    Left to AdamW are the classifier, the first convolution (it reads colours), routers (a row is an expert), and
    everything that is no linear map: embeddings, norms and biases.

    Args:
        net: a timm model.
    """
    model = cast(Any, net)
    classifier = model.get_classifier()
    first = [module for module in net.modules() if isinstance(module, nn.Conv2d)][:1]
    spared = [
        *(classifier if isinstance(classifier, tuple) else (classifier,)),
        *first,
        *(layer.router for layer in moe_layers(net)),
    ]
    apart = {id(module) for parent in spared for module in parent.modules()}
    return {
        f"{name}.weight"
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | PackedLinear) and id(module) not in apart
    }
