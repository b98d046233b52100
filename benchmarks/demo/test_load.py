"""A short version of `python -m benchmarks demo-load`: visitors at once get their own answers."""

import numpy as np
import pytest
import torch

from benchmarks.demo import load as demo_load
from moevision.demo.gate import Serving
from moevision.demo.server import Server
from moevision.demo.wire import encode_float32
from tests.demo.conftest import explorer, home  # noqa: F401  (fixtures)


@pytest.fixture(scope="module")
def server(explorer):
    """The explorer behind its web page, in a thread of this process."""
    with Server(explorer, Serving(public=True)) as server:
        yield server


def test_five_seconds_of_visitors(explorer, server):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tasks = demo_load.make_tasks(explorer, 60)
    finally:
        torch.set_num_threads(threads)
    assert {task.group for task in tasks} == {"new picture", "example", "what_if"}
    assert (
        len({str(task.truth) for task in tasks}) > 50
    )  # an answer that belongs to another question shows
    outcome = demo_load.load(server.url, tasks, visitors=16, seconds=5)
    found = outcome.summary(5)
    assert found["mixed_up"] == found["busy"] == found["error"] == 0
    assert found["answers"] >= 16
    assert found["latency"]["new picture"]["p95_ms"] < 30_000


def test_a_mixed_up_answer_would_be_seen(explorer, server):
    one, other = demo_load.make_tasks(explorer, 2)
    swapped = [demo_load.Task(one.group, one.name, one.request, other.truth)]
    outcome = demo_load.load(server.url, swapped, visitors=1, seconds=1)
    assert outcome.wrong["mixed_up"] == outcome.summary(1)["answers"] >= 1


def test_rounding_is_no_mixed_up_answer_and_another_number_is():
    """Other kernels and numbers of threads sum otherwise: 1e-5 of a number, or one step of a packed array."""
    rng = np.random.default_rng(0)
    values = rng.normal(0, 30, (4, 256))
    answer = {"probability": 0.1234, "scores": encode_float32(values)}
    rounded = {
        "probability": 0.1233,
        "scores": encode_float32(values * (1 + 1e-5 * rng.normal(size=values.shape))),
    }
    assert answer["scores"]["data"] != rounded["scores"]["data"]
    assert demo_load.alike(answer, rounded)
    values[2, 100] += 1
    assert not demo_load.alike(answer, {**answer, "scores": encode_float32(values)})
    assert not demo_load.alike(answer, {**answer, "scores": encode_float32(values[:2])})
    assert not demo_load.alike(answer, {**answer, "probability": 0.1244})
