"""The temperature, against a data set whose temperature is known, and the error that is left."""

import json

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax
from torchmetrics.functional.classification import multiclass_calibration_error

from moevision.files import read_csv
from moevision.stats import fit_temperature


def drawn(temperature, n=20_000, classes=4):
    """Logits, and labels drawn from softmax(logits / temperature): that temperature is right."""
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(n, classes))
    probabilities = softmax(logits / temperature, axis=1)
    labels = (rng.random((n, 1)) > probabilities.cumsum(1)).sum(1)
    return logits.astype(np.float32), labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_is_found_and_calibrates(temperature):
    logits, labels = drawn(temperature)
    found = fit_temperature(logits, labels)
    assert found.images == len(labels)
    assert found.temperature == pytest.approx(temperature, rel=0.05)

    def error(t):
        p = torch.from_numpy(softmax(logits / t, axis=1))
        return multiclass_calibration_error(p, torch.from_numpy(labels), 4, n_bins=15)

    assert error(found.temperature) < 0.02
    if temperature != 1:
        assert error(1.0) > 3 * error(found.temperature)


def test_it_is_the_minimum_of_the_likelihood():
    """On a grid; with many images Platt's target is 1 to four digits."""
    logits, labels = drawn(1.7)
    grid = np.geomspace(0.5, 5, 400)
    losses = [
        np.mean(logsumexp(logits / t, axis=1) - logits[np.arange(len(labels)), labels] / t)
        for t in grid
    ]
    assert fit_temperature(logits, labels).temperature == pytest.approx(
        grid[np.argmin(losses)], rel=0.02
    )


def test_few_images_that_are_all_right_make_nothing_certain():
    """Ten of ten right: Platt's target is 11/12, and no probability may pass it by much."""
    labels = np.array([0, 1] * 5)
    logits = np.eye(2)[labels] * 4
    found = fit_temperature(logits, labels)
    assert softmax(logits / found.temperature, axis=1).max() == pytest.approx(11 / 12, abs=1e-3)


def test_what_can_not_be_fitted():
    assert fit_temperature(np.zeros((0, 3)), np.zeros(0, int)) is None
    assert fit_temperature(np.array([[1.0, np.inf]]), np.array([0])) is None


def test_the_error_that_a_run_reports(tiny_run):
    """arXiv:1706.04599, eq. 3, from the predictions beside it, whose probabilities have four digits."""
    predictions = read_csv(tiny_run / "predictions_test.csv")
    rows = [(float(row["probability"]), int(row["correct"])) for row in predictions]
    confidence, correct = np.array(rows).T
    gaps = np.bincount((confidence * 15).astype(int).clip(max=14), confidence - correct)
    reported = json.loads((tiny_run / "summary.json").read_text())["test"]["calibrated_ece"]
    assert reported == pytest.approx(np.abs(gaps).sum() / len(rows), abs=1e-3)
