"""Open files of unknown origin: JSON, YAML and safetensors, and a saved model against its own weights.

These formats are data only: unlike a pickle, reading them runs no code. What remains is refused before memory is taken:
a name that is no regular file (a pipe would wait for ever), more bytes than such a file can need, and a config.json
that describes another model than its weights are. timm hands what stands under `model_args` to the model's constructor
as it is, so a few bytes could ask for terabytes, or (under `base`) for a model from the network: the model is built on
torch's meta device and must not be larger than what its file holds. Links are followed, as the hub's cache is made of
them.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple, cast

import yaml  # type: ignore[import-untyped]
from safetensors import SafetensorError, safe_open

from moevision.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
# Weights in eight bits (`moevision.models.io.unpack`). timm takes any file that ends in .safetensors, and these whole
# numbers for weights: hence the name.
PACKED = "model.int8"
SCALE = ".scale"
REST = "rest"
MAX_JSON_BYTES: Final = 16 * 2**20  # the names of ImageNet-21k's 21 841 classes take 3 MB
MAX_YAML_BYTES: Final = 2**20
MAX_LAYERS: Final = 512
# What a model may need beside the numbers in its file: buffers that aren't saved, such as masks. 64 MB in fp32.
_SPARE_ELEMENTS: Final = 16 * 2**20
_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")
# Arguments of timm's own machinery rather than of a model: where weights come from, and wrappers around the model.
_NOT_THE_MODELS = re.compile(
    "pretrained.*|checkpoint_path|cache_dir|scriptable|exportable|no_jit|features_only|feature_cfg|feature_cls|"
    "out_indices|model_cls|model_cfg|kwargs_filter|pruned|device|dtype"
)
_COUNTS_LAYERS = re.compile("depth|layers|blocks|stages")


# ---- bytes, JSON, YAML


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """The content of a small file, else a UserError; without one a FileNotFoundError: callers know what that means."""
    with _open_regular(path) as file:
        data = file.read(min(max_bytes, os.fstat(file.fileno()).st_size) + 1)
    if len(data) > max_bytes:
        raise UserError(
            f"{path} is larger than the {max_bytes:,} bytes that such a file may have: give another one."
        )
    return data


def _open_regular(path: Path) -> BinaryIO:
    """Open without blocking, which a pipe would do; what was opened must then be a regular file."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(
            f"{path} can't be read ({error}): check the path and its permissions."
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is no regular file: give a file.")
    return os.fdopen(descriptor, "rb")


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; it raises as `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(Path(path), MAX_JSON_BYTES), str(path))


def parse_json(data: bytes, name: str) -> Any:
    """Parse JSON in UTF-8; `name` is what to call it in an error."""
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{name} is damaged, or no JSON file ({str(error)[:120]}): give another one."
        ) from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys and plain values of a YAML file, such as a run's config.yaml; it raises as `read_json` does."""
    try:
        content = parse_yaml(read_bytes(Path(path), MAX_YAML_BYTES).decode("utf-8"))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(
            f"{path} can't be read ({' '.join(str(error).split())[:160]}): mend or remove it."
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is no configuration: it must have keys, such as data: {{path: ...}}."
        )
    return content


def parse_yaml(text: str) -> Any:
    """Parse YAML of plain values, without anchors: behind them a few lines can stand for billions of values."""
    if len(text) > MAX_YAML_BYTES:
        raise UserError(
            f"A configuration has at most {MAX_YAML_BYTES:,} characters, and this one has {len(text):,}."
        )
    if "*" in text and any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
        raise UserError(
            "A configuration may not use YAML's anchors (&name, *name): write the values out."
        )
    return yaml.safe_load(text)


# ---- safetensors


class TensorEntry(NamedTuple):
    """What a safetensors header says about one tensor: its dtype as the format spells it (`BF16`), and its shape."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: str | Path) -> dict[str, TensorEntry]:
    """Tensor name -> entry of a safetensors file, which the library has checked against the file's size."""
    return _header_of(path)[0]


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts that the writer of a safetensors file put into its header, such as the licence; raises as above."""
    return _header_of(path)[1]


def _header_of(path: str | Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    _open_regular(Path(path)).close()
    try:
        with safe_open(path, framework="np") as stored:
            entries = {}
            for name in stored.keys():  # noqa: SIM118 (it is no mapping)
                tensor = stored.get_slice(name)
                entries[name] = TensorEntry(tensor.get_dtype(), tuple(tensor.get_shape()))
            return entries, stored.metadata() or {}
    except (SafetensorError, ValueError, OSError) as error:
        reason = str(error)[:120]
        raise UserError(
            f"{path} can't be loaded ({reason}): it is damaged, or no safetensors file."
        ) from error


# ---- a saved model


def check_model_folder(folder: Path, *, weights: bool = True) -> dict[str, Any]:
    """The content of a saved model's config.json; this and (if wanted) the weights are checked."""
    config = read_config(folder / CONFIG)
    if not weights:
        return config

    file = weights_of(folder)
    packed = file.name == PACKED
    entries: dict[str, TensorEntry] = {}
    try:
        for part in parts_of(file) if packed else [file]:
            entries |= read_header(part)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} has no {WEIGHTS}: only safetensors are read, never pickles."
        ) from error
    if not entries:
        raise UserError(f"{file} holds no weights: give the whole model again.")

    if packed:
        entries = _unpacked_entries(file, entries)
    net = check_fit(folder, entries)
    check_types(file, net, entries)
    return config


def weights_of(folder: Path) -> Path:
    """The file with the weights of a saved model: `model.int8` where that is the only one."""
    weights = folder / WEIGHTS
    packed = folder / PACKED
    return packed if packed.is_file() and not weights.exists() else weights


def parts_of(file: Path) -> list[Path]:
    """The packed files that make up a model, a later one in place of an earlier one's tensors.

    A header that says `rest: NAME` holds only what the model doesn't share with the bundled model NAME beside it.
    """
    base = read_metadata(file).get(REST, "")
    if not re.fullmatch(r"\w+", base):
        return [file]
    return [file.parents[2] / base / "trained" / PACKED, file]


def _unpacked_entries(file: Path, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """What a packed file unfolds to: int8 with scales for parts of a row is float32, of as many elements."""
    unpacked = dict(entries)
    for scale_name, scale in entries.items():
        if not scale_name.endswith(SCALE):
            continue
        del unpacked[scale_name]
        name = scale_name.removesuffix(SCALE)
        values = entries.get(name)
        if values is None or not _scale_fits(values, scale):
            raise UserError(
                f"{file} can't be loaded: {name[:80]!r} and its scale don't fit. It is damaged."
            )
        unpacked[name] = TensorEntry("F32", values.shape)
    return unpacked


def _scale_fits(values: TensorEntry, scale: TensorEntry) -> bool:
    """Whether int8 values [..., out, in] have bfloat16 scales [..., out, parts] for equal parts of their rows."""
    if (values.dtype, scale.dtype) != ("I8", "BF16") or not values.shape or not scale.shape:
        return False
    parts = scale.shape[-1]
    return values.shape[:-1] == scale.shape[:-1] and parts > 0 and values.shape[-1] % parts == 0


def read_config(file: Path) -> dict[str, Any]:
    """The config.json of a model in timm's format, with every field checked; it raises as `read_json` does."""
    config = read_json(file)
    try:
        # Older files of timm have all fields in one object, newer ones may have more around them, which timm ignores.
        pretrained = config.get("pretrained_cfg", config)
        arguments = config.get("model_args", {})
        if "state_dict" in (*config, *pretrained):
            raise ValueError("weights stand in it (state_dict)")

        # A name such as `hf-hub:...` would fetch a model.
        for name in (config["architecture"], arguments.get("base") or "vit"):
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name[:80]!r} is no architecture's name")
        check_arguments(arguments)

        # timm would quietly leave the classifier untrained, or build one that isn't filled.
        classes = config.get("num_classes", pretrained.get("num_classes", 1000))
        if arguments.get("num_classes", classes) != classes:
            raise ValueError("it gives two numbers of classes")
        if not isinstance(classes, int) or classes < 0:
            raise ValueError("num_classes is no number of classes")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} can't be loaded: {error}. It is damaged, or was not saved by timm or moevision."
        ) from error
    return dict(config)


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that are not the model's own, and more layers than a model has, by a ValueError."""
    for name, value in arguments.items():
        if _NOT_THE_MODELS.fullmatch(name):
            raise ValueError(f"model_args may not hold {name[:40]!r}")
        if _COUNTS_LAYERS.search(name) and name != "moe_layers":
            values = value if isinstance(value, list) else [value]
            counts = [count for count in values if isinstance(count, int | float)]
            if sum(counts) > MAX_LAYERS:
                raise ValueError(f"model_args.{name} has more than {MAX_LAYERS} layers")


def check_types(file: Path, net: nn.Module, entries: Mapping[str, TensorEntry]) -> None:
    """Refuse whole numbers for weights: torch would load them without a word, also int8 ones without their scale.

    Counters, masks and tables that are whole numbers in the model (`num_batches_tracked`) may be so in the file.
    """
    floating = {name: tensor.is_floating_point() for name, tensor in net.state_dict().items()}
    for name, entry in entries.items():
        is_weight = floating.get(name, name.endswith((".weight", ".bias")))
        if is_weight and "F" not in entry.dtype:
            raise UserError(
                f"{file} can't be loaded: {name[:80]!r} holds whole numbers ({entry.dtype}), and the model has weights "
                "there: save them in fp32, bf16 or fp16."
            )


def check_fit(folder: Path, entries: Mapping[str, TensorEntry]) -> nn.Module:
    """The model, without memory; refused if the weights don't fill it, or it is larger than they are.

    It is filled with shapes alone, and in a model with the folder's own classes timm counts what is missing; with
    another number of them it would leave random numbers there.
    """
    import timm
    import torch

    from moevision.models.vit_moe import NO_SOURCE  # registers the vit_moe names

    try:
        with torch.device("meta"):
            net: nn.Module = timm.create_model(
                f"local-dir:{folder}", pretrained=False, pretrained_cfg_overlay=NO_SOURCE
            )
            fill(net, {name: torch.empty(entry.shape) for name, entry in entries.items()})
    except Exception as error:  # constructors fail in every type on arguments that don't fit; the cause stays attached
        raise UserError(
            f"The model in {folder} can't be loaded ({type(error).__name__}: {' '.join(str(error).split())[:160]}): "
            f"its {CONFIG} or its weights are damaged, or it was not saved by timm or moevision."
        ) from error
    described = sum(tensor.numel() for tensor in [*net.parameters(), *net.buffers()])
    held = sum(prod(entry.shape) for entry in entries.values())
    if described > 1.25 * held + _SPARE_ELEMENTS:
        raise UserError(
            f"The model in {folder} can't be loaded: {CONFIG} describes {described:,} weights and {WEIGHTS} holds "
            f"{held:,}. One of them is damaged, or belongs to another model."
        )
    return net


def fill(net: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load weights into a model as timm does: for its image size and its number of classes, by today's names.

    `create_model(pretrained=True)` would do it too. But timm looks elsewhere where there are no weights, and in some
    architectures stands a second model, such as a ResNet, that it then fetches from the hub.
    """
    import timm

    from moevision.models.vit_moe import NO_SOURCE

    # The function that brings weights of another size and of earlier versions into today's form, by timm's own naming.
    into_form = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    built = cast(Any, net)
    config = built.pretrained_cfg | NO_SOURCE
    config["state_dict"] = timm.models.clean_state_dict(weights)
    timm.models.load_pretrained(
        net,
        config,
        num_classes=built.num_classes,
        in_chans=config["input_size"][0],
        filter_fn=into_form,
    )
