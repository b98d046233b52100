"""Load over a whole split: what the counts of every batch add up to."""

import pytest
import torch

from moevision import MoEMlp
from moevision.layers import record_routing
from moevision.metrics import RoutingStatistics


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("num_experts", [1, 4])
def test_loads_of_one_layer_and_of_one_expert(num_layers: int, num_experts: int) -> None:
    """torchmetrics hands back the state of one layer, or of one expert, without its axes."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        *(MoEMlp(8, 8, num_experts=num_experts, top_k=1, router="switch") for _ in range(num_layers))
    ).eval()
    statistics = RoutingStatistics(range(num_layers), num_experts)
    counts = torch.zeros(num_layers, num_experts, dtype=torch.int64)
    for _ in range(2):
        with torch.no_grad(), record_routing(layers) as routings:
            layers(torch.randn(3, 5, 8))
        statistics.update(routings)
        counts += torch.stack([torch.bincount(r.expert_index.flatten(), minlength=num_experts) for r in routings])
    loads = statistics.layer_loads()
    assert [load.layer for load in loads] == list(range(num_layers))
    assert [load.counts for load in loads] == counts.tolist()
    assert counts.sum(1).tolist() == [2 * 3 * 5] * num_layers
    assert [load.unrouted for load in loads] == [0.0] * num_layers
