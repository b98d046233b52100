"""Are two experts, or the experts of two trainings, the same? Output similarity and matching.

`expert_similarity` runs all experts of a layer on the same tokens, whoever they were routed to, and compares their
outputs by linear CKA (Kornblith et al. 2019, arXiv:1905.00414, section 3), which a rotation or a rescaling of the
outputs doesn't change. Comparing each expert on its own tokens would confuse experts with what they are given, and
comparing weights would call two experts different that differ in the order of their hidden units only. Experts of Soft
MoE never see a token: they are run on the same slots, those of all experts.

`match_experts` pairs the experts of two routers by what they chose (Hungarian method). The pairing is found on one half
of the images and its agreement measured on the other, since the best of E! pairings agrees by chance too.

Axes: I images, P patches, K choices, E experts, T tokens, D width, B images of a batch, N tokens of an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moevision.analysis.collect import layer_inputs, network_input
from moevision.analysis.images import PictureSet, read_images
from moevision.analysis.trace import LayerTrace
from moevision.errors import UserError
from moevision.layers.moe import moe_layers
from moevision.models.hub import SavedModel

Floats = npt.NDArray[np.floating[Any]]
_BATCH = 64


@dataclass(frozen=True)
class ExpertMatch:
    """How the experts of router b answer to those of router a.

    Attributes:
        order: [E] for each expert of a its partner in b, from the first half of the images.
        agreement: share of the other half's patches whose first choices are partners.
        kappa: the same beyond chance (Cohen's): 0 as for independent routers of these loads, 1 in full agreement.
        n_images: images of the half that was measured.
    """

    order: tuple[int, ...]
    agreement: float
    kappa: float
    n_images: int


def match_experts(a: LayerTrace, b: LayerTrace, *, seed: int = 0) -> ExpertMatch:
    """Pair the experts of two routers that saw the same pictures, such as one layer of two trainings.

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
            f"Experts can be matched on the same pictures and for equal numbers of experts only, not {first.shape} "
            f"with {a.num_experts} and {second.shape} with {b.num_experts}: collect both traces on the same data."
        )
    from scipy.optimize import linear_sum_assignment

    half = np.random.default_rng(seed).permutation(len(first))
    fitted, measured = half[: len(half) // 2], half[len(half) // 2 :]
    # A patch that no expert took (-1) is an answer of its own, which is its own partner.
    nobody = a.num_experts
    first, second = (np.where(choice < 0, nobody, choice) for choice in (first, second))
    pairs = pair_counts(first[fitted], second[fitted], nobody + 1)[:nobody, :nobody]
    _, order = linear_sum_assignment(pairs, maximize=True)
    table = pair_counts(first[measured], second[measured], nobody + 1)[:, [*order, nobody]]
    return ExpertMatch(
        tuple(int(e) for e in order), float(np.trace(table) / table.sum()), cohen_kappa(table), len(measured)
    )


def pair_counts(a: npt.NDArray[Any], b: npt.NDArray[Any], num_experts: int) -> npt.NDArray[np.int64]:
    """[E, E]: how many patches chose expert i in `a` and expert j in `b`; give E + 1 where E stands for no expert."""
    pairs = a.astype(np.int64).ravel() * num_experts + b.ravel()
    return np.bincount(pairs, minlength=num_experts**2).reshape(num_experts, num_experts)


def cohen_kappa(tables: npt.NDArray[Any]) -> Any:
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
    """Linear CKA of two representations of the same tokens, ``|YᵀX|² / (|XᵀX| |YᵀY|)`` with centred columns.

    Between 0 and 1. It is biased upwards for few tokens: take at least ten times as many as there are columns.

    Args:
        x: [T, D].
        y: [T, D'].

    Returns:
        The similarity; 0 if one of them is constant.
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
        num_tokens: T, spread over the pictures.
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
