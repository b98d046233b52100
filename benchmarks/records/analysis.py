"""benchmarks/analysis/README.md."""

import re
from typing import Any, cast

from benchmarks.records import Claim, Definition

Json = dict[str, Any]
ATLAS, CARD = "moevision/demo/models/pets/atlas.json", "moevision/demo/models/pets/card.json"
COVERAGE = "benchmarks/analysis/coverage.json"


def table(record: Json) -> list[Json]:
    """What every layer's first choices tell about the class, beside its controls."""
    rows = []
    for layer in record["layers"]:
        (first, _, every, *_), (fresh, clusters, trainings, *_) = (
            answer["numbers"] for answer in layer["answers"][:2]
        )
        found = re.match(
            r"\w+: ([\d.]+) bits above shuffled labels \(95 % CI ([\d.]+ to [\d.]+)\)", first
        )
        both = re.match(r"All choices: .*?, ([\d.]+) bits \(95 % CI ([\d.]+ to [\d.]+)\)", every)
        ranges = [
            re.search(r": ([\d.]+ to [\d.]+) bits \(router", words) for words in (fresh, clusters)
        ]
        beyond = re.search(r"by training: (.*) bits", trainings)
        assert found and both and all(ranges) and beyond  # noqa: PT018
        untrained, split = (cast(re.Match[str], found)[1] for found in ranges)
        rows.append(
            {
                "name": layer["name"],
                "first": found[1],
                "of_first": found[2],
                "all": both[1],
                "of_all": both[2],
                "untrained": untrained,
                "clusters": split,
                "beyond": beyond[1],
            }
        )
    return rows


def answers(record: Json) -> Json:
    """What the last MoE layer answers to the three questions, of first choices."""
    experts, training, function = record["layers"][-1]["answers"]
    bits = re.match(r"L2: ([\d.]+) bits", experts["numbers"][0])
    clusters = re.search(r"clusters of the same input tell ([\d.]+) bits", training["sentence"])
    points = re.match(
        r"exchanging .* any other costs ([\d.]+) points .* CI ([\d.]+ to [\d.]+);",
        function["detail"],
    )
    alike = re.search(
        r"moved choices, [\d.]+ %, ([−\d.]+), any two other experts ([−\d.]+)", function["detail"]
    )
    assert bits and clusters and points and alike  # noqa: PT018
    assert (experts["answer"], function["answer"]) == ("yes", "yes")
    found = {"bits": bits[1], "clusters": clusters[1], "points": points[1], "interval": points[2]}
    found |= {"favourite": alike[1], "others": alike[2]}
    beyond = re.search(
        r"same patches ([\d.]+) of log-loss more than their other choice", function["detail"]
    )
    assert beyond is not None
    found["beyond"] = beyond[1]
    return {**found, "n_images": record["n_images"], "training": training["answer"]}


CLAIMS = [
    Claim(CARD, "seed {seed}; {accuracy[moe]:.1%} of {test_images:,} test images right"),
    Claim(ATLAS, "{n_images:,} of the test images"),
    Claim(ATLAS, "first choices: {bits} bits in L2, clusters {clusters}", answers),
    Claim(
        ATLAS,
        "| {name} | **{first}** ({of_first}) | {all} ({of_all}) | {untrained} | {clusters} | {beyond} |",
        table,
    ),
    Claim(ATLAS, "A little in L1: {detail}.", lambda record: record["layers"][0]["answers"][2]),
    Claim(ATLAS, "Yes in L2: {detail}.", lambda record: record["layers"][1]["answers"][2]),
    Claim(
        COVERAGE,
        "Lowest coverage over {settings} settings: {score:.1%} for the interval in use; for class, {basic:.1%} for the "
        "basic bootstrap, {normal:.1%} for a normal interval, {percentile:.1%} for the percentile bootstrap",
        lambda record: {"settings": len(record["rows"]), **record["lowest_coverage"]},
    ),
]

DEFINITIONS = [
    Definition("bits (95 %)", "the level of the intervals"),
    Definition("0, 0.05 and 0.25 bit", "what the simulations draw"),
]
