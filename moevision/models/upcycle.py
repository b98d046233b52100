"""Sparse upcycling: a trained dense ViT becomes a Mixture of Experts that computes the same, and trains on from there.

- every expert starts as a copy of the MLP that it replaces: Komatsuzaki et al. 2022, arXiv:2212.05055, §2. With gates
  that sum to 1 the mixture of equal experts is that MLP, so they are normalised here wherever the router can (for one
  expert per token by a straight-through gate of value 1).
- experts of a part of the MLP's width: each group of G experts holds one dense MLP (virtual groups, He et al. 2024,
  arXiv:2410.07524), and a token whose k is a multiple of G gets whole groups at first (`convert_to_moe`).
- copies that differ: noise on them, or a share of each expert's hidden units drawn anew with the statistics of the
  units that they replace (Drop-Upcycling, Nakamura et al. 2025, arXiv:2502.19261, §3).
- routers that start from clusters of what they will see: `start_routers` (cluster-aware upcycling, arXiv:2604.13508;
  its experts from each cluster's SVD and its distillation loss are left out).

Axes: D width, H hidden width of one expert, E experts, B images, C classes, T routed units (tokens, or images).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from moevision.errors import UserError
from moevision.layers import MoEMlp, TopKRouter, moe_layers, router_kind, routing_lock
from moevision.layers.routers import mean_token
from moevision.layers.routing import RouteBy, evaluating, routed_unit
from moevision.models.convert import (
    convert_to_moe,
    moe_layer_indices,
    plain_mlp,
    read_layer_indices,
)
from moevision.models.io import ImageSize, create_from, first_blocks, reshape


def upcycle(
    source: str | Path | nn.Module,
    *,
    layers: str | Sequence[int] | None = None,
    num_experts: int | Sequence[int] = 8,
    top_k: int | Sequence[int] | None = 1,
    router: str | Sequence[str] = "vmoe_top_k",
    weights: str | Path | None = None,
    num_classes: int | None = None,
    image_size: ImageSize | None = None,
    depth: int | None = None,
    noise: float = 0.0,
    reinit: float = 0.0,
    seed: int | None = 0,
    router_noise: str | None = None,
    **moe_options: Any,
) -> nn.Module:
    """Turn a trained dense ViT into a Mixture of Experts that starts from its weights.

    With a dropless token-choice router (the default), and noise and reinit left at 0, the result computes in
    evaluation what the dense model computes, with experts of 1/G of its width if top_k is a multiple of G;
    `initial_output_difference` measures how far another choice is from that. A token costs top_k
    experts, plus the router.

    Args:
        source: a timm name, a saved model's folder, any timm address, or a model (which is copied, not changed).
        layers: `every2`, `last2`, `all`, or a list of block indices counting from 0. By default `last2`, without the
            last block of a model whose classifier reads the class token alone: its routes would change no answer.
        num_experts: E, one number or one per MoE layer.
        top_k: K, one number or one per MoE layer.
        router: a name of `moevision.layers.ROUTERS`, or one per MoE layer.
        weights: a `.safetensors` file for the architecture that `source` names.
        num_classes: C; another number than the source's replaces the classifier.
        image_size: side(s) of the input in pixels; another size resamples the position embedding.
        depth: take so many of the source's first blocks; all if None. The cut model must be trained on.
        noise: Gaussian noise on the copies' weight matrices, relative to the matrix's standard deviation; breaks the
            symmetry of equal experts.
        reinit: share of each expert's hidden units that are drawn anew.
        seed: of routers, a new classifier, noise and reinit; None draws from torch's global generator.
        router_noise: the router option `noise` (`learned`, `fixed`, `jitter`, `none`), whose name is taken here.
        **moe_options: further arguments of `convert_to_moe`, such as capacity_factor. `normalize_gates` is True where
            a router can. `expert_hidden`, 1/G of the MLP's hidden width, shares an MLP out among G experts in a row.

    Returns:
        The converted model, which saves and loads under the registered name `vit_moe`.

    Raises:
        UserError: if the source can't be found, loaded or upcycled, or an option doesn't fit.
    """
    for name, value, highest in (("noise", noise, math.inf), ("reinit", reinit, 1.0)):
        if not 0 <= value <= highest or value == math.inf:
            raise UserError(
                f"{name} is {value}: it must be at least 0"
                + (" and at most 1." if highest == 1 else ".")
            )
    device = torch.device("cpu")  # where seeds mean the same on every machine
    if not isinstance(source, nn.Module):
        dense = load_dense(
            source, weights, num_classes=num_classes, image_size=image_size, depth=depth, seed=seed
        )
    elif weights is not None:
        raise UserError(
            "A model brings its own weights: give a timm name together with a file of weights."
        )
    else:
        device = next(source.parameters()).device
        with _seeded(seed):
            dense = copy.deepcopy(source)
            dense = dense if device.type == "meta" else dense.cpu()
            dense = reshape(
                dense if depth is None else first_blocks(dense, depth), num_classes, image_size
            )
    check_upcyclable(dense, "last2" if layers is None else layers)
    if layers is None and not (layers := read_layer_indices(dense, "last2")):
        raise UserError(
            "The classifier reads the patches of none of the last two blocks: name layers."
        )
    with _seeded(seed, stream=1):
        kinds = [router_kind(name) for name in ([router] if isinstance(router, str) else router)]
        can_normalize = any("normalize_gates" in kind.options for kind in kinds)
        options = {
            "normalize_gates": True if can_normalize else None,
            "noise": router_noise,
            **moe_options,
        }
        model = convert_to_moe(
            dense, layers, num_experts, top_k, router, copy_weights=True, **options
        )
        for layer in moe_layers(model):
            _diversify(layer, noise, reinit)
    return model.to(device)


@dataclass(frozen=True)
class InitialOutputDifference:
    """How far an upcycled model is from its dense source before any training."""

    images: int  # images that were compared
    max_logit: float  # max |Δ logit| over images and classes
    logit_scale: float  # standard deviation of the dense model's logits, to judge it by
    agreement: float  # share of images with the same most likely class


@torch.no_grad()
def initial_output_difference(
    dense: nn.Module, moe: nn.Module, images: Tensor
) -> InitialOutputDifference:
    """Compare the outputs of two models in eval mode on images [B, 3, H, W]; both are left in the mode they were in."""
    logits = []
    for model in (dense, moe):
        with evaluating(model):
            logits.append(model(images.to(next(model.parameters()).device)).float().cpu())
    before, after = logits
    return InitialOutputDifference(
        images=len(images),
        max_logit=float((after - before).abs().max()),
        logit_scale=float(before.std()),
        agreement=float((after.argmax(-1) == before.argmax(-1)).float().mean()),
    )


step0_gap = initial_output_difference  # its name until 0.2


def load_dense(
    source: str | Path,
    weights: str | Path | None = None,
    *,
    num_classes: int | None = None,
    image_size: ImageSize | None = None,
    depth: int | None = None,
    seed: int | None = 0,
) -> nn.Module:
    """The dense model that `upcycle` with the same arguments starts from, in training mode."""
    with _seeded(seed):
        return create_from(source, num_classes, image_size, weights=weights, depth=depth)


def check_upcyclable(vit: nn.Module, layers: str | Sequence[int]) -> None:
    """Raise a UserError that says why the MLPs of these blocks can't become experts; do nothing if they can."""
    name = type(vit).__name__
    if moe_layers(vit):
        raise UserError(
            f"{name} has experts already: train it on with `moevision fit FOLDER --pretrained`."
        )
    blocks = getattr(vit, "blocks", None)
    if (
        not isinstance(blocks, nn.Sequential | nn.ModuleList)
        or not len(blocks)
        or not hasattr(vit, "patch_embed")
    ):
        raise UserError(
            f"{name} has no list of transformer blocks behind a patch_embed: upcycling needs a ViT, DeiT or EVA-style "
            "model."
        )
    indices = moe_layer_indices(layers, len(blocks))
    if not indices:
        raise UserError(f"No block of {name} was chosen: name at least one in layers.")
    for index in indices:
        plain_mlp(vit, index)
    mlps = [getattr(block, "mlp", None) for block in blocks]
    widths = {cast(Any, mlp).fc1.in_features for mlp in mlps if isinstance(mlp, Mlp)}
    if len(widths) > 1:
        raise UserError(
            f"{name} is hierarchical (widths {sorted(widths)}): upcycling needs one width in all blocks."
        )


@torch.no_grad()
def _diversify(layer: MoEMlp, noise: float, reinit: float) -> None:
    fc1, fc2 = layer.experts.fc1, layer.experts.fc2
    spread = [(weight, weight[0].std()) for weight in (fc1.weight, fc2.weight)]
    units = round(reinit * fc1.out_features)
    for expert in range(fc1.num_experts if units else 0):
        # One set of units for all their weights, as the paper has it (its code draws a set for every matrix).
        chosen = torch.randperm(fc1.out_features)[:units]
        for part in (
            fc1.weight[expert],
            fc2.weight[expert].mT,
            *([] if fc1.bias is None else [fc1.bias[expert]]),
        ):
            old = part[chosen]
            part[chosen] = torch.randn_like(old) * old.std(correction=0) + old.mean()
    if noise:
        for weight, std in spread:
            weight.add_(torch.randn_like(weight) * noise * std)


# ---- routers from clusters

_UNITS: dict[RouteBy, int] = {
    "token": 20_000,
    "image": 2_000,
}  # enough for E centres, more only costs time
START_IMAGES = 2_000  # whose tokens are clustered, at most
_OF_IMAGE = 40  # tokens that are taken of one image, so that there are many images among them
_RESTARTS, _STEPS = 8, 50


@torch.no_grad()
def start_routers(
    model: nn.Module, batches: Iterable[Tensor], *, seed: int = 0
) -> dict[int, list[float]]:
    """Let the routers of a model start from clusters of their own input, in place.

    Each router's rows become the centroids of a spherical k-means of the first tokens that its layer receives (of mean
    tokens where it routes images), so that at first a token goes to the cluster that it belongs to
    (`TopKRouter.start_rows`). Experts that have equal rows, as those that hold one MLP together, get one centroid. Of
    several clusterings the one with the most even clusters is taken. Noise weights and selection biases stay. Of the
    batches [B, 3, H, W] the first 2 000 images are enough.

    Returns:
        Block index -> share of the units that fell into each cluster, by expert or group of experts with equal rows.

    Raises:
        UserError: if the model has no MoE layer, a router has no row for each expert, or there are too few images.
    """
    layers = moe_layers(model)
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no MoE layer, so it has no router to start: give a MoE model."
        )
    for layer in layers:
        if layer.router.rows is None:
            raise UserError(
                f"The router {layer.router_name!r} can't start from clusters: its tokens don't choose by a learned row "
                "for each expert. Leave the cluster start out, or choose another router."
            )
    generator = torch.Generator().manual_seed(seed)
    shares = {}
    for place, (layer, units) in enumerate(
        zip(layers, _router_inputs(model, layers, batches, generator), strict=True)
    ):
        router = cast(TopKRouter, layer.router)
        group = _groups(router)  # [E]
        clusters = int(group.max()) + 1
        if len(units) < clusters:
            what = "images" if routed_unit(layer.router) == "image" else "tokens"
            raise UserError(
                f"{len(units)} {what} make no {clusters} clusters, one for each expert: give more images."
            )
        found = [spherical_kmeans(units, clusters, generator) for _ in range(_RESTARTS)]
        centroids, sizes = min(
            found, key=lambda each: int(each[1].max())
        )  # whose largest cluster is smallest
        router.start_rows(centroids[group], units)
        shares[place if layer.layer_index is None else layer.layer_index] = (
            sizes / sizes.sum()
        ).tolist()
    cast(
        Any, model
    ).router_start = "cluster"  # saved with the model: no training can be credited with it
    return shares


def _router_inputs(
    model: nn.Module,
    layers: Sequence[MoEMlp],
    batches: Iterable[Tensor],
    generator: torch.Generator,
) -> list[Tensor]:
    """[T, D] float64 per layer, on the CPU: what its router scores, up to `_UNITS` of the first images."""
    found: list[list[Tensor]] = [[] for _ in layers]
    wanted = [_UNITS[routed_unit(layer.router)] for layer in layers]

    def keep(place: int, layer: MoEMlp, arguments: tuple[Tensor, ...]) -> None:
        tokens = arguments[0]
        if routed_unit(layer.router) == "image":
            found[place].append(mean_token(tokens)[:, 0].double().cpu())
        else:
            taken = torch.rand(tokens.shape[:2], generator=generator).argsort(1)[
                :, :_OF_IMAGE
            ]  # [B, taken]
            chosen = (
                tokens.double()
                .cpu()
                .gather(1, taken.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
            )
            found[place].append(chosen.flatten(0, 1))

    # Locked, so that no other thread's images pass the hooks.
    with routing_lock(model), evaluating(model), ExitStack() as hooks:
        for place, layer in enumerate(layers):
            hooks.enter_context(layer.register_forward_pre_hook(partial(keep, place)))
        for images in batches:
            model(images)
            if all(
                sum(map(len, units)) >= number for units, number in zip(found, wanted, strict=True)
            ):
                break
    if not found[0]:
        raise UserError("There is no image to cluster: give at least one batch.")
    return [
        copy.deepcopy(layer.router).cpu().double().features(torch.cat(units)[:number])
        for layer, units, number in zip(layers, found, wanted, strict=True)
    ]


def _groups(router: TopKRouter) -> Tensor:
    """[E] int64: which experts share a row, numbered as they come; rows that are all equal (zeros) are E rows."""
    rows = router.rows.cpu()
    first = (
        (rows[:, None] == rows).all(-1).byte().argmax(1)
    )  # [E] the first expert with the same row
    return first.unique(return_inverse=True)[1] if first.any() else torch.arange(len(rows))


def spherical_kmeans(x: Tensor, clusters: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Unit centroids [E, D] and sizes [E] int64 of clusters by cosine of x [T, D]: k-means of directions."""
    from sklearn.cluster import KMeans  # not at import: it takes a second

    x = F.normalize(x, dim=-1)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    found = KMeans(clusters, n_init=1, max_iter=_STEPS, random_state=seed).fit(x.numpy())
    centroids = F.normalize(torch.from_numpy(found.cluster_centers_), dim=-1)
    return centroids, torch.bincount((x @ centroids.T).argmax(-1), minlength=clusters)


@contextmanager
def _seeded(seed: int | None, stream: int = 0) -> Iterator[None]:
    """Torch's CPU generator from `seed` (two streams for each), and afterwards as if nothing had been drawn."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(2 * seed + stream)
        yield
