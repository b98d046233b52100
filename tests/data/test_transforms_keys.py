"""Random numbers are functions of their key: those of many keys at once are those of each alone."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from moevision.data.transforms import hash_u64, hash_u64_array, seeded_torch, uniform


def splitmix64(*values: int) -> int:
    """In Python's integers, chained over the values."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state


def test_hash_is_splitmix64():
    # First output of SplitMix64 seeded with 0 and with 1234567 (published test vectors, e.g. Rosetta Code).
    assert hash_u64(0) == 0xE220A8397B1DCDAF
    assert hash_u64(1234567) == 6457827717110365317
    assert hash_u64(-3, 2**64 - 1, 5) == splitmix64(-3, 2**64 - 1, 5)


@given(
    seed=st.integers(-(2**70), 2**70), many=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6)
)
def test_the_hash_of_arrays_is_that_of_their_elements(seed, many):
    column, row = np.array(many, np.int64)[:, None], np.arange(3)[None, :]
    expected = [[splitmix64(seed, value, number) for number in range(3)] for value in many]
    assert hash_u64_array(seed, column, row).tolist() == expected


def test_uniform_by_hand():
    found = uniform(3, 7, np.array([4, 5]), np.array([10, 11]))
    expected = [
        [(splitmix64(7, a, b, number) >> 11) / 2**53 for number in range(3)]
        for a, b in ((4, 10), (5, 11))
    ]
    assert found.tolist() == expected


def test_no_number_reaches_one(monkeypatch):
    monkeypatch.setattr(
        "moevision.data.transforms.hash_u64_array", lambda *_: np.array([[0, 2**64 - 1]], np.uint64)
    )
    low, high = uniform(2, 0)[0]
    assert (low, high) == (0.0, 1 - 2.0**-53)
    assert all(np.floor(high * n) == n - 1 for n in range(1, 10_000))


@pytest.mark.parametrize("stream", [1, 3, 4, 5, 6])
def test_numbers_of_neighbouring_keys_are_uniform_and_independent(stream):
    """Keys that count up are the hardest case for a hash. The seeds are fixed, so a passing test passes for ever."""
    epoch, index = (grid.ravel() for grid in np.mgrid[:20, :2000])
    u = uniform(4, 0, stream, epoch, index)
    for column in u.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    by_epoch = u[:, 0].reshape(20, 2000)
    pairs = [
        *((u[:, a], u[:, b]) for a in range(4) for b in range(a)),  # numbers of one image
        (by_epoch[:, 1:].ravel(), by_epoch[:, :-1].ravel()),  # neighbours in an epoch
        (by_epoch[1:].ravel(), by_epoch[:-1].ravel()),  # one image in successive epochs
        (u[:, 0], uniform(1, 1, stream, epoch, index)[:, 0]),  # successive seeds
        (u[:, 0], uniform(1, 0, stream + 1, epoch, index)[:, 0]),  # successive streams
    ]
    for first, second in pairs:
        table, _, _ = np.histogram2d(first, second, bins=8, range=[[0, 1], [0, 1]])
        assert stats.chisquare(table.ravel()).pvalue > 1e-4


def test_the_generator_is_put_back_after_an_error():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with contextlib.suppress(RuntimeError), seeded_torch(7):
        torch.rand(1)
        raise RuntimeError
    assert torch.equal(torch.rand(1), expected)
