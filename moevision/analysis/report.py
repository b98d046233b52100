"""`moevision analyze`: run a model over held-out images, measure what its experts do, and write one report.

report.html         one page with everything in it; written last, so where it stands everything else does
report.json         every number of it
trace.safetensors   the routing (`RoutingTrace.load`)
figures/*.png       its figures, drawn one after the other

The stages are ordinary calls of this package, in the order in which a notebook would make them; the report adds no
statistic of its own. The page is `templates/report.html.jinja` filled with `report.json` and the figures: it computes
nothing, so it can't say another number than the file does.

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
from typing import Any, Final, NamedTuple

import jinja2
import numpy as np
import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import moevision.analysis.plots as plots
from moevision import __version__
from moevision.analysis.collect import UNREAD, collect_routing, model_title
from moevision.analysis.describe import (
    ClassExpertMap,
    class_expert_map,
    fractions_of_parts,
    majority_part,
    part_expert_table,
)
from moevision.analysis.effects import class_effect
from moevision.analysis.images import (
    EXPLORER,
    PictureSet,
    Remembered,
    aligned_pictures,
    pictures_for,
    run_folder,
)
from moevision.analysis.information import Floats, Json, Pixels, as_json
from moevision.analysis.intervention import Intervention
from moevision.analysis.questions import LayerAnswers, plain_answer, summary_lines, three_questions
from moevision.analysis.readings import measure_baselines, recording_of
from moevision.analysis.trace import LayerTrace, RoutingTrace
from moevision.errors import (
    AT_LEAST_0,
    UserError,
    check_ranges,
    escape_controls,
    refuse_equal_seeds,
)
from moevision.files import write_bytes_atomic, write_json_atomic, write_text_atomic
from moevision.layers import LayerLoad, moe_layers
from moevision.layers.routing import Kind as RoutingKind
from moevision.models.convert import routes_read
from moevision.models.io import SavedModel, load_model
from moevision.models.safe_files import read_json, read_yaml
from moevision.words import shell_word

SCHEMA = "moevision.report/1"  # of report.json; a change that an older reader would misread raises the number
HTML, NUMBERS, TRACE, FIGURES = "report.html", "report.json", "trace.safetensors", "figures"
LIBRARIES = ("torch", "timm", "numpy", "scipy", "scikit-learn", "matplotlib")
HERE: Final = Path(__file__).parent
_SHOWN_PER_PIXEL = (
    0.6  # figures are drawn at 200 dots per inch; this shows 7.2 inches as 864 CSS pixels
)
_PICTURES_SHOWN = 3
_LEAST, _MOST = 3, 40  # images of a class
_WHAT: dict[RoutingKind, str] = {
    "token_choice": "an expert's patches go to their next-best expert",
    "expert_choice": "where experts choose, an expert's patches lose it and no other takes its place",
    "soft": "in Soft MoE an expert's weight is shared out among the others",
}


@dataclass(frozen=True)
class ReportSettings:
    """What to analyze, and how thoroughly."""

    model: str  # a run folder, its model/ folder, or a timm address
    data: str | None = None  # a folder or a dataset's name; None takes what the run was trained on
    root: str | None = None  # folder of named datasets; the run's own if None
    out: Path = Path("report")  # folder to write to
    limit: int = 1000  # images, the same number of each class; 1 000 by default
    seeds: tuple[str, ...] = ()  # other trainings of the same recipe, as addresses like `model`
    # the model before it was trained, as an address; the same architecture with fresh weights if None
    before: str | None = None
    permutations: int = 1000  # shuffles behind each chance level
    seed: int = 0  # of everything that is drawn at random
    quick: bool = False  # fewer untrained models, and experts taken away on fewer images
    command: str = ""  # what was typed, for the record
    progress: bool = True  # show a progress bar

    def __post_init__(self) -> None:
        check_ranges(self, [("at least 20", lambda x: x >= 20, ("limit", "permutations"))], "--")
        check_ranges(self, [(*AT_LEAST_0, ("seed",))], "--")


Live = Callable[[SavedModel, Pixels, str, str | None], str]
"""A live view of an image, of this name and label, as HTML."""


def analyze(settings: ReportSettings, live: Live | None = None) -> Json:
    """Analyze a model and write the report; what `report.json` holds is returned.

    `live` makes the live views of the page; None leaves them out.
    """
    started, clock = datetime.now(UTC), time.perf_counter()

    def seed_of(address: str) -> int | None:  # of a model's training, as its config.yaml has it
        run = run_folder(address)
        try:
            seed = None if run is None else read_yaml(run / "config.yaml").get("seed_everything")
        except (OSError, ValueError, AttributeError):  # as a model without a run
            return None
        return seed if isinstance(seed, int) else None

    refuse_equal_seeds((address, seed_of(address)) for address in (settings.model, *settings.seeds))
    model = load_model(settings.model)
    if not moe_layers(model.net):
        raise UserError(
            f"{settings.model} has no MoE layers to look at: give a model with experts."
        )
    found = pictures_for(
        settings.model, model, settings.data, limit=settings.limit, root=settings.root
    )
    if found is None:
        raise UserError(
            f"{settings.model} doesn't say what it was trained on: give --data a folder with one subfolder per class, "
            "or a dataset's name such as synthetic_pets."
        )
    titles = {
        address: escape_controls(model_title(address))
        for address in (settings.model, *settings.seeds)
    }
    others = [(titles[address], load_model(address)) for address in settings.seeds]
    before = None if settings.before is None else load_model(settings.before)
    folder = claim_folder(settings.out)
    stages = Stages(total=7, show=settings.progress)
    with stages.bar, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=UNREAD)  # the report names the layers
        with stages.stage("collecting the routing"):
            trace = collect_routing(
                model, found, path=folder / TRACE, progress=False, name=titles[settings.model]
            )
            (folder / HTML).unlink(missing_ok=True)  # it belongs to the trace that was replaced
            pictures = Remembered(aligned_pictures(found, trace))
        results = measure(model, pictures, trace, others, settings, stages, before)
        with stages.stage("drawing figures"):
            layers = [layer_numbers(layer) for layer in trace.layers]
            figures: list[Json] = []
            pngs: dict[str, bytes] = {}
            for kind, file, title, figure in draw_figures(
                trace, pictures, results, layers, settings.seed
            ):
                figures.append({"file": file, "kind": kind, "title": title})
                pngs[file] = plots.figure_png(figure)
        wrong = wrong_routes(trace)
        views = live_views(model, trace, pictures, wrong, settings.seed, live) if live else []
    numbers: Json = as_json(
        {
            "schema": SCHEMA,
            "title": f"What the experts of {trace.model} do",
            "settings": {
                "limit": settings.limit,
                "permutations": settings.permutations,
                "seed": settings.seed,
                "quick": settings.quick,
                "seeds": [titles[address] for address in settings.seeds],
                "before": settings.before and escape_controls(model_title(settings.before)),
            },
            "model": model_numbers(trace, settings.model, model.image_size),
            "data": data_numbers(trace),
            "layers": [
                {**layer, "read": read}
                for layer, read in zip(layers, routes_read(model.net), strict=True)
            ],
            **results.to_json(trace),
            "wrong": wrong,
            "figures": figures,
            # What a reader needs to repeat the report; no path, user or host beyond what the command itself contains.
            "provenance": {
                "moevision": __version__,
                "command": settings.command,
                "started_utc": started.isoformat(timespec="seconds"),
                "seconds": round(time.perf_counter() - clock, 1),
                "stages_s": stages.seconds,
                "seed": settings.seed,
                "weights_sha256": trace.provenance.get("weights_sha256"),
                "unreadable": trace.provenance.get("unreadable", 0),
                "libraries": {name: metadata.version(name) for name in LIBRARIES},
                "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            },
        }
    )
    write_report(folder, numbers, render(numbers, pngs, views), pngs)
    return numbers


class Stages:
    """The progress bar, and the time that each stage took."""

    def __init__(self, total: int, show: bool) -> None:
        self.total = total
        self.seconds: dict[str, float] = {}
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn())
        console = Console(stderr=True)
        hidden = not (show and console.is_terminal)  # elsewhere rich would leave an empty line
        self.bar = Progress(*columns, console=console, transient=True, disable=hidden)
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
    """What was measured."""

    questions: Sequence[LayerAnswers]  # the three answers about each layer
    maps: dict[
        int, ClassExpertMap
    ]  # block index -> class x expert map; empty with fewer than two labelled classes
    parts: (
        Floats | None
    )  # [I, P, parts] share of each patch that belongs to each part; None where images have none
    effects: Json  # from `measure_effects`

    def to_json(self, trace: RoutingTrace) -> Json:
        """Every number, and the answers that follow from them; `summary_lines` is all three in one."""
        answers = summary_lines(self.questions)
        layers = [
            {
                "layer": layer.layer,
                "name": layer.name,
                "sentences": [f"{layer.name}: {answer.sentence}" for answer in found.answers],
                "numbers": [line for answer in found.answers for line in answer.numbers],
            }
            for layer, found in zip(trace.layers, self.questions, strict=True)
        ]
        why = self.effects["why"]
        return {
            "verdict": {
                "plain": plain_answer(answers),
                "headline": " ".join(answer.sentence for answer in answers).removesuffix("."),
                "answers": answers,
                "layers": layers,
            },
            "questions": self.questions,
            "specialization": [],  # with `stability` what earlier versions measured, and their readers look for
            "stability": [],
            "maps": list(self.maps.values()),
            "effects": self.effects,
            "skipped": [{"what": "Taking experts away was left out", "why": why}] if why else [],
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
    """Run the stages on the images and the routing of a model, with the names and models of other trainings.

    `before` is the model before it was trained; one with fresh weights if None.
    """
    parts = fractions_of_parts(pictures, trace.grid)
    with stages.stage("measuring what needs no learning"):
        baselines = measure_baselines(model, pictures, trace, seeds=2 if settings.quick else 5)
    with stages.stage("looking at other trainings"):
        seeds = [
            collect_routing(other, pictures, progress=False, name=name) for name, other in others
        ]
    shown_parts = None if parts is None else majority_part(parts)
    with stages.stage("asking three questions"):
        again = []
        for (_, other), routed in zip(
            others, seeds, strict=True
        ):  # each beside controls of its own
            own = measure_baselines(other, pictures, routed, seeds=1 if settings.quick else 3)
            again.append(
                recording_of(other, pictures, routed, baselines=own, swap=False, seed=settings.seed)
            )
        ago = (
            None
            if before is None
            else collect_routing(before, pictures, progress=False, name="before")
        )
        recording = recording_of(
            model,
            pictures,
            trace,
            baselines=baselines,
            before=ago,
            parts=shown_parts,
            part_names=pictures.part_names,
            seed=settings.seed,
        )
        questions = three_questions(
            recording,
            seeds=again,
            permutations=settings.permutations,
            draws=1 if settings.quick else 2,
            seed=settings.seed,
        )
    with stages.stage("mapping classes to experts"):
        known = len(np.unique(trace.labels[trace.labels >= 0])) > 1
        maps = {
            layer.layer: class_expert_map(
                trace, layer.layer, num_permutations=settings.permutations, seed=settings.seed
            )
            for layer in (trace.layers if known else ())
        }
    with stages.stage("taking experts away"):
        effects = measure_effects(
            model, pictures, trace, budget_s=30 if settings.quick else 180, seed=settings.seed
        )
    return Results(questions, maps, parts, effects)


def measure_effects(
    model: SavedModel, pictures: PictureSet, trace: RoutingTrace, *, budget_s: float, seed: int = 0
) -> Json:
    """Take every expert away, one at a time, and follow the true class of images of each class, for about `budget_s`.

    How many images of a class are used follows from the time that a first call takes. `rows` are of each layer, expert
    and class, `experts` are means over the classes, with the class that changes most; where it takes too long or no
    class of the model has images, both are empty, and `why` says why.
    """
    classes = [
        name
        for label, name in enumerate(trace.class_names)
        if name in model.class_names and (trace.labels == label).sum() >= _LEAST
    ]
    what = "; ".join(_WHAT[kind] for kind in dict.fromkeys(layer.kind for layer in trace.layers))
    found: Json = {"what": what, "why": None, "pictures_per_class": 0, "rows": [], "experts": []}
    if not classes:
        return found | {"why": f"no class of the model has {_LEAST} images here"}
    calls = len(classes) * sum(layer.num_experts for layer in trace.layers)
    first = Intervention("ablate", layer=trace.layers[0].layer, expert=0)
    start = time.perf_counter()
    class_effect(model, pictures, classes[0], first, limit=_LEAST, seed=seed)
    each_s = (time.perf_counter() - start) / _LEAST
    per_class = min(_MOST, int(budget_s / (each_s * calls)))
    if per_class < _LEAST:
        minutes = each_s * calls * _LEAST / 60
        return found | {
            "why": f"even {_LEAST} images of each class would take about {minutes:.0f} minutes"
        }
    for layer in trace.layers:
        load = layer.counts().sum(0)
        for expert in range(layer.num_experts):
            away = Intervention("ablate", layer=layer.layer, expert=expert)
            place = {"layer": layer.layer, "expert": expert}
            rows = [
                {
                    **place,
                    **class_effect(
                        model, pictures, name, away, limit=per_class, seed=seed
                    ).to_json(),
                }
                for name in classes
            ]
            strongest = max(rows, key=lambda row: abs(row["delta_logit"]))
            mean = {  # None where a row has none: an expert without a control has none in any class
                name: None if None in (values := [row[name] for row in rows]) else fmean(values)
                for name in ("delta_logit", "control_delta_logit", "delta_p")
            }
            found["rows"] += rows
            found["experts"].append(
                {
                    **place,
                    "name": f"L{layer.layer}·E{expert}",
                    "share": float(load[expert] / max(load.sum(), 1e-12)),
                    **mean,
                    "strongest_class": strongest["class"],
                    "strongest_delta_logit": strongest["delta_logit"],
                    "strongest_control_delta_logit": strongest["control_delta_logit"],
                }
            )
    return found | {"pictures_per_class": per_class}


def model_numbers(trace: RoutingTrace, address: str, image_size: int) -> Json:
    """What the model is; numbers of experts are lists where layers differ."""
    each: dict[str, list[Any]] = {
        "num_experts": [layer.num_experts for layer in trace.layers],
        "top_k": [layer.top_k if layer.kind == "token_choice" else None for layer in trace.layers],
        "experts_per_patch": [round(layer.experts_per_patch, 2) for layer in trace.layers],
        "routing": [layer.kind for layer in trace.layers],
        "route_by": [layer.route_by for layer in trace.layers],
    }
    return {
        "name": trace.model,
        "address": address,
        "image_size": image_size,
        "grid": list(trace.grid),
        "moe_blocks": [layer.layer for layer in trace.layers],
        **{name: values[0] if len(set(values)) == 1 else values for name, values in each.items()},
        "class_names": list(trace.prediction_names or trace.class_names),
    }


def data_numbers(trace: RoutingTrace) -> Json:
    """What the images are, and how many of each class are classified correctly."""
    known = trace.labels >= 0
    classes = []
    for index, name in enumerate(trace.class_names):
        of_class = trace.labels == index
        count = int(of_class.sum())
        correct = (
            int((trace.predictions[of_class] == index).sum())
            if trace.accuracy is not None
            else None
        )
        accuracy = None if correct is None or count == 0 else correct / count
        classes.append({"class": name, "n": count, "correct": correct, "accuracy": accuracy})
    correct = (
        None if trace.accuracy is None else int((trace.predictions == trace.labels)[known].sum())
    )
    return {
        "name": trace.data,
        "n_images": len(trace),
        "n_labelled": int(known.sum()),
        "correct": correct,
        "accuracy": trace.accuracy,
        "classes": classes,
    }


def layer_numbers(layer: LayerTrace) -> Json:
    """Load and certainty of one layer, over the patches (class and register tokens are not traced).

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
        "entropy_bits": load.entropy_bits,
        "entropy_bits_most": math.log2(layer.num_experts),
        "margin": float(np.asarray(layer.margin, dtype=np.float64).mean()),
    }


def wrong_routes(trace: RoutingTrace, most: int = 3, least: int = 3) -> list[Json]:
    """Of images that are called another class most often: whose routes theirs are more like, by layer.

    Routes of a group of images are the shares of its patches that each expert has first. Their distance is half the sum
    of the absolute differences: 0 for equal shares, 1 for no expert in common. Pairs with fewer than `least` images in
    one of the three groups are left out.
    """
    if trace.prediction_names != trace.class_names:
        return []
    labels, said = trace.labels, trace.predictions
    pairs = Counter(
        zip(labels[labels != said].tolist(), said[labels != said].tolist(), strict=True)
    )
    found: list[Json] = []
    for (label, other), count in pairs.most_common():
        if len(found) == most:
            break
        groups = [
            np.flatnonzero((labels == of) & (said == as_))
            for of, as_ in ((label, other), (label, label), (other, other))
        ]
        if label < 0 or min(map(len, groups)) < least:
            continue
        layers = []
        for layer in trace.layers:
            if layer.kind != "token_choice":
                continue
            first = np.asarray(layer.expert_index)[..., 0]  # [I, P]
            wrong, own, its = (
                np.bincount(first[group].ravel(), minlength=layer.num_experts) / first[group].size
                for group in groups
            )
            layers.append(
                {
                    "name": layer.name,
                    "to_label": float(abs(wrong - own).sum() / 2),
                    "to_other": float(abs(wrong - its).sum() / 2),
                }
            )
        found.append(
            {
                "label": trace.class_names[label],
                "called": trace.class_names[other],
                "images": count,
                "index": groups[0].tolist(),
                "layers": layers,
            }
        )
    return found


def live_views(
    model: SavedModel,
    trace: RoutingTrace,
    pictures: PictureSet,
    wrong: Sequence[Json],
    seed: int,
    live: Live,
) -> list[tuple[str, str]]:
    """An image drawn at random, and one of the most frequent mistake, each beside what it is."""
    if any(layer.kind != "token_choice" for layer in trace.layers):
        return []  # the view's boxes are of networks that patches choose
    asked = [(shown_pictures(trace, seed, 1)[0], "An image drawn at random")]
    asked += [(each["index"][0], f"{each['label']}, called {each['called']}") for each in wrong[:1]]
    names = [
        trace.class_names[label] if label >= 0 else None
        for label in (trace.labels[index] for index, _ in asked)
    ]
    return [
        (
            title,
            live(model, pictures.image(index), escape_controls(trace.picture_names[index]), name),
        )
        for (index, title), name in zip(asked, names, strict=True)
    ]


# ---- figures


class Drawn(NamedTuple):
    """A figure: the kind that its caption is of, its file's name, what it shows, and itself."""

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
    """All figures of what was measured, in the order of the report.

    `layers` are the `layer_numbers` of each layer; `seed` is that of images and patches that are drawn at random.
    """
    for place, image in enumerate(shown_pictures(trace, seed), start=1):
        overlay = plots.plot_overlay(pictures.image(image), trace, image)
        yield Drawn(
            "overlay",
            f"overlay_{place}.png",
            f"Which expert each patch goes to, image {place}",
            overlay,
        )
    names = [layer.name for layer in trace.layers]
    counts, wanted = ([each[what] for each in layers] for what in ("counts", "requested"))
    kinds = [layer.kind for layer in trace.layers]
    load = plots.plot_load(
        counts, names, requested=None if wanted == counts else wanted, kinds=kinds
    )
    yield Drawn("load", "load.png", "Load of each expert", load)
    for layer in trace.layers:
        for kind, title, figure in _draw_layer(trace, pictures, results, layer, seed):
            yield Drawn(kind, f"{kind}_{layer.name}.png", f"{layer.name}: {title}", figure)
    if rows := results.effects["rows"]:
        tables: dict[str, list[Floats]] = {
            "delta_logit": [],
            "control_delta_logit": [],
        }  # by layer, [E, C]
        for layer in trace.layers:
            of_layer = [row for row in rows if row["layer"] == layer.layer]
            for name, each in tables.items():
                by_expert = [
                    [row[name] for row in of_layer if row["expert"] == e]
                    for e in range(layer.num_experts)
                ]
                each.append(
                    np.array(by_expert, np.float64)
                )  # None, where there is no control, becomes NaN
        classes = list(dict.fromkeys(row["class"] for row in rows))
        effects = plots.plot_effects(
            tables["delta_logit"],
            tables["control_delta_logit"],
            names,
            classes,
            what=results.effects["what"],
        )
        yield Drawn("effects", "effects.png", "Without one expert", effects)


def shown_pictures(trace: RoutingTrace, seed: int, count: int = _PICTURES_SHOWN) -> list[int]:
    """Images drawn at random, of different classes as long as those suffice: not chosen to look good."""
    order = np.random.default_rng(seed).permutation(len(trace))
    _, first = np.unique(trace.labels[order], return_index=True)
    others = np.setdiff1d(np.arange(len(order)), first)
    return [int(index) for index in order[np.concatenate([np.sort(first), others])][:count]]


def _draw_layer(
    trace: RoutingTrace, pictures: PictureSet, results: Results, layer: LayerTrace, seed: int
) -> Iterator[tuple[str, str, Figure]]:
    name, index, kind = layer.name, np.asarray(layer.expert_index), layer.kind
    if layer.layer in results.maps:
        found = results.maps[layer.layer]
        figure = plots.plot_class_experts(
            found.share,
            found.significant,
            trace.class_names,
            layer_name=name,
            excess=found.excess,
            threshold=found.threshold,
            kind=kind,
        )
        yield "class_experts", "which classes use which expert", figure
    if results.parts is not None:
        table = part_expert_table(index, results.parts, layer.num_experts, layer.requested_share)
        figure = plots.plot_part_experts(table, pictures.part_names, layer_name=name, kind=kind)
        yield "parts", "which parts go to which expert", figure
    yield (
        "gallery",
        "what each expert gets",
        plots.plot_gallery(pictures, trace, layer.layer, seed=seed),
    )


# ---- the page and the folder


def render(
    numbers: Mapping[str, Any], pictures: Mapping[str, bytes], live: Sequence[tuple[str, str]] = ()
) -> str:
    """The page, from `report.json`, its figures (file name -> PNG) and live views (title, HTML): nothing is fetched."""
    page = environment()

    def image(entry: Mapping[str, Any]) -> Json:
        """A PNG as the page holds it: size on screen, and the address with the image inside."""
        png = pictures[entry["file"]]
        width, height = struct.unpack(
            ">II", png[16:24]
        )  # 8 bytes of signature, then the chunk IHDR
        return {
            "width": round(width * _SHOWN_PER_PIXEL),
            "height": round(height * _SHOWN_PER_PIXEL),
            "src": Markup("data:image/png;base64,") + base64.b64encode(png).decode("ascii"),
        }

    page.filters |= {"image": image, "shell_word": shell_word}
    views = [(title, Markup(view)) for title, view in live]
    return page.get_template("report.html.jinja").render(
        {"wrong": [], **numbers}, explorer=EXPLORER, live=views
    )


def environment() -> jinja2.Environment:
    """Templates with autoescape: an unknown name is an error, and names from outside are shown harmless."""
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader([HERE / "templates", HERE.parent / "demo" / "assets"]),
        autoescape=True,
        finalize=lambda value: (
            value if isinstance(value, Markup) else escape_controls(str(value))
        ),  # names from outside
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters |= {"number": number}
    return page


def number(value: float | int | None, form: str = ",") -> Markup:
    """A number rounded by a format such as `.2f`, with a true minus sign; an en dash where there is none.

    It carries its exact value, as `report.json` has it, in HTML's own element for that: `<data value="0.0123">`.
    """
    if value is None:
        return Markup('<span class="soft">–</span>')
    text = format(value, form).replace("-", "−").replace("%", " %")
    if set(text) <= set("−+0. %"):
        text = text.replace("−", "").replace("+", "")  # −0.00 would look like a direction
    return Markup('<data value="{}">{}</data>').format(json.dumps(value), text)


def claim_folder(out: str | Path) -> Path:
    """The folder of a new report: a new or empty one, or that of a former report, whose files are replaced."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"{folder} is a file: give --out a folder for the report.") from error
    except OSError as error:
        raise UserError(
            f"{folder} can't be written to ({error.strerror}): give --out another place."
        ) from error
    ours = (HTML, NUMBERS, TRACE, FIGURES)  # of an earlier, perhaps interrupted run
    foreign = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.name not in ours and entry.suffix != ".tmp"
    )
    if foreign and former_report(folder) is None:
        raise UserError(
            f"{folder} holds other files ({foreign[0]}, ...) and no former report: give --out a new folder."
        )
    return folder


def former_report(folder: Path) -> dict[str, Any] | None:
    """The numbers of the report that lies in a folder; None where none does."""
    try:
        found = read_json(folder / NUMBERS)
    except (OSError, ValueError):
        return None  # absent, or not ours: both mean that there is no report to replace
    ours = isinstance(found, dict) and str(found.get("schema", "")).startswith("moevision.report/")
    return found if ours else None


def write_report(
    folder: Path, numbers: Mapping[str, Any], page: str, pictures: Mapping[str, bytes]
) -> None:
    """Write everything but the trace; figures (file name -> PNG) of a former report that this one doesn't have go."""
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
