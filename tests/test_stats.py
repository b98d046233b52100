"""Intervals and temperature against scipy, a published example and exact enumeration of every possible outcome."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from scipy.special import logsumexp, softmax
from torchmetrics.functional.classification import multiclass_calibration_error

from moevision.files import read_csv
from moevision.stats import (
    SetScores,
    accuracy_interval,
    detectable,
    fit_sets,
    fit_temperature,
    mcnemar_p_value,
    paired_difference,
    paired_score,
)


def _vectors(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    a = np.repeat([True, True, False, False], [both, only_a, only_b, neither])
    b = np.repeat([True, False, True, False], [both, only_a, only_b, neither])
    return a, b


@pytest.mark.parametrize(
    ("correct", "total"), [(0, 20), (1, 20), (13, 20), (20, 20), (965, 1000), (1, 1)]
)
@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_accuracy_interval_equals_scipy(correct, total, level):
    expected = stats.binomtest(correct, total).proportion_ci(
        confidence_level=level, method="wilson"
    )
    assert accuracy_interval(correct, total, level) == pytest.approx(
        (expected.low, expected.high), abs=1e-12
    )


def test_accuracy_interval_bounds_lie_z_standard_errors_away():
    z = stats.norm.ppf(0.975)
    for bound in accuracy_interval(70, 80):
        assert abs(70 / 80 - bound) == pytest.approx(
            z * math.sqrt(bound * (1 - bound) / 80), rel=1e-9
        )


def test_published_example_of_tango_interval():
    """Airway hyper-responsiveness before and after stem cell transplantation, 21 children: 1, 1, 7, 12.

    Fagerland, Lydersen, Laake, Statistics in Medicine 33 (2014) 2850-2875 print for Tango's asymptotic score
    interval (-0.517, -0.026) and for the exact McNemar test p = 0.070.
    """
    result = paired_difference(*_vectors(both=1, only_a=1, only_b=7, neither=12))
    assert result.difference == pytest.approx(-6 / 21)
    assert (result.low, result.high) == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert result.p_value == pytest.approx(
        2 * (1 + 8) / 2**8
    )  # by hand: C(8,0) + C(8,1) of 256, twice
    assert (result.n, result.only_a, result.only_b) == (21, 1, 7)


@pytest.mark.parametrize(
    ("only_a", "only_b", "n"), [(5, 3, 30), (0, 6, 25), (40, 10, 200), (9, 9, 40)]
)
def test_bounds_solve_the_score_equation_with_a_numeric_likelihood(only_a, only_b, n):
    """scipy finds the constrained maximum instead of the quadratic; the score is then -+z at the bounds."""
    result = paired_difference(*_vectors(n - only_a - only_b, only_a, only_b, 0))
    z = stats.norm.ppf(0.975)
    for bound, expected in ((result.low, z), (result.high, -z)):

        def minus_log_likelihood(q: float, d: float = bound) -> float:
            cells = np.array([q + d, q, 1 - 2 * q - d])
            return -float(np.sum(np.array([only_a, only_b, n - only_a - only_b]) * np.log(cells)))

        limits = (max(0.0, -bound) + 1e-12, (1 - bound) / 2 - 1e-12)
        q = optimize.minimize_scalar(
            minus_log_likelihood, bounds=limits, method="bounded", options={"xatol": 1e-12}
        ).x
        standard_error = math.sqrt((2 * q + bound - bound**2) / n)
        assert ((only_a - only_b) / n - bound) / standard_error == pytest.approx(expected, rel=1e-4)


def test_without_a_discordant_image_the_interval_has_its_closed_form():
    """only_a = only_b = 0: the score equation reduces to d^2 n = z^2 d (1 - d), so d = z^2 / (n + z^2)."""
    z2 = stats.norm.ppf(0.975) ** 2
    result = paired_difference(*_vectors(both=15, only_a=0, only_b=0, neither=5))
    assert (result.low, result.high) == pytest.approx((-z2 / (20 + z2), z2 / (20 + z2)))
    assert result.p_value == 1.0


def test_score_at_zero_is_mcnemars_chi_square():
    assert paired_score(14, 5, 100, 0.0) ** 2 == pytest.approx((14 - 5) ** 2 / (14 + 5))


def _coverage(n: int, p_only_a: float, p_only_b: float) -> float:
    """Probability that the interval holds the true difference, summed over every outcome of n images."""
    outcomes = [
        (a, b, n - a - b) for a, b in itertools.product(range(n + 1), repeat=2) if a + b <= n
    ]
    weights = stats.multinomial.pmf(
        np.array(outcomes), n, [p_only_a, p_only_b, 1 - p_only_a - p_only_b]
    )
    covered = 0.0
    for (only_a, only_b, both), weight in zip(outcomes, weights, strict=True):
        if weight > 1e-7:
            result = paired_difference(*_vectors(both, only_a, only_b, 0))
            covered += weight * (result.low <= p_only_a - p_only_b <= result.high)
    return covered


@pytest.mark.parametrize(
    ("p_only_a", "p_only_b"), [(0.05, 0.05), (0.15, 0.05), (0.3, 0.1), (0.02, 0.2)]
)
def test_coverage_is_nominal_from_100_images(p_only_a, p_only_b):
    assert 0.945 <= _coverage(100, p_only_a, p_only_b) <= 0.96


def test_coverage_of_small_lopsided_samples_is_as_documented():
    """The score interval is asymptotic: with 40 images and 2 % against 20 % it holds 93.0 %, not 95 %."""
    assert _coverage(40, 0.02, 0.2) == pytest.approx(0.930, abs=0.0005)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_paired_difference_is_antisymmetric_and_ordered(both, a, b, neither):
    if both + a + b + neither == 0:
        return
    one = paired_difference(*_vectors(both, a, b, neither))
    other = paired_difference(*_vectors(both, b, a, neither))
    assert -1 <= one.low <= one.difference + 1e-12 <= one.high + 2e-12 <= 1 + 2e-12
    assert (one.low, one.high, one.p_value) == pytest.approx(
        (-other.high, -other.low, other.p_value)
    )


@pytest.mark.parametrize(
    ("only_a", "only_b"), [(0, 0), (0, 1), (3, 9), (8, 8), (300, 340), (2000, 2100)]
)
def test_mcnemar_equals_scipys_sign_test(only_a, only_b):
    throws = only_a + only_b
    expected = stats.binomtest(only_a, throws, 0.5).pvalue if throws else 1.0
    assert mcnemar_p_value(only_a, only_b) == pytest.approx(expected, rel=1e-9)
    by_hand = 2 * sum(math.comb(throws, i) for i in range(min(only_a, only_b, 340) + 1)) / 2**throws
    if min(only_a, only_b) <= 340:
        assert mcnemar_p_value(only_a, only_b) == pytest.approx(min(1.0, by_hand))


def test_wrong_input_is_said():
    for correct, total, level in ((1, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 95)):
        with pytest.raises(ValueError):  # noqa: PT011 (SciPy's words)
            accuracy_interval(correct, total, level)


def test_detectable_difference_has_its_power():
    """By drawing: the share of significant tests is 80 %, three standard errors of 4 000 draws around it."""
    draws = np.random.default_rng(0).normal(detectable(6), 1, size=(4000, 6))
    assert np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05) == pytest.approx(
        0.8, abs=0.02
    )
    assert detectable(8) == pytest.approx(1.16, abs=0.005)
    assert detectable(5, 0.05 / 4) == pytest.approx(2.48, abs=0.005)


# ---- the temperature, against a data set whose temperature is known, and the error that is left


def drawn(temperature, n=20_000, classes=4):
    """Logits, and labels drawn from softmax(logits / temperature): that temperature is right."""
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(n, classes))
    probabilities = softmax(logits / temperature, axis=1)
    labels = (rng.random((n, 1)) > probabilities.cumsum(1)).sum(1)
    return logits.astype(np.float32), labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_is_found_and_calibrates(temperature):
    logits, labels = drawn(temperature)
    found = fit_temperature(logits, labels)
    assert found.images == len(labels)
    assert found.temperature == pytest.approx(temperature, rel=0.05)

    def error(t):
        p = torch.from_numpy(softmax(logits / t, axis=1))
        return multiclass_calibration_error(p, torch.from_numpy(labels), 4, n_bins=15)

    assert error(found.temperature) < 0.02
    if temperature != 1:
        assert error(1.0) > 3 * error(found.temperature)


def test_it_is_the_minimum_of_the_likelihood():
    """On a grid; with many images Platt's target is 1 to four digits."""
    logits, labels = drawn(1.7)
    grid = np.geomspace(0.5, 5, 400)
    losses = [
        np.mean(logsumexp(logits / t, axis=1) - logits[np.arange(len(labels)), labels] / t)
        for t in grid
    ]
    assert fit_temperature(logits, labels).temperature == pytest.approx(
        grid[np.argmin(losses)], rel=0.02
    )


def test_few_images_that_are_all_right_make_nothing_certain():
    """Ten of ten right: Platt's target is 11/12, and no probability may pass it by much."""
    labels = np.array([0, 1] * 5)
    logits = np.eye(2)[labels] * 4
    found = fit_temperature(logits, labels)
    assert softmax(logits / found.temperature, axis=1).max() == pytest.approx(11 / 12, abs=1e-3)


def test_what_can_not_be_fitted():
    assert fit_temperature(np.zeros((0, 3)), np.zeros(0, int)) is None
    assert fit_temperature(np.array([[1.0, np.inf]]), np.array([0])) is None


def test_the_error_that_a_run_reports(tiny_run):
    """arXiv:1706.04599, eq. 3, from the predictions beside it, whose probabilities have four digits."""
    predictions = read_csv(tiny_run / "predictions_test.csv")
    rows = [(float(row["probability"]), int(row["correct"])) for row in predictions]
    confidence, correct = np.array(rows).T
    gaps = np.bincount((confidence * 15).astype(int).clip(max=14), confidence - correct)
    reported = json.loads((tiny_run / "summary.json").read_text())["test"]["calibrated_ece"]
    assert reported == pytest.approx(np.abs(gaps).sum() / len(rows), abs=1e-3)


# ---- prediction sets, by hand and against MAPIE


@pytest.mark.parametrize(
    ("coverage", "expected"),
    [
        (0.1, 0.9),  # ceil(10 * 0.1) = 1: the smallest score, 0.1
        (0.5, 0.5),
        (0.55, 0.4),  # ceil(5.5) = 6
        (0.7, 0.3),  # 7, although 0.7 * 10 is more than 7 where numbers are binary
        (0.9, 0.1),
        (0.91, 0.0),  # ceil(9.1) = 10 of 9 scores: the quantile is infinite, all classes belong
        (0.999, 0.0),
    ],
)
def test_the_threshold_of_nine_scores(coverage, expected):
    """arXiv:2107.07511, section 1: the score of rank ceil((n + 1) coverage), here of 1 - 0.9 to 1 - 0.1."""
    scores = SetScores(1.0, [0.3, 0.9, 0.1, 0.5, 0.7, 0.2, 0.4, 0.8, 0.6])
    assert scores.threshold(coverage) == expected


def test_a_rank_is_not_raised_by_binary_fractions():
    """0.55 * 100 is 55.00000000000001 there."""
    assert SetScores(1.0, [(99 - i) / 100 for i in range(99)]).threshold(0.55) == 0.45


def test_without_scores_a_set_has_all_classes():
    assert SetScores(1.0, []).threshold(0.01) == 0.0
    assert fit_sets(np.eye(3)[:1], np.array([0])).true_probabilities == []


def test_temperature_and_scores_are_of_different_halves():
    """Without the images of the first half the scores stay as they are but for the temperature."""
    logits, labels = drawn(2.0, n=400)
    sets = fit_sets(logits, labels)
    fitted, scored = np.array_split(np.random.default_rng(0).permutation(400), 2)
    assert not {*fitted} & {*scored}
    assert sets.temperature == fit_temperature(logits[fitted], labels[fitted]).temperature
    p = softmax(logits[scored] / sets.temperature, axis=1)[np.arange(200), labels[scored]]
    assert sets.true_probabilities == pytest.approx(p, abs=1e-6)
    assert len(fit_sets(*drawn(1.0, n=5000)).true_probabilities) == 1000


def test_sets_that_can_not_be_fitted():
    assert fit_sets(np.zeros((0, 3)), np.zeros(0, int)) is None
    assert fit_sets(np.array([[1.0, 2.0], [1.0, np.nan]]), np.array([0, 1])) is None


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_sets_cover_what_they_promise(coverage):
    """Over draws of both image sets the mean lies between coverage and coverage + 1 / (n + 1): Theorem D.1 there."""
    rng, draws, n, m = np.random.default_rng(0), 300, 100, 200
    covered = []
    for _ in range(draws):
        logits = 2 * rng.normal(size=(n + m, 5))
        p = softmax(logits / 3, axis=1)  # the temperature of 1 is wrong
        labels = (p.cumsum(1) > rng.random((n + m, 1))).argmax(1)
        true = softmax(logits, axis=1)[np.arange(n + m), labels]
        covered.append(np.mean(true[n:] >= SetScores(1.0, true[:n].tolist()).threshold(coverage)))
    error = 4 * stats.sem(covered)
    assert coverage - error < np.mean(covered) < coverage + 1 / (n + 1) + error


@pytest.mark.needs("mapie")
@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("n", [20, 99, 400])
def test_sets_are_those_of_mapie(coverage, n):
    """MAPIE's split conformal classifier with the same score, over probabilities at the same temperature."""
    from mapie.classification import SplitConformalClassifier
    from sklearn.base import BaseEstimator, ClassifierMixin

    from moevision.models.convert import set_members

    logits, labels = drawn(1.5, n=n + 300)
    sets = fit_sets(logits[:n], labels[:n])
    scored = np.array_split(np.random.default_rng(0).permutation(n), 2)[1]
    probabilities = softmax(logits / sets.temperature, axis=1)

    class Model(ClassifierMixin, BaseEstimator):
        """Answers rows of the table by their numbers."""

        classes_ = np.arange(4)

        def fit(self, x, y):
            return self

        def predict_proba(self, x):
            return probabilities[x[:, 0]]

        def predict(self, x):
            return probabilities[x[:, 0]].argmax(1)

    if math.ceil((len(scored) + 1) * coverage) > len(scored):  # MAPIE refuses so few
        assert sets.threshold(coverage) == 0
        return
    oracle = SplitConformalClassifier(Model(), confidence_level=coverage, conformity_score="lac")
    oracle.conformalize(scored[:, None], labels[scored])
    _, expected = oracle.predict_set(np.arange(n, n + 300)[:, None])
    members = set_members(torch.from_numpy(logits[n:]), sets, coverage)
    assert (members.numpy() == expected[:, :, 0]).all()


def test_a_set_of_one_class_has_it():
    from moevision.models.convert import set_members

    members = set_members(torch.zeros(3, 1), SetScores(1.0, [1.0, 1.0]), 0.5)
    assert members.tolist() == [[True]] * 3
