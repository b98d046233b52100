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
from tests.shared import succeeded

pytestmark = pytest.mark.deep

COMPARED = (
    "metrics.csv",
    "predictions_test.csv",
    "model/model.safetensors",
    "model/config.json",
    "splits.csv",
)
Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def whole(
    cli: Cli, tiny: tuple[str, ...], drawn_pets: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run folder of a training that had room; not to be changed."""
    root = tmp_path_factory.mktemp("whole")
    succeeded(cli("fit", drawn_pets, *tiny, f"--runs_root={root}"))
    return root / "pets"


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
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    *_, last = outcome.err.splitlines()
    assert last.startswith("moevision: ")
    assert "No space left" in last
    assert last.endswith(" fit --resume runs/full.")
    assert not list(small_disk.rglob("*.tmp"))
    assert not Path("runs/full/summary.json").exists()

    trained = []
    monkeypatch.setattr(Stopwatch, "on_train_batch_end", lambda *given: trained.append(given))
    again = cli("fit", "--resume", "runs/full")
    assert again.code == 2, "the disk is still full, and it is said again"
    assert again.err.splitlines()[-1].endswith(" fit --resume runs/full.")
    (small_disk / "filler").unlink()
    outcome = succeeded(cli("fit", "--resume", "runs/full"))
    assert trained == []
    for name in COMPARED:
        assert (Path("runs/full") / name).read_bytes() == (whole / name).read_bytes(), name
    assert Path("runs/full/summary.md").is_file()
