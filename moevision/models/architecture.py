"""Which timm architecture a file of weights belongs to: by what the file says, else by the shapes of its tensors.

Nothing is allocated to find out: candidates are built on torch's meta device, first with one block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from moevision.errors import UserError
from moevision.models.safe_files import TensorEntry, read_header, read_metadata

_MODULES = ("vision_transformer", "deit")  # timm's families whose MLPs can become experts
_OWN = "architecture"  # the key under which a file's metadata name it
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_NOT_COMPARED = re.compile(r"pos_embed|head(_dist)?\..*")  # depend on the size of the image and on the classes
Shapes = dict[str, tuple[int, ...]]


def architecture_of(file: str | Path) -> str:
    """The timm name of the architecture that a file of weights belongs to, the likeliest if several fit.

    Raises:
        UserError: if the file isn't there or is damaged, or none fits.
    """
    return architectures_of(file)[0]


def architectures_of(file: str | Path) -> list[str]:
    """All timm names that fit a file of weights in timm's names, the likeliest first.

    What the file's own metadata name (`architecture`) stands alone. Otherwise names, shapes and the number of blocks
    must agree; what shapes don't show (heads, activation, colours) may differ between those that fit. Those trained at
    the file's own grid of positions come first, then short names.

    Raises:
        UserError: if the file isn't there or is damaged, or none fits.
    """
    try:
        entries, metadata = read_header(file), read_metadata(file)
    except FileNotFoundError as error:
        raise UserError(f"There is no file {file}.") from error
    named = metadata.get(_OWN, "")
    if named and timm.is_model(named):
        return [named]
    shapes = {name: entry.shape for name, entry in entries.items()}
    fitting = [name for name in _candidates(shapes) if _fits(name, shapes)]
    if not fitting:
        raise UserError(
            f"No timm ViT has the names and shapes of the weights in {file}: name its architecture, such as "
            "--model.arch.base deit_tiny_patch16_224."
        )
    return sorted(fitting, key=lambda name: (not _same_grid(name, entries), len(name), name))


def _candidates(shapes: Shapes) -> list[str]:
    """Names of the families, cut to those that say the patch's side where the name says one."""
    patch = shapes.get("patch_embed.proj.weight", (0,))[-1]
    names = [name for module in _MODULES for name in timm.list_models(module=module)]
    sided = re.compile(r"patch(\d+)")
    return [name for name in names if not (found := sided.search(name)) or int(found[1]) == patch]


def _fits(name: str, shapes: Shapes) -> bool:
    blocks = {int(found[1]) for key in shapes if (found := _BLOCK.match(key))}
    first = _shapes_of(name, depth=1)
    if first is None or not blocks or not _agree(first, {k: v for k, v in shapes.items() if _in_first_block(k)}):
        return False
    whole = _shapes_of(name)
    return whole is not None and _agree(whole, shapes)


def _in_first_block(key: str) -> bool:
    found = _BLOCK.match(key)
    return found is None or found[1] == "0"


def _shapes_of(name: str, **options: Any) -> Shapes | None:
    """Names and shapes of a model's tensors; None for one that can't be built so."""
    try:
        with torch.device("meta"):
            net: nn.Module = timm.create_model(name, **options)
    except Exception:  # constructors refuse in every type what isn't for them, such as one block
        return None
    return {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}


def _agree(model: Shapes, file: Shapes) -> bool:
    """Whether two sets of tensors are the same, but for the number of positions and of classes."""
    ours, theirs = ({k: v for k, v in each.items() if not _NOT_COMPARED.fullmatch(k)} for each in (model, file))
    if ours != theirs or ("pos_embed" in model) != ("pos_embed" in file):
        return False
    if "pos_embed" not in model:
        return True
    (*_, positions, width), (*_, own, own_width) = file["pos_embed"], model["pos_embed"]
    # A file with other positions than the model's own still has as many that are no patches.
    prefix = own - math.isqrt(own) ** 2
    return width == own_width and math.isqrt(positions - prefix) ** 2 == positions - prefix


def _same_grid(name: str, entries: Mapping[str, TensorEntry]) -> bool:
    """Whether the architecture's usual image size gives as many positions as the file has."""
    shapes = _shapes_of(name) or {}
    held = entries.get("pos_embed")
    return held is not None and shapes.get("pos_embed") == held.shape
