"""The fewest experts: which set is chosen, from answers that are written down here, and the batches of the search."""

import pytest
import torch

from benchmarks.demo.falls import answers_without, sets_of, smallest
from moevision.analysis.collect import network_input
from moevision.analysis.intervention import Intervention, intervene
from moevision.demo.models import open_entries


def test_all_sets_of_few_experts() -> None:
    """8 + 28 + 56 of eight experts; of two experts no set has three."""
    assert len(sets_of(8, 3)) == 8 + 28 + 56
    assert sets_of(2, 3) == [(0,), (1,), (0, 1)]


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
    assert smallest(torch.tensor([0.9, 0.1]), sets, torch.tensor(without)) == found


def test_a_batch_of_sets_has_the_answers_of_each_set() -> None:
    (entry,) = (one for one in open_entries(None) if one.card.id == "cifar10")
    model, example = entry.variants["trained"].saved, entry.examples.usable(0, 1)[0]
    answers = answers_without(model, [example.pixels], 2)
    assert len(answers.sets) == 2 * (8 + 28)
    x = network_input(model, example.pixels[None])
    for layer, chosen in ((0, (2,)), (1, (3, 5))):
        away = [Intervention("ablate", layer=layer, expert=expert) for expert in chosen]
        with torch.inference_mode(), intervene(model.net, *away):
            alone = model.net(x)[0].softmax(-1)
        row = answers.sets.index((layer, chosen))
        assert torch.allclose(answers.without[0, row], alone, atol=1e-5)
