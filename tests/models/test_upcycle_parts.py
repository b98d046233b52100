"""Experts that share an MLP out among them, and a pretrained model's first blocks: against the dense model itself."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from moevision import UserError
from moevision.layers import moe_layers
from moevision.models.config import MoEConfig, build_model
from moevision.models.io import create_from, describe, first_blocks, load_model, save_model
from moevision.models.upcycle import initial_output_difference, start_routers, upcycle

SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 5,
}  # hidden 128
LEARNED = ["noisy_top_k", "vmoe_top_k", "sigmoid", "bias_balanced", "cosine"]


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


def largest_difference(vit: nn.Module, **options: Any) -> float:
    with torch.no_grad():
        moe = upcycle(vit, layers="all", **options).eval()
        return float((moe(images()) - vit(images())).abs().max())


@pytest.mark.parametrize("router", LEARNED)
@pytest.mark.parametrize(("hidden", "top_k"), [(64, 2), (64, 4), (32, 4)])
def test_whole_groups_compute_the_dense_model(
    vit: nn.Module, router: str, hidden: int, top_k: int
) -> None:
    """Parts of an MLP are summed: exact up to rounding where k is a multiple of their number."""
    options = {"num_experts": 8, "expert_hidden": hidden, "top_k": top_k, "router": router}
    assert largest_difference(vit, **options) < 1e-12


@pytest.mark.parametrize("router", LEARNED)
def test_with_every_expert_chosen_a_layer_is_the_dense_mlp(vit: nn.Module, router: str) -> None:
    """Whatever the gates: those of one group are equal, and all sum to 1."""
    moe = upcycle(vit, layers=[2], num_experts=8, expert_hidden=64, top_k=8, router=router).eval()
    (layer,) = moe_layers(moe)
    tokens = 5 * torch.randn(
        3, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    torch.testing.assert_close(layer(tokens), vit.blocks[2].mlp(tokens), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_k": 3}, {"top_k": 2, "normalize_gates": False}]
)
def test_what_is_not_preserved(vit: nn.Module, options: dict[str, Any]) -> None:
    """Half a group is chosen, or gates that don't sum to 1."""
    assert largest_difference(vit, num_experts=8, expert_hidden=64, **options) > 1e-2


def test_noise_in_training_splits_groups(vit: nn.Module) -> None:
    torch.manual_seed(0)
    moe = upcycle(vit, num_experts=8, expert_hidden=64, top_k=2, layers="all")
    with torch.no_grad():
        assert float((moe.eval()(images()) - vit(images())).abs().max()) < 1e-12
        assert float((moe.train()(images()) - vit(images())).abs().max()) > 1e-3


def test_each_group_divides_all_hidden_units_its_own_way(vit: nn.Module) -> None:
    """By the rows of fc1, which are all different: each once in a group, the same in no two experts."""
    (layer,) = moe_layers(upcycle(vit, layers=[1], num_experts=6, expert_hidden=64, top_k=2))
    dense, experts = vit.blocks[1].mlp, layer.experts
    units = (
        (experts.fc1.weight.unsqueeze(2) == dense.fc1.weight).all(-1).double().argmax(-1)
    )  # [E, H]
    for group in units.view(3, 128):
        assert sorted(group.tolist()) == list(range(128))
    assert len({tuple(sorted(own.tolist())) for own in units}) == 6
    for expert, own in enumerate(units):
        assert torch.equal(experts.fc1.bias[expert], dense.fc1.bias[own])
        assert torch.equal(experts.fc2.weight[expert], 2 * dense.fc2.weight[:, own])
        assert torch.equal(experts.fc2.bias[expert], dense.fc2.bias)
    rows = layer.router.weight
    assert torch.equal(rows[0::2], rows[1::2])
    assert len(rows.unique(dim=0)) == 3


def test_parts_are_shared_out_where_no_number_can_be_read() -> None:
    """`fit` builds a model on the meta device before memory is taken for it."""
    with torch.device("meta"):
        moe = upcycle(
            timm.create_model("vit_tiny_patch16_224", **SMALL),
            num_experts=4,
            expert_hidden=64,
            top_k=2,
        )
    assert all(parameter.is_meta for parameter in moe.parameters())


def test_parts_save_and_load(vit: nn.Module, tmp_path: Path) -> None:
    moe = upcycle(vit, num_experts=4, expert_hidden=64, top_k=2).float().eval()
    save_model(describe(moe), tmp_path)
    loaded = load_model(str(tmp_path)).net
    assert loaded.moe_config["expert_hidden"] == 64
    assert torch.equal(loaded(images().float()), moe(images().float()))


@pytest.mark.parametrize("router", ["vmoe_top_k", "cosine"])
def test_a_cluster_start_keeps_groups_together(vit: nn.Module, router: str) -> None:
    """Four experts are two groups, so two clusters; the first outputs stay those of the dense model."""
    moe = upcycle(
        vit, layers="last2", num_experts=4, expert_hidden=64, top_k=2, router=router
    ).eval()
    before = moe_layers(moe)[0].router.rows.detach().clone()
    shares = start_routers(moe, [images()])
    assert [len(each) for each in shares.values()] == [2, 2]
    assert not torch.equal(moe_layers(moe)[0].router.rows, before)
    assert initial_output_difference(vit, moe, images()).max_logit < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_hidden": 48}, "can't share: use a whole part of it, such as expert_hidden 64"),
        ({"expert_hidden": 256}, "has 128 hidden units"),
        ({"expert_hidden": 64, "num_experts": 7}, "7 experts make no groups of 2"),
        ({"expert_hidden": 64, "router": "hash"}, "has no learned row for each expert"),
        ({"expert_hidden": 64, "router": "expert_choice"}, "has no learned row for each expert"),
        ({"expert_hidden": 64, "router": "soft"}, "has no learned row for each expert"),
    ],
)
def test_experts_that_cannot_share_an_mlp(
    vit: nn.Module, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        upcycle(vit, **{"num_experts": 8, "top_k": 2, **options})


# ---- the first blocks


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


@pytest.mark.parametrize("depth", [0, 5])
def test_a_depth_that_the_model_has_not(vit: nn.Module, depth: int) -> None:
    with pytest.raises(UserError, match="use 1 to 4"):
        upcycle(vit, depth=depth)


def test_what_cannot_be_cut(vit: nn.Module) -> None:
    with pytest.raises(UserError, match="has experts"):
        first_blocks(upcycle(vit), 2)
    with pytest.raises(UserError, match="no list of transformer blocks"):
        first_blocks(timm.create_model("test_resnet"), 2)


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
        expert_hidden=64,
        global_pool="avg",
        twin=twin,
    )
    net = build_model(config, 2, 64)
    assert len(net.blocks) == 10
    assert torch.equal(net.blocks[9].attn.qkv.weight, source.blocks[9].attn.qkv.weight)
    layers = moe_layers(net)
    assert [(layer.layer_index, layer.experts.fc1.out_features) for layer in layers] == (
        [] if twin else [(7, 64), (9, 64)]
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
