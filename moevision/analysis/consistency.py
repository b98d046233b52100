"""Does a patch go to the same expert when the picture is mirrored or moved?

A router that follows what a patch shows sends it to the same expert after the picture is mirrored (the grid is mirrored
back before the patches are compared) or moved by whole patches (only patches that both pictures show are compared). One
that follows position doesn't. Two routers agree by chance as well, so the number is Cohen's kappa: 0 for independent
choices with these loads, 1 for full agreement. Intervals resample images.

After a shift the patches' surroundings at the border are mirrored content, and attention sees the whole picture, so 1
isn't to be expected of a deep layer even if it follows content only.

Axes: B images of a batch, I images, P patches in a grid of rows x columns, E experts, R resamples.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moevision.analysis.collect import network_input
from moevision.analysis.images import PictureSet, read_images
from moevision.analysis.similarity import cohen_kappa, pair_counts
from moevision.errors import UserError
from moevision.layers import forward_routing
from moevision.models.hub import SavedModel

Pixels = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
_BATCH = 64


@dataclass(frozen=True)
class Consistency:
    """Agreement of one layer's first choices between pictures and their changed copies.

    Attributes:
        layer: block index.
        change: `flip`, or `shift` by whole patches.
        agreement: share of the compared patches that go to the same expert.
        kappa: the same beyond chance.
        low: lower end of the 95 % interval of kappa, over images.
        high: upper end.
        n_images: images.
    """

    layer: int
    change: str
    agreement: float
    kappa: float
    low: float
    high: float
    n_images: int

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON primitives."""
        return {"name": f"L{self.layer}", **asdict(self)}


def consistency(
    model: SavedModel,
    pictures: PictureSet,
    *,
    shift: tuple[int, int] = (1, 1),
    limit: int = 500,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> list[Consistency]:
    """Agreement under a horizontal flip and under a shifted crop, for every MoE layer.

    Args:
        model: the model.
        pictures: what to look at.
        shift: by how many patches the crop moves down and to the right.
        limit: at most so many pictures, drawn by `seed`.
        num_resamples: R.
        level: of the intervals.
        seed: of the draw and of the resamples.

    Raises:
        UserError: there are fewer than two pictures, the model has no grid of patches, or the shift leaves no patch.
    """
    indices = np.random.default_rng(seed).permutation(len(pictures))[:limit]
    if len(indices) < 2:
        raise UserError("Consistency needs at least two pictures: give more.")
    tables: dict[tuple[int, str], list[Ints]] = {}
    for start in range(0, len(indices), _BATCH):
        images = read_images(pictures, indices[start : start + _BATCH])
        before, grid, num_experts = first_choices(model, images)
        flipped = first_choices(model, images[:, :, ::-1])[0]
        moved = first_choices(model, shifted_crop(images, grid, shift))[0]
        for layer, choice in before.items():
            pairs = {
                "flip": (choice, flipped[layer][:, :, ::-1]),
                "shift": overlap(choice, moved[layer], shift),
            }
            for change, (a, b) in pairs.items():
                each = [pair_counts(x, y, num_experts[layer] + 1) for x, y in zip(a, b, strict=True)]
                tables.setdefault((layer, change), []).extend(each)
    rng = np.random.default_rng(seed)
    weight = rng.multinomial(len(indices), np.full(len(indices), 1 / len(indices)), size=num_resamples)
    return [_result(layer, change, np.stack(each), weight, level) for (layer, change), each in tables.items()]


@torch.inference_mode()
def first_choices(model: SavedModel, images: Pixels) -> tuple[dict[int, Ints], tuple[int, int], dict[int, int]]:
    """First choice of every patch, block index -> [B, rows, columns]; the grid; block index -> E.

    Where experts choose it is the largest weight of those that took the patch, and E (no expert) where none did.

    Raises:
        UserError: the model has no MoE layer or no grid of patches.
    """
    _, routings = forward_routing(model.net, network_input(model, images))
    choices: dict[int, Ints] = {}
    grid, num_experts = (0, 0), {}
    for place, routing in enumerate(routings):
        if routing.grid is None:
            raise UserError(
                "This model's tokens are no single grid of patches: give a plain ViT, without patch dropping."
            )
        grid, block = routing.grid, place if routing.layer is None else routing.layer
        num_experts[block] = routing.num_experts
        first = routing.expert_index[..., 0]
        if routing.kind == "expert_choice":
            first = first.masked_fill(~routing.kept[..., 0], routing.num_experts)
        choices[block] = first[:, routing.num_prefix_tokens :].cpu().numpy().reshape(len(images), *grid)
    if not choices:
        raise UserError("This model has no MoE layers: give a model that was converted by moevision.convert_to_moe.")
    return choices, grid, num_experts


def shifted_crop(images: Pixels, grid: tuple[int, int], shift: tuple[int, int]) -> Pixels:
    """The pictures [B, S, S, 3] seen through a window moved down and right by whole patches; mirrored where they end.

    Raises:
        UserError: the shift leaves nothing of the picture in the window, or is negative.
    """
    if not all(0 <= by < size for by, size in zip(shift, grid, strict=True)) or shift == (0, 0):
        raise UserError(f"A shift of {shift} patches doesn't fit a grid of {grid}: choose 1 or 2 patches.")
    down, right = (by * side // size for by, side, size in zip(shift, images.shape[1:3], grid, strict=True))
    padded = np.pad(images, ((0, 0), (0, down), (0, right), (0, 0)), mode="symmetric")
    return padded[:, down:, right:]


def overlap(before: Ints, after: Ints, shift: tuple[int, int]) -> tuple[Ints, Ints]:
    """The patches that both show: `before` without its first rows and columns, `after` without its last ones."""
    rows, columns = before.shape[1:]
    return before[:, shift[0] :, shift[1] :], after[:, : rows - shift[0], : columns - shift[1]]


def _result(layer: int, change: str, tables: Ints, weight: Ints, level: float) -> Consistency:
    total = tables.sum(0)
    resampled = cohen_kappa((weight @ tables.reshape(len(tables), -1)).reshape(-1, *total.shape))
    low, high = np.quantile(resampled, ((1 - level) / 2, (1 + level) / 2))
    agreement = float(np.trace(total) / total.sum())
    return Consistency(layer, change, agreement, cohen_kappa(total), float(low), float(high), len(tables))
