"""What the README shows works: its Python runs, its commands exist, its config names are shipped."""

import re
from pathlib import Path

import pytest

from tests.docs.test_docs import ROOT, check_command, commands, python_blocks, run

README = ROOT / "README.md"


@pytest.mark.parametrize(
    "block", python_blocks(README), ids=lambda block: block.splitlines()[-1][:30]
)
def test_python_runs(
    block: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    run(README, [block], {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", commands(README))
def test_commands_exist(command: str) -> None:
    check_command(command)


def test_there_is_something_to_test() -> None:
    assert python_blocks(README)
    assert len(commands(README)) >= 4


def test_it_has_the_commands_of_a_newcomer_and_of_a_developer() -> None:
    text = Path(README).read_text()
    blocks = re.findall(r"^```sh\n(.*?)\n```", text, re.M | re.S)
    commands = {command.strip() for block in blocks for command in block.split("&&")}
    assert {"pip install .", "moevision fit --config quickstart"} <= commands
    assert {'pip install ".[test]"', "pytest"} <= commands
