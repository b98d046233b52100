"""Images in, batches out: safe decoding, the drawn default dataset, splits, augmentation, the data module.

The names below load on first use, so that opening one image doesn't import Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moevision import lazy_names

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

_NAMES = {
    "images": (
        "BadImageError",
        "safe_open",
    ),
    "module": ("ImageDataModule",),
    "emoji": (
        "EmojiKinds",
        "EmojiPages",
    ),
    "synthetic": ("SyntheticPets",),
}

__getattr__ = lazy_names(__name__, _NAMES)
