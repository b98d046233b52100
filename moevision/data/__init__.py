"""Images in, batches out: safe decoding, the drawn default dataset, splits, augmentation, the data module.

The names below load on first use, so that opening one image doesn't import Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moevision.data.emoji import EmojiKinds, EmojiPages
    from moevision.data.images import BadImageError, safe_open
    from moevision.data.module import ImageDataModule
    from moevision.data.synthetic import SyntheticPets

__all__ = [
    "BadImageError",
    "EmojiKinds",
    "EmojiPages",
    "ImageDataModule",
    "SyntheticPets",
    "safe_open",
]

_HOME = {
    "BadImageError": "images",
    "ImageDataModule": "module",
    "EmojiKinds": "emoji",
    "EmojiPages": "emoji",
    "SyntheticPets": "synthetic",
    "safe_open": "images",
}


def __getattr__(name: str) -> object:
    """Import the module that defines ``name``."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
