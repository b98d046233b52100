"""Of the accuracy of a small ViT on CIFAR-10, what comes from its convolutional stem, what from width and depth?

    python benchmarks/stem/recompute.py

prints every measured number of README.md, from record.json. The code that ran the study is benchmarks/stem of commit
541de1cc; it has left the tree.

The record has 24 runs: two stems, two widths and two depths, each combination with three seeds. A factor's effect is
the mean difference over the four combinations of the other two, seed by seed; its interval is Student's t over seeds,
and the three p are adjusted by Holm.
"""

import json
import statistics
from pathlib import Path

from scipy.stats import ttest_1samp

FACTORS = {"stem": ("patch", "wide_stages"), "embed_dim": (64, 128), "depth": (2, 4)}
"""Argument of the model -> its two values; the effect is the second minus the first."""


def runs_with(runs: list[dict], **arguments: object) -> list[dict]:
    """The runs whose model has these arguments."""
    return [run for run in runs if all(run[name] == value for name, value in arguments.items())]


def mean_accuracy(runs: list[dict]) -> float:
    """Mean test accuracy in per cent."""
    return 100 * statistics.fmean(run["test_top1"] for run in runs)


def effect_by_seed(runs: list[dict], factor: str) -> list[float]:
    """For each seed the mean accuracy with the factor's second value minus that with its first."""
    first, second = FACTORS[factor]
    seeds = sorted({run["seed"] for run in runs})
    return [
        mean_accuracy(runs_with(runs, seed=seed, **{factor: second}))
        - mean_accuracy(runs_with(runs, seed=seed, **{factor: first}))
        for seed in seeds
    ]


def with_interval(differences: list[float]) -> str:
    """Their mean with its 95 % interval, in points."""
    low, high = ttest_1samp(differences, 0).confidence_interval(0.95)
    return f"{statistics.fmean(differences):+.1f} ({low:+.1f} to {high:+.1f})"


def effect_table(effects: dict[str, list[float]]) -> list[str]:
    """A line for each factor: effect, p adjusted by Holm (1979), verdict."""
    own_p = {factor: ttest_1samp(gaps, 0).pvalue for factor, gaps in effects.items()}
    adjusted, largest = {}, 0.0
    for rank, factor in enumerate(sorted(own_p, key=own_p.__getitem__)):
        largest = max(largest, min(1.0, (len(own_p) - rank) * own_p[factor]))
        adjusted[factor] = largest
    lines = []
    for factor, gaps in effects.items():
        first, second = FACTORS[factor]
        p = adjusted[factor]
        shown_p = "below 0.001" if p < 0.0005 else f"{p:.3f}"
        side = "above" if statistics.fmean(gaps) > 0 else "below"
        verdict = side if p < 0.05 else "not told apart"
        name = f"`{factor} {second}` − `{factor} {first}`"
        lines.append(f"| {name} | {with_interval(gaps)} | {shown_p} | {verdict} |")
    return lines


def flops_of(run: dict) -> float:
    """FLOPs of one image, those of the routers too, in millions."""
    return (run["flops_per_image"] + run["router_flops_per_image"]) / 1e6


def model_table(runs: list[dict]) -> list[str]:
    """A line for each model: accuracy over seeds, FLOPs, parameters."""
    lines = []
    for run in runs_with(runs, seed=0):
        model = {name: run[name] for name in FACTORS}
        accuracies = [100 * each["test_top1"] for each in runs_with(runs, **model)]
        by_seed = ", ".join(f"{accuracy:.1f}" for accuracy in accuracies)
        lines.append(
            f"| `{run['stem']}` | {run['embed_dim']} | {run['depth']} "
            f"| {statistics.fmean(accuracies):.1f} ± {statistics.stdev(accuracies):.1f} | {by_seed} "
            f"| {flops_of(run):.2f} M "
            f"| {run['active_parameters'] / 1e6:.2f} M of {run['total_parameters'] / 1e6:.2f} M |"
        )
    return lines


def sentences(runs: list[dict]) -> list[str]:
    """What twice the depth gives with convolutions; the smallest model with them beside the largest without."""
    deeper = [
        mean_accuracy(runs_with(runs, stem="wide_stages", embed_dim=width, depth=4))
        - mean_accuracy(runs_with(runs, stem="wide_stages", embed_dim=width, depth=2))
        for width in FACTORS["embed_dim"]
    ]
    small = runs_with(runs, stem="wide_stages", embed_dim=64, depth=2)
    large = runs_with(runs, stem="patch", embed_dim=128, depth=4)
    gain = mean_accuracy(small) - mean_accuracy(large)
    return [
        f"twice the depth gives {deeper[0]:+.1f} points at width 64 and {deeper[1]:+.1f} at 128",
        f"The smallest model with convolutions ({flops_of(small[0]):.0f} MFLOPs an image) is {abs(gain):.1f} points "
        f"{'above' if gain > 0 else 'below'} the largest without ({flops_of(large[0]):.0f} MFLOPs)",
    ]


def statements() -> dict[str, list[str]]:
    """Page -> what it says, with the numbers of the record."""
    text = Path(__file__).with_name("record.json").read_text(encoding="utf-8")
    runs = json.loads(text)["runs"]
    effects = {factor: effect_by_seed(runs, factor) for factor in FACTORS}
    stem, width, depth = (with_interval(differences) for differences in effects.values())
    return {
        "benchmarks/stem/README.md": [
            f"the convolutions give {stem} points, twice the width gives {width}, twice the depth {depth}",
            *sentences(runs),
            *effect_table(effects),
            *model_table(runs),
        ]
    }


if __name__ == "__main__":
    print(json.dumps(statements(), indent=1, ensure_ascii=False))
