"""Excess information: values derived by hand or taken from scikit-learn, planted truths, and the size of the test."""

import math
import time
import timeit

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import mutual_info_score

from moevision.analysis import information
from moevision.analysis.information import (
    choice_counts,
    class_information,
    entropy_bits,
    excess_estimate,
    mutual_information_bits,
    part_information,
    pointwise_bits,
    score_interval,
    second_order_bias,
)


def one_hot(choices, size):
    return (np.asarray(choices)[..., None] == np.arange(size)).astype(np.float32)


@settings(deadline=None, max_examples=50)
@given(arrays(np.int64, (3, 4), elements=st.integers(0, 20)))
def test_agrees_with_scikit_learn(table):
    rows, columns = np.divmod(np.repeat(np.arange(12), table.ravel()), 4)
    expected = mutual_info_score(rows, columns) / math.log(2) if len(rows) else 0.0
    assert mutual_information_bits(table) == pytest.approx(expected, abs=1e-9)
    assert entropy_bits(np.array([1, 1, 2])) == pytest.approx(1.5)


def test_pointwise_bits_are_the_derivative():
    table, step = np.array([[30.0, 10.0, 5.0], [4.0, 20.0, 9.0]]), 1e-4
    for cell in np.ndindex(table.shape):
        more, less = table.copy(), table.copy()
        more[cell] += step
        less[cell] -= step
        slope = (mutual_information_bits(more) - mutual_information_bits(less)) / (2 * step)
        expected = (pointwise_bits(table)[cell] - mutual_information_bits(table)) / table.sum()
        assert slope == pytest.approx(expected, rel=1e-4)


def test_bias_of_independent_choices_is_millers():
    # One independent choice per image: Miller (1955), (V - 1)(E - 1) / (2 N ln 2), up to n / (n - 1) of the variance.
    counts = np.array([[30.0, 20.0, 50.0], [60.0, 10.0, 30.0]])
    bias = second_order_bias(counts[None], counts[None], counts.sum(1))
    inflated = 100 / 99 * 2 * 2 - 100 / 99 * sum(
        (c * (1 - c / 100)).sum() / c.sum() for c in counts.T
    )  # cells: sum (1 - p) = E - 1 per class; experts: within-class variance of their sums
    assert bias[0] == pytest.approx(inflated / (2 * 200 * math.log(2)))
    assert bias[0] == pytest.approx(2 / (2 * 200 * math.log(2)), rel=0.15)


def test_choice_counts():
    chosen = np.array([[[0, 2], [1, 0]]], np.int16)
    assert choice_counts(chosen, 3).tolist() == [[[1, 0, 1], [1, 1, 0]]]
    assert choice_counts(chosen, 3, np.array([[[True, False], [True, True]]])).tolist() == [
        [[1, 0, 0], [1, 1, 0]]
    ]


def test_routing_that_is_the_class_gives_log2_of_the_experts():
    labels = np.arange(800) % 8
    estimate = class_information(one_hot(np.repeat(labels[:, None], 16, 1), 8), labels)
    assert estimate.value_bits + estimate.null_mean == pytest.approx(3)  # log2 8, nothing lost
    # the null of such lumps: (C - 1)(E - 1) / (2 I ln 2) to second order
    assert estimate.null_mean == pytest.approx(49 / (1600 * math.log(2)), rel=0.1)
    assert estimate.low <= 3 <= estimate.high
    assert estimate.high - estimate.low < 0.1
    weights = 17 * one_hot(np.repeat(labels[:, None], 16, 1), 8)  # only shares count
    assert class_information(weights, labels).value_bits == pytest.approx(estimate.value_bits)


def test_parts_that_are_the_expert():
    rng = np.random.default_rng(0)
    parts = rng.integers(4, size=(300, 16))  # parts have no place here
    estimate = part_information(one_hot(parts, 4), parts)
    assert estimate.value_bits == pytest.approx(2, abs=0.01)


def test_class_behind_position_does_not_show():
    # Which expert stands for the class changes from place to place.
    rng = np.random.default_rng(1)
    labels, place = rng.integers(2, size=600), np.arange(16) % 2
    maps = one_hot(labels[:, None] ^ place, 2)
    apart = class_information(maps, labels)
    assert apart.low <= 0 <= apart.high
    # and a router that follows position alone tells nothing of the class
    fixed = np.broadcast_to(one_hot(place, 2), (600, 16, 2))
    assert class_information(fixed, labels).value_bits == pytest.approx(0, abs=1e-9)


def test_what_position_explains_is_no_excess_about_parts():
    rng = np.random.default_rng(2)
    rim = np.repeat(
        [0, 1], 8
    )  # the upper half shows part 0 in 90 % of the images, and has its own expert
    parts = np.where(rng.random((400, 16)) < 0.9, rim, 1 - rim)
    maps = np.broadcast_to(one_hot(rim, 2), (400, 16, 2))
    estimate = part_information(maps, parts)
    assert estimate.null_mean > 0.4  # 1 - H(0.9) = 0.531 bits are explained by position
    assert estimate.value_bits == pytest.approx(0, abs=1e-3)


def dependent_images(rng, images, experts=8, concentration=3.0, choices=128):
    """Counts [I, 1, E]: every image has its own expert shares, whatever its class."""
    shares = rng.dirichlet(np.full(experts, concentration / experts), size=images)
    return rng.multinomial(choices, shares)[:, None, :].astype(np.float32)


@pytest.mark.parametrize("classes", [2, 10])
def test_the_test_keeps_its_size_where_patches_of_an_image_hang_together(classes):
    rng = np.random.default_rng(3)
    labels = np.arange(200) % classes
    estimates = [
        class_information(dependent_images(rng, 200), labels, seed=seed) for seed in range(200)
    ]
    rejected = np.mean([estimate.p_value <= 0.05 for estimate in estimates])
    assert rejected <= 0.08
    assert np.mean([estimate.low > 0 for estimate in estimates]) <= 0.08
    # For independent patches Miller's bias would be all that chance gives; here chance gives more than ten times that.
    miller = (classes - 1) * (8 - 1) / (2 * 200 * 128 * math.log(2))
    assert np.mean([estimate.null_mean for estimate in estimates]) > 10 * miller
    assert abs(np.mean([estimate.value_bits for estimate in estimates])) < 0.002


def test_part_keeps_its_size():
    rng = np.random.default_rng(4)
    rejected = 0
    for seed in range(200):
        # clumps: each quarter of an image has one expert and one part
        clump = np.array([0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2)
        maps, parts = (
            one_hot(rng.integers(4, size=(80, 4))[:, clump], 4),
            rng.integers(3, size=(80, 4))[:, clump],
        )
        rejected += part_information(maps, parts, num_permutations=100, seed=seed).p_value <= 0.05
    assert rejected <= 0.08 * 200


def test_score_interval_solves_its_equation():
    low, high = score_interval(0.2, 0.001, 0.03, 1.96)
    for end in (low, high):
        assert (0.2 - end) ** 2 == pytest.approx(1.96**2 * (0.001 + 0.03 * end))
    assert score_interval(-1.0, 0.001, 0.03, 1.96)[0] == score_interval(-1.0, 0.001, 0.03, 1.96)[1]


def test_bias_is_the_mean_over_the_first_32_permutations(monkeypatch):
    """In chunks of 10 of them, 40 are drawn; of 10, all count. The last call is that of the labels themselves."""
    rows: list[int] = []

    def counted(sums, squares, images):
        rows.append(len(sums))
        return second_order_bias(sums, squares, images)

    monkeypatch.setattr(information, "second_order_bias", counted)
    maps, labels = np.random.default_rng(0).integers(1, 5, size=(12, 4, 2)), np.arange(12) % 3
    monkeypatch.setattr(information, "_CHUNK_NUMBERS", 10 * 3 * 12)
    information.class_information(maps, labels, num_permutations=40)
    assert rows == [10, 10, 10, 2, 1]
    rows.clear()
    information.class_information(maps, labels, num_permutations=10)
    assert rows == [10, 1]


@pytest.mark.parametrize(("null", "variance"), [([0.1, 0.3], 0.02 * 4 / 3), ([0.0, 0.4], 0.08)])
def test_a_null_that_keeps_a_part_of_the_effect_has_a_normal_interval(null, variance):
    """Influences of 4 images with squares that sum to .02: .02 · 4 / 3 by the delta method, .02 or .08 of the null.

    The larger one counts, times 3.18245 (Student's, 3 degrees of freedom), on both sides of .5 - .2.
    """
    influence = np.array([0.1, -0.1, 0.0, 0.0])
    estimate = excess_estimate(0.5, np.array(null), influence, null_keeps_effect=True)
    half = 3.182446 * math.sqrt(variance)
    assert (estimate.low, estimate.high) == (
        pytest.approx(0.3 - half, abs=1e-5),
        pytest.approx(0.3 + half, abs=1e-5),
    )
    plain = excess_estimate(0.5, np.array(null), influence)
    assert plain.low + plain.high > 0.6 + 0.01


def test_only_the_null_of_parts_keeps_a_part_of_the_effect():
    """Pairing maps with other part maps keeps what position explains; its interval alone is symmetric."""
    rng = np.random.default_rng(0)
    parts = rng.integers(4, size=(40, 16))
    maps = one_hot(np.where(rng.random((40, 16)) < 0.5, parts, rng.integers(4, size=(40, 16))), 4)
    by_part, by_class = part_information(maps, parts), class_information(maps, parts[:, 0])
    assert by_part.low + by_part.high == pytest.approx(2 * by_part.value_bits)
    assert by_class.low + by_class.high > 2 * by_class.value_bits + 1e-6


def test_an_interval_holds_its_estimate():
    """Choices that tell less than the shuffled ones, all of which tell nearly the same: no score fits so few bits."""
    (low, high), excess = score_interval(0.01 - 0.024, 1e-8, 0.02, 1.96), 0.01 - 0.024
    assert excess < low < high
    found = excess_estimate(0.01, np.array([0.024, 0.0241, 0.0239]), np.array([0.0, 0.01, 0.02]))
    assert found.value_bits == pytest.approx(excess)
    assert found.low <= found.value_bits <= found.high


def test_p_value_counts_ties_and_the_observation():
    null = np.array([0.1, 0.2, 0.3, 0.4])
    estimate = excess_estimate(0.3, null, np.array([0.0, 0.1, -0.1]))
    assert estimate.p_value == pytest.approx(3 / 5)
    assert estimate.value_bits == pytest.approx(0.05)


def test_images_without_a_label_and_missing_classes_do_not_count():
    rng = np.random.default_rng(5)
    counts, labels = dependent_images(rng, 100), np.arange(100) % 4
    padded = np.concatenate([counts, dependent_images(rng, 50)])
    renumbered = np.concatenate([labels * 3, np.full(50, -1)])
    assert class_information(padded, renumbered) == class_information(counts, labels)


def test_200_permutations_of_2000_images_take_under_two_seconds():
    rng = np.random.default_rng(6)
    maps, labels = one_hot(rng.integers(8, size=(2000, 64)), 8), np.arange(2000) % 8
    parts = rng.integers(8, size=(2000, 64))
    for call in (lambda: class_information(maps, labels), lambda: part_information(maps, parts)):
        assert min(timeit.repeat(call, time.process_time, repeat=3, number=1)) < 2
