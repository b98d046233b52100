"""The measure of images unlike the training data: false alarms, what it notices, and that its numbers travel."""

import numpy as np
import pytest

from moevision.data import SyntheticPets
from moevision.demo.examples import Typical, picture_statistics, typical_of
from moevision.demo.facts import model_input
from moevision.errors import UserError


def drawn(count, split, size=64, seed=0):
    pets = SyntheticPets(count, size, seed, split)
    return [pets.image(index) for index in range(count)]


@pytest.fixture(scope="module")
def typical():
    return typical_of(drawn(600, "val"), 64)


def share_unlike(typical, pictures):
    return np.mean([typical.unlike(picture) is not None for picture in pictures])


@pytest.mark.deep
def test_new_pictures_of_the_same_kind_are_rarely_unlike(typical):
    # 1 % of the images that set the threshold by design; binomial(400, 0.04) exceeds 0.065 in 1 of 100 cases
    assert share_unlike(typical, drawn(400, "test", seed=7)) <= 0.04


def test_noise_flat_colours_stripes_and_photos_are_unlike(typical):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (64, 64, 3)).astype(np.uint8) for _ in range(20)]
    flat = [np.full((64, 64, 3), rng.integers(0, 256, 3), np.uint8) for _ in range(20)]
    stripes = [np.tile(np.where(np.arange(64) % 8 < 4, 0, 255).astype(np.uint8)[:, None, None], (1, 64, 3))]
    assert share_unlike(typical, [*noise, *flat, *stripes]) == 1
    from moevision.demo.examples import photo_files

    photos = [model_input(file, 64) for file in photo_files().values()]
    assert share_unlike(typical, photos) >= 0.75


def test_statistics_by_hand():
    flat = picture_statistics(np.full((32, 32, 3), 51, np.uint8))  # 51 / 255 = 0.2
    assert flat[:3] == pytest.approx([0.2] * 3)
    assert flat[3:7] == pytest.approx([np.log(0.01)] * 4)  # no spread of any channel, no saturation
    assert flat[7:13] == pytest.approx([np.log(2e-3)] * 6)  # no edge anywhere
    assert flat[13] == 0  # equally few in all cells
    assert len(flat) == 7 + 3 * 7
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, 16:] = 255
    # one column of 31 differences to the right is 1, and none downwards: 32 of 2 * 31 * 32 edges, 1.6 %
    assert picture_statistics(half)[12] == pytest.approx(np.log(2e-3))  # so the 98 % quantile doesn't see it
    assert picture_statistics(half)[3:6] == pytest.approx([np.log(0.5 + 0.01)] * 3)


def test_the_distance_is_mahalanobis(typical):
    # whitening makes the fitted half uncorrelated with unit variance, up to the hundredth added to each variance
    fitted = np.stack([picture_statistics(picture) for picture in drawn(600, "val")[::2]])
    white = (fitted - typical.mean) @ typical.whitening.T
    assert white.mean(0) == pytest.approx(0, abs=1e-9)
    assert np.var(white, axis=0).max() <= 1
    picture = drawn(1, "test")[0]
    assert typical.distance(picture) == pytest.approx(
        ((typical.whitening @ (picture_statistics(picture) - typical.mean)) ** 2).sum()
    )


def test_numbers_travel_as_json(typical):
    again = Typical.from_json(typical.to_json())
    for picture in drawn(20, "test"):
        assert again.distance(picture) == pytest.approx(typical.distance(picture), rel=1e-3)


def test_what_is_typical_needs_enough_pictures_of_the_right_size():
    measured = typical_of(drawn(200, "val", 32), 32)
    assert (measured.image_size, measured.n_images) == (32, 200)
    with pytest.raises(UserError, match="At least 200"):
        typical_of(drawn(199, "val", 32), 32)
    with pytest.raises(UserError, match="32 px"):
        typical_of(drawn(200, "val", 64), 32)


def test_every_picture_the_same_is_no_division_by_zero():
    grey = np.full((32, 32, 3), 128, np.uint8)
    typical = typical_of([grey] * 200, 32)
    assert typical.unlike(grey) is None
    assert typical.unlike(drawn(1, "test", 32)[0]) is not None
