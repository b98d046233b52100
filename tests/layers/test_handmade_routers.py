"""Gates that nobody learns: each rule, recomputed; what they look at and what they must not look at."""

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import moevision.models  # noqa: F401  (registers the names)
from moevision.layers import MoEMlp, Routing, forward_routing, moe_layers
from tests.layers.linear_experts import run

HANDMADE = ["hash", "random", "position"]


def layer_of(router: str, num_experts: int = 4, **options: Any) -> MoEMlp:
    torch.manual_seed(0)
    return MoEMlp(8, 8, num_experts=num_experts, router=router, **options).eval()


def route(layer: MoEMlp, images: int, num_tokens: int) -> Routing:
    """The decision about random tokens."""
    return run(layer, torch.randn(images, num_tokens, 8))[1]


def net_of(router: str) -> nn.Module:
    """Two MoE layers of four experts on a class token and 4 x 4 patches."""
    torch.manual_seed(0)
    return timm.create_model(
        "test_vit_moe", router=router, top_k=1, class_token=True, global_pool="token"
    )


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("router", HANDMADE)
def test_gates_are_1_over_k_without_losses_or_parameters(router, k):
    layer = layer_of(router, top_k=k)
    routing = route(layer, 3, 17)
    assert torch.equal(routing.combine_weight, torch.full((3, 17, k), 1 / k))
    assert routing.noise_std is None
    assert routing.kept.all()
    assert layer.router.losses == frozenset()
    assert layer.router.default_losses == {}
    assert list(layer.router.parameters()) == []


@pytest.mark.parametrize("router", ["hash", "position"])
def test_further_experts_are_the_next_ones(router):
    """(e, e + 1, e + 2) mod E."""
    index = route(layer_of(router, top_k=3), 3, 17).expert_index
    assert torch.equal(index, (index[..., :1] + torch.arange(3)) % 4)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("router", HANDMADE)
def test_logits_are_minus_the_rank_and_10_more_for_the_chosen(router, k):
    """Of four experts with K = 2: 10, 9, -2, -3 in the order of choice, of which the first two are chosen."""
    routing = route(layer_of(router, top_k=k), 3, 17)
    ranked, order = routing.logits.sort(-1, descending=True)
    expected = torch.tensor([10.0, 9.0, 8.0, 7.0][:k] + [-float(rank) for rank in range(k, 4)])
    assert torch.equal(ranked, expected.expand(3, 17, 4))
    assert torch.equal(order[..., :k], routing.expert_index)


@pytest.mark.parametrize("router", HANDMADE)
def test_only_the_position_counts_in_evaluation(router):
    """All images, whatever is on them, are routed alike."""
    layer = layer_of(router, top_k=2)
    index = torch.cat([route(layer, 3, 17).expert_index, route(layer, 2, 17).expert_index])
    assert torch.equal(index, index[:1].expand_as(index))
    assert len(index[0].unique()) == 4


def test_random_draws_anew_in_training_and_uniformly():
    """60 000 draws of K = 2 of 5: each expert 24 000 times (standard deviation 120), each of 20 pairs 3 000 (53)."""
    layer = layer_of("random", 5, top_k=2).train()
    torch.manual_seed(0)
    first, second = route(layer, 60, 1000), route(layer, 60, 1000)
    assert not torch.equal(first.expert_index, second.expert_index)
    assert (first.counts() - 24_000).abs().max() < 600
    pairs = torch.zeros(5, 5, dtype=torch.int64)
    index = first.expert_index.flatten(0, 1)
    pairs.index_put_(
        (index[:, 0], index[:, 1]), torch.ones(len(index), dtype=torch.int64), accumulate=True
    )
    assert pairs.diagonal().tolist() == [0] * 5
    assert (pairs[~torch.eye(5, dtype=torch.bool)] - 3000).abs().max() < 270


@pytest.mark.parametrize(
    ("patches", "num_experts", "bands"),
    [
        (16, 4, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]),
        (10, 4, [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]),  # floor(4 p / 10)
        (3, 4, [0, 1, 2]),
    ],
)
def test_position_makes_bands(patches, num_experts, bands):
    assert (
        route(layer_of("position", num_experts, top_k=1), 1, patches)
        .expert_index.flatten()
        .tolist()
        == bands
    )


def test_position_counts_patches_not_prefix_tokens():
    """The class token comes first and joins the first band; the four rows of the grid are the bands of four experts."""
    routing = forward_routing(net_of("position").eval(), torch.randn(2, 3, 32, 32))[1][0]
    assert (routing.grid, routing.num_prefix_tokens) == ((4, 4), 1)
    assert routing.expert_index[0, :, 0].tolist() == [0] + [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


COLOURS = torch.tensor([[1.5, -1.0, 0.2], [-1.5, 0.3, 1.0], [0.1, 1.8, -0.4], [-0.2, -1.2, -1.7]])


def mosaic(images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures [B, 3, 32, 32] of 4 x 4 patches in one of four colours with a little noise, and which [B, 16]."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(4, (images, 16), generator=generator)
    flat = COLOURS[which].mT.reshape(images, 3, 4, 4)
    pictures = flat.repeat_interleave(8, -1).repeat_interleave(8, -2)
    return pictures + 0.3 * torch.randn(pictures.shape, generator=generator), which


def test_colour_finds_the_clusters_of_the_first_training_batch():
    """Four colours far apart and four experts: patches share an expert exactly if they share a colour."""
    net, (pictures, which) = net_of("colour").train(), mosaic(8, 0)
    net(pictures)
    router = moe_layers(net)[0].router
    distance = torch.cdist(COLOURS, router.centroids)
    assert sorted(distance.argmin(-1).tolist()) == [0, 1, 2, 3]
    assert distance.amin(-1).max() < 0.1
    expert_of = distance.argmin(-1)
    for index in (0, 1):
        routing = forward_routing(net.eval(), pictures)[1][index]
        assert torch.equal(routing.expert_index[:, 1:, 0], expert_of[which])
    before = router.centroids.clone()
    net.train()(mosaic(8, 1)[0] * 0.3)
    assert torch.equal(router.centroids, before)


def test_colour_is_the_nearest_centroid_in_numpy():
    """Mean of every patch's pixels; the class token has the mean of the image."""
    net, (pictures, _) = net_of("colour").eval(), mosaic(4, 2)
    centroids = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    for layer in moe_layers(net):
        layer.router.centroids.copy_(torch.from_numpy(centroids))
    routing = forward_routing(net, pictures)[1][1]
    image = pictures.numpy()
    for number in range(4):
        means = [
            image[number, :, r : r + 8, c : c + 8].mean((1, 2))
            for r in range(0, 32, 8)
            for c in range(0, 32, 8)
        ]
        colours = np.array([np.mean(means, axis=0), *means])
        expected = ((colours[:, None] - centroids) ** 2).sum(-1).argmin(-1)
        np.testing.assert_array_equal(routing.expert_index[number, :, 0], expected)


def test_colours_of_copies_are_their_own():
    """A copy, a pickle and a reloaded model look at their own images with the centroids that were found."""
    net = net_of("colour").train()
    net(mosaic(8, 0)[0])
    fresh = net_of("colour").eval()
    fresh.load_state_dict(net.state_dict())
    pictures = mosaic(4, 3)[0]
    expected = net.eval()(pictures)
    for twin in (copy.deepcopy(net), pickle.load(io.BytesIO(pickle.dumps(net))), fresh):
        net(mosaic(4, 4)[0])  # the original has other images in mind
        assert torch.equal(twin(pictures), expected)


@pytest.mark.parametrize("router", [*HANDMADE, "colour"])
def test_the_rest_of_the_model_trains(router):
    """Experts and head get gradients although nothing of the gate does."""
    torch.manual_seed(0)
    net = timm.create_model("test_vit_moe", router=router).train()
    logits, routings = forward_routing(net, mosaic(2, 0)[0])
    logits.square().sum().backward()
    assert len(routings) == 2
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_hash_is_the_rank_of_a_fibonacci_hash_of_32_bits():
    """Knuth, The Art of Computer Programming 3, 6.4: positions times 2³² / φ, modulo 2³², in order of size."""
    golden = np.arange(16, dtype=np.uint32) * np.uint32(2654435769)  # wraps
    for training in (False, True):
        routing = route(layer_of("hash", 8, top_k=1).train(training), 1, 16)
        expected = golden.argsort().argsort() * 8 // 16
        assert routing.expert_index[0, :, 0].tolist() == expected.tolist()


def test_random_is_murmur_hash_in_evaluation():
    """fmix32 of MurmurHash3 (A. Appleby, public domain) over E · position + expert + 1: a saved model routes alike."""

    def fmix32(h: int) -> int:
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    routing = route(layer_of("random", 5, top_k=2), 1, 6)
    scores = [[fmix32(5 * position + expert + 1) for expert in range(5)] for position in range(6)]
    assert routing.expert_index[0].tolist() == [
        sorted(range(5), key=row.__getitem__)[:2] for row in scores
    ]
