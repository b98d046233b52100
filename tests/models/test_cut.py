"""A cut model computes what its source does where the routers choose among the kept experts alone."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from moevision.layers import moe_layers
from moevision.models.cut import CUTTABLE, cut
from moevision.models.io import SavedModel, describe, load_model, save_model
from tests.shared import noise_images

CLASSES = ["ant", "bee", "cow"]
KEPT = {1: [0, 2, 3], 3: [1]}


def model_with(router: str, **options) -> SavedModel:
    """Five experts in two blocks, weights and routers' biases far from their start, in float64."""
    torch.manual_seed(0)
    options = {"num_experts": 5, "router": router, "num_classes": 3, **options}
    net = timm.create_model("test_vit_moe", **options).double().eval()
    with torch.no_grad():
        for value in net.parameters():
            value.normal_(std=0.2)
        for name, buffer in net.named_buffers():
            if name.endswith("router.bias"):
                buffer.normal_(std=0.3)
    return replace(describe(net), class_names=CLASSES)


def choose_among(router: nn.Module, experts: list[int]) -> None:
    """Scores of all other experts become so low that none is chosen, and none has a share of a softmax."""
    scores = router.scores

    def limited(x):
        logits, noise = scores(x)
        is_away = torch.ones(logits.shape[-1], dtype=torch.bool)
        is_away[experts] = False
        return logits.masked_fill(is_away, -1e4), noise

    router.scores = limited


@pytest.mark.parametrize("router", CUTTABLE)
@torch.inference_mode()
def test_it_is_its_source_with_the_other_experts_away(router):
    model = model_with(router)
    small = cut(model, [2, 0], KEPT)
    x = noise_images(3, seed=1).double()
    for moe in moe_layers(model.net):
        choose_among(moe.router, KEPT[moe.layer_index])
        moe.router.top_k = min(moe.router.top_k, len(KEPT[moe.layer_index]))
    torch.testing.assert_close(small.net(x), model.net(x)[:, [2, 0]], atol=1e-9, rtol=1e-7)


@torch.inference_mode()
def test_with_all_experts_and_classes_nothing_changes():
    model = model_with("noisy_top_k")
    same = cut(model, range(3), {1: range(5), 3: range(5)})
    assert torch.equal(
        same.net(noise_images(3, seed=1).double()), model.net(noise_images(3, seed=1).double())
    )


def test_its_parameters_are_those_of_what_is_kept():
    """Of a block an expert's MLP and its two rows of the router leave, 2 of 5 and 4 of 5; a class its row and bias."""
    model = model_with("noisy_top_k")
    expert = sum(value[0].numel() for value in moe_layers(model.net)[0].experts.parameters())
    width = model.net.embed_dim
    gone = (2 + 4) * (expert + 2 * width) + (width + 1)
    count = {
        name: sum(value.numel() for value in one.net.parameters())
        for name, one in (("before", model), ("after", cut(model, [0, 1], KEPT)))
    }
    assert count["before"] - count["after"] == gone


@torch.inference_mode()
def test_it_is_saved_and_loaded(tmp_path):
    model = model_with("switch")
    small = cut(replace(model, temperature=2.0), [1, 2], KEPT)
    small.net.float()
    save_model(small, tmp_path)
    again = load_model(str(tmp_path))
    x = noise_images(3, seed=1)
    assert torch.equal(again.net(x), small.net(x))
    assert (again.class_names, again.temperature) == (["bee", "cow"], 2.0)
    assert [moe.router.num_experts for moe in moe_layers(again.net)] == [3, 1]
