"""docs/architecture.md."""

from typing import Any

from benchmarks.records import Claim, Definition

Json = dict[str, Any]
HOUSE = "benchmarks/house/record.json"


def both(record: Json) -> Json:
    """The totals before and after."""
    return {"before": record["before"]["counts"], "after": record["after"]["counts"]}


def trips(record: Json) -> list[Json]:
    """Files and hops of the trips that don't depend on how much is computed."""
    before, after = record["before"]["trips"], record["after"]["trips"]
    return [{"name": name, "before": before[name], "after": after[name]} for name in before if "analyze" not in name]


CLAIMS = [
    Claim(HOUSE, "| modules | {before[modules]:,} | {after[modules]:,} |", both),
    Claim(HOUSE, "| lines | {before[lines]:,} | {after[lines]:,} |", both),
    Claim(HOUSE, "| statements, without docstrings | {before[statements]:,} | {after[statements]:,} |", both),
    Claim(HOUSE, "| modules of the largest folder | {before[largest_folder]} | {after[largest_folder]} |", both),
    Claim(
        HOUSE,
        "| modules that exactly one other imports | {before[single_importers]} | {after[single_importers]} |",
        both,
    ),
    Claim(HOUSE, "| {name} | {before[files]} | {after[files]} | {before[hops]} | {after[hops]} |", trips),
    Claim(
        HOUSE,
        "| `moevision analyze` | {before[files]} | {after[files]} | | |",
        lambda record: {when: record[when]["trips"]["`moevision analyze`"] for when in ("before", "after")},
    ),
]

LAYER = "4160, 192, 2"
CLAIMS.append(
    Claim(
        HOUSE,
        "takes {before[0]:.2f} and {before[1]:.2f} times a dense MLP's time before, {after[0]:.2f} and "
        "{after[1]:.2f} after",
        lambda record: {when: record[when]["speed"]["layer_time_to_dense"][LAYER] for when in ("before", "after")},
    )
)
CLAIMS.append(
    Claim(
        HOUSE,
        "at {before:.3f} times its dense twin's speed before, {after:.3f} after",
        lambda record: {when: record[when]["speed"]["step_speed_to_twin"] for when in ("before", "after")},
    )
)

DEFINITIONS = [
    Definition("CPU time of every answer at 0.3 s", "a bound that a test asserts"),
    Definition("The aim of 26,000 lines", "the aim"),
    Definition("| import cycles | 0 | 0 |", "`counts` and a test find none"),
]
