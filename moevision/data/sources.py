"""Where images come from: a folder, a dataset that is known by name, or images drawn by code.

A `Collection` lists its samples per given split and opens them one by one; it decides nothing about
training, validation and test (see ``splits.py``) and nothing about pixels (see ``transforms.py``). A sample is
named by its path relative to the collection's root, which stays the same across runs and machines.

- A **folder** has one subfolder per class, with or without train / val / test above them; any other layout raises a
  `UserError` that says what to change. Symbolic links are followed, since many datasets consist of links to a store.
  Each folder is entered once, so circular links end, and a link to a folder that contains it is ignored. Within a class
  a link to a file that the class has already is left out; ``splits.py`` handles what is in several classes or splits.
  Hard links count as separate, byte-identical files, as they would after a copy to another disk.
- **Names**: `SyntheticPets`, torchvision's datasets and ImageNet-1k, with their terms of use. torchvision fetches and
  indexes; the images themselves are opened by `safe_open` like any others, so that one damaged file doesn't stop a run.
  Where a dataset comes without a validation set (or with a "val" that the field reports as its test), ``splits.py``
  cuts one from the training images.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import os
import re
import shlex
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from torchvision import datasets

from moevision.data.images import BadImageError, is_image_path, read_image, safe_open
from moevision.data.synthetic import SyntheticPets
from moevision.errors import UserError
from moevision.names import csv_name, name_bytes, shown

SPLITS = ("train", "val", "test")


class Sample(NamedTuple):
    """One image: its stable name (path relative to the root, with forward slashes) and its class index."""

    sample_id: str
    label: int


@dataclass
class Collection(ABC):
    """Labelled images.

    Attributes:
        class_names: class names in words; a label is an index into them.
        given: samples per split the data came with ("train", "val", "test"), or all under "all".
        notes: sentences about what was left out while reading.
        group_column: the column whose equal values are kept together, where the data say so themselves.
    """

    class_names: list[str]
    given: dict[str, list[Sample]]
    notes: list[str] = field(default_factory=list)
    group_column: str | None = None

    @abstractmethod
    def open(self, sample: Sample, short_side: int | None = None) -> Image.Image:
        """Return the RGB image; raises `BadImageError` if it can't be used.

        A ``short_side`` in pixels allows a large photo to come reduced, see `safe_open`.
        """

    @abstractmethod
    def size_bytes(self, sample: Sample) -> int:
        """Number of stored bytes; samples of different size differ."""

    def probe(self, sample: Sample) -> bytes:
        """A few stored bytes, read to spare the digest of large samples that differ in them."""
        return b""

    @abstractmethod
    def digest(self, sample: Sample) -> bytes:
        """SHA-256 of the stored bytes."""

    def identity(self, sample: Sample) -> Hashable:
        """What two samples share only if one file is behind both, which links can bring about."""
        return sample.sample_id

    def stored(self, sample: Sample) -> bytes:
        """An image file: the stored bytes, or pixels as PNG; raises OSError or BadImageError if it can't be read."""
        file = io.BytesIO()
        self.open(sample).save(file, "PNG")
        return file.getvalue()

    def column(self, name: str) -> Mapping[str, str] | None:
        """Values by sample id of a column, if the data are a table that has it."""
        return None

    def column_names(self) -> Iterable[str]:
        """The columns that `column` knows, without large ones."""
        return ()


@dataclass
class FileCollection(Collection):
    """Image files below ``root``; ``has_links`` says whether a symbolic link leads to any of them."""

    root: Path = Path()
    has_links: bool = False

    def open(self, sample: Sample, short_side: int | None = None) -> Image.Image:
        """Decode the file through `safe_open`."""
        return safe_open(self.root / sample.sample_id, short_side)

    def size_bytes(self, sample: Sample) -> int:
        """Size of the file; 0 if it has vanished since the folder was read."""
        try:
            return os.stat(self.root / sample.sample_id).st_size
        except OSError:
            return 0

    def probe(self, sample: Sample) -> bytes:
        """1 KiB from the middle of a file (headers are alike); nothing of a file under 64 KiB."""
        half = self.size_bytes(sample) // 2
        if half < 32 * 1024:
            return b""
        try:
            with (self.root / sample.sample_id).open("rb") as handle:
                handle.seek(half)
                return handle.read(1024)
        except OSError:  # as in digest
            return b""

    def digest(self, sample: Sample) -> bytes:
        """SHA-256 of the file; an unreadable one is unlike any other (opening it will say why)."""
        try:
            return hashlib.sha256(self.stored(sample)).digest()
        except BadImageError:
            return hashlib.sha256(name_bytes(sample.sample_id)).digest()

    def stored(self, sample: Sample) -> bytes:
        """The file."""
        return read_image(self.root / sample.sample_id)

    def identity(self, sample: Sample) -> Hashable:
        """Device and number of the file; nothing is read where there are no links."""
        return file_identity(self.root / sample.sample_id) if self.has_links else sample.sample_id


def file_identity(path: str | Path) -> Hashable:
    """What tells whether two paths lead to one file or folder; the path itself where the system doesn't say."""
    try:
        found = os.stat(path)
    except OSError:
        return str(path)
    return (found.st_dev, found.st_ino) if found.st_ino else str(path)


@dataclass
class ArrayCollection(Collection):
    """Images held as arrays, uint8 [n, H, W, 3] per given split; sample ids are ``split/number``."""

    arrays: dict[str, npt.NDArray[np.uint8]] = field(default_factory=dict)

    def _pixels(self, sample: Sample) -> npt.NDArray[np.uint8]:
        split, number = sample.sample_id.rsplit("/", 1)
        pixels: npt.NDArray[np.uint8] = self.arrays[split][int(number)]
        return pixels

    def open(self, sample: Sample, short_side: int | None = None) -> Image.Image:
        """Wrap the pixels."""
        return Image.fromarray(self._pixels(sample))

    def size_bytes(self, sample: Sample) -> int:
        """Number of bytes of the pixels."""
        return self._pixels(sample).nbytes

    def digest(self, sample: Sample) -> bytes:
        """SHA-256 of the pixels."""
        return hashlib.sha256(self._pixels(sample).tobytes()).digest()


@dataclass
class DrawnCollection(Collection):
    """`SyntheticPets`, drawn when opened; sample ids are ``split/number``."""

    pets: dict[str, SyntheticPets] = field(default_factory=dict)

    def open(self, sample: Sample, short_side: int | None = None) -> Image.Image:
        """Draw the image."""
        split, number = sample.sample_id.rsplit("/", 1)
        return Image.fromarray(self.pets[split].image(int(number)))

    def size_bytes(self, sample: Sample) -> int:
        """0: nothing is stored."""
        return 0

    def digest(self, sample: Sample) -> bytes:
        """SHA-256 of the sample id: every image is drawn from a random seed of its own."""
        return hashlib.sha256(name_bytes(sample.sample_id)).digest()


SPLIT_NAMES = {
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
    return told_apart(lemmas, class_folders)


def told_apart(names: Sequence[str], ids: Sequence[Any]) -> list[str]:
    """Names of which those that stand several times carry their id in brackets: labels are found by their names."""
    count = Counter(names)
    return [name if count[name] == 1 else f"{name} ({known})" for name, known in zip(names, ids, strict=True)]


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
        _check_classes(root, classes, notes)
        given = {"all": classes}
    else:
        given = {split: _class_files(folder, root, notes, links) for split, folder in splits.items()}
        others = [each.name for each in subfolders(root) if each not in splits.values() and _holds_images(each)]
        if others:
            notes.append(
                f"{root} has the folders {', '.join(others)} beside train, which were left out: call a validation set "
                "val and a test set test"
            )
        if "test" in given and not given["test"]:
            notes.append(f"{splits['test']} has no class folders, so it can't be used for testing")
            del given["test"]
        classes = given["train"]
        _check_classes(splits["train"], classes, notes)
        for split, found in given.items():
            check_same_classes(splits["train"], classes, splits[split], found)
    folders = sorted(classes)
    samples = {
        split: [Sample(file, label) for label, name in enumerate(folders) for file in found[name]]
        for split, found in given.items()
    }
    check_distinct(folders)
    check_distinct([sample.sample_id for members in samples.values() for sample in members])
    if links["repeated"]:
        notes.append(
            f"{links['repeated']} links in {root} were left out: they lead to a folder that holds them, or to what "
            "their class has already"
        )
    if links["unreadable"]:
        notes.append(
            f"{links['unreadable']} folders in {root} can't be read, and their images were left out: permit it"
        )
    return FileCollection(words_of(folders), samples, notes, root=root, has_links=links["met"] > 0)


def subfolders(folder: Path) -> list[Path]:
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
        links: counts the links to subfolders: `met` all of them, `repeated` those that lead nowhere new; and the
            folders that are `unreadable`.
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
    for folder in subfolders(root):
        split = SPLIT_NAMES.get(folder.name.lower())
        if split in found:
            raise UserError(f"{found[split]} and {folder} both stand for {split}: keep one of them")
        if split:
            found[split] = folder
    if "train" not in found or not subfolders(found["train"]):
        return {}
    return {split: found[split] for split in SPLITS if split in found}


def holds(path: str, place: Path) -> bool:
    """Whether images at `place`, which needn't exist, belong to the folder of images at `path`."""
    from moevision.data import shards, tables  # which import this module

    root = Path(path).expanduser().resolve()
    if path in DATASET_NAMES or not root.is_dir() or shards.is_shards(root) or tables.is_saved_dataset(root):
        return False
    for folder in _split_folders(root).values() or [root]:
        if place.resolve().is_relative_to(folder):
            below = place.resolve().relative_to(folder).parts
            return bool(below) and below[0][0] not in "._@"
    return False


def _class_files(folder: Path, root: Path, notes: list[str], links: Counter[str]) -> dict[str, list[str]]:
    """Image files of every class folder, searched to any depth, as sorted paths relative to ``root``.

    ``links`` counts the links that were met, those that led to nothing new, and folders that can't be read.
    """
    classes: dict[str, list[str]] = {}
    ignored: Counter[str] = Counter()
    above = 0 if root == Path() else len(os.path.join(root, ""))
    links["met"] += folder.is_symlink()
    links["repeated"] += sum(map(_leads_up, folder.iterdir()))
    notes += _left_out(folder)
    for class_folder in subfolders(folder):
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


def _left_out(folder: Path) -> list[str]:
    """A note for each entry that looks like a class and isn't taken as one."""
    notes = []
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() and not entry.exists() and not entry.suffix:
            notes.append(f"{entry} is a link to a folder that isn't there, and was left out")
        elif entry.name[0] == "_" and entry.name != "__MACOSX" and entry.is_dir() and _holds_images(entry):
            notes.append(f"{entry} begins with _ and was left out: rename it to use it as a class")
    return notes


def _holds_images(folder: Path) -> bool:
    return any(is_image_path(entry.name) for entry in walk(folder))


def _others(linked: list[str], real: list[str]) -> list[str]:
    """The links to files that are neither among the real ones nor behind an earlier link."""
    found = set(map(file_identity, real)) if linked else set()
    others = []
    for path in sorted(linked):
        if (identity := file_identity(path)) not in found:
            found.add(identity)
            others.append(path)
    return others


def check_distinct(names: list[str]) -> None:
    """Names must differ, also when they are written into a file."""
    known: dict[str, str] = {}
    for name in names:
        written = unicodedata.normalize("NFC", csv_name(name))  # a Mac writes accents apart
        if (other := known.get(written)) is not None:
            raise UserError(f"{other!r} and {name!r} look the same when they are written down: rename one of them")
        known[written] = name


def _check_classes(folder: Path, classes: dict[str, list[str]], notes: list[str]) -> None:
    """At least two class folders, none of them empty; else ``notes`` say what was left out."""
    left_out = "".join(f"; {note}" for note in [*notes, "convert photos to JPEG or PNG"]) if notes else ""
    if not any(classes.values()):
        loose = sum(is_image_path(entry) for entry in folder.iterdir())
        inside = f"holds {loose} images but no class folders" if loose else "holds no images"
        raise UserError(f"{folder} {inside}: {_LAYOUT}{left_out}")
    if len(classes) == 1:
        only = folder / next(iter(classes))
        inner = [entry.name for entry in subfolders(only)]
        hint = f"did you mean {only} (it holds {_some(inner)})?" if len(inner) > 1 else _LAYOUT
        raise UserError(f"{folder} has only one class folder, {only.name!r}, and a classifier needs two: {hint}")
    empty = [name for name, files in classes.items() if not files]
    if empty:
        raise UserError(f"no images in the class folder {_some(empty)} of {folder}: fill or remove it{left_out}")


def check_same_classes(
    train: Path | str, classes: dict[str, list[str]], other: Path | str, found: dict[str, list[str]]
) -> None:
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
        nearby = f"did you mean {parent / alike[0]}?"
    else:
        nearby = f"{parent} has " + (f"the folders {_some(folders)}" if folders else "no folders")
    return f"there is no folder {root}: {nearby}; {_LAYOUT}"


@contextmanager
def access_advice(path: str | Path) -> Iterator[None]:
    """Say in a sentence what the system doesn't let us read, where nothing can be left out."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or path} can't be read ({error.strerror or error}): permit this user to read it, or give "
            "another path"
        ) from error


SYNTHETIC = "synthetic_pets"
_IMAGENET_ARCHIVES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz")
UNKNOWN = "unknown: check before you publish"
_IMAGENET = "for non-commercial research and education only (terms of access on https://image-net.org/download)"


def open_collection(
    path: str,
    *,
    root: str,
    download: bool,
    image_size: int,
    seed: int,
    sizes: dict[str, int],
    columns: tuple[str | None, str | None] = (None, None),
) -> Collection:
    """Find the dataset that ``path`` names.

    Args:
        path: one of `DATASET_NAMES`, a folder (write ``./pets`` for a folder that bears such a name) of images or of
            tar shards, a CSV manifest, or a Hugging Face dataset (``hf:NAME[:CONFIG]``, or a folder that it was saved
            to).
        root: folder in which named datasets live.
        download: fetch a named dataset that isn't there.
        image_size: side of the drawn images, in pixels.
        seed: seed of the drawn images.
        sizes: number of drawn images per split.
        columns: of a table, those with image and label; None finds them.

    Raises:
        UserError: if it isn't there, can't be fetched, or isn't laid out as a dataset.
    """
    from moevision.data import shards, tables  # which import this module

    if path == SYNTHETIC:
        return synthetic_pets(image_size, seed, sizes)
    place = Path(path).expanduser()
    if path.startswith(tables.HF) or tables.is_saved_dataset(place):
        return tables.read_dataset(path, tables.Columns(*columns), download=download)
    if tables.is_manifest(place):
        with access_advice(place):
            return tables.read_manifest(place, tables.Columns(*columns))
    if path not in DATASET_NAMES and shards.is_shards(place):
        return shards.open_shards(place)
    if path not in DATASET_NAMES:
        try:
            with access_advice(place):
                return read_folder(place)
        except UserError as error:
            alike = difflib.get_close_matches(path, DATASET_NAMES, n=1)
            names = f"did you mean {alike[0]!r}?" if alike else ", ".join(DATASET_NAMES)
            if os.path.exists(place) or isinstance(error.__cause__, OSError):
                raise
            raise UserError(f"{error}; or a dataset's name: {names}") from None
    folder = Path(root).expanduser()
    if path == "imagenet":
        return _imagenet(folder, download)
    try:
        return _NAMED[path](folder, False)
    except (
        FileNotFoundError,
        NotADirectoryError,
        ValueError,
    ) as error:  # something in a folder isn't there
        raise UserError(
            f"the dataset {path} is in {folder} in part only ({error}), as after an interrupted unpacking: delete "
            f"{folder / _UNPACKED[path]} and fetch it anew by {fetching(path, root)}"
        ) from error
    except OSError:
        with access_advice(folder):
            raise
    except RuntimeError as error:  # torchvision: not found or corrupted
        if not download:
            raise UserError(
                f"the dataset {path} is not in {folder}: fetch it by {fetching(path, root)}, or say where it is by "
                "--root, for fit, validate and test by --data.root"
                + (f"; for your own folder write ./{path}" if Path(path).is_dir() else "")
            ) from error
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return _NAMED[path](folder, True)
    except UserError:
        raise
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"{path} could not be fetched into {folder} ({error}): check the network and try again"
        ) from error


def fetching(name: str, root: str | Path = "data") -> str:
    """The command that fetches a dataset, whichever verb or program asks for it: only `fit` fetches."""
    where = "" if str(root) == "data" else f" --data.root {shlex.quote(str(root))}"
    return f"`moevision fit {name} --data.download true{where}`"


def synthetic_pets(image_size: int, seed: int, sizes: dict[str, int]) -> DrawnCollection:
    """The drawn dataset, ``sizes[split]`` images per split."""
    pets = {split: SyntheticPets(sizes[split], image_size, seed, split) for split in SPLITS}
    given = {
        split: [Sample(f"{split}/{number:06d}", pets[split].label(number)) for number in range(sizes[split])]
        for split in SPLITS
    }
    return DrawnCollection(list(SyntheticPets.classes), given, pets=pets)


def _cifar(factory: Callable[..., Any], root: Path, download: bool) -> Collection:
    parts = {
        "train": factory(root, train=True, download=download),
        "test": factory(root, train=False, download=download),
    }
    given = {
        split: [Sample(f"{split}/{number:05d}", int(label)) for number, label in enumerate(part.targets)]
        for split, part in parts.items()
    }
    arrays = {split: np.asarray(part.data, dtype=np.uint8) for split, part in parts.items()}
    return ArrayCollection(_in_words(parts["train"].classes), given, arrays=arrays)


def _in_words(names: list[str]) -> list[str]:
    return [name.replace("_", " ") for name in names]


def _files(root: Path, classes: list[str], parts: dict[str, tuple[list[Any], list[int]]]) -> Collection:
    """A collection from torchvision's lists of paths and labels."""
    given = {
        split: [
            Sample(Path(path).relative_to(root).as_posix(), int(label))
            for path, label in zip(paths, labels, strict=True)
        ]
        for split, (paths, labels) in parts.items()
    }
    return FileCollection(_in_words(classes), given, root=root)


def _imagenette(root: Path, download: bool) -> Collection:
    # the smallest release that is larger than most training sizes; photos have a short side of 320 px
    part = datasets.Imagenette(root, split="train", size="320px", download=download)
    place = Path(part._image_root).parent
    found = read_folder(place)
    if len(found.class_names) != len(part._WNID_TO_CLASS) or not {"train", "val"} <= set(found.given):
        raise ValueError(f"train and val of {place.name} must have {len(part._WNID_TO_CLASS)} classes each")
    return found


def _pets(root: Path, download: bool, binary: bool = False) -> Collection:
    target = "binary-category" if binary else "category"
    parts = {
        split: datasets.OxfordIIITPet(root, split=name, target_types=target, download=download)
        for split, name in (("train", "trainval"), ("test", "test"))
    }
    classes = parts["train"].bin_classes if binary else parts["train"].classes
    labels = {split: part._bin_labels if binary else part._labels for split, part in parts.items()}
    return _files(root, classes, {split: (part._images, labels[split]) for split, part in parts.items()})


def _pets_cat_dog(root: Path, download: bool) -> Collection:
    return _pets(root, download, binary=True)


def _flowers102(root: Path, download: bool) -> Collection:
    parts = {split: datasets.Flowers102(root, split=split, download=download) for split in SPLITS}
    lists = {split: (part._image_files, part._labels) for split, part in parts.items()}
    return _files(root, parts["train"].classes, lists)


def _food101(root: Path, download: bool) -> Collection:
    parts = {split: datasets.Food101(root, split=split, download=download) for split in ("train", "test")}
    lists = {split: (part._image_files, part._labels) for split, part in parts.items()}
    return _files(root, parts["train"].classes, lists)


def _imagenet(root: Path, download: bool) -> Collection:
    """ImageNet-1k in ``root`` or ``root/imagenet``; archives lying there are unpacked by torchvision."""
    folders = [folder for folder in (root, root / "imagenet") if folder.is_dir()]
    for folder in folders:
        if all((folder / split).is_dir() for split in ("train", "val")):
            return read_folder(folder)
    for folder in folders:
        if download and all((folder / name).is_file() for name in _IMAGENET_ARCHIVES):
            for split in ("train", "val"):
                datasets.ImageNet(folder, split)
            return read_folder(folder)
    raise UserError(
        f"ImageNet is not in {root} and can't be downloaded without an account: put train/ and val/ (one "
        f"folder per WordNet id) there, or its archives ({', '.join(_IMAGENET_ARCHIVES)}), which "
        f"{fetching('imagenet', root)} unpacks"
    )


_NAMED: dict[str, Callable[[Path, bool], Collection]] = {
    "cifar10": lambda root, download: _cifar(datasets.CIFAR10, root, download),
    "cifar100": lambda root, download: _cifar(datasets.CIFAR100, root, download),
    "imagenette": _imagenette,
    "pets": _pets,
    "pets_cat_dog": _pets_cat_dog,
    "flowers102": _flowers102,
    "food101": _food101,
}
_UNPACKED = {
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "imagenette": "imagenette2-320",
    "pets": "oxford-iiit-pet",
    "pets_cat_dog": "oxford-iiit-pet",
    "flowers102": "flowers-102",
    "food101": "food-101",
}
"""The folders that torchvision makes."""
DATASET_NAMES = (SYNTHETIC, *_NAMED, "imagenet")

# Terms of use, as far as they are certain: a published model's card says them. Where a dataset's makers state nothing,
# or this table knows nothing, the card says "unknown": a guess would be worse. Each sentence follows the page it names.


@dataclass(frozen=True)
class DataTerms:
    """What is certain about one dataset.

    Attributes:
        title: its name in words.
        terms: licence or terms of use, with the page that states them.
        hub_id: its address on huggingface.co/datasets; empty if it has none that is its makers' or widely used.
        kind: what a model card calls its type: the dataset's name, or `imagefolder`.
    """

    title: str
    terms: str = UNKNOWN
    hub_id: str = ""
    kind: str = "imagefolder"


_KNOWN = {
    SYNTHETIC: ("SyntheticPets", "drawn by moevision's own code (Apache-2.0): no photo is involved", ""),
    "cifar10": (
        "CIFAR-10",
        "unknown: https://www.cs.toronto.edu/~kriz/cifar.html states no licence and asks to cite Krizhevsky 2009",
        "uoft-cs/cifar10",
    ),
    "cifar100": (
        "CIFAR-100",
        "unknown: https://www.cs.toronto.edu/~kriz/cifar.html states no licence and asks to cite Krizhevsky 2009",
        "uoft-cs/cifar100",
    ),
    "imagenette": ("Imagenette", f"a selection of ImageNet's photos, which are {_IMAGENET}", "frgfm/imagenette"),
    "imagenet": ("ImageNet-1k", _IMAGENET, "ILSVRC/imagenet-1k"),
    "pets": ("Oxford-IIIT Pet", "CC BY-SA 4.0 (https://www.robots.ox.ac.uk/~vgg/data/pets/)", "timm/oxford-iiit-pet"),
    "pets_cat_dog": (
        "Oxford-IIIT Pet, cat or dog",
        "CC BY-SA 4.0 (https://www.robots.ox.ac.uk/~vgg/data/pets/)",
        "timm/oxford-iiit-pet",
    ),
    "food101": (
        "Food-101",
        "photos of Foodspotting's users: more than scientific fair use must be negotiated with each of them (the "
        "dataset's license_agreement.txt)",
        "ethz/food101",
    ),
}


def terms_of(path: str) -> DataTerms:
    """What is certain about the data that `--data` names.

    Args:
        path: a name of `DATASET_NAMES`, a folder, or another place of images. Of a path only its last part is told:
            the rest may be private.
    """
    if path.startswith("hf:"):
        name = path.removeprefix("hf:").partition(":")[0]
        return DataTerms(shown(name), f"unknown: see https://huggingface.co/datasets/{shown(name)}", shown(name))
    if path in _KNOWN:
        title, terms, hub_id = _KNOWN[path]
        return DataTerms(title, terms, hub_id, path)
    if path in DATASET_NAMES:
        return DataTerms(path, kind=path)
    if path.lower().endswith(".csv"):
        return DataTerms(f"own images (listed in “{shown(Path(path).name)}”)")
    return DataTerms(f"own images (a folder called “{shown(Path(path).expanduser().resolve().name)}”)")
