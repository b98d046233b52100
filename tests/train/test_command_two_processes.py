"""`moevision fit` with two processes (gloo, CPU): one run folder, and a resumed run that is the uninterrupted one.

Each case is the whole command in processes of its own: one by torchrun in new interpreters, and those that our launcher
starts where one dies in starting up; the others in forks of one that has imported torch. Dropout, router noise,
stochastic depth, Mixup, TrivialAugment and a moving average are on, and the two processes draw different numbers, so
that each one's generators must come back.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import moevision
from moevision.data import ImageDataModule
from moevision.files import read_csv
from tests.forks import Forked
from tests.shared import missing

pytestmark = pytest.mark.deep

OURS = ["-m"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
# 96 images, 2 x 8 of them in a step: 6 steps an epoch, 2 epochs. 33 test images can't be halved.
OPTIONS = (
    *(
        "--model.arch.name=test_vit_moe",
        "--model.arch.proj_drop_rate=0.1",
        "--model.arch.drop_path_rate=0.1",
    ),
    *("--data.image_size=32", "--data.batch_size=8", "--data.train_size=96", "--data.val_size=33"),
    *(
        "--data.test_size=33",
        "--data.augment=trivialaugment",
        "--data.mixup=0.3",
        "--ema.decay=0.9",
    ),
    *("--trainer.precision=32-true", "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1"),
    *("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.strategy=ddp"),
)
TWO = (*OPTIONS, "--trainer.devices=2")
SHARDED = (
    *(option for option in TWO if "strategy" not in option),
    "--parallel=fsdp",
    "--parallel.expert=2",
)
SAME = ("metrics.csv", "predictions_test.csv", "model/model.safetensors")
KILLED = (
    "Process 1 of this training was killed, by somebody or by a system that has run out of memory."
)
FIRST_KILLED = (
    KILLED.replace("1", "0") + " To go on: moevision fit --resume with the run folder named above."
)
WAIT_S = 900  # of patience with a busy machine; a run takes 12 s of CPU
SILENT_S = 30  # from the end of a process to another one's sentence about it


def start(
    folder, *arguments, launcher=OURS, new=False, others=2, faults=""
) -> subprocess.Popen[str] | Forked:
    """Begin a training; `new`: in new interpreters, else in forks, as many beside it as the launcher starts."""
    package = str(Path(moevision.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
    program = ["tests.train.struck", faults] if faults else ["moevision"]
    command = [*launcher, *program, "fit", *arguments]
    if not new:
        return Forked(command, folder, environment, others)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(
        [sys.executable, *command], cwd=folder, env=environment, start_new_session=True, **pipes
    )


def fit(folder: Path, *arguments: str, code: int = 0, **how: Any) -> str:
    """Run to the end; what all processes said."""
    process = start(folder, *arguments, **how)
    try:
        said, _ = process.communicate(timeout=WAIT_S)
    finally:
        _end(process)
    assert process.returncode == code, said[-3000:]
    return said


def interrupt(
    folder: Path, name: str, *arguments: str, rows: int, number: int, everybody: bool
) -> tuple[int, str]:
    """Train until metrics.csv has so many rows, then signal; the exit code and what was said."""
    process = start(folder, "synthetic_pets", *TWO, f"--name={name}", *arguments)
    metrics = folder / "runs" / name / "metrics.csv"
    try:
        wait_until(process, lambda: metrics.is_file() and metrics.read_bytes().count(b"\n") > rows)
        (os.killpg if everybody else os.kill)(process.pid, number)
        said, _ = process.communicate(timeout=WAIT_S)
    finally:
        _end(process)
    return process.returncode, said


def end_one(
    folder: Path, name: str, *arguments: str, until: str | None = None, first: bool = False
) -> str:
    """Kill one of two processes; all that was said, once somebody has said so and all have ended.

    It ends when the file `until` of the run is there; None: the second process, in a new interpreter, at once.
    """
    more = (*arguments, f"--name={name}")
    process = start(folder, "synthetic_pets", *more, others=2 if until else 0)
    try:
        there = (
            (folder / "runs" / name / until).exists if until else lambda: len(others(process)) == 2
        )
        wait_until(process, there)
        os.kill(others(process)[0 if first else 1], signal.SIGKILL)
        hear(process, "was killed")
        said, _ = process.communicate(timeout=WAIT_S)
    finally:
        _end(process)
    assert process.returncode == 2, said[-3000:]
    assert "Traceback" not in said
    return said


def others(process: subprocess.Popen[str] | Forked) -> list[int]:
    """The processes that it has started."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(each) for each in found.stdout.split()]


def wait_until(process: subprocess.Popen[str] | Forked, there: Callable[[], bool]) -> None:
    """Wait for what a training will do, as long as it lives."""
    until = time.monotonic() + WAIT_S
    while not there():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < until
        time.sleep(0.005)


def hear(process: subprocess.Popen[str] | Forked, words: str) -> None:
    """Wait until one of its processes says this, for at most `SILENT_S`."""
    until = time.monotonic() + SILENT_S
    while words not in (said := cast(Forked, process).said()):
        assert time.monotonic() < until, said[-3000:]
        time.sleep(0.05)


def _end(process: subprocess.Popen[str] | Forked) -> None:
    """Whatever happens, leave none of the processes behind."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def whole(work: Path) -> tuple[Path, str]:
    """The run folder of a training by two processes that nobody interrupted, and what was said."""
    return work / "runs" / "whole", fit(work, "synthetic_pets", *TWO, "--name=whole")


@pytest.fixture(scope="module")
def stopped(work: Path) -> tuple[int, str]:
    """Exit code and words of a run that was stopped early, runs/mid-epoch; runs/launched and runs/fewer are copies."""
    found = interrupt(work, "mid-epoch", rows=3, number=signal.SIGTERM, everybody=False)
    for name in ("launched", "fewer"):
        shutil.copytree(work / "runs" / "mid-epoch", work / "runs" / name)
    return found


def differing(run: Path, other: Path) -> list[str]:
    return [name for name in SAME if (run / name).read_bytes() != (other / name).read_bytes()]


def test_one_run_folder_and_one_voice(work, whole):
    """Every file is there once, as from one process, and nothing is said twice."""
    run, said = whole
    assert not [path for path in (work / "runs").iterdir() if path.name.startswith("whole-")]
    for name in (
        "config.yaml",
        "sessions.json",
        "provenance.json",
        "summary.md",
        "checkpoints/last.ckpt",
        *SAME,
    ):
        assert (run / name).is_file(), name
    lines = [line for line in said.splitlines() if line.strip()]
    assert sorted(line for line in set(lines) if lines.count(line) > 1) == []
    assert "batch 8 x 2 processes" in said
    assert len(json.loads((run / "sessions.json").read_text())) == 1


def test_every_test_picture_is_predicted_once(whole):
    """33 images over two processes, in the order of one; the summary counts what predictions_test.csv says."""
    rows = read_csv(whole[0] / "predictions_test.csv")
    data = ImageDataModule("synthetic_pets", image_size=32, train_size=8, val_size=8, test_size=33)
    data.setup("test")
    assert [row["image"] for row in rows] == [data.sample_id("test", index) for index in range(33)]
    test = json.loads((whole[0] / "summary.json").read_text())["test"]
    assert (test["correct"], test["total"]) == (sum(int(row["correct"]) for row in rows), 33)


def test_each_process_draws_numbers_of_its_own(whole):
    """Both states are in the checkpoint, and they are not the same."""
    first, second = torch.load(whole[0] / "checkpoints" / "last.ckpt", weights_only=True)[
        "moevision"
    ]["random"]
    assert not torch.equal(first["torch"], second["torch"])
    assert first["python"] != second["python"]
    assert first["numpy"] != second["numpy"]


def test_ctrl_c_stops_both_processes_and_one_of_them_says_so(work):
    found, said = interrupt(work, "later", rows=10, number=signal.SIGINT, everybody=True)
    assert found == 130, said[-3000:]
    assert said.splitlines()[-1].endswith("fit --resume runs/later")
    assert said.count("Stopped by") == 1


@pytest.mark.parametrize("name", ["mid-epoch", "killed"])
def test_interrupted_and_resumed_is_uninterrupted(work, whole, stopped, name):
    """One process is signalled, or killed; the command that is printed goes on, both processes again."""
    found, said = stopped
    if name == "killed":
        found, said = interrupt(work, name, rows=15, number=signal.SIGKILL, everybody=False)
        assert found == -signal.SIGKILL, said[-3000:]
    else:
        assert found == 143, said[-3000:]
        assert said.splitlines()[-1].endswith(f"fit --resume runs/{name}")
        assert said.count("Stopped by") == 1
    again = fit(work, "--resume", f"runs/{name}")
    assert again.count(f"with runs/{name} from ") == 1
    assert "bit-identical" not in again
    assert differing(work / "runs" / name, whole[0]) == []


@pytest.mark.usefixtures("stopped")
def test_torchrun_goes_on_with_the_same_run(work, whole):
    """What our launcher began, torchrun ends; that it starts the same training, test_parallel_command.py tries."""
    fit(work, "--resume", "runs/launched", launcher=TORCHRUN, new=True)
    assert differing(work / "runs" / "launched", whole[0]) == []
    said = fit(
        work,
        "synthetic_pets",
        *OPTIONS,
        "--trainer.devices=1",
        "--name=one",
        launcher=TORCHRUN,
        code=1,
    )
    assert not missing(said, "2 processes", "Trainer expects 1", "--trainer.devices")
    assert not (work / "runs" / "one").exists()


@pytest.mark.usefixtures("stopped")
def test_a_changed_number_of_processes_is_said_before_training_starts(work):
    """With another number the order of the images is another one. One process instead of two takes as many steps.

    A step of two processes is 16 images, which are two batches of one; 12 steps in all.
    """
    said = fit(work, "--resume", "runs/fewer", "--trainer.devices=1")
    assert not missing(said, "(--trainer.devices) was 2, now 1", "2 batches", "16 images")
    summary = json.loads((work / "runs" / "fewer" / "summary.json").read_text())
    assert (summary["steps"], summary["batch_size"]) == (12, 16)
    interrupt(work, "more", "--trainer.devices=1", rows=10, number=signal.SIGTERM, everybody=False)
    said = fit(work, "--resume", "runs/more", "--trainer.devices=2")
    assert "(--trainer.devices) was 1, now 2" in said
    assert said.index("can't be bit-identical") < said.index("test images right")


def test_a_process_that_dies_in_starting_up_is_said_in_one_sentence(work):
    """Before it can join the first one, which waits for it in a call that no signal interrupts."""
    said = end_one(work, "killed-early", *TWO)
    assert said.splitlines()[-1] == f"moevision: {KILLED}"
    assert not list((work / "runs").glob("killed-early*")), "nothing of worth was in it"


@pytest.mark.parametrize(
    ("name", "options", "first"), [("lost", TWO, False), ("sharded-lost", SHARDED, True)]
)
def test_another_process_that_dies_is_said_in_one_sentence(work, name, options, first):
    """The other one ends with the command that goes on, not with a traceback."""
    more = ("--trainer.max_epochs=300", "--checkpoint.every_steps=3")
    said = end_one(work, name, *options, *more, until="checkpoints/last.ckpt", first=first)
    assert said.splitlines()[-1] == f"moevision: {FIRST_KILLED if first else KILLED}"
    assert f"run folder: runs/{name}\n" in said
    if not first:
        assert f":\nmoevision fit --resume runs/{name}\n" in said
