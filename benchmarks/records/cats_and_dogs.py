"""benchmarks/cats_and_dogs/README.md: everything between its marks is the report of the committed runs."""

from statistics import fmean
from typing import Any

from benchmarks.cats_and_dogs.gates import FEW, in_own, own_experts, runs_of
from benchmarks.cats_and_dogs.report import ONLY_TOLD, answer, best, gaps, layers_of, parts_of
from benchmarks.records import Claim, Definition
from benchmarks.records.studies import shown
from benchmarks.study import contrasts
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
        own = [own_experts(layer) for layer in layers]
        removed = [layer["swap"]["knock_out"]["points"] for layer in layers]  # the same of a photo that was in it
        away = {
            f"{photos}_in_{expert}": [each[c][pair[e]] or 0.0 for each, pair in zip(removed, own, strict=True)]
            for c, photos in enumerate(classes) for e, expert in enumerate(classes)
        }  # fmt: skip
        told[f"{gate}_{learn}_{name}"] = {
            "guess": fmean(layer["guess"] for layer in layers),
            "clusters": fmean(best(layer["clusters"]) for layer in layers),
            "busiest": fmean(max(layer["load"]) for layer in layers),
            "least": min(min(in_own(layer)) for layer in layers),
            "exchanged": fmean(layer["swap"]["points"]["value"] for layer in layers),
            "nats": fmean(layer["swap"]["log_loss"]["value"] for layer in layers),
            "left_out": [layer["swap"]["without"]["points"]["value"] for layer in layers],
            **{name: listed([f"{each:.0f}" for each in points]) for name, points in away.items()},
        }
    assert told["alone_experts_L9"]["busiest"] == 1
    left_out = [lost for gate in FEW if gate != "dense" for lost in told[f"{gate}_experts_L7"]["left_out"]]
    return {**told, **beside_dense(runs), "left_out_least": min(left_out), "left_out_most": max(left_out)}


def beside_dense(runs: Any) -> dict[str, str]:
    """Gates less dense, and the told gate less an untold one, as `class_dense` and `class_balanced`; in points."""
    found = {gate: gaps(runs)["experts", gate].interval for gate in ("alone", "balanced", "class")}
    top1 = {
        gate: {int(run["seed"]): run["top1"] for run in runs_of(runs, gate, "experts")}
        for gate in ("alone", "balanced", "class")
    }
    told = contrasts(top1, [("class", "balanced"), ("class", "alone")])
    means = [-100 * gaps(runs)["experts", gate].mean for gate in ("alone", "balanced", "class")]
    return {
        **{f"{gate}_dense": interval for gate, interval in found.items()},
        **{f"{each.first}_{each.second}": each.interval for each in told},
        "class_dense_blocks": gaps(runs)["blocks", "class"].interval,
        "least": f"{min(means):.1f}",
        "most": f"{max(means):.1f}",
    }


CLAIMS = [
    Claim(FILES, "{text}", _parts),
    Claim(
        FILES,
        "**Only if it is told.** Taught the class, the gate sends at least {class_experts_L7[least]:.0%} of the cats, "
        "and of the dogs, to an expert of their own. They divide photos, hardly skills: exchanged they cost "
        "{class_experts_L7[exchanged]:.1f} points.",
        result,
    ),
    Claim(
        FILES,
        "in the three trainings cats in the cats' expert lose {class_experts_L7[cats_in_cats]} points, cats in the "
        "dogs' {class_experts_L7[cats_in_dogs]}; dogs in the dogs' expert {class_experts_L7[dogs_in_dogs]}, dogs in "
        "the cats' {class_experts_L7[dogs_in_cats]}",
        result,
    ),
    Claim(
        FILES, "costs {left_out_least:.0f} to {left_out_most:.0f} points, whatever the gate and the training", result
    ),
    Claim(
        FILES,
        "less than the dense model, whose MLP stays whole: {class_dense} points told, {balanced_dense} with balance, "
        "{alone_dense} alone. Telling by itself is not shown to cost anything: {class_balanced} beside balance, "
        "{class_alone} beside alone. Where the last blocks learn too, told minus dense is {class_dense_blocks}.",
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
