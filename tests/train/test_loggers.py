"""What a logger beside metrics.csv gets."""

from pathlib import Path

import pytest

from moevision.files import read_csv
from tests.shared import succeeded


@pytest.mark.needs("tensorboard")
def test_a_run_with_tensorboard_keeps_its_own_files(cli, tiny, drawn_pets, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    logger = ("--trainer.logger={class_path: TensorBoardLogger, init_args: {save_dir: logs}}",)
    succeeded(cli("fit", drawn_pets, *tiny, *logger))
    run = Path("runs/pets")
    assert {"config.yaml", "metrics.csv", "curves.png", "summary.md"} <= {
        file.name for file in run.iterdir()
    }
    (folder,) = {
        file.parent for file in Path("logs").rglob("events.out.*")
    }  # a file for fit, one for the test
    found = EventAccumulator(str(folder))
    found.Reload()
    tags = set(found.Tags()["scalars"])
    assert {"val/top1", "train/loss", "moe/1/load_max", "moe/3/entropy"} <= tags
    rows = [row for row in read_csv(run / "metrics.csv") if row["val/top1"]]
    assert len(rows) == len(found.Scalars("val/top1")) == 2
    load = [float(row["moe/1/load_max"]) for row in rows]
    # the test adds a value of its own at the end
    assert [event.value for event in found.Scalars("moe/1/load_max")][:2] == pytest.approx(
        load, rel=1e-6
    )
