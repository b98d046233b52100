"""`fit --parallel fsdp|ddp --parallel.expert N`: sharded and expert parallelism as a Lightning strategy.

Nothing else imports this folder. `layout` says which process holds what, and how tokens reach their experts; `parts`
has norms, clipping, optimizers, copies and checkpoints of divided tensors.

Lightning's `ModelParallelStrategy` brings launch, process groups and barriers. Here stands what differs: the mesh and
the sharding (`layout.py`), the loss divided by the number of processes (gradients are summed), and checkpoints of whole
tensors. State dictionaries and optimizers are torch's own with DTensors in them, so that guard, moving
average and resuming work on parts as they do on whole tensors.
"""

# ruff: noqa: D102 (Lightning's hooks)

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from moevision.data import ImageDataModule
from moevision.data.loader import eval_batches
from moevision.errors import UserError
from moevision.layers import moe_layers
from moevision.train.checkpoint import SafeCheckpointIO
from moevision.train.lightning_internals import set_process_group
from moevision.train.optim import parameter_groups
from moevision.train.parallel.layout import (
    Layout,
    check_divides,
    check_network,
    same_everywhere,
    shard,
    share_buffers,
)
from moevision.train.parallel.parts import (
    SHARDED,
    divide,
    filled,
    gathered,
    is_sharded,
    like_these,
    outline,
)
from moevision.train.task import ClassificationTask
from moevision.types import State

PRECISIONS = ("32-true", "64-true", "bf16-mixed")


class MoEParallelStrategy(ModelParallelStrategy):
    """Shards a `ClassificationTask` over all processes by FSDP2, and divides its experts among `expert` of them.

    `replicated`: all processes have all of the rest; `offload`: parts lie in main memory.
    """

    def __init__(self, expert: int = 1, *, replicated: bool = False, offload: bool = False) -> None:
        super().__init__(tensor_parallel_size=1)
        self.expert = expert
        self.replicated = replicated
        self.offload = offload
        self._outline: nn.Module | None = None

    @property
    def options(self) -> str:
        """What follows --parallel on the command line."""
        return f"ddp --parallel.expert {self.expert}" if self.replicated else "fsdp"

    def check(self, trainer: Trainer) -> None:
        """Raise a UserError for one process, a number of them that `expert` doesn't divide, or another precision."""
        processes = trainer.num_nodes * trainer.num_devices
        if processes == 1:
            raise UserError(
                "--parallel divides a model among several processes and there is one: say --trainer.devices N, or "
                "leave --parallel and --parallel.expert out."
            )
        check_divides(self.expert, processes)
        if trainer.precision not in PRECISIONS:
            raise UserError(
                f"--parallel {self.options} computes in {', '.join(PRECISIONS)}, not in {trainer.precision}: choose "
                "one of them by --trainer.precision."
            )

    def check_fit(
        self, trainer: Trainer, task: ClassificationTask, data: ImageDataModule, *, records: bool
    ) -> None:
        """Raise a UserError, before anything is trained, for what a sharded fit can't do; `data` are set up.

        `records`: whether --record_routing is on.
        """
        check_network(task.net, self.expert)
        world = trainer.num_nodes * trainer.num_devices
        for split in ("val", "test"):
            images = sum(data.class_counts[split].values())
            if images and not all(eval_batches(images, data.batch_size, world - 1, world)):
                raise UserError(
                    f"{images} {split} images in batches of {data.batch_size} leave one of {world} processes without "
                    "an image while others wait for it: give more images, or another --data.batch_size."
                )
        if task.compile_blocks:
            raise UserError(
                f"--model.compile has no tests under --parallel {self.options}: leave one of them out."
            )
        if records:
            raise UserError(
                "--record_routing asks one process alone, and under --parallel "
                f"{self.options} none has the whole model."
            )

    def plan(self, processes: int, net: nn.Module) -> str:
        """A line that says how a network that isn't sharded yet will be."""
        line = f"parallel: weights sharded over {processes} processes (FSDP2)"
        if self.replicated:
            line = f"parallel: weights on each of {processes} processes"
        if self.expert > 1:
            experts = moe_layers(net)[0].router.num_experts
            line += f", {experts} experts over {self.expert} of them, {experts // self.expert} each"
        if self.offload:
            line += "; in main memory but for the block at hand"
        return line

    # As without sharding, so that callbacks load their state before `on_fit_start`.
    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True

    @property
    def _task(self) -> ClassificationTask:
        return cast(ClassificationTask, self.lightning_module)

    def setup_environment(self) -> None:
        if not isinstance(self.checkpoint_io, SafeCheckpointIO):
            self.checkpoint_io = SafeCheckpointIO()
        # With offload parts in main memory travel too: norms, Muon's matrices, the export.
        needs_gloo = self.offload and self.root_device.type == "cuda"
        set_process_group(self, "cpu:gloo,cuda:nccl" if needs_gloo else None)
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
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
        task.tensors = SHARDED
        self.model = self.precision_plugin.convert_module(task)
        same_everywhere(task.net, self.root_device)
        self._outline = outline(task.net)
        layout = Layout.of(self.root_device.type, self.expert, replicated=self.replicated)
        gathered = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        # Block by block: no device ever has it whole.
        net = shard(task.net, layout, gathered, offload=self.offload)
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
        state = gathered(self._task.net.state_dict())
        if self.is_global_zero:
            self._task.net = filled(cast(nn.Module, self._outline), state).eval()

    def backward(
        self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        return super().backward(closure_loss / self.world_size, optimizer, *args, **kwargs)

    # State dictionaries: the task's and the optimizer's own, with parts; `load_checkpoint` has divided what is loaded.

    lightning_module_state_dict = Strategy.lightning_module_state_dict
    load_model_state_dict = Strategy.load_model_state_dict
    optimizer_state = Strategy.optimizer_state

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)

    def save_checkpoint(
        self, checkpoint: State, filepath: Any, storage_options: Any | None = None
    ) -> None:
        whole = gathered(checkpoint)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(whole, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> State:
        self._shard()
        task = self._task
        learning = [p for group in parameter_groups(task.net, task.optim) for p in group["params"]]
        checkpoint = cast(SafeCheckpointIO, self.checkpoint_io).load_checkpoint(
            checkpoint_path, mmap=True
        )
        return divide(checkpoint, like_these(dict(task.named_parameters()), learning))
