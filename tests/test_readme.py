"""What the README shows works: its Python runs, its commands exist, its config names are shipped."""

import re
from pathlib import Path

import pytest

from moevision.cli import VERBS
from moevision.train.recipe import shipped_configs

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(
    r"^(?:.*&& )?(moevision [^\n#]+)", "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)), re.M
)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_runs(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_layer_in_a_plain_loop_is_short_and_balances() -> None:
    """At most 15 lines; after it every expert has work."""
    block = next(block for block in BLOCKS if "MoEMlp(" in block)
    assert len([line for line in block.splitlines() if line.strip()]) <= 15
    scope: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), scope)
    counts = scope["routings"][0].counts()  # type: ignore[index]
    assert counts.min() > 0
    assert scope["losses"][-1] < 0.8 * scope["losses"][0]  # type: ignore[index]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command: str) -> None:
    words = command.split()
    assert words[1] in VERBS
    if "--config" in words:
        name = words[words.index("--config") + 1]
        assert name in shipped_configs() or name.startswith("runs/")


def test_there_is_something_to_test() -> None:
    assert len(BLOCKS) >= 2
    assert len(COMMANDS) >= 5
