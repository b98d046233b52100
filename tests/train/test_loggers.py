"""What a logger beside metrics.csv gets."""

import csv
from pathlib import Path

import pytest

from moevision.train.health import condensed

METRICS = {
    "val/top1": 0.5,
    **{f"moe/{layer}/load_max": 1.0 + layer for layer in (1, 3)},
    **{f"moe/{layer}/entropy": float(layer) for layer in (1, 3)},
    **{f"moe/{layer}/dead": 1.0 for layer in (1, 3)},
    **{f"moe/{layer}/load_cv2": 0.1 for layer in (1, 3)},
}
BRIEF = {"moe/load_max": 4.0, "moe/entropy": 2.0, "moe/dead": 2.0}


def test_in_brief_by_hand():
    assert condensed(METRICS, per_layer=False) == {"val/top1": 0.5, **BRIEF}


def test_per_layer():
    assert condensed(METRICS, per_layer=True) == {**METRICS, **BRIEF}
    assert condensed({"lr": 0.1}, per_layer=True) == {"lr": 0.1}


@pytest.mark.needs("tensorboard")
def test_a_run_with_tensorboard_keeps_its_own_files(cli, tiny, drawn_pets, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    logger = ("--trainer.logger={class_path: TensorBoardLogger, init_args: {save_dir: logs}}",)
    outcome = cli("fit", drawn_pets, *tiny, *logger)
    assert outcome.code == 0, outcome.err
    run = Path("runs/pets")
    assert {"config.yaml", "metrics.csv", "curves.png", "summary.md"} <= {file.name for file in run.iterdir()}
    (folder,) = {file.parent for file in Path("logs").rglob("events.out.*")}  # a file for fit, one for the test
    found = EventAccumulator(str(folder))
    found.Reload()
    tags = set(found.Tags()["scalars"])
    assert {"val/top1", "train/loss", "moe/load_max", "moe/entropy", "moe/dead"} <= tags
    assert not any(tag.startswith(("moe/1/", "moe/3/")) for tag in tags)
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/top1"]]
    assert len(rows) == len(found.Scalars("val/top1")) == 2
    worst = [max(float(row[f"moe/{layer}/load_max"]) for layer in (1, 3)) for row in rows]
    # the test adds a value of its own at the end
    assert [event.value for event in found.Scalars("moe/load_max")][:2] == pytest.approx(worst, rel=1e-6)
