"""The model, layers and image of a view as data for the page; and how all views turn an image into the model's input.

- `ModelFacts`, `LayerFacts`, `PictureFacts`: layers of one model may differ in router, number of experts and k, so
  there are `LayerFacts` for each.
- `model_input`, `route_batch`: from an image file to logits and routing.
- `noise_of_training`: adds the routers' training noise to a model that is otherwise in eval mode.

Axes: I images, S the model's image size, C classes, P patches, L MoE layers, E experts, K experts per patch.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from moevision.analysis.collect import network_input
from moevision.analysis.effects import quantity
from moevision.analysis.intervention import Kind as Change
from moevision.analysis.intervention import refusal
from moevision.config import CROP, Framing
from moevision.data.images import BadImageError, full_size, safe_open, upright_rgb
from moevision.data.transforms import square_pixels
from moevision.demo.wire import data_uri
from moevision.errors import UserError, escape_controls
from moevision.layers import MoEMlp, Routing, SoftRouting, forward_routing, routing_lock
from moevision.layers.moe import moe_layers
from moevision.layers.routing import Kind, RouteBy
from moevision.models.convert import routes_read
from moevision.models.io import SavedModel
from moevision.types import Json, Pixels

# Phrases for routers that are fixed rules and learn nothing, by router name.
RULES = {
    "hash": "by a hash of the position",
    "random": "at random",
    "position": "by position",
    "colour": "by the patch's colour",
}

CHANGES: tuple[Change, ...] = ("ablate", "force", "random", "top_k", "capacity")


@dataclass(frozen=True)
class LayerFacts:
    """Properties of one MoE layer that don't depend on the image."""

    layer: int  # index of the transformer block
    router: str  # its name in `moevision.layers.ROUTERS`
    kind: Kind
    learned: bool  # False for routers that are fixed rules
    num_experts: int  # E
    # K. Token choice: experts of a patch; expert choice: experts of a patch on average; Soft MoE: cost of the slots, in
    # experts per patch
    top_k: int
    num_shared_experts: int = 0  # experts that compute every patch besides the routed ones
    capacity: float | None = None  # capacity factor in evaluation; None if nothing is dropped there
    train_capacity: float | None = None  # the same in training
    slots: int | None = None  # slots of one expert in Soft MoE; None for other routers
    # False: its output for patches doesn't reach the classifier, so that routes change no answer
    read_by_classifier: bool = True
    # intervention that has no meaning for this router -> the reason, as the end of a sentence
    refused: dict[str, str] = field(default_factory=dict)
    route_by: RouteBy = "token"  # `image`: all patches of an image share one choice
    # what the router does, as sentences by step, from `layers.words`
    steps: dict[str, str] = field(default_factory=dict)
    expert_parameters: int = 0  # number of parameters of one routed expert
    noise: str = "none"  # what the router adds in training: `learned`, `fixed`, `jitter` or `none`

    @property
    def name(self) -> str:
        """As in "L3"."""
        return f"L{self.layer}"

    @property
    def summary(self) -> str:
        """How it routes, as in "top-2 of 8 experts, capacity factor 0.8, plus 1 shared expert for every patch"."""
        parts = [self._choice_text()]
        if self.capacity is not None:
            parts.append(f"capacity factor {self.capacity:g}")
        if self.num_shared_experts:
            shared = quantity(self.num_shared_experts, "shared expert")
            parts.append(f"plus {shared} for every patch")
        if not self.read_by_classifier:
            parts.append("not read by the classifier")
        return ", ".join(parts)

    def _choice_text(self) -> str:
        """As in "top-2 of 8 experts"."""
        experts = quantity(self.num_experts, "expert")
        if self.kind == "soft":
            return (
                f"{experts} with {quantity(self.slots or 0, 'slot')} each, which read all patches"
            )
        if self.kind == "expert_choice":
            return f"{experts} that choose patches, {self.top_k} per patch on average"
        choice = f"top-{self.top_k} of {experts}"
        if self.route_by == "image":
            return f"{choice}, chosen once for the whole image"
        if self.learned:
            return choice
        return f"{choice} {RULES.get(self.router, 'by a rule')}, not learned"

    @property
    def k_text(self) -> str:
        """What k means, as in "top-2"."""
        if self.kind == "token_choice":
            return f"top-{self.top_k}"
        return f"{quantity(self.top_k, 'expert')} per patch on average"

    def to_json(self) -> Json:
        """The fields as JSON, with `name`, and the summary as `words`."""
        return {**asdict(self), "name": self.name, "words": self.summary}


def _layer_facts(
    layer: MoEMlp, routing: Routing, name: str | None, read_by_classifier: bool
) -> LayerFacts:
    """The facts of a MoE layer, from the layer and its routing of any image."""
    router: Any = layer.router
    options = getattr(router, "options", None)
    refusals = {kind: refusal(kind, router) for kind in CHANGES}
    slots = routing.slot_weight.shape[-1] if isinstance(routing, SoftRouting) else None
    all_parameters = sum(weight.numel() for weight in layer.experts.parameters())
    return LayerFacts(
        layer=int(routing.layer or 0),
        router=name or type(router).__name__,
        kind=routing.kind,
        learned=any(True for _ in router.parameters()),
        num_experts=routing.num_experts,
        top_k=router.top_k,
        num_shared_experts=layer.num_shared_experts,
        capacity=getattr(options, "eval_capacity_factor", None),
        train_capacity=getattr(options, "capacity_factor", None),
        slots=slots,
        read_by_classifier=read_by_classifier,
        refused={kind: reason for kind, reason in refusals.items() if reason is not None},
        route_by=routing.route_by,
        steps=router.explain(noisy=False, top_k=router.top_k, capacity=None),
        expert_parameters=all_parameters // routing.num_experts,
        noise=noise_of(router),
    )


def common(values: Iterable[int]) -> int | None:
    """The value if all are equal; None if they differ."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


MIN_SIDE = 16
"""Shortest side of an image in pixels: below it a patch would show one or two pixels, enlarged."""
MAX_ASPECT = 20
"""Longest side ÷ shortest side: beyond it the central square is less than 5 % of the image."""


@dataclass(frozen=True)
class ModelFacts:
    """Properties of a model for its views; made by `describe`.

    `routers` has one entry per MoE layer, in order of depth; `parameters` is the number of all its parameters.
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
    parameters: int = 0

    @property
    def layers(self) -> tuple[int, ...]:
        """Block indices of the MoE layers."""
        return tuple(router.layer for router in self.routers)

    def router(self, layer: int) -> LayerFacts:
        """The facts of the MoE layer in block `layer`."""
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
        """The largest k that can be set in all layers in which k has a meaning; 0 if there are none."""
        routers = [router for router in self.routers if "top_k" not in router.refused]
        return min((router.num_experts for router in routers), default=0)

    def to_json(self) -> Json:
        """The fields as JSON, with what the layers have in common."""
        return {
            **vars(self),
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "max_top_k": self.max_top_k,
            "grid": list(self.grid),
            "layers": list(self.layers),
            "class_names": list(self.class_names),
            "routers": [router.to_json() for router in self.routers],
        }


@dataclass(frozen=True, eq=False)
class PictureFacts:
    """The image as the model saw it."""

    pixels: Pixels = field(repr=False)  # uint8 [S, S, 3]
    id: str = ""  # by which the explorer requests it again; empty for an uploaded image
    name: str = "image"  # for display
    label: str | None = None  # name of its class, if known
    unlike: str | None = None  # a warning, if it is unlike the images that the model was trained on
    credit: str | None = None  # author and licence, where these must be shown

    def to_json(self) -> Json:
        """The fields as JSON; the pixels become `src`, the data URI of a lossless WebP."""
        fields = {**vars(self), "id": self.id or None, "src": data_uri(self.pixels)}
        del fields["pixels"]
        return fields


def describe(
    model: SavedModel, *, id: str = "model", title: str = "model", **texts: str
) -> ModelFacts:
    """The facts of a model, from the network; a UserError if it has no MoE layer or no whole grid of patches."""
    layers = moe_layers(model.net)
    if not layers:
        raise UserError(
            "This model has no MoE layer, so no routing: `moevision upcycle` gives it experts, or `fit --with-twin`."
        )
    _, routings = route_batch(model, np.zeros((1, model.image_size, model.image_size, 3), np.uint8))
    grid = routings[0].grid
    if grid is None:
        raise UserError("This model's patches are not a whole grid: patch dropping must be off.")
    router_names = getattr(model.net, "moe_config", {}).get("router")
    if not isinstance(router_names, list):
        router_names = [router_names] * len(layers)
    arguments_by_layer = zip(layers, routings, router_names, routes_read(model.net), strict=True)
    return ModelFacts(
        id=id,
        title=title,
        image_size=model.image_size,
        grid=grid,
        routers=tuple(_layer_facts(*arguments) for arguments in arguments_by_layer),
        class_names=tuple(model.class_names),
        parameters=sum(weight.numel() for weight in model.net.parameters()),
        **texts,
    )


def title_of(address: str | Path) -> str:
    """Title of a model by its path: the name of its run folder."""
    path = Path(address)
    if path.name == "model" and path.parent.name:
        path = path.parent
    return escape_controls(path.name)


def model_input(
    image: Image.Image | Pixels | str | Path, image_size: int, framing: Framing = CROP
) -> Pixels:
    """An image as the model sees it, uint8 [S, S, 3].

    A `BadImageError` if it can't be read, or is too small or too narrow to show anything.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UserError(f"An image is uint8 [H, W, 3], not {image.dtype} {list(image.shape)}.")
        if image.shape[:2] == (image_size, image_size):  # prepared already
            return image.copy()  # since torch warns of read-only arrays
        image = Image.fromarray(image)
    elif not isinstance(image, Image.Image):
        image = safe_open(image, image_size)
    image = upright_rgb(image)
    size, _ = full_size(image)
    short_side, long_side = sorted(size)
    too_narrow = short_side < MIN_SIDE or long_side > MAX_ASPECT * short_side
    if too_narrow and size != (image_size, image_size):
        width, height = size
        raise BadImageError(
            "given",
            f"it has {width} × {height} px, and the model would see too little in it; its shorter side must have at "
            f"least {MIN_SIDE} px, and its longer side at most {MAX_ASPECT} times as many",
        )
    return square_pixels(image, image_size, framing)


SHARP_PX = 672
"""Largest side of the image that is shown under the patches: 560 CSS pixels on a screen of 1.2 times that density."""


def sharp_square(image: Image.Image, image_size: int, framing: Framing = CROP) -> Pixels | None:
    """The part of an image that a model sees, uint8 [Q, Q, 3], S < Q <= `SHARP_PX`; None if Q would be S or less."""
    size, _ = full_size(image)
    side = max(size) if framing.fit == "pad" else min(size)
    side = min(side, SHARP_PX)
    return square_pixels(image, side, framing) if side > image_size else None


@torch.inference_mode()
def route_batch(model: SavedModel, pixels: Pixels) -> tuple[Tensor, list[Routing]]:
    """Logits [I, C] and one `Routing` per MoE layer for uint8 [I, S, S, 3]."""
    return forward_routing(model.net, network_input(model, pixels))


_GENERATOR_LOCK = threading.RLock()
"""Held while torch's global random generator has a temporary seed; the locks of models don't protect it."""


def noise_of(router: Any) -> str:
    """The noise that a router adds in training: `learned`, `fixed`, `jitter` or `none`."""
    return getattr(router, "noise", "none")


@contextmanager
def noise_of_training(net: nn.Module, seed: int | None) -> Iterator[None]:
    """Inside the scope, let the routers of `net` that have training noise add it; other threads wait for the model.

    Everything else, the capacity too, stays as in evaluation. The noise depends on the seed (None: no noise) and on the
    number of tokens only. The state of the global random generator is restored.
    """
    if seed is None:
        yield
        return
    with routing_lock(net), _GENERATOR_LOCK:
        routers: list[Any] = [layer.router for layer in moe_layers(net)]
        routers = [router for router in routers if noise_of(router) != "none"]
        states = [(router.training, router.options) for router in routers]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                for router in routers:
                    # Not `dataclasses.replace`, which would check the options: where evaluation has no capacity, it
                    # would refuse those that only a capacity can use.
                    router.options = copy.copy(router.options)
                    router.options.capacity_factor = router.options.eval_capacity_factor
                    router.training = True
                yield
            finally:
                for router, (training, options) in zip(routers, states, strict=True):
                    router.training = training
                    router.options = options
