"""Interventions against NumPy transcriptions of what they say they do, and the promises of their scopes."""

import copy
import itertools
import pickle
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moevision import UserError, forward_routing
from moevision.analysis.intervention import Intervention, intervene
from moevision.layers import MoEMlp, moe_layers
from tests.analysis.models import random_layer, random_tensor, routed, small_net
from tests.scopes import ablate, force, limit_capacity, random_route, swap, use_top_k

ROUTERS = ("noisy_top_k", "vmoe_top_k")
WAIT_S = 120.0


def make_layer(router: str = "noisy_top_k", top_k: int = 2, **options: object) -> MoEMlp:
    """A float64 layer of 6 experts in eval mode."""
    options = {"num_experts": 6, "top_k": top_k, **options}
    return random_layer(MoEMlp(16, 8, router=router, dtype=torch.float64, **options))


def make_model(seed: int = 0, **options: object) -> nn.Module:
    """Two MoE layers (blocks 1 and 3) on a 4 x 4 grid, float64."""
    options = {"num_classes": 3, "num_experts": 6, "expert_hidden": 24, **options}
    return small_net(seed=seed, **options).double()


def tokens() -> Tensor:
    return random_tensor(3, 9, 16, seed=1)


def images(count: int = 4) -> Tensor:
    return random_tensor(count, 3, 32, 32, seed=2)


def numpy_choice(
    logits: np.ndarray, allowed: list[int], top_k: int, router: str
) -> tuple[list[int], np.ndarray]:
    """One token's experts and gates, from the definition of its router."""
    best = sorted(allowed, key=lambda expert: -logits[expert])[:top_k]
    if router == "sigmoid":
        affinity = 1 / (1 + np.exp(-logits))
        return best, affinity[best] / (affinity[best].sum() if top_k > 1 else 1)
    if router == "noisy_top_k" and top_k > 1:
        weights = np.exp(logits[best])
        return best, weights / weights.sum()
    return best, np.exp(logits[best]) / np.exp(logits).sum()


@pytest.mark.parametrize("away", [(2,), (2, 5), (0, 1, 2, 3)])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("router", [*ROUTERS, "sigmoid"])
def test_next_best_is_the_choice_among_the_others(router, top_k, away):
    """Nested ablations are one choice without all of them."""
    layer, x = make_layer(router, top_k), tokens()
    _, free = routed(layer, x)
    with intervene(layer, *(Intervention("ablate", layer=0, expert=expert) for expert in away)):
        _, routing = routed(layer, x)
    logits = (x @ layer.router.weight.T).detach().numpy()
    allowed = [expert for expert in range(6) if expert not in away]
    for image, token in np.ndindex(3, 9):
        experts, gates = numpy_choice(logits[image, token], allowed, top_k, router)
        assert routing.expert_index[image, token].tolist() == experts
        np.testing.assert_allclose(routing.combine_weight[image, token].detach(), gates, rtol=1e-12)
    assert routing.counts()[list(away)].sum() == 0
    assert routing.counts().sum() == 3 * 9 * top_k
    assert torch.equal(routing.logits, free.logits)  # what the router said is recorded beside it
    assert torch.equal(routing.probs, free.probs)


def test_with_fewer_experts_than_choices_a_token_has_fewer():
    """Five of six are away: the last one has the whole softmax over the chosen, and none is chosen twice."""
    layer, x = make_layer(), tokens()
    with intervene(layer, *(Intervention("ablate", layer=0, expert=expert) for expert in range(5))):
        out, routing = routed(layer, x)
        with ablate(layer, 0, 5):
            nothing, _ = routed(layer, x)
    assert routing.counts().tolist() == [0, 0, 0, 0, 0, 27]
    torch.testing.assert_close(out, layer.experts.on_all_tokens(x.flatten(0, 1))[:, 5].view_as(out))
    assert not nothing.any()


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("router", [*ROUTERS, "cosine", "sigmoid", "bias_balanced", "hash"])
def test_other_k_is_the_model_built_with_that_k(router, k):
    model, built = make_model(router=router), make_model(seed=1, router=router, top_k=k)
    built.load_state_dict(model.state_dict())
    expected, recorded = forward_routing(built, images())
    with use_top_k(model, k):
        actual, routings = forward_routing(model, images())
    torch.testing.assert_close(actual, expected)
    assert all(
        torch.equal(a.expert_index, b.expert_index) for a, b in zip(routings, recorded, strict=True)
    )
    plain = model(images())
    with use_top_k(model, k), use_top_k(model, 2):  # of two k the inner one counts
        assert torch.equal(model(images()), plain)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 6.0])
@pytest.mark.parametrize(
    ("router", "top_k"), [("noisy_top_k", 2), ("vmoe_top_k", 2), ("noisy_top_k", 1)]
)
def test_capacity_is_that_of_a_layer_built_with_it(router, top_k, factor):
    """With batch priority, within each image: how such a layer drops is tested by hand in tests/layers."""
    layer, x = make_layer(router, top_k), tokens()
    options = {"eval_capacity_factor": factor, "batch_priority": True}
    expected, routing = routed(make_layer(router, top_k, **options), x)
    with limit_capacity(layer, factor):
        out, limited = routed(layer, x)
    torch.testing.assert_close(out, expected)
    assert torch.equal(limited.expert_index, routing.expert_index)
    assert torch.equal(limited.kept, routing.kept)
    assert limited.kept.all() == (factor == 6.0)


def test_force_puts_the_expert_first_with_the_first_choices_gate():
    layer, x = make_layer(), tokens()
    _, free = routed(layer, x)
    with force(layer, 0, 4):
        out, forced = routed(layer, x)
    assert (forced.expert_index[..., 0] == 4).all()
    assert torch.equal(forced.combine_weight, free.combine_weight)
    assert forced.counts()[4] == 27
    everything = layer.experts.on_all_tokens(x.flatten(0, 1)).view(3, 9, 6, 16)
    for image, token in np.ndindex(3, 9):
        first, second = free.expert_index[image, token].tolist()
        other = second if first == 4 else first
        large, small = free.combine_weight[image, token]
        expected = large * everything[image, token, 4] + small * everything[image, token, other]
        torch.testing.assert_close(out[image, token], expected)


def test_random_routes_are_even_distinct_and_repeatable():
    """200 seeds x 9 positions x 2 choices on 6 experts: 600 each, standard deviation below sqrt(600 · 5/6) = 22."""
    layer, x = make_layer(), tokens()
    _, free = routed(layer, x)
    counts, seen = torch.zeros(6, dtype=torch.int64), set()
    for seed in range(200):
        with random_route(layer, seed=seed):
            _, routing = routed(layer, x)
        assert (routing.expert_index[..., 0] != routing.expert_index[..., 1]).all()
        assert torch.equal(routing.expert_index, routing.expert_index[:1].expand(3, 9, 2))
        assert torch.equal(routing.combine_weight, free.combine_weight)
        counts += routing.counts() // 3
        seen.add(tuple(routing.expert_index[0].flatten().tolist()))
    assert (counts - 600).abs().max() < 4 * 22
    assert len(seen) == 200
    with random_route(layer, seed=199):
        assert tuple(routed(layer, x)[1].expert_index[0].flatten().tolist()) in seen


def test_random_routes_differ_between_layers():
    with random_route(model := make_model(), seed=3):
        _, routings = forward_routing(model, images())
    assert not torch.equal(routings[0].expert_index, routings[1].expert_index)


def busiest(model: nn.Module, layer: int) -> int:
    """The expert that computes most tokens of the test images."""
    routings = {routing.layer: routing for routing in forward_routing(model, images(6))[1]}
    return int(routings[layer].counts().argmax())


Scope = Callable[[nn.Module], AbstractContextManager[None]]
SCOPES: dict[str, Scope] = {
    "ablate": lambda model: ablate(model, 1, busiest(model, 1)),
    "zero": lambda model: ablate(model, 3, busiest(model, 3), fill="zero"),
    "force": lambda model: force(model, 3, 1),
    "swap": lambda model: intervene(
        model,
        Intervention("swap", layer=1, expert=0, other=5),
        Intervention("swap", layer=3, expert=0, other=2),
    ),
    "random": lambda model: random_route(model, seed=4),
    "top_k": lambda model: use_top_k(model, 1),
    "capacity": lambda model: limit_capacity(model, 0.75),
    "all of them": lambda model: intervene(
        model,
        Intervention("ablate", layer=1, expert=2),
        Intervention("random", layer=3),
        Intervention("swap", layer=1, expert=0, other=5),
        Intervention("top_k", top_k=3),
        Intervention("capacity", factor=0.75),
    ),
}


MIXING = ("ablate", "zero", "swap", "random")  # what has a meaning where tokens don't choose


@pytest.mark.parametrize(
    ("router", "name"),
    [
        *itertools.product(ROUTERS, SCOPES),
        *itertools.product(("expert_choice", "soft"), MIXING),
    ],
)
def test_batch_mates_change_nothing(router, name):
    """Exact in float64: every image alone, and in two batches; and every intervention changes something."""
    model, x = make_model(router=router), images(6)
    plain = model(x)
    with SCOPES[name](model):
        together, routings = forward_routing(model, x)
        reversed_, _ = forward_routing(model, x.flip(0))
        alone = [forward_routing(model, x[index : index + 1]) for index in range(6)]
    torch.testing.assert_close(reversed_.flip(0), together, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.cat([logits for logits, _ in alone]), together, rtol=0, atol=1e-12
    )
    for place, routing in enumerate(routings):
        for name_of in ("expert_index", "kept"):
            parts = torch.cat([getattr(single[place], name_of) for _, single in alone])
            assert torch.equal(parts, getattr(routing, name_of))
    assert (together - plain).abs().max() > 1e-6
    assert torch.equal(model(x), plain)


def test_rankings_compose_in_order_of_entry():
    """Force 4 and then swap 4 and 1: all go to 1. Swap and then force 4: all go to 4."""
    layer, x = make_layer(), tokens()
    with force(layer, 0, 4), swap(layer, 0, 4, 1):
        assert (routed(layer, x)[1].expert_index[..., 0] == 1).all()
    with swap(layer, 0, 4, 1), force(layer, 0, 4):
        assert (routed(layer, x)[1].expert_index[..., 0] == 4).all()


def test_conditions_hold_inside_and_outside():
    """An ablated expert stays away and no expert exceeds its capacity, whatever is entered when."""
    layer, x = make_layer(), tokens()
    changes = [
        Intervention("ablate", layer=0, expert=2),
        Intervention("random", seed=1),
        Intervention("top_k", top_k=3),
        Intervention("capacity", factor=1.0),
    ]
    results = []
    for order in (changes, changes[::-1], changes[1:] + changes[:1]):
        with intervene(layer, *order):
            results.append(routed(layer, x)[1])
    for routing in results:
        loads = torch.stack(
            [
                (routing.expert_index[image])[routing.kept[image]].bincount(minlength=6)
                for image in range(3)
            ]
        )
        assert routing.top_k == 3
        assert loads[:, 2].sum() == 0
        assert loads.max() == 5  # ceil(9 · 3 / 6)
        assert torch.equal(routing.expert_index, results[0].expert_index)
        assert torch.equal(routing.kept, results[0].kept)


def test_training_works_under_an_intervention():
    """Noise included: the gates have gradients, the ablated expert has none."""
    layer = make_layer().train()
    with ablate(layer, 0, 2):
        layer(tokens()).square().sum().backward()
    gradient = layer.experts.fc1.weight.grad
    assert not gradient[2].any()
    assert gradient[3].any()
    assert layer.router.weight.grad.any()


def test_an_exception_restores_the_layer():
    model, x = make_model(), images(1)
    expected = model(x)
    with pytest.raises(RuntimeError), ablate(model, 1, 0), force(model, 3, 1):
        model(torch.randn(1, 5, 32, 32, dtype=torch.float64))  # five channels
    with ablate(model, 1, 0):
        outer = model(x)
        with pytest.raises(UserError), force(model, 3, 1), force(model, 3, 99):
            pass
        assert torch.equal(model(x), outer)
    assert all(layer.intervention is None for layer in moe_layers(model))
    assert torch.equal(model(x), expected)
    with ThreadPoolExecutor(1) as thread:  # the lock is free again
        thread.submit(forward_routing, model, x).result(WAIT_S)


def test_other_threads_wait_or_see_no_intervention():
    """While this thread holds an ablation a plain forward pass runs without it; recording and intervening wait."""
    model, x = make_model(), images(1)
    expected, away = model(x), busiest(model, 1)

    def intervening() -> Tensor:
        with force(model, 3, 1):
            return model(x)

    forced = intervening()
    with ThreadPoolExecutor(3) as threads:
        with ablate(model, 1, away):
            ablated = model(x)
            assert torch.equal(threads.submit(model, x).result(WAIT_S), expected)
            waiting = [
                threads.submit(intervening),
                threads.submit(lambda: forward_routing(model, x)[0]),
            ]
            assert not wait(waiting, 0.4, FIRST_COMPLETED).done
            assert torch.equal(model(x), ablated)
        assert torch.equal(waiting[0].result(WAIT_S), forced)
        assert torch.equal(waiting[1].result(WAIT_S), expected)
    assert not torch.equal(ablated, expected)


def test_copies_pickles_and_state_dicts_know_nothing_of_it():
    layer, x = make_layer(), tokens()
    expected, names = layer(x), list(layer.state_dict())
    with ablate(layer, 0, 2):
        copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
        assert list(layer.state_dict()) == names
    for twin in copies:
        assert twin.intervention is None
        assert torch.equal(twin(x), expected)


@pytest.mark.deep
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # the compiler looks at it after a graph break
def test_compiled_code_obeys_without_being_compiled_again():
    compilations: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        compilations.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    layer, x = make_layer(), tokens()
    plain, _ = routed(layer, x)
    expected = []
    for expert in range(6):
        with ablate(layer, 0, expert, "zero"):
            expected.append(routed(layer, x)[0])
    layer.compile(backend=backend)
    torch.testing.assert_close(routed(layer, x)[0], plain)
    with ablate(layer, 0, 0):
        routed(layer, x)  # from here on sizes of groups are dynamic
    graphs = len(compilations)
    assert graphs > 0
    for expert in range(6):
        with ablate(layer, 0, expert, "zero"):
            torch.testing.assert_close(routed(layer, x)[0], expected[expert])
        torch.testing.assert_close(routed(layer, x)[0], plain)
    assert len(compilations) == graphs
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "value",
    [
        {"kind": "ablate", "layer": 1, "expert": 2, "fill": "zero"},
        {"kind": "force", "layer": 1, "expert": 2},
        {"kind": "swap", "layer": 1, "expert": 2, "other": 3},
        {"kind": "random", "layer": None, "seed": 7},
        {"kind": "top_k", "layer": None, "top_k": 1},
        {"kind": "capacity", "layer": 3, "factor": 1.25},
    ],
)
def test_json_says_what_belongs_to_the_kind(value):
    assert Intervention(**value).to_json() == value
