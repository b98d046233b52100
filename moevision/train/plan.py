"""What `fit` says before it starts: model, device, precision, batch, steps, and minutes measured on a few steps."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import lightning as L
import torch
import torch.nn.functional as F

from moevision.data import ImageDataModule
from moevision.efficiency import parameter_counts
from moevision.errors import UserError
from moevision.layers import describe_moe, moe_layers
from moevision.train.recipe import SCRATCH_MINIMUM
from moevision.train.task import ClassificationTask


def describe_plan(task: ClassificationTask, data: ImageDataModule, trainer: L.Trainer) -> str:
    """The lines that `fit` prints after the data's own description."""
    train_images = sum(data.class_counts["train"].values())
    total, active = parameter_counts(task.net)
    lines = [
        f"model: {describe_model(task)}, {total / 1e6:.2f} M parameters of which {active / 1e6:.2f} M are active",
        f"device: {device_name(trainer)}, precision {trainer.precision}, batch {data.batch_size}"
        + (f" x {trainer.accumulate_grad_batches}" if trainer.accumulate_grad_batches > 1 else "")
        + (f" x {trainer.world_size} processes" if trainer.world_size > 1 else ""),
    ]
    epochs = trainer.max_epochs or 0
    seconds = seconds_per_batch(task, data, trainer)
    batches = max(1, train_images // (data.batch_size * trainer.world_size)) * max(0, epochs)
    if batches:
        minutes = batches * seconds / 60 * 1.1  # validation and loading, about a tenth
        speed = f"about {minutes:.0f} min at {data.batch_size * trainer.world_size / seconds:.0f} images/s"
        lines.append(f"plan: {epochs} epochs of {train_images:,} pictures, {speed}")
    if task.arch.pretrained is None and train_images < SCRATCH_MINIMUM and data.path != "synthetic_pets":
        lines.append(
            f"note: {train_images:,} pictures are few to learn from scratch; a pretrained start is usually far "
            "better: --pretrained NAME_OR_FOLDER (any timm ViT, e.g. deit_tiny_patch16_224)."
        )
    if _has_idle_nvidia_card():
        lines.append(
            "note: there is an NVIDIA card, but this torch was built for the CPU only: install one for CUDA, see "
            "https://pytorch.org/get-started/locally/."
        )
    return "\n".join(lines)


def _has_idle_nvidia_card() -> bool:
    return torch.version.cuda is None and torch.version.hip is None and shutil.which("nvidia-smi") is not None


@contextmanager
def memory_advice(batch_size: int, accumulated: int) -> Iterator[None]:
    """Turn "out of memory" into advice that trains nearly alike: half the batch, twice the accumulation.

    The gradient of the cross-entropy and of the z loss stays the same; that of the other balance losses is approximate
    (`moevision.losses.AuxLoss`), and BatchNorm, as in the convolutional stem, normalises each micro-batch on its own.

    Raises:
        UserError: if memory runs out, on whatever device.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()  # CUDA has a class for it; MPS and CPU only say so
        if "out of memory" not in text and "can't allocate memory" not in text:
            raise
        raise UserError(
            f"Memory is too small for a batch of {batch_size}: use --data.batch_size {max(1, batch_size // 2)} "
            f"--trainer.accumulate_grad_batches {2 * accumulated}, which trains nearly alike (balance losses and "
            "BatchNorm see the batch in parts)."
        ) from error


def describe_model(task: ClassificationTask) -> str:
    """Name and what is mixed, in words."""
    layers = moe_layers(task.net)
    name = task.arch.base or task.arch.pretrained or task.arch.name
    if not layers:
        return f"dense twin of {name}"
    return f"{name} with {describe_moe(layers)}"


def device_name(trainer: L.Trainer) -> str:
    """The device as people know it."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def seconds_per_batch(task: ClassificationTask, data: ImageDataModule, trainer: L.Trainer) -> float:
    """Forward and backward of one batch of noise, on a copy of the model: the fastest of up to eight in ten seconds.

    The first steps compile kernels for the shapes that occur, so they say little.
    """
    device = trainer.strategy.root_device
    net = copy.deepcopy(task.net).to(device).train()
    image = torch.randn(data.batch_size, 3, data.image_size, data.image_size, device=device)
    label = torch.zeros(data.batch_size, dtype=torch.long, device=device)
    times: list[float] = []
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        while len(times) < 3 or (len(times) < 8 and sum(times) < 10):
            start = time.perf_counter()
            with trainer.precision_plugin.forward_context():
                loss = F.cross_entropy(cast(torch.Tensor, net(image)).float(), label)
            loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return min(times[1:])
