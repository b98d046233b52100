"""The device, its threads, and how fast it multiplies matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moevision import allocator
from moevision.commands.benchmark.timing import rounded
from moevision.efficiency import matmul_peak
from moevision.errors import UserError
from moevision.train.recipe import default_precision

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def find_device(name: str) -> torch.device:
    """The device of this name; `auto`: CUDA if there is one, else the CPU.

    Raises:
        UserError: if it isn't there.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"There is no device {name!r}: give auto, cpu or cuda.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("There is no CUDA device here: leave --device out.")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"Measured is on cpu and cuda, not on {device.type}.")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def use_threads(threads: int | None) -> None:
    """Set the number of CPU threads, if one is given; and fp32 products as `moevision fit` has them."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")


def keep_memory_as_fit_does() -> None:
    """Everything that is measured in this process keeps the memory that it frees, as in `moevision fit`."""
    allocator.keep_freed_memory()


def usual_precision() -> str:
    """What `moevision fit` would use here, as a precision that is measured."""
    return "bf16" if default_precision() == "bf16-mixed" else "fp32"


def measure_peaks(device: torch.device, precisions: Sequence[str]) -> dict[str, float]:
    """The best rate of matrix products by precision, in FLOP/s."""
    return {name: rounded(matmul_peak(device, DTYPES[name]).flops_per_s) for name in dict.fromkeys(precisions)}
