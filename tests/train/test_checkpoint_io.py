"""Checkpoints: whole or not at all, verified when they are read, and no reason to stop where a disk refuses."""

import errno
import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from moevision.errors import UserError
from moevision.files import remove_leftovers, temporary_for
from moevision.train import checkpoint
from moevision.train.archive import saying_what_is_damaged
from moevision.train.checkpoint import (
    BEST,
    LAST,
    PREVIOUS,
    Entry,
    SafeCheckpointIO,
    final_checkpoint,
    newest_valid,
    read_manifest,
    sha256_of,
    verify,
    write_manifest,
)
from moevision.train.parallel import folder

pytestmark = pytest.mark.deep


@pytest.mark.parametrize("failure", [OSError(28, "No space left"), MemoryError("out of memory")])
def test_what_fails_in_one_process_fails_in_all(failure, monkeypatch):
    """Whatever it is: who waits for the others' words would wait for ever. Here it hears of what another one met."""

    def fail():
        raise failure

    sent = []
    monkeypatch.setattr(folder, "gather", lambda mine: sent.append(mine) or [mine])
    kind = OSError if isinstance(failure, OSError) else RuntimeError
    with pytest.raises(kind) as own:
        folder._on_all(fail)
    assert own.value.__cause__ is failure
    monkeypatch.setattr(folder, "gather", lambda mine: [mine, sent[0]])
    with pytest.raises(kind, match=str(failure.args[-1])):
        folder._on_all(lambda: "written")


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


def test_what_is_written_is_read(files, tmp_path):
    files.save_checkpoint(state(3), tmp_path / LAST)
    assert torch.equal(files.load_checkpoint(tmp_path / LAST)["state_dict"]["w"], torch.ones(1000))
    (entry,) = read_manifest(tmp_path)
    assert entry.sha256 == hashlib.sha256((tmp_path / LAST).read_bytes()).hexdigest()
    assert (entry.name, entry.step, entry.size, entry.finite) == (LAST, 3, (tmp_path / LAST).stat().st_size, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LAST, "manifest.json"]


def test_two_points_to_go_on_from_are_kept(files, tmp_path):
    for step in (1, 2, 3):
        files.save_checkpoint(state(step), tmp_path / LAST)
    steps = {name: torch.load(tmp_path / name, weights_only=True)["global_step"] for name in (LAST, PREVIOUS)}
    assert steps == {LAST: 3, PREVIOUS: 2}
    assert {entry.name: entry.step for entry in read_manifest(tmp_path)} == steps


def test_the_newest_valid_one_is_found_and_the_others_are_named(files, tmp_path):
    for step in (1, 2):
        files.save_checkpoint(state(step), tmp_path / LAST)
    damage(tmp_path / LAST)
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == 2, "torch.load does not notice"
    found, (refused,) = newest_valid(tmp_path)
    assert (found.path.name, found.step) == (PREVIOUS, 1)
    assert (refused.path.name, refused.step) == (LAST, 2)
    assert "differs from its SHA-256" in refused.fault
    with pytest.raises(UserError, match=r"last.ckpt differs from its SHA-256 .* use another one"):
        files.load_checkpoint(tmp_path / LAST)


@pytest.mark.parametrize("keep", [0, 10, 1500, -1])
def test_a_cut_off_file_is_never_chosen(files, tmp_path, keep):
    """Also without a manifest, which then can't help."""
    files.save_checkpoint(state(1), tmp_path / PREVIOUS)
    files.save_checkpoint(state(2), tmp_path / BEST)
    whole = (tmp_path / BEST).read_bytes()
    (tmp_path / BEST).write_bytes(whole[:keep])
    for _ in range(2):
        found, (refused,) = newest_valid(tmp_path)
        assert (found.path.name, refused.path.name) == (PREVIOUS, BEST)
        (tmp_path / "manifest.json").unlink(missing_ok=True)


def test_without_a_manifest_the_archives_own_checksums_find_a_flipped_bit(files, tmp_path):
    files.save_checkpoint(state(1), tmp_path / LAST)
    (tmp_path / "manifest.json").unlink()
    assert verify(tmp_path / LAST).fault is None
    damage(tmp_path / LAST)
    assert "is damaged in" in verify(tmp_path / LAST).fault


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": [{"name": "last.ckpt"}]}', '{"files": 3}'])
def test_a_damaged_manifest_is_as_good_as_none(files, tmp_path, text):
    files.save_checkpoint(state(1), tmp_path / LAST)
    (tmp_path / "manifest.json").write_text(text)
    assert verify(tmp_path / LAST).fault is None


@pytest.mark.parametrize("moment", range(4))
def test_killed_at_any_moment_of_a_save_there_is_a_valid_one(files, tmp_path, monkeypatch, moment):
    """A save replaces three names (manifest, previous, last) and the manifest again; it dies before the n-th."""
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
    assert (found.step, refused) == (3 if moment == 3 else 2, [])


def test_weights_that_are_not_finite_are_not_gone_on_from(files, tmp_path):
    files.save_checkpoint(state(1), tmp_path / LAST)
    files.save_checkpoint(state(2, float("nan")), tmp_path / LAST)
    files.save_checkpoint(state(3, float("inf")), tmp_path / LAST)
    found, (refused,) = newest_valid(tmp_path)
    assert (found.path.name, found.step) == (PREVIOUS, 1), "NaN does not push out what is finite"
    assert "not finite" in refused.fault


def test_one_number_that_is_not_finite_is_enough(files, tmp_path):
    files.save_checkpoint(state(1), tmp_path / BEST)
    bad = state(2)
    bad["state_dict"]["w"][7] = float("nan")
    files.save_checkpoint(bad, tmp_path / LAST)
    found, (refused,) = newest_valid(tmp_path)
    assert (found.path.name, refused.path.name) == (BEST, LAST)
    assert "not finite" in refused.fault


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_one_save(files, tmp_path, monkeypatch, capsys):
    files.save_checkpoint(state(1), tmp_path / LAST)
    before = (tmp_path / LAST).read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        for step in (2, 3):
            files.save_checkpoint(state(step), tmp_path / LAST)
            assert files.refused == {tmp_path / LAST: "No space left on device"}
    assert (tmp_path / LAST).read_bytes() == before
    assert capsys.readouterr().err.count("No space left on device") == 1, "said once"
    assert not list(tmp_path.glob(".*"))
    files.save_checkpoint(state(4), tmp_path / LAST)
    assert files.refused == {}
    assert newest_valid(tmp_path)[0].step == 4
    assert verify(tmp_path / PREVIOUS).step == 1
    assert "could be written now" in capsys.readouterr().err


def test_tensors_go_where_they_are_asked_for(files, tmp_path):
    files.save_checkpoint(state(1), tmp_path / LAST)
    for place, device in ((None, "cpu"), ("meta", "meta")):
        loaded = files.load_checkpoint(tmp_path / LAST, map_location=place)
        assert {value.device.type for value in loaded["state_dict"].values()} == {device}


def test_the_last_free_bytes_are_left_alone(files, tmp_path, monkeypatch):
    usage = checkpoint.shutil._ntuple_diskusage(100, 99, 1)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    files.save_checkpoint(state(1), tmp_path / LAST)
    assert files.refused.keys() == {tmp_path / LAST}
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_written_if_a_megabyte_stays_free(files, tmp_path, monkeypatch):
    """2^20 bytes beside its own; with one byte less it is refused."""
    files.save_checkpoint(state(1), tmp_path / BEST)
    need = (tmp_path / BEST).stat().st_size + 2**20
    free = [need - 1, need]
    monkeypatch.setattr(
        checkpoint.shutil, "disk_usage", lambda _: checkpoint.shutil._ntuple_diskusage(2**40, 0, free.pop(0))
    )
    for refused in ({tmp_path / LAST}, set()):
        files.save_checkpoint(state(2), tmp_path / LAST)
        assert files.refused.keys() == refused
    assert newest_valid(tmp_path)[0].step == 2
    assert free == []


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_refuses(files, tmp_path):
    tmp_path.chmod(0o500)
    files.save_checkpoint(state(1), tmp_path / LAST)
    tmp_path.chmod(0o700)
    assert files.refused.keys() == {tmp_path / LAST}


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


def test_a_pickle_that_the_manifest_lists_is_not_run_either(files, tmp_path):
    """Whoever may write a checkpoint there may write its hash, too."""
    torch.save({"global_step": 9, "state_dict": {}, "evil": Evil(tmp_path / "pwned")}, tmp_path / LAST)
    write_manifest(tmp_path, [Entry.of(LAST, {"global_step": 9}, sha256_of(tmp_path / LAST), 1, True)])
    assert verify(tmp_path / LAST).fault is None
    with pytest.raises((UserError, pickle.UnpicklingError)):
        files.load_checkpoint(tmp_path / LAST)
    assert not (tmp_path / "pwned").exists()


def test_removing(files, tmp_path):
    for name in (LAST, BEST):
        files.save_checkpoint(state(1), tmp_path / name)
    files.remove_checkpoint(tmp_path / BEST)
    assert [entry.name for entry in read_manifest(tmp_path)] == [LAST]
    assert not (tmp_path / BEST).exists()
    assert json.loads((tmp_path / "manifest.json").read_text())["files"][0]["step"] == 1


def test_leftovers_go_and_what_lies_below_or_is_finished_stays(tmp_path):
    """Whoever removes them has claimed the folder, so that no other process is writing in it."""
    (tmp_path / "twin").mkdir()
    half = temporary_for(tmp_path / BEST)
    half.mkdir()
    stay = [tmp_path / "kept.tmp", tmp_path / ".kept", tmp_path / "twin" / ".last.ckpt.7.tmp"]
    for path in (half / "part-0.pt", tmp_path / f".{LAST}.7.tmp", *stay):
        path.write_text("half")
    remove_leftovers(tmp_path)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(stay)
    assert not half.exists()
    remove_leftovers(tmp_path / "nowhere")


def test_a_damaged_best_is_replaced_by_the_last(files, tmp_path):
    for name in (LAST, BEST):
        files.save_checkpoint(state(1), tmp_path / name)
    assert final_checkpoint(tmp_path, files) == (tmp_path / BEST, "the weights of the best validation epoch")
    damage(tmp_path / BEST)
    path, words = final_checkpoint(tmp_path, files)
    assert path == tmp_path / LAST
    assert "best.ckpt was damaged" in words
    (tmp_path / BEST).unlink()
    path, words = final_checkpoint(tmp_path, files)
    assert path == tmp_path / LAST
    assert "no best.ckpt" in words


def test_a_kill_between_two_renames_costs_no_step(files, tmp_path, monkeypatch):
    """last.ckpt of step 160 is called previous.ckpt already, and the manifest still says 100 of that name."""
    for name, step in ((LAST, 100), (LAST, 160), (BEST, 150)):
        files.save_checkpoint(state(step), tmp_path / name)
    rename, calls = checkpoint.rename_over, []

    def die_at_the_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(checkpoint, "rename_over", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        files.save_checkpoint(state(200), tmp_path / LAST)
    found, _ = newest_valid(tmp_path)
    assert (found.path.name, found.step) == (PREVIOUS, 160)


def test_a_sentence_about_a_checkpoint_is_not_said_twice() -> None:
    with pytest.raises(UserError) as one, saying_what_is_damaged("last.ckpt"):
        raise UserError("as it was said")
    assert str(one.value) == "as it was said"
    with pytest.raises(UserError) as other, saying_what_is_damaged("last.ckpt"):
        raise KeyError("state_dict")
    assert "last.ckpt can't be read (KeyError)" in str(other.value)
