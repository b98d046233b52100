"""Images that must stay on one side of a split: byte-identical copies, links to one file, and files of one group.

A copy of a training picture in the test set is rewarded for memory, and so is a second photo of the same
patient, video or scene. 3.3 % of CIFAR-10's test images have a near-duplicate in its training set
(arXiv:1902.00423); only exact copies are found here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence

from moevision.data.sources import Collection, Sample
from moevision.errors import UserError


def group_samples(
    collection: Collection, given: dict[str, list[Sample]], group_by: str | None, check_duplicates: bool
) -> tuple[dict[str, str], list[str]]:
    """Group of every sample id that isn't a group of its own, and warnings about contradictory copies."""
    samples = [sample for part in given.values() for sample in part]
    group_of = _named_groups(samples, group_by)
    warnings: list[str] = []
    parent: dict[str, str] = {}

    def root(group: str) -> str:
        while group in parent:
            group = parent[group]
        return group

    contradictions = []
    for copies in identical(collection, samples) if check_duplicates else _alike(samples, [collection.identity]):
        if len({sample.label for sample in copies}) > 1:
            contradictions.append(copies[0].sample_id)
        keys = [group_of.setdefault(sample.sample_id, sample.sample_id) for sample in copies]
        for key in keys[1:]:
            first, other = root(keys[0]), root(key)
            if first != other:
                parent[other] = first
    if contradictions:
        warnings.append(
            f"{len(contradictions)} pictures stand in several classes as byte-identical files or links (for example "
            f"{contradictions[0]}): keep each in its right class"
        )
    return {sample_id: root(group) for sample_id, group in group_of.items()}, warnings


def _named_groups(samples: Sequence[Sample], group_by: str | None) -> dict[str, str]:
    """Groups by the parent folder or by a regular expression; keys can't collide with sample ids."""
    if group_by is None:
        return {}
    if group_by == "parent":
        return {sample.sample_id: f"//{sample.sample_id.rpartition('/')[0]}" for sample in samples}
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise UserError(f"--data.group_by {group_by!r} is not a regular expression: {error}") from error
    if pattern.groups != 1:
        raise UserError(f"--data.group_by {group_by!r} must have exactly one (group), it has {pattern.groups}")
    groups = {}
    for sample in samples:
        match = pattern.search(sample.sample_id)
        if match is None:
            raise UserError(
                f"--data.group_by {group_by!r} does not match {sample.sample_id!r}: let it match every path"
            )
        groups[sample.sample_id] = f"//{match.group(1)}"
    return groups


def identical(collection: Collection, samples: Iterable[Sample]) -> list[list[Sample]]:
    """Sets of two or more byte-identical samples; only samples of equal size are read, large ones twice."""
    # empty files are equal, and no pictures
    stored = [sample for sample in samples if collection.size_bytes(sample) > 0]
    return _alike(stored, (collection.size_bytes, collection.probe, collection.digest))


def _alike(samples: list[Sample], keys: Sequence[Callable[[Sample], Hashable]]) -> list[list[Sample]]:
    """Sets of two or more samples that agree in every key; the next key is asked only of those that agree so far."""
    sets = [samples]
    for key in keys:
        finer: list[list[Sample]] = []
        for members in sets:
            buckets: dict[Hashable, list[Sample]] = defaultdict(list)
            for sample in members:
                buckets[key(sample)].append(sample)
            finer += [bucket for bucket in buckets.values() if len(bucket) > 1]
        sets = finer
    return sets


def without_leaks(
    given: dict[str, list[Sample]], groups: dict[str, str], warnings: list[str]
) -> tuple[dict[str, list[Sample]], list[Sample]]:
    """Drop from train what val or test hold too, and from val what test holds; return the dropped as well."""
    kept: dict[str, list[Sample]] = {}
    unused: list[Sample] = []
    reserved: dict[str, str] = {}
    for split in ("test", "val", "train"):
        if split not in given:
            continue
        kept[split] = []
        dropped: list[Sample] = []
        for sample in given[split]:
            leaks = sample.sample_id in groups and groups[sample.sample_id] in reserved
            (dropped if leaks else kept[split]).append(sample)
        unused += dropped
        if dropped:
            others = sorted({reserved[groups[sample.sample_id]] for sample in dropped})
            warnings.append(
                f"{len(dropped)} {split} images are not used: byte-identical copies, links to them, or files of their "
                f"group, are in {' and '.join(others)} (for example {dropped[0].sample_id})"
            )
        for sample in kept[split]:
            if sample.sample_id in groups:
                reserved.setdefault(groups[sample.sample_id], split)
    return kept, unused
