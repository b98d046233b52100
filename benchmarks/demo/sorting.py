"""How the bundled router of whole images sorts test photos: which expert gets each class, and what is then answered.

    python -m benchmarks sorting --data path/to/cats_vs_dogs --out benchmarks/demo/sorting.json

`sorting` of card.json, of `cats_vs_dogs_two`: `routes` counts the test photos of each class that each expert got in the
last MoE layer, and `agree` those whose answer is the class of their expert, right or wrong. `photos` are the bundled
ones: the test photos may not be carried.

Axes: I photos, C classes, E experts.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.demo.falls import change_card
from benchmarks.harness import about, argument_parser, write_result
from moevision.analysis.collect import network_input
from moevision.analysis.images import PictureSet, open_pictures, read_images
from moevision.demo.models import open_entries
from moevision.layers import forward_routing
from moevision.models.io import SavedModel

MODEL = "cats_vs_dogs_two"
_BATCH = 26


class Sorted(NamedTuple):
    """What became of photos."""

    experts: NDArray[np.int64]  # [I] in the last MoE layer
    answers: NDArray[np.int64]  # [I] the likeliest class


@torch.inference_mode()
def sort(model: SavedModel, pictures: PictureSet) -> Sorted:
    """The expert and the answer of each photo."""
    experts = []
    answers = []
    for start in range(0, len(pictures), _BATCH):
        numbers = range(start, min(start + _BATCH, len(pictures)))
        logits, routings = forward_routing(
            model.net, network_input(model, read_images(pictures, numbers))
        )
        experts.append(routings[-1].expert_index[:, 0, 0].numpy())  # the same for every token
        answers.append(logits.argmax(-1).numpy())
    return Sorted(np.concatenate(experts), np.concatenate(answers))


def routes_of(labels: NDArray[np.int64], experts: NDArray[np.int64], size: int) -> list[list[int]]:
    """[C][E] how many photos of each class each expert got; as many experts as classes, `size`."""
    table = np.zeros((size, size), np.int64)
    np.add.at(table, (labels, experts), 1)
    rows: list[list[int]] = table.tolist()
    return rows


def record_of(options: Namespace) -> dict[str, Any]:
    """Sort the test photos and the bundled ones, and put it on the card."""
    (entry,) = (one for one in open_entries(None) if one.card.id == MODEL)
    model = entry.variants["trained"].saved
    classes = list(model.class_names)
    test = open_pictures(
        options.data, model.image_size, framing=model.framing, class_names=model.class_names
    )
    labels = np.array([test.label(number) for number in range(len(test))])
    found = sort(model, test)
    routes = routes_of(labels, found.experts, len(classes))
    class_of_expert = np.argmax(routes, 0)  # [E] which it mostly gets

    shown = entry.examples.pictures
    assert shown is not None
    photos = sort(model, shown)
    sorting = {
        "layer": entry.facts.layers[-1],
        "classes": classes,
        "routes": routes,
        "agree": int((found.answers == class_of_expert[found.experts]).sum()),
        "right": int((found.answers == labels).sum()),
        "images": len(test),
        "photos": [
            {
                "id": entry.examples.id_of(shown, number),
                "expert": int(photos.experts[number]),
                "answer": classes[photos.answers[number]],
            }
            for number in range(len(shown))
        ],
    }
    change_card(MODEL, sorting=sorting)
    return sorting


def main() -> None:
    """Measure, and put it on the card."""
    parser = argument_parser("sorting", __doc__)
    parser.add_argument("--data", required=True, help="the photos of cats and dogs, as a folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a record")
    options = parser.parse_args()
    origin = about()
    torch.set_num_threads(1)
    write_result(options.out, {**origin, **record_of(options)})
