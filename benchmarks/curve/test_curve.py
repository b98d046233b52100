"""`python -m benchmarks curve of RUN`: intervals by hand on invented records, and a small run's curve."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest

from benchmarks.curve import jobs, results, shown
from moevision.stats import Gap


def test_jobs() -> None:
    assert [(job.row, job.seed) for job in jobs(["random", "ccs"], [0.5, 0.9], 2)] == [
        (name, seed)
        for seed in (0, 1)
        for name in ("all-1", "random-0.9", "random-0.5", "ccs-0.9", "ccs-0.5")
    ]


def test_paired_differences_by_hand() -> None:
    """random 70 %: -2, -3, -4 points, spread 1, and 4.303 / √3 is 2.48; beside it ccs is +1.8, +2.9, +3.7."""
    correct = {
        ("all", 1.0): [900, 910, 890],
        ("random", 0.7): [880, 880, 850],
        ("ccs", 0.7): [898, 909, 887],
    }
    runs = [
        {"by": by, "share": share, "seed": seed, "correct": right, "total": 1000, "images": 20_000}
        for (by, share), own in correct.items()
        for seed, right in enumerate(own)
    ]
    _, _, everything, drawn, chosen = results(runs, 1.0).splitlines()
    assert everything == "| all-1 | 20,000 | 90.0 |  |  |  |"
    assert drawn == "| random-0.7 | 20,000 | 87.0 | −3.0 (−5.5 to −0.5) | worse |  |"
    assert chosen.startswith(
        "| ccs-0.7 | 20,000 | 89.8 | −0.2 (−0.4 to +0.0) | as good to within 1"
    )
    assert chosen.endswith("| +2.8 (+0.4 to +5.2) |")


@pytest.mark.parametrize(
    ("gaps", "words"),
    [
        ([-0.002, -0.004, -0.003], "as good to within 1 points"),
        ([-0.02, 0.02, 0.0], "not shown to be as good"),
        ([0.5], "not shown to be as good"),  # one seed has no interval
        ([-0.02, -0.021, -0.022], "worse"),
    ],
)
def test_what_an_interval_shows(gaps: list[float], words: str) -> None:
    assert shown(Gap.of(gaps), 1.0) == words


def test_a_curve_is_gone_on_with(bench, tiny_run, tmp_path, monkeypatch, send_signal) -> None:
    """Equal steps on 25 images and on 13 of them; stopped in the first training, gone on with, not repeated."""
    monkeypatch.chdir(tmp_path)
    choice = ("--by", "random", "--shares", "0.5", "--seeds", "1", "--out", "curve")
    send_signal(3)
    stopped = bench("curve", "of", tiny_run, *choice)
    assert stopped.code == 143
    assert "2 trainings of 6 steps, 0 of them done" in stopped.out
    outcome = bench("curve", "of", tiny_run, *choice)
    assert outcome.code == 0, outcome.err
    assert "step 3 (verified)" in Path("curve/log.txt").read_text()
    assert list(Path("curve/trainings").iterdir()) == []
    record = json.loads(Path("curve/record.json").read_text())
    assert [(run["by"], run["images"], run["steps"]) for run in record["runs"]] == [
        ("all", 25, 6),
        ("random", 13, 6),
    ]
    monkeypatch.setattr("moevision.train.fit.fit", None)
    again = bench("curve", "of", tiny_run, *choice)
    assert "2 of them done" in again.out
    assert again.out.splitlines()[-4:] == outcome.out.splitlines()[-4:]
    Path("curve/record.json").write_text(json.dumps({**record, "settings": {"recipe": "other"}}))
    assert "holds runs with another recipe" in bench("curve", "of", tiny_run, *choice).err


def test_it_trains_on_the_images_where_they_are_now(bench, tiny_run, tmp_path, monkeypatch) -> None:
    """A run that was gone on with elsewhere."""
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    (run / "config-2.yaml").write_text("data: {path: moved}")
    begun = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr("moevision.train.fit.fit", begun)
    with pytest.raises(KeyboardInterrupt):
        bench("curve", "of", run, "--seeds", "1")
    assert "--data.path=moved" in begun.call_args.args[0].command


def test_a_run_of_two_processes_is_refused(bench, tiny_run, tmp_path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("devices: 1", "devices: 2"))
    assert "--trainer.devices 1" in bench("curve", "of", run).err
