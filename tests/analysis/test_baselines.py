"""Baselines: routing that has learned nothing, and what "untrained" must forget."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from sklearn.metrics import adjusted_rand_score

from moevision.analysis import recording_of, three_questions
from moevision.analysis.information import Interval
from moevision.analysis.questions import join_with_and
from moevision.analysis.readings import (
    fit_clusters,
    fresh_copy,
    measure_baselines,
    router_inputs,
)
from moevision.models.convert import convert_to_moe, dense_twin
from tests.analysis.models import saved, small_net, traced


@pytest.fixture(scope="module")
def measured():
    model = saved(small_net())
    pictures, trace = traced(model, 60)
    return model, pictures, trace, measure_baselines(model, pictures, trace, seeds=2)


def test_difference_interval_by_hand():
    a = Interval(0.5, 0.4, 0.6)
    # lower end of a - b: d - sqrt(0.1² + (high - value of b)²); with 0.24² it is 0.26 wide
    assert math.hypot(0.1, 0.24) == pytest.approx(0.26)
    assert a.significantly_above(Interval(0.239, 0.2, 0.479))
    assert not a.significantly_above(Interval(0.241, 0.2, 0.481))


def test_baselines_of_a_model(measured):
    _, _, trace, baselines = measured
    assert set(baselines) == {"untrained", "kmeans_input"}
    blocks = [layer.layer for layer in trace.layers]
    assert [(each.layer, each.seed) for each in baselines["untrained"]] == [
        (b, s) for s in range(2) for b in blocks
    ]
    for each in (each for estimates in baselines.values() for each in estimates):
        assert each.expert_index.shape == (len(each.images), 16, 2)
        assert (np.diff(np.sort(each.expert_index, -1), axis=-1) > 0).all()  # K different experts
        assert set(np.unique(each.expert_index)) <= set(range(4))
    # clusters: fitted on one half, measured on the other
    assert all(len(each.images) == 30 for each in baselines["kmeans_input"])


def test_clusters_are_fitted_on_every_patch_once_where_there_are_few(measured, monkeypatch):
    """30 images of 16 patches, fewer than the 20,000 that a clustering takes."""
    model, pictures, trace, _ = measured
    fitted = []
    monkeypatch.setattr(
        "moevision.analysis.readings.fit_clusters",
        lambda tokens, *rest: fitted.append(tokens) or fit_clusters(tokens, *rest),
    )
    (found, *_) = measure_baselines(model, pictures, trace, seeds=1)["kmeans_input"]
    assert len(found.images) == 30
    assert [len(tokens) for tokens in fitted] == [30 * 16, 30 * 16]  # two layers


def test_clusters_are_the_nearest_means(measured):
    model, pictures, trace, baselines = measured
    found = baselines["kmeans_input"][0]
    (inputs,) = router_inputs(model, pictures, trace, found.images, 60)
    tokens = inputs[found.layer].reshape(-1, inputs[found.layer].shape[-1])
    first = found.expert_index[..., 0].ravel()
    means = np.stack([tokens[first == e].mean(0) for e in range(4)])
    nearest = np.square(tokens[:, None] - means).sum(-1).argmin(1)
    # the means come from the other half of the images, so not every border patch agrees
    assert adjusted_rand_score(first, nearest) > 0.8


def test_a_fresh_copy_remembers_nothing():
    trained, other = small_net(), small_net(seed=1)
    for net in (trained, other):
        with torch.no_grad():
            for tensor in net.state_dict().values():
                tensor.add_(1)
    before = copy.deepcopy(trained.state_dict())
    state = torch.random.get_rng_state()
    fresh = [
        fresh_copy(net, seed).state_dict() for net, seed in ((trained, 0), (other, 0), (trained, 1))
    ]
    assert (torch.random.get_rng_state() == state).all()
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    for name, value in fresh[0].items():
        assert torch.equal(value, fresh[1][name]), f"{name} depends on what was trained"
    assert not torch.equal(
        fresh[0]["blocks.1.mlp.experts.fc1.weight"], fresh[2]["blocks.1.mlp.experts.fc1.weight"]
    )
    assert fresh[0][
        "blocks.1.mlp.router.weight"
    ].any()  # a router at zero would send all patches to the same experts


@pytest.mark.parametrize("base", ["beit_base_patch16_224", "vit_small_patch16_dinov3"])
def test_a_fresh_copy_of_another_architecture_remembers_nothing(base):
    """BEiT and EVA (DINOv3) scale every block's outputs by 1 / sqrt(2 · number) as they draw weights, from std 0.02."""
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        small = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 64, "num_classes": 3}
        nets.append(convert_to_moe(timm.create_model(base, **small), "all", 4, 2))
        with torch.no_grad():
            for parameter in nets[-1].parameters():
                parameter.add_(torch.randn_like(parameter))
    one, other = (fresh_copy(net, 0).state_dict() for net in nets)
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []
    made = convert_to_moe(timm.create_model(base, **small), "all", 4, 2)
    for state in (one, made.state_dict(), dense_twin(made).state_dict()):
        weight = next(
            state[name]
            for name in ("blocks.1.mlp.experts.fc2.weight", "blocks.1.mlp.fc2.weight")
            if name in state
        )
        assert weight.std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.1)


@pytest.mark.deep
@pytest.mark.parametrize("labelled", [2, 4])
def test_few_labelled_images_leave_out_what_they_cannot_ask(measured, labelled):
    """Of 40 images a few have a class; the clusters are measured on one half only."""
    model, pictures, whole, _ = measured
    labels = np.full(40, -1)
    labels[:labelled] = np.arange(labelled) % 2
    trace = replace(whole.select(np.arange(40)), labels=labels)
    for seed in range(10):
        half, _ = measure_baselines(model, pictures, trace, seeds=1, seed=seed)["kmeans_input"]
        assert len(half.images) == 20
        assert (labels[half.images] >= 0).sum() == labelled // 2
        recording = recording_of(
            model, pictures, trace, baselines={"kmeans_input": [half]}, swap=False
        )
        (answers, _) = three_questions(recording, permutations=20)
        assert ("clusters" in answers.controls) == (labelled == 4)


def test_words_are_listed():
    words = [join_with_and(items) for items in ([], ["a"], ["a", "b"], ["a", "b", "c"])]
    assert words == ["", "a", "a and b", "a, b and c"]
