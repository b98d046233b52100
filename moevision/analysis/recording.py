"""What is recorded of a model's routing, so that the three questions can be asked: of any model, and of ours.

A model that isn't ours takes part through a `Recording`: chosen experts and labels, and whatever else is known.
`recording_of` makes one of a model of this package.

Axes: I images, P patches (1 where images are routed as a whole), K choices best first, E experts, C classes, D width,
p patches whose inputs are known, R images that are run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import methodcaller
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch

from moevision.analysis.collect import layer_inputs, network_input
from moevision.analysis.images import read_images
from moevision.analysis.intervention import edited, numbered_layers
from moevision.analysis.specialization import Assignments
from moevision.errors import UserError
from moevision.models.io import from_clusters
from moevision.models.reading import routes_read

if TYPE_CHECKING:
    from torch import nn

    from moevision.analysis.images import PictureSet
    from moevision.analysis.trace import LayerTrace, RoutingTrace
    from moevision.layers import MoEMlp
    from moevision.models.io import SavedModel

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]
Flags = npt.NDArray[np.bool_]
Run = Callable[[int, Ints, Ints], npt.NDArray[Any]]
"""(place of the layer, images [R], their experts [R, P, K]) -> logits [R, C] with those routes; gates stay by rank.

A choice ~e, which is negative, is one of expert e that adds nothing to the layer's output; an image all of whose
choices are such is left with the residual alone.
"""

_INPUT_TOKENS = 20_000  # whose inputs are kept of each layer
_BATCH = 32


@dataclass(frozen=True)
class RecordedLayer:
    """What is known of one MoE layer of any model.

    Attributes:
        name: as it is shown, such as "L3".
        choices: [I, P, K] the experts of each patch, best first; P is 1 where images are routed as a whole.
        num_experts: E.
        amounts: [I, P, K] what a choice counts: whether it was kept, or what the patch takes; 1 if None.
        tokens_choose: False for expert choice and Soft MoE, which have no first choice and no route to be forced.
        by_image: all patches of an image share one choice.
        inputs: [I, p, D] what the router receives of some patches; None: no probe, no clusters.
        positions: [p] which patches those are; None: all in order.
        before: choices of the same router before training; one entry for each start that is known.
        untrained: choices of the same model with freshly drawn weights, which stands for it where that isn't known.
        clusters: choices by clusters of the layer's input; made from `inputs` if None and those are of all patches.
        cluster_start: the router was started from clusters of its input.
        read: whether any logit reads these patches: with a class-token head it doesn't read those of the last block.
    """

    name: str
    choices: Ints
    num_experts: int
    amounts: npt.NDArray[Any] | None = None
    tokens_choose: bool = True
    by_image: bool = False
    inputs: Floats | None = None
    positions: Ints | None = None
    before: Sequence[Assignments] = ()
    untrained: Sequence[Assignments] = ()
    clusters: Sequence[Assignments] | None = None
    cluster_start: bool = False
    read: bool = True


@dataclass(frozen=True)
class Recording:
    """The routing of any model on labelled images: what `three_questions` asks.

    Attributes:
        labels: [I] classes; negative: unknown.
        layers: the MoE layers, in order of depth.
        class_names: [C].
        parts: [I, P] the part that each patch shows; negative: unknown. None: not asked.
        objects: [I, P] whether a patch shows the object (background otherwise); None: not told apart.
        run: runs the model again with forced routes, for the swap test; None: not measured.

    Raises:
        UserError: arrays that don't belong together.
    """

    labels: Ints
    layers: Sequence[RecordedLayer]
    class_names: Sequence[str]
    parts: Ints | None = None
    objects: Flags | None = None
    run: Run | None = None

    def __post_init__(self) -> None:
        images = len(self.labels)
        for layer in self.layers:
            shape = np.shape(layer.choices)
            if len(shape) != 3 or shape[0] != images or np.max(layer.choices, initial=0) >= layer.num_experts:
                raise UserError(
                    f"The choices of {layer.name} are {list(shape)}: give [images, patches, choices], {images} images, "
                    f"experts 0 to {layer.num_experts - 1}."
                )
            if layer.inputs is not None and layer.inputs.shape[:2] != (images, _count(layer)):
                raise UserError(f"The inputs of {layer.name} must be [images, {_count(layer)}, width].")
        if not self.layers:
            raise UserError("A recording without a layer tells nothing: give the choices of at least one MoE layer.")


def _count(layer: RecordedLayer) -> int:
    return np.shape(layer.choices)[1] if layer.positions is None else len(layer.positions)


def recording_of(
    model: SavedModel,
    pictures: PictureSet,
    trace: RoutingTrace,
    *,
    baselines: Mapping[str, Sequence[Assignments]] | None = None,
    before: RoutingTrace | None = None,
    parts: Ints | None = None,
    part_names: Sequence[str] = (),
    swap: bool = True,
    seed: int = 0,
) -> Recording:
    """The recording of a model of ours.

    Args:
        model: the model, in eval mode.
        pictures: the images, in the order of the trace.
        trace: their routing.
        baselines: from `measure_baselines`: `untrained` stands for the router before training, `kmeans_input` for the
            clusters.
        before: routing of the same images by the model before it was trained, in place of `untrained`.
        parts: [I, P] the part that each patch shows.
        part_names: names of the parts; `background` is told apart from the object.
        swap: whether the swap test can be made.
        seed: of the patches whose inputs are kept.

    Raises:
        UserError: `before` has other layers or is about other images.
    """
    if before is not None and (before.picture_names != trace.picture_names or len(before.layers) != len(trace.layers)):
        raise UserError("The model before training must have the same MoE layers, and be traced on the same images.")
    patches = trace.grid[0] * trace.grid[1]
    kept = min(patches, max(1, _INPUT_TOKENS // max(1, len(trace))))
    positions = np.sort(np.random.default_rng(seed).permutation(patches)[:kept])
    inputs, some = _inputs(model, pictures, trace, positions), None if kept == patches else positions
    found = baselines or {}
    layers = []
    for place, (layer, read) in enumerate(zip(trace.layers, routes_read(model.net), strict=True)):
        mine = {
            name: [each for each in found.get(name, ()) if each.layer in (None, layer.layer)]
            for name in ("untrained", "kmeans_input")
        }
        old = []
        if before is not None:
            ago = before.layers[place]
            index = np.asarray(ago.expert_index)
            takes = np.asarray(ago.takes)
            old = [Assignments(layer.layer, 0, index, np.arange(len(before)), ago.num_experts, None, takes)]
        layers.append(
            replace(
                choices_of(layer),
                inputs=inputs[layer.layer],
                positions=None if layer.route_by == "image" else some,
                before=old,
                untrained=() if old else mine["untrained"],
                clusters=mine["kmeans_input"] or None,
                cluster_start=from_clusters(model.net),
                read=read,
            )
        )
    objects = None
    if parts is not None and "background" in part_names:
        objects = np.asarray(parts) != list(part_names).index("background")
    run = None
    if swap and trace.accuracy is not None:
        run = partial(run_forced, model, pictures, [layer.layer for layer in trace.layers])
    return Recording(np.asarray(trace.labels), layers, trace.class_names, parts, objects, run)


def choices_of(layer: LayerTrace) -> RecordedLayer:
    """The choices of a traced layer alone."""
    one = slice(None, 1) if layer.route_by == "image" else slice(None)
    return RecordedLayer(
        layer.name,
        np.asarray(layer.expert_index)[:, one],
        layer.num_experts,
        np.asarray(layer.takes)[:, one],
        tokens_choose=layer.kind == "token_choice",
        by_image=layer.route_by == "image",
    )


def _inputs(model: SavedModel, pictures: PictureSet, trace: RoutingTrace, positions: Ints) -> dict[int, Floats]:
    """Block -> [I, p, D] what each layer receives of those patches; [I, 1, D] their mean where images are routed."""
    found: dict[int, list[Floats]] = {layer.layer: [] for layer in trace.layers}
    whole = {layer.layer for layer in trace.layers if layer.route_by == "image"}
    for start in range(0, len(trace), _BATCH):
        rows = range(start, min(start + _BATCH, len(trace)))
        for block, tokens in layer_inputs(model.net, network_input(model, read_images(pictures, rows))).items():
            taken = tokens.mean(1, keepdim=True) if block in whole else tokens[:, torch.from_numpy(positions)]
            found[block].append(taken.float().cpu().numpy())
    return {block: np.concatenate(each) for block, each in found.items()}


@torch.inference_mode()
def run_forced(
    model: SavedModel, pictures: PictureSet, blocks: Sequence[int], place: int, images: Ints, experts: Ints
) -> npt.NDArray[np.float32]:
    """Logits [R, C] of images [R] whose patches go to these experts [R, P, K] in one layer; see `Run`.

    The blocks before the layer compute an image once for all its neighbours in the list that are the same image.
    """
    layer = numbered_layers(model.net)[blocks[place]]
    prefix = int(getattr(model.net, "num_prefix_tokens", 0))
    block = cast(Any, model.net).blocks[blocks[place]]
    logits = []
    for start in range(0, len(images), _BATCH):
        part = slice(start, start + _BATCH)
        each, rows = np.unique(images[part], return_inverse=True)
        pixels = network_input(model, read_images(pictures, each))
        again = torch.from_numpy(rows).to(pixels.device)
        repeat = block.register_forward_pre_hook(lambda _, inputs, again=again: (inputs[0][again], *inputs[1:]))
        try:
            logits.append(forced_logits(model.net, layer, pixels, experts[part], prefix))
        finally:
            repeat.remove()
    return np.concatenate(logits)


@torch.inference_mode()
def forced_logits(
    net: nn.Module, layer: MoEMlp, inputs: torch.Tensor, experts: Ints, prefix: int = 0
) -> npt.NDArray[np.float32]:
    """Logits [R, C] of what `net` takes [R, ...] while the patches go to these experts [R, P, K] in one of its layers.

    Args:
        net: in eval mode.
        layer: the layer.
        inputs: what `net` is called with.
        experts: best first; see `Run`.
        prefix: tokens before the patches, which stay where they are.
    """
    wanted = torch.from_numpy(experts.astype(np.int64)).to(inputs.device)
    with edited(net, {layer: methodcaller("choose", wanted, prefix)}):
        logits: npt.NDArray[np.float32] = net(inputs).float().cpu().numpy()
    return logits
