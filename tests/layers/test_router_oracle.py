"""Output and gradients of the MoE layer against the NumPy transcription in `oracles.py`, for every router.

Gradients are compared with the transcription's central differences, so that nothing of autograd is on their side.
Choices are made by sorting; the inputs keep every margin far above the step, so no choice flips within it.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from moevision.layers import (
    ROUTERS,
    MoEMlp,
    moe_layers,
)
from moevision.models.config import MoEConfig, build_model
from moevision.train.recipe import shipped_configs
from tests.layers import oracles
from tests.layers.linear_experts import run
from tests.layers.oracles import Array, Choice, Params, Slots, Taken

IMAGES, TOKENS, WIDTH, HIDDEN, EXPERTS = 2, 5, 6, 4, 4
Decide = Callable[[Array, Params], Choice | Taken | Slots]


class Case(NamedTuple):
    """A router with options, and the transcription's decision for it."""

    router: str
    options: dict[str, object]
    decide: Decide


def softmax_case(router: str, k: int, *, normalise: bool = False, **options: object) -> Case:
    return Case(
        router,
        {"top_k": k, **options},
        lambda x, p: oracles.linear_softmax(x, p, k, normalise=normalise),
    )


def capacity_case(
    k: int,
    factor: float,
    *,
    priority: bool = False,
    group: str = "image",
    normalise: bool = False,
    **shared: int,
) -> Case:
    def decide(x: Array, p: Params) -> Choice:
        choice = oracles.linear_softmax(x, p, k, normalise=normalise)
        sureness = oracles.softmax(x @ p["router.weight"].T).max(-1) if priority else None
        return oracles.fill(choice, EXPERTS, factor, group=group, sureness=sureness)

    options = {
        "top_k": k,
        "eval_capacity_factor": factor,
        "batch_priority": priority,
        "capacity_group": group,
        **shared,
    }
    return Case("noisy_top_k" if normalise else "vmoe_top_k", options, decide)


def sigmoid_capacity_case(k: int, factor: float) -> Case:
    def decide(x: Array, p: Params) -> Choice:
        sureness = oracles.sigmoid(x @ p["router.weight"].T).max(-1)
        return oracles.fill(
            oracles.sigmoid_top_k(x, p, k), EXPERTS, factor, group="image", sureness=sureness
        )

    return Case(
        "sigmoid", {"top_k": k, "eval_capacity_factor": factor, "batch_priority": True}, decide
    )


CASES = {
    "noisy, k=1": softmax_case("noisy_top_k", 1),
    "noisy, k=2": softmax_case("noisy_top_k", 2, normalise=True),
    "noisy, not normalised": softmax_case("noisy_top_k", 3, normalize_gates=False),
    "vmoe, k=2": softmax_case("vmoe_top_k", 2),
    "vmoe, all": softmax_case("vmoe_top_k", EXPERTS),
    "vmoe, normalised": softmax_case("vmoe_top_k", 2, normalise=True, normalize_gates=True),
    "switch": Case("switch", {}, lambda x, p: oracles.linear_softmax(x, p, 1, normalise=False)),
    "sigmoid, k=1": Case("sigmoid", {"top_k": 1}, lambda x, p: oracles.sigmoid_top_k(x, p, 1)),
    "sigmoid, k=3": Case("sigmoid", {"top_k": 3}, lambda x, p: oracles.sigmoid_top_k(x, p, 3)),
    "bias balanced, k=2": Case(
        "bias_balanced", {"top_k": 2}, lambda x, p: oracles.sigmoid_top_k(x, p, 2)
    ),
    "bias balanced, k=1": Case(
        "bias_balanced", {"top_k": 1}, lambda x, p: oracles.sigmoid_top_k(x, p, 1)
    ),
    "cosine, k=2": Case("cosine", {"top_k": 2}, lambda x, p: oracles.cosine_top_k(x, p, 2)),
    "expert choice, k=1": Case(
        "expert_choice", {"top_k": 1}, lambda x, p: oracles.expert_choice(x, p, 1)
    ),
    "expert choice, k=2": Case(
        "expert_choice", {"top_k": 2}, lambda x, p: oracles.expert_choice(x, p, 2)
    ),
    "expert choice, normalised": Case(
        "expert_choice",
        {"top_k": 2, "normalize_gates": True},
        lambda x, p: oracles.expert_choice(x, p, 2, normalise=True),
    ),
    "soft, P=1": Case("soft", {"slots_per_expert": 1}, oracles.soft),
    "soft, P=3": Case("soft", {"slots_per_expert": 3}, oracles.soft),
    "capacity": capacity_case(2, 0.8),
    "capacity and shared": capacity_case(1, 0.6, num_shared_experts=1),
    "capacity, priority": capacity_case(2, 0.8, priority=True),
    "capacity of the batch": capacity_case(2, 0.7, group="batch"),
    "capacity of the batch, priority": capacity_case(2, 0.7, priority=True, group="batch"),
    "capacity, priority, normalised": capacity_case(2, 0.4, priority=True, normalise=True),
    "capacity, priority, sigmoid": sigmoid_capacity_case(2, 0.4),
    "shared expert": softmax_case("vmoe_top_k", 2, num_shared_experts=2),
    "soft and shared": Case("soft", {"slots_per_expert": 2, "num_shared_experts": 1}, oracles.soft),
}
NO_TRANSCRIPTION = {
    "hash",
    "random",
    "position",
    "colour",
}  # no formula: see test_router_properties.py


def make(case: Case, backend: str = "loop") -> MoEMlp:
    """A float64 layer in eval mode, all of whose parameters and buffers are away from their start."""
    torch.manual_seed(0)
    layer = MoEMlp(
        WIDTH,
        HIDDEN,
        dtype=torch.float64,
        num_experts=EXPERTS,
        router=case.router,
        backend=backend,
        **case.options,
    )
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(std=1.0 if name.startswith("router") else 0.5)
    if case.router == "bias_balanced":
        layer.router.bias.copy_(torch.tensor([0.3, -0.2, 0.0, -0.1]))
    return layer.eval()


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(IMAGES, TOKENS, WIDTH, dtype=torch.float64, generator=generator)


def params_of(layer: MoEMlp) -> Params:
    """Copies of all parameters and buffers, under their names."""
    return {
        name: value.detach().double().numpy().copy() for name, value in layer.state_dict().items()
    }


def test_every_router_has_a_transcription():
    assert {case.router for case in CASES.values()} | NO_TRANSCRIPTION == set(ROUTERS)


@pytest.mark.parametrize("backend", ["loop", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_output(name, backend):
    layer, x = make(CASES[name], backend), inputs()
    params = params_of(layer)
    decision = CASES[name].decide(x.numpy(), params)
    if name.startswith("capacity"):
        assert 2 <= (~decision.kept).sum() <= 14, "it would test nothing that the others don't"
    expected = oracles.layer_output(x.numpy(), params, decision)
    torch.testing.assert_close(layer(x).detach(), torch.tensor(expected), rtol=1e-10, atol=1e-11)


@pytest.mark.whole  # every router is touched by `pytest`
@pytest.mark.parametrize("name", CASES)
def test_decision(name):
    """What is recorded is what was decided, and it agrees with the common view that everything downstream reads."""
    layer, x = make(CASES[name]), inputs()
    decision, routing = CASES[name].decide(x.numpy(), params_of(layer)), run(layer, x)[1].detach()
    weights = np.zeros((IMAGES, TOKENS, EXPERTS))
    counts = np.zeros(EXPERTS, dtype=int)
    if isinstance(decision, Choice):
        np.testing.assert_array_equal(routing.expert_index, decision.index)
        np.testing.assert_array_equal(routing.kept, decision.kept)
        np.testing.assert_allclose(routing.combine_weight, decision.weight, rtol=1e-10)
        for place in zip(*np.nonzero(decision.kept), strict=True):
            weights[(*place[:2], decision.index[place])] = decision.weight[place]
            counts[decision.index[place]] += 1
    elif isinstance(decision, Taken):
        np.testing.assert_array_equal(routing.token_index, decision.token_index)
        np.testing.assert_allclose(routing.token_weight, decision.weight, rtol=1e-10)
        for image, expert, rank in np.ndindex(*decision.weight.shape):
            weights[image, decision.token_index[image, expert, rank], expert] = decision.weight[
                image, expert, rank
            ]
            counts[expert] += 1
    else:
        np.testing.assert_allclose(routing.dispatch_weight, decision.dispatch, rtol=1e-10)
        np.testing.assert_allclose(routing.slot_weight, decision.combine, rtol=1e-10)
        weights = decision.combine.sum(-1)
        counts[:] = IMAGES * decision.combine.shape[-1]
    np.testing.assert_allclose(routing.expert_weights(), weights, rtol=1e-10)
    np.testing.assert_array_equal(routing.counts(), counts)


def differentiable(layer: MoEMlp) -> dict[str, Tensor]:
    """Parameters that act in eval mode (learned noise does not)."""
    return {name: value for name, value in layer.named_parameters() if "noise" not in name}


@pytest.mark.parametrize("backend", ["loop", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_gradients(name, backend):
    """d(Σ direction · output) / d(x and every parameter) against central differences of the transcription."""
    layer, x = make(CASES[name], backend), inputs().requires_grad_()
    direction = torch.randn(
        x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    (layer(x) * direction).sum().backward()
    params, image, weight = params_of(layer), x.detach().numpy().copy(), direction.numpy()
    names = list(differentiable(layer))

    def value() -> float:
        return float(
            (oracles.layer_output(image, params, CASES[name].decide(image, params)) * weight).sum()
        )

    expected = oracles.central_differences(value, [image, *(params[key] for key in names)])
    actual = [x.grad, *(differentiable(layer)[key].grad for key in names)]
    for key, ours, theirs in zip(["x", *names], actual, expected, strict=True):
        ours = np.zeros(theirs.shape) if ours is None else ours.numpy()
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=2e-8, err_msg=key)
        assert np.abs(theirs).max() > 1e-3, f"{key} does not act: the test would see nothing"


@pytest.mark.parametrize(
    "router", ["noisy_top_k", "vmoe_top_k", "switch", "sigmoid", "bias_balanced"]
)
def test_a_gate_of_value_1_has_the_gradient_of_the_probability(router):
    """Of the gates of k = 1 with respect to the router, as they are and normalised."""
    gradients = []
    for normalize in (False, True):
        options = {"top_k": 1, "normalize_gates": normalize}
        layer = make(Case(router, options, oracles.soft))
        gate = run(layer, inputs())[1].combine_weight
        assert bool((gate == 1).all()) == normalize
        scale = torch.arange(1.0, 1 + TOKENS, dtype=torch.float64).view(1, -1, 1)
        gradients += torch.autograd.grad((gate * scale).sum(), layer.router.weight)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    assert gradients[0].norm() > 0.1


def test_the_config_moe_vie_is_its_router():
    """arXiv:2608.17402: one shared expert, and the 4 best of 32 by s + b, weighted by s / Σ s, s = sigmoid(W x)."""
    arch = yaml.safe_load(shipped_configs()["moe_vie"].read_text(encoding="utf-8"))["model"]["arch"]
    layers = moe_layers(build_model(MoEConfig(**arch), 2, 64))
    assert [layer.layer_index for layer in layers] == [1, 2, 3]
    layer = layers[0]
    assert (layer.router_name, layer.num_shared_experts) == ("bias_balanced", 1)
    assert (layer.router.num_experts, layer.router.top_k) == (32, 4)
    assert layer.router.options.non_default() == {}
