"""A folder of images: one subfolder per class, with or without train / val / test above them.

Any other layout raises a `UserError` that says what to change. Symbolic links are followed, since many datasets consist
of links to a store. Each folder is entered once, so circular links end, and a link to a folder that contains it is
ignored. Within a class a link to a file that the class has already is left out; ``splits.py`` handles what is in
several classes or splits. Hard links count as separate, byte-identical files, as after a copy to another disk.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from moevision.data.collection import (
    SPLIT_NAMES,
    SPLITS,
    FileCollection,
    Sample,
    check_distinct,
    check_same_classes,
    differ_in_case,
    file_identity,
    quoted_names,
    readable_class_names,
)
from moevision.data.images import is_image_path
from moevision.errors import UserError

_LAYOUT = "expected one subfolder per class (cat/1.jpg, dog/7.jpg, ...), or train/ and val/ or test/ of such"


def read_folder(root: Path) -> FileCollection:
    """Read a folder-per-class dataset, with or without train / val / test (an unsplit folder has the key "all")."""
    if not root.is_dir():
        raise UserError(_missing_folder(root))
    notes: list[str] = []
    links: Counter[str] = Counter()
    splits = split_folders(root)
    files = {
        split: _class_files(folder, root, notes, links)
        for split, folder in (splits or {"all": root}).items()
    }
    train_folder = splits.get("train", root)
    classes = files["train" if splits else "all"]
    if splits:
        notes += _folders_beside_train(root, splits)
        if "test" in files and not files["test"]:
            notes.append(f"{splits['test']} has no class folders, so it can't be used for testing")
            del files["test"]
    _check_classes(train_folder, classes, notes)
    for split, folder in splits.items():
        if split in files:
            filled = [name for name, class_files in files[split].items() if class_files]
            check_same_classes(train_folder, classes, folder, filled)

    class_folders = sorted(classes)
    notes += differ_in_case(class_folders)
    if not splits:
        notes += _classes_like_splits(root, class_folders)
    samples = {split: _labelled(class_files, class_folders) for split, class_files in files.items()}
    check_distinct(class_folders)
    check_distinct(sample.sample_id for sample in chain.from_iterable(samples.values()))
    if links["repeated"]:
        notes.append(
            f"{links['repeated']} links in {root} were left out: they lead to a folder that holds them, or to what "
            "their class has already"
        )
    if links["unreadable"]:
        notes.append(
            f"{links['unreadable']} folders in {root} can't be read, and their images were left out: permit it"
        )
    return FileCollection(readable_class_names(class_folders), samples, notes, root=root)


def _labelled(class_files: dict[str, list[str]], class_folders: list[str]) -> list[Sample]:
    """The files of all classes; a label is the class folder's place in the list."""
    samples = []
    for label, name in enumerate(class_folders):
        samples += [Sample(file, label) for file in class_files[name]]
    return samples


def _folders_beside_train(root: Path, splits: dict[str, Path]) -> list[str]:
    """A sentence on folders of images beside those of the splits, if there are any."""
    others = [
        folder.name
        for folder in subfolders(root)
        if folder not in splits.values() and _holds_images(folder)
    ]
    if not others:
        return []
    return [
        f"{root} has the folders {', '.join(others)} beside train, which were left out: call a validation set val and "
        "a test set test"
    ]


def _classes_like_splits(root: Path, class_folders: list[str]) -> list[str]:
    """A sentence on classes such as training_set and test_set, which are alike without the split's name."""
    split_name = re.compile("|".join(sorted(SPLIT_NAMES, reverse=True)))
    patterns = {name: split_name.sub("*", name.lower(), count=1) for name in class_folders}
    counts = Counter(patterns.values())
    alike = [name for name, pattern in patterns.items() if "*" in pattern and counts[pattern] > 1]
    if not alike:
        return []
    return [
        f"{root} has the folders {quoted_names(alike)}, which were taken for classes: if they are splits, call them "
        "train, val or test"
    ]


def subfolders(folder: Path) -> list[Path]:
    """Subfolders in order, without hidden and system ones (__MACOSX, @eaDir) and links to a folder that holds them."""
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.is_dir() and entry.name[0] not in "._@" and not _leads_up(entry)
    )


def split_folders(root: Path) -> dict[str, Path]:
    """The train / val / test folders of a dataset that came split; empty if it did not.

    A folder "train" that holds images and no folders is a class of that name (trains exist).
    """
    folders: dict[str, Path] = {}
    for folder in subfolders(root):
        split = SPLIT_NAMES.get(folder.name.lower())
        if split in folders:
            raise UserError(
                f"{folders[split]} and {folder} both stand for {split}: keep one of them"
            )
        if split:
            folders[split] = folder
    if "train" not in folders or not subfolders(folders["train"]):
        return {}
    return {split: folders[split] for split in SPLITS if split in folders}


def walk(folder: Path, links: Counter[str] | None = None) -> Iterator[os.DirEntry[str]]:
    """Every file below a folder, with each subfolder entered once, whatever links lead to it.

    What is reached without a link comes first, so that a link never takes the place of a real path. Hidden subfolders
    are left out, and so are folders above `folder`: a link to one of them goes in a circle. `links` counts the links
    that lead nowhere new, `repeated`, and the folders that are `unreadable`.
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
            except OSError:
                links["unreadable"] += 1
                continue
            for entry in entries:
                if not _is_folder(entry):
                    yield entry
                elif entry.name[0] in ".@":
                    continue
                elif entry.is_symlink():
                    waiting.append(entry.path)
                else:
                    below.append(entry.path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _leads_up(entry: Path) -> bool:
    return (
        entry.is_symlink()
        and entry.is_dir()
        and entry.parent.resolve().is_relative_to(entry.resolve())
    )


def _holds_images(folder: Path) -> bool:
    return any(is_image_path(entry.name) for entry in walk(folder))


def _class_files(
    folder: Path, root: Path, notes: list[str], links: Counter[str]
) -> dict[str, list[str]]:
    """Image files of every class folder, searched to any depth, as sorted paths relative to ``root``.

    ``links`` counts those that led to nothing new, and folders that can't be read.
    """
    classes: dict[str, list[str]] = {}
    other_files: list[str] = []
    prefix = "" if root == Path() else os.path.join(root, "")
    loose = 0
    for entry in sorted(folder.iterdir()):
        links["repeated"] += _leads_up(entry)
        loose += is_image_path(entry) and entry.is_file()
        if entry.is_symlink() and not entry.exists() and not entry.suffix:
            notes.append(f"{entry} is a link to a folder that isn't there, and was left out")
        elif _is_left_out(entry):
            notes.append(f"{entry} begins with _ and was left out: rename it to use it as a class")
    for class_folder in subfolders(folder):
        images = []
        for file in walk(class_folder, links):
            if is_image_path(file.name):
                images.append(file)
            else:
                other_files.append(file.name)
        paths = _distinct_files(images)
        links["repeated"] += len(images) - len(paths)
        relative = [path.removeprefix(prefix).replace(os.sep, "/") for path in paths]
        classes[class_folder.name] = sorted(relative)
    notes += unread_formats(folder, other_files)
    if classes and loose:
        notes.append(f"{loose} images directly in {folder} belong to no class and were left out")
    return classes


def _is_left_out(entry: Path) -> bool:
    if entry.name[0] != "_" or entry.name == "__MACOSX":
        return False
    return entry.is_dir() and _holds_images(entry)


def _distinct_files(images: list[os.DirEntry[str]]) -> list[str]:
    """The paths, without links to a file that is among the others or behind an earlier link."""
    linked = sorted(entry.path for entry in images if entry.is_symlink())
    paths = [entry.path for entry in images if not entry.is_symlink()]
    if linked:
        identities = set(map(file_identity, paths))
        for path in linked:
            if file_identity(path) not in identities:
                identities.add(file_identity(path))
                paths.append(path)
    return paths


def unread_formats(folder: Path, names: Iterable[str]) -> list[str]:
    """A sentence on the files of formats that aren't read, such as a phone's; none if all of them are hidden."""
    suffixes = Counter(Path(name).suffix.lower() or name for name in names if name[0] != ".")
    if not suffixes:
        return []
    counts = ", ".join(f"{count} x {suffix}" for suffix, count in suffixes.most_common(5))
    return [
        f"files in {folder} of formats that aren't read were left out: {counts}; convert photos to JPEG or PNG"
    ]


def _check_classes(folder: Path, classes: dict[str, list[str]], notes: list[str]) -> None:
    """At least two class folders, none of them empty; else ``notes`` say what was left out."""
    why = "".join(f"; {note}" for note in notes)
    if not any(classes.values()):
        loose = sum(is_image_path(entry) for entry in folder.iterdir())
        inside = f"holds {loose} images but no class folders" if loose else "holds no images"
        raise UserError(f"{folder} {inside}: {_LAYOUT}{why}")
    if SPLIT_NAMES.keys() >= set(map(str.lower, classes)):
        raise UserError(
            f"{folder} has the folders {quoted_names([*classes])} and no classes: make a folder per class inside each, "
            "train among them (train/cat/1.jpg, test/cat/7.jpg), or give one that has them"
        )
    if len(classes) == 1:
        only = folder / next(iter(classes))
        inner = [entry.name for entry in subfolders(only)]
        hint = _LAYOUT
        if len(inner) > 1:
            hint = f"did you mean {only} (it holds {quoted_names(inner)})?"
        raise UserError(
            f"{folder} has only one class folder, {only.name!r}, and a classifier needs two: {hint}"
        )
    empty = [name for name, files in classes.items() if not files]
    if empty:
        raise UserError(
            f"no images in the class folder {quoted_names(empty)} of {folder}: fill or remove it{why}"
        )


def _missing_folder(root: Path) -> str:
    """What to say when ``root`` is no folder: what is there instead, and which names look alike."""
    if root.suffix.lower() in (".yaml", ".yml") and root.is_file():
        return f"{root} is a configuration: give it by --config {root}"
    if root.is_file():
        return f"{root} is a file: unpack it and give the folder, {_LAYOUT}"
    parent = root.absolute().parent
    while not parent.is_dir():
        parent = parent.parent
    folders = [entry.name for entry in subfolders(parent)]
    alike = difflib.get_close_matches(root.name, folders, n=1)
    if alike:
        hint = f"did you mean {parent / alike[0]}?"
    elif folders:
        hint = f"{parent} has the folders {quoted_names(folders)}"
    else:
        hint = f"{parent} has no folders"
    return f"there is no folder {root}: {hint}; {_LAYOUT}"
