"""One run of the study: `moevision fit` without its choice of the best epoch, metered, and the record of it.

Checkpoints, resuming, signals, the guard and the run folder are `fit`'s own (`moevision.train`): the same command goes
on where a run was stopped.

Axes: B images, N tokens, E experts.
"""

from __future__ import annotations

import csv
import json
import math
import resource
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.harness import HERE, about
from benchmarks.places import SHIFTS, accuracy_of
from benchmarks.sparsity.arms import ARMS, MODEL, RECIPE, Job
from moevision.config import read, settings
from moevision.data import ImageDataModule
from moevision.efficiency import measure_cost
from moevision.errors import csv_name
from moevision.files import file_sha256
from moevision.layers import forward_routing
from moevision.limits import keep_freed_memory
from moevision.losses import cv_squared
from moevision.train.finish import RunResult, finish
from moevision.train.fit import quiet_lightning
from moevision.train.fit import train as train_model
from moevision.train.guard import TrainingDiverged
from moevision.train.processes import Interrupted, tell
from moevision.train.resume import Session, begin
from moevision.train.task import ClassificationTask

PROTOCOL = HERE / "sparsity" / "protocol.md"
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss


class Meter(L.Callback):
    """What a run spends, over all its sessions, and its validation accuracy after every epoch.

    Args:
        image_seed: another order and augmentation of the images, but the same split.

    Attributes:
        cpu_s: CPU seconds of training, loading included, validation left out.
        peak_mib: most memory of any session: of the process on a CPU, data included; of tensors on CUDA.
        curve: [step, CPU seconds until then, validation accuracy] after every epoch.
    """

    def __init__(self, image_seed: int = 0) -> None:
        self.image_seed = image_seed
        self.cpu_s, self.peak_mib = 0.0, 0.0
        self.curve: list[list[float]] = []
        self._mark: float | None = None

    def tick(self) -> None:
        """Add what was spent since the last call."""
        now = time.process_time()
        self.cpu_s += 0.0 if self._mark is None else now - self._mark
        self._mark = now
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else rss
        self.peak_mib = max(self.peak_mib, peak / 2**20)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The split is made: what is drawn from here on follows another seed."""
        if stage == "fit":
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            data.seed = data.contents.datasets["train"].seed = self.image_seed

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start."""
        self._mark = time.process_time()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A point of the curve; evaluating it doesn't count as training."""
        self.tick()
        top1, _ = evaluate(pl_module, trainer.datamodule)  # type: ignore[attr-defined]
        self.curve.append([trainer.global_step, round(self.cpu_s, 1), top1])
        self._mark = time.process_time()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop."""
        self.tick()
        self._mark = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run continues."""
        self.tick()
        return {"cpu_s": self.cpu_s, "peak_mib": self.peak_mib, "curve": [list(point) for point in self.curve]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue."""
        self.cpu_s, self.peak_mib, self.curve = state_dict["cpu_s"], state_dict["peak_mib"], state_dict["curve"]


@torch.no_grad()
def evaluate(task: Any, data: ImageDataModule) -> tuple[float, list[float]]:
    """Accuracy on the validation split, and the CV of the experts' importance in every MoE layer."""
    right, total, importance = 0, 0, list[torch.Tensor]()
    task.eval()
    for batch in data.val_dataloader():
        logits, routings = forward_routing(task.net, batch["image"].to(task.device))
        right += int((logits.argmax(-1).cpu() == batch["label"]).sum())
        total += len(batch["label"])
        sums = [routing.expert_weights().flatten(0, -2).sum(0) for routing in routings]  # [E] for each layer
        importance = [a + b for a, b in zip(importance, sums, strict=True)] if importance else sums
    task.train()
    return right / total, [math.sqrt(float(cv_squared(of_layer))) for of_layer in importance]


def arguments_of(job: Job, options: Namespace) -> list[str]:
    """The command line of `moevision fit` that this run is.

    Args:
        job: the run.
        options: of the study's command line.
    """
    arm = ARMS[job.arm]
    given: dict[str, Any] = {
        "data.path": options.data,
        "data.batch_size": arm.batch,
        "model.optim.lr": job.lr,
        "trainer.max_epochs": options.epochs[job.device],
        "trainer.check_val_every_n_epoch": 1_000_000,  # the meter validates, and no epoch is chosen by it
        "trainer.precision": "32-true",
        "trainer.accelerator": job.device,
        "trainer.enable_progress_bar": "false",
        "guard.enabled": str(arm.guard).lower(),
        "seed_everything": job.seed,
        "name": job.name,
        "runs_root": options.work,
        **{f"model.{name}": value for name, value in RECIPE.items()},
        **{f"model.arch.{name}": value for name, value in {**MODEL, **arm.arch}.items()},
        **{f"model.aux.{name}": value for name, value in arm.aux.items()},
    }
    if job.arm == "twin-time":
        given |= {"trainer.max_epochs": -1, "trainer.max_steps": options.twin_steps}
    front = ["--config", options.config, "--data.download=false"]
    return [*front, *(f"--{name}={value}" for name, value in given.items()), "--resume=auto"]


def train(job: Job, options: Namespace) -> dict[str, Any]:
    """Do one run, or go on with it; its record.

    Raises:
        UserError: for what the user can mend.
        Interrupted: if a signal asked to stop; everything is saved then.
    """
    torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    origin = {**about(), "command": "python -m benchmarks sparsity run"}  # without this machine's folders
    arguments = arguments_of(job, options)
    run_dir = options.work / job.name
    (run_dir / "summary.json").unlink(missing_ok=True)  # ended between the run's last file and its record
    key = {
        **vars(job), "failed": None, "batch": ARMS[job.arm].batch, "precision": "32-true", **origin,
        "protocol_sha256": file_sha256(PROTOCOL),
    }  # fmt: skip
    return metered(key, arguments, Meter(job.seed), run_dir)


def metered(key: dict[str, Any], arguments: list[str], meter: Meter, run_dir: Path) -> dict[str, Any]:
    """Train by these arguments of `fit`, or go on; `key` with what was found. The last weights are tested.

    Raises:
        UserError: for what the user can mend.
        Interrupted: if a signal asked to stop; everything is saved then.
    """
    given = read("fit", arguments)
    session = Session(given.command)
    try:
        with session.interruption, quiet_lightning():
            asked, start = begin(session, given)
            training = train_model(settings(asked), session, start, [meter])
            task, data = training.task, training.data
            if not all(value.isfinite().all() for value in task.parameters()):  # nothing guarded it
                return {**key, "failed": "the weights are not finite", "sessions": sessions_of(run_dir)}
            val, importance = evaluate(task, data)
            result = finish(training, session.command)
            assert result is not None, "one process"
            shifted = {f"shifted_{by}": accuracy_of(task.net, data, by) for by in SHIFTS}
            steps = training.trainer.global_step
            return {**key, **found(task, meter, result), **shifted, "val_top1": val, "steps": steps,
                    "cv_importance": importance, "sessions": sessions_of(run_dir),
                    "predictions": file_sha256(run_dir / "predictions_test.csv"),
                    "predicted": predicted_classes(run_dir, data.class_names)}  # fmt: skip
    except TrainingDiverged as error:
        return {**key, "failed": str(error), "sessions": sessions_of(run_dir)}
    except Interrupted as stopped:
        tell(f"Stopped by {stopped.signal_name}: the same command goes on with {run_dir.name}.")
        raise
    finally:
        session.close()


def found(task: ClassificationTask, meter: Meter, result: RunResult) -> dict[str, Any]:
    """What the run's record says of its result and of what it cost."""
    summary = result.summary
    cost = measure_cost(task.net, summary.image_size)
    return {
        "failed": None if math.isfinite(summary.test.loss) else "the loss of the test is not finite",
        "test_top1": summary.test.correct / summary.test.total,
        "test_loss": summary.test.loss,
        "layers": [vars(layer) for layer in summary.layers],
        "cost": vars(cost),
        "curve": meter.curve,
        "cpu_s": round(meter.cpu_s, 1),
        "wall_s": round(summary.duration_s, 1),
        "images_per_s": round(summary.images_per_s, 1),
        "peak_mib": round(meter.peak_mib, 1),
        "steps_applied": summary.steps,
        "notes": list(summary.notes),
    }


def predicted_classes(run_dir: Path, class_names: Sequence[str]) -> str:
    """What a finished run predicts for every test image, a digit each; images by class, as they come within a class."""
    names = [csv_name(name) for name in class_names]
    with (run_dir / "predictions_test.csv").open(encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: names.index(row["label"]))
    return "".join(str(names.index(row["prediction"])) for row in rows)


def sessions_of(run_dir: Path) -> int:
    """How often the run was started."""
    return len(json.loads((run_dir / "sessions.json").read_text(encoding="utf-8")))
