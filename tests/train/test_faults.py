"""The fault injector reads what it is told, refuses what has no place, and strikes where it says."""

from pathlib import Path

import pytest

from moevision.errors import UserError
from tests.train.faults import Fault, FaultInjector, parse_faults
from tests.train.guarded import Run, batches, tiny_task


def test_reading_faults() -> None:
    assert parse_faults(
        "nan_loss@7, inf_grad@9:expert3, spike@20x2.5,nan_weight@12:block3:expert1:rank1"
    ) == [
        Fault("nan_loss", 7),
        Fault("inf_grad", 9, expert=3),
        Fault("spike", 20, factor=2.5),
        Fault("nan_weight", 12, block=3, expert=1, rank=1),
    ]
    assert parse_faults("") == []


@pytest.mark.parametrize(
    "text", ["nan_loss", "nan_lost@3", "nan_loss@3:layer2", "spike@2x", "nan_loss@-1", "@3"]
)
def test_a_fault_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UserError, match="write KIND@N"):
        FaultInjector(text)


def test_batches_are_counted_from_one() -> None:
    with pytest.raises(UserError, match="counted from 1"):
        FaultInjector("nan_loss@0")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan_ema@1", "add WeightEMA"),
        ("inf_grad@1:block2", "no MoE layer in block 2"),
        ("nan_weight@1:expert4", "block 1 has no expert 4"),
    ],
)
def test_a_fault_without_a_place(fault: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        Run(tmp_path, batches(1), faults=fault, ema=False)


def test_a_model_without_saved_buffers(tmp_path: Path) -> None:
    task = tiny_task(stem="patch", router="vmoe_top_k")
    with pytest.raises(UserError, match="saves no buffer"):
        Run(tmp_path, batches(1), faults="nan_buffer@1", task=task)


def test_a_spike_is_a_factor_on_the_classifier(tmp_path: Path) -> None:
    """Struck before the first update, the head starts 50 times as large; with a learning rate of 0 it stays so."""
    before = tiny_task(lr=1e-12).net.head.weight.detach().clone()
    run = Run(tmp_path, batches(1), faults="spike@1x50", task=tiny_task(lr=1e-12), ema=False)
    assert run.task.net.head.weight.sub(before * 50).abs().max() < 1e-6
