"""benchmarks/stem/README.md: everything between its marks is the report of the committed record."""

from typing import Any

from benchmarks.records import Claim, Definition
from benchmarks.records.studies import shown
from benchmarks.stem import FACTORS, STEPS, Arm, arms, complete_seeds, effects, parts_of
from moevision.words import points


def _parts(record: Any) -> list[dict[str, str]]:
    return shown(parts_of(record["runs"]))


def gains(record: Any) -> dict[str, str]:
    """Points with their interval, by factor."""
    return {factor: each.interval for factor, each in zip(FACTORS, effects(record["runs"]), strict=True)}


def beside(record: Any) -> dict[str, float]:
    """The largest model of patches beside the smallest with convolutions: FLOPs in millions, mean points between."""
    *_, most = (arm for arm in arms() if arm["stem"] == "patch")
    least, *_ = (arm for arm in arms() if arm["stem"] == "wide_stages")
    seeds = complete_seeds(record["runs"])

    def of(arm: Arm) -> tuple[float, float]:
        own = [r for r in record["runs"] if r["seed"] in seeds and all(r[name] == arm[name] for name in arm)]
        mean = sum(run["test_top1"] for run in own) / len(own)
        return mean, (own[0]["flops_per_image"] + own[0]["router_flops_per_image"]) / 1e6

    (low, large), (high, small) = of(most), of(least)
    return {"points": 100 * (high - low), "large": large, "small": small}


def deeper(record: Any) -> dict[str, str]:
    """What twice the depth gives the models with convolutions, at both widths."""
    found = {}
    for width in FACTORS["embed_dim"]:
        means = {
            run["depth"]: [r["test_top1"] for r in record["runs"] if all(r[name] == run[name] for name in FACTORS)]
            for run in record["runs"]
            if (run["stem"], run["embed_dim"]) == ("wide_stages", width)
        }
        shallow, deep = (sum(means[depth]) / len(means[depth]) for depth in FACTORS["depth"])
        found[f"at_{width}"] = points(deep - shallow)
    return found


def facts(record: Any) -> dict[str, Any]:
    """Both."""
    return {**gains(record), **beside(record)}


assert STEPS == 351
RECORD = "benchmarks/stem/record.json"
CLAIMS = [
    Claim(RECORD, "{text}", _parts),
    Claim(
        RECORD, "the convolutions give {stem} points, twice the width gives {embed_dim}, twice the depth {depth}", facts
    ),
    Claim(
        RECORD,
        "The smallest model with convolutions ({small:.0f} MFLOPs an image) is {points:.1f} points above the largest "
        "without ({large:.0f} MFLOPs)",
        facts,
    ),
    Claim(RECORD, "twice the depth gives {at_64} points at width 64 and {at_128} at 128", deeper),
]
DEFINITIONS: list[Definition] = []
