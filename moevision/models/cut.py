"""A model of some classes with some experts of each MoE layer: what is left computes as it did.

Axes: E experts, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import timm
import torch
from torch import nn

from moevision.errors import UserError
from moevision.layers import moe_layers
from moevision.models.convert import one_or_list
from moevision.models.io import SavedModel

CUTTABLE = ("noisy_top_k", "vmoe_top_k", "switch", "cosine", "sigmoid", "bias_balanced")


def check_cuttable(model: SavedModel) -> None:
    """Raise a UserError unless tokens choose experts by learned rows, and one linear map answers."""
    layers = moe_layers(model.net)
    if model.thresholds:
        raise UserError(
            "cut keeps some classes of a model that names one of an image, and this one gives several labels."
        )
    if not layers:
        raise UserError("The model has no experts to leave out: cut takes a Mixture of Experts.")
    for moe in layers:
        if moe.router_name not in CUTTABLE:
            raise UserError(
                f"Block {moe.layer_index} routes by {moe.router_name}, whose experts can't be left out one by one: "
                f"cut takes {', '.join(CUTTABLE)}."
            )
    if not isinstance(cast(Any, model.net).get_classifier(), nn.Linear):
        raise UserError(
            "The model's classifier is no linear layer: its classes can't be taken apart."
        )


@torch.no_grad()
def cut(
    model: SavedModel, classes: Sequence[int], experts: Mapping[int, Sequence[int]]
) -> SavedModel:
    """A copy with these classes, in this order, and of each MoE layer (block number) these experts.

    Its logits are those of the source for these classes where its routers choose among these experts alone, and their
    gates are made anew by the router's rule. The source's temperature stays; its distances to strangers and its
    scores of sets don't.

    Raises:
        UserError: if the model can't be cut.
    """
    check_cuttable(model)
    source = cast(Any, model.net)
    kept = {layer: sorted(chosen) for layer, chosen in sorted(experts.items())}
    net = _smaller(source, len(classes), [len(rows) for rows in kept.values()])

    rows_of = {f"blocks.{layer}.mlp.": rows for layer, rows in kept.items()}
    head = {id(value) for value in source.get_classifier().parameters()}
    for name, value in source.named_parameters():
        if id(value) in head:
            rows_of[name] = list(classes)
    weights = source.state_dict()
    for name, value in net.state_dict().items():
        for prefix, rows in rows_of.items():
            # In a MoE layer only what belongs to one expert changes its shape.
            if name.startswith(prefix) and (name == prefix or weights[name].shape != value.shape):
                weights[name] = weights[name][rows]
    net.load_state_dict(weights)

    net.pretrained_cfg = {**source.pretrained_cfg, "num_classes": len(classes)}
    names = [model.class_names[index] for index in classes]
    return replace(model, net=net.eval(), class_names=names, strangers=None, sets=None)


def _smaller(source: Any, num_classes: int, num_experts: Sequence[int]) -> Any:
    """A new model like the source, with so many classes, and experts of each MoE layer."""
    layers = moe_layers(source)
    choices = [min(moe.router.top_k, count) for moe, count in zip(layers, num_experts, strict=True)]
    arguments = {
        **source._model_args,
        "num_classes": num_classes,
        "num_experts": one_or_list(list(num_experts), None),
        "top_k": one_or_list(choices, None),
        "expert_hidden": one_or_list([moe.experts.fc1.out_features for moe in layers], None),
    }
    net = timm.create_model(source.pretrained_cfg["architecture"], **arguments)
    return net.to(next(source.parameters()).dtype)
