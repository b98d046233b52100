"""EmojiPages: reproducible, with emoji that only "unseen" has, and groups that can be counted on the page."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from moevision.data.emoji import (
    CELL,
    CELLS,
    GROUPS,
    KINDS,
    SHIFT,
    EmojiKinds,
    EmojiPages,
    draw_cells,
    draw_page,
    numbers_of,
    read_sheet,
    split_emoji,
)
from moevision.data.named import open_collection
from moevision.errors import UserError


def test_the_sheet_has_distinct_emoji_of_nine_groups():
    sheet = read_sheet()
    assert len({one.character for one in sheet.emoji}) == len(sheet.emoji) == 1_892
    assert len({picture.tobytes() for picture in sheet.pictures}) == 1_892
    assert {one.group for one in sheet.emoji} == set(GROUPS)
    by_character = {one.character: one for one in sheet.emoji}
    assert by_character["😀"] == ("😀", "smileys", "face-smiling", "grinning face")
    assert by_character["🐶"][1:3] == ("animals", "animal-mammal")
    assert by_character["🇫🇷"][1:3] == ("flags", "country-flag")


def test_kinds_are_the_subgroups_with_twelve_emoji():
    sheet = read_sheet()
    sizes = Counter(one.kind for one in sheet.emoji)
    assert len(KINDS) == 55
    assert set(KINDS) == {kind for kind, size in sizes.items() if size >= 12}
    kinds = [one.kind if one.kind in KINDS else None for one in sheet.emoji]
    assert kinds == [KINDS[kind] if kind >= 0 else None for kind in sheet.kinds]


def test_a_tenth_of_each_kind_is_held_out():
    sheet = read_sheet()
    kinds = np.array([one.kind for one in sheet.emoji])
    for kind in set(kinds):
        held_out = sheet.held_out[kinds == kind]
        assert held_out.sum() == round(0.1 * len(held_out))
    assert sheet.held_out.mean() == pytest.approx(0.1, abs=0.002)


@pytest.mark.parametrize("data", [EmojiPages, EmojiKinds])
@pytest.mark.parametrize("split", EmojiPages.splits)
def test_held_out_emoji_are_on_unseen_pages_alone(data, split):
    pages = data(200, split=split)
    numbers = np.concatenate([pages.emoji(index) for index in range(200)])
    assert set(read_sheet().held_out[numbers]) == {split == "unseen"}


def test_a_page_depends_on_seed_split_and_index_alone():
    one, other = EmojiPages(20, seed=7), EmojiPages(5_000, seed=7)
    forward = [one.image(index) for index in range(20)]
    for index in reversed(range(20)):
        np.testing.assert_array_equal(other.image(index), forward[index])
    pages = [EmojiPages(20, seed=seed, split=s) for seed in (7, 8) for s in EmojiPages.splits]
    assert len({page.image(3).tobytes() for page in pages}) == 8


def test_the_drawing_is_the_same_on_every_machine():
    pages = EmojiPages(1_000, seed=7)
    pixels = b"".join(pages.image(index).tobytes() for index in range(5, 12))
    assert hashlib.sha256(pixels).hexdigest()[:16] == "482b4241fa533f8b"


def test_labels_take_turns():
    pages = EmojiPages(22)
    assert [pages.label(index) for index in range(22)] == [index % 9 for index in range(22)]
    assert pages.label(-1) == 21 % 9
    with pytest.raises(IndexError):
        pages.label(22)


@pytest.mark.parametrize(("data", "share"), [(EmojiPages, 0.4), (EmojiKinds, 0.3)])
def test_a_share_of_a_page_is_of_its_class_and_the_rest_of_any(data, share):
    pages = data(2_200)
    classes = data.classes_of_emoji()
    own = np.concatenate([classes[pages.emoji(i)] == pages.label(i) for i in range(2_200)])
    expected = share + (1 - share) / len(data.classes)
    standard_error = np.sqrt(expected * (1 - expected) / len(own))
    assert own.mean() == pytest.approx(expected, abs=4 * standard_error)


def ceiling(data, pages=200_000, seed=0):
    """The share of pages whose class is what most of their emoji are; a tie of two counts half, and so on."""
    rng = np.random.default_rng(seed)
    num_classes = len(data.classes)
    is_own = rng.random((pages, CELLS**2)) < data.share
    classes = np.where(is_own, 0, rng.integers(num_classes, size=(pages, CELLS**2)))  # of class 0
    counts = np.stack([(classes == label).sum(1) for label in range(num_classes)], 1)
    most = counts == counts.max(1, keepdims=True)  # [pages, C]
    return float((most[:, 0] / most.sum(1)).mean())


@pytest.mark.parametrize(("data", "expected"), [(EmojiPages, 0.967), (EmojiKinds, 0.940)])
def test_who_knows_every_emoji_names_nearly_every_page(data, expected):
    """Counted on drawn pages, a tie of n classes as 1/n, beside what `ceiling` says of 200,000."""
    pages = data(3_300, split="test")
    classes = data.classes_of_emoji()
    right = 0.0
    for index in range(3_300):
        count = Counter(classes[pages.emoji(index)].tolist())
        most = max(count.values())
        best = [label for label, value in count.items() if value == most]
        right += (pages.label(index) in best) / len(best)
    assert right / 3_300 == pytest.approx(expected, abs=0.015)
    assert ceiling(data) == pytest.approx(expected, abs=0.001)


def test_every_emoji_lies_in_its_cell_moved_by_two_pixels_at_most():
    pages = EmojiPages(30)
    pictures = read_sheet().pictures
    background = int(draw_cells(np.array([], int))[0, 0, 0])
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


def test_the_part_mask_is_the_group_of_each_cell():
    pages = EmojiPages(3, image_size=32)
    cells = pages.part_mask(2)[4::8, 4::8]  # a cell is 8 px then
    assert cells.ravel().tolist() == read_sheet().groups[pages.emoji(2)].tolist()
    assert pages.image(2).shape == (32, 32, 3)


@pytest.mark.parametrize("data", [EmojiPages, EmojiKinds])
def test_it_is_a_data_set_by_its_name(data):
    collection = open_collection(data.name, sizes={"train": 10, "val": 3, "test": 4})
    assert collection.class_names == list(data.classes)
    sample = collection.samples["test"][3]
    drawn = data(4, split="test").image(3)
    np.testing.assert_array_equal(np.asarray(collection.open(sample)), drawn)


# ---- pages of chosen emoji


def test_a_page_of_given_emoji_has_them_in_the_middle_of_their_cells() -> None:
    """The first cell is the dog's picture of the sheet, the second the cat's, the third is empty."""
    sheet = read_sheet()
    dog, cat = ([one.character for one in sheet.emoji].index(one) for one in "🐶🐱")
    page = draw_page(["🐶", "🐱"])
    assert np.array_equal(page[:CELL, :CELL], sheet.pictures[dog])
    assert np.array_equal(page[:CELL, CELL : 2 * CELL], sheet.pictures[cat])
    assert (page[:CELL, 2 * CELL :] == page[-1, -1]).all()


def test_the_sheets_own_emoji_are_told_apart_in_one_text() -> None:
    """Families, flags, keycaps and tags among them; with the sign for a coloured picture or without."""
    characters = [one.character for one in read_sheet().emoji]
    assert split_emoji(" ".join(characters)) == split_emoji("".join(characters)) == characters
    for start in range(0, len(characters), 16):
        numbers = list(range(len(characters)))[start : start + 16]
        few = characters[start : start + 16]
        assert numbers_of(few).tolist() == numbers
        assert numbers_of([one.replace("\ufe0f", "") for one in few]).tolist() == numbers


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("🐶👍🏽", "'👍🏽'"),  # a skin tone belongs to the hand before it
        ("🇽🇽", "'🇽🇽'"),
        ("👨\u200d🐶", "'👨\\u200d🐶'"),
        ("🐶x", "'x'"),
        ("\ud83d", r"\ud83d"),
        ("\x00", r"\x00"),
        ("\u200d", r"\u200d"),
    ],
)
def test_an_emoji_that_the_sheet_has_not_is_named(text: str, named: str) -> None:
    with pytest.raises(UserError) as refused:
        draw_page(split_emoji(text))
    assert named in str(refused.value)


@pytest.mark.parametrize("emoji", [[], ["🐶"] * 17])
def test_a_page_has_one_to_sixteen_emoji(emoji: list[str]) -> None:
    with pytest.raises(UserError, match="1 to 16"):
        draw_page(emoji)


def test_the_class_of_a_page_is_what_most_of_its_emoji_are() -> None:
    assert EmojiPages.most_common_class(["🐶", "🐱", "🍎"]) == "animals"
    assert EmojiPages.most_common_class(["🐶", "🍎"]) is None
    assert EmojiKinds.most_common_class(["🐶", "🐱", "🍎"]) == "animal-mammal"
    assert EmojiKinds.most_common_class(["🏁"]) is None  # of a kind with few emoji


def test_emoji_to_choose_from_are_those_of_training() -> None:
    held_out = {
        one.character
        for one, out in zip(read_sheet().emoji, read_sheet().held_out, strict=True)
        if out
    }
    known = EmojiPages.known_emoji(24)
    assert list(known) == list(GROUPS)
    for name, emoji in known.items():
        assert len(set(emoji)) == 24
        assert not held_out & set(emoji)
        assert EmojiPages.most_common_class(emoji[:16]) == name
