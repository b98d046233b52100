"""Do the experts of models trained from scratch specialize? The three questions, of finished runs.

    python -m benchmarks scratch runs/sparsity/cpu-moe-lr0.012-s?      # of the study of sparsity
    python -m benchmarks scratch runs/cifar10                           # or of `moevision fit`

The study beside it asks models that were upcycled and trained briefly, whose experts began as copies of one MLP; these
experts never were alike. A run is asked about held-out images of its own data, as `moevision analyze` asks, with the
router of a model with fresh weights in place of the one before training. One record for each run: the answers, the
load, the readings and their controls, the swap.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks.accuracy import read_finished
from benchmarks.harness import HERE, about, argument_parser
from benchmarks.specialization.training import rounded_all, without_words
from moevision.analysis.collect import collect_routing
from moevision.analysis.images import pictures_for
from moevision.analysis.questions import three_questions
from moevision.analysis.recording import recording_of
from moevision.analysis.specialization import measure_baselines
from moevision.files import write_json_atomic
from moevision.models.io import load_model

NAMES = ("untrained", "kmeans_input")  # the controls of the second question


def record_of(run: Path, images: int, swaps: int) -> dict[str, Any]:
    """The record of a finished run.

    Raises:
        UserError: if it isn't finished, or its images aren't there.
    """
    summary, provenance = read_finished(run)
    start, model = time.process_time(), load_model(str(run))
    pictures = pictures_for(str(run), model, limit=images)
    assert pictures is not None  # a run says what it was trained on
    trace = collect_routing(model, pictures, progress=False, name=run.name)
    baselines = measure_baselines(model, pictures, trace, seeds=3, names=NAMES)
    layers = three_questions(recording_of(model, pictures, trace, baselines=baselines), swap_images=swaps)
    return {
        "run": run.name, "model": summary["model"], "data": Path(summary["data"]).name, "seed": summary["seed"],
        "epochs": summary["epochs"], "test": {name: summary["test"][name] for name in ("correct", "total")},
        "images": len(pictures), "layers": [rounded_all(without_words(layer.to_json())) for layer in layers],
        "trained_at": provenance["code"], "cpu_s": round(time.process_time() - start, 1), **about(),
        "command": "python -m benchmarks scratch",
    }  # fmt: skip


def main() -> None:
    """Write the records."""
    parser = argument_parser("scratch", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders of `moevision fit`")
    parser.add_argument("--images", type=int, default=1000, help="held-out images that are asked about")
    parser.add_argument("--swaps", type=int, default=400, help="images of the swap test")
    parser.add_argument("--out", type=Path, default=HERE / "specialization" / "scratch", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for run in options.runs:
        record = record_of(run, options.images, options.swaps)
        write_json_atomic(options.out / f"{run.name}.json", record)
        for layer in record["layers"]:
            for answer in layer["answers"]:
                print(f"{run.name}, {layer['name']}: {answer['sentence']}")
