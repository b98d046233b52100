"""`python -m benchmarks curve of RUN`: intervals and sentences by hand on invented records, and a small run's curve."""

import csv
import json
import math
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest

from benchmarks.curve.shares import (
    jobs,
    lines,
    schedule,
    sentences,
    table,
    verdict,
    with_interval,
)
from moevision.errors import UserError
from moevision.stats import Gap

T2, T3 = 12.7062, 4.30265
"""97.5 % quantiles of Student's t with one and two degrees of freedom, from a printed table."""


def record(by: str, share: float, seed: int, correct: int) -> dict:
    return {
        "by": by,
        "share": share,
        "seed": seed,
        "correct": correct,
        "total": 1000,
        "images": round(20_000 * share),
    }


RECORDS = [
    *(record("all", 1.0, seed, correct) for seed, correct in enumerate([900, 910, 890])),
    *(record("random", 0.9, seed, correct) for seed, correct in enumerate([896, 904, 888])),
    *(record("random", 0.7, seed, correct) for seed, correct in enumerate([880, 880, 850])),
    *(record("ccs", 0.7, seed, correct) for seed, correct in enumerate([898, 909, 887])),
]


def test_jobs_and_equal_steps():
    assert [job.name for job in jobs(["random", "ccs"], [0.5, 0.9], 2)] == [
        f"{name}-s{seed}"
        for seed in (0, 1)
        for name in ("all-1", "random-0.9", "random-0.5", "ccs-0.9", "ccs-0.5")
    ]
    config = {
        "data": {"batch_size": 128},
        "trainer": {"max_epochs": 10, "max_steps": -1, "devices": 1},
    }
    config["trainer"]["accumulate_grad_batches"] = 1
    assert schedule(config, 45_000) == (3510, 351)  # 351 whole batches of 128 in 45,000
    assert schedule(config, 100) == (10, 1)
    config["trainer"]["max_steps"] = 99
    assert schedule(config, 45_000) == (99, 351)
    for name, value, words in (
        ("max_epochs", -1, ""),
        ("devices", "auto", "several processes.*train the run with --trainer.devices 1"),
        ("accumulate_grad_batches", 2, "accumulates"),
        ("max_steps", -1, "neither"),
    ):
        config["trainer"] |= {"devices": 1, "accumulate_grad_batches": 1, name: value}
        if words:
            with pytest.raises(UserError, match=words):
                schedule(config, 45_000)


def test_paired_differences_by_hand():
    """random 70 %: -2, -3, -4 points, mean -3, spread 1; beside it ccs is +1.8, +2.9, +3.7."""
    rows = {(row.by, row.share): row for row in table(RECORDS, ["ccs", "random"])}
    assert list(rows) == [("all", 1.0), ("ccs", 0.7), ("random", 0.9), ("random", 0.7)]
    all_, drawn, ccs = rows["all", 1.0], rows["random", 0.7], rows["ccs", 0.7]
    assert (all_.mean, all_.sd, all_.images) == (pytest.approx(0.9), pytest.approx(0.01), 20_000)
    assert math.isnan(all_.beside_all.mean)
    assert vars(drawn.beside_all) == pytest.approx(
        {"mean": -3, "low": -3 - T3 / 3**0.5, "high": -3 + T3 / 3**0.5, "seeds": 3}, abs=1e-4
    )
    assert ccs.beside_all.mean == pytest.approx(-0.6 / 3)
    assert ccs.beside_random.mean == pytest.approx(8.4 / 3)
    assert math.isnan(drawn.beside_random.mean)


def test_an_interval_needs_a_spread():
    two = Gap.of([0.0, 2.0])
    assert (two.low, two.high) == pytest.approx((1 - T2, 1 + T2), abs=1e-3)
    for each in (Gap.of([0.5]), Gap.of([0.5, 0.5])):
        assert (each.mean, math.isnan(each.low), with_interval(each)) == (0.5, True, "+0.50")
        assert "isn't shown" in verdict(each, 1.0)
    assert with_interval(Gap.of([])) == "-"


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (-0.9, -0.1, "is shown to be as good"),
        (-1.1, 0.9, "isn't shown to be as good"),
        (-3.0, -1.5, "is shown to be worse"),
    ],
)
def test_what_an_interval_shows(low, high, words):
    assert words in verdict(Gap((low + high) / 2, low, high, 3), 1.0)


def test_sentences_and_rows():
    rows = table(RECORDS, ["random", "ccs"])
    drawn, chosen, level = sentences(rows, RECORDS, 1.0)
    assert "is shown to be worse" in drawn
    assert drawn.endswith(": -3.00 (-5.48 to -0.52) points.")
    assert "chosen by ccs, is shown to be as good as" in chosen
    assert level.endswith("over 3 seeds, on the same 1,000 test images.")
    assert "ccs           70 %     14,000    89.8 %   1.10  -0.20 (" in lines(rows)[-1]


def test_a_curve_is_gone_on_with(bench, tiny_run, tmp_path, monkeypatch, send_signal):
    """Equal steps on 25 images and on 13 of them; stopped in the first training, gone on with, not repeated."""
    monkeypatch.chdir(tmp_path)
    asked = (
        "curve",
        "of",
        tiny_run,
        "--by",
        "random",
        "--shares",
        "0.5",
        "--seeds",
        "1",
        "--out",
        "curve",
    )
    send_signal(3)
    stopped = bench(*asked)
    assert stopped.code == 143
    assert (
        "2 trainings of 6 steps, 0 of them done: all 25 images, and 50 % by random, with the seeds 0"
        in stopped.out
    )
    assert "The curve goes on by the same command" in stopped.err
    outcome = bench(*asked)
    assert outcome.code == 0, outcome.err
    assert "step 3 (verified)" in Path("curve/log.txt").read_text()
    assert (
        "Training on 50 % of the images, drawn at random, isn't shown to be as good as training"
        in outcome.out
    )
    assert list(Path("curve/trainings").iterdir()) == []
    found = list(csv.DictReader(Path("curve/curve.csv").read_text().splitlines()))
    assert [(row["by"], row["images"], row["seeds"]) for row in found] == [
        ("all", "25", "1"),
        ("random", "13", "1"),
    ]
    record = Path("curve/records/random-0.5-s0.json")
    assert '"steps": 6' in record.read_text()
    monkeypatch.setattr("moevision.train.fit.fit", None)
    again = bench(*asked)
    assert "2 of them done" in again.out
    assert again.out.splitlines()[-9:] == outcome.out.splitlines()[-9:]
    record.write_text(record.read_text().replace('"recipe": "', '"recipe": "0'))
    assert "is of another config.yaml or scores.csv" in bench(*asked).err


def test_a_curve_of_a_run_that_went_to_its_end(bench, tiny_run, tmp_path, monkeypatch):
    """Of 2 epochs of 3 steps. An update left out, as by fp16 while it looks for its scale, is no early end."""
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    begun = Mock(side_effect=UserError("A training began."))
    monkeypatch.setattr("moevision.train.fit.fit", begun)
    # It was gone on with where the images are now.
    (run / "config-2.yaml").write_text("data: {path: moved}")
    asked = ("curve", "of", run, "--by", "random", "--shares", "0.5", "--seeds", "1")
    known = json.loads((run / "summary.json").read_text())
    for change, words in (
        ({"steps": 5}, "The run took 5 steps, and its config.yaml says 6"),
        ({"steps": 5, "refused": 1}, "A training began."),
    ):
        (run / "summary.json").write_text(json.dumps(known | change))
        assert words in bench(*asked).err
    assert "--data.path=moved" in begun.call_args.args[0].command
