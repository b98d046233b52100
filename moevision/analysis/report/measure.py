"""The numbers of the report: load, specialization, stability, and what changes without each expert.

The stages are ordinary calls of this package, in the order in which a notebook would make them; the report adds no
statistic of its own. Everything ends up as JSON primitives.

Axes: I images, P patches, K choices, E experts, C classes, L MoE layers.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from moevision.analysis.agreement import consistency, expert_similarity, match_experts
from moevision.analysis.collect import collect_routing
from moevision.analysis.describe import (
    QUANTILES,
    ClassExpertMap,
    class_expert_map,
    co_activation,
    fractions_of_parts,
    gate_weight_quantiles,
    majority_part,
)
from moevision.analysis.effects import class_effect
from moevision.analysis.images import PictureSet
from moevision.analysis.intervention import Intervention
from moevision.analysis.questions import LayerAnswers, headline, plainly, three_questions
from moevision.analysis.recording import Recording, recording_of
from moevision.analysis.specialization import LayerSpecialization, measure_baselines, specialization
from moevision.analysis.trace import LayerTrace, RoutingTrace
from moevision.errors import UserError
from moevision.layers.routing import Kind as RoutingKind
from moevision.metrics import LayerLoad
from moevision.models.io import SavedModel

Json = dict[str, Any]
_LEAST, _MOST = 3, 40  # images of a class
_WHAT: dict[RoutingKind, str] = {
    "token_choice": "an expert's patches go to their next-best expert",
    "expert_choice": "where experts choose, an expert's patches lose it and no other takes its place",
    "soft": "in Soft MoE an expert's weight is shared out among the others",
}


@dataclass(frozen=True)
class ReportSettings:
    """What to analyze, and how thoroughly.

    Attributes:
        model: a run folder, its model/ folder, or a timm address.
        data: a folder or a dataset's name; None takes what the run was trained on.
        root: folder of named datasets; the run's own if None.
        out: folder to write to.
        limit: images, the same number of each class; 1 000 by default.
        seeds: other trainings of the same recipe, as addresses like `model`.
        before: the model before it was trained, as an address; the same architecture with fresh weights if None.
        permutations: shuffles behind each chance level.
        seed: of everything that is drawn at random.
        quick: fewer untrained models, and experts taken away on fewer images.
        command: what was typed, for the record.
        progress: show a progress bar.
    """

    model: str
    data: str | None = None
    root: str | None = None
    out: Path = Path("report")
    limit: int = 1000
    seeds: tuple[str, ...] = ()
    before: str | None = None
    permutations: int = 1000
    seed: int = 0
    quick: bool = False
    command: str = ""
    progress: bool = True

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UserError: if a number is out of its range.
        """
        for name, least in (("limit", 20), ("permutations", 20), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise UserError(f"--{name} is {value}: it must be at least {least}.")


@dataclass
class Stages:
    """The progress bar, and the time that each stage took."""

    total: int
    show: bool
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn())
        console = Console(stderr=True)
        show = self.show and console.is_terminal  # elsewhere rich would leave an empty line
        self.bar = Progress(*columns, console=console, transient=True, disable=not show)
        self.task = self.bar.add_task("", total=self.total)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The scope of one stage."""
        self.bar.update(self.task, description=f"{name} ({len(self.seconds) + 1} of {self.total})")
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)
        self.bar.advance(self.task)


@dataclass(frozen=True)
class Results:
    """What was measured.

    Attributes:
        questions: the three answers about each layer.
        information: what each layer's experts tell, about everything that was asked.
        maps: block index -> class x expert map; empty with fewer than two labelled classes.
        parts: [I, P, parts] share of each patch that belongs to each part; None where images have none.
        stability: per layer agreement under changes and with other trainings, and similarity of its experts.
        effects: from `measure_effects`.
        skipped: `what` was left out and `why`.
    """

    questions: Sequence[LayerAnswers]
    information: Sequence[LayerSpecialization]
    maps: dict[int, ClassExpertMap]
    parts: npt.NDArray[np.float32] | None
    stability: list[Json]
    effects: Json
    skipped: list[dict[str, str]] = field(default_factory=list)

    def to_json(self, trace: RoutingTrace) -> Json:
        """Every number, and the answers that follow from them."""
        return {
            "verdict": self._in_short(trace),
            "questions": [each.to_json() for each in self.questions],
            "specialization": [entry.to_json() for entry in self.information],
            "maps": [found.to_json() for found in self.maps.values()],
            "stability": self.stability,
            "effects": self.effects,
            "skipped": self.skipped,
        }

    def _in_short(self, trace: RoutingTrace) -> Json:
        """The three answers about the model, and the sentences about each layer; `headline` is all three in one."""
        answers = headline(self.questions)
        layers = []
        for layer, found in zip(trace.layers, self.questions, strict=True):
            numbers = [line for answer in found.answers for line in answer.numbers]
            sentences = [f"{layer.name}: {answer.sentence}" for answer in found.answers]
            layers.append({"layer": layer.layer, "name": layer.name, "sentences": sentences, "numbers": numbers})
        return {
            "plain": plainly(answers),
            "headline": " ".join(answer.sentence for answer in answers).removesuffix("."),
            "answers": [answer.to_json() for answer in answers],
            "layers": layers,
        }


def measure(
    model: SavedModel,
    pictures: PictureSet,
    trace: RoutingTrace,
    others: Sequence[tuple[str, SavedModel]],
    settings: ReportSettings,
    stages: Stages,
    before: SavedModel | None = None,
) -> Results:
    """Run the stages.

    Args:
        model: the model that the trace is of.
        pictures: in the order of the trace.
        trace: their routing.
        others: names and models of other trainings of the same recipe.
        settings: how thoroughly.
        stages: tells the user.
        before: the model before it was trained; one with fresh weights if None.
    """
    parts = fractions_of_parts(pictures, trace.grid)
    with stages.stage("measuring what needs no learning"):
        baselines = measure_baselines(model, pictures, trace, seeds=2 if settings.quick else 5)
    with stages.stage("looking at other trainings"):
        seeds = [collect_routing(other, pictures, progress=False, name=name) for name, other in others]
    shown_parts = None if parts is None else majority_part(parts)
    with stages.stage("asking three questions"):
        ago = None if before is None else collect_routing(before, pictures, progress=False, name="before")
        own = recording_of(
            model, pictures, trace,
            baselines=baselines, before=ago, parts=shown_parts, part_names=pictures.part_names, seed=settings.seed,
        )  # fmt: skip
        questions = three_questions(
            own,
            seeds=[
                _other_training(other, pictures, found, settings)
                for (_, other), found in zip(others, seeds, strict=True)
            ],
            permutations=settings.permutations,
            draws=1 if settings.quick else 2,
            seed=settings.seed,
        )
    with stages.stage("asking the experts"):
        information = specialization(
            trace,
            baselines=baselines,
            seeds=seeds,
            parts=shown_parts,
            num_permutations=settings.permutations,
            seed=settings.seed,
        )
    with stages.stage("mapping classes to experts"):
        maps = _maps(trace, settings)
    with stages.stage("mirroring and cropping"):
        stability = _stability(model, pictures, trace, seeds, settings.seed)
    with stages.stage("taking experts away"):
        effects = measure_effects(model, pictures, trace, budget_s=30 if settings.quick else 180, seed=settings.seed)
    skipped = []
    if effects["why"]:
        skipped.append({"what": "Taking experts away was left out", "why": effects["why"]})
    return Results(questions, information, maps, parts, stability, effects, skipped)


def _other_training(
    model: SavedModel, pictures: PictureSet, trace: RoutingTrace, settings: ReportSettings
) -> Recording:
    """Another training with controls of its own."""
    names = ("untrained", "kmeans_input")
    baselines = measure_baselines(model, pictures, trace, seeds=1 if settings.quick else 3, names=names)
    return recording_of(model, pictures, trace, baselines=baselines, swap=False, seed=settings.seed)


def _maps(trace: RoutingTrace, settings: ReportSettings) -> dict[int, ClassExpertMap]:
    if len(np.unique(trace.labels[trace.labels >= 0])) < 2:
        return {}
    return {
        layer.layer: class_expert_map(trace, layer.layer, num_permutations=settings.permutations, seed=settings.seed)
        for layer in trace.layers
    }


def _stability(
    model: SavedModel, pictures: PictureSet, trace: RoutingTrace, seeds: Sequence[RoutingTrace], seed: int
) -> list[Json]:
    found = []
    changes = consistency(model, pictures, seed=seed)
    for layer in trace.layers:
        similarity = expert_similarity(model, pictures, layer.layer, seed=seed)
        found.append(
            {
                "layer": layer.layer,
                "name": layer.name,
                "similarity": similarity.tolist(),
                **of_pairs(similarity),
                "matches": [
                    {"run": other.model, **asdict(match_experts(layer, other.layer(layer.layer)))} for other in seeds
                ],
                "consistency": [change.to_json() for change in changes if change.layer == layer.layer],
            }
        )
    return found


def of_pairs(similarity: npt.NDArray[Any]) -> Json:
    """Mean and largest similarity of two experts, and which two: from [E, E]; all None for one expert."""
    pairs = np.argwhere(np.triu(np.ones_like(similarity, dtype=bool), 1))
    if not len(pairs):
        return {"similarity_mean": None, "similarity_most": None, "most_similar": None}
    values = similarity[tuple(pairs.T)]
    first, second = pairs[values.argmax()]
    return {
        "similarity_mean": float(values.mean()),
        "similarity_most": float(values.max()),
        "most_similar": f"E{first} and E{second}",
    }


def measure_effects(
    model: SavedModel, pictures: PictureSet, trace: RoutingTrace, *, budget_s: float, seed: int = 0
) -> Json:
    """Take every expert away, one at a time, and follow the true class of images of each class.

    How many images of a class are used follows from the time that a first call takes.

    Args:
        model: the model that the trace is of.
        pictures: labelled images.
        trace: their routing.
        budget_s: about how long all of it may take, in seconds.
        seed: of the images and of the control.

    Returns:
        `what` was done in words, `pictures_per_class`, `rows` (each layer, expert and class) and `experts` (means over
        the classes and the class that changes most); both lists are empty, and `why` says why, where it takes too long
        or no class of the model has images.
    """
    classes = [
        name for label, name in enumerate(trace.class_names)
        if name in model.class_names and (trace.labels == label).sum() >= _LEAST
    ]  # fmt: skip
    calls = len(classes) * sum(layer.num_experts for layer in trace.layers)
    what = "; ".join(_WHAT[kind] for kind in dict.fromkeys(layer.kind for layer in trace.layers))
    if not classes:
        return _nothing(what, f"no class of the model has {_LEAST} images here")
    first = Intervention("ablate", layer=trace.layers[0].layer, expert=0)
    start = time.perf_counter()
    class_effect(model, pictures, classes[0], first, limit=_LEAST, seed=seed)
    each_s = (time.perf_counter() - start) / _LEAST
    per_class = min(_MOST, int(budget_s / (each_s * calls)))
    if per_class < _LEAST:
        minutes = each_s * calls * _LEAST / 60
        return _nothing(what, f"even {_LEAST} images of each class would take about {minutes:.0f} minutes")
    rows = [
        _row(model, pictures, name, Intervention("ablate", layer=layer.layer, expert=expert), per_class, seed)
        for layer in trace.layers
        for expert in range(layer.num_experts)
        for name in classes
    ]
    loads = {layer.layer: layer.counts().sum(0) for layer in trace.layers}
    shares = {
        (layer, e): count / max(load.sum(), 1e-12) for layer, load in loads.items() for e, count in enumerate(load)
    }
    return {
        "what": what,
        "why": None,
        "pictures_per_class": per_class,
        "rows": rows,
        "experts": _by_expert(rows, shares),
    }


def _row(model: SavedModel, pictures: PictureSet, name: str, intervention: Intervention, limit: int, seed: int) -> Json:
    effect = class_effect(model, pictures, name, intervention, limit=limit, seed=seed).to_json()
    return {"layer": intervention.layer, "expert": intervention.expert, **effect}


def _by_expert(rows: list[Json], shares: dict[tuple[int, int], float]) -> list[Json]:
    """Means over classes, and the class whose logit changes most."""
    grouped: dict[tuple[int, int], list[Json]] = defaultdict(list)
    for row in rows:
        grouped[row["layer"], row["expert"]].append(row)
    found = []
    for (layer, expert), own in grouped.items():
        strongest = max(own, key=lambda row: abs(row["delta_logit"]))
        found.append(
            {
                "layer": layer,
                "expert": expert,
                "name": f"L{layer}·E{expert}",
                "share": float(shares[layer, expert]),
                **{name: _mean(own, name) for name in ("delta_logit", "control_delta_logit", "delta_p")},
                "strongest_class": strongest["class"],
                "strongest_delta_logit": strongest["delta_logit"],
                "strongest_control_delta_logit": strongest["control_delta_logit"],
            }
        )
    return found


def _mean(rows: list[Json], name: str) -> float | None:
    """None where a row has none: an expert without a control has none in any class."""
    values = [row[name] for row in rows]
    return None if None in values else fmean(values)


def _nothing(what: str, why: str) -> Json:
    return {"what": what, "why": why, "pictures_per_class": 0, "rows": [], "experts": []}


def model_numbers(trace: RoutingTrace, address: str, image_size: int) -> Json:
    """What the model is; numbers of experts are lists where layers differ."""
    return {
        "name": trace.model,
        "address": address,
        "image_size": image_size,
        "grid": list(trace.grid),
        "moe_blocks": [layer.layer for layer in trace.layers],
        "num_experts": _one_or_each([layer.num_experts for layer in trace.layers]),
        "top_k": _one_or_each([layer.top_k if layer.kind == "token_choice" else None for layer in trace.layers]),
        "experts_per_patch": _one_or_each([round(layer.experts_per_patch, 2) for layer in trace.layers]),
        "routing": _one_or_each([layer.kind for layer in trace.layers]),
        "route_by": _one_or_each([layer.route_by for layer in trace.layers]),
        "class_names": list(trace.prediction_names or trace.class_names),
    }


def _one_or_each(values: list[Any]) -> Any:
    """The value that all layers have, or the list of them."""
    return values[0] if len(set(values)) == 1 else values


def data_numbers(trace: RoutingTrace) -> Json:
    """What the images are, and how many of each class are classified correctly."""
    known = trace.labels >= 0
    classes = []
    for index, name in enumerate(trace.class_names):
        of_class = trace.labels == index
        count = int(of_class.sum())
        correct = int((trace.predictions[of_class] == index).sum()) if trace.accuracy is not None else None
        accuracy = None if correct is None or count == 0 else correct / count
        classes.append({"class": name, "n": count, "correct": correct, "accuracy": accuracy})
    correct = None if trace.accuracy is None else int((trace.predictions == trace.labels)[known].sum())
    return {
        "name": trace.data,
        "n_images": len(trace),
        "n_labelled": int(known.sum()),
        "correct": correct,
        "accuracy": trace.accuracy,
        "classes": classes,
    }


def layer_numbers(layer: LayerTrace) -> Json:
    """Load, certainty and gate weights of one layer, over the patches (class and register tokens are not traced).

    Experts of Soft MoE all compute as many slots, so their load is equal by construction and `counts` is what patches
    take from each; nothing is dropped where tokens don't choose.
    """
    index, kept = np.asarray(layer.expert_index), np.asarray(layer.kept)
    image_counts = layer.counts()
    counts = image_counts.sum(0)
    chooses = layer.kind == "token_choice"
    requested = np.bincount(index.ravel(), minlength=layer.num_experts) if chooses else counts
    computed = np.ones_like(counts) if layer.kind == "soft" else counts
    load = LayerLoad.from_sums(
        layer.layer,
        torch.from_numpy(computed),
        torch.from_numpy(requested if chooses else computed),
        entropy_bits=torch.tensor(float(np.asarray(layer.entropy_bits, dtype=np.float64).sum())),
        tokens=torch.tensor(index.shape[0] * index.shape[1]),
        unrouted=torch.tensor(int((~kept.any(-1)).sum())),
        count_squares=torch.from_numpy((image_counts**2).sum(0)),
        images=torch.tensor(len(image_counts)),
    )
    quantiles = gate_weight_quantiles(np.asarray(layer.combine_weight), kept=None if chooses else kept)
    pairs = layer.kind != "soft" and layer.top_k > 1
    return {
        "layer": layer.layer,
        "name": layer.name,
        "kind": layer.kind,
        "num_experts": layer.num_experts,
        "top_k": layer.top_k if chooses else None,
        "experts_per_patch": layer.experts_per_patch,
        "counts": counts.tolist(),
        "requested": requested.tolist(),
        "share": (counts / max(counts.sum(), 1e-12)).tolist(),
        "slowest": load.max_over_mean,
        "cv_squared": load.cv_squared,
        "cv_squared_floor": load.cv_squared_floor if chooses else None,
        "dead": load.dead,
        "dropped": load.dropped if chooses else None,
        "unrouted": load.unrouted,
        "kept_per_patch": layer.kept_per_patch().tolist(),
        "entropy_bits": load.entropy_bits,
        "entropy_bits_most": math.log2(layer.num_experts),
        "margin": float(np.asarray(layer.margin, dtype=np.float64).mean()),
        "gate_weight_quantiles": {"levels": list(QUANTILES), "values": quantiles.tolist()},
        "co_activation": co_activation(index, layer.num_experts, kept_of(layer)).tolist() if pairs else None,
    }


def kept_of(layer: LayerTrace) -> npt.NDArray[np.bool_] | None:
    """Which experts are chosen together: all that a token chose (None), or those that took it."""
    return np.asarray(layer.kept) if layer.kind == "expert_choice" else None


def as_json(value: Any) -> Any:
    """NumPy scalars and arrays as JSON primitives; NaN and infinity, which JSON can't say, as null."""
    if isinstance(value, dict):
        return {str(name): as_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, np.ndarray):
        return as_json(value.tolist())
    if isinstance(value, np.generic):
        return as_json(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
