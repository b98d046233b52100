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

# ruff: noqa: D102 (Lightning's hooks)

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, cast

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
_MAX_EVENTS, _MAX_SAMPLES, _MAX_NAMED, _MAX_SAID = (
    1000,
    256,
    3,
    10,
)  # kept, of an event, in sentences, on the terminal
_SAID = {
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
        self._before: tuple[dict[str, Any], list[Tensor]] | None = (
            None  # randomness and buffers before the window
        )
        self._indices: list[Tensor] = []  # images of the window
        self._loss: float | None = None  # of the window, if it was decided and applied
        self._bad_state: str | None = None

    # -- Lightning's hooks, in the order in which they come

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        task = cast(ClassificationTask, pl_module)
        task.update_gate = lambda norm: self._refuses(trainer, task, norm)
        self.snapshots.clear()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        task = cast(ClassificationTask, pl_module)
        if (source := find_nonfinite(trainer, task)) is not None:
            raise UserError(
                f"The training would begin with numbers that are not finite ({source})."
            )
        self._keep(trainer, task)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            net = cast(ClassificationTask, pl_module).net
            self._before = (random_state(), [buffer.clone() for buffer in net.buffers()])
            self._indices = []
        self._indices.append(batch["index"])

    def _refuses(self, trainer: L.Trainer, task: ClassificationTask, norm: Tensor) -> bool:
        """Decide about the update of this window, after its last backward pass and before clipping."""
        losses = [
            micro_batch["loss"].to(norm.device, torch.float32) for micro_batch in task.evidence
        ]
        norm_value, *values = torch.stack([norm.detach().float(), *losses]).tolist()
        finite_loss = all(map(isfinite, values))
        loss = sum(values) / len(values) if finite_loss else 0.0
        finite = finite_loss and isfinite(norm_value)
        bad_losses, bad, total = sum_numbers([not finite_loss, not finite, loss], task.device)
        self._recent.append(int(bad > 0))
        if not bad:
            self._loss = total / trainer.world_size
            return False
        # Where it was first seen, in the order of computation; None if only the norm was too large for its format.
        seen = (
            name
            for part in task.evidence
            for name, value in part.items()
            if not bool(value.isfinite().all())
        )
        if (source := next(seen, None)) is None:
            grads = _nonfinite(
                (name, p.grad) for name, p in task.net.named_parameters() if p.grad is not None
            )
            source = _in_words("gradient", grads) if grads else None
        randomness, buffers = cast(tuple[dict[str, Any], list[Tensor]], self._before)
        restore_random_state(randomness)
        with torch.no_grad():
            for buffer, before in zip(task.net.buffers(), buffers, strict=True):
                buffer.copy_(before)
        task.aux_loss.start_window()
        task.window_counts = []
        self._bad_state = find_nonfinite(trainer, task)
        self.record.not_applied += 1
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if (
            self._bad_state is None
            and not bad_losses
            and scaler is not None
            and scaler.get_scale() > 1
        ):
            self._recent[-1] = 0  # an overflow, by which fp16 looks for its loss scale: no fault
        elif self._bad_state is None:
            note(self.record, trainer, "skip", source, torch.cat(self._indices).tolist())
        return True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        task = cast(ClassificationTask, pl_module)
        loss, self._loss = self._loss, None
        cause, self._bad_state = self._bad_state, None
        if loss is not None and task.update_applied:
            self._applied += 1
            threshold = self._losses.threshold
            if self._losses.add(loss):
                mean = np.mean(self._losses.good)
                cause = (
                    f"loss spike: {loss:.3g} against a mean of {mean:.3g} (limit {threshold:.3g})"
                )
            elif self._losses.suspicious == 0 and self._applied % self.config.snapshot_every == 0:
                cause = find_nonfinite(trainer, task)
                if cause is None:
                    self._keep(trainer, task)
        elif cause is None and sum(self._recent) > self.config.max_skips:
            often = self.record.sources.most_common(1)[0][0]
            cause = f"{sum(self._recent)} of the last {len(self._recent)} updates refused, mostly for: {often}"
        if cause is not None:
            self._roll_back(trainer, task, cause)
        if is_logged(trainer, trainer.global_step):
            counts = {
                "guard/skipped": self.record.skipped,
                "guard/rollbacks": self.record.rollbacks,
            }
            task.log_dict({name: float(count) for name, count in counts.items()})

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._check(trainer, pl_module):  # `state_dict` holds the live tensors
            checkpoint["optimizer_states"] = [
                optimizer.state_dict() for optimizer in trainer.optimizers
            ]
            checkpoint["lr_schedulers"] = [
                config.scheduler.state_dict() for config in trainer.lr_scheduler_configs
            ]
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            cast(ClassificationTask, pl_module).update_gate = None
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

    def _check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        task, average = cast(ClassificationTask, pl_module), callback_of(trainer, WeightEMA)
        swapped = (
            average is not None and average.swapped
        )  # a validation was interrupted: nothing was trained in it
        alone = (
            trainer.state.status is TrainerStatus.INTERRUPTED
        )  # the other processes won't answer
        if trainer.state.fn is not TrainerFn.FITTING or not self.snapshots or swapped or alone:
            return False
        cause = find_nonfinite(trainer, task)
        if cause is not None:
            self._roll_back(trainer, task, cause)
        return cause is not None

    def _keep(self, trainer: L.Trainer, task: ClassificationTask) -> None:
        self.snapshots.append(
            TrainingSnapshot(trainer, task, (self._applied, self._losses.state_dict()))
        )

    def _roll_back(self, trainer: L.Trainer, task: ClassificationTask, cause: str) -> None:
        """Return to the newest snapshot, or to an older one if that did not help; over the budget, give up."""
        if self.snapshots[-1].restored and len(self.snapshots) > 1:
            self.snapshots.pop()
        self.snapshots[-1].restore(trainer, task)
        applied, losses = self.snapshots[-1].extra
        self.record.lost += self._applied - applied
        self._applied = applied
        self._losses.load_state_dict(losses)
        self._recent.clear()
        self._returns = [step for step in self._returns if step > trainer.global_step - _BUDGET]
        self._returns.append(trainer.global_step)
        note(self.record, trainer, "rollback", cause)
        if len(self._returns) <= self.config.max_rollbacks:
            return
        folder = Path(trainer.default_root_dir)
        checkpoint = folder / "checkpoints" / "diverged.ckpt"
        trainer.save_checkpoint(checkpoint)
        if trainer.is_global_zero:
            names = {"step": trainer.global_step, "checkpoint": checkpoint, "record": self.record}
            write_text_atomic(folder / DIAGNOSIS, template("divergence.md.jinja").render(**names))
        raise TrainingDiverged(
            f"The training diverged ({cause}) and returning to an earlier state did not help: read "
            f"{folder / DIAGNOSIS}, which says what to try; {checkpoint} holds the last good state."
        )


class LossHistory:
    """Judges one loss after the other, by the numbers of `GuardConfig`; 0 `sigmas` find nothing suspicious."""

    def __init__(self, sigmas: float, patience: int, warmup: int) -> None:
        self.sigmas, self.patience, self.warmup = sigmas, patience, warmup
        self.suspicious = 0  # in a row up to now
        self.good: deque[float] = deque(maxlen=_WINDOW)

    @property
    def threshold(self) -> float:
        """Losses above it are suspicious; infinite during the warm-up."""
        if not self.sigmas or len(self.good) < self.warmup:
            return float("inf")
        mean = float(np.mean(self.good))
        return mean + max(
            self.sigmas * float(np.std(self.good)), _MIN_RELATIVE_RISE * mean, _MIN_RISE
        )

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
        self.restored, self.extra = 0, extra
        self._tensors = _copied(_own_tensors(trainer, task))
        self._states = [_copied(each.state_dict()) for each in _stateful(trainer)]
        average, scores = callback_of(trainer, WeightEMA), _scores_of(trainer)
        self._averaged = None if average is None else average.updates
        self._random = random_state()
        self._scores = None if scores is None else scores.rows.copy()

    @torch.no_grad()
    def restore(self, trainer: L.Trainer, task: ClassificationTask) -> None:
        """Restore the training and drop its gradients; may be called repeatedly."""
        for tensor, saved in zip(_own_tensors(trainer, task), self._tensors, strict=True):
            tensor.copy_(saved)
        for each, state in zip(_stateful(trainer), self._states, strict=True):
            each.load_state_dict(_copied(state))
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        average, scores = callback_of(trainer, WeightEMA), _scores_of(trainer)
        if average is not None and self._averaged is not None:
            average.updates = self._averaged
        restore_random_state(self._random)
        if scores is not None:
            scores.rows[:] = self._scores
        self.restored += 1


def _stateful(trainer: L.Trainer) -> list[Any]:
    schedules = (config.scheduler for config in trainer.lr_scheduler_configs)
    return [*trainer.optimizers, *schedules, trainer.precision_plugin]


def _networks(trainer: L.Trainer, task: ClassificationTask) -> dict[str, torch.nn.Module]:
    """The network in training, and its moving average if there is one, by what stands before their tensors' names."""
    average = callback_of(trainer, WeightEMA)
    return (
        {"": task.net}
        if average is None or average.network is None
        else {"": task.net, "ema.": average.network}
    )


def _own_tensors(trainer: L.Trainer, task: ClassificationTask) -> list[Tensor]:
    networks = _networks(trainer, task).values()
    return [
        local(tensor.detach()) for net in networks for tensor in (*net.parameters(), *net.buffers())
    ]


def _scores_of(trainer: L.Trainer) -> ScoreSums | None:
    kept = callback_of(trainer, ExampleScores)
    return None if kept is None else kept.sums


def _copied(state: Any) -> Any:
    """A copy of a nest of dictionaries, lists and tensors that shares nothing with it; tensors in main memory."""
    return tree_map(
        lambda leaf: (
            leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else deepcopy(leaf)
        ),
        state,
    )


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
        """What summary.md says about it; nothing if nothing happened."""
        found = []
        if self.skipped:
            found.append(
                f"{_times(self.skipped, 'update')} left out because a number was not finite."
            )
        if self.rollbacks:
            returns = _times(self.rollbacks, "return")
            found.append(
                f"{returns} to an earlier state of this training, which took back {self.lost:,} updates."
            )
        if found:
            often = ", ".join(
                f"{source} ({count})" for source, count in self.sources.most_common(_MAX_NAMED)
            )
            found.append(
                f"Where it came from: {often}. {GUARD_CSV} has every case with its images."
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """Primitives only, so that a checkpoint loads under `weights_only=True`."""
        return {
            **vars(self),
            "events": [list(event) for event in self.events],
            "sources": dict(self.sources),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> GuardRecord:
        """What `state_dict` gave; an earlier version counted more."""
        known = {each.name: state[each.name] for each in fields(cls)}
        events = [
            Event(step, epoch, kind, source, tuple(ids))
            for step, epoch, kind, source, ids in state["events"]
        ]
        return cls(**{**known, "events": events, "sources": Counter(state["sources"])})


def _times(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' if count != 1 else ''}"


def note(
    record: GuardRecord,
    trainer: L.Trainer,
    kind: str,
    source: str | None,
    images: Sequence[int] = (),
) -> None:
    """Count an event on every process, with the training images of all their windows; write guard.csv, tell the user.

    `source` is where it came from, as far as this process knows.
    """
    data = cast(Any, trainer).datamodule
    own = [
        data.sample_id("train", index) if hasattr(data, "sample_id") else str(index)
        for index in images
    ]
    found = gather_objects((source, own))
    # The process with the fault itself knows the loss that was bad; the others see at most its gradients.
    sources = sorted(
        filter(None, (source for source, _ in found)), key=lambda name: name.startswith("gradient")
    )
    source = sources[0] if sources else "gradient norm (too large for its number format)"
    step = trainer.global_step + (
        kind == "skip"
    )  # from 1; Lightning hasn't counted a refused step yet
    names = tuple(name for _, names in found for name in names)
    record.add(Event(step, trainer.current_epoch, kind, source, names[:_MAX_SAMPLES]))
    if trainer.is_global_zero:
        rows = (
            (e.step, e.epoch, e.kind, e.source, escape_csv_cell(" ".join(e.samples)))
            for e in record.events
        )
        # Whole: a resumed run writes it again from what the checkpoint remembers.
        write_text_atomic(Path(trainer.default_root_dir) / GUARD_CSV, csv_text(_COLUMNS, rows))
        if sum(record.sources.values()) <= _MAX_SAID:
            print_rank0(_SAID[kind].format(step=step, source=source))


# -- where a number isn't finite


def find_nonfinite(trainer: L.Trainer, task: ClassificationTask) -> str | None:
    """Which lasting numbers (weights, saved buffers, average) aren't finite on any process; None if all are."""
    buffers = {name for name, _ in task.net.named_buffers()}
    bad: list[tuple[str, Tensor]] = []
    kind = ""
    for prefix, net in _networks(trainer, task).items():
        bad += _nonfinite(net.state_dict().items())
        if bad and not kind:
            kind = prefix + ("buffer" if bad[0][0] in buffers else "weight")
    if sum_numbers([bool(bad)], task.device) == [0]:
        return None
    return next(filter(None, gather_objects(_in_words(kind, bad) if bad else None)), None)


def _nonfinite(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Those with a number that isn't finite in this process's part."""
    return [
        (name, tensor)
        for name, tensor in named
        if not bool(local(tensor.detach()).isfinite().all())
    ]


def _in_words(kind: str, bad: Sequence[tuple[str, Tensor]]) -> str:
    """For example `gradient of blocks.1.mlp.experts.fc1.weight (expert 3) and 2 more`."""
    name, tensor = bad[0]
    said = f"{kind} of {name}"
    if ".experts." in name:
        first = int((~local(tensor.detach()).isfinite()).flatten(1).any(1).nonzero()[0])
        if hasattr(tensor, "device_mesh"):
            from moevision.train.parallel.parts import first_index

            first += first_index(tensor)[0]
        said += f" (expert {first})"
    return said + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")
