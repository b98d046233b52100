"""The images that a model can show: its data's, a folder's, gradio's photos, a scored run's.

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
from collections.abc import Callable, Hashable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Final, Generic, TypeVar

import numpy as np
from PIL import Image

from moevision.analysis.good_data import SCORE_LISTS, image_id
from moevision.analysis.images import (
    CollectionPictures,
    PictureSet,
    open_pictures,
    original_image,
    run_folder,
)
from moevision.config import CROP, Framing
from moevision.data.collection import SPLITS, interleave_by_class
from moevision.data.images import BadImageError, safe_open
from moevision.data.scores import FILE, Scores
from moevision.data.synthetic import SyntheticPets
from moevision.demo.facts import SHARP_PX, PictureFacts, Pixels, model_input, sharp_square
from moevision.demo.wire import RequestError, data_uri
from moevision.errors import DataWarning, UserError, escape_controls, escape_csv_cell
from moevision.models.io import SavedModel

T = TypeVar("T")
EXAMPLES: Final = 12
THUMB_PX: Final = 96
SHOWN: Final = 36  # images of a list
# gradio 6.31 keeps these in media_assets/images; what they show is in their names.
_PHOTOS = {"lion": "lion.jpg", "cheetah": "cheetah.jpg", "bus": "bus.png", "tower": "tower.jpg"}
log = logging.getLogger(__name__)


class LRUCache(Generic[T]):
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
        framing: Framing = CROP,
    ) -> None:
        self.pictures, self.image_size, self.scored, self.framing = (
            pictures,
            image_size,
            scored,
            framing,
        )
        drawn = pictures is not None and tuple(pictures.part_names) == SyntheticPets.parts
        self.prefix = "pets" if drawn else "data"
        self._index = (
            {}
            if pictures is None
            else {self.id_of(pictures, index): index for index in range(len(pictures))}
        )
        self.credits = credits or {}
        self.photos = {} if drawn or self.credits else photo_files()
        self._recent: LRUCache[PictureFacts] = LRUCache(256)
        self._sharp: LRUCache[str | None] = LRUCache(64)
        self._dropping = threading.Lock()

    @property
    def has_pictures(self) -> bool:
        """Whether there is data of the model's own kind."""
        return self.pictures is not None and len(self.pictures) > 0

    @cached_property
    def all_ids(self) -> list[str]:
        """All images of the model's data: classes take turns. `usable` takes out those that can't be used."""
        if (pictures := self.pictures) is None:
            return []
        return [
            self.id_of(pictures, index)
            for index in interleave_by_class(list(map(pictures.label, range(len(pictures)))))
        ]

    def on_first_screen(self) -> list[PictureFacts]:
        """The first images that can be used, then gradio's photos."""
        return self.usable(0, EXAMPLES) + [self.find(f"photo/{name}") for name in self.photos]

    def usable(self, start: int, stop: int) -> list[PictureFacts]:
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
        return f"data/{escape_controls(name)}"  # an id goes through JSON, which has no bytes that are no UTF-8

    @property
    def names(self) -> set[str]:
        """Names of all images of the model's data."""
        return (
            set()
            if self.pictures is None
            else set(map(self.pictures.picture_name, range(len(self.pictures))))
        )

    def find(self, id: str) -> PictureFacts:
        """The image of that id, or RequestError if there is none."""
        return self._recent.get(id, lambda: self._open(id))

    def sharp(self, id: str) -> str | None:
        """The same part of an image as the model sees, in more pixels, as a data URI; None where there are no more."""

        def opened() -> str | None:
            image = self.original(id)
            return None if image is None else sharp_data_uri(image, self.image_size, self.framing)

        return self._sharp.get(id, opened)

    def original(self, id: str) -> Image.Image | None:
        """An image before the model's size; None where its data has nothing larger."""
        kind, _, rest = id.partition("/")
        if kind == "photo" and rest in self.photos:
            return safe_open(self.photos[rest], SHARP_PX)
        return original_image(*self._place(id), SHARP_PX)

    def _open(self, id: str) -> PictureFacts:
        kind, _, rest = id.partition("/")
        if kind == "photo" and rest in self.photos:
            return PictureFacts(
                model_input(self.photos[rest], self.image_size, self.framing), id, rest
            )
        pictures, index = self._place(id)
        label = pictures.label(index)
        word = pictures.class_names[label] if label >= 0 else None
        credit = self.credits.get(pictures.picture_name(index))
        try:
            pixels = pictures.image(index)
        except BadImageError as error:
            raise (
                image_gone_error(rest) if isinstance(error.__cause__, FileNotFoundError) else error
            ) from error
        name = rest if pictures is self.pictures else id  # which says that it is a training image
        return PictureFacts(
            pixels, id, id if word is None else f"{word}, {name}", word, credit=credit
        )

    def _place(self, id: str) -> tuple[PictureSet, int]:
        index = self._index.get(id)
        if self.pictures is not None and index is not None:
            return self.pictures, index
        if self.scored is not None and self.scored.holds(id):
            return self.scored.place(id)
        raise RequestError(f"There is no image {id!r} here: choose one of the examples.")


def sharp_data_uri(image: Image.Image, image_size: int, framing: Framing) -> str | None:
    """What the model sees of an image as a data URI, a JPEG of quality 85; None if the image isn't larger than S."""
    square = sharp_square(image, image_size, framing)
    return None if square is None else data_uri(square, "jpeg", quality=85, subsampling=2)


def thumbnail_uri(pixels: Pixels) -> str:
    """An image, uint8 [S, S, 3], at no more than 96 px, as a data URI."""
    if len(pixels) > THUMB_PX:
        pixels = np.asarray(
            Image.fromarray(pixels).resize((THUMB_PX, THUMB_PX), Image.Resampling.BICUBIC)
        )
    return data_uri(pixels, "jpeg", quality=80, subsampling=2)


@cache
def photo_files() -> dict[str, Path]:
    """Photos in the installed gradio, by what they show; empty where gradio has none."""
    spec = importlib.util.find_spec("gradio")
    if spec is None or spec.origin is None:
        return {}
    folder = Path(spec.origin).parent / "media_assets" / "images"
    return {name: folder / file for name, file in _PHOTOS.items() if (folder / file).is_file()}


class ScoredRun:
    """A run folder with scores, and its images as its model sees them; nothing is opened before somebody asks."""

    def __init__(self, run: Path, model: SavedModel) -> None:
        self.run, self._model = run, model

    @classmethod
    def of(cls, address: str, model: SavedModel) -> ScoredRun | None:
        """The run of the model at that address; None where there is no run, or it kept no scores."""
        run = run_folder(address)
        return cls(run, model) if run is not None and (run / FILE).is_file() else None

    @cached_property
    def scores(self) -> Scores:
        """The table, or RequestError if it can't be read."""
        return _told(
            lambda: Scores.read(self.run / FILE),
            f"The scores of this run can't be read: look at its {FILE}",
        )

    def first(self, key: str, class_name: str | None) -> tuple[list[int], int]:
        """Rows of the scores at the head of a list, and how many images it ranks; of one class, or of all."""
        scores, one = self.scores, SCORE_LISTS[key]
        among = np.isfinite(scores.scores[one.score])
        if class_name is not None:
            among &= np.array(
                [label == escape_csv_cell(class_name) for label in scores.labels], dtype=bool
            )
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
            raise image_gone_error(name)
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
            warnings.simplefilter(
                "ignore", DataWarning
            )  # at start the explorer noted what there is to note
            images = images_of(self.run)
        listed = [sample for _, sample in images]
        index = {
            image_id(split, sample.sample_id): row for row, (split, sample) in enumerate(images)
        }
        size = self._model.image_size
        pictures = CollectionPictures(
            images.collection,
            listed,
            size,
            "the run's images",
            self._model.framing,
            images.class_names,
        )
        return open_pictures(pictures, size, class_names=self._model.class_names), index


def image_gone_error(name: str) -> RequestError:
    """What is said of an image whose file was there once."""
    return RequestError(
        f"The file of {name!r} is gone: bring it back, or choose another image.", "bad_image"
    )


def _told(make: Callable[[], T], sentence: str) -> T:
    """What `make` gives; what is wrong goes to the log, since it names paths, and the sentence to the visitor."""
    try:
        return make()
    except UserError as error:
        log.warning("%s", error)
        raise RequestError(f"{sentence} The log of the server says more.") from error
