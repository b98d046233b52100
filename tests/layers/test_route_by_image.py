"""Routing by image against its definition in plain torch, in float64: pool, choose once, run the choice on all tokens.

`oracle` has neither dispatch, nor `Routing`, nor a token axis in anything that it decides, and shares no line with the
layer. In training both draw the same noise: one number per image and expert.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moevision.layers import (
    ROUTERS,
    MoEMlp,
    Routing,
    forward_routing,
    record_routing,
    update_router_bias,
)
from moevision.losses import (
    AuxLoss,
    AuxLossWeights,
    importance_loss,
    load_balancing_loss,
    load_loss,
    z_loss,
)

IMAGES, TOKENS, WIDTH, HIDDEN, EXPERTS = 6, 5, 7, 4, 5
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
    (
        "vmoe_top_k",
        {
            "top_k": 1,
            "capacity_factor": 0.9,
            "eval_capacity_factor": 0.7,
            "capacity_group": "batch",
        },
    ),
    (
        "noisy_top_k",
        {
            "top_k": 2,
            "capacity_factor": 0.7,
            "eval_capacity_factor": 0.7,
            "capacity_group": "batch",
        },
    ),
    (
        "sigmoid",
        {
            "top_k": 2,
            "capacity_factor": 0.7,
            "eval_capacity_factor": 0.9,
            "capacity_group": "batch",
            "batch_priority": True,
        },
    ),
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


class Decided(NamedTuple):
    """What the oracle decides about images; it knows no tokens."""

    logits: Tensor  # [B, E] clean
    noisy: Tensor  # [B, E] what the choice is made on
    std: Tensor | None  # [B, E]
    probs: Tensor  # [B, E]
    index: Tensor  # [B, K]
    gate: Tensor  # [B, K]
    kept: Tensor  # [B, K]


def decide(layer: MoEMlp, x: Tensor) -> Decided:
    """The routers' definitions (docs/reference/routers.md) on the mean token [B, D]."""
    router, name, training = layer.router, layer.router_name, layer.training
    pooled = x.sum(1) / x.shape[1]
    noise = router.noise if training else "none"
    if noise == "jitter":
        pooled = pooled * torch.empty_like(pooled).uniform_(0.99, 1.01)
    if name == "cosine":
        query = pooled @ router.proj.weight.T + router.proj.bias
        key = router.expert_embedding
        cosine = query @ key.T / query.norm(dim=-1, keepdim=True) / key.norm(dim=-1)
        logits = cosine * router.temperature.exp().clamp(max=100)
    else:
        logits = pooled @ router.weight.T
    std = None
    if noise == "learned":
        std = F.softplus(pooled @ router.noise_weight.T)
    elif noise == "fixed":
        std = torch.full_like(logits, 1 / EXPERTS)
    noisy = logits if std is None else logits + torch.randn_like(logits) * std
    k = router.top_k
    asked = router.options.normalize_gates
    if name in ("sigmoid", "bias_balanced"):
        affinity = logits.sigmoid()
        noisy = affinity if router.bias is None else affinity + router.bias
        index = noisy.topk(k).indices
        raw = affinity.gather(-1, index)
        gate = raw / raw.sum(-1, keepdim=True) if k > 1 else raw
        probs = affinity / affinity.sum(-1, keepdim=True)
    else:
        index = noisy.topk(k).indices
        raw = noisy.softmax(-1).gather(-1, index)
        after = asked if asked is not None else name == "noisy_top_k" and k > 1
        gate = raw / raw.sum(-1, keepdim=True) if after else raw
        probs = logits.softmax(-1)
    return Decided(logits, noisy, std, probs, index, gate, within(layer, index, raw))


def within(layer: MoEMlp, index: Tensor, raw: Tensor) -> Tensor:
    """The capacity of the batch in images: first choices before second ones, surer images first if asked."""
    options, kept = layer.router.options, torch.ones_like(index, dtype=torch.bool)
    factor = options.capacity_factor if layer.training else options.eval_capacity_factor
    if factor is None:
        return kept
    room = [math.ceil(factor * IMAGES * index.shape[1] / EXPERTS)] * EXPERTS
    order = list(range(len(index)))
    if options.batch_priority:
        order.sort(key=lambda image: -float(raw[image].detach().max()))
    for rank in range(index.shape[1]):
        for image in order:
            expert = int(index[image, rank])
            kept[image, rank] = room[expert] > 0
            room[expert] -= 1
    return kept


def mlp(layer: MoEMlp, expert: int, tokens: Tensor) -> Tensor:
    """One expert on tokens [N, D]."""
    fc1, fc2 = layer.experts.fc1, layer.experts.fc2
    return F.linear(
        F.gelu(F.linear(tokens, fc1.weight[expert], fc1.bias[expert])),
        fc2.weight[expert],
        fc2.bias[expert],
    )


def oracle(layer: MoEMlp, x: Tensor) -> tuple[Tensor, Decided]:
    """Output [B, N, D] and decision: every chosen expert computes all tokens of its image."""
    decided = decide(layer, x)
    rows = []
    for image, tokens in enumerate(x):
        out = torch.zeros_like(tokens)
        for rank in range(decided.index.shape[1]):
            if decided.kept[image, rank]:
                out = out + decided.gate[image, rank] * mlp(
                    layer, int(decided.index[image, rank]), tokens
                )
        rows.append(out if layer.shared is None else out + layer.shared(tokens))
    return torch.stack(rows), decided


def cv2(sums: Tensor) -> Tensor:
    return sums.var(correction=0) / sums.mean() ** 2


def oracle_losses(decided: Decided) -> dict[str, Tensor]:
    """The balance losses over images (arXiv:1701.06538, eq. 6-11; 2101.03961, eq. 4-6; 2202.08906, eq. 5)."""
    one_hot = F.one_hot(decided.index, EXPERTS)  # [B, K, E]
    used = (one_hot * (decided.gate * decided.kept).unsqueeze(-1)).sum((0, 1))
    share = one_hot.sum((0, 1)).double() / decided.index.numel()
    losses = {
        "importance": cv2(used),
        "load_balancing": EXPERTS * (share * decided.probs.mean(0)).sum(),
        "z": decided.logits.logsumexp(-1).square().mean(),
    }
    if decided.std is not None:
        load, k = torch.zeros(EXPERTS, dtype=torch.float64), decided.index.shape[1]
        for expert in range(EXPERTS):
            others = torch.cat([decided.noisy[:, :expert], decided.noisy[:, expert + 1 :]], -1)
            threshold = others.sort(descending=True).values[:, k - 1]
            chance = torch.special.ndtr(
                (decided.logits[:, expert] - threshold) / decided.std[:, expert]
            )
            load = load + F.one_hot(torch.tensor(expert), EXPERTS) * chance.sum()
        losses["load"] = cv2(load)
    return losses


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
def test_the_layer_is_the_oracle(
    router: str, options: dict[str, Any], training: bool, backend: str
) -> None:
    layer, x = make(router, options, backend).train(training), images().requires_grad_()
    torch.manual_seed(7)
    expected, decided = oracle(layer, x)
    torch.manual_seed(7)
    out, (routing,) = forward_routing(layer, x)

    close = {"rtol": 1e-10, "atol": 1e-11}
    torch.testing.assert_close(out, expected, **close)
    for name, per_image in zip(
        ("logits", "noisy_logits", "probs", "expert_index", "combine_weight", "kept"),
        (decided.logits, decided.noisy, decided.probs, decided.index, decided.gate, decided.kept),
        strict=True,
    ):
        theirs = per_image.unsqueeze(1).expand(-1, TOKENS, -1)
        torch.testing.assert_close(
            getattr(routing, name), theirs, msg=lambda text, name=name: f"{name}: {text}", **close
        )
    losses, theirs = our_losses(routing), oracle_losses(decided)
    assert losses.keys() == theirs.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(
            loss, theirs[name], msg=lambda text, name=name: f"{name}: {text}", **close
        )
    ours = gradients(layer, x, out, losses)
    for name, gradient in gradients(layer, x, expected, theirs).items():
        torch.testing.assert_close(
            ours[name], gradient, rtol=1e-9, atol=1e-10, msg=lambda t, name=name: f"{name}: {t}"
        )
    active = [
        name for name in ours if name.startswith("router") and (training or "noise" not in name)
    ]
    assert all(ours[name].abs().max() > 1e-6 for name in active), (
        "a router that doesn't act would test nothing"
    )


@pytest.mark.parametrize(("router", "options"), CASES, ids=IDS)
def test_views_and_counts(router: str, options: dict[str, Any]) -> None:
    """Weights [B, N, E] for the views; a count in choices is N times that in images."""
    layer, x = make(router, options).eval(), images()
    decided = decide(layer, x)
    routing = forward_routing(layer, x)[1][0]
    assert (routing.route_by, routing.kind) == ("image", "token_choice")
    weights, counts, requested = (
        torch.zeros(IMAGES, EXPERTS, dtype=torch.float64) for _ in range(3)
    )
    for image, rank in torch.ones_like(decided.index).nonzero().tolist():
        expert = int(decided.index[image, rank])
        kept = float(decided.kept[image, rank])
        weights[image, expert] = decided.gate[image, rank] * kept
        counts[image, expert], requested[image, expert] = kept, 1
    torch.testing.assert_close(
        routing.expert_weights(), weights.unsqueeze(1).expand(-1, TOKENS, -1)
    )
    assert routing.expert_weights().shape == (IMAGES, TOKENS, EXPERTS)
    assert routing.image_counts().tolist() == (TOKENS * counts).tolist()
    assert routing.counts().tolist() == (TOKENS * counts.sum(0)).tolist()
    assert routing.requested_counts().tolist() == (TOKENS * requested.sum(0)).tolist()
    if options.get("eval_capacity_factor"):
        assert 0 < counts.sum() < requested.sum(), (
            "a capacity that drops nothing would test nothing"
        )


def test_every_learned_token_choice_router_is_here_and_no_other() -> None:
    assert set(BY_IMAGE) == {name for name, _ in CASES}
    assert set(BY_IMAGE) == {
        "noisy_top_k",
        "vmoe_top_k",
        "switch",
        "sigmoid",
        "bias_balanced",
        "cosine",
    }


@pytest.mark.parametrize("router", BY_IMAGE)
def test_an_image_does_not_depend_on_its_batch_mates(router: str) -> None:
    layer, x = make(router, {}).eval(), images()
    together, (routing,) = forward_routing(layer, x)
    alone, (own,) = forward_routing(layer, x[2:3])
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-14)
    assert torch.equal(routing.expert_index[2:3], own.expert_index)


@pytest.mark.parametrize("router", BY_IMAGE)
def test_token_is_the_default(router: str) -> None:
    by_token, asked = (
        make(router, {}, route_by=None).eval(),
        make(router, {}, route_by="token").eval(),
    )
    out, (routing,) = forward_routing(by_token, images())
    assert torch.equal(out, asked(images()))
    assert routing.route_by == "token"
    different = make(router, {}).eval()
    assert not torch.allclose(out, different(images()))


def test_one_image_of_one_token_is_routed_alike_by_both() -> None:
    x = images()[:, :1]
    for router in BY_IMAGE:
        by_token, by_image = make(router, {}, route_by="token").eval(), make(router, {}).eval()
        torch.testing.assert_close(by_token(x), by_image(x), rtol=0, atol=1e-14)


def test_the_mean_is_taken_in_float32() -> None:
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


def test_noise_is_drawn_once_per_image() -> None:
    layer = make("noisy_top_k", {}).train()
    routing = forward_routing(layer, images())[1][0]
    assert torch.equal(routing.noisy_logits, routing.noisy_logits[:, :1].expand(-1, TOKENS, -1))
    assert not torch.equal(routing.noisy_logits, routing.logits)
    twins = images()[:1].expand(2, -1, -1)
    noisy = forward_routing(layer, twins)[1][0].noisy_logits
    assert not torch.equal(noisy[0], noisy[1]), "but not once per batch"


def test_the_bias_moves_as_it_would_by_images() -> None:
    layer, by_hand = make("bias_balanced", {}).train(), make("bias_balanced", {})
    routing = forward_routing(layer, images())[1][0]
    update_router_bias(layer, [routing.counts()])
    update_router_bias(
        by_hand, [torch.bincount(routing.expert_index[:, 0].flatten(), minlength=EXPERTS)]
    )
    assert torch.equal(layer.router.bias, by_hand.router.bias)


def test_two_micro_batches_have_the_statistic_of_the_whole() -> None:
    """The value of a window is the value over all its images (`AuxLoss`)."""
    layer, x = make("vmoe_top_k", {"noise": "none"}).train(), images()
    whole, parts = AuxLoss(AuxLossWeights(importance=1.0)), AuxLoss(AuxLossWeights(importance=1.0))
    expected = whole([forward_routing(layer, x)[1][0]])[0]
    parts([forward_routing(layer, x[:2])[1][0]])
    torch.testing.assert_close(parts([forward_routing(layer, x[2:])[1][0]])[0], expected)


def test_recorded_routing_is_detached_and_copied_as_any() -> None:
    layer = make("noisy_top_k", {})
    with record_routing(layer) as routings:
        layer(images())
    assert not routings[0].detach().combine_weight.requires_grad
    assert routings[0].detach().route_by == "image"
    torch.testing.assert_close(copy.deepcopy(layer).eval()(images()), layer.eval()(images()))
