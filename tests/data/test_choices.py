"""`--data.keep` and `--data.relabel`: which training images are used and as what, and every way a list can be wrong."""

from pathlib import Path

import pytest

from moevision.data import ImageDataModule
from moevision.data.collection import Sample
from moevision.data.scores import apply_lists
from moevision.data.splits import Splits
from tests.data.conftest import names

CLASSES = ["cat", "=dog"]
TRAIN = [
    Sample("cat/a.png", 0),
    Sample("cat/b.png", 0),
    Sample("=dog/c,d\x1b.png", 1),
    Sample("=dog/e.png", 1),
]
HELD = {"val": [Sample("cat/v.png", 0)], "test": [Sample("=dog/t.png", 1)]}
NOTES = dict.fromkeys(("train", "val", "test"), "cut")


def apply(tmp_path: Path, *, keep: str | None = None, relabel: str | None = None) -> Splits:
    files = {}
    for name, text in (("keep", keep), ("relabel", relabel)):
        if text is not None:
            files[name] = tmp_path / f"{name}.csv"
            files[name].write_text(text)
    splits = Splits({"train": list(TRAIN), **HELD}, dict(NOTES), unused=[Sample("cat/copy.png", 0)])
    return apply_lists(splits, CLASSES, files.get("keep"), files.get("relabel"))


def test_the_training_images_are_those_of_the_list_under_their_new_labels(tmp_path):
    """Names stand in the files as in splits.csv: shown, with a ' in front of what a spreadsheet would compute."""
    found = apply(
        tmp_path,
        keep="image,keep,reason\ncat/a.png,yes,x\n\"'=dog/c,d\\x1b.png\",yes,\n'=dog/e.png,yes,\ncat/b.png,no,\n",
        relabel="image,new_label\n'=dog/e.png,cat\ncat/a.png,\n\"'=dog/c,d\\x1b.png\",'=dog\n",
    )
    assert found.samples == {"train": [TRAIN[0], TRAIN[2], Sample("=dog/e.png", 0)], **HELD}
    assert found.unused == [Sample("cat/copy.png", 0), TRAIN[1]]
    names(found.notes["train"], "1 with another", "relabel.csv", "1 left out", "keep.csv")
    assert found.notes["val"] == "cut"


def test_a_plain_list_of_names_is_what_is_kept(tmp_path):
    found = apply(tmp_path, keep="\ufeffimage\n'=dog/e.png\ncat/b.png\n")
    assert found.samples["train"] == [TRAIN[1], TRAIN[3]]


@pytest.mark.parametrize("drawn", [False, True])
def test_a_run_goes_on_with_what_it_began_with(image_folder, tmp_path, drawn):
    """splits.csv says it all: the lists may change or vanish; val and test are those of a run without lists."""
    sizes = {"train_size": 24, "val_size": 8, "test_size": 8, "image_size": 16}
    path = "synthetic_pets" if drawn else str(image_folder({"cat": 20, "dog": 20}))
    plain = ImageDataModule(path, **sizes)
    plain.setup()
    train = plain.contents.datasets["train"].samples
    (tmp_path / "keep.csv").write_text(
        "image\n" + "".join(f"{sample.sample_id}\n" for sample in train[1:])
    )
    other = plain.class_names[1 - min(1, train[2].label)]
    (tmp_path / "new.csv").write_text(f"image,new_label\n{train[2].sample_id},{other}\n")

    def listed(data: ImageDataModule) -> dict[str, list[Sample]]:
        data.run_dir = tmp_path / "run"
        data.setup()
        return {split: list(dataset.samples) for split, dataset in data.contents.datasets.items()}

    options = {"keep": str(tmp_path / "keep.csv"), "relabel": str(tmp_path / "new.csv"), **sizes}
    first = ImageDataModule(path, **options)
    found = listed(first)
    label = plain.class_names.index(other)
    assert found["train"] == [train[1], Sample(train[2].sample_id, label), *train[3:]]
    for split in ("val", "test"):
        assert found[split] == list(plain.contents.datasets[split].samples)
    for file in ("keep.csv", "new.csv"):
        (tmp_path / file).unlink()
    again = ImageDataModule(path, **options)
    assert listed(again) == found
    assert again.file_list_sha256() == first.file_list_sha256() != plain.file_list_sha256()
