"""What pixels say of an image, by hand and on planted damage; and near-duplicates: planted ones found, bounds kept."""

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from moevision.analysis.good_data import (
    MAX_CELL,
    class_doubt,
    image_measures,
    laplacian_variance,
    nearest_by_experts,
    nearest_by_features,
    nearest_by_hash,
    perceptual_hash,
    projection,
    whitened,
)
from moevision.data.synthetic import SyntheticPets

PETS = SyntheticPets(24, 64, 0, "train")


def pet(index: int) -> Image.Image:
    return Image.fromarray(PETS.image(index))


def test_the_laplacian_by_hand():
    """Of one bright pixel in 5 x 5: -4 at it, 1 at its four neighbours, mean 0, mean square 20/9 over 9."""
    luma = np.zeros((5, 5), np.float32)
    luma[2, 2] = 1
    assert laplacian_variance(luma) == pytest.approx(20 / 9)
    assert laplacian_variance(luma[:2]) == 0
    assert (
        laplacian_variance(np.outer(np.arange(6), np.ones(6)).astype(np.float32)) == 0
    )  # a ramp has no curvature


def test_what_is_measured_of_an_image():
    whole, blurred, dark, grey = (
        image_measures(image)
        for image in (
            pet(0),
            pet(0).filter(ImageFilter.GaussianBlur(4)),
            pet(0).point(lambda value: value // 8),
            pet(0).convert("L").convert("RGB"),
        )
    )
    assert (whole["width"], whole["height"], bool(whole["read"])) == (64, 64, True)
    assert blurred["sharpness"] < whole["sharpness"] / 5
    assert dark["brightness"] < whole["brightness"] / 6
    assert grey["colour"] == 0 < whole["colour"]
    tall = image_measures(
        Image.new("RGB", (300, 900), (0, 255, 0))
    )  # shrunk to 224 x 672; the size is the file's
    assert (tall["width"], tall["height"], bool(tall["has_hash"])) == (300, 900, False)
    assert tall["colour"] == 1
    assert tall["brightness"] == pytest.approx(150 / 255, abs=0.01)  # Rec. 601: 0.587 of green
    assert image_measures(Image.new("RGB", (1, 1))).shape == ()


def bits_between(first: Image.Image, second: Image.Image) -> int:
    hashes = [perceptual_hash(image.convert("L"))[0] for image in (first, second)]
    return int(np.bitwise_count(hashes[0] ^ hashes[1]))


def test_the_hash_outlives_recompression_and_resizing_only():
    file = io.BytesIO()
    pet(0).save(file, "JPEG", quality=30)
    copies = [
        Image.open(file),
        pet(0).resize((48, 48)),
        pet(0).convert("L"),
        pet(0).point(lambda value: value * 3 // 4),
    ]
    assert max(bits_between(pet(0), copy) for copy in copies) <= 8
    others = [bits_between(pet(0), pet(index)) for index in range(1, 24)]
    assert min(*others, bits_between(pet(0), ImageOps.mirror(pet(0)))) > 8


def test_planted_pairs_are_found_among_many_hashes():
    """50,000 random hashes, in which pairs of 200 differ in 0, 2 and 4 bits; pairs by chance in more than 10."""
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**64, 50_000, dtype=np.uint64)
    flips = {0: 0, 200: 2, 400: 4}
    for start, bits in flips.items():
        for place in range(start, start + 200):
            mask = sum(1 << int(bit) for bit in generator.choice(64, bits, replace=False))
            hashes[40_000 + place] = hashes[place] ^ np.uint64(mask)
    usable = np.ones(len(hashes), bool)
    usable[0] = False
    split = (np.arange(len(hashes)) >= 40_000).astype(np.int64)
    overall, across = nearest_by_hash(hashes, usable, split)
    for start, bits in flips.items():
        rows = np.arange(start, start + 200)[1 if start == 0 else 0 :]
        found = overall.other[rows] == rows + 40_000
        assert found.mean() >= (1.0 if bits == 0 else 0.95)
        assert set(overall.distance[rows[found]].tolist()) == {bits}
        assert (across.other[rows[found]] == rows[found] + 40_000).all()
    assert overall.other[0] == -1
    assert np.isfinite(overall.distance[600:40_000]).mean() < 0.001
    same = nearest_by_hash(np.zeros(1000, np.uint64), np.ones(1000, bool), np.zeros(1000, np.int64))
    assert (same[0].distance == 0).all()  # a folder of one image, however often
    assert (same[1].other == -1).all()


def test_features_find_a_pair_within_and_across_splits():
    """Classes are far apart and images within one near: whitened, a pair is told from two images of one class."""
    generator = np.random.default_rng(0)
    classes = generator.standard_normal((10, 32)) * 20
    features = classes[np.arange(300) % 10] + generator.standard_normal((300, 32))
    features[290] = features[0] + 0.05 * generator.standard_normal(32)
    features[5] = np.nan
    usable = ~np.isnan(features[:, 0])
    split = (np.arange(300) >= 200).astype(np.int64)
    white = whitened(np.nan_to_num(features), usable)
    overall, across = nearest_by_features(white, usable, split)
    for found in (overall, across):
        assert found.other[[0, 290]].tolist() == [290, 0]
        assert found.distance[0] < 0.05
    assert overall.other[5] == -1
    assert (split[across.other[usable]] != split[usable]).all()
    assert np.quantile(overall.distance[usable], 0.1) > 0.2
    assert np.linalg.norm(white, axis=1) == pytest.approx(usable.astype(float), abs=1e-5)
    for n in (3, 1):
        white = whitened(np.zeros((n, 2)), np.ones(n, bool))
        other = nearest_by_features(white, np.ones(n, bool), np.zeros(n, np.int64))[0].other
        assert (other != np.arange(n)).all()


def test_hashes_that_are_near_by_chance_need_features_that_agree():
    """Four pairs that differ in 4 or 8 bits, with features at a cosine of 1 or 0: near in 8 bits alone is no pair."""
    hashes = np.arange(4, dtype=np.uint64).repeat(2) * np.uint64(0x0F0F_0F0F_0F0F_0F0F)
    hashes[1::2] ^= np.array([0xF, 0xF, 0xFF, 0xFF], np.uint64)
    white = np.eye(8, dtype=np.float32)
    white[[1, 5]] = white[[0, 4]]
    usable, split = np.ones(8, bool), np.zeros(8, np.int64)
    assert nearest_by_hash(hashes, usable, split)[0].other.tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    assert nearest_by_hash(hashes, usable, split, white)[0].other.tolist() == [
        1,
        0,
        3,
        2,
        5,
        4,
        -1,
        -1,
    ]
    onto = projection(200)
    assert onto.T @ onto == pytest.approx(np.eye(64), abs=1e-5)


def test_images_that_the_experts_shared_out_alike_by_hand():
    """Of one class; images 0 and 1 differ in one layer of two: (1 + sqrt(.5 * 1)) / 2. Image 4 is of another class."""
    first = np.array([[1, 0], [1, 0], [0.5, 0.5], [np.nan, np.nan], [1, 0]], np.float32)
    second = np.array([[0.5, 0.5], [1, 0], [0, 1], [0, 1], [0.5, 0.5]], np.float32)
    found = nearest_by_experts([first, second], np.array([0, 0, 0, 0, 1]))
    assert found.other.tolist() == [1, 0, 0, -1, -1]
    zero_two = (0.5**0.5 + 0.5**0.5) / 2
    assert found.distance[:3] == pytest.approx(
        [1 - (1 + 0.5**0.5) / 2] * 2 + [1 - zero_two], abs=1e-6
    )


def test_many_images_are_compared_in_cells():
    """Beyond `MAX_CELL` images pairs are looked for in cells; planted ones lie together; memory is that of a cell."""
    generator = np.random.default_rng(0)
    features = generator.standard_normal((MAX_CELL + 500, 4)).astype(np.float16)
    features[:200] = features[-200:] * np.float16(1.001)
    tracemalloc.start()
    usable = np.ones(len(features), bool)
    overall, _ = nearest_by_features(
        whitened(features, usable), usable, np.zeros(len(features), np.int64)
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    found = overall.distance[:200] < 1e-3
    assert found.mean() > 0.98
    assert (
        peak < 4 * 4 * 1024 * MAX_CELL + 40e6
    )  # four blocks of 1024 rows of cosines, and the rest


def test_doubt_is_one_of_the_class_by_linear_discriminants():
    """Two classes of variance 1 at -1 and 1: -ln p(y | x) = ln(1 + exp(-2 x y))."""
    generator = np.random.default_rng(0)
    labels = np.arange(40_000) % 2
    x = generator.standard_normal((40_000, 1)) + (2 * labels[:, None] - 1)
    x[7] = np.nan
    found = class_doubt(x, labels)
    wanted = np.log1p(np.exp(-2 * x[:, 0] * (2 * labels - 1)))
    assert np.isnan(found[7])
    rest = np.arange(len(x)) != 7
    assert found[rest] == pytest.approx(wanted[rest], abs=0.12)
    assert np.isnan(class_doubt(x, np.zeros(40_000, np.int64))).all()
    shares = generator.dirichlet(np.ones(4), 100)  # add up to 1: one direction has no spread
    assert np.isfinite(class_doubt(shares, np.arange(100) % 3)).all()
