"""Exception and warning for the users of the package, checks of options, and escaping of untrusted names.

Messages contain names of files and folders, which may contain control characters: `UserError` and `DataWarning` escape
their message when they are created, so that it can be printed anywhere.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

USER_ERROR = 2  # exit code of the command line after a UserError
DIVERGED = 3  # after a training that the stability guard has given up


class UserError(ValueError):
    """A problem that the user can fix; the message is one sentence that says how.

    The command line prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = USER_ERROR

    def __init__(self, sentence: str) -> None:
        super().__init__(escape_controls_of_lines(sentence))


class DataWarning(UserWarning):
    """A remark about the images; the command line prints it with the description of the data."""

    def __init__(self, sentence: str) -> None:
        super().__init__(escape_controls_of_lines(sentence))


# A range: its description in words, and whether a number lies in it (NaN never does).
Range = tuple[str, Callable[[float], bool]]
# Ranges, each with the names of the options that must lie in it.
Ranges = Sequence[tuple[str, Callable[[float], bool], Sequence[str]]]
ABOVE_0: Range = ("above 0", lambda x: 0 < x < math.inf)
AT_LEAST_0: Range = ("at least 0", lambda x: 0 <= x < math.inf)
AT_LEAST_1: Range = ("at least 1", lambda x: 1 <= x < math.inf)
SHARE: Range = ("at least 0 and less than 1", lambda x: 0 <= x < 1)
SEED: Range = (
    "at least 0 and less than 2**32",
    lambda x: 0 <= x < 2**32,
)  # NumPy's range; others are wider


def check_ranges(options: object, ranges: Ranges, prefix: str = "") -> None:
    """Raise a UserError for the first attribute of `options` that is out of its range.

    The value of an attribute is a number, a list of numbers, or None (unchecked). `prefix` precedes its name on the
    command line, such as `--data.`.
    """
    for description, is_valid, option_names in ranges:
        for name in option_names:
            values = getattr(options, name)
            if not isinstance(values, list):
                values = [values]
            for value in values:
                if value is not None and not is_valid(value):
                    raise UserError(f"{prefix}{name} is {value}: it must be {description}.")


def refuse_equal_seeds(runs: Iterable[tuple[str, int | None]]) -> None:
    """Raise a UserError if two runs, given as (name, seed), have the same seed.

    Such runs aren't independent, so that they show too little of the variation by chance. A seed of None is unknown,
    and one of False was drawn at random: both are skipped.
    """
    run_of_seed: dict[int, str] = {}
    for name, seed in runs:
        if seed is None or isinstance(seed, bool):
            continue
        if seed in run_of_seed:
            raise UserError(
                f"{name} has the seed of {run_of_seed[seed]}, {seed}, so that both began alike: leave one out, or "
                "train it with another --seed_everything."
            )
        run_of_seed[seed] = name


# ---- escaping of untrusted names
#
# The name of a file, folder or class may contain anything: bytes that aren't UTF-8 (Python decodes each to a lone
# surrogate), terminal escape sequences, characters that reverse the order of the text (Unicode Annex 9), line breaks, a
# spreadsheet formula (OWASP, "CSV Injection"). To open a file its exact name is used; messages and CSV files have the
# escaped name, and JSON the exact one in JSON's escapes. Class names are escaped when they are read.

# C0, DEL and C1 controls; Arabic letter mark; zero-width space; marks, embeddings, overrides and isolates of direction;
# line and paragraph separator; word joiner and other invisible characters; lone surrogates; byte order mark. The
# zero-width joiners U+200C and U+200D stay: Persian, Indic scripts and emoji are spelled with them.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]"
)
# The same without C0 controls: json.dumps has escaped those in strings, and the others are the layout's line breaks.
_UNSAFE_IN_JSON = re.compile(_UNSAFE.pattern.replace("\x00-\x1f", ""))
_FORMULA_STARTS = ("=", "+", "-", "@", "＝", "＋", "－", "＠")


def escape_controls(text: str) -> str:
    r"""Escape every character that controls the display: ESC becomes `\x1b`, U+202E becomes `\u202e`.

    A second call changes nothing.
    """
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def escape_controls_of_lines(text: str) -> str:
    """The same for each line of a text, whose line breaks stay."""
    return "\n".join(map(escape_controls, text.split("\n")))


def escape_csv_cell(name: str) -> str:
    """Escape a name for a CSV file: no controls, and no formula for a spreadsheet. A second call changes nothing."""
    cell = escape_controls(name)
    return f"'{cell}" if cell.startswith(_FORMULA_STARTS) else cell


def json_text(value: Any, **options: Any) -> str:
    """JSON text without control characters that reads back exactly; NaN is a ValueError.

    `options` are those of `json.dumps`.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, **options)
    return _UNSAFE_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def name_bytes(name: str) -> bytes:
    """The name as bytes for hashing: UTF-8 that can encode lone surrogates too, so that no name fails."""
    return name.encode("utf-8", "surrogatepass")
