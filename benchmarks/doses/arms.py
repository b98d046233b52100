"""The arms of the protocol: models, their prices, and a training of so many steps.

An arm's name says what it is: `dense-4` has an MLP of 4 times the width, `moe-32-half-k2` 32 experts of half that
and two a token. A last word names what is read by the classifier of mosaics and photos.

Axes: B images, C classes, P places, D width.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.doses.tasks import PLACES, Photos
from benchmarks.subject import Subject, TrainingStep
from benchmarks.timing import Candidate, interleave
from moevision.layers import forward_routing, moe_layers
from moevision.layers.baselines import ColourRouter
from moevision.models.vit_moe import VisionTransformerMoE

BATCH = 256
HEAD_UNITS = 512
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "textures": SMALL,
    "characters": {**SMALL, "img_size": 64, "patch_size": 16, "in_chans": 1},
    "mosaics": {**SMALL, "depth": 2},
    "photos": {**SMALL, "embed_dim": 32, "depth": 2},
}
GATES = ("colour", "position", "hash")
OPTIMIZER = {"name": "adamw", "weight_decay": 0.01, "beta2": 0.99, "warmup_fraction": 0.1}
PHOTO_DECAY = 0.05


class Mean(nn.Module):
    """The mean over places: [B, P, D] -> [B, D]."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, D]."""
        return x.mean(1)


def arguments_of(arm: str, width: int) -> dict[str, Any]:
    """What an arm's name says about its MLPs."""
    kind, number, *words = arm.split("-")
    if kind == "dense":
        return {"moe_layers": [], "mlp_ratio": float(number)}
    (gate,) = [word for word in words if word in GATES] or ["vmoe_top_k"]
    return {
        "moe_layers": "all",
        "router": gate,
        "num_experts": int(number),
        "top_k": 2 if "k2" in words else 1,
        "expert_hidden": 2 * width if "half" in words else 4 * width,
        **({"route_by": "image"} if "image" in words else {}),
    }


def build(task: str, arm: str, seed: int, num_classes: int) -> VisionTransformerMoE:
    """An arm's model with the initial weights of a seed."""
    torch.manual_seed(seed)
    model = MODELS[task]
    width = model["embed_dim"]
    net = VisionTransformerMoE(
        num_classes=num_classes,
        class_token=False,
        global_pool="",
        **model,
        **arguments_of(arm, width),
    )
    for router in net.modules():
        if isinstance(router, ColourRouter):  # of characters: how dark
            router.centroids = router.centroids[:, : model.get("in_chans", 3)].clone()
    if "hidden" in arm:
        layers = [nn.Linear(PLACES * width, HEAD_UNITS), nn.GELU()]
        head = nn.Sequential(nn.Flatten(1), *layers, nn.Linear(HEAD_UNITS, num_classes))
    elif "plain" in arm:
        head = nn.Sequential(nn.Flatten(1), nn.Linear(PLACES * width, num_classes))
    else:
        head = nn.Sequential(Mean(), nn.Linear(width, num_classes))
    for layer in head:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    cast(Any, net).head = head
    return net


def step_of(task: str, arm: str, seed: int, lr: float, steps: int, classes: int) -> TrainingStep:
    """What trains an arm for so many steps."""
    decay = {"weight_decay": PHOTO_DECAY} if task == "photos" else {}
    subject = Subject(
        arm, {}, {**OPTIMIZER, **decay, "lr": lr}, label_smoothing=0.0, num_classes=classes
    )
    net = build(task, arm, seed, classes)
    return TrainingStep(subject, precision="fp32", net=net, total_steps=steps)


def measure_prices(arms: list[tuple[str, str]], steps: int, rounds: int) -> dict[str, float]:
    """Median CPU milliseconds of a training step of each (task, arm): `steps` of each in turns, so many rounds."""
    generator = Generator().manual_seed(0)

    def candidate(task: str, arm: str) -> Candidate:
        model = MODELS[task]
        classes = Photos.num_classes if task == "photos" else 16
        shape = (BATCH, model.get("in_chans", 3), model["img_size"], model["img_size"])
        images = torch.randn(shape, generator=generator)
        labels = torch.randint(classes, (BATCH,), generator=generator)
        step = step_of(task, arm, 0, 1e-3, 10_000, classes)

        def take_steps() -> None:
            for _ in range(steps):
                step(images, labels)

        return Candidate(f"{task} {arm}", take_steps)

    timings = interleave([candidate(*pair) for pair in arms], repetitions=rounds, warm_up=1)
    return {
        name: round(1000 * statistics.median(seconds) / steps, 2)
        for name, seconds in timings.cpu.items()
    }


def train(
    data: Any, task: str, arm: str, lr: float, seed: int, steps: int
) -> tuple[nn.Module, float]:
    """Train an arm; the model in eval mode, and CPU seconds without the drawing of images."""
    step = step_of(task, arm, seed, lr, steps, data.num_classes)
    generator = Generator().manual_seed(5 + seed)
    cpu_s = 0.0
    for _ in range(steps):
        images, labels = data.batch("train", BATCH, generator)
        began = time.process_time()
        step(images, labels)
        cpu_s += time.process_time() - began
    return step.net.eval(), cpu_s


@torch.inference_mode()
def evaluate(net: nn.Module, data: Any, split: str) -> dict[str, float]:
    """Accuracy and cross-entropy on the fixed images of "val" or "test"."""
    logits, labels = [], []
    for images, own in evaluation_batches(data, split):
        logits.append(net(images))
        labels.append(own)
    scores, truth = torch.cat(logits), torch.cat(labels)
    return {
        f"{split}_top1": round(float((scores.argmax(-1) == truth).float().mean()), 6),
        f"{split}_loss": round(float(F.cross_entropy(scores, truth)), 6),
    }


def evaluation_batches(data: Any, split: str) -> Any:
    """Batches of a whole split of photos, or of the 8,192 first draws of a stream of its own."""
    if isinstance(data, Photos):
        images, labels = data.splits[split]
        for first in range(0, len(images), BATCH):
            part = slice(first, first + BATCH)
            yield data.normalized(images[part]), labels[part]
        return
    generator = Generator().manual_seed({"val": 777, "test": 778}[split])
    for _ in range(data.test_size // BATCH):
        yield data.batch(split, BATCH, generator)


@torch.inference_mode()
def heaviest_loads(net: nn.Module, data: Any) -> list[float]:
    """Per MoE layer, the largest load of an expert on 256 images, in multiples of the mean."""
    if not moe_layers(net):
        return []
    images, _ = next(evaluation_batches(data, "val"))
    _, routings = forward_routing(net, images)
    counts = [routing.counts().float() for routing in routings]
    return [round(float(count.max() / count.mean()), 2) for count in counts]
