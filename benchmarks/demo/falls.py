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
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.bundle import MODELS
from benchmarks.harness import about, argument_parser, count, write_result
from moevision.analysis.effects import ExpertSet, answers_without, expert_sets, fewest_experts
from moevision.analysis.intervention import numbered_layers
from moevision.demo.facts import PictureFacts
from moevision.demo.models import Entry, open_entries
from moevision.demo.service import Explorer
from moevision.files import write_json_atomic
from moevision.models.io import SavedModel

LARGEST = 3  # experts of a set
SHOWN = 16  # examples with a smallest set
CHOSEN_ELSEWHERE = "emoji"  # names.py chooses the page that the explorer leads to


class Answers(NamedTuple):
    """What a model says about images, with all experts and without each set."""

    before: Tensor  # [I, C] probabilities
    sets: list[ExpertSet]
    without: Tensor  # [I, sets, C] probabilities


def all_answers(model: SavedModel, images: Sequence[Any], largest: int) -> Answers:
    """The answers without each set of at most `largest` experts of one layer; images are uint8 [S, S, 3]."""
    answers = [answers_without(model, image, largest) for image in images]
    before, without = zip(*answers, strict=True)
    sets = expert_sets(numbered_layers(model.net), largest)
    return Answers(torch.stack(before), sets, torch.stack(without))


def falls_of(explorer: Explorer, entry: Entry, examples: Sequence[PictureFacts]) -> dict[str, Any]:
    """`falls` of card.json: by example what is taken away, and the Explorer's own answers before and after."""
    answers = all_answers(saved_of(entry), [one.pixels for one in examples], LARGEST)
    falls = {}
    for example, before, without in zip(examples, answers.before, answers.without, strict=True):
        own = said(explorer, entry, example.id, [])
        if example.label not in (None, own["class"]):
            continue
        found = fewest_experts(before, answers.sets, without)
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
    answers = all_answers(saved_of(entry), [one.pixels for one in examples], 1)
    names = entry.facts.class_names
    cases = []
    num_right = 0
    for example, before, without in zip(examples, answers.before, answers.without, strict=True):
        own = int(before.argmax())
        if example.label != names[own]:
            continue
        num_right += 1
        found = fewest_experts(before, answers.sets, without)
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
