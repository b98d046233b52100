"""Save and load a finished model in timm's own format: `config.json` and `model.safetensors` in one folder.

Such a folder opens with timm alone, once `moevision` is imported:
`timm.create_model("local-dir:runs/x/model", pretrained=True)`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import SafetensorError
from torch import nn

import moevision.models.vit_moe  # noqa: F401  (registers the vit_moe names)
from moevision.errors import UserError
from moevision.files import write_text_atomic
from moevision.models.fetch import open_model
from moevision.names import shown


@dataclass(frozen=True)
class SavedModel:
    """A model with what is needed to use it on a picture.

    Attributes:
        net: the network, in eval mode.
        class_names: [C] in words.
        image_size: side of the square input in pixels.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
    """

    net: nn.Module
    class_names: list[str]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def save_model(model: SavedModel, folder: Path) -> None:
    """Write a model that was created under a timm name (or converted by `convert_to_moe`) to `folder`.

    A weight keeps its dtype in the file; loading gives fp32, which holds a bf16 or fp16 weight's exact value.

    Raises:
        OSError: if the folder can't be written or the disk is full; no half file of weights is left then.
    """
    hook = model.net.register_state_dict_post_hook(_contiguous)
    try:
        _save_for_timm(model, folder)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))  # what the system said is in the words only
        if number is None:
            raise
        (folder / "model.safetensors").unlink(missing_ok=True)
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
    finally:
        hook.remove()


def _contiguous(_net: nn.Module, state: dict[str, Any], _prefix: str, _metadata: dict[str, Any]) -> None:
    """Safetensors refuses weights in another order, such as those of a `channels_last` convolution."""
    state.update({name: tensor.contiguous() for name, tensor in state.items()})


def _save_for_timm(model: SavedModel, folder: Path) -> None:
    timm.models.save_for_hf(
        model.net,
        str(folder),
        model_config={"label_names": model.class_names},
        data_config={
            "input_size": (3, model.image_size, model.image_size),
            "mean": model.mean,
            "std": model.std,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
        },
        safe_serialization=True,
    )
    # timm gives the number of classes a second time, among the arguments. timm takes both; transformers hands both to
    # timm.create_model, which is a TypeError.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)
    write_text_atomic(folder / "config.json", json.dumps(config, indent=2))


def load_model(address: str) -> SavedModel:
    """Load a model from a folder written by `save_model`, or any timm address (`hf-hub:...`, a timm name).

    Args:
        address: a run folder, its `model` folder, or a timm address.

    Raises:
        UserError: if there is no model, or its files are damaged or foreign.
    """
    folder = model_folder(Path(address))
    if folder is None and Path(address).exists():
        raise UserError(
            f"{address} is no saved model: give a run's model/ folder (config.json and model.safetensors), "
            "such as runs/NAME/model."
        )
    if folder is None and ":" not in address and not timm.is_model(address):
        raise UserError(f"There is no model at {address!r}: give a folder such as runs/NAME/model, or a timm name.")
    try:
        saved = describe(open_model(address if folder is None else f"local-dir:{folder}").eval())
    except UserError:
        raise
    except Exception as error:  # a damaged file can fail in many ways; the cause stays attached
        raise UserError(
            f"The model {address!r} can't be loaded ({type(error).__name__}: {' '.join(str(error).split())[:160]}): "
            "its files are damaged, or it was not saved by timm or moevision."
        ) from error
    _check_usable(saved, address)
    return saved


def _check_usable(saved: SavedModel, address: str) -> None:
    if len(saved.mean) != 3 or len(saved.std) != 3 or getattr(saved.net, "in_chans", 3) != 3:
        raise UserError(
            f"The model {address!r} can't be used: it takes pictures with other channels than red, green, blue."
        )
    for name, weight in saved.net.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise UserError(f"The model {address!r} can't be used: its weight {name} holds NaN or infinity.")


def model_folder(path: Path) -> Path | None:
    """The folder with the files of a saved model, given it or its run folder; None if there is none."""
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    return None


def describe(net: nn.Module) -> SavedModel:
    """A model with the class names, size and colour statistics that it carries."""
    config = timm.data.resolve_model_data_config(net)
    words = _class_names(cast(dict[str, Any], net.pretrained_cfg), cast(int, net.num_classes))
    # The size that a ViT was built for or changed to; timm's configuration still has that of its first weights.
    size = getattr(getattr(net, "patch_embed", None), "img_size", None) or config["input_size"]
    if size[-1] != size[-2]:
        raise UserError(f"The model takes pictures of {size[-2]} x {size[-1]} px: only square ones are supported.")
    return SavedModel(net, words, int(size[-1]), tuple(config["mean"]), tuple(config["std"]))


def _class_names(config: dict[str, Any], classes: int) -> list[str]:
    """Class names in words, [C].

    timm's `label_names` are a list, or a dict from index to name where some indices have none; they may be codes such
    as WordNet ids, for which `label_descriptions` has the words.
    """
    names: Sequence[str] | dict[Any, str] = config.get("label_names") or []
    words: dict[str, str] = config.get("label_descriptions") or {}
    if not isinstance(names, dict):
        names = dict(enumerate(names)) if len(names) == classes else {}
    by_index = {int(index): words.get(name, name) for index, name in names.items()}
    return [shown(by_index.get(index, f"class {index}")) for index in range(classes)]


def best_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    return accelerator if accelerator is not None and torch.accelerator.is_available() else torch.device("cpu")
