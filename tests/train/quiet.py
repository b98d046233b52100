"""A trainer that only trains; what tests read of a run."""

import logging
from pathlib import Path
from typing import Any

import lightning as L

from moevision.files import read_csv


def quiet_trainer(**options: Any) -> L.Trainer:
    """A CPU Trainer that logs nothing and keeps nothing."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    silent = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    fixed = {"accelerator": "cpu", "devices": 1, "precision": "32-true", "num_sanity_val_steps": 0}
    return L.Trainer(
        **{**silent, **fixed, "gradient_clip_val": 1.0, "use_distributed_sampler": False, **options}
    )


def logged(run: Path, name: str) -> list[float]:
    """The values of a metric in a run's metrics.csv, in order."""
    return [float(row[name]) for row in read_csv(run / "metrics.csv") if row[name]]
