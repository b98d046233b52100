"""`moevision fit | validate | test`: a training from its command line to its report, the dense twin's behind it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch

from moevision.allocator import keep_freed_memory
from moevision.errors import UserError
from moevision.train.console import SentenceParser, quiet_lightning
from moevision.train.finish import RunResult, write_comparison
from moevision.train.guard import TrainingDiverged
from moevision.train.help import ALL
from moevision.train.processes import Interrupted, several_processes, tell
from moevision.train.resume import Session, Start, find_start
from moevision.train.training_cli import TrainingCLI


def run(verb: str, arguments: Sequence[str]) -> None:
    """Run `fit`, `validate` or `test` with command-line arguments.

    Raises:
        UserError: for anything that the user can mend.
    """
    torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    SentenceParser.show_all = ALL in arguments
    _check_encoding(arguments)
    arguments = ["--help" if argument == ALL else argument for argument in arguments]
    session = Session(verb, arguments)
    try:
        with session.interruption, session.clock, quiet_lightning():
            _run(verb, session)
    except (Interrupted, TrainingDiverged) as stopped:
        if not session.processes.first:
            raise SystemExit(0) from None  # the first process says it, and its exit code counts
        if isinstance(stopped, TrainingDiverged):
            raise
        command = session.interruption.command
        tell(
            f"Stopped by {stopped.signal_name}."
            + (f" To go on:\n{command}" if command else " Nothing was trained yet.")
        )
        raise
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        command = session.interruption.command
        raise UserError(f"The disk is full: make room, then go on with {command or 'the same command'}.") from error
    except RuntimeError as error:
        if not several_processes() or "by peer" not in str(error):  # gloo's words for a connection that has gone
            raise
        if not session.processes.first:
            raise SystemExit(1) from None
        raise UserError(session.another_ended()) from error
    finally:
        session.close()


def _check_encoding(arguments: Sequence[str]) -> None:
    """Files below the data may have any names, but config.yaml and safetensors have no other texts than UTF-8."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{argument} is not UTF-8 and can't stand in a run's config.yaml: rename the folder, or give a link to "
                "it that has a plain name."
            ) from None


def _run(verb: str, session: Session) -> None:
    cli = TrainingCLI([verb, *session.arguments], session)
    run_dir = cast(Path, cli.run_dir)
    if cli.fast_dev_run:  # logs nothing and saves nothing
        if session.processes.first and cli.start is None:  # else the folder may be an earlier run's
            shutil.rmtree(run_dir)
        return
    if verb != "fit":
        return
    result = cli.finish(session.command)
    if cli._get(cli.config, "with_twin"):
        result = _train_twin(cli, session, result)
    if result is not None:
        tell(f"\n{result.headline}\nEverything is in {run_dir}; start with {run_dir}/summary.md")


def _train_twin(cli: TrainingCLI, session: Session, result: RunResult | None) -> RunResult | None:
    start = Start.from_plain(session.processes.decide(lambda: _twin_start(cast(Path, cli.run_dir), session).plain()))
    options = ["--model.arch.twin", "active_flops", "--without-twin"]
    twin = TrainingCLI(["fit", *session.arguments, *options], session, start)
    # Experts that start as copies have the full width each, and the twin is the dense model they are copies of.
    match = "active FLOPs" if cli.model.arch.pretrained is None else "pretrained weights, but fewer FLOPs"
    other = twin.finish([*session.command, *options])
    return None if result is None or other is None else write_comparison(result, other, match)


def _twin_start(run_dir: Path, session: Session) -> Start:
    """Where the twin's training begins, in a folder that is made for it."""
    folder = run_dir / "twin"
    known = folder.is_dir()
    session.claim(folder)
    start = find_start(folder, fresh_if_none=True) if known else Start(folder)
    if (run_dir / "splits.csv").is_file():
        shutil.copy(run_dir / "splits.csv", folder / "splits.csv")
    print("\nNow the dense twin, by the same recipe.", flush=True)
    return start
