"""benchmarks/equal_time/README.md: everything between its marks is the report of the committed runs and prices."""

import statistics
from typing import Any

from benchmarks.equal_time.report import FIRST_SEED, LEVEL, PAIRS, by_seed, decided, found, parts_of, verdict
from benchmarks.records import Claim
from benchmarks.records.studies import shown

FILES = ("benchmarks/equal_time/runs.jsonl", "benchmarks/equal_time/prices.jsonl")

FOUND = {"pays": "shown", "doesn't pay here": "excluded", "undecided": "neither shown nor excluded"}


def _parts(*records: Any) -> list[dict[str, str]]:
    runs, prices = ([each for each in records if (each["name"] == "price") is priced] for priced in (False, True))
    return shown(parts_of(runs, prices))


def at_full_length(*runs: dict[str, Any]) -> dict[str, Any]:
    """The verdict: points with the interval of 97 %, both accuracies of the pairs that gave it, and it in words."""
    look = decided(runs)
    assert look is not None
    mean, half, count = 100 * look.mean, 100 * look.half_at(LEVEL), len(look.gaps)
    seeds = range(FIRST_SEED, FIRST_SEED + count)
    moe, twin = (statistics.fmean(by_seed(runs, arm)[seed] for seed in seeds) for arm in (look.first, look.second))
    side = ("better" if look.mean > 0 else "worse") if look.p < LEVEL else ""
    return {"mean": mean, "low": mean - half, "high": mean + half, "pairs": count, "moe": moe, "twin": twin,
            "found": FOUND[verdict(look)], "verdict": side}  # fmt: skip


def dense_parameters(*runs: dict[str, Any]) -> dict[str, Any]:
    """Dense with as many parameters as the MoE, less the twin at equal time; and whether that is a gain, in words."""
    contrast = next(each for each in found(runs) if (each.first, each.second) == PAIRS[2])
    mean, half = 100 * contrast.mean, 100 * contrast.half_at(LEVEL)
    shown = "is shown" if contrast.p < LEVEL and mean > 0 else "isn't shown"
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": len(contrast.gaps), "shown": shown}


CLAIMS = [Claim(FILES, "{text}", _parts)]
