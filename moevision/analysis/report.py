"""`moevision analyze`: run a model over held-out images, measure what its experts do, and write one report.

report.html         one page with everything in it; written last, so if it exists, all other files do
report.json         all numbers of the page
trace.safetensors   the routing (`RoutingTrace.load`)
figures/*.png       the figures of the page

The stages are calls of public functions, in the order in which a notebook would make them; the report computes no
statistics of its own. The page is `templates/report.html.jinja` filled with `report.json` and the figures. The template
computes nothing, so the page can't disagree with the file.

Axes: I images, P patches, K choices, E experts, C classes, L MoE layers.
"""

from __future__ import annotations

import base64
import json
import math
import platform
import struct
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import jinja2
import numpy as np
import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

import moevision.analysis.plots as plots
from moevision import __version__
from moevision.analysis.audit import Finding, find, open_audited
from moevision.analysis.collect import UNREAD, Hooked, collect_routing, model_title
from moevision.analysis.describe import (
    ClassExpertMap,
    class_expert_map,
    fractions_of_parts,
    majority_part,
    part_expert_table,
)
from moevision.analysis.effects import class_effect
from moevision.analysis.images import (
    PictureSet,
    aligned_pictures,
    cached,
    pictures_for,
    run_folder,
)
from moevision.analysis.information import as_json
from moevision.analysis.intervention import Intervention
from moevision.analysis.questions import LayerAnswers, plain_answer, summary_lines, three_questions
from moevision.analysis.readings import layers_read, measure_baselines, recording_of
from moevision.analysis.trace import LayerTrace, RoutingTrace
from moevision.data.collection import interleave_by_class
from moevision.errors import (
    AT_LEAST_0,
    UserError,
    check_ranges,
    escape_controls,
    escape_controls_of_lines,
    refuse_equal_seeds,
)
from moevision.files import write_bytes_atomic, write_json_atomic, write_text_atomic
from moevision.layers import LayerLoad, moe_layers
from moevision.layers.routing import Kind as RoutingKind
from moevision.models.io import SavedModel, load_model
from moevision.models.safe_files import read_json, read_yaml
from moevision.types import Floats, Ints, Json, Pixels
from moevision.words import shell_word

# Of report.json; the number rises with a change that older readers would misread.
SCHEMA = "moevision.report/1"
HTML, NUMBERS, TRACE, FIGURES = "report.html", "report.json", "trace.safetensors", "figures"
LIBRARIES = ("torch", "timm", "numpy", "scipy", "scikit-learn", "matplotlib")
HERE = Path(__file__).parent
# Figures are drawn at 200 dots per inch; this shows 7.2 inches as 864 CSS pixels.
_CSS_PER_PIXEL = 0.6
_NUM_STAGES = 7  # of `analyze`
_NUM_OVERLAYS = 3  # images whose routes are drawn
_MAX_MISTAKES = 3  # pairs (true class, predicted class) that are examined
_MIN_PER_CLASS, _MAX_PER_CLASS = 3, 40  # images of each class on which ablations are measured
# What an ablated expert's patches get instead, by the kind of routing.
_ABLATION_EFFECT: dict[RoutingKind, str] = {
    "token_choice": "an expert's patches go to their next-best expert",
    "expert_choice": "where experts choose, an expert's patches lose it and no other takes its place",
    "soft": "in Soft MoE an expert's weight is shared out among the others",
}


@dataclass(frozen=True)
class ReportSettings:
    """What to analyze, and how thoroughly."""

    model: str  # a run folder, its model/ folder, or a timm address; see `code`
    data: str | None = None  # a folder or a dataset's name; None takes what the run was trained on
    root: str | None = None  # folder of named datasets; the run's own if None
    out: Path = Path("report")  # folder to write to
    limit: int = 1000  # images, the same number of each class; 1 000 by default
    seeds: tuple[str, ...] = ()  # other trainings of the same recipe, as addresses like `model`
    # the model before it was trained, as an address; the same architecture with fresh weights if None
    before: str | None = None
    permutations: int = 1000  # shuffles behind each chance level
    seed: int = 0  # random seed of images, patches, halves and permutations
    quick: bool = False  # fewer untrained models, and ablations on fewer images
    command: str = ""  # what was typed, for the record
    progress: bool = True  # show a progress bar
    code: bool = (
        False  # `model` is FILE.py:FUNCTION, whose code is run and returns a model from elsewhere
    )

    def __post_init__(self) -> None:
        at_least_20 = ("at least 20", lambda x: x >= 20, ("limit", "permutations"))
        check_ranges(self, [at_least_20, (*AT_LEAST_0, ("seed",))], "--")


Live = Callable[[SavedModel, Pixels, str, str | None], str]
"""(model, image, name of the image, class name) -> a live view of the image as HTML."""


class Effort(NamedTuple):
    """How thoroughly a report measures."""

    untrained: int  # number of untrained models, and of clusterings, as controls
    untrained_of_others: int  # the same for each other training
    draws: int  # random draws of the swap test
    effects_s: float  # seconds for ablating experts one at a time
    runs: int  # images that are run for each layer's findings, of a model from elsewhere


_QUICK = Effort(untrained=2, untrained_of_others=1, draws=1, effects_s=30, runs=2000)
_FULL = Effort(untrained=5, untrained_of_others=3, draws=2, effects_s=180, runs=8000)


@dataclass(frozen=True)
class Inputs:
    """The opened models and images that a report is made from."""

    model: SavedModel
    title: str  # of the model
    pictures: PictureSet
    others: list[tuple[str, SavedModel]]  # title and model of other trainings of the same recipe
    before: SavedModel | None  # the model before it was trained, if given


def analyze(settings: ReportSettings, live: Live | None = None) -> Json:
    """Analyze a model and write the report; return the contents of `report.json`.

    `live` makes the live views of the page; None leaves them out.
    """
    stages = Stages(settings.progress)
    inputs = load_inputs(settings)
    model = inputs.model
    folder = claim_folder(settings.out)
    with stages.bar, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=UNREAD)  # the report names the layers
        with stages.stage("collecting the routing"):
            trace = collect_routing(
                model, inputs.pictures, path=folder / TRACE, progress=False, name=inputs.title
            )
            (folder / HTML).unlink(missing_ok=True)  # it belongs to the trace that was replaced
        pictures = cached(aligned_pictures(inputs.pictures, trace))
        results = measure(inputs, pictures, trace, settings, stages)
        with stages.stage("drawing figures"):
            layers = [layer_numbers(layer) for layer in trace.layers]
            figures: list[Json] = []
            pngs: dict[str, bytes] = {}
            for drawn in draw_figures(trace, pictures, results, layers, settings.seed):
                figures.append({"file": drawn.file, "kind": drawn.kind, "title": drawn.title})
                pngs[drawn.file] = plots.figure_png(drawn.figure)
        wrong = wrong_routes(trace)
        views = live_views(model, trace, pictures, wrong, settings.seed, live) if live else []

    for layer, read in zip(layers, layers_read(model.net, trace), strict=True):
        layer["read"] = read
    numbers: Json = as_json(
        {
            "schema": SCHEMA,
            "title": f"What the experts of {trace.model} do",
            "settings": settings_numbers(settings, inputs),
            "model": model_numbers(trace, settings.model, model.image_size),
            "data": data_numbers(trace),
            "layers": layers,
            **results.to_json(trace),
            "wrong": wrong,
            "figures": figures,
            "provenance": provenance_of(settings, trace, stages),
        }
    )
    write_report(folder, numbers, render(numbers, pngs, views), pngs)
    return numbers


def load_inputs(settings: ReportSettings) -> Inputs:
    """Open all models and the images; a UserError if something is missing, or two trainings have the same seed."""
    addresses = (settings.model, *settings.seeds)
    refuse_equal_seeds((address, _training_seed(address)) for address in addresses)
    model = open_audited(settings.model) if settings.code else load_model(settings.model)
    if not settings.code and not moe_layers(model.net):
        raise UserError(
            f"{settings.model} has no MoE layers to look at: give a model with experts."
        )
    if isinstance(model, SavedModel) and model.thresholds:
        raise UserError(
            f"{settings.model} gives an image several labels, and analyze asks about images of one class: look at its "
            "experts by moevision demo."
        )
    # What a model from elsewhere was trained on isn't known: its user gives held-out images alone.
    is_folder = settings.code and Path(settings.data or "").is_dir()
    pictures = pictures_for(
        settings.model,
        model,
        settings.data,
        limit=settings.limit,
        root=settings.root,
        split="all" if is_folder else "test",
    )
    if pictures is None:
        raise UserError(
            f"{settings.model} doesn't say what it was trained on: give --data a folder with one subfolder per class, "
            "or a dataset's name such as synthetic_pets."
        )
    return Inputs(
        model=model,
        title=model_title(settings.model),
        pictures=pictures,
        others=[(model_title(address), load_model(address)) for address in settings.seeds],
        before=None if settings.before is None else load_model(settings.before),
    )


def _training_seed(address: str) -> int | None:
    """The random seed of a model's training, from its config.yaml; None if that can't be read or has none."""
    run = run_folder(address)
    if run is None:
        return None
    try:
        seed = read_yaml(run / "config.yaml").get("seed_everything")
    except (OSError, ValueError, AttributeError):  # treated as a model without a run
        return None
    return seed if isinstance(seed, int) else None


def settings_numbers(settings: ReportSettings, inputs: Inputs) -> Json:
    """The settings for report.json; no path but what the command itself contains."""
    return {
        "limit": settings.limit,
        "permutations": settings.permutations,
        "seed": settings.seed,
        "quick": settings.quick,
        "seeds": [title for title, _ in inputs.others],
        "before": settings.before and model_title(settings.before),
    }


def provenance_of(settings: ReportSettings, trace: RoutingTrace, stages: Stages) -> Json:
    """What a reader needs to repeat the report; no path, user or host but what the command itself contains."""
    return {
        "moevision": __version__,
        "command": settings.command,
        "started_utc": stages.started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - stages.clock, 1),
        "stages_s": stages.seconds,
        "seed": settings.seed,
        "weights_sha256": trace.provenance.get("weights_sha256"),
        "unreadable": trace.provenance.get("unreadable", 0),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


class Stages:
    """The progress bar of a report, and the seconds that each stage took."""

    def __init__(self, show: bool) -> None:
        self.started = datetime.now(UTC)
        self.clock = time.perf_counter()
        self.seconds: dict[str, float] = {}
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn())
        console = Console(stderr=True)
        hidden = not (show and console.is_terminal)  # elsewhere rich would leave an empty line
        self.bar = Progress(*columns, console=console, transient=True, disable=hidden)
        self.task = self.bar.add_task("", total=_NUM_STAGES)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The scope of one stage: shown in the progress bar, and timed."""
        number = len(self.seconds) + 1
        self.bar.update(self.task, description=f"{name} ({number} of {_NUM_STAGES})")
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)
        self.bar.advance(self.task)


@dataclass(frozen=True)
class Results:
    """All measurements of a report."""

    questions: Sequence[LayerAnswers]  # the three answers about each layer
    # block index -> class x expert map; empty with fewer than two labelled classes
    maps: dict[int, ClassExpertMap]
    # [I, P, parts] share of each patch that belongs to each part; None where images have none
    parts: Floats | None
    effects: Json  # effects of ablating experts, from `measure_effects`
    findings: Sequence[Finding] = ()  # about a model from elsewhere

    def to_json(self, trace: RoutingTrace) -> Json:
        """All numbers, and the answers in sentences: of each layer, and of the model (`summary_lines`)."""
        answers = summary_lines(self.questions)
        layers = []
        for layer, questions in zip(trace.layers, self.questions, strict=True):
            sentences = [f"{layer.name}: {answer.sentence}" for answer in questions.answers]
            numbers = [line for answer in questions.answers for line in answer.numbers]
            about = {"layer": layer.layer, "name": layer.name}
            layers.append(about | {"sentences": sentences, "numbers": numbers})
        why = self.effects["why"]
        return {
            "verdict": {
                "plain": plain_answer(answers),
                "headline": " ".join(answer.sentence for answer in answers).removesuffix("."),
                "answers": answers,
                "layers": layers,
            },
            "questions": self.questions,
            "findings": self.findings,
            # Not measured any more; kept empty for programs that read reports of earlier versions.
            "specialization": [],
            "stability": [],
            "maps": list(self.maps.values()),
            "effects": self.effects,
            "skipped": [{"what": "Taking experts away was left out", "why": why}] if why else [],
        }


def measure(
    inputs: Inputs,
    pictures: PictureSet,
    trace: RoutingTrace,
    settings: ReportSettings,
    stages: Stages,
) -> Results:
    """Run all measuring stages; `pictures` are the images of the trace, in its order."""
    effort = _QUICK if settings.quick else _FULL
    model = inputs.model
    seed = settings.seed
    parts = fractions_of_parts(pictures, trace.grid)
    with stages.stage("measuring what needs no learning"):
        baselines = measure_baselines(model, pictures, trace, seeds=effort.untrained)

    with stages.stage("looking at other trainings"):
        others = []
        for title, other in inputs.others:
            routes = collect_routing(other, pictures, progress=False, name=title)
            controls = measure_baselines(other, pictures, routes, seeds=effort.untrained_of_others)
            others.append(
                recording_of(other, pictures, routes, baselines=controls, swap=False, seed=seed)
            )

    with stages.stage("asking three questions"):
        before = None
        if inputs.before is not None:
            before = collect_routing(inputs.before, pictures, progress=False, name="before")

        recording = recording_of(
            model,
            pictures,
            trace,
            baselines=baselines,
            before=before,
            parts=None if parts is None else majority_part(parts),
            part_names=pictures.part_names,
            seed=seed,
        )
        questions = three_questions(
            recording,
            seeds=others,
            permutations=settings.permutations,
            draws=effort.draws,
            seed=seed,
        )

    with stages.stage("mapping classes to experts"):
        maps = {}
        labelled = trace.labels[trace.labels >= 0]
        if len(np.unique(labelled)) > 1:
            for layer in trace.layers:
                maps[layer.layer] = class_expert_map(
                    trace, layer.layer, num_permutations=settings.permutations, seed=seed
                )

    with stages.stage("taking experts away"):
        effects = measure_effects(model, pictures, trace, budget_s=effort.effects_s, seed=seed)
        findings = []
        if isinstance(model.net, Hooked):
            findings = find(recording, questions, trace, runs=effort.runs, seed=seed)
    return Results(questions, maps, parts, effects, findings)


def measure_effects(
    model: SavedModel, pictures: PictureSet, trace: RoutingTrace, *, budget_s: float, seed: int = 0
) -> Json:
    """Ablate every expert, one at a time, and measure the change of the true class's logit and probability.

    The number of images per class is chosen so that all ablations take about `budget_s` seconds, from the time of a
    first one.

    Returns:
        `rows`: one for each layer, expert and class; `experts`: for each layer and expert means over the classes, and
        the class that changes most; `pictures_per_class`; `what`: what happens to the patches of an ablated expert.
        Where it would take too long, or no class of the model has enough images, rows and experts are empty, and `why`
        has the reason.
    """
    kinds = dict.fromkeys(layer.kind for layer in trace.layers)
    effects: Json = {
        "what": "; ".join(_ABLATION_EFFECT[kind] for kind in kinds),
        "why": None,
        "pictures_per_class": 0,
        "rows": [],
        "experts": [],
    }
    classes = [
        name
        for label, name in enumerate(trace.class_names)
        if name in model.class_names and (trace.labels == label).sum() >= _MIN_PER_CLASS
    ]
    effects["why"] = _why_not_ablated(model.net, classes)
    if effects["why"] is not None:
        return effects

    # Time one ablation to find the number of images per class.
    calls = len(classes) * sum(layer.num_experts for layer in trace.layers)
    first_ablation = Intervention("ablate", layer=trace.layers[0].layer, expert=0)
    start = time.perf_counter()
    class_effect(model, pictures, classes[0], first_ablation, limit=_MIN_PER_CLASS, seed=seed)
    seconds_per_image = (time.perf_counter() - start) / _MIN_PER_CLASS
    per_class = min(_MAX_PER_CLASS, int(budget_s / (seconds_per_image * calls)))
    if per_class < _MIN_PER_CLASS:
        minutes = seconds_per_image * calls * _MIN_PER_CLASS / 60
        effects["why"] = (
            f"even {_MIN_PER_CLASS} images of each class would take about {minutes:.0f} minutes"
        )
        return effects

    for layer in trace.layers:
        expert_counts = layer.counts().sum(0)
        for expert in range(layer.num_experts):
            ablation = Intervention("ablate", layer=layer.layer, expert=expert)
            key = {"layer": layer.layer, "expert": expert}
            class_rows = []
            for name in classes:
                effect = class_effect(model, pictures, name, ablation, limit=per_class, seed=seed)
                class_rows.append(key | effect.to_json())
            name = f"L{layer.layer}·E{expert}"
            share = float(expert_counts[expert] / max(expert_counts.sum(), 1e-12))
            effects["rows"] += class_rows
            effects["experts"].append(
                key | {"name": name, "share": share} | _summary_of_classes(class_rows)
            )
    effects["pictures_per_class"] = per_class
    return effects


def _why_not_ablated(net: nn.Module, classes: Sequence[str]) -> str | None:
    """Why no expert of these classes' images can be ablated; None if it can."""
    if isinstance(net, Hooked):
        return "the findings have what each expert's removal costs"
    return None if classes else f"no class of the model has {_MIN_PER_CLASS} images here"


def _summary_of_classes(rows: Sequence[Json]) -> Json:
    """Means of one expert's rows over all classes, and the class whose logit changes most."""
    numbers: Json = {}
    for name in ("delta_logit", "control_delta_logit", "delta_p"):
        values = [row[name] for row in rows]
        # The control is None in all classes if an expert has none.
        numbers[name] = None if None in values else fmean(values)
    strongest = max(rows, key=lambda row: abs(row["delta_logit"]))
    numbers["strongest_class"] = strongest["class"]
    numbers["strongest_delta_logit"] = strongest["delta_logit"]
    numbers["strongest_control_delta_logit"] = strongest["control_delta_logit"]
    return numbers


def model_numbers(trace: RoutingTrace, address: str, image_size: int) -> Json:
    """Facts about the model; those of layers are lists if layers differ."""
    layers = trace.layers
    top_k = [layer.top_k if layer.kind == "token_choice" else None for layer in layers]
    return {
        "name": trace.model,
        "address": address,
        "image_size": image_size,
        "grid": list(trace.grid),
        "moe_blocks": [layer.layer for layer in layers],
        "num_experts": _common_value([layer.num_experts for layer in layers]),
        "top_k": _common_value(top_k),
        "experts_per_patch": _common_value([round(layer.experts_per_patch, 2) for layer in layers]),
        "routing": _common_value([layer.kind for layer in layers]),
        "route_by": _common_value([layer.route_by for layer in layers]),
        "class_names": list(trace.prediction_names or trace.class_names),
    }


def _common_value(values: list[Any]) -> Any:
    """The value if all layers have the same, or else the list of all values."""
    return values[0] if len(set(values)) == 1 else values


def data_numbers(trace: RoutingTrace) -> Json:
    """Facts about the images, and how many of each class are classified correctly."""
    classes = []
    for index, name in enumerate(trace.class_names):
        predictions = trace.predictions[trace.labels == index]
        row: Json = {"class": name, "n": len(predictions), "correct": None, "accuracy": None}
        if trace.accuracy is not None:
            row["correct"] = int((predictions == index).sum())
        if trace.accuracy is not None and len(predictions):
            row["accuracy"] = row["correct"] / len(predictions)
        classes.append(row)
    correct = sum(row["correct"] for row in classes) if trace.accuracy is not None else None
    return {
        "name": trace.data,
        "n_images": len(trace),
        "n_labelled": int((trace.labels >= 0).sum()),
        "correct": correct,
        "accuracy": trace.accuracy,
        "classes": classes,
    }


def layer_numbers(layer: LayerTrace) -> Json:
    """Load and certainty of one layer over all patches (class and register tokens are not traced).

    All experts of Soft MoE compute the same number of slots, so that their load is equal by construction; `counts` is
    then what patches take from each. Only where tokens choose can choices be dropped.
    """
    images, patches, _ = layer.expert_index.shape
    image_counts = layer.counts()  # [I, E]
    counts = image_counts.sum(0)  # [E]

    tokens_choose = layer.kind == "token_choice"
    computed = np.ones_like(counts) if layer.kind == "soft" else counts
    requested = counts
    if tokens_choose:
        requested = np.bincount(layer.expert_index.ravel(), minlength=layer.num_experts)

    load = LayerLoad.from_sums(
        layer.layer,
        torch.from_numpy(computed),
        torch.from_numpy(requested if tokens_choose else computed),
        entropy_bits=torch.tensor(layer.entropy_bits.sum(dtype=np.float64)),
        tokens=torch.tensor(images * patches),
        unrouted=torch.tensor((~layer.kept.any(-1)).sum()),
        count_squares=torch.from_numpy((image_counts**2).sum(0)),
        images=torch.tensor(images),
    )
    return {
        "layer": layer.layer,
        "name": layer.name,
        "kind": layer.kind,
        "num_experts": layer.num_experts,
        "top_k": layer.top_k if tokens_choose else None,
        "experts_per_patch": layer.experts_per_patch,
        "counts": counts.tolist(),
        "requested": requested.tolist(),
        "share": (counts / max(counts.sum(), 1e-12)).tolist(),
        "slowest": load.max_over_mean,
        "cv_squared": load.cv_squared,
        "cv_squared_floor": load.cv_squared_floor if tokens_choose else None,
        "dead": load.dead,
        "dropped": load.dropped if tokens_choose else None,
        "unrouted": load.unrouted,
        "entropy_bits": load.entropy_bits,
        "entropy_bits_most": math.log2(layer.num_experts),
        "margin": float(layer.margin.mean(dtype=np.float64)),
    }


def wrong_routes(trace: RoutingTrace, least: int = 3) -> list[Json]:
    """For the most frequent mistakes: whether the routes of the misclassified images resemble their true class.

    A mistake is a pair (true class, predicted class) with three groups of images: the misclassified ones, and the
    correctly classified ones of either class. The routes of a group are the shares of its patches whose first choice is
    each expert, in each layer. `to_label` and `to_other` are the distances of the misclassified images' routes from
    those of the true and of the predicted class: half the sum of absolute differences, 0 for equal shares, 1 for no
    expert in common. Pairs with fewer than `least` images in a group are left out.
    """
    if trace.prediction_names != trace.class_names:
        return []
    labels = trace.labels
    predictions = trace.predictions
    wrong = labels != predictions
    pairs = Counter(zip(labels[wrong].tolist(), predictions[wrong].tolist(), strict=True))

    mistakes: list[Json] = []
    for (label, predicted), count in pairs.most_common():
        if len(mistakes) == _MAX_MISTAKES:
            break
        groups = []
        for is_class, is_called in ((label, predicted), (label, label), (predicted, predicted)):
            groups.append(np.flatnonzero((labels == is_class) & (predictions == is_called)))
        if label < 0 or min(map(len, groups)) < least:
            continue
        layers = []
        for layer in trace.layers:
            if layer.kind == "token_choice":
                wrong_shares, label_shares, other_shares = (
                    _first_shares(layer, images) for images in groups
                )
                to_label = float(np.abs(wrong_shares - label_shares).sum() / 2)
                to_other = float(np.abs(wrong_shares - other_shares).sum() / 2)
                layers.append({"name": layer.name, "to_label": to_label, "to_other": to_other})
        mistakes.append(
            {
                "label": trace.class_names[label],
                "called": trace.class_names[predicted],
                "images": count,
                "index": groups[0].tolist(),
                "layers": layers,
            }
        )
    return mistakes


def _first_shares(layer: LayerTrace, images: Ints) -> Floats:
    """[E] share of the patches of some images whose first choice is each expert."""
    first = layer.expert_index[images, :, 0]
    return np.bincount(first.ravel(), minlength=layer.num_experts) / first.size


def live_views(
    model: SavedModel,
    trace: RoutingTrace,
    pictures: PictureSet,
    wrong: Sequence[Json],
    seed: int,
    live: Live,
) -> list[tuple[str, str]]:
    """(title, HTML) of live views: of an image drawn at random, and of one of the most frequent mistake."""
    if any(layer.kind != "token_choice" for layer in trace.layers):
        return []  # the view can only show routers by which patches choose experts
    titles = [(shown_pictures(trace, seed, 1)[0], "An image drawn at random")]
    if wrong:
        mistake = wrong[0]
        titles.append((mistake["index"][0], f"{mistake['label']}, called {mistake['called']}"))
    views = []
    for index, title in titles:
        label = trace.labels[index]
        class_name = trace.class_names[label] if label >= 0 else None
        name = escape_controls(trace.picture_names[index])
        views.append((title, live(model, pictures.image(index), name, class_name)))
    return views


# ---- figures


class Drawn(NamedTuple):
    """A figure with its kind (which selects the caption in the template), its file name and its title."""

    kind: str
    file: str
    title: str
    figure: Figure


def draw_figures(
    trace: RoutingTrace,
    pictures: PictureSet,
    results: Results,
    layers: Sequence[Json],
    seed: int = 0,
) -> Iterator[Drawn]:
    """All figures of a report, in its order.

    `layers` are the `layer_numbers` of each layer; `seed` is the random seed of the images and patches that are shown.
    """
    for number, image in enumerate(shown_pictures(trace, seed), start=1):
        overlay = plots.plot_overlay(pictures.image(image), trace, image)
        title = f"Which expert each patch goes to, image {number}"
        yield Drawn("overlay", f"overlay_{number}.png", title, overlay)

    names = [layer.name for layer in trace.layers]
    load = plots.plot_load(
        [layer["counts"] for layer in layers],
        names,
        requested=[layer["requested"] for layer in layers],
        kinds=[layer.kind for layer in trace.layers],
    )
    yield Drawn("load", "load.png", "Load of each expert", load)

    for layer in trace.layers:
        for kind, title, figure in _draw_layer(trace, pictures, results, layer, seed):
            yield Drawn(kind, f"{kind}_{layer.name}.png", f"{layer.name}: {title}", figure)

    rows = results.effects["rows"]
    if rows:
        classes = list(dict.fromkeys(row["class"] for row in rows))
        changes: list[Floats] = []  # [E, C] for each layer
        controls: list[Floats] = []  # the same shapes
        for layer in trace.layers:
            layer_rows = [row for row in rows if row["layer"] == layer.layer]
            shape = (layer.num_experts, len(classes))
            changes.append(_column(layer_rows, "delta_logit").reshape(shape))
            controls.append(_column(layer_rows, "control_delta_logit").reshape(shape))
        effects = plots.plot_effects(
            changes, controls, names, classes, what=results.effects["what"]
        )
        yield Drawn("effects", "effects.png", "Without one expert", effects)


def _column(rows: Sequence[Json], name: str) -> Floats:
    """The numbers named `name` of all rows; None becomes NaN."""
    return np.array([row[name] for row in rows], np.float64)


def shown_pictures(trace: RoutingTrace, seed: int, count: int = _NUM_OVERLAYS) -> list[int]:
    """Indices of images drawn at random, of different classes as long as there are any, not chosen to look good."""
    order = np.random.default_rng(seed).permutation(len(trace))
    turns = interleave_by_class(trace.labels[order].tolist())
    return [int(order[turn]) for turn in turns[:count]]


def _draw_layer(
    trace: RoutingTrace, pictures: PictureSet, results: Results, layer: LayerTrace, seed: int
) -> Iterator[tuple[str, str, Figure]]:
    """(kind, title, figure) of the figures of one layer."""
    if layer.layer in results.maps:
        classes = results.maps[layer.layer]
        figure = plots.plot_class_experts(
            classes.share,
            classes.significant,
            trace.class_names,
            layer_name=layer.name,
            excess=classes.excess,
            threshold=classes.threshold,
            kind=layer.kind,
        )
        yield "class_experts", "which classes use which expert", figure
    if results.parts is not None:
        table = part_expert_table(
            layer.expert_index, results.parts, layer.num_experts, layer.requested_share
        )
        figure = plots.plot_part_experts(
            table, pictures.part_names, layer_name=layer.name, kind=layer.kind
        )
        yield "parts", "which parts go to which expert", figure
    gallery = plots.plot_gallery(pictures, trace, layer.layer, seed=seed)
    yield "gallery", "what each expert gets", gallery


# ---- the page and the folder


def render(
    numbers: Mapping[str, Any], pictures: Mapping[str, bytes], live: Sequence[tuple[str, str]] = ()
) -> str:
    """The page, from `report.json`, its figures (file name -> PNG) and live views (title, HTML): nothing is fetched."""

    def image(entry: Mapping[str, Any]) -> Json:
        """A PNG for the page: its size in CSS pixels, and a data URI."""
        png = pictures[entry["file"]]
        # Width and height are at the start of the chunk IHDR, the first one after the signature.
        width, height = struct.unpack(">II", png[16:24])
        return {
            "width": round(width * _CSS_PER_PIXEL),
            "height": round(height * _CSS_PER_PIXEL),
            "src": f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}",
        }

    views = [(title, Markup(view)) for title, view in live]
    filters: dict[str, Callable[..., Any]] = {"image": image, "shell_word": shell_word}
    return render_page("report.html.jinja", filters, **numbers, live=views)


def render_page(template: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """A template filled with values; control characters are escaped."""
    pages = environment()
    pages.filters |= filters
    return escape_controls_of_lines(pages.get_template(template).render(values))


def environment() -> jinja2.Environment:
    """The jinja environment: values are escaped for HTML, and an undefined name is an error."""
    folders = [HERE / "templates", HERE.parent / "demo" / "assets"]
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {"number": number, "escape_controls": escape_controls}
    return pages


def number(value: float | int | None, form: str = ",") -> Markup:
    """A number as HTML, rounded by a format such as `.2f`, with a minus sign U+2212; an en dash for None.

    The exact value, as in `report.json`, is the attribute of an HTML element: `<data value="0.0123">`.
    """
    if value is None:
        return Markup('<span class="soft">–</span>')
    text = format(value, form).replace("-", "−").replace("%", " %")
    if set(text) <= set("−+0. %"):
        text = text.replace("−", "").replace("+", "")  # a rounded 0 has no sign
    return Markup('<data value="{}">{}</data>').format(json.dumps(value), text)


def claim_folder(out: str | Path) -> Path:
    """Make or check the folder for a report: new, empty, or with a former report, whose files will be replaced."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder} can't be made a folder ({error.strerror}): give --out another place."
        ) from error
    report_names = (HTML, NUMBERS, TRACE, FIGURES)  # of an earlier, perhaps interrupted run
    other_files = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.name not in report_names and entry.suffix != ".tmp"
    )
    if other_files and former_report(folder) is None:
        raise UserError(
            f"{folder} holds other files ({other_files[0]}, ...) and no former report: give --out a new folder."
        )
    return folder


def former_report(folder: Path) -> Json | None:
    """The contents of report.json in a folder; None if there is no report."""
    try:
        numbers = read_json(folder / NUMBERS)
    except (OSError, ValueError):
        return None  # absent, or not the JSON of a report
    if not isinstance(numbers, dict):
        return None
    is_report = str(numbers.get("schema", "")).startswith("moevision.report/")
    return numbers if is_report else None


def write_report(
    folder: Path, numbers: Mapping[str, Any], page: str, pictures: Mapping[str, bytes]
) -> None:
    """Write figures (file name -> PNG), numbers and page, and delete figures that only a former report had."""
    former = former_report(folder) or {}
    try:
        for name, png in pictures.items():
            write_bytes_atomic(folder / FIGURES / name, png)
        write_json_atomic(folder / NUMBERS, numbers)
        write_text_atomic(folder / HTML, page)
        for entry in former.get("figures", []):
            name = Path(str(entry.get("file", ""))).name
            if name.endswith(".png") and name not in pictures:
                (folder / FIGURES / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"The report can't be written to {folder} ({error.strerror}): make room or give --out another place."
        ) from error
