"""How little a vector of an image fits its class: linear discriminant analysis, without the classifier.

Of the experts that computed an image (their shares, `scores.csv`) it asks: are these the experts of its class? The same
question about the pooled features of a dense model is the control.

Axes: n images, H numbers of each, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moevision.data.scores import Floats, Ints

_ROWS = 4096


def class_doubt(x: npt.NDArray[np.floating[Any]], labels: Ints) -> Floats:
    """-ln p(label | x) under Gaussian classes of one covariance (Fisher 1936; Hastie et al., ESL, §4.3).

    Args:
        x: [n, H]; a row with NaN has no answer.
        labels: [n].

    Returns:
        float32 [n]: 0 where x leaves no doubt; NaN without an answer, and everywhere if there is one class only.
    """
    doubt = np.full(len(x), np.nan, np.float32)
    rows = np.flatnonzero(~np.isnan(x).any(1))
    classes, number = np.unique(labels[rows], return_inverse=True)
    if len(classes) < 2:
        return doubt
    counts, width = np.bincount(number), x.shape[1]
    means, scatter = np.zeros((len(classes), width)), np.zeros((width, width))
    for part in _parts(len(rows)):
        np.add.at(means, number[part], x[rows[part]])
    means /= counts[:, None]
    for part in _parts(len(rows)):
        within = x[rows[part]] - means[number[part]]
        scatter += within.T @ within
    scatter /= len(rows)
    # Shares of a layer add up to 1: one direction has no spread, and the ridge keeps it out of the answer.
    scatter += np.eye(width) * (1e-3 * np.trace(scatter) / width + 1e-12)
    weight = np.linalg.solve(scatter, means.T)  # [H, C]
    bias = np.log(counts / len(rows)) - 0.5 * (means * weight.T).sum(1)
    for part in _parts(len(rows)):
        logits = x[rows[part]] @ weight + bias  # [rows, C]
        top = logits.max(1, keepdims=True)
        total = top[:, 0] + np.log(np.exp(logits - top).sum(1))
        doubt[rows[part]] = total - logits[np.arange(len(logits)), number[part]]
    return doubt


def _parts(n: int) -> list[slice]:
    return [slice(start, start + _ROWS) for start in range(0, n, _ROWS)]
