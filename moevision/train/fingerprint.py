"""What the numbers of a training depend on besides its config: machine, threads, processes, libraries, pictures.

A resumed run is bit-identical to an uninterrupted one if all of this is the same; where it isn't, `differences` says
what can't be the same, before anything starts.
"""

from __future__ import annotations

import platform
from typing import Any

import lightning as L
import torch

from moevision import __version__
from moevision.train.plan import device_name
from moevision.train.provenance import LIBRARIES, cpu_model
from moevision.versions import package_version

# What a person calls each of them; libraries go by their own names.
_WORDS = {
    "processor": "the processor",
    "device": "the device",
    "threads": "the number of threads (OMP_NUM_THREADS)",
    "world_size": "the number of processes (--trainer.devices)",
    "precision": "the precision",
    "matmul_precision": "the precision of float32 products",
    "backend": "the experts' backend",
    "compile": "compilation",
    "python": "Python",
    "moevision": "moevision",
}
# Of these only a hash is known. Old checkpoints have no sizes, which are then not compared.
_OTHERS = {
    "data": "the list of pictures is another one",
    "sizes": "image files have other sizes than then, so other contents",
}


def fingerprint(trainer: L.Trainer, task: Any, data_sha256: str, sizes_sha256: str) -> dict[str, str | int | bool]:
    """What this process would compute with, as primitives.

    Args:
        trainer: the trainer.
        task: the ClassificationTask; its backend and compilation count.
        data_sha256: hash over the list of images with their splits and labels.
        sizes_sha256: hash over their sizes in bytes: another image of the same size isn't noticed.
    """
    device = trainer.strategy.root_device
    return {
        "processor": cpu_model(),
        "device": device.type if device.type == "cpu" else device_name(trainer),
        "threads": torch.get_num_threads(),
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "backend": task.arch.backend or "auto",
        "compile": task.compile_blocks,
        "python": platform.python_version(),
        "moevision": __version__,
        "data": data_sha256,
        "sizes": sizes_sha256,
        **{name: package_version(name) or "none" for name in LIBRARIES},
    }


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A phrase for everything that is not as it was, such as `the number of threads was 4, now 1`."""
    found = []
    for name, value in now.items():
        if name in then and then[name] != value:
            found.append(_OTHERS.get(name) or f"{_WORDS.get(name, name)} was {then[name]}, now {value}")
    if _OTHERS["data"] in found and _OTHERS["sizes"] in found:  # follows from it
        found.remove(_OTHERS["sizes"])
    return found
