"""`analyze`: run a model over held-out images, measure what its experts do, and write one report.

report.html         one page with everything in it; written last, so where it stands everything else does
report.json         every number of it
trace.safetensors   the routing (`RoutingTrace.load`)
figures/*.png       its figures, drawn one after the other, with what a reader should and should not see in them

The page is `template.html.jinja` filled with `report.json` and the figures: it computes nothing, so it can't say
another number than the file does.
"""

from __future__ import annotations

import base64
import platform
import struct
import time
import warnings
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.figure import Figure

import moevision.analysis.plots as plots
from moevision import __version__, package_version
from moevision.analysis.collect import UNREAD, collect_routing, model_title
from moevision.analysis.describe import part_expert_table, position_share
from moevision.analysis.images import PictureSet, Remembered, aligned_pictures, pictures_for, run_folder
from moevision.analysis.plots.style import figure_png
from moevision.analysis.report.measure import (
    ReportSettings,
    Results,
    Stages,
    as_json,
    data_numbers,
    layer_numbers,
    measure,
    model_numbers,
)
from moevision.analysis.report.page import environment
from moevision.analysis.trace import LayerTrace, RoutingTrace
from moevision.errors import UserError, refuse_equal_seeds
from moevision.files import write_bytes_atomic, write_json_atomic, write_text_atomic
from moevision.layers import moe_layers
from moevision.layers.routing import Kind as RoutingKind
from moevision.models.io import SavedModel, load_model
from moevision.models.reading import routes_read
from moevision.models.safe_files import read_json, read_yaml
from moevision.names import shown

Json = dict[str, Any]
SCHEMA = "moevision.report/1"
"""Version of report.json; a change that an older reader would misread raises the number."""

HTML, NUMBERS, TRACE, FIGURES = "report.html", "report.json", "trace.safetensors", "figures"

LIBRARIES = ("torch", "timm", "numpy", "scipy", "scikit-learn", "matplotlib")
_SHOWN_PER_PIXEL = 0.6  # figures are drawn at 200 dots per inch; this shows 7.2 inches as 864 CSS pixels


def run(chosen: Namespace) -> None:
    """`moevision analyze MODEL`: write the report, and print the three answers and what it says of each layer."""
    settings = ReportSettings(
        model=chosen.model,
        data=chosen.data,
        root=chosen.root,
        out=Path(chosen.out),
        limit=chosen.limit if chosen.limit is not None else 300 if chosen.quick else 1000,
        seeds=tuple(chosen.seeds),
        before=chosen.before,
        permutations=chosen.permutations if chosen.permutations is not None else 200 if chosen.quick else 1000,
        seed=chosen.seed,
        quick=chosen.quick,
        command=chosen.command,
    )
    numbers = analyze(settings)
    for answer in numbers["verdict"]["answers"]:
        print(shown(answer["sentence"]))
    for layer in numbers["verdict"]["layers"]:
        print("\n".join(f"  {shown(line)}" for line in [*layer["sentences"], *layer["numbers"]]))
    print(f"The report is {shown(str(settings.out / 'report.html'))}")


def analyze(settings: ReportSettings) -> Json:
    """Analyze a model and write the report.

    Args:
        settings: what, and how thoroughly.

    Returns:
        What `report.json` holds.

    Raises:
        UserError: if there is no such model or data, the model has no MoE layers, two trainings have one seed, or `out`
            holds other files.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    refuse_equal_seeds((address, _seed_of(address)) for address in (settings.model, *settings.seeds))
    model = load_model(settings.model)
    if not moe_layers(model.net):
        raise UserError(f"{settings.model} has no MoE layers to look at: give a model with experts.")
    pictures = _open(settings, model)
    others = [(_title(address), load_model(address)) for address in settings.seeds]
    before = None if settings.before is None else load_model(settings.before)
    folder = claim_folder(settings.out)
    stages = Stages(total=9, show=settings.progress)
    with stages.bar, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=UNREAD)  # the report names the layers
        with stages.stage("collecting the routing"):
            trace = collect_routing(model, pictures, path=folder / TRACE, progress=False, name=_title(settings.model))
            (folder / HTML).unlink(missing_ok=True)  # it belongs to the trace that was replaced
            pictures = Remembered(aligned_pictures(pictures, trace))
        results = measure(model, pictures, trace, others, settings, stages, before)
        with stages.stage("drawing figures"):
            kinds = [layer.kind for layer in trace.layers]
            layers = [layer_numbers(layer) for layer in trace.layers]
            figures = draw_figures(trace, pictures, results, layers, settings.seed)
            drawn = [(item.entry(kinds), figure_png(item.figure)) for item in figures]
    numbers: Json = as_json(
        {
            "schema": SCHEMA,
            "title": f"What the experts of {trace.model} do",
            "settings": {"limit": settings.limit, "permutations": settings.permutations, "seed": settings.seed,
                         "quick": settings.quick, "seeds": [_title(address) for address in settings.seeds],
                         "before": settings.before and _title(settings.before)},
            "model": model_numbers(trace, settings.model, model.image_size),
            "data": data_numbers(trace),
            "layers": [{**layer, "read": read} for layer, read in zip(layers, routes_read(model.net), strict=True)],
            **results.to_json(trace),
            "figures": [entry for entry, _ in drawn],
            "provenance": _provenance(settings, trace, started, time.perf_counter() - clock, stages.seconds),
        }
    )  # fmt: skip
    pngs = {entry["file"]: png for entry, png in drawn}
    write_report(folder, numbers, render(numbers, pngs), pngs)
    return numbers


def _seed_of(address: str) -> int | None:
    """The seed of a model's training, as its config.yaml has it; None where it isn't known."""
    run = run_folder(address)
    try:
        seed = None if run is None else read_yaml(run / "config.yaml").get("seed_everything")
    except (OSError, ValueError, AttributeError):  # as a model without a run
        return None
    return seed if isinstance(seed, int) else None


def _open(settings: ReportSettings, model: SavedModel) -> PictureSet:
    """The images that were asked for, or those that the run held out."""
    pictures = pictures_for(settings.model, model, settings.data, limit=settings.limit, root=settings.root)
    if pictures is None:
        raise UserError(
            f"{settings.model} doesn't say what it was trained on: give --data a folder with one subfolder per class, "
            "or a dataset's name such as synthetic_pets."
        )
    return pictures


def _title(address: str) -> str:
    return shown(model_title(address))


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
    page = environment()
    page.filters |= {"image": lambda entry: _image(pictures[entry["file"]])}
    return page.get_template("report/template.html.jinja").render(numbers)


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


_PICTURES_SHOWN = 3


class Drawn(NamedTuple):
    """A figure and what it is called.

    Attributes:
        kind: key of its caption.
        file: its file's name.
        title: what it shows.
        figure: the figure.
    """

    kind: str
    file: str
    title: str
    figure: Figure

    def entry(self, kinds: Iterable[RoutingKind] = ("token_choice",)) -> dict[str, str]:
        """How `report.json` lists it, of a model whose layers are of these kinds."""
        words = caption(self.kind, kinds)
        return {"file": self.file, "kind": self.kind, "title": self.title, **words._asdict()}


def draw_figures(
    trace: RoutingTrace, pictures: PictureSet, results: Results, layers: Sequence[Json], seed: int = 0
) -> Iterator[Drawn]:
    """All figures, in the order of the report.

    Args:
        trace: the routing of `pictures`.
        pictures: in the order of the trace.
        results: what was measured; what wasn't is not drawn.
        layers: `layer_numbers` of each layer.
        seed: of the images and patches that are drawn at random.
    """
    names = [layer.name for layer in trace.layers]
    if results.information:
        title = "What the experts tell, beside everything it must exceed"
        yield Drawn("comparisons", "specialization.png", title, plots.plot_specialization(results.information))
    yield from _draw_pictures(trace, pictures, seed)
    counts, wanted = ([each[what] for each in layers] for what in ("counts", "requested"))
    kinds = [layer.kind for layer in trace.layers]
    load = plots.plot_load(counts, names, requested=None if wanted == counts else wanted, kinds=kinds)
    yield Drawn("load", "load.png", "Load of each expert", load)
    uneven = [each for each in layers if any(each["kept_per_patch"][:-1])]
    if uneven:
        figure = plots.plot_experts_per_patch(
            [each["kept_per_patch"] for each in uneven], [each["name"] for each in uneven]
        )
        yield Drawn("experts_per_patch", "experts_per_patch.png", "How many experts a patch has", figure)
    quantiles = [each["gate_weight_quantiles"]["values"] for each in layers]
    yield Drawn("gate_weights", "gate_weights.png", "Gate weights by depth", plots.plot_gate_weights(quantiles, names))
    for layer, found in zip(trace.layers, layers, strict=True):
        yield from _draw_layer(trace, pictures, results, layer, found, seed)
    if results.effects["rows"]:
        yield Drawn("effects", "effects.png", "Without one expert", _effects_figure(trace, results.effects))


def shown_pictures(trace: RoutingTrace, seed: int, count: int = _PICTURES_SHOWN) -> list[int]:
    """Images drawn at random, of different classes as long as those suffice: not chosen to look good."""
    order = np.random.default_rng(seed).permutation(len(trace))
    _, first = np.unique(trace.labels[order], return_index=True)
    others = np.setdiff1d(np.arange(len(order)), first)
    return [int(index) for index in order[np.concatenate([np.sort(first), others])][:count]]


def _draw_pictures(trace: RoutingTrace, pictures: PictureSet, seed: int) -> Iterator[Drawn]:
    shown = shown_pictures(trace, seed)
    for place, image in enumerate(shown, start=1):
        title = f"Which expert each patch goes to, image {place}"
        yield Drawn("overlay", f"overlay_{place}.png", title, plots.plot_overlay(pictures.image(image), trace, image))
    first, (rows, columns) = shown[0], trace.grid
    middle = rows // 2 * columns + columns // 2
    path = plots.plot_path(pictures.image(first), trace, first, middle)
    yield Drawn("path", "path.png", "The path of one patch, image 1", path)
    certainty = plots.plot_certainty(pictures.image(first), trace, first)
    yield Drawn("certainty", "certainty.png", "How sure the router is, image 1", certainty)


def _draw_layer(
    trace: RoutingTrace, pictures: PictureSet, results: Results, layer: LayerTrace, numbers: Json, seed: int
) -> Iterator[Drawn]:
    name, index = layer.name, np.asarray(layer.expert_index)
    if numbers["co_activation"] is not None:
        figure = plots.plot_co_activation(numbers["co_activation"], numbers["top_k"], layer_name=name)
        yield Drawn("co_activation", f"co_activation_{name}.png", f"{name}: experts chosen together", figure)
    if layer.layer in results.maps:
        found = results.maps[layer.layer]
        figure = plots.plot_class_experts(
            found.share, found.significant, trace.class_names,
            layer_name=name, excess=found.excess, threshold=found.threshold, kind=layer.kind,
        )  # fmt: skip
        yield Drawn("class_experts", f"class_experts_{name}.png", f"{name}: which classes use which expert", figure)
    share = position_share(index, layer.num_experts, layer.wanted)
    figure = plots.plot_positions(share, trace.grid, layer_name=name, kind=layer.kind)
    yield Drawn("positions", f"positions_{name}.png", f"{name}: where in the image each expert works", figure)
    if results.parts is not None:
        table = part_expert_table(index, results.parts, layer.num_experts, layer.wanted)
        figure = plots.plot_part_experts(table, pictures.part_names, layer_name=name, kind=layer.kind)
        yield Drawn("parts", f"parts_{name}.png", f"{name}: which parts go to which expert", figure)
    figure = plots.plot_gallery(pictures, trace, layer.layer, seed=seed)
    yield Drawn("gallery", f"gallery_{name}.png", f"{name}: what each expert gets", figure)


def _effects_figure(trace: RoutingTrace, effects: Mapping[str, Any]) -> Figure:
    deltas: list[npt.NDArray[np.float64]] = []
    controls: list[npt.NDArray[np.float64]] = []
    for layer in trace.layers:
        rows = [row for row in effects["rows"] if row["layer"] == layer.layer]
        for name, tables in (("delta_logit", deltas), ("control_delta_logit", controls)):
            by_expert = [[row[name] for row in rows if row["expert"] == e] for e in range(layer.num_experts)]
            tables.append(np.array(by_expert, np.float64))  # None, where there is no control, becomes NaN
    names = [layer.name for layer in trace.layers]
    classes = list(dict.fromkeys(row["class"] for row in effects["rows"]))
    return plots.plot_effects(deltas, controls, names, classes, what=effects["what"])


class Caption(NamedTuple):
    """What stands below a figure.

    Attributes:
        read: how to read it.
        not_shown: what a reader might see in it that is not there.
    """

    read: str
    not_shown: str


CAPTIONS: Final = {
    "comparisons": Caption(
        "One row per MoE layer. Blue line: the interval of what the chosen expert tells about the image, in bits above "
        "chance. Grey band: what chance alone gives. Marks below: what the same images give without anything learned. "
        "Hollow marks: other trainings of the same recipe, whose own controls are compared in the answers above.",
        "Whether the experts are needed: that is asked by taking them away, further down. Panels have their own "
        "scales.",
    ),
    "load": Caption(
        "One bar per expert: its share of all choices. Dashed line: equal load. Slowest ÷ mean says how long the "
        "others wait for the busiest expert when they work in parallel.",
        "What an expert is for. A busy expert need not matter, and balanced experts need not differ.",
    ),
    "experts_per_patch": Caption(
        "Share of the patches that 0, 1, 2, ... experts compute. A patch that no expert computes passes the layer by "
        "the residual path alone.",
        "Whether those patches are unimportant: the router left them out, or an expert was full.",
    ),
    "gate_weights": Caption(
        "How much of a patch's output comes from its first, second, ... choice, per layer.",
        "How large an expert's output is: a small weight on a large output can matter more than it looks.",
    ),
    "co_activation": Caption(
        "Row: of the patches that chose this expert, the share that also chose the expert of the column. Coloured "
        "where that is more (blue) or less (brown) than the loads alone would give.",
        "How much of the pattern chance could give: nothing is tested here.",
    ),
    "overlay": Caption(
        "Each patch shows its first choice by number and colour; the stronger the colour, the larger its gate weight.",
        "What the expert looked at. A patch of a deep layer carries context from the whole image through attention, "
        "and colours of two layers are unrelated.",
    ),
    "path": Caption(
        "One patch through the MoE layers: its chosen experts, joined by a thick line (first choice) and thin ones.",
        "Everything else that happens to the patch on its way: attention and the residual path pass experts by.",
    ),
    "certainty": Caption(
        "Dark entropy: the router is undecided. Dark margin: the best expert is far ahead of the second.",
        "Whether the choice was good. A sure router may be sure because it has collapsed.",
    ),
    "class_experts": Caption(
        "Row: a class; cells: the share of its choices that goes to each expert. Only cells that differ from the mean "
        "class by more than chance gives in any cell of the map are coloured.",
        "Why. Colour, texture and position differ between classes too, and a coloured cell may be nothing but those: "
        "compare with the baselines above.",
    ),
    "positions": Caption(
        "One small map of the image per expert: the share of the choices made at each place that falls on it.",
        "Preference for a place as such. Where images have a subject in the middle, place and content go together.",
    ),
    "parts": Caption(
        "Row: a part of the drawing, known exactly because the image is drawn; cells: where its area goes.",
        "A test of single cells. Whether parts are told apart at all, and more than by the baselines, stands in the "
        "table above.",
    ),
    "gallery": Caption(
        "One row per expert. Left: the patches (framed, with their surroundings) with its largest weights, one "
        "per image at most. Right: patches of the same expert drawn at random.",
        "What is typical, on the left: those patches are the best of thousands. Trust what both sides share.",
    ),
    "effects": Caption(
        "Large mark: how the logit of the true class changes, on average, when one expert is taken away and its "
        "patches go to their next-best expert; small marks: the same for each class. Grey: as many choices of the "
        "same layer, drawn at random from all experts, are moved instead.",
        "What the expert does together with others: several may stand in for one another, and all of them together can "
        "matter where none does alone.",
    ),
}
"""Kind of figure -> its caption, of a model in which tokens choose their experts."""

_EXPERTS_CHOOSE: Final = {
    "comparisons": "Where experts choose, all take as many patches of every image; so the class is asked of how much "
    "patches take from each expert (gate weights), place and part of which expert takes a patch.",
    "load": "Where experts choose, loads are equal by construction; small differences are class tokens, which are not "
    "shown.",
    "gate_weights": "Where experts choose: the 1st, 2nd, ... largest weight of the patches that have so many experts.",
    "co_activation": "Where experts choose: the experts that took the same patch.",
    "overlay": "Where experts choose, a patch may have no expert (a dot) or several, of which the one with the largest "
    "weight is shown.",
    "path": "Where experts choose: the experts that took the patch.",
    "class_experts": "Where experts choose, cells are shares of gate weights: all experts take as many patches of "
    "every image.",
    "positions": "Where experts choose: of all choices of a place, the share that each expert has.",
    "effects": "Where experts choose, the patches of the expert lose it and no other takes its place; grey: as many "
    "choices are taken away.",
}
_SOFT: Final = {
    "comparisons": "Soft MoE: the class is asked of how much patches take from each expert, place and part of how much "
    "the experts read of a patch. Hashes and clusters are softened until they are as undecided as the layer.",
    "load": "Soft MoE: every expert computes as many slots; bars show how much of the patches' output comes from each.",
    "gate_weights": "Soft MoE: the 1st, 2nd, ... largest of the weights that a patch gives to all experts.",
    "overlay": "Soft MoE: the expert that the patch takes most from; every other one contributes too.",
    "path": "Soft MoE: all experts contribute, a large disc much; the line joins the largest.",
    "class_experts": "Soft MoE: cells are shares of the weight that patches take from the experts.",
    "positions": "Soft MoE: of all that is read at a place, the share that each expert reads.",
    "parts": "Soft MoE: what the experts read of each part.",
    "gallery": "Soft MoE: an expert reads something of every patch. Left: those that it reads most; right: drawn in "
    "proportion to what it reads.",
    "effects": "Soft MoE: the expert's weight is shared out among the others; grey: as many weights of single patches "
    "and experts, drawn at random, are.",
}


def caption(figure: str, kinds: Iterable[RoutingKind]) -> Caption:
    """What stands below a figure of a model whose layers are of these kinds.

    Args:
        figure: kind of figure.
        kinds: who chooses, of each layer.
    """
    read, not_shown = CAPTIONS[figure]
    added = [
        words[figure]
        for kind, words in (("expert_choice", _EXPERTS_CHOOSE), ("soft", _SOFT))
        if kind in set(kinds) and figure in words
    ]
    return Caption(" ".join([read, *added]), not_shown)
