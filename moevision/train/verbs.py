"""The training verbs as the command line calls them."""

from __future__ import annotations

from moevision.train.run import run


def fit(arguments: list[str]) -> None:
    """Train."""
    run("fit", arguments)


def validate(arguments: list[str]) -> None:
    """Evaluate on the validation images."""
    run("validate", arguments)


def test(arguments: list[str]) -> None:
    """Evaluate on the test images."""
    run("test", arguments)
