"""`collect_routing`: run a model over pictures and keep what its MoE layers decided about every patch.

Axes: B images of a batch, I images, N tokens (prefix tokens first), P patches, K choices, E experts, C classes.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from moevision import __version__
from moevision.analysis.pictures import Data, PictureSet, open_pictures
from moevision.analysis.trace_file import TensorFile
from moevision.analysis.trace_input import (
    Batch,
    PictureReader,
    as_saved_model,
    evaluating,
    model_title,
    weights_sha256,
)
from moevision.analysis.trace_layer import LayerTrace
from moevision.analysis.trace_record import SCHEMA, RoutingTrace, describe_trace
from moevision.analysis.trace_sink import Array, ArrayBuffer, TensorSink, TensorSpec
from moevision.errors import UserError
from moevision.layers import LabelRouter, Routing, SoftRouting, forward_routing, label_oracle, moe_layers
from moevision.models.io import SavedModel, best_device

__all__ = ["SCHEMA", "LayerTrace", "RoutingTrace", "collect_routing"]


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
) -> RoutingTrace:
    """Run a model over pictures and keep what each MoE layer decided about each patch.

    Runs in eval mode on the best device, as `moevision predict` does, and under whatever intervention is in force.
    Routers by `label` are told the pictures' classes. Pictures that can't be read are left out and counted in a
    `DataWarning`.

    Args:
        model: a run folder, its model/ folder or a timm address; a `SavedModel`; or any timm ViT with MoE layers. The
            normalisation of a bare ViT is read from its timm configuration, and its outputs are taken to be the data's
            classes, in order, if there are as many.
        data: as in `open_pictures`: a dataset's name, a folder, a torch dataset of (PIL image, label), or a
            `PictureSet`.
        batch_size: pictures per forward pass.
        limit: take at most so many pictures, balanced by class.
        path: a file to stream the trace to; memory then stays bounded whatever the number of pictures, and the arrays
            of the result are mapped from the file.
        progress: show a progress bar where there are more than a few batches.
        split: which part of the data: test, val, train or all.
        seed: of the split, of drawn pictures and of `limit`.
        root: folder in which named datasets live.
        run_dir: a run's folder, whose splits.csv says which pictures were held out.
        name: what the model is called in the trace; by default its folder's or its architecture's name.

    Returns:
        The trace.

    Raises:
        UserError: if there is no such model or data, the model has no MoE layer, no picture can be read, or the model
            routes by the class and a picture has none.

    Example:
        >>> trace = collect_routing("runs/pets/model", "synthetic_pets", limit=400)
        >>> trace.layer(1).counts().sum(0)  # choices per expert
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: it must be at least 1.")
    saved = as_saved_model(model)
    known = saved.class_names or None
    pictures = open_pictures(
        data, saved.image_size, split=split, limit=limit, seed=seed, class_names=known, root=root, run_dir=run_dir
    )
    settings = {"limit": limit, "seed": seed, "batch_size": batch_size}
    about = _about(saved, pictures, name or model_title(model), settings)
    reader = PictureReader(pictures, saved, batch_size)
    net = saved.net.to(best_device())
    oracles = any(isinstance(layer.router, LabelRouter) for layer in moe_layers(net))
    if oracles and any(pictures.label(index) < 0 for index in range(len(pictures))):
        raise UserError("The router 'label' routes by the class: give pictures whose classes are known.")
    sink: TensorSink | None = None
    with ExitStack() as stack:
        stack.enter_context(evaluating(net))
        for batch in reader.batches(progress):
            rows, place = _rows(net, batch)
            if sink is None:
                names = [pictures.picture_name(index) for index in range(len(pictures))]
                num_outputs = rows["probabilities"].shape[1]
                about |= place | {"prediction_names": _output_names(num_outputs, saved, pictures)}
                specs = {key: TensorSpec(array.dtype, (len(names), *array.shape[1:])) for key, array in rows.items()}
                metadata = describe_trace(picture_names=names, **about)
                sink = stack.enter_context(_open_sink(path, specs, metadata))
            sink.write(rows, batch.row)
        reader.report()
        assert sink is not None  # report() has refused a set without a readable picture
        if reader.bad:
            about["provenance"] |= {"unreadable": len(reader.bad)}
            sink.shrink(len(reader.names), describe_trace(picture_names=reader.names, **about))
    return RoutingTrace.from_arrays(*sink.result())


def _about(saved: SavedModel, pictures: PictureSet, title: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What is known about a trace before the model runs."""
    versions = {"moevision": __version__, "torch": torch.__version__, "timm": timm.__version__, "numpy": np.__version__}
    provenance = {
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": best_device().type,
        "versions": versions,
        "settings": settings,
        "weights_sha256": weights_sha256(saved.net),
        "unreadable": 0,
    }
    return {"class_names": pictures.class_names, "model": title, "data": pictures.name, "provenance": provenance}


@torch.inference_mode()
def _rows(net: nn.Module, batch: Batch) -> tuple[dict[str, Array], dict[str, Any]]:
    """One batch's rows of all arrays, and where they come from: layers and grid."""
    dtype = next(net.parameters()).dtype
    with label_oracle(net, batch.labels):
        output, routings = forward_routing(net, batch.images.to(best_device(), dtype))
    if not routings:
        raise UserError("This model has no MoE layers: give a model that was converted by moevision.convert_to_moe.")
    grids = {routing.grid for routing in routings}
    (grid,) = grids if len(grids) == 1 else (None,)
    if grid is None:
        raise UserError("This model's tokens are no single grid of patches: give a plain ViT, without patch dropping.")
    has_head = getattr(net, "num_classes", None) != 0
    probabilities = output.float().softmax(-1) if has_head else output.float()[:, :0]
    rows: dict[str, Array] = {
        "labels": batch.labels.numpy(),
        "predictions": _numpy(probabilities.argmax(-1) if has_head else torch.full_like(batch.labels, -1)),
        "probabilities": _numpy(probabilities),
    }
    layers = [place if routing.layer is None else routing.layer for place, routing in enumerate(routings)]
    for layer, routing in zip(layers, routings, strict=True):
        rows |= {f"L{layer}.{key}": array for key, array in _layer_rows(routing).items()}
    return rows, {"layers": layers, "kinds": [routing.kind for routing in routings], "grid": grid}


def _layer_rows(routing: Routing) -> dict[str, Array]:
    """One layer's decision about a batch's patches, as `LayerTrace` holds it."""
    patches = slice(routing.num_prefix_tokens, None)
    probs = routing.probs[:, patches].float()
    best = probs.topk(min(2, routing.num_experts), dim=-1).values
    rows: dict[str, Array] = {}
    if isinstance(routing, SoftRouting):
        reads = routing.dispatch_weight.sum(-1).gather(-1, routing.expert_index)
        rows["read_weight"] = _numpy(reads[:, patches].float())
    return rows | {
        "expert_index": _numpy(routing.expert_index[:, patches].to(torch.int16)),
        "kept": _numpy(routing.kept[:, patches]),
        "combine_weight": _numpy(routing.combine_weight[:, patches].float()),
        "probs": _numpy(probs.half()),
        "margin": _numpy(best[..., 0] - best[..., 1] if best.shape[-1] > 1 else best[..., 0]),
        "entropy_bits": _numpy(torch.special.entr(probs).sum(-1) / math.log(2)),
    }


def _numpy(tensor: Tensor) -> Array:
    return tensor.cpu().numpy()


def _output_names(num_outputs: int, saved: SavedModel, pictures: PictureSet) -> tuple[str, ...]:
    """Names of the model's outputs: its own, or the data's if there are as many, or numbers."""
    for names in (saved.class_names, pictures.class_names):
        if len(names) == num_outputs:
            return tuple(names)
    return tuple(f"class {index}" for index in range(num_outputs))


def _open_sink(path: str | Path | None, specs: dict[str, TensorSpec], metadata: dict[str, str]) -> TensorSink:
    return ArrayBuffer(specs, metadata) if path is None else TensorFile(path, specs, metadata)
