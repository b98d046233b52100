"""What goes into a trace: pictures in batches, and the model with what it needs to see them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from moevision.analysis.pictures import PictureSet
from moevision.data.images import BadImageError
from moevision.data.transforms import normalize
from moevision.errors import DataWarning, UserError
from moevision.layers import routing_lock
from moevision.models.io import SavedModel, load_model


class Batch(NamedTuple):
    """Readable pictures: normalised images float32 [B, 3, S, S], labels int64 [B], and the first one's row."""

    images: Tensor
    labels: Tensor
    row: int


class PictureReader:
    """Reads pictures in batches and takes note of those that can't be read.

    Attributes:
        names: of the pictures read so far.
        bad: name and reason of those that couldn't be.
    """

    def __init__(self, pictures: PictureSet, model: SavedModel, batch_size: int) -> None:
        """Nothing is read yet."""
        self.pictures, self.model, self.batch_size = pictures, model, batch_size
        self.names: list[str] = []
        self.bad: list[tuple[str, str]] = []

    def batches(self, progress: bool) -> Iterator[Batch]:
        """All pictures in order, with a progress bar where there are more than a few batches."""
        starts = range(0, len(self.pictures), self.batch_size)
        hidden = not progress or len(starts) < 4
        for start in track(starts, "routing", console=Console(stderr=True), disable=hidden, transient=True):
            row = len(self.names)
            indices = range(start, min(start + self.batch_size, len(self.pictures)))
            pixels = [(index, image) for index in indices if (image := self._image(index)) is not None]
            if pixels:
                images = normalize(torch.stack([image for _, image in pixels]), self.model.mean, self.model.std)
                yield Batch(images, torch.tensor([self.pictures.label(index) for index, _ in pixels]), row)

    def _image(self, index: int) -> Tensor | None:
        """The picture, uint8 [3, S, S]; None if it can't be read."""
        name, size = self.pictures.picture_name(index), self.model.image_size
        try:
            pixels = self.pictures.image(index)
        except BadImageError as error:
            self.bad.append((name, error.reason))
            return None
        if pixels.shape != (size, size, 3):
            raise UserError(
                f"The picture {name} is {pixels.shape}, and the model takes {size} x {size} x 3: resize it."
            )
        self.names.append(name)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def report(self) -> None:
        """Warn of pictures that couldn't be read; a UserError if there is no other."""
        first = f", the first is {self.bad[0][0]}: {self.bad[0][1]}" if self.bad else ""
        if not self.names:
            raise UserError(f"None of the {len(self.pictures)} pictures can be read: mend or replace them{first}.")
        if self.bad:
            total = len(self.pictures)
            text = f"{len(self.bad)} of {total} pictures can't be used and are left out of the trace{first}"
            warnings.warn(text, DataWarning, stacklevel=3)


def as_saved_model(model: SavedModel | nn.Module | str | Path) -> SavedModel:
    """The model with its input size and normalisation; `class_names` is empty for a bare module without labels.

    Raises:
        UserError: if there is no such model, or a module doesn't say what pictures it takes.
    """
    if isinstance(model, SavedModel):
        return model
    if not isinstance(model, nn.Module):
        return load_model(str(model))
    sides = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if sides is None or len(set(sides)) != 1:
        raise UserError(
            f"{type(model).__name__} doesn't say which square pictures it takes: give a timm ViT, or a SavedModel with "
            "image_size, mean and std."
        )
    config = timm.data.resolve_model_data_config(model)
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names") or []
    words = list(names.values()) if isinstance(names, dict) else list(names)
    return SavedModel(model, words, int(sides[0]), tuple(config["mean"]), tuple(config["std"]))


def model_title(model: SavedModel | nn.Module | str | Path) -> str:
    """What a model is called: its run folder or address, or else timm's name of its architecture."""
    if isinstance(model, str | Path):
        path = Path(model)
        if not path.exists():
            return str(model)
        path = path.resolve()
        return path.parent.name if path.name == "model" else path.name
    net = model.net if isinstance(model, SavedModel) else model
    config: dict[str, Any] = getattr(net, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(net).__name__)


def weights_sha256(net: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters and buffers, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, and each layer's own mode back afterwards.

    A model in training mode is locked meanwhile; one in eval mode, as a server has it, stays free for others between
    the batches.
    """
    training = [module for module in net.modules() if module.training]
    if not training:
        yield
        return
    with routing_lock(net):
        net.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
