"""How sure a measured accuracy is: intervals for one model and for two models on the same images.

Sources
    Wilson, JASA 22 (1927) 209-212: the score interval of one proportion; honest near 0 % and 100 % too.
    Tango, Statistics in Medicine 17 (1998) 891-908: the score interval of a difference of paired proportions.
    McNemar, Psychometrika 12 (1947) 153-157: only images that one model gets right and the other wrong tell
    the two apart; the exact p-value is a two-sided sign test on them.

Tango's interval is asymptotic: summed over all outcomes, its coverage at 95 % is 95.0 % to 95.7 % for 100
images and falls to 93.0 % for 40 of which 2 % and 20 % are right in one model only (enumerated in its test).

Both intervals say how far the result depends on which test images were drawn. They say nothing about the
luck of one training run: another seed moves the accuracy as well, and only more seeds can show how much.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from moevision.errors import UserError

_BISECTION_STEPS = 60  # halves [-1, 1] below the spacing of doubles


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of model a minus accuracy of model b on the same n images."""

    difference: float
    low: float
    high: float
    n: int
    only_a: int
    """Images that a classifies correctly and b doesn't."""
    only_b: int
    p_value: float
    """Exact McNemar test of "both are right equally often"."""
    level: float = 0.95


def accuracy_interval(correct: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval for an accuracy of correct / total.

    It holds the accuracies p that `correct` is at most z standard errors away from, with the standard error
    taken at p itself: |correct/total - p| <= z sqrt(p (1 - p) / total).

    Returns:
        (low, high) as fractions in [0, 1].

    Raises:
        UserError: there is no image, or `correct` isn't between 0 and `total`.
    """
    if total < 1 or not 0 <= correct <= total:
        raise UserError(f"an accuracy needs 0 <= correct <= total and a total of at least 1, got {correct} of {total}")
    z = _normal_quantile(level)
    share = correct / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    # At 0 % and 100 % the bound is exact; rounding must not push it off.
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == total else min(1.0, centre + half)
    return low, high


def paired_difference(
    correct_a: npt.NDArray[np.bool_], correct_b: npt.NDArray[np.bool_], level: float = 0.95
) -> PairedDifference:
    """Compare two models on the same images: difference of accuracies, Tango's interval, McNemar's p.

    Args:
        correct_a: [n] whether model a classified image i correctly.
        correct_b: [n] the same for model b, in the same order of images.
        level: of the interval.

    Raises:
        UserError: the two aren't non-empty boolean vectors of one length.
    """
    a, b = np.asarray(correct_a), np.asarray(correct_b)
    if a.dtype != np.bool_ or b.dtype != np.bool_ or a.ndim != 1 or a.shape != b.shape or a.size == 0:
        raise UserError(
            "a paired comparison needs two boolean vectors over the same test images, "
            f"got {a.dtype} {a.shape} and {b.dtype} {b.shape}"
        )
    n, only_a, only_b = a.size, int(np.sum(a & ~b)), int(np.sum(~a & b))
    low, high = _tango_interval(only_a, only_b, n, _normal_quantile(level))
    p_value = mcnemar_p_value(only_a, only_b)
    return PairedDifference((only_a - only_b) / n, low, high, n, only_a, only_b, p_value, level)


def mcnemar_p_value(only_a: int, only_b: int) -> float:
    """Exact two-sided p: a fair coin thrown only_a + only_b times falls at least this unevenly."""
    throws, fewer = int(only_a + only_b), int(min(only_a, only_b))
    tail = term = 1  # C(throws, 0); each next C(throws, i + 1) follows from the one before
    for i in range(fewer):
        term = term * (throws - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << throws))  # whole numbers until here: exact for any number of images


def _tango_interval(only_a: int, only_b: int, n: int, z: float) -> tuple[float, float]:
    """All differences that the score test doesn't reject at z; the score falls as the difference grows."""
    estimate = (only_a - only_b) / n
    return (
        _bisect(only_a, only_b, n, z, -1.0, estimate),
        _bisect(only_a, only_b, n, -z, estimate, 1.0),
    )


def _bisect(only_a: int, only_b: int, n: int, target: float, low: float, high: float) -> float:
    for _ in range(_BISECTION_STEPS):
        middle = (low + high) / 2
        if paired_score(only_a, only_b, n, middle) > target:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def paired_score(only_a: int, only_b: int, n: int, difference: float) -> float:
    """Tango's score: (observed - assumed difference) over its standard error under the assumption.

    Under an assumed difference d the discordant cells have probabilities q + d and q; q is their maximum
    likelihood value, the larger root of 2n q^2 + (d (2n - only_a + only_b) - only_a - only_b) q
    - only_b d (1 - d) = 0. The variance of the difference is then (2q + d (1 - d)) / n.
    """
    a = 2 * n
    b = difference * (2 * n - only_a + only_b) - only_a - only_b
    c = -only_b * difference * (1 - difference)
    q = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    surplus = only_a - only_b - n * difference
    variance = n * (2 * q + difference * (1 - difference))
    if variance <= 0:  # d = 0 without a discordant image, and d = +-1: the sign is all there is
        return math.copysign(math.inf, surplus) if surplus else 0.0
    return surplus / math.sqrt(variance)


def _normal_quantile(level: float) -> float:
    if not 0 < level < 1:
        raise UserError(f"the level of an interval lies between 0 and 1, e.g. 0.95; got {level}")
    return NormalDist().inv_cdf((1 + level) / 2)
