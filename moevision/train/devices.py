"""Which device a training will have, and how several processes share it: what is asked before there is a Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch

from moevision.errors import UserError

_accelerator: ContextVar[str | None] = ContextVar("accelerator", default=None)


@contextmanager
def trains_on(accelerator: str | None) -> Iterator[None]:
    """Inside, the training has what `--trainer.accelerator` names; None: it wasn't given."""
    before = _accelerator.set(accelerator)
    try:
        yield
    finally:
        _accelerator.reset(before)


def has_gpu() -> bool:
    """Whether the training will have a GPU of CUDA or ROCm. Apple's isn't used: it has no float64."""
    return _accelerator.get() != "cpu" and torch.cuda.is_available()


@dataclass(frozen=True)
class ParallelConfig:
    """How several processes (--trainer.devices N, torchrun, srun) share a training; null: by --trainer.strategy.

    Attributes:
        layout: `ddp`: every process has all weights. `fsdp`: weights, gradients and moments are sharded (FSDP2).
        expert: processes that one set of experts is divided among; tokens travel to their experts.
        offload: keep weights, gradients and moments in main memory, and a block's weights on the GPU while it computes.
    """

    layout: Literal["ddp", "fsdp"] | None = None
    expert: int = 1
    offload: bool = False

    def __post_init__(self) -> None:
        """Refuse experts that are divided while it isn't said how the rest is."""
        if self.expert < 1:
            raise UserError(f"--parallel.expert is {self.expert}: it must be at least 1.")
        if self.expert > 1 and self.layout is None:
            raise UserError(
                "--parallel.expert divides the experts: say --parallel fsdp or --parallel ddp for the rest."
            )
        if self.offload and self.layout != "fsdp":
            raise UserError("--parallel.offload moves what --parallel fsdp has divided: use both.")

    def strategy(self, asked: Any) -> dict[str, Any]:
        """The Trainer's argument.

        Args:
            asked: --trainer.strategy.

        Raises:
            UserError: if both say something.
        """
        if self.layout is None:
            return {}
        if asked not in ("auto", self.layout):
            raise UserError(f"--parallel {self.layout} and --trainer.strategy {asked} are two ways to say it: use one.")
        replicated = self.layout == "ddp"
        if replicated and self.expert == 1:
            return {"strategy": "ddp"}
        from moevision.train.parallel.strategy import MoEParallelStrategy

        return {"strategy": MoEParallelStrategy(self.expert, replicated=replicated, offload=self.offload)}


def parallel_strategy(trainer: L.Trainer) -> Any:
    """The `MoEParallelStrategy` of this trainer; None where every process has all weights."""
    return trainer.strategy if hasattr(trainer.strategy, "replicated") else None
