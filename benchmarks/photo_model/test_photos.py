"""Which photos of eleven classes are chosen, from small folders in the place of the data."""

import pytest

from benchmarks.photo_model.photos import CLASSES, MOST, SEARCH_TEST, SEARCH_VAL, copy_photos

TRAIN, HELD_OUT = 610, 380  # photos in each folder of the data: more than are taken


@pytest.mark.studies
def test_no_test_photo_is_seen_by_the_search(tmp_path):
    for folder in (folder for folders in CLASSES.values() for folder in folders):
        for split, count in (("train", TRAIN), ("val", HELD_OUT)):
            place = tmp_path / "data" / folder.replace("SPLIT", split)
            place.mkdir(parents=True)
            for number in range(count):
                name = f"{folder.replace('/', '-')}-{split}-{number}.jpg"
                (place / name).write_bytes(name.encode())
    out = tmp_path / "photos"
    copied = copy_photos(tmp_path / "data", out)
    assert copied == len(CLASSES) * sum(MOST.values())
    for name in CLASSES:
        found = {
            (folder, split): {file.name for file in (out / folder / split / name).iterdir()}
            for folder in ("all", "search")
            for split in MOST
        }
        assert {split: len(found["all", split]) for split in MOST} == MOST
        assert found["search", "train"] == found["all", "train"]
        assert len(found["search", "val"]) == SEARCH_VAL
        assert len(found["search", "test"]) == SEARCH_TEST
        assert not found["search", "val"] & found["search", "test"]
        assert found["search", "val"] | found["search", "test"] <= found["all", "val"]
        assert not found["all", "val"] & found["all", "test"]
