"""What a view says about its model and its picture, and the one way a picture enters a model.

Axes: I images, S the model's image size, C classes, P patches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from moevision.analysis.collect import network_input
from moevision.data.images import BadImageError, safe_open
from moevision.data.transforms import square_pixels
from moevision.demo.kinds import LayerFacts, check_not_an_oracle, common, layer_facts
from moevision.demo.wire import data_uri
from moevision.errors import UserError
from moevision.layers import Routing, forward_routing
from moevision.layers.moe import moe_layers
from moevision.models.io import SavedModel
from moevision.names import shown

Pixels = npt.NDArray[np.uint8]
MIN_SIDE: Final = 16
"""Shortest side of an image in pixels: below it a patch would show one or two pixels, enlarged."""
MAX_ASPECT: Final = 20
"""Longest side ÷ shortest side: beyond it the central square is less than 5 % of the image."""


@dataclass(frozen=True)
class ModelFacts:
    """What a view says about the model that made it; see `describe`.

    `routers` has one entry per MoE layer, in order of depth.
    """

    id: str
    title: str
    image_size: int
    grid: tuple[int, int]
    routers: tuple[LayerFacts, ...]
    class_names: tuple[str, ...]
    variant: str = "trained"
    accuracy_text: str = ""
    data_text: str = ""

    @property
    def layers(self) -> tuple[int, ...]:
        """Block indices of the MoE layers."""
        return tuple(router.layer for router in self.routers)

    def router(self, layer: int) -> LayerFacts:
        """What there is to know about the MoE layer in block `layer`."""
        return self.routers[self.layers.index(layer)]

    @property
    def num_experts(self) -> int | None:
        """E; None where layers differ."""
        return common(router.num_experts for router in self.routers)

    @property
    def top_k(self) -> int | None:
        """K; None where layers differ."""
        return common(router.top_k for router in self.routers)

    @property
    def max_top_k(self) -> int:
        """The largest k that a person may ask for; 0 if k has no meaning in any layer."""
        return min((router.num_experts for router in self.routers if "top_k" not in router.refused), default=0)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON."""
        texts = {name: value for name, value in self.__dict__.items() if not isinstance(value, tuple)}
        numbers = {"num_experts": self.num_experts, "top_k": self.top_k, "max_top_k": self.max_top_k}
        lists = {"grid": list(self.grid), "layers": list(self.layers), "class_names": list(self.class_names)}
        return {**texts, **numbers, **lists, "routers": [router.to_json() for router in self.routers]}


@dataclass(frozen=True)
class PictureFacts:
    """The picture as the model saw it.

    Attributes:
        pixels: uint8 [S, S, 3].
        id: how the explorer asks for it again; None for a picture that a visitor brought.
        name: in words.
        label: its class in words, if known.
        unlike: why it is unlike the training data, in one sentence; None if it isn't.
    """

    pixels: Pixels = field(repr=False)
    id: str | None = None
    name: str = "picture"
    label: str | None = None
    unlike: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON, the pixels as a PNG."""
        return {
            "id": self.id,
            "name": self.name,
            "label": self.label,
            "src": data_uri(self.pixels),
            "unlike": self.unlike,
        }


def describe(model: SavedModel, *, id: str = "model", title: str = "model", **texts: str) -> ModelFacts:
    """What a view says about a model, read off the network.

    Raises:
        UserError: if it has no MoE layer, its patches aren't a grid, or a router must be told the answer.
    """
    layers = moe_layers(model.net)
    if not layers:
        raise UserError("This model has no MoE layer, so there is no routing to see: give a model made by moevision.")
    check_not_an_oracle(layers)
    _, routings = route_batch(model, np.zeros((1, model.image_size, model.image_size, 3), np.uint8))
    grid = routings[0].grid
    if grid is None or any(routing.layer is None for routing in routings):
        raise UserError("This model's patches are not a whole grid: patch dropping must be off.")
    return ModelFacts(
        id=id,
        title=title,
        image_size=model.image_size,
        grid=grid,
        routers=layer_facts(model.net, layers, routings),
        class_names=tuple(model.class_names),
        **texts,
    )


def title_of(address: str | Path) -> str:
    """What a model is called after where it lies: its run's folder."""
    path = Path(address)
    return shown(path.parent.name if path.name == "model" and path.parent.name else path.name)


def model_input(image: Image.Image | Pixels | str | Path, image_size: int) -> Pixels:
    """The central square of a picture as the model sees it, uint8 [S, S, 3].

    Raises:
        BadImageError: if it can't be read, or is too small or too narrow to show anything.
        UserError: if an array isn't uint8 [H, W, 3].
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UserError(f"A picture is uint8 [H, W, 3], not {image.dtype} {list(image.shape)}.")
        image = Image.fromarray(image)
    elif not isinstance(image, Image.Image):
        image = safe_open(image, image_size)
    _check_shape(image, image_size)
    return square_pixels(image.convert("RGB"), image_size)


def _check_shape(image: Image.Image, image_size: int) -> None:
    width, height = image.size
    short, long = min(image.size), max(image.size)
    if image.size != (image_size, image_size) and (short < MIN_SIDE or long > MAX_ASPECT * short):
        raise BadImageError(
            "given",
            f"it has {width} × {height} px, and the model would see too little in it; its shorter side must have at "
            f"least {MIN_SIDE} px, and its longer side at most {MAX_ASPECT} times as many",
        )


@torch.inference_mode()
def route_batch(model: SavedModel, pixels: Pixels) -> tuple[Tensor, list[Routing]]:
    """Logits [I, C] and one `Routing` per MoE layer for uint8 [I, S, S, 3]."""
    return forward_routing(model.net, network_input(model, pixels))


def softmax(logits: Tensor) -> npt.NDArray[np.float32]:
    """Probabilities [..., C] of logits [..., C]."""
    probabilities: npt.NDArray[np.float32] = logits.float().softmax(-1).cpu().numpy()
    return probabilities
