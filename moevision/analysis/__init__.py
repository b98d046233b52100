"""What experts respond to: routing traces of whole picture sets, and what can be said about them.

The names below load on first use, so that a trace can be collected without figures or statistics being imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moevision.analysis.pictures import PictureSet, open_pictures, patch_crop
    from moevision.analysis.trace import LayerTrace, RoutingTrace, collect_routing

__all__ = ["LayerTrace", "PictureSet", "RoutingTrace", "collect_routing", "open_pictures", "patch_crop"]

_HOME = {
    "LayerTrace": "trace",
    "PictureSet": "pictures",
    "RoutingTrace": "trace",
    "collect_routing": "trace",
    "open_pictures": "pictures",
    "patch_crop": "pictures",
}


def __getattr__(name: str) -> object:
    """Import the module that defines ``name``."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
