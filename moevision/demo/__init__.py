"""The explorer: see in a browser, or in a notebook, which expert every patch goes to.

`route_image(model, image)` gives the view of one image, `bundled_model("photos")` a model to try it on and
`bundled_photos("photos")` images. `blocks()` is a Gradio app of it; `moevision demo` serves the whole page. The
names load on first use, so that `moevision demo --help` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moevision.demo.gradio_app import blocks
    from moevision.demo.models import bundled_model, bundled_photos
    from moevision.demo.view import RoutingView, route_image

__all__ = ["RoutingView", "blocks", "bundled_model", "bundled_photos", "route_image"]

_NAMES = {
    "gradio_app": ("blocks",),
    "models": ("bundled_model", "bundled_photos"),
    "view": ("RoutingView", "route_image"),
}


def __getattr__(name: str) -> object:
    """Import the module that defines ``name``."""
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
