"""How a layer computed each patch, in numbers: scores, what every chosen expert gave, their sum, the residual stream.

`capture_activations` is a scope around a forward pass. It keeps what the layers compute anyway (the experts' rows, the
output, the residual stream before and after), so that the numbers cost norms and no second pass.

Axes: N tokens of one image (prefix tokens first), P patches, D width, E experts, K choices (E where experts choose
patches or mix them), R rows, C patches of an expert, S slots of an expert, V shown channels.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moevision.demo.wire import encode_float32
from moevision.layers import (
    ExpertChoiceRouting,
    MoEMlp,
    Routing,
    SoftRouting,
    moe_layers,
    routing_lock,
)

Floats = npt.NDArray[np.float32]
SHOWN = 8  # channels of a vector: as many as can be drawn and read


@dataclass(frozen=True)
class Channels:
    """A few numbers of each vector as they are, by which a reader can do the layer's sums.

    They are those channels that the layer changes most in this image. A patch gets from the layer
    `Σ weight · outputs + shared = total`; the stream goes on with `before + scale · total = after`.
    """

    of: int  # D
    hidden: int  # width of an expert's hidden layer
    index: list[int]  # [V] which of the D channels, in order
    scale: Floats | None  # [V] the block's layer scale, 1 without one; None as `before`
    read: Floats  # [P, V] what the router and the experts read
    outputs: Floats  # [P, K, V] what each chosen expert gave, before its weight; lengths: `Computation.outputs`
    shared: Floats | None  # [P, V] what the shared experts gave; None without
    total: Floats  # [P, V] the layer's output
    before: (
        Floats | None
    )  # [P, V] the residual stream that the block's MLP branch reads; None as in `Computation`
    after: Floats | None  # [P, V] the stream behind the block; None as `before`

    def to_json(self) -> dict[str, Any]:
        """The fields; each array as `wire.packed` writes it."""
        return {
            name: encode_float32(one) if isinstance(one, np.ndarray) else one
            for name, one in vars(self).items()
        }


@dataclass(frozen=True)
class Computation:
    """The numbers of one layer for the patches of one image; lengths are Euclidean norms of vectors of width D."""

    scores: Floats  # [P, E] the router's clean logits
    noise: Floats | None  # [P, E] what was added to them, as in training; None without
    bias: Floats | None  # [E] what is added to an affinity for the choice alone; None without
    # [P, K] length of what each chosen expert gave, before its weight; of Soft MoE, of the weighted mean of the
    # expert's slots; 0 where the expert didn't take the patch
    outputs: Floats
    shared: Floats | None  # [P] length of what the shared experts gave; None without
    total: Floats  # [P] length of the weighted sum, shared experts included: the layer's output
    # [P] length of the residual stream that the block's MLP branch reads; None if the layer doesn't stand behind a norm
    # in a residual branch
    before: Floats | None
    after: Floats | None  # [P] length of the stream behind the block; None as `before`
    channels: Channels  # some numbers of these vectors

    def to_json(self) -> dict[str, Any]:
        """Each array by name as `wire.packed` writes it, or None; `channels` as an object of its own."""
        arrays = {
            name: encode_float32(one) if isinstance(one, np.ndarray) else one
            for name, one in vars(self).items()
        }
        return {**arrays, "channels": self.channels.to_json()}


@dataclass
class LayerActivations:
    """What one MoE layer computed while the scope was open."""

    layer: MoEMlp
    block: nn.Module | None = None
    tokens: Tensor | None = None
    output: Tensor | None = None
    rows: Tensor | None = None
    shared: Tensor | None = None
    normed: Tensor | None = None
    before: Tensor | None = None
    after: Tensor | None = None

    @torch.inference_mode()
    def computation(self, routing: Routing, *, noisy: bool = False) -> Computation:
        """The numbers of the image's patches under the decision that was recorded with them.

        `noisy` is whether the router drew noise for it; it must be back in evaluation.
        """
        assert self.tokens is not None
        assert self.output is not None
        first = routing.num_prefix_tokens
        x = self.tokens.flatten(0, -2)  # [N, D]; one image

        def of_patches(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.flatten(0, -2)[first:]

        def lengths(values: Tensor | None) -> Floats | None:
            return None if values is None else _numpy(_length(values))

        def some(values: Tensor | None) -> Floats | None:
            return None if values is None else _numpy(values[..., index])

        # Behind a norm in a residual branch the norm's output is the layer's very input.
        in_branch = self.normed is self.tokens
        before, after = map(of_patches, (self.before, self.after) if in_branch else (None, None))
        total, shared = self.output.flatten(0, -2)[first:], of_patches(self.shared)
        outputs = self._expert_outputs(x, routing)[first:]
        bias = getattr(self.layer.router, "bias", None)
        changed = (
            (total if before is None or after is None else after - before).float().abs().mean(0)
        )
        index = changed.topk(min(SHOWN, len(changed))).indices.sort().values
        gamma = getattr(getattr(self.block, "ls2", None), "gamma", None)
        scale = (torch.ones_like(changed) if gamma is None else gamma) if in_branch else None
        # Jitter shakes the patch itself: the clean logits are those of the router without it.
        clean = self.layer.router(self.tokens).logits if noisy else routing.logits
        return Computation(
            scores=_numpy(clean[0, first:]),
            noise=_numpy((routing.noisy_logits - clean)[0, first:]) if noisy else None,
            bias=_numpy(bias) if isinstance(bias, Tensor) else None,
            outputs=_numpy(_length(outputs)),
            shared=lengths(shared),
            total=_numpy(_length(total)),
            before=lengths(before),
            after=lengths(after),
            channels=Channels(
                x.shape[-1],
                self.layer.experts.fc1.out_features,
                index.tolist(),
                some(scale),
                _numpy(x[first:, index]),
                _numpy(outputs[..., index]),
                some(shared),
                _numpy(total[..., index]),
                some(before),
                some(after),
            ),
        )

    def _expert_outputs(self, x: Tensor, routing: Routing) -> Tensor:
        """[N, K, D] the experts' outputs, in the order of `routing.expert_index`."""
        experts = self.layer.experts
        sent = self.layer.dispatcher.dispatch(x.to(experts.compute_dtype(x)), routing)
        rows: Tensor = (
            experts(sent.rows, sent.counts) if self.rows is None else self.rows
        )  # dense: none were computed
        if isinstance(routing, SoftRouting):
            weight = routing.slot_weight[0].to(rows.dtype)  # [N, E, S]
            slots = rows.view(routing.num_experts, -1, rows.shape[-1])  # [E, S, D]
            share = weight.sum(-1, keepdim=True).clamp_min(
                torch.finfo(rows.dtype).tiny
            )  # [N, E, 1]
            return _of_choices(torch.einsum("nes,esd->ned", weight, slots) / share, routing)
        if isinstance(routing, ExpertChoiceRouting):
            by_expert = rows.new_zeros(
                routing.logits.shape[2], routing.logits.shape[1], rows.shape[-1]
            )  # [E, N, D]
            token = routing.token_index[0]  # [E, C]
            by_expert.scatter_(
                1, token.unsqueeze(-1).expand(-1, -1, rows.shape[-1]), rows.view(*token.shape, -1)
            )
            return _of_choices(by_expert.transpose(0, 1), routing)
        assert sent.position is not None  # token choice
        return rows[sent.position]


@contextmanager
def capture_activations(net: nn.Module) -> Iterator[list[LayerActivations]]:
    """Keep what the MoE layers of `net` compute about one image; in this thread, and until the scope closes.

    It gives one `LayerActivations` per MoE layer, in order of depth, which fills while the model runs.
    """
    parents = {
        child: module
        for module in net.modules()
        for child in module.children()
        if isinstance(child, MoEMlp)
    }
    heard = [LayerActivations(layer, parents.get(layer)) for layer in moe_layers(net)]
    thread, hooks = threading.get_ident(), ExitStack()

    def keep(module: Any, one: LayerActivations, output: str, given: str | None = None) -> None:
        """Write what `module` gives, and what it was given, into fields of `one`."""

        def hook(_: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
            if threading.get_ident() == thread:
                vars(one).update(
                    {output: result} if given is None else {output: result, given: arguments[0]}
                )

        if isinstance(module, nn.Module):
            hooks.enter_context(module.register_forward_hook(hook))

    with routing_lock(net), hooks:
        for one in heard:
            keep(one.layer, one, "output", "tokens")
            keep(one.layer.experts, one, "rows")
            keep(one.layer.shared, one, "shared")
            keep(getattr(one.block, "norm2", None), one, "normed", "before")
            keep(one.block, one, "after")
        yield heard


def _of_choices(values: Tensor, routing: Routing) -> Tensor:
    """[N, K, D] of [N, E, D]."""
    return values.gather(1, routing.expert_index[0].unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def _length(vectors: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(vectors.float(), dim=-1)
    return length


def _numpy(values: Tensor) -> Floats:
    return values.detach().float().cpu().numpy()
