"""What a convolutional net from outside reaches on the JPEG copy of CIFAR-10: airbench94 (arXiv:2404.00498).

    python -m benchmarks airbench --cifar path/to/cifar10 --threads 2

The paper's net and recipe, which reach 94 % of the original's test images, on the 45,000 training images that
`moevision fit` trains on: a reference for what the recipe of `configs/cifar10.yaml` reaches on the same files. Written
from the paper's description. Two things differ: 45,000 images, not 50,000, and in the place of fp16 a CPU's bf16 in
training and float32 in the test. The weights are those of the last step, so validation chooses nothing.

Axes: B images, C channels, S steps.
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.flops import inference_flops
from benchmarks.harness import HERE, Record, about, argument_parser, count, positive
from benchmarks.queue import refuse_changes
from benchmarks.study import open_data
from moevision.data import ImageDataModule

BATCH, EPOCHS, CLASSES = 1024, 9.9, 10
MOMENTUM, SMOOTHING, WHITEN_BIAS_EPOCHS, BIAS_FACTOR, SHIFT = 0.85, 0.2, 3, 64, 2
EXAMPLES_SCALE = 1024 * (1 + 1 / (1 - MOMENTUM))
LR, DECAY = 11.5 / EXAMPLES_SCALE, 0.0153 * BATCH / EXAMPLES_SCALE  # of summed losses
WIDTHS, HEAD_SCALE, NORM_MOMENTUM = (64, 256, 256), 1 / 9, 0.4


class Group(nn.Sequential):
    """Two 3x3 convolutions with BatchNorm (no scale, ε as in the paper) and GELU, pooling after the first."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__(
            conv(before, width),
            nn.MaxPool2d(2),
            norm(width),
            nn.GELU(),
            conv(width, width),
            norm(width),
            nn.GELU(),
        )


def conv(before: int, width: int) -> nn.Conv2d:
    """A 3x3 convolution whose first filters hand the channels on as they are."""
    layer = nn.Conv2d(before, width, 3, padding="same", bias=False)
    nn.init.dirac_(layer.weight.data[:before])
    return layer


def norm(width: int) -> nn.BatchNorm2d:
    """BatchNorm with a bias alone."""
    layer = nn.BatchNorm2d(width, eps=1e-12, momentum=NORM_MOMENTUM)
    layer.weight.requires_grad_(False)
    return layer


class Airbench(nn.Module):
    """The paper's net.

    Args:
        images: [B, 3, 32, 32] normalized training images; their 2x2 patches are whitened.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        self.whiten.weight.copy_(whitening(images))
        nn.init.zeros_(self.whiten.bias)  # type: ignore[arg-type]
        first, second, third = WIDTHS
        self.groups = nn.Sequential(Group(24, first), Group(first, second), Group(second, third))
        self.head = nn.Linear(third, CLASSES, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, 32, 32] -> logits [B, 10]."""
        features = self.groups(
            F.gelu(self.whiten(images.contiguous(memory_format=torch.channels_last)))
        )
        logits: Tensor = self.head(F.max_pool2d(features, 3).flatten(1)) * HEAD_SCALE
        return logits


def whitening(images: Tensor) -> Tensor:
    """[24, 3, 2, 2]: the eigenvectors of the patches' covariance, each over its deviation, and their negatives."""
    patches = (
        images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12).double()
    )
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (values + 5e-4).sqrt()).T.flip(0).reshape(12, 3, 2, 2).float()
    return torch.cat([filters, -filters])


def augment(images: Tensor, epoch: int, mirrored: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to two pixels over a reflected border; half are mirrored, the others in the next epoch."""
    padded = F.pad(images, [SHIFT] * 4, mode="reflect")
    rows, columns = torch.randint(2 * SHIFT + 1, (2, len(images)), generator=generator)
    found = torch.empty_like(images)
    for row in range(2 * SHIFT + 1):
        for column in range(2 * SHIFT + 1):
            here = (rows == row) & (columns == column)
            found[here] = padded[here, :, row : row + 32, column : column + 32]
    flip = mirrored ^ bool(epoch % 2)
    return torch.where(flip[:, None, None, None], found.flip(-1), found)


def pace(step: int, steps: int) -> float:
    """Factor of the learning rate: .2 at the start, 1 after 23 % of the steps, .07 at the end."""
    peak = math.floor(0.23 * steps)
    return (
        0.2 + 0.8 * step / peak if step < peak else 1 + (0.07 - 1) * (step - peak) / (steps - peak)
    )


def optimizer_of(net: Airbench) -> torch.optim.SGD:
    """Nesterov's SGD; the biases of the norms have 64 times the learning rate and the same decay."""
    trained = {name: value for name, value in net.named_parameters() if value.requires_grad}
    biases = [
        value
        for name, value in trained.items()
        if name.startswith("groups") and name.endswith("bias")
    ]
    others = [
        value
        for name, value in trained.items()
        if not (name.startswith("groups") and name.endswith("bias"))
    ]
    groups = [
        {"params": biases, "lr": LR * BIAS_FACTOR, "weight_decay": DECAY / (LR * BIAS_FACTOR)},
        {"params": others, "lr": LR, "weight_decay": DECAY / LR},
    ]
    return torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True)


class Lookahead:
    """Every fifth step the weights become an average of themselves that moves ever more slowly."""

    def __init__(self, net: nn.Module) -> None:
        self.mean = {name: value.clone() for name, value in net.state_dict().items()}

    def update(self, net: nn.Module, decay: float) -> None:
        """Move the average by 1 - decay towards the weights, then the weights to the average."""
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                self.mean[name].lerp_(value, 1 - decay)
                value.copy_(self.mean[name])


def train(
    images: Tensor, labels: Tensor, seed: int, *, epochs: float, precision: torch.dtype
) -> Airbench:
    """Train from the seed's weights, order and shifts."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = Airbench(images[:5000]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer, average = optimizer_of(net), Lookahead(net)
    rates = [group["lr"] for group in optimizer.param_groups]
    per_epoch = len(images) // BATCH
    steps = math.ceil(epochs * per_epoch)
    for step, (batch, target) in enumerate(batches(images, labels, steps, generator)):
        assert net.whiten.bias is not None
        net.whiten.bias.requires_grad_(step // per_epoch < WHITEN_BIAS_EPOCHS)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * pace(step, steps)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            logits = net(batch)
        loss = F.cross_entropy(logits.float(), target, label_smoothing=SMOOTHING, reduction="sum")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % 5 == 0:
            average.update(net, 0.95**5 * ((step + 1) / steps) ** 3)
        if (step + 1) % per_epoch == 0:
            print(f"epoch {(step + 1) // per_epoch}: loss {loss.item() / BATCH:.3f}", flush=True)
    average.update(net, 1.0)
    return net.eval()


def batches(
    images: Tensor, labels: Tensor, steps: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """As many augmented batches as there are steps, epoch by epoch in another order."""
    per_epoch = len(images) // BATCH
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = torch.randperm(len(images), generator=generator)
        chosen = order[place * BATCH : (place + 1) * BATCH]
        yield augment(images[chosen], epoch, mirrored[chosen], generator), labels[chosen]


@torch.inference_mode()
def evaluate(net: Airbench, images: Tensor, labels: Tensor) -> dict[str, int]:
    """How many are right: of the image alone, and of the paper's mean over mirrored and shifted views."""
    alone, views = 0, 0
    for part, target in zip(images.split(500), labels.split(500), strict=True):
        logits = net(part)
        border = F.pad(part, [1] * 4, mode="reflect")
        shifted = [border[:, :, :32, :32], border[:, :, 2:, 2:]]
        mean = sum(
            (0.25 * mirror_mean(net, each) for each in shifted), 0.5 * mirror_mean(net, part)
        )
        alone += int((logits.argmax(1) == target).sum())
        views += int((mean.argmax(1) == target).sum())
    return {"total": len(labels), "correct": alone, "correct_of_views": views}


def mirror_mean(net: Airbench, images: Tensor) -> Tensor:
    """Logits [B, 10] of an image and its mirror image, averaged."""
    return 0.5 * net(images) + 0.5 * net(images.flip(-1))


def load(data: ImageDataModule, split: str) -> tuple[Tensor, Tensor]:
    """Normalized images [B, 3, 32, 32] and labels [B] of a split."""
    found = [(batch["image"].float(), batch["label"]) for batch in data.plain_loader(split)]
    images, labels = (torch.cat(list(each)) for each in zip(*found, strict=True))
    return images, labels


def run_seed(options: Namespace, seed: int) -> dict[str, Any]:
    """One training and its test."""
    data = open_data("cifar10", options.cifar)
    images, labels = load(data, "train")
    start, cpu = time.perf_counter(), time.process_time()
    precision = getattr(torch, options.precision)
    net = train(
        images[: options.images],
        labels[: options.images],
        seed,
        epochs=options.epochs,
        precision=precision,
    )
    steps = math.ceil(options.epochs * (len(labels[: options.images]) // BATCH))
    cost = {
        "images": steps * BATCH,
        "flops_per_image": inference_flops(net, images[:1]).executed,
        "duration_s": time.perf_counter() - start,
        "cpu_s": time.process_time() - cpu,
    }
    return {
        "seed": seed,
        "train_images": len(labels[: options.images]),
        **evaluate(net, *load(data, "test")),
        **cost,
    }


def main() -> None:
    """Train and record."""
    parser = argument_parser("airbench", __doc__)
    parser.add_argument(
        "--cifar", default="cifar10", help="CIFAR-10 as a folder, or a name (%(default)s)"
    )
    parser.add_argument("--seed", type=count, default=0, help="(%(default)s)")
    parser.add_argument("--epochs", type=float, default=EPOCHS, help="(%(default)s)")
    parser.add_argument("--images", type=positive, help="of the training images (all)")
    parser.add_argument(
        "--precision", choices=("bfloat16", "float32"), default="bfloat16", help="(%(default)s)"
    )
    parser.add_argument("--threads", type=positive, default=1, help="(%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=HERE / "accuracy" / "airbench.json", help="(%(default)s)"
    )
    parser.add_argument(
        "--allow-dirty", action="store_true", help="try it out with uncommitted changes"
    )
    options = parser.parse_args()
    refuse_changes(HERE / "accuracy" / "README.md", allowed=options.allow_dirty)
    torch.set_num_threads(options.threads)
    recipe = {name: getattr(options, name) for name in ("epochs", "precision", "images")}
    record = Record(options.out, recipe)
    if record.find(seed=options.seed) is None:
        origin = about()
        record.add({**run_seed(options, options.seed), **origin})
