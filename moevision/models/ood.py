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
# Of training (10 of a class, if that is more) and of validation that `fit` measures.
IMAGES: Final = 1_000
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
        self.register_buffer("mean", _float32(mean))
        self.register_buffer("whitening", _float32(whitening))
        self.register_buffer("centers", _float32(centers))

    def forward(self, features: Tensor) -> Tensor:
        """Distances, float32 [B], of pooled features [B, D]; above 1 an image is a stranger."""
        white = (features.to(self.mean) - self.mean) @ self.whitening.T  # [B, D]
        exact = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(white, self.centers, compute_mode=exact)  # [B, C]
        return distances.amin(-1)


def _float32(values: npt.ArrayLike) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32).clone()


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

    if len(validation) < MIN_VALIDATION:
        return None
    if not (np.isfinite(features).all() and np.isfinite(validation).all()):
        return None

    # The means of the classes, and the covariance within classes.
    classes, class_index = np.unique(labels, return_inverse=True)
    of_classes = [features[class_index == number] for number in range(len(classes))]
    class_means = np.stack([of_class.mean(0) for of_class in of_classes])  # [C, D]
    within = features - class_means[class_index]  # [n, D]
    covariance = LedoitWolf(assume_centered=True).fit(within).covariance_  # [D, D]

    # In the whitened space it is the identity, so that the distance is Euclid's.
    try:
        whitening = np.linalg.inv(np.linalg.cholesky(covariance))
    except np.linalg.LinAlgError:  # no two images of a class differ
        return None
    mean = features.mean(0)
    centers = (class_means - mean) @ whitening.T  # [C, D]
    white = (validation - mean) @ whitening.T  # [m, D]

    nearest = cdist(white, centers).min(1)  # [m]
    threshold = np.quantile(nearest, 1 - REFUSED)
    if not threshold > 0:
        return None
    return MahalanobisOOD(mean, whitening / threshold, centers / threshold)


def answers(net: nn.Module, strangers: MahalanobisOOD, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, C] of prepared images [B, 3, S, S], and how far each is from the nearest class, [B]."""
    features = pooled(net, images)
    classifier = cast(Any, net).get_classifier()
    return classifier(features), strangers(features)


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
    stored = {} if head is None else _load_if_fits(file, head)
    if not stored or not all(bool(torch.isfinite(values).all()) for values in stored.values()):
        raise UserError(
            f"{file} doesn't hold the distances of this model: put back the file that came with it, or remove "
            '"strangers" from config.json.'
        )
    return MahalanobisOOD(**stored)


def _load_if_fits(file: Path, head: nn.Linear) -> dict[str, Tensor]:
    """The tensors of a file whose header says the right shapes; empty if it doesn't, or there is none."""
    try:
        header = read_header(file)
    except FileNotFoundError:
        return {}
    shapes = {name: entry.shape for name, entry in header.items() if entry.dtype == "F32"}
    width = head.in_features
    rows = (shapes.get("centers") or (0,))[0]
    right = {"mean": (width,), "whitening": (width, width), "centers": (rows, width)}
    if shapes != right or not 0 < rows <= head.out_features:
        return {}
    return load_file(file)
