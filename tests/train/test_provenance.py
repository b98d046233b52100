"""provenance.json: complete, plain JSON, discreet, and right about whose commit it names."""

import json
import os
import platform
import shlex
import socket
import subprocess
from datetime import datetime, timedelta, timezone
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import moevision
from moevision.files import write_json_atomic, write_text_atomic
from moevision.train import provenance
from moevision.train.provenance import collect_provenance, git_state


def _git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    command = ["git", *identity, *arguments]
    return subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def _repository(folder: Path, *names: str, commit: str = ".") -> Path:
    """A repository with these files, of which `commit` is committed ("": none)."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x\n")
    _git(folder, "init", "--quiet")
    if commit:
        _git(folder, "add", commit)
        _git(folder, "commit", "--quiet", "-m", "first")
    return folder


def test_says_what_a_rerun_needs():
    command = ["moevision", "fit", "my photos", "--seed_everything", "3"]
    noon_in_tokyo = datetime(2026, 1, 2, 12, 0, tzinfo=timezone(timedelta(hours=9)))
    given = {"data_sha256": "ab" * 32, "extra": {"backend": "grouped"}, "started": noon_in_tokyo}
    record = collect_provenance(command=command, seed=3, **given)
    assert record["started_utc"] == "2026-01-02T03:00:00+00:00"
    assert record["moevision"] == moevision.__version__
    assert record["command"] == command
    assert shlex.split(record["command_line"]) == command  # can be pasted into a shell
    assert record["seed"] == 3
    assert record["data"]["file_list_sha256"] == "ab" * 32
    assert record["libraries"]["torch"] == version("torch")
    assert record["python"]["version"] == platform.python_version()
    assert record["hardware"]["torch_threads"] == torch.get_num_threads()
    assert record["hardware"]["memory_gib"] is None or record["hardware"]["memory_gib"] > 0.1
    assert record["run"] == {"backend": "grouped"}
    assert (
        json.loads(json.dumps(record, allow_nan=False)) == record
    )  # primitives only: nothing changes


def test_determinism_settings_follow_torch():
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        determinism = collect_provenance(command=["x"], seed=0, data_sha256=None)["determinism"]
    finally:
        torch.use_deterministic_algorithms(False)
    assert determinism["deterministic_algorithms"] is True
    assert determinism["warn_only"] is True


def test_names_neither_user_nor_host_nor_home(monkeypatch):
    real_host = platform.node()
    monkeypatch.setenv("USER", "ada-lovelace")
    monkeypatch.setenv("HOME", "/home/ada-lovelace")
    monkeypatch.setattr(platform, "node", lambda: "engine-room")
    monkeypatch.setattr(socket, "gethostname", lambda: "engine-room")
    said = json.dumps(
        collect_provenance(command=["moevision", "fit", "x"], seed=0, data_sha256=None)
    )
    private = ("ada-lovelace", "engine-room", f'"{real_host}"', str(provenance._PACKAGE_FOLDER))
    assert [secret for secret in private if secret in said] == []


def test_git_state_of_a_checkout(tmp_path):
    """And of a package without any commit, or in a repository that isn't its own: no commit describes the code."""
    files = ("package/code.py", "README.md")
    assert git_state(_repository(tmp_path / "new", *files, commit="") / "package") is None
    foreign = _repository(
        tmp_path / "foreign", ".venv/moevision/__init__.py", "thesis.tex", commit="thesis.tex"
    )
    assert git_state(foreign / ".venv" / "moevision") is None
    root = _repository(tmp_path / "own", *files)
    package = root / "package"
    clean = {"git_commit": _git(root, "rev-parse", "HEAD"), "dirty": False}
    assert git_state(package) == clean
    (root / "README.md").write_text("changed\n")
    assert git_state(package) == clean  # not part of the code that runs
    assert git_state(package, root / "README.md") == clean | {"dirty": True}
    (package / "new.py").write_text("y = 2\n")
    assert git_state(package) == clean | {"dirty": True}


def test_an_edited_configuration_is_dirty(tmp_path, monkeypatch):
    """Shipped configurations lie beside the package in a checkout: what ran isn't the commit's if one differs."""
    _repository(tmp_path, "package/code.py", "configs/quickstart.yaml", "README.md")
    monkeypatch.setattr(provenance, "_PACKAGE_FOLDER", tmp_path / "package")

    def dirty() -> bool:
        code = collect_provenance(command=["moevision"], seed=0, data_sha256=None)["code"]
        return bool(code["dirty"])

    assert not dirty()
    (tmp_path / "README.md").write_text("y\n")
    assert not dirty()
    (tmp_path / "configs/quickstart.yaml").write_text("y\n")
    assert dirty()


def test_no_git_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None


def test_write_json_atomic_replaces_whole_files(tmp_path):
    """Also with the name of a file that is no Unicode."""
    path, known = tmp_path / "new folder" / "a.json", {"a": [1, "ü", None, os.fsdecode(b"caf\xe9")]}
    write_json_atomic(path, known)
    for bad in ({"a": float("nan")}, {"a": Path("x")}):
        with pytest.raises((ValueError, TypeError)):
            write_json_atomic(path, bad)
    assert json.loads(path.read_text(encoding="utf-8")) == known  # the old file stands
    assert [entry.name for entry in path.parent.iterdir()] == [
        "a.json"
    ]  # and no neighbour was left


def test_a_failed_write_keeps_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "summary.md"
    write_text_atomic(path, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moevision.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
