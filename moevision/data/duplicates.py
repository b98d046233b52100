"""Near-duplicates among many images: for each the most alike other one, and the most alike one of another split.

Two ways to be alike, because each misses what the other finds: a perceptual hash (`quality.perceptual_hash`), and the
features of a model, whitened, so that they tell images apart instead of classes. Both searches are bounded for a
million images, and may miss pairs:

- hashes are sorted under `ORDERS` permutations of their bits, and compared with their `WINDOW` next neighbours
  (Charikar, STOC 2002, §3): every image that shares its hash with another is found, and pairs that differ in four bits
  nearly always. Where more than `SURE_BITS` differ, the features must agree: among many images some are as near by
  chance, and their number grows as that of all pairs does;
- features are compared within cells of at most `CELL` images, the nearest of k centroids (as SemDeDup does,
  arXiv:2303.09540): pairs at a border between cells are missed. Up to `CELL` images there is one cell.

Axes: n images, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moevision.data.scores import Floats, Ints

ORDERS, WINDOW, MOST_BITS, SURE_BITS = 16, 16, 10, 4
AGREE: Final = 0.7  # cosine; among 60 000 images of CIFAR-10, pairs of 7 to 10 bits below it are no copies, by eye
CELL: Final = 16_384
WIDTH: Final = 64  # features that are kept of an image: 128 bytes
_ROWS = 1024
_ROUNDS = 5
Bools = npt.NDArray[np.bool_]


@dataclass
class Nearest:
    """The most alike other image of each.

    Attributes:
        other: [n] its index; -1: none was found.
        distance: [n] of them, infinite without.
    """

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
    hashes: npt.NDArray[np.uint64], usable: Bools, split: Ints, white: Floats | None = None
) -> tuple[Nearest, Nearest]:
    """By the number of bits in which hashes differ, at most `MOST_BITS`.

    Args:
        hashes: [n].
        usable: [n], whether an image has a hash.
        split: [n], number of its split.
        white: [n, D] of `whitened`, which must agree where more than `SURE_BITS` differ; None: they aren't asked.

    Returns:
        The nearest image, and the nearest one of another split.
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
            _offer_both(found, left[near], right[near], differ[near].astype(np.float32), split)
    return found


def _offer_both(found: tuple[Nearest, Nearest], left: Ints, right: Ints, distance: Floats, split: Ints) -> None:
    pairs = np.concatenate([left, right]), np.concatenate([right, left]), np.concatenate([distance, distance])
    found[0].offer(*pairs)
    across = split[pairs[0]] != split[pairs[1]]
    found[1].offer(*(each[across] for each in pairs))


def nearest_by_features(white: Floats, usable: Bools, split: Ints) -> tuple[Nearest, Nearest]:
    """By one less the cosine of vectors of unit length [n, D], as of `whitened`; `nearest_by_hash` says the rest."""
    found = (Nearest.none(len(white)), Nearest.none(len(white)))
    rows = np.flatnonzero(usable)
    if len(rows) < 2:
        return found
    for members in _cells(white[rows]):
        cell = rows[members]
        for start in range(0, len(cell), _ROWS):
            block = cell[start : start + _ROWS]
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

    Args:
        shares: of each layer [m, E], the share of an image's choices that each expert had; NaN: unknown.
        labels: [m].

    Returns:
        The nearest images; the coefficient is the mean over layers of Σ_e √(p_e q_e), 1 for equal shares.
    """
    roots = np.sqrt(np.concatenate(shares, axis=1), dtype=np.float32) / np.sqrt(np.float32(len(shares)))
    return nearest_in_class(roots, np.where(np.isfinite(roots).all(1), labels, -1))


def nearest_in_class(vectors: Floats, labels: Ints) -> Nearest:
    """The image of the same class by one less the cosine of vectors of unit length [m, D]; label -1 takes no part."""
    found = Nearest.none(len(labels))
    for label in np.unique(labels[labels >= 0]):
        rows = np.flatnonzero(labels == label)
        near, _ = nearest_by_features(vectors[rows], np.ones(len(rows), bool), np.zeros(len(rows), np.int64))
        there = near.other >= 0
        found.offer(rows[there], rows[near.other[there]], near.distance[there])
    return found


def whitened(features: npt.NDArray[np.floating[Any]], usable: Bools) -> Floats:
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
    """Indices of at most `CELL` images each, by their nearest centroid (Lloyd's algorithm on a sample)."""
    n = len(white)
    if n <= CELL:
        return [np.arange(n)]
    generator = np.random.default_rng(0)
    sample = white[np.sort(generator.choice(n, min(n, 2 * CELL), replace=False))]
    centroids = sample[generator.choice(len(sample), 2 * -(-n // CELL), replace=False)]
    for _ in range(_ROUNDS):
        mine = _nearest_centroid(sample, centroids)
        filled = np.bincount(mine, minlength=len(centroids)) > 0
        sums = np.zeros_like(centroids)
        np.add.at(sums, mine, sample)
        centroids[filled] = sums[filled] / np.maximum(np.linalg.norm(sums[filled], axis=1, keepdims=True), 1e-12)
    mine = _nearest_centroid(white, centroids)
    order = np.argsort(mine, kind="stable")
    cells = np.split(order, np.flatnonzero(np.diff(mine[order])) + 1)
    return [cell[start : start + CELL] for cell in cells for start in range(0, len(cell), CELL)]


def _nearest_centroid(white: Floats, centroids: Floats) -> Ints:
    parts = [(white[start : start + CELL] @ centroids.T).argmax(1) for start in range(0, len(white), CELL)]
    return np.concatenate(parts)


def projection(width: int, seed: int = 0) -> Floats:
    """[D, at most `WIDTH`] orthonormal directions onto which features are projected, the same for every image."""
    if width <= WIDTH:
        return np.eye(width, dtype=np.float32)
    square, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, WIDTH)))
    return square.astype(np.float32)
