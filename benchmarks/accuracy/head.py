"""What it is worth that a fine-tuning's classifier starts as a linear probe: the same fits with one drawn at random.

    python -m benchmarks head path/to/cats_vs_dogs path/to/imagenette --pretrained FILE

Both fits of a seed have the same images, cut of validation, order, crops and flips. A fit that the record has isn't
done again, so an interrupted command goes on where it was.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.accuracy import record_of
from benchmarks.harness import HERE, Record, about, argument_parser, print_table
from benchmarks.queue import refuse_changes
from moevision.train.start import PROBE_FILE

SEEDS, EPOCHS = (0, 1, 2), 1
STARTS = {
    "probe": "",
    "random": "fit.fit_probe = lambda *given: None; ",
}  # what is changed in the program
PROGRAM = "import sys; from moevision.cli import main; from moevision.train import fit; {change}sys.exit(main())"
KEPT = ("data", "model", "image_size", "seed", "test", "curve")


def fit(folder: Path, options: Any, start: str, seed: int) -> dict[str, Any]:
    """Train in a process of its own; what `benchmarks accuracy` keeps of the run, in brief."""
    with tempfile.TemporaryDirectory() as home:
        arguments = [
            *(
                "fit",
                folder.resolve(),
                "--pretrained",
                options.pretrained.resolve(),
                "--trainer.max_epochs",
                EPOCHS,
            ),
            *("--seed_everything", seed, "--data.seed", seed, "--runs_root", home, "--name", "run"),
        ]
        program = [sys.executable, "-c", PROGRAM.format(change=STARTS[start])]
        subprocess.run([*program, *map(str, arguments)], check=True)
        record = record_of(Path(home) / "run")
        assert (Path(home) / "run" / PROBE_FILE).is_file() == (start == "probe"), (
            "the program wasn't changed as meant"
        )
    cost = {name: record["cost"][name] for name in ("images", "cpu_s", "precision")}
    return {"start": start, **{name: record[name] for name in KEPT}, **cost}


def main() -> None:
    """Fit what is missing, and print all."""
    parser = argument_parser("head", __doc__)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="images, one subfolder per class"
    )
    parser.add_argument(
        "--pretrained", type=Path, required=True, metavar="FILE", help="weights of a timm ViT"
    )
    parser.add_argument(
        "--out", type=Path, default=HERE / "accuracy" / "head.json", help="(%(default)s)"
    )
    parser.add_argument(
        "--allow-dirty", action="store_true", help="try it out with uncommitted changes"
    )
    options = parser.parse_args()
    refuse_changes(HERE / "accuracy" / "README.md", allowed=options.allow_dirty)
    record, origin = Record(options.out, {"epochs": EPOCHS}), about()
    for folder in options.folders:
        for seed in SEEDS:
            for start in STARTS:
                if record.find(data=folder.resolve().name, seed=seed, start=start) is None:
                    record.add({**fit(folder, options, start, seed), **origin})
    rows = [
        [
            run["data"],
            run["start"],
            str(run["seed"]),
            f"{run['test']['correct'] / run['test']['total']:.2%}",
        ]
        for run in record.read()["runs"]
    ]
    print_table("after one epoch", ["images", "start", "seed", "test top-1"], rows)
