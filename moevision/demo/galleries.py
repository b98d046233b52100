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
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from moevision.analysis.collect import collect_routing
from moevision.analysis.describe import class_expert_map, image_shares
from moevision.analysis.images import PictureSet, View, cached, open_pictures, patch_crop
from moevision.analysis.intervention import Intervention
from moevision.analysis.questions import three_questions
from moevision.analysis.readings import Recording, choices_of
from moevision.analysis.trace import RoutingTrace
from moevision.data.images import BadImageError
from moevision.demo import requests as read
from moevision.demo.atlas import build_atlas, compare_by_atlas, counted_name, load_atlas
from moevision.demo.examples import thumbnail_uri
from moevision.demo.facts import ModelFacts, PictureFacts
from moevision.demo.models import Entry, Variant
from moevision.demo.view import top_classes
from moevision.demo.wire import RequestError, data_uri, encode_float16
from moevision.models.history import RoutingHistory
from moevision.types import Json, Pixels

MAX_IMAGES = 400  # of a gallery
MAX_FOLDER_IMAGES = 2000  # of a folder that the user named: all of it, as far as memory goes
CELL_PICTURES = 12
CROP_PX = 40  # small patches are shown with more of what surrounds them
_NO_PICTURES = "has no images here: start the explorer with --data DIR to give it some."
T = TypeVar("T")
log = logging.getLogger(__name__)


def read_into_memory(pictures: PictureSet, stopping: threading.Event) -> View:
    """All of the images, read into memory until `stopping` is set; those that can't be read are left out."""
    pictures = _UntilStopped(cached(pictures, sys.maxsize), stopping)
    readable = []
    for index in range(len(pictures)):
        try:
            pictures.image(index)
        except BadImageError as error:
            log.warning("left out of the gallery: %s", error)
        else:
            readable.append(index)
    return View(pictures, readable)


class _StoppedError(Exception):
    """The explorer is being closed."""


class _UntilStopped(View):
    """The same images, until the explorer is closed: then each call for one ends what is being collected."""

    def __init__(self, pictures: PictureSet, stopping: threading.Event) -> None:
        super().__init__(pictures)
        self.stopping = stopping

    def image(self, index: int) -> Pixels:
        """The image, uint8 [S, S, 3]; raises `BadImageError`."""
        if self.stopping.is_set():
            raise _StoppedError
        return super().image(index)


@dataclass(frozen=True)
class Gallery:
    """Images of a model's data with the routing of every patch."""

    pictures: PictureSet  # at most `MAX_IMAGES`, the same number of each class
    trace: RoutingTrace  # of these images, in their order

    def members(self, class_name: str) -> list[int]:
        """The images of a class, in their order."""
        names = [*self.trace.class_names, None]  # -1: not known
        return [
            index for index, label in enumerate(self.trace.labels) if names[label] == class_name
        ]


class Galleries:
    """The galleries of all variants of all models; a model without images has stored atlases only."""

    def __init__(self, entries: Sequence[Entry], limit: int = MAX_IMAGES) -> None:
        self.entries = list(entries)
        self.limit = limit
        self._atlases: dict[Variant, Json] = {}
        self._galleries: dict[Variant, Gallery] = {}
        self._errors: dict[Variant, str] = {}
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._work, name="moevision-galleries", daemon=True)
        for entry in entries:
            self._atlases |= _stored_atlases(entry)

    def start(self, ready: Callable[[Entry, Variant], None] = lambda *finished: None) -> None:
        """Begin to collect; returns at once. `ready` is called with each model and variant that is finished."""
        self._ready = ready
        self.thread.start()

    def close(self) -> None:
        """Stop after the image that is being read or routed, or the atlas that is being built."""
        self.stopping.set()
        if self.thread.is_alive():
            self.thread.join()

    def atlas(self, variant: Variant) -> Json | None:
        """The atlas of a variant; None while it is being computed or if there will be none."""
        return self._result(self._atlases, variant)

    def gallery(self, variant: Variant) -> Gallery | None:
        """The gallery of a variant; None while it is being collected or if the model has no images."""
        return self._result(self._galleries, variant)

    def _result(self, results: dict[Variant, T], variant: Variant) -> T | None:
        """What there is of a variant; a RequestError if collecting it failed."""
        if variant not in results and variant in self._errors:
            title = variant.facts.title
            error = self._errors[variant]
            raise RequestError(f"The images of {title} could not be looked through: {error}")
        return results.get(variant)

    def _work(self) -> None:
        """Collect all galleries, those of the trained models first."""
        models = [(entry, name) for entry in self.entries for name in entry.variants]
        models.sort(key=lambda model: model[1] != "trained")
        images: dict[Entry, View] = {}  # in memory
        for entry, name in models:
            if entry.examples.pictures is None:
                continue
            variant = entry.variants[name]
            try:
                if entry not in images:
                    images[entry] = self._read_images(entry, entry.examples.pictures)
                self._collect(variant, images[entry])
                self._ready(entry, variant)
            except _StoppedError:
                break
            # An exception would end this thread, and nobody would see it.
            except Exception as error:
                log.exception("the gallery of %s, %s, could not be made", entry.card.title, name)
                self._errors[variant] = str(error)

    def _read_images(self, entry: Entry, pictures: PictureSet) -> View:
        limit = self.limit
        if entry.shown:
            limit = max(limit, MAX_FOLDER_IMAGES)
        sample = open_pictures(pictures, entry.facts.image_size, limit=limit)
        return read_into_memory(sample, self.stopping)

    def _collect(self, variant: Variant, images: View) -> None:
        # Small batches: a visitor's image waits no longer than one of them takes.
        title = variant.facts.title
        trace = collect_routing(variant.saved, images, batch_size=16, progress=False, name=title)
        self._galleries[variant] = Gallery(images, trace)
        if variant not in self._atlases:
            self._atlases[variant] = atlas_of(trace, images)


def atlas_of(trace: RoutingTrace, pictures: PictureSet) -> Json:
    """An atlas by recorded choices alone: what training added, and what experts do, take minutes to measure."""
    maps = {layer.layer: class_expert_map(trace, layer.layer) for layer in trace.layers}
    choices = [choices_of(layer) for layer in trace.layers]
    recording = Recording(np.asarray(trace.labels), choices, trace.class_names)
    return build_atlas(trace, pictures, maps, questions=three_questions(recording))


def _stored_atlases(entry: Entry) -> dict[Variant, Json]:
    """The atlases that came with the model, but for those about images that can't be shown beside the entry's own."""
    atlases = {}
    for variant in entry.variants.values():
        if variant.atlas is not None:
            atlas = load_atlas(variant.atlas)
            if not entry.examples.has_pictures or _images_of(atlas) <= entry.examples.names:
                atlases[variant] = atlas
    return atlases


def _images_of(atlas: Json) -> set[str]:
    """Names of the images that an atlas shows patches of."""
    experts = [expert for layer in atlas["layers"] for expert in layer["experts"]]
    return {patch[0] for expert in experts for patch in (*expert["top"], *expert["random"])}


class AtlasPages:
    """Handlers of requests about a variant's atlas and gallery."""

    def __init__(self, entries: Mapping[str, Entry], galleries: Galleries) -> None:
        self.entries = entries
        self.galleries = galleries
        # An answer with all its crops; there are as many as variants times layers.
        self._cached_experts = lru_cache(maxsize=64)(self._experts_page)

    def experts(self, request: Any) -> Json:
        """A card per expert of one layer: load, patches in context, classes, parts."""
        entry, variant = read.model(request, self.entries, "layer")
        layers = variant.facts.layers
        layer = read.whole_number(request, "layer", layers, layers[-1])
        if self.galleries.atlas(variant) is None:
            return self._not_ready(entry, layer=layer, name=f"L{layer}", experts=[])
        return self._cached_experts(entry, variant, layer)

    def prepare(self, entry: Entry, variant: Variant) -> None:
        """Cut out the patches of all experts, so that nobody waits for that."""
        for layer in entry.facts.layers:
            if not self.galleries.stopping.is_set():
                self._cached_experts(entry, variant, layer)

    def without(self, variant: Variant, change: Intervention) -> Json | None:
        """What the atlas says of an expert's absence; None of any other change, and where it wasn't measured."""
        atlas = self.galleries.atlas(variant)
        if atlas is None or (change.kind, change.fill) != ("ablate", "next_best"):
            return None
        experts = _layer_of(atlas, change.layer)["experts"]
        result: Json | None = experts[change.expert].get("without")
        return result

    def classes(self, request: Any) -> Json:
        """Class x expert maps of all layers, and how much experts tell about classes and places."""
        entry, variant = read.model(request, self.entries)
        atlas = self.galleries.atlas(variant)
        if atlas is None:
            names = list(variant.facts.class_names)
            return self._not_ready(entry, n_images=0, class_names=names, layers=[])
        return {
            "status": "ready",
            "n_images": atlas["n_images"],
            "class_names": atlas["class_names"],
            "layers": [_class_layer(layer, entry.address) for layer in atlas["layers"]],
            "note": f"Measured on {atlas['n_images']:,} images: {atlas['data']}.",
        }

    def compare(self, request: Any) -> Json:
        """How two classes differ in the experts they use, by the maps of the atlas."""
        entry, variant = read.model(request, self.entries, "a", "b")
        class_a = read.choice(request, "a", variant.facts.class_names)
        class_b = read.choice(request, "b", variant.facts.class_names)
        if class_a == class_b:
            raise RequestError("Choose two different classes to compare.")
        atlas = self.galleries.atlas(variant)
        if atlas is None:
            raise self._no_gallery_error(entry)
        return compare_by_atlas(atlas, class_a, class_b)

    def cell(self, request: Any) -> Json:
        """The images of a class that use an expert most."""
        entry, variant = read.model(request, self.entries, "layer", "expert", "class")
        layer = read.whole_number(request, "layer", variant.facts.layers)
        num_experts = variant.facts.router(layer).num_experts
        expert = read.whole_number(request, "expert", range(num_experts))
        gallery = self._gallery(entry, variant)
        class_name = read.choice(request, "class", gallery.trace.class_names)

        shares = image_shares(gallery.trace.layer(layer).image_takes())[:, expert]  # [I]
        members = gallery.members(class_name)
        members.sort(key=lambda index: -shares[index])
        pictures = []
        for index in members[:CELL_PICTURES]:
            share = round(float(shares[index]), 4)
            thumb = _thumb(entry, gallery, index)
            pictures.append({**thumb, "label": class_name, "share": share})
        return {"pictures": pictures}

    def mistakes(self, request: Any) -> Json:
        """Images that are called another class most often, and whose routes theirs are more like (`wrong_routes`)."""
        # It brings the figures, which no other answer needs.
        from moevision.analysis.report import wrong_routes

        entry, variant = read.model(request, self.entries)
        gallery = self._gallery(entry, variant)
        groups = wrong_routes(gallery.trace)
        for group in groups:
            indices = group.pop("index")[:CELL_PICTURES]
            group["pictures"] = [_thumb(entry, gallery, index) for index in indices]
        return {"groups": groups}

    def _gallery(self, entry: Entry, variant: Variant) -> Gallery:
        gallery = self.galleries.gallery(variant)
        if gallery is None:
            raise self._no_gallery_error(entry)
        return gallery

    def _no_gallery_error(self, entry: Entry) -> RequestError:
        if entry.examples.has_pictures:
            return RequestError(
                "The images are still being looked through: try again in a few seconds.", "busy"
            )
        return RequestError(f"{entry.card.title} {_NO_PICTURES}")

    def _not_ready(self, entry: Entry, **empty: Any) -> Json:
        """The answer of a page whose atlas isn't there."""
        if entry.examples.has_pictures:
            note = "The images are being looked through."
            return {"status": "computing", **empty, "note": note}
        return {"status": "no_pictures", **empty, "note": f"This model {_NO_PICTURES}"}

    def _experts_page(self, entry: Entry, variant: Variant, layer: int) -> Json:
        atlas = self.galleries.atlas(variant)
        assert atlas is not None
        facts = variant.facts
        has_pictures = entry.examples.has_pictures
        page = _layer_of(atlas, layer)
        loads = np.array(page["loads"], np.float64)
        shares = loads / max(loads.sum(), 1)

        cards = []
        for expert in page["experts"]:
            number = expert["expert"]
            card = {
                "expert": number,
                "name": f"L{layer}·E{number}",
                "load_share": round(float(shares[number]), 4),
                "ideal_share": round(1 / len(shares), 4),
                "top": [],
                "random": [],
                "classes": expert["classes"],
                "parts": expert["parts"],
                "called": counted_name(expert),
                "without": expert.get("without"),
            }
            if has_pictures:
                card["top"] = _patches_in_context(entry, facts, expert["top"])
                card["random"] = _patches_in_context(entry, facts, expert["random"])
            cards.append(card)

        note = f"From {atlas['n_images']:,} images: {atlas['data']}."
        if "shown" in atlas:
            note += f" Patches shown are of {atlas['shown']}."
        if has_pictures:
            note += " The heaviest patches flatter an expert; the random ones don't."
        status = "ready" if has_pictures else "no_pictures"
        name = f"L{layer}"
        return {"status": status, "layer": layer, "name": name, "experts": cards, "note": note}


def _layer_of(atlas: Json, block: int | None) -> Json:
    return next(layer for layer in atlas["layers"] if layer["layer"] == block)


def _class_layer(layer: Json, address: str) -> Json:
    """A layer of an atlas as the page of classes shows it."""
    answers = []
    for answer in layer["answers"]:
        # What wasn't measured names the command that measures it of this model.
        sentence = answer["sentence"].replace("analyze MODEL", f"analyze {address}")
        answers.append({**answer, "sentence": sentence})
    return {
        "layer": layer["layer"],
        "name": layer["name"],
        **{key: layer["map"][key] for key in ("share", "excess", "significant", "threshold")},
        "answers": answers,
        "load_words": layer["load_words"],
    }


def _patches_in_context(entry: Entry, facts: ModelFacts, patches: Sequence[Any]) -> list[Json]:
    """Patches [image name, index of the image, patch, weight] with what surrounds them."""
    examples = entry.examples
    crops = []
    for name, _, patch, weight in patches:
        picture = examples.find(examples.id_of_name(name))
        crops.append(patch_json(picture, facts, patch, weight))
    return crops


def _thumb(entry: Entry, gallery: Gallery, index: int) -> Json:
    id = entry.examples.id_of(gallery.pictures, index)
    return {"id": id, "thumb": thumbnail_uri(gallery.pictures.image(index))}


@dataclass(frozen=True, eq=False)
class Times:
    """The recorded moments of a model's training.

    T moments, P patches, E experts. The last moment is the model as it is carried, which the page shows with all
    numbers of a view; of the others there are weights and predictions only.
    """

    history: RoutingHistory  # of images that are among the model's examples
    rows: dict[str, int]  # index of each image in it, by the example's id
    about: Json  # what the page knows before it asks for an image

    @classmethod
    def of(cls, entry: Entry) -> Times | None:
        """Read the history of a model that has one of its own images; a UserError if the file is damaged."""
        if entry.history is None:
            return None
        examples = entry.examples
        history = RoutingHistory.load(entry.history)
        if not set(history.image_names) <= examples.names:  # as of a run whose files are gone
            return None
        rows = {examples.id_of_name(name): row for row, name in enumerate(history.image_names)}
        labels = [examples.find(id).label for id in rows]
        about = {
            "images": list(rows),
            "total_steps": history.total_steps,
            "pretrained": history.pretrained,
            "track": _track(history, labels),
        }
        return cls(history, rows, about)

    def has(self, id: str, variant: str) -> bool:
        """Whether this image was recorded in the training, which is that of the variant `trained` alone."""
        return id in self.rows and variant == "trained"

    def of_image(self, id: str, variant: str) -> Json:
        """All moments of one image: likeliest classes, and of each layer `weights` [T, P, E] (`encode_float16`)."""
        if not self.has(id, variant):
            ids = ", ".join(self.rows)
            raise RequestError(f"The training was not recorded for {id!r}: choose one of {ids}.")
        history = self.history
        row = self.rows[id]
        names = history.class_names
        probabilities = history.probabilities[:, row].astype("float32")  # [T, C]
        layers = [
            {"layer": layer, "weights": encode_float16(weights[:, row])}
            for layer, weights in history.weights.items()
        ]
        return {
            **self.about,
            "picture": id,
            "steps": list(history.steps),
            "predictions": [top_classes(names, moment) for moment in probabilities],
            "layers": layers,
        }


def _track(history: RoutingHistory, labels: Sequence[str | None]) -> Json:
    """Over all images of a history: `right` [T] of `of`, and `loads` [L, T, E], the share of the choices of patches."""
    predictions = np.array(history.class_names)[history.probabilities.argmax(-1)]  # [T, I]
    right = predictions == np.array([label or "" for label in labels])
    loads = []
    for weights in history.weights.values():
        choices = np.count_nonzero(weights, axis=(1, 2))  # [T, E]
        shares = choices / np.maximum(choices.sum(1, keepdims=True), 1)
        loads.append(np.round(shares, 3).tolist())
    return {
        "steps": list(history.steps),
        "right": right.sum(1).tolist(),
        "of": sum(label is not None for label in labels),
        "loads": loads,
    }


def patch_json(picture: PictureFacts, facts: ModelFacts, patch: int, weight: float) -> Json:
    """A patch in context: the crop, and where in it the patch lies as fractions [x, y, width, height]."""
    patch_px = len(picture.pixels) // max(facts.grid)
    context = 2 if 3 * patch_px < CROP_PX else 1  # patches on each side
    side = round(1 / (1 + 2 * context), 4)
    start = round(context / (1 + 2 * context), 4)
    crop = patch_crop(picture.pixels, facts.grid, patch, context)
    return {
        "picture": picture.id,
        "patch": patch,
        "weight": round(float(weight), 4),
        "label": picture.label,
        "credit": picture.credit,
        "crop": data_uri(crop, format="jpeg", quality=90, subsampling=0),
        "box": [start, start, side, side],
    }
