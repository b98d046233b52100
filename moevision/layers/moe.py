"""The MoE layer: router -> dispatch -> experts -> combine, a drop-in for `timm.layers.Mlp`.

`reference.py` computes the same in simple code, slowly and without options.

The dispatcher has no parameters. It alone knows in which process each expert is: with `LocalDispatcher` all are in this
one, and `moevision.train.parallel` has the dispatcher for experts that are spread over processes.

Axes: B images, N tokens of an image, T = B·N tokens, D width, E experts, K choices of a token, R rows (for token choice
T·K and padding), `out` the width of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from moevision.config import RouterOptions
from moevision.errors import UserError
from moevision.layers.experts import Backend, Experts
from moevision.layers.routers import build_router
from moevision.layers.routing import Dispatched, Recordable, Routing, routed_unit


class LocalDispatcher:
    """Dispatch to experts in this process, by the methods `dispatch` and `combine` of `Routing`.

    A choice that the router dropped is computed all the same, with weight 0, so that shapes stay static.

    With `pad` the experts' groups of rows get padding where that is faster (`cpu.padded_counts`).
    """

    def __init__(self, *, pad: bool = True) -> None:
        self.pad = pad

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        """Copy the tokens x [T, D] of a batch into rows that are sorted by expert."""
        return routing.dispatch(x, pad=self.pad)

    def receive(self, sent: Dispatched) -> tuple[Tensor, Tensor]:
        """Rows [R, D] for the experts of this process, and the length [E] of each expert's group: all that was sent."""
        return sent.rows, sent.counts

    def combine(self, rows: Tensor, dispatched: Dispatched, routing: Routing) -> Tensor:
        """Weighted sum [T, D] of the experts' rows [R, D], in the rows' dtype."""
        return routing.combine(rows, dispatched)


class MoEMlp(Recordable):
    """A sparse mixture of MLPs: every token is computed by K of E experts, and by the shared ones if there are any.

    Tensor -> Tensor like the MLP it replaces, so that it works inside any timm block. `record_routing` gives access
    to the router's decisions.

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
        top_k: K; by default the router's own, 2 for most.
        router: a name of `moevision.layers.ROUTERS`.
        backend: how the experts are computed: `auto`, `loop`, `grouped` or `dense`.
        num_shared_experts: experts that every token passes besides the routed ones (DeepSeekMoE, arXiv:2401.06066,
            §3.2): a dense MLP of that many times hidden_features, added to the routed output.
        expert_drop: dropout inside the experts, in the place of `drop` (ST-MoE, arXiv:2202.08906, §4.2).
        **router_options: see `moevision.layers.RouterOptions`.

    Raises:
        UserError: for an argument of timm's Mlp that experts cannot honour, an unknown router, backend or option,
            K > E, or an option that the router has no use for.

    Examples:
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
        top_k: int | None = None,
        router: str = "noisy_top_k",
        backend: Backend = "auto",
        num_shared_experts: int = 0,
        expert_drop: float | None = None,
        **router_options: Any,
    ) -> None:
        super().__init__()
        if norm_layer is not None or use_conv:
            raise UserError(
                "MoEMlp has no norm_layer and no use_conv: keep this block dense, or leave them out."
            )
        hidden_features = hidden_features or in_features
        out_features = out_features or in_features
        biases = bias if isinstance(bias, tuple) else (bias, bias)
        drop_inside, drop_after = drop if isinstance(drop, tuple) else (drop, drop)
        placement: dict[str, Any] = {"device": device, "dtype": dtype}

        self.router_name = router
        self.router = build_router(
            router,
            in_features,
            num_experts,
            top_k,
            options=_router_options(router_options),
            **placement,
        )

        self.dispatcher = LocalDispatcher()

        self.experts = Experts(
            num_experts,
            in_features,
            hidden_features,
            out_features,
            act_layer=act_layer,
            bias=biases,
            drop=drop_inside if expert_drop is None else expert_drop,
            backend=backend,
            **placement,
        )

        self.num_shared_experts = num_shared_experts
        self.shared: SharedExperts | None = None
        if num_shared_experts:
            self.shared = SharedExperts(
                in_features,
                num_shared_experts * hidden_features,
                out_features,
                act_layer,
                biases,
                drop_inside,
                **placement,
            )

        self.drop = nn.Dropout(drop_after)

    @property
    def fc2(self) -> nn.Module:
        """The experts' output layer, which timm's `fix_init_weight` expects of an MLP."""
        return self.experts.fc2

    def forward(self, x: Tensor) -> Tensor:
        """Σ over a token's chosen experts of gate · expert(x): x [B, ..., D] -> [B, ..., out_features].

        A 2-D x [N, D] holds the tokens of one image.
        """
        # Route: which experts compute each token, and with which weight.
        tokens = x.unsqueeze(0) if x.ndim == 2 else x.flatten(1, -2)  # [B, N, D]
        routing = self.decide(self.router(tokens))
        tokens = tokens.flatten(0, 1)  # [T, D]

        if self.experts.backend == "dense":
            shared = self._shared_output(tokens)  # [T, out]
            mixed = routing.mix_densely(tokens, self.experts)  # [T, out]
        else:
            # Dispatch: rows sorted by expert. Tokens are cast before they are copied: under bf16 autocast that
            # halves the memory of the copies.
            dtype = self.experts.compute_dtype(tokens)
            dispatched = self.dispatcher.dispatch(tokens.to(dtype), routing)

            # Shared experts: meanwhile, rows are sent to the experts of other processes, if there are any.
            shared = self._shared_output(tokens)  # [T, out]

            # Experts: each computes its group of rows.
            rows, counts = self.dispatcher.receive(dispatched)  # [R, D], [E]
            rows = self.experts(rows, counts)  # [R, out]

            # Combine: the weighted sum of the rows of each token.
            mixed = self.dispatcher.combine(rows, dispatched, routing)  # [T, out]

        if shared is not None:
            mixed = mixed + shared
        result: Tensor = self.drop(mixed.view(*x.shape[:-1], mixed.shape[-1]))
        return result

    def _shared_output(self, x: Tensor) -> Tensor | None:
        """The output [T, out_features] of the shared experts for x [T, D]; None without them."""
        return None if self.shared is None else self.shared(x)


def _router_options(options: Mapping[str, Any]) -> RouterOptions:
    """The options of a layer's router; a UserError for a name that neither it nor `MoEMlp` knows."""
    known = [entry.name for entry in fields(RouterOptions)]
    for name in options:
        if name not in known:
            names = [*signature(MoEMlp).parameters, *known]
            nearest = get_close_matches(name, names) or known
            raise UserError(f"MoEMlp has no option {name!r}: use {' or '.join(nearest)}.")
    return RouterOptions(**options)


class SharedExperts(nn.Sequential):
    """`fc2(dropout(act(fc1(x))))` on every token: timm's Mlp without its last dropout, initialised as experts are.

    `hidden_features` is the hidden width of all shared experts together, `drop` the dropout after the activation;
    `placement` are device and dtype.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        act_layer: Callable[[], nn.Module],
        bias: tuple[bool, bool],
        drop: float,
        **placement: Any,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features, bias[0], **placement)
        self.act = act_layer()
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_features, out_features, bias[1], **placement)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as `PackedLinear` does: weights from a truncated normal, std 0.02, and zero biases."""
        for linear in (self.fc1, self.fc2):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)


def moe_layers(model: nn.Module) -> list[MoEMlp]:
    """The MoE layers of a model, in order of depth; empty for a dense model."""
    return [module for module in model.modules() if isinstance(module, MoEMlp)]


@torch.no_grad()
def update_router_bias(model: nn.Module, counts: Sequence[Tensor]) -> None:
    """Pass each router its load (`bias_balanced` then adjusts its bias); call it once per applied optimizer step.

    Args:
        model: any module with MoE layers.
        counts: for each MoE layer in order of depth, [E] how many tokens chose each expert in that step, summed over
            micro-batches and processes. Layers without a bias, or whose router is frozen, ignore them.
    """
    for layer, load in zip(moe_layers(model), counts, strict=True):
        layer.router.after_step(load)


def describe_moe(layers: Sequence[MoEMlp]) -> str:
    """A description such as "8 experts, 2 per token by vmoe_top_k, in blocks 1, 3".

    "per image" replaces "per token" where images are routed as a whole.
    """
    experts = _join_unless_equal([layer.router.num_experts for layer in layers])
    choices = _join_unless_equal([layer.router.top_k for layer in layers])
    unit = _join_unless_equal([routed_unit(layer.router) for layer in layers])
    routers = _join_unless_equal([layer.router_name for layer in layers])
    shared = max(layer.num_shared_experts for layer in layers)
    plus_shared = f" plus {shared} shared" if shared else ""
    blocks = ", ".join(str(layer.layer_index) for layer in layers)
    return f"{experts} experts, {choices} per {unit}{plus_shared} by {routers}, in blocks {blocks}"


def _join_unless_equal(values: Sequence[object]) -> str:
    """The single value if all are equal; else all of them, such as "8, 8 and 4"."""
    texts = [str(value) for value in values]
    if len(set(texts)) == 1:
        return texts[0]
    return ", ".join(texts[:-1]) + f" and {texts[-1]}"
