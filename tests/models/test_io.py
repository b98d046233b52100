"""A saved model is the model: bit-equal logits, the same choices and weights, for everything that can be built."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from moevision import UserError, convert_to_moe, dense_twin, forward_routing
from moevision.data.transforms import normalize
from moevision.layers import ROUTERS, moe_layers
from moevision.models.io import SavedModel, load_model, save_model
from tests.shared import noise_images

WORDS = ["cat", "dog", "Käfer", "a|b", "dog house"]
DEIT = {
    "base": "deit_tiny_patch16_224",
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
}


def trained(net: nn.Module) -> nn.Module:
    """Moved off its initial values, buffers of the routers too: zero-init routers would hide what was lost."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for layer in moe_layers(net):
            for buffer in layer.router.buffers():
                buffer.copy_(
                    buffer.logical_not()
                    if buffer.dtype == torch.bool
                    else buffer + torch.rand(buffer.shape, generator=generator)
                )
    return net.eval()


def as_saved(net: nn.Module, size: int = 32, words: list[str] = WORDS) -> SavedModel:
    return SavedModel(net, words, size, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


def equal_after_a_round_trip(net: nn.Module, folder: Path, size: int = 32) -> SavedModel:
    save_model(as_saved(net, size), folder)
    back = load_model(str(folder))
    assert (back.class_names, back.image_size, back.mean, back.std) == (
        WORDS,
        size,
        (0.4, 0.5, 0.6),
        (0.2, 0.3, 0.25),
    )
    ours, theirs = net.state_dict(), back.net.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype
        for name, tensor in ours.items()
    )
    assert back.net.moe_config == net.moe_config
    with torch.no_grad():
        logits, routings = forward_routing(net, noise_images(3, size, seed=1))
        other_logits, other_routings = forward_routing(back.net, noise_images(3, size, seed=1))
    assert torch.equal(logits, other_logits)
    assert len(routings) == len(moe_layers(net)) > 0
    for routing, other in zip(routings, other_routings, strict=True):
        assert torch.equal(routing.expert_weights(), other.expert_weights())
        assert torch.equal(routing.kept, other.kept)
    return back


OWN_NAMES = {"own name": ("test_vit_moe", {}), "DeiT": ("vit_moe", DEIT)}


@pytest.mark.parametrize("arguments", OWN_NAMES.values(), ids=OWN_NAMES)
@pytest.mark.parametrize("router", ROUTERS)
def test_every_router(router, arguments, tmp_path):
    """`vit_moe` with a class token; its address is the base's name."""
    name, base = arguments
    net = timm.create_model(name, router=router, num_experts=4, num_classes=5, **base)
    equal_after_a_round_trip(trained(net), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == name


PER_LAYER = {
    "num_experts": [3, 8],
    "top_k": [1, 2],
    "router": ["switch", "sigmoid"],
    "expert_hidden": [48, 16],
}
OPTIONS = {
    "per layer": PER_LAYER,
    "per layer, all blocks": {
        "moe_layers": "all",
        "router": ["hash", "soft", "expert_choice", "bias_balanced"],
    },
    "fine-grained": {"num_experts": 64, "top_k": 8},
    "shared": {"num_shared_experts": 2, "router": "bias_balanced", "expert_drop": 0.3},
    "capacity": {
        "eval_capacity_factor": 0.5,
        "capacity_factor": 1.05,
        "batch_priority": True,
        "capacity_group": "image",
    },
    "gates": {"top_k": 1, "normalize_gates": True, "noise": "none"},
    "V-MoE's gates": {"router": "vmoe_top_k", "normalize_gates": True, "noise": "fixed"},
    "bias": {"router": "bias_balanced", "bias_rate": 0.01},
    "slots": {"router": "soft", "slots_per_expert": 3},
    "backend": {"backend": "dense"},
}


def held(layer: nn.Module) -> tuple:
    router, experts = layer.router, layer.experts
    sizes = router.num_experts, router.top_k, layer.num_shared_experts, experts.fc1.weight.shape
    return type(router), getattr(router, "options", None), experts.backend, *sizes


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("arguments", OWN_NAMES.values(), ids=OWN_NAMES)
def test_every_option(arguments, options, tmp_path):
    name, base = arguments
    net = trained(timm.create_model(name, num_classes=5, **base, **options))
    back = equal_after_a_round_trip(net, tmp_path)
    assert list(map(held, moe_layers(net))) == list(map(held, moe_layers(back.net)))


def test_a_model_converted_in_python_with_everything(tmp_path):
    vit = timm.create_model("deit_tiny_patch16_224", num_classes=5, **{**DEIT, "base": None})
    net = convert_to_moe(vit, [0, 2], **PER_LAYER, num_shared_experts=1, capacity_factor=1.5)
    equal_after_a_round_trip(trained(net), tmp_path)


GIVEN = {
    "num_experts": 4,
    "top_k": 2,
    "router": "vmoe_top_k",
    "noise": "fixed",
    "drop_path_rate": 0.1,
}


@pytest.mark.parametrize(
    "options", [{"num_experts": 3, "top_k": 1}, {"router": "soft", "num_shared_experts": 1}]
)
@pytest.mark.parametrize("arguments", OWN_NAMES.values(), ids=OWN_NAMES)
@pytest.mark.parametrize("dense", ["no layers", "active_flops", "total_params"])
def test_a_dense_model_under_a_name_of_ours_is_converted(dense, arguments, options, tmp_path):
    """Its record spoke of the dense model, and the saved folder could not be loaded."""
    name, base = arguments
    net = timm.create_model(
        name, num_classes=5, **GIVEN, **base, **({"moe_layers": []} if dense == "no layers" else {})
    )
    net = net if dense == "no layers" else dense_twin(net, dense)
    assert convert_to_moe(net, "every2", **options) is net
    back = equal_after_a_round_trip(trained(net), tmp_path)
    assert back.net.pretrained_cfg["architecture"] == name


@pytest.mark.parametrize("match", ["active_flops", "total_params"])
def test_a_twin_that_is_given_no_experts_stays_a_twin(match, tmp_path):
    twin = dense_twin(timm.create_model("test_vit_moe", num_classes=5), match)
    net = convert_to_moe(twin, []).eval()
    save_model(as_saved(net), tmp_path)
    assert torch.equal(
        load_model(str(tmp_path)).net(noise_images(3, seed=1)), net(noise_images(3, seed=1))
    )


def test_a_conversion_that_fails_changes_nothing():
    """The last layer can't be made."""
    net = timm.create_model("test_vit")
    before = [block.mlp for block in net.blocks]
    with pytest.raises(UserError, match="num_experts=1"):
        convert_to_moe(net, "all", num_experts=[8] * (len(net.blocks) - 1) + [1], top_k=2)
    assert [block.mlp for block in net.blocks] == before


@pytest.mark.parametrize("arguments", OWN_NAMES.values(), ids=OWN_NAMES)
def test_soft_keeps_its_slots_at_another_image_size(arguments, tmp_path):
    """K · tokens / E slots at 32 px (8 for 16 tokens, 9 for 17, rounded up) stay so many at 64 and at 96 px."""
    name, base = arguments
    net = timm.create_model(name, router="soft", num_experts=4, num_classes=5, **base)
    slots = [layer.router.mu.shape for layer in moe_layers(net)]
    assert slots == [(32, 4, 9 if base else 8)] * 2
    net.set_input_size(64)
    equal_after_a_round_trip(trained(net), tmp_path, size=64)
    larger = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=96)
    assert [layer.router.mu.shape for layer in moe_layers(larger)] == slots
    assert torch.equal(moe_layers(larger)[0].router.mu, moe_layers(net)[0].router.mu)


def test_bf16_weights_stay_what_they_are(tmp_path):
    """bf16 in the file; fp32 after loading, with the same values, so that .bfloat16() gives the model back."""
    net = trained(timm.create_model("test_vit_moe", num_classes=5)).bfloat16()
    save_model(as_saved(net), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {
        torch.bfloat16
    }
    back = load_model(str(tmp_path)).net
    assert {parameter.dtype for parameter in back.parameters()} == {torch.float32}
    assert all(
        torch.equal(tensor, stored[name].to(tensor.dtype))
        for name, tensor in back.state_dict().items()
    )
    assert torch.equal(
        back.bfloat16()(noise_images(3, seed=1).bfloat16()), net(noise_images(3, seed=1).bfloat16())
    )


def test_weights_in_another_memory_order(tmp_path):
    net = trained(timm.create_model("test_vit_moe", num_classes=5)).to(
        memory_format=torch.channels_last
    )
    assert not net.patch_embed.backbone[0].conv.weight.is_contiguous()
    save_model(as_saved(net), tmp_path)
    assert not net.patch_embed.backbone[0].conv.weight.is_contiguous()
    back = load_model(str(tmp_path)).net
    assert all(
        torch.equal(tensor, net.state_dict()[name]) for name, tensor in back.state_dict().items()
    )


def test_weights_are_flushed_to_the_disk(tmp_path, monkeypatch):
    """Else a power cut after a finished run, whose summary is flushed, could leave an empty file of weights."""
    flushed: list[tuple[int, int]] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (flushed.append(os.fstat(file)[1:3]), real(file)))
    save_model(as_saved(timm.create_model("test_vit_moe", num_classes=3)), tmp_path)
    assert [
        name for name in os.listdir(tmp_path) if os.stat(tmp_path / name)[1:3] not in flushed
    ] == []


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("model", OWN_NAMES.values(), ids=OWN_NAMES)
def test_transformers_opens_it(model, tmp_path):
    """Its wrapper builds the same network by timm and keeps the file's weights where they lie in it.

    So products may round otherwise there, in the last digits of fp32 logits of order 1.
    """
    import transformers

    name, base = model
    net = trained(timm.create_model(name, num_classes=5, **base))
    save_model(as_saved(net), tmp_path)
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    by_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert all(
        torch.equal(value, by_timm.state_dict()[key])
        for key, value in wrapped.timm_model.state_dict().items()
    )
    logits = wrapped(noise_images(3, seed=1)).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, by_timm(noise_images(3, seed=1)), rtol=0, atol=1e-5)
    assert list(wrapped.config.id2label.values()) == WORDS


@pytest.mark.needs("transformers")
def test_transformers_pipeline_answers_with_the_class_names(tmp_path):
    """The pipeline prepares the image as config.json says: bicubic to 32 px, then mean and standard deviation."""
    import transformers

    net = trained(timm.create_model("test_vit_moe", num_classes=5))
    save_model(as_saved(net), tmp_path)
    picture = Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1), 60).convert("RGB")
    classify = transformers.pipeline("image-classification", model=str(tmp_path), device="cpu")
    said = {row["label"]: row["score"] for row in classify(picture, top_k=5)}
    saved = load_model(str(tmp_path))
    pixels = normalize(
        torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None], saved.mean, saved.std
    )
    probabilities = saved.net(pixels).softmax(-1)[0].tolist()
    assert said == pytest.approx(dict(zip(WORDS, probabilities, strict=True)), abs=1e-6)


def test_what_is_saved_tells_nothing_of_where(tmp_path):
    """A model that was loaded from a folder and saved again doesn't carry that folder's path."""
    save_model(
        as_saved(trained(timm.create_model("test_vit_moe", num_classes=5))), tmp_path / "secret"
    )
    save_model(load_model(str(tmp_path / "secret")), tmp_path / "again")
    first, second = (tmp_path / name for name in ("secret", "again"))
    assert sorted(file.name for file in second.iterdir()) == ["config.json", "model.safetensors"]
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (first, second))
    assert theirs["pretrained_cfg"].pop("label_names") == WORDS  # timm repeats what it has read
    assert ours == theirs
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert str(tmp_path) not in (second / "config.json").read_text()


def relabel(folder: Path, **labels: object) -> list[str]:
    config = json.loads((folder / "config.json").read_text())
    del config["label_names"]
    (folder / "config.json").write_text(json.dumps({**config, **labels}))
    return load_model(str(folder)).class_names


def test_class_names_as_timm_writes_them(tmp_path):
    """A list, or a dict from index to name; names may be codes that `label_descriptions` explains."""
    save_model(
        as_saved(timm.create_model("test_vit_moe", num_classes=3), words=["cat", "dog", "owl"]),
        tmp_path,
    )
    kept = (tmp_path / "config.json").read_text()
    assert json.loads(kept)["label_names"] == ["cat", "dog", "owl"]
    cases = [
        ({}, ["class 0", "class 1", "class 2"]),
        (
            {"label_names": ["n1", "n2", "n3"], "label_descriptions": {"n1": "tabby", "n3": "owl"}},
            ["tabby", "n2", "owl"],
        ),
        ({"label_names": {"0": "cat", "2": "owl"}}, ["cat", "class 1", "owl"]),
        ({"label_names": ["one", "two"]}, ["class 0", "class 1", "class 2"]),
    ]
    for labels, expected in cases:
        (tmp_path / "config.json").write_text(kept)
        assert relabel(tmp_path, **labels) == expected


def test_a_dense_model_of_timm(tmp_path):
    """Not ours, but a model: everything that works without experts works with it."""
    net = timm.create_model("test_vit", num_classes=2).eval()
    timm.models.save_for_hf(net, tmp_path, safe_serialization=True)
    back = load_model(str(tmp_path))
    assert back.class_names == ["class 0", "class 1"]
    assert torch.equal(back.net(noise_images(3, 160, seed=1)), net(noise_images(3, 160, seed=1)))
