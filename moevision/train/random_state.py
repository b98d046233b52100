"""The state of every global random generator as plain data, so that it may lie in a checkpoint.

Python's, NumPy's, torch's on the CPU and on every CUDA device. A checkpoint is read with `weights_only=True`, which
takes tensors and primitives but not NumPy's own state object; Lightning saves none of them (2.6.6, dump_checkpoint).
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from moevision.data.transforms import hash_u64


def random_state() -> dict[str, Any]:
    """The generators' states of this process: tensors, lists, numbers and strings only."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def part_random_state(rank: int) -> None:
    """Let this process draw other numbers than those that began with the same seed: its dropout is its own."""
    seed = hash_u64(torch.initial_seed(), rank)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def restore_random_state(state: dict[str, Any]) -> None:
    """Put every generator back to `state`; CUDA generators only if there are as many devices as then."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.random.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([device.cpu() for device in state["cuda"]])
