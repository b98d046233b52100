"""How often intervals of excess information hold the true value, by simulation with dependent patches.

    OMP_NUM_THREADS=1 python -m benchmarks coverage --out benchmarks/analysis/coverage.json

`score` is the interval of `moevision.analysis`; the others are what one would try first:
`percentile` (image bootstrap of the excess), `basic` (the bootstrap of the plug-in reflected at the plug-in), and
`normal` (excess ± 1.96 standard errors of the delta method). Every simulation draws a new truth of the given bits.

- class: images have their own expert shares, Dirichlet around their class's with `concentration`; 128 choices each.
- part: 4 x 4 patches; the choices of an image hang together through a common factor (Gaussian copula, correlation 0.5),
  and so do its parts, while every patch keeps exactly its marginal distribution.

The record's rows `class_given_position` and `position` are of two estimates that the package no longer has.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import track
from scipy.stats import norm

from benchmarks.harness import about, argument_parser
from benchmarks.lines import write_lines
from moevision.analysis.information import (
    class_information,
    mutual_information_bits,
    part_information,
)

EXPERTS, PATCHES, PARTS = 8, 16, 5
Array = np.ndarray


@dataclass(frozen=True)
class Setting:
    """One cell of the study."""

    about: str
    images: int
    classes: int
    concentration: float
    bits: float


def settings(about: tuple[str, ...], images: tuple[int, ...]) -> Iterator[Setting]:
    """All cells."""
    for what in about:
        for count in images:
            for bits in (0.0, 0.05, 0.25):
                for classes in (2, 8) if what == "class" else (0,):
                    for concentration in (3.0, 30.0) if what == "class" else (0.0,):
                        yield Setting(what, count, classes, concentration, bits)


def at_bits(information: Callable[[float], float], bits: float) -> float:
    """The strength in [0, 1] at which an increasing function reaches `bits`; nan if it doesn't."""
    low, high = 0.0, 1.0
    if information(1.0) <= bits:
        return float("nan")
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if information(middle) < bits else (low, middle)
    return low


def profiles(rng: np.random.Generator, values: int, bits: float) -> Array:
    """[V, E] expert shares of equally frequent values with that mutual information."""
    while True:
        common = rng.dirichlet(np.full(EXPERTS, 2.0))
        own = np.eye(EXPERTS)[rng.permutation(EXPERTS)[np.arange(values) % EXPERTS]]
        own = (own + rng.dirichlet(np.ones(EXPERTS), size=values)) / 2
        strength = at_bits(
            lambda t, c=common, o=own: mutual_information_bits((1 - t) * c + t * o), bits
        )
        if not np.isnan(strength):
            return (1 - strength) * common + strength * own


def correlated_choices(rng: np.random.Generator, shares: Array) -> Array:
    """[I, P] draws with exactly the marginals shares [I, P, V], dependent within an image."""
    images, patches, _ = shares.shape
    factor = rng.normal(size=(images, 1)) * 0.5**0.5 + rng.normal(size=(images, patches)) * 0.5**0.5
    drawn = norm.cdf(factor)[..., None] > np.cumsum(shares, -1)[..., :-1]
    return drawn.sum(-1)


def one_hot(choices: Array, size: int) -> Array:
    """[..., size]."""
    return (choices[..., None] == np.arange(size)).astype(np.float32)


def draw_parts(rng: np.random.Generator, setting: Setting) -> tuple[Array, Array, float]:
    """Routing maps, part maps and the true excess of I(expert; part) over pairs of different images."""
    prior = rng.dirichlet(np.full(PARTS, 1.0), size=PATCHES)  # parts have their places
    common, own = (
        rng.dirichlet(np.full(EXPERTS, 2.0)),
        np.eye(EXPERTS)[rng.permutation(EXPERTS)[:PARTS]],
    )

    def excess(strength: float) -> float:
        share = (1 - strength) * common + strength * own
        together = prior.sum(0)[:, None] * share
        return float(
            mutual_information_bits(together) - mutual_information_bits(prior.T @ (prior @ share))
        )

    strength = at_bits(excess, setting.bits)
    if np.isnan(strength):
        return draw_parts(rng, setting)
    parts = correlated_choices(rng, np.broadcast_to(prior, (setting.images, *prior.shape)))
    share = (1 - strength) * common + strength * own
    return one_hot(correlated_choices(rng, share[parts]), EXPERTS), parts, excess(strength)


def draw(rng: np.random.Generator, setting: Setting) -> tuple[Array, Array]:
    """Routing maps [I, 1, E] and labels [I] of one simulated data set."""
    labels = np.arange(setting.images) % setting.classes
    shape = setting.concentration * profiles(rng, setting.classes, setting.bits)[labels] + 1e-6
    gamma = rng.standard_gamma(shape) + 1e-12
    return rng.multinomial(128, gamma / gamma.sum(1, keepdims=True))[:, None, :].astype(
        np.float32
    ), labels


def bootstrap(rng: np.random.Generator, counts: Array, labels: Array, replicates: int) -> Array:
    """[B] plug-in I(expert; class) of images drawn with replacement; counts [I, E]."""
    images, classes = len(counts), labels.max() + 1
    drawn = (
        rng.integers(images, size=(replicates, images)) + images * np.arange(replicates)[:, None]
    )
    weight = np.bincount(drawn.ravel(), minlength=replicates * images).reshape(replicates, images)
    by_class = np.zeros((images, classes, EXPERTS), np.float32)
    by_class[np.arange(images), labels] = counts
    tables = weight.astype(np.float32) @ by_class.reshape(images, -1)
    return mutual_information_bits(tables.reshape(replicates, classes, EXPERTS))


def simulate(
    rng: np.random.Generator, setting: Setting, seed: int
) -> tuple[float, dict[str, tuple[float, float]], float]:
    """The true value, the intervals of each method and the p-value."""
    if setting.about == "part":
        maps, parts, truth = draw_parts(rng, setting)
        estimate = part_information(maps, parts, seed=seed)
        return truth, {"score": (estimate.low, estimate.high)}, estimate.p_value
    maps, labels = draw(rng, setting)
    estimate = class_information(maps, labels, seed=seed)
    plug_in = estimate.value_bits + estimate.null_mean
    low, high = np.quantile(bootstrap(rng, maps[:, 0], labels, 400), (0.025, 0.975))
    half = 1.96 * delta_se(maps[:, 0], labels, plug_in)
    intervals = {
        "score": (estimate.low, estimate.high),
        "percentile": (low - estimate.null_mean, high - estimate.null_mean),
        "basic": (2 * plug_in - high, 2 * plug_in - low),
        "normal": (estimate.value_bits - half, estimate.value_bits + half),
    }
    return setting.bits, intervals, estimate.p_value


def delta_se(counts: Array, labels: Array, plug_in: float) -> float:
    """Standard error of the plug-in by the delta method over images; counts [I, E]."""
    table = one_hot(labels, labels.max() + 1).T @ counts
    ratio = table * table.sum() / (table.sum(1, keepdims=True) * table.sum(0))
    bits = np.log2(np.where(ratio > 0, ratio, 1.0))
    return float(np.sqrt(np.square((counts * (bits[labels] - plug_in)).sum(1) / table.sum()).sum()))


def study(setting: Setting, simulations: int) -> dict[str, object]:
    """Coverage, misses on either side and median width of each method."""
    rng = np.random.default_rng(
        [simulations, setting.images, setting.classes, int(1000 * setting.bits)]
    )
    below: dict[str, list[bool]] = {}
    above: dict[str, list[bool]] = {}
    widths: dict[str, list[float]] = {}
    rejected = 0
    for seed in range(simulations):
        truth, intervals, p_value = simulate(rng, setting, seed)
        rejected += p_value <= 0.05
        for method, (low, high) in intervals.items():
            below.setdefault(method, []).append(high < truth - 1e-9)
            above.setdefault(method, []).append(low > truth + 1e-9)
            widths.setdefault(method, []).append(high - low)
    methods = {
        method: {
            "coverage": round(1 - float(np.mean(below[method]) + np.mean(above[method])), 4),
            "interval_below": round(float(np.mean(below[method])), 4),
            "interval_above": round(float(np.mean(above[method])), 4),
            "median_width_bits": round(float(np.median(widths[method])), 4),
        }
        for method in below
    }
    return {
        **vars(setting),
        "simulations": simulations,
        "rejected_at_5_percent": rejected / simulations,
        "methods": methods,
    }


def main() -> None:
    """Run the study, print and write it."""
    parser = argument_parser("coverage", __doc__)
    add = parser.add_argument
    add("--simulations", type=int, default=1000)
    add("--about", nargs="+", default=["class", "part"])
    add("--images", nargs="+", type=int, default=[200, 1000])
    add("--out", type=Path)
    options = parser.parse_args()
    origin, start = about(), time.perf_counter()
    cells = list(settings(tuple(options.about), tuple(options.images)))
    rows = []
    for cell in track(cells, "coverage"):
        # The bootstraps, which only class has, cost more than everything else.
        rows.append(study(cell, options.simulations * (3 if cell.about == "class" else 5) // 5))
        print(json.dumps(rows[-1]), flush=True)
    lowest = {
        m: min(r["methods"][m]["coverage"] for r in rows if m in r["methods"])
        for m in rows[0]["methods"]
    }
    result = {
        **origin,
        "seconds": round(time.perf_counter() - start),
        "lowest_coverage": lowest,
        "rows": rows,
    }
    if options.out:
        write_lines(options.out, result)
