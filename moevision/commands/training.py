"""`moevision fit | validate | test`: their help from files, so that it needs no torch; anything else from LightningCLI.

`python -m moevision.commands.training` writes those files anew from the live parsers; a test compares them.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from functools import partial
from itertools import product
from pathlib import Path

from moevision.commands import loading

VERBS = ("fit", "validate", "test")
HELP = Path(__file__).with_name("help")
VERSIONS = HELP / "rendered_with.json"
"""Python and the libraries that decide what the live parsers say."""

ALL = "--help-all"


def run(verb: str, arguments: Sequence[str]) -> None:
    """Print the help if it is asked for, anywhere among the arguments; else do what the verb does."""
    if ALL in arguments:
        print(help_file(verb, everything=True).read_text(encoding="utf-8"), end="")
    elif not {"-h", "--help"}.isdisjoint(arguments):
        print(help_file(verb, everything=False).read_text(encoding="utf-8"), end="")
    else:
        with loading():
            from moevision.train.run import run as train
        train(verb, arguments)


fit, validate, test = (partial(run, verb) for verb in VERBS)


def help_file(verb: str, *, everything: bool) -> Path:
    """The rendered help of a training verb: what most people need, or every option."""
    return HELP / f"{verb}-all.txt" if everything else HELP / f"{verb}.txt"


def render() -> dict[Path, str]:
    """Each help file with what the live parser prints, 100 columns wide and without colours."""
    from unittest.mock import patch

    from moevision.train import run as live

    texts = {}
    plain = {"COLUMNS": "100", "NO_COLOR": "1", "PYTHON_COLORS": "0"}
    precision = "moevision.train.cli.default_precision"  # differs between machines
    with patch.dict(os.environ, plain), patch(precision, lambda: "32-true"):
        for verb, everything in product(VERBS, (False, True)):
            text = io.StringIO()
            with redirect_stdout(text), suppress(SystemExit):  # how argparse ends a help
                live.run(verb, [ALL if everything else "--help"])
            lines = text.getvalue().replace("default: 32-true", "default: by device").splitlines()
            texts[help_file(verb, everything=everything)] = "".join(f"{line.rstrip()}\n" for line in lines)
    return texts


def rendering_versions() -> dict[str, str | None]:
    """What the text depends on besides this package."""
    from moevision import package_version

    python = ".".join(map(str, sys.version_info[:2]))
    return {"python": python} | {name: package_version(name) for name in ("jsonargparse", "lightning", "torch")}


if __name__ == "__main__":
    HELP.mkdir(exist_ok=True)
    for file, text in render().items():
        file.write_text(text, encoding="utf-8")
    VERSIONS.write_text(json.dumps(rendering_versions(), indent=2) + "\n", encoding="utf-8")
    print(f"The help of {', '.join(VERBS)} is in {HELP}")
