"""The arms of the protocol: models, their prices, and a training of so many steps.

Axes: B pages, S = 64 px.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.subject import Subject, TrainingStep
from benchmarks.timing import Candidate, interleave
from moevision.data.emoji import EmojiKinds, EmojiPages
from moevision.models.config import MoEConfig, build_model

BATCH = 256
SIDE = 64
HEAD_UNITS = 256
MODEL = {
    "name": "vit_moe_micro_patch4_32",
    "patch_size": 16,
    "embed_dim": 64,
    "depth": 1,
    "num_heads": 2,
}
REFERENCE = "patch-dense-4"
STEMS = ("patch", "conv", "conv_patch")
TASKS: dict[str, type[EmojiPages]] = {"groups": EmojiPages, "kinds": EmojiKinds}


def _arms_of(stem: str) -> dict[str, dict[str, Any]]:
    """The arms behind one stem."""
    dense = {"stem": stem, "moe_layers": []}
    moe = {"stem": stem, "moe_layers": "all", "router": "vmoe_top_k", "top_k": 1}
    return {
        f"{stem}-dense-2": {**dense, "mlp_ratio": 2},
        f"{stem}-dense-4": {**dense, "mlp_ratio": 4},
        f"{stem}-dense-8": {**dense, "mlp_ratio": 8},
        f"{stem}-dense-head": {**dense, "mlp_ratio": 4},
        f"{stem}-moe-8": {**moe, "num_experts": 8, "expert_hidden": 256},
        f"{stem}-moe-16": {**moe, "num_experts": 16, "expert_hidden": 128},
        f"{stem}-moe-32": {**moe, "num_experts": 32, "expert_hidden": 128},
    }


def stem_of(arm: str) -> str:
    """The stem that an arm's name begins with."""
    return arm.split("-")[0]


ARMS = _arms_of("patch") | _arms_of("conv") | _arms_of("conv_patch")
del ARMS["conv_patch-moe-32"]  # the gate asks for the fewest experts
DENSE = [name for name in ARMS if "-dense-" in name]
MOE = [name for name in ARMS if "-moe-" in name]
OPTIMIZER = {"name": "adamw", "weight_decay": 0.01, "beta2": 0.99, "warmup_fraction": 0.1}


class Pages:
    """The pages of a task's split, drawn once in order and kept, uint8 [n, 64, 64, 3]."""

    def __init__(self, split: str, seed: int, task: str = "groups") -> None:
        self.pages = TASKS[task](10**9, SIDE, seed, split)
        self.batches: list[NDArray[np.uint8]] = []

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Images [B, 3, S, S], normalized, and labels [B] of batch `number`."""
        while len(self.batches) <= number:
            first = len(self.batches) * BATCH
            self.batches.append(
                np.stack([self.pages.image(i) for i in range(first, first + BATCH)])
            )
        labels = torch.arange(number * BATCH, (number + 1) * BATCH) % len(self.pages.classes)
        return normalized(self.batches[number]), labels


def normalized(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S] around 0."""
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25


def subject_of(arm: str, lr: float, num_classes: int) -> Subject:
    """An arm at a learning rate, as plain data."""
    return Subject(
        arm,
        {**MODEL, **ARMS[arm]},
        {**OPTIMIZER, "lr": lr},
        label_smoothing=0.0,
        num_classes=num_classes,
        image_size=SIDE,
        batch_size=BATCH,
    )


def build(arm: str, seed: int, task: str = "groups") -> nn.Module:
    """An arm's model with the initial weights of a seed."""
    torch.manual_seed(seed)
    num_classes = len(TASKS[task].classes)
    arch = MoEConfig(**subject_of(arm, 1e-3, num_classes).arch)
    net: Any = build_model(arch, num_classes, SIDE, load_pretrained=False)
    if arm.endswith("-head"):
        width = cast(int, net.embed_dim)
        net.head = nn.Sequential(
            nn.Linear(width, HEAD_UNITS), nn.GELU(), nn.Linear(HEAD_UNITS, num_classes)
        )
    return cast(nn.Module, net)


def step_of(arm: str, seed: int, lr: float, steps: int, task: str = "groups") -> TrainingStep:
    """What trains an arm for so many steps."""
    subject = subject_of(arm, lr, len(TASKS[task].classes))
    return TrainingStep(subject, precision="fp32", net=build(arm, seed, task), total_steps=steps)


def measure_prices(arms: Sequence[str], steps: int = 8, rounds: int = 12) -> dict[str, float]:
    """Median CPU milliseconds of a training step of these arms; `steps` of each in turns, so many rounds."""
    pages = Pages("train", seed=0)
    batches = [pages.batch(number) for number in range(4)]

    def take_steps(step: TrainingStep) -> None:
        for number in range(steps):
            step(*batches[number % len(batches)])

    candidates = [
        Candidate(arm, partial(take_steps, step_of(arm, 0, 1e-3, 10_000))) for arm in arms
    ]
    timings = interleave(candidates, repetitions=rounds, warm_up=1)
    return {
        arm: round(1000 * statistics.median(seconds) / steps, 2)
        for arm, seconds in timings.cpu.items()
    }


def prices_of_all(first: dict[str, float], amended: dict[str, float]) -> dict[str, float]:
    """Ms a step of every arm: those of the amendment by their ratio to `REFERENCE`, which both measured."""
    ratio = first[REFERENCE] / amended[REFERENCE]
    return {arm: round(ratio * ms, 2) for arm, ms in amended.items()} | first


def train(
    arm: str, lr: float, seed: int, steps: int, pages: Pages, task: str = "groups"
) -> tuple[nn.Module, float]:
    """Train an arm on the first pages; the model in eval mode, and CPU seconds without the drawing of pages."""
    step = step_of(arm, seed, lr, steps, task)
    cpu_s = 0.0
    for number in range(steps):
        images, labels = pages.batch(number)
        began = time.process_time()
        step(images, labels)
        cpu_s += time.process_time() - began
    return step.net.eval(), cpu_s
