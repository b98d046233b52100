"""Losses of the quickstart's first 20 steps; `python -m tests.golden.first_steps` writes first_steps.json anew.

The file is written on one machine with one version of torch, which it names: elsewhere kernels add in another order.
Say in the commit why the losses changed.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from moevision.config import parse_args
from moevision.train.fit import train
from moevision.train.provenance import cpu_model
from moevision.train.recipe import read_request
from moevision.train.resume import Session, begin

FILE = Path(__file__).with_suffix(".json")
STEPS = 20
# float32, one thread and the CPU: by itself a run takes what is quickest on its machine.
SAME = ("--trainer.precision=32-true", "--trainer.accelerator=cpu")
# As shipped it draws 12,500 images first. With fewer, of which a step takes a fourth, its schedule stays that of 250
# steps, and everything else what it is.
OPTIONS: dict[str, tuple[str, ...]] = {
    "shipped": (),
    "fewer images": (
        "--data.train_size=240",
        "--data.val_size=8",
        "--data.test_size=8",
        "--data.batch_size=12",
        "--trainer.max_epochs=13",
        "--trainer.max_steps=250",
    ),
}


class EnoughStepsError(Exception):
    """Ends a training that was to be longer: its schedule stays the whole run's."""


class FirstLosses(L.Callback):
    """Keeps the training losses, and stops after `STEPS` of them."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.values.append(float(outputs["loss"]))
        if len(self.values) == STEPS:
            raise EnoughStepsError


def first_losses(options: Sequence[str], folder: Path) -> list[float]:
    """The first losses of `moevision fit --config quickstart` with these options; `folder` gets its run."""
    quiet = "--trainer.enable_progress_bar=false"
    args = parse_args(
        "fit", ["--config=quickstart", f"--runs_root={folder}", quiet, *SAME, *options]
    )
    session = Session(args.command)
    losses = FirstLosses()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        settings, start = begin(session, read_request("fit", args))
        train(settings, session, start, callbacks=[losses])
    except EnoughStepsError:
        pass
    finally:
        torch.set_num_threads(threads)
        session.close()
    return losses.values


def machine() -> dict[str, str]:
    """What the last digits depend on: the processor, the instructions that torch uses on it, and torch."""
    return {
        "processor": cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        losses = {
            name: first_losses(options, Path(folder, name)) for name, options in OPTIONS.items()
        }
    FILE.write_text(json.dumps({**machine(), "losses": losses}, indent=1) + "\n")
