"""The MoE layer: router -> dispatch -> experts -> combine, a drop-in for `timm.layers.Mlp`.

`reference.py` computes the same, without speed and options. The dispatcher owns no parameters. It is the only object
that knows where experts live; here all are local, and `moevision.train.parallel.layout` has the one whose experts
are spread over processes.

Axes: B images, N tokens of an image, T = B·N tokens, D width, E experts, K choices, R rows (T·K of token
choice), `out` the width of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moevision.config import RouterOptions
from moevision.errors import UserError
from moevision.layers.cpu import refuse_transforms
from moevision.layers.experts import Backend, Experts
from moevision.layers.routers import build_router
from moevision.layers.routing import Dispatched, Recordable, Routing, routed_unit


class LocalDispatcher:
    """Dispatch to experts in this process; how tokens become rows is the routing's own (`Routing.dispatch`).

    A choice that the router did not keep is computed and given weight 0, so that shapes stay static.

    Args:
        row_multiple: what group sizes are rounded up to on a CPU, see `cpu.padded_counts`; 1 turns padding off.
        max_padding: rows over choices up to which groups are made equally long there; 1 turns that off.
    """

    def __init__(self, row_multiple: int | None = None, max_padding: float | None = None) -> None:
        self.row_multiple = row_multiple
        self.max_padding = max_padding

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        """Bring the tokens x [T, D] of a batch into rows sorted by expert."""
        return routing.dispatch(x, self.row_multiple, self.max_padding)

    def receive(self, sent: Dispatched) -> tuple[Tensor, Tensor]:
        """Rows [R, D] for the experts of this process and the length of each group [E]: those that were sent."""
        return sent.rows, sent.counts

    def combine(self, rows: Tensor, dispatched: Dispatched, routing: Routing) -> Tensor:
        """Weighted sum [T, D] of the experts' rows [R, D], in the rows' dtype."""
        return routing.combine(rows, dispatched)


class MoEMlp(Recordable):
    """A sparse mixture of MLPs: every token is computed by K of E experts, and by the shared ones if there are any.

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
        top_k: K; by default the router's own, 2 for most.
        router: a name of `moevision.layers.ROUTERS`.
        backend: how the experts are computed: `auto`, `loop`, `grouped` or `dense`.
        num_shared_experts: experts that every token passes besides the routed ones (DeepSeekMoE, arXiv:2401.06066,
            §3.2): a dense MLP of that many times hidden_features, added to the routed output.
        expert_drop: dropout inside the experts, in the place of `drop` (ST-MoE, arXiv:2202.08906, §4.2).
        **router_options: see `moevision.layers.RouterOptions`.

    Raises:
        UserError: for an argument of timm's Mlp that experts cannot honour, an unknown router or backend, K > E, or an
            option that the router has no use for.

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
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        self.router_name = router
        self.router = build_router(
            router,
            in_features,
            num_experts,
            top_k,
            options=RouterOptions(**router_options),
            **factory,
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
            **factory,
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
                **factory,
            )

        self.drop = nn.Dropout(drop_after)

    @property
    def fc2(self) -> nn.Module:
        """The experts' output weights, as timm's `fix_init_weight` asks an MLP for them."""
        return self.experts.fc2

    def forward(self, x: Tensor) -> Tensor:
        """Σ over a token's chosen experts of gate · expert(x): x [B, ..., D] -> [B, ..., out_features].

        A 2-D x is one image's tokens.
        """
        # Route: which experts compute each token, and with which weight.
        tokens = x.unsqueeze(0) if x.ndim == 2 else x.flatten(1, -2)  # [B, N, D]
        routing = self.decide(self.router(tokens))
        tokens = tokens.flatten(0, 1)  # [T, D]

        if self.experts.backend == "dense":
            shared = self._shared_output(tokens)  # [T, out]
            mixed = routing.mix_densely(tokens, self.experts)  # [T, out]
        else:
            refuse_transforms()

            # Dispatch: rows sorted by expert. Cast before they are copied, since under bf16 autocast that halves them.
            dtype = self.experts.compute_dtype(tokens)
            dispatched = self.dispatcher.dispatch(tokens.to(dtype), routing)

            # Shared experts: while they compute, rows travel to experts on other processes.
            shared = self._shared_output(tokens)  # [T, out]

            # Experts: each one on its group of rows.
            rows, counts = self.dispatcher.receive(dispatched)  # [R, D], [E]
            rows = self.experts(rows, counts)  # [R, out]

            # Combine: the weighted sum of the rows of each token.
            mixed = self.dispatcher.combine(rows, dispatched, routing)  # [T, out]

        if shared is not None:
            mixed = mixed + shared
        out: Tensor = self.drop(mixed.view(*x.shape[:-1], mixed.shape[-1]))
        return out

    def _shared_output(self, x: Tensor) -> Tensor | None:
        """The output [T, out_features] of the shared experts for x [T, D]; None without them."""
        return None if self.shared is None else self.shared(x)


class SharedExperts(nn.Module):
    """`fc2(dropout(act(fc1(x))))` on every token: timm's Mlp without its last dropout, initialised as experts are.

    `hidden_features` is the hidden width of all shared experts together, `drop` the dropout after the activation.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        act_layer: Callable[[], nn.Module],
        bias: tuple[bool, bool],
        drop: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias[0], device=device, dtype=dtype)
        self.act = act_layer()
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Linear(
            hidden_features, out_features, bias=bias[1], device=device, dtype=dtype
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `PackedLinear`: truncated normal, std 0.02, and zero biases."""
        for linear in (self.fc1, self.fc2):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """X [T, D] -> [T, out_features]."""
        out: Tensor = self.fc2(self.drop(self.act(self.fc1(x))))
        return out


def moe_layers(model: nn.Module) -> list[MoEMlp]:
    """The MoE layers of a model, in order of depth; empty for a dense model."""
    return [module for module in model.modules() if isinstance(module, MoEMlp)]


@torch.no_grad()
def update_router_bias(model: nn.Module, counts: Sequence[Tensor]) -> None:
    """Let routers act on their load (`bias_balanced` moves its bias); call it once per applied optimizer step.

    Args:
        model: any module with MoE layers.
        counts: for each of its MoE layers in order of depth [E], the choices that fell on each expert in that step,
            summed over micro-batches and processes; layers without a bias, or whose router is frozen, are left alone.

    Raises:
        UserError: if there are not as many counts as MoE layers.
    """
    layers = moe_layers(model)
    if len(layers) != len(counts):
        raise UserError(
            f"Give the counts of all {len(layers)} MoE layers; these are {len(counts)}."
        )
    for layer, load in zip(layers, counts, strict=True):
        layer.router.after_step(load)


def describe_moe(layers: Sequence[MoEMlp]) -> str:
    """What is mixed where, in words: "8 experts, 2 per token by vmoe_top_k, in blocks 1, 3"; "per image" by image."""
    experts = _enumerate([layer.router.num_experts for layer in layers])
    choices = _enumerate([layer.router.top_k for layer in layers])
    unit = _enumerate([routed_unit(layer.router) for layer in layers])
    routers = _enumerate([layer.router_name for layer in layers])
    shared = max(layer.num_shared_experts for layer in layers)
    plus_shared = f" plus {shared} shared" if shared else ""
    blocks = ", ".join(str(layer.layer_index) for layer in layers)
    return f"{experts} experts, {choices} per {unit}{plus_shared} by {routers}, in blocks {blocks}"


def _enumerate(values: Sequence[object]) -> str:
    """One value if all layers have the same; else "8, 8 and 4"."""
    texts = [str(value) for value in values]
    if len(set(texts)) == 1:
        return texts[0]
    return ", ".join(texts[:-1]) + f" and {texts[-1]}"
