"""The images that a model can show: its data's, a folder's, gradio's photos, a scored run's. Is one unlike the rest?

An image is asked for by an id such as "pets/test/12", "data/cat/3.png" or "photo/lion"; those of a run whose training
kept scores (`scores.csv`) by "train/cat/7.png", too, as the page of `moevision data score` links to them. Ids are
looked up in tables; none of them ever becomes a path.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from moevision.analysis.good_data import SCORE_LISTS, image_id
from moevision.analysis.images import Collected, PictureSet, open_pictures, original_image, run_folder
from moevision.data.collection import SPLITS
from moevision.data.images import BadImageError, safe_open
from moevision.data.scores import FILE, Scores
from moevision.data.synthetic import SyntheticPets
from moevision.demo.facts import SHARP_PX, Pixels, model_input, sharp_square
from moevision.demo.wire import RequestError, data_uri
from moevision.errors import DataWarning, UserError, csv_name, shown
from moevision.models.io import SavedModel

T = TypeVar("T")
Floats = npt.NDArray[np.float64]
EXAMPLES: Final = 12
THUMB_PX: Final = 96
SHOWN: Final = 36  # images of a list
MIN_PICTURES: Final = 200
# gradio 6.31 keeps these in media_assets/images; what they show is in their names.
_PHOTOS = {"lion": "lion.jpg", "cheetah": "cheetah.jpg", "bus": "bus.png", "tower": "tower.jpg"}
_TYPICAL_SHARE: Final = 0.99
_SCALES: Final = 3
_QUANTILES: Final = (0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
_FLOOR: Final = 2e-3  # half a grey level of 255: below it an edge is rounding
_LUMA: Final = (0.299, 0.587, 0.114)  # ITU-R BT.601
log = logging.getLogger(__name__)


class Recent(Generic[T]):
    """The last few results of a slow function, by what they depend on; bounded, so memory stays flat."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._lock = threading.Lock()
        self._items: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result of `make()`, which may run twice if two threads ask at once."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
                return self._items[key]
        made = make()
        with self._lock:
            self._items[key] = made
            while len(self._items) > self.size:
                self._items.popitem(last=False)
        return made


@dataclass(frozen=True)
class Found:
    """An image with what is known about it; `pixels` are uint8 [S, S, 3] as the model sees them.

    `credit` says whose it is and under which licence, where that has to be said.
    """

    id: str
    name: str
    label: str | None
    pixels: Pixels
    credit: str | None = None


class Examples:
    """The images of a model: its data's, as it sees them (S px), and those of its run, if that kept scores.

    `credits` are of images that the package carries, by their names. They and drawn ones have no photos of gradio's
    beside them.
    """

    def __init__(
        self,
        pictures: PictureSet | None,
        image_size: int,
        credits: Mapping[str, str] | None = None,
        scored: ScoredRun | None = None,
    ) -> None:
        self.pictures, self.image_size, self.scored = pictures, image_size, scored
        drawn = pictures is not None and tuple(pictures.part_names) == SyntheticPets.parts
        self.prefix = "pets" if drawn else "data"
        self._index = {} if pictures is None else {self.id_of(pictures, index): index for index in range(len(pictures))}
        self.credits = credits or {}
        self.photos = {} if drawn or self.credits else photo_files()
        self._recent: Recent[Found] = Recent(256)
        self._sharp: Recent[str | None] = Recent(64)
        self._dropping = threading.Lock()

    @property
    def has_pictures(self) -> bool:
        """Whether there is data of the model's own kind."""
        return self.pictures is not None and len(self.pictures) > 0

    @property
    def has_sharp(self) -> bool:
        """Whether an image may have more pixels than the model sees: drawn ones are drawn at the model's size."""
        return self.prefix != "pets"

    @property
    def ids(self) -> list[str]:
        """The examples on the first screen: the first of all, then gradio's photos."""
        return self.all_ids[:EXAMPLES] + [f"photo/{name}" for name in self.photos]

    @cached_property
    def all_ids(self) -> list[str]:
        """All images of the model's data: classes take turns. `usable` takes out those that can't be used."""
        return [] if self.pictures is None else [self.id_of(self.pictures, index) for index in _spread(self.pictures)]

    def on_first_screen(self) -> list[Found]:
        """The images of `ids` that can be used."""
        return self.usable(0, EXAMPLES) + [self.find(f"photo/{name}") for name in self.photos]

    def usable(self, start: int, stop: int) -> list[Found]:
        """Images `start` to `stop` of `all_ids`; those that can't be used leave that list, and later ones move up."""
        found, bad = [], set()
        for id in self.all_ids[start:stop]:
            try:
                found.append(self.find(id))
            except UserError as error:
                log.warning("left out of the examples: %s", error)
                bad.add(id)
        if bad:
            with self._dropping:
                self.all_ids = [id for id in self.all_ids if id not in bad]
        return found

    def id_of(self, pictures: PictureSet, index: int) -> str:
        """The id of image `index` of this model's data or of a part of it."""
        return self.id_of_name(pictures.picture_name(index))

    def id_of_name(self, name: str) -> str:
        """The id of the image of that name."""
        if self.prefix == "pets":  # "test/000012", as the data package names it
            split, _, number = name.partition("/")
            return f"pets/{split}/{int(number)}"
        return f"data/{shown(name)}"  # an id goes through JSON, which has no bytes that are no UTF-8

    @property
    def names(self) -> set[str]:
        """Names of all images of the model's data."""
        return set() if self.pictures is None else set(map(self.pictures.picture_name, range(len(self.pictures))))

    def find(self, id: str) -> Found:
        """The image of that id, or RequestError if there is none."""
        return self._recent.get(id, lambda: self._open(id))

    def sharp(self, id: str) -> str | None:
        """The same part of an image as the model sees, in more pixels, as a data URI; None where there are no more."""
        return self._sharp.get(id, lambda: self._open_sharp(id))

    def _open_sharp(self, id: str) -> str | None:
        kind, _, rest = id.partition("/")
        if kind == "photo" and rest in self.photos:
            return sharp(safe_open(self.photos[rest], SHARP_PX), self.image_size)
        image = original_image(*self._place(id), SHARP_PX)
        return None if image is None else sharp(image, self.image_size)

    def thumb(self, id: str) -> str:
        """A small version as a data URI."""
        return thumb(self.find(id).pixels)

    def _open(self, id: str) -> Found:
        kind, _, rest = id.partition("/")
        if kind == "photo" and rest in self.photos:
            return Found(id, rest, None, model_input(self.photos[rest], self.image_size))
        pictures, index = self._place(id)
        label = pictures.label(index)
        word = pictures.class_names[label] if label >= 0 else None
        credit = self.credits.get(pictures.picture_name(index))
        try:
            pixels = pictures.image(index)
        except BadImageError as error:
            raise (gone(rest) if isinstance(error.__cause__, FileNotFoundError) else error) from error
        name = rest if pictures is self.pictures else id  # which says that it is a training image
        return Found(id, id if word is None else f"{word}, {name}", word, pixels, credit)

    def _place(self, id: str) -> tuple[PictureSet, int]:
        index = self._index.get(id)
        if self.pictures is not None and index is not None:
            return self.pictures, index
        if self.scored is not None and self.scored.holds(id):
            return self.scored.place(id)
        raise RequestError(f"There is no image {id!r} here: choose one of the examples.")


def sharp(image: Image.Image, image_size: int) -> str | None:
    """The central square of an image as a data URI, a JPEG of quality 85; None if it isn't larger than S."""
    square = sharp_square(image, image_size)
    return None if square is None else data_uri(square, "jpeg", quality=85, subsampling=2)


def thumb(pixels: Pixels) -> str:
    """An image, uint8 [S, S, 3], at no more than 96 px, as a data URI."""
    if len(pixels) > THUMB_PX:
        pixels = np.asarray(Image.fromarray(pixels).resize((THUMB_PX, THUMB_PX), Image.Resampling.BICUBIC))
    return data_uri(pixels, "jpeg", quality=80, subsampling=2)


@cache
def photo_files() -> dict[str, Path]:
    """Photos in the installed gradio, by what they show; empty where gradio has none."""
    spec = importlib.util.find_spec("gradio")
    if spec is None or spec.origin is None:
        return {}
    folder = Path(spec.origin).parent / "media_assets" / "images"
    return {name: folder / file for name, file in _PHOTOS.items() if (folder / file).is_file()}


def _spread(pictures: PictureSet) -> list[int]:
    of_class: dict[int, list[int]] = {}
    for index in range(len(pictures)):
        of_class.setdefault(pictures.label(index), []).append(index)
    return [index for turn in zip_longest(*of_class.values()) for index in turn if index is not None]


class ScoredRun:
    """A run folder with scores, and its images as its model sees them; nothing is opened before somebody asks."""

    def __init__(self, run: Path, model: SavedModel) -> None:
        self.run, self._class_names, self._image_size = run, model.class_names, model.image_size

    @classmethod
    def of(cls, address: str, model: SavedModel) -> ScoredRun | None:
        """The run of the model at that address; None where there is no run, or it kept no scores."""
        run = run_folder(address)
        return cls(run, model) if run is not None and (run / FILE).is_file() else None

    @cached_property
    def scores(self) -> Scores:
        """The table, or RequestError if it can't be read."""
        return _told(lambda: Scores.read(self.run / FILE), f"The scores of this run can't be read: look at its {FILE}")

    def first(self, key: str, class_name: str | None) -> tuple[list[int], int]:
        """Rows of the scores at the head of a list, and how many images it ranks; of one class, or of all."""
        scores, one = self.scores, SCORE_LISTS[key]
        among = np.isfinite(scores.scores[one.score])
        if class_name is not None:
            among &= np.array([label == csv_name(class_name) for label in scores.labels], dtype=bool)
        return one.first(scores.scores, SHOWN, among).tolist(), int(among.sum())

    def holds(self, id: str) -> bool:
        """Whether an id is of this kind; the image need not be there."""
        return id.partition("/")[0] in SPLITS

    def place(self, id: str) -> tuple[PictureSet, int]:
        """Where an image is, or RequestError if there is none of that id, or its file is gone."""
        pictures, index = self._opened
        if id in index:
            return pictures, index[id]
        split, _, name = id.partition("/")
        if split == "train" and name in self.scores.images:
            raise gone(name)
        raise RequestError(f"There is no image {id!r} in this run: choose one of the tab Data.")

    def open(self) -> PictureSet:
        """The images of all splits, none of them decoded, or RequestError if they are no longer where they were."""
        return self._opened[0]

    @cached_property
    def _opened(self) -> tuple[PictureSet, dict[str, int]]:
        sentence = "The images of this run can't be opened: are they still where they were when it was trained?"
        return _told(self._open, sentence)

    def _open(self) -> tuple[PictureSet, dict[str, int]]:
        from moevision.analysis.good_data import images_of  # and with it what finds duplicates

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)  # at start the explorer noted what there is to note
            images = images_of(self.run)
        listed = [sample for _, sample in images.each()]
        index = {image_id(split, sample.sample_id): row for row, (split, sample) in enumerate(images.each())}
        pictures = Collected(images.collection, listed, self._image_size, tuple(images.class_names), "the run's images")
        return open_pictures(pictures, self._image_size, class_names=self._class_names), index


def gone(name: str) -> RequestError:
    """What is said of an image whose file was there once."""
    return RequestError(f"The file of {name!r} is gone: bring it back, or choose another image.", "bad_image")


def _told(make: Callable[[], T], sentence: str) -> T:
    """What `make` gives; what is wrong goes to the log, since it names paths, and the sentence to the visitor."""
    try:
        return make()
    except UserError as error:
        log.warning("%s", error)
        raise RequestError(f"{sentence} The log of the server says more.") from error


@dataclass(frozen=True)
class Typical:
    """What training images look like: is another one unlike them?

    An image is summed up in F = 28 numbers that no object enters: mean and spread of its colours, how strong its edges
    are at three scales (six quantiles each), and how unevenly they lie over the image. The measure is the Mahalanobis
    distance of these numbers from those of the training images; beyond that of 99 % of them an image is called unlike.
    It notices noise, flat colour, logos, and drawings among photos or photos among drawings where their sharpness
    differs; it does not notice a strange object in a familiar photo, and at 32 pixels hardly a drawing or other photo
    beside CIFAR-10's. `benchmarks/demo/unlike.py` has the shares, beside those of the energy score (arXiv:2010.03759).

    Attributes:
        mean: [F].
        whitening: [F, F] so that `whitening @ (statistics - mean)` has unit covariance.
        threshold: squared distance beyond which 1 % of the images lie.
        image_size: side of the images in pixels; the statistics depend on it.
        n_images: how many images were measured.
    """

    mean: Floats
    whitening: Floats
    threshold: float
    image_size: int
    n_images: int

    def distance(self, pixels: npt.NDArray[np.uint8]) -> float:
        """Squared Mahalanobis distance of an image, uint8 [S, S, 3], from the typical one."""
        return float(np.square(self.whitening @ (picture_statistics(pixels) - self.mean)).sum())

    def unlike(self, pixels: npt.NDArray[np.uint8]) -> str | None:
        """Why the image is unlike the training data, in one sentence; None if it isn't."""
        if self.distance(pixels) <= self.threshold:
            return None
        return (
            f"Its colours and edges are further from the usual than in {100 * _TYPICAL_SHARE:.0f} % of the images that "
            "the model was made for, so prediction and routing may mean little here."
        )

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON; numbers with six significant digits."""

        def six(value: Any) -> Any:
            return [six(one) for one in value] if np.ndim(value) else float(f"{value:.6g}")

        found = {"mean": six(self.mean), "whitening": six(self.whitening), "threshold": six(self.threshold)}
        return {**found, "image_size": self.image_size, "n_images": self.n_images}

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> Typical:
        """The inverse of `to_json`."""
        mean, whitening = np.array(given["mean"], np.float64), np.array(given["whitening"], np.float64)
        return cls(mean, whitening, float(given["threshold"]), int(given["image_size"]), int(given["n_images"]))


def typical_of(pictures: Iterable[npt.NDArray[np.uint8]], image_size: int) -> Typical:
    """Measure what images of the training data look like, best on images that were held out.

    Of at least 200 images, uint8 [S, S, 3], every other one fixes mean and covariance, the rest the threshold: on the
    same images it would come out too low. Too few images, or another size, are a UserError.
    """
    rows = []
    for pixels in pictures:
        if pixels.shape != (image_size, image_size, 3):
            raise UserError(f"The model's images are {image_size} px square, not of shape {pixels.shape}.")
        rows.append(picture_statistics(pixels))
    if len(rows) < MIN_PICTURES:
        raise UserError(f"At least {MIN_PICTURES} images are needed to say what is typical, not {len(rows)}.")
    fitted, held_out = np.stack(rows[::2]), np.stack(rows[1::2])
    mean, scale = fitted.mean(0), np.maximum(fitted.std(0), 1e-6)
    # A hundredth of the identity keeps the inverse tame where statistics nearly determine each other.
    scaled = (fitted - mean) / scale
    correlation = scaled.T @ scaled / len(scaled) + 1e-2 * np.eye(len(mean))
    whitening = np.linalg.inv(np.linalg.cholesky(correlation)) / scale
    distances = np.square((held_out - mean) @ whitening.T).sum(1)
    return Typical(mean, whitening, float(np.quantile(distances, _TYPICAL_SHARE)), image_size, len(rows))


def picture_statistics(pixels: npt.NDArray[np.uint8]) -> Floats:
    """[F] statistics of an image, uint8 [S, S, 3] with S at least 16 pixels."""
    rgb = pixels.astype(np.float64) / 255
    colours = rgb.reshape(-1, 3)
    saturation = (colours.max(1) - colours.min(1)).mean()
    found: list[Any] = [*colours.mean(0), *np.log(colours.std(0) + 0.01), np.log(saturation + 0.01)]
    grey = rgb @ np.array(_LUMA)
    for _ in range(_SCALES):
        down, right = np.abs(np.diff(grey, axis=0)), np.abs(np.diff(grey, axis=1))
        edges = np.concatenate([down.ravel(), right.ravel()])
        found += list(np.log(np.quantile(edges, _QUANTILES) + _FLOOR))
        found.append(_unevenness(down[:, :-1] + right[:-1]))
        grey = _halved(grey)
    return np.array(found)


def _unevenness(edges: Floats) -> float:
    """Standard deviation over a 4 x 4 grid of the logarithm of mean edge strength."""
    cells = [cell for row in np.array_split(edges, 4) for cell in np.array_split(row, 4, axis=1)]
    return float(np.std([np.log(cell.mean() + _FLOOR) for cell in cells]))


def _halved(grey: Floats) -> Floats:
    height, width = grey.shape[0] // 2, grey.shape[1] // 2
    halved: Floats = grey[: 2 * height, : 2 * width].reshape(height, 2, width, 2).mean((1, 3))
    return halved
