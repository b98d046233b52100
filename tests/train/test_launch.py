"""Processes that Lightning starts for a training are looked after until its last trainer is done."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerStatus

from moevision.train import processes as module


def _trainer(launcher: _SubprocessScriptLauncher, status: TrainerStatus) -> Any:
    strategy, state = SimpleNamespace(launcher=launcher), SimpleNamespace(status=status)
    return SimpleNamespace(strategy=strategy, state=state, num_nodes=1, num_devices=2, world_size=2)


@pytest.mark.parametrize(
    ("job", "devices", "said"),
    [
        ({"SLURM_NTASKS": "4"}, 4, "Use `--ntasks-per-node=4` instead. Start the command with srun."),
        ({"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4"}, 4, "This job has 4 tasks, and only srun starts them"),
        ({"SLURM_NTASKS": "1"}, 2, "expects 2 processes and 1 was started: begin the command with srun"),
    ],
    ids=["--ntasks", "--ntasks-per-node", "--gpus"],
)
def test_a_batch_script_of_slurm_without_srun(
    job: dict[str, str],
    devices: int,
    said: str,
    cli: Any,
    tiny: Any,
    drawn_pets: Path,
    monkeypatch: Any,
    tmp_path: Path,
) -> None:
    """One process runs, and would wait for the others or train alone on an image of two."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"JOB_NAME": "train.sh", "JOB_ID": "7", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    options = ("--trainer.accelerator=cpu", f"--trainer.devices={devices}", "--trainer.strategy=ddp")
    outcome = cli("fit", drawn_pets, *tiny, *options)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith("moevision: ")
    assert said in outcome.err.splitlines()[-1]
    assert not list(Path("runs").glob("*"))


def test_a_process_that_dies_in_the_twins_training_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's launcher has started it, and the run's trainer is done; the twin's starts no others."""
    lost = SimpleNamespace(poll=lambda: -9, kill=lambda: None, wait=lambda patience: -9)
    launchers = [_SubprocessScriptLauncher(LightningEnvironment(), 2, 1) for _ in range(2)]
    launchers[0]._call_children_scripts = lambda: launchers[0].procs.append(lost)  # type: ignore[method-assign]
    ended, processes = threading.Event(), module.Processes(lambda: " Go on.")
    said, given_up = list[str](), list[str]()

    def end(code: int) -> None:
        ended.set()
        processes._closed.set()

    monkeypatch.setattr(module.os, "_exit", end)
    monkeypatch.setattr(module, "tell", said.append)
    monkeypatch.setattr(module, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(module, "several_processes", lambda: False)
    processes.watch(_trainer(launchers[0], TrainerStatus.FINISHED), lambda: given_up.append("the run"))
    launchers[0]._call_children_scripts()
    assert not ended.wait(0.3), "nothing waits for the lost process"
    processes.watch(_trainer(launchers[1], TrainerStatus.RUNNING), lambda: given_up.append("the twin"))
    try:
        assert ended.wait(30)
    finally:
        processes._closed.set()
    assert given_up == ["the twin"]
    assert said == [f"moevision: Process 1 of this training was killed{module._BY_WHOM}. Go on."]


@pytest.mark.deep
@pytest.mark.skipif(os.name != "posix", reason="a process can't be looked for elsewhere")
def test_a_process_whose_first_one_is_gone_says_so_and_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be gone before this one has imported anything; nothing else would tell it for half an hour."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    ended = threading.Event()
    monkeypatch.setattr(module.os, "_exit", lambda code: ended.set())
    monkeypatch.setattr(module, "is_main_process", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(module.HANDED_ON, json.dumps([gone.pid, []]))
    module.Processes(lambda: " Go on.")
    assert ended.wait(30)
    said = capsys.readouterr().err
    assert said == f"moevision: The first process of this training crashed or was killed{module._BY_WHOM}. Go on.\n"
