"""`moevision fit --resume RUN|auto`: which checkpoint, with which options, and what can't be as it was.

RUN is a run folder; its own config.yaml says everything. `auto` is for job scripts that repeat one command: the folder
follows from the command's own --name, and where there is no valid checkpoint yet, training starts afresh.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from moevision.errors import UserError
from moevision.files import remove_leftovers, write_json_atomic
from moevision.train.checkpoint import MARK, newest_valid
from moevision.train.processes import tell

OPTION, AUTO = "--resume", "auto"
SESSIONS = "sessions.json"
# May differ in a run that goes on, and is listed then. What isn't here makes another training, and is refused.
_FREE = (
    *("data.num_workers", "data.cache_mb", "data.path", "data.root", "data.download", "data.max_bad_fraction"),
    *("trainer.enable_progress_bar", "trainer.log_every_n_steps", "trainer.logger", "trainer.callbacks"),
    *("trainer.profiler", "trainer.detect_anomaly", "trainer.max_time", "trainer.enable_model_summary"),
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.benchmark"),
    *("trainer.deterministic", "trainer.default_root_dir", "trainer.plugins", "trainer.use_distributed_sampler"),
    *("model.compile", "model.grad_checkpointing", "model.arch.backend"),
    *("with_twin", "checkpoint", "guard", "fault"),
)
_SILENT = ("config", "name", "runs_root", "resume", "ckpt_path", "print_config")  # don't touch the training
_FLOATING = ("model.compile", "model.grad_checkpointing", "model.arch.backend", "trainer.strategy")  # other rounding


@dataclass(frozen=True)
class Start:
    """Where a training begins.

    Attributes:
        run_dir: its folder.
        checkpoint: what it goes on from; None for a fresh start.
        step: optimizer steps that the checkpoint has done.
        sha256: hash of the checkpoint.
        fingerprint: what its numbers depended on (`fingerprint.py`).
    """

    run_dir: Path
    checkpoint: Path | None = None
    step: int = 0
    sha256: str = ""
    fingerprint: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """JSON primitives, for the other processes of the training."""
        checkpoint = None if self.checkpoint is None else str(self.checkpoint)
        return {**vars(self), "run_dir": str(self.run_dir), "checkpoint": checkpoint}

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Start:
        """What `plain` gave."""
        checkpoint = None if values["checkpoint"] is None else Path(values["checkpoint"])
        return cls(**{**values, "run_dir": Path(values["run_dir"]), "checkpoint": checkpoint})


def take_resume(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Separate `--resume X` (or `--resume=X`) from the other arguments.

    Raises:
        UserError: if nothing follows it.
    """
    rest, target = [], None
    given = iter(arguments)
    for argument in given:
        if argument == OPTION:
            target = next(given, "")
        elif argument.startswith(OPTION + "="):
            target = argument.partition("=")[2]
        else:
            rest.append(argument)
    if target is not None and (not target or target.startswith("-")):
        raise UserError("--resume needs a run folder, such as runs/pets, or auto.")
    return target, rest


def recorded_config(run_dir: Path) -> Path:
    """The config that a run began with.

    Raises:
        UserError: if this is no run folder.
    """
    config = run_dir / "config.yaml"
    if not config.is_file():
        hint = f": give its folder, {run_dir.parent.parent}" if run_dir.suffix == ".ckpt" else ""
        raise UserError(f"{run_dir} is no run folder, it has no config.yaml{hint}.")
    return config


def find_start(run_dir: Path, *, fresh_if_none: bool) -> Start:
    """The newest valid checkpoint of a run folder that this process has claimed; says which can't be used, and why.

    Raises:
        UserError: if there is none and `fresh_if_none` isn't set, or it holds something else than data.
    """
    for folder in (run_dir, run_dir / "checkpoints", run_dir / "model"):  # where training writes; twin/ has its turn
        remove_leftovers(folder)
    found, refused = newest_valid(run_dir / "checkpoints")
    for other in refused:
        tell(f"warning: {other.path} {other.fault}.")
    if found is None:
        if fresh_if_none:
            tell(f"{run_dir} has no checkpoint to go on from: starting afresh.")
            return Start(run_dir)
        why = "; ".join(f"{other.path.name} {other.fault}" for other in refused) or "no step was saved yet"
        raise UserError(f"Nothing in {run_dir} can be gone on from ({why}): start anew, or with {OPTION} {AUTO}.")
    saved = _read_mark(found.path)
    tell(f"Going on with {run_dir} from {found.path.name}, step {found.step:,} (verified).")
    return Start(run_dir, found.path, found.step, found.sha256, saved.get("fingerprint", {}))


def _read_mark(path: Path) -> dict[str, Any]:
    """What `ResumePoint` has added to a checkpoint; nothing in the file is run."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True).get(MARK, {}))
    except Exception as error:  # pickle, zip, type and OS errors alike; the cause stays attached
        raise UserError(
            f"{path} holds something else than the data of a training ({type(error).__name__}) and is not used, "
            "although manifest.json lists it: moevision has not written it. Remove it to go on from another one."
        ) from error


def is_finished(run_dir: Path, *, with_twin: bool) -> bool:
    """Whether everything that the run should leave is there."""
    try:
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return not with_twin or summary.get("twin") is not None


def changed_options(recorded: Namespace, asked: Namespace) -> list[str]:
    """Phrases for the options that differ from the recorded ones and may.

    Raises:
        UserError: for one that would make another training.
    """
    before, now = vars(recorded.as_flat()), vars(asked.as_flat())
    changed = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if name.split(".")[0] in _SILENT or _same(name, old, new):
            continue
        if not any(name == free or name.startswith(free + ".") for free in _FREE):
            raise UserError(
                f"--{name} is {_plain(old)} in this run and can't become {_plain(new)} when it goes on: leave it out, "
                "or start a new run from its weights with --pretrained runs/NAME/model."
            )
        rounding = ", which may round differently" if name in _FLOATING else ""
        changed.append(f"--{name} was {_plain(old)}, now {_plain(new)}{rounding}")
    return changed


def _same(name: str, old: Any, new: Any) -> bool:
    if name == "data.path" and isinstance(old, str) and isinstance(new, str):
        return Path(old).resolve() == Path(new).resolve()
    return str(old) == str(new)


def _plain(value: Any) -> str:
    return "null" if value is None else str(value)


def resume_command(run_dir: Path) -> str:
    """What goes on with a run, to be typed as it is."""
    return f"moevision fit {OPTION} {shlex.quote(str(run_dir))}"


def note_session(start: Start, command: Sequence[str], notes: Sequence[str]) -> None:
    """Add this start to the run folder's list of them."""
    file = start.run_dir / SESSIONS
    try:
        sessions = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        sessions = []
    origin = None
    if start.checkpoint is not None:
        origin = {"checkpoint": start.checkpoint.name, "sha256": start.sha256, "step": start.step}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_json_atomic(
        file, [*sessions, {"started_utc": now, "command": list(command), "from": origin, "notes": [*notes]}]
    )


def claim(run_dir: Path) -> int | None:
    """Keep other processes from training in the same folder; ends with this process, however it ends.

    The lock is one of this machine's kernel: a training of another machine, on a file system that both see, isn't seen.

    Returns:
        An open descriptor that holds the claim, for `release`; None where the system has no such locks.

    Raises:
        UserError: if another process has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"Another process is training in {run_dir}: wait for it, or end it first.") from None
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    _claims.add(descriptor)
    return descriptor


def release(descriptor: int) -> None:
    """Give up a claim."""
    _claims.remove(descriptor)
    os.close(descriptor)


_claims: set[int] = set()


def _give_up_in_a_fork() -> None:
    """The workers of the data loader outlive a killed training by seconds, and must not hold its claim meanwhile."""
    while _claims:
        os.close(_claims.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_give_up_in_a_fork)
