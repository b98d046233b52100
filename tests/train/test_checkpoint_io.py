"""Checkpoints: whole or not at all, and compared with their checksums when they are read."""

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch

from moevision.errors import UserError
from moevision.files import remove_leftovers, temporary_for
from moevision.train.checkpoint import (
    BEST,
    LAST,
    PREVIOUS,
    SafeCheckpointIO,
    explain_damaged_files,
    newest_valid,
)
from tests.shared import missing

pytestmark = pytest.mark.deep


def state(step: int, value: float = 1.0) -> dict[str, object]:
    return {"global_step": step, "epoch": 0, "state_dict": {"w": torch.full((1000,), value)}}


@pytest.fixture
def files() -> SafeCheckpointIO:
    return SafeCheckpointIO()


def damage(path: Path, at: int = 2000) -> None:
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_the_newest_valid_one_is_found_and_the_others_are_named(files, tmp_path):
    for step in (1, 2):
        files.save_checkpoint(state(step), tmp_path / LAST)
    damage(tmp_path / LAST)
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == 2, (
        "torch.load does not notice"
    )
    found, (refused,) = newest_valid(tmp_path)
    assert (found.path.name, found.step) == (PREVIOUS, 1)
    assert (refused.path.name, refused.step) == (LAST, 2)
    assert "is damaged in" in refused.fault
    with pytest.raises(UserError, match=r"last.ckpt is damaged .* another one"):
        files.load_checkpoint(tmp_path / LAST)


@pytest.mark.parametrize("keep", [0, 10, 1500, -1])
def test_a_cut_off_file_is_never_chosen(files, tmp_path, keep):
    files.save_checkpoint(state(1), tmp_path / PREVIOUS)
    files.save_checkpoint(state(2), tmp_path / BEST)
    whole = (tmp_path / BEST).read_bytes()
    (tmp_path / BEST).write_bytes(whole[:keep])
    found, (refused,) = newest_valid(tmp_path)
    assert (found.path.name, refused.path.name) == (PREVIOUS, BEST)


@pytest.mark.parametrize("moment", range(2))
def test_killed_at_any_moment_of_a_save_there_is_a_valid_one(files, tmp_path, monkeypatch, moment):
    """A save replaces two names, previous.ckpt and last.ckpt; it dies before the n-th."""
    files.save_checkpoint(state(1), tmp_path / LAST)
    files.save_checkpoint(state(2), tmp_path / LAST)
    count = iter(range(10))
    real = os.replace

    def dying(*names):
        if next(count) == moment:
            raise KeyboardInterrupt
        real(*names)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        files.save_checkpoint(state(3), tmp_path / LAST)
    found, refused = newest_valid(tmp_path)
    assert (found.step, refused) == (2, [])


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_save_that_is_refused_leaves_what_was_there(files, tmp_path, monkeypatch):
    files.save_checkpoint(state(1), tmp_path / LAST)
    before = (tmp_path / LAST).read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.save_checkpoint(state(2), tmp_path / LAST)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {LAST: before}


def test_tensors_go_where_they_are_asked_for(files, tmp_path):
    files.save_checkpoint(state(1), tmp_path / LAST)
    for place, device in ((None, "cpu"), ("meta", "meta")):
        loaded = files.load_checkpoint(tmp_path / LAST, map_location=place)["state_dict"]["w"]
        assert loaded.device.type == device
        assert device == "meta" or torch.equal(loaded, torch.ones(1000))


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_no_pickle_is_ever_run(files, tmp_path):
    evil = Evil(tmp_path / "pwned")
    torch.save({"global_step": 9, "state_dict": {}, "evil": evil}, tmp_path / LAST)
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(evil))
    assert newest_valid(tmp_path)[0] is None
    with pytest.raises(UserError):
        files.load_checkpoint(tmp_path / LAST)
    with pytest.raises(UserError):
        files.load_checkpoint(tmp_path / LAST, weights_only=False)
    assert not (tmp_path / "pwned").exists()


def test_leftovers_go_and_what_lies_below_or_is_finished_stays(tmp_path):
    """Whoever removes them has claimed the folder, so that no other process is writing in it."""
    (tmp_path / "twin").mkdir()
    half = temporary_for(tmp_path / BEST)
    stay = [tmp_path / "kept.tmp", tmp_path / ".kept", tmp_path / "twin" / ".last.ckpt.7.tmp"]
    for path in (half, tmp_path / f".{LAST}.7.tmp", *stay):
        path.write_text("half")
    remove_leftovers(tmp_path)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(stay)
    remove_leftovers(tmp_path / "nowhere")


def test_a_sentence_about_a_checkpoint_is_not_said_twice():
    with pytest.raises(UserError) as one, explain_damaged_files("last.ckpt"):
        raise UserError("itself")
    assert str(one.value) == "itself"
    with pytest.raises(UserError) as other, explain_damaged_files("last.ckpt"):
        raise KeyError("state_dict")
    assert not missing(str(other.value), "last.ckpt", "(KeyError)", "best.ckpt")
