"""The exception, and the warning, that a user of the package is meant to read."""

USER_ERROR = 2  # exit code of the command line after a UserError
DIVERGED = 3  # after a training that the stability guard has given up


class UserError(ValueError):
    """Something the user can mend; the message is one sentence that says what to do.

    The command line prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = USER_ERROR


class DataWarning(UserWarning):
    """Something about the images that the user should know; the command line prints it with the data's description."""
