"""The images of a run whose training kept scores (`scores.csv`): ranked lists, and every image by an id.

An id is `train/NAME`, `val/NAME` or `test/NAME`, as the page of `moevision data score` writes it into its links. It is
looked up in a table of the run's split that is made when it is first needed; no id ever becomes a path. At start only
one thing is asked: whether there is a scores.csv.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import numpy as np

from moevision.analysis.good_data.lists import SCORE_LISTS, image_id
from moevision.analysis.images import Collected, PictureSet, open_pictures, run_folder
from moevision.data.scores import FILE, Scores
from moevision.data.sources import SPLITS
from moevision.demo.wire import RequestError
from moevision.errors import DataWarning, UserError
from moevision.models.io import SavedModel
from moevision.names import csv_name

T = TypeVar("T")
SHOWN: Final = 36  # images of a list
log = logging.getLogger(__name__)


class ScoredRun:
    """A run folder with scores, its images as its model sees them.

    Args:
        run: the folder.
        model: the run's own; its class names and image size are used.
    """

    def __init__(self, run: Path, model: SavedModel) -> None:
        self.run, self._class_names, self._image_size = run, model.class_names, model.image_size
        self._lock = threading.Lock()
        self._scores: Scores | None = None
        self._pictures: PictureSet | None = None
        self._index: dict[str, int] = {}

    @classmethod
    def of(cls, address: str, model: SavedModel) -> ScoredRun | None:
        """The run of the model at that address; None where there is no run, or it kept no scores."""
        run = run_folder(address)
        return cls(run, model) if run is not None and (run / FILE).is_file() else None

    def scores(self) -> Scores:
        """The table.

        Raises:
            RequestError: if it can't be read.
        """
        with self._lock:
            if self._scores is None:
                sentence = f"The scores of this run can't be read: look at its {FILE}"
                self._scores = _told(lambda: Scores.read(self.run / FILE), sentence)
            return self._scores

    def first(self, key: str, class_name: str | None) -> tuple[list[int], int]:
        """Rows of the scores at the head of a list, and how many images it ranks; of one class, or of all.

        Raises:
            RequestError: if the scores can't be read.
        """
        scores, one = self.scores(), SCORE_LISTS[key]
        among = np.isfinite(scores.scores[one.score])
        if class_name is not None:
            among &= np.array([label == csv_name(class_name) for label in scores.labels], dtype=bool)
        return one.first(scores.scores, SHOWN, among).tolist(), int(among.sum())

    def holds(self, id: str) -> bool:
        """Whether an id is of this kind; the image need not be there."""
        return id.partition("/")[0] in SPLITS

    def place(self, id: str) -> tuple[PictureSet, int]:
        """Where an image is.

        Raises:
            RequestError: if there is none of that id, or its file is gone.
        """
        pictures = self.open()
        if id in self._index:
            return pictures, self._index[id]
        split, _, name = id.partition("/")
        if split == "train" and name in self.scores().images:
            raise gone(name)
        raise RequestError(f"There is no image {id!r} in this run: choose one of the tab Data.")

    def open(self) -> PictureSet:
        """The images of all splits; none is decoded.

        Raises:
            RequestError: if they are no longer where they were.
        """
        with self._lock:
            if self._pictures is None:
                sentence = "The images of this run can't be opened: are they still where they were when it was trained?"
                self._pictures = _told(self._open, sentence)
            return self._pictures

    def _open(self) -> PictureSet:
        from moevision.analysis.good_data.examine import images_of  # and with it what finds duplicates

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)  # at start the explorer noted what there is to note
            images = images_of(self.run)
        listed = [sample for _, sample in images.each()]
        self._index = {image_id(split, sample.sample_id): row for row, (split, sample) in enumerate(images.each())}
        pictures = Collected(images.collection, listed, self._image_size, tuple(images.class_names), "the run's images")
        return open_pictures(pictures, self._image_size, class_names=self._class_names)


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
