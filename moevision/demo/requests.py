"""Functions that read fields of a request to the explorer, checking type, range and length before a model sees them.

A request is untrusted JSON, from a browser or from curl. An invalid field raises `RequestError`, whose message says
which values are valid. Unknown fields are refused too, since a misspelt one would silently have no effect. The valid
values of most fields depend on the model that the request names; `facts` describes that model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from moevision.analysis.intervention import Fill, Intervention, Kind
from moevision.data.emoji import CELLS, EmojiPages, draw_page, split_emoji
from moevision.data.named import DRAWN
from moevision.demo.facts import ModelFacts, PictureFacts, model_input
from moevision.demo.models import FORMER_NAMES, Entry, Variant
from moevision.demo.view import FILLS, KINDS, Settings
from moevision.demo.wire import RequestError
from moevision.types import Pixels

Request = Mapping[str, Any]
Entries = Mapping[str, Entry]  # by the model's id
# Characters of a text. The longest is an image's id: its kind and a file path, which Linux limits to 4096 bytes.
MAX_TEXT = 4200
MAX_TYPED = 400  # characters of a page that is typed
# On a page with four cells empty 79 % are named right, with all full 92 %, with eight full 32 %: no training page has
# empty ones (benchmarks/demo/names.json).
FEWEST_EMOJI = 12
MOST_EMOJI = CELLS**2
SETTINGS_FIELDS = ("top_k", "capacity", "intervention", "away")
MIN_CAPACITY = 0.05
MAX_CAPACITY = 16.0
SEEDS = range(2**31)


class Upload(NamedTuple):
    """What is needed of a visitor's image: `pixels` as the model sees it, and perhaps `sharp`, a data URI of more."""

    pixels: Pixels
    sharp: str | None


class ImageRequest(NamedTuple):
    """A request about an image, read and checked."""

    entry: Entry
    variant: Variant
    picture: PictureFacts
    settings: Settings


def image_request(request: Any, entries: Entries) -> ImageRequest:
    """Read a request about an example, a typed page, or an upload that is decoded already."""
    entry, variant = model(request, entries, "picture", *SETTINGS_FIELDS, "noise")
    changes = settings(request, variant.facts)
    return ImageRequest(entry, variant, _picture(request.get("picture"), entry), changes)


def _picture(value: Any, entry: Entry) -> PictureFacts:
    picture = fields(value, ("kind", "id", "data", "text"))
    kind = choice(picture, "kind", ("example", "upload", "page"))
    if kind == "example":
        return entry.examples.find(text(picture, "id"))
    if kind == "page":
        return _page(picture, entry)
    upload = picture.get("data")
    if not isinstance(upload, Upload):
        raise RequestError("The field 'data' must be an image as data:image/...;base64,... text.")
    return PictureFacts(upload.pixels, name="your image")


def _page(picture: Request, entry: Entry) -> PictureFacts:
    """A page of the emoji that a visitor typed; its class is what most of them are, if that is one."""
    pages = emoji_pages(entry)
    typed = text(picture, "text")
    if len(typed) > MAX_TYPED:
        raise RequestError(f"A page is typed in at most {MAX_TYPED} characters.")
    emoji = split_emoji(typed)
    if not FEWEST_EMOJI <= len(emoji) <= MOST_EMOJI:
        raise RequestError(
            f"A page needs {FEWEST_EMOJI} to {MOST_EMOJI} emoji, not {len(emoji)}: "
            "the model learned from full ones, and of emptier ones it knows little."
        )
    pixels = model_input(draw_page(emoji), entry.examples.image_size, entry.examples.framing)
    return PictureFacts(pixels, name="".join(emoji), label=pages.most_common_class(emoji))


def emoji_pages(entry: Entry) -> type[EmojiPages]:
    """The data set of a model of pages of emoji; any other model is a RequestError."""
    data = DRAWN.get(entry.card.data_kind)
    if data is None or not issubclass(data, EmojiPages):
        raise RequestError(
            f"{entry.card.title} has learned no pages of emoji: type one for a model that has."
        )
    return data


def entry(request: Any, entries: Entries, *names: str) -> Entry:
    """The model that a request names, or the first one; it may have the fields of these names beside."""
    first = next(iter(entries))
    former = {old: new for old, new in FORMER_NAMES.items() if new in entries}
    ids = {**{id: id for id in entries}, **former}
    return entries[ids[choice(fields(request, ("model", *names)), "model", tuple(ids), first)]]


def model(request: Any, entries: Entries, *names: str) -> tuple[Entry, Variant]:
    """The same, and the variant that the request names; variant `trained` if it names none."""
    of_model = entry(request, entries, "variant", *names)
    variant = choice(request, "variant", tuple(of_model.variants), "trained")
    return of_model, of_model.variants[variant]


def fields(request: Any, allowed: Sequence[str]) -> Request:
    """Check that `request` is a JSON object without other keys than the allowed ones, and return it."""
    if not isinstance(request, dict):
        raise RequestError("A request is one JSON object.")
    for key in request:
        if key not in allowed:
            raise RequestError(
                f"There is no field {str(key)[:40]!r}: the fields are {', '.join(allowed) or 'none'}."
            )
    return request


def text(request: Request, name: str, default: str | None = None) -> str:
    """Read a field that is a string of 1 to `MAX_TEXT` characters."""
    value = _value(request, name, default)
    if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT:
        raise RequestError(f"The field {name!r} must be a text of 1 to {MAX_TEXT} characters.")
    return value


def choice(request: Request, name: str, options: Sequence[str], default: str | None = None) -> str:
    """Read a field that is one of the strings in `options`."""
    value = text(request, name, default)
    if value not in options:
        raise RequestError(f"The field {name!r} must be one of {', '.join(options)}.")
    return value


def whole_number(
    request: Request, name: str, options: Sequence[int], default: int | None = None
) -> int:
    """Read a field that is one of the integers in `options`; true, false and 2.0 are refused."""
    value = _value(request, name, default)
    if type(value) is int and value in options:
        return value
    if isinstance(options, range):
        raise RequestError(
            f"The field {name!r} must be a whole number from {options[0]} to {options[-1]}."
        )
    raise RequestError(f"The field {name!r} must be one of {', '.join(map(str, options))}.")


def _value(request: Request, name: str, default: Any) -> Any:
    """The value of a field, or the default if it is missing or null."""
    value = request.get(name)
    return default if value is None else value


def settings(request: Request, facts: ModelFacts) -> Settings:
    """Read the fields `top_k`, `capacity`, `intervention`, `noise` and `away`, each of which may be null."""
    value = request.get("intervention")
    return Settings(
        top_k=_top_k(request, facts),
        capacity=_capacity(request),
        intervention=None if value is None else intervention(value, facts),
        noise=_noise_seed(request, facts),
        ablated_experts=ablated_experts(request.get("away") or [], facts),
    )


def _top_k(request: Request, facts: ModelFacts) -> int | None:
    """The K of the request; None if it is null or what the model was trained with."""
    if request.get("top_k") is None:
        return None
    if not facts.max_top_k:  # 0: no layer of this model has a K that could be changed
        raise RequestError(
            f"The field 'top_k' must be null here: {facts.routers[0].refused['top_k']}."
        )
    top_k = whole_number(request, "top_k", range(1, facts.max_top_k + 1))
    return None if top_k == facts.top_k else top_k


def _capacity(request: Request) -> float | None:
    """The capacity factor of the request, or None."""
    capacity = request.get("capacity")
    if capacity is None:
        return None
    is_number = type(capacity) in (int, float)
    if not is_number or not MIN_CAPACITY <= capacity <= MAX_CAPACITY:  # NaN is refused too
        raise RequestError(
            f"The field 'capacity' must be a number from {MIN_CAPACITY} to {MAX_CAPACITY:g}, or null."
        )
    return float(capacity)


def _noise_seed(request: Request, facts: ModelFacts) -> int | None:
    """The seed of the routers' training noise; None for evaluation without noise."""
    if request.get("noise") is None:
        return None
    seed = whole_number(request, "noise", SEEDS)
    if all(router.noise == "none" for router in facts.routers):
        raise RequestError(
            "The field 'noise' must be null here: the routers of this model have no noise."
        )
    return seed


def ablated_experts(value: Any, facts: ModelFacts) -> tuple[Intervention, ...]:
    """The value of the field `away`, a list of [layer, expert], as one ablation per expert."""
    total_experts = sum(router.num_experts for router in facts.routers)
    is_short_list = isinstance(value, list) and len(value) <= total_experts
    if not is_short_list or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise RequestError(
            f"The field 'away' must be a list of at most {total_experts} pairs [layer, expert]."
        )
    return tuple(
        intervention({"kind": "ablate", "layer": layer, "expert": expert}, facts)
        for layer, expert in value
    )


def intervention(value: Any, facts: ModelFacts) -> Intervention:
    """Read the object `value` as one intervention, and check it against the layers and experts of the model."""
    request = fields(value, ("kind", "layer", "expert", "other", "fill", "seed"))
    kind = choice(request, "kind", KINDS)
    fill = choice(request, "fill", FILLS, "next_best")

    # Only a random intervention may leave out the layer: it then applies to all layers.
    layer = None
    num_experts = 0  # of `layer`
    if kind != "random" or request.get("layer") is not None:
        layer = whole_number(request, "layer", facts.layers)
        num_experts = facts.router(layer).num_experts

    expert = None
    if kind != "random":
        expert = whole_number(request, "expert", range(num_experts))

    other = None
    if kind == "swap":
        other = whole_number(request, "other", range(num_experts))
    elif request.get("other") is not None:
        raise RequestError(
            "The field 'other' names the second expert of a swap: it must be null here."
        )

    return Intervention(
        cast(Kind, kind),
        layer=layer,
        expert=expert,
        other=other,
        fill=cast(Fill, fill),
        seed=whole_number(request, "seed", SEEDS, 0),
    )
