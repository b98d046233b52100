"""The facts of a finished run, and the templates that write them: summary.md, and the model card.

The card is README.md beside the model, with the header that huggingface.co reads (Mitchell et al. 2019,
arXiv:1810.03993). It says what was not measured, since a reader can't see what was left out. Of paths on the computer
that trained the model it has the last part only, since the rest may be private.

All shares are fractions in [0, 1], all times seconds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import timm
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template, select_autoescape
from torch import nn

from moevision.data.named import NAMED, UNKNOWN, terms_of
from moevision.efficiency import ModelCost
from moevision.errors import UserError, escape_controls
from moevision.files import write_text_atomic
from moevision.layers import LayerLoad, moe_layers
from moevision.models.io import load_model
from moevision.models.safe_files import read_json, read_yaml
from moevision.stats import (
    PairedDifference,
    accuracy_interval,
    paired_difference,
    paired_macro_difference,
    shown_to_differ,
)
from moevision.types import Flags, Ints, Json
from moevision.words import duration, flops, percent, points, shell_word

# Values of --checkpoint.monitor; balanced accuracy (macro recall) replaces accuracy if classes are unbalanced.
BALANCED = "val/balanced_acc"
LOSS = "val/loss"
MAP = "val/map"  # mean average precision, where images have several labels
PROBE = "linear probe"
# MoE options that the model card's list leaves out: its table of layers has them, or they don't describe the model.
_UNLISTED_OPTIONS = ("moe_layers", "num_experts", "top_k", "router", "backend")


class ClassScores(NamedTuple):
    """Test results of a class: `recognised` of its `images`; `auroc` is one class against all others.

    A measure that is undefined for lack of images is None; average precision and threshold where images have one label.
    """

    name: str
    recognised: int
    images: int
    precision: float | None = None
    f1: float | None = None
    auroc: float | None = None
    ap: float | None = None
    threshold: float | None = None

    @property
    def recall(self) -> float | None:
        """Share of the class's images that were recognised."""
        return self.recognised / self.images if self.images else None


@dataclass(frozen=True)
class TestScores:
    """Results on the test images, each seen once by the finished model."""

    __test__ = False  # not a test class, whatever pytest makes of the name

    correct: int
    total: int
    majority_class: str  # the class with the most training images
    majority_correct: int  # test images of that class: what always predicting it would get right
    loss: float
    balanced_accuracy: float
    ece: float  # expected calibration error before temperature scaling
    # Share of images whose label is among the five likeliest classes; None with five classes or fewer.
    top5: float | None = None
    per_class: Sequence[ClassScores] = ()
    temperature: float | None = None  # of the confidence of `predict`; None: not calibrated
    calibrated_on: int = 0  # validation images that the temperature was fitted on
    # Expected calibration error after temperature scaling; None without it, or if a probability isn't finite.
    calibrated_ece: float | None = None
    weights: str = "the weights of the best validation epoch"  # that were tested and exported
    checkpoint: str | None = None  # the file that holds them; None in earlier versions' summaries
    # Where images have several labels: map, chance (its value for random answers), f1_micro, f1_macro, precision and
    # recall; `correct` then counts images with all labels right, `balanced_accuracy` is the recall. Else empty.
    multilabel: Mapping[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """Share of the test images that were recognised."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return accuracy_interval(self.correct, self.total)

    def weakest(self, count: int) -> list[ClassScores]:
        """The `count` classes with the lowest recall, lowest first."""
        tested = [row for row in self.per_class if row.images]
        return sorted(tested, key=lambda row: row.recall or 0)[:count]


@dataclass(frozen=True)
class TwinComparison:
    """The dense twin trained by the same recipe, tested on the same images.

    `difference` is the accuracy of the MoE model (a) minus the twin's (b). `match` is the quantity that is equal in
    both, e.g. "active FLOPs". The other fields are the twin's.
    """

    difference: PairedDifference
    match: str
    correct: int
    cost: ModelCost
    duration_s: float
    images_per_s: float
    # Which weights were tested, as `TestScores.weights`; None in earlier versions' summaries.
    weights: str | None = None


@dataclass(frozen=True)
class Contender:
    """One of the models that a run can end with, on the same test images as the others.

    `behind` is the best model's accuracy minus this one's, paired by image (balanced accuracy if classes are
    unbalanced). `mbytes` is the size of the weights file, `train_s` the seconds of training.
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
    """Which model to use: the simplest whose accuracy isn't significantly lower than the best one's.

    `contenders` are sorted from the simplest on. A linear probe is recommended only if no model has a higher accuracy:
    predicting with it costs as much as with a fine-tuned model.

    `experts_given`: the pretrained model has experts already, so that the probe is of an MoE model and a dense one
    can't be trained.
    """

    contenders: Sequence[Contender]
    unbalanced: bool
    experts_given: bool = False

    @property
    def recommended(self) -> Contender:
        """The simplest model that isn't significantly worse than the best; the probe only if it is the best."""
        simplest = self.contenders[0]
        if simplest.name == PROBE and not simplest.behind.difference:
            return simplest
        models = [contender for contender in self.contenders if contender.name != PROBE]
        return next(model for model in models if not self.is_worse(model))

    def is_worse(self, contender: Contender) -> bool:
        """Whether a contender is significantly worse than the best."""
        return shown_to_differ(contender.behind, balanced=self.unbalanced)

    @property
    def sentence(self) -> str:
        """The advice and its reason."""
        best = min(self.contenders, key=lambda contender: contender.behind.difference)
        chosen = self.recommended
        measure = "balanced accuracy" if self.unbalanced else "accuracy"
        has_dense = any(contender.name.startswith("dense") for contender in self.contenders)
        model = "dense" if chosen.name.startswith("dense") else f"the {chosen.name}"
        if chosen.behind.difference:
            gap = f"isn't shown to be lower than that of the {best.name} ({_gap_text(chosen)})"
            advice = f"Use {model}: its {measure} {gap}, and it is simpler."
        elif has_dense or chosen.name == PROBE:
            advice = f"Use {model}: nothing here has a higher {measure}."
        else:
            gap = _gap_text(self.contenders[0])  # the probe's
            advice = f"The {PROBE} has a lower {measure} than the {chosen.name} ({gap})."
        if not has_dense and not self.experts_given:
            advice += " The dense model wasn't trained; in our measurements it does as well: add --with-twin."
        return f"{advice} One seed; another one moves all of them."


def _gap_text(contender: Contender) -> str:
    """How much lower a contender's accuracy is than the best one's, in points, with its interval."""
    behind = contender.behind
    low, high = points(-behind.high), points(-behind.low)
    return f"{points(-behind.difference)} points, 95 % interval {low} to {high}"


@dataclass(frozen=True)
class RunSummary:
    """Everything that summary.md says about one finished run."""

    name: str
    model: str  # for example "vit_moe_micro_patch4_32 (8 experts, 2 per token)"
    data: str
    image_size: int
    split_note: str  # which images were train, validation and test, and where they come from
    class_counts: Mapping[str, Mapping[str, int]]  # images per split and class in words
    test: TestScores
    cost: ModelCost
    epochs: float
    steps: int  # optimizer steps that changed the weights; `refused` are those that the stability guard kept from it
    batch_size: int  # images per optimizer step, over all devices and accumulation
    duration_s: float
    images_per_s: float  # training images per second, validation left out
    device: str
    precision: str
    seed: int | None  # None: generators weren't seeded, and the run can't be repeated exactly
    refused: int = 0
    # CPU seconds over all threads of this process; None if they were measured in part only.
    cpu_s: float | None = None
    # Share of the training time spent waiting for data; None where not measured.
    data_wait: float | None = None
    gpu_peak_bytes: int | None = None  # most memory of tensors on the GPU; None on a CPU
    layers: Sequence[LayerLoad] = ()
    # (path, reason, split) of files that could not be read.
    bad_images: Sequence[tuple[str, str, str]] = ()
    # Whatever was skipped, stopped early or otherwise not as configured, a sentence each.
    notes: Sequence[str] = ()
    twin: TwinComparison | None = None
    # Which of the model, its dense twin and a linear probe to use; None if there is only the model.
    choice: Recommendation | None = None
    ms_per_image: float | None = None  # one image at a time, on the device of the training
    mbytes: float | None = None  # of the weights as a file
    # Predicted seconds of the training; None if there was no prediction.
    expected_s: float | None = None
    # The metric that chose best.ckpt; None in earlier versions' summaries, which means val/top1.
    monitor: str | None = None
    validations: Sequence[float] = ()  # accuracy at each validation of the training
    # The most frequent mistakes of the test: class, what was answered, how often, test images of the class.
    mistakes: Sequence[tuple[str, str, int, int]] = ()
    # Test images that the detector of strangers refuses, and of how many; None without a detector.
    strangers: tuple[int, int] | None = None

    @property
    def unbalanced(self) -> bool:
        """Whether balanced accuracy is the main measure: chosen as monitor, or because class sizes differ."""
        if self.test.multilabel:
            return False
        if self.monitor in (None, LOSS):
            return is_unbalanced(self.class_counts["train"].values())
        return self.monitor == BALANCED

    @property
    def classes(self) -> list[str]:
        """The class names of all splits, without repetition."""
        return list(dict.fromkeys(name for split in self.class_counts.values() for name in split))


def is_unbalanced(counts: Iterable[int]) -> bool:
    """Whether the largest class has more than one and a half times the images of the smallest."""
    sizes = list(counts)
    return max(sizes) > 1.5 * max(1, min(sizes))


class ComparedModel(NamedTuple):
    """One of the models to choose from, with its results on the n test images that all of them classified."""

    name: str
    correct: Flags  # [n]
    ms_per_image: float | None
    mbytes: float
    train_s: float


def choose(
    models: Sequence[ComparedModel],
    labels: Ints,
    *,
    unbalanced: bool,
    experts_given: bool = False,
) -> Recommendation:
    """Recommend one of `models`, sorted from the simplest on, by the same n test images with `labels` [n]."""

    def balanced_accuracy(correct: Flags) -> float:
        return float(np.mean([correct[labels == label].mean() for label in np.unique(labels)]))

    measure = balanced_accuracy if unbalanced else np.mean
    best_correct = max((model.correct for model in models), key=measure)  # [n]

    contenders = []
    for model in models:
        behind = paired_difference(best_correct, model.correct)
        if unbalanced:
            behind = paired_macro_difference(best_correct, model.correct, labels)
        contender = Contender(
            model.name,
            correct=int(model.correct.sum()),
            total=len(model.correct),
            balanced_accuracy=balanced_accuracy(model.correct),
            behind=behind,
            ms_per_image=model.ms_per_image,
            mbytes=model.mbytes,
            train_s=model.train_s,
        )
        contenders.append(contender)
    return Recommendation(contenders, unbalanced, experts_given)


def read_summary(file: Path) -> RunSummary:
    """Read the summary.json of a run folder; a UserError if it isn't there, or another version wrote it."""
    try:
        summary: Json = read_json(file)
        summary.pop("next_commands", None)  # version 0.1 wrote it
        summary["cost"] = ModelCost(**summary["cost"])
        summary["layers"] = [
            LayerLoad(**_with_nan(layer, "entropy_bits")) for layer in summary["layers"]
        ]

        test = _with_nan(summary["test"], "loss")
        test["per_class"] = [ClassScores(*row) for row in test["per_class"]]
        summary["test"] = TestScores(**test)

        if summary.get("twin") is not None:
            twin = summary["twin"]
            twin["difference"] = PairedDifference(**twin["difference"])
            twin["cost"] = ModelCost(**twin["cost"])
            summary["twin"] = TwinComparison(**twin)

        if summary.get("choice") is not None:
            choice = summary["choice"]
            for contender in choice["contenders"]:
                contender["behind"] = PairedDifference(**contender["behind"])
            choice["contenders"] = [Contender(**row) for row in choice["contenders"]]
            summary["choice"] = Recommendation(**choice)
        return RunSummary(**summary)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{file} can't be read as the summary of a run ({type(error).__name__}: {error}): "
            "give a run folder that this version of moevision has finished."
        ) from error


def _with_nan(values: Json, name: str) -> Json:
    """A copy of `values`, with NaN at `name` if that was null there: JSON has no NaN."""
    if values[name] is None:
        return values | {name: math.nan}
    return dict(values)


def write_summary(summary: RunSummary, out: Path) -> None:
    """Write summary.md to `out`, atomically; it lists those files of the run that are beside it by then."""
    run_dir = Path(out).parent
    text = template("summary.md.jinja").render(
        summary=summary,
        present={file.name for file in run_dir.iterdir()} if run_dir.is_dir() else set(),
        path=lambda name: shell_word(str(run_dir / name)),
    )
    write_text_atomic(out, text)


@cache
def template(name: str) -> Template:
    """A Jinja template of this package, by file name.

    No escaping suits all of Markdown, so the templates pass names that users chose through the filters `cell` or
    `shown`.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "cell": cell,
        "percent": percent,
        "points": points,
        "flops": flops,
        "duration": duration,
        "number": "{:,.0f}".format,
        "shown": escape_controls,
        "json": json.dumps,
    }
    environment.globals |= {"log2": math.log2, "isfinite": math.isfinite}
    return environment.get_template(name)


def cell(text: str) -> str:
    """Text that can't break a table or a line of Markdown or become a link (class names come from folder names)."""
    text = escape_controls(" ".join(text.split()))
    return text.replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(")


# ---- the model card


class WeightsOrigin(NamedTuple):
    """The weights that a training started from: name (empty: from scratch), id on huggingface.co, licence."""

    name: str = ""
    hub_id: str = ""
    licence: str = ""


def gather_facts(run_dir: Path, summary: RunSummary) -> Json:
    """Gather what the template `card.md.jinja` needs about the model of a finished run."""
    model = load_model(str(run_dir))
    provenance = read_json(run_dir / "provenance.json")
    versions = {
        "moevision": provenance["moevision"],
        **provenance["libraries"],
        "Python": provenance["python"]["version"],
    }
    blocks = _moe_blocks(model.net)
    return {
        "architecture": _architecture(model.net),
        "blocks": blocks,
        "depth": len(cast(Any, model.net).blocks) if blocks else 0,
        "options": _other_options(model.net) if blocks else {},
        "class_names": model.class_names,
        "image_size": model.image_size,
        "summary": summary,
        "command": " ".join(map(_command_argument, provenance["command"])),
        "start": _weights_origin(run_dir),
        "versions": {name: str(version) for name, version in versions.items() if version},
    }


def _command_argument(argument: str) -> str:
    argument = escape_controls(without_path(argument))
    # One with a shortened path can't be run anyway, and reads better without quotes.
    return argument if "…" in argument else shell_word(argument)


def without_path(word: str) -> str:
    """An argument of a command with its path shortened to the last part: `--data.path=/home/me/cats` -> `…/cats`."""
    option, equals, value = word.rpartition("=")
    if value.startswith("hf-hub:") or not re.search(r"[/\\]", value):
        return word
    last = re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return f"{option}{equals}…/{last}"


def _architecture(net: nn.Module) -> str:
    """The name of the timm model, with the dense model that it was converted from in brackets."""
    config = getattr(net, "pretrained_cfg", None) or {}
    name = str(config.get("architecture") or type(net).__name__)
    base = dict(getattr(net, "_model_args", {})).get("base")
    return f"{name} ({base} with experts)" if base else name


def _moe_blocks(net: nn.Module) -> list[Json]:
    """A row per MoE layer for the card's table."""
    return [
        {
            "block": layer.layer_index,
            "router": layer.router_name,
            "experts": layer.router.num_experts,
            "per_token": layer.router.top_k,
        }
        for layer in moe_layers(net)
    ]


def _other_options(net: nn.Module) -> dict[str, str]:
    """The options of the MoE layers that the card lists below its table."""
    options = {}
    for option, value in dict(getattr(net, "moe_config", {})).items():
        if value is not None and option not in _UNLISTED_OPTIONS:
            values = value if isinstance(value, list) else [value]
            options[option] = ", ".join("–" if item is None else str(item) for item in values)
    return options


def _weights_origin(run_dir: Path) -> WeightsOrigin:
    """The pretrained weights that config.yaml names, with hub id and licence if timm knows them."""
    config = read_yaml(run_dir / "config.yaml")
    source = str(config["model"]["arch"]["pretrained"] or "")
    if source.startswith("hf-hub:"):
        return WeightsOrigin(source, source.removeprefix("hf-hub:").split("@")[0])
    if not source or Path(source).exists() or not timm.is_model(source):
        return WeightsOrigin(without_path(source))
    weights = cast(Any, timm.get_pretrained_cfg(source))
    return WeightsOrigin(source, weights.hf_hub_id or "", weights.license or "")


def model_card(facts: Json) -> str:
    """The card as Markdown, from `gather_facts`; the same facts always give the same text."""
    summary: RunSummary = facts["summary"]
    terms = terms_of(summary.data)
    experts = ["mixture-of-experts"] if facts["blocks"] else []
    metric, metric_name, value = "accuracy", "top-1 accuracy", summary.test.accuracy
    if summary.test.multilabel:
        metric, metric_name, value = "f1", "micro F1", summary.test.multilabel["f1_micro"]
    result = EvalResult(
        task_type="image-classification",
        task_name="Image Classification",
        dataset_type=terms.hub_id or (summary.data if summary.data in NAMED else "imagefolder"),
        dataset_name=terms.title,
        dataset_split="test",
        metric_type=metric,
        metric_name=metric_name,
        metric_value=round(value, 4),
    )
    header = ModelCardData(
        license="unknown",  # a value that huggingface.co defines
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "moevision", *experts, "vision-transformer"],
        base_model=facts["start"].hub_id or None,
        datasets=[terms.hub_id] if terms.hub_id else None,
        metrics=[metric],
        model_name=escape_controls(summary.name),
        eval_results=[result],
    )
    return template("card.md.jinja").render(
        facts=facts,
        terms=terms,
        header=header.to_yaml(),
        unknown_terms=UNKNOWN,
        without_example=without_example,
    )


def without_example(sentence: str) -> str:
    """A sentence about the data without the file name that it gives as an example, which may be private."""
    # `.*` is greedy and ends at the last bracket, since file names may contain brackets.
    return re.sub(r" \(for example .*\)", "", escape_controls(sentence))
