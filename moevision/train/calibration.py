"""Confidence that means what it says: one temperature for all logits, fitted on the validation images.

Sources
    Guo et al., On Calibration of Modern Neural Networks (arXiv:1706.04599, 4.2): softmax(logits / T), with the T of the
    smallest negative log-likelihood on the validation images. It changes no answer, only how sure it sounds.
    Platt, Probabilistic outputs for support vector machines (1999): a target of (n + 1) / (n + 2) in the place of 1, so
    that n images which are all right don't make the model certain of everything.

Axes: n images, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, islice
from math import ceil
from typing import Any, cast

import lightning as L
import numpy as np
import numpy.typing as npt

from moevision.train.processes import gather
from moevision.train.task import ClassificationTask

_LOW, _HIGH = 0.05, 20.0  # temperatures


@dataclass(frozen=True)
class Calibration:
    """A fitted temperature.

    Attributes:
        temperature: T; above 1 the model was too sure of itself.
        images: validation images that it was fitted on.
    """

    temperature: float
    images: int


def fit_temperature(logits: npt.NDArray[Any], labels: npt.NDArray[Any]) -> Calibration | None:
    """The temperature of the smallest negative log-likelihood; None without images or with logits that aren't finite.

    Args:
        logits: [n, C].
        labels: [n].
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    n, classes = logits.shape
    logits = logits.astype(np.float64)
    if not n or not np.isfinite(logits).all():
        return None
    right = logits[np.arange(n), labels]  # [n]
    wrong = (logits.sum(1) - right) / (classes - 1)  # [n] mean logit of the other classes
    target = (n + 1) / (n + 2)
    aimed = target * right + (1 - target) * wrong

    def loss(log_temperature: float) -> float:
        temperature = np.exp(log_temperature)
        return float(np.mean(logsumexp(logits / temperature, axis=1) - aimed / temperature))

    # Convex in 1 / T, so there is one minimum.
    found = minimize_scalar(loss, bounds=(np.log(_LOW), np.log(_HIGH)), method="bounded", options={"xatol": 1e-6})
    return Calibration(float(np.exp(found.x)), n)


def calibration_error(confidence: npt.NDArray[Any], correct: npt.NDArray[Any], bins: int = 15) -> float:
    """Expected calibration error in [0, 1]: mean gap between confidence and accuracy over equally wide bins.

    Args:
        confidence: [n] probability of the answer.
        correct: [n] whether it was right.
        bins: number of bins (arXiv:1706.04599, eq. 3).
    """
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(place, confidence - correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


class Calibrate(L.Callback):
    """Fits the temperature on the validation images when a trained model is tested."""

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Here the weights to be tested are loaded, on their device, in evaluation mode and without gradients."""
        task, data = cast(ClassificationTask, pl_module), cast(Any, trainer).datamodule
        loader = data.val_dataloader()
        limit = trainer.limit_val_batches
        batches = limit if isinstance(limit, int) else ceil(limit * len(loader))
        own: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = []
        for batch in islice(loader, batches):
            batch = {name: value.to(task.device) for name, value in batch.items()}
            batch = trainer.precision_plugin.convert_input(batch)
            with trainer.precision_plugin.forward_context():
                logits = task.evaluation_logits(batch)
            own.append((logits.cpu().numpy(), batch["label"].cpu().numpy()))
        known = list(chain.from_iterable(gather(own)))
        if known:
            logits_, labels = (np.concatenate(part) for part in zip(*known, strict=True))
            task.calibration = fit_temperature(logits_, labels)
