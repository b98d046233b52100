"""Everything that is known about the images of a run: scores of the training, the files themselves, and their doubles.

One pass opens each image once: its pixels are measured (`data.quality`), and the run's own model says what it sees.
Numbers lie in arrays with a row per image, the splits one after the other; nothing else is kept of an image.

Axes: n images of all splits, m of the training set (the first m of n), D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from moevision.analysis.collect import network_input
from moevision.analysis.images import data_settings
from moevision.data import ImageDataModule
from moevision.data.collection import SPLITS, Collection, Sample
from moevision.data.doubt import class_doubt
from moevision.data.duplicates import (
    Nearest,
    nearest_by_experts,
    nearest_by_features,
    nearest_by_hash,
    projection,
    whitened,
)
from moevision.data.images import BadImageError
from moevision.data.quality import LOOK, SIDE, look_at
from moevision.data.scores import SCORES, Floats, Ints, Scores, keys_of, rows_of
from moevision.data.transforms import Pixels, square_pixels
from moevision.errors import UserError
from moevision.layers.routing import evaluating
from moevision.limits import usable_cores
from moevision.models.io import SavedModel, best_device
from moevision.names import csv_name

_BATCH = 64


@dataclass
class RunImages:
    """The images of a run in the order of its splits, train first.

    Attributes:
        collection: where they are opened.
        class_names: in words; labels index them.
        samples: split -> its images.
    """

    collection: Collection
    class_names: list[str]
    samples: dict[str, list[Sample]]

    def __post_init__(self) -> None:
        """Where each split begins."""
        self.splits = [split for split in SPLITS if split in self.samples]
        sizes = [len(self.samples[split]) for split in self.splits]
        self.starts = np.concatenate([[0], np.cumsum(sizes)])

    def __len__(self) -> int:
        """Number of images, n."""
        return int(self.starts[-1])

    def place(self, index: int) -> tuple[str, Sample]:
        """The split of an image, and the image."""
        split = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.splits[split], self.samples[self.splits[split]][index - int(self.starts[split])]

    def each(self) -> Iterator[tuple[str, Sample]]:
        """All of them, in order."""
        for split in self.splits:
            for sample in self.samples[split]:
                yield split, sample

    @property
    def split_of(self) -> Ints:
        """[n] number of the split, as in `splits`."""
        return np.repeat(np.arange(len(self.splits)), np.diff(self.starts))

    @property
    def labels(self) -> Ints:
        """[n]."""
        return np.fromiter((sample.label for _, sample in self.each()), np.int64, len(self))


def images_of(run_dir: Path) -> RunImages:
    """The images of a run, in the split that it recorded; nothing is decoded for good.

    Raises:
        UserError: if the data are no longer there.
    """
    known = signature(ImageDataModule).parameters
    settings = {name: value for name, value in data_settings(run_dir).items() if name in known}
    settings |= {name: tuple(settings[name]) for name in ("mean", "std") if name in settings}
    data = ImageDataModule(**(settings | {"cache_mb": 0, "num_workers": 0, "download": False}))
    data.run_dir = run_dir if (run_dir / "splits.csv").is_file() else None  # and none is written
    data.setup()
    datasets = data.contents.datasets
    samples = {split: list(dataset.samples) for split, dataset in datasets.items()}
    return RunImages(datasets["train"].collection, data.class_names, samples)


@dataclass
class Known:
    """What is known of n images.

    Attributes:
        look: [n] of `quality.LOOK`.
        problems: index -> why it can't be read.
        prediction: [n] class that the model names; -1: not asked.
        certainty: [n] its probability.
        margin: [n] its probability of the label less the largest other one; NaN: not asked.
        by_hash, by_features: the most alike image, and the most alike one of another split.
        scores: name -> [m]; NaN where there are none, or the image has no visit.
        experts: block -> [m, E].
        visits: [m].
        unlike_class: [m] how little the experts that computed the image are those of its class (`class_doubt`).
        by_experts: [m] the image of the same class that the experts computed most alike.
        features: float16 [n, at most 64] what is in front of the classifier, projected; None: not asked.
        white: [n, D] the features, whitened; None: not asked.
    """

    look: npt.NDArray[Any]
    prediction: Ints
    certainty: Floats
    margin: Floats
    by_hash: tuple[Nearest, Nearest]
    by_features: tuple[Nearest, Nearest]
    scores: dict[str, Floats]
    experts: dict[int, Floats]
    visits: Ints
    unlike_class: Floats
    by_experts: Nearest
    features: npt.NDArray[np.float16] | None = None
    white: Floats | None = None
    problems: dict[int, str] = field(default_factory=dict)

    def most_alike(self, *, across: bool) -> Nearest:
        """The most alike image of each, or the one of another split: by hash if one is near, else by features.

        The distance orders pairs, all by hash first: bits that differ, or 100 and one less the cosine.
        """
        by_hash, by_features = self.by_hash[across], self.by_features[across]
        near = by_hash.other >= 0
        return Nearest(
            np.where(near, by_hash.other, by_features.other),
            np.where(near, by_hash.distance, 100 + by_features.distance),
        )


def scores_in_order(scores: Scores, images: RunImages) -> tuple[Ints, dict[str, Floats], dict[int, Floats]]:
    """Visits [m], scores [m] each and experts [m, E] in the order of the training images.

    Raises:
        UserError: if the scores are of other images.
    """
    train = images.samples["train"]
    keys, known = keys_of(map(csv_name, scores.images)), keys_of(csv_name(sample.sample_id) for sample in train)
    row = rows_of(keys, known)
    there = row >= 0
    if not there.any():
        raise UserError("scores.csv is of other images than the run's training set: it was replaced, or its data were.")
    visits = np.where(there, scores.visits[row], 0)
    values = {name: np.where(there, scores.scores[name][row], np.nan).astype(np.float32) for name in SCORES}
    experts = {
        block: np.where(there[:, None], shares[row], np.nan).astype(np.float32)
        for block, shares in scores.experts.items()
    }
    return visits, values, experts


def examine(
    images: RunImages, scores: Scores, model: SavedModel | None, advance: Callable[[int], None] = lambda _: None
) -> Known:
    """Find out everything.

    Args:
        images: of the run.
        scores: of its training images.
        model: the run's own; None leaves the pass over the images out.
        advance: called with the number of images that were looked at since the last call.

    Raises:
        UserError: if the scores are of other images, or the model has other classes.
    """
    n = len(images)
    visits, values, experts = scores_in_order(scores, images)
    labels = images.labels[: len(visits)]
    unlike = class_doubt(np.concatenate(list(experts.values()), 1), labels) if experts else np.full(len(visits), np.nan)
    known = Known(
        np.zeros(n, LOOK), np.full(n, -1), np.full(n, np.nan, np.float32), np.full(n, np.nan, np.float32),
        (Nearest.none(n), Nearest.none(n)), (Nearest.none(n), Nearest.none(n)), values, experts, visits,
        unlike.astype(np.float32),
        nearest_by_experts(list(experts.values()), labels) if experts else Nearest.none(len(visits)),
    )  # fmt: skip
    if model is None:
        return known
    known.features = _look_at_all(images, model, known, advance)
    split, read = images.split_of, known.look["read"]
    known.white = None if known.features is None else whitened(known.features, read)
    known.by_hash = nearest_by_hash(known.look["hash"], read & known.look["has_hash"], split, known.white)
    if known.white is not None:
        known.by_features = nearest_by_features(known.white, read, split)
    return known


def _look_at_all(
    images: RunImages, model: SavedModel, known: Known, advance: Callable[[int], None]
) -> npt.NDArray[np.float16] | None:
    """Fill `look`, `problems` and what the model says; features float16 [n, at most 64] if any could be read."""
    net = model.net.to(best_device())
    features, onto, labels = None, None, images.labels
    everything = images.each()
    workers = min(16, usable_cores())

    def open_one(sample: Sample) -> tuple[npt.NDArray[Any], Pixels] | str:
        try:
            image = images.collection.open(sample, max(SIDE, model.image_size))
        except BadImageError as error:
            return error.reason
        return look_at(image), square_pixels(image, model.image_size)

    with ThreadPoolExecutor(workers) as pool, evaluating(net):
        for start in range(0, len(images), _BATCH):
            batch = [sample for _, (_, sample) in zip(range(_BATCH), everything, strict=False)]
            found = list(pool.map(open_one, batch))
            rows = [start + place for place, each in enumerate(found) if not isinstance(each, str)]
            known.problems |= {start + place: each for place, each in enumerate(found) if isinstance(each, str)}
            if rows:
                looks, pixels = zip(*(each for each in found if not isinstance(each, str)), strict=True)
                known.look[rows] = np.stack(looks)
                seen, probabilities = _answers(net, network_input(model, np.stack(pixels)))
                known.prediction[rows] = probabilities.argmax(1)
                known.certainty[rows] = probabilities.max(1)
                known.margin[rows] = _margins(probabilities, labels[rows])
                if onto is None:
                    onto = projection(seen.shape[1])
                    features = np.zeros((len(images), onto.shape[1]), np.float16)
                cast(Any, features)[rows] = np.clip(seen @ onto, -6e4, 6e4)
            advance(len(batch))
    return features


def _margins(probabilities: Floats, labels: Ints) -> Floats:
    """Of [B, C]: p of the label less the largest other p, the order of cleanlab's normalized margin."""
    rows = np.arange(len(labels))
    own, others = probabilities[rows, labels], probabilities.copy()
    others[rows, labels] = -np.inf
    return own - others.max(1) if others.shape[1] > 1 else own


@torch.inference_mode()
def _answers(net: nn.Module, pixels: torch.Tensor) -> tuple[Floats, Floats]:
    """What is in front of the classifier [B, D] and the probabilities [B, C]."""
    state = cast(Any, net)
    tokens = state.forward_features(pixels)
    logits = state.forward_head(tokens)
    seen = state.forward_head(tokens, pre_logits=True)
    return seen.float().cpu().numpy(), logits.float().softmax(-1).cpu().numpy()
