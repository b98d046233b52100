"""A folder of images: one subfolder per class, with or without train / val / test above them.

Any other layout raises a `UserError` that says what to change.

Symbolic links are followed, since many datasets consist of links to files stored elsewhere. Each folder is entered only
once, so circular links do no harm, and a link to a folder that contains the link is ignored. Within a class, a link to
a file that is already in the class is left out; ``splits.py`` handles files that are in several classes or splits. Hard
links count as separate, byte-identical files, which is what they become in a copy on another disk.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from moevision.data.collection import (
    SPLIT_NAMES,
    SPLITS,
    FileCollection,
    Sample,
    check_distinct,
    class_differences,
    differ_in_case,
    explain_access_errors,
    file_identity,
    quoted_names,
    readable_class_names,
)
from moevision.data.images import is_image_path
from moevision.errors import UserError
from moevision.words import shell_word

HF = "hf:"  # prefix of `--data` for datasets on huggingface.co
# By name, as `moevision.data.named` reads them; here, since folders are checked before torch is imported.
DATASET_NAMES = (
    "emoji",
    "emoji_kinds",
    "synthetic_pets",
    "cifar10",
    "imagenette",
    "pets",
    "pets_cat_dog",
    "imagenet",
)
# Files that Hugging Face's `save_to_disk` writes.
_SAVED_DATASET = ("dataset_dict.json", "state.json")
# The end of an error message: the layouts that can be read.
_LAYOUT = "expected one subfolder per class (cat/1.jpg, dog/7.jpg, ...), or train/ and val/ or test/ of such"


def fetching(name: str, root: str | Path = "data") -> str:
    """The command that downloads a dataset, for messages of all commands: only `fit` downloads."""
    where = "" if str(root) == "data" else f" --data.root {shell_word(str(root))}"
    return f"`moevision fit {name} --data.download true{where}`"


def is_saved_dataset(location: Path) -> bool:
    """Whether a folder holds what Hugging Face's `save_to_disk` writes."""
    return any((location / name).is_file() for name in _SAVED_DATASET)


def check_images(path: str) -> None:
    """Raise a UserError for a folder that can't be trained on, without torch; tables and names pass."""
    location = Path(path).expanduser()
    if path in DATASET_NAMES or path.startswith(HF):
        return
    with explain_access_errors(location):
        if not location.is_file() and not is_saved_dataset(location):
            read_folder(location, for_training=True)


def read_folder(root: Path, *, for_training: bool = False) -> FileCollection:
    """Read a folder-per-class dataset, with or without train / val / test.

    The collection's splits are those folders; one without them has the single split "all". For a training each class
    needs an image for each split.
    """
    if not root.is_dir():
        raise UserError(_missing_folder_message(root))

    # Image files by split and class.
    notes: list[str] = []
    skipped: Counter[str] = Counter()  # as in `walk`
    splits = split_folders(root)
    files_by_split = {
        split: _image_files_by_class(folder, root, notes, skipped)
        for split, folder in (splits or {"all": root}).items()
    }
    train_folder = splits.get("train", root)
    train_files = files_by_split["train" if splits else "all"]  # or all files, without splits

    # Every split must have the classes of train.
    if splits:
        notes += _folders_beside_train(root, splits)
        if "test" in files_by_split and not files_by_split["test"]:
            notes.append(f"{splits['test']} has no class folders, so it can't be used for testing")
            del files_by_split["test"]
    parts_of_train = 0
    if for_training:  # splits that are missing are cut from it
        parts_of_train = 1 + len({"val", "test"} - files_by_split.keys())
    problems = _check_classes(train_folder, train_files, parts_of_train, notes)
    for split in ("val", "test"):
        if split in files_by_split:
            nonempty = [name for name, class_files in files_by_split[split].items() if class_files]
            problems += class_differences(train_folder, train_files, splits[split], nonempty)
    if problems:
        raise UserError("; ".join([*problems, *notes]))

    # Labels are indices into the sorted class folders.
    class_folders = sorted(train_files)
    notes += differ_in_case(class_folders)
    if not splits:
        notes += _classes_like_splits(root, class_folders)
    samples = {}
    for split, class_files in files_by_split.items():
        samples[split] = [
            Sample(file, label)
            for label, name in enumerate(class_folders)
            for file in class_files[name]
        ]
    check_distinct(class_folders)
    check_distinct(sample.sample_id for sample in chain.from_iterable(samples.values()))

    if skipped["repeated"]:
        notes.append(
            f"{skipped['repeated']} links in {root} were left out: they lead to a folder that holds them, or to what "
            "their class has already"
        )
    if skipped["unreadable"]:
        notes.append(
            f"{skipped['unreadable']} folders in {root} can't be read, and their images were left out: permit it"
        )
    return FileCollection(readable_class_names(class_folders), samples, notes, root=root)


def _folders_beside_train(root: Path, splits: dict[str, Path]) -> list[str]:
    """A note on folders of images beside the split folders; an empty list if there are none."""
    others = [
        folder.name
        for folder in subfolders(root)
        if folder not in splits.values() and _contains_images(folder)
    ]
    if not others:
        return []
    return [
        f"{root} has the folders {', '.join(others)} beside train, which were left out: call a validation set val and "
        "a test set test"
    ]


def _classes_like_splits(root: Path, class_folders: list[str]) -> list[str]:
    """A note on classes that may be splits, such as training_set and test_set; an empty list if there are none.

    Their names are the same once the split's name is replaced by `*`.
    """
    # Reverse order puts "training" before "train", so that the longer name matches.
    split_name = re.compile("|".join(sorted(SPLIT_NAMES, reverse=True)))
    patterns = {name: split_name.sub("*", name.lower(), count=1) for name in class_folders}
    counts = Counter(patterns.values())
    similar = [name for name, pattern in patterns.items() if "*" in pattern and counts[pattern] > 1]
    if not similar:
        return []
    return [
        f"{root} has the folders {quoted_names(similar)}, which were taken for classes: if they are splits, call them "
        "train, val or test"
    ]


def subfolders(folder: Path) -> list[Path]:
    """Subfolders in order of name.

    Left out are hidden and system folders (__MACOSX, @eaDir), and links to a folder that contains the link.
    """
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.is_dir() and entry.name[0] not in "._@" and not _links_to_ancestor(entry)
    )


def split_folders(root: Path) -> dict[str, Path]:
    """The train / val / test folders of a dataset; empty if it isn't split.

    A folder "train" with images but without subfolders is no split but a class, of railway trains.
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


def walk(folder: Path, skipped: Counter[str] | None = None) -> Iterator[os.DirEntry[str]]:
    """Every file below a folder; each subfolder is entered once, however many links lead to it.

    Folders that are reached without a link come first, so that a file has its real path rather than one through a link.
    Hidden subfolders are left out, and so are links to the ancestors of `folder`, which would be circular.

    `skipped` is filled with two counts: `repeated` links, to folders that were entered before, and `unreadable`
    folders.
    """
    skipped = Counter() if skipped is None else skipped
    visited = {file_identity(ancestor) for ancestor in folder.resolve().parents}
    # The next folder is the last one; links to folders wait at the other end.
    folders = deque([str(folder)])
    while folders:
        directory = folders.pop()
        identity = file_identity(directory)
        if identity in visited:
            skipped["repeated"] += 1
            continue
        visited.add(identity)

        try:
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError:
            skipped["unreadable"] += 1
            continue

        for entry in entries:
            if not _is_folder(entry):
                yield entry
            elif entry.name[0] in ".@":
                continue
            elif entry.is_symlink():
                folders.appendleft(entry.path)
            else:
                folders.append(entry.path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _links_to_ancestor(entry: Path) -> bool:
    """Whether an entry is a link to a folder that contains the link."""
    return (
        entry.is_symlink()
        and entry.is_dir()
        and entry.parent.resolve().is_relative_to(entry.resolve())
    )


def _contains_images(folder: Path) -> bool:
    return any(is_image_path(entry.name) for entry in walk(folder))


def _image_files_by_class(
    folder: Path, root: Path, notes: list[str], skipped: Counter[str]
) -> dict[str, list[str]]:
    """Image files at any depth below each class folder of `folder`, as sorted paths relative to ``root``.

    What is left out is added to `notes`, and to the counts `skipped` (see `walk`).
    """
    files_by_class: dict[str, list[str]] = {}
    other_files: list[str] = []
    prefix = "" if root == Path() else os.path.join(root, "")

    # Entries of the folder itself that belong to no class.
    num_loose = 0
    for entry in sorted(folder.iterdir()):
        skipped["repeated"] += _links_to_ancestor(entry)
        num_loose += is_image_path(entry) and entry.is_file()
        if _is_underscored_class(entry):
            notes.append(f"{entry} begins with _ and was left out: rename it to use it as a class")

    for class_folder in subfolders(folder):
        images = []
        for file in walk(class_folder, skipped):
            if is_image_path(file.name):
                images.append(file)
            else:
                other_files.append(file.name)
        paths = _without_duplicate_links(images)
        skipped["repeated"] += len(images) - len(paths)
        relative_paths = [path.removeprefix(prefix).replace(os.sep, "/") for path in paths]
        files_by_class[class_folder.name] = sorted(relative_paths)

    notes += unread_formats(folder, other_files)
    if files_by_class and num_loose:
        notes.append(
            f"{num_loose} images directly in {folder} belong to no class and were left out"
        )
    return files_by_class


def _is_underscored_class(entry: Path) -> bool:
    """Whether an entry is a folder of images that `subfolders` leaves out for the `_` before its name."""
    if entry.name[0] != "_" or entry.name == "__MACOSX":
        return False
    return entry.is_dir() and _contains_images(entry)


def _without_duplicate_links(images: list[os.DirEntry[str]]) -> list[str]:
    """Paths of the images, without a link whose target is in the list itself or is the target of an earlier link."""
    links = sorted(entry.path for entry in images if entry.is_symlink())
    paths = [entry.path for entry in images if not entry.is_symlink()]
    if links:
        identities = set(map(file_identity, paths))
        for path in links:
            if file_identity(path) not in identities:
                identities.add(file_identity(path))
                paths.append(path)
    return paths


def unread_formats(folder: Path, names: Iterable[str]) -> list[str]:
    """A note that counts, by suffix, the files that can't be read (such as HEIC from phones), without hidden ones."""
    count_of_suffix = Counter(Path(name).suffix.lower() or name for name in names if name[0] != ".")
    if not count_of_suffix:
        return []
    counts = ", ".join(f"{count} x {suffix}" for suffix, count in count_of_suffix.most_common(5))
    return [
        f"files in {folder} of formats that aren't read were left out: {counts}; convert photos to JPEG or PNG"
    ]


def _check_classes(
    folder: Path, files_by_class: dict[str, list[str]], parts: int, notes: list[str]
) -> list[str]:
    """The classes of too few images for so many parts; a UserError unless there are at least two class folders."""
    notes_suffix = "".join(f"; {note}" for note in notes)
    if not any(files_by_class.values()):
        num_loose = sum(is_image_path(entry) for entry in folder.iterdir())
        contents = (
            f"holds {num_loose} images but no class folders" if num_loose else "holds no images"
        )
        if [*folder.glob("*.tar"), *folder.glob("*/*.tar")]:
            notes_suffix += f"; tars in the WebDataset format are read as {HF}{folder}"
        raise UserError(f"{folder} {contents}: {_LAYOUT}{notes_suffix}")

    # All folders are named as splits, for example test and val without train.
    if SPLIT_NAMES.keys() >= set(map(str.lower, files_by_class)):
        raise UserError(
            f"{folder} has the folders {quoted_names([*files_by_class])} and no classes: make a folder per class "
            "inside each, train among them (train/cat/1.jpg, test/cat/7.jpg), or give one that has them"
        )

    if len(files_by_class) == 1:
        only_class = folder / next(iter(files_by_class))
        inner_folders = [entry.name for entry in subfolders(only_class)]
        hint = _LAYOUT
        if len(inner_folders) > 1:
            hint = f"did you mean {only_class} (it holds {quoted_names(inner_folders)})?"
        raise UserError(
            f"{folder} has only one class folder, {only_class.name!r}, and a classifier needs two: {hint}"
        )

    empty = [name for name, files in files_by_class.items() if not files]
    few = [name for name, files in files_by_class.items() if 0 < len(files) < parts]
    problems = []
    if empty:
        problems.append(
            f"no images in the class folder {quoted_names(empty)} of {folder}: fill it, or leave it out by a _ before "
            "its name"
        )
    if few:
        problems.append(
            f"fewer than {parts} images, one for each split, in the class folder {quoted_names(few)} of {folder}: add "
            "some, or leave it out by a _ before its name"
        )
    return problems


def _missing_folder_message(root: Path) -> str:
    """The error message for a `root` that is no folder: what is there instead, or a folder with a similar name."""
    if root.suffix.lower() in (".yaml", ".yml") and root.is_file():
        return f"{root} is a configuration: give it by --config {root}"
    if root.is_file():
        return f"{root} is a file: unpack it and give the folder, {_LAYOUT}"
    if similar := difflib.get_close_matches(str(root), DATASET_NAMES, n=1):
        return f"there is no folder {root}: did you mean the dataset {similar[0]!r}?"
    parent = root.absolute().parent
    # The nearest ancestor that exists.
    while not parent.is_dir():
        parent = parent.parent
    folders = [entry.name for entry in subfolders(parent)]
    similar = difflib.get_close_matches(root.name, folders, n=1)
    if similar:
        hint = f"did you mean {parent / similar[0]}?"
    elif folders:
        hint = f"{parent} has the folders {quoted_names(folders)}"
    else:
        hint = f"{parent} has no folders"
    return f"there is no folder {root}: {hint}; {_LAYOUT}; or a dataset's name: {', '.join(DATASET_NAMES)}"
