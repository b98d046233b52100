"""Several labels of an image: loss, metrics, temperature and thresholds beside scikit-learn, SciPy and brute force."""

import numpy as np
import pytest
import torch
from scipy.special import expit, xlogy
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score

from moevision.stats import best_thresholds, fit_temperature
from moevision.train.task import SeveralLabels

N, C = 200, 5


@pytest.fixture
def scores():
    """Logits and multi-hot labels that go together a little; rare and frequent labels."""
    rng = np.random.default_rng(0)
    labels = (rng.random((N, C)) < [0.05, 0.2, 0.5, 0.8, 0.3]).astype(np.int64)
    return (2 * labels - 1 + 2 * rng.normal(size=(N, C))).astype(np.float32), labels


def test_metrics_are_those_of_scikit_learn(scores):
    logits, labels = scores
    p = expit(logits)
    targets = SeveralLabels()
    metrics, by_class = targets.metrics(C), targets.class_metrics(C)
    for part in range(0, N, 64):
        rows = slice(part, part + 64)
        batch = (
            targets.probabilities(torch.from_numpy(logits[rows])),
            torch.from_numpy(labels[rows]),
        )
        metrics.update(*batch)
        by_class.update(*batch)
    result = {name: float(value) for name, value in metrics.compute().items()}
    given = p > 0.5
    assert result["map"] == pytest.approx(
        average_precision_score(labels, p, average="macro"), abs=1e-6
    )
    for average in ("micro", "macro"):
        expected = f1_score(labels, given, average=average)
        assert result[f"f1_{average}_at_half"] == pytest.approx(expected, abs=1e-6)
    assert result["exact_at_half"] == pytest.approx(accuracy_score(labels, given), abs=1e-6)
    np.testing.assert_allclose(
        by_class.compute()["auroc"], roc_auc_score(labels, p, average=None), atol=1e-6
    )
    np.testing.assert_allclose(
        by_class.compute()["ap"], average_precision_score(labels, p, average=None), atol=1e-6
    )


def test_the_loss_is_binary_cross_entropy(scores):
    """-(w y log p + (1 - y) log(1 - p)), mean over images and labels, with y moved towards 1/2 by smoothing."""
    logits, labels = scores
    p = expit(logits.astype(np.float64))
    y, w = 0.9 * labels + 0.05, np.array([9.0, 4, 1, 0.25, 2])
    expected = -(w * xlogy(y, p) + xlogy(1 - y, 1 - p)).mean()
    loss = SeveralLabels().loss(
        torch.from_numpy(logits), torch.from_numpy(labels), torch.tensor(w).float(), 0.1
    )
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    losses = SeveralLabels().losses(torch.from_numpy(logits), torch.from_numpy(labels).float())
    plain = -(xlogy(labels, p) + xlogy(1 - labels, 1 - p)).mean(1)
    np.testing.assert_allclose(losses, plain, rtol=1e-4)


def test_an_image_is_right_with_all_its_labels_and_no_other():
    targets = SeveralLabels()
    answers = targets.answers(torch.tensor([[0.4, 0.6], [0.4, 0.4], [0.2, 0.6]]), (0.3, 0.5))
    assert answers.tolist() == [[True, True], [True, False], [False, True]]
    wanted = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    assert targets.are_right(answers, wanted).tolist() == [True, False, True]


def test_shares_of_labels_are_equal():
    shares = SeveralLabels().shares(torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1]]), 4)
    assert shares.tolist() == [[0.5, 0, 0.5, 0], [0, 0, 0, 1]]


def test_thresholds_have_the_best_f1(scores):
    """No threshold between or beside the probabilities that occur has a better one, label by label."""
    logits, labels = scores
    p = np.round(expit(logits.astype(np.float64)), 2)  # many are equal
    for label, threshold in enumerate(best_thresholds(p, labels)):
        best = max(f1_score(labels[:, label], p[:, label] > t) for t in np.arange(-0.005, 1, 0.005))
        assert f1_score(labels[:, label], p[:, label] > threshold) == pytest.approx(best)


def test_thresholds_of_few_images():
    """By hand: two images apart; all alike, where all get the label; a label that no image has."""
    p = np.array([[0.9, 0.4, 0.3], [0.5, 0.4, 0.6]])
    labels = np.array([[1, 1, 0], [0, 0, 0]])
    assert best_thresholds(p, labels) == pytest.approx((0.7, 0.2, 0.5))


def test_the_temperature_is_that_of_the_lowest_loss(scores):
    """On logits that are three times too large, by a grid of temperatures; targets are Platt's."""
    logits, labels = scores
    logits = 3 * logits.astype(np.float64)
    calibration = fit_temperature(logits, labels)
    y = np.where(labels, (N + 1) / (N + 2), 1 / (N + 2))

    def loss(temperature):
        p = expit(logits / temperature)
        return -(xlogy(y, p) + xlogy(1 - y, 1 - p)).mean()

    grid = np.geomspace(0.05, 20, 2001)
    assert loss(calibration.temperature) <= min(map(loss, grid)) + 1e-9
    assert calibration.images == N
    assert calibration.thresholds == best_thresholds(
        expit(logits / calibration.temperature), labels
    )
