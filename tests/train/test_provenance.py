"""provenance.json: complete, plain JSON, discreet, and right about whose commit it names."""

import json
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


def test_says_what_a_rerun_needs():
    command = ["moevision", "fit", "my photos", "--seed_everything", "3"]
    record = collect_provenance(
        command=command, seed=3, data_sha256="ab" * 32, extra={"backend": "grouped"}
    )
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


def test_start_time_is_utc():
    noon_in_tokyo = datetime(2026, 1, 2, 12, 0, tzinfo=timezone(timedelta(hours=9)))
    record = collect_provenance(command=["x"], seed=None, data_sha256=None, started=noon_in_tokyo)
    assert record["started_utc"] == "2026-01-02T03:00:00+00:00"


def test_determinism_settings_follow_torch():
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        determinism = collect_provenance(command=["x"], seed=0, data_sha256=None)["determinism"]
    finally:
        torch.use_deterministic_algorithms(False)
    assert determinism["deterministic_algorithms"] is True
    assert determinism["warn_only"] is True


def _strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def test_names_neither_user_nor_host_nor_home(monkeypatch):
    real_host = platform.node()
    monkeypatch.setenv("USER", "ada-lovelace")
    monkeypatch.setenv("HOME", "/home/ada-lovelace")
    monkeypatch.setattr(platform, "node", lambda: "engine-room")
    monkeypatch.setattr(socket, "gethostname", lambda: "engine-room")
    said = _strings(collect_provenance(command=["moevision", "fit", "x"], seed=0, data_sha256=None))
    assert len(said) > 15
    private = ("ada-lovelace", "engine-room", str(provenance._PACKAGE_FOLDER))
    assert [text for text in said for secret in private if secret in text] == []
    assert real_host not in said


def test_git_state_of_a_checkout(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "code.py").write_text("x = 1\n")
    (tmp_path / "README.md").write_text("hello\n")
    _git(tmp_path, "init", "--quiet")
    assert git_state(package) is None  # nothing tracked yet, so no commit describes the code
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "--quiet", "-m", "first")
    clean = {"git_commit": _git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    assert git_state(package) == clean
    (tmp_path / "README.md").write_text("changed\n")
    assert git_state(package) == clean  # not part of the code that runs
    assert git_state(package, tmp_path / "README.md") == clean | {"dirty": True}
    (package / "new.py").write_text("y = 2\n")
    assert git_state(package) == clean | {"dirty": True}


def test_an_edited_configuration_is_dirty(tmp_path, monkeypatch):
    """Shipped configurations lie beside the package in a checkout: what ran isn't the commit's if one differs."""
    for name in ("package/code.py", "configs/quickstart.yaml", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x\n")
    _git(tmp_path, "init", "--quiet")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "--quiet", "-m", "first")
    monkeypatch.setattr(provenance, "_PACKAGE_FOLDER", tmp_path / "package")

    def dirty() -> bool:
        code = collect_provenance(command=["moevision"], seed=0, data_sha256=None)["code"]
        return bool(code["dirty"])

    assert not dirty()
    (tmp_path / "README.md").write_text("y\n")
    assert not dirty()
    (tmp_path / "configs/quickstart.yaml").write_text("y\n")
    assert dirty()


def test_a_package_installed_inside_a_foreign_repository_has_no_commit(tmp_path):
    site_packages = tmp_path / ".venv" / "site-packages" / "moevision"
    site_packages.mkdir(parents=True)
    (site_packages / "__init__.py").write_text("")
    (tmp_path / "thesis.tex").write_text("hello\n")
    _git(tmp_path, "init", "--quiet")
    _git(tmp_path, "add", "thesis.tex")
    _git(tmp_path, "commit", "--quiet", "-m", "thesis")
    assert git_state(site_packages) is None


def test_no_git_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None


def test_write_json_atomic_replaces_whole_files(tmp_path):
    path = tmp_path / "new folder" / "a.json"
    write_json_atomic(path, {"a": [1, "ü", None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1, "ü", None]}
    for bad in ({"a": float("nan")}, {"a": Path("x")}):
        with pytest.raises((ValueError, TypeError)):
            write_json_atomic(path, bad)
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "a": [1, "ü", None]
    }  # the old file stands
    assert [entry.name for entry in path.parent.iterdir()] == [
        "a.json"
    ]  # and no neighbour was left


def test_file_names_that_are_not_unicode_stay_valid_json(tmp_path):
    command = ["moevision", b"caf\xe9".decode("utf-8", "surrogateescape")]
    write_json_atomic(tmp_path / "a.json", command)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == command


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
