"""Colours and counts of the figures: numbers worked out by hand, published values, and sums that must come out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moevision.analysis.describe import (
    co_activation,
    expected_co_activation,
    gate_weight_quantiles,
    majority_part,
    part_expert_table,
    part_fractions,
    part_stands_out,
    position_share,
)
from moevision.analysis.plots import (
    EXPERT_COLOURS,
    HIGHLIGHT,
    NEUTRAL,
    expert_colour,
    expert_colours,
    ink_on,
)


def test_the_palette_is_okabe_and_itos_with_grey_for_black() -> None:
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


@pytest.mark.parametrize(
    ("one", "other", "ratio"),
    [
        ("#000000", "#FFFFFF", 21.0),
        ("#123456", "#123456", 1.0),
        ("#FFFFFF", "#767676", 4.54),  # the lightest grey that WCAG AA allows for text on white
        ("#FFFFFF", "#FF0000", 4.00),  # 1.05 / (0.2126 + 0.05)
    ],
)
def test_contrast_is_wcags(one: str, other: str, ratio: float) -> None:
    assert contrast(one, other) == pytest.approx(ratio, abs=0.005)
    assert contrast(other, one) == contrast(one, other)


@given(st.integers(0, 0xFFFFFF))
def test_the_ink_is_readable_on_any_colour(number: int) -> None:
    colour = f"#{number:06X}"
    # The two ratios multiply to 21 (1.05 / 0.05), so the better one is at least √21.
    assert contrast(ink_on(colour), colour) >= math.sqrt(21) - 2e-3


def test_up_to_eight_experts_have_colours_and_more_have_numbers_on_grey() -> None:
    assert expert_colours(8) == list(EXPERT_COLOURS)
    assert expert_colours(2) == list(EXPERT_COLOURS[:2])
    assert set(expert_colours(9)) == {NEUTRAL}


def test_one_expert_of_many_is_highlighted() -> None:
    assert [expert_colour(e, 64, highlight=e == 5) for e in (4, 5, 6)] == [NEUTRAL, HIGHLIGHT, NEUTRAL]
    assert expert_colour(1, 3, highlight=True) == EXPERT_COLOURS[1]


# Two images of two patches, three choices of four experts.
CHOICES = np.array([[[0, 1, 2], [0, 1, 3]], [[3, 1, 0], [2, 0, 1]]], dtype=np.int16)


def test_co_activation_counts_all_pairs() -> None:
    # By hand. The four sets are {0,1,2}, {0,1,3}, {0,1,3}, {0,1,2}. Rank neighbours alone would miss (0, 2) of the
    # first set, whose ranks are 1 and 3.
    expected = [[4, 4, 2, 2], [4, 4, 2, 2], [2, 2, 2, 0], [2, 2, 0, 2]]
    np.testing.assert_array_equal(co_activation(CHOICES, 4), expected)


@given(st.integers(2, 7), st.integers(1, 4), st.integers(0, 1000))
def test_co_activation_adds_up(experts: int, choices: int, seed: int) -> None:
    choices = min(choices, experts)
    rng = np.random.default_rng(seed)
    index = rng.random((3, 5, experts)).argsort(-1)[..., :choices]
    counts = co_activation(index, experts)
    np.testing.assert_array_equal(counts, counts.T)
    # Each patch that chose an expert chose K - 1 others beside it.
    np.testing.assert_array_equal(counts.sum(1), choices * np.diagonal(counts))
    listed = sum(
        (tuple(sorted(pair)) == (0, 1)) for p in index.reshape(-1, choices) for pair in itertools.combinations(p, 2)
    )
    assert counts[0, 1] == listed


def test_expected_co_activation_with_equal_loads() -> None:
    # 4 experts chosen 30 times each with k = 2: every one of the other three is the partner in 10.
    counts = np.array([[30, 30, 0, 0], [30, 30, 0, 0], [0, 0, 30, 30], [0, 0, 30, 30]])
    expected = np.full((4, 4), 10.0) + 20.0 * np.eye(4)
    np.testing.assert_allclose(expected_co_activation(counts), expected, rtol=1e-9)


def test_expected_co_activation_recovers_planted_independence() -> None:
    # N_ij = a_i a_j with a = (1, 2, 3, 4) · 5 has no preference in it, so it is its own expectation.
    planted = 25.0 * np.outer([1, 2, 3, 4], [1, 2, 3, 4])
    np.fill_diagonal(planted, 0)
    np.fill_diagonal(planted, planted.sum(1))
    np.testing.assert_allclose(expected_co_activation(planted.astype(np.int64)), planted, rtol=1e-6)


def test_expected_co_activation_of_an_unused_expert() -> None:
    expected = expected_co_activation(np.array([[6, 6, 0], [6, 6, 0], [0, 0, 0]]))
    np.testing.assert_allclose(expected, [[6, 6, 0], [6, 6, 0], [0, 0, 0]], atol=1e-6)


def test_position_share_by_hand() -> None:
    # Position 0 holds choices 0,1,2 and 3,1,0: six in all. Position 1 holds 0,1,3 and 2,0,1.
    expected = np.array([[2, 2], [2, 2], [1, 1], [1, 1]]) / 6
    np.testing.assert_allclose(position_share(CHOICES, 4), expected)
    first_only = position_share(CHOICES[:, :, :1], 4)
    np.testing.assert_allclose(first_only, np.array([[1, 1], [0, 0], [0, 1], [1, 0]]) / 2)


def test_gate_weight_quantiles_by_hand() -> None:
    weights = np.array([[[0.9, 0.1], [0.6, 0.4]], [[0.8, 0.2], [0.5, 0.3]]], dtype=np.float32)
    # First choices sorted: .5 .6 .8 .9, seconds: .1 .2 .3 .4; the median is the mean of the middle two.
    np.testing.assert_allclose(
        gate_weight_quantiles(weights, (0, 0.5, 1)), [[0.5, 0.1], [0.7, 0.25], [0.9, 0.4]], rtol=1e-6
    )


# An image of 4 x 4 pixels, a grid of 2 x 2 patches of 4 pixels, parts 0, 1 and 2.
MASK = np.array([[0, 0, 1, 1], [0, 0, 1, 0], [0, 1, 2, 2], [1, 0, 2, 2]], dtype=np.uint8)[None]
FRACTIONS = np.array([[[1, 0, 0], [0.25, 0.75, 0], [0.5, 0.5, 0], [0, 0, 1]]])


def test_part_fractions_by_hand() -> None:
    np.testing.assert_allclose(part_fractions(MASK, (2, 2), 3), FRACTIONS)
    np.testing.assert_array_equal(majority_part(FRACTIONS), [[0, 1, 0, 2]])  # the tie goes to the lower number


def test_part_fractions_of_a_wide_grid() -> None:
    # One row of two patches, each 4 high and 2 wide: the left half holds 6 zeros and 2 ones.
    np.testing.assert_allclose(part_fractions(MASK, (1, 2), 3)[0, 0], [0.75, 0.25, 0])


def test_part_expert_table_by_hand() -> None:
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


def test_a_part_stands_out_where_routing_goes_by_it() -> None:
    choices, fractions = masks_and_routing(0.5, 0)
    assert part_stands_out(choices, fractions, 2).all()


def test_a_part_does_not_stand_out_where_routing_goes_by_the_place_alone() -> None:
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
