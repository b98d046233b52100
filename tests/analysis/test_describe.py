"""Colours and counts of the figures: numbers worked out by hand, published values, and sums that must come out."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moevision.analysis.describe import (
    class_expert_map,
    image_shares,
    layer_gallery,
    majority_part,
    part_expert_table,
    part_fractions,
    part_stands_out,
    random_patches,
    top_patches,
)
from moevision.analysis.plots import EXPERT_COLOURS, NEUTRAL, expert_colours, ink_on
from tests.analysis.conftest import trace_of


def test_the_palette_is_okabe_and_itos_with_grey_for_black():
    # Okabe & Ito, "Color Universal Design", 2008: RGB of seven of the eight colours; then the grey of Tol's "bright".
    published = [(187, 187, 187), (230, 159, 0), (86, 180, 233), (0, 158, 115)]
    published += [(240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)]
    assert sorted(EXPERT_COLOURS) == sorted("#{:02X}{:02X}{:02X}".format(*rgb) for rgb in published)


def contrast(one: str, other: str) -> float:
    """From 1 (equal) to 21 (black on white), as WCAG 2.2 defines it."""

    def luminance(colour: str) -> float:
        channels = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@given(st.integers(0, 0xFFFFFF))
@example(
    0x008904
)  # brighter than L = 0.179, which is rounded, and darker than where the two contrasts are equal
def test_the_ink_is_readable_on_any_colour(number):
    colour = f"#{number:06X}"
    # The two ratios multiply to 21 (1.05 / 0.05), so the better one is at least √21.
    assert contrast(ink_on(colour), colour) >= math.sqrt(21) - 1e-9


def test_up_to_eight_experts_have_colours_and_more_have_numbers_on_grey():
    assert expert_colours(8) == list(EXPERT_COLOURS)
    assert expert_colours(2) == list(EXPERT_COLOURS[:2])
    assert set(expert_colours(9)) == {NEUTRAL}


# An image of 4 x 4 pixels, a grid of 2 x 2 patches of 4 pixels, parts 0, 1 and 2.
MASK = np.array([[0, 0, 1, 1], [0, 0, 1, 0], [0, 1, 2, 2], [1, 0, 2, 2]], dtype=np.uint8)[None]
FRACTIONS = np.array([[[1, 0, 0], [0.25, 0.75, 0], [0.5, 0.5, 0], [0, 0, 1]]])


def test_part_fractions_by_hand():
    np.testing.assert_allclose(part_fractions(MASK, (2, 2), 3), FRACTIONS)
    # One row of two patches, each 4 high and 2 wide: the left half holds 6 zeros and 2 ones.
    np.testing.assert_allclose(part_fractions(MASK, (1, 2), 3)[0, 0], [0.75, 0.25, 0])
    np.testing.assert_array_equal(
        majority_part(FRACTIONS), [[0, 1, 0, 2]]
    )  # the tie goes to the lower number


def test_part_expert_table_by_hand():
    choices = np.array([[[0, 1], [1, 0], [1, 2], [2, 1]]])
    # Part 0 has area 1 + 1/4 + 1/2: half of each patch's share goes to either choice.
    expected = np.array([
        [0.5 + 0.125, 0.5 + 0.125 + 0.25, 0.25],
        [0.375, 0.375 + 0.25, 0.25],
        [0, 0.5, 0.5],
    ])  # fmt: skip
    table = part_expert_table(choices, FRACTIONS, 3)
    np.testing.assert_allclose(table, expected)
    assert table.sum() == pytest.approx(4)  # patches
    np.testing.assert_allclose(table.sum(1), [1.75, 1.25, 1.0])  # area of each part


def masks_and_routing(follow: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """40 images of 16 patches and 2 parts: part 1 lies left more often, and the left goes to expert 1.

    `follow` is the probability that a patch goes by its part and not by its side.
    """
    rng = np.random.default_rng(seed)
    left = np.tile(np.repeat([1, 0], 8), (40, 1))  # [I, P]
    part = np.where(rng.random((40, 16)) < 0.8, left, 1 - left)
    expert = np.where(rng.random((40, 16)) < follow, part, left)
    return expert[..., None], np.stack([part == 0, part == 1], -1).astype(np.float64)


def test_a_part_stands_out_where_routing_goes_by_it():
    choices, fractions = masks_and_routing(0.5, 0)
    assert part_stands_out(choices, fractions, 2).all()


def test_a_part_does_not_stand_out_where_routing_goes_by_the_place_alone():
    """Expert 1 gets 80 % of part 1 and half of everything, and yet knows nothing of parts."""
    found = []
    for seed in range(40):
        choices, fractions = masks_and_routing(0.0, seed)
        table = part_expert_table(choices, fractions, 2)
        assert table[1, 1] / table[1].sum() > 0.7
        found.append(part_stands_out(choices, fractions, 2, num_permutations=100).any())
    # No mask moves a share here: routing is the same in every image.
    assert not any(found)
    shuffled = 0
    for seed in range(40):
        _, fractions = masks_and_routing(0.0, seed)
        choices = np.random.default_rng(1000 + seed).integers(0, 2, (40, 16, 1))
        shuffled += part_stands_out(choices, fractions, 2, num_permutations=100).any()
    assert shuffled <= 6  # 5 % of 40 tables are 2; more than 6 come by chance once in 300 times


# ---- class x expert maps: false discoveries under the null, planted effects found


def images_with_own_shares(rng, labels, lean=0.0, experts=6, patches=16):
    """[I, P, 1] choices: every image prefers experts of its own; class 0 leans to expert 2."""
    shares = rng.dirichlet(np.full(experts, 0.5), size=len(labels))
    shares[labels == 0] = (1 - lean) * shares[labels == 0] + lean * np.eye(experts)[2]
    return (rng.random((len(labels), patches, 1)) > shares.cumsum(1)[:, None, :-1]).sum(-1)[
        ..., None
    ]


def test_shares_by_hand(make_trace):
    chosen = np.array([[0, 0, 1, 2], [0, 0, 0, 0], [1, 1, 1, 1]])[..., None]
    trace = make_trace(chosen, labels=[0, 0, 1], num_experts=3, grid=(2, 2))
    found = class_expert_map(trace, 1)
    np.testing.assert_allclose(found.share, [[0.75, 0.125, 0.125], [0, 1, 0]])
    np.testing.assert_allclose(found.mean_share, [1 / 2, 5 / 12, 1 / 12])
    np.testing.assert_allclose(found.excess, found.share - found.mean_share)
    assert found.n_images.tolist() == [2, 1]
    # An image may take little in sum: experts that nobody wants have small gates.
    takes = np.array([[0, 0], [3, 1], [0.1, 0.3]])
    np.testing.assert_allclose(image_shares(takes), [[0.5, 0.5], [0.75, 0.25], [0.25, 0.75]])


def test_maps_without_a_pattern_show_a_cell_in_one_of_twenty(make_trace):
    labels = np.arange(80) % 5
    false, largest_cells_above = 0, 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        trace = make_trace(
            images_with_own_shares(rng, labels), labels=labels, num_experts=6, grid=(4, 4)
        )
        found = class_expert_map(trace, 1, num_permutations=200, seed=seed)
        false += found.significant.any()
        largest_cells_above += np.abs(found.excess).max() > np.quantile(np.abs(found.excess), 0.95)
    assert false <= 0.08 * 200  # family-wise, over all 30 cells
    assert (
        largest_cells_above == 200
    )  # a threshold for single cells would colour one in nearly every map


def test_a_planted_preference_is_the_cell_that_stands_out(make_trace):
    labels = np.arange(200) % 5
    chosen = images_with_own_shares(np.random.default_rng(0), labels, lean=0.5)
    found = class_expert_map(make_trace(chosen, labels=labels, num_experts=6, grid=(4, 4)), 1)
    assert found.significant[0, 2]
    assert np.unravel_index(found.excess.argmax(), found.excess.shape) == (0, 2)
    assert (found.significant == (found.p_value < 0.05)).mean() > 0.95


def test_a_class_without_pictures_is_null_in_json(make_trace):
    trace = make_trace(
        np.zeros((4, 4, 1), int),
        labels=[0, 2, 2, 0],
        num_experts=2,
        grid=(2, 2),
        class_names=("cat", "dog", "owl"),
    )
    written = json.loads(json.dumps(class_expert_map(trace, 1).to_json(), allow_nan=False))
    assert written["share"] == [[1, 0], [None, None], [1, 0]]
    assert (
        written["significant"] == [[False, False]] * 3
    )  # all the same: nothing stands out, and nothing is divided by 0


# ---- the gallery: against a brute-force reading of the definition

IMAGES, PATCHES, EXPERTS, CHOICES = 30, 6, 4, 2


def a_layer(expert_index, weight, kept=None, layer=1):
    expert_index = np.asarray(expert_index)
    trace = trace_of(
        expert_index,
        labels=np.zeros(len(expert_index)),
        num_experts=EXPERTS,
        grid=(1, expert_index.shape[1]),
    )
    kept = trace.layers[0].kept if kept is None else np.asarray(kept)
    weight = np.asarray(weight, np.float32)
    return replace(trace.layers[0], layer=layer, kept=kept, combine_weight=weight)


def random_layer(seed, layer=1):
    """Choices, weights and drops at random; weights rounded so that some are equal."""
    rng = np.random.default_rng(seed)
    index = rng.random((IMAGES, PATCHES, EXPERTS)).argsort(-1)[..., :CHOICES]
    weight = rng.random((IMAGES, PATCHES, CHOICES)).round(1)
    return a_layer(index, weight, rng.random(index.shape) < 0.8, layer)


def a_trace(*layers, labels):
    trace = trace_of(
        layers[0].expert_index,
        labels=labels,
        num_experts=EXPERTS,
        grid=(2, 3),
        class_names=("cat", "dog"),
    )
    return replace(trace, layers=layers)


def routed(layer, expert):
    """{(image, patch): weight} by three loops."""
    return {
        (i, p): float(layer.combine_weight[i, p, k])
        for i in range(IMAGES)
        for p in range(PATCHES)
        for k in range(CHOICES)
        if layer.expert_index[i, p, k] == expert and layer.kept[i, p, k]
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("expert", range(EXPERTS))
def test_top_patches_are_the_heaviest_of_each_picture(seed, expert):
    layer = random_layer(seed)
    best = {}
    for (image, patch), weight in routed(
        layer, expert
    ).items():  # in order, so that the first of equals stays
        if image not in best or weight > best[image][1]:
            best[image] = (patch, weight)
    expected = sorted(((-weight, image, patch) for image, (patch, weight) in best.items()))[:8]
    assert [(-top.weight, top.image, top.patch) for top in top_patches(layer, expert)] == [
        (pytest.approx(weight), image, patch) for weight, image, patch in expected
    ]


def test_a_dropped_choice_is_nobodys_patch():
    index, weight = np.zeros((2, 1, 1)), [[[0.9]], [[0.2]]]
    layer = a_layer(index, weight, kept=[[[False]], [[True]]])
    assert top_patches(layer, 0) == [(1, 0, pytest.approx(0.2))]
    assert random_patches(layer, 0) == [(1, 0, pytest.approx(0.2))]
    assert top_patches(layer, 1) == random_patches(layer, 1) == []


def test_random_patches_are_uniform_and_seeded():
    layer = random_layer(3)
    everything = routed(layer, 2)
    assert random_patches(layer, 2, seed=7) == random_patches(layer, 2, seed=7)
    drawn = [random_patches(layer, 2, count=8, seed=seed) for seed in range(2000)]
    for patches in drawn[:50]:
        assert len({(patch.image, patch.patch) for patch in patches}) == 8
        for patch in patches:
            assert everything[patch.image, patch.patch] == pytest.approx(patch.weight)
    counts = dict.fromkeys(everything, 0)
    for patches in drawn:
        for patch in patches:
            counts[patch.image, patch.patch] += 1
    # Each of N patches is drawn in 8/N of the galleries: binomial, so within 5 standard deviations of its mean.
    share = 8 / len(everything)
    assert np.abs(np.array(list(counts.values())) - 2000 * share).max() < 5 * np.sqrt(
        2000 * share * (1 - share)
    )


def test_an_expert_with_few_patches_has_a_short_gallery():
    layer = a_layer([[[0], [0], [1]], [[1], [1], [1]]], np.full((2, 3, 1), 0.5))
    gallery = layer_gallery(layer, count=8)
    assert [entry.expert for entry in gallery] == [0, 1, 2, 3]
    assert [len(entry.top) for entry in gallery] == [1, 2, 0, 0]  # one of each image
    assert [len(entry.random) for entry in gallery] == [2, 4, 0, 0]
