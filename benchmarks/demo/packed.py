"""A model's weights in eight bits: how they are packed, and what that changes.

    git worktree add before COMMIT   # of which the model is still in bfloat16
    python -m benchmarks packed before/moevision/demo/models/cats_vs_dogs/trained --data path/to/cats_vs_dogs \
        --out benchmarks/demo/packed.json

`python -m benchmarks bundle --pack` writes what `pack` makes, and `moevision.models.io.unpack` reads it. Measured are
classes, experts and bytes beside the model in timm's format, on the images held out, in float32, with as many steps as
an int8 holds and with fewer. The first is carried: nothing was chosen on these images.

Symmetric rounding to the nearest step, as in Jacob et al. 2018 (arXiv:1712.05877, section 2.1) with zero point 0.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.harness import about, argument_parser, positive, write_result
from moevision.analysis.collect import collect_routing
from moevision.analysis.images import open_pictures
from moevision.analysis.trace import RoutingTrace
from moevision.models.io import load_model
from moevision.models.safe_files import CONFIG, PACKED, SCALE, WEIGHTS

LEVELS = 127  # steps on either side of 0; more don't fit
SMALLEST = 2**14  # elements; smaller matrices, such as a router, are not worth an error
LOADS = 9


def pack(state: Mapping[str, Tensor], levels: int = LEVELS) -> dict[str, Tensor]:
    """Round the weights of linear layers, [out, in] and [E, out, in], to whole steps: |w - q s| <= s / 2.

    Args:
        state: weights by name, in any floating dtype.
        levels: steps on either side of 0, at most 127; with fewer a compressed file is smaller.

    Returns:
        For each large matrix q (int8, same shape) under its name and s (float32, [..., out, 1]) under `NAME.scale`;
        other floating-point tensors in bfloat16, whole numbers as they are.
    """
    packed = {}
    for name, value in state.items():
        if name.endswith(".weight") and value.ndim in (2, 3) and value.numel() >= SMALLEST:
            weight = value.float()
            scale = (weight.abs().amax(-1, keepdim=True) / levels).clamp_min(torch.finfo(torch.float32).tiny)
            packed[name], packed[name + SCALE] = (weight / scale).round().to(torch.int8), scale
        else:
            packed[name] = value.to(torch.bfloat16) if value.is_floating_point() else value
    return packed


def pack_folder(folder: Path) -> None:
    """Replace model.safetensors of a saved model by its packed file."""
    save_file(pack(load_file(folder / WEIGHTS)), folder / PACKED)
    (folder / WEIGHTS).unlink()


# ---- what it changes


def sizes(file: Path) -> dict[str, int]:
    """Bytes of a file, and what zlib makes of it, as pip's wheels are compressed."""
    data = file.read_bytes()
    return {"bytes": len(data), "compressed": len(zlib.compress(data, 6))}


def load_ms(folder: Path) -> float:
    """Milliseconds to a model in memory, the median of some."""
    times = []
    for _ in range(LOADS):
        start = time.perf_counter()
        load_model(str(folder))
        times.append(1e3 * (time.perf_counter() - start))
    return round(median(times), 1)


def agreement(before: RoutingTrace, after: RoutingTrace) -> dict[str, Any]:
    """How many images and patches two models treat alike."""
    layers = []
    for one, other in zip(before.layers, after.layers, strict=True):
        first, again = np.asarray(one.expert_index), np.asarray(other.expert_index)  # [I, P, K]
        layers.append(
            {
                "layer": one.layer,
                "same_first": float((first[..., 0] == again[..., 0]).mean()),
                "same_set": float((np.sort(first, -1) == np.sort(again, -1)).all(-1).mean()),
            }
        )
    return {
        "right": int((after.predictions == after.labels).sum()),
        "same_class": int((after.predictions == before.predictions).sum()),
        "max_probability_change": float(np.abs(after.probabilities - before.probabilities).max()),
        "layers": layers,
    }


def main() -> None:
    """Pack, route, compare, record."""
    parser = argument_parser("packed", __doc__)
    parser.add_argument("model", type=Path, help="a saved model in timm's format")
    parser.add_argument("--data", required=True, help="images; those held out are used")
    parser.add_argument("--levels", type=positive, nargs="+", default=[LEVELS, 63, 31], help="(%(default)s)")
    parser.add_argument("--limit", type=positive, help="at most so many images")
    parser.add_argument("--out", type=Path, help="write the record to this file")
    options = parser.parse_args()
    origin, model = about(), load_model(str(options.model))
    pictures = open_pictures(options.data, model.image_size, class_names=model.class_names, limit=options.limit)
    before = collect_routing(model, pictures)
    arms = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copyfile(options.model / CONFIG, folder / CONFIG)
        for levels in options.levels:
            save_file(pack(load_file(options.model / WEIGHTS), levels), folder / PACKED)
            trace = collect_routing(str(folder), pictures)
            arms.append(
                {
                    "levels": levels,
                    **sizes(folder / PACKED),
                    "load_ms": load_ms(folder),
                    **agreement(before, trace),
                }
            )
    kept = {**sizes(options.model / WEIGHTS), "load_ms": load_ms(options.model)}
    kept["right"] = int((before.predictions == before.labels).sum())
    write_result(options.out, {"images": len(before.labels), "bfloat16": kept, "packed": arms, **origin})
