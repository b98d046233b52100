"""The guard over two processes: a fault on one of them alone, and both do the same about it."""

import re
from typing import Any

import pytest
import torch

from moevision.train.guard import GuardRecord
from tests.forks import run_script
from tests.train import guarded
from tests.train.guarded import SHARDED_CASES, TWO_PROCESS_CASES

pytestmark = pytest.mark.deep

# case: (skipped, rollbacks, updates that were taken back, where it came from)
EXPECTED = {
    "clean": (0, 0, 0, ""),
    "loss": (1, 0, 0, "cross-entropy"),
    "gradient": (1, 0, 0, "gradient of blocks.1.mlp.experts.fc1.weight (expert 2)"),
    "weight": (0, 1, 0, "weight of head.weight"),
    # DDP begins every step with the buffers of the first process: a bad one of another process is overwritten then.
    # A bias moves choices, not gates, so that the loss is finite: found where the next snapshot is due, after update 4;
    # the one before is of update 2.
    "buffer of the first": (0, 1, 2, "buffer of blocks.1.mlp.router.bias"),
    "buffer of another": (0, 0, 0, ""),
    "average": (0, 1, 2, "ema.weight of head.weight"),
    # Two losses in a row; back to the snapshot of update 6.
    "spike": (0, 1, 2, "loss spike: "),
}
EXPECTED |= {case: EXPECTED[case.split(", ")[1]] for case in SHARDED_CASES}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each of two processes had at the end of every case."""
    folder = tmp_path_factory.mktemp("guarded")
    run_script(guarded.__file__, folder)
    return {
        case: [torch.load(folder / f"{case}-{rank}.pt", weights_only=True) for rank in range(2)]
        for case in EXPECTED
    }


@pytest.mark.parametrize("case", EXPECTED)
def test_both_processes_decide_alike(case, two):
    """One process was struck; both count the same, and end finite with the same weights."""
    skipped, rollbacks, lost, source = EXPECTED[case]
    for state in two[case]:
        record = GuardRecord.from_state(state["record"])
        assert (record.skipped, record.rollbacks, record.lost) == (skipped, rollbacks, lost)
        assert len(record.events) == bool(source)
        assert all(event.source.startswith(source) for event in record.events)
        for network in (state["net"], state["average"]):
            assert network
            assert all(bool(tensor.isfinite().all()) for tensor in network.values())
    for network in ("net", "average"):
        first, second = (state[network] for state in two[case])
        for name, tensor in first.items():
            if (
                "running" not in name
            ):  # each process has BatchNorm statistics of its own; rank 0's are used
                assert torch.equal(tensor, second[name]), name
    struck = re.findall(r"rank(\d)", {**TWO_PROCESS_CASES, **SHARDED_CASES}[case])
    assert [sum(state["injected"].values()) for state in two[case]] == [
        struck.count("0"),
        struck.count("1"),
    ]


@pytest.mark.parametrize("case", ["clean", "EP 2, loss", "FSDP2, loss"])
def test_an_update_of_the_average_is_its_formula(case, two):
    """The average's own parts move by the weights' own parts: gathered, they are what whole tensors would give."""
    for state in two[case]:
        assert state["averaged"] < 1e-6


def test_a_bad_buffer_of_another_process_changes_nothing(two):
    for struck, clean in zip(two["buffer of another"], two["clean"], strict=True):
        assert all(
            torch.equal(tensor, struck["net"][name]) for name, tensor in clean["net"].items()
        )


def test_the_pictures_of_both_processes_are_named(two):
    """The third batch of process 0 is the fifth of all, images 32 to 39; process 1 had the sixth."""
    (event,) = GuardRecord.from_state(two["loss"][0]["record"]).events
    assert event.samples == tuple(str(number) for number in range(32, 48))
