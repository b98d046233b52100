"""The processes of a training: signals that stop one, its clock, its random state, and what several agree on.

Stopping: before and after training a signal ends the process at once. During training it is only noted;
`resume.ResumePoint` saves and stops between two optimizer steps, and a second signal doesn't wait for that. The exit
code is 128 plus the signal's number, as in a shell: 130 Ctrl-C, 129 terminal closed, 143 SIGTERM, 138 SIGUSR1 (Linux).

Several processes start in two ways. Lightning starts the others when the first one begins to train (`--trainer.devices
2`): by then everything is decided, and is handed on in the environment. Or torchrun or SLURM starts all of them at once
with the same command: then they meet before the first decision, and the first process sends it to the others. With one
process nothing is sent and nothing copied.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor

from moevision.data.module import is_main_process
from moevision.data.transforms import hash_u64
from moevision.errors import USER_ERROR, UserError, shown_lines
from moevision.files import other_lives

HANDED_ON = "MOEVISION_DECISIONS"
_PATIENCE_S = 20.0  # for processes that are about to end by themselves
_AGAIN_S = 0.05  # until a signal whose exception was dropped is raised again
_LOOK_S = 0.5  # between two looks at the processes that Lightning started
_BY_WHOM = ", by somebody or by a system that has run out of memory"
_STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # SIGUSR1: `#SBATCH --signal=USR1@120`
_HANGUP, _KILL = getattr(signal, "SIGHUP", None), getattr(signal, "SIGKILL", 9)  # not on Windows


def several_processes() -> bool:
    """Whether this is one of several processes that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this is the first of the processes that train together, or the only one."""
    return not several_processes() or dist.get_rank() == 0


def sum_over_processes(counts: Tensor) -> Tensor:
    """Sum over the processes of a training, in place."""
    if several_processes():
        dist.all_reduce(counts)
    return counts


def sums_over_processes(counts: Sequence[Tensor]) -> list[Tensor]:
    """Each of these tensors, of one dtype, summed over processes; all of them in one exchange."""
    if not several_processes() or not counts:
        return list(counts)
    total = sum_over_processes(torch.cat([count.flatten() for count in counts]))
    parts = total.split([count.numel() for count in counts])
    return [part.view_as(count) for part, count in zip(parts, counts, strict=True)]


def mean_over_processes(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detached scalars, each the mean over processes; all of them in one exchange."""
    values = {name: value.detach() for name, value in values.items()}
    if not several_processes():
        return values
    total = sum_over_processes(torch.stack([value.float() for value in values.values()]))
    return dict(zip(values, (total / dist.get_world_size()).unbind(), strict=True))


def sum_numbers(values: list[float], device: torch.device) -> list[float]:
    """Sums over processes of a few numbers, in double precision."""
    if not several_processes():
        return values
    total = sum_over_processes(torch.tensor(values, dtype=torch.float64, device=device))
    return cast(list[float], total.tolist())


def from_first(value: Any) -> Any:
    """What the first process has here."""
    if not several_processes():
        return value
    found = [value]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def gather(value: Any) -> list[Any]:
    """What every process has here, in order of rank."""
    if not several_processes():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def tell(sentence: str) -> None:
    """Print a sentence to stderr at once; a terminal that was closed meanwhile is no reason to stop training."""
    if not is_main_process():
        return
    with contextlib.suppress(OSError, ValueError):  # EIO from a hung-up terminal; ValueError from a closed file
        print(shown_lines(sentence), file=sys.stderr, flush=True)


def _boot_s() -> float:
    """A clock that runs on while the machine sleeps, where there is one (Linux)."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


class AwakeClock:
    """Wall time without suspend and SIGSTOP, in seconds.

    The monotonic clock stands still while Linux and macOS sleep; a process that was stopped (Ctrl-Z, `kill -STOP`)
    hears of it by SIGCONT and takes the gap out. On Windows the clock runs on in sleep, and the time counts.
    """

    def __init__(self) -> None:
        self._stopped_s = 0.0
        self._continued = False
        self._last = time.monotonic()
        self._asleep = _boot_s() - self._last
        self._usual_s = 0.0
        self._earlier: Any = None

    def now(self) -> float:
        """Seconds on this clock; only differences mean something."""
        return time.monotonic() - self._stopped_s

    def tick(self) -> float:
        """Say that the process is alive; call it once a step.

        Returns:
            Seconds in which it was stopped or asleep since the last call; 0 nearly always.
        """
        now, asleep = time.monotonic(), _boot_s() - time.monotonic()
        since, slept = now - self._last, max(0.0, asleep - self._asleep)
        stopped = 0.0
        if self._continued:
            stopped = max(0.0, since - self._usual_s)
            self._stopped_s += stopped
        else:
            self._usual_s = since
        self._last, self._asleep, self._continued = now, asleep, False
        return stopped + (slept if slept > 1.0 else 0.0)  # the two clocks are read one after the other

    def __enter__(self) -> AwakeClock:
        """Listen to SIGCONT, where there is one."""
        if hasattr(signal, "SIGCONT") and threading.current_thread() is threading.main_thread():
            self._earlier = signal.signal(signal.SIGCONT, self._on_continue)
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop listening."""
        if self._earlier is not None:
            signal.signal(signal.SIGCONT, self._earlier)
            self._earlier = None

    def _on_continue(self, number: int, frame: FrameType | None) -> None:
        self._continued = True


class Interrupted(SystemExit):
    """The process was asked to stop and does so; `code` is its exit code."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal_name = signal.Signals(number).name


class Interruption:
    """Listens to the signals that ask a process to stop, as a context manager.

    Attributes:
        training: whether a step may be under way, so that stopping waits for its end.
        requested: the signal that asked to stop; None if none did.
    """

    def __init__(self) -> None:
        self.training = False
        self.requested: int | None = None
        self._process = os.getpid()
        self._earlier: dict[int, Any] = {}
        self._tell_dropped = sys.unraisablehook
        self._again = threading.Timer(_AGAIN_S, signal.raise_signal)

    def __enter__(self) -> Interruption:
        """Begin to listen."""
        self._tell_dropped, sys.unraisablehook = sys.unraisablehook, self._on_dropped
        self.listen()
        return self

    def __exit__(self, *exception: object) -> None:
        """Give every signal back to whoever had it."""
        sys.unraisablehook = self._tell_dropped
        self._again.cancel()
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}

    def listen(self) -> None:
        """Take the signals; again after Lightning took some of them, which it does when a fit begins."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (getattr(signal, name) for name in _STOP_SIGNALS if hasattr(signal, name)):
            handler = signal.getsignal(number)
            if number == _HANGUP and handler is signal.SIG_IGN:
                continue  # nohup
            if number not in self._earlier:
                self._earlier[number] = handler
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker of the data loader, forked with our handler: the main process decides
        if number == _HANGUP:
            _leave_terminal()
        again, self.requested = self.requested is not None, number
        if again or not self.training:
            raise Interrupted(number)
        name = signal.Signals(number).name
        tell(f"\n{name}: saving when this step is done (validation is finished first); once more to stop without it.")

    def _on_dropped(self, dropped: Any) -> None:
        """Python drops what is raised in `__del__` or a weak reference's callback: stop a moment later, then."""
        if not isinstance(dropped.exc_value, Interrupted):
            self._tell_dropped(dropped)
            return
        self._again.cancel()
        self._again = threading.Timer(_AGAIN_S, signal.raise_signal, [self.requested])
        self._again.daemon = True
        self._again.start()

    def stop(self) -> None:
        """Stop now, because this process or another one was asked to.

        Raises:
            Interrupted: always; with SIGTERM's code if only another process heard the signal.
        """
        raise Interrupted(signal.SIGTERM if self.requested is None else self.requested)


def _leave_terminal() -> None:
    """Discard what is printed: writing to a terminal that is gone would raise in the middle of a step."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if os.isatty(descriptor):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)


class Processes:
    """This process among those of its training.

    Args:
        go_on: how to go on after another process has ended, for the end of a sentence.

    Attributes:
        first: whether it decides, speaks and writes the files.
    """

    def __init__(self, go_on: Callable[[], str] = str) -> None:
        self.first = is_main_process()
        self._decisions: list[Any] = []
        self._others: list[subprocess.Popen[bytes]] = []  # that Lightning started for this one
        self._go_on = go_on
        self._watched: tuple[L.Trainer, Callable[[], None]]  # the newest: a twin's training follows the run's
        self._closed = threading.Event()
        handed_on = os.environ.pop(HANDED_ON, None)
        if handed_on is not None and not self.first:
            first, self._decisions = json.loads(handed_on)
            if os.name == "posix":  # elsewhere a process that has gone can't be told so easily
                threading.Thread(target=self._observe_first, args=(first, os.getppid()), daemon=True).start()

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
            os.environ[HANDED_ON] = json.dumps([os.getpid(), self._decisions])
            return self._decisions[-1]
        if not self._decisions:
            raise UserError("Start several processes with --trainer.devices N, or with torchrun or SLURM's srun.")
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

    def watch(self, trainer: L.Trainer, give_up: Callable[[], None]) -> None:
        """Take note of a trainer, which may start processes, and end this one if it would wait for ever for theirs.

        Args:
            trainer: the trainer.
            give_up: called in another thread, before this process ends.

        Raises:
            UserError: if it expects other processes than there are, or such as can't agree on a run folder.
        """
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise UserError("Several processes train with --trainer.strategy ddp here; spawned or forked ones can't.")
        met = dist.get_world_size() if several_processes() else None
        expected = trainer.num_nodes * trainer.num_devices  # its world_size is what torchrun or SLURM says
        if met is not None and met != expected:
            raise UserError(
                f"{met} processes were started and the Trainer expects {expected}: say --trainer.devices "
                "(processes per machine), --trainer.num_nodes (machines) and --trainer.strategy ddp."
            )
        if met is None and trainer.num_nodes > 1:
            raise UserError("On several machines let torchrun or SLURM's srun start all the processes.")
        if met is None and trainer.world_size != expected:  # Lightning leaves it to SLURM, which started one
            raise UserError(
                f"The Trainer expects {expected} processes and {trainer.world_size} was started: begin the command "
                f"with srun in a job with --ntasks-per-node={trainer.num_devices}, or call the job `interactive` "
                "(sbatch --job-name=interactive), so that they are started here."
            )
        self._watched = trainer, give_up
        if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
            self._observe_started(trainer.strategy.launcher)

    def _observe_started(self, launcher: _SubprocessScriptLauncher) -> None:
        """Look after the processes that the launcher starts; its own observer kills this one without a word."""
        start_them = launcher._call_children_scripts

        def start() -> None:
            start_them()
            self._others += launcher.procs
            launcher.procs = []  # nothing for Lightning's observer to look at
            threading.Thread(target=self._observe, daemon=True).start()

        launcher._call_children_scripts = start  # type: ignore[method-assign]

    def _observe(self) -> None:
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
            trainer, give_up = self._watched
            late = failed_s is not None and time.monotonic() - failed_s > _PATIENCE_S
            if (starting or late) and trainer.state.status is TrainerStatus.RUNNING:
                give_up()
                sentence = self.another_ended()
                for process in self._others:
                    process.kill()
                tell(f"moevision: {sentence}")
                os._exit(USER_ERROR)

    def _observe_first(self, first: int, parent: int) -> None:
        """End this process when the first one has gone: else it waits for it, in starting up for half an hour.

        A first process that neither crashes nor is killed ends after the others (`close`).

        Args:
            first: its process id.
            parent: that of this process's parent, the same unless a script stands between them, or it is gone already.
        """
        while os.getppid() == parent and other_lives(first):
            if self._closed.wait(_LOOK_S):
                return
        if os.environ.get("LOCAL_RANK") == "1":  # one voice
            sentence = f"The first process of this training crashed or was killed{_BY_WHOM}.{self._go_on()}"
            with contextlib.suppress(OSError, ValueError):
                print(shown_lines(f"moevision: {sentence}"), file=sys.stderr, flush=True)
        os._exit(USER_ERROR)

    def wait_for_first(self) -> None:
        """Give `_observe_first` time to notice that the first process is the one that has gone."""
        time.sleep(2 * _LOOK_S)

    def another_ended(self) -> str:
        """What to say when another process of this training has gone: which one was killed, and how to go on.

        A connection ends a moment before its process has an exit code.
        """
        until = time.monotonic() + _LOOK_S
        while self._others and not any(process.poll() for process in self._others) and time.monotonic() < until:
            time.sleep(0.02)
        killed = [rank for rank, process in enumerate(self._others, start=1) if process.poll() == -_KILL]
        if killed:
            sentence = f"Process {killed[0]} of this training was killed{_BY_WHOM}."  # others follow by themselves
        else:
            sentence = "Another process of this training has ended, see above if it said why."
        return sentence + self._go_on()

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
    """Join the other processes, if torchrun or SLURM started all of them.

    Raises:
        UserError: if SLURM was to start several and hasn't, so that this one would wait for them.
    """
    if not dist.is_available() or dist.is_initialized():
        return
    kinds = (TorchElasticEnvironment, SLURMEnvironment)
    try:
        environment = next((kind() for kind in kinds if kind.detect()), None)
    except RuntimeError as error:  # about --ntasks
        raise UserError(f"{error} Start the command with srun.") from error
    if environment is None or environment.world_size() < 2:
        return
    # srun sets it for what it starts; a batch script itself is one process, whatever it asked for.
    if isinstance(environment, SLURMEnvironment) and "SLURM_STEP_NUM_TASKS" not in os.environ:
        raise UserError(
            f"This job has {environment.world_size()} tasks, and only srun starts them: begin the command with srun."
        )
    # torchrun may hold the store itself, and says so in the environment
    torchrun = isinstance(environment, TorchElasticEnvironment)
    address = "env://" if torchrun else f"tcp://{environment.main_address}:{environment.main_port}"
    dist.init_process_group(init_method=address, rank=environment.global_rank(), world_size=environment.world_size())


def random_state() -> dict[str, Any]:
    """The generators' states of this process: tensors, lists, numbers and strings only."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def part_random_state(rank: int) -> None:
    """Let this process draw other numbers than those that began with the same seed: its dropout is its own."""
    seed = hash_u64(torch.initial_seed(), rank)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def restore_random_state(state: dict[str, Any]) -> None:
    """Put every generator back to `state`; CUDA generators only if there are as many devices as then."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.random.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([device.cpu() for device in state["cuda"]])
