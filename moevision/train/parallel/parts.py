"""Divided tensors (DTensors): norms, clipping, optimizers, checkpoints and copies of networks that hold them.

Terms: a tensor is *divided* if it is a DTensor, whose *part* (local shard) each process holds; other tensors are
*whole*.

The parameters of one network are divided over two meshes. Torch's norm and clipping accept one mesh only, so
`total_norm` and `clip` work on each process's parts. Optimizers accept several meshes (torch 2.13).
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._pytree import SequenceKey, tree_map_only, tree_map_with_path

from moevision.layers.experts import local
from moevision.train import optim
from moevision.types import State


def is_sharded(net: nn.Module) -> bool:
    """Whether some parameters of a network are divided."""
    return any(isinstance(parameter, DTensor) for parameter in net.parameters())


def local_shard(x: Tensor) -> Tensor:
    """The part of a tensor that this process holds (all of a whole tensor), detached."""
    return local(x.detach())


def first_index(x: Tensor) -> tuple[int, ...]:
    """Offset of this process's part in the whole tensor, in each dimension."""
    if not isinstance(x, DTensor):
        return (0,) * x.dim()
    return compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)[1]


def copies(x: Tensor) -> int:
    """How many processes hold the same part of a tensor as this one, itself included; 0 for a whole tensor."""
    if not isinstance(x, DTensor):
        return 0
    sizes = zip(x.device_mesh.shape, x.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_replicate())


def to_full_tensor(x: Tensor) -> Tensor:
    """Gather a divided tensor: every process that holds a part must call it. A whole tensor is returned unchanged."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """Divide a whole tensor, which all processes have, in the same way as `like`."""
    if not isinstance(like, DTensor):
        return whole
    lengths, offsets = compute_local_shape_and_global_offset(
        whole.shape, like.device_mesh, like.placements
    )
    part = whole
    for dim, length in enumerate(lengths):
        part = part.narrow(dim, offsets[dim], length)
    part = part.contiguous().to(like.device, copy=True)
    return _dtensor_of_shard(part, like)


def _dtensor_of_shard(part: Tensor, like: DTensor) -> DTensor:
    """The DTensor, divided as `like`, of which `part` is this process's part."""
    # Not `DTensor.from_local`: it moves a part in CPU memory (offloaded parameters) to the device of the mesh.
    meta = TensorMeta(like.shape, like.stride(), part.dtype)
    spec = DTensorSpec(like.device_mesh, like.placements, tensor_meta=meta)
    return DTensor(part, spec, requires_grad=False)


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """2-norm over all elements of all tensors, the same scalar on every process.

    Each process adds up the squares of its parts, divided by the number of processes that hold the same part, so that
    every element counts once in the sum over processes. Whole tensors are the same everywhere and are added afterwards.
    """
    shards_by_copies: defaultdict[int, list[Tensor]] = defaultdict(list)  # 0 copies: whole
    for tensor in tensors:
        shards_by_copies[copies(tensor)].append(local_shard(tensor))

    undivided_norm = torch.nn.utils.get_total_norm(shards_by_copies.pop(0, []))
    if not shards_by_copies:
        return undivided_norm

    # In float64: squares in float32 would overflow at a norm of 1.8e19.
    sum_of_squares = undivided_norm.new_zeros((), dtype=torch.double)
    for num_copies, shards in shards_by_copies.items():
        norm = torch.nn.utils.get_total_norm(shards)
        sum_of_squares = sum_of_squares + norm.double().square() / num_copies
    dist.all_reduce(sum_of_squares)
    return (sum_of_squares + undivided_norm.double().square()).sqrt().to(norm.dtype)


def clip(parameters: Iterable[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scale gradients in place from their `norm` over all meshes to at most `limit`, as `clip_grads_with_norm_`."""
    gradients = [local_shard(p.grad) for p in parameters if p.grad is not None]
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, scale)


class Muon(optim.Muon):
    """Muon for divided weights.

    Muon needs whole matrices. A divided one is gathered for its update, one at a time; every process computes the same
    update and keeps its part. Experts [E, out, in] that are divided along E alone are whole matrices already.
    """

    def _direction(self, update: Tensor, gradient: Tensor) -> Tensor:
        if not isinstance(update, DTensor):
            return super()._direction(update, gradient)
        sharded_dims = [
            placement.dim for placement in update.placements if isinstance(placement, Shard)
        ]
        has_whole_experts = update.ndim == 3 and not any(sharded_dims)  # cut along E alone
        if has_whole_experts:
            direction = super()._direction(local(update), local(gradient))
            return _dtensor_of_shard(direction, update)
        whole_direction = super()._direction(to_full_tensor(update), to_full_tensor(gradient))
        return shard_like(whole_direction, update)


SHARDED = optim.TensorOperations(total_norm, clip, {"adamw": torch.optim.AdamW, "muon": Muon})


def outline(net: nn.Module) -> nn.Module:
    """A copy of a whole network whose parameters are on the meta device: shapes without memory; see `filled`."""
    parameters = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in net.parameters()
    }
    return copy.deepcopy(net, parameters)


def filled(outline: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """A copy of an outline with the tensors of a state dict, whole or divided; FSDP2 modules can't be copied."""
    copied = copy.deepcopy(outline)
    copied.load_state_dict(state, assign=True)
    return copied


def gathered(state: Any) -> Any:
    """Gather all tensors in nested dictionaries and lists: in main memory on the first process, None on the others.

    Every process must call it.
    """
    is_first = dist.get_rank() == 0

    def to_main_memory(x: Tensor) -> Tensor | None:
        tensor = to_full_tensor(
            x.detach()
        )  # one at a time, so that no device holds all whole tensors
        return tensor.to("cpu", copy=True) if is_first else None

    return tree_map_only(Tensor, to_main_memory, state)


# ---- dividing the tensors of a checkpoint, which are whole in its file

KeyPath = tuple[str | int, ...]  # keys and indices that lead to a value in a checkpoint
_TemplateOf = Callable[[KeyPath], Tensor | None]
"""Gives the tensor by whose division the one at a path is divided; None where that stays whole."""


def divide(checkpoint: State, template_of: _TemplateOf) -> State:
    """A checkpoint, the same on all processes, with each tensor divided as its template; without one it stays whole."""

    def divide_value(pytree_keys: tuple[Any, ...], value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        path = tuple(
            step.idx if isinstance(step, SequenceKey) else step.key for step in pytree_keys
        )
        template = template_of(path)
        return value if template is None else shard_like(value, template)

    result: State = tree_map_with_path(divide_value, checkpoint)
    return result


def like_these(weights: Mapping[str, Tensor], optimized: Sequence[Tensor]) -> _TemplateOf:
    """Templates for `divide`: parameters, by name for the weights and by index for the moments of an optimizer."""

    def template_of(path: KeyPath) -> Tensor | None:
        parameter: Tensor | None = None
        match path:
            # Beside a moving average of the weights, "current_model_state" holds the weights in training.
            case ("state_dict" | "current_model_state", str(name)):
                parameter = weights.get(name)
            case ("optimizer_states", _, "state", int(index), str(moment)) if moment != "step":
                parameter = optimized[index]
        return parameter.detach() if isinstance(parameter, DTensor) else None

    return template_of
