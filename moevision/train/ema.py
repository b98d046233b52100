"""A moving average of the weights (EMA): `ema = decay · ema + (1 - decay) · weights` after every *applied* update.

By timm's `ModelEmaV3`. Floating-point buffers (BatchNorm statistics, router biases) are averaged like weights, counters
are copied. With the warm-up the decay grows as `1 - (1 + updates)^-0.75`, so that a short training soon forgets its
first weights. Lightning's own `EMAWeightAveraging` (2.6) counts steps, refused ones too, and copies the module, which
FSDP2 refuses.

Where the average is: validation sees it in place of the weights, which come back afterwards. A checkpoint holds it as
`state_dict`, so that test, export and `load_from_checkpoint` use it without knowing of it; the weights that training
goes on with are `current_model_state`, as in Lightning's `WeightAveraging`. After `fit` the model *is* the average.
"""

# ruff: noqa: D102 (Lightning's hooks)

from __future__ import annotations

from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from timm.utils import ModelEmaV3
from torch import nn

from moevision.config import EmaConfig
from moevision.errors import UserError
from moevision.train.processes import parallel_strategy
from moevision.train.task import ClassificationTask

_NET = "net."  # where the network is in the task's state


class WeightEMA(L.Callback):
    """Keeps the moving average; put it in front of the `StabilityGuard` in the list of callbacks.

    `updates` are in the average; while `swapped`, the network holds the average and `network` the weights. A UserError
    if the decay isn't between 0 and 1.
    """

    def __init__(self, config: EmaConfig) -> None:
        if config.decay is None or not 0 < config.decay < 1:
            raise UserError(f"--ema.decay is {config.decay}: it must lie between 0 and 1, such as 0.999.")
        self.config = config
        self.updates = 0
        self.swapped = False
        self._average: ModelEmaV3 | None = None

    @classmethod
    def of(cls, trainer: L.Trainer) -> WeightEMA | None:
        """The average of this training, if it has one."""
        return next((callback for callback in cast(Any, trainer).callbacks if isinstance(callback, cls)), None)

    @property
    def network(self) -> nn.Module | None:
        """The averaged network (the weights in training, while `swapped`); None before the training."""
        return None if self._average is None else cast(nn.Module, self._average.module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with the weights that training begins with, unless a checkpoint brought an average."""
        if self._average is None:
            self._begin(trainer, pl_module)
        cast(nn.Module, self.network).to(pl_module.device)

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        net, divided = cast(ClassificationTask, pl_module).net, parallel_strategy(trainer)
        self._average = ModelEmaV3(
            net if divided is None else divided.copy_of(net),  # of the own part; FSDP2 has no copies
            decay=cast(float, self.config.decay),
            use_warmup=self.config.warmup,
            warmup_power=0.75,
            foreach=divided is None,  # torch's functions on lists of tensors want one mesh
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        task = cast(ClassificationTask, pl_module)
        if task.update_applied:
            self.updates += 1
            cast(ModelEmaV3, self._average).update(task.net, self.updates)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._average is not None and trainer.state.fn is TrainerFn.FITTING:
            self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.swapped:
            self._swap(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put the weights back if a validation was interrupted, before anything saves them."""
        if self.swapped:
            self._swap(pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        cast(ClassificationTask, pl_module).net.load_state_dict(cast(nn.Module, self.network).state_dict())
        self._average = None  # another fit begins with what the model then holds

    @torch.no_grad()
    def _swap(self, pl_module: L.LightningModule) -> None:
        ours, theirs = cast(nn.Module, self.network), cast(ClassificationTask, pl_module).net
        for one, other in zip(
            (*ours.parameters(), *ours.buffers()), (*theirs.parameters(), *theirs.buffers()), strict=True
        ):
            kept = one.clone()
            one.copy_(other)
            other.copy_(kept)
        self.swapped = not self.swapped

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = int(state_dict["updates"])

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average is None:
            return
        other = {_NET + name: value for name, value in cast(nn.Module, self.network).state_dict().items()}
        current = checkpoint["state_dict"]
        average = {**current, **other}
        checkpoint["state_dict"], checkpoint["current_model_state"] = (
            (current, average) if self.swapped else (average, current)
        )

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the average, which the model has just loaded, and load the weights that training continues with."""
        if trainer.state.fn is not TrainerFn.FITTING:
            return
        self._begin(trainer, pl_module)
        pl_module.load_state_dict(checkpoint.get("current_model_state", checkpoint["state_dict"]))
