"""What the command line hangs onto Lightning's Trainer: a stopwatch, and a check of a resumed schedule.

Times differ from run to run, so they stand in summary.md and never in metrics.csv, which a resumed run repeats exactly.
"""

from __future__ import annotations

from typing import Any, cast

import lightning as L

from moevision.errors import UserError
from moevision.train.data_wait import data_wait_advice
from moevision.train.processes import AwakeClock, tell

_SETTLED_S = 30.0  # before that the first batches, which come late, weigh too much


class Stopwatch(L.Callback):
    """Seconds and images of training proper, over all sessions of a run: validation and sleep are left out.

    Args:
        clock: what measures time.

    Attributes:
        train_s: seconds of training without validation.
        images: training images seen, over all processes.
        data_wait_s: seconds of `train_s` in which this process waited for a batch; None where the loader doesn't say
            (`moevision.data.loader.ImageLoader` does).
    """

    def __init__(self, clock: AwakeClock) -> None:
        self.train_s = 0.0
        self.images = 0
        self.data_wait_s: float | None = 0.0
        self._clock = clock
        self._started = 0.0
        self._waited: float | None = 0.0
        self._advised = False
        self._run_started, self._earlier_s = clock.now(), 0.0

    @classmethod
    def of(cls, trainer: L.Trainer) -> Stopwatch | None:
        """The stopwatch of this training, if it has one."""
        return next((callback for callback in cast(Any, trainer).callbacks if isinstance(callback, cls)), None)

    @property
    def data_wait(self) -> float | None:
        """Share of the training time in which the process waited for data, in [0, 1]; None if it isn't known."""
        return None if self.data_wait_s is None or not self.train_s else self.data_wait_s / self.train_s

    @property
    def run_s(self) -> float:
        """Seconds since the run began, reading and validation included, interruptions left out."""
        return self._earlier_s + self._clock.now() - self._run_started

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on counting from."""
        counts = {"train_s": self.train_s, "images": self.images, "run_s": self.run_s}
        return {**counts, "data_wait_s": self.data_wait_s}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.train_s, self.images = float(state_dict["train_s"]), int(state_dict["images"])
        self._earlier_s = float(state_dict["run_s"])
        self.data_wait_s = state_dict.get("data_wait_s")  # earlier versions didn't count it

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start."""
        self._start(trainer)

    def _start(self, trainer: L.Trainer) -> None:
        self._started, self._waited = self._clock.now(), getattr(trainer.train_dataloader, "wait_s", None)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images of this batch, over all ranks."""
        self.images += len(batch["label"]) * trainer.world_size
        began, waited = self._started, self._waited
        self._start(trainer)
        self.train_s += self._started - began
        if self.data_wait_s is None or waited is None or self._waited is None:
            self.data_wait_s = None
        else:
            self.data_wait_s += self._waited - waited

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on after validation."""
        self._start(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say once, while it can still be mended, that training waits for its data."""
        if self._advised or self.train_s < _SETTLED_S or not trainer.is_global_zero:
            return
        self._advised = True
        for sentence in data_wait_advice(self.data_wait, cast(Any, trainer).datamodule):
            tell(sentence)


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
                    "on with its own epochs and number of processes, or start a new run from its weights with "
                    "--pretrained runs/NAME/model."
                )
