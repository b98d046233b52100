"""The fewest experts: which set is chosen, from answers that are written down here, and the batches of the search."""

import pytest
import torch

from moevision.analysis.collect import network_input
from moevision.analysis.effects import answers_without, expert_sets, fewest_experts
from moevision.analysis.intervention import Intervention, intervene, numbered_layers
from moevision.demo.models import open_entries


def layers_of(id: str):
    (entry,) = (one for one in open_entries(None) if one.card.id == id)
    return numbered_layers(entry.variants["trained"].saved.net)


def test_all_sets_of_few_experts() -> None:
    """8 + 28 + 56 of eight experts; of two experts no set has three."""
    assert len(expert_sets(layers_of("emoji"), 3)) == 8 + 28 + 56
    layer = min(layers_of("cats_vs_dogs_two"))
    of_two = [
        chosen
        for number, chosen in expert_sets(layers_of("cats_vs_dogs_two"), 3)
        if number == layer
    ]
    assert of_two == [(0,), (1,), (0, 1)]


@pytest.mark.parametrize(
    ("without", "found"),
    [
        ([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9]], (0, (0, 1))),  # only the pair does it
        ([[0.4, 0.6], [0.9, 0.1], [0.1, 0.9]], (0, (0,))),  # one is fewer than two
        ([[0.4, 0.6], [0.3, 0.7], [0.1, 0.9]], (0, (1,))),  # the class loses more
        ([[0.6, 0.4], [0.7, 0.3], [0.8, 0.2]], None),
    ],
)
def test_the_smallest_set_is_chosen_then_the_strongest(without, found) -> None:
    sets = [(0, (0,)), (0, (1,)), (0, (0, 1))]
    assert fewest_experts(torch.tensor([0.9, 0.1]), sets, torch.tensor(without)) == found


def test_a_batch_of_sets_has_the_answers_of_each_set() -> None:
    (entry,) = (one for one in open_entries(None) if one.card.id == "cifar10")
    model, example = entry.variants["trained"].saved, entry.examples.usable(0, 1)[0]
    _, without = answers_without(model, example.pixels, 2)
    sets = expert_sets(numbered_layers(model.net), 2)
    assert len(sets) == len(without) == 2 * (8 + 28)
    x = network_input(model, example.pixels[None])
    for layer, chosen in ((0, (2,)), (1, (3, 5))):
        away = [Intervention("ablate", layer=layer, expert=expert) for expert in chosen]
        with torch.inference_mode(), intervene(model.net, *away):
            alone = model.net(x)[0].softmax(-1)
        row = sets.index((layer, chosen))
        assert torch.allclose(without[row], alone, atol=1e-5)
