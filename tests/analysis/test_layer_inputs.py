"""What a layer receives of every patch is what its router decides by."""

import numpy as np
import timm
import torch
from torch import nn

from moevision import forward_routing
from moevision.analysis.collect import layer_inputs, network_input
from moevision.data import SyntheticPets
from moevision.layers import moe_layers
from moevision.models.io import SavedModel


def test_layer_inputs_are_what_the_router_sees() -> None:
    torch.manual_seed(0)
    net = timm.create_model("test_vit_moe", num_classes=8)
    for layer in moe_layers(net):
        nn.init.normal_(layer.router.weight)
    pets = SyntheticPets(3, 32, 0, "test")
    model = SavedModel(
        net.eval(), list(SyntheticPets.classes), 32, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    )
    images = np.stack([pets.image(index) for index in range(3)])
    pixels = network_input(model, images)
    _, routings = forward_routing(model.net, pixels)
    received = layer_inputs(model.net, pixels)
    assert list(received) == [routing.layer for routing in routings]
    for layer, routing in zip(moe_layers(model.net), routings, strict=True):
        logits = received[routing.layer] @ layer.router.weight.detach().T
        torch.testing.assert_close(logits, routing.logits[:, routing.num_prefix_tokens :].detach())
        assert not layer._forward_pre_hooks  # nothing is left behind
