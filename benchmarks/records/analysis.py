"""benchmarks/analysis/README.md."""

import re
from typing import Any

from benchmarks.records import Claim, Definition

Json = dict[str, Any]
ATLAS, CARD = "moevision/demo/models/pets/atlas.json", "moevision/demo/models/pets/card.json"
COVERAGE = "benchmarks/analysis/coverage.json"
QUESTIONS = {
    "class": "class", "class_given_position": "class at a place", "position": "place",
    "part": "drawn part, beyond place",
}  # fmt: skip


def of_layer(record: Json, number: int, about: str) -> Json:
    """What one layer's experts tell about something, with each baseline's largest value."""
    layer = next(layer for layer in record["layers"] if layer["layer"] == number)
    entry = next(entry for entry in layer["information"] if entry["about"] == about)
    baselines = {name: max(*values, 0.0) for name, values in entry["baselines"].items()}
    return {
        **entry,
        **baselines,
        "about": QUESTIONS[about],
        "above": "yes" if all(entry["above"][name] for name in ("null", "baselines")) else "no",
    }


def table(record: Json) -> list[Json]:
    """Every layer and question."""
    return [of_layer(record, layer["layer"], about) for layer in record["layers"] for about in QUESTIONS]


def answers(record: Json) -> Json:
    """What block 3 answers to the first two questions, of first choices, and block 1 to the third."""
    first, last = (next(layer for layer in record["layers"] if layer["layer"] == number) for number in (1, 3))
    experts, training, _ = last["answers"]
    function = first["answers"][2]
    bits = re.match(r"L3: ([\d.]+) bits", experts["numbers"][0])
    clusters = re.search(r"clusters of the same input tell ([\d.]+) bits", training["sentence"])
    points = re.search(r"any other costs ([\d.]+) points", function["detail"])
    assert bits
    assert clusters
    assert points
    assert (experts["answer"], function["answer"]) == ("yes", "a little")
    assert function["detail"].startswith("a class's favourite no more than others")
    found = {"bits": bits[1], "clusters": clusters[1], "points": points[1], "n_images": record["n_images"]}
    return {**found, "training": training["answer"]}


CLAIMS = [
    Claim(CARD, "seed {seed}; {accuracy[moe]:.1%} of {test_images:,} test images right"),
    Claim(ATLAS, "{n_images:,} of the test images"),
    Claim(ATLAS, "first choices: {bits} bits in L3, clusters {clusters}", answers),
    Claim(
        ATLAS,
        "| {name}, {about} | **{value_bits:.3f}** ({low:.3f} to {high:.3f}) | {share_of_entropy:.1%} | {null_mean:.3f} "
        "| {untrained:.3f} | {hash:.3f} | {hash_position:.3f} | {kmeans_colour:.3f} | {kmeans_input:.3f} "
        "| {seeds[0]:.3f}, {seeds[1]:.3f} | {above} |",
        table,
    ),
    Claim(
        ATLAS,
        "In L3 seed 0 tells {value_bits:.2f} bits about the class, the other trainings {seeds[0]:.2f} and "
        "{seeds[1]:.2f}",
        lambda record: of_layer(record, 3, "class"),
    ),
    Claim(ATLAS, "A little: in L1 {detail}.", lambda record: record["layers"][0]["answers"][2]),
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
