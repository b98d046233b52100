"""Reading a visitor's request: every field is checked for type, range and length before it reaches a model.

A request is whatever JSON a browser, or someone with curl, sends. A field that isn't right ends in `RequestError`,
whose message says what would be right; unknown fields are refused too, since a misspelt one would silently do nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from moevision.analysis.intervention import Fill, Intervention, Kind
from moevision.demo.facts import ModelFacts
from moevision.demo.view import FILLS, KINDS, Settings
from moevision.demo.wire import RequestError

MAX_NAME: Final = 200
MAX_ID: Final = (
    4200  # of an image: the path of a file, of which Linux allows 4096 bytes, behind its kind
)
MIN_CAPACITY, MAX_CAPACITY = 0.05, 16.0


def fields(request: Any, allowed: Sequence[str]) -> Mapping[str, Any]:
    """The request as a mapping that has no other keys than the allowed ones."""
    if not isinstance(request, dict):
        raise RequestError("A request is one JSON object.")
    unknown = [str(key)[:40] for key in request if key not in allowed]
    if unknown:
        raise RequestError(
            f"There is no field {unknown[0]!r}: the fields are {', '.join(allowed) or 'none'}."
        )
    return request


def text(
    request: Mapping[str, Any], name: str, default: str | None = None, *, longest: int = MAX_NAME
) -> str:
    """A short string."""
    value = default if request.get(name) is None else request[name]
    if not isinstance(value, str) or not 0 < len(value) <= longest:
        raise RequestError(f"The field {name!r} must be a text of 1 to {longest} characters.")
    return value


def image_id(request: Mapping[str, Any], name: str) -> str:
    """The id of an image, which may have a long path in it."""
    return text(request, name, longest=MAX_ID)


def choice(
    request: Mapping[str, Any], name: str, options: Sequence[str], default: str | None = None
) -> str:
    """One of several words."""
    value = text(request, name, default)
    if value not in options:
        raise RequestError(f"The field {name!r} must be one of {', '.join(options)}.")
    return value


def whole_number(
    request: Mapping[str, Any], name: str, options: Sequence[int], default: int | None = None
) -> int:
    """One of several whole numbers; true, false and 2.0 are no whole numbers."""
    value = default if request.get(name) is None else request[name]
    if type(value) is not int or value not in options:
        if isinstance(options, range):
            raise RequestError(
                f"The field {name!r} must be a whole number from {options[0]} to {options[-1]}."
            )
        raise RequestError(f"The field {name!r} must be one of {', '.join(map(str, options))}.")
    return value


def settings(request: Mapping[str, Any], facts: ModelFacts) -> Settings:
    """The fields `top_k`, `capacity`, `intervention`, `noise` and `away`, each of which may be null."""
    top_k = request.get("top_k")
    if top_k is not None:
        if not facts.max_top_k:
            raise RequestError(
                f"The field 'top_k' must be null here: {facts.routers[0].refused['top_k']}."
            )
        top_k = whole_number(request, "top_k", range(1, facts.max_top_k + 1))
    capacity = request.get("capacity")
    if capacity is not None:
        number = type(capacity) in (int, float)
        if not number or not MIN_CAPACITY <= capacity <= MAX_CAPACITY:  # NaN lies in no range
            raise RequestError(
                f"The field 'capacity' must be a number from {MIN_CAPACITY} to {MAX_CAPACITY:g}, or null."
            )
        capacity = float(capacity)
    changed = request.get("intervention")
    noise = None if request.get("noise") is None else whole_number(request, "noise", range(2**31))
    if noise is not None and all(router.noise == "none" for router in facts.routers):
        raise RequestError(
            "The field 'noise' must be null here: the routers of this model have no noise."
        )
    return Settings(
        top_k=None if top_k == facts.top_k else top_k,
        capacity=capacity,
        intervention=None if changed is None else intervention(changed, facts),
        noise=noise,
        away=ablated_experts(request.get("away") or [], facts),
    )


def ablated_experts(value: Any, facts: ModelFacts) -> tuple[Intervention, ...]:
    """Experts that are taken away, from pairs of layer and expert."""
    most = sum(router.num_experts for router in facts.routers)
    pairs = isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 for pair in value
    )
    if not pairs or len(value) > most:
        raise RequestError(
            f"The field 'away' must be a list of at most {most} pairs [layer, expert]."
        )
    return tuple(
        intervention({"kind": "ablate", "layer": layer, "expert": expert}, facts)
        for layer, expert in value
    )


def intervention(value: Any, facts: ModelFacts) -> Intervention:
    """One intervention that fits the model."""
    given = fields(value, ("kind", "layer", "expert", "other", "fill", "seed"))
    kind = choice(given, "kind", KINDS)
    every = kind == "random" and given.get("layer") is None
    layer = None if every else whole_number(given, "layer", facts.layers)
    experts = 0 if layer is None else facts.router(layer).num_experts
    expert = None if kind == "random" else whole_number(given, "expert", range(experts))
    other = whole_number(given, "other", range(experts)) if kind == "swap" else None
    if kind != "swap" and given.get("other") is not None:
        raise RequestError(
            "The field 'other' names the second expert of a swap: it must be null here."
        )
    if other is not None and other == expert:
        raise RequestError(
            "Two different experts can be swapped: 'expert' and 'other' are the same."
        )
    fill = choice(given, "fill", FILLS, "next_best")
    seed = whole_number(given, "seed", range(2**31), 0)
    if kind == "ablate" and experts == 1 and fill == "next_best":
        raise RequestError(
            "The only expert has no next-best one: take it away with the fill 'zero'."
        )
    return Intervention(
        cast(Kind, kind), layer=layer, expert=expert, other=other, fill=cast(Fill, fill), seed=seed
    )


def path(request: Mapping[str, Any], facts: ModelFacts) -> tuple[int, ...]:
    """One expert for each MoE layer, in order of depth."""
    value: Any = request.get("path")
    counts = [router.num_experts for router in facts.routers]
    fits = isinstance(value, list) and len(value) == len(counts)
    if not fits or any(
        type(one) is not int or not 0 <= one < of for one, of in zip(value, counts, strict=True)
    ):
        lasts = ", ".join(
            f"0 to {router.num_experts - 1} in {router.name}" for router in facts.routers
        )
        raise RequestError(
            f"The field 'path' must be a list of {len(counts)} experts, one per MoE layer: {lasts}."
        )
    return tuple(value)
