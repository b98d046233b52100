"""`moevision predict MODEL PATH...`: classify image files with a saved model."""

from __future__ import annotations

import io
import math
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track

from moevision.data.folder import left_out, walk
from moevision.data.images import BadImageError, is_image_path, safe_open
from moevision.data.transforms import normalize, square_pixels
from moevision.errors import UserError, escape_controls, escape_csv_cell, json_text
from moevision.files import csv_text, refuse_foreign, write_bytes_atomic, write_text_atomic
from moevision.models.io import SavedModel, best_device
from moevision.models.ood import linear_head, pooled
from moevision.train.checkpoint import load_trained
from moevision.train.processes import print_rank0
from moevision.words import loading

UNSURE = "unsure"
NO_NUMBER = "the model's answer is no number: its weights are too large, or damaged"
JSON_HEAD = b'[\n  {\n    "path": '  # of a file that --format json wrote
NPY_HEAD = b"('feature', '<f4', ("


@dataclass(frozen=True)
class Prediction:
    """What a model says about one image; a `distance` above 1 is that of a stranger (`moevision.models.ood`)."""

    path: str
    classes: tuple[
        str, ...
    ] = ()  # the most likely ones in words, best first, at most five, with their `probabilities`
    probabilities: tuple[float, ...] = ()
    error: str = (
        ""  # why the file could not be read, or `NO_NUMBER`; the other fields are empty then
    )
    distance: float | None = None
    feature: npt.NDArray[np.float32] | None = (
        None  # what the classifier reads, float32 [D], where it was asked for
    )

    def is_unsure(self, threshold: float | None) -> bool:
        """Whether the likeliest class of a readable image stays below the threshold."""
        return threshold is not None and bool(self.classes) and self.probabilities[0] < threshold


def run(chosen: Namespace) -> None:
    """Classify, and print or write one row per image.

    A file that can't be read gets a row that says why; the others are classified all the same.
    """
    with loading("loading the model"):
        model = load_trained(chosen.model)
    if chosen.features is not None and linear_head(model.net) is None:
        raise UserError(
            f"{chosen.model} has no linear classifier, and so no features before it: leave --features out."
        )
    files = list(images_at(chosen.paths))
    head_of_text = to_csv([]).encode() if chosen.format == "csv" else JSON_HEAD
    for option, out, head in (
        ("--out", chosen.out, head_of_text),
        ("--features", chosen.features, NPY_HEAD),
    ):
        if out is not None:  # before hours of classifying
            refuse_foreign(Path(out), head, option)
            Path(out).parent.mkdir(parents=True, exist_ok=True)
    batches = [
        files[start : start + chosen.batch_size]
        for start in range(0, len(files), chosen.batch_size)
    ]
    progress = track(
        batches,
        "classifying",
        console=Console(stderr=True),
        disable=len(batches) < 4,
        transient=True,
    )
    wanted = chosen.features is not None
    rows = [
        row
        for batch in progress
        for row in predict_batch(model, batch, chosen.precision, features=wanted)
    ]
    calibrated, limit = model.temperature is not None, chosen.unsure
    text = (
        to_json(rows, limit, calibrated=calibrated)
        if chosen.format == "json"
        else to_csv(rows, limit)
    )
    if chosen.out is None:
        print(text, end="")
    else:
        write_text_atomic(chosen.out, text)
    if wanted:
        write_bytes_atomic(Path(chosen.features), to_npy(rows))
    if not calibrated:
        print(
            "Probabilities are not calibrated: this model was saved without a temperature.",
            file=sys.stderr,
        )
    _tell_problems(rows, limit)


def _tell_problems(rows: Sequence[Prediction], unsure: float | None) -> None:
    """Say on standard error how many answers are missing, or not to be taken as they are."""
    problems = {
        f"images are unsure: no class reaches {unsure or 0:g}": sum(
            row.is_unsure(unsure) for row in rows
        ),
        "images are unlike the training images: their distance is above 1": sum(
            (row.distance or 0) > 1 for row in rows
        ),
        "images have no answer: the model's is no number": sum(
            row.error == NO_NUMBER for row in rows
        ),
        "files could not be read; their rows say why": sum(
            row.error not in ("", NO_NUMBER) for row in rows
        ),
    }
    for problem, count in problems.items():
        if count:
            print(f"{count} of {len(rows)} {problem}.", file=sys.stderr)


# ---- images in, rows out


def images_at(paths: Sequence[str]) -> Iterator[Path]:
    """The files themselves, and every image below the folders, but for hidden subfolders (`.git`, `@eaDir`).

    Links are followed; each folder is entered once.
    """
    for name in paths:
        path = Path(name)
        if path.is_dir():
            links: Counter[str] = Counter()
            files = list(walk(path, links))
            images = sorted(Path(file.path) for file in files if is_image_path(file.name))
            others = left_out(path, (file.name for file in files if not is_image_path(file.name)))
            if links["unreadable"]:
                print_rank0(
                    f"warning: {links['unreadable']} folders in {path} can't be read, and were left out: permit it."
                )
            if not images:
                raise UserError("; ".join([f"{path} holds no image", *others]))
            if others:
                print_rank0(f"warning: {others[0]}")
            yield from images
        elif path.exists():
            yield path
        else:
            raise UserError(f"There is no file or folder {path}.")


@torch.inference_mode()
def predict_batch(
    model: SavedModel,
    files: Sequence[Path],
    precision: Literal["fp32", "bf16"] = "fp32",
    *,
    features: bool = False,
) -> list[Prediction]:
    """Classify one batch of files, in their order; unreadable ones are reported, not raised."""
    device, side = best_device(), model.image_size
    rows: dict[int, Prediction] = {}  # by the place of the file
    pixels: dict[int, torch.Tensor] = {}  # the same of those that can be read: uint8 [3, S, S]
    for place, file in enumerate(files):
        try:
            image = square_pixels(safe_open(file, side), side, model.framing)
            pixels[place] = torch.from_numpy(image).permute(2, 0, 1)
        except BadImageError as error:
            rows[place] = Prediction(str(file), error=error.reason)
    if pixels:
        images = normalize(torch.stack([*pixels.values()]), model.mean, model.std).to(
            device
        )  # [B, 3, S, S]
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            net, distances, rows_of = (
                model.net.to(device),
                [None] * len(images),
                [None] * len(images),
            )
            if model.strangers is None and not features:
                logits = net(images)  # [B, C]
            else:
                read = pooled(net, images)  # [B, D]
                logits = cast(Any, net).get_classifier()(read)  # [B, C]
                if model.strangers is not None:
                    distances = model.strangers(read).tolist()  # [B]
                if features:
                    rows_of = list(read.float().cpu().numpy())
        probabilities = (logits.float() / (model.temperature or 1.0)).softmax(-1).cpu()
        values, indices = probabilities.topk(min(5, len(model.class_names)))  # [B, 5], best first
        found = zip(pixels, values.tolist(), indices.tolist(), distances, rows_of, strict=True)
        for place, likeliest, classes, distance, feature in found:
            if not all(map(math.isfinite, (*likeliest, distance or 0.0))):
                rows[place] = Prediction(str(files[place]), error=NO_NUMBER)
                continue
            names = tuple(model.class_names[each] for each in classes)
            rows[place] = Prediction(
                str(files[place]), names, tuple(likeliest), distance=distance, feature=feature
            )
    return [rows[place] for place in range(len(files))]


def to_csv(predictions: Sequence[Prediction], unsure: float | None = None) -> str:
    """Rows `path, class, probability, top5, error, distance`; top5 is `class=probability` joined by semicolons.

    Below the threshold the class is `unsure`; top5 has the likeliest ones all the same.
    """
    rows = []
    for row in predictions:
        pairs = [
            (name, f"{share:.4f}")
            for name, share in zip(row.classes, row.probabilities, strict=True)
        ]
        best, probability = pairs[0] if pairs else ("", "")
        best = UNSURE if row.is_unsure(unsure) else best
        distance = "" if row.distance is None else f"{row.distance:.4f}"
        top5 = "; ".join(f"{name}={share}" for name, share in pairs)
        rows.append(
            (
                escape_csv_cell(row.path),
                escape_csv_cell(best),
                probability,
                escape_csv_cell(top5),
                escape_csv_cell(row.error),
                distance,
            )
        )
    return csv_text(("path", "class", "probability", "top5", "error", "distance"), rows)


def to_npy(predictions: Sequence[Prediction]) -> bytes:
    """Records `path` (text) and `feature` (float32 [D]) of the images that could be read, as an .npy file."""
    read = [
        (escape_controls(row.path), row.feature) for row in predictions if row.feature is not None
    ]
    longest, width = max((len(path) for path, _ in read), default=1), len(read[0][1]) if read else 0
    file, kinds = io.BytesIO(), [("path", f"U{longest}"), ("feature", np.float32, (width,))]
    np.save(file, np.array(read, kinds), allow_pickle=False)
    return file.getvalue()


def to_json(
    predictions: Sequence[Prediction], unsure: float | None = None, *, calibrated: bool = False
) -> str:
    """A list of `{path, class, probability, calibrated, unsure, top5: [{class, probability}], error, distance}`.

    Below the threshold `unsure` is true and the class `"unsure"`; a class may bear that name too, so ask `unsure`.
    """
    rows = []
    for row in predictions:
        pairs = zip(row.classes, row.probabilities, strict=True)
        top5 = [{"class": name, "probability": probability} for name, probability in pairs]
        best = top5[0] if top5 else {"class": None, "probability": None}
        rows.append(
            {
                "path": row.path,
                **best,
                **({"class": UNSURE} if row.is_unsure(unsure) else {}),
                "calibrated": calibrated,
                "unsure": row.is_unsure(unsure),
                "top5": top5,
                "error": row.error or None,
                "distance": row.distance,
            }
        )
    return json_text(rows, indent=2) + "\n"
