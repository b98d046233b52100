"""The command line: a table of verbs. Nothing heavy is imported before a verb is known."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple, cast

from moevision.errors import USER_ERROR, UserError


class Verb(NamedTuple):
    """One verb: what it does, and `module:function` that does it with the remaining arguments."""

    summary: str
    target: str


VERBS = {
    "fit": Verb(
        "train a model on a folder of images, a dataset or a config; leaves runs/NAME/",
        "moevision.train.verbs:fit",
    ),
    "validate": Verb("evaluate a checkpoint on the validation images", "moevision.train.verbs:validate"),
    "test": Verb("evaluate a checkpoint on the test images", "moevision.train.verbs:test"),
    "predict": Verb("classify images with a saved model, as CSV or JSON", "moevision.predict:main"),
    "info": Verb("parameters and FLOPs of a model, beside its dense twins", "moevision.info:main"),
    "upcycle": Verb(
        "turn a pretrained dense ViT into a Mixture of Experts that computes the same",
        "moevision.commands.upcycle:main",
    ),
    "surgery": Verb(
        "prune or merge experts, or collapse a model to a dense one, with what it costs",
        "moevision.commands.surgery:main",
    ),
    "export": Verb("write a model as ONNX or torch.export, checked against it", "moevision.commands.export:main"),
    "push": Verb("publish a saved model with its card on the Hugging Face hub", "moevision.commands.push:main"),
    "analyze": Verb("what the experts of a trained model do, as one report", "moevision.analysis.report.command:main"),
    "doctor": Verb("what this machine has, what limits it, and what to change", "moevision.commands.doctor:main"),
    "demo": Verb("see in a browser which expert every patch of a picture goes to", "moevision.demo.launch:main"),
}

MOVED = {
    "benchmark": "`moevision benchmark` is now `python -m benchmarks`, which a checkout of the repository has and the "
    "installed package has not: clone it, and run `python -m benchmarks --help` there.",
}

USAGE = """\
moevision: train sparse vision transformers and see which expert every patch goes to

usage: moevision VERB [arguments]      (moevision VERB --help tells more)

{verbs}

begin with
  moevision fit --config quickstart      drawn pets, about three minutes on two CPU cores, no download
  moevision fit path/to/images           your own pictures, one folder per class
  moevision predict runs/NAME/model picture.jpg
  moevision demo                         the explorer, with models that come along

--traceback after the verb's arguments shows where an error came from.

exit codes
  0    done
  2    something that you can mend; the last line says what to do
  3    fit: the training diverged and was given up, see divergence.md in its folder
  130  fit: stopped by Ctrl-C, 129 by a closed terminal, 143 by SIGTERM, 138 by SIGUSR1; saved, unless nothing was
       trained yet; the last line goes on with it
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb that the arguments name.

    Args:
        arguments: the command line without the program's name; `sys.argv[1:]` if None.

    Returns:
        The exit code, as `moevision --help` lists them.
    """
    rest = list(sys.argv[1:] if arguments is None else arguments)
    if not rest or rest[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if rest else USER_ERROR
    if rest[0] == "--version":
        from moevision import __version__

        print(f"moevision {__version__}")
        return 0
    name = rest.pop(0)
    if name in MOVED:
        print(f"moevision: {MOVED[name]}", file=sys.stderr)
        return USER_ERROR
    if name not in VERBS:
        print(f"moevision: there is no verb {name!r}; choose one of {', '.join(VERBS)}.", file=sys.stderr)
        return USER_ERROR
    show_traceback = "--traceback" in rest
    return _run(VERBS[name], [argument for argument in rest if argument != "--traceback"], show_traceback)


def usage() -> str:
    """The help of the whole program."""
    return USAGE.format(verbs="\n".join(f"  {name:10} {verb.summary}" for name, verb in VERBS.items()))


def _run(verb: Verb, arguments: list[str], show_traceback: bool) -> int:
    module, _, function = verb.target.partition(":")
    try:
        cast(Callable[[list[str]], None], getattr(import_module(module), function))(arguments)
    except UserError as error:
        if show_traceback:
            traceback.print_exc()
        print(f"moevision: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as stop:  # the argument parser has said what is wrong
        return stop.code if isinstance(stop.code, int) else USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
