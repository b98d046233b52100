"""``splits.csv``: the split of a run, written into its folder and read from there when the run goes on."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from moevision.data.sources import SPLITS, Collection, Sample
from moevision.data.splits import Splits, split_origins
from moevision.errors import UserError
from moevision.files import write_text_atomic
from moevision.names import csv_name

_UNUSED = "unused"  # known, and in no split


def write_splits(path: Path, splits: Splits, class_names: Sequence[str]) -> None:
    """Write ``splits.csv`` (columns split, class, path) whole or not at all; names as `csv_name` has them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["split", "class", "path"])
    for split, samples in {**splits.samples, _UNUSED: splits.unused}.items():
        writer.writerows([split, *map(csv_name, (class_names[sample.label], sample.sample_id))] for sample in samples)
    write_text_atomic(path, text.getvalue())


def read_splits(path: Path, collection: Collection) -> tuple[Splits, list[str]]:
    """Take the split from ``splits.csv``; files that came or went since are left out, with a warning.

    Args:
        path: the file written by `write_splits`.
        collection: the pictures as they are now.

    Returns:
        The splits, and the class names of the file (labels are renumbered to them).

    Raises:
        UserError: if the file isn't such a list, or a class of it has vanished.
    """
    with path.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    if not rows or set(rows[0]) != {"split", "class", "path"} or {row["split"] for row in rows} - {*SPLITS, _UNUSED}:
        raise UserError(f"{path} is not a list of split,class,path: delete it to draw a new split")
    # By the written names: a sample id may hold what no CSV file can. Older files hold names as they are.
    rows = [{name: csv_name(row[name] or "") for name in ("split", "class", "path")} for row in rows]
    current = {csv_name(sample.sample_id): sample.sample_id for part in collection.given.values() for sample in part}
    listed = {row["class"] for row in rows}
    class_names = [name for name in collection.class_names if csv_name(name) in listed]
    label_of = {csv_name(name): label for label, name in enumerate(class_names)}
    samples: dict[str, list[Sample]] = {split: [] for split in SPLITS if any(row["split"] == split for row in rows)}
    unused: list[Sample] = []
    vanished = [row["path"] for row in rows if row["path"] not in current]
    for row in rows:
        if row["path"] in current and row["class"] in label_of:
            samples.get(row["split"], unused).append(Sample(current[row["path"]], label_of[row["class"]]))
    for split, members in samples.items():
        lost = sorted(listed - {csv_name(class_names[sample.label]) for sample in members})
        if lost:
            raise UserError(
                f"{path} lists {split} images of the class {lost[0]!r} that are no longer there: bring them "
                "back, or use another run folder to draw a new split"
            )
    warnings = []
    appeared = current.keys() - {row["path"] for row in rows}
    for paths, what in (
        (vanished, f"listed in {path} have vanished"),
        (sorted(appeared), f"came after {path} was written and are left out"),
    ):
        if paths:
            warnings.append(f"{len(paths)} images {what} (for example {paths[0]})")
    notes = {split: f"{origin} (as listed in {path.name})" for split, origin in split_origins(collection.given).items()}
    return Splits(samples, notes, warnings, unused), class_names
