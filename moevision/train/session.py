"""One process's share of a run: what it listens to, and where its training begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from moevision.errors import UserError
from moevision.train.processes import AwakeClock, Interruption, Processes, tell
from moevision.train.recipe import expand_arguments, run_name
from moevision.train.resume import (
    AUTO,
    OPTION,
    Start,
    changed_options,
    claim,
    find_start,
    is_finished,
    recorded_config,
    release,
    take_resume,
)


class Session:
    """The command line of a training verb, understood as far as resuming goes.

    Attributes:
        command: the command line as typed.
        arguments: what LightningCLI is to read.
        interruption: listens to signals.
        clock: time in which the process ran.
        notes: what differs from the run that is gone on with, a phrase each.
        processes: this process among those of the training.
    """

    def __init__(self, verb: str, arguments: Sequence[str]) -> None:
        self.command = ["moevision", verb, *arguments]
        self.interruption, self.clock, self.processes = Interruption(), AwakeClock(), Processes()
        self.notes: list[str] = []
        self._claims: list[int] = []
        self._target, self._typed = take_resume(arguments)
        if self._target is None:
            self.arguments = expand_arguments(verb, arguments)
            return
        if verb != "fit":
            raise UserError(f"{OPTION} goes on with a training: use it with fit; {verb} takes --ckpt_path.")
        self.arguments = (
            expand_arguments(verb, self._typed) if self._target == AUTO else self._as_recorded(Path(self._target))
        )

    def claim(self, run_dir: Path) -> Path:
        """Keep other trainings out of this folder, until `close`; for the first process, before it touches anything.

        Returns:
            The folder, which is made if need be.

        Raises:
            UserError: if another process trains in it, or it can't be made.
        """
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The run folder {run_dir} can't be made ({error.strerror}): start where you may write."
            ) from error
        held = claim(run_dir)
        if held is not None:
            self._claims.append(held)
        return run_dir

    def another_ended(self) -> str:
        """What to say when another process of this training has gone."""
        sentence = "Another process of this training has ended, see above if it said why."
        return sentence + (f" To go on:\n{self.interruption.command}" if self.interruption.command else "")

    def close(self) -> None:
        """Give the claimed folders up, and end what was started."""
        self.processes.close()
        while self._claims:
            release(self._claims.pop())

    def _as_recorded(self, run_dir: Path) -> list[str]:
        """The run's own config, and after it what was typed."""
        return ["--config", str(recorded_config(run_dir)), *expand_arguments("fit", self._typed, recorded=True)]

    def begin(self, parser: LightningArgumentParser, config: Namespace) -> tuple[Namespace, Start | None]:
        """Find out where the training begins.

        Args:
            parser: the parser.
            config: what it made of `arguments`.

        Returns:
            The config to use, and the start; None for a run with a folder of its own.

        Raises:
            UserError: if there is nothing to go on from, or an option can't be changed.
            SystemExit: if the run is finished; its exit code is 0.
        """
        if self._target is None:
            return config, None
        automatic = self._target == AUTO
        run_dir = folder_of(config) if automatic else Path(self._target)

        def find() -> dict[str, Any]:
            known = (run_dir / "config.yaml").is_file()
            if known and is_finished(run_dir, with_twin=bool(config.fit.with_twin)):
                tell(f"{run_dir} is finished, see {run_dir}/summary.md: nothing to do.")
                raise SystemExit(0)
            return find_start(self.claim(run_dir), fresh_if_none=automatic).plain()

        start = Start.from_plain(self.processes.decide(find))
        if start.checkpoint is None:
            return config, start
        recorded = parser.parse_args(["fit", "--config", str(recorded_config(run_dir))])
        if automatic:
            config = parser.parse_args(["fit", *self._as_recorded(run_dir)])
        self.notes = changed_options(recorded.fit, config.fit)
        for note in self.notes:
            tell(f"changed: {note}")
        return config, start


def folder_of(config: Namespace) -> Path:
    """The folder of a fit, before anything is added because an earlier run has it."""
    settings = config.fit
    return Path(settings.runs_root) / (settings.name or run_name(settings.data.path))
