"""SyntheticPets: reproducible, balanced, masks that fit, and no way to the class but by looking at shapes."""

import hashlib
import os
import pickle
import subprocess
import sys
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

from moevision.data.synthetic import SyntheticPets

CHANCE = 1 / 8
PART = {name: value for value, name in enumerate(SyntheticPets.parts)}
HEAD = [PART[name] for name in ("fur", "ear", "eye", "nose", "muzzle", "mouth")]


def fingerprint(indices: range) -> str:
    pets = SyntheticPets(1000, seed=7)
    drawn = b"".join(pets.image(i).tobytes() + pets.part_mask(i).tobytes() for i in indices)
    return hashlib.sha256(drawn).hexdigest()


@pytest.fixture(scope="module")
def masks() -> npt.NDArray[np.uint8]:
    """Part masks [400, 64, 64]; mask i has label i mod 8."""
    pets = SyntheticPets(400, seed=3)
    return np.stack([pets.part_mask(i) for i in range(400)])


@pytest.fixture(scope="module")
def train() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    return drawn(SyntheticPets(2000))


@pytest.fixture(scope="module")
def held_out() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    return drawn(SyntheticPets(1000, split="test"))


def drawn(pets: SyntheticPets) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    images = np.stack([pets.image(i) for i in range(len(pets))]).astype(np.float32)
    return images, np.array([pets.label(i) for i in range(len(pets))])


def test_access_order_set_size_and_instance_do_not_matter():
    one, other = SyntheticPets(100), SyntheticPets(5000)
    forward = [one.image(i) for i in range(20)]
    for i in reversed(range(20)):
        np.testing.assert_array_equal(other.image(i), forward[i])
        np.testing.assert_array_equal(other.part_mask(i), one.part_mask(i))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(one)).image(3), forward[3])


@pytest.mark.deep
def test_another_process_draws_the_same_pictures():
    code = "from test_synthetic import fingerprint; print(fingerprint(range(5, 15)))"
    paths = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "123"}
    there = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == fingerprint(range(5, 15))


def test_seeds_splits_and_indices_give_different_pictures():
    sets = [
        SyntheticPets(16, seed=s, split=split) for s in (0, 1) for split in ("train", "val", "test")
    ]
    pictures = {pets.image(i).tobytes() for pets in sets for i in range(16)}
    assert len(pictures) == 6 * 16
    scenes = {pets.part_mask(i).tobytes() for pets in sets for i in range(16)}
    assert len(scenes) == 6 * 16  # not the noise alone differs


def test_interface():
    pets = SyntheticPets(21)
    assert len(pets) == 21
    image, label = pets[13]
    assert isinstance(image, Image.Image)
    assert image.mode == "RGB"
    assert image.size == (64, 64)
    np.testing.assert_array_equal(np.asarray(image), pets.image(13))
    assert label == pets.label(13) == 5
    np.testing.assert_array_equal(pets.image(-1), pets.image(20))
    for outside in (21, -22):
        with pytest.raises(IndexError, match="outside of a set of 21"):
            pets.image(outside)
    assert len([label for _, label in pets]) == 21  # type: ignore[attr-defined]  # by __getitem__


def test_classes_are_balanced():
    assert len(SyntheticPets.classes) == len(set(SyntheticPets.classes)) == 8
    assert {"cat", "dog"} <= set(SyntheticPets.classes)
    pets = SyntheticPets(803)
    counts = Counter(pets.label(i) for i in range(803))
    assert sorted(counts) == list(range(8))
    assert max(counts.values()) - min(counts.values()) == 1


@pytest.mark.parametrize("image_size", [32, 64, 96])
def test_image_sizes(image_size):
    pets = SyntheticPets(8, image_size)
    for i in range(8):
        image, mask = pets.image(i), pets.part_mask(i)
        assert image.dtype == mask.dtype == np.uint8
        assert image.shape == (image_size, image_size, 3)
        assert mask.shape == (image_size, image_size)
        assert mask.max() < len(pets.parts)
        assert image.std() > 10


def test_the_scene_is_the_same_at_every_size():
    # The middle of pixel (i, j) of 32 x 32 is the middle of pixel (3i + 1, 3j + 1) of 96 x 96.
    small, large = SyntheticPets(40, 32), SyntheticPets(40, 96)
    same = [np.mean(small.part_mask(i) == large.part_mask(i)[1::3, 1::3]) for i in range(40)]
    assert np.mean(same) > 0.96  # thin outlines may fall to either side


def test_mask_fits_the_picture():
    """Parts end where the image changes: the step across mask borders shrinks when the mask is moved."""

    def border_step(mask: npt.NDArray[np.uint8], grey: npt.NDArray[np.floating]) -> float:
        border = mask[:, 1:] != mask[:, :-1]
        return float(np.abs(np.diff(grey, axis=1))[border].mean())

    pets = SyntheticPets(80)
    fitted, moved = [], []
    for i in range(80):
        grey, mask = pets.image(i).mean(axis=2), pets.part_mask(i)
        fitted.append(border_step(mask, grey))
        moved.append(
            np.mean([border_step(np.roll(mask, shift, axis=1), grey) for shift in (-4, 4)])
        )
    assert np.mean(fitted) > 1.8 * np.mean(moved)
    assert np.mean(np.array(fitted) > moved) > 0.95


def test_named_parts_look_as_named():
    pets = SyntheticPets(160)
    darker_pupils = whiter_whiskers = with_whiskers = 0
    for i in range(160):
        grey, mask = pets.image(i).mean(axis=2), pets.part_mask(i)
        fur = grey[mask == PART["fur"]]
        darker_pupils += np.quantile(grey[mask == PART["eye"]], 0.1) < 0.7 * fur.mean()
        whiskers = grey[mask == PART["whisker"]]
        if len(whiskers) > 10:
            with_whiskers += 1
            whiter_whiskers += whiskers.mean() > fur.mean()
    assert darker_pupils > 0.85 * 160
    assert with_whiskers > 20
    assert whiter_whiskers > 0.85 * with_whiskers


def test_every_animal_has_its_parts_and_only_those(masks):
    for label, name in enumerate(SyntheticPets.classes):
        seen = {part for part, value in PART.items() if (masks[label::8] == value).any()}
        expected = set(PART)
        if name not in ("cat", "mouse"):
            expected.remove("whisker")
        if name == "owl":
            expected -= {"muzzle", "mouth"}
        if name in ("mouse", "fox"):
            expected.remove("mouth")
        assert seen == expected, name


def test_the_head_is_large_and_never_hidden(masks):
    for i, mask in enumerate(masks):
        rows, columns = np.nonzero(np.isin(mask, HEAD))
        extent = max(np.ptp(rows), np.ptp(columns)) + 1
        assert 0.45 * 64 < extent <= 64, i
        visible = [
            part for part in ("ear", "eye", "nose", "muzzle") if np.sum(mask == PART[part]) >= 4
        ]
        assert len(visible) >= 2, (i, visible)
    hidden = np.mean(masks == PART["occluder"], axis=(1, 2))
    assert 0.3 < np.mean(hidden > 0.005) < 0.9  # occlusion is common
    assert hidden.max() < 0.2  # and partial


@pytest.mark.deep
def test_colour_statistics_do_not_give_the_class_away(train, held_out):
    def colours(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return np.concatenate([images.mean(axis=(1, 2)), images.std(axis=(1, 2))], axis=1)

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    model.fit(colours(train[0]), train[1])
    assert model.score(colours(held_out[0]), held_out[1]) < 2 * CHANCE


@pytest.mark.deep
def test_raw_pixels_do_not_give_the_class_away(train, held_out):
    # C = 1e-3 is about the best of 1e-5 ... 1: the strongest linear classifier is the one that has to fail.
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=2000))
    seen, unseen = train[0].reshape(len(train[0]), -1), held_out[0].reshape(len(held_out[0]), -1)
    model.fit(seen, train[1])
    assert model.score(seen, train[1]) > 0.6  # it did learn
    assert model.score(unseen, held_out[1]) < 0.5
