"""Every option of the architecture: the model that is trained holds it, as its config.yaml says, or it is refused."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from moevision.config import RouterOptions
from moevision.errors import UserError
from moevision.layers import moe_layers
from moevision.models.config import MoEConfig, build_model
from moevision.models.io import describe, save_model

CAPACITY = {"capacity_factor": 1.5}


class Case(NamedTuple):
    """An option with a value that no model here has by itself, and where a model that holds it has it."""

    name: str
    value: Any
    read: Callable[[Any], Any]
    needs: Mapping[str, Any] = MappingProxyType({})


def layer(net: Any) -> Any:
    return moe_layers(net)[0]


def of_router(name: str, value: Any, **needs: Any) -> Case:
    return Case(name, value, lambda net: getattr(layer(net).router.options, name), needs)


def copies_differ(net: Any) -> bool:
    return not torch.equal(layer(net).experts.fc1.weight[0], layer(net).experts.fc1.weight[1])


def has_weights_of_dense(net: Any) -> bool:
    return torch.equal(
        net.blocks[0].attn.qkv.weight,
        load_file("dense/model.safetensors")["blocks.0.attn.qkv.weight"],
    )


# `test_vit_moe`: patches of 8 px, D 32, 2 heads, 4 blocks, MLPs of 128, convolutional stem, average pooling, 4 experts
# of which 2 are active (64 wide). `test_vit`: patches of 16 px, D 64, 2 heads, 6 blocks, MLPs of 192, a class token.
CASES = [
    Case("name", "vit_moe_micro_patch4_32", lambda net: net.pretrained_cfg["architecture"]),
    Case("name", "test_vit_moe", lambda net: net.pretrained_cfg["architecture"]),
    Case("base", "test_vit", lambda net: net.embed_dim == 64 and "test_vit", {"name": "vit_moe"}),
    Case("pretrained", "dense", lambda net: has_weights_of_dense(net) and "dense", {"name": None}),
    Case("num_experts", 6, lambda net: layer(net).experts.num_experts),
    Case("num_experts", [3, 6], lambda net: [each.experts.num_experts for each in moe_layers(net)], {"depth": 4}),
    Case("top_k", 3, lambda net: layer(net).router.top_k),
    Case("router", "cosine", lambda net: layer(net).router_name),
    Case("moe_layers", [0, 2], lambda net: [each.layer_index for each in moe_layers(net)]),
    Case("expert_hidden", 96, lambda net: layer(net).experts.fc1.out_features),
    Case("backend", "loop", lambda net: layer(net).experts.backend),
    Case("twin", "total_params", lambda net: not moe_layers(net) and net.blocks[1].mlp.fc1.out_features == 4 * 64
         and "total_params"),
    Case("stem", "stages", lambda net: type(net.patch_embed.backbone).__name__.lower()),
    Case("stem", "patch", lambda net: hasattr(net.patch_embed, "proj") and type(net.patch_embed).__name__[:5].lower()),
    Case("patch_size", 16, lambda net: 32 // net.patch_embed.grid_size[0]),
    Case("embed_dim", 48, lambda net: net.blocks[0].attn.qkv.in_features),
    Case("depth", 2, lambda net: len(net.blocks)),
    Case("num_heads", 4, lambda net: net.blocks[0].attn.num_heads),
    Case("mlp_ratio", 2.0, lambda net: net.blocks[0].mlp.fc1.out_features / net.embed_dim),
    Case("drop_path_rate", 0.1, lambda net: round(net.blocks[-1].drop_path1.drop_prob, 6)),
    Case("proj_drop_rate", 0.2, lambda net: net.blocks[0].attn.proj_drop.p),
    Case("patch_drop_rate", 0.3, lambda net: net.patch_drop.prob),
    Case("global_pool", "avg", lambda net: net.global_pool),
    Case("global_pool", "token", lambda net: net.global_pool),
    Case("num_shared_experts", 1, lambda net: layer(net).num_shared_experts),
    Case("expert_drop", 0.4, lambda net: layer(net).experts.drop.p),
    Case("upcycle_reinit", 0.5, lambda net: copies_differ(net) and 0.5),
    of_router("noise", "fixed"),
    of_router("route_by", "image"),
    of_router("normalize_gates", True, router="vmoe_top_k"),
    of_router("capacity_factor", 1.5),
    of_router("eval_capacity_factor", 2.5),
    of_router("batch_priority", True, **CAPACITY),
    of_router("capacity_group", "batch", **CAPACITY),
    Case("bias_rate", 0.01, lambda net: layer(net).router.bias_rate, {"router": "bias_balanced"}),
    Case("slots_per_expert", 3, lambda net: layer(net).router.mu.shape[-1], {"router": "soft"}),
]  # fmt: skip
STARTS: dict[str, dict[str, Any]] = {
    "scratch": {"name": "test_vit_moe"},
    "dense": {"pretrained": "dense"},
    "moe": {"pretrained": "moe"},
}
SIZES = {
    "name",
    "base",
    "twin",
    "stem",
    "patch_size",
    "embed_dim",
    "num_heads",
    "mlp_ratio",
    "num_shared_experts",
}
EXPERTS = {
    "num_experts",
    "top_k",
    "router",
    "moe_layers",
    "expert_hidden",
    "backend",
    "expert_drop",
}
REFUSED = {
    "scratch": {"upcycle_reinit", "global_pool"},  # this one has no class token
    "dense": SIZES | {"expert_hidden"},  # copies are as wide as their MLP
    "moe": SIZES
    | EXPERTS
    | {"depth", "global_pool", "upcycle_reinit"}
    | {field.name for field in fields(RouterOptions)},
}


@pytest.fixture(autouse=True)
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, name in (("dense", "test_vit"), ("moe", "test_vit_moe")):
        save_model(describe(timm.create_model(name, num_classes=3, img_size=32)), Path(folder))


def test_there_is_a_case_for_every_option():
    assert {case.name for case in CASES} == {field.name for field in fields(MoEConfig)}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.value}")
def test_an_option_is_held_or_refused(case, start):
    """By the model, and by the one that its configuration builds again; never dropped."""
    if case.name == "pretrained" and start != "scratch":
        pytest.skip("the start itself")
    config = MoEConfig(**{**STARTS[start], **case.needs, case.name: case.value})
    again = MoEConfig(**yaml.safe_load(yaml.safe_dump(asdict(config))))
    if case.name in REFUSED[start] and not builds(config):
        return
    assert [case.read(build_model(each, 3, 32)) for each in (config, again)] == [
        case.value,
        case.value,
    ]


def builds(config: MoEConfig) -> bool:
    """False where it is refused."""
    try:
        build_model(config, 3, 32)
    except UserError:
        return False
    return True
