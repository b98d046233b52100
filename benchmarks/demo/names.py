"""What the experts of the bundled model of emoji take, and what pages cost without them.

    python -m benchmarks names --out benchmarks/demo/names.json        # card.json's fields, and a record

Three fields of card.json, each from pages that the others don't use:

- `names`: an expert is named after a group if more than half of its emoji on 3,600 validation pages are of it.
- `without`: accuracy on 9,000 test pages that the explorer doesn't show, before and after all experts of one name are
  taken away, on pages of that group and on all others. Beside it what the pages of the group lose, in points, when on
  each as many of its emoji, of any group, are sent past their expert at random: the mean of 20 draws.
- `matters`: the page that the explorer opens with. Of the 2,000 test pages that it shows, each that is named right
  loses the expert named after its own group; of those whose answer changes it is the page whose class loses most.
  `chosen` says among how many: a page that was chosen shows what can happen, the others how often. Of the first 60
  pages a single one changes, from .38, which as many emoji at random do as well.

`without_all` of the record is the accuracy on those 9,000 pages with all experts, and with none of the layer's: of all
pages, and by group.

`typed` of the record is for pages that a visitor types: how many pages are named right of which only the first emoji
are there, and the other cells empty. Their class is what most of those emoji are, ties left out.

Axes: I pages, N emoji of a page (16), E experts.
"""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.demo.falls import at_random, case_of, change_card, said
from benchmarks.harness import about, argument_parser, count, write_result
from moevision.analysis.collect import network_input
from moevision.analysis.describe import name_experts
from moevision.analysis.effects import remove_by_row, run_compared
from moevision.analysis.intervention import Intervention, apply_edits
from moevision.data.emoji import GROUPS, EmojiPages, draw_page, read_sheet
from moevision.demo.models import Entry, open_entries
from moevision.demo.service import Explorer
from moevision.layers import forward_routing, moe_layers, routing_lock
from moevision.models.io import SavedModel

MODEL = "emoji"
NAMING_PAGES = 3_600  # of "val"
SHOWN = 2_000  # test pages that the explorer shows: new ones come after them
DRAWS = 20
TYPED_PAGES = 1_800
_BATCH = 200


@dataclass(frozen=True)
class Pages:
    """Pages of emoji as the model reads them."""

    x: Tensor  # [I, 3, S, S]
    labels: NDArray[np.int64]  # [I]
    groups: NDArray[np.int64]  # [I, N] of each emoji

    @classmethod
    def of(cls, model: SavedModel, pages: EmojiPages, numbers: Sequence[int]) -> Pages:
        """The pages of those numbers."""
        images = np.stack([pages.image(number) for number in numbers])
        labels = np.array([pages.label(number) for number in numbers])
        emoji = np.stack([pages.emoji(number) for number in numbers])  # [I, N]
        return cls(network_input(model, images), labels, read_sheet().groups[emoji])

    @property
    def batches(self) -> tuple[Tensor, ...]:
        """Some pages at a time."""
        return self.x.split(_BATCH)


@torch.inference_mode()
def first_choices(model: SavedModel, pages: Pages) -> NDArray[np.int64]:
    """[I, N] the expert of each emoji."""
    batches = []
    for x in pages.batches:
        _, (routing,) = forward_routing(model.net, x)
        batches.append(routing.expert_index[..., 0].numpy())
    return np.concatenate(batches)


@torch.inference_mode()
def answers(model: SavedModel, pages: Pages, away: Sequence[int] = ()) -> NDArray[np.int64]:
    """[I] the class that the model says without those experts."""
    (layer,) = moe_layers(model.net)
    is_away = torch.zeros(1, layer.router.num_experts, dtype=torch.bool)
    is_away[0, list(away)] = True
    with routing_lock(model.net), apply_edits(model.net, {layer: remove_by_row(is_away)}):
        return np.concatenate([model.net(x).argmax(-1).numpy() for x in pages.batches])


@torch.inference_mode()
def right_at_random(
    model: SavedModel, pages: Pages, moved: NDArray[np.int64], draw: int
) -> NDArray[np.bool_]:
    """[I] whether a page is named right where `moved` [I] of its emoji, drawn at random, lose their expert."""
    (layer,) = moe_layers(model.net)
    # Read of it is only what takes the place of an expert: the next best one.
    like = Intervention("ablate", layer=0, expert=0)
    no_prefix = np.zeros_like(moved)
    counts = torch.from_numpy(np.stack([no_prefix, moved], 1))  # [I, 2]
    numbers = torch.arange(len(moved))

    found = []
    with routing_lock(model.net):
        for x, count, number in zip(
            pages.batches, counts.split(_BATCH), numbers.split(_BATCH), strict=True
        ):
            keys = [(draw, page) for page in number.tolist()]
            logits = run_compared(model.net, x, like, {layer: count}, keys)
            found.append(logits.argmax(-1).numpy())
    return np.concatenate(found) == pages.labels


def names_of(model: SavedModel, pages: Pages) -> list[dict[str, Any]]:
    """`names` of card.json."""
    (layer,) = moe_layers(model.net)
    experts = name_experts(
        first_choices(model, pages), pages.groups, layer.router.num_experts, GROUPS
    )
    return [
        {
            "layer": layer.layer_index,
            "expert": number,
            "name": expert.part,
            "share": round(expert.share, 4),
        }
        for number, expert in enumerate(experts)
        if expert.is_named
    ]


def without_of(
    model: SavedModel, pages: Pages, names: Sequence[dict[str, Any]], draws: int
) -> dict[str, Any]:
    """`without` of card.json."""
    by_name = defaultdict(list)
    for each in names:
        by_name[each["name"]].append(each["expert"])

    choices = first_choices(model, pages)
    before = answers(model, pages) == pages.labels
    found = {}
    for name, experts in by_name.items():
        is_own = pages.labels == GROUPS.index(name)
        after = answers(model, pages, experts) == pages.labels

        own_pages = Pages(pages.x[is_own], pages.labels[is_own], pages.groups[is_own])
        moved = np.isin(choices[is_own], experts).sum(1)
        right = [right_at_random(model, own_pages, moved, draw).mean() for draw in range(draws)]
        found[name] = {
            "experts": experts,
            "own": [round(float(each[is_own].mean()), 4) for each in (before, after)],
            "others": [round(float(each[~is_own].mean()), 4) for each in (before, after)],
            "random": round(100 * float(before[is_own].mean() - np.mean(right)), 2),
            "pages": len(before),
        }
    return found


def without_all_of(model: SavedModel, pages: Pages) -> dict[str, Any]:
    """Accuracy with all experts, and where every emoji skips them: `[before, after]` of all pages and of each group."""
    (layer,) = moe_layers(model.net)
    everything = range(layer.router.num_experts)
    right = [answers(model, pages, away) == pages.labels for away in ((), everything)]

    def shares(chosen: NDArray[np.bool_]) -> list[float]:
        return [round(float(each[chosen].mean()), 4) for each in right]

    groups = {name: shares(pages.labels == group) for group, name in enumerate(GROUPS)}
    return {"all": shares(pages.labels >= 0), "groups": groups, "pages": len(pages.labels)}


def chosen_page(
    entry: Entry, explorer: Explorer, names: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """`matters` of card.json, with `chosen`: of how many pages `right`, of a `named` group, the answers `change`."""
    right = 0
    named = 0
    cases = []
    for example in entry.examples.usable(0, SHOWN):
        before = said(explorer, entry, example.id, [])
        if before["class"] != example.label:
            continue
        right += 1
        own = [[each["layer"], each["expert"]] for each in names if each["name"] == example.label]
        named += bool(own)
        for expert in own:
            case = case_of(explorer, entry, example.id, [expert])
            if case["after"]["class"] != example.label:
                cases.append((before["p"] - left(explorer, entry, case), case))
    changed = len({case["picture"] for _, case in cases})
    _, strongest = max(cases, key=lambda one: one[0])
    base = {"images": SHOWN, "right": right, "named": named, "change": changed}
    return {**strongest, "chosen": base}


def left(explorer: Explorer, entry: Entry, case: dict[str, Any]) -> float:
    """The probability of the class before that is left after."""
    picture = {"kind": "example", "id": case["picture"]}
    request = {"model": entry.card.id, "picture": picture, "away": case["away"]}
    answer = explorer.answer("route", request)["prediction"]["moe"]
    likelihood = {one["class"]: one["p"] for one in answer}
    return float(likelihood[case["before"]["class"]])


@torch.inference_mode()
def typed_pages(model: SavedModel, num_emoji: int, pages: int, seed: int = 0) -> float:
    """Share of pages named right whose first cells have `num_emoji` emoji and whose others are empty."""
    drawn = EmojiPages(4 * pages, model.image_size, seed, "test")
    images = []
    labels = []
    characters = [one.character for one in read_sheet().emoji]
    for index in range(len(drawn)):
        emoji = [characters[number] for number in drawn.emoji(index)[:num_emoji]]
        name = EmojiPages.most_common_class(emoji)
        if name is not None and len(images) < pages:
            images.append(draw_page(emoji))
            labels.append(GROUPS.index(name))
    batches = network_input(model, np.stack(images)).split(_BATCH)
    found = torch.cat([model.net(x).argmax(-1) for x in batches])
    return round(float((found.numpy() == np.array(labels)).mean()), 4)


def record_of(options: Namespace) -> dict[str, Any]:
    """Name the experts, take them away, choose the page, and put all of it on the card."""
    (entry,) = (one for one in open_entries(None) if one.card.id == MODEL)
    model = entry.variants["trained"].saved
    side = model.image_size
    naming = Pages.of(model, EmojiPages(NAMING_PAGES, side, 0, "val"), range(NAMING_PAGES))
    names = names_of(model, naming)

    last = SHOWN + options.pages
    new = Pages.of(model, EmojiPages(last, side, 0, "test"), range(SHOWN, last))
    without = without_of(model, new, names, DRAWS)
    without_all = without_all_of(model, new)

    explorer = Explorer([entry])
    matters = chosen_page(entry, explorer, names)
    control = at_random(explorer, entry, matters)
    explorer.close()
    fields = {"names": names, "without": without, "matters": matters}
    change_card(MODEL, **fields)
    typed = {num: typed_pages(model, num, TYPED_PAGES) for num in (4, 8, 10, 12, 14, 16)}
    return {**fields, "without_all": without_all, "at_random": control, "typed": typed}


def main() -> None:
    """Measure, and put it on the card."""
    parser = argument_parser("names", __doc__)
    add = parser.add_argument
    add("--pages", type=count, default=9_000, metavar="N", help="new pages (%(default)s)")
    add("--out", type=Path, metavar="FILE", help="write a record")
    options = parser.parse_args()
    origin = about()
    torch.set_num_threads(1)
    write_result(options.out, {**origin, **record_of(options)})
