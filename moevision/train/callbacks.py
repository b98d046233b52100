"""What the command line hangs onto Lightning's Trainer: a stopwatch, and a check of a resumed schedule."""

from __future__ import annotations

import time
from typing import Any

import lightning as L

from moevision.errors import UserError


class Stopwatch(L.Callback):
    """Seconds and images of training proper: validation is left out."""

    def __init__(self) -> None:
        self.train_s = 0.0
        self.images = 0
        self._started = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images of this batch, over all ranks."""
        self.images += len(batch["label"]) * trainer.world_size
        now = time.perf_counter()
        self.train_s += now - self._started
        self._started = now

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on after validation."""
        self._started = time.perf_counter()


class ScheduleCheck(L.Callback):
    """A resumed training keeps the learning rate schedule that it began with, so it can't be made longer."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the steps of the restored schedule with those to come.

        Raises:
            UserError: if the schedule would end before the training does.
        """
        planned = trainer.estimated_stepping_batches
        for config in trainer.lr_scheduler_configs:
            known = getattr(config.scheduler, "total_steps", planned)
            if known < planned:
                raise UserError(
                    f"The checkpoint's learning rate ends after {known:,} steps and this training has {planned:,}: go "
                    "on with its own epochs, or start a new run from its weights with --pretrained runs/NAME/model."
                )
