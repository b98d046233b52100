"""Images that code draws (`DrawnImages`), and pages of emoji, whose class is the one that their emoji favour.

A page is 4 x 4 emoji of 16 px (Noto Emoji, `assets/emoji.png`), each up to 2 px from the middle of its cell. Its class
is one of Unicode's nine groups (`EmojiPages`), or one of 55 kinds within them (`EmojiKinds`), of which more must be
remembered. An emoji is of the page's own class with probability `share`, otherwise of a class drawn at random. So the
most frequent class of a page may be another one: whoever knows the class of every emoji names 96.7 % of the pages of
groups and 94.0 % of those of kinds.

A tenth of each kind's emoji is never on a page of "train", "val" or "test": pages of "unseen" have only these. By how
much a model is better on "test" than on "unseen" says what it has learned by heart.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.random import PCG64, Generator
from PIL import Image
from torch.utils.data import Dataset

from moevision.errors import UserError, escape_controls
from moevision.types import Flags, Ints, Pixels

# ---- what data sets that code draws have in common: every image has a random generator of its own


class DrawnImages(ABC, Dataset[tuple[Image.Image, int]]):
    """Labelled images with part masks, drawn when they are asked for.

    An image depends on (seed, split, index) alone, not on the order of access, the size of the set or the process.
    The same index shows the same scene at every image size. Image i has label i mod C, so that class sizes differ by
    one image at most.
    """

    name: ClassVar[str]  # what `--data` calls it
    classes: ClassVar[tuple[str, ...]]  # name of each label
    parts: ClassVar[tuple[str, ...]]  # name of each value of a part mask
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    drawing_version: ClassVar[int] = 1  # part of every seed: another one draws other images

    def __init__(
        self, size: int, image_size: int = 64, seed: int = 0, split: str = "train"
    ) -> None:
        """Stores the arguments; each image is drawn on access.

        Args:
            size: Number of images, at least 1.
            image_size: Side of an image in pixels, at least 16.
            seed: Any integer; other seeds give other images.
            split: One of `splits`, which share no image.
        """
        name = type(self).__name__
        if size < 1:
            raise UserError(f"{name} needs a size of at least 1 image, not {size}")
        if image_size < 16:
            raise UserError(f"{name} needs an image_size of at least 16 pixels, not {image_size}")
        if split not in self.splits:
            raise UserError(f"{name} has the splits {', '.join(self.splits)}, not {split!r}")
        self.size = size
        self.image_size = image_size
        self.seed = seed
        self.split = split

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The image, as a PIL image in mode RGB, and its label."""
        return Image.fromarray(self.image(index)), self.label(index)

    @abstractmethod
    def image(self, index: int) -> Pixels:
        """The image, uint8 [S, S, 3] in RGB order."""

    @abstractmethod
    def part_mask(self, index: int) -> Pixels:
        """The part at the middle of each pixel, uint8 [S, S], an index into `parts`."""

    def label(self, index: int) -> int:
        """The class, an index into `classes`."""
        return self._checked(index) % len(self.classes)

    def generator(self, index: int) -> Generator:
        """The random generator of one image."""
        return generator_for(
            f"{type(self).__name__} {self.drawing_version} {self.seed} {self.split} {self._checked(index)}"
        )

    def _checked(self, index: int) -> int:
        """The index as a non-negative number; `IndexError` outside of the set, which also ends iteration."""
        if not -self.size <= index < self.size:
            raise IndexError(f"index {index} is outside of a set of {self.size} images")
        return int(index) % self.size


def generator_for(key: str) -> Generator:
    """A generator of its own for each key, the same on every machine."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return Generator(PCG64(int.from_bytes(digest, "little")))


# ---- pages of emoji

GROUPS: tuple[str, ...] = (
    "smileys",
    "people",
    "animals",
    "food",
    "travel",
    "activities",
    "objects",
    "symbols",
    "flags",
)
CELL = 16  # px of an emoji
CELLS = 4  # emoji in a row, and rows
SHIFT = 2  # px that an emoji lies from the middle of its cell at most
HELD_OUT = 0.1  # of each kind's emoji
KIND_SIZE = 12  # emoji that a subgroup of Unicode needs to be one of `EmojiKinds`
_SHEET_COLUMNS = 44
_BACKGROUND = 128
_ASSETS = Path(__file__).parent / "assets"
_COLOUR_SELECTOR = "\ufe0f"  # asks for the coloured picture; people's keyboards send it or don't
# What changes the character before it: style, keycap, skin tone, tag.
_MODIFIERS = r"[\ufe0e\ufe0f\u20e3\U0001F3FB-\U0001F3FF\U000E0020-\U000E007F]*"
# One emoji as people see it: two letters of a flag, or characters that joiners (U+200D) tie together.
_ONE_EMOJI = re.compile(
    rf"(?:[\U0001F1E6-\U0001F1FF]{{2}}|\S){_MODIFIERS}(?:\u200d\S{_MODIFIERS})*"
)


class Emoji(NamedTuple):
    """One emoji."""

    character: str
    group: str  # one of `GROUPS`
    kind: str  # Unicode's subgroup, such as "animal-mammal"
    name: str  # Unicode's


class Sheet(NamedTuple):
    """All emoji, M of them; an emoji's number is its row in `assets/emoji.tsv`."""

    pictures: Pixels  # [M, 16, 16, 3]
    emoji: list[Emoji]
    groups: Ints  # [M], indices into `GROUPS`
    kinds: Ints  # [M], indices into `KINDS`; -1: of a smaller one
    held_out: Flags  # [M], never trained on


@cache
def _read_table() -> list[Emoji]:
    lines = (_ASSETS / "emoji.tsv").read_text(encoding="utf-8").splitlines()
    return [Emoji(*line.split("\t")) for line in lines]


def _large_kinds() -> tuple[str, ...]:
    sizes = Counter(one.kind for one in _read_table())
    return tuple(kind for kind, size in sizes.items() if size >= KIND_SIZE)


KINDS = _large_kinds()


@cache
def read_sheet() -> Sheet:
    """The sheet that comes with the package."""
    emoji = _read_table()
    with Image.open(_ASSETS / "emoji.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    rows = pixels.reshape(-1, CELL, _SHEET_COLUMNS, CELL, 3)
    pictures = rows.swapaxes(1, 2).reshape(-1, CELL, CELL, 3)[: len(emoji)]

    groups = np.array([GROUPS.index(one.group) for one in emoji])
    all_kinds = np.array([one.kind for one in emoji])
    held_out = np.zeros(len(emoji), bool)
    rng = generator_for("EmojiPages held out")
    for kind in np.unique(all_kinds):
        members = rng.permutation(np.flatnonzero(all_kinds == kind))
        held_out[members[: round(HELD_OUT * len(members))]] = True
    kinds = np.array([KINDS.index(one.kind) if one.kind in KINDS else -1 for one in emoji])
    return Sheet(pictures, emoji, groups, kinds, held_out)


class EmojiPages(DrawnImages):
    """Pages of emoji with labels, and the emoji and group of every cell.

    Pages are drawn with sides of 64 px; of other sizes they are resized.
    """

    name = "emoji"
    classes = GROUPS
    parts = GROUPS
    splits = ("train", "val", "test", "unseen")  # "unseen": only emoji that the others never have
    # Probability that an emoji is drawn from the page's own class; else it is drawn from all classes, also the own one.
    share: ClassVar[float] = 0.4

    def image(self, index: int) -> Pixels:
        """The page, uint8 [S, S, 3] in RGB order."""
        return self._resized(draw_cells(*self._draw(index)), Image.Resampling.BICUBIC)

    def part_mask(self, index: int) -> Pixels:
        """The group of each pixel's emoji, uint8 [S, S], an index into `parts`."""
        groups = read_sheet().groups[self.emoji(index)].astype(np.uint8)
        mask = groups.reshape(CELLS, CELLS).repeat(CELL, 0).repeat(CELL, 1)
        return self._resized(mask, Image.Resampling.NEAREST)

    def emoji(self, index: int) -> Ints:
        """The number of every cell's emoji in the sheet, int64 [16], row by row."""
        numbers, _ = self._draw(index)
        return numbers

    def _draw(self, index: int) -> tuple[Ints, Ints]:
        """The emoji of the cells, int64 [16], and how far each lies from its middle, int64 [16, 2]."""
        rng = self.generator(index)
        is_own = rng.random(CELLS**2) < self.share
        random_class = rng.integers(len(self.classes), size=CELLS**2)
        classes = np.where(is_own, self.label(index), random_class)
        position = rng.random(CELLS**2)  # among the emoji of the class, 0 to 1
        shifts = rng.integers(-SHIFT, SHIFT + 1, (CELLS**2, 2))

        members, sizes = self._members(self.split == "unseen")
        numbers = members[classes, (position * sizes[classes]).astype(int)]
        return numbers, shifts

    @classmethod
    @cache
    def _members(cls, held_out: bool) -> tuple[Ints, Ints]:
        """Of each class the emoji that are held out, or those that aren't: numbers [C, n], and how many [C].

        Rows of smaller classes are filled up by repeating them.
        """
        is_allowed = read_sheet().held_out == held_out
        classes = cls.classes_of_emoji()
        members = [
            np.flatnonzero((classes == label) & is_allowed) for label in range(len(cls.classes))
        ]
        sizes = np.array(list(map(len, members)))
        return np.array([np.resize(numbers, sizes.max()) for numbers in members]), sizes

    @classmethod
    def classes_of_emoji(cls) -> Ints:
        """The class of each emoji of the sheet, int64 [M]; -1: on no page."""
        return read_sheet().groups

    @classmethod
    def most_common_class(cls, emoji: Sequence[str]) -> str | None:
        """The name of the class that most of these emoji are of; None if two are as common."""
        labels = cls.classes_of_emoji()[numbers_of(emoji)]
        counts = np.bincount(labels[labels >= 0], minlength=len(cls.classes))
        (most,) = np.nonzero(counts == counts.max())
        return cls.classes[most[0]] if len(most) == 1 else None

    @classmethod
    def known_emoji(cls, limit: int) -> dict[str, list[str]]:
        """By class up to `limit` emoji that training pages have, in Unicode's order."""
        members, sizes = cls._members(False)
        emoji = read_sheet().emoji
        known = {}
        for label, name in enumerate(cls.classes):
            rows = members[label][: min(limit, sizes[label])]
            known[name] = [emoji[row].character for row in rows]
        return known

    def _resized(self, page: Pixels, resampling: Image.Resampling) -> Pixels:
        if self.image_size == len(page):
            return page
        size = (self.image_size, self.image_size)
        return np.asarray(Image.fromarray(page).resize(size, resampling))


class EmojiKinds(EmojiPages):
    """Pages whose class is one of 55 kinds: Unicode's subgroups with at least 12 emoji.

    The same pictures as `EmojiPages`, of which more must be remembered: which emoji are mammals, which are birds.
    """

    name = "emoji_kinds"
    classes = KINDS
    share = 0.3

    @classmethod
    def classes_of_emoji(cls) -> Ints:
        """The kind of each emoji of the sheet, int64 [M]; -1: on no page."""
        return read_sheet().kinds


def split_emoji(text: str) -> list[str]:
    """The emoji of a text as people see them, without white space; other characters count as emoji too."""
    return _ONE_EMOJI.findall(text)


def draw_page(emoji: Sequence[str]) -> Pixels:
    """A page of 1 to 16 emoji such as "🐶", row by row, uint8 [64, 64, 3]; cells without one stay empty.

    Each lies in the middle of its cell. A UserError names one that the sheet doesn't have.
    """
    return draw_cells(numbers_of(emoji))


def numbers_of(emoji: Sequence[str]) -> Ints:
    """The numbers of 1 to 16 emoji in the sheet; a UserError names one that it doesn't have."""
    if not 1 <= len(emoji) <= CELLS**2:
        raise UserError(f"A page has 1 to {CELLS**2} emoji, not {len(emoji)}.")
    known = _numbers_by_character()
    for one in emoji:
        if one.replace(_COLOUR_SELECTOR, "") not in known:
            raise UserError(
                f"There is no emoji {escape_controls(one[:20])!r} on the sheet: choose another one, without skin tone."
            )
    return np.array([known[one.replace(_COLOUR_SELECTOR, "")] for one in emoji])


@cache
def _numbers_by_character() -> dict[str, int]:
    return {
        one.character.replace(_COLOUR_SELECTOR, ""): row for row, one in enumerate(_read_table())
    }


def draw_cells(numbers: Ints, shifts: Ints | None = None) -> Pixels:
    """A page of up to 16 emoji, uint8 [64, 64, 3]; `shifts` [16, 2] in px, down and to the right, up to `SHIFT`.

    What leaves its cell is cut off, as a patch of the model would see it.
    """
    pictures = read_sheet().pictures
    page = np.full((CELLS * CELL, CELLS * CELL, 3), _BACKGROUND, np.uint8)
    for cell, number in enumerate(numbers):
        down, right = (0, 0) if shifts is None else shifts[cell]
        row, column = divmod(cell, CELLS)
        target = page[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        # The cell is a window on the picture with a margin, which moves against the shift.
        margins = ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0))
        picture = np.pad(pictures[number], margins, constant_values=_BACKGROUND)
        top, left = SHIFT - down, SHIFT - right
        target[:] = picture[top : top + CELL, left : left + CELL]
    return page
