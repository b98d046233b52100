"""`moevision info MODEL`: parameters and FLOPs of a model, beside the dense models it is compared with."""

from __future__ import annotations

import copy
import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import timm
from rich.console import Console
from rich.table import Table
from torch import nn

from moevision.commands import loading, machine
from moevision.efficiency import ModelCost, measure_cost
from moevision.errors import UserError
from moevision.layers import describe_moe, moe_layers
from moevision.models.convert import one_or_list
from moevision.models.io import SavedModel, load_model
from moevision.models.twin import dense_twin
from moevision.models.vit_moe import MOE_ARGUMENTS
from moevision.names import shown


def run(chosen: Namespace) -> None:
    """Show parameters and FLOPs of a model beside its dense twins and the plain ViT; or what limits the machine.

    Raises:
        UserError: if there is no such model.
    """
    if chosen.machine:
        machine.show(as_json=chosen.format == "json")
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
    """Cost of the model, of both dense twins, and of the plain ViT with timm's own MLPs.

    Raises:
        UserError: if the model has no MoE layers to compare.
    """
    costs = {"this model": measure_cost(net, image_size)}
    if not moe_layers(net):
        return costs
    for match, name in (
        ("active_flops", "dense twin, same active FLOPs"),
        ("total_params", "dense twin, same parameters"),
    ):
        costs[name] = measure_cost(dense_twin(net, cast(Any, match)), image_size)
    costs["the plain ViT"] = measure_cost(plain_vit(net), image_size)
    return costs


def plain_vit(net: nn.Module) -> nn.Module:
    """The same ViT as timm builds it, without MoE layers and without trained weights.

    Raises:
        UserError: if the model was not created under a registered name.
    """
    config = cast(dict[str, Any], net.pretrained_cfg)
    arguments = copy.deepcopy(cast(dict[str, Any], getattr(net, "_model_args", {})))
    if not config.get("architecture"):
        raise UserError("The plain ViT of a model without a timm name is not known.")
    for name in (*MOE_ARGUMENTS, "twin"):
        arguments.pop(name, None)
    return timm.create_model(config["architecture"], **{**arguments, "num_classes": net.num_classes, "moe_layers": []})


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
