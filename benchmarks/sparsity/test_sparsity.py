"""The sparsity study: its verdicts follow from the records by the protocol, and its queue goes on where it stopped."""

import csv
import itertools
import json
import math
import os
import re
import signal
import statistics

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import queue as queueing
from benchmarks import sparsity
from benchmarks.harness import about
from benchmarks.sparsity import arms, report, training
from benchmarks.sparsity.arms import ARMS, BALANCE, EPOCHS, STAGES, STEPS_PER_EPOCH, TUNING_SEEDS, Arm, queue, rate_of
from benchmarks.sparsity.verdict import HYPOTHESES, judge, p_of, sentences, verdict_of
from benchmarks.study import Contrast
from moevision.stats import LEVEL, POWER, detectable
from moevision.train.guard import TrainingDiverged

PROTOCOL = training.PROTOCOL.read_text(encoding="utf-8")


def record(arm, seed, test=0.8, val=None, lr=6e-3, **more):
    """A finished run, as much of it as the report reads."""
    layer = {"cv_squared": 0.04, "max_over_mean": 1.25}
    return {
        "device": "cpu", "arm": arm, "seed": seed, "lr": lr, "failed": None, "test_top1": test, "steps": 351,
        "val_top1": test if val is None else val, "layers": [layer], "cv_importance": [0.1], "cpu_s": 1900.0,
        "peak_mib": 800.0, "cost": {"flops_per_image": 167_447_040, "router_flops_per_image": 0,
        "total_parameters": 970_282}, "code": {"git_commit": "c", "dirty": False}, "protocol_sha256": "p",
        "machine": {"gpus": [], "cpu": "a CPU"}, **more,
    }  # fmt: skip


def tuning(arm, best=6e-3):
    """Runs that make `best`, one of the three rates, the chosen one."""
    rates = [factor * ARMS[arm].base_lr for factor in arms.FACTORS]
    return [record(arm, seed, lr=lr, val=0.5 + 0.1 * (lr == best)) for lr in rates for seed in TUNING_SEEDS]


def study(gaps, first="moe", second="twin"):
    """Records of two tuned arms whose difference by seed is `gaps`."""
    others = [record(second, seed, 0.8 + 0.01 * (seed % 3)) for seed in range(len(gaps))]
    runs = [record(first, run["seed"], run["test_top1"] + gap) for run, gap in zip(others, gaps, strict=True)]
    return [*tuning(first), *tuning(second), *others, *runs]


def of(results, name):
    return next(result for result in results if result.hypothesis.name == name)


def test_interval_p_and_detectable_difference_are_scipys() -> None:
    gaps = [0.012, -0.003, 0.02, 0.007, 0.001, 0.016]
    result = of(judge(study(gaps), "cpu"), "H1")
    own = stats.ttest_1samp(gaps, 0)
    assert result.contrast.p == pytest.approx(own.pvalue)
    low, high = own.confidence_interval()
    assert (result.contrast.mean - result.contrast.half, result.contrast.mean + result.contrast.half) == pytest.approx(
        (low, high)
    )
    assert result.detectable == pytest.approx(1.434 * statistics.stdev(gaps), rel=1e-3)
    margin = stats.ttest_1samp(gaps, -0.01, alternative="greater")
    assert p_of(Contrast("a", "b", gaps), 0.01) == pytest.approx(min(1, 2 * margin.pvalue))


def test_detectable_difference_has_its_power() -> None:
    """By drawing: the share of significant tests is 80 %, three standard errors of 4 000 draws around it."""
    draws = np.random.default_rng(0).normal(detectable(6), 1, size=(4000, 6))
    assert np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.02)
    assert detectable(8) == pytest.approx(1.16, abs=0.005)
    assert detectable(5, 0.05 / 4) == pytest.approx(2.48, abs=0.005)


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ([0.02, 0.021, 0.019, 0.02, 0.022, 0.018], "positive"),
        ([-0.02, -0.021, -0.019, -0.02, -0.022, -0.018], "negative"),
        ([0.02, -0.02, 0.01, -0.01, 0.03, -0.03], "tie"),
    ],
)
def test_a_verdict_is_the_sentence_that_was_written_before(gaps, expected) -> None:
    result = of(judge(study(gaps), "cpu"), "H1")
    assert result.verdict == expected
    fixed = sentences()["H1", expected].split("{mean}")[0]
    assert len(fixed) > 40
    assert result.sentence.startswith(fixed)
    assert "cannot exclude" not in result.sentence  # the interval in it says which values aren't excluded


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ([-0.002, 0.001, 0.0, -0.001, 0.002], "positive"),  # surely above -1 point
        ([-0.03, -0.031, -0.029, -0.03, -0.03], "negative"),  # surely below
        ([-0.03, 0.01, -0.02, 0.02, -0.005], "tie"),
    ],
)
def test_balance_is_judged_against_its_margin(gaps, expected) -> None:
    own = Contrast("moe", "unbalanced", gaps)
    assert verdict_of(Contrast("moe", "unbalanced", gaps, p_of(own, 0.01)), 0.01) == expected


def test_what_was_not_run_counts_against_the_family() -> None:
    """Only H5 has its seeds: Holm multiplies by all four tests, and nothing is said below the least number of seeds."""
    gaps = [0.004, 0.001, -0.002, 0.003, 0.002]
    results = judge(study(gaps, second="unbalanced"), "cpu")
    assert of(results, "H5").contrast.p == pytest.approx(4 * p_of(Contrast("a", "b", gaps), 0.01))
    assert [of(results, name).verdict for name in ("H1", "H2", "H3", "H4")] == ["not run"] * 4
    few = of(judge(study(gaps), "cpu"), "H1")
    assert few.sentence == "H1: partial: 5 of at least 6 seeds, no verdict."


def test_the_rival_is_chosen_by_validation_accuracy() -> None:
    """`hash` is the better one on validation images, `position` on those of the test."""
    runs = [record("moe", seed, 0.80) for seed in range(6)]
    runs += [record("hash", seed, 0.78, val=0.9) for seed in range(6)]
    runs += [record("position", seed, 0.82, val=0.8) for seed in range(6)]
    runs += [run for arm in ("moe", "hash", "position") for run in tuning(arm)]
    contrast = of(judge(runs, "cpu"), "H4").contrast
    assert (contrast.second, contrast.mean) == ("hash", pytest.approx(0.02))
    begun = [run for run in runs if run["arm"] != "position"]
    assert of(judge(begun, "cpu"), "H4").verdict == "partial: no seed that all arms have, no verdict"


def test_speed_is_the_median_of_idle_measurements() -> None:
    def measured(ms, busy=False, **arms):
        found = {"routed_share": 0.4, "ms": {"median": ms}, "memory": {"peak_mib": ms / 2}}
        return {"device": "cpu", "busy": busy, "arms": {"moe": found, **arms}}

    twin = {"routed_share": 0.0, "ms": {"median": 7.0}, "memory": {}}
    found = report.medians([measured(10.0), measured(40.0), measured(12.0, twin=twin), measured(1.0, busy=True)], "cpu")
    assert found["moe"] == {"routed_share": 0.4, "ms": 12.0, "mib": 6.0}
    assert (found["twin"]["ms"], math.isnan(found["twin"]["mib"])) == (7.0, True)


def rows_of(readme, head):
    """Cells of the first table whose head begins so, without backquotes."""
    lines = readme.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith(head)) + 2
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in table]


def test_the_committed_tables_follow_from_the_records_by_other_means() -> None:
    """Means, SciPy's t test and its interval, from the files; nothing of the report's code."""
    folder = training.PROTOCOL.parent
    readme = (folder / "README.md").read_text(encoding="utf-8")
    runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    seeds = [run for run in runs if run["seed"] < 100 and not run["failed"]]
    rates = {}
    for arm, count, lr, top1, *_, seconds, _ in rows_of(readme, "| arm |"):
        rates[arm] = float(lr or "nan")
        own = [run for run in seeds if (run["arm"], run["lr"]) == (arm, float(lr))]
        accuracies = [100 * run["test_top1"] for run in own]
        spread = f" ± {np.std(accuracies, ddof=1):.1f}" if len(own) > 1 else ""
        assert top1 == f"{np.mean(accuracies):.1f}{spread}"
        assert count.startswith(f"{len(own)} of ")
        assert seconds == f"{np.mean([run['cpu_s'] for run in own]):.0f}"
    judged = 0
    for name, contrast, count, interval, p, _, verdict in rows_of(readme, "|  | contrast |"):
        arms_of = [
            {run["seed"]: run["test_top1"] for run in seeds if (run["arm"], run["lr"]) == (arm, rates.get(arm))}
            for arm in contrast.split(" − ")
        ]
        if not count:
            continue
        common = sorted(set.intersection(*map(set, arms_of)))
        gaps = [100 * (arms_of[0][seed] - arms_of[1][seed]) for seed in common]
        test = stats.ttest_1samp(gaps, 0.0)
        bounds = test.confidence_interval()
        found = f"{np.mean(gaps):+.1f} ({bounds.low:+.1f} to {bounds.high:+.1f})".replace("-", "−")
        assert (int(count), interval) == (len(gaps), found), name
        if name == "H1":
            assert p == ("below 0.001" if test.pvalue < 0.0005 else f"{test.pvalue:.3f}")
            assert verdict == ("tie" if test.pvalue >= 0.05 else "positive" if np.mean(gaps) > 0 else "negative")
        judged += 1
    assert judged
    for arm, count, _, cv_load, ratio, top1 in rows_of(readme, "| balance"):
        own = [run for run in seeds if (run["arm"], run["lr"]) == (arm, rates.get(arm))]
        if count == "not run":
            assert not own
            continue
        counts = [[np.array(layer["counts"], dtype=float) for layer in run["layers"]] for run in own]
        assert cv_load == f"{np.mean([max(layer.std() / layer.mean() for layer in run) for run in counts]):.2f}"
        assert ratio == f"{np.mean([max(layer.max() / layer.mean() for layer in run) for run in counts]):.2f}"
        assert top1 == f"{np.mean([100 * run['test_top1'] for run in own]):.1f}"


def test_later_code_repeats_a_run_exactly() -> None:
    runs = [json.loads(line) for line in (training.PROTOCOL.parent / "runs.jsonl").read_text().splitlines()]
    again = [run for run in runs if run["arm"].endswith("-again")]
    assert len(again) >= 2
    for run in again:
        keys = {"arm": run["arm"].removesuffix("-again"), "lr": run["lr"], "seed": run["seed"]}
        (first,) = (other for other in runs if keys.items() <= other.items())
        assert (first["test_top1"], first["val_top1"]) == (run["test_top1"], run["val_top1"])
        assert first["code"]["git_commit"] != run["code"]["git_commit"]


def test_failed_runs_and_changed_trees_leave_their_pairs() -> None:
    runs = study([0.02] * 7)
    runs[-1]["code"]["dirty"] = True
    runs[-2]["failed"] = "diverged"
    assert len(of(judge(runs, "cpu"), "H1").contrast.gaps) == 5
    runs[-3]["failed"] = "diverged"
    assert of(judge(runs, "cpu"), "H1").verdict == "not judged: 2 of 6 runs of moe failed"
    text = report.tables(runs, [])
    assert "Left out, from a changed tree: `moe`, seed 6" in text
    assert text.count("- Failed: `moe`") == 2


def test_the_protocol_lists_what_the_code_does() -> None:
    assert set(sentences()) >= {(h.name, v) for h in HYPOTHESES for v in ("positive", "negative", "tie")}
    assert [name for name in ARMS if f"`{name}`" not in PROTOCOL] == []
    rows = re.findall(r"^\| [1-4] \| (`.*`) \| (\d)(?:(?:–|, )(\d))? \| (\d+) \| \d+ \|$", PROTOCOL, re.MULTILINE)
    listed = {(names, int(first), int(last or first)): int(runs) for names, first, last, runs in rows}
    seen = set()
    for _, names, seeds in STAGES:
        new = {ARMS[arm].tuned_as or arm for arm in names} - seen
        seen |= new
        tuning = sum(len(arms.FACTORS) * len(ARMS[arm].tuning_seeds) for arm in new)
        key = (", ".join(f"`{name}`" for name in names), seeds[0], seeds[-1])
        assert listed[key] == len(names) * len(seeds) + tuning
    assert "1 epoch = 351 steps = 44 928 images" in PROTOCOL
    assert (EPOCHS["cpu"], STEPS_PER_EPOCH) == (1, 351)
    assert set(BALANCE) < set(ARMS)


def test_routed_share_of_the_models_own_sizes() -> None:
    """64 tokens · k (2) · 2 products · 2 FLOPs · 128 · 256 for each MoE block; the twin is the same at every ρ."""
    routed = 64 * 2 * 2 * 2 * 128 * 256
    costs = {arm: arms.cost_of(arm) for arm in ("moe", "rho10", "twin")}
    assert {arm: round(cost["routed_share"], 2) for arm, cost in costs.items()} == {"moe": 0.4, "rho10": 0.1, "twin": 0}
    total = costs["moe"]["flops_per_image"] + costs["moe"]["router_flops_per_image"]
    assert costs["moe"]["routed_share"] == pytest.approx(4 * routed / total)
    assert len({cost["flops_per_image"] for cost in costs.values()}) == 1
    twins = [Arm({"twin": "active_flops", "moe_layers": layers}).subject().build() for layers in ("all", [3])]
    shapes = [[(name, p.shape) for name, p in twin.named_parameters()] for twin in twins]
    assert shapes[0] == shapes[1]


def test_the_queue_tunes_first_and_goes_beyond_a_winning_edge() -> None:
    jobs = list(queue([], "cpu"))
    assert [(job.arm, job.seed, job.lr) for job in jobs[:3]] == [
        ("moe", 100, 3e-3), ("moe", 101, 3e-3), ("moe", 100, 6e-3),
    ]  # fmt: skip
    assert len([job for job in jobs if job.tier == 1]) == 92
    assert {job.lr for job in jobs if job.seed not in TUNING_SEEDS} == {None}
    edge = tuning("moe", best=12e-3)
    assert (arms.rates_to_try(edge, "cpu", "moe")[3:], rate_of(edge, "cpu", "moe")) == ([24e-3], None)
    edge += [record("moe", seed, lr=24e-3, val=0.1) for seed in TUNING_SEEDS]
    assert rate_of(edge, "cpu", "moe") == 12e-3
    assert rate_of(edge, "cpu", "random") == 12e-3
    assert rate_of(edge, "cuda", "moe") is None


def test_an_edge_that_ties_is_gone_beyond_and_the_lowest_of_equal_rates_is_taken() -> None:
    tied = [
        record("twin", seed, lr=lr, val=0.6 + 0.1 * (lr > 3e-3)) for lr in (12e-3, 6e-3, 3e-3) for seed in (100, 101)
    ]
    assert (arms.rates_to_try(tied, "cpu", "twin")[3:], rate_of(tied, "cpu", "twin")) == ([24e-3], None)
    tied += [record("twin", seed, lr=24e-3, val=0.65) for seed in TUNING_SEEDS]
    assert rate_of(tied, "cpu", "twin") == 6e-3
    dirty = {"git_commit": "c", "dirty": True}
    tied += [record("twin", seed, lr=12e-3, val=0.9, code=dirty) for seed in TUNING_SEEDS]
    assert rate_of(tied, "cpu", "twin") == 6e-3


@pytest.fixture
def small(monkeypatch, drawn_pets, tmp_path):
    """Two epochs of four steps on a tiny model; the command line that all calls share."""
    monkeypatch.setitem(ARMS, "moe", Arm({"name": "test_vit_moe"}, tuned_as=None, batch=8))
    monkeypatch.setitem(arms.EPOCHS, "cpu", 2)
    common = ("--data", drawn_pets, "--allow-dirty", "--only", "moe")
    return lambda name: (
        "sparsity",
        "run",
        *common,
        "--out",
        tmp_path / f"{name}.jsonl",
        "--work",
        tmp_path / f"work-{name}",
    )


def test_a_stopped_run_goes_on_and_ends_as_an_uninterrupted_one(bench, small, tmp_path, monkeypatch) -> None:
    whole = bench(*small("whole"))
    assert whole.code == 0, whole.err
    steps = []

    def stop(self, trainer, *_):
        steps.append(trainer.global_step)
        if len(steps) == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training.Meter, "on_train_batch_end", stop)
    stopped = bench(*small("parts"))
    assert stopped.code == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM" in stopped.err
    assert not (tmp_path / "parts.jsonl").exists()
    assert bench(*small("parts")).code == 0
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]  # nothing is trained twice
    (one,), (other,) = (queueing.read_records(tmp_path / f"{name}.jsonl") for name in ("whole", "parts"))
    assert one["name"] == other["name"] == "cpu-moe-lr0.003-s100"
    assert (one["sessions"], other["sessions"]) == (1, 2)
    assert one["steps"] == 8
    assert [point[0] for point in other["curve"]] == [4, 8]
    written = tmp_path / "work-whole" / one["name"] / "predictions_test.csv"
    labels = sorted(row["label"] for row in csv.DictReader(written.read_text().splitlines()))
    classes = sorted(set(labels))
    right = [classes[int(digit)] == label for digit, label in zip(one["predicted"], labels, strict=True)]
    assert statistics.fmean(right) == pytest.approx(one["test_top1"])
    same = ("predicted", "test_top1", "test_loss", "val_top1", "layers", "cv_importance", "steps", "seed", "cost")
    assert {name: one[name] for name in same} == {name: other[name] for name in same}
    assert min(one["cpu_s"], other["cpu_s"], one["peak_mib"]) > 0
    assert one["code"] == about()["code"]  # commit and dirty flag; None for a wheel
    assert str(tmp_path) not in json.dumps(one)  # no folder of this machine


def test_two_queues_take_different_runs_and_skip_what_is_done(bench, small, tmp_path, monkeypatch) -> None:
    taken = []
    monkeypatch.setattr(sparsity, "train", lambda job, options: taken.append(job.name) or record(job.arm, job.seed))
    work = tmp_path / "work-shared"
    work.mkdir()
    held = queueing.claim_file(work / "cpu-moe-lr0.003-s100.lock")  # the other queue is at the first run
    for _ in range(2):
        assert bench(*small("shared")).code == 0
    held.release()
    assert bench(*small("shared")).code == 0
    assert taken == ["cpu-moe-lr0.003-s101", "cpu-moe-lr0.006-s100", "cpu-moe-lr0.003-s100"]


def test_a_seed_changes_the_order_of_images_and_not_their_split(bench, small, tmp_path) -> None:
    for _ in range(2):
        assert bench(*small("seeds")).code == 0
    work = tmp_path / "work-seeds"
    splits = [(work / f"cpu-moe-lr0.003-s{seed}" / "splits.csv").read_text() for seed in TUNING_SEEDS]
    assert splits[0] == splits[1]
    runs = queueing.read_records(tmp_path / "seeds.jsonl")
    assert runs[0]["test_loss"] != runs[1]["test_loss"]


def test_a_diverged_run_is_recorded_and_not_repeated(bench, small, tmp_path, monkeypatch) -> None:
    def diverge(*_):
        raise TrainingDiverged("The loss is not finite.")

    monkeypatch.setattr(training, "finish", diverge)
    assert bench(*small("diverged")).code == 0
    (run,) = queueing.read_records(tmp_path / "diverged.jsonl")
    assert run["failed"] == "The loss is not finite."
    monkeypatch.setattr(sparsity, "train", lambda job, options: record(job.arm, job.seed, lr=job.lr))
    assert "seed 101" in bench(*small("diverged")).out.replace("-s", " seed ")


def test_weights_that_became_nan_unguarded_are_a_failed_run(bench, small, tmp_path, monkeypatch) -> None:
    call = small("nan")
    monkeypatch.setitem(ARMS, "moe", Arm({"name": "test_vit_moe"}, tuned_as=None, batch=8, base_lr=1e30, guard=False))
    assert bench(*call).code == 0
    (run,) = queueing.read_records(tmp_path / "nan.jsonl")
    assert run["failed"] == "the weights are not finite"


def test_equal_time_is_measured_and_trained(bench, small, tmp_path, monkeypatch) -> None:
    """The twin gets 1.75 times the 8 steps of the MoE if a step of the MoE takes 1.75 times as long."""
    twin = {"name": "test_vit_moe", "twin": "active_flops"}
    monkeypatch.setitem(ARMS, "twin", Arm(twin, tuned_as=None, batch=8))
    monkeypatch.setitem(ARMS, "twin-time", Arm(twin, tuned_as="twin", batch=8))
    monkeypatch.setattr(sparsity, "STEPS_PER_EPOCH", 4)
    monkeypatch.setattr(sparsity, "WARM_UP", 1)
    monkeypatch.setattr(sparsity, "memory_of", lambda *_, **__: {"peak_mib": 100.0})
    out, speed = tmp_path / "time.jsonl", tmp_path / "speed.json"
    common = (*small("time"), "--speed", speed, "--only")
    assert bench("sparsity", "speed", *common[2:], "moe", "twin", "--busy", "--rounds", 3).code == 0
    (first,) = json.loads(speed.read_text())
    assert first["arms"]["moe"]["ms"]["n"] == 3
    assert first["arms"]["moe"]["routed_share"] > first["arms"]["twin"]["routed_share"] == 0
    idle = [{**first, "busy": False, "ratio": {"median": ratio}} for ratio in (1.5, 1.75, 2.5)]
    for known in ([first] * 3, idle[:2], [first, *idle[:2]]):  # busy ones don't count, two are too few
        speed.write_text(json.dumps(known))
        assert sparsity.twin_steps(out, speed, "cpu") is None
    speed.write_text(json.dumps([first, *idle]))
    for run in tuning("twin"):
        queueing.write_run(out, f"{run['lr']}-{run['seed']}", run)
    assert bench(*common, "twin-time").code == 0
    run = queueing.read_records(out)[-1]
    assert (run["steps"], run["lr"], run["layers"]) == (14, 6e-3, [])
    last = tmp_path / "work-time" / run["name"] / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 14  # what was tested
    queueing.write_run(out, "failed", {**run, "failed": "it", "steps": None})
    speed.unlink()
    assert sparsity.twin_steps(out, speed, "cpu") == 14  # fixed by the first record


@pytest.mark.parametrize(
    ("codes", "limit", "expected"),
    [([0, 0, sparsity.NOTHING_LEFT], 0, (0, 3)), ([0, 143], 0, (143, 2)), ([-15], 0, (143, 1)), ([0, 0, 0], 2, (0, 2))],
)
def test_a_queue_starts_a_process_for_each_run(monkeypatch, codes, limit, expected) -> None:
    started = []

    class Child:
        def __init__(self, command, **_):
            started.append(command)

        def wait(self):
            return codes[len(started) - 1]

    monkeypatch.setattr(sparsity.subprocess, "Popen", Child)
    assert (sparsity.run_many(limit), len(started)) == expected
    assert started[0][-2:] == ["--limit", "1"]


def test_a_changed_tree_is_refused(bench, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(queueing, "code_state", lambda *_: {"git_commit": "c", "dirty": True})
    outcome = bench("sparsity", "run", "--data", tmp_path)
    assert outcome.code == 2
    assert "uncommitted changes" in outcome.err


def test_status_and_report_of_nothing_and_of_something(bench, tmp_path) -> None:
    out, readme = tmp_path / "runs.jsonl", tmp_path / "README.md"
    outcome = bench("sparsity", "status", "--out", out)
    assert "0 of 6" in outcome.out
    assert outcome.out.rstrip().endswith("0 runs done, 159 missing (further learning rates not counted).")
    readme.write_text(f"before\n{queueing.BEGIN}\n{queueing.END}\nafter\n")
    common = ("sparsity", "report", "--out", out, "--readme", readme, "--speed", tmp_path / "speed.json")
    assert bench(*common).code == 0
    assert "Not run." in readme.read_text()
    assert not (tmp_path / "sparsity.png").exists()
    for number, run in enumerate(study([0.02, 0.021, 0.019, 0.02, 0.022, 0.018])):
        queueing.write_run(out, str(number), run)
    assert bench(*common).code == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "+2.0 (+1.9 to +2.1)" in text
    assert "No seed finished: `hash`, " in text
    assert "24 runs of the queue are done, 135 are missing." in text  # 2 arms: 6 tuning runs and 6 seeds each
    assert (tmp_path / "sparsity.png").stat().st_size > 1000
    assert bench(*common).code == 0
    assert readme.read_text() == text
    assert "6 of 6" in bench("sparsity", "status", "--out", out).out
    assert (LEVEL, POWER) == (0.05, 0.8)
