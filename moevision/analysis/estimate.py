"""Excess information with its interval, from a plug-in value, its null, and one influence per image.

For small effects plug-in mutual information is a quadratic form |x|² of Gaussian deviations x whose mean has length
√θ. Then

- its mean is θ + b, and its variance v0 + κ θ, with b and v0 the mean and the variance of the null (θ = 0);
- the delta method over images estimates 4 xᵀΣx, which is κ |x|²: its variance over the plug-in estimates κ without
  the bias that the noise in x gives to each of them alone.

The interval holds every θ whose score ``(estimate - θ)² / (v0 + κ θ)`` is at most z²: the form of Wilson's interval of
a proportion, in closed form as well. Unlike an interval ``estimate ± z · standard error`` it doesn't become too short
where the estimate happens to be small, and at θ = 0 it agrees with a test against the null. A percentile bootstrap
takes the noise of the image sample for signal and hardly ever covers 0 with many classes.
`benchmarks/analysis/coverage.py` measures them all.

The null's mean overstates the bias under an effect: shuffled images differ by their classes too, images of one class
don't. The second-order delta method gives the difference (`bias_surplus`), but in sparse tables it can't be trusted
far, so one end of the interval is taken with it and the other without. It matters for few images per class.

Sources: Wilson, JASA 22 (1927) 209-212; van der Vaart, Asymptotic Statistics (1998), chapters 3 and 20 (delta method,
influence functions).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np

from moevision.analysis.contingency import Floats


@dataclass(frozen=True)
class Estimate:
    """Excess mutual information of one layer, over images.

    Attributes:
        value_bits: plug-in mutual information minus the mean of its null.
        low: lower end of the 95 % interval of the true value, in bits; may be below 0, which means "not told from 0".
        high: upper end.
        null_mean: mean of the plug-in under the null, in bits: what chance alone gives with this number of images.
        null_sd: its standard deviation.
        p_value: one-sided, ``(1 + null values at least as large) / (1 + permutations)``.
        share_of_entropy: `value_bits` over the entropy of what the experts are asked about.
        n_images: images that the estimate rests on.
    """

    value_bits: float
    low: float
    high: float
    null_mean: float
    null_sd: float
    p_value: float
    share_of_entropy: float
    n_images: int

    def to_json(self) -> dict[str, float | int]:
        """The fields as JSON primitives."""
        return asdict(self)


def excess_estimate(
    plug_in: float,
    null: Floats,
    influence: Floats,
    *,
    entropy: float,
    keeps_effect: bool = False,
    bias_surplus: float = 0.0,
    num_means: int = 1,
    level: float = 0.95,
) -> Estimate:
    """The excess of a plug-in over its null, with its interval.

    Args:
        plug_in: observed plug-in information in bits.
        null: [R] plug-in values under the null.
        influence: [I] what each image adds to the plug-in to first order, in bits; centred here.
        entropy: of what the experts are asked about, in bits.
        keeps_effect: the null keeps a part of the effect, so that it has a first-order variance of its own; the
            interval is then a normal one.
        bias_surplus: by how many bits the null's mean overstates the bias of the plug-in.
        num_means: how many means the images were compared with (the classes), for the degrees of freedom.
        level: of the interval.
    """
    mean, variance = float(null.mean()), float(null.var(ddof=1))
    excess, n = plug_in - mean, len(influence)
    freedom = max(1, n - num_means)
    delta_variance = float(np.square(influence - influence.mean()).sum() * n / freedom)
    z = NormalDist().inv_cdf((1 + level) / 2)
    z *= 1 + (z * z + 1) / (4 * freedom)  # Student's quantile (Abramowitz and Stegun 26.7.5, first term)
    if keeps_effect:
        half = z * math.sqrt(max(variance, delta_variance))
        low, high = excess - half, excess + half
    else:
        kappa = delta_variance / plug_in if plug_in > 0 else 0.0
        low = score_interval(excess + min(0.0, bias_surplus), variance, kappa, z)[0]
        high = score_interval(excess + max(0.0, bias_surplus), variance, kappa, z)[1]
    # A difference below the rounding of the sums is no evidence.
    p_value = (1 + int((null >= plug_in - 1e-9).sum())) / (1 + len(null))
    share = excess / entropy if entropy > 0 else 0.0
    return Estimate(excess, low, high, mean, math.sqrt(variance), p_value, share, n)


def score_interval(excess: float, variance: float, kappa: float, z: float) -> tuple[float, float]:
    """All θ with (excess - θ)² <= z² (variance + κ θ), the roots of a quadratic equation.

    Where the estimate is so far below 0 that no θ fits, both ends are the θ that fits best.
    """
    centre = excess + z * z * kappa / 2
    half = math.sqrt(max(0.0, z * z * (kappa * excess + z * z * kappa * kappa / 4 + variance)))
    return centre - half, centre + half
