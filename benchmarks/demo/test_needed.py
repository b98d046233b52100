"""How many answers change without experts: sets and control, recomputed one at a time on a bundled model."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from torch import Generator

from benchmarks.demo.needed import Changes, move_at_random, record_of, sets_away
from moevision.analysis.collect import network_input
from moevision.analysis.effects import expert_sets
from moevision.analysis.intervention import Intervention, intervene, numbered_layers
from moevision.demo.models import bundled_folder, open_entries
from moevision.layers import forward_routing


@pytest.fixture(scope="module")
def entry():
    (found,) = (one for one in open_entries(None) if one.card.id == "cifar10")
    return found


@pytest.fixture(scope="module")
def model(entry):
    return entry.variants["trained"].saved


@torch.inference_mode()
def test_a_changed_answer_is_that_of_the_set_alone(entry, model) -> None:
    examples = entry.examples.usable(0, 4)
    seen = set()
    for example in examples:
        x = network_input(model, example.pixels[None])
        answer = int(model.net(x).argmax(-1))
        changed = Changes(model).of_image(x, answer)
        for layer, moe in numbered_layers(model.net).items():
            for row, (_, chosen) in enumerate(expert_sets({layer: moe}, 2)):
                away = [Intervention("ablate", layer=layer, expert=expert) for expert in chosen]
                with intervene(model.net, *away):
                    alone = int(model.net(x).argmax(-1))
                assert changed[layer][0, row] == (alone != answer)
                seen.add(alone != answer)
    assert seen == {False, True}


@torch.inference_mode()
def test_the_control_moves_as_many_patches(entry, model) -> None:
    """Of a set's n patches, n others lose all of their experts; prefix tokens stay."""
    x = network_input(model, entry.examples.usable(0, 1)[0].pixels[None])
    layer, moe = next(iter(numbered_layers(model.net).items()))
    is_away = sets_away(expert_sets({layer: moe}, 2), moe.router.num_experts)
    _, routings = forward_routing(model.net, x)
    experts = routings[0].expert_index[0]  # [N, K]
    prefix = int(model.net.num_prefix_tokens)
    moved = []

    def watch(decision):
        changed = move_at_random(is_away, prefix, Generator().manual_seed(1))(decision)
        moved.append(changed.removed)
        return changed

    Changes(model).answers(x, moe, watch, len(is_away))
    (removed,) = moved  # [M, N, E]
    assert not removed[:, :prefix].any()
    for row, away in enumerate(is_away):
        expected = sum(bool(away[chosen].any()) for chosen in experts[prefix:])
        tokens = removed[row].any(-1).nonzero()[:, 0]
        assert len(tokens) == expected
        for token in tokens:
            assert set(np.flatnonzero(removed[row, token])) == set(experts[token].tolist())


def test_all_images_of_a_folder_are_counted(draw, tmp_path) -> None:
    """Three of each of two classes; a folder that isn't cut into train, val and test is not cut here."""
    folder = draw(tmp_path / "six", per_class=3)
    model = str(bundled_folder("cifar10") / "trained")
    found = record_of(Namespace(model=model, data=str(folder), images=3))
    assert found["images"] == 6
