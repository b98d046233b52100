"""`moevision info MODEL`: parameters and FLOPs of a model, beside the dense models it is compared with.

`moevision analyze MODEL`: what its experts do, as one report with live views in it; `moevision audit FILE.py:FUNCTION`:
the same of a model from elsewhere, with findings.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import timm
from rich.console import Console
from rich.table import Table
from torch import nn

from moevision.efficiency import ModelCost, measure_cost
from moevision.errors import escape_controls
from moevision.layers import describe_moe, moe_layers
from moevision.models.convert import dense_arguments, dense_twin, one_or_list
from moevision.models.io import SavedModel, describe, is_timm_name, load_model
from moevision.types import Json, Keywords, TimmModel
from moevision.words import loading


def run(args: Namespace) -> None:
    """Show parameters and FLOPs of a model beside its dense twins and the plain ViT."""
    with loading("counting parameters and FLOPs"):
        saved = load_any(args.model)
        costs = compare_costs(saved.net, saved.image_size)
    layers = moe_layers(saved.net)
    facts: Json = {
        "model": args.model,
        "classes": len(saved.class_names),
        "image_size": saved.image_size,
        "moe_blocks": [layer.layer_index for layer in layers],
        "num_experts": one_or_list([layer.router.num_experts for layer in layers], 0),
        "top_k": one_or_list([layer.router.top_k for layer in layers], 0),
        "router": one_or_list([layer.router_name for layer in layers], None),
        "moe": describe_moe(layers) if layers else "no MoE layers",
        "costs": {name: asdict(cost) for name, cost in costs.items()},
    }
    if args.format == "json":
        print(json.dumps(facts, indent=2))
        return

    console = Console()
    console.print(
        f"{escape_controls(args.model)}: {facts['classes']} classes, {facts['image_size']} px",
        markup=False,
    )
    console.print(facts["moe"])
    console.print(cost_table(facts["costs"]))
    console.print(
        "active: parameters that one token passes through; one multiply-add is two FLOPs; equal FLOPs is not equal time"
    )


def load_any(address: str) -> SavedModel:
    """A saved model, or a timm name, for which weights are neither needed nor fetched."""
    if is_timm_name(address) and not Path(address).exists():
        return describe(timm.create_model(address).eval())
    return load_model(address)


def compare_costs(net: nn.Module, image_size: int) -> dict[str, ModelCost]:
    """Cost of the model, of both dense twins, and of the plain ViT with timm's own MLPs, untrained."""
    costs = {"this model": measure_cost(net, image_size)}
    if not moe_layers(net):
        return costs
    matches: dict[str, Literal["active_flops", "total_params"]] = {
        "dense twin, same active FLOPs": "active_flops",
        "dense twin, same parameters": "total_params",
    }
    for name, match in matches.items():
        costs[name] = measure_cost(dense_twin(net, match), image_size)
    costs["the plain ViT"] = measure_cost(_plain_vit(net), image_size)
    return costs


def _plain_vit(net: TimmModel) -> nn.Module:
    """The architecture without experts, with timm's own MLPs."""
    arguments = dense_arguments(net) | {"num_classes": net.num_classes, "moe_layers": []}
    return timm.create_model(net.pretrained_cfg["architecture"], **arguments)


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


def analyze(args: Namespace) -> None:
    """Write the report, and print its three answers; the layers' numbers are in it."""
    from moevision.analysis import report  # scikit-learn and matplotlib come along

    options: Keywords = {}
    if args.quick:
        options = {"limit": 300, "permutations": 200}
    for field in fields(report.ReportSettings):
        value = getattr(args, field.name, None)
        if value is not None:
            options[field.name] = value
    options |= {"out": Path(args.out), "seeds": tuple(args.seeds)}
    settings = report.ReportSettings(**options)

    numbers = report.analyze(settings, live=None if settings.code else live_view)
    sentences = [answer["sentence"] for answer in numbers["verdict"]["answers"]]
    if settings.code:
        sentences = [finding["sentence"] for finding in numbers["findings"]]
        for layer in numbers["verdict"]["layers"]:
            sentences += layer["sentences"]
    for sentence in sentences:
        print(escape_controls(sentence))
    print(f"The report is {escape_controls(str(settings.out / 'report.html'))}")


def audit(args: Namespace) -> None:
    """The same of a model from elsewhere: its findings, then the three answers about each of its layers."""
    args.model = args.function
    args.code = True
    args.seeds = []
    analyze(args)


def live_view(model: SavedModel, pixels: Any, name: str, label: str | None) -> str:
    """The explorer's opening for one image, uint8 [S, S, 3], as a frame that needs no server."""
    from moevision.demo.facts import PictureFacts
    from moevision.demo.html import flow_html
    from moevision.demo.view import route_image

    picture = PictureFacts(pixels, name=name, label=label)
    return flow_html(route_image(model, pixels, picture=picture).to_json())
