"""EmojiPages: reproducible, with emoji that only "unseen" has, and groups that can be counted on the page."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from moevision.data.emoji import (
    CELL,
    CELLS,
    GROUPS,
    SHARE,
    SHIFT,
    EmojiPages,
    ceiling,
    draw_page,
    read_sheet,
)
from moevision.data.open import open_collection


def test_the_sheet_has_distinct_emoji_of_nine_groups() -> None:
    sheet = read_sheet()
    assert len({one.character for one in sheet.emoji}) == len(sheet.emoji) == 1_892
    assert len({picture.tobytes() for picture in sheet.pictures}) == 1_892
    assert {one.group for one in sheet.emoji} == set(GROUPS)
    named = {one.character: (one.group, one.name) for one in sheet.emoji}
    assert named["😀"] == ("smileys", "grinning face")
    assert named["🐶"][0] == "animals"
    assert named["🇫🇷"][0] == "flags"


def test_a_tenth_of_each_group_is_held_out() -> None:
    sheet = read_sheet()
    for group in range(len(GROUPS)):
        held_out = sheet.held_out[sheet.groups == group]
        assert held_out.sum() == round(0.1 * len(held_out))


@pytest.mark.parametrize("split", EmojiPages.splits)
def test_held_out_emoji_are_on_unseen_pages_alone(split: str) -> None:
    pages = EmojiPages(200, split=split)
    numbers = np.concatenate([pages.emoji(index) for index in range(200)])
    assert set(read_sheet().held_out[numbers]) == {split == "unseen"}


def test_a_page_depends_on_seed_split_and_index_alone() -> None:
    one, other = EmojiPages(20, seed=7), EmojiPages(5_000, seed=7)
    forward = [one.image(index) for index in range(20)]
    for index in reversed(range(20)):
        np.testing.assert_array_equal(other.image(index), forward[index])
    pages = [EmojiPages(20, seed=seed, split=s) for seed in (7, 8) for s in EmojiPages.splits]
    assert len({page.image(3).tobytes() for page in pages}) == 8


def test_the_drawing_is_the_same_on_every_machine() -> None:
    pages = EmojiPages(1_000, seed=7)
    pixels = b"".join(pages.image(index).tobytes() for index in range(5, 12))
    assert hashlib.sha256(pixels).hexdigest()[:16] == "a90cde27ff9d2df3"


def test_labels_take_turns() -> None:
    pages = EmojiPages(22)
    assert [pages.label(index) for index in range(22)] == [index % 9 for index in range(22)]
    assert pages.label(-1) == 21 % 9
    with pytest.raises(IndexError):
        pages.label(22)


def test_the_label_is_the_group_of_four_tenths_and_a_ninth_of_the_rest() -> None:
    pages = EmojiPages(2_000)
    groups = read_sheet().groups
    own = np.concatenate([groups[pages.emoji(i)] == pages.label(i) for i in range(2_000)])
    expected = SHARE + (1 - SHARE) / 9
    standard_error = np.sqrt(expected * (1 - expected) / len(own))
    assert own.mean() == pytest.approx(expected, abs=4 * standard_error)


def test_who_knows_every_emoji_names_nearly_every_page() -> None:
    """Counted on drawn pages, a tie of n groups as 1/n, beside what `ceiling` says of 200,000."""
    pages = EmojiPages(3_000, split="test")
    groups = read_sheet().groups
    right = 0.0
    for index in range(3_000):
        count = Counter(groups[pages.emoji(index)].tolist())
        most = max(count.values())
        best = [group for group, value in count.items() if value == most]
        right += (pages.label(index) in best) / len(best)
    assert right / 3_000 == pytest.approx(ceiling(), abs=0.015)
    assert ceiling() == pytest.approx(0.967, abs=0.001)


def test_every_emoji_lies_in_its_cell_moved_by_two_pixels_at_most() -> None:
    pages = EmojiPages(30)
    pictures = read_sheet().pictures
    background = int(draw_page(np.array([], int))[0, 0, 0])
    for index in range(30):
        page, numbers = pages.image(index), pages.emoji(index)
        for cell, number in enumerate(numbers):
            row, column = divmod(cell, CELLS)
            drawn = page[row * CELL :, column * CELL :][:CELL, :CELL]
            padded = np.pad(
                pictures[number], ((SHIFT,) * 2, (SHIFT,) * 2, (0, 0)), constant_values=background
            )
            moved = [
                padded[down : down + CELL, right : right + CELL]
                for down in range(2 * SHIFT + 1)
                for right in range(2 * SHIFT + 1)
            ]
            assert any(np.array_equal(drawn, one) for one in moved), (index, cell)


def test_the_part_mask_is_the_group_of_each_cell() -> None:
    pages = EmojiPages(3, image_size=32)
    cells = pages.part_mask(2)[4::8, 4::8]  # a cell is 8 px then
    assert cells.ravel().tolist() == read_sheet().groups[pages.emoji(2)].tolist()
    assert pages.image(2).shape == (32, 32, 3)


def test_it_is_a_data_set_by_its_name() -> None:
    collection = open_collection("emoji", sizes={"train": 10, "val": 3, "test": 4})
    assert collection.class_names == list(GROUPS)
    sample = collection.samples["test"][3]
    drawn = EmojiPages(4, split="test").image(3)
    np.testing.assert_array_equal(np.asarray(collection.open(sample)), drawn)
