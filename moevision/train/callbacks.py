"""What the command line hangs onto Lightning's Trainer: a stopwatch, and a check of a resumed schedule."""

from __future__ import annotations

from typing import Any

import lightning as L

from moevision.errors import UserError
from moevision.train.clock import AwakeClock


class Stopwatch(L.Callback):
    """Seconds and images of training proper, over all sessions of a run: validation and sleep are left out.

    Args:
        clock: what measures time.

    Attributes:
        train_s: seconds of training without validation.
        images: training images seen, over all processes.
    """

    def __init__(self, clock: AwakeClock) -> None:
        self.train_s = 0.0
        self.images = 0
        self._clock = clock
        self._started = 0.0
        self._run_started, self._earlier_s = clock.now(), 0.0

    @property
    def run_s(self) -> float:
        """Seconds since the run began, reading and validation included, interruptions left out."""
        return self._earlier_s + self._clock.now() - self._run_started

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on counting from."""
        return {"train_s": self.train_s, "images": self.images, "run_s": self.run_s}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.train_s, self.images = float(state_dict["train_s"]), int(state_dict["images"])
        self._earlier_s = float(state_dict["run_s"])

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start."""
        self._started = self._clock.now()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images of this batch, over all ranks."""
        self.images += len(batch["label"]) * trainer.world_size
        now = self._clock.now()
        self.train_s += now - self._started
        self._started = now

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on after validation."""
        self._started = self._clock.now()


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
