"""The processes and devices of a training: what they exchange, how they start, and the signals that stop one.

During training the first signal is only recorded: `resume.ResumePoint` saves and stops between two optimizer steps. A
second signal stops at once. The exit code is 128 plus the signal's number: 130 Ctrl-C, 129 terminal closed, 143
SIGTERM, 138 SIGUSR1 (Linux).

Several processes are started by torchrun, by SLURM's srun, or by `start_processes`, which uses torchrun's launcher.
All of them run the same command and join one process group first; rank 0 then takes the decisions for all.
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

import numpy as np
import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch import Tensor

from moevision.data.module import is_main_process
from moevision.data.transforms import hash_u64
from moevision.errors import USER_ERROR, UserError, escape_controls_of_lines
from moevision.losses import sum_over_ranks
from moevision.train.lightning_internals import command_of_this_process
from moevision.types import State

_Callback = TypeVar("_Callback")
_STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # SIGUSR1: `#SBATCH --signal=USR1@120`
# Windows has neither of these signals.
_HANGUP = getattr(signal, "SIGHUP", None)
_KILL = getattr(signal, "SIGKILL", 9)


def several_processes() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_rank0() -> bool:
    """Whether this is the first of the processes that train together, or the only one."""
    return not several_processes() or dist.get_rank() == 0


def mean_over_processes(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars averaged over processes and detached; all of them take one all-reduce."""
    if not several_processes():
        return {name: value.detach() for name, value in values.items()}
    sums = sum_over_ranks([value.detach().float() for value in values.values()])
    return {name: total / dist.get_world_size() for name, total in zip(values, sums, strict=True)}


def sum_numbers(numbers: list[float], device: torch.device) -> list[float]:
    """Sum each number over processes, in double precision."""
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
    """Print a sentence to stderr, on rank 0 only; errors are ignored: a closed terminal must not stop training."""
    if not is_main_process():
        return
    # EIO from a hung-up terminal; ValueError from a closed file.
    with contextlib.suppress(OSError, ValueError):
        print(escape_controls_of_lines(sentence), file=sys.stderr, flush=True)


def stop_signals() -> list[signal.Signals]:
    """The signals that stop a training: Ctrl-C, SIGTERM, SLURM's warning, and a closed terminal except under nohup."""
    signals = [signal.Signals[name] for name in _STOP_SIGNALS if hasattr(signal, name)]
    if _HANGUP is not None and signal.getsignal(_HANGUP) is signal.SIG_IGN:
        signals.remove(_HANGUP)
    return signals


class Interrupted(SystemExit):
    """Raised to end a process that a signal asked to stop; `code` is its exit code."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal_name = signal.Signals(number).name


class Interruption:
    """Handles the signals that ask a process to stop, as a context manager.

    Attributes:
        training: while true, the first signal is only recorded, so that training can end its step and save.
        requested: number of the last signal that asked to stop, None before any.
        by: the option that asked to stop without a signal, such as "--trainer.max_time"; else empty.
    """

    def __init__(self) -> None:
        self.training = False
        self.requested: int | None = None
        self.by = ""
        self._process_id = os.getpid()
        # Asked before any hang-up: afterwards no terminal says that it is one.
        self._terminals = list(filter(os.isatty, (1, 2)))
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        """Install the handlers."""
        self.listen()
        return self

    def __exit__(self, *exception: object) -> None:
        """Restore the handlers that were there before."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def listen(self) -> None:
        """Install the handlers; called again when a fit begins, since Lightning has then installed its own."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in stop_signals():
            self._previous_handlers.setdefault(number, signal.getsignal(number))
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process_id:
            return  # a data loader's worker inherited this handler by fork: the main process decides

        if number == _HANGUP:
            # Writing to a closed terminal would raise an error in the middle of a step.
            for descriptor in self._terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)

        is_second = self.requested is not None
        self.requested = number
        if is_second or not self.training:
            raise Interrupted(number)

        name = signal.Signals(number).name
        print_rank0(
            f"\n{name}: saving when this step is done (validation is finished first); once more to stop without it."
        )

    def stop(self) -> None:
        """Stop now, with the exit code of the signal; that of SIGTERM if this process got none."""
        raise Interrupted(signal.SIGTERM if self.requested is None else self.requested)


def broadcast_from_rank0(decide: Callable[[], Any]) -> Any:
    """Call `decide` on rank 0 and return its result, plain data, on every process. If it fails, all processes end."""
    if not several_processes():
        return decide()
    message: list[Any] = [False, None]  # whether rank 0 succeeded, and its result
    try:
        if is_rank0():
            message = [True, decide()]
    finally:
        dist.broadcast_object_list(message, src=0)
    succeeded, result = message
    if not succeeded:
        raise SystemExit(0)
    return result


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
    """Join the other processes of this training, if torchrun, SLURM or `start_processes` started several.

    This waits for all of them, and a handler of ours can't interrupt it: call it while SIGTERM still has its default
    action, which ends the process.
    """
    if not dist.is_available() or dist.is_initialized():
        return
    environment = _cluster_environment()
    if environment is None or environment.world_size() < 2:
        return

    address = f"tcp://{environment.main_address}:{environment.main_port}"
    if isinstance(environment, TorchElasticEnvironment):
        # torchrun may host the store itself; an environment variable says so.
        address = "env://"
    # Only srun sets this variable; without srun, a batch script is one process, however many tasks the job has.
    elif "SLURM_STEP_NUM_TASKS" not in os.environ:
        raise UserError(
            f"This job has {environment.world_size()} tasks, and only srun starts them: begin the command with srun."
        )

    rank = environment.global_rank()
    try:
        dist.init_process_group(init_method=address, rank=rank, world_size=environment.world_size())
    except RuntimeError as error:  # another process ended before all had joined
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
    except RuntimeError as error:  # Lightning's, about the option --ntasks
        raise UserError(f"{error} Start the command with srun.") from error


def start_processes(num_processes: int) -> NoReturn:
    """Run this command in `num_processes` processes on this machine, wait for them, and exit with their exit code."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The processes print their errors themselves, so the launcher needn't.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="moevision",
        max_restarts=0,
        monitor_interval=0.2,
        shutdown_timeout=600,  # seconds; a process finishes its validation before it stops
        signals_to_handle=",".join(stop_signal.name for stop_signal in stop_signals()),
    )

    program, *arguments = command_of_this_process()
    try:
        elastic_launch(config, program)(*arguments)
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in sorted(error.failures.items())}
        raise SystemExit(_exit_code(codes)) from None
    raise SystemExit(0)


def _exit_code(codes: dict[int, int]) -> int:
    """The exit code of a training, given the code of each rank; prints a message if a process was killed.

    Torch gives a process that a signal ended the negative of the signal's number.
    """
    killed = [rank for rank, code in codes.items() if code == -_KILL]
    if killed:
        advice = ""
        if killed[0] == 0:
            advice = " To go on: moevision fit --resume with the run folder named above."
        print_rank0(
            f"moevision: Process {killed[0]} of this training was killed, by somebody or by a system that has run "
            f"out of memory.{advice}"
        )
        return USER_ERROR  # the launcher then ended the others, whose codes say nothing

    failures = [code for code in codes.values() if code > 0]
    # Failures of a process itself come before stops by a signal.
    failures.sort(key=lambda code: code > 128)
    return failures[0] if failures else USER_ERROR


def random_state() -> State:
    """The states of this process's random generators; `checkpoint.plain` makes a checkpoint's part of them."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def seed_per_rank(rank: int) -> None:
    """Seed this process's generators by its rank, so that processes draw different dropout masks."""
    seed = hash_u64(torch.initial_seed(), rank)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def restore_random_state(state: State) -> None:
    """Restore every generator; those of CUDA only if the number of devices is the same as when they were saved."""
    version, internal_state, next_gauss = state["python"]
    random.setstate((version, tuple(internal_state), next_gauss))
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["torch"].cpu())
    cuda_states = state["cuda"]
    if cuda_states and torch.cuda.is_available() and len(cuda_states) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([cuda_state.cpu() for cuda_state in cuda_states])


# ---- devices, as far as they are needed before there is a Trainer; parts of a Trainer

_accelerator: ContextVar[str | None] = ContextVar("accelerator", default=None)


@contextmanager
def trains_on(accelerator: str | None) -> Iterator[None]:
    """A scope in which `has_gpu` knows the option --trainer.accelerator; None if it wasn't given."""
    token = _accelerator.set(accelerator)
    try:
        yield
    finally:
        _accelerator.reset(token)


def has_gpu() -> bool:
    """Whether the training will run on a CUDA or ROCm GPU. Apple's GPUs aren't used: they have no float64."""
    return _accelerator.get() != "cpu" and torch.cuda.is_available()


def callback_of(trainer: Trainer, callback_type: type[_Callback]) -> _Callback | None:
    """The first callback of this type that the trainer has; None without."""
    callbacks = cast(Any, trainer).callbacks
    return next((callback for callback in callbacks if isinstance(callback, callback_type)), None)


def data_of(trainer: Trainer) -> Any:
    """The `ImageDataModule` of a training; None if it was started with data loaders instead."""
    return cast(Any, trainer).datamodule


def is_trial(trainer: Trainer) -> bool:
    """Whether this is only a test that everything runs (--trainer.fast_dev_run)."""
    return bool(cast(Any, trainer).fast_dev_run)


def parallel_strategy(trainer: Trainer) -> Any:
    """The `MoEParallelStrategy` of this trainer; None where every process has all weights."""
    # Only that strategy has this attribute.
    return trainer.strategy if hasattr(trainer.strategy, "replicated") else None
