"""`analyze`: run a model over held-out pictures, measure what its experts do, and write one report.

The stages are ordinary calls of this package, in the order in which a notebook would make them; the report adds no
statistic of its own.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from moevision import __version__
from moevision.analysis.collect import collect_routing
from moevision.analysis.images import PictureSet, Remembered, aligned_pictures, pictures_for
from moevision.analysis.plots.style import figure_png
from moevision.analysis.report.figures import Material, draw_figures
from moevision.analysis.report.folder import SCHEMA, TRACE, claim_folder, write_report
from moevision.analysis.report.html import render
from moevision.analysis.report.measure import measure
from moevision.analysis.report.numbers import (
    as_json,
    data_numbers,
    layer_numbers,
    model_numbers,
)
from moevision.analysis.trace import RoutingTrace
from moevision.errors import UserError
from moevision.layers import LabelRouter, moe_layers
from moevision.models.hub import SavedModel, load_model
from moevision.names import shown
from moevision.versions import package_version

Json = dict[str, Any]
LIBRARIES = ("torch", "timm", "numpy", "scipy", "scikit-learn", "matplotlib")


@dataclass(frozen=True)
class ReportSettings:
    """What to analyze, and how thoroughly.

    Attributes:
        model: a run folder, its model/ folder, or a timm address.
        data: a folder or a dataset's name; None takes what the run was trained on.
        out: folder to write to.
        limit: pictures, the same number of each class; 1 000 by default.
        seeds: other trainings of the same recipe, as addresses like `model`.
        permutations: shuffles behind each chance level.
        seed: of everything that is drawn at random.
        quick: fewer untrained models, and experts taken away on fewer pictures.
        command: what was typed, for the record.
        progress: show a progress bar.
    """

    model: str
    data: str | None = None
    out: Path = Path("report")
    limit: int = 1000
    seeds: tuple[str, ...] = ()
    permutations: int = 1000
    seed: int = 0
    quick: bool = False
    command: str = ""
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuse what can't be.

        Raises:
            UserError: if a number is out of its range.
        """
        for name, least in (("limit", 20), ("permutations", 20), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise UserError(f"--{name} is {value}: it must be at least {least}.")


@dataclass
class _Stages:
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
        self.bar.update(self.task, description=f"{name} ({len(self.seconds) + 1} of {self.total})")
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)
        self.bar.advance(self.task)


def analyze(settings: ReportSettings) -> Json:
    """Analyze a model and write the report.

    Args:
        settings: what, and how thoroughly.

    Returns:
        What `report.json` holds.

    Raises:
        UserError: if there is no such model or data, the model has no MoE layers, or `out` is somebody else's folder.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    model = load_model(settings.model)
    layers = moe_layers(model.net)
    if not layers:
        raise UserError(f"{settings.model} has no MoE layers to look at: give a model with experts.")
    if any(isinstance(layer.router, LabelRouter) for layer in layers):
        raise UserError(
            f"{settings.model} routes by the class (router 'label'), which it is told: its experts are the classes by "
            "construction, and there is nothing to analyze. Give a model with another router."
        )
    pictures = _open(settings, model)
    others = [(_title(address), load_model(address)) for address in settings.seeds]
    folder = claim_folder(settings.out)
    stages = _Stages(total=8, show=settings.progress)
    with stages.bar:
        with stages.stage("collecting the routing"):
            trace = collect_routing(model, pictures, path=folder / TRACE, progress=False, name=_title(settings.model))
            pictures = Remembered(aligned_pictures(pictures, trace))
        results = measure(model, pictures, trace, others, settings, stages)
        material = Material(
            trace, pictures, results.information, results.maps, results.parts, results.effects["rows"],
            results.effects["what"], settings.seed,
        )  # fmt: skip
        with stages.stage("drawing figures"):
            kinds = [layer.kind for layer in trace.layers]
            drawn = [(item.entry(kinds), figure_png(item.figure)) for item in draw_figures(material)]
    numbers: Json = as_json(
        {
            "schema": SCHEMA,
            "title": f"What the experts of {trace.model} do",
            "settings": {"limit": settings.limit, "permutations": settings.permutations, "seed": settings.seed,
                         "quick": settings.quick, "seeds": [_title(address) for address in settings.seeds]},
            "model": model_numbers(trace, settings.model, model.image_size),
            "data": data_numbers(trace),
            "layers": [layer_numbers(layer) for layer in trace.layers],
            **results.to_json(trace),
            "figures": [entry for entry, _ in drawn],
            "provenance": _provenance(settings, trace, started, time.perf_counter() - clock, stages.seconds),
        }
    )  # fmt: skip
    pngs = {entry["file"]: png for entry, png in drawn}
    write_report(folder, numbers, render(numbers, pngs), pngs)
    return numbers


def _open(settings: ReportSettings, model: SavedModel) -> PictureSet:
    """The pictures that were asked for, or those that the run held out."""
    pictures = pictures_for(settings.model, model, settings.data, limit=settings.limit)
    if pictures is None:
        raise UserError(
            f"{settings.model} doesn't say what it was trained on: give --data a folder with one subfolder per class, "
            "or a dataset's name such as synthetic_pets."
        )
    return pictures


def _title(address: str) -> str:
    """What a model is called: its run's name, or its address."""
    path = Path(address)
    own = path.resolve().parent if path.name == "model" else path.resolve()
    return shown(own.name if path.exists() else address)


def _provenance(
    settings: ReportSettings, trace: RoutingTrace, started: datetime, seconds: float, stages: Mapping[str, float]
) -> Json:
    """What a reader needs to repeat the report; no path, user or host beyond what the command itself contains."""
    return {
        "moevision": __version__,
        "command": settings.command,
        "started_utc": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "stages_s": dict(stages),
        "seed": settings.seed,
        "weights_sha256": trace.provenance.get("weights_sha256"),
        "unreadable": trace.provenance.get("unreadable", 0),
        "libraries": {name: package_version(name) or "not installed" for name in LIBRARIES},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
