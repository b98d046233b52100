"""Same expert? After the image is mirrored or moved, in another training, and in what two experts compute.

- `consistency`: a router that follows what a patch shows sends it to the same expert after the image is mirrored (the
  grid is mirrored back before the patches are compared) or moved by whole patches (only patches that both show are
  compared). One that follows position doesn't. After a shift the patches' surroundings at the border are mirrored
  content, and attention sees the whole image: 1 isn't to be expected of a deep layer even if it follows content only.
- `match_experts` pairs the experts of two routers by what they chose (Hungarian method). The pairing is found on one
  half of the images and its agreement measured on the other, since the best of E! pairings agrees by chance too.
- `expert_similarity` runs all experts of a layer on the same tokens, wherever those were routed, and compares their
  outputs by linear CKA (Kornblith et al. 2019, arXiv:1905.00414, section 3), which a rotation or a rescaling of the
  outputs doesn't change. Comparing each expert on its own tokens would confuse experts with what they are given, and
  comparing weights would call two experts different that differ in the order of their hidden units only. Experts of
  Soft MoE never see a token: they are run on the same slots, those of all experts.

Two routers agree by chance as well, so agreement is Cohen's kappa: 0 for independent choices with these loads, 1 for
full agreement. Intervals resample images.

Axes: B images of a batch, I images, P patches in a grid of rows x columns, K choices, E experts, T tokens, D width,
R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from moevision.analysis.collect import layer_inputs, network_input
from moevision.analysis.images import PictureSet, read_images
from moevision.analysis.information import ENDS, Array, Floats, Ints, Json, Numbers, Pixels
from moevision.analysis.trace import LayerTrace
from moevision.errors import UserError
from moevision.layers import forward_routing
from moevision.layers.moe import moe_layers
from moevision.models.io import SavedModel

_BATCH = 64


@dataclass(frozen=True)
class Consistency(Numbers):
    """Agreement of one layer's first choices between images and their changed copies."""

    layer: int  # block index
    change: str  # `flip`, or `shift` by whole patches
    agreement: float  # share of the compared patches that go to the same expert
    kappa: float  # the same beyond chance
    low: float  # lower end of the 95 % interval of kappa, over images
    high: float  # upper end
    n_images: int

    def to_json(self) -> Json:
        """The fields, and the layer as it is shown."""
        return {"name": f"L{self.layer}", **super().to_json()}


def consistency(
    model: SavedModel,
    pictures: PictureSet,
    *,
    shift: tuple[int, int] = (1, 1),
    limit: int = 500,
    num_resamples: int = 1000,
    seed: int = 0,
) -> list[Consistency]:
    """Agreement of the first choices of at most `limit` images with their mirrored and their shifted copies, by layer.

    `shift` is how many patches the crop moves down and to the right; intervals are from R resamples.

    Raises:
        UserError: there are fewer than two images, or the shift leaves no patch.
    """
    indices = np.random.default_rng(seed).permutation(len(pictures))[:limit]
    if len(indices) < 2:
        raise UserError("Consistency needs at least two images: give more.")
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
    found = []
    for (layer, change), each in tables.items():
        table, total = np.stack(each), np.sum(each, axis=0)  # [E + 1, E + 1], the last row and column for no expert
        resampled = cohen_kappa((weight @ table.reshape(len(table), -1)).reshape(-1, *total.shape))
        low, high = np.quantile(resampled, ENDS)
        agreement = float(np.trace(total) / total.sum())
        found.append(Consistency(layer, change, agreement, cohen_kappa(total), float(low), float(high), len(table)))
    return found


@torch.inference_mode()
def first_choices(model: SavedModel, images: Pixels) -> tuple[dict[int, Ints], tuple[int, int], dict[int, int]]:
    """First choice of every patch, block index -> [B, rows, columns]; the grid; block index -> E.

    Where experts choose it is the largest weight of those that took the patch, and E (no expert) where none did.
    """
    _, routings = forward_routing(model.net, network_input(model, images))
    choices: dict[int, Ints] = {}
    grid, num_experts = (0, 0), {}
    for place, routing in enumerate(routings):
        grid, block = cast(tuple[int, int], routing.grid), place if routing.layer is None else routing.layer
        num_experts[block] = routing.num_experts
        first = routing.expert_index[..., 0]  # [B, N]
        if routing.kind == "expert_choice":
            first = first.masked_fill(~routing.kept[..., 0], routing.num_experts)
        choices[block] = first[:, routing.num_prefix_tokens :].cpu().numpy().reshape(len(images), *grid)
    return choices, grid, num_experts


def shifted_crop(images: Pixels, grid: tuple[int, int], shift: tuple[int, int]) -> Pixels:
    """The images [B, S, S, 3] seen through a window moved down and right by whole patches; mirrored where they end."""
    if not all(0 <= by < size for by, size in zip(shift, grid, strict=True)) or shift == (0, 0):
        raise UserError(f"A shift of {shift} patches doesn't fit a grid of {grid}: choose 1 or 2 patches.")
    down, right = (by * side // size for by, side, size in zip(shift, images.shape[1:3], grid, strict=True))
    padded = np.pad(images, ((0, 0), (0, down), (0, right), (0, 0)), mode="symmetric")
    return padded[:, down:, right:]


def overlap(before: Ints, after: Ints, shift: tuple[int, int]) -> tuple[Ints, Ints]:
    """The patches that both show: `before` without its first rows and columns, `after` without its last ones."""
    rows, columns = before.shape[1:]
    return before[:, shift[0] :, shift[1] :], after[:, : rows - shift[0], : columns - shift[1]]


@dataclass(frozen=True)
class ExpertMatch:
    """How the experts of router b answer to those of router a."""

    order: tuple[int, ...]  # [E] for each expert of a its partner in b, from the first half of the images
    agreement: float  # share of the other half's patches whose first choices are partners
    kappa: float  # the same beyond chance (Cohen's): 0 as for independent routers of these loads, 1 in full agreement
    n_images: int  # images of the half that was measured


def match_experts(a: LayerTrace, b: LayerTrace, *, seed: int = 0) -> ExpertMatch:
    """Pair the experts of two routers that saw the same images, such as one layer of two trainings.

    Args:
        a: one router's decisions.
        b: the other's, on the same images and patches.
        seed: of the halves.

    Raises:
        UserError: the two differ in images, patches or number of experts, or there are fewer than two images.
    """
    first, second = np.asarray(a.first_choice()), np.asarray(b.first_choice())
    if first.shape != second.shape or a.num_experts != b.num_experts or len(first) < 2:
        raise UserError(
            f"Experts can be matched on the same images and for equal numbers of experts only, not {first.shape} "
            f"with {a.num_experts} and {second.shape} with {b.num_experts}: collect both traces on the same data."
        )
    return pair_experts(first, second, a.num_experts, seed=seed)


def pair_experts(first: Array, second: Array, num_experts: int, *, seed: int = 0) -> ExpertMatch:
    """`match_experts` by the first choices [I, ...] of two routers of E experts on the same images; -1: none."""
    from scipy.optimize import linear_sum_assignment

    half = np.random.default_rng(seed).permutation(len(first))
    fitted, measured = half[: len(half) // 2], half[len(half) // 2 :]
    # A patch that no expert took (-1) is an answer of its own, which is its own partner.
    nobody = num_experts
    first, second = (np.where(choice < 0, nobody, choice) for choice in (first, second))
    pairs = pair_counts(first[fitted], second[fitted], nobody + 1)[:nobody, :nobody]
    _, order = linear_sum_assignment(pairs, maximize=True)
    table = pair_counts(first[measured], second[measured], nobody + 1)[:, [*order, nobody]]
    return ExpertMatch(
        tuple(int(e) for e in order), float(np.trace(table) / table.sum()), cohen_kappa(table), len(measured)
    )


def pair_counts(a: Array, b: Array, num_experts: int) -> Ints:
    """[E, E]: how many patches chose expert i in `a` and expert j in `b`; give E + 1 where E stands for no expert."""
    pairs = a.astype(np.int64).ravel() * num_experts + b.ravel()  # cell of the table, row-major
    return np.bincount(pairs, minlength=num_experts**2).reshape(num_experts, num_experts)


def cohen_kappa(tables: Array) -> Any:
    """Cohen's kappa of square tables [..., E, E]: agreement beyond what the margins give; 0 where it is undefined.

    Undefined means that both raters always give the same single answer: nothing could disagree.
    """
    table = np.asarray(tables, dtype=np.float64)
    total = table.sum((-2, -1))
    observed = np.trace(table, axis1=-2, axis2=-1) / total
    expected = (table.sum(-1) * table.sum(-2)).sum(-1) / total**2
    defined = expected < 1 - 1e-12
    kappa = np.where(defined, (observed - expected) / np.where(defined, 1 - expected, 1.0), 0.0)
    return float(kappa) if kappa.ndim == 0 else kappa


def linear_cka(x: Floats, y: Floats) -> float:
    """Linear CKA of two representations [T, D], [T, D'] of the same tokens, ``|YᵀX|² / (|XᵀX| |YᵀY|)``, centred.

    Between 0 and 1; 0 if one of them is constant. It is biased upwards for few tokens: take at least ten times as many
    as there are columns.
    """
    x = np.asarray(x, dtype=np.float64) - np.mean(x, axis=0, dtype=np.float64)
    y = np.asarray(y, dtype=np.float64) - np.mean(y, axis=0, dtype=np.float64)
    scale = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(y.T @ x) ** 2 / scale) if scale > 0 else 0.0


@torch.inference_mode()
def expert_similarity(
    model: SavedModel, pictures: PictureSet, layer: int, *, num_tokens: int = 4096, seed: int = 0
) -> Floats:
    """[E, E] linear CKA of the experts' outputs on common tokens (Soft MoE: on common slots).

    Args:
        model: the model.
        pictures: where the tokens come from.
        layer: block index of the MoE layer.
        num_tokens: T, spread over the images.
        seed: of the choice of tokens.

    Raises:
        UserError: that block has no MoE layer.
    """
    moe = next((each for each in moe_layers(model.net) if each.layer_index == layer), None)
    if moe is None:
        raise UserError(f"Block {layer} has no MoE layer: see `trace.layers`.")
    rng = np.random.default_rng(seed)
    indices = rng.permutation(len(pictures))[:num_tokens]
    per_image, outputs = max(1, num_tokens // len(indices)), []
    for start in range(0, len(indices), _BATCH):
        images = read_images(pictures, indices[start : start + _BATCH])
        tokens = layer_inputs(model.net, network_input(model, images), filled_slots=True)[layer]
        taken = rng.permuted(np.tile(np.arange(tokens.shape[1]), (len(tokens), 1)), axis=1)[:, :per_image]
        chosen = tokens[torch.arange(len(tokens))[:, None], torch.from_numpy(taken)].flatten(0, 1)
        outputs.append(moe.experts.on_all_tokens(chosen).float().cpu().numpy())
    output = np.concatenate(outputs)  # [T, E, D]
    experts = range(output.shape[1])
    return np.array([[linear_cka(output[:, i], output[:, j]) for j in experts] for i in experts])
