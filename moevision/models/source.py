"""Where trained weights come from: a timm name, a folder that timm or moevision saved, or a file of weights.

Pickles are never opened: folders and files must hold safetensors.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, cast

import timm
from torch import nn

from moevision.errors import UserError
from moevision.models.fetch import open_model
from moevision.models.hub import model_folder
from moevision.models.safe_config import check_types
from moevision.models.safe_files import read_header

ImageSize = int | tuple[int, int]


def create_from(
    source: str | Path,
    num_classes: int | None = None,
    image_size: ImageSize | None = None,
    *,
    weights: str | Path | None = None,
    load_weights: bool = True,
    **rates: float | None,
) -> nn.Module:
    """A model and its weights; another class count replaces the classifier, another size resamples positions.

    Args:
        source: a timm name, any timm address (`local-dir:`, `hf-hub:`), a saved model's folder or its run folder.
        num_classes: C; that of the weights if None.
        image_size: side(s) of the input in pixels; that of the weights if None.
        weights: a `.safetensors` file for the architecture that `source` names.
        load_weights: False builds the same architecture without weights.
        **rates: timm's drop_path_rate, proj_drop_rate and patch_drop_rate, for training.

    Raises:
        UserError: if the name or folder doesn't exist, or its weights can't be loaded.
    """
    options: dict[str, Any] = {"num_classes": num_classes, "img_size": image_size, **rates}
    address = _address(str(source))
    if weights is not None and load_weights:
        return _create_from_file(address, Path(weights), num_classes, options)
    return _create(address, str(source), load_weights, options)


def reshape(net: nn.Module, num_classes: int | None, image_size: ImageSize | None) -> nn.Module:
    """Change class count and image size as timm does, in place: a new classifier, resampled position embeddings.

    Raises:
        UserError: if the model can't be given another classifier or size.
    """
    state = cast(Any, net)
    try:
        if image_size is not None:
            sides = image_size if isinstance(image_size, tuple) else (image_size, image_size)
            if tuple(state.patch_embed.img_size) != sides:
                state.set_input_size(img_size=sides)
        if num_classes is not None and state.num_classes != num_classes:
            state.reset_classifier(num_classes)
    except (AttributeError, AssertionError) as error:
        raise UserError(
            f"{type(net).__name__} can't be changed to {num_classes} classes or {image_size} px ({error}): give a "
            "timm ViT, or leave num_classes and image_size out."
        ) from error
    return net


def unknown_name(name: str) -> str:
    """A sentence that says there is no such model, and which ones are near."""
    bare = name.split(".")[0]
    known = timm.list_models("*vit*") + timm.list_models("*deit*")
    near = difflib.get_close_matches(bare, known, n=4, cutoff=0.5)
    hint = f" Did you mean {', '.join(near)}?" if near else " See `timm.list_models('*vit*')`."
    return f"There is no model {name!r}.{hint}"


def _address(source: str) -> str:
    path = Path(source.removeprefix("local-dir:"))
    folder = model_folder(path)
    if folder is not None:
        return f"local-dir:{folder}"
    if path.is_file():
        raise UserError(
            f"{path} is a file: name its architecture too, such as deit_tiny_patch16_224, and give it as weights."
        )
    if ":" not in source and timm.is_model(source):
        return source
    if path.is_dir() or source.startswith("local-dir:"):
        raise UserError(f"{path} is no saved model: give a folder with config.json and model.safetensors.")
    if ":" not in source:
        raise UserError(unknown_name(source))
    return source


def _create(address: str, name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    try:
        return open_model(address, weights=pretrained, **options)
    except UserError:
        raise
    except Exception as error:  # hub, file and shape errors come in every type; the cause stays attached
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"The weights of {name!r} could not be loaded ({type(error).__name__}: {reason}). "
            "Give a timm name with network access, or a folder with config.json and model.safetensors."
        ) from error


def _create_from_file(address: str, file: Path, num_classes: int | None, options: dict[str, Any]) -> nn.Module:
    """First with the file's own classes: timm then checks that every weight is there, as it doesn't for a new head."""
    if file.suffix != ".safetensors":
        raise UserError(f"{file} is no .safetensors file: only safetensors are read, never pickles.")
    if not file.is_file():
        raise UserError(f"There is no file {file}.")
    if ":" in address:
        raise UserError(f"{address} has weights of its own: give {file} with the timm name of their architecture.")
    classes = _classes_in(file, timm.get_pretrained_cfg(address))
    overlay = {"file": str(file), "num_classes": classes}
    try:
        model: nn.Module = timm.create_model(
            address, pretrained=True, pretrained_cfg_overlay=overlay, **{**options, "num_classes": classes}
        )
    except Exception as error:  # files and shapes are wrong in every type; the cause stays attached
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} does not hold the weights of {address} ({type(error).__name__}: {reason}).") from error
    check_types(file, model, read_header(file))
    return reshape(model, num_classes, None)


def _classes_in(file: Path, config: Any) -> int:
    """Rows of the classifier in a file; 0 if it has none."""
    classifier = getattr(config, "classifier", None) or "head"
    name = classifier if isinstance(classifier, str) else classifier[0]
    found = read_header(file).get(f"{name}.weight")
    return found.shape[0] if found is not None and found.shape else 0
