"""Detection of out-of-distribution images ("strangers") by the Mahalanobis distance to the nearest class.

The pooled features (the classifier's input) of each class are modelled as a Gaussian around the mean of its training
images, with one covariance for all classes, as in linear discriminant analysis (Lee et al. 2018, arXiv:1807.03888).
Distances are divided by a threshold, the distance that 5 % of the validation images exceed, so that an image whose
distance is above 1 is a stranger. `benchmarks/strangers` compares this with other measures: the fraction of strangers
that each detects, by model.

Shapes: B batch, n training images, m validation images, D width of the feature, C classes with training images.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moevision.errors import UserError
from moevision.models.convert import pooled
from moevision.models.safe_files import read_header
from moevision.types import Array, Floats, TimmModel

FILE = "strangers.safetensors"
REFUSED = 0.05
"""Fraction of the validation images that lies above the threshold."""
# Most images of a split that a training run measures for `fit_ood`; of the training split 10 per class if that is more.
IMAGES = 1_000
MIN_VALIDATION = 20  # 5 % of fewer images are less than one


class MahalanobisOOD(nn.Module):
    """Mahalanobis distance of features to the nearest class mean, in units of the threshold."""

    mean: Tensor  # [D] of all training features
    # [D, D] lower triangular; a class's `whitening @ (feature - mean)` varies equally in all directions
    whitening: Tensor
    centers: Tensor  # [C, D] class means after the same map

    def __init__(
        self, mean: npt.ArrayLike, whitening: npt.ArrayLike, centers: npt.ArrayLike
    ) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("whitening", whitening), ("centers", centers)):
            self.register_buffer(name, torch.as_tensor(values, dtype=torch.float32).clone())

    def forward(self, features: Tensor) -> Tensor:
        """Distances, float32 [B], of pooled features [B, D]; above 1 an image is a stranger."""
        whitened = (features.to(self.mean) - self.mean) @ self.whitening.T  # [B, D]
        # The faster mode, by a matrix product, is less precise.
        mode = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(whitened, self.centers, compute_mode=mode)  # [B, C]
        return distances.amin(-1)


def fit_ood(features: Floats, labels: Array, validation: Floats) -> MahalanobisOOD | None:
    """Fit the classes to training features [n, D] with labels [n], and the threshold to validation features [m, D].

    The covariance is shrunk towards a multiple of the identity (Ledoit and Wolf 2004, Journal of Multivariate Analysis
    88), since that of fewer than D images is singular. None if there are fewer than 20 validation images, if a feature
    isn't finite, or if the features don't vary.
    """
    from scipy.spatial.distance import cdist
    from sklearn.covariance import LedoitWolf

    if len(validation) < MIN_VALIDATION:
        return None
    if not (np.isfinite(features).all() and np.isfinite(validation).all()):
        return None

    # Class means, and the covariance of the features around their class's mean.
    classes, class_index = np.unique(labels, return_inverse=True)  # class_index: [n], 0 to C - 1
    features_by_class = [features[class_index == index] for index in range(len(classes))]
    class_means = np.stack([of_class.mean(0) for of_class in features_by_class])  # [C, D]
    deviations = features - class_means[class_index]  # [n, D]
    covariance = LedoitWolf(assume_centered=True).fit(deviations).covariance_  # [D, D]

    # Whitening makes this covariance the identity, and the Mahalanobis distance a Euclidean one.
    try:
        whitening = np.linalg.inv(np.linalg.cholesky(covariance))  # [D, D]
    except np.linalg.LinAlgError:  # all images of a class are alike
        return None
    mean = features.mean(0)  # [D]
    centers = (class_means - mean) @ whitening.T  # [C, D]
    whitened = (validation - mean) @ whitening.T  # [m, D]

    nearest = cdist(whitened, centers).min(1)  # [m]
    threshold = np.quantile(nearest, 1 - REFUSED)
    # Smaller by the threshold, these two give distances in its units.
    return MahalanobisOOD(mean, whitening / threshold, centers / threshold)


def answers(net: TimmModel, strangers: MahalanobisOOD, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, classes] of preprocessed images [B, 3, H, W], and each image's distance to the nearest class, [B]."""
    features = pooled(net, images)
    classifier = net.get_classifier()
    return classifier(features), strangers(features)


def linear_head(net: TimmModel) -> nn.Linear | None:
    """The classifier of a timm model if it is one linear layer, of which `pooled` is the input; else None."""
    head = net.get_classifier()
    return head if isinstance(head, nn.Linear) else None


def read_ood(file: Path, net: nn.Module) -> MahalanobisOOD:
    """Load the detector that `save_model` wrote beside the weights of `net`.

    Shapes are checked against the classifier of `net` before the tensors are loaded, so that a wrong file takes no
    memory.
    """
    head = linear_head(net)
    tensors = {} if head is None else _load_if_fits(file, head)
    if not tensors or not all(bool(torch.isfinite(values).all()) for values in tensors.values()):
        raise UserError(
            f"{file} doesn't hold the distances of this model: put back the file that came with it, or remove "
            '"strangers" from config.json.'
        )
    return MahalanobisOOD(**tensors)


def _load_if_fits(file: Path, head: nn.Linear) -> dict[str, Tensor]:
    """The tensors of a file, if its header has the expected names, shapes and dtype; else, or without a file, empty."""
    try:
        header = read_header(file)
    except FileNotFoundError:
        return {}
    shapes = {name: entry.shape for name, entry in header.items() if entry.dtype == "F32"}

    # Classes without training images have no center, so that C may be less than the classifier has outputs.
    num_centers = (shapes.get("centers") or (0,))[0]
    width = head.in_features
    expected = {"mean": (width,), "whitening": (width, width), "centers": (num_centers, width)}
    if shapes != expected or not 0 < num_centers <= head.out_features:
        return {}
    return load_file(file)
