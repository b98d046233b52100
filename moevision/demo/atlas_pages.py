"""The answers about whole picture sets: experts, classes, two classes against each other, patches alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moevision.analysis.classes import compare_classes, image_shares
from moevision.analysis.describe import patches_on_path
from moevision.analysis.images import PictureSet, patch_crop
from moevision.demo import requests as read
from moevision.demo.atlas_source import Galleries, Gallery
from moevision.demo.bundle import Entry, Variant
from moevision.demo.examples import Found, Recent, thumb
from moevision.demo.facts import ModelFacts
from moevision.demo.requests import RequestError
from moevision.demo.wire import data_uri

Json = dict[str, Any]
CELL_PICTURES = 12
SIMILAR_PATCHES = 12
CROP_PX = 40  # small patches are shown with more of what surrounds them


class AtlasPages:
    """Handlers of requests about a variant's atlas and gallery.

    Args:
        entries: the models by id.
        galleries: where atlases and galleries come from.
    """

    def __init__(self, entries: Mapping[str, Entry], galleries: Galleries) -> None:
        self.entries, self.galleries = entries, galleries
        # An answer with all its crops; there are as many as variants times layers.
        self._experts: Recent[Json] = Recent(64)
        self._compared: Recent[Json] = Recent(256)

    def model(self, request: Mapping[str, Any]) -> tuple[Entry, Variant]:
        """The model and variant that a request names; variant `trained` if it names none."""
        entry = self.entries[read.choice(request, "model", tuple(self.entries), next(iter(self.entries)))]
        return entry, entry.variants[read.choice(request, "variant", tuple(entry.variants), "trained")]

    def experts(self, request: Any) -> Json:
        """A card per expert of one layer: load, patches in context, classes, parts."""
        given = read.fields(request, ("model", "variant", "layer"))
        entry, variant = self.model(given)
        layer = read.whole(given, "layer", variant.facts.layers, variant.facts.layers[-1])
        atlas = self.galleries.atlas(entry, variant.facts.variant)
        if atlas is None:
            return _waiting(self.galleries.status(entry), layer=layer, name=f"L{layer}", experts=[])
        key = (entry.card.id, variant.facts.variant, layer, id(atlas))
        return self._experts.get(key, lambda: self._experts_page(entry, variant.facts, layer, atlas))

    def prepare(self, entry: Entry, variant: str) -> None:
        """Cut out the patches of all experts, so that nobody waits for that."""
        for layer in entry.facts.layers:
            self.experts({"model": entry.card.id, "variant": variant, "layer": layer})

    def classes(self, request: Any) -> Json:
        """Class x expert maps of all layers, and how much experts tell about classes and places."""
        entry, variant = self.model(read.fields(request, ("model", "variant")))
        atlas = self.galleries.atlas(entry, variant.facts.variant)
        if atlas is None:
            names = list(variant.facts.class_names)
            return _waiting(self.galleries.status(entry), n_images=0, class_names=names, layers=[])
        layers = [
            {
                "layer": layer["layer"],
                "name": layer["name"],
                **{name: layer["map"][name] for name in ("share", "excess", "significant", "threshold")},
                "information": layer["information"],
            }
            for layer in atlas["layers"]
        ]
        note = f"Measured on {atlas['n_images']:,} pictures: {atlas['data']}."
        names = atlas["class_names"]
        return {"status": "ready", "n_images": atlas["n_images"], "class_names": names, "layers": layers, "note": note}

    def compare(self, request: Any) -> Json:
        """How the pictures of two classes differ in the experts they use, with intervals."""
        given = read.fields(request, ("model", "variant", "a", "b"))
        entry, variant = self.model(given)
        gallery = self._gallery(entry, variant)
        names = gallery.trace.class_names
        a, b = read.choice(given, "a", names), read.choice(given, "b", names)
        if a == b:
            raise RequestError("Choose two different classes to compare.")
        key = (entry.card.id, variant.facts.variant, a, b)
        return self._compared.get(key, lambda: compare_classes(gallery.trace, a, b).to_json())

    def cell(self, request: Any) -> Json:
        """The pictures of a class that use an expert most."""
        given = read.fields(request, ("model", "variant", "layer", "expert", "class"))
        entry, variant = self.model(given)
        layer = read.whole(given, "layer", variant.facts.layers)
        expert = read.whole(given, "expert", range(variant.facts.router(layer).num_experts))
        gallery = self._gallery(entry, variant)
        name = read.choice(given, "class", gallery.trace.class_names)
        share = image_shares(gallery.trace.layer(layer).image_takes())[:, expert]
        members = np.flatnonzero(gallery.trace.labels == gallery.trace.class_names.index(name))
        best = members[np.argsort(-share[members], kind="stable")][:CELL_PICTURES]
        pictures = [
            {
                "id": entry.examples.id_of(gallery.pictures, int(index)),
                "thumb": thumb(gallery.pictures.image(int(index))),
                "label": name,
                "share": round(float(share[index]), 4),
            }
            for index in best
        ]
        return {"pictures": pictures}

    def similar(self, request: Any) -> Json:
        """Patches of other pictures that took the same path of first choices."""
        given = read.fields(request, ("model", "variant", "path", "class"))
        entry, variant = self.model(given)
        path = read.path(given, variant.facts)
        gallery = self._gallery(entry, variant)
        label = None
        if given.get("class") is not None:
            label = gallery.trace.class_names.index(read.choice(given, "class", gallery.trace.class_names))
        alike = patches_on_path(gallery.trace, path, label=label, count=SIMILAR_PATCHES)
        patches = []
        for image, patch, weight in alike:
            found = _found(entry, gallery.pictures, image)
            patches.append(patch_json(found, variant.facts, patch, weight))
        return {"patches": patches}

    def _gallery(self, entry: Entry, variant: Variant) -> Gallery:
        gallery = self.galleries.gallery(entry, variant.facts.variant)
        if gallery is not None:
            return gallery
        if self.galleries.status(entry) == "computing":
            raise RequestError("The pictures are still being looked through: try again in a few seconds.", "busy")
        raise RequestError(
            f"{entry.card.title} has no pictures here: start the explorer with --data DIR to give it some."
        )

    def _experts_page(self, entry: Entry, facts: ModelFacts, layer: int, atlas: Json) -> Json:
        found = next(item for item in atlas["layers"] if item["layer"] == layer)
        loads = np.array(found["loads"], np.float64)
        shares = loads / max(loads.sum(), 1)
        shown = entry.examples.has_pictures
        experts = [
            {
                "expert": item["expert"],
                "name": f"L{layer}·E{item['expert']}",
                "load_share": round(float(shares[item["expert"]]), 4),
                "ideal_share": round(1 / len(shares), 4),
                **{kind: self._patches(entry, facts, item[kind]) if shown else [] for kind in ("top", "random")},
                "classes": item["classes"],
                "parts": item["parts"],
            }
            for item in found["experts"]
        ]
        source = f"From {atlas['n_images']:,} pictures: {atlas['data']}."
        note = f"{source} The heaviest patches flatter an expert; the random ones don't." if shown else source
        status = "ready" if shown else "no_pictures"
        return {"status": status, "layer": layer, "name": f"L{layer}", "experts": experts, "note": note}

    def _patches(self, entry: Entry, facts: ModelFacts, listed: Sequence[Any]) -> list[Json]:
        examples = entry.examples
        return [
            patch_json(examples.find(examples.id_of_name(name)), facts, patch, weight)
            for name, _, patch, weight in listed
        ]


def patch_json(found: Found, facts: ModelFacts, patch: int, weight: float) -> Json:
    """A patch in context: the crop, and where in it the patch lies as fractions [x, y, width, height]."""
    rows, columns = facts.grid
    context = 2 if len(found.pixels) // max(rows, columns) * 3 < CROP_PX else 1
    side = 1 / (1 + 2 * context)
    return {
        "picture": found.id,
        "patch": patch,
        "weight": round(float(weight), 4),
        "label": found.label,
        "crop": data_uri(patch_crop(found.pixels, facts.grid, patch, context), "jpeg"),
        "box": [round(value, 4) for value in (context * side, context * side, side, side)],
    }


def _found(entry: Entry, pictures: PictureSet, index: int) -> Found:
    label = pictures.label(index)
    word = pictures.class_names[label] if label >= 0 else None
    return Found(entry.examples.id_of(pictures, index), "", word, pictures.image(index))


def _waiting(status: str, **empty: Any) -> Json:
    notes = {
        "computing": "The pictures are being looked through.",
        "no_pictures": "This model has no pictures here: start the explorer with --data DIR to give it some.",
    }
    return {"status": status, **empty, "note": notes[status]}
