"""The stability guard: no update from numbers that aren't finite, and a way back when the state itself went bad.

- Tier 1, as GLaM (arXiv:2112.06905) skipped updates: a loss or gradient that isn't finite refuses the update, on every
  process alike and before clipping (which would spread one NaN over all gradients). Weights, moments, schedule, moving
  average and router biases don't move, and buffers and random generators return to where they were before the first
  micro-batch: the refused batch might as well never have existed.
- Tier 2, as PaLM (arXiv:2204.02311, §5.1) restarted ~100 steps before a spike and left the data behind it out: when
  weights or buffers aren't finite, or a loss spike lasts, training returns to the last good snapshot in memory while
  the data goes on forward. After a budget it stops with a diagnosis and a finite checkpoint.

Everything is judged where an accumulation window ends; a window is applied or refused as a whole.
"""

from __future__ import annotations

from collections import deque
from copy import deepcopy
from dataclasses import dataclass
from math import isfinite
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from moevision.errors import UserError
from moevision.train.checkpoint import random_state, restore_random_state
from moevision.train.diagnosis import GuardRecord, note, source_of
from moevision.train.processes import sum_numbers
from moevision.train.recovery import Recovery
from moevision.train.spikes import LossHistory
from moevision.train.task import ClassificationTask

_RECENT = 100  # updates over which refused ones are counted


@dataclass
class GuardConfig:
    """When an update is refused, and when training returns to an earlier state.

    Args:
        enabled: refuse updates from numbers that are not finite, and return to an earlier state when it must be.
        snapshot_every: applied updates between two snapshots in memory (weights, moments; about 3 x the weights each).
        snapshots: how many snapshots are kept.
        max_skips: refused among the last 100 updates, above which training returns to a snapshot.
        max_rollbacks: returns within 1,000 steps, above which training stops.
        spike_sigmas: standard deviations above the running mean that make a loss suspicious; 0 looks for no spikes.
        spike_updates: suspicious losses in a row that make a lasting spike.
        spike_warmup: losses that must be known before one can be suspicious.
    """

    enabled: bool = True
    snapshot_every: int = 100
    snapshots: int = 2
    max_skips: int = 10
    max_rollbacks: int = 3
    spike_sigmas: float = 6.0
    spike_updates: int = 10
    spike_warmup: int = 20


class StabilityGuard(L.Callback):
    """Watches the updates of a `ClassificationTask`. In the list of callbacks it comes after `WeightEMA`.

    Args:
        config: its thresholds.

    Attributes:
        record: what it found and did.

    Raises:
        UserError: if a number of the config can't be used.
    """

    def __init__(self, config: GuardConfig = GuardConfig()) -> None:  # noqa: B008 (never changed)
        lowest = {"snapshot_every": 1, "snapshots": 1, "max_skips": 0, "max_rollbacks": 0, "spike_sigmas": 0}
        for name, low in {**lowest, "spike_updates": 1, "spike_warmup": 2}.items():
            if getattr(config, name) < low:
                raise UserError(f"--guard.{name} is {getattr(config, name)}: it must be at least {low}.")
        self.config = config
        self.record = GuardRecord()
        self._losses = LossHistory(config.spike_sigmas, config.spike_updates, config.spike_warmup)
        self._applied = 0
        self._recent: deque[int] = deque(maxlen=_RECENT)  # 1 for a refused update
        self._recovery = Recovery(config.snapshots, config.max_rollbacks)
        self._before: tuple[dict[str, Any], list[Tensor]] | None = None  # randomness and buffers before the window
        self._indices: list[Tensor] = []  # pictures of the window
        self._loss: float | None = None  # of the window, if it was decided and applied
        self._bad_state: str | None = None

    @staticmethod
    def record_of(trainer: L.Trainer) -> GuardRecord:
        """A copy of what the guard of this training has counted so far; an empty one without a guard."""
        guards = (callback for callback in cast(Any, trainer).callbacks if isinstance(callback, StabilityGuard))
        return deepcopy(next((guard.record for guard in guards), GuardRecord()))

    # -- Lightning's hooks, in the order in which they come

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stand at the gate of the task's updates.

        Raises:
            UserError: for another module than a `ClassificationTask`.
        """
        if stage != "fit":
            return
        if not isinstance(pl_module, ClassificationTask):
            raise UserError("StabilityGuard watches a ClassificationTask: leave it out for other modules.")
        pl_module.update_gate = lambda norm: self._refuses(trainer, pl_module, norm)
        self._recovery.clear()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the gate, and the memory."""
        if stage == "fit":
            cast(ClassificationTask, pl_module).update_gate = None
            self._recovery.clear()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the first snapshot, before anything is trained.

        Raises:
            UserError: if the weights to begin with are not finite.
        """
        task = cast(ClassificationTask, pl_module)
        if (source := self._recovery.sickness(trainer, task)) is not None:
            raise UserError(f"The training would begin with numbers that are not finite ({source}).")
        self._keep(trainer, task)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember what a forward pass moves: random generators and buffers."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            net = cast(ClassificationTask, pl_module).net
            self._before = (random_state(), [buffer.clone() for buffer in net.buffers()])
            self._indices = []
        self._indices.append(batch["index"])

    def _refuses(self, trainer: L.Trainer, task: ClassificationTask, norm: Tensor) -> bool:
        """Decide over the update of this window; asked after its last backward pass, before clipping."""
        losses = [micro_batch["loss"].to(norm.device, torch.float32) for micro_batch in task.evidence]
        norm_value, *values = torch.stack([norm.detach().float(), *losses]).tolist()
        finite_loss = all(map(isfinite, values))
        loss = sum(values) / len(values) if finite_loss else 0.0
        finite = finite_loss and isfinite(norm_value)
        bad_losses, bad, total = sum_numbers([not finite_loss, not finite, loss], task.device)
        self._recent.append(int(bad > 0))
        if not bad:
            self._loss = total / trainer.world_size
            return False
        gradients = ((name, p.grad) for name, p in task.net.named_parameters() if p.grad is not None)
        source = source_of(task.evidence, gradients)
        self._undo_forward(task)
        task.aux_loss.start_window()
        task.window_counts = []
        self._bad_state = self._recovery.sickness(trainer, task)
        self.record.not_applied += 1
        if self._bad_state is None and not bad_losses and _looks_for_scale(trainer):
            self.record.overflows += 1
            self._recent[-1] = 0
        elif self._bad_state is None:
            self._note(trainer, "skip", source)
        return True

    def _undo_forward(self, task: ClassificationTask) -> None:
        randomness, buffers = cast(tuple[dict[str, Any], list[Tensor]], self._before)
        restore_random_state(randomness)
        with torch.no_grad():
            for buffer, before in zip(task.net.buffers(), buffers, strict=True):
                buffer.copy_(before)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an update: look for a spike, take a snapshot when it is time; return to one if it must be.

        Raises:
            TrainingDiverged: when the budget of returns is used up.
        """
        task = cast(ClassificationTask, pl_module)
        loss, self._loss = self._loss, None
        cause, self._bad_state = self._bad_state, None
        if loss is not None and task.update_applied:
            self._applied += 1
            threshold = self._losses.threshold
            if self._losses.add(loss):
                cause = f"loss spike: {loss:.3g} against a mean of {self._losses.mean:.3g} (limit {threshold:.3g})"
            elif self._losses.suspicious == 0 and self._applied % self.config.snapshot_every == 0:
                cause = self._recovery.sickness(trainer, task)
                if cause is None:
                    self._keep(trainer, task)
        elif cause is None and sum(self._recent) > self.config.max_skips:
            often = self.record.sources.most_common(1)[0][0]
            cause = f"{sum(self._recent)} of the last {len(self._recent)} updates refused, mostly for: {often}"
        if cause is not None:
            self._roll_back(trainer, task, cause)
        if trainer.global_step % cast(Any, trainer).log_every_n_steps == 0:
            counts = {"guard/skipped": self.record.skipped, "guard/rollbacks": self.record.rollbacks}
            task.log_dict({name: float(count) for name, count in counts.items()})

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Never evaluate a state that isn't finite."""
        self._check(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note a validation loss that isn't finite: the weights are, so it's no reason to go back."""
        loss = trainer.callback_metrics.get("val/loss")
        if trainer.state.fn is TrainerFn.FITTING and loss is not None and not isfinite(float(loss)):
            self._note(trainer, "validation", "validation loss")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Never end with a state that isn't finite."""
        self._check(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Never save a state that isn't finite; the tensors of `state_dict` are the live ones, and follow."""
        if self._check(trainer, pl_module):
            checkpoint["optimizer_states"] = [optimizer.state_dict() for optimizer in trainer.optimizers]
            checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Counters and statistics, as primitives. Snapshots aren't saved: a resumed run takes a new one first."""
        return {
            "record": self.record.state_dict(),
            "losses": self._losses.state_dict(),
            "applied": self._applied,
            "recent": list(self._recent),
            "returns": list(self._recovery.returns),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self.record = GuardRecord.from_state(state_dict["record"])
        self._losses.load_state_dict(state_dict["losses"])
        self._applied = int(state_dict["applied"])
        self._recent = deque(state_dict["recent"], maxlen=_RECENT)
        self._recovery.returns = list(state_dict["returns"])

    # -- what they use

    def _check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """Return to a snapshot if the state isn't finite; whether that was done."""
        if not self._recovery.can_look(trainer):
            return False
        task = cast(ClassificationTask, pl_module)
        cause = self._recovery.sickness(trainer, task)
        if cause is not None:
            self._roll_back(trainer, task, cause)
        return cause is not None

    def _keep(self, trainer: L.Trainer, task: ClassificationTask) -> None:
        self._recovery.keep(trainer, task, (self._applied, self._losses.state_dict()))

    def _roll_back(self, trainer: L.Trainer, task: ClassificationTask, cause: str) -> None:
        applied, losses = self._recovery.go_back(trainer, task)
        self.record.lost += self._applied - applied
        self._applied = applied
        self._losses.load_state_dict(losses)
        self._recent.clear()
        self._note(trainer, "rollback", cause)
        self._recovery.give_up_if_in_vain(trainer, self.record, cause)

    def _note(self, trainer: L.Trainer, kind: str, source: str | None) -> None:
        pictures = torch.cat(self._indices).tolist() if self._indices and kind == "skip" else []
        note(self.record, trainer, kind, source, pictures)


def _looks_for_scale(trainer: L.Trainer) -> bool:
    """Whether fp16 loss scaling can still lower its scale, which is what an overflow is for."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.get_scale() > 1
