"""Every router through the whole analysis: baselines by its own rule, weights in the statistics, figures and report."""

import json

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from moevision.analysis.collect import network_input
from moevision.analysis.describe import class_expert_map
from moevision.analysis.effects import class_effect, effect, run_compared, run_under
from moevision.analysis.information import choice_counts
from moevision.analysis.intervention import Intervention
from moevision.analysis.readings import RoutingRule, fresh_copy, measure_baselines
from moevision.analysis.report import (
    ReportSettings,
    Results,
    analyze,
    draw_figures,
    environment,
    layer_numbers,
    measure_effects,
    model_numbers,
)
from moevision.analysis.trace import RoutingTrace
from moevision.data import SyntheticPets
from moevision.demo.atlas import build_atlas
from moevision.layers import moe_layers
from moevision.models.io import SavedModel, save_model
from tests.analysis.models import saved as saved_net
from tests.analysis.models import small_net, traced

PETS = SyntheticPets(48, 32, 0, "test")
# One of each kind: other tests go through the steps with noisy_top_k and vmoe_top_k, hash and position are like random.
STEPPED = [
    "switch",
    "sigmoid",
    "bias_balanced",
    "cosine",
    "random",
    "colour",
    "expert_choice",
    "soft",
]


def saved(router, **options) -> SavedModel:
    net = small_net(router, **options)
    with torch.no_grad():
        net.pos_embed.normal_()
        net.head.weight.normal_()
        for layer in moe_layers(net):
            layer.experts.fc2.weight.normal_(std=0.3)
    return saved_net(net)


@pytest.mark.parametrize("router", STEPPED)
def test_every_step_takes_every_router(router):
    model = saved(router)
    pictures, trace = traced(model, 48)
    baselines = measure_baselines(model, pictures, trace, seeds=1)
    for layer in trace.layers:
        for name, found in baselines.items():
            own = [each for each in found if each.layer in (None, layer.layer)]
            assert len(own) == 1, name
            takes = choice_counts(own[0].expert_index, own[0].num_experts, own[0].amounts)
            if layer.kind != "soft":  # as many experts per patch as the layer
                assert (takes > 0).sum(-1).mean() == pytest.approx(
                    layer.experts_per_patch, rel=0.05
                ), name
            else:
                np.testing.assert_allclose(takes.sum(-1), 1, rtol=1e-4)
    if router in ("random", "colour"):  # nothing is learned, so the untrained model routes alike
        untrained = baselines["untrained"][0]
        assert (untrained.expert_index == trace.layers[0].expert_index).all()
    maps = {
        layer.layer: class_expert_map(trace, layer.layer, num_permutations=20)
        for layer in trace.layers
    }
    for found in maps.values():
        np.testing.assert_allclose(found.share.sum(1), 1, rtol=1e-5)
    atlas = build_atlas(trace, pictures, maps, count=2)
    assert [layer["kind"] for layer in atlas["layers"]] == [layer.kind for layer in trace.layers]
    assert json.dumps([layer_numbers(layer) for layer in trace.layers])
    found = effect(
        model, pictures.image(0), Intervention("ablate", layer=1, expert=0), num_controls=3
    )
    assert found.routing == trace.layers[0].kind
    if found.moved:
        assert np.std(found.control.delta_logits) > 0
    of_class = class_effect(
        model, pictures, 0, Intervention("swap", layer=3, expert=0, other=1), limit=3
    )
    assert len(of_class.delta_logits) == 3


ALONE = {
    "expert_choice": {},
    "soft": {},
    "colour": {},
    "vmoe_top_k": {"eval_capacity_factor": 0.75, "batch_priority": True, "capacity_group": "batch"},
}


@pytest.mark.parametrize("router", ALONE)
def test_rows_of_one_picture_are_as_if_alone(router):
    """The control's draws are one batch; they don't share a batch's capacity, and colour gates look at the image."""
    model, image = saved(router, **ALONE[router]), PETS.image(5)
    change = Intervention("ablate", layer=1, expert=2)
    found = effect(model, image, change, num_controls=3)
    x = network_input(model, image[None])
    with torch.inference_mode():
        before = model.net(x)[0].double()
        _, taken, _ = run_under(model.net, x, change)
        for draw, delta in enumerate(found.control.delta_logits):
            after = run_compared(model.net, x, change, taken, [(0, draw)])[0]
            assert delta == pytest.approx(float((after - before)[found.target]), abs=1e-5)


def test_an_untrained_router_has_no_bias_left():
    model = saved("bias_balanced")
    moe_layers(model.net)[0].router.bias.fill_(3.0)
    assert not moe_layers(fresh_copy(model.net, 0))[0].router.bias.any()


def test_the_rule_of_expert_choice():
    """One image, 3 patches, 2 experts, C = 1: the affinity is the softmax over experts, its best patch is taken.

    Scores differ by 2, -1 and 1, so expert 0 is wanted most by patch 0, expert 1 by patch 1. The scale is found so
    that the mean entropy is the layer's; at scale 1 it is the mean of H(sigmoid(2)) and twice H(sigmoid(1)).
    """
    scores = np.array([[[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    p = 1 / (1 + np.exp(-np.array([2.0, 1.0, 1.0])))
    entropy = float(-(p * np.log2(p) + (1 - p) * np.log2(1 - p)).mean())
    rule = RoutingRule("expert_choice", 2, 1, entropy)
    assert rule.scale(scores) == pytest.approx(1, rel=1e-6)
    chosen = rule.apply(scores, 1.0)
    np.testing.assert_allclose(chosen.amounts[0], [[p[0], 0], [0, p[1]], [0, 0]], rtol=1e-6)


def test_the_rule_of_soft_moe():
    """Taking is a softmax over experts, by hand from ln 3."""
    scores = np.log(np.array([[[3.0, 1.0], [1.0, 1.0]]]))
    chosen = RoutingRule("soft", 2, 0, 1.0).apply(scores, 1.0)
    np.testing.assert_allclose(chosen.amounts, [[[0.75, 0.25], [0.5, 0.5]]], rtol=1e-6)


@pytest.mark.deep
def test_effects_without_a_control_are_measured_and_drawn():
    """Images routed as a whole to one expert each: as many random choices are the ablation itself."""
    model = saved("vmoe_top_k", route_by="image", top_k=1)
    pictures, trace = traced(model, 48)
    effects = measure_effects(model, pictures, trace, budget_s=1000)  # however slow the machine
    assert {found["control_delta_logit"] for found in effects["rows"] + effects["experts"]} == {
        None
    }
    assert any(found["delta_logit"] != 0 for found in effects["experts"])
    results = Results([], {}, None, effects)
    drawn = draw_figures(trace, pictures, results, [layer_numbers(layer) for layer in trace.layers])
    assert "effects" in {item.kind for item in drawn}


RAGGED = {
    "tokens": (
        ["vmoe_top_k", "switch"],
        {"num_experts": [4, 6], "top_k": [2, 1], "eval_capacity_factor": 0.75},
    ),
    "others": (["soft", "expert_choice"], {"num_experts": [4, 6], "top_k": [2, 2]}),
}


@pytest.mark.deep
@pytest.mark.parametrize("name", RAGGED)
def test_layers_that_differ_are_drawn_side_by_side(name):
    routers, options = RAGGED[name]
    pictures, trace = traced(saved(routers, **options), 48)
    maps = {
        layer.layer: class_expert_map(trace, layer.layer, num_permutations=20)
        for layer in trace.layers
    }
    rows = [
        {"layer": layer.layer, "class": name, "delta_logit": 0.1 * e, "control_delta_logit": 0.0}
        for layer in trace.layers
        for e in range(layer.num_experts)
        for name in trace.class_names
    ]
    results = Results([], maps, None, {"rows": rows, "what": "it is away"})
    drawn = list(
        draw_figures(trace, pictures, results, [layer_numbers(layer) for layer in trace.layers])
    )
    numbers = model_numbers(trace, "here", 32)
    assert numbers["num_experts"] == [4, 6]
    said = {
        item.kind: " ".join(text.get_text() for text in item.figure.findobj(Text)) for item in drawn
    }
    if name == "tokens":
        assert numbers["top_k"] == [2, 1]
        assert "dropped by capacity" in said["load"]
        assert "dropped" in said["overlay"]
    else:
        assert numbers["routing"] == ["soft", "expert_choice"]
        assert numbers["top_k"] is None
        assert not any("dropped" in words or "apacity" in words for words in said.values())
        assert "share of weight" in said["load"]
        assert "no expert took" in said["overlay"]


@pytest.mark.parametrize(
    "kinds", [["soft"], ["expert_choice"], ["soft", "expert_choice", "token_choice"]]
)
def test_captions_add_what_differs(kinds):
    caption = environment().get_template("captions.jinja").module.caption
    (plain, rest), words = (
        caption("load", ["token_choice"]).split(" <b>What"),
        caption("load", kinds),
    )
    assert words.startswith(plain)
    assert words.endswith(rest)
    assert ("as many slots" in words) == ("soft" in kinds)
    assert ("equal by construction" in words) == ("expert_choice" in kinds)


@pytest.mark.deep
def test_a_report_of_experts_that_choose_and_mix(tmp_path, monkeypatch):
    """Its numbers and its page; the figures are drawn above."""
    monkeypatch.setattr("moevision.analysis.report.draw_figures", lambda *measured: iter(()))
    model = saved(["soft", "expert_choice"])
    save_model(model, tmp_path / "model")
    settings = ReportSettings(
        str(tmp_path / "model"),
        data="synthetic_pets",
        out=tmp_path / "report",
        limit=32,
        permutations=20,
        quick=True,
        progress=False,
    )
    numbers = analyze(settings)
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert [layer["kind"] for layer in numbers["layers"]] == ["soft", "expert_choice"]
    assert [layer["dropped"] for layer in numbers["layers"]] == [None, None]
    assert numbers["layers"][0]["slowest"] == 1.0
    trace = RoutingTrace.load(tmp_path / "report" / "trace.safetensors")
    assert numbers["layers"][1]["unrouted"] == (~trace.layers[1].kept.any(-1)).mean()
    assert "patches without expert" in page
    assert numbers["effects"]["what"].count(";") == 1


def test_a_rule_has_the_capacity_of_expert_choice_and_none_for_soft():
    """Of 16 patches each of 4 experts takes 16 · 2 / 4."""
    _, trace = traced(saved(["soft", "expert_choice"]), 48)
    assert [RoutingRule.of(layer).top_k for layer in trace.layers] == [0, 8]
