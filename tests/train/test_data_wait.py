"""The share of the time in which training waited for its data."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from moevision.data import ImageDataModule
from moevision.train import health
from moevision.train.health import Stopwatch, data_wait_advice
from tests.shared import missing

pytestmark = pytest.mark.deep


class Hand:
    """A clock that is set by hand."""

    time_s = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Hand:
    """What `Stopwatch` looks at."""
    hand = Hand()
    monkeypatch.setattr(health.time, "monotonic", lambda: hand.time_s)
    return hand


def train(
    watch: Stopwatch,
    clock: Hand,
    batches: int,
    *,
    wait_s: float,
    step_s: float,
    validate: bool = True,
) -> None:
    """An epoch in which every batch is waited for and then trained on, and a validation of 1000 s in its middle."""
    loader = SimpleNamespace(wait_s=500.0)  # of earlier epochs
    trainer = cast(Any, SimpleNamespace(train_dataloader=loader, world_size=1))
    watch.on_train_epoch_start(trainer, cast(Any, None))
    for number in range(batches):
        loader.wait_s += wait_s
        clock.time_s += wait_s + step_s
        watch.on_train_batch_end(trainer, cast(Any, None), None, {"label": [0] * 8}, number)
        if validate and number == batches // 2:
            clock.time_s += 1000
            watch.on_validation_end(trainer, cast(Any, None))


def test_share_by_hand(clock):
    watch = Stopwatch()
    assert watch.data_wait is None, "nothing was trained yet"
    train(watch, clock, 10, wait_s=1.0, step_s=3.0)
    assert (watch.train_s, watch.data_wait_s, watch.data_wait) == (40.0, 10.0, 0.25)
    state = watch.state_dict()  # its CPU time doesn't go on
    resumed = Stopwatch()
    resumed.load_state_dict(state)
    train(resumed, clock, 10, wait_s=0.0, step_s=4.0)
    assert resumed.data_wait == 10 / 80
    assert resumed.images == 160
    assert resumed.cpu_s > state["cpu_s"] > 0, "CPU time goes on from the earlier session's"


def pets(**options: Any) -> ImageDataModule:
    data = ImageDataModule(image_size=16, train_size=8, val_size=8, test_size=8, **options)
    data.setup()
    return data


@pytest.mark.parametrize("share", [None, 0.0, 0.03])
def test_no_advice_where_none_is_needed(share):
    assert data_wait_advice(share, pets()) == []


def test_advice_names_what_helps():
    (sentence,) = data_wait_advice(0.0312, pets(num_workers=1))
    assert not missing(sentence, "3 %", "--data.num_workers (now 1)")
    assert " or " not in sentence
    (sentence,) = data_wait_advice(0.4, pets(cache_mb=0, augment="randaugment"))
    remedies = ("--data.cache_mb above 0", "--data.num_workers (now 0)", "--data.augment light")
    assert not missing(sentence, "40 %", *remedies)
    assert sorted(remedies, key=sentence.index) == list(remedies)


def test_advice_is_given_once_and_early(clock, capsys):
    watch = Stopwatch()
    trainer = cast(Any, SimpleNamespace(is_global_zero=True, datamodule=pets()))
    for batches, told in ((5, 0), (5, 1), (5, 0)):  # 20 s, 40 s and 60 s of training
        train(watch, clock, batches, wait_s=1.0, step_s=3.0)
        watch.on_train_epoch_end(trainer, cast(Any, None))
        assert capsys.readouterr().err.count("during 25 %") == told
