"""Load over a whole split: what the counts of every batch add up to."""

import pytest
import torch

from moevision import MoEMlp
from moevision.layers import Routing, record_routing
from moevision.losses import RoutingStatistics


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("num_experts", [1, 4])
def test_loads_of_one_layer_and_of_one_expert(num_layers, num_experts):
    """torchmetrics hands back the state of one layer, or of one expert, without its axes."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        *(
            MoEMlp(8, 8, num_experts=num_experts, top_k=1, router="switch")
            for _ in range(num_layers)
        )
    ).eval()
    statistics = RoutingStatistics(range(num_layers), [num_experts] * num_layers)
    counts = torch.zeros(num_layers, num_experts, dtype=torch.int64)
    for _ in range(2):
        with torch.no_grad(), record_routing(layers) as routings:
            layers(torch.randn(3, 5, 8))
        statistics.update(routings)
        counts += torch.stack(
            [torch.bincount(r.expert_index.flatten(), minlength=num_experts) for r in routings]
        )
    loads = statistics.layer_loads()
    assert [load.layer for load in loads] == list(range(num_layers))
    assert [load.counts for load in loads] == counts.tolist()
    assert counts.sum(1).tolist() == [2 * 3 * 5] * num_layers
    assert [load.unrouted for load in loads] == [0.0] * num_layers


def _floor(images: int, tokens: int, together: bool) -> tuple[float, float]:
    """(CV², its floor) of so many images whose choices fall on 4 experts at random: all of an image alike, or each."""
    expert = torch.randint(4, (images, 1 if together else tokens, 1)).expand(images, tokens, 1)
    zeros = torch.zeros(images, tokens, 4)
    ones = torch.ones(images, tokens, 1)
    statistics = RoutingStatistics([0], [4])
    statistics.update([Routing(zeros, zeros, zeros + 0.25, None, expert, ones, ones.bool())])
    (load,) = statistics.layer_loads()
    return load.cv_squared, load.cv_squared_floor


@pytest.mark.parametrize("together", [True, False])
def test_the_floor_of_cv_squared_is_its_mean_under_balance(together):
    """400 draws of 50 images with 16 tokens: 3/800 if independent, 16 times that if an image's agree."""
    torch.manual_seed(0)
    measured, floor = torch.tensor([_floor(50, 16, together) for _ in range(400)]).mean(0).tolist()
    expected = 3 / (50 * 16) * (16 if together else 1)
    assert measured == pytest.approx(expected, rel=0.1)
    assert floor == pytest.approx(expected, rel=0.1)


def test_the_floor_of_one_image_takes_its_choices_as_independent():
    assert _floor(1, 16, together=False)[1] == pytest.approx(3 / 16)


def test_tokens_without_an_expert_are_those_whose_choices_all_were_dropped():
    """Of 2 images with 3 tokens and 2 choices: one token lost both choices, two lost one."""
    expert = torch.tensor([0, 1]).expand(2, 3, 2)
    kept = torch.tensor([[[1, 1], [0, 0], [0, 1]], [[1, 1], [1, 1], [1, 0]]]).bool()
    zeros = torch.zeros(2, 3, 4)
    statistics = RoutingStatistics([0], [4])
    statistics.update(
        [Routing(zeros, zeros, zeros + 0.25, None, expert, torch.ones(2, 3, 2), kept)]
    )
    (load,) = statistics.layer_loads()
    assert load.unrouted == pytest.approx(1 / 6)
    assert load.counts == [4, 4, 0, 0]


def test_entropy_is_in_bits():
    """Half of the tokens are undecided between 4 experts (2 bits), half between 2 (1 bit)."""
    probs = torch.tensor([[[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]]])
    zeros, expert, ones = torch.zeros(1, 2, 4), torch.tensor([[[0], [1]]]), torch.ones(1, 2, 1)
    statistics = RoutingStatistics([0], [4])
    statistics.update([Routing(zeros, zeros, probs, None, expert, ones, ones.bool())])
    assert statistics.layer_loads()[0].entropy_bits == pytest.approx(1.5)
