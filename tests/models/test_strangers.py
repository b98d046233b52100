"""Distances of features: recomputed in float64, a threshold that refuses a twentieth, and files that can't be used."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from sklearn.covariance import LedoitWolf

import moevision.models  # noqa: F401  (registers the names)
from moevision.errors import UserError
from moevision.models.io import SavedModel, load_model, save_model
from moevision.models.ood import FILE, MahalanobisOOD, answers, fit_ood, pooled
from tests.shared import noise_images

D, CLASSES = 12, 3
RNG = np.random.default_rng(0)
SPREAD = RNG.normal(size=(D, D))
CENTERS = RNG.normal(size=(CLASSES, D)) * 6


def drawn(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features [count, D] of three Gaussian classes with one covariance, and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    return CENTERS[labels] + rng.normal(size=(count, D)) @ SPREAD + 100, labels


@pytest.fixture(scope="module")
def fitted() -> MahalanobisOOD:
    found = fit_ood(*drawn(600, 1), drawn(400, 2)[0])
    assert found is not None
    return found


def distances(strangers: MahalanobisOOD, features: np.ndarray) -> np.ndarray:
    return strangers(torch.from_numpy(features)).numpy()


def test_the_distance_is_mahalanobis_of_the_nearest_class(fitted):
    """By its definition, sqrt((x - m)' S^-1 (x - m)), over the 95th percentile of it on validation images."""
    features, labels = drawn(600, 1)
    means = [features[labels == label].mean(0) for label in range(CLASSES)]
    covariance = (
        LedoitWolf(assume_centered=True).fit(features - np.stack(means)[labels]).covariance_
    )

    def nearest(x: np.ndarray) -> np.ndarray:
        return np.array(
            [min(np.sqrt((v - m) @ np.linalg.solve(covariance, v - m)) for m in means) for v in x]
        )

    threshold = np.quantile(nearest(drawn(400, 2)[0]), 0.95)
    others = drawn(50, 3)[0] + np.linspace(0, 20, 50)[:, None]
    np.testing.assert_allclose(distances(fitted, others), nearest(others) / threshold, rtol=1e-4)


def test_a_twentieth_of_validation_is_refused_and_what_lies_elsewhere(fitted):
    assert (distances(fitted, drawn(400, 2)[0]) > 1).sum() == 20
    # new ones of the same kind: binomial(2000, 0.05) exceeds 0.075 in fewer than 1 of 10⁵ cases, and the 400 add theirs
    assert 0.03 < (distances(fitted, drawn(2000, 4)[0]) > 1).mean() < 0.08
    assert (distances(fitted, drawn(200, 5)[0][:, ::-1].copy()) > 1).mean() > 0.9


def test_a_distance_does_not_depend_on_the_batch(fitted):
    features = drawn(9, 6)[0]
    alone = [float(distances(fitted, features[row : row + 1])[0]) for row in range(9)]
    np.testing.assert_allclose(distances(fitted, features), alone, rtol=1e-5)


def test_classes_without_images_are_left_out():
    features, labels = drawn(300, 1)
    found = fit_ood(features, np.where(labels == 2, 7, labels), drawn(100, 2)[0])
    assert found.centers.shape == (CLASSES, D)


@pytest.mark.parametrize("what", ["few", "NaN", "alike"])
def test_what_can_not_be_known_is_not_said(what):
    (features, labels), validation = drawn(100, 1), drawn(40, 2)[0]
    if what == "few":
        validation = validation[:19]
    elif what == "NaN":
        features[3, 2] = np.nan
    else:
        features[:], validation[:] = 1, 1
    assert fit_ood(features, labels, validation) is None


# --- beside the weights of a model


def model(tmp_path: Path) -> SavedModel:
    """A saved and loaded model of 32 px with distances of random images, the threshold that of others."""
    torch.manual_seed(0)
    net = timm.create_model("test_vit_moe", num_classes=2).eval()
    images = torch.randn(100, 3, 32, 32)
    with torch.no_grad():
        features = pooled(net, images).double().numpy()
    strangers = fit_ood(features[:60], np.arange(60) % 2, features[60:])
    saved = SavedModel(net, ["cat", "dog"], 32, (0.5,) * 3, (0.5,) * 3, strangers=strangers)
    save_model(saved, tmp_path)
    return saved


def test_distances_travel_with_the_model(tmp_path):
    """`answers` has the model's own logits, before and after; to timm the folder is as any other."""
    saved = model(tmp_path)
    back, images = (
        load_model(str(tmp_path)),
        noise_images(5, seed=1),
    )
    with torch.no_grad():
        for one in (saved, back):
            logits, distance = answers(one.net, one.strangers, images)
            assert torch.equal(logits, saved.net(images))
            assert torch.equal(distance, saved.strangers(pooled(saved.net, images)))
    assert back.net.state_dict().keys() == saved.net.state_dict().keys()
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).num_classes == 2
    save_model(
        replace(saved, strangers=None), tmp_path
    )  # what lies there of another model isn't this one's
    assert load_model(str(tmp_path)).strangers is None


def changed(tmp_path: Path, **tensors: torch.Tensor | None) -> None:
    stored = {**load_file(tmp_path / FILE), **tensors}
    save_file({name: each for name, each in stored.items() if each is not None}, tmp_path / FILE)


HOSTILE = {
    "narrower": lambda path: changed(path, mean=torch.zeros(3)),
    "another width": lambda path: changed(path, **{n: torch.zeros(s) for n, s in
        {"mean": (8,), "whitening": (8, 8), "centers": (2, 8)}.items()}),
    "more classes than the model has": lambda path: changed(path, centers=torch.zeros(3, 32)),
    "no class": lambda path: changed(path, centers=torch.zeros(0, 32)),
    "NaN": lambda path: changed(path, mean=torch.full((32,), torch.nan)),
    "whole numbers": lambda path: changed(path, mean=torch.zeros(32, dtype=torch.int32)),
    "one tensor less": lambda path: changed(path, mean=None),
    "one tensor more": lambda path: changed(path, more=torch.zeros(1)),
    "a scalar": lambda path: changed(path, centers=torch.tensor(1.0)),
    "rubbish": lambda path: (path / FILE).write_bytes(b"x" * 99),
    "missing": lambda path: (path / FILE).unlink(),
    "a folder": lambda path: ((path / FILE).unlink(), (path / FILE).mkdir()),
}  # fmt: skip


@pytest.mark.whole
@pytest.mark.parametrize("damage", HOSTILE.values(), ids=HOSTILE)
def test_hostile_numbers_end_in_one_sentence(damage, tmp_path):
    model(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=FILE) as told:
        load_model(str(tmp_path))
    assert "\n" not in str(told.value)
