"""The command line. Nothing heavy is imported before a verb's arguments are understood."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, cast

from moevision.commands import VERBS, loading
from moevision.errors import USER_ERROR, UserError

_NO_MEMORY = ("can't allocate memory", "out of memory")  # torch's on a CPU, on a GPU
INTERRUPTED = 130  # 128 and the number of SIGINT, as shells have it

MOVED = {
    "benchmark": "`moevision benchmark` is now `python -m benchmarks`, which a checkout of the repository has and the "
    "installed package has not: clone it, and run `python -m benchmarks --help` there.",
    "data curve": "`moevision data curve` is now `python -m benchmarks curve of`, which a checkout of the repository "
    "has and the installed package has not: clone it, and give the same options there.",
    "predict --shard": "`predict` has no option --shard any more: give each process a list of files and an --out of "
    "its own, as docs/guides/batch.md shows.",
    "fit --fault": "`fit` has no option --fault any more: `python -m benchmarks guard-accuracy`, in a checkout of the "
    "repository, trains with injected faults.",
    "plan": "`moevision plan` is now `python -m benchmarks plan`, in a checkout of the repository.",
    "doctor": "`moevision doctor` is now `moevision info --machine`.",
    "completion": "`moevision completion` was removed: `moevision VERB --help` lists the flags of a verb.",
}

USAGE = """\
moevision: train sparse vision transformers and see which experts every patch goes to

usage: moevision VERB [arguments]      (moevision VERB --help tells more)

{verbs}

begin with
  moevision fit --config quickstart      drawn pets, a few minutes on a CPU, no download
  moevision fit path/to/images           your own images, one folder per class
  moevision predict runs/NAME/model image.jpg
  moevision demo                         the explorer, with models that come along

--version prints the version; with --verbose also those of torch, timm and Lightning.
--traceback after the verb's arguments shows where an error came from.

exit codes
  0    done
  2    something that you can mend; the last line says what to do
  3    fit: the training diverged and was given up, see divergence.md in its folder
  130  stopped by Ctrl-C
       fit: also 129 by a closed terminal, 143 by SIGTERM, 138 by SIGUSR1; saved, unless nothing was trained yet; the
       last line goes on with it
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb that the arguments name.

    Args:
        arguments: the command line without the program's name; `sys.argv[1:]` if None.

    Returns:
        The exit code, as `moevision --help` lists them.
    """
    rest = list(sys.argv[1:] if arguments is None else arguments)
    if rest[:1] == ["help"] and len(rest) > 1:
        rest = [rest[1], "--help"]
    if not rest or rest[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if rest else USER_ERROR
    if rest[0] == "--version":
        print(versions() if "--verbose" in rest else versions().splitlines()[0])
        return 0
    name = rest.pop(0)
    moved = _moved(name, rest)
    if moved or name not in VERBS:
        print(f"moevision: {moved or _no_verb(name)}", file=sys.stderr)
        return USER_ERROR
    show_traceback = "--traceback" in rest
    return _run(name, [argument for argument in rest if argument != "--traceback"], show_traceback)


def usage() -> str:
    """The help of the whole program."""
    return USAGE.format(verbs="\n".join(f"  {name:10} {verb.summary}" for name, verb in VERBS.items()))


def versions() -> str:
    """The package's version, then those of Python and of what it stands on, a line each."""
    from moevision import __version__, package_version

    libraries = [
        f"{name} {package_version(name) or 'not installed'}" for name in ("torch", "torchvision", "timm", "lightning")
    ]
    return "\n".join([f"moevision {__version__}", f"python {sys.version.split()[0]}", *libraries])


def _moved(name: str, rest: Sequence[str]) -> str | None:
    """What to do in the place of a verb, a task (the word after it) or an option that is gone; None for all others."""
    words = [word.partition("=")[0] for place, word in enumerate(rest) if place == 0 or word.startswith("--")]
    return next((MOVED[key] for key in (name, *(f"{name} {word}" for word in words)) if key in MOVED), None)


def _no_verb(name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, VERBS, n=1)
    meant = f" Did you mean {near[0]}?" if near else ""
    return f"there is no verb {name!r}; choose one of {', '.join(VERBS)}.{meant}"


def _dashed(argument: str) -> str:
    return argument.replace("_", "-")


def _run(name: str, arguments: list[str], show_traceback: bool) -> int:
    try:
        _call(name, arguments)
    except UserError as error:
        if show_traceback:
            import traceback

            traceback.print_exc()
        print(f"moevision: {error}", file=sys.stderr)
        return error.exit_code
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)) or show_traceback:
            raise
        print(
            f"moevision: there is not enough memory for {name} here: use a smaller model, smaller images or smaller "
            "batches. (--traceback shows where it ended.)",
            file=sys.stderr,
        )
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"\nmoevision: {name} was stopped by Ctrl-C.", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:  # the argument parser has said what is wrong
        return stop.code if isinstance(stop.code, int) else USER_ERROR
    return 0


def _call(name: str, arguments: list[str]) -> None:
    from moevision import config
    from moevision.commands.parsers import PARSERS

    understood: Any
    if name not in PARSERS:
        everything = "--help-all" in map(_dashed, arguments)
        if everything or not {"-h", "--help"}.isdisjoint(arguments):
            print(config.help_of(name, everything=everything), end="")
            return
        understood = config.read(name, arguments)
    else:
        understood = PARSERS[name]().parse_args(arguments)
        if "command" in understood:  # a record of the command line
            import shlex

            understood.command = shlex.join(["moevision", name, *arguments])
    module, _, function = VERBS[name].target.partition(":")
    with loading():
        run = cast(Callable[[Any], None], getattr(import_module(module), function))
    run(understood)


if __name__ == "__main__":
    sys.exit(main())
