"""The kinds of picture sets: a split of a collection, a torch dataset, and a view (some pictures, other labels)."""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch.utils.data import Dataset

from moevision.data.images import BadImageError
from moevision.data.sources import Collection, DrawnCollection, Sample
from moevision.data.synthetic import SyntheticPets
from moevision.data.transforms import square_pixels
from moevision.errors import DataWarning, UserError
from moevision.names import name_bytes, shown

if TYPE_CHECKING:
    from moevision.analysis.pictures import PictureSet

Pixels = npt.NDArray[np.uint8]


class Collected:
    """Pictures of a collection; see `PictureSet` for the attributes."""

    def __init__(
        self,
        collection: Collection,
        samples: Sequence[Sample],
        image_size: int,
        class_names: tuple[str, ...],
        name: str,
    ) -> None:
        """Describe the set; nothing is read before a picture is asked for."""
        self.collection, self.samples, self.image_size = collection, samples, image_size
        self.class_names, self.name = class_names, name
        self.part_names: tuple[str, ...] = SyntheticPets.parts if isinstance(collection, DrawnCollection) else ()

    @classmethod
    def of_drawn(cls, pets: SyntheticPets, name: str) -> Collected:
        """A set of drawn pictures, named as the data module names them."""
        samples = [Sample(f"{pets.split}/{number:06d}", pets.label(number)) for number in range(len(pets))]
        collection = DrawnCollection(list(pets.classes), {pets.split: samples}, [], {pets.split: pets})
        return cls(collection, samples, pets.image_size, pets.classes, name)

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.samples)

    def image(self, index: int) -> Pixels:
        """The picture as evaluation sees it, uint8 [S, S, 3]; raises `BadImageError`."""
        return square_pixels(self.collection.open(self.samples[index], self.image_size), self.image_size)

    def label(self, index: int) -> int:
        """The class."""
        return self.samples[index].label

    def picture_name(self, index: int) -> str:
        """The path relative to the collection, or `split/number`."""
        return self.samples[index].sample_id

    def part_mask(self, index: int) -> Pixels | None:
        """The part at each pixel of a drawn picture, uint8 [S, S]."""
        if not isinstance(self.collection, DrawnCollection):
            return None
        split, number = self.samples[index].sample_id.rsplit("/", 1)
        return self.collection.pets[split].part_mask(int(number))


class FromDataset:
    """A torch dataset of (PIL image, label); see `PictureSet` for the attributes.

    Labels are taken from its `targets` (as torchvision's datasets have them) or, picture by picture, from its items.
    Class names are its `classes`, or else the model's.
    """

    part_names: tuple[str, ...] = ()

    def __init__(self, dataset: Dataset[Any], image_size: int, class_names: Sequence[str] | None) -> None:
        """Describe the set.

        Raises:
            UserError: if it has no length.
        """
        size = getattr(dataset, "__len__", None)
        if size is None:
            raise UserError(
                f"{type(dataset).__name__} is no set of pictures: give a folder, a dataset's name, or a torch dataset "
                "with a length whose items are (PIL image, label)."
            )
        self.dataset, self.image_size, self._size = dataset, image_size, int(size())
        self.name = type(dataset).__name__
        targets = getattr(dataset, "targets", None)
        self._labels: dict[int, int] = {}
        if targets is not None and len(targets) == self._size:
            self._labels = {index: int(label) for index, label in enumerate(targets)}
        names = getattr(dataset, "classes", None) or class_names
        if names is None:
            names = [f"class {label}" for label in range(1 + max(map(self._label, range(self._size)), default=-1))]
        self.class_names: tuple[str, ...] = tuple(shown(str(name)) for name in names)

    def __len__(self) -> int:
        """Number of pictures."""
        return self._size

    def image(self, index: int) -> Pixels:
        """The picture as evaluation sees it, uint8 [S, S, 3]; raises `BadImageError`."""
        return square_pixels(self._item(index), self.image_size)

    def label(self, index: int) -> int:
        """The class; -1 where the picture can't be read and nothing else tells."""
        label = self._label(index)
        if label >= len(self.class_names):
            raise UserError(
                f"Picture {index} of {self.name} has the label {label} and there are {len(self.class_names)} class "
                "names: give the dataset the attribute `classes`."
            )
        return label

    def _label(self, index: int) -> int:
        if index not in self._labels:
            try:
                self._item(index)
            except BadImageError:
                self._labels[index] = -1
        return self._labels[index]

    def picture_name(self, index: int) -> str:
        """The place in the dataset; a dataset's own file names may be absolute paths."""
        return f"{index:06d}"

    def part_mask(self, index: int) -> Pixels | None:
        """None: the dataset knows no parts."""
        return None

    def _item(self, index: int) -> Image.Image:
        try:
            item = self.dataset[index]
        except BadImageError:
            raise
        except OSError as error:  # what Pillow raises on a damaged file, and the system on a missing one
            raise BadImageError(self.picture_name(index), f"it can't be read ({error})") from error
        if not (isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], Image.Image)):
            raise UserError(
                f"Items of {self.name} must be pairs of a PIL image and a label: leave out its transform, the model's "
                "own is applied here."
            )
        self._labels.setdefault(index, max(-1, int(item[1])))  # so that a label costs no second decoding
        return item[0].convert("RGB")


class View:
    """Some pictures of another set, under other labels; see `PictureSet` for the attributes."""

    def __init__(
        self,
        pictures: PictureSet,
        indices: Sequence[int],
        class_names: tuple[str, ...],
        new_label: Sequence[int],
        name: str,
    ) -> None:
        """Show `pictures` at `indices`; label l of theirs becomes `new_label[l]`, an index into `class_names`."""
        self.pictures, self.indices, self.new_label = pictures, indices, new_label
        self.class_names, self.name, self.part_names = class_names, name, pictures.part_names

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.indices)

    def image(self, index: int) -> Pixels:
        """The picture, uint8 [S, S, 3]; raises `BadImageError`."""
        return self.pictures.image(self.indices[index])

    def label(self, index: int) -> int:
        """The class, an index into `class_names`; -1 if it isn't known."""
        label = self.pictures.label(self.indices[index])
        return self.new_label[label] if label >= 0 else -1

    def picture_name(self, index: int) -> str:
        """The name in the other set."""
        return self.pictures.picture_name(self.indices[index])

    def part_mask(self, index: int) -> Pixels | None:
        """The part at each pixel, uint8 [S, S]; None without parts."""
        return self.pictures.part_mask(self.indices[index])


def labels_in(own: tuple[str, ...], wanted: Sequence[str] | None) -> tuple[tuple[str, ...], list[int]]:
    """Names and numbers of the data's classes among the model's.

    Args:
        own: names of the data's classes.
        wanted: names of the model's classes, None if they don't matter.

    Returns:
        The class names to use, and for each label of the data its new number (-1: the model has no such class). The
        data keeps its own names where the model knows none of them.
    """
    number_of = {_plain(name): number for number, name in enumerate(wanted or ())}
    numbers = [number_of.get(_plain(name), -1) for name in own]
    if wanted is None or all(number < 0 for number in numbers):
        return own, list(range(len(own)))
    strangers = [name for name, number in zip(own, numbers, strict=True) if number < 0]
    if strangers:
        warnings.warn(
            f"{len(strangers)} of {len(own)} classes of the data are none of the model's, and their pictures count as "
            f"unlabelled: {', '.join(strangers[:5])}",
            DataWarning,
            stacklevel=4,
        )
    return tuple(wanted), numbers


def _plain(name: str) -> str:
    return shown(name).casefold().replace("_", " ")


def balanced_subset(pictures: PictureSet, limit: int, seed: int) -> list[int]:
    """Indices of `limit` pictures, in order: classes take turns, each in the order of a hash of (seed, name).

    Hence a class has one picture more than another at most, unless it runs out, and subsets of growing size nest.
    """
    members: dict[int, list[tuple[bytes, int]]] = defaultdict(list)
    for index in range(len(pictures)):
        key = hashlib.sha256(name_bytes(f"{seed}:{pictures.picture_name(index)}")).digest()
        members[pictures.label(index)].append((key, index))
    turns = [(turn, label, index) for label, keyed in members.items() for turn, (_, index) in enumerate(sorted(keyed))]
    return sorted(index for _, _, index in sorted(turns)[:limit])
