"""Which one expert matters most, of a bundled model's images: the case that the explorer leads to.

    python -m benchmarks matters pets        # card.json's `matters`

Each expert of each layer is taken away from each of the first images that the model gets right. The case is the one
in which the answer becomes another class and the right one loses most; a model without one has none.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.bundle import MODELS
from benchmarks.harness import argument_parser, count
from moevision.demo.models import Entry, open_entries
from moevision.demo.service import Explorer
from moevision.files import write_json_atomic


def strongest(entry: Entry, images: int) -> dict[str, Any] | None:
    """`picture`, `away`, and the likeliest class `before` and `after` with its probability; None if nothing flips."""
    explorer, found = Explorer([entry]), []
    for example in entry.examples.usable(0, images):
        asked = {"model": entry.card.id, "picture": {"kind": "example", "id": example.id}}
        before = explorer.answer("route", asked)["prediction"]["moe"][0]
        if before["class"] != example.label:
            continue
        for router in entry.facts.routers:
            for expert in range(router.num_experts):
                away = [[router.layer, expert]]
                prediction = explorer.answer("route", {**asked, "away": away})["prediction"]["moe"]
                left = next((one["p"] for one in prediction if one["class"] == example.label), 0.0)
                if prediction[0]["class"] != example.label:
                    case = {"picture": example.id, "away": away, "before": before, "after": prediction[0]}
                    found.append((before["p"] - left, case))
    explorer.close()
    return max(found, key=lambda one: one[0], default=(0.0, None))[1]


def main() -> None:
    """Find it, and put it on the card."""
    parser = argument_parser("matters", __doc__)
    parser.add_argument("model", help="id of a bundled model")
    parser.add_argument("--images", type=count, default=200, metavar="N", help="of its examples (%(default)s)")
    options = parser.parse_args()
    (entry,) = (one for one in open_entries(None) if one.card.id == options.model)
    file = MODELS / options.model / "card.json"
    card = json.loads(file.read_text(encoding="utf-8"))
    card["matters"] = strongest(entry, options.images)
    write_json_atomic(file, card)
    print(json.dumps(card["matters"], ensure_ascii=False))
