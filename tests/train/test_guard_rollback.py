"""Tier 2 of the stability guard: back to the last good snapshot, forward with the data, and an end to it."""

from statistics import fmean, pstdev
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor

from moevision.config import EmaConfig
from moevision.train.guard import (
    GuardConfig,
    GuardRecord,
    LossHistory,
    StabilityGuard,
    TrainingDiverged,
    TrainingSnapshot,
)
from moevision.train.health import WeightEMA
from tests.shared import missing
from tests.train.guarded import BIASED, MUON, NOISY, Run, batches, standing_trainer, tiny_task
from tests.train.test_guard import assert_same

pytestmark = pytest.mark.deep

EVERY_4 = GuardConfig(snapshot_every=4)
ONE_SNAPSHOT = GuardConfig(snapshot_every=4, snapshots=1)
SPIKES = GuardConfig(snapshot_every=5, spike_warmup=10, spike_updates=5)

HEAD = "weight of head.weight"
# Batch 7 computes NaN: back to the snapshot after four updates, so 5 and 6 are taken back and 7 is left out.
FROM_7 = [0, 1, 2, 3, 7, 8, 9, 10, 11]
# What training computes nothing with is found when the next snapshot is due, after update 8.
FROM_8 = [0, 1, 2, 3, 8, 9, 10, 11]

# name: (fault, guard, router, batches in all, batches whose updates are left, the cause)
CASES: dict[str, tuple[str, GuardConfig, dict[str, Any], int, list[int], str]] = {
    "a weight, at the first step": ("nan_weight@1", EVERY_4, NOISY, 6, [1, 2, 3, 4, 5], HEAD),
    "a weight": ("nan_weight@7", EVERY_4, NOISY, 12, FROM_7, HEAD),
    "a weight, with Muon": ("nan_weight@7", EVERY_4, MUON, 12, FROM_7, HEAD),
    "a weight of an expert": (
        *("nan_weight@7:expert1", EVERY_4, NOISY, 12, FROM_7),
        "weight of blocks.1.mlp.experts.fc1.weight (expert 1)",
    ),
    "twice to the same snapshot": (
        *("nan_weight@7, nan_weight@9", ONE_SNAPSHOT, NOISY, 12, [0, 1, 2, 3, 9, 10, 11], HEAD),
    ),
    # After the same snapshot did not help, the one before it: the beginning.
    "further back the second time": (
        *("nan_weight@7, nan_weight@9", EVERY_4, NOISY, 12, [9, 10, 11], HEAD),
    ),
    "a BatchNorm statistic": ("nan_buffer@7", EVERY_4, NOISY, 12, FROM_8, "buffer of patch_embed"),
    "a router bias": (
        *("nan_buffer@7:block1", EVERY_4, BIASED, 12, FROM_8),
        "buffer of blocks.1.mlp.router.bias",
    ),
    "the average only": ("nan_ema@7", EVERY_4, NOISY, 12, FROM_8, f"ema.{HEAD}"),
    # Updates 20 to 24 are suspicious; the last snapshot before them was taken after 15.
    "a lasting spike": (
        *("spike@20x50", SPIKES, NOISY, 32, [*range(15), *range(24, 32)], "loss spike"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_return_is_to_what_was(case, tmp_path):
    """The run is in the state of one that never saw the batches between the snapshot and the return, bit for bit."""
    faults, config, router, count, left, cause = CASES[case]
    every = batches(count)
    applied: list[int] = []

    class Applied(L.Callback):
        def on_train_batch_end(
            self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: Any
        ) -> None:
            applied.append(int(pl_module.update_applied))

    struck = Run(
        tmp_path,
        every,
        faults=faults,
        guard=config,
        task=tiny_task(lr=1e-3, **router),
        callbacks=(Applied(),),
    )
    assert struck.record.skipped == 0
    assert (
        struck.record.rollbacks == len(faults.split(",")) == sum(struck.injector.injected.values())
    )
    assert struck.record.events[0].source.startswith(cause)
    assert struck.record.lost == sum(applied) - len(left)
    filled = ([every[index] for index in left] + every)[:count]
    clean = Run(tmp_path, filled, guard=config, task=tiny_task(lr=1e-3, **router), after=len(left))
    assert clean.record.rollbacks == 0
    assert struck.states.last["net"]
    assert_same(struck.states.last, clean.states.state)


def test_a_training_that_never_recovers_ends_with_a_diagnosis(tmp_path):
    """Two returns are one too many; what is left is finite, and it loads as plain data."""
    faults = "nan_weight@3, nan_weight@5:expert2"
    config = GuardConfig(max_rollbacks=1)
    with pytest.raises(TrainingDiverged, match=r"expert 2.*divergence\.md"):
        Run(tmp_path, batches(8), faults=faults, guard=config)
    checkpoint = torch.load(tmp_path / "checkpoints" / "diverged.ckpt", weights_only=True)
    assert finite(checkpoint)
    record = GuardRecord.from_state(checkpoint["callbacks"]["StabilityGuard"]["record"])
    assert (record.rollbacks, record.skipped) == (2, 0)
    text = (tmp_path / "divergence.md").read_text()
    assert "after 2 returns" in text
    assert "suspect the memory" in text
    assert "of blocks.1.mlp.experts.fc1.weight (expert 2)" in text


def test_refusing_again_and_again_is_a_reason_to_return(tmp_path):
    """Two refused updates of the last 100 are allowed here, and three were injected."""
    run = Run(
        tmp_path,
        batches(6),
        faults="nan_loss@2, nan_loss@3, nan_loss@4",
        guard=GuardConfig(max_skips=2),
    )
    assert (run.record.skipped, run.record.rollbacks, run.record.lost) == (3, 1, 1)
    source = run.record.events[-1].source
    assert not missing(source, "3 of", "last 4 updates", "cross-entropy")


def test_a_return_names_no_images(tmp_path):
    """A weight turned bad by itself: those of the step at which it was noticed are no cause, and nobody looks there."""
    run = Run(tmp_path, batches(4), faults="nan_loss@2, nan_weight@3")
    assert [(event.kind, len(event.samples)) for event in run.record.events] == [
        ("skip", 8),
        ("rollback", 0),
    ]


def test_a_return_drops_the_gradients(tmp_path):
    """They are of weights that are gone, and the next backward pass would add to them."""
    task = tiny_task()
    trainer = standing_trainer(task)
    snapshot = TrainingSnapshot(trainer, task, guard_state=None)
    before = [weight.detach().clone() for weight in task.net.parameters()]
    for weight in task.net.parameters():
        weight.grad = torch.ones_like(weight)
    trainer.optimizers[0].step()
    snapshot.restore(trainer, task)
    assert all(weight.grad is None for weight in task.net.parameters())
    assert all(
        torch.equal(weight, saved)
        for weight, saved in zip(task.net.parameters(), before, strict=True)
    )


def test_when_there_is_a_state_to_judge_and_to_return_to():
    """Each of four reasons is enough to leave a weight alone that isn't finite."""
    task, swapped, guard = tiny_task(), WeightEMA(EmaConfig(decay=0.9)), StabilityGuard()
    swapped.swapped = True
    fitting = standing_trainer(task)
    bad, good = task.net.head.weight.data, task.net.head.weight.data.clone()
    bad[0] = float("nan")
    guard.on_train_end(fitting, task)
    assert bad.isnan().any(), "no snapshot yet"
    bad.copy_(good)
    guard.on_train_start(fitting, task)
    bad[0] = float("nan")
    testing = SimpleNamespace(fn=TrainerFn.TESTING, status=TrainerStatus.RUNNING)
    interrupted = SimpleNamespace(fn=TrainerFn.FITTING, status=TrainerStatus.INTERRUPTED)
    guard.on_train_end(standing_trainer(task, state=testing), task)
    guard.on_train_end(
        standing_trainer(task, state=interrupted), task
    )  # other processes won't answer
    guard.on_train_end(
        standing_trainer(task, callbacks=[swapped]), task
    )  # the network holds the average
    assert bad.isnan().any()
    guard.on_train_end(fitting, task)
    assert torch.equal(task.net.head.weight.data, good)


def test_a_checkpoint_is_of_the_state_that_was_returned_to():
    """Its optimizers and schedules, too, which Lightning has put into it before the state is looked at."""
    task, guard = tiny_task(), StabilityGuard()
    trainer = standing_trainer(task)
    guard.on_train_start(trainer, task)
    checkpoint: dict[str, Any] = {
        "optimizer_states": "as it was",
        "lr_schedulers": "as it was",
        "callbacks": {},
    }
    guard.on_save_checkpoint(trainer, task, checkpoint)
    assert checkpoint["optimizer_states"] == "as it was", "nothing was wrong"
    task.net.head.weight.data[0] = float("nan")
    guard.on_save_checkpoint(trainer, task, checkpoint)
    assert checkpoint["optimizer_states"] == [trainer.optimizers[0].state_dict()]
    assert checkpoint["lr_schedulers"] == []
    assert checkpoint["callbacks"][guard.state_key]["record"] == guard.record.state_dict()


def test_large_numbers_are_finite():
    """The square of 1e30 isn't, in float32."""
    task = tiny_task()
    torch.nn.init.constant_(task.net.head.weight, 1e30)
    StabilityGuard().on_train_start(standing_trainer(task), task)


@pytest.mark.parametrize("fault", ["nan_buffer@3", "nan_ema@3", "nan_weight@4:expert3"])
def test_no_checkpoint_ever_holds_nan(fault, tmp_path):
    """A checkpoint after every step: the fault is found at the latest when it would be saved."""
    saving = ModelCheckpoint(
        tmp_path / "all", filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    run = Run(tmp_path, batches(6), faults=fault, callbacks=(saving,), enable_checkpointing=True)
    files = sorted((tmp_path / "all").glob("*.ckpt"))
    assert len(files) == 6
    assert all(finite(torch.load(file, weights_only=True)) for file in files)
    assert run.record.rollbacks == 1


def finite(state: Any) -> bool:
    """Whether all tensors of a checkpoint are, but those of callbacks (ModelCheckpoint's worst score is ∞)."""
    if isinstance(state, Tensor):
        return bool(state.isfinite().all())
    if isinstance(state, dict):
        return all(finite(value) for name, value in state.items() if name != "callbacks")
    return all(map(finite, state)) if isinstance(state, (list, tuple)) else True


def test_when_a_loss_is_a_spike():
    """Mean 2 and deviation 0.1 of twenty losses: 6 σ is 2.6; the floors are 2.5 and 2.1, and σ = 0 leaves the 25 %."""
    history = LossHistory(sigmas=6, patience=2, warmup=20)
    assert not history.add(1e9)  # nothing is known yet ...
    history = LossHistory(sigmas=6, patience=2, warmup=20)
    assert not any(history.add(2 + 0.1 * (-1) ** index) for index in range(20))
    assert history.threshold == pytest.approx(2.6)
    assert not history.add(2.7)
    assert not history.add(2.5)  # in between a good one: not lasting
    good = [2.1, 1.9] * 10 + [2.5]  # 2.7 is not in the statistics
    assert history.threshold == pytest.approx(fmean(good) + 6 * pstdev(good))
    assert not history.add(9)
    assert history.add(9)
    flat = LossHistory(sigmas=6, patience=1, warmup=2)
    assert not any(flat.add(2) for _ in range(2))
    assert flat.threshold == 2.5
    assert LossHistory(sigmas=0, patience=1, warmup=0).threshold == float("inf")
