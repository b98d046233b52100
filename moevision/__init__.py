"""moevision: train sparse vision transformers, see which expert every patch goes to, trust what you see.

The public names load on first use, so that `moevision --help` needs no torch. `import moevision.models`, or the first
use of a public name, registers the `vit_moe*` names with timm.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moevision.errors import UserError

if TYPE_CHECKING:
    from moevision.layers import (
        MoEMlp,
        Routing,
        forward_routing,
        record_routing,
        update_router_bias,
    )
    from moevision.models import VisionTransformerMoE, convert_to_moe, dense_twin
    from moevision.models.upcycle import upcycle

__version__ = "0.2.0"
__all__ = [
    "MoEMlp",
    "Routing",
    "UserError",
    "VisionTransformerMoE",
    "convert_to_moe",
    "dense_twin",
    "fit",
    "forward_routing",
    "record_routing",
    "upcycle",
    "update_router_bias",
]

_NAMES = {
    "commands.fit": ("fit",),
    "layers": ("MoEMlp", "Routing", "forward_routing", "record_routing", "update_router_bias"),
    "models": ("VisionTransformerMoE", "convert_to_moe", "dense_twin"),
    "models.upcycle": ("upcycle",),
}
_MODULES = ("analysis", "data", "demo", "efficiency", "layers", "losses", "models", "train")


def package_version(name: str) -> str | None:
    """The installed version of a distribution, without importing it; None if it isn't installed."""
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of the package, on its first use."""
    for module, names in _NAMES.items():
        if name in names:
            import_module(f"{__name__}.models")
            return getattr(import_module(f"{__name__}.{module}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What completion in a notebook offers."""
    return sorted({*globals(), *__all__, *_MODULES})
