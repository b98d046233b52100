"""Layer-wise learning rates are those that a reader computes by hand, and what is frozen does not move."""

import copy
import math
from typing import Any

import lightning as L
import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

import moevision
from moevision.models.config import MoEConfig
from moevision.train.optim import (
    OptimizerConfig,
    build_optimizer,
    freeze_parameters,
    parameter_groups,
)
from moevision.train.task import ClassificationTask

LR, DECAY = 0.01, 0.5
# test_vit_moe: depth 4, MoE in blocks 1 and 3, a convolutional stem with BatchNorm.
DEPTH = 4


def tiny(name: str = "test_vit_moe", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **options)


def rates(net: nn.Module, config: OptimizerConfig) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every parameter that is optimized, by name."""
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    found = {}
    for group in parameter_groups(net, config):
        for parameter in group["params"]:
            assert names[id(parameter)] not in found, "a parameter is in one group only"
            found[names[id(parameter)]] = (group.get("lr", config.lr), group["weight_decay"])
    return found


def test_layer_decay_by_hand():
    """Classifier 1, block 3 DECAY, ..., block 0 DECAY⁴, embedding DECAY⁵; experts and routers go with their block."""
    found = rates(tiny(), OptimizerConfig(lr=LR, layer_decay=DECAY))
    expected = {
        "head.weight": LR,
        "fc_norm.weight": LR,  # after pooling, so no part of the last block
        "blocks.3.mlp.experts.fc1.weight": LR * 0.5,
        "blocks.3.mlp.experts.fc2.bias": LR * 0.5,
        "blocks.3.attn.qkv.weight": LR * 0.5,
        "blocks.2.mlp.fc1.weight": LR * 0.25,
        "blocks.1.mlp.experts.fc1.weight": LR * 0.125,
        "blocks.1.mlp.router.weight": LR * 0.125,
        "blocks.0.norm1.weight": LR * 0.0625,
        "pos_embed": LR * 0.03125,
        "patch_embed.backbone.0.conv.weight": LR * 0.03125,
    }
    assert {name: found[name][0] for name in expected} == pytest.approx(expected)
    assert set(found) == {name for name, _ in tiny().named_parameters()}


def test_a_norm_before_pooling_belongs_to_the_last_block():
    """The class-token ViT has `norm` where test_vit_moe has `fc_norm`; a distilled DeiT has two heads."""
    net = tiny("deit_tiny_distilled_patch16_224", img_size=32, depth=2)
    found = rates(net, OptimizerConfig(lr=LR, layer_decay=DECAY))
    assert found["norm.weight"][0] == found["blocks.1.mlp.fc1.weight"][0] == LR * 0.5
    assert found["head.weight"][0] == found["head_dist.weight"][0] == LR
    assert found["dist_token"][0] == LR * DECAY**3


@pytest.mark.parametrize("layer_decay", [None, DECAY])
def test_weight_decay_spares_biases_norms_and_embeddings(layer_decay):
    found = rates(tiny(), OptimizerConfig(lr=LR, weight_decay=0.1, layer_decay=layer_decay))
    for name, parameter in tiny().named_parameters():
        spared = parameter.ndim <= 1 or name.endswith(".bias") or name == "pos_embed"
        assert found[name][1] == (0.0 if spared else 0.1), name
    assert tiny().blocks[1].mlp.experts.fc1.bias.ndim == 2, "packed biases are matrices"


@pytest.mark.parametrize("layer_decay", [None, DECAY])
def test_every_group_follows_the_one_cycle_schedule(layer_decay):
    """OneCycleLR rises from peak / 25 along a cosine; at the end of the warm-up each group is at its own peak."""
    config = OptimizerConfig(lr=LR, warmup_fraction=0.2, layer_decay=layer_decay)
    optimizer, schedule = build_optimizer(tiny(), config, total_steps=11)
    peaks = [group["max_lr"] for group in optimizer.param_groups]
    assert max(peaks) == peaks[0] == LR, "the first group is the one that reports show"
    assert min(peaks) == pytest.approx(LR if layer_decay is None else LR * DECAY ** (DEPTH + 1))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
        [peak / 25 for peak in peaks]
    )
    warmup_end = 0.2 * 11 - 1  # in steps, as torch places it
    optimizer.step()
    schedule.step()
    share = (1 - math.cos(math.pi * 1 / warmup_end)) / 2
    expected = [peak / 25 + (peak - peak / 25) * share for peak in peaks]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)


@pytest.mark.parametrize("warmup_fraction", [0.0, 0.05, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("total_steps", range(1, 13))
def test_any_number_of_steps_has_a_schedule(total_steps, warmup_fraction):
    """It ends where it should, no rate is above the peak, and something is learned."""
    net = nn.Linear(1, 1)
    net.no_weight_decay = set  # type: ignore[assignment]
    config = OptimizerConfig(lr=LR, warmup_fraction=warmup_fraction)
    optimizer, schedule = build_optimizer(net, config, total_steps=total_steps)
    rates = []
    for _ in range(total_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert all(0 < rate <= LR * (1 + 1e-9) for rate in rates)
    assert max(rates) >= LR / 25 * (1 - 1e-9)
    if warmup_fraction * total_steps == 1 < total_steps:  # the first step is the whole warm-up
        assert rates[0] == pytest.approx(LR)
    if total_steps > 1:
        assert rates[-1] == pytest.approx(LR / 25 / 1e4), "the last step's rate is next to nothing"


def learning(net: nn.Module) -> set[str]:
    return {name for name, parameter in net.named_parameters() if parameter.requires_grad}


def test_what_is_frozen_neither_learns_nor_is_optimized():
    for freeze, learns in {
        2: ("blocks.2", "blocks.3", "fc_norm", "head"),
        0: ("blocks", "fc_norm", "head"),
        None: ("",),
        "all_but_head": ("head",),
        "all_but_experts": ("head", "blocks.1.mlp", "blocks.3.mlp"),
    }.items():
        net = freeze_parameters(tiny(), freeze)
        expected = {name for name, _ in net.named_parameters() if name.startswith(learns)}
        assert learning(net) == expected
        for layer_decay in (None, DECAY):
            assert set(rates(net, OptimizerConfig(layer_decay=layer_decay))) == expected
    distilled = freeze_parameters(
        tiny("deit_tiny_distilled_patch16_224", img_size=32, depth=2), "all_but_head"
    )
    assert learning(distilled) == {
        f"{head}.{part}" for head in ("head", "head_dist") for part in ("weight", "bias")
    }


def one_step(config: OptimizerConfig) -> tuple[dict[str, torch.Tensor], ClassificationTask]:
    """State before, and the task after one optimizer step on noise."""
    L.seed_everything(0, verbose=False)
    task = ClassificationTask(
        arch=MoEConfig(name="test_vit_moe"), optim=config, num_classes=3, image_size=32
    )
    before = {name: value.clone() for name, value in task.net.state_dict().items()}
    optimizer, _ = build_optimizer(task.net, config, total_steps=4)
    task.train()
    loss = task._cross_entropy(task.net(torch.randn(8, 3, 32, 32)), torch.arange(8) % 3)
    loss.backward()
    optimizer.step()
    return before, task


def test_a_frozen_stem_keeps_weights_and_statistics():
    """BatchNorm of the stem would drift with every batch, though its weights are frozen; train() must not undo it."""
    before, task = one_step(OptimizerConfig(lr=LR, freeze="all_but_experts"))
    moved = {
        name
        for name, value in task.net.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert moved <= {
        name for name in before if name.startswith(("head", "blocks.1.mlp", "blocks.3.mlp"))
    }
    assert "blocks.1.mlp.experts.fc1.weight" in moved
    assert not any("running" in name for name in moved)
    assert task.net.blocks[0].training, "dropout and stochastic depth stay as configured"
    before, task = one_step(OptimizerConfig(lr=LR))
    after = task.net.state_dict()
    assert not torch.equal(
        after["patch_embed.backbone.0.bn.running_mean"],
        before["patch_embed.backbone.0.bn.running_mean"],
    )


def models_with_packed_biases() -> list[nn.Module]:
    """Under a registered name, converted, and a copy of that."""
    converted = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    moevision.convert_to_moe(converted, "all", num_experts=4)
    return [tiny(), converted, copy.deepcopy(converted)]


@pytest.mark.parametrize("layer_decay", [None, DECAY])
def test_timms_optimizers_spare_packed_biases(layer_decay):
    """They are [E, out], which timm's layer-wise groups take for weights unless the model names them."""
    for net in models_with_packed_biases():
        groups = create_optimizer_v2(
            net, "adamw", weight_decay=0.1, layer_decay=layer_decay
        ).param_groups
        decayed = {id(p) for group in groups for p in group["params"] if group["weight_decay"]}
        for name, parameter in net.named_parameters():
            spared = (
                parameter.ndim <= 1 or name.endswith(".bias") or name in ("pos_embed", "cls_token")
            )
            assert (id(parameter) in decayed) is not spared, name
