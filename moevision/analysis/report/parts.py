"""The pieces of the HTML report: escaped text, numbers that keep their exact value, tables, figures.

A number is shown rounded and carries its exact value, as it stands in `report.json`, in HTML's own element for that:
`<data value="0.0123">0.01</data>`.
"""

from __future__ import annotations

import base64
import html
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from moevision.names import shown

_SHOWN_PER_PIXEL = 0.6  # figures are drawn at 200 dots per inch; this shows 7.2 inches as 864 CSS pixels


def text(value: object) -> str:
    """The text shown harmless, with HTML's special letters escaped."""
    return html.escape(shown(str(value)))


def number(value: float | int | None, form: str = ",", unit: str = "") -> str:
    """A number rounded by a format such as `.2f`, with a true minus sign; an en dash where there is none."""
    if value is None:
        return '<span class="soft">–</span>'
    shown = format(value, form).replace("-", "−")
    if set(shown) <= set("−+0.%"):
        shown = shown.replace("−", "").replace("+", "")  # −0.00 would look like a direction
    return f'<data value="{text(json.dumps(value))}">{shown}</data>{unit}'


def each(values: Any) -> str:
    """A number, or one for each layer."""
    return ", ".join(number(value) for value in values) if isinstance(values, list) else number(values)


def experts_per_patch(model: Mapping[str, Any]) -> str:
    """How many experts a patch has: chosen by it, on average where experts choose, all of them in Soft MoE."""
    routing = model["routing"]
    if routing == "soft":
        return "all, weighted"
    if routing == "expert_choice":
        return f"{each(model['experts_per_patch'])} on average"
    return each(model["top_k"] if routing == "token_choice" else model["experts_per_patch"])


def interval(low: float | None, high: float | None, form: str = ".3f") -> str:
    """`low to high`, or a dash."""
    return number(None) if low is None or high is None else f"{number(low, form)} to {number(high, form)}"


def paragraph(*pieces: str, style: str = "") -> str:
    """A paragraph of HTML pieces."""
    return f"<p{style and f' class={json.dumps(style)}'}>{' '.join(pieces)}</p>"


def tag(yes: bool, if_yes: str, if_no: str) -> str:
    """A small label in words; the colour only repeats them."""
    return f'<span class="tag{" yes" if yes else ""}">{text(if_yes if yes else if_no)}</span>'


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str = "",
    *,
    words: Sequence[int] = (),
    found: Sequence[bool] = (),
    style: str = "",
) -> str:
    """A table whose cells are HTML; the first column names the rows.

    Args:
        header: column names, as plain text.
        rows: cells as HTML.
        caption: what the table shows, as plain text.
        words: columns that hold words and are aligned to the left.
        found: per row, whether to mark it.
        style: `dense` for many columns.
    """
    align = {column: ' class="words"' for column in words}
    head = "".join(f'<th scope="col"{align.get(i, "")}>{text(name)}</th>' for i, name in enumerate(header))
    body = []
    for place, (first, *others) in enumerate(rows):
        mark = ' class="found"' if place < len(found) and found[place] else ""
        cells = "".join(f"<td{align.get(i, '')}>{cell}</td>" for i, cell in enumerate(others, start=1))
        body.append(f'<tr{mark}><th scope="row">{first}</th>{cells}</tr>')
    title = f"<caption><span>{text(caption)}</span></caption>" if caption else ""
    whole = f"{title}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="scroll"><table class="{style}">{whole}</table></div>'


def definitions(pairs: Mapping[str, str], style: str = "plain") -> str:
    """A list of names, as plain text, and their values, as HTML."""
    rows = "".join(f"<div><dt>{text(name)}</dt><dd>{value}</dd></div>" for name, value in pairs.items())
    if style != "facts":
        rows = rows.replace("<div>", "").replace("</div>", "")
    return f'<dl class="{style}">{rows}</dl>'


def figure(entries: Sequence[Mapping[str, Any]], pngs: Sequence[bytes]) -> str:
    """One or several pictures of a kind with what a reader should and should not see in them.

    Args:
        entries: each picture's `file`, `title`, `read` and `not_shown`, as in `report.json`.
        pngs: the pictures.
    """
    sizes = [struct.unpack(">II", png[16:24]) for png in pngs]  # PNG: 8 bytes of signature, then the chunk IHDR
    images = "".join(
        f'<img id="figure-{text(entry["file"].removesuffix(".png"))}" alt="{text(entry["title"])}" '
        f'width="{round(width * _SHOWN_PER_PIXEL)}" height="{round(height * _SHOWN_PER_PIXEL)}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'
        for entry, png, (width, height) in zip(entries, pngs, sizes, strict=True)
    )
    words = f"<b>How to read it.</b> {text(entries[0]['read'])}"
    words += f" <b>What it does not show.</b> {text(entries[0]['not_shown'])}"
    return f'<figure><div class="pictures">{images}</div><figcaption>{words}</figcaption></figure>'


def section(name: str, title: str, *pieces: str) -> str:
    """A section with an anchor."""
    heading = f'<h2 id="{name}-title">{text(title)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">{heading}{"".join(pieces)}</section>'
