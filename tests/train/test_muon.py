"""Muon against its definition, written once more, and AdamW where it should be AdamW."""

import math
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import timm
import torch
from torch import nn

from moevision import forward_routing
from moevision.layers import PackedLinear, moe_layers
from moevision.models.config import MoEConfig
from moevision.train.optim import (
    Muon,
    OptimizerConfig,
    build_optimizer,
    matrices_of,
    orthogonal,
    parameter_groups,
)
from moevision.train.task import ClassificationTask

ITERATIONS = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037))
ITERATIONS += ((2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012))


def by_definition(matrix: torch.Tensor) -> torch.Tensor:
    """The iterations on the singular values, each s -> a s + b s³ + c s⁵; the singular vectors stay."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / matrix.norm()
    for a, b, c in ITERATIONS:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


def maps(weight: torch.Tensor) -> list[torch.Tensor]:
    """The linear maps of a weight, one by one."""
    if weight.ndim == 4:
        return [weight.reshape(len(weight), -1)]
    return list(weight) if weight.ndim == 3 else [weight]


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16), (3, 12, 20)])
def test_orthogonal_is_the_nearest_orthogonal_matrix(shape):
    """U Vᵀ of the singular value decomposition; exactly the iterations' polynomial in float64."""
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(shape, generator=generator, dtype=torch.float64)
    found = orthogonal(matrices)
    torch.testing.assert_close(
        found, torch.stack([by_definition(m) for m in maps(matrices)]).reshape(shape)
    )
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    well = s / matrices.norm(dim=(-2, -1), keepdim=True)[..., 0] > 0.05
    values = torch.linalg.svdvals(found)
    assert ((values - 1).abs() < 0.15)[well].all()
    assert (found * (u @ vh)).sum() / found.norm() / (u @ vh).norm() > 0.98


class OnGpu(torch.Tensor):
    """A tensor that says so."""

    is_cuda = True


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_that_is_slow_in_bfloat16_multiplies_in_float32(fast, dtype, monkeypatch):
    """Those before Ampere emulate it."""
    seen = []
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: fast)
    monkeypatch.setattr(
        "moevision.train.optim.zeropower_via_newtonschulz",
        lambda x, *_, dtype: seen.append(dtype) or x,
    )
    orthogonal(torch.eye(3).as_subclass(OnGpu))
    assert seen == [dtype]


def test_products_in_bfloat16_point_where_those_in_float32_do():
    """bfloat16 has 8 bits: errors of 2⁻⁹ in each product. Muon multiplies so where it is told to, and nowhere else."""

    def updated(**options: bool) -> torch.Tensor:
        weight = nn.Parameter(torch.zeros(4, 12, 20))
        weight.grad = torch.randn(4, 12, 20, generator=torch.Generator().manual_seed(0))
        Muon([{"params": [weight], "matrices": True}], lr=0.1, **options).step()
        return weight.detach().flatten()

    exact, rounded = updated(), updated(bfloat16=True)
    assert torch.equal(updated(bfloat16=False), exact)
    assert not torch.equal(rounded, exact)
    assert nn.functional.cosine_similarity(rounded, exact, dim=0) > 0.999


@pytest.mark.parametrize(("precision", "bfloat16"), [("bf16-mixed", True), ("32-true", False)])
def test_a_training_in_bfloat16_says_so(precision, bfloat16):
    arch = MoEConfig(name="test_vit_moe")
    task = ClassificationTask(
        arch=arch, optim=OptimizerConfig("muon"), num_classes=3, image_size=32
    )
    with patch.object(
        ClassificationTask,
        "trainer",
        SimpleNamespace(precision=precision, estimated_stepping_batches=9),
    ):
        found = cast(Any, task.configure_optimizers())["optimizer"]
    assert found.bfloat16 is bfloat16


def model() -> nn.Module:
    torch.manual_seed(0)
    net = timm.create_model(
        "test_vit_moe", num_classes=3, stem="stages", router="vmoe_top_k", top_k=2
    ).double()
    for layer in moe_layers(net):
        nn.init.normal_(layer.router.weight)
    return net


def test_updates_follow_the_definition():
    """Three steps in float64: v = β v + (1 - β) g; w -= lr (λ w + 0.2 sqrt(max(out, in)) O(β v + (1 - β) g))."""
    net, twin = model(), model()
    lr, decay, beta = 3e-3, 0.1, 0.95
    optimizer, schedule = build_optimizer(
        net, OptimizerConfig("muon", lr=lr, weight_decay=decay), total_steps=9
    )
    names = matrices_of(net)
    decayed = {"head.weight", "patch_embed.backbone.0.0.conv.weight"}
    decayed |= {f"blocks.{block}.mlp.router.weight" for block in (1, 3)}
    rest = {name: p for name, p in twin.named_parameters() if name not in names}
    adamw = torch.optim.AdamW(
        [
            {"params": [rest[name] for name in sorted(decayed)], "weight_decay": decay},
            {"params": [p for name, p in rest.items() if name not in decayed], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(0.9, 0.99),
    )
    momentum = {name: torch.zeros_like(p) for name, p in twin.named_parameters() if name in names}
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        torch.manual_seed(2)  # the router's noise
        (forward_routing(net, x)[0].square().sum()).backward()
        rate = optimizer.param_groups[0]["lr"]
        for (name, mine), theirs in zip(net.named_parameters(), twin.parameters(), strict=True):
            theirs.grad = mine.grad.clone()
            if name in names:
                weight, velocity, g = theirs.data, momentum[name], theirs.grad
                velocity.copy_(beta * velocity + (1 - beta) * g)
                steps = [
                    0.2 * math.sqrt(max(m.shape)) * by_definition(m)
                    for m in maps(beta * velocity + (1 - beta) * g)
                ]
                weight -= rate * (decay * weight + torch.stack(steps).reshape(weight.shape))
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        adamw.zero_grad()
        for (name, mine), theirs in zip(
            net.named_parameters(), twin.named_parameters(), strict=True
        ):
            torch.testing.assert_close(mine, theirs[1], rtol=1e-9, atol=1e-12, msg=name)


def test_what_is_a_matrix():
    """Every linear map and convolution but the first, the routers and the classifier."""
    expected = {f"blocks.{i}.attn.{name}.weight" for i in range(4) for name in ("qkv", "proj")}
    expected |= {f"blocks.{i}.mlp.{name}.weight" for i in (0, 2) for name in ("fc1", "fc2")}
    expected |= {f"blocks.{i}.mlp.experts.{name}.weight" for i in (1, 3) for name in ("fc1", "fc2")}
    stages = (
        "1.0.conv",
        "1.1.conv1.conv",
        "1.1.conv2.conv",
        "2.0.conv",
        "2.1.conv1.conv",
        "2.1.conv2.conv",
    )
    expected |= {f"patch_embed.backbone.{name}.weight" for name in stages}
    assert matrices_of(model()) == expected
    distilled = matrices_of(
        timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1)
    )
    assert distilled == {
        f"blocks.0.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }


@pytest.mark.parametrize("layer_decay", [None, 0.75])
def test_rates_and_decay_are_those_of_adamw(layer_decay):
    """Groups are only cut in two; each parameter is in one."""
    net = model()

    def found(name: str) -> dict[int, tuple[float, float]]:
        groups = parameter_groups(net, OptimizerConfig(name, lr=0.01, layer_decay=layer_decay))  # type: ignore[arg-type]
        assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
        return {
            id(p): (group.get("lr", 0.01), group["weight_decay"])
            for group in groups
            for p in group["params"]
        }

    assert found("muon") == found("adamw")
    first = parameter_groups(net, OptimizerConfig("muon", layer_decay=layer_decay))[0]
    assert not first["matrices"], "the first group is the one that reports show"


def test_an_expert_without_tokens_only_decays():
    """Made orthogonal, what is left of its momentum would be as long as a gradient, for some 300 updates."""
    experts = PackedLinear(2, 4, 6)
    optimizer = Muon([{"params": [experts.weight], "matrices": True}], lr=0.1, weight_decay=0.5)
    for update in range(30):
        experts.weight.grad = torch.randn(experts.weight.shape)
        experts.weight.grad[1] *= update < 20
        before = experts.weight.detach().clone()
        optimizer.step()
        decayed = before * (1 - 0.1 * 0.5)
        assert not torch.allclose(experts.weight[0], decayed[0])
        assert torch.allclose(experts.weight[1], decayed[1]) == (update >= 20)


def test_weights_without_gradient_stay():
    weight = nn.Parameter(torch.ones(4, 6))
    Muon([{"params": [weight], "matrices": True}], lr=0.1).step()
    assert torch.equal(weight, torch.ones(4, 6))
