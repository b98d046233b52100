"""`moevision cut MODEL --classes A B --out DIR`: a model of some classes with the experts that they use, and its price.

Experts are chosen on training images, their number on validation images, and what is printed is measured on the test
images, once.

Axes: E experts, I images.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from moevision.analysis.collect import PictureReader
from moevision.analysis.effects import class_index
from moevision.analysis.images import PictureSet, View, balanced_subset, find_images
from moevision.commands.export import latency_ms
from moevision.errors import UserError, escape_controls
from moevision.files import require_new_or_empty, write_json_atomic
from moevision.layers import forward_routing, moe_layers
from moevision.models.cut import check_cuttable, cut
from moevision.models.io import SavedModel, save_model
from moevision.models.safe_files import WEIGHTS
from moevision.train.checkpoint import load_trained
from moevision.types import Json
from moevision.words import loading, percent, points, shell_word

CHOOSING_IMAGES = 100  # of each class, on which experts are chosen
TOLERANCE = 0.01  # accuracy that fewer experts may cost on the validation images
DRAWS = 10  # of as many experts at random
_BATCH = 32

Experts = Mapping[int, Sequence[int]]
"""Some experts of each MoE layer, by block number."""

Labelled = list[tuple[Tensor, Tensor]]
"""Images as the model gets them, [B, 3, S, S], with labels among the kept classes, [B]; in batches."""


def run(args: Namespace) -> None:
    """Choose experts, measure the cut model, and write it with `cut.json`."""
    out = Path(args.out)
    require_new_or_empty(out)
    with loading("reading the model"):
        model = load_trained(args.model)
    check_cuttable(model)
    classes = class_indices(model, args.classes)
    out.mkdir(parents=True, exist_ok=True)  # what can't be written fails before it is measured
    images = Images.of(model, classes, args)

    with loading("choosing experts on training images"):
        ranking = most_used(model, images.train)
        others = most_used(model, images.others) if images.others else None
    with loading("choosing their number on validation images"):
        count = min(
            args.experts or fewest(model, classes, ranking, images.val),
            max(map(len, ranking.values())),
        )
    with loading("measuring on test images"):
        right = compare(model, classes, ranking, others, count, images.test)

    small = cut(model, classes, first(ranking, count))
    save_model(small, out)
    record = {
        "source": args.model,
        "classes": small.class_names,
        "experts": first(ranking, count),
        "test_images": sum(len(labels) for _, labels in images.test),
        "right": right,
        "costs": {"before": cost_of(model), "after": cost_of(small)},
        "bytes": (out / WEIGHTS).stat().st_size,
    }
    write_json_atomic(out / "cut.json", record)
    tell(record, len(model.class_names), shell_word(str(out)))


def class_indices(model: SavedModel, names: Sequence[str]) -> list[int]:
    """The classes of these names, in the model's order; a UserError if one is unknown or fewer than two are left."""
    classes = sorted({class_index(model.class_names, name) for name in names})
    if len(classes) < 2:
        raise UserError("A model of one class has nothing to tell apart: give --classes two.")
    return classes


@dataclass(frozen=True)
class Images:
    """What a cut is chosen and measured on."""

    train: Labelled  # of the kept classes
    others: Labelled  # training images of the other classes
    val: Labelled
    test: Labelled

    @classmethod
    def of(cls, model: SavedModel, classes: Sequence[int], args: Namespace) -> Images:
        """Read them, `args.limit` at most for validation and for the test."""
        source = find_images(args.model, args.data)
        if source is None:
            raise UserError(
                "The model's folder doesn't say what it was trained on: give --data, a folder with train/, val/ and "
                "test/."
            )
        left = [index for index in range(len(model.class_names)) if index not in classes]

        def read(split: str, chosen: Sequence[int], limit: int) -> Labelled:
            pictures = source.open(model, split=split, root=args.root)
            is_required, is_measured = chosen is classes, split != "train"
            return read_labelled(model, pictures, chosen, limit, is_required, is_measured)

        with loading("reading images"):
            return cls(
                read("train", classes, CHOOSING_IMAGES * len(classes)),
                read("train", left, CHOOSING_IMAGES * len(left)),
                read("val", classes, args.limit),
                read("test", classes, args.limit),
            )


def read_labelled(
    model: SavedModel,
    pictures: PictureSet,
    classes: Sequence[int],
    limit: int,
    is_required: bool,
    is_measured: bool,
) -> Labelled:
    """At most `limit` images of these classes, as many of each; of unreadable ones it warns if they are measured.

    Raises:
        UserError: there is none, and `is_required`.
    """
    number_of = {label: number for number, label in enumerate(classes)}
    own = [index for index in range(len(pictures)) if pictures.label(index) in number_of]
    is_known = list(pictures.class_names) == model.class_names  # else labels number other classes
    if is_required and not (own and is_known):
        raise UserError(
            f"{pictures.name} has no image of the classes to keep: give --data, a folder that has them."
        )
    if not own:
        return []
    view = View(pictures, own)
    reader = PictureReader(View(view, balanced_subset(view, limit, seed=0)), model, _BATCH)
    batches = [
        (images, torch.tensor([number_of[int(label)] for label in labels]))
        for images, labels in reader.batches(progress=False)
    ]
    if is_measured or not batches:
        reader.report()
    return batches


@torch.inference_mode()
def most_used(model: SavedModel, images: Labelled) -> Experts:
    """All experts of each layer, those first that get most choices of the tokens of these images."""
    layers = [cast(int, moe.layer_index) for moe in moe_layers(model.net)]
    loads = {layer: torch.zeros(()) for layer in layers}  # [E] each
    for batch, _ in images:
        _, routings = forward_routing(model.net, batch)
        for layer, routing in zip(layers, routings, strict=True):
            loads[layer] = loads[layer] + routing.counts()
    return {layer: load.argsort(descending=True).tolist() for layer, load in loads.items()}


def first(ranking: Experts, count: int) -> dict[int, list[int]]:
    """The first so many experts of each layer, or all where it has no more."""
    return {layer: sorted(experts[:count]) for layer, experts in ranking.items()}


def fewest(model: SavedModel, classes: Sequence[int], ranking: Experts, images: Labelled) -> int:
    """The fewest experts of each layer that cost at most TOLERANCE on these images."""
    most = max(map(len, ranking.values()))
    full = accuracy(cut(model, classes, ranking), images)
    for count in range(1, most):
        if accuracy(cut(model, classes, first(ranking, count)), images) >= full - TOLERANCE:
            return count
    return most


@torch.inference_mode()
def accuracy(model: SavedModel, images: Labelled) -> float:
    """The share of right answers."""
    right = torch.cat([model.net(x).argmax(-1) == labels for x, labels in images])
    return float(right.double().mean())


def compare(
    model: SavedModel,
    classes: Sequence[int],
    own: Experts,
    others: Experts | None,
    count: int,
    images: Labelled,
) -> Json:
    """Accuracy with all experts, the kept ones, those that other classes use, as many at random, and none."""

    def with_experts(experts: Experts) -> float:
        return accuracy(cut(model, classes, experts), images)

    generator = np.random.default_rng(0)
    draws = [
        with_experts(
            first(
                {layer: generator.permutation(ranked).tolist() for layer, ranked in own.items()},
                count,
            )
        )
        for _ in range(DRAWS)
    ]
    return {
        "all": with_experts(own),
        "kept": with_experts(first(own, count)),
        "others": None if others is None else with_experts(first(others, count)),
        "random": draws,
        "none": accuracy(without_experts(cut(model, classes, first(own, 1))), images),
    }


def without_experts(model: SavedModel) -> SavedModel:
    """The model with experts that add nothing to a token, in place."""
    for moe in moe_layers(model.net):
        for value in moe.experts.fc2.parameters():
            nn.init.zeros_(value)
    return model


def cost_of(model: SavedModel) -> dict[str, float]:
    """Parameters, and milliseconds of one image."""
    image = torch.zeros(1, 3, model.image_size, model.image_size)
    return {
        "parameters": sum(value.numel() for value in model.net.parameters()),
        "ms": latency_ms(torch.no_grad()(model.net.__call__), image),
    }


def tell(record: Mapping[str, Any], num_classes: int, out: str) -> None:
    """Print what was kept, what it costs, and the verdict."""
    right = record["right"]
    count = max(map(len, record["experts"].values()))
    console = Console(highlight=False)
    kept = "; ".join(
        f"block {layer}: {', '.join(map(str, experts))}"
        for layer, experts in record["experts"].items()
    )
    names = ", ".join(record["classes"])
    console.print(
        escape_controls(
            f"{len(record['classes'])} of {num_classes} classes ({names}), experts {kept}"
        ),
        markup=False,
        soft_wrap=True,
    )
    table = Table("experts of each layer", f"right of {record['test_images']:,} test images")
    low, high = min(right["random"]), max(right["random"])
    table.add_row("all", percent(right["all"]))
    table.add_row(f"{count}, most used by these classes: kept", percent(right["kept"]))
    if right["others"] is not None:
        table.add_row(f"{count}, most used by the other classes", percent(right["others"]))
    spread = f"{percent(fmean(right['random']))} ({percent(low)} to {percent(high)})"
    table.add_row(f"{count} at random, {DRAWS} draws", spread)
    table.add_row("none", percent(right["none"]))
    console.print(table)
    before, after = record["costs"]["before"], record["costs"]["after"]
    console.print(
        f"{before['parameters'] / 1e6:.2f} → {after['parameters'] / 1e6:.2f} M parameters, "
        f"{before['ms']:.1f} → {after['ms']:.1f} ms an image, {record['bytes'] / 1e6:.1f} MB"
    )
    console.print(verdict(right, count), soft_wrap=True)
    source = shell_word(escape_controls(record["source"]))
    console.print(
        f"\nlook inside, beside its source: moevision demo {out} {source}",
        markup=False,
        soft_wrap=True,
    )


def verdict(right: Mapping[str, Any], count: int) -> str:
    """Whether the cut is worth having, in one sentence."""
    if right["none"] >= right["all"] - TOLERANCE:
        return (
            f"These classes need no expert here: without any {points(right['none'] - right['all'])} points. "
            "A dense model would do."
        )
    gain = right["kept"] - right["all"]
    if gain < -2 * TOLERANCE:
        return f"Don't: with the cut {points(gain)} points. Try --experts {count + 1}."
    return f"With the cut {points(gain)} points."
