"""Which share of the patches each expert gets while a model trains, without and with a balance loss.

    for weight in 0 0.05; do
      moevision fit --config quickstart --name balance-$weight --data.train_size 8000 --model.arch.router switch \
          --model.aux.load_balancing $weight --record_routing.images SHOWN --record_routing.moments 16
    done
    python -m benchmarks balance runs/balance-0 runs/balance-0.05

SHOWN has 64 drawn validation images, which `--draw SHOWN` writes. docs/figures.py draws the record.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import HERE, argument_parser, without_places
from moevision.data import SyntheticPets
from moevision.files import write_json_atomic
from moevision.models.history import FILE, RoutingHistory

RECORD = HERE / "balance" / "record.json"
IMAGES = 64
LAYER = 3


def shares(history: RoutingHistory, layer: int) -> list[list[float]]:
    """For each moment the share of choices that each expert gets, over all images and patches."""
    chosen = np.asarray(history.weights[layer]) > 0  # [T, I, P, E]
    counts = chosen.sum((1, 2)).astype(float)
    return [
        [round(float(share), 4) for share in row] for row in counts / counts.sum(1, keepdims=True)
    ]


def arm(title: str, run: Path) -> dict[str, Any]:
    """One training: its loads and where it came from."""
    history = RoutingHistory.load(run / FILE)
    about = json.loads((run / "provenance.json").read_text(encoding="utf-8"))
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {
        "title": title,
        "steps": list(history.steps),
        "shares": shares(history, LAYER),
        "correct": summary["test"]["correct"],
        "total": summary["test"]["total"],
        "command": without_places(about["command_line"]),
        "code": about["code"],
        "started_utc": about["started_utc"],
    }


def main() -> None:
    """Write the record from two runs, or the images to record."""
    parser = argument_parser("balance", __doc__)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, help="run folders: without the loss, with it")
    add("--draw", type=Path, help="write the images for --record_routing.images here")
    add("--out", type=Path, default=RECORD)
    arguments = parser.parse_args()
    if arguments.draw:
        arguments.draw.mkdir(parents=True, exist_ok=True)
        drawn = SyntheticPets(IMAGES, 64, 0, "val")
        for index in range(IMAGES):
            drawn[index][0].save(arguments.draw / f"{index:02}.png")
        return
    titles = ("Without a balance loss", "With a balance loss")
    arms = [arm(title, run) for title, run in zip(titles, arguments.runs, strict=True)]
    write_json_atomic(arguments.out, {"layer": LAYER, "images": IMAGES, "arms": arms})
