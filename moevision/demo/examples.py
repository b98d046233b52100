"""The images that a model can show: of its data set or a folder, gradio's photos, and those of a run with scores.

An image is asked for by an id such as "pets/test/12", "data/cat/3.png" or "photo/lion"; those of a run whose training
kept scores (`scores.csv`) by "train/cat/7.png", too, as the page of `moevision data score` links to them. Ids are
looked up in tables; none of them ever becomes a path.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
from PIL import Image

from moevision.analysis.good_data import image_id
from moevision.analysis.images import (
    CollectionPictures,
    PictureSet,
    open_pictures,
    original_image,
)
from moevision.config import CROP, Framing
from moevision.data.collection import SPLITS, interleave_by_class
from moevision.data.images import BadImageError, safe_open
from moevision.data.scores import FILE, Scores
from moevision.data.synthetic import SyntheticPets
from moevision.demo.facts import SHARP_PX, PictureFacts, model_input, sharp_square
from moevision.demo.wire import RequestError, data_uri
from moevision.errors import DataWarning, UserError, escape_controls
from moevision.models.io import SavedModel
from moevision.types import Pixels

NUM_EXAMPLES = 12  # on the first screen, without gradio's photos
THUMB_PX = 96
# gradio 6.31 keeps these in media_assets/images; what they show is in their names.
_PHOTOS = {
    "photo/lion": "lion.jpg",
    "photo/cheetah": "cheetah.jpg",
    "photo/bus": "bus.png",
    "photo/tower": "tower.jpg",
}
log = logging.getLogger(__name__)


@dataclass(eq=False)
class Examples:
    """The images of a model as it sees them (S px): of its data set, and of its training run if that has scores."""

    pictures: PictureSet | None
    image_size: int
    # Author and licence of images that the package carries, by name. Beside these, and beside drawn images, none of
    # gradio's photos are shown.
    credits: Mapping[str, str] = field(default_factory=dict)
    scored: ScoredRun | None = None
    framing: Framing = CROP
    opening: str | None = None  # the id of the image that comes first, if it is among them

    def __post_init__(self) -> None:
        pictures = self.pictures
        # Only drawn images have parts.
        parts = () if pictures is None else tuple(pictures.part_names)
        self.prefix = "pets" if parts == SyntheticPets.parts else "data"
        self.photos = {} if parts or self.credits else photo_files()
        self._index: dict[str, int] = {}
        if pictures is not None:
            self._index = {self.id_of(pictures, index): index for index in range(len(pictures))}
        # Caches of the last results, bounded so that memory stays flat.
        self.find = lru_cache(256)(self._open)
        self.sharp = lru_cache(64)(self._sharp_uri)

    @property
    def has_pictures(self) -> bool:
        """Whether images of the model's data set are there."""
        return self.pictures is not None

    @cached_property
    def all_ids(self) -> list[str]:
        """Ids of the model's images, `opening` first; classes take turns. `usable` takes out what can't be read."""
        pictures = self.pictures
        if pictures is None:
            return []
        labels = list(map(pictures.label, range(len(pictures))))
        ids = [self.id_of(pictures, index) for index in interleave_by_class(labels)]
        return sorted(ids, key=lambda id: id != self.opening)

    def on_first_screen(self) -> list[PictureFacts]:
        """The first images that can be used, then gradio's photos."""
        return self.usable(0, NUM_EXAMPLES) + list(map(self.find, self.photos))

    def usable(self, start: int, stop: int) -> list[PictureFacts]:
        """Images `start` to `stop` of `all_ids`, fewer where some can't be read, which then leave that list."""
        images = []
        unusable = set()
        for id in self.all_ids[start:stop]:
            try:
                images.append(self.find(id))
            except UserError as error:
                log.warning("left out of the examples: %s", error)
                unusable.add(id)
        if unusable:
            self.all_ids = [id for id in self.all_ids if id not in unusable]
        return images

    def id_of(self, pictures: PictureSet, index: int) -> str:
        """The id of image `index` of this model's data or of some of it."""
        return self.id_of_name(pictures.picture_name(index))

    def id_of_name(self, name: str) -> str:
        """The id of the image of that name."""
        if self.prefix == "pets":  # "test/000012", as the data package names it
            split, _, number = name.partition("/")
            return f"pets/{split}/{int(number)}"
        # Ids are sent as JSON: a file name that isn't UTF-8 must be escaped.
        return f"data/{escape_controls(name)}"

    @property
    def names(self) -> set[str]:
        """Names of all images of the model's data."""
        if self.pictures is None:
            return set()
        return set(map(self.pictures.picture_name, range(len(self.pictures))))

    def original(self, id: str) -> Image.Image | None:
        """The image before it was made as small as the model's input; None where there is nothing larger."""
        photo = self.photos.get(id)
        if photo is not None:
            return safe_open(photo, SHARP_PX)
        return original_image(*self._locate(id), SHARP_PX)

    def _sharp_uri(self, id: str) -> str | None:
        """What the model sees of an image, in more pixels, as a data URI; None where there are no more."""
        image = self.original(id)
        return None if image is None else sharp_data_uri(image, self.image_size, self.framing)

    def _open(self, id: str) -> PictureFacts:
        """The image of that id, or RequestError if there is none."""
        name = id.partition("/")[2]
        photo = self.photos.get(id)
        if photo is not None:
            return PictureFacts(model_input(photo, self.image_size, self.framing), id, name)

        pictures, index = self._locate(id)
        try:
            pixels = pictures.image(index)
        except BadImageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise image_gone_error(name) from error
            raise
        title = id
        class_name = None
        class_index = pictures.label(index)
        if class_index >= 0:
            class_name = pictures.class_names[class_index]
            # Of the scored run the whole id, which begins with its split.
            title = f"{class_name}, {name if pictures is self.pictures else id}"
        credit = self.credits.get(pictures.picture_name(index))
        return PictureFacts(pixels, id, title, class_name, credit=credit)

    def _locate(self, id: str) -> tuple[PictureSet, int]:
        """The set of images that has this one, and the index there."""
        index = self._index.get(id)
        if self.pictures is not None and index is not None:
            return self.pictures, index
        if self.scored is not None and id.partition("/")[0] in SPLITS:
            return self.scored.locate(id)
        raise RequestError(f"There is no image {id!r} here: choose one of the examples.")


def sharp_data_uri(image: Image.Image, image_size: int, framing: Framing) -> str | None:
    """What the model sees of an image as a data URI, a JPEG of quality 85; None if the image isn't larger than S."""
    square = sharp_square(image, image_size, framing)
    return None if square is None else data_uri(square, format="jpeg", quality=85)


def thumbnail_uri(pixels: Pixels) -> str:
    """An image, uint8 [S, S, 3], at no more than 96 px, as a data URI."""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMB_PX, THUMB_PX))  # never enlarges
    return data_uri(np.asarray(image), format="jpeg", quality=80)


@cache
def photo_files() -> dict[str, Path]:
    """Photos in the installed gradio, by id; empty where gradio has none."""
    folder = Path(str(distribution("gradio").locate_file("gradio/media_assets/images")))
    return {id: folder / file for id, file in _PHOTOS.items() if (folder / file).is_file()}


@dataclass(eq=False)
class ScoredRun:
    """A run folder with scores, and its images as its model sees them; nothing is opened before somebody asks."""

    run: Path
    model: SavedModel

    @cached_property
    def scores(self) -> Scores:
        """The table, or RequestError if it can't be read."""
        try:
            return Scores.read(self.run / FILE)
        except UserError as error:
            message = f"The scores of this run can't be read: look at its {FILE}."
            raise _logged(error, message) from error

    def locate(self, id: str) -> tuple[PictureSet, int]:
        """Where an image is, or RequestError if there is none of that id, or its file is gone."""
        pictures, index = self._pictures_and_index
        if id in index:
            return pictures, index[id]
        split, _, name = id.partition("/")
        if split == "train" and name in self.scores.images:
            raise image_gone_error(name)
        raise RequestError(
            f"There is no image {id!r} in this run: `moevision data score` lists them."
        )

    @cached_property
    def _pictures_and_index(self) -> tuple[PictureSet, dict[str, int]]:
        """The images, and the index of each by its id; a RequestError if they can't be opened."""
        from moevision.analysis.good_data import images_of  # slow: it brings what finds duplicates

        try:
            with warnings.catch_warnings():
                # The explorer said these warnings when it was started.
                warnings.simplefilter("ignore", DataWarning)
                images = images_of(self.run)
        except UserError as error:
            message = "The images of this run can't be opened: are they still where they were when it was trained?"
            raise _logged(error, message) from error

        model = self.model
        pictures = CollectionPictures(
            images.collection,
            images.all,
            model.image_size,
            "the run's images",
            model.framing,
            images.class_names,
        )
        index = {
            image_id(split, sample.sample_id): row for row, (split, sample) in enumerate(images)
        }
        # With the labels of the model's classes.
        return open_pictures(pictures, model.image_size, class_names=model.class_names), index


def image_gone_error(name: str) -> RequestError:
    """What is said of an image whose file was there once."""
    return RequestError(
        f"The file of {name!r} is gone: bring it back, or choose another image.", "bad_image"
    )


def _logged(error: UserError, message: str) -> RequestError:
    """The error for the visitor; the cause, which names paths, goes to the log."""
    log.warning("%s", error)
    return RequestError(f"{message} The log of the server says more.")
