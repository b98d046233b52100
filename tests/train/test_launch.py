"""How the processes of a training are started, where no other test starts them."""

from pathlib import Path

import pytest

from moevision.train import fit as training
from tests.shared import refused


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ({}, "Use `--ntasks-per-node=4` instead. Start the command with srun."),
        ({"NTASKS_PER_NODE": "4"}, "This job has 4 tasks, and only srun starts them"),
    ],
    ids=["--ntasks", "--ntasks-per-node"],
)
def test_a_batch_script_of_slurm_without_srun(
    job, said, cli, tiny, drawn_pets, monkeypatch, own_folder
):
    """One process runs, and would wait for the others or train alone on an image of two."""
    places = {"PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in {
        "JOB_NAME": "train.sh",
        "JOB_ID": "7",
        "NTASKS": "4",
        **places,
        **job,
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    options = ("--trainer.accelerator=cpu", "--trainer.devices=4", "--trainer.strategy=ddp")
    refused(cli("fit", drawn_pets, *tiny, *options), said)
    assert not list(Path("runs").glob("*"))


@pytest.mark.parametrize(
    ("asked", "number"), [((), 1), (("--trainer.devices=1",), 1), (("--trainer.devices=3",), 3)]
)
def test_as_many_processes_as_devices(
    asked, number, cli, tiny, drawn_pets, monkeypatch, own_folder
):
    """Also where a run with three of them goes on, and says nothing of them."""
    started = list[int]()

    def start(devices: int) -> None:
        started.append(devices)
        raise SystemExit(7)

    monkeypatch.setattr(training, "start_processes", start)
    outcome = cli(
        "fit", drawn_pets, *tiny, "--trainer.accelerator=cpu", *asked, "--trainer.max_steps=1"
    )
    assert (outcome.code, started) == ((0, []) if number == 1 else (7, [number])), outcome.err
    if number == 1:
        config = Path("runs/pets/config.yaml")
        config.write_text(config.read_text().replace("devices: 1", "devices: 3"))
        assert cli("fit", "--resume", "runs/pets").code == 7
        assert cli("fit", "--resume=auto", "--name=pets").code == 7
        assert started == [3, 3]


def test_two_devices_beside_apples_gpu_are_two_processes_on_the_cpu(monkeypatch):
    """Lightning's `auto` would take the GPU, which can't be used."""
    started = list[int]()
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("platform.processor", lambda: "arm")
    monkeypatch.setattr(training, "start_processes", started.append)
    training.start_one_each({"accelerator": "auto", "devices": 2, "num_nodes": 1})
    assert started == [2]
