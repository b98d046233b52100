"""What is known about a finished run, how sure its accuracy is, and the templates that say it: summary.md and card.

All shares are fractions in [0, 1], all times seconds, all counts whole numbers.

Sources of the intervals
    Wilson, JASA 22 (1927) 209-212: the score interval of one proportion; honest near 0 % and 100 % too.
    Tango, Statistics in Medicine 17 (1998) 891-908: the score interval of a difference of paired proportions.
    McNemar, Psychometrika 12 (1947) 153-157: only images that one model gets right and the other wrong tell
    the two apart; the exact p-value is a two-sided sign test on them.

Tango's interval is asymptotic: summed over all outcomes, its coverage at 95 % is 95.0 % to 95.7 % for 100
images and falls to 93.0 % for 40 of which 2 % and 20 % are right in one model only (enumerated in its test).

Both intervals say how far the result depends on which test images were drawn. They say nothing about the
luck of one training run: another seed moves the accuracy as well, and only more seeds can show how much.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moevision.efficiency import ModelCost
from moevision.errors import UserError
from moevision.files import write_text_atomic
from moevision.metrics import LayerLoad
from moevision.models.safe_files import read_json
from moevision.names import shown

if TYPE_CHECKING:
    from jinja2 import Environment

BALANCED = "val/balanced_acc"
"""Macro recall, what goes before accuracy where classes are unbalanced."""
_UNBALANCED = 1.5
_BISECTION_STEPS = 60  # halves [-1, 1] below the spacing of doubles


@dataclass(frozen=True)
class TestScores:
    """Results on the test images, each seen once by the finished model."""

    __test__ = False  # not a test class, whatever pytest makes of the name

    correct: int
    total: int
    majority_class: str
    """The class with the most training images."""
    majority_correct: int
    """Test images of that class: what always answering it would get right."""
    loss: float
    balanced_accuracy: float
    """Mean over classes of the share recognised, in [0, 1]."""
    ece: float
    """Expected calibration error in [0, 1], without the temperature."""
    top5: float | None = None
    """Share with the right class among the five likeliest; None with five classes or fewer."""
    per_class: Sequence[tuple[str, int, int]] = ()
    """(class in words, recognised test images, test images) in class order."""
    temperature: float | None = None
    """Of the calibrated confidence, that of `predict`; None: not calibrated."""
    calibrated_on: int = 0
    """Validation images that the temperature was fitted on."""
    calibrated_ece: float | None = None
    """Expected calibration error with the temperature; None too where a probability isn't finite."""
    weights: str = "the weights of the best validation epoch"
    """Which weights were tested and exported, e.g. the moving average (EMA) of the weights."""

    @property
    def accuracy(self) -> float:
        """Share of the test images that were recognised."""
        return self.correct / self.total

    @property
    def majority(self) -> float:
        """Share that always answering the majority class recognises."""
        return self.majority_correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return accuracy_interval(self.correct, self.total)

    def weakest(self, count: int) -> list[tuple[str, int, int]]:
        """The classes of which the smallest share was recognised, as in `per_class`."""
        return sorted((row for row in self.per_class if row[2]), key=lambda row: row[1] / row[2])[:count]


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of model a minus accuracy of model b on the same n images."""

    difference: float
    low: float
    high: float
    n: int
    only_a: int
    """Images that a classifies correctly and b doesn't."""
    only_b: int
    p_value: float
    """Exact McNemar test of "both are right equally often"."""
    level: float = 0.95


@dataclass(frozen=True)
class TwinComparison:
    """The dense twin trained by the same recipe, tested on the same images."""

    difference: PairedDifference
    """Accuracy of the MoE model (a) minus that of the twin (b)."""
    match: str
    """What the twin has in common, e.g. "active FLOPs"."""
    correct: int
    """Test images that the twin classified correctly."""
    cost: ModelCost
    duration_s: float
    images_per_s: float


@dataclass(frozen=True)
class Contender:
    """One of the models that a run can end with, on the same test images as the others."""

    name: str
    """`linear probe`, `dense fine-tune` (or `dense twin`), `Mixture of Experts`."""
    correct: int
    total: int
    balanced_accuracy: float
    behind: PairedDifference
    """Accuracy of the best of them minus this one's; of balanced accuracy where classes are unbalanced."""
    ms_per_image: float | None
    """One image at a time, on the device of the training; the median of a few. None: not measured."""
    mbytes: float
    """Of its weights as a file."""
    train_s: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return accuracy_interval(self.correct, self.total)

    @property
    def within_error(self) -> bool:
        """Whether it isn't shown to be worse than the best."""
        return self.behind.low <= 0


@dataclass(frozen=True)
class Choice:
    """Which model to use: the simplest of those that aren't shown to be worse than the best."""

    contenders: Sequence[Contender]
    """The simplest first."""
    unbalanced: bool
    """Whether classes differ so much in size that balanced accuracy decides."""
    experts_given: bool = False
    """Whether training began with experts: the linear probe is of them, and no dense model can be trained."""

    @property
    def recommended(self) -> Contender:
        """The simplest within error."""
        return next(each for each in self.contenders if each.within_error)

    @property
    def sentence(self) -> str:
        """The advice, and why."""
        best, chosen = min(self.contenders, key=lambda each: each.behind.difference), self.recommended
        advice = {"linear probe": "Use the linear probe", "Mixture of Experts": "Use the Mixture of Experts"}
        measure = "balanced accuracy" if self.unbalanced else "accuracy"
        why = (
            f"nothing here has a higher {measure}"
            if chosen.behind.difference == best.behind.difference
            else f"its {measure} is not shown to be lower than that of the {best.name} "
            f"({points(-chosen.behind.difference)} points, 95 % interval {points(-chosen.behind.high)} to "
            f"{points(-chosen.behind.low)}), and it is simpler"
        )
        return f"{advice.get(chosen.name, 'Use dense')}: {why}. One seed; another one moves all of them."


@dataclass(frozen=True)
class RunSummary:
    """Everything that summary.md says about one finished run."""

    name: str
    model: str
    """Name and essential arguments, e.g. "vit_moe_micro_patch4_32 (8 experts, 2 per token)"."""
    data: str
    """What was trained on: the folder's or dataset's name."""
    image_size: int
    split_note: str
    """Which images were train, validation and test, and where they come from; one sentence each."""
    class_counts: Mapping[str, Mapping[str, int]]
    """Images per split and class in words."""
    test: TestScores
    cost: ModelCost
    epochs: int
    steps: int
    """Optimizer steps that were applied."""
    batch_size: int
    """Images per optimizer step, over all devices and accumulation."""
    duration_s: float
    images_per_s: float
    """Training images per second, validation left out."""
    device: str
    precision: str
    seed: int | None
    """None: drawn anew each time, and not known."""
    refused: int = 0
    """Optimizer steps that weren't applied, by the guard or while fp16 looked for its scale."""
    cpu_s: float | None = None
    """CPU seconds of the training, over all threads of this process; None if a part of it wasn't counted."""
    data_wait: float | None = None
    """Share of the training time in which the process waited for data; None where it wasn't measured."""
    layers: Sequence[LayerLoad] = ()
    bad_images: Sequence[tuple[str, str, str]] = ()
    """(path, reason, split) of files that could not be read."""
    notes: Sequence[str] = ()
    """Whatever was skipped, stopped early or otherwise not as asked, a sentence each."""
    twin: TwinComparison | None = None
    choice: Choice | None = None
    """Beside a linear probe, the dense fine-tune, or both; None where there was neither."""
    ms_per_image: float | None = None
    """One image at a time, on the device of the training."""
    mbytes: float | None = None
    """Of the weights as a file."""
    expected_s: float | None = None
    """How long the training was expected to take when it began; None where nothing was said."""
    monitor: str | None = None
    """What best.ckpt had the highest of; None in summaries of earlier versions, which was val/top1."""

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


def read_summary(file: Path) -> RunSummary:
    """Read the summary.json of a run folder.

    Raises:
        UserError: if it isn't there, is damaged, or was written by a version with other fields.
    """
    try:
        given: dict[str, Any] = read_json(file)
        given.pop("next_commands", None)  # of earlier versions, always empty
        return RunSummary(
            **{
                **given,
                "test": TestScores(**_number(given["test"], "loss")),
                "cost": ModelCost(**given["cost"]),
                "layers": [LayerLoad(**_number(layer, "entropy_bits")) for layer in given["layers"]],
                "twin": None if given.get("twin") is None else _read_twin(given["twin"]),
                "choice": None if given.get("choice") is None else _read_choice(given["choice"]),
            }
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{file} can't be read as the summary of a run ({type(error).__name__}: {error}): "
            "give a run folder that this version of moevision has finished."
        ) from error


def _number(given: dict[str, Any], name: str) -> dict[str, Any]:
    """With NaN for null, which JSON says for a number that isn't finite."""
    return given if given[name] is not None else {**given, name: math.nan}


def _read_twin(given: dict[str, Any]) -> TwinComparison:
    difference, cost = PairedDifference(**given["difference"]), ModelCost(**given["cost"])
    return TwinComparison(**{**given, "difference": difference, "cost": cost})


def _read_choice(given: dict[str, Any]) -> Choice:
    contenders = [Contender(**{**each, "behind": PairedDifference(**each["behind"])}) for each in given["contenders"]]
    return Choice(**{**given, "contenders": contenders})


def write_summary(summary: RunSummary, out: Path) -> None:
    """Write summary.md, whole or not at all; the files it lists are those that lie beside `out` by then.

    It adds nothing to what the summary says, except intervals and chance levels that follow from the counts. Parts
    without data (no twin, no bad image) are left out or said to be absent.

    Raises:
        OSError: the folder can't be written.
    """
    run = Path(out).parent
    present = {file.name for file in run.iterdir()} if run.is_dir() else set()

    def path(name: str) -> str:
        return shlex.quote(str(run / name))

    # A training that ends within its first epoch has no best one.
    tested = next((name for name in ("best.ckpt", "last.ckpt") if (run / "checkpoints" / name).exists()), "best.ckpt")
    write_text_atomic(out, render("summary.md.jinja", summary=summary, present=present, path=path, tested=tested))


def render(template: str, **values: Any) -> str:
    """A template of this package with these values in it.

    Markdown has no escaping that fits everywhere, so the templates pass names from outside through `cell` or `shown`.
    """
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    words = {"cell": cell, "percent": percent, "points": points, "flops": flops, "duration": duration}
    environment.filters |= {**words, "number": number, "shown": shown, "json": json.dumps}
    environment.globals |= {"log2": math.log2, "isfinite": math.isfinite}
    return environment


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], align: str | None = None) -> str:
    """A Markdown table; `align` holds l or r per column, by default text left and all figures right."""
    sides = align or "l" + "r" * (len(heads) - 1)
    rule = ["---" if side == "l" else "--:" for side in sides]
    lines = [[cell(head) for head in heads], rule, *([cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(text: str) -> str:
    """Text that can't break a table or a line of Markdown or become a link (class names come from folder names)."""
    text = shown(" ".join(text.split()))
    return text.replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(")


def percent(share: float) -> str:
    """0.965 -> `96.5 %`."""
    return f"{100 * share:.1f} %"


def points(difference: float) -> str:
    """A difference of shares in percentage points with its sign: -0.013 -> `−1.3`."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def flops(count: int) -> str:
    """345_000_000 -> `345.00 M`."""
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.2f} M"


@dataclass(frozen=True)
class Entry:
    """One of the models to choose from.

    Attributes:
        name: as in `Contender`.
        correct: [n] whether each test image was classified correctly.
        ms_per_image: one image at a time; None: not measured.
        mbytes: of its weights.
        train_s: seconds of its training.
    """

    name: str
    correct: npt.NDArray[np.bool_]
    ms_per_image: float | None
    mbytes: float
    train_s: float


def choose(
    entries: Sequence[Entry], labels: npt.NDArray[np.int64], *, unbalanced: bool, experts_given: bool = False
) -> Choice:
    """Compare models on the same test images with the best of them.

    Args:
        entries: the simplest first.
        labels: [n] the class of each test image.
        unbalanced: whether balanced accuracy decides.
        experts_given: see `Choice`.
    """

    def balanced(correct: npt.NDArray[np.bool_]) -> float:
        return float(np.mean([correct[labels == label].mean() for label in np.unique(labels)]))

    best = max((entry.correct for entry in entries), key=balanced if unbalanced else np.mean)

    def behind(correct: npt.NDArray[np.bool_]) -> PairedDifference:
        return paired_macro_difference(best, correct, labels) if unbalanced else paired_difference(best, correct)

    contenders = [
        Contender(
            name=entry.name,
            correct=int(entry.correct.sum()),
            total=len(entry.correct),
            balanced_accuracy=balanced(entry.correct),
            behind=behind(entry.correct),
            ms_per_image=entry.ms_per_image,
            mbytes=entry.mbytes,
            train_s=entry.train_s,
        )
        for entry in entries
    ]
    return Choice(contenders, unbalanced, experts_given)


def is_unbalanced(counts: Iterable[int]) -> bool:
    """Whether the largest class has more than one and a half times the images of the smallest."""
    sizes = list(counts)
    return max(sizes) > _UNBALANCED * max(1, min(sizes))


def duration(seconds: float) -> str:
    """732.4 -> `12 min 12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def number(value: float) -> str:
    """12345.6 -> `12,346`."""
    return f"{value:,.0f}"


def accuracy_interval(correct: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval for an accuracy of correct / total.

    It holds the accuracies p that `correct` is at most z standard errors away from, with the standard error
    taken at p itself: |correct/total - p| <= z sqrt(p (1 - p) / total).

    Returns:
        (low, high) as fractions in [0, 1].

    Raises:
        UserError: there is no image, or `correct` isn't between 0 and `total`.
    """
    if total < 1 or not 0 <= correct <= total:
        raise UserError(f"an accuracy needs 0 <= correct <= total and a total of at least 1, got {correct} of {total}")
    z = _normal_quantile(level)
    share = correct / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    # At 0 % and 100 % the bound is exact; rounding must not push it off.
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == total else min(1.0, centre + half)
    return low, high


def paired_difference(
    correct_a: npt.NDArray[np.bool_], correct_b: npt.NDArray[np.bool_], level: float = 0.95
) -> PairedDifference:
    """Compare two models on the same images: difference of accuracies, Tango's interval, McNemar's p.

    Args:
        correct_a: [n] whether model a classified image i correctly.
        correct_b: [n] the same for model b, in the same order of images.
        level: of the interval.

    Raises:
        UserError: the two aren't non-empty boolean vectors of one length.
    """
    a, b = np.asarray(correct_a), np.asarray(correct_b)
    if a.dtype != np.bool_ or b.dtype != np.bool_ or a.ndim != 1 or a.shape != b.shape or a.size == 0:
        raise UserError(
            "a paired comparison needs two boolean vectors over the same test images, "
            f"got {a.dtype} {a.shape} and {b.dtype} {b.shape}"
        )
    n, only_a, only_b = a.size, int(np.sum(a & ~b)), int(np.sum(~a & b))
    low, high = _tango_interval(only_a, only_b, n, _normal_quantile(level))
    p_value = mcnemar_p_value(only_a, only_b)
    return PairedDifference((only_a - only_b) / n, low, high, n, only_a, only_b, p_value, level)


def paired_macro_difference(
    correct_a: npt.NDArray[np.bool_], correct_b: npt.NDArray[np.bool_], labels: npt.NDArray[np.int64]
) -> PairedDifference:
    """Compare the balanced accuracy of two models on the same images: the mean over classes of paired differences.

    The 95 % interval is Price and Bonett's (Computational Statistics & Data Analysis 45, 2004, 449-456) for a mean of
    proportions, here of paired differences as in Agresti and Min (Statistics in Medicine 24, 2005, 729-740): two images
    are added, shared by the classes, so that a class with one image, or whose images all agree, isn't certain. The
    p-value is McNemar's, of the plain accuracies.

    Args:
        correct_a: [n] whether model a classified image i correctly.
        correct_b: [n] the same for model b.
        labels: [n] the class of image i.

    Raises:
        UserError: the two can't be compared, see `paired_difference`.
    """
    plain = paired_difference(correct_a, correct_b)
    means, centres, variances = [], [], []
    classes = np.unique(labels)
    for label in classes:
        gaps = correct_a[labels == label].astype(float) - correct_b[labels == label].astype(float)
        images = len(gaps) + 2 / len(classes)
        means.append(gaps.mean())
        centres.append(gaps.sum() / images)
        variances.append((np.square(gaps).sum() + 1 / len(classes) - gaps.sum() ** 2 / images) / images**2)
    estimate, centre = float(np.mean(means)), float(np.mean(centres))
    half = _normal_quantile(plain.level) * math.sqrt(sum(variances)) / len(means)
    low, high = max(-1.0, centre - half), min(1.0, centre + half)
    return PairedDifference(estimate, low, high, plain.n, plain.only_a, plain.only_b, plain.p_value, plain.level)


def mcnemar_p_value(only_a: int, only_b: int) -> float:
    """Exact two-sided p: a fair coin thrown only_a + only_b times falls at least this unevenly."""
    throws, fewer = int(only_a + only_b), int(min(only_a, only_b))
    tail = term = 1  # C(throws, 0); each next C(throws, i + 1) follows from the one before
    for i in range(fewer):
        term = term * (throws - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << throws))  # whole numbers until here: exact for any number of images


def _tango_interval(only_a: int, only_b: int, n: int, z: float) -> tuple[float, float]:
    """All differences that the score test doesn't reject at z; the score falls as the difference grows."""
    estimate = (only_a - only_b) / n
    return (
        _bisect(only_a, only_b, n, z, -1.0, estimate),
        _bisect(only_a, only_b, n, -z, estimate, 1.0),
    )


def _bisect(only_a: int, only_b: int, n: int, target: float, low: float, high: float) -> float:
    for _ in range(_BISECTION_STEPS):
        middle = (low + high) / 2
        if paired_score(only_a, only_b, n, middle) > target:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def paired_score(only_a: int, only_b: int, n: int, difference: float) -> float:
    """Tango's score: (observed - assumed difference) over its standard error under the assumption.

    Under an assumed difference d the discordant cells have probabilities q + d and q; q is their maximum
    likelihood value, the larger root of 2n q^2 + (d (2n - only_a + only_b) - only_a - only_b) q
    - only_b d (1 - d) = 0. The variance of the difference is then (2q + d (1 - d)) / n.
    """
    a = 2 * n
    b = difference * (2 * n - only_a + only_b) - only_a - only_b
    c = -only_b * difference * (1 - difference)
    q = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    surplus = only_a - only_b - n * difference
    variance = n * (2 * q + difference * (1 - difference))
    if variance <= 0:  # d = 0 without a discordant image, and d = +-1: the sign is all there is
        return math.copysign(math.inf, surplus) if surplus else 0.0
    return surplus / math.sqrt(variance)


def _normal_quantile(level: float) -> float:
    if not 0 < level < 1:
        raise UserError(f"the level of an interval lies between 0 and 1, e.g. 0.95; got {level}")
    return NormalDist().inv_cdf((1 + level) / 2)
