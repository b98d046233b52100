"""What a layer receives of every patch is what its router decides by."""

import numpy as np
import torch

from moevision import forward_routing
from moevision.analysis.collect import layer_inputs, network_input
from moevision.data import SyntheticPets
from moevision.layers import moe_layers
from tests.analysis.models import saved, small_net


def test_layer_inputs_are_what_the_router_sees() -> None:
    model = saved(small_net())
    pets = SyntheticPets(3, 32, 0, "test")
    images = np.stack([pets.image(index) for index in range(3)])
    pixels = network_input(model, images)
    _, routings = forward_routing(model.net, pixels)
    received = layer_inputs(model.net, pixels)
    assert list(received) == [routing.layer for routing in routings]
    for layer, routing in zip(moe_layers(model.net), routings, strict=True):
        logits = received[routing.layer] @ layer.router.weight.detach().T
        torch.testing.assert_close(logits, routing.logits[:, routing.num_prefix_tokens :].detach())
        assert not layer._forward_pre_hooks  # nothing is left behind
