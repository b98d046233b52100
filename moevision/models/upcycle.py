"""Sparse upcycling: a trained dense ViT becomes a Mixture of Experts that computes the same, and trains on from there.

- every expert starts as a copy of the MLP that it replaces: Komatsuzaki et al. 2022, arXiv:2212.05055, §2. With gates
  that sum to 1 the mixture of equal experts is that MLP, so they are normalised here wherever the router can (for one
  expert per token by a straight-through gate of value 1).
- copies that differ: a share of each expert's hidden units is drawn anew with the statistics of the units that they
  replace (Drop-Upcycling, Nakamura et al. 2025, arXiv:2502.19261, §3).
- routers that start from clusters of what they will see: `start_routers` (cluster-aware upcycling, arXiv:2604.13508;
  its experts from each cluster's SVD and its distillation loss are left out).

Axes: D width, H hidden width of one expert, E experts, B images, C classes, T routed units (tokens, or images).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
    reinit: float = 0.0,
    seed: int | None = 0,
    router_noise: str | None = None,
    **moe_options: Any,
) -> nn.Module:
    """Turn a trained dense ViT into a Mixture of Experts that starts from its weights.

    With a dropless token-choice router (the default), and reinit left at 0, the result computes in evaluation what the
    dense model computes; `initial_output_difference` measures how far another choice is from that. A token costs top_k
    whole MLPs, plus the router.

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
        reinit: share of each expert's hidden units that are drawn anew.
        seed: of routers, a new classifier and reinit; None draws from torch's global generator.
        router_noise: the router option `noise` (`learned`, `fixed`, `jitter`, `none`).
        **moe_options: further arguments of `convert_to_moe`, such as capacity_factor. `normalize_gates` is True where
            a router can.

    Returns:
        The converted model, which saves and loads under the registered name `vit_moe`.

    Raises:
        UserError: if the source can't be found, loaded or upcycled, or an option doesn't fit.
    """
    if not 0 <= reinit <= 1:
        raise UserError(f"reinit is {reinit}: it must be at least 0 and at most 1.")

    # The dense model, on the CPU: there seeds mean the same on every machine.
    device = torch.device("cpu")
    if isinstance(source, nn.Module):
        if weights is not None:
            raise UserError(
                "A model brings its own weights: give a timm name together with a file of weights."
            )
        device = next(source.parameters()).device
        dense = _copied(source, num_classes, image_size, depth, seed)
    else:
        dense = load_dense(
            source, weights, num_classes=num_classes, image_size=image_size, depth=depth, seed=seed
        )

    # Which blocks.
    check_upcyclable(dense, "last2" if layers is None else layers)
    if layers is None:
        layers = read_layer_indices(dense, "last2")
        if not layers:
            raise UserError(
                "The classifier reads the patches of none of the last two blocks: name layers."
            )

    # Experts and routers. Gates that sum to 1 leave the output as it was.
    routers = [router] if isinstance(router, str) else router
    can_normalize = any("normalize_gates" in router_kind(name).options for name in routers)
    defaults = {"normalize_gates": True if can_normalize else None, "noise": router_noise}
    options = defaults | moe_options
    with _seeded(seed, stream=1):
        model = convert_to_moe(
            dense, layers, num_experts, top_k, router, copy_weights=True, **options
        )
        for layer in moe_layers(model):
            _redraw_units(layer, reinit)
    return model.to(device)


def _copied(
    source: nn.Module,
    num_classes: int | None,
    image_size: ImageSize | None,
    depth: int | None,
    seed: int | None,
) -> nn.Module:
    """A copy of a model, on the CPU unless it has no memory, of another shape if asked for."""
    with _seeded(seed):
        dense = copy.deepcopy(source)
        if not next(source.parameters()).is_meta:
            dense = dense.cpu()
        if depth is not None:
            dense = first_blocks(dense, depth)
        return reshape(dense, num_classes, image_size)


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
    before = _logits(dense, images)
    after = _logits(moe, images)
    return InitialOutputDifference(
        images=len(images),
        max_logit=float((after - before).abs().max()),
        logit_scale=float(before.std()),
        agreement=float((after.argmax(-1) == before.argmax(-1)).float().mean()),
    )


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    device = next(model.parameters()).device
    with evaluating(model):
        logits: Tensor = model(images.to(device))
    return logits.float().cpu()


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
    has_blocks = isinstance(blocks, nn.Sequential | nn.ModuleList) and len(blocks) > 0
    if not has_blocks or not hasattr(vit, "patch_embed"):
        raise UserError(
            f"{name} has no list of transformer blocks behind a patch_embed: upcycling needs a ViT, DeiT or EVA-style "
            "model."
        )
    indices = moe_layer_indices(layers, len(cast(Any, blocks)))
    if not indices:
        raise UserError(f"No block of {name} was chosen: name at least one in layers.")
    for index in indices:
        plain_mlp(vit, index)
    mlps = [getattr(block, "mlp", None) for block in cast(Any, blocks)]
    widths = {cast(Any, mlp).fc1.in_features for mlp in mlps if isinstance(mlp, Mlp)}
    if len(widths) > 1:
        raise UserError(
            f"{name} is hierarchical (widths {sorted(widths)}): upcycling needs one width in all blocks."
        )


@torch.no_grad()
def _redraw_units(layer: MoEMlp, share: float) -> None:
    """Draw this share of each expert's hidden units anew, with the mean and spread of the units that they replace."""
    fc1 = layer.experts.fc1
    fc2 = layer.experts.fc2
    count = round(share * fc1.out_features)
    if not count:
        return
    for expert in range(fc1.num_experts):
        # One set of units for all their weights, as the paper has it (its code draws a set for every matrix).
        units = torch.randperm(fc1.out_features)[:count]
        parts = [fc1.weight[expert], fc2.weight[expert].mT]  # [H, D] each
        if fc1.bias is not None:
            parts.append(fc1.bias[expert])  # [H]
        for part in parts:
            old = part[units]
            part[units] = torch.randn_like(old) * old.std(correction=0) + old.mean()


# ---- routers from clusters

# Enough for E centres, more only costs time.
_UNITS: dict[RouteBy, int] = {"token": 20_000, "image": 2_000}
START_IMAGES = 2_000  # whose tokens are clustered, at most
_TOKENS_OF_IMAGE = 40  # so that there are many images among them
_RESTARTS = 8
_KMEANS_STEPS = 50


@torch.no_grad()
def start_routers(
    model: nn.Module, batches: Iterable[Tensor], *, seed: int = 0
) -> dict[int, list[float]]:
    """Let the routers of a model start from clusters of their own input, in place.

    Each router's rows become the centroids of a spherical k-means of the first tokens that its layer receives (of mean
    tokens where it routes images), so that at first a token goes to the cluster that it belongs to
    (`TopKRouter.start_rows`). Of several clusterings the one with the most even clusters is taken. Noise weights and
    selection biases stay. Of the batches [B, 3, H, W] the first 2 000 images are enough.

    Returns:
        Block index -> share of the units that fell into each expert's cluster.

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
    collectors = [RouterInput(layer, generator) for layer in layers]
    _run_until_full(model, collectors, batches)

    shares = {}
    for number, collector in enumerate(collectors):
        layer = collector.layer
        units = collector.features()
        if len(units) < layer.router.num_experts:
            unit = "images" if routed_unit(layer.router) == "image" else "tokens"
            raise UserError(
                f"{len(units)} {unit} make no {layer.router.num_experts} clusters, one for each expert: give more "
                "images."
            )
        centroids, sizes = _most_even_clusters(units, layer.router.num_experts, generator)
        cast(TopKRouter, layer.router).start_rows(centroids, units)
        index = number if layer.layer_index is None else layer.layer_index
        shares[index] = (sizes / sizes.sum()).tolist()

    # Saved with the model: no training can be credited with what such a router separates.
    cast(Any, model).router_start = "cluster"
    return shares


class RouterInput:
    """What the router of a layer scores for the first images of a model: a hook that collects up to `_UNITS` of it."""

    def __init__(self, layer: MoEMlp, generator: torch.Generator) -> None:
        self.layer = layer
        self.generator = generator  # draws the tokens of an image
        self.limit = _UNITS[routed_unit(layer.router)]
        self.batches: list[Tensor] = []  # [T, D] float64 on the CPU each

    @property
    def full(self) -> bool:
        """Whether there are enough."""
        return sum(map(len, self.batches)) >= self.limit

    def collect(self, _layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """A forward pre-hook of the layer."""
        tokens = arguments[0]  # [B, N, D]
        if routed_unit(self.layer.router) == "image":
            mean = mean_token(tokens).squeeze(1)  # [B, D]
            self.batches.append(mean.double().cpu())
            return

        images, count, width = tokens.shape
        order = torch.rand(images, count, generator=self.generator).argsort(1)  # [B, N]
        chosen = order[:, :_TOKENS_OF_IMAGE].unsqueeze(-1).expand(-1, -1, width)
        units = tokens.double().cpu().gather(1, chosen)
        self.batches.append(units.flatten(0, 1))

    def features(self) -> Tensor:
        """[T, features] float64: what is multiplied with the router's rows."""
        units = torch.cat(self.batches)[: self.limit]
        router = copy.deepcopy(self.layer.router).cpu().double()
        return cast(Tensor, router.features(units))


def _run_until_full(
    model: nn.Module, collectors: Sequence[RouterInput], batches: Iterable[Tensor]
) -> None:
    """Show batches to a model until all its collectors have enough."""
    # Locked, so that no other thread's images pass the hooks.
    with routing_lock(model), evaluating(model), ExitStack() as hooks:
        for collector in collectors:
            hooks.enter_context(collector.layer.register_forward_pre_hook(collector.collect))
        for images in batches:
            model(images)
            if all(collector.full for collector in collectors):
                break
    if not collectors[0].batches:
        raise UserError("There is no image to cluster: give at least one batch.")


def _most_even_clusters(
    x: Tensor, clusters: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Of several clusterings the one whose largest cluster is smallest: as `spherical_kmeans`."""
    clusterings = [spherical_kmeans(x, clusters, generator) for _ in range(_RESTARTS)]
    return min(clusterings, key=lambda clustering: int(clustering[1].max()))


def spherical_kmeans(x: Tensor, clusters: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Unit centroids [E, D] and sizes [E] int64 of clusters by cosine of x [T, D]: k-means of directions."""
    from sklearn.cluster import KMeans  # not at import: it takes a second

    x = F.normalize(x, dim=-1)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    kmeans = KMeans(clusters, n_init=1, max_iter=_KMEANS_STEPS, random_state=seed)
    kmeans.fit(x.numpy())
    centroids = F.normalize(torch.from_numpy(kmeans.cluster_centers_), dim=-1)
    nearest = (x @ centroids.T).argmax(-1)  # [T]
    return centroids, torch.bincount(nearest, minlength=clusters)


@contextmanager
def _seeded(seed: int | None, stream: int = 0) -> Iterator[None]:
    """Torch's CPU generator from `seed` (two streams for each), and afterwards as if nothing had been drawn."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(2 * seed + stream)
        yield
