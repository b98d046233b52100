"""`Explorer`: the answers behind the page, without gradio. Every request carries all that its answer depends on.

Nothing is kept per visitor, so visitors can't be mixed up. A handler takes the JSON of one request and returns the
JSON of its answer; `answer` turns every mistake of a visitor into `{"error": a sentence, "code": ...}`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from moevision import __version__
from moevision.analysis.collect import network_input
from moevision.analysis.effects import (
    ClassEffect,
    answers_without,
    class_effect,
    effect,
    expert_sets,
    fewest_experts,
)
from moevision.analysis.intervention import Intervention, numbered_layers
from moevision.data.images import BadImageError
from moevision.demo import requests as read
from moevision.demo.examples import Examples, sharp_data_uri, thumbnail_uri
from moevision.demo.facts import (
    MAX_ASPECT,
    MIN_SIDE,
    SHARP_PX,
    ModelFacts,
    PictureFacts,
    model_input,
)
from moevision.demo.galleries import AtlasPages, Galleries, Times
from moevision.demo.html import links, view_html
from moevision.demo.models import Entry, Variant
from moevision.demo.requests import ImageRequest, Upload
from moevision.demo.view import Settings, route_image
from moevision.demo.wire import MAX_BYTES, MAX_PIXELS, Code, RequestError, open_data_uri
from moevision.errors import UserError
from moevision.layers import routing_lock
from moevision.models.ood import REFUSED, answers
from moevision.types import Json
from moevision.words import percent

CLASS_PICTURES = 50
MIN_CLASS_PICTURES = 20
MORE_EXAMPLES = 24  # at a time
OFFERED_EMOJI = 24  # of a class
MOST_AWAY = 3  # experts of a set that is searched
MOST_SEARCHED = 4e8  # sets times parameters: about a second of one thread
# Views of examples as the model was trained to route them, about 0.1 MB each.
CACHED_VIEWS = 64
SURE = 0.8  # share of strangers from which on one is called so without "may"
FARTHER = f"It is farther from every class than {percent(1 - REFUSED, 0)} of the validation images"
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
        self.pages = AtlasPages(self.entries, self.galleries)
        self.times = {entry.card.id: Times.of(entry) for entry in entries}

        handlers: list[Callable[[Any], Json]] = [
            self.boot,
            self.route,
            self.history,
            self.sharp,
            self.emoji,
            self.examples,
            self.what_if,
            self.fewest,
            self.class_effect,
            self.export_html,
            self.pages.experts,
            self.pages.classes,
            self.pages.compare,
            self.pages.cell,
            self.pages.mistakes,
        ]
        self.handlers = {handler.__name__: handler for handler in handlers}

        self._cached_view = lru_cache(CACHED_VIEWS)(self._view)
        self._cached_class_effect = lru_cache(512)(self._class_effect)
        # By pixels: every control asks for the image again.
        self._cached_ood_message = lru_cache(CACHED_VIEWS)(ood_message)
        self._boot = self._describe(local)

    def _describe(self, local: bool) -> Json:
        """What the page needs to know before it asks for an image."""
        models = [_about(entry, self.times[id]) for id, entry in self.entries.items()]
        first = models[0]
        examples = first["examples"]
        # A user's model is alone, and the bundled ones crop.
        framing = self.entries[first["id"]].examples.framing
        fill = [str(round(255 * channel)) for channel in framing.mean]
        limits = {
            "max_bytes": MAX_BYTES,
            "max_pixels": MAX_PIXELS,
            "min_side": MIN_SIDE,
            "max_aspect": MAX_ASPECT,
            "fit": framing.fit,
            "fill": f"rgb({' '.join(fill)})",
        }
        return {
            "version": __version__,
            "local": local,
            "models": models,
            "limits": limits,
            "links": links(),
            "default": {
                "model": first["id"],
                "picture": examples[0]["id"] if examples else None,
            },
        }

    def answer(self, name: str, request: Any) -> Json:
        """The answer to a request, or `{"error", "code"}`."""
        try:
            return self.handlers[name](self.opened(name, request))
        except Exception as error:
            return error_json(error, name)

    def opened(self, name: str, request: Any) -> Any:
        """The request with its upload decoded, and as it is if it brings none.

        Decoding takes far more memory than the answer: a server lets few do it at once. Raises what `error_json` tells.
        """
        if not brings_image(request):
            return request
        entry = read.entry(request, self.entries, *request)  # whose fields the handler will check
        picture = request["picture"]
        upload = _open(picture["data"], entry.examples, with_sharp=name == "export_html")
        return {**request, "picture": {**picture, "data": upload}}

    def warm(self) -> None:
        """Run every network once, so that the first visitor doesn't wait for it."""
        for model in self._boot["models"]:
            for example in model["examples"][:1]:
                for variant in model["variants"]:
                    self._example_view(model["id"], variant, example["id"])

    def boot(self, request: Any) -> Json:
        """What there is: models, their variants and examples, limits, and what to show first."""
        read.fields(request, ())
        return self._boot

    def start_boot(self) -> Json:
        """What the page needs of that to open: all examples of the first model, one of each other, unless `whole`."""
        first, *others = self._boot["models"]
        models = [first, *({**model, "examples": model["examples"][:1]} for model in others)]
        return {**self._boot, "models": models, "whole": not others}

    def start_views(self) -> list[Json]:
        """The view that the page opens with; none where there is no image."""
        first = self._boot["default"]
        if first["picture"] is None:
            return []
        return [self._example_view(first["model"], "trained", first["picture"])]

    def _example_view(self, model: str, variant: str, id: str) -> Json:
        picture = {"kind": "example", "id": id}
        return self.route({"model": model, "variant": variant, "picture": picture})

    def route(self, request: Any) -> Json:
        """Where every patch of an image goes: `moevision.view/2`."""
        image = read.image_request(request, self.entries)
        if image.picture.id and image.settings == Settings():  # the same for everybody
            return self._cached_view(image)
        return self._view(image)

    def history(self, request: Any) -> Json:
        """Where the patches of an example went at moments of the training, and what the model then made of it."""
        entry, variant = read.model(request, self.entries, "picture")
        times = self.times[entry.card.id]
        if times is None:
            raise RequestError(f"The training of {entry.card.title} was not recorded.")
        return times.of_image(read.text(request, "picture"), variant.facts.variant)

    def examples(self, request: Any) -> Json:
        """The next examples of a model after the first `start` ones, classes in turn, and how many there are in all."""
        examples = read.entry(request, self.entries, "start").examples
        start = read.whole_number(request, "start", range(len(examples.all_ids) + 1))
        pictures = examples.usable(start, start + MORE_EXAMPLES)
        return {
            "examples": [_example(picture) for picture in pictures],
            "num_examples": len(examples.all_ids),
        }

    def sharp(self, request: Any) -> Json:
        """An example in more pixels than the model sees, as `src`; null where there are no more."""
        examples = read.entry(request, self.entries, "picture").examples
        return {"src": examples.sharp(read.text(request, "picture"))}

    def emoji(self, request: Any) -> Json:
        """Emoji to type a page with, some of each class, and how many a page has."""
        pages = read.emoji_pages(read.entry(request, self.entries))
        known = pages.known_emoji(OFFERED_EMOJI)
        return {
            "groups": [{"name": name, "emoji": emoji} for name, emoji in known.items()],
            "fewest": read.FEWEST_EMOJI,
            "most": read.MOST_EMOJI,
        }

    def what_if(self, request: Any) -> Json:
        """What an intervention changes about the prediction, beside its control; `route` has the view after it.

        Without one, what all experts change together that are away.
        """
        image = read.image_request(request, self.entries)
        change = image.settings.intervention
        around = replace(image.settings, intervention=None)
        also: tuple[Intervention, ...] = ()
        if change is None and image.settings.ablated_experts:
            change, *others = image.settings.ablated_experts
            also = tuple(others)
            around = replace(around, ablated_experts=())
        if change is None:
            raise RequestError("The field 'intervention' must say what to change.")
        if image.settings.noise is not None:
            raise RequestError(
                "A change is measured without noise: the field 'noise' must be null."
            )
        model = image.variant.saved
        with around.applied(model.net):
            return effect(model, image.picture.pixels, change, also=also).to_json()

    def fewest(self, request: Any) -> Json:
        """The fewest experts of one layer, at most three, without which an answer changes: `away`, or null for none."""
        image = read.image_request(request, self.entries)
        facts = image.variant.facts
        if image.settings != Settings():
            raise RequestError(
                "The fewest experts are searched for in the model as it was trained."
            )
        if not can_search(facts):
            raise RequestError(f"{facts.title} is too large for a search of every few experts.")
        model = image.variant.saved
        before, without = answers_without(model, image.picture.pixels, MOST_AWAY)
        sets = expert_sets(numbered_layers(model.net), MOST_AWAY)
        found = fewest_experts(before, sets, without)
        if found is None:
            return {"away": None}
        layer, experts = found
        return {"away": [[layer, expert] for expert in experts]}

    def class_effect(self, request: Any) -> Json:
        """What the same intervention changes over images of a class: `class_effect`, null if there are too few.

        For an expert that is taken away, `without` has what the atlas says over test images; null where not measured.
        """
        _, variant = read.model(request, self.entries, *read.SETTINGS_FIELDS, "class")
        facts = variant.facts
        settings = read.settings(request, facts)
        class_name = read.choice(request, "class", facts.class_names)
        change = settings.intervention
        if change is None:
            return {"class_effect": None, "without": None}

        without = None
        if settings == Settings(intervention=change):
            without = self.pages.without(variant, change)
        gallery = self.galleries.gallery(variant)
        if gallery is None or len(gallery.members(class_name)) < MIN_CLASS_PICTURES:
            return {"class_effect": None, "without": without}
        measured = self._cached_class_effect(variant, settings, class_name)
        return {"class_effect": measured.to_json(), "without": without}

    def export_html(self, request: Any) -> Json:
        """The view as one HTML page that needs neither server nor network."""
        image = read.image_request(request, self.entries)
        id = image.picture.id
        view = self._view(image)
        upload = request["picture"].get("data")
        if id:
            view["picture"]["sharp"] = image.entry.examples.sharp(id)
        else:  # a typed page has no more pixels than the model sees
            view["picture"]["sharp"] = upload and upload.sharp

        history = None
        facts = image.variant.facts
        times = self.times[facts.id]
        if times is not None and image.settings == Settings() and times.has(id, facts.variant):
            history = times.of_image(id, facts.variant)
        title = f"{facts.id} {view['picture']['name']}".lower()
        name = re.sub(r"[^a-z0-9]+", "-", title).strip("-")
        return {
            "filename": f"moevision-{name[:80]}.html",
            "html": view_html(view, full_page=True, history=history),
        }

    def close(self) -> None:
        """Stop what runs in the background."""
        self.galleries.close()

    def _view(self, image: ImageRequest) -> Json:
        entry, variant, picture, settings = image
        pixels = picture.pixels
        message = self._cached_ood_message(entry, picture.label, pixels.tobytes())
        dense = None
        dense_probabilities = None
        if variant.facts.variant == "trained":
            dense = entry.dense
            dense_probabilities = entry.dense_answers.get(picture.id)
        view = route_image(
            variant.saved,
            pixels,
            dense=dense,
            dense_probabilities=dense_probabilities,
            settings=settings,
            facts=variant.facts,
            picture=replace(picture, unlike=message),
        )
        return view.to_json()

    def _class_effect(self, variant: Variant, settings: Settings, class_name: str) -> ClassEffect:
        saved = variant.saved
        gallery = self.galleries.gallery(variant)
        change = settings.intervention
        assert gallery is not None
        assert change is not None
        with replace(settings, intervention=None).applied(saved.net):
            return class_effect(saved, gallery.pictures, class_name, change, limit=CLASS_PICTURES)


def ood_message(entry: Entry, label: str | None, pixels: bytes) -> str | None:
    """What to say of an image of no class that lies too far from those of the trained model; None where not known.

    `pixels` are the bytes of uint8 [S, S, 3].
    """
    model = entry.variants["trained"].saved
    if model.strangers is None or label in model.class_names:
        return None
    size = model.image_size
    image = np.frombuffer(pixels, np.uint8).reshape(1, size, size, 3)
    with torch.inference_mode(), routing_lock(model.net):
        _, distance = answers(model.net, model.strangers, network_input(model, image.copy()))
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


def can_search(facts: ModelFacts) -> bool:
    """Whether taking away every few experts of each layer takes about a second at most."""
    sizes = range(1, MOST_AWAY + 1)
    sets = sum(math.comb(router.num_experts, size) for router in facts.routers for size in sizes)
    return sets * facts.parameters <= MOST_SEARCHED


def brings_image(request: Any) -> bool:
    """Whether an image must be decoded for a request."""
    picture = request.get("picture") if isinstance(request, dict) else None
    if not isinstance(picture, dict) or picture.get("kind") != "upload":
        return False
    data = picture.get("data")
    return isinstance(data, str) and data != ""


def _open(data: str, examples: Examples, *, with_sharp: bool = False) -> Upload:
    size = examples.image_size
    image = open_data_uri(data, max(SHARP_PX, size))
    pixels = model_input(image, size, examples.framing)
    sharp = sharp_data_uri(image, size, examples.framing) if with_sharp else None
    return Upload(pixels, sharp)


def error_json(error: Exception, name: str) -> Json:
    """What a visitor is told of an error of the request `name`."""
    message = str(error)
    code: Code = "bad_request"
    if isinstance(error, RequestError):
        code = error.code
    elif isinstance(error, BadImageError):
        message = f"This image can't be used: {error.reason}."
        code = "bad_image"
    elif not isinstance(error, UserError):
        # A fault of ours: the log says where.
        log.error("the request %s failed", name, exc_info=error)
        message = "The explorer stumbled over this request; its log on the server says where."
        code = "internal"
    return {"error": message, "code": code}


def _about(entry: Entry, times: Times | None) -> Json:
    """What there is to know about a model and its examples."""
    examples = entry.examples
    # Looked at first: images that can't be used leave those that are counted.
    first_examples = [_example(picture) for picture in examples.on_first_screen()]
    facts = entry.facts.to_json()
    del facts["variant"], facts["accuracy_text"]
    texts = {name: variant.facts.accuracy_text for name, variant in entry.variants.items()}
    return {
        **facts,
        "subtitle": entry.card.subtitle,
        "variants": list(entry.variants),
        "accuracy_texts": texts,
        "has_dense": entry.dense is not None or bool(entry.dense_answers),
        "can_search": can_search(entry.facts),
        "card": vars(entry.card),
        "history": None if times is None else times.about,
        "shown": entry.shown,
        "num_examples": len(examples.all_ids),
        "examples": first_examples,
    }


def _example(picture: PictureFacts) -> Json:
    return {
        "id": picture.id,
        "name": picture.name,
        "label": picture.label,
        "thumb": thumbnail_uri(picture.pixels),
    }
