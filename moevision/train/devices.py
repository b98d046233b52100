"""Which device a training will have, and how several processes share it: what is asked before there is a Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import lightning as L
import torch

from moevision.config import ParallelConfig
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


def strategy_of(config: ParallelConfig, asked: Any) -> dict[str, Any]:
    """The Trainer's arguments; a UserError if --trainer.strategy, `asked`, says something else."""
    if config.layout is None:
        return {}
    if asked not in ("auto", config.layout):
        raise UserError(f"--parallel {config.layout} and --trainer.strategy {asked} are two ways to say it: use one.")
    replicated = config.layout == "ddp"
    if replicated and config.expert == 1:
        return {"strategy": "ddp"}
    from moevision.train.parallel.strategy import MoEParallelStrategy

    divided = MoEParallelStrategy(config.expert, replicated=replicated, offload=config.offload)
    # FSDP2 keeps what it gathers first, and writes to it later: it may not have been made in inference mode.
    return {"strategy": divided, "inference_mode": False}


def parallel_strategy(trainer: L.Trainer) -> Any:
    """The `MoEParallelStrategy` of this trainer; None where every process has all weights."""
    return trainer.strategy if hasattr(trainer.strategy, "replicated") else None
