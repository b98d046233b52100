"""benchmarks/house/README.md."""

from typing import Any

from benchmarks.records import Claim, Definition

Json = dict[str, Any]
HOUSE = "benchmarks/house/record.json"


WHEN = ("after", "half")
ROWS = {
    "modules": "modules",
    "lines": "lines",
    "tokens, without docstrings and comments": "tokens",
    "modules of the largest folder": "largest_folder",
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
    names = [name for name in record["after"]["trips"] if "analyze" not in name]
    return [
        {"name": name, **{when: record[when]["trips"][name] for when in WHEN}} for name in names
    ]


CLAIMS = [
    Claim(HOUSE, "| {name} | {after:,} | {half:,} |", counts),
    Claim(
        HOUSE, "| {name} | {after[files]} | {half[files]} | {after[hops]} | {half[hops]} |", trips
    ),
    Claim(
        HOUSE,
        "| `moevision analyze` | {after[files]} | {half[files]} | | |",
        lambda record: {when: record[when]["trips"]["`moevision analyze`"] for when in WHEN},
    ),
]

LAYERS = ("4160, 192, 2", "8192, 384, 2")


def speed(record: Json) -> Json:
    """Of each layer and of a step, before and now: two measurements each."""
    found = record["half_speed"]
    layers, step = (
        [found["layer_time_to_dense"][shape] for shape in LAYERS],
        found["step_speed_to_twin"],
    )
    said = [
        f"{each[when][0]:.2f} and {each[when][1]:.2f}"
        for each in layers
        for when in ("before", "now")
    ]
    return {
        "layers": said,
        "steps": [f"{a:.3f} and {b:.3f}" for a, b in (step["before"], step["now"])],
    }


CLAIMS.append(
    Claim(
        HOUSE,
        "takes {layers[0]} times a dense MLP's time before, {layers[1]} now (4,160 tokens of width 192, K = 2), "
        "{layers[2]} before, {layers[3]} now (8,192 of width 384); a training step runs at {steps[0]} times its dense "
        "twin's speed before, {steps[1]} now",
        speed,
    )
)

DEFINITIONS: list[Definition] = []
