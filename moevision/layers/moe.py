"""The MoE layer: router + dispatcher + experts, a drop-in for `timm.layers.Mlp`.

Axes: B images, N tokens, D width, E experts, K choices, T = B·N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from moevision.errors import UserError
from moevision.layers.dispatch import LocalDispatcher
from moevision.layers.experts import Backend, Experts
from moevision.layers.routers import build_router
from moevision.layers.routing import Recordable, Routing


class MoEMlp(Recordable):
    """A sparse mixture of MLPs: every token is computed by its K chosen experts out of E.

    Tensor -> Tensor like the MLP it replaces, so that it works inside any timm block. What the router decided comes
    back through `record_routing`.

    Args:
        in_features: D.
        hidden_features: hidden width of one expert; `in_features` if None, as in timm.
        out_features: output width; `in_features` if None.
        act_layer: constructor of the activation.
        norm_layer: must be None; timm's norm between the layers of an Mlp has no packed form.
        bias: biases of fc1 and fc2, one bool or a pair.
        drop: dropout after the activation and after fc2, one probability or a pair.
        use_conv: must be False; tokens are rows here.
        device: where the parameters live.
        dtype: dtype of the parameters.
        num_experts: E.
        top_k: K.
        router: `noisy_top_k` or `vmoe_top_k`.
        backend: how the experts are computed: `auto`, `loop`, `grouped` or `dense`.

    Raises:
        UserError: for an argument of timm's Mlp that experts cannot honour, an unknown router or backend, or K > E.

    Example:
        >>> layer = MoEMlp(192, 384, num_experts=8, top_k=2)
        >>> layer(torch.randn(4, 65, 192)).shape
        torch.Size([4, 65, 192])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        use_conv: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_experts: int = 8,
        top_k: int = 2,
        router: str = "noisy_top_k",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if norm_layer is not None or use_conv:
            raise UserError("MoEMlp has no norm_layer and no use_conv: keep this block dense, or leave them out.")
        drops = drop if isinstance(drop, tuple) else (drop, drop)
        self.router = build_router(router, in_features, num_experts, top_k, device=device, dtype=dtype)
        self.dispatcher = LocalDispatcher()
        self.experts = Experts(
            num_experts,
            in_features,
            hidden_features or in_features,
            out_features or in_features,
            act_layer=act_layer,
            bias=bias if isinstance(bias, tuple) else (bias, bias),
            drop=drops[0],
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.drop = nn.Dropout(drops[1])

    def forward(self, x: Tensor) -> Tensor:
        """Mix the chosen experts' outputs: x [B, ..., D] -> [B, ..., out_features]; a 2-D x is one image's tokens."""
        tokens = x.unsqueeze(0) if x.ndim == 2 else x.flatten(1, -2)
        routing = self.decide(replace(self.router(tokens), layer=self.layer_index))
        flat = tokens.flatten(0, 1)
        mixed = self._mix_all(flat, routing) if self.experts.backend == "dense" else self._mix_routed(flat, routing)
        out: Tensor = self.drop(mixed.view(*x.shape[:-1], -1))
        return out

    def _mix_routed(self, x: Tensor, routing: Routing) -> Tensor:
        # Cast before the copy: the rows are then half as large under bf16 autocast.
        dispatched = self.dispatcher.dispatch(x.to(self.experts.compute_dtype(x)), routing)
        rows = self.experts(dispatched.rows, dispatched.counts)
        return self.dispatcher.combine(rows, dispatched, routing)

    def _mix_all(self, x: Tensor, routing: Routing) -> Tensor:
        outputs = self.experts.on_all_tokens(x)
        weights = routing.expert_weights().flatten(0, 1)
        return (outputs * weights.unsqueeze(-1)).sum(1).to(outputs.dtype)


def moe_layers(model: nn.Module) -> list[MoEMlp]:
    """The MoE layers of a model, in order of depth; empty for a dense model."""
    return [module for module in model.modules() if isinstance(module, MoEMlp)]
