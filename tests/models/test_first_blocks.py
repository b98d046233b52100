"""A pretrained model's first blocks, against the whole model."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from moevision.layers import moe_layers
from moevision.models.config import MoEConfig, build_model
from moevision.models.io import create_from, describe, first_blocks, load_model, save_model
from moevision.models.upcycle import upcycle
from tests.shared import SMALL_VIT

SMALL = {**SMALL_VIT, "num_classes": 5}


def images(count: int = 8) -> torch.Tensor:
    return torch.randn(
        count, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    """In float64, with weights far from their small initial values."""
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", **SMALL).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return net


def test_the_first_blocks_compute_what_they_computed(vit: nn.Module) -> None:
    """Norm and classifier then read the third block's output."""
    moe = upcycle(vit, depth=3, layers=[2], num_experts=4, top_k=1).eval()
    with torch.no_grad():
        tokens = vit._pos_embed(vit.patch_embed(images()))
        for block in list(vit.blocks)[:3]:
            tokens = block(tokens)
        assert float((moe(images()) - vit.forward_head(vit.norm(tokens))).abs().max()) < 1e-12
    assert len(vit.blocks) == 4, "the source is left as it was"


def test_the_first_blocks_save_and_load(tmp_path: Path) -> None:
    net = first_blocks(timm.create_model("vit_tiny_patch16_224", **SMALL).eval(), 3)
    assert len(net.feature_info) == 3
    save_model(describe(net), tmp_path / "dense")
    x = images().float()
    assert torch.equal(load_model(str(tmp_path / "dense")).net(x), net(x))
    moe = upcycle(tmp_path / "dense", num_experts=4).eval()
    assert moe.moe_config["moe_layers"] == [1]
    save_model(describe(moe), tmp_path / "moe")
    assert torch.equal(load_model(str(tmp_path / "moe")).net(x), moe(x))


def test_stochastic_depth_is_spaced_over_the_blocks_that_stay() -> None:
    def rates(net: nn.Module) -> list[float]:
        return [getattr(block.drop_path1, "drop_prob", 0.0) for block in net.blocks]

    cut = first_blocks(timm.create_model("vit_tiny_patch16_224", **SMALL, drop_path_rate=0.3), 3)
    built = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "depth": 3}, drop_path_rate=0.3)
    assert rates(cut) == pytest.approx(rates(built))
    assert rates(cut)[-1] == pytest.approx(0.3)


@pytest.mark.parametrize("twin", [None, "active_flops"])
def test_a_config_says_all_of_it(
    twin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Depth, placement, width, pooling; the dense fine-tune keeps the depth; a checkpoint rebuilds the same tensors."""
    real = timm.create_model
    small = {**SMALL, "patch_size": 16, "img_size": 64}
    source = real("vit_tiny_patch16_224", **{**small, "depth": 12})
    monkeypatch.setattr(
        timm, "create_model", lambda name, **given: real(name, **_sizes(name, small, given))
    )
    safetensors.torch.save_file(source.state_dict(), tmp_path / "vit.safetensors")
    config = MoEConfig(
        base="vit_tiny_patch16_224",
        pretrained=str(tmp_path / "vit.safetensors"),
        depth=10,
        num_experts=8,
        top_k=2,
        router="vmoe_top_k",
        moe_layers="last2",
        expert_hidden=128,
        global_pool="avg",
        twin=twin,
    )
    net = build_model(config, 2, 64)
    assert len(net.blocks) == 10
    assert torch.equal(net.blocks[9].attn.qkv.weight, source.blocks[9].attn.qkv.weight)
    layers = moe_layers(net)
    assert [(layer.layer_index, layer.experts.fc1.out_features) for layer in layers] == (
        [] if twin else [(7, 128), (9, 128)]
    )
    if twin:
        assert torch.equal(net.blocks[9].mlp.fc1.weight, source.blocks[9].mlp.fc1.weight)
    again = build_model(config, 2, 64, load_pretrained=False)
    assert {name: each.shape for name, each in again.state_dict().items()} == {
        name: each.shape for name, each in net.state_dict().items()
    }


def _sizes(name: str, small: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Of the tests, since a file says no size."""
    if name != "vit_tiny_patch16_224":
        return given
    return {
        **{key: small[key] for key in ("patch_size", "embed_dim", "num_heads")},
        "depth": 12,
        **given,
    }


def test_pretrained_weights_of_a_depth(tmp_path: Path) -> None:
    """By folder, as `fit --pretrained FOLDER --model.arch.depth 2` asks for it."""
    save_model(describe(timm.create_model("vit_tiny_patch16_224", **SMALL)), tmp_path)
    assert len(create_from(tmp_path, depth=2).blocks) == 2
    assert len(create_from(tmp_path, depth=2, load_weights=False).blocks) == 2
