"""The bundled photo model as somebody has it who installed the wheel: offline, on photos that no training has seen.

    python -m benchmarks wheel --photos cats_vs_dogs/test --out benchmarks/demo/wheel.json

Builds the wheel of this checkout, installs it with its dependencies into a fresh virtualenv elsewhere, and lets its
`moevision predict` classify the photos (one subfolder per class) without a network.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.harness import HERE, LIBRARIES, about, argument_parser, write_result
from benchmarks.queue import refuse_changes

MODEL = "cats_vs_dogs"
WHERE = "import moevision; from pathlib import Path; print(Path(moevision.__file__).parent)"
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
}


def build(folder: Path) -> Path:
    """The wheel of this checkout, in `folder`."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        folder,
        HERE.parent,
    ]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def classify(wheel: Path, photos: Path, folder: Path) -> tuple[dict[Path, str], dict[str, str]]:
    """Install the wheel and ask it for the class of every photo; then the versions of what is installed there."""
    home = folder / "venv"
    venv.create(home, with_pip=True)
    subprocess.run([home / "bin" / "pip", "install", "--quiet", wheel], check=True)
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    } | OFFLINE
    run: dict[str, Any] = {"check": True, "cwd": folder, "env": clean, "text": True}
    where = subprocess.run(
        [home / "bin" / "python", "-c", WHERE], stdout=subprocess.PIPE, **run
    ).stdout.strip()
    assert Path(where).is_relative_to(home), where
    model = Path(where) / "demo" / "models" / MODEL / "trained"
    table = folder / "answers.csv"
    subprocess.run(
        [home / "bin" / "moevision", "predict", model, photos.resolve(), "--out", table], **run
    )
    with table.open(newline="", encoding="utf-8") as lines:
        answers = {Path(row["path"]): row["class"] for row in csv.DictReader(lines)}
    listed = subprocess.run(
        [home / "bin" / "pip", "list", "--format", "json"], stdout=subprocess.PIPE, **run
    ).stdout
    return answers, {each["name"]: each["version"] for each in json.loads(listed)}


def score(answers: dict[Path, str]) -> dict[str, Any]:
    """Photos and right answers of each class, and the mean of the classes' shares."""
    total = Counter(path.parent.name for path in answers)
    right = Counter(
        path.parent.name for path, answer in answers.items() if answer == path.parent.name
    )
    classes = {name: {"correct": right[name], "total": total[name]} for name in sorted(total)}
    return {
        "classes": classes,
        "balanced_accuracy": sum(right[name] / total[name] for name in total) / len(total),
    }


def main() -> None:
    """Build, install, classify, record."""
    parser = argument_parser("wheel", __doc__)
    add = parser.add_argument
    add("--photos", type=Path, required=True, metavar="FOLDER", help="one subfolder per class")
    add("--out", type=Path, help="write the record to this file")
    add("--allow-dirty", action="store_true", help="try it out with uncommitted changes")
    options = parser.parse_args()
    refuse_changes(HERE / "demo" / "README.md", allowed=options.allow_dirty)
    origin = about()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wheel = build(folder)
        answers, installed = classify(wheel, options.photos, folder)
        found = {
            "model": MODEL,
            "photos": f"{options.photos.resolve().parent.name}/{options.photos.name}",
            "wheel_mb": round(wheel.stat().st_size / 1e6, 1),
            **score(answers),
        }
    versions = {"python": origin["versions"]["python"]} | {
        name: installed[name] for name in ("moevision", *LIBRARIES) if name in installed
    }
    origin |= {"versions": versions}
    write_result(options.out, {**found, **origin})
