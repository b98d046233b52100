"""Pages of emoji: the class of a page is the group that most of its emoji come from.

A page is 4 x 4 emoji of 16 px (Noto Emoji, `assets/emoji.png`; Unicode's nine groups, `assets/emoji.tsv`). Each is of
the page's own group with probability `SHARE`, otherwise of a group drawn at random, and lies up to 2 px from the
middle of its cell. Whoever knows the group of every emoji names 96.7 % of the pages (`ceiling`).

A tenth of each group's emoji is never on a page of "train", "val" or "test": pages of "unseen" have only these. What a
model knows of "test" beyond "unseen" it has learned by heart.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import ClassVar, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch.utils.data import Dataset

from moevision.errors import UserError

GROUPS: Final = (
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
CELL: Final = 16  # px of an emoji
CELLS: Final = 4  # emoji in a row, and rows
SHARE: Final = 0.4  # of a page's emoji that are of its own group for certain
SHIFT: Final = 2  # px that an emoji lies from the middle of its cell at most
HELD_OUT: Final = 0.1  # of each group's emoji
_SHEET_COLUMNS = 44
_BACKGROUND = 128
_DRAWING_VERSION = 1  # part of every seed: another one draws other pages
_ASSETS = Path(__file__).parent / "assets"


class Emoji(NamedTuple):
    """One emoji: the character, the index of its group in `GROUPS`, its name in Unicode."""

    character: str
    group: int
    name: str


class Sheet(NamedTuple):
    """All emoji: their pictures, uint8 [M, 16, 16, 3], what they are, and which are never trained on, bool [M]."""

    pictures: npt.NDArray[np.uint8]
    emoji: list[Emoji]
    held_out: npt.NDArray[np.bool_]


@cache
def read_sheet() -> Sheet:
    """The sheet that comes with the package; an emoji's number is its row in `assets/emoji.tsv`."""
    emoji = []
    for line in (_ASSETS / "emoji.tsv").read_text(encoding="utf-8").splitlines():
        character, group, name = line.split("\t")
        emoji.append(Emoji(character, GROUPS.index(group), name))

    with Image.open(_ASSETS / "emoji.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    rows = pixels.reshape(-1, CELL, _SHEET_COLUMNS, CELL, 3)
    pictures = rows.swapaxes(1, 2).reshape(-1, CELL, CELL, 3)[: len(emoji)]

    groups = np.array([one.group for one in emoji])
    held_out = np.zeros(len(emoji), bool)
    rng = _generator("held out")
    for group in range(len(GROUPS)):
        members = np.flatnonzero(groups == group)
        held_out[rng.permutation(members)[: round(HELD_OUT * len(members))]] = True
    return Sheet(pictures, emoji, held_out)


@cache
def _pools(held_out: bool) -> list[npt.NDArray[np.int64]]:
    """The numbers of each group's emoji that are held out, or that aren't."""
    sheet = read_sheet()
    groups = np.array([one.group for one in sheet.emoji])
    return [
        np.flatnonzero((groups == group) & (sheet.held_out == held_out))
        for group in range(len(GROUPS))
    ]


class EmojiPages(Dataset[tuple[Image.Image, int]]):
    """Pages of emoji with labels, and the emoji and group of every cell.

    A page depends on nothing but (seed, split, index): not on the order of access, the size of the set or the process.
    Page i has label i mod 9.
    """

    classes: ClassVar[tuple[str, ...]] = GROUPS  # names of the labels
    parts: ClassVar[tuple[str, ...]] = GROUPS  # names of the values of a part mask
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test", "unseen")
    image_size: ClassVar[int] = CELL * CELLS

    def __init__(self, size: int, seed: int = 0, split: str = "train") -> None:
        """Describes the set; pages are drawn when asked for.

        Args:
            size: Number of pages, at least 1.
            seed: Any integer; other seeds give other pages.
            split: `"train"`, `"val"`, `"test"` or `"unseen"` (only emoji that the other three never have).
        """
        if size < 1:
            raise UserError(f"EmojiPages needs a size of at least 1 page, not {size}")
        if split not in self.splits:
            raise UserError(f"EmojiPages has the splits {', '.join(self.splits)}, not {split!r}")
        self.size, self.seed, self.split = size, seed, split

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The page, as a PIL image in mode RGB, and its label."""
        return Image.fromarray(self.image(index)), self.label(index)

    def label(self, index: int) -> int:
        """The class, an index into `classes`."""
        return self._checked(index) % len(GROUPS)

    def emoji(self, index: int) -> npt.NDArray[np.int64]:
        """The number of every cell's emoji in `read_sheet().emoji`, int64 [16], row by row."""
        return self._draw(index)[0]

    def image(self, index: int) -> npt.NDArray[np.uint8]:
        """The page, uint8 [64, 64, 3] in RGB order."""
        numbers, shifts = self._draw(index)
        return draw_page(numbers, shifts)

    def part_mask(self, index: int) -> npt.NDArray[np.uint8]:
        """The group of each pixel's emoji, uint8 [64, 64], an index into `parts`."""
        emoji = read_sheet().emoji
        groups = np.array([emoji[number].group for number in self.emoji(index)], np.uint8)
        return np.kron(groups.reshape(CELLS, CELLS), np.ones((CELL, CELL), np.uint8))

    def _draw(self, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The emoji of the cells, int64 [16], and how far each lies from its middle, int64 [16, 2]."""
        label = self.label(index)
        rng = _generator(f"{self.seed} {self.split} {self._checked(index)}")
        own = rng.random(CELLS**2) < SHARE
        groups = np.where(own, label, rng.integers(len(GROUPS), size=CELLS**2))
        places = rng.random(CELLS**2)
        shifts = rng.integers(-SHIFT, SHIFT + 1, (CELLS**2, 2))

        pools = _pools(self.split == "unseen")
        numbers = [
            pools[group][int(place * len(pools[group]))]
            for group, place in zip(groups, places, strict=True)
        ]
        return np.array(numbers), shifts

    def _checked(self, index: int) -> int:
        """The index counted from the start; `IndexError` outside of the set, which also ends iteration."""
        if not -self.size <= index < self.size:
            raise IndexError(f"index {index} is outside of a set of {self.size} pages")
        return int(index) % self.size


def draw_page(
    numbers: npt.NDArray[np.int64], shifts: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.uint8]:
    """A page of up to 16 emoji, uint8 [64, 64, 3]; `shifts` [16, 2] in px, down and to the right; None: in the middle.

    What leaves its cell is cut off, as a patch of the model would see it.
    """
    pictures = read_sheet().pictures
    page = np.full((CELLS * CELL, CELLS * CELL, 3), _BACKGROUND, np.uint8)
    for cell, number in enumerate(numbers):
        down, right = (0, 0) if shifts is None else shifts[cell]
        row, column = divmod(cell, CELLS)
        target = page[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        picture = pictures[number]
        target[max(down, 0) : CELL + min(down, 0), max(right, 0) : CELL + min(right, 0)] = picture[
            max(-down, 0) : CELL - max(down, 0), max(-right, 0) : CELL - max(right, 0)
        ]
    return page


def ceiling(pages: int = 200_000, seed: int = 0) -> float:
    """The share of pages whose class the counts of their emoji's groups say, a tie half right of two, and so on."""
    rng = np.random.default_rng(seed)
    own = rng.random((pages, CELLS**2)) < SHARE
    groups = np.where(own, 0, rng.integers(len(GROUPS), size=(pages, CELLS**2)))  # class 0
    counts = np.stack(
        [(groups == group).sum(1) for group in range(len(GROUPS))], 1
    )  # [pages, groups]
    most = counts == counts.max(1, keepdims=True)
    return float((most[:, 0] / most.sum(1)).mean())


def _generator(key: str) -> np.random.Generator:
    """A generator of its own for each key, the same on every machine."""
    digest = hashlib.blake2b(
        f"EmojiPages {_DRAWING_VERSION} {key}".encode(), digest_size=16
    ).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
