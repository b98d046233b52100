"""Two real Trainers beside each other: `moevision fit`'s, and what one would write with timm and Lightning alone.

The peer is the dense twin of equal active FLOPs in an ordinary LightningModule: cross-entropy, AdamW, `bf16-mixed`,
gradient clipping, one logged loss, in a process of its own that is set up as torch leaves it. Ours is
`ClassificationTask` with the callbacks that `moevision fit` adds by default (guard and router health). Both get the
same batches, all patches, and float32 master weights. A Trainer can't be stopped between two steps, so they take turns
in short trainings, whose first steps aren't counted; a step is the time from one batch being asked for to the next.

Axes: B images.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from moevision.commands.benchmark.step import noise_batch
from moevision.commands.benchmark.subject import Subject
from moevision.commands.benchmark.timing import Timings, synchronize
from moevision.losses import AuxLossWeights
from moevision.models.config import MoEConfig
from moevision.train.cli import watching
from moevision.train.guard import GuardConfig
from moevision.train.optim import EmaConfig
from moevision.train.task import ClassificationTask

OURS, PLAIN = "MoE, moevision fit", "dense twin, plain timm in Lightning"
BLOCK = 20  # counted steps of one turn
_SKIPPED = 5  # steps at its beginning: moments are made, a first snapshot is taken, the loop sets itself up
_PRECISION = {"bf16": "bf16-mixed", "fp32": "32-true"}


class PlainModule(L.LightningModule):
    """What a tutorial shows: a network, cross-entropy, AdamW."""

    def __init__(self, net: nn.Module, lr: float, weight_decay: float, label_smoothing: float) -> None:
        super().__init__()
        self.net, self.lr, self.weight_decay, self.label_smoothing = net, lr, weight_decay, label_smoothing

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        loss = F.cross_entropy(self.net(batch["image"]), batch["label"], label_smoothing=self.label_smoothing)
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

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """A step begins, the one before is over."""
        synchronize(self.device)
        self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of each step but the first ones and the last."""
        pairs = zip(self.marks[_SKIPPED:], self.marks[_SKIPPED + 1 :], strict=False)
        return [after - before for before, after in pairs]


class _Batches(Dataset[dict[str, Tensor]]):
    """One batch of noise again and again, so that neither side waits for data."""

    def __init__(self, subject: Subject, count: int) -> None:
        self.count = count
        images, labels = noise_batch(subject, torch.device("cpu"))
        self.batch = {"image": images, "label": labels, "index": torch.arange(len(labels))}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.batch


def compare_in_lightning(
    subject: Subject, *, precision: str, device: torch.device, repetitions: int, on_step: Callable[[], object]
) -> Timings:
    """Time both Trainers in turns.

    Args:
        subject: what to train; all patches are used on both sides.
        precision: `bf16` or `fp32`.
        device: where.
        repetitions: steps to count, rounded up to whole turns.
        on_step: called after each turn of one.

    Returns:
        Equally many times in seconds of `OURS` and `PLAIN`; times of equal index stem from the same round of turns.
    """
    subject = subject.without_patch_drop()
    timings = Timings({OURS: [], PLAIN: []})
    task = _ours(subject)
    # An own process: freed memory is kept in this one, and that can't be taken back.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        process.submit(_begin_plain, subject, torch.get_num_threads()).result()

        def ours() -> list[float]:
            return _train(task, subject, precision, device, guarded=True)

        def plain() -> list[float]:
            return process.submit(_turn_of_plain, precision, str(device)).result()

        for round_number in range(-(-repetitions // BLOCK)):
            for name, turn in ((OURS, ours), (PLAIN, plain))[:: 1 if round_number % 2 else -1]:
                timings.seconds[name] += turn()
                on_step()
    return timings


_plain: dict[str, Any] = {}  # of the peer's process: what it trains


def _begin_plain(subject: Subject, threads: int) -> None:
    torch.set_num_threads(threads)
    optim = subject.optimizer_config()
    net = subject.build("active_flops")
    _plain["module"] = PlainModule(net, optim.lr, optim.weight_decay, subject.label_smoothing)
    _plain["subject"] = subject


def _turn_of_plain(precision: str, device: str) -> list[float]:
    return _train(_plain["module"], _plain["subject"], precision, torch.device(device), guarded=False)


def turns(repetitions: int) -> int:
    """How often `compare_in_lightning` calls `on_step`."""
    return 2 * -(-repetitions // BLOCK)


def _ours(subject: Subject) -> L.LightningModule:
    torch.manual_seed(0)
    return ClassificationTask(
        arch=MoEConfig(**subject.arch),
        optim=subject.optimizer_config(),
        aux=AuxLossWeights(**subject.aux),
        label_smoothing=subject.label_smoothing,
        grad_checkpointing=subject.grad_checkpointing,
        num_classes=subject.num_classes,
        image_size=subject.image_size,
    )


def _train(
    module: L.LightningModule, subject: Subject, precision: str, device: torch.device, *, guarded: bool
) -> list[float]:
    """One turn: a short training, and the seconds of its counted steps."""
    batches = _Batches(subject, BLOCK + _SKIPPED + 1)
    clock = _StepClock(device)
    watchers = watching(None, EmaConfig(), GuardConfig()) if guarded else []
    with _silence(), tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision=_PRECISION[precision],  # type: ignore[arg-type]
            max_epochs=1,
            gradient_clip_val=1.0,
            callbacks=[*watchers, clock],
            logger=CSVLogger(folder),
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(batches, batch_size=None))
    return clock.seconds()


@contextmanager
def _silence() -> Iterator[None]:
    """Without Lightning's notes on devices and workers, once per turn."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
