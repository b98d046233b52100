"""Whether weights, gradients and moments fit into memory: a line of the plan that `fit` prints, and a refusal.

Activations aren't counted: if they are too large, `moevision.train.recipe.memory_advice` says what takes less.
"""

from __future__ import annotations

from math import ceil

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from moevision.errors import UserError
from moevision.layers import moe_layers
from moevision.limits import usable_memory_bytes
from moevision.train.ema import WeightEMA
from moevision.train.optim import matrices_of
from moevision.train.provenance import device_name
from moevision.train.task import ClassificationTask

_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")  # under the others weights are not fp32


def describe_memory(task: ClassificationTask, trainer: L.Trainer) -> str | None:
    """What weights, gradients and moments take of the memory; None: not known."""
    capacity, _ = _memory(trainer)
    if capacity is None or trainer.precision not in _PRECISIONS:
        return None
    size, where = sum(_kept(state_bytes(task, trainer), trainer)), "main memory" if _offloads(trainer) else "memory"
    return f"{where}: weights, gradients and moments {size / 1e9:.2f} of {capacity / 1e9:.1f} GB, without activations"


def check_memory(task: ClassificationTask, trainer: L.Trainer, *, goes_on: bool = False) -> None:
    """Raise a UserError for a training whose weights, gradients and moments alone are larger than the memory.

    One that goes on keeps its model.
    """
    (capacity, where), whole = _memory(trainer), state_bytes(task, trainer)
    dense, experts = _kept(whole, trainer)
    if capacity is None or trainer.precision not in _PRECISIONS or dense + experts <= capacity:
        return
    ways = ["a device with more memory" if goes_on else "fewer experts (--model.arch.num_experts) or a smaller model"]
    if trainer.strategy.root_device.type == "cuda" and not _offloads(trainer):
        ways.append(f"--parallel fsdp on {ceil(sum(whole) / capacity)} GPUs or more")
        if dense < whole[0]:  # it is divided already
            ways.append("--parallel.offload true")
    raise UserError(
        f"Weights, gradients and moments of this model take {(dense + experts) / 1e9:.1f} GB, and {where} has "
        f"{capacity / 1e9:.1f} GB: use {' or '.join(ways)}; --force tries it all the same."
    )


def state_bytes(task: ClassificationTask, trainer: L.Trainer) -> tuple[int, int]:
    """Bytes of fp32 weights, their moving average, gradients and moments: of all but the experts, and of these."""
    of_experts = {id(p) for layer in moe_layers(task.net) for p in layer.experts.parameters()}
    matrices = matrices_of(task.net) if task.optim.name == "muon" else set[str]()  # one moment; AdamW keeps two
    weights, size = 1 if WeightEMA.of(trainer) is None else 2, {False: 0, True: 0}
    for name, p in task.net.named_parameters():
        learning = (2 if name in matrices else 3) if p.requires_grad else 0
        size[id(p) in of_experts] += 4 * p.numel() * (weights + learning)
    return size[False], size[True]


def _kept(whole: tuple[int, int], trainer: L.Trainer) -> tuple[float, float]:
    """What one process keeps: FSDP2 divides all of it, expert parallelism the experts, every other strategy copies."""
    strategy = trainer.strategy
    sharded = isinstance(strategy, FSDPStrategy | ModelParallelStrategy) and not getattr(strategy, "replicated", False)
    processes = trainer.world_size if sharded else 1
    return whole[0] / processes, whole[1] / max(processes, getattr(strategy, "expert", 1))


def _offloads(trainer: L.Trainer) -> bool:
    return getattr(trainer.strategy, "offload", False)


def _memory(trainer: L.Trainer) -> tuple[int | None, str]:
    """Bytes and name of the memory that a process has, an equal part of a machine's; None: the system doesn't say."""
    device = trainer.strategy.root_device
    if device.type == "cuda" and not _offloads(trainer):
        return torch.cuda.mem_get_info(device)[1], device_name(trainer)
    machine = usable_memory_bytes()
    where = "each process's part of the main memory" if _offloads(trainer) else device_name(trainer)
    return machine and machine // trainer.num_devices, where
