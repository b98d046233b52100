"""A whole training state in memory, to go back to: weights, buffers, optimizer, schedule, scaler, average, randomness.

Two traps, both measured with torch 2.13: `state_dict()` hands out the live tensors, and `Optimizer.load_state_dict`
makes the optimizer use the ones it is given. So everything is copied on the way in and on the way out; otherwise the
second return to the same snapshot would restore what training has made of it since.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from moevision.train.checkpoint import random_state, restore_random_state
from moevision.train.optim import WeightEMA

if TYPE_CHECKING:
    from moevision.train.task import ClassificationTask


class TrainingSnapshot:
    """Everything that an applied update moves, copied into the main memory.

    Args:
        trainer: a trainer that fits.
        task: its task.
        extra: what the owner wants back with it, such as running statistics; kept as it is.

    Attributes:
        step: `trainer.global_step` when it was taken.
        restored: how often training has come back to it.
    """

    def __init__(self, trainer: L.Trainer, task: ClassificationTask, extra: Any = None) -> None:
        self.step = trainer.global_step
        self.restored = 0
        self.extra = extra
        self._tensors = [tensor.detach().to("cpu", copy=True) for tensor in _tensors(trainer, task)]
        self._optimizers = [_copied(optimizer.state_dict()) for optimizer in trainer.optimizers]
        self._schedules = [_copied(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs]
        self._precision = _copied(trainer.precision_plugin.state_dict())
        average = WeightEMA.of(trainer)
        self._averaged = 0 if average is None else average.updates
        self._random = random_state()

    @torch.no_grad()
    def restore(self, trainer: L.Trainer, task: ClassificationTask) -> None:
        """Put the training back to where it was; gradients are dropped. It can be done again and again."""
        for tensor, saved in zip(_tensors(trainer, task), self._tensors, strict=True):
            tensor.copy_(saved)
        for optimizer, state in zip(trainer.optimizers, self._optimizers, strict=True):
            optimizer.load_state_dict(_copied(state))
            optimizer.zero_grad(set_to_none=True)
        for config, state in zip(trainer.lr_scheduler_configs, self._schedules, strict=True):
            config.scheduler.load_state_dict(_copied(state))
        trainer.precision_plugin.load_state_dict(_copied(self._precision))
        average = WeightEMA.of(trainer)
        if average is not None:
            average.updates = self._averaged
        restore_random_state(self._random)
        self.restored += 1


def lasting_tensors(trainer: L.Trainer, task: ClassificationTask) -> dict[str, Tensor]:
    """Name -> every floating-point weight and saved buffer of the network, and of its moving average."""
    average = WeightEMA.of(trainer)
    networks = {"": task.net} if average is None or average.network is None else {"": task.net, "ema.": average.network}
    return {
        prefix + name: tensor
        for prefix, network in networks.items()
        for name, tensor in network.state_dict().items()
        if tensor.is_floating_point()
    }


def _tensors(trainer: L.Trainer, task: ClassificationTask) -> list[Tensor]:
    average = WeightEMA.of(trainer)
    networks = [task.net] if average is None or average.network is None else [task.net, average.network]
    return [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]


def _copied(state: Any) -> Any:
    """A copy of a nest of dictionaries, lists and tensors that shares nothing with it; tensors in main memory."""
    return tree_map(
        lambda leaf: leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else deepcopy(leaf), state
    )
