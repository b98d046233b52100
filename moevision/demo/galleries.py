"""What the explorer knows about whole sets of images: galleries, atlases, recorded trainings, and the tabs' answers.

A gallery (some hundred images of the model's data with the routing of every patch) is collected in one background
thread, one model variant after the other, while the page is in use already. An atlas that didn't come with the model
is built from it.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from moevision.analysis.collect import collect_routing
from moevision.analysis.describe import class_expert_map, image_shares, patches_on_path
from moevision.analysis.images import PictureSet, View, cached, open_pictures, patch_crop
from moevision.analysis.information import Pixels
from moevision.analysis.intervention import Intervention
from moevision.analysis.questions import three_questions
from moevision.analysis.readings import Recording, choices_of
from moevision.analysis.trace import RoutingTrace
from moevision.data.images import BadImageError
from moevision.demo import requests as read
from moevision.demo.atlas import build_atlas, compare_by_atlas, counted_name, load_atlas
from moevision.demo.examples import LRUCache, thumbnail_uri
from moevision.demo.facts import ModelFacts, PictureFacts
from moevision.demo.models import OWN, Entry, Variant
from moevision.demo.view import top_classes
from moevision.demo.wire import RequestError, data_uri, encode_float16
from moevision.errors import UserError
from moevision.models.history import RoutingHistory

LIMIT = 400  # images of a gallery
MOST = 2000  # of a folder that the user named: all of it, as far as memory goes
CELL_PICTURES = 12
SIMILAR_PATCHES = 12
CROP_PX = 40  # small patches are shown with more of what surrounds them
_NO_PICTURES = "has no images here: start the explorer with --data DIR to give it some."
T = TypeVar("T")
Json = dict[str, Any]
Key = tuple[str, str]  # model, variant
log = logging.getLogger(__name__)


def read_into_memory(pictures: PictureSet) -> View:
    """All of the images, read into memory; those that can't be read are left out."""
    pictures, found = cached(pictures, sys.maxsize), []
    for index in range(len(pictures)):
        try:
            pictures.image(index)
        except BadImageError as error:
            log.warning("left out of the gallery: %s", error)
        else:
            found.append(index)
    return View(pictures, found)


class _StoppedError(Exception):
    """The explorer is being closed."""


class _UntilStopped(View):
    """The same images, until the explorer is closed: then each call for one ends what is being collected."""

    def __init__(self, pictures: PictureSet, stopping: threading.Event) -> None:
        super().__init__(pictures, range(len(pictures)))
        self.stopping = stopping

    def image(self, index: int) -> Pixels:
        """The image, uint8 [S, S, 3]; raises `BadImageError`."""
        if self.stopping.is_set():
            raise _StoppedError
        return super().image(index)


@dataclass(frozen=True)
class Gallery:
    """Images of a model's data with the routing of every patch."""

    pictures: PictureSet  # at most `LIMIT`, the same number of each class
    trace: RoutingTrace  # of these images, in their order

    def has(self, count: int, *classes: str) -> bool:
        """Whether there are as many images of each of these classes."""
        names, labels = self.trace.class_names, np.asarray(self.trace.labels)
        return all(
            name in names and int((labels == names.index(name)).sum()) >= count for name in classes
        )


class Galleries:
    """The galleries of all variants of all models; a model without images has stored atlases only."""

    def __init__(self, entries: Sequence[Entry], limit: int = LIMIT) -> None:
        self.entries, self.limit = list(entries), limit
        self._atlases: dict[Key, Json] = {
            key: atlas for entry in entries for key, atlas in _stored(entry)
        }
        self._galleries: dict[Key, Gallery] = {}
        self._failed: dict[Key, str] = {}
        self.stopping = threading.Event()
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
        """Stop after the image that is being read or routed, or the atlas that is being built."""
        self.stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def atlas(self, entry: Entry, variant: str) -> Json | None:
        """The atlas of a variant; None while it is being computed or if there will be none."""
        return self._unless_failed(self._atlases.get((entry.card.id, variant)), entry, variant)

    def gallery(self, entry: Entry, variant: str) -> Gallery | None:
        """The gallery of a variant; None while it is being collected or if the model has no images."""
        return self._unless_failed(self._galleries.get((entry.card.id, variant)), entry, variant)

    def status(self, entry: Entry) -> str:
        """What to say about a model without a gallery: `computing` or `no_pictures`."""
        return "computing" if entry.examples.has_pictures else "no_pictures"

    def _unless_failed(self, found: T | None, entry: Entry, variant: str) -> T | None:
        failed = self._failed.get((entry.card.id, variant))
        if found is None and failed is not None:
            raise RequestError(
                f"The images of {entry.card.title} could not be looked through: {failed}"
            )
        return found

    def _work(self) -> None:
        order = [(entry, "trained") for entry in self.entries]
        order += [
            (entry, variant)
            for entry in self.entries
            for variant in entry.variants
            if variant != "trained"
        ]
        held: dict[str, View] = {}
        for entry, variant in order:
            if entry.examples.pictures is None:
                continue
            try:
                if entry.card.id not in held:
                    limit = max(self.limit, MOST) if entry.shown else self.limit
                    chosen = open_pictures(
                        entry.examples.pictures, entry.facts.image_size, limit=limit
                    )
                    held[entry.card.id] = read_into_memory(_UntilStopped(chosen, self.stopping))
                self._collect(entry, variant, held[entry.card.id])
                self._ready(entry, variant)
            except _StoppedError:
                break
            except (
                Exception
            ) as error:  # an exception would end this thread, and nobody would see it
                log.exception("the gallery of %s, %s, could not be made", entry.card.title, variant)
                self._failed[entry.card.id, variant] = str(error) or type(error).__name__
        self._done.set()

    def _collect(self, entry: Entry, variant: str, held: View) -> None:
        key, pictures = (entry.card.id, variant), _UntilStopped(held, self.stopping)
        saved, name = entry.variants[variant].saved, entry.card.title
        # Small batches: a visitor's image waits no longer than one of them takes.
        trace = collect_routing(saved, pictures, batch_size=16, progress=False, name=name)
        self._galleries[key] = Gallery(held, trace)
        if key not in self._atlases:
            self._atlases[key] = atlas_of(trace, held)


def atlas_of(trace: RoutingTrace, pictures: PictureSet) -> Json:
    """An atlas by recorded choices alone: what training added, and what experts do, take minutes to measure."""
    maps = {layer.layer: class_expert_map(trace, layer.layer) for layer in trace.layers}
    choices = Recording(
        np.asarray(trace.labels), [choices_of(layer) for layer in trace.layers], trace.class_names
    )
    return build_atlas(trace, pictures, maps, questions=three_questions(choices))


def _stored(entry: Entry) -> list[tuple[Key, Json]]:
    """The atlases that came with the model, but for those about images that can't be shown beside the entry's own."""
    files = [(name, variant.atlas) for name, variant in entry.variants.items()]
    atlases = [
        ((entry.card.id, name), load_atlas(file)) for name, file in files if file is not None
    ]
    if not atlases or not entry.examples.has_pictures:
        return atlases
    names = entry.examples.names

    def has_all(atlas: Json) -> bool:
        experts = [expert for layer in atlas["layers"] for expert in layer["experts"]]
        return all(
            patch[0] in names for expert in experts for patch in (*expert["top"], *expert["random"])
        )

    return [(key, atlas) for key, atlas in atlases if has_all(atlas)]


class AtlasPages:
    """Handlers of requests about a variant's atlas and gallery."""

    def __init__(self, entries: Mapping[str, Entry], galleries: Galleries) -> None:
        self.entries, self.galleries = entries, galleries
        # An answer with all its crops; there are as many as variants times layers.
        self._experts: LRUCache[Json] = LRUCache(64)

    def model(self, request: Mapping[str, Any]) -> tuple[Entry, Variant]:
        """The model and variant that a request names; variant `trained` if it names none."""
        entry = self.entries[
            read.choice(request, "model", tuple(self.entries), next(iter(self.entries)))
        ]
        return entry, entry.variants[
            read.choice(request, "variant", tuple(entry.variants), "trained")
        ]

    def experts(self, request: Any) -> Json:
        """A card per expert of one layer: load, patches in context, classes, parts."""
        given = read.fields(request, ("model", "variant", "layer"))
        entry, variant = self.model(given)
        layer = read.whole_number(given, "layer", variant.facts.layers, variant.facts.layers[-1])
        atlas = self.atlas(entry, variant)
        if atlas is None:
            return _waiting(self.galleries.status(entry), layer=layer, name=f"L{layer}", experts=[])
        key = (entry.card.id, variant.facts.variant, layer, id(atlas))
        return self._experts.get(
            key, lambda: self._experts_page(entry, variant.facts, layer, atlas)
        )

    def prepare(self, entry: Entry, variant: str) -> None:
        """Cut out the patches of all experts, so that nobody waits for that."""
        for layer in entry.facts.layers:
            if not self.galleries.stopping.is_set():
                self.experts({"model": entry.card.id, "variant": variant, "layer": layer})

    def atlas(self, entry: Entry, variant: Variant) -> Json | None:
        """The atlas of a variant, if it is there by now."""
        return self.galleries.atlas(entry, variant.facts.variant)

    def without(self, entry: Entry, variant: Variant, change: Intervention | None) -> Json | None:
        """What the atlas says of an expert's absence; None of any other change, and where it wasn't measured."""
        atlas = self.atlas(entry, variant)
        if atlas is None or change is None or (change.kind, change.fill) != ("ablate", "next_best"):
            return None
        layer = next(one for one in atlas["layers"] if one["layer"] == change.layer)
        found: Json | None = layer["experts"][change.expert].get("without")
        return found

    def classes(self, request: Any) -> Json:
        """Class x expert maps of all layers, and how much experts tell about classes and places."""
        entry, variant = self.model(read.fields(request, ("model", "variant")))
        atlas = self.atlas(entry, variant)
        if atlas is None:
            names = list(variant.facts.class_names)
            return _waiting(self.galleries.status(entry), n_images=0, class_names=names, layers=[])
        layers = [
            {
                "layer": layer["layer"],
                "name": layer["name"],
                **{
                    name: layer["map"][name]
                    for name in ("share", "excess", "significant", "threshold")
                },
                # What wasn't measured names the command that measures it of this model.
                "answers": [
                    {
                        **answer,
                        "sentence": answer["sentence"].replace(
                            "analyze MODEL", f"analyze {entry.address}"
                        ),
                    }
                    for answer in layer["answers"]
                ],
                "load_words": layer["load_words"],
            }
            for layer in atlas["layers"]
        ]
        note = f"Measured on {atlas['n_images']:,} images: {atlas['data']}."
        names = atlas["class_names"]
        return {
            "status": "ready",
            "n_images": atlas["n_images"],
            "class_names": names,
            "layers": layers,
            "note": note,
        }

    def compare(self, request: Any) -> Json:
        """How two classes differ in the experts they use, by the maps of the atlas."""
        given = read.fields(request, ("model", "variant", "a", "b"))
        entry, variant = self.model(given)
        a, b = (read.choice(given, name, variant.facts.class_names) for name in ("a", "b"))
        if a == b:
            raise RequestError("Choose two different classes to compare.")
        atlas = self.atlas(entry, variant)
        if atlas is None:
            raise self._without_images(entry)
        return compare_by_atlas(atlas, a, b)

    def cell(self, request: Any) -> Json:
        """The images of a class that use an expert most."""
        given = read.fields(request, ("model", "variant", "layer", "expert", "class"))
        entry, variant = self.model(given)
        layer = read.whole_number(given, "layer", variant.facts.layers)
        expert = read.whole_number(given, "expert", range(variant.facts.router(layer).num_experts))
        gallery = self._gallery(entry, variant)
        name = read.choice(given, "class", gallery.trace.class_names)
        share = image_shares(gallery.trace.layer(layer).image_takes())[:, expert]
        members = np.flatnonzero(gallery.trace.labels == gallery.trace.class_names.index(name))
        best = members[np.argsort(-share[members], kind="stable")][:CELL_PICTURES]
        pictures = [
            {
                "id": entry.examples.id_of(gallery.pictures, int(index)),
                "thumb": thumbnail_uri(gallery.pictures.image(int(index))),
                "label": name,
                "share": round(float(share[index]), 4),
            }
            for index in best
        ]
        return {"pictures": pictures}

    def mistakes(self, request: Any) -> Json:
        """Images that are called another class most often, and whose routes theirs are more like (`wrong_routes`)."""
        from moevision.analysis.report import (
            wrong_routes,
        )  # brings the figures, which no other answer needs

        entry, variant = self.model(read.fields(request, ("model", "variant")))
        gallery = self._gallery(entry, variant)
        groups = [
            {
                **{name: group[name] for name in ("label", "called", "images", "layers")},
                "pictures": [
                    {
                        "id": entry.examples.id_of(gallery.pictures, index),
                        "thumb": thumbnail_uri(gallery.pictures.image(index)),
                    }
                    for index in group["index"][:CELL_PICTURES]
                ],
            }
            for group in wrong_routes(gallery.trace)
        ]
        return {"groups": groups}

    def similar(self, request: Any) -> Json:
        """Patches of other images that took the same path of first choices."""
        given = read.fields(request, ("model", "variant", "path", "class"))
        entry, variant = self.model(given)
        path = read.path(given, variant.facts)
        gallery = self._gallery(entry, variant)
        label = None
        if given.get("class") is not None:
            label = gallery.trace.class_names.index(
                read.choice(given, "class", gallery.trace.class_names)
            )
        alike = patches_on_path(gallery.trace, path, label=label, count=SIMILAR_PATCHES)
        patches = [
            patch_json(_found(entry, gallery.pictures, image), variant.facts, patch, weight)
            for image, patch, weight in alike
        ]
        return {"patches": patches}

    def _gallery(self, entry: Entry, variant: Variant) -> Gallery:
        gallery = self.galleries.gallery(entry, variant.facts.variant)
        if gallery is None:
            raise self._without_images(entry)
        return gallery

    def _without_images(self, entry: Entry) -> RequestError:
        if self.galleries.status(entry) == "computing":
            return RequestError(
                "The images are still being looked through: try again in a few seconds.", "busy"
            )
        return RequestError(f"{entry.card.title} {_NO_PICTURES}")

    def _experts_page(self, entry: Entry, facts: ModelFacts, layer: int, atlas: Json) -> Json:
        found = next(item for item in atlas["layers"] if item["layer"] == layer)
        loads = np.array(found["loads"], np.float64)
        shares = loads / max(loads.sum(), 1)
        shown, examples = entry.examples.has_pictures, entry.examples

        def patches(listed: Sequence[Any]) -> list[Json]:
            found = [
                (examples.find(examples.id_of_name(name)), patch, weight)
                for name, _, patch, weight in listed
            ]
            return [patch_json(image, facts, patch, weight) for image, patch, weight in found]

        experts = [
            {
                "expert": item["expert"],
                "name": f"L{layer}·E{item['expert']}",
                "load_share": round(float(shares[item["expert"]]), 4),
                "ideal_share": round(1 / len(shares), 4),
                **{kind: patches(item[kind]) if shown else [] for kind in ("top", "random")},
                "classes": item["classes"],
                "parts": item["parts"],
                "called": counted_name(item),
                "without": item.get("without"),
            }
            for item in found["experts"]
        ]
        source = f"From {atlas['n_images']:,} images: {atlas['data']}."
        source += f" Patches shown are of {atlas['shown']}." if "shown" in atlas else ""
        note = (
            f"{source} The heaviest patches flatter an expert; the random ones don't."
            if shown
            else source
        )
        status = "ready" if shown else "no_pictures"
        return {
            "status": status,
            "layer": layer,
            "name": f"L{layer}",
            "experts": experts,
            "note": note,
        }


@dataclass(frozen=True, eq=False)
class Times:
    """The recorded moments of a model's training, and of that without the balance loss where it was recorded, too.

    T moments, P patches, E experts. The last moment is the model as it is carried, which the page shows with all
    numbers of a view; of the others there are weights and predictions only.
    """

    histories: dict[
        str, RoutingHistory
    ]  # by variant, `trained` first; of images that are among the model's examples
    rows: dict[str, int]  # place of each image in them, by the example's id
    about: Json  # what the page knows before it asks for an image

    @classmethod
    def of(cls, entry: Entry) -> Times | None:
        """Read the history of a model that has one; a UserError if it is damaged, or of another model or images."""
        if "trained" not in entry.histories:
            return None
        histories = {
            variant: RoutingHistory.load(file) for variant, file in entry.histories.items()
        }
        trained, examples = histories["trained"], entry.examples
        for variant, history in histories.items():
            own = history.image_names == trained.image_names and history.grid == entry.facts.grid
            if not own or not set(history.image_names) <= examples.names:
                if entry.card.id == OWN:  # it recorded images of another folder
                    return None
                file = entry.histories[variant]
                raise UserError(
                    f"{file} doesn't fit the model beside it: put back the package's own file."
                )
        rows = {examples.id_of_name(name): row for row, name in enumerate(trained.image_names)}
        labels = [examples.find(id).label for id in rows]
        about = {
            "images": list(rows),
            "total_steps": trained.total_steps,
            "pretrained": trained.pretrained,
            "tracks": {variant: _track(history, labels) for variant, history in histories.items()},
        }
        return cls(histories, rows, about)

    def of_image(self, id: str, variant: str = "trained") -> Json:
        """All moments of one image: likeliest classes, and of each layer `weights` [T, P, E] (`encode_float16`)."""
        if id not in self.rows or variant not in self.histories:
            raise RequestError(
                f"The training was not recorded for {id!r}: choose one of {', '.join(self.rows)}."
            )
        history, row = self.histories[variant], self.rows[id]
        return {
            **self.about,
            "picture": id,
            "steps": list(history.steps),
            "predictions": [
                top_classes(history.class_names, moment[row].astype("float32"))
                for moment in history.probabilities
            ],
            "layers": [
                {"layer": layer, "weights": encode_float16(weights[:, row])}
                for layer, weights in history.weights.items()
            ],
        }


def _track(history: RoutingHistory, labels: Sequence[str | None]) -> Json:
    """Over all images of a history: `right` [T] of `of`, and `loads` [L, T, E], the share of the choices of patches."""
    said = np.array(history.class_names)[history.probabilities.argmax(-1)]  # [T, I]
    taken = [
        np.count_nonzero(weights, axis=(1, 2)) for weights in history.weights.values()
    ]  # each [T, E]
    return {
        "steps": list(history.steps),
        "right": (said == np.array([label or "" for label in labels])).sum(1).tolist(),
        "of": sum(label is not None for label in labels),
        "loads": [
            np.round(own / np.maximum(own.sum(1, keepdims=True), 1), 3).tolist() for own in taken
        ],
    }


def patch_json(found: PictureFacts, facts: ModelFacts, patch: int, weight: float) -> Json:
    """A patch in context: the crop, and where in it the patch lies as fractions [x, y, width, height]."""
    rows, columns = facts.grid
    context = 2 if len(found.pixels) // max(rows, columns) * 3 < CROP_PX else 1
    side = 1 / (1 + 2 * context)
    return {
        "picture": found.id,
        "patch": patch,
        "weight": round(float(weight), 4),
        "label": found.label,
        "credit": found.credit,
        "crop": data_uri(patch_crop(found.pixels, facts.grid, patch, context), "jpeg"),
        "box": [round(value, 4) for value in (context * side, context * side, side, side)],
    }


def _found(entry: Entry, pictures: PictureSet, index: int) -> PictureFacts:
    label = pictures.label(index)
    word = pictures.class_names[label] if label >= 0 else None
    return PictureFacts(pictures.image(index), entry.examples.id_of(pictures, index), label=word)


def _waiting(status: str, **empty: Any) -> Json:
    notes = {
        "computing": "The images are being looked through.",
        "no_pictures": f"This model {_NO_PICTURES}",
    }
    return {"status": status, **empty, "note": notes[status]}
