"""Models that the tests of traces and statistics share: two MoE layers (blocks 1 and 3) on a 4 x 4 grid."""

import timm
import torch
from torch import Tensor, nn

from moevision.analysis import PictureSet, RoutingTrace, collect_routing, open_pictures
from moevision.data import SyntheticPets
from moevision.layers import MoEMlp, Routing, moe_layers, record_routing
from moevision.models.io import SavedModel

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def with_random_routers(net: nn.Module) -> nn.Module:
    """Routers away from their zero start, so that patches go different ways."""
    with torch.no_grad():
        for layer in moe_layers(net):
            for parameter in layer.router.parameters():
                parameter.normal_()
    return net.eval()


def small_net(
    router: str | list[str] = "noisy_top_k", seed: int = 0, **options: object
) -> nn.Module:
    torch.manual_seed(seed)
    options = {"num_classes": 8, "router": router, **options}
    return with_random_routers(timm.create_model("test_vit_moe", **options))


def random_layer(layer: MoEMlp, std: float = 0.5) -> MoEMlp:
    """In eval mode, its router away from its zero start; always the same."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=std)
    return layer.eval()


def traced(model: SavedModel, count: int) -> tuple[PictureSet, RoutingTrace]:
    """Drawn images, and how the model routes them."""
    pictures = open_pictures(SyntheticPets(count, 32, 0, "test"), 32)
    return pictures, collect_routing(model, pictures, progress=False)


def saved(net: nn.Module) -> SavedModel:
    return SavedModel(net, list(SyntheticPets.classes), 32, MEAN, STD)


def routed(layer: MoEMlp, x: Tensor) -> tuple[Tensor, Routing]:
    """Output and decision of one layer."""
    with torch.no_grad(), record_routing(layer) as routings:
        out = layer(x)
    return out, routings[0]


def random_tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
