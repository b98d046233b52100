"""How fast this machine really multiplies matrices.

A vendor's peak says nothing about a laptop, two cores of a shared server or a card under a power cap; a matrix product
of torch's own on the same machine does. MFU is the share of this measured peak: compare it between programs on one
machine, not between machines.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_CPU_SIZES = (512, 1024, 2048)
_GPU_SIZES = (2048, 4096, 8192)
_PATIENCE = 2.0


def matmul_peak(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    sizes: Sequence[int] | None = None,
    seconds: float = 1.0,
) -> float:
    """FLOPs per second of square matrix products: the median of the best size.

    Args:
        device: where to multiply.
        dtype: float32 follows `torch.set_float32_matmul_precision`, as a model does.
        sizes: sides of the matrices.
        seconds: measuring time, shared by the sizes; the first product of each comes on top. A size is left out if one
            product would take more than twice as long by the rate so far.
    """
    device = torch.device(device)
    sizes = sorted(sizes or (_CPU_SIZES if device.type == "cpu" else _GPU_SIZES))
    best = 0.0
    for size in sizes:
        # bfloat16 on a processor without AVX512 takes minutes for a large product and gets no faster.
        if best and 2 * size**3 / best > _PATIENCE * seconds:
            break
        # Ones would do for speed on a CPU; on a GPU equal bits draw less power and clock higher than real data does.
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        names = {"a": a, "b": b, "out": torch.empty_like(a)}
        median_s = _median_s("torch.mm(a, b, out=out)", names, seconds / len(sizes))
        best = max(best, 2 * size**3 / median_s)
    return best


def _median_s(statement: str, names: dict[str, torch.Tensor], seconds: float) -> float:
    """Median seconds of a statement, synchronised on a GPU."""
    from torch.utils.benchmark import Timer

    # Timer sets one thread unless it is told otherwise.
    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=seconds).median)
