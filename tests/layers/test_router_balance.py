"""What balances a router: its losses over the pieces of a batch, and the bias that moves instead of a loss."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

from moevision.layers import (
    ROUTERS,
    ExpertChoiceRouting,
    MoEMlp,
    Routing,
    build_router,
    update_router_bias,
)
from moevision.losses import AuxLossWeights, Balance
from tests.layers.linear_experts import run

WIDTH, EXPERTS = 8, 4
PAIRS = [
    (router, loss)
    for router in ROUTERS
    for loss in sorted(build_router(router, WIDTH, EXPERTS, None).losses)
]


def images(routing: Routing, start: int, stop: int) -> Routing:
    """Images start to stop of a decision, of whatever kind."""
    tensors = {field.name: getattr(routing, field.name) for field in fields(routing)}
    batch = routing.logits.shape[0]
    parts = {
        n: x[start:stop]
        for n, x in tensors.items()
        if isinstance(x, Tensor) and x.shape[:1] == (batch,)
    }
    return replace(routing, **parts)


def decision(router: str) -> Routing:
    """Of 12 images of 9 tokens, in training mode."""
    torch.manual_seed(0)
    module = build_router(router, WIDTH, EXPERTS, None, dtype=torch.float64)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    routing: Routing = module(torch.randn(12, 9, WIDTH, dtype=torch.float64))
    return routing


@pytest.mark.parametrize(("router", "loss"), PAIRS)
def test_two_micro_batches_have_the_statistic_of_their_batch(router, loss):
    """The second one's value is that of all 12 images; the first one's is that of its own 5."""
    whole = decision(router)
    off = dict.fromkeys(("importance", "load", "load_balancing", "z"), 0.0)
    layer = MoEMlp(WIDTH, 8, num_experts=EXPERTS, router=router)
    balance = Balance(layer, AuxLossWeights(**{**off, loss: 1.0}))
    expected = balance.loss([whole])
    balance.start_window()
    first, second = (balance.loss([images(whole, *part)]) for part in ((0, 5), (5, 12)))
    torch.testing.assert_close(second, expected)
    assert not torch.allclose(first, expected)


def test_routers_that_need_no_loss_have_none():
    """Balance is by construction, by the bias, or nobody's concern; every default can be supplied."""
    for name in ROUTERS:
        router = build_router(name, WIDTH, EXPERTS, None)
        assert router.default_losses.keys() <= router.losses, name
        needs_none = name not in ("noisy_top_k", "vmoe_top_k", "switch", "sigmoid", "cosine")
        assert (router.default_losses == {}) is needs_none, name
        if name in ("switch", "sigmoid"):
            assert router.default_losses == {"load_balancing": 0.05}


def balanced_layer(**options: float) -> MoEMlp:
    torch.manual_seed(0)
    return MoEMlp(WIDTH, 8, num_experts=EXPERTS, top_k=2, router="bias_balanced", **options)


def test_the_bias_is_a_persistent_float32_buffer_without_gradient():
    for dtype in (torch.bfloat16, torch.float64):
        layer = MoEMlp(WIDTH, 8, num_experts=EXPERTS, router="bias_balanced", dtype=dtype)
        assert layer.router.bias.dtype is torch.float32
        assert "router.bias" in layer.state_dict()
        assert "router.bias" not in dict(layer.named_parameters())
    assert "router.bias" not in MoEMlp(WIDTH, 8, router="sigmoid").state_dict()


@pytest.mark.parametrize("training", [True, False])
def test_only_update_router_bias_moves_the_bias(training):
    """Not a forward or backward pass, nor an optimizer step, however unbalanced the load is."""
    layer = balanced_layer().train(training)
    start = torch.tensor([0.4, -0.1, -0.1, -0.2])
    layer.router.bias.copy_(start)
    out, routing = run(layer, torch.randn(4, 9, WIDTH))
    assert routing.counts().max() > routing.counts().min()
    out.square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert torch.equal(layer.router.bias, start)


def test_counts_belong_to_layers():
    """One tensor per MoE layer, in order; a layer without a bias takes part in the numbering only."""
    layers = nn.Sequential(
        balanced_layer(), MoEMlp(WIDTH, 8, num_experts=EXPERTS, router="switch"), balanced_layer()
    )
    counts = [torch.tensor(c) for c in ([4, 2, 2, 0], [9, 0, 0, 0], [0, 2, 2, 4])]
    update_router_bias(layers, counts)
    torch.testing.assert_close(layers[0].router.bias, torch.tensor([-1e-3, 0, 0, 1e-3]))
    torch.testing.assert_close(layers[2].router.bias, torch.tensor([1e-3, 0, 0, -1e-3]))


def test_the_bias_balances_a_skewed_router():
    """Tokens with a common direction send nearly all to two experts; 500 steps of 0.002 spread them, without a loss."""
    layer, x = balanced_layer(bias_rate=0.002).eval(), torch.randn(8, 64, WIDTH) + 1.0
    with torch.no_grad():
        layer.router.weight.copy_(
            torch.tensor([[0.5], [0.4], [-0.2], [-0.4]]) + 0.3 * torch.randn(EXPERTS, WIDTH)
        )
        before = run(layer, x)[1].counts().float()
        for _ in range(500):
            update_router_bias(layer, [run(layer, x)[1].requested_counts()])
        after = run(layer, x)[1].counts().float()
    assert before.max() / before.mean() > 1.5
    assert after.max() / after.mean() < 1.05


def test_expert_choice_view_is_best_first_for_small_weights_too():
    """Both experts took the token, with 1e-9 and 1e-8: a difference that 1 + w does not have in float32."""
    logits = torch.zeros(1, 1, 2)
    weight = torch.tensor([[[1e-9], [1e-8]]])
    routing = ExpertChoiceRouting.of(
        logits, logits, None, torch.zeros(1, 2, 1, dtype=torch.int64), weight
    )
    assert routing.expert_index.tolist() == [[[1, 0]]]
    assert routing.kept.tolist() == [[[True, True]]]


def test_expert_choice_view_has_taken_experts_first_even_of_weight_0():
    """A weight can underflow; expert 2 took the token all the same, experts 0 and 1 did not."""
    logits = torch.zeros(1, 2, 3)
    index = torch.tensor([[[1], [1], [0]]])
    weight = torch.tensor([[[0.5], [0.4], [0.0]]])
    routing = ExpertChoiceRouting.of(logits, logits, None, index, weight)
    assert routing.expert_index[0, 0, 0] == 2
    assert routing.kept.tolist() == [[[True, False, False], [True, True, False]]]
    assert routing.counts().tolist() == [1, 1, 1]


def test_the_bias_stays_in_float32():
    """In bfloat16 steps of 1e-3 are lost beside a bias of .5."""
    counts = torch.tensor([70, 10, 10, 10])
    layers = [MoEMlp(8, 8, num_experts=4, router="bias_balanced", bias_rate=1e-3) for _ in range(2)]
    layers[1].to(torch.bfloat16)
    for layer in layers:
        for _ in range(1000):
            update_router_bias(layer, [counts])
    first, second = (layer.router.bias for layer in layers)
    assert second.dtype == torch.float32
    assert torch.equal(first, second)
    assert layers[1].router.weight.dtype == torch.bfloat16
    assert layers[1](torch.randn(1, 3, 8, dtype=torch.bfloat16)).isfinite().all()
