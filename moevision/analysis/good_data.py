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
from functools import cache
from importlib.resources import files
from inspect import signature
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final, cast
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
_CELLS = (24, 16)  # of the map: mean p, spread
_MOST_SPREAD = 0.5  # the largest standard deviation of numbers in [0, 1]
_WEAK = 0.6  # share of images that a model must have right for its lists to be about the images
_FEW_LOOKS = 3
_MOST_ROWS = 1000  # of a table of the page
_OF_EACH = 5  # images of a class or an expert
_MOST_GROUPS = 64  # classes or experts that are shown with images
_LITTLE = 0.5  # of an even share: an expert with less has little work
_GREY = 0.01  # mean difference of channels, 0 to 1: below it an image has no colour that one sees
_FEW = 0.5  # grey images stand out where at most this share is grey


def score_run(
    run_dir: Path, out: Path, *, show: int = 40, quick: bool = False, command: str = ""
) -> Json:
    """Find out everything about the images of a run, and write the table and the page to `out`.

    The page shows `show` images per list; `quick`: only the scores, no image is opened but those that are shown.
    Returns what the page was made of.
    """
    for name, mark in ((TABLE, b"split,image,label,"), (PAGE, b'content="moevision ')):
        refuse_foreign(out / name, mark)
    scores = Scores.read(run_dir / FILE)
    images = images_of(run_dir)
    model = None if quick else load_model(str(run_dir))
    with Progress(
        console=Console(stderr=True), transient=True, disable=quick or len(images) < 1000
    ) as bar:
        task = bar.add_task("looking at images", total=len(images))
        known = examine(images, scores, model, lambda done: bar.update(task, advance=done))
    facts = page_facts(images, known, show)
    facts |= {
        "title": f"The images of {escape_controls(run_dir.resolve().name)}",
        "command": command,
        "quick": quick,
    }
    facts |= {
        "explorer": EXPLORER,
        "explorer_command": f"moevision demo {shell_word(escape_controls(str(run_dir)))}",
    }
    facts |= {"version": __version__, "made": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        write_text_atomic(out / TABLE, _table(images, known))
        write_text_atomic(out / PAGE, render(facts, Thumbnails(images, out / THUMBS)))
    except OSError as error:
        raise UserError(
            f"{out} can't be written to ({error.strerror}): give --out another folder."
        ) from error
    return facts


# ---- what the pixels of one image say

SIDE: Final = 224
LOOK: Final = np.dtype(
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
"""What is kept of one image, 33 bytes; `read` is false where it can't be decoded."""
_GRID: Final = 32
_FLAT: Final = (
    2.0  # grey levels: standard deviation of the 32 x 32 luma below which signs are noise
)


def image_measures(image: Image.Image) -> Array:
    """Measure an RGB image, perhaps decoded at a reduced size by `safe_open`; a 0-d array of `LOOK`.

    All but the size is measured at a short side of at most `SIDE`, so that photos of different cameras compare;
    nothing is enlarged. `sharpness` is the variance of the Laplacian of the luma, in grey levels² (Pech-Pacheco et al.,
    ICPR 2000, LAPV); low: blurred or without detail. `brightness` is the mean luma, 0 to 1; `colour` the mean of the
    largest less the smallest channel, 0 to 1; 0: grey.
    """
    (width, height), _ = full_size(image)
    scale = SIDE / min(image.size)
    if scale < 1:
        size = tuple(max(1, round(side * scale)) for side in image.size)
        image = image.resize(size, Image.Resampling.BILINEAR)  # type: ignore[arg-type]
    luma = image.convert("L")
    rgb = np.asarray(image)  # [H, W, 3]
    found = np.zeros((), LOOK)
    found["width"], found["height"], found["read"] = width, height, True
    found["sharpness"] = laplacian_variance(np.asarray(luma, np.float32))
    found["brightness"] = np.asarray(luma).mean() / 255
    found["colour"] = (rgb.max(-1) - rgb.min(-1)).mean() / 255
    found["hash"], found["has_hash"] = perceptual_hash(luma)
    return found


def laplacian_variance(luma: Floats) -> float:
    """Variance of the four-neighbour Laplacian of [H, W] inside the edge; 0 of less than 3 x 3 pixels."""
    return float(laplace(luma)[1:-1, 1:-1].var()) if min(luma.shape) > 2 else 0.0


def perceptual_hash(luma: Image.Image) -> tuple[np.uint64, bool]:
    """The hash of a grey image, and whether there was contrast enough for one.

    64 bits, signs of the lowest 8 x 8 frequencies (DCT-II of 32 x 32 luma) against their median, as pHash does (Zauner,
    "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010): alike for a copy in another size or
    compression, and not for a mirrored or strongly cropped one.
    """
    grid = np.asarray(luma.resize((_GRID, _GRID), Image.Resampling.BILINEAR), np.float64)
    frequencies = dctn(grid)[:8, :8].ravel()[1:]  # without the mean
    bits = np.packbits(np.append(False, frequencies > np.median(frequencies)))
    return bits.view(">u8")[0].astype(np.uint64), bool(grid.std() >= _FLAT)


# ---- near-duplicates: for each image the most alike other one, and the most alike one of another split
#
# Two ways to be alike, because each misses what the other finds: a perceptual hash, and the features of a model,
# whitened, so that they tell images apart instead of classes. Both searches are bounded for a million images, and may
# miss pairs:
# - hashes are sorted under `ORDERS` permutations of their bits, and compared with their `WINDOW` next neighbours
#   (Charikar, STOC 2002, §3): every image that shares its hash with another is found, and pairs that differ in four
#   bits nearly always. Where more than `SURE_BITS` differ, the features must agree: among many images some are as near
#   by chance, and their number grows as that of all pairs does;
# - features are compared within cells of at most `CELL` images, the nearest of k centroids (as SemDeDup does,
#   arXiv:2303.09540): pairs at a border between cells are missed. Up to `CELL` images there is one cell.

ORDERS, WINDOW, MOST_BITS, SURE_BITS = 16, 16, 10, 4
AGREE: Final = 0.7  # cosine; among 60 000 images of CIFAR-10, pairs of 7 to 10 bits below it are no copies, by eye
CELL: Final = 16_384
WIDTH: Final = 64  # features that are kept of an image: 128 bytes
_COMPARED = 1024  # at once
_ROUNDS = 5


@dataclass
class Nearest:
    """The most alike other image of each [n], -1: none was found, and its distance, infinite without."""

    other: Ints
    distance: Floats

    @classmethod
    def none(cls, n: int) -> Nearest:
        """Nothing is found yet."""
        return cls(np.full(n, -1, np.int64), np.full(n, np.inf, np.float32))

    def offer(self, image: Ints, other: Ints, distance: Floats) -> None:
        """Take pairs that are nearer than what is known; an image may be among them several times."""
        order = np.lexsort((other, distance))
        image, first = np.unique(image[order], return_index=True)
        other, distance = other[order][first], distance[order][first]
        better = distance < self.distance[image]
        self.other[image[better]] = other[better]
        self.distance[image[better]] = distance[better]


def nearest_by_hash(
    hashes: Ints, usable: Flags, split: Ints, white: Floats | None = None
) -> tuple[Nearest, Nearest]:
    """The nearest image, and the nearest one of another split, by the bits in which hashes differ, at most `MOST_BITS`.

    Of hashes, whether they are usable, and splits, [n] each; where more than `SURE_BITS` differ `whitened` features [n,
    D] must agree (None: they aren't asked).
    """
    rows, found = np.flatnonzero(usable), (Nearest.none(len(hashes)), Nearest.none(len(hashes)))
    bits = np.unpackbits(hashes[rows].astype(">u8").view(np.uint8).reshape(-1, 8), axis=1)
    generator = np.random.default_rng(0)
    for _ in range(ORDERS if len(rows) > 1 else 0):
        shuffled = np.ascontiguousarray(bits[:, generator.permutation(64)])
        key = np.packbits(shuffled, axis=1).view(">u8")[:, 0]
        order = rows[np.argsort(key, kind="stable")]
        for step in range(1, min(WINDOW, len(rows) - 1) + 1):
            left, right = order[:-step], order[step:]
            differ = np.bitwise_count(hashes[left] ^ hashes[right])
            near = np.flatnonzero(differ <= MOST_BITS)
            if white is not None:
                cosine = np.einsum("pd,pd->p", white[left[near]], white[right[near]])
                near = near[(differ[near] <= SURE_BITS) | (cosine >= AGREE)]
            left, right = (
                np.concatenate([left[near], right[near]]),
                np.concatenate([right[near], left[near]]),
            )
            distance = np.tile(differ[near].astype(np.float32), 2)
            found[0].offer(left, right, distance)
            across = split[left] != split[right]
            found[1].offer(left[across], right[across], distance[across])
    return found


def nearest_by_features(white: Floats, usable: Flags, split: Ints) -> tuple[Nearest, Nearest]:
    """By one less the cosine of vectors of unit length [n, D], as of `whitened`; `nearest_by_hash` says the rest."""
    found = (Nearest.none(len(white)), Nearest.none(len(white)))
    rows = np.flatnonzero(usable)
    if len(rows) < 2:
        return found
    for members in _cells(white[rows]):
        cell = rows[members]
        for start in range(0, len(cell), _COMPARED):
            block = cell[start : start + _COMPARED]
            cosine = white[block] @ white[cell].T  # [rows, cell]
            cosine[np.arange(len(block)), start + np.arange(len(block))] = -np.inf
            for each, allowed in zip(found, (None, split[block, None] != split[cell]), strict=True):
                if allowed is not None:
                    cosine = np.where(allowed, cosine, -np.inf)
                best = cosine.argmax(1)
                value = cosine[np.arange(len(block)), best]
                there = np.isfinite(value)
                each.offer(block[there], cell[best[there]], 1 - value[there])
    return found


def nearest_by_experts(shares: Sequence[Floats], labels: Ints) -> Nearest:
    """The image of the same class that the experts computed most alike, by one less the Bhattacharyya coefficient.

    Of the shares of each layer [m, E], NaN: unknown. The coefficient is the mean over layers of Σ_e √(p_e q_e), 1 for
    equal shares.
    """
    roots = np.sqrt(np.concatenate(shares, axis=1), dtype=np.float32) / np.sqrt(
        np.float32(len(shares))
    )
    return nearest_in_class(roots, np.where(np.isfinite(roots).all(1), labels, -1))


def nearest_in_class(vectors: Floats, labels: Ints) -> Nearest:
    """The image of the same class by one less the cosine of vectors of unit length [m, D]; label -1 takes no part."""
    found = Nearest.none(len(labels))
    for label in np.unique(labels[labels >= 0]):
        rows = np.flatnonzero(labels == label)
        near, _ = nearest_by_features(
            vectors[rows], np.ones(len(rows), bool), np.zeros(len(rows), np.int64)
        )
        there = near.other >= 0
        found.offer(rows[there], rows[near.other[there]], near.distance[there])
    return found


def whitened(features: Floats, usable: Flags) -> Floats:
    """Features [n, D] whose covariance is the identity, each of unit length; directions without spread stay out.

    Images that aren't `usable` [n] take no part, and are 0.
    """
    centred = features.astype(np.float32)
    centred -= centred[usable].mean(0) if usable.any() else 0
    centred[~usable] = 0
    spread, axes = np.linalg.eigh(centred.T @ centred / max(1, usable.sum()))
    kept = spread > 1e-5 * spread.max()  # features are kept as float16
    white: Floats = centred @ (axes[:, kept] / np.sqrt(spread[kept] + 1e-12)).astype(np.float32)
    white /= np.maximum(np.linalg.norm(white, axis=1, keepdims=True), np.float32(1e-12))
    return white


def _cells(white: Floats) -> list[Ints]:
    """Indices of at most `CELL` images each, by their nearest centroid (k-means of a sample)."""
    n = len(white)
    if n <= CELL:
        return [np.arange(n)]
    from sklearn.cluster import KMeans  # slow to import, and not needed for fewer images

    sample = white[np.sort(np.random.default_rng(0).choice(n, min(n, 2 * CELL), replace=False))]
    means = KMeans(
        2 * -(-n // CELL), init="random", n_init=1, max_iter=_ROUNDS, random_state=0
    ).fit(sample)
    mine = means.predict(white)
    order = np.argsort(mine, kind="stable")
    cells = np.split(order, np.flatnonzero(np.diff(mine[order])) + 1)
    return [cell[start : start + CELL] for cell in cells for start in range(0, len(cell), CELL)]


def projection(width: int) -> Floats:
    """[D, at most `WIDTH`] orthonormal directions onto which features are projected, the same for every image."""
    square, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((width, min(width, WIDTH))))
    return square.astype(np.float32)


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
    counts, width = np.bincount(number), x.shape[1]
    means = np.zeros((len(classes), width))
    np.add.at(means, number, x[rows])
    means /= counts[:, None]
    within = x[rows] - means[number]
    scatter = within.T @ within / len(rows)
    # Shares of a layer add up to 1: one direction has no spread, and the ridge keeps it out of the answer.
    scatter += np.eye(width) * (1e-3 * np.trace(scatter) / width + 1e-12)
    weight = np.linalg.solve(scatter, means.T)  # [H, C]
    bias = np.log(counts / len(rows)) - 0.5 * (means * weight.T).sum(1)
    for start in range(0, len(rows), _SOLVED):
        part = slice(start, start + _SOLVED)
        log_p = log_softmax(x[rows[part]] @ weight + bias, axis=1)  # [rows, C]
        doubt[rows[part]] = -log_p[np.arange(len(log_p)), number[part]]
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
        self.split_of = np.repeat(
            np.arange(len(self.splits)), [len(self.samples[split]) for split in self.splits]
        )
        self.labels = np.array([sample.label for sample in self.all], np.int64)

    def __len__(self) -> int:
        return len(self.all)

    def place(self, index: int) -> tuple[str, Sample]:
        """The split of an image, and the image."""
        return self.splits[self.split_of[index]], self.all[index]

    def each(self) -> Iterator[tuple[str, Sample]]:
        """All of them, in order."""
        return map(self.place, range(len(self)))


def images_of(run_dir: Path) -> RunImages:
    """The images of a run, in the split that it recorded; nothing is decoded for good."""
    from moevision.data import ImageDataModule  # Lightning comes along

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
class ImageFacts:
    """What is known of n images."""

    look: Array  # [n] of `LOOK`
    prediction: Ints  # [n] class that the model names; -1: not asked
    certainty: Floats  # [n] its probability
    margin: Floats  # [n] its probability of the label less the largest other one; NaN: not asked
    by_hash: tuple[
        Nearest, Nearest
    ]  # the most alike image, and the most alike one of another split
    by_features: tuple[Nearest, Nearest]  # the same
    scores: dict[str, Floats]  # name -> [m]; NaN where there are none, or the image has no visit
    experts: dict[int, Floats]  # block -> [m, E]
    visits: Ints  # [m]
    unlike_class: Floats  # [m] how little the experts that computed the image are those of its class (`class_doubt`)
    by_experts: Nearest  # [m] the image of the same class that the experts computed most alike
    # float16 [n, at most 64] what is in front of the classifier, projected; None: not asked
    features: Floats | None = None
    white: Floats | None = None  # [n, D] the features, whitened; None: not asked
    problems: dict[int, str] = field(default_factory=dict)  # index -> why it can't be read

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


def examine(
    images: RunImages,
    scores: Scores,
    model: SavedModel | None,
    advance: Callable[[int], None] = lambda _: None,
) -> ImageFacts:
    """Find out everything about the images of a run, with the scores of its training images.

    A model of None leaves the pass over the images out. `advance` is told how many images were looked at since the last
    call.
    """
    n, row_of = len(images), {escape_csv_cell(name): row for row, name in enumerate(scores.images)}
    row = np.array(
        [row_of.get(escape_csv_cell(sample.sample_id), -1) for sample in images.samples["train"]],
        np.int64,
    )
    there = row >= 0
    if not there.any():
        raise UserError(
            "scores.csv is of other images than the run's training set: it was replaced, or its data were."
        )
    labels, unlike, alike = (
        images.labels[: len(row)],
        np.full(len(row), np.nan, np.float32),
        Nearest.none(len(row)),
    )
    experts = {
        block: np.where(there[:, None], shares[row], np.nan).astype(np.float32)
        for block, shares in scores.experts.items()
    }
    if experts:
        unlike = class_doubt(np.concatenate(list(experts.values()), 1), labels)
        alike = nearest_by_experts(list(experts.values()), labels)
    known = ImageFacts(
        np.zeros(n, LOOK),
        np.full(n, -1),
        np.full(n, np.nan, np.float32),
        np.full(n, np.nan, np.float32),
        (Nearest.none(n), Nearest.none(n)),
        (Nearest.none(n), Nearest.none(n)),
        {
            name: np.where(there, scores.scores[name][row], np.nan).astype(np.float32)
            for name in SCORES
        },
        experts,
        np.where(there, scores.visits[row], 0),
        unlike,
        alike,
    )
    if model is None:
        return known
    side, net, onto = model.image_size, cast(Any, model.net.to(best_device())), None

    def open_one(sample: Sample) -> tuple[Array, Pixels] | str:
        try:
            image = images.collection.open(sample, max(SIDE, side))
        except BadImageError as error:
            return error.reason
        return image_measures(image), square_pixels(image, side, model.framing)

    with (
        ThreadPoolExecutor(min(16, usable_cores())) as pool,
        evaluating(net),
        torch.inference_mode(),
    ):
        for start in range(0, n, _BATCH):
            found = dict(enumerate(pool.map(open_one, images.all[start : start + _BATCH]), start))
            known.problems |= {
                index: each for index, each in found.items() if isinstance(each, str)
            }
            rows = [index for index in found if index not in known.problems]
            if rows:
                looks, pixels = zip(*(found[index] for index in rows), strict=True)
                known.look[rows] = np.stack(looks)
                tokens = net.forward_features(network_input(model, np.stack(pixels)))
                p = net.forward_head(tokens).float().softmax(-1).cpu().numpy()
                known.prediction[rows], known.certainty[rows] = p.argmax(1), p.max(1)
                known.margin[rows] = _margins(p, images.labels[rows])
                seen = (
                    net.forward_head(tokens, pre_logits=True).float().cpu().numpy()
                )  # before the classifier
                if onto is None or known.features is None:
                    onto = projection(seen.shape[1])
                    known.features = np.zeros((n, onto.shape[1]), np.float16)
                known.features[rows] = np.clip(seen @ onto, -6e4, 6e4)
            advance(len(found))
    read = known.look["read"]
    known.white = None if known.features is None else whitened(known.features, read)
    known.by_hash = nearest_by_hash(
        known.look["hash"], read & known.look["has_hash"], images.split_of, known.white
    )
    if known.white is not None:
        known.by_features = nearest_by_features(known.white, read, images.split_of)
    return known


def _margins(probabilities: Floats, labels: Ints) -> Floats:
    """Of [B, C]: p of the label less the largest other p, the order of cleanlab's normalized margin."""
    rows = np.arange(len(labels))
    own, others = probabilities[rows, labels], probabilities.copy()
    others[rows, labels] = -np.inf
    return own - others.max(1) if others.shape[1] > 1 else own


# ---- ranked lists


@dataclass(frozen=True)
class ScoreList:
    """One of these lists."""

    key: str  # its name in addresses
    name: str  # in two words
    title: str  # what it is called
    about: str  # what it is ranked by, and what it does not show
    score: str  # the score, one of `data.scores.SCORES`
    highest: bool  # whether the highest comes first; else the lowest
    words: str  # the format of a score, in words

    def first(self, scores: Mapping[str, Floats], count: int, among: Flags | None = None) -> Ints:
        """At most `count` rows of `scores`, score -> [m], in order; images without the score are in no list."""
        values = scores[self.score]
        return lowest_rows(-values if self.highest else values, count, among)

    def value(self, scores: Mapping[str, Floats], row: int) -> str:
        """What is said of one image."""
        return self.words.format(scores[self.score][row]).replace("-", "\N{MINUS SIGN}")


SCORE_LISTS: Final = {
    one.key: one
    for one in (
        ScoreList(
            "doubtful",
            "Doubtful labels",
            "Other images speak against the label",
            "Lowest area under the margin: the logit of the label less the largest other one, mean over the training. "
            "Wrong labels come first, and with them rare and ambiguous images.",
            "aum",
            False,
            "margin {:.2f}",
        ),
        ScoreList(
            "hardest",
            "Hardest",
            "Hardest",
            "Highest EL2N: how far the probabilities were from the label, mean over the training.",
            "el2n",
            True,
            "EL2N {:.2f}",
        ),
        ScoreList(
            "unsteady",
            "Most unsteady",
            "Most unsteady",
            "Largest spread of the label's probability over the training: learned and lost again.",
            "p_std",
            True,
            "spread {:.2f}",
        ),
        ScoreList(
            "easiest",
            "Easiest",
            "Easiest",
            "Lowest EL2N. Many alike easy images teach little more than some of them.",
            "el2n",
            False,
            "EL2N {:.2g}",
        ),
    )
}


def lowest_rows(values: Array, count: int, among: Flags | None = None) -> Ints:
    """Rows of the lowest finite values [m], lowest first; of equal ones the first."""
    rows = np.flatnonzero(np.isfinite(values) if among is None else among & np.isfinite(values))
    near = rows[np.argpartition(values[rows], count - 1)[:count]] if len(rows) > count else rows
    return near[np.lexsort((near, values[near]))]


def image_id(split: str, name: str) -> str:
    """By what the explorer knows an image of a run; `name` is its sample id, or that as a file of the run has it."""
    return f"{split}/{escape_csv_cell(name)}"


# ---- the table


def _table(images: RunImages, known: ImageFacts) -> Iterator[str]:
    """images.csv, line by line."""
    look, read = known.look, known.look["read"]
    (hash_twin, hash_leak), (feature_twin, _) = known.by_hash, known.by_features
    leak, names = known.most_alike(across=True).other, images.class_names
    cosine = (
        np.full(len(images), np.nan)
        if known.white is None
        else np.vecdot(known.white, known.white[leak])
    )

    def numbers(values: Array, form: str = ".5g") -> Iterator[str]:
        return (format(value, form) if math.isfinite(value) else "" for value in values)

    def measured(name: str, form: str = ".5g") -> Iterator[str]:
        return numbers(np.where(read, look[name], np.nan), form)

    def twins(other: Ints) -> Iterator[str]:
        return (
            escape_csv_cell(images.all[index].sample_id) if index >= 0 else "" for index in other
        )

    columns: dict[str, Iterable[Any]] = {
        "split": (split for split, _ in images.each()),
        "image": (escape_csv_cell(sample.sample_id) for sample in images.all),
        "label": (escape_csv_cell(names[sample.label]) for sample in images.all),
        "visits": known.visits,
        **{name: numbers(known.scores[name]) for name in SCORES},
        "unlike_class": numbers(known.unlike_class),
        "prediction": (
            escape_csv_cell(names[index]) if index >= 0 else "" for index in known.prediction
        ),
        "certainty": numbers(known.certainty),
        "margin": numbers(known.margin),
        "width": measured("width", ".0f"),
        "height": measured("height", ".0f"),
        **{name: measured(name) for name in ("sharpness", "brightness", "colour")},
        "problem": (escape_csv_cell(known.problems.get(index, "")) for index in range(len(images))),
        "hash_twin": twins(hash_twin.other),
        "hash_bits": numbers(hash_twin.distance, ".0f"),
        "feature_twin": twins(feature_twin.other),
        "feature_cosine": numbers(1 - feature_twin.distance),
        "leak": twins(leak),
        "leak_bits": numbers(hash_leak.distance, ".0f"),
        "leak_cosine": numbers(np.where(leak >= 0, cosine, np.nan)),
        "expert_twin": twins(known.by_experts.other),
        "expert_coefficient": numbers(1 - known.by_experts.distance),
    }
    yield csv_text([*columns], [])
    for row in zip_longest(
        *columns.values(), fillvalue=""
    ):  # images outside of the training have no scores
        yield csv_text(row, [])


# ---- what the page says


@dataclass(frozen=True)
class Ranked:
    """One ranked list; the page's template has the words of those that the explorer doesn't show."""

    key: str  # its anchor
    rows: Ints  # the first images, best first
    value: Callable[[int], str]  # what is said of each
    twin: Ints | None = None  # the image that is shown beside each, if it is about pairs
    title: str = ""  # what it is called
    about: str = ""  # what it is ranked by


def page_facts(images: RunImages, known: ImageFacts, show: int) -> Json:
    """Everything on the page but the thumbnails: plain numbers and words."""
    names = images.class_names

    def entry(index: int) -> Json:
        split, sample = images.place(index)
        said = (
            escape_controls(names[known.prediction[index]]) if known.prediction[index] >= 0 else ""
        )
        label = names[sample.label]
        return {
            "index": index,
            "split": split,
            "image": escape_controls(sample.sample_id),
            "id": escape_csv_cell(sample.sample_id),
            "link": f"{EXPLORER}/?{urlencode({'picture': image_id(split, sample.sample_id), 'tab': 'data'})}",
            "label": escape_controls(label),
            "label_id": escape_csv_cell(label),
            "prediction": said,
            "prediction_id": escape_csv_cell(said),
            "certainty": float(known.certainty[index]) if said else None,
        }

    def told(lists: Sequence[Ranked]) -> list[Json]:
        return [
            {
                "key": each.key,
                "title": each.title,
                "about": each.about,
                "entries": [
                    entry(row)
                    | {
                        "value": each.value(row).replace("-", "\N{MINUS SIGN}"),
                        "twin": None if each.twin is None else entry(int(each.twin[row])),
                    }
                    for row in each.rows.tolist()
                ],
            }
            for each in lists
        ]

    return {
        "counts": {split: len(images.samples[split]) for split in images.splits},
        "unreadable": len(known.problems),
        "doubts": doubts(known, images.labels),
        "lists": told(
            [each for each in ranked_lists(known, images.split_of, show) if len(each.rows)]
        ),
        "map": map_cells(
            known.scores["p_mean"], known.scores["p_std"], images.labels[: len(known.visits)]
        ),
        "map_size": {"columns": _CELLS[0], "rows": _CELLS[1], "most": _MOST_SPREAD},
        "classes": class_rows(images, known),
        "experts": expert_rows(images, known),
        "of_classes": told(of_classes(images, known)),
        "of_experts": told(of_experts(known)),
        "class_names": list(map(escape_controls, names)),
        "class_ids": list(map(escape_csv_cell, names)),
    }


def ranked_lists(known: ImageFacts, split: Ints, show: int) -> list[Ranked]:
    """The lists in the order of the page; those of what wasn't measured are empty."""
    look, read, alike = known.look, known.look["read"], known.by_experts
    grey = read & (look["colour"] < _GREY)
    odd = _oddness(look["width"], look["height"], read)

    def scored(key: str) -> Ranked:
        one = SCORE_LISTS[key]
        rows = one.first(known.scores, show)
        return Ranked(key, rows, lambda i: one.value(known.scores, i), None, one.title, one.about)

    def measured(key: str, name: str, words: str, among: Flags) -> Ranked:
        return Ranked(
            key, lowest_rows(look[name], show, among), lambda i: words.format(look[name][i])
        )

    def pairs(
        key: str, near: Nearest, value: Callable[[int], str], among: Flags | None = None
    ) -> Ranked:
        rows = lowest_rows(near.distance, 2 * show, among)
        pair = np.sort(np.stack([rows, near.other[rows]], 1), 1)
        _, first = np.unique(
            pair, axis=0, return_index=True
        )  # the second image of a pair would say it again
        return Ranked(key, rows[np.sort(first)][:show], value, near.other)

    def copied(across: bool) -> Callable[[int], str]:
        bits, features = known.by_hash[across], known.by_features[across]
        return lambda i: (
            f"{bits.distance[i]:.0f} of 64 bits differ"
            if bits.other[i] >= 0
            else f"cosine {1 - features.distance[i]:.3f}"
        )

    def computed_alike(i: int) -> str:
        features = (
            ""
            if known.white is None
            else f", features {known.white[i] @ known.white[alike.other[i]]:.2f}"
        )
        return f"coefficient {1 - alike.distance[i]:.4f}{features}"

    return [
        scored("doubtful"),
        Ranked(
            "contradicted",
            lowest_rows(known.margin, show, split == 0),
            lambda i: f"margin {known.margin[i]:.2f}",
        ),
        scored("hardest"),
        scored("unsteady"),
        Ranked(
            "experts",
            lowest_rows(-known.unlike_class, show),
            lambda i: f"−ln p {known.unlike_class[i]:.2f}",
        ),
        scored("easiest"),
        pairs("leaks", known.most_alike(across=True), copied(True), split > 0),
        pairs("doubles", known.most_alike(across=False), copied(False)),
        pairs("redundant", alike, computed_alike),
        measured("blurred", "sharpness", "variance {:.3g}", read),
        measured("dark", "brightness", "brightness {:.2f}", read),
        Ranked(
            "odd",
            lowest_rows(-odd, show, odd > 0),
            lambda i: f"{look['width'][i]} × {look['height'][i]} px",
        ),
        measured("grey", "colour", "colour {:.3f}", grey & (grey.sum() <= _FEW * read.sum())),
        Ranked(
            "unreadable", np.array(sorted(known.problems)[:show], np.int64), lambda i: ""
        ),  # the frame says why
    ]


def _oddness(width: Ints, height: Ints, read: Flags) -> Floats:
    """[n] largest of |ln pixels − median| and |ln (width / height) − median|; 0 for what couldn't be read."""
    found = np.zeros(len(read), np.float32)
    if read.any():
        w, h = np.log(width[read].astype(np.float64)), np.log(height[read].astype(np.float64))
        found[read] = np.maximum(*(np.abs(each - np.median(each)) for each in (w + h, w - h)))
    return np.where(found > 0.01, found, 0)  # a pixel more or less is not odd


def map_cells(p_mean: Floats, p_std: Floats, labels: Ints) -> list[list[int]]:
    """[class, column, row, images] of every cell of the map that has some; columns by mean p, rows by its spread."""
    there = np.flatnonzero(np.isfinite(p_mean) & np.isfinite(p_std))
    columns, rows = _CELLS
    x = np.minimum(p_mean[there] * columns, columns - 1).astype(np.int64)
    y = np.minimum(p_std[there] / _MOST_SPREAD * rows, rows - 1).astype(np.int64)
    cells, counts = np.unique(np.stack([labels[there], x, y], 1), axis=0, return_counts=True)
    return [[*cell, count] for cell, count in zip(cells.tolist(), counts.tolist(), strict=True)]


def _mean_by(labels: Ints, values: Array, classes: int) -> Floats:
    """[classes] means of the finite values; NaN where a class has none."""
    there = np.isfinite(values)
    counts = np.bincount(labels[there], minlength=classes)
    sums = np.bincount(labels[there], values[there].astype(np.float64), minlength=classes)
    means: Floats = np.divide(sums, counts, out=np.full(classes, np.nan), where=counts > 0)
    return means


def class_rows(images: RunImages, known: ImageFacts) -> list[Json]:
    """A row for each class, the least certain first."""
    m, names, classes = len(known.visits), images.class_names, len(images.class_names)
    labels, predicted = images.labels[:m], known.prediction[:m]
    means = {
        name: _mean_by(labels, known.scores[name], classes).tolist()
        for name in ("p_mean", "aum", "correct", "forgetting")
    }
    wrong = (predicted >= 0) & (predicted != labels)
    taken: dict[int, tuple[int, int]] = {}
    for (label, guess), times in Counter(
        zip(labels[wrong].tolist(), predicted[wrong].tolist(), strict=True)
    ).items():
        taken[label] = max(taken.get(label, (0, 0)), (times, guess))
    rows = [
        {
            "name": escape_controls(name),
            "images": count,
            **{
                key: None if math.isnan(values[label]) else values[label]
                for key, values in means.items()
            },
            "taken_for": escape_controls(names[taken[label][1]]) if label in taken else "",
            "times": taken.get(label, (0, 0))[0],
        }
        for label, (name, count) in enumerate(
            zip(names, np.bincount(labels, minlength=classes).tolist(), strict=True)
        )
    ]
    return sorted(rows, key=lambda row: row["p_mean"] if row["p_mean"] is not None else 2.0)[
        :_MOST_ROWS
    ]


def expert_rows(images: RunImages, known: ImageFacts) -> list[Json]:
    """A row for each expert: its share, how hard its images are beside those of the layer, and its main class."""
    m = len(known.visits)
    labels, classes = images.labels[:m], len(images.class_names)
    found = []
    for block, shares in known.experts.items():
        there = np.flatnonzero(np.isfinite(shares[:, 0]) & np.isfinite(known.scores["p_mean"]))
        if not len(there):
            continue
        weight = shares[there].astype(np.float64)  # [r, E]
        total = np.maximum(weight.sum(0), 1e-12)
        for expert in range(weight.shape[1]):
            by_class = np.bincount(labels[there], weight[:, expert], minlength=classes)
            most = int(by_class.argmax())
            means = {
                name: float(weight[:, expert] @ known.scores[name][there] / total[expert])
                for name in ("p_mean", "aum", "correct")
            }
            found.append(
                {
                    "name": f"L{block}.E{expert}",
                    "share": float(total[expert] / weight.sum()),
                    "images": float(total[expert]),
                    **means,
                    "class": escape_controls(images.class_names[most]),
                    "of_class": float(by_class[most] / total[expert]),
                }
            )
    return found[:_MOST_ROWS]


def of_classes(images: RunImages, known: ImageFacts) -> list[Ranked]:
    """For each class, the least certain first, the images whose label the others speak against most."""
    labels, m = images.labels, len(known.visits)
    mean = _mean_by(labels[:m], known.scores["p_mean"], len(images.class_names))
    margin, found = SCORE_LISTS["doubtful"], []
    for label in lowest_rows(mean, _MOST_GROUPS).tolist():
        rows = margin.first(known.scores, _OF_EACH, labels[:m] == label)
        title = escape_controls(images.class_names[label])
        found.append(Ranked("", rows, lambda i: margin.value(known.scores, i), title=title))
    return [each for each in found if len(each.rows)]


def of_experts(known: ImageFacts) -> list[Ranked]:
    """For each expert, those with the least work first, the images of which it computed the largest part."""

    def part_of(shares: Floats) -> Callable[[int], str]:
        return lambda i: f"{shares[i]:.0%} of the image"

    found: list[tuple[float, Ranked]] = []
    for block, shares in known.experts.items():
        there = np.isfinite(shares[:, 0])
        if not there.any():
            continue
        work = shares[there].mean(0) * shares.shape[1]  # [E]; 1: an even share
        for expert, times in enumerate(work.tolist()):
            little = ", little work" if times < _LITTLE else ""
            title = f"L{block}.E{expert}: {times:.2f} of an even share{little}"
            rows = lowest_rows(-shares[:, expert], _OF_EACH, shares[:, expert] > 0)
            found.append((times, Ranked("", rows, part_of(shares[:, expert]), title=title)))
    found.sort(key=lambda each: each[0])
    return [each for _, each in found[:_MOST_GROUPS]]


# ---- the page


class Thumbnails:
    """Small copies of images as files beside the page, which a browser loads as one scrolls."""

    def __init__(self, images: RunImages, folder: Path) -> None:
        self.images, self.folder = images, folder

    def __call__(self, index: int) -> Json:
        """`src`, or `problem` if it can't be read."""
        try:
            image = self.images.collection.open(self.images.all[index], THUMB)
        except BadImageError as error:
            return {"src": None, "problem": error.reason}
        name = f"{index}.{'jpeg' if max(image.size) > THUMB else 'png'}"  # a small one as it is
        image.thumbnail((THUMB, THUMB))
        self.folder.mkdir(parents=True, exist_ok=True)
        image.save(self.folder / name, quality=82)
        return {"src": f"{self.folder.name}/{name}"}


def doubts(known: ImageFacts, labels: Ints) -> list[str]:
    """Why the lists may be noise: a model that is often wrong, or scores of few looks at each image."""
    told = []
    asked = known.prediction >= 0
    right = float(
        (known.prediction == labels)[asked].mean()
        if asked.any()
        else known.scores["correct"].mean()
    )
    if right < _WEAK:
        told.append(
            f"The model is right on {100 * right:.0f} % of these images: the lists rank its mistakes more than the "
            "images'. Train it for longer first."
        )
    looks = int(known.visits.max(initial=0))
    if looks < _FEW_LOOKS:
        told.append(
            f"The training looked at each image {looks} {'time' if looks == 1 else 'times'}: spread, forgetting and "
            f"the map need {_FEW_LOOKS} or more."
        )
    return told


def render(facts: Mapping[str, Any], thumbnail: Callable[[int], Json]) -> str:
    """The page, in which only its own script runs."""
    from moevision.analysis.report import environment  # figures come along

    script = (
        files("moevision.analysis").joinpath("templates/good_data.js").read_text(encoding="utf-8")
    )
    digest = base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode("ascii")
    page = environment()
    page.filters |= {"thumbnail": cache(thumbnail)}  # an image may stand in several lists
    told = {name: facts[name] for name in ("class_ids", "map", "map_size")}
    return page.get_template("good_data.html.jinja").render(
        facts,
        script=Markup("\n" + script),
        script_sha256=Markup(digest),
        told=Markup(json_text(told).replace("<", "\\u003c")),
    )
