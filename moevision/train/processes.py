"""The processes and devices of a training: what they share, how they start, and the signals that stop one.

During training a signal is only noted; `resume.ResumePoint` saves and stops between two optimizer steps, and a second
one doesn't wait for that. The exit code is 128 plus the signal's number: 130 Ctrl-C, 129 terminal closed, 143 SIGTERM,
138 SIGUSR1 (Linux). Several processes are started by torchrun, by SLURM's srun, or here, by torchrun's own launcher.
All run the same command, join before anything is decided, and take what the first process decided.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch import Tensor

from moevision.data.module import is_main_process
from moevision.data.transforms import hash_u64
from moevision.errors import USER_ERROR, UserError, escape_controls_of_lines
from moevision.losses import sum_over_ranks
from moevision.train.lightning_internals import command_of_this_process

_Callback = TypeVar("_Callback")
_STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # SIGUSR1: `#SBATCH --signal=USR1@120`
# Windows has neither.
_HANGUP = getattr(signal, "SIGHUP", None)
_KILL = getattr(signal, "SIGKILL", 9)


def several_processes() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_rank0() -> bool:
    """Whether this is the first of the processes that train together, or the only one."""
    return not several_processes() or dist.get_rank() == 0


def mean_over_processes(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detached scalars, each the mean over processes; all of them in one exchange."""
    if not several_processes():
        return {name: value.detach() for name, value in values.items()}
    sums = sum_over_ranks([value.detach().float() for value in values.values()])
    return {name: total / dist.get_world_size() for name, total in zip(values, sums, strict=True)}


def sum_numbers(numbers: list[float], device: torch.device) -> list[float]:
    """Sums over processes of a few numbers, in double precision."""
    if not several_processes():
        return numbers
    (sums,) = sum_over_ranks([torch.tensor(numbers, dtype=torch.float64, device=device)])
    return sums.tolist()


def gather_objects(value: Any) -> list[Any]:
    """The `value` of every process, in order of rank."""
    if not several_processes():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def print_rank0(sentence: str) -> None:
    """Print a sentence to stderr at once; a terminal that was closed meanwhile is no reason to stop training."""
    if not is_main_process():
        return
    # EIO from a hung-up terminal; ValueError from a closed file.
    with contextlib.suppress(OSError, ValueError):
        print(escape_controls_of_lines(sentence), file=sys.stderr, flush=True)


def stop_signals() -> list[signal.Signals]:
    """The signals that stop a training: Ctrl-C, SIGTERM, SLURM's warning, and a closed terminal but under nohup."""
    signals = [signal.Signals[name] for name in _STOP_SIGNALS if hasattr(signal, name)]
    if _HANGUP is not None and signal.getsignal(_HANGUP) is signal.SIG_IGN:
        signals.remove(_HANGUP)
    return signals


class Interrupted(SystemExit):
    """Ends a process that a signal asked to stop; `code` is its exit code."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal_name = signal.Signals(number).name


class Interruption:
    """Listens to the signals that ask a process to stop, as a context manager.

    While it is `training`, stopping waits for the end of a step; `requested` is the signal that asked for it, `by` what
    else did.
    """

    def __init__(self) -> None:
        self.training = False
        self.requested: int | None = None
        self.by = ""
        self._process = os.getpid()
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        """Begin to listen."""
        self.listen()
        return self

    def __exit__(self, *exception: object) -> None:
        """Restore the earlier handlers."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}

    def listen(self) -> None:
        """Install the handlers; again when a fit begins, at which Lightning installs its own."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in stop_signals():
            self._earlier.setdefault(number, signal.getsignal(number))
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker of the data loader, forked with our handler: the main process decides
        if number == _HANGUP:
            _leave_terminal()
        is_second = self.requested is not None
        self.requested = number
        if is_second or not self.training:
            raise Interrupted(number)
        name = signal.Signals(number).name
        print_rank0(
            f"\n{name}: saving when this step is done (validation is finished first); once more to stop without it."
        )

    def stop(self) -> None:
        """Stop now, with SIGTERM's code if this process got no signal."""
        raise Interrupted(signal.SIGTERM if self.requested is None else self.requested)


def _leave_terminal() -> None:
    """Discard what is printed: writing to a terminal that is gone would raise in the middle of a step."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if os.isatty(descriptor):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)


def broadcast_from_rank0(decision: Callable[[], Any]) -> Any:
    """The result of `decision` on rank 0, as plain data, on every process. If it fails, the others end too."""
    if not several_processes():
        return decision()
    message: list[Any] = [False, None]  # whether it was decided, and what
    try:
        if is_rank0():
            message = [True, decision()]
    finally:
        dist.broadcast_object_list(message, src=0)
    is_decided, value = message
    if not is_decided:
        raise SystemExit(0)
    return value


@contextmanager
def rank0_first() -> Iterator[None]:
    """Run the block on rank 0 before the other processes, which then find the files that it made."""
    if several_processes() and not is_rank0():
        dist.barrier()
    try:
        yield
    finally:
        if several_processes() and is_rank0():
            dist.barrier()


def init_process_group() -> None:
    """Join the other processes of this training, if torchrun, SLURM or `start_processes` started all of them.

    No signal interrupts the wait for them: call it while SIGTERM still ends the process.
    """
    if not dist.is_available() or dist.is_initialized():
        return
    environment = _cluster_environment()
    if environment is None or environment.world_size() < 2:
        return
    address = f"tcp://{environment.main_address}:{environment.main_port}"
    if isinstance(environment, TorchElasticEnvironment):
        address = "env://"  # torchrun may hold the store itself, and says so in the environment
    # srun sets it for what it starts; a batch script itself is one process, whatever it asked for.
    elif "SLURM_STEP_NUM_TASKS" not in os.environ:
        raise UserError(
            f"This job has {environment.world_size()} tasks, and only srun starts them: begin the command with srun."
        )
    rank = environment.global_rank()
    try:
        dist.init_process_group(init_method=address, rank=rank, world_size=environment.world_size())
    except RuntimeError as error:  # a process that had started has gone
        if rank > 0:
            raise SystemExit(USER_ERROR) from None  # only rank 0 prints the error
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"The processes of this training can't meet ({reason}): see above if one said why."
        ) from error


def _cluster_environment() -> TorchElasticEnvironment | SLURMEnvironment | None:
    """The environment of torchrun or SLURM; None if neither has started this process."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    try:
        return SLURMEnvironment() if SLURMEnvironment.detect() else None
    except RuntimeError as error:  # about --ntasks
        raise UserError(f"{error} Start the command with srun.") from error


def start_processes(number: int) -> NoReturn:
    """Run this command once in each of `number` processes on this machine, wait for them, and end as they did."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The processes print their errors themselves.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=number,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="moevision",
        max_restarts=0,
        monitor_interval=0.2,
        shutdown_timeout=600,  # a validation is finished before a process stops
        signals_to_handle=",".join(number.name for number in stop_signals()),
    )
    program, *arguments = command_of_this_process()
    try:
        elastic_launch(config, program)(*arguments)
    except SignalException as stopped:
        raise SystemExit(128 + stopped.sigval) from None
    except ChildFailedError as failed:
        codes = {rank: failure.exitcode for rank, failure in sorted(failed.failures.items())}
        raise SystemExit(_exit_code(codes)) from None
    raise SystemExit(0)


def _exit_code(codes: dict[int, int]) -> int:
    """The exit code of a training by those of its processes by rank; says so where one was killed."""
    killed = [rank for rank, code in codes.items() if code == -_KILL]
    if killed:
        advice = ""
        if killed[0] == 0:
            advice = " To go on: moevision fit --resume with the run folder named above."
        print_rank0(
            f"moevision: Process {killed[0]} of this training was killed, by somebody or by a system that has run "
            f"out of memory.{advice}"
        )
        return USER_ERROR  # the others were ended for it, and each has a code of its own
    failures = [code for code in codes.values() if code > 0]
    failures.sort(key=lambda code: code > 128)  # those that a signal ended last
    return failures[0] if failures else USER_ERROR


def random_state() -> dict[str, Any]:
    """The generators' states of this process: tensors, lists, numbers and strings only."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    keys = np.asarray(keys).tolist()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), keys, int(position), int(has_gauss), float(cached)],
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def seed_per_rank(rank: int) -> None:
    """Seed this process's generators by its rank, so that processes draw different dropout masks."""
    seed = hash_u64(torch.initial_seed(), rank)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore every generator; those of CUDA only if there are as many devices as then."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *others = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *others))
    torch.random.set_rng_state(state["torch"].cpu())
    devices = state["cuda"]
    if devices and torch.cuda.is_available() and len(devices) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([device.cpu() for device in devices])


# ---- the devices: what is asked before there is a Trainer

_accelerator: ContextVar[str | None] = ContextVar("accelerator", default=None)


@contextmanager
def trains_on(accelerator: str | None) -> Iterator[None]:
    """Inside, `has_gpu` knows --trainer.accelerator; None: it wasn't given."""
    before = _accelerator.set(accelerator)
    try:
        yield
    finally:
        _accelerator.reset(before)


def has_gpu() -> bool:
    """Whether the training will have a GPU of CUDA or ROCm. Apple's isn't used: it has no float64."""
    return _accelerator.get() != "cpu" and torch.cuda.is_available()


def callback_of(trainer: L.Trainer, kind: type[_Callback]) -> _Callback | None:
    """The callback of this kind that a training has, if it has one."""
    callbacks = cast(Any, trainer).callbacks
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def data_of(trainer: L.Trainer) -> Any:
    """The `ImageDataModule` of a training; None where loaders were given."""
    return cast(Any, trainer).datamodule


def is_trial(trainer: L.Trainer) -> bool:
    """Whether this only tests that everything runs (--trainer.fast_dev_run)."""
    return bool(cast(Any, trainer).fast_dev_run)


def parallel_strategy(trainer: L.Trainer) -> Any:
    """The `MoEParallelStrategy` of this trainer; None where every process has all weights."""
    return trainer.strategy if hasattr(trainer.strategy, "replicated") else None
