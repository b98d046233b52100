"""Training images per second of a config's MoE model beside its dense twin, interleaved in one run.

    python benchmarks/train_step.py cifar10 --steps 40 --out benchmarks/train_step_cifar10.json

One step is what `moevision fit` does on one batch of noise: forward under bf16 autocast, cross-entropy and balance
losses, backward, gradient clipping, fused AdamW. Both models take turns, and the ratio is taken pair by pair, so that
a drift of the machine's speed hits both. Quote the median ratio; the absolute figures belong to the machine.
"""

from __future__ import annotations

import json
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from moevision.layers import forward_routing
from moevision.losses import AuxLossWeights
from moevision.models.attention import set_fused_attention
from moevision.models.config import MoEConfig
from moevision.train.provenance import cpu_model
from moevision.train.run_folder import find_config
from moevision.train.task import ClassificationTask


def training_step(
    task: ClassificationTask, images: torch.Tensor, labels: torch.Tensor, *, bf16: bool = True
) -> Callable[[], None]:
    """A function that does one optimizer step of `task` on these images."""
    task.net.train()
    set_fused_attention(task.net, not bf16)
    optimizer = torch.optim.AdamW(task.net.parameters(), lr=1e-3, weight_decay=0.05, fused=True)

    def step() -> None:
        task.aux_loss.start_window()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits, routings = forward_routing(task.net, images)
        loss = task._cross_entropy(logits, labels)
        aux, _ = task.aux_loss(routings)
        (loss if aux is None else loss + aux).backward()
        torch.nn.utils.clip_grad_norm_(task.net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Measure and print."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("config", help="name or file of a config")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    config = yaml.safe_load(find_config(options.config).read_text())
    arch, data = MoEConfig(**config["model"]["arch"]), config["data"]
    batch, size = data["batch_size"], data["image_size"]
    aux = AuxLossWeights(**config["model"].get("aux", {"importance": 0.05, "load": 0.05}))
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(options.classes, (batch,))
    tasks = [
        ClassificationTask(arch=model, aux=aux, num_classes=options.classes, image_size=size)
        for model in (arch, replace(arch, twin="active_flops"))
    ]
    steps = [training_step(task, images, labels) for task in tasks]
    times: list[list[float]] = [[], []]
    for count in range(options.steps + 5):
        for step, seconds in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            if count >= 5:  # the first steps compile kernels
                seconds.append(time.perf_counter() - start)
    ratios = [twin / moe for moe, twin in zip(*times, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    result = {
        "config": options.config,
        "batch": batch,
        "steps": options.steps,
        "moe_images_per_s": round(batch / statistics.median(times[0]), 1),
        "twin_images_per_s": round(batch / statistics.median(times[1]), 1),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
        "machine": f"{cpu_model()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
