"""Which one expert matters most, of a bundled model's images: the case that the explorer leads to.

    python -m benchmarks matters cifar10 --out benchmarks/demo/matters.json        # card.json's `matters`, and a record

Each expert of each layer is taken away from each of the first images that the model gets right. The case is the one
in which the answer becomes another class and the right one loses most; a model without one has none. The record says
of how many images it is the strongest, and how likely its class stays when as much is taken away at random.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.bundle import MODELS
from benchmarks.harness import about, argument_parser, count, write_result
from moevision.demo.models import Entry, open_entries
from moevision.demo.service import Explorer
from moevision.files import write_json_atomic


def strongest(entry: Entry, images: int) -> dict[str, Any]:
    """The strongest case among `images` examples, None if nothing flips: likeliest class `before` and `after`."""
    explorer, cases = Explorer([entry]), []
    examples, right = entry.examples.usable(0, images), 0
    for example in examples:
        asked = {"model": entry.card.id, "picture": {"kind": "example", "id": example.id}}
        before = explorer.answer("route", asked)["prediction"]["moe"][0]
        if before["class"] != example.label:
            continue
        right += 1
        for router in entry.facts.routers:
            for expert in range(router.num_experts):
                away = [[router.layer, expert]]
                prediction = explorer.answer("route", {**asked, "away": away})["prediction"]["moe"]
                left = next((one["p"] for one in prediction if one["class"] == example.label), 0.0)
                if prediction[0]["class"] != example.label:
                    case = {
                        "picture": example.id,
                        "away": away,
                        "before": before,
                        "after": prediction[0],
                    }
                    cases.append((before["p"] - left, case))
    _, case = max(cases, key=lambda one: one[0], default=(0.0, None))
    flips = len({one["picture"] for _, one in cases})
    result = {"images": len(examples), "right": right, "flips": flips, "case": case}
    if case is not None:
        result["at_random"] = at_random(explorer, entry.card.id, case)
    explorer.close()
    return result


def at_random(explorer: Explorer, model: str, case: dict[str, Any]) -> list[float]:
    """The probability of the class before, with as many patches moved at random, in each draw of the explorer's."""
    ((layer, expert),) = case["away"]
    picture = {"kind": "example", "id": case["picture"]}
    without = {"kind": "ablate", "layer": layer, "expert": expert}
    effect = explorer.answer(
        "what_if", {"model": model, "picture": picture, "intervention": without}
    )
    likelihood = {one["class"]: one["p"] for one in effect["before"]}[effect["target"]]
    return [round(likelihood + change, 4) for change in effect["control"]["delta_ps"]]


def main() -> None:
    """Find it, and put it on the card."""
    parser = argument_parser("matters", __doc__)
    add = parser.add_argument
    add("model", help="id of a bundled model")
    add("--images", type=count, default=200, metavar="N", help="of its examples (%(default)s)")
    add("--out", type=Path, metavar="FILE", help="write a record")
    options = parser.parse_args()
    origin = about()
    (entry,) = (one for one in open_entries(None) if one.card.id == options.model)
    result = strongest(entry, options.images)
    file = MODELS / options.model / "card.json"
    card = json.loads(file.read_text(encoding="utf-8"))
    card["matters"] = result["case"]
    write_json_atomic(file, card)
    write_result(options.out, {**origin, "model": options.model, **result})
