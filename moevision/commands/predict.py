"""`moevision predict MODEL PATH...`: classify image files with a saved model."""

from __future__ import annotations

import csv
import io
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from moevision.commands import loading
from moevision.data.collection import Sample
from moevision.data.folder import walk
from moevision.data.images import BadImageError, is_image_path, safe_open
from moevision.data.open import kind_of, open_collection
from moevision.data.shards import ShardCollection
from moevision.data.transforms import normalize, square_pixels
from moevision.errors import UserError
from moevision.files import refuse_foreign, write_text_atomic, written_beside
from moevision.models.io import SavedModel, best_device
from moevision.names import csv_name, json_text
from moevision.train.processes import tell
from moevision.train.trained import load_trained

UNSURE = "unsure"
JSON_HEAD = b'[\n  {\n    "path": '  # of a file that --format json wrote


@dataclass(frozen=True)
class Prediction:
    """What a model says about one image.

    Attributes:
        path: the file.
        classes: the most likely classes in words, best first, at most five.
        probabilities: their probabilities, calibrated where the model has a temperature.
        error: why the file could not be read; the other fields are empty then.
    """

    path: str
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str = ""


def run(chosen: Namespace) -> None:
    """Classify, and print or write one row per image.

    A file that can't be read gets a row that says why; the others are classified all the same.

    Raises:
        UserError: If there is no such model or path, no image in the folders, no place to write to, or `out` holds
            something else than answers.
    """
    if chosen.batch_size < 1:
        raise UserError(f"--batch_size is {chosen.batch_size}: it must be at least 1.")
    if chosen.unsure is not None and not 0 < chosen.unsure <= 1:
        raise UserError(f"--unsure is {chosen.unsure:g}: it must be a probability above 0, at most 1.")
    with loading("loading the model"):
        saved = load_trained(chosen.model)
    calibrated = saved.temperature is not None
    files = list(find_images(chosen.paths))
    if chosen.out is not None:
        _try_place(Path(chosen.out), chosen.format)
    predictions = _predict_files(saved, files, chosen.batch_size, chosen.precision)
    if chosen.format == "json":
        text = to_json(predictions, chosen.unsure, calibrated=calibrated)
    else:
        text = to_csv(predictions, chosen.unsure)
    if chosen.out is None:
        print(text, end="")
    else:
        with _writing(chosen.out):
            write_text_atomic(chosen.out, text)
    _tell(predictions, chosen.unsure, calibrated=calibrated)


def _try_place(out: Path, format: Literal["csv", "json"]) -> None:
    """Refuse, before hours of classifying, what can't be written or isn't ours to replace."""
    refuse_foreign(out, to_csv([]).encode() if format == "csv" else JSON_HEAD)
    with _writing(out), written_beside(out, b""):
        pass


@contextmanager
def _writing(out: str | Path) -> Iterator[None]:
    """Say which place can't be written, and why."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{out} can't be written ({error.strerror}): give --out another place.") from error


def _predict_files(
    saved: SavedModel, files: Sequence[Path | ShardImage], batch_size: int, precision: Literal["fp32", "bf16"]
) -> list[Prediction]:
    batches = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
    progress = track(batches, "classifying", console=Console(stderr=True), disable=len(batches) < 4, transient=True)
    return [prediction for batch in progress for prediction in predict_batch(saved, batch, precision)]


def _tell(predictions: Sequence[Prediction], unsure: float | None, *, calibrated: bool) -> None:
    """Say on stderr what a reader of the rows should know."""
    if not calibrated:
        print("Probabilities are not calibrated: this model was saved without a temperature.", file=sys.stderr)
    doubted = sum(is_unsure(prediction, unsure) for prediction in predictions)
    if doubted:
        print(f"{doubted} of {len(predictions)} images are unsure: no class reaches {unsure:g}.", file=sys.stderr)
    unread = [prediction for prediction in predictions if prediction.error]
    if unread:
        print(f"{len(unread)} of {len(predictions)} files could not be read; their rows say why.", file=sys.stderr)


# ---- images in, rows out


@dataclass(frozen=True)
class ShardImage:
    """An image in tar shards; its path is that of the shards and its sample id."""

    collection: ShardCollection
    sample: Sample

    def __str__(self) -> str:
        """What its row is called."""
        return str(self.collection.files.folder / self.sample.sample_id)

    def open(self, short_side: int) -> Image.Image:
        """Decode it, as `safe_open` does a file."""
        return self.collection.open(self.sample, short_side)


def find_images(paths: Sequence[str]) -> Iterator[Path | ShardImage]:
    """The files themselves, and every image below the folders, but for hidden subfolders (`.git`, `@eaDir`).

    Links are followed; each folder is entered once. A folder of tar shards yields all images in them.

    Raises:
        UserError: if a path does not exist or a folder holds no image.
    """
    for name in paths:
        path = Path(name)
        if path.is_dir():
            links: Counter[str] = Counter()
            images = sorted(Path(file.path) for file in walk(path, links) if is_image_path(file.name))
            if links["unreadable"]:
                tell(f"warning: {links['unreadable']} folders in {path} can't be read, and were left out: permit it.")
            if images:
                yield from images
            elif kind_of(name) in ("shards", "tars") and isinstance(shards := open_collection(name), ShardCollection):
                yield from (ShardImage(shards, sample) for part in shards.given.values() for sample in part)
            else:
                raise UserError(f"The folder {path} holds no image.")
        elif path.exists():
            yield path
        else:
            raise UserError(f"There is no file or folder {path}.")


@torch.inference_mode()
def predict_batch(
    model: SavedModel, files: Sequence[Path | ShardImage], precision: Literal["fp32", "bf16"] = "fp32"
) -> list[Prediction]:
    """Classify one batch of files, in their order; unreadable ones are reported, not raised."""
    device = best_device()
    errors: dict[str, str] = {}
    pixels: dict[str, torch.Tensor] = {}  # uint8 [3, S, S]
    for file in files:
        try:
            image = (file.open if isinstance(file, ShardImage) else partial(safe_open, file))(model.image_size)
            pixels[str(file)] = torch.from_numpy(square_pixels(image, model.image_size)).permute(2, 0, 1)
        except BadImageError as error:
            errors[str(file)] = error.reason
    top: dict[str, tuple[list[float], list[int]]] = {}
    if pixels:
        images = normalize(torch.stack(list(pixels.values())), model.mean, model.std).to(device)  # [B, 3, S, S]
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model.net.to(device)(images)  # [B, C]
        probabilities = (logits.float() / (model.temperature or 1.0)).softmax(-1).cpu()
        values, indices = probabilities.topk(min(5, len(model.class_names)))  # [B, 5], best first
        top = dict(zip(pixels, zip(values.tolist(), indices.tolist(), strict=True), strict=True))
    return [
        Prediction(file, error=errors[file])
        if file in errors
        else Prediction(file, tuple(model.class_names[index] for index in top[file][1]), tuple(top[file][0]))
        for file in map(str, files)
    ]


def is_unsure(prediction: Prediction, threshold: float | None) -> bool:
    """Whether the likeliest class of a readable image stays below the threshold."""
    return threshold is not None and bool(prediction.classes) and prediction.probabilities[0] < threshold


def to_csv(predictions: Sequence[Prediction], unsure: float | None = None) -> str:
    """Rows `path, class, probability, top5, error`; top5 is `class=probability` joined by semicolons.

    Below the threshold the class is `unsure`; top5 has the likeliest ones all the same.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "class", "probability", "top5", "error"])
    for row in predictions:
        pairs = zip(row.classes, row.probabilities, strict=True)
        top5 = csv_name("; ".join(f"{name}={probability:.4f}" for name, probability in pairs))
        best = (csv_name(row.classes[0]), f"{row.probabilities[0]:.4f}") if row.classes else ("", "")
        if is_unsure(row, unsure):
            best = (UNSURE, best[1])
        writer.writerow([csv_name(row.path), *best, top5, csv_name(row.error)])
    return text.getvalue()


def to_json(predictions: Sequence[Prediction], unsure: float | None = None, *, calibrated: bool = False) -> str:
    """A list of `{path, class, probability, calibrated, unsure, top5: [{class, probability}], error}`.

    Below the threshold `unsure` is true and the class `"unsure"`; a class may bear that name too, so ask `unsure`.
    """
    rows = [
        {
            "path": row.path,
            "class": UNSURE if is_unsure(row, unsure) else row.classes[0] if row.classes else None,
            "probability": row.probabilities[0] if row.probabilities else None,
            "calibrated": calibrated,
            "unsure": is_unsure(row, unsure),
            "top5": [
                {"class": name, "probability": probability}
                for name, probability in zip(row.classes, row.probabilities, strict=True)
            ],
            "error": row.error or None,
        }
        for row in predictions
    ]
    return json_text(rows, indent=2) + "\n"
