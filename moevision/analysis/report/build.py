"""`analyze`: run a model over held-out images, measure what its experts do, and write one report.

report.html         one page with everything in it; written last, so where it stands everything else does
report.json         every number of it
trace.safetensors   the routing (`RoutingTrace.load`)
figures/*.png       its figures

The page is `template.html.jinja` filled with `report.json` and the figures: it computes nothing, so it can't say
another number than the file does.
"""

from __future__ import annotations

import base64
import json
import platform
import struct
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from moevision import __version__
from moevision.analysis.collect import collect_routing
from moevision.analysis.images import PictureSet, Remembered, aligned_pictures, pictures_for
from moevision.analysis.plots.style import figure_png
from moevision.analysis.report.figures import draw_figures
from moevision.analysis.report.measure import (
    ReportSettings,
    Stages,
    as_json,
    data_numbers,
    layer_numbers,
    measure,
    model_numbers,
)
from moevision.analysis.trace import RoutingTrace
from moevision.errors import UserError
from moevision.files import write_bytes_atomic, write_json_atomic, write_text_atomic
from moevision.layers import LabelRouter, moe_layers
from moevision.models.io import SavedModel, load_model
from moevision.models.safe_files import read_json
from moevision.names import shown
from moevision.versions import package_version

Json = dict[str, Any]
SCHEMA = "moevision.report/1"
"""Version of report.json; a change that an older reader would misread raises the number."""

HTML, NUMBERS, TRACE, FIGURES = "report.html", "report.json", "trace.safetensors", "figures"

LIBRARIES = ("torch", "timm", "numpy", "scipy", "scikit-learn", "matplotlib")
_SHOWN_PER_PIXEL = 0.6  # figures are drawn at 200 dots per inch; this shows 7.2 inches as 864 CSS pixels


def analyze(settings: ReportSettings) -> Json:
    """Analyze a model and write the report.

    Args:
        settings: what, and how thoroughly.

    Returns:
        What `report.json` holds.

    Raises:
        UserError: if there is no such model or data, the model has no MoE layers, or `out` holds other files.
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
    stages = Stages(total=8, show=settings.progress)
    with stages.bar:
        with stages.stage("collecting the routing"):
            trace = collect_routing(model, pictures, path=folder / TRACE, progress=False, name=_title(settings.model))
            pictures = Remembered(aligned_pictures(pictures, trace))
        results = measure(model, pictures, trace, others, settings, stages)
        with stages.stage("drawing figures"):
            kinds = [layer.kind for layer in trace.layers]
            figures = draw_figures(trace, pictures, results, settings.seed)
            drawn = [(item.entry(kinds), figure_png(item.figure)) for item in figures]
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
    """The images that were asked for, or those that the run held out."""
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


def render(numbers: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The page: everything inside it, nothing fetched, readable on screen, in the dark and on paper.

    Args:
        numbers: what `report.json` holds.
        pictures: file name -> PNG of every figure that it lists.
    """
    import jinja2

    page = jinja2.Environment(
        loader=jinja2.PackageLoader("moevision.analysis.report", "."),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else shown(str(value)),  # names from outside
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters |= {"number": number, "image": lambda entry: _image(pictures[entry["file"]])}
    return page.get_template("template.html.jinja").render(numbers)


def number(value: float | int | None, form: str = ",") -> Markup:
    """A number rounded by a format such as `.2f`, with a true minus sign; an en dash where there is none.

    It carries its exact value, as `report.json` has it, in HTML's own element for that: `<data value="0.0123">`.
    """
    if value is None:
        return Markup('<span class="soft">–</span>')
    text = format(value, form).replace("-", "−")
    if set(text) <= set("−+0.%"):
        text = text.replace("−", "").replace("+", "")  # −0.00 would look like a direction
    return Markup('<data value="{}">{}</data>').format(json.dumps(value), text)


def _image(png: bytes) -> Json:
    """A PNG as the page holds it: size on screen, and the address with the image inside."""
    width, height = struct.unpack(">II", png[16:24])  # 8 bytes of signature, then the chunk IHDR
    return {
        "width": round(width * _SHOWN_PER_PIXEL),
        "height": round(height * _SHOWN_PER_PIXEL),
        "src": Markup("data:image/png;base64,") + base64.b64encode(png).decode("ascii"),
    }


def claim_folder(out: str | Path) -> Path:
    """The folder of a new report: a new or empty one, or that of a former report, whose files are replaced.

    Raises:
        UserError: if something else lies there, or it can't be made or written to.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = sorted(entry.name for entry in folder.iterdir() if not _is_ours(entry))
        probe = folder / ".moevision-probe"
        probe.touch()
        probe.unlink()
    except FileExistsError as error:
        raise UserError(f"{folder} is a file: give --out a folder for the report.") from error
    except OSError as error:
        raise UserError(f"{folder} can't be written to ({error.strerror}): give --out another place.") from error
    if foreign and former_report(folder) is None:
        raise UserError(
            f"{folder} holds other files ({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}) and no former "
            "report: give --out a new folder."
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


def write_report(folder: Path, numbers: Mapping[str, Any], page: str, pictures: Mapping[str, bytes]) -> None:
    """Write everything but the trace; figures of a former report that this one doesn't have go.

    Args:
        folder: from `claim_folder`.
        numbers: JSON primitives.
        page: the HTML.
        pictures: file name -> PNG.

    Raises:
        UserError: if the disk is full or the folder has become read-only.
    """
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


def _is_ours(entry: Path) -> bool:
    """Whether an earlier, perhaps interrupted, run can have left it."""
    if entry.name == FIGURES:
        return entry.is_dir() and all(inner.suffix in (".png", ".tmp") for inner in entry.iterdir())
    unfinished = entry.name.startswith(".") and entry.suffix == ".tmp"
    return unfinished or entry.name in (HTML, NUMBERS, TRACE)
