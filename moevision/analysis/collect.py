"""`collect_routing`: run a model over images and record what its MoE layers decided about every patch.

Also the inputs of networks (`network_input`), of their MoE layers (`layer_inputs`), and what any of their modules reads
and returns (`record_modules`). A model from elsewhere tells its routing by a hook (`Hooked`).

Axes: B images of a batch, I images, S image size in pixels, N tokens (prefix tokens first), P patches, T patches of one
block of a model from elsewhere (1 where it routes whole images), K choices, E experts, C classes, D width.
"""

from __future__ import annotations

import hashlib
import html
import inspect
import math
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from torch import Tensor, nn

from moevision import __version__
from moevision.analysis.images import Data, PictureSet, find_images, open_pictures
from moevision.analysis.trace import RoutingTrace, metadata_of
from moevision.data.images import BadImageError
from moevision.data.transforms import normalize
from moevision.errors import DataWarning, UserError, escape_controls
from moevision.layers import Routing, SoftRouting, forward_routing, moe_layers, routing_lock
from moevision.layers.routing import RouteBy, evaluating
from moevision.models.convert import layers_that_miss_classifier
from moevision.models.io import SavedModel, best_device, describe, load_model
from moevision.types import Array, Json, Pixels
from moevision.words import with_progress

# Beginning of a warning; the report suppresses the warning by this text.
UNREAD = "The classifier reads the class token alone, so the routes of patches"


def collect_routing(
    model: SavedModel | nn.Module | str | Path,
    data: Data,
    *,
    batch_size: int = 64,
    limit: int | None = None,
    path: str | Path | None = None,
    progress: bool = True,
    split: str = "test",
    seed: int = 0,
    root: str | Path = "data",
    run_dir: str | Path | None = None,
    name: str | None = None,
    routings: Hook | None = None,
) -> RoutingTrace:
    """Run a model over images and record what each MoE layer decided about each patch.

    Runs in eval mode on the best device, as `moevision predict` does. Interventions that are active apply. Images that
    can't be read are left out and counted in a `DataWarning`. Layers whose patch routes don't reach the classifier are
    named in a warning.

    Args:
        model: a run folder, its model/ folder or a timm address; a `SavedModel`; or any timm ViT with MoE layers. The
            normalisation of a bare ViT is read from its timm configuration, and its outputs are taken to be the data's
            classes, in order, if there are as many.
        data: as `open_pictures` takes them: a dataset's name, a folder, a torch dataset of (PIL image, label), or a
            `PictureSet`.
        batch_size: images per forward pass.
        limit: take at most so many images, balanced by class.
        path: a file to save the trace to.
        progress: say how far it is, on a terminal by a bar.
        split: which part of the data: test, val, train or all.
        seed: random seed of the split, of generated images and of the choice that `limit` makes.
        root: folder in which named datasets live.
        run_dir: a run's folder, whose splits.csv says which images were held out; by default the model's own,
            where `data` are the images that it was trained on.
        name: what the model is called in the trace; by default its folder's or its architecture's name.
        routings: of a model from elsewhere, given as a `SavedModel`: the hook that tells what its blocks decided.

    Raises:
        UserError: if there is no such model or data, the model has no MoE layer, or no image can be read.

    Examples:
        >>> from moevision.demo import bundled_model
        >>> trace = collect_routing(bundled_model("pets"), "synthetic_pets", limit=16, progress=False)
        >>> trace.layer(1).counts().sum(0).shape  # choices per expert
        (8,)
    """
    saved = as_saved_model(model)
    if routings is not None:
        saved = hooked(saved, routings)
    if run_dir is None and isinstance(model, str | Path) and isinstance(data, str | Path):
        # On the data of its own run a model is evaluated on the images that the run held out.
        run_images = find_images(str(model), str(data))
        if run_images is not None:
            run_dir = run_images.run
    pictures = open_pictures(
        data,
        saved.image_size,
        framing=saved.framing,
        split=split,
        limit=limit,
        seed=seed,
        class_names=saved.class_names or None,
        root=root,
        run_dir=run_dir,
    )
    reader = PictureReader(pictures, saved, batch_size)
    net = saved.net.to(best_device())
    batches = []
    with evaluating(net):
        if not isinstance(net, Hooked):
            _warn_of_unread_layers(net)
        for batch in reader.batches(progress):
            batch_arrays, layer_metadata = _arrays_of_batch(net, batch)
            batches.append(batch_arrays)
    reader.report()

    arrays = {
        name: np.concatenate([batch_arrays[name] for batch_arrays in batches])
        for name in batches[0]
    }
    num_outputs = arrays["probabilities"].shape[1]
    trace_metadata = {
        **layer_metadata,
        "picture_names": reader.names,
        "class_names": pictures.class_names,
        "prediction_names": _output_names(num_outputs, saved.class_names, pictures.class_names),
        "model": name or model_title(model),
        "data": pictures.name,
        "provenance": {
            **_provenance(net),
            "settings": {"limit": limit, "seed": seed, "batch_size": batch_size},
            "unreadable": len(reader.bad),
        },
    }
    trace = RoutingTrace.from_arrays(arrays, metadata_of(trace_metadata))
    if path is not None:
        trace.save(path)
    return trace


def _warn_of_unread_layers(net: nn.Module) -> None:
    """Warn of MoE layers whose routes of patches change no answer: no gradient leads from the logits to them."""
    # Gradients are needed, also where the caller turned them off.
    with routing_lock(net), torch.inference_mode(False):
        unread = layers_that_miss_classifier(net)
    if unread:
        warnings.warn(
            f"{UNREAD} in block {', '.join(map(str, unread))} change no answer: pool over patches "
            "(global_pool='avg'), or leave that block dense (moevision.models.read_layer_indices).",
            stacklevel=1,  # always the same line, so that Python shows the warning once
        )


def _output_names(count: int, *candidates: Sequence[str]) -> tuple[str, ...]:
    """Names of the model's outputs: the first candidate with `count` names, or else "class 0", "class 1", ..."""
    fitting = (tuple(names) for names in candidates if len(names) == count)
    return next(fitting, tuple(f"class {index}" for index in range(count)))


def _provenance(net: nn.Module) -> Json:
    """Time, device, library versions and a checksum of the weights, for the metadata of a trace."""
    versions = {
        "moevision": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
    }
    return {
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": best_device().type,
        "versions": versions,
        "weights_sha256": weights_sha256(net),
    }


@torch.inference_mode()
def _arrays_of_batch(net: nn.Module, batch: Batch) -> tuple[dict[str, Array], Json]:
    """The arrays of a trace for the images of one batch, and its metadata about layers and patch grid."""
    dtype = next(net.parameters()).dtype
    images = batch.images.to(best_device(), dtype)
    output, routings = (
        net.decide(images) if isinstance(net, Hooked) else forward_routing(net, images)
    )
    if not routings:
        raise UserError(
            "This model has no MoE layers: give a model that was converted by moevision.convert_to_moe."
        )
    grids = {routing.grid for routing in routings}
    if len(grids) > 1 or None in grids:
        raise UserError(
            "This model's tokens are no single grid of patches: give a plain ViT, without patch dropping."
        )

    if 0 in (getattr(net, "num_classes", None), output.shape[1]):  # no head
        probabilities = output.float()[:, :0]
        predictions = torch.full_like(batch.labels, -1)
    else:
        probabilities = output.float().softmax(-1)  # [B, C]
        predictions = probabilities.argmax(-1)  # [B]

    tensors = {
        "labels": batch.labels,
        "predictions": predictions,
        "probabilities": probabilities,
    }
    blocks = []
    for position, routing in enumerate(routings):
        block = position if routing.layer is None else routing.layer
        blocks.append(block)
        for key, tensor in _layer_tensors(routing).items():
            tensors[f"L{block}.{key}"] = tensor

    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    return arrays, {
        "layers": blocks,
        "kinds": [routing.kind for routing in routings],
        "route_by": [routing.route_by for routing in routings],
        "grid": grids.pop(),
    }


def _layer_tensors(routing: Routing) -> dict[str, Tensor]:
    """One layer's decision about the patches of a batch, under the names of `LayerTrace`'s arrays."""
    patches = slice(routing.num_prefix_tokens, None)
    probs = routing.probs[:, patches].float()  # [B, P, E]
    # Padded by a zero, so that a layer with one expert has a second-best probability too.
    top_two = nn.functional.pad(probs, (0, 1)).topk(2, dim=-1).values  # [B, P, 2]
    tensors = {
        "expert_index": routing.expert_index[:, patches].to(torch.int16),
        "kept": routing.kept[:, patches],
        "combine_weight": routing.combine_weight[:, patches].float(),
        "probs": probs.half(),
        "margin": top_two[..., 0] - top_two[..., 1],
        "entropy_bits": torch.special.entr(probs).sum(-1) / math.log(2),
    }
    if isinstance(routing, SoftRouting):
        # How much of a token the slots of each expert read.
        read_weight = routing.dispatch_weight.sum(-1)  # [B, N, E, slots] -> [B, N, E]
        read_weight = read_weight.gather(-1, routing.expert_index)  # [B, N, K]
        tensors["read_weight"] = read_weight[:, patches].float()
    return tensors


class Batch(NamedTuple):
    """Readable images: normalised float32 [B, 3, S, S], and labels int64 [B]."""

    images: Tensor
    labels: Tensor


@dataclass
class PictureReader:
    """Reads images in batches."""

    pictures: PictureSet
    model: SavedModel
    batch_size: int
    names: list[str] = field(default_factory=list)  # of the images read so far
    bad: list[tuple[str, str]] = field(default_factory=list)  # name and reason of unreadable ones

    def batches(self, progress: bool) -> Iterator[Batch]:
        """All images in order; with `progress` it is said how far that is."""
        starts = range(0, len(self.pictures), self.batch_size)
        for start in with_progress(starts, "routing", len(starts)) if progress else starts:
            images = []
            labels = []
            for index in range(start, min(start + self.batch_size, len(self.pictures))):
                image = self._image(index)
                if image is not None:
                    images.append(image)
                    labels.append(self.pictures.label(index))
            if images:
                pixels = normalize(torch.stack(images), self.model.mean, self.model.std)
                yield Batch(pixels, torch.tensor(labels))

    def _image(self, index: int) -> Tensor | None:
        """The image, uint8 [3, S, S]; None if it can't be read."""
        name = self.pictures.picture_name(index)
        try:
            pixels = self.pictures.image(index)
        except BadImageError as error:
            self.bad.append((name, error.reason))
            return None
        self.names.append(name)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def report(self) -> None:
        """Warn of images that couldn't be read; a UserError if there is no other."""
        total = len(self.pictures)
        example = "".join(f", the first is {name}: {reason}" for name, reason in self.bad[:1])
        if not self.names:
            raise UserError(
                f"None of the {total} images can be read: fix or replace them{example}."
            )
        if self.bad:
            text = f"{len(self.bad)} of {total} images can't be used and are left out of the trace{example}"
            warnings.warn(text, DataWarning, stacklevel=3)


def as_saved_model(model: SavedModel | nn.Module | str | Path) -> SavedModel:
    """The model with its input size and normalisation; `class_names` is empty for a bare module without labels."""
    if isinstance(model, SavedModel):
        return model
    if not isinstance(model, nn.Module):
        return load_model(str(model))
    if getattr(getattr(model, "patch_embed", None), "img_size", None) is None:
        raise UserError(
            f"{type(model).__name__} doesn't say which square images it takes: give a timm ViT, or a SavedModel with "
            "image_size, mean and std."
        )
    saved = describe(model)
    has_placeholder_names = saved.class_names == [
        f"class {index}" for index in range(len(saved.class_names))
    ]
    return replace(saved, class_names=[]) if has_placeholder_names else saved


def model_title(model: SavedModel | nn.Module | str | Path) -> str:
    """What a model is called: its run folder or address, or else timm's name of its architecture."""
    if isinstance(model, str | Path):
        path = Path(model).resolve()
        title = path.parent.name if path.name == "model" else path.name
        return escape_controls(title if path.exists() else str(model))
    net = model.net if isinstance(model, SavedModel) else model
    config: Json = getattr(net, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(net).__name__)


def weights_sha256(net: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters and buffers, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def network_input(model: SavedModel, images: Pixels) -> Tensor:
    """Images uint8 [B, S, S, 3] as input of the network: normalised, [B, 3, S, S], in its dtype and on its device."""
    channels_first = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    pixels = normalize(channels_first, model.mean, model.std)
    weight = next(model.net.parameters())
    return pixels.to(weight.device, weight.dtype)


@contextmanager
def record_modules(
    net: nn.Module, modules: Mapping[Any, nn.Module]
) -> Iterator[tuple[dict[Any, Tensor], dict[Any, Tensor]]]:
    """Within the scope, store the input and the output of modules of `net` by their keys, in the order of the calls.

    It holds the network's lock, so that what other threads record isn't stored.
    """
    inputs: dict[Any, Tensor] = {}
    outputs: dict[Any, Tensor] = {}

    def store(key: Any, _: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[key] = arguments[0]
        outputs[key] = output

    with routing_lock(net), ExitStack() as hooks:
        for key, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(store, key)))
        yield inputs, outputs


@torch.no_grad()
def layer_inputs(net: nn.Module, pixels: Tensor) -> dict[Any, Tensor]:
    """Input of each MoE layer of a net in eval mode: block index -> [B, P, D], without prefix tokens.

    Of a model from elsewhere: [B, T, D], of the blocks whose hook tells it.
    """
    if isinstance(net, Hooked):
        _, blocks = net(pixels)
        known = ((block, choices.inputs) for block, choices in enumerate(blocks))
        return {block: inputs for block, inputs in known if inputs is not None}
    first_patch = int(getattr(net, "num_prefix_tokens", 0))
    layers = {layer.layer_index: layer for layer in moe_layers(net)}
    with record_modules(net, layers) as (inputs, _):
        net(pixels)
    return {block: tokens[:, first_patch:] for block, tokens in inputs.items()}


# ---- models from elsewhere


@dataclass(frozen=True)
class Choices:
    """What one MoE block of any model decided about a batch of images.

    Attributes:
        experts: [B, T, K] whole numbers, best first. Negative: not computed, such as a choice that capacity dropped. T
            is the same in all blocks, or 1 where a block routes whole images.
        num_experts: E. If tokens name all E, the block is soft: it weighs them, and no token chooses.
        weights: [B, T, K] of at least 0; None: equal. An expert of weight 0 isn't computed: it is the token's next
            choice, which takes over where an expert is removed.
        inputs: [B, T, D] what the router reads; None: there are no probe and no clusters to compare with.
    """

    experts: Tensor
    num_experts: int
    weights: Tensor | None = None
    inputs: Tensor | None = None

    def check(self, block: int, images: int) -> None:
        """Raise a UserError for what is no decision about a batch of so many images."""
        shape = list(self.experts.shape)
        weights = torch.ones(shape) if self.weights is None else self.weights
        inputs = self.experts.float() if self.inputs is None else self.inputs
        problem = None
        if len(shape) != 3 or shape[0] != images or 0 in shape or self.experts.is_floating_point():
            problem = (
                f"experts {shape}: give whole numbers [images, patches, choices], {images} images"
            )
        elif int(self.experts.max()) >= self.num_experts:
            problem = (
                f"an expert {int(self.experts.max())}: give 0 to {self.num_experts - 1}, negative ones for what isn't "
                "computed, or another num_experts"
            )
        elif list(weights.shape) != shape or not ((weights >= 0) & (weights < math.inf)).all():
            problem = (
                f"weights {list(weights.shape)}: give finite ones of at least 0, {shape} as experts"
            )
        elif list(inputs.shape[:-1]) != shape[:2] or not inputs.isfinite().all():
            problem = f"inputs {list(inputs.shape)}: give finite ones, {shape[:2]} and their width"
        if problem is not None:
            raise UserError(f"Block {block} of the hook has {problem}.")

    def routing(self, block: int, patches: int) -> Routing:
        """The decision as that of one of our layers; one about whole images is repeated for all their patches."""
        experts = self.experts.long().expand(-1, patches, -1)  # [B, P, K]
        weights = torch.ones_like(experts) / experts.shape[-1]
        if self.weights is not None:
            weights = self.weights.float().expand_as(experts)
        is_named = experts >= 0
        kept = is_named & (weights > 0)
        # A choice that names no expert becomes a copy of the first one, which isn't kept.
        first = experts[..., :1].clamp(min=0)
        experts = experts.where(is_named, first)

        none = weights.new_zeros(len(experts), patches, self.num_experts)
        sums = none.scatter_add(-1, experts, weights * kept)  # [B, P, E]
        total = sums.sum(-1, keepdim=True).clamp(min=_LEAST)
        shares = sums / total

        routing = Routing(shares, shares, shares, None, experts, weights, kept)
        if experts.shape[-1] == self.num_experts > 1:
            logits = shares.clamp(min=_LEAST).log()
            routing = SoftRouting.of(logits[..., None])

        at_most = math.isqrt(patches)
        rows = max(n for n in range(1, at_most + 1) if patches % n == 0)
        by: RouteBy = "image" if self.experts.shape[1] == 1 else "token"
        return replace(routing, layer=block, grid=(rows, patches // rows), route_by=by)


Hook = Callable[..., tuple[Tensor | None, Sequence[Choices]]]
"""(net, images [B, 3, S, S], forced=None) -> logits [B, C] or None, and the `Choices` of each block in order of depth.

`forced` maps a block's position, from 0, to experts [B, T, K] that it must take in place of its own, best first; a
negative one is not computed, and a token without others gets nothing from the block. Forced to its own choices, a block
must compute what it does. A hook that takes two arguments can't be forced. Images are float32, whatever the net is.
"""

_LEAST = 1e-12  # weight that stands for 0 where it is divided by, or its logarithm taken


class Hooked(nn.Module):
    """A net from elsewhere with its hook, for functions that take nets with our layers.

    Args:
        net: any module that takes images.
        routings: its hook.
        num_classes: how many logits it must have.
        untrained: the same net before it was trained.
    """

    def __init__(
        self, net: nn.Module, routings: Hook, num_classes: int, untrained: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.net = net
        self.routings = routings
        self.num_classes = num_classes
        # A tuple, so that its weights are none of this module's.
        self.untrained: tuple[Hooked, ...] = ()
        if untrained is not None:
            self.untrained = (Hooked(untrained, routings, num_classes),)
        # First of the parameters, which say type and device of images: for a net that has none.
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)
        self.can_force = len(inspect.signature(routings).parameters) > 2

    def forward(
        self, images: Tensor, *forced: Mapping[int, Tensor]
    ) -> tuple[Tensor, Sequence[Choices]]:
        """Logits [B, C], or [B, 0] if the hook has none, and each block's choices; a UserError for anything else."""
        with own_code("The hook"):
            logits, blocks = self.routings(self.net, images, *forced)
            if logits is None:
                logits = images.new_empty(len(images), 0)
            shape = list(logits.shape)
        fits = shape[1:] == [0] or shape == [len(images), self.num_classes]
        if not fits or not logits.isfinite().all():
            raise UserError(
                f"The hook returned logits {shape}: give finite ones [{len(images)}, {self.num_classes}], one for each "
                "of the model's class_names, or None."
            )
        if not blocks or not all(isinstance(choices, Choices) for choices in blocks):
            raise UserError("The hook returned no MoE block: return (logits, [Choices(...), ...]).")
        for block, choices in enumerate(blocks):
            choices.check(block, len(images))
        return logits, blocks

    def decide(self, images: Tensor) -> tuple[Tensor, list[Routing]]:
        """Logits, and the decision of each block about the patches of the one grid that all blocks share."""
        logits, blocks = self(images)
        counts = {choices.experts.shape[1] for choices in blocks} - {1}
        if len(counts) > 1:
            raise UserError(
                f"The hook's blocks have {' and '.join(map(str, sorted(counts)))} patches: repeat the choices of the "
                "coarser ones, so that all have as many."
            )
        patches = max(counts, default=1)
        return logits, [choices.routing(block, patches) for block, choices in enumerate(blocks)]


def hooked(model: SavedModel, routings: Hook, untrained: nn.Module | None = None) -> SavedModel:
    """The model with its hook."""
    net = Hooked(model.net, routings, len(model.class_names), untrained)
    return replace(model, net=net.eval())


@contextmanager
def own_code(name: str) -> Iterator[None]:
    """Run code of the user's; what it raises becomes a UserError that ends with the error's own last line."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        last_line = traceback.format_exception_only(error)[-1].strip()
        raise UserError(
            f"{name} failed at line {place.lineno} of {Path(place.filename).name} (--traceback shows the way there): "
            f"{last_line}"
        ) from error


@dataclass(frozen=True, repr=False)
class Table:
    """A small table for printing, and for a notebook, which shows it where it is the last line of a cell.

    Attributes:
        head: names of the columns.
        rows: one cell for each column; the first cell is the row's name.

    >>> Table(["expert", "share"], [["E0", "9 %"], ["E1", "16 %"]])
    expert  share
    E0        9 %
    E1       16 %
    """

    head: Sequence[object]
    rows: Sequence[Sequence[object]]

    def __repr__(self) -> str:
        """Columns of text: the first is left-aligned, the others are right-aligned."""
        lines = [[str(cell) for cell in row] for row in (self.head, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text_lines = []
        for row_name, *values in lines:
            cells = [row_name.ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(values, widths[1:], strict=True)]
            text_lines.append("  ".join(cells))
        return "\n".join(text_lines)

    def _repr_html_(self) -> str:
        rows = [_html_row("th", self.head), *(_html_row("td", row) for row in self.rows)]
        return f"<table>{''.join(rows)}</table>"


def _html_row(tag: str, row: Sequence[object]) -> str:
    cells = [f'<{tag} style="text-align:left">{html.escape(str(cell))}</{tag}>' for cell in row]
    return f"<tr>{''.join(cells)}</tr>"
