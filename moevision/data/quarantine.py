"""The list of files that couldn't be read: they never stop a run unless they are many."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from moevision.data.dataset import BadImage
from moevision.errors import UserError
from moevision.files import write_text_atomic
from moevision.names import csv_name


class Quarantine:
    """Counts the bad pictures of a run once each, and stops it when they pass a share of a split."""

    def __init__(
        self,
        name_of: Callable[[str, int], str],
        sizes: dict[str, int],
        max_fraction: float,
        table: Path | None = None,
    ) -> None:
        """Start empty.

        Args:
            name_of: (split, index) -> sample id.
            sizes: number of pictures per split.
            max_fraction: largest share of a split that may be bad.
            table: file to write them to (columns path, reason, split), None for nowhere.
        """
        self.name_of, self.sizes, self.max_fraction, self.table = name_of, sizes, max_fraction, table
        self._reasons: dict[tuple[str, int], str] = {}

    def entries(self) -> list[tuple[str, str, str]]:
        """(path, reason, split) of every bad picture, in the order they were met."""
        return [(self.name_of(split, index), reason, split) for (split, index), reason in self._reasons.items()]

    def add(self, bad: Sequence[BadImage]) -> None:
        """Take note of bad pictures.

        Args:
            bad: the pictures; known ones are ignored.

        Raises:
            UserError: if more than ``max_fraction`` of a split is bad.
        """
        new = {(entry.split, entry.index): entry.reason for entry in bad}
        if new.keys() <= self._reasons.keys():
            return
        self._reasons = {**self._reasons, **new}
        if self.table is not None:
            self._write(self.table)
        for split, count in Counter(split for split, _ in self._reasons).items():
            if count > self.max_fraction * self.sizes[split]:
                raise UserError(self._too_many(split, count))

    def _too_many(self, split: str, count: int) -> str:
        """The sentence that stops the run."""
        first = [f"{name}: {reason}" for name, reason, where in self.entries() if where == split][:3]
        return (
            f"{count} of {self.sizes[split]} {split} images can't be used, more than the allowed share of "
            f"{self.max_fraction:g} (--data.max_bad_fraction): mend or remove them, first {'; '.join(first)}"
        )

    def _write(self, table: Path) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", "reason", "split"])
        writer.writerows([csv_name(path), csv_name(reason), split] for path, reason, split in self.entries())
        write_text_atomic(table, text.getvalue())
