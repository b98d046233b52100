"""Datasets that come as a table, one row per image: a CSV manifest, or a Hugging Face dataset.

- A **manifest** is a CSV file with the columns ``path`` and ``label``, and ``split`` and ``group`` if wanted. Relative
  paths start at the CSV's folder; errors name the line. Links are followed and files are opened by `safe_open`, as in a
  folder; only files of this computer are read.
- A **Hugging Face dataset** is a folder that ``save_to_disk`` wrote (Arrow), or ``hf:NAME[:CONFIG]``, which is taken
  from the cache, or fetched where the caller allows it; ``hf:FOLDER`` reads a folder of WebDataset tars. Its images
  are decoded by `safe_open` from the stored bytes; `datasets` is imported here only. Sample ids are ``split/row``.

One image has one label: a table that gives several is refused, since nothing here learns more than one.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import yaml  # type: ignore[import-untyped]
from PIL import Image

from moevision.data.collection import (
    SPLIT_NAMES,
    SPLITS,
    Collection,
    FileCollection,
    Sample,
    check_distinct,
    check_splits,
    differ_in_case,
    readable_class_names,
)
from moevision.data.images import BadImageError, read_image, safe_open
from moevision.data.named import HF, fetching
from moevision.errors import UserError, escape_controls

# Names of a table's columns with the image (a manifest: its path) and its label; None finds them.
Columns = tuple[str | None, str | None]
_LABELS: Final = ("label", "labels", "class", "category", "fine_label", "cls")
_SEVERAL: Final = (
    "one image must have one label: multi-label data can't be learned. Keep the label that matters, or train one model "
    "per question"
)


# ---- CSV manifests


def read_table(file: Path, columns: Columns = (None, None)) -> FileCollection:
    """Read a CSV manifest: UTF-8, with a header; `columns` are those with path and label, where they aren't called so.

    A `UserError` names the line, if a row has no path, no label or several, an unknown split, or no such file.
    """
    path_column, label_column = columns[0] or "path", columns[1] or "label"
    known: dict[str, tuple[int, dict[str, str]]] = {}  # sample id -> line, row
    repeated = 0
    for line, row in _csv_rows(file, path_column, label_column):
        split, label = row.get("split", "").lower(), row[label_column]
        row["split"] = SPLIT_NAMES.get(split, split)
        sample_id = _sample_id(file.parent, row[path_column])
        first_line, first = known.setdefault(sample_id, (line, row))
        some = next(iter(known.values()))[1]
        wrong = ""
        if not row[path_column] or "://" in row[path_column] or "\0" in row[path_column]:
            wrong = f"{row[path_column]!r} is no path of a file on this computer: name one or remove the row"
        elif not label:
            wrong = "it has no label: fill it in or remove the row"
        elif "|" in label:
            wrong = f"{label!r} names several labels; {_SEVERAL}"
        elif row["split"] not in ("", *SPLITS):
            wrong = f"there is no split {split!r}: choose train, val or test, or leave it empty everywhere"
        elif first[label_column] != label:
            wrong = f"{sample_id!r} is {label!r} here and {first[label_column]!r} on line {first_line}; {_SEVERAL}"
        elif first["split"] != row["split"]:
            wrong = f"{sample_id!r} is in another split on line {first_line}: remove one of them"
        elif bool(some["split"]) != bool(split):
            wrong = "some rows name a split and others don't: name it in all of them or in none"
        elif not os.path.isfile(
            file.parent / sample_id
        ):  # unlike Path.is_file no error where the path is too long
            wrong = (
                f"there is no file {file.parent / sample_id}: correct the path or remove the row"
            )
        if wrong:
            raise UserError(f"{file}, line {line}: {wrong}.")
        repeated += first_line != line
    rows = {sample_id: row for sample_id, (_, row) in known.items()}
    names = sorted({row[label_column] for row in rows.values()})
    check_distinct(names)
    check_distinct(rows)
    number = {name: place for place, name in enumerate(names)}
    given: dict[str, list[Sample]] = {}
    for sample_id, row in rows.items():
        given.setdefault(row["split"] or "all", []).append(
            Sample(sample_id, number[row[label_column]])
        )
    if not given:
        raise UserError(f"{file} lists no image: add a row for each, with its path and label.")
    check_splits(given, names, str(file))
    others = sorted(some.keys() - {path_column, label_column, "split"})
    values = {name: {sample_id: row[name] for sample_id, row in rows.items()} for name in others}
    notes = (
        [f"{repeated} rows of {file} were left out: they repeat an earlier one"] if repeated else []
    )
    notes += differ_in_case(names)
    notes += [
        f"the column {name!r} of {file} says train, val or test and was not used: call it split to use it"
        for name, cells in values.items()
        if "all" in given and {cell.lower() for cell in cells.values()} <= SPLIT_NAMES.keys()
    ]
    return FileCollection(
        readable_class_names(names),
        given,
        notes,
        next(
            (name for name in others if name.lower() == "group" and any(values[name].values())),
            None,
        ),
        values,
        root=file.parent,
    )


def _csv_rows(file: Path, path: str, label: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells by column of every row that isn't empty; spaces around cells don't count."""
    # Not pandas: it moves the columns of a row that is too long, and can't hold names that are no UTF-8.
    # As Python reads file names: bytes that are no UTF-8 become lone surrogates. -sig: Excel writes a byte order mark.
    with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as handle:
        reader = csv.reader(handle)
        try:
            head = [cell.strip() for cell in next(reader, [])]
            head = ["split" if cell.lower() == "split" else cell for cell in head]
            if not {path, label} <= set(head) or len(set(head)) < len(head):
                raise UserError(
                    f"{file} has the columns {', '.join(map(repr, head)) or 'none'}: its first line must name path and "
                    "label once each (and split, group, if there are any), with commas between them; "
                    "--data.image_column and --data.label_column take other names."
                )
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) != len(head):
                    raise UserError(
                        f"{file}, line {reader.line_num}: it has {len(cells)} cells and the first line {len(head)}: "
                        "put quotes around a cell with a comma in it."
                    )
                yield reader.line_num, dict(zip(head, map(str.strip, cells), strict=True))
        except csv.Error as error:
            raise UserError(
                f"{file}, line {reader.line_num}: it can't be read as CSV ({error})."
            ) from error


def _sample_id(folder: Path, cell: str) -> str:
    """The path relative to the CSV's folder, with forward slashes; absolute where it leads elsewhere."""
    path = os.path.normpath(cell)
    if os.path.isabs(path) and Path(path).is_relative_to(folder.absolute()):
        path = os.path.relpath(path, folder.absolute())
    return path.replace(os.sep, "/")


# ---- Hugging Face datasets


@dataclass
class ArrowCollection(Collection):
    """Rows of Hugging Face datasets; sample ids are ``split/row``; images aren't decoded there: {"bytes", "path"}."""

    tables: dict[str, Any] = field(default_factory=dict)
    image_column: str = "image"

    @cached_property
    def _pixels(self) -> dict[str, Any]:
        """The images alone: reading a row decodes all of its columns."""
        return {
            split: table.select_columns([self.image_column]) for split, table in self.tables.items()
        }

    def _stored(self, sample: Sample) -> bytes | str:
        split, row = sample.sample_id.rsplit("/", 1)
        stored = self._pixels[split][int(row)][self.image_column] or {}
        return stored.get("bytes") or str(stored.get("path") or "")

    def open(self, sample: Sample, short_side: int | None = None) -> Image.Image:
        """Decode the stored bytes, or the file that the row names, through `safe_open`."""
        stored = self._stored(sample)
        if isinstance(stored, bytes):
            return safe_open(io.BytesIO(stored), short_side)
        if not os.path.isabs(stored):  # empty, an address, or a member of an archive
            raise BadImageError(
                sample.sample_id, f"the dataset has no image there, only the path {stored!r}"
            )
        return safe_open(stored, short_side)

    @cached_property
    def _sizes(self) -> dict[str, list[int]]:
        """Bytes per row of each split; read in batches, since a row by itself takes 0.1 ms."""
        sizes: dict[str, list[int]] = {split: [] for split in self.tables}
        for split, table in self._pixels.items():
            for batch in table.with_format("arrow").iter(batch_size=1000):
                for image in batch[self.image_column]:
                    stored, path = image["bytes"], str(image["path"])
                    named = (
                        0 if stored.is_valid or not os.path.isfile(path) else os.path.getsize(path)
                    )
                    sizes[split].append(len(stored.as_buffer()) if stored.is_valid else named)
        return sizes

    def size_bytes(self, sample: Sample) -> int:
        """Number of stored bytes, or of the file that the row names; 0 where there is none."""
        split, row = sample.sample_id.rsplit("/", 1)
        return self._sizes[split][int(row)]

    def stored(self, sample: Sample) -> bytes:
        """The stored bytes, or the file that the row names."""
        stored = self._stored(sample)
        return stored if isinstance(stored, bytes) else read_image(stored)

    def column(self, name: str) -> Mapping[str, str] | None:
        """The values of a column by sample id; none and NaN are empty, as in a CSV."""
        found: dict[str, str] = {}
        for split, table in self.tables.items():
            if name not in table.column_names or name == self.image_column:
                return None
            for row, value in enumerate(table[name][:]):
                unknown = value is None or value != value  # NaN alone differs from itself
                found[f"{split}/{row:06d}"] = "" if unknown else str(value)
        return found


def read_dataset(
    path: str, columns: Columns = (None, None), *, download: bool = False
) -> ArrowCollection:
    """Read a Hugging Face dataset: a folder that ``save_to_disk`` wrote, or ``hf:NAME[:CONFIG]``.

    `columns` are those with image and label, where they can't be found out; `download` fetches what isn't in the cache.
    """
    given, notes = _by_split(_load(path, download), path)
    first = next(iter(given.values()))
    image, label = _find_columns(first.features, columns, path)
    values = {split: list(table[label][:]) for split, table in given.items()}
    names, index = _classes(first.features[label], values, f"the column {label!r} of {path}")
    samples = {}
    for split, found in values.items():
        samples[split] = [
            Sample(f"{split}/{row:06d}", index[v]) for row, v in enumerate(found) if v in index
        ]
        if missing := len(found) - len(samples[split]):
            notes.append(
                f"{missing} of {len(found)} {split} images of {path} have no label and were left out"
            )
    samples = {split: found for split, found in samples.items() if found}
    check_splits(samples, names, path)
    notes += differ_in_case(names)
    tables = {
        split: table.cast_column(image, _datasets().Image(decode=False))
        for split, table in given.items()
    }
    return ArrowCollection(
        list(map(escape_controls, names)), samples, notes, tables=tables, image_column=image
    )


def count_rows(path: str) -> int:
    """Images of a Hugging Face dataset that is on this computer; raises UserError as `read_dataset`."""
    return sum(map(len, _by_split(_load(path, download=False), path)[0].values()))


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "A Hugging Face dataset needs the package datasets: pip install datasets."
        ) from error
    return datasets


def _load(path: str, download: bool) -> Any:
    """A dataset, or a dict of datasets by split; kept to this computer unless it may fetch."""
    datasets = _datasets()
    name, config = path.removeprefix(HF), ""
    if not os.path.exists(name):  # hf:C:\tars has a colon too
        name, _, config = name.partition(":")
    offline = datasets.config.HF_HUB_OFFLINE  # what the environment forbids stays forbidden
    datasets.config.HF_HUB_OFFLINE = offline or not download
    try:
        if path.startswith(HF):
            if not download and os.path.isdir(name):
                _refuse_addresses(Path(name), path)
            return datasets.load_dataset(name, config or None)
        # A format that was saved with it would give rows of another kind, or fewer columns.
        return datasets.load_from_disk(str(Path(path).expanduser())).with_format(None)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # damaged files fail in every type, and so do names, networks and configurations
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if not path.startswith(HF):
            raise UserError(
                f"{path} can't be read as a saved dataset ({why}): save it anew."
            ) from error
        hint = "check the name" if download else f"fetch it by {fetching(path)}"
        raise UserError(
            f"The dataset {name} can't be loaded from the Hugging Face hub's cache ({why}): {hint}; a configuration "
            f"goes behind the name, {HF}{name}:CONFIG."
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _refuse_addresses(folder: Path, path: str) -> None:
    """Raise a UserError if a folder says that its images are elsewhere, as the `configs` of a dataset's card may."""
    from huggingface_hub import DatasetCard

    card, more = folder / "README.md", folder / ".huggingface.yaml"
    described = DatasetCard.load(card).data.to_dict() if card.is_file() else {}
    if more.is_file():
        described |= yaml.safe_load(more.read_text(encoding="utf-8")) or {}
    configs = str(described.get("configs"))
    if "://" in configs or "::" in configs:
        raise UserError(
            f"{folder} names files at other addresses: if you trust it, fetch them by {fetching(path)}."
        )


def _by_split(loaded: Any, path: str) -> tuple[dict[str, Any], list[str]]:
    """Dataset by train, val and test, or all under "all"; and what was left out."""
    if not isinstance(loaded, dict):
        return {"all": loaded}, []
    known = {name: SPLIT_NAMES.get(name.lower()) for name in loaded}
    found = {split: loaded[name] for name, split in known.items() if split}
    if len(loaded) == 1:
        return {"all": next(iter(loaded.values()))}, []
    if len(found) < sum(split is not None for split in known.values()) or "train" not in found:
        raise UserError(
            f"{path} has the splits {', '.join(map(repr, loaded))}: it must have train, and validation or test once "
            "each at most. Save it so with datasets, or save one split."
        )
    left = [repr(name) for name, split in known.items() if split is None]
    notes = [f"{path} has the splits {', '.join(left)} too, which were left out"] if left else []
    return {split: found[split] for split in SPLITS if split in found}, notes


def _find_columns(features: Mapping[str, Any], columns: Columns, path: str) -> tuple[str, str]:
    """The columns with image and label: as named, or the only ones of their kind."""
    datasets = _datasets()
    kinds = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [
        name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)
    ]
    labels = labels or [name for name in _LABELS if name in features][:1]
    lists = [
        name
        for name, each in features.items()
        if isinstance(getattr(each, "feature", None), datasets.ClassLabel)
    ]
    labels = labels or lists  # refused below
    for what, named, found in (("image", columns[0], images), ("label", columns[1], labels)):
        if (named is not None and named not in features) or (named is None and len(found) != 1):
            raise UserError(
                f"{path} has the columns {kinds}: name the one with the {what}, --data.{what}_column NAME"
                + (f" (there is no {named!r})." if named is not None else ".")
            )
    image, label = columns[0] or images[0], columns[1] or labels[0]
    if image not in images:
        raise UserError(
            f"The column {image!r} of {path} holds no images but {type(features[image]).__name__}."
        )
    feature = features[label]
    if isinstance(feature, datasets.ClassLabel):
        return image, label
    if not isinstance(feature, datasets.Value):
        raise UserError(
            f"The column {label!r} of {path} holds several values per image; {_SEVERAL}."
        )
    if "float" in feature.dtype or "double" in feature.dtype:
        raise UserError(
            f"The column {label!r} of {path} holds measures, and a classifier needs classes."
        )
    return image, label


def _classes(
    feature: Any, values: Mapping[str, Sequence[Any]], where: str
) -> tuple[list[str], dict[Any, int]]:
    """Class names, and the label of every value; none for None, "" and for -1, which stands for a hidden label."""
    used = {value for found in values.values() for value in found} - {None, ""}
    names: list[str] | None = getattr(feature, "names", None)
    if names is not None:
        used = {value for value in used if 0 <= value < len(names)}
    order = sorted(used)
    words = [names[value] if names is not None else str(value) for value in order]
    several = [word for word in words if "|" in word]
    if several and names is None:
        raise UserError(f"{several[0]!r} in {where} names several labels; {_SEVERAL}.")
    check_distinct(words)
    return words, {value: label for label, value in enumerate(order)}
