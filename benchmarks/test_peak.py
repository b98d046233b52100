"""The measured peak: what it is made of, and what it refuses."""

import time

import pytest
import torch

from benchmarks.peak import matmul_peak


def median_s(work):
    """Seconds that it takes, by hand."""
    times = []
    for _ in range(9):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[4]


def agree(measured, by_hand):
    """Whether two rates are within ten times of each other, in one of ten tries: a busy machine may halt either."""
    return any(0.1 < measured() / by_hand() < 10 for _ in range(10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_a_rate_that_a_product_has(dtype):
    """A product timed by hand is not ten times faster or slower."""
    a = torch.randn(256, 256).to(dtype)
    assert agree(
        lambda: matmul_peak("cpu", dtype, sizes=(64, 256), seconds=0.1),
        lambda: 2 * 256**3 / median_s(lambda: torch.mm(a, a)),
    )


def test_the_best_size_wins(monkeypatch):
    """Times of 8, 2 and 64 s for sizes 2, 4 and 8 are 2, 64 and 16 FLOPs per second."""
    seconds = {2: 8.0, 4: 2.0, 8: 64.0}
    monkeypatch.setattr("benchmarks.peak._median_s", lambda _, names, __: seconds[len(names["a"])])
    assert matmul_peak("cpu", sizes=(2, 4, 8), seconds=100) == 64.0


def test_a_size_that_would_take_long_is_left_out(monkeypatch):
    """At 16 FLOPs in 8 s, 128 FLOPs take 64 s: more than twice 30 s, less than twice 32 s."""
    tried = []

    def slow(_, names, __):
        tried.append(len(names["a"]))
        return 8.0 * (len(names["a"]) / 2) ** 3

    monkeypatch.setattr("benchmarks.peak._median_s", slow)
    assert matmul_peak("cpu", sizes=(4, 2), seconds=30) == 2.0
    assert tried == [2]
    matmul_peak("cpu", sizes=(4, 2), seconds=32)
    assert tried == [2, 2, 4]
