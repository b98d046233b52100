"""A model's weights in eight bits: how they are packed.

`python -m benchmarks bundle --pack` writes what `pack` makes, and `moevision.models.io.unpack` reads it. What that
changes was measured by `python -m benchmarks packed` of commit 948ea0b2; GROUP and `compensated` were chosen on 96
training images.

Symmetric whole steps as in Jacob et al. 2018 (arXiv:1712.05877, section 2.1) with zero point 0; errors of rounding are
compensated as in GPTQ (Frantar et al. 2023, arXiv:2210.17323, section 3.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moevision.analysis.collect import network_input
from moevision.analysis.images import Data, PictureSet, open_pictures, read_images
from moevision.models.io import SavedModel, load_model, unpack
from moevision.models.safe_files import BASE_KEY, PACKED, SCALE, WEIGHTS

LEVELS = 127  # steps on either side of 0: what an int8 holds
COARSE = 31  # of a model that shares most of its weights with another
GROUP = 64  # inputs that share a factor: one large weight makes the steps of few others coarse
SMALLEST = 2**14  # elements; smaller matrices, such as a router, are not worth an error
CALIBRATION = 128  # training images


def pack(
    state: Mapping[str, Tensor],
    products: Mapping[str, Tensor] | None = None,
    *,
    group: int | None = GROUP,
    levels: int = LEVELS,
) -> dict[str, Tensor]:
    """Round the weights of linear layers, [out, in] and [E, out, in], to whole steps s q.

    `products` are those of `input_products`; a layer without them goes to the nearest steps. `group` inputs share a
    factor, all of a row if None.

    Returns:
        For each large matrix q (int8, same shape) under its name and s (bfloat16, [..., out, in / group]) under
        `NAME.scale`; other floating-point tensors in bfloat16, whole numbers as they are.
    """
    packed = {}
    for name, value in state.items():
        size = group or value.shape[-1] if value.ndim else 1
        is_matrix = name.endswith(".weight") and value.ndim in (2, 3) and value.numel() >= SMALLEST
        if is_matrix and not value.shape[-1] % size:
            weight = value.float()
            largest = weight.unflatten(-1, (-1, size)).abs().amax(-1)
            packed[name + SCALE] = scale = (
                (largest / levels).clamp_min(torch.finfo(torch.float32).tiny).bfloat16()
            )
            steps = scale.float().repeat_interleave(size, -1)
            product = (products or {}).get(name)
            packed[name] = (
                nearest(weight, steps, levels)
                if product is None
                else compensated(weight, steps, product, levels)
            )
        else:
            packed[name] = value.to(torch.bfloat16) if value.is_floating_point() else value
    return packed


def nearest(weight: Tensor, steps: Tensor, levels: int = LEVELS) -> Tensor:
    """Each weight's nearest whole step, int8."""
    return (weight / steps).round().clamp(-levels, levels).to(torch.int8)


def compensated(weight: Tensor, steps: Tensor, product: Tensor, levels: int = LEVELS) -> Tensor:
    """Whole steps, int8 [out, in], whose layer answers as the weights did: GPTQ.

    Input after input is rounded, and the inputs still to come take over its error as far as they go along with it:
    weight and size of a step [out, in], and X^T X [in, in] of the layer's inputs X.
    """
    damped = product + 0.01 * product.diagonal().mean() * torch.eye(len(product))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(
        inverse, upper=True
    )  # row i: what input i tells of those behind it
    left, found = weight.clone(), torch.empty_like(weight, dtype=torch.int8)
    for column in range(weight.shape[1]):
        found[:, column] = nearest(left[:, column], steps[:, column], levels)
        error = (left[:, column] - found[:, column] * steps[:, column]) / upper[column, column]
        left[:, column + 1 :] -= torch.outer(error, upper[column, column + 1 :])
    return found


@torch.inference_mode()
def input_products(model: SavedModel, pictures: PictureSet) -> dict[str, Tensor]:
    """For the weight of each `nn.Linear`, by name, X^T X [in, in] of its inputs X over all tokens of some images."""
    products: dict[str, Tensor] = {}

    def add(name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        tokens = inputs[0].flatten(0, -2).float()
        products[name] = products.get(name, 0) + tokens.T @ tokens

    hooks = [
        module.register_forward_pre_hook(partial(add, f"{name}.weight"))
        for name, module in model.net.named_modules()
        if isinstance(module, nn.Linear)
    ]
    for start in range(0, len(pictures), 32):
        model.net(
            network_input(
                model, read_images(pictures, range(start, min(start + 32, len(pictures))))
            )
        )
    for hook in hooks:
        hook.remove()
    return products


def pack_folder(folder: Path, data: Data, *, rest: Path | None = None) -> None:
    """Replace model.safetensors of a saved model by its packed file, made on training images of its data.

    `rest` is a packed model beside it that holds the same weights in part: these are left out, and the others, which
    must fit into the wheel with it, get coarser steps.
    """
    model = load_model(str(folder))
    seen = {"split": "train", "class_names": model.class_names, "limit": CALIBRATION}
    products = input_products(model, open_pictures(data, model.image_size, **seen))
    state, about_it = load_file(folder / WEIGHTS), {}
    if rest is not None:
        known, about_it = unpack(rest / "trained" / PACKED), {BASE_KEY: rest.name}
        state = {
            name: own
            for name, own in state.items()
            if name not in known or not torch.equal(own, known[name])
        }
    packed = pack(state, products, levels=LEVELS if rest is None else COARSE)
    save_file(packed, folder / PACKED, metadata=about_it)
    (folder / WEIGHTS).unlink()
