"""A layer whose output can be computed in one's head: expert e multiplies its input by e + 1."""

import torch
from torch import Tensor, nn

from moevision.layers import MoEMlp, Routing, record_routing


def times_e_plus_1(
    router: str, num_experts: int, width: int | None = None, **options: object
) -> MoEMlp:
    """A float64 layer in eval mode whose expert e is x -> (e + 1) x.

    A linear router of as many experts as the width gets the identity as its weight: the token is its own logits.
    """
    width = width or num_experts
    layer = MoEMlp(
        width,
        width,
        act_layer=nn.Identity,
        bias=False,
        dtype=torch.float64,
        num_experts=num_experts,
        router=router,
        backend="loop",
        **options,
    )
    eye = torch.eye(width, dtype=torch.float64)
    with torch.no_grad():
        layer.experts.fc1.weight.copy_(eye.expand(num_experts, width, width))
        layer.experts.fc2.weight.copy_(torch.stack([(e + 1) * eye for e in range(num_experts)]))
        if isinstance(getattr(layer.router, "weight", None), nn.Parameter) and width == num_experts:
            layer.router.weight.copy_(eye)
    return layer.eval()


def run(layer: MoEMlp, x: Tensor) -> tuple[Tensor, Routing]:
    """The layer's output and its decision."""
    with record_routing(layer) as routings:
        out = layer(x)
    return out, routings[0]


def tokens(*rows: list[float]) -> Tensor:
    """One image [1, N, D]."""
    return torch.tensor([rows], dtype=torch.float64)


def close(actual: Tensor, expected: list[object] | Tensor, tolerance: float = 1e-12) -> None:
    """Equal to within a relative and an absolute tolerance."""
    target = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach(), target, rtol=tolerance, atol=tolerance)
