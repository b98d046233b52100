"""What the explorer knows about whole picture sets: stored atlases, and what it computes itself at start.

A gallery (some hundred pictures of the model's data with the routing of every patch) is collected in one background
thread, one model variant after the other, while the page is in use already. An atlas that didn't come with the model
is built from it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from moevision.analysis.classes import class_expert_map
from moevision.analysis.collect import collect_routing
from moevision.analysis.describe import fractions_of_parts, majority_part
from moevision.analysis.images import PictureSet, open_pictures
from moevision.analysis.specialization import specialization
from moevision.analysis.trace import RoutingTrace
from moevision.data.images import BadImageError
from moevision.demo.atlas import build_atlas, load_atlas
from moevision.demo.bundle import Entry
from moevision.demo.facts import Pixels
from moevision.demo.requests import RequestError
from moevision.demo.typical import MIN_PICTURES, Typical, typical_of

LIMIT = 400
T = TypeVar("T")
Json = dict[str, Any]
Key = tuple[str, str]  # model, variant
log = logging.getLogger(__name__)


class Held:
    """The readable ones of some pictures, kept in memory; see `PictureSet` for the attributes."""

    def __init__(self, pictures: PictureSet) -> None:
        self.class_names, self.name, self.part_names = pictures.class_names, pictures.name, pictures.part_names
        self._pictures = pictures
        self._indices: list[int] = []
        self._images: list[Pixels] = []
        for index in range(len(pictures)):
            try:
                self._images.append(pictures.image(index))
            except BadImageError as error:
                log.warning("left out of the gallery: %s", error)
            else:
                self._indices.append(index)

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self._indices)

    def image(self, index: int) -> Pixels:
        """The picture, uint8 [S, S, 3]."""
        return self._images[index]

    def label(self, index: int) -> int:
        """The class; -1 if it isn't known."""
        return self._pictures.label(self._indices[index])

    def picture_name(self, index: int) -> str:
        """Its name in the whole set."""
        return self._pictures.picture_name(self._indices[index])

    def part_mask(self, index: int) -> Pixels | None:
        """The part seen at each pixel; None without parts."""
        return self._pictures.part_mask(self._indices[index])


@dataclass(frozen=True)
class Gallery:
    """Pictures of a model's data with the routing of every patch.

    Attributes:
        pictures: at most `LIMIT`, the same number of each class.
        trace: of these pictures, in their order.
    """

    pictures: PictureSet
    trace: RoutingTrace


class Galleries:
    """The galleries of all variants of all models.

    Args:
        entries: the models; those without pictures have stored atlases only.
        limit: pictures in a gallery.
    """

    def __init__(self, entries: Sequence[Entry], limit: int = LIMIT) -> None:
        self.entries, self.limit = list(entries), limit
        self._atlases: dict[Key, Json] = {key: atlas for entry in entries for key, atlas in _stored(entry)}
        self._galleries: dict[Key, Gallery] = {}
        self._failed: dict[Key, str] = {}
        self._typical: dict[str, Typical] = {
            entry.card.id: entry.card.typical for entry in entries if entry.card.typical is not None
        }
        self._stop = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, name="moevision-galleries", daemon=True)

    def start(self, ready: Callable[[Entry, str], None] = lambda entry, variant: None) -> None:
        """Begin to collect; returns at once. `ready` is called with each model and variant that is finished."""
        self._ready = ready
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Wait until everything is collected; False if that takes longer."""
        return self._done.wait(timeout_s)

    def close(self) -> None:
        """Stop after the variant that is being collected."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def atlas(self, entry: Entry, variant: str) -> Json | None:
        """The atlas of a variant; None while it is being computed or if there will be none.

        Raises:
            RequestError: if it could not be made.
        """
        return self._unless_failed(self._atlases.get((entry.card.id, variant)), entry, variant)

    def gallery(self, entry: Entry, variant: str) -> Gallery | None:
        """The gallery of a variant; None while it is being collected or if the model has no pictures.

        Raises:
            RequestError: if it could not be made.
        """
        return self._unless_failed(self._galleries.get((entry.card.id, variant)), entry, variant)

    def status(self, entry: Entry) -> str:
        """What to say about a model without a gallery: `computing` or `no_pictures`."""
        return "computing" if entry.examples.has_pictures else "no_pictures"

    def typical(self, entry: Entry) -> Typical | None:
        """What pictures of the training data look like; None if that isn't known (yet)."""
        return self._typical.get(entry.card.id)

    def _unless_failed(self, found: T | None, entry: Entry, variant: str) -> T | None:
        failed = self._failed.get((entry.card.id, variant))
        if found is None and failed is not None:
            raise RequestError(f"The pictures of {entry.card.title} could not be looked through: {failed}")
        return found

    def _work(self) -> None:
        order = [(entry, "trained") for entry in self.entries]
        order += [(entry, variant) for entry in self.entries for variant in entry.variants if variant != "trained"]
        held: dict[str, Held] = {}
        for entry, variant in order:
            if self._stop.is_set() or entry.examples.pictures is None:
                continue
            try:
                if entry.card.id not in held:
                    held[entry.card.id] = self._hold(entry, entry.examples.pictures)
                self._collect(entry, variant, held[entry.card.id])
                self._ready(entry, variant)
            except Exception as error:  # an exception would end this thread, and nobody would see it
                log.exception("the gallery of %s, %s, could not be made", entry.card.title, variant)
                self._failed[entry.card.id, variant] = str(error) or type(error).__name__
        self._done.set()

    def _hold(self, entry: Entry, pictures: PictureSet) -> Held:
        held = Held(open_pictures(pictures, entry.facts.image_size, limit=self.limit))
        # Other data's usual look is not that of the data which the model learned from.
        if not entry.foreign and entry.card.id not in self._typical and len(held) >= MIN_PICTURES:
            images = (held.image(index) for index in range(len(held)))
            self._typical[entry.card.id] = typical_of(images, entry.facts.image_size)
        return held

    def _collect(self, entry: Entry, variant: str, held: Held) -> None:
        key = (entry.card.id, variant)
        # Small batches: a visitor's picture waits no longer than one of them takes.
        trace = collect_routing(
            entry.variants[variant].saved, held, batch_size=16, progress=False, name=entry.card.title
        )
        self._galleries[key] = Gallery(held, trace)
        stored = self._atlases.get(key)
        if stored is None or not _names(stored) <= entry.examples.names:  # about pictures that can't be shown
            self._atlases[key] = atlas_of(trace, held)


def atlas_of(trace: RoutingTrace, pictures: PictureSet) -> Json:
    """An atlas without the baselines of `measure_baselines`, which take minutes; so no verdict is given in it."""
    maps = {layer.layer: class_expert_map(trace, layer.layer) for layer in trace.layers}
    fractions = fractions_of_parts(pictures, trace.grid)
    parts = None if fractions is None else majority_part(fractions)
    return build_atlas(trace, pictures, specialization(trace, parts=parts), maps)


def _stored(entry: Entry) -> list[tuple[Key, Json]]:
    files = [(name, variant.atlas) for name, variant in entry.variants.items()]
    return [((entry.card.id, name), load_atlas(file)) for name, file in files if file is not None]


def _names(atlas: Json) -> set[str]:
    """Names of all pictures in the galleries of an atlas."""
    return {
        patch[0]
        for layer in atlas["layers"]
        for expert in layer["experts"]
        for patch in [*expert["top"], *expert["random"]]
    }
