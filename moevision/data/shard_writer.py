"""Write a dataset as tar shards with an index: atomically, resumable, the same bytes each time.

The plan (which image goes where) follows from the dataset alone. Images go into the shards of their split in the order
of a hash of their names, since other programs read shards from front to back; the index keeps the dataset's own order,
and an image's key is its place in it. A shard is written beside its name and renamed when it is on the disk; then the
journal says its SHA-256 and what it was made from. Started again, the writer keeps each shard that was made from the
same images and still has its hash, and writes the others. The index takes the journal's place at the end, so that a
folder with an index is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

from moevision.data import shard_scan
from moevision.data.images import BadImageError
from moevision.data.shards import INDEX, JOURNAL, Index, Rows, Shard, read_index
from moevision.data.sources import Collection, DrawnCollection, FileCollection, Sample
from moevision.errors import UserError
from moevision.files import (
    file_sha256,
    make_folder,
    remove_leftovers,
    sync_folder,
    write_bytes_atomic,
    write_json_atomic,
)
from moevision.names import name_bytes

_ENDINGS: Final = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG", "png"),
    (b"RIFF", "webp"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\x00", "tif"),
    (b"MM\x00*", "tif"),
)
_OWN_NAME: Final = re.compile(r"(all|train|val|test)-\d{5,}\.tar")  # nothing else is ever deleted
_JOURNAL_MARK: Final = "moevision_unfinished_shards"


class Planned(NamedTuple):
    """One image of a shard: its place in the dataset's order of its split, which is its key too, and the image."""

    place: int
    sample: Sample


@dataclass
class ShardPlan:
    """One shard to be.

    Attributes:
        file: its name.
        split: where its images belong.
        images: in the order in which they are written.
        made_from: SHA-256 over names, labels, sizes and times of change of its images.
    """

    file: str
    split: str
    images: list[Planned]
    made_from: str


@dataclass(frozen=True)
class Written:
    """What `write_shards` did.

    Attributes:
        index: of the finished folder.
        kept: shards that were there, whole and made from the same images.
        changed: files that had been finished before, and no longer had their hash.
    """

    index: Index
    kept: int
    changed: list[str]


def write_shards(
    collection: Collection,
    out: Path,
    *,
    shard_bytes: int = 256 * 2**20,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Written:
    """Write a dataset as shards, or go on with that.

    Args:
        collection: the dataset.
        out: a new folder, or one that this function has written to.
        shard_bytes: a shard is closed when its images have so many bytes.
        on_progress: called with the number of images that are done since the last call.

    Raises:
        UserError: if the folder holds something else or can't be written to, or an image can't be read.
    """
    if isinstance(collection, DrawnCollection):
        raise UserError("synthetic_pets is drawn when it is opened: there are no files to put into shards.")
    try:
        before = _begin(out)
        plans = plan_shards(collection, shard_bytes)
        kept, changed = _whole(out, plans, before, on_progress)
        if (out / INDEX).exists() and len(kept) < len(plans):  # no longer true from here on
            _write_journal(out, before)
            (out / INDEX).unlink()
        done = dict(kept)
        for plan in plans:
            if plan.file not in done:
                done[plan.file] = _write_shard(collection, plan, out, on_progress)
                _write_journal(out, {**before, **done})
        for name in before.keys() - done.keys():
            (out / name).unlink(missing_ok=True)
        index = _make_index(collection, plans, [done[plan.file] for plan in plans], out)
        index.write(out / INDEX)
        (out / JOURNAL).unlink(missing_ok=True)
        sync_folder(out)
    except OSError as error:
        raise UserError(
            f"{error.filename or out} can't be read or written ({error.strerror or error}): mend that and start again; "
            "finished shards are kept."
        ) from error
    return Written(index, len(kept), changed)


def _begin(out: Path) -> dict[str, Shard]:
    """What was finished before, by name; makes the folder.

    Raises:
        UserError: if the folder holds something else.
    """
    make_folder(out)
    remove_leftovers(out)
    if (out / JOURNAL).is_file():
        try:
            held = json.loads((out / JOURNAL).read_text(encoding="utf-8"))[_JOURNAL_MARK]
            return {shard["file"]: Shard(**shard) for shard in held if _OWN_NAME.fullmatch(shard["file"])}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{out / JOURNAL} is damaged: delete it to write every shard anew.") from error
    if (out / INDEX).is_file():
        index = read_index(out / INDEX)
        if not index.scanned:
            return {shard.file: shard for shard in index.shards if _OWN_NAME.fullmatch(shard.file)}
    if any(out.iterdir()):
        raise UserError(f"{out} holds something else: give --out a new folder.")
    _write_journal(out, {})  # from now on the folder is known as ours, whatever a kill leaves in it
    return {}


def _write_journal(out: Path, done: dict[str, Shard]) -> None:
    write_json_atomic(out / JOURNAL, {_JOURNAL_MARK: [asdict(shard) for shard in done.values()]})


# ---- the plan


def plan_shards(collection: Collection, shard_bytes: int) -> list[ShardPlan]:
    """Which image goes into which shard; see the head of this file."""
    plans: list[ShardPlan] = []
    for split, samples in collection.given.items():
        planned = [Planned(*each) for each in enumerate(samples)]
        planned.sort(key=lambda each: hashlib.sha256(name_bytes(each.sample.sample_id)).digest())
        for number, images in enumerate(_parts(collection, planned, shard_bytes)):
            made_from = hashlib.sha256(split.encode())
            for image in images:
                facts = (image.place, *image.sample, *_state(collection, image.sample))
                made_from.update(name_bytes(json.dumps(facts)))
            plans.append(ShardPlan(f"{split}-{number:05d}.tar", split, images, made_from.hexdigest()))
    return plans


def _parts(collection: Collection, planned: list[Planned], shard_bytes: int) -> Iterator[list[Planned]]:
    """The images of every shard."""
    part: list[Planned] = []
    size = 0
    for image in planned:
        part.append(image)
        size += collection.size_bytes(image.sample)
        if size >= shard_bytes:
            yield part
            part, size = [], 0
    if part:
        yield part


def _state(collection: Collection, sample: Sample) -> tuple[int, int]:
    """Size and time of change of an image; 0 as the time where there are no files."""
    if isinstance(collection, FileCollection):
        found = os.stat(collection.root / sample.sample_id)
        return found.st_size, found.st_mtime_ns
    return collection.size_bytes(sample), 0


def _whole(
    out: Path, plans: list[ShardPlan], before: dict[str, Shard], on_progress: Callable[[int], None]
) -> tuple[dict[str, Shard], list[str]]:
    """The finished shards that can be kept, by name, and those that were damaged since."""
    kept: dict[str, Shard] = {}
    changed: list[str] = []
    for plan in plans:
        shard = before.get(plan.file)
        if shard is None or shard.plan != plan.made_from:
            continue
        file = out / plan.file
        if file.is_file() and file.stat().st_size == shard.bytes and file_sha256(file) == shard.sha256:
            kept[plan.file] = shard
            on_progress(len(plan.images))
        else:
            changed.append(plan.file)
    return kept, changed


# ---- one shard


def _write_shard(collection: Collection, plan: ShardPlan, out: Path, on_progress: Callable[[int], None]) -> Shard:
    digest, size = hashlib.sha256(), 0

    def parts() -> Iterator[bytes]:
        nonlocal size
        for part in _tar_parts(collection, plan, on_progress):
            digest.update(part)
            size += len(part)
            yield part

    write_bytes_atomic(out / plan.file, parts())
    return Shard(plan.file, size, digest.hexdigest(), plan.made_from)


def _tar_parts(collection: Collection, plan: ShardPlan, on_progress: Callable[[int], None]) -> Iterator[bytes]:
    """The bytes of a tar: the same for the same images, whoever writes it and when."""
    size = 0
    for place, sample in plan.images:
        try:
            data = collection.stored(sample)
        except (OSError, BadImageError) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            raise UserError(
                f"The image {sample.sample_id} can't be read ({reason}): mend or remove it and start again; finished "
                "shards are kept."
            ) from error
        key = f"{place:08d}"
        part = _member(f"{key}.cls", str(sample.label).encode()) + _member(f"{key}.{_ending(data, sample)}", data)
        size += len(part)
        yield part
        on_progress(1)
    # Two blocks of zeros are the end, and tar fills its last record.
    yield bytes(-(-(size + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE - size)


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def _ending(data: bytes, sample: Sample) -> str:
    """What the first bytes say, as `safe_open` goes by them; of damaged ones the file's own ending."""
    own = PurePosixPath(sample.sample_id).suffix.lower().removeprefix(".")
    return next((ending for magic, ending in _ENDINGS if data.startswith(magic)), own or "jpg")


def _make_index(collection: Collection, plans: list[ShardPlan], shards: list[Shard], out: Path) -> Index:
    """The index, with the places of the images as the tars' headers say them."""
    columns = {name: collection.column(name) or {} for name in collection.column_names()}
    splits: dict[str, Rows] = {}
    for split, samples in collection.given.items():
        ids, n = [sample.sample_id for sample in samples], len(samples)
        rows = Rows(ids, [sample.label for sample in samples], [0] * n, [0] * n, [0] * n)
        rows.columns = {name: [values.get(each, "") for each in ids] for name, values in columns.items()}
        splits[split] = rows
    for number, plan in enumerate(plans):
        rows = splits[plan.split]
        places = set()
        for member in shard_scan.members(out / plan.file):
            key, _, ending = member.name.partition(".")
            if ending != "cls":
                place = int(key)
                places.add(place)
                rows.shards[place], rows.offsets[place], rows.sizes[place] = number, member.offset, member.size
        if places != {image.place for image in plan.images}:
            raise UserError(f"{out / plan.file} was changed while it was written: start again.")
    return Index(collection.class_names, shards, splits, collection.group_column)
