"""Time the forward pass of a model beside its dense twins at several batch sizes.

Tells images/s, and median and 95th percentile of the latency. MODEL is a run folder, a saved model, a timm address, or
the name of a config or timm model (untrained: speed doesn't depend on the weights' values, but for how evenly experts
are used).
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import harness
from benchmarks.energy import energy_of, energy_text
from benchmarks.harness import DTYPES, Json, positive
from benchmarks.subject import NAMES, find_subject, inference
from benchmarks.timing import Candidate, interleave, rounded, rows_of
from moevision.efficiency import measure_cost
from moevision.errors import UserError
from moevision.layers import moe_layers
from moevision.models.convert import dense_twin
from moevision.models.io import load_model, model_folder

QUICK = {"batch_size": [1, 2], "repetitions": 3, "warm_up": 1}
EXAMPLES = """\
  python -m benchmarks infer runs/quickstart
  python -m benchmarks infer cifar10 --batch-size 1 256 --precision bf16
  python -m benchmarks infer cifar10 --arch vit_moe_hybrid_patch8_32 --batch-size 1 --precision fp32 --threads 1
"""


def parser() -> ArgumentParser:
    """The command line."""
    parser = harness.argument_parser("infer", __doc__, EXAMPLES)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run folder, a timm address, a config or a timm name")
    add("--arch", metavar="NAME", help="timm name in the place of the config's")
    batches, both = [1, 8, 64], ["fp32", "bf16"]
    add("--batch-size", type=positive, nargs="+", default=batches, help="images per call (1 8 64)")
    add("--image-size", type=positive, metavar="PX", help="side, for untrained models")
    add("--precision", nargs="+", choices=tuple(DTYPES), default=both, help="(both by default)")
    harness.add_measuring(parser, repetitions=40)
    return parser


def main() -> None:
    """Measure, print tables and write the record."""
    options = harness.parse(parser(), QUICK)
    device = harness.set_up(options)
    net, size = find_net(options.model, options.image_size, options.arch)
    peak = harness.measure_peaks(options, device, options.precision)
    record = {**harness.new_record("infer", options, device), "image_size": size}
    record["measured_peak_flops"] = peak
    record["subject"] = options.model + (f" with {options.arch}" if options.arch else "")
    nets = {
        name: (net if which == "moe" else dense_twin(net, which)).to(device).eval()
        for which, name in NAMES.items()
    }
    record["models"] = {}
    for name, each in nets.items():
        cost = measure_cost(each, size)
        flops = float(cost.flops_per_image + cost.router_flops_per_image)
        record["models"][name] = {"parameters": cost.total_parameters, "flops_per_image": flops}
    record["comparisons"] = [
        _compare(nets, batch, precision, record, options, device)
        for batch in options.batch_size
        for precision in options.precision
    ]
    batch = max(options.batch_size)
    images = torch.randn(batch, 3, size, size, device=device)
    record["energy"] = {
        name: energy_of(inference(net, images, options.precision[0]), batch, device)
        for name, net in nets.items()
    }
    show(record)
    harness.write_record(options.out, record)


def find_net(name: str, image_size: int | None, arch: str | None = None) -> tuple[nn.Module, int]:
    """A saved model, or an untrained one by a config's or a timm name, and the side of its images.

    Raises:
        UserError: if there is none, it is dense, or it is trained and `arch` names another one.
    """
    if model_folder(Path(name)) is not None or ":" in name:
        if arch is not None:
            raise UserError(f"{name} is a trained model: leave --arch out, or give a config.")
        saved = load_model(name)
        net, size = saved.net, saved.image_size
    else:
        subject = find_subject(name, image_size=image_size, arch=arch)
        net, size = subject.build().eval(), subject.image_size
    if not moe_layers(net):
        raise UserError(
            f"{name} has no MoE layers, so there is nothing to compare: give a MoE model."
        )
    return net, size


def _compare(
    nets: Mapping[str, nn.Module],
    batch: int,
    precision: str,
    record: Json,
    options: Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """All models on batches of one size."""
    size = record["image_size"]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator).to(device)
    candidates = [Candidate(name, inference(net, images, precision)) for name, net in nets.items()]
    rounds = {"repetitions": options.repetitions, "warm_up": options.warm_up}
    title = f"{batch} images, {precision}"
    timings = interleave(candidates, **rounds, device=device, title=title)
    rows = rows_of(timings, list(NAMES.values()))
    peak = record["measured_peak_flops"].get(precision)
    for row in rows:
        p50, p95 = 1e3 * np.percentile(row["seconds"], (50, 95))
        row["latency_ms"] = {"p50": rounded(p50), "p95": rounded(p95)}
        row["images_per_s"] = rounded(1e3 * batch / row["time_ms"]["median"])
        rate = row["images_per_s"] * record["models"][row["name"]]["flops_per_image"]
        row["mfu"] = None if peak is None else rounded(rate / peak)
    return {"batch_size": batch, "precision": precision, "rows": rows}


def show(record: Json) -> None:
    """One table per batch size and precision."""
    harness.print_machine(record)
    harness.print_line(f"{record['subject']}: {record['image_size']} px")
    for comparison in record["comparisons"]:
        title = f"batch {comparison['batch_size']}, {comparison['precision']}"
        harness.print_rows(title, comparison["rows"], NAMES["active_flops"])
    for name, energy in record["energy"].items():
        harness.print_line(f"energy, {name}: {energy_text(energy)}")
