"""What a pass over a batch of images executes, and how much of it the model needed.

- executed: every product that ran, with the rows that the dispatcher adds so that groups have few different sizes,
  choices that a capacity dropped, experts that nobody chose (`dense`), and whatever checkpointing and fused attention
  compute a second time.
- useful: what the definition of the model asks for: the experts' part counts kept choices only (slots for experts
  that choose or mix tokens), and nothing counts twice. MFU is made of these (Chowdhery et al. 2022, PaLM,
  arXiv:2204.02311, appendix B).

Both are counted, not estimated. Axes: B images.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from moevision.efficiency.counter import flop_counter, recomputed_attention_flops
from moevision.efficiency.layer_flops import count_layers
from moevision.layers import label_oracle


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one batch.

    Attributes:
        images: B.
        executed: everything that ran.
        useful: what the model needs.
        router: the routers' part of both.
        experts_executed: what ran of the routed experts, one computation of each row.
        experts_useful: the part of it that reached an output.
    """

    images: int
    executed: int
    useful: int
    router: int
    experts_executed: int
    experts_useful: int

    @property
    def executed_per_image(self) -> float:
        """Executed FLOPs per image."""
        return self.executed / self.images

    @property
    def useful_per_image(self) -> float:
        """Useful FLOPs per image."""
        return self.useful / self.images

    @property
    def padding_waste(self) -> float:
        """1 - useful / executed of the routed experts, in [0, 1); 0 for a dense model."""
        return 1 - self.experts_useful / self.experts_executed if self.experts_executed else 0.0

    @property
    def waste(self) -> float:
        """1 - useful / executed of the whole pass: `padding_waste` diluted, and what was computed twice."""
        return 1 - self.useful / self.executed


def inference_flops(
    model: nn.Module, images: Tensor, *, labels: Tensor | None = None, autocast: torch.dtype | None = None
) -> FlopCount:
    """Count one forward pass in eval mode without gradients; the model is left as it was.

    Args:
        model: an image model, MoE or dense.
        images: [B, 3, H, W] on the model's device; padding depends on where their tokens go.
        labels: [B] classes, which only the router `label` wants; zeros if None.
        autocast: dtype of autocast; None for none.
    """
    return _count(model, images, labels, autocast, training=False)


def training_flops(
    model: nn.Module, images: Tensor, *, labels: Tensor | None = None, autocast: torch.dtype | None = None
) -> FlopCount:
    """Count one forward and backward pass in train mode.

    On a copy of the model: its gradients, running statistics and random numbers stay as they are. Losses and
    optimizers have no matrix products (Muon and its like, which do, are not counted).

    Args:
        model: an image model, MoE or dense; parameters that don't require a gradient cost none.
        images: [B, 3, H, W] on the model's device; the pixels get no gradient.
        labels: [B] classes, which only the router `label` wants; zeros if None.
        autocast: dtype of autocast; None for none.
    """
    once = _count(model, images, labels, autocast, training=True)
    if not getattr(model, "grad_checkpointing", False):
        return once
    with_checkpoints = _executed(model, images, labels, autocast)
    return FlopCount(**{**vars(once), "executed": with_checkpoints})


def _count(
    model: nn.Module, images: Tensor, labels: Tensor | None, autocast: torch.dtype | None, *, training: bool
) -> FlopCount:
    net = _copy(model, training, checkpointing=False)
    with flop_counter() as counter, _same_random_numbers(images), _told(net, labels, images):
        with _autocast(images, autocast), torch.set_grad_enabled(training):
            output, layers = count_layers(net, counter, lambda: net(images))
        if training:
            _loss(output).backward()
    executed = int(counter.get_total_flops())
    experts = [(layer.rows(), layer.kept_rows(), layer.per_row(backward=training)) for layer in layers]
    wasted = sum((rows - kept) * per_row for rows, kept, per_row in experts)
    return FlopCount(
        images=len(images),
        executed=executed,
        useful=executed - wasted - recomputed_attention_flops(counter),
        router=sum(layer.router_flops(backward=training) for layer in layers),
        experts_executed=sum(rows * per_row for rows, _, per_row in experts),
        experts_useful=sum(kept * per_row for _, kept, per_row in experts),
    )


def _executed(model: nn.Module, images: Tensor, labels: Tensor | None, autocast: torch.dtype | None) -> int:
    """FLOPs of a training pass with activation checkpointing, which runs forward passes twice."""
    net = _copy(model, True, checkpointing=True)
    with flop_counter() as counter, _same_random_numbers(images), _told(net, labels, images):
        with _autocast(images, autocast):
            output = net(images)
        _loss(output).backward()
    return int(counter.get_total_flops())


def _loss(output: Tensor) -> Tensor:
    """Any loss without a matrix product, whose gradient is no expanded tensor (`grouped_mm` refuses those)."""
    return output.float().square().mean()


def _copy(model: nn.Module, training: bool, *, checkpointing: bool) -> nn.Module:
    # The copy of a compiled block is an uncompiled one; `torch.compile(model)` wraps the model instead.
    net = copy.deepcopy(cast(nn.Module, getattr(model, "_orig_mod", model))).train(training)
    if getattr(net, "grad_checkpointing", False) and not checkpointing:
        cast(Any, net).set_grad_checkpointing(False)
    return net


def _told(model: nn.Module, labels: Tensor | None, images: Tensor) -> AbstractContextManager[None]:
    return label_oracle(model, torch.zeros(len(images), dtype=torch.int64) if labels is None else labels)


def _autocast(images: Tensor, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(images.device.type, dtype=dtype)


def _same_random_numbers(images: Tensor) -> AbstractContextManager[None]:
    return torch.random.fork_rng(devices=[images.device] if images.is_cuda else [])
