"""What tests need beyond `pip install ".[test]"`, with the command that brings it; without it they are skipped.

`conftest.py` sums those skips up at the end. With MOEVISION_TESTS_COMPLETE=1 they fail the run, as in `.ci/run`.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple


class Need(NamedTuple):
    """Something that tests need."""

    name: str
    command: str
    is_here: Callable[[], object]


ROOT = Path(__file__).parents[1]
PHOTO_MODEL = "moevision/demo/models/photos"
"""The one folder with photos and weights of others, which may be left out."""


def chromium() -> str | None:
    """The browser's program, as MOEVISION_CHROMIUM or the search path names it; that without a window costs half."""
    named = os.environ.get("MOEVISION_CHROMIUM") or shutil.which("chromium-headless-shell")
    return named or shutil.which("chromium")


def _history() -> bool:
    """Whether this is a checkout with all its commits; a shallow clone and an unpacked archive are none."""
    words = ["git", "-C", str(ROOT), "rev-parse", "--is-shallow-repository", "--show-prefix"]
    asked = shutil.which("git") and subprocess.run(
        words, capture_output=True, text=True, check=False
    )
    return bool(asked) and asked.stdout.split() == [
        "false"
    ]  # an archive within a repository has a prefix


def _has(*packages: str) -> bool:
    return all(find_spec(package) is not None for package in packages)


NEEDS = {
    "chromium": Need("Chromium", "apt-get install chromium-headless-shell", chromium),
    "playwright": Need(
        "Playwright", 'pip install ".[test]"', lambda: _has("playwright", "axe_playwright_python")
    ),
    "node": Need("node", "apt-get install nodejs", lambda: shutil.which("node")),
    "npm": Need(
        "npm", "apt-get install npm", lambda: shutil.which("npm") or os.environ.get("MOEVISION_ORT")
    ),
    "onnx": Need(
        "ONNX", 'pip install ".[export]"', lambda: _has("onnx", "onnxscript", "onnxruntime")
    ),
    "transformers": Need("transformers", 'pip install ".[test]"', lambda: _has("transformers")),
    "accelerate": Need("accelerate", 'pip install ".[test]"', lambda: _has("accelerate")),
    "tensorboard": Need("TensorBoard", 'pip install ".[test]"', lambda: _has("tensorboard")),
    "mapie": Need("MAPIE", 'pip install ".[test]"', lambda: _has("mapie")),
    "datasets": Need("datasets", 'pip install ".[test]"', lambda: _has("datasets")),
    "mkdocs": Need(
        "mkdocs",
        'pip install ".[docs]"',
        lambda: _has("mkdocs", "material", "mkdocstrings", "pymdownx", "latex2mathml"),
    ),
    "photos": Need(
        "the bundled model of photos",
        f"git checkout {PHOTO_MODEL}",
        lambda: (ROOT / PHOTO_MODEL / "card.json").is_file(),
    ),
    "history": Need("the repository's history", "git fetch --unshallow, in a clone", _history),
    "notebooks": Need(
        "a notebook runner",
        'pip install ".[test]"',
        lambda: _has("nbformat", "nbclient", "ipykernel"),
    ),
}
