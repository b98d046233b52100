"""Whether the shares of patches say what an answer rests on: the deletion test.

    python -m benchmarks heat --photos path/to/eleven --cifar10 path/to/cifar10 --out benchmarks/demo/heat.json

Of held-out images a fifth of the patches is replaced, and the answer's margin (its logit minus the runner-up's, both as
named before) is read again: without the patches of the largest shares, of the smallest, and without as many at random
(the mean of 4 draws). Shares that say what the answer rests on cost it more than chance where they are large, and less
where they are small. Samek et al. 2017 (arXiv:1509.06321) call it pixel flipping.

A patch is replaced by the image's mean colour (`mean`), and in a second reading by the image blurred with a standard
deviation of one patch (`blur`). Neither is what the models were trained on: a fall has the strange image in it, and so
has the fall at random, which is why only differences are judged, in pairs, with 95 % intervals over images.

Rivals: the gradient of the margin times the pixels (`gradient`), and times their difference from the mean colour
(`gradient_fill`). Of which contrast the shares are (the answer's logit, minus the runner-up's, minus the mean of all
classes') is chosen on images of other splits, which nothing else reads.

`rows` have for each image, model and replacement the margin before, and after each deletion: everything else is
recomputed from them.

Axes: B images, P patches, C classes.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from benchmarks.harness import about, argument_parser, positive, write_result
from moevision.analysis.collect import network_input
from moevision.analysis.images import PictureSet, open_pictures, read_images
from moevision.demo.models import open_entries
from moevision.models.io import SavedModel
from moevision.models.shares import PatchShares, patch_shares

MODELS = ("cifar10", "photos", "emoji")
DELETED = 0.2  # of the patches
DRAWS = 4  # of as many patches at random
FILLS = ("mean", "blur")
CONTRASTS = ("runner_up", "mean_class", "answer")
CHOSEN = "runner_up"  # by `choice` of the record
RIVALS = ("gradient", "gradient_fill")
COLUMNS = ("before", "top", "random", "lowest", *RIVALS)
_BATCH = 20
Floats = NDArray[np.float64]


def grid_of(model: SavedModel) -> tuple[int, int]:
    """Rows and columns of patches."""
    rows, columns = model.net.patch_embed.grid_size
    return int(rows), int(columns)


def filled(x: Tensor, fill: str, patch: int) -> Tensor:
    """What takes the place of patches, for images [B, 3, S, S]."""
    if fill == "mean":
        return x.mean((2, 3), keepdim=True).expand_as(x)
    return gaussian_blur(x, [4 * patch + 1] * 2, [float(patch)] * 2)


def without(x: Tensor, fill: Tensor, scores: Tensor, grid: tuple[int, int]) -> Tensor:
    """Images in which the fifth of the patches with the largest `scores` [B, P] is replaced."""
    count = round(DELETED * scores.shape[1])
    is_deleted = torch.zeros_like(scores, dtype=torch.bool)
    is_deleted.scatter_(1, scores.topk(count).indices, True)
    side = x.shape[-1] // grid[0]
    mask = is_deleted.unflatten(1, grid)[:, None]  # [B, 1, rows, columns]
    mask = mask.repeat_interleave(side, 2).repeat_interleave(side, 3)  # [B, 1, S, S]
    return torch.where(mask, fill, x)


def margin_of(logits: Tensor, pair: Tensor) -> Tensor:
    """[B] logit of the first of two classes [B, 2] minus that of the second."""
    answer, runner_up = logits.gather(1, pair).unbind(1)
    return answer - runner_up


def scores_of(shares: PatchShares, pair: Tensor, contrast: str) -> Tensor:
    """[B, P] shares of the patches in the contrast of the answer."""
    rows = torch.arange(len(pair))
    answer = shares.patches[rows, :, pair[:, 0]]
    if contrast == "runner_up":
        return answer - shares.patches[rows, :, pair[:, 1]]
    if contrast == "mean_class":
        return answer - shares.patches.mean(-1)
    return answer


def gradients_of(
    model: SavedModel, x: Tensor, pair: Tensor, fill: Tensor, grid: tuple[int, int]
) -> dict[str, Tensor]:
    """[B, P] gradient of the margin times pixels, and times their difference from the mean colour, by patch."""
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        margin = margin_of(model.net(x), pair).sum()
        (gradient,) = torch.autograd.grad(margin, x)
    side = x.shape[-1] // grid[0]
    pixels = x.detach()
    by_pixel = {"gradient": gradient * pixels, "gradient_fill": gradient * (pixels - fill)}
    return {
        name: torch.nn.functional.avg_pool2d(values.sum(1), side).flatten(1)
        for name, values in by_pixel.items()
    }


def deletions(
    model: SavedModel, x: Tensor, generator: torch.Generator, contrasts: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """[B] margins before and after each deletion, by replacement; those of several contrasts as `top.NAME`."""
    grid = grid_of(model)
    with torch.no_grad():
        tokens = model.net.forward_features(x)
        logits = model.net.forward_head(tokens)
        pair = logits.topk(2).indices
        shares = patch_shares(model.net, tokens)
    mean_colour = filled(x, "mean", 0)
    ranked = {}
    for contrast in contrasts:
        scores = scores_of(shares, pair, contrast)
        ranked |= {f"top.{contrast}": scores, f"lowest.{contrast}": -scores}
    if len(contrasts) == 1:
        ranked = {name.partition(".")[0]: scores for name, scores in ranked.items()}
        ranked |= gradients_of(model, x, pair, mean_colour, grid)
    draws = [torch.rand(len(x), shares.patches.shape[1], generator=generator) for _ in range(DRAWS)]

    margins = {}
    for fill in FILLS:
        replacement = filled(x, fill, x.shape[-1] // grid[0])

        def after(scores: Tensor, replacement: Tensor = replacement) -> Tensor:
            with torch.no_grad():
                changed = model.net(without(x, replacement, scores, grid))
            return margin_of(changed, pair)

        margins[fill] = {
            "before": margin_of(logits, pair),
            **{name: after(scores) for name, scores in ranked.items()},
            "random": torch.stack([after(draw) for draw in draws]).mean(0),
        }
    return margins


def measure(
    model: SavedModel, pictures: PictureSet, contrasts: Sequence[str]
) -> dict[str, dict[str, Floats]]:
    """[I] margins of all images by replacement and deletion."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for start in range(0, len(pictures), _BATCH):
        numbers = range(start, min(start + _BATCH, len(pictures)))
        x = network_input(model, read_images(pictures, numbers))
        batches.append(deletions(model, x, generator, contrasts))
    return {
        fill: {
            name: torch.cat([batch[fill][name] for batch in batches]).double().numpy()
            for name in batches[0][fill]
        }
        for fill in FILLS
    }


def with_interval(values: Floats) -> list[float]:
    """Mean over images and the ends of its 95 % interval."""
    half = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5
    mean = float(values.mean())
    return [round(value, 3) for value in (mean, mean - half, mean + half)]


def summary(margins: Mapping[str, Floats]) -> dict[str, Any]:
    """Mean margins, and paired differences with intervals: positive where the shares do what they should."""
    top, random, lowest = (margins[name] for name in ("top", "random", "lowest"))
    return {
        "images": len(top),
        "margins": {name: round(float(margins[name].mean()), 3) for name in COLUMNS},
        "random_minus_top": with_interval(random - top),
        "lowest_minus_random": with_interval(lowest - random),
        **{f"random_minus_{name}": with_interval(random - margins[name]) for name in RIVALS},
        **{f"{name}_minus_top": with_interval(margins[name] - top) for name in RIVALS},
        "top_below_random": round(float((top < random).mean()), 3),
    }


def open_split(name: str, options: Namespace, model: SavedModel, split: str) -> PictureSet:
    """Images of a split that model `name` reads, the same number of each class."""
    data = {"cifar10": options.cifar10, "photos": options.photos}.get(name, name)
    return open_pictures(
        data, model.image_size, framing=model.framing, split=split, limit=options.images
    )


def record_of(options: Namespace) -> dict[str, Any]:
    """The choice of the contrast, and the deletion test of each model."""
    saved = {entry.card.id: entry.variants["trained"].saved for entry in open_entries(None)}
    choice = {}
    for name in MODELS:
        if len(saved[name].class_names) == 2:
            continue  # of two classes all contrasts order the patches alike, but for the plain logit
        margins = measure(saved[name], open_split(name, options, saved[name], "val"), CONTRASTS)
        choice[name] = {
            fill: {
                contrast: with_interval(after["random"] - after[f"top.{contrast}"])
                for contrast in CONTRASTS
            }
            for fill, after in margins.items()
        }

    found = {}
    rows = []
    for name in MODELS:
        margins = measure(saved[name], open_split(name, options, saved[name], "test"), (CHOSEN,))
        found[name] = {fill: summary(after) for fill, after in margins.items()}
        for fill, after in margins.items():
            columns = zip(*(after[column].round(3).tolist() for column in COLUMNS), strict=True)
            rows += [[name, fill, *row] for row in columns]
    return {"choice": choice, "models": found, "columns": list(COLUMNS), "rows": rows}


def main() -> None:
    """Measure, and write a record."""
    parser = argument_parser("heat", __doc__)
    add = parser.add_argument
    add("--photos", required=True, help="the photos of eleven classes, as a folder")
    add("--cifar10", required=True, help="CIFAR-10's images, as a folder")
    add("--images", type=positive, default=240, metavar="N", help="of each model (%(default)s)")
    add("--out", type=Path, metavar="FILE", help="write a record")
    options = parser.parse_args()
    origin = about()
    torch.set_num_threads(1)
    write_result(options.out, {**origin, **record_of(options)})
