"""What the studies of several trainings share: one small model, two sets of pictures, and a record that resumes.

Every run goes through what users run: `ImageDataModule`, `ClassificationTask` and Lightning's `Trainer`. The split and
the pictures stay the same for all seeds; a seed changes initial weights, noise, the order and the augmentation of the
training pictures, in the same way for every row of a study. Everything runs on one thread.

Axes: B images, C classes, E experts.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch

import moevision
from moevision.data import ImageDataModule
from moevision.errors import UserError
from moevision.files import write_json_atomic
from moevision.layers import forward_routing
from moevision.losses import AuxLossWeights
from moevision.models.config import MoEConfig
from moevision.train.provenance import cpu_model, git_state
from moevision.train.task import ClassificationTask, OptimizerConfig
from moevision.versions import package_version

IMAGE_SIZE, BATCH = 32, 64
MODEL = {"name": "vit_moe_micro_patch4_32", "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2}
"""4 blocks of width 64 on 4 x 4 patches of 8 px, convolutional stem; blocks 1 and 3 may be MoE layers.

Chosen by what 45 s on one thread teach it about CIFAR-10 (V-MoE router, lr 2e-3, seed 0, validation): 48.3 % with 4 x 4
patches and 41 000 pictures, 39.6 % with 8 x 8 patches and 16 600.
"""
PRECISION = "32-true"  # at this width twice as fast as bf16 autocast on a CPU

CIFAR_PIXELS = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}


def open_data(name: str, cifar: str, *, pets: Sequence[int] = (16_384, 2_000, 4_000)) -> ImageDataModule:
    """`synthetic_pets` (train, val and test pictures of each) or `cifar10` from the folder or name `cifar`."""
    sizes = dict(zip(("train_size", "val_size", "test_size"), pets, strict=True))
    options: dict[str, Any] = {"cifar10": {"path": cifar, **CIFAR_PIXELS}, "synthetic_pets": {"path": name, **sizes}}
    data = ImageDataModule(image_size=IMAGE_SIZE, batch_size=BATCH, crop="pad", augment="light", **options[name])
    data.setup()
    return data


def make_task(data: ImageDataModule, lr: float, seed: int, **arch: Any) -> ClassificationTask:
    """The small model under a one-cycle schedule, with the balance losses that its router has by default."""
    L.seed_everything(seed, verbose=False)
    return ClassificationTask(
        arch=MoEConfig(**{**MODEL, **arch}),
        optim=OptimizerConfig(lr=lr),
        aux=AuxLossWeights(),
        num_classes=data.num_classes,
        image_size=IMAGE_SIZE,
    )


def quiet_trainer(**options: Any) -> L.Trainer:
    """A CPU Trainer that logs nothing and keeps nothing."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    fixed = {"accelerator": "cpu", "devices": 1, "precision": PRECISION, "num_sanity_val_steps": 0}
    return L.Trainer(**{**silent, **fixed, "gradient_clip_val": 1.0, "use_distributed_sampler": False, **options})


def train(
    task: ClassificationTask, data: ImageDataModule, steps: int, seed: int, callbacks: Sequence[L.Callback] = (),
    precision: str = PRECISION,
) -> None:  # fmt: skip
    """Train for exactly `steps` steps; validation is left to `evaluate`.

    Raises:
        UserError: if training ended early (Lightning swallows Ctrl-C), so that half a run is never recorded.
    """
    data.seed = data.contents.datasets["train"].seed = seed
    L.seed_everything(seed, verbose=False)
    trainer = quiet_trainer(
        max_steps=steps, max_epochs=-1, limit_val_batches=0, callbacks=list(callbacks), precision=precision
    )
    trainer.fit(task, data)
    if trainer.global_step != steps:
        raise UserError(f"Training stopped after {trainer.global_step} of {steps} steps: start the same command again.")


def training_step(
    task: ClassificationTask, images: torch.Tensor, labels: torch.Tensor, *, bf16: bool = True
) -> Callable[[], None]:
    """A function that does one optimizer step of `task` on these images [B, 3, H, W] and labels [B], for timing."""
    task.net.train()
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


def evaluate(task: ClassificationTask, data: ImageDataModule) -> dict[str, Any]:
    """Accuracy on the whole validation and test split, and the test split's load per MoE layer."""
    trainer = quiet_trainer()
    (val,) = trainer.validate(task, data, verbose=False)
    (test,) = trainer.test(task, data, verbose=False)
    return {
        "val_top1": val["val/top1"],
        "test_top1": test["test/top1"],
        "test_loss": test["test/loss"],
        "layers": [asdict(load) for load in task.test_loads],
    }


class Record:
    """The runs of a study in one JSON file that is rewritten, whole or not at all, after every run.

    Args:
        path: the file; made with the first run.
        settings: what all runs have in common.

    Raises:
        UserError: if the file holds runs of other settings, which must not be mixed.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        found = self.read()
        if found["settings"] != self.settings:
            differ = [name for name in self.settings if self.settings[name] != found["settings"].get(name)]
            raise UserError(f"{path} holds runs with another {', '.join(differ)}: give another --out, or delete it.")

    def read(self) -> dict[str, Any]:
        """What the file says now."""
        return read_record(self.path) if self.path.exists() else {"settings": self.settings, "runs": []}

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The run with that key, None if it has not been done."""
        return next((run for run in self.read()["runs"] if all(run[name] == key[name] for name in key)), None)

    def add(self, run: dict[str, Any]) -> None:
        """Append a finished run."""
        found = self.read()
        write_json_atomic(self.path, {**found, "runs": [*found["runs"], finite(run)]})

    def put(self, name: str, value: Any) -> None:
        """Set an entry beside the runs."""
        write_json_atomic(self.path, {**self.read(), name: finite(value)})


def read_record(path: Path) -> dict[str, Any]:
    """The record of a study, as it stands."""
    if not path.exists():
        raise UserError(f"There is no record {path}: run the study first, or name its --out.")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON can't say, by None (a diverged run is a result too)."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def provenance() -> dict[str, Any]:
    """Machine, versions, command and commit of this process."""
    libraries = ("torch", "timm", "lightning", "numpy")
    return {
        "command": " ".join(["python", *sys.argv]),
        "code": git_state(Path(moevision.__file__).parent, Path(__file__).with_name("*.py")),
        "machine": f"{cpu_model()}, {torch.get_num_threads()} thread",
        "python": platform.python_version(),
        "libraries": {name: package_version(name) for name in libraries},
        "started_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
