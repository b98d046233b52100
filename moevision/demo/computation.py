"""How a layer computed each patch, in numbers: scores, what every chosen expert gave, their sum, the residual stream.

`listen` is a scope around a forward pass. It keeps what the layers compute anyway (the experts' rows, the output, the
residual stream before and after), so that the numbers cost norms and no second pass.

Axes: N tokens of one image (prefix tokens first), P patches, D width, E experts, K choices (E where experts choose
patches or mix them), R rows, C patches of an expert, S slots of an expert.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moevision.demo.wire import packed
from moevision.layers import ExpertChoiceRouting, MoEMlp, Routing, SoftRouting, moe_layers, routing_lock

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Computation:
    """The numbers of one layer for the patches of one image; lengths are Euclidean norms of vectors of width D.

    Attributes:
        scores: [P, E] the router's clean logits.
        noise: [P, E] what was added to them, as in training; None without.
        bias: [E] what is added to an affinity for the choice alone; None without.
        outputs: [P, K] length of what each chosen expert gave, before its weight; of Soft MoE, of the weighted mean of
            the expert's slots; 0 where the expert didn't take the patch.
        shared: [P] length of what the shared experts gave; None without.
        total: [P] length of the weighted sum, shared experts included: the layer's output.
        before: [P] length of the residual stream that the block's MLP branch reads; None if the layer doesn't stand
            behind a norm in a residual branch.
        added: [P] length of what the branch adds to it: the layer's output, after a layer scale if there is one.
        after: [P] length of the stream behind the block.
    """

    scores: Floats
    noise: Floats | None
    bias: Floats | None
    outputs: Floats
    shared: Floats | None
    total: Floats
    before: Floats | None
    added: Floats | None
    after: Floats | None

    def to_json(self) -> dict[str, Any]:
        """Each array by name as `wire.packed` writes it, or None."""
        return {name: None if value is None else packed(value) for name, value in vars(self).items()}


@dataclass
class Heard:
    """What one MoE layer computed while the scope was open."""

    layer: MoEMlp
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

        Args:
            routing: the decision.
            noisy: whether the router drew noise for it; it must be back in evaluation.
        """
        assert self.tokens is not None
        assert self.output is not None
        first = routing.num_prefix_tokens
        x = self.tokens.flatten(0, -2)  # [N, D]; one image

        def lengths(values: Tensor) -> Floats:
            return _numpy(_length(values.flatten(0, -2))[first:])

        # Behind a norm in a residual branch the norm's output is the layer's very input.
        before, after = (self.before, self.after) if self.normed is self.tokens else (None, None)
        bias = getattr(self.layer.router, "bias", None)
        # Jitter shakes the patch itself: the clean logits are those of the router without it.
        clean = self.layer.router(self.tokens).logits if noisy else routing.logits
        return Computation(
            scores=_numpy(clean[0, first:]),
            noise=_numpy((routing.noisy_logits - clean)[0, first:]) if noisy else None,
            bias=_numpy(bias) if isinstance(bias, Tensor) else None,
            outputs=_numpy(self._expert_lengths(x, routing)[first:]),
            shared=None if self.shared is None else lengths(self.shared),
            total=lengths(self.output),
            before=None if before is None else lengths(before),
            added=None if before is None or after is None else lengths(after - before),
            after=None if after is None else lengths(after),
        )

    def _expert_lengths(self, x: Tensor, routing: Routing) -> Tensor:
        """[N, K] lengths of the experts' outputs, in the order of `routing.expert_index`."""
        experts = self.layer.experts
        sent = self.layer.dispatcher.dispatch(x.to(experts.compute_dtype(x)), routing)
        rows: Tensor = experts(sent.rows, sent.counts) if self.rows is None else self.rows  # dense: none were computed
        if isinstance(routing, SoftRouting):
            weight = routing.slot_weight[0].to(rows.dtype)  # [N, E, S]
            slots = rows.view(routing.num_experts, -1, rows.shape[-1])  # [E, S, D]
            share = weight.sum(-1).clamp_min(torch.finfo(rows.dtype).tiny)  # [N, E]
            mixed = _length(torch.einsum("nes,esd->ned", weight, slots)) / share
            return mixed.gather(-1, routing.expert_index[0])
        length = _length(rows)  # [R]
        if isinstance(routing, ExpertChoiceRouting):
            by_expert = length.new_zeros(routing.logits.shape[2], routing.logits.shape[1])  # [E, N]
            by_expert.scatter_(1, routing.token_index[0], length.view_as(routing.token_index[0]))
            return by_expert.mT.gather(-1, routing.expert_index[0])
        assert sent.position is not None  # token choice
        return length[sent.position]


@contextmanager
def listen(net: nn.Module) -> Iterator[list[Heard]]:
    """Keep what the MoE layers of `net` compute about one image; in this thread, and until the scope closes.

    Yields:
        One `Heard` per MoE layer, in order of depth; filled while the model runs.
    """
    heard = [Heard(layer) for layer in moe_layers(net)]
    parents = {child: module for module in net.modules() for child in module.children() if isinstance(child, MoEMlp)}
    thread = threading.get_ident()
    hooks = []

    def keep(module: Any, one: Heard, output: str, given: str | None = None) -> None:
        """Write what `module` gives, and what it was given, into fields of `one`."""

        def hook(_: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
            if threading.get_ident() == thread:
                vars(one).update({output: result} if given is None else {output: result, given: arguments[0]})

        if isinstance(module, nn.Module):
            hooks.append(module.register_forward_hook(hook))

    with routing_lock(net):
        for one in heard:
            block = parents.get(one.layer)
            keep(one.layer, one, "output", "tokens")
            keep(one.layer.experts, one, "rows")
            keep(one.layer.shared, one, "shared")
            keep(getattr(block, "norm2", None), one, "normed", "before")
            keep(block, one, "after")
        try:
            yield heard
        finally:
            for hook in hooks:
                hook.remove()


def _length(vectors: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(vectors.float(), dim=-1)
    return length


def _numpy(values: Tensor) -> Floats:
    array: Floats = values.detach().float().cpu().numpy()
    return array
