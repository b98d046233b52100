"""How the summary of a run writes tables and numbers: plain Markdown, units beside each figure."""

from collections.abc import Iterable, Sequence

from moevision.names import shown


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], align: str | None = None) -> str:
    """A Markdown table; `align` holds l or r per column, by default text left and all figures right."""
    sides = align or "l" + "r" * (len(heads) - 1)
    rule = ["---" if side == "l" else "--:" for side in sides]
    lines = [[cell(head) for head in heads], rule, *([cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(text: str) -> str:
    """Text that can't break a table or a line of Markdown or become a link (class names come from folder names)."""
    text = shown(" ".join(text.split()))
    return text.replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(")


def percent(share: float) -> str:
    """0.965 -> `96.5 %`."""
    return f"{100 * share:.1f} %"


def points(difference: float) -> str:
    """A difference of shares in percentage points with its sign: -0.013 -> `−1.3`."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def flops(count: int) -> str:
    """345_000_000 -> `345.00 M`."""
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.2f} M"


def duration(seconds: float) -> str:
    """732.4 -> `12 min 12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
