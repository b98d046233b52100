"""The way back: a ring of snapshots in memory, a budget for returning to them, and an end with a diagnosis.

After PaLM (arXiv:2204.02311, §5.1), which restarted ~100 steps before a spike and left the data behind it out. Here the
data goes on forward anyhow, and if the newest snapshot was returned to in vain, an older one is taken.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus

from moevision.errors import DIVERGED, UserError
from moevision.files import write_text_atomic
from moevision.train.diagnosis import GuardRecord, all_finite, nonfinite_states
from moevision.train.optim import WeightEMA
from moevision.train.processes import gather, sum_numbers
from moevision.train.snapshot import TrainingSnapshot, lasting_tensors
from moevision.train.task import ClassificationTask

DIAGNOSIS = "divergence.md"
_BUDGET = 1000  # steps over which returns are counted


class TrainingDiverged(UserError):  # noqa: N818 (the name that users are told)
    """The training was given up: it went bad again and again, and the budget of returns is used up.

    Its exit code is its own, so that a job script doesn't start the same training again and again.
    """

    exit_code = DIVERGED


class Recovery:
    """Keeps snapshots of a training and returns to them.

    Args:
        snapshots: how many are kept.
        max_rollbacks: returns within 1,000 steps, above which the training is given up.

    Attributes:
        returns: the steps at which training returned to a snapshot.
    """

    def __init__(self, snapshots: int, max_rollbacks: int) -> None:
        self.max_rollbacks = max_rollbacks
        self.returns: list[int] = []
        self._ring: deque[TrainingSnapshot] = deque(maxlen=snapshots)

    def __len__(self) -> int:
        """How many snapshots there are."""
        return len(self._ring)

    def clear(self) -> None:
        """Free the memory."""
        self._ring.clear()

    def keep(self, trainer: L.Trainer, task: ClassificationTask, extra: Any) -> None:
        """Take a snapshot of a state that is known to be well; `extra` comes back with it."""
        self._ring.append(TrainingSnapshot(trainer, task, extra))

    def sickness(self, trainer: L.Trainer, task: ClassificationTask) -> str | None:
        """Which lasting numbers (weights, saved buffers, average) aren't finite on any process; None if all are."""
        state = lasting_tensors(trainer, task)
        (bad,) = sum_numbers([not all_finite(state.values())], task.device)
        if not bad:
            return None
        buffers = frozenset(name for name, _ in task.net.named_buffers())
        return cast(str, next(filter(None, gather(nonfinite_states(state, buffers)))))

    def can_look(self, trainer: L.Trainer) -> bool:
        """Whether the state may be judged now, outside of a training step."""
        average = WeightEMA.of(trainer)
        swapped = average is not None and average.swapped  # a validation was interrupted: nothing was trained in it
        alone = trainer.state.status is TrainerStatus.INTERRUPTED  # the other processes won't answer
        return trainer.state.fn is TrainerFn.FITTING and len(self) > 0 and not swapped and not alone

    def go_back(self, trainer: L.Trainer, task: ClassificationTask) -> Any:
        """Return to the newest snapshot, or to an older one if that did not help; its `extra`."""
        if self._ring[-1].restored and len(self._ring) > 1:
            self._ring.pop()
        self._ring[-1].restore(trainer, task)
        self.returns = [step for step in self.returns if step > trainer.global_step - _BUDGET]
        self.returns.append(trainer.global_step)
        return self._ring[-1].extra

    def give_up_if_in_vain(self, trainer: L.Trainer, record: GuardRecord, cause: str) -> None:
        """Stop if the budget is used up; the good state that was just restored is saved, and a diagnosis beside it.

        Raises:
            TrainingDiverged: if it is.
        """
        if len(self.returns) <= self.max_rollbacks:
            return
        folder = Path(trainer.default_root_dir)
        checkpoint = folder / "checkpoints" / "diverged.ckpt"
        trainer.save_checkpoint(checkpoint)
        if trainer.is_global_zero:
            write_text_atomic(folder / DIAGNOSIS, record.diagnosis(trainer.global_step, str(checkpoint)))
        raise TrainingDiverged(
            f"The training diverged ({cause}) and returning to an earlier state did not help: read "
            f"{folder / DIAGNOSIS}, which says what to try; {checkpoint} holds the last good state."
        )
