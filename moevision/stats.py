"""How sure a result is: intervals of accuracies and of differences, what a test could detect, calibrated confidence.

Over test images, Wilson's and Tango's intervals and McNemar's exact test say how far a result depends on which images
were drawn, and nothing about the luck of a training. Over seeds: Student's t of one difference per seed.

Sources
    Wilson, JASA 22 (1927) 209-212: the score interval of one proportion.
    Tango, Statistics in Medicine 17 (1998) 891-908: the score interval of a difference of paired proportions. Summed
    over all outcomes, its coverage at 95 % is 95.0 % to 95.7 % for 100 images and falls to 93.0 % for 40 of which 2 %
    and 20 % are right in one model only (enumerated in its test).
    McNemar, Psychometrika 12 (1947) 153-157: a two-sided sign test on the images that one model alone gets right. Its
    power: Duffy, Biometrics 40 (1984) 1005-1015.
    Over seeds, the noncentral t: Cohen, Statistical Power Analysis for the Behavioral Sciences (1988), chapter 2.
    Guo et al., arXiv:1706.04599, 4.2: softmax(logits / T), with the T of the smallest negative log-likelihood.
    Platt (1999): a target of (n + 1) / (n + 2) in the place of 1.

Axes: n images, C classes. Shares are fractions in [0, 1].
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq, minimize_scalar
from scipy.special import logsumexp
from scipy.stats import binom, binomtest, nct, norm
from scipy.stats import t as student

LEVEL, POWER = 0.05, 0.8
_Z = float(norm.ppf(1 - LEVEL / 2))
_EDGE = 1 - 1e-12  # of differences: at -1 and 1 the score is infinite


# ---- over test images


def accuracy_interval(correct: int, total: int, level: float = 1 - LEVEL) -> tuple[float, float]:
    """Wilson score interval (low, high) for an accuracy of correct / total."""
    interval = binomtest(correct, total).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of model a minus accuracy of model b on the same n images."""

    difference: float
    low: float  # lower end of the interval of the difference
    high: float  # upper end
    n: int
    only_a: int  # images that a classifies correctly and b doesn't
    only_b: int  # the other way round
    p_value: float  # exact McNemar test of "both are right equally often"
    level: float = 1 - LEVEL  # of the interval

    @property
    def standard_error(self) -> float:
        """Of the difference: half the 95 % interval ÷ 1.96."""
        return (self.high - self.low) / 2 / _Z


def paired_difference(
    correct_a: npt.NDArray[np.bool_], correct_b: npt.NDArray[np.bool_]
) -> PairedDifference:
    """Compare two models on the same images: difference of accuracies, Tango's 95 % interval, McNemar's p.

    `correct_a` and `correct_b` [n] say whether each model classified image i correctly.
    """
    n = correct_a.size
    only_a = int(np.sum(correct_a & ~correct_b))
    only_b = int(np.sum(~correct_a & correct_b))
    return PairedDifference(
        difference=(only_a - only_b) / n,
        low=_tango_bound(only_a, only_b, n, _Z),
        high=_tango_bound(only_a, only_b, n, -_Z),
        n=n,
        only_a=only_a,
        only_b=only_b,
        p_value=mcnemar_p_value(only_a, only_b),
    )


def _tango_bound(only_a: int, only_b: int, n: int, z: float) -> float:
    """The difference whose score is z. The score falls as the difference grows; -1 or 1 where it nowhere is z."""

    def excess(difference: float) -> float:
        return paired_score(only_a, only_b, n, difference) - z

    if excess(-_EDGE) * excess(_EDGE) > 0:
        return math.copysign(1.0, -z)
    return float(brentq(excess, -_EDGE, _EDGE, xtol=1e-14))


def paired_macro_difference(
    correct_a: npt.NDArray[np.bool_],
    correct_b: npt.NDArray[np.bool_],
    labels: npt.NDArray[np.int64],
) -> PairedDifference:
    """Compare the balanced accuracy of two models on the same images: the mean over classes of paired differences.

    The 95 % interval is Price and Bonett's (Computational Statistics & Data Analysis 45, 2004, 449-456) for a mean of
    proportions, here of paired differences as in Agresti and Min (Statistics in Medicine 24, 2005, 729-740): two images
    are added, shared by the classes, so that a class with one image, or whose images all agree, isn't certain. The
    p-value is McNemar's, of the plain accuracies. Arguments as above, with the class `labels` [n].
    """
    differences = correct_a.astype(float) - correct_b
    classes = np.unique(labels)
    added = 2 / len(classes)  # images per class

    means, centres, variances = [], [], []
    for label in classes:
        of_class = differences[labels == label]
        n = len(of_class) + added
        total = of_class.sum()
        squares = np.square(of_class).sum() + added / 2
        means.append(of_class.mean())
        centres.append(total / n)
        variances.append((squares - total**2 / n) / n**2)

    centre = float(np.mean(centres))
    half = _Z * math.sqrt(sum(variances)) / len(classes)
    return replace(
        paired_difference(correct_a, correct_b),
        difference=float(np.mean(means)),
        low=max(-1.0, centre - half),
        high=min(1.0, centre + half),
    )


def shown_to_differ(pair: PairedDifference, *, balanced: bool) -> bool:
    """Whether two models are shown to differ on these images at 5 %: the rule of `fit`, summary.md and `compare`.

    Accuracies by McNemar's exact test, balanced accuracies by their 95 % interval.
    """
    if balanced:
        return not pair.low <= 0 <= pair.high
    return pair.p_value < LEVEL


def mcnemar_p_value(only_a: int, only_b: int) -> float:
    """Exact two-sided p: a fair coin thrown only_a + only_b times falls at least this unevenly."""
    return min(1.0, 2 * float(binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)))


def paired_score(only_a: int, only_b: int, n: int, difference: float) -> float:
    """Tango's score: (observed - assumed difference) over its standard error under the assumption.

    Under an assumed difference d the discordant cells have probabilities q + d and q; q is their maximum
    likelihood value, the larger root of 2n q^2 + (d (2n - only_a + only_b) - only_a - only_b) q
    - only_b d (1 - d) = 0. The variance of the difference is then (2q + d (1 - d)) / n.
    """
    d = difference
    b = d * (2 * n - only_a + only_b) - only_a - only_b
    discriminant = b * b + 8 * n * only_b * d * (1 - d)
    q = (math.sqrt(max(0.0, discriminant)) - b) / (4 * n)

    surplus = only_a - only_b - n * d
    variance = n * (2 * q + d * (1 - d))
    if variance <= 0:  # d = 0 without a discordant image: the sign is all there is
        return math.copysign(math.inf, surplus) if surplus else 0.0
    return surplus / math.sqrt(variance)


def detectable_on(images: int, discordant: int) -> float:
    """Difference of two accuracies on the same images that McNemar's exact test finds at 5 % with 80 % power.

    `discordant` are those that one model alone classified correctly; their share is taken to stay, and a difference
    above it needs as many as itself. A share in [0, 1]; NaN where so many images can't tell any difference apart.
    """

    def excess(difference: float) -> float:
        """Chance that a is found better, if it alone is right on (share + difference) / 2 of the images, less 80 %."""
        share = max(discordant / images, difference)
        low, high = binom.interval(1 - 1e-9, images, share)
        discordants = np.arange(int(low), int(high) + 1)
        # The most images with only b right that are still significant.
        most_b = binom.ppf(LEVEL / 2, discordants, 0.5)
        most_b -= binom.cdf(most_b, discordants, 0.5) > LEVEL / 2
        chance_of_a = min(1.0, (1 + difference / share) / 2)
        power = binom.sf(discordants - most_b - 1, discordants, chance_of_a)
        return float(binom.pmf(discordants, images, share) @ power) - POWER

    if excess(1.0) < 0:
        return math.nan
    return float(brentq(excess, 1e-9, 1.0))


# ---- over seeds


@dataclass(frozen=True)
class Gap:
    """A mean difference over seeds, in points, with its 95 % t interval.

    The interval is NaN without a spread, which one seed has not, nor have equal differences; so are the properties.
    """

    mean: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, differences: Sequence[float]) -> Gap:
        """Of one difference for each seed; NaN for none."""
        n = len(differences)
        if n == 0:
            return cls(math.nan, math.nan, math.nan, 0)
        mean = statistics.fmean(differences)
        spread = statistics.stdev(differences) if n > 1 else 0.0
        if spread == 0:
            return cls(mean, math.nan, math.nan, n)
        half = float(student.ppf(0.975, n - 1)) * spread / math.sqrt(n)
        return cls(mean, mean - half, mean + half, n)

    @property
    def error(self) -> float:
        """Standard error of the mean, in points."""
        return (self.high - self.mean) / float(student.ppf(0.975, self.seeds - 1))

    @property
    def p_value(self) -> float:
        """Two-sided p of the paired t-test."""
        return 2 * float(student.sf(abs(self.mean) / self.error, self.seeds - 1))

    @property
    def detectable(self) -> float:
        """Points that as many seeds with this spread tell from 0 with 80 % power."""
        if math.isnan(self.error):
            return math.nan
        return detectable(self.seeds) * math.sqrt(self.seeds) * self.error


def detectable(seeds: int, level: float = LEVEL) -> float:
    """Mean difference, in SDs of the per-seed difference, that a two-sided paired t-test finds with 80 % power.

    By the noncentral t; the chance of a significant result in the wrong direction, below 1e-4, is left out.
    """
    critical = student.ppf(1 - level / 2, seeds - 1)

    def excess(difference: float) -> float:
        return float(nct.sf(critical, seeds - 1, difference * math.sqrt(seeds))) - POWER

    return float(brentq(excess, 1e-6, 100.0))


# ---- confidence


class Calibration(NamedTuple):
    """A temperature, above 1 where the model was too sure of itself, and the images that it was fitted on."""

    temperature: float
    images: int


def fit_temperature(logits: npt.NDArray[Any], labels: npt.NDArray[Any]) -> Calibration | None:
    """The temperature, 0.05 to 20, of the smallest negative log-likelihood of logits [n, C] and labels [n].

    None without images or with logits that aren't finite.
    """
    n, classes = logits.shape
    logits = logits.astype(np.float64)
    if n == 0 or not np.isfinite(logits).all():
        return None

    right = logits[np.arange(n), labels]  # [n]
    mean_wrong = (logits.sum(1) - right) / (classes - 1)  # [n] over the other classes
    target = (n + 1) / (n + 2)
    expected = target * right + (1 - target) * mean_wrong  # [n]

    def loss(log_temperature: float) -> float:
        temperature = np.exp(log_temperature)
        return float(np.mean(logsumexp(logits / temperature, axis=1) - expected / temperature))

    # Convex in 1 / T, so there is one minimum.
    bounds = np.log(0.05), np.log(20.0)
    minimum = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return Calibration(float(np.exp(minimum.x)), n)
