"""Open files of unknown origin: JSON, YAML and safetensors with limits, and a saved model against its own weights.

These formats are data only: unlike a pickle, reading them runs no code. The remaining risks are refused here, before
memory is taken:

- a name that is no file: a named pipe (opening it would wait for ever), a device (it never ends), a folder;
- more bytes than such a file can need, and JSON whose millions of empty lists take far more memory than its text;
- JSON nested so deeply that the parser gives up, keys that stand twice (two readers would see two files), NaN;
- a safetensors header that announces more than the file holds, overlapping or odd tensors, absurd shapes;
- a config.json that describes another model than the file's. timm hands what stands under `model_args` to the model's
  constructor as it is, so a few bytes could ask for terabytes, for a billion layers, or (under `base`) for a model from
  the network. Here every field is checked first; then the model is built without memory, on torch's meta device, and
  must not be larger than the tensors that its file holds. A file thus can't make the program take more memory than in
  proportion to its own size.

Format of safetensors: 8 bytes with the header's length (little-endian), that much JSON, then the tensors without gaps;
https://github.com/huggingface/safetensors#format. Its own reader checks offsets too, but takes 100 MB of header, and
it is asked here only after everything has been found in order. Links are followed, as the hub's cache is made of them.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

import yaml  # type: ignore[import-untyped]

from moevision.errors import UserError

if TYPE_CHECKING:
    from torch import nn

MAX_JSON_BYTES: Final = 16 * 2**20  # the names and descriptions of ImageNet-21k's 21 841 classes take 3 MB
MAX_JSON_VALUES: Final = 1_000_000
MAX_YAML_BYTES: Final = 2**20
MAX_HEADER_BYTES: Final = 16 * 2**20
MAX_TENSORS: Final = 100_000
MAX_DIMENSIONS: Final = 8
_LENGTH_BYTES: Final = 8
_DTYPE_BYTES: Final = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
INTEGERS: Final = frozenset(("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"))


@dataclass(frozen=True)
class TensorEntry:
    """What a safetensors header says about one tensor.

    Attributes:
        dtype: as the format spells it, such as `BF16`.
        shape: of the tensor.
        begin: first byte, counted from the end of the header.
        end: first byte after it.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_json(path: str | Path, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: if it is no regular file, larger than `max_bytes`, or no sound JSON.
        FileNotFoundError: if there is none; callers know best what that means.
    """
    return parse_json(read_bytes(Path(path), max_bytes), str(path))


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file of plain values, such as a run's config.yaml.

    Raises:
        UserError: if it is no regular file, too large, or no such YAML.
        FileNotFoundError: if there is none.
    """
    try:
        return parse_yaml(read_bytes(Path(path), MAX_YAML_BYTES).decode("utf-8"))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path} can't be read ({' '.join(str(error).split())[:160]}): mend or remove it.") from error


def parse_yaml(text: str, load: Callable[[str], Any] = yaml.safe_load) -> Any:
    """Parse YAML without anchors: behind them a few lines can stand for billions of values.

    Args:
        text: of the file.
        load: what parses it when it is found in order.

    Raises:
        UserError: if it is longer than `MAX_YAML_BYTES` or uses anchors.
        yaml.YAMLError: if it is no YAML.
    """
    if len(text) > MAX_YAML_BYTES:
        raise UserError(f"A configuration has at most {MAX_YAML_BYTES:,} characters, and this one has {len(text):,}.")
    if "*" in text and any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
        raise UserError("A configuration may not use YAML's anchors (&name, *name): write the values out.")
    return load(text)


def parse_json(data: bytes, name: str) -> Any:
    """Parse JSON in UTF-8: a bounded number of values, no key twice, no NaN or infinity.

    Args:
        data: the text.
        name: what to call it in an error.

    Raises:
        UserError: if it isn't such JSON.
    """
    # Each value but the first follows one of these, so their number bounds that of the values.
    if sum(map(data.count, (b",", b"[", b"{", b":"))) > MAX_JSON_VALUES:
        raise UserError(f"{name} holds more than the {MAX_JSON_VALUES:,} values that such a file may have.")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is damaged, or no JSON file ({str(error)[:120]}): give another one.") from error


def read_header(path: str | Path) -> dict[str, TensorEntry]:
    """Tensor name -> entry of a safetensors file, after every entry was checked against the file's size.

    Raises:
        UserError: if it is no sound safetensors file.
        FileNotFoundError: if there is none.
    """
    return _header_of(path)[0]


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts that the writer of a safetensors file put into its header, such as the licence.

    Raises:
        UserError: if it is no sound safetensors file.
        FileNotFoundError: if there is none.
    """
    return _header_of(path)[1]


def _header_of(path: str | Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    with _open_regular(Path(path)) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - _LENGTH_BYTES):
            raise _damaged(path, f"its header would be {length:,} bytes long")
        text = file.read(length)
    given = parse_json(text, str(path))
    if not isinstance(given, dict):
        raise _damaged(path, "its header is no JSON object")
    metadata = given.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise _damaged(path, "its metadata are no texts")
    if len(given) > MAX_TENSORS:
        raise _damaged(path, f"it has {len(given):,} tensors")
    entries = {name: _entry(path, name, entry) for name, entry in given.items()}
    _check_layout(path, entries, size - _LENGTH_BYTES - length)
    return entries, metadata or {}


def _entry(path: str | Path, name: str, given: Any) -> TensorEntry:
    shown = repr(name[:80])
    if not isinstance(given, dict) or set(given) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the entry of {shown} is malformed")
    width = _DTYPE_BYTES.get(given["dtype"]) if isinstance(given["dtype"], str) else None
    if width is None:
        raise _damaged(path, f"{shown} has an unknown type")
    shape, offsets = given["shape"], given["data_offsets"]
    if not _natural(shape) or not _natural(offsets) or len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
        raise _damaged(path, f"the shape or the place of {shown} is malformed")
    entry = TensorEntry(cast(str, given["dtype"]), tuple(shape), *offsets)
    if entry.end - entry.begin != prod(entry.shape) * width:
        raise _damaged(path, f"{shown} has another size than its shape says")
    return entry


def _natural(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)


def _check_layout(path: str | Path, entries: dict[str, TensorEntry], data_bytes: int) -> None:
    places = sorted((entry.begin, entry.end) for entry in entries.values())
    whole = [(0, 0), *places, (data_bytes, data_bytes)]
    if any(end != begin for (_, end), (begin, _) in pairwise(whole)):
        raise _damaged(path, "its tensors overlap, leave gaps, or end elsewhere than the file")


def _damaged(path: str | Path, reason: str) -> UserError:
    return UserError(f"{path} can't be loaded ({reason}): it is damaged, or no safetensors file.")


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """The content of a small file.

    Raises:
        UserError: if it is no regular file, or larger than `max_bytes`.
        FileNotFoundError: if there is none.
    """
    with _open_regular(path) as file:
        data = file.read(min(max_bytes, os.fstat(file.fileno()).st_size) + 1)
    if len(data) > max_bytes:
        raise UserError(f"{path} is larger than the {max_bytes:,} bytes that such a file may have: give another one.")
    return data


def _open_regular(path: Path) -> BinaryIO:
    """Open a regular file without ever waiting: the kind is asked of what was opened, so it can't be exchanged."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{path} can't be read ({error}): check the path and its permissions.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is no regular file: give a file.")
    return os.fdopen(descriptor, "rb")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


CONFIG, WEIGHTS = "config.json", "model.safetensors"
# What a saved model may be.
MAX_CLASSES: Final = 200_000
MAX_TEXT: Final = 2_000
MAX_LIST: Final = 1_024
MAX_NUMBER: Final = 65_536  # of any size or count among the model's arguments; the largest in timm is a width of 8192
MAX_LAYERS: Final = 512
MAX_SIDE: Final = 4_096
# What a model may need beside the numbers in its file: buffers that aren't saved, such as masks. 64 MB in fp32.
_SPARE_ELEMENTS: Final = 16 * 2**20
_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")
# Arguments of timm's own machinery rather than of a model: where weights come from, and wrappers around the model.
_NOT_THE_MODELS = re.compile(
    "pretrained.*|checkpoint_path|cache_dir|scriptable|exportable|no_jit|features_only|feature_cfg|feature_cls|"
    "out_indices|model_cls|model_cfg|kwargs_filter|pruned|device|dtype"
)
_LABELS: Final = frozenset(("label_names", "labels", "label_descriptions"))
_COUNTS_LAYERS = re.compile("depth|layers|blocks|stages")


def check_model_folder(folder: Path, *, weights: bool = True) -> dict[str, Any]:
    """Check a saved model's files before anything is made of them.

    Args:
        folder: holds config.json and model.safetensors.
        weights: whether the weights are wanted too.

    Returns:
        The content of config.json.

    Raises:
        UserError: if a file is missing or damaged, not what timm or moevision writes, or asks for too much.
    """
    config = read_config(folder / CONFIG)
    if weights:
        try:
            entries = read_header(folder / WEIGHTS)
        except FileNotFoundError as error:
            raise UserError(f"{folder} has no {WEIGHTS}: only safetensors are read, never pickles.") from error
        net = check_size(folder, entries)
        check_types(folder / WEIGHTS, net, entries)
    return config


def read_config(file: Path) -> dict[str, Any]:
    """The config.json of a model in timm's format, with every field checked.

    Raises:
        UserError: if it isn't one.
        FileNotFoundError: if there is none.
    """
    config = read_json(file)
    try:
        _check_config(config)
    except ValueError as error:
        raise UserError(
            f"{file} can't be loaded: {error}. It is damaged, or was not saved by timm or moevision."
        ) from error
    return dict(config)


def check_types(file: Path, net: nn.Module, entries: Mapping[str, TensorEntry]) -> None:
    """Refuse whole numbers for weights: torch would load them without a word, also int8 ones without their scale.

    Counters, masks and tables that are whole numbers in the model (`num_batches_tracked`) may be so in the file.

    Raises:
        UserError: if a tensor that is floating-point in the model, or goes by a weight's name, holds whole numbers.
    """
    floating = {name: tensor.is_floating_point() for name, tensor in net.state_dict().items()}
    for name, entry in entries.items():
        if entry.dtype in INTEGERS and floating.get(name, name.endswith((".weight", ".bias"))):
            raise UserError(
                f"{file} can't be loaded: {name[:80]!r} holds whole numbers ({entry.dtype}), and the model has weights "
                "there: save them in fp32, bf16 or fp16."
            )


def check_size(folder: Path, entries: Mapping[str, TensorEntry]) -> nn.Module:
    """Refuse a config.json that describes a larger model than its weights are; nothing is allocated to find out.

    Returns:
        The model, without memory.

    Raises:
        UserError: if so, or if the model can't be built at all.
    """
    import timm
    import torch

    import moevision.models.vit_moe  # noqa: F401  (registers the vit_moe names)

    try:
        with torch.device("meta"):
            net: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=False)
    except Exception as error:  # constructors fail in every type on arguments that don't fit; the cause stays attached
        raise UserError(
            f"The model in {folder} can't be loaded ({type(error).__name__}: {' '.join(str(error).split())[:160]}): "
            f"its {CONFIG} is damaged, or it was not saved by timm or moevision."
        ) from error
    described = sum(tensor.numel() for tensor in [*net.parameters(), *net.buffers()])
    held = sum(prod(entry.shape) for entry in entries.values())
    if described > 1.25 * held + _SPARE_ELEMENTS:
        raise UserError(
            f"The model in {folder} can't be loaded: {CONFIG} describes {described:,} weights and {WEIGHTS} holds "
            f"{held:,}. One of them is damaged, or belongs to another model."
        )
    return net


def _check_config(config: Any) -> None:
    """Raise a ValueError that names the field which isn't as timm writes it."""
    from timm.models import PretrainedCfg  # here: what needs no model is checked without loading torch

    known = frozenset(field.name for field in fields(PretrainedCfg)) - {"state_dict"}
    _mapping(config, "the whole")
    _text(config.get("architecture"), "architecture", _NAME)
    # Older files of timm have all fields in one object, newer ones may have more around them, which timm ignores.
    pretrained = _mapping(config.get("pretrained_cfg", config), "pretrained_cfg")
    unknown = sorted(pretrained.keys() - known - {"labels", "num_features"})
    if unknown and pretrained is not config:
        raise ValueError(f"pretrained_cfg should have no field {unknown[0][:40]!r}")
    for place in (config, pretrained):
        _check_labels(place)
        _number(place.get("num_classes", 0), "num_classes", MAX_CLASSES)
        if "state_dict" in place:
            raise ValueError("weights stand in it")
    for name in (known & pretrained.keys()) - _LABELS:
        _plain(pretrained[name], f"pretrained_cfg.{name}", MAX_CLASSES)
    for name in ("input_size", "test_input_size", "min_input_size"):
        if pretrained.get(name) is not None:
            _sizes(pretrained[name], f"pretrained_cfg.{name}", 3)
    for name in ("mean", "std"):
        if name in pretrained:
            _statistics(pretrained[name], f"pretrained_cfg.{name}")
    temperature = _mapping(config.get("calibration", {"temperature": 1}), "calibration").get("temperature")
    if type(temperature) not in (int, float) or not 1e-3 <= cast(float, temperature) <= 1e3:
        raise ValueError("calibration.temperature is no number from 0.001 to 1000")
    if config.get("router_start", "random") not in ("random", "cluster"):
        raise ValueError("router_start is neither random nor cluster")
    arguments = _mapping(config.get("model_args", {}), "model_args")
    check_arguments(arguments)
    told = config.get("num_classes", pretrained.get("num_classes", 1000))
    if arguments.get("num_classes", told) != told:  # timm would quietly leave the classifier untrained
        raise ValueError("it gives two numbers of classes")


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of a model's constructor that no model has.

    Raises:
        ValueError: for a name that isn't the model's, or a value of another kind or size.
    """
    for name, value in arguments.items():
        if not name.isidentifier() or _NOT_THE_MODELS.fullmatch(name):
            raise ValueError(f"model_args may not hold {name[:40]!r}")
        _plain(value, f"model_args.{name}", MAX_CLASSES if name == "num_classes" else MAX_NUMBER)
        if _COUNTS_LAYERS.search(name) and name != "moe_layers":
            counts = value if isinstance(value, list) else [value]
            if sum(count for count in counts if isinstance(count, int | float)) > MAX_LAYERS:
                raise ValueError(f"model_args.{name} has more than {MAX_LAYERS} layers")
    if arguments.get("img_size") is not None:
        _sizes(arguments["img_size"], "model_args.img_size", 2)
    if arguments.get("base") is not None:  # else `hf-hub:...` here would fetch an unchecked model
        _text(arguments["base"], "model_args.base", _NAME)


def _check_labels(place: Mapping[str, Any]) -> None:
    for name in _LABELS & place.keys():
        labels = place[name]
        if not isinstance(labels, dict | list) or len(labels) > MAX_CLASSES:
            raise ValueError(f"{name} is no list of at most {MAX_CLASSES:,} names")
        for text in labels.values() if isinstance(labels, dict) else labels:
            _text(text, name)
        if name == "label_names" and isinstance(labels, dict) and not all(index.isdecimal() for index in labels):
            raise ValueError(f"{name} has a key that is no index")


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no object")
    return value


def _text(value: Any, name: str, pattern: re.Pattern[str] | None = None) -> None:
    if not isinstance(value, str) or len(value) > MAX_TEXT or (pattern and not pattern.fullmatch(value)):
        raise ValueError(f"{name} is {'no name' if pattern else f'no text of at most {MAX_TEXT} characters'}")


def _number(value: Any, name: str, largest: int) -> None:
    if type(value) is not int or not 0 <= value <= largest:
        raise ValueError(f"{name} is no number from 0 to {largest:,}")


def _sizes(value: Any, name: str, count: int) -> None:
    sides = value if isinstance(value, list) else [value]
    if len(sides) > count or any(type(side) is not int or not 1 <= side <= MAX_SIDE for side in sides):
        raise ValueError(f"{name} is no size from 1 to {MAX_SIDE} px")


def _statistics(value: Any, name: str) -> None:
    """One finite number for each channel; a standard deviation that is not positive would divide by zero."""
    smallest = 1e-6 if name.endswith("std") else -1e3
    numbers: list[Any] = value if isinstance(value, list) else [None]
    if len(numbers) > 16 or any(type(v) not in (int, float) or not smallest <= v <= 1e3 for v in numbers):
        raise ValueError(f"{name} is no list of usable numbers")


def _plain(value: Any, name: str, largest: float, depth: int = 0) -> None:
    """Null, a switch, a number of bounded size, a short text, or short lists and objects of these."""
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int | float):
        if not abs(value) <= largest:
            raise ValueError(f"{name} is larger than {largest:,}")
    elif isinstance(value, str):
        _text(value, name)
    elif isinstance(value, list | dict) and len(value) <= MAX_LIST and depth < 4:
        for inner in value.values() if isinstance(value, dict) else value:
            _plain(inner, name, largest, depth + 1)
    else:
        raise ValueError(f"{name} is too long or too deeply nested")
