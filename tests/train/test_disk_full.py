"""A disk that is really full (a small tmpfs) while a finished training writes its report: nothing is lost."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moevision.train import finish
from moevision.train.health import Stopwatch
from tests.shared import refused, succeeded

pytestmark = pytest.mark.deep

COMPARED = (
    "metrics.csv",
    "predictions_test.csv",
    "model/model.safetensors",
    "model/config.json",
    "splits.csv",
)
Cli = Callable[..., Any]


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty file system of 24 MB, which is the current folder."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a file system, on Linux")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    monkeypatch.chdir(disk)
    yield disk
    monkeypatch.undo()
    subprocess.run(["umount", disk], check=True)


def fill(disk: Path) -> None:
    """Leave not one free byte."""
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass
    assert shutil.disk_usage(disk).free == 0


@pytest.mark.parametrize(
    "before", ["save_model", "csv_text", "plot_confusion", "_write_summary", "model_card"]
)
def test_a_disk_that_is_full_when_the_report_is_written(
    before,
    cli,
    tiny,
    drawn_pets,
    whole,
    small_disk,
    monkeypatch,
):
    """One sentence with the command that ends the job; it trains no step, and all is as it would have been."""
    with monkeypatch.context() as patched:
        real = getattr(finish, before)
        patched.setattr(
            finish, before, lambda *given, **named: (fill(small_disk), real(*given, **named))[1]
        )
        outcome = cli("fit", drawn_pets, *tiny, "--name=full")
    refused(outcome, "No space left")
    assert outcome.err.endswith(" fit --resume runs/full.\n")
    assert not list(small_disk.rglob("*.tmp"))
    assert not Path("runs/full/summary.json").exists()

    trained = []
    monkeypatch.setattr(Stopwatch, "on_train_batch_end", lambda *given: trained.append(given))
    again = cli("fit", "--resume", "runs/full")
    assert refused(again).err.endswith(" fit --resume runs/full.\n"), (
        "the disk is still full, and it is said again"
    )
    (small_disk / "filler").unlink()
    outcome = succeeded(cli("fit", "--resume", "runs/full"))
    assert trained == []
    for name in COMPARED:
        assert (Path("runs/full") / name).read_bytes() == (whole / name).read_bytes(), name
    assert Path("runs/full/summary.md").is_file()
