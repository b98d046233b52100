"""Several processes of one training: what only one of them may decide, such as the run folder, the others are told.

Two ways lead to several processes. Lightning starts the others itself when the first one begins to train (`--trainer.
devices 2`): by then everything is decided, and is handed on in the environment. Or torchrun or SLURM starts all of them
at once with the same command: then they meet before the first decision, and the first process sends it to the others.
One process has nobody to agree with, and nothing is sent.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerStatus

from moevision.data.contents import is_main_process
from moevision.errors import USER_ERROR, UserError
from moevision.train.messages import tell
from moevision.train.processes import several_processes

HANDED_ON = "MOEVISION_DECISIONS"
_PATIENCE_S = 20.0  # for processes that are about to end by themselves
_LOOK_S = 0.5  # between two looks at the processes that Lightning started


class Processes:
    """This process among those of its training.

    Attributes:
        first: whether it decides, speaks and writes the files.
    """

    def __init__(self) -> None:
        self.first = is_main_process()
        self._decisions: list[Any] = []
        self._others: list[subprocess.Popen[bytes]] = []  # that Lightning started for this one
        self._closed = threading.Event()
        handed_on = os.environ.pop(HANDED_ON, None)
        if handed_on is not None and not self.first:
            self._decisions = json.loads(handed_on)

    def decide(self, decision: Callable[[], Any]) -> Any:
        """What the first process finds when it calls `decision`, which is called nowhere else; JSON primitives.

        Raises:
            UserError: if the processes can't agree, because somebody started them one by one.
            SystemExit: on the other processes, if the first one fails; it says why.
        """
        _meet()
        if several_processes():
            return self._send(decision)
        if self.first:
            self._decisions.append(decision())
            os.environ[HANDED_ON] = json.dumps(self._decisions)
            return self._decisions[-1]
        if not self._decisions:
            raise UserError("Start several processes by --trainer.devices N, or by torchrun or SLURM's srun.")
        return self._decisions.pop(0)

    def _send(self, decision: Callable[[], Any]) -> Any:
        found: list[Any] = [False, None]
        try:
            if self.first:
                found = [True, decision()]
        finally:
            dist.broadcast_object_list(found, src=0)
        if not found[0]:
            raise SystemExit(0)
        return found[1]

    @contextmanager
    def first_one_first(self) -> Iterator[None]:
        """Let the first process do this before the others, who then find the files that it made."""
        together = several_processes()
        if together and not self.first:
            dist.barrier()
        try:
            yield
        finally:
            if together and self.first:
                dist.barrier()

    def watch(self, trainer: L.Trainer, give_up: Callable[[], str]) -> None:
        """Take note of a trainer, which may start processes, and end this one if it would wait for ever for theirs.

        Args:
            trainer: the trainer.
            give_up: called in another thread, before this process ends; what it says last.

        Raises:
            UserError: if it expects other processes than there are, or such as can't agree on a run folder.
        """
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise UserError("Several processes train by --trainer.strategy ddp here, not by spawned or forked ones.")
        met = dist.get_world_size() if several_processes() else None
        expected = trainer.num_nodes * trainer.num_devices  # its world_size is what torchrun or SLURM says
        if met is not None and met != expected:
            raise UserError(
                f"{met} processes were started and the Trainer expects {expected}: say --trainer.devices "
                "(processes per machine), --trainer.num_nodes (machines) and --trainer.strategy ddp."
            )
        if met is None and trainer.num_nodes > 1:
            raise UserError("On several machines let torchrun or SLURM's srun start all the processes.")
        if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
            self._observe_started(trainer, trainer.strategy.launcher, give_up)

    def _observe_started(
        self, trainer: L.Trainer, launcher: _SubprocessScriptLauncher, give_up: Callable[[], str]
    ) -> None:
        """Look after the processes that the launcher starts; its own observer kills this one without a word."""
        start_them = launcher._call_children_scripts

        def start() -> None:
            start_them()
            self._others += launcher.procs
            launcher.procs = []  # nothing for Lightning's observer to look at
            threading.Thread(target=self._observe, args=(trainer, give_up), daemon=True).start()

        launcher._call_children_scripts = start  # type: ignore[method-assign]

    def _observe(self, trainer: L.Trainer, give_up: Callable[[], str]) -> None:
        """End this process if another one has gone and the main thread can't notice.

        In starting up it waits for all of them in a call that nothing interrupts. Later it hears of the loss in the
        next exchange; a backend that doesn't say it, or a long time without one, is waited for `_PATIENCE_S`.
        """
        failed_s: float | None = None
        while not self._closed.wait(_LOOK_S):
            codes = [process.poll() for process in self._others]
            starting = not dist.is_initialized() and any(code is not None for code in codes)
            if failed_s is None and any(codes):
                failed_s = time.monotonic()
            late = failed_s is not None and time.monotonic() - failed_s > _PATIENCE_S
            if (starting or late) and trainer.state.status is TrainerStatus.RUNNING:
                sentence = give_up()
                for process in self._others:
                    process.kill()
                tell(f"moevision: {sentence}")
                os._exit(USER_ERROR)

    def close(self) -> None:
        """Let the processes that Lightning started come to their end, and end those that don't."""
        self._closed.set()
        os.environ.pop(HANDED_ON, None)
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()  # whoever still waits for this process hears that it has gone
        for process in self._others:
            try:
                process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _meet() -> None:
    """Join the other processes, if torchrun or SLURM started all of them."""
    if not dist.is_available() or dist.is_initialized():
        return
    kinds = (TorchElasticEnvironment, SLURMEnvironment)
    environment = next((kind() for kind in kinds if kind.detect()), None)
    if environment is None or environment.world_size() < 2:
        return
    # torchrun may hold the store itself, and says so in the environment
    torchrun = isinstance(environment, TorchElasticEnvironment)
    address = "env://" if torchrun else f"tcp://{environment.main_address}:{environment.main_port}"
    dist.init_process_group(init_method=address, rank=environment.global_rank(), world_size=environment.world_size())
