"""The optimizer under a one-cycle schedule, what is frozen, and a moving average of the weights (EMA).

Layer-wise decay as in BEiT (arXiv:2106.08254, appendix), in timm's form (`param_groups_layer_decay`): with L blocks,
the classifier learns at lr, block i (from 0) at lr · layer_decay^(L - i), the patch and position embeddings at
lr · layer_decay^(L + 1). A norm after the last block counts as part of it; routers and experts of block i as block i.

Moving average: `ema = decay · ema + (1 - decay) · weights` after every *applied* update, by timm's `ModelEmaV3`.
Floating-point buffers (BatchNorm statistics, router biases) are averaged like weights, counters are copied. With the
warm-up the decay grows as `1 - (1 + updates)^-0.75`, so that a short training soon forgets its first weights.

Where the average is: validation sees it in place of the weights, which come back afterwards. A checkpoint holds it as
`state_dict`, so that test, export and `load_from_checkpoint` use it without knowing of it; the weights that training
goes on with are `current_model_state`, as in Lightning's own `WeightAveraging`. After `fit` the model *is* the average.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, cast, get_args

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import OneCycleLR

from moevision.config import EmaConfig, FreezeAllBut, OptimizerConfig, OptimizerName
from moevision.errors import UserError
from moevision.layers import moe_layers
from moevision.train.muon import AdamW, Muon, matrices_of
from moevision.train.parallel import is_sharded

if TYPE_CHECKING:
    from moevision.train.task import ClassificationTask

_NET = "net."  # where the network is in the task's state


def build_optimizer(
    net: nn.Module, config: OptimizerConfig, *, total_steps: int, fused: bool = False, bfloat16: bool = False
) -> tuple[torch.optim.AdamW, OneCycleLR]:
    """The optimizer of the parameters that learn, and its schedule.

    Args:
        net: a timm model; what is frozen is left out.
        config: rates, decay and warm-up.
        total_steps: optimizer steps of the whole training, at least 1; a single one is the first of two, since the
            last step's rate is next to nothing.
        fused: use the fused kernel of the device.
        bfloat16: whether the training multiplies in bfloat16; Muon then does, too.

    Raises:
        UserError: if nothing is left to learn.
    """
    warmup, total_steps = config.warmup_fraction, max(2, total_steps)
    if warmup * total_steps in (1, total_steps):
        warmup *= 1 - 1e-9  # a phase of no steps: OneCycleLR (torch 2.13) would divide by its length
    groups = parameter_groups(net, config)
    kind = partial(Muon, bfloat16=bfloat16) if config.name == "muon" else AdamW
    optimizer = kind(groups, lr=config.lr, betas=(0.9, config.beta2), fused=fused)
    highest = [float(group["lr"]) for group in optimizer.param_groups]
    schedule = OneCycleLR(
        optimizer, max_lr=highest, total_steps=total_steps, pct_start=float(warmup), cycle_momentum=False
    )
    return optimizer, schedule


def parameter_groups(net: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameters that learn, grouped by weight decay and (with layer_decay) learning rate; the classifier's first.

    Under Muon, groups with `matrices: True` hold what it moves.

    Raises:
        UserError: if nothing is left to learn, or there is no such optimizer.
    """
    if config.name not in get_args(OptimizerName):
        raise UserError(f"There is no optimizer {config.name!r}: use {' or '.join(get_args(OptimizerName))}.")
    spared = cast(Any, net).no_weight_decay()
    groups: list[dict[str, Any]]
    if config.layer_decay is None:
        # By keyword: what the third place means differs between timm releases.
        groups = param_groups_weight_decay(net, config.weight_decay, no_weight_decay_list=spared)
    else:
        groups = param_groups_layer_decay(
            net, config.weight_decay, no_weight_decay_list=spared, layer_decay=config.layer_decay
        )
        # Head first: reports that show one learning rate show the first group's.
        groups = [{**group, "lr": config.lr * group.pop("lr_scale")} for group in reversed(groups)]
    if not groups:
        raise UserError("Everything is frozen, so there is nothing to train: freeze less (--model.optim.freeze).")
    return _set_matrices_apart(net, groups) if config.name == "muon" else groups


def _set_matrices_apart(net: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same groups, each cut in two: what AdamW moves, and the matrices that Muon moves."""
    names = matrices_of(net)
    matrices = {id(parameter) for name, parameter in net.named_parameters() if name in names}
    apart = [
        {**group, "params": [p for p in group["params"] if (id(p) in matrices) is chosen], "matrices": chosen}
        for group in groups
        for chosen in (False, True)
    ]
    return [group for group in apart if group["params"]]


def freeze_parameters(net: nn.Module, freeze: int | FreezeAllBut | None) -> nn.Module:
    """Switch off the gradients of what keeps its weights (see `OptimizerConfig.freeze`), in place.

    Raises:
        UserError: if there are fewer blocks, no experts or no such choice.
    """
    if freeze is None:
        return net
    if isinstance(freeze, int):
        frozen = list(_first_blocks(net, freeze))
    else:
        learning = {id(parameter) for parameter in _learning(net, freeze)}
        frozen = [parameter for parameter in net.parameters() if id(parameter) not in learning]
    for parameter in frozen:
        parameter.requires_grad_(False)
    hold_frozen_statistics(net)
    return net


def hold_frozen_statistics(net: nn.Module) -> None:
    """Put frozen BatchNorm layers into eval mode, so that they neither use nor collect the statistics of batches."""
    for module in net.modules():
        learns = [parameter.requires_grad for parameter in module.parameters()]
        if isinstance(module, _BatchNorm) and learns and not any(learns):
            module.eval()


def _first_blocks(net: nn.Module, count: int) -> Iterator[nn.Parameter]:
    """Parameters of the embedding and of the first `count` blocks, by timm's own order of layers."""
    depth = len(cast(Any, net).blocks)
    if not 0 <= count <= depth:
        raise UserError(f"freeze={count} does not fit {depth} blocks: give 0 (the embedding only) to {depth}.")
    # 0 is the embedding, 1 to depth are the blocks; the norm behind the last block counts as part of it.
    layer_of = group_parameters(net, cast(Any, net).group_matcher(coarse=False), reverse=True)
    return (parameter for name, parameter in net.named_parameters() if layer_of[name] <= count)


def _learning(net: nn.Module, freeze: str) -> Iterator[nn.Parameter]:
    if freeze not in get_args(FreezeAllBut):
        raise UserError(
            f"There is no freeze={freeze!r}: give a number of blocks, {' or '.join(get_args(FreezeAllBut))}."
        )
    classifier = cast(Any, net).get_classifier()  # two heads in a distilled DeiT
    heads = classifier if isinstance(classifier, tuple) else (classifier,)
    learning: list[nn.Module] = list(heads)
    if freeze == "all_but_experts":
        layers = moe_layers(net)
        if not layers:
            raise UserError("freeze=all_but_experts needs a model with experts: a dense model, or a twin, has none.")
        learning += layers
    return chain.from_iterable(module.parameters() for module in learning)


class WeightEMA(L.Callback):
    """Keeps the moving average; put it in front of the `StabilityGuard` in the list of callbacks.

    Args:
        config: its decay, which must be given here.

    Attributes:
        updates: how many applied updates are in the average.
        swapped: whether the network holds the average now, and `network` the weights.

    Raises:
        UserError: if the decay isn't between 0 and 1.
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
        net = cast("ClassificationTask", pl_module).net
        divided = is_sharded(net)
        self._average = ModelEmaV3(
            cast(Any, trainer.strategy).copy_of(net) if divided else net,  # of the own part; FSDP2 has no copies
            decay=cast(float, self.config.decay),
            use_warmup=self.config.warmup,
            warmup_power=0.75,
            foreach=not divided,  # torch's functions on lists of tensors want one mesh
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the weights into the average, if this batch ended an update that was applied."""
        task = cast("ClassificationTask", pl_module)
        if task.update_applied:
            self.updates += 1
            cast(ModelEmaV3, self._average).update(task.net, self.updates)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the average."""
        if self._average is not None and trainer.state.fn is TrainerFn.FITTING:
            self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the weights back."""
        if self.swapped:
            self._swap(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put the weights back if a validation was interrupted, before anything saves them."""
        if self.swapped:
            self._swap(pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in the model; the last checkpoint is written by now."""
        cast("ClassificationTask", pl_module).net.load_state_dict(cast(nn.Module, self.network).state_dict())
        self._average = None  # another fit begins with what the model then holds

    @torch.no_grad()
    def _swap(self, pl_module: L.LightningModule) -> None:
        ours, theirs = cast(nn.Module, self.network), cast("ClassificationTask", pl_module).net
        for one, other in zip(
            (*ours.parameters(), *ours.buffers()), (*theirs.parameters(), *theirs.buffers()), strict=True
        ):
            kept = one.clone()
            one.copy_(other)
            other.copy_(kept)
        self.swapped = not self.swapped

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the averaged weights."""
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.updates = int(state_dict["updates"])

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the average as the model, and the weights beside it."""
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
