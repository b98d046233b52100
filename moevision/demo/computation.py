"""The numbers of an MoE layer's computation per patch: scores, outputs of the experts, their sum, the residual stream.

`capture_activations` is a context manager for a forward pass. Its hooks store what the layers compute anyway (the
experts' rows, the output, the residual stream before and after), so that no second pass is needed.

Shapes: N tokens of one image (prefix tokens first), P patches, D width, E experts, K choices of a patch (K = E for
expert choice and Soft MoE), R rows of all experts, C tokens taken by an expert (expert choice), S slots of an expert
(Soft MoE), V shown channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moevision.demo.wire import encode_float32, to_numpy
from moevision.layers import (
    ExpertChoiceRouting,
    MoEMlp,
    Routing,
    SoftRouting,
    moe_layers,
    routing_lock,
)
from moevision.types import Floats, Json

MAX_CHANNELS = 8  # of a vector; more can't be drawn legibly


@dataclass(frozen=True, kw_only=True)
class Channels:
    """A few channels of each vector, with which a reader can recompute the layer's sums.

    They are the channels that the layer changes most in this image. The layer's output for a patch is
    `Σ weight · outputs + shared = total`, and the residual stream becomes `before + scale · total = after`. `scale`,
    `before` and `after` are None unless the layer reads a norm in a residual branch.
    """

    of: int  # D
    hidden: int  # width of an expert's hidden layer
    index: list[int]  # [V] indices of the shown channels, increasing
    scale: Floats | None  # [V] the block's layer scale; 1 if it has none
    read: Floats  # [P, V] input of the router and the experts
    outputs: Floats  # [P, K, V] unweighted output of each chosen expert
    shared: Floats | None = None  # [P, V] output of the shared experts; None without them
    total: Floats  # [P, V] output of the layer
    before: Floats | None = None  # [P, V] residual stream that enters the block's MLP branch
    after: Floats | None = None  # [P, V] residual stream after the block


@dataclass(frozen=True, kw_only=True)
class Computation:
    """The numbers of one layer for the patches of one image; norms are Euclidean, over the width D.

    `before` and `after` are None unless the layer reads a norm in a residual branch.
    """

    scores: Floats  # [P, E] the router's logits without noise
    noise: Floats | None  # [P, E] training noise that was added to them; None without noise
    bias: Floats | None  # [E] added to affinities for the choice, not for the weights; None without
    # [P, K] norm of the unweighted output of each chosen expert. Soft MoE: of the weighted mean of the expert's slots.
    # Expert choice: 0 where the expert didn't take the patch.
    outputs: Floats
    shared: Floats | None = None  # [P] norm of the output of the shared experts; None without them
    total: Floats  # [P] norm of the layer's output, shared experts included
    before: Floats | None = (
        None  # [P] norm of the residual stream that enters the block's MLP branch
    )
    after: Floats | None = None  # [P] norm of the residual stream after the block
    channels: Channels  # the same vectors by channel, for a few channels

    def to_json(self) -> Json:
        """The fields by name, arrays encoded by `encode_float32`; `channels` is a nested object."""
        return {**_encode_arrays(self), "channels": _encode_arrays(self.channels)}


@dataclass
class LayerActivations:
    """What went into and came out of one MoE layer, its parts and its block, stored by hooks.

    By name: `layer` [1, N, D], `experts` [R, D] sorted by expert, `shared` [N, D], `norm` (the block's second) and
    `block` [1, N, D]; those that the model has.
    """

    layer: MoEMlp
    block: nn.Module | None  # that contains the layer
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def register_hooks(self, hooks: ExitStack) -> None:
        """Hook the modules, so that each pass stores their activations; closing `hooks` ends it."""
        modules = {
            "layer": self.layer,
            "experts": self.layer.experts,
            "shared": self.layer.shared,
            "norm": getattr(self.block, "norm2", None),
            "block": self.block,
        }
        for name, module in modules.items():
            if isinstance(module, nn.Module):
                hook = partial(self._store, name)
                hooks.enter_context(module.register_forward_hook(hook))

    def _store(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.inputs[name] = inputs[0]
        self.outputs[name] = output

    @property
    def in_residual_branch(self) -> bool:
        """Whether the layer is in a residual branch, right after a norm: its input is the norm's output tensor."""
        return self.outputs.get("norm") is self.inputs["layer"]

    @torch.inference_mode()
    def computation(self, routing: Routing, *, noisy: bool = False) -> Computation:
        """The numbers of the image's patches; `routing` must come from the same forward pass.

        `noisy` says whether the router drew noise in that pass. By now it must be in evaluation mode again.
        """
        first_patch = routing.num_prefix_tokens
        router = self.layer.router
        vectors = self._patch_vectors(routing)

        clean_logits = routing.logits  # [1, N, E]
        noise = None
        if noisy:
            # Jitter changes the router's input, and with it `routing.logits`: route again without noise.
            clean_logits = router(self.inputs["layer"]).logits
            noise = to_numpy((routing.noisy_logits - clean_logits)[0, first_patch:])

        bias = getattr(router, "bias", None)
        norms: dict[str, Any] = {
            name: to_numpy(torch.linalg.vector_norm(vector.float(), dim=-1))
            for name, vector in vectors.items()
        }
        return Computation(
            scores=to_numpy(clean_logits[0, first_patch:]),
            noise=noise,
            bias=to_numpy(bias) if isinstance(bias, Tensor) else None,
            **norms,
            channels=self._largest_channels(vectors, first_patch),
        )

    def _patch_vectors(self, routing: Routing) -> dict[str, Tensor]:
        """The available vectors of the patches by field of `Computation`: [P, D], but `outputs` [P, K, D]."""
        activations = {"total": self.outputs["layer"]}
        if self.layer.shared is not None:
            activations["shared"] = self.outputs["shared"]
        if self.in_residual_branch:
            activations["before"] = self.inputs["norm"]
            activations["after"] = self.outputs["block"]

        first_patch = routing.num_prefix_tokens
        vectors = {"outputs": self._expert_outputs(routing)[first_patch:]}
        for name, activation in activations.items():
            vectors[name] = activation.flatten(0, -2)[first_patch:]  # [N, D] -> [P, D]
        return vectors

    def _largest_channels(self, vectors: dict[str, Tensor], first_patch: int) -> Channels:
        """Those channels of `vectors` (`_patch_vectors`) that the layer changes most, by mean absolute change."""
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

        patches = self.inputs["layer"].flatten(0, -2)[first_patch:]  # [P, D]; one image
        channels: dict[str, Any] = {
            name: to_numpy(vector[..., index]) for name, vector in vectors.items()
        }
        return Channels(
            of=patches.shape[-1],
            hidden=self.layer.experts.fc1.out_features,
            index=index.tolist(),
            scale=scale,
            read=to_numpy(patches[:, index]),
            **channels,
        )

    def _expert_outputs(self, routing: Routing) -> Tensor:
        """[N, K, D] unweighted output of each chosen expert, in the order of `routing.expert_index`."""
        tokens = self.inputs["layer"].flatten(0, -2)  # [N, D]; one image
        experts = self.layer.experts
        inputs = tokens.to(experts.compute_dtype(tokens))
        dispatched = self.layer.dispatcher.dispatch(inputs, routing)
        rows = self.outputs.get("experts")  # [R, D]
        if rows is None:  # the dense backend doesn't call this module
            rows = experts(dispatched.rows, dispatched.counts)

        if isinstance(routing, SoftRouting):
            by_expert = _slot_means(rows, routing)  # [N, E, D]
        elif isinstance(routing, ExpertChoiceRouting):
            by_expert = _scatter_to_tokens(rows, routing)  # [N, E, D]
        else:
            # Token choice: `position` [N, K] says in which row each choice was computed.
            assert dispatched.position is not None
            return rows[dispatched.position]

        # From order of expert to order of choice.
        index = routing.expert_index[0].unsqueeze(-1)  # [N, K, 1]
        return by_expert.gather(1, index.expand(-1, -1, by_expert.shape[-1]))


@contextmanager
def capture_activations(net: nn.Module) -> Iterator[list[LayerActivations]]:
    """Within the context, store the activations of the MoE layers of `net` for one image.

    It yields one `LayerActivations` per MoE layer, in order of depth; they are filled while the model runs.
    """
    parent_of = {child: module for module in net.modules() for child in module.children()}
    activations = [LayerActivations(layer, parent_of.get(layer)) for layer in moe_layers(net)]
    with routing_lock(net), ExitStack() as hooks:
        for of_layer in activations:
            of_layer.register_hooks(hooks)
        yield activations


def _slot_means(rows: Tensor, routing: SoftRouting) -> Tensor:
    """[N, E, D] for each token the weighted mean of each expert's slots; rows are [E · S, D]."""
    weight = routing.slot_weight[0].to(rows.dtype)  # [N, E, S]
    slots = rows.view(routing.num_experts, -1, rows.shape[-1])  # [E, S, D]
    smallest = torch.finfo(rows.dtype).tiny  # against 0 / 0
    weight_sum = weight.sum(-1, keepdim=True).clamp_min(smallest)  # [N, E, 1]
    return torch.einsum("nes,esd->ned", weight, slots) / weight_sum


def _scatter_to_tokens(rows: Tensor, routing: ExpertChoiceRouting) -> Tensor:
    """[N, E, D] output of each expert for each token, 0 where the expert didn't take it; rows are [E · C, D]."""
    _, num_tokens, num_experts = routing.logits.shape
    width = rows.shape[-1]
    by_expert = rows.new_zeros(num_experts, num_tokens, width)  # [E, N, D]
    token_index = routing.token_index[0]  # [E, C]
    index = token_index.unsqueeze(-1).expand(-1, -1, width)  # [E, C, D]
    by_expert.scatter_(1, index, rows.view(*token_index.shape, width))
    return by_expert.transpose(0, 1)


def _encode_arrays(numbers: Channels | Computation) -> Json:
    """The fields by name, arrays encoded by `encode_float32`."""
    fields = dict(vars(numbers))
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            fields[name] = encode_float32(value)
    return fields
