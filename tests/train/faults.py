"""Faults on purpose, to see what the stability guard does about them.

    Trainer(callbacks=[FaultInjector("nan_loss@7, inf_grad@9:expert3, spike@20x50, nan_weight@12"), StabilityGuard()])

`KIND@N` strikes the N-th training batch of the whole training, counted from 1 and over accumulation windows (a resumed
training goes on counting); `nan_val@N` the N-th validation batch of this process. Behind it may stand `xF` (the factor
of a spike) and `:blockB`, `:expertE`, `:rankR`, which narrow it down to a block, an expert, a process: as in Megatron's
error injection and torchft's EventInjector, what the training counted can be compared with what was done to it.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moevision.layers import MoEMlp, moe_layers
from moevision.train.health import WeightEMA
from moevision.train.parallel.parts import first_index, local_shard
from moevision.train.processes import callback_of
from moevision.train.task import ClassificationTask

KINDS = (
    "nan_input",  # the images are NaN
    "nan_loss",  # the logits, and so the loss, are NaN
    "nan_router",  # what a router computes with is NaN
    "nan_grad",
    "inf_grad",
    "nan_weight",
    "nan_buffer",  # a saved buffer: router bias, BatchNorm statistic
    "nan_ema",  # a weight of the moving average
    "spike",  # the classifier's weights have been multiplied, by 50 unless told: a lasting loss spike
    "nan_val",  # the images of a validation batch are NaN
)
_FAULT = re.compile(r"(\w+)@(\d+)(?:x([\d.]+))?((?::[a-z]+\d+)*)")
_TARGET = re.compile(r":([a-z]+)(\d+)")
_NAN = float("nan")


@dataclass(frozen=True)
class Fault:
    """One fault: what, at which batch (from 1), and where; None is the first place that fits, on every rank."""

    kind: str
    batch: int
    factor: float = 50.0
    block: int | None = None
    expert: int | None = None
    rank: int | None = None


def parse_faults(text: str) -> list[Fault]:
    """Read `KIND@N[xF][:blockB][:expertE][:rankR], ...`."""
    faults = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _FAULT.fullmatch(part)
        assert match is not None, part
        assert match[1] in KINDS, part
        targets = {name: int(number) for name, number in _TARGET.findall(match[4])}
        faults.append(Fault(match[1], int(match[2]), float(match[3] or 50.0), **targets))
    return faults


class FaultInjector(L.Callback):
    """Does to the training what `faults` say (`parse_faults`); `injected` counts each kind in this process.

    It stands in front of all callbacks that should notice.
    """

    def __init__(self, faults: str) -> None:
        self.faults = parse_faults(faults)
        self.injected: Counter[str] = Counter()
        self._hooks: list[RemovableHandle] = []
        self._gradients: list[Fault] = []
        self._validation_batches = 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Strike the state, or prepare to strike the computation of this batch."""
        number = trainer.fit_loop.epoch_loop.batch_progress.total.ready  # counts this batch already
        self._strike(
            trainer, pl_module, [fault for fault in self.faults if fault.kind != "nan_val"], number
        )

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Prepare to strike a validation batch."""
        self._validation_batches += 1
        faults = [fault for fault in self.faults if fault.kind == "nan_val"]
        self._strike(trainer, pl_module, faults, self._validation_batches)

    @torch.no_grad()
    def _strike(
        self, trainer: L.Trainer, pl_module: L.LightningModule, faults: list[Fault], number: int
    ) -> None:
        net = cast(ClassificationTask, pl_module).net
        for fault in faults:
            if fault.batch != number or fault.rank not in (None, trainer.global_rank):
                continue
            self.injected[fault.kind] += 1
            if fault.kind in ("nan_grad", "inf_grad"):
                self._gradients.append(fault)
            elif fault.kind == "nan_loss":
                self._hooks.append(
                    net.register_forward_hook(lambda module, args, output: output * _NAN)
                )
            elif fault.kind in ("nan_input", "nan_val", "nan_router"):
                poisoned = _layer(net, fault).router if fault.kind == "nan_router" else net
                hook = poisoned.register_forward_pre_hook(
                    lambda module, args: (args[0] * _NAN, *args[1:])
                )
                self._hooks.append(hook)
            elif fault.kind == "spike":
                _weight(net, Fault("spike", fault.batch)).mul_(fault.factor)
            elif fault.kind == "nan_buffer":
                _spoil(_buffer(net, fault), fault)
            else:
                average = callback_of(trainer, WeightEMA) if fault.kind == "nan_ema" else None
                _spoil(
                    _weight(net if average is None else cast(nn.Module, average.network), fault),
                    fault,
                )

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Spoil gradients; over several processes this is after they were averaged, on this process alone."""
        for fault in self._gradients:
            weight = _weight(cast(ClassificationTask, pl_module).net, fault)
            _spoil(cast(Tensor, weight.grad), fault)
        self._gradients = []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """The next batch is whole again."""
        while self._hooks:
            self._hooks.pop().remove()

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """The next batch is whole again."""
        self.on_train_batch_end()


def _layer(net: nn.Module, fault: Fault) -> MoEMlp:
    return next(layer for layer in moe_layers(net) if fault.block in (None, layer.layer_index))


def _weight(net: nn.Module, fault: Fault) -> Tensor:
    """The experts' first weight [E, H, D] if a block or an expert is meant, else the classifier's."""
    if fault.block is None and fault.expert is None:
        return cast(Tensor, cast(Any, net).get_classifier().weight)
    return _layer(net, fault).experts.fc1.weight


def _buffer(net: nn.Module, fault: Fault) -> Tensor:
    """The first saved buffer with a fraction, of the block that is meant if one is."""
    prefix = "" if fault.block is None else f"blocks.{fault.block}."
    saved = net.state_dict(keep_vars=True)
    return next(
        buffer
        for name, buffer in net.named_buffers()
        if name.startswith(prefix) and name in saved and buffer.is_floating_point()
    )


def _spoil(target: Tensor, fault: Fault) -> None:
    """Change one number in place, of the expert that is meant if one is; nothing where this process holds no part."""
    place = local_shard(target)
    if fault.expert is not None:
        row = fault.expert - first_index(target)[0]
        place = place[row : row + 1] if row >= 0 else place[:0]
    if place.numel():
        place.view(-1)[0] = float("inf") if fault.kind == "inf_grad" else _NAN
