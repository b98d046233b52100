"""What was decided about training images: the files of `--data.keep` and `--data.relabel`, and what they do to a split.

Both are CSV files with a row per image, named as in `splits.csv`. `moevision data prune` writes both columns:

- `keep`: `yes` or `no`; a file without this column lists what is kept. What isn't listed is left out;
- `new_label`: the class that the image is trained with; empty: its own.

Validation and test stay what they are without the files: only training images may be named, and they are chosen after
the split is drawn. The result stands in `splits.csv` (what is left out as `unused`), by which a run goes on.

Names are compared as 64-bit hashes: a million of them take 16 MB.
"""

from __future__ import annotations

import csv
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress, islice
from pathlib import Path
from typing import Final

import numpy as np

from moevision.data.collection import Sample
from moevision.data.scores import Ints, keys_of, rows_of
from moevision.data.splits import Splits
from moevision.errors import UserError
from moevision.names import csv_name

KEEP, NEW_LABEL, DECISION = "keep", "new_label", "decision"
YES, NO = "yes", "no"
_OPTIONS: Final = {KEEP: "--data.keep", NEW_LABEL: "--data.relabel"}


@dataclass(frozen=True)
class Choices:
    """Files that say which training images are used, and as what.

    Attributes:
        keep: list of images to keep; None keeps all.
        relabel: list of images with another class; None changes none.
    """

    keep: Path | None = None
    relabel: Path | None = None

    def __bool__(self) -> bool:
        """Whether anything was chosen."""
        return self.keep is not None or self.relabel is not None

    def apply(self, splits: Splits, class_names: Sequence[str]) -> Splits:
        """The split with the chosen training images under their new labels; its other parts are as they were.

        Raises:
            UserError: if a file can't be read, names an image that isn't in the training set or a class that the data
                haven't, or leaves a class without a training image.
        """
        if self.relabel is not None:
            splits = _relabelled(splits, self.relabel, class_names)
        return splits if self.keep is None else _kept(splits, self.keep, class_names)


def _relabelled(splits: Splits, path: Path, class_names: Sequence[str]) -> Splits:
    number_of = {csv_name(name): number for number, name in enumerate(class_names)}

    def number(row: Mapping[str, str]) -> int:
        name = csv_name(row[NEW_LABEL])
        if name and name not in number_of:
            raise ValueError(f"the data have no class {name!r} ({', '.join(list(number_of)[:8])})")
        return number_of[name] if name else -1

    new = _of_training_images(path, NEW_LABEL, number, splits, absent=-1)
    if not (new >= 0).any():
        raise UserError(f"{_OPTIONS[NEW_LABEL]}: {path} gives no image a new label: leave it out.")
    train = [
        sample if label < 0 else Sample(sample.sample_id, label)
        for sample, label in zip(splits.samples["train"], new.tolist(), strict=True)
    ]
    changed = sum(new.label != old.label for new, old in zip(train, splits.samples["train"], strict=True))
    return _with_train(splits, train, f"{changed:,} with another label by {path.name}", class_names, path)


def _kept(splits: Splits, path: Path, class_names: Sequence[str]) -> Splits:
    def number(row: Mapping[str, str]) -> int:
        if DECISION in row:
            raise ValueError(
                "it has a column 'decision': `moevision data prune RUN --by decisions --decisions FILE` makes a list "
                "of such a file"
            )
        answer = row.get(KEEP, YES)
        if answer not in (YES, NO):
            raise ValueError(f"keep is {answer!r} and must be {YES} or {NO}")
        return int(answer == YES)

    kept = _of_training_images(path, KEEP, number, splits, absent=0) > 0
    train = list(compress(splits.samples["train"], kept))
    left_out = list(compress(splits.samples["train"], ~kept))
    found = replace(splits, unused=[*splits.unused, *left_out])
    return _with_train(found, train, f"{len(left_out):,} left out by {path.name}", class_names, path)


def _with_train(splits: Splits, train: list[Sample], note: str, class_names: Sequence[str], path: Path) -> Splits:
    before, after = ({sample.label for sample in members} for members in (splits.samples["train"], train))
    if lost := sorted(before - after):
        raise UserError(f"{path} leaves the class {class_names[lost[0]]!r} without a training image: keep some of it.")
    notes = splits.notes | {"train": f"{splits.notes['train']}, {note}"}
    return replace(splits, samples=splits.samples | {"train": train}, notes=notes)


def _of_training_images(
    path: Path, column: str, number: Callable[[Mapping[str, str]], int], splits: Splits, *, absent: int
) -> Ints:
    """[n] what the file says of each training image; `absent` where it says nothing."""
    keys, numbers = read_listed(path, column, number, _OPTIONS[column])
    known = keys_of(csv_name(sample.sample_id) for sample in splits.samples["train"])
    strangers = np.flatnonzero(~np.isin(keys, known))
    if len(strangers):
        name = _name_in_row(path, int(strangers[0]))
        raise UserError(
            f"{_OPTIONS[column]}: {path} lists {len(strangers):,} images that are not among the training images, the "
            f"first is {name!r} ({_where(name, splits)}): give a list of these data in this split (--data.seed and "
            "the fractions decide it)."
        )
    row, found = rows_of(keys, known), np.full(len(known), absent)
    found[row >= 0] = numbers[row[row >= 0]]
    return found


def read_listed(path: Path, column: str, number: Callable[[Mapping[str, str]], int], option: str) -> tuple[Ints, Ints]:
    """Read a list of images, row by row.

    Args:
        path: the file.
        column: which it must have, besides `image`; `keep` may be absent.
        number: what a row says, as a number; raises ValueError if it says nothing that can be used.
        option: who asked for it, for messages.

    Returns:
        [n] hashes of the names (`keys_of`), and [n] the numbers.

    Raises:
        UserError: if it can't be read, or lists an image twice.
    """
    numbers = array("q")

    def names(rows: Iterable[Mapping[str, str]]) -> Iterator[str]:
        for place, row in enumerate(rows, start=2):
            try:
                numbers.append(number(row))
            except ValueError as error:
                raise ValueError(f"line {place}: {error}") from error
            yield csv_name(row["image"])

    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, restval="", strict=True)
            missing = {"image", *({column} - {KEEP})} - set(rows.fieldnames or ())
            if missing:
                raise ValueError(f"it has no column {', '.join(sorted(missing))}")
            keys = keys_of(names(rows))
    except OSError as error:
        raise UserError(f"{option}: {path} can't be read ({error.strerror}): give a CSV file.") from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"{option}: {path} can't be used: {error}.") from error
    in_order = np.sort(keys)
    if (in_order[1:] == in_order[:-1]).any():
        _, first = np.unique(keys, return_index=True)
        again = int(np.setdiff1d(np.arange(len(keys)), first)[0])
        raise UserError(f"{option}: {path} lists {_name_in_row(path, again)!r} twice: keep one of the rows.")
    return keys, np.array(numbers, np.int64)


def _name_in_row(path: Path, row: int) -> str:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return csv_name(next(islice(csv.DictReader(file), row, None))["image"])


def _where(name: str, splits: Splits) -> str:
    """Where an image is that isn't in the training set."""
    for split, samples in {**splits.samples, "no split": splits.unused}.items():
        if any(csv_name(sample.sample_id) == name for sample in samples):
            return f"it is in {split}"
    return "the data have no such image"
