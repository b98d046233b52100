"""Small generated image folders, and what tests of data ask of sentences."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moevision.data import ImageDataModule
from moevision.data.collection import Collection
from moevision.data.open import open_collection
from moevision.errors import UserError
from tests.shared import missing

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


def opened(path: Path | str, **options) -> Collection:
    return open_collection(str(path), **({"image_size": 16, "sizes": {}} | options))


def ready(path: Path | str, stage: str | None = None, run_dir=None, **options) -> ImageDataModule:
    """A data module of images of 16 px in batches of 8, set up."""
    data = ImageDataModule(str(path), **({"image_size": 16, "batch_size": 8} | options))
    data.run_dir = run_dir
    data.setup(stage)
    return data


def listed(root: Path, rows: list[str], head: str = "path,label") -> Path:
    """A manifest in the folder."""
    (root / "list.csv").write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return root / "list.csv"


def names(sentence: str, *fragments: str) -> None:
    """Assert that a sentence names all of this."""
    assert missing(sentence, *fragments) == [], sentence


@contextmanager
def refusal(*fragments: str, kind: type[Exception] = UserError) -> Iterator[None]:
    """Expect an error that names all of this: the option or file, the value, the way on."""
    with pytest.raises(kind) as error:
        yield
    names(str(error.value), *fragments)
