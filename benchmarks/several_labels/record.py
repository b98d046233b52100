"""Adds a run on the pairs to `runs.jsonl`: its scores, scikit-learn's on the same answers, and the exported file's.

    python -m benchmarks.several_labels.record RUN FILE.onnx IMAGES

IMAGES is a folder that has a few test images alone.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from sklearn.metrics import average_precision_score, f1_score

from moevision.commands.predict import images_at, predict_batch
from moevision.data.images import safe_open
from moevision.data.transforms import normalize, square_pixels
from moevision.models.io import load_model

RUNS = Path(__file__).with_name("runs.jsonl")


def scores(run: Path) -> dict[str, dict[str, float]]:
    """MAP and F1 of `summary.json`, and by scikit-learn from `predictions_test.csv`, whose shares have six digits."""
    with (run / "predictions_test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [column.removeprefix("p ") for column in rows[0] if column.startswith("p ")]

    def flags(column: str) -> np.ndarray:
        return np.array([[name in row[column].split("|") for name in names] for row in rows])

    labels, given = flags("label"), flags("prediction")
    shares = np.array([[float(row[f"p {name}"]) for name in names] for row in rows])
    test = json.loads((run / "summary.json").read_text())["test"]
    return {
        "moevision": {name: test["multilabel"][name] for name in ("map", "f1_micro", "f1_macro")},
        "scikit-learn": {
            "map": float(average_precision_score(labels, shares, average="macro")),
            "f1_micro": float(f1_score(labels, given, average="micro")),
            "f1_macro": float(f1_score(labels, given, average="macro")),
        },
    }


def exported_difference(run: Path, onnx: Path, images: Path) -> dict[str, float]:
    """Largest difference of a label's probability between `predict` and onnxruntime, and images with other labels."""
    model = load_model(str(run))
    session = onnxruntime.InferenceSession(onnx)
    facts = session.get_modelmeta().custom_metadata_map
    thresholds = np.array(json.loads(facts["thresholds"]))
    temperature = json.loads(facts["temperature"])
    names = json.loads(facts["class_names"])
    files = list(images_at([str(images)]))

    largest, others = 0.0, 0
    for file, prediction in zip(files, predict_batch(model, files), strict=True):
        square = square_pixels(safe_open(file, model.image_size), model.image_size, model.framing)
        pixels = torch.from_numpy(square).permute(2, 0, 1)[None]
        inputs = normalize(pixels, model.mean, model.std).numpy()
        logits = session.run(["logits"], {"image": inputs})[0][0]
        shares = 1 / (1 + np.exp(-logits / temperature))
        predicted = dict(zip(prediction.classes, prediction.probabilities, strict=True))
        largest = max(
            largest, max(abs(predicted[name] - p) for name, p in zip(names, shares, strict=True))
        )
        given = {
            name for name, is_given in zip(names, shares > thresholds, strict=True) if is_given
        }
        others += given != set(prediction.labels or ())
    return {"images": len(files), "largest_difference": float(largest), "other_labels": others}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("run", "onnx", "images"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    summary = json.loads((args.run / "summary.json").read_text())
    provenance = json.loads((args.run / "provenance.json").read_text())
    record = {
        "name": summary["name"],
        "started_utc": provenance["started_utc"],
        "code": provenance["code"],
        "scores": scores(args.run),
        "exported": exported_difference(args.run, args.onnx, args.images),
        **{
            name: summary["test"][name]
            for name in ("correct", "total", "temperature", "ece", "calibrated_ece")
        },
        "thresholds": {row[0]: row[-1] for row in summary["test"]["per_class"]},
        **{
            name: summary[name]
            for name in ("model", "epochs", "steps", "duration_s", "cpu_s", "device", "seed")
        },
        "libraries": provenance["libraries"],
    }
    with RUNS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
