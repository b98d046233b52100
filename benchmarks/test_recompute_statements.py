"""Statements recomputed from records: the pages say the same, and a page that doesn't is named."""

from pathlib import Path

import pytest

from benchmarks import recompute_statements


def test_the_pages_say_what_the_records_give(capsys) -> None:
    assert recompute_statements.checked() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 18
    assert all(line.startswith("=\t") for line in lines)


def test_another_number_is_named(monkeypatch, capsys, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("It is\n−0.2 points better.")
    said = [("page.md", "-0.2 points better"), ("page.md", "-0.3 points better")]
    monkeypatch.setattr(recompute_statements, "ROOT", tmp_path)
    monkeypatch.setattr(recompute_statements, "statements", lambda: iter(said))
    assert recompute_statements.checked() == 1
    assert (
        capsys.readouterr().out
        == "=\tpage.md\t−0.2 points better\nNOT THERE\tpage.md\t−0.3 points better\n"
    )


def test_a_difference_by_hand() -> None:
    """Gaps of 1 and 3 points: mean 2, half 12.706 x sqrt 2 / sqrt 2 points."""
    found = recompute_statements.difference({0: 0.51, 1: 0.53, 2: 0.9}, {0: 0.5, 1: 0.5})
    assert found == pytest.approx((0.02, 0.02 - 0.12706, 0.02 + 0.12706), abs=1e-5)
    assert recompute_statements.points(found) == "+2.0 (-10.7 to +14.7)"
