"""README.md."""

from typing import Any

from benchmarks.equal_time import recompute as equal_time
from benchmarks.records import Claim, Definition, accuracy, demo, infer, quickstart
from benchmarks.records.performance import TRAIN, side_by_side
from benchmarks.records.studies import on_gpus

CORES = {1: "one core", 2: "two cores"}
STEP = TRAIN.format("cifar10")
EQUAL_TIME = "benchmarks/equal_time/runs.jsonl"


def few_and_many(*rows: dict[str, Any]) -> dict[str, float]:
    """Time ÷ the dense twin's of the trained model in float32, for 1 and for 64 images."""
    found = {
        row["batch"]: row["after"]["ratio"]["median"]
        for row in rows
        if (row["model"], row["precision"], row["threads"]) == ("trained", "fp32", 1)
    }
    return {"one": found[1], "many": found[64]}


def beside_dense(*records: Any) -> dict[str, str]:
    """The dense twin in words: its accuracy at equal time and full length, its time for one image and for a step."""
    runs = [record for record in records if "arm" in record]
    (step,) = (side_by_side(record) for record in records if "rows" in record)
    rows = [record for record in records if "arm" not in record and "rows" not in record]
    moe = equal_time.lead(runs)
    slower = infer.speed(few_and_many(*rows)["one"], step["twin"] / step["moe"]) == "slower"
    return {
        "accurate": {"": "as accurate", "better": "less accurate", "worse": "more accurate"}[moe],
        "faster": "faster" if slower else "not faster",
        "machines": "CPUs and GPUs" if on_gpus(*records) else "CPUs",
    }


CLAIMS = [
    demo.OPENING,
    Claim(
        demo.MATTERS,
        "Take network {expert} away, and the model calls this {before} a {after}. Take as much away at random, and it "
        "{stays}.",
        demo.opening,
    ),
    Claim(
        (EQUAL_TIME, infer.BEFORE, STEP),
        "in our tests on {machines} a dense ViT of the same cost was {accurate}, and {faster}.",
        beside_dense,
    ),
    Claim(demo.MATTERS[0], "The strongest of {images} photos", demo.of_bundled),
    Claim(
        demo.FLIPS,
        "of {right:,} right test photos {without:.0%} change without some network, {at_random:.0%} at random",
        demo.of_flips,
    ),
    Claim(
        quickstart.NOW,
        "one CPU core ({seconds} s without bfloat16) and gets {mean:.1%} of its test images right (mean of three "
        "seeds)",
        quickstart.of_command,
    ),
    Claim(
        (*accuracy.FOLDERS, accuracy.BOTH),
        "took {fastest:.0f} to {slowest:.0f} minutes on one CPU thread, from pretrained weights, and {least:.1f} to "
        "{most:.1%} of the test photos were right (four trainings)",
        accuracy.of_folders,
    ),
    Claim(
        infer.BEFORE,
        "{one:.2f} times the time for one image in float32 on one core, {many:.2f} for 64",
        few_and_many,
    ),
    Claim(
        STEP,
        "training {moe:.0f} against {twin:.0f} images/s and {moe_mib:.0f} against {twin_mib:.0f} MiB, on {cores}",
        lambda record: {**side_by_side(record), "cores": CORES[record["machine"]["torch_threads"]]},
    ),
]

DEFINITIONS = [
    Definition("No GPU and no account are needed", "what the package takes"),
    Definition("Are they more accurate?", "a question"),
    Definition("Apache-2.0", "the licence"),
    Definition("Python 3.11", "a version"),
    Definition("in brackets their 95 % intervals", "the level of `benchmarks/study.py`"),
    Definition("a lesson of 45 minutes", "a plan"),
    Definition("2,048 photos of cats and dogs", "what was trained on"),
]
