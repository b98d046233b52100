"""Is an image unlike those that a model learned from? How far its pooled feature lies from the nearest class.

In the space that the classifier reads, training images of a class are taken for a Gaussian around their mean, all
classes with one covariance, as in linear discriminant analysis (Lee et al. 2018, arXiv:1807.03888). The distance is
Mahalanobis's, in units of the distance that 5 % of the validation images exceed: beyond 1 an image is a stranger.
`benchmarks/strangers` has the share of strangers that this recognizes, by model, beside other measures.

Axes: B batch, n images, D width of the feature, C classes that had training images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moevision.errors import UserError
from moevision.models.safe_files import read_header

Floats = npt.NDArray[np.float64]
FILE: Final = "strangers.safetensors"
REFUSED: Final = 0.05
"""Share of the validation images beyond the threshold."""
IMAGES: Final = (
    1_000  # of training (10 of a class, if that is more) and of validation that `fit` measures
)
MIN_VALIDATION: Final = 20  # a twentieth of fewer images is none


class MahalanobisOOD(nn.Module):
    """The distance of features from the nearest class."""

    mean: Tensor  # [D] of all training features
    whitening: Tensor  # [D, D] lower triangular: `whitening @ (feature - mean)` has the same spread in all directions
    centers: Tensor  # [C, D] where that puts the mean of each class

    def __init__(
        self, mean: npt.ArrayLike, whitening: npt.ArrayLike, centers: npt.ArrayLike
    ) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("whitening", whitening), ("centers", centers)):
            self.register_buffer(name, torch.as_tensor(values, dtype=torch.float32).clone())

    def forward(self, features: Tensor) -> Tensor:
        """Distances, float32 [B], of pooled features [B, D]; above 1 an image is a stranger."""
        white = (features.to(self.mean) - self.mean) @ self.whitening.T
        return torch.cdist(white, self.centers, compute_mode="donot_use_mm_for_euclid_dist").amin(
            -1
        )


def fit_ood(
    features: Floats, labels: npt.NDArray[Any], validation: Floats
) -> MahalanobisOOD | None:
    """Fit to features [n, D] of training images with labels [n], the threshold to those of validation images [m, D].

    The covariance is shrunk towards a multiple of the identity as Ledoit and Wolf do (2004, Journal of Multivariate
    Analysis 88): fewer images than D would leave it singular. None where that can't be known: of fewer than 20
    validation images, or of features that don't differ.
    """
    from scipy.spatial.distance import cdist
    from sklearn.covariance import LedoitWolf

    if len(validation) < MIN_VALIDATION or not (
        np.isfinite(features).all() and np.isfinite(validation).all()
    ):
        return None
    classes, place = np.unique(labels, return_inverse=True)
    means = np.stack(
        [features[place == number].mean(0) for number in range(len(classes))]
    )  # [C, D]
    covariance = (
        LedoitWolf(assume_centered=True).fit(features - means[place]).covariance_
    )  # [D, D], within classes
    try:
        whitening = np.linalg.inv(np.linalg.cholesky(covariance))
    except np.linalg.LinAlgError:  # no two images of a class differ
        return None
    mean = features.mean(0)
    centers, white = ((each - mean) @ whitening.T for each in (means, validation))
    threshold = np.quantile(cdist(white, centers).min(1), 1 - REFUSED)
    return (
        MahalanobisOOD(mean, whitening / threshold, centers / threshold) if threshold > 0 else None
    )


def answers(net: nn.Module, strangers: MahalanobisOOD, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, C] of prepared images [B, 3, S, S], and how far each is from the nearest class, [B]."""
    features = pooled(net, images)
    return cast(Tensor, cast(Any, net).get_classifier()(features)), strangers(features)


def pooled(net: nn.Module, images: Tensor) -> Tensor:
    """What the classifier of a timm model reads, [B, D]."""
    state = cast(Any, net)
    return cast(Tensor, state.forward_head(state.forward_features(images), pre_logits=True))


def linear_head(net: nn.Module) -> nn.Linear | None:
    """The classifier of a timm model, if it is one linear map of features that the model tells."""
    if not (hasattr(net, "forward_head") and hasattr(net, "get_classifier")):
        return None
    head = cast(Any, net).get_classifier()
    return head if isinstance(head, nn.Linear) else None


def read_ood(file: Path, net: nn.Module) -> MahalanobisOOD:
    """The numbers that `save_model` wrote beside the weights of `net`, checked against it before memory is taken."""
    head = linear_head(net)
    width, classes = (0, 0) if head is None else (head.in_features, head.out_features)
    try:
        shapes = {
            name: entry.shape for name, entry in read_header(file).items() if entry.dtype == "F32"
        }
    except FileNotFoundError:
        shapes = {}
    rows = (shapes.get("centers") or (0,))[0]
    right = {"mean": (width,), "whitening": (width, width), "centers": (rows, width)}
    stored = load_file(file) if shapes == right and 0 < rows <= classes else {}
    if not stored or not all(bool(torch.isfinite(values).all()) for values in stored.values()):
        raise UserError(
            f"{file} doesn't hold the distances of this model: put back the file that came with it, or remove "
            '"strangers" from config.json.'
        )
    return MahalanobisOOD(**stored)
