"""The MoE layer in pure torch: no timm, no Lightning, no files."""

from moevision.layers.dispatch import Dispatched, LocalDispatcher
from moevision.layers.experts import Backend, Experts, PackedLinear
from moevision.layers.moe import MoEMlp, moe_layers
from moevision.layers.routers import ROUTERS, Router, TopKRouter, build_router
from moevision.layers.routing import Recordable, Routing, forward_routing, record_routing, routing_lock

__all__ = [
    "ROUTERS",
    "Backend",
    "Dispatched",
    "Experts",
    "LocalDispatcher",
    "MoEMlp",
    "PackedLinear",
    "Recordable",
    "Router",
    "Routing",
    "TopKRouter",
    "build_router",
    "forward_routing",
    "moe_layers",
    "record_routing",
    "routing_lock",
]
