"""The MoE layer in pure torch: no timm, no Lightning, no files. Begin with `reference.py`, then `moe.py`."""

from moevision.config import RouterOptions
from moevision.layers.baselines import ColourRouter
from moevision.layers.experts import Backend, PackedLinear
from moevision.layers.moe import (
    LocalDispatcher,
    MoEMlp,
    describe_moe,
    moe_layers,
    update_router_bias,
)
from moevision.layers.routers import ROUTERS, CosineRouter, TopKRouter, build_router, router_kind
from moevision.layers.routers_soft import (
    ExpertChoiceRouter,
    ExpertChoiceRouting,
    SoftRouter,
    SoftRouting,
)
from moevision.layers.routing import (
    LayerLoad,
    Router,
    Routing,
    capacity_of,
    forward_routing,
    record_routing,
    routing_lock,
    within_capacity,
)

__all__ = [
    "ROUTERS",
    "Backend",
    "ColourRouter",
    "CosineRouter",
    "ExpertChoiceRouter",
    "ExpertChoiceRouting",
    "LayerLoad",
    "LocalDispatcher",
    "MoEMlp",
    "PackedLinear",
    "Router",
    "RouterOptions",
    "Routing",
    "SoftRouter",
    "SoftRouting",
    "TopKRouter",
    "build_router",
    "capacity_of",
    "describe_moe",
    "forward_routing",
    "moe_layers",
    "record_routing",
    "router_kind",
    "routing_lock",
    "update_router_bias",
    "within_capacity",
]
