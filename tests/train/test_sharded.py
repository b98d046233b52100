"""Damaged and hostile checkpoint folders: nothing in them is run, and each ends in one sentence.

DCP itself writes the folder, from tensors that aren't divided; `tests/train/test_parallel.py` reads those of processes.
"""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from moevision.errors import UserError
from moevision.train.archive import sizes_of
from moevision.train.checkpoint import MANIFEST, Entry, newest_valid, read_manifest, verify, write_manifest
from moevision.train.parallel.folder import read_folder
from moevision.train.trained import load_trained
from tests.forks import Forked
from tests.train.test_command_two_processes import SHARDED, fit

pytestmark = pytest.mark.deep

A, B = (json.dumps(["state_dict", name]) for name in "ab")
TENSORS = {A: torch.arange(12.0).view(3, 4), B: torch.arange(5)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two weights; `outside.pt`, beside the folder, holds what a part holds."""
    made = tmp_path / "last.ckpt"
    made.mkdir()
    torch.save(
        {"state_dict": {"a": None, "b": None}, "global_step": 3, "hyper_parameters": {"arch": {}}}, made / "rest.pt"
    )
    with pytest.warns(UserWarning, match=r"torch.distributed is disabled"):
        save(TENSORS, storage_writer=FileSystemWriter(made), no_dist=True)
    torch.save(TENSORS[A], tmp_path / "outside.pt")
    return made


def test_what_was_written_is_read(folder: Path) -> None:
    found = read_folder(folder)
    assert sizes_of(folder).keys() == {".metadata", "__0_0.distcp", "rest.pt"}
    assert torch.equal(found["state_dict"]["a"], TENSORS[A])
    assert torch.equal(found["state_dict"]["b"], TENSORS[B])
    assert found["global_step"] == 3


def described(change: Callable[[Any], None]) -> Callable[[Path], None]:
    """A damage: the description, changed and written again."""

    def damage(folder: Path) -> None:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        change(metadata)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    return damage


def stored(**values: Any) -> Callable[[Path], None]:
    """A damage: where the first weight lies, changed."""

    def change(metadata: Any) -> None:
        vars(place(metadata, A)).update(values)

    return described(change)


def place(metadata: Any, key: str) -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == key)


def sized(*shape: int) -> Callable[[Path], None]:
    """A damage: the first weight is said to be of this shape, in one part."""

    def change(metadata: Any) -> None:
        tensor = metadata.state_dict_metadata[A]
        tensor.size = tensor.chunks[0].sizes = torch.Size(shape)
        tensor.chunks[0].offsets = torch.Size([0] * len(shape))
        metadata.storage_data = {
            (MetadataIndex(A, [0] * len(shape)) if index.fqn == A else index): info
            for index, info in metadata.storage_data.items()
        }

    return described(change)


def named(key: str) -> Callable[[Path], None]:
    """A damage: the first weight goes by another key."""

    def change(metadata: Any) -> None:
        metadata.state_dict_metadata[key] = metadata.state_dict_metadata.pop(A)
        metadata.storage_data = {
            (MetadataIndex(key, index.offset) if index.fqn == A else index): info
            for index, info in metadata.storage_data.items()
        }

    return described(change)


def in_one_place(metadata: Any) -> None:
    """Both weights in the same bytes."""
    vars(place(metadata, A)).update(vars(place(metadata, B)))


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


BYTEARRAY_OF_A_TERABYTE = b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"."
MEMO_OF_2_BILLION = b"\x80\x04]r\xff\xff\xff\x7f."
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no description": (replaced(".metadata", lambda file: None), "No such file or directory"),
    "rubbish for a description": (written(".metadata", b"rubbish"), "can't be read"),
    "half a description": (lambda f: written(".metadata", (f / ".metadata").read_bytes()[:300])(f), "can't be read"),
    "a function for a description": (written(".metadata", pickle.dumps(os.system)), "no part of a checkpoint's"),
    "a dictionary for a description": (written(".metadata", pickle.dumps({"a": 1})), "where a Metadata should be"),
    "a description that announces a terabyte": (written(".metadata", BYTEARRAY_OF_A_TERABYTE), "KeyError"),
    "a description with a memo of 32 GB": (written(".metadata", MEMO_OF_2_BILLION), "where a Metadata should be"),
    "12 GB": (sized(3 * 2**30), r"__0_0.distcp is smaller than .metadata says"),
    "4 TB": (sized(2**20, 2**20), r"__0_0.distcp is smaller than .metadata says"),
    "a size that overflows": (sized(2**62), "something else than tensors"),
    "another shape": (sized(4, 3), "another shape or type"),
    "another type": (
        described(lambda m: vars(m.state_dict_metadata[A].properties).update(dtype=torch.int8)),
        "another shape or type",
    ),
    "a path upwards": (stored(relative_path="../outside.pt"), "none of the folder's files"),
    "an absolute path": (stored(relative_path="/etc/passwd"), "none of the folder's files"),
    "a part that begins behind the end": (stored(offset=2**40), "is smaller than .metadata says"),
    "a part that begins before the file": (stored(offset=-1), "none of the folder's files"),
    "a part of ten bytes": (stored(length=10), "is smaller than .metadata says"),
    "a part with a filter": (stored(transform_descriptors=["zstd"]), "none of the folder's files"),
    "two weights in one place": (described(in_one_place), "parts overlap in __0_0.distcp"),
    "a part of no weight": (described(lambda m: m.state_dict_metadata.pop(A)), "can't be read"),
    "no place for a weight": (described(lambda m: m.storage_data.clear()), "can't be read"),
    "a weight without parts": (described(lambda m: m.state_dict_metadata[A].chunks.clear()), "are missing"),
    "a key that is no JSON": (named("{"), "can't be read"),
    "a key that is no place": (named('"a"'), "can't be read"),
    "a key of nothing": (named("[]"), "can't be read"),
    "a key of lists in lists": (named("[" * 9000), "can't be read"),
    "a key that isn't in the rest": (named('["other", "a"]'), "can't be read"),
    "a key of another value": (named('["global_step"]'), "is in rest.pt already"),
    "a shard cut off": (lambda f: os.truncate(f / "__0_0.distcp", 100), "is smaller than .metadata says"),
    "no shard": (replaced("__0_0.distcp", lambda file: None), "none of the folder's files"),
    "a link for a shard": (replaced("__0_0.distcp", lambda f: f.symlink_to("/dev/zero")), "no regular file"),
    "a link to a file": (replaced("rest.pt", lambda f: f.symlink_to("../outside.pt")), "no regular file"),
    "a pipe for a shard": (replaced("__0_0.distcp", os.mkfifo), "no regular file"),
    "a pipe for a description": (replaced(".metadata", os.mkfifo), "no regular file"),
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


@pytest.mark.parametrize("name", ["last.ckpt", "last.ckpt/__0_0.distcp", "last.ckpt/rest.pt"])
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
