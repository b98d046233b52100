"""Class x expert maps: false discoveries under the null, planted effects found."""

import json

import numpy as np

from moevision.analysis.describe import class_expert_map, image_shares


def images_with_own_shares(rng, labels, lean=0.0, experts=6, patches=16):
    """[I, P, 1] choices: every image prefers experts of its own; class 0 leans to expert 2."""
    shares = rng.dirichlet(np.full(experts, 0.5), size=len(labels))
    shares[labels == 0] = (1 - lean) * shares[labels == 0] + lean * np.eye(experts)[2]
    return (rng.random((len(labels), patches, 1)) > shares.cumsum(1)[:, None, :-1]).sum(-1)[
        ..., None
    ]


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
        trace = make_trace(
            images_with_own_shares(rng, labels), labels=labels, num_experts=6, grid=(4, 4)
        )
        found = class_expert_map(trace, 1, num_permutations=200, seed=seed)
        false += found.significant.any()
        largest_cells_above += np.abs(found.excess).max() > np.quantile(np.abs(found.excess), 0.95)
    assert false <= 0.08 * 200  # family-wise, over all 30 cells
    assert (
        largest_cells_above == 200
    )  # a threshold for single cells would colour one in nearly every map


def test_a_planted_preference_is_the_cell_that_stands_out(make_trace) -> None:
    labels = np.arange(200) % 5
    chosen = images_with_own_shares(np.random.default_rng(0), labels, lean=0.5)
    found = class_expert_map(make_trace(chosen, labels=labels, num_experts=6, grid=(4, 4)), 1)
    assert found.significant[0, 2]
    assert np.unravel_index(found.excess.argmax(), found.excess.shape) == (0, 2)
    assert (found.significant == (found.p_value < 0.05)).mean() > 0.95


def test_a_class_without_pictures_is_null_in_json(make_trace) -> None:
    trace = make_trace(
        np.zeros((4, 4, 1), int),
        labels=[0, 2, 2, 0],
        num_experts=2,
        grid=(2, 2),
        class_names=("cat", "dog", "owl"),
    )
    written = json.loads(json.dumps(class_expert_map(trace, 1).to_json(), allow_nan=False))
    assert written["share"] == [[1, 0], [None, None], [1, 0]]
    assert (
        written["significant"] == [[False, False]] * 3
    )  # all the same: nothing stands out, and nothing is divided by 0
