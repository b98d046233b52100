"""A model of photos without one of its eleven classes: does it notice what it never learned?

    nice -n 19 python -m benchmarks.strangers.left_out PHOTOS WEIGHTS WORK

PHOTOS is the folder of `benchmarks photo-model photos`, WEIGHTS the ViT-S/14 that it starts from. Eleven trainings by
the photo model's recipe, one epoch where that has two, seed 0; a record each in left_out.jsonl. Beside the distance,
the largest probability of softmax is measured (Hendrycks and Gimpel 2017, arXiv:1610.02136).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import about
from benchmarks.photo_model.runs import ARMS, COMMON
from benchmarks.queue import is_recorded, write_run
from benchmarks.strangers import FOLDER, area_with_interval, distances, features_of, images_of
from benchmarks.timing import rounded
from moevision.analysis.images import open_pictures
from moevision.models.io import load_model
from moevision.models.ood import linear_head
from moevision.train.report import read_summary

OUT = FOLDER / "left_out.jsonl"
RECIPE = (*COMMON, *ARMS["block-8"], "--lr", "2e-4", "--trainer.max_epochs", "1")


def without_class(photos: Path, name: str, folder: Path) -> Path:
    """The photos of all classes but one, as links."""
    for split in ("train", "val", "test"):
        (folder / split).mkdir(parents=True)
        for kind in (photos / "all" / split).iterdir():
            if kind.name != name:
                (folder / split / kind.name).symlink_to(kind.absolute())
    return folder


def record_of(photos: Path, weights: Path, work: Path, name: str) -> dict[str, Any]:
    """Train without a class, and show the model test photos of it."""
    run = work / name
    shutil.rmtree(run, ignore_errors=True)
    folder = without_class(photos, name, run / "photos")
    places = ("--runs_root", str(run), "--name", "run", "--pretrained", str(weights))
    with (work / f"{name}.log").open("w", encoding="utf-8") as log:
        command = [sys.executable, "-m", "moevision", "fit", str(folder), *places, *RECIPE]
        subprocess.run(command, stdout=log, stderr=log, check=True)
    summary = read_summary(run / "run" / "summary.json")

    model = load_model(str(run / "run"))
    head, strangers = linear_head(model.net), model.strangers
    assert head is not None
    assert strangers is not None
    size = model.image_size
    own = features_of(model, open_pictures(folder, size, split="test"))
    other = features_of(model, images_of(photos / "all", size, [name]))
    far_own, far = distances(strangers, own), distances(strangers, other)
    with torch.inference_mode():
        unsure_own, unsure = (
            1 - head(torch.from_numpy(features).float()).softmax(-1).amax(-1).double().numpy()
            for features in (own, other)
        )
        answers = head(torch.from_numpy(other).float()).argmax(-1).tolist()
    called = Counter(model.class_names[answer] for answer in answers)
    shutil.rmtree(run)
    return {
        "test": {"correct": summary.test.correct, "total": summary.test.total},
        "own": {"images": len(far_own), "beyond": int((far_own > 1).sum())},
        "images": len(far),
        "beyond": int((far > 1).sum()),
        "auroc": [rounded(value, 4) for value in area_with_interval(far_own, far)],
        # of softmax, at the threshold that refuses as many of its own test images
        "unsure": {
            "beyond": int((unsure > np.quantile(unsure_own, 1 - (far_own > 1).mean())).sum()),
            "auroc": [rounded(value, 4) for value in area_with_interval(unsure_own, unsure)],
        },
        "called": dict(called.most_common()),
        "cpu_s": round(summary.cpu_s or 0),
    }


def main() -> None:
    """Do the runs that are left."""
    photos, weights, work = (Path(argument).absolute() for argument in sys.argv[1:])
    torch.set_num_threads(1)
    for name in sorted(kind.name for kind in (photos / "all" / "test").iterdir()):
        if not is_recorded(OUT, name):
            origin = about()
            record = record_of(photos, weights, work, name)
            write_run(OUT, name, {**record, **origin})
            print(name, record["beyond"], record["images"], record["called"], flush=True)


if __name__ == "__main__":
    main()
