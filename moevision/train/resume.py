"""`moevision fit --resume RUN|auto`: saving a point to resume from, finding it, and going on in the same run folder.

`auto` is for job scripts that repeat one command: the folder follows from its --name, and where there is no valid
checkpoint yet, training starts afresh.

A point is saved between two optimizer steps, at the start of the next batch and before any other callback sees it: only
there is everything of a step done, its rows in metrics.csv included, and nothing of the next one begun. Random
generators are restored in `on_train_start`, after everything that draws from them during setup.
"""

# ruff: noqa: D102 (Lightning's hooks)

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast, get_args

import lightning as L
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import Checkpoint, Timer

from moevision.config import CheckpointConfig, Fit, ParsedArgs, complete
from moevision.data import ImageDataModule
from moevision.errors import UserError
from moevision.files import remove_leftovers, write_json_atomic
from moevision.models.config import build_model
from moevision.models.io import (
    SavedModel,
    check_numbers,
    colours,
    explain_load_errors,
    from_cache_only,
    load_model,
)
from moevision.models.safe_files import check_arguments
from moevision.train.checkpoint import (
    LAST,
    PRETRAINED_CONFIG,
    SafeCheckpointIO,
    check_checkpoint,
    load_archive,
    newest_valid,
)
from moevision.train.health import MetricsFile, RunLogger
from moevision.train.processes import (
    Interruption,
    broadcast_from_rank0,
    callback_of,
    gather_objects,
    print_rank0,
    random_state,
    restore_random_state,
    seed_per_rank,
)
from moevision.train.recipe import (
    find_config,
    read_config,
    refuse_among_images,
    resolve_settings,
    run_name,
)
from moevision.train.start import PROBE_FILE, Probe
from moevision.train.task import ClassificationTask
from moevision.words import shell_word

OPTION, AUTO = "--resume", "auto"
SESSIONS = "sessions.json"
# May differ in a run that goes on, and is listed then. What isn't here makes another training, and is refused.
_FREE = (
    *(
        "data.num_workers",
        "data.cache_mb",
        "data.path",
        "data.root",
        "data.download",
        "data.max_bad_fraction",
    ),
    *("data.scores", "trainer.deterministic", "trainer.plugins"),
    *(
        "trainer.enable_progress_bar",
        "trainer.log_every_n_steps",
        "trainer.logger",
        "trainer.callbacks",
    ),
    *(
        "trainer.profiler",
        "trainer.detect_anomaly",
        "trainer.max_time",
        "trainer.enable_model_summary",
    ),
    *(
        "trainer.accelerator",
        "trainer.devices",
        "trainer.num_nodes",
        "trainer.strategy",
        "trainer.benchmark",
    ),
    *("model.compile", "model.grad_checkpointing", "model.arch.backend", "parallel"),
    *("with_twin", "checkpoint.every_minutes", "checkpoint.every_steps", "guard"),
)
_SILENT = (
    "config",
    "name",
    "runs_root",
    "resume",
    "ckpt_path",
    "print_config",
)  # don't touch the training
_FLOATING = (
    "model.compile",
    "model.grad_checkpointing",
    "model.arch.backend",
    "trainer.strategy",
    "parallel.",
)
# What an attempt without a checkpoint leaves and a training that begins would take for its own: split, probe, changes.
_LEFT = ("splits.csv", "bad_images.csv", PROBE_FILE, "config-*.yaml")
MARK = "moevision"  # where a checkpoint keeps what is ours
_PATIENCE_S = 10.0  # for the lock of a training that has just ended


class ResumePoint(L.Callback):
    """Saves `last.ckpt` between steps, stops there when asked to, and restores what Lightning doesn't.

    It must be the first callback, and `EpochEnd` the last. `fingerprint` is what the numbers depend on; training has
    `began` when setup can't fail any more.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, interruption: Interruption) -> None:
        self.path, self.config, self.interruption = folder / LAST, config, interruption
        self.fingerprint: dict[str, Any] = {}
        self.began = False
        self._saved_s, self._saved_step, self._until_s = time.monotonic(), -1, float("inf")
        self._states: list[dict[str, Any]] | None = None
        self._goes_on = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the random generators; from here on signals wait for the end of a step.

        A training that begins drops what an attempt without a checkpoint left in metrics.csv.
        """
        if not self._goes_on:
            for file in _metrics(trainer):
                file.cut(0)
        if self._states is not None and len(self._states) == trainer.world_size:
            restore_random_state(self._states[trainer.global_rank])
        elif trainer.world_size > 1:
            seed_per_rank(trainer.global_rank)
        self._states, self.began = None, True
        if (
            timer := callback_of(trainer, Timer)
        ) is not None:  # would end the training as if it were finished
            cast(Any, trainer).callbacks.remove(timer)
            self._until_s = time.monotonic() + (timer.time_remaining() or 0)
        self._saved_s, self._saved_step = time.monotonic(), trainer.global_step
        self.interruption.listen()  # Lightning took SIGTERM, and SIGUSR1 on a cluster, a moment ago
        self.interruption.training = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any
    ) -> None:
        """Save if it is time to, and stop if a signal asked for it or --trainer.max_time is over."""
        if (
            trainer.fit_loop.epoch_loop.batch_progress.current.completed
            % trainer.accumulate_grad_batches
        ):
            return  # gradients of half a step can't be saved
        wanted, stop = self.decide(trainer)
        if (wanted or stop) and trainer.global_step != self._saved_step:
            with _between_batches(trainer):
                self.save(trainer)
        if stop:
            self.interruption.stop()

    def decide(self, trainer: L.Trainer) -> tuple[bool, bool]:
        """Whether to save and whether to stop, the same on every process."""
        since = trainer.global_step - self._saved_step
        due = self.config.every_steps is not None and since >= self.config.every_steps
        due = due or time.monotonic() - self._saved_s >= 60 * self.config.every_minutes
        late = time.monotonic() >= self._until_s and trainer.is_global_zero
        if late and trainer.global_step < trainer.estimated_stepping_batches:
            self.interruption.by = "--trainer.max_time"
        stop = self.interruption.requested is not None or self.interruption.by != ""
        on_any = trainer.strategy.reduce_boolean_decision
        return on_any(due, all=False), on_any(stop, all=False)

    def save(self, trainer: L.Trainer) -> None:
        """Write `last.ckpt`; every process must call it."""
        trainer.save_checkpoint(self.path)
        self._saved_s, self._saved_step = time.monotonic(), trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on signals act at once: everything is saved."""
        self.interruption.training = False
        if self.interruption.requested is not None:
            self.interruption.stop()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.interruption.training = False

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add random generators, the place in metrics.csv, what numbers depend on, and what `load_trained` needs."""
        data = cast(Any, trainer).datamodule
        known = {
            "class_names": list(data.class_names),
            "mean_std": [list(data.mean), list(data.std)],
            "fit": data.fit,
        }
        checkpoint[MARK] = {
            "random": gather_objects(random_state()),
            "metrics_rows": next((file.count() for file in _metrics(trainer)), None),
            "fingerprint": self.fingerprint,
            "data": known,
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Cut metrics.csv where the checkpoint was made, and follow a run folder that was moved."""
        for name, state in checkpoint.get("callbacks", {}).items():
            if name.startswith("ModelCheckpoint"):
                checkpoint["callbacks"][name] = _rewrite_checkpoint_paths(
                    state, self.path.parent.resolve()
                )
        if trainer.state.fn != "fit":
            return
        self._goes_on = True
        _leave_the_epoch_ended(trainer, checkpoint)
        _restore_loader_position(trainer, checkpoint)
        ours = checkpoint.get(MARK, {})
        self._states = ours.get("random")
        for file in _metrics(trainer):
            file.cut(ours.get("metrics_rows") or 0)


def _metrics(trainer: L.Trainer) -> list[MetricsFile]:
    """metrics.csv, which the first process writes."""
    return [
        each.experiment
        for each in trainer.loggers
        if isinstance(each, RunLogger) and trainer.is_global_zero
    ]


class EpochEnd(Checkpoint):
    """Lets a `ResumePoint` save after the epoch's other callbacks; Lightning calls Checkpoint callbacks last."""

    def __init__(self, point: ResumePoint) -> None:
        self.point = point

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.point.save(trainer)
        if self.point.decide(trainer)[1]:
            self.point.interruption.stop()


@contextmanager
def _between_batches(trainer: L.Trainer) -> Iterator[None]:
    """Show Lightning's loops as they were before the next batch was fetched.

    A batch that is counted as fetched and not as done would be left out. Where a validation was due after the step,
    Lightning expects a checkpoint from its end, at which the step isn't counted for the loggers yet.
    """
    loop = trainer.fit_loop.epoch_loop
    progress, last = loop.batch_progress, loop.batch_progress.is_last_batch
    progress.is_last_batch = False
    progress.total.ready -= 1
    progress.current.ready -= 1
    validated = int(loop._should_check_val_fx(cast(Any, trainer.fit_loop._data_fetcher)))
    loop._batches_that_stepped -= validated
    try:
        yield
    finally:
        loop._batches_that_stepped += validated
        progress.current.ready += 1
        progress.total.ready += 1
        progress.is_last_batch = last


def _leave_the_epoch_ended(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Go on behind an epoch that has ended also where --trainer.max_steps counts steps.

    There Lightning 2.6 (`_FitLoop.restarting`) takes every checkpoint for one from within an epoch: it would end that
    epoch a second time, and leave out the images of the next one. Counted by epochs it doesn't.
    """
    cast(Any, trainer).fit_loop._iteration_based_training = lambda: False
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    epochs["completed"] = epochs[
        "processed"
    ]  # Lightning does it, but not where no step is left to do


def _restore_loader_position(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """On another number of processes, let Lightning count those that hold the images of this epoch so far."""
    data = cast(Any, trainer).datamodule
    state = checkpoint.get(type(data).__qualname__)
    if state is None or not isinstance(data, ImageDataModule):
        return
    now = {"batch_size": data.batch_size, "world_size": trainer.world_size}
    if all(state[name] == value for name, value in now.items()):
        return
    window, images = (
        trainer.accumulate_grad_batches,
        state["batch"] * state["batch_size"] * state["world_size"],
    )
    batch = images // (data.batch_size * trainer.world_size) // window * window
    data.load_state_dict({**state, **now, "batch": batch})
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    progress["current"] = dict.fromkeys(progress["current"], batch)
    progress["is_last_batch"] = False


def _rewrite_checkpoint_paths(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """ModelCheckpoint's state with its paths below `folder`; it forgets the best score where they differ."""
    old = state.get("dirpath")
    if not old or Path(old) == folder:
        return state

    def here(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(old):
            return str(folder) + value[len(old) :]
        return (
            {here(key): each for key, each in value.items()} if isinstance(value, dict) else value
        )

    return {key: here(value) for key, value in state.items()}


@dataclass(frozen=True)
class RunStart:
    """Where a training begins: its folder, and the checkpoint (None: afresh) with its steps and its fingerprint."""

    run_dir: Path
    checkpoint: Path | None = None
    step: int = 0
    fingerprint: dict[str, Any] = field(default_factory=dict)


def recorded_config(run_dir: Path) -> Path:
    """The config that a run began with."""
    config = run_dir / "config.yaml"
    if not config.is_file():
        hint = f": give its folder, {run_dir.parent.parent}" if run_dir.suffix == ".ckpt" else ""
        raise UserError(f"{run_dir} is no run folder, it has no config.yaml{hint}.")
    return config


def find_run_start(run_dir: Path, *, fresh_if_none: bool) -> RunStart:
    """The newest valid checkpoint of a run folder that this process has claimed; says which can't be used, and why."""
    for folder in (
        run_dir,
        run_dir / "checkpoints",
        run_dir / "model",
    ):  # where training writes; twin/ has its turn
        remove_leftovers(folder)
    found, refused = newest_valid(run_dir / "checkpoints")
    for other in refused:
        print_rank0(f"warning: {other.path} {other.fault}.")
    if found is None:
        if fresh_if_none:
            print_rank0(f"{run_dir} has no checkpoint to go on from: starting afresh.")
            for left in (each for pattern in _LEFT for each in run_dir.glob(pattern)):
                left.unlink()
            return RunStart(run_dir)
        why = (
            "; ".join(f"{other.path.name} {other.fault}" for other in refused)
            or "no step was saved yet"
        )
        raise UserError(
            f"Nothing in {run_dir} can be resumed ({why}): start anew, or with {OPTION} {AUTO}."
        )
    saved = load_archive(found.path, mmap=True).get(MARK, {})
    print_rank0(f"Going on with {run_dir} from {found.path.name}, step {found.step:,} (verified).")
    return RunStart(run_dir, found.path, found.step, saved.get("fingerprint", {}))


def is_finished(run_dir: Path, *, with_twin: bool) -> bool:
    """Whether everything that the run should leave is there."""
    summary = _json(run_dir / "summary.json")
    return summary is not None and not (with_twin and summary.get("twin") is None)


def changed_options(recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Phrases for the options that differ from the recorded ones and may."""
    before, now = complete(recorded), complete(asked)
    changed = []
    for name in sorted(before.keys() | now.keys()):
        old, new = (
            "null" if each.get(name) is None else str(each.get(name)) for each in (before, now)
        )
        same = old == new or (name == "data.path" and Path(old).resolve() == Path(new).resolve())
        drawn = (
            name == "seed_everything" and new == "True" and old != "False"
        )  # what was drawn for it is recorded
        if name.split(".")[0] in _SILENT or same or drawn:
            continue
        if not is_free(name):
            raise UserError(
                f"--{name} is {old} in this run and can't become {new} when it goes on: leave it out, or start a new "
                "run from its weights with --pretrained runs/NAME/model."
            )
        rounding = ", which may round differently" if name.startswith(_FLOATING) else ""
        changed.append(f"--{name} was {old}, now {new}{rounding}")
    return changed


def is_free(option: str) -> bool:
    """Whether an option leaves the training what it is, up to rounding and what the guard prevents."""
    return f"{option}.".startswith(tuple(f"{free}." for free in (*_SILENT, *_FREE)))


def resume_command(run_dir: Path) -> str:
    """The command that resumes a run."""
    return f"moevision fit {OPTION} {shell_word(str(run_dir))}"


def note_session(start: RunStart, command: Sequence[str], notes: Sequence[str]) -> None:
    """Add this start to the run folder's list of them."""
    file = start.run_dir / SESSIONS
    origin = (
        None
        if start.checkpoint is None
        else {"checkpoint": start.checkpoint.name, "step": start.step}
    )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    session = {"started_utc": now, "command": list(command), "from": origin, "notes": [*notes]}
    write_json_atomic(file, [*(_json(file) or []), session])


def first_command(run_dir: Path) -> list[str] | None:
    """The command line that a run began with, whatever it was gone on with; None if that isn't known."""
    sessions = _json(run_dir / SESSIONS) or []
    return next((each["command"] for each in reversed(sessions) if each["from"] is None), None)


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
    given, rest = iter(arguments), []
    for argument in given:
        if argument == OPTION:
            next(given, None)
        elif not argument.startswith(f"{OPTION}="):
            rest.append(argument)
    return rest


def begin(session: Session, given: ParsedArgs) -> tuple[dict[str, Any], RunStart | None]:
    """Find out what a `fit` is asked for, and where its training begins.

    The options by their dotted names, and the start; None for a run with a folder of its own. A run that is finished
    ends the command here.
    """
    options = dict(given.options)
    target = options.pop("resume", None)
    given = given._replace(options=options)
    say = print_rank0 if given.prints else session.lines.append
    if target is None:
        return resolve_settings("fit", given, decide=broadcast_from_rank0, say=say), None
    automatic = target == AUTO
    run_dir = run_folder_of(given) if automatic else Path(target)

    def as_recorded() -> dict[str, Any]:
        return {
            **read_config(recorded_config(run_dir)),
            **resolve_settings("fit", given, recorded=True),
        }

    # What goes on has chosen its start, and nothing is chosen again for it.
    goes_on = not automatic or newest_valid(run_dir / "checkpoints")[0] is not None
    asked = (
        as_recorded()
        if goes_on
        else resolve_settings("fit", given, decide=broadcast_from_rank0, say=say)
    )

    def compare() -> list[str]:
        nonlocal asked
        recorded, asked = read_config(recorded_config(run_dir)), as_recorded()
        changed = changed_options(recorded, asked)
        asked["seed_everything"] = recorded.get(
            "seed_everything", 0
        )  # for `true` the one that was drawn
        return changed

    def find() -> RunStart:
        if automatic:
            refuse_among_images(run_dir, asked["data.path"])
        known = (run_dir / "config.yaml").is_file()
        if known and is_finished(run_dir, with_twin=bool(asked.get("with_twin"))):
            compare()  # nothing that asks for another training passes for done
            print_rank0(f"{run_dir} is finished, see {run_dir}/summary.md: nothing to do.")
            raise SystemExit(0)
        return find_run_start(session.claim(run_dir), fresh_if_none=automatic)

    start: RunStart = broadcast_from_rank0(find)
    if start.checkpoint is not None:
        session.notes = compare()
        for note in session.notes:
            print_rank0(f"changed: {note}")
    return asked, start


def devices_asked(given: ParsedArgs) -> dict[str, Any]:
    """What a `fit` says of accelerator, devices and machines, or else the run that it goes on with; by dotted names."""
    target, files = given.options.get("resume"), [find_config(name) for name in given.configs]
    if target is not None:
        config = (run_folder_of(given) if target == AUTO else Path(target)) / "config.yaml"
        files[:0] = [config] if config.is_file() else []
    asked = [*map(read_config, files), given.options]
    return {
        name: value for each in asked for name, value in each.items() if name.startswith("trainer.")
    }


def run_folder_of(given: ParsedArgs) -> Path:
    """The folder of a fit, before anything is added because an earlier run has it."""
    options = resolve_settings("fit", given, recorded=True)
    name = options.get("name") or run_name(options.get("data.path", "synthetic_pets"))
    return Path(options.get("runs_root", "runs")) / name


# ---- the model that a training has so far


def load_trained(address: str) -> SavedModel:
    """Load a model as `load_model` does, or the weights of a checkpoint of a run (with a moving average: those)."""
    path = Path(address)
    if path.suffix != ".ckpt":
        return load_model(address)
    check_checkpoint(address)
    checkpoint = SafeCheckpointIO().load_checkpoint(path)
    with explain_load_errors(address), from_cache_only():
        known, options = checkpoint[MARK]["data"], dict(checkpoint["hyper_parameters"])
        sizes = options.pop("num_classes"), options.pop("image_size")
        task = ClassificationTask(**options)
        state = checkpoint["state_dict"].items()
        weights = {name.removeprefix("net."): x for name, x in state if name.startswith("net.")}
        kept = path.parent / PRETRAINED_CONFIG
        # Options that describe a larger model than the weights are get no memory for it.
        given = {
            name: value
            for name, value in asdict(task.arch).items()
            if name != "pretrained" and value is not None
        }
        check_arguments({**given, "num_classes": sizes[0], "img_size": sizes[1]})
        with torch.device("meta"):
            outline = build_model(
                task.arch, *sizes, load_pretrained=False, pretrained_config_dir=kept
            )
        if sum(x.numel() for x in outline.parameters()) > sum(x.numel() for x in weights.values()):
            raise ValueError("it describes more weights than it holds")
        task.build(*sizes, load_pretrained=False, kept=kept)
        task.net.load_state_dict(weights)
        check_numbers(task.net, address)
        names, (mean, std) = known["class_names"], known["mean_std"]
        mean, std = colours(mean, std, address)
        if len(names) != sizes[0] or not all(isinstance(name, str) for name in names):
            raise ValueError("its classes have no names")
        fit = known.get("fit", "crop")
        if fit not in get_args(Fit):
            raise ValueError("it doesn't say how images become square")
        return SavedModel(task.net.eval(), list(names), sizes[1], mean, std, fit=fit)
