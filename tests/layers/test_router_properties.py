"""What every router promises, whatever its rule: independence, order, room, precision, copies."""

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moevision.layers import ROUTERS, MoEMlp, Routing, record_routing, update_router_bias
from tests.layers.linear_experts import run

WIDTH, EXPERTS = 8, 4
LAYER_ROUTERS = [
    name for name in ROUTERS if name != "colour"
]  # which needs a picture: test_handmade_routers.py
TOKEN_CHOICE = ["noisy_top_k", "vmoe_top_k", "switch", "sigmoid", "bias_balanced", "cosine"]
LEARNED = [*TOKEN_CHOICE, "expert_choice", "soft"]
CAPPED = {"capacity_factor": 0.8, "eval_capacity_factor": 0.8, "batch_priority": True}


def make(router: str, dtype: torch.dtype = torch.float64, **options: Any) -> MoEMlp:
    """A layer in eval mode with a router away from its start."""
    torch.manual_seed(0)
    layer = MoEMlp(WIDTH, 12, dtype=dtype, **{"num_experts": EXPERTS, "router": router, **options})
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(std=1.0 if name.startswith("router") else 0.3)
    return layer.eval()


def randn(*shape: int, seed: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    ("router", "options"),
    [*((name, {}) for name in LAYER_ROUTERS), *((name, CAPPED) for name in TOKEN_CHOICE)],
)
def test_an_image_does_not_depend_on_its_batch_mates(router, options):
    """Exact in float64."""
    layer, x = make(router, **options), randn(6, 17, WIDTH)
    torch.testing.assert_close(layer(x)[:2], layer(x[:2]), rtol=0, atol=1e-14)


def test_capacity_of_the_batch_does_depend_on_batch_mates():
    """What the default protects from, and the reason why it must be asked for."""
    layer, x = make("vmoe_top_k", **CAPPED, capacity_group="batch"), randn(6, 17, WIDTH)
    assert not torch.allclose(layer(x)[:2], layer(x[:2]))


@pytest.mark.parametrize("router", LAYER_ROUTERS)
def test_evaluation_is_deterministic_and_draws_no_random_number(router):
    layer, x = make(router), randn(3, 17, WIDTH)
    state = torch.get_rng_state()
    first = layer(x)
    assert torch.equal(first, layer(x))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("router", "options"),
    [*((name, {}) for name in LEARNED), *((name, CAPPED) for name in TOKEN_CHOICE)],
)
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(9)))
def test_tokens_may_come_in_any_order(router, options, order):
    """f(x[perm]) = f(x)[perm]: a learned router looks at content only. (By position in the image, others don't.)"""
    layer, x = make(router, **options), randn(2, 9, WIDTH)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], rtol=1e-12, atol=1e-13)


@settings(max_examples=60, deadline=None)
@given(
    router=st.sampled_from(TOKEN_CHOICE),
    k=st.integers(1, EXPERTS),
    factor=st.floats(0.1, 2.0),
    priority=st.booleans(),
    group=st.sampled_from(["image", "batch"]),
    tokens=st.integers(1, 12),
)
def test_an_expert_is_full_before_it_drops_anything(router, k, factor, priority, group, tokens):
    """In every group: kept = min(requested, capacity), the better choices of a token first."""
    k = 1 if router == "switch" else k
    layer = make(
        router, top_k=k, eval_capacity_factor=factor, batch_priority=priority, capacity_group=group
    )
    routing = run(layer, randn(3, tokens, WIDTH, seed=tokens))[1]
    assert int(routing.requested_counts().sum()) == 3 * tokens * k
    index, kept = routing.expert_index, routing.kept
    if group == "batch":
        index, kept = index.flatten(0, 1).unsqueeze(0), kept.flatten(0, 1).unsqueeze(0)
    for members, stay in zip(index, kept, strict=True):
        capacity = math.ceil(round(factor * len(members) * k / EXPERTS, 9))
        for expert in range(EXPERTS):
            asked = members == expert
            assert int((asked & stay).sum()) == min(int(asked.sum()), capacity)
            ranks = asked.nonzero()[:, 1]
            if stay[asked].any() and not stay[asked].all():
                assert ranks[stay[asked]].max() <= ranks[~stay[asked]].min()


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("router", LAYER_ROUTERS)
def test_a_decision_is_well_formed(router, k):
    """Different experts, the largest weight first, nothing negative, probabilities that sum to 1, weights at most 1."""
    k = 1 if router == "switch" else k
    layer = make(router, top_k=k).train()
    with record_routing(layer) as routings:
        layer(randn(3, 17, WIDTH))
    routing = routings[0].detach()
    assert (
        routing.logits.shape
        == routing.noisy_logits.shape
        == routing.probs.shape
        == (3, 17, EXPERTS)
    )
    ranked = routing.expert_index.sort(-1).values
    assert (ranked.diff(dim=-1) > 0).all()
    weights = routing.combine_weight
    assert (weights >= 0).all()
    if routing.kind != "expert_choice":  # where every expert counts on its own
        assert (routing.expert_weights().sum(-1) <= 1 + 1e-12).all()
    if router != "bias_balanced":  # best by s + b, which the start leaves at s; see the golden test
        assert (weights.diff(dim=-1) <= 1e-12).all()
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(3, 17, dtype=torch.float64))
    assert int(routing.counts().sum()) == expected_rows(routing, k)


def expected_rows(routing: Routing, k: int) -> int:
    """Rows of 3 images of 17 tokens: K each; experts that choose take ceil(17 K / E) each; one slot per expert."""
    if routing.kind == "expert_choice":
        return 3 * EXPERTS * math.ceil(17 * k / EXPERTS)
    return 3 * EXPERTS if routing.kind == "soft" else 3 * 17 * k


@pytest.mark.parametrize("router", TOKEN_CHOICE)
def test_gates_are_the_recorded_weights(router):
    """`gates` is what interventions compute another k with; for the router's own k it must give its own weights."""
    layer = make(router).train()
    routing = run(layer, randn(2, 9, WIDTH))[1]
    logits = layer.router.gate_logits(routing)
    gates = layer.router.gates(logits, logits.gather(-1, routing.expert_index))
    torch.testing.assert_close(gates, routing.combine_weight)


@pytest.mark.parametrize("router", LEARNED)
def test_bf16_autocast_leaves_the_decision_in_float32(router):
    layer, x = make(router, torch.float32), randn(4, 33, WIDTH, dtype=torch.float32)
    plain = run(layer, x)[1]
    with torch.autocast("cpu", torch.bfloat16):
        out, routing = run(layer, x)
    assert out.dtype is torch.bfloat16
    for name in ("logits", "noisy_logits", "probs", "combine_weight"):
        assert getattr(routing, name).dtype is torch.float32, name
        assert torch.equal(getattr(routing, name), getattr(plain, name)), name
    assert torch.equal(routing.expert_index, plain.expert_index)


@pytest.mark.parametrize("router", LEARNED)
def test_gradients_reach_every_parameter_of_the_router_in_training(router):
    layer = make(router).train()
    run(layer, randn(2, 9, WIDTH))[0].square().sum().backward()
    for name, parameter in layer.router.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.norm() > 1e-6, name


@pytest.mark.parametrize("router", LAYER_ROUTERS)
def test_copies_pickles_and_state_dicts_compute_the_same(router):
    layer, x = make(router), randn(2, 17, WIDTH)
    if router == "bias_balanced":
        update_router_bias(layer, [torch.tensor([5, 0, 0, 1])])
    fresh = MoEMlp(WIDTH, 12, dtype=torch.float64, num_experts=EXPERTS, router=router).eval()
    fresh.load_state_dict(layer.state_dict())
    twins = [copy.deepcopy(layer), pickle.load(io.BytesIO(pickle.dumps(layer))), fresh]
    for twin in twins:
        assert torch.equal(twin(x), layer(x))
