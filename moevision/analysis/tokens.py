"""What MoE layers receive: pictures as the network takes them, patches of a picture, and the tokens before each layer.

Axes: B images, S image size in pixels, P patches (row-major), D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moevision.analysis.pictures import PictureSet
from moevision.data.transforms import normalize
from moevision.errors import UserError
from moevision.layers import MoEMlp, SoftRouter, moe_layers, routing_lock
from moevision.models.io import SavedModel

Pixels = npt.NDArray[np.uint8]


class Remembered:
    """Pictures of another set that are read or drawn once only, as long as they fit into memory; see `PictureSet`."""

    def __init__(self, pictures: PictureSet, max_bytes: int = 512 << 20) -> None:
        self.pictures, self.left = pictures, max_bytes
        self.class_names, self.name, self.part_names = pictures.class_names, pictures.name, pictures.part_names
        self.kept: dict[int, Pixels] = {}

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.pictures)

    def image(self, index: int) -> Pixels:
        """The picture, uint8 [S, S, 3]; raises `BadImageError`."""
        if index in self.kept:
            return self.kept[index]
        pixels = self.pictures.image(index)
        if pixels.nbytes <= self.left:
            self.kept[index], self.left = pixels, self.left - pixels.nbytes
        return pixels

    def label(self, index: int) -> int:
        """The class, an index into `class_names`; -1 if it isn't known."""
        return self.pictures.label(index)

    def picture_name(self, index: int) -> str:
        """The name in the other set."""
        return self.pictures.picture_name(index)

    def part_mask(self, index: int) -> Pixels | None:
        """The part at each pixel, uint8 [S, S]; None without parts."""
        return self.pictures.part_mask(index)


def read_images(pictures: PictureSet, indices: Iterable[int | np.integer[Any]]) -> Pixels:
    """Pictures by index, uint8 [B, S, S, 3]."""
    return np.stack([pictures.image(int(index)) for index in indices])


def network_input(model: SavedModel, images: Pixels) -> Tensor:
    """Pictures uint8 [B, S, S, 3] as the network takes them: normalised, [B, 3, S, S], on its device."""
    pixels = normalize(torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2), model.mean, model.std)
    weight = next(model.net.parameters())
    return pixels.to(weight.device, weight.dtype)


def image_patches(image: Pixels, grid: tuple[int, int]) -> Pixels:
    """The patches of a picture uint8 [S, S, 3], [P, S / rows, S / columns, 3].

    Raises:
        UserError: the grid doesn't tile the picture.
    """
    rows, columns = grid
    height, width = image.shape[:2]
    if height % rows or width % columns:
        raise UserError(f"A grid of {rows} x {columns} patches does not tile a picture of {height} x {width} px.")
    tiles = image.reshape(rows, height // rows, columns, width // columns, 3).swapaxes(1, 2)
    return tiles.reshape(rows * columns, *tiles.shape[2:])


@torch.no_grad()
def layer_inputs(net: nn.Module, pixels: Tensor, *, filled_slots: bool = False) -> dict[int, Tensor]:
    """What each MoE layer receives of every patch: block index -> [B, P, D]; prefix tokens are left out.

    Args:
        net: a converted model in eval mode.
        pixels: [B, 3, S, S], see `network_input`.
        filled_slots: of a Soft MoE layer what its experts receive instead, [B, slots of all experts, D].
    """
    received: dict[int, Tensor] = {}

    prefix = int(getattr(net, "num_prefix_tokens", 0))

    def keep(block: int, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        tokens = arguments[0]
        if filled_slots and isinstance(module, MoEMlp) and isinstance(module.router, SoftRouter):
            weight = module.router(tokens).dispatch_weight.flatten(2)
            received[block] = weight.mT.to(tokens.dtype) @ tokens
        else:
            received[block] = tokens[:, prefix:]

    layers = {layer.layer_index: layer for layer in moe_layers(net) if layer.layer_index is not None}
    with routing_lock(net):  # so that no other thread's pictures pass the hooks
        handles = [layer.register_forward_pre_hook(partial(keep, block)) for block, layer in layers.items()]
        try:
            net(pixels)
        finally:
            for handle in handles:
                handle.remove()
    return received
