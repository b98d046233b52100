"""Every router on numbers that were derived by hand; the derivations stand beside them.

The experts are linear: expert e multiplies its input by e + 1, so that an output shows which experts were mixed with
which weights. A linear router has the identity as its weight: the token is its own logits.
"""

from __future__ import annotations

import math

import pytest
import torch

from moevision.layers import ExpertChoiceRouting, MoEMlp, SoftRouting, update_router_bias
from tests.layers.linear_experts import close, run, times_e_plus_1, tokens

X = tokens([4.0, 2.0, 1.0]).log()  # softmax: 4/7, 2/7, 1/7
S = tokens([math.log(4), 0.0, -math.log(4)])  # sigmoid: 4/5, 1/2, 1/5


def test_switch() -> None:
    """arXiv:2101.03961, eq. 1-2: the best expert with its full-softmax probability 4/7; the output is 4/7 · 1 · x."""
    layer = times_e_plus_1("switch", 3)
    out, routing = run(layer, X)
    assert (layer.router.top_k, routing.expert_index.tolist(), routing.kept.tolist()) == (
        1,
        [[[0]]],
        [[[True]]],
    )
    close(routing.combine_weight, [[[4 / 7]]])
    close(routing.probs, [[[4 / 7, 2 / 7, 1 / 7]]])
    close(out, 4 / 7 * X)


def test_switch_is_top_1_without_noise_and_with_its_own_loss() -> None:
    layer = times_e_plus_1("switch", 3).train()
    assert run(layer, X)[1].noise_std is None
    assert layer.router.default_losses == {"load_balancing": 0.05}
    assert "load_balancing" in layer.router.losses


@pytest.mark.parametrize(
    ("k", "index", "weights", "factor"),
    [
        (1, [0], [4 / 5], 4 / 5),  # one choice keeps s itself
        (2, [0, 1], [8 / 13, 5 / 13], 18 / 13),  # .8 and .5 over 1.3; 8/13 · 1 + 5/13 · 2
        (3, [0, 1, 2], [8 / 15, 5 / 15, 2 / 15], 24 / 15),  # over 1.5; (8 + 10 + 6) / 15
    ],
)
def test_sigmoid(k: int, index: list[int], weights: list[float], factor: float) -> None:
    out, routing = run(times_e_plus_1("sigmoid", 3, top_k=k), S)
    assert routing.expert_index.tolist() == [[index]]
    close(routing.combine_weight, [[weights]])
    close(routing.probs, [[[8 / 15, 5 / 15, 2 / 15]]])
    close(out, factor * S)


def test_sigmoids_too_small_for_a_float_still_share_the_weight() -> None:
    """Far below 0 a sigmoid is an exponential. Those of -800, -800 - ln 3 and -900 stand as 3 : 1 : 0."""
    x = tokens([-800.0, -800 - math.log(3), -900.0])
    out, routing = run(times_e_plus_1("sigmoid", 3, top_k=2), x)
    close(routing.combine_weight, [[[3 / 4, 1 / 4]]])
    close(routing.probs, [[[3 / 4, 1 / 4, 0]]])
    close(out, 5 / 4 * x)  # 3/4 · 1 + 1/4 · 2


def test_a_sigmoid_can_be_large_for_all_experts() -> None:
    """Unlike a softmax, an affinity knows nothing of the others: raising one score leaves the weight of k = 1."""
    layer = times_e_plus_1("sigmoid", 3, top_k=1)
    close(run(layer, tokens([math.log(4), math.log(3), math.log(3)]))[1].combine_weight, [[[0.8]]])
    assert layer.router.default_losses == {"load_balancing": 0.05}


def test_bias_balanced_chooses_by_s_plus_b_and_weighs_by_s() -> None:
    """s = .8, .5, .2 and b = 0, 0, .4: the choice is made on .8, .5, .6, the weights of 0 and 2 are .8 and .2 over 1.

    DeepSeek-V3 (arXiv:2412.19437, §2.1.2). A router that weighed by s + b would give 8/14 and 6/14.
    """
    layer = times_e_plus_1("bias_balanced", 3, top_k=2)
    layer.router.bias.copy_(torch.tensor([0.0, 0.0, 0.4]))
    out, routing = run(layer, S)
    assert routing.expert_index.tolist() == [[[0, 2]]]
    close(routing.combine_weight, [[[0.8, 0.2]]])
    close(routing.noisy_logits, [[[0.8, 0.5, 0.6]]], 1e-7)  # the bias is float32
    close(routing.probs, [[[8 / 15, 5 / 15, 2 / 15]]])
    close(out, (0.8 * 1 + 0.2 * 3) * S)
    layer.router.bias.copy_(torch.tensor([0.0, 0.0, 0.7]))
    assert run(layer, S)[1].expert_index.tolist() == [
        [[2, 0]]
    ]  # .9 before .8: best first is by s + b
    assert layer.router.default_losses == {}


def test_bias_step() -> None:
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


# Two tokens of one image; their mean is (log 4, log 2, log 1), whose softmax is 4/7, 2/7, 1/7.
PAIR = tokens([math.log(4) - 1, math.log(2) + 1, 0.5], [math.log(4) + 1, math.log(2) - 1, -0.5])


def test_an_image_decides_once_by_the_mean_of_its_tokens() -> None:
    """Switch: both tokens go to expert 0 with 4/7. By token the first goes to 1: log 2 + 1 > log 4 - 1."""
    assert run(times_e_plus_1("switch", 3), PAIR)[1].expert_index.tolist() == [[[1], [0]]]
    out, routing = run(times_e_plus_1("switch", 3, route_by="image"), PAIR)
    assert routing.expert_index.tolist() == [[[0], [0]]]
    close(routing.combine_weight, [[[4 / 7], [4 / 7]]])
    close(out, 4 / 7 * PAIR)


def cosine_layer(temperature: float, **options: object) -> MoEMlp:
    layer = times_e_plus_1("cosine", 3, 2, **options)
    with torch.no_grad():
        layer.router.proj.weight.copy_(torch.eye(2))
        layer.router.proj.bias.zero_()
        layer.router.expert_embedding.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.5], [-2.0, 0.0]]))
        layer.router.temperature.fill_(temperature)
    return layer


@pytest.mark.parametrize("length", [5.0, 0.01])
def test_cosine(length: float) -> None:
    """A token along (1, 0) and experts along (1, 0), (0, 1), (-1, 0): cosines 1, 0, -1, whatever the lengths.

    With exp(temperature) = ln 4 the logits are ln 4, 0, -ln 4: softmax 4, 1, 1/4 over 21/4 = 16/21, 4/21, 1/21. Not
    renormalised, the output is (16/21 · 1 + 4/21 · 2) x = 24/21 x.
    """
    x = tokens([length, 0.0])
    out, routing = run(cosine_layer(math.log(math.log(4)), top_k=2), x)
    assert routing.expert_index.tolist() == [[[0, 1]]]
    close(routing.logits, [[[math.log(4), 0.0, -math.log(4)]]])
    close(routing.combine_weight, [[[16 / 21, 4 / 21]]])
    close(out, 24 / 21 * x)


def test_cosine_starts_at_temperature_2_and_is_clamped_at_100() -> None:
    """Tutel: init_t = 0.5, so exp(temperature) = 2 at the start, and never more than 100 in use."""
    layer = MoEMlp(2, 2, dtype=torch.float64, num_experts=3, router="cosine")
    close(layer.router.temperature.exp(), torch.full_like(layer.router.temperature, 2.0))
    for temperature, scale in ((math.log(99), 99.0), (math.log(1000), 100.0)):
        routing = run(cosine_layer(temperature, top_k=2), tokens([5.0, 0.0]))[1]
        close(routing.logits, [[[scale, 0.0, -scale]]], 1e-9)


# softmax over E = 3 of four tokens, as tenths. C = ceil(4 · 1 / 3) = 2 tokens for each expert:
# expert 0 takes tokens 0 (.6), 1 (.5); expert 1 takes 2 (.7), 3 (.4); expert 2 takes 1 (.4), 3 (.3).
AFFINITY = tokens([6, 3, 1], [5, 1, 4], [2, 7, 1], [3, 4, 3]) / 10


def test_expert_choice() -> None:
    """arXiv:2202.09368, §3. Outputs: .6 · 1; .5 · 1 + .4 · 3 = 1.7; .7 · 2 = 1.4; .4 · 2 + .3 · 3 = 1.7, times x."""
    x = AFFINITY.log()
    out, routing = run(times_e_plus_1("expert_choice", 3, top_k=1), x)
    assert isinstance(routing, ExpertChoiceRouting)
    assert routing.token_index.tolist() == [[[0, 1], [2, 3], [1, 3]]]
    close(routing.token_weight, [[[0.6, 0.5], [0.7, 0.4], [0.4, 0.3]]])
    close(routing.expert_weights(), [[[0.6, 0, 0], [0.5, 0, 0.4], [0, 0.7, 0], [0, 0.4, 0.3]]])
    assert routing.counts().tolist() == [2, 2, 2]
    close(out, torch.tensor([0.6, 1.7, 1.4, 1.7], dtype=torch.float64).view(1, 4, 1) * x)
    assert routing.kept.sum(-1).tolist() == [[1, 2, 1, 2]]
    assert routing.expert_index[0, 1, :2].tolist() == [0, 2]  # the token view is best first
    close(routing.combine_weight[0, 3, :2], [0.4, 0.3])


def test_expert_choice_normalised() -> None:
    """Token 1 has .5 and .4 -> 5/9 and 4/9, token 3 has .4 and .3 -> 4/7 and 3/7, the others one weight of 1."""
    x = AFFINITY.log()
    out, routing = run(times_e_plus_1("expert_choice", 3, top_k=1, normalize_gates=True), x)
    close(routing.expert_weights(), [[[1, 0, 0], [5 / 9, 0, 4 / 9], [0, 1, 0], [0, 4 / 7, 3 / 7]]])
    factors = [1.0, 5 / 9 + 3 * 4 / 9, 2.0, 2 * 4 / 7 + 3 * 3 / 7]
    close(out, torch.tensor(factors, dtype=torch.float64).view(1, 4, 1) * x)


def test_expert_choice_normalised_where_a_weight_is_too_small_for_a_float() -> None:
    """Expert 2's softmax is 0 for all tokens; it takes the first, which then gets 0, not 0/0."""
    x = tokens([0, 5, -900], [9, 0, -900], [0, 9, -900])
    out, routing = run(times_e_plus_1("expert_choice", 3, top_k=1, normalize_gates=True), x)
    assert routing.token_index.tolist() == [[[1], [2], [0]]]
    close(routing.token_weight, torch.tensor([[[1.0], [1.0], [0.0]]]))
    close(out, torch.tensor([0.0, 1.0, 2.0]).view(1, 3, 1) * x)


@pytest.mark.parametrize("normalize", [None, True])
def test_a_token_that_no_expert_takes_gets_nothing(normalize: bool | None) -> None:
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


def test_expert_choice_takes_earlier_tokens_of_equal_ones() -> None:
    """Six equal tokens, C = ceil(6 · 1 / 4) = 2: every expert takes tokens 0 and 1."""
    routing = run(
        times_e_plus_1("expert_choice", 4, top_k=1), torch.ones(1, 6, 4, dtype=torch.float64)
    )[1]
    assert routing.token_index.tolist() == [[[0, 1]] * 4]


@pytest.mark.parametrize(
    ("num_tokens", "k", "num_experts", "capacity"),
    [(4, 1, 3, 2), (16, 2, 4, 8), (17, 2, 4, 9), (5, 4, 4, 5), (1, 1, 4, 1)],
)
def test_expert_choice_capacity(num_tokens: int, k: int, num_experts: int, capacity: int) -> None:
    """C = min(N, ceil(N k / E)): 4/3 -> 2, 8, 34/4 -> 9, never more than N, at least 1."""
    layer = times_e_plus_1("expert_choice", num_experts, top_k=k)
    routing = run(layer, torch.randn(2, num_tokens, num_experts, dtype=torch.float64))[1]
    assert routing.token_index.shape == (2, num_experts, capacity)
    assert routing.counts().tolist() == [2 * capacity] * num_experts


def test_soft() -> None:
    """Tokens a, b, a along the axes (1000 long, so that the epsilon of 1e-6 is no matter), mu along the axes.

    With scale = ln 3 the logits of slot 0 are ln 3, 0, ln 3 and those of slot 1 are 0, ln 3, 0.
    Dispatch, over tokens: slot 0 reads (3 a + b + 3 a) / 7, slot 1 reads (a + 3 b + a) / 5.
    Combine, over slots: token a takes 3/4 and 1/4, token b 1/4 and 3/4; expert 1 doubles.
    a: 3/4 (6a + b)/7 + 1/4 · 2 (2a + 3b)/5 = (9/14 + 1/5) a + (3/28 + 3/10) b
    b: 1/4 (6a + b)/7 + 3/4 · 2 (2a + 3b)/5 = (3/14 + 3/5) a + (1/28 + 9/10) b
    """
    layer = times_e_plus_1("soft", 2, slots_per_expert=1)
    with torch.no_grad():
        layer.router.mu.copy_(
            torch.tensor([[700.0, 0.0], [0.0, 4000.0]]).unsqueeze(-1)
        )  # [D, E, P]
        layer.router.scale.fill_(math.log(3))
    x = tokens([1000.0, 0.0], [0.0, 1000.0], [1000.0, 0.0])
    out, routing = run(layer, x)
    assert isinstance(routing, SoftRouting)
    close(
        routing.dispatch_weight[0, :, :, 0].T, [[3 / 7, 1 / 7, 3 / 7], [1 / 5, 3 / 5, 1 / 5]], 1e-9
    )
    close(routing.slot_weight[0, :, :, 0], [[3 / 4, 1 / 4], [1 / 4, 3 / 4], [3 / 4, 1 / 4]], 1e-9)
    a, b = [9 / 14 + 1 / 5, 3 / 28 + 3 / 10], [3 / 14 + 3 / 5, 1 / 28 + 9 / 10]
    close(out / 1000, [[a, b, a]], 1e-9)
    close(routing.expert_weights(), [[[3 / 4, 1 / 4], [1 / 4, 3 / 4], [3 / 4, 1 / 4]]], 1e-9)
    assert routing.expert_index.tolist() == [[[0, 1], [1, 0], [0, 1]]]
    assert routing.counts().tolist() == [1, 1]


def test_soft_starts_at_scale_1_and_survives_a_zero_token() -> None:
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


@pytest.mark.parametrize(
    ("router", "k", "expected"),
    [
        ("noisy_top_k", 1, [4 / 7]),  # one choice is never renormalised
        ("noisy_top_k", 2, [4 / 6, 2 / 6]),
        ("noisy_top_k", 3, [4 / 7, 2 / 7, 1 / 7]),
        ("vmoe_top_k", 1, [4 / 7]),
        ("vmoe_top_k", 2, [4 / 7, 2 / 7]),
        ("switch", 2, [4 / 7, 2 / 7]),
        ("cosine", 2, [4 / 7, 2 / 7]),
        ("sigmoid", 1, [4 / 5]),
        ("sigmoid", 2, [12 / 22, 10 / 22]),
        ("bias_balanced", 2, [12 / 22, 10 / 22]),
        ("hash", 2, [1 / 2, 1 / 2]),
        ("position", 3, [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_gates_of_another_k(router: str, k: int, expected: list[float]) -> None:
    """As an intervention asks, of logits ln 4, ln 2, 0: softmax 4/7, 2/7, 1/7; sigmoids 4/5, 2/3 = 12 : 10, and 1/2."""
    layer = times_e_plus_1(router, 3)
    close(layer.router.gates(X, X[..., :k]), [[expected]])
