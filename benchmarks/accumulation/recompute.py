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

BATCHES = ((256, "pets"), (32, "pets"), (32, "noise"))
LOSSES = ("load_balancing", "importance", "load")
MICRO_BATCHES = (2, 4, 8, 16)


def cell(row: dict) -> str:
    """A cell of the table: mean projection (least to most), cosine."""
    return f"{row['projection']:.2f} ({row['least']:.2f} to {row['most']:.2f}), {row['cosine']:.3f}"


def table(rows: list[dict]) -> list[str]:
    """A line for each batch and loss, of one process; a column for each number of micro-batches.

    What it leaves out stands in the last line: the z loss, a mean over images, and the rows of two processes.
    """
    cells: dict[int, dict] = {1: {}, 2: {}}
    for row in rows:
        cells[row["processes"]][row["images"], row["kind"], row["loss"], row["parts"]] = cell(row)
    lines = []
    for images, kind in BATCHES:
        for loss in LOSSES:
            columns = " | ".join(cells[1][images, kind, loss, parts] for parts in MICRO_BATCHES)
            lines.append(f"| {images} {kind} | {loss} | 1 | {columns} |")
    of_z = {cell(row) for row in rows if row["loss"] == "z"}
    z = "has 1 everywhere" if of_z == {"1.00 (1.00 to 1.00), 1.000"} else "differs from 1"
    values = "the same values" if cells[1] == cells[2] else "other values"
    return [*lines, f"*z* {z}, and two processes have {values}"]


def span(rows: list[dict], images: int, least: str, most: str) -> str:
    """The smallest and the largest value of all rows with so many images."""
    of_size = [row for row in rows if row["images"] == images]
    low, high = min(row[least] for row in of_size), max(row[most] for row in of_size)
    return f"{low:.2f} and {high:.2f}"


def statements() -> dict[str, list[str]]:
    """Page -> what it says, with the numbers of the record."""
    text = Path(__file__).with_name("record.json").read_text(encoding="utf-8")
    rows = json.loads(text)["rows"]
    return {
        "benchmarks/accumulation/README.md": [
            *table(rows),
            f"With 256 images every draw is between {span(rows, 256, 'least', 'most')}",
            f"the mean is between {span(rows, 32, 'projection', 'projection')}",
            f"single draws lie between {span(rows, 32, 'least', 'most')}",
        ]
    }


if __name__ == "__main__":
    print(json.dumps(statements(), indent=1, ensure_ascii=False))
