"""The stability guard skips updates from non-finite numbers, and rolls training back when its state went bad.

- Skip, as GLaM (arXiv:2112.06905): if a loss or gradient isn't finite, the update of the whole accumulation window is
  refused, on all processes and before clipping (which would spread one NaN over all gradients). Weights, optimizer,
  schedule, weight average and router biases stay as they are; buffers and random generators are restored to the
  window's start.
- Rollback, as PaLM (arXiv:2204.02311, §5.1): if weights or buffers aren't finite, if too many updates are refused, or
  if a loss spike lasts, training returns to the last snapshot in memory, and goes on with the data that comes next. If
  that snapshot was restored before, it returns to an older one. After too many rollbacks training stops with a
  diagnosis and a finite checkpoint.

A loss is suspicious above `mean + max(sigmas · std, 25 % of the mean, 0.1)` over the last 128 good losses, those that
are finite and not suspicious themselves (as OLMo-core's SkipStepOptimizer). The two minimum rises prevent false alarms
on a flat curve, whose deviation is tiny.

"Window" alone means an accumulation window: the micro-batches of one optimizer step.
"""

# ruff: noqa: D102 (the methods are Lightning's hooks; `task` is the `ClassificationTask`)

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import numpy as np
import torch
from lightning import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor
from torch.utils._pytree import tree_map_only

from moevision.config import GuardConfig
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
from moevision.types import State

DIAGNOSIS, GUARD_CSV = "divergence.md", "guard.csv"
_SKIP_PERIOD = 100  # updates over which `max_skips` counts refused ones
_ROLLBACK_PERIOD = 1000  # steps over which `max_rollbacks` counts
_NUM_GOOD_LOSSES = 128  # good losses whose mean and deviation give the threshold
_MIN_RISE, _MIN_RELATIVE_RISE = 0.1, 0.25  # above the mean: in nats, and as a fraction of it
_COLUMNS = ("step", "epoch", "kind", "source", "samples")
_MAX_EVENTS = 1000  # in guard.csv
_MAX_SAMPLES = 256  # images listed per event
_MAX_SOURCES = 3  # listed in summary.md
_MAX_PRINTED = 10  # events printed on the terminal
_WARNINGS = {
    "skip": "warning: step {step}: update left out, since a number is not finite (first seen in: {source})",
    "rollback": "warning: step {step}: back to an earlier state of this training, because of: {source}",
}


class TrainingDiverged(UserError):  # noqa: N818 (the name that users are told)
    """The training diverged again and again; its exit code tells job scripts not to start it again."""

    exit_code = DIVERGED


class StabilityGuard(Callback):
    """Watches the updates of a `ClassificationTask`.

    It must follow `WeightEMA` and `ExampleScores` in the callbacks, so that a snapshot has their newest state.

    `record` counts skips and rollbacks; `snapshots` are the states to return to, the newest last.
    """

    def __init__(self, config: GuardConfig = GuardConfig()) -> None:  # noqa: B008 (never changed)
        self.config = config
        self.record = GuardRecord()
        self.snapshots: deque[TrainingSnapshot] = deque(maxlen=config.snapshots)
        self._losses = LossHistory(config.spike_sigmas, config.spike_updates, config.spike_warmup)
        self._num_applied = 0  # updates, minus those that rollbacks undid
        # One entry per recent update: 1 if it was refused, else 0.
        self._refusals: deque[int] = deque(maxlen=_SKIP_PERIOD)
        self._rollback_steps: list[int] = []  # steps of recent rollbacks

        # Of the current window:
        self._window_start: WindowStart | None = None
        self._indices: list[Tensor] = []  # dataset indices of its images, per micro-batch
        # mean loss, if its update is to be applied; None within the window, and if a number isn't finite
        self._loss: float | None = None
        self._bad_state: str | None = None  # name of a non-finite weight or buffer

    # -- Lightning's hooks, in the order of their calls

    def setup(self, trainer: Trainer, task: Any, stage: str) -> None:
        if stage != "fit":
            return
        task.update_gate = lambda norm: self._refuse_update(trainer, task, norm)
        self.snapshots.clear()

    def on_train_start(self, trainer: Trainer, task: Any) -> None:
        if (source := find_nonfinite(trainer, task)) is not None:
            raise UserError(
                f"The training would begin with numbers that are not finite ({source})."
            )
        self._take_snapshot(trainer, task)

    def on_train_batch_start(self, trainer: Trainer, task: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._window_start = WindowStart(task.net)
            self._indices = []
        self._indices.append(batch["index"])

    def _refuse_update(self, trainer: Trainer, task: ClassificationTask, norm: Tensor) -> bool:
        """Whether to refuse the update of this window; called after its last backward pass and before clipping.

        `norm` is the norm of all gradients. If the update is refused, the window's start is restored.
        """
        window = WindowNumbers.of(trainer, task, norm)
        self._refusals.append(int(not window.are_finite))
        if window.are_finite:
            self._loss = window.mean_loss
            return False

        source = find_nonfinite_source(task)
        cast(WindowStart, self._window_start).restore(task)
        self.record.not_applied += 1
        self._bad_state = find_nonfinite(trainer, task)
        if self._bad_state is not None:
            return True  # `on_train_batch_end` will roll back

        # In fp16 infinite gradients are normal while the gradient scaler still lowers its scale: not counted as a skip.
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        can_lower_scale = scaler is not None and scaler.get_scale() > 1
        if can_lower_scale and window.losses_are_finite:
            self._refusals[-1] = 0  # no refusal after all
        else:
            note_event(self.record, trainer, "skip", source, torch.cat(self._indices).tolist())
        return True

    def on_train_batch_end(self, trainer: Trainer, task: Any, *_: Any) -> None:
        cause = self._find_rollback_cause(trainer, task)
        self._loss, self._bad_state = None, None
        if cause is not None:
            self._roll_back(trainer, task, cause)

        if is_logged(trainer, trainer.global_step):
            task.log("guard/skipped", float(self.record.skipped))
            task.log("guard/rollbacks", float(self.record.rollbacks))

    def _find_rollback_cause(self, trainer: Trainer, task: ClassificationTask) -> str | None:
        """Why training must roll back after this batch; None if it needn't. May take a snapshot."""
        if self._loss is not None and task.update_applied:
            self._num_applied += 1
            return self._judge_applied_update(trainer, task, self._loss)
        if self._bad_state is not None:
            return self._bad_state

        num_refused = sum(self._refusals)  # the same within an accumulation window
        if num_refused <= self.config.max_skips:
            return None
        source = self.record.sources.most_common(1)[0][0]
        return f"{num_refused} of the last {len(self._refusals)} updates refused, most often so far for: {source}"

    def _judge_applied_update(
        self, trainer: Trainer, task: ClassificationTask, loss: float
    ) -> str | None:
        """The cause of a rollback, a loss spike or a state that isn't finite; None if there is none.

        The state is searched, which takes time, only where a snapshot is due, and then the snapshot is taken.
        """
        limit = self._losses.threshold  # before this loss counts
        if self._losses.add(loss):
            mean = np.mean(self._losses.good)
            return f"loss spike: {loss:.3g} against a mean of {mean:.3g} (limit {limit:.3g})"

        if self._losses.suspicious or self._num_applied % self.config.snapshot_every:
            return None  # no snapshot is due
        cause = find_nonfinite(trainer, task)
        if cause is None:
            self._take_snapshot(trainer, task)
        return cause

    def on_validation_start(self, trainer: Trainer, task: Any) -> None:
        self._roll_back_if_bad(trainer, task)

    def on_train_end(self, trainer: Trainer, task: Any) -> None:
        self._roll_back_if_bad(trainer, task)

    def on_save_checkpoint(self, trainer: Trainer, task: Any, checkpoint: State) -> None:
        if not self._roll_back_if_bad(trainer, task):
            return
        # The checkpoint was filled before the rollback. Its weights are the live tensors, which are restored by now;
        # states of optimizers, schedules and this guard are copies, to be made again.
        optimizers, schedules = trainer.optimizers, trainer.lr_scheduler_configs
        checkpoint["optimizer_states"] = [optimizer.state_dict() for optimizer in optimizers]
        checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in schedules]
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def teardown(self, trainer: Trainer, task: Any, stage: str) -> None:
        if stage == "fit":
            task.update_gate = None
            self.snapshots.clear()

    def state_dict(self) -> State:
        # Python primitives only. Snapshots aren't saved: a resumed run begins by taking one.
        return {
            "record": self.record.state_dict(),
            "losses": self._losses.state_dict(),
            "applied": self._num_applied,
            "recent": list(self._refusals),
            "returns": list(self._rollback_steps),
        }

    def load_state_dict(self, state_dict: State) -> None:
        self.record = GuardRecord.from_state(state_dict["record"])
        self._losses.load_state_dict(state_dict["losses"])
        self._num_applied = int(state_dict["applied"])
        self._refusals = deque(state_dict["recent"], maxlen=_SKIP_PERIOD)
        self._rollback_steps = list(state_dict["returns"])

    # -- rollback

    def _roll_back_if_bad(self, trainer: Trainer, task: Any) -> bool:
        """Roll back if a weight or buffer isn't finite, and return whether it did."""
        is_fit = trainer.state.fn is TrainerFn.FITTING
        # `WeightEMA` puts its average into the network for a validation; if that is interrupted, it is still there.
        average = callback_of(trainer, WeightEMA)
        is_swapped = average is not None and average.swapped
        # After an interruption the other processes don't take part in collective operations.
        is_interrupted = trainer.state.status is TrainerStatus.INTERRUPTED
        if not is_fit or not self.snapshots or is_swapped or is_interrupted:
            return False

        cause = find_nonfinite(trainer, task)
        if cause is not None:
            self._roll_back(trainer, task, cause)
        return cause is not None

    def _take_snapshot(self, trainer: Trainer, task: ClassificationTask) -> None:
        guard_state = (self._num_applied, self._losses.state_dict())
        self.snapshots.append(TrainingSnapshot(trainer, task, guard_state))

    def _roll_back(self, trainer: Trainer, task: ClassificationTask, cause: str) -> None:
        """Return to the newest snapshot, or to an older one if it was restored before; give up after too many times."""
        if self.snapshots[-1].num_restored and len(self.snapshots) > 1:
            self.snapshots.pop()
        snapshot = self.snapshots[-1]
        snapshot.restore(trainer, task)

        num_applied, loss_history = snapshot.guard_state
        self.record.lost += self._num_applied - num_applied
        self._num_applied = num_applied
        self._losses.load_state_dict(loss_history)
        self._refusals.clear()
        note_event(self.record, trainer, "rollback", cause)

        step = trainer.global_step
        recent = [earlier for earlier in self._rollback_steps if earlier > step - _ROLLBACK_PERIOD]
        self._rollback_steps = [*recent, step]
        if len(self._rollback_steps) > self.config.max_rollbacks:
            self._give_up(trainer, cause)

    def _give_up(self, trainer: Trainer, cause: str) -> NoReturn:
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
    are_finite: bool  # losses and gradient norm
    mean_loss: float  # meaningful if the losses are finite

    @classmethod
    def of(cls, trainer: Trainer, task: ClassificationTask, norm: Tensor) -> WindowNumbers:
        """Read them with one copy from the device and one all-reduce; every process must call it."""
        losses = torch.stack([micro_batch["loss"].float() for micro_batch in task.evidence])
        norm_and_losses = torch.cat([norm.detach().float().reshape(1), losses.to(norm.device)])
        norm_value, *loss_values = norm_and_losses.tolist()

        # On this process:
        losses_are_finite = all(map(isfinite, loss_values))
        are_finite = losses_are_finite and isfinite(norm_value)
        mean_loss = sum(loss_values) / len(loss_values) if losses_are_finite else 0.0  # then unused

        # Over all processes: how many have bad numbers, and the sum of the mean losses.
        num_bad_losses, num_bad, loss_sum = sum_numbers(
            [not losses_are_finite, not are_finite, mean_loss], task.device
        )
        return cls(
            losses_are_finite=not num_bad_losses,
            are_finite=not num_bad,
            mean_loss=loss_sum / trainer.world_size,
        )


class WindowStart:
    """Random generators and buffers at the start of an accumulation window, restored if its update is refused."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.random = random_state()
        self.buffers = [buffer.clone() for buffer in net.buffers()]

    @torch.no_grad()
    def restore(self, task: ClassificationTask) -> None:
        """Undo the side effects of the window's forward passes."""
        restore_random_state(self.random)
        for buffer, saved in zip(task.net.buffers(), self.buffers, strict=True):
            buffer.copy_(saved)
        task.balance.start_window()


class LossHistory:
    """Detects loss spikes; the arguments are the `spike_*` options of `GuardConfig`. With 0 `sigmas` there are none."""

    def __init__(self, sigmas: float, patience: int, warmup: int) -> None:
        self.sigmas, self.patience, self.warmup = sigmas, patience, warmup
        self.suspicious = 0  # how many of the latest losses in a row
        self.good: deque[float] = deque(maxlen=_NUM_GOOD_LOSSES)

    @property
    def threshold(self) -> float:
        """A loss above it is suspicious; infinite during the warm-up."""
        if not self.sigmas or len(self.good) < self.warmup:
            return float("inf")
        mean, deviation = float(np.mean(self.good)), float(np.std(self.good))
        return mean + max(self.sigmas * deviation, _MIN_RELATIVE_RISE * mean, _MIN_RISE)

    def add(self, loss: float) -> bool:
        """Add the finite loss of an applied update; whether `patience` suspicious losses in a row make it a spike."""
        if loss > self.threshold:
            self.suspicious += 1
        else:
            self.suspicious = 0
            self.good.append(loss)
        return self.suspicious >= self.patience

    def state_dict(self) -> State:
        return {"good": list(self.good), "suspicious": self.suspicious}

    def load_state_dict(self, state: State) -> None:
        self.good = deque(state["good"], maxlen=_NUM_GOOD_LOSSES)
        self.suspicious = int(state["suspicious"])


class TrainingSnapshot:
    """A copy in main memory of everything that an update changes: a state to return to.

    `state_dict()` returns the live tensors, and `Optimizer.load_state_dict` keeps those it is given (torch 2.13), so
    everything is copied both when it is saved and when it is restored. The guard itself restores `guard_state`: applied
    updates, history of losses.
    """

    def __init__(
        self,
        trainer: Trainer,
        task: ClassificationTask,
        guard_state: Any,
    ) -> None:
        self.num_restored = 0
        self.guard_state = guard_state
        self._tensors = _copy_to_cpu(_trained_tensors(trainer, task))
        self._states = [_copy_to_cpu(part.state_dict()) for part in _stateful_parts(trainer)]
        self._random = random_state()

    @torch.no_grad()
    def restore(self, trainer: Trainer, task: ClassificationTask) -> None:
        """Restore the training state and drop the gradients; may be called repeatedly."""
        tensors = _trained_tensors(trainer, task)
        for tensor, saved in zip(tensors, self._tensors, strict=True):
            tensor.copy_(saved)
        parts = _stateful_parts(trainer)
        for part, state in zip(parts, self._states, strict=True):
            part.load_state_dict(_copy_to_cpu(state))
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        restore_random_state(self._random)
        self.num_restored += 1


def _stateful_parts(trainer: Trainer) -> list[Any]:
    """What has `state_dict` and `load_state_dict`: optimizers, schedules, precision, weight average and scores."""
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    parts = [*trainer.optimizers, *schedules, trainer.precision_plugin]
    average = callback_of(trainer, WeightEMA)
    if average is not None:
        parts.append(average)
    scores = callback_of(trainer, ExampleScores)
    if scores is not None and scores.sums is not None:
        parts.append(scores.sums)
    return parts


def _networks(trainer: Trainer, task: ClassificationTask) -> dict[str, torch.nn.Module]:
    """The trained network, and its moving average if there is one; the keys are prefixes for names of tensors."""
    networks = {"": task.net}
    average = callback_of(trainer, WeightEMA)
    if average is not None and average.network is not None:
        networks["ema."] = average.network
    return networks


def _trained_tensors(trainer: Trainer, task: ClassificationTask) -> list[Tensor]:
    """All weights and buffers of the networks; of sharded ones the shard of this process."""
    tensors: list[Tensor] = []
    for net in _networks(trainer, task).values():
        tensors += [*net.parameters(), *net.buffers()]
    return [local(tensor.detach()) for tensor in tensors]


def _copy_to_cpu(state: Any) -> Any:
    """A copy of nested dictionaries and lists, with the tensors in main memory."""
    return tree_map_only(Tensor, lambda x: x.detach().to("cpu", copy=True), state)


class Event(NamedTuple):
    """One intervention of the guard."""

    step: int  # counted from 1
    epoch: int
    kind: str  # "skip" or "rollback"
    source: str  # where the bad number was first seen, or the cause of the rollback
    samples: tuple[str, ...] = ()  # ids of the window's images, of a skip


@dataclass
class GuardRecord:
    """Counters and events of one training; a resumed run continues them, and a rollback doesn't undo them."""

    skipped: int = 0
    rollbacks: int = 0
    not_applied: int = (
        0  # all refused updates: skips, fp16 overflows, and those that a rollback followed
    )
    lost: int = 0  # applied updates that rollbacks undid
    events: list[Event] = field(default_factory=list)  # the first `_MAX_EVENTS`
    sources: Counter[str] = field(default_factory=Counter)  # number of events by source

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
            most_common = self.sources.most_common(_MAX_SOURCES)
            sources = ", ".join(f"{source} ({count})" for source, count in most_common)
            sentences.append(
                f"Where it came from: {sources}. {GUARD_CSV} has every case with its images."
            )
        return sentences

    def write(self, folder: Path) -> None:
        """Write all of guard.csv; a resumed run rewrites it, events before the resume included."""
        rows = [
            (e.step, e.epoch, e.kind, e.source, escape_csv_cell(" ".join(e.samples)))
            for e in self.events
        ]
        write_text_atomic(folder / GUARD_CSV, csv_text(_COLUMNS, rows))

    def state_dict(self) -> State:
        """Python primitives only, so that a checkpoint loads under `weights_only=True`."""
        return {
            **vars(self),
            "events": [list(event) for event in self.events],
            "sources": dict(self.sources),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> GuardRecord:
        """Build a record from `state_dict`; other keys, from earlier versions, are ignored."""
        values = {attribute.name: state[attribute.name] for attribute in fields(cls)}
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
    trainer: Trainer,
    kind: str,
    source: str | None,
    indices: Sequence[int] = (),
) -> None:
    """Add an event to the record of every process, write guard.csv, and print a warning; every process must call it.

    `source` and the training images `indices` are those of this process; the event has those of all processes.
    """
    data = data_of(trainer)
    sample_ids = list(map(str, indices))
    if hasattr(data, "sample_id"):
        sample_ids = [data.sample_id("train", index) for index in indices]

    # One entry per process.
    sources, ids_by_process = zip(*gather_objects((source, sample_ids)), strict=True)
    source = _most_specific_source(sources)
    samples = tuple(chain.from_iterable(ids_by_process))[:_MAX_SAMPLES]

    # Steps count from 1: at a rollback Lightning has counted the step already, at a skip not yet.
    is_skip = kind == "skip"
    step = trainer.global_step + is_skip
    record.add(Event(step, trainer.current_epoch, kind, source, samples))

    if trainer.is_global_zero:
        record.write(Path(trainer.default_root_dir))
        if record.sources.total() <= _MAX_PRINTED:
            print_rank0(_WARNINGS[kind].format(step=step, source=source))


def _most_specific_source(sources: Iterable[str | None]) -> str:
    """Of the sources seen by the processes, the first that is no gradient; else the first.

    Only the process whose loss was bad has another source than a gradient: the all-reduce spreads bad gradients.
    """
    seen = [source for source in sources if source]
    if not seen:
        return "gradient norm (too large for its number format)"
    return min(seen, key=lambda source: source.startswith("gradient"))  # False sorts before True


# -- search for non-finite numbers


def find_nonfinite_source(task: ClassificationTask) -> str | None:
    """Name of the first non-finite value of this window, in the order of computation: activations, losses, gradients.

    None if all of them are finite, and only the norm of the gradients overflowed.
    """
    for micro_batch in task.evidence:
        for name, value in micro_batch.items():
            if not value.isfinite().all():
                return name
    gradients = [(name, p.grad) for name, p in task.net.named_parameters() if p.grad is not None]
    return _describe_tensors("gradient", _select_nonfinite(gradients))


def find_nonfinite(trainer: Trainer, task: ClassificationTask) -> str | None:
    """Describe the weights, saved buffers or averages that aren't finite on any process; None if all are finite.

    Every process must call it, and gets the same answer.
    """
    buffers = dict(task.net.named_buffers())
    description: str | None = None
    for prefix, net in _networks(trainer, task).items():
        nonfinite = _select_nonfinite(net.state_dict().items())
        if nonfinite and description is None:
            kind = "buffer" if nonfinite[0][0] in buffers else "weight"
            description = _describe_tensors(prefix + kind, nonfinite)

    if sum_numbers([description is not None], task.device) == [0]:
        return None
    return next(filter(None, gather_objects(description)), None)


def _select_nonfinite(named_tensors: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """The tensors with a non-finite number; of sharded ones only the shard of this process is looked at."""
    return [(name, x) for name, x in named_tensors if not local(x.detach()).isfinite().all()]


def _describe_tensors(kind: str, named_tensors: Sequence[tuple[str, Tensor]]) -> str | None:
    """For example `gradient of blocks.1.mlp.experts.fc1.weight (expert 3) and 2 more`; None for no tensors."""
    if not named_tensors:
        return None
    name, tensor = named_tensors[0]
    text = f"{kind} of {name}"
    if ".experts." in name:
        is_bad = ~local(tensor.detach()).isfinite()  # [E', ...] for the E' experts of this process
        bad_experts = is_bad.flatten(1).any(1).nonzero()
        expert = int(bad_experts[0])
        if hasattr(tensor, "device_mesh"):
            # Sharded: the index counts from the first expert of this process.
            from moevision.train.parallel.parts import first_index

            expert += first_index(tensor)[0]
        text += f" (expert {expert})"
    if len(named_tensors) > 1:
        text += f" and {len(named_tensors) - 1} more"
    return text
