"""Routing by image against its definition, in float64: the mean token decides once, and its choice runs on all tokens.

What the router decides about one token is tested in test_router_oracle.py. In training both sides draw the same noise:
one number per image and expert.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from moevision.layers import (
    ROUTERS,
    MoEMlp,
    Routing,
    forward_routing,
)
from moevision.losses import (
    importance_loss,
    load_balancing_loss,
    load_loss,
    z_loss,
)

IMAGES, TOKENS, WIDTH, HIDDEN, EXPERTS = 6, 5, 7, 4, 5


def capped(training: float, evaluation: float) -> dict[str, Any]:
    """Capacity factors; images share the capacity."""
    factors = {"capacity_factor": training, "eval_capacity_factor": evaluation}
    return {**factors, "capacity_group": "batch"}


BY_IMAGE = [name for name, kind in ROUTERS.items() if "route_by" in kind.options]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("noisy_top_k", {"top_k": 1}),
    ("noisy_top_k", {"top_k": 2}),
    ("noisy_top_k", {"top_k": 3, "normalize_gates": False}),
    ("noisy_top_k", {"top_k": 2, "noise": "fixed", "num_shared_experts": 1}),
    ("vmoe_top_k", {"top_k": 1}),
    ("vmoe_top_k", {"top_k": 2}),
    ("vmoe_top_k", {"top_k": 2, "normalize_gates": True}),
    ("switch", {}),
    ("switch", {"noise": "jitter"}),
    ("sigmoid", {"top_k": 1}),
    ("sigmoid", {"top_k": 3}),
    ("bias_balanced", {"top_k": 2}),
    ("cosine", {"top_k": 2}),
    ("vmoe_top_k", {"top_k": 1, **capped(0.9, 0.7)}),
    ("noisy_top_k", {"top_k": 2, **capped(0.7, 0.7)}),
    ("sigmoid", {"top_k": 2, **capped(0.7, 0.9), "batch_priority": True}),
]
IDS = [
    f"{name}, {', '.join(f'{key}={value}' for key, value in options.items())}"
    for name, options in CASES
]


def make(router: str, options: dict[str, Any], backend: str = "loop", **more: Any) -> MoEMlp:
    """A float64 layer all of whose parameters and buffers are away from their start."""
    torch.manual_seed(0)
    given = {"num_experts": EXPERTS, "route_by": "image", **options, **more}
    layer = MoEMlp(WIDTH, HIDDEN, dtype=torch.float64, router=router, backend=backend, **given)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(std=1.5 if name.startswith("router") else 0.5)
    if layer.router.__dict__.get("bias_rate"):
        layer.router.bias.copy_(torch.linspace(-0.2, 0.2, EXPERTS))
    return layer


def images(seed: int = 3) -> Tensor:
    return torch.randn(
        IMAGES, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def oracle(layer: MoEMlp, x: Tensor) -> tuple[Tensor, Routing]:
    """From a layer that routes tokens: its decisions [B, 1, ...] about mean tokens, and what they give all tokens."""
    decision = layer.router(x.sum(1, keepdim=True) / x.shape[1])
    outputs = layer.experts.on_all_tokens(x.flatten(0, 1)).unflatten(0, x.shape[:2])  # [B, N, E, D]
    mixed = (decision.expert_weights().unsqueeze(-1) * outputs).sum(2)
    return mixed if layer.shared is None else mixed + layer.shared(x), decision


def our_losses(routing: Routing) -> dict[str, Tensor]:
    losses = {
        "importance": importance_loss(routing),
        "load_balancing": load_balancing_loss(routing),
        "z": z_loss(routing),
    }
    return losses if routing.noise_std is None else {**losses, "load": load_loss(routing)}


def gradients(
    layer: MoEMlp, x: Tensor, out: Tensor, losses: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Of a fixed mixture of the output and all losses, with respect to x and every parameter."""
    direction = torch.randn(
        out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    total = (out * direction).sum() + sum(
        loss * (2 + place) for place, loss in enumerate(losses.values())
    )
    named = {"x": x, **dict(layer.named_parameters())}
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(named[name]) if g is None else g
        for name, g in zip(named, found, strict=True)
    }


@pytest.mark.parametrize("backend", ["loop", "dense"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("router", "options"), CASES, ids=IDS)
def test_the_layer_is_the_oracle(router, options, training, backend):
    x = images().requires_grad_()
    layer = make(router, options, backend).train(training)
    by_token = make(router, options, backend, route_by="token").train(training)
    torch.manual_seed(7)
    expected, decision = oracle(by_token, x)
    torch.manual_seed(7)
    out, (routing,) = forward_routing(layer, x)

    close = {"rtol": 1e-10, "atol": 1e-11}
    torch.testing.assert_close(out, expected, **close)
    for name in ("logits", "noisy_logits", "probs", "expert_index", "combine_weight", "kept"):
        theirs = getattr(decision, name).expand(-1, TOKENS, -1)
        torch.testing.assert_close(
            getattr(routing, name), theirs, msg=lambda text, name=name: f"{name}: {text}", **close
        )
    losses = our_losses(routing)
    torch.testing.assert_close(losses, our_losses(decision), **close)
    ours = gradients(layer, x, out, losses)
    theirs = gradients(by_token, x, expected, our_losses(decision))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    active = [
        name for name in ours if name.startswith("router") and (training or "noise" not in name)
    ]
    assert all(ours[name].abs().max() > 1e-6 for name in active), (
        "a router that doesn't act would test nothing"
    )


@pytest.mark.parametrize(("router", "options"), CASES, ids=IDS)
def test_views_and_counts(router, options):
    """Weights [B, N, E] for the views; a count in choices is N times that in images."""
    layer, by_token = make(router, options).eval(), make(router, options, route_by="token").eval()
    routing, decision = forward_routing(layer, images())[1][0], oracle(by_token, images())[1]
    assert (routing.route_by, routing.kind) == ("image", "token_choice")
    weights = decision.expert_weights().expand(IMAGES, TOKENS, EXPERTS)
    torch.testing.assert_close(routing.expert_weights(), weights)
    for name in ("image_counts", "counts", "requested_counts"):
        assert torch.equal(getattr(routing, name)(), TOKENS * getattr(decision, name)()), name
    if options.get("eval_capacity_factor"):
        assert 0 < decision.counts().sum() < decision.requested_counts().sum(), (
            "a capacity that drops nothing would test nothing"
        )


def test_every_learned_token_choice_router_is_here_and_no_other():
    assert set(BY_IMAGE) == {name for name, _ in CASES}
    learned = {"noisy_top_k", "vmoe_top_k", "switch", "sigmoid", "bias_balanced", "cosine"}
    assert set(BY_IMAGE) == learned


@pytest.mark.parametrize("router", BY_IMAGE)
def test_token_is_the_default(router):
    by_token, asked = (
        make(router, {}, route_by=None).eval(),
        make(router, {}, route_by="token").eval(),
    )
    out, (routing,) = forward_routing(by_token, images())
    assert torch.equal(out, asked(images()))
    assert routing.route_by == "token"
    different = make(router, {}).eval()
    assert not torch.allclose(out, different(images()))


def test_the_mean_is_taken_in_float32():
    """A thousand equal bfloat16 tokens have that token as their mean; a sum in bfloat16 would stop at 256 of them."""
    torch.manual_seed(0)
    layer = MoEMlp(
        WIDTH,
        HIDDEN,
        num_experts=EXPERTS,
        router="vmoe_top_k",
        route_by="image",
        dtype=torch.bfloat16,
    )
    token = torch.randn(1, 1, WIDTH, dtype=torch.bfloat16)
    many, one = (
        layer.eval().router(token.expand(1, count, WIDTH)).logits[:, 0] for count in (1000, 1)
    )
    assert many.dtype is torch.float32
    torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-6)
