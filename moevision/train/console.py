"""What the training verbs let a person see: one sentence for a mistake in the arguments, and no chatter.

Sources: jsonargparse's `ArgumentParser.error`, which prints every option before it says what is wrong; Lightning's
loggers and warnings.
"""

from __future__ import annotations

import difflib
import logging
import re
import sys
import warnings
from argparse import Action, HelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from moevision.errors import USER_ERROR, DataWarning
from moevision.names import shown
from moevision.train.help import examples, only_short, verb_of

_UNRECOGNIZED = re.compile(r"unrecognized arguments: (\S+)", re.IGNORECASE)
_KEY = re.compile(r'Parser key "([^"]+)":')
_VALUE = re.compile(r"(?:Got|Given) value: (.*)")
_EXPECTED = re.compile(r"Expected an? (.+?)(?:\. Got value.*)?$", re.MULTILINE)
_DENIED = re.compile(r"Importing '([^']+)' is not allowed")
_NOT_ACCEPTED = re.compile(r"does not accept option '([^']+)'")
# What Lightning says about things that the verbs chose on purpose, or that nobody at the command line can change.
_CHATTER = (
    "LightningCLI's args parameter",  # we read the command line ourselves and hand it on
    "Experiment logs directory .* exists and is not empty",  # splits.csv lies there already; no log is deleted
    "The '.*dataloader' does not have many workers",
    "The number of training batches .* is smaller than the logging interval",
    r"(?s)\s.*(JsonargparseDeprecationWarning|was deprecated in v\d|instantiate_classes)",  # Lightning's own calls
    "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",  # evaluation needs none
    "Checkpoint directory .* exists and is not empty",  # a resumed run goes on in its own folder
    r".ModelCheckpoint\(monitor='val/top1'\). could not find the monitored key",  # a training of less than an epoch
    "You're resuming from a checkpoint that ended before the epoch ended",  # ImageDataModule can
    r"It is recommended to use .self\.log\('(val|test|moe)/.*, sync_dist=True",  # torchmetrics has summed them up
    r".isinstance\(treespec, LeafSpec\). is deprecated",
)


class SentenceParser(LightningArgumentParser):
    """A parser that names the mistake in one sentence, with the option that was probably meant.

    Its help shows what most people need, unless `show_all` is set.
    """

    show_all = False

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """The short help of a verb, or the long one."""
        if SentenceParser.show_all or " " not in self.prog:
            return str(super().format_help(formatter))
        with only_short(self):
            return f"{super().format_help(formatter)}\n{examples(verb_of(self))}"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and leave with the exit code of a user's mistake."""
        if not self.exit_on_error:  # a helper parser of jsonargparse's own, whose caller tries something else then
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        verb = parser.prog.replace(" [options]", "")
        print(shown(f"moevision: {explain(message, options_of(parser))} See {verb} --help."), file=sys.stderr)
        self.exit(USER_ERROR)


def options_of(parser: LightningArgumentParser) -> list[str]:
    """All long options of a parser and of its verbs, without their dashes."""
    actions: list[Action] = list(parser._actions)
    for action in parser._actions:
        if isinstance(action.choices, dict):
            actions += [inner for verb in action.choices.values() for inner in verb._actions]
    names = {name.removeprefix("--") for action in actions for name in action.option_strings if name.startswith("--")}
    return sorted(names)


def explain(message: str, options: list[str]) -> str:
    """The parser's message as one sentence; for an unknown option with its near ones.

    Args:
        message: what the parser found, in one or more lines.
        options: all options there are, without dashes.
    """
    if match := _DENIED.search(message):
        return (
            f"{match[1]!r} is not imported: options and configurations name only parts of Lightning and of "
            "moevision.train; use your own classes from Python."
        )
    if (match := _UNRECOGNIZED.search(message)) and not match[1].startswith("-"):
        return f"{match[1]!r} stands where an option is expected: a folder comes right after the verb."
    if match := match or _NOT_ACCEPTED.search(message):
        return _unknown_option(match[1].split("=")[0].lstrip("-"), options)
    if (key := _KEY.search(message)) and (value := _VALUE.search(message)):
        kinds = dict.fromkeys(_kind(kind) for kind in _EXPECTED.findall(message))
        return f"--{key[1]} is {value[1]!r}: it must be {' or '.join(kinds)}."
    return " ".join(message.split()).rstrip(".") + "."


def _kind(kind: str) -> str:
    """A type as people write its values: `<class 'int'>` -> int, `typing.Literal['a', 'b']` -> 'a', 'b'."""
    inner = re.fullmatch(r"<class '(\w+)'>|typing\.Literal\[(.*)\]", kind)
    name = next(filter(None, inner.groups())) if inner else kind
    return "null" if name == "NoneType" else name


def _unknown_option(key: str, options: list[str]) -> str:
    near = difflib.get_close_matches(key, options, n=3)
    if not near:  # a mistyped group has its last part in common with the right one
        near = [name for name in options if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:3]
    hint = f", did you mean {', '.join(near)}?" if near else "."
    return f"there is no option {key!r}{hint}"


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's advertising and its remarks on deliberate choices off the screen; warnings stay."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in _CHATTER:
            warnings.filterwarnings("ignore", message=message)
        warnings.simplefilter("ignore", DataWarning)  # the description of the data says it too
        try:
            for logger in loggers:
                logger.setLevel(logging.WARNING)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
