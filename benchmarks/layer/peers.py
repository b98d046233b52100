"""Dropless MoE layers of other libraries, brought to the function that ours computes, to be timed beside it.

None of them is a dependency: each is imported if it is installed, and reported if it is not, or fails. A fair
comparison holds fixed everything but the experts' computation:

- the router is ours, with the same weights and the same noise, so that the same experts get the same tokens;
- active FLOPs are those of our K experts of hidden width H. Gated experts (`down(act(gate x) · up x)`) have three
  matrices instead of two, so they get the width 2 H / 3, rounded to a multiple of 8; biases they have none;
- under bf16 they are given tokens in bf16 and weights that are cast from their float32 parameters once per pass, as
  autocast does for ours. Left alone, `grouped_mm` would silently compute in float32 there (pytorch#174763).

| name | library | experts |
|---|---|---|
| `mixtral` | transformers: MixtralExperts, eager and grouped_mm | gated |
| `nemotron_h` | transformers: NemotronHExperts, the same two | two matrices: our function but for biases |
| `torchtitan` | torchtitan: GroupedExperts and LocalTokenDispatcher | gated, bf16 only |

Axes: T tokens, D width, H hidden width, E experts, K choices.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moevision import package_version
from moevision.errors import UserError
from moevision.layers import Routing

IMPLEMENTATIONS = ("eager", "grouped_mm")
PEERS = {
    **{f"mixtral {kind}": "transformers" for kind in IMPLEMENTATIONS},
    **{f"nemotron_h {kind}": "transformers" for kind in IMPLEMENTATIONS},
    "torchtitan": "torchtitan",
}
"""Name of each peer and the distribution that it comes with."""


class PeerLayer(nn.Module):
    """Our router, one of token choice, before another library's experts, which work in the compute dtype."""

    def __init__(self, router: nn.Module, experts: nn.Module, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.router, self.experts, self.compute_dtype = router, experts, compute_dtype
        for parameter in experts.parameters():  # theirs are made empty, for weights that are loaded
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """X [B, N, D] -> [B, N, D] in the compute dtype."""
        routing, dtype = self.router(x), self.compute_dtype
        flat = x.flatten(0, 1).to(dtype)
        weights = {name: value.to(dtype) for name, value in self.experts.named_parameters()}
        mixed: Tensor = functional_call(self.experts, weights, (flat, routing))
        return mixed.view_as(x)


class _TransformersExperts(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, tokens: Tensor, routing: Routing) -> Tensor:
        weight = routing.combine_weight.flatten(0, 1).to(tokens.dtype)
        return cast(Tensor, self.experts(tokens, routing.expert_index.flatten(0, 1), weight))


class _TorchtitanExperts(nn.Module):
    def __init__(self, experts: nn.Module, dispatcher: Any) -> None:
        super().__init__()
        self.experts, self.dispatcher = experts, dispatcher

    def forward(self, tokens: Tensor, routing: Routing) -> Tensor:
        index, weight = routing.expert_index.flatten(0, 1), routing.combine_weight.flatten(0, 1)
        rows, counts, way_back = self.dispatcher.dispatch(
            tokens, weight, index, routing.requested_counts()
        )
        return cast(Tensor, self.dispatcher.combine(self.experts(rows, counts), way_back, tokens))


def build_peer(
    name: str,
    router: nn.Module,
    *,
    width: int,
    hidden: int,
    num_experts: int,
    top_k: int,
    dtype: torch.dtype,
    device: torch.device,
) -> PeerLayer:
    """Another library's layer around our `router`, with the FLOPs of experts of width `hidden`.

    Raises:
        UserError: if the library isn't installed, or can't do this.
        Exception: whatever the library raises.
    """
    library = PEERS[name]
    if package_version(library) is None:
        raise UserError(f"{library} is not installed (pip install {library})")
    family, _, implementation = name.partition(" ")
    if family == "torchtitan":
        experts: nn.Module = _torchtitan(width, gated_width(hidden), num_experts, top_k, dtype)
    else:
        experts = _transformers(family, implementation, width, hidden, num_experts)
    return PeerLayer(router, experts, dtype).to(device)


def gated_width(hidden: int) -> int:
    """Hidden width of a gated MLP (three matrices) with the FLOPs of an ungated one (two): a multiple of 8."""
    return max(8, round(2 * hidden / 3 / 8) * 8)


def flops_beside_ours(name: str, hidden: int) -> float:
    """A peer's active FLOPs ÷ ours; 1 but for the rounding of a gated width."""
    gated = not name.startswith("nemotron_h")
    return 3 * gated_width(hidden) / (2 * hidden) if gated else 1.0


def _transformers(
    family: str, implementation: str, width: int, hidden: int, num_experts: int
) -> nn.Module:
    if family == "mixtral":
        module = import_module("transformers.models.mixtral.modeling_mixtral")
        sizes = {"num_local_experts": num_experts, "intermediate_size": gated_width(hidden)}
        make, sizes["hidden_act"] = module.MixtralExperts, "silu"
    else:
        module = import_module("transformers.models.nemotron_h.modeling_nemotron_h")
        sizes = {"n_routed_experts": num_experts, "moe_intermediate_size": hidden}
        make, sizes["mlp_hidden_act"] = module.NemotronHExperts, "gelu"
    config = SimpleNamespace(
        **sizes, hidden_size=width, moe_latent_size=None, _experts_implementation=implementation
    )
    return _TransformersExperts(make(config))


def _torchtitan(
    width: int, hidden: int, num_experts: int, top_k: int, dtype: torch.dtype
) -> nn.Module:
    if dtype != torch.bfloat16:
        raise UserError("torchtitan's experts compute in bf16 only")
    moe = import_module("torchtitan.models.common.moe")
    dispatch = import_module("torchtitan.models.common.token_dispatcher")
    experts, dispatcher = moe.GroupedExperts, dispatch.LocalTokenDispatcher
    sizes = experts.Config(dim=width, hidden_dim=hidden, num_experts=num_experts)
    way = dispatcher.Config(num_experts=num_experts, top_k=top_k)
    return _TorchtitanExperts(experts(sizes), dispatcher(way))
