"""`Explorer`: the answers behind the page, without gradio. Every request carries all that its answer depends on.

Nothing is kept per visitor, so visitors can't be mixed up. A handler takes the JSON of one request and returns the
JSON of its answer; `answer` turns every mistake of a visitor into `{"error": a sentence, "code": ...}`.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from moevision import __version__
from moevision.analysis.collect import network_input
from moevision.analysis.effects import ClassEffect, class_effect, effect
from moevision.analysis.good_data import SCORE_LISTS, image_id
from moevision.data.images import BadImageError
from moevision.demo import requests as read
from moevision.demo.examples import Examples, LRUCache, sharp_data_uri, thumbnail_uri
from moevision.demo.facts import MAX_ASPECT, MIN_SIDE, SHARP_PX, PictureFacts, Pixels, model_input
from moevision.demo.galleries import AtlasPages, Galleries, Times
from moevision.demo.html import links, view_html
from moevision.demo.models import Entry, Variant
from moevision.demo.view import RoutingView, Settings, route_image
from moevision.demo.wire import MAX_BYTES, MAX_PIXELS, RequestError, open_data_uri
from moevision.errors import UserError
from moevision.layers import routing_lock
from moevision.models.ood import REFUSED, answers
from moevision.words import percent

Json = dict[str, Any]
ROUTE_FIELDS = ("model", "variant", "picture", "top_k", "capacity", "intervention", "noise", "away")
CLASS_PICTURES = 50
MIN_CLASS_PICTURES = 20
MORE = 24  # further examples at a time
KEPT_VIEWS = 64  # of examples as the model was trained to route them, about 0.1 MB each
LOOK_AHEAD_S = 1.0  # that the start may take longer, so that the first examples are there
SURE = 0.8  # share of strangers from which on one is called so without "may"
FARTHER = f"It is farther from every class than {1 - REFUSED:.0%} of the validation images".replace(
    "%", " %"
)
log = logging.getLogger(__name__)


class Explorer:
    """Answers requests about some models, the first of which is shown first.

    `galleries` is what is known about their image sets; `local` says whether only this computer can see the page.
    """

    def __init__(
        self, entries: Sequence[Entry], galleries: Galleries | None = None, *, local: bool = True
    ) -> None:
        self.entries = {entry.card.id: entry for entry in entries}
        self.galleries = galleries or Galleries(entries)
        self.times = {
            entry.card.id: times for entry in entries if (times := Times.of(entry)) is not None
        }
        self.pages = pages = AtlasPages(self.entries, self.galleries)
        own = (self.boot, self.route, self.history, self.sharp, self.examples, self.data)
        more = (self.what_if, self.class_effect, self.export_html)
        tabs = (
            pages.experts,
            pages.classes,
            pages.compare,
            pages.cell,
            pages.mistakes,
            pages.similar,
        )
        self.handlers: dict[str, Callable[[Any], Json]] = {
            one.__name__: one for one in (*own, *more, *tabs)
        }
        self._class_effects: LRUCache[ClassEffect] = LRUCache(512)
        self._views: LRUCache[Json] = LRUCache(KEPT_VIEWS)
        self._unlike: LRUCache[str | None] = LRUCache(
            KEPT_VIEWS
        )  # by pixels: every control asks for the image again
        models = [_about(entry, self.times.get(entry.card.id)) for entry in entries]
        first = models[0]["examples"][:1]
        fit, mean = entries[0].examples.framing  # an own model is alone, and the bundled ones crop
        limits = {
            "max_bytes": MAX_BYTES,
            "max_pixels": MAX_PIXELS,
            "min_side": MIN_SIDE,
            "max_aspect": MAX_ASPECT,
            "fit": fit,
            "fill": f"rgb({' '.join(str(round(255 * channel)) for channel in mean)})",
        }
        self._boot: Json = {
            "version": __version__,
            "local": local,
            "models": models,
            "limits": limits,
            "links": links(),
            "default": {"model": models[0]["id"], "picture": first[0]["id"] if first else None},
        }

    def answer(self, name: str, request: Any) -> Json:
        """The answer to a request, or `{"error", "code"}`."""
        try:
            return self.handlers[name](request)
        except Exception as error:
            return error_json(error, name)

    def opened(self, name: str, request: Any) -> Any:
        """The request with its upload decoded, and as it is if it brings none.

        Decoding takes far more memory than the answer: a server lets few do it at once. Raises what `told` tells.
        """
        if not brings_image(request):
            return request
        entry, _ = self.pages.model(request)
        picture = request["picture"]
        upload = _open(picture["data"], entry.examples, with_sharp=name == "export_html")
        return {**request, "picture": {**picture, "data": upload}}

    def warm(self) -> None:
        """Run every network once, so that the first visitor doesn't wait for it; route the first model's examples."""
        models = self._boot["models"]
        asked = [
            (model, variant, one)
            for model in models
            for one in model["examples"][:1]
            for variant in model["variants"]
        ]
        for model, variant, one in asked:
            self.route(
                {
                    "model": model["id"],
                    "variant": variant,
                    "picture": {"kind": "example", "id": one["id"]},
                }
            )
        end = time.monotonic() + LOOK_AHEAD_S
        for one in models[0]["examples"]:
            if time.monotonic() < end:
                self.route(
                    {"model": models[0]["id"], "picture": {"kind": "example", "id": one["id"]}}
                )

    def boot(self, request: Any) -> Json:
        """What there is: models, their variants and examples, limits, and what to show first."""
        read.fields(request, ())
        return self._boot

    def start_boot(self) -> Json:
        """What the page needs of that to open: the examples of the first model only, unless `whole`."""
        first, *others = self._boot["models"]
        models = [first, *({**model, "examples": []} for model in others)]
        return {**self._boot, "models": models, "whole": not others}

    def start_views(self) -> list[Json]:
        """The view that the page opens with, of the first example; none where there is no image."""
        model = self._boot["models"][0]
        examples = [{"kind": "example", "id": one["id"]} for one in model["examples"][:1]]
        return [self.route({"model": model["id"], "picture": one}) for one in examples]

    def route(self, request: Any) -> Json:
        """Where every patch of an image goes: `moevision.view/2`."""
        entry, variant, found, settings = self._read(request)

        def view() -> Json:
            return self._view(entry, variant, found, settings).to_json()

        if not found.id or settings != Settings():
            return view()
        return self._views.get(
            (entry.card.id, variant.facts.variant, found.id), view
        )  # the same for everybody

    def history(self, request: Any) -> Json:
        """Where the patches of an example went at moments of the training, and what the model then made of it."""
        given = read.fields(request, ("model", "variant", "picture"))
        entry, variant = self.pages.model(given)
        if entry.card.id not in self.times:
            raise RequestError(f"The training of {entry.card.title} was not recorded.")
        return self.times[entry.card.id].of_image(
            read.image_id(given, "picture"), variant.facts.variant
        )

    def examples(self, request: Any) -> Json:
        """The next examples of a model after the first `start` ones, classes in turn, and how many there are in all."""
        given = read.fields(request, ("model", "start"))
        entry, _ = self.pages.model(given)
        examples = entry.examples
        start = read.whole_number(given, "start", range(len(examples.all_ids) + 1))
        found = examples.usable(start, start + MORE)
        return {"examples": list(map(_example, found)), "num_examples": len(examples.all_ids)}

    def sharp(self, request: Any) -> Json:
        """An example in more pixels than the model sees, as `src`; null where there are no more."""
        given = read.fields(request, ("model", "picture"))
        entry, _ = self.pages.model(given)
        return {"src": entry.examples.sharp(read.image_id(given, "picture"))}

    def data(self, request: Any) -> Json:
        """The head of a list that ranks the run's training images by a score, of all classes or of one."""
        given = read.fields(request, ("model", "list", "class"))
        entry, _ = self.pages.model(given)
        run = entry.examples.scored
        if run is None:
            raise RequestError(
                f"{entry.card.title} comes without scores of its training images, which fit leaves."
            )
        one = SCORE_LISTS[read.choice(given, "list", tuple(SCORE_LISTS))]
        wanted = (
            None
            if given.get("class") is None
            else read.choice(given, "class", entry.facts.class_names)
        )
        rows, images = run.first(one.key, wanted)
        run.open()  # if that fails, once for all of them
        scores = run.scores
        entries = [
            {
                "id": image_id("train", scores.images[row]),
                "name": scores.images[row],
                "label": scores.labels[row],
                "value": one.value(scores.scores, row),
                "right": round(float(scores.scores["correct"][row]) * int(scores.visits[row])),
                "visits": int(scores.visits[row]),
                **_thumb_or_problem(entry, image_id("train", scores.images[row])),
            }
            for row in rows
        ]
        return {"images": images, "entries": entries}

    def what_if(self, request: Any) -> Json:
        """What an intervention changes about the prediction, beside its control; `route` has the view after it."""
        _, variant, found, settings = self._read(request)
        change = settings.intervention
        if change is None:
            raise RequestError("The field 'intervention' must say what to change.")
        if settings.noise is not None:
            raise RequestError(
                "A change is measured without noise: the field 'noise' must be null."
            )
        with replace(settings, intervention=None).applied(variant.saved.net):
            return effect(variant.saved, found.pixels, change).to_json()

    def class_effect(self, request: Any) -> Json:
        """What the same intervention changes over images of a class: `class_effect`, null if there are too few.

        For an expert that is taken away, `without` has what the atlas says over test images; null where not measured.
        """
        given = read.fields(
            request, ("model", "variant", "top_k", "capacity", "intervention", "away", "class")
        )
        entry, variant = self.pages.model(given)
        settings = read.settings(given, variant.facts)
        name = read.choice(given, "class", variant.facts.class_names)
        gallery, change = (
            self.galleries.gallery(entry, variant.facts.variant),
            settings.intervention,
        )
        without = (
            self.pages.without(entry, variant, change)
            if settings == Settings(intervention=change)
            else None
        )
        if gallery is None or change is None or not gallery.has(MIN_CLASS_PICTURES, name):
            return {"class_effect": None, "without": without}
        pictures = gallery.pictures

        def measure() -> ClassEffect:
            with replace(settings, intervention=None).applied(variant.saved.net):
                return class_effect(variant.saved, pictures, name, change, limit=CLASS_PICTURES)

        key = (entry.card.id, variant.facts.variant, settings, name)
        return {"class_effect": self._class_effects.get(key, measure).to_json(), "without": without}

    def export_html(self, request: Any) -> Json:
        """The view as one HTML page that needs neither server nor network."""
        request = self.opened("export_html", request)
        entry, variant, found, settings = self._read(request)
        view = self._view(entry, variant, found, settings).to_json()
        if found.id:
            view["picture"]["sharp"] = entry.examples.sharp(found.id)
        else:
            view["picture"]["sharp"] = request["picture"]["data"].sharp
        times, kind = self.times.get(entry.card.id), variant.facts.variant
        recorded = (
            times is not None
            and settings == Settings()
            and found.id in times.rows
            and kind in times.histories
        )
        history = times.of_image(found.id, kind) if times is not None and recorded else None
        name = re.sub(
            r"[^a-z0-9]+", "-", f"{view['model']['id']} {view['picture']['name']}".lower()
        ).strip("-")
        return {
            "filename": f"moevision-{name[:80]}.html",
            "html": view_html(view, full_page=True, history=history),
        }

    def close(self) -> None:
        """Stop what runs in the background."""
        self.galleries.close()

    def _read(self, request: Any) -> tuple[Entry, Variant, PictureFacts, Settings]:
        given = read.fields(request, ROUTE_FIELDS)
        entry, variant = self.pages.model(given)
        settings = read.settings(given, variant.facts)
        return entry, variant, self._picture(entry, given.get("picture")), settings

    def _picture(self, entry: Entry, given: Any) -> PictureFacts:
        picture = read.fields(given, ("kind", "id", "data"))
        if read.choice(picture, "kind", ("example", "upload")) == "example":
            return entry.examples.find(read.image_id(picture, "id"))
        data = picture.get("data")
        if not isinstance(data, str | Upload) or not data:
            raise RequestError(
                "The field 'data' must be an image as data:image/...;base64,... text."
            )
        upload = data if isinstance(data, Upload) else _open(data, entry.examples)
        return PictureFacts(upload.pixels, name="your image")

    def _view(
        self, entry: Entry, variant: Variant, found: PictureFacts, settings: Settings
    ) -> RoutingView:
        trained = variant.facts.variant == "trained"
        asked = entry.card.id, found.label, hashlib.sha256(found.pixels.tobytes()).digest()
        picture = replace(found, unlike=self._unlike.get(asked, lambda: ood_message(entry, found)))
        return route_image(
            variant.saved,
            found.pixels,
            dense=entry.dense if trained else None,
            dense_probabilities=entry.dense_answers.get(found.id) if trained else None,
            settings=settings,
            facts=variant.facts,
            picture=picture,
        )


class Upload(NamedTuple):
    """What is needed of a visitor's image: `pixels` as the model sees it, and perhaps `sharp`, a data URI of more."""

    pixels: Pixels
    sharp: str | None


def ood_message(entry: Entry, found: PictureFacts) -> str | None:
    """What to say of an image of no class that lies too far from those of the trained model; None where not known."""
    model = entry.variants["trained"].saved
    if model.strangers is None or found.label in model.class_names:
        return None
    with torch.inference_mode(), routing_lock(model.net):
        _, distance = answers(model.net, model.strangers, network_input(model, found.pixels[None]))
    return None if float(distance) <= 1 else ood_sentence(entry.card.recognized)


def ood_sentence(recognized: float | None) -> str:
    """What is said of a stranger by a model that recognizes that share of them."""
    if recognized is not None and recognized >= SURE:
        return f"This doesn't look like the images it learned from. {FARTHER}, so its answer may mean little."
    noticed = "was not measured" if recognized is None else f"is {percent(recognized, 0)}"
    return (
        f"This may be unlike the images it learned from. {FARTHER}; "
        f"the share of such images that it notices {noticed}."
    )


def brings_image(request: Any) -> bool:
    """Whether an image must be decoded for a request."""
    picture = request.get("picture") if isinstance(request, dict) else None
    data = (
        picture.get("data")
        if isinstance(picture, dict) and picture.get("kind") == "upload"
        else None
    )
    return isinstance(data, str) and data != ""


def _open(data: str, examples: Examples, *, with_sharp: bool = False) -> Upload:
    size, framing = examples.image_size, examples.framing
    image = open_data_uri(data, max(SHARP_PX, size))
    return Upload(
        model_input(image, size, framing),
        sharp_data_uri(image, size, framing) if with_sharp else None,
    )


def error_json(error: Exception, name: str) -> Json:
    """What a visitor is told of an error of the request `name`."""
    sentence, code = str(error), "bad_request"
    if isinstance(error, RequestError):
        code = error.code
    elif isinstance(error, BadImageError):
        sentence, code = f"This image can't be used: {error.reason}.", "bad_image"
    elif not isinstance(error, UserError):
        log.error(
            "the request %s failed", name, exc_info=error
        )  # a fault of ours: the log says where
        sentence, code = (
            "The explorer stumbled over this request; its log on the server says where.",
            "internal",
        )
    return {"error": sentence, "code": code}


def _about(entry: Entry, times: Times | None) -> Json:
    facts, card = entry.facts.to_json(), entry.card
    pictures = entry.examples.pictures
    examples = entry.examples.on_first_screen()
    return {
        **{
            name: value for name, value in facts.items() if name not in ("variant", "accuracy_text")
        },
        "subtitle": card.subtitle,
        "variants": list(entry.variants),
        "accuracy_texts": {
            name: variant.facts.accuracy_text for name, variant in entry.variants.items()
        },
        "has_dense": entry.dense is not None or bool(entry.dense_answers),
        "has_pictures": entry.examples.has_pictures,
        "has_parts": pictures is not None and bool(pictures.part_names),
        "card": vars(card),
        "history": None if times is None else times.about,
        "shown": entry.shown,
        "num_examples": len(entry.examples.all_ids),
        "score_lists": [
            {"key": one.key, "name": one.name, "title": one.title, "about": one.about}
            for one in (SCORE_LISTS.values() if entry.examples.scored else ())
        ],
        "examples": list(map(_example, examples)),
    }


def _example(found: PictureFacts) -> Json:
    return {
        "id": found.id,
        "name": found.name,
        "label": found.label,
        "thumb": thumbnail_uri(found.pixels),
    }


def _thumb_or_problem(entry: Entry, id: str) -> Json:
    """A small version of an image, or why there is none."""
    try:
        return {"thumb": thumbnail_uri(entry.examples.find(id).pixels), "problem": None}
    except (BadImageError, RequestError) as error:
        return {"thumb": None, "problem": error_json(error, "data")["error"]}
