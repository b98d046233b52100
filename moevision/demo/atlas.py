"""`atlas.json`: what one model does with one set of images, summed up once so that the explorer need not compute it.

One JSON object, `"schema": "moevision.atlas/1"`:

- `data`, `n_images`, `class_names`;
- `layers`, in order of depth, each with `layer`, `name`, `kind` (who chooses), `loads` ([E] choices that each expert
  computed; Soft MoE: weight that patches took), `map` (a `ClassExpertMap`), `answers` (the three `Answer`s about the
  layer), `load_words` and `experts`: per expert its `top` and `random` patches as `[image name, index of the image,
  patch, weight]`, its `classes` (the five that prefer it most) and its `parts` (null where the images have none),
  largest excess first, `significant` where one stands out beyond chance; and where it was measured `without`, what
  taking the expert away does (`measure_effects`).

`shown`, where it stands, says which other images galleries are of. Earlier versions wrote more.

Floats are rounded to four decimals; null stands where there is no number, as for a class without images.
Axes: I images, P patches, C classes, E experts, L MoE layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moevision.analysis.describe import (
    GalleryPatch,
    fractions_of_parts,
    layer_gallery,
    part_expert_table,
    part_stands_out,
)
from moevision.analysis.information import as_json
from moevision.errors import UserError, json_text
from moevision.files import write_text_atomic
from moevision.models.safe_files import read_json

if TYPE_CHECKING:
    from moevision.analysis.describe import ClassExpertMap
    from moevision.analysis.images import PictureSet
    from moevision.analysis.questions import LayerAnswers
    from moevision.analysis.trace import LayerTrace, RoutingTrace

SCHEMA = "moevision.atlas/1"
"""Version of the file; a change that an older reader would misread raises the number."""

Json = dict[str, Any]
_DIGITS = 4
_CLASSES_SHOWN = 5


def build_atlas(
    trace: RoutingTrace,
    pictures: PictureSet | None,
    maps: Mapping[int, ClassExpertMap],
    *,
    questions: Sequence[LayerAnswers] = (),
    shown: RoutingTrace | None = None,
    effects: Json | None = None,
    count: int = 8,
) -> Json:
    """Sum up a trace of `pictures` as JSON primitives, ready for `save_atlas`.

    `pictures` are those whose parts are counted; None leaves parts out. `maps` has `class_expert_map(trace, layer)` by
    block index, `questions` are those of `three_questions`, and `effects`, of taking each expert away, is from
    `moevision.analysis.report.measure_effects`. Galleries have `count` patches, from the images of `shown` where those
    of `trace` can't be shown.
    """
    fractions = None if pictures is None else fractions_of_parts(pictures, trace.grid)
    part_names = () if pictures is None else pictures.part_names
    layers = []
    on_show = trace if shown is None else shown
    told = {
        found.name: {
            "answers": [answer.to_json() for answer in found.answers],
            "load_words": found.load.words,
        }
        for found in questions
    }
    for layer, of_shown in zip(trace.layers, on_show.layers, strict=True):
        parts = None if fractions is None else _part_shares(layer, fractions)
        class_map = maps[layer.layer]
        layers.append(
            {
                "layer": layer.layer,
                "name": layer.name,
                "kind": layer.kind,
                "loads": layer.counts().sum(0).tolist(),
                "map": class_map.to_json(),
                **told.get(layer.name, {"answers": [], "load_words": ""}),
                "experts": [
                    {
                        "expert": gallery.expert,
                        "top": _named(gallery.top, on_show),
                        "random": _named(gallery.random, on_show),
                        "classes": _favourite_classes(class_map, gallery.expert, trace.class_names),
                        "parts": None
                        if parts is None
                        else _parts_of(parts, gallery.expert, part_names),
                        **_without(effects, layer.layer, gallery.expert),
                    }
                    for gallery in layer_gallery(of_shown, count)
                ],
            }
        )
    atlas: Json = {
        "schema": SCHEMA,
        "data": trace.data,
        "n_images": len(trace),
        "class_names": list(trace.class_names),
        "layers": layers,
        **({} if shown is None else {"shown": shown.data}),
    }
    rounded: Json = json.loads(
        json_text(as_json(atlas)), parse_float=lambda text: round(float(text), _DIGITS)
    )
    return rounded


def counted_name(expert: Json) -> Json | None:
    """What one of a layer's `experts` is called after: the part, or else the class, that stands out most beyond chance.

    It is `kind` (`part` or `class`), `name`, the expert's `share` of it and its `overall` share of everything; None
    where nothing stands out, or where an atlas of an earlier version doesn't say.
    """
    for kind, rows in (("part", expert["parts"]), ("class", expert["classes"])):
        able = [row for row in rows or [] if row.get("significant") and row["above"] > 0]
        if able:
            best = max(able, key=lambda row: float(row["above"]))
            overall = round(best["share"] - best["above"], _DIGITS)
            return {"kind": kind, "name": best[kind], "share": best["share"], "overall": overall}
    return None


def compare_by_atlas(atlas: Json, a: str, b: str) -> Json:
    """Two classes by the maps of an atlas: the difference of their shares of every expert.

    An expert is marked where the share of one of the two stands out. A UserError if no image of one was counted.
    """
    names = atlas["class_names"]
    maps = [layer["map"] for layer in atlas["layers"]]
    if not all(name in names and maps[0]["n_images"][names.index(name)] for name in (a, b)):
        raise UserError(f"No images of {a} or of {b} were counted: give some with --data FOLDER.")
    one, other = names.index(a), names.index(b)
    layers = [
        {
            "name": f"L{of['layer']}",
            "layer": of["layer"],
            "experts": [
                {"expert": expert, "difference": x - y, "significant": any(stands)}
                for expert, (x, y, *stands) in enumerate(
                    zip(
                        *(of[key][row] for key in ("share", "significant") for row in (one, other)),
                        strict=True,
                    )
                )
            ],
        }
        for of in maps
    ]
    every = [(layer["name"], row) for layer in layers for row in layer["experts"]]
    name, most = max(every, key=lambda found: abs(found[1]["difference"]))
    n_a, n_b = (int(maps[0]["n_images"][which]) for which in (one, other))
    sentence = (
        f"Counted over {n_a:,} images of {a} and {n_b:,} of {b}: {sum(row['significant'] for _, row in every)} of "
        f"{len(every)} experts stand out for one of them. The largest difference is {name}·E{most['expert']}, which "
        f"takes {100 * abs(most['difference']):.1f} percentage points more of {a if most['difference'] > 0 else b}."
    )
    return {
        "class_a": a,
        "class_b": b,
        "n_a": n_a,
        "n_b": n_b,
        "layers": layers,
        "sentence": sentence,
    }


def save_atlas(atlas: Json, path: str | Path) -> None:
    """Write an atlas, whole or not at all, without white space."""
    write_text_atomic(path, json_text(atlas, separators=(",", ":")) + "\n")


def load_atlas(path: str | Path) -> Json:
    """Read an atlas; a UserError if there is none, it is damaged, or another version wrote it."""
    try:
        atlas: Json = read_json(path)
    except FileNotFoundError as error:
        raise UserError(
            f"There is no atlas at {path} ({error.strerror}): build it with build_atlas."
        ) from error
    schema = atlas.get("schema") if isinstance(atlas, dict) else None
    if schema != SCHEMA:
        raise UserError(
            f"{path} has the schema {schema!r}, and this version reads {SCHEMA}: build the atlas again."
        )
    return atlas


def _part_shares(
    layer: LayerTrace, fractions: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[Any], ...]:
    """[parts, E] which share of each part's area an expert got, [E] of all parts together, [parts, E] beyond chance."""
    table = part_expert_table(
        np.asarray(layer.expert_index), fractions, layer.num_experts, layer.requested_share
    )
    area = table.sum(1, keepdims=True)
    share = np.divide(table, area, out=np.zeros_like(table), where=area > 0)
    beyond = part_stands_out(
        np.asarray(layer.expert_index), fractions, layer.num_experts, layer.requested_share
    )
    return share, table.sum(0) / table.sum(), beyond


def _without(effects: Json | None, layer: int, expert: int) -> Json:
    """What taking the expert away does to the logit of the true class, beside as much at random; empty if not told."""
    if effects is None:
        return {}
    for found in effects["experts"]:
        if (found["layer"], found["expert"]) == (layer, expert):
            names = (
                "delta_logit",
                "control_delta_logit",
                "strongest_class",
                "strongest_delta_logit",
            )
            images = effects["pictures_per_class"]
            return {
                "without": {"images_per_class": images, **{name: found[name] for name in names}}
            }
    return {}


def _parts_of(
    shares: tuple[npt.NDArray[Any], ...], expert: int, part_names: Sequence[str]
) -> list[Json]:
    """The parts that there are, largest excess first."""
    share, overall, beyond = shares
    rows = [
        _row(
            "part",
            name,
            share[part, expert],
            share[part, expert] - overall[expert],
            beyond[part, expert],
        )
        for part, name in enumerate(part_names)
        if share[part].sum() > 0
    ]
    return sorted(rows, key=lambda row: -row["above"])


def _favourite_classes(
    class_map: ClassExpertMap, expert: int, class_names: Sequence[str]
) -> list[Json]:
    """The classes that send an expert more than the others do, largest excess first; those without images don't."""
    seen = int((class_map.n_images > 0).sum())  # nan sorts last
    order = np.argsort(-class_map.excess[:, expert], kind="stable")[: min(seen, _CLASSES_SHOWN)]
    told = (class_map.share, class_map.excess, class_map.significant)  # each [C, E]
    return [
        _row("class", class_names[index], *(values[index, expert] for values in told))
        for index in order
    ]


def _row(kind: str, name: str, share: float, above: float, significant: bool) -> Json:
    return {
        kind: name,
        "share": float(share),
        "above": float(above),
        "significant": bool(significant),
    }


def _named(patches: Sequence[GalleryPatch], trace: RoutingTrace) -> list[list[Any]]:
    return [
        [trace.picture_names[patch.image], patch.image, patch.patch, patch.weight]
        for patch in patches
    ]
