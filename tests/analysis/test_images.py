"""`open_pictures`: the same images as the data module, labels, subsets, and crops of patches."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from moevision.analysis import PictureSet, open_pictures, patch_crop
from moevision.analysis.images import labels_in, pictures_for
from moevision.config import CROP
from moevision.data import BadImageError, ImageDataModule, SyntheticPets
from moevision.data.transforms import normalize
from moevision.errors import DataWarning, UserError

CLASSES = SyntheticPets.classes


class Tagged(Dataset):
    """Images of 20 x 30 pixels whose red value is their index; labels as given."""

    def __init__(self, labels, bad=(), **attributes):
        self.labels, self.bad = labels, bad
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if index in self.bad:
            raise OSError("no picture")
        return Image.new("RGB", (20, 30), (index, 0, 0)), self.labels[index]


def names_of(pictures):
    return [pictures.picture_name(index) for index in range(len(pictures))]


def labels_of(pictures):
    return [pictures.label(index) for index in range(len(pictures))]


def same_as_module(pictures, module, split="test"):
    """Compare with what the data module hands to the model, batch by batch."""
    module.setup("test" if split == "test" else "validate")
    assert pictures.class_names == tuple(module.class_names)
    seen = 0
    for batch in module.test_dataloader() if split == "test" else module.val_dataloader():
        for image, label, index in zip(
            batch["image"], batch["label"], batch["index"].tolist(), strict=True
        ):
            assert pictures.picture_name(seen) == module.sample_id(split, index)
            assert pictures.label(seen) == label
            pixels = torch.from_numpy(pictures.image(seen)).permute(2, 0, 1)
            assert torch.equal(normalize(pixels[None], module.mean, module.std)[0], image)
            seen += 1
    assert seen == len(pictures)


@pytest.mark.parametrize("split", ["test", "val"])
def test_a_folder_is_cut_as_the_data_module_cuts_it(drawn_pets, split):
    same_as_module(
        open_pictures(drawn_pets, 24, split=split),
        ImageDataModule(str(drawn_pets), image_size=24),
        split,
    )


def test_a_folder_that_came_split_without_test_reports_its_val(draw, tmp_path):
    draw(tmp_path / "pets" / "train", per_class=6)
    draw(tmp_path / "pets" / "val", per_class=3, size=40)
    pictures = open_pictures(tmp_path / "pets", 32)
    assert len(pictures) == 6
    same_as_module(pictures, ImageDataModule(str(tmp_path / "pets"), image_size=32))


def test_all_pictures_of_a_folder(drawn_pets):
    pictures = open_pictures(drawn_pets, 32, split="all")
    assert names_of(pictures) == [
        f"{file.parent.name}/{file.name}" for file in sorted(drawn_pets.rglob("*.png"))
    ]
    assert str(drawn_pets.parent) not in pictures.name


def test_the_split_of_a_run_is_read_from_its_folder(drawn_pets, tmp_path):
    rows = ["split,class,path"]
    files = sorted(file.relative_to(drawn_pets).as_posix() for file in drawn_pets.rglob("*.png"))
    held_out = {files[0], files[-1]}
    rows += [
        f"{'test' if name in held_out else 'train'},{name.split('/')[0]},{name}" for name in files
    ]
    (tmp_path / "splits.csv").write_text("\n".join(rows) + "\n")
    assert set(names_of(open_pictures(drawn_pets, 32, run_dir=tmp_path))) == held_out
    with pytest.raises(UserError, match="no val set"):
        open_pictures(drawn_pets, 32, run_dir=tmp_path, split="val")


@pytest.mark.filterwarnings(
    "ignore::moevision.errors.DataWarning"
)  # about images that came or went
def test_a_copy_of_a_runs_images_is_split_as_the_run_was(tmp_path):
    """It counts as one where all listed images are there, those held out in their class, and as large as the run's."""
    pets = tmp_path / "pets"
    names = [f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(10)]
    for number, name in enumerate(names):
        (pets / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 0, 0)).save(pets / name)
    held_out = {"cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"}
    rows = [f"{'test' if name in held_out else 'train'},{name[:3]},{name}" for name in names]
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"data:\n  path: {pets}\n")
    (run / "splits.csv").write_text("\n".join(["split,class,path", *rows]) + "\n")

    def tested(data):
        model = SimpleNamespace(image_size=16, class_names=["cat", "dog"], framing=CROP)
        return set(names_of(pictures_for(str(run), model, str(data))))

    copy = shutil.copytree(pets, tmp_path / "copy")
    (copy / "new.csv").write_text(
        "\n".join(["path,label", *(f"{name},{name[:3]}" for name in names)])
    )
    (copy / "other.csv").write_text(
        "\n".join(
            ["path,label", *(f"{name},{'dc'[number % 2]}" for number, name in enumerate(names))]
        )
    )
    assert tested(pets) == tested(copy) == tested(copy / "new.csv") == held_out
    assert tested(copy / "other.csv") == set(
        names_of(open_pictures(copy / "other.csv", 16))
    )  # another question
    other = shutil.copytree(copy, tmp_path / "other")  # of the same names, which are numbers
    Image.effect_noise((16, 16), 90).convert("RGB").save(other / "cat/0.png")
    assert tested(other) == set(
        names_of(open_pictures(other, 16))
    )  # other images, with a cut of their own
    pets.rename(tmp_path / "away")
    with pytest.warns(DataWarning, match="a copy of them"):
        assert tested(copy) == held_out
    (copy / "cat/7.png").unlink()
    assert tested(copy) == set(names_of(open_pictures(copy, 16)))


def test_drawn_pets_are_those_of_the_data_module():
    pictures = open_pictures("synthetic_pets", 32)
    module = ImageDataModule("synthetic_pets", image_size=32, cache_mb=0)
    module.setup("test")
    assert names_of(pictures) == [module.sample_id("test", index) for index in range(2000)]
    assert len(module.contents.datasets["test"]) == len(pictures)
    pets = SyntheticPets(2000, 32, 0, "test")
    for index in (0, 9, 1999):
        assert np.array_equal(pictures.image(index), pets.image(index))
        assert pictures.label(index) == pets.label(index)
    assert pictures.class_names == CLASSES


def test_part_masks_of_drawn_pets(drawn_pets):
    pets = SyntheticPets(16, 48, 3, "val")
    for pictures in (
        open_pictures(pets, 32),
        open_pictures("synthetic_pets", 32, split="val", seed=3, limit=80),
    ):
        assert pictures.part_names == SyntheticPets.parts
        index = names_of(pictures).index(min(names_of(pictures)))
        number = int(pictures.picture_name(index).removeprefix("val/"))
        # The same scene at the model's 32 px, and not the 48 px of the set that was given.
        there = SyntheticPets(1000, 32, 3, "val")
        assert np.array_equal(pictures.part_mask(index), there.part_mask(number))
        assert np.array_equal(pictures.image(index), there.image(number))
    plain = open_pictures(drawn_pets, 32)
    assert (plain.part_names, plain.part_mask(0)) == ((), None)


def test_a_limit_is_balanced_seeded_and_nested():
    whole = open_pictures("synthetic_pets", 16)
    for limit in (1, 8, 20):
        pictures = open_pictures("synthetic_pets", 16, limit=limit)
        counts = np.bincount(labels_of(pictures), minlength=8)
        assert counts.sum() == limit
        assert counts.max() - counts.min() <= 1
        names = names_of(pictures)
        assert names == sorted(set(names))
        assert names != names_of(whole)[:limit]
        assert set(names) < set(names_of(open_pictures("synthetic_pets", 16, limit=limit + 1)))
    fixed = open_pictures(whole, 16, limit=20)  # another seed draws others from the same images
    other = open_pictures(whole, 16, limit=20, seed=1)
    assert names_of(fixed) == names_of(pictures)
    assert len(set(names_of(other)) & set(names_of(fixed))) < 5
    assert str(len(whole)) in pictures.name
    assert open_pictures(whole, 16, limit=5000) is whole


def test_a_class_that_runs_out_leaves_its_turns_to_others():
    labels = [0] * 20 + [1] * 2 + [2] * 20
    pictures = open_pictures(Tagged(labels, classes=["a", "b", "c"]), 16, limit=12)
    assert np.bincount(labels_of(pictures)).tolist() == [5, 2, 5]


@pytest.mark.filterwarnings("ignore::moevision.errors.DataWarning")  # about classes the model lacks
@pytest.mark.parametrize(
    ("data", "model", "labels"),
    [
        (("cat", "dog"), ["Dog", "red_fox", "CAT"], [2, 0]),
        (("Cat", "cat"), ["cat", "Cat"], [1, 0]),
        (("red fox", "red_fox"), ["red_fox"], [-1, 0]),
        (("cat", "dog"), ["Cat", "CAT", "Dog"], [-1, 2]),
    ],
)
def test_labels_become_the_models(data, model, labels):
    """Case and underscores count only where classes differ in nothing else."""
    assert labels_in(data, model) == (tuple(model), labels)


def test_classes_that_the_model_does_not_know(drawn_pets):
    with pytest.warns(DataWarning, match="1 of 2 classes .* dog"):
        pictures = open_pictures(drawn_pets, 16, split="all", class_names=["hen", "cat"])
    assert {
        (name[:3], label)
        for name, label in zip(names_of(pictures), labels_of(pictures), strict=True)
    } == {
        ("cat", 1),
        ("dog", -1),
    }
    strangers = open_pictures(drawn_pets, 16, class_names=["tench", "shark"])
    assert strangers.class_names == ("cat", "dog")


def test_a_torch_dataset():
    data = Tagged([1, 0, 1], bad={2})
    pictures = open_pictures(data, 10, class_names=["no", "yes"])
    assert isinstance(pictures, PictureSet)
    assert (pictures.class_names, labels_of(pictures)) == (("no", "yes"), [1, 0, -1])
    assert np.array_equal(pictures.image(1), np.broadcast_to((1, 0, 0), (10, 10, 3)))
    with pytest.raises(BadImageError, match="no picture"):
        pictures.image(2)
    assert labels_of(open_pictures(Tagged([1, 0, 1], bad={2}, targets=[1, 0, 1]), 10)) == [1, 0, 1]
    assert open_pictures(Tagged([1, 0, 2]), 10).class_names == ("class 0", "class 1", "class 2")


def test_images_of_a_torch_dataset_are_seen_as_files_are():
    class Hidden(Tagged):
        def __getitem__(self, index):
            return Image.new("RGBA", (8, 8), (0, 0, 0, 0)), 0

    assert (open_pictures(Hidden([0]), 8, class_names=["a"]).image(0) == 255).all()


def test_notes_of_the_folder_are_warnings(draw, tmp_path):
    draw(tmp_path)
    (tmp_path / "cat" / "notes.txt").touch()
    with pytest.warns(DataWarning, match="1 x .txt"):
        open_pictures(tmp_path, 16)


def numbered_grid(rows=3, columns=4, height=2, width=5):
    """An image whose patches hold their index, but for one brighter pixel in the upper left corner of each."""
    image = np.kron(np.arange(rows * columns).reshape(rows, columns), np.ones((height, width)))
    image[::height, ::width] += 100
    return np.repeat(image[..., None], 3, axis=-1).astype(np.uint8)


def test_the_crop_of_a_patch():
    image = numbered_grid()
    inner = patch_crop(image, (3, 4), 5)
    assert inner.shape == (6, 15, 3)
    assert np.array_equal(
        inner, image[0:6, 0:15]
    )  # patch 5 is row 1, column 1: its neighbours are rows 0-2, columns 0-2
    assert np.array_equal(patch_crop(image, (3, 4), 6, context=0), image[2:4, 10:15])
    corner = patch_crop(image, (3, 4), 11)
    # Beyond the lower right corner the image is mirrored: patch 11 is seen to its right and below.
    assert corner[1::2, 2::5, 0].tolist() == [[6, 7, 7], [10, 11, 11], [10, 11, 11]]
    assert corner[2:4, 5:15, 0].tolist() == [[111, 11, 11, 11, 11, 11, 11, 11, 11, 111], [11] * 10]


@pytest.mark.parametrize("context", [0, 1, 2, 5])
def test_the_patch_is_in_the_middle_of_its_crop(context):
    image = np.random.default_rng(0).integers(0, 256, (6, 20, 3), dtype=np.uint8)
    for patch in range(12):
        crop = patch_crop(image, (3, 4), patch, context)
        assert crop.shape == (2 * (2 * context + 1), 5 * (2 * context + 1), 3)
        middle = crop[2 * context : 2 * context + 2, 5 * context : 5 * context + 5]
        row, column = divmod(patch, 4)
        assert np.array_equal(middle, image[2 * row : 2 * row + 2, 5 * column : 5 * column + 5])


@pytest.mark.deep
def test_pictures_and_traces_are_opened_without_heavy_libraries():
    code = """
import json, sys
import moevision.analysis
from moevision.analysis import collect_routing, open_pictures
open_pictures("synthetic_pets", 32).image(0)
print(json.dumps([m for m in ("lightning", "matplotlib", "scipy", "sklearn", "gradio") if m in sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600
    )
    assert json.loads(done.stdout) == []
