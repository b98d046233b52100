"""On a machine where something is missing the tests pass, and say at the end what did not run and what brings it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Hides the packages of the extra `export`, for `import` and for `find_spec` alike.
WITHOUT_ONNX = """
import sys
from importlib.machinery import PathFinder
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.startswith("onnx") else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def run_tests(*arguments, path="", **environment):
    """Run tests in a process that finds no program, Chromium least of all."""
    hidden = ("MOEVISION_CHROMIUM", "MOEVISION_TESTS_COMPLETE", "PYTEST_ADDOPTS")
    env = {name: value for name, value in os.environ.items() if name not in hidden} | {"PATH": path} | environment
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def test_a_missing_browser_is_one_sentence_at_the_end():
    one = ("tests/demo/browser/test_tabs.py", "-k", "heatmap")
    done = run_tests(*one)
    assert done.returncode == 0, done.stdout
    told = [line for line in done.stdout.splitlines() if line.startswith("Skipped tests")]
    assert told == ["Skipped tests: 2 for want of Chromium (apt-get install chromium)."]
    complete = run_tests(*one, "-n", "1", MOEVISION_TESTS_COMPLETE="1")
    assert complete.returncode == 1, complete.stdout
    assert "MOEVISION_TESTS_COMPLETE is set, so this is a failure." in complete.stdout


def test_without_the_export_extra_its_tests_are_collected_and_the_others_run(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_ONNX)
    search = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = run_tests("tests/models/test_export.py", "-k", "opset and 17 or margin", PYTHONPATH=search)
    assert done.returncode == 0, done.stdout
    assert 'Skipped tests: 1 for want of ONNX (pip install ".[export]").' in done.stdout
