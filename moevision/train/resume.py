"""`moevision fit --resume RUN|auto`: saving a point to resume from, finding it, and going on in the same run folder.

`auto` is for job scripts that repeat one command: the folder follows from its --name, and where there is no valid
checkpoint yet, training starts afresh.

A point is saved between two optimizer steps, at the start of the next batch and before any other callback sees it: only
there is everything of a step done, its rows in metrics.csv included, and nothing of the next one begun. Random
generators are restored in `on_train_start`, after everything that draws from them during setup.
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

import lightning as L
import torch.distributed as dist
from filelock import FileLock, Timeout
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
    between_batches,
    set_batches_done,
    start_at_next_epoch,
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
from moevision.words import shell_word

OPTION, AUTO = "--resume", "auto"
SESSIONS = "sessions.json"
# May differ in a run that goes on, and is listed then. What isn't here makes another training, and is refused.
_FREE = (
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
_SILENT = ("name", "runs_root", "resume", "ckpt_path")  # don't touch the training
_FLOATING = (
    "model.compile",
    "model.grad_checkpointing",
    "model.arch.backend",
    "trainer.strategy",
    "parallel.",
)
# What an attempt without a checkpoint leaves and a training that begins would take for its own: split, probe, changes.
_LEFT = ("splits.csv", "bad_images.csv", PROBE_FILE, "config-*.yaml")
_PATIENCE_S = 10.0  # for the lock of a training that has just ended


class ResumePoint(L.Callback):
    """Saves `last.ckpt` between steps, stops there when asked to, and restores what Lightning doesn't.

    It must be the first callback, and `EpochEnd` the last. `fingerprint` is what the numbers depend on; training has
    `began` when setup can't fail any more.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, interruption: Interruption) -> None:
        self.path = folder / LAST
        self.config = config
        self.interruption = interruption
        self.fingerprint: dict[str, Any] = {}
        self.began = False
        self._saved_s = time.monotonic()  # the last save
        self._saved_step = -1
        self._until_s = float("inf")  # --trainer.max_time
        self._random_states: list[dict[str, Any]] | None = (
            None  # of each process, by the checkpoint
        )
        self._is_resumed = False

    def on_train_start(self, trainer: L.Trainer, task: Any) -> None:
        """Restore the random generators; from here on signals wait for the end of a step.

        A training that begins drops what an attempt without a checkpoint left in metrics.csv.
        """
        if not self._is_resumed:
            for file in _metrics(trainer):
                file.cut(0)
        self._restore_random_generators(trainer)
        self._take_time_limit(trainer)
        self.began = True
        self._note_save(trainer)
        self.interruption.listen()  # Lightning took SIGTERM, and SIGUSR1 on a cluster, a moment ago
        self.interruption.training = True

    def _restore_random_generators(self, trainer: L.Trainer) -> None:
        states, self._random_states = self._random_states, None
        if states is not None and len(states) == trainer.world_size:
            restore_random_state(states[trainer.global_rank])
        elif trainer.world_size > 1:
            seed_per_rank(trainer.global_rank)

    def _take_time_limit(self, trainer: L.Trainer) -> None:
        """Stop at --trainer.max_time instead of Lightning's timer, which would end a training as if it were done."""
        timer = callback_of(trainer, Timer)
        if timer is not None:
            cast(Any, trainer).callbacks.remove(timer)
            self._until_s = time.monotonic() + (timer.time_remaining() or 0)

    def on_train_batch_start(
        self, trainer: L.Trainer, task: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time to, and stop if a signal asked for it or --trainer.max_time is over."""
        if batch_idx % trainer.accumulate_grad_batches:
            return  # gradients of half a step can't be saved
        is_due, must_stop = self.is_due(trainer), self.must_stop(trainer)
        if (is_due or must_stop) and trainer.global_step != self._saved_step:
            with between_batches(trainer):
                self.save(trainer)
        if must_stop:
            self.interruption.stop()

    def is_due(self, trainer: L.Trainer) -> bool:
        """Whether to save, the same on every process."""
        is_due = time.monotonic() - self._saved_s >= 60 * self.config.every_minutes
        if self.config.every_steps is not None:
            is_due |= trainer.global_step - self._saved_step >= self.config.every_steps
        return trainer.strategy.reduce_boolean_decision(is_due, all=False)

    def must_stop(self, trainer: L.Trainer) -> bool:
        """Whether to stop, the same on every process."""
        is_late = time.monotonic() >= self._until_s and trainer.is_global_zero
        if is_late and trainer.global_step < trainer.estimated_stepping_batches:
            self.interruption.by = "--trainer.max_time"
        stop = self.interruption.requested is not None or self.interruption.by != ""
        return trainer.strategy.reduce_boolean_decision(stop, all=False)

    def save(self, trainer: L.Trainer) -> None:
        """Write `last.ckpt`; every process must call it."""
        trainer.save_checkpoint(self.path)
        self._note_save(trainer)

    def _note_save(self, trainer: L.Trainer) -> None:
        self._saved_s = time.monotonic()
        self._saved_step = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, task: Any) -> None:
        """From here on signals act at once: everything is saved."""
        self.interruption.training = False
        if self.interruption.requested is not None:
            self.interruption.stop()

    def on_exception(self, trainer: L.Trainer, task: Any, exception: BaseException) -> None:
        self.interruption.training = False

    def on_save_checkpoint(self, trainer: L.Trainer, task: Any, checkpoint: dict[str, Any]) -> None:
        """Add random generators, the rows of metrics.csv, what numbers depend on, and what `load_trained` needs."""
        data = data_of(trainer)
        checkpoint[MARK] = {
            "random": gather_objects(random_state()),
            "metrics_rows": next((file.count() for file in _metrics(trainer)), None),
            "fingerprint": self.fingerprint,
            "data": {
                "class_names": list(data.class_names),
                "mean_std": [list(data.mean), list(data.std)],
                "fit": data.fit,
            },
        }

    def on_load_checkpoint(self, trainer: L.Trainer, task: Any, checkpoint: dict[str, Any]) -> None:
        """Cut metrics.csv where the checkpoint was made, and follow a run folder that was moved."""
        for name, state in checkpoint.get("callbacks", {}).items():
            if name.startswith("ModelCheckpoint"):
                checkpoint["callbacks"][name] = _rewrite_checkpoint_paths(
                    state, self.path.parent.resolve()
                )
        if trainer.state.fn != "fit":
            return
        self._is_resumed = True
        start_at_next_epoch(trainer, checkpoint)
        _restore_loader_position(trainer, checkpoint)
        saved = checkpoint.get(MARK, {})
        self._random_states = saved.get("random")
        for file in _metrics(trainer):
            file.cut(saved.get("metrics_rows") or 0)


def _metrics(trainer: L.Trainer) -> list[MetricsFile]:
    """metrics.csv, which the first process writes; none in the others."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, RunLogger)]


class EpochEnd(Checkpoint):
    """Lets a `ResumePoint` save after the epoch's other callbacks; Lightning calls Checkpoint callbacks last."""

    def __init__(self, point: ResumePoint) -> None:
        self.point = point

    def on_train_epoch_end(self, trainer: L.Trainer, task: Any) -> None:
        self.point.save(trainer)
        if self.point.must_stop(trainer):
            self.point.interruption.stop()


def _restore_loader_position(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """On another number of processes, let Lightning count those that hold the images of this epoch so far."""
    data = data_of(trainer)
    state = checkpoint.get(type(data).__qualname__)
    if state is None or not isinstance(data, ImageDataModule):
        return
    batches = {"batch_size": data.batch_size, "world_size": trainer.world_size}
    if all(state[name] == value for name, value in batches.items()):
        return
    images = state["batch"] * state["batch_size"] * state["world_size"]
    images_per_step = data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    batch = images // images_per_step * trainer.accumulate_grad_batches
    data.load_state_dict({**state, **batches, "batch": batch})
    set_batches_done(checkpoint, batch)


def _rewrite_checkpoint_paths(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """ModelCheckpoint's state with its paths below `folder`; it forgets the best score where they differ."""
    old = state.get("dirpath")
    if not old or Path(old) == folder:
        return state

    def moved(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(old):
            return str(folder) + value.removeprefix(old)
        return value

    def moved_entry(value: Any) -> Any:
        if isinstance(value, dict):  # `best_k_models`: scores by paths
            return {moved(path): moved(score) for path, score in value.items()}
        return moved(value)

    return {name: moved_entry(value) for name, value in state.items()}


@dataclass(frozen=True)
class RunStart:
    """Where a training begins: its folder, and the checkpoint (None: afresh) with its steps and its fingerprint."""

    run_dir: Path
    checkpoint: Path | None = None
    step: int = 0
    fingerprint: dict[str, Any] = field(default_factory=dict)


def find_run_start(run_dir: Path, *, fresh_if_none: bool) -> RunStart:
    """The newest valid checkpoint of a run folder that this process has claimed; says which can't be used, and why."""
    # Where training writes; twin/ has its turn.
    for folder in (run_dir, run_dir / "checkpoints", run_dir / "model"):
        remove_leftovers(folder)

    checkpoint, refused = newest_valid(run_dir / "checkpoints")
    for other in refused:
        print_rank0(f"warning: {other.path} {other.fault}.")
    if checkpoint is not None:
        fingerprint = load_archive(checkpoint.path, mmap=True).get(MARK, {}).get("fingerprint", {})
        print_rank0(
            f"Going on with {run_dir} from {checkpoint.path.name}, step {checkpoint.step:,} (verified)."
        )
        return RunStart(run_dir, checkpoint.path, checkpoint.step, fingerprint)

    if not fresh_if_none:
        faults = "; ".join(f"{other.path.name} {other.fault}" for other in refused)
        raise UserError(
            f"Nothing in {run_dir} can be resumed ({faults or 'no step was saved yet'}): start anew, or with "
            f"{OPTION} {AUTO}."
        )
    print_rank0(f"{run_dir} has no checkpoint to go on from: starting afresh.")
    for pattern in _LEFT:
        for path in run_dir.glob(pattern):
            path.unlink()
    return RunStart(run_dir)


def is_finished(run_dir: Path, *, with_twin: bool) -> bool:
    """Whether everything that the run should leave is there."""
    summary = _json(run_dir / "summary.json")
    return summary is not None and not (with_twin and summary.get("twin") is None)


def changed_options(recorded: Settings, resumed: Settings) -> list[str]:
    """Phrases for the options in which a run that goes on differs from the recorded one, and may."""
    before, now = flatten(asdict(recorded)), flatten(asdict(resumed))
    changes = []
    for name in sorted(before.keys() | now.keys()):
        old, new = _option_text(before.get(name)), _option_text(now.get(name))
        if name in _SILENT or old == new:
            continue
        if name == "data.path" and Path(old).resolve() == Path(new).resolve():
            continue
        if name == "seed_everything" and new == "True" and old != "False":
            continue  # the seed that was drawn is recorded
        if not is_free(name):
            raise UserError(
                f"--{name} is {old} in this run and can't become {new} when it goes on: leave it out, or start a new "
                "run from its weights with --pretrained runs/NAME/model."
            )
        rounding = ", which may round differently" if name.startswith(_FLOATING) else ""
        changes.append(f"--{name} was {old}, now {new}{rounding}")
    return changes


def _option_text(value: Any) -> str:
    return "null" if value is None else str(value)


def is_free(option: str) -> bool:
    """Whether an option leaves the training what it is, up to rounding and what the guard prevents."""
    return f"{option}.".startswith(tuple(f"{free}." for free in (*_SILENT, *_FREE)))


def resume_command(run_dir: Path) -> str:
    """The command that resumes a run."""
    return f"moevision fit {OPTION} {shell_word(str(run_dir))}"


def note_session(start: RunStart, command: Sequence[str], notes: Sequence[str]) -> None:
    """Add this start to the run folder's list of them."""
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
    write_json_atomic(file, [*(_json(file) or []), session])


def first_command(run_dir: Path) -> list[str] | None:
    """The command line that a run began with, whatever it was gone on with; None if that isn't known."""
    for session in reversed(_json(run_dir / SESSIONS) or []):
        if session["from"] is None:
            return list(session["command"])
    return None


def _json(file: Path) -> Any:
    """What a file holds; None where it can't be read."""
    with suppress(OSError, ValueError):
        return json.loads(file.read_text(encoding="utf-8"))


def lock_run_folder(run_dir: Path) -> FileLock:
    """Keep other processes from training in the same folder, until the lock is released or this process has ended."""
    lock = FileLock(run_dir / ".lock", timeout=_PATIENCE_S)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"Another process is training in {run_dir}: wait for it, or end it first."
        ) from None
    return lock


class Session:
    """This process's share of a training: what stops it, where it may write, and how to go on with it.

    `command` is the command line as typed, the program first; `notes` are phrases on what differs from the run that is
    resumed, `lines` are to be told when the training can begin. `run_dir` is the run's, also while its twin trains,
    `probe` that of the weights that both start from, and `unused` a folder that nothing was trained in.
    """

    probe: Probe | None = None
    run_dir: Path | None = None
    unused: Path | None = None

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)
        self.interruption = Interruption()
        self.notes: list[str] = []
        self.lines: list[str] = []
        self._claims: list[FileLock] = []

    def claim(self, run_dir: Path) -> Path:
        """Keep other trainings out of this folder, until `close`; for the first process, before it touches anything.

        The folder is made if need be.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        self._claims.append(lock_run_folder(run_dir))
        return run_dir

    @property
    def resume_command(self) -> str | None:
        """What goes on with the run; None if there is no checkpoint to go on from."""
        if self.run_dir is None or not any(self.run_dir.glob("checkpoints/*.ckpt")):
            return None
        # The run's config.yaml stays as it is, so that a change must be said each time.
        again = without_resume(self.command[2:]) if self.notes else []
        return " ".join([resume_command(self.run_dir), *map(shell_word, again)])

    def close(self) -> None:
        """Leave the other processes, release the claimed folders, and then remove one: Windows keeps open files."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()  # whoever still waits for this process hears that it has gone
        while self._claims:
            self._claims.pop().release()
        if self.unused is not None:
            shutil.rmtree(self.unused, ignore_errors=True)


def without_resume(arguments: Sequence[str]) -> list[str]:
    """A command line without --resume and what follows it."""
    remaining = iter(arguments)
    others = []
    for argument in remaining:
        if argument == OPTION:
            next(remaining, None)
        elif not argument.startswith(f"{OPTION}="):
            others.append(argument)
    return others


def begin(session: Session, request: Request) -> tuple[Settings, RunStart | None]:
    """Find out what a `fit` is asked for, and where its training begins.

    The start is None for a run with a folder of its own. A run that is finished ends the command here.
    """
    say = print_rank0 if request.prints else session.lines.append
    if request.resume is None:
        return resolve_settings(request, say), None

    checkpoints = request.run_dir / "checkpoints"
    if request.resume == AUTO and newest_valid(checkpoints)[0] is None:
        settings = resolve_settings(request, say)
    else:  # it has chosen its start, and nothing is chosen again
        _, settings = resumed_settings(request)
    start: RunStart = broadcast_from_rank0(partial(_claim_run, session, request, settings))

    if start.checkpoint is not None:
        settings, session.notes = _compared_settings(request)
        for note in session.notes:
            print_rank0(f"changed: {note}")
    return settings, start


def _claim_run(session: Session, request: Request, settings: Settings) -> RunStart:
    """Claim the run folder, and find the checkpoint to go on from; for the first process."""
    run_dir = request.run_dir
    automatic = request.resume == AUTO
    if automatic:
        refuse_among_images(run_dir, settings.data.path)
    has_config = (run_dir / "config.yaml").is_file()
    if has_config and is_finished(run_dir, with_twin=settings.with_twin):
        _compared_settings(request)  # nothing that asks for another training passes for done
        print_rank0(f"{run_dir} is finished, see {run_dir}/summary.md: nothing to do.")
        raise SystemExit(0)
    return find_run_start(session.claim(run_dir), fresh_if_none=automatic)


def _compared_settings(request: Request) -> tuple[Settings, list[str]]:
    """The settings of a run that goes on, and phrases for what the request changes of them."""
    recorded, resumed = resumed_settings(request)
    changes = changed_options(recorded, resumed)
    # For `true` the seed that was drawn.
    return replace(resumed, seed_everything=recorded.seed_everything), changes
