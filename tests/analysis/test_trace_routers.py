"""Traces of every router: what an expert reads and a patch takes, by hand and against the model, and old files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from moevision import forward_routing
from moevision.analysis import LayerTrace, RoutingTrace, collect_routing, open_pictures
from moevision.analysis.describe import (
    class_expert_map,
    first_choice_paths,
    image_shares,
    layer_gallery,
    part_expert_table,
    random_patches,
    top_patches,
)
from moevision.analysis.information import choice_counts
from moevision.data import SyntheticPets
from moevision.data.transforms import normalize
from moevision.layers import ROUTERS
from tests.analysis.models import MEAN, STD, saved, small_net

PETS = SyntheticPets(16, 32, 0, "test")

# One image of 3 patches, 2 experts. Expert choice: both take patch 0, expert 1 takes patch 2, nobody takes patch 1.
TAKEN = LayerTrace(
    layer=1,
    expert_index=np.array([[[1, 0], [0, 1], [1, 0]]], np.int16),
    kept=np.array([[[True, True], [False, False], [True, False]]]),
    combine_weight=np.array([[[0.7, 0.3], [0.0, 0.0], [0.6, 0.0]]], np.float32),
    probs=np.full((1, 3, 2), 0.5, np.float16),
    margin=np.zeros((1, 3), np.float32),
    entropy_bits=np.ones((1, 3), np.float32),
    kind="expert_choice",
)
# Soft MoE: what patches take sums to 1 over experts; what experts read sums to 1 over patches (one slot each).
MIXED = replace(
    TAKEN,
    kept=np.ones((1, 3, 2), bool),
    combine_weight=np.array([[[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]]], np.float32),
    kind="soft",
    read_weight=np.array(
        [[[0.5, 0.2], [0.7, 0.1], [0.4, 0.1]]], np.float32
    ),  # of the experts in the same order
)


def test_expert_choice_counts_what_was_taken() -> None:
    assert TAKEN.counts().tolist() == [[1, 2]]
    np.testing.assert_allclose(TAKEN.image_takes(), [[0.3, 1.3]], rtol=1e-6)
    assert TAKEN.first_choice().tolist() == [[1, -1, 1]]
    assert TAKEN.experts_per_patch == 1.0
    assert [len(gallery.random) for gallery in layer_gallery(TAKEN)] == [1, 2]
    fractions = np.array([[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]])
    table = part_expert_table(TAKEN.expert_index, fractions, 2, TAKEN.requested_share)
    np.testing.assert_allclose(table, [[1, 1.5], [0, 0.5]])


def test_soft_moe_reads_and_takes() -> None:
    np.testing.assert_allclose(MIXED.counts(), [[0.3 + 0.6 + 0.1, 0.7 + 0.4 + 0.9]], rtol=1e-6)
    np.testing.assert_allclose(MIXED.image_takes(), MIXED.counts())
    np.testing.assert_allclose(image_shares(MIXED.image_takes()), [[1 / 3, 2 / 3]], rtol=1e-6)
    assert MIXED.first_choice().tolist() == [[1, 0, 1]]
    assert [patch.patch for patch in top_patches(MIXED, 1, count=1)] == [
        0
    ]  # read most, though patch 2 takes more


def test_random_patches_of_soft_moe_are_drawn_as_they_are_read() -> None:
    """3000 draws of one patch of expert 0: shares 0.2, 0.7, 0.1; standard deviation below 0.0084."""
    drawn = [random_patches(MIXED, 0, count=1, seed=seed)[0].patch for seed in range(3000)]
    np.testing.assert_allclose(
        np.bincount(drawn, minlength=3) / 3000, [0.2, 0.7, 0.1], atol=4 * 0.0084
    )


@pytest.mark.parametrize("router", list(ROUTERS))
def test_a_trace_says_what_the_model_did(router, tmp_path) -> None:
    """Every router, with a class token; saved and loaded again."""
    model = saved(small_net(router, class_token=True, global_pool="token"))
    pictures = open_pictures(PETS, 32)
    trace = collect_routing(
        model, pictures, progress=False, path=tmp_path / "trace.safetensors", batch_size=5
    )
    images = np.stack([pictures.image(index) for index in range(16)])
    pixels = normalize(torch.from_numpy(images).permute(0, 3, 1, 2), MEAN, STD)
    again = RoutingTrace.load(tmp_path / "trace.safetensors")
    assert [layer.kind for layer in again.layers] == [layer.kind for layer in trace.layers]
    with torch.inference_mode():
        _, routings = forward_routing(model.net, pixels)
    for layer, routing in zip(again.layers, routings, strict=True):
        weights = routing.expert_weights()[:, 1:]
        reads = choice_counts(layer.expert_index, 4, layer.dispatch_share).sum(0)  # [P, E]
        assert layer.kind == routing.kind
        if layer.kind == "token_choice":
            np.testing.assert_array_equal(
                layer.counts().sum(0), routing.expert_index[:, 1:].flatten().bincount(minlength=4)
            )
        else:
            np.testing.assert_allclose(layer.image_takes(), weights.sum(1), rtol=1e-5)
        if layer.kind == "expert_choice":
            by_token = torch.zeros(16, 4, 17).scatter(-1, routing.token_index, 1.0)[..., 1:]
            np.testing.assert_array_equal(layer.counts(), by_token.sum(-1))
            np.testing.assert_array_equal(reads, by_token.sum(0).T)
        if layer.kind == "soft":
            np.testing.assert_allclose(reads, routing.dispatch_weight[:, 1:].sum((0, 3)), rtol=1e-5)
    assert (first_choice_paths(again) >= -1).all()
    assert sum(layer.first_choice().min() < 0 for layer in again.layers) <= 2 * (
        router == "expert_choice"
    )


def test_only_traces_of_other_kinds_say_so(make_trace) -> None:
    """Files of token choice are as they always were, and a file without kinds is one."""
    plain = make_trace(np.zeros((2, 4, 1)), labels=[0, 1], num_experts=2, grid=(2, 2))
    assert "kinds" not in plain.metadata()
    assert (
        RoutingTrace.from_arrays(plain.arrays(), plain.metadata()).layers[0].kind == "token_choice"
    )
    soft = replace(plain.layers[0], kind="soft", read_weight=np.ones((2, 4, 1), np.float32))
    other = replace(plain, layers=(soft,))
    assert json.loads(other.metadata()["kinds"]) == ["soft"]
    chosen = other.select([1])
    assert chosen.layers[0].kind == "soft"
    assert chosen.layers[0].read_weight.shape == (1, 4, 1)


def test_a_class_map_of_expert_choice_is_about_weights(make_trace) -> None:
    """Both experts take one patch of every image; class 1 gives expert 1 nine times the weight of expert 0."""
    labels = np.arange(40) % 2
    trace = make_trace(np.zeros((40, 2, 2)), labels=labels, num_experts=2, grid=(1, 2))
    heavy = np.where(labels == 1, 0.9, 0.1)
    layer = replace(
        trace.layers[0],
        kind="expert_choice",
        expert_index=np.broadcast_to(np.array([[1, 0], [0, 1]], np.int16), (40, 2, 2)),
        kept=np.broadcast_to(np.array([[True, False], [True, False]]), (40, 2, 2)),
        combine_weight=np.stack(
            [np.stack([heavy, 0 * heavy], -1), np.stack([1 - heavy, 0 * heavy], -1)], 1
        ),
    )
    assert (layer.counts() == 1).all()
    weighted = replace(trace, layers=(layer,))
    found = class_expert_map(weighted, 1, num_permutations=99)
    np.testing.assert_allclose(found.share, [[0.9, 0.1], [0.1, 0.9]])
    assert found.significant.all()
