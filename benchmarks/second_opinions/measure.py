"""Record what a mirror image adds, and what sets cover: `protocol.md`.

    python -m benchmarks.second_opinions.measure RUNS IMAGES BUNDLED

RUNS has the run folders (`cats-s0`, ...), IMAGES a folder for each of their data sets, BUNDLED CIFAR-10's test folder.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.special import log_softmax, softmax

from benchmarks.harness import about
from moevision.data.images import safe_open
from moevision.data.transforms import normalize, square_pixels
from moevision.demo.models import bundled_model
from moevision.models.convert import set_members
from moevision.models.io import load_model
from moevision.stats import fit_sets, fit_temperature

HERE = Path(__file__).parent
LEVELS = (0.8, 0.9, 0.95)


@torch.inference_mode()
def logits_of(model, files, batch_size=64):
    """[2, n, C] of the images, and of their mirror images."""
    views = []
    for start in range(0, len(files), batch_size):
        squares = [
            square_pixels(safe_open(file, model.image_size), model.image_size, model.framing)
            for file in files[start : start + batch_size]
        ]
        pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)
        images = normalize(pixels, model.mean, model.std)
        views.append(torch.stack([model.net(images), model.net(images.flip(-1))]).float())
    return torch.cat(views, 1).numpy().astype(np.float64)


def images_of(run, folder, split):
    """Files of a split of a run, and the names of their classes."""
    with open(run / "splits.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    return [folder / row["path"] for row in rows], [row["class"] for row in rows]


def cached(file, compute):
    """Logits and labels, computed once."""
    if not file.exists():
        logits, labels = compute()
        np.savez(file, logits=logits, labels=labels)
    content = np.load(file)
    return content["logits"], content["labels"]


def three(views):
    """Logits [n, C] without a mirror, of the mean of logits, of the mean of probabilities."""
    return {
        "plain": views[0],
        "logits": views.mean(0),
        "probabilities": np.log(softmax(views, -1).mean(0)),
    }


def nll(logits, labels):
    """Mean negative log-likelihood."""
    return float(-log_softmax(logits, -1)[np.arange(len(labels)), labels].mean())


def ece(probability, labels):
    """Expected calibration error, 15 bins of equal width."""
    confidence, right = probability.max(-1), probability.argmax(-1) == labels
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs((confidence - right)[bins == index].sum()) for index in range(15)]
    return float(sum(gaps) / len(labels))


def digits(values):
    """Small integers, one hexadecimal digit each."""
    return "".join(f"{int(value):x}" for value in values)


def answers(views, labels, temperature, ways):
    """Of each way to answer: which images are right, likelihood and ECE at the temperature, likelihood at its own."""
    result = {}
    for way in ways:
        logits = three(views)[way]
        result[way] = {
            "right": digits(logits.argmax(-1) == labels),
            "nll": nll(logits / temperature, labels),
            "ece": ece(softmax(logits / temperature, -1), labels),
        }
        if "logits" in ways:  # of validation images
            own = fit_temperature(logits, labels).temperature
            result[way]["nll_own_temperature"] = nll(logits / own, labels)
    return result


def views_of_run(run, data, split, model):
    """Logits and labels of a split of a run, computed once."""

    def compute():
        files, names = images_of(run, data, split)
        return logits_of(model, files), [model.class_names.index(name) for name in names]

    return cached(run / f"views_{split}.npz", compute)


def record_of(run, data):
    """What `recompute.py` needs of a run."""
    model = load_model(str(run))
    val, val_labels = views_of_run(run, data, "val", model)
    test, labels = views_of_run(run, data, "test", model)
    sets = fit_sets(val[0], val_labels)
    true = softmax(test[0] / sets.temperature, -1)[np.arange(len(labels)), labels]
    sizes = {
        str(level): digits(set_members(torch.from_numpy(test[0]), sets, level).sum(-1))
        for level in LEVELS
    }
    return {
        "name": run.name,
        "data": run.name.partition("-")[0],
        "seed": int(run.name[-1]),
        "val": answers(val, val_labels, model.temperature, ("plain", "logits", "probabilities")),
        "test": answers(test, labels, model.temperature, ("plain", "probabilities")),
        "labels": digits(labels),
        "set_sizes": sizes,
        "scored": sets.true_probabilities,
        "tested": true.round(6).tolist(),
    }


def record_of_bundled(folder):
    """The bundled model of CIFAR-10 on all test images: the mirror alone."""
    model = bundled_model("cifar10")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    labels = np.array([model.class_names.index(path.parent.name) for path in files])
    views = logits_of(model, files)
    ways = ("plain", "probabilities")
    return {"name": "bundled", "test": answers(views, labels, model.temperature, ways)}


if __name__ == "__main__":
    runs, data, bundled = map(Path, sys.argv[1:])
    lines = []
    for run in sorted(runs.iterdir()):
        lines.append(about() | record_of(run, data / run.name.partition("-")[0]))
        print(run.name, flush=True)
    lines.append(about() | record_of_bundled(bundled))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (HERE / "runs.jsonl").write_text(text, encoding="utf-8")
