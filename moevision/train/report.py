"""What is known about a finished run, and the templates that say it: summary.md, and the model's card.

All shares are fractions in [0, 1], all times seconds, all counts whole numbers.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from moevision.efficiency import ModelCost
from moevision.errors import UserError, shown
from moevision.files import write_text_atomic
from moevision.metrics import LayerLoad
from moevision.models.safe_files import read_json
from moevision.train.stats import PairedDifference, accuracy_interval, paired_difference, paired_macro_difference
from moevision.words import duration, flops, percent, points

BALANCED = "val/balanced_acc"
"""Macro recall, what goes before accuracy where classes are unbalanced."""


@dataclass(frozen=True)
class TestScores:
    """Results on the test images, each seen once by the finished model.

    Attributes:
        majority_class: the class with the most training images.
        majority_correct: test images of that class: what always answering it would get right.
        balanced_accuracy: mean over classes of the share recognised.
        ece: expected calibration error, without the temperature.
        top5: share with the right class among the five likeliest; None with five classes or fewer.
        per_class: (class in words, recognised test images, test images) in class order.
        temperature: of the calibrated confidence, that of `predict`; None: not calibrated.
        calibrated_on: validation images that the temperature was fitted on.
        calibrated_ece: `ece` with the temperature; None too where a probability isn't finite.
        weights: which weights were tested and exported, e.g. the moving average (EMA) of the weights.
    """

    __test__ = False  # not a test class, whatever pytest makes of the name

    correct: int
    total: int
    majority_class: str
    majority_correct: int
    loss: float
    balanced_accuracy: float
    ece: float
    top5: float | None = None
    per_class: Sequence[tuple[str, int, int]] = ()
    temperature: float | None = None
    calibrated_on: int = 0
    calibrated_ece: float | None = None
    weights: str = "the weights of the best validation epoch"

    @property
    def accuracy(self) -> float:
        """Share of the test images that were recognised."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return accuracy_interval(self.correct, self.total)

    def weakest(self, count: int) -> list[tuple[str, int, int]]:
        """The classes of which the smallest share was recognised, as in `per_class`."""
        return sorted((row for row in self.per_class if row[2]), key=lambda row: row[1] / row[2])[:count]


@dataclass(frozen=True)
class TwinComparison:
    """The dense twin trained by the same recipe, tested on the same images.

    `difference` is the accuracy of the MoE model (a) minus the twin's (b), `match` what both have in common.
    """

    difference: PairedDifference
    match: str
    correct: int
    cost: ModelCost
    duration_s: float
    images_per_s: float


@dataclass(frozen=True)
class Contender:
    """One of the models that a run can end with, on the same test images as the others.

    Attributes:
        name: `linear probe`, `dense fine-tune` (or `dense twin`), `Mixture of Experts`.
        behind: accuracy of the best of them minus this one's; of balanced accuracy where classes are unbalanced.
        ms_per_image: one image at a time, on the device of the training; the median of a few. None: not measured.
        mbytes: of its weights as a file.
    """

    name: str
    correct: int
    total: int
    balanced_accuracy: float
    behind: PairedDifference
    ms_per_image: float | None
    mbytes: float
    train_s: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return accuracy_interval(self.correct, self.total)


@dataclass(frozen=True)
class Recommendation:
    """Which model to use: the simplest of those that aren't shown to be worse than the best; the simplest first.

    `experts_given`: training began with experts, so that the probe is of them and no dense model can be trained.
    """

    contenders: Sequence[Contender]
    unbalanced: bool
    experts_given: bool = False

    @property
    def recommended(self) -> Contender:
        """The simplest within error."""
        return next(each for each in self.contenders if each.behind.low <= 0)

    @property
    def sentence(self) -> str:
        """The advice, and why."""
        best, chosen = min(self.contenders, key=lambda each: each.behind.difference), self.recommended
        model = "dense" if chosen.name.startswith("dense") else f"the {chosen.name}"
        measure = "balanced accuracy" if self.unbalanced else "accuracy"
        why = f"nothing here has a higher {measure}"
        if chosen.behind.difference != best.behind.difference:
            why = (
                f"its {measure} is not shown to be lower than that of the {best.name} "
                f"({points(-chosen.behind.difference)} points, 95 % interval {points(-chosen.behind.high)} to "
                f"{points(-chosen.behind.low)}), and it is simpler"
            )
        return f"Use {model}: {why}. One seed; another one moves all of them."


@dataclass(frozen=True)
class RunSummary:
    """Everything that summary.md says about one finished run.

    Attributes:
        model: name and essential arguments, e.g. "vit_moe_micro_patch4_32 (8 experts, 2 per token)".
        data: what was trained on: the folder's or dataset's name.
        split_note: which images were train, validation and test, and where they come from; one sentence each.
        class_counts: images per split and class in words.
        steps: optimizer steps that were applied.
        batch_size: images per optimizer step, over all devices and accumulation.
        images_per_s: training images per second, validation left out.
        seed: None: drawn anew each time, and not known.
        refused: optimizer steps that weren't applied, by the guard or while fp16 looked for its scale.
        cpu_s: CPU seconds of the training, over all threads of this process; None if a part of it wasn't counted.
        data_wait: share of the training time in which the process waited for data; None where it wasn't measured.
        gpu_peak_bytes: most memory of tensors on the GPU, of this process and all it did; None on a CPU.
        bad_images: (path, reason, split) of files that could not be read.
        notes: whatever was skipped, stopped early or otherwise not as asked, a sentence each.
        choice: beside a linear probe, the dense fine-tune, or both; None where there was neither.
        ms_per_image: one image at a time, on the device of the training.
        mbytes: of the weights as a file.
        expected_s: how long the training was expected to take when it began; None where nothing was said.
        monitor: what best.ckpt had the highest of; None in summaries of earlier versions, which was val/top1.
    """

    name: str
    model: str
    data: str
    image_size: int
    split_note: str
    class_counts: Mapping[str, Mapping[str, int]]
    test: TestScores
    cost: ModelCost
    epochs: int
    steps: int
    batch_size: int
    duration_s: float
    images_per_s: float
    device: str
    precision: str
    seed: int | None
    refused: int = 0
    cpu_s: float | None = None
    data_wait: float | None = None
    gpu_peak_bytes: int | None = None
    layers: Sequence[LayerLoad] = ()
    bad_images: Sequence[tuple[str, str, str]] = ()
    notes: Sequence[str] = ()
    twin: TwinComparison | None = None
    choice: Recommendation | None = None
    ms_per_image: float | None = None
    mbytes: float | None = None
    expected_s: float | None = None
    monitor: str | None = None

    @property
    def unbalanced(self) -> bool:
        """Whether balanced accuracy comes first, because classes differ in size or it was asked for."""
        if self.monitor is None:
            return is_unbalanced(self.class_counts["train"].values())
        return self.monitor == BALANCED

    @property
    def classes(self) -> list[str]:
        """The classes of all splits, each once."""
        return list(dict.fromkeys(name for split in self.class_counts.values() for name in split))


def is_unbalanced(counts: Iterable[int]) -> bool:
    """Whether the largest class has more than one and a half times the images of the smallest."""
    sizes = list(counts)
    return max(sizes) > 1.5 * max(1, min(sizes))


class ComparedModel(NamedTuple):
    """One of the models to choose from; `correct` [n]: whether it classified each test image correctly."""

    name: str
    correct: npt.NDArray[np.bool_]
    ms_per_image: float | None
    mbytes: float
    train_s: float


def choose(
    models: Sequence[ComparedModel], labels: npt.NDArray[np.int64], *, unbalanced: bool, experts_given: bool = False
) -> Recommendation:
    """Compare models, the simplest first, with the best of them on the same test images of the classes `labels` [n]."""

    def balanced(correct: npt.NDArray[np.bool_]) -> float:
        return float(np.mean([correct[labels == label].mean() for label in np.unique(labels)]))

    best = max((model.correct for model in models), key=balanced if unbalanced else np.mean)
    contenders = [
        Contender(
            model.name,
            int(model.correct.sum()),
            len(model.correct),
            balanced(model.correct),
            paired_macro_difference(best, model.correct, labels)
            if unbalanced
            else paired_difference(best, model.correct),
            *model[2:],
        )
        for model in models
    ]
    return Recommendation(contenders, unbalanced, experts_given)


def read_summary(file: Path) -> RunSummary:
    """Read the summary.json of a run folder.

    Raises:
        UserError: if it isn't there, is damaged, or was written by a version with other fields.
    """

    def made(kind: Any, given: dict[str, Any], finite: str = "") -> Any:
        """One of the dataclasses; JSON has no NaN, which stands as null."""
        if finite and given[finite] is None:
            given = {**given, finite: math.nan}
        for name, inner in (("difference", PairedDifference), ("behind", PairedDifference), ("cost", ModelCost)):
            if name in given:
                given = {**given, name: inner(**given[name])}
        return kind(**given)

    try:
        given: dict[str, Any] = read_json(file)
        given.pop("next_commands", None)  # of earlier versions, always empty
        given["test"] = made(TestScores, given["test"], "loss")
        given["layers"] = [made(LayerLoad, layer, "entropy_bits") for layer in given["layers"]]
        if given.get("twin") is not None:
            given["twin"] = made(TwinComparison, given["twin"])
        if (choice := given.get("choice")) is not None:
            contenders = [made(Contender, each) for each in choice["contenders"]]
            given["choice"] = Recommendation(**choice | {"contenders": contenders})
        summary: RunSummary = made(RunSummary, given)
        return summary
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{file} can't be read as the summary of a run ({type(error).__name__}: {error}): "
            "give a run folder that this version of moevision has finished."
        ) from error


def write_summary(summary: RunSummary, out: Path) -> None:
    """Write summary.md, whole or not at all; the files it lists are those that lie beside `out` by then."""
    run = Path(out).parent
    # A training that ends within its first epoch has no best one.
    tested = next((name for name in ("best.ckpt", "last.ckpt") if (run / "checkpoints" / name).exists()), "best.ckpt")
    text = template("summary.md.jinja").render(
        summary=summary,
        present={file.name for file in run.iterdir()} if run.is_dir() else set(),
        path=lambda name: shlex.quote(str(run / name)),
        tested=tested,
    )
    write_text_atomic(out, text)


@cache
def template(name: str) -> Any:
    """A template of this package.

    Markdown has no escaping that fits everywhere, so the templates pass names from outside through `cell` or `shown`.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": cell, "percent": percent, "points": points, "flops": flops, "duration": duration}
    environment.filters |= {"number": "{:,.0f}".format, "shown": shown, "json": json.dumps}
    environment.globals |= {"log2": math.log2, "isfinite": math.isfinite}
    return environment.get_template(name)


def cell(text: str) -> str:
    """Text that can't break a table or a line of Markdown or become a link (class names come from folder names)."""
    text = shown(" ".join(text.split()))
    return text.replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(")
