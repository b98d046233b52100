"""A checkpoint of sharded weights as a folder: every process writes its own parts, by torch's distributed checkpoint.

NAME.ckpt/ holds `rest.pt`, the checkpoint that a file would hold but for its sharded tensors (weights, their moving
average, moments), and DCP's files with those: `__R_0.distcp` from process R and `.metadata`, which says where each part
lies. A tensor's key is its place in the checkpoint as JSON, such as `["state_dict", "net.head.weight"]`. So reading
gives the same dictionary as from a file, with tensors whole or divided as the reader wants them: any number of
processes, any layout.

DCP's `.metadata` is a pickle. It is read by an unpickler that knows DCP's own records and calls nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from importlib import import_module
from math import ceil
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moevision.files import check_room, file_sha256, make_folder, sync_file, sync_folder
from moevision.train.parallel import copies, mesh_of, own_part
from moevision.train.processes import gather

REST = "rest.pt"
_METADATA = ".metadata"
_WEIGHTS = ("state_dict", "current_model_state")  # the second: beside a moving average

Place = tuple[str | int, ...]
"""Keys and indices that lead to a value in a checkpoint."""
Like = Callable[[Place], Tensor | None]
"""A tensor that is divided as the one at this place shall be; None: it shall be whole."""


def is_sharded(checkpoint: dict[str, Any]) -> bool:
    """Whether some of its weights are divided over processes."""
    return any(isinstance(x, Tensor) and mesh_of(x) is not None for x in checkpoint.get("state_dict", {}).values())


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
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    class Writer(FileSystemWriter):
        def write_data(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().write_data(*args, **kwargs)
            except RuntimeError as error:  # its cause would get lost on the way to the other processes
                raise OSError(0, _why(error)) from error

    sharded: dict[Place, Tensor] = {}
    rest = _without_sharded(checkpoint, (), sharded)
    first = dist.get_rank() == 0
    parts = sum(own_part(x).nbytes / copies(x) for x in sharded.values())  # each is written once

    def begin(size: int) -> None:
        make_folder(folder)
        memory = io.BytesIO()
        torch.save(rest, memory)
        check_room(folder, size + memory.tell())
        (folder / REST).write_bytes(memory.getbuffer())
        sync_file(folder / REST)

    size = ceil(sum(gather(parts)))
    _on_all(lambda: begin(size) if first else None)
    try:
        save({json.dumps(place): tensor.detach() for place, tensor in sharded.items()}, storage_writer=Writer(folder))
    except CheckpointException as error:  # the same on all processes
        raise OSError(
            0, next((_why(cause) for cause, _ in error.failures.values()), "another process failed")
        ) from error

    def written() -> tuple[dict[str, tuple[str, int]], bool]:
        if first:
            sync_folder(folder)
        own = {f"__{dist.get_rank()}_"} | ({REST, _METADATA} if first else set())
        files = [path for path in folder.iterdir() if any(path.name.startswith(name) for name in own)]
        weights = {_WEIGHTS[0]: {str(place): x for place, x in sharded.items() if place[0] in _WEIGHTS}}
        known = {path.name: (file_sha256(path), path.stat().st_size) for path in files}
        return known, _is_finite(rest) and _is_finite(weights)

    found = _on_all(written)
    known = {name: value for part, _ in found for name, value in part.items()}
    size = sum(size for _, size in known.values())
    return _digest({name: value for name, (value, _) in known.items()}), size, all(finite for _, finite in found)


def read_folder(folder: Path, like: Like | None = None, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint, never by running what it holds.

    Args:
        folder: what `write_folder` wrote.
        like: how sharded tensors shall be divided; every process must then call it. None: all tensors are whole.
        map_location: where what isn't sharded is put.
    """
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = _reader(folder)
    checkpoint: dict[str, Any] = torch.load(folder / REST, map_location=map_location, weights_only=True)
    targets: dict[str, Any] = {}
    for key, known in reader.read_metadata().state_dict_metadata.items():
        model = None if like is None else like(tuple(json.loads(key)))
        dtype = known.properties.dtype
        targets[key] = torch.empty(known.size, dtype=dtype) if model is None else torch.empty_like(model, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        load(targets, storage_reader=reader, no_dist=like is None)
    for key, tensor in targets.items():
        *way, last = json.loads(key)
        holder: Any = checkpoint
        for step in way:
            holder = holder[step]
        holder[last] = tensor
    return checkpoint


def divide(checkpoint: dict[str, Any], like: Like, divided: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any]:
    """A checkpoint whose tensors are whole, with those divided that shall be.

    Args:
        checkpoint: the same on all processes.
        like: how each shall be divided.
        divided: makes a process's part of a tensor (`parallel.shard_like`).
    """

    def each(value: Any, place: Place) -> Any:
        if isinstance(value, Tensor):
            model = like(place)
            return value if model is None else divided(value, model)
        return _mapped(value, place, each)

    result: dict[str, Any] = each(checkpoint, ())
    return result


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


def file_with_rest(path: Path) -> Path:
    """The file of a checkpoint, file or folder, that torch.load reads: all but sharded tensors."""
    return path / REST if path.is_dir() else path


def digest(folder: Path) -> str:
    """SHA-256 over the names and SHA-256 of a folder's files, in hexadecimal."""
    files = list(folder.iterdir())
    with ThreadPoolExecutor() as threads:  # hashing holds no lock of Python's
        return _digest(dict(zip([path.name for path in files], threads.map(file_sha256, files), strict=True)))


def remove(path: Path) -> None:
    """Delete a checkpoint, file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


def _digest(files: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{name} {files[name]}\n" for name in sorted(files)).encode()).hexdigest()


def _without_sharded(value: Any, place: Place, found: dict[Place, Tensor]) -> Any:
    if isinstance(value, Tensor) and mesh_of(value) is not None:
        found[place] = value
        return None
    return _mapped(value, place, lambda each, inner: _without_sharded(each, inner, found))


def _mapped(value: Any, place: Place, function: Callable[[Any, Place], Any]) -> Any:
    """A nest of dictionaries and lists with a function applied to what they hold."""
    if isinstance(value, dict):
        return {key: function(each, (*place, key)) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(function(each, (*place, index)) for index, each in enumerate(value))
    return value


def _is_finite(checkpoint: Mapping[str, Any]) -> bool:
    tensors: Sequence[Any] = [x for name in _WEIGHTS for x in checkpoint.get(name, {}).values()]
    return all(bool(own_part(x).isfinite().all()) for x in tensors if isinstance(x, Tensor) and x.is_floating_point())


class _Unpickler(pickle.Unpickler):
    """Makes DCP's records, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("torch", "Size"), ("torch.serialization", "_get_layout")):
            return super().find_class(module, name)
        if module.partition(".")[0] == "pathlib":
            return PurePath
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.startswith("torch.distributed.checkpoint."):
            found = getattr(import_module(module), name, None)
            if isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, Enum)):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint's description")


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            with (folder / _METADATA).open("rb") as file:
                metadata: Metadata = _Unpickler(file).load()
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(folder)
