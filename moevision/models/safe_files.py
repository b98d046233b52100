"""Open files of unknown origin safely: JSON, YAML, safetensors, and saved models (config.json with weights).

These formats hold data only: unlike a pickle, reading them runs no code. The remaining dangers are checked for before
memory is allocated:
- a path that is no regular file (reading from a pipe could block for ever);
- more bytes than such a file can need;
- a config.json that doesn't describe the weights beside it. timm passes `model_args` to the model's constructor
  unchecked, so a few bytes could ask for terabytes, or (under `base`) for a model from the network. The model is
  therefore built on torch's meta device first, and must not be larger than its weights.

Symbolic links are followed, because the hub's cache consists of them.
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
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import yaml  # type: ignore[import-untyped]
from safetensors import SafetensorError, safe_open

from moevision.errors import UserError
from moevision.types import Json, TimmModel

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
# A packed model: a safetensors file with weights in eight bits and their scales (`moevision.models.io.unpack`). Its
# name doesn't end in .safetensors, because timm would load such a file and take the integers for weights.
PACKED = "model.int8"
SCALE = ".scale"  # ends the name of a tensor of scales
BASE_KEY = "rest"  # in the header of a packed file: the bundled model that has the remaining tensors, see `parts_of`
MAX_JSON_BYTES = 16 * 2**20  # the names of ImageNet-21k's 21 841 classes take 3 MB
MAX_YAML_BYTES = 2**20
MAX_LAYERS = 512  # far above any ViT's: bounds the time to build a model
# Elements that a model may have beyond those in its file: buffers that aren't saved, such as masks. 64 MB in fp32.
_SPARE_ELEMENTS = 16 * 2**20
_ARCHITECTURE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")
# Arguments of `timm.create_model` rather than of a model: sources of weights, and wrappers around the model.
_TIMM_ARGUMENTS = re.compile(
    "pretrained.*|checkpoint_path|cache_dir|scriptable|exportable|no_jit|features_only|feature_cfg|feature_cls|"
    "out_indices|model_cls|model_cfg|kwargs_filter|pruned|device|dtype"
)
# Digits in a row, in any of YAML's bases. The largest float64 has 309 decimal or 256 hexadecimal ones; PyYAML's time
# for a number to the base of 60 (1:59:59) grows with the square of its length.
_ENDLESS_NUMBER = re.compile("[0-9a-fA-F_:]{250}")
# Of a tag (`!!bool x`) PyYAML's constructors make errors of their own types.
_YAML_ERRORS = (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError)
_LAYER_COUNT_ARGUMENTS = re.compile("depth|layers|blocks|stages")


# ---- bytes, JSON, YAML


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """The content of a file of at most `max_bytes`, else a UserError; a FileNotFoundError is left to the caller."""
    with _open_regular(path) as file:
        # `read` allocates what it is asked for: no more than the file has. One byte more shows that it is too large.
        read_limit = min(max_bytes, os.fstat(file.fileno()).st_size)
        data = file.read(read_limit + 1)
    if len(data) > max_bytes:
        raise UserError(
            f"{path} is larger than the {max_bytes:,} bytes that such a file may have: give another one."
        )
    return data


def _open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; a UserError if it isn't a regular one. Non-blocking, since opening a pipe would wait."""
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
        raise UserError(f"{path} isn't a regular file: give one.")
    return os.fdopen(descriptor, "rb")


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; raises the errors of `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(Path(path), MAX_JSON_BYTES), str(path))


def parse_json(data: bytes, name: str) -> Any:
    """Parse JSON in UTF-8; `name` stands for the source in an error message."""
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{name} is damaged, or no JSON file ({str(error)[:120]}): give another one."
        ) from error


def read_yaml(path: str | Path) -> Json:
    """The keys and plain values of a YAML file, such as a run's config.yaml; raises the errors of `read_json`."""
    try:
        content = parse_yaml(read_bytes(Path(path), MAX_YAML_BYTES).decode("utf-8"))
    except _YAML_ERRORS as error:
        raise UserError(
            f"{path} can't be read ({' '.join(str(error).split())[:160]}): mend or remove it."
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is no configuration: it must have keys, such as data: {{path: ...}}."
        )
    return content


def parse_yaml(text: str) -> Any:
    """Parse YAML of plain values, without anchors: with them a few lines can expand to billions of values."""
    if len(text) > MAX_YAML_BYTES:
        raise UserError(
            f"A configuration has at most {MAX_YAML_BYTES:,} characters, and this one has {len(text):,}."
        )
    if "*" in text and any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
        raise UserError(
            "A configuration may not use YAML's anchors (&name, *name): write the values out."
        )
    if _ENDLESS_NUMBER.search(text):
        raise UserError("A configuration may have no number of 250 digits or more: shorten it.")
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
    """The metadata in the header of a safetensors file, such as the licence; raises the errors of `read_header`."""
    return _header_of(path)[1]


def _header_of(path: str | Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Entries and metadata of a safetensors file."""
    _open_regular(Path(path)).close()  # refuses what isn't a regular file
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


def check_model_folder(folder: Path, *, weights: bool = True) -> Json:
    """Check a saved model's config.json and (if `weights`) its weights; the content of the config.json."""
    config = read_config(folder / CONFIG)
    if not weights:
        return config

    file = weights_of(folder)
    is_packed = file.name == PACKED
    entries: dict[str, TensorEntry] = {}
    try:
        parts = parts_of(file) if is_packed else [file]
        for part in parts:
            entries |= read_header(part)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} has no {WEIGHTS}: only safetensors are read, never pickles."
        ) from error
    if not entries:
        raise UserError(f"{file} holds no weights: give the whole model again.")

    if is_packed:
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
    """The packed files that make up a model; where two have a tensor of the same name, the later file counts.

    A file whose header says `rest: NAME` holds only the tensors in which the model differs from the bundled model NAME,
    which supplies the rest. Bundled models lie side by side: NAME/trained/model.int8.
    """
    base_name = read_metadata(file).get(BASE_KEY, "")
    if not re.fullmatch(r"\w+", base_name):  # none; nor may a name lead out of the bundled models
        return [file]
    bundle = file.parents[2]
    return [bundle / base_name / "trained" / PACKED, file]


def _unpacked_entries(file: Path, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors after unpacking: an int8 tensor with scales becomes a float32 tensor of its shape, without scales."""
    unpacked = dict(entries)
    for scale_name, scale in entries.items():
        if not scale_name.endswith(SCALE):
            continue
        del unpacked[scale_name]
        name = scale_name.removesuffix(SCALE)
        weight = entries.get(name)
        if weight is None or not _scale_fits(weight, scale):
            raise UserError(
                f"{file} can't be loaded: {name[:80]!r} and its scale don't fit. It is damaged."
            )
        unpacked[name] = TensorEntry("F32", weight.shape)
    return unpacked


def _scale_fits(weight: TensorEntry, scale: TensorEntry) -> bool:
    """Whether an int8 weight [..., out, in] goes with bfloat16 scales [..., out, groups], of groups of a row."""
    if (weight.dtype, scale.dtype) != ("I8", "BF16") or not weight.shape or not scale.shape:
        return False
    groups = scale.shape[-1]
    return weight.shape[:-1] == scale.shape[:-1] and groups > 0 and weight.shape[-1] % groups == 0


def read_config(file: Path) -> Json:
    """The config.json of a model in timm's format, checked; raises the errors of `read_json`."""
    config = read_json(file)
    try:
        # Older files of timm are one flat object. Newer ones have `pretrained_cfg` inside it; timm ignores other keys.
        pretrained = config.get("pretrained_cfg", config)
        arguments = config.get("model_args", {})
        if "state_dict" in (*config, *pretrained):
            raise ValueError("weights stand in it (state_dict)")

        # A name such as `hf-hub:...` would fetch a model.
        for name in (
            config["architecture"],
            arguments.get("base") or "vit",
        ):  # "vit": there is no base
            if not _ARCHITECTURE_NAME.fullmatch(name):
                raise ValueError(f"{name[:80]!r} is no architecture's name")
        check_arguments(arguments)

        # With two numbers of classes timm would silently leave the classifier at its random initialization.
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
    """Refuse, by a ValueError, arguments of timm rather than of a model, and more than `MAX_LAYERS` layers."""
    for name, value in arguments.items():
        if _TIMM_ARGUMENTS.fullmatch(name):
            raise ValueError(f"model_args may not hold {name[:40]!r}")
        # `moe_layers` lists indices of layers, not a count.
        if _LAYER_COUNT_ARGUMENTS.search(name) and name != "moe_layers":
            values = value if isinstance(value, list) else [value]
            counts = [
                count for count in values if isinstance(count, int | float)
            ]  # JSON may say 1e9
            if sum(counts) > MAX_LAYERS:
                raise ValueError(f"model_args.{name[:40]} has more than {MAX_LAYERS} layers")


def check_types(file: Path, net: nn.Module, entries: Mapping[str, TensorEntry]) -> None:
    """Refuse integers in the place of weights: torch would silently convert them, even int8 ones without their scale.

    Tensors that are integers in the model too (`num_batches_tracked`, masks, tables) may be integers in the file.
    """
    is_floating = {name: tensor.is_floating_point() for name, tensor in net.state_dict().items()}
    for name, entry in entries.items():
        # A name that the model doesn't have, as of an earlier version, is judged by its ending.
        is_weight = is_floating.get(name, name.endswith((".weight", ".bias")))
        if is_weight and "F" not in entry.dtype:  # F32, F16, BF16, F8_...
            raise UserError(
                f"{file} can't be loaded: {name[:80]!r} holds whole numbers ({entry.dtype}), and the model has weights "
                "there: save them in fp32, bf16 or fp16."
            )


def check_fit(folder: Path, entries: Mapping[str, TensorEntry]) -> nn.Module:
    """The model on the meta device, without memory; a UserError if the weights don't fit it, or if it is larger.

    Loading tensors that have only shapes makes timm compare names and shapes with those of the model. The model has the
    folder's own number of classes: with another one timm would skip the classifier's weights instead of checking them.
    """
    import timm
    import torch

    from moevision.models.vit_moe import NO_SOURCE  # registers the vit_moe names

    try:
        with torch.device("meta"):
            net: nn.Module = timm.create_model(
                f"local-dir:{folder}", pretrained=False, pretrained_cfg_overlay=NO_SOURCE
            )
            load_adapted_weights(
                net, {name: torch.empty(entry.shape) for name, entry in entries.items()}
            )
    except Exception as error:  # constructors fail in every type on arguments that don't fit; the cause stays attached
        raise UserError(
            f"The model in {folder} can't be loaded ({type(error).__name__}: {' '.join(str(error).split())[:160]}): "
            f"its {CONFIG} or its weights are damaged, or it was not saved by timm or moevision."
        ) from error

    model_elements = sum(tensor.numel() for tensor in [*net.parameters(), *net.buffers()])
    file_elements = sum(prod(entry.shape) for entry in entries.values())
    # A model may be somewhat larger than its file: positions resampled for larger images, buffers that aren't saved.
    if model_elements > 1.25 * file_elements + _SPARE_ELEMENTS:
        raise UserError(
            f"The model in {folder} can't be loaded: {CONFIG} describes {model_elements:,} weights and {WEIGHTS} "
            f"holds {file_elements:,}. One of them is damaged, or belongs to another model."
        )
    return net


def load_adapted_weights(net: TimmModel, weights: dict[str, Tensor]) -> None:
    """Load weights into a model as timm does: adapted to its image size, number of classes and current tensor names.

    `create_model(pretrained=True)` does this too, but may access the network: where the folder has no weights, and for
    architectures that contain a second pretrained model, such as a ResNet.
    """
    import timm

    from moevision.models.vit_moe import NO_SOURCE

    # By timm's convention a model's module may define this function, which converts weights of other sizes and of
    # earlier versions.
    convert_weights = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    config = net.pretrained_cfg | NO_SOURCE
    config["state_dict"] = timm.models.clean_state_dict(weights)
    timm.models.load_pretrained(
        net,
        config,
        num_classes=net.num_classes,
        in_chans=config["input_size"][0],
        filter_fn=convert_weights,
    )
