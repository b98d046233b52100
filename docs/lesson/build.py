"""A lesson of 45 minutes as one HTML file that needs neither server nor network.

    python docs/lesson/build.py docs/lesson.html
    python docs/lesson/build.py docs/lesson.html --measure    # its numbers anew first: half a minute on one core

Text, toy and style lie beside this file; the view of a page and its boxes, and the page's base, are the explorer's.
`measure` makes all numbers from the bundled model of emoji: views of one page, whole and without each expert, as
`route_image` exports them; what every expert would make of every emoji of that page, so that a reader's own sorting is
computed by the model's weights; and counts over test pages. Others are read: the page, its base rate and what a group's
pages do without their expert are in the model's card, what experts bring in the record of benchmarks/experts_pay.

Axes: I pages, P emoji of a page (a patch each), E experts, G groups, D width.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from moevision.analysis import Intervention, effect
from moevision.analysis.collect import layer_inputs, network_input
from moevision.analysis.intervention import intervene, numbered_layers
from moevision.data import EmojiPages
from moevision.data.emoji import CELLS, GROUPS, draw_cells, read_sheet
from moevision.demo.facts import ModelFacts, PictureFacts, describe
from moevision.demo.html import (
    CORE_STYLES,
    document,
    read_asset,
    read_css,
    script_of,
    without_comments,
)
from moevision.demo.models import bundled_folder, bundled_model, read_card
from moevision.demo.view import Settings, route_image
from moevision.demo.wire import data_uri, encode_float32
from moevision.efficiency import measure_cost
from moevision.errors import json_text
from moevision.files import write_text_atomic
from moevision.layers import forward_routing
from moevision.models.io import SavedModel

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parents[1]
NUMBERS: Final = "lesson_numbers.json"
MODEL: Final = "emoji"
PAGES: Final = 1000  # of the test split, over which is counted
GATE_PATCH: Final = 12  # of the page: its router's choice is computed by hand
SAMPLE: Final = CELLS**2  # emoji of an expert that are shown
NAMED: Final = (
    0.5  # an expert has a name where more of its emoji are of one group, as in the explorer
)
DRAWS: Final = 10  # of random directions, and of random routings
_BATCH = 100
Ints = npt.NDArray[np.int64]
Json = dict[str, Any]


def read_module(name: str) -> str:
    """The text of a module: the lesson's own, or one that it takes from the explorer."""
    own = HERE / name
    return own.read_text(encoding="utf-8") if own.exists() else read_asset(name)


def lesson_html() -> str:
    """The page."""
    script = script_of(
        "lesson.js",
        "startLesson(document.querySelector('[data-lesson]'), LESSON);",
        read=read_module,
        LESSON=json.loads(read_module(NUMBERS)),
    )
    style = f"{read_css(CORE_STYLES)}\n{without_comments(read_module('lesson.css'))}"
    body = (
        '<main class="mv lesson" data-lesson><noscript>This lesson is computed in the page: allow its script.'
        "</noscript></main>"
    )
    return document("Mixture of Experts in 45 minutes", style, body, script)


class Pages:
    """Test pages of emoji, and what the model makes of them."""

    def __init__(self, saved: SavedModel, first: int, count: int) -> None:
        pages = EmojiPages(first + count, saved.image_size, split="test")
        indices = range(first, first + count)
        self.saved = saved
        self.labels: Ints = np.array([pages.label(index) for index in indices])  # [I]
        self.emoji: Ints = np.stack([pages.emoji(index) for index in indices])  # [I, P]
        self.groups: Ints = read_sheet().groups[self.emoji]  # [I, P]
        self.images = [pages.image(index) for index in indices]
        self.input = network_input(saved, np.stack(self.images))

    @torch.inference_mode()
    def experts(self) -> Ints:
        """The expert of each emoji [I, P]."""
        routings = [
            forward_routing(self.saved.net, batch)[1][0] for batch in self.input.split(_BATCH)
        ]
        return torch.cat([routing.expert_index[..., 0] for routing in routings]).numpy()

    @torch.inference_mode()
    def accuracy(self, *changes: Intervention) -> float:
        """The share of pages that are named right under changes of the routing."""
        with intervene(self.saved.net, *changes):
            batches = self.input.split(_BATCH)
            answers = torch.cat([self.saved.net(batch).argmax(1) for batch in batches])
        return _rounded(float((answers.numpy() == self.labels).mean()))


def measure() -> Json:
    """Every number of the lesson, as JSON."""
    saved = bundled_model(MODEL)
    card = read_card(bundled_folder(MODEL) / "card.json")
    page = Pages(saved, int(card.matters["picture"].rpartition("/")[2]), 1)
    test = Pages(saved, 0, PAGES)
    experts = test.experts()
    return {
        "schema": "moevision.lesson/2",
        "model": _model(saved, card),
        "page": _page(page),
        "views": _views(page, describe(saved, title=card.title)),
        "sorting": _sorting(page),
        "gate": _gate(page),
        "taken": _taken(test, experts),
        "guessed": _guessed(page, test, experts),
        "right": _right(test),
        "effects": [_effect(page, expert) for expert in range(_num_experts(saved))],
        "without": card.without,
        "chosen": card.matters["chosen"],
        "pays": pays(),
    }


def _model(saved: SavedModel, card: Any) -> Json:
    """Sizes of the model, and how often it and its dense twin are right."""
    (layer,) = numbered_layers(saved.net).values()
    _, hidden, width = layer.experts.fc1.weight.shape
    cost = measure_cost(saved.net, saved.image_size)
    return {
        "title": card.title,
        "data": card.data,
        "licence": card.licence,
        "image_size": saved.image_size,
        "grid": [CELLS, CELLS],
        "groups": list(GROUPS),
        "experts": layer.router.num_experts,
        "top_k": layer.router.top_k,
        "width": width,
        "hidden": hidden,
        "parameters": cost.total_parameters,
        "active_parameters": cost.active_parameters,
        "accuracy": card.accuracy,
        "accuracy_interval": card.accuracy_interval,
        "test_images": card.test_images,
    }


def _page(page: Pages) -> Json:
    """The emoji of the page that the explorer opens, and which of them are of the page's own group."""
    emoji = [read_sheet().emoji[number] for number in page.emoji[0]]
    group = GROUPS[page.labels[0]]
    return {
        "group": group,
        "names": [one.name for one in emoji],
        "groups": [one.group for one in emoji],
        "of_group": [cell for cell, one in enumerate(emoji) if one.group == group],
    }


def _views(page: Pages, facts: ModelFacts) -> Json:
    """The page's view, and of the views without one expert what differs from it."""
    picture = PictureFacts(page.images[0], name="a page of emoji", label=GROUPS[page.labels[0]])

    def view(*ablated: Intervention) -> Json:
        settings = Settings(ablated_experts=ablated)
        return route_image(
            page.saved, page.images[0], settings=settings, facts=facts, picture=picture
        ).to_json()

    whole = view()
    (layer,) = facts.layers
    without = []
    for expert in range(_num_experts(page.saved)):
        changed = view(Intervention("ablate", layer=layer, expert=expert))
        for one in changed["layers"]:
            one["computation"] = None  # the picture of the sums is of the whole model
        without.append({name: changed[name] for name in ("layers", "prediction", "settings")})
    return {"all": whole, "without": without}


@torch.inference_mode()
def _sorting(page: Pages) -> Json:
    """What each expert makes of each emoji of the page, and how the mean over them becomes an answer.

    The model has one block, whose attention comes before its experts, and reads the mean over the emoji. So an emoji's
    part in that mean depends on its own expert alone. A forced expert gets the gate of the emoji's first choice.
    """
    net, (layer,) = page.saved.net, numbered_layers(page.saved.net)
    of_expert = []
    for expert in range(_num_experts(page.saved)):
        with intervene(net, Intervention("force", layer=layer, expert=expert)):
            of_expert.append(net.forward_features(page.input)[0])  # [P, D]
    parts = torch.stack(of_expert, 1)  # [P, E, D]

    # The norm before the head has a weight and a bias for every channel: they go into the head.
    norm, head = net.fc_norm, net.head
    return {
        "parts": encode_float32(parts.flatten(0, 1).numpy()),
        "head": encode_float32((head.weight * norm.weight).numpy()),
        "bias": encode_float32((head.bias + head.weight @ norm.bias).numpy()),
        "eps": norm.eps,
        "own": page.experts()[0].tolist(),
    }


def _gate(page: Pages) -> Json:
    """Scores, softmax shares and the kept expert of one emoji."""
    layer = route_image(page.saved, page.images[0]).layers[0]
    assert layer.computation is not None
    return {
        "patch": GATE_PATCH,
        "scores": np.round(layer.computation.scores[GATE_PATCH].astype(float), 4).tolist(),
        "shares": np.round(layer.probs[GATE_PATCH].astype(float), 4).tolist(),
        "expert": int(layer.expert_index[GATE_PATCH, 0]),
        "weight": _rounded(float(layer.combine_weight[GATE_PATCH, 0])),
    }


def _taken(test: Pages, experts: Ints) -> Json:
    """What every expert takes: emoji by group, the name that they give it, and some at random to look at."""
    num_experts = _num_experts(test.saved)
    counts = _counted(experts, test.groups, num_experts)  # [E, G]
    shares = counts / counts.sum(1, keepdims=True)
    rng = np.random.default_rng(0)
    rows = []
    for expert in range(num_experts):
        most = int(shares[expert].argmax())
        taken = test.emoji[experts == expert]
        sample = rng.choice(taken, SAMPLE, replace=False)
        rows.append(
            {
                "expert": expert,
                "group": GROUPS[most],
                "share": _rounded(shares[expert, most]),
                "named": bool(shares[expert, most] > NAMED),
                "of_group": _rounded(counts[expert, most] / counts[:, most].sum()),
                "load": _rounded(counts[expert].sum() / counts.sum()),
                "sample": data_uri(draw_cells(sample)),
                "sample_groups": [GROUPS[group] for group in read_sheet().groups[sample]],
            }
        )
    return {"pages": len(experts), "experts": rows}


def _guessed(page: Pages, test: Pages, experts: Ints) -> Json:
    """How often an emoji's group is guessed right from its box: of the router, of random directions, of clusters.

    A box is named by its most frequent group on the first half of the pages; guessed is on the second half. Random
    directions and clusters read what the router reads.
    """
    from sklearn.cluster import KMeans

    net, num_experts = test.saved.net, _num_experts(test.saved)
    (read,) = layer_inputs(net, test.input).values()
    (read_of_page,) = layer_inputs(net, page.input).values()
    half = len(experts) // 2

    directions = np.random.default_rng(0).normal(size=(DRAWS, read.shape[-1], num_experts))
    clusters = KMeans(num_experts, n_init=4, random_state=0).fit(read[:half].flatten(0, 1).numpy())
    by_cluster = clusters.predict(read.flatten(0, 1).numpy()).reshape(experts.shape)
    by_chance = [
        _guess(test, (read.numpy() @ direction).argmax(-1), half) for direction in directions
    ]
    return {
        "pages": len(experts) - half,
        "trained": _guess(test, experts, half),
        "random": _rounded(float(np.mean(by_chance))),
        "random_best": max(by_chance),
        "clusters": _guess(test, by_cluster, half),
        "chance": _rounded(np.bincount(test.groups[half:].ravel()).max() / test.groups[half:].size),
        "draws": DRAWS,
        "random_page": (read_of_page.numpy() @ directions[0]).argmax(-1)[0].tolist(),
    }


def _guess(test: Pages, boxes: Ints, half: int) -> float:
    """The share of emoji of the second half whose group is the most frequent one of their box in the first half."""
    names = _counted(boxes[:half], test.groups[:half], _num_experts(test.saved)).argmax(1)
    return _rounded(float((names[boxes[half:]] == test.groups[half:]).mean()))


def _counted(boxes: Ints, groups: Ints, num_boxes: int) -> Ints:
    """How many emoji of each group are in each box [E, G]."""
    counts = np.zeros((num_boxes, len(GROUPS)), np.int64)
    np.add.at(counts, (boxes.ravel(), groups.ravel()), 1)
    return counts


def _right(test: Pages) -> Json:
    """Accuracy on test pages as the model is, with random experts, and with one expert for all emoji."""
    (layer,) = numbered_layers(test.saved.net)
    random = [
        test.accuracy(Intervention("random", layer=layer, seed=seed)) for seed in range(DRAWS)
    ]
    return {
        "pages": len(test.labels),
        "all": test.accuracy(),
        "random": _rounded(float(np.mean(random))),
        "one": [
            test.accuracy(Intervention("force", layer=layer, expert=expert))
            for expert in range(_num_experts(test.saved))
        ],
    }


def _effect(page: Pages, expert: int) -> Json:
    """What taking an expert away does to the page, beside as many emoji sent past their expert at random."""
    (layer,) = numbered_layers(page.saved.net)
    change = Intervention("ablate", layer=layer, expert=expert)
    return effect(page.saved, page.images[0], change).to_json()


def pays() -> Json:
    """What experts bring at equal time on pages of emoji, in points, by the record of benchmarks/experts_pay."""
    sys.path[:0] = [str(ROOT)]  # benchmarks/ is outside the package
    from benchmarks.experts_pay import recompute as study

    runs = study.read_runs()
    tasks = {name: study.Task(runs, name) for name in ("kinds", "groups")}
    best = {name: study.best_moe(task) for name, task in tasks.items()}

    def contrast(name: str, arm: str) -> str:
        return study.pays(tasks[name], arm).text

    return {
        "seeds": len(tasks["kinds"].of_arm(best["kinds"])),
        "kinds": contrast("kinds", best["kinds"]),
        "groups": contrast("groups", best["groups"]),
        "named": contrast("groups", study.RECIPE),
    }


def _num_experts(saved: SavedModel) -> int:
    (layer,) = numbered_layers(saved.net).values()
    return int(layer.router.num_experts)


def _rounded(value: float) -> float:
    return round(float(value), 4)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page, and its numbers if asked to."""
    about = "Write the lesson as one HTML file."
    parser = argparse.ArgumentParser(prog="python docs/lesson/build.py", description=about)
    parser.add_argument("out", type=Path)
    parser.add_argument("--measure", action="store_true", help="measure the numbers anew first")
    given = parser.parse_args(arguments)
    if given.measure:
        rows = [f"{json_text(name)}: {json_text(value)}" for name, value in measure().items()]
        write_text_atomic(HERE / NUMBERS, "{\n" + ",\n".join(rows) + "\n}\n")
    write_text_atomic(given.out, lesson_html())


if __name__ == "__main__":
    main()
