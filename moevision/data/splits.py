"""Which images are for training, validation and test: a seeded, stratified split without leaks.

No model or option is ever selected on the set that is reported. If a dataset has "val" and no "test", its "val" becomes
the test set, and validation images are cut from its training images.

Images that belong together stay in one split: byte-identical copies, links to one file, and files of one group. A copy
of a training image in the test set rewards memorisation, and so does a second photo of the same patient, video or
scene. 3.3 % of CIFAR-10's test images have a near-duplicate in its training set (arXiv:1902.00423); only exact copies
are found here.

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

from moevision.data.collection import (
    SPLITS,
    Collection,
    Sample,
    SplitSamples,
    labels_in,
    quoted_names,
)
from moevision.errors import UserError, escape_csv_cell, name_bytes
from moevision.files import csv_text, read_csv, write_text_atomic

_COLUMNS = ("split", "class", "path")
_UNUSED = "unused"  # in the column "split" of images that are listed but in no split


@dataclass
class Splits:
    """Samples per split, with sentences about their origin."""

    samples: SplitSamples  # split -> samples
    notes: dict[str, str]  # split -> half a sentence about its origin
    warnings: list[str] = field(default_factory=list)  # whole sentences
    # samples in no split, because another split holds a copy of them
    unused: list[Sample] = field(default_factory=list)
    # a sentence about the groups that were kept in one split, or about how to name groups; empty where neither applies
    together: str = ""

    def sentences(self) -> list[str]:
        """One sentence per split with images, with their number, and the sentence `together`."""
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
    """How to cut the splits that a collection doesn't have."""

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
    """Split a collection; splits that it already has are kept, except for leaks."""
    parts = _lone_train_as_all(collection.samples)
    samples = [sample for part in parts.values() for sample in part]
    named_groups, grouping = _named_groups(collection, samples, settings.group_by)
    groups, warnings = _with_copies(collection, samples, named_groups, settings.check_duplicates)
    together = ""
    if grouping:
        together = f"Kept in one split: {grouping}, {len(set(named_groups.values())):,} groups."

    if "all" in parts:
        # An unsplit collection: cut all three splits.
        if not settings.test_fraction:
            raise UserError(
                "test_fraction 0 leaves nothing to test on: set --data.test_fraction above 0, or add test/"
            )
        fractions = {"test": settings.test_fraction, "val": settings.val_fraction}
        parts = stratified_cut(samples, groups, fractions, settings.seed, collection.class_names)
        together = together or _GROUPING_HINT
        unused: list[Sample] = []
    else:
        # A collection with a train set and val, test or both: remove leaks, and cut a val set if there is none.
        if "test" not in parts:
            parts["test"] = parts.pop("val")
        unfiltered = parts
        parts, unused = _without_leaks(unfiltered, groups, warnings)
        _check_classes_left(unfiltered, parts, collection.class_names)
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
    """Raise a UserError if a split has lost all images of a class, since other splits have them too."""
    for split, samples in after.items():
        lost = labels_in(before[split]) - labels_in(samples)
        if lost:
            raise UserError(
                f"every {split} image of the class {class_names[min(lost)]!r} is in another split too (as a copy, by "
                f"a link, or by its group), so no score would count: give {split} images of its own"
            )


def evaluation_split(split: str, collection: Collection) -> Splits:
    """Splits of data that are only evaluated: one named `split`, from the first of `preferred` that exists."""
    preferred = (split, "test", "val", "all", "train")
    part = next(name for name in preferred if name in collection.samples)
    samples = {"train": [], split: collection.samples[part]}
    return Splits(samples, {split: f"{part} of these data, which are not the run's"})


def _lone_train_as_all(samples: SplitSamples) -> SplitSamples:
    """A copy; a dataset with a train set and no other set counts as unsplit, `all`."""
    if set(samples) == {"train"}:
        return {"all": samples["train"]}
    return dict(samples)


def split_origins(samples: SplitSamples, seed_text: str = "") -> dict[str, str]:
    """Half a sentence about the origin of each split; `seed_text` is appended to those about random cuts."""
    came_with = set(_lone_train_as_all(samples))
    how_cut = f"at random by class{seed_text}"
    if came_with == {"all"}:
        return dict.fromkeys(SPLITS, f"cut from all images {how_cut}")
    notes = dict.fromkeys(SPLITS, "as the dataset gives them")
    if came_with == {"train", "val"}:
        notes["test"] = "the dataset's val set, which is reported and never selected on"
    if came_with != set(SPLITS):
        notes["val"] = f"cut from the dataset's train set {how_cut}"
        notes["train"] = "the rest of the dataset's train set"
    return notes


def stratified_cut(
    samples: Sequence[Sample],
    groups: Mapping[str, str],
    fractions: Mapping[str, float],
    seed: int,
    class_names: Sequence[str],
) -> SplitSamples:
    """Divide samples into parts, each with its fraction of every class; what remains is the part "train".

    Whole groups go to a part, in the order of a hash of (seed, group), so that a few added files move few others. Where
    every image is its own group a part gets exactly ``max(1, round(fraction * n))`` of a class's n images. Each part is
    in the order of ``samples``.

    Args:
        samples: what is divided.
        groups: sample id -> group; a sample whose id is absent is a group of its own.
        fractions: part -> its fraction.
        seed: random seed of the order of groups.
        class_names: by label, for messages.
    """
    groups_of_samples = [groups.get(sample.sample_id, sample.sample_id) for sample in samples]
    sizes: dict[str, Counter[int]] = defaultdict(Counter)  # group -> label -> images
    for sample, group in zip(samples, groups_of_samples, strict=True):
        sizes[group][sample.label] += 1

    # label -> groups with images of it, in pseudo-random order
    groups_of_label: dict[int, list[str]] = defaultdict(list)
    hashes = {group: hashlib.sha256(name_bytes(f"{seed}:{group}")).digest() for group in sizes}
    for group in sorted(sizes, key=hashes.__getitem__):
        for label in sizes[group]:
            groups_of_label[label].append(group)

    # Class by class, assign groups to parts. A group that was assigned for one class keeps its part.
    part_of_group: dict[str, str] = {}
    images_in_part: dict[str, Counter[int]] = {part: Counter() for part in fractions}  # by label
    for label in sorted(groups_of_label):
        total = sum(sizes[group][label] for group in groups_of_label[label])
        for part, fraction in fractions.items():
            needed = max(1, round(fraction * total)) - images_in_part[part][label]
            free = [group for group in groups_of_label[label] if group not in part_of_group]
            counts = {group: sizes[group][label] for group in free}
            for group in _nearest_groups(counts, needed):
                part_of_group[group] = part
                images_in_part[part] += sizes[group]

    parts: SplitSamples = {part: [] for part in ("train", *fractions)}
    for sample, group in zip(samples, groups_of_samples, strict=True):
        parts[part_of_group.get(group, "train")].append(sample)

    _check_all_classes(parts, class_names)
    return parts


def _check_all_classes(parts: SplitSamples, class_names: Sequence[str]) -> None:
    """Raise a UserError if a part has no image of some classes."""
    present = [labels_in(members) for members in parts.values()]
    lacking = present[0].union(*present) - present[0].intersection(*present)
    if lacking:
        names = quoted_names([class_names[label] for label in sorted(lacking)])
        raise UserError(
            f"class {names} can't be in each of {', '.join(parts)}: too few independent images or groups of it, add "
            "some or remove the class"
        )


def _nearest_groups(counts: Mapping[str, int], needed: int) -> list[str]:
    """The first groups that have together about ``needed`` images of a class; at least one group is left for train.

    `counts` has the images of that class in each group.
    """
    chosen: list[str] = []
    for group, count in counts.items():
        if needed <= 0 or len(chosen) >= len(counts) - 1:
            break
        # With this group the sum is at least as near to `needed` as without it.
        if count <= 2 * needed:
            chosen.append(group)
            needed -= count

    # All groups were too large: the smallest is better than none.
    if not chosen and needed > 0 and len(counts) > 1:
        chosen = [min(counts, key=counts.__getitem__)]
    return chosen


def _named_groups(
    collection: Collection, samples: Sequence[Sample], group_by: str | None
) -> tuple[dict[str, str], str]:
    """Sample id -> group, by a column, the parent folder or a regular expression; and a phrase that names the grouping.

    Both are empty without grouping. Group names begin with //, so that none equals a sample id.
    """
    group_by = group_by or collection.group_column
    if group_by is None:
        return {}, ""
    sample_ids = [sample.sample_id for sample in samples]
    column = collection.column(group_by)
    if column is not None:
        groups = {
            sample_id: f"//{column[sample_id]}" for sample_id in sample_ids if column.get(sample_id)
        }
        return groups, f"images with the same {group_by!r}"
    if group_by == "parent":
        groups = {sample_id: f"//{sample_id.rpartition('/')[0]}" for sample_id in sample_ids}
        return groups, "images of one folder (--data.group_by parent)"
    pattern = _group_pattern(group_by)
    groups = {}
    for sample_id in sample_ids:
        match = pattern.search(sample_id)
        if match is None:
            raise UserError(
                f"--data.group_by {group_by!r} does not match {sample_id!r}: let it match every path"
            )
        groups[sample_id] = f"//{match.group(1)}"
    return groups, f"images whose path agrees in {group_by} (--data.group_by)"


def _group_pattern(group_by: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise UserError(
            f"--data.group_by {group_by!r} is not a regular expression: {error}"
        ) from error
    if pattern.groups != 1:
        raise UserError(
            f"--data.group_by {group_by!r} is no column of these data, and as a regular expression it must have "
            f"exactly one (group), not {pattern.groups}"
        )
    return pattern


def _with_copies(
    collection: Collection,
    samples: Sequence[Sample],
    named_groups: Mapping[str, str],
    check_duplicates: bool,
) -> tuple[dict[str, str], list[str]]:
    """Sample id -> group, groups that share copies of an image merged; and warnings about copies of several classes.

    A sample that is absent has no copy and no named group.
    """
    copy_sets = _sets_agreeing_in(samples, [collection.identity])  # links to one file
    if check_duplicates:
        copy_sets = byte_identical(collection, samples)
    group_of = dict(named_groups)
    if not copy_sets:
        return group_of, []

    from scipy.cluster.hierarchy import DisjointSet  # imports much of SciPy

    merged = DisjointSet(named_groups.values())  # groups that share copies
    contradictions = []
    for members in copy_sets:
        if len({sample.all_labels for sample in members}) > 1:
            contradictions.append(members[0].sample_id)
        groups = [group_of.setdefault(sample.sample_id, sample.sample_id) for sample in members]
        for group in groups:
            merged.add(group)
            merged.merge(groups[0], group)

    warnings = []
    if contradictions:
        warnings.append(
            f"{len(contradictions)} images stand in several classes as byte-identical files or links (for example "
            f"{contradictions[0]}): keep each in its right class"
        )
    return {sample_id: merged[group] for sample_id, group in group_of.items()}, warnings


def byte_identical(collection: Collection, samples: Iterable[Sample]) -> list[list[Sample]]:
    """Sets of two or more byte-identical samples.

    Only samples of equal size are read, and of large ones first a small piece (`Collection.probe`).
    """
    # Empty files are all equal, but they are no images.
    non_empty = [sample for sample in samples if collection.size_bytes(sample) > 0]
    return _sets_agreeing_in(
        non_empty, (collection.size_bytes, collection.probe, collection.digest)
    )


def _sets_agreeing_in(
    samples: Iterable[Sample], keys: Sequence[Callable[[Sample], Hashable]]
) -> list[list[Sample]]:
    """Sets of two or more samples with equal keys; a key is computed only for samples with equal previous keys."""
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
    """Drop from train the groups that val or test have, and from val those that test has: (kept, dropped) samples."""
    kept: SplitSamples = {}
    unused: list[Sample] = []
    split_of_group: dict[str, str] = {}
    for split in ("test", "val", "train"):
        if split not in parts:
            continue
        kept[split] = []
        leaks: list[Sample] = []
        for sample in parts[split]:
            is_leak = groups.get(sample.sample_id) in split_of_group
            (leaks if is_leak else kept[split]).append(sample)
        unused += leaks
        if leaks:
            others = sorted({split_of_group[groups[sample.sample_id]] for sample in leaks})
            warnings.append(
                f"{len(leaks)} {split} images are not used: byte-identical copies, links to them, or files of their "
                f"group, are in {' and '.join(others)} (for example {leaks[0].sample_id})"
            )
        for sample in kept[split]:
            if sample.sample_id in groups:
                split_of_group[groups[sample.sample_id]] = split
    return kept, unused


def write_splits(path: Path, splits: Splits, class_names: Sequence[str]) -> None:
    """Write ``splits.csv`` (columns split, class, path) atomically; names are escaped by `escape_csv_cell`."""
    rows = []
    for split, samples in {**splits.samples, _UNUSED: splits.unused}.items():
        for sample in samples:
            labels = sample.written(class_names)
            rows.append((split, labels, escape_csv_cell(sample.sample_id)))
    write_text_atomic(path, csv_text(_COLUMNS, rows))


def read_splits(path: Path, collection: Collection) -> tuple[Splits, list[str]]:
    """Read the splits that `write_splits` wrote, and the class names that occur in the file.

    Images that no longer exist are left out. Labels are indices into the returned class names.

    Raises:
        UserError: if the file isn't such a list, a split has no image of a class left, or a held-out image is now of
            another class.
    """
    rows = _read_rows(path)
    current = _by_written_name(collection)
    relabelled = _relabelled_row(rows, current, collection)
    if relabelled is not None:
        raise UserError(
            f"{path} lists {relabelled['path']} as {relabelled['class']!r}, and now it is "
            f"{relabelled['now']!r}: the data have other labels or another order than when it was written. Restore "
            "them, or use another run folder to draw a new split"
        )

    multilabel = collection.multilabel
    cells = {row["class"] for row in rows}
    listed_classes = cells
    if multilabel:
        listed_classes = {name for cell in cells for name in cell.split("|")}
    class_names = [
        name for name in collection.class_names if escape_csv_cell(name) in listed_classes
    ]
    label_of = {escape_csv_cell(name): label for label, name in enumerate(class_names)}
    numbers = [label_of.get(escape_csv_cell(name), -1) for name in collection.class_names]

    listed_splits = {row["split"] for row in rows}
    samples: SplitSamples = {split: [] for split in SPLITS if split in listed_splits}
    unused: list[Sample] = []
    vanished = []
    for row in rows:
        sample = current.get(row["path"])
        if sample is None:
            vanished.append(row["path"])
        elif multilabel:  # the cell is as now, by the check above
            samples.get(row["split"], unused).append(sample.renumbered(numbers))
        elif row["class"] in label_of:
            part = samples.get(row["split"], unused)
            part.append(Sample(sample.sample_id, label_of[row["class"]]))

    for split, members in samples.items():
        present = {escape_csv_cell(class_names[label]) for label in labels_in(members)}
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
    """The rows of a ``splits.csv``, with escaped names; a UserError if the file is something else."""
    rows: list[dict[str, str]] = []
    with suppress(ValueError, csv.Error):
        rows = read_csv(path, _COLUMNS)
    if not rows or any(row["split"] not in (*SPLITS, _UNUSED) for row in rows):
        raise UserError(f"{path} is not a list of split,class,path: delete it to draw a new split")
    # Names are compared as written, since a sample id may have characters that CSV can't hold. Older files have
    # unescaped names.
    return [{name: escape_csv_cell(row[name]) for name in _COLUMNS} for row in rows]


def is_copy(
    path: Path,
    collection: Collection,
    original: Callable[[], Collection | None],
    *,
    part: bool = False,
) -> bool:
    """Whether a collection is a copy of the data that ``splits.csv`` lists.

    A copy has all listed images, and each has the file size of the original where that still exists. Held-out images
    must also have the listed class.

    Args:
        path: the ``splits.csv``.
        collection: the possible copy.
        original: opens the original, None if it no longer exists; called only if all other conditions hold.
        part: accept a partial copy: at least one listed image, and at least half of those that can be compared have
            equal file sizes. A new split of such a collection would test with images of the training.
    """
    rows = _read_rows(path)
    samples = _by_written_name(collection)
    shared = [row["path"] for row in rows if row["path"] in samples]
    if not shared:
        return False
    is_whole = len(shared) == len(rows) and _relabelled_row(rows, samples, collection) is None
    if not (part or is_whole):
        return False

    original_collection = original()
    if original_collection is None:
        return True

    original_samples = _by_written_name(original_collection)
    same_size = [
        original_collection.size_bytes(original_samples[name])
        == collection.size_bytes(samples[name])
        for name in shared
        if name in original_samples
    ]
    return sum(same_size) >= len(same_size) * (0.5 if part else 1)


def _relabelled_row(
    rows: Sequence[Mapping[str, str]], samples: Mapping[str, Sample], collection: Collection
) -> dict[str, str] | None:
    """The first row of a held-out image whose class has changed, with the new class as `now`; None if there is none.

    This detects other data under the same names, such as the row numbers of a table. Training images with one label
    are not checked: their classes may have been corrected (`--data.relabel`).
    """
    for row in rows:
        sample = samples.get(row["path"])
        if sample is None:
            continue
        if not sample.labels and row["split"] in ("train", _UNUSED):
            continue
        class_now = sample.written(collection.class_names)
        if class_now != row["class"]:
            return {**row, "now": class_now}
    return None


def _by_written_name(collection: Collection) -> dict[str, Sample]:
    """Escaped sample id, as in ``splits.csv`` -> sample, of all splits."""
    samples = chain.from_iterable(collection.samples.values())
    return {escape_csv_cell(sample.sample_id): sample for sample in samples}
