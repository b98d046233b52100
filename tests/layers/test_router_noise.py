"""The noise of a choice in training, measured, and options that a router has no use for."""

from __future__ import annotations

import pytest
import torch

from moevision.layers import MoEMlp
from tests.layers.linear_experts import run, times_e_plus_1

EXPERTS = 4


@pytest.mark.parametrize("router", ["vmoe_top_k", "cosine", "expert_choice"])
def test_fixed_noise_has_a_standard_deviation_of_1_over_e(router: str) -> None:
    """40 000 draws: their standard deviation is within 2 % of 1/E (three standard errors are 1 %)."""
    layer = MoEMlp(8, 8, dtype=torch.float64, num_experts=EXPERTS, router=router).train()
    torch.manual_seed(0)
    routing = run(layer, torch.randn(10, 1000, 8, dtype=torch.float64))[1].detach()
    noise = routing.noisy_logits - routing.logits
    assert float(noise.std()) == pytest.approx(1 / EXPERTS, rel=0.02)
    assert abs(float(noise.mean())) < 0.005
    assert float(routing.noise_std.flatten()[0]) == 1 / EXPERTS


def test_jitter_multiplies_the_routers_input_only() -> None:
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
