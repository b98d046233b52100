"""A record's rows as a Markdown table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moevision.train.report import cell


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], align: str | None = None) -> str:
    """A Markdown table; `align` holds l or r per column, by default text left and all figures right."""
    sides = align or "l" + "r" * (len(heads) - 1)
    rule = ["---" if side == "l" else "--:" for side in sides]
    lines = [[cell(head) for head in heads], rule, *([cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
