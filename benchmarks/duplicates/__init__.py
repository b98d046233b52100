"""Which copies does `moevision data score` find? Planted ones among photos, and those that CIFAR-10 has.

    python -m benchmarks duplicates planted --data path/to/imagenette --model MODEL
    python -m benchmarks duplicates cifar10 --data path/to/cifar10 --model MODEL --sheet pairs.png
    python -m benchmarks duplicates redundant --run RUN
    python -m benchmarks duplicates report                                # README.md's tables

`planted` writes altered copies of some images beside the originals, every other one into the other split, and asks the
page's two lists of pairs for them. `cifar10` counts the test images that have a training image so near, and draws pairs
at some ranks, to be judged by eye. `redundant` asks whether images that the experts shared out alike are those with
alike features, which need no experts.

Axes: n images of both splits, c copies.
"""

from __future__ import annotations

import io
import math
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from benchmarks.harness import HERE, about, argument_parser, positive, progress_bar
from benchmarks.lines import write_lines
from benchmarks.queue import fill_readme, refuse_changes
from benchmarks.timing import rounded
from moevision.analysis.good_data import Known, RunImages, examine, images_of, nearest_in_class
from moevision.data.folder import read_folder
from moevision.data.scores import FILE, SCORES, Scores
from moevision.errors import UserError
from moevision.models.io import load_model
from moevision.models.safe_files import read_json

FOLDER = HERE / "duplicates"
TRAIN, OUTSIDE, EACH = 1_500, 500, 40  # images of the two splits, copies of each kind
BITS, COSINES = (0, 2, 4, 6, 8, 10), (0.95, 0.9, 0.85, 0.8)
RANKS, AT_A_RANK = (50, 150, 250, 350, 500, 700), 20  # of CIFAR-10's pairs that are drawn


def _cropped(share: float) -> Callable[[Image.Image], Image.Image]:
    def crop(image: Image.Image) -> Image.Image:
        """The middle, a little off, in the old size."""
        width, height = image.size
        w, h = round(share * width), round(share * height)
        left, top = (width - w) // 3, 2 * (height - h) // 3
        return image.crop((left, top, left + w, top + h)).resize(image.size, Image.Resampling.BICUBIC)

    return crop


KINDS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG quality 50": lambda image: _recompressed(image, 50),
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC),
    "30 % brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "90 % of each side": _cropped(0.9),
    "75 % of each side": _cropped(0.75),
    "mirrored": ImageOps.mirror,
}


def _recompressed(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def look(folder: Path, model: str) -> tuple[RunImages, Known]:
    """What `data score` finds out about a folder with two splits, by the features of a model."""
    collection = read_folder(folder)
    images = RunImages(collection, collection.class_names, collection.given)
    train = images.samples["train"]
    nothing = np.full(len(train), np.nan, np.float32)
    scores = Scores([sample.sample_id for sample in train], [""] * len(train), np.zeros(len(train), np.int64),
                    dict.fromkeys(SCORES, nothing), {})  # fmt: skip
    with progress_bar("batches of 64 images", -(-len(images) // 64)) as advance:
        known = examine(images, scores, load_model(model), lambda _: advance())
    return images, known


# ---- planted copies


def plant(data: Path, root: Path, *, train: int, outside: int, each: int) -> dict[str, tuple[str, str]]:
    """Write images of both splits of `data` as PNG, and altered copies of some; copy -> kind and its original."""
    collection, generator = read_folder(data), np.random.default_rng(0)
    given = [split for split in ("train", "val", "test") if split in collection.given][:2]
    if len(given) < 2:
        raise UserError(f"{data} has one split: give a folder with train/ and val/ or test/.")
    planted: dict[str, tuple[str, str]] = {}
    kinds = [kind for kind in KINDS for _ in range(each)]
    for split, many in zip(given, (train, outside), strict=True):
        samples = collection.given[split]
        for place in sorted(generator.permutation(len(samples))[:many].tolist()):
            _write(collection.open(samples[place]), root / f"{split}/{_class(samples[place].sample_id)}/{place}.png")
    originals = sorted(file for file in (root / given[0]).rglob("*.png"))
    chosen = generator.choice(len(originals), len(kinds), replace=False)
    for number, (kind, index) in enumerate(zip(kinds, chosen.tolist(), strict=True)):
        original = originals[index]
        copy = root / given[number % 2] / original.parent.name / f"{original.stem}-copy.png"
        with Image.open(original) as image:
            _write(KINDS[kind](image.convert("RGB")), copy)
        planted[copy.relative_to(root).as_posix()] = (kind, original.relative_to(root).as_posix())
    return planted


def _class(sample_id: str) -> str:
    return sample_id.split("/")[-2]


def _write(image: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def found(images: RunImages, known: Known, planted: dict[str, tuple[str, str]], *, across: bool) -> dict[str, Any]:
    """What a list says of the copies that it should have: all, or those of another split than their original.

    A list has each pair once. `named`: share whose original is the most alike image; `listed`: share among the first
    pairs, as many as were planted; `precision`: planted among these.
    """
    ids = [sample.sample_id for _, sample in images.each()]
    place = {name: index for index, name in enumerate(ids)}
    wanted = {copy: it for copy, it in planted.items() if not across or copy.split("/")[0] != it[1].split("/")[0]}
    near = known.most_alike(across=across)
    ranked = pairs_of(near.other, near.distance)[: len(wanted)]
    pair = {copy: frozenset((place[copy], place[original])) for copy, (_, original) in wanted.items()}
    first = {frozenset(each) for each in ranked}
    rows = {}
    for kind in KINDS:
        mine = [copy for copy, (its, _) in wanted.items() if its == kind]
        named = [any(near.other[a] == b for a, b in (tuple(pair[copy]), tuple(pair[copy])[::-1])) for copy in mine]
        rows[kind] = {
            "copies": len(mine),
            "named": rounded(float(np.mean(named)), 3) if mine else math.nan,
            "listed": rounded(float(np.mean([pair[copy] in first for copy in mine])), 3) if mine else math.nan,
        }
    right = set(pair.values())
    strangers = [[ids[a], ids[b]] for a, b in ranked if frozenset((a, b)) not in right]
    return {"planted": len(wanted), "precision": rounded(1 - len(strangers) / len(ranked), 3), "kinds": rows,
            "not_planted": strangers}  # fmt: skip


def pairs_of(other: np.ndarray, distance: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of each image and its most alike one, nearest first, each once."""
    order = np.argsort(distance, kind="stable")
    order = order[np.isfinite(distance[order])]
    return list(
        dict.fromkeys((min(i, j), max(i, j)) for i, j in zip(order.tolist(), other[order].tolist(), strict=True))
    )


def planted(options: Namespace) -> dict[str, Any]:
    """Plant and ask; the record."""
    with tempfile.TemporaryDirectory() as folder:
        copies = plant(options.data, Path(folder), train=options.train, outside=options.outside, each=options.each)
        images, known = look(Path(folder), options.model)
        lists = {
            name: found(images, known, copies, across=across) for name, across in (("all", False), ("leaks", True))
        }
    return {"images": len(images), "lists": lists}


# ---- CIFAR-10 as it is


def cifar10(options: Namespace) -> dict[str, Any]:
    """Count test images with so near a training image; the record."""
    images, known = look(options.data, options.model)
    outside = images.split_of > 0
    near = known.most_alike(across=True)
    bits, distance = known.by_hash[1].distance[outside], known.by_features[1].distance[outside]
    if options.sheet:
        sheet(images, near.other, near.distance, np.flatnonzero(outside)).save(options.sheet)
    return {
        "train": int((~outside).sum()),
        "test": int(outside.sum()),
        "bits": {str(most): int((bits <= most).sum()) for most in BITS},
        "cosine": {str(least): int((distance <= 1 - least).sum()) for least in COSINES},
        "either": {f"{most} bits or {least}": int(((bits <= most) | (distance <= 1 - least)).sum())
                   for most in BITS for least in COSINES},
    }  # fmt: skip


def sheet(images: RunImages, other: np.ndarray, distance: np.ndarray, rows: np.ndarray, side: int = 64) -> Image.Image:
    """Pairs at some ranks of the list, a row for each rank: test image above its most alike training image."""
    order = rows[np.argsort(distance[rows], kind="stable")]
    drawn = Image.new("RGB", (AT_A_RANK * (side + 4) + 50, len(RANKS) * (2 * side + 22)), "white")
    for line, rank in enumerate(RANKS):
        for column, index in enumerate(order[rank : rank + AT_A_RANK].tolist()):
            at = (50 + column * (side + 4), line * (2 * side + 22))
            for row, each in enumerate((index, int(other[index]))):
                image = images.collection.open(images.place(each)[1]).resize((side, side), Image.Resampling.BICUBIC)
                drawn.paste(image, (at[0], at[1] + row * side))
            ImageDraw.Draw(drawn).text((at[0], at[1] + 2 * side + 2), f"{distance[index]:.3g}", "black")
        ImageDraw.Draw(drawn).text((2, line * (2 * side + 22)), str(rank), "black")
    return drawn


# ---- images that the experts computed alike


def redundant(options: Namespace) -> dict[str, Any]:
    """How far the list of a run by its experts is that by its features; the record."""
    images, model = images_of(options.run), load_model(str(options.run))
    known = examine(images, Scores.read(options.run / FILE), model)
    m, white = len(known.visits), known.white
    if white is None or not known.experts:
        raise UserError(f"{options.run} has no experts or no features: give a run of a Mixture of Experts.")
    there = np.flatnonzero(known.by_experts.other >= 0)
    partner = known.by_experts.other[there]
    within = nearest_in_class(white[:m], images.labels[:m])
    strangers = same_class_strangers(images.labels[:m][there], np.random.default_rng(0))
    tenth = round(len(there) / 10)
    first = [set(there[np.argsort(near.distance[there], kind="stable")[:tenth]].tolist())
             for near in (known.by_experts, within)]  # fmt: skip
    return {
        "images": len(there), "layers": len(known.experts),
        "coefficient": rounded(float(np.median(1 - known.by_experts.distance[there])), 4),
        "cosine": _median_cosine(white, there, partner),
        "cosine_nearest": rounded(float(np.median(1 - within.distance[there])), 3),
        "cosine_of_strangers": _median_cosine(white, there, there[strangers]),
        "same_partner": rounded(float((within.other[there] == partner).mean()), 4),
        "shared_tenth": rounded(len(first[0] & first[1]) / tenth, 3),
    }  # fmt: skip


def _median_cosine(white: np.ndarray, rows: np.ndarray, others: np.ndarray) -> float:
    return rounded(float(np.median(np.einsum("nd,nd->n", white[rows], white[others]))), 3)


def same_class_strangers(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """For each image another one of its class, by chance."""
    other = np.arange(len(labels))
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        other[rows] = np.roll(rows, 1)
    return other


# ---- the report


def parts_of(record: dict[str, Any]) -> list[str]:
    """What stands in the README."""
    parts = []
    if "planted" in record:
        lists = record["planted"]["lists"]
        lines = ["| copy | copies | named | listed | leaks | named | listed |", "|---|--:|--:|--:|--:|--:|--:|"]
        for kind in KINDS:
            cells = [f"{each['copies']} | {each['named']:.0%} | {each['listed']:.0%}".replace("%", " %")
                     for each in (lists["all"]["kinds"][kind], lists["leaks"]["kinds"][kind])]  # fmt: skip
            lines.append(f"| {kind} | {' | '.join(cells)} |")
        said = [
            f"Of the first {each['planted']} pairs of the list of {title}, {100 * each['precision']:.0f} % are planted."
            for title, each in (("near-duplicates", lists["all"]), ("leaks", lists["leaks"]))
        ]
        parts += ["\n".join(lines), " ".join(said)]
    if "cifar10" in record:
        found = record["cifar10"]
        lines = ["| at most | test images | of all |", "|---|--:|--:|"]
        lines += [f"| {most} of 64 bits differ | {many:,} | {100 * many / found['test']:.1f} % |"
                  for most, many in found["bits"].items()]  # fmt: skip
        lines += [f"| cosine at least {least} | {many:,} | {100 * many / found['test']:.1f} % |"
                  for least, many in found["cosine"].items()]  # fmt: skip
        parts.append("\n".join(lines))
    if "redundant" in record:
        it = record["redundant"]
        parts.append(
            f"Of {it['images']:,} training images, the pairs that the experts shared out most alike have features of a "
            f"median cosine of {it['cosine']:.2f}; the nearest by features have {it['cosine_nearest']:.2f}, two "
            f"images of a class {it['cosine_of_strangers']:.2f}. Both ways name the same partner for "
            f"{100 * it['same_partner']:.1f} % of the images, and share {100 * it['shared_tenth']:.0f} % of the most "
            "redundant tenth (chance: 10 %)."
        )
    return parts or ["Not run yet."]


def parser() -> ArgumentParser:
    """The command line."""
    known = argument_parser("duplicates", __doc__)
    add = known.add_argument
    add("verb", choices=("planted", "cifar10", "redundant", "report"))
    add("--data", type=Path, metavar="DIR", help="images in two splits")
    add("--model", metavar="MODEL", help="whose features are compared")
    add("--run", type=Path, metavar="RUN", help="redundant: a finished run with scores.csv")
    add("--train", type=positive, default=TRAIN, metavar="N", help="planted: training images (%(default)s)")
    add(
        "--outside",
        type=positive,
        default=OUTSIDE,
        metavar="N",
        help="planted: images of the other split (%(default)s)",
    )
    add("--each", type=positive, default=EACH, metavar="N", help="planted: copies of each kind (%(default)s)")
    add("--sheet", type=Path, metavar="FILE", help="cifar10: draw pairs")
    add("--threads", type=positive, default=1, help="(%(default)s)")
    add("--out", type=Path, default=FOLDER / "record.json", help="the record (%(default)s)")
    add("--readme", type=Path, default=FOLDER / "README.md", help="where tables go (%(default)s)")
    add("--allow-dirty", action="store_true", help="try it out")
    return known


def main() -> None:
    """Measure or report."""
    options = parser().parse_args()
    record = read_json(options.out) if options.out.exists() else {}
    if options.verb == "report":
        fill_readme(options.readme, parts_of(record))
        return
    if options.verb == "redundant" and options.run is None:
        raise UserError("Say which run's images are compared: --run RUN.")
    if options.verb != "redundant" and (options.data is None or options.model is None):
        raise UserError("Say where the images are and whose features to use: --data DIR --model MODEL.")
    refuse_changes(FOLDER / "README.md", allowed=options.allow_dirty)
    torch.set_num_threads(options.threads)
    origin = {**about(), "command": f"python -m benchmarks duplicates {options.verb}"}
    measured = {"planted": planted, "cifar10": cifar10, "redundant": redundant}[options.verb](options)
    whose = {} if options.model is None else {"model": "/".join(Path(options.model).parts[-2:])}
    write_lines(options.out, {**record, options.verb: {**measured, **whose, **origin}})
