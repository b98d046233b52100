"""What studies of several trainings share: one small model, two sets of images, and the rule that calls a difference.

Every run goes through what users run: `ImageDataModule`, `ClassificationTask` and Lightning's `Trainer`. The split and
the images stay the same for all seeds; a seed changes initial weights, noise, the order and the augmentation of the
training images, in the same way for every row of a study. Everything runs on one thread.

Axes: B images, C classes, E experts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
from scipy.stats import t as student

from benchmarks.subject import Subject
from moevision.data import ImageDataModule
from moevision.errors import UserError
from moevision.train.task import ClassificationTask
from moevision.words import points
from tests.train.quiet import quiet_trainer

IMAGE_SIZE, BATCH = 32, 64
MODEL = {
    "name": "vit_moe_micro_patch4_32",
    "patch_size": 8,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 2,
}
"""4 blocks of width 64 on 4 x 4 patches of 8 px, convolutional stem; blocks 1 and 3 may be MoE layers.

Chosen by what 45 s on one thread teach it about CIFAR-10 (V-MoE router, lr 2e-3, seed 0, validation): 48.3 % with 4 x 4
patches and 41 000 images, 39.6 % with 8 x 8 patches and 16 600.
"""
PRECISION = "32-true"  # at this width twice as fast as bf16 autocast on a CPU
SETTINGS = {"model": MODEL, "image_size": IMAGE_SIZE, "batch": BATCH, "precision": PRECISION}

CIFAR_PIXELS = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}


def open_data(
    name: str, cifar: str, *, pets: Sequence[int] = (16_384, 2_000, 4_000)
) -> ImageDataModule:
    """`synthetic_pets` (train, val and test images of each) or `cifar10` from the folder or name `cifar`."""
    sizes = dict(zip(("train_size", "val_size", "test_size"), pets, strict=True))
    options: dict[str, Any] = {
        "cifar10": {"path": cifar, **CIFAR_PIXELS},
        "synthetic_pets": {"path": name, **sizes},
    }
    data = ImageDataModule(
        image_size=IMAGE_SIZE, batch_size=BATCH, crop="pad", augment="light", **options[name]
    )
    data.setup()
    return data


def small(name: str, *, lr: float = 1e-3, num_classes: int = 10, **arch: Any) -> Subject:
    """The small model under a one-cycle schedule, with the balance losses that its router has by default."""
    return Subject(
        name, {**MODEL, **arch}, {"lr": lr}, num_classes=num_classes, image_size=IMAGE_SIZE
    )


def make_task(subject: Subject, seed: int) -> ClassificationTask:
    """A task with the initial weights of a seed."""
    L.seed_everything(seed, verbose=False)
    return subject.task()


def train(task: ClassificationTask, data: ImageDataModule, steps: int, seed: int) -> None:
    """Train for exactly `steps` steps; validation is left to `evaluate`.

    Raises:
        UserError: if training ended early (Lightning swallows Ctrl-C), so that half a run is never recorded.
    """
    data.seed = data.contents.datasets["train"].seed = seed
    L.seed_everything(seed, verbose=False)
    limits = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0}
    trainer = quiet_trainer(**limits, precision=PRECISION)
    trainer.fit(task, data)
    if (done := trainer.global_step) != steps:
        raise UserError(f"Training stopped after {done} of {steps} steps: start it again.")


def evaluate(task: ClassificationTask, data: ImageDataModule) -> dict[str, Any]:
    """Accuracy on the whole validation and test split, and the test split's load per MoE layer."""
    trainer = quiet_trainer(precision=PRECISION)
    (val,) = trainer.validate(task, data, verbose=False)
    (test,) = trainer.test(task, data, verbose=False)
    return {
        "val_top1": val["val/top1"],
        "test_top1": test["test/top1"],
        "test_loss": test["test/loss"],
        "layers": [asdict(load) for load in task.test_loads],
    }


# ---- the one rule by which every study calls a difference of accuracy
#
# A seed fixes initial weights, order and augmentation for all rows alike, so rows are compared seed by seed: Student's
# t of the gaps, from that pair's own spread alone, since rows differ in theirs. Intervals are of 95 %, each for itself.
# The verdict is Holm's over all contrasts of a list: if no row differed, the chance of any "above" or "below" in it
# would be 5 %. It covers the luck of training, not the choice of test images, which all rows share.


@dataclass(frozen=True)
class Row:
    """One row of a table: its learning rate where it has one, and its runs, one per seed."""

    name: str
    lr: float
    runs: list[dict[str, Any]]

    @property
    def by_seed(self) -> dict[int, float]:
        """Test accuracy of every seed."""
        return {run["seed"]: run["test_top1"] for run in self.runs}

    @property
    def mean(self) -> float:
        """Mean test accuracy."""
        return statistics.fmean(self.by_seed.values())

    def layers(self, quantity: str) -> list[float]:
        """Mean over seeds of a quantity of every MoE layer."""
        found = [[layer[quantity] for layer in run["layers"]] for run in self.runs]
        return [statistics.fmean(values) for values in zip(*found, strict=True)]


@dataclass(frozen=True)
class Contrast:
    """One row minus another, for every seed that both have.

    p is two-sided, adjusted by Holm over the list that this contrast is in; NaN with fewer than two seeds.
    """

    first: str
    second: str
    gaps: Sequence[float]
    p: float = math.nan

    @property
    def mean(self) -> float:
        """Mean gap."""
        return statistics.fmean(self.gaps)

    @property
    def half(self) -> float:
        """Half the width of the 95 % interval; infinite with fewer than two seeds."""
        if len(self.gaps) < 2:
            return math.inf
        return float(student.ppf(0.975, len(self.gaps) - 1)) * self.error

    @property
    def error(self) -> float:
        """Standard error of the mean gap."""
        return statistics.stdev(self.gaps) / math.sqrt(len(self.gaps))

    @property
    def own_p(self) -> float:
        """Two-sided p of this contrast alone."""
        if len(self.gaps) < 2:
            return math.nan
        if self.error == 0:
            return float(self.mean == 0)
        return 2 * float(student.sf(abs(self.mean) / self.error, len(self.gaps) - 1))

    @property
    def verdict(self) -> str:
        """`above`, `below`, or `not told apart`, which is not the same as equal."""
        return "not told apart" if not self.p < 0.05 else "above" if self.mean > 0 else "below"

    @property
    def interval(self) -> str:
        """`+1.6 (+0.2 to +2.9)`, in points, of 95 %."""
        low, high = points(self.mean - self.half), points(self.mean + self.half)
        return points(self.mean) + (f" ({low} to {high})" if self.gaps[1:] else "")


def contrasts(
    accuracies: Mapping[str, Mapping[int, float]], pairs: Sequence[tuple[str, str]]
) -> list[Contrast]:
    """The first minus the second row of each pair, judged together; pairs without a common seed are left out.

    `accuracies` are row -> seed -> test accuracy.
    """
    found = []
    for first, second in pairs:
        own, other = accuracies.get(first, {}), accuracies.get(second, {})
        if gaps := [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]:
            found.append(Contrast(first, second, gaps))
    adjusted = holm([contrast.own_p for contrast in found])
    return [
        Contrast(contrast.first, contrast.second, contrast.gaps, p)
        for contrast, p in zip(found, adjusted, strict=True)
    ]


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: the chance of any false verdict over the list stays below the level.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979) 65-70. NaN (nothing was tested) is left as it is.
    """
    order = sorted(
        (place for place, p in enumerate(ps) if not math.isnan(p)), key=lambda place: ps[place]
    )
    adjusted, largest = list(ps), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * ps[place]))
        adjusted[place] = largest
    return adjusted
