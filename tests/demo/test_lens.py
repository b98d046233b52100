"""The logit lens against a direct computation in float64: layer norm, pooling and head written out, block by block."""

import numpy as np
import pytest
import torch

from moevision.analysis.collect import network_input
from moevision.demo import route_image
from moevision.demo.view import LENS_TOP, block_outputs, lens

POOLED = {"mean": {}, "class token": {"class_token": True, "global_pool": "token"}}


def normed(tokens, norm):
    """Layer norm over the last axis, written out."""
    if isinstance(norm, torch.nn.Identity):
        return tokens
    centred = tokens - tokens.mean(-1, keepdim=True)
    return (
        centred / ((centred**2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
    )


@torch.no_grad()
def by_hand(net, x):
    """[L, C] of one image."""
    x = net.norm_pre(net._pos_embed(net.patch_embed(x)))
    rows = []
    for block in net.blocks:
        x = block(x)
        tokens = normed(x[0], net.norm)  # [N, D]
        pooled = (
            tokens[0] if net.global_pool == "token" else tokens[net.num_prefix_tokens :].mean(0)
        )
        rows.append(net.head.weight @ normed(pooled, net.fc_norm) + net.head.bias)
    return torch.stack(rows)


@pytest.fixture(params=POOLED)
def model(request, make):
    found = make(**POOLED[request.param])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # so that norm and head do something that can be missed
        for name, value in found.net.named_parameters():
            if name.startswith(("norm", "fc_norm", "head")):
                value += 0.3 * torch.randn(value.shape, generator=generator)
    return found


def test_it_is_norm_pooling_and_head_after_each_block(model, pixels):
    net = model.net.double()
    x = network_input(model, pixels[None])
    assert x.dtype == torch.float64
    with block_outputs(net) as outputs, torch.inference_mode():
        logits = net(x)
    found = lens(net, outputs)
    assert found.dtype == torch.float64
    assert found.shape == (len(net.blocks), 8)
    assert (found - by_hand(net, x)).abs().max() < 1e-12
    assert torch.equal(found[-1], logits[0])  # the last row is the model's own answer
    assert (found[0] - found[-1]).abs().max() > 0.01


def test_a_view_has_the_likeliest_classes_of_each_block(model, pixels):
    view = route_image(model, pixels)
    expected = by_hand(model.net, network_input(model, pixels[None])).softmax(-1).numpy()
    shown = view.to_json()
    assert len(shown["lens"]) == len(model.net.blocks)
    for rows, p in zip(shown["lens"], expected, strict=True):
        best = np.argsort(-p)[:LENS_TOP]
        assert [row["class"] for row in rows] == [model.class_names[index] for index in best]
        assert [row["p"] for row in rows] == pytest.approx(p[best].tolist(), abs=6e-5)
    assert shown["lens"][-1][0] == shown["prediction"]["moe"][0]
