"""Hashes of four results that a change of the house must not change: a training, a resumed training, a report, a view.

    OMP_NUM_THREADS=1 python -m benchmarks unchanged --out before.json     # before
    OMP_NUM_THREADS=1 python -m benchmarks unchanged --against before.json # after: says what differs, exits with 1

About 6 CPU minutes. Equal hashes are expected on one machine with one torch only: other kernels round otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

import moevision
from moevision.train.provenance import cpu_model, git_state

LEFT_OUT = {"provenance", "effects"}
"""Parts of a report: how it was made, and what is measured on as many images as fit into a given time."""


def digest(value: Any) -> str:
    """SHA-256 of tensors, bytes and JSON values, whatever their order in a dict."""

    def as_json(value: Any) -> Any:
        return value.hex() if isinstance(value, bytes) else (str(value.dtype), value.tolist())

    text = json.dumps(value, sort_keys=True, default=as_json)
    return hashlib.sha256(text.encode()).hexdigest()


def run_verb(folder: Path, *words: str) -> None:
    """Run a command of the package in a folder."""
    subprocess.run(
        [sys.executable, "-m", "moevision", *words],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )


def quickstart(folder: Path) -> dict[str, Any]:
    """One epoch of the quickstart as it was before the redesign, with AdamW: weights and metrics."""
    adamw = ("--model.optim.name", "adamw", "--model.optim.lr", "1e-3")
    run_verb(folder, "fit", "--config", "quickstart", "--trainer.max_epochs", "1", *adamw)
    (run,) = (folder / "runs").iterdir()
    names = ("model/model.safetensors", "metrics.csv")
    return {f"quickstart, one epoch: {name}": (run / name).read_bytes() for name in names}


def resumed(folder: Path) -> dict[str, Any]:
    """One cell of the resume matrix: all state of a training that was interrupted and resumed."""
    from moevision.train.fit import quiet_lightning
    from tests.train import resume_matrix as matrix

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    setting = next(each for each in matrix.SETTINGS if each.name.startswith("EMA, bias"))
    with quiet_lightning():
        assert matrix.train(folder, setting, 11) == {}
        found, _ = matrix.newest_valid(folder / "checkpoints")
        state = matrix.compared(matrix.train(folder, setting, resume=found.path))
    callbacks = {key.split("{")[0]: value for key, value in state["callbacks"].items()}
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "metrics.csv")
    own = {key: state[key] for key in kept}
    return {"resumed training": {**own, "ema": callbacks.get("WeightEMA")}}


def report(folder: Path) -> dict[str, Any]:
    """The numbers of `analyze` on a bundled model."""
    model = Path(moevision.__file__).parent / "demo" / "models" / "pets" / "trained"
    data = ("--data", "synthetic_pets", "--limit", "200")
    run_verb(folder, "analyze", str(model), *data, "--out", "report")
    numbers = json.loads((folder / "report" / "report.json").read_bytes())
    return {"analyze: numbers of report.json": only_numbers(numbers)}


def only_numbers(value: Any) -> Any:
    """A JSON value without its sentences, which may change, and what is left out."""
    if isinstance(value, dict):
        kept = {key: only_numbers(each) for key, each in value.items() if key not in LEFT_OUT}
        return {key: each for key, each in kept.items() if each is not None}
    if isinstance(value, list):
        return [only_numbers(each) for each in value]
    return value if isinstance(value, int | float) else None


def view(folder: Path) -> dict[str, Any]:
    """The view of one drawn image."""
    from moevision.data import SyntheticPets
    from moevision.demo import bundled_model, route_image

    image = SyntheticPets(1, seed=3)[0][0]
    return {"route": route_image(bundled_model("pets"), image).to_json()}


def main() -> None:
    """Make the four, or compare them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path)
    add("--against", type=Path)
    options = parser.parse_args()
    found: dict[str, str] = {}
    for make in (view, resumed, report, quickstart):
        with tempfile.TemporaryDirectory() as folder:
            found |= {name: digest(value) for name, value in make(Path(folder)).items()}
    if options.out:
        about = {"machine": cpu_model(), "torch": torch.__version__}
        record = {**git_state(Path(moevision.__file__).parent), **about, "results": found}
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.against:
        before = json.loads(options.against.read_text(encoding="utf-8"))["results"]
        differs = sorted(name for name in before | found if before.get(name) != found.get(name))
        print(
            *(f"differs: {name}" for name in differs), f"{len(differs)} of {len(found)}", sep="\n"
        )
        sys.exit(bool(differs))
