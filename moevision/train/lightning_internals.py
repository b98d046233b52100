"""All accesses to private attributes of Lightning and to the counters of its loops: checked against Lightning 2.6.

No other module names an attribute of Lightning's that begins with an underscore. A counter of its loops is read only
in data/module.py, which may not import this one. `tests/train/test_lightning_internals.py` looks for them, and for the
names below in the version that is installed.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from lightning import Trainer
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.strategies import ModelParallelStrategy

from moevision.files import write_text_atomic
from moevision.types import State


def command_of_this_process() -> list[str]:
    """Program and arguments that start this command once more."""
    return list(_basic_subprocess_cmd())


# ---- metrics.csv


class RunLogger(CSVLogger):
    """Lightning's CSVLogger in a run folder, without deleting what is there."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir, name="", version="")

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsFile:
        """The `MetricsFile`; on the first process only."""
        if self._experiment is None:
            self._experiment = MetricsFile(self.log_dir)
        return cast(MetricsFile, self._experiment)


class MetricsFile(ExperimentWriter):
    """metrics.csv, to which a resumed run adds its rows."""

    def _check_log_dir_exists(self) -> None:
        """Read the columns of the file; Lightning's own method would delete it."""
        self.metrics_keys = next(csv.reader(self._lines()), [])

    def _lines(self) -> list[str]:
        path = Path(self.metrics_file_path)
        return path.read_bytes().decode().splitlines(keepends=True) if path.is_file() else []

    def truncate(self, rows: int) -> None:
        """Drop all rows after the first `rows`."""
        lines = self._lines()  # the first one has the columns
        if len(lines) > rows + 1:
            write_text_atomic(self.metrics_file_path, "".join(lines[: rows + 1]))

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Rewrite the file atomically under these columns; Lightning would lose the rows if killed meanwhile."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames)
        writer.writeheader()
        writer.writerows(csv.DictReader(self._lines()))
        write_text_atomic(self.metrics_file_path, text.getvalue())

    def save(self) -> None:
        """Write the rows that are still in memory."""
        super(
            ExperimentWriter, self
        ).save()  # not ExperimentWriter's own, which writes hparams.yaml, too

    def flush_and_count(self) -> int:
        """Write the rows that are still in memory; how many rows the file then has."""
        self.save()
        return max(0, len(self._lines()) - 1)


# ---- the loops


@contextmanager
def loops_before_next_fetch(trainer: Trainer) -> Iterator[None]:
    """The scope in which a checkpoint is saved within an epoch: loops are as before the next batch was fetched.

    That batch is uncounted, so that a resumed run trains on it. If a validation is due after this step, so is the step
    for the loggers: Lightning saves its own checkpoints at the end of validations, where it isn't counted yet.
    """
    loop = trainer.fit_loop.epoch_loop
    progress = loop.batch_progress
    is_last_batch = progress.is_last_batch
    progress.is_last_batch = False
    progress.total.ready -= 1
    progress.current.ready -= 1
    # By the counters as lowered above.
    due_validations = int(loop._should_check_val_fx(cast(Any, trainer.fit_loop._data_fetcher)))
    loop._batches_that_stepped -= due_validations
    try:
        yield
    finally:
        loop._batches_that_stepped += due_validations
        progress.current.ready += 1
        progress.total.ready += 1
        progress.is_last_batch = is_last_batch


def resume_after_finished_epoch(trainer: Trainer, checkpoint: State) -> None:
    """Go on after an epoch that has ended, also where --trainer.max_steps counts steps.

    There Lightning 2.6 (`_FitLoop.restarting`) takes the end of an epoch for a place within it: it would end the epoch
    a second time and leave out the images of the next one. It doesn't where it believes that epochs are counted.
    """
    cast(Any, trainer).fit_loop._iteration_based_training = lambda: False
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    # Lightning does so itself unless no step is left to do.
    epochs["completed"] = epochs["processed"]


def set_batches_done(checkpoint: State, batches: int) -> None:
    """Let a resumed run go on after the first `batches` batches of the epoch: all counters get this value."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    progress["current"] = dict.fromkeys(progress["current"], batches)
    progress["is_last_batch"] = False


def hide_unknown_epoch_total(trainer: Trainer) -> None:
    """Let the progress bar of a training that counts steps say `Epoch 0`, where it would say `Epoch 0/-2`."""
    if trainer.max_epochs in (None, -1) and trainer.progress_bar_callback is not None:
        cast(Any, trainer.progress_bar_callback)._get_train_description = "Epoch {:<4}".format


# ---- the strategy of sharded training


def configure_data_parallel(strategy: ModelParallelStrategy, backend: str | None) -> None:
    """Let each process read images of its own, and talk over `backend`; None: the device's default."""
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes
    if backend is not None:
        strategy._process_group_backend = backend
