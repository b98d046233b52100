"""`python -m benchmarks ideas`: without records nothing is claimed; what is claimed is a verdict of the studies."""

from pathlib import Path

import pytest

from benchmarks.ideas import NOT_RUN, ideas, read_all
from tests.test_sparsity_study import record, study


def row(table: str, idea: str) -> str:
    (found,) = (line for line in table.splitlines() if line.startswith(f"| {idea} |"))
    return found


def test_without_records_every_idea_is_not_run(tmp_path: Path) -> None:
    table = ideas(read_all(tmp_path))
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert len(rows) == 12
    assert {verdict for _, verdict, _, _ in rows} == {"not run yet"}
    assert all(NOT_RUN in answer for *_, answer in rows)
    assert not any(word in table for word in ("points", "times", "better", "worse"))


def test_a_sentence_is_the_verdict_of_the_study() -> None:
    """Eight seeds with a gain of 2 points, give or take .1; tuning alone says nothing."""
    nothing = read_all(Path("nowhere"))
    runs = study([0.02, 0.021, 0.019, 0.02, 0.022, 0.018, 0.02, 0.02])
    table = ideas(
        {
            **nothing,
            "sparsity": [*runs, *(record("lr16", seed, test, lr=16 * 6e-3) for seed, test in ((0, 0.61), (1, 0.63)))],
        }
    )
    said = "CPU, 1 epoch: At equal steps and equal active FLOPs the MoE is better than its dense twin: +2.0 points"
    assert said in row(table, "More parameters help at equal compute")
    assert "| yes |" in row(table, "More parameters help at equal compute")
    worse = ideas({**nothing, "sparsity": study([-gap for gap in (0.02, 0.021, 0.019, 0.02, 0.022, 0.018)])})
    assert "| no |" in row(worse, "More parameters help at equal compute")
    tie = ideas({**nothing, "sparsity": study([0.02, -0.021, 0.019, -0.02, 0.022, -0.018])})
    assert "| not shown |" in row(tie, "More parameters help at equal compute")
    assert "CUDA" not in table
    assert f"{NOT_RUN} ([sparsity]" in row(table, "They help at equal time too")
    assert "CPU, 1 epoch, `lr16`: 62.0 % (2 seeds)" in row(table, "Sparse training is unstable")
    assert "| described |" in row(table, "Sparse training is unstable")
    few = ideas({**nothing, "sparsity": study([0.02, 0.021])})
    assert "| undecided |" in row(few, "More parameters help at equal compute")
    assert "H1: partial: 2 of at least 6 seeds, no verdict" in row(few, "More parameters help at equal compute")


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
