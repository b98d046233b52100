"""The model that a training has so far: from its checkpoint, of one process or of many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from moevision.config import MoEConfig
from moevision.errors import UserError
from moevision.models.config import build_model
from moevision.models.io import SavedModel, load_model, saying_what_fails
from moevision.models.safe_files import check_arguments

SUFFIX = ".ckpt"


def load_trained(address: str) -> SavedModel:
    """Load a model as `load_model` does, or the weights of a checkpoint (with a moving average: those).

    Args:
        address: of a saved model, or `runs/NAME/checkpoints/NAME.ckpt`, a file or a folder. No process group is needed.

    Raises:
        UserError: if there is no model, its files are damaged or foreign, or an earlier version wrote the checkpoint.
    """
    path = Path(address)
    if path.suffix != SUFFIX:
        return load_model(address)
    from moevision.train.checkpoint import START, SafeCheckpointIO, check_checkpoint
    from moevision.train.resume import MARK
    from moevision.train.task import ClassificationTask

    check_checkpoint(address)
    checkpoint = SafeCheckpointIO().load_checkpoint(path)
    with saying_what_fails(address):
        known = checkpoint.get(MARK, {}).get("data")
        if known is None:
            raise UserError(
                f"{address} doesn't name its classes, as those of this version do: go on with the run first."
            )
        options = dict(checkpoint["hyper_parameters"])
        sizes = options.pop("num_classes"), options.pop("image_size")
        task = ClassificationTask(**options)
        state = checkpoint["state_dict"].items()
        weights = {name.removeprefix("net."): x for name, x in state if name.startswith("net.")}
        kept = path.parent / START
        _check_size(task.arch, sizes, kept, weights)
        task.build(*sizes, load_pretrained=False, kept=kept)
        task.net.load_state_dict(weights)
        names, (mean, std) = known["class_names"], ((float(r), float(g), float(b)) for r, g, b in known["mean_std"])
        if len(names) != sizes[0] or not all(isinstance(name, str) for name in names):
            raise ValueError("its classes have no names")
        if not all(map(isfinite, (*mean, *std))) or min(std) <= 0:
            raise ValueError("its mean and deviation of pixels are none")
        return SavedModel(task.net.eval(), list(names), sizes[1], mean, std)


def _check_size(arch: MoEConfig, sizes: tuple[int, int], kept: Path, weights: Mapping[str, Tensor]) -> None:
    """Refuse options that describe a larger model than the weights are; nothing is allocated to find out."""
    options = {name: value for name, value in asdict(arch).items() if name != "pretrained" and value is not None}
    check_arguments({**options, "num_classes": sizes[0], "img_size": sizes[1]})
    with torch.device("meta"):
        outline = build_model(arch, *sizes, load_pretrained=False, kept=kept)
    described, held = (sum(x.numel() for x in each) for each in (outline.parameters(), weights.values()))
    if described > held:
        raise ValueError(f"it describes {described:,} weights and holds {held:,}")
