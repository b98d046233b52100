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
from moevision.models.io import load_model
from moevision.stats import fit_temperature

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
    """Log-probabilities or logits [n, C] without a mirror, of the mean of logits, of the mean of probabilities."""
    return {
        "plain": views[0],
        "logits": views.mean(0),
        "probabilities": np.log(softmax(views, -1).mean(0)),
    }


def nll(logits, labels):
    """Mean negative log-likelihood."""
    return float(-log_softmax(logits, -1)[np.arange(len(labels)), labels].mean())


def digits(values):
    """Small integers, one character each; 10 is a."""
    return "".join(f"{int(value):x}" for value in values)


def measured(model, split_logits, labels):
    """Of each way to answer: which images are right, and the likelihood at the model's and at its own temperature."""
    answers = {}
    for name, logits in three(split_logits).items():
        probability = softmax(logits / model.temperature, -1)
        answers[name] = {
            "right": digits(logits.argmax(-1) == labels),
            "nll": nll(logits / model.temperature, labels),
            "nll_own_temperature": nll(logits / fit_temperature(logits, labels).temperature, labels),
            "confidence": round(float(probability.max(-1).mean()), 6),
            "ece": ece(probability, labels),
        }
    return answers


def ece(probability, labels):
    """Expected calibration error, 15 bins of equal width."""
    confidence, right = probability.max(-1), probability.argmax(-1) == labels
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs((confidence - right)[bins == index].sum()) for index in range(15)]
    return float(sum(gaps) / len(labels))


def logits_of_run(run, data, split, model):
    def compute():
        files, names = images_of(run, data, split)
        labels = [model.class_names.index(name) for name in names]
        return logits_of(model, files), labels

    return cached(run / f"views_{split}.npz", compute)


if __name__ == "__main__":
    runs, data = Path(sys.argv[1]), Path(sys.argv[2])
    for run in sorted(runs.iterdir()):
        model = load_model(str(run))
        logits, labels = logits_of_run(run, data / run.name.partition("-")[0], "val", model)
        print(run.name, len(labels), json.dumps({k: {a: b for a, b in v.items() if a != "right"} | {"acc": v["right"].count("1") / len(labels)} for k, v in measured(model, logits, labels).items()}), flush=True)
