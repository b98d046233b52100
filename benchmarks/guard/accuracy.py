"""Accuracy on drawn pets of trainings that were struck by seven faults, beside clean ones of the same seeds.

    OMP_NUM_THREADS=1 python -m benchmarks guard-accuracy --seeds 8 --out benchmarks/guard/accuracy.json

The struck training may lose a little: what it refused and took back is missing at its end. Asked is whether it loses
less than MARGIN: the lower end of the 95 % interval of the mean over seeds (Student's t of the seeds' differences) has
to lie above it. That no difference was found would not show it. The counters must equal what was injected.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.harness import about, argument_parser
from benchmarks.lines import write_lines
from moevision.data import ImageDataModule
from moevision.models.config import MoEConfig
from moevision.stats import Gap, paired_difference
from moevision.train.guard import GuardConfig, StabilityGuard
from moevision.train.health import EmaConfig, WeightEMA
from moevision.train.task import ClassificationTask, OptimizerConfig
from tests.train.faults import FaultInjector
from tests.train.quiet import quiet_trainer

FAULTS = "nan_loss@1, inf_grad@20:expert3, nan_input@40, spike@60x50, nan_weight@90, nan_buffer@110, nan_ema@130"
MARGIN = 0.02
"""Top-1 that seven faults in 480 updates may cost."""
TRAIN_SIZE, BATCH = 960, 32
SKIPS, RETURNS = 3, 4  # of these seven


def train(seed: int, faults: str, epochs: int) -> tuple[torch.Tensor, StabilityGuard]:
    """Which test images are classified correctly [N], and the guard."""
    L.seed_everything(seed, verbose=False)
    task = ClassificationTask(
        arch=MoEConfig(name="test_vit_moe", patch_size=8, stem="conv", router="bias_balanced"),
        optim=OptimizerConfig(lr=3e-3),
    )
    data = ImageDataModule(
        "synthetic_pets",
        image_size=32,
        batch_size=BATCH,
        seed=seed,
        train_size=TRAIN_SIZE,
        val_size=64,
        test_size=1000,
    )
    guard = StabilityGuard(GuardConfig(snapshot_every=10, max_rollbacks=RETURNS))
    callbacks = [FaultInjector(faults), WeightEMA(EmaConfig(decay=0.95)), guard]
    trainer = quiet_trainer(
        max_epochs=epochs, default_root_dir=tempfile.mkdtemp(), callbacks=callbacks
    )
    trainer.fit(task, data)
    trainer.test(task, data, verbose=False)
    outputs: dict[str, torch.Tensor] = {
        name: torch.cat([output[name] for output in task.test_outputs])
        for name in ("prediction", "label")
    }
    return outputs["prediction"] == outputs["label"], guard


def main() -> None:
    """Measure and print."""
    parser = argument_parser("guard-accuracy", __doc__)
    add = parser.add_argument
    add("--seeds", type=int, default=8)
    add("--epochs", type=int, default=16)
    add("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    origin = about()
    runs: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        clean, _ = train(seed, "", options.epochs)
        struck, guard = train(seed, FAULTS, options.epochs)
        record = guard.record
        pair = paired_difference(struck.numpy(), clean.numpy())
        runs.append(
            {
                "seed": seed,
                "clean_top1": round(float(clean.float().mean()), 4),
                "struck_top1": round(float(struck.float().mean()), 4),
                "difference": round(pair.difference, 4),
                "interval": [round(pair.low, 4), round(pair.high, 4)],
                "skipped": record.skipped,
                "rollbacks": record.rollbacks,
                "updates_taken_back": record.lost,
                "expected": [SKIPS, RETURNS],
            }
        )
        print(json.dumps(runs[-1]), flush=True)
    if options.out:
        gap = Gap.of([run["difference"] for run in runs])
        low, high = round(gap.low, 4), round(gap.high, 4)
        mean = {"difference": round(gap.mean, 4), "interval": [low, high]}
        result = {
            **origin,
            "faults": FAULTS,
            "epochs": options.epochs,
            "updates": options.epochs * TRAIN_SIZE // BATCH,
            "runs": runs,
            "mean": {**mean, "margin": MARGIN, "within_margin": bool(low > -MARGIN)},
        }
        write_lines(options.out, result)
