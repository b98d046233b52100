"""Datasets that come as a table, one row per image: a CSV manifest, or a Hugging Face dataset.

- A **manifest** is a CSV file with the columns ``path`` and ``label``, and ``split`` and ``group`` if wanted. Relative
  paths start at the CSV's folder; errors name the line. Links are followed and files are opened by `safe_open`, as in a
  folder; only files of this computer are read.
- A **Hugging Face dataset** is a folder that ``save_to_disk`` wrote (Arrow), or ``hf:NAME[:CONFIG]``, which is taken
  from the cache, or fetched where the caller allows it. Its images are decoded by `safe_open` from the stored bytes;
  the package `datasets` is imported here only, and reads tables but no images. Sample ids are ``split/row``.

One image has one label: a table that gives several is refused, since nothing here learns more than one.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

from PIL import Image

from moevision.data.images import BadImageError, read_image, safe_open
from moevision.data.sources import (
    SPLIT_NAMES,
    SPLITS,
    Collection,
    FileCollection,
    Sample,
    access_advice,
    check_distinct,
    check_same_classes,
    fetching,
    words_of,
)
from moevision.errors import UserError
from moevision.names import shown

HF: Final = "hf:"
UNKNOWN_COUNT: Final = 10_000
"""Images that a dataset is taken to have before it is fetched."""
_LABELS: Final = ("label", "labels", "class", "category", "fine_label")
_ARROW: Final = ("dataset_dict.json", "state.json")
_SEVERAL = (
    "one image must have one label: multi-label data can't be learned. Keep the label that matters, or train one model "
    "per question"
)


class Columns(NamedTuple):
    """Names of a table's columns with the image (a manifest: its path) and its label; None finds them."""

    image: str | None = None
    label: str | None = None


def is_manifest(path: Path) -> bool:
    """Whether it is a CSV file."""
    return path.suffix.lower() == ".csv" and os.path.isfile(path)


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets` saved this folder."""
    with access_advice(path):
        return any((path / name).is_file() for name in _ARROW)


def count_rows(path: str) -> int | None:
    """Images of a table; `UNKNOWN_COUNT` of one that can't be read (yet); None if ``path`` is no table."""
    place = Path(path).expanduser()
    if is_manifest(place):
        with place.open("rb") as file:
            return max(0, sum(1 for _ in file) - 1)
    if not path.startswith(HF) and not is_saved_dataset(place):
        return None
    try:
        return sum(map(len, _by_split(_load(path, download=False), path)[0].values()))
    except UserError:
        return UNKNOWN_COUNT


# ---- CSV manifests


@dataclass
class Manifest(FileCollection):
    """The files that a CSV lists; ``columns`` holds its other columns, name -> sample id -> value."""

    columns: dict[str, dict[str, str]] = field(default_factory=dict)

    def column(self, name: str) -> Mapping[str, str] | None:
        """The values of a column by sample id."""
        return self.columns.get(name)

    def column_names(self) -> Iterable[str]:
        """The other columns of the CSV."""
        return self.columns


def read_manifest(file: Path, columns: Columns = Columns()) -> Manifest:  # noqa: B008 (never changed)
    """Read a CSV manifest.

    Args:
        file: the CSV, UTF-8, with a header.
        columns: the columns with path and label, where they aren't called so.

    Raises:
        UserError: with the line, if a row has no path, no label or several, an unknown split, or no such file.
    """
    path_column, label_column = columns.image or "path", columns.label or "label"
    known: dict[str, tuple[int, str, str]] = {}  # sample id -> line, label, split
    others: dict[str, dict[str, str]] = {}
    repeated = 0
    for line, row in _csv_rows(file, (path_column, label_column)):
        where = f"{file}, line {line}"
        sample_id = _sample_id(file.parent, row[path_column], where)
        label = _label(row[label_column], where)
        split = _split(row.get("split", ""), where)
        if sample_id in known:
            earlier = known[sample_id]
            if earlier[1] != label:
                raise UserError(
                    f"{where}: {sample_id!r} is {label!r} here and {earlier[1]!r} on line {earlier[0]}; {_SEVERAL}."
                )
            if earlier[2] != split:
                raise UserError(f"{where}: {sample_id!r} is in another split on line {earlier[0]}: remove one of them.")
            repeated += 1
            continue
        if known and bool(split) != bool(next(iter(known.values()))[2]):
            raise UserError(f"{where}: some rows name a split and others don't: name it in all of them or in none.")
        if not os.path.isfile(file.parent / sample_id):  # unlike Path.is_file no error where the path is too long
            raise UserError(f"{where}: there is no file {file.parent / sample_id}: correct the path or remove the row.")
        known[sample_id] = (line, label, split)
        for name in row.keys() - {path_column, label_column, "split"}:
            others.setdefault(name, {})[sample_id] = row[name]
    names = sorted({label for _, label, _ in known.values()})
    check_distinct(names)
    check_distinct(list(known))
    number = {name: place for place, name in enumerate(names)}
    given: dict[str, list[Sample]] = {}
    for sample_id, (_, label, split) in known.items():
        given.setdefault(split or "all", []).append(Sample(sample_id, number[label]))
    if not given:
        raise UserError(f"{file} lists no image: add a row for each, with its path and label.")
    check_splits(given, names, str(file))
    notes = [f"{repeated} rows of {file} were left out: they repeat an earlier one"] if repeated else []
    group = "group" if any(others.get("group", {}).values()) else None
    return Manifest(words_of(names), given, notes, group, file.parent, True, others)


def _csv_rows(file: Path, needed: tuple[str, str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells by column of every row that isn't empty; spaces around cells don't count."""
    # As Python reads file names: bytes that are no UTF-8 become lone surrogates. -sig: Excel writes a byte order mark.
    with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as handle:
        reader = csv.reader(handle)
        try:
            head = [cell.strip() for cell in next(reader, [])]
            missing = [name for name in needed if name not in head]
            if missing or len(set(head)) < len(head):
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
            raise UserError(f"{file}, line {reader.line_num}: it can't be read as CSV ({error}).") from error


def _sample_id(folder: Path, cell: str, where: str) -> str:
    """The path relative to the CSV's folder, with forward slashes; absolute where it leads elsewhere."""
    if not cell:
        raise UserError(f"{where}: it has no path: fill it in or remove the row.")
    if "://" in cell or "\0" in cell:
        raise UserError(f"{where}: {cell!r} is no path of a file on this computer: fetch it and name the file.")
    path = os.path.normpath(cell)
    if os.path.isabs(path):
        inside = Path(path).is_relative_to(folder.absolute())
        path = os.path.relpath(path, folder.absolute()) if inside else path
    return path.replace(os.sep, "/")


def _label(cell: str, where: str) -> str:
    if not cell:
        raise UserError(f"{where}: it has no label: fill it in or remove the row.")
    if "|" in cell:
        raise UserError(f"{where}: {cell!r} names several labels; {_SEVERAL}.")
    return cell


def _split(cell: str, where: str) -> str:
    if cell and cell.lower() not in SPLIT_NAMES:
        raise UserError(
            f"{where}: there is no split {cell!r}: choose train, val or test, or leave it empty everywhere."
        )
    return SPLIT_NAMES[cell.lower()] if cell else ""


def check_splits(given: Mapping[str, Sequence[Sample]], names: Sequence[str], where: str) -> None:
    """Two classes at least; a dataset that came split has a train set, and every class in every split."""
    if "all" not in given and "train" not in given:
        raise UserError(f"{where} has no train split, only {', '.join(given)}: add one, or give them as one split.")
    used = {split: {sample.label for sample in samples} for split, samples in given.items()}
    train = "train" if "train" in used else "all"
    if len(used[train]) < 2:
        raise UserError(f"{where} has {len(used[train])} classes, and a classifier needs two: add images of another.")
    found = {split: {names[label]: ["some"] for label in labels} for split, labels in used.items()}
    for split in given:
        check_same_classes(f"the {train} split of {where}", found[train], f"its {split} split", found[split])


# ---- Hugging Face datasets


@dataclass
class ArrowCollection(Collection):
    """Rows of Hugging Face datasets; sample ids are ``split/row``.

    Attributes:
        tables: split -> dataset whose images aren't decoded: {"bytes", "path"}.
        image_column: the column with the images.
    """

    tables: dict[str, Any] = field(default_factory=dict)
    image_column: str = "image"

    @cached_property
    def _pixels(self) -> dict[str, Any]:
        """The images alone: reading a row decodes all of its columns."""
        return {split: table.select_columns([self.image_column]) for split, table in self.tables.items()}

    def _stored(self, sample: Sample) -> bytes | str:
        """The bytes of an image, or the path where they would be."""
        split, row = sample.sample_id.rsplit("/", 1)
        stored = self._pixels[split][int(row)][self.image_column] or {}
        return stored.get("bytes") or str(stored.get("path") or "")

    def open(self, sample: Sample, short_side: int | None = None) -> Image.Image:
        """Decode the stored bytes, or the file that the row names, through `safe_open`."""
        stored = self._stored(sample)
        if isinstance(stored, bytes):
            return safe_open(io.BytesIO(stored), short_side)
        if not os.path.isabs(stored):  # empty, an address, or a member of an archive
            raise BadImageError(sample.sample_id, f"the dataset has no image there, only the path {stored!r}")
        return safe_open(stored, short_side)

    @cached_property
    def _sizes(self) -> dict[str, list[int]]:
        """Bytes per row of each split; read in batches, since a row by itself takes 0.1 ms."""
        return {split: list(_stored_sizes(table, self.image_column)) for split, table in self.tables.items()}

    def size_bytes(self, sample: Sample) -> int:
        """Number of stored bytes; 0 of an image that is only named."""
        split, row = sample.sample_id.rsplit("/", 1)
        return self._sizes[split][int(row)]

    def digest(self, sample: Sample) -> bytes:
        """SHA-256 of the stored bytes."""
        stored = self._stored(sample)
        return hashlib.sha256(stored if isinstance(stored, bytes) else sample.sample_id.encode()).digest()

    def stored(self, sample: Sample) -> bytes:
        """The stored bytes, or the file that the row names."""
        stored = self._stored(sample)
        return stored if isinstance(stored, bytes) else read_image(stored)

    def column_names(self) -> Iterable[str]:
        """Columns with one number, word or class per row."""
        kinds = (_datasets().Value, _datasets().ClassLabel)
        features = next(iter(self.tables.values())).features
        return [name for name, feature in features.items() if isinstance(feature, kinds)]

    def column(self, name: str) -> Mapping[str, str] | None:
        """The values of a column by sample id; none and NaN are empty, as in a CSV."""
        found: dict[str, str] = {}
        for split, table in self.tables.items():
            if name not in table.column_names or name == self.image_column:
                return None
            found |= {f"{split}/{row:06d}": _cell(value) for row, value in enumerate(table[name][:])}
        return found


def _cell(value: Any) -> str:
    return "" if value is None or value != value else str(value)  # NaN alone differs from itself


def _stored_sizes(table: Any, column: str) -> Iterator[int]:
    for batch in table.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        for image in batch[column]:
            stored = image["bytes"] if image.is_valid else None
            yield len(stored.as_buffer()) if stored is not None and stored.is_valid else 0


def read_dataset(path: str, columns: Columns = Columns(), *, download: bool = False) -> ArrowCollection:  # noqa: B008
    """Read a Hugging Face dataset.

    Args:
        path: a folder that ``save_to_disk`` wrote, or ``hf:NAME[:CONFIG]``.
        columns: the columns with image and label, where they can't be found out.
        download: fetch a dataset that isn't in the cache.

    Raises:
        UserError: if `datasets` isn't installed, the dataset isn't there, or has no such columns.
    """
    given, notes = _by_split(_load(path, download), path)
    first = next(iter(given.values()))
    image, label = _find_columns(first.features, columns, path)
    values = {split: list(table[label][:]) for split, table in given.items()}
    names, index = _classes(first.features[label], values, f"the column {label!r} of {path}")
    samples = {}
    for split, found in values.items():
        samples[split] = [Sample(f"{split}/{row:06d}", index[v]) for row, v in enumerate(found) if v in index]
        if missing := len(found) - len(samples[split]):
            notes.append(f"{missing} of {len(found)} {split} images of {path} have no label and were left out")
    samples = {split: found for split, found in samples.items() if found}
    check_splits(samples, names, path)
    tables = {split: table.cast_column(image, _datasets().Image(decode=False)) for split, table in given.items()}
    return ArrowCollection(list(map(shown, names)), samples, notes, None, tables, image)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "A Hugging Face dataset needs the package datasets: pip install 'moevision[datasets]'."
        ) from error
    return datasets


def _load(path: str, download: bool) -> Any:
    """A dataset, or a dict of datasets by split."""
    datasets = _datasets()
    if not path.startswith(HF):
        try:
            return datasets.load_from_disk(str(Path(path).expanduser()))
        except Exception as error:  # damaged files fail in every type; the cause stays attached
            raise UserError(f"{path} can't be read as a saved dataset ({_brief(error)}): save it anew.") from error
    name, _, config = path.removeprefix(HF).partition(":")
    try:
        with _network(datasets, download):
            return datasets.load_dataset(name, config or None)
    except Exception as error:  # as above: names, configurations, networks and files
        hint = "check the name" if download else f"fetch it by {fetching(path)}"
        raise UserError(
            f"The dataset {name} can't be loaded from the Hugging Face hub's cache ({_brief(error)}): {hint}; a "
            f"configuration goes behind the name, {HF}{name}:CONFIG."
        ) from error


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextmanager
def _network(datasets: Any, allowed: bool) -> Iterator[None]:
    """Keep `datasets` to its cache unless it may fetch; what the environment forbids stays forbidden."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not allowed
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


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
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = labels or [name for name in _LABELS if name in features][:1]
    labels = labels or [name for name, feature in features.items() if _holds_classes(feature)]
    for what, named, found in (("image", columns.image, images), ("label", columns.label, labels)):
        if (named is not None and named not in features) or (named is None and len(found) != 1):
            raise UserError(
                f"{path} has the columns {kinds}: name the one with the {what}, --data.{what}_column NAME"
                + (f" (there is no {named!r})." if named is not None else ".")
            )
    image, label = columns.image or images[0], columns.label or labels[0]
    if image not in images:
        raise UserError(f"The column {image!r} of {path} holds no images but {type(features[image]).__name__}.")
    feature = features[label]
    if isinstance(feature, datasets.ClassLabel):
        return image, label
    if not isinstance(feature, datasets.Value):
        raise UserError(f"The column {label!r} of {path} holds several values per image; {_SEVERAL}.")
    if "float" in feature.dtype or "double" in feature.dtype:
        raise UserError(f"The column {label!r} of {path} holds measures, and a classifier needs classes.")
    return image, label


def _holds_classes(feature: Any) -> bool:
    """Whether it is a list of classes."""
    return isinstance(getattr(feature, "feature", None), _datasets().ClassLabel)


def _classes(feature: Any, values: Mapping[str, Sequence[Any]], where: str) -> tuple[list[str], dict[Any, int]]:
    """Class names, and the label of every value; none for None and for -1, which stands for a hidden label."""
    used = {value for found in values.values() for value in found} - {None}
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
