"""Routers in training: noise and jitter, the start, gates, precision."""

import numpy as np
import pytest
import torch
from torch import Tensor

from moevision.layers import MoEMlp, TopKRouter, build_router
from moevision.layers.cpu import softmax_over_experts
from tests.layers.linear_experts import run, times_e_plus_1

EXPERTS = 4


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def trained(
    name: str, dim: int = 16, num_experts: int = 6, top_k: int = 2, seed: int = 0
) -> TopKRouter:
    """A float64 router whose weights are no longer the initial ones."""
    torch.manual_seed(seed)
    router = build_router(name, dim, num_experts, top_k, dtype=torch.float64)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    return router


@pytest.mark.parametrize("name", ["noisy_top_k", "vmoe_top_k"])
def test_the_choice_is_that_of_the_equations_with_the_same_noise(name):
    """arXiv:1701.06538, eq. 3-5; V-MoE's TOP_k(softmax(Wx + noise)), noise of std 1/E, not renormalised. In NumPy."""
    router, x = trained(name), torch.randn(2, 5, 16, dtype=torch.float64)
    torch.manual_seed(7)
    noise = torch.randn(2, 5, 6, dtype=torch.float64).numpy()
    torch.manual_seed(7)
    routing = router(x)
    clean = x.numpy() @ router.weight.detach().numpy().T
    if name == "noisy_top_k":
        std = np.log1p(np.exp(x.numpy() @ router.noise_weight.detach().numpy().T))
        index = np.argsort(-(clean + noise * std), axis=-1)[..., :2]
        gates = softmax(np.take_along_axis(clean + noise * std, index, -1))
    else:
        probs = softmax(clean + noise / 6)
        index = np.argsort(-probs, axis=-1)[..., :2]
        gates = np.take_along_axis(probs, index, -1)
    np.testing.assert_array_equal(routing.expert_index, index)
    np.testing.assert_allclose(routing.combine_weight.detach(), gates, rtol=1e-12)


def test_a_router_s_own_gates_count_with_and_without_gradients():
    """Without noise and normalisation evaluation may take the probabilities, but not in the place of other gates."""

    class EqualGates(TopKRouter):
        def gates(self, gate_logits: Tensor, top_logits: Tensor) -> Tensor:
            return torch.full_like(top_logits, 0.5)

    router = EqualGates(4, 3, 2, softmax_over="all").eval()
    x = torch.randn(1, 5, 4)
    with torch.no_grad():
        assert router(x).combine_weight.eq(0.5).all()
    assert router(x).combine_weight.eq(0.5).all()


def test_initial_router_is_all_noise_and_balanced():
    """Shazeer, appendix A: W_g = W_noise = 0, so the noise has std softplus(0) = ln 2 and loads are equal."""
    torch.manual_seed(0)
    routing = build_router("noisy_top_k", 16, 8, 2)(torch.randn(16, 64, 16))
    torch.testing.assert_close(
        routing.noise_std, torch.full_like(routing.noise_std, float(np.log(2)))
    )
    counts = routing.counts()
    assert counts.sum() == 16 * 64 * 2
    assert counts.max() / counts.float().mean() < 1.25  # 256 expected, standard deviation 15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_at_least_float32_with_autocast_off(dtype):
    router = build_router("noisy_top_k", 16, 4, 2).eval()
    torch.nn.init.normal_(router.weight)
    x = torch.randn(1, 50, 16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x)
    wide = torch.promote_types(dtype, torch.float32)
    assert routing.logits.dtype == routing.combine_weight.dtype == wide
    torch.testing.assert_close(routing.logits, x.to(wide) @ router.weight.to(wide).T)


@pytest.mark.parametrize("shape", [(2, 7, 5), (1, 1, 8), (3, 4, 1), (0, 4, 3)])
def test_the_softmax_across_tokens_is_the_softmax_over_experts(shape):
    """Value and gradient, also of logits so large that exp would overflow."""
    logits = 300 * torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    given = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for softmax in (softmax_over_experts, lambda x: x.softmax(-1)):
        for scale in (1, 1 / 300):
            x = (scale * logits).requires_grad_()
            probs = softmax(x)
            probs.backward(given)
            results.append((probs.detach(), x.grad))
    for actual, expected in zip(results[:2], results[2:], strict=True):
        assert actual[0].shape == shape
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("router", ["vmoe_top_k", "cosine", "expert_choice"])
def test_fixed_noise_has_a_standard_deviation_of_1_over_e(router):
    """40 000 draws: their standard deviation is within 2 % of 1/E (three standard errors are 1 %)."""
    layer = MoEMlp(8, 8, dtype=torch.float64, num_experts=EXPERTS, router=router).train()
    torch.manual_seed(0)
    routing = run(layer, torch.randn(10, 1000, 8, dtype=torch.float64))[1].detach()
    noise = routing.noisy_logits - routing.logits
    assert float(noise.std()) == pytest.approx(1 / EXPERTS, rel=0.02)
    assert abs(float(noise.mean())) < 0.005
    assert float(routing.noise_std.flatten()[0]) == 1 / EXPERTS


def test_jitter_multiplies_the_routers_input_only():
    """Switch: U(0.99, 1.01) for every feature. With W = I the logits are the jittered input itself, while the output
    stays a multiple of the clean token. The variance of U is 0.02² / 12."""
    layer, x = (
        times_e_plus_1("switch", EXPERTS, noise="jitter").train(),
        torch.rand(4, 2500, EXPERTS, dtype=torch.float64) + 1,
    )
    torch.manual_seed(0)
    out, routing = run(layer, x)
    jitter = (routing.noisy_logits / x).detach()
    assert float(jitter.min()) >= 0.99
    assert float(jitter.max()) <= 1.01
    assert float(jitter.mean()) == pytest.approx(1, abs=2e-4)
    assert float(jitter.var()) == pytest.approx(0.02**2 / 12, rel=0.03)
    multiple = (out / x).detach()
    torch.testing.assert_close(multiple, multiple[..., :1].expand_as(multiple))
    assert torch.equal(run(layer.eval(), x)[1].noisy_logits, x)
