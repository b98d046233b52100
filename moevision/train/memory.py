"""How much memory a training takes, before it starts: one line of the plan that `fit` prints, and a refusal.

Formulas: `moevision.train.planner`; what they need to know of a model: `moevision.train.footprint`.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from math import ceil
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from moevision.errors import UserError
from moevision.layers import moe_layers
from moevision.limits import usable_memory_bytes
from moevision.train.footprint import count_weights, shape_of
from moevision.train.guard import GuardConfig, StabilityGuard
from moevision.train.optim import WeightEMA
from moevision.train.planner import Job, Layout, Parallel, Weights, memory, state_bytes
from moevision.train.provenance import device_name
from moevision.train.strategy import MoEParallelStrategy

if TYPE_CHECKING:
    from moevision.data import ImageDataModule
    from moevision.train.task import ClassificationTask

# Of products, by --trainer.precision; under the others weights are no longer fp32, and nothing is estimated.
_DTYPES: dict[Any, torch.dtype] = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}


def describe_memory(
    task: ClassificationTask, data: ImageDataModule, trainer: L.Trainer, *, goes_on: bool = False
) -> str | None:
    """How much memory the training is expected to take, and what takes less if that is too much; None: not known.

    A training that goes on keeps its batch: there blocks are computed again.
    """
    dtype, capacity = _DTYPES.get(trainer.precision), device_memory_bytes(trainer)
    if dtype is None or capacity is None:
        return None
    try:
        shape = shape_of(task.net, data.image_size, optimizer=task.optim.name, dtype=dtype)
    except Exception as error:  # whatever torch can't do without weights: an estimate is no reason not to train
        return f"memory: not estimated ({type(error).__name__}: {error})"
    layout = layout_of(trainer)
    batch = data.batch_size * trainer.world_size
    guard = _guard(trainer)
    job = Job(trainer.world_size, batch, ema=_averages(trainer), snapshots=guard.snapshots if guard else 0)
    found = memory(shape, layout, job)
    on_disk = guard is not None and guard.on_disk(trainer.num_devices * found.snapshots)
    snapshots = 0.0 if on_disk or trainer.strategy.root_device.type != "cpu" else found.snapshots
    size = found.total + snapshots
    states = f"weights, gradients and moments {found.states / 1e9:.2f}"
    said = (
        f"memory: about {size / 1e9:.2f} of {capacity / 1e9:.1f} GB: {'' if found.offload else f'{states}, '}"
        f"copies of weights {(found.copies + found.buckets) / 1e9:.2f}, activations "
        f"{(found.activations + found.rows) / 1e9:.2f}"
    )
    if found.offload:
        said += f"; in main memory {states}"
    where = "the guard's snapshots" + ("" if snapshots else " on disk" if on_disk else " in main memory")
    said += f"{', ' if snapshots else '; '}{where} {found.snapshots / 1e9:.2f}"
    if size <= capacity:
        return said
    if goes_on or data.batch_size == 1:
        again = replace(shape, recomputed=tuple(range(shape.depth)))
        size = memory(again, layout, job).total + snapshots
        return f"{said}; with --model.grad_checkpointing true: {size / 1e9:.2f}"
    for smaller in (job, *job.in_more_parts()):
        size = memory(shape, layout, smaller).total + snapshots
        if size <= capacity:
            break
    micro, times = data.batch_size // smaller.accumulate, smaller.accumulate * trainer.accumulate_grad_batches
    return f"{said}; with --data.batch_size {micro} --trainer.accumulate_grad_batches {times}: {size / 1e9:.2f}"


def check_memory(task: ClassificationTask, trainer: L.Trainer, *, goes_on: bool = False) -> None:
    """Refuse a training whose weights, gradients and moments alone are larger than the memory.

    One that goes on keeps its model.

    Raises:
        UserError: if so, with the nearest that fits.
    """
    capacity, layout, where = device_memory_bytes(trainer), layout_of(trainer), device_name(trainer)
    if layout.offload:
        capacity, where = _main_memory_bytes(trainer), "each process's part of the main memory"
    if capacity is None or trainer.precision not in _DTYPES:
        return
    dense, experts = count_weights(task.net, task.optim.name)
    ema = _averages(trainer)
    size = sum(state_bytes(dense, experts, layout, trainer.world_size, ema=ema))
    if size <= capacity:
        return
    ways = []
    layers = moe_layers(task.net)
    counts = {layer.router.num_experts for layer in layers}
    most = counts.pop() if len(counts) == 1 and not goes_on else 0  # a list of numbers isn't halved
    fewer = most // 2
    while fewer >= max((layer.router.top_k for layer in layers), default=1):
        fewest = Weights(*(number * fewer // most for number in asdict(experts).values()))
        smaller = sum(state_bytes(dense, fewest, layout, trainer.world_size, ema=ema))
        if smaller <= capacity:
            ways.append(f"--model.arch.num_experts {fewer} ({smaller / 1e9:.1f} GB)")
            break
        fewer //= 2
    if trainer.strategy.root_device.type == "cuda" and not layout.offload:
        whole = sum(state_bytes(dense, experts, Layout(), 1, ema=ema))
        ways.append(f"--parallel fsdp on {ceil(whole / capacity)} GPUs or more")
        if layout.parallel == "fsdp":
            ways.append("--parallel.offload true")
    other = "a device with more memory" if goes_on else "a smaller model"
    raise UserError(
        f"Weights, gradients and moments of this model take {size / 1e9:.1f} GB, and {where} has "
        f"{capacity / 1e9:.1f} GB: use {' or '.join(ways) or other}; --force tries it all the same."
    )


def device_memory_bytes(trainer: L.Trainer) -> int | None:
    """All memory of the device that a process trains on, a CPU's shared equally; None where the system doesn't say."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return _main_memory_bytes(trainer)


def _main_memory_bytes(trainer: L.Trainer) -> int | None:
    """A process's part of this machine's."""
    machine = usable_memory_bytes()
    return None if machine is None else machine // trainer.num_devices


def layout_of(trainer: L.Trainer) -> Layout:
    """How a Trainer spreads the weights: FSDP2 divides them over all processes, every other strategy copies them."""
    if isinstance(trainer.strategy, MoEParallelStrategy):
        parallel: Parallel = "ddp" if trainer.strategy.replicated else "fsdp"
        apart = trainer.strategy.root_device.type == "cuda"  # a CPU's memory is the main memory
        return Layout(parallel, trainer.strategy.expert, trainer.strategy.offload and apart)
    return Layout("fsdp" if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy) else "ddp")


def _averages(trainer: L.Trainer) -> bool:
    return WeightEMA.of(trainer) is not None


def _guard(trainer: L.Trainer) -> GuardConfig | None:
    """The thresholds of this training's guard, if it has one."""
    guards = (each for each in cast(Any, trainer).callbacks if isinstance(each, StabilityGuard))
    return next((guard.config for guard in guards), None)
