"""A record's rows as a Markdown table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moevision.train.report import cell


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: text left and all figures right."""
    rule = ["---", *["--:"] * (len(heads) - 1)]
    lines = [[cell(head) for head in heads], rule, *([cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
