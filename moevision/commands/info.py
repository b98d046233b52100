"""`moevision info MODEL`: parameters and FLOPs of a model, beside the dense models it is compared with.

`moevision info --machine`: what limits a training on this machine, and what to change. `moevision analyze MODEL`: what
its experts do, as one report with live views in it.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from moevision.efficiency import ModelCost, measure_cost
from moevision.errors import UserError, shown
from moevision.layers import describe_moe, moe_layers
from moevision.limits import cpu_quota, memory_available_bytes, usable_cores
from moevision.models.convert import dense_twin, one_or_list
from moevision.models.io import SavedModel, load_model
from moevision.models.vit_moe import MOE_ARGUMENTS
from moevision.train.provenance import cpu_model, gpu_names
from moevision.words import loading


def run(chosen: Namespace) -> None:
    """Show parameters and FLOPs of a model beside its dense twins and the plain ViT; or what limits the machine."""
    if chosen.machine:
        _show_machine(as_json=chosen.format == "json")
        return
    with loading("counting parameters and FLOPs"):
        saved = load_any(chosen.model)
        costs = compare_costs(saved.net, saved.image_size)
    layers = moe_layers(saved.net)
    facts: dict[str, Any] = {
        "model": chosen.model,
        "classes": len(saved.class_names),
        "image_size": saved.image_size,
        "moe_blocks": [layer.layer_index for layer in layers],
        "num_experts": one_or_list([layer.router.num_experts for layer in layers], 0),
        "top_k": one_or_list([layer.router.top_k for layer in layers], 0),
        "router": one_or_list([layer.router_name for layer in layers], None),
        "moe": describe_moe(layers) if layers else "no MoE layers",
        "costs": {name: asdict(cost) for name, cost in costs.items()},
    }
    if chosen.format == "json":
        print(json.dumps(facts, indent=2))
        return
    console = Console()
    console.print(f"{shown(chosen.model)}: {facts['classes']} classes, {facts['image_size']} px", markup=False)
    console.print(facts["moe"])
    console.print(cost_table(facts["costs"]))
    console.print(
        "active: parameters that one token passes through; one multiply-add is two FLOPs; equal FLOPs is not equal time"
    )


def load_any(address: str) -> SavedModel:
    """A saved model, or a timm name, for which weights are neither needed nor fetched."""
    if timm.is_model(address) and not Path(address).exists():
        net = timm.create_model(address).eval()
        size = int(cast(dict[str, Any], net.pretrained_cfg)["input_size"][-1])
        names = [f"class {index}" for index in range(cast(int, net.num_classes))]
        return SavedModel(net, names, size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return load_model(address)


def compare_costs(net: nn.Module, image_size: int) -> dict[str, ModelCost]:
    """Cost of the model, of both dense twins, and of the plain ViT with timm's own MLPs, untrained."""
    costs = {"this model": measure_cost(net, image_size)}
    if not moe_layers(net):
        return costs
    for match, name in (
        ("active_flops", "dense twin, same active FLOPs"),
        ("total_params", "dense twin, same parameters"),
    ):
        costs[name] = measure_cost(dense_twin(net, cast(Any, match)), image_size)
    architecture = cast(dict[str, Any], net.pretrained_cfg).get("architecture")
    if not architecture:
        raise UserError("The plain ViT of a model without a timm name is not known.")
    given = copy.deepcopy(cast(dict[str, Any], getattr(net, "_model_args", {})))
    dense = {name: value for name, value in given.items() if name not in (*MOE_ARGUMENTS, "twin")}
    plain = timm.create_model(architecture, **{**dense, "num_classes": net.num_classes, "moe_layers": []})
    costs["the plain ViT"] = measure_cost(plain, image_size)
    return costs


def cost_table(costs: Mapping[str, Mapping[str, Any]]) -> Table:
    """Each model's `ModelCost` (as a dict) in a row."""
    table = Table("", "parameters", "active", "MFLOPs / image", "routers' MFLOPs")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, cost in costs.items():
        table.add_row(
            name,
            f"{cost['total_parameters']:,}",
            f"{cost['active_parameters']:,}",
            f"{cost['flops_per_image'] / 1e6:,.1f}",
            f"{cost['router_flops_per_image'] / 1e6:,.2f}",
        )
    return table


# ---- what its experts do


def analyze(chosen: Namespace) -> None:
    """Write the report, and print the three answers and what it says of each layer."""
    from moevision.analysis import report  # scikit-learn and matplotlib come along

    options = {field.name for field in fields(report.ReportSettings)}
    given = {name: value for name, value in vars(chosen).items() if name in options and value is not None}
    if chosen.quick:
        given = {"limit": 300, "permutations": 200} | given
    settings = report.ReportSettings(**given | {"out": Path(chosen.out), "seeds": tuple(chosen.seeds)})
    numbers = report.analyze(settings, live=live_view)
    for answer in numbers["verdict"]["answers"]:
        print(shown(answer["sentence"]))
    for layer in numbers["verdict"]["layers"]:
        print("\n".join(f"  {shown(line)}" for line in [*layer["sentences"], *layer["numbers"]]))
    print(f"The report is {shown(str(settings.out / 'report.html'))}")


def live_view(model: SavedModel, pixels: Any, name: str, label: str | None) -> str:
    """The explorer's opening for one image, uint8 [S, S, 3], as a frame that needs no server."""
    from moevision.demo.facts import PictureFacts
    from moevision.demo.html import flow_html
    from moevision.demo.view import route_image

    return flow_html(route_image(model, pixels, picture=PictureFacts(pixels, name=name, label=label)).to_json())


# ---- the machine

GIB = 2**30


def _show_machine(*, as_json: bool) -> None:
    machine = look()
    found = [{"what": what, "advice": advice} for what, advice in findings(machine)]
    if as_json:
        print(json.dumps({"machine": machine, "findings": found}, indent=2))
        return
    print("\n".join(f"{name:12} {value}" for name, value in machine.items()))
    for finding in found:
        print(f"\n{finding['what']}\n-> {finding['advice']}")


def findings(machine: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What limits, and what to do about it: the wrong device first, then cores, then memory."""
    threads, cores = machine["threads"], machine["cores"]
    if machine["nvidia_card"] and not machine["gpus"]:
        yield (
            f"There is an NVIDIA card, but torch {machine['torch']} (CUDA: {machine['cuda']}) can't use it.",
            "Install a torch for CUDA (https://pytorch.org/get-started/locally/); if it is one, check that "
            "CUDA_VISIBLE_DEVICES doesn't hide the card and that `nvidia-smi` shows a driver for that CUDA.",
        )
    if threads > cores or (threads < cores and not machine["gpus"]):
        yield (
            f"torch uses {threads} threads, and this process may use {cores} cores.",
            f"Set OMP_NUM_THREADS={cores}, or less if several trainings share this machine.",
        )
    for name, least, what, advice in (
        ("memory_gib", 2, "GiB of memory are free",
         "End other programs, or use a smaller --data.batch_size and more --trainer.accumulate_grad_batches."),
        ("shm_gib", 0.5, "GiB has /dev/shm, and data workers die when it is full",
         "Start the container with --shm-size=2g, or keep --data.num_workers 0."),
        ("disk_gib", 2, "GiB are left on the disk of this folder, and a run keeps several checkpoints",
         "Make room, or write elsewhere with --runs_root."),
    ):  # fmt: skip
        size = machine[name]
        if size is not None and size < least:
            yield f"Only {size} {what}.", advice


def look() -> dict[str, Any]:
    """What this process can use; None where the system doesn't say."""
    from moevision.train.recipe import default_precision  # Lightning comes along

    memory, shm = memory_available_bytes(), Path("/dev/shm")
    return {
        "cpu": cpu_model(),
        "cores": max(1, min(usable_cores(), math.ceil(cpu_quota() or usable_cores()))),  # with the control group's time
        "threads": torch.get_num_threads(),
        "gpus": gpu_names() if torch.cuda.is_available() else [],  # that torch can use
        "nvidia_card": shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "precision": default_precision(),
        "memory_gib": None if memory is None else round(memory / GIB, 2),  # free
        "shm_gib": round(shutil.disk_usage(shm).total / GIB, 2) if shm.is_dir() else None,  # for data workers' batches
        "disk_gib": round(shutil.disk_usage(".").free / GIB, 2),  # free in the current folder
    }
