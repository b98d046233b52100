"""Which weights of a finished training are tested, exported and compared: one rule for every model.

A schedule that came to its end is tested with its last weights, unless those of the best validation epoch are better by
more than a standard error of the paired difference on the validation images. The highest of several noisy values is
higher than it should be, and while the learning rate is high the weights are worse: benchmarks/checkpoint_choice has
what each rule costs. A training that ended before its schedule is tested with the weights of the best epoch.

Axes: n validation images.
"""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import lightning as L
import numpy as np
import numpy.typing as npt
from scipy.stats import sem

from moevision.data import ImageDataModule
from moevision.stats import paired_difference, paired_macro_difference
from moevision.train.checkpoint import BEST, LAST, check_checkpoint, verify
from moevision.train.processes import broadcast_from_rank0, gather_objects, print_rank0
from moevision.train.report import BALANCED, LOSS, read_summary
from moevision.train.task import ClassificationTask
from moevision.words import points

_MEASURES = {"val/top1": "accuracy", BALANCED: "balanced accuracy", LOSS: "loss"}


class FinalWeights(NamedTuple):
    """The checkpoint that a training is tested with, and which weights these are, in words."""

    checkpoint: Path
    words: str


class Validated(NamedTuple):
    """Of the validation images, in order, whether the weights are right [n], their loss [n], and the classes [n]."""

    correct: npt.NDArray[np.bool_]
    loss: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]


def choose_weights(
    trainer: L.Trainer, task: ClassificationTask, data: ImageDataModule, folder: Path, monitor: str
) -> FinalWeights:
    """The checkpoint in `folder` to test a training with, which has just ended; every process must call it.

    `monitor` is what best.ckpt is the best of. Where best.ckpt is of another step than last.ckpt, both classify the
    validation images once more.
    """
    tested: FinalWeights = broadcast_from_rank0(lambda: final_checkpoint(folder))
    if (
        tested.checkpoint.name != BEST
        or not schedule_ended(trainer)
        or broadcast_from_rank0(lambda: verify(folder / LAST)).fault
    ):
        return tested
    best, last = folder / BEST, folder / LAST
    best_step, last_step = (
        int(check_checkpoint(str(path))["global_step"]) for path in (best, last)
    )
    if best_step == last_step:
        return FinalWeights(
            last, f"the weights of the last epoch, which are the best by {monitor} too"
        )
    print_rank0(
        f"The last weights, or the best epoch's (step {best_step:,})? Both classify the validation images."
    )
    of_best, of_last = (_validate(trainer, task, data, path) for path in (best, last))
    gain, error = gain_of(of_best, of_last, monitor)
    size, spread = f"{points(gain)} points", f"{100 * error:.1f}"
    if monitor == LOSS:
        size, spread = f"{-gain:+.3f}", f"{error:.3f}"
    measured = (
        f"on {len(of_last.labels):,} validation images the {_MEASURES[monitor]} of the best epoch, step {best_step:,} "
        f"of {last_step:,}, differs by {size} from that of the last (standard error {spread})"
    )
    if gain > error:
        return FinalWeights(best, f"the weights of the best validation epoch: {measured}")
    return FinalWeights(last, f"the weights of the last epoch: {measured}")


def gain_of(best: Validated, last: Validated, monitor: str) -> tuple[float, float]:
    """How much better the first is by `monitor` on the same images, and the standard error of that."""
    if monitor == LOSS:
        less = last.loss - best.loss  # [n]
        return float(less.mean()), float(sem(less)) if len(less) > 1 else math.inf
    pair = paired_difference(best.correct, last.correct)
    if monitor == BALANCED:
        pair = paired_macro_difference(best.correct, last.correct, best.labels)
    return pair.difference, pair.standard_error


def schedule_ended(trainer: L.Trainer) -> bool:
    """Whether a training did all its epochs or steps, so that the learning rate came down to its end."""
    return trainer.current_epoch == trainer.max_epochs or trainer.global_step == trainer.max_steps


def _validate(
    trainer: L.Trainer, task: ClassificationTask, data: ImageDataModule, checkpoint: Path
) -> Validated:
    """Classify the validation images with the weights of a checkpoint."""
    # metrics.csv has the validations of the training, and none of these.
    loggers, trainer.loggers = trainer.loggers, []
    try:
        trainer.validate(task, data, ckpt_path=checkpoint, weights_only=True, verbose=False)
    finally:
        trainer.loggers = loggers
    names = ("index", "correct", "loss", "label")
    own = [
        row
        for batch in task.val_outputs
        for row in zip(*(batch[name].tolist() for name in names), strict=True)
    ]
    rows = sorted(
        chain.from_iterable(gather_objects(own))
    )  # of all processes, in the order of the images
    _, correct, loss, labels = zip(*rows, strict=True)
    return Validated(np.array(correct), np.array(loss, dtype=float), np.array(labels))


def final_checkpoint(folder: Path) -> FinalWeights:
    """What a training with these checkpoints would be tested with if nothing were measured: its best epoch.

    The last step if there is no best.ckpt, or it got damaged.
    """
    best = folder / BEST
    if not best.exists():  # a training that ends within its first epoch
        return FinalWeights(
            folder / LAST, "the weights of the last step, because there is no best.ckpt"
        )
    if (fault := verify(best).fault) is None:
        return FinalWeights(best, "the weights of the best validation epoch")
    print_rank0(f"warning: {best} {fault}: {LAST} is tested instead.")
    return FinalWeights(
        folder / LAST, "the weights of the last epoch, because best.ckpt was damaged"
    )


def checkpoint_of_run(run_dir: Path) -> Path:
    """The checkpoint that a run was tested with, by its summary; of a run that has none, that of its best epoch."""
    summary, folder = run_dir / "summary.json", run_dir / "checkpoints"
    name = read_summary(summary).test.checkpoint if summary.is_file() else None
    if name == LAST and (folder / LAST).is_file():
        return folder / LAST
    return final_checkpoint(folder).checkpoint
