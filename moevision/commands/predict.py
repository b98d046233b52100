"""`moevision predict MODEL PATH...`: classify image files with a saved model.

`--shard i/n` classifies the i-th of n equal runs of the sorted files, in parts of `PART_IMAGES`, each a file that is
there whole or not at all; what is there is not computed again. So n processes, or an array job on many machines, share
a folder of answers without a word between them, and each may be killed and started again. Names sort in the order of
the images, and the header is a part of its own in front: `cat` of all parts is what one process would have written.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from moevision.commands import loading
from moevision.data.images import BadImageError, is_image_path, safe_open
from moevision.data.shards import ShardCollection, is_shards, open_shards
from moevision.data.sources import Sample, walk
from moevision.data.transforms import normalize, square_pixels
from moevision.errors import UserError
from moevision.files import refuse_foreign, write_text_atomic, written_beside
from moevision.models.io import SavedModel, best_device
from moevision.names import csv_name, json_text
from moevision.train.processes import tell
from moevision.train.trained import load_trained

UNSURE = "unsure"
PART_IMAGES = 4096
SHARDS_JSON = "shards.json"
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

    A file that can't be read gets a row that says why; the others are classified all the same. With `shard` (i, n), i
    from 1, the i-th of n parts of the images is written in pieces below the folder `out`, without those that are there.

    Raises:
        UserError: If there is no such model or path, no image in the folders, no place to write to, or `out` holds
            something else than answers; for a shard, also if those are about other images or by another model.
    """
    if chosen.batch_size < 1:
        raise UserError(f"--batch_size is {chosen.batch_size}: it must be at least 1.")
    if chosen.unsure is not None and not 0 < chosen.unsure <= 1:
        raise UserError(f"--unsure is {chosen.unsure:g}: it must be a probability above 0, at most 1.")
    if chosen.shard is not None and chosen.out is None:
        raise UserError("--shard needs --out DIR, the folder that all shards write their parts into.")
    with loading("loading the model"):
        saved = load_trained(chosen.model)
    calibrated = saved.temperature is not None
    files = list(find_images(chosen.paths))
    if chosen.shard is not None:
        said = {name: getattr(chosen, name) for name in ("model", "format", "precision", "unsure")}
        predictions = _predict_shard(saved, files, chosen.shard, Path(chosen.out), chosen.batch_size, said)
        _tell(predictions, chosen.unsure, calibrated=calibrated)
        return
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


# ---- one shard of many


def _predict_shard(
    saved: SavedModel,
    files: Sequence[Path | ShardImage],
    shard: tuple[int, int],
    folder: Path,
    batch_size: int,
    said: dict[str, Any],
) -> list[Prediction]:
    """Write the parts of one shard that aren't there; what was predicted for them."""
    number, shards = shard
    first, end = (len(files) * (number + step) // shards for step in (-1, 0))
    suffix = "csv" if said["format"] == "csv" else "jsonl"
    starts = range(first, end, PART_IMAGES)
    parts = {folder / f"part-{start:012d}.{suffix}": files[start : min(start + PART_IMAGES, end)] for start in starts}
    found: list[Prediction] = []
    with _writing(folder):
        _agree(folder, {**said, **_identity(saved, files), "shards": shards})
        if suffix == "csv":  # sorts in front of all parts, and every shard writes the same
            write_text_atomic(folder / "header.csv", to_csv([]))
        missing = {file: images for file, images in parts.items() if not file.exists()}
        for file, images in missing.items():
            predictions = _predict_files(saved, images, batch_size, said["precision"])
            write_text_atomic(file, _rows(predictions, said, calibrated=saved.temperature is not None))
            found += predictions
    print(
        f"shard {number} of {shards}: {len(found):,} of {end - first:,} images classified now, "
        f"{len(parts) - len(missing)} of {len(parts)} parts were there",
        file=sys.stderr,
    )
    return found


def _rows(predictions: Sequence[Prediction], said: dict[str, Any], *, calibrated: bool) -> str:
    """One line for each image, without a header."""
    if said["format"] == "csv":
        return to_csv(predictions, said["unsure"]).removeprefix(to_csv([]))
    rows = to_rows(predictions, said["unsure"], calibrated=calibrated)
    return "".join(json_text(row) + "\n" for row in rows)


def _identity(saved: SavedModel, files: Sequence[Path | ShardImage]) -> dict[str, Any]:
    """What must be the same for all shards: the images, in their order, and the weights."""
    from moevision.analysis.collect import weights_sha256

    names = hashlib.sha256()
    for file in files:
        names.update(f"{file}\n".encode(errors="surrogateescape"))
    return {"images": len(files), "paths_sha256": names.hexdigest(), "weights_sha256": weights_sha256(saved.net)}


def _agree(folder: Path, wanted: dict[str, Any]) -> None:
    """Note what the parts in a folder answer, or compare with what is noted there.

    Raises:
        UserError: if other shards answer something else.
    """
    file = folder / SHARDS_JSON
    wanted = {**wanted, "part_images": PART_IMAGES}
    try:
        noted = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        write_text_atomic(file, json_text(wanted, indent=2) + "\n")
        return
    except ValueError as error:
        raise UserError(f"{file} is no list of what its parts answer: give --out another folder.") from error
    other = [name for name, value in wanted.items() if noted.get(name) != value]
    if other:
        raise UserError(
            f"{folder} holds parts of another job (it differs in {', '.join(other)}): give --out another folder, or "
            "start every shard with the same command."
        )


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
            elif is_shards(path):
                shards = open_shards(path)
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
    return json_text(to_rows(predictions, unsure, calibrated=calibrated), indent=2) + "\n"


def to_rows(
    predictions: Sequence[Prediction], unsure: float | None = None, *, calibrated: bool = False
) -> list[dict[str, Any]]:
    """The rows of `to_json`."""
    return [
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
