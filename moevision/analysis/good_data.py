"""`moevision data score`: what is known about the images of a run, as a table and as a page of ranked lists.

images.csv   a row for each image of every split: scores, the model's prediction, measures of its pixels, duplicates
page.html    ranked lists, a map, tables of classes and experts; its images are in thumbs/, and nothing is downloaded

Each image is opened once: its pixels are measured (`image_measures`), and the run's own model classifies it. Then
near-duplicates are searched for (`nearest_by_hash`, `nearest_by_features`). The results are arrays with a row for each
image, one split after the other; pixels are not kept.

The page only ranks images. Which of them are bad, a person decides there; the browser saves these decisions as
decisions.csv, which `moevision data prune --by decisions` and `fit --data.relabel` read.

Axes: n images of all splits, m of the training set (the first m of n), D features, C classes, H height, W width.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from importlib.resources import files
from inspect import signature
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import urlencode

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image, ImageOps
from scipy.fft import dctn
from scipy.ndimage import laplace
from scipy.special import log_softmax

from moevision import __version__
from moevision.analysis.collect import network_input
from moevision.analysis.images import EXPLORER, data_settings
from moevision.analysis.information import as_json
from moevision.data.collection import SPLITS, Collection, Sample
from moevision.data.images import BadImageError, full_size
from moevision.data.scores import FILE, SCORES, Scores
from moevision.data.transforms import square_pixels
from moevision.errors import UserError, escape_controls, escape_csv_cell, json_text
from moevision.files import csv_text, require_own_file, write_text_atomic
from moevision.layers.routing import evaluating
from moevision.limits import usable_cores
from moevision.models.io import SavedModel, best_device, load_model
from moevision.types import Array, Flags, Floats, Ints, Json, Pixels
from moevision.words import shell_word, with_progress

TABLE, PAGE, THUMBS = "images.csv", "page.html", "thumbs"
THUMB = 112  # px, the longer side of an image on the page
# The map: columns are bins of the mean probability of the label, rows are bins of its standard deviation.
_MAP_COLUMNS, _MAP_ROWS = 24, 16
_MAX_SPREAD = 0.5  # the largest possible standard deviation of numbers in [0, 1]
# Below this accuracy the lists rank mistakes of the model rather than of the images.
_WEAK_ACCURACY = 0.6
_MIN_VISITS = 3  # of an image during the training, for scores that need several
# Where no image has so many, the mean margin is largely that of the training's start: of the lists of doubtful labels
# the finished model's comes first.
_MANY_VISITS = 10
_TABLE_ROWS = 1000  # of a table of the page, at most
_GROUP_IMAGES = 5  # images shown for each class or expert
_MAX_GROUPS = 64  # classes or experts that are shown with images
_LITTLE_WORK = 0.5  # work of an expert, relative to an even share, that the page calls little
_GREY = 0.01  # mean difference of channels, 0 to 1, below which an image has no visible colour
_MAX_GREY_SHARE = 0.5  # grey images are listed only if at most this share of the images is grey


def score_run(
    run_dir: Path, out: Path, *, show: int = 40, quick: bool = False, command: str = ""
) -> Json:
    """Examine the images of a run, and write the table and the page to `out`.

    The page shows `show` images per list. With `quick` only the scores are used, and only images that the page shows
    are opened. Returns the values from which the page was rendered.
    """
    # Only files that begin as this verb's do are replaced.
    require_own_file(out / TABLE, b"split,image,label,")
    require_own_file(out / PAGE, b'content="moevision ')

    scores = Scores.read(run_dir / FILE)
    images = images_of(run_dir)
    model = None if quick else load_model(str(run_dir))

    facts = examine(images, scores, model)
    page = {
        **page_content(images, facts, show),
        "title": f"The images of {escape_controls(run_dir.resolve().name)}",
        "command": escape_controls(command),
        "quick": quick,
        "explorer": EXPLORER,
        "explorer_command": f"moevision demo {shell_word(escape_controls(str(run_dir)))}",
        "version": __version__,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        write_text_atomic(out / TABLE, table_lines(images, facts))
        write_text_atomic(out / PAGE, render(page, Thumbnails(images, out / THUMBS)))
    except OSError as error:
        raise UserError(
            f"{out} can't be written to ({error.strerror}): give --out another folder."
        ) from error
    return page


# ---- measures of the pixels of one image

MEASURED_SIDE = 224
MEASURES = np.dtype(
    [
        ("width", np.int32),
        ("height", np.int32),
        ("sharpness", np.float32),
        ("brightness", np.float32),
        ("colour", np.float32),
        ("hash", np.uint64),
        ("has_hash", np.bool_),
        ("read", np.bool_),
    ]
)
"""Measures of one image, 33 bytes; `read` says whether it could be decoded, `has_hash` whether `hash` is meaningful."""
_GRID = 32
# Standard deviation of the 32 x 32 luma, in grey levels, below which the bits of a perceptual hash are only noise.
_MIN_CONTRAST = 2.0


def image_measures(image: Image.Image) -> Array:
    """Measure an RGB image, perhaps decoded at a reduced size by `safe_open`; a 0-d array of `MEASURES`.

    All but width and height is measured after shrinking the image to a short side of at most `MEASURED_SIDE`, so that
    photos of different cameras are comparable. `sharpness` is the variance of the Laplacian of the luma, in grey
    levels² (Pech-Pacheco et al., ICPR 2000, LAPV), which is low for an image that is blurred or has no detail.
    `brightness` is the mean luma, 0 to 1. `colour` is the mean over pixels of the largest less the smallest channel, 0
    (grey) to 1.
    """
    (width, height), _ = full_size(image)
    if min(image.size) > MEASURED_SIDE:
        image = ImageOps.cover(image, (MEASURED_SIDE, MEASURED_SIDE), Image.Resampling.BILINEAR)

    luma = image.convert("L")
    rgb = np.asarray(image)  # [H, W, 3]

    measures = np.zeros((), MEASURES)
    measures["width"] = width
    measures["height"] = height
    measures["sharpness"] = laplacian_variance(np.asarray(luma, np.float32))
    measures["brightness"] = np.asarray(luma).mean() / 255
    measures["colour"] = (rgb.max(-1) - rgb.min(-1)).mean() / 255
    measures["hash"], measures["has_hash"] = perceptual_hash(luma)
    measures["read"] = True
    return measures


def laplacian_variance(luma: Floats) -> float:
    """Variance of the four-neighbour Laplacian of [H, W] without the border; 0 for less than 3 x 3 pixels."""
    if min(luma.shape) < 3:
        return 0.0
    return float(laplace(luma)[1:-1, 1:-1].var())


def perceptual_hash(luma: Image.Image) -> tuple[np.uint64, bool]:
    """The hash of a grey image, and whether the image has enough contrast for one.

    Each of 64 bits says whether one of the lowest 8 x 8 frequencies (DCT-II of the 32 x 32 luma) is above their median,
    as in pHash (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010). Hashes are similar
    for copies in another size or compression, but not for mirrored or strongly cropped ones.
    """
    grid = np.asarray(luma.resize((_GRID, _GRID), Image.Resampling.BILINEAR), np.float64)
    frequencies = dctn(grid)[:8, :8].ravel()[1:]  # [63], without the mean of the image
    is_high = frequencies > np.median(frequencies)
    bits = np.packbits(np.append(False, is_high))  # 8 bytes; the bit of the mean is always 0
    has_contrast = bool(grid.std() >= _MIN_CONTRAST)
    return bits.view(">u8")[0].astype(np.uint64), has_contrast


# ---- near-duplicates: for each image the most similar other one, and the most similar one of another split
#
# Similarity is measured in two ways, because each misses pairs that the other finds: by a perceptual hash, and by the
# features of a model, whitened so that they distinguish images rather than classes. So that a million images take
# bounded time, both searches are approximate and may miss pairs:
# - hashes are sorted under `NUM_ORDERS` permutations of their bits, and compared with their `WINDOW` next neighbours
#   (Charikar, STOC 2002, §3). Every image that shares its hash with another is found, and pairs that differ in four
#   bits nearly always. Where more than `SURE_BITS` bits differ, the features must also be similar: otherwise there are
#   chance matches, whose number grows with the number of all pairs. (50,000 images take 0.3 s; all pairs, 6 s.)
# - features are compared only within cells of at most `MAX_CELL` images with the same nearest centroid (as in
#   SemDeDup, arXiv:2303.09540), so that pairs across the border of two cells are missed. Up to `MAX_CELL` images there
#   is one cell.

NUM_ORDERS, WINDOW = 16, 16
# How many of 64 bits may differ: in any pair, and in a pair whose features are not compared.
MAX_BITS, SURE_BITS = 10, 4
# Least cosine of the features where more than `SURE_BITS` differ. Of 60 000 CIFAR-10 images, the pairs in which 7 to 10
# bits differ and the cosine is lower are no copies, by eye.
MIN_COSINE = 0.7
# Added to distances by features: larger than any number of bits, so that these pairs are ranked behind those by hash.
_BEHIND_HASHES = 100
MAX_CELL = 16_384  # most images of a cell, among which features are compared
FEATURE_WIDTH = 64  # dimensions of the features kept for an image: 128 bytes
_COMPARED_ROWS = 1024  # rows of a cell's matrix of cosines that are computed at once
_KMEANS_ITERATIONS = 5


@dataclass
class Nearest:
    """For each of n images the most similar other image, and the distance to it."""

    other: Ints  # [n] index of the other image; -1: none
    distance: Floats  # [n]; infinite: none

    @classmethod
    def none(cls, n: int) -> Nearest:
        """No pair is known yet."""
        return cls(np.full(n, -1, np.int64), np.full(n, np.inf, np.float32))

    def update(self, image: Ints, other: Ints, distance: Floats) -> None:
        """Consider candidate pairs, [pairs] each: keep those nearer than the known ones.

        An image may occur in several pairs.
        """
        # By falling distance: where NumPy assigns to an image several times, the last value stays, the nearest.
        order = np.lexsort((other, distance))[::-1]
        is_nearer = distance[order] < self.distance[image[order]]
        order = order[is_nearer]
        self.other[image[order]] = other[order]
        self.distance[image[order]] = distance[order]

    def update_by_cosine(self, cosine: Floats, images: Ints, others: Ints) -> None:
        """Consider the largest of each row of cosines [images, others]; -inf stands for a pair that doesn't count."""
        best = cosine.max(1)
        has_pair = np.isfinite(best)
        other = others[cosine.argmax(1)]
        self.update(images[has_pair], other[has_pair], 1 - best[has_pair])


class Neighbours(NamedTuple):
    """For each image the most similar other image, and the most similar one of another split.

    A flag "of another split" is the index of the one or the other.
    """

    overall: Nearest
    across: Nearest  # of another split

    @classmethod
    def none(cls, n: int) -> Neighbours:
        """No pair is known yet."""
        return cls(Nearest.none(n), Nearest.none(n))


def nearest_by_hash(
    hashes: Ints, usable: Flags, split: Ints, white: Floats | None = None
) -> Neighbours:
    """The nearest images by the number of bits in which their hashes differ, at most `MAX_BITS`.

    `hashes`, `usable` (whether to compare an image) and `split` (its number) are [n]. Pairs in which more than
    `SURE_BITS` bits differ must also have similar features, `white` [n, D] from `whitened`; None: any pair counts.
    """
    neighbours = Neighbours.none(len(hashes))
    rows = np.flatnonzero(usable)
    as_bytes = hashes[rows].astype(">u8").view(np.uint8)  # [8 · rows], big-endian
    bits = np.unpackbits(as_bytes.reshape(-1, 8), axis=1)  # [rows, 64]

    generator = np.random.default_rng(0)
    for _ in range(NUM_ORDERS):
        shuffled = np.ascontiguousarray(bits[:, generator.permutation(64)])
        key = np.packbits(shuffled, axis=1).view(">u8")[:, 0]  # [rows]
        order = rows[np.argsort(key, kind="stable")]

        for step in range(1, WINDOW + 1):
            a, b, distance = _similar_hashes(order[:-step], order[step:], hashes, white)
            # Each pair in both directions.
            image = np.concatenate([a, b])
            other = np.concatenate([b, a])
            distance = np.tile(distance, 2)
            neighbours.overall.update(image, other, distance)

            crosses = split[image] != split[other]  # [pairs]
            neighbours.across.update(image[crosses], other[crosses], distance[crosses])
    return neighbours


def _similar_hashes(
    a: Ints, b: Ints, hashes: Ints, white: Floats | None
) -> tuple[Ints, Ints, Floats]:
    """Those pairs of images a[i] and b[i] that are near enough, and the number of bits in which they differ."""
    num_bits = np.bitwise_count(hashes[a] ^ hashes[b])  # [pairs]
    is_near = num_bits <= MAX_BITS
    if white is not None:
        unsure = np.flatnonzero(is_near & (num_bits > SURE_BITS))
        cosine = np.einsum("pd,pd->p", white[a[unsure]], white[b[unsure]])
        is_near[unsure] = cosine >= MIN_COSINE
    return a[is_near], b[is_near], num_bits[is_near].astype(np.float32)


def nearest_by_features(white: Floats, usable: Flags, split: Ints) -> Neighbours:
    """The nearest images by 1 - cosine of unit vectors [n, D], such as `whitened` features.

    `usable` and `split` are those of `nearest_by_hash`.
    """
    neighbours = Neighbours.none(len(white))
    rows = np.flatnonzero(usable)
    for members in _feature_cells(white[rows]):
        cell = rows[members]
        for start in range(0, len(cell), _COMPARED_ROWS):
            block = cell[start : start + _COMPARED_ROWS]
            cosine = white[block] @ white[cell].T  # [block, cell]
            row = np.arange(len(block))
            cosine[row, start + row] = -np.inf  # an image isn't its own neighbour
            neighbours.overall.update_by_cosine(cosine, block, cell)

            cosine[split[block, None] == split[cell]] = -np.inf
            neighbours.across.update_by_cosine(cosine, block, cell)
    return neighbours


def nearest_by_experts(shares: Sequence[Floats], labels: Ints) -> Nearest:
    """For each image the one of the same class that was most similarly routed, by 1 - Bhattacharyya coefficient.

    `shares` are, for each layer, [m, E] the experts' shares in an image (NaN: unknown). The coefficient of images with
    shares p and q is the mean over layers of Σ_e √(p_e q_e), 1 for equal shares.
    """
    # The coefficient is the dot product of square roots, which have unit length once divided by √(layers).
    roots = np.sqrt(np.concatenate(shares, axis=1), dtype=np.float32)  # [m, layers · E]
    roots /= np.sqrt(np.float32(len(shares)))
    is_recorded = np.isfinite(roots).all(1)  # [m]

    nearest = Nearest.none(len(labels))
    for label in np.unique(labels[is_recorded]):
        of_class = is_recorded & (labels == label)
        # Among images of one class; the argument for their splits has no influence on `overall`.
        in_class = nearest_by_features(roots, of_class, labels).overall
        nearest.other[of_class] = in_class.other[of_class]
        nearest.distance[of_class] = in_class.distance[of_class]
    return nearest


def whitened(features: Floats, usable: Flags) -> Floats:
    """Features [n, D] transformed to identity covariance, then scaled to unit length for each image.

    Directions without variance are left out. Images that aren't `usable` [n] don't count, and their result is 0.
    """
    centred = features.astype(np.float32)
    centred -= centred[usable].mean(0)
    centred[~usable] = 0

    covariance = centred.T @ centred / usable.sum()  # [D, D]
    variance, axes = np.linalg.eigh(covariance)  # [D], [D, D]
    has_variance = variance > 1e-5 * variance.max()  # beyond the rounding of features in float16
    scaled_axes = axes[:, has_variance] / np.sqrt(variance[has_variance] + 1e-12)

    white: Floats = centred @ scaled_axes.astype(np.float32)
    length = np.linalg.norm(white, axis=1, keepdims=True)
    white /= np.maximum(length, np.float32(1e-12))
    return white


def _feature_cells(white: Floats) -> list[Ints]:
    """A partition of n images into cells of at most `MAX_CELL`, by their nearest centroid: arrays of indices.

    The centroids are those of k-means on a sample.
    """
    n = len(white)
    if n <= MAX_CELL:
        return [np.arange(n)]
    from sklearn.cluster import KMeans  # slow to import, and not needed for fewer images

    drawn = np.random.default_rng(0).choice(n, min(n, 2 * MAX_CELL), replace=False)
    # Twice as many as needed, so that few clusters are larger than a cell.
    num_clusters = 2 * math.ceil(n / MAX_CELL)
    kmeans = KMeans(
        num_clusters, init="random", n_init=1, max_iter=_KMEANS_ITERATIONS, random_state=0
    )
    cluster = kmeans.fit(white[np.sort(drawn)]).predict(white)

    # Images sorted by cluster, split where the next cluster begins; large clusters are cut into several cells.
    order = np.argsort(cluster, kind="stable")
    starts = np.flatnonzero(np.diff(cluster[order])) + 1
    cells: list[Ints] = []
    for members in np.split(order, starts):
        cells += np.split(members, range(MAX_CELL, len(members), MAX_CELL))
    return cells


@cache
def projection(width: int) -> Floats:
    """The same random orthonormal directions [D, at most `FEATURE_WIDTH`] to project features of D = `width` on."""
    gaussian = np.random.default_rng(0).standard_normal((width, min(width, FEATURE_WIDTH)))
    return np.linalg.qr(gaussian).Q.astype(np.float32)


# ---- how little an image fits its class

_DOUBT_BATCH = 4096  # images whose probabilities are computed at once


def class_doubt(x: Floats, labels: Ints) -> Floats:
    """[n] -ln p(label | x) by linear discriminant analysis (Fisher 1936; Hastie et al., ESL, §4.3).

    With x [n, H] the experts' shares in each image, it measures how little these fit the image's class; with x the
    pooled features of a dense model it is the control for that. 0: x fits the label without doubt. NaN where x has NaN,
    and everywhere if there is only one class.
    """
    doubt = np.full(len(x), np.nan, np.float32)
    rows = np.flatnonzero(~np.isnan(x).any(1))
    classes, class_index = np.unique(labels[rows], return_inverse=True)  # [C], [rows]
    if len(classes) < 2:
        return doubt

    counts = np.bincount(class_index)  # [C]
    means = np.zeros((len(classes), x.shape[1]))  # [C, H]
    np.add.at(means, class_index, x[rows])
    means /= counts[:, None]

    deviations = x[rows] - means[class_index]  # [rows, H]
    covariance = deviations.T @ deviations / len(rows)  # [H, H], shared by all classes
    # The shares of a layer sum to 1, so the covariance is singular: a ridge makes it invertible.
    ridge = 1e-3 * np.trace(covariance) / len(covariance) + 1e-12
    covariance += np.eye(len(covariance)) * ridge

    # The discriminant of class c is x · Σ⁻¹ μ_c - ½ μ_c · Σ⁻¹ μ_c + ln of its prior.
    weight = np.linalg.solve(covariance, means.T)  # [H, C]
    bias = np.log(counts / len(rows)) - 0.5 * (means * weight.T).sum(1)  # [C]

    for start in range(0, len(rows), _DOUBT_BATCH):
        block = rows[start : start + _DOUBT_BATCH]
        log_p = log_softmax(x[block] @ weight + bias, axis=1)  # [block, C]
        own_class = class_index[start : start + _DOUBT_BATCH, None]
        doubt[block] = -np.take_along_axis(log_p, own_class, 1)[:, 0]
    return doubt


# ---- examining the images of a run

_BATCH = 64  # images that are opened and classified at once


@dataclass
class RunImages:
    """The images of a run in the order of its splits, train first."""

    collection: Collection  # opens them
    class_names: list[str]  # readable names; a label is an index into them
    samples: dict[str, list[Sample]]  # split -> its images

    def __post_init__(self) -> None:
        """Set `splits` (names, train first) and, for all n images, `all`, `names`, `split_of` (index) and `labels`."""
        self.splits = [split for split in SPLITS if split in self.samples]
        self.all = [sample for split in self.splits for sample in self.samples[split]]
        self.names = [sample.sample_id for sample in self.all]
        sizes = [len(self.samples[split]) for split in self.splits]
        self.split_of = np.repeat(np.arange(len(sizes)), sizes)
        self.labels = np.array([sample.label for sample in self.all], np.int64)

    def __len__(self) -> int:
        return len(self.all)

    def __iter__(self) -> Iterator[tuple[str, Sample]]:
        """The split of each image, and the image."""
        return ((split, sample) for split in self.splits for sample in self.samples[split])


def images_of(run_dir: Path) -> RunImages:
    """The images of a run, in the splits that it recorded; none is decoded."""
    from moevision.data import ImageDataModule  # imports Lightning, which is slow

    names = signature(ImageDataModule).parameters.keys() - {"mean", "std"}  # the model has these
    settings = {name: value for name, value in data_settings(run_dir).items() if name in names}
    settings |= {"cache_mb": 0, "num_workers": 0, "download": False}

    data = ImageDataModule(**settings)
    # With a run folder `setup` reads its splits.csv, or writes one: a folder without it is left as it is.
    if (run_dir / "splits.csv").is_file():
        data.run_dir = run_dir
    data.setup()
    datasets = data.contents.datasets
    samples = {split: list(dataset.samples) for split, dataset in datasets.items()}
    return RunImages(datasets["train"].collection, data.class_names, samples)


@dataclass
class ImageFacts:
    """What is known of n images, of which the first m are the training set.

    Scores are NaN for an image that the training never visited, or that scores.csv lacks.
    """

    scores: dict[str, Floats]  # name -> [m]
    experts: dict[int, Floats]  # index of the block -> [m, E] shares of its experts in each image
    visits: Ints  # [m] how often the training looked at the image
    unlike_class: Floats  # [m] how little the experts' shares fit the image's class (`class_doubt`)
    by_experts: Nearest  # [m] the most similarly routed image of the same class
    measures: Array  # [n] of `MEASURES`
    # Of the model; "not run" also stands for an image that can't be read.
    prediction: Ints  # [n] the most probable class; -1: not run
    certainty: Floats  # [n] its probability; NaN: not run
    margin: Floats  # [n] probability of the label less the largest other one; NaN: not run
    by_hash: Neighbours
    by_features: Neighbours
    # float16 [n, at most `FEATURE_WIDTH`] projected input of the classifier; None: not run
    features: Floats | None = None
    white: Floats | None = None  # [n, D] the features, `whitened`
    problems: dict[int, str] = field(default_factory=dict)  # index -> why it can't be read

    @classmethod
    def of_scores(cls, images: RunImages, scores: Scores) -> ImageFacts:
        """The scores of the training images and what is computed from them alone; the rest is empty."""
        row_by_name = {escape_csv_cell(name): row for row, name in enumerate(scores.images)}
        # [m] the row of each training image in `scores`; -1: it has none
        rows = np.array(
            [
                row_by_name.get(escape_csv_cell(sample.sample_id), -1)
                for sample in images.samples["train"]
            ],
            np.int64,
        )
        if (rows < 0).all():
            raise UserError(
                "scores.csv is of other images than the run's training set: it was replaced, or its data were."
            )
        n, m = len(images), len(rows)
        labels = images.labels[:m]

        unlike_class = np.full(m, np.nan, np.float32)
        by_experts = Nearest.none(m)
        experts = {block: _rows_or_nan(shares, rows) for block, shares in scores.experts.items()}
        experts = {block: shares for block, shares in experts.items() if np.isfinite(shares).any()}
        if experts:
            shares = list(experts.values())
            unlike_class = class_doubt(np.concatenate(shares, axis=1), labels)
            by_experts = nearest_by_experts(shares, labels)

        return cls(
            scores={name: _rows_or_nan(scores.scores[name], rows) for name in SCORES},
            experts=experts,
            visits=np.where(rows < 0, 0, scores.visits[rows]),
            unlike_class=unlike_class,
            by_experts=by_experts,
            measures=np.zeros(n, MEASURES),
            prediction=np.full(n, -1),
            certainty=np.full(n, np.nan, np.float32),
            margin=np.full(n, np.nan, np.float32),
            by_hash=Neighbours.none(n),
            by_features=Neighbours.none(n),
        )

    def most_alike(self, across: bool) -> Nearest:
        """The most similar image of each (`across`: of another split): by hash if there is one, else by features.

        The distance is the number of bits that differ, or `_BEHIND_HASHES` + 1 - cosine.
        """
        by_hash = self.by_hash[across]
        by_features = self.by_features[across]
        has_hash_pair = by_hash.other >= 0
        other = np.where(has_hash_pair, by_hash.other, by_features.other)
        by_both = np.where(has_hash_pair, by_hash.distance, _BEHIND_HASHES + by_features.distance)
        return Nearest(other, by_both)


def _rows_or_nan(values: Array, rows: Ints) -> Floats:
    """`values[rows]` in float32; NaN where the index of a row is -1."""
    selected = values[rows].astype(np.float32)
    selected[rows < 0] = np.nan
    return selected


def examine(images: RunImages, scores: Scores, model: SavedModel | None) -> ImageFacts:
    """Collect everything that is known about the images of a run, from the scores of its training and from the images.

    With a model of None the images aren't opened.
    """
    facts = ImageFacts.of_scores(images, scores)
    if model is not None:
        measure_images(images, model, facts)
        find_neighbours(images, facts)
    return facts


def measure_images(images: RunImages, model: SavedModel, facts: ImageFacts) -> None:
    """Open each image once, and fill in its measures and the model's prediction, or why it can't be read."""
    net = model.net.to(best_device())
    open_image = partial(_open_image, images.collection, model)
    threads = ThreadPoolExecutor(min(16, usable_cores()))
    starts = range(0, len(images), _BATCH)
    with threads, evaluating(net), torch.inference_mode():
        for start in with_progress(starts, "looking at images", len(starts)):
            batch = images.all[start : start + _BATCH]
            pixels: dict[int, Pixels] = {}
            for index, result in enumerate(threads.map(open_image, batch), start):
                if isinstance(result, BadImageError):
                    facts.problems[index] = result.reason
                else:
                    facts.measures[index], pixels[index] = result
            if pixels:
                predict(model, pixels, images.labels, facts)


def _open_image(
    collection: Collection, model: SavedModel, sample: Sample
) -> tuple[Array, Pixels] | BadImageError:
    """The measures of an image, and its pixels prepared for the model, uint8 [S, S, 3]; or the error."""
    side = model.image_size
    try:
        image = collection.open(sample, max(MEASURED_SIDE, side))
    except BadImageError as error:
        return error
    return image_measures(image), square_pixels(image, side, model.framing)


def predict(
    model: SavedModel, pixels: Mapping[int, Pixels], labels: Ints, facts: ImageFacts
) -> None:
    """Fill in the model's predictions and features for a batch of images.

    `pixels` are index -> uint8 [S, S, 3] of B of the n images, `labels` [n] the classes of all.
    """
    net = cast(Any, model.net)
    rows = list(pixels)  # [B]
    x = network_input(model, np.stack(list(pixels.values())))  # [B, 3, S, S]
    tokens = net.forward_features(x)  # [B, N, D]
    logits = net.forward_head(tokens).float()  # [B, C]
    p = logits.softmax(-1).cpu().numpy()
    facts.prediction[rows] = p.argmax(1)
    facts.certainty[rows] = p.max(1)
    facts.margin[rows] = _margins(p, labels[rows])

    pooled = net.forward_head(tokens, pre_logits=True).float()  # [B, D]
    features = pooled.cpu().numpy()
    directions = projection(features.shape[1])
    if facts.features is None:
        facts.features = np.zeros((len(labels), directions.shape[1]), np.float16)
    facts.features[rows] = np.clip(features @ directions, -6e4, 6e4)  # within float16


def find_neighbours(images: RunImages, facts: ImageFacts) -> None:
    """Fill in the most similar images by hashes and by features."""
    is_read = facts.measures["read"]
    if facts.features is not None:
        facts.white = whitened(facts.features, is_read)
        facts.by_features = nearest_by_features(facts.white, is_read, images.split_of)
    is_hashed = is_read & facts.measures["has_hash"]
    facts.by_hash = nearest_by_hash(facts.measures["hash"], is_hashed, images.split_of, facts.white)


def _margins(probabilities: Floats, labels: Ints) -> Floats:
    """[B] p of the label less the largest other p, from [B, C]; ranks images as cleanlab's normalized margin does."""
    rows = np.arange(len(labels))
    of_label = probabilities[rows, labels]
    others = probabilities.copy()
    others[rows, labels] = 0  # the smallest value, so that the label's isn't the maximum
    result: Floats = of_label - others.max(1)
    return result


# ---- ranked lists


def lowest_rows(values: Array, count: int, among: Flags | None = None) -> Ints:
    """Rows of the `count` lowest finite values of [m], lowest first; `among` [m] restricts them to some rows."""
    finite = np.isfinite(values)
    rows = np.flatnonzero(finite if among is None else finite & among)
    return rows[np.argsort(values[rows], kind="stable")][:count]


def image_id(split: str, name: str) -> str:
    """The explorer's id of an image of a run.

    `name` is its sample id, or that as the run's files have it, escaped already: escaping it again changes nothing.
    """
    return f"{split}/{escape_csv_cell(name)}"


# ---- the table


def table_lines(images: RunImages, facts: ImageFacts) -> Iterator[str]:
    """The lines of images.csv, each written as the header of a table without rows."""
    columns = _image_columns(images, facts) | _neighbour_columns(images, facts)
    yield csv_text([*columns], [])
    # Columns of scores are shorter: only training images, which come first, have them.
    for row in zip_longest(*columns.values(), fillvalue=""):
        yield csv_text(row, [])


Columns = dict[str, Iterable[Any]]


def _image_columns(images: RunImages, facts: ImageFacts) -> Columns:
    measures = {}
    for name in ("width", "height", "sharpness", "brightness", "colour"):
        values = np.where(facts.measures["read"], facts.measures[name], np.nan)
        measures[name] = _numbers(values, ".0f" if name in ("width", "height") else ".5g")
    reasons = (facts.problems.get(index, "") for index in range(len(images)))
    return {
        "split": (split for split, _ in images),
        "image": map(escape_csv_cell, images.names),
        "label": _names(images.class_names, images.labels),
        "visits": facts.visits,
        **{name: _numbers(values) for name, values in facts.scores.items()},
        "unlike_class": _numbers(facts.unlike_class),
        "prediction": _names(images.class_names, facts.prediction),
        "certainty": _numbers(facts.certainty),
        "margin": _numbers(facts.margin),
        **measures,
        "problem": map(escape_csv_cell, reasons),
    }


def _neighbour_columns(images: RunImages, facts: ImageFacts) -> Columns:
    hash_twin, hash_leak = facts.by_hash
    feature_twin = facts.by_features.overall
    leak = facts.most_alike(across=True).other  # a duplicate in another split
    leak_cosine = np.full(len(images), np.nan)
    if facts.white is not None:
        leak_cosine = np.where(leak >= 0, np.vecdot(facts.white, facts.white[leak]), np.nan)
    return {
        "hash_twin": _names(images.names, hash_twin.other),
        "hash_bits": _numbers(hash_twin.distance, ".0f"),
        "feature_twin": _names(images.names, feature_twin.other),
        "feature_cosine": _numbers(1 - feature_twin.distance),
        "leak": _names(images.names, leak),
        "leak_bits": _numbers(hash_leak.distance, ".0f"),
        "leak_cosine": _numbers(leak_cosine),
        "expert_twin": _names(images.names, facts.by_experts.other),
        "expert_coefficient": _numbers(1 - facts.by_experts.distance),
    }


def _numbers(values: Array, form: str = ".5g") -> Iterator[str]:
    """Cells of a column; empty where a value isn't finite."""
    return (format(value, form) if math.isfinite(value) else "" for value in values)


def _names(names: Sequence[str], indices: Ints) -> Iterator[str]:
    """Cells of a column, by index; empty where an index is -1."""
    cells = [*map(escape_csv_cell, names), ""]  # the last one for -1
    return (cells[index] for index in indices)


# ---- the content of the page


@dataclass(frozen=True)
class Ranked:
    """One ranked list of the page, whose template says what it is ranked by."""

    key: str  # its anchor in the page
    rows: Ints  # [r] indices of the first images, in order
    values: Sequence[str]  # [r] text beside each image
    twins: Ints | None = None  # [r] in a list of pairs, the image that is shown beside each
    title: str = ""  # of a class or an expert; other lists have theirs in the template

    @classmethod
    def of(
        cls,
        key: str,
        values: Array,
        count: int,
        form: str,
        *,
        highest: bool = False,
        among: Flags | None = None,
        title: str = "",
    ) -> Ranked:
        """The images with the lowest or the highest values, each with its value formatted by `form`."""
        rows = lowest_rows(-values if highest else values, count, among)
        return cls(key, rows, [form.format(value) for value in values[rows]], title=title)

    def to_json(self, images: RunImages, facts: ImageFacts) -> Json:
        """The list with everything that the page shows of its images."""
        entries = []
        for rank, row in enumerate(self.rows):
            entry = image_entry(images, facts, int(row))
            entry["value"] = self.values[rank].replace("-", "\N{MINUS SIGN}")
            entry["twin"] = None
            if self.twins is not None:
                entry["twin"] = image_entry(images, facts, int(self.twins[rank]))
            entries.append(entry)
        return {"key": self.key, "title": self.title, "entries": entries}


def page_content(images: RunImages, facts: ImageFacts, show: int) -> Json:
    """The content of the page, except for the thumbnails, as JSON primitives."""
    m = len(facts.visits)
    lists = [ranked for ranked in ranked_lists(facts, images.split_of, show) if len(ranked.rows)]
    return {
        "counts": {split: len(images.samples[split]) for split in images.splits},
        "unreadable": len(facts.problems),
        "doubts": caveats(facts, images.labels),
        "lists": [ranked.to_json(images, facts) for ranked in lists],
        "map": map_cells(facts.scores["p_mean"], facts.scores["p_std"], images.labels[:m]),
        "map_size": {"columns": _MAP_COLUMNS, "rows": _MAP_ROWS, "most": _MAX_SPREAD},
        "classes": class_rows(images, facts),
        "experts": expert_rows(images, facts),
        "of_classes": [ranked.to_json(images, facts) for ranked in class_lists(images, facts)],
        "of_experts": [ranked.to_json(images, facts) for ranked in expert_lists(facts)],
        "class_names": images.class_names,
        "class_ids": list(map(escape_csv_cell, images.class_names)),
    }


def image_entry(images: RunImages, facts: ImageFacts, index: int) -> Json:
    """What the page shows of an image."""
    split = images.splits[images.split_of[index]]
    name = images.names[index]
    label = images.class_names[images.labels[index]]
    prediction = [*images.class_names, ""][facts.prediction[index]]  # -1, not run: ""
    query = urlencode({"picture": image_id(split, name)})
    return {
        "index": index,
        "split": split,
        "image": escape_controls(name),
        "id": escape_csv_cell(name),
        "link": f"{EXPLORER}/?{query}",
        "label": label,
        "label_id": escape_csv_cell(label),
        "prediction": prediction,
        "prediction_id": escape_csv_cell(prediction),
        "certainty": as_json(facts.certainty[index]),
    }


def ranked_lists(facts: ImageFacts, split: Ints, show: int) -> list[Ranked]:
    """The lists in the order of the page; those that need a measure or score that is missing are empty."""
    measures = facts.measures
    is_read = measures["read"]
    is_grey = is_read & (measures["colour"] < _GREY)
    if is_grey.sum() > _MAX_GREY_SHARE * is_read.sum():
        is_grey[:] = False
    unreadable = np.array(sorted(facts.problems)[:show], np.int64)
    sharpness = measures["sharpness"]
    brightness = measures["brightness"]
    by_label = [
        _by_score("doubtful", facts, show),
        Ranked.of("contradicted", facts.margin, show, "margin {:.2f}", among=split == 0),
    ]
    if facts.visits.max(initial=0) < _MANY_VISITS:
        by_label.reverse()
    return [
        *by_label,
        _by_score("hardest", facts, show),
        _by_score("unsteady", facts, show),
        Ranked.of("experts", facts.unlike_class, show, "−ln p {:.2f}", highest=True),
        _by_score("easiest", facts, show),
        _copies("leaks", facts, show, across=True, among=split > 0),
        _copies("doubles", facts, show, across=False),
        _computed_alike(facts, show),
        Ranked.of("blurred", sharpness, show, "variance {:.3g}", among=is_read),
        Ranked.of("dark", brightness, show, "brightness {:.2f}", among=is_read),
        _odd_sizes(measures, show),
        Ranked.of("grey", measures["colour"], show, "colour {:.3f}", among=is_grey),
        # The frame of the thumbnail shows the reason.
        Ranked("unreadable", unreadable, [""] * len(unreadable)),
    ]


# Lists by one score of the training: the score, the text beside an image, whether the highest comes first.
_BY_SCORE = {
    "doubtful": ("aum", "margin {:.2f}", False),
    "hardest": ("el2n", "EL2N {:.2f}", True),
    "unsteady": ("p_std", "spread {:.2f}", True),
    "easiest": ("el2n", "EL2N {:.2g}", False),
}


def _by_score(key: str, facts: ImageFacts, show: int) -> Ranked:
    score, form, highest = _BY_SCORE[key]
    return Ranked.of(key, facts.scores[score], show, form, highest=highest)


def _copies(
    key: str, facts: ImageFacts, show: int, *, across: bool, among: Flags | None = None
) -> Ranked:
    nearest = facts.most_alike(across)
    rows = _first_of_pairs(nearest, show, among)
    values = []
    for row in rows:
        if nearest.distance[row] < _BEHIND_HASHES:
            values.append(f"{nearest.distance[row]:.0f} of 64 bits differ")
        else:
            values.append(f"cosine {1 - facts.by_features[across].distance[row]:.3f}")
    return Ranked(key, rows, values, nearest.other[rows])


def _computed_alike(facts: ImageFacts, show: int) -> Ranked:
    nearest = facts.by_experts
    rows = _first_of_pairs(nearest, show)
    values = [f"coefficient {1 - distance:.4f}" for distance in nearest.distance[rows]]
    return Ranked("redundant", rows, values, nearest.other[rows])


def _first_of_pairs(nearest: Nearest, count: int, among: Flags | None = None) -> Ints:
    """One row for each of the nearest pairs: where both images of a pair point to each other, only the first."""
    rows = lowest_rows(nearest.distance, 2 * count, among)  # a pair has at most two of them
    pairs = np.sort(np.stack([rows, nearest.other[rows]], axis=1), axis=1)  # [rows, 2]
    _, first = np.unique(pairs, axis=0, return_index=True)
    return rows[np.sort(first)][:count]


def _odd_sizes(measures: Array, show: int) -> Ranked:
    """Images whose number of pixels or shape is farthest from the median, as a ratio."""
    is_read = measures["read"]
    oddness = np.zeros(len(measures), np.float32)
    if is_read.any():
        width = measures["width"][is_read].astype(np.float64)
        height = measures["height"][is_read]
        log_area = np.log(width * height)
        log_shape = np.log(width / height)
        area_gap = np.abs(log_area - np.median(log_area))
        shape_gap = np.abs(log_shape - np.median(log_shape))
        oddness[is_read] = np.maximum(area_gap, shape_gap)
    rows = lowest_rows(-oddness, show, oddness > 0.01)  # a pixel more or less is not odd
    sizes = measures[rows]
    return Ranked("odd", rows, [f"{size['width']} × {size['height']} px" for size in sizes])


def map_cells(p_mean: Floats, p_std: Floats, labels: Ints) -> list[list[int]]:
    """[class, column, row, number of images] of every cell of the map with images of a class.

    Columns are bins of the mean probability of the label, rows bins of its standard deviation; all arrays are [m].
    """
    points = np.stack([labels, p_mean, p_std], axis=1)
    points = points[np.isfinite(points).all(1)]
    bins = (labels.max() + 1, _MAP_COLUMNS, _MAP_ROWS)
    # Labels are the lower ends of their bins.
    counts, _ = np.histogramdd(points, bins, ((0, bins[0]), (0, 1), (0, _MAX_SPREAD)))
    cells = np.argwhere(counts)
    return [[*cell, int(counts[tuple(cell)])] for cell in cells.tolist()]


def _mean_by_class(labels: Ints, values: Array, classes: int) -> Floats:
    """[classes] means of the finite values; NaN where a class has none."""
    finite = np.isfinite(values)
    counts = np.bincount(labels, finite, classes)
    sums = np.bincount(labels, np.where(finite, values, 0), classes)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def class_rows(images: RunImages, facts: ImageFacts) -> list[Json]:
    """A row for each class, the least certain first."""
    m = len(facts.visits)
    labels = images.labels[:m]
    names = images.class_names
    counts = np.bincount(labels, minlength=len(names)).tolist()
    mistakes = _most_common_mistakes(labels, facts.prediction[:m])
    means = {
        score: _mean_by_class(labels, facts.scores[score], len(names))
        for score in ("p_mean", "aum", "correct", "forgetting")
    }

    rows: list[Json] = []
    for label, name in enumerate(names):
        mistaken_for, times = mistakes.get(label, (None, 0))
        row: Json = {
            "name": name,
            "images": counts[label],
            "taken_for": "" if mistaken_for is None else names[mistaken_for],
            "times": times,
        }
        rows.append(row | {score: as_json(by_class[label]) for score, by_class in means.items()})

    # Classes without a score come last: no probability is as large as 2.
    order = lowest_rows(np.nan_to_num(means["p_mean"], nan=2.0), _TABLE_ROWS)
    return [rows[label] for label in order]


def _most_common_mistakes(labels: Ints, predictions: Ints) -> dict[int, tuple[int, int]]:
    """Label -> the wrong class that is predicted most often for its images, and how often."""
    is_wrong = (predictions >= 0) & (predictions != labels)
    pairs = Counter(zip(labels[is_wrong].tolist(), predictions[is_wrong].tolist(), strict=True))
    mistakes: dict[int, tuple[int, int]] = {}
    for (label, prediction), times in pairs.most_common():
        mistakes.setdefault(label, (prediction, times))
    return mistakes


def expert_rows(images: RunImages, facts: ImageFacts) -> list[Json]:
    """A row for each expert: its share of the layer's work, its main class, and scores of the images it computes.

    Scores are means over images, weighted by the expert's share in each.
    """
    labels = images.labels[: len(facts.visits)]
    rows: list[Json] = []
    for name, share, _, in_images in _expert_works(facts):
        total = max(in_images.sum(), 1e-12)
        by_class = np.bincount(labels, in_images, len(images.class_names))
        main_class = int(by_class.argmax())
        row: Json = {
            "name": name,
            "share": share,
            "images": float(total),
            "class": images.class_names[main_class],
            "of_class": float(by_class[main_class] / total),
        }
        for score in ("p_mean", "aum", "correct"):
            row[score] = float(in_images @ np.nan_to_num(facts.scores[score]) / total)
        rows.append(row)
    return rows[:_TABLE_ROWS]


class ExpertWork(NamedTuple):
    """How much of its layer's work one expert does."""

    name: str
    share: float  # of the work on all images
    relative: float  # the same, relative to an even share
    in_images: Floats  # [m] its share in each image; 0 in one without a record


def _expert_works(facts: ImageFacts) -> Iterator[ExpertWork]:
    """The work of each expert of each layer."""
    for block, shares in facts.experts.items():
        work = np.nan_to_num(shares.astype(np.float64))  # [m, E]
        for expert, image_shares in enumerate(work.T):
            share = float(image_shares.sum() / work.sum())
            name = f"L{block}.E{expert}"
            yield ExpertWork(name, share, share * work.shape[1], image_shares)


def class_lists(images: RunImages, facts: ImageFacts) -> list[Ranked]:
    """For each class, the least certain first, its images with the most doubtful labels."""
    labels = images.labels[: len(facts.visits)]
    mean_p = _mean_by_class(labels, facts.scores["p_mean"], len(images.class_names))
    doubtful = partial(Ranked.of, "", facts.scores["aum"], _GROUP_IMAGES, "margin {:.2f}")
    return [
        doubtful(among=labels == label, title=images.class_names[label])
        for label in lowest_rows(mean_p, _MAX_GROUPS)
    ]


def expert_lists(facts: ImageFacts) -> list[Ranked]:
    """For each expert, the one with the least work first, the images in which it has the largest share."""
    lists = []
    by_work = sorted(_expert_works(facts), key=lambda expert: expert.relative)
    for name, _, relative, in_images in by_work[:_MAX_GROUPS]:
        title = f"{name}: {relative:.2f} of an even share"
        if relative < _LITTLE_WORK:
            title += ", little work"
        form = "{:.0%} of the image"
        used = in_images > 0
        lists.append(
            Ranked.of("", in_images, _GROUP_IMAGES, form, highest=True, among=used, title=title)
        )
    return lists


# ---- the page


@dataclass(frozen=True)
class Thumbnails:
    """Small copies of images, as files beside the page that a browser loads when they become visible."""

    images: RunImages
    folder: Path

    def __call__(self, index: int) -> Json:
        """Write the thumbnail of an image: its path `src`, or the `problem` if the image can't be read."""
        try:
            image = self.images.collection.open(self.images.all[index], THUMB)
        except BadImageError as error:
            return {"src": None, "problem": escape_controls(error.reason)}
        suffix = "jpeg" if max(image.size) > THUMB else "png"  # a small image is kept without loss
        name = f"{index}.{suffix}"
        image.thumbnail((THUMB, THUMB))
        self.folder.mkdir(parents=True, exist_ok=True)
        image.save(self.folder / name, quality=82)
        return {"src": f"{self.folder.name}/{name}"}


def caveats(facts: ImageFacts, labels: Ints) -> list[str]:
    """Warnings for lists that may be noise: the model is often wrong, or the training visited each image few times."""
    sentences = []
    predicted = facts.prediction >= 0
    correctness: Array = facts.scores["correct"]  # share of the visits
    correctness = correctness[np.isfinite(correctness)]
    if predicted.any():
        correctness = (facts.prediction == labels)[predicted]  # of the finished model
    if correctness.size and correctness.mean() < _WEAK_ACCURACY:
        sentences.append(
            f"The model is right on {100 * correctness.mean():.0f} % of these images: the lists rank its mistakes "
            "more than the images'. Train it for longer first."
        )
    visits = facts.visits.max(initial=0)
    if visits < _MIN_VISITS:
        times = "time" if visits == 1 else "times"
        sentences.append(
            f"The training looked at each image {visits} {times}: spread, forgetting and the map need {_MIN_VISITS} or "
            "more."
        )
    return sentences


def render(page: Mapping[str, Any], thumbnail: Callable[[int], Json]) -> str:
    """The page as HTML, whose security policy allows only its own script."""
    from moevision.analysis.report import render_page  # imports the plotting library, which is slow

    file = files("moevision.analysis").joinpath("templates/good_data.js")
    script = "\n" + file.read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    data = json_text({name: page[name] for name in ("class_ids", "map", "map_size")})
    return render_page(
        "good_data.html.jinja",
        {"thumbnail": cache(thumbnail)},  # an image may be in several lists
        **page,
        script=Markup(script),
        script_sha256=Markup(base64.b64encode(digest).decode("ascii")),
        page_data=Markup(data.replace("<", "\\u003c")),
    )
