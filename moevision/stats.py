"""Uncertainty of results: intervals of accuracies and of differences, detectable differences, calibrated confidence.

Two sources of chance are kept apart. The sample of test images: Wilson's and Tango's intervals and McNemar's exact
test. The randomness of a training: Student's t of one difference per training seed.

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
    Prediction sets: Sadinle, Lei and Wasserman, arXiv:1609.00451; split conformal, arXiv:2107.07511, section 1.

Axes: n images, C classes. Shares are fractions in [0, 1].
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, cast

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.special import expit, logsumexp, softmax
from scipy.stats import binom, binomtest, nct, norm
from scipy.stats import t as student

from moevision.types import Array, Flags, Floats, Ints

LEVEL, POWER = 0.05, 0.8
_Z = float(norm.ppf(1 - LEVEL / 2))
_EDGE = 1 - 1e-12  # largest absolute difference that is tried: at -1 and 1 the score is infinite


# ---- over test images


def accuracy_interval(correct: int, total: int, level: float = 1 - LEVEL) -> tuple[float, float]:
    """Wilson score interval (low, high) for an accuracy of correct / total; a ValueError if that is none."""
    # Newer SciPy takes some of these.
    if not (0 <= correct <= total and total and 0 < level < 1):
        raise ValueError(f"{correct} of {total} at level {level}")
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
        """Standard error of the difference: half the width of the 95 % interval ÷ 1.96."""
        return (self.high - self.low) / 2 / _Z


def paired_difference(correct_a: Flags, correct_b: Flags) -> PairedDifference:
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
    """The difference whose score is z, by root finding: the score falls as the difference grows.

    If no difference has that score, the bound is -1 for a positive z and 1 for a negative one.
    """

    def score_minus_z(difference: float) -> float:
        return paired_score(only_a, only_b, n, difference) - z

    if score_minus_z(-_EDGE) * score_minus_z(_EDGE) > 0:
        return math.copysign(1.0, -z)
    return float(brentq(score_minus_z, -_EDGE, _EDGE, xtol=1e-14))


def paired_macro_difference(
    correct_a: Flags,
    correct_b: Flags,
    labels: Ints,
) -> PairedDifference:
    """Compare the balanced accuracy of two models on the same images: the mean over classes of paired differences.

    The arguments are those of `paired_difference`, and the class `labels` [n].

    The 95 % interval is Price and Bonett's (Computational Statistics & Data Analysis 45, 2004, 449-456) for a mean of
    proportions, here of paired differences as in Agresti and Min (Statistics in Medicine 24, 2005, 729-740): two images
    are added, an equal fraction of them to each class, so that the variance isn't 0 for a class with one image, or in
    which all images agree. The p-value is McNemar's, of the plain accuracies.
    """
    differences = correct_a.astype(float) - correct_b  # [n] -1, 0 or 1
    classes = np.unique(labels)
    added_images = 2 / len(classes)  # to each class; half of them right in one model only

    means, centres, variances = [], [], []
    for label in classes:
        of_class = differences[labels == label]
        adjusted_n = len(of_class) + added_images
        total = of_class.sum()
        adjusted_squares = np.square(of_class).sum() + added_images / 2
        means.append(of_class.mean())
        centres.append(total / adjusted_n)
        variances.append((adjusted_squares - total**2 / adjusted_n) / adjusted_n**2)

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
    if variance <= 0:  # d = 0 without a discordant image, for instance: only the sign is known
        return math.copysign(math.inf, surplus) if surplus else 0.0
    return surplus / math.sqrt(variance)


def detectable_on(images: int, discordant: int) -> float:
    """Smallest difference of two accuracies on the same images that McNemar's exact test finds at 5 % with 80 % power.

    `discordant` is the number of images that exactly one model classified correctly. Their share is assumed to be the
    same whatever the difference, but it is at least the difference. The result is a share in [0, 1]; NaN if no
    difference can be found with so few images.
    """

    def power_minus_target(difference: float) -> float:
        """Power minus 80 %, if a alone is right on a share (share + difference) / 2 of the images."""
        share = max(discordant / images, difference)
        low, high = binom.interval(1 - 1e-9, images, share)
        discordant_counts = np.arange(int(low), int(high) + 1)

        # For each number of discordant images: the most with only b right with which the test is still significant.
        most_only_b = binom.ppf(LEVEL / 2, discordant_counts, 0.5)
        most_only_b -= binom.cdf(most_only_b, discordant_counts, 0.5) > LEVEL / 2
        chance_of_a = min(1.0, (1 + difference / share) / 2)
        power = binom.sf(discordant_counts - most_only_b - 1, discordant_counts, chance_of_a)
        return float(binom.pmf(discordant_counts, images, share) @ power) - POWER

    if power_minus_target(1.0) < 0:
        return math.nan
    return float(brentq(power_minus_target, 1e-9, 1.0))


# ---- over seeds


@dataclass(frozen=True)
class Gap:
    """A mean difference over training seeds, in percentage points, with its 95 % t interval.

    With one seed, or equal differences for all seeds, there is no spread: interval and properties are then NaN.
    """

    mean: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, differences: Sequence[float]) -> Gap:
        """From one difference for each seed; all NaN without any."""
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
        """Smallest mean difference, in points, that as many seeds with this spread find with 80 % power."""
        if math.isnan(self.error):
            return math.nan
        return detectable(self.seeds) * math.sqrt(self.seeds) * self.error


def detectable(seeds: int, level: float = LEVEL) -> float:
    """Mean difference, in SDs of the per-seed difference, that a two-sided paired t-test finds with 80 % power.

    By the noncentral t; the chance of a significant result in the wrong direction, below 1e-4, is left out.
    """
    critical = student.ppf(1 - level / 2, seeds - 1)

    def power_minus_target(difference: float) -> float:
        return float(nct.sf(critical, seeds - 1, difference * math.sqrt(seeds))) - POWER

    return float(brentq(power_minus_target, 1e-6, 100.0))


# ---- confidence


class Calibration(NamedTuple):
    """A temperature, above 1 where the model was too sure of itself, and the images that it was fitted on."""

    temperature: float
    images: int
    thresholds: tuple[
        float, ...
    ] = ()  # [C] where images have several labels, see `best_thresholds`


def fit_temperature(logits: Array, labels: Array) -> Calibration | None:
    """The temperature, 0.05 to 20, of the smallest negative log-likelihood of logits [n, C] and labels [n].

    For multi-hot labels [n, C] the likelihood is of sigmoid(logits / T), and thresholds are chosen on the same images.
    None without images or with logits that aren't finite.
    """
    n, classes = logits.shape
    logits = logits.astype(np.float64)
    if n == 0 or not np.isfinite(logits).all():
        return None

    target = (n + 1) / (n + 2)  # Platt's smoothed probability of the true class
    if labels.ndim == 2:
        expected = np.where(labels > 0, target, 1 - target) * logits  # [n, C]
        normalizer = partial(np.logaddexp, 0)
    else:
        right = logits[np.arange(n), labels]  # [n]
        mean_wrong = (logits.sum(1) - right) / (classes - 1)  # [n] over the other classes
        expected = target * right + (1 - target) * mean_wrong  # [n]
        normalizer = partial(logsumexp, axis=1)

    def loss(log_temperature: float) -> float:
        temperature = np.exp(log_temperature)
        return float(np.mean(normalizer(logits / temperature) - expected / temperature))

    # The loss is convex in 1 / T, so it has one minimum.
    bounds = np.log(0.05), np.log(20.0)
    minimum = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    temperature = float(np.exp(minimum.x))
    thresholds: tuple[float, ...] = ()
    if labels.ndim == 2:
        thresholds = best_thresholds(expit(logits / temperature), labels)
    return Calibration(temperature, n, thresholds)


def best_thresholds(probabilities: Floats, labels: Array) -> tuple[float, ...]:
    """For each label the threshold of the best F1 on probabilities and multi-hot labels [n, C].

    It lies halfway between two probabilities that occur, or between the lowest and 0; of equal F1 the highest is taken.
    0.5 for a label that no image has.
    """
    thresholds = []
    for p, has_label in zip(probabilities.T, labels.T > 0, strict=True):
        order = np.argsort(-p)
        p, has_label = p[order], has_label[order]
        below = np.append(p[1:], 0.0)
        num_given = np.arange(1, len(p) + 1)
        f1 = 2 * has_label.cumsum() / (num_given + has_label.sum())
        f1[p == below] = 0.0  # no threshold parts equal probabilities
        best = f1.argmax()
        threshold = 0.5
        if has_label.any():
            threshold = float((p[best] + below[best]) / 2)
        thresholds.append(threshold)
    return tuple(thresholds)


class SetScores(NamedTuple):
    """What prediction sets are made from: the classes whose probability at `temperature` reaches a threshold.

    An image's score is 1 - the probability of its true class, and temperature and scores come from different images.
    """

    temperature: float
    true_probabilities: Sequence[float]  # [m] of the true class of m images

    def threshold(self, coverage: float) -> float:
        """The probability of a set's classes with which it has the true one with probability `coverage` or more.

        It belongs to the score of rank ceil((m + 1) coverage); of fewer than so many images it is 0: all classes.
        """
        m = len(self.true_probabilities)
        rank = math.ceil(round((m + 1) * coverage, 9))  # 0.55 * 100 isn't 55 in binary
        if rank > m:
            return 0.0
        return sorted(self.true_probabilities, reverse=True)[rank - 1]


def fit_sets(logits: Array, labels: Array) -> SetScores | None:
    """Temperature of one half of images with logits [n, C] and labels [n], drawn at random, and scores of the other.

    None as for `fit_temperature`, and for several labels of an image. At most 1,000 scores are kept.
    """
    if labels.ndim > 1 or fit_temperature(logits, labels) is None:
        return None
    fitted, scored = np.array_split(np.random.default_rng(0).permutation(len(labels)), 2)
    temperature = cast(Calibration, fit_temperature(logits[fitted], labels[fitted])).temperature
    scored = scored[:1000]
    probabilities = softmax(logits[scored] / temperature, axis=1)  # [m, C]
    true_probabilities = probabilities[np.arange(len(scored)), labels[scored]]
    rounded = true_probabilities.astype(np.float64).round(6)
    return SetScores(temperature, rounded.tolist())
