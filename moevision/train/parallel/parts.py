"""Divided tensors (DTensors): norms, clipping, optimizers and copies of networks that hold them.

Parameters live on two meshes, and most of torch's functions on lists of tensors want one: `total_norm` and `clip` work
on each process's own parts, the optimizers do each mesh by itself.
"""

from __future__ import annotations

import copy
import math
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
    return math.prod(
        x.device_mesh.size(dim) for dim, placed in enumerate(x.placements) if placed.is_replicate()
    )


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
    part = whole[
        tuple(slice(start, start + length) for start, length in zip(begin, shape, strict=True))
    ]
    return _with_part(part.contiguous().to(like.device, copy=True), like)


def _with_part(part: Tensor, like: DTensor) -> DTensor:
    # `DTensor.from_local` would move a part that lies in main memory to the device of the mesh.
    meta = TensorMeta(like.shape, like.stride(), part.dtype)
    return DTensor(
        part, DTensorSpec(like.device_mesh, like.placements, tensor_meta=meta), requires_grad=False
    )


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """2-norm over tensors, the same scalar on every process.

    The squares of all processes' parts add up, those that several of them hold once.
    """
    parts: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        parts.setdefault(copies(tensor), []).append(local_shard(tensor))
    norm = torch.nn.utils.get_total_norm(parts.pop(0, []))  # of tensors that aren't divided
    if not parts:
        return norm
    norms = {count: torch.nn.utils.get_total_norm(each) for count, each in parts.items()}
    squares = norm.new_zeros((), dtype=torch.double)  # float32 would overflow at a norm of 1.8e19
    for count, own in norms.items():
        squares = squares + own.double().square() / count
    dist.all_reduce(squares)
    return (squares + norm.double().square()).sqrt().to(next(iter(norms.values())).dtype)


def clip(parameters: Iterable[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scale gradients, whose norm over all meshes is known, to at most `limit`, in place; by torch's rule."""
    parts = [local_shard(parameter.grad) for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(parts, (limit / (norm + 1e-6)).clamp(max=1.0))


class _MeshByMesh(torch.optim.Optimizer):
    """A fused step wants weights of one mesh. Groups stay as given for schedule and checkpoint."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        groups = self.param_groups
        self.param_groups = []
        for group in groups:
            by_mesh: dict[Any, list[Tensor]] = {}
            for parameter in group["params"]:
                by_mesh.setdefault(mesh_of(parameter), []).append(parameter)
            self.param_groups += [{**group, "params": part} for part in by_mesh.values()]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


class AdamW(_MeshByMesh, torch.optim.AdamW):
    """torch's AdamW for weights on several meshes."""


class Muon(_MeshByMesh, optim.Muon):
    """Muon for weights on several meshes.

    A divided matrix is gathered for its update, one at a time; every process then computes the same and keeps its part.
    Experts [E, out, in] are gathered only where they are cut within their matrices: processes don't divide E.
    """

    def _direction(self, update: Tensor, gradient: Tensor) -> Tensor:
        if not isinstance(update, DTensor):
            return super()._direction(update, gradient)
        within = any(isinstance(placed, Shard) and placed.dim > 0 for placed in update.placements)
        if update.ndim == 3 and not within:
            return _with_part(super()._direction(local(update), local(gradient)), update)
        return shard_like(
            super()._direction(to_full_tensor(update), to_full_tensor(gradient)), update
        )


SHARDED = optim.TensorOperations(total_norm, clip, {"adamw": AdamW, "muon": Muon})


def outline(net: nn.Module) -> nn.Module:
    """A copy of a network that isn't sharded, with parameters that have shapes and no memory: `filled` gives values."""
    known = {
        id(parameter): nn.Parameter(
            torch.empty_like(parameter, device="meta"), parameter.requires_grad
        )
        for parameter in net.parameters()
    }
    return copy.deepcopy(net, known)


def filled(outline: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """A copy of an outline that holds the tensors of a state, whole or sharded ones; FSDP2 itself has no copies."""
    copied = copy.deepcopy(outline)
    copied.load_state_dict(state, assign=True)
    return copied


def gathered(state: Any) -> Any:
    """A nest of dictionaries and lists with its tensors whole and in main memory on the first process, None on others.

    Every process must call it.
    """
    first = dist.get_rank() == 0

    def whole(x: Tensor) -> Tensor | None:
        found = to_full_tensor(x.detach())  # one by one: no device ever has all of them whole
        return found.to("cpu", copy=True) if first else None

    return tree_map_only(Tensor, whole, state)


# ---- a checkpoint, in which all tensors are whole, becomes one of parts

Place = tuple[str | int, ...]  # keys and indices that lead to a value in a checkpoint
Like = Callable[[Place], Tensor | None]
"""A tensor that is divided as the one at this place shall be; None: it shall be whole."""


def divide(checkpoint: dict[str, Any], like: Like) -> dict[str, Any]:
    """A checkpoint, the same on all processes, with those tensors divided that shall be."""

    def each(path: tuple[Any, ...], value: Any) -> Any:
        place = tuple(step.idx if isinstance(step, SequenceKey) else step.key for step in path)
        model = like(place) if isinstance(value, Tensor) else None
        return value if model is None else shard_like(value, model)

    result: dict[str, Any] = tree_map_with_path(each, checkpoint)
    return result


def like_these(weights: Mapping[str, Tensor], learning: Sequence[Tensor]) -> Like:
    """Weights and moments divided as these parameters, by their names and in the optimizer's order, are."""

    def like(place: Place) -> Tensor | None:
        found = None
        if place[0] in ("state_dict", "current_model_state"):  # the second: beside a moving average
            found = weights.get(str(place[1]))
        elif (
            place[0] == "optimizer_states" and place[2] == "state" and place[4] != "step"
        ):  # a number is nobody's part
            found = learning[int(place[3])]
        return None if found is None or mesh_of(found) is None else found.detach()

    return like
