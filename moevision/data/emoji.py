"""Pages of emoji: the class of a page is the group that most of its emoji come from.

A page is 4 x 4 emoji of 16 px (Noto Emoji, `assets/emoji.png`; Unicode's nine groups, `assets/emoji.tsv`). Each is of
the page's own group with probability `SHARE`, otherwise of a group drawn at random, and lies up to 2 px from the
middle of its cell. Whoever knows the group of every emoji names 96.7 % of the pages (`ceiling`).

A tenth of each group's emoji is never on a page of "train", "val" or "test": pages of "unseen" have only these. What a
model knows of "test" beyond "unseen" it has learned by heart.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moevision.data.drawn import ByteImage, DrawnImages, generator_for

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
_ASSETS = Path(__file__).parent / "assets"


class Emoji(NamedTuple):
    """One emoji."""

    character: str
    group: str  # one of `GROUPS`
    name: str  # Unicode's


class Sheet(NamedTuple):
    """All emoji, M of them; an emoji's number is its row in `assets/emoji.tsv`."""

    pictures: ByteImage  # [M, 16, 16, 3]
    emoji: list[Emoji]
    groups: NDArray[np.int64]  # [M], indices into `GROUPS`
    held_out: NDArray[np.bool_]  # [M], never trained on


@cache
def read_sheet() -> Sheet:
    """The sheet that comes with the package."""
    lines = (_ASSETS / "emoji.tsv").read_text(encoding="utf-8").splitlines()
    emoji = [Emoji(*line.split("\t")) for line in lines]
    with Image.open(_ASSETS / "emoji.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    rows = pixels.reshape(-1, CELL, _SHEET_COLUMNS, CELL, 3)
    pictures = rows.swapaxes(1, 2).reshape(-1, CELL, CELL, 3)[: len(emoji)]

    groups = np.array([GROUPS.index(one.group) for one in emoji])
    held_out = np.zeros(len(emoji), bool)
    rng = generator_for("EmojiPages held out")
    for group in range(len(GROUPS)):
        members = rng.permutation(np.flatnonzero(groups == group))
        held_out[members[: round(HELD_OUT * len(members))]] = True
    return Sheet(pictures, emoji, groups, held_out)


@cache
def _members(held_out: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each group the emoji that are held out, or those that aren't: their numbers [9, n], and how many [9]."""
    sheet = read_sheet()
    chosen = [
        np.flatnonzero((sheet.groups == group) & (sheet.held_out == held_out))
        for group in range(len(GROUPS))
    ]
    sizes = np.array(list(map(len, chosen)))
    return np.array([np.resize(numbers, sizes.max()) for numbers in chosen]), sizes


class EmojiPages(DrawnImages):
    """Pages of emoji with labels, and the emoji and group of every cell.

    Pages are drawn with sides of 64 px; of other sizes they are resized.
    """

    name = "emoji"
    classes = GROUPS
    parts = GROUPS
    splits = ("train", "val", "test", "unseen")  # "unseen": only emoji that the others never have

    def image(self, index: int) -> ByteImage:
        """The page, uint8 [S, S, 3] in RGB order."""
        return self._resized(draw_page(*self._draw(index)), Image.Resampling.BICUBIC)

    def part_mask(self, index: int) -> ByteImage:
        """The group of each pixel's emoji, uint8 [S, S], an index into `parts`."""
        groups = read_sheet().groups[self.emoji(index)].astype(np.uint8)
        mask = groups.reshape(CELLS, CELLS).repeat(CELL, 0).repeat(CELL, 1)
        return self._resized(mask, Image.Resampling.NEAREST)

    def emoji(self, index: int) -> NDArray[np.int64]:
        """The number of every cell's emoji in the sheet, int64 [16], row by row."""
        numbers, _ = self._draw(index)
        return numbers

    def _draw(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The emoji of the cells, int64 [16], and how far each lies from its middle, int64 [16, 2]."""
        rng = self.generator(index)
        is_own = rng.random(CELLS**2) < SHARE
        groups = np.where(is_own, self.label(index), rng.integers(len(GROUPS), size=CELLS**2))
        position = rng.random(CELLS**2)  # within the group
        shifts = rng.integers(-SHIFT, SHIFT + 1, (CELLS**2, 2))

        members, sizes = _members(self.split == "unseen")
        numbers = members[groups, (position * sizes[groups]).astype(int)]
        return numbers, shifts

    def _resized(self, page: ByteImage, resampling: Image.Resampling) -> ByteImage:
        if self.image_size == len(page):
            return page
        side = (self.image_size, self.image_size)
        return np.asarray(Image.fromarray(page).resize(side, resampling))


def draw_page(numbers: NDArray[np.int64], shifts: NDArray[np.int64] | None = None) -> ByteImage:
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
