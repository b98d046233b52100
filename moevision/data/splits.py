"""Which images are for training, validation and test: a seeded, stratified split without leaks.

Nothing is ever selected on the set that is reported. A "val" that comes without a "test" is therefore the test set, and
validation images are cut from the training ones. Images that belong together stay on one side: byte-identical copies,
links to one file, and files of one group. A copy of a training image in the test set rewards memorisation, and so does
a second photo of the same patient, video or scene. 3.3 % of CIFAR-10's test images have a near-duplicate in its
training set (arXiv:1902.00423); only exact copies are found here.

``splits.csv`` holds the split of a run: written into its folder, and read from there when the run goes on.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from moevision.data.collection import SPLITS, Collection, Sample, SplitSamples
from moevision.errors import UserError, escape_csv_cell, name_bytes
from moevision.files import csv_text, read_csv, write_text_atomic

_COLUMNS = ("split", "class", "path")
_UNUSED = "unused"  # a split that is none: an image is listed, and not used


@dataclass
class Splits:
    """Samples per split, with where they come from."""

    samples: SplitSamples  # split -> samples
    notes: dict[str, str]  # split -> half a sentence about its origin
    warnings: list[str] = field(default_factory=list)  # whole sentences
    # samples in no split, because another split holds a copy of them
    unused: list[Sample] = field(default_factory=list)
    # what was kept on one side, as a sentence, or how to ask for it; empty where data came with splits
    together: str = ""

    def sentences(self) -> list[str]:
        """One sentence per split, with its count, and what was kept together."""
        sentences = [
            f"{split}: {len(samples):,} images, {self.notes[split]}."
            for split, samples in self.samples.items()
            if samples
        ]
        if self.together:
            sentences.append(self.together)
        return sentences


_GROUPING_HINT = (
    "Cut image by image: where several show one patient, product or scene, keep them together by "
    "--data.group_by."
)


@dataclass(frozen=True)
class SplitSettings:
    """How to cut what a collection doesn't come with."""

    val_fraction: float = 0.1  # share of the images for validation, in (0, 1)
    test_fraction: float = 0.1  # share for the test, in (0, 1) where the collection came unsplit
    seed: int = 0  # seed of the cut
    # None (a manifest's column "group", if it has one), "parent", the name of a table's column, or a regular expression
    # with one group, searched in the sample id
    group_by: str | None = None
    check_duplicates: bool = True  # whether to look for byte-identical images

    def __post_init__(self) -> None:
        val = self.val_fraction
        test = self.test_fraction
        if not (val > 0 and test >= 0 and val + test < 1):
            raise UserError(
                f"val_fraction {val:g} and test_fraction {test:g} leave nothing to validate or to train on: "
                "set --data.val_fraction above 0 and keep their sum below 1"
            )


def make_splits(collection: Collection, settings: SplitSettings) -> Splits:
    """Split a collection, keeping what it came with."""
    parts = _normalized(collection.samples)
    samples = [sample for part in parts.values() for sample in part]
    named, kind = _named_groups(collection, samples, settings.group_by)
    groups, warnings = _with_copies(collection, samples, named, settings.check_duplicates)
    together = ""
    if kind:
        together = f"Kept in one split: {kind}, {len(set(named.values())):,} groups."

    if "all" in parts:
        if not settings.test_fraction:
            raise UserError(
                "test_fraction 0 leaves nothing to test on: set --data.test_fraction above 0, or add test/"
            )
        fractions = {"test": settings.test_fraction, "val": settings.val_fraction}
        parts = stratified_cut(samples, groups, fractions, settings.seed, collection.class_names)
        together = together or _GROUPING_HINT
        unused: list[Sample] = []
    else:
        if "test" not in parts:
            parts["test"] = parts.pop("val")
        before = parts
        parts, unused = _without_leaks(before, groups, warnings)
        _check_classes_left(before, parts, collection.class_names)
        if "val" not in parts:
            fractions = {"val": settings.val_fraction}
            parts |= stratified_cut(
                parts["train"], groups, fractions, settings.seed, collection.class_names
            )
    notes = split_origins(collection.samples, f", seed {settings.seed}")
    return Splits({split: parts[split] for split in SPLITS}, notes, warnings, unused, together)


def _check_classes_left(
    before: SplitSamples,
    after: SplitSamples,
    class_names: Sequence[str],
) -> None:
    """No split may have lost a class to the others."""
    for split, samples in after.items():
        lost = {sample.label for sample in before[split]} - {sample.label for sample in samples}
        if lost:
            raise UserError(
                f"every {split} image of the class {class_names[min(lost)]!r} is in another split too (as a copy, by "
                f"a link, or by its group), so no score would count: give {split} images of its own"
            )


def evaluation_split(split: str, collection: Collection) -> Splits:
    """Images that are only evaluated: the set that the collection has for `split`, else for the other; else all."""
    preferred = (split, "test", "val", "all", "train")
    part = next(name for name in preferred if name in collection.samples)
    samples = {"train": [], split: collection.samples[part]}
    return Splits(samples, {split: f"{part} of these data, which are not the run's"})


def _normalized(samples: SplitSamples) -> SplitSamples:
    """A copy in which a train set without any companion counts as unsplit."""
    if set(samples) == {"train"}:
        return {"all": samples["train"]}
    return dict(samples)


def split_origins(samples: SplitSamples, drawn: str = "") -> dict[str, str]:
    """Where each split comes from, in words; ``drawn`` says how random cuts were drawn."""
    came_with = set(_normalized(samples))
    cut = f"at random by class{drawn}"
    if came_with == {"all"}:
        return dict.fromkeys(SPLITS, f"cut from all images {cut}")
    notes = dict.fromkeys(SPLITS, "as the dataset gives them")
    if came_with == {"train", "val"}:
        notes["test"] = "the dataset's val set, which is reported and never selected on"
    if came_with != set(SPLITS):
        notes["val"] = f"cut from the dataset's train set {cut}"
        notes["train"] = "the rest of the dataset's train set"
    return notes


def stratified_cut(
    samples: Sequence[Sample],
    groups: Mapping[str, str],
    fractions: Mapping[str, float],
    seed: int,
    class_names: Sequence[str],
) -> SplitSamples:
    """Cut parts (part -> share) off a list, each with its share of every class; the rest is "train".

    Groups (of a sample id; absent ids are groups of their own) are taken in the order of a hash of (seed, group), so a
    few added files move few others. Where every image is its own group a part gets exactly ``max(1, round(fraction *
    n))`` of a class's n images. Each part is in the order of ``samples``.
    """
    groups_of_samples = [groups.get(sample.sample_id, sample.sample_id) for sample in samples]
    sizes: dict[str, Counter[int]] = defaultdict(Counter)  # group -> label -> images
    for sample, group in zip(samples, groups_of_samples, strict=True):
        sizes[group][sample.label] += 1
    by_label: dict[int, list[str]] = defaultdict(list)
    hashes = {group: hashlib.sha256(name_bytes(f"{seed}:{group}")).digest() for group in sizes}
    for group in sorted(sizes, key=hashes.__getitem__):
        for label in sizes[group]:
            by_label[label].append(group)

    part_of: dict[str, str] = {}  # by group
    filled: dict[str, Counter[int]] = {part: Counter() for part in fractions}
    for label in sorted(by_label):
        total = sum(sizes[group][label] for group in by_label[label])
        for part, fraction in fractions.items():
            needed = max(1, round(fraction * total)) - filled[part][label]
            free = [group for group in by_label[label] if group not in part_of]
            counts = {group: sizes[group][label] for group in free}
            for group in _nearest_groups(counts, needed):
                part_of[group] = part
                filled[part] += sizes[group]

    parts: SplitSamples = {part: [] for part in ("train", *fractions)}
    for sample, group in zip(samples, groups_of_samples, strict=True):
        parts[part_of.get(group, "train")].append(sample)
    for part, members in parts.items():
        present = {sample.label for sample in members}
        for label, label_groups in by_label.items():
            if label not in present:
                raise UserError(
                    f"class {class_names[label]!r} can't be in each of {', '.join(parts)}: {len(label_groups)} "
                    f"independent images or groups of it leave none for {part}: add some or remove the class"
                )
    return parts


def _nearest_groups(counts: Mapping[str, int], needed: int) -> list[str]:
    """Groups (with their images of a class) that come nearest to ``needed``, in order; one is left for train."""
    chosen: list[str] = []
    for group, count in counts.items():
        if needed <= 0 or len(chosen) >= len(counts) - 1:
            break
        if count <= 2 * needed:  # overshooting is better than stopping here
            chosen.append(group)
            needed -= count
    if not chosen and needed > 0 and len(counts) > 1:
        chosen = [min(counts, key=counts.__getitem__)]
    return chosen


def _named_groups(
    collection: Collection, samples: Sequence[Sample], by: str | None
) -> tuple[dict[str, str], str]:
    """Groups by a column, the parent folder or a regular expression, and what these are in words, empty for none.

    Keys begin with //, so that they can't be sample ids.
    """
    by = by or collection.group_column
    if by is None:
        return {}, ""
    ids = [sample.sample_id for sample in samples]
    column = collection.column(by)
    if column is not None:
        groups = {name: f"//{column[name]}" for name in ids if column.get(name)}
        return groups, f"images with the same {by!r}"
    if by == "parent":
        groups = {name: f"//{name.rpartition('/')[0]}" for name in ids}
        return groups, "images of one folder (--data.group_by parent)"
    pattern = _group_pattern(by)
    groups = {}
    for name in ids:
        match = pattern.search(name)
        if match is None:
            raise UserError(
                f"--data.group_by {by!r} does not match {name!r}: let it match every path"
            )
        groups[name] = f"//{match.group(1)}"
    return groups, f"images whose path agrees in {by} (--data.group_by)"


def _group_pattern(by: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(by)
    except re.error as error:
        raise UserError(f"--data.group_by {by!r} is not a regular expression: {error}") from error
    if pattern.groups != 1:
        raise UserError(
            f"--data.group_by {by!r} is no column of these data, and as a regular expression it must have exactly one "
            f"(group), not {pattern.groups}"
        )
    return pattern


def _with_copies(
    collection: Collection,
    samples: Sequence[Sample],
    named: Mapping[str, str],
    check_duplicates: bool,
) -> tuple[dict[str, str], list[str]]:
    """Group of every sample id that isn't a group of its own, and warnings about contradictory copies."""
    copies = _agreeing_in(samples, [collection.identity])
    if check_duplicates:
        copies = byte_identical(collection, samples)
    group_of = dict(named)
    merged_into: dict[str, str] = {}
    contradictions = []
    for members in copies:
        if len({sample.label for sample in members}) > 1:
            contradictions.append(members[0].sample_id)
        groups = [group_of.setdefault(sample.sample_id, sample.sample_id) for sample in members]
        for group in groups[1:]:
            root = _root(group, merged_into)
            first_root = _root(groups[0], merged_into)
            if root != first_root:
                merged_into[root] = first_root
    warnings = []
    if contradictions:
        warnings.append(
            f"{len(contradictions)} images stand in several classes as byte-identical files or links (for example "
            f"{contradictions[0]}): keep each in its right class"
        )
    roots = {sample_id: _root(group, merged_into) for sample_id, group in group_of.items()}
    return roots, warnings


def _root(group: str, merged_into: Mapping[str, str]) -> str:
    """The group that a group has become a part of, at the end of the chain."""
    while group in merged_into:
        group = merged_into[group]
    return group


def byte_identical(collection: Collection, samples: Iterable[Sample]) -> list[list[Sample]]:
    """Sets of two or more byte-identical samples; only samples of equal size are read, large ones twice."""
    # empty files are equal, and no images
    filled = [sample for sample in samples if collection.size_bytes(sample) > 0]
    return _agreeing_in(filled, (collection.size_bytes, collection.probe, collection.digest))


def _agreeing_in(
    samples: Iterable[Sample], keys: Sequence[Callable[[Sample], Hashable]]
) -> list[list[Sample]]:
    """Sets of two or more samples that agree in every key; the next key is asked only of those that agree so far."""
    sets = [list(samples)]
    for key in keys:
        finer: list[list[Sample]] = []
        for members in sets:
            buckets: dict[Hashable, list[Sample]] = defaultdict(list)
            for sample in members:
                buckets[key(sample)].append(sample)
            finer += [bucket for bucket in buckets.values() if len(bucket) > 1]
        sets = finer
    return sets


def _without_leaks(
    parts: SplitSamples, groups: Mapping[str, str], warnings: list[str]
) -> tuple[SplitSamples, list[Sample]]:
    """Drop from train what val or test hold too, and from val what test holds; return the dropped as well."""
    clean: SplitSamples = {}
    unused: list[Sample] = []
    split_of: dict[str, str] = {}  # by group
    for split in ("test", "val", "train"):
        if split not in parts:
            continue
        clean[split] = []
        leaks: list[Sample] = []
        for sample in parts[split]:
            is_leak = groups.get(sample.sample_id) in split_of
            (leaks if is_leak else clean[split]).append(sample)
        unused += leaks
        if leaks:
            others = sorted({split_of[groups[sample.sample_id]] for sample in leaks})
            warnings.append(
                f"{len(leaks)} {split} images are not used: byte-identical copies, links to them, or files of their "
                f"group, are in {' and '.join(others)} (for example {leaks[0].sample_id})"
            )
        for sample in clean[split]:
            if sample.sample_id in groups:
                split_of[groups[sample.sample_id]] = split
    return clean, unused


def write_splits(path: Path, splits: Splits, class_names: Sequence[str]) -> None:
    """Write ``splits.csv`` (columns split, class, path) whole or not at all; names as `escape_csv_cell` has them."""
    rows = []
    for split, samples in {**splits.samples, _UNUSED: splits.unused}.items():
        for sample in samples:
            class_name = escape_csv_cell(class_names[sample.label])
            rows.append((split, class_name, escape_csv_cell(sample.sample_id)))
    write_text_atomic(path, csv_text(_COLUMNS, rows))


def read_splits(path: Path, collection: Collection) -> tuple[Splits, list[str]]:
    """The splits that `write_splits` wrote, of the images as they are now, and the class names of the file.

    Labels are renumbered to those.

    Raises:
        UserError: if the file isn't such a list, a class of it has vanished, or a held-out image has another one.
    """
    rows = _read_rows(path)
    current = _by_written_name(collection)
    moved = _moved_row(rows, current, collection)
    if moved is not None:
        raise UserError(
            f"{path} lists {moved['path']} as {moved['class']!r}, and now it is {moved['now']!r}: the data have other "
            "labels or another order than when it was written. Restore them, or use another run folder to draw a new "
            "split"
        )
    listed_classes = {row["class"] for row in rows}
    class_names = [
        name for name in collection.class_names if escape_csv_cell(name) in listed_classes
    ]
    label_of = {escape_csv_cell(name): label for label, name in enumerate(class_names)}

    listed_splits = {row["split"] for row in rows}
    samples: SplitSamples = {split: [] for split in SPLITS if split in listed_splits}
    unused: list[Sample] = []
    vanished = []
    for row in rows:
        sample = current.get(row["path"])
        if sample is None:
            vanished.append(row["path"])
        elif row["class"] in label_of:
            part = samples.get(row["split"], unused)
            part.append(Sample(sample.sample_id, label_of[row["class"]]))
    for split, members in samples.items():
        present = {escape_csv_cell(class_names[sample.label]) for sample in members}
        lost = sorted(listed_classes - present)
        if lost:
            raise UserError(
                f"{path} lists {split} images of the class {lost[0]!r} that are no longer there: bring them "
                "back, or use another run folder to draw a new split"
            )

    warnings = []
    if vanished:
        warnings.append(
            f"{len(vanished)} images listed in {path} have vanished (for example {vanished[0]})"
        )
    appeared = current.keys() - {row["path"] for row in rows}
    if appeared:
        warnings.append(
            f"{len(appeared)} images came after {path} was written and are left out (for example {min(appeared)})"
        )
    notes = {
        split: f"{origin} (as listed in {path.name})"
        for split, origin in split_origins(collection.samples).items()
    }
    return Splits(samples, notes, warnings, unused), class_names


def _read_rows(path: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    with suppress(UnicodeDecodeError, csv.Error):
        rows = read_csv(path)
    columns = set(rows[0]) if rows else set()
    if columns != set(_COLUMNS) or any(row["split"] not in (*SPLITS, _UNUSED) for row in rows):
        raise UserError(f"{path} is not a list of split,class,path: delete it to draw a new split")
    # By the written names: a sample id may hold what no CSV file can. Older files hold names as they are.
    return [{name: escape_csv_cell(row[name]) for name in _COLUMNS} for row in rows]


def is_copy(
    path: Path,
    collection: Collection,
    original: Callable[[], Collection | None],
    *,
    part: bool = False,
) -> bool:
    """Whether a collection has all images of ``splits.csv``, as large as in the original where that is still there.

    Held-out images must have the listed class too. The original is opened only if all this is so. `part`: whether it
    has some, half of them as large, so that a split of its own would test with images of the training.
    """
    rows = _read_rows(path)
    samples = _by_written_name(collection)
    shared = [row["path"] for row in rows if row["path"] in samples]
    if not shared:
        return False
    is_whole = len(shared) == len(rows) and _moved_row(rows, samples, collection) is None
    if not (part or is_whole):
        return False
    original_collection = original()
    if original_collection is None:
        return True
    original_samples = _by_written_name(original_collection)
    compared, equal = 0, 0
    for name in shared:
        if name in original_samples:
            size = original_collection.size_bytes(original_samples[name])
            compared += 1
            equal += collection.size_bytes(samples[name]) == size
    return equal >= compared * (0.5 if part else 1)


def _moved_row(
    rows: Sequence[Mapping[str, str]], samples: Mapping[str, Sample], collection: Collection
) -> dict[str, str] | None:
    """The first row of a held-out image that is of another class `now`; None where there is none.

    Rows of tables are numbered, and their names say little. Classes of training images may have been corrected
    (`--data.relabel`).
    """
    for row in rows:
        sample = samples.get(row["path"])
        if sample is None or row["split"] in ("train", _UNUSED):
            continue
        class_now = escape_csv_cell(collection.class_names[sample.label])
        if class_now != row["class"]:
            return {**row, "now": class_now}
    return None


def _by_written_name(collection: Collection) -> dict[str, Sample]:
    samples = chain.from_iterable(collection.samples.values())
    return {escape_csv_cell(sample.sample_id): sample for sample in samples}
