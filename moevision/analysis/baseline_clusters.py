"""Clusters of what patches look like, as if they were experts: baselines of colour and of the layer's input.

K-means with E clusters, fitted on half of the pictures and applied to the other half; the nearer a cluster, the larger
its score, and the layer's own rule chooses by the scores.

Axes: B images of a batch, P patches, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moevision.analysis.baseline_rule import Assignments, Chosen, Rule, rules_of
from moevision.analysis.collect import layer_inputs, network_input
from moevision.analysis.images import PictureSet, image_patches, read_images
from moevision.analysis.trace import RoutingTrace
from moevision.models.hub import SavedModel

if TYPE_CHECKING:
    from sklearn.cluster import KMeans

_FIT_TOKENS = 20_000  # enough for E centres; more only costs time
_BATCH = 64

Floats = npt.NDArray[np.floating[Any]]


def cluster_patches(
    model: SavedModel,
    pictures: PictureSet,
    trace: RoutingTrace,
    rows: npt.NDArray[np.int64],
    seeds: int,
    seed: int,
    with_input: bool,
) -> dict[str, list[Assignments]]:
    """K-means of colours and of each layer's input, fitted on half of the rows of the trace, applied to the others."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(rows))
    fitted, measured = np.sort(order[: len(rows) // 2]), np.sort(order[len(rows) // 2 :])
    per_image = max(1, _FIT_TOKENS // max(1, len(fitted)))
    sample: dict[int | None, list[Floats]] = {}
    for features in _features(model, pictures, trace, rows[fitted], with_input):
        for layer, tokens in features.items():
            taken = rng.permuted(np.tile(np.arange(tokens.shape[1]), (len(tokens), 1)), axis=1)[:, :per_image]
            sample.setdefault(layer, []).append(np.take_along_axis(tokens, taken[..., None], 1))
    found: dict[str, list[Assignments]] = {"kmeans_colour": [], "kmeans_input": []}
    asked: list[tuple[str, int | None, Rule, list[int | None]]] = [
        ("kmeans_colour", None, rule, layers) for rule, layers in rules_of(trace).items()
    ]
    asked += [
        ("kmeans_input", layer.layer, Rule.of(layer), [layer.layer]) for layer in trace.layers if layer.layer in sample
    ]
    clusterings = [
        _Clustering(name, source, rule, layers, s, np.concatenate(sample[source]))
        for name, source, rule, layers in asked
        for s in range(seeds)
    ]
    for features in _features(model, pictures, trace, rows[measured], with_input):
        for clustering in clusterings:
            clustering.look(features[clustering.source])
    for clustering in clusterings:
        found[clustering.name] += clustering.assignments(measured)
    return found


class _Clustering:
    """E clusters of what patches look like, as experts of some layers."""

    def __init__(
        self, name: str, source: int | None, rule: Rule, layers: Sequence[int | None], seed: int, tokens: Floats
    ) -> None:
        self.name, self.source, self.rule, self.layers, self.seed = name, source, rule, layers, seed
        self.mean = _fit(tokens, rule.num_experts, seed)
        self.scale = rule.scale(self._scores(tokens))
        self.chosen: list[Chosen] = []

    def look(self, tokens: Floats) -> None:
        """Choose for the patches of a batch [B, P, D]."""
        self.chosen.append(self.rule.apply(self._scores(tokens), self.scale))

    def assignments(self, images: npt.NDArray[np.int64]) -> list[Assignments]:
        """All choices, one for each of the layers."""
        index, *amounts = (None if each[0] is None else np.concatenate(each) for each in zip(*self.chosen, strict=True))
        assert index is not None
        return [Assignments(layer, self.seed, index, images, self.rule.num_experts, *amounts) for layer in self.layers]

    def _scores(self, tokens: Floats) -> Floats:
        """[B, P, E]: the nearer a cluster, the better."""
        distance = self.mean.transform(tokens.reshape(-1, tokens.shape[-1]))
        scores: Floats = -np.square(distance).reshape(*tokens.shape[:2], -1)
        return scores


def _fit(tokens: Floats, num_clusters: int, seed: int) -> KMeans:
    from sklearn.cluster import KMeans  # not needed, and slow to import, for anything else here

    return KMeans(num_clusters, n_init=1, random_state=seed).fit(tokens.reshape(-1, tokens.shape[-1]))


def _features(
    model: SavedModel, pictures: PictureSet, trace: RoutingTrace, indices: npt.NDArray[np.int64], with_input: bool
) -> Iterator[dict[int | None, Floats]]:
    """Per batch the mean colours (None -> [B, P, 3]) and, if wanted, each MoE layer's input (block -> [B, P, D])."""
    for start in range(0, len(indices), _BATCH):
        images = read_images(pictures, indices[start : start + _BATCH])
        colours = [image_patches(image, trace.grid).mean((1, 2), dtype=np.float32) / 255 for image in images]
        features: dict[int | None, Floats] = {None: np.stack(colours)}
        if with_input:
            for block, tokens in layer_inputs(model.net, network_input(model, images)).items():
                features[block] = tokens.float().cpu().numpy()
        yield features
