"""`moevision export MODEL --out FILE`: one ONNX file, and what it costs beside the model."""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from moevision.efficiency import measure_cost
from moevision.errors import UserError, escape_controls
from moevision.layers import moe_layers
from moevision.models.export import OPSET, TOLERANCE, Runner, export_onnx, load_exported
from moevision.models.io import SavedModel
from moevision.train.checkpoint import load_trained
from moevision.train.report import template

BATCHES = (1, 8)
_ROUNDS = 10  # per batch size


def run(chosen: Namespace) -> None:
    """Write a saved model to one file, check it, measure it, and print all that."""
    out = Path(chosen.out)
    if out.suffix != ".onnx":
        raise UserError(f"{out} is no name of an ONNX file: end it in .onnx.")
    if out.exists() and not chosen.force:
        raise UserError(f"{out} exists: give --out another name, or --force to replace it.")
    with Console(stderr=True).status("loading the model") as status:
        saved = load_trained(chosen.model)
        pictures = None if chosen.data is None else _prepared(saved, chosen)
        status.update("exporting and checking (half a minute for a small model)")
        report = export_onnx(
            saved,
            out,
            opset=chosen.opset or OPSET,
            dtype=chosen.dtype,
            pictures=pictures,
            routes=chosen.routes,
        )
        status.update("measuring")
        net = saved.net.cpu().float()
        latency_ms = measure_latency(
            {"the model": torch.no_grad()(net.__call__), "this file": load_exported(out)},
            saved.image_size,
        )
        costs = [measure_cost(net, saved.image_size, backend=each) for each in ("loop", "dense")]
    file = escape_controls(str(out))
    print(
        f"{file}: {report.size_bytes / 1e6:.1f} MB, {len(saved.class_names)} classes, {saved.image_size} px"
    )
    print(
        f"compared on {report.pictures} images: logits of noise differ by at most {report.max_logit_delta:.1g} "
        f"({TOLERANCE[chosen.dtype]:g} passes), same class for {report.top1_agreement:.1%}\n\n"
        f"{experts_sentence(saved.net)}\n"
    )
    table = Table("", "MFLOPs / image", *(f"ms, batch {batch}" for batch in BATCHES))
    for column in table.columns[1:]:
        column.justify = "right"
    for (name, measured), cost in zip(latency_ms.items(), costs, strict=True):
        flops = cost.flops_per_image + cost.router_flops_per_image
        table.add_row(name, f"{flops / 1e6:,.1f}", *(f"{value:.2f}" for value in measured.values()))
    Console().print(table)
    n = torch.get_num_threads()
    print(
        f"median of {_ROUNDS} turns on {n} CPU thread{'s' * (n > 1)} of this machine; one multiply-add is two FLOPs"
    )
    code = template("run_exported.py.jinja").render(
        file=repr(file), fit=saved.fit, routes=chosen.routes
    )
    print(f"\nRun it without moevision:\n\n{code}")


def _prepared(saved: SavedModel, chosen: Namespace) -> Tensor:
    """The first images of `data`, as the model gets them: one file, a folder, or a dataset's name."""
    from moevision.analysis.collect import PictureReader  # scikit-learn comes along
    from moevision.analysis.images import pictures_for
    from moevision.data.images import BadImageError, safe_open
    from moevision.data.transforms import normalize, square_pixels

    data = chosen.data
    if Path(data).is_file():
        try:
            pixels = square_pixels(
                safe_open(data, saved.image_size), saved.image_size, saved.framing
            )
        except BadImageError as error:
            raise UserError(
                f"{data} can't be read ({error.reason}): give another image."
            ) from error
        return normalize(torch.from_numpy(pixels).permute(2, 0, 1)[None], saved.mean, saved.std)
    pictures = pictures_for(chosen.model, saved, data, limit=chosen.limit, root=chosen.root)
    # A comparison needs images, not all of them: some may be unreadable, and the report says how many there were.
    read = (
        []
        if pictures is None
        else [batch.images for batch in PictureReader(pictures, saved, 64).batches(False)]
    )
    if not read:
        raise UserError(f"{data} holds no image that can be read: give another --data.")
    return torch.cat(read)


def measure_latency(
    runners: Mapping[str, Runner], image_size: int, batches: Iterable[int] = BATCHES
) -> dict[str, dict[int, float]]:
    """For each runner and batch size the median milliseconds of a call; they take turns: what slows one slows all."""
    medians: dict[str, dict[int, float]] = {name: {} for name in runners}
    for batch in batches:
        images = torch.randn(
            batch, 3, image_size, image_size, generator=torch.Generator().manual_seed(batch)
        )
        for run in runners.values():
            run(images)  # the first call allocates and picks kernels
        times_ms: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(_ROUNDS):
            for name, run in runners.items():
                start = time.perf_counter()
                run(images)
                times_ms[name].append(1e3 * (time.perf_counter() - start))
        for name, values in times_ms.items():
            medians[name][batch] = statistics.median(values)
    return medians


def experts_sentence(net: nn.Module) -> str:
    """Says plainly which experts the file computes, and which the model does."""
    routers = [layer.router for layer in moe_layers(net) if layer.router.kind != "soft"]
    if not routers:
        soft = (
            "Soft MoE's experts each compute their slots"
            if moe_layers(net)
            else "The model has no experts"
        )
        return f"{soft}: the file does the same work as the model."

    def span(numbers: set[int]) -> str:
        return f"{min(numbers)} to {max(numbers)}" if len(numbers) > 1 else str(min(numbers))

    average = " on average" if any(router.kind == "expert_choice" for router in routers) else ""
    return (
        f"The file computes ALL {span({router.num_experts for router in routers})} experts of every MoE layer for "
        f"every token; the model computes {span({router.top_k for router in routers})} of them{average}."
    )
