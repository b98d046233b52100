"""docs/architecture.md."""

from typing import Any

from benchmarks.records import Claim, Definition

Json = dict[str, Any]
HOUSE = "benchmarks/house/record.json"


WHEN = ("before", "after", "half")
ROWS = {
    "modules": "modules",
    "lines": "lines",
    "tokens, without docstrings and comments": "tokens",
    "statements, without docstrings": "statements",
    "modules of the largest folder": "largest_folder",
    "modules that exactly one other imports": "single_importers",
    "import circles, wherever an import stands": "circles",
}


def counts(record: Json) -> list[Json]:
    """A row for each count."""
    found = [{"name": name} for name in ROWS]
    for row, key in zip(found, ROWS.values(), strict=True):
        for when in WHEN:
            value = record[when]["counts"][key]
            row[when] = len(value) if key == "circles" else value
    return found


def trips(record: Json) -> list[Json]:
    """Files and hops of the trips that don't depend on how much is computed."""
    names = [name for name in record["before"]["trips"] if "analyze" not in name]
    return [{"name": name, **{when: record[when]["trips"][name] for when in WHEN}} for name in names]


CLAIMS = [
    Claim(HOUSE, "| {name} | {before:,} | {after:,} | {half:,} |", counts),
    Claim(
        HOUSE,
        "| {name} | {before[files]} | {after[files]} | {half[files]} | {before[hops]} | {after[hops]} | {half[hops]} |",
        trips,
    ),
    Claim(
        HOUSE,
        "| `moevision analyze` | {before[files]} | {after[files]} | {half[files]} | | | |",
        lambda record: {when: record[when]["trips"]["`moevision analyze`"] for when in WHEN},
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
]
