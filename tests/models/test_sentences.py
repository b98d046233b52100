"""What a user is told about a model that can't be built, converted, upcycled, opened, saved or exported.

A row: the call, and what the sentence must name (the option or file, its value, the way on).
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from moevision import UserError, VisionTransformerMoE, convert_to_moe, dense_twin, upcycle
from moevision.models import moe_layer_indices
from moevision.models.config import MoEConfig, build_model
from moevision.models.convert import pool_patches
from moevision.models.cut import cut
from moevision.models.export import export_onnx
from moevision.models.io import (
    SavedModel,
    architecture_of,
    create_from,
    describe,
    first_blocks,
    load_model,
    save_model,
)
from moevision.models.shares import patch_shares
from moevision.models.upcycle import start_routers
from moevision.models.vit_moe import checkpoint_blocks
from tests.shared import SMALL_VIT, noise_images, says
from tests.shared import small_vit as vit

Row = tuple[Callable[[], Any], list[str]]
VIT = "vit_tiny_patch16_224"


def moe(**options: Any) -> nn.Module:
    return timm.create_model("test_vit_moe", num_classes=3, **options)


def saved(net: nn.Module) -> SavedModel:
    return SavedModel(net, ["a", "b", "c"], 32, (0.5,) * 3, (0.2,) * 3)


TWO_LAYERS = nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 3))


def with_head(net: nn.Module, head: nn.Module, norm: nn.Module | None = None) -> nn.Module:
    """With this classifier, and this norm in front of it."""
    net.head, net.fc_norm = head, norm or net.fc_norm
    return net


def naflex() -> nn.Module:
    return timm.create_model("naflexvit_base_patch16_gap", depth=2, embed_dim=64, num_heads=2)


BUILT: dict[str, Row] = {
    "image size": (lambda: moe(img_size=30), ["8 px", "30 x 30", "such as 32"]),
    "K above E": (lambda: moe(num_experts=2, top_k=3), ["top_k=3", "num_experts=2", "1 and 2"]),
    "stem": (lambda: moe(stem="resnet"), ["'resnet'", "'patch'", "'wide_stages'"]),
    "patch of a stem": (lambda: moe(stem="stages", patch_size=2), ["'stages'", "4 px"]),
    "no quarters": (
        lambda: moe(stem="conv_patch", patch_size=6, img_size=30),
        ["'conv_patch'", "6", "by 4"],
    ),
    "no power of two": (lambda: moe(patch_size=12, img_size=48), ["patch_size=12", "power of two"]),
    "twin": (lambda: moe(twin="flops"), ["flops", "active_flops", "total_params"]),
    "twin of widths": (lambda: moe(twin=[64, 32]), ["[64, 32]", "active_flops"]),
    "router": (lambda: moe(router="nope"), ["'nope'", "noisy_top_k"]),
    "block": (lambda: moe(moe_layers=[9]), ["moe_layers=[9]", "0 to 3"]),
    "placement": (lambda: moe_layer_indices("every3", 6), ["'every3'", "every2, last2, all"]),
    "router's option": (
        lambda: moe(router="expert_choice", route_by="image"),
        ["'expert_choice'", "route_by", "leave it out"],
    ),
    "checkpointed block": (
        lambda: checkpoint_blocks(moe(), [1, 4]),
        ["--model.grad_checkpointing", "block 4", "0 to 3"],
    ),
}

NUMBERS: list[tuple[str, Any, str]] = [
    *((name, value, "at least 1") for name in ("patch_size", "embed_dim", "depth", "num_heads", "expert_hidden")
      for value in (0, -4)),
    ("expert_hidden", [16, 0], "at least 1"),
    ("num_shared_experts", -1, "at least 0"),
    ("mlp_ratio", -1, "above 0"),
    ("mlp_ratio", math.inf, "above 0"),
    ("proj_drop_rate", 2, "less than 1"),
    ("expert_drop", 3, "less than 1"),
    ("patch_drop_rate", 1, "less than 1"),
    ("drop_path_rate", math.nan, "less than 1"),
]  # fmt: skip
BUILT |= {
    f"rule of {router} and dropped patches": (
        lambda router=router: moe(router=router, patch_drop_rate=0.5),
        ["patch_drop_rate at 0"],
    )
    for router in ("position", "hash", "colour")
}

CONFIGURED: dict[str, Row] = {
    f"{name} {value}": (
        lambda name=name, value=value: MoEConfig("test_vit_moe", **{name: value}),
        [f"--model.arch.{name}", f"{value[-1] if isinstance(value, list) else value}", valid],
    )
    for name, value, valid in NUMBERS
}
CONFIGURED["noise of a checkpoint"] = (
    lambda: MoEConfig.from_checkpoint({"name": "test_vit_moe", "upcycle_noise": 0.1}),
    ["upcycle_noise 0.1", "moevision 0.1"],
)
CONVERTED: dict[str, Row] = {
    "no ViT": (lambda: convert_to_moe(nn.Linear(3, 3)), ["Linear", "transformer blocks"]),
    "blocks of another kind": (
        lambda: convert_to_moe(timm.create_model("hiera_tiny_224")),
        ["Hiera", "transformer blocks"],
    ),
    "no patch embedding": (lambda: convert_to_moe(naflex()), ["patch_embed", "ViT, DeiT"]),
    "experts": (lambda: convert_to_moe(moe()), ["experts already", "one call"]),
    "gated MLP": (
        lambda: convert_to_moe(timm.create_model("eva02_tiny_patch14_224", img_size=28)),
        ["Block 1", "GluMlp"],
    ),
    "twin of a dense model": (lambda: dense_twin(vit()), ["convert it first"]),
    "twin of a twin": (lambda: dense_twin(dense_twin(moe())), ["convert it first"]),
    "pooling with two tokens": (
        lambda: pool_patches(vit("deit_tiny_distilled_patch16_224")),
        ["can't pool", "--model.arch.global_pool"],
    ),
    "blocks beyond the last": (lambda: first_blocks(vit(), 5), ["depth is 5", "1 to 4"]),
    "no block": (lambda: first_blocks(vit(), 0), ["depth is 0", "1 to 4"]),
    "cut with experts": (lambda: first_blocks(moe(), 2), ["has experts", "depth out"]),
}

UPCYCLED: dict[str, Row] = {
    name: (lambda name=name, options=options: upcycle(timm.create_model(name, **options)), words)
    for name, options, words in (
        ("eva02_tiny_patch14_224", {"img_size": 28}, ["GluMlp", "gated"]),
        ("vit_small_plus_patch16_dinov3", {"img_size": 32, "depth": 2}, ["SwiGLU"]),
        ("swin_tiny_patch4_window7_224", {}, ["SwinTransformer", "transformer blocks"]),
        ("resnet18", {}, ["ResNet", "transformer blocks", "DeiT"]),
        ("hiera_tiny_224", {}, ["Hiera", "transformer blocks"]),
        ("vit_dpwee_patch16_reg1_gap_256", {}, ["no MLP"]),
        ("vit_tiny_patch16_224", {"scale_mlp_norm": True}, ["has a norm"]),
        ("test_vit_moe", {}, ["experts already", "--pretrained"]),
    )
}
UPCYCLED |= {
    "no patch embedding": (lambda: upcycle(naflex()), ["patch_embed"]),
    "reinit": (lambda: upcycle(vit(), reinit=1.5), ["reinit is 1.5", "at most 1"]),
    "noise on copies": (lambda: upcycle(vit(), noise=0.1), ["noise 0.1", "learned"]),
    "no layer": (lambda: upcycle(vit(), layers=[]), ["at least one", "layers"]),
    "layer": (lambda: upcycle(vit(), layers=[9]), ["[9]", "0 to 3"]),
    "unknown router": (lambda: upcycle(vit(), router="nope"), ["router 'nope'"]),
    "choices": (lambda: upcycle(vit(), top_k=9), ["top_k=9", "1 and 8"]),
    "choices of switch": (
        lambda: upcycle(vit(), router="switch", top_k=2),
        ["'switch'", "top_k=2", "must be 1"],
    ),
    "shared expert": (lambda: upcycle(vit(), num_shared_experts=1), ["num_shared_experts out"]),
    "option": (lambda: upcycle(vit(), slots_per_expert=2), ["slots_per_expert", "leave it out"]),
    "weights twice": (lambda: upcycle(vit(), weights="x.safetensors"), ["its own weights"]),
    "width of copies": (
        lambda: upcycle(vit(), expert_hidden=64),
        ["128 hidden units", "expert_hidden", "is 64"],
    ),
    "no clusters": (lambda: start_routers(vit(), [noise_images(1)]), ["no MoE layer"]),
    "no image": (lambda: start_routers(upcycle(vit()), []), ["no image", "one batch"]),
    "few images": (
        lambda: start_routers(upcycle(vit(), num_experts=4, route_by="image"), [noise_images(3)]),
        ["3 images", "4 clusters", "more images"],
    ),
}
UPCYCLED |= {
    f"clusters for {router}": (
        lambda router=router: start_routers(upcycle(vit(), router=router), [noise_images(4)]),
        [f"'{router}'", "cluster start out"],
    )
    for router in ("expert_choice", "soft", "hash")
}

TWO_OF_FOUR = {1: [0, 2], 3: [1]}
CUT: dict[str, Row] = {
    f"experts of {router}": (
        lambda router=router: cut(saved(moe(router=router)), [0, 1], TWO_OF_FOUR),
        [router, "Block 1", "vmoe_top_k"],
    )
    for router in ("soft", "expert_choice", "position", "hash", "random")
}
CUT |= {
    "no experts": (
        lambda: cut(saved(moe(moe_layers=[])), [0, 1], {}),
        ["experts", "Mixture of Experts"],
    ),
    "hidden layer": (
        lambda: cut(saved(with_head(moe(router="switch"), TWO_LAYERS)), [0, 1], TWO_OF_FOUR),
        ["classifier", "linear"],
    ),
}

PATCHES = torch.zeros(1, 17, 32)
SHARES: dict[str, Row] = {
    f"pooling by {pool}": (
        lambda pool=pool: patch_shares(vit(global_pool=pool), PATCHES),
        [pool, "--model.arch.global_pool avg"],
    )
    for pool in ("token", "max", "map", "avgmax")
}
SHARES |= {
    f"behind the mean: {kind}": (
        lambda parts=parts: patch_shares(with_head(vit(global_pool="avg"), *parts), PATCHES),
        [kind, "--model.arch.global_pool avg"],
    )
    for kind, parts in (
        ("Identity", [nn.Identity()]),
        ("Sequential", [TWO_LAYERS]),
        ("BatchNorm1d", [nn.Linear(32, 3), nn.BatchNorm1d(32)]),
    )
}
SHARES |= {  # a distilled model averages two heads, others aren't ViTs
    name: (
        lambda name=name: patch_shares(timm.create_model(name), PATCHES),
        ["classifier of its own"],
    )
    for name in ("resnet18", "deit_tiny_distilled_patch16_224", "test_efficientnet")
}


def told_by(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


TABLES = {"built": BUILT, "configured": CONFIGURED, "converted": CONVERTED, "upcycled": UPCYCLED}
TABLES |= {"cut": CUT, "shares": SHARES}
ROWS = {f"{table}: {name}": row for table, rows in TABLES.items() for name, row in rows.items()}


@pytest.mark.parametrize(("call", "names"), ROWS.values(), ids=ROWS)
def test_the_sentence_names(call, names):
    says(told_by(call), *names)


# ---- files


def opened(folder: Path) -> Callable[[], Any]:
    return lambda: load_model(str(folder))


def test_files_that_do_not_fit(tmp_path):
    weights = tmp_path / "vit.safetensors"
    safetensors.torch.save_file(vit().state_dict(), weights)
    pickled = tmp_path / "weights.pth"
    torch.save({}, pickled)
    none = tmp_path / "none.safetensors"
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"rubbish")
    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({}, foreign, {"architecture": "nothing of timm's"})
    net = saved(moe())
    save_model(net, tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    save_model(net, tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text('{"model_type": "vit", "architectures": ["ViTForImageClassification"]}')
    nameless = VisionTransformerMoE(**SMALL_VIT)
    hub = "hf-hub:timm/deit_tiny_patch16_224.fb_in1k"

    rows: list[Row] = [
        (lambda: create_from("deit_tiny_patch16_224", 3, weights=weights), [str(weights), "deit_tiny_patch16_224"]),
        (lambda: create_from(VIT, weights=pickled), ["weights.pth", "never pickles"]),
        (lambda: create_from(VIT, weights=none), ["none.safetensors", "no .safetensors file"]),
        (lambda: create_from(VIT, weights=damaged), ["damaged.safetensors", "it is damaged"]),
        (lambda: create_from(weights), ["vit.safetensors", "its architecture"]),
        (lambda: create_from(hub, weights=weights), [hub, "timm name", "vit.safetensors"]),
        (lambda: create_from(tmp_path / "empty"), ["empty", "model.safetensors", "never pickles"]),
        (lambda: create_from(tmp_path), [str(tmp_path), "no saved model", "config.json"]),
        (lambda: create_from("deit_tiny_patch16"), ["deit_tiny_patch16_224", "runs/NAME/model"]),
        (opened(tmp_path / "other"), ["can't be loaded", "timm or moevision"]),
        (lambda: architecture_of(weights), ["vit.safetensors", "--model.arch.base"]),
        (lambda: architecture_of(foreign), ["foreign.safetensors", "--model.arch.base"]),
        (lambda: architecture_of(none), ["no file", "none.safetensors"]),
        (lambda: save_model(saved(nameless), tmp_path / "model"), ["VisionTransformerMoE", "create_model"]),
    ]  # fmt: skip
    for call, names in rows:
        says(told_by(call), *names)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "change", [{"embed_dim": 64}, {"num_experts": 5}, {"router": "soft"}, {"router": "of later"}]
)
def test_a_config_of_another_model(change, tmp_path):
    save_model(saved(moe()), tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["model_args"] |= change
    file.write_text(json.dumps(config))
    assert "can't be loaded" in told_by(opened(tmp_path))


@pytest.mark.parametrize(
    "name", ["patch_embed.backbone.0.bn.running_mean", "blocks.3.mlp.router.bias"]
)
def test_numbers_that_are_none(name, tmp_path):
    net = moe(router="bias_balanced")
    net.state_dict()[name][0] = torch.nan
    save_model(saved(net), tmp_path)
    says(told_by(opened(tmp_path)), name, "NaN")


def test_a_pretrained_start_refuses_an_image_that_it_would_cut(tmp_path):
    """A checkpoint of such a run, from before it was refused, still goes on."""
    save_model(describe(timm.create_model("test_vit", img_size=32, num_classes=3)), tmp_path)
    config = MoEConfig(pretrained=str(tmp_path), num_experts=2)
    sentence = told_by(lambda: build_model(config, 3, 40))
    assert "16 px" in sentence
    assert sentence.endswith("such as 32."), "another patch_size is no way on"
    assert build_model(config, 3, 40, load_pretrained=False) is not None


# ---- export


def exported(tmp_path: Path, *, opset: int = 20, routes: bool = False, **options: Any) -> str:
    sentence = told_by(
        lambda: export_onnx(
            saved(moe(**options).eval()), tmp_path / "model.onnx", opset=opset, routes=routes
        )
    )
    assert list(tmp_path.iterdir()) == []
    return sentence


@pytest.mark.needs("onnx")
def test_what_can_not_be_exported(tmp_path):
    batch = {"router": "vmoe_top_k", "eval_capacity_factor": 1.0, "capacity_group": "batch"}
    assert "capacity_group='image'" in exported(tmp_path, **batch)
    for router in ("expert_choice", "soft"):
        assert "leave them out" in exported(tmp_path, router=router, routes=True)
    for opset in (17, 24):
        assert f"opset={opset} can't be written: choose 18" in exported(tmp_path, opset=opset)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(package, tmp_path, monkeypatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None if name == package else json)
    says(exported(tmp_path, router="vmoe_top_k"), f"needs {package},", "pip install")
