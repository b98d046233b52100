"""Save and load a finished model in timm's own format: `config.json` and `model.safetensors` in one folder.

Such a folder opens with timm alone, once `moevision` is imported:
`timm.create_model("local-dir:runs/x/model", pretrained=True)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import nn

import moevision.models.vit_moe  # noqa: F401  (registers the vit_moe names)
from moevision.errors import UserError


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
    """Write a model that was created under a timm name (or converted by `convert_to_moe`) to `folder`."""
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


def load_model(address: str) -> SavedModel:
    """Load a model from a folder written by `save_model`, or any timm address (`hf-hub:...`, a timm name).

    Args:
        address: a run folder, its `model` folder, or a timm address.

    Raises:
        UserError: if there is no model, or its files are damaged or foreign.
    """
    folder = _model_folder(Path(address))
    if folder is None and Path(address).exists():
        raise UserError(
            f"{address} is no saved model: give a run's model/ folder (config.json and model.safetensors), "
            "such as runs/NAME/model."
        )
    if folder is None and ":" not in address and not timm.is_model(address):
        raise UserError(f"There is no model at {address!r}: give a folder such as runs/NAME/model, or a timm name.")
    if folder is not None and not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder} has no model.safetensors: only safetensors are read, never pickles.")
    try:
        net = timm.create_model(address if folder is None else f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # a damaged file can fail in many ways; the cause stays attached
        raise UserError(
            f"The model {address!r} can't be loaded ({type(error).__name__}: {' '.join(str(error).split())[:160]}): "
            "its files are damaged, or it was not saved by timm or moevision."
        ) from error
    return _describe(net.eval())


def _model_folder(path: Path) -> Path | None:
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    return None


def _describe(net: nn.Module) -> SavedModel:
    config = timm.data.resolve_model_data_config(net)
    saved = cast(dict[str, Any], net.pretrained_cfg)
    names: Sequence[str] | dict[Any, str] = saved.get("label_names") or []
    words = list(names.values()) if isinstance(names, dict) else list(names)
    classes = cast(int, net.num_classes)
    if len(words) != classes:
        words = [f"class {index}" for index in range(classes)]
    return SavedModel(net, words, int(config["input_size"][-1]), tuple(config["mean"]), tuple(config["std"]))


def best_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    return accelerator if accelerator is not None and torch.accelerator.is_available() else torch.device("cpu")
