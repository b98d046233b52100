"""How many right answers of a model change without a few of its experts, beside as many patches moved at random.

    python -m benchmarks needed --model runs/photos --data path/to/test --out needed.json

For each image that the model names right, every set of at most two experts of one layer is taken away: their tokens go
to the best of the others. The control has for each of these sets a random one of as many patches of that image, which
are sent past their experts to the next best. An answer *changes* if one of the sets changes it: of a random one, too,
the best of equally many.

Axes: B images, M sets, E experts, N tokens, K choices of a token.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from benchmarks.harness import about, argument_parser, count, write_result
from moevision.analysis.collect import network_input
from moevision.analysis.effects import ExpertSet, expert_sets, remove_by_row
from moevision.analysis.images import PictureSet, open_pictures, read_images
from moevision.analysis.intervention import (
    Decision,
    Edit,
    apply_edits,
    numbered_layers,
    per_image_capacity,
    run_repeated,
)
from moevision.layers import MoEMlp
from moevision.models.io import SavedModel, load_model

LARGEST = 2  # experts of a set


def move_at_random(is_away: Tensor, num_prefix_tokens: int, generator: Generator) -> Edit:
    """An edit that, for sets of experts `is_away` [B, E], sends as many patches of image b past their experts."""

    def edit(decision: Decision) -> Decision:
        experts = decision.to_routing().expert_index  # [B, N, K]
        removed = decision.removed.clone()  # [B, N, E]
        num_tokens = experts.shape[1]
        for image, row in enumerate(is_away):
            goes = row[experts[image]].any(-1)[num_prefix_tokens:]  # [patches]
            order = torch.randperm(num_tokens - num_prefix_tokens, generator=generator)
            drawn = order[: int(goes.sum())] + num_prefix_tokens
            removed[image, drawn] = removed[image, drawn].scatter(1, experts[image, drawn], True)
        return replace(decision, removed=removed)

    return edit


def sets_away(sets: list[ExpertSet], num_experts: int) -> Tensor:
    """Bool [M, E] of sets of one layer."""
    is_away = torch.zeros(len(sets), num_experts, dtype=torch.bool)
    for row, (_, chosen) in enumerate(sets):
        is_away[row, list(chosen)] = True
    return is_away


class Changes:
    """Which sets change a model's answers, layer by layer."""

    def __init__(self, model: SavedModel) -> None:
        self.model = model
        self.layers = numbered_layers(model.net)
        self.generator = Generator().manual_seed(0)

    def of_image(self, x: Tensor, answer: int) -> dict[int, NDArray[np.bool_]]:
        """By layer, [2, M]: whether the answer to x [1, 3, S, S] is another one, without each set and at random."""
        prefix = int(getattr(self.model.net, "num_prefix_tokens", 0))
        found = {}
        for layer, moe in self.layers.items():
            is_away = sets_away(expert_sets({layer: moe}, LARGEST), moe.router.num_experts)
            edits = remove_by_row(is_away), move_at_random(is_away, prefix, self.generator)
            found[layer] = np.stack([self.answers(x, moe, edit, len(is_away)) for edit in edits])
        return {layer: answers != answer for layer, answers in found.items()}

    def answers(self, x: Tensor, moe: MoEMlp, edit: Edit, rows: int) -> NDArray[np.int64]:
        """The likeliest class [rows] of an image under an edit with so many rows."""
        same_image = torch.zeros(rows, dtype=torch.int64)
        with per_image_capacity(self.model.net), apply_edits(self.model.net, {moe: edit}):
            logits = run_repeated(self.model.net, x, same_image, moe)
        classes: NDArray[np.int64] = logits.argmax(-1).numpy()
        return classes


@torch.inference_mode()
def measure(model: SavedModel, pictures: PictureSet) -> dict[str, Any]:
    """The shares of right answers that change."""
    changes = Changes(model)
    changed: list[dict[int, NDArray[np.bool_]]] = []  # of the right answers
    for number in range(len(pictures)):
        x = network_input(model, read_images(pictures, [number]))
        answer = int(model.net(x).argmax(-1))
        if answer == pictures.label(number):
            changed.append(changes.of_image(x, answer))
    layers = {}
    for layer, moe in changes.layers.items():
        table = np.stack([one[layer] for one in changed])  # [right, 2, M]
        best = int(table[:, 0].mean(0).argmax())
        layers[layer] = {
            "sets": table.shape[2],
            "changed": int(table[:, 0].any(1).sum()),
            "at_random": int(table[:, 1].any(1).sum()),
            "one_set": list(expert_sets({layer: moe}, LARGEST)[best][1]),
            "one_set_changed": int(table[:, 0, best].sum()),
            "one_set_at_random": int(table[:, 1, best].sum()),
        }
    any_set = np.array([[one[layer].any(1) for layer in one] for one in changed]).any(1)
    return {
        "images": len(pictures),
        "right": len(changed),
        "changed": int(any_set[:, 0].sum()),
        "at_random": int(any_set[:, 1].sum()),
        "layers": layers,
    }


def record_of(options: Namespace) -> dict[str, Any]:
    """Measure a model."""
    model = load_model(options.model)
    pictures = open_pictures(
        options.data,
        model.image_size,
        framing=model.framing,
        split="all",
        limit=options.images * len(model.class_names),
        class_names=model.class_names,
    )
    return measure(model, pictures)


def main() -> None:
    """Measure, and write a record."""
    parser = argument_parser("needed", __doc__)
    add = parser.add_argument
    add("--model", required=True, help="a run's folder, or a saved model's")
    add("--data", required=True, help="labelled test images, as a folder")
    add("--images", type=count, default=50, metavar="N", help="of each class (%(default)s)")
    add("--out", type=Path, metavar="FILE", help="write a record")
    options = parser.parse_args()
    origin = about()
    torch.set_num_threads(1)
    write_result(options.out, {**origin, **record_of(options)})
