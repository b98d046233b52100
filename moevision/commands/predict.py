"""`moevision predict MODEL PATH...`: classify image files with a saved model."""

from __future__ import annotations

import io
import math
import re
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from moevision.data.folder import unread_formats, walk
from moevision.data.images import BadImageError, is_image_path, safe_open
from moevision.data.transforms import normalize, square_pixels
from moevision.errors import UserError, escape_controls, escape_csv_cell, json_text
from moevision.files import csv_text, require_own_file, write_bytes_atomic, write_text_atomic
from moevision.models.convert import pooled, set_members, with_mirror
from moevision.models.io import SavedModel, best_device
from moevision.models.ood import linear_head
from moevision.models.shares import shares_refusal
from moevision.train.checkpoint import load_trained
from moevision.train.processes import print_rank0
from moevision.types import Floats, Json
from moevision.words import loading, with_progress

UNSURE = "unsure"
# Of probabilities that are NaN or infinite.
NO_NUMBER = "the model's answer is no number: its weights are too large, or damaged"
# By these bytes near the start a file is recognized as an earlier output, which may be overwritten.
JSON_HEAD = b'[\n  {\n    "path": '  # of --format json
NPY_HEAD = b"('feature', '<f4', ("  # of --features
HEAT_HEAD = b"What an answer of moevision rests on"  # of an image of --heat
HEAT_SIDE = 448  # pixels


@dataclass(frozen=True)
class Prediction:
    """A model's prediction for one image; without one only `path` and `error`, the reason, are set."""

    path: str
    classes: tuple[str, ...] = ()  # names of the most probable classes, best first, at most five
    probabilities: tuple[float, ...] = ()  # of these classes
    # Where images have several labels: those above their threshold, best first; `classes` are then all. Else None.
    labels: tuple[str, ...] | None = None
    error: str = ""
    # above 1: out of distribution (`moevision.models.ood`); None: not measured
    distance: float | None = None
    feature: Floats | None = None  # [D] input of the classifier, if requested
    added: Json = field(default_factory=dict)  # `mirror`, `coverage` and `set`, see `to_json`

    def is_unsure(self, threshold: float | None) -> bool:
        """Whether there is a prediction, and its highest probability is below the threshold (None: never)."""
        if threshold is None or not self.classes:
            return False
        return self.probabilities[0] < threshold


def run(args: Namespace) -> None:
    """Classify, and print or write one row per image.

    A file that can't be read gets a row with the reason; the others are still classified.
    """
    with loading("loading the model"):
        model = load_trained(args.model)
    with_features = args.features is not None
    if with_features and linear_head(model.net) is None:
        raise UserError(
            f"{args.model} has no linear classifier, and so no features before it: leave --features out."
        )
    model = _with_opinions(model, args)
    files = list(images_at(args.paths))
    is_json = args.format == "json"
    # Now, so that an error doesn't come after hours of classifying.
    _prepare_output(args.out, JSON_HEAD if is_json else to_csv([]).strip().encode(), "--out")
    _prepare_output(args.features, NPY_HEAD, "--features")
    heat_files = {} if args.heat is None else _prepare_heat(model, files, args)

    predictions = _predict(model, files, args, heat_files)

    calibrated = model.temperature is not None
    text = to_csv(predictions, args.unsure)
    if is_json:
        text = to_json(predictions, args.unsure, calibrated=calibrated)
    if args.out is None:
        print(text, end="")
    else:
        write_text_atomic(args.out, text)
    if with_features:
        write_bytes_atomic(Path(args.features), to_npy(predictions))
    if not calibrated:
        print(
            "Probabilities are not calibrated: this model was saved without a temperature.",
            file=sys.stderr,
        )
    _print_problems(predictions, args.unsure)


def _with_opinions(model: SavedModel, args: Namespace) -> SavedModel:
    """The model, to answer as --mirror and --sets say; a UserError where it can't make prediction sets."""
    model = replace(model, mirror=args.mirror, coverage=args.sets)
    if args.sets is None:
        return model
    if model.thresholds:
        raise UserError("--sets is for one class an image, and this model gives several labels.")
    if model.sets is None:
        raise UserError(
            f"{args.model} has no scores for --sets, which fit saves with a model since 0.2: train it again, or see by "
            f"moevision test RUN --sets {args.sets:g} what sets of its run cover."
        )
    if args.mirror:
        raise UserError(
            "The scores for --sets are of images without --mirror: leave out one of the two (test takes both)."
        )
    if model.sets.threshold(args.sets) == 0:
        print(
            f"Every set has all classes: the scores of {len(model.sets.true_probabilities)} validation images are too "
            f"few, or too bad, for {args.sets:g}.",
            file=sys.stderr,
        )
    return model


def _prepare_output(path: str | None, head: bytes, option: str) -> None:
    """Refuse to overwrite a file that isn't an earlier output (by its `head`), and make its folder."""
    if path is not None:
        require_own_file(Path(path), head, option)
        Path(path).parent.mkdir(parents=True, exist_ok=True)


def _prepare_heat(model: SavedModel, files: Sequence[Path], args: Namespace) -> dict[Path, Path]:
    """The files of `heat_files_of`, each of which may be written; a UserError where the model has no shares."""
    reason = shares_refusal(model.net)
    if model.thresholds:
        reason = "--heat shows what one answer rests on, and this model gives several labels: leave it out."
    if reason is not None:
        raise UserError(reason)
    if any(Path(args.heat).is_relative_to(path) for path in args.paths):
        raise UserError(
            f"{args.heat} lies among the images, and would be classified next time: give --heat another place."
        )
    heat_files = heat_files_of(files, Path(args.heat))
    for heat_file in heat_files.values():
        _prepare_output(str(heat_file), HEAT_HEAD, "--heat")
    return heat_files


def heat_files_of(files: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """By image the file in `folder` for it: its name and `.png`, with a number where several are alike.

    Of the name letters, digits, dots and hyphens stay, and of a long one the end.
    """
    heat_files = {}
    counts: Counter[str] = Counter()
    for file in dict.fromkeys(files):
        safe_name = re.sub(r"[^\w.-]", "_", file.name)
        name = safe_name.encode()[-200:].decode(errors="ignore")
        key = name.casefold()  # to some systems upper and lower case are the same
        counts[key] += 1
        if counts[key] > 1:
            name += f"~{counts[key]}"
        heat_files[file] = folder / f"{name}.png"
    return heat_files


def write_heat(model: SavedModel, file: Path, heat_file: Path) -> None:
    """Write an image with what its answer rests on, as a file that `_prepare_output` recognizes."""
    from moevision.analysis.effects import patch_contributions
    from moevision.analysis.plots import heat_image

    image = safe_open(file, HEAT_SIDE)
    pixels = square_pixels(image, model.image_size, model.framing)
    shown = square_pixels(image, HEAT_SIDE, model.framing)
    (shares,) = patch_contributions(model, [pixels]).margins().numpy(force=True)
    grid = cast(Any, model.net).patch_embed.grid_size
    mark = PngInfo()
    mark.add_text("Description", HEAT_HEAD.decode())
    data = io.BytesIO()
    heat_image(shown, shares, grid).save(data, "png", pnginfo=mark)
    write_bytes_atomic(heat_file, data.getvalue())


def _predict(
    model: SavedModel, files: Sequence[Path], args: Namespace, heat_files: Mapping[Path, Path]
) -> list[Prediction]:
    """Classify batch by batch; `heat_files` are to be written, by image."""
    starts = range(0, len(files), args.batch_size)
    with_features = args.features is not None
    predictions = []
    for start in with_progress(starts, "classifying", len(starts)):
        batch = files[start : start + args.batch_size]
        predictions += predict_batch(model, batch, args.precision, features=with_features)
        for file, prediction in zip(batch, predictions[start:], strict=True):
            if heat_files and not prediction.error:
                write_heat(model, file, heat_files[file])
    return predictions


def _print_problems(predictions: Sequence[Prediction], unsure: float | None) -> None:
    """Print to standard error how many predictions are missing or unreliable; `unsure` is the threshold."""
    errors = [prediction.error for prediction in predictions if prediction.error]
    no_number_count = errors.count(NO_NUMBER)
    unsure_count = sum(prediction.is_unsure(unsure) for prediction in predictions)
    distant_count = sum((prediction.distance or 0) > 1 for prediction in predictions)
    problems = {
        f"images are unsure: no class reaches {unsure or 0:g}": unsure_count,
        "images are unlike the training images: their distance is above 1": distant_count,
        "images have no answer: the model's is no number": no_number_count,
        "files could not be read; their rows say why": len(errors) - no_number_count,
    }
    for problem, count in problems.items():
        if count:
            print(f"{count} of {len(predictions)} {problem}.", file=sys.stderr)


# ---- images in, rows out


def images_at(paths: Sequence[str]) -> Iterator[Path]:
    """The given files, and every image below the given folders, except in hidden subfolders (`.git`, `@eaDir`).

    Symbolic links are followed, and each folder is read only once.
    """
    for path in map(Path, paths):
        if path.is_dir():
            yield from _images_below(path)
        elif path.exists():
            yield path
        else:
            raise UserError(f"There is no file or folder {path}.")


def _images_below(folder: Path) -> list[Path]:
    """Images below a folder, sorted; prints warnings for what can't be read, a UserError if there is no image."""
    events: Counter[str] = Counter()  # counted by `walk`, such as unreadable folders
    images, others = [], []
    for file in walk(folder, events):
        if is_image_path(file.name):
            images.append(Path(file.path))
        else:
            others.append(file.name)
    remarks = unread_formats(folder, others)

    if events["unreadable"]:
        print_rank0(
            f"warning: {events['unreadable']} folders in {folder} can't be read, and were left out: permit it."
        )
    if not images:
        raise UserError("; ".join([f"{folder} holds no image", *remarks]))
    if remarks:
        print_rank0(f"warning: {remarks[0]}")
    return sorted(images)


@torch.inference_mode()
def predict_batch(
    model: SavedModel,
    files: Sequence[Path],
    precision: Literal["fp32", "bf16"] = "fp32",
    *,
    features: bool = False,
) -> list[Prediction]:
    """Classify one batch of files, in their order; unreadable ones are reported, not raised."""
    predictions: dict[Path, Prediction] = {}
    pixels: dict[Path, Tensor] = {}  # of those that can be read: uint8 [3, S, S]
    for file in files:
        try:
            image = safe_open(file, model.image_size)
        except BadImageError as error:
            predictions[file] = Prediction(str(file), error=error.reason)
            continue
        square = square_pixels(image, model.image_size, model.framing)  # [S, S, 3]
        pixels[file] = torch.from_numpy(square).permute(2, 0, 1)

    if pixels:
        images = normalize(torch.stack(list(pixels.values())), model.mean, model.std)
        predictions |= _classify(model, list(pixels), images, precision, features=features)
    return [predictions[file] for file in files]


def _classify(
    model: SavedModel, files: Sequence[Path], images: Tensor, precision: str, *, features: bool
) -> dict[Path, Prediction]:
    """The predictions for images [B, 3, S, S]; with distances if the model can measure them."""
    device = best_device()
    net = model.net.to(device)
    images = images.to(device)
    distances: Sequence[float | None] = [None] * len(files)
    rows: Sequence[Floats | None] = [None] * len(files)  # [D] each
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        if model.strangers is None and not features:
            logits = net(images)  # [B, C]
        else:
            inputs = pooled(net, images)  # [B, D]
            logits = cast(Any, net).get_classifier()(inputs)  # [B, C]
            if model.strangers is not None:
                distances = model.strangers(inputs).tolist()
            if features:
                rows = list(inputs.float().cpu().numpy())
        if model.mirror:
            logits = with_mirror(net, images, logits, several_labels=bool(model.thresholds))

    probabilities = model.probabilities(logits.float() / (model.temperature or 1.0)).cpu()
    count = len(model.class_names)
    if not model.thresholds:
        count = min(5, count)
    best = probabilities.topk(count)
    added = _added_fields(model, logits)
    predictions = {}
    for file, shares, labels, distance, feature, fields in zip(
        files, best.values.tolist(), best.indices.tolist(), distances, rows, added, strict=True
    ):
        if all(map(math.isfinite, (*shares, distance or 0.0))):
            names = tuple(model.class_names[label] for label in labels)
            prediction = Prediction(
                str(file), names, tuple(shares), distance=distance, feature=feature, added=fields
            )
            predictions[file] = _with_labels(model, prediction, labels)
        else:
            predictions[file] = Prediction(str(file), error=NO_NUMBER)
    return predictions


def _with_labels(model: SavedModel, prediction: Prediction, labels: Sequence[int]) -> Prediction:
    """The prediction with the names of its labels above their threshold, where the model gives several."""
    if not model.thresholds:
        return prediction
    is_given = [
        share > model.thresholds[label]
        for label, share in zip(labels, prediction.probabilities, strict=True)
    ]
    return replace(prediction, labels=tuple(compress(prediction.classes, is_given)))


def _added_fields(model: SavedModel, logits: Tensor) -> list[Json]:
    """What --mirror and --sets add to each image's row, by logits [B, C]."""
    if model.mirror:
        return [{"mirror": True} for _ in logits]
    if model.coverage is None:
        return [{} for _ in logits]
    members = set_members(logits, cast(Any, model.sets), model.coverage)  # [B, C]
    fields = []
    for is_member in members.tolist():
        names = list(compress(model.class_names, is_member))
        fields.append({"coverage": model.coverage, "set": names})
    return fields


def to_csv(predictions: Sequence[Prediction], unsure: float | None = None) -> str:
    """Rows `path, class, probability, top5, error, distance`; top5 is `class=probability` joined by semicolons.

    Below the threshold `unsure` the class is "unsure"; top5 is not affected. Where images have several labels, `class`
    has those that are given with `|` between them, perhaps none, `probability` is the highest, and top5 has all labels.
    `mirror`, `coverage` and `set`, classes joined by semicolons, follow where they were asked for.
    """
    rows = []
    added: Json = {}
    for prediction in predictions:
        added |= prediction.added
    for row in _rows(predictions, unsure, calibrated=False):
        if "set" in row:
            members = "; ".join(row["set"])
            row["set"] = escape_csv_cell(members)
        top5 = [f"{entry['class']}={_digits(entry['probability'])}" for entry in row["top5"]]
        rows.append(
            (
                escape_csv_cell(row["path"]),
                escape_csv_cell(row["class"] or ""),
                _digits(row["probability"]),
                escape_csv_cell("; ".join(top5)),
                escape_csv_cell(row["error"] or ""),
                _digits(row["distance"]),
                *map(row.get, added),
            )
        )
    return csv_text(("path", "class", "probability", "top5", "error", "distance", *added), rows)


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def to_npy(predictions: Sequence[Prediction]) -> bytes:
    """Records `path` (text) and `feature` (float32 [D]) of the images that could be read, as an .npy file."""
    records = []
    for prediction in predictions:
        if prediction.feature is not None:
            records.append((escape_controls(prediction.path), prediction.feature))
    longest = max((len(path) for path, _ in records), default=1)
    width = len(records[0][1]) if records else 0
    dtype = [("path", f"U{longest}"), ("feature", np.float32, (width,))]
    file = io.BytesIO()
    np.save(file, np.array(records, dtype), allow_pickle=False)
    return file.getvalue()


def to_json(
    predictions: Sequence[Prediction], unsure: float | None = None, *, calibrated: bool = False
) -> str:
    """A list of `{path, class, probability, calibrated, unsure, top5: [{class, probability}], error, distance}`.

    Where images have several labels, each has a list `labels` too; the other fields are as in `to_csv`.

    Rows with an answer have `mirror` (true), `coverage` and `set`, class names, where they were asked for. Below the
    threshold the field `unsure` is true and the class is `"unsure"`; a real class may have that name too, so test the
    field.
    """
    return json_text(_rows(predictions, unsure, calibrated=calibrated), indent=2) + "\n"


def _rows(
    predictions: Sequence[Prediction], unsure: float | None, *, calibrated: bool
) -> list[Json]:
    rows = []
    for prediction in predictions:
        pairs = zip(prediction.classes, prediction.probabilities, strict=True)
        top5 = [{"class": name, "probability": probability} for name, probability in pairs]
        best: Json = top5[0] if top5 else {"class": None, "probability": None}
        is_unsure = prediction.is_unsure(unsure)
        labels: Json = {}
        if prediction.labels is not None:
            best = best | {"class": "|".join(prediction.labels)}
            labels = {"labels": list(prediction.labels)}

        rows.append(
            {
                "path": prediction.path,
                "class": UNSURE if is_unsure else best["class"],
                "probability": best["probability"],
                "calibrated": calibrated,
                "unsure": is_unsure,
                "top5": top5,
                "error": prediction.error or None,
                "distance": prediction.distance,
                **prediction.added,
            }
            | labels
        )
    return rows
