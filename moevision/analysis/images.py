"""`PictureSet`: labelled images as the model sees them, opened as training and testing open them.

Whatever the images come from (a folder, a dataset by name, a torch dataset, a run's held-out test set), they go through
the data package: the same split, the same decoding, the same central square.

Axes: S = ``image_size``; a patch is an index into the row-major grid of rows x columns.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from moevision.analysis.information import Pixels
from moevision.config import CROP, Framing
from moevision.data.collection import SPLITS, Collection, DrawnCollection, FileCollection, Sample
from moevision.data.images import BadImageError, upright_rgb
from moevision.data.named import DATASET_NAMES
from moevision.data.open import open_collection
from moevision.data.splits import SplitSettings, is_copy, make_splits, read_splits
from moevision.data.synthetic import SyntheticPets
from moevision.data.transforms import square_pixels
from moevision.errors import DataWarning, UserError, escape_controls, name_bytes
from moevision.files import newest_config
from moevision.models.io import SavedModel
from moevision.models.safe_files import read_yaml

if TYPE_CHECKING:
    from moevision.analysis.trace import RoutingTrace


@runtime_checkable
class PictureSet(Protocol):
    """Labelled images of one size, by index."""

    class_names: tuple[str, ...]  # names of the labels
    name: str  # what the images are, in words
    part_names: tuple[
        str, ...
    ] = ()  # names of the values of a part mask; empty where parts aren't known

    def __len__(self) -> int:
        """Number of images, unreadable ones included."""

    def image(self, index: int) -> Pixels:
        """The image, uint8 [S, S, 3] in RGB order; raises `BadImageError` if it can't be read."""

    def label(self, index: int) -> int:
        """The class, an index into `class_names`; -1 if it isn't known."""

    def picture_name(self, index: int) -> str:
        """A name that stays the same across runs and machines: never an absolute path."""

    def part_mask(self, index: int) -> Pixels | None:
        """The part seen at each pixel, uint8 [S, S], an index into `part_names`; None without parts."""
        return None


EXPLORER = "http://127.0.0.1:7860"
"""Where `moevision demo` is, unless the port is taken."""
Data = str | Path | Dataset[Any] | PictureSet


def open_pictures(
    data: Data,
    image_size: int,
    *,
    framing: Framing = CROP,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    root: str | Path = "data",
    download: bool = False,
    run_dir: str | Path | None = None,
    columns: tuple[str | None, str | None] = (None, None),
) -> PictureSet:
    """Open images as evaluation sees them.

    Args:
        data: `synthetic_pets`, another dataset's name (`cifar10`, ...), a folder with one subfolder per class (also
            inside train/, val/, test/), a CSV manifest, a Hugging Face dataset (`hf:NAME`), a torch dataset
            of (PIL image, label), or a `PictureSet`.
        image_size: S, side of the square images in pixels.
        framing: how the model makes them square.
        split: `test`, `val`, `train`, or `all`; cut as `ImageDataModule` cuts it where the data came unsplit. A torch
            dataset or a `PictureSet` is taken as it is.
        limit: take at most so many images, the same number of each class as far as there are enough. They are drawn
            by a hash of seed and name: a larger limit adds images and removes none.
        seed: of the cut, of drawn images and of `limit`; 0 is the data module's default.
        class_names: the model's classes. Labels become indices into them by name (see `labels_in`);
            where the model knows none of the data's classes the data keeps its own.
        root: folder in which named datasets live.
        download: fetch a named dataset that isn't there.
        run_dir: a run's folder; its splits.csv says which images were held out.
        columns: of a table (a CSV manifest, a Hugging Face dataset), those with image and label; None finds them.

    Raises:
        UserError: if the data are missing, laid out otherwise, or have no such split.
    """
    pictures: PictureSet
    if isinstance(data, PictureSet):
        pictures = data
    elif isinstance(data, SyntheticPets):  # drawn again at the model's size, with its part masks
        drawn = DrawnCollection.of(image_size, data.seed, {data.split: len(data)})
        name = f"synthetic_pets, {data.split} set, seed {data.seed}"
        pictures = Collected(drawn, drawn.samples[data.split], image_size, data.classes, name)
    elif isinstance(data, str | Path):
        collection = open_collection(
            str(data),
            root=str(root),
            download=download,
            image_size=image_size,
            seed=seed,
            columns=columns,
        )
        pictures = _from_collection(
            collection, str(data), image_size, framing, split, seed, run_dir
        )
    else:
        pictures = FromDataset(data, image_size, class_names, framing)
    return _viewed(pictures, limit, seed, class_names)


def _from_collection(
    collection: Collection,
    data: str,
    image_size: int,
    framing: Framing,
    split: str,
    seed: int,
    run_dir: str | Path | None,
) -> PictureSet:
    if split not in (*SPLITS, "all"):
        raise UserError(f"There is no split {split!r}: choose one of {', '.join(SPLITS)}, all.")
    class_names: Sequence[str] = collection.class_names
    sentences: list[str] = []
    if split == "all":
        samples = [sample for part in collection.samples.values() for sample in part]
    else:
        table = None if run_dir is None else Path(run_dir) / "splits.csv"
        if table is not None and table.exists():
            splits, class_names = read_splits(table, collection)
        else:
            splits = make_splits(collection, SplitSettings(seed=seed))
        if split not in splits.samples:
            there = ", ".join(splits.samples)
            raise UserError(f"There is no {split} set in this data: choose one of {there}, all.")
        samples, sentences = splits.samples[split], splits.warnings
    for sentence in [*collection.notes, *sentences]:
        warnings.warn(sentence, DataWarning, stacklevel=4)
    of_files = isinstance(collection, FileCollection)
    what = escape_controls(Path(data).expanduser().resolve().name) if of_files else data
    which = "all images" if split == "all" else f"{split} set"
    name = f"{what}, {which}, seed {seed}"
    return Collected(collection, samples, image_size, tuple(class_names), name, framing)


def _viewed(
    pictures: PictureSet, limit: int | None, seed: int, class_names: Sequence[str] | None
) -> PictureSet:
    """The images with the model's labels, and as many of them as wanted."""
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: it must be at least 1 image.")
    names, new_label = labels_in(pictures.class_names, class_names)
    if names == pictures.class_names and (limit is None or limit >= len(pictures)):
        return pictures
    indices: Sequence[int] = range(len(pictures))
    name = pictures.name
    if limit is not None and limit < len(pictures):
        indices = balanced_subset(pictures, limit, seed)
        name = f"{name}, {len(indices)} of {len(pictures)} images"
    return View(pictures, indices, names, new_label, name)


@dataclass(eq=False)
class Collected:
    """Images of a collection; see `PictureSet` for the attributes. Nothing is read before an image is asked for."""

    collection: Collection
    samples: Sequence[Sample]
    image_size: int
    class_names: tuple[str, ...]
    name: str
    framing: Framing = CROP

    def __post_init__(self) -> None:
        self.part_names: tuple[str, ...] = (
            SyntheticPets.parts if isinstance(self.collection, DrawnCollection) else ()
        )

    def __len__(self) -> int:
        return len(self.samples)

    def image(self, index: int) -> Pixels:
        """The image as evaluation sees it, uint8 [S, S, 3]; raises `BadImageError`."""
        return square_pixels(
            self.collection.open(self.samples[index], self.image_size),
            self.image_size,
            self.framing,
        )

    def label(self, index: int) -> int:
        """The class."""
        return self.samples[index].label

    def picture_name(self, index: int) -> str:
        """The path relative to the collection, or `split/number`."""
        return self.samples[index].sample_id

    def part_mask(self, index: int) -> Pixels | None:
        """The part at each pixel of a drawn image, uint8 [S, S]."""
        if not isinstance(self.collection, DrawnCollection):
            return None
        split, number = self.samples[index].sample_id.rsplit("/", 1)
        return self.collection.pets[split].part_mask(int(number))


class FromDataset(PictureSet):
    """A torch dataset of (PIL image, label); see `PictureSet` for the attributes.

    Labels are taken from its `targets` (as torchvision's datasets have them) or, image by image, from its items.
    Class names are its `classes`, or else the model's.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        image_size: int,
        class_names: Sequence[str] | None,
        framing: Framing,
    ) -> None:
        size = getattr(dataset, "__len__", None)
        if size is None:
            raise UserError(
                f"{type(dataset).__name__} is no set of images: give a folder, a dataset's name, or a torch dataset "
                "with a length whose items are (PIL image, label)."
            )
        self.dataset, self.image_size, self.framing, self._size = (
            dataset,
            image_size,
            framing,
            int(size()),
        )
        self.name = type(dataset).__name__
        targets = getattr(dataset, "targets", None)
        self._labels: dict[int, int] = {}
        if targets is not None and len(targets) == self._size:
            self._labels = {index: int(label) for index, label in enumerate(targets)}
        names = getattr(dataset, "classes", None) or class_names
        if names is None:
            names = [
                f"class {label}"
                for label in range(1 + max(map(self._label, range(self._size)), default=-1))
            ]
        self.class_names: tuple[str, ...] = tuple(escape_controls(str(name)) for name in names)

    def __len__(self) -> int:
        return self._size

    def image(self, index: int) -> Pixels:
        """The image as evaluation sees it, uint8 [S, S, 3]; raises `BadImageError`."""
        return square_pixels(self.original(index), self.image_size, self.framing)

    def label(self, index: int) -> int:
        """The class; -1 where the image can't be read and nothing else tells."""
        label = self._label(index)
        if label >= len(self.class_names):
            raise UserError(
                f"Image {index} of {self.name} has the label {label} and there are {len(self.class_names)} class "
                "names: give the dataset the attribute `classes`."
            )
        return label

    def _label(self, index: int) -> int:
        if index not in self._labels:
            try:
                self.original(index)
            except BadImageError:
                self._labels[index] = -1
        return self._labels[index]

    def picture_name(self, index: int) -> str:
        """The place in the dataset; a dataset's own file names may be absolute paths."""
        return f"{index:06d}"

    def original(self, index: int) -> Image.Image:
        """The image in RGB, of any size; raises `BadImageError`."""
        try:
            item = self.dataset[index]
        except BadImageError:
            raise
        except (
            OSError
        ) as error:  # what Pillow raises on a damaged file, and the system on a missing one
            raise BadImageError(self.picture_name(index), f"it can't be read ({error})") from error
        if not (
            isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], Image.Image)
        ):
            raise UserError(
                f"Items of {self.name} must be pairs of a PIL image and a label: leave out its transform, the model's "
                "own is applied here."
            )
        self._labels.setdefault(
            index, max(-1, int(item[1]))
        )  # so that a label costs no second decoding
        return upright_rgb(item[0], self.picture_name(index))


class View:
    """Some images of another set; label l becomes `new_label[l]` of `class_names`. None: as theirs."""

    def __init__(
        self,
        pictures: PictureSet,
        indices: Sequence[int],
        class_names: tuple[str, ...] | None = None,
        new_label: Sequence[int] | None = None,
        name: str | None = None,
    ) -> None:
        self.pictures, self.indices = pictures, indices
        self.new_label = range(len(pictures.class_names)) if new_label is None else new_label
        self.class_names = pictures.class_names if class_names is None else class_names
        self.name, self.part_names = name or pictures.name, pictures.part_names

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Pixels:
        """The image, uint8 [S, S, 3]; raises `BadImageError`."""
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


class Remembered(View):
    """Another set whose images are read or drawn once only, as long as they fit into memory."""

    def __init__(self, pictures: PictureSet, max_bytes: int = 512 << 20) -> None:
        super().__init__(pictures, range(len(pictures)))
        self.left = max_bytes
        self.kept: dict[int, Pixels] = {}

    def image(self, index: int) -> Pixels:
        """The image, uint8 [S, S, 3]; raises `BadImageError`."""
        if index in self.kept:
            return self.kept[index]
        pixels = super().image(index)
        if pixels.nbytes <= self.left:
            self.kept[index], self.left = pixels, self.left - pixels.nbytes
        return pixels


def labels_in(
    own: tuple[str, ...], wanted: Sequence[str] | None
) -> tuple[tuple[str, ...], list[int]]:
    """The class names to use, and for each label of the data its number among the model's classes.

    -1: the model has no such class. The data keeps its own names where the model knows none of them, or has no names
    (None). Case and underscores count only where two classes of the data, or of the model, differ in nothing else.
    """
    exact = {escape_controls(name): number for number, name in enumerate(wanted or ())}
    folded = {_plain(name): number for number, name in enumerate(wanted or ())}
    count, own_count = Counter(map(_plain, wanted or ())), Counter(map(_plain, own))
    loose = {name: number for name, number in folded.items() if count[name] == own_count[name] == 1}
    numbers = [exact.get(escape_controls(name), loose.get(_plain(name), -1)) for name in own]
    if wanted is None or all(number < 0 for number in numbers):
        return own, list(range(len(own)))
    strangers = [name for name, number in zip(own, numbers, strict=True) if number < 0]
    if strangers:
        warnings.warn(
            f"{len(strangers)} of {len(own)} classes of the data are none of the model's, and their images count as "
            f"unlabelled: {', '.join(strangers[:5])}",
            DataWarning,
            stacklevel=4,
        )
    return tuple(wanted), numbers


def _plain(name: str) -> str:
    return escape_controls(name).casefold().replace("_", " ")


def balanced_subset(pictures: PictureSet, limit: int, seed: int) -> list[int]:
    """Indices of `limit` images, in order: classes take turns, each in the order of a hash of (seed, name).

    Hence a class has one image more than another at most, unless it runs out, and subsets of growing size nest.
    """
    members: dict[int, list[tuple[bytes, int]]] = defaultdict(list)
    for index in range(len(pictures)):
        key = hashlib.sha256(name_bytes(f"{seed}:{pictures.picture_name(index)}")).digest()
        members[pictures.label(index)].append((key, index))
    turns = [
        (turn, label, index)
        for label, keyed in members.items()
        for turn, (_, index) in enumerate(sorted(keyed))
    ]
    return sorted(index for _, _, index in sorted(turns)[:limit])


def original_image(pictures: PictureSet, index: int, short_side: int) -> Image.Image | None:
    """An image in RGB as it was before it became S x S; None where the set has nothing larger.

    It will be shrunk to `short_side` pixels: a large photo may come reduced, see `safe_open`, which says what it
    raises.
    """
    if isinstance(pictures, View):
        return original_image(pictures.pictures, pictures.indices[index], short_side)
    if isinstance(pictures, FromDataset):
        return pictures.original(index)
    if isinstance(pictures, Collected):
        collection, sample = pictures.collection, pictures.samples[index]
        if isinstance(collection, DrawnCollection):
            return collection.draw(sample, short_side)
        return collection.open(sample, short_side)
    return None


def aligned_pictures(pictures: PictureSet, trace: RoutingTrace) -> PictureSet:
    """The images in the order of the trace, without those that could not be read when it was collected."""
    names = [pictures.picture_name(index) for index in range(len(pictures))]
    if tuple(names) == trace.picture_names:
        return pictures
    place = {name: index for index, name in enumerate(names)}
    missing = [name for name in trace.picture_names if name not in place]
    if missing:
        raise UserError(
            f"The trace is of other images ({missing[0]} is not among {pictures.name}): give those it is of."
        )
    return View(pictures, [place[name] for name in trace.picture_names])


def read_images(pictures: PictureSet, indices: Iterable[int | np.integer[Any]]) -> Pixels:
    """Images by index, uint8 [B, S, S, 3]."""
    return np.stack([pictures.image(int(index)) for index in indices])


def patch_crop(image: Pixels, grid: tuple[int, int], patch: int, context: int = 1) -> Pixels:
    """A patch (row-major index) with `context` patches on each side, always in the middle of its crop.

    Where the surroundings leave the image it is mirrored at its edge, so that all crops have one size and the patch
    covers the same part of each: the middle 1 / (1 + 2 · context) of either side. Patches have to tile the image.
    """
    rows, columns = grid
    height, width = image.shape[0] // rows, image.shape[1] // columns
    if (
        (height * rows, width * columns) != image.shape[:2]
        or not 0 <= patch < rows * columns
        or context < 0
    ):
        raise UserError(
            f"There is no patch {patch} in a grid of {rows} x {columns} on {image.shape[0]} x {image.shape[1]} px: the "
            f"grid does not tile the image, or its patches are 0 to {rows * columns - 1}."
        )
    top, left = patch // columns * height, patch % columns * width
    margin = ((context * height, context * height), (context * width, context * width), (0, 0))
    padded = np.pad(
        image, margin, mode="symmetric"
    )  # so the window starts at the patch's own place
    return padded[
        top : top + (1 + 2 * context) * height, left : left + (1 + 2 * context) * width
    ].copy()


def run_folder(address: str) -> Path | None:
    """The run folder that a model lies in, given either of them; None for a model without a run."""
    path = Path(address)
    candidates = (path, path.resolve().parent)
    return next((folder for folder in candidates if (folder / "config.yaml").is_file()), None)


def data_settings(run: Path) -> Mapping[str, Any]:
    """What a run's newest configuration says about its data; empty where it says nothing."""
    file = newest_config(run)
    try:
        data = read_yaml(file)["data"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} can't be read ({type(error).__name__}): fix it or move it away."
        ) from error
    return data if isinstance(data, dict) else {}


@dataclass(frozen=True)
class FoundImages:
    """Which images there are for a model; none is read yet."""

    path: str  # where they are, or a dataset's name
    run: (
        Path | None
    )  # the run that was trained on them and whose split holds; None: these are other images
    settings: Mapping[
        str, Any
    ]  # what the config of the model's run says about its data; empty without a run
    collection: Collection | None = None  # all of them, where they were listed to know that

    def open(
        self,
        model: SavedModel,
        *,
        split: str = "test",
        limit: int | None = None,
        root: str | None = None,
    ) -> PictureSet:
        """The images as the model sees them; see `pictures_for`."""
        seed = int(self.settings.get("seed") or 0)
        where = root or str(self.settings.get("root") or "data")
        columns = (None, None) if self.run is None else _columns(self.settings)
        try:
            collection = self.collection or open_collection(
                self.path,
                root=where,
                download=False,
                image_size=model.image_size,
                seed=seed,
                columns=columns,
            )
            of_model = self.path, model.image_size, model.framing
            pictures = _from_collection(collection, *of_model, split, seed, self.run)
            return _viewed(pictures, limit, seed, model.class_names)
        except UserError as error:
            trained = self.run is not None and self.collection is None
            hint = " (the run was trained on it; --data names other images)" if trained else ""
            raise UserError(f"{str(error).rstrip('.')}{hint}.") from error


def find_images(address: str, data: str | None = None) -> FoundImages | None:
    """The images for a model: `data`, or else what its run was trained on; None if neither says which.

    `data` may be the run's own, however its path is written, or a copy of it. A copy holds the images that the run's
    splits.csv lists, as large as in the run's own folder if that is still there: a split of its own would test with
    images of the training.
    """
    run, data = run_folder(address), data or None
    settings = {} if run is None else data_settings(run)
    path = settings.get("path")
    if data is None and path is None:
        return None
    if data is None or (path is not None and _is_place(str(path), data)):
        return FoundImages(str(path), run, settings)
    if run is None or path is None or data in DATASET_NAMES or not (run / "splits.csv").is_file():
        return FoundImages(data, None, settings)

    def listed(place: str) -> Collection:
        return open_collection(place, image_size=1, sizes={}, columns=_columns(settings))

    try:
        collection, original = listed(data), Path(str(path)).expanduser()
        if is_copy(
            run / "splits.csv", collection, lambda: listed(str(path)) if original.exists() else None
        ):
            warnings.warn(
                f"{data} has all images that {run} lists, and is taken for a copy of them: it is split as the run was",
                DataWarning,
                stacklevel=2,
            )
            return FoundImages(data, run, settings, collection)
    except UserError:  # whoever opens the images will say why
        return FoundImages(data, None, settings)
    # The columns of the run's table are not those of another.
    return FoundImages(
        data, None, settings, collection if _columns(settings) == (None, None) else None
    )


def _is_place(path: str, data: str) -> bool:
    if path in DATASET_NAMES:
        return data == path
    return Path(path).expanduser().resolve() == Path(data).expanduser().resolve()


def _columns(settings: Mapping[str, Any]) -> tuple[str | None, str | None]:
    return settings.get("image_column"), settings.get("label_column")


def pictures_for(
    address: str,
    model: SavedModel,
    data: str | None = None,
    *,
    limit: int | None = None,
    root: str | None = None,
) -> PictureSet | None:
    """Test images for a model at an address: of `data`, or else of what its run was trained on.

    The options are those of `open_pictures`. None if neither `data` nor a run says which.
    """
    found = find_images(address, data)
    return None if found is None else found.open(model, limit=limit, root=root)
