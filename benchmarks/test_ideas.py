"""`python -m benchmarks ideas`: without records nothing is claimed; what is claimed is a verdict of the studies."""

from pathlib import Path

import pytest

from benchmarks.equal_time.test_equal_time import pairs as equal_pairs
from benchmarks.ideas import NOT_RUN, ideas, read_all, waits
from benchmarks.small import BASE_LR
from benchmarks.small.test_small import run as small_run
from benchmarks.sparsity.arms import ARMS
from benchmarks.sparsity.test_sparsity import record, study, tuning


def row(table: str, idea: str) -> str:
    (found,) = (line for line in table.splitlines() if line.startswith(f"| {idea} |"))
    return found


def test_without_records_every_idea_is_not_run(tmp_path: Path) -> None:
    table = ideas(read_all(tmp_path))
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert len(rows) == 13
    assert {verdict for _, verdict, _ in rows} == {"not run yet"}
    assert all(NOT_RUN in answer for *_, answer in rows)
    assert not any(word in table for word in ("points", "times", "better", "worse"))


def test_a_sentence_is_the_verdict_of_the_study() -> None:
    """Eight seeds with a gain of 2 points, give or take .1; tuning alone says nothing."""
    nothing = read_all(Path("nowhere"))
    runs = study([0.02, 0.021, 0.019, 0.02, 0.022, 0.018, 0.02, 0.02])
    table = ideas({**nothing, "sparsity": runs})
    said = "At equal steps and equal active FLOPs the MoE is better than its dense twin: +2.0 points"
    assert said in row(table, "More parameters help at equal compute")
    assert "| after 1 epoch |" in row(table, "More parameters help at equal compute")
    worse = ideas({**nothing, "sparsity": study([-gap for gap in (0.02, 0.021, 0.019, 0.02, 0.022, 0.018)])})
    assert "| no |" in row(worse, "More parameters help at equal compute")
    tie = ideas({**nothing, "sparsity": study([0.02, -0.021, 0.019, -0.02, 0.022, -0.018])})
    assert "| not shown |" in row(tie, "More parameters help at equal compute")
    assert "CUDA" not in table
    assert f"{NOT_RUN} ([sparsity]" in row(table, "They help at equal time too")
    assert "| not run yet |" in row(table, "Sparse training is unstable")
    few = ideas({**nothing, "sparsity": study([0.02, 0.021])})
    assert "| undecided |" in row(few, "More parameters help at equal compute")
    assert "H1: partial: 2 of at least 6 seeds, no verdict" in row(few, "More parameters help at equal compute")


@pytest.mark.parametrize(("lead", "expected"), [(0.0, "only with the mean"), (0.02, "after 1 epoch")])
def test_a_lead_that_reading_places_takes_away_is_the_means(lead, expected) -> None:
    """Two points with the mean; with places read, as many or none, give or take .1."""
    noise = [0.001, -0.001, 0.001, -0.001, 0.001, -0.001]
    runs = study([0.02 + each for each in noise])
    for arm, more in (("moe-places", lead), ("twin-places", 0.0)):
        lr = ARMS[arm].base_lr
        runs += tuning(arm, lr)
        runs += [
            record(arm, seed, 0.8 + (more + each) * (arm == "moe-places"), lr=lr) for seed, each in enumerate(noise)
        ]
    found = row(ideas({**read_all(Path("nowhere")), "sparsity": runs}), "More parameters help at equal compute")
    assert f"| {expected} |" in found
    assert "With places read" in found
    assert "+2.0 points (+1.9 to +2.1; 6 seeds)" in found


@pytest.mark.parametrize(
    ("count", "gap", "spread", "expected"),
    [
        (6, 0.01, 0.002, "yes"),
        (6, 0.001, 0.002, "no"),
        (12, 0.004, 0.006, "undecided"),
        (6, 0.004, 0.006, "not run yet"),
    ],
)
def test_equal_time_is_decided_at_full_length(count, gap, spread, expected) -> None:
    """By the study's own looks; one that doesn't decide says nothing yet."""
    table = ideas({**read_all(Path("nowhere")), "equal_time": equal_pairs(count, gap, spread)})
    assert f"| {expected} |" in row(table, "They help at equal time too")


@pytest.mark.parametrize(
    ("loss", "spread", "failed", "expected"),
    [(0.03, 0.001, 0, "yes"), (0.0, 0.001, 0, "no"), (0.0, 0.05, 0, "not shown"), (-0.03, 0.001, 1, "yes")],
)
def test_instability_is_judged_by_its_protocol(loss, spread, failed, expected) -> None:
    """Learned loses `loss` more than dense at 4 and 16 times the rate, give or take; or it fails once."""
    runs = []
    for seed, sign in enumerate((1, -1, 1, -1, 1)):
        for factor in (1, 4, 16):
            for guard in (False, True):
                lr, gap = BASE_LR * factor, (factor > 1) * (sign * spread - loss)
                runs.append(small_run("rates", "dense", seed, 0.45, lr=lr, guard=guard))
                runs.append(small_run("rates", "learned", seed, 0.46 + gap, lr=lr, guard=guard))
    if failed:
        next(run for run in reversed(runs) if not run["guard"])["failed"] = "the weights are not finite"
    table = ideas({**read_all(Path("nowhere")), "small": runs})
    assert f"| {expected} |" in row(table, "Sparse training is unstable")


@pytest.mark.parametrize(
    ("gain", "spread", "expected"), [(0.03, 0.001, "only with the mean"), (0.0, 0.001, "no"), (0.0, 0.05, "not shown")]
)
def test_large_batches_are_judged_by_their_protocol(gain, spread, expected) -> None:
    runs = []
    for seed, sign in enumerate((1, -1, 1, -1, 1)):
        for batch in (16, 64, 256, 1024):
            more = (batch > 64) * (gain + sign * spread)
            runs.append(small_run("batches", "dense", seed, 0.45, batch=batch))
            runs.append(small_run("batches", "learned", seed, 0.46 + more, batch=batch))
    table = ideas({**read_all(Path("nowhere")), "small": runs})
    assert f"| {expected} |" in row(table, "Sparse training wants large batches")


@pytest.mark.parametrize(("gain", "expected"), [(0.03, "yes"), (0.0, "only with the mean")])
def test_large_batches_are_judged_with_places_read_too(gain, expected) -> None:
    """With the mean the lead grows by three points; with places read as much, or by nothing."""
    runs = []
    for seed in range(5):
        for head, more in (("mean", 0.03), ("places", gain)):
            for batch in (16, 64, 256, 1024):
                top1 = 0.46 + (batch > 64) * more + 0.001 * (seed % 2) * (batch > 64)
                runs.append(small_run("batches", "dense", seed, 0.45, batch=batch, head=head))
                runs.append(small_run("batches", "learned", seed, top1, batch=batch, head=head))
    table = ideas({**read_all(Path("nowhere")), "small": runs})
    assert f"| {expected} |" in row(table, "Sparse training wants large batches")


def test_the_page_keeps_its_words(bench, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- tables: begin -->\nan earlier table\n<!-- tables: end -->\nafter\n")
    assert bench("ideas", "--page", page).code == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- tables: begin -->\n\n| idea |")
    assert text.endswith("<!-- tables: end -->\nafter\n")
    assert "an earlier table" not in text


@pytest.mark.parametrize("idea", ["Experts specialize", "Uneven experts make others wait"])
def test_committed_records_are_found(idea: str) -> None:
    assert NOT_RUN not in row(ideas(read_all()), idea)


def test_what_no_hypothesis_asked_stands_beside_the_verdict() -> None:
    """The twin with 14 % more steps gains 1 point in each of six seeds; the learned router loses to one rule of two."""
    runs = [*study([0.02, 0.021, 0.019, 0.02, 0.022, 0.018])]
    runs += [
        record("twin-time", run["seed"], run["test_top1"] + 0.01, steps=400) for run in runs if run["arm"] == "twin"
    ]
    rules = [record(arm, seed, 0.8 + gap + 0.001 * (seed % 2), val=0.8 + gap) for seed in range(6)
             for arm, gap in (("hash", -0.01), ("position", 0.05))]  # fmt: skip
    table = ideas({**read_all(Path("nowhere")), "sparsity": [*runs, *rules, *tuning("hash"), *tuning("position")]})
    assert "14 % more steps give the twin +1.0 (+1.0 to +1.0; 6 seeds)" in row(
        table, "More parameters help at equal compute"
    )
    assert "| not `position` |" in row(table, "A learned router beats fixed rules")
    assert "Against `hash` alone, unadjusted: +" in row(table, "A learned router beats fixed rules")


def test_waiting_is_shown_only_if_both_measures_agree() -> None:
    def run(ms_without: float) -> dict[str, object]:
        rows = [("no loss", ms_without, 2.0, 1.5), ("loss", 3.0, 1.1, 1.0)]
        names = ("arm", "wait_ms", "wait_over_even", "busiest_over_mean")
        return {"rows": [dict(zip(names, values, strict=True)) for values in rows]}

    assert waits([run(4.0), run(3.5)])[0] == "yes"
    verdict, text = waits([run(4.0), run(2.5)])
    assert verdict == "not shown"
    assert text.endswith("waits are longer without in 1 of 2 runs by mean ms")
