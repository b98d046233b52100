"""The gallery's choice of patches, against a brute-force reading of the definition and hand-made traces."""

from dataclasses import replace

import numpy as np
import pytest

from moevision.analysis.describe import (
    first_choice_paths,
    layer_gallery,
    patches_on_path,
    random_patches,
    top_patches,
)
from tests.analysis.conftest import trace_of

IMAGES, PATCHES, EXPERTS, CHOICES = 30, 6, 4, 2


def a_layer(expert_index, weight, kept=None, layer=1):
    expert_index = np.asarray(expert_index)
    trace = trace_of(
        expert_index,
        labels=np.zeros(len(expert_index)),
        num_experts=EXPERTS,
        grid=(1, expert_index.shape[1]),
    )
    kept = trace.layers[0].kept if kept is None else np.asarray(kept)
    weight = np.asarray(weight, np.float32)
    return replace(trace.layers[0], layer=layer, kept=kept, combine_weight=weight)


def random_layer(seed, layer=1):
    """Choices, weights and drops at random; weights rounded so that some are equal."""
    rng = np.random.default_rng(seed)
    index = rng.random((IMAGES, PATCHES, EXPERTS)).argsort(-1)[..., :CHOICES]
    weight = rng.random((IMAGES, PATCHES, CHOICES)).round(1)
    return a_layer(index, weight, rng.random(index.shape) < 0.8, layer)


def a_trace(*layers, labels):
    trace = trace_of(
        layers[0].expert_index,
        labels=labels,
        num_experts=EXPERTS,
        grid=(2, 3),
        class_names=("cat", "dog"),
    )
    return replace(trace, layers=layers)


def routed(layer, expert):
    """{(image, patch): weight} by three loops."""
    return {
        (i, p): float(layer.combine_weight[i, p, k])
        for i in range(IMAGES)
        for p in range(PATCHES)
        for k in range(CHOICES)
        if layer.expert_index[i, p, k] == expert and layer.kept[i, p, k]
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("expert", range(EXPERTS))
def test_top_patches_are_the_heaviest_of_each_picture(seed, expert):
    layer = random_layer(seed)
    best = {}
    for (image, patch), weight in routed(
        layer, expert
    ).items():  # in order, so that the first of equals stays
        if image not in best or weight > best[image][1]:
            best[image] = (patch, weight)
    expected = sorted(((-weight, image, patch) for image, (patch, weight) in best.items()))[:8]
    assert [(-top.weight, top.image, top.patch) for top in top_patches(layer, expert)] == [
        (pytest.approx(weight), image, patch) for weight, image, patch in expected
    ]


def test_a_dropped_choice_is_nobodys_patch():
    index, weight = np.zeros((2, 1, 1)), [[[0.9]], [[0.2]]]
    layer = a_layer(index, weight, kept=[[[False]], [[True]]])
    assert top_patches(layer, 0) == [(1, 0, pytest.approx(0.2))]
    assert random_patches(layer, 0) == [(1, 0, pytest.approx(0.2))]
    assert top_patches(layer, 1) == random_patches(layer, 1) == []


def test_random_patches_are_uniform_and_seeded():
    layer = random_layer(3)
    everything = routed(layer, 2)
    assert random_patches(layer, 2, seed=7) == random_patches(layer, 2, seed=7)
    drawn = [random_patches(layer, 2, count=8, seed=seed) for seed in range(2000)]
    for patches in drawn[:50]:
        assert len({(patch.image, patch.patch) for patch in patches}) == 8
        for patch in patches:
            assert everything[patch.image, patch.patch] == pytest.approx(patch.weight)
    counts = dict.fromkeys(everything, 0)
    for patches in drawn:
        for patch in patches:
            counts[patch.image, patch.patch] += 1
    # Each of N patches is drawn in 8/N of the galleries: binomial, so within 5 standard deviations of its mean.
    share = 8 / len(everything)
    assert np.abs(np.array(list(counts.values())) - 2000 * share).max() < 5 * np.sqrt(
        2000 * share * (1 - share)
    )


def test_an_expert_with_few_patches_has_a_short_gallery():
    layer = a_layer([[[0], [0], [1]], [[1], [1], [1]]], np.full((2, 3, 1), 0.5))
    gallery = layer_gallery(layer, count=8)
    assert [entry.expert for entry in gallery] == [0, 1, 2, 3]
    assert [len(entry.top) for entry in gallery] == [1, 2, 0, 0]  # one of each image
    assert [len(entry.random) for entry in gallery] == [2, 4, 0, 0]


def test_paths_are_first_choices_by_layer():
    layers = random_layer(0, 1), random_layer(1, 3)
    paths = first_choice_paths(a_trace(*layers, labels=np.zeros(IMAGES)))
    assert paths.shape == (IMAGES, PATCHES, 2)
    for place, layer in enumerate(layers):
        np.testing.assert_array_equal(paths[..., place], layer.expert_index[..., 0])


def test_patches_on_a_path_take_it_and_spread_over_pictures():
    trace = a_trace(random_layer(0, 1), random_layer(1, 3), labels=np.arange(IMAGES) % 2)
    paths = first_choice_paths(trace)
    for path in ((0, 0), (1, 2), (3, 1)):
        for label in (None, 1):
            on_path = (paths == path).all(-1) & np.isin(
                trace.labels, [0, 1] if label is None else [label]
            )[:, None]
            found = patches_on_path(trace, path, label=label, count=5)
            assert len(found) == min(5, on_path.sum())
            assert all(on_path[patch.image, patch.patch] for patch in found)
            assert len({(patch.image, patch.patch) for patch in found}) == len(found)
            assert len({patch.image for patch in found}) == min(5, on_path.any(1).sum())
    assert patches_on_path(trace, (0, 0), count=10_000) != []
