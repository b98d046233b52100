"""`Table`: a few rows of numbers that show themselves as a table, in a notebook and as text."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, repr=False)
class Table:
    """Cells as they shall be read; a notebook shows the table where it is the last line of a cell.

    Attributes:
        head: names of the columns.
        rows: as many cells each; the first names the row.

    >>> Table(["expert", "share"], [["E0", "9 %"], ["E1", "16 %"]])
    expert  share
    E0        9 %
    E1       16 %
    """

    head: Sequence[object]
    rows: Sequence[Sequence[object]]

    def __repr__(self) -> str:
        """Columns of text: the first to the left, the others to the right."""
        lines = [[str(cell) for cell in row] for row in (self.head, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                [row[0].ljust(widths[0]), *(cell.rjust(wide) for cell, wide in zip(row[1:], widths[1:], strict=True))]
            )
            for row in lines
        )

    def _repr_html_(self) -> str:
        def line(kind: str, row: Sequence[object]) -> str:
            cells = (f'<{kind} style="text-align:left">{html.escape(str(cell))}</{kind}>' for cell in row)
            return f"<tr>{''.join(cells)}</tr>"

        return f"<table>{line('th', self.head)}{''.join(line('td', row) for row in self.rows)}</table>"
