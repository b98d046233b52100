"""Two real Trainers beside each other: `moevision fit`'s, and what one would write with timm and Lightning alone.

The peer is the dense twin of equal active FLOPs in an ordinary LightningModule: cross-entropy, AdamW, `bf16-mixed`,
gradient clipping, one logged loss, in a process of its own that is set up as torch leaves it. Ours is
`ClassificationTask` with the callbacks that `moevision fit` adds by default (guard and router health). Both get the
same batches, all patches, and float32 master weights. A Trainer can't be stopped between two steps, so they take turns
in short trainings, whose first steps aren't counted; a step is the time from one batch being asked for to the next.

Axes: B images.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.subject import Subject, noise_batch
from benchmarks.timing import Timings, synchronize
from moevision.config import EmaConfig
from moevision.train.fit import watching
from moevision.train.guard import GuardConfig
from moevision.train.optim import OptimizerConfig
from tests.train.quiet import quiet_trainer

OURS, PLAIN = "MoE, moevision fit", "dense twin, plain timm in Lightning"
BLOCK = 20  # counted steps of one turn
_SKIPPED = 5  # steps at its beginning: moments are made, a first snapshot is taken, the loop sets itself up
_PRECISION = {"bf16": "bf16-mixed", "fp32": "32-true"}


class PlainModule(L.LightningModule):
    """What a tutorial shows: a network, cross-entropy, AdamW."""

    def __init__(
        self, net: nn.Module, lr: float, weight_decay: float, label_smoothing: float
    ) -> None:
        super().__init__()
        self.net, self.label_smoothing = net, label_smoothing
        self.lr, self.weight_decay = lr, weight_decay

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        logits, smoothing = self.net(batch["image"]), self.label_smoothing
        loss = F.cross_entropy(logits, batch["label"], label_smoothing=smoothing)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW as torch sets it up."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)


class _StepClock(L.Callback):
    """Times at which training asked for a batch."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[float] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A step begins, the one before is over."""
        synchronize(self.device)
        self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of each step but the first ones and the last."""
        pairs = zip(self.marks[_SKIPPED:], self.marks[_SKIPPED + 1 :], strict=False)
        return [after - before for before, after in pairs]


def compare_in_lightning(
    subject: Subject,
    *,
    precision: str,
    device: torch.device,
    repetitions: int,
) -> Timings:
    """Time both Trainers in turns, with all patches; `repetitions` steps, rounded up to whole turns.

    Returns:
        Equally many times in seconds of `OURS` and `PLAIN`; times of equal index stem from the same round of turns.
    """
    subject = replace(subject, arch={**subject.arch, "patch_drop_rate": 0.0})
    timings = Timings({OURS: [], PLAIN: []})
    torch.manual_seed(0)
    task = subject.task()
    # An own process: freed memory is kept in this one, and that can't be taken back.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        process.submit(_begin_plain, subject, torch.get_num_threads()).result()

        def ours() -> list[float]:
            return _train(task, subject, precision, device, watching(EmaConfig(), GuardConfig()))

        def plain() -> list[float]:
            return process.submit(_turn_of_plain, precision, device).result()

        for round_number in range(-(-repetitions // BLOCK)):
            for name, turn in ((OURS, ours), (PLAIN, plain))[:: 1 if round_number % 2 else -1]:
                timings.seconds[name] += turn()
    return timings


_plain: dict[str, Any] = {}  # of the peer's process: what it trains


def _begin_plain(subject: Subject, threads: int) -> None:
    torch.set_num_threads(threads)
    optim = OptimizerConfig(**subject.optim)
    net = subject.build("active_flops")
    _plain["module"] = PlainModule(net, optim.lr, optim.weight_decay, subject.label_smoothing)
    _plain["subject"] = subject


def _turn_of_plain(precision: str, device: torch.device) -> list[float]:
    return _train(_plain["module"], _plain["subject"], precision, device, [])


def _train(
    module: L.LightningModule,
    subject: Subject,
    precision: str,
    device: torch.device,
    watchers: list[L.Callback],
) -> list[float]:
    """One turn: a short training on one batch of noise, and the seconds of its counted steps."""
    images, labels = noise_batch(subject)
    batch = {"image": images, "label": labels, "index": torch.arange(len(labels))}
    clock = _StepClock(device)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's notes on devices and workers
        trainer = quiet_trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            precision=_PRECISION[precision],
            max_epochs=1,
            callbacks=[*watchers, clock],
            logger=CSVLogger(folder),
            log_every_n_steps=10,
        )
        trainer.fit(module, DataLoader([batch] * (BLOCK + _SKIPPED + 1), batch_size=None))
    return clock.seconds()
