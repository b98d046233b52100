"""The layer equals `reference.py`: output, losses and every gradient, with the same weights and the same noise."""

import pytest
import torch
from torch import Tensor, nn

from moevision.layers import MoEMlp, record_routing
from moevision.layers.reference import ReferenceMoE, importance_loss, load_loss
from moevision.losses import importance_loss as our_importance_loss
from moevision.losses import load_loss as our_load_loss

WIDTH, HIDDEN, EXPERTS = 8, 16, 5


def twins(
    top_k: int, backend: str, dtype: torch.dtype, *, train: bool
) -> tuple[ReferenceMoE, MoEMlp]:
    """Both layers with the same random weights; the last expert is chosen by nobody without noise."""
    torch.manual_seed(0)
    reference = ReferenceMoE(WIDTH, HIDDEN, EXPERTS, top_k).to(dtype).train(train)
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        reference.router.weight[-1] = -10  # tokens are positive
    layer = MoEMlp(
        WIDTH, HIDDEN, num_experts=EXPERTS, top_k=top_k, backend=backend, dtype=dtype
    ).train(train)
    layer.load_state_dict(
        {name: value.detach() for name, value in packed(dict(reference.named_parameters())).items()}
    )
    return reference, layer


def packed(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the reference has for each expert, in the names and shapes of `MoEMlp`."""
    every = {name: value for name, value in values.items() if name.startswith("router.")}
    for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
        every[f"experts.{name}"] = torch.stack(
            [values[f"experts.{number}.{name}"] for number in range(EXPERTS)]
        )
    return every


def gradients(layer: nn.Module) -> dict[str, Tensor]:
    """Of every parameter; 0 where none arrived (learned noise sleeps in evaluation)."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in layer.named_parameters()
    }


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("backend", ["auto", "loop", "dense", "grouped"])
def test_the_layer_is_the_reference(backend, top_k, train):
    """In float64, `grouped` in float32. With k = 1 both gate with the probability among all experts."""
    dtype, tolerance = (torch.float32, 1e-4) if backend == "grouped" else (torch.float64, 1e-10)
    reference, layer = twins(top_k, backend, dtype, train=train)
    x, theirs_x = (
        torch.rand(3, 7, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
        for _ in range(2)
    )
    x.requires_grad_()
    theirs_x.requires_grad_()
    target = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)

    torch.manual_seed(3)  # the same noise
    theirs, choice = reference(theirs_x)
    their_losses = [importance_loss(choice), *([load_loss(choice)] if train else [])]
    torch.manual_seed(3)
    with record_routing(layer) as routings:
        ours = layer(x)
    our_losses = [
        our_importance_loss(routings[0]),
        *([our_load_loss(routings[0])] if train else []),
    ]

    def close(actual: Tensor, expected: Tensor, name: str = "") -> None:
        torch.testing.assert_close(
            actual, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name} {text}"
        )

    assert torch.equal(routings[0].expert_index.flatten(0, 1), choice.expert)
    close(routings[0].combine_weight.flatten(0, 1), choice.gate)
    close(ours, theirs)
    for actual, expected in zip(our_losses, their_losses, strict=True):
        assert expected > 0.01
        close(actual, expected)
    ((ours * target).sum() + sum(our_losses)).backward()
    ((theirs * target).sum() + sum(their_losses)).backward()
    close(x.grad, theirs_x.grad, "x")
    expected_gradients = packed(gradients(reference))
    assert expected_gradients["router.noise_weight"].any() == train
    for name, actual in gradients(layer).items():
        close(actual, expected_gradients[name], name)
