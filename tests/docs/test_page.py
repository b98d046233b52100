"""The page's scripts compute what they show: their tests, in node."""

import subprocess
from pathlib import Path

import pytest

TESTS = sorted((Path(__file__).parent / "page").glob("*.test.js"))


@pytest.mark.needs("node")
@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_the_pages_scripts(path: Path) -> None:
    """No package.json says that they are modules, for it would be shipped: node finds that out, and would say so."""
    command = ["node", "--disable-warning=MODULE_TYPELESS_PACKAGE_JSON", "--test", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
