"""Differences of accuracy between trainings: their t interval over seeds, and which differences a test could detect.

Two sources of chance, never mixed here. Over seeds: Student's t of one difference per seed. Over test images: McNemar's
exact test and Tango's interval, see `moevision.train.report`.

Sources of what is detectable
    Over seeds, the noncentral t: Cohen, Statistical Power Analysis for the Behavioral Sciences (1988), chapter 2.
    Over images, McNemar's exact test summed over all numbers of discordant images (those that one model alone
    classifies correctly): Duffy, Biometrics 40 (1984) 1005-1015.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom, nct
from scipy.stats import t as student

LEVEL, POWER = 0.05, 0.8


@dataclass(frozen=True)
class Gap:
    """A mean difference over seeds, in points, with its 95 % t interval.

    The interval is NaN without a spread, which one seed has not, nor have equal differences.
    """

    mean: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, differences: Sequence[float]) -> Gap:
        """Of one difference for each seed; NaN for none."""
        n = len(differences)
        mean = statistics.fmean(differences) if n else math.nan
        spread = statistics.stdev(differences) if n > 1 else 0.0
        half = float(student.ppf(0.975, n - 1)) * spread / math.sqrt(n) if spread > 0 else math.nan
        return cls(mean, mean - half, mean + half, n)

    @property
    def error(self) -> float:
        """Standard error of the mean, in points; NaN without a spread."""
        half = self.high - self.mean
        return math.nan if math.isnan(half) else half / float(student.ppf(0.975, self.seeds - 1))

    @property
    def p_value(self) -> float:
        """Two-sided p of the paired t-test; NaN without a spread."""
        error = self.error
        return math.nan if math.isnan(error) else 2 * float(student.sf(abs(self.mean) / error, self.seeds - 1))

    @property
    def detectable(self) -> float:
        """Points that as many seeds with this spread tell from 0 with 80 % power; NaN without a spread."""
        error = self.error
        return math.nan if math.isnan(error) else detectable(self.seeds) * math.sqrt(self.seeds) * error

    @property
    def text(self) -> str:
        """`-0.40 (-1.20 to +0.40)`."""
        if math.isnan(self.mean):
            return "-"
        return f"{self.mean:+.2f}" + ("" if math.isnan(self.low) else f" ({self.low:+.2f} to {self.high:+.2f})")


def detectable(seeds: int, level: float = LEVEL, power: float = POWER) -> float:
    """Mean difference, in SDs of the per-seed difference, that a two-sided paired t-test finds with this power.

    By the noncentral t; the chance of a significant result in the wrong direction, below 1e-4, is left out.
    """
    critical = student.ppf(1 - level / 2, seeds - 1)
    return float(brentq(lambda d: nct.sf(critical, seeds - 1, d * math.sqrt(seeds)) - power, 1e-6, 100.0))


def detectable_on(images: int, discordant: int, level: float = LEVEL, power: float = POWER) -> float:
    """Difference of two accuracies on the same images that McNemar's exact two-sided test finds with this power.

    Args:
        images: n.
        discordant: those that one model alone classified correctly. Their share is taken to stay; a difference above
            it needs as many as itself.
        level: of the test.
        power: chance of a significant result in the right direction.

    Returns:
        A share in [0, 1]; NaN where n images can't tell any difference apart.
    """

    def excess(difference: float) -> float:
        share = max(discordant / images, difference)
        return _mcnemar_power(images, share, difference, level) - power

    return float(brentq(excess, 1e-9, 1.0)) if excess(1.0) >= 0 else math.nan


def _mcnemar_power(images: int, share: float, difference: float, level: float) -> float:
    """Chance that model a is found better, if only a is right on (share + difference) / 2 of the images."""
    low, high = binom.interval(1 - 1e-9, images, share)
    discordant = np.arange(int(low), int(high) + 1)
    fewest = binom.ppf(level / 2, discordant, 0.5)  # the most images with only b right that are still significant
    fewest -= binom.cdf(fewest, discordant, 0.5) > level / 2
    found = binom.sf(discordant - fewest - 1, discordant, min(1.0, (1 + difference / share) / 2))
    return float(binom.pmf(discordant, images, share) @ found)
