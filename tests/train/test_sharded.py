"""Damaged and hostile checkpoint folders: nothing in them is run, and each ends in one sentence.

`tests/train/test_parallel.py` reads those that processes wrote.
"""

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moevision.errors import UserError
from moevision.train.archive import sizes_of
from moevision.train.checkpoint import MANIFEST, Entry, newest_valid, read_manifest, verify, write_manifest
from moevision.train.parallel.folder import read_folder
from moevision.train.resume import load_trained
from tests.forks import Forked
from tests.train.test_command_two_processes import SHARDED, fit

pytestmark = pytest.mark.deep

A, B = (json.dumps(["state_dict", name]) for name in "ab")
TENSORS = {A: torch.arange(12.0).view(3, 4), B: torch.arange(5)}
PARTS = [
    {A: ([3, 4], [0, 0], TENSORS[A][:2].clone())},
    {A: ([3, 4], [2, 0], TENSORS[A][2:].clone()), B: ([5], [0], TENSORS[B])},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two weights, the first in two parts."""
    made = tmp_path / "last.ckpt"
    made.mkdir()
    torch.save(
        {"state_dict": {"a": None, "b": None}, "global_step": 3, "hyper_parameters": {"arch": {}}}, made / "rest.pt"
    )
    for rank, parts in enumerate(PARTS):
        torch.save(parts, made / f"part-{rank}.pt")
    return made


def test_what_was_written_is_read(folder: Path) -> None:
    found = read_folder(folder)
    assert sizes_of(folder).keys() == {"part-0.pt", "part-1.pt", "rest.pt"}
    assert torch.equal(found["state_dict"]["a"], TENSORS[A])
    assert torch.equal(found["state_dict"]["b"], TENSORS[B])
    assert found["global_step"] == 3


def part(*change: Any, key: str = A) -> Callable[[Path], None]:
    """A damage: the first part is said to be this one, or to be of another key."""
    return lambda folder: torch.save({key: change or PARTS[0][A]}, folder / "part-0.pt")


def rest(content: Any) -> Callable[[Path], None]:
    return lambda folder: torch.save(content, folder / "rest.pt")


def written(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def replaced(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """A damage: something else in the place of a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def compressed(file: Path) -> None:
    """The same archive, deflated."""
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


def listed_twice(file: Path) -> None:
    """An archive whose directory names the same bytes a hundred times."""
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/data/9", bytes(100_000))
        archive.filelist += archive.filelist * 100


ROWS = torch.zeros(2, 4)
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "rubbish for a part": (written("part-0.pt", b"rubbish"), "can't be read"),
    "half a part": (lambda f: os.truncate(f / "part-0.pt", 300), "can't be read"),
    "a function for a part": (lambda f: torch.save(os.system, f / "part-0.pt"), "can't be read"),
    "a list for a part": (lambda f: torch.save([1], f / "part-0.pt"), "can't be read"),
    "a number for a tensor": (part([3, 4], [0, 0], 5), "can't be read"),
    "12 GB of one number": (part([3 * 2**30, 1], [0, 0], torch.zeros(1).expand(3 * 2**30, 1)), "parts overlap"),
    "4 TB of nothing": (
        part([2**40], [0], torch.sparse_coo_tensor(size=(2**40,), check_invariants=True)),
        "can't be read",
    ),
    "a shape without its parts": (part([2**20, 2**20], [0, 0], ROWS), "are missing|different tensors|outside"),
    "a size that overflows": (part([2**62, 2**62], [0, 0], ROWS), "are missing|different tensors|outside"),
    "another shape": (part([4, 3], [0, 0], ROWS), "lies outside"),
    "another type": (part([3, 4], [0, 0], ROWS.to(torch.int8)), "are of different tensors"),
    "a part that begins behind the end": (part([3, 4], [2**40, 0], ROWS), "lies outside"),
    "a part that begins before the tensor": (part([3, 4], [-1, 0], ROWS), "lies outside"),
    "a part that begins at no place": (part([3, 4], ["0", 0], ROWS), "can't be read"),
    "a part of fewer dimensions": (part([3, 4], [0], ROWS), "can't be read"),
    "too few rows": (part([3, 4], [0, 0], ROWS[:1].clone()), "are missing"),
    "a weight without parts": (lambda f: torch.save({}, f / "part-1.pt"), "are missing"),
    "a key that is no text": (lambda f: torch.save({5: PARTS[0][A]}, f / "part-0.pt"), "can't be read"),
    "a key that is no JSON": (part(key="{"), "can't be read"),
    "a key that is no place": (part(key='"a"'), "can't be read"),
    "a key of nothing": (part(key="[]"), "can't be read"),
    "a key of lists in lists": (part(key="[" * 9000), "can't be read"),
    "a key that isn't in the rest": (part(key='["other", "a"]'), "can't be read"),
    "a key of another value": (part(key='["global_step"]'), "can't be read"),
    "no part": (replaced("part-0.pt", lambda file: None), "are missing"),
    "a link for a part": (replaced("part-0.pt", lambda f: f.symlink_to("/dev/zero")), "no regular file"),
    "a link to a file": (replaced("rest.pt", lambda f: f.symlink_to("../outside.pt")), "no regular file"),
    "a pipe for a part": (replaced("part-0.pt", os.mkfifo), "no regular file"),
    "a pipe beside": (replaced("more", os.mkfifo), "no regular file"),
    "a folder beside": (replaced("more", Path.mkdir), "no regular file"),
    "no rest": (replaced("rest.pt", lambda file: None), "can't be read"),
    "a number for the rest": (rest(5), "can't be read"),
    "a rest without weights": (rest({"state_dict": 5}), "can't be read"),
    "a weight that is nowhere": (rest({"state_dict": dict.fromkeys("abc")}), "a weight is missing"),
    "a rest that unfolds": (lambda folder: compressed(folder / "rest.pt"), "its parts are compressed"),
    "a rest that stands for more": (lambda folder: listed_twice(folder / "rest.pt"), "its parts overlap"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_what_is_refused(what: str, folder: Path) -> None:
    damage, words = DAMAGES[what]
    damage(folder)
    with pytest.raises(UserError, match=words) as refused:
        read_folder(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["last.ckpt", "last.ckpt/part-0.pt", "last.ckpt/rest.pt"])
def test_a_pipe_is_not_waited_for(name: str, folder: Path) -> None:
    """Neither as a checkpoint nor in one, by what looks for the newest and what reads a model."""
    if name == "last.ckpt":
        folder.rename(folder.with_name("other"))
    replaced(folder.parent.joinpath(name).name, os.mkfifo)(folder.parent.joinpath(name).parent)
    assert "no regular file" in str(verify(folder).fault)
    assert newest_valid(folder.parent)[0] is None
    with pytest.raises(UserError, match=r"no regular file|can't be read"):
        load_trained(str(folder))


ENTRY = Entry("last.ckpt", "0" * 64, 3, 0, 1, True, "2026-01-01T00:00:00+00:00")


@pytest.mark.parametrize(("name", "value"), [("sha256", {}), ("step", "3"), ("step", True), ("finite", 1), ("name", 5)])
def test_a_manifest_of_odd_values_vouches_for_nothing(name: str, value: Any, tmp_path: Path) -> None:
    write_manifest(tmp_path, [ENTRY])
    assert read_manifest(tmp_path) == [ENTRY]
    (tmp_path / MANIFEST).write_text(json.dumps({"files": [{**vars(ENTRY), name: value}]}))
    assert read_manifest(tmp_path) == []


def test_a_manifest_that_is_a_pipe_or_never_ends(tmp_path: Path) -> None:
    for make in (os.mkfifo, lambda file: file.symlink_to("/dev/zero")):
        replaced(MANIFEST, make)(tmp_path)
        assert read_manifest(tmp_path) == []


def test_mutated_folders_of_two_processes(tmp_path: Path) -> None:
    """Ten of each kind of `python -m benchmarks folders`; a record has 500."""
    fit(tmp_path, "synthetic_pets", *SHARDED, "--name=run", "--trainer.max_epochs=1")
    last = tmp_path / "runs" / "run" / "checkpoints" / "last.ckpt"
    root = str(Path(__file__).parents[2])
    command = ["-m", "benchmarks", "folders", "--count=90", "--seed=1", f"--checkpoint={last}"]
    process = Forked(command, tmp_path, {**os.environ, "PYTHONPATH": root})
    said, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, said[-6000:]
