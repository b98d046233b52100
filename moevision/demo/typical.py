"""Is an image unlike those that the model was trained on? A simple measure, and what it can't see.

An image is summed up in 28 numbers that no object enters: mean and spread of its colours, how strong its edges are at
three scales (six quantiles each), and how unevenly they lie over the image. The measure is the Mahalanobis distance
of these numbers from those of the training images; an image beyond the distance of 99 % of them is called unlike.

It notices noise, flat colour, logos, and drawings among photos or photos among drawings where their sharpness differs.
It does not notice a strange object photographed in a familiar way, and at 32 pixels it tells hardly any drawing or
other photo from CIFAR-10's. `benchmarks/demo/unlike.py` has the shares, beside those of the energy score of the model's
logits (arXiv:2010.03759).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moevision.errors import UserError

Floats = npt.NDArray[np.float64]
SHARE: Final = 0.99
MIN_PICTURES: Final = 200
_SCALES: Final = 3
_QUANTILES: Final = (0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
_FLOOR: Final = 2e-3  # half a grey level of 255: below it an edge is rounding
_LUMA: Final = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class Typical:
    """What training images look like, in statistics of their pixels; F is the number of statistics.

    Attributes:
        mean: [F].
        whitening: [F, F] so that `whitening @ (statistics - mean)` has unit covariance.
        threshold: squared distance beyond which 1 % of the images lie.
        image_size: side of the images in pixels; the statistics depend on it.
        n_images: how many images were measured.
    """

    mean: Floats
    whitening: Floats
    threshold: float
    image_size: int
    n_images: int

    def distance(self, pixels: npt.NDArray[np.uint8]) -> float:
        """Squared Mahalanobis distance of an image, uint8 [S, S, 3], from the typical one."""
        return float(np.square(self.whitening @ (picture_statistics(pixels) - self.mean)).sum())

    def unlike(self, pixels: npt.NDArray[np.uint8]) -> str | None:
        """Why the image is unlike the training data, in one sentence; None if it isn't."""
        if self.distance(pixels) <= self.threshold:
            return None
        return (
            f"Its colours and edges are further from the usual than in {SHARE:.0%} of the images that the model was "
            "made for, so prediction and routing may mean little here."
        ).replace("%", " %")

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON; numbers with six significant digits."""
        return {
            "mean": [_six(value) for value in self.mean],
            "whitening": [[_six(value) for value in row] for row in self.whitening],
            "threshold": _six(self.threshold),
            "image_size": self.image_size,
            "n_images": self.n_images,
        }

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> Typical:
        """The inverse of `to_json`.

        Raises:
            ValueError: if the arrays don't fit each other.
        """
        mean, whitening = np.array(given["mean"], np.float64), np.array(given["whitening"], np.float64)
        if mean.ndim != 1 or whitening.shape != (len(mean), len(mean)):
            raise ValueError(f"whitening of shape {whitening.shape} does not fit {len(mean)} statistics")
        return cls(mean, whitening, float(given["threshold"]), int(given["image_size"]), int(given["n_images"]))


def typical_of(pictures: Iterable[npt.NDArray[np.uint8]], image_size: int) -> Typical:
    """Measure what images of the training data look like, best on images that were held out.

    Args:
        pictures: at least 200 images, uint8 [S, S, 3]. Every other one fixes mean and covariance, the rest the
            threshold: on the same images it would come out too low.
        image_size: S.

    Raises:
        UserError: if there are too few images or they have another size.
    """
    rows = []
    for pixels in pictures:
        if pixels.shape != (image_size, image_size, 3):
            raise UserError(f"The model's images are {image_size} px square, not of shape {pixels.shape}.")
        rows.append(picture_statistics(pixels))
    if len(rows) < MIN_PICTURES:
        raise UserError(f"At least {MIN_PICTURES} images are needed to say what is typical, not {len(rows)}.")
    fitted, held_out = np.stack(rows[::2]), np.stack(rows[1::2])
    mean, scale = fitted.mean(0), np.maximum(fitted.std(0), 1e-6)
    # A hundredth of the identity keeps the inverse tame where statistics nearly determine each other.
    scaled = (fitted - mean) / scale
    correlation = scaled.T @ scaled / len(scaled) + 1e-2 * np.eye(len(mean))
    whitening = np.linalg.inv(np.linalg.cholesky(correlation)) / scale
    distances = np.square((held_out - mean) @ whitening.T).sum(1)
    return Typical(mean, whitening, float(np.quantile(distances, SHARE)), image_size, len(rows))


def picture_statistics(pixels: npt.NDArray[np.uint8]) -> Floats:
    """[F] statistics of an image, uint8 [S, S, 3] with S at least 16 pixels."""
    rgb = pixels.astype(np.float64) / 255
    colours = rgb.reshape(-1, 3)
    saturation = (colours.max(1) - colours.min(1)).mean()
    found: list[Any] = [*colours.mean(0), *np.log(colours.std(0) + 0.01), np.log(saturation + 0.01)]
    grey = rgb @ np.array(_LUMA)
    for _ in range(_SCALES):
        down, right = np.abs(np.diff(grey, axis=0)), np.abs(np.diff(grey, axis=1))
        edges = np.concatenate([down.ravel(), right.ravel()])
        found += list(np.log(np.quantile(edges, _QUANTILES) + _FLOOR))
        found.append(_unevenness(down[:, :-1] + right[:-1]))
        grey = _halved(grey)
    return np.array(found)


def _unevenness(edges: Floats) -> float:
    """Standard deviation over a 4 x 4 grid of the logarithm of mean edge strength."""
    cells = [cell for row in np.array_split(edges, 4) for cell in np.array_split(row, 4, axis=1)]
    return float(np.std([np.log(cell.mean() + _FLOOR) for cell in cells]))


def _halved(grey: Floats) -> Floats:
    height, width = grey.shape[0] // 2, grey.shape[1] // 2
    halved: Floats = grey[: 2 * height, : 2 * width].reshape(height, 2, width, 2).mean((1, 3))
    return halved


def _six(value: float) -> float:
    return float(f"{value:.6g}")
