"""benchmarks/cats_and_dogs/README.md: everything between its marks is the report of the committed runs."""

from typing import Any

from benchmarks.cats_and_dogs.report import best, parts_of
from benchmarks.records import Claim, Definition
from benchmarks.records.studies import shown

FILES = "benchmarks/cats_and_dogs/runs.jsonl"


def _parts(*runs: Any) -> list[dict[str, str]]:
    return shown(part for part in parts_of(runs) if not part.startswith("#"))


def first_look(*runs: Any) -> dict[str, Any]:
    """Seed 0, experts alone: a gate's layer as in `alone_L7`, and how much its layers in block 7 lose when left out."""
    layers = {
        f"{run['gate']}_{layer['name']}": layer
        for run in runs if (run["seed"], run["learn"], run["trunk"]) == (0, "experts", "pretrained")
        for layer in run["layers"] if run["experts"] == 2
    }  # fmt: skip
    told: dict[str, Any] = {
        name: {
            "guess": layer["guess"], "clusters": best(layer["clusters"]), "busiest": max(layer["load"]),
            **{end: layer["swap"]["points"][end] for end in ("value", "low", "high")},
        }
        for name, layer in layers.items()
    }  # fmt: skip
    lost = [layer["swap"]["without"]["points"]["value"] for name, layer in layers.items() if name.endswith("L7")]
    assert all(layer["swap"]["without"]["points"]["low"] <= 0 for name, layer in layers.items() if name.endswith("L9"))
    assert told["alone_L9"]["busiest"] == 1
    assert told["class_L7"]["low"] < 0 < told["class_L9"]["low"]
    return {**told, "least": min(lost), "most": max(lost)}


CLAIMS = [
    Claim(FILES, "{text}", _parts),
    Claim(
        FILES,
        "without block 7's experts {least:.0f} to {most:.0f} points are lost. By itself its gate tells cats from "
        "dogs little: from the expert the class is guessed in {alone_L7[guess]:.0%}, with balance "
        "{balanced_L7[guess]:.0%} (clusters of the same input {balanced_L7[clusters]:.0%}). Told the class it is "
        "{class_L7[guess]:.0%}, and still it isn't shown that the experts differ: exchanged they cost "
        "{class_L7[value]:.1f} points ({class_L7[low]:.1f} to {class_L7[high]:.1f}). In block 9, without which "
        "nothing is shown to be lost, the gate alone sends all photos to one expert; told the class it is "
        "{class_L9[guess]:.0%} (clusters {class_L9[clusters]:.0%}), and its experts exchanged cost "
        "{class_L9[value]:.1f} ({class_L9[low]:.1f} to {class_L9[high]:.1f}).",
        first_look,
    ),
]
DEFINITIONS = [Definition("100 / 0 is a gate", "how a table is read")]
