"""Losses of routers against hand-derived numbers, an independent NumPy transcription, and their properties."""

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moevision.errors import UserError
from moevision.layers import MoEMlp, RouterOptions, Routing, build_router
from moevision.losses import (
    AuxLossWeights,
    Balance,
    importance_loss,
    label_loss,
    load_balancing_loss,
    load_loss,
    z_loss,
)

GATES = [[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]]
# The 3 x 3 example of V-MoE's own test suite: clean logits, noise, standard deviation 0.1, k = 2.
LOGITS = [[0.9, 0.06, 0.04], [0.7, 0.18, 0.12], [0.85, 0.05, 0.1]]
NOISE = [[-0.037, 0.026, -0.018], [-0.074, 0.045, -0.015], [-0.067, -0.059, 0.073]]


def routing_from(logits: Tensor, noise: Tensor, std: Tensor | float, top_k: int) -> Routing:
    """A decision on [T, E] scores as one image of T tokens."""
    noisy = (logits + noise).unsqueeze(0)
    top, index = noisy.topk(top_k, dim=-1)
    std = std.unsqueeze(0) if isinstance(std, Tensor) else logits.new_full((1, 1, 1), std)
    return Routing(
        logits=logits.unsqueeze(0),
        noisy_logits=noisy,
        probs=logits.unsqueeze(0).softmax(-1),
        noise_std=std,
        expert_index=index,
        combine_weight=top.softmax(-1),
        kept=torch.ones_like(index, dtype=torch.bool),
    )


def dense_gates(gates: list[list[float]]) -> Routing:
    """A decision whose gates and probabilities are the given numbers (every expert gets its gate)."""
    probs = torch.tensor(gates, dtype=torch.float64).unsqueeze(0)
    weights, index = probs.sort(dim=-1, descending=True, stable=True)
    kept = torch.ones_like(index, dtype=torch.bool)
    return Routing(probs, probs, probs, None, index, weights, kept)


def example() -> Routing:
    return routing_from(
        torch.tensor(LOGITS, dtype=torch.float64), torch.tensor(NOISE, dtype=torch.float64), 0.1, 2
    )


def balance(layers: int = 1, **weights: float) -> Balance:
    """Of layers with four experts, two per token; a loss without a weight here has none."""
    off = dict.fromkeys(("importance", "load", "load_balancing", "z"), 0.0)
    model = nn.ModuleList(MoEMlp(8, 8, num_experts=4) for _ in range(layers))
    return Balance(model, AuxLossWeights(**{**off, **weights}), num_classes=2)


def test_importance_golden():
    """Column sums 1.7, 1.1, 1.2: mean 4/3, squared deviations .1344, .0544, .0178 -> .0689 / 1.7778 = .03875."""
    for rule in ("shazeer", "vmoe"):
        assert float(importance_loss(dense_gates(GATES), rule)) == pytest.approx(0.03875)


def test_load_balancing_golden():
    """Top-1 counts 2, 0, 2 -> f = .5, 0, .5; P = .425, .275, .3; 3 (.2125 + 0 + .15) = 1.0875."""
    routing = dense_gates(GATES)
    first = {
        name: getattr(routing, name)[..., :1] for name in ("expert_index", "combine_weight", "kept")
    }
    assert float(load_balancing_loss(replace(routing, **first))) == pytest.approx(1.0875)


def test_load_golden():
    """The same input under both rules; V-MoE's own test suite has its number, .48573865 in float32."""
    assert float(load_loss(example())) == pytest.approx(0.144936, abs=1e-6)
    assert float(load_loss(example(), "vmoe")) == pytest.approx(0.485738, abs=1e-6)


@pytest.mark.parametrize("rule", ["shazeer", "vmoe"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_load_is_the_definition(rule, top_k):
    """Appendix A of arXiv:1701.06538, expert by expert: sort the others, take their k-th, evaluate the normal CDF."""
    rng = np.random.default_rng(0)
    logits, noise, std = (
        rng.normal(size=(9, 5)),
        rng.normal(size=(9, 5)),
        rng.uniform(0.1, 2, (9, 5)),
    )
    noisy = logits + noise * std
    load = np.zeros(5)
    for token in range(9):
        for expert in range(5):
            rivals = np.delete(noisy[token], expert) if rule == "shazeer" else noisy[token]
            threshold = np.sort(rivals)[::-1][top_k - 1]
            load[expert] += NormalDist().cdf(
                (logits[token, expert] - threshold) / std[token, expert]
            )
    routing = routing_from(
        torch.tensor(logits), torch.tensor(noise * std), torch.tensor(std), top_k
    )
    assert float(load_loss(routing, rule)) == pytest.approx(load.var() / load.mean() ** 2, rel=1e-9)


def test_z_loss_by_hand():
    """logsumexp of (ln 1, ln 1, ln 2) is ln 4, of (0, 0, 0) it is ln 3: the mean of their squares."""
    logits = torch.tensor([[1.0, 1.0, 2.0], [1.0, 1.0, 1.0]], dtype=torch.float64).log()
    routing = routing_from(logits, torch.zeros_like(logits), 1.0, 1)
    assert float(z_loss(routing)) == pytest.approx((np.log(4) ** 2 + np.log(3) ** 2) / 2)


def told(scores: list[list[float]], tokens: int = 5) -> Routing:
    """Images routed as a whole, so that their experts' shares of 1 are proportional to these numbers [B][E]."""
    logits = torch.tensor(scores, dtype=torch.float64).log().requires_grad_()
    index = torch.zeros(len(scores), 1, 1, dtype=torch.int64)
    one = torch.ones(len(scores), 1, 1, dtype=torch.float64)
    decision = Routing(
        logits.unsqueeze(1),
        logits.unsqueeze(1),
        logits.softmax(-1).unsqueeze(1),
        None,
        index,
        one,
        one.bool(),
    )
    return decision.for_tokens(tokens)


def test_label_loss_by_hand():
    """Four experts, the first two of class 0: shares of the classes are .3 and .7, then .625 and .375."""
    routing = told([[1, 2, 3, 4], [4, 1, 1, 2]])
    value = label_loss(routing, F.one_hot(torch.tensor([1, 0]), 2))
    assert value.item() == pytest.approx(-(np.log(0.7) + np.log(0.625)) / 2)
    mixed = label_loss(routing, torch.tensor([[0.25, 0.75], [1.0, 0.0]]))
    assert mixed.item() == pytest.approx(
        -(0.25 * np.log(0.3) + 0.75 * np.log(0.7) + np.log(0.625)) / 2
    )


def test_label_loss_of_tokens_is_their_mean():
    """One image of class 1, whose three tokens give that class .5, .75 and .9."""
    logits = torch.tensor([[1.0, 1.0], [1.0, 3.0], [1.0, 9.0]], dtype=torch.float64).log()
    routing = routing_from(logits, torch.zeros_like(logits), 1.0, 1)
    expected = -(np.log(0.5) + np.log(0.75) + np.log(0.9)) / 3
    assert float(label_loss(routing, F.one_hot(torch.tensor([1]), 2))) == pytest.approx(expected)


@pytest.mark.parametrize("route_by", ["token", "image"])
def test_micro_batches_have_the_label_loss_and_its_gradient_of_the_whole_batch(route_by):
    """As a function of two sums, as the z loss is: the last value is the batch's, and so is the sum of gradients."""
    torch.manual_seed(0)
    router = build_router(
        "vmoe_top_k", 8, 4, 1, dtype=torch.float64, options=RouterOptions(route_by=route_by)
    )
    whole = router(torch.randn(12, 5, 8, dtype=torch.float64))
    target = F.one_hot(torch.arange(12) // 3 % 2, 2)
    label_loss(whole, target).backward(retain_graph=True)
    expected = router.weight.grad.clone()
    for parts in (1, 2, 3, 4):
        router.zero_grad()
        told_classes, size = balance(label=1.0), 12 // parts
        for start in range(0, 12, size):
            part = slice(start, start + size)
            value = told_classes.loss([part_of(whole, part)], target[part])
            (value / parts).backward(retain_graph=True)
        assert value.item() == told_classes.values["label"].item()
        assert value.item() == pytest.approx(label_loss(whole, target).item())
        torch.testing.assert_close(router.weight.grad, expected)


def test_experts_that_no_class_can_share_are_refused():
    with pytest.raises(UserError, match=r"5 .* 8 experts .* multiple of 5"):
        Balance(MoEMlp(8, 8, num_experts=8), AuxLossWeights(label=0.1), num_classes=5)


@pytest.mark.parametrize("router", ["soft", "hash", "random", "position"])
def test_a_router_without_scores_that_learn_cannot_be_told_the_class(router):
    layer = MoEMlp(8, 8, num_experts=4, router=router)
    with pytest.raises(UserError, match=r"the label loss .* vmoe_top_k"):
        Balance(layer, AuxLossWeights(label=0.1), num_classes=2)


def test_balance_takes_the_labels_or_refuses_a_loss_of_them():
    Balance(MoEMlp(8, 8), AuxLossWeights(label=0.0))
    with pytest.raises(UserError, match="Balance num_classes"):
        Balance(MoEMlp(8, 8), AuxLossWeights(label=0.1))
    routing, target = told([[1, 2, 3, 4]]), F.one_hot(torch.tensor([1]), 2)
    assert balance(label=0.1).loss([routing], target) == 0.1 * label_loss(routing, target)


def test_routings_that_are_not_those_of_the_model_are_refused():
    """Nothing was recorded, or another model's layers; a dense model has none, and no loss."""
    layer = MoEMlp(8, 8, num_experts=4)
    layer(torch.randn(1, 3, 8))  # outside of record_routing
    with pytest.raises(UserError, match=r"recorded 0 of the model's 1 .* record_routing"):
        Balance(layer).loss([])
    with pytest.raises(UserError, match="recorded 1 of the model's 2 MoE layers"):
        balance(layers=2, z=1.0).loss([example()])
    with pytest.raises(UserError, match="recorded 1 of the model's 0 MoE layers"):
        Balance(nn.Linear(8, 8)).loss([example()])
    assert Balance(nn.Linear(8, 8)).loss([]) == 0


@pytest.mark.parametrize("loss", [importance_loss, load_loss, load_balancing_loss, z_loss])
def test_gradients_are_finite_at_perfect_balance(loss):
    """Each of three tokens prefers another expert; CV² is 0 there and its square root has no gradient."""
    logits = torch.eye(3, dtype=torch.float64, requires_grad=True)
    value = loss(routing_from(logits, torch.zeros(3, 3, dtype=torch.float64), 1.0, 1))  # type: ignore[operator]
    value.backward()
    assert torch.isfinite(logits.grad).all()


def test_vanishing_noise_keeps_gradients_finite():
    router = build_router("noisy_top_k", 4, 3, 1, dtype=torch.float64)
    nn.init.normal_(router.weight)
    nn.init.constant_(router.noise_weight, -500.0)  # softplus underflows to 0 for positive tokens
    load_loss(router(torch.rand(1, 6, 4, dtype=torch.float64))).backward()
    assert torch.isfinite(router.weight.grad).all()
    assert torch.isfinite(router.noise_weight.grad).all()


def test_noise_below_a_millionth_counts_as_a_millionth():
    """Two scores 5e-7 apart without noise: Φ(± .5) = .6915, .3085, CV² = (.1915 / .5)² = .1466; a step would have 1."""
    logits = torch.tensor([[0.0, -5e-7]], dtype=torch.float64)
    routing = routing_from(logits, torch.zeros_like(logits), 0.0, 1)
    assert float(load_loss(routing)) == pytest.approx(0.146631, abs=1e-6)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 4)])
def test_load_loss_is_zero_where_it_is_undefined(num_experts, top_k):
    routing = build_router("noisy_top_k", 8, num_experts, top_k)(torch.randn(2, 5, 8))
    assert float(load_loss(routing)) == 0.0


def test_uniform_routing_scores_one():
    """E Σ f P with f = P = 1/E is 1, whatever E and K."""
    logits = torch.zeros(4, 4, dtype=torch.float64)
    routing = routing_from(logits, torch.eye(4, dtype=torch.float64), 1.0, 1)
    assert float(load_balancing_loss(routing)) == pytest.approx(1.0)


def test_load_loss_needs_noise():
    routing = build_router("noisy_top_k", 8, 4, 2).eval()(torch.randn(2, 5, 8))
    with pytest.raises(UserError, match="training mode"):
        load_loss(routing)


def test_a_loss_that_the_router_cannot_supply_is_an_error_at_start():
    layer = MoEMlp(8, 8)
    Balance(layer, AuxLossWeights(load=0.1))
    layer.router.noise = "none"
    with pytest.raises(UserError, match=r"the load loss \(it has importance, "):
        Balance(layer, AuxLossWeights(load=0.1))


def test_the_loss_is_the_weighted_sum_of_layer_means():
    router = build_router("noisy_top_k", 8, 4, 2)
    layers = [router(torch.randn(2, 5, 8)) for _ in range(3)]
    both = balance(3, importance=0.1, z=0.01)
    total = both.loss(layers)
    importance = sum(importance_loss(layer).item() for layer in layers) / 3
    z = sum(z_loss(layer).item() for layer in layers) / 3
    assert both.values == {"importance": pytest.approx(importance), "z": pytest.approx(z)}
    assert total.item() == pytest.approx(0.1 * importance + 0.01 * z)


def test_no_weight_means_no_loss():
    router = build_router("noisy_top_k", 8, 4, 2)
    for losses, routings in (
        (balance(), [router(torch.randn(2, 5, 8))]),
        (balance(0, z=1.0), []),
    ):
        assert (losses.loss(routings), losses.values) == (0, {})


def accumulated_gradient(
    whole: Routing, name: str, parts: int, router: nn.Module
) -> tuple[Tensor, Tensor]:
    """Gradient of the router's parameters that a window of micro-batches, each divided by their number, adds up to.

    The noise is the whole batch's; beside it stands the last micro-batch's value.
    """
    losses, size = balance(**{name: 1.0}), len(whole.logits) // parts
    losses.loss([whole])  # of an earlier window
    losses.start_window()
    router.zero_grad()
    for start in range(0, size * parts, size):
        value = losses.loss([part_of(whole, slice(start, start + size))])
        (value / parts).backward(retain_graph=True)
    gradients = [p.grad.flatten() for p in router.parameters() if p.grad is not None]
    return torch.cat(gradients), value.detach()


@pytest.mark.parametrize("name", ["importance", "load", "load_balancing", "z"])
def test_micro_batches_that_are_alike_have_the_gradient_of_the_whole_window(name):
    """K copies of 3 images: without the factor m the gradient would be (1 + 1/2 + ... + 1/K) / K of it, .21 for 16."""
    router, x = random_router(), torch.randn(3, 5, 8, dtype=torch.float64)
    routing: Routing = router(x)
    expected, value = accumulated_gradient(routing, name, 1, router)
    for copies in range(2, 17):
        index = torch.arange(3).repeat(copies)
        found, last = accumulated_gradient(part_of(routing, index), name, copies, router)
        torch.testing.assert_close(found, expected, msg=f"{copies} micro-batches")
        torch.testing.assert_close(last, value)


@pytest.mark.parametrize("name", ["importance", "load", "load_balancing"])
def test_accumulated_gradient_is_about_that_of_the_whole_batch(name):
    """512 images of tokens with a common direction, so that experts are unbalanced, in up to 16 micro-batches.

    Its projection on the gradient of the whole batch; without the factor m it would fall to a fifth for 16.
    """
    router = random_router()
    whole: Routing = router(torch.randn(512, 16, 8, dtype=torch.float64) + 0.5)
    expected, _ = accumulated_gradient(whole, name, 1, router)
    for parts in (2, 4, 8, 16):
        found, _ = accumulated_gradient(whole, name, parts, router)
        assert 0.9 < float(found @ expected / expected.square().sum()) < 1.1, parts


def test_a_window_that_is_cut_short_counts_as_its_cross_entropy():
    """3 of 8 micro-batches, each divided by 8 as Lightning does: 3/8 of the gradient of those three alone."""
    router = random_router()
    three: Routing = router(torch.randn(12, 5, 8, dtype=torch.float64))
    losses = balance(z=1.0)
    for start in (0, 4, 8):
        value = losses.loss([part_of(three, slice(start, start + 4))])
        (value / 8).backward(retain_graph=True)
    found = router.weight.grad.clone()
    router.zero_grad()
    (z_loss(three) * 3 / 8).backward()
    torch.testing.assert_close(found, router.weight.grad)


def random_router() -> nn.Module:
    torch.manual_seed(0)
    router = build_router("noisy_top_k", 8, 4, 2, dtype=torch.float64)
    for parameter in router.parameters():
        nn.init.normal_(parameter)
    return router


def part_of(routing: Routing, images: slice | Tensor) -> Routing:
    """Some images of a decision."""
    tensors = {
        name: getattr(routing, name)[images]
        for name in ("logits", "noisy_logits", "probs", "expert_index", "combine_weight", "kept")
    }
    std = routing.noise_std
    return Routing(**tensors, noise_std=std if std is None or len(std) == 1 else std[images])
