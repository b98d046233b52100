"""What kind of thing a path is: decided in one place, by names alone."""

from pathlib import Path

import pytest

from moevision.data.named import count_images, kind_of


@pytest.mark.parametrize(
    ("path", "made", "kind"),
    [
        ("synthetic_pets", "synthetic_pets/cat/1.png", "drawn"),
        ("cifar10", "cifar10/cat/1.png", "named"),
        ("./cifar10", "cifar10/cat/1.png", "folder"),
        ("hf:user/pets", "", "dataset"),
        ("saved", "saved/dataset_dict.json", "dataset"),
        ("list.CSV", "list.CSV", "csv"),
        ("gone.csv", "", "folder"),
        ("tars", "tars/0.tar", "folder"),
        ("photos", "photos/train/cat/0.tar", "folder"),  # an archive in a class
        ("photos", "photos/cat/1.png", "folder"),
        ("train", "", "folder"),
    ],
)
def test_kinds(path, made, kind, own_folder):
    if made:
        Path(made).parent.mkdir(parents=True, exist_ok=True)
        Path(made).write_text("")
    assert kind_of(path) == kind


def test_images_are_counted_by_names(image_folder):
    root = image_folder({"cat": 4, "dog": 3})
    (root / "cat" / "notes.txt").write_text("")
    assert count_images(root) == 7
    assert count_images(root / "nowhere") == 0
    assert count_images("cifar10") == 60_000
