"""The models keep timm's contract and reduce to timm's ViT."""

import copy
import math
from typing import get_args, get_type_hints

import pytest
import timm
import torch
from timm.layers import Mlp
from torch import nn

from moevision import VisionTransformerMoE, convert_to_moe, dense_twin, forward_routing
from moevision.efficiency import measure_cost, parameter_counts
from moevision.layers import moe_layers
from moevision.models import moe_layer_indices
from moevision.models.config import MoEConfig
from moevision.models.vit_moe import STEMS, checkpoint_blocks
from tests.shared import SMALL_VIT, noise_images


def test_zero_moe_layers_is_timms_vit():
    """Same names, same random numbers, same output as the timm class with the same arguments."""
    torch.manual_seed(0)
    ours = VisionTransformerMoE(moe_layers=[], **SMALL_VIT).eval()
    torch.manual_seed(0)
    theirs = timm.models.VisionTransformer(**SMALL_VIT).eval()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(ours(noise_images()), theirs(noise_images()))


def test_placements():
    """every2 = 1, 3, 5, ...; last2 = the last two of those, not the last two blocks."""
    assert moe_layer_indices("every2", 8) == [1, 3, 5, 7]
    assert moe_layer_indices("last2", 8) == [5, 7]
    assert moe_layer_indices("last2", 7) == [3, 5]
    assert moe_layer_indices([4, 0, 4], 6) == [0, 4]


def test_micro_model_has_the_documented_size():
    """D 192, depth 6: 12 D² per block = 2.65 M without biases; 3 MoE layers add 6 idle experts of 2·192·384 each."""
    model = timm.create_model(
        "vit_moe_micro_patch4_32", num_classes=10, stem="patch", class_token=False
    )
    total, active = parameter_counts(model)
    assert active == pytest.approx(6 * 12 * 192**2, rel=0.02)
    assert total - active == 3 * 6 * (2 * 192 * 384 + 384 + 192)


@pytest.mark.parametrize(("match", "hidden"), [("active_flops", 2 * 64), ("total_params", 4 * 64)])
def test_dense_twin(match, hidden):
    """test_vit_moe: D 32, mlp_ratio 4, K 2 -> one expert has 64 hidden units; E = 4."""
    model = timm.create_model("test_vit_moe", num_classes=3)
    twin = dense_twin(model, match)
    assert [type(block.mlp) for block in twin.blocks] == [Mlp] * 4
    assert [block.mlp.fc1.out_features for block in twin.blocks] == [128, hidden, 128, hidden]
    assert torch.equal(twin.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)
    assert not moe_layers(twin)
    assert len(moe_layers(model)) == 2


@pytest.mark.parametrize("expert_drop", [None, 0.4])
def test_a_twin_has_the_dropout_of_its_model_and_not_that_of_experts(expert_drop):
    model = timm.create_model("test_vit_moe", proj_drop_rate=0.1, expert_drop=expert_drop)
    assert moe_layers(model)[0].experts.drop.p == (expert_drop or 0.1)
    assert {(block.mlp.drop1.p, block.mlp.drop2.p) for block in dense_twin(model).blocks} == {
        (0.1, 0.1)
    }


def test_a_head_with_a_token_of_its_own_is_counted():
    """SigLIP pools by attention, whose query is a parameter: beside the model's, 2 D² for it and 2 N · 2 D² for keys.

    The rest of that head: 2 · 2 N D of attention, 2 D² behind it, 2 · 2 D · 4 D of its MLP.
    """
    n, d = 16, 32
    by_attention, by_mean = (
        measure_cost(
            convert_to_moe(timm.create_model(name, **given, **SMALL_VIT)), 32
        ).flops_per_image
        for name, given in (
            ("vit_base_patch16_siglip_224", {}),
            ("vit_base_patch16_siglip_gap_224", {}),
        )
    )
    head = 2 * d * d + 2 * n * 2 * d * d + 2 * 2 * n * d + 2 * d * d + 2 * 2 * d * 4 * d
    assert by_attention - by_mean == head


@pytest.mark.parametrize(
    "name", ["test_vit_moe", "vit_moe_tiny_patch16_224", "vit_moe_base_patch16_224"]
)
def test_meta_device(name):
    model = timm.create_model(name, device="meta")
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


def test_names_are_registered():
    names = set(timm.list_models("*vit_moe*", module="vit_moe"))
    expected = {"test_vit_moe", "vit_moe", "vit_moe_micro_patch4_32", *HYBRIDS}
    expected |= {f"vit_moe_{size}_patch16_224" for size in ("tiny", "small", "base")}
    assert names == expected


def test_the_conv_stem_keeps_the_patch_grid():
    for patch_size, size in ((4, 32), (8, 64), (16, 64)):
        model = timm.create_model("test_vit_moe", stem="conv", patch_size=patch_size, img_size=size)
        assert model.patch_embed(noise_images(2, size)).shape == (2, (size // patch_size) ** 2, 32)


def test_the_command_line_takes_every_stem():
    """It refused those of the hybrids."""
    (taken, _) = get_args(get_type_hints(MoEConfig)["stem"])
    assert set(get_args(taken)) == {"patch", *STEMS}


# Strides of 2 look 1.5 px up and left of a patch's centre: of 4 px a third, so conv_patch begins at 8.
GRIDS = [(stem, 4, 32) for stem in ("stages", "wide_stages")]
GRIDS += [
    (stem, patch_size, 4 * patch_size)
    for stem in ("conv_patch", "stages", "wide_stages")
    for patch_size in (8, 16, 32)
]


@pytest.mark.parametrize(("stem", "patch_size", "size"), GRIDS)
def test_the_stages_keep_the_patch_grid(stem, patch_size, size):
    """When the pixels of a patch change, the centre of the tokens that move lies in that patch."""
    model = (
        timm.create_model("test_vit_moe", stem=stem, patch_size=patch_size, img_size=size)
        .double()
        .eval()
    )
    side = size // patch_size
    row, column = side - 2, 1
    x = noise_images(16, size).double()
    tokens = model.patch_embed(x)
    assert tokens.shape == (16, side**2, 32)
    x[:, :, row * patch_size : (row + 1) * patch_size, patch_size : 2 * patch_size] += 1
    moved = (model.patch_embed(x) - tokens).abs().mean((0, 2)).view(side, side)
    places = torch.arange(side).double()
    centre = torch.stack([moved.sum(1) @ places, moved.sum(0) @ places]) / moved.sum()
    assert centre.round().tolist() == [row, column]


def test_patches_of_convolutions_by_hand():
    """conv_patch: two 3x3 convolutions of stride 2, each with BatchNorm and GELU; then squares of what they made."""
    model = timm.create_model("test_vit_moe", stem="conv_patch", patch_size=8).double().eval()
    y = x = noise_images().double()
    for layer in model.patch_embed.backbone:
        y = nn.functional.conv2d(y, layer.conv.weight, stride=2, padding=1)
        y = nn.functional.gelu(
            y / math.sqrt(1 + layer.bn.eps)
        )  # its running mean is 0, the variance 1
    assert y.shape == (2, 16, 8, 8)  # D / 2 channels, a quarter of the 32 px
    projection = model.patch_embed.proj
    y = nn.functional.conv2d(y, projection.weight, projection.bias, stride=2)
    torch.testing.assert_close(model.patch_embed(x), y.flatten(2).mT)


@pytest.mark.parametrize(
    ("stem", "widths"), [("stages", [8, 16, 32]), ("wide_stages", [16, 32, 32])]
)
def test_stages_are_plain_convolutions(stem, widths):
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
    x = noise_images().double()
    y = pool(conv(x, first[0]))
    if stem == "stages":
        y = conv(pool(residual(conv(y, second[0]), second[1])), third[0])
    else:
        y = residual(pool(conv(y, second[0])), second[2])
        y = residual(conv(y, third[0]), third[1])
    assert [stage[0].conv.out_channels for stage in (first, second, third)] == widths
    torch.testing.assert_close(model.patch_embed(x), y.flatten(2).mT)


SIZES = ("patch4_32", "patch8_32", "patch16_128", "wide_patch4_32")
HYBRIDS = [f"vit_moe_hybrid_{size}" for size in SIZES]


@pytest.mark.parametrize("name", ["test_vit_moe", *HYBRIDS])
def test_timms_contract_is_kept(name):
    """Features, other sizes, another head, copies; the twin has no experts and as many FLOPs."""
    size = timm.get_pretrained_cfg(name).input_size[-1]
    model = timm.create_model(name, num_classes=10, router="vmoe_top_k").eval()
    side, width = model.patch_embed.grid_size[0], model.embed_dim
    x = noise_images(2, size)
    assert model.forward_features(x).shape == (2, side**2, width)
    assert model.forward_intermediates(x)[0].shape == (2, side**2, width)
    features = timm.create_model(name, features_only=True, out_indices=(0, 1)).eval()(x)
    assert [feature.shape for feature in features] == [(2, width, side, side)] * 2
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert model.group_matcher(coarse=False)["blocks"]
    twin = measure_cost(dense_twin(model, "active_flops"), size)
    assert measure_cost(model, size).flops_per_image == twin.flops_per_image
    model.set_input_size(2 * size)
    model.reset_classifier(3)
    assert model(noise_images(2, 2 * size)).shape == (2, 3)
    assert forward_routing(model, noise_images(2, 2 * size))[1][0].grid == (2 * side, 2 * side)


# ---- checkpointed blocks


def trained(net: nn.Module) -> tuple[list[torch.Tensor], int]:
    """Gradients of one step, routers' noise and dropped patches included; and how often block 1 computed."""
    calls = []
    handle = net.blocks[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(1)
    logits, routings = forward_routing(net, torch.randn(4, 3, 32, 32))
    (
        logits.square().mean()
        + torch.stack([routing.probs.square().mean() for routing in routings]).sum()
    ).backward()
    handle.remove()
    return [p.grad for p in net.parameters()], len(calls)


def checkpointed_blocks(net: nn.Module) -> tuple[int, ...]:
    """Indices of the blocks that are computed again in the backward pass."""
    if net.grad_checkpointing:
        return tuple(range(len(net.blocks)))
    return tuple(index for index, block in enumerate(net.blocks) if "forward" in vars(block))


def bytes_for_backward(net: nn.Module, images: torch.Tensor) -> int:
    """Of the tensors that autograd keeps, a storage once; weights don't count."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    kept = []  # held, so that no storage is made anew at the same place
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        net(images)
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    return sum(size for place, size in sizes.items() if place not in weights)


def dropping() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit_moe", proj_drop_rate=0.2, drop_path_rate=0.2).train()


@pytest.mark.parametrize(
    ("blocks", "calls"), [(False, 1), (True, 2), ([1, 2], 2), ([0], 1), ([], 1)]
)
def test_gradients_are_the_same(blocks, calls):
    net = dropping()
    names = list(net.state_dict())
    checkpoint_blocks(net, blocks)
    assert list(net.state_dict()) == names
    assert checkpointed_blocks(net) == (tuple(range(4)) if blocks is True else tuple(blocks or ()))
    found, times = trained(net)
    expected, _ = trained(dropping())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert times == calls


def test_chosen_blocks_keep_less():
    def kept(blocks: bool | list[int]) -> int:
        net = dropping()
        checkpoint_blocks(net, blocks)
        return bytes_for_backward(net, torch.randn(4, 3, 32, 32))

    assert kept(True) == kept([0, 1, 2, 3]) < kept([1, 3]) < kept([1]) < kept(False)


def test_a_copy_computes_with_weights_of_its_own():
    net = dropping().eval()
    checkpoint_blocks(net, [1])
    copied = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(
        copied(torch.ones(1, 3, 32, 32)), torch.zeros_like(copied(torch.ones(1, 3, 32, 32)))
    )
    assert checkpointed_blocks(copied) == (1,)
    checkpoint_blocks(copied, False)
    assert (checkpointed_blocks(copied), checkpointed_blocks(net)) == ((), (1,))
