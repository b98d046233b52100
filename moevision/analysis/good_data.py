"""`moevision data score`: what is known about the images of a run, as a table and as a page of ranked lists.

images.csv   a row for each image of every split: scores, what the model says, its file, its doubles
page.html    ranked lists, a map, tables of classes and experts; its images are in thumbs/, nothing is fetched elsewhere

One pass opens each image once: its pixels are measured (`image_measures`), and the run's own model says what it sees.
Then near-duplicates are looked for (`nearest_by_hash`, `nearest_by_features`). Numbers lie in arrays with a row per
image, the splits one after the other; nothing else is kept of an image.

The page ranks and judges nothing: how many of the first are bad depends on the data. What a person decides there is
saved by the browser as decisions.csv, which `moevision data prune --by decisions` and `fit --data.relabel` read. The
explorer shows the lists that need the scores alone (`SCORE_LISTS`).

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
from typing import Any, Final, NamedTuple, cast
from urllib.parse import urlencode

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from scipy.fft import dctn
from scipy.ndimage import laplace
from scipy.special import log_softmax

from moevision import __version__
from moevision.analysis.collect import network_input
from moevision.analysis.images import EXPLORER, data_settings
from moevision.analysis.information import Array, Flags, Floats, Ints, Json, Pixels
from moevision.data.collection import SPLITS, Collection, Sample
from moevision.data.images import BadImageError, full_size
from moevision.data.scores import FILE, SCORES, Scores
from moevision.data.transforms import square_pixels
from moevision.errors import UserError, escape_controls, escape_csv_cell, json_text
from moevision.files import csv_text, refuse_foreign, write_text_atomic
from moevision.layers.routing import evaluating
from moevision.limits import usable_cores
from moevision.models.io import SavedModel, best_device, load_model
from moevision.words import shell_word

TABLE, PAGE, THUMBS = "images.csv", "page.html", "thumbs"
THUMB: Final = 112  # px, the longer side of an image on the page
_MAP_COLUMNS, _MAP_ROWS = 24, 16  # cells of the map: mean p, spread
_MAX_SPREAD = 0.5  # the largest standard deviation of numbers in [0, 1]
_WEAK_ACCURACY = 0.6  # of a model below it the lists are about the model more than about the images
_MIN_VISITS = 3
_TABLE_ROWS = 1000  # of a table of the page, at most
_GROUP_IMAGES = 5  # of a class or an expert
_MAX_GROUPS = 64  # classes or experts that are shown with images
_LITTLE_WORK = 0.5  # of an even share
_GREY = 0.01  # mean difference of channels, 0 to 1: below it an image has no colour that one sees
_MAX_GREY_SHARE = 0.5  # grey images stand out where at most this share is grey


def score_run(
    run_dir: Path, out: Path, *, show: int = 40, quick: bool = False, command: str = ""
) -> Json:
    """Find out everything about the images of a run, and write the table and the page to `out`.

    The page shows `show` images per list; `quick`: only the scores, no image is opened but those that are shown.
    Returns what the page was made of.
    """
    refuse_foreign(out / TABLE, b"split,image,label,")
    refuse_foreign(out / PAGE, b'content="moevision ')

    scores = Scores.read(run_dir / FILE)
    images = images_of(run_dir)
    model = None if quick else load_model(str(run_dir))

    hidden = quick or len(images) < 1000
    with Progress(console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task("looking at images", total=len(images))
        facts = examine(images, scores, model, partial(bar.advance, task))

    page = {
        **page_facts(images, facts, show),
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


# ---- what the pixels of one image say

SIDE: Final = 224
MEASURES: Final = np.dtype(
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
"""What is measured of one image, 33 bytes; `read` is false where it can't be decoded."""
_GRID: Final = 32
# Grey levels: standard deviation of the 32 x 32 luma below which signs of frequencies are noise.
_MIN_CONTRAST: Final = 2.0


def image_measures(image: Image.Image) -> Array:
    """Measure an RGB image, perhaps decoded at a reduced size by `safe_open`; a 0-d array of `MEASURES`.

    All but the size is measured at a short side of at most `SIDE`, so that photos of different cameras compare;
    nothing is enlarged. `sharpness` is the variance of the Laplacian of the luma, in grey levels² (Pech-Pacheco et al.,
    ICPR 2000, LAPV); low: blurred or without detail. `brightness` is the mean luma, 0 to 1; `colour` the mean of the
    largest less the smallest channel, 0 to 1; 0: grey.
    """
    (width, height), _ = full_size(image)
    scale = SIDE / min(image.size)
    if scale < 1:
        columns = max(1, round(image.width * scale))
        rows = max(1, round(image.height * scale))
        image = image.resize((columns, rows), Image.Resampling.BILINEAR)
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
    """Variance of the four-neighbour Laplacian of [H, W] inside the edge; 0 of less than 3 x 3 pixels."""
    if min(luma.shape) < 3:
        return 0.0
    inside = laplace(luma)[1:-1, 1:-1]
    return float(inside.var())


def perceptual_hash(luma: Image.Image) -> tuple[np.uint64, bool]:
    """The hash of a grey image, and whether there was contrast enough for one.

    64 bits, signs of the lowest 8 x 8 frequencies (DCT-II of 32 x 32 luma) against their median, as pHash does (Zauner,
    "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010): alike for a copy in another size or
    compression, and not for a mirrored or strongly cropped one.
    """
    grid = np.asarray(luma.resize((_GRID, _GRID), Image.Resampling.BILINEAR), np.float64)
    frequencies = dctn(grid)[:8, :8].ravel()[1:]  # without the mean
    signs = frequencies > np.median(frequencies)
    bits = np.packbits(np.append(False, signs))
    has_contrast = bool(grid.std() >= _MIN_CONTRAST)
    return bits.view(">u8")[0].astype(np.uint64), has_contrast


# ---- near-duplicates: for each image the most alike other one, and the most alike one of another split
#
# Two ways to be alike, because each misses what the other finds: a perceptual hash, and the features of a model,
# whitened, so that they tell images apart instead of classes. Both searches are bounded for a million images, and may
# miss pairs:
# - hashes are sorted under `ORDERS` permutations of their bits, and compared with their `WINDOW` next neighbours
#   (Charikar, STOC 2002, §3): every image that shares its hash with another is found, and pairs that differ in four
#   bits nearly always. Where more than `SURE_BITS` differ, the features must agree: among many images some are as near
#   by chance, and their number grows as that of all pairs does. (50,000 images take 0.3 s; comparing all pairs, 6 s);
# - features are compared within cells of at most `CELL` images, the nearest of k centroids (as SemDeDup does,
#   arXiv:2303.09540): pairs at a border between cells are missed. Up to `CELL` images there is one cell.

ORDERS, WINDOW, MOST_BITS, SURE_BITS = 16, 16, 10, 4
AGREE: Final = 0.7  # cosine; among 60 000 images of CIFAR-10, pairs of 7 to 10 bits below it are no copies, by eye
CELL: Final = 16_384
WIDTH: Final = 64  # features that are kept of an image: 128 bytes
_COMPARED = 1024  # at once
_KMEANS_ITERATIONS = 5


@dataclass
class Nearest:
    """The most alike other image of each [n], -1: there is none, and its distance, infinite without."""

    other: Ints
    distance: Floats

    @classmethod
    def none(cls, n: int) -> Nearest:
        """No pair is known yet."""
        return cls(np.full(n, -1, np.int64), np.full(n, np.inf, np.float32))

    def update(self, image: Ints, other: Ints, distance: Floats) -> None:
        """Take pairs that are nearer than the present ones; an image may be among them several times."""
        # The nearest last: where an image is assigned to several times, the last one stays.
        order = np.lexsort((other, distance))[::-1]
        order = order[distance[order] < self.distance[image[order]]]
        self.other[image[order]] = other[order]
        self.distance[image[order]] = distance[order]

    def update_by_cosine(self, cosine: Floats, images: Ints, others: Ints) -> None:
        """Take the best of each row of cosines [images, others]; -inf: no pair."""
        best = cosine.max(1)
        has_pair = np.isfinite(best)
        other = others[cosine.argmax(1)]
        self.update(images[has_pair], other[has_pair], 1 - best[has_pair])


class Neighbours(NamedTuple):
    """The most alike image of each, and the most alike one of another split."""

    overall: Nearest
    across: Nearest

    @classmethod
    def none(cls, n: int) -> Neighbours:
        """No pair is known yet."""
        return cls(Nearest.none(n), Nearest.none(n))


def nearest_by_hash(
    hashes: Ints, usable: Flags, split: Ints, white: Floats | None = None
) -> Neighbours:
    """The nearest images by the bits in which hashes differ, at most `MOST_BITS`.

    Of hashes, whether they are usable, and splits, [n] each; where more than `SURE_BITS` differ `whitened` features [n,
    D] must agree (None: they aren't compared).
    """
    neighbours = Neighbours.none(len(hashes))
    rows = np.flatnonzero(usable)
    if len(rows) < 2:
        return neighbours
    as_bytes = hashes[rows].astype(">u8").view(np.uint8)
    bits = np.unpackbits(as_bytes.reshape(-1, 8), axis=1)  # [rows, 64]

    generator = np.random.default_rng(0)
    for _ in range(ORDERS):
        shuffled = np.ascontiguousarray(bits[:, generator.permutation(64)])
        key = np.packbits(shuffled, axis=1).view(">u8")[:, 0]
        order = rows[np.argsort(key, kind="stable")]
        for step in range(1, WINDOW + 1):
            left, right, distance = _similar_hashes(order[:-step], order[step:], hashes, white)
            image = np.concatenate([left, right])
            other = np.concatenate([right, left])
            distance = np.tile(distance, 2)
            neighbours.overall.update(image, other, distance)
            across = split[image] != split[other]
            neighbours.across.update(image[across], other[across], distance[across])
    return neighbours


def _similar_hashes(
    left: Ints, right: Ints, hashes: Ints, white: Floats | None
) -> tuple[Ints, Ints, Floats]:
    """The pairs of left and right that are near enough, and the number of bits in which they differ."""
    bits = np.bitwise_count(hashes[left] ^ hashes[right])
    near = bits <= MOST_BITS
    if white is not None:
        unsure = np.flatnonzero(near & (bits > SURE_BITS))
        cosine = np.einsum("pd,pd->p", white[left[unsure]], white[right[unsure]])
        near[unsure] = cosine >= AGREE
    return left[near], right[near], bits[near].astype(np.float32)


def nearest_by_features(white: Floats, usable: Flags, split: Ints) -> Neighbours:
    """By one less the cosine of vectors of unit length [n, D], as of `whitened`; `nearest_by_hash` says the rest."""
    neighbours = Neighbours.none(len(white))
    rows = np.flatnonzero(usable)
    if len(rows) < 2:
        return neighbours
    for members in _cells(white[rows]):
        cell = rows[members]
        for start in range(0, len(cell), _COMPARED):
            block = cell[start : start + _COMPARED]
            cosine = white[block] @ white[cell].T  # [block, cell]
            row = np.arange(len(block))
            cosine[row, start + row] = -np.inf  # an image is no pair with itself
            neighbours.overall.update_by_cosine(cosine, block, cell)
            cosine[split[block, None] == split[cell]] = -np.inf
            neighbours.across.update_by_cosine(cosine, block, cell)
    return neighbours


def nearest_by_experts(shares: Sequence[Floats], labels: Ints) -> Nearest:
    """The image of the same class that the experts computed most alike, by one less the Bhattacharyya coefficient.

    Of the shares of each layer [m, E], NaN: unknown. The coefficient is the mean over layers of Σ_e √(p_e q_e), 1 for
    equal shares.
    """
    roots = np.sqrt(np.concatenate(shares, axis=1), dtype=np.float32)
    roots /= np.sqrt(np.float32(len(shares)))  # so that rows have unit length
    recorded = np.isfinite(roots).all(1)

    nearest = Nearest.none(len(labels))
    for label in np.unique(labels[recorded]):
        rows = np.flatnonzero(recorded & (labels == label))
        one_split = np.zeros(len(rows), np.int64)
        in_class = nearest_by_features(roots[rows], one_split == 0, one_split).overall
        has_pair = in_class.other >= 0
        nearest.other[rows[has_pair]] = rows[in_class.other[has_pair]]
        nearest.distance[rows] = in_class.distance
    return nearest


def whitened(features: Floats, usable: Flags) -> Floats:
    """Features [n, D] whose covariance is the identity, each of unit length; directions without spread stay out.

    Images that aren't `usable` [n] take no part, and are 0.
    """
    centred = features.astype(np.float32)
    if usable.any():
        centred -= centred[usable].mean(0)
    centred[~usable] = 0

    covariance = centred.T @ centred / max(1, usable.sum())
    variance, axes = np.linalg.eigh(covariance)
    varied = variance > 1e-5 * variance.max()  # features are kept as float16
    scaled_axes = axes[:, varied] / np.sqrt(variance[varied] + 1e-12)

    white: Floats = centred @ scaled_axes.astype(np.float32)
    length = np.linalg.norm(white, axis=1, keepdims=True)
    white /= np.maximum(length, np.float32(1e-12))
    return white


def _cells(white: Floats) -> list[Ints]:
    """Indices of at most `CELL` images each, by their nearest centroid (k-means of a sample)."""
    n = len(white)
    if n <= CELL:
        return [np.arange(n)]
    from sklearn.cluster import KMeans  # slow to import, and not needed for fewer images

    drawn = np.random.default_rng(0).choice(n, min(n, 2 * CELL), replace=False)
    clusters = 2 * -(-n // CELL)
    kmeans = KMeans(clusters, init="random", n_init=1, max_iter=_KMEANS_ITERATIONS, random_state=0)
    cluster = kmeans.fit(white[np.sort(drawn)]).predict(white)

    order = np.argsort(cluster, kind="stable")
    ends = np.flatnonzero(np.diff(cluster[order])) + 1
    cells: list[Ints] = []
    for members in np.split(order, ends):
        cells += np.split(members, range(CELL, len(members), CELL))
    return cells


@cache
def projection(width: int) -> Floats:
    """[D, at most `WIDTH`] orthonormal directions onto which features are projected, the same for every image."""
    gaussian = np.random.default_rng(0).standard_normal((width, min(width, WIDTH)))
    directions, _ = np.linalg.qr(gaussian)
    return directions.astype(np.float32)


# ---- how little an image fits its class

_SOLVED = 4096


def class_doubt(x: Floats, labels: Ints) -> Floats:
    """[n] -ln p(label | x) under Gaussian classes of one covariance (Fisher 1936; Hastie et al., ESL, §4.3).

    Of the experts that computed an image (their shares) it asks: are these the experts of its class? The same question
    about the pooled features of a dense model is the control. 0 where x [n, H] leaves no doubt; NaN where x has NaN,
    and everywhere if there is one class only.
    """
    doubt = np.full(len(x), np.nan, np.float32)
    rows = np.flatnonzero(~np.isnan(x).any(1))
    classes, number = np.unique(labels[rows], return_inverse=True)
    if len(classes) < 2:
        return doubt
    counts = np.bincount(number)  # [C]
    means = np.zeros((len(classes), x.shape[1]))  # [C, H]
    np.add.at(means, number, x[rows])
    means /= counts[:, None]

    within = x[rows] - means[number]
    scatter = within.T @ within / len(rows)
    # Shares of a layer add up to 1: one direction has no spread, and the ridge keeps it out of the answer.
    ridge = 1e-3 * np.trace(scatter) / len(scatter) + 1e-12
    scatter += np.eye(len(scatter)) * ridge
    weight = np.linalg.solve(scatter, means.T)  # [H, C]
    bias = np.log(counts / len(rows)) - 0.5 * (means * weight.T).sum(1)

    for start in range(0, len(rows), _SOLVED):
        block = rows[start : start + _SOLVED]
        label = number[start : start + _SOLVED]
        log_p = log_softmax(x[block] @ weight + bias, axis=1)  # [block, C]
        doubt[block] = -log_p[np.arange(len(block)), label]
    return doubt


# ---- everything about the images of a run

_BATCH = 64


@dataclass
class RunImages:
    """The images of a run in the order of its splits, train first."""

    collection: Collection  # where they are opened
    class_names: list[str]  # in words; labels index them
    # split -> its images; `all` of them [n], with `labels` [n] and the number of their split `split_of` [n]
    samples: dict[str, list[Sample]]

    def __post_init__(self) -> None:
        self.splits = [split for split in SPLITS if split in self.samples]
        self.all = [sample for split in self.splits for sample in self.samples[split]]
        sizes = [len(self.samples[split]) for split in self.splits]
        self.split_of = np.repeat(np.arange(len(sizes)), sizes)
        self.labels = np.array([sample.label for sample in self.all], np.int64)

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, index: int) -> tuple[str, Sample]:
        """The split of an image, and the image."""
        return self.splits[self.split_of[index]], self.all[index]

    def __iter__(self) -> Iterator[tuple[str, Sample]]:
        return map(self.__getitem__, range(len(self)))


def images_of(run_dir: Path) -> RunImages:
    """The images of a run, in the split that it recorded; none is decoded."""
    from moevision.data import ImageDataModule  # Lightning comes along

    parameters = signature(ImageDataModule).parameters
    settings = {name: value for name, value in data_settings(run_dir).items() if name in parameters}
    for name in {"mean", "std"} & settings.keys():
        settings[name] = tuple(settings[name])
    settings |= {"cache_mb": 0, "num_workers": 0, "download": False}

    data = ImageDataModule(**settings)
    if (run_dir / "splits.csv").is_file():  # else none is written
        data.run_dir = run_dir
    data.setup()
    datasets = data.contents.datasets
    samples = {split: list(dataset.samples) for split, dataset in datasets.items()}
    return RunImages(datasets["train"].collection, data.class_names, samples)


@dataclass
class ImageFacts:
    """What is known of n images, of which the first m have scores; NaN in them: no visit, or no row of the image."""

    scores: dict[str, Floats]  # name -> [m]
    experts: dict[int, Floats]  # block -> [m, E]
    visits: Ints  # [m]
    unlike_class: Floats  # [m] how little the experts that computed the image are those of its class (`class_doubt`)
    by_experts: Nearest  # [m] the image of the same class that the experts computed most alike
    measures: Array  # [n] of `MEASURES`
    prediction: Ints  # [n] class that the model names; -1: it wasn't run
    certainty: Floats  # [n] its probability
    margin: (
        Floats  # [n] its probability of the label less the largest other one; NaN: it wasn't run
    )
    by_hash: Neighbours
    by_features: Neighbours
    # float16 [n, at most 64] what is in front of the classifier, projected; None: the model wasn't run
    features: Floats | None = None
    white: Floats | None = None  # [n, D] the features, whitened
    problems: dict[int, str] = field(default_factory=dict)  # index -> why it can't be read

    @classmethod
    def of_scores(cls, images: RunImages, scores: Scores) -> ImageFacts:
        """The scores of the training images, and what follows from them."""
        row_of = {escape_csv_cell(name): row for row, name in enumerate(scores.images)}
        names = [escape_csv_cell(sample.sample_id) for sample in images.samples["train"]]
        row = np.array([row_of.get(name, -1) for name in names], np.int64)  # [m]
        if (row < 0).all():
            raise UserError(
                "scores.csv is of other images than the run's training set: it was replaced, or its data were."
            )
        n, m = len(images), len(row)
        labels = images.labels[:m]
        unlike_class = np.full(m, np.nan, np.float32)
        by_experts = Nearest.none(m)
        experts = {block: _rows_or_nan(shares, row) for block, shares in scores.experts.items()}
        if experts:
            shares = list(experts.values())
            unlike_class = class_doubt(np.concatenate(shares, axis=1), labels)
            by_experts = nearest_by_experts(shares, labels)
        return cls(
            scores={name: _rows_or_nan(scores.scores[name], row) for name in SCORES},
            experts=experts,
            visits=np.where(row < 0, 0, scores.visits[row]),
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
        """The most alike image of each, or the one of another split: by hash if one is near, else by features.

        The distance orders pairs, all by hash first: bits that differ, or 100 and one less the cosine.
        """
        by_hash, by_features = self.by_hash[across], self.by_features[across]
        near = by_hash.other >= 0
        other = np.where(near, by_hash.other, by_features.other)
        distance = np.where(near, by_hash.distance, 100 + by_features.distance)
        return Nearest(other, distance)


def _rows_or_nan(values: Array, row: Ints) -> Floats:
    """Those rows of the values, in float32; NaN where the row is -1."""
    rows = values[row].astype(np.float32)
    rows[row < 0] = np.nan
    return rows


def examine(
    images: RunImages,
    scores: Scores,
    model: SavedModel | None,
    advance: Callable[[int], object] = lambda _: None,
) -> ImageFacts:
    """Find out everything about the images of a run, with the scores of its training images.

    A model of None leaves the pass over the images out. `advance` is called with how many images were looked at since
    its last call.
    """
    facts = ImageFacts.of_scores(images, scores)
    if model is not None:
        measure_images(images, model, facts, advance)
        find_neighbours(images, facts)
    return facts


def measure_images(
    images: RunImages, model: SavedModel, facts: ImageFacts, advance: Callable[[int], object]
) -> None:
    """Open each image once: fill in what its pixels say, what the model says, or why it can't be read."""
    net = model.net.to(best_device())
    open_image = partial(_open_image, images.collection, model)
    threads = ThreadPoolExecutor(min(16, usable_cores()))
    with threads, evaluating(net), torch.inference_mode():
        for start in range(0, len(images), _BATCH):
            batch = images.all[start : start + _BATCH]
            pixels: dict[int, Pixels] = {}
            for index, image in enumerate(threads.map(open_image, batch), start):
                if isinstance(image, BadImageError):
                    facts.problems[index] = image.reason
                else:
                    facts.measures[index], pixels[index] = image
            if pixels:
                predict(model, pixels, images.labels, facts)
            advance(len(batch))


def _open_image(
    collection: Collection, model: SavedModel, sample: Sample
) -> tuple[Array, Pixels] | BadImageError:
    """The measures of an image, and its pixels as the model sees it."""
    side = model.image_size
    try:
        image = collection.open(sample, max(SIDE, side))
    except BadImageError as error:
        return error
    return image_measures(image), square_pixels(image, side, model.framing)


def predict(
    model: SavedModel, pixels: Mapping[int, Pixels], labels: Ints, facts: ImageFacts
) -> None:
    """Fill in what the model says of some images, index -> uint8 [S, S, 3]; the labels are those of all."""
    net = cast(Any, model.net)
    rows = list(pixels)
    x = network_input(model, np.stack(list(pixels.values())))
    tokens = net.forward_features(x)
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
    facts.features[rows] = np.clip(features @ directions, -6e4, 6e4)


def find_neighbours(images: RunImages, facts: ImageFacts) -> None:
    """Fill in the most alike images by hashes and by features."""
    read = facts.measures["read"]
    if facts.features is not None:
        facts.white = whitened(facts.features, read)
        facts.by_features = nearest_by_features(facts.white, read, images.split_of)
    hashed = read & facts.measures["has_hash"]
    facts.by_hash = nearest_by_hash(facts.measures["hash"], hashed, images.split_of, facts.white)


def _margins(probabilities: Floats, labels: Ints) -> Floats:
    """Of [B, C]: p of the label less the largest other p, the order of cleanlab's normalized margin."""
    rows = np.arange(len(labels))
    of_label = probabilities[rows, labels]
    others = probabilities.copy()
    others[rows, labels] = 0  # no p is less, and with one class there is no other
    margins: Floats = of_label - others.max(1)
    return margins


# ---- ranked lists


@dataclass(frozen=True)
class ScoreList:
    """A list of training images by one score."""

    key: str  # its name in addresses
    name: str  # in two words
    title: str  # what it is called
    about: str  # what it is ranked by, and what it does not show
    score: str  # the score, one of `data.scores.SCORES`
    form: str  # the format of a score, in words
    highest: bool = False  # whether the highest comes first; else the lowest

    def first(self, scores: Mapping[str, Floats], count: int, among: Flags | None = None) -> Ints:
        """At most `count` rows of `scores`, score -> [m], in order; images without the score are in no list."""
        values = scores[self.score]
        return lowest_rows(-values if self.highest else values, count, among)

    def value(self, scores: Mapping[str, Floats], row: int) -> str:
        """What is said of one image."""
        return self.form.format(scores[self.score][row]).replace("-", "\N{MINUS SIGN}")


_SCORE_LISTS = (
    ScoreList(
        key="doubtful",
        name="Doubtful labels",
        title="Other images speak against the label",
        about="Lowest area under the margin: the logit of the label less the largest other one, mean over the "
        "training. Wrong labels come first, and with them rare and ambiguous images.",
        score="aum",
        form="margin {:.2f}",
    ),
    ScoreList(
        key="hardest",
        name="Hardest",
        title="Hardest",
        about="Highest EL2N: how far the probabilities were from the label, mean over the training.",
        score="el2n",
        form="EL2N {:.2f}",
        highest=True,
    ),
    ScoreList(
        key="unsteady",
        name="Most unsteady",
        title="Most unsteady",
        about="Largest spread of the label's probability over the training: learned and lost again.",
        score="p_std",
        form="spread {:.2f}",
        highest=True,
    ),
    ScoreList(
        key="easiest",
        name="Easiest",
        title="Easiest",
        about="Lowest EL2N. Many alike easy images teach little more than some of them.",
        score="el2n",
        form="EL2N {:.2g}",
    ),
)
SCORE_LISTS: Final = {ranking.key: ranking for ranking in _SCORE_LISTS}


def lowest_rows(values: Array, count: int, among: Flags | None = None) -> Ints:
    """Rows of the lowest finite values [m], lowest first; of equal ones the first."""
    finite = np.isfinite(values)
    rows = np.flatnonzero(finite if among is None else finite & among)
    if len(rows) > count:  # of a million values only so many need be sorted
        rows = rows[np.argpartition(values[rows], count - 1)[:count]]
    return rows[np.lexsort((rows, values[rows]))]


def image_id(split: str, name: str) -> str:
    """By what the explorer knows an image of a run; `name` is its sample id, or that as a file of the run has it."""
    return f"{split}/{escape_csv_cell(name)}"


# ---- the table


def table_lines(images: RunImages, facts: ImageFacts) -> Iterator[str]:
    """images.csv, line by line."""
    columns = _image_columns(images, facts) | _neighbour_columns(images, facts)
    yield csv_text([*columns], [])
    # Images outside of the training have no scores.
    for row in zip_longest(*columns.values(), fillvalue=""):
        yield csv_text(row, [])


Columns = dict[str, Iterable[Any]]


def _image_columns(images: RunImages, facts: ImageFacts) -> Columns:
    measures = {
        name: np.where(facts.measures["read"], facts.measures[name], np.nan)
        for name in ("width", "height", "sharpness", "brightness", "colour")
    }
    reasons = (facts.problems.get(index, "") for index in range(len(images)))
    return {
        "split": (split for split, _ in images),
        "image": (escape_csv_cell(sample.sample_id) for sample in images.all),
        "label": _class_names(images, images.labels),
        "visits": facts.visits,
        **{name: _numbers(values) for name, values in facts.scores.items()},
        "unlike_class": _numbers(facts.unlike_class),
        "prediction": _class_names(images, facts.prediction),
        "certainty": _numbers(facts.certainty),
        "margin": _numbers(facts.margin),
        "width": _numbers(measures["width"], ".0f"),
        "height": _numbers(measures["height"], ".0f"),
        "sharpness": _numbers(measures["sharpness"]),
        "brightness": _numbers(measures["brightness"]),
        "colour": _numbers(measures["colour"]),
        "problem": map(escape_csv_cell, reasons),
    }


def _neighbour_columns(images: RunImages, facts: ImageFacts) -> Columns:
    by_hash, across = facts.by_hash
    by_features = facts.by_features.overall
    leak = facts.most_alike(across=True).other
    cosine = np.full(len(images), np.nan)
    if facts.white is not None:
        cosine = np.where(leak >= 0, np.vecdot(facts.white, facts.white[leak]), np.nan)
    return {
        "hash_twin": _sample_names(images, by_hash.other),
        "hash_bits": _numbers(by_hash.distance, ".0f"),
        "feature_twin": _sample_names(images, by_features.other),
        "feature_cosine": _numbers(1 - by_features.distance),
        "leak": _sample_names(images, leak),
        "leak_bits": _numbers(across.distance, ".0f"),
        "leak_cosine": _numbers(cosine),
        "expert_twin": _sample_names(images, facts.by_experts.other),
        "expert_coefficient": _numbers(1 - facts.by_experts.distance),
    }


def _numbers(values: Array, form: str = ".5g") -> Iterator[str]:
    """Cells of a column; empty where a value isn't finite."""
    return (format(value, form) if math.isfinite(value) else "" for value in values)


def _class_names(images: RunImages, labels: Ints) -> Iterator[str]:
    """Cells of a column; empty where a label is -1."""
    names = [*map(escape_csv_cell, images.class_names), ""]
    return (names[label] for label in labels)


def _sample_names(images: RunImages, indices: Ints) -> Iterator[str]:
    """Cells of a column; empty where an index is -1."""
    for index in indices:
        yield escape_csv_cell(images.all[index].sample_id) if index >= 0 else ""


# ---- what the page says


@dataclass(frozen=True)
class Ranked:
    """One ranked list; the page's template has the words of those that the explorer doesn't show."""

    key: str  # its anchor
    rows: Ints  # [r] the first images, best first
    values: Sequence[str]  # [r] what is said of each
    twins: Ints | None = None  # [r] the image that is shown beside each, if it is about pairs
    title: str = ""  # what it is called
    about: str = ""  # what it is ranked by

    @classmethod
    def lowest(
        cls, key: str, values: Array, count: int, form: str, among: Flags | None = None
    ) -> Ranked:
        """The images with the lowest values, each with its value in such a format."""
        rows = lowest_rows(values, count, among)
        return cls(key, rows, [form.format(value) for value in values[rows]])

    def to_json(self, images: RunImages, facts: ImageFacts) -> Json:
        """The list with all that is shown of its images."""
        entries = []
        for rank, row in enumerate(self.rows):
            entry = image_entry(images, facts, int(row))
            entry["value"] = self.values[rank].replace("-", "\N{MINUS SIGN}")
            entry["twin"] = None
            if self.twins is not None:
                entry["twin"] = image_entry(images, facts, int(self.twins[rank]))
            entries.append(entry)
        return {"key": self.key, "title": self.title, "about": self.about, "entries": entries}


def page_facts(images: RunImages, facts: ImageFacts, show: int) -> Json:
    """Everything on the page but the thumbnails: plain numbers and words."""
    m = len(facts.visits)
    lists = [ranked for ranked in ranked_lists(facts, images.split_of, show) if len(ranked.rows)]
    p_mean, p_std = facts.scores["p_mean"], facts.scores["p_std"]
    return {
        "counts": {split: len(images.samples[split]) for split in images.splits},
        "unreadable": len(facts.problems),
        "doubts": doubts(facts, images.labels),
        "lists": [ranked.to_json(images, facts) for ranked in lists],
        "map": map_cells(p_mean, p_std, images.labels[:m]),
        "map_size": {"columns": _MAP_COLUMNS, "rows": _MAP_ROWS, "most": _MAX_SPREAD},
        "classes": class_rows(images, facts),
        "experts": expert_rows(images, facts),
        "of_classes": [ranked.to_json(images, facts) for ranked in class_lists(images, facts)],
        "of_experts": [ranked.to_json(images, facts) for ranked in expert_lists(facts)],
        "class_names": list(map(escape_controls, images.class_names)),
        "class_ids": list(map(escape_csv_cell, images.class_names)),
    }


def image_entry(images: RunImages, facts: ImageFacts, index: int) -> Json:
    """What the page shows of an image."""
    split, sample = images[index]
    label = images.class_names[sample.label]
    prediction = ""
    certainty = None
    if facts.prediction[index] >= 0:
        prediction = escape_controls(images.class_names[facts.prediction[index]])
        certainty = float(facts.certainty[index])
    query = urlencode({"picture": image_id(split, sample.sample_id), "tab": "data"})
    return {
        "index": index,
        "split": split,
        "image": escape_controls(sample.sample_id),
        "id": escape_csv_cell(sample.sample_id),
        "link": f"{EXPLORER}/?{query}",
        "label": escape_controls(label),
        "label_id": escape_csv_cell(label),
        "prediction": prediction,
        "prediction_id": escape_csv_cell(prediction),
        "certainty": certainty,
    }


def ranked_lists(facts: ImageFacts, split: Ints, show: int) -> list[Ranked]:
    """The lists in the order of the page; those of what wasn't measured are empty."""
    measures = facts.measures
    read = measures["read"]
    grey = read & (measures["colour"] < _GREY)
    if grey.sum() > _MAX_GREY_SHARE * read.sum():
        grey[:] = False
    unreadable = np.array(sorted(facts.problems)[:show], np.int64)
    return [
        _by_score("doubtful", facts, show),
        Ranked.lowest("contradicted", facts.margin, show, "margin {:.2f}", split == 0),
        _by_score("hardest", facts, show),
        _by_score("unsteady", facts, show),
        _unlike_class(facts, show),
        _by_score("easiest", facts, show),
        _copies("leaks", facts, show, across=True, among=split > 0),
        _copies("doubles", facts, show, across=False),
        _computed_alike(facts, show),
        Ranked.lowest("blurred", measures["sharpness"], show, "variance {:.3g}", read),
        Ranked.lowest("dark", measures["brightness"], show, "brightness {:.2f}", read),
        _odd_sizes(measures, show),
        Ranked.lowest("grey", measures["colour"], show, "colour {:.3f}", grey),
        Ranked("unreadable", unreadable, [""] * len(unreadable)),  # the frame says why
    ]


def _by_score(key: str, facts: ImageFacts, show: int) -> Ranked:
    ranking = SCORE_LISTS[key]
    rows = ranking.first(facts.scores, show)
    values = [ranking.value(facts.scores, row) for row in rows]
    return Ranked(key, rows, values, title=ranking.title, about=ranking.about)


def _unlike_class(facts: ImageFacts, show: int) -> Ranked:
    rows = lowest_rows(-facts.unlike_class, show)
    return Ranked("experts", rows, [f"−ln p {doubt:.2f}" for doubt in facts.unlike_class[rows]])


def _copies(
    key: str, facts: ImageFacts, show: int, *, across: bool, among: Flags | None = None
) -> Ranked:
    nearest = facts.most_alike(across)
    rows = _first_of_pairs(nearest, show, among)
    values = []
    for row in rows:
        if nearest.distance[row] <= MOST_BITS:
            values.append(f"{nearest.distance[row]:.0f} of 64 bits differ")
        else:
            values.append(f"cosine {1 - facts.by_features[across].distance[row]:.3f}")
    return Ranked(key, rows, values, nearest.other[rows])


def _computed_alike(facts: ImageFacts, show: int) -> Ranked:
    nearest = facts.by_experts
    rows = _first_of_pairs(nearest, show)
    twins = nearest.other[rows]
    values = [f"coefficient {1 - distance:.4f}" for distance in nearest.distance[rows]]
    if facts.white is not None:
        cosines = np.vecdot(facts.white[rows], facts.white[twins])
        values = [
            f"{value}, features {cosine:.2f}" for value, cosine in zip(values, cosines, strict=True)
        ]
    return Ranked("redundant", rows, values, twins)


def _first_of_pairs(nearest: Nearest, count: int, among: Flags | None = None) -> Ints:
    """Rows of the nearest pairs; the second image of a pair is left out, as it would say the same again."""
    rows = lowest_rows(nearest.distance, 2 * count, among)
    pairs = np.sort(np.stack([rows, nearest.other[rows]], axis=1), axis=1)  # [rows, 2]
    _, first = np.unique(pairs, axis=0, return_index=True)
    return rows[np.sort(first)][:count]


def _odd_sizes(measures: Array, show: int) -> Ranked:
    """Images whose number of pixels or shape is farthest from the median, as a ratio."""
    read = measures["read"]
    oddness = np.zeros(len(measures), np.float32)
    if read.any():
        width = np.log(measures["width"][read].astype(np.float64))
        height = np.log(measures["height"][read].astype(np.float64))
        area, shape = width + height, width - height
        area_gap = np.abs(area - np.median(area))
        shape_gap = np.abs(shape - np.median(shape))
        oddness[read] = np.maximum(area_gap, shape_gap)
    rows = lowest_rows(-oddness, show, oddness > 0.01)  # a pixel more or less is not odd
    sizes = measures[rows]
    return Ranked("odd", rows, [f"{size['width']} × {size['height']} px" for size in sizes])


def map_cells(p_mean: Floats, p_std: Floats, labels: Ints) -> list[list[int]]:
    """[class, column, row, images] of every cell of the map that has some; columns by mean p, rows by its spread."""
    scored = np.isfinite(p_mean) & np.isfinite(p_std)
    column = _bins(p_mean[scored], _MAP_COLUMNS)
    row = _bins(p_std[scored] / _MAX_SPREAD, _MAP_ROWS)
    cells = np.stack([labels[scored], column, row], axis=1)
    cells, counts = np.unique(cells, axis=0, return_counts=True)
    rows: list[list[int]] = np.column_stack([cells, counts]).tolist()
    return rows


def _bins(values: Floats, count: int) -> Ints:
    """The bin of each of some numbers in [0, 1]; 1 is in the last one."""
    bins = (values * count).astype(np.int64)
    return np.minimum(bins, count - 1)


def _mean_by_class(labels: Ints, values: Array, classes: int) -> Floats:
    """[classes] means of the finite values; NaN where a class has none."""
    finite = np.isfinite(values)
    counts = np.bincount(labels[finite], minlength=classes)
    sums = np.bincount(labels[finite], values[finite].astype(np.float64), minlength=classes)
    means = np.full(classes, np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means


def class_rows(images: RunImages, facts: ImageFacts) -> list[Json]:
    """A row for each class, the least certain first."""
    m = len(facts.visits)
    labels = images.labels[:m]
    names = list(map(escape_controls, images.class_names))
    counts = np.bincount(labels, minlength=len(names)).tolist()
    mistakes = _most_common_mistakes(labels, facts.prediction[:m])
    means = {}
    for score in ("p_mean", "aum", "correct", "forgetting"):
        means[score] = _mean_by_class(labels, facts.scores[score], len(names)).tolist()

    rows: list[Json] = []
    for label, name in enumerate(names):
        guess, times = mistakes.get(label, (None, 0))
        row: Json = {
            "name": name,
            "images": counts[label],
            "taken_for": "" if guess is None else names[guess],
            "times": times,
        }
        for score, by_class in means.items():
            row[score] = None if math.isnan(by_class[label]) else by_class[label]
        rows.append(row)
    order = lowest_rows(np.nan_to_num(means["p_mean"], nan=2.0), _TABLE_ROWS)
    return [rows[label] for label in order]


def _most_common_mistakes(labels: Ints, predictions: Ints) -> dict[int, tuple[int, int]]:
    """Label -> the other class that its images are taken for most often, and how often."""
    wrong = (predictions >= 0) & (predictions != labels)
    pairs = Counter(zip(labels[wrong].tolist(), predictions[wrong].tolist(), strict=True))
    mistakes = {}
    # In rising order, so that the most frequent one stays.
    for times, guess, label in sorted((times, *pair[::-1]) for pair, times in pairs.items()):
        mistakes[label] = (guess, times)
    return mistakes


def expert_rows(images: RunImages, facts: ImageFacts) -> list[Json]:
    """A row for each expert: its share, how hard its images are beside those of the layer, and its main class."""
    labels = images.labels[: len(facts.visits)]
    rows: list[Json] = []
    for block, shares in facts.experts.items():
        recorded = np.isfinite(shares[:, 0]) & np.isfinite(facts.scores["p_mean"])
        if not recorded.any():
            continue
        work = shares[recorded].astype(np.float64)  # [r, E]
        for expert, weight in enumerate(work.T):
            total = max(weight.sum(), 1e-12)
            by_class = np.bincount(labels[recorded], weight, minlength=len(images.class_names))
            main_class = int(by_class.argmax())
            row: Json = {
                "name": f"L{block}.E{expert}",
                "share": float(total / work.sum()),
                "images": float(total),
                "class": escape_controls(images.class_names[main_class]),
                "of_class": float(by_class[main_class] / total),
            }
            for score in ("p_mean", "aum", "correct"):
                row[score] = float(weight @ facts.scores[score][recorded] / total)
            rows.append(row)
    return rows[:_TABLE_ROWS]


def class_lists(images: RunImages, facts: ImageFacts) -> list[Ranked]:
    """For each class, the least certain first, the images whose label the others speak against most."""
    labels = images.labels[: len(facts.visits)]
    mean_p = _mean_by_class(labels, facts.scores["p_mean"], len(images.class_names))
    ranking = SCORE_LISTS["doubtful"]
    lists = []
    for label in lowest_rows(mean_p, _MAX_GROUPS):
        rows = ranking.first(facts.scores, _GROUP_IMAGES, labels == label)
        values = [ranking.value(facts.scores, row) for row in rows]
        if len(rows):
            lists.append(Ranked("", rows, values, title=escape_controls(images.class_names[label])))
    return lists


def expert_lists(facts: ImageFacts) -> list[Ranked]:
    """For each expert, those with the least work first, the images of which it computed the largest part."""
    lists: list[tuple[float, Ranked]] = []
    for block, shares in facts.experts.items():
        recorded = np.isfinite(shares[:, 0])
        if not recorded.any():
            continue
        work = shares[recorded].mean(0) * shares.shape[1]  # [E]; 1: an even share
        for expert, times in enumerate(work.tolist()):
            title = f"L{block}.E{expert}: {times:.2f} of an even share"
            if times < _LITTLE_WORK:
                title += ", little work"
            share = shares[:, expert]
            rows = lowest_rows(-share, _GROUP_IMAGES, share > 0)
            values = [f"{part:.0%} of the image" for part in share[rows]]
            lists.append((times, Ranked("", rows, values, title=title)))
    lists.sort(key=lambda pair: pair[0])
    return [ranked for _, ranked in lists[:_MAX_GROUPS]]


# ---- the page


class Thumbnails:
    """Small copies of images as files beside the page, which a browser loads as one scrolls."""

    def __init__(self, images: RunImages, folder: Path) -> None:
        self.images = images
        self.folder = folder

    def __call__(self, index: int) -> Json:
        """`src`, or `problem` if it can't be read."""
        try:
            image = self.images.collection.open(self.images.all[index], THUMB)
        except BadImageError as error:
            return {"src": None, "problem": escape_controls(error.reason)}
        suffix = "jpeg" if max(image.size) > THUMB else "png"  # a small one as it is
        name = f"{index}.{suffix}"
        image.thumbnail((THUMB, THUMB))
        self.folder.mkdir(parents=True, exist_ok=True)
        image.save(self.folder / name, quality=82)
        return {"src": f"{self.folder.name}/{name}"}


def doubts(facts: ImageFacts, labels: Ints) -> list[str]:
    """Why the lists may be noise: a model that is often wrong, or scores of few looks at each image."""
    sentences = []
    predicted = facts.prediction >= 0
    correct: Array = facts.scores["correct"]
    if predicted.any():
        correct = (facts.prediction == labels)[predicted]
    accuracy = float(correct.mean())
    if accuracy < _WEAK_ACCURACY:
        sentences.append(
            f"The model is right on {100 * accuracy:.0f} % of these images: the lists rank its mistakes more than the "
            "images'. Train it for longer first."
        )
    visits = int(facts.visits.max(initial=0))
    if visits < _MIN_VISITS:
        times = "time" if visits == 1 else "times"
        sentences.append(
            f"The training looked at each image {visits} {times}: spread, forgetting and the map need {_MIN_VISITS} or "
            "more."
        )
    return sentences


def render(facts: Mapping[str, Any], thumbnail: Callable[[int], Json]) -> str:
    """The page, in which only its own script runs."""
    from moevision.analysis.report import render_page  # figures come along

    file = files("moevision.analysis").joinpath("templates/good_data.js")
    script = "\n" + file.read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    data = json_text({name: facts[name] for name in ("class_ids", "map", "map_size")})
    return render_page(
        "good_data.html.jinja",
        {"thumbnail": cache(thumbnail)},  # an image may stand in several lists
        **facts,
        script=Markup(script),
        script_sha256=Markup(base64.b64encode(digest).decode("ascii")),
        page_data=Markup(data.replace("<", "\\u003c")),
    )
