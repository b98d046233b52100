"""All that this package uses of Lightning's and its loops' private parts, in one place: checked against Lightning 2.6.

No other module names an attribute of Lightning's that begins with an underscore, nor a counter of its loops:
`tests/train/test_lightning_internals.py` looks for them, and for the names below in the version that is installed.
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

    def cut(self, rows: int) -> None:
        """Drop all rows after the first `rows`."""
        lines = self._lines()  # the first one has the columns
        if len(lines) > rows + 1:
            write_text_atomic(self.metrics_file_path, "".join(lines[: rows + 1]))

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Replace the file by its rows under these columns at once; Lightning would lose them if killed meanwhile."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames)
        writer.writeheader()
        writer.writerows(csv.DictReader(self._lines()))
        write_text_atomic(self.metrics_file_path, text.getvalue())

    def save(self) -> None:
        """Write the rows that are still in memory, without hparams.yaml."""
        super(ExperimentWriter, self).save()

    def count(self) -> int:
        """Write the rows that are still in memory; how many rows the file then has."""
        self.save()
        return max(0, len(self._lines()) - 1)


# ---- the loops


@contextmanager
def between_batches(trainer: Trainer) -> Iterator[None]:
    """Inside, Lightning's loops are as they were before the next batch was fetched.

    A batch that is counted as fetched and not as done would be left out. Where a validation was due after the step,
    Lightning expects a checkpoint from its end, at which the step isn't counted for the loggers yet.
    """
    loop = trainer.fit_loop.epoch_loop
    progress = loop.batch_progress
    is_last_batch = progress.is_last_batch
    progress.is_last_batch = False
    progress.total.ready -= 1
    progress.current.ready -= 1
    # With the counters as they were then.
    validated = int(loop._should_check_val_fx(cast(Any, trainer.fit_loop._data_fetcher)))
    loop._batches_that_stepped -= validated
    try:
        yield
    finally:
        loop._batches_that_stepped += validated
        progress.current.ready += 1
        progress.total.ready += 1
        progress.is_last_batch = is_last_batch


def start_at_next_epoch(trainer: Trainer, checkpoint: State) -> None:
    """Go on behind an epoch that has ended also where --trainer.max_steps counts steps.

    There Lightning 2.6 (`_FitLoop.restarting`) takes every checkpoint for one from within an epoch: it would end that
    epoch a second time, and leave out the images of the next one. Counted by epochs it doesn't.
    """
    cast(Any, trainer).fit_loop._iteration_based_training = lambda: False
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    # Lightning does it, but not where no step is left to do.
    epochs["completed"] = epochs["processed"]


def set_batches_done(checkpoint: State, batches: int) -> None:
    """Let Lightning go on behind so many batches of the epoch."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    progress["current"] = dict.fromkeys(progress["current"], batches)
    progress["is_last_batch"] = False


def leave_epochs_uncounted(trainer: Trainer) -> None:
    """Let the progress bar of a training that counts steps say `Epoch 0`, where it would say `Epoch 0/-2`."""
    if trainer.max_epochs in (None, -1) and trainer.progress_bar_callback is not None:
        cast(Any, trainer.progress_bar_callback)._get_train_description = "Epoch {:<4}".format


# ---- the strategy of sharded training


def set_process_group(strategy: ModelParallelStrategy, backend: str | None) -> None:
    """Let all processes read images of their own, and talk over `backend`; None: the device's own."""
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes
    if backend is not None:
        strategy._process_group_backend = backend
