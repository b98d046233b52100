"""Tier 1 of the stability guard: a refused update is one that never was, bit for bit."""

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from moevision.train import guard as guard_module
from moevision.train.guard import (
    Event,
    GuardConfig,
    GuardRecord,
    StabilityGuard,
    WindowNumbers,
    note_event,
)
from moevision.train.processes import callback_of
from tests.shared import missing, succeeded
from tests.train.guarded import BIASED, MUON, NOISY, Run, batches, standing_trainer, tiny_task

# name: (fault, which batches are left out with it, epochs, batches per epoch and per update, compared after so many
# applied updates, first seen in)
CASES: dict[str, tuple[str, list[int], int, int, int, int, str]] = {
    "first step": ("nan_input@1", [0], 1, 6, 1, 5, "router of block 1"),
    "loss": ("nan_loss@4", [3], 1, 6, 1, 5, "cross-entropy"),
    "one expert's gradient": (
        "inf_grad@3:expert3",
        [2],
        1,
        6,
        1,
        5,
        "blocks.1.mlp.experts.fc1.weight (expert 3)",
    ),
    "last step of an epoch": ("nan_router@4:block3", [3], 2, 4, 1, 7, "router of block 3"),
    "last step of all": ("nan_grad@6", [5], 1, 6, 1, 5, "gradient of head.weight"),
    "first of a window": ("nan_input@3", [2, 3], 1, 8, 2, 3, "router of block 1"),
    "last of a window": ("nan_loss@4", [2, 3], 1, 8, 2, 3, "cross-entropy"),
    # Windows [0 1] [2 3] [4], then [5 6] [7 8] [9]; the fifth update that is applied has one batch only.
    "a window that the epoch cuts short": ("nan_loss@5", [4], 2, 5, 2, 4, "cross-entropy"),
    "three faults": (
        "nan_loss@2, nan_input@3, inf_grad@5:block3",
        [1, 2, 4],
        1,
        9,
        1,
        6,
        "cross-entropy",
    ),
}


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Equal in every bit, through dictionaries and lists."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            assert_same(value, other[key], f"{where}/{key}")
    elif isinstance(one, Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


# A bias is moved beside the optimizer, and Muon has moments of its own; which batches are left out concerns neither.
OTHER_CASES = ("loss", "one expert's gradient", "a window that the epoch cuts short")


@pytest.mark.parametrize(
    ("case", "router"),
    [
        *(pytest.param(case, NOISY, id=f"{case}-noise") for case in CASES),
        *(pytest.param(case, BIASED, id=f"{case}-bias") for case in OTHER_CASES),
        *(pytest.param(case, MUON, id=f"{case}-Muon") for case in OTHER_CASES),
    ],
)
def test_a_refused_update_never_existed(case, router, tmp_path, capsys):
    """The run without those batches, which then has others at its end, is in the same state after as many updates.

    State: weights, BatchNorm statistics, router biases, moments, step counts, schedule, moving average, random
    generator; with router noise or a router bias, dropout, stochastic depth and the average on.
    """
    faults, left_out, epochs, per_epoch, window, after, source = CASES[case]
    number = len(faults.split(","))
    every = batches(epochs * per_epoch)
    updates = epochs * -(-per_epoch // window)
    options: dict[str, Any] = {"after": after, "accumulate_grad_batches": window}
    struck = Run(
        tmp_path, every, faults=faults, max_epochs=epochs, task=tiny_task(**router), **options
    )
    assert capsys.readouterr().err.count("update left out") == number
    assert (struck.record.skipped, struck.record.rollbacks) == (number, 0)
    assert sum(struck.injector.injected.values()) == number
    assert source in struck.record.events[0].source
    rest = [batch for index, batch in enumerate(every) if index not in left_out]
    filled = (rest + every)[
        : updates * window
    ]  # as many updates are planned, so the schedule is the same
    clean = Run(tmp_path, filled, task=tiny_task(**router), **options)
    assert clean.record.skipped == 0
    assert struck.states.applied == updates - number
    assert struck.states.state["net"]
    assert_same(struck.states.state, clean.states.state)


def test_every_refused_update_is_written_down(tmp_path):
    """guard.csv names the step, the source and the eight images of the batch; batch 3 holds the numbers 16 to 23."""
    Run(tmp_path, batches(4), faults="nan_loss@3")
    rows = (tmp_path / "guard.csv").read_text().splitlines()
    assert rows == [
        "step,epoch,kind,source,samples",
        "3,0,skip,cross-entropy,16 17 18 19 20 21 22 23",
    ]


def test_a_guard_that_does_nothing_changes_nothing(tmp_path):
    """Without a fault the run with the guard ends where the run without it ends."""
    watched, alone = (
        Run(tmp_path, batches(4), guard=guard, after=4)
        for guard in (GuardConfig(snapshot_every=2), None)
    )
    assert_same(watched.states.state, alone.states.state)


def test_thresholds_are_those_of_the_page():
    """benchmarks/guard: 10 losses above the mean by 6 standard deviations; a snapshot in 100 updates, two are kept."""
    config = GuardConfig()
    assert (config.spike_updates, config.spike_sigmas) == (10, 6.0)
    assert (config.snapshot_every, config.snapshots, config.max_skips, config.max_rollbacks) == (
        100,
        2,
        10,
        3,
    )


def test_the_command_line_says_what_was_left_out(cli, tiny, drawn_pets, tmp_path, strike):
    """Two updates of six (24 images in batches of 8, two epochs) are refused, and one return takes one back."""
    strike("nan_loss@1, nan_input@2, nan_weight@4")
    succeeded(cli("fit", drawn_pets, *tiny, "--runs_root", tmp_path, "--ema.decay=0.9"))
    run = tmp_path / "pets"
    summary = (run / "summary.md").read_text()
    assert not missing(summary, "- 2 updates left", "not finite", "- 1 return to")
    assert "moving average (EMA)" in summary
    assert [row.split(",")[2] for row in (run / "guard.csv").read_text().splitlines()] == [
        "kind",
        "skip",
        "skip",
        "rollback",
    ]
    last = (run / "metrics.csv").read_text().splitlines()
    names = last[0].split(",")
    rows = [dict(zip(names, row.split(","), strict=True)) for row in last[1:]]
    assert [row["guard/skipped"] for row in rows if row["guard/skipped"]][:4] == [
        "1.0",
        "2.0",
        "2.0",
        "2.0",
    ]


def test_the_guard_can_be_switched_off(cli, tiny, drawn_pets, tmp_path):
    options = (f"--runs_root={tmp_path}", "--guard.enabled=false", "--trainer.max_epochs=1")
    succeeded(cli("fit", drawn_pets, *tiny, *options))
    metrics = (tmp_path / "pets" / "metrics.csv").read_text()
    assert "guard/skipped" not in metrics
    assert "train/update_norm" in metrics


def test_what_the_summary_says_of_each_kind():
    record = GuardRecord()
    assert record.sentences() == []
    record.add(Event(7, 0, "skip", "loss"))
    updates, sources = record.sentences()
    assert not missing(updates, "1 update left", "not finite")
    assert "loss (1)" in sources
    record.add(Event(9, 0, "rollback", "loss spike"))
    assert record.sentences()[1].startswith("1 return to")


def test_a_thousand_events_are_kept_and_all_are_counted():
    record = GuardRecord()
    for step in range(1002):
        record.add(Event(step, 0, "skip", "loss"))
    assert (record.skipped, record.sources["loss"], len(record.events)) == (1002, 1002, 1000)


def test_the_terminal_hears_of_ten_events_and_each_names_256_images(tmp_path, capsys):
    record = GuardRecord()
    trainer = standing_trainer(tiny_task(), is_global_zero=True, default_root_dir=tmp_path)
    for _ in range(12):
        note_event(record, trainer, "skip", "loss", range(300))
    assert capsys.readouterr().err.count("step 4: update left") == 10
    assert [event.samples for event in record.events] == [tuple(map(str, range(256)))] * 12


# Losses of the two micro-batches, norm of their gradient, loss scale of fp16 (None: not fp16); skipped, or refused as
# an overflow that is no fault.
WINDOWS: dict[str, tuple[list[float], float, float | None, int, int]] = {
    "all is well": ([1.0, 2.0], 1.0, 1024.0, 0, 0),
    "one of two losses, and a gradient that doesn't show it": (
        [float("nan"), 1.0],
        1.0,
        None,
        1,
        0,
    ),
    "a loss is no matter of the scale": ([1.0, float("nan")], float("nan"), 1024.0, 1, 0),
    "a scale that is too large": ([1.0, 2.0], float("inf"), 1024.0, 0, 1),
    "a scale that can't be lowered": ([1.0, 2.0], float("inf"), 1.0, 1, 0),
    "a gradient without a scale": ([1.0, 2.0], float("inf"), None, 1, 0),
}


@pytest.mark.parametrize("window", WINDOWS)
def test_what_is_refused_and_what_it_counts_as(window, tmp_path):
    losses, norm, scale, skipped, overflows = WINDOWS[window]
    task, guard = tiny_task(), StabilityGuard()
    scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
    values = {"accumulate_grad_batches": 2, "precision_plugin": SimpleNamespace(scaler=scaler)}
    trainer = standing_trainer(task, default_root_dir=tmp_path, **values)
    guard.setup(trainer, task, "fit")
    for batch, loss in enumerate(losses):
        guard.on_train_batch_start(trainer, task, {"index": torch.tensor([batch])}, batch)
        task.evidence.append({"loss": torch.tensor(loss)})
    refused = task.update_gate(torch.tensor(norm))
    assert refused == bool(skipped or overflows)
    assert guard.record.skipped == skipped
    assert guard.record.not_applied == skipped + overflows
    assert sum(guard.state_dict()["recent"]) == skipped, "an overflow is no reason to return"
    assert [event.samples for event in guard.record.events] == [("0", "1")] * skipped


def test_snapshots_take_no_memory_after_the_training(tmp_path):
    kept = []

    class Kept(L.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            kept.append(len(callback_of(trainer, StabilityGuard).snapshots))  # type: ignore[union-attr]

    run = Run(tmp_path, batches(2), callbacks=(Kept(),))
    assert (kept, len(run.guard.snapshots)) == ([1], 0)


def test_the_loss_of_a_window_is_a_mean_over_processes(monkeypatch):
    """Two processes that have the same losses, and the same norm."""
    monkeypatch.setattr(guard_module, "sum_numbers", lambda numbers, _: [2 * n for n in numbers])
    losses = [{"loss": torch.tensor(loss)} for loss in (1.0, 2.0)]
    task: Any = SimpleNamespace(evidence=losses, device=None)
    trainer: Any = SimpleNamespace(world_size=2)
    assert WindowNumbers.of(trainer, task, torch.tensor(3.0)) == (True, True, 1.5)
