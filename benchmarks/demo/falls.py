"""The smallest sets of experts without which a bundled model answers otherwise.

    python -m benchmarks falls --out benchmarks/demo/falls.json        # every model; card.json, and a record

For each of a model's first examples that it names right, all sets of at most three experts of one layer are taken away.
`falls` of card.json has the smallest set that makes another class the likeliest; of several of that size, the one by
which the right class loses most. Where no set does, it has the answer without all experts of all layers.

`matters` is the case that the explorer leads to: the strongest one with a single expert, among more examples. `chosen`
says of how many, and in how many an answer changes; the record how likely its class stays when as much is taken away at
random.
Of pages of emoji `names.py` chooses it.

Axes: I images, M sets of experts of a layer, E experts, C classes.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.bundle import MODELS
from benchmarks.harness import about, argument_parser, count, write_result
from moevision.analysis.collect import network_input
from moevision.analysis.intervention import (
    Decision,
    apply_edits,
    numbered_layers,
    per_image_capacity,
    run_repeated,
)
from moevision.demo.facts import PictureFacts
from moevision.demo.models import Entry, open_entries
from moevision.demo.service import Explorer
from moevision.files import write_json_atomic
from moevision.layers import routing_lock
from moevision.models.io import SavedModel

LARGEST = 3  # experts of a set
SHOWN = 16  # examples with a smallest set
CHOSEN_ELSEWHERE = "emoji"  # names.py chooses the page that the explorer leads to
_BATCH = 64

Away = tuple[int, tuple[int, ...]]  # the layer, and its experts that are taken away


class Answers(NamedTuple):
    """What a model says about images, with all experts and without each set."""

    before: Tensor  # [I, C] probabilities
    sets: list[Away]
    without: Tensor  # [I, sets, C] probabilities


@torch.inference_mode()
def answers_without(model: SavedModel, images: Sequence[Any], largest: int) -> Answers:
    """The answers without each set of at most `largest` experts of one layer; images are uint8 [S, S, 3]."""
    net = model.net
    before = []
    without = []
    sets: list[Away] = []
    for layer, moe in numbered_layers(net).items():
        sets += [(layer, chosen) for chosen in sets_of(moe.router.num_experts, largest)]

    with routing_lock(net):
        for image in images:
            x = network_input(model, np.stack([image]))
            before.append(net(x)[0].softmax(-1))
            without.append(_without_each(net, x, largest))
    return Answers(torch.stack(before), sets, torch.stack(without))


def sets_of(num_experts: int, largest: int) -> list[tuple[int, ...]]:
    """All sets of 1 to `largest` experts, the smaller ones first."""
    sizes = range(1, min(largest, num_experts) + 1)
    return [chosen for size in sizes for chosen in combinations(range(num_experts), size)]


def _without_each(net: Any, x: Tensor, largest: int) -> Tensor:
    """Probabilities [sets, C] of the image x [1, 3, S, S], several sets in a batch."""
    rows = []
    for moe in numbered_layers(net).values():
        num_experts = moe.router.num_experts
        sets = sets_of(num_experts, largest)
        is_away = torch.zeros(len(sets), num_experts, dtype=torch.bool)  # [M, E]
        for row, chosen in enumerate(sets):
            is_away[row, list(chosen)] = True
        for batch in is_away.split(_BATCH):
            same_image = torch.zeros(len(batch), dtype=torch.int64)
            with per_image_capacity(net), apply_edits(net, {moe: remove_by_row(batch)}):
                rows.append(run_repeated(net, x, same_image, moe).softmax(-1))
    return torch.cat(rows)


def remove_by_row(is_away: Tensor) -> Any:
    """An edit that takes other experts, `is_away` [M, E], away from each image of a batch."""

    def edit(decision: Decision) -> Decision:
        return replace(decision, removed=decision.removed | is_away[:, None, :])

    return edit


def smallest(before: Tensor, sets: Sequence[Away], without: Tensor) -> Away | None:
    """The smallest set without which the answer is another one, the class before losing most; None without one.

    `before` [C] and `without` [sets, C] are probabilities of one image.
    """
    own = int(before.argmax())
    falling = [
        (len(chosen), float(row[own]), layer, chosen)
        for (layer, chosen), row in zip(sets, without, strict=True)
        if int(row.argmax()) != own
    ]
    if not falling:
        return None
    _, _, layer, chosen = min(falling)
    return layer, chosen


def falls_of(explorer: Explorer, entry: Entry, examples: Sequence[PictureFacts]) -> dict[str, Any]:
    """`falls` of card.json: by example what is taken away, and the Explorer's own answers before and after."""
    answers = answers_without(saved_of(entry), [one.pixels for one in examples], LARGEST)
    falls = {}
    for example, before, without in zip(examples, answers.before, answers.without, strict=True):
        own = said(explorer, entry, example.id, [])
        if example.label not in (None, own["class"]):
            continue
        found = smallest(before, answers.sets, without)
        if found is None:
            everything = [
                [router.layer, expert]
                for router in entry.facts.routers
                for expert in range(router.num_experts)
            ]
            left = said(explorer, entry, example.id, everything)
            falls[example.id] = {"away": None, "all": left}
            continue
        layer, chosen = found
        away = [[layer, expert] for expert in chosen]
        after = said(explorer, entry, example.id, away)
        falls[example.id] = {"away": away, "before": own, "after": after}
    return falls


def strongest(explorer: Explorer, entry: Entry, examples: Sequence[PictureFacts]) -> dict[str, Any]:
    """The strongest case with a single expert away, None where no answer changes; and of how many it is that."""
    answers = answers_without(saved_of(entry), [one.pixels for one in examples], 1)
    names = entry.facts.class_names
    cases = []
    num_right = 0
    for example, before, without in zip(examples, answers.before, answers.without, strict=True):
        own = int(before.argmax())
        if example.label != names[own]:
            continue
        num_right += 1
        found = smallest(before, answers.sets, without)
        if found is not None:
            row = answers.sets.index(found)
            cases.append((float(before[own] - without[row, own]), example.id, found))

    result = {"images": len(examples), "right": num_right, "flips": len(cases), "case": None}
    if cases:
        _, id, (layer, (expert,)) = max(cases)
        chosen = {"images": len(examples), "right": num_right, "change": len(cases)}
        result["case"] = case_of(explorer, entry, id, [[layer, expert]]) | {"chosen": chosen}
        result["at_random"] = at_random(explorer, entry, result["case"])
    return result


def case_of(explorer: Explorer, entry: Entry, id: str, away: list[list[int]]) -> dict[str, Any]:
    """`matters` of card.json: an example, what is taken away, and the answer before and after."""
    before, after = said(explorer, entry, id, []), said(explorer, entry, id, away)
    return {"picture": id, "away": away, "before": before, "after": after}


def at_random(explorer: Explorer, entry: Entry, case: dict[str, Any]) -> list[float]:
    """The probability of the class before, with as many patches moved at random, in each draw of the explorer's."""
    ((layer, expert),) = case["away"]
    effect = explorer.answer(
        "what_if",
        {
            "model": entry.card.id,
            "picture": {"kind": "example", "id": case["picture"]},
            "intervention": {"kind": "ablate", "layer": layer, "expert": expert},
        },
    )
    if effect["control"] is None:  # each image has one expert
        return []
    likelihood = {one["class"]: one["p"] for one in effect["before"]}[effect["target"]]
    return [round(likelihood + change, 4) for change in effect["control"]["delta_ps"]]


def said(explorer: Explorer, entry: Entry, id: str, away: list[list[int]]) -> dict[str, Any]:
    """The class that the explorer answers about an example, and its probability."""
    picture = {"kind": "example", "id": id}
    view = explorer.answer("route", {"model": entry.card.id, "picture": picture, "away": away})
    answer: dict[str, Any] = view["prediction"]["moe"][0]
    return answer


def saved_of(entry: Entry) -> SavedModel:
    """The trained model."""
    return entry.variants["trained"].saved


def change_card(model: str, **fields: Any) -> None:
    """Write fields of a bundled model's card.json."""
    file = MODELS / model / "card.json"
    card = json.loads(file.read_text(encoding="utf-8"))
    write_json_atomic(file, card | fields)


def record_of(options: Namespace) -> dict[str, Any]:
    """Search every model's examples, and put what was found on the cards."""
    models = {}
    for entry in open_entries(None):
        id = entry.card.id
        explorer = Explorer([entry])
        falls = falls_of(explorer, entry, entry.examples.usable(0, SHOWN))
        models[id] = {"falls": falls}
        change_card(id, falls=falls)
        if id != CHOSEN_ELSEWHERE:
            models[id] |= strongest(explorer, entry, entry.examples.usable(0, options.images))
            change_card(id, matters=models[id]["case"])
        explorer.close()
    return models


def main() -> None:
    """Find them, and put them on the cards."""
    parser = argument_parser("falls", __doc__)
    add = parser.add_argument
    add(
        "--images",
        type=count,
        default=200,
        metavar="N",
        help="examples among which the strongest case is looked for (%(default)s)",
    )
    add("--out", type=Path, metavar="FILE", help="write a record")
    options = parser.parse_args()
    origin = about()
    torch.set_num_threads(1)
    write_result(options.out, {**origin, "models": record_of(options)})
