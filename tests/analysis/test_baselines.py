"""Baselines: routing that has learned nothing, and what "untrained" must forget."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import adjusted_rand_score
from torch import nn

from moevision.analysis import collect_routing, open_pictures, recording_of, three_questions
from moevision.analysis.baselines import BASELINES, fit_clusters, fresh_copy, hash_scores, measure_baselines
from moevision.analysis.images import image_patches
from moevision.analysis.information import Estimate, choice_counts, class_information, position_information
from moevision.analysis.readings import exceeds, listed
from moevision.data import SyntheticPets
from moevision.errors import UserError
from moevision.layers import moe_layers
from moevision.models.io import SavedModel

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def small_model(seed=0, **options):
    torch.manual_seed(seed)
    net = timm.create_model("test_vit_moe", num_classes=8, **options)
    for layer in moe_layers(net):
        nn.init.normal_(layer.router.weight)
    return SavedModel(net.eval(), list(SyntheticPets.classes), 32, MEAN, STD)


@pytest.fixture(scope="module")
def measured():
    model, pictures = small_model(), open_pictures(SyntheticPets(60, 32, 0, "test"), 32)
    trace = collect_routing(model, pictures, progress=False)
    return model, pictures, trace, measure_baselines(model, pictures, trace, seeds=2)


def test_difference_interval_by_hand() -> None:
    a = Estimate(0.5, 0.4, 0.6, 0, 0, 0, 0, 100)
    # lower end of a - b: d - sqrt(0.1² + (high - value of b)²); with 0.24² it is 0.26 wide
    assert math.hypot(0.1, 0.24) == pytest.approx(0.26)
    assert exceeds(a, Estimate(0.239, 0.2, 0.479, 0, 0, 0, 0, 100))
    assert not exceeds(a, Estimate(0.241, 0.2, 0.481, 0, 0, 0, 0, 100))


def test_baselines_of_a_model(measured) -> None:
    _, _, trace, baselines = measured
    assert set(baselines) == set(BASELINES)
    blocks = [layer.layer for layer in trace.layers]
    assert [(each.layer, each.seed) for each in baselines["untrained"]] == [(b, s) for s in range(2) for b in blocks]
    assert {each.layer for name in ("hash", "hash_position", "kmeans_colour") for each in baselines[name]} == {None}
    for each in (each for estimates in baselines.values() for each in estimates):
        assert each.expert_index.shape == (len(each.images), 16, 2)
        assert (np.diff(np.sort(each.expert_index, -1), axis=-1) > 0).all()  # K different experts
        assert set(np.unique(each.expert_index)) <= set(range(4))
    # clusters: fitted on one half, measured on the other
    assert all(len(each.images) == 30 for each in baselines["kmeans_colour"] + baselines["kmeans_input"])


def test_clusters_are_fitted_on_every_patch_once_where_there_are_few(measured, monkeypatch) -> None:
    """30 images of 16 patches, fewer than the 20,000 that a clustering takes."""
    model, pictures, trace, _ = measured
    fitted = []
    monkeypatch.setattr(
        "moevision.analysis.baselines.fit_clusters",
        lambda tokens, *rest: fitted.append(tokens) or fit_clusters(tokens, *rest),
    )
    (found, *_) = measure_baselines(model, pictures, trace, seeds=1, names=("kmeans_colour",))["kmeans_colour"]
    (tokens,) = fitted
    assert len(found.images) == 30
    assert len(tokens) == 30 * 16


def test_colour_clusters_are_the_nearest_means(measured) -> None:
    _, pictures, _, baselines = measured
    found = baselines["kmeans_colour"][0]
    colours = np.stack([image_patches(pictures.image(int(i)), (4, 4)).mean((1, 2)) for i in found.images]).reshape(
        -1, 3
    )
    first = found.expert_index[..., 0].ravel()
    means = np.stack([colours[first == e].mean(0) for e in range(4)])
    nearest = np.square(colours[:, None] - means).sum(-1).argmin(1)
    # the means come from the other half of the images, so not every border patch agrees
    assert adjusted_rand_score(first, nearest) > 0.8


def test_hash_routing_depends_on_content_alone(measured) -> None:
    _, _, _, baselines = measured
    keys = np.array([3, 99, 3, 2**63], np.uint64)
    experts = hash_scores(keys, 8, seed=0).argsort(-1)
    assert (experts[0] == experts[2]).all()
    assert not (hash_scores(keys, 8, seed=1).argsort(-1) == experts).all()
    many = hash_scores(np.arange(8000, dtype=np.uint64), 8, seed=5).argmax(-1)
    assert np.abs(np.bincount(many, minlength=8) - 1000).max() < 4 * math.sqrt(8000 * 1 / 8 * 7 / 8)
    assert (baselines["hash_position"][0].expert_index == baselines["hash_position"][0].expert_index[:1]).all()


def test_a_fresh_copy_remembers_nothing() -> None:
    trained, other = small_model(0).net, small_model(1).net
    for net in (trained, other):
        with torch.no_grad():
            for tensor in net.state_dict().values():
                tensor.add_(1)
    before = copy.deepcopy(trained.state_dict())
    state = torch.random.get_rng_state()
    fresh = [fresh_copy(net, seed).state_dict() for net, seed in ((trained, 0), (other, 0), (trained, 1))]
    assert (torch.random.get_rng_state() == state).all()
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    for name, value in fresh[0].items():
        assert torch.equal(value, fresh[1][name]), f"{name} depends on what was trained"
    assert not torch.equal(fresh[0]["blocks.1.mlp.experts.fc1.weight"], fresh[2]["blocks.1.mlp.experts.fc1.weight"])
    assert fresh[0]["blocks.1.mlp.router.weight"].any()  # a router at zero would send all patches to the same experts


def test_baselines_need_the_pictures_of_the_trace(measured) -> None:
    model, _, trace, _ = measured
    others = open_pictures(SyntheticPets(8, 32, 0, "test"), 32)
    with pytest.raises(UserError, match="other images"):
        measure_baselines(model, others, trace)
    with pytest.raises(UserError, match="kmeans_colour"):
        measure_baselines(model, others, trace, names=("magic",))


def with_labels(trace, labels):
    return replace(trace, labels=np.asarray(labels))


@pytest.mark.deep
@pytest.mark.parametrize("labelled", [2, 4])
def test_few_labelled_images_leave_out_what_they_cannot_ask(measured, labelled) -> None:
    """Of 40 images a few have a class; the clusters are measured on one half only."""
    model, pictures, whole, _ = measured
    labels = np.full(40, -1)
    labels[:labelled] = np.arange(labelled) % 2
    trace = with_labels(whole.select(np.arange(40)), labels)
    for seed in range(10):
        found = measure_baselines(model, pictures, trace, seeds=1, names=("hash", "kmeans_colour"), seed=seed)
        (half,) = found["kmeans_colour"]
        assert len(half.images) == 20
        assert (labels[half.images] >= 0).sum() == labelled // 2
        recording = recording_of(model, pictures, trace, baselines={"kmeans_input": [half]}, swap=False)
        (answers, _) = three_questions(recording, permutations=20)
        assert ("clusters" in answers.controls) == (labelled == 4)


def test_one_image_has_no_baselines(measured) -> None:
    model, pictures, whole, _ = measured
    with pytest.raises(UserError, match="at least two images"):
        measure_baselines(model, pictures, whole.select(np.arange(1)))


def stored(assignments):
    """Bytes of the arrays that its arrays are views of: an axis that is broadcast takes none."""
    total = 0
    for array in (assignments.expert_index, assignments.reads, assignments.takes):
        while isinstance(getattr(array, "base", None), np.ndarray):
            array = array.base
        total += 0 if array is None else array.nbytes
    return total


@pytest.mark.parametrize("router", ["vmoe_top_k", "expert_choice", "soft"])
def test_what_is_the_same_for_all_images_is_kept_once(measured, router) -> None:
    _, pictures, _, _ = measured
    torch.manual_seed(0)
    net = timm.create_model("test_vit_moe", num_classes=8, router=router).eval()
    model = SavedModel(net, list(SyntheticPets.classes), 32, MEAN, STD)
    trace = collect_routing(model, pictures, progress=False)
    few, many = (
        measure_baselines(
            model, pictures, trace.select(np.arange(n)), seeds=1, names=("hash_position", "kmeans_colour")
        )
        for n in (20, 60)
    )
    assert [stored(each) for each in few["hash_position"]] == [stored(each) for each in many["hash_position"]]
    assert many["hash_position"][0].counts().shape[0] == 60
    if router != "vmoe_top_k":  # all experts are named, in order
        clusters = many["kmeans_colour"][0]
        assert clusters.expert_index.shape == clusters.takes.shape
        assert stored(clusters) == clusters.takes.nbytes + clusters.reads.nbytes + 2 * clusters.num_experts


class Tinted:
    """160 images of noisy patches, whose mean brightness alone says which of four classes they are of."""

    classes = ("a", "b", "c", "d")

    def __init__(self):
        rng = np.random.default_rng(0)
        self.targets = [number % 4 for number in range(160)]
        patches = rng.permuted(np.tile(np.linspace(-50, 50, 16), (160, 1)), axis=1).reshape(160, 4, 1, 4, 1)
        grey = 116 + 8 * np.array(self.targets) + rng.normal(0, 3, 160)
        grey = np.broadcast_to(grey[:, None, None, None, None] + patches, (160, 4, 8, 4, 8)).reshape(160, 32, 32)
        self.pixels = np.repeat(grey[..., None], 3, -1).astype(np.uint8)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return Image.fromarray(self.pixels[index]), self.targets[index]


def test_baselines_of_layers_that_route_images_choose_for_whole_images() -> None:
    """A router by the image's mean colour, which knows what clusters of the images' mean colours know."""
    data = Tinted()
    model, pictures = small_model(route_by="image", top_k=1), open_pictures(data, 32)
    trace = collect_routing(model, pictures, progress=False)
    grey = data.pixels.mean((1, 2, 3))
    chosen = np.digitize(grey, np.quantile(grey, [0.25, 0.5, 0.75])).astype(np.int16)
    chosen = np.broadcast_to(chosen[:, None, None], (160, 16, 1))
    trace = replace(trace, layers=tuple(replace(layer, expert_index=chosen) for layer in trace.layers))
    found = measure_baselines(model, pictures, trace, seeds=2)
    assert found["hash_position"] == []  # the layer sees no position
    for each in (each for estimates in found.values() for each in estimates):
        assert (each.expert_index == each.expert_index[:, :1]).all()
    assert len(np.unique(found["hash"][0].expert_index)) == 4

    def bits(each):
        return class_information(each.patch_takes(), trace.labels[each.images], num_permutations=50).value_bits

    own = class_information(choice_counts(chosen, 4), trace.labels, num_permutations=50)
    assert min(map(bits, found["kmeans_colour"])) > 0.7 * own.value_bits > 0.9
    for each in (each for estimates in found.values() for each in estimates):
        of_place = position_information(each.counts(), trace.grid, num_permutations=20)
        assert of_place.value_bits == pytest.approx(0, abs=1e-9)


def test_words_are_listed() -> None:
    assert [listed(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
