"""FLOPs of each MoE layer in one forward pass: its router's, its experts', and how many rows those were.

Read off a running counter where a layer, its router and its shared experts start and end, so nothing depends on how
rows are dispatched or by which operations experts are computed.

Axes: B images, N tokens, D width, H hidden width of an expert, O output width, E experts, P slots, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moevision.layers import MoEMlp, Routing, SoftRouting, moe_layers, record_routing


@dataclass(frozen=True)
class LayerCount:
    """FLOPs of one MoE layer's forward pass.

    Attributes:
        layer: the layer.
        routing: what it decided.
        router: the router's FLOPs.
        experts: the routed experts' FLOPs.
        input_needs_gradient: whether the layer's input has a gradient to be computed.
    """

    layer: MoEMlp
    routing: Routing
    router: int
    experts: int
    input_needs_gradient: bool

    def per_row(self, *, backward: bool) -> int:
        """FLOPs of one row through one expert: 2 · (D · H + H · O) forward, as much again for each gradient."""
        fc1, fc2 = self.layer.experts.fc1, self.layer.experts.fc2
        first, second = (2 * linear.in_features * linear.out_features for linear in (fc1, fc2))
        if not backward:
            return first + second
        hidden_needs_gradient = self.input_needs_gradient or any(p.requires_grad for p in fc1.parameters())
        first *= 1 + fc1.weight.requires_grad + self.input_needs_gradient
        second *= 1 + fc2.weight.requires_grad + hidden_needs_gradient
        return first + second

    def rows(self) -> int:
        """R, the rows that went through an expert.

        Raises:
            RuntimeError: if the counted FLOPs are no whole number of rows, or fewer than were kept: an operation of
                the experts has no formula then.
        """
        rows, rest = divmod(self.experts, self.per_row(backward=False))
        if rest or rows < self.kept_rows():
            raise RuntimeError(
                f"{self.experts} FLOPs of experts were counted where {self.kept_rows()} rows of "
                f"{self.per_row(backward=False)} were kept: an operation of backend "
                f"{self.layer.experts.backend!r} has no FLOP formula."
            )
        return rows

    def kept_rows(self) -> int:
        """Rows that reach an output."""
        return int(self.routing.counts().sum())

    def requested_rows(self) -> int:
        """Rows that the routing asks for before any capacity: what is called active."""
        return int(self.routing.requested_counts().sum())

    def router_flops(self, *, backward: bool) -> int:
        """The router's FLOPs; all of its products have a weight and an activation."""
        trains = any(parameter.requires_grad for parameter in self.layer.router.parameters())
        return self.router * (1 + backward * (trains + self.input_needs_gradient))


def count_layers(
    model: nn.Module, counter: FlopCounterMode, forward: Callable[[], Any]
) -> tuple[Any, list[LayerCount]]:
    """Run one forward pass under an open counter and look at each MoE layer in it.

    Args:
        model: the model that `forward` runs.
        counter: an open `flop_counter()`.
        forward: the pass.

    Returns:
        What `forward` returned, and the layers in order of depth.
    """
    spent: dict[nn.Module, int] = {}
    needs_gradient: dict[nn.Module, bool] = {}
    with record_routing(model) as routings, _spent_in(model, counter, spent, needs_gradient):
        output = forward()
    layers = moe_layers(model)
    assert len(layers) == len(routings), "every MoE layer runs once in a forward pass"
    return output, [
        LayerCount(
            layer,
            routing,
            router=spent[layer.router],
            experts=spent[layer]
            - spent[layer.router]
            - (0 if layer.shared is None else spent[layer.shared])
            - _mixing_flops(layer, routing),
            input_needs_gradient=needs_gradient[layer],
        )
        for layer, routing in zip(layers, routings, strict=True)
    ]


def _mixing_flops(layer: MoEMlp, routing: Routing) -> int:
    """Soft MoE fills slots with weighted means of tokens, and tokens with those of slots: 4 · B · N · E · P · D."""
    if not isinstance(routing, SoftRouting):
        return 0
    fc1, fc2 = layer.experts.fc1, layer.experts.fc2
    return 2 * routing.slot_weight.numel() * (fc1.in_features + fc2.out_features)


@contextmanager
def _spent_in(
    model: nn.Module, counter: FlopCounterMode, spent: dict[nn.Module, int], needs_gradient: dict[nn.Module, bool]
) -> Iterator[None]:
    """Note the FLOPs between start and end of MoE layers, their routers and their shared experts."""

    def start(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        spent[module] = -int(counter.get_total_flops())
        needs_gradient[module] = arguments[0].requires_grad

    def end(module: nn.Module, _: tuple[Any, ...], __: Any) -> None:
        spent[module] += int(counter.get_total_flops())

    parts = [part for layer in moe_layers(model) for part in (layer, layer.router, layer.shared) if part is not None]
    handles = [part.register_forward_pre_hook(start) for part in parts]
    handles += [part.register_forward_hook(end) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
