"""Commands in forks of a process that has imported torch, timm and Lightning, and done nothing else.

To import them takes seven seconds of CPU time. A fork has its own arguments, environment, folder, output and session,
as `subprocess.Popen` would give them. What it runs itself (`python -m ...`, by our launcher or by torchrun) are forks
too, made before the command begins.
"""

import contextlib
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import Pipe, forkserver, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

from moevision.train import plots

CONTEXT = get_context("forkserver")


def begin() -> None:
    """Start the process that forks, unless it is there; with one math thread, for a fork can't have another number."""
    CONTEXT.set_forkserver_preload(["moevision.train.fit", __name__])
    with patch.dict(os.environ, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()


def run_script(script: str, folder: Path) -> str:
    """Run a script that is given a folder, and where its own processes meet; what they said."""
    from tests.shared import free_port

    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    process = Forked([script, str(folder)], folder, {**os.environ, **meeting})
    said, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, said[-6000:]
    return said


class Forked:
    """Has the methods of `subprocess.Popen` that the tests call; standard output and error come together.

    Args:
        command: what follows `python`: `-m MODULE`, `-c CODE` or a script, and arguments.
        folder: where it runs.
        env: its environment.
        others: how many processes torchrun or our launcher may start in it as forks; further ones are new interpreters.
    """

    def __init__(
        self, command: list[str], folder: Path, env: Mapping[str, str], others: int = 0
    ) -> None:
        begin()
        output, name = tempfile.mkstemp()
        os.close(output)
        self._said = Path(name)
        self._process = CONTEXT.Process(
            target=_run, args=(command, folder, dict(env), name, others)
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative if a signal ended it; None while it runs."""
        return self._process.exitcode

    poll = returncode.fget

    def said(self) -> str:
        """All that it and its others have said so far."""
        return self._said.read_text()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked command", timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for its end; all that it and its others have said."""
        self.wait(timeout)
        said = self.said()
        self._said.unlink()
        return said, None


class _Waiting(subprocess.Popen[bytes]):
    """Gives its command to a fork that waits for one, where `subprocess.Popen` starts a program."""

    forks: ClassVar[list[tuple[int, Connection]]] = []

    def __init__(
        self,
        args: Any,
        *,
        env: Any,
        cwd: None = None,
        start_new_session: bool = False,
        **output: Any,
    ) -> None:
        assert set(output.values()) <= {None}
        command = [each for each in args[1:] if each != "-u"]
        self._told = (command, env, start_new_session)
        super().__init__(args)

    def _execute_child(self, *_: Any) -> None:
        self.pid, tell = self.forks.pop(0)
        self._child_created = True
        with contextlib.suppress(BrokenPipeError):  # it was killed before it had heard
            tell.send(self._told)
        tell.close()


def _run(command: list[str], folder: Path, env: dict[str, str], said: str, others: int) -> None:
    os.setsid()
    os.chdir(folder)
    output = os.open(said, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.close(output)
    for _ in range(others):
        hear, tell = Pipe(duplex=False)
        pid = os.fork()
        if pid == 0:
            for end in (tell, *(other for _, other in _Waiting.forks)):
                end.close()
            command, env = _wait_for_command(hear)
            break
        hear.close()
        _Waiting.forks.append((pid, tell))
    else:
        if others:
            _give_commands_to_forks()
    os.environ.clear()
    os.environ.update(env)
    rank_zero_only.rank = _get_rank() or 0  # Lightning has looked for it when it was imported
    plots.save = (
        _leave_empty  # a sixth of a tiny training's CPU time; new interpreters render figures
    )
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(command[1], {"__name__": "__main__"})
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).parent.resolve()))
        runpy.run_path(command[0], run_name="__main__")


def _leave_empty(figure: object, out: Path) -> None:
    out.touch()


def _wait_for_command(hear: Connection) -> tuple[list[str], dict[str, str]]:
    try:
        command, env, session = hear.recv()
    except EOFError:  # there is nothing to do for it
        os._exit(0)
    if session:
        os.setsid()
    return list(command), env


def _give_commands_to_forks() -> None:
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = _Waiting
