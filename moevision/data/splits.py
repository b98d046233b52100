"""Which images train, which choose, and which report: a seeded, stratified split without leaks.

Nothing is ever selected on the set that is reported. A "val" that comes without a "test" is therefore the
test set, and validation images are cut from the training ones. Pictures that belong together stay on one side
(see ``leaks.py``).
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from moevision.data.leaks import group_samples, without_leaks
from moevision.data.sources import SPLITS, Collection, Sample
from moevision.errors import UserError
from moevision.names import name_bytes


@dataclass
class Splits:
    """Samples per split, with where they come from.

    Attributes:
        samples: split -> samples.
        notes: split -> half a sentence about its origin.
        warnings: whole sentences.
        unused: samples in no split, because another split holds a copy of them.
    """

    samples: dict[str, list[Sample]]
    notes: dict[str, str]
    warnings: list[str] = field(default_factory=list)
    unused: list[Sample] = field(default_factory=list)

    def sentences(self) -> list[str]:
        """One sentence per split, with its count."""
        return [f"{split}: {len(members):,} images, {self.notes[split]}." for split, members in self.samples.items()]


@dataclass(frozen=True)
class Cut:
    """How to cut what a collection doesn't come with.

    Attributes:
        val_fraction: share of the images for validation, in (0, 1).
        test_fraction: share for the test where the collection came unsplit, in [0, 1).
        seed: seed of the cut.
        group_by: None, "parent", or a regular expression with one group, searched in the sample id.
        check_duplicates: whether to look for byte-identical pictures.
    """

    val_fraction: float = 0.1
    test_fraction: float = 0.1
    seed: int = 0
    group_by: str | None = None
    check_duplicates: bool = True

    def __post_init__(self) -> None:
        """Refuse shares that leave nothing to train on or to select by."""
        val, test = self.val_fraction, self.test_fraction
        if not (0 < val < 1 and 0 <= test < 1 and val + test < 1):
            raise UserError(
                f"val_fraction {val:g} and test_fraction {test:g} leave nothing to validate or to train on: "
                "set --data.val_fraction above 0 and keep their sum below 1"
            )


def make_splits(collection: Collection, cut: Cut) -> Splits:
    """Split a collection, keeping what it came with.

    Raises:
        UserError: if a class has too few images (or groups) to be cut, or a split none of its own.
    """
    given = _merged(collection.given)
    groups, warnings = group_samples(collection, given, cut.group_by, cut.check_duplicates)
    notes = split_origins(collection.given, f", seed {cut.seed}")
    if "all" in given:
        fractions = {"test": cut.test_fraction, "val": cut.val_fraction}
        fractions = {part: share for part, share in fractions.items() if share}
        parts = stratified_cut(given["all"], groups, fractions, cut.seed, collection.class_names)
        return Splits({split: parts[split] for split in SPLITS if split in parts}, notes, warnings)
    if "test" not in given:
        given["test"] = given.pop("val")
    before = given
    given, unused = without_leaks(given, groups, warnings)
    for split, members in given.items():
        lost = {sample.label for sample in before[split]} - {sample.label for sample in members}
        if lost:
            raise UserError(
                f"every {split} image of the class {collection.class_names[min(lost)]!r} is in another split too (as a "
                f"copy, by a link, or by its group), so no score would count: give {split} images of its own"
            )
    if "val" not in given:
        given |= stratified_cut(given["train"], groups, {"val": cut.val_fraction}, cut.seed, collection.class_names)
    return Splits({split: given[split] for split in SPLITS}, notes, warnings, unused)


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
    groups: dict[str, str],
    fractions: dict[str, float],
    seed: int,
    class_names: Sequence[str],
) -> dict[str, list[Sample]]:
    """Cut parts off a list, each with its share of every class; the rest is "train".

    Groups are taken in the order of a hash of (seed, group), so a few added files move few others. Where
    every image is its own group a part gets exactly ``max(1, round(fraction * n))`` of a class's n images.

    Args:
        samples: the images to cut.
        groups: group of a sample id; absent ids are groups of their own.
        fractions: part -> share, in (0, 1).
        seed: seed of the order.
        class_names: names for messages.

    Returns:
        Samples per part and "train", each in the order of ``samples``.

    Raises:
        UserError: if a class can't be in every part.
    """
    sizes: dict[str, Counter[int]] = defaultdict(Counter)
    for sample in samples:
        sizes[groups.get(sample.sample_id, sample.sample_id)][sample.label] += 1
    order = sorted(sizes, key=lambda group: hashlib.sha256(name_bytes(f"{seed}:{group}")).digest())
    by_label: dict[int, list[str]] = defaultdict(list)
    for group in order:
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
    _check_cut(parts, by_label, class_names)
    return parts


def _chosen(free: list[str], sizes: dict[str, Counter[int]], label: int, need: int) -> list[str]:
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


def _check_cut(parts: dict[str, list[Sample]], by_label: dict[int, list[str]], class_names: Sequence[str]) -> None:
    """Every class must be in every part."""
    for part, samples in parts.items():
        present = {sample.label for sample in samples}
        for label, members in by_label.items():
            if label not in present:
                raise UserError(
                    f"class {class_names[label]!r} can't be in each of {', '.join(parts)}: {len(members)} "
                    f"independent images or groups of it leave none for {part}: add some or remove the class"
                )
