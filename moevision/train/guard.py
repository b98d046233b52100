"""The stability guard: no update from numbers that aren't finite, and a way back when the state itself went bad.

- As GLaM (arXiv:2112.06905) skipped updates: a loss or gradient that isn't finite refuses the update of the whole
  accumulation window, on every process alike and before clipping (which would spread one NaN over all gradients). It
  leaves weights, optimizer, schedule, average and router biases, and restores buffers and random generators.
- As PaLM (arXiv:2204.02311, §5.1) restarted before a spike and left its data out: when weights or buffers aren't
  finite, or a loss spike lasts, training returns to the last good snapshot in memory while the data goes on; to an
  older one if that was in vain. After a budget it stops with a diagnosis and a finite checkpoint.

A loss is suspicious above `mean + max(sigmas · std, 25 % of the mean, 0.1)` of the last 128 good ones: OLMo-core's
window (SkipStepOptimizer), which neither numbers that aren't finite nor suspicious ones enter. The two floors keep a
flat curve, whose deviation is tiny, from false alarms.
"""

# ruff: noqa: D102 (Lightning's hooks, whose `task` is the `ClassificationTask`)

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor
from torch.utils._pytree import tree_map

from moevision.config import GuardConfig
from moevision.data.scores import ScoreSums
from moevision.errors import DIVERGED, UserError, escape_csv_cell
from moevision.files import csv_text, write_text_atomic
from moevision.layers.experts import local
from moevision.train.health import WeightEMA, is_logged
from moevision.train.processes import (
    callback_of,
    data_of,
    gather_objects,
    print_rank0,
    random_state,
    restore_random_state,
    sum_numbers,
)
from moevision.train.report import template
from moevision.train.scores import ExampleScores
from moevision.train.task import ClassificationTask

DIAGNOSIS, GUARD_CSV = "divergence.md", "guard.csv"
_RECENT = 100  # updates over which refused ones are counted
_BUDGET = 1000  # steps over which returns are counted
_WINDOW = 128  # good losses that a spike is judged by
_MIN_RISE, _MIN_RELATIVE_RISE = 0.1, 0.25  # nats, share
_COLUMNS = ("step", "epoch", "kind", "source", "samples")
_MAX_EVENTS = 1000  # in guard.csv
_MAX_SAMPLES = 256  # images of an event
_MAX_NAMED = 3  # sources in summary.md
_MAX_PRINTED = 10  # events on the terminal
_WARNINGS = {
    "skip": "warning: step {step}: update left out, since a number is not finite (first seen in: {source})",
    "rollback": "warning: step {step}: back to an earlier state of this training, because of: {source}",
}


class TrainingDiverged(UserError):  # noqa: N818 (the name that users are told)
    """The training diverged again and again; an exit code of its own keeps a job script from starting it again."""

    exit_code = DIVERGED


class StabilityGuard(L.Callback):
    """Watches the updates of a `ClassificationTask`; comes after `WeightEMA` and `ExampleScores` in the callbacks.

    `record` is what it found and did, `snapshots` are states to return to, the newest last.
    """

    def __init__(self, config: GuardConfig = GuardConfig()) -> None:  # noqa: B008 (never changed)
        self.config = config
        self.record = GuardRecord()
        self.snapshots: deque[TrainingSnapshot] = deque(maxlen=config.snapshots)
        self._losses = LossHistory(config.spike_sigmas, config.spike_updates, config.spike_warmup)
        self._applied = 0
        self._recent: deque[int] = deque(maxlen=_RECENT)  # 1 for a refused update
        self._returns: list[int] = []  # steps
        self._window_start: WindowStart | None = None
        self._indices: list[Tensor] = []  # images of the window
        self._loss: float | None = None  # of the window, if its numbers are finite
        self._bad_state: str | None = None

    # -- Lightning's hooks, in the order in which they come

    def setup(self, trainer: L.Trainer, task: Any, stage: str) -> None:
        if stage != "fit":
            return
        task.update_gate = lambda norm: self._refuses(trainer, task, norm)
        self.snapshots.clear()

    def on_train_start(self, trainer: L.Trainer, task: Any) -> None:
        if (source := find_nonfinite(trainer, task)) is not None:
            raise UserError(
                f"The training would begin with numbers that are not finite ({source})."
            )
        self._take_snapshot(trainer, task)

    def on_train_batch_start(
        self, trainer: L.Trainer, task: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._window_start = WindowStart(task.net)
            self._indices = []
        self._indices.append(batch["index"])

    def _refuses(self, trainer: L.Trainer, task: ClassificationTask, norm: Tensor) -> bool:
        """Decide about the update of this window, after its last backward pass and before clipping."""
        numbers = WindowNumbers.of(trainer, task, norm)
        self._recent.append(int(not numbers.are_finite))
        if numbers.are_finite:
            self._loss = numbers.mean_loss
            return False

        source = find_nonfinite_source(task)
        cast(WindowStart, self._window_start).restore(task)
        self.record.not_applied += 1
        self._bad_state = find_nonfinite(trainer, task)
        if self._bad_state is not None:
            return True  # `on_train_batch_end` returns to a snapshot

        scaler = getattr(trainer.precision_plugin, "scaler", None)
        seeks_scale = scaler is not None and scaler.get_scale() > 1
        if seeks_scale and numbers.losses_are_finite:
            self._recent[-1] = 0  # an overflow, by which fp16 looks for its loss scale: no fault
        else:
            note_event(self.record, trainer, "skip", source, torch.cat(self._indices).tolist())
        return True

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, *_: Any) -> None:
        cause = self._cause_to_return(trainer, task)
        self._loss, self._bad_state = None, None
        if cause is not None:
            self._roll_back(trainer, task, cause)
        if is_logged(trainer, trainer.global_step):
            task.log("guard/skipped", float(self.record.skipped))
            task.log("guard/rollbacks", float(self.record.rollbacks))

    def _cause_to_return(self, trainer: L.Trainer, task: ClassificationTask) -> str | None:
        """Why training must return to a snapshot; None: it needn't. Takes a snapshot where one is due."""
        if self._loss is not None and task.update_applied:
            self._applied += 1
            return self._judge_applied(trainer, task, self._loss)
        if self._bad_state is not None:
            return self._bad_state
        refused = sum(self._recent)
        if refused <= self.config.max_skips:
            return None
        source = self.record.sources.most_common(1)[0][0]
        return f"{refused} of the last {len(self._recent)} updates refused, mostly for: {source}"

    def _judge_applied(
        self, trainer: L.Trainer, task: ClassificationTask, loss: float
    ) -> str | None:
        limit = self._losses.threshold
        if self._losses.add(loss):
            mean = np.mean(self._losses.good)
            return f"loss spike: {loss:.3g} against a mean of {mean:.3g} (limit {limit:.3g})"
        if self._losses.suspicious or self._applied % self.config.snapshot_every:
            return None
        cause = find_nonfinite(trainer, task)
        if cause is None:
            self._take_snapshot(trainer, task)
        return cause

    def on_validation_start(self, trainer: L.Trainer, task: Any) -> None:
        self._check(trainer, task)

    def on_train_end(self, trainer: L.Trainer, task: Any) -> None:
        self._check(trainer, task)

    def on_save_checkpoint(self, trainer: L.Trainer, task: Any, checkpoint: dict[str, Any]) -> None:
        if not self._check(trainer, task):
            return
        # Training has returned to a snapshot; `state_dict` holds the live tensors.
        optimizers, schedules = trainer.optimizers, trainer.lr_scheduler_configs
        checkpoint["optimizer_states"] = [optimizer.state_dict() for optimizer in optimizers]
        checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in schedules]
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def teardown(self, trainer: L.Trainer, task: Any, stage: str) -> None:
        if stage == "fit":
            task.update_gate = None
            self.snapshots.clear()

    def state_dict(self) -> dict[str, Any]:
        # Primitives. Snapshots aren't saved: a resumed run takes a new one first.
        return {
            "record": self.record.state_dict(),
            "losses": self._losses.state_dict(),
            "applied": self._applied,
            "recent": list(self._recent),
            "returns": list(self._returns),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.record = GuardRecord.from_state(state_dict["record"])
        self._losses.load_state_dict(state_dict["losses"])
        self._applied = int(state_dict["applied"])
        self._recent = deque(state_dict["recent"], maxlen=_RECENT)
        self._returns = list(state_dict["returns"])

    # -- the way back

    def _check(self, trainer: L.Trainer, task: Any) -> bool:
        average = callback_of(trainer, WeightEMA)
        # A validation was interrupted: nothing was trained in it.
        is_swapped = average is not None and average.swapped
        # The other processes won't answer.
        is_alone = trainer.state.status is TrainerStatus.INTERRUPTED
        is_fit = trainer.state.fn is TrainerFn.FITTING
        if not is_fit or not self.snapshots or is_swapped or is_alone:
            return False
        cause = find_nonfinite(trainer, task)
        if cause is not None:
            self._roll_back(trainer, task, cause)
        return cause is not None

    def _take_snapshot(self, trainer: L.Trainer, task: ClassificationTask) -> None:
        extra = (self._applied, self._losses.state_dict())
        self.snapshots.append(TrainingSnapshot(trainer, task, extra))

    def _roll_back(self, trainer: L.Trainer, task: ClassificationTask, cause: str) -> None:
        """Return to the newest snapshot, or to an older one if that did not help; over the budget, give up."""
        if self.snapshots[-1].restored and len(self.snapshots) > 1:
            self.snapshots.pop()
        snapshot = self.snapshots[-1]
        snapshot.restore(trainer, task)

        applied, losses = snapshot.extra
        self.record.lost += self._applied - applied
        self._applied = applied
        self._losses.load_state_dict(losses)
        self._recent.clear()
        note_event(self.record, trainer, "rollback", cause)

        step = trainer.global_step
        self._returns = [earlier for earlier in self._returns if earlier > step - _BUDGET]
        self._returns.append(step)
        if len(self._returns) > self.config.max_rollbacks:
            self._give_up(trainer, cause)

    def _give_up(self, trainer: L.Trainer, cause: str) -> NoReturn:
        """Save the last good state, write the diagnosis, and end the training."""
        folder = Path(trainer.default_root_dir)
        checkpoint = folder / "checkpoints" / "diverged.ckpt"
        trainer.save_checkpoint(checkpoint)
        if trainer.is_global_zero:
            diagnosis = template("divergence.md.jinja").render(
                step=trainer.global_step, checkpoint=checkpoint, record=self.record
            )
            write_text_atomic(folder / DIAGNOSIS, diagnosis)
        raise TrainingDiverged(
            f"The training diverged ({cause}) and returning to an earlier state did not help: read "
            f"{folder / DIAGNOSIS}, which says what to try; {checkpoint} holds the last good state."
        )


class WindowNumbers(NamedTuple):
    """The losses and the gradient norm of one accumulation window, over all processes."""

    losses_are_finite: bool
    are_finite: bool
    mean_loss: float

    @classmethod
    def of(cls, trainer: L.Trainer, task: ClassificationTask, norm: Tensor) -> WindowNumbers:
        """Read them, in one exchange; every process must call it."""
        losses = [micro_batch["loss"].float() for micro_batch in task.evidence]
        loss = torch.stack(losses).to(norm.device)
        values = torch.cat([norm.detach().float().reshape(1), loss]).tolist()

        losses_are_finite = all(map(isfinite, values[1:]))
        are_finite = losses_are_finite and isfinite(values[0])
        mean_loss = sum(values[1:]) / len(losses) if losses_are_finite else 0.0
        bad_losses, bad, total = sum_numbers(
            [not losses_are_finite, not are_finite, mean_loss], task.device
        )
        return cls(
            losses_are_finite=not bad_losses,
            are_finite=not bad,
            mean_loss=total / trainer.world_size,
        )


class WindowStart:
    """Random generators and buffers before an accumulation window, which a refused update restores."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.random = random_state()
        self.buffers = [buffer.clone() for buffer in net.buffers()]

    @torch.no_grad()
    def restore(self, task: ClassificationTask) -> None:
        """Undo what the forward passes of the window did."""
        restore_random_state(self.random)
        for buffer, saved in zip(task.net.buffers(), self.buffers, strict=True):
            buffer.copy_(saved)
        task.balance.start_window()


class LossHistory:
    """Finds loss spikes, by the numbers of `GuardConfig`; with 0 `sigmas` no loss is suspicious."""

    def __init__(self, sigmas: float, patience: int, warmup: int) -> None:
        self.sigmas, self.patience, self.warmup = sigmas, patience, warmup
        self.suspicious = 0  # in a row up to now
        self.good: deque[float] = deque(maxlen=_WINDOW)

    @property
    def threshold(self) -> float:
        """Losses above it are suspicious; infinite during the warm-up."""
        if not self.sigmas or len(self.good) < self.warmup:
            return float("inf")
        mean, deviation = float(np.mean(self.good)), float(np.std(self.good))
        return mean + max(self.sigmas * deviation, _MIN_RELATIVE_RISE * mean, _MIN_RISE)

    def add(self, loss: float) -> bool:
        """Take the finite loss of an applied update; whether it makes a lasting spike."""
        if loss > self.threshold:
            self.suspicious += 1
        else:
            self.suspicious = 0
            self.good.append(loss)
        return self.suspicious >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"good": list(self.good), "suspicious": self.suspicious}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.good = deque(state["good"], maxlen=_WINDOW)
        self.suspicious = int(state["suspicious"])


class TrainingSnapshot:
    """Everything that an applied update moves, copied into main memory: a state to return to.

    `state_dict()` hands out the live tensors, and `Optimizer.load_state_dict` makes the optimizer use the ones it is
    given (torch 2.13), so everything is copied on the way in and on the way out. `extra` is kept as it is.
    """

    def __init__(self, trainer: L.Trainer, task: ClassificationTask, extra: Any = None) -> None:
        self.restored = 0  # how often
        self.extra = extra
        self._tensors = _copy_to_cpu(_trained_tensors(trainer, task))
        self._states = [_copy_to_cpu(part.state_dict()) for part in _stateful_parts(trainer)]
        self._random = random_state()
        average = callback_of(trainer, WeightEMA)
        self._ema_updates = 0 if average is None else average.updates
        scores = _score_sums(trainer)
        self._score_rows = None if scores is None else scores.rows.copy()

    @torch.no_grad()
    def restore(self, trainer: L.Trainer, task: ClassificationTask) -> None:
        """Restore the training and drop its gradients; may be called repeatedly."""
        for tensor, saved in zip(_trained_tensors(trainer, task), self._tensors, strict=True):
            tensor.copy_(saved)
        for part, state in zip(_stateful_parts(trainer), self._states, strict=True):
            part.load_state_dict(_copy_to_cpu(state))
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        restore_random_state(self._random)
        average = callback_of(trainer, WeightEMA)
        if average is not None:
            average.updates = self._ema_updates
        scores = _score_sums(trainer)
        if scores is not None:
            scores.rows[:] = self._score_rows
        self.restored += 1


def _stateful_parts(trainer: L.Trainer) -> list[Any]:
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    return [*trainer.optimizers, *schedules, trainer.precision_plugin]


def _networks(trainer: L.Trainer, task: ClassificationTask) -> dict[str, torch.nn.Module]:
    """The network in training, and its moving average if there is one, by the prefix of their tensors' names."""
    networks = {"": task.net}
    average = callback_of(trainer, WeightEMA)
    if average is not None and average.network is not None:
        networks["ema."] = average.network
    return networks


def _trained_tensors(trainer: L.Trainer, task: ClassificationTask) -> list[Tensor]:
    """This process's parts of all weights and buffers."""
    tensors: list[Tensor] = []
    for net in _networks(trainer, task).values():
        tensors += [*net.parameters(), *net.buffers()]
    return [local(tensor.detach()) for tensor in tensors]


def _score_sums(trainer: L.Trainer) -> ScoreSums | None:
    callback = callback_of(trainer, ExampleScores)
    return None if callback is None else callback.sums


def _copy_to_cpu(state: Any) -> Any:
    """A copy of a nest of dictionaries, lists and tensors that shares nothing with it; tensors in main memory."""

    def copy(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().to("cpu", copy=True)
        return deepcopy(leaf)

    return tree_map(copy, state)


class Event(NamedTuple):
    """One thing that the guard did at a step, counted from 1: `kind` is skip or rollback."""

    step: int
    epoch: int
    kind: str
    source: str
    samples: tuple[str, ...] = ()


@dataclass
class GuardRecord:
    """Counters and events of one training; they survive a resume and are never turned back by a rollback."""

    skipped: int = 0
    rollbacks: int = 0
    not_applied: int = 0  # optimizer steps without an update, for whichever reason
    lost: int = 0  # updates that rollbacks took back
    events: list[Event] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)

    def add(self, event: Event) -> None:
        self.skipped += event.kind == "skip"
        self.rollbacks += event.kind == "rollback"
        self.sources[event.source] += 1
        if len(self.events) < _MAX_EVENTS:
            self.events.append(event)

    def sentences(self) -> list[str]:
        """The sentences for summary.md; none if nothing happened."""
        sentences = []
        if self.skipped:
            updates = _count_of(self.skipped, "update")
            sentences.append(f"{updates} left out because a number was not finite.")
        if self.rollbacks:
            returns = _count_of(self.rollbacks, "return")
            sentences.append(
                f"{returns} to an earlier state of this training, which took back {self.lost:,} updates."
            )
        if sentences:
            most_common = self.sources.most_common(_MAX_NAMED)
            sources = ", ".join(f"{source} ({count})" for source, count in most_common)
            sentences.append(
                f"Where it came from: {sources}. {GUARD_CSV} has every case with its images."
            )
        return sentences

    def write(self, folder: Path) -> None:
        """Write guard.csv whole: a resumed run writes it again from what the checkpoint remembers."""
        rows = [
            (e.step, e.epoch, e.kind, e.source, escape_csv_cell(" ".join(e.samples)))
            for e in self.events
        ]
        write_text_atomic(folder / GUARD_CSV, csv_text(_COLUMNS, rows))

    def state_dict(self) -> dict[str, Any]:
        """Primitives only, so that a checkpoint loads under `weights_only=True`."""
        return {
            **vars(self),
            "events": [list(event) for event in self.events],
            "sources": dict(self.sources),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> GuardRecord:
        """Read what `state_dict` returned; earlier versions had more fields."""
        values = {item.name: state[item.name] for item in fields(cls)}
        values["sources"] = Counter(state["sources"])
        values["events"] = [
            Event(step, epoch, kind, source, tuple(samples))
            for step, epoch, kind, source, samples in state["events"]
        ]
        return cls(**values)


def _count_of(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' if count != 1 else ''}"


def note_event(
    record: GuardRecord,
    trainer: L.Trainer,
    kind: str,
    source: str | None,
    indices: Sequence[int] = (),
) -> None:
    """Count an event on every process, with the training images of all their windows; write guard.csv, tell the user.

    `source` is where it came from, as far as this process knows.
    """
    data = data_of(trainer)
    names = list(map(str, indices))
    if hasattr(data, "sample_id"):
        names = [data.sample_id("train", index) for index in indices]
    sources, samples = zip(*gather_objects((source, names)), strict=True)  # of all processes
    source = _first_source(sources)

    is_skip = kind == "skip"
    step = trainer.global_step + is_skip  # from 1; Lightning hasn't counted a refused step yet
    named = tuple(chain.from_iterable(samples))[:_MAX_SAMPLES]
    record.add(Event(step, trainer.current_epoch, kind, source, named))
    if trainer.is_global_zero:
        record.write(Path(trainer.default_root_dir))
        if record.sources.total() <= _MAX_PRINTED:
            print_rank0(_WARNINGS[kind].format(step=step, source=source))


def _first_source(sources: Iterable[str | None]) -> str:
    """The process with the fault itself knows the loss that was bad; the others see at most its gradients."""
    named = [source for source in sources if source]
    if not named:
        return "gradient norm (too large for its number format)"
    return min(named, key=lambda source: source.startswith("gradient"))


# -- where a number isn't finite


def find_nonfinite_source(task: ClassificationTask) -> str | None:
    """Where it was first seen in this window, in the order of computation.

    None if only the norm was too large for its format.
    """
    for micro_batch in task.evidence:
        for name, value in micro_batch.items():
            if not value.isfinite().all():
                return name
    gradients = [(name, p.grad) for name, p in task.net.named_parameters() if p.grad is not None]
    return _describe("gradient", _nonfinite(gradients))


def find_nonfinite(trainer: L.Trainer, task: ClassificationTask) -> str | None:
    """Name the weights, saved buffers or averages that aren't finite on any process; None if all are."""
    buffers = dict(task.net.named_buffers())
    bad: list[tuple[str, Tensor]] = []
    kind = ""  # of the first
    for prefix, net in _networks(trainer, task).items():
        bad_here = _nonfinite(net.state_dict().items())
        if bad_here and not bad:
            kind = prefix + ("buffer" if bad_here[0][0] in buffers else "weight")
        bad += bad_here
    if sum_numbers([bool(bad)], task.device) == [0]:
        return None
    descriptions: list[str | None] = gather_objects(_describe(kind, bad))
    return next(filter(None, descriptions))


def _nonfinite(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """The tensors with a number that isn't finite in this process's part."""
    return [(name, x) for name, x in named if not local(x.detach()).isfinite().all()]


def _describe(kind: str, bad: Sequence[tuple[str, Tensor]]) -> str | None:
    """For example `gradient of blocks.1.mlp.experts.fc1.weight (expert 3) and 2 more`; None for no tensors."""
    if not bad:
        return None
    name, tensor = bad[0]
    text = f"{kind} of {name}"
    if ".experts." in name:
        is_bad = ~local(tensor.detach()).isfinite()  # [E, ...] of this process
        expert = int(is_bad.flatten(1).any(1).nonzero()[0])
        if hasattr(tensor, "device_mesh"):
            from moevision.train.parallel.parts import first_index

            expert += first_index(tensor)[0]
        text += f" (expert {expert})"
    if len(bad) > 1:
        text += f" and {len(bad) - 1} more"
    return text
