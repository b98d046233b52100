"""benchmarks/cats_and_dogs/README.md: everything between its marks is the report of the committed runs."""

from statistics import fmean
from typing import Any

from benchmarks.cats_and_dogs.gates import in_own, own_experts, runs_of
from benchmarks.cats_and_dogs.report import ONLY_TOLD, answer, best, gaps, layers_of, parts_of, without
from benchmarks.records import Claim, Definition
from benchmarks.records.studies import shown
from moevision.analysis.readings import listed

FILES = "benchmarks/cats_and_dogs/runs.jsonl"


def _parts(*runs: Any) -> list[dict[str, str]]:
    return shown(part for part in parts_of(runs) if not part.startswith("#"))


def result(*runs: Any) -> dict[str, Any]:
    """Means over the seeds of each gate's layer, as in `class_experts_L7`, and accuracies beside dense, in points."""
    verdict, _ = answer(runs)
    assert verdict == ONLY_TOLD
    told: dict[str, Any] = {}
    classes = ("cats", "dogs")
    for learn, gate, name, layers in layers_of(runs):
        lost = [without(layer, "points") for layer in layers]  # [C][E] of each seed
        own = [own_experts(layer) for layer in layers]
        away = {
            f"{photos}_without_{expert}": [each[c][pair[e]] for each, pair in zip(lost, own, strict=True)]
            for c, photos in enumerate(classes) for e, expert in enumerate(classes)
        }  # fmt: skip
        told[f"{gate}_{learn}_{name}"] = {
            "guess": fmean(layer["guess"] for layer in layers),
            "clusters": fmean(best(layer["clusters"]) for layer in layers),
            "busiest": fmean(max(layer["load"]) for layer in layers),
            "least": min(min(in_own(layer)) for layer in layers),
            "exchanged": fmean(layer["swap"]["points"]["value"] for layer in layers),
            "nats": fmean(layer["swap"]["log_loss"]["value"] for layer in layers),
            **{name: fmean(points) for name, points in away.items()},
            **{f"each_{name}": listed([f"{each:.0f}" for each in points]) for name, points in away.items()},
        }
    assert told["alone_experts_L9"]["busiest"] == 1
    cost = gaps(runs)["experts", "class"]
    top1 = {gate: fmean(run["top1"] for run in runs_of(runs, gate, "experts")) for gate in ("dense", "class")}
    ends = {"cost": 100 * cost.mean, "low": 100 * (cost.mean - cost.half), "high": 100 * (cost.mean + cost.half)}
    return {**told, **ends, "top1": top1}


CLAIMS = [
    Claim(FILES, "{text}", _parts),
    Claim(
        FILES,
        "**Only if it is told.** Taught the class, the gate sends at least {class_experts_L7[least]:.0%} of the cats, "
        "and of the dogs, to an expert of their own, and one can switch it off: without the cats' expert of block 7 "
        "{class_experts_L7[cats_without_cats]:.0f} points of the cats are lost in the mean "
        "({class_experts_L7[each_cats_without_cats]} in the three trainings) and "
        "{class_experts_L7[dogs_without_cats]:.0f} of the dogs, without the dogs' expert "
        "{class_experts_L7[dogs_without_dogs]:.0f} of the dogs ({class_experts_L7[each_dogs_without_dogs]}) and "
        "{class_experts_L7[cats_without_dogs]:.0f} of the cats. They divide the photos more than the skill: each does "
        "the other's nearly as well (exchanged they cost {class_experts_L7[exchanged]:.1f} points). Supervision "
        "costs accuracy: {top1[class]:.1%} of the test photos "
        "are right, of the dense model {top1[dense]:.1%} ({cost:.1f}, {low:.1f} to {high:.1f} points).",
        result,
    ),
    Claim(
        FILES,
        "By itself the gate doesn't find it. From the expert of block 7 the class is guessed in "
        "{alone_experts_L7[guess]:.0%} (half is chance), with balance losses in {balanced_experts_L7[guess]:.0%}; in "
        "block 9 the gate alone sends every photo to one expert. Where the last blocks learn with it, the guess is "
        "right in {alone_blocks_L7[guess]:.0%} and {balanced_blocks_L7[guess]:.0%}, and clusters of the same input "
        "tell {balanced_blocks_L7[clusters]:.0%}.",
        result,
    ),
    Claim(
        FILES,
        "exchanged they cost {class_blocks_L7[nats]:.3f} nats and no photo ({class_blocks_L7[exchanged]:.1f} points)",
        result,
    ),
]
DEFINITIONS = [Definition("100 / 0 is a gate", "how a table is read")]
