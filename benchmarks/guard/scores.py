"""What the scores of the training images cost: CPU time inside their callback as a share of the training's.

    OMP_NUM_THREADS=1 python -m benchmarks scores-cost --data path/to/cifar10

A training by the recipe `cifar10`, cut to some steps; the last third counts experts too, as in a whole training.
Counted are CPU seconds of the training's thread, which other programs on the machine don't enter: those of the
callback's calls, and all from the first step to the last without validation. A loader's processes are not counted,
which makes the share larger. Rows are those of all 45,000 images.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L

from benchmarks.guard.cost import timed
from benchmarks.harness import about, argument_parser, write_result
from moevision.cli import main as run_moevision
from moevision.errors import UserError
from moevision.train.scores import ExampleScores

HOOKS = ["on_train_batch_start", "_observe", "on_train_batch_end"]


class Clocked(ExampleScores):
    """The callback with a clock."""

    spent_s: list[float]
    whole_s: float

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start."""
        super().on_train_start(trainer, pl_module)
        Clocked.spent_s, Clocked.whole_s = [], -time.thread_time()
        timed(self, HOOKS, Clocked.spent_s)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop."""
        Clocked.whole_s += time.thread_time()


def main() -> None:
    """Measure and print."""
    parser = argument_parser("scores-cost", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as a folder")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    origin: dict[str, Any] = about()
    from moevision.train import fit

    vars(fit)["ExampleScores"] = Clocked
    with tempfile.TemporaryDirectory() as runs:
        code = run_moevision(
            [
                "fit",
                "--config",
                "cifar10",
                "--data.path",
                str(options.data),
                "--data.download",
                "false",
                "--trainer.max_epochs",
                "1",
                "--trainer.limit_train_batches",
                str(options.steps),
                "--trainer.limit_val_batches",
                "1",
                "--runs_root",
                runs,
                "--name",
                "clocked",
            ]
        )
    if code:
        raise UserError(f"The training ended with code {code}, see above.")
    spent_s, whole_s = sum(Clocked.spent_s), Clocked.whole_s
    result = {
        **origin,
        "steps": options.steps,
        "step_cpu_ms": round(1000 * whole_s / options.steps, 2),
        "callback_cpu_ms": round(1000 * spent_s / options.steps, 3),
        "cost_percent": round(100 * spent_s / whole_s, 3),
    }
    write_result(options.out, result)


if __name__ == "__main__":
    main()
