"""`moevision fit --resume RUN|auto`: saving `last.ckpt`, finding the checkpoint to resume, and going on with a run.

`auto` is for job scripts that repeat one command: its --name is the run folder, and if that has no valid checkpoint
yet, training starts afresh.

A checkpoint is saved between two optimizer steps, at the start of the next batch and before other callbacks see that:
then a step is complete, its rows in metrics.csv included, and the next one hasn't begun. Random generators are restored
in `on_train_start`, after setup, which draws from them.
"""

# ruff: noqa: D102 (Lightning's hooks, whose `task` is the `ClassificationTask`)

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from filelock import FileLock, Timeout
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, Timer

from moevision.config import CheckpointConfig, Settings, flatten
from moevision.data import ImageDataModule
from moevision.errors import UserError
from moevision.files import remove_leftovers, write_json_atomic
from moevision.train.checkpoint import (
    LAST,
    MARK,
    load_archive,
    newest_valid,
)
from moevision.train.lightning_internals import (
    MetricsFile,
    RunLogger,
    loops_before_next_fetch,
    resume_after_finished_epoch,
    set_batches_done,
)
from moevision.train.processes import (
    Interruption,
    broadcast_from_rank0,
    callback_of,
    data_of,
    gather_objects,
    print_rank0,
    random_state,
    restore_random_state,
    seed_per_rank,
)
from moevision.train.recipe import (
    Request,
    refuse_among_images,
    resolve_settings,
    resumed_settings,
)
from moevision.train.start import PROBE_FILE, Probe
from moevision.types import Json, State
from moevision.words import shell_word

OPTION, AUTO = "--resume", "auto"
SESSIONS = "sessions.json"
# Options that may change when a run is resumed; the changes are listed. All others would change the training.
_CHANGEABLE = (
    "data.num_workers",
    "data.cache_mb",
    "data.path",
    "data.root",
    "data.download",
    "data.max_bad_fraction",
    "data.scores",
    "trainer.deterministic",
    "trainer.plugins",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.logger",
    "trainer.callbacks",
    "trainer.profiler",
    "trainer.detect_anomaly",
    "trainer.max_time",
    "trainer.enable_model_summary",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.benchmark",
    "model.compile",
    "model.grad_checkpointing",
    "model.arch.backend",
    "parallel",
    "with_twin",
    "checkpoint.every_minutes",
    "checkpoint.every_steps",
    "guard",
)
_UNLISTED = ("name", "runs_root", "resume", "ckpt_path")  # may change too, without being listed
# Changeable options that may change the order of floating-point operations.
_ROUNDING = (
    "model.compile",
    "model.grad_checkpointing",
    "model.arch.backend",
    "trainer.strategy",
    "parallel.",
)
# Files of an attempt that ended without a checkpoint, which a training that starts afresh would read as its own.
_STALE_FILES = ("splits.csv", "bad_images.csv", PROBE_FILE, "config-*.yaml")
_PATIENCE_S = 10.0  # how long to wait for the lock of a training that is about to end


class ResumePoint(Callback):
    """Saves `last.ckpt` between steps, stops there on a signal, and restores state that Lightning doesn't.

    It must be the first callback, and `EpochEnd` the last. `fingerprint` has what the results depend on, for a
    comparison on resume. `began` is True once training has started, after everything in setup that can fail.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, interruption: Interruption) -> None:
        self.path = folder / LAST
        self.config = config
        self.interruption = interruption
        self.fingerprint: Json = {}
        self.began = False
        self._saved_s = time.monotonic()  # time and step of the last save
        self._saved_step = -1
        self._deadline_s = float("inf")  # by --trainer.max_time
        # From the checkpoint, a dictionary per process, until they are restored.
        self._random_states: list[State] | None = None
        self._is_resumed = False

    def on_train_start(self, trainer: Trainer, task: Any) -> None:
        """Restore the random generators; from here on signals take effect at the end of a step.

        A training that starts afresh deletes rows of metrics.csv from an attempt that ended without a checkpoint.
        """
        if not self._is_resumed:
            for file in _metrics_files(trainer):
                file.truncate(0)
        self._restore_random_generators(trainer)
        self._replace_timer(trainer)
        self.began = True
        self._note_save(trainer)
        self.interruption.listen()  # again: Lightning has just set its own handlers for SIGTERM and SIGUSR1
        self.interruption.training = True

    def _restore_random_generators(self, trainer: Trainer) -> None:
        states, self._random_states = self._random_states, None
        if states is not None and len(states) == trainer.world_size:
            restore_random_state(states[trainer.global_rank])
        elif trainer.world_size > 1:
            seed_per_rank(trainer.global_rank)

    def _replace_timer(self, trainer: Trainer) -> None:
        """Take over --trainer.max_time from Lightning's timer, which would end a training as if it were complete."""
        timer = callback_of(trainer, Timer)
        if timer is not None:
            cast(Any, trainer).callbacks.remove(timer)
            self._deadline_s = time.monotonic() + (timer.time_remaining() or 0)

    def on_train_batch_start(self, trainer: Trainer, task: Any, batch: Any, batch_idx: int) -> None:
        """Save if a save is due, and stop on a signal or after --trainer.max_time."""
        if batch_idx % trainer.accumulate_grad_batches:
            return  # within an accumulated step: gradients aren't saved
        is_due, must_stop = self.is_due(trainer), self.must_stop(trainer)
        if (is_due or must_stop) and trainer.global_step != self._saved_step:
            with loops_before_next_fetch(trainer):
                self.save(trainer)
        if must_stop:
            self.interruption.stop()

    def is_due(self, trainer: Trainer) -> bool:
        """Whether a save is due; all processes get the same answer."""
        is_due = time.monotonic() - self._saved_s >= 60 * self.config.every_minutes
        if self.config.every_steps is not None:
            is_due |= trainer.global_step - self._saved_step >= self.config.every_steps
        return trainer.strategy.reduce_boolean_decision(is_due, all=False)

    def must_stop(self, trainer: Trainer) -> bool:
        """Whether to stop; all processes get the same answer."""
        is_overdue = time.monotonic() >= self._deadline_s and trainer.is_global_zero
        if is_overdue and trainer.global_step < trainer.estimated_stepping_batches:
            self.interruption.by = "--trainer.max_time"
        stop = self.interruption.requested is not None or self.interruption.by != ""
        return trainer.strategy.reduce_boolean_decision(stop, all=False)

    def save(self, trainer: Trainer) -> None:
        """Write `last.ckpt`; every process must call it."""
        trainer.save_checkpoint(self.path)
        self._note_save(trainer)

    def _note_save(self, trainer: Trainer) -> None:
        self._saved_s = time.monotonic()
        self._saved_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, task: Any) -> None:
        """From here on signals take effect at once, since everything is saved."""
        self.interruption.training = False
        if self.interruption.requested is not None:
            self.interruption.stop()

    def on_exception(self, trainer: Trainer, task: Any, exception: BaseException) -> None:
        self.interruption.training = False

    def on_save_checkpoint(self, trainer: Trainer, task: Any, checkpoint: State) -> None:
        """Add random states, the number of rows in metrics.csv, the fingerprint, and what `load_trained` needs."""
        data = data_of(trainer)
        checkpoint[MARK] = {
            "random": gather_objects(random_state()),
            "metrics_rows": next(
                (file.flush_and_count() for file in _metrics_files(trainer)), None
            ),
            "fingerprint": self.fingerprint,
            "data": {
                "class_names": list(data.class_names),
                "mean_std": [list(data.mean), list(data.std)],
                "fit": data.fit,
                "multilabel": data.multilabel,
            },
        }

    def on_load_checkpoint(self, trainer: Trainer, task: Any, checkpoint: State) -> None:
        """Cut metrics.csv to the rows that it had at the checkpoint, and adapt paths if the run folder was moved."""
        for name, state in checkpoint.get("callbacks", {}).items():
            if name.startswith("ModelCheckpoint"):
                checkpoint["callbacks"][name] = _rewrite_checkpoint_paths(
                    state, self.path.parent.resolve()
                )
        if trainer.state.fn != "fit":
            return
        self._is_resumed = True
        resume_after_finished_epoch(trainer, checkpoint)
        _restore_loader_position(trainer, checkpoint)
        saved = checkpoint.get(MARK, {})
        self._random_states = saved.get("random")
        for file in _metrics_files(trainer):
            file.truncate(saved.get("metrics_rows") or 0)


def _metrics_files(trainer: Trainer) -> list[MetricsFile]:
    """The metrics.csv of the run on rank 0, which writes it; an empty list on other ranks."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, RunLogger)]


class EpochEnd(Checkpoint):
    """Saves at the end of an epoch, after other callbacks: Lightning calls those of the class Checkpoint last."""

    def __init__(self, point: ResumePoint) -> None:
        self.point = point

    def on_train_epoch_end(self, trainer: Trainer, task: Any) -> None:
        self.point.save(trainer)
        if self.point.must_stop(trainer):
            self.point.interruption.stop()


def _restore_loader_position(trainer: Trainer, checkpoint: State) -> None:
    """If batch size or number of processes changed, convert the number of batches done in this epoch.

    It becomes that of new batches which hold the same number of images, for the data and for Lightning.
    """
    data = data_of(trainer)
    state = checkpoint.get(type(data).__qualname__)
    if state is None or not isinstance(data, ImageDataModule):
        return
    sizes = {"batch_size": data.batch_size, "world_size": trainer.world_size}
    if all(state[name] == value for name, value in sizes.items()):
        return

    # A batch number at which an optimizer step begins.
    images = state["batch"] * state["batch_size"] * state["world_size"]
    images_per_step = data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    batch = images // images_per_step * trainer.accumulate_grad_batches
    data.load_state_dict({**state, **sizes, "batch": batch})
    set_batches_done(checkpoint, batch)


def _rewrite_checkpoint_paths(state: State, folder: Path) -> State:
    """ModelCheckpoint's state with its paths moved to `folder`: it drops its best score if dirpath has changed."""
    old = state.get("dirpath")
    if not old or Path(old) == folder:
        return state

    def moved(value: Any) -> Any:
        if isinstance(value, dict):  # also `best_k_models`: scores by paths
            return {moved(key): moved(entry) for key, entry in value.items()}
        if isinstance(value, str) and value.startswith(old):
            return str(folder) + value.removeprefix(old)
        return value

    result: State = moved(state)
    return result


@dataclass(frozen=True)
class RunStart:
    """Where a training begins: its folder, and the checkpoint (None: afresh) with its step and fingerprint."""

    run_dir: Path
    checkpoint: Path | None = None
    step: int = 0
    fingerprint: Json = field(default_factory=dict)


def find_run_start(run_dir: Path, *, fresh_if_none: bool) -> RunStart:
    """Find the newest valid checkpoint of a run folder, which this process has locked; warns of damaged ones.

    Without one, training starts afresh if `fresh_if_none`; else a UserError.
    """
    # Temporary files of interrupted writes. Those in twin/ are removed when the twin's training begins.
    for folder in (run_dir, run_dir / "checkpoints", run_dir / "model"):
        remove_leftovers(folder)

    checkpoint, damaged = newest_valid(run_dir / "checkpoints")
    for entry in damaged:
        print_rank0(f"warning: {entry.path} {entry.fault}.")
    if checkpoint is not None:
        fingerprint = load_archive(checkpoint.path, mmap=True).get(MARK, {}).get("fingerprint", {})
        print_rank0(
            f"Going on with {run_dir} from {checkpoint.path.name}, step {checkpoint.step:,} (verified)."
        )
        return RunStart(run_dir, checkpoint.path, checkpoint.step, fingerprint)

    if not fresh_if_none:
        faults = "; ".join(f"{entry.path.name} {entry.fault}" for entry in damaged)
        raise UserError(
            f"Nothing in {run_dir} can be resumed ({faults or 'no step was saved yet'}): start anew, or with "
            f"{OPTION} {AUTO}."
        )
    print_rank0(f"{run_dir} has no checkpoint to go on from: starting afresh.")
    for pattern in _STALE_FILES:
        for path in run_dir.glob(pattern):
            path.unlink()
    return RunStart(run_dir)


def is_finished(run_dir: Path, *, with_twin: bool) -> bool:
    """Whether the run has its summary, and in it the comparison with the dense twin if `with_twin`."""
    summary = _read_json_or_none(run_dir / "summary.json")
    return summary is not None and not (with_twin and summary.get("twin") is None)


def changed_options(recorded: Settings, resumed: Settings) -> list[str]:
    """Describe the options that a resumed run changes, a phrase each; a UserError if one must not change."""
    before, after = flatten(asdict(recorded)), flatten(asdict(resumed))
    changes = []
    for name in sorted(before.keys() | after.keys()):
        old, new = _option_text(before.get(name)), _option_text(after.get(name))
        if name in _UNLISTED or old == new:
            continue
        if name == "data.path" and Path(old).resolve() == Path(new).resolve():
            continue
        if name == "seed_everything" and new == "True" and old != "False":
            continue  # "True" draws a seed; the recorded one is used again
        if not is_free(name):
            raise UserError(
                f"--{name} is {old} in this run and can't become {new} when it goes on: leave it out, or start a new "
                "run from its weights with --pretrained runs/NAME/model."
            )
        rounding = ", which may round differently" if name.startswith(_ROUNDING) else ""
        changes.append(f"--{name} was {old}, now {new}{rounding}")
    return changes


def _option_text(value: Any) -> str:
    return "null" if value is None else str(value)


def is_free(option: str) -> bool:
    """Whether an option may change on resume: results stay the same, except for rounding and the stability guard."""
    changeable = tuple(f"{name}." for name in (*_UNLISTED, *_CHANGEABLE))
    return f"{option}.".startswith(changeable)


def resume_command(run_dir: Path) -> str:
    """The command that resumes a run."""
    return f"moevision fit {OPTION} {shell_word(str(run_dir))}"


def note_session(start: RunStart, command: Sequence[str], notes: Sequence[str]) -> None:
    """Append this session, one start or resume of the run, to sessions.json."""
    origin = None
    if start.checkpoint is not None:
        origin = {"checkpoint": start.checkpoint.name, "step": start.step}
    session = {
        "started_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "from": origin,
        "notes": list(notes),
    }
    file = start.run_dir / SESSIONS
    write_json_atomic(file, [*(_read_json_or_none(file) or []), session])


def first_command(run_dir: Path) -> list[str] | None:
    """The command line of the last session that started afresh, not those that resumed it; None if unknown."""
    for session in reversed(_read_json_or_none(run_dir / SESSIONS) or []):
        if session["from"] is None:
            return list(session["command"])
    return None


def _read_json_or_none(file: Path) -> Any:
    """The content of a JSON file; None if it can't be read."""
    with suppress(OSError, ValueError):
        return json.loads(file.read_text(encoding="utf-8"))


def lock_run_folder(run_dir: Path) -> FileLock:
    """Lock a run folder against other trainings, until the lock is released or this process has ended."""
    lock = FileLock(run_dir / ".lock", timeout=_PATIENCE_S)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"Another process is training in {run_dir}: wait for it, or end it first."
        ) from None
    return lock


class Session:
    """State of one call of `moevision fit` in this process: signals, locked folders, and how to resume it."""

    probe: Probe | None = None  # of the pretrained weights that the run and its twin start from
    run_dir: Path | None = None  # of the run, also while its twin trains
    unused: Path | None = None  # a folder that nothing was trained in; `close` removes it

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)  # the command line as typed, the program first
        self.interruption = Interruption()
        self.notes: list[str] = []  # phrases on options that differ from those of the resumed run
        self.lines: list[str] = []  # messages to print when the training can begin
        self._locks: list[FileLock] = []

    def claim(self, run_dir: Path) -> Path:
        """Make the folder if needed, and lock it against other trainings until `close`.

        Only rank 0 calls this, before it writes anything.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        self._locks.append(lock_run_folder(run_dir))
        return run_dir

    @property
    def resume_command(self) -> str | None:
        """The command that resumes the run; None if there is no checkpoint."""
        if self.run_dir is None or not any(self.run_dir.glob("checkpoints/*.ckpt")):
            return None
        # config.yaml keeps the recorded options, so that changed ones must be given each time.
        arguments = without_resume(self.command[2:]) if self.notes else []
        return " ".join([resume_command(self.run_dir), *map(shell_word, arguments)])

    def close(self) -> None:
        """Leave the process group, release the locks, and then remove `unused`, as Windows deletes no open files."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()  # ranks that wait for this one get an error
        while self._locks:
            self._locks.pop().release()
        if self.unused is not None:
            shutil.rmtree(self.unused, ignore_errors=True)


def without_resume(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command without --resume and its value."""
    iterator = iter(arguments)
    remaining = []
    for argument in iterator:
        if argument == OPTION:
            next(iterator, None)  # its value
        elif not argument.startswith(f"{OPTION}="):
            remaining.append(argument)
    return remaining


def begin(session: Session, request: Request) -> tuple[Settings, RunStart | None]:
    """Resolve the settings of a `fit`, and find where its training begins.

    The start is None without --resume, since such a run gets a new folder. If the run is finished, the process exits.
    """
    report_line = print_rank0 if request.prints else session.lines.append
    if request.resume is None:
        return resolve_settings(request, report_line), None

    checkpoints = request.run_dir / "checkpoints"
    if request.resume == AUTO and newest_valid(checkpoints)[0] is None:
        settings = resolve_settings(request, report_line)
    else:  # recorded settings, among them the pretrained weights that were chosen then
        _, settings = resumed_settings(request)
    start: RunStart = broadcast_from_rank0(partial(_claim_run, session, request, settings))

    if start.checkpoint is not None:
        settings, session.notes = _settings_and_changes(request)
        for note in session.notes:
            print_rank0(f"changed: {note}")
    return settings, start


def _claim_run(session: Session, request: Request, settings: Settings) -> RunStart:
    """Lock the run folder, and find the checkpoint to resume from; on rank 0 only."""
    run_dir = request.run_dir
    is_auto = request.resume == AUTO
    if is_auto:
        refuse_among_images(run_dir, settings.data.path)
    has_config = (run_dir / "config.yaml").is_file()
    if has_config and is_finished(run_dir, with_twin=settings.with_twin):
        # Raises if the request is for another training than the finished one.
        _settings_and_changes(request)
        print_rank0(f"{run_dir} is finished, see {run_dir}/summary.md: nothing to do.")
        raise SystemExit(0)
    return find_run_start(session.claim(run_dir), fresh_if_none=is_auto)


def _settings_and_changes(request: Request) -> tuple[Settings, list[str]]:
    """The settings of a resumed run, and a phrase for each option that the request changes."""
    recorded, resumed = resumed_settings(request)
    changes = changed_options(recorded, resumed)
    # If the option is `true`, this is the seed that was drawn.
    return replace(resumed, seed_everything=recorded.seed_everything), changes
