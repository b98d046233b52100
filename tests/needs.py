"""What tests need beyond `pip install ".[test]"`, with the command that brings it; without it they are skipped.

`conftest.py` sums those skips up at the end. With MOEVISION_TESTS_COMPLETE=1 they fail the run, as in `.ci/run`.
"""

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple


class Need(NamedTuple):
    """Something that tests need."""

    name: str
    command: str
    is_here: Callable[[], object]


PHOTO_MODEL = "moevision/demo/models/cats_vs_dogs"
"""The one folder with photos and weights of others, which may be left out."""


def chromium() -> str | None:
    """The browser's program, as MOEVISION_CHROMIUM or the search path names it."""
    return os.environ.get("MOEVISION_CHROMIUM") or shutil.which("chromium")


def _has(*packages: str) -> bool:
    return all(find_spec(package) is not None for package in packages)


NEEDS = {
    "chromium": Need("Chromium", "apt-get install chromium", chromium),
    "playwright": Need("Playwright", 'pip install ".[test]"', lambda: _has("playwright", "axe_playwright_python")),
    "node": Need("node", "apt-get install nodejs", lambda: shutil.which("node")),
    "onnx": Need("ONNX", 'pip install ".[export]"', lambda: _has("onnx", "onnxscript", "onnxruntime")),
    "transformers": Need("transformers", 'pip install ".[test]"', lambda: _has("transformers")),
    "accelerate": Need("accelerate", 'pip install ".[test]"', lambda: _has("accelerate")),
    "tensorboard": Need("TensorBoard", 'pip install ".[test]"', lambda: _has("tensorboard")),
    "datasets": Need("datasets", 'pip install ".[test]"', lambda: _has("datasets")),
    "mkdocs": Need(
        "mkdocs",
        'pip install ".[docs]"',
        lambda: _has("mkdocs", "material", "mkdocstrings", "pymdownx", "latex2mathml"),
    ),
    "photos": Need(
        "the bundled model of photos",
        f"git checkout {PHOTO_MODEL}",
        lambda: (Path(__file__).parents[1] / PHOTO_MODEL / "card.json").is_file(),
    ),
    "notebooks": Need("a notebook runner", 'pip install ".[test]"', lambda: _has("nbformat", "nbclient", "ipykernel")),
}
