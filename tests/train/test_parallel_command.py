"""`moevision fit --parallel fsdp --parallel.expert 2` with two processes (gloo, CPU): a run folder like any other."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file

from moevision.train.checkpoint import load_trained
from tests.shared import missing
from tests.train.test_command_two_processes import (
    FIRST_KILLED,
    KILLED,
    SHARDED,
    TORCHRUN,
    TWO,
    differing,
    end_one,
    fit,
    start,
    wait_until,
)

pytestmark = pytest.mark.deep


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def whole(work: Path) -> tuple[Path, str]:
    """The run folder of a training that nobody interrupted, and what was said."""
    return work / "runs" / "whole", fit(work, "synthetic_pets", *SHARDED, "--name=whole")


@pytest.fixture(scope="module")
def stopped(work: Path) -> Path:
    """The run folder of a training that was stopped after three steps of 12."""
    process = start(
        work, "synthetic_pets", *SHARDED, "--name=stopped", "--checkpoint.every_steps=3"
    )
    wait_until(process, (work / "runs" / "stopped" / "checkpoints" / "last.ckpt").is_file)
    os.kill(cast(int, process.pid), signal.SIGTERM)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 143, said[-3000:]
    for name in ("unsharded", "replicated", "alone"):
        shutil.copytree(work / "runs" / "stopped", work / "runs" / name)
    return work / "runs" / "stopped"


def test_the_exported_model_is_the_tested_checkpoint(whole):
    """Weights are whole again, on one file; every file of a run is there, and the plan says how it is shared."""
    run, said = whole
    assert not missing(said, "over 2 processes (FSDP2)", "4 experts over 2", "2 each")
    assert (
        "images, how long they take isn't known before" in said
    )  # no device has to hold the whole model
    tested = (
        run / "checkpoints" / json.loads((run / "summary.json").read_text())["test"]["checkpoint"]
    )
    saved, model = torch.load(tested), load_file(run / "model" / "model.safetensors")
    assert {f"net.{name}" for name in model} <= saved["state_dict"].keys()
    for name, tensor in model.items():
        assert torch.equal(saved["state_dict"][f"net.{name}"], tensor), name
    loaded = load_trained(str(tested)).net.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.items())
    for name in ("summary.md", "provenance.json", "predictions_test.csv", "curves.png"):
        assert (run / name).is_file(), name
    assert json.loads((run / "summary.json").read_text())["test"]["total"] == 33
    lines = [line for line in said.splitlines() if line.strip()]
    assert sorted(line for line in set(lines) if lines.count(line) > 1) == []


@pytest.mark.parametrize(("name", "options"), [("replicas", TWO), ("shards", SHARDED)])
def test_two_processes_validate_both_checkpoints_together(work, name, options):
    """With a learning rate of 0 the first epoch is the best; 33 images can't be halved, and each counts once."""
    short = ("--data.train_size=32", "--trainer.max_epochs=2", "--model.optim.lr=1e-30")
    fit(work, "synthetic_pets", *options, *short, f"--name={name}")
    summary = (work / "runs" / name / "summary.md").read_text()
    assert not missing(summary, "(EMA) of the weights", "the last epoch", "33 validation images")


def test_interrupted_and_resumed_is_uninterrupted(work, whole, stopped):
    """Also where the first process's running statistics (BatchNorm) are the only ones that are saved."""
    said = fit(work, "--resume", "runs/stopped")
    assert "bit-identical" not in said
    assert differing(stopped, whole[0]) == []


def test_a_run_that_lacks_its_report_alone_goes_on(work, whole):
    """No step is left, so that weights are gathered for the first time where no gradient is kept."""
    run = Path(shutil.copytree(whole[0], work / "runs" / "unreported"))
    for name in ("summary.json", "predictions_test.csv"):
        (run / name).unlink()
    fit(work, "--resume", "runs/unreported")
    assert differing(run, whole[0]) == []


def test_torchrun_starts_the_same_training_and_a_dense_twin(work, whole):
    """The twin has no experts to divide: its weights are sharded alone."""
    said = fit(
        work, "synthetic_pets", *SHARDED, "--name=launched", "--with-twin", launcher=TORCHRUN
    )
    assert differing(work / "runs" / "launched", whole[0]) == []
    assert said.count("over 2 processes (FSDP2)") == 2
    assert (work / "runs" / "launched" / "twin" / "summary.md").is_file()


def test_a_process_is_killed_while_it_trains(work, whole):
    """The other one says what happened and how to go on, and who does so ends where nobody was killed."""
    every = "--checkpoint.every_steps=2"
    said = end_one(work, "killed", *SHARDED, every, until="checkpoints/previous.ckpt")
    assert said.splitlines()[-1] == f"moevision: {KILLED}"
    assert ":\nmoevision fit --resume runs/killed\n" in said
    fit(work, "--resume", "runs/killed")
    assert differing(work / "runs" / "killed", whole[0]) == []


def test_the_first_process_is_killed_before_it_trains(work):
    said = end_one(work, "unborn", *SHARDED, until="config.yaml", first=True)
    assert said.splitlines()[-1] == f"moevision: {FIRST_KILLED}"


def test_numbers_of_one_process_are_not_finite(work):
    """Its loss, and a gradient of an expert that only it holds: both processes leave these two of six updates out."""
    faults = "nan_loss@3:rank1, inf_grad@5:expert3:rank1"
    fit(work, "synthetic_pets", *SHARDED, "--name=struck", "--trainer.max_epochs=1", faults=faults)
    run = work / "runs" / "struck"
    assert json.loads((run / "summary.json").read_text())["steps"] == 6 - 2
    assert "2 updates left" in (run / "summary.md").read_text()
    assert all(
        tensor.isfinite().all()
        for tensor in load_file(run / "model" / "model.safetensors").values()
    )


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize(("name", "expert"), [("unsharded", 1), ("replicated", 2)])
def test_a_run_goes_on_under_another_layout(name, expert, work):
    said = fit(work, "--resume", f"runs/{name}", "--parallel=ddp", f"--parallel.expert={expert}")
    assert "--parallel.layout was fsdp, now ddp" in said
    divided = "parallel: weights on each of 2 processes, 4 experts over 2 of them, 2 each"
    assert (divided in said) == (expert > 1)
    assert (work / "runs" / name / "summary.md").is_file()


@pytest.mark.usefixtures("stopped")
def test_a_sharded_run_goes_on_in_one_process(work):
    """Half of the processes sum the gradients of two batches each: 12 steps of 16 images, as they were to be."""
    said = fit(
        work,
        "--resume",
        "runs/alone",
        "--trainer.devices=1",
        "--parallel.layout=null",
        "--parallel.expert=1",
    )
    assert "(--trainer.devices) was 2, now 1" in said
    summary = json.loads((work / "runs" / "alone" / "summary.json").read_text())
    assert (summary["steps"], summary["batch_size"]) == (12, 16)
    assert (work / "runs" / "alone" / "checkpoints" / "last.ckpt").is_file()
