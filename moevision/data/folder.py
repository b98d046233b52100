"""A dataset that is a folder: one subfolder per class, with or without train / val / test above them.

Any other layout raises a `UserError` that says what to change.

Symbolic links are followed, since many datasets consist of links to a store. Each folder is entered once, so circular
links end, and a link to a folder that contains it is ignored. Within a class a link to a file that the class has
already is left out; ``splits.py`` handles what is in several classes or splits. Hard links count as separate,
byte-identical files, as they would after a copy to another disk.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from moevision.data.images import is_image_path
from moevision.data.sources import SPLITS, FileCollection, Sample, file_identity
from moevision.errors import UserError
from moevision.names import csv_name, shown

_SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_WORDNET_ID = re.compile(r"n\d{8}")
_LAYOUT = "expected one subfolder per class (cat/1.jpg, dog/7.jpg, ...), or train/ and val/ or test/ of such"


def words_of(class_folders: list[str]) -> list[str]:
    """Class names in words: WordNet ids become their first lemma (n01440764 -> tench), others are shown names.

    Two ids with one lemma (ImageNet has two "crane"s) keep their id in brackets.
    """
    if not all(_WORDNET_ID.fullmatch(name) for name in class_folders):
        return list(map(shown, class_folders))
    from timm.data import ImageNetInfo  # timm is needed for nothing else in this package

    info = ImageNetInfo("imagenet-22k")
    known = set(info.label_names())
    lemmas = [info.label_name_to_description(name).split(",")[0] if name in known else name for name in class_folders]
    count = Counter(lemmas)
    return [
        lemma if count[lemma] == 1 else f"{lemma} ({name})" for lemma, name in zip(lemmas, class_folders, strict=True)
    ]


def read_folder(root: Path) -> FileCollection:
    """Read a folder-per-class dataset, with or without train / val / test subfolders.

    Args:
        root: the dataset's folder.

    Returns:
        The collection; ``given`` has the key "all" for an unsplit folder.

    Raises:
        UserError: if the folder is missing, empty or laid out otherwise; the sentence says what to change.
    """
    if not root.is_dir():
        raise UserError(_missing_folder(root))
    splits = _split_folders(root)
    notes: list[str] = []
    links: Counter[str] = Counter()
    if not splits:
        classes = _class_files(root, root, notes, links)
        _check_classes(root, classes)
        given = {"all": classes}
    else:
        given = {split: _class_files(folder, root, notes, links) for split, folder in splits.items()}
        if "test" in given and not given["test"]:
            notes.append(f"{splits['test']} has no class folders, so it can't be used for testing")
            del given["test"]
        classes = given["train"]
        _check_classes(splits["train"], classes)
        for split, found in given.items():
            _check_same_classes(splits["train"], classes, splits[split], found)
    folders = sorted(classes)
    samples = {
        split: [Sample(file, label) for label, name in enumerate(folders) for file in found[name]]
        for split, found in given.items()
    }
    _check_distinct(folders)
    _check_distinct([sample.sample_id for members in samples.values() for sample in members])
    if links["repeated"]:
        notes.append(
            f"{links['repeated']} links in {root} were left out: they lead to a folder that holds them, or to what "
            "their class has already"
        )
    return FileCollection(words_of(folders), samples, notes, root, has_links=links["met"] > 0)


def _subfolders(folder: Path) -> list[Path]:
    """Subfolders in order, without hidden and system ones (__MACOSX, @eaDir) and links to a folder that holds them."""
    return sorted(
        entry for entry in folder.iterdir() if entry.is_dir() and entry.name[0] not in "._@" and not _leads_up(entry)
    )


def _leads_up(entry: Path) -> bool:
    """Whether it is a link to a folder that holds it."""
    return entry.is_symlink() and entry.is_dir() and entry.parent.resolve().is_relative_to(entry.resolve())


def walk(folder: Path, links: Counter[str] | None = None) -> Iterator[os.DirEntry[str]]:
    """Every file below a folder, with each subfolder entered once, whatever links lead to it.

    What is reached without a link comes first, so that a link never takes the place of a real path. Hidden subfolders
    are left out, and so are folders above `folder`: a link to one of them goes in a circle.

    Args:
        folder: where to start.
        links: counts the links to subfolders: `met` all of them, `repeated` those that lead nowhere new.
    """
    links = Counter() if links is None else links
    entered = {file_identity(above) for above in folder.resolve().parents}
    waiting = [str(folder)]  # the folder itself, then links to others
    while waiting:
        below = [waiting.pop(0)]
        if file_identity(below[0]) in entered:
            links["repeated"] += 1
        while below:
            directory = below.pop()
            identity = file_identity(directory)
            if identity in entered:
                continue
            entered.add(identity)
            try:
                entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
            except OSError:  # not readable
                continue
            for entry in entries:
                if not _is_folder(entry):
                    yield entry
                elif entry.name[0] in ".@":
                    continue
                elif entry.is_symlink():
                    links["met"] += 1
                    waiting.append(entry.path)
                else:
                    below.append(entry.path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _split_folders(root: Path) -> dict[str, Path]:
    """The train / val / test folders of a dataset that came split; empty if it did not.

    A folder "train" that holds images and no folders is a class of that name (trains exist).
    """
    found: dict[str, Path] = {}
    for folder in _subfolders(root):
        split = _SPLIT_FOLDERS.get(folder.name.lower())
        if split in found:
            raise UserError(f"{found[split]} and {folder} both stand for {split}: keep one of them")
        if split:
            found[split] = folder
    if "train" not in found or not _subfolders(found["train"]):
        return {}
    return {split: found[split] for split in SPLITS if split in found}


def _class_files(folder: Path, root: Path, notes: list[str], links: Counter[str]) -> dict[str, list[str]]:
    """Image files of every class folder, searched to any depth, as sorted paths relative to ``root``.

    ``links`` counts the links that were met, and those that led to nothing new.
    """
    classes: dict[str, list[str]] = {}
    ignored: Counter[str] = Counter()
    above = 0 if root == Path() else len(os.path.join(root, ""))
    links["met"] += folder.is_symlink()
    links["repeated"] += sum(map(_leads_up, folder.iterdir()))
    for class_folder in _subfolders(folder):
        links["met"] += class_folder.is_symlink()
        real: list[str] = []
        linked: list[str] = []
        for entry in walk(class_folder, links):
            if is_image_path(entry.name):
                (linked if entry.is_symlink() else real).append(entry.path)
            elif not entry.name.startswith("."):
                ignored[Path(entry.name).suffix.lower() or entry.name] += 1
        files = real + _others(linked, real)
        links["met"] += len(linked)
        links["repeated"] += len(real) + len(linked) - len(files)
        classes[class_folder.name] = sorted(file[above:].replace(os.sep, "/") for file in files)
    if ignored:
        kinds = ", ".join(f"{count} x {suffix}" for suffix, count in ignored.most_common(5))
        notes.append(f"files in {folder} that are not images were left out: {kinds}")
    loose = sum(is_image_path(entry) for entry in folder.iterdir() if entry.is_file())
    if classes and loose:
        notes.append(f"{loose} images directly in {folder} belong to no class and were left out")
    return classes


def _others(linked: list[str], real: list[str]) -> list[str]:
    """The links to files that are neither among the real ones nor behind an earlier link."""
    found = set(map(file_identity, real)) if linked else set()
    others = []
    for path in sorted(linked):
        if (identity := file_identity(path)) not in found:
            found.add(identity)
            others.append(path)
    return others


def _check_distinct(names: list[str]) -> None:
    """Names must differ when they are written into a file, too."""
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(csv_name(name), name)
        if other != name:
            raise UserError(f"{other!r} and {name!r} look the same when they are written down: rename one of them")


def _check_classes(folder: Path, classes: dict[str, list[str]]) -> None:
    """At least two class folders, none of them empty."""
    if not any(classes.values()):
        loose = sum(is_image_path(entry) for entry in folder.iterdir())
        inside = f"holds {loose} images but no class folders" if loose else "holds no images"
        raise UserError(f"{folder} {inside}: {_LAYOUT}")
    if len(classes) == 1:
        only = folder / next(iter(classes))
        inner = [entry.name for entry in _subfolders(only)]
        hint = f"did you mean {only} (it holds {_some(inner)})?" if len(inner) > 1 else _LAYOUT
        raise UserError(f"{folder} has only one class folder, {only.name!r}, and a classifier needs two: {hint}")
    empty = [name for name, files in classes.items() if not files]
    if empty:
        raise UserError(f"no images in the class folder {_some(empty)} of {folder}: fill or remove it")


def _check_same_classes(train: Path, classes: dict[str, list[str]], other: Path, found: dict[str, list[str]]) -> None:
    """Each split must hold every class, else its score would mean something else than the training's."""
    missing = sorted(name for name in classes if not found.get(name))
    if missing:
        raise UserError(f"{other} has no images of the class {_some(missing)}, which {train} has: add some there")
    surplus = sorted(set(found) - set(classes))
    if surplus:
        raise UserError(f"{other} has the class {_some(surplus)}, which {train} lacks: add it there or remove it")


def _some(names: list[str], limit: int = 5) -> str:
    """The first names, quoted, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _missing_folder(root: Path) -> str:
    """What to say when ``root`` is no folder: what is there instead, and which names look alike."""
    if root.is_file():
        return f"{root} is a file: unpack it and give the folder, {_LAYOUT}"
    parent = root.absolute().parent
    while not parent.is_dir():
        parent = parent.parent
    folders = [entry.name for entry in _subfolders(parent)]
    alike = difflib.get_close_matches(root.name, folders, n=1)
    if alike:
        nearby = f"did you mean {parent / alike[0]}?"
    else:
        nearby = f"{parent} has " + (f"the folders {_some(folders)}" if folders else "no folders")
    return f"there is no folder {root}: {nearby}; {_LAYOUT}"
