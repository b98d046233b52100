"""The numbers of the report that a trace alone gives: model, pictures, accuracy, load. All as JSON primitives.

Axes: I images, P patches, K choices, E experts, C classes, L MoE layers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from moevision.analysis.describe import QUANTILES, co_activation, gate_weight_quantiles
from moevision.metrics import LayerLoad

if TYPE_CHECKING:
    from moevision.analysis.trace import LayerTrace, RoutingTrace

Json = dict[str, Any]


def model_numbers(trace: RoutingTrace, address: str, image_size: int) -> Json:
    """What the model is; numbers of experts are lists where layers differ."""
    return {
        "name": trace.model,
        "address": address,
        "image_size": image_size,
        "grid": list(trace.grid),
        "moe_blocks": [layer.layer for layer in trace.layers],
        "num_experts": _one_or_each([layer.num_experts for layer in trace.layers]),
        "top_k": _one_or_each([layer.top_k if layer.kind == "token_choice" else None for layer in trace.layers]),
        "experts_per_patch": _one_or_each([round(layer.experts_per_patch, 2) for layer in trace.layers]),
        "routing": _one_or_each([layer.kind for layer in trace.layers]),
        "class_names": list(trace.prediction_names or trace.class_names),
    }


def _one_or_each(values: list[Any]) -> Any:
    """The value that all layers have, or the list of them."""
    return values[0] if len(set(values)) == 1 else values


def data_numbers(trace: RoutingTrace) -> Json:
    """What the pictures are, and how many of each class are classified correctly."""
    known = trace.labels >= 0
    classes = []
    for index, name in enumerate(trace.class_names):
        of_class = trace.labels == index
        count = int(of_class.sum())
        correct = int((trace.predictions[of_class] == index).sum()) if trace.accuracy is not None else None
        accuracy = None if correct is None or count == 0 else correct / count
        classes.append({"class": name, "n": count, "correct": correct, "accuracy": accuracy})
    correct = None if trace.accuracy is None else int((trace.predictions == trace.labels)[known].sum())
    return {
        "name": trace.data,
        "n_images": len(trace),
        "n_labelled": int(known.sum()),
        "correct": correct,
        "accuracy": trace.accuracy,
        "classes": classes,
    }


def layer_numbers(layer: LayerTrace) -> Json:
    """Load, certainty and gate weights of one layer, over the patches (class and register tokens are not traced).

    Experts of Soft MoE all compute as many slots, so their load is equal by construction and `counts` is what patches
    take from each; nothing is dropped where tokens don't choose.
    """
    index, kept = np.asarray(layer.expert_index), np.asarray(layer.kept)
    image_counts = layer.counts()
    counts = image_counts.sum(0)
    chooses = layer.kind == "token_choice"
    requested = np.bincount(index.ravel(), minlength=layer.num_experts) if chooses else counts
    computed = np.ones_like(counts) if layer.kind == "soft" else counts
    load = LayerLoad.from_sums(
        layer.layer,
        torch.from_numpy(computed),
        torch.from_numpy(requested if chooses else computed),
        entropy_bits=torch.tensor(float(np.asarray(layer.entropy_bits, dtype=np.float64).sum())),
        tokens=torch.tensor(index.shape[0] * index.shape[1]),
        unrouted=torch.tensor(int((~kept.any(-1)).sum())),
        count_squares=torch.from_numpy((image_counts**2).sum(0)),
        images=torch.tensor(len(image_counts)),
    )
    quantiles = gate_weight_quantiles(np.asarray(layer.combine_weight), kept=None if chooses else kept)
    pairs = layer.kind != "soft" and layer.top_k > 1
    return {
        "layer": layer.layer,
        "name": layer.name,
        "kind": layer.kind,
        "num_experts": layer.num_experts,
        "top_k": layer.top_k if chooses else None,
        "experts_per_patch": layer.experts_per_patch,
        "counts": counts.tolist(),
        "requested": requested.tolist(),
        "share": (counts / max(counts.sum(), 1e-12)).tolist(),
        "slowest": load.max_over_mean,
        "cv_squared": load.cv_squared,
        "cv_squared_floor": load.cv_squared_floor if chooses else None,
        "dead": load.dead,
        "dropped": load.dropped if chooses else None,
        "unrouted": load.unrouted,
        "kept_per_patch": layer.kept_per_patch().tolist(),
        "entropy_bits": load.entropy_bits,
        "entropy_bits_most": math.log2(layer.num_experts),
        "margin": float(np.asarray(layer.margin, dtype=np.float64).mean()),
        "gate_weight_quantiles": {"levels": list(QUANTILES), "values": quantiles.tolist()},
        "co_activation": co_activation(index, layer.num_experts, kept_of(layer)).tolist() if pairs else None,
    }


def kept_of(layer: LayerTrace) -> npt.NDArray[np.bool_] | None:
    """Which experts are chosen together: all that a token chose (None), or those that took it."""
    return np.asarray(layer.kept) if layer.kind == "expert_choice" else None


def as_json(value: Any) -> Any:
    """NumPy scalars and arrays as JSON primitives; NaN and infinity, which JSON can't say, as null."""
    if isinstance(value, dict):
        return {str(name): as_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, np.ndarray):
        return as_json(value.tolist())
    if isinstance(value, np.generic):
        return as_json(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
