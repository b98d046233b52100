"""A checkpoint of divided weights as a folder: every process writes its own parts, by torch's distributed checkpoint.

NAME.ckpt/ holds `rest.pt`, the checkpoint that a file would hold but for its divided tensors (weights, their moving
average, moments), and DCP's files with those: `__R_0.distcp` from process R and `.metadata`, which says where each part
lies. A tensor's key is its place in the checkpoint as JSON, such as `["state_dict", "net.head.weight"]`. So reading
gives the same dictionary as from a file, with tensors whole or divided as the reader wants them: any number of
processes, any layout.

Reading runs no code of the folder. DCP's own reader isn't used: it unpickles what a description calls bytes.
`.metadata`, a pickle, becomes plain records here, whose places and sizes are compared with the files before memory is
taken, and each part is read by torch.load under `weights_only=True`.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import ceil, prod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.utils._pytree import SequenceKey, tree_map_with_path

from moevision.files import check_room, file_sha256, make_folder, sync_file, sync_folder
from moevision.train.archive import REST, digest_of, load_archive, saying_what_is_damaged, sizes_of
from moevision.train.parallel.parts import copies, first_index, mesh_of, own_part, shard_like
from moevision.train.processes import gather

_METADATA = ".metadata"
_WEIGHTS = ("state_dict", "current_model_state")  # the second: beside a moving average

Place = tuple[str | int, ...]
"""Keys and indices that lead to a value in a checkpoint."""
Like = Callable[[Place], Tensor | None]
"""A tensor that is divided as the one at this place shall be; None: it shall be whole."""


class _Writer(FileSystemWriter):
    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as error:  # its cause would get lost on the way to the other processes
            raise OSError(0, _why(error)) from error


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
    sharded: dict[Place, Tensor] = {}
    weights: list[Tensor] = []

    def keep_whole(place: Place, tensor: Tensor) -> Tensor | None:
        if place[0] in _WEIGHTS:
            weights.append(own_part(tensor))
        if mesh_of(tensor) is None:
            return tensor
        sharded[place] = tensor
        return None

    rest = _with_tensors(checkpoint, keep_whole)
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
        save({json.dumps(place): tensor.detach() for place, tensor in sharded.items()}, storage_writer=_Writer(folder))
    except CheckpointException as error:  # the same on all processes
        raise OSError(
            0, next((_why(cause) for cause, _ in error.failures.values()), "another process failed")
        ) from error

    def written() -> tuple[dict[str, tuple[str, int]], bool]:
        if first:
            sync_folder(folder)
        own = {f"__{dist.get_rank()}_"} | ({REST, _METADATA} if first else set())
        files = [path for path in folder.iterdir() if any(path.name.startswith(name) for name in own)]
        known = {path.name: (file_sha256(path), path.stat().st_size) for path in files}
        return known, all(bool(x.isfinite().all()) for x in weights)

    found = _on_all(written)
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
        described = _described((folder / _METADATA).read_bytes(), files)
        checkpoint: dict[str, Any] = load_archive(folder / REST, map_location)
        for key, stored in described.items():
            *way, last = place = json.loads(key)
            holder: Any = checkpoint
            for step in way:
                holder = holder[step]
            if holder[last] is not None:
                raise ValueError(f"{key[:80]} is in {REST} already")
            holder[last] = _read_tensor(folder, stored, None if like is None else like(tuple(place)))
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


class _Part(NamedTuple):
    """Where a part of a tensor lies: bytes `begin` to `end` of a file; and its place in the tensor."""

    file: str
    begin: int
    end: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class _Stored(NamedTuple):
    """A tensor in DCP's files; `shape` is that of the whole."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: list[_Part]


def _read_tensor(folder: Path, stored: _Stored, like: Tensor | None) -> Tensor:
    """The whole tensor, or this process's part of it as `like` is divided."""
    if like is None:
        target = own = torch.empty(stored.shape, dtype=stored.dtype)
    else:
        if like.shape != stored.shape:
            raise ValueError(f"a tensor has the shape {list(stored.shape)}, and the model's {list(like.shape)}")
        target = torch.empty_like(like, dtype=stored.dtype)
        own = own_part(target)
    origin = first_index(target)  # of `own` in the whole
    for part in stored.parts:
        begin = [max(pair) for pair in zip(origin, part.offset, strict=True)]
        lengths = zip(origin, own.shape, part.offset, part.shape, strict=True)
        end = [min(a + n, b + m) for a, n, b, m in lengths]
        if any(first >= last for first, last in zip(begin, end, strict=True)):
            continue  # of other processes only
        with (folder / part.file).open("rb") as file:
            file.seek(part.begin)
            values = load_archive(io.BytesIO(file.read(part.end - part.begin)))
        if type(values) is not Tensor or values.shape != part.shape or values.dtype != stored.dtype:
            raise ValueError(f"a part in {part.file} has another shape or type than {_METADATA} says")

        def within(first: Sequence[int], begin: list[int] = begin, end: list[int] = end) -> tuple[slice, ...]:
            return tuple(slice(a - zero, b - zero) for a, b, zero in zip(begin, end, first, strict=True))

        own[within(origin)].copy_(values[within(part.offset)])
    return target


class _Record:
    """One of DCP's records as plain data: its `state`, or None."""

    state: Any = None

    def __new__(cls, *values: Any) -> _Record:
        """With the arguments that the pickle gives, which don't matter: all that does is in the state."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


_METADATA_OF, _FILES_OF = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_NAMES: Mapping[str, Sequence[str]] = {
    _METADATA_OF: (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "_MEM_FORMAT_ENCODING"),
    ),
    _FILES_OF: ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    **dict.fromkeys(("pathlib", "pathlib._local"), ("PosixPath", "WindowsPath")),
}
_KINDS: Mapping[tuple[str, str], type[_Record]] = {
    (module, name): type(name, (_Record,), {}) for module, names in _NAMES.items() for name in names
}


class _Unpickler(pickle._Unpickler):  # the one in Python: a number in the bytes doesn't decide how large its memo is
    """Makes records, tuples, texts and dtypes of DCP's description, and nothing else."""

    dispatch: ClassVar = {**pickle._Unpickler.dispatch}
    del dispatch[pickle.BYTEARRAY8[0]]  # takes as much memory as it announces

    def find_class(self, module: str, name: str) -> Any:
        if (found := _KINDS.get((module, name))) is not None:
            return found
        if module == "torch" and (name == "Size" or isinstance(vars(torch).get(name), torch.dtype)):
            return tuple if name == "Size" else vars(torch)[name]
        raise ValueError(f"{module}.{name} is no part of a checkpoint's description")


def _described(metadata: bytes, files: Mapping[str, int]) -> dict[str, _Stored]:
    """The tensors that DCP's `.metadata` describes, by their keys.

    Args:
        metadata: the bytes.
        files: the folder's files and their bytes.

    Raises:
        ValueError: if one isn't in these files, whole and at a place of its own. Other errors if it is damaged.
    """
    tensors, places = _fields(
        _Unpickler(io.BytesIO(metadata)).load(), "Metadata", "state_dict_metadata", "storage_data"
    )
    where: dict[Any, tuple[str, int, int]] = {}
    for index, info in places.items():
        key, offset = _fields(index, "MetadataIndex", "fqn", "offset")
        file, begin, length, transforms = _fields(
            info, "_StorageInfo", "relative_path", "offset", "length", "transform_descriptors"
        )
        if type(key) is not str or not _natural(offset):
            raise ValueError(f"{_METADATA} stores something else than tensors")
        if type(file) is not str or file not in files or not _natural((begin, length)) or transforms is not None:
            raise ValueError(f"{_METADATA} names a place that is none of the folder's files")
        where[key, offset] = file, begin, begin + length
    for (file, _, end), (other, begin, _) in pairwise(sorted(where.values())):
        if file == other and begin < end:
            raise ValueError(f"parts overlap in {file}")
    found = {}
    for key, value in tensors.items():
        properties, shape, chunks = _fields(value, "TensorStorageMetadata", "properties", "size", "chunks")
        dtype = properties.state[0]
        if type(dtype) is not torch.dtype or not _natural(shape):
            raise ValueError(f"{_METADATA} describes something else than tensors")
        parts = []
        for chunk in chunks:
            offset, sizes = _fields(chunk, "ChunkStorageMetadata", "offsets", "sizes")
            inside = _natural(offset) and _natural(sizes) and len(offset) == len(sizes) == len(shape)
            if not inside or any(a + n > whole for a, n, whole in zip(offset, sizes, shape, strict=True)):
                raise ValueError(f"a part of {key[:80]} lies outside of it")
            part = _Part(*where.pop((key, offset)), offset, sizes)
            if part.end > files[part.file] or prod(sizes) * dtype.itemsize > part.end - part.begin:
                raise ValueError(f"{part.file} is smaller than {_METADATA} says")
            parts.append(part)
        if sum(prod(part.shape) for part in parts) != prod(shape):
            raise ValueError(f"parts of {key[:80]} are missing")
        found[key] = _Stored(shape, dtype, parts)
    return found


def _fields(record: Any, kind: str, *names: str) -> list[Any]:
    module = _FILES_OF if kind == "_StorageInfo" else _METADATA_OF
    state = record.state if type(record) is _KINDS[module, kind] else None
    if type(state) is not dict:
        raise ValueError(f"{_METADATA} holds something else where a {kind} should be")
    return [state.get(name) for name in names]


def _natural(values: Any) -> bool:
    return type(values) is tuple and len(values) <= 64 and all(type(n) is int and 0 <= n < 2**48 for n in values)
