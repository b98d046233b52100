"""Divided tensors (DTensors): norms, clipping, optimizers and copies of networks that hold them.

Parameters live on two meshes, and torch's norm and clipping want one: `total_norm` and `clip` work on each process's
parts. Optimizers take lists over several meshes (torch 2.13).
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._pytree import SequenceKey, tree_map_only, tree_map_with_path

from moevision.layers.experts import local
from moevision.train import optim

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def mesh_of(x: Tensor | None) -> DeviceMesh | None:
    """The processes that a tensor is divided over; None if it isn't."""
    return getattr(x, "device_mesh", None)


def is_sharded(net: nn.Module) -> bool:
    """Whether some parameters of a network are divided."""
    return any(mesh_of(parameter) is not None for parameter in net.parameters())


def local_shard(x: Tensor) -> Tensor:
    """The numbers of a tensor that this process holds, detached."""
    return local(x.detach())


def first_index(x: Tensor) -> tuple[int, ...]:
    """Where, in the whole tensor, the part that this process holds begins: an index for each dimension."""
    if not isinstance(x, DTensor):
        return (0,) * x.dim()
    return compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)[1]


def copies(x: Tensor) -> int:
    """How many processes hold the part of a tensor that this one holds; 0 if it isn't divided."""
    if not isinstance(x, DTensor):
        return 0
    sizes = zip(x.device_mesh.shape, x.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_replicate())


def to_full_tensor(x: Tensor) -> Tensor:
    """A divided tensor as a whole; every process that holds a part must call it. Others are returned as they are."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor that all processes have, divided as `like` is."""
    if not isinstance(like, DTensor):
        return whole
    shape, begin = compute_local_shape_and_global_offset(
        whole.shape, like.device_mesh, like.placements
    )
    part = whole
    for dim, length in enumerate(shape):
        part = part.narrow(dim, begin[dim], length)
    part = part.contiguous().to(like.device, copy=True)
    return _with_part(part, like)


def _with_part(part: Tensor, like: DTensor) -> DTensor:
    # `DTensor.from_local` would move a part that lies in main memory to the device of the mesh.
    meta = TensorMeta(like.shape, like.stride(), part.dtype)
    spec = DTensorSpec(like.device_mesh, like.placements, tensor_meta=meta)
    return DTensor(part, spec, requires_grad=False)


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """2-norm over tensors, the same scalar on every process.

    The squares of all processes' parts add up, those that several of them hold once.
    """
    parts: defaultdict[int, list[Tensor]] = defaultdict(list)  # by the number of copies
    for tensor in tensors:
        parts[copies(tensor)].append(local_shard(tensor))
    undivided = torch.nn.utils.get_total_norm(parts.pop(0, []))
    if not parts:
        return undivided
    squares = undivided.new_zeros(
        (), dtype=torch.double
    )  # float32 would overflow at a norm of 1.8e19
    for count, tensors_of_count in parts.items():
        norm = torch.nn.utils.get_total_norm(tensors_of_count)
        squares = squares + norm.double().square() / count
    dist.all_reduce(squares)
    return (squares + undivided.double().square()).sqrt().to(norm.dtype)


def clip(parameters: Iterable[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scale gradients, whose norm over all meshes is known, to at most `limit`, in place; by torch's rule."""
    gradients = [local_shard(p.grad) for p in parameters if p.grad is not None]
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, scale)


class Muon(optim.Muon):
    """Muon for divided weights.

    A divided matrix is gathered for its update, one at a time; every process then computes the same and keeps its part.
    Experts [E, out, in] are gathered only where they are cut within their matrices: processes don't divide E.
    """

    def _direction(self, update: Tensor, gradient: Tensor) -> Tensor:
        if not isinstance(update, DTensor):
            return super()._direction(update, gradient)
        dims = [placed.dim for placed in update.placements if isinstance(placed, Shard)]
        has_whole_experts = update.ndim == 3 and not any(dims)  # cut along E alone
        if has_whole_experts:
            part = super()._direction(local(update), local(gradient))
            return _with_part(part, update)
        whole = super()._direction(to_full_tensor(update), to_full_tensor(gradient))
        return shard_like(whole, update)


SHARDED = optim.TensorOperations(total_norm, clip, {"adamw": torch.optim.AdamW, "muon": Muon})


def outline(net: nn.Module) -> nn.Module:
    """A copy of a network that isn't sharded, with parameters that have shapes and no memory: `filled` gives values."""
    parameters = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in net.parameters()
    }
    return copy.deepcopy(net, parameters)


def filled(outline: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """A copy of an outline that holds the tensors of a state, whole or sharded ones; FSDP2 itself has no copies."""
    copied = copy.deepcopy(outline)
    copied.load_state_dict(state, assign=True)
    return copied


def gathered(state: Any) -> Any:
    """A nest of dictionaries and lists with its tensors whole and in main memory on the first process, None on others.

    Every process must call it.
    """
    is_first = dist.get_rank() == 0

    def whole(x: Tensor) -> Tensor | None:
        tensor = to_full_tensor(x.detach())  # one by one: no device ever has all of them whole
        return tensor.to("cpu", copy=True) if is_first else None

    return tree_map_only(Tensor, whole, state)


# ---- a checkpoint, in which all tensors are whole, becomes one of parts

KeyPath = tuple[str | int, ...]  # keys and indices that lead to a value in a checkpoint
Like = Callable[[KeyPath], Tensor | None]
"""A tensor that is divided as the one at this path shall be; None: it shall be whole."""


def divide(checkpoint: dict[str, Any], like: Like) -> dict[str, Any]:
    """A checkpoint, the same on all processes, with those tensors divided that shall be."""

    def divided(steps: tuple[Any, ...], value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        path = tuple(step.idx if isinstance(step, SequenceKey) else step.key for step in steps)
        model = like(path)
        return value if model is None else shard_like(value, model)

    result: dict[str, Any] = tree_map_with_path(divided, checkpoint)
    return result


def like_these(weights: Mapping[str, Tensor], learning: Sequence[Tensor]) -> Like:
    """Weights and moments divided as these parameters, by their names and in the optimizer's order, are."""

    def like(path: KeyPath) -> Tensor | None:
        parameter: Tensor | None = None
        match path:
            # The second holds the weights in training beside their moving average.
            case ("state_dict" | "current_model_state", str(name)):
                parameter = weights.get(name)
            case ("optimizer_states", _, "state", int(index), str(moment)) if moment != "step":
                parameter = learning[index]
        if parameter is None or mesh_of(parameter) is None:
            return None
        return parameter.detach()

    return like
