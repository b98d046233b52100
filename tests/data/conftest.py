"""Small generated image folders, and what tests of data ask of sentences."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moevision.data import ImageDataModule
from moevision.data.collection import Collection, Sample
from moevision.data.named import open_collection
from moevision.data.splits import Splits
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
def refusal(
    *fragments: str, kind: type[Exception] = UserError
) -> Iterator[pytest.ExceptionInfo[Any]]:
    """Expect an error that names all of this: the option or file, the value, the way on."""
    with pytest.raises(kind) as error:
        yield error
    names(str(error.value), *fragments)


def samples_of(data: ImageDataModule | Collection | Splits) -> dict[str, list[Sample]]:
    """Split -> samples."""
    if not isinstance(data, ImageDataModule):
        return data.samples
    return {split: list(dataset.samples) for split, dataset in data.contents.datasets.items()}


def sizes(data: ImageDataModule | Collection | Splits) -> list[int]:
    """Number of images of each split, train first."""
    return list(map(len, samples_of(data).values()))


def split_of(data: ImageDataModule | Collection | Splits) -> dict[str, str]:
    """Sample id -> split."""
    by_split = samples_of(data).items()
    return {sample.sample_id: split for split, samples in by_split for sample in samples}


def splits_of_groups(
    data: ImageDataModule | Splits, group_of: Callable[[str], Hashable]
) -> list[set[str]]:
    """The splits in which each group has images; `group_of` is the group of a sample id."""
    splits: dict[Hashable, set[str]] = defaultdict(set)
    for sample_id, split in split_of(data).items():
        splits[group_of(sample_id)].add(split)
    return list(splits.values())
