"""benchmarks/routers/README.md."""

from typing import Any

from benchmarks.records import Claim, Definition, small
from benchmarks.routers import report
from moevision.stats import Gap

STUDY = "benchmarks/routers/record.json"
LEARNED = ("noisy_top_k", "vmoe_top_k", "switch", "sigmoid", "bias_balanced", "cosine")
MIXED = ("expert_choice", "soft")
ABOVE, ALIKE = (
    ("vmoe_top_k", "cosine", "switch", "expert_choice"),
    ("noisy_top_k", "bias_balanced", "sigmoid", "soft"),
)
DATA = "cifar10"


def _rows(record: dict[str, Any]) -> dict[str, Any]:
    return {row.name: row for row in report.rows_of(record, DATA)}


def _above(record: dict[str, Any]) -> dict[str, Any]:
    """Points above the dense twin, by row; the verdicts that the page puts in words are asserted."""
    own, rows = report, list(_rows(record).values())
    to_twin, to_hash = own.against(rows, own.TWIN), own.against(rows, own.HASH)
    assert all(to_twin[name].verdict == "above" for name in ("position", "hash"))
    assert all(to_hash[name].verdict == "below" for name in (*LEARNED, *MIXED))
    assert {row.lr for row in rows} == {2e-3}
    found = {name: 100 * contrast.mean for name, contrast in to_twin.items()}
    learned = {name: to_twin[name].verdict for name in (*LEARNED, *MIXED)}
    assert learned == {**dict.fromkeys(ABOVE, "above"), **dict.fromkeys(ALIKE, "not told apart")}
    for group, names in (("above", ABOVE), ("alike", ALIKE)):
        found |= {
            f"least_{group}": min(found[name] for name in names),
            f"most_{group}": max(found[n] for n in names),
        }
    return found


def learned(record: dict[str, Any]) -> dict[str, float]:
    """`vmoe_top_k` above the dense twin, the most of all that learn; those in `ALIKE` aren't shown to be above."""
    own, rows = report, list(_rows(record).values())
    found = own.against(rows, own.TWIN)["vmoe_top_k"]
    assert 100 * found.mean == _above(record)["most_above"], "of the routers that learn, the best"
    mean, half = 100 * found.mean, 100 * found.half
    return {"mean": mean, "low": mean - half, "high": mean + half}


def at_random(record: dict[str, Any]) -> dict[str, Any]:
    """`random` minus the twin over common seeds, at the common rate: points, unadjusted, and in words."""
    by_seed: dict[str, dict[int, float]] = {"random": {}, "dense twin": {}}
    for run in record["runs"]:
        if run["dataset"] == DATA and run["lr"] == 2e-3 and run["row"] in by_seed:
            by_seed[run["row"]][run["seed"]] = run["test_top1"]
    mine, twin = by_seed.values()
    gap = Gap.of([100 * (mine[seed] - twin[seed]) for seed in sorted(mine.keys() & twin.keys())])
    return {
        **vars(gap),
        "verdict": "not told apart from" if gap.low < 0 < gap.high else "told apart from",
    }


def _speeds(record: dict[str, Any]) -> dict[str, float]:
    ratios = [
        row["to_twin"] for name, row in record["speed"]["rows"].items() if name != "dense twin"
    ]
    slots = (
        record["cost"]["soft"]["flops_per_image"] / record["cost"]["dense twin"]["flops_per_image"]
        - 1
    )
    return {"least": min(ratios), "most": max(ratios), "slots": slots}


def _loads(record: dict[str, Any]) -> dict[str, float]:
    """The largest load of any layer, mean over seeds, of the routers that learn their balance."""
    return {
        "most": max(
            max(row.layers("max_over_mean"))
            for name, row in _rows(record).items()
            if name in LEARNED
        )
    }


def _weaker(record: dict[str, Any]) -> dict[str, float]:
    loads = [
        layer["max_over_mean"]
        for run in record["runs"]
        for layer in run["layers"]
        if run["lr"] == 2e-3
    ]
    return {"least": min(loads), "most": max(loads)}


CLAIMS = [
    Claim(small.FILES, "gains {mean:.1f} points ({bounds}; {seeds} seeds)", small.heads),
    Claim(
        small.FILES,
        "`position` {position}, `hash` {hash}, `vmoe_top_k` {learned}; at the other rows' learning rate `position` has "
        "{position_common}",
        small.heads,
    ),
    Claim(small.FILES, "on images moved by 8 px it is {below:.1f} points below", small.heads),
    Claim(
        STUDY,
        "{text}",
        lambda record: {"text": report.accuracy_table(list(_rows(record).values()))},
    ),
    Claim(
        STUDY, "{text}", lambda record: {"text": report.load_table(list(_rows(record).values()))}
    ),
    Claim(STUDY, "{text}", lambda record: {"text": report.cost_table(record)}),
    Claim(STUDY, "`position` and `hash` are {position:.1f} and {hash:.1f} points above", _above),
    Claim(
        STUDY,
        "`expert_choice` are {least_above:.1f} to {most_above:.1f} points above the twin",
        _above,
    ),
    Claim(
        STUDY,
        "({least_alike:.1f} to {most_alike:.1f} points above) are not told apart from it",
        _above,
    ),
    Claim(
        STUDY,
        "`random` is {verdict} the twin: {mean:+.1f} points ({low:+.1f} to {high:+.1f}; {seeds} seeds",
        at_random,
    ),
    Claim(STUDY, "at {least:.2f} to {most:.2f} times its images/s", _speeds),
    Claim(STUDY, "slots cost {slots:.0%} more", _speeds),
    Claim(STUDY, "{most:.2f} times the mean load at worst", _loads),
    Claim("benchmarks/routers/loss_001.json", "had {least:.1f} to {most:.1f}", _weaker),
]

DEFINITIONS = [
    Definition("With .01 of the load-balancing loss instead of .05", "the two settings compared"),
    Definition("0.001, 0.002, 0.004 with seed 0", "the rates of `benchmarks/routers/`"),
    Definition("best on average, 0.002", "asserted in `_above`"),
    Definition(
        "`vmoe_top_k` had 0.001 and was not told apart", "of the page at 3dc54ab^, before the rule"
    ),
    Definition("better by more than 1 point", "TOLERANCE of `benchmarks/routers/report.py`"),
    Definition("intervals are of 95 %", "the level of `benchmarks/study.py`"),
]
