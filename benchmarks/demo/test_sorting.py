"""Sorting photos: counts by hand, and the bundled photos as the explorer routes them."""

import numpy as np

from benchmarks.demo.sorting import MODEL, routes_of
from moevision.demo.models import open_entries
from moevision.demo.service import Explorer


def test_routes_are_counted_by_class_and_expert() -> None:
    """Of three cats two are at expert 0; both dogs are at expert 1."""
    labels, experts = np.array([0, 0, 0, 1, 1]), np.array([0, 1, 0, 1, 1])
    assert routes_of(labels, experts, 2) == [[2, 1], [0, 2]]


def test_the_cards_photos_go_where_the_explorer_sends_them() -> None:
    (entry,) = (one for one in open_entries(None) if one.card.id == MODEL)
    sorting = entry.card.sorting
    assert sorting is not None
    assert sum(map(sum, sorting["routes"])) == sorting["images"]
    assert {photo["id"] for photo in sorting["photos"]} == set(entry.examples.all_ids)
    explorer = Explorer([entry])
    for photo in sorting["photos"]:
        picture = {"kind": "example", "id": photo["id"]}
        view = explorer.answer("route", {"model": MODEL, "picture": picture})
        layer = view["layers"][entry.facts.layers.index(sorting["layer"])]
        assert {experts[0] for experts in layer["experts"]} == {photo["expert"]}
        assert view["prediction"]["moe"][0]["class"] == photo["answer"]
    explorer.close()
