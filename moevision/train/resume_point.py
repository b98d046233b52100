"""Saves a point to go on from: between two optimizer steps, and at the end of an epoch.

Why between steps, at the start of the next batch and before any other callback sees it: only there is everything of a
step done, its rows in metrics.csv included (Lightning logs them after `on_train_batch_end`), and nothing of the next
one begun. The random generators are put back in `on_train_start`, after everything that draws from them in setting up.
The order of the pictures and their augmentation don't depend on them (`data/sampler.py`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from moevision.data import ImageDataModule
from moevision.errors import UserError
from moevision.train.checkpoint import (
    LAST,
    MARK,
    SafeCheckpointIO,
    part_random_state,
    random_state,
    restore_random_state,
)
from moevision.train.metrics_file import RunLogger
from moevision.train.processes import AwakeClock, Interruption, gather, tell


@dataclass(frozen=True)
class CheckpointConfig:
    """How often a point to go on from is saved, besides the end of every epoch.

    Attributes:
        every_minutes: minutes between two of them.
        every_steps: optimizer steps between two of them; null is no limit.
    """

    every_minutes: float = 10.0
    every_steps: int | None = None

    def __post_init__(self) -> None:
        """Refuse what would never or always save."""
        if self.every_minutes <= 0 or (self.every_steps is not None and self.every_steps < 1):
            raise UserError("--checkpoint.every_minutes must be above 0, and --checkpoint.every_steps at least 1.")


class ResumePoint(L.Callback):
    """Saves `last.ckpt` between steps, stops there when asked to, and puts back what Lightning doesn't.

    It must be the first callback, and `EpochEnd` the last.

    Args:
        folder: where checkpoints lie.
        files: what writes them.
        config: how often.
        interruption: listens to signals.
        clock: notices that the machine slept.

    Attributes:
        fingerprint: what the numbers depend on, for the checkpoint.
        began: whether training has begun, so that nothing of its setting up can fail any more.
    """

    def __init__(
        self,
        folder: Path,
        files: SafeCheckpointIO,
        config: CheckpointConfig,
        interruption: Interruption,
        clock: AwakeClock,
    ) -> None:
        self.path, self.files, self.config = folder / LAST, files, config
        self.interruption, self.clock = interruption, clock
        self.fingerprint: dict[str, Any] = {}
        self.began = False
        self._saved_s, self._saved_step = time.monotonic(), -1
        self._states: list[dict[str, Any]] | None = None
        self._slept = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the random generators back; from here on signals wait for the end of a step."""
        if self._states is not None and len(self._states) == trainer.world_size:
            restore_random_state(self._states[trainer.global_rank])
        elif trainer.world_size > 1:
            part_random_state(trainer.global_rank)
        self._states, self.began = None, True
        self._saved_s, self._saved_step = time.monotonic(), trainer.global_step
        self.clock.tick()
        self.interruption.listen()  # Lightning took SIGTERM, and SIGUSR1 on a cluster, a moment ago
        self.interruption.training = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time to, and stop if a signal asked for it.

        Raises:
            Interrupted: if so.
        """
        gap = self.clock.tick()
        if gap > 1:
            tell(f"note: the process was asleep for {gap / 60:.1f} min, which isn't counted as training time.")
            self._slept = True
        if trainer.fit_loop.epoch_loop.batch_progress.current.completed % trainer.accumulate_grad_batches:
            return  # gradients of half a step can't be saved
        wanted, stop = self._decide(trainer)
        if (wanted or stop) and trainer.global_step != self._saved_step:
            with _between_batches(trainer):
                self.save(trainer)
        elif self.files.waiting:
            self.files.retry()
        if stop:
            self._stop()

    def _decide(self, trainer: L.Trainer) -> tuple[bool, bool]:
        """Whether to save and whether to stop, the same on every process."""
        since = trainer.global_step - self._saved_step
        due = self.config.every_steps is not None and since >= self.config.every_steps
        due = due or self._slept or time.monotonic() - self._saved_s >= 60 * self.config.every_minutes
        stop = self.interruption.requested is not None
        if trainer.world_size > 1:
            due = trainer.strategy.reduce_boolean_decision(due, all=False)
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        return due, stop

    def _stop(self) -> None:
        self.files.retry(now=True)
        self.interruption.training = False
        self.interruption.stop()

    def save(self, trainer: L.Trainer) -> None:
        """Write `last.ckpt`; every process must call it."""
        trainer.save_checkpoint(self.path)
        self._saved_s, self._saved_step, self._slept = time.monotonic(), trainer.global_step, False

    def end_of_epoch(self, trainer: L.Trainer) -> None:
        """Save after an epoch and its validation, and stop if a signal asked for it."""
        self.save(trainer)
        _, stop = self._decide(trainer)
        if stop:
            self._stop()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on signals act at once: everything is saved."""
        self.files.retry(now=True)
        self.interruption.training = False
        if self.interruption.requested is not None:
            self.interruption.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """As at the end."""
        self.interruption.training = False

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random generators of all processes, the place in metrics.csv, and what the numbers depend on."""
        checkpoint[MARK] = {
            "random": gather(random_state()),
            "metrics_rows": _logged_rows(trainer),
            "fingerprint": self.fingerprint,
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Cut metrics.csv where the checkpoint was made, and follow a run folder that was moved."""
        for name, state in checkpoint.get("callbacks", {}).items():
            if name.startswith("ModelCheckpoint"):
                checkpoint["callbacks"][name] = _moved(state, self.path.parent.resolve())
        if trainer.state.fn != "fit":
            return
        _stay_in_epoch(trainer, checkpoint)
        ours = checkpoint.get(MARK, {})
        self._states = ours.get("random")
        rows = ours.get("metrics_rows")
        if rows is not None and trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, RunLogger):
                    logger.file.cut(rows)


class EpochEnd(Checkpoint):
    """Lets a `ResumePoint` save after the epoch's other callbacks; Lightning calls Checkpoint callbacks last."""

    def __init__(self, point: ResumePoint) -> None:
        self.point = point

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save."""
        self.point.end_of_epoch(trainer)


@contextmanager
def _between_batches(trainer: L.Trainer) -> Iterator[None]:
    """Show Lightning's loops as they were before the next batch was fetched.

    A batch that is counted as fetched and not as done would be left out. Where a validation was due after the step,
    Lightning expects a checkpoint from its end, at which the step isn't counted for the loggers yet.
    """
    loop = trainer.fit_loop.epoch_loop
    progress, last = loop.batch_progress, loop.batch_progress.is_last_batch
    progress.is_last_batch = False
    progress.total.ready -= 1
    progress.current.ready -= 1
    validated = int(loop._should_check_val_fx(cast(Any, trainer.fit_loop._data_fetcher)))
    loop._batches_that_stepped -= validated
    try:
        yield
    finally:
        loop._batches_that_stepped += validated
        progress.current.ready += 1
        progress.total.ready += 1
        progress.is_last_batch = last


def _stay_in_epoch(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Go back to an epoch's last step if it has become shorter than where it was interrupted.

    Pictures may have vanished since. With nothing left to train, Lightning would leave out its validation too.
    """
    data = cast(Any, trainer).datamodule
    state = checkpoint.get(type(data).__qualname__)
    if state is None or not isinstance(data, ImageDataModule):
        return
    batches = min(data.train_batches(), _limit(trainer, data.train_batches()))
    if state["batch"] < batches or not batches:
        return
    window = trainer.accumulate_grad_batches
    batch = (batches - 1) // window * window
    tell("note: the epoch is shorter now than where it was interrupted: its last step is done again.")
    data.load_state_dict({**state, "batch": batch})
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    progress["current"] = dict.fromkeys(progress["current"], batch)
    progress["is_last_batch"] = False


def _limit(trainer: L.Trainer, batches: int) -> int:
    limit = trainer.limit_train_batches
    return limit if isinstance(limit, int) else int(limit * batches)


def _logged_rows(trainer: L.Trainer) -> int | None:
    if not trainer.is_global_zero:
        return None
    for logger in trainer.loggers:
        if isinstance(logger, RunLogger):
            return logger.file.sync()
    return None


def _moved(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """ModelCheckpoint's state with its paths below `folder`; it forgets the best score where they differ."""
    old = state.get("dirpath")
    if not old or Path(old) == folder:
        return state

    def here(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(old):
            return str(folder) + value[len(old) :]
        return {here(key): each for key, each in value.items()} if isinstance(value, dict) else value

    return {key: here(value) for key, value in state.items()}
