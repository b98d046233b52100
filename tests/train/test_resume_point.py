"""When a point to go on from is saved, what lies in it, and what it puts back: each rule alone, without a training."""

import random
import signal
import time
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from moevision.data import ImageDataModule
from moevision.data.transforms import hash_u64
from moevision.train.checkpoint import plain
from moevision.train.fit import keep_images_per_step
from moevision.train.lightning_internals import loops_before_next_fetch
from moevision.train.processes import (
    Interrupted,
    Interruption,
    random_state,
    restore_random_state,
    seed_per_rank,
)
from moevision.train.resume import MARK, CheckpointConfig, ResumePoint
from tests.shared import missing


@pytest.fixture
def point(tmp_path):
    """It has saved step 0 a moment ago; signals are given back at the end."""
    with Interruption() as interruption:
        made = ResumePoint(tmp_path / "checkpoints", CheckpointConfig(), interruption)
        made._saved_step = 0
        yield made


def trainer(**values):
    """What a `ResumePoint` asks of a trainer."""
    alone = {
        "world_size": 1,
        "global_rank": 0,
        "is_global_zero": True,
        "global_step": 0,
        "loggers": [],
    }
    data = {
        "datamodule": None,
        "callbacks": [],
        "limit_train_batches": 1.0,
        "accumulate_grad_batches": 1,
    }
    data["fit_loop"] = SimpleNamespace()
    return SimpleNamespace(**{**alone, **data, "state": SimpleNamespace(fn="fit"), **values})


def loops(**progress):
    """What a checkpoint says of Lightning's loops, within an epoch."""
    return {
        "fit_loop": {"epoch_progress": {"current": {"processed": 1, "completed": 1}}, **progress}
    }


def draw():
    """Of each generator, and of the normal distribution, of which Python and NumPy draw two numbers at once."""
    uniform = random.random(), float(np.random.rand()), float(torch.rand(()))
    return *uniform, random.gauss(0, 1), float(np.random.randn())


def seed(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def test_each_process_gets_its_own_generators_back(point, tmp_path):
    """A checkpoint of two processes, read by the second one."""
    states, expected = [], []
    for rank in (0, 1):
        seed(rank)
        draw()
        states.append(random_state())
        expected.append(draw())
    torch.save(plain(states), tmp_path / "states.pt")
    states = torch.load(tmp_path / "states.pt", weights_only=True)
    point.on_load_checkpoint(trainer(), None, {MARK: {"random": states}, "loops": loops()})
    point.on_train_start(trainer(world_size=2, global_rank=1), None)
    assert draw() == expected[1]


def test_processes_that_the_checkpoint_does_not_know_draw_different_numbers(point):
    """It was made by one process, and two go on: none repeats the other's numbers, nor those of the one."""
    seed(5)
    state, drawn = random_state(), [draw()]
    for rank in (0, 1):
        seed(5)
        point.on_load_checkpoint(trainer(), None, {MARK: {"random": [state]}, "loops": loops()})
        point.on_train_start(trainer(world_size=2, global_rank=rank), None)
        drawn.append(draw())
    assert all(len(set(of_one_generator)) == 3 for of_one_generator in zip(*drawn, strict=True))


def test_processes_that_began_with_one_seed_part():
    """All three generators are seeded by a hash of the seed and the rank, of which NumPy takes 32 bits."""
    torch.manual_seed(5)
    seed_per_rank(1)
    number = hash_u64(5, 1)
    assert number > 2**32
    torch_number = float(torch.rand((), generator=torch.Generator().manual_seed(number)))
    expected = (
        random.Random(number).random(),
        np.random.RandomState(number % 2**32).rand(),
        torch_number,
    )
    assert draw()[:3] == expected


def test_generators_of_cuda_devices_come_back(monkeypatch):
    states, given = [torch.zeros(16, dtype=torch.uint8), torch.ones(16, dtype=torch.uint8)], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", given.append)
    saved = random_state()
    assert saved["cuda"] is states
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    restore_random_state(saved)
    assert given == [], "a machine of another kind: its one device goes on with its own numbers"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    restore_random_state(saved)
    assert [[device.tolist() for device in devices] for devices in given] == [[[0] * 16, [1] * 16]]


def test_without_cuda_its_generators_are_not_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: pytest.fail("asked"))
    assert random_state()["cuda"] == []


@pytest.mark.parametrize(
    ("config", "minutes", "steps", "due"),
    [
        (CheckpointConfig(10, 3), 9, 2, False),
        (CheckpointConfig(10, 3), 10, 2, True),
        (CheckpointConfig(10, 3), 9, 3, True),
        (CheckpointConfig(10), 9, 1000, False),
    ],
)
def test_each_reason_to_save_is_enough(point, config, minutes, steps, due):
    point.config = config
    point._saved_s = time.monotonic() - 60 * minutes
    alone = trainer(global_step=steps, strategy=SingleDeviceStrategy("cpu"))
    assert point.is_due(alone) == due
    assert not point.must_stop(alone)


def test_of_two_processes_both_do_what_one_wants(point):
    """The strategy is asked whether any of them does."""
    asked = []

    def any_of_them(decision, all):
        asked.append((decision, all))
        return True

    strategy = SimpleNamespace(reduce_boolean_decision=any_of_them)
    two = trainer(world_size=2, strategy=strategy)
    assert point.is_due(two)
    assert point.must_stop(two)
    assert asked == [(False, False)] * 2


def test_after_an_error_a_signal_does_not_wait_for_the_end_of_a_step(point):
    point.on_train_start(trainer(), None)
    point.on_exception(trainer(), None, RuntimeError())
    with pytest.raises(Interrupted) as caught:
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize("validated", [False, True])
def test_between_two_batches_the_next_one_is_not_fetched_yet(validated):
    """Seven steps were done, three batches of this epoch are fetched and the third is not done; then as it was."""
    progress = SimpleNamespace(
        is_last_batch=True, total=SimpleNamespace(ready=8), current=SimpleNamespace(ready=3)
    )
    loop = SimpleNamespace(
        batch_progress=progress,
        _batches_that_stepped=7,
        _should_check_val_fx=lambda fetcher: validated,
    )

    def shown():
        return (
            progress.is_last_batch,
            progress.total.ready,
            progress.current.ready,
            loop._batches_that_stepped,
        )

    fit_loop = SimpleNamespace(epoch_loop=loop, _data_fetcher=None)
    with suppress(OSError), loops_before_next_fetch(SimpleNamespace(fit_loop=fit_loop)):
        assert shown() == (False, 7, 2, 6 if validated else 7)
        raise OSError("full")
    assert shown() == (True, 8, 3, 7)


def test_a_run_folder_that_was_moved_is_followed(point):
    """In what ModelCheckpoint remembers, and nowhere else."""
    state = {
        "dirpath": "/old/pets/checkpoints",
        "best_model_path": "/old/pets/checkpoints/best.ckpt",
        "best_k": 0.5,
    }
    checkpoint = {
        "callbacks": {"ModelCheckpoint{'monitor': 'val/top1'}": dict(state), "Foreign": dict(state)}
    }
    point.on_load_checkpoint(trainer(state=SimpleNamespace(fn="test")), None, checkpoint)
    here = str(point.path.parent.resolve())
    assert checkpoint["callbacks"] == {
        "ModelCheckpoint{'monitor': 'val/top1'}": {
            "dirpath": here,
            "best_model_path": f"{here}/best.ckpt",
            "best_k": 0.5,
        },
        "Foreign": state,
    }


ONE, MORE, FEWER = (1, 1), (1, 2), (2, 1)
READ = [(4, ONE, 1, 3, 3), (1, ONE, 1, 3, 12), (2, ONE, 2, 3, 6), (8, ONE, 1, 3, 1)]
READ += [(4, MORE, 1, 6, 3), (4, FEWER, 2, 3, 6), (4, FEWER, 4, 3, 4)]


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore:the run began with")
@pytest.mark.parametrize(("size", "processes", "window", "batch", "found"), READ)
def test_no_image_of_an_epoch_is_left_out_by_other_batches_or_processes(
    point, monkeypatch, size, processes, window, batch, found
):
    """Some batches of four images were read in each process; one that belongs to half a step is read again."""
    before, now = processes
    sizes = {"train_size": 48, "val_size": 8, "test_size": 8}
    data = ImageDataModule("synthetic_pets", image_size=16, batch_size=size, **sizes)
    data.setup("fit")
    monkeypatch.setattr(data, "_rank_and_world", lambda: (0, now))
    names = ("ready", "started", "processed", "completed")
    progress = {"current": dict.fromkeys(names, batch), "is_last_batch": True}
    state = {"epoch": 1, "batch": batch, "batch_size": 4, "world_size": before}
    checkpoint = {
        "ImageDataModule": state,
        "loops": loops(**{"epoch_loop.batch_progress": progress}),
    }
    data.load_state_dict(state)  # as Lightning does before
    point.on_load_checkpoint(
        trainer(datamodule=data, world_size=now, accumulate_grad_batches=window), None, checkpoint
    )
    assert (data.state_dict()["epoch"], data.state_dict()["batch"]) == (1, found)
    assert data._start == (1, size * found)
    same = (size, before) == (4, now)
    assert progress == {"current": dict.fromkeys(names, found), "is_last_batch": same}


@pytest.mark.parametrize(("images", "limit"), [(96, 12), (104, 12), (8, 2)])
def test_half_of_the_processes_take_as_many_steps(images, limit, capsys):
    """Two processes took ⌊images / 16⌋ steps of 16 an epoch; one sums two batches of 8, and none at the end alone."""
    start = SimpleNamespace(fingerprint={"images_per_step": 16})
    data = SimpleNamespace(
        batch_size=8, contents=SimpleNamespace(datasets={"train": range(images)})
    )
    trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=1, limit_train_batches=1.0)
    keep_images_per_step(start, data, trainer)
    assert (trainer.accumulate_grad_batches, trainer.limit_train_batches) == (2, limit)
    assert not missing(capsys.readouterr().err, "2 batches", "16 images")
