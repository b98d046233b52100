"""Make one of the explorer's bundled models from finished runs, with every number on its card measured here.

    python -m benchmarks bundle pets --run runs/pets_moe --dense runs/pets_twin \
        --seeds runs/pets_seed1 runs/pets_seed2

A model of photos, `photos` or `cifar10`, with the routing of the photos that it will show while it was trained. ELEVEN
is what `benchmarks photo-model photos` of commit 1a1f32d2 copies, whose `photo-model run` trains the dense twin:

    python -m benchmarks bundle photos --photos PHOTOS --examples shown
    moevision fit ELEVEN/all OPTIONS --record_routing.images shown           # OPTIONS of the card
    python -m benchmarks bundle photos --pack --photos PHOTOS --data ELEVEN/all --run runs/moe --dense runs/dense

Writes `moevision/demo/models/NAME/` (`moevision.demo.models` says what is in it): weights rounded to bfloat16, or with
`--pack` to eight bits (`benchmarks/demo/packed.py`), `card.json` (accuracy and balanced accuracy with intervals,
measured with the rounded weights on the whole test set), `atlas.json` (galleries, class x expert maps, the three
questions with the swap test), and, where the run recorded it, the routing of the examples at moments of the training. A
model of photos carries photos to show, its twin's predictions of them in place of the twin, and a NOTICE. The commands
that trained the runs stand in the runs' provenance and go to the card.

`cats_vs_dogs_two`, whose two experts a photo goes to as a whole, has two experts in the place of those of `photos`. All
that doesn't learn there is of `photos`, and is carried once:

    python -m benchmarks bundle cats_vs_dogs_two --trunk trunk.safetensors --pretrained FILE
    moevision fit --config cats_vs_dogs_two --pretrained trunk.safetensors --data.path DIR \
        --model.arch.moe_layers "[8]"
    python -m benchmarks bundle cats_vs_dogs_two --pack --photos PHOTOS --data DIR --run runs/two --dense runs/two_dense

How far images of other things lie is measured, too; the share of them that this recognizes comes from
`python -m benchmarks strangers run NAME`, and what the card says of single images and experts from
`python -m benchmarks falls`, `names` and `sorting`.

`--before` are models as `moevision upcycle` makes them, for the question what training added; without it the router is
compared with that of a model with fresh weights.
"""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import dist
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.accuracy import curve_of
from benchmarks.demo.packed import pack_folder
from benchmarks.harness import HERE, argument_parser, without_places
from benchmarks.strangers import detector_of, put_beside
from moevision.analysis.collect import collect_routing, network_input
from moevision.analysis.describe import class_expert_map, fractions_of_parts, majority_part
from moevision.analysis.images import PictureSet, open_pictures, read_images
from moevision.analysis.questions import (
    summary_lines,
    three_questions,
)
from moevision.analysis.readings import (
    measure_baselines,
    recording_of,
)
from moevision.analysis.report import measure_effects
from moevision.analysis.trace import RoutingTrace
from moevision.demo.atlas import build_atlas, save_atlas
from moevision.demo.models import HISTORY, SOURCES
from moevision.errors import UserError
from moevision.files import write_json_atomic, write_text_atomic
from moevision.models.history import FILE, RoutingHistory, moment_of
from moevision.models.io import SavedModel, load_model, save_model, unpack
from moevision.models.safe_files import PACKED
from moevision.stats import accuracy_interval

MODELS = HERE.parent / "moevision" / "demo" / "models"
EFFECTS_S = 1800.0  # for taking each expert away, over images of each class


WORDS = tomllib.loads((HERE / "bundle.toml").read_text(encoding="utf-8"))
ABOUT, NOTICE, OTHER = WORDS["about"], WORDS["notice"], WORDS["other"]


def main() -> None:
    """Run with command-line arguments."""
    parser = argument_parser("bundle", __doc__)
    add = parser.add_argument
    add("name", choices=tuple(ABOUT))
    add("--run", type=Path, help="run folder of the MoE model")
    add("--dense", type=Path, help="run folder of its dense twin")
    add("--seeds", type=Path, nargs="*", default=[], help="the same recipe with other seeds")
    add("--before", type=Path, nargs="*", default=[], help="--run, then --seeds, before training")
    add("--note", default="", help="what the recorded commands don't say about the training")
    add("--data", help="where the images are, if not where the name says")
    add("--images", type=int, default=1000, help="images of the atlas (%(default)s)")
    graded = "photos with SOURCES.md, of which those of grade A and A- are taken"
    add("--photos", type=Path, help=graded)
    add("--examples", type=Path, metavar="FOLDER", help="write the images to show there, and stop")
    add(
        "--trunk", type=Path, metavar="FILE", help="write what the two experts start from, and stop"
    )
    add("--pretrained", type=Path, help="weights of a ViT-S/14, for --trunk")
    add("--pack", action="store_true", help="store weights in eight bits")
    add("--out", type=Path, default=MODELS, help="folder of the models (the package's)")
    options = parser.parse_args()
    if options.trunk is not None:
        trunk = trunk_of(MODELS / WORDS["rests"][options.name], options.pretrained)
        save_file(trunk, options.trunk, metadata={"architecture": "vit_small_patch14_dinov2"})
        return
    if (options.name in NOTICE) != (options.photos is not None):
        parser.error(f"--photos goes with {', '.join(NOTICE)}, and with nothing else")
    if options.examples is not None and options.photos is not None:
        # Of drawn images `fit` itself records the first ones.
        classes = ("cat", "dog", *OTHER) if options.name == "cifar10" else ("cat", "dog")
        _copy(options.photos, photos_to_show(options.photos, classes), options.examples)
    elif options.run is None or options.dense is None:
        parser.error("give --run and --dense, or --examples")
    else:
        make(options)


def trunk_of(folder: Path, pretrained: Path) -> dict[str, Tensor]:
    """Pretrained weights, with those of a bundled model, as it is carried, in their place.

    Only its experts and its classifier don't fit: there the pretrained MLPs stay.
    """
    dense, carried = load_file(pretrained), unpack(folder / "trained" / PACKED)
    return dense | {name: value for name, value in carried.items() if name in dense}


def make(options: Namespace) -> None:
    """Measure one model and write its folder."""
    about, folder = ABOUT[options.name], options.out / options.name
    runs = {"trained": options.run, "dense": options.dense}
    data = options.data or about["data_kind"]
    rest = MODELS / WORDS["rests"][options.name] if options.name in WORDS["rests"] else None
    models = {}
    for variant, run in runs.items():
        if variant == "dense" and options.photos is not None:
            models[variant] = load_model(str(run))
        else:
            packed_with = data if options.pack else None
            models[variant] = _rounded(run, folder / variant, packed_with, rest)
    trained = models["trained"]
    size, names = trained.image_size, trained.class_names
    held_out = {"class_names": names, "run_dir": options.run}  # as the run cut its data
    test = open_pictures(data, size, **held_out)
    labels = [test.label(row) for row in range(len(test))]
    right = {
        "moe" if name == "trained" else name: _right(own, test) for name, own in models.items()
    }
    card: dict[str, Any] = {
        "id": options.name,
        **about,
        "recipe": _command(options.run),
        "note": options.note,
        "validation_top1": _round(
            [top1 for _, top1, _ in curve_of(options.run / "metrics.csv", 1)]
        ),
        "seed": _provenance(options.run)["seed"],
        **_accuracies(right, np.bincount(labels, minlength=len(names)).tolist()),
        "recipes": {name: _command(run) for name, run in runs.items()},
        "test_images": len(test),
    }
    write_json_atomic(folder / "card.json", card)
    put_beside(folder, detector_of(load_model(str(folder / "trained")), data, run_dir=options.run))
    said = ("code", "started_utc", "hardware", "libraries")  # of a training
    origins = {name: {key: _provenance(run)[key] for key in said} for name, run in runs.items()}
    write_json_atomic(folder / "provenance.json", origins)
    shown = None if options.photos is None else _write_photos(options, folder, models)
    pictures = open_pictures(data, size, limit=options.images, **held_out)
    if (options.run / FILE).is_file():
        _write_history(
            options.run / FILE, trained, test if shown is None else shown, folder / HISTORY
        )
    seeds, before = (
        [load_model(str(path)) for path in paths] for paths in (options.seeds, options.before)
    )
    atlas = _atlas(trained, pictures, about["title"], shown, seeds, before)
    save_atlas(atlas, folder / "atlas.json")
    print(json.dumps(card, indent=2, ensure_ascii=False))


# ---- images to show

_ROW = re.compile(r"^\| (?P<file>\S+\.jpg) \|(?P<rest>.*)\|\s*$", re.M)
_CHANGED = " (changes by GCompris: "


@dataclass(frozen=True)
class Photo:
    """A photo, `original` below the folder of photos and `file` (CLASS/NAME.jpg) here, with what has to be said of it.

    `copyright` is the line that the MIT licence wants to be kept; empty under other licences.
    """

    original: str
    file: str
    author: str
    licence: str
    source: str
    changes: str
    copyright: str


def photos_to_show(folder: Path, class_names: Sequence[str]) -> list[Photo]:
    """Photos of the model's classes that may be carried: of grade A or A-, not share-alike, no image of ImageNet.

    SOURCES.md is a table of file, package, path inside, author, licence, quotation, grade; a photo's class is its
    subfolder, or what `OTHER` says.

    Raises:
        UserError: if there is none.
    """
    found = []
    others = [(kind, name) for kind, names in OTHER.items() for name in names]
    other = {f"other/{name}.jpg": f"{kind}/{name}.jpg" for kind, name in others}
    for row in _ROW.finditer((folder / "SOURCES.md").read_text(encoding="utf-8")):
        package, inside, author, licence, quoted, grade = (
            cell.strip() for cell in row["rest"].split(" | ")
        )
        barred = grade not in ("A", "A-") or "-SA" in licence or re.search(r"n\d{8}_", inside)
        file = other.get(row["file"], row["file"])
        if barred or file.split("/")[0] not in class_names:
            continue
        commons = re.search(r"commons\.wikimedia\.org/wiki/[^\s\"]+", quoted)
        author, _, changed = author.partition(_CHANGED)
        changes = f"{changed.rstrip(')')} by GCompris; " if changed else ""
        source, changes = commons[0] if commons else package, f"{changes}scaled, re-encoded"
        line = re.search(r"Copyright[^/\"]*", quoted) if licence.startswith("MIT") else None
        copyright_line = line[0].strip() if line else ""
        origin = (row["file"], file, author, licence, source)
        found.append(Photo(*origin, changes, copyright_line))
    if not found:
        raise UserError(
            f"{folder} has no photo of {' or '.join(class_names)} that may be carried: see its SOURCES.md."
        )
    return found


def _copy(folder: Path, photos: Sequence[Photo], out: Path) -> None:
    for photo in photos:
        (out / photo.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / photo.original, out / photo.file)


def _write_photos(options: Namespace, folder: Path, models: dict[str, SavedModel]) -> PictureSet:
    """Write the photos with their sources, the dense twin's predictions of them, and the NOTICE; return the photos."""
    names, size = models["trained"].class_names, models["trained"].image_size
    home = (folder / SOURCES).parent
    photos = photos_to_show(options.photos, names)
    shutil.rmtree(home, ignore_errors=True)
    _copy(options.photos, photos, home)
    said_of = ("author", "licence", "source", "changes")
    sources = {photo.file: {name: vars(photo)[name] for name in said_of} for photo in photos}
    write_json_atomic(folder / SOURCES, sources)
    text = f"{NOTICE[options.name]}\nThe photos in examples/:\n\n"
    lines = [f"- {p.file}: {p.author}, {p.licence}, {p.source}; {p.changes}\n" for p in photos]
    owners = [f"{line}\n" for line in dict.fromkeys(p.copyright for p in photos if p.copyright)]
    if owners:
        lines += ["\nThose under the MIT licence:\n\n", *owners, WORDS["licence"]["mit"]]
    write_text_atomic(folder / "NOTICE", "".join([text, *lines]))
    shown = open_pictures(home, size, split="all", class_names=names)
    answers = _probabilities(models["dense"], shown).tolist()
    said = {shown.picture_name(row): _round(own) for row, own in enumerate(answers)}
    write_json_atomic(folder / "dense.json", {"class_names": names, "probabilities": said})
    return shown


def _write_history(file: Path, model: SavedModel, pictures: PictureSet, out: Path) -> None:
    """A history with the model as it is carried in the place of its last moment, the model of the run."""
    history = RoutingHistory.load(file)
    last = history.steps[-1]
    rows = {pictures.picture_name(row): row for row in range(len(pictures))}
    names = [name if name in rows else name.removesuffix(".png") for name in history.image_names]
    if strange := set(names) - rows.keys():
        raise UserError(
            f"{min(strange)} was recorded and is no image to show: record what --examples writes."
        )
    images = network_input(model, read_images(pictures, [rows[name] for name in names]))
    shown = replace(history, image_names=tuple(names))
    shown.until(last - 1).plus(last, moment_of(model.net, images)).save(out)


# ---- measuring


def _rounded(run: Path, folder: Path, data: str | None, rest: Path | None) -> SavedModel:
    """The run's model as it will be loaded from the package: rounded to bfloat16 or, given its data, packed."""
    model = load_model(str(run))
    if data is None:
        model.net.to(torch.bfloat16)
    save_model(model, folder)
    if data is not None:
        pack_folder(folder, data, rest=rest)
    return load_model(str(folder))


def _provenance(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "provenance.json").read_text(encoding="utf-8"))
    return found


def _command(run: Path) -> str:
    """The command that trained a run, without the places of its data, of its run and of what it went on from."""
    words = _provenance(run)["command"]
    places = {"--data.path", "--ckpt_path", "--runs_root"}
    pairs = zip(words, ["", *words], strict=False)
    return without_places(" ".join(word for word, before in pairs if not places & {word, before}))


def _round(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def balanced_accuracy(right: Sequence[int], counts: Sequence[int]) -> tuple[float, float, float]:
    """Mean of the accuracies of classes that have images, with the ends of its 95 % interval.

    Each class has its Wilson interval, and the distances of independent classes add up as squares (MOVER: Zou and
    Donner 2008, Statistics in Medicine 27).
    """
    known = [(each, count) for each, count in zip(right, counts, strict=True) if count]
    shares = [each / count for each, count in known]
    bounds = [accuracy_interval(each, count) for each, count in known]
    lows, highs = zip(*bounds, strict=True)
    share = sum(shares) / len(known)
    return share, share - dist(shares, lows) / len(known), share + dist(shares, highs) / len(known)


def _accuracies(
    right: Mapping[str, Sequence[int]], counts: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """What a card says of each model, from the right answers in each class and the images of it."""
    total = sum(counts)
    accuracy = {name: sum(own) / total for name, own in right.items()}
    interval = {name: _round(accuracy_interval(sum(own), total)) for name, own in right.items()}
    balanced = {name: _round(balanced_accuracy(own, counts)) for name, own in right.items()}
    return {
        "accuracy": accuracy,
        "accuracy_interval": interval,
        "balanced_accuracy": balanced,
    }


def _right(model: SavedModel, pictures: PictureSet) -> list[int]:
    """For each class the number of its images that are classified correctly."""
    answers = _probabilities(model, pictures).argmax(-1)
    labels = np.array([pictures.label(row) for row in range(len(pictures))])
    return np.bincount(labels[answers == labels], minlength=len(model.class_names)).tolist()


@torch.inference_mode()
def _probabilities(model: SavedModel, pictures: PictureSet, batch_size: int = 64) -> np.ndarray:
    """[I, C], computed in float32."""
    found = []
    for start in track(
        range(0, len(pictures), batch_size), f"classifying {len(pictures):,} images"
    ):
        rows = range(start, min(start + batch_size, len(pictures)))
        found.append(model.net(network_input(model, read_images(pictures, rows))))
    return torch.cat(found).softmax(-1).numpy()


def _atlas(
    model: SavedModel,
    pictures: PictureSet,
    title: str,
    shown: PictureSet | None,
    seeds: Sequence[SavedModel] = (),
    before: Sequence[SavedModel] = (),
) -> dict[str, Any]:
    trace = collect_routing(model, pictures, name=title)
    others = [collect_routing(other, pictures) for other in seeds]
    earlier: list[RoutingTrace | None] = [collect_routing(each, pictures) for each in before]
    earlier += [None] * (1 + len(seeds) - len(earlier))
    fractions = fractions_of_parts(pictures, trace.grid)
    parts = None if fractions is None else majority_part(fractions)
    baselines = measure_baselines(model, pictures, trace)
    known = {"baselines": baselines, "before": earlier[0]}
    own = recording_of(model, pictures, trace, **known, parts=parts, part_names=pictures.part_names)
    again = []
    for other, routed, ago in zip(seeds, others, earlier[1:], strict=True):
        known = {"baselines": measure_baselines(other, pictures, routed), "before": ago}
        again.append(recording_of(other, pictures, routed, **known, swap=False))
    questions = three_questions(own, seeds=again)
    for answer in summary_lines(questions):
        print(answer.sentence)
    maps = {layer.layer: class_expert_map(trace, layer.layer) for layer in trace.layers}
    on_show = None if shown is None else collect_routing(model, shown, name=title)
    effects = measure_effects(model, pictures, trace, budget_s=EFFECTS_S)
    return build_atlas(trace, pictures, maps, questions=questions, shown=on_show, effects=effects)
