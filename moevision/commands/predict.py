"""`moevision predict MODEL PATH...`: classify image files with a saved model."""

from __future__ import annotations

import csv
import io
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import track

from moevision.commands import loading
from moevision.data.images import BadImageError, is_image_path, safe_open
from moevision.data.sources import walk
from moevision.data.transforms import normalize, square_pixels
from moevision.errors import UserError
from moevision.files import write_text_atomic
from moevision.models.io import SavedModel, best_device, load_model
from moevision.names import csv_name, json_text

UNSURE = "unsure"


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


def predict(
    model: str,
    paths: list[str],
    format: Literal["csv", "json"] = "csv",
    out: str | None = None,
    batch_size: int = 64,
    precision: Literal["fp32", "bf16"] = "fp32",
    unsure: float | None = None,
) -> None:
    """Classify images with a saved model.

    Prints one row per image: path, class in words, probability, and the five most likely classes. A file that can't be
    read gets a row that says why; the others are classified all the same. Probabilities are calibrated if `fit` stored
    a temperature with the model, and it is said if they aren't.

    Args:
        model: A run folder, its model/ folder, or a timm address such as hf-hub:user/name.
        paths: Image files and folders (searched with all subfolders).
        format: csv or json.
        out: File to write to; standard output if not given.
        batch_size: Images per forward pass.
        precision: fp32, or bf16 autocast: for many images on a machine that multiplies bf16 faster; probabilities then
            have two to three digits.
        unsure: Answer "unsure" in the place of a class whose probability is below this.

    Raises:
        UserError: If there is no such model or path, no image in the folders, or no place to write to.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size is {batch_size}: it must be at least 1.")
    if unsure is not None and not 0 < unsure <= 1:
        raise UserError(f"--unsure is {unsure:g}: it must be a probability above 0, at most 1.")
    with loading("loading the model"):
        saved = load_model(model)
    files = list(find_images(paths))
    batches = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
    progress = track(batches, "classifying", console=Console(stderr=True), disable=len(batches) < 4, transient=True)
    predictions = [prediction for batch in progress for prediction in predict_batch(saved, batch, precision)]
    calibrated = saved.temperature is not None
    text = to_json(predictions, unsure, calibrated=calibrated) if format == "json" else to_csv(predictions, unsure)
    if out is None:
        print(text, end="")
    else:
        try:
            write_text_atomic(out, text)
        except OSError as error:
            raise UserError(f"{out} can't be written ({error.strerror}): give --out another place.") from error
    if not calibrated:
        print("Probabilities are not calibrated: this model was saved without a temperature.", file=sys.stderr)
    doubted = sum(is_unsure(prediction, unsure) for prediction in predictions)
    if doubted:
        print(f"{doubted} of {len(files)} images are unsure: no class reaches {unsure:g}.", file=sys.stderr)
    unread = [prediction for prediction in predictions if prediction.error]
    if unread:
        print(f"{len(unread)} of {len(files)} files could not be read; their rows say why.", file=sys.stderr)


def find_images(paths: Sequence[str]) -> Iterator[Path]:
    """The files themselves, and every image below the folders, but for hidden subfolders (`.git`, `@eaDir`).

    Links are followed; each folder is entered once.

    Raises:
        UserError: if a path does not exist or a folder holds no image.
    """
    for name in paths:
        path = Path(name)
        if path.is_dir():
            images = sorted(Path(file.path) for file in walk(path) if is_image_path(file.name))
            if not images:
                raise UserError(f"The folder {path} holds no image.")
            yield from images
        elif path.exists():
            yield path
        else:
            raise UserError(f"There is no file or folder {path}.")


@torch.inference_mode()
def predict_batch(
    model: SavedModel, files: Sequence[Path], precision: Literal["fp32", "bf16"] = "fp32"
) -> list[Prediction]:
    """Classify one batch of files, in their order; unreadable ones are reported, not raised."""
    device = best_device()
    errors: dict[Path, str] = {}
    pixels: dict[Path, torch.Tensor] = {}  # uint8 [3, S, S]
    for file in files:
        try:
            image = square_pixels(safe_open(file, model.image_size), model.image_size)
            pixels[file] = torch.from_numpy(image).permute(2, 0, 1)
        except BadImageError as error:
            errors[file] = error.reason
    top: dict[Path, tuple[list[float], list[int]]] = {}
    if pixels:
        images = normalize(torch.stack(list(pixels.values())), model.mean, model.std).to(device)  # [B, 3, S, S]
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model.net.to(device)(images)  # [B, C]
        probabilities = (logits.float() / (model.temperature or 1.0)).softmax(-1).cpu()
        values, indices = probabilities.topk(min(5, len(model.class_names)))  # [B, 5], best first
        top = dict(zip(pixels, zip(values.tolist(), indices.tolist(), strict=True), strict=True))
    return [
        Prediction(str(file), error=errors[file])
        if file in errors
        else Prediction(str(file), tuple(model.class_names[index] for index in top[file][1]), tuple(top[file][0]))
        for file in files
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


def run(chosen: Namespace) -> None:
    """Run with parsed command-line arguments."""
    predict(**vars(chosen))
