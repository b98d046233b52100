"""`python -m benchmarks plan MODEL`: memory, traffic and time of a training on several GPUs, layout by layout.

The formulas are in `benchmarks.planner.formulas`, what they take a GPU for in `benchmarks.planner.machine`.
"""

from __future__ import annotations

import json
import os
import shlex
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.distributed as dist
import yaml  # type: ignore[import-untyped]
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.harness import argument_parser, positive
from benchmarks.planner.footprint import shape_of
from benchmarks.planner.formulas import Job, Layout, ModelShape, Plan, layouts, plan, recommend, verdict_on_experts
from benchmarks.planner.machine import GPUS, Machine, measured_links, measured_machine, sheet_machine
from moevision.analysis.trace import RoutingTrace
from moevision.cli import MODEL, _option
from moevision.data import ImageDataModule
from moevision.errors import UserError, shown
from moevision.layers import moe_layers
from moevision.models.config import MoEConfig, build_model
from moevision.models.io import create_from, describe, is_timm_name, model_folder, unknown_name
from moevision.models.safe_files import parse_yaml
from moevision.models.vit_moe import checkpoint_blocks
from moevision.train.optim import freeze_parameters
from moevision.train.recipe import default_precision, find_config, shipped_configs
from moevision.words import loading

CLASSES = 1000  # where a name or configuration doesn't say
IMAGES_PER_GPU = 64
CV = 0.1
_GB, _MB = 1e9, 1e6
_UNITS = {  # of a machine's fields: unit, and the factor to it
    "peak_flops": ("TFLOPS", 1e12),
    "matmul_flops": ("TFLOPS", 1e12),
    "memory_bytes_per_s": ("GB/s", 1e9),
    "memory_bytes": ("GB", 1e9),
    "link_bytes_per_s": ("GB/s", 1e9),
    "network_bytes_per_s": ("GB/s", 1e9),
    "gpus_per_node": ("", 1),
    "latency_s": ("us", 1e-6),
    "overlap": ("", 1),
    "usable": ("", 1),
}


@dataclass(frozen=True)
class Planned:
    """A model to plan for.

    Attributes:
        net: on the meta device, without weights.
        image_size: side of its input in pixels.
        arguments: what names it on the command line of `fit`.
        optimizer: `adamw`, or what the configuration says.
        classes_assumed: whether nothing said how many classes there are.
    """

    net: nn.Module
    image_size: int
    arguments: list[str]
    optimizer: str = "adamw"
    classes_assumed: bool = False


@dataclass(frozen=True)
class Value:
    """A number that the plan was made with: in `unit`, and where it comes from."""

    name: str
    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class Answer:
    """What is printed.

    Attributes:
        shape: the model, counted.
        machine: what a GPU was taken for.
        plans: one for each layout.
        best: the one that is recommended; None if none fits.
        command: what launches it.
        assumed: numbers that nothing measured.
        measured: names of the machine's fields that were.
        checkpointing: whether the plans compute all blocks again in the backward pass because nothing fits else.
    """

    shape: ModelShape
    machine: Machine
    plans: list[Plan]
    best: Plan | None
    command: str | None
    assumed: list[Value]
    measured: list[str]
    checkpointing: bool


def parser() -> ArgumentParser:
    """A model, and the GPUs to train it on."""
    parser = argument_parser(
        "plan",
        """\
What a training would cost on several GPUs under each layout (DDP, FSDP2, and experts spread over n GPUs with
either): memory of each GPU, bytes and messages of each step, its time, what it waits for the busiest expert;
which layout to take, and the command that starts it.

Parameters, FLOPs and activations are counted in the model, without its weights. Speeds come from data sheets;
everything that is assumed is listed as assumed. benchmarks/planner/README.md has the formulas.""",
        """\
  python -m benchmarks plan vit_moe_base_patch16_224 --gpus 64 --gpu h100 --batch 4096
  python -m benchmarks plan vit_moe --option base=vit_large_patch16_224 --option num_experts=32 --gpus 64
  python -m benchmarks plan runs/pets --measure    this machine's rates, not a data sheet's; links by torchrun""",
    )
    add = parser.add_argument
    add("model", help=f"{MODEL}, or a timm name, a shipped configuration or a YAML file of fit")
    add("--gpus", type=positive, default=1, metavar="W", help="GPUs (%(default)s)")
    add("--gpu", choices=tuple(GPUS), default="h100", help="which (%(default)s)")
    add("--gpus-per-node", type=positive, default=8, metavar="N", help="GPUs of one machine (%(default)s)")
    add("--batch", type=positive, metavar="B", help="images of one optimizer step on all GPUs (64 on each)")
    add("--cv", type=_at_least_0, help="standard deviation over mean of the experts' loads in a batch (0.1)")
    add("--trace", type=Path, metavar="FILE", help="the loads of a trace.safetensors of analyze, in place of --cv")
    add("--option", type=_option, action="append", default=[], metavar="NAME=VALUE",
        help="one of fit's options model.arch.NAME, such as num_experts=32; may be repeated")  # fmt: skip
    add("--measure", action="store_true",
        help="measure matrix products at the model's widths and copies here; links too under torchrun")  # fmt: skip
    add("--format", choices=("table", "json"), default="table", help="what is printed (%(default)s)")
    return parser


def _at_least_0(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number < float("inf"):
        raise ArgumentTypeError(f"{text!r} is no number of at least 0")
    return number


def main() -> None:
    """Run with command-line arguments."""
    run(parser().parse_args())


def run(chosen: Namespace) -> None:
    """Print plans of all layouts, what is recommended, and what was assumed."""
    batch = chosen.batch or IMAGES_PER_GPU * chosen.gpus
    if batch % chosen.gpus:
        raise UserError(
            f"{chosen.gpus} GPUs can't share a batch of {batch} equally: use --batch "
            f"{chosen.gpus * max(1, round(batch / chosen.gpus))}."
        )
    lower = chosen.gpus // chosen.gpus_per_node * chosen.gpus_per_node
    if lower and lower < chosen.gpus:  # torchrun starts as many processes on every machine
        raise UserError(
            f"{chosen.gpus} GPUs don't fill machines of {chosen.gpus_per_node}: use --gpus {lower} or "
            f"{lower + chosen.gpus_per_node}, or another --gpus-per-node."
        )
    with loading("counting the model"), _started_together(chosen.measure) as group:
        planned = open_planned(chosen.model, dict(chosen.option))
        machine, measured, dtype = _machine(chosen, planned, batch // chosen.gpus, group)
        if group is not None and group.rank:
            return
        shape = shape_of(
            planned.net, planned.image_size, name=chosen.model, optimizer=cast(Any, planned.optimizer), dtype=dtype
        )
        loads = loads_of(chosen.trace, shape) if chosen.trace else ()
    job = Job(chosen.gpus, batch, cv=CV if chosen.cv is None else chosen.cv, loads=loads)
    choices = [Layout()] if dtype == torch.float16 else layouts(shape, job.gpus)  # the others scale no losses
    plans = [plan(shape, layout, job, machine) for layout in choices]
    best, checkpointing = recommend(plans), False
    if best is None:  # blocks computed again need less memory
        checkpointing = True
        again = replace(shape, recomputed=tuple(range(shape.depth)))
        plans = [plan(again, layout, job, machine) for layout in choices]
        best = recommend(plans)
    command = None if best is None else launch_command(best, planned, machine, dtype, checkpointing)
    assumed = [*_assumed(machine), *_assumed_of(chosen, planned)]
    answer = Answer(shape, machine, plans, best, command, assumed, measured, checkpointing)
    if chosen.format == "json":
        print(json.dumps(_facts(answer), indent=2))
    else:
        _print(answer)


# ---- what is planned for


def open_planned(model: str, options: dict[str, Any]) -> Planned:
    """The model that a name, a configuration or a folder describes, without weights.

    Args:
        model: a timm name, a shipped configuration or a YAML file of `fit`, a saved model's address.
        options: fields of `MoEConfig`, in place of the name's or the configuration's own.

    Raises:
        UserError: if there is no such model, it is no ViT, or an option doesn't exist or fit.
    """
    with torch.device("meta"):
        planned = _open(model, options)
    if not hasattr(planned.net, "blocks"):
        raise UserError(f"{model} is no ViT with a list of blocks: plans are made for those.")
    return planned


def _open(model: str, options: dict[str, Any]) -> Planned:
    given = [f"--model.arch.{name}={_word(value)}" for name, value in options.items()]
    is_config = model in shipped_configs() or Path(model).suffix in (".yaml", ".yml")
    if is_config and model_folder(Path(model)) is None:
        return _open_config(_settings(find_config(model)), options, ["--config", model, *given])
    if not is_timm_name(model):
        if options:
            raise UserError("--option goes with a timm name or a configuration: a saved model is what it is.")
        net = create_from(model, load_weights=False)
        size = describe(net).image_size
        dense = [] if moe_layers(net) else ["--dense"]
        return Planned(net, size, ["FOLDER", "--pretrained", model, *dense, f"--data.image_size={size}"])
    known = timm.get_pretrained_cfg(base := options.get("base") or model)
    if known is None:
        raise UserError(unknown_name(base))
    size = int(known.input_size[-1])
    name = ["FOLDER", f"--model.arch.name={model}", *given, f"--data.image_size={size}"]
    if "moe" in model:
        net = build_model(_arch({"name": model, **options}), CLASSES, size, load_pretrained=False)
        return Planned(net, size, name, classes_assumed=True)
    if options:
        raise UserError(f"{model} is a dense model: plan vit_moe with --option base={model} and your options.")
    arguments = [
        "FOLDER",
        "--model.arch.name=vit_moe",
        f"--model.arch.base={model}",
        "--dense",
        f"--data.image_size={size}",
    ]
    return Planned(create_from(model, load_weights=False), size, arguments, classes_assumed=True)


def _open_config(settings: dict[str, Any], options: dict[str, Any], arguments: list[str]) -> Planned:
    """What `fit` trains by a configuration: also what is frozen in it, and which blocks are computed again."""
    task, data = _part(settings, "model"), _part(settings, "data")
    optim = _part(task, "optim")
    size = int(data.get("image_size") or signature(ImageDataModule).parameters["image_size"].default)
    net = build_model(_arch(_part(task, "arch") | options), CLASSES, size, load_pretrained=False)
    freeze_parameters(net, optim.get("freeze"))
    checkpoint_blocks(net, task.get("grad_checkpointing") or False)
    return Planned(net, size, arguments, optim.get("name") or "adamw", classes_assumed=True)


def _arch(options: dict[str, Any]) -> MoEConfig:
    unknown = options.keys() - {field.name for field in fields(MoEConfig)}
    if unknown:
        raise UserError(f"There is no option {min(unknown)!r}: use one of fit's --model.arch, such as num_experts=8.")
    return MoEConfig(**options)


def _part(settings: dict[str, Any], name: str) -> dict[str, Any]:
    part = settings.get(name) or {}
    if not isinstance(part, dict):
        raise UserError(f"{name!r} of a configuration holds options, not {part!r}.")
    return part


def _settings(file: Path) -> dict[str, Any]:
    try:
        settings = parse_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file} can't be read as a configuration ({type(error).__name__}).") from error
    if not isinstance(settings, dict):
        raise UserError(f"{file} is no configuration of fit.")
    return settings


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def loads_of(file: Path, shape: ModelShape) -> tuple[tuple[float, ...], ...]:
    """[M][E] what each expert computed in a trace that `analyze` saved.

    Raises:
        UserError: if there is no such trace, or it is of another model.
    """
    trace = RoutingTrace.load(file)
    loads = tuple(tuple(float(load) for load in layer.counts().sum(0)) for layer in trace.layers)
    if [len(load) for load in loads] != [layer.num_experts for layer in shape.moe]:
        raise UserError(
            f"{file} has layers of {', '.join(str(len(load)) for load in loads)} experts and the model has "
            f"{', '.join(str(layer.num_experts) for layer in shape.moe) or 'none'}: give this model's trace, or --cv."
        )
    return loads


# ---- speeds


@dataclass(frozen=True)
class _Group:
    """Processes that torchrun has started to measure together: this one, and whether one node has all."""

    rank: int
    device: torch.device
    one_node: bool


@contextmanager
def _started_together(measure: bool) -> Iterator[_Group | None]:
    """The group of this process; None if it is alone, or nothing is measured."""
    if not measure or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield None
        return
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield _Group(dist.get_rank(), device, int(os.environ["LOCAL_WORLD_SIZE"]) == dist.get_world_size())
    finally:  # the others don't wait for one that failed
        dist.destroy_process_group()


def _machine(
    chosen: Namespace, planned: Planned, images: int, group: _Group | None
) -> tuple[Machine, list[str], torch.dtype]:
    """The machine, which of its fields were measured here, and the dtype of products."""
    sheet = sheet_machine(chosen.gpu, chosen.gpus_per_node)
    if not chosen.measure:
        return sheet, [], torch.float16 if chosen.gpu == "t4" else torch.bfloat16
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(default_precision(), torch.float32)
    width = int(cast(Any, planned.net).embed_dim)
    layers = moe_layers(planned.net)
    hidden = layers[0].experts.fc1.out_features if layers else 4 * width
    patches = int(cast(Any, planned.net).patch_embed.num_patches)
    machine = measured_machine(sheet, tokens=min(images, 32) * patches, width=width, hidden=hidden, dtype=dtype)
    if group is not None:
        machine = measured_links(machine, group.device, one_node=group.one_node)
    return machine, [name for name in sheet.assumed if name not in machine.assumed and name != "peak_flops"], dtype


def _value(machine: Machine, name: str, source: str) -> Value:
    unit, factor = _UNITS[name]
    return Value(name, getattr(machine, name) / factor, unit, source)


def _assumed(machine: Machine) -> list[Value]:
    return [_value(machine, name, source) for name, source in machine.assumed.items()]


def _assumed_of(chosen: Namespace, planned: Planned) -> list[Value]:
    found = []
    if chosen.trace is None and chosen.cv is None and moe_layers(planned.net):
        found.append(Value("cv", CV, "", "of the experts' loads; --cv, or --trace for measured loads"))
    if chosen.batch is None:
        found.append(Value("images_per_gpu", IMAGES_PER_GPU, "", "--batch says how many on all GPUs"))
    if planned.classes_assumed:
        found.append(Value("classes", CLASSES, "", "the data will say"))
    return found


# ---- what to do


def launch_command(best: Plan, planned: Planned, machine: Machine, dtype: torch.dtype, checkpointing: bool) -> str:
    """The command that trains so; FOLDER and HOST are for the reader to fill in."""
    job, per_node = best.job, min(best.job.gpus, machine.gpus_per_node)
    nodes = -(-job.gpus // per_node)
    start = ["moevision"]
    if job.gpus > 1:
        where = ["--standalone"] if nodes == 1 else [f"--nnodes={nodes}", "--rdzv_backend=c10d", "--rdzv_endpoint=HOST"]
        start = ["torchrun", *where, f"--nproc_per_node={per_node}", "-m", "moevision"]
    precision = {torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}.get(dtype, "32-true")
    options = [f"--data.batch_size={job.batch // job.gpus // job.accumulate}", f"--trainer.precision={precision}"]
    if job.accumulate > 1:
        options.append(f"--trainer.accumulate_grad_batches={job.accumulate}")
    if checkpointing:
        options.append("--model.grad_checkpointing=true")
    if job.gpus > 1:
        options += ["--parallel", best.layout.parallel, "--parallel.expert", str(best.layout.expert)]
        options += [f"--trainer.devices={per_node}", f"--trainer.num_nodes={nodes}"]
    return shlex.join([*start, "fit", *planned.arguments, *options])


def _sentence(best: Plan | None, checkpointing: bool) -> str:
    if best is None:
        return "No layout fits, not even one image at a time with gradient checkpointing: use more or larger GPUs."
    parts = f", each GPU's images in {best.job.accumulate} parts" if best.job.accumulate > 1 else ""
    again = ", with gradient checkpointing (without it nothing fits)" if checkpointing else ""
    return f"Recommended: {best.name}{parts}{again}."


def _facts(answer: Answer) -> dict[str, Any]:
    """Everything as JSON: bytes and milliseconds of one GPU and step."""
    return {
        "model": asdict(answer.shape),
        "machine": {name: getattr(answer.machine, name) for name in ("name", *_UNITS)},
        "measured": answer.measured,
        "assumed": [asdict(value) for value in answer.assumed],
        "grad_checkpointing": answer.checkpointing or len(answer.shape.recomputed) == answer.shape.depth,
        "layouts": [
            {
                **asdict(each),
                "name": each.name,
                "memory": {**asdict(each.memory), "states": each.memory.states, "total": each.memory.total},
                "step_ms": each.step_ms,
            }
            for each in answer.plans
        ],
        "recommended": None if answer.best is None else answer.best.name,
        "expert_parallelism": verdict_on_experts(answer.plans),
        "command": answer.command,
    }


def _print(answer: Answer) -> None:
    shape, machine, plans = answer.shape, answer.machine, answer.plans
    console = Console()
    if console.width < 110 and not console.is_terminal:
        console = Console(width=110)  # a file has room for all columns
    job = plans[0].job
    total = shape.dense.parameters + shape.experts.parameters
    flops = shape.dense_flops + shape.expert_flops
    console.print(
        f"{shown(shape.name)}: {total / 1e6:,.1f} M parameters, {shape.experts.parameters / 1e6:,.1f} M of them in "
        f"experts; {flops / 1e9:,.2f} GFLOPs forward per image (counted)",
        markup=False,
    )
    console.print(f"{job.gpus} x {machine.name}, {job.batch:,} images a step, {job.batch // job.gpus} on each GPU\n")
    columns = "weights", "gradients", "optimizer", "copies", "activations", "rows", "total", "fits", "guard, host"
    _table(
        console,
        "memory of one GPU, GB",
        columns,
        (
            (each.name, *_gigabytes(each), "yes" if each.fits else "no", f"{each.memory.snapshots / _GB:.1f}")
            for each in plans
        ),
    )
    columns = (
        "all-reduce",
        "all-gather",
        "reduce-scatter",
        "all-to-all",
        "messages",
        "wait",
        "step",
        "images/s",
        "MFU",
    )
    _table(
        console, "one step of one GPU: MB sent, messages, ms", columns, ((each.name, *_step(each)) for each in plans)
    )
    for sentence in filter(None, (verdict_on_experts(plans), _sentence(answer.best, answer.checkpointing))):
        console.print(sentence, markup=False, highlight=False)
    if answer.command is not None:
        console.print(f"  {answer.command}\n", markup=False, highlight=False, soft_wrap=True)
    if answer.measured:
        values = (_value(machine, name, "") for name in answer.measured)
        said = "; ".join(f"{value.name} {value.value:.4g} {value.unit}".strip() for value in values)
        console.print(f"measured here: {said}", markup=False, highlight=False)
    for value in answer.assumed:
        said = f"{value.name} {value.value:.4g} {value.unit}".strip()
        console.print(f"assumed: {said} ({value.source})", markup=False, highlight=False)
    console.print("Times are computed from these, not measured: trust the order of layouts more than milliseconds.")


def _table(console: Console, title: str, columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> None:
    table = Table("", *columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _gigabytes(each: Plan) -> list[str]:
    held = each.memory
    parts = (
        held.weights,
        held.gradients,
        held.optimizer,
        held.copies + held.buckets,
        held.activations,
        held.rows,
        held.total,
    )
    return [f"{size / _GB:.2f}" for size in parts]


def _step(each: Plan) -> list[str]:
    sent = [
        f"{each.bytes_of(kind) / _MB:,.0f}" for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    ]
    messages = sum(collective.messages for collective in each.collectives)
    times = [f"{each.wait_ms:.1f}", f"{each.step_ms:.1f}", f"{each.images_per_s:,.0f}", f"{each.mfu:.2f}"]
    return [*sent, f"{messages:,}", *times]
