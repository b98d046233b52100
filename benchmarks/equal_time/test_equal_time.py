"""The study at full length: its order, its rates, what counts as equal time, and its verdict."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from benchmarks.equal_time import (
    ARMS,
    FOLDER,
    STEPS,
    TUNED,
    Job,
    arguments_of,
    queue,
    rate_of,
    report,
    steps_of_equal_time,
)
from benchmarks.queue import read_records
from moevision.config import read, settings
from moevision.models.config import build_model
from moevision.train.recipe import chosen

CLEAN = {"code": {"git_commit": "a", "dirty": False}}


def run(arm: str, seed: int, top1: float, lr: float = 6e-3, **more: Any) -> dict[str, Any]:
    return {"arm": arm, "seed": seed, "lr": lr, "failed": None, "val_top1": top1, "test_top1": top1, "cpu_s": 1.0,
            **CLEAN, **more}  # fmt: skip


def tuning(best: float) -> list[dict[str, Any]]:
    """Records of both tuned arms, of which this rate is the best."""
    return [run(arm, seed, 0.9 if lr == best else 0.8, lr) for arm in TUNED for seed in (100,)
            for lr in (3e-3, 6e-3, 12e-3)]  # fmt: skip


def test_rates_come_first_and_decide_the_rest() -> None:
    first = list(queue([], 4000))
    assert [(job.arm, job.lr, job.seed) for job in first] == [
        (arm, lr, 100) for arm in ("moe", "twin") for lr in (3e-3, 6e-3, 12e-3)
    ]
    known = tuning(6e-3)
    jobs = list(queue(known, 4000))[len(first) :]
    assert len(jobs) == 6 + 6 + 3
    assert [(job.arm, job.seed) for job in jobs[:3]] == [("twin-parameters", 200), ("moe", 200), ("twin-time", 200)]
    assert {job.arm: job.steps for job in jobs} == {"moe": STEPS, "twin-time": 4000, "twin-parameters": STEPS}
    assert {job.lr for job in jobs} == {6e-3}
    edge = list(queue(tuning(12e-3), 4000))
    assert [(job.arm, job.lr) for job in edge if job.lr == 24e-3] == [("moe", 24e-3), ("twin", 24e-3)]
    assert rate_of(tuning(12e-3), "moe") is None


def test_the_faster_step_gets_as_many_more() -> None:
    """Median of three ratios: 1.14 times 3 510."""
    prices = [{"moe_to_twin": {"median": ratio}} for ratio in (1.1, 1.14, 1.3)]
    assert steps_of_equal_time(prices) == 4001


def pairs(count: int, gap: float, spread: float) -> list[dict[str, Any]]:
    """So many pairs, half of them above the mean gap by `spread`, half below."""
    runs = [run("twin-time", 200 + place, 0.87) for place in range(count)]
    return runs + [run("moe", 200 + place, 0.87 + gap + spread * (-1) ** place) for place in range(count)]


@pytest.mark.parametrize(
    ("gap", "spread", "said"),
    [
        (0.010, 0.002, "pays"),
        (0.003, 0.001, "doesn't pay here"),
        (0.004, 0.006, "undecided"),
        (-0.01, 0.002, "doesn't"),
    ],
)
def test_the_verdict_is_the_protocols(gap: float, spread: float, said: str) -> None:
    """Of 12 pairs half the interval is 2.50 (Student's t of 11, 97.06 %) · 1.045 / √12 = .75 of the spread."""
    runs = pairs(12, gap, spread)
    (contrast,) = report.found(runs)
    assert contrast.half_at(report.LEVEL) == pytest.approx(0.75 * spread, rel=0.01)
    assert report.verdict(contrast).startswith(said)
    assert f"{report.SENTENCES[report.verdict(contrast)]}: " in report.answer(runs)


def test_six_pairs_decide_if_they_can() -> None:
    """Half the interval of 6 pairs is 3.02 · 1.095 / √6 = 1.35 of the spread; what comes later changes nothing."""
    assert "5 of 12 pairs so far, no verdict: +1.0 (" in report.answer(pairs(5, 0.01, 0.002))
    assert report.answer(pairs(6, 0.01, 0.002)).endswith("experts pay: +1.0 (+0.7 to +1.3) points (97 %); 6 pairs.")
    wide = [run("twin-wide", 200 + place, 0.8705 + 0.0002 * (-1) ** place) for place in range(4)]
    later = [*pairs(7, 0.01, 0.002)[:-1], run("moe", 206, 0.5), *wide]
    assert report.answer(later) == report.answer(pairs(6, 0.01, 0.002))
    gap = [*pairs(5, 0.004, 0.006), run("moe", 206, 0.88), run("twin-time", 206, 0.87)]  # 6 pairs, not the first 6
    assert "6 of 12 pairs so far, no verdict: " in report.answer(gap)
    assert "8 of 12 pairs so far, no verdict; undecided after 6" in report.answer(pairs(8, 0.004, 0.006))
    assert "11 of 12 pairs so far, no verdict; undecided after 6" in report.answer(pairs(12, 0.004, 0.006)[:-1])


def test_the_answer_says_what_dense_parameters_bring_and_how_equal_the_time_was() -> None:
    """Three seeds: .1, .0 and -.1 points; 6 pairs of 103 and 100 CPU seconds."""
    runs = [{**each, "cpu_s": 103.0 if each["arm"] == "twin-time" else 100.0} for each in pairs(6, 0.0, 0.001)]
    runs += [run("twin-parameters", 200 + place, 0.87 + gap) for place, gap in enumerate((0.001, 0.0, -0.001))]
    capacity, time = report.limits(runs)
    assert capacity.startswith("Dense with as many parameters as the MoE isn't shown to be better than dense: +0.0 (")
    assert time == "In these runs dense had 3.0 % more CPU time than the MoE."
    more = [run("twin-parameters", 200 + place, 0.9 + gap) for place, gap in enumerate((0.0001, 0.0, -0.0001))]
    assert "is shown to be better than dense: +3.0 (" in report.limits([*pairs(6, 0.0, 0.0), *more])[0]


def test_what_a_verdict_leaves_out_is_no_longer_planned() -> None:
    """After the first look decided: 6 pairs of 6, three runs of dense parameters, four of `twin-wide`."""
    for count, planned in ((5, (12, 12, 3, 4)), (6, (6, 6, 3, 4))):
        found = report.parts_of(pairs(count, 0.01, 0.002), [])[1]
        assert [f"of {number} |" in line for number, line in zip(planned, found.splitlines()[2:], strict=True)] == [
            True
        ] * 4


def test_tuning_failed_and_changed_trees_enter_no_contrast() -> None:
    dirty = {"code": {"git_commit": "a", "dirty": True}}
    runs = [run("moe", 100, 0.9), run("moe", 200, 0.9, failed="NaN"), run("moe", 201, 0.9, **dirty)]
    assert report.by_seed(runs, "moe") == {}


@pytest.mark.parametrize(
    ("arm", "millions"), [("moe", 2.01), ("twin-time", 1.22), ("twin-parameters", 2.01), ("twin-wide", 1.40)]
)
def test_the_models_are_those_of_the_protocol(arm: str, millions: float, tmp_path: Any) -> None:
    """By the command line that a run is."""
    options = type("Options", (), {"data": tmp_path, "work": tmp_path})()
    given = read("fit", arguments_of(Job(arm, 200, 6e-3, 10), options))
    model = settings(chosen("fit", given, recorded=True)).model
    net = build_model(model.arch, 10, 32, load_pretrained=False)
    assert sum(each.numel() for each in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    assert (model.optim.name, model.aux.importance, model.aux.load) == ("muon", 0.05, 0.05)
    assert arm in ARMS


def test_the_queue_follows_the_first_look() -> None:
    """Until it is taken 6 pairs; if it is undecided 12; `twin-wide` after them."""

    def left(count: int, gap: float, spread: float) -> list[tuple[str, int]]:
        known = [*tuning(6e-3), *pairs(count, gap, spread)]
        done = {(each["arm"], each["seed"]) for each in known}
        return [(job.arm, job.seed) for job in queue(known, 4000) if (job.arm, job.seed) not in done]

    parameters, wide = (
        [(arm, 200 + place) for place in range(n)] for arm, n in (("twin-parameters", 3), ("twin-wide", 4))
    )
    assert left(5, 0.01, 0.002) == [*parameters, ("moe", 205), ("twin-time", 205)]
    assert left(6, 0.01, 0.002) == [*parameters, *wide]
    more = [(arm, 206 + place) for place in range(6) for arm in ("moe", "twin-time")]
    assert left(6, 0.004, 0.006) == [*parameters, *more, *wide]


def test_the_table_is_judged_at_the_level_of_a_look() -> None:
    """Alone, gaps of .4 ± .33 over six seeds have p = .04: "above" at 5 %, not at 2.94 %."""
    runs = pairs(6, 0.004, 0.0033)
    (contrast,) = report.found(runs)
    assert report.LEVEL < contrast.p < 0.05
    assert contrast.verdict == "above"
    assert "| no difference shown |" in "\n".join(report.parts_of(runs, []))


def test_runs_that_left_out_an_epoch_change_no_verdict() -> None:
    """README.md names them: their curve has a point one step behind that of an epoch's end."""
    runs = read_records(FOLDER / "runs.jsonl")
    ends = {run["name"]: [step for step, _, _ in run["curve"]] for run in runs}
    skipped = [name for name, steps in ends.items() if any(b - a == 1 for a, b in pairwise(steps))]
    assert skipped == ["twin-parameters-lr0.006-s202", "twin-time-lr0.006-s204"]
    others = [run for run in runs if run["name"] not in skipped]
    for contrast, without in zip(report.found(runs), report.found(others), strict=True):
        assert len(without.gaps) == len(contrast.gaps) - 1
        assert contrast.p > report.LEVEL
        assert without.p > report.LEVEL
    assert report.verdict(report.found(runs)[0]) == report.verdict(report.found(others)[0]) == "doesn't pay here"
