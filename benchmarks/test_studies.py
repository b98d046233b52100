"""The studies in benchmarks/ run, go on where they stopped, call ties as they say, and tell it in a table."""

import json
import math

import pytest

from benchmarks import lines, routers, study
from benchmarks.routers import report as router_report


@pytest.fixture
def run(bench):
    """Run a study, which must end well; what it printed."""

    def run(*arguments):
        outcome = bench(*arguments)
        assert outcome.code == 0, outcome.err
        return outcome.out

    return run


def test_router_study_tunes_resumes_and_reports(run, bench, tmp_path, monkeypatch) -> None:
    best = {
        "dense twin": 2e-3,
        "vmoe_top_k": 8e-3,
    }  # the second one lies beyond the rates that are always tried

    def trained(data, key, steps):
        found = real(data, key, steps)
        return {**found, "val_top1": 0.5 - 0.1 * abs(math.log2(key["lr"] / best[key["row"]]))}

    real = routers.one_run
    monkeypatch.setattr(routers, "one_run", trained)
    out = tmp_path / "routers.json"
    common = (
        "--out",
        out,
        "--steps",
        2,
        "--pets",
        128,
        64,
        64,
        "--datasets",
        "synthetic_pets",
        "--rows",
    )
    run("routers", *common, "dense twin", "--seeds", 0)
    first = json.loads(out.read_text())["runs"]
    assert [(run["lr"], run["seed"]) for run in first] == [(1e-3, 0), (2e-3, 0), (4e-3, 0)]
    run("routers", *common, "dense twin", "vmoe_top_k", "--seeds", 1)
    record = json.loads(out.read_text())
    assert record["runs"][:3] == first  # kept, not trained again
    runs = {
        row: [(run["lr"], run["seed"]) for run in record["runs"] if run["row"] == row]
        for row in best
    }
    assert runs["dense twin"] == [(1e-3, 0), (2e-3, 0), (4e-3, 0), (2e-3, 1)]
    assert runs["vmoe_top_k"] == [(1e-3, 0), (2e-3, 0), (4e-3, 0), (8e-3, 0), (16e-3, 0), (8e-3, 1)]
    counts = [sum(layer["counts"]) for run in record["runs"] for layer in run["layers"]]
    assert counts == [64 * 16 * 2] * 2 * 6  # test images x patches x K, two layers, six runs
    assert "| `vmoe_top_k` |" in run(
        "routers", "--out", out, "--report", "--figure", tmp_path / "routers.png"
    )
    assert (tmp_path / "routers.png").stat().st_size > 1000
    assert "another steps" in bench("routers", "--out", out, "--steps", 3).err


def test_rows_take_one_learning_rate_unless_their_own_is_clearly_better() -> None:
    """A tenth of a point of validation accuracy once gave a router another rate than all others, and the last place."""
    tried = {
        "one": {1e-3: 0.44, 2e-3: 0.46, 4e-3: 0.45},
        "by luck": {0.5e-3: 0.45, 1e-3: 0.467, 2e-3: 0.466, 4e-3: 0.46},
        "clearly": {1e-3: 0.44, 2e-3: 0.455, 4e-3: 0.466, 8e-3: 0.46},
        "at the edge": {1e-3: 0.44, 2e-3: 0.45, 4e-3: 0.47},
    }
    assert router_report.chosen_rates(tried) == {"one": 2e-3, "by luck": 2e-3, "clearly": 4e-3}
    assert router_report.rate_beyond(tried["at the edge"]) == 8e-3
    assert router_report.rate_beyond({1e-3: 0.4, 2e-3: 0.3}) == 0.5e-3


def test_a_contrast_is_judged_by_its_own_spread() -> None:
    """Gaps of 1, 2 and 3 points: t = 2 √3 with 2 degrees of freedom, where p = 1 - t / √(t² + 2) = .0742 exactly, and
    the interval reaches 4.303 / √3 = 2.48 points (printed tables). A row that scatters widely must not blur it."""
    reference = {0: 0.50, 1: 0.55, 2: 0.40}
    rows = {
        "twin": reference,
        "near": {seed: value + 0.01 * (seed + 1) for seed, value in reference.items()},
        "sure": {seed: value + 0.02 + 0.0001 * seed for seed, value in reference.items()},
        "wild": {seed: value + 0.1 * (-1) ** seed for seed, value in reference.items()},
        "once": {0: 0.9},
    }
    near, sure, wild, once = study.contrasts(rows, [(name, "twin") for name in list(rows)[1:]])
    assert near.own_p == pytest.approx(1 - 2 * 3**0.5 / 14**0.5)
    assert near.interval == "+2.0 (−0.5 to +4.5)"
    assert near.p == pytest.approx(2 * near.own_p)  # the second smallest of three
    assert sure.p == pytest.approx(3 * sure.own_p)
    assert [each.verdict for each in (near, sure, wild)] == [
        "not told apart",
        "above",
        "not told apart",
    ]
    assert (once.interval, once.verdict) == ("+40.0", "not told apart")


def test_holms_adjustment() -> None:
    """Worked through by hand: 4 · .005, 3 · .01, then never less than the one before."""
    assert study.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_a_run_is_a_line_and_takes_the_place_of_an_earlier_one(tmp_path) -> None:
    out = tmp_path / "runs.jsonl"
    for name, steps in (("first", 1), ("second", 1), ("first", 2)):
        lines.put_run(out, {"name": name, "steps": steps})
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"name": "second", "steps": 1},
        {"name": "first", "steps": 2},
    ]
