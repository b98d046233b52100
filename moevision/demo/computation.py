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
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moevision.demo.wire import Floats, Json, encode_float32, to_numpy
from moevision.layers import (
    ExpertChoiceRouting,
    MoEMlp,
    Routing,
    SoftRouting,
    moe_layers,
    routing_lock,
)

MAX_CHANNELS = 8  # of a vector: as many as can be drawn and read
# A hooked module's output, and the activation that is this module's input.
INPUT_OF = {"output": "tokens", "normed": "before"}


@dataclass(frozen=True, kw_only=True)
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
    outputs: Floats  # [P, K, V] what each chosen expert gave, before its weight
    shared: Floats | None = None  # [P, V] what the shared experts gave; None without
    total: Floats  # [P, V] the layer's output
    before: Floats | None = None  # [P, V] the residual stream into the block's MLP branch, if any
    after: Floats | None = None  # [P, V] the stream behind the block; None as `before`

    def to_json(self) -> Json:
        """The fields; each array as `encode_float32` writes it."""
        return _encode_arrays(self)


@dataclass(frozen=True, kw_only=True)
class Computation:
    """The numbers of one layer for the patches of one image; norms are Euclidean, of vectors of width D."""

    scores: Floats  # [P, E] the router's clean logits
    noise: Floats | None  # [P, E] what was added to them, as in training; None without
    bias: Floats | None  # [E] what is added to an affinity for the choice alone; None without
    # [P, K] norm of what each chosen expert gave, before its weight; of Soft MoE, of the weighted mean of the
    # expert's slots; 0 where the expert didn't take the patch
    outputs: Floats
    shared: Floats | None = None  # [P] norm of what the shared experts gave; None without
    total: Floats  # [P] norm of the weighted sum, shared experts included: the layer's output
    # [P] norm of the residual stream that the block's MLP branch reads; None if the layer doesn't stand behind a norm
    # in a residual branch
    before: Floats | None = None
    after: Floats | None = None  # [P] norm of the stream behind the block; None as `before`
    channels: Channels  # some numbers of these vectors

    def to_json(self) -> Json:
        """Each array by name as `encode_float32` writes it, or None; `channels` as an object of its own."""
        return {**_encode_arrays(self), "channels": self.channels.to_json()}


@dataclass
class LayerActivations:
    """What one MoE layer computed while the scope was open, each [1, N, D] but for `rows` [R, D]."""

    layer: MoEMlp
    block: nn.Module | None = None
    tokens: Tensor | None = None
    output: Tensor | None = None
    rows: Tensor | None = None
    shared: Tensor | None = None
    normed: Tensor | None = None
    before: Tensor | None = None
    after: Tensor | None = None
    thread: int = field(default_factory=threading.get_ident)

    def register_hooks(self, hooks: ExitStack) -> None:
        """Store what the modules compute in the fields of these names, until `hooks` is closed."""
        modules = {
            "output": self.layer,
            "rows": self.layer.experts,
            "shared": self.layer.shared,
            "normed": getattr(self.block, "norm2", None),
            "after": self.block,
        }
        for name, module in modules.items():
            if isinstance(module, nn.Module):
                hook = partial(self._store, name)
                hooks.enter_context(module.register_forward_hook(hook))

    def _store(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if threading.get_ident() != self.thread:
            return
        setattr(self, name, output)
        if name in INPUT_OF:
            setattr(self, INPUT_OF[name], inputs[0])

    @property
    def in_residual_branch(self) -> bool:
        """Whether the layer stands behind a norm in a residual branch: the norm's output is its very input."""
        return self.normed is self.tokens

    @torch.inference_mode()
    def computation(self, routing: Routing, *, noisy: bool = False) -> Computation:
        """The numbers of the image's patches under the decision that was recorded with them.

        `noisy` is whether the router drew noise for it; it must be back in evaluation.
        """
        first = routing.num_prefix_tokens
        router = self.layer.router
        vectors = self._patch_vectors(routing)

        clean_logits = routing.logits  # [1, N, E]
        noise = None
        if noisy:
            # Jitter shakes the patch itself: the clean logits are those of the router without it.
            clean_logits = router(self.tokens).logits
            noise = to_numpy((routing.noisy_logits - clean_logits)[0, first:])

        bias = getattr(router, "bias", None)
        norms: dict[str, Any] = {
            name: to_numpy(torch.linalg.vector_norm(vector.float(), dim=-1))
            for name, vector in vectors.items()
        }
        return Computation(
            scores=to_numpy(clean_logits[0, first:]),
            noise=noise,
            bias=to_numpy(bias) if isinstance(bias, Tensor) else None,
            **norms,
            channels=self._channel_table(vectors, first),
        )

    def _patch_vectors(self, routing: Routing) -> dict[str, Tensor]:
        """The vectors of the patches that there are by name, [P, D]; `outputs` is [P, K, D]."""
        vectors = {"shared": self.shared, "total": self.output}
        if self.in_residual_branch:
            vectors |= {"before": self.before, "after": self.after}
        first = routing.num_prefix_tokens
        patches = {"outputs": self._expert_outputs(routing)[first:]}
        for name, vector in vectors.items():
            if vector is not None:
                patches[name] = vector.flatten(0, -2)[first:]
        return patches

    def _channel_table(self, vectors: dict[str, Tensor], first: int) -> Channels:
        """The channels that the layer changes most, of each of the vectors."""
        change = vectors["total"]
        if self.in_residual_branch:
            change = vectors["after"] - vectors["before"]
        mean_change = change.float().abs().mean(0)  # [D]
        largest = mean_change.topk(min(MAX_CHANNELS, len(mean_change)))
        index = largest.indices.sort().values  # [V]

        scale = None
        if self.in_residual_branch:
            gamma = getattr(getattr(self.block, "ls2", None), "gamma", torch.ones_like(mean_change))
            scale = to_numpy(gamma[index])

        assert self.tokens is not None
        tokens = self.tokens.flatten(0, -2)[first:]  # [P, D]; one image
        table: dict[str, Any] = {
            name: to_numpy(vector[..., index]) for name, vector in vectors.items()
        }
        return Channels(
            of=tokens.shape[-1],
            hidden=self.layer.experts.fc1.out_features,
            index=index.tolist(),
            scale=scale,
            read=to_numpy(tokens[:, index]),
            **table,
        )

    def _expert_outputs(self, routing: Routing) -> Tensor:
        """[N, K, D] the experts' outputs, in the order of `routing.expert_index`."""
        assert self.tokens is not None
        tokens = self.tokens.flatten(0, -2)  # [N, D]; one image
        experts = self.layer.experts
        inputs = tokens.to(experts.compute_dtype(tokens))
        sent = self.layer.dispatcher.dispatch(inputs, routing)
        rows = self.rows
        if rows is None:  # the dense backend computes none
            rows = experts(sent.rows, sent.counts)

        if isinstance(routing, SoftRouting):
            outputs = _slot_means(rows, routing)
        elif isinstance(routing, ExpertChoiceRouting):
            outputs = _scatter_to_tokens(rows, routing)
        else:
            assert sent.position is not None  # [N, K] of token choice
            return rows[sent.position]
        index = routing.expert_index[0].unsqueeze(-1)  # [N, K, 1]
        return outputs.gather(1, index.expand(-1, -1, outputs.shape[-1]))


@contextmanager
def capture_activations(net: nn.Module) -> Iterator[list[LayerActivations]]:
    """Keep what the MoE layers of `net` compute about one image; in this thread, and until the scope closes.

    It gives one `LayerActivations` per MoE layer, in order of depth, which fills while the model runs.
    """
    blocks = {child: module for module in net.modules() for child in module.children()}
    layers = [LayerActivations(layer, blocks.get(layer)) for layer in moe_layers(net)]
    with routing_lock(net), ExitStack() as hooks:
        for layer in layers:
            layer.register_hooks(hooks)
        yield layers


def _slot_means(rows: Tensor, routing: SoftRouting) -> Tensor:
    """[N, E, D] for each token the weighted mean of each expert's slots."""
    weight = routing.slot_weight[0].to(rows.dtype)  # [N, E, S]
    slots = rows.view(routing.num_experts, -1, rows.shape[-1])  # [E, S, D]
    smallest = torch.finfo(rows.dtype).tiny
    weight_sum = weight.sum(-1, keepdim=True).clamp_min(smallest)  # [N, E, 1]
    return torch.einsum("nes,esd->ned", weight, slots) / weight_sum


def _scatter_to_tokens(rows: Tensor, routing: ExpertChoiceRouting) -> Tensor:
    """[N, E, D] what each expert gave each token, 0 where the expert didn't take it."""
    _, num_tokens, num_experts = routing.logits.shape
    width = rows.shape[-1]
    by_expert = rows.new_zeros(num_experts, num_tokens, width)
    token_index = routing.token_index[0]  # [E, C]
    index = token_index.unsqueeze(-1).expand(-1, -1, width)
    by_expert.scatter_(1, index, rows.view(*token_index.shape, width))
    return by_expert.transpose(0, 1)


def _encode_arrays(numbers: Channels | Computation) -> Json:
    """The fields by name, arrays written by `encode_float32`."""
    fields = dict(vars(numbers))
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            fields[name] = encode_float32(value)
    return fields
