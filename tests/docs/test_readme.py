"""What the README shows works: its Python runs, its commands exist, its config names are shipped."""

from pathlib import Path

import pytest

from tests.docs.test_docs import ROOT, check_command, commands, python_blocks, run

README = ROOT / "README.md"


@pytest.mark.parametrize("block", python_blocks(README), ids=lambda block: block.splitlines()[-1][:30])
def test_python_runs(block: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run(README, [block], {})
    assert capsys.readouterr().out


def test_the_layer_in_a_plain_loop_is_short_and_balances() -> None:
    """At most 15 lines; after it every expert has work."""
    start = ROOT / "docs" / "index.md"
    block = next(block for block in python_blocks(start) if "MoEMlp(" in block)
    assert len([line for line in block.splitlines() if line.strip()]) <= 15
    scope: dict[str, object] = {}
    run(start, [block], scope)
    counts = scope["routings"][0].counts()  # type: ignore[index]
    assert counts.min() > 0
    assert scope["losses"][-1] < 0.8 * scope["losses"][0]  # type: ignore[index]


@pytest.mark.parametrize("command", commands(README))
def test_commands_exist(command: str) -> None:
    check_command(command)


def test_there_is_something_to_test() -> None:
    assert python_blocks(README)
    assert len(commands(README)) >= 4


def test_it_has_the_commands_of_a_newcomer_and_of_a_developer() -> None:
    text = Path(README).read_text()
    assert "```sh\npip install . && moevision fit --config quickstart\n```" in text
    assert '```sh\npip install ".[test]" && pytest\n```' in text
