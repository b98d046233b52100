"""Sparse upcycling: a trained dense ViT becomes a Mixture of Experts that computes the same, and trains on from there.

- every expert starts as a copy of the MLP that it replaces: Komatsuzaki et al. 2022, arXiv:2212.05055, §2. With gates
  that sum to 1 the mixture of equal experts is that MLP, so gates are normalised here if the router can (for one expert
  per token by a straight-through gate of value 1).
- copies can be made to differ (`reinit`): a share of each expert's hidden units is drawn anew with the statistics of
  the units that they replace (Drop-Upcycling, Nakamura et al. 2025, arXiv:2502.19261, §3).
- routers can start from clusters of their input: `start_routers` (cluster-aware upcycling, arXiv:2604.13508;
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
from torch import Tensor, nn

from moevision.errors import UserError
from moevision.layers import MoEMlp, TopKRouter, moe_layers, router_kind, routing_lock
from moevision.layers.routers import mean_token
from moevision.layers.routing import RouteBy, evaluating, routed_unit
from moevision.models.convert import (
    check_convertible,
    convert_to_moe,
    moe_layer_indices,
    plain_mlp,
    read_layer_indices,
)
from moevision.models.io import ImageSize, create_from, first_blocks, reshape
from moevision.types import TimmModel


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
    dense model computes; for other options `initial_output_difference` measures the difference. A token costs top_k
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
        depth: how many of the source's first blocks to take; all if None. A model that was cut needs further training.
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

    # The dense model, on the CPU, where a seed gives the same numbers on every machine.
    device = torch.device("cpu")
    if isinstance(source, nn.Module):
        if weights is not None:
            raise UserError(
                "A model brings its own weights: give a timm name together with a file of weights."
            )
        device = next(source.parameters()).device
        with _scoped_seed(seed):
            dense = copy.deepcopy(source)
            if device.type != "meta":
                dense = dense.cpu()
            if depth is not None:
                dense = first_blocks(dense, depth)
            dense = reshape(dense, num_classes, image_size)
    else:
        dense = load_dense(
            source, weights, num_classes=num_classes, image_size=image_size, depth=depth, seed=seed
        )

    # The blocks whose MLPs become experts.
    check_convertible(dense)
    if layers is None:
        layers = read_layer_indices(dense, "last2")
    check_upcyclable(dense, layers)

    # Experts and routers. Gates that sum to 1 leave the output as it was.
    routers = [router] if isinstance(router, str) else router
    can_normalize = any("normalize_gates" in router_kind(name).options for name in routers)
    defaults = {"normalize_gates": True if can_normalize else None, "noise": router_noise}
    options = defaults | moe_options
    with _scoped_seed(seed, stream=1):
        model = convert_to_moe(
            dense, layers, num_experts, top_k, router, copy_weights=True, **options
        )
        for layer in moe_layers(model):
            _redraw_units(layer, reinit)
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
    with _scoped_seed(seed):
        return create_from(source, num_classes, image_size, weights=weights, depth=depth)


def check_upcyclable(vit: TimmModel, layers: str | Sequence[int]) -> None:
    """Raise a UserError with the reason if the MLPs of these blocks can't become experts."""
    check_convertible(vit)
    indices = moe_layer_indices(layers, len(vit.blocks))
    if not indices:
        raise UserError(
            f"No block of {type(vit).__name__} was chosen: name at least one in layers."
        )
    for index in indices:
        plain_mlp(vit, index)  # raises if it isn't one


@torch.no_grad()
def _redraw_units(layer: MoEMlp, fraction: float) -> None:
    """Redraw a fraction of each expert's hidden units from a normal distribution with their mean and std."""
    fc1 = layer.experts.fc1
    fc2 = layer.experts.fc2
    num_redrawn = round(fraction * fc1.out_features)
    if not num_redrawn:
        return
    for expert in range(fc1.num_experts):
        # The same units in all weights, as in the paper; its code draws other units for every matrix.
        units = torch.randperm(fc1.out_features)[:num_redrawn]
        unit_weights = [fc1.weight[expert], fc2.weight[expert].mT]  # [H, D] each
        if fc1.bias is not None:
            unit_weights.append(fc1.bias[expert])  # [H]
        for weight in unit_weights:
            current = weight[units]
            weight[units] = torch.randn_like(current) * current.std(correction=0) + current.mean()


# ---- routers from clusters

# Most routed units that are clustered: enough for E centres, more only costs time.
_MAX_UNITS: dict[RouteBy, int] = {"token": 20_000, "image": 2_000}
START_IMAGES = 2_000  # most images whose tokens are clustered
_TOKENS_OF_IMAGE = 40  # most tokens of one image, so that they come from many images
_NUM_CLUSTERINGS = 8  # with different seeds; the one with the most even clusters is used
_KMEANS_STEPS = 50


@torch.no_grad()
def start_routers(
    model: TimmModel, batches: Iterable[Tensor], *, seed: int = 0
) -> dict[int, list[float]]:
    """Initialise the routers of a model from clusters of their own input, in place.

    Tokens that each layer receives (mean tokens where it routes images) are clustered by spherical k-means. The
    centroids become the router's rows, so that at first a token goes to the expert of its cluster
    (`TopKRouter.start_rows`). Of several clusterings the one with the most even clusters is used. Noise weights and
    selection biases are left as they are. Batches [B, 3, H, W] are read until there are enough tokens: 2 000 images
    suffice.

    Returns:
        Block index -> [E] share of the clustered units in each expert's cluster.

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
    for collector in collectors:
        layer = collector.layer
        units = collector.features()
        if len(units) < layer.router.num_experts:
            unit_name = "images" if routed_unit(layer.router) == "image" else "tokens"
            raise UserError(
                f"{len(units)} {unit_name} make no {layer.router.num_experts} clusters, one for each expert: give more "
                "images."
            )
        # Of several clusterings the one whose largest cluster is smallest.
        clusterings = [
            spherical_kmeans(units, layer.router.num_experts, generator)
            for _ in range(_NUM_CLUSTERINGS)
        ]
        centroids, sizes = min(clusterings, key=lambda clustering: int(clustering[1].max()))
        cast(TopKRouter, layer.router).start_rows(centroids, units)
        shares[cast(int, layer.layer_index)] = (sizes / sizes.sum()).tolist()

    # Saved with the model, since what such a router separates is not an effect of training.
    model.router_start = "cluster"
    return shares


class RouterInput:
    """Collects the units (tokens, or mean tokens of images) that a layer's router scores, by a hook on the layer."""

    def __init__(self, layer: MoEMlp, generator: torch.Generator) -> None:
        self.layer = layer
        self.generator = generator  # for the choice of tokens of an image
        self.limit = _MAX_UNITS[routed_unit(layer.router)]
        self.batches: list[Tensor] = []  # [T, D] float64 on the CPU each

    @property
    def full(self) -> bool:
        """Whether `limit` units were collected."""
        return sum(map(len, self.batches)) >= self.limit

    def collect(self, _layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """The forward pre-hook: collect the units of one batch."""
        tokens = arguments[0]  # [B, N, D]
        if routed_unit(self.layer.router) == "image":
            mean = mean_token(tokens).squeeze(1)  # [B, D]
            self.batches.append(mean.double().cpu())
            return

        images, num_tokens, width = tokens.shape
        random_order = torch.rand(images, num_tokens, generator=self.generator).argsort(1)  # [B, N]
        token_index = random_order[:, :_TOKENS_OF_IMAGE].unsqueeze(-1).expand(-1, -1, width)
        units = tokens.double().cpu().gather(1, token_index)  # [B, chosen, D]
        self.batches.append(units.flatten(0, 1))

    def features(self) -> Tensor:
        """[T, features] float64: the router's features of the collected units, which it multiplies with its rows."""
        units = torch.cat(self.batches)[: self.limit]
        router = copy.deepcopy(self.layer.router).cpu().double()
        result: Tensor = router.features(units)
        return result


def _run_until_full(
    model: nn.Module, collectors: Sequence[RouterInput], batches: Iterable[Tensor]
) -> None:
    """Run a model on batches until all collectors are full."""
    # Locked, so that the hooks see no other thread's images.
    with routing_lock(model), evaluating(model), ExitStack() as hooks:
        for collector in collectors:
            hooks.enter_context(collector.layer.register_forward_pre_hook(collector.collect))
        for images in batches:
            model(images)
            if all(collector.full for collector in collectors):
                break
    if not collectors[0].batches:
        raise UserError("There is no image to cluster: give at least one batch.")


def spherical_kmeans(x: Tensor, clusters: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cluster the directions of x [T, D] by k-means: centroids [E, D] of length 1, and cluster sizes [E] int64."""
    from sklearn.cluster import KMeans  # not at import: it takes a second

    x = F.normalize(x, dim=-1)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    kmeans = KMeans(clusters, n_init=1, max_iter=_KMEANS_STEPS, random_state=seed)
    kmeans.fit(x.numpy())
    centroids = F.normalize(torch.from_numpy(kmeans.cluster_centers_), dim=-1)
    nearest = (x @ centroids.T).argmax(-1)  # [T]
    return centroids, torch.bincount(nearest, minlength=clusters)


@contextmanager
def _scoped_seed(seed: int | None, stream: int = 0) -> Iterator[None]:
    """Seed torch's CPU generator inside the scope, and restore its state afterwards; nothing if the seed is None.

    `stream`, 0 or 1, selects one of two independent sequences of random numbers for the same seed.
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(2 * seed + stream)
        yield
