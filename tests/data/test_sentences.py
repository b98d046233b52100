"""A user's mistake with data, and what the sentence about it must name: the option or file, the value, the way on."""

import os
from pathlib import Path

import pytest

from moevision.data import ImageDataModule, SyntheticPets
from moevision.data.folder import check_images, read_folder
from moevision.data.scores import Scores, apply_lists, choose_kept_images, prune
from moevision.data.splits import Splits, SplitSettings, make_splits
from tests.data.conftest import Folder, listed, names, opened, ready, refusal
from tests.data.test_choices import CLASSES, NOTES, TRAIN, apply
from tests.data.test_prune import decided, scores

PETS = {"cat": 10, "dog": 10}
SPLIT = {"train/cat": 4, "train/dog": 4}
SCORES_HEAD = "image,label,visits,aum,el2n,loss_mean,loss_last,p_mean,p_std,forgetting,correct\n"


def folder(make: Folder, layout: dict[str, int | str]) -> list[str]:
    """Notes on a folder of so many images or an empty file ("")."""
    counts = {name: count for name, count in layout.items() if isinstance(count, int)}
    root = make(counts)
    if len(list(root.iterdir())) < len({name.partition("/")[0] for name in counts}):
        pytest.skip("this disk doesn't tell upper from lower case")
    for name in layout.keys() - counts.keys():
        (root / name).write_bytes(b"")
    return read_folder(root).notes


def path(make: Folder, name: str) -> None:
    root = make({"cat": 4, "dog": 4})
    for file in ("pictures.zip", "birds.yaml"):
        root.with_name(file).write_bytes(b"")
    opened(root.parent / name)


def manifest(make: Folder, lines: str, head: str = "path,label") -> list[str]:
    return opened(listed(make(PETS), lines.split("\n") if lines else [], head)).notes


def row(make: Folder, text: str) -> list[str]:
    """A manifest with this on line 4."""
    return manifest(make, f"cat/000.png,cat\ndog/000.png,dog\n{text}")


def split_row(make: Folder, text: str) -> None:
    head = "path,label,split"
    manifest(make, f"cat/000.png,cat,train\ndog/000.png,dog,train\n{text}", head)


def pipe(make: Folder, name: str) -> None:
    """It isn't waited for."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    os.mkfifo(make(PETS) / name)
    manifest(make, f"{name},cat\ndog/000.png,dog")


def cut(make: Folder, settings: dict[str, object]) -> None:
    make_splits(read_folder(make(PETS)), SplitSettings(**settings))


def to_train(make: Folder, layout: dict[str, int | str]) -> None:
    check_images(str(make(layout)))


def small_class(make: Folder, layout: dict[str, int]) -> None:
    make_splits(read_folder(make(layout)), SplitSettings())


def lists(make: Folder, files: dict[str, str]) -> None:
    apply(make({}, name="lists").parent, **files)


def no_list(make: Folder, name: str) -> None:
    apply_lists(Splits({"train": TRAIN}, dict(NOTES)), CLASSES, Path(name), None)


def decisions(make: Folder, text: str) -> None:
    choose_kept_images(scores("xxxzz"), decided(make({"": 0}), text))


def pruned(make: Folder, hardest: float) -> None:
    prune(scores("x" * 10), "ccs", 0.5, hardest=hardest)


def scores_file(make: Folder, text: str | None) -> None:
    file = make({"": 0}) / "scores.csv"
    if text is not None:
        file.write_text(text)
    Scores.read(file)


def module(make: Folder, options: dict[str, object]) -> None:
    ImageDataModule(**options)


def weights(make: Folder, value: dict[str, float]) -> None:
    ready(make(PETS), class_weights=value)


def drawn(make: Folder, options: dict[str, object]) -> None:
    SyntheticPets(**({"size": 8} | options))


def missing(make: Folder, name: str) -> None:
    ready(name, root=str(make({"": 0})))


def unpacked(make: Folder, name: str, download: bool = False) -> None:
    """Folders that an interrupted unpacking leaves."""
    photos = "imagenette2-320/train"
    root = make({f"{photos}/n01440764": 3, f"{photos}/n02102040": 3, "oxford-iiit-pet/images": 0})
    (root / "oxford-iiit-pet/annotations").mkdir()
    opened(name, root=str(root), download=download)


def unpacked_again(make: Folder, name: str) -> None:
    unpacked(make, name, download=True)


def without_test(make: Folder, layout: dict[str, int]) -> None:
    data = ready(make(layout))
    del data.contents.datasets["test"]
    data.test_dataloader()


MISTAKES = [
    (folder, {"cat": 4}, "only one class | 'cat' | needs two"),
    (folder, {"wrapped/cat": 4, "wrapped/dog": 4}, "did you mean | wrapped (it | 'cat', 'dog'"),
    (folder, {"cat": 4, "dog": 0}, "class folder 'dog' | fill it | a _ before"),
    (
        to_train,
        {"cat": 4, "dog": 0, "elk": 0, "fox": 2},
        "'dog', 'elk' | fewer than 3 images | 'fox' | a _ before",
    ),
    (
        to_train,
        {**SPLIT, "train/elk": 1, "train/fox": 0, "val/cat": 1, "val/cow": 1},
        "no images | 'fox' | fewer than 2 | 'elk' | val has no | 'dog', 'elk', 'fox' | 'cow' | lacks",
    ),
    (folder, {"cat": 0, "dog": 0}, "holds no images | cat/1.jpg"),
    (folder, {".": 3}, "holds 3 images | no class folders | cat/1.jpg"),
    (folder, {**SPLIT, "val/cat": 2}, "val has no | 'dog' | add some"),
    (folder, {**SPLIT, "test/cat": 2, "test/dog": 0}, "test has no | 'dog' | add some"),
    (folder, {**SPLIT, "val/cat": 2, "val/dog": 1, "val/elk": 1}, "'elk' | train lacks | remove"),
    (folder, {**SPLIT, "val/cat": 2, "valid/cat": 2}, "stand for val | keep one"),
    (folder, {"train": 4, "test": 4}, "'test', 'train' | no classes | train/cat/1.jpg"),
    (
        folder,
        {"val/cat": 4, "val/dog": 4, "Test/cat": 4},
        "'Test', 'val' | no classes | train among",
    ),
    (
        folder,
        {"cat": 0, "dog": 0, "cat/a.HEIC": "", "dog/b.HEIC": ""},
        "no images | 2 x .heic | PNG",
    ),
    (
        folder,
        {"cat": 1, "dog": 0, "dog/b.HEIC": ""},
        "class folder 'dog' | 1 x .heic | JPEG or PNG",
    ),
    (folder, {"cat": 1, "dog": 0, "a.png": ""}, "'dog' | 1 images directly | no class"),
    (path, "pictrues", "no folder | did you mean | pictures?"),
    (path, "pictures/zebra/deeper", "no folder | 'cat', 'dog'"),
    (path, "pictures.zip", "is a file | unpack it"),
    (path, "birds.yaml", "configuration | --config | birds.yaml"),
    (lambda make, name: opened(name), "cifar-10", "no folder | the dataset 'cifar10'?"),
    (missing, "imagenet", "ImageNet is not | train/ and val/"),
    *(
        (missing, name, f"{name} is not | fit {name} | --data.download true | --data.root")
        for name in ("cifar10", "imagenette", "pets", "pets_cat_dog")
    ),
    *(
        (call, name, f"in part only | delete | {files} | `moevision fit {name}")
        for name, files in (("imagenette", "imagenette2-320"), ("pets", "oxford-iiit-pet"))
        for call in (unpacked, unpacked_again)
    ),
    (without_test, PETS, "no test set | splits.csv"),
    (row, ",cat", "line 4 | '' is no | remove the row"),
    (row, "cat/000.png,", "line 4 | no label | remove the row"),
    (row, "cat/no.png,cat", "line 4 | no file | correct the path"),
    (row, f"cat/{'x' * 5000}.png,cat", "line 4 | no file"),
    (row, "https://a.b/c.png,cat", "line 4 | https://a.b/c.png | this computer"),
    (row, "cat/\0.png,cat", "line 4"),
    (row, "cat/003.png,|", "line 4 | no label | fill it in"),
    (row, "cat/003.png,cat|", "line 4 | is empty | cat|outdoor"),
    (row, "cat/003.png,cat||dog", "line 4 | is empty | cat|outdoor"),
    (row, "cat/003.png,cat| |dog", "line 4 | is empty | cat|outdoor"),
    (row, "cat/000.png,cat|dog", "line 4 | 'cat|dog' here | 'cat' on line | multi-label"),
    (row, "cat/003.png," + "cat|" * 250_000 + "dog", "line 4 | read as CSV"),
    (row, "cat/000.png,dog", "line 4 | 'dog' here | 'cat' on line | multi-label"),
    (row, "dog/../cat/000.png,dog", "line 4 | on line 2 | multi-label"),
    (row, "cat/000.png,cat,train", "line 4 | 3 cells | first line 2 | quotes"),
    (row, "cat/" + "0" * 200_000 + ",cat", "line 4 | read as CSV"),
    (split_row, "cat/001.png,cat,", "line 4 | others don't | in none"),
    (split_row, "cat/001.png,cat,later", "line 4 | 'later' | train, val"),
    (split_row, "cat/000.png,cat,test", "line 4 | another split | line 2"),
    (split_row, "cat/001.png,cat,test", "test split | 'dog'"),
    (manifest, "cat/000.png,cat", "has 1 classes | needs two"),
    (manifest, "", "lists no image | add a row"),
    (manifest, "cat/000.png,caf\u00e9\ndog/000.png,cafe\u0301", "look the same | rename one"),
    (
        lambda make, lines: manifest(make, lines, "path,label,split"),
        "cat/000.png,cat,test\ndog/000.png,dog,test",
        "no train split | only test",
    ),
    (
        lambda make, head: manifest(make, "", head),
        "image,label",
        "'image', 'label' | path and label | --data.image_column",
    ),
    (pipe, "pipe.png", "line 2 | no file"),
    (cut, {"val_fraction": 0.0}, "val_fraction 0 | --data.val_fraction | below 1"),
    (
        cut,
        {"val_fraction": 0.5, "test_fraction": 0.5},
        "val_fraction 0.5 | test_fraction 0.5 | below",
    ),
    (cut, {"test_fraction": -0.1}, "test_fraction -0.1 | below 1"),
    (cut, {"test_fraction": 0.0}, "test_fraction 0 | or add test/"),
    (small_class, {"cat": 1, "dog": 2, "elk": 4}, "'cat', 'dog' | independent | remove the class"),
    (cut, {"group_by": "("}, "--data.group_by | regular expression"),
    (cut, {"group_by": r"\d"}, "--data.group_by | exactly one"),
    (cut, {"group_by": "(cat)/"}, "--data.group_by | 'dog/000.png' | every path"),
    (lists, {"keep": "image\ncat/x.png\n"}, "--data.keep | 1 images | 'cat/x.png' | --data.seed"),
    (lists, {"keep": "image\ncat/a.png\n"}, "class '=dog' | keep some"),
    (lists, {"keep": "image,keep\ncat/a.png,maybe\n"}, "line 2 | 'maybe' | yes or no"),
    (lists, {"keep": "image\ncat/a.png\ncat/a.png\n"}, "'cat/a.png' twice"),
    (lists, {"keep": "image,decision\ncat/a.png,drop\n"}, "--by decisions"),
    (lists, {"keep": "path\ncat/a.png\n"}, "column image"),
    (lists, {"keep": ""}, "column image"),
    (lists, {"keep": "image\n"}, "class 'cat' | keep some"),
    (lists, {"keep": 'image\n"cat/a.png\n'}, "can't be used"),
    (lists, {"relabel": "image,new_label\n'=dog/t.png,cat\n"}, "--data.relabel | =dog/t.png"),
    (
        lists,
        {"relabel": "image,new_label\ncat/a.png,'=dog\ncat/b.png,'=dog\n"},
        "'cat' | keep some",
    ),
    (lists, {"relabel": "image,keep\ncat/a.png,yes\n"}, "column new_label"),
    (
        lists,
        {"relabel": "image,new_label\ncat/a.png,cow\n"},
        "line 2 | no class 'cow' | (cat, '=dog)",
    ),
    (no_list, "none.csv", "--data.keep | none.csv | CSV file"),
    (decisions, "b,x,maybe,\n", "line 2 | 'maybe' | keep, relabel, drop"),
    (decisions, "b,x,relabel,y\n", "new_label | 'y' | no such class"),
    (decisions, "q,x,drop,\n", "--decisions | names 1"),
    (decisions, "b,x,drop,\nb,x,keep,\n", "'b' twice | keep one"),
    (pruned, 0.6, "--hardest 0.6 | --keep | 4 images"),
    (scores_file, None, "scores.csv | --data.scores"),
    (scores_file, "", "no table | fit writes it"),
    (scores_file, "image,label\n", "no table | fit writes it"),
    (scores_file, SCORES_HEAD + "a,b,1\n", "no table | fit writes it"),
    (module, {"batch_size": 0}, "--data.batch_size is | at least 1"),
    (module, {"random_erasing": 1.5}, "--data.random_erasing is | and 1"),
    (module, {"mixup": -1.0}, "--data.mixup is | at least 0"),
    (module, {"std": (1.0, 0.0, 1.0)}, "--data.std is | above 0"),
    (weights, {"elk": 1.0}, "--data.class_weights | 'elk' | cat, dog"),
    (drawn, {"size": 0}, "at least 1 | not 0"),
    (drawn, {"image_size": 8}, "at least 16 | not 8"),
    (drawn, {"split": "valid"}, "train, val, test | 'valid'"),
]


@pytest.mark.parametrize(("call", "argument", "fragments"), MISTAKES)
def test_a_mistake_is_named_with_the_way_on(image_folder, call, argument, fragments):
    with refusal(*fragments.split(" | ")):
        call(image_folder, argument)


@pytest.mark.parametrize(
    ("call", "argument", "notes"),
    [
        (folder, {**SPLIT, "test": 5}, ["test has no | for testing"]),
        (
            folder,
            {**PETS, "_unknown_": 3, "__MACOSX": 1, "_empty": 0},
            ["_unknown_ begins | rename it"],
        ),
        (folder, {**SPLIT, "dev/cat": 4, "dev/dog": 4, "docs": 0}, ["folders dev | set val"]),
        (
            folder,
            {**PETS, ".git": 1, "cat/a.txt": "", "cat/._0.png": ""},
            ["aren't read | 1 x .txt"],
        ),
        (folder, {"Parus": 2, "parus": 2, "Turdus": 2}, ["'Parus', 'parus' | upper and lower"]),
        (
            folder,
            {f"{split}_set/{name}": 2 for split in ("training", "test") for name in PETS},
            ["'test_set', 'training_set' | train, val or"],
        ),
        (folder, {"train": 5, "plane": 5}, []),  # a class of railway trains
        (folder, {"train_station": 2, "val_gardena": 2, "contest": 2}, []),
        (row, "cat/000.png,cat", ["1 rows | left out"]),
        (manifest, "cat/000.png,cat\ncat/001.png,Cat", ["'Cat', 'cat' | upper and lower"]),
    ],
)
def test_what_is_left_out_is_noted(image_folder, call, argument, notes):
    for note, fragments in zip(call(image_folder, argument), notes, strict=True):
        names(note, *fragments.split(" | "))
