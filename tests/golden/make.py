"""Writes tests/golden/loss_curve.json anew: `python -m tests.golden.make` (say in the commit why it changed)."""

import json
import tempfile
from pathlib import Path

import torch

from tests.train.test_task import GOLDEN, loss_curve

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        losses = loss_curve(Path(folder))
    GOLDEN.write_text(json.dumps({"torch": torch.__version__, "losses": losses}, indent=1) + "\n")
