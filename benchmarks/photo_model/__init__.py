"""A model of photos whose experts are needed. Arms and rules: `protocol.md`.

    python -m benchmarks photo-model photos --data DATA --photos PHOTOS      # once: 10,516 photos of eleven classes
    nice -n 19 python -m benchmarks photo-model run --photos PHOTOS --weights FILE

DATA holds imagenette128/ and cats_vs_dogs/, each with a folder per class in train/ and val/; FILE has the weights of a
ViT-S/14. `run` does the runs that are left, and goes on where it stopped.
"""

from __future__ import annotations

from argparse import Namespace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import HERE, about, argument_parser
from benchmarks.photo_model.photos import copy_photos
from benchmarks.photo_model.runs import Run, all_runs, record_of
from benchmarks.queue import do_runs, refuse_changes
from moevision.limits import keep_freed_memory

FOLDER = HERE / "photo_model"
PROTOCOL = FOLDER / "protocol.md"


def whole_record(run: Run, given: Namespace) -> dict[str, Any]:
    """What a run found, and where that comes from."""
    refuse_changes(PROTOCOL, allowed=given.allow_dirty)  # before each run: a queue takes hours
    origin = about()
    protocol = sha256(PROTOCOL.read_bytes()).hexdigest()
    found = record_of(run, given)
    return {**found, "protocol_sha256": protocol, **origin}


def told(run: Run, record: dict[str, Any]) -> str:
    """A line about a run."""
    line = f"{run.name}: val {record['val_top1']:.1%}, {record['cpu_s']} CPU s"
    if "needed" in record:
        needed = record["needed"]
        changed, at_random = (needed[key] / needed["right"] for key in ("changed", "at_random"))
        line += f", {changed:.1%} change, {at_random:.1%} at random"
    return line


def main() -> None:
    """Copy photos, or do the runs that are left."""
    parser = argument_parser("photo-model", __doc__)
    add = parser.add_argument
    add("verb", choices=("photos", "run"))
    add("--data", type=Path, help="folder of the data sets")
    add("--photos", type=Path, required=True, help="folder of the photos of eleven classes")
    add("--weights", type=Path, help="weights of a ViT-S/14, a .safetensors file")
    add("--limit", type=int, default=0, help="runs to do; 0: all that are left")
    add("--out", type=Path, default=FOLDER / "runs.jsonl", help="records (%(default)s)")
    add("--work", type=Path, default=Path("runs/photo_model"), help="runs, locks (%(default)s)")
    add("--allow-dirty", action="store_true", help="try things out on an uncommitted tree")
    options = parser.parse_args()
    if options.verb == "photos":
        print(f"{copy_photos(options.data, options.photos):,} photos")
        return
    torch.set_num_threads(1)
    keep_freed_memory()  # as in `moevision fit`
    options.work.mkdir(parents=True, exist_ok=True)
    do_runs(all_runs, whole_record, told, options)
