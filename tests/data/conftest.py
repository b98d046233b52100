"""Small generated image folders."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Folder = Callable[..., Path]


@pytest.fixture
def image_folder(tmp_path: Path) -> Folder:
    """Make a folder of PNG images, all different: `image_folder({"cat": 3, "dog": 2}, size=(12, 10))`."""
    rng = np.random.default_rng(0)

    def make(
        counts: Mapping[str, int], size: tuple[int, int] = (16, 16), name: str = "pictures"
    ) -> Path:
        root = tmp_path / name
        for folder, count in counts.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / f"{number:03d}.png")
        return root

    return make
