"""What long work says of itself."""

import pytest

from moevision import words


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass: 15 for each item."""
    seconds = iter(range(0, 10_000, 15))
    monkeypatch.setattr(words.time, "monotonic", lambda: float(next(seconds)))


def test_a_file_is_told_now_and_then_how_far_it_is(clock, capsys):
    """By hand: items are looked at after 15, 30, 45, 60, 75 s, and told where 20 s have passed: at 30 and 60."""
    assert list(words.with_progress("abcde", "looking", 5)) == list("abcde")
    told = capsys.readouterr().err.splitlines()
    assert told == ["looking: 20 %, 2 min 0 s left", "looking: 60 %, 40 s left"]


def test_a_first_item_that_takes_long_has_no_estimate(monkeypatch, capsys):
    """By hand: the first item comes after 30 s, when nothing is done; the second after 60 s."""
    seconds = iter((0.0, 30.0, 60.0))
    monkeypatch.setattr(words.time, "monotonic", lambda: next(seconds))
    assert list(words.with_progress("ab", "looking", 2)) == ["a", "b"]
    assert capsys.readouterr().err == "looking: 50 %, 1 min 0 s left\n"


def test_nothing_is_told_of_what_is_quick(capsys):
    assert list(words.with_progress([], "looking", 0)) == []
    assert list(words.with_progress([1, 2], "looking", 2)) == [1, 2]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(clock, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any file for a terminal
    monkeypatch.setattr(words.time, "monotonic", lambda: pytest.fail("no line"))
    assert list(words.with_progress("abc", "looking", 3)) == list("abc")
