"""A checkpoint of divided weights as a folder: every process writes its own parts, as data.

NAME.ckpt/ holds `rest.pt`, the checkpoint that a file would hold but for its divided tensors (weights, their moving
average, moments), and `part-R.pt` from each process R: for a tensor's key its whole shape, where the part begins in it,
and the part. A key is the tensor's place in the checkpoint as JSON, such as `["state_dict", "net.head.weight"]`. So
reading gives the same dictionary as from a file, with tensors whole or divided as the reader wants them: any number of
processes, any layout. All files are torch's archives, read under `weights_only=True`: no code of the folder is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import SequenceKey, tree_map_with_path

from moevision.files import file_sha256, make_folder, sync_file, sync_folder
from moevision.train.archive import REST, digest_of, load_archive, saying_what_is_damaged, sizes_of
from moevision.train.parallel.parts import first_index, is_first_copy, mesh_of, own_part, shard_like
from moevision.train.processes import gather

_WEIGHTS = ("state_dict", "current_model_state")  # the second: beside a moving average

Place = tuple[str | int, ...]
"""Keys and indices that lead to a value in a checkpoint."""
Like = Callable[[Place], Tensor | None]
"""A tensor that is divided as the one at this place shall be; None: it shall be whole."""


def write_folder(checkpoint: dict[str, Any], folder: Path) -> tuple[str, int, bool]:
    """Write a checkpoint into a folder that isn't there yet; every process must call it.

    Args:
        checkpoint: as Lightning makes it, the same on all processes but for their parts of sharded tensors.
        folder: on a file system that all processes see.

    Returns:
        The folder's digest (see `digest`), its bytes, and whether all weights and buffers are finite.

    Raises:
        OSError: on all processes, if one of them can't write.
    """
    parts: dict[str, tuple[list[int], list[int], Tensor]] = {}
    weights: list[Tensor] = []

    def keep_whole(place: Place, tensor: Tensor) -> Tensor | None:
        own = own_part(tensor)
        if place[0] in _WEIGHTS:
            weights.append(own)
        if mesh_of(tensor) is None:
            return tensor
        if own.numel() and is_first_copy(tensor):
            begin = list(first_index(tensor))
            parts[json.dumps(place)] = (
                list(tensor.shape),
                begin,
                own.to("cpu", copy=True),
            )  # without what it is a view of
        return None

    rest, first = _with_tensors(checkpoint, keep_whole), dist.get_rank() == 0
    _on_all(lambda: make_folder(folder) if first else None)

    def write() -> tuple[dict[str, tuple[str, int]], bool]:
        known = {}
        for name, content in {f"part-{dist.get_rank()}.pt": parts, **({REST: rest} if first else {})}.items():
            path = folder / name
            try:
                with path.open("wb") as file:
                    torch.save(content, file)
            except RuntimeError as error:  # torch's writer hides the system's words
                raise OSError(0, _why(error)) from error
            sync_file(path)
            known[name] = file_sha256(path), path.stat().st_size
        return known, all(bool(x.isfinite().all()) for x in weights)

    found = _on_all(write)
    if first:
        sync_folder(folder)
    known = {name: value for part, _ in found for name, value in part.items()}
    size = sum(size for _, size in known.values())
    return digest_of({name: value for name, (value, _) in known.items()}), size, all(finite for _, finite in found)


def read_folder(folder: Path, like: Like | None = None, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint, never by running what it holds.

    Args:
        folder: what `write_folder` wrote.
        like: how sharded tensors shall be divided, each process reads its own parts. None: all tensors are whole.
        map_location: where what isn't sharded is put.

    Raises:
        UserError: if it is damaged, or another program wrote it.
    """
    with saying_what_is_damaged(folder):
        files = sizes_of(folder)  # first: a pipe would be waited for
        checkpoint: dict[str, Any] = load_archive(folder / REST, map_location)
        stored: dict[str, list[tuple[list[int], list[int], Tensor]]] = {}
        for name, size in files.items():
            if name != REST:
                parts = load_archive(folder / name, mmap=True)
                for key, part in parts.items():
                    stored.setdefault(key, []).append(part)
                if sum(part.nbytes for *_, part in parts.values()) > size:
                    raise ValueError(f"parts overlap in {name}")
        for key, found in stored.items():
            *way, last = place = json.loads(key)
            holder: Any = checkpoint
            for step in way:
                holder = holder[step]
            if holder[last] is not None:
                raise ValueError(f"{key[:80]} is in {REST} already")
            holder[last] = _joined(key, found, None if like is None else like(tuple(place)))
        if any(value is None for name in _WEIGHTS for value in checkpoint.get(name, {}).values()):
            raise ValueError("a weight is missing")
    return checkpoint


def divide(checkpoint: dict[str, Any], like: Like) -> dict[str, Any]:
    """A checkpoint whose tensors are whole, the same on all processes, with those divided that shall be."""

    def divided(place: Place, whole: Tensor) -> Tensor:
        model = like(place)
        return whole if model is None else shard_like(whole, model)

    return _with_tensors(checkpoint, divided)


def like_these(weights: Mapping[str, Tensor], learning: Sequence[Tensor]) -> Like:
    """Weights and moments divided as these parameters are.

    Args:
        weights: the parameters by their names in `state_dict`.
        learning: those of the optimizer, in its order.
    """

    def like(place: Place) -> Tensor | None:
        found = None
        if place[0] in _WEIGHTS:
            found = weights.get(str(place[1]))
        elif place[0] == "optimizer_states" and place[2] == "state" and place[4] != "step":  # a number is nobody's part
            found = learning[int(place[3])]
        return None if found is None or mesh_of(found) is None else found.detach()

    return like


def _on_all(action: Callable[[], Any]) -> list[Any]:
    """What an action gave on each process.

    Raises:
        OSError: on all of them, if the system refused it on one.
        RuntimeError: on all of them, if it failed otherwise on one: none waits for it for ever.
    """
    result = fault = own = None
    try:
        result = action()
    except Exception as error:
        own, refused = error, isinstance(error, OSError)
        fault = (refused, _why(error) if refused else f"{type(error).__name__}: {error}")
    found = gather((result, fault))
    if (first := next((each for _, each in found if each is not None), None)) is not None:
        refused, why = first
        raise (OSError(0, why) if refused else RuntimeError(why)) from own
    return [each for each, _ in found]


def _why(error: BaseException) -> str:
    """The file system's own words; torch raises errors of its archive's writer instead."""
    known: BaseException | None = error
    while known is not None:
        if isinstance(known, OSError) and known.strerror:
            return known.strerror
        known = known.__cause__ or known.__context__
    return str(error)


def _with_tensors(checkpoint: dict[str, Any], function: Callable[[Place, Tensor], Any]) -> dict[str, Any]:
    """A copy of a checkpoint that has, in the place of each tensor, what a function gives for it."""

    def each(path: tuple[Any, ...], value: Any) -> Any:
        place = tuple(step.idx if isinstance(step, SequenceKey) else step.key for step in path)
        return function(place, value) if isinstance(value, Tensor) else value

    result: dict[str, Any] = tree_map_with_path(each, checkpoint)
    return result


def _joined(key: str, parts: list[tuple[list[int], list[int], Tensor]], like: Tensor | None) -> Tensor:
    """The whole tensor from its parts, or this process's part of it as `like` is divided."""
    shape, _, one = parts[0]
    for other, begin, part in parts:
        fits = all(0 <= a <= a + n <= whole for a, n, whole in zip(begin, part.shape, shape, strict=True))
        if type(part) is not Tensor or part.layout is not torch.strided or not fits:
            raise ValueError(f"a part of {key[:80]} lies outside of it")
        if other != shape or part.dtype != one.dtype:
            raise ValueError(f"parts of {key[:80]} are of different tensors")
    if sum(part.numel() for *_, part in parts) != prod(shape):  # before memory is taken
        raise ValueError(f"parts of {key[:80]} are missing")
    if like is None:
        target = own = torch.empty(shape, dtype=one.dtype)
    else:
        if list(like.shape) != shape:
            raise ValueError(f"a tensor has the shape {shape}, and the model's {list(like.shape)}")
        target = torch.empty_like(like, dtype=one.dtype)
        own = own_part(target)
    origin = first_index(target)  # of `own` in the whole
    for _, offset, part in parts:
        begin = [max(pair) for pair in zip(origin, offset, strict=True)]
        end = [min(a + n, b + m) for a, n, b, m in zip(origin, own.shape, offset, part.shape, strict=True)]
        if all(first < last for first, last in zip(begin, end, strict=True)):  # else of other processes only
            here, there = (
                tuple(slice(a - zero, b - zero) for a, b, zero in zip(begin, end, start, strict=True))
                for start in (origin, offset)
            )
            own[here].copy_(part[there])
    return target
