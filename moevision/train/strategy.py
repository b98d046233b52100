"""`fit --parallel fsdp|ddp --parallel.expert N`: sharded and expert parallelism as a Lightning strategy.

Lightning's `ModelParallelStrategy` brings launch, process groups and barriers. Here stands what differs: the mesh and
the sharding (`parallel.py`), the loss divided by the number of processes (gradients are summed), and checkpoints as
folders (`sharded.py`). State dictionaries and optimizers are torch's own with DTensors in them, so that guard, moving
average and resuming work on shards as they do on whole tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from moevision.config import ParallelConfig
from moevision.data import ImageDataModule
from moevision.data.loader import eval_batches
from moevision.errors import UserError
from moevision.layers import moe_layers
from moevision.train import sharded
from moevision.train.checkpoint import SafeCheckpointIO
from moevision.train.optim import parameter_groups
from moevision.train.parallel import (
    Layout,
    check_divides,
    check_network,
    filled,
    gathered_state,
    is_sharded,
    outline,
    same_everywhere,
    shard,
    shard_like,
    share_buffers,
)
from moevision.train.task import ClassificationTask

PRECISIONS = ("32-true", "64-true", "bf16-mixed")


def strategy_of(config: ParallelConfig, asked: Any) -> dict[str, Any]:
    """The Trainer's argument.

    Args:
        config: its options.
        asked: --trainer.strategy.

    Raises:
        UserError: if both say something.
    """
    if config.layout is None:
        return {}
    if asked not in ("auto", config.layout):
        raise UserError(f"--parallel {config.layout} and --trainer.strategy {asked} are two ways to say it: use one.")
    replicated = config.layout == "ddp"
    if replicated and config.expert == 1:
        return {"strategy": "ddp"}
    return {"strategy": MoEParallelStrategy(config.expert, replicated=replicated, offload=config.offload)}


class MoEParallelStrategy(ModelParallelStrategy):
    """Shards a `ClassificationTask` over all processes by FSDP2, and divides its experts.

    Args:
        expert: processes that one set of experts is divided among.
        replicated: whether all processes have all of the rest.
        offload: whether parts lie in main memory.
    """

    def __init__(self, expert: int = 1, *, replicated: bool = False, offload: bool = False) -> None:
        super().__init__(tensor_parallel_size=1)
        self.expert, self.replicated, self.offload = expert, replicated, offload
        self._outline: nn.Module | None = None

    @staticmethod
    def of(trainer: L.Trainer) -> MoEParallelStrategy | None:
        """The strategy of this trainer, if it is one of these."""
        return trainer.strategy if isinstance(trainer.strategy, MoEParallelStrategy) else None

    @property
    def said(self) -> str:
        """What follows --parallel."""
        return f"ddp --parallel.expert {self.expert}" if self.replicated else "fsdp"

    def check(self, trainer: L.Trainer) -> None:
        """Refuse what a sharded training can't do.

        Raises:
            UserError: for one process, a number of them that `expert` doesn't divide, or a precision without tests.
        """
        processes = trainer.num_nodes * trainer.num_devices
        if processes == 1:
            raise UserError(
                "--parallel divides a model among several processes and there is one: say --trainer.devices N, or "
                "leave --parallel and --parallel.expert out."
            )
        check_divides(self.expert, processes)
        if trainer.precision not in PRECISIONS:
            raise UserError(
                f"--parallel {self.said} computes in {', '.join(PRECISIONS)}, not in {trainer.precision}: choose one "
                "of them by --trainer.precision."
            )

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """As without sharding, so that callbacks load their state before `on_fit_start`."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """As without sharding."""
        return True

    @property
    def _task(self) -> ClassificationTask:
        return cast(ClassificationTask, self.lightning_module)

    def setup_environment(self) -> None:
        """Let the processes meet; Lightning's mesh is data parallel only."""
        if not isinstance(self.checkpoint_io, SafeCheckpointIO):
            self.checkpoint_io = SafeCheckpointIO()
        self._data_parallel_size = self.num_nodes * self.num_processes
        if self.offload and self.root_device.type == "cuda":
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # parts travel too: norms, Muon's matrices, the export
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        """Shard the network, then make optimizers of its shards."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self._shard()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _shard(self) -> None:
        """Shard the network unless it is; checkpoints are loaded into the shards, before `setup`."""
        task = self._task
        if is_sharded(task.net):
            return
        check_network(task.net, self.expert)
        self.model = self.precision_plugin.convert_module(task)
        same_everywhere(task.net, self.root_device)
        self._outline = outline(task.net)
        layout = Layout.of(self.root_device.type, self.expert, replicated=self.replicated)
        gathered = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        net = shard(task.net, layout, gathered, offload=self.offload)  # block by block: no device ever has it whole
        if any(isinstance(module, _BatchNorm) for module in net.modules()):
            net.register_forward_pre_hook(lambda module, _: share_buffers(module))
        task.net = nn.Identity()
        self.model_to_device()  # the rest of the task
        task.net = net

    def copy_of(self, net: nn.Module) -> nn.Module:
        """A copy of a sharded network that holds the same parts; it can't compute."""
        state = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
        return filled(cast(nn.Module, self._outline), state)

    def gather(self) -> None:
        """Make the first process's network whole again, in main memory; every process must call it."""
        state = gathered_state(self._task.net)
        if self.is_global_zero:
            self._task.net = filled(cast(nn.Module, self._outline), state).eval()

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Gradients are summed over processes: those of the mean are wanted."""
        return super().backward(closure_loss / self.world_size, optimizer, *args, **kwargs)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The task's own, with shards."""
        return self._task.state_dict()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Into the shards; `load_checkpoint` has divided it."""
        self._task.load_state_dict(checkpoint["state_dict"], strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's own, with shards."""
        return optimizer.state_dict()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """As above."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Every process writes its part."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of any layout, file or folder, and divide it as the network is."""
        self._shard()
        like = self._like()
        files = cast(SafeCheckpointIO, self.checkpoint_io)
        checkpoint = files.load_checkpoint(checkpoint_path, like=like)
        return checkpoint if Path(checkpoint_path).is_dir() else sharded.divide(checkpoint, like, shard_like)

    def _like(self) -> sharded.Like:
        learning = [p for group in parameter_groups(self._task.net, self._task.optim) for p in group["params"]]
        return sharded.like_these(dict(self._task.named_parameters()), learning)


def describe_parallel(trainer: L.Trainer, net: nn.Module) -> str | None:
    """A line of the plan: how a network that isn't sharded yet will be; None where it won't."""
    strategy = MoEParallelStrategy.of(trainer)
    if strategy is None:
        return None
    how = "on each of" if strategy.replicated else "sharded over"
    line = f"parallel: weights {how} {trainer.world_size} processes{'' if strategy.replicated else ' (FSDP2)'}"
    if strategy.expert > 1:
        experts = moe_layers(net)[0].router.num_experts
        line += f", {experts} experts over {strategy.expert} of them, {experts // strategy.expert} each"
    if strategy.offload:
        line += "; in main memory but for the block at hand"
    return line


def check_fit(trainer: L.Trainer, task: ClassificationTask, data: ImageDataModule, *, records: bool) -> None:
    """Refuse, before anything is trained, what a sharded fit can't do; let `data` refuse what only shows later.

    Args:
        trainer: the trainer.
        task: its task, with a network that isn't sharded yet.
        data: its data, after `setup`.
        records: whether --record_routing is on.

    Raises:
        UserError: if so.
    """
    strategy = MoEParallelStrategy.of(trainer)
    if strategy is None:
        return
    check_network(task.net, strategy.expert)
    data.in_step = True
    world = trainer.num_nodes * trainer.num_devices
    for split in ("val", "test"):
        images = sum(data.class_counts[split].values())
        if images and not all(eval_batches(images, data.batch_size, world - 1, world)):
            raise UserError(
                f"{images} {split} images in batches of {data.batch_size} leave one of {world} processes without an "
                "image while others wait for it: give more images, or another --data.batch_size."
            )
    if task.compile_blocks:
        raise UserError(f"--model.compile has no tests under --parallel {strategy.said}: leave one of them out.")
    if records:
        raise UserError(
            f"--record_routing asks one process alone, and under --parallel {strategy.said} none has the whole model."
        )
