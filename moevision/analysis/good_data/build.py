"""`moevision data score`: the table and the page of what is known about the images of a run.

images.csv   a row for each image of every split: scores, what the model says, its file, its doubles
page.html    ranked lists with the images themselves, a map, tables of classes and experts; one file, nothing fetched

The page ranks and judges nothing: how many of the first are bad depends on the data. What a person decides there is
saved by the browser as decisions.csv, which `moevision data prune --by decisions` and `fit --data.relabel` read.

Axes: n images of all splits, m of the training set (the first m of n).
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from moevision import __version__
from moevision.analysis.good_data.examine import Known, RunImages, examine, images_of
from moevision.analysis.good_data.lists import SCORE_LISTS, image_id, lowest
from moevision.analysis.report.page import environment
from moevision.data.duplicates import Nearest
from moevision.data.images import BadImageError
from moevision.data.scores import FILE, SCORES, Floats, Ints, Scores
from moevision.errors import UserError
from moevision.files import refuse_foreign, write_text_atomic
from moevision.models.io import load_model
from moevision.names import csv_name, json_text, shown

Json = dict[str, Any]
TABLE, PAGE = "images.csv", "page.html"
EXPLORER: Final = "http://127.0.0.1:7860"
"""Where `moevision demo` is, unless the port is taken."""
THUMB: Final = 112  # px, the longer side of an image on the page
_BLOCK = 10_000
_CELLS = (24, 16)  # of the map: mean p, spread
_MOST_SPREAD = 0.5  # the largest standard deviation of numbers in [0, 1]
_MOST_ROWS = 1000  # of a table of the page
_OF_EACH = 5  # images of a class or an expert
_MOST_GROUPS = 64  # classes or experts that are shown with images
_LITTLE = 0.5  # of an even share: an expert with less has little work
_GREY = 0.01  # mean difference of channels, 0 to 1: below it an image has no colour that one sees
_FEW = 0.5  # grey images stand out where at most this share is grey


def score(run_dir: Path, out: Path, *, show: int = 40, quick: bool = False, command: str = "") -> Json:
    """Find out everything about the images of a run, and write the table and the page.

    Args:
        run_dir: the run folder, with scores.csv and its model.
        out: the folder to write to.
        show: images per list of the page.
        quick: only the scores: no image is opened but those that are shown.
        command: the command line, for the page.

    Returns:
        What the page was made of.

    Raises:
        UserError: if there are no scores, images or model, or `out` can't be written.
    """
    for name, mark in ((TABLE, b"split,image,label,"), (PAGE, b'content="moevision ')):
        refuse_foreign(out / name, mark)
    scores = Scores.read(run_dir / FILE)
    images = images_of(run_dir)
    model = None if quick else load_model(str(run_dir))
    with Progress(console=Console(stderr=True), transient=True, disable=quick or len(images) < 1000) as bar:
        task = bar.add_task("looking at images", total=len(images))
        known = examine(images, scores, model, lambda done: bar.update(task, advance=done))
    names = images.class_names if model is None else model.class_names
    facts = page_facts(images, known, names, show)
    facts |= {"title": f"The images of {shown(run_dir.resolve().name)}", "command": command, "quick": quick}
    facts |= {"explorer": EXPLORER, "explorer_command": f"moevision demo {shlex.quote(shown(str(run_dir)))}"}
    facts |= {"version": __version__, "made": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        write_text_atomic(out / TABLE, _table(images, known, names))
        write_text_atomic(out / PAGE, render(facts, Thumbnails(images)))
    except OSError as error:
        raise UserError(f"{out} can't be written to ({error.strerror}): give --out another folder.") from error
    return facts


# ---- the table


def _table(images: RunImages, known: Known, names: Sequence[str]) -> Iterator[str]:
    """images.csv, part by part."""
    yield ",".join([
        "split", "image", "label", "visits", *SCORES, "unlike_class", "prediction", "certainty", "margin", "width",
        "height", "sharpness", "brightness", "colour", "problem", "hash_twin", "hash_bits", "feature_twin",
        "feature_cosine", "leak", "leak_bits", "leak_cosine", "expert_twin", "expert_coefficient",
    ]) + "\n"  # fmt: skip
    trained, leak = len(known.visits), known.most_alike(across=True).other
    everything = images.each()
    for start in range(0, len(images), _BLOCK):
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for index in range(start, min(start + _BLOCK, len(images))):
            split, sample = next(everything)
            own: list[Any] = [""] * (len(SCORES) + 2)
            if index < trained:
                values = [*(known.scores[name][index] for name in SCORES), known.unlike_class[index]]
                own = [known.visits[index], *map(_cell, values)]
            look = known.look[index]
            seen = ["", "", "", "", ""]
            if look["read"]:
                seen = [look["width"], look["height"], *(_cell(look[name]) for name in _MEASURED)]
            twin = known.by_hash[0].other[index], known.by_features[0].other[index]
            writer.writerow([
                split, csv_name(sample.sample_id), csv_name(images.class_names[sample.label]), *own,
                csv_name(names[known.prediction[index]]) if known.prediction[index] >= 0 else "",
                _cell(known.certainty[index]), _cell(known.margin[index]), *seen,
                csv_name(known.problems.get(index, "")),
                _name(images, twin[0]), _bits(known.by_hash[0], index),
                _name(images, twin[1]), _cosine(known.by_features[0], index),
                _name(images, leak[index]), _bits(known.by_hash[1], index),
                _cosine(known.by_features[1], index),
                *((_name(images, known.by_experts.other[index]), _cosine(known.by_experts, index))
                  if index < trained else ("", "")),
            ])  # fmt: skip
        yield text.getvalue()


_MEASURED: Final = ("sharpness", "brightness", "colour")


def _cell(value: Any) -> str:
    return "" if not math.isfinite(value) else f"{value:.5g}"


def _name(images: RunImages, index: int) -> str:
    return csv_name(images.place(int(index))[1].sample_id) if index >= 0 else ""


def _bits(nearest: Nearest, index: int) -> str:
    return f"{nearest.distance[index]:.0f}" if nearest.other[index] >= 0 else ""


def _cosine(nearest: Nearest, index: int) -> str:
    return _cell(1 - nearest.distance[index]) if nearest.other[index] >= 0 else ""


# ---- what the page says


@dataclass(frozen=True)
class Ranked:
    """One ranked list.

    Attributes:
        key: its anchor.
        title: what it is called.
        about: what it is ranked by, and what it does not show.
        rows: the first images, best first.
        value: what is said of each.
        twin: the image that is shown beside each, if it is about pairs.
    """

    key: str
    title: str
    about: str
    rows: Ints
    value: Callable[[int], str]
    twin: Callable[[int], int] | None = None


def page_facts(images: RunImages, known: Known, names: Sequence[str], show: int) -> Json:
    """Everything on the page but the thumbnails: plain numbers and words."""
    lists = [each for each in ranked_lists(known, images.split_of, show) if len(each.rows)]
    return {
        "counts": {split: len(images.samples[split]) for split in images.splits},
        "unreadable": len(known.problems),
        "lists": [_list_facts(each, images, known, names) for each in lists],
        "map": map_cells(known.scores["p_mean"], known.scores["p_std"], images.labels[: len(known.visits)]),
        "map_size": {"columns": _CELLS[0], "rows": _CELLS[1], "most": _MOST_SPREAD},
        "classes": class_rows(images, known, names),
        "experts": expert_rows(images, known),
        "of_classes": [_list_facts(each, images, known, names) for each in of_classes(images, known)],
        "of_experts": [_list_facts(each, images, known, names) for each in of_experts(known)],
        "class_names": list(map(shown, images.class_names)),
        "class_ids": list(map(csv_name, images.class_names)),
    }


def ranked_lists(known: Known, split: Ints, show: int) -> list[Ranked]:
    """The lists in the order of the page; those of what wasn't measured are empty."""
    scores, look, read = known.scores, known.look, known.look["read"]

    def scored(key: str) -> Ranked:
        one = SCORE_LISTS[key]
        return Ranked(one.key, one.title, one.about, one.first(scores, show), lambda i: one.value(scores, i))

    grey = read & (look["colour"] < _GREY)
    few_grey = grey & (grey.sum() <= _FEW * read.sum())
    odd = _oddness(look["width"], look["height"], read)
    broken = np.fromiter(sorted(known.problems), np.int64, len(known.problems))
    pair, leak = known.most_alike(across=False), known.most_alike(across=True)
    return [
        scored("doubtful"),
        Ranked(
            "contradicted", "The finished model names another class",
            "Lowest probability of the label less the largest other one, by the finished model on the image as it is "
            "(the normalized margin of cleanlab).",
            lowest(known.margin, show, split == 0), lambda i: f"margin {known.margin[i]:.2f}",
        ),
        scored("hardest"),
        scored("unsteady"),
        Ranked(
            "experts", "Computed by experts of other classes",
            "How little the experts that computed an image are those of its class (linear discriminant analysis of "
            "their shares; the classifier is not asked).",
            lowest(-known.unlike_class, show), lambda i: f"−ln p {known.unlike_class[i]:.2f}",
        ),
        scored("easiest"),
        Ranked(
            "leaks", "In two splits",
            "The most alike pairs with one image outside of training, by perceptual hash, then by the model's "
            "features. A copy of a training image in a test set rewards memory.",
            _once(lowest(leak.distance, 2 * show, split > 0), leak.other, show),
            lambda i: _alike(known, 1, i), lambda i: int(leak.other[i]),
        ),
        Ranked(
            "doubles", "Near-duplicates",
            "The most alike pairs, by perceptual hash (bits of 64 that differ), then by the cosine of the model's "
            "features, whitened. Mirrored copies are found by features only.",
            _once(lowest(pair.distance, 2 * show), pair.other, show),
            lambda i: _alike(known, 0, i), lambda i: int(pair.other[i]),
        ),
        Ranked(
            "redundant", "Computed alike",
            "Pairs of one class whose patches the experts shared out most alike in the last third of the training "
            "(Bhattacharyya coefficient, 1: equal shares): what one teaches the experts, the other may too. Beside it "
            "the cosine of their features, which a dense model has as well.",
            _once(lowest(known.by_experts.distance, 2 * show), known.by_experts.other, show),
            lambda i: _computed_alike(known, i), lambda i: int(known.by_experts.other[i]),
        ),
        Ranked(
            "blurred", "Least detail",
            "Lowest variance of the Laplacian, at a short side of at most 224 px: blurred, or plain.",
            lowest(look["sharpness"], show, read), lambda i: f"variance {look['sharpness'][i]:.3g}",
        ),
        Ranked(
            "dark", "Darkest", "Lowest mean luma.", lowest(look["brightness"], show, read),
            lambda i: f"brightness {look['brightness'][i]:.2f}",
        ),
        Ranked(
            "odd", "Odd sizes",
            "Number of pixels or shape farthest from the median of all images; none where all are alike.",
            lowest(-odd, show, odd > 0), lambda i: f"{look['width'][i]} × {look['height'][i]} px",
        ),
        Ranked(
            "grey", "Grey among colour", "No difference between the channels, where most images have one.",
            lowest(look["colour"], show, few_grey), lambda i: f"colour {look['colour'][i]:.3f}",
        ),
        Ranked("unreadable", "Can't be read", "Truncated, damaged or missing files.", broken[:show],
               lambda i: ""),  # the frame says why
    ]  # fmt: skip


def _oddness(width: Ints, height: Ints, read: npt.NDArray[np.bool_]) -> Floats:
    """[n] largest of |ln pixels − median| and |ln (width / height) − median|; 0 for what couldn't be read."""
    found = np.zeros(len(read), np.float32)
    if read.any():
        w, h = np.log(width[read].astype(np.float64)), np.log(height[read].astype(np.float64))
        found[read] = np.maximum(*(np.abs(each - np.median(each)) for each in (w + h, w - h)))
    return np.where(found > 0.01, found, 0)  # a pixel more or less is not odd


def _once(rows: Ints, twin: Ints, show: int) -> Ints:
    """The rows without the second image of a pair whose first one is there already."""
    seen: set[tuple[int, int]] = set()
    kept = []
    for row in rows.tolist():
        pair = (min(row, int(twin[row])), max(row, int(twin[row])))
        if pair not in seen:
            seen.add(pair)
            kept.append(row)
    return np.array(kept[:show], np.int64)


def _alike(known: Known, which: int, index: int) -> str:
    bits = known.by_hash[which]
    if bits.other[index] >= 0:
        return f"{bits.distance[index]:.0f} of 64 bits differ"
    return f"cosine {1 - known.by_features[which].distance[index]:.3f}"


def _computed_alike(known: Known, index: int) -> str:
    alike = f"coefficient {1 - known.by_experts.distance[index]:.4f}"
    if known.white is None:
        return alike
    return f"{alike}, features {known.white[index] @ known.white[known.by_experts.other[index]]:.2f}"


def _list_facts(ranked: Ranked, images: RunImages, known: Known, names: Sequence[str]) -> Json:
    return {
        "key": ranked.key, "title": ranked.title, "about": ranked.about,
        "entries": [
            _entry(int(row), images, known, names) | {
                "value": ranked.value(int(row)).replace("-", "\N{MINUS SIGN}"),
                "twin": _entry(ranked.twin(int(row)), images, known, names) if ranked.twin else None,
            }
            for row in ranked.rows
        ],
    }  # fmt: skip


def _entry(index: int, images: RunImages, known: Known, names: Sequence[str]) -> Json:
    """What the page says of one image."""
    split, sample = images.place(index)
    prediction = int(known.prediction[index])
    said = shown(names[prediction]) if prediction >= 0 else ""
    return {
        "index": index, "split": split, "image": shown(sample.sample_id), "id": csv_name(sample.sample_id),
        "link": f"{EXPLORER}/?{urlencode({'picture': image_id(split, sample.sample_id), 'tab': 'data'})}",
        "label": shown(images.class_names[sample.label]), "label_id": csv_name(images.class_names[sample.label]),
        "prediction": said, "prediction_id": csv_name(said),
        "certainty": float(known.certainty[index]) if said else None,
    }  # fmt: skip


def map_cells(p_mean: Floats, p_std: Floats, labels: Ints) -> list[list[int]]:
    """[class, column, row, images] of every cell of the map that has some; columns by mean p, rows by its spread."""
    there = np.flatnonzero(np.isfinite(p_mean) & np.isfinite(p_std))
    columns, rows = _CELLS
    x = np.minimum(p_mean[there] * columns, columns - 1).astype(np.int64)
    y = np.minimum(p_std[there] / _MOST_SPREAD * rows, rows - 1).astype(np.int64)
    code, counts = np.unique((labels[there] * columns + x) * rows + y, return_counts=True)
    found: list[list[int]] = np.stack(
        [code // (columns * rows), code // rows % columns, code % rows, counts], 1
    ).tolist()
    return found


def _mean_by(labels: Ints, values: npt.NDArray[Any], classes: int) -> npt.NDArray[np.float64]:
    """[classes] means of the finite values; NaN where a class has none."""
    there = np.isfinite(values)
    counts = np.bincount(labels[there], minlength=classes)
    sums = np.bincount(labels[there], values[there].astype(np.float64), minlength=classes)
    means: npt.NDArray[np.float64] = np.divide(sums, counts, out=np.full(classes, np.nan), where=counts > 0)
    return means


def class_rows(images: RunImages, known: Known, names: Sequence[str]) -> list[Json]:
    """A row for each class, the least certain first."""
    labels, classes, m = images.labels, len(images.class_names), len(known.visits)
    measured = ("p_mean", "aum", "correct", "forgetting")
    means = {name: _mean_by(labels[:m], known.scores[name], classes) for name in measured}
    train = np.bincount(labels[:m], minlength=classes)
    asked = np.flatnonzero(known.prediction[:m] >= 0)
    number_of = {name: number for number, name in enumerate(images.class_names)}
    own = np.array([number_of.get(name, -1) for name in names], np.int64)
    wrong = asked[own[known.prediction[asked]] != labels[asked]]
    pairs, often = np.unique(np.stack([labels[wrong], known.prediction[wrong]], 1), axis=0, return_counts=True)
    taken: dict[int, tuple[int, int]] = {}
    for (label, prediction), count in zip(pairs.tolist(), often.tolist(), strict=True):
        taken[label] = max(taken.get(label, (0, 0)), (count, prediction))
    rows: list[Json] = [
        {
            "name": shown(name), "images": int(train[label]),
            **{key: None if math.isnan(value[label]) else float(value[label]) for key, value in means.items()},
            "taken_for": shown(names[taken[label][1]]) if label in taken else "",
            "times": taken[label][0] if label in taken else 0,
        }
        for label, name in enumerate(images.class_names)
    ]  # fmt: skip
    return sorted(rows, key=lambda row: row["p_mean"] if row["p_mean"] is not None else 2.0)[:_MOST_ROWS]


def expert_rows(images: RunImages, known: Known) -> list[Json]:
    """A row for each expert: its share, how hard its images are beside those of the layer, and its main class."""
    m = len(known.visits)
    labels, classes = images.labels[:m], len(images.class_names)
    found = []
    for block, shares in known.experts.items():
        there = np.flatnonzero(np.isfinite(shares[:, 0]) & np.isfinite(known.scores["p_mean"]))
        if not len(there):
            continue
        weight = shares[there].astype(np.float64)  # [r, E]
        total = np.maximum(weight.sum(0), 1e-12)
        for expert in range(weight.shape[1]):
            by_class = np.bincount(labels[there], weight[:, expert], minlength=classes)
            most = int(by_class.argmax())
            means = {name: float(weight[:, expert] @ known.scores[name][there] / total[expert])
                     for name in ("p_mean", "aum", "correct")}  # fmt: skip
            found.append({
                "name": f"L{block}.E{expert}", "share": float(total[expert] / weight.sum()),
                "images": float(total[expert]), **means, "class": shown(images.class_names[most]),
                "of_class": float(by_class[most] / total[expert]),
            })  # fmt: skip
    return found[:_MOST_ROWS]


def of_classes(images: RunImages, known: Known) -> list[Ranked]:
    """For each class, the least certain first, the images whose label the others speak against most."""
    labels, m = images.labels, len(known.visits)
    mean = _mean_by(labels[:m], known.scores["p_mean"], len(images.class_names))
    margin, found = SCORE_LISTS["doubtful"], []
    for label in lowest(mean, _MOST_GROUPS).tolist():
        rows = margin.first(known.scores, _OF_EACH, labels[:m] == label)
        found.append(Ranked("", shown(images.class_names[label]), "", rows, lambda i: margin.value(known.scores, i)))
    return [each for each in found if len(each.rows)]


def of_experts(known: Known) -> list[Ranked]:
    """For each expert, those with the least work first, the images of which it computed the largest part."""
    found: list[tuple[float, Ranked]] = []
    for block, shares in known.experts.items():
        there = np.isfinite(shares[:, 0])
        if not there.any():
            continue
        work = shares[there].mean(0) * shares.shape[1]  # [E]; 1: an even share
        for expert, times in enumerate(work.tolist()):
            little = ", little work" if times < _LITTLE else ""
            title = f"L{block}.E{expert}: {times:.2f} of an even share{little}"
            rows = lowest(-shares[:, expert], _OF_EACH, shares[:, expert] > 0)
            found.append((times, Ranked("", title, "", rows, partial(_part, shares[:, expert]))))
    found.sort(key=lambda each: each[0])
    return [each for _, each in found[:_MOST_GROUPS]]


def _part(shares: Floats, index: int) -> str:
    return f"{shares[index]:.0%} of the image"


# ---- the page


class Thumbnails:
    """Small copies of images as addresses that hold them; each is opened once."""

    def __init__(self, images: RunImages) -> None:
        self.images = images
        self._known: dict[int, Json] = {}

    def __call__(self, index: int) -> Json:
        """`src`, `width` and `height`, or `problem` if it can't be read."""
        if index not in self._known:
            self._known[index] = self._make(index)
        return self._known[index]

    def _make(self, index: int) -> Json:
        _, sample = self.images.place(index)
        try:
            image = self.images.collection.open(sample, THUMB)
        except BadImageError as error:
            return {"src": None, "problem": error.reason}
        file = io.BytesIO()
        if max(image.size) <= THUMB:  # a small one as it is
            image.save(file, "PNG")
            kind = "png"
        else:
            scale = THUMB / max(image.size)
            size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
            image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=82)
            kind = "jpeg"
        return {"src": Markup(f"data:image/{kind};base64,") + base64.b64encode(file.getvalue()).decode("ascii")}


def render(facts: Mapping[str, Any], thumbnail: Callable[[int], Json]) -> str:
    """The page: one file, in which only its own script runs."""
    script = files("moevision.analysis.good_data").joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode("ascii")
    page = environment()
    page.filters |= {"thumbnail": thumbnail}
    told = {name: facts[name] for name in ("class_ids", "map", "map_size")}
    return page.get_template("good_data/template.html.jinja").render(
        facts,
        script=Markup("\n" + script),
        script_sha256=Markup(digest),
        told=Markup(json_text(told).replace("<", "\\u003c")),
    )
