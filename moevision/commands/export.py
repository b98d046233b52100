"""`moevision export MODEL --out FILE`: one ONNX or .pt2 file, and what it costs beside the model."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from moevision.efficiency import measure_cost
from moevision.errors import UserError, escape_controls
from moevision.layers import Backend, moe_layers
from moevision.models.export import OPSET, TOLERANCE, Runner, export_onnx, export_program
from moevision.models.io import SavedModel
from moevision.train.checkpoint import load_trained
from moevision.train.report import template

BATCHES = (1, 8)


def run(args: Namespace) -> None:
    """Write a saved model to one file, check it, measure it, and print all that."""
    out = Path(args.out)
    is_program = out.suffix == ".pt2"
    if out.suffix != ".onnx" and not is_program:
        raise UserError(f"{out} names no kind of file: end it in .onnx, or .pt2 for torch.export.")
    if is_program and (args.opset is not None or args.routes):
        raise UserError("--opset and --routes are of ONNX: leave them out, or end --out in .onnx.")
    if out.exists() and not args.force:
        raise UserError(f"{out} exists: give --out another name, or --force to replace it.")

    with Console(stderr=True).status("loading the model") as status:
        saved = load_trained(args.model)
        images = None if args.data is None else _read_images(saved, args)
        status.update("exporting and checking (half a minute for a small model)")
        if is_program:
            report = export_program(saved, out, dtype=args.dtype, pictures=images)
        else:
            report = export_onnx(
                saved,
                out,
                opset=args.opset or OPSET,
                dtype=args.dtype,
                pictures=images,
                routes=args.routes,
            )
        status.update("measuring")
        table = _measure(saved, report.run)

    file = escape_controls(str(out))
    print(
        f"{file}: {report.size_bytes / 1e6:.1f} MB, {len(saved.class_names)} classes, {saved.image_size} px\n"
        f"compared on {report.pictures} images: logits of noise differ by at most {report.max_logit_delta:.1g} "
        f"({TOLERANCE[args.dtype]:g} passes), same class for {report.top1_agreement:.1%}\n\n"
        f"{experts_sentence(saved.net)}\n"
    )
    Console().print(table)
    threads = torch.get_num_threads()
    print(
        f"median over a second on {threads} CPU thread{'s' * (threads > 1)} of this machine; one multiply-add is two "
        "FLOPs"
    )
    code = template("run_exported.py.jinja")
    print(
        "\nRun it without moevision:\n\n"
        + code.render(file=repr(file), fit=saved.fit, routes=args.routes)
    )


def _measure(saved: SavedModel, run_file: Runner) -> Table:
    """FLOPs and time of one image, by the model and by the file."""
    net = saved.net.cpu().float()
    rows: dict[str, tuple[Runner, Backend]] = {
        "the model": (torch.no_grad()(net.__call__), "loop"),
        "this file": (torch.no_grad()(run_file), "dense"),
    }
    side = saved.image_size
    table = Table("", "MFLOPs / image", *(f"ms, batch {batch}" for batch in BATCHES))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, (run, backend) in rows.items():
        cost = measure_cost(net, side, backend=backend)
        flops = cost.flops_per_image + cost.router_flops_per_image
        times = [f"{latency_ms(run, torch.randn(batch, 3, side, side)):.2f}" for batch in BATCHES]
        table.add_row(name, f"{flops / 1e6:,.1f}", *times)
    return table


def _read_images(saved: SavedModel, args: Namespace) -> Tensor:
    """The first images of --data, as the model gets them: one file, a folder, or a dataset's name."""
    from moevision.analysis.collect import (  # scikit-learn comes along
        PictureReader,
        network_input,
    )
    from moevision.analysis.images import pictures_for
    from moevision.data.images import BadImageError, safe_open
    from moevision.data.transforms import square_pixels

    path = args.data
    side = saved.image_size
    if Path(path).is_file():
        try:
            image = safe_open(path, side)
        except BadImageError as error:
            raise UserError(
                f"{path} can't be read ({error.reason}): give another image."
            ) from error
        return network_input(saved, square_pixels(image, side, saved.framing)[None])

    pictures = pictures_for(args.model, saved, path, limit=args.limit, root=args.root)
    # A comparison needs images, not all of them: some may be unreadable, and the report says how many there were.
    batches = []
    if pictures is not None:
        batches = [batch.images for batch in PictureReader(pictures, saved, 64).batches(False)]
    if not batches:
        raise UserError(f"{path} holds no image that can be read: give another --data.")
    return torch.cat(batches)


def latency_ms(run: Runner, images: Tensor) -> float:
    """Median milliseconds of a call with these images, over about a second."""
    names = {"run": run, "images": images}
    timer = Timer("run(images)", globals=names, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=1).median


def experts_sentence(net: nn.Module) -> str:
    """Says plainly which experts the file computes, and which the model does."""
    layers = moe_layers(net)
    if not layers:
        return "The model has no experts: the file does the same work as the model."
    routers = [layer.router for layer in layers if layer.router.kind != "soft"]
    if not routers:
        return (
            "Soft MoE's experts each compute their slots: the file does the same work as the model."
        )
    experts = _range({router.num_experts for router in routers})
    chosen = _range({router.top_k for router in routers})
    average = " on average" if any(router.kind == "expert_choice" for router in routers) else ""
    return (
        f"The file computes ALL {experts} experts of every MoE layer for every token; the model computes {chosen} of "
        f"them{average}."
    )


def _range(numbers: set[int]) -> str:
    if len(numbers) == 1:
        return str(*numbers)
    return f"{min(numbers)} to {max(numbers)}"
