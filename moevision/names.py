r"""Names from outside (of files, folders and classes): how they are shown, written into CSV and JSON, and hashed.

A file name may hold anything but a slash: bytes that are no UTF-8 (Python keeps each as a lone surrogate), escape
sequences that steer a terminal, signs that turn the order of the text, line breaks, a spreadsheet's formula. The
program works with the exact name; a person and a CSV file get the shown one, and JSON says the exact name in its own
escapes. Class names are words for people: they are shown from the moment they are read, from a folder as from a saved
model, so that both sides compare equal.

Sources: Unicode Standard Annex 9 (bidirectional controls); OWASP, "CSV Injection".
"""

from __future__ import annotations

import json
import re
from typing import Any

# C0, DEL and C1 controls; Arabic letter mark; zero-width space; marks, embeddings, overrides and isolates of direction;
# line and paragraph separator; word joiner and other invisible signs; lone surrogates; byte order mark. The zero-width
# joiners U+200C and U+200D stay: Persian, Indic scripts and emoji are spelled with them.
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]")
# The same without JSON's own line breaks: json.dumps has escaped all of C0 inside its strings.
_UNSHOWN_IN_JSON = re.compile(_UNSHOWN.pattern.replace("\x00-\x1f", ""))
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")


def shown(text: str) -> str:
    r"""The text with every sign that steers its display as an escape: ESC becomes `\x1b`, U+202E becomes `\u202e`.

    Showing twice changes nothing.
    """
    return _UNSHOWN.sub(lambda sign: sign[0].encode("unicode_escape").decode("ascii"), text)


def shown_lines(text: str) -> str:
    """Text of several lines, each of them shown."""
    return "\n".join(map(shown, text.split("\n")))


def csv_name(name: str) -> str:
    """The name as a cell of a CSV file: shown, and no formula to a spreadsheet. Doing it twice changes nothing."""
    word = shown(name)
    return f"'{word}" if word.startswith(_FORMULA) else word


def json_text(value: Any, **options: Any) -> str:
    """JSON that reads back exactly and steers no terminal.

    Args:
        value: JSON primitives.
        options: of `json.dumps`, such as `indent`.

    Raises:
        TypeError: `value` holds something other than JSON primitives.
        ValueError: it holds NaN or infinity, which JSON can't say.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, **options)
    return _UNSHOWN_IN_JSON.sub(lambda sign: f"\\u{ord(sign[0]):04x}", text)


def name_bytes(name: str) -> bytes:
    """The name for hashing: UTF-8, also of lone surrogates, so that no name and no locale makes it fail."""
    return name.encode("utf-8", "surrogatepass")
