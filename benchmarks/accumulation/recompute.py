"""How close does a balance loss's gradient, summed over micro-batches, come to that of the whole batch?

    python benchmarks/accumulation/recompute.py

prints every measured number of README.md, from record.json. The code that ran the study is benchmarks/accumulation.py
of commit 203ea649; it has left the tree.

A row of the record is one kind and number of images, one loss, and K micro-batches (`parts`) on one or two processes.
It has the projection of the accumulated gradient on the whole batch's (1 is right): the mean of four draws of weights
and images, the least and the most of them, and the mean cosine between the two gradients.
"""

import json
from pathlib import Path

RECORD = Path(__file__).with_name("record.json")
PAGE = "benchmarks/accumulation/README.md"
BATCHES = ((256, "pets"), (32, "pets"), (32, "noise"))
LOSSES = ("load_balancing", "importance", "load")
MICRO_BATCHES = (2, 4, 8, 16)


def read_rows() -> list[dict]:
    """All rows of the record."""
    return json.loads(RECORD.read_text(encoding="utf-8"))["rows"]


def cell(row: dict) -> str:
    """A cell of the table: mean projection (least to most), cosine."""
    return f"{row['projection']:.2f} ({row['least']:.2f} to {row['most']:.2f}), {row['cosine']:.3f}"


def table(rows: list[dict]) -> list[str]:
    """A line for each batch and loss, of one process; a column for each number of micro-batches."""
    cells = {
        (row["images"], row["kind"], row["loss"], row["parts"]): cell(row)
        for row in rows
        if row["processes"] == 1
    }
    lines = []
    for images, kind in BATCHES:
        for loss in LOSSES:
            columns = " | ".join(cells[images, kind, loss, parts] for parts in MICRO_BATCHES)
            lines.append(f"| {images} {kind} | {loss} | 1 | {columns} |")
    return lines


def processes_agree(rows: list[dict]) -> bool:
    """Whether the cells of two processes are those of one."""
    cells: dict[int, dict] = {1: {}, 2: {}}
    for row in rows:
        cells[row["processes"]][row["images"], row["kind"], row["loss"], row["parts"]] = cell(row)
    return cells[1] == cells[2]


def left_out(rows: list[dict]) -> str:
    """What the table leaves out: the z loss, a mean over images, and the rows of two processes."""
    z_is_exact = all(
        cell(row) == "1.00 (1.00 to 1.00), 1.000" for row in rows if row["loss"] == "z"
    )
    z = "has 1 everywhere" if z_is_exact else "differs from 1"
    values = "the same values" if processes_agree(rows) else "other values"
    return f"*z* {z}, and two processes have {values}"


def span(rows: list[dict], images: int, least: str, most: str) -> str:
    """The smallest and the largest value of all rows with so many images."""
    of_size = [row for row in rows if row["images"] == images]
    low, high = min(row[least] for row in of_size), max(row[most] for row in of_size)
    return f"{low:.2f} and {high:.2f}"


def statements() -> dict[str, list[str]]:
    """Page -> what it says, with the numbers of the record."""
    rows = read_rows()
    return {
        PAGE: [
            left_out(rows),
            *table(rows),
            f"With 256 images every draw is between {span(rows, 256, 'least', 'most')}",
            f"the mean is between {span(rows, 32, 'projection', 'projection')}",
            f"single draws lie between {span(rows, 32, 'least', 'most')}",
        ]
    }


if __name__ == "__main__":
    for page, texts in statements().items():
        print(page, *texts, sep="\n  ")
