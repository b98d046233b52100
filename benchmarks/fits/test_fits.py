"""The study of fits: its table by hand, and a head that finds what is there."""

import numpy as np

from benchmarks.fits import TESTED, head, parts_of


def test_the_table_by_hand() -> None:
    """Per seed 2, 0 and 1 points: their mean is 1, their deviation 1, and t of two degrees of freedom 4.303."""
    right = {"crop": (80, 80, 80), "pad": (82, 80, 81)}
    records = [
        {"fit": fit, "seed": seed, "correct": correct, "total": 100}
        for fit, each in right.items()
        for seed, correct in enumerate(each)
    ]
    (found,) = parts_of(records)
    assert f"| `pad` | 82.0% | 80.0% | 81.0% | 81.0% | +1.00 ± {4.303 / 3**0.5:.2f} |" in found


def test_a_head_finds_what_features_hold() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, TESTED + 200)
    features = rng.normal(size=(len(labels), 4))
    features[:, 2] += 20 * labels
    assert head(features, labels, 0) == (TESTED, TESTED)
    correct, _ = head(features, rng.permutation(labels), 0)
    assert 0.4 < correct / TESTED < 0.6
