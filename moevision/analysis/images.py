"""`PictureSet`: labelled images as the model sees them, opened as training and testing open them.

Whatever the images come from (a folder, a dataset by name, a torch dataset, a run's held-out test set), they go through
the data package: the same split, the same decoding, the same central square.

Axes: S = ``image_size``; a patch is an index into the row-major grid of rows x columns.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from moevision.analysis.trace import RoutingTrace
from moevision.config import CROP, Framing
from moevision.data.collection import (
    SPLITS,
    Collection,
    DrawnCollection,
    FileCollection,
    Sample,
    interleave_by_class,
)
from moevision.data.emoji import DrawnImages
from moevision.data.folder import DATASET_NAMES
from moevision.data.images import BadImageError, upright_rgb
from moevision.data.named import open_collection
from moevision.data.splits import SplitSettings, is_copy, make_splits, read_splits
from moevision.data.transforms import square_pixels
from moevision.errors import DataWarning, UserError, escape_controls, name_bytes
from moevision.files import newest_config
from moevision.models.io import SavedModel
from moevision.models.safe_files import read_yaml
from moevision.types import Pixels


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
        data: `emoji`, another dataset's name (`cifar10`, ...), a folder with one subfolder per class (also
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
    if isinstance(data, PictureSet):
        pictures = data
    elif isinstance(data, DrawnImages):  # drawn again at the model's size, with its part masks
        kind = type(data)
        drawn = DrawnCollection.of(kind, image_size, data.seed, {data.split: len(data)})
        name = f"{kind.name}, {data.split} set, seed {data.seed}"
        pictures = CollectionPictures(drawn, drawn.samples[data.split], image_size, name)
    elif isinstance(data, str | Path):
        collection = open_collection(
            str(data),
            root=str(root),
            download=download,
            image_size=image_size,
            seed=seed,
            columns=columns,
        )
        pictures = CollectionPictures.of_split(
            collection,
            path=str(data),
            image_size=image_size,
            framing=framing,
            split=split,
            seed=seed,
            run_dir=run_dir,
        )
    else:
        dataset = DatasetCollection(data, class_names)
        samples = dataset.samples["all"]
        pictures = CollectionPictures(dataset, samples, image_size, dataset.name, framing)
    return _limited(pictures, limit, seed, class_names)


def _limited(
    pictures: PictureSet, limit: int | None, seed: int, class_names: Sequence[str] | None
) -> PictureSet:
    """The images with the model's labels, at most `limit` of them."""
    if limit is None:
        limit = len(pictures)
    names, new_label = labels_in(pictures.class_names, class_names)
    if limit < len(pictures):
        indices = balanced_subset(pictures, limit, seed)
        name = f"{pictures.name}, {limit} of {len(pictures)} images"
        return View(pictures, indices, names, new_label, name)
    if names != pictures.class_names:
        return View(pictures, None, names, new_label)
    return pictures


@dataclass(eq=False)
class CollectionPictures:
    """Images of a collection; see `PictureSet` for the attributes. Nothing is read before an image is asked for."""

    collection: Collection
    samples: Sequence[Sample]
    image_size: int
    name: str
    framing: Framing = CROP
    names: Sequence[str] | None = None  # of the classes; the collection's if None

    def __post_init__(self) -> None:
        self.class_names = tuple(self.names or self.collection.class_names)
        self.part_names: tuple[str, ...] = ()
        if isinstance(self.collection, DrawnCollection):
            self.part_names = self.collection.part_names

    @classmethod
    def of_split(
        cls,
        collection: Collection,
        *,
        path: str,
        image_size: int,
        framing: Framing,
        split: str,
        seed: int,
        run_dir: str | Path | None,
    ) -> CollectionPictures:
        """One split of the collection at a path, or all its images; see `open_pictures`."""
        if split not in (*SPLITS, "all"):
            raise UserError(f"There is no split {split!r}: choose one of {', '.join(SPLITS)}, all.")
        class_names = collection.class_names
        notes = list(collection.notes)
        if split == "all":
            samples = [sample for part in collection.samples.values() for sample in part]
            part_name = "all images"
        else:
            table = None if run_dir is None else Path(run_dir) / "splits.csv"
            if table is not None and table.exists():
                splits, class_names = read_splits(table, collection)
            else:
                splits = make_splits(collection, SplitSettings(seed=seed))
            if split not in splits.samples:
                choices = ", ".join(splits.samples)
                raise UserError(
                    f"There is no {split} set in this data: choose one of {choices}, all."
                )
            samples = splits.samples[split]
            part_name = f"{split} set"
            notes += splits.warnings
        for note in notes:
            warnings.warn(note, DataWarning, stacklevel=4)
        if isinstance(collection, FileCollection):  # a name without the way to it
            path = escape_controls(Path(path).expanduser().resolve().name)
        name = f"{path}, {part_name}, seed {seed}"
        return cls(collection, samples, image_size, name, framing, class_names)

    def __len__(self) -> int:
        return len(self.samples)

    def image(self, index: int) -> Pixels:
        """The image as evaluation sees it, uint8 [S, S, 3]; raises `BadImageError`."""
        image = self.collection.open(self.samples[index], self.image_size)
        return square_pixels(image, self.image_size, self.framing)

    def label(self, index: int) -> int:
        """The class; -1 if it isn't known."""
        return self.samples[index].label

    def picture_name(self, index: int) -> str:
        """The path relative to the collection, `split/number`, or the number in a torch dataset."""
        return self.samples[index].sample_id

    def part_mask(self, index: int) -> Pixels | None:
        """The part at each pixel of a drawn image, uint8 [S, S]."""
        if not isinstance(self.collection, DrawnCollection):
            return None
        return self.collection.part_mask(self.samples[index])


class DatasetCollection(Collection):
    """A torch dataset of (PIL image, label); a sample's id is its index, since file names may be absolute paths.

    Labels are taken from its `targets` (as torchvision's datasets have them) or, image by image, from its items: -1
    where one can't be read. Class names are its `classes`, or else the model's.
    """

    def __init__(self, dataset: Any, class_names: Sequence[str] | None) -> None:
        self.dataset = dataset
        self.name = type(dataset).__name__
        if not hasattr(dataset, "__len__"):
            raise UserError(
                f"{self.name} is no set of images: give a folder, a dataset's name, or a torch dataset with a length "
                "whose items are (PIL image, label)."
            )
        size = len(dataset)
        labels = getattr(dataset, "targets", None)
        if labels is None or len(labels) != size:
            labels = [self._label(index) for index in range(size)]
        labels = [int(label) for label in labels]
        highest = max(labels, default=-1)
        names = getattr(dataset, "classes", None) or class_names
        if names is None:
            names = [f"class {label}" for label in range(highest + 1)]
        if highest >= len(names):
            raise UserError(
                f"Image {labels.index(highest)} of {self.name} has the label {highest} and there are {len(names)} "
                "class names: give the dataset the attribute `classes`."
            )
        samples = [Sample(f"{index:06d}", label) for index, label in enumerate(labels)]
        super().__init__([escape_controls(str(name)) for name in names], {"all": samples})

    def _label(self, index: int) -> int:
        try:
            _, label = self._item(index)
        except BadImageError:
            return -1
        return max(-1, label)

    def _item(self, index: int) -> tuple[Image.Image, int]:
        try:
            item = self.dataset[index]
        except OSError as error:  # of Pillow on a damaged file, of the system on a missing one
            raise BadImageError(f"{index:06d}", f"it can't be read ({error})") from error
        is_pair = isinstance(item, tuple | list) and len(item) == 2
        if not is_pair or not isinstance(item[0], Image.Image):
            raise UserError(
                f"Items of {self.name} must be pairs of a PIL image and a label: leave out its transform, the model's "
                "own is applied here."
            )
        return item[0], int(item[1])

    def open(self, sample: Sample, short_side: int | None = None) -> Image.Image:
        """The image in RGB, of any size; raises `BadImageError`."""
        image, _ = self._item(int(sample.sample_id))
        return upright_rgb(image, sample.sample_id)

    def stored(self, sample: Sample) -> bytes:
        """The bytes of the pixels."""
        return self.open(sample).tobytes()


class View:
    """Some images of another set, or all; label l becomes `new_label[l]` of `class_names`. None: as theirs.

    Images are kept in memory up to `cache_bytes`, so that each is read or drawn once.
    """

    def __init__(
        self,
        pictures: PictureSet,
        indices: Sequence[int] | None = None,
        class_names: tuple[str, ...] | None = None,
        new_label: Sequence[int] | None = None,
        name: str | None = None,
        cache_bytes: int = 0,
    ) -> None:
        self.pictures = pictures
        self.indices = range(len(pictures)) if indices is None else indices
        self.class_names = class_names or pictures.class_names
        self.new_label = new_label
        self.name = name or pictures.name
        self.part_names = pictures.part_names
        self.cache_bytes = cache_bytes
        self._cache: dict[int, Pixels] = {}

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Pixels:
        """The image, uint8 [S, S, 3]; raises `BadImageError`."""
        if index in self._cache:
            return self._cache[index]
        pixels = self.pictures.image(self.indices[index])
        if pixels.nbytes <= self.cache_bytes:
            self._cache[index] = pixels
            self.cache_bytes -= pixels.nbytes
        return pixels

    def label(self, index: int) -> int:
        """The class, an index into `class_names`; -1 if it isn't known."""
        label = self.pictures.label(self.indices[index])
        if label < 0 or self.new_label is None:
            return label
        return self.new_label[label]

    def picture_name(self, index: int) -> str:
        """The name in the other set."""
        return self.pictures.picture_name(self.indices[index])

    def part_mask(self, index: int) -> Pixels | None:
        """The part at each pixel, uint8 [S, S]; None without parts."""
        return self.pictures.part_mask(self.indices[index])


def cached(pictures: PictureSet, max_bytes: int = 512 << 20) -> View:
    """The same images, each read or drawn once, as long as they fit into memory."""
    return View(pictures, cache_bytes=max_bytes)


def labels_in(
    data_names: tuple[str, ...], model_names: Sequence[str] | None
) -> tuple[tuple[str, ...], list[int]]:
    """The class names to use, and for each label of the data its number among the model's classes.

    -1: the model has no such class. The data keeps its own names where the model knows none of them, or has no names
    (None). Case and underscores count only where two classes of the data, or of the model, differ in nothing else.
    """
    if model_names is None:
        return data_names, list(range(len(data_names)))
    exact = {escape_controls(name): number for number, name in enumerate(model_names)}
    loose = {_folded(name): number for number, name in enumerate(model_names)}
    in_model = Counter(map(_folded, model_names))
    in_data = Counter(map(_folded, data_names))

    numbers = []
    for name in data_names:
        number = exact.get(escape_controls(name), -1)
        folded = _folded(name)
        if number < 0 and in_model[folded] == in_data[folded] == 1:
            number = loose[folded]
        numbers.append(number)
    unknown = [name for name, number in zip(data_names, numbers, strict=True) if number < 0]
    if len(unknown) == len(data_names):
        return data_names, list(range(len(data_names)))
    if unknown:
        warnings.warn(
            f"{len(unknown)} of {len(data_names)} classes of the data are none of the model's, and their images count "
            f"as unlabelled: {', '.join(unknown[:5])}",
            DataWarning,
            stacklevel=4,
        )
    return tuple(model_names), numbers


def _folded(name: str) -> str:
    return escape_controls(name).casefold().replace("_", " ")


def balanced_subset(pictures: PictureSet, limit: int, seed: int) -> list[int]:
    """Indices of `limit` images, in order: classes take turns, each in the order of a hash of (seed, name).

    Hence a class has one image more than another at most, unless it runs out, and subsets of growing size nest.
    """

    def label_and_hash(index: int) -> tuple[int, bytes]:
        key = name_bytes(f"{seed}:{pictures.picture_name(index)}")
        return pictures.label(index), hashlib.sha256(key).digest()

    order = sorted(range(len(pictures)), key=label_and_hash)
    turns = interleave_by_class([pictures.label(index) for index in order])
    return sorted(order[turn] for turn in turns[:limit])


def original_image(pictures: PictureSet, index: int, short_side: int) -> Image.Image | None:
    """An image in RGB as it was before it became S x S; None where the set has nothing larger.

    It will be shrunk to `short_side` pixels: a large photo may come reduced, see `safe_open`, which says what it
    raises.
    """
    if isinstance(pictures, View):
        return original_image(pictures.pictures, pictures.indices[index], short_side)
    if not isinstance(pictures, CollectionPictures):
        return None
    collection = pictures.collection
    sample = pictures.samples[index]
    if isinstance(collection, DrawnCollection):
        return collection.draw(sample, short_side)
    return collection.open(sample, short_side)


def aligned_pictures(pictures: PictureSet, trace: RoutingTrace) -> PictureSet:
    """The images in the order of the trace, without those that could not be read when it was collected."""
    names = tuple(map(pictures.picture_name, range(len(pictures))))
    if names == trace.picture_names:
        return pictures
    index_of = {name: index for index, name in enumerate(names)}
    missing = [name for name in trace.picture_names if name not in index_of]
    if missing:
        raise UserError(
            f"The trace is of other images ({missing[0]} is not among {pictures.name}): give those it is of."
        )
    return View(pictures, [index_of[name] for name in trace.picture_names])


def read_images(pictures: PictureSet, indices: Iterable[int | np.integer[Any]]) -> Pixels:
    """Images by index, uint8 [B, S, S, 3]."""
    return np.stack([pictures.image(int(index)) for index in indices])


def patch_crop(image: Pixels, grid: tuple[int, int], patch: int, context: int = 1) -> Pixels:
    """A patch (row-major index) with `context` patches on each side, always in the middle of its crop.

    Where the surroundings leave the image it is mirrored at its edge, so that all crops have one size and the patch
    covers the same part of each: the middle 1 / (1 + 2 · context) of either side. Patches have to tile the image.
    """
    rows, columns = grid
    height = image.shape[0] // rows
    width = image.shape[1] // columns
    row, column = divmod(patch, columns)
    margin_y = context * height
    margin_x = context * width
    padded = np.pad(image, ((margin_y,) * 2, (margin_x,) * 2, (0, 0)), mode="symmetric")
    # With the margin added, the window begins where the patch does in the image.
    top = row * height
    left = column * width
    crop = padded[top : top + height + 2 * margin_y, left : left + width + 2 * margin_x]
    return crop.copy()


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
class ImageSource:
    """Which images there are for a model; none is read yet."""

    path: str  # where they are, or a dataset's name
    # the run that was trained on them and whose split holds; None: these are other images
    run: Path | None
    # what the config of the model's run says about its data; empty without a run
    settings: Mapping[str, Any]

    def open(
        self,
        model: SavedModel,
        *,
        split: str = "test",
        limit: int | None = None,
        root: str | None = None,
    ) -> PictureSet:
        """The images as the model sees them; see `pictures_for`."""
        try:
            return open_pictures(
                self.path,
                model.image_size,
                framing=model.framing,
                split=split,
                limit=limit,
                seed=int(self.settings.get("seed") or 0),
                class_names=model.class_names,
                root=root or self.settings.get("root") or "data",
                run_dir=self.run,
                columns=_columns(self.settings) if self.run is not None else (None, None),
            )
        except UserError as error:
            trained_on_it = self.path == str(self.settings.get("path"))
            hint = " (the run was trained on it; --data names other images)" * trained_on_it
            raise UserError(f"{str(error).rstrip('.')}{hint}.") from error


def find_images(address: str, data: str | None = None) -> ImageSource | None:
    """The images for a model: `data`, or else what its run was trained on; None if neither says which.

    `data` may be the run's own, however its path is written, or a copy of it. A copy holds the images that the run's
    splits.csv lists, as large as in the run's own folder if that is still there: a split of its own would test with
    images of the training.
    """
    run = run_folder(address)
    settings = {} if run is None else data_settings(run)
    path = settings.get("path")
    if not data and path is None:
        return None
    if not data or (path is not None and _is_same_path(str(path), data)):
        return ImageSource(str(path), run, settings)
    other = ImageSource(data, None, settings)
    if run is None or path is None or data in DATASET_NAMES:
        return other
    table = run / "splits.csv"
    if not table.is_file():
        return other

    list_images = partial(open_collection, image_size=1, sizes={}, columns=_columns(settings))

    def original() -> Collection | None:
        return list_images(str(path)) if Path(str(path)).expanduser().exists() else None

    try:
        if not is_copy(table, list_images(data), original):
            return other
    except UserError:  # whoever opens the images will say why
        return other
    warnings.warn(
        f"{data} has all images that {run} lists, and is taken for a copy of them: it is split as the run was",
        DataWarning,
        stacklevel=2,
    )
    return ImageSource(data, run, settings)


def _is_same_path(path: str, data: str) -> bool:
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
    split: str = "test",
) -> PictureSet | None:
    """Test images for a model at an address: of `data`, or else of what its run was trained on.

    The options are those of `open_pictures`. None if neither `data` nor a run says which.
    """
    source = find_images(address, data)
    return None if source is None else source.open(model, split=split, limit=limit, root=root)
