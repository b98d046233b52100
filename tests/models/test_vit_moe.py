"""The models keep timm's contract and reduce to timm's ViT."""

import copy
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import timm
import torch
from timm.layers import Mlp
from torch import nn

import moevision
from moevision import VisionTransformerMoE, convert_to_moe, dense_twin, forward_routing
from moevision.efficiency import measure_cost, parameter_counts
from moevision.layers import MoEMlp, moe_layers
from moevision.models import moe_layer_indices
from moevision.models.config import MoEConfig
from moevision.models.vit_moe import STEMS


def images(size: int = 32, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_zero_moe_layers_is_timms_vit() -> None:
    """Same names, same random numbers, same output as the timm class with the same arguments."""
    size = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 5,
    }
    torch.manual_seed(0)
    ours = VisionTransformerMoE(moe_layers=[], **size).eval()
    torch.manual_seed(0)
    theirs = timm.models.VisionTransformer(**size).eval()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(ours(images()), theirs(images()))


def test_one_expert_is_the_dense_vit() -> None:
    vit = timm.create_model("test_vit", img_size=64, num_classes=3).eval()
    expected = vit(images(64))
    moe = convert_to_moe(vit, "all", num_experts=1, top_k=1, copy_weights=True)
    assert len(moe_layers(moe)) == 6
    torch.testing.assert_close(moe(images(64)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit4", "deit_tiny_patch16_224"])
def test_copies_leave_the_dense_output_unchanged(name: str) -> None:
    vit = timm.create_model(name, img_size=64, num_classes=3).eval()
    expected = vit(images(64))
    moe = convert_to_moe(vit, num_experts=4, top_k=2, copy_weights=True)
    torch.testing.assert_close(moe(images(64)), expected, rtol=1e-5, atol=1e-5)


def test_placements() -> None:
    """every2 = 1, 3, 5, ...; last2 = the last two of those, not the last two blocks."""
    assert moe_layer_indices("every2", 8) == [1, 3, 5, 7]
    assert moe_layer_indices("last2", 8) == [5, 7]
    assert moe_layer_indices("last2", 7) == [3, 5]
    assert moe_layer_indices([4, 0, 4], 6) == [0, 4]


def test_micro_model_has_the_documented_size() -> None:
    """D 192, depth 6: 12 D² per block = 2.65 M without biases; 3 MoE layers add 6 idle experts of 2·192·384 each."""
    model = timm.create_model(
        "vit_moe_micro_patch4_32", num_classes=10, stem="patch", class_token=False
    )
    total, active = parameter_counts(model)
    assert active == pytest.approx(6 * 12 * 192**2, rel=0.02)
    assert total - active == 3 * 6 * (2 * 192 * 384 + 384 + 192)


@pytest.mark.parametrize(("match", "hidden"), [("active_flops", 2 * 64), ("total_params", 4 * 64)])
def test_dense_twin(match: str, hidden: int) -> None:
    """test_vit_moe: D 32, mlp_ratio 4, K 2 -> one expert has 64 hidden units; E = 4."""
    model = timm.create_model("test_vit_moe", num_classes=3)
    twin = dense_twin(model, match)
    assert [type(block.mlp) for block in twin.blocks] == [Mlp] * 4
    assert [block.mlp.fc1.out_features for block in twin.blocks] == [128, hidden, 128, hidden]
    assert torch.equal(twin.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)
    assert not moe_layers(twin)
    assert len(moe_layers(model)) == 2


@pytest.mark.parametrize("expert_drop", [None, 0.4])
def test_a_twin_has_the_dropout_of_its_model_and_not_that_of_experts(
    expert_drop: float | None,
) -> None:
    model = timm.create_model("test_vit_moe", proj_drop_rate=0.1, expert_drop=expert_drop)
    assert moe_layers(model)[0].experts.drop.p == (expert_drop or 0.1)
    assert {(block.mlp.drop1.p, block.mlp.drop2.p) for block in dense_twin(model).blocks} == {
        (0.1, 0.1)
    }


def test_twins_match_what_they_say() -> None:
    """Equal FLOPs apart from the routers; equal parameters apart from the routers and E - 1 output biases."""
    model = timm.create_model("test_vit_moe", num_classes=3)
    cost = measure_cost(model, 32)
    active = measure_cost(dense_twin(model, "active_flops"), 32)
    stored = measure_cost(dense_twin(model, "total_params"), 32)
    assert cost.flops_per_image == active.flops_per_image
    assert cost.router_flops_per_image == 2 * (2 * 16 * 32 * 4)  # layers x 2 · tokens · D · E
    routers = sum(p.numel() for layer in moe_layers(model) for p in layer.router.parameters())
    assert cost.total_parameters - routers - 2 * 3 * 32 == stored.total_parameters


def test_a_head_with_a_token_of_its_own_is_counted() -> None:
    """SigLIP pools by attention, whose query is a parameter: beside the model's, 2 D² for it and 2 N · 2 D² for keys.

    The rest of that head: 2 · 2 N D of attention, 2 D² behind it, 2 · 2 D · 4 D of its MLP.
    """
    small = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 3,
    }
    n, d = 16, 32
    by_attention, by_mean = (
        measure_cost(convert_to_moe(timm.create_model(name, **given, **small)), 32).flops_per_image
        for name, given in (
            ("vit_base_patch16_siglip_224", {}),
            ("vit_base_patch16_siglip_gap_224", {}),
        )
    )
    head = 2 * d * d + 2 * n * 2 * d * d + 2 * 2 * n * d + 2 * d * d + 2 * 2 * d * 4 * d
    assert by_attention - by_mean == head


def test_flops_are_the_closed_form() -> None:
    """Plain patches, N tokens, depth L: per block 2 N (4 D² + 2 D · 4 D) + 4 N² D; patches 2 N P² 3 D; head 2 D C."""
    model = timm.create_model("test_vit_moe", stem="patch", num_classes=10)
    n, d, depth, patch = 16, 32, 4, 8
    block = 2 * n * (4 * d * d + 2 * d * 4 * d) + 4 * n * n * d
    assert (
        measure_cost(model, 32).flops_per_image
        == depth * block + 2 * n * patch * patch * 3 * d + 2 * d * 10
    )


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("test_vit_moe", {"num_classes": 3}, 32),
        ("test_vit_moe", {"num_classes": 3, "num_experts": 2, "top_k": 1, "img_size": 64}, 64),
        (
            "test_vit_moe",
            {"num_classes": 3, "router": "vmoe_top_k", "moe_layers": "last2", "stem": "patch"},
            32,
        ),
        ("test_vit_moe", {"num_classes": 3, "twin": "total_params"}, 32),
        (
            "vit_moe",
            {"base": "test_vit", "num_classes": 4, "img_size": 64, "moe_layers": [0, 5]},
            64,
        ),
        (
            "vit_moe",
            {
                "base": "deit_tiny_patch16_224",
                "num_classes": 4,
                "img_size": 32,
                "twin": "active_flops",
            },
            32,
        ),
    ],
)
def test_saved_models_load_bit_equal(
    name: str, options: dict[str, object], size: int, tmp_path: Path
) -> None:
    model = timm.create_model(name, **options).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(model(images(size)), loaded(images(size)))
    assert loaded.moe_config == model.moe_config


def test_a_model_converted_in_python_saves_and_loads(tmp_path: Path) -> None:
    vit = timm.create_model("test_vit", img_size=64, num_classes=3)
    model = convert_to_moe(vit, "last2", num_experts=4, router="vmoe_top_k").eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(model(images(64)), loaded(images(64)))


def test_timm_contract() -> None:
    model = timm.create_model("test_vit_moe", num_classes=3)
    features = timm.create_model("test_vit_moe", features_only=True)(images())
    assert [feature.shape[1:] for feature in features] == [(32, 4, 4)] * 3
    model.reset_classifier(7)
    assert model(images()).shape == (2, 7)
    model.set_input_size(64)
    assert model(images(64)).shape == (2, 7)
    _, routings = forward_routing(model, images(64))
    assert routings[0].grid == (8, 8)
    assert torch.equal(copy.deepcopy(model).eval()(images(64)), model.eval()(images(64)))
    assert model.forward_intermediates(images(64))[0].shape == (2, 64, 32)
    layers = model.group_matcher(coarse=False)
    assert layers["blocks"]


@pytest.mark.parametrize(
    "name", ["test_vit_moe", "vit_moe_tiny_patch16_224", "vit_moe_base_patch16_224"]
)
def test_meta_device(name: str) -> None:
    model = timm.create_model(name, device="meta")
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


def test_names_are_registered() -> None:
    names = set(timm.list_models("*vit_moe*", module="vit_moe"))
    expected = {"test_vit_moe", "vit_moe", "vit_moe_micro_patch4_32"}
    expected |= {
        f"vit_moe_hybrid_{size}"
        for size in ("patch4_32", "patch8_32", "patch16_128", "wide_patch4_32")
    }
    expected |= {f"vit_moe_{size}_patch16_224" for size in ("tiny", "small", "base")}
    assert names == expected


def test_the_conv_stem_keeps_the_patch_grid() -> None:
    for patch_size, size in ((4, 32), (8, 64), (16, 64)):
        model = timm.create_model("test_vit_moe", stem="conv", patch_size=patch_size, img_size=size)
        assert model.patch_embed(images(size)).shape == (2, (size // patch_size) ** 2, 32)


def test_the_command_line_takes_every_stem() -> None:
    """It refused those of the hybrids."""
    (taken, _) = get_args(get_type_hints(MoEConfig)["stem"])
    assert set(get_args(taken)) == {"patch", *STEMS}


@pytest.mark.parametrize("stem", ["stages", "wide_stages"])
@pytest.mark.parametrize(("patch_size", "size"), [(4, 32), (8, 32), (16, 64), (32, 128)])
def test_the_stages_keep_the_patch_grid(stem: str, patch_size: int, size: int) -> None:
    """When the pixels of a patch change, the centre of the tokens that move lies in that patch."""
    model = (
        timm.create_model("test_vit_moe", stem=stem, patch_size=patch_size, img_size=size)
        .double()
        .eval()
    )
    side = size // patch_size
    row, column = side - 2, 1
    x = images(size, count=16).double()
    tokens = model.patch_embed(x)
    assert tokens.shape == (16, side**2, 32)
    x[:, :, row * patch_size : (row + 1) * patch_size, patch_size : 2 * patch_size] += 1
    moved = (model.patch_embed(x) - tokens).abs().mean((0, 2)).view(side, side)
    places = torch.arange(side).double()
    centre = torch.stack([moved.sum(1) @ places, moved.sum(0) @ places]) / moved.sum()
    assert centre.round().tolist() == [row, column]


@pytest.mark.parametrize(
    ("stem", "widths"), [("stages", [8, 16, 32]), ("wide_stages", [16, 32, 32])]
)
def test_stages_are_plain_convolutions(stem: str, widths: list[int]) -> None:
    """By hand, from the weights: convolution, BatchNorm, GELU; pooling; residual pairs before or after pooling."""
    model = timm.create_model("test_vit_moe", stem=stem, patch_size=4).double().eval()
    for norm in (
        module for module in model.patch_embed.modules() if isinstance(module, nn.BatchNorm2d)
    ):
        nn.init.uniform_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)

    def conv(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        y = nn.functional.conv2d(x, layer.conv.weight, padding=1)
        scale = layer.bn.weight / (layer.bn.running_var + layer.bn.eps).sqrt()
        y = (y - layer.bn.running_mean[:, None, None]) * scale[:, None, None] + layer.bn.bias[
            :, None, None
        ]
        return nn.functional.gelu(y)

    def residual(y: torch.Tensor, pair: nn.Module) -> torch.Tensor:
        return y + conv(conv(y, pair.conv1), pair.conv2)

    pool = nn.MaxPool2d(2)
    first, second, third = model.patch_embed.backbone
    x = images().double()
    y = pool(conv(x, first[0]))
    if stem == "stages":
        y = conv(pool(residual(conv(y, second[0]), second[1])), third[0])
    else:
        y = residual(pool(conv(y, second[0])), second[2])
        y = residual(conv(y, third[0]), third[1])
    assert [stage[0].conv.out_channels for stage in (first, second, third)] == widths
    torch.testing.assert_close(model.patch_embed(x), y.flatten(2).mT)


@pytest.mark.parametrize(
    "name",
    [
        "vit_moe_hybrid_patch4_32",
        "vit_moe_hybrid_patch8_32",
        "vit_moe_hybrid_patch16_128",
        "vit_moe_hybrid_wide_patch4_32",
    ],
)
def test_hybrids_keep_timms_contract(name: str) -> None:
    """Features, other sizes, another head, copies, saved weights; the twin has no experts and as many FLOPs."""
    size = timm.get_pretrained_cfg(name).input_size[-1]
    model = timm.create_model(name, num_classes=10, router="vmoe_top_k").eval()
    patch, width = size // model.patch_embed.grid_size[0], model.embed_dim
    x = images(size)
    tokens = (size // patch) ** 2
    assert model.forward_features(x).shape == (2, tokens, width)
    features = timm.create_model(name, features_only=True, out_indices=(0, 1)).eval()(x)
    assert [feature.shape for feature in features] == [(2, width, size // patch, size // patch)] * 2
    other = timm.create_model(name, num_classes=10, router="vmoe_top_k").eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))
    cost = measure_cost(model, size)
    assert (
        cost.flops_per_image
        == measure_cost(dense_twin(model, "active_flops"), size).flops_per_image
    )
    model.set_input_size(2 * size)
    model.reset_classifier(3)
    assert model(images(2 * size)).shape == (2, 3)
    assert forward_routing(model, images(2 * size))[1][0].grid == (
        2 * size // patch,
        2 * size // patch,
    )


def test_predictions_do_not_depend_on_batch_mates() -> None:
    """The whole model, stem and all, in float64; routers moved off their zero start so that choices are real."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit_moe", num_classes=3).double().eval()
    for layer in moe_layers(model):
        nn.init.normal_(layer.router.weight)
    x = images(count=8).double()
    torch.testing.assert_close(model(x)[5:6], model(x[5:6]), rtol=0, atol=1e-13)


def test_public_names() -> None:
    assert isinstance(moevision.MoEMlp(8), MoEMlp)
    assert set(moevision.__all__) <= set(dir(moevision))
