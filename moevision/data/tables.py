"""Datasets that come as a table, one row per image: a CSV manifest, or a Hugging Face dataset.

- A **manifest** is a CSV file with the columns ``path`` and ``label``, and optionally ``split`` and ``group``. Relative
  paths start at the CSV's folder; errors name the line. Links are followed and files are opened by `safe_open`, as in a
  folder; only files of this computer are read.
- A **Hugging Face dataset** is a folder that ``save_to_disk`` wrote (Arrow), or ``hf:NAME[:CONFIG]``, which is taken
  from the cache, or downloaded if the caller allows it; ``hf:FOLDER`` reads a folder of WebDataset tars. Its images
  are decoded by `safe_open` from the stored bytes; `datasets` is imported here only. Sample ids are ``split/row``.

In a manifest the label may be several, `cat|outdoor`; as soon as one image has two, each is learned by itself
(multi-label). Spaces around a label and repeats of it are removed, empty ones refused. An image must have a label: one
with nothing of all that is asked for has a label that says so, such as `none`.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from PIL import Image

from moevision.data.collection import (
    SPLIT_NAMES,
    SPLITS,
    Collection,
    FileCollection,
    Sample,
    SplitSamples,
    check_distinct,
    check_splits,
    differ_in_case,
    readable_class_names,
)
from moevision.data.folder import HF, fetching
from moevision.data.images import BadImageError, read_image, safe_open
from moevision.errors import UserError, escape_controls
from moevision.types import Json

# Names of the columns with the image (in a manifest: its path) and the label; None: found automatically.
Columns = tuple[str | None, str | None]
_LABELS = ("label", "labels", "class", "category", "fine_label", "cls")
_ONE_LABEL = (
    "multi-label data are read from a CSV, with one row for an image and | between its labels (cat|outdoor): write "
    "one, keep the label that matters, or train one model per question"
)


# ---- CSV manifests


@dataclass(frozen=True)
class ManifestRow:
    """One row of a manifest."""

    line: int  # line number in the file
    sample_id: str
    path: str  # as written in the file
    label: tuple[str, ...]  # names of the classes
    split: str  # train, val or test; empty if the file gives no splits
    cells: dict[str, str]  # by column


def read_table(file: Path, columns: Columns = (None, None)) -> FileCollection:
    """Read a CSV manifest: UTF-8, with a header.

    `columns` are the names of the columns with path and label (None: ``path`` and ``label``). A row without a path,
    with no label or several, an unknown split or a missing file is a `UserError`, which names the line.
    """
    path_column = columns[0] or "path"
    label_column = columns[1] or "label"
    rows: dict[str, ManifestRow] = {}  # the first row of each sample id
    num_repeated = 0
    for line, cells in _csv_rows(file, path_column, label_column):
        split = cells.get("split", "").lower()
        row = ManifestRow(
            line=line,
            sample_id=_sample_id(file.parent, cells[path_column]),
            path=cells[path_column],
            label=tuple(dict.fromkeys(map(str.strip, cells[label_column].split("|")))),
            split=SPLIT_NAMES.get(split, split),
            cells=cells,
        )
        first_of_image = rows.setdefault(row.sample_id, row)
        first_of_file = next(iter(rows.values()))
        problem = _row_problem(row, first_of_image, bool(first_of_file.split), file.parent)
        if problem:
            raise UserError(f"{file}, line {line}: {problem}.")
        num_repeated += first_of_image is not row

    if not rows:
        raise UserError(f"{file} lists no image: add a row for each, with its path and label.")
    other_columns = first_of_file.cells.keys() - {path_column, label_column, "split"}
    collection = _manifest_collection(file, rows, sorted(other_columns))
    if num_repeated:
        note = f"{num_repeated} rows of {file} were left out: they repeat an earlier one"
        collection.notes.insert(0, note)
    return collection


def _row_problem(row: ManifestRow, first: ManifestRow, has_splits: bool, folder: Path) -> str:
    """What is wrong with a row, or an empty string; `first` is the first row with the same image."""
    file = folder / row.sample_id
    if not row.path or "://" in row.path or "\0" in row.path:
        return f"{row.path!r} is no path of a file on this computer: name one or remove the row"
    if row.label == ("",):
        return "it has no label: fill it in or remove the row"
    if "" in row.label:
        return "a label before or behind | is empty: write labels as in cat|outdoor"
    if row.split not in ("", *SPLITS):
        return f"there is no split {row.split!r}: choose train, val or test, or leave it empty everywhere"
    if set(row.label) != set(first.label):
        here, there = ("|".join(labels)[:60] for labels in (row.label, first.label))
        return (
            f"{row.sample_id!r} is {here!r} here and {there!r} on line {first.line}; {_ONE_LABEL}"
        )
    if row.split != first.split:
        return f"{row.sample_id!r} is in another split on line {first.line}: remove one of them"
    if bool(row.split) != has_splits:
        return "some rows name a split and others don't: name it in all of them or in none"
    # Unlike Path.is_file, this raises no error if the path is too long.
    if not os.path.isfile(file):
        return f"there is no file {file}: correct the path or remove the row"
    return ""


def _manifest_collection(
    file: Path, rows: dict[str, ManifestRow], columns: list[str]
) -> FileCollection:
    """The images of a manifest, and the values of its other `columns`."""
    counts = Counter(chain.from_iterable(row.label for row in rows.values()))
    class_names = sorted(counts)
    check_distinct(class_names)
    check_distinct(rows)
    label_of = {name: label for label, name in enumerate(class_names)}
    multilabel = any(len(row.label) > 1 for row in rows.values())
    samples: SplitSamples = {}
    for sample_id, row in rows.items():
        labels = tuple(sorted(label_of[name] for name in row.label))
        sample = Sample(sample_id, labels[0])
        if multilabel:
            rarest = min(labels, key=lambda label: counts[class_names[label]])
            sample = Sample(sample_id, rarest, labels)
        samples.setdefault(row.split or "all", []).append(sample)
    check_splits(samples, class_names, str(file))

    values: dict[str, dict[str, str]] = {}
    notes = differ_in_case(class_names)
    group_column = None
    for column in columns:
        values[column] = {sample_id: row.cells[column] for sample_id, row in rows.items()}
        distinct = {value.lower() for value in values[column].values()}
        if "all" in samples and distinct <= SPLIT_NAMES.keys():
            notes.append(
                f"the column {column!r} of {file} says train, val or test and was not used: call it split to use it"
            )
        if column.lower() == "group" and distinct != {""} and group_column is None:
            group_column = column
    return FileCollection(
        readable_class_names(class_names),
        samples,
        notes,
        group_column=group_column,
        columns=values,
        root=file.parent,
    )


def _csv_rows(
    file: Path, path_column: str, label_column: str
) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number, and cells by column, of every row that isn't empty; spaces around cells are removed."""
    # Not pandas: it shifts the columns of a row with too many cells, and can't hold names that aren't valid UTF-8.
    # surrogateescape: Python reads file names in this way, too. utf-8-sig: Excel writes a byte order mark.
    with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as handle:
        reader = csv.reader(handle)
        try:
            head = [cell.strip() for cell in next(reader, [])]
            head = ["split" if cell.lower() == "split" else cell for cell in head]
            if not {path_column, label_column} <= set(head) or len(set(head)) < len(head):
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
    """The path relative to the CSV's folder, with forward slashes; absolute paths outside of it stay absolute."""
    path = os.path.normpath(cell)
    if os.path.isabs(path) and Path(path).is_relative_to(folder.absolute()):
        path = os.path.relpath(path, folder.absolute())
    return path.replace(os.sep, "/")


# ---- Hugging Face datasets


@dataclass
class ArrowCollection(Collection):
    """Images of Hugging Face datasets; sample ids are ``split/row``."""

    # Split -> dataset, whose images are not decoded: each is a dict with "bytes" and "path".
    tables: dict[str, Any] = field(default_factory=dict)
    image_column: str = "image"

    @cached_property
    def _image_tables(self) -> dict[str, Any]:
        """The tables with the column of images alone, since reading a row decodes all of its columns."""
        return {
            split: table.select_columns([self.image_column]) for split, table in self.tables.items()
        }

    def _bytes_or_path(self, sample: Sample) -> bytes | str:
        split, row = sample.sample_id.rsplit("/", 1)
        image = self._image_tables[split][int(row)][self.image_column] or {}
        return image.get("bytes") or str(image.get("path") or "")

    def open(self, sample: Sample, short_side: int | None = None) -> Image.Image:
        """Decode the stored bytes, or the file that the row names, through `safe_open`."""
        source = self._bytes_or_path(sample)
        if isinstance(source, bytes):
            return safe_open(io.BytesIO(source), short_side)
        if not os.path.isabs(source):  # an empty path, a URL, or a member of an archive
            raise BadImageError(
                sample.sample_id, f"the dataset has no image there, only the path {source!r}"
            )
        return safe_open(source, short_side)

    @cached_property
    def _sizes(self) -> dict[str, list[int]]:
        """Split -> size of each row's image in bytes; read in batches, since single rows take 0.1 ms each."""
        sizes: dict[str, list[int]] = {split: [] for split in self.tables}
        for split, table in self._image_tables.items():
            for batch in table.with_format("arrow").iter(batch_size=1000):
                sizes[split] += map(_size_of_image, batch[self.image_column])
        return sizes

    def size_bytes(self, sample: Sample) -> int:
        """Number of stored bytes, or size of the file that the row names; 0 if there is neither."""
        split, row = sample.sample_id.rsplit("/", 1)
        return self._sizes[split][int(row)]

    def stored(self, sample: Sample) -> bytes:
        """The stored bytes, or the content of the file that the row names."""
        source = self._bytes_or_path(sample)
        return source if isinstance(source, bytes) else read_image(source)

    def column(self, name: str) -> Mapping[str, str] | None:
        """The values of a column by sample id; None and NaN become empty strings, as in a CSV."""
        values: dict[str, str] = {}
        for split, table in self.tables.items():
            if name not in table.column_names or name == self.image_column:
                return None
            for row, value in enumerate(table[name][:]):
                is_unknown = value is None or value != value  # NaN alone differs from itself
                values[f"{split}/{row:06d}"] = "" if is_unknown else str(value)
        return values


def _size_of_image(image: Any) -> int:
    """Size in bytes of an Arrow value {bytes, path}, or of the file that it names."""
    stored = image["bytes"]
    path = str(image["path"])
    if stored.is_valid:
        return len(stored.as_buffer())
    return os.path.getsize(path) if os.path.isfile(path) else 0


def read_dataset(
    path: str, columns: Columns = (None, None), *, download: bool = False
) -> ArrowCollection:
    """Read a Hugging Face dataset: a folder that ``save_to_disk`` wrote, or ``hf:NAME[:CONFIG]``.

    `columns` are the names of the columns with image and label (None: found by type or name). With `download` a dataset
    that isn't in the cache is downloaded.
    """
    tables, notes = _by_split(_load(path, download), path)
    features = next(iter(tables.values())).features
    image_column, label_column = _find_columns(features, columns, path)
    values = {split: list(table[label_column][:]) for split, table in tables.items()}
    class_names, label_of = _classes(
        features[label_column], values, f"the column {label_column!r} of {path}"
    )

    samples: SplitSamples = {}
    for split, split_values in values.items():
        labelled = [
            Sample(f"{split}/{row:06d}", label_of[value])
            for row, value in enumerate(split_values)
            if value in label_of
        ]
        if labelled:
            samples[split] = labelled
        count = len(split_values)
        missing = count - len(labelled)
        if missing:
            notes.append(
                f"{missing} of {count} {split} images of {path} have no label and were left out"
            )
    check_splits(samples, class_names, path)
    notes += differ_in_case(class_names)

    undecoded = _datasets().Image(decode=False)
    return ArrowCollection(
        list(map(escape_controls, class_names)),
        samples,
        notes,
        tables={
            split: table.cast_column(image_column, undecoded) for split, table in tables.items()
        },
        image_column=image_column,
    )


def count_rows(path: str) -> int:
    """Number of images of a Hugging Face dataset on this computer; raises the UserErrors of `read_dataset`."""
    tables, _ = _by_split(_load(path, download=False), path)
    return sum(map(len, tables.values()))


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "A Hugging Face dataset needs the package datasets: pip install datasets."
        ) from error
    return datasets


def _load(path: str, download: bool) -> Any:
    """A dataset, or a dict of datasets by split; nothing is downloaded unless `download` allows it."""
    datasets = _datasets()
    name = path.removeprefix(HF)
    config = ""
    if not os.path.exists(name):  # an existing path may have a colon too: hf:C:\tars
        name, _, config = name.partition(":")

    # If the environment forbids downloads, `download` doesn't change that.
    was_offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = was_offline or not download
    try:
        if path.startswith(HF):
            if not download and os.path.isdir(name):
                _refuse_addresses(Path(name), path)
            return datasets.load_dataset(name, config or None)
        # Reset the format that was saved with the dataset: it may hide columns or change the type of the values.
        return datasets.load_from_disk(str(Path(path).expanduser())).with_format(None)
    except UserError:
        raise
    except Exception as error:  # damaged files, wrong names and networks raise errors of many types
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if not path.startswith(HF):
            raise UserError(
                f"{path} can't be read as a saved dataset ({reason}): save it anew."
            ) from error
        hint = "check the name" if download else f"fetch it by {fetching(path)}"
        raise UserError(
            f"The dataset {name} can't be loaded from the Hugging Face hub's cache ({reason}): {hint}; a configuration "
            f"goes behind the name, {HF}{name}:CONFIG."
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline


def _refuse_addresses(folder: Path, path: str) -> None:
    """Raise a UserError if a dataset folder's `configs`, in its card or settings, name files at remote addresses."""
    from huggingface_hub import DatasetCard

    card = folder / "README.md"
    settings_file = folder / ".huggingface.yaml"
    settings: Json = {}
    if card.is_file():
        settings |= DatasetCard.load(card).data.to_dict()
    if settings_file.is_file():
        settings |= yaml.safe_load(settings_file.read_text(encoding="utf-8")) or {}
    configs = str(settings.get("configs"))
    if "://" in configs or "::" in configs:
        raise UserError(
            f"{folder} names files at other addresses: if you trust it, fetch them by {fetching(path)}."
        )


def _by_split(loaded: Any, path: str) -> tuple[dict[str, Any], list[str]]:
    """Split (train, val, test) -> dataset, or {"all": dataset} for a single one; and notes on splits left out."""
    if not isinstance(loaded, dict):
        return {"all": loaded}, []
    if len(loaded) == 1:
        return {"all": next(iter(loaded.values()))}, []

    # Our name of each split -> the dataset's name; None stands for names that mean no split here.
    names = {SPLIT_NAMES.get(name.lower()): name for name in loaded}
    others = [repr(name) for name in loaded if name.lower() not in SPLIT_NAMES]
    num_known = len(loaded) - len(others)
    has_duplicates = num_known > len(names.keys() - {None})  # such as "val" and "validation"
    if has_duplicates or "train" not in names:
        raise UserError(
            f"{path} has the splits {', '.join(map(repr, loaded))}: it must have train, and validation or test once "
            "each at most. Save it so with datasets, or save one split."
        )
    notes = []
    if others:
        notes.append(f"{path} has the splits {', '.join(others)} too, which were left out")
    return {split: loaded[names[split]] for split in SPLITS if split in names}, notes


def _find_columns(features: Mapping[str, Any], columns: Columns, path: str) -> tuple[str, str]:
    """The names of the columns with image and label: those in `columns`, or the only ones of the right type."""
    datasets = _datasets()
    images, labels, label_lists = [], [], []
    for name, feature in features.items():
        if isinstance(feature, datasets.Image):
            images.append(name)
        if isinstance(feature, datasets.ClassLabel):
            labels.append(name)
        if isinstance(getattr(feature, "feature", None), datasets.ClassLabel):
            label_lists.append(name)
    usual = [name for name in _LABELS if name in features]
    # A column of lists is refused below, with a message that says why.
    labels = labels or usual[:1] or label_lists

    image = _choose_column("image", columns[0], images, features, path)
    label = _choose_column("label", columns[1], labels, features, path)
    if image not in images:
        kind = type(features[image]).__name__
        raise UserError(f"The column {image!r} of {path} holds no images but {kind}.")
    feature = features[label]
    if isinstance(feature, datasets.ClassLabel):
        return image, label
    if not isinstance(feature, datasets.Value):
        raise UserError(
            f"The column {label!r} of {path} holds several values per image; {_ONE_LABEL}."
        )
    if "float" in feature.dtype or "double" in feature.dtype:
        raise UserError(
            f"The column {label!r} of {path} holds measures, and a classifier needs classes."
        )
    return image, label


def _choose_column(
    kind: str, name: str | None, candidates: list[str], features: Mapping[str, Any], path: str
) -> str:
    """The column called `name`, or the only candidate if no name is given."""
    if name is not None and name in features:
        return name
    if name is None and len(candidates) == 1:
        return candidates[0]
    types = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
    hint = "" if name is None else f" (there is no {name!r})"
    raise UserError(
        f"{path} has the columns {types}: name the one with the {kind}, --data.{kind}_column NAME{hint}."
    )


def _classes(
    feature: Any, values: Mapping[str, Sequence[Any]], where: str
) -> tuple[list[str], dict[Any, int]]:
    """Class names, and value of the column -> label.

    None, "" and, in a column of `ClassLabel`, -1 have no label: datasets have -1 where the label is kept secret.
    """
    distinct = set(chain.from_iterable(values.values())) - {None, ""}
    names: list[str] | None = getattr(feature, "names", None)
    if names is not None:
        class_values = sorted(value for value in distinct if 0 <= value < len(names))
        class_names = [names[value] for value in class_values]
    else:
        class_values = sorted(distinct)
        class_names = list(map(str, class_values))
        for name in class_names:
            if "|" in name:
                raise UserError(f"{name!r} in {where} names several labels; {_ONE_LABEL}.")
    check_distinct(class_names)
    return class_names, {value: label for label, value in enumerate(class_values)}
