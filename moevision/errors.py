"""The exception, and the warning, that a user of the package is meant to read.

Their sentences name files and folders, whose names may hold anything: both show them harmless from the start, for the
command line as for a notebook.
"""

from collections.abc import Iterable

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
