"""What the scripts of frozen studies share: SciPy and the standard library alone, no other code of the project."""

import json
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file, a line each."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def points(share: float, digits: int = 1) -> str:
    """A difference in percentage points, with its sign."""
    return f"{100 * share:+.{digits}f}".replace("-", "−")


def number(value: float, digits: int) -> str:
    """With a true minus sign, and none in front of 0."""
    text = f"{value:.{digits}f}"
    return text.replace("-", "−" if float(text) else "")


def span(values: list[float], digits: int) -> str:
    """The least and the most of them; one number where both look alike."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def standard_error(values: list[float]) -> float:
    """Of their mean."""
    return stdev(values) / math.sqrt(len(values))


def half_interval(values: list[float], level: float = 0.05) -> float:
    """Half of Student's interval of the mean, which misses with this probability."""
    return float(student.ppf(1 - level / 2, len(values) - 1)) * standard_error(values)


def interval(values: list[float], level: float = 0.05) -> tuple[float, float, float]:
    """The mean, and the ends of its interval."""
    mean, half = fmean(values), half_interval(values, level)
    return mean, mean - half, mean + half


def with_interval(values: list[float], digits: int = 1) -> str:
    """The same in points: `+1.6 (+0.2 to +2.9)`."""
    mean, low, high = (points(value, digits) for value in interval(values))
    return f"{mean} ({low} to {high})"


def p_value(values: list[float]) -> float:
    """Two-sided p of a mean of 0."""
    if standard_error(values) == 0:
        return float(fmean(values) == 0)
    return 2 * float(student.sf(abs(fmean(values)) / standard_error(values), len(values) - 1))


def holm(p_values: dict[Any, float]) -> dict[Any, float]:
    """The p adjusted by Holm (1979): the smallest times their number, the next times one less, never falling."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def verdict(mean: float, p: float) -> str:
    """What is shown of a difference."""
    if p >= 0.05:
        return "not told apart"
    return "above" if mean > 0 else "below"
