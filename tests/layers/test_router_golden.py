"""Routers and capacity where `oracles.py` doesn't go: starts, steps, ties, extremes, derived by hand beside them.

The experts are linear: expert e multiplies its input by e + 1, so that an output shows which experts were mixed with
which weights. A linear router has the identity as its weight: the token is its own logits.
"""

import math

import pytest
import torch

from moevision.layers import MoEMlp, update_router_bias, within_capacity
from tests.layers.linear_experts import close, run, times_e_plus_1, tokens

X = tokens([4.0, 2.0, 1.0]).log()  # softmax: 4/7, 2/7, 1/7


@pytest.mark.parametrize(
    ("router", "expected"),
    [
        *((name, [4 / 7, 2 / 7, 1 / 7]) for name in ("noisy_top_k", "vmoe_top_k", "switch")),
        *((name, [24 / 59, 20 / 59, 15 / 59]) for name in ("sigmoid", "bias_balanced")),
    ],
)
def test_probabilities(router, expected):
    """A softmax, or shares of the sigmoids 4/5, 2/3, 1/2."""
    close(run(times_e_plus_1(router, 3), X)[1].probs, [[expected]])


def test_sigmoids_too_small_for_a_float_still_share_the_weight():
    """Far below 0 a sigmoid is an exponential. Those of -800, -800 - ln 3 and -900 stand as 3 : 1 : 0."""
    x = tokens([-800.0, -800 - math.log(3), -900.0])
    out, routing = run(times_e_plus_1("sigmoid", 3, top_k=2), x)
    close(routing.combine_weight, [[[3 / 4, 1 / 4]]])
    close(routing.probs, [[[3 / 4, 1 / 4, 0]]])
    close(out, 5 / 4 * x)  # 3/4 · 1 + 1/4 · 2


def test_bias_step():
    """Counts 6, 2, 1 of mean 3: signs of mean - count are -1, 1, 1, of mean 1/3; re-centred -4/3, 2/3, 2/3, times γ.

    Counts 4, 3, 2 have the signs -1, 0, 1, which need no re-centring; equal counts change nothing.
    """
    layer = times_e_plus_1("bias_balanced", 3, top_k=2)
    assert layer.router.bias.tolist() == [0.0, 0.0, 0.0]
    steps = {
        (6, 2, 1): [-4 / 3, 2 / 3, 2 / 3],
        (4, 3, 2): [-1.0, 0.0, 1.0],
        (3, 3, 3): [0.0, 0.0, 0.0],
    }
    expected = torch.zeros(3, dtype=torch.float64)
    for counts, step in steps.items():
        update_router_bias(layer, [torch.tensor(counts)])
        expected += 1e-3 * torch.tensor(step, dtype=torch.float64)
        close(layer.router.bias.double(), expected, 1e-9)  # eps of float32 at 1e-3 is 1e-10
    fast = times_e_plus_1("bias_balanced", 3, top_k=2, bias_rate=0.5)
    update_router_bias(fast, [torch.tensor([6, 2, 1])])
    close(fast.router.bias.double(), [-2 / 3, 1 / 3, 1 / 3], 1e-6)


def cosine_layer(temperature: float, **options: object) -> MoEMlp:
    layer = times_e_plus_1("cosine", 3, 2, **options)
    with torch.no_grad():
        layer.router.proj.weight.copy_(torch.eye(2))
        layer.router.proj.bias.zero_()
        layer.router.expert_embedding.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.5], [-2.0, 0.0]]))
        layer.router.temperature.fill_(temperature)
    return layer


def test_cosine_starts_at_temperature_2_and_is_clamped_at_100():
    """Tutel: init_t = 0.5, so exp(temperature) = 2 at the start, and never more than 100 in use."""
    layer = MoEMlp(2, 2, dtype=torch.float64, num_experts=3, router="cosine")
    close(layer.router.temperature.exp(), torch.full_like(layer.router.temperature, 2.0))
    for temperature, scale in ((math.log(99), 99.0), (math.log(1000), 100.0)):
        routing = run(cosine_layer(temperature, top_k=2), tokens([5.0, 0.0]))[1]
        close(routing.logits, [[[scale, 0.0, -scale]]], 1e-9)


def test_expert_choice_normalised_where_a_weight_is_too_small_for_a_float():
    """Expert 2's softmax is 0 for all tokens; it takes the first, which then gets 0, not 0/0."""
    x = tokens([0, 5, -900], [9, 0, -900], [0, 9, -900])
    out, routing = run(times_e_plus_1("expert_choice", 3, top_k=1, normalize_gates=True), x)
    assert routing.token_index.tolist() == [[[1], [2], [0]]]
    close(routing.token_weight, torch.tensor([[[1.0], [1.0], [0.0]]]))
    close(out, torch.tensor([0.0, 1.0, 2.0]).view(1, 3, 1) * x)


@pytest.mark.parametrize("normalize", [None, True])
def test_a_token_that_no_expert_takes_gets_nothing(normalize):
    """Tenths as above; token 0 is below two others for each expert: 0 takes 1 and 3, 1 takes 1 and 2, 2 takes 2 and 3.

    Nothing divides by its weight of 0: the gradient is finite too.
    """
    x = (tokens([40, 30, 30], [49, 40, 11], [10, 50, 40], [50, 9, 41]) / 100).log().requires_grad_()
    out, routing = run(times_e_plus_1("expert_choice", 3, top_k=1, normalize_gates=normalize), x)
    assert [sorted(chosen) for chosen in routing.token_index[0].tolist()] == [
        [1, 3],
        [1, 2],
        [2, 3],
    ]
    assert out[0, 0].tolist() == [0.0, 0.0, 0.0]
    out.square().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_expert_choice_takes_earlier_tokens_of_equal_ones():
    """Six equal tokens, C = ceil(6 · 1 / 4) = 2: every expert takes tokens 0 and 1."""
    routing = run(
        times_e_plus_1("expert_choice", 4, top_k=1), torch.ones(1, 6, 4, dtype=torch.float64)
    )[1]
    assert routing.token_index.tolist() == [[[0, 1]] * 4]


def test_soft_starts_at_scale_1_and_survives_a_zero_token():
    """rsqrt(|x|² + 1e-6) of a zero token is 1000, its logits are 0: it takes all slots alike."""
    layer = MoEMlp(
        4, 4, dtype=torch.float64, num_experts=3, router="soft", slots_per_expert=2
    ).eval()
    assert float(layer.router.scale.detach()) == 1.0
    x = torch.zeros(1, 2, 4, dtype=torch.float64, requires_grad=True)
    out, routing = run(layer, x)
    close(routing.slot_weight, torch.full((1, 2, 3, 2), 1 / 6, dtype=torch.float64))
    close(routing.dispatch_weight, torch.full((1, 2, 3, 2), 1 / 2, dtype=torch.float64))
    out.sum().backward()
    assert torch.isfinite(x.grad).all()


# ---- capacity and shared experts

# Four tokens that all prefer expert 0 of 2, with probabilities .6, .9, .7, .8.
CROWD = tokens([6, 4], [9, 1], [7, 3], [8, 2]).log()


def test_capacity_has_a_factor_for_training_and_one_for_evaluation():
    """`eval_capacity_factor=None` is dropless, whatever training does."""
    layer = times_e_plus_1("vmoe_top_k", 2, top_k=1, capacity_factor=0.5, noise="none")
    assert run(layer, CROWD)[1].counts().tolist() == [4, 0]
    assert run(layer.train(), CROWD)[1].counts().tolist() == [1, 0]  # ceil(.5 · 4 / 2)
    both = times_e_plus_1(
        "vmoe_top_k", 2, top_k=1, capacity_factor=0.5, eval_capacity_factor=1.5, noise="none"
    )
    assert run(both, CROWD)[1].counts().tolist() == [3, 0]
    assert run(both.train(), CROWD)[1].counts().tolist() == [1, 0]


def test_shared_experts_are_one_dense_mlp_of_their_width():
    layer = MoEMlp(8, 6, num_experts=4, top_k=2, num_shared_experts=3)
    assert (layer.shared.fc1.in_features, layer.shared.fc1.out_features) == (8, 18)
    assert (layer.shared.fc2.in_features, layer.shared.fc2.out_features) == (18, 8)
    assert MoEMlp(8, 6, num_experts=4).shared is None


@pytest.mark.parametrize("priority", [False, True])
@pytest.mark.parametrize("whole_batch", [False, True])
def test_choices_that_were_dropped_before_take_no_room(priority, whole_batch):
    """All four want expert 0 of 2, which computes C = ceil(1 · 4 / 2) = 2; without the first one the next two fit."""
    kept = torch.tensor([[[False], [True], [True], [True]]])
    left = within_capacity(
        torch.zeros(1, 4, 1, dtype=torch.int64),
        torch.tensor([[[0.9], [0.8], [0.7], [0.6]]]),
        kept,
        num_experts=2,
        factor=1.0,
        priority=priority,
        whole_batch=whole_batch,
    )
    assert left.flatten().tolist() == [False, True, True, False]
