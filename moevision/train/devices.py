"""Which device a training will have, for what is chosen before there is a Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

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
