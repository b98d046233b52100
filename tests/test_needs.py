"""On a machine where something is missing the tests pass, and say at the end what did not run and what brings it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.deep

ROOT = Path(__file__).parents[1]
# Hides packages, for `import` and for `find_spec` alike.
WITHOUT = """
import sys
from importlib.machinery import PathFinder
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.startswith({hidden!r}) else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def run_tests(folder, hidden, *arguments, **environment):
    """Run tests in a process that finds no program, Chromium least of all, and no package with a name like `hidden`."""
    (folder / "sitecustomize.py").write_text(WITHOUT.format(hidden=hidden))
    search = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    unset = ("MOEVISION_CHROMIUM", "MOEVISION_TESTS_COMPLETE", "PYTEST_ADDOPTS")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"PATH": "", "PYTHONPATH": search} | environment
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def test_without_a_browser_and_the_export_extra_their_tests_are_collected_and_the_others_run(
    tmp_path,
):
    files = ("tests/browser/test_tabs.py", "tests/models/test_export.py")
    done = run_tests(tmp_path, "onnx", *files, "-k", "heatmap or second_output or preparation")
    assert done.returncode == 0, done.stdout
    told = [line for line in done.stdout.splitlines() if line.startswith("Skipped tests")]
    chromium, onnx = (
        "2 for want of Chromium (apt-get install chromium-headless-shell)",
        '1 for want of ONNX (pip install ".[export]")',
    )
    assert told == [f"Skipped tests: {chromium}, {onnx}."]
    assert re.search(r"\d passed, 3 skipped", done.stdout)


def test_nothing_is_needed_to_collect_every_tier(tmp_path):
    """Of the files that name what may be missing, or import from one that does."""
    hidden = (
        "playwright",
        "axe_playwright_python",
        "onnx",
        "nbformat",
        "nbclient",
        "mkdocs",
        "tensorboard",
    )
    tests = [file for folder in ("tests", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    naming = {file: file.read_text(encoding="utf-8") for file in tests}
    naming = {
        file: text
        for file, text in naming.items()
        if any(name in text for name in (*hidden, "tests.browser"))
    }
    files = [str(file.relative_to(ROOT)) for file in naming if file.name.startswith("test_")]
    done = run_tests(tmp_path, hidden, "--collect-only", "-m", "deep or not deep", *files)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "tests/browser/test_tabs.py::" in done.stdout
    assert "tests/models/test_export.py::" in done.stdout


def test_where_nothing_may_be_missing_it_is_a_failure(tmp_path):
    """Also of a worker's tests, which the first process hears of."""
    light = ("tests/docs/test_notebooks.py", "-k", "stays_small", "-n", "1")
    done = run_tests(tmp_path, "nbformat", *light, MOEVISION_TESTS_COMPLETE="1")
    assert done.returncode == 1, done.stdout
    told = [line for line in done.stdout.splitlines() if line.startswith("Skipped tests")]
    missing = '6 for want of a notebook runner (pip install ".[test]")'
    assert told == [
        f"Skipped tests: {missing}. MOEVISION_TESTS_COMPLETE is set, so this is a failure."
    ]
