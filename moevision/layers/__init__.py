"""The MoE layer in pure torch: no timm, no Lightning, no files."""

from moevision.layers.affinity import CosineRouter, SigmoidRouter
from moevision.layers.capacity import capacity_of, within_capacity
from moevision.layers.dispatch import Dispatched, LocalDispatcher
from moevision.layers.expert_choice import ExpertChoiceRouter
from moevision.layers.experts import Backend, Experts, PackedLinear
from moevision.layers.handmade import ColourRouter, HandmadeRouter, LabelRouter, label_oracle
from moevision.layers.moe import MoEMlp, SharedExperts, describe_moe, moe_layers, update_router_bias
from moevision.layers.options import RouterOptions
from moevision.layers.routers import ROUTERS, Router, build_router, router_kind
from moevision.layers.routing import Recordable, Routing, forward_routing, record_routing, routing_lock
from moevision.layers.slots import ExpertChoiceRouting, SoftRouting
from moevision.layers.soft import SoftRouter
from moevision.layers.top_k import TopKRouter

__all__ = [
    "ROUTERS",
    "Backend",
    "ColourRouter",
    "CosineRouter",
    "Dispatched",
    "ExpertChoiceRouter",
    "ExpertChoiceRouting",
    "Experts",
    "HandmadeRouter",
    "LabelRouter",
    "LocalDispatcher",
    "MoEMlp",
    "PackedLinear",
    "Recordable",
    "Router",
    "RouterOptions",
    "Routing",
    "SharedExperts",
    "SigmoidRouter",
    "SoftRouter",
    "SoftRouting",
    "TopKRouter",
    "build_router",
    "capacity_of",
    "describe_moe",
    "forward_routing",
    "label_oracle",
    "moe_layers",
    "record_routing",
    "router_kind",
    "routing_lock",
    "update_router_bias",
    "within_capacity",
]
