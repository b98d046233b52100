"""The exception, and the warning, that a user of the package is meant to read.

Their sentences name files and folders, whose names may hold anything: both show them harmless from the start, for the
command line as for a notebook.
"""

import math
from collections.abc import Callable, Iterable, Sequence

from moevision.names import shown_lines

USER_ERROR = 2  # exit code of the command line after a UserError
DIVERGED = 3  # after a training that the stability guard has given up


class UserError(ValueError):
    """Something the user can mend; the message is one sentence that says what to do.

    The command line prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = USER_ERROR

    def __init__(self, sentence: str) -> None:
        super().__init__(shown_lines(sentence))


class DataWarning(UserWarning):
    """Something about the images that the user should know; the command line prints it with the data's description."""

    def __init__(self, sentence: str) -> None:
        super().__init__(shown_lines(sentence))


# Words, what they mean, and the options that they are said of. NaN is in no range.
Range = tuple[str, Callable[[float], bool]]
Ranges = Sequence[tuple[str, Callable[[float], bool], Sequence[str]]]
ABOVE_0: Range = ("above 0", lambda x: 0 < x < math.inf)
AT_LEAST_0: Range = ("at least 0", lambda x: 0 <= x < math.inf)
AT_LEAST_1: Range = ("at least 1", lambda x: 1 <= x < math.inf)
SHARE: Range = ("at least 0 and less than 1", lambda x: 0 <= x < 1)
SEED: Range = ("at least 0 and less than 2**32", lambda x: 0 <= x < 2**32)  # NumPy's, the narrowest


def check_ranges(options: object, ranges: Ranges, prefix: str = "") -> None:
    """Refuse numbers that no training can use.

    Args:
        options: has the options as attributes, each a number, a list of numbers, or None.
        ranges: what they must be.
        prefix: in front of an option's name as it is typed, such as `--data.`.

    Raises:
        UserError: for the first number that is out of its range.
    """
    for words, fits, names in ranges:
        for name in names:
            given = getattr(options, name)
            for value in given if isinstance(given, list) else [given]:
                if value is not None and not fits(value):
                    raise UserError(f"{prefix}{name} is {value}: it must be {words}.")


def refuse_equal_seeds(runs: Iterable[tuple[str, int | None]]) -> None:
    """Two trainings of one seed tell less of the luck of a training than a reader would think.

    Args:
        runs: name and seed of each; None or false: not known.

    Raises:
        UserError: if two have one seed.
    """
    known: dict[int, str] = {}
    for name, seed in runs:
        if seed is None or isinstance(seed, bool):  # false: drawn anew each time
            continue
        if seed in known:
            raise UserError(
                f"{name} has the seed of {known[seed]}, {seed}, so that both began alike: leave one out, or train it "
                "with another --seed_everything."
            )
        known[seed] = name
