"""The facts of a finished run, and the templates that write them: summary.md, and the model card.

The card is README.md beside the model, with the header that huggingface.co reads (Mitchell et al. 2019,
arXiv:1810.03993). It says what was not measured, since a reader can't see what was left out. Nothing in it tells where
files lie on the computer that trained the model: of a path the last part is kept.

All shares are fractions in [0, 1], all times seconds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
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
from moevision.words import duration, flops, percent, points, shell_word

# Macro recall, which replaces accuracy where classes are unbalanced.
BALANCED = "val/balanced_acc"
LOSS = "val/loss"
PROBE = "linear probe"
_IN_TABLE = ("moe_layers", "num_experts", "top_k", "router", "backend")  # of the model card


class ClassScores(NamedTuple):
    """Test results of a class: `recognised` of its `images`; `auroc` is that of the class against all others.

    What can't be known without images is None.
    """

    name: str
    recognised: int
    images: int
    precision: float | None = None
    f1: float | None = None
    auroc: float | None = None

    @property
    def recall(self) -> float | None:
        """Share recognised."""
        return self.recognised / self.images if self.images else None


@dataclass(frozen=True)
class TestScores:
    """Results on the test images, each seen once by the finished model."""

    __test__ = False  # not a test class, whatever pytest makes of the name

    correct: int
    total: int
    majority_class: str  # the class with the most training images
    majority_correct: int  # test images of it
    loss: float
    balanced_accuracy: float
    ece: float  # expected calibration error, without the temperature
    # Share with the right class among the five likeliest; None with five classes or fewer.
    top5: float | None = None
    per_class: Sequence[ClassScores] = ()
    temperature: float | None = None  # of the confidence of `predict`; None: not calibrated
    calibrated_on: int = 0  # validation images that the temperature was fitted on
    # `ece` with the temperature; None too where a probability isn't finite.
    calibrated_ece: float | None = None
    weights: str = "the weights of the best validation epoch"  # that were tested and exported
    checkpoint: str | None = None  # the file that holds them; None in earlier versions' summaries

    @property
    def accuracy(self) -> float:
        """Share of the test images that were recognised."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return accuracy_interval(self.correct, self.total)

    def weakest(self, count: int) -> list[ClassScores]:
        """The classes of which the smallest share was recognised, as in `per_class`."""
        tested = [row for row in self.per_class if row.images]
        return sorted(tested, key=lambda row: row.recall or 0)[:count]


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
    # Of the twin, as `TestScores` has them; None in earlier versions' summaries.
    weights: str | None = None


@dataclass(frozen=True)
class Contender:
    """One of the models that a run can end with, on the same test images as the others.

    `behind` is the accuracy (where classes are unbalanced the balanced accuracy) of the best of them minus this one's,
    `mbytes` those of its weights as a file.
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
    """Which model to use: the simplest that isn't shown to be worse than the best, as `compare` has it.

    The simplest is the first of `contenders`. A linear probe is recommended only where nothing has a higher accuracy:
    predicting with it costs as much as with a fine-tuned model.

    `experts_given`: training began with experts, so that the probe is of them and no dense model can be trained.
    """

    contenders: Sequence[Contender]
    unbalanced: bool
    experts_given: bool = False

    @property
    def recommended(self) -> Contender:
        """The simplest that isn't shown to be worse than the best; the probe only if it is the best."""
        simplest = self.contenders[0]
        if simplest.name == PROBE and not simplest.behind.difference:
            return simplest
        models = [contender for contender in self.contenders if contender.name != PROBE]
        return next(model for model in models if not self.is_worse(model))

    def is_worse(self, contender: Contender) -> bool:
        """Whether it is shown to be worse than the best."""
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
            gap = f"isn't shown to be lower than that of the {best.name} ({_gap(chosen)})"
            advice = f"Use {model}: its {measure} {gap}, and it is simpler."
        elif has_dense or chosen.name == PROBE:
            advice = f"Use {model}: nothing here has a higher {measure}."
        else:
            gap = _gap(self.contenders[0])
            advice = f"The {PROBE} has a lower {measure} than the {chosen.name} ({gap})."
        if not has_dense and not self.experts_given:
            advice += " The dense model wasn't trained; in our measurements it does as well: add --with-twin."
        return f"{advice} One seed; another one moves all of them."


def _gap(contender: Contender) -> str:
    """How much worse than the best it is."""
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
    steps: int  # optimizer steps that were applied; `refused` are those that weren't
    batch_size: int  # images per optimizer step, over all devices and accumulation
    duration_s: float
    images_per_s: float  # training images per second, validation left out
    device: str
    precision: str
    seed: int | None  # None: drawn anew each time, and not known
    refused: int = 0
    # CPU seconds over all threads of this process; None if a part of it wasn't counted.
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
    choice: Recommendation | None = None  # beside a linear probe, the dense fine-tune, or both
    ms_per_image: float | None = None  # one image at a time, on the device of the training
    mbytes: float | None = None  # of the weights as a file
    # The time that was predicted for the training; None where none was.
    expected_s: float | None = None
    # What best.ckpt was the best epoch by; None in earlier versions' summaries: val/top1.
    monitor: str | None = None

    @property
    def unbalanced(self) -> bool:
        """Whether balanced accuracy comes first, because classes differ in size or it was asked for."""
        if self.monitor in (None, LOSS):
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
    models: Sequence[ComparedModel],
    labels: npt.NDArray[np.int64],
    *,
    unbalanced: bool,
    experts_given: bool = False,
) -> Recommendation:
    """Compare models, the simplest first, with the best of them on the same test images of the classes `labels` [n]."""

    def balanced_accuracy(correct: npt.NDArray[np.bool_]) -> float:
        return float(np.mean([correct[labels == label].mean() for label in np.unique(labels)]))

    measure = balanced_accuracy if unbalanced else np.mean
    best = max((model.correct for model in models), key=measure)
    contenders = []
    for model in models:
        behind = paired_difference(best, model.correct)
        if unbalanced:
            behind = paired_macro_difference(best, model.correct, labels)
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
        summary: dict[str, Any] = read_json(file)
        summary.pop("next_commands", None)  # of version 0.1
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


def _with_nan(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Values with NaN for null at `name`: JSON has no NaN."""
    return values | {name: math.nan} if values[name] is None else dict(values)


def write_summary(summary: RunSummary, out: Path) -> None:
    """Write summary.md, whole or not at all; the files it lists are those that lie beside `out` by then."""
    run = Path(out).parent
    text = template("summary.md.jinja").render(
        summary=summary,
        present={file.name for file in run.iterdir()} if run.is_dir() else set(),
        path=lambda name: shell_word(str(run / name)),
    )
    write_text_atomic(out, text)


@cache
def template(name: str) -> Template:
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
    """The weights that a training started from: name (empty: from scratch), address on the hub, licence."""

    name: str = ""
    hub_id: str = ""
    licence: str = ""


def gather_facts(run: Path, summary: RunSummary) -> dict[str, Any]:
    """Gather what is known about the model of a finished run; `card.md.jinja` describes it by its names."""
    model = load_model(str(run))
    provenance = read_json(run / "provenance.json")
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
        "command": " ".join(map(_command_word, provenance["command"])),
        "start": _weights_origin(run),
        "versions": {name: str(version) for name, version in versions.items() if version},
    }


def _command_word(word: str) -> str:
    word = escape_controls(without_path(word))
    return word if "…" in word else shell_word(word)


def without_path(word: str) -> str:
    """A word of a command with its path shortened to the last part: `--data.path=/home/me/cats` -> `…/cats`."""
    option, equals, value = word.rpartition("=")
    if value.startswith("hf-hub:") or not re.search(r"[/\\]", value):
        return word
    last = re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return f"{option}{equals}…/{last}"


def _architecture(net: nn.Module) -> str:
    """The timm name, with the base in brackets."""
    config = getattr(net, "pretrained_cfg", None) or {}
    name = str(config.get("architecture") or type(net).__name__)
    base = dict(getattr(net, "_model_args", {})).get("base")
    return f"{name} ({base} with experts)" if base else name


def _moe_blocks(net: nn.Module) -> list[dict[str, Any]]:
    """The rows of the card's table of MoE layers."""
    layers = moe_layers(net)
    routers = dict(getattr(net, "moe_config", {})).get("router", "unknown")
    if isinstance(routers, str):
        routers = [routers] * len(layers)
    blocks = []
    for layer, router in zip(layers, routers, strict=True):
        row = {
            "block": layer.layer_index,
            "router": router,
            "experts": layer.router.num_experts,
            "per_token": layer.router.top_k,
        }
        blocks.append(row)
    return blocks


def _other_options(net: nn.Module) -> dict[str, str]:
    """The options of the MoE layers that aren't in the table."""
    options = {}
    for option, value in dict(getattr(net, "moe_config", {})).items():
        if value is not None and option not in _IN_TABLE:
            values = value if isinstance(value, list) else [value]
            options[option] = ", ".join("–" if item is None else str(item) for item in values)
    return options


def _weights_origin(run: Path) -> WeightsOrigin:
    """The pretrained weights by config.yaml, with timm's facts about them."""
    config = read_yaml(run / "config.yaml")
    source = str(config["model"]["arch"]["pretrained"] or "")
    if source.startswith("hf-hub:"):
        return WeightsOrigin(source, source.removeprefix("hf-hub:").split("@")[0])
    if not source or Path(source).exists() or not timm.is_model(source):
        return WeightsOrigin(without_path(source))
    weights = cast(Any, timm.get_pretrained_cfg(source))
    return WeightsOrigin(source, weights.hf_hub_id or "", weights.license or "")


def model_card(facts: dict[str, Any]) -> str:
    """The card as Markdown, from `gather_facts`; the same facts always give the same text."""
    summary: RunSummary = facts["summary"]
    terms = terms_of(summary.data)
    experts = ["mixture-of-experts"] if facts["blocks"] else []
    result = EvalResult(
        task_type="image-classification",
        task_name="Image Classification",
        dataset_type=terms.hub_id or (summary.data if summary.data in NAMED else "imagefolder"),
        dataset_name=terms.title,
        dataset_split="test",
        metric_type="accuracy",
        metric_name="top-1 accuracy",
        metric_value=round(summary.test.accuracy, 4),
    )
    header = ModelCardData(
        license="unknown",  # huggingface.co's own word
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "moevision", *experts, "vision-transformer"],
        base_model=facts["start"].hub_id or None,
        datasets=[terms.hub_id] if terms.hub_id else None,
        metrics=["accuracy"],
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
    # To the last bracket: names have brackets too.
    return re.sub(r" \(for example .*\)", "", escape_controls(sentence))
