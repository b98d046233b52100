"""Planted label noise, and how well the scores of a run find it.

The study that these measured is frozen (README.md); photos of one's own are to be measured with the same functions.

Axes: n images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import rounded
from moevision.analysis.collect import network_input
from moevision.analysis.good_data import RunImages, class_doubt, examine, images_of
from moevision.data.scores import FILE, Scores
from moevision.data.synthetic import SyntheticPets
from moevision.data.transforms import square_pixels
from moevision.errors import escape_csv_cell
from moevision.layers.routing import evaluating
from moevision.models.io import SavedModel, load_model

SHARE, TOP, BATCH = 0.1, 0.1, 256
# Between similar classes, as arXiv:1609.03683 flips CIFAR-10; cat and dog both ways.
SIMILAR = {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}


# ---- flips


def flipped(
    labels: Sequence[int], noise: str, class_names: Sequence[str], seed: int
) -> dict[int, int]:
    """Index -> wrong class of a share `SHARE` of the images.

    Args:
        labels: [n].
        noise: `random`: every image alike, to any other class alike; `similar`: images of the classes of `SIMILAR`.
        class_names: [C].
        seed: of what is drawn.
    """
    label, generator = np.array(labels), np.random.default_rng([seed, 1])
    able = np.arange(len(label))
    if noise == "similar":
        able = np.flatnonzero(np.isin(label, [class_names.index(name) for name in SIMILAR]))
    chosen = generator.choice(able, round(SHARE * len(label)), replace=False)
    if noise == "similar":
        return {int(i): class_names.index(SIMILAR[class_names[label[i]]]) for i in chosen}
    shift = generator.integers(1, len(class_names), len(chosen))
    return {
        int(i): int((label[i] + by) % len(class_names)) for i, by in zip(chosen, shift, strict=True)
    }


def draw_folder(
    folder: Path, images: int, seed: int, *, side: int = 32, test: int = 800
) -> list[str]:
    """Draw animals into train/ and test/; names of the training images that lie in the folder of another class."""
    wrong = []
    for split, many in (("train", images), ("test", test)):
        pets = SyntheticPets(many, side, seed, split)
        labels = [pets.label(index) for index in range(many)]
        flips = flipped(labels, "random", pets.classes, seed) if split == "train" else {}
        for index, label in enumerate(labels):
            file = folder / split / pets.classes[flips.get(index, label)] / f"{index:05d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pets[index][0].save(file)
            if index in flips:
                wrong.append(escape_csv_cell(file.relative_to(folder).as_posix()))
    return wrong


# ---- scores


def suspicions(run_dir: Path, wrong: set[str]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Score -> [n], the higher the more suspicious, and [n] whether the label was flipped."""
    scores, images = Scores.read(run_dir / FILE), images_of(run_dir)
    known = examine(images, scores, load_model(str(run_dir)))
    truth = np.array(
        [escape_csv_cell(sample.sample_id) in wrong for sample in images.samples["train"]]
    )
    labels, value = images.labels[: len(truth)], known.scores
    found = {
        "aum": -value["aum"],
        "el2n": value["el2n"],
        "loss_mean": value["loss_mean"],
        "loss_last": value["loss_last"],
        "p_mean": -value["p_mean"],
        "p_std": value["p_std"],
        "forgetting": value["forgetting"],
        "correct": -value["correct"],
    }
    for block, shares in known.experts.items():
        found[f"experts L{block}"] = class_doubt(shares, labels)
    if known.experts:
        found["experts"] = known.unlike_class
    found |= final_scores(labels, probabilities(images, load_model(str(run_dir))))
    if known.features is not None:
        found["features"] = class_doubt(known.features[: len(truth)].astype(np.float32), labels)
    return found, truth


def probabilities(images: RunImages, model: SavedModel) -> np.ndarray:
    """[n, C] what the finished model says of the training images, without augmentation."""
    train, found = images.samples["train"], []
    with evaluating(model.net), torch.inference_mode():
        for start in range(0, len(train), BATCH):
            opened = [
                images.collection.open(sample, model.image_size)
                for sample in train[start : start + BATCH]
            ]
            pixels = np.stack([square_pixels(image, model.image_size) for image in opened])
            found.append(model.net(network_input(model, pixels)).float().softmax(-1).numpy())
    return np.concatenate(found)


def final_scores(labels: np.ndarray, p: np.ndarray) -> dict[str, np.ndarray]:
    """The finished model's p of the label; and what cleanlab, if it is installed, makes of the same p [n, C]."""
    found = {"p_final": -p[np.arange(len(p)), labels]}
    if find_spec("cleanlab") is not None:
        from cleanlab.rank import get_label_quality_scores

        for method in ("self_confidence", "normalized_margin", "confidence_weighted_entropy"):
            found[f"cleanlab {method}"] = -get_label_quality_scores(labels, p, method=method)
        found["cleanlab adjusted"] = -get_label_quality_scores(labels, p, adjust_pred_probs=True)
    return found


def finds(suspicion: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """How well a score finds the flips: area under the ROC curve, and their share among the first `TOP` of the images.

    An image without a score counts as the least suspicious one.
    """
    from sklearn.metrics import roc_auc_score

    value = np.where(np.isfinite(suspicion), suspicion, -np.inf)
    value = np.where(np.isneginf(value), np.min(value[np.isfinite(value)]) - 1, value).astype(
        np.float64
    )
    first = np.argsort(-value, kind="stable")[: round(TOP * len(value))]
    return {
        "auroc": rounded(float(roc_auc_score(truth, value)), 4),
        "precision": rounded(float(truth[first].mean()), 4),
    }
