"""Which routes reach the classifier: measured by `routes_read`, and seen when one route changes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moevision import Routing, convert_to_moe, upcycle
from moevision.analysis import collect_routing
from moevision.data import SyntheticPets
from moevision.demo import bundled_model
from moevision.layers import ROUTERS, moe_layers
from moevision.models.config import MoEConfig, build_model
from moevision.models.convert import (
    layers_that_miss_classifier,
    pool_patches,
    read_layer_indices,
    routes_read,
)
from moevision.models.io import describe, load_model, save_model
from tests.shared import noise_images
from tests.shared import small_vit as vit


@torch.no_grad()
def logits_move(model: nn.Module, layer: int, patch: int = 5) -> bool:
    """Whether the logits change when one patch is given another expert in one layer, and nothing else is done."""
    moe = moe_layers(model)[layer]
    place = int(model.num_prefix_tokens) + patch

    def elsewhere(routing: Routing) -> Routing:
        chosen = routing.expert_index.clone()  # [1, N, K]
        others = [expert for expert in range(routing.num_experts) if expert not in chosen[0, place]]
        chosen[0, place, 0] = others[0]
        return replace(routing, expert_index=chosen)

    pixels = noise_images(1, model.patch_embed.img_size[0], seed=1)
    before = model(pixels)
    moe.intervention = elsewhere
    try:
        return not torch.equal(before, model(pixels))
    finally:
        moe.intervention = None


def different_experts(model: nn.Module) -> nn.Module:
    """Copies that differ, so that another expert computes something else."""
    with torch.no_grad():
        for layer in moe_layers(model):
            for weight in (layer.experts.fc1.weight, layer.experts.fc2.weight):
                weight.add_(torch.randn_like(weight) * 0.1)
    return model


def pretrained(tmp_path: Path, **arch: Any) -> nn.Module:
    """What `fit --pretrained` builds from a dense model of this folder."""
    save_model(describe(vit()), tmp_path / "dense")
    config = MoEConfig(
        pretrained=str(tmp_path / "dense"), num_experts=4, top_k=1, router="vmoe_top_k", **arch
    )
    torch.manual_seed(0)
    return different_experts(build_model(config, 3, 32)).eval()


@pytest.mark.parametrize(("pool", "last"), [("avg", True), (None, False)])
def test_routes_of_a_pretrained_start(pool, last, tmp_path):
    """With a class token those of the last block aren't read; what is read moves the logits."""
    model = pretrained(tmp_path, moe_layers="last2", global_pool=pool)
    assert [layer.layer_index for layer in moe_layers(model)] == [1, 3]
    assert routes_read(model) == [True, last]
    assert layers_that_miss_classifier(model) == ([] if last else [3])
    assert [logits_move(model, layer) for layer in (0, 1)] == [True, last]


@pytest.mark.parametrize(
    "name", [pytest.param("photos", marks=pytest.mark.needs("photos")), "cifar10", "pets"]
)
def test_every_route_of_a_bundled_model_moves_the_logits(name):
    model = bundled_model(name).net
    layers = range(1 if name == "photos" else 2)
    assert routes_read(model) == [logits_move(model, layer) for layer in layers]
    assert routes_read(model) == [True for _ in layers]


def test_by_default_no_layer_is_unread():
    """This class-token model does not read block 5: the last two odd blocks before it are taken."""
    net = vit(depth=6)
    assert [layer.layer_index for layer in moe_layers(upcycle(net, num_experts=4))] == [1, 3]
    named = upcycle(net, layers="last2", num_experts=4)
    assert [layer.layer_index for layer in moe_layers(named)] == [3, 5]
    with pytest.warns(UserWarning, match="block 5"):
        collect_routing(named, SyntheticPets(4, 32, 0, "test"), progress=False)


def test_the_last_block_stays_dense_where_only_the_class_token_is_read():
    net = vit()
    assert read_layer_indices(net, "every2") == [1]
    assert read_layer_indices(net, "all") == [0, 1, 2]
    assert read_layer_indices(net, [3]) == [3]  # who names it means it
    assert read_layer_indices(vit(depth=6), "last2") == [1, 3]
    assert read_layer_indices(pool_patches(net), "last2") == [1, 3]
    assert all(routes_read(convert_to_moe(vit(), read_layer_indices(vit(), "all"), num_experts=4)))


@pytest.mark.parametrize("router", ROUTERS)
def test_for_every_router(router):
    """The class token alone, and all patches; in training mode too, and without a trace."""
    for pool, expected in (("token", [True, False]), ("avg", [True, True])):
        model = convert_to_moe(
            vit(global_pool=pool), "every2", num_experts=4, router=router
        ).train()
        for parameter in model.head.parameters():
            nn.init.zeros_(parameter)  # a new classifier may be zero, and hides nothing
        assert routes_read(model) == expected
        assert model.training
        assert not any(layer._forward_hooks for layer in moe_layers(model))
        assert all(parameter.grad is None for parameter in model.parameters())


def test_an_image_that_decides_for_all_tokens_is_read():
    """The class token goes to the image's expert too; a dense model has no routes."""
    by_image = convert_to_moe(vit(), "every2", num_experts=4, route_by="image")
    assert routes_read(by_image) == [True, True]
    assert routes_read(vit()) == []


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "vit_small_patch16_rope_224",
        "cait_xxs24_224",
        "xcit_nano_12_p16_224",
    ],
)
def test_a_model_that_was_made_to_pool_opens_again(name, tmp_path):
    """Constructors of these four classes differ in what they call the norm behind the pooling, if they know one."""
    net = upcycle(pool_patches(vit(name)), num_experts=2).eval()
    save_model(describe(net), tmp_path)
    assert torch.equal(
        load_model(str(tmp_path)).net(noise_images(1, seed=1)), net(noise_images(1, seed=1))
    )


def test_pooling_keeps_the_trained_norm_and_saves(tmp_path):
    """The features are the mean of the normed patches, computed here by hand; the saved model is the model."""
    net = vit()
    with torch.no_grad():
        net.norm.weight.uniform_(0.5, 1.5)
    features = net.forward_features(noise_images(1, seed=1))[:, 1:].mean(1)
    torch.manual_seed(1)
    pooled = pool_patches(net).eval()
    torch.testing.assert_close(
        pooled.forward_head(pooled.forward_features(noise_images(1, seed=1)), pre_logits=True),
        features,
    )
    save_model(describe(pooled), tmp_path)
    assert torch.equal(
        load_model(str(tmp_path)).net(noise_images(1, seed=1)), pooled(noise_images(1, seed=1))
    )
