"""Sparse upcycling on CIFAR-10 beside training on: accuracy against FLOPs and against time, over seeds.

    OMP_NUM_THREADS=1 python -m benchmarks upcycling --cifar path/to/cifar10   # the trainings; goes on where it stopped
    python -m benchmarks upcycling --report > tables.md                        # table and figure

Four trainings per seed of one small ViT, each under one one-cycle schedule from the same learning rate:

- `dense`: n steps.
- `upcycled`: from `dense`, `moevision.upcycle` with E = 8, k = 1, `last2`; m steps under a new schedule.
- `continued`: from `dense`, the dense model itself; m steps under the same new schedule: what the restart alone gives.
- `in one`: a dense model from scratch, n + m steps under one schedule: what the same FLOPs give without a restart.

The curves are accuracies on the same 2 000 validation images; the table's are on the whole test split after the last
step. Training FLOPs are three forward passes per image, routers included. Time is the process's CPU time without
evaluation (one thread, so on an idle machine the wall time, which is recorded too).
"""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.harness import HERE, Record, about, argument_parser, read_record
from benchmarks.study import BATCH, IMAGE_SIZE, SETTINGS, evaluate, make_task, open_data, small, train
from benchmarks.upcycling.report import draw, tables
from moevision.data import ImageDataModule
from moevision.efficiency import measure_cost
from moevision.errors import UserError
from moevision.layers import moe_layers
from moevision.models.upcycle import upcycle
from moevision.train.task import ClassificationTask

LR = 2e-3
DENSE: dict[str, Any] = {"moe_layers": []}
LAYERS = "last2"
UPCYCLED: dict[str, Any] = {"num_experts": 8, "top_k": 1, "router": "vmoe_top_k"}
POINTS = 8


class Curve(L.Callback):
    """Accuracy on fixed images at some steps, with the time that training took until then.

    Args:
        images: [B, 3, H, W], with their labels [B].
        steps: of the whole training; 8 of them, evenly spread, are points of the curve, and so is the start.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, steps: int) -> None:
        self.images, self.labels = images, labels
        self.at = {round(steps * point / POINTS) for point in range(1, POINTS + 1)}
        self.points: list[dict[str, float]] = []
        self.cpu_s = self.wall_s = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The first point, before any step."""
        self._add(0, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """A point, if it is time for one; evaluating it doesn't count as training."""
        if trainer.global_step in self.at:
            self.cpu_s += time.process_time() - self._cpu
            self.wall_s += time.perf_counter() - self._wall
            self._add(trainer.global_step, pl_module)

    def _add(self, step: int, task: L.LightningModule) -> None:
        top1 = accuracy(task, self.images, self.labels)
        self.points.append({"step": step, "val_top1": top1, "cpu_s": self.cpu_s, "wall_s": self.wall_s})
        self._cpu, self._wall = time.process_time(), time.perf_counter()


@torch.no_grad()
def accuracy(task: L.LightningModule, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images that are recognised, in eval mode."""
    task.eval()
    right = [task(batch).argmax(-1) == truth for batch, truth in zip(images.split(250), labels.split(250), strict=True)]
    task.train()
    return float(torch.cat(right).float().mean())


def fixed_images(data: ImageDataModule, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` validation images, the same in every run, and their labels."""
    batches = list(data.val_dataloader())
    images, labels = (torch.cat([batch[name] for batch in batches]) for name in ("image", "label"))
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
    return images[chosen], labels[chosen]


def start_of(arm: str, dense_weights: Path, data: ImageDataModule, seed: int) -> ClassificationTask:
    """The task that an arm begins with."""
    task = make_task(small(arm, lr=LR, num_classes=data.num_classes, **DENSE), seed)
    if arm in ("dense", "in one"):
        return task
    if not dense_weights.exists():
        raise UserError(f"The weights {dense_weights} are gone: give another --out, so that they are trained again.")
    task.net.load_state_dict(torch.load(dense_weights, weights_only=True))
    if arm == "continued":
        return task
    model = upcycle(task.net, layers=LAYERS, seed=seed, **UPCYCLED)
    width = moe_layers(model)[0].experts.fc1.out_features
    arch = {"moe_layers": LAYERS, "expert_hidden": width, "normalize_gates": True, **UPCYCLED}
    moe = make_task(small(arm, lr=LR, num_classes=data.num_classes, **arch), seed)
    moe.net.load_state_dict(model.state_dict())
    return moe


def one_run(
    arm: str, weights: Path, data: ImageDataModule, fixed: tuple[torch.Tensor, torch.Tensor], key: dict[str, Any],
    options: Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Train one arm with one seed; `dense` leaves its weights for the two that go on from it."""
    steps = {"dense": options.first, "in one": options.first + options.then}.get(arm, options.then)
    task = start_of(arm, weights, data, key["seed"])
    cost = measure_cost(task.net, IMAGE_SIZE)
    curve = Curve(*fixed, steps)
    # Another order of the images than in the first n steps, the same for both that go on.
    train(task, data, steps, key["seed"] + (1000 if arm in ("upcycled", "continued") else 0), [curve])
    if arm == "dense":
        weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save(task.net.state_dict(), weights)
    flops = 3 * BATCH * (cost.flops_per_image + cost.router_flops_per_image)
    return {
        **evaluate(task, data),
        "steps": steps,
        "train_flops_per_step": flops,
        "total_parameters": cost.total_parameters,
        "active_parameters": cost.active_parameters,
        "curve": curve.points,
    }


def study(record: Record, options: Namespace) -> None:
    """Do the runs that the record lacks, seed by seed."""
    data, origin = open_data("cifar10", options.cifar), about()
    fixed = fixed_images(data, options.images)
    for seed in range(options.seeds):
        for arm in ("dense", "upcycled", "continued", "in one"):
            key = {"arm": arm, "seed": seed}
            if record.find(**key) is not None:
                continue
            weights = options.weights / f"{options.out.stem}_dense_{seed}.pt"
            run = {**key, **one_run(arm, weights, data, fixed, key, options), **origin}
            record.add(run)
            first, last = run["curve"][0], run["curve"][-1]
            print(
                f"seed {seed}  {arm}: validation {first['val_top1']:.3f} -> {last['val_top1']:.3f}, "
                f"{last['cpu_s']:.0f} s CPU, {last['wall_s']:.0f} s",
                flush=True,
            )


def main() -> None:
    """Train or report."""
    parser = argument_parser("upcycling", __doc__)
    parser.add_argument("--cifar", default="cifar10", help="CIFAR-10 as a folder, or a name (%(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "upcycling" / "record.json", help="the record (%(default)s)")
    parser.add_argument("--weights", type=Path, default=Path("runs/upcycling"), help="folder of the dense weights")
    parser.add_argument(
        "--first", type=int, default=1054, metavar="N", help="steps of `dense` (%(default)s: 1.5 epochs)"
    )
    parser.add_argument("--then", type=int, default=1054, metavar="M", help="steps after it (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--images", type=int, default=2000, help="validation images of a curve (%(default)s)")
    parser.add_argument("--report", action="store_true", help="print the table and draw the figure instead")
    parser.add_argument("--figure", type=Path, default=HERE / "upcycling" / "upcycling.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.report:
        record = read_record(options.out)
        print(tables(record))
        draw(record, options.figure)
        return
    recipe = {
        "lr": LR, "upcycled": {"moe_layers": LAYERS, **UPCYCLED}, "first": options.first, "then": options.then,
        "pictures": options.images, "schedule": "AdamW, one cycle, 20 % warm-up",
    }  # fmt: skip
    study(Record(options.out, {**SETTINGS, **recipe}), options)
