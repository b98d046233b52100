"""One training step, as `moevision fit` does it on one batch, without a Trainer around it.

Forward under autocast, cross-entropy and balance losses in float32, backward, clipping of the global norm, fused
AdamW, and the routers' biases where they have some. What a Trainer adds (logging, callbacks, the guard) is in
`lightning_peer.py`.

Axes: B images, C classes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moevision.commands.benchmark.phases import PhaseClock
from moevision.commands.benchmark.subject import Subject, Which
from moevision.layers import forward_routing, label_oracle, update_router_bias
from moevision.models.vit_moe import num_patches, set_fused_attention, trains_unfused
from moevision.train.optim import build_optimizer

CLIP_NORM = 1.0  # as in `moevision fit`
_TOTAL_STEPS = 100_000  # of the schedule, of which a benchmark sees the beginning


class TrainingStep:
    """A model with its optimizer; calling it with a batch takes one step.

    Args:
        subject: what to train.
        which: the MoE model or one of its twins.
        precision: `bf16` (autocast) or `fp32`.
        device: where.
        compiled: compile each block at the first steps, as `--model.compile` does.
    """

    def __init__(
        self, subject: Subject, which: Which, precision: str, device: torch.device, *, compiled: bool = False
    ) -> None:
        self.subject, self.device, self.bf16 = subject, device, precision == "bf16"
        self.net: nn.Module = subject.build(which).to(device)
        if compiled:
            for block in cast(Any, self.net).blocks:
                block.compile()
        tokens, dtype = num_patches(self.net), torch.bfloat16 if self.bf16 else torch.float32
        set_fused_attention(self.net, tokens is None or not trains_unfused(device, dtype, tokens))
        self.aux_loss = subject.aux_loss()
        self.optimizer, self.schedule = build_optimizer(
            self.net, subject.optimizer_config(), total_steps=_TOTAL_STEPS, fused=True
        )

    def __call__(self, images: Tensor, labels: Tensor, clock: PhaseClock | None = None) -> None:
        """Take a step on images [B, 3, S, S] with labels [B]; `clock` is told what is being done."""

        def phase(name: str) -> AbstractContextManager[None]:
            return nullcontext() if clock is None else clock.phase(name)

        with phase("rest"):
            self.aux_loss.start_window()
            with phase("rest of the forward pass"), self.autocast(), label_oracle(self.net, labels):
                logits, routings = forward_routing(self.net, images)
            with phase("losses"):
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.subject.label_smoothing)
                aux, _ = self.aux_loss(routings)
                loss = loss if aux is None else loss + aux
            counts = [routing.requested_counts() for routing in routings]
            with phase("backward"):
                loss.backward()
            with phase("clip and optimizer"):
                torch.nn.utils.clip_grad_norm_(self.net.parameters(), CLIP_NORM)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
                update_router_bias(self.net, counts)

    def autocast(self) -> AbstractContextManager[object]:
        """The scope of the forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()


def noise_batch(subject: Subject, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images [B, 3, S, S] and labels [B] that need no data set: the time of a step doesn't depend on what they show."""
    generator = torch.Generator().manual_seed(seed)
    size, batch = subject.image_size, subject.batch_size
    images = torch.randn(batch, 3, size, size, generator=generator)
    labels = torch.randint(subject.num_classes, (batch,), generator=generator)
    return images.to(device), labels.to(device)
