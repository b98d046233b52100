"""moevision: train sparse vision transformers, see which expert every patch goes to, trust what you see.

`import moevision` registers the `vit_moe*` names with timm and loads torch and timm only.
"""

from moevision.errors import UserError
from moevision.layers import (
    MoEMlp,
    Routing,
    forward_routing,
    label_oracle,
    record_routing,
    update_router_bias,
)
from moevision.models import VisionTransformerMoE, convert_to_moe, dense_twin
from moevision.models.upcycle import upcycle

__version__ = "0.1.0"
__all__ = [
    "MoEMlp",
    "Routing",
    "UserError",
    "VisionTransformerMoE",
    "convert_to_moe",
    "dense_twin",
    "forward_routing",
    "label_oracle",
    "record_routing",
    "upcycle",
    "update_router_bias",
]
