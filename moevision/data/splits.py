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
from pathlib import Path

from moevision.data.collection import SPLITS, Collection, Sample
from moevision.errors import UserError, escape_csv_cell, name_bytes
from moevision.files import csv_text, read_csv, write_text_atomic

_UNUSED = "unused"  # known, and in no split


@dataclass
class Splits:
    """Samples per split, with where they come from."""

    samples: dict[str, list[Sample]]  # split -> samples
    notes: dict[str, str]  # split -> half a sentence about its origin
    warnings: list[str] = field(default_factory=list)  # whole sentences
    # samples in no split, because another split holds a copy of them
    unused: list[Sample] = field(default_factory=list)
    # what was kept on one side, as a sentence, or how to ask for it; empty where data came with splits
    together: str = ""

    def sentences(self) -> list[str]:
        """One sentence per split, with its count, and what was kept together."""
        counts = [
            f"{split}: {len(own):,} images, {self.notes[split]}."
            for split, own in self.samples.items()
            if own
        ]
        return [*counts, *([self.together] if self.together else [])]


_ASK = "Cut image by image: where several show one patient, product or scene, keep them together by --data.group_by."


@dataclass(frozen=True)
class Cut:
    """How to cut what a collection doesn't come with."""

    val_fraction: float = 0.1  # share of the images for validation, in (0, 1)
    test_fraction: float = 0.1  # share for the test, in (0, 1) where the collection came unsplit
    seed: int = 0  # seed of the cut
    # None (a manifest's column "group", if it has one), "parent", the name of a table's column, or a regular expression
    # with one group, searched in the sample id
    group_by: str | None = None
    check_duplicates: bool = True  # whether to look for byte-identical images

    def __post_init__(self) -> None:
        val, test = self.val_fraction, self.test_fraction
        if not (val > 0 and test >= 0 and val + test < 1):
            raise UserError(
                f"val_fraction {val:g} and test_fraction {test:g} leave nothing to validate or to train on: "
                "set --data.val_fraction above 0 and keep their sum below 1"
            )


def make_splits(collection: Collection, cut: Cut) -> Splits:
    """Split a collection, keeping what it came with."""
    given = _merged(collection.given)
    samples = [sample for part in given.values() for sample in part]
    named, kind = _named_groups(collection, samples, cut.group_by)
    together = f"Kept in one split: {kind}, {len(set(named.values())):,} groups." if kind else ""
    groups, warnings = _with_copies(collection, samples, named, cut.check_duplicates)
    notes = split_origins(collection.given, f", seed {cut.seed}")
    if "all" in given:
        if not cut.test_fraction:
            raise UserError(
                "test_fraction 0 leaves nothing to test on: set --data.test_fraction above 0, or add test/"
            )
        fractions = {"test": cut.test_fraction, "val": cut.val_fraction}
        parts = stratified_cut(samples, groups, fractions, cut.seed, collection.class_names)
        return Splits(
            {split: parts[split] for split in SPLITS}, notes, warnings, [], together or _ASK
        )
    if "test" not in given:
        given["test"] = given.pop("val")
    before = given
    given, unused = _without_leaks(given, groups, warnings)
    for split, members in given.items():
        lost = {sample.label for sample in before[split]} - {sample.label for sample in members}
        if lost:
            raise UserError(
                f"every {split} image of the class {collection.class_names[min(lost)]!r} is in another split too (as a "
                f"copy, by a link, or by its group), so no score would count: give {split} images of its own"
            )
    if "val" not in given:
        given |= stratified_cut(
            given["train"], groups, {"val": cut.val_fraction}, cut.seed, collection.class_names
        )
    return Splits({split: given[split] for split in SPLITS}, notes, warnings, unused, together)


def all_for(split: str, collection: Collection) -> Splits:
    """Images that are only evaluated: the set that the collection has for `split`, else for the other; else all."""
    given = collection.given
    part = next(name for name in (split, "test", "val", "all", "train") if name in given)
    return Splits(
        {"train": [], split: given[part]}, {split: f"{part} of these data, which are not the run's"}
    )


def _merged(given: dict[str, list[Sample]]) -> dict[str, list[Sample]]:
    """A copy in which a train set without any companion counts as unsplit."""
    return {"all": given["train"]} if set(given) == {"train"} else dict(given)


def split_origins(given: dict[str, list[Sample]], drawn: str = "") -> dict[str, str]:
    """Where each split comes from, in words; ``drawn`` says how random cuts were drawn."""
    came_with = set(_merged(given))
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
) -> dict[str, list[Sample]]:
    """Cut parts (part -> share) off a list, each with its share of every class; the rest is "train".

    Groups (of a sample id; absent ids are groups of their own) are taken in the order of a hash of (seed, group), so a
    few added files move few others. Where every image is its own group a part gets exactly ``max(1, round(fraction *
    n))`` of a class's n images. Each part is in the order of ``samples``.
    """
    sizes: dict[str, Counter[int]] = defaultdict(Counter)
    for sample in samples:
        sizes[groups.get(sample.sample_id, sample.sample_id)][sample.label] += 1
    by_label: dict[int, list[str]] = defaultdict(list)
    for group in sorted(
        sizes, key=lambda group: hashlib.sha256(name_bytes(f"{seed}:{group}")).digest()
    ):
        for label in sizes[group]:
            by_label[label].append(group)
    part_of: dict[str, str] = {}
    filled: dict[str, Counter[int]] = {part: Counter() for part in fractions}
    for label in sorted(by_label):
        total = sum(sizes[group][label] for group in by_label[label])
        for part, fraction in fractions.items():
            quota = max(1, round(fraction * total))
            free = [group for group in by_label[label] if group not in part_of]
            for group in _chosen(free, sizes, label, quota - filled[part][label]):
                part_of[group] = part
                filled[part] += sizes[group]
    parts: dict[str, list[Sample]] = {part: [] for part in ("train", *fractions)}
    for sample in samples:
        parts[part_of.get(groups.get(sample.sample_id, sample.sample_id), "train")].append(sample)
    for part, cut in parts.items():
        if missing := by_label.keys() - {sample.label for sample in cut}:
            label = next(label for label in by_label if label in missing)
            raise UserError(
                f"class {class_names[label]!r} can't be in each of {', '.join(parts)}: {len(by_label[label])} "
                f"independent images or groups of it leave none for {part}: add some or remove the class"
            )
    return parts


def _chosen(free: list[str], sizes: Mapping[str, Counter[int]], label: int, need: int) -> list[str]:
    """Groups that come nearest to ``need`` images of a class, in their order; one is left for train."""
    chosen: list[str] = []
    for group in free[:]:
        if need <= 0 or len(free) <= 1:
            break
        if sizes[group][label] <= 2 * need:  # overshooting is better than stopping here
            chosen.append(group)
            free.remove(group)
            need -= sizes[group][label]
    if not chosen and need > 0 and len(free) > 1:
        chosen = [min(free, key=lambda group: sizes[group][label])]
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
    if (column := collection.column(by)) is not None:
        return {
            name: f"//{column[name]}" for name in ids if column.get(name)
        }, f"images with the same {by!r}"
    if by == "parent":
        return {
            name: f"//{name.rpartition('/')[0]}" for name in ids
        }, "images of one folder (--data.group_by parent)"
    try:
        pattern = re.compile(by)
    except re.error as error:
        raise UserError(f"--data.group_by {by!r} is not a regular expression: {error}") from error
    if pattern.groups != 1:
        raise UserError(
            f"--data.group_by {by!r} is no column of these data, and as a regular expression it must have exactly one "
            f"(group), not {pattern.groups}"
        )
    found = {name: pattern.search(name) for name in ids}
    if unlike := next((name for name, match in found.items() if match is None), None):
        raise UserError(
            f"--data.group_by {by!r} does not match {unlike!r}: let it match every path"
        )
    groups = {name: f"//{match.group(1)}" for name, match in found.items() if match}
    return groups, f"images whose path agrees in {by} (--data.group_by)"


def _with_copies(
    collection: Collection,
    samples: Sequence[Sample],
    named: Mapping[str, str],
    check_duplicates: bool,
) -> tuple[dict[str, str], list[str]]:
    """Group of every sample id that isn't a group of its own, and warnings about contradictory copies."""
    group_of, parent = dict(named), dict[str, str]()

    def root(group: str) -> str:
        while group in parent:
            group = parent[group]
        return group

    contradictions = []
    for copies in (
        identical(collection, samples)
        if check_duplicates
        else _alike(samples, [collection.identity])
    ):
        if len({sample.label for sample in copies}) > 1:
            contradictions.append(copies[0].sample_id)
        first, *others = [
            group_of.setdefault(sample.sample_id, sample.sample_id) for sample in copies
        ]
        for key in others:
            if root(key) != root(first):
                parent[root(key)] = root(first)
    warnings = (
        [
            f"{len(contradictions)} images stand in several classes as byte-identical files or links (for example "
            f"{contradictions[0]}): keep each in its right class"
        ]
        if contradictions
        else []
    )
    return {sample_id: root(group) for sample_id, group in group_of.items()}, warnings


def identical(collection: Collection, samples: Iterable[Sample]) -> list[list[Sample]]:
    """Sets of two or more byte-identical samples; only samples of equal size are read, large ones twice."""
    # empty files are equal, and no images
    stored = [sample for sample in samples if collection.size_bytes(sample) > 0]
    return _alike(stored, (collection.size_bytes, collection.probe, collection.digest))


def _alike(
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
    given: dict[str, list[Sample]], groups: Mapping[str, str], warnings: list[str]
) -> tuple[dict[str, list[Sample]], list[Sample]]:
    """Drop from train what val or test hold too, and from val what test holds; return the dropped as well."""
    kept: dict[str, list[Sample]] = {}
    unused: list[Sample] = []
    reserved: dict[str, str] = {}  # split by group
    for split in (split for split in ("test", "val", "train") if split in given):
        dropped = [sample for sample in given[split] if groups.get(sample.sample_id) in reserved]
        kept[split] = [
            sample for sample in given[split] if groups.get(sample.sample_id) not in reserved
        ]
        unused += dropped
        if dropped:
            others = sorted({reserved[groups[sample.sample_id]] for sample in dropped})
            warnings.append(
                f"{len(dropped)} {split} images are not used: byte-identical copies, links to them, or files of their "
                f"group, are in {' and '.join(others)} (for example {dropped[0].sample_id})"
            )
        reserved |= {
            groups[sample.sample_id]: split for sample in kept[split] if sample.sample_id in groups
        }
    return kept, unused


def write_splits(path: Path, splits: Splits, class_names: Sequence[str]) -> None:
    """Write ``splits.csv`` (columns split, class, path) whole or not at all; names as `escape_csv_cell` has them."""
    rows = (
        (split, escape_csv_cell(class_names[sample.label]), escape_csv_cell(sample.sample_id))
        for split, samples in {**splits.samples, _UNUSED: splits.unused}.items()
        for sample in samples
    )
    write_text_atomic(path, csv_text(("split", "class", "path"), rows))


def read_splits(path: Path, collection: Collection) -> tuple[Splits, list[str]]:
    """The splits that `write_splits` wrote, of the images as they are now, and the class names of the file.

    Labels are renumbered to those.

    Raises:
        UserError: if the file isn't such a list, a class of it has vanished, or a held-out image has another one.
    """
    rows = _listed(path)
    current = _by_written_name(collection)
    listed = {row["class"] for row in rows}
    class_names = [name for name in collection.class_names if escape_csv_cell(name) in listed]
    label_of = {escape_csv_cell(name): label for label, name in enumerate(class_names)}
    samples: dict[str, list[Sample]] = {
        split: [] for split in SPLITS if any(row["split"] == split for row in rows)
    }
    unused: list[Sample] = []
    vanished = [row["path"] for row in rows if row["path"] not in current]
    if (moved := _moved(rows, current, collection)) is not None:
        row, now = moved
        raise UserError(
            f"{path} lists {row['path']} as {row['class']!r}, and now it is {now!r}: the data have other labels or "
            "another order than when it was written. Restore them, or use another run folder to draw a new split"
        )
    for row in rows:
        if row["path"] in current and row["class"] in label_of:
            samples.get(row["split"], unused).append(
                Sample(current[row["path"]].sample_id, label_of[row["class"]])
            )
    for split, members in samples.items():
        lost = sorted(listed - {escape_csv_cell(class_names[sample.label]) for sample in members})
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
    notes = {
        split: f"{origin} (as listed in {path.name})"
        for split, origin in split_origins(collection.given).items()
    }
    return Splits(samples, notes, warnings, unused), class_names


def _listed(path: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    with suppress(UnicodeDecodeError, csv.Error):
        rows = read_csv(path)
    if (
        not rows
        or set(rows[0]) != {"split", "class", "path"}
        or {row["split"] for row in rows} - {*SPLITS, _UNUSED}
    ):
        raise UserError(f"{path} is not a list of split,class,path: delete it to draw a new split")
    # By the written names: a sample id may hold what no CSV file can. Older files hold names as they are.
    return [
        {name: escape_csv_cell(row[name]) for name in ("split", "class", "path")} for row in rows
    ]


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
    rows, here = _listed(path), _by_written_name(collection)
    both = [row["path"] for row in rows if row["path"] in here]
    if not both or not (
        part or (len(both) == len(rows) and _moved(rows, here, collection) is None)
    ):
        return False
    if (known := original()) is None:
        return True
    there = _by_written_name(known)
    alike = [
        collection.size_bytes(here[name]) == known.size_bytes(there[name])
        for name in both
        if name in there
    ]
    return sum(alike) >= len(alike) * (0.5 if part else 1)


def _moved(
    rows: Sequence[Mapping[str, str]], here: Mapping[str, Sample], collection: Collection
) -> tuple[Mapping[str, str], str] | None:
    """The first row of a held-out image that is of another class now, and that class; None where there is none.

    Rows of tables are numbered, and their names say little. Classes of training images may have been corrected
    (`--data.relabel`).
    """
    for row in rows:
        if row["split"] not in ("train", _UNUSED) and (sample := here.get(row["path"])) is not None:
            now = escape_csv_cell(collection.class_names[sample.label])
            if now != row["class"]:
                return row, now
    return None


def _by_written_name(collection: Collection) -> dict[str, Sample]:
    return {
        escape_csv_cell(sample.sample_id): sample
        for part in collection.given.values()
        for sample in part
    }
