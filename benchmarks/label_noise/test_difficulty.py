"""How much of a value a regression explains, by hand."""

import numpy as np
import pytest

from benchmarks.label_noise.difficulty import directions, told


def test_explained_variance_by_hand():
    """Of values x + e with x in {0, 1} and e = ±1 apart from it, x explains .25 of 1.25."""
    x, error = np.array([0, 0, 1, 1.0]), np.array([1, -1, 1, -1.0])
    assert told(x + error, x[:, None]) == pytest.approx(0.25 / 1.25)
    shares = np.column_stack([x, 1 - x])  # which sum to 1, as those of a layer do
    assert told(x + error, shares) == pytest.approx(0.2)


def test_the_first_directions_have_the_most_variance():
    features = np.random.default_rng(0).normal(size=(200, 3)) * [1, 10, 3]
    found = directions(features, 2)
    assert found.shape == (200, 2)
    assert found.var(0) == pytest.approx(np.sort(np.linalg.eigvalsh(np.cov(features.T, bias=True)))[:0:-1])
