"""The one rule by which every study here calls a difference of accuracy.

A seed fixes initial weights, order and augmentation for all rows alike, so rows are compared seed by seed: Student's t
of the gaps, from that pair's own spread alone, since rows differ in theirs. Intervals are of 95 %, each for itself. The
verdict is Holm's over all contrasts of a list: if no row differed, the chance of any "above" or "below" in it would be
5 %. It covers the luck of training, not the choice of test images, which all rows share.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student

from moevision.train.report import points

Accuracies = Mapping[str, Mapping[int, float]]
"""Row -> seed -> test accuracy."""


@dataclass(frozen=True)
class Contrast:
    """One row minus another.

    Attributes:
        first, second: names of the rows.
        gaps: difference of accuracy for every seed that both have.
        p: two-sided, adjusted by Holm over the list that this contrast is in; NaN with fewer than two seeds.
    """

    first: str
    second: str
    gaps: Sequence[float]
    p: float = math.nan

    @property
    def mean(self) -> float:
        """Mean gap."""
        return statistics.fmean(self.gaps)

    @property
    def half(self) -> float:
        """Half the width of the 95 % interval; infinite with fewer than two seeds."""
        return float(student.ppf(0.975, len(self.gaps) - 1)) * self.error if len(self.gaps) > 1 else math.inf

    @property
    def error(self) -> float:
        """Standard error of the mean gap."""
        return statistics.stdev(self.gaps) / math.sqrt(len(self.gaps))

    @property
    def own_p(self) -> float:
        """Two-sided p of this contrast alone."""
        if len(self.gaps) < 2:
            return math.nan
        if self.error == 0:
            return float(self.mean == 0)
        return 2 * float(student.sf(abs(self.mean) / self.error, len(self.gaps) - 1))

    @property
    def verdict(self) -> str:
        """`above`, `below`, or `not told apart`, which is not the same as equal."""
        return "not told apart" if not self.p < 0.05 else "above" if self.mean > 0 else "below"

    @property
    def interval(self) -> str:
        """`+1.6 (+0.2 to +2.9)`, in points."""
        bounds = f" ({points(self.mean - self.half)} to {points(self.mean + self.half)})" if self.gaps[1:] else ""
        return points(self.mean) + bounds

    @property
    def sentence(self) -> str:
        """Everything about it."""
        return (
            f"“{self.first}” minus “{self.second}”: {', '.join(points(gap) for gap in self.gaps)} points by seed, mean "
            f"{self.interval}, p = {self.p:.3f}: {self.verdict}."
        )


def contrasts(accuracies: Accuracies, pairs: Sequence[tuple[str, str]]) -> list[Contrast]:
    """The differences of these pairs of rows, judged together; pairs without a common seed are left out."""
    found = []
    for first, second in pairs:
        own, other = accuracies.get(first, {}), accuracies.get(second, {})
        if gaps := [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]:
            found.append(Contrast(first, second, gaps))
    adjusted = holm([contrast.own_p for contrast in found])
    return [
        Contrast(contrast.first, contrast.second, contrast.gaps, p) for contrast, p in zip(found, adjusted, strict=True)
    ]


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: the chance of any false verdict over the list stays below the level.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979) 65-70. NaN (nothing was tested) is left as it is.
    """
    order = sorted((place for place, p in enumerate(ps) if not math.isnan(p)), key=lambda place: ps[place])
    adjusted, largest = list(ps), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * ps[place]))
        adjusted[place] = largest
    return adjusted
