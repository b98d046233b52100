"""metrics.csv that only grows: a resumed run goes on in the file of the run that was interrupted.

Lightning's CSVLogger (2.6.6) deletes the file that it finds. Here the rows stay, up to the one that the checkpoint
knows: what a killed process wrote after it belongs to steps that are done again, and would stand there twice.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from torch import Tensor

from moevision.files import append_bytes, sync_file, write_text_atomic
from moevision.train.processes import tell


class RunLogger(CSVLogger):
    """Lightning's CSVLogger in a run folder, without deleting what is there."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir, name="", version="")
        self._path = run_dir / "metrics.csv"

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer, as Lightning asks for it; on the first process only."""
        return self.file

    @property
    def file(self) -> MetricsFile:
        """The file behind it."""
        if self._experiment is None:
            self._experiment = MetricsFile(self._path)
        return cast(MetricsFile, self._experiment)


class MetricsFile(ExperimentWriter):
    """A CSV file of metrics that is appended to, row by row.

    A column that comes later is added by writing the file anew, whole or not at all. Rows that a full disk refuses are
    kept, and written with the next ones.
    """

    def __init__(self, path: Path) -> None:
        # not ExperimentWriter's: it deletes the file
        self.path, self.log_dir, self.hparams = path, str(path.parent), {}
        self.columns: list[str] = []
        self.rows = 0
        self._unwritten: list[dict[str, Any]] = []
        self._failed = False
        self._open()

    def _open(self) -> None:
        if not self.path.is_file():
            return
        with self.path.open(encoding="utf-8", newline="") as file:
            whole = file.read()
        kept = whole[: whole.rfind("\n") + 1]  # a killed process may have left half a row
        rows = list(csv.reader(io.StringIO(kept)))
        if rows:
            self.columns, self.rows = rows[0], len(rows) - 1
        if kept != whole:
            write_text_atomic(self.path, kept)

    def cut(self, rows: int) -> int:
        """Drop all rows after the first `rows`; the number of those that were dropped."""
        dropped = self.rows - rows
        if dropped <= 0:
            return 0
        found = self._read()[:rows]
        self._write_all(found)
        self.rows = rows
        return dropped

    def log_metrics(self, metrics_dict: Mapping[str, Any], step: int | None = None) -> None:
        """Take one row."""
        row = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics_dict.items()}
        self._unwritten.append({**row, "step": self.rows + len(self._unwritten) if step is None else step})

    def save(self) -> None:
        """Append the rows that are not in the file yet."""
        if not self._unwritten:
            return
        new = set().union(*self._unwritten) - set(self.columns)
        try:
            if new:
                columns = sorted([*self.columns, *new])
                earlier = self._read() if self.rows else []
                self.columns, before = columns, self.columns
                try:
                    self._write_all([*earlier, *self._unwritten])
                except OSError:
                    self.columns = before
                    raise
            else:
                self._append()
        except OSError as error:
            self._warn(error)
            return
        self.rows += len(self._unwritten)
        self._unwritten, self._failed = [], False

    def sync(self) -> int:
        """Flush to the disk what is written; the number of rows in the file and waiting, for a checkpoint."""
        self.save()
        try:
            if self.path.is_file():
                sync_file(self.path)
        except OSError as error:
            self._warn(error)
        return self.rows + len(self._unwritten)

    def _warn(self, error: OSError) -> None:
        if not self._failed:
            tell(f"warning: {self.path} can't be written ({error.strerror}); its rows are kept for later.")
        self._failed = True

    def _read(self) -> list[dict[str, Any]]:
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _text(self, rows: list[dict[str, Any]], *, header: bool) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=self.columns)
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def _write_all(self, rows: list[dict[str, Any]]) -> None:
        write_text_atomic(self.path, self._text(rows, header=True))

    def _append(self) -> None:
        append_bytes(self.path, self._text(self._unwritten, header=False).encode("utf-8"))
