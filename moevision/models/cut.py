"""A model of some classes with some experts of each MoE layer: what is left computes as it did.

Axes: E experts, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from moevision.errors import UserError
from moevision.layers import moe_layers
from moevision.models.convert import one_or_list
from moevision.models.io import SavedModel

CUTTABLE = ("noisy_top_k", "vmoe_top_k", "switch", "cosine", "sigmoid", "bias_balanced")


def check_cuttable(model: SavedModel) -> None:
    """Raise a UserError unless tokens choose experts by learned rows, and one linear map answers."""
    layers = moe_layers(model.net)
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
    gates are made anew by the router's rule. The source's temperature stays, its distances to strangers don't.

    Raises:
        UserError: if the model can't be cut.
    """
    check_cuttable(model)
    source = cast(Any, model.net)
    layers = moe_layers(source)
    kept = {moe.layer_index: sorted(experts[cast(int, moe.layer_index)]) for moe in layers}
    counts = [len(kept[moe.layer_index]) for moe in layers]
    choices = [min(moe.router.top_k, count) for moe, count in zip(layers, counts, strict=True)]
    arguments = {
        **source._model_args,
        "num_classes": len(classes),
        "num_experts": one_or_list(counts, None),
        "top_k": one_or_list(choices, None),
        "expert_hidden": one_or_list([moe.experts.fc1.out_features for moe in layers], None),
    }
    net: Any = timm.create_model(source.pretrained_cfg["architecture"], **arguments)
    net.to(next(source.parameters()).dtype)
    head = {id(value) for value in source.get_classifier().parameters()}
    kept_of = {f"blocks.{index}.mlp.": rows for index, rows in kept.items()}

    def part(name: str, value: Tensor) -> Tensor:
        """The rows of the classes, or of the experts, where the cut model has fewer."""
        if id(parameters.get(name)) in head:
            return value[list(classes)]
        if value.shape == shapes[name]:
            return value
        (rows,) = (rows for prefix, rows in kept_of.items() if name.startswith(prefix))
        return value[rows]

    parameters = dict(source.named_parameters())
    shapes = {name: value.shape for name, value in net.state_dict().items()}
    net.load_state_dict({name: part(name, value) for name, value in source.state_dict().items()})
    net.pretrained_cfg = {**source.pretrained_cfg, "num_classes": len(classes)}
    names = [model.class_names[index] for index in classes]
    return replace(model, net=net.eval(), class_names=names, strangers=None)
