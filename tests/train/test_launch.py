"""Processes that Lightning starts for a training are looked after until its last trainer is done."""

import threading
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
    return SimpleNamespace(strategy=strategy, state=state, num_nodes=1, num_devices=2)


def test_a_process_that_dies_in_the_twins_training_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's launcher has started it, and the run's trainer is done; the twin's starts no others."""
    lost = SimpleNamespace(poll=lambda: -9, kill=lambda: None, wait=lambda patience: -9)
    launchers = [_SubprocessScriptLauncher(LightningEnvironment(), 2, 1) for _ in range(2)]
    launchers[0]._call_children_scripts = lambda: launchers[0].procs.append(lost)  # type: ignore[method-assign]
    ended, processes = threading.Event(), module.Processes()
    said: list[str] = []

    def end(code: int) -> None:
        ended.set()
        processes._closed.set()

    monkeypatch.setattr(module.os, "_exit", end)
    monkeypatch.setattr(module, "tell", said.append)
    monkeypatch.setattr(module, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(module, "several_processes", lambda: False)
    processes.watch(_trainer(launchers[0], TrainerStatus.FINISHED), lambda: "the run's")
    launchers[0]._call_children_scripts()
    assert not ended.wait(0.3), "nothing waits for the lost process"
    processes.watch(_trainer(launchers[1], TrainerStatus.RUNNING), lambda: "the twin's")
    try:
        assert ended.wait(30)
    finally:
        processes._closed.set()
    assert said == ["moevision: the twin's"]
