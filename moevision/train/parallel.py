"""One network over several processes: experts divided among them, everything else sharded by FSDP2.

- **Expert parallelism** (GShard, arXiv:2006.16668): the W processes form a mesh (efsdp, ep). Each row of `ep` processes
  holds every expert once, E / ep of them per process, and exchanges tokens by all-to-all (`layers/all_to_all.py`). All
  W processes read images of their own: expert parallelism is carved out of data parallelism.
- **Sharded data parallelism** (ZeRO-3, arXiv:1910.02054; torch's `fully_shard`): weights, gradients and moments of a
  block are divided over all W processes, those of its experts over the `efsdp` processes that hold the same ones, each
  along a dimension that they divide evenly. A block's weights are gathered while it computes.
- **Divided experts beside replicated weights** (`Layout.replicated`): what would be divided over all W or over efsdp
  processes is on all of them, and gradients are summed by all-reduce. For `fully_shard` that is a mesh whose second
  dimension, over which it shards, has one process.

What a network's parameters are then: DTensors at the boundary (state dict, optimizer), plain local tensors in forward
(`Experts` reads them through `local`). FSDP2 gathers dense weights into plain tensors by itself.

Gradients are *summed* over processes, everywhere, and the loss is divided by W. Dividing by a factor instead is wrong
for experts where efsdp = 1: torch 2.13 divides twice on a mesh of one process with a forced sum.

Parameters then live on two meshes, and most of torch's functions on lists of tensors want one: `total_norm` and `clip`
work on each process's own parts, `by_mesh` does each mesh by itself.

Axes: E experts, W processes.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moevision.errors import UserError
from moevision.layers import moe_layers
from moevision.layers.experts import local

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Layout:
    """Which processes share what.

    Attributes:
        world: all W processes; the dense weights are divided among them.
        experts: [efsdp, ep]; experts are divided among the `ep` processes of a row, and each process's part of them
            once more among the `efsdp` processes of a column. None: experts are sharded with their block.
        replicated: whether nothing but the experts, over `ep`, is divided; `world` is then [W, 1] and `experts`
            [efsdp, 1, ep].
    """

    world: DeviceMesh
    experts: DeviceMesh | None = None
    replicated: bool = False

    @classmethod
    def of(cls, device_type: str, expert: int = 1, *, replicated: bool = False) -> Layout:
        """The layout of all processes that are there; every one of them must call it.

        Args:
            device_type: `cpu` or `cuda`.
            expert: ep, among how many processes one set of experts is divided.
            replicated: as the attribute.

        Raises:
            UserError: if it doesn't divide the number of processes.
        """
        from torch.distributed.device_mesh import init_device_mesh

        size = dist.get_world_size()
        check_divides(expert, size)
        if replicated:
            world = init_device_mesh(device_type, (size, 1), mesh_dim_names=("world", "one"))
            sizes, names = (size // expert, 1, expert), ("efsdp", "one", "ep")
            return cls(world, init_device_mesh(device_type, sizes, mesh_dim_names=names), replicated=True)
        world = init_device_mesh(device_type, (size,), mesh_dim_names=("world",))
        if expert == 1:
            return cls(world)
        return cls(world, init_device_mesh(device_type, (size // expert, expert), mesh_dim_names=("efsdp", "ep")))


def check_divides(expert: int, processes: int) -> None:
    """Refuse an expert parallelism that the number of processes is no multiple of.

    Raises:
        UserError: if so.
    """
    if expert < 1 or processes % expert:
        raise UserError(
            f"--parallel.expert is {expert}, which does not divide the {processes} processes: use a divisor of "
            f"{processes}."
        )


def check_network(net: nn.Module, expert: int) -> None:
    """Refuse a network whose experts can't be divided.

    Args:
        net: a network that isn't sharded yet.
        expert: ep.

    Raises:
        UserError: for no experts, a number of them that `expert` doesn't divide, or the dense backend.
    """
    if expert == 1:
        return
    layers = moe_layers(net)
    if not layers:
        raise UserError("--parallel.expert needs a model with experts; this one has none: leave it out.")
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
    for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))


def shard(net: nn.Module, layout: Layout, gathered: torch.dtype | None = None, *, offload: bool = False) -> nn.Module:
    """Divide a network over the processes of a layout, in place; all of them have the same weights before.

    Args:
        net: a timm model with `blocks`.
        layout: the processes.
        gathered: autocast's dtype, in which the experts' weights then travel: they are cast to it in any case before
            they are used. Everything else, routers and norms with it, travels as it is stored.
        offload: keep parts of weights and gradients, and so the optimizer's moments, in main memory (FSDP2's offload):
            a block's weights go to the device while it computes. Collectives of parts are then gloo's.

    Raises:
        UserError: if its experts can't be divided.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy
    from torch.distributed.fsdp import fully_shard as shard_whole

    whole = _evenly(layout.world.size(-1))
    logging.getLogger("torch.distributed.tensor._redistribute").addFilter(_not_in_two_steps)
    check_network(net, 1 if layout.experts is None else layout.experts["ep"].size())
    policy = MixedPrecisionPolicy(gathered, torch.float32 if gathered else None, cast_forward_inputs=False)
    kept = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy()
    fully_shard = functools.partial(shard_whole, offload_policy=kept)
    for layer in moe_layers(net):
        # Only `forward` makes FSDP2 gather, so that experts are a unit of their own; the block shards the rest.
        if layout.experts is not None:
            _divide_experts(layer.experts, layout.experts["ep"])
            layer.dispatcher = _all_to_all(layout.experts["ep"].get_group(), layer.dispatcher)
            same = layout.experts[("efsdp", "one") if layout.replicated else ("efsdp",)]
            fully_shard(layer.experts, mesh=same, mp_policy=policy, shard_placement_fn=_evenly(same.size(-1)))
        elif gathered is not None and layer.experts.backend != "dense":  # which bypasses it
            fully_shard(layer.experts, mesh=layout.world, mp_policy=policy, shard_placement_fn=whole)
    for block in cast(Any, net).blocks:
        fully_shard(block, mesh=layout.world, shard_placement_fn=whole)
    # True: after a forward pass without a backward pass the state must be that of the shards, too.
    fully_shard(net, mesh=layout.world, reshard_after_forward=True, shard_placement_fn=whole)
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return net


def _not_in_two_steps(record: logging.LogRecord) -> bool:
    """Leaves out DTensor's warning of a gathering in two steps: over efsdp and over ep, which is meant."""
    return not str(record.msg).startswith("While redistributing from")


def _evenly(processes: int) -> Callable[[nn.Parameter], Any]:
    """Says along which dimension to cut a parameter: the first that the number of processes divides, else the first.

    FSDP2 pads the first one: 8 experts over 64 processes would lie on 8 of them, and be gathered as if they were 64.
    """
    from torch.distributed.tensor import Shard

    def cut(parameter: nn.Parameter) -> Shard:
        sizes = own_part(parameter).shape
        return Shard(next((dim for dim, size in enumerate(sizes) if size % processes == 0), 0))

    return cut


def _all_to_all(group: dist.ProcessGroup, local_one: Any) -> Any:
    from moevision.layers.all_to_all import AllToAllDispatcher

    return AllToAllDispatcher(group, local_one.row_multiple, local_one.max_padding)


def _divide_experts(experts: nn.Module, ep: DeviceMesh) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    for linear in experts.children():
        for name, weight in list(linear.named_parameters(recurse=False)):
            divided = distribute_tensor(weight.detach(), ep, [Shard(0)])  # [E, ...]
            setattr(linear, name, nn.Parameter(divided, requires_grad=weight.requires_grad))


def is_sharded(net: nn.Module) -> bool:
    """Whether `shard` has divided it."""
    return any(mesh_of(parameter) is not None for parameter in net.parameters())


def mesh_of(x: Tensor | None) -> DeviceMesh | None:
    """The processes that a tensor is divided over; None if it isn't."""
    return getattr(x, "device_mesh", None)


def copies(x: Tensor) -> int:
    """How many processes hold the part of a tensor that this one holds; 0 if it isn't divided."""
    mesh = mesh_of(x)
    if mesh is None:
        return 0
    placements = cast("DTensor", x).placements
    return math.prod(mesh.size(dim) for dim, placement in enumerate(placements) if placement.is_replicate())


def full(x: Tensor) -> Tensor:
    """A divided tensor as a whole; every process that holds a part must call it. Others are returned as they are."""
    return x if mesh_of(x) is None else cast("DTensor", x).full_tensor()


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor that all processes have, divided as `like` is."""
    mesh = mesh_of(like)
    if mesh is None:
        return whole
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(whole.shape, mesh, cast("DTensor", like).placements)
    part = whole[tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))]
    return with_part(part.contiguous().to(like.device), like)


def with_part(part: Tensor, like: Tensor) -> Tensor:
    """A tensor that is divided as `like` is, and of which this process holds `part`."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    mesh, placements = cast("DeviceMesh", mesh_of(like)), cast(DTensor, like).placements
    meta = TensorMeta(like.shape, like.stride(), part.dtype)
    # `DTensor.from_local` would move a part that lies in main memory to the device of the mesh.
    return DTensor(part, DTensorSpec(mesh, placements, tensor_meta=meta), requires_grad=False)


def first_index(x: Tensor) -> Sequence[int]:
    """Where, in the whole tensor, the part that this process holds begins: an index for each dimension."""
    mesh = mesh_of(x)
    if mesh is None:
        return [0] * x.dim()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(x.shape, mesh, cast("DTensor", x).placements)[1]


def grouped_by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors, those on the same mesh together; plain ones are a group too."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(mesh_of(tensor), []).append(tensor)
    return list(groups.values())


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """2-norm over tensors, the same scalar on every process.

    The squares of all processes' parts add up, those that several of them hold once.
    """
    parts: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        parts.setdefault(copies(tensor), []).append(own_part(tensor))
    whole = parts.pop(0, [])
    norm = torch.nn.utils.get_total_norm(whole)
    if not parts:
        return norm
    norms = {count: torch.nn.utils.get_total_norm(each) for count, each in parts.items()}
    # float32 would overflow at a norm of 1.8e19
    squares = sum(
        (own.double().square() / count for count, own in norms.items()), norm.new_zeros((), dtype=torch.double)
    )
    dist.all_reduce(squares)
    return (squares + norm.double().square()).sqrt().to(next(iter(norms.values())).dtype)


def clip(parameters: Iterable[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scale gradients, whose norm over all meshes is known, so that it is at most `limit`; in place."""
    whole = [parameter for parameter in parameters if parameter.grad is not None]
    parts = [own_part(cast(Tensor, each.grad)) for each in whole if mesh_of(each.grad) is not None]
    if not parts:
        torch.nn.utils.clip_grads_with_norm_(whole, limit, norm)
        return
    torch._foreach_mul_(parts, (limit / (norm + 1e-6)).clamp(max=1.0))  # torch's rule


def by_mesh(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups, each cut into parts of one mesh, for a fused step; as they are if nothing is sharded."""
    if all(mesh_of(parameter) is None for group in groups for parameter in group["params"]):
        return list(groups)
    return [{**group, "params": part} for group in groups for part in grouped_by_mesh(group["params"])]


def outline(net: nn.Module) -> nn.Module:
    """A copy of a network that isn't sharded, with parameters that have shapes and no memory: `filled` gives values."""
    known = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in net.parameters()
    }
    return copy.deepcopy(net, known)


def filled(outline: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """A copy of an outline that holds the tensors of a state, whole or sharded ones; FSDP2 itself has no copies."""
    copied = copy.deepcopy(outline)
    copied.load_state_dict(state, assign=True)
    return copied


@torch.no_grad()
def gathered_state(net: nn.Module) -> dict[str, Tensor]:
    """The whole state of a sharded network in main memory, tensor by tensor; every process must call it.

    Only the first process keeps it; the others get an empty one.
    """
    state = {}
    for name, tensor in net.state_dict().items():
        whole = full(tensor.detach())
        if dist.get_rank() == 0:
            state[name] = whole.to("cpu", copy=True)
    return state


def own_part(x: Tensor) -> Tensor:
    """The numbers of a tensor that this process holds, detached."""
    return local(x.detach())
