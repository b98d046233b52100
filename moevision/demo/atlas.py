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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moevision.analysis.describe import (
    ClassExpertMap,
    GalleryPatch,
    fractions_of_parts,
    layer_gallery,
    part_expert_table,
    part_stands_out,
)
from moevision.analysis.images import PictureSet
from moevision.analysis.information import as_json
from moevision.analysis.questions import LayerAnswers
from moevision.analysis.trace import LayerTrace, RoutingTrace
from moevision.errors import UserError, json_text
from moevision.files import write_text_atomic
from moevision.models.safe_files import read_json
from moevision.types import Array, Flags, Floats, Json

SCHEMA = "moevision.atlas/1"
"""Version of the file; a change that an older reader would misread raises the number."""

_DIGITS = 4
MAX_CLASSES = 5  # of an expert
# Of `measure_effects`, what an atlas keeps.
_EFFECT_KEYS = ("delta_logit", "control_delta_logit", "strongest_class", "strongest_delta_logit")


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
    gallery_trace = trace if shown is None else shown
    fractions = None if pictures is None else fractions_of_parts(pictures, trace.grid)
    part_names = () if pictures is None else pictures.part_names
    layer_answers = {answers.name: answers for answers in questions}
    effect_of = {} if effects is None else _effects_by_expert(effects)

    layers = []
    for layer, gallery_layer in zip(trace.layers, gallery_trace.layers, strict=True):
        parts = None if fractions is None else PartShares.of(layer, fractions)
        class_map = maps[layer.layer]
        experts = []
        for gallery in layer_gallery(gallery_layer, count):
            expert = {
                "expert": gallery.expert,
                "top": _patch_rows(gallery.top, gallery_trace),
                "random": _patch_rows(gallery.random, gallery_trace),
                "classes": _rows("class", trace.class_names, class_map, gallery.expert)[
                    :MAX_CLASSES
                ],
                "parts": parts and _rows("part", part_names, parts, gallery.expert),
            }
            effect = effect_of.get((layer.layer, gallery.expert))
            if effect is not None:
                expert["without"] = effect
            experts.append(expert)

        answers = layer_answers.get(layer.name)
        layers.append(
            {
                "layer": layer.layer,
                "name": layer.name,
                "kind": layer.kind,
                "loads": layer.counts().sum(0).tolist(),
                "map": class_map.to_json(),
                "answers": [answer.to_json() for answer in answers.answers] if answers else [],
                "load_words": answers.load.words if answers else "",
                "experts": experts,
            }
        )

    atlas: Json = {
        "schema": SCHEMA,
        "data": trace.data,
        "n_images": len(trace),
        "class_names": list(trace.class_names),
        "layers": layers,
    }
    if shown is not None:
        atlas["shown"] = shown.data
    return _rounded(atlas)


def _rounded(atlas: Json) -> Json:
    """The same with real numbers of four decimals."""
    text = json_text(as_json(atlas))
    result: Json = json.loads(text, parse_float=lambda number: round(float(number), _DIGITS))
    return result


def counted_name(expert: Json) -> Json | None:
    """What one of a layer's `experts` is called after: the part, or else the class, that stands out most beyond chance.

    It is `kind` (`part` or `class`), `name`, the expert's `share` of it and its `overall` share of everything; None
    where nothing stands out.
    """
    for kind, key in (("part", "parts"), ("class", "classes")):
        rows = expert[key] or []
        significant = [row for row in rows if row["significant"] and row["above"] > 0]
        if significant:
            best = max(significant, key=lambda row: float(row["above"]))
            overall = round(best["share"] - best["above"], _DIGITS)
            return {"kind": kind, "name": best[kind], "share": best["share"], "overall": overall}
    return None


def compare_by_atlas(atlas: Json, a: str, b: str) -> Json:
    """Two classes by the maps of an atlas: the difference of their shares of every expert.

    An expert is marked where the share of one of the two stands out. A UserError if no image of one was counted.
    """
    maps = [layer["map"] for layer in atlas["layers"]]
    num_images = dict(zip(atlas["class_names"], maps[0]["n_images"], strict=True))
    n_a = int(num_images.get(a, 0))
    n_b = int(num_images.get(b, 0))
    if not n_a or not n_b:
        raise UserError(f"No images of {a} or of {b} were counted: give some with --data FOLDER.")

    row_a = atlas["class_names"].index(a)
    row_b = atlas["class_names"].index(b)
    layers = []
    rows: dict[str, Json] = {}  # by name of the expert
    for class_map in maps:
        name = f"L{class_map['layer']}"
        share = np.array(class_map["share"], np.float64)  # [C, E]
        significant = class_map["significant"]
        experts = [
            {
                "expert": expert,
                "difference": float(difference),
                "significant": significant[row_a][expert] or significant[row_b][expert],
            }
            for expert, difference in enumerate(share[row_a] - share[row_b])
        ]
        rows |= {f"{name}·E{row['expert']}": row for row in experts}
        layers.append({"name": name, "layer": class_map["layer"], "experts": experts})

    marked = sum(row["significant"] for row in rows.values())
    largest = max(rows, key=lambda name: abs(rows[name]["difference"]))
    difference = rows[largest]["difference"]
    points = f"{100 * abs(difference):.1f} percentage points"
    sentence = (
        f"Counted over {n_a:,} images of {a} and {n_b:,} of {b}: {marked} of {len(rows)} experts stand out "
        f"for one of them. The largest difference is {largest}, which takes {points} more of "
        f"{a if difference > 0 else b}."
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
    """Read an atlas; a UserError if it is damaged, or another version wrote it."""
    atlas: Json = read_json(path)
    schema = atlas.get("schema") if isinstance(atlas, dict) else None
    if schema != SCHEMA:
        raise UserError(
            f"{path} has the schema {schema!r}, and this version reads {SCHEMA}: build the atlas again."
        )
    return atlas


@dataclass(frozen=True)
class PartShares:
    """How the area of each part is divided among the experts of a layer; as a `ClassExpertMap` has it of classes."""

    share: npt.NDArray[
        Any
    ]  # [parts, E] share of each part's area that an expert got; nan without area
    excess: Array  # [parts, E] share minus that of all parts together
    significant: Flags  # [parts, E] whether it is beyond chance

    @classmethod
    def of(cls, layer: LayerTrace, fractions: Floats) -> PartShares:
        """Count the choices of the layer's patches, `fractions` of which the parts cover."""
        index = np.asarray(layer.expert_index)
        table = part_expert_table(index, fractions, layer.num_experts, layer.requested_share)
        area = table.sum(1, keepdims=True)
        share = np.divide(table, area, out=np.full_like(table, np.nan), where=area > 0)
        overall = table.sum(0) / table.sum()
        significant = part_stands_out(index, fractions, layer.num_experts, layer.requested_share)
        return cls(share, share - overall, significant)


def _effects_by_expert(effects: Json) -> dict[tuple[int, int], Json]:
    """By layer and expert: what taking it away does to the logit of the true class, beside as much at random."""
    images = {"images_per_class": effects["pictures_per_class"]}
    return {
        (effect["layer"], effect["expert"]): images | {key: effect[key] for key in _EFFECT_KEYS}
        for effect in effects["experts"]
    }


def _rows(
    kind: str, names: Sequence[str], table: ClassExpertMap | PartShares, expert: int
) -> list[Json]:
    """What goes to the expert more than to the others, largest excess first; without what no image has (nan)."""
    excess = table.excess[:, expert]
    rows = []
    for row in np.argsort(-excess, kind="stable"):
        if np.isfinite(excess[row]):
            share = float(table.share[row, expert])
            significant = bool(table.significant[row, expert])
            above = float(excess[row])
            rows.append(
                {kind: names[row], "share": share, "above": above, "significant": significant}
            )
    return rows


def _patch_rows(patches: Sequence[GalleryPatch], trace: RoutingTrace) -> list[list[Any]]:
    names = trace.picture_names
    return [[names[patch.image], patch.image, patch.patch, patch.weight] for patch in patches]
