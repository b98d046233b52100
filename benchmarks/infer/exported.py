"""Time exported files on one thread: the chosen experts, all experts (the form until 0.2.0), and the dense twin.

All three are run by onnxruntime in turns, and CPU seconds are counted, so that other programs disturb little. Models:
the bundled one of CIFAR-10, whose loads are uneven, and untrained ones: its configuration with 32 experts, and six
blocks of a ViT-S at 128 px.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.subject import NAMES, find_subject
from benchmarks.timing import Timings, rows_of
from moevision.layers import moe_layers
from moevision.models.convert import dense_twin
from moevision.models.export import OPSET, _Exported, _to_bytes, load_exported
from moevision.models.io import load_model

BUNDLED = Path("moevision/demo/models/cifar10/trained")
TWIN = NAMES["active_flops"]
QUICK = {"repetitions": 1, "warm_up": 0, "batch_size": [1]}


def main() -> None:
    """Measure each model at each batch size, and write one record."""
    parser = harness.argument_parser(
        "infer-exported", __doc__, "  python -m benchmarks infer-exported --threads 1\n"
    )
    parser.add_argument("--batch-size", type=harness.positive, nargs="+", default=[1, 8, 64])
    harness.add_measuring(parser, repetitions=15)
    parser.set_defaults(device="cpu", warm_up=2, threads=1)
    options = harness.parse(parser, QUICK)
    device = harness.set_up(options)

    record = harness.new_record("infer-exported", options, device)
    record["versions"]["onnxruntime"] = version("onnxruntime")
    record["models"] = []
    for name, side, net in models():
        files = exported(net, side)
        batches = []
        for batch in options.batch_size:
            images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
            rounds = options.repetitions * max(1, 16 // batch)  # one image takes milliseconds
            timings = in_turns(files, images, rounds, options.warm_up)
            rows = rows_of(timings, [TWIN])
            batches.append({"batch_size": batch, "rows": rows})
            harness.print_rows(f"{name}, batch {batch}, CPU time", rows, TWIN)
        record["models"].append({"name": name, "batches": batches})
    harness.write_record(options.out, record)


def models() -> Iterator[tuple[str, int, nn.Module]]:
    """Name, side of an image and network of each model."""
    saved = load_model(str(BUNDLED))
    yield "CIFAR-10's, 8 experts", saved.image_size, saved.net

    config = find_subject("cifar10")
    arch = {**config.arch, "num_experts": 32}
    yield "the same with 32 experts", config.image_size, replace(config, arch=arch).build()

    torch.manual_seed(0)
    options = {"base": "vit_small_patch16_224", "img_size": 128, "depth": 6}
    net = timm.create_model("vit_moe", **options, num_experts=8, top_k=2, router="vmoe_top_k")
    yield "ViT-S of 6 blocks, 8 experts", 128, net


def exported(net: nn.Module, side: int) -> dict[str, Callable[[Tensor], Any]]:
    """By name, the function of each form's file."""
    twin = dense_twin(net, "active_flops")
    forms = {"chosen experts": (net, "loop"), "all experts": (net, "dense"), TWIN: (twin, "loop")}
    files = {}
    for name, (form, backend) in forms.items():
        module = _Exported(form.eval().requires_grad_(False), None, routes=False)
        for layer in moe_layers(module):
            layer.experts.backend = backend
        files[name] = load_exported(_to_bytes(module, {"image_size": side}, OPSET))
    return files


def in_turns(
    files: dict[str, Callable[[Tensor], Any]], images: Tensor, rounds: int, warm_up: int
) -> Timings:
    """CPU seconds of each file on the same images; another one is the first in each round."""
    timings = Timings({name: [] for name in files})
    names = list(files)
    for number in range(warm_up + rounds):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            began = time.process_time()
            files[name](images)
            seconds = time.process_time() - began
            if number >= warm_up:
                timings.seconds[name].append(seconds)
    return timings
