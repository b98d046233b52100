"""Class x expert maps and class comparisons: false discoveries under the null, planted effects found, SciPy agrees."""

import json

import numpy as np
import pytest
from scipy.stats import false_discovery_control, permutation_test

from moevision.analysis.describe import (
    MIN_IMAGES,
    ExpertDifference,
    LayerDifference,
    _permutation_p,
    _sentence,
    class_expert_map,
    compare_classes,
    image_shares,
)
from moevision.errors import UserError


def images_with_own_shares(rng, labels, lean=0.0, experts=6, patches=16):
    """[I, P, 1] choices: every image prefers experts of its own; class 0 leans to expert 2."""
    shares = rng.dirichlet(np.full(experts, 0.5), size=len(labels))
    shares[labels == 0] = (1 - lean) * shares[labels == 0] + lean * np.eye(experts)[2]
    return (rng.random((len(labels), patches, 1)) > shares.cumsum(1)[:, None, :-1]).sum(-1)[..., None]


def test_shares_by_hand(make_trace) -> None:
    chosen = np.array([[0, 0, 1, 2], [0, 0, 0, 0], [1, 1, 1, 1]])[..., None]
    trace = make_trace(chosen, labels=[0, 0, 1], num_experts=3, grid=(2, 2))
    found = class_expert_map(trace, 1)
    np.testing.assert_allclose(found.share, [[0.75, 0.125, 0.125], [0, 1, 0]])
    np.testing.assert_allclose(found.mean_share, [1 / 2, 5 / 12, 1 / 12])
    np.testing.assert_allclose(found.excess, found.share - found.mean_share)
    assert found.n_images.tolist() == [2, 1]
    assert image_shares(np.array([[0, 0], [3, 1]])).tolist() == [[0.5, 0.5], [0.75, 0.25]]


def test_maps_without_a_pattern_show_a_cell_in_one_of_twenty(make_trace) -> None:
    labels = np.arange(80) % 5
    false, largest_cells_above = 0, 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        trace = make_trace(images_with_own_shares(rng, labels), labels=labels, num_experts=6, grid=(4, 4))
        found = class_expert_map(trace, 1, num_permutations=200, seed=seed)
        false += found.significant.any()
        largest_cells_above += np.abs(found.excess).max() > np.quantile(np.abs(found.excess), 0.95)
    assert false <= 0.08 * 200  # family-wise, over all 30 cells
    assert largest_cells_above == 200  # a threshold for single cells would colour one in nearly every map


def test_a_planted_preference_is_the_cell_that_stands_out(make_trace) -> None:
    labels = np.arange(200) % 5
    chosen = images_with_own_shares(np.random.default_rng(0), labels, lean=0.5)
    found = class_expert_map(make_trace(chosen, labels=labels, num_experts=6, grid=(4, 4)), 1)
    assert found.significant[0, 2]
    assert np.unravel_index(found.excess.argmax(), found.excess.shape) == (0, 2)
    assert (found.significant == (found.p_value < 0.05)).mean() > 0.95


def test_a_class_without_pictures_is_null_in_json(make_trace) -> None:
    trace = make_trace(
        np.zeros((4, 4, 1), int), labels=[0, 2, 2, 0], num_experts=2, grid=(2, 2), class_names=("cat", "dog", "owl")
    )
    written = json.loads(json.dumps(class_expert_map(trace, 1).to_json(), allow_nan=False))
    assert written["share"] == [[1, 0], [None, None], [1, 0]]
    assert (
        written["significant"] == [[False, False]] * 3
    )  # all the same: nothing stands out, and nothing is divided by 0


def test_planted_difference_of_two_classes(make_trace) -> None:
    labels = np.arange(120) % 2
    rng = np.random.default_rng(1)
    layers = [images_with_own_shares(rng, labels, lean) for lean in (0.0, 0.4)]
    trace = make_trace(*layers, labels=labels, num_experts=6, grid=(4, 4), class_names=("cat", "dog"))
    found = compare_classes(trace, "cat", "dog")
    leaning = found.layers[1].experts[2]
    # cat's share of expert 2 rises from 1/6 to 1/6 + 0.4 (1 - 1/6)
    assert leaning.low < 0.4 * 5 / 6 < leaning.high
    assert leaning.significant
    assert not any(expert.significant for expert in found.layers[0].experts)
    assert "L3·E2" in found.sentence
    assert "more of cat than of dog" in found.sentence
    assert (found.n_a, found.n_b) == (60, 60)
    mirrored = compare_classes(trace, 1, 0)
    assert mirrored.layers[1].experts[2].difference == pytest.approx(-leaning.difference)
    q = [expert.q for layer in found.layers for expert in layer.experts]
    p = [expert.p_value for layer in found.layers for expert in layer.experts]
    np.testing.assert_allclose(q, false_discovery_control(p))
    written = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert written["layers"][1]["experts"][2]["difference"] == leaning.difference
    assert written["layers"][1]["name"] == "L3"


def test_permutation_p_agrees_with_scipy() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.random((30, 1)), rng.random((25, 1)) + 0.1
    ours = _permutation_p(x, y, 20_000, np.random.default_rng(3))[0]
    theirs = permutation_test(
        (x[:, 0], y[:, 0]), lambda a, b: a.mean() - b.mean(), n_resamples=20_000, rng=np.random.default_rng(4)
    ).pvalue
    assert ours == pytest.approx(theirs, abs=4 * np.sqrt(2 * theirs / 20_000))


def test_intervals_of_a_difference_cover_and_nothing_is_found_where_nothing_is(make_trace) -> None:
    labels, covered, found_any = np.repeat([0, 1], 40), [], 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        trace = make_trace(images_with_own_shares(rng, labels), labels=labels, num_experts=6, grid=(4, 4))
        found = compare_classes(trace, 0, 1, num_resamples=300, seed=seed)
        covered += [expert.low <= 0 <= expert.high for expert in found.layers[0].experts]
        found_any += any(expert.significant for expert in found.layers[0].experts)
        if not found_any:
            assert "No expert is used differently" in found.sentence
    assert np.mean(covered) >= 0.92
    assert found_any <= 0.08 * 150  # with no true difference the false discovery rate is the family-wise error


def test_the_sentence_keeps_the_signs_of_its_interval() -> None:
    """More of b than of a: -.05 from -.12 to .01 is 5 points more, from 1 fewer to 12 more."""
    expert = ExpertDifference(expert=2, difference=-0.05, low=-0.12, high=0.01, p_value=0.01, q=0.02, significant=True)
    found = _sentence("a", "b", [LayerDifference("L3", 3, (expert,))], 40, 50)
    assert "5.0 percentage points more of b than of a (−1.0 to 12.0)." in found


def test_comparisons_that_make_no_sense_are_refused(make_trace) -> None:
    labels = np.repeat([0, 1, 2], (30, 30, MIN_IMAGES - 1))
    trace = make_trace(np.zeros((len(labels), 4, 1), int), labels=labels, num_experts=2, grid=(2, 2))
    with pytest.raises(UserError, match="19 of class 2"):
        compare_classes(trace, 0, 2)
    with pytest.raises(UserError, match="two different"):
        compare_classes(trace, 1, "class 1")
    with pytest.raises(UserError, match="no class 'pig'"):
        compare_classes(trace, "pig", 1)
    assert all(expert.q == 1 for expert in compare_classes(trace, 0, 1).layers[0].experts)
