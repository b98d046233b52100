"""Baselines and what stands beside them: planted routing, and what "untrained" must forget."""

import copy
import json
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
from moevision.analysis.images import image_patches
from moevision.analysis.information import Estimate
from moevision.analysis.specialization import (
    BASELINES,
    Assignments,
    exceeds,
    fit_clusters,
    fresh_copy,
    hash_scores,
    listed,
    measure_baselines,
    specialization,
)
from moevision.data import SyntheticPets
from moevision.errors import UserError
from moevision.layers import moe_layers
from moevision.models.io import SavedModel

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NAMED = {
    "class": "class specialization",
    "class_given_position": "class specialization at fixed positions",
    "position": "position specialization",
}


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


def planted(make_trace, rng, *, learned, images=240):
    """One layer, 16 patches, 8 experts: the class's expert in a share `learned` of the patches, else any."""
    labels = np.arange(images) % 8
    chosen = np.where(rng.random((images, 16)) < learned, labels[:, None], rng.integers(8, size=(images, 16)))
    return make_trace(chosen[..., None], labels=labels, num_experts=8, grid=(4, 4))


def as_baseline(trace, seed=0):
    layer = trace.layers[0]
    return Assignments(None, seed, layer.expert_index, np.arange(len(trace)), layer.num_experts)


def test_the_sentence_names_every_comparison(make_trace) -> None:
    rng = np.random.default_rng(0)
    trace, sibling, blind = (planted(make_trace, rng, learned=share) for share in (0.5, 0.45, 0.0))
    baselines = {"hash": [as_baseline(blind)]}

    def ask(**options):
        (result,) = specialization(trace, about=("class",), **options)
        return result

    full = ask(baselines=baselines, seeds=[sibling])
    assert full.above_null
    assert full.above_baselines
    assert full.baselines["hash"][0] == pytest.approx(0, abs=0.01)
    assert full.seeds[0] == pytest.approx(full.estimate.value_bits, rel=0.4)
    # bits and their share of H(class) come before the p-value
    assert full.sentence.index("bits") < full.sentence.index("of the maximum") < full.sentence.index("p =")
    assert full.sentence.endswith(
        f"A hash of the patch's pixels gives {max(full.baselines['hash'][0], 0):.3f} bits, less. "
        f"Other trainings: {full.seeds[0]:.3f} bits."
    )
    alone = ask()
    assert alone.above_baselines is None
    assert alone.sentence.endswith("It was not compared with routing without learning.")
    as_good = ask(baselines={**baselines, "kmeans_input": [as_baseline(trace)]}, seeds=[sibling])
    assert as_good.above_baselines is False
    assert "Clusters of the layer's input (learned, but by no router) give" in as_good.sentence
    for result in (full, alone, as_good):  # what follows from it is said by the three questions
        assert "learned specialization" not in result.sentence


def test_blind_routing_is_said_to_be_blind(make_trace) -> None:
    rng = np.random.default_rng(1)
    blind = planted(make_trace, rng, learned=0.0)
    for result in specialization(blind, baselines={"hash": [as_baseline(blind)]}, seeds=[blind]):
        assert f"L1: no {NAMED[result.about]} (" in result.sentence
        assert f"{result.estimate.value_bits:.3f}".replace("-0.000", "0.000").replace("-", "−") in result.sentence
        assert "bits above chance, 95 % CI" in result.sentence
        assert result.sentence.endswith("n = 240).")
        written = json.loads(json.dumps(result.to_json(), allow_nan=False))
        assert written["above"] == {"null": False, "baselines": False}
        assert written["value_bits"] == result.estimate.value_bits
        assert written["name"] == "L1"


def test_what_is_asked(make_trace) -> None:
    rng = np.random.default_rng(2)
    trace = planted(make_trace, rng, learned=0.3)
    parts = rng.integers(3, size=(240, 16))
    assert [r.about for r in specialization(trace, parts=parts)] == [
        "class",
        "class_given_position",
        "position",
        "part",
    ]
    unlabelled = replace(trace, labels=np.full(240, -1))
    assert [r.about for r in specialization(unlabelled)] == ["position"]


def test_other_trainings_must_have_seen_the_same_pictures(make_trace) -> None:
    rng = np.random.default_rng(3)
    trace = planted(make_trace, rng, learned=0.3)
    with pytest.raises(UserError, match="same images"):
        specialization(trace, seeds=[trace.select(np.arange(100))])


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
    results = specialization(trace, baselines=baselines, seeds=[trace])
    assert {len(result.baselines["untrained"]) for result in results} == {2}


def test_clusters_are_fitted_on_every_patch_once_where_there_are_few(measured, monkeypatch) -> None:
    """30 images of 16 patches, fewer than the 20,000 that a clustering takes."""
    model, pictures, trace, _ = measured
    fitted = []
    monkeypatch.setattr(
        "moevision.analysis.specialization.fit_clusters",
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
        result = specialization(trace, baselines=found, about=("class", "position"), num_permutations=20)[0]
        assert set(result.baselines) == ({"hash", "kmeans_colour"} if labelled == 4 else {"hash"})
        recording = recording_of(model, pictures, trace, baselines={"kmeans_input": [half]}, swap=False)
        (answers, _) = three_questions(recording, permutations=20)
        assert ("clusters" in answers.controls) == (labelled == 4)


def test_few_parts_or_images_leave_out_what_they_cannot_ask(measured) -> None:
    model, pictures, whole, _ = measured
    two = whole.select(np.arange(2))
    found = measure_baselines(model, pictures, two, seeds=1, names=("hash", "kmeans_colour"))
    parts = np.full((2, 16), -1)
    parts[1 - found["kmeans_colour"][0].images] = np.arange(16) % 2  # none of what the clusters are measured on
    results = specialization(two, baselines=found, parts=parts, about=("position", "part"), num_permutations=20)
    assert {tuple(result.baselines) for result in results} == {("hash",)}
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
    about_class, about_position = specialization(trace, baselines=found, about=("class", "position"))[:2]
    assert min(about_class.baselines["kmeans_colour"]) > 0.7 * about_class.estimate.value_bits > 0.9
    assert about_class.above_baselines is False
    assert "Clusters of the image's mean colour give" in about_class.sentence
    assert max(map(max, about_position.baselines.values())) == pytest.approx(0, abs=1e-9)


def test_words_are_listed() -> None:
    assert [listed(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
