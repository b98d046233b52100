"""moevision: train sparse vision transformers, see which expert every patch goes to, trust what you see.

The public names load on first use, so that `moevision --help` needs no torch. Once moevision and timm are imported, in
whichever order, timm knows the `vit_moe*` names.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

from moevision.errors import UserError

if TYPE_CHECKING:
    from moevision.layers import MoEMlp, Routing, forward_routing, record_routing, update_router_bias
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
    "record_routing",
    "upcycle",
    "update_router_bias",
]

# The module that defines each name.
_HOME = {
    "MoEMlp": "layers",
    "Routing": "layers",
    "VisionTransformerMoE": "models",
    "convert_to_moe": "models",
    "dense_twin": "models",
    "forward_routing": "layers",
    "record_routing": "layers",
    "upcycle": "models.upcycle",
    "update_router_bias": "layers",
}
_MODULES = ("analysis", "data", "demo", "efficiency", "layers", "losses", "metrics", "models", "train")


def package_version(name: str) -> str | None:
    """The installed version of a distribution, without importing it; None if it isn't installed."""
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def __getattr__(name: str) -> object:
    """Import a public name, or a module of the package, on its first use."""
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What completion in a notebook offers."""
    return sorted({*globals(), *__all__, *_MODULES})


class _AfterTimm(MetaPathFinder, Loader):
    """Loads timm by its own loader, and `moevision.models` right after it: timm has no entry point for plugins."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """What the other finders know of timm; transformers, for one, asks and doesn't import it."""
        if name != "timm":
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            self.timm_loader, spec.loader = spec.loader, self
        return spec

    def exec_module(self, module: ModuleType) -> None:
        """Run timm, then register our names with it, unless it is `moevision.models` that is importing timm."""
        module.__loader__ = self.timm_loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.timm_loader
        self.timm_loader.exec_module(module)
        if "moevision.models" not in sys.modules:
            import_module("moevision.models")


if sys.modules.get("timm") is None:
    sys.meta_path.insert(0, _AfterTimm())
else:
    import_module("moevision.models")
