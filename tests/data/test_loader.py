"""The order is a pure function of (seed, epoch), the position an offset into it."""

import time
from collections import Counter
from math import ceil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moevision.data import ImageDataModule, loader
from moevision.data.loader import PositionSampler, eval_batches, fitting_workers
from moevision.errors import DataWarning
from tests.data.conftest import names, refusal


def order(sampler: PositionSampler, epoch: int | None = None) -> list[int]:
    """The indices of an epoch; None iterates over the sampler."""
    return [index for _, index in (sampler if epoch is None else sampler.keys(epoch))]


def test_each_epoch_is_another_permutation_and_a_seed_repeats_it():
    first = PositionSampler(50, seed=3)
    orders = []
    for epoch in range(3):
        first.set_epoch(epoch)
        orders.append(order(first))
        assert sorted(orders[-1]) == list(range(50))
    assert len({tuple(order) for order in orders}) == 3
    torch.manual_seed(99)  # the global generator has no say
    again = PositionSampler(50, seed=3)
    again.set_epoch(2)
    assert order(again) == orders[2]
    assert order(PositionSampler(50, seed=4)) != orders[0]


def test_keys_carry_the_epoch_they_began_with():
    sampler = PositionSampler(4)
    iterator = iter(sampler)
    next(iterator)
    sampler.set_epoch(1)
    assert {epoch for epoch, _ in iterator} == {0}


def test_seek_resumes_once_and_keeps_the_length():
    sampler = PositionSampler(20, seed=1)
    whole = order(sampler, 2)
    sampler.seek(2, 12)
    sampler.set_epoch(2)  # Lightning's call on resume
    assert len(sampler) == 20
    assert order(sampler) == whole[12:]
    assert order(sampler) == whole
    sampler.seek(2, 12)
    sampler.set_epoch(3)  # another epoch begins at its beginning
    assert order(sampler) == order(sampler, 3)


@given(
    n=st.integers(1, 40), world=st.integers(1, 5), epoch=st.integers(0, 3), balanced=st.booleans()
)
def test_ranks_share_out_the_common_order(n, world, epoch, balanced):
    labels = [i % 3 for i in range(n)] if balanced else None
    common = PositionSampler(n, balanced_labels=labels).keys(epoch)
    samplers = [PositionSampler(n, 0, rank, world, labels) for rank in range(world)]
    ranks = [sampler.keys(epoch) for sampler in samplers]
    assert {len(own) for own in ranks} == {n // world}
    interleaved = [key for step in zip(*ranks, strict=True) for key in step]
    assert interleaved == common[: n // world * world]


def test_balanced_order_draws_classes_equally_and_images_evenly():
    labels = [0] * 2 + [1] * 7 + [2] * 91
    sampler = PositionSampler(100, balanced_labels=labels)
    drawn = order(sampler, 0)
    classes = Counter(labels[index] for index in drawn)
    assert sorted(classes.values()) == [33, 33, 34]  # 100 draws over 3 classes
    # each image of a rare class before any of them comes once more
    for members in (range(2), range(2, 9)):
        times = [drawn.count(index) for index in members]
        assert max(times) - min(times) <= 1
    assert drawn != order(sampler, 1)


def test_an_image_that_comes_again_has_a_key_of_its_own():
    """Else all copies of a rare image in an epoch would be cropped and mirrored alike."""
    labels = [0] * 2 + [1] * 98
    sampler = PositionSampler(100, balanced_labels=labels)
    sampler.set_epoch(3)
    keys = list(sampler)
    rare = [epoch for epoch, index in keys if index == 0]
    assert len(rare) == len(set(rare)) == 25
    assert {epoch % 2 for epoch in rare} == {0, 1}  # which side is shown
    assert {epoch for epoch, index in keys if labels[index]} == {3}
    sampler.seek(3, 40)
    assert list(sampler) == keys[40:]


@given(n=st.integers(1, 60), batch=st.integers(1, 9), world=st.integers(1, 4))
def test_eval_batches_cover_all_once_in_equally_many_batches(n, batch, world):
    ranks = [eval_batches(n, batch, rank, world) for rank in range(world)]
    assert sorted(index for own in ranks for part in own for index in part) == list(range(n))
    # as few as the largest share needs
    assert {len(own) for own in ranks} == {ceil(ceil(n / world) / batch)}
    assert max(len(part) for own in ranks for part in own) <= batch


def test_eval_batches_of_one_process_are_consecutive():
    assert eval_batches(5, 2) == [[0, 1], [2, 3], [4]]


@pytest.fixture
def shm_free(monkeypatch):
    """Let the shared memory have so many bytes free."""
    if not loader.SHM.is_dir():
        pytest.skip("workers hand batches over by other means")
    return lambda free: monkeypatch.setattr(
        loader.shutil, "disk_usage", lambda place: SimpleNamespace(free=free)
    )


@pytest.mark.parametrize(
    ("free", "processes", "workers"),
    [(900, 1, 4), (899, 1, 3), (300, 1, 1), (299, 1, 0), (0, 1, 0), (900, 2, 1)],
)
def test_workers_have_room_for_their_batches_in_shared_memory(shm_free, free, processes, workers):
    """Each keeps two batches ready, and one more is in use."""
    shm_free(free)
    assert fitting_workers(4, 100, processes) == workers


def test_a_small_shared_memory_gets_fewer_workers_and_a_sentence(drawn_pets, shm_free):
    """Batches of 8 x 3 x 32 x 32 float32 are 98,304 bytes; 400,000 hold three of them."""
    options = {"image_size": 32, "cache_mb": 0}
    shm_free(400_000)
    data = ImageDataModule(str(drawn_pets), batch_size=8, num_workers=4, **options)
    with pytest.warns(DataWarning, match="/dev/shm has .* 1 of 4"):
        data.setup("fit")
    assert data.train_dataloader().num_workers == data.num_workers == 1
    names(data.describe(), "warning: /dev/shm")
    # 32 of the 40 images are for training: no batch has more
    shm_free(3 * (32 * 4 * (3 * 32**2 + 2) + 2**14))
    whole = ImageDataModule(str(drawn_pets), batch_size=10**9, num_workers=1, **options)
    whole.setup("fit")
    assert whole.num_workers == 1


def test_workers_that_give_nothing_end_the_training(drawn_pets, monkeypatch):
    """A worker that waits for ever, as one does whose batch was lost."""
    monkeypatch.setattr(loader, "_WORKER_TIMEOUT_S", 0.5)
    monkeypatch.setattr(loader.ImageDataset, "__getitems__", lambda dataset, keys: time.sleep(60))
    data = ImageDataModule(str(drawn_pets), image_size=32, batch_size=8, num_workers=1, cache_mb=0)
    data.setup("fit")
    with refusal("timed out after 0.5 seconds", kind=RuntimeError):
        next(iter(data.train_dataloader()))
