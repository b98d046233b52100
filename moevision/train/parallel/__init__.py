"""`fit --parallel fsdp|ddp --parallel.expert N`: sharded and expert parallelism as a Lightning strategy.

Nothing else imports this folder. Here stand which process holds what, how tokens reach their experts, and the strategy;
`parts` has norms, clipping, optimizers, copies and checkpoints of divided tensors.

- **Expert parallelism** (GShard, arXiv:2006.16668): the W processes form a mesh (efsdp, ep). Each row of `ep` processes
  holds every expert once, E / ep of them per process, and exchanges tokens by all-to-all. All W processes read images
  of their own: expert parallelism is carved out of data parallelism.
- **Sharded data parallelism** (ZeRO-3, arXiv:1910.02054; torch's `fully_shard`): weights, gradients and moments of a
  block are divided over all W processes, those of its experts over the `efsdp` processes that hold the same ones.
- **Divided experts beside replicated weights** (`Layout.replicated`): the rest is on all processes, and gradients are
  summed by all-reduce: for `fully_shard` a mesh whose second dimension, over which it shards, has one process.

Parameters are DTensors at the boundary (state dict, optimizer) and plain local tensors in forward. Gradients are
*summed* over processes, and the loss is divided by W: a divide factor is wrong for experts where efsdp = 1, since torch
2.13 divides twice on a mesh of one process with a forced sum.

Lightning's `ModelParallelStrategy` brings launch, process groups and barriers. `MoEParallelStrategy` has what differs:
the mesh and the sharding, the loss divided by the number of processes (gradients are summed), and checkpoints of whole
tensors. State dictionaries and optimizers are torch's own with DTensors in them, so that guard, moving average and
resuming work on parts as they do on whole tensors.

Axes: D width, E experts, W processes, E' = E / W experts of this one, R rows that a process sends, R' that it gets.
"""

# ruff: noqa: D102 (Lightning's hooks)

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from moevision.data import ImageDataModule
from moevision.data.loader import eval_batches
from moevision.errors import UserError
from moevision.layers import MoEMlp, moe_layers
from moevision.layers.cpu import padded_counts, sum_rows, take_rows
from moevision.layers.moe import LocalDispatcher
from moevision.layers.routing import Dispatched, Routing
from moevision.train.checkpoint import SafeCheckpointIO
from moevision.train.lightning_internals import configure_data_parallel
from moevision.train.optim import parameter_groups
from moevision.train.parallel.parts import (
    SHARDED,
    divide,
    filled,
    gathered,
    is_sharded,
    like_these,
    local_shard,
    outline,
)
from moevision.train.task import ClassificationTask
from moevision.types import State, TimmModel

PRECISIONS = ("32-true", "64-true", "bf16-mixed")


@dataclass(frozen=True)
class Layout:
    """Which processes share what."""

    world: DeviceMesh  # all W processes; the dense weights are divided among them
    # [efsdp, ep]; experts are divided among the `ep` processes of a row, and each process's part of them once more
    # among the `efsdp` processes of a column. None: experts are sharded with their block.
    experts: DeviceMesh | None = None
    replicated: bool = False  # nothing but the experts is divided; `world` is then [W, 1] and `experts` [efsdp, 1, ep]

    @classmethod
    def of(cls, device_type: str, expert: int = 1, *, replicated: bool = False) -> Layout:
        """The layout of all processes, with `expert` as ep; every one of them must call it."""
        size = dist.get_world_size()
        mesh = functools.partial(init_device_mesh, device_type)
        if replicated:
            world = mesh((size, 1), mesh_dim_names=("world", "one"))
            experts = mesh((size // expert, 1, expert), mesh_dim_names=("efsdp", "one", "ep"))
            return cls(world, experts, replicated=True)
        world = mesh((size,), mesh_dim_names=("world",))
        if expert == 1:
            return cls(world)
        return cls(world, mesh((size // expert, expert), mesh_dim_names=("efsdp", "ep")))


def check_divides(expert: int, processes: int) -> None:
    """Raise a UserError for an expert parallelism that the number of processes is no multiple of."""
    if expert < 1 or processes % expert:
        raise UserError(
            f"--parallel.expert is {expert}, which does not divide the {processes} processes: use a divisor of "
            f"{processes}."
        )


def check_network(net: nn.Module, expert: int) -> None:
    """Raise a UserError for a network, not sharded yet, whose experts can't be divided among `expert` processes."""
    if expert == 1:
        return
    layers = moe_layers(net)
    if not layers:
        raise UserError(
            "--parallel.expert needs a model with experts; this one has none: leave it out."
        )
    for layer in layers:
        count = layer.router.num_experts
        if count % expert:
            raise UserError(
                f"--parallel.expert is {expert}, which does not divide the {count} experts of block "
                f"{layer.layer_index}: use a divisor of {count}."
            )
        if layer.experts.backend == "dense":
            raise UserError(
                "The dense backend computes every expert on every token, so that no token has to travel: leave "
                "--parallel.expert or --model.arch.backend out."
            )


def same_everywhere(net: nn.Module, device: torch.device) -> None:
    """Give all processes the weights and buffers of the first one, over `device`; they stay where they are."""
    for tensor in net.state_dict().values():
        sent = tensor.to(device)
        dist.broadcast(sent, src=0)
        tensor.copy_(sent)


@torch.no_grad()
def share_buffers(net: nn.Module) -> None:
    """Give all processes the first one's running statistics (BatchNorm), in one message.

    DDP does so before each forward pass. Every process sees batches of its own, and only the first one's statistics are
    saved: a resumed training would go on from others in the other processes.
    """
    buffers = [buffer for buffer in net.buffers() if buffer.is_floating_point()]
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.broadcast(flat, src=0)
    parts = flat.split([buffer.numel() for buffer in buffers])
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.copy_(part.view_as(buffer))


def shard(
    net: TimmModel, layout: Layout, gathered: torch.dtype | None = None, *, offload: bool = False
) -> nn.Module:
    """Divide a timm model over the processes of a layout, in place; all of them have the same weights before.

    `gathered` is autocast's dtype, in which the experts' weights then travel: they are cast to it in any case before
    they are used. Everything else, routers and norms with it, travels as it is stored. With `offload` parts of weights
    and gradients, and so the optimizer's moments, stay in main memory (FSDP2's offload): a block's weights go to the
    device while it computes. Collectives of parts are then gloo's.
    """
    logging.getLogger("torch.distributed.tensor._redistribute").addFilter(_not_in_two_steps)
    cast_experts = MixedPrecisionPolicy(
        gathered, torch.float32 if gathered else None, cast_forward_inputs=False
    )
    offload_policy = OffloadPolicy()
    if offload:
        offload_policy = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    shard_over = functools.partial(_shard_over, offload_policy=offload_policy)

    # Only `forward` makes FSDP2 gather, so that experts are a unit of their own; the block shards the rest.
    for layer in moe_layers(net):
        if layout.experts is not None:
            _divide_experts(layer, layout.experts["ep"])
            same_experts = layout.experts[("efsdp", "one") if layout.replicated else ("efsdp",)]
            shard_over(same_experts, layer.experts, mp_policy=cast_experts)
        elif gathered is not None and layer.experts.backend != "dense":  # which bypasses it
            shard_over(layout.world, layer.experts, mp_policy=cast_experts)
    for block in net.blocks:
        shard_over(layout.world, block)
    # True: after a forward pass without a backward pass the state must be that of the shards, too.
    shard_over(layout.world, net, reshard_after_forward=True)

    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return cast(nn.Module, net)


def _divide_experts(layer: MoEMlp, mesh: DeviceMesh) -> None:
    """Leave a layer the weights of this process's experts, and let its tokens travel to all of them."""
    for linear in layer.experts.children():
        for name, weight in list(linear.named_parameters(recurse=False)):
            divided = distribute_tensor(weight.detach(), mesh, [Shard(0)])  # [E, ...]
            setattr(linear, name, nn.Parameter(divided, requires_grad=weight.requires_grad))
    layer.dispatcher = AllToAllDispatcher(mesh.get_group())


def _shard_over(mesh: DeviceMesh, module: nn.Module, **options: Any) -> None:
    """`fully_shard`, with each parameter cut along the first dimension that the number of processes divides.

    FSDP2 pads the first one: 8 experts over 64 processes would lie on 8 of them, and be gathered as if they were 64.
    """
    processes = mesh.size(-1)

    def cut(parameter: nn.Parameter) -> Shard:
        sizes = local_shard(parameter).shape
        divisible = [dim for dim, size in enumerate(sizes) if size % processes == 0]
        return Shard(divisible[0] if divisible else 0)

    fully_shard(module, mesh=mesh, shard_placement_fn=cut, **options)


def _not_in_two_steps(record: logging.LogRecord) -> bool:
    """Leaves out DTensor's warning of a gathering in two steps: over efsdp and over ep, which is meant."""
    return not str(record.msg).startswith("While redistributing from")


# ---- how tokens reach their experts


@dataclass(frozen=True, kw_only=True)
class ExpertParallelDispatch(Dispatched):
    """Rows [R', D] on their way to the processes of their experts, in order of arrival: by process, then by expert."""

    home: Dispatched  # the rows of this process before they were sent
    row_of_arrival: Tensor  # [R'] int64, row at which the experts see each row that arrives
    arrival_of_row: Tensor  # [R' + padding] int64, its inverse; row 0 where there is padding
    sent: list[int]  # rows that went to each process
    received: list[int]  # rows that came from each process


class AllToAllDispatcher(LocalDispatcher):
    """Dispatch to experts on all processes of a group, in order of experts; every process must call it equally often.

    How many rows travel is known only after routing, so counts are exchanged first; the host must know them, which is
    the one synchronisation. Torch's functional `all_to_all_single_autograd` starts the transfer and doesn't wait for
    it: what is computed before `receive` (shared experts) overlaps with it. Its backward pass is the transfer back.

    Rows that arrive get padding, as by `LocalDispatcher`; it is never sent.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group
        self.size = dist.get_world_size(group)
        self._home = LocalDispatcher(pad=False)

    def dispatch(self, x: Tensor, routing: Routing) -> ExpertParallelDispatch:
        """Begin to send the tokens x [T, D] of this process to their experts."""
        home = self._home.dispatch(x, routing)
        # How many rows go to each expert of each process, and how many come from each.
        to_each = home.counts.view(self.size, -1).contiguous()  # [W, E']
        from_each = torch.empty_like(to_each)  # [W, E']
        dist.all_to_all_single(from_each, to_each, group=self.group)
        sent, received = torch.stack([to_each.sum(1), from_each.sum(1)]).tolist()
        rows = self._travel(home.rows, sent, received)

        counts = from_each.sum(0)  # [E']
        padded = padded_counts(counts, x)
        row_of_arrival = _row_of_arrival(from_each, padded, sum(received))
        length = int(padded.sum()) if padded is not counts else sum(received)
        arrivals = torch.arange(sum(received), device=x.device)
        arrival_of_row = arrivals.new_zeros(length).index_copy_(0, row_of_arrival, arrivals)
        return ExpertParallelDispatch(
            rows,
            padded,
            home=home,
            row_of_arrival=row_of_arrival,
            arrival_of_row=arrival_of_row,
            sent=sent,
            received=received,
        )

    def receive(self, sent: Dispatched) -> tuple[Tensor, Tensor]:
        """Wait for the rows of this process's experts: [R' + padding, D] sorted by expert, and counts [E']."""
        assert isinstance(sent, ExpertParallelDispatch)
        rows = take_rows(_arrived(sent.rows), sent.arrival_of_row, sent.row_of_arrival.unsqueeze(1))
        return rows, sent.counts

    def combine(self, rows: Tensor, dispatched: Dispatched, routing: Routing) -> Tensor:
        """Send the experts' rows back; weighted sum [T, D] of those that return."""
        assert isinstance(dispatched, ExpertParallelDispatch)
        to_arrival, to_row = dispatched.row_of_arrival, dispatched.arrival_of_row
        if len(to_arrival) == len(to_row):
            ordered = take_rows(rows, to_arrival, to_row.unsqueeze(1))
        else:  # rows of padding must get no gradient
            ones = rows.new_ones(len(to_arrival), 1)
            ordered = sum_rows(rows, ones, to_row, to_arrival.unsqueeze(1))
        returned = _arrived(self._travel(ordered, dispatched.received, dispatched.sent))
        return self._home.combine(returned, dispatched.home, routing)

    def _travel(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        return functional.all_to_all_single_autograd(rows.contiguous(), received, sent, self.group)


def _row_of_arrival(from_each: Tensor, padded: Tensor, total: int) -> Tensor:
    """Where each of the arriving rows [R'] goes: they come by (process, expert), and experts want (expert, process).

    `from_each` [W, E'] are the lengths of the groups, `padded` [E'] the rows of each expert with its padding.
    """
    expert_begin = padded.cumsum(0) - padded  # [E']
    begin = expert_begin + from_each.cumsum(0) - from_each  # [W, E']
    lengths = from_each.flatten()
    shift = begin.flatten() - (lengths.cumsum(0) - lengths)
    arrivals = torch.arange(total, device=padded.device)
    return arrivals + shift.repeat_interleave(lengths, output_size=total)


def _arrived(rows: Tensor) -> Tensor:
    # On a CPU this waits, on a GPU the current stream does.
    return rows.wait() if isinstance(rows, functional.AsyncCollectiveTensor) else rows


# ---- the strategy


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
            images = len(data.contents.datasets[split])
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
        configure_data_parallel(self, "cpu:gloo,cuda:nccl" if needs_gloo else None)
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
