"""The exception, and the warning, that a user of the package is meant to read.

Their sentences name files and folders, whose names may hold anything: both show them harmless from the start, for the
command line as for a notebook.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

USER_ERROR = 2  # exit code of the command line after a UserError
DIVERGED = 3  # after a training that the stability guard has given up


class UserError(ValueError):
    """Something the user can mend; the message is one sentence that says what to do.

    The command line prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = USER_ERROR

    def __init__(self, sentence: str) -> None:
        super().__init__(escape_controls_of_lines(sentence))


class DataWarning(UserWarning):
    """Something about the images that the user should know; the command line prints it with the data's description."""

    def __init__(self, sentence: str) -> None:
        super().__init__(escape_controls_of_lines(sentence))


# A range in words, whether a number is in it, and the options that must be. NaN is in no range.
Range = tuple[str, Callable[[float], bool]]
Ranges = Sequence[tuple[str, Callable[[float], bool], Sequence[str]]]
ABOVE_0: Range = ("above 0", lambda x: 0 < x < math.inf)
AT_LEAST_0: Range = ("at least 0", lambda x: 0 <= x < math.inf)
AT_LEAST_1: Range = ("at least 1", lambda x: 1 <= x < math.inf)
SHARE: Range = ("at least 0 and less than 1", lambda x: 0 <= x < 1)
SEED: Range = ("at least 0 and less than 2**32", lambda x: 0 <= x < 2**32)  # NumPy's, the narrowest


def check_ranges(options: object, ranges: Ranges, prefix: str = "") -> None:
    """Refuse numbers that no training can use: a UserError for the first one that is out of its range.

    `options` has them as attributes, each a number, a list of numbers, or None; `prefix` stands in front of an option's
    name as it is typed, such as `--data.`.
    """
    for description, is_valid, names in ranges:
        for name in names:
            values = getattr(options, name)
            if not isinstance(values, list):
                values = [values]
            for value in values:
                if value is not None and not is_valid(value):
                    raise UserError(f"{prefix}{name} is {value}: it must be {description}.")


def refuse_equal_seeds(runs: Iterable[tuple[str, int | None]]) -> None:
    """Refuse two runs (name and seed; None or false: unknown) of one seed, which tell less of luck than they seem."""
    names: dict[int, str] = {}
    for name, seed in runs:
        if seed is None or isinstance(seed, bool):  # false: drawn anew each time
            continue
        if seed in names:
            raise UserError(
                f"{name} has the seed of {names[seed]}, {seed}, so that both began alike: leave one out, or train it "
                "with another --seed_everything."
            )
        names[seed] = name


# ---- names from outside
#
# A name of a file, folder or class may hold anything: bytes that are no UTF-8 (Python keeps each as a lone surrogate),
# escape sequences that steer a terminal, signs that turn the order of the text (Unicode Annex 9), line breaks, a
# spreadsheet's formula (OWASP, "CSV Injection"). The program works with the exact name of a file; a person and a CSV
# get the shown one, and JSON the exact one in its own escapes. Class names are shown from the moment they are read.

# C0, DEL and C1 controls; Arabic letter mark; zero-width space; marks, embeddings, overrides and isolates of direction;
# line and paragraph separator; word joiner and other invisible signs; lone surrogates; byte order mark. The zero-width
# joiners U+200C and U+200D stay: Persian, Indic scripts and emoji are spelled with them.
_UNSHOWN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]"
)
# The same without JSON's own line breaks: json.dumps has escaped all of C0 inside its strings.
_UNSHOWN_IN_JSON = re.compile(_UNSHOWN.pattern.replace("\x00-\x1f", ""))
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")


def escape_controls(text: str) -> str:
    r"""The text with every sign that steers its display as an escape: ESC becomes `\x1b`, U+202E becomes `\u202e`.

    Showing twice changes nothing.
    """
    return _UNSHOWN.sub(lambda sign: sign[0].encode("unicode_escape").decode("ascii"), text)


def escape_controls_of_lines(text: str) -> str:
    """Text of several lines, each of them shown."""
    return "\n".join(map(escape_controls, text.split("\n")))


def escape_csv_cell(name: str) -> str:
    """The name as a cell of a CSV file: shown, and no formula to a spreadsheet. Doing it twice changes nothing."""
    cell = escape_controls(name)
    return f"'{cell}" if cell.startswith(_FORMULA) else cell


def json_text(value: Any, **options: Any) -> str:
    """JSON that reads back exactly and steers no terminal; `options` are those of `json.dumps`. NaN is a ValueError."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, **options)
    return _UNSHOWN_IN_JSON.sub(lambda sign: f"\\u{ord(sign[0]):04x}", text)


def name_bytes(name: str) -> bytes:
    """The name for hashing: UTF-8, also of lone surrogates, so that no name and no locale makes it fail."""
    return name.encode("utf-8", "surrogatepass")
