"""The logit lens against a direct computation in float64: layer norm, pooling and head written out, block by block.

And what the answer rests on, patch by patch, by the same means.
"""

import numpy as np
import pytest
import torch

from moevision.analysis.collect import network_input, record_modules
from moevision.analysis.intervention import Intervention
from moevision.demo import route_image
from moevision.demo.view import LENS_TOP, Settings, lens
from moevision.layers import moe_layers

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
    blocks = dict(enumerate(net.blocks))
    with record_modules(net, blocks) as (_, outputs), torch.inference_mode():
        logits = net(x)
    found = lens(net, list(outputs.values()))
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


# ---- shares of patches in the margin


@pytest.mark.parametrize("ablated", [(), (Intervention("ablate", layer=1, expert=0),)])
def test_shares_are_those_of_the_answer_that_is_shown(make, pixels, ablated):
    """By hand, from the tokens of a pass under the same intervention: they sum to the margin but for the biases."""
    model = make()
    with torch.no_grad():
        for layer in moe_layers(model.net):
            for parameter in layer.router.parameters():
                parameter.normal_()
        model.net.head.weight.normal_()
    settings = Settings(ablated_experts=ablated)
    view = route_image(model, pixels, settings=settings).to_json()
    x = network_input(model, pixels[None])
    with torch.no_grad(), settings.applied(model.net):
        tokens = model.net.forward_features(x)[0].double()
        best, second = model.net(x)[0].topk(2).indices.tolist()
    assert view["prediction"]["moe"][1]["class"] == model.class_names[second]

    pooled = tokens.mean(0)
    norm, weight = model.net.fc_norm, model.net.head.weight.double()
    if isinstance(norm, torch.nn.LayerNorm):
        tokens = (tokens - tokens.mean(-1, keepdim=True)) / (
            ((pooled - pooled.mean()) ** 2).mean() + norm.eps
        ).sqrt()
        tokens = tokens * norm.weight
    expected = tokens @ (weight[best] - weight[second]) / len(tokens)
    assert view["shares"] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_classifier_without_shares_has_none(make, pixels):
    net = make(class_token=True, global_pool="token")
    assert route_image(net, pixels).to_json()["shares"] is None
