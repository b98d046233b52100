"""Tar shards that others made: one pass over their headers finds every image, its class and its split.

Members of one tar belong together if their names agree up to the first dot of the last part: ``a/b.jpg``, ``a/b.cls``
and ``a/b.json`` are the sample ``a/b``. The class is the number (or word) in ``.cls``, or "label" of ``.json``. The
split is the word train, val, validation or test in the name of the tar or of its folder. The index is kept beside the
tars or, where that isn't allowed, in the user's cache, and made anew when a tar has changed.

Sources: webdataset's ``tariterators.py`` (`base_plus_ext`); POSIX.1-2001 pax, "ustar Interchange Format" (two blocks of
zeros end a tar).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from rich.console import Console
from rich.progress import Progress

from moevision.data.contents import is_main_process
from moevision.data.images import IMAGE_SUFFIXES
from moevision.data.shards import INDEX, Index, Rows, Shard, tars_in
from moevision.data.sources import SPLIT_NAMES, SPLITS, Sample, check_distinct, told_apart, words_of
from moevision.data.tables import check_splits
from moevision.errors import UserError
from moevision.files import make_folder
from moevision.names import name_bytes, shown

_KEY: Final = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)")
_LABEL_BYTES: Final = 2**20  # a .json may hold a long caption besides
_WORDNET_KEY: Final = re.compile(r"(?:.*[/_])?(n\d{8})(?:[/_].*)?")
_NAME_FILES: Final = ("classnames.txt", "classes.txt")

Label = int | str


class Member(NamedTuple):
    """One file in a tar: its name, where its bytes begin, and how many they are."""

    name: str
    offset: int
    size: int


class Found(NamedTuple):
    """One image with a label: its key, its member, and the label as it stands there."""

    key: str
    member: Member
    label: Label


@dataclass
class Seen:
    """What was met in all tars: endings of members, and images without a label."""

    endings: Counter[str] = field(default_factory=Counter)
    unlabelled: int = 0
    images: int = 0


def index_others(folder: Path) -> Index:
    """Index tars by their headers, and keep the index; with a progress bar on a terminal.

    Raises:
        UserError: if a tar is damaged or cut short, or there are no images with labels in them.
    """
    tars = tars_in(folder)
    total = sum(tar.stat().st_size for tar in tars)
    quiet = not (is_main_process() and sys.stderr.isatty())
    with Progress(console=Console(stderr=True), transient=True, disable=quiet) as bar:
        task = bar.add_task("reading the tars' headers, once", total=total)
        index = scan(folder, tars, lambda done: bar.update(task, advance=done))
    for place in (folder / INDEX, cache_file(folder)):
        try:
            make_folder(place.parent)
            index.write(place)
            return index
        except OSError:  # not writable; the next place, or again the next time
            continue
    return index


def cache_file(folder: Path) -> Path:
    """Where the index of a folder is kept that can't be written to."""
    name = hashlib.sha256(name_bytes(str(folder.resolve()))).hexdigest()[:32]
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moevision" / "shards" / f"{name}.json"


def has_changed(folder: Path, index: Index, path: Path) -> bool:
    """Whether a tar or the list of class names came, or was written, after the index was, whose file is `path`."""
    scanned_ns = path.stat().st_mtime_ns
    lists = [folder / name for name in _NAME_FILES if (folder / name).is_file()]
    if any(each.stat().st_mtime_ns > scanned_ns for each in lists):
        return True
    known = {shard.file: (shard.bytes, shard.modified_ns) for shard in index.shards}
    return any(known.get(_relative(folder, tar)) != _state(tar) for tar in tars_in(folder))


def _state(tar: Path) -> tuple[int, int]:
    found = tar.stat()
    return found.st_size, found.st_mtime_ns


def _relative(folder: Path, tar: Path) -> str:
    return tar.relative_to(folder).as_posix()


def scan(folder: Path, tars: Sequence[Path], on_progress: Callable[[int], None] = lambda done: None) -> Index:
    """Index tars by their headers; see `index_others`, which keeps the result.

    Args:
        folder: what names are relative to.
        tars: those of the folder.
        on_progress: called with the size in bytes of each tar that is done.
    """
    split_of = _splits_of(folder, tars)
    shards: list[Shard] = []
    given: dict[str, list[tuple[int, Found]]] = defaultdict(list)
    seen = Seen()
    for number, tar in enumerate(tars):
        size, modified = _state(tar)
        shards.append(Shard(_relative(folder, tar), size, modified_ns=modified))
        given[split_of[tar]] += [(number, found) for found in _samples(tar, seen)]
        on_progress(size)
    if not any(given.values()):
        raise UserError(_no_samples(folder, seen))
    values = _values(found.label for rows in given.values() for _, found in rows)
    names = _class_names(folder, list(values), [found for rows in given.values() for _, found in rows])
    splits: dict[str, Rows] = {}
    for split in ("all", *SPLITS):
        for number, (_, member, label) in given.get(split, ()):
            rows = splits.setdefault(split, Rows())
            rows.ids.append(f"{shards[number].file.removesuffix('.tar')}/{member.name}")
            rows.labels.append(values[label])
            rows.shards.append(number)
            rows.offsets.append(member.offset)
            rows.sizes.append(member.size)
    check_distinct(names)
    samples = {
        split: [Sample(*row) for row in zip(rows.ids, rows.labels, strict=True)] for split, rows in splits.items()
    }
    check_splits(samples, names, str(folder))
    notes = []
    if seen.unlabelled:
        notes.append(f"{seen.unlabelled} of {seen.images} images in the tars of {folder} have no label: left out")
    return Index(names, shards, splits, None, notes)


def _splits_of(folder: Path, tars: Sequence[Path]) -> dict[Path, str]:
    """The split of every tar by its folder's name or a word in its own, or "all" for every one."""
    splits: dict[Path, str] = {}
    for tar in tars:
        words = re.findall("[a-z]+", tar.stem.lower()) if tar.parent == folder else [tar.parent.name.lower()]
        found = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
        splits[tar] = found.pop() if len(found) == 1 else "all"
    named = {split for split in splits.values() if split != "all"}
    unnamed = [tar for tar, split in splits.items() if split == "all"]
    if named and unnamed:
        raise UserError(
            f"The name of {unnamed[0]} says no split, and other tars' names do: call all of them by train, val or test "
            "(such as train-0001.tar), or none."
        )
    return splits


# ---- one tar


def members(tar: Path) -> Iterator[Member]:
    """The files in a tar, in order.

    Raises:
        UserError: if it isn't a tar, is compressed, damaged or cut short.
    """
    size = tar.stat().st_size
    try:
        with tarfile.open(tar, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # which tarfile would keep
                if member.issparse():
                    raise UserError(f"{tar} holds a sparse file ({member.name}): make it anew without --sparse.")
                if member.offset_data + member.size > size:
                    break  # said below
                if member.isreg():
                    yield Member(member.name.removeprefix("./"), member.offset_data, member.size)
            end = archive.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        if "end of data" in str(error):
            raise UserError(_cut_short(tar)) from error
        raise UserError(f"{tar} is no uncompressed tar, or is damaged ({error}): unpack or copy it again.") from error
    except OSError as error:
        raise UserError(f"{tar} can't be read ({error.strerror or error}): check its permissions.") from error
    with tar.open("rb") as file:  # tarfile takes whatever isn't a header for the end
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise UserError(_cut_short(tar))
    if any(block):
        raise UserError(f"{tar} is damaged at byte {end:,}, where a header should be: copy it again.")


def _cut_short(tar: Path) -> str:
    return f"{tar} is cut short: it ends after {tar.stat().st_size:,} bytes without a tar's end; copy it again."


def _samples(tar: Path, seen: Seen) -> list[Found]:
    """The images of a tar that have a label."""
    groups: dict[str, dict[str, Member]] = defaultdict(dict)
    for member in members(tar):
        match = _KEY.fullmatch(member.name)
        if match is None or member.name.rpartition("/")[2].startswith("."):
            continue
        key, ending = match[1], match[2].lower()
        seen.endings[ending] += 1
        if ending in groups[key]:
            raise UserError(f"{tar} holds a .{ending} of {key!r} twice: keep one of them.")
        groups[key][ending] = member
    found = []
    with tar.open("rb", buffering=0) as file:

        def read(member: Member) -> bytes:
            file.seek(member.offset)
            return file.read(min(member.size, _LABEL_BYTES))

        for key, parts in groups.items():
            image = next((member for ending, member in parts.items() if f".{ending}" in IMAGE_SUFFIXES), None)
            if image is None:
                continue
            seen.images += 1
            label = _label(parts, read, tar)
            seen.unlabelled += label is None
            if label is not None:
                found.append(Found(key, image, label))
    return found


def _label(parts: Mapping[str, Member], read: Callable[[Member], bytes], tar: Path) -> Label | None:
    """The label of a sample; None without one, and for -1, which stands for a hidden label."""
    if "cls" in parts:
        word = read(parts["cls"]).decode("utf-8", errors="replace").strip()
        label: object = int(word) if re.fullmatch(r"-?\d{1,9}", word) else word
    elif "json" in parts:
        try:
            held = json.loads(read(parts["json"]))
        except ValueError as error:
            raise UserError(f"{tar} holds {parts['json'].name!r}, which is no JSON: mend or remove it.") from error
        label = held.get("label") if isinstance(held, dict) else None
    else:
        return None
    if label is None or label in (-1, ""):
        return None
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise UserError(
            f"{tar}: the label of {next(iter(parts.values())).name!r} is {label!r}; it must be one number or word: one "
            "image has one label."
        )
    return label


def _no_samples(folder: Path, seen: Seen) -> str:
    met = (
        ", ".join(f"{count:,} x .{ending}" for ending, count in seen.endings.most_common(5)) or "no files with endings"
    )
    what = "images but no labels" if seen.images else "no images"
    return (
        f"The tars in {folder} hold {what} ({met}): each image KEY.jpg (or .png, .webp) needs its class beside it, "
        'KEY.cls with a number or KEY.json with "label". `moevision data shard` makes such tars of a folder.'
    )


# ---- classes


def _values(labels: Iterator[Label]) -> dict[Label, int]:
    """The index of every label: numbers in order, or words in order; words if there are both."""
    used = set(labels)
    if all(isinstance(label, int) for label in used):
        return {label: index for index, label in enumerate(sorted(used, key=int))}
    words = sorted({str(label) for label in used})
    return {label: words.index(str(label)) for label in used}


def _class_names(folder: Path, labels: Sequence[Label], samples: Sequence[Found]) -> list[str]:
    """Names in words: the labels, a list of names beside the tars, WordNet ids in the keys, or the numbers."""
    if not all(isinstance(label, int) for label in labels):
        return words_of(sorted({str(label) for label in labels}))
    for name in _NAME_FILES:
        if (folder / name).is_file():
            names = (folder / name).read_text(encoding="utf-8", errors="replace").splitlines()
            if len(names) <= max(map(int, labels)):
                raise UserError(
                    f"{folder / name} has {len(names)} names, and there is a label {max(map(int, labels))}: give every "
                    "class a line, from label 0 on."
                )
            return told_apart([shown(names[int(label)].strip()) for label in labels], labels)
    ids: dict[Label, set[str]] = defaultdict(set)
    for key, _, label in samples:
        if match := _WORDNET_KEY.fullmatch(key):
            ids[label].add(match[1])
    if all(len(ids[label]) == 1 for label in labels) and len(set().union(*ids.values())) == len(labels):
        return words_of([next(iter(ids[label])) for label in labels])
    return [str(label) for label in labels]
