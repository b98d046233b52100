"""Datasets given as a table: CSV manifests, and Hugging Face datasets (saved Arrow folders; nothing is fetched)."""

import io
import json
import pickle
import shutil
import tarfile
from itertools import product

import numpy as np
import pytest
from PIL import Image

from moevision.data.open import count_images, open_collection
from moevision.data.scores import keys_of
from moevision.data.splits import SplitSettings, make_splits
from moevision.errors import escape_csv_cell
from moevision.train.recipe import run_name
from tests.data.conftest import (
    listed,
    names,
    opened,
    ready,
    refusal,
    samples_of,
    sizes,
    split_of,
    splits_of_groups,
)


@pytest.fixture
def pictures(image_folder):
    return image_folder({"cat": 10, "dog": 10})


def all_rows(root, extra=lambda number: ""):
    """A row for each image; `extra` of its number is what follows path and label."""
    files = [file.relative_to(root).as_posix() for file in sorted(root.glob("*/*.png"))]
    return [f"{file},{file.partition('/')[0]}{extra(number)}" for number, file in enumerate(files)]


def in_split_and_group(number):
    split = (["train"] * 6 + ["valid"] * 2 + ["TEST"] * 2)[number % 10]
    return f",{split},{number % 10 // 2}"


# ---- CSV manifests


def test_a_manifest_is_split_as_the_folder_that_it_lists(pictures):
    table = ready(listed(pictures, all_rows(pictures)))
    folder = ready(pictures)
    assert table.class_names == folder.class_names
    assert table.file_list_sha256() == folder.file_list_sha256()
    assert table.file_sizes_sha256() == folder.file_sizes_sha256()
    assert samples_of(table) == samples_of(folder)


@pytest.mark.parametrize("columns", ["split,group", "Split,Group"])  # as Kaggle's lists have it
def test_splits_and_groups_of_a_manifest(pictures, columns):
    rows = all_rows(pictures, in_split_and_group)
    data = ready(listed(pictures, rows, f"path,label,{columns}"))
    assert [list(counts.values()) for counts in data.class_counts.values()] == [
        [6, 6],
        [2, 2],
        [2, 2],
    ]
    names(data.split_note, "in one split", f"the same '{columns[6:]}'", "5 groups")


@pytest.mark.parametrize(("column", "group_by"), [("group", None), ("patient", "patient")])
def test_without_splits_the_groups_decide(pictures, column, group_by):
    file = listed(pictures, all_rows(pictures, lambda i: f",{i % 10 // 2}"), f"path,label,{column}")
    data = ready(file, val_fraction=0.2, test_fraction=0.2, group_by=group_by)
    assert all(
        len(splits) == 1 for splits in splits_of_groups(data, lambda name: int(name[4:7]) // 2)
    )
    names(data.split_note, "in one split", column)
    assert column == "group" or "in one split" not in ready(file).split_note


def test_a_column_that_is_called_otherwise_is_named(pictures):
    """Kaggle's `data set`: its test images must not become training images in silence."""
    rows = all_rows(pictures, in_split_and_group)
    (note,) = opened(listed(pictures, rows, "path,label,data set,patient")).notes
    names(note, "the column 'data set' of", "not used", "call it split")
    assert opened(listed(pictures, rows, "path,label,split,patient")).notes == []


def test_paths_start_at_the_csv_and_may_be_absolute(pictures, tmp_path):
    elsewhere = tmp_path / "lists"
    elsewhere.mkdir()
    rows = all_rows(pictures)
    inside = opened(listed(pictures, [f"{pictures}/{row}" for row in rows]))
    outside = opened(listed(elsewhere, [f"../pictures/{row}" for row in rows]))
    ids = {row.split(",")[0] for row in rows}  # no folder of this machine is in them
    assert split_of(inside).keys() == ids
    assert split_of(outside).keys() == {f"../pictures/{sample_id}" for sample_id in ids}
    assert outside.open(outside.samples["all"][0]).size == (16, 16)


def test_a_manifest_from_a_spreadsheet(pictures):
    rows = [f'"{path}" , {label}' for path, label in (row.split(",") for row in all_rows(pictures))]
    file = listed(pictures, [*rows, "", ","], "﻿path, label")
    assert len(opened(file).samples["all"]) == 20
    other = listed(pictures, all_rows(pictures), "file,kind")
    assert len(opened(other, columns=("file", "kind")).samples["all"]) == 20


def test_files_of_one_name_are_images_of_their_own_and_names_that_are_written_alike_are_refused(
    pictures,
):
    """scores.csv has a row for each sample id: no two images of a manifest may share one."""
    names = split_of(opened(listed(pictures, all_rows(pictures))))
    assert len({name.rpartition("/")[2] for name in names}) < len(names)  # cat/000.png, dog/000.png
    assert len(set(keys_of(map(escape_csv_cell, names)))) == len(names)
    for alike in (("=1.png", "'=1.png"), ("a\x1b.png", "a\\x1b.png")):
        for name in alike:
            shutil.copy(pictures / "cat/000.png", pictures / name)
        with refusal("look the same", "rename one"):
            opened(listed(pictures, [*all_rows(pictures), *(f"{name},cat" for name in alike)]))


def test_counts_and_names_for_the_recipe(pictures):
    assert count_images(listed(pictures, all_rows(pictures))) == 20
    assert run_name("somewhere/birds.csv") == "birds"
    assert run_name("hf:user/birds") == "birds"
    assert run_name("hf:user/birds:small") == "birds-small"


# ---- Hugging Face datasets


@pytest.fixture(params=[pytest.param("", marks=pytest.mark.needs("datasets"))])
def hub(monkeypatch, tmp_path):
    """The package `datasets`, kept from the network and from the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def stored(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return {"bytes": out.getvalue(), "path": None}


def pixels_of(row):
    return np.asarray(Image.open(io.BytesIO(stored(row)["bytes"])))


def rows_of(hub, labels, feature=None, start=0, **more):
    """A dataset of images with labels; `more` columns are (feature, values)."""
    feature = feature or hub.ClassLabel(names=["dog", "cat", "never used"])
    images = [stored(start + number) for number in range(len(labels))]
    columns = {"img": (hub.Image(), images), "label": (feature, labels), **more}
    features = hub.Features({name: kind for name, (kind, _) in columns.items()})
    values = {name: values for name, (_, values) in columns.items()}
    return hub.Dataset.from_dict(values, features=features)


def test_a_saved_dataset_without_splits(hub, tmp_path):
    rows_of(hub, [0, 1] * 10).save_to_disk(tmp_path / "pets")
    data = ready(tmp_path / "pets")
    assert data.class_names == ["dog", "cat"]
    assert [list(counts.values()) for counts in data.class_counts.values()] == [
        [8, 8],
        [1, 1],
        [1, 1],
    ]
    dataset = data.contents.datasets["train"]
    sample = dataset.samples[3]
    row = int(sample.sample_id.removeprefix("all/"))
    assert sample.label == row % 2
    assert dataset.collection.size_bytes(sample) == len(stored(row)["bytes"])
    assert count_images(tmp_path / "pets") == 20
    copy = pickle.loads(pickle.dumps(dataset.collection))  # as worker processes get it
    for collection in (dataset.collection, copy):
        np.testing.assert_array_equal(collection.open(sample), pixels_of(row))


def test_tars_in_the_webdataset_format_are_a_dataset(hub, tmp_path):
    """KEY.png and KEY.cls; the split is a word in a tar's name."""
    (tmp_path / "wds").mkdir()
    for split, number in (("train", 8), ("validation", 4)):
        with tarfile.open(tmp_path / "wds" / f"pets-{split}-000.tar", "w") as archive:
            for row, ending in product(range(number), ("png", "cls")):
                data = stored(row)["bytes"] if ending == "png" else str(row % 2).encode()
                member = tarfile.TarInfo(f"{row:04d}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    with refusal("WebDataset format", f"hf:{tmp_path}"):
        ready(tmp_path / "wds")
    pets = open_collection(f"hf:{tmp_path / 'wds'}")
    assert pets.samples.keys() == {"train", "val"}
    assert sizes(pets) == [8, 4]
    assert pets.class_names == ["0", "1"]
    np.testing.assert_array_equal(pets.open(pets.samples["train"][3]), pixels_of(3))
    assert pets.samples["train"][3].label == 1


def test_a_folder_becomes_a_dataset(hub, tmp_path, image_folder):
    """As docs/guides/many-images.md has it: the files byte by byte, the folder's classes and splits."""
    root = tmp_path / "photos"
    for split, number in (("train", 6), ("validation", 2), ("test", 2)):
        image_folder({"cat": number, "dog": number}, name=f"photos/{split}")
    hub.load_dataset("imagefolder", data_dir=str(root)).save_to_disk(tmp_path / "saved")
    folder, saved = (open_collection(str(path)) for path in (root, tmp_path / "saved"))
    assert sizes(folder) == sizes(saved) == [12, 4, 4]
    assert folder.class_names == saved.class_names == ["cat", "dog"]
    for split, samples in folder.samples.items():
        files = sorted((sample.label, folder.stored(sample)) for sample in samples)
        assert sorted((s.label, saved.stored(s)) for s in saved.samples[split]) == files


def test_copies_are_found_among_rows_that_name_files(hub, tmp_path, image_folder):
    """A dataset's folder of images has paths in its rows, and no bytes; the hub has many of these."""
    root = tmp_path / "photos"
    for split in ("train", "test"):
        image_folder({"cat": 6, "dog": 6}, name=f"photos/{split}")
    shutil.copy(root / "train/cat/000.png", root / "test/cat/001.png")
    pets = open_collection(f"hf:{root}")
    bytes_ = sorted(file.stat().st_size for file in root.rglob("*.png"))
    assert (
        sorted(pets.size_bytes(sample) for part in pets.samples.values() for sample in part)
        == bytes_
    )
    for data in (pets, open_collection(str(root))):
        (warning,) = make_splits(data, SplitSettings()).warnings
        names(warning, "train images", "not used", "byte-identical copies")


@pytest.mark.filterwarnings("ignore::moevision.errors.DataWarning")
def test_a_saved_dataset_keeps_its_splits(hub, tmp_path):
    hub.DatasetDict(
        train=rows_of(hub, [0, 1] * 6),
        validation=rows_of(hub, [0, 1], start=50),
        test=rows_of(hub, [1, 0, -1], start=70),
        extra=rows_of(hub, [0, 1], start=90),
    ).save_to_disk(tmp_path / "pets")
    data = ready(tmp_path / "pets")
    assert [sum(counts.values()) for counts in data.class_counts.values()] == [12, 2, 2]
    names(data.split_note, "dataset gives them")
    names(" ".join(data.warnings), "1 of 3", "test images", "'extra'")


def test_copies_and_groups_stay_on_one_side(hub, tmp_path):
    patients = (hub.Value("int64"), [number // 4 for number in range(20)])
    rows_of(hub, [0, 1] * 10, patient=patients).save_to_disk(tmp_path / "pets")
    data = ready(tmp_path / "pets", group_by="patient", val_fraction=0.2, test_fraction=0.2)
    sides = splits_of_groups(data, lambda sample_id: int(sample_id[4:]) // 4)
    assert all(len(side) == 1 for side in sides)
    names(data.split_note, "the same 'patient'", "5 groups")
    twice = hub.concatenate_datasets([rows_of(hub, [0, 1] * 5), rows_of(hub, [0, 1] * 5)])
    twice.save_to_disk(tmp_path / "twice")
    data = ready(tmp_path / "twice", val_fraction=0.2)
    sides = splits_of_groups(data, lambda sample_id: int(sample_id[4:]) % 10)
    assert all(len(side) == 1 for side in sides)


@pytest.mark.parametrize(
    ("kind", "value", "none"), [("string", "p1", None), ("float64", 30.0, float("nan"))]
)
def test_images_without_a_value_are_in_no_group_as_in_a_csv(hub, tmp_path, kind, value, none):
    cells = [value if number in (0, 5) else none for number in range(20)]
    rows_of(hub, [0, 1] * 10, group=(hub.Value(kind), cells)).save_to_disk(tmp_path / "pets")
    column = opened(tmp_path / "pets").column("group")
    found = {row: cell for row, cell in column.items() if cell}
    assert found == dict.fromkeys(("all/000000", "all/000005"), str(value))


@pytest.mark.parametrize(
    ("kind", "labels", "class_names"),
    [
        ("string", ["cat", "dog", "", None, "Dog"], ["Dog", "cat", "dog"]),
        ("int64", [2, 10], ["2", "10"]),
        ("bool", [False, True], ["False", "True"]),
    ],
)
def test_labels_without_names(hub, tmp_path, kind, labels, class_names):
    rows_of(hub, labels * 2, hub.Value(kind)).save_to_disk(tmp_path)
    found = opened(tmp_path)
    assert (found.class_names, sizes(found)) == (class_names, [2 * len(class_names)])
    if kind == "string":
        names(found.notes[0], "4 of 10 all images")
        names(found.notes[1], "'Dog', 'dog'", "upper and lower")


def test_columns_must_be_clear(hub, tmp_path):
    names = hub.ClassLabel(names=["a", "b"])
    table = rows_of(
        hub,
        [0, 1] * 5,
        coarse=(names, [1, 1, 0, 0, 0] * 2),
    )
    table.save_to_disk(tmp_path / "two")
    with refusal("coarse (ClassLabel)", "--data.label_column"):
        opened(tmp_path / "two")
    assert opened(tmp_path / "two", columns=(None, "coarse")).class_names == ["a", "b"]
    with refusal("no 'fine'", "--data.label_column"):
        opened(tmp_path / "two", columns=(None, "fine"))
    with refusal("'label'", "no images", "ClassLabel"):
        opened(tmp_path / "two", columns=("label", "coarse"))
    table.remove_columns("img").save_to_disk(tmp_path / "blind")
    with refusal("--data.image_column"):
        opened(tmp_path / "blind")


@pytest.mark.parametrize(
    ("kind", "labels"),
    [("classes", [[0], [0, 1]]), ("words", [["a"], ["a", "b"]]), ("text", ["a|b", "b"])],
)
def test_multi_label_data_are_refused_in_words(hub, tmp_path, kind, labels):
    text = hub.Value("string")
    lists = {"classes": hub.Sequence(hub.ClassLabel(names=["a", "b"])), "words": hub.Sequence(text)}
    rows_of(hub, labels * 4, lists.get(kind, text)).save_to_disk(tmp_path)
    with refusal("multi-label data", "one model"):
        opened(tmp_path)


def test_other_columns_are_not_decoded(hub, tmp_path):
    """A mask that is cut short is no reason to lose its image."""
    masks = [{"bytes": stored(number)["bytes"][:40], "path": None} for number in range(20)]
    rows_of(hub, [0, 1] * 10, mask=(hub.Image(), masks)).save_to_disk(tmp_path / "pets")
    data = ready(tmp_path / "pets", image_column="img")
    assert len(next(iter(data.train_dataloader()))["image"]) == 8
    assert data.bad_images == []


def test_a_split_is_refused_where_rows_have_moved(hub, tmp_path):
    """The ids are numbers of rows: after one is dropped they stand for other images."""
    rows = rows_of(hub, [0, 1] * 20)
    rows.save_to_disk(tmp_path / "pets")
    ready(tmp_path / "pets", run_dir=tmp_path)
    shutil.rmtree(tmp_path / "pets")
    rows.select(range(1, 40)).save_to_disk(tmp_path / "pets")
    with refusal("splits.csv lists", "other labels", "another order", "another run folder"):
        ready(tmp_path / "pets", run_dir=tmp_path)


def test_a_split_is_refused_where_a_held_out_label_was_corrected(pictures, tmp_path):
    """Of a training image it is what `--data.relabel` corrects, and no reason to refuse."""
    rows = all_rows(pictures)
    data = ready(listed(pictures, rows), run_dir=tmp_path)
    train, test = (samples_of(data)[split][0].sample_id for split in ("train", "test"))
    other = {"cat": "dog", "dog": "cat"}

    def corrected(name):
        cells = (row.split(",") for row in rows)
        return listed(
            pictures, [f"{path},{other[label] if path == name else label}" for path, label in cells]
        )

    ready(corrected(train), run_dir=tmp_path)
    with refusal(f"lists {test}"):
        ready(corrected(test), run_dir=tmp_path)


def test_rows_without_pixels_are_bad_images(hub, tmp_path):
    images = [*map(stored, range(18)), {"bytes": b"no image", "path": None}, None]
    rows_of(hub, [0, 1] * 10, img=(hub.Image(), images)).save_to_disk(tmp_path / "pets")
    data = ready(tmp_path / "pets", max_bad_fraction=1)
    reasons = {name: reason for name, reason, _ in data.bad_images}
    assert set(reasons) == {"all/000018", "all/000019"}
    assert "it is not a JPEG" in reasons["all/000018"]


def test_a_dataset_that_is_not_there(hub, tmp_path):
    with refusal(
        "user/none can't", "fit hf:user/none", "--data.download true", "hf:user/none:CONFIG"
    ):
        opened("hf:user/none")
    rows_of(hub, [0, 1] * 4).save_to_disk(tmp_path / "pets")
    (tmp_path / "pets" / "dataset_info.json").write_text("{")
    with refusal("can't be read", "save it anew"):
        opened(tmp_path / "pets")


def test_nothing_is_fetched_unless_it_may_be(hub, tmp_path, monkeypatch):
    """What `load_dataset` would find as its network setting, with and without --data.download."""
    seen = []

    def load_dataset(name, config):
        seen.append((name, config, hub.config.HF_HUB_OFFLINE))
        return rows_of(hub, [0, 1] * 5)

    monkeypatch.setattr(hub, "load_dataset", load_dataset)
    monkeypatch.setattr(hub.config, "HF_HUB_OFFLINE", False)
    opened("hf:user/pets")
    opened("hf:user/pets:small", download=True)
    (tmp_path / "C:tars").mkdir()  # as C:\\tars on Windows, a folder with a colon in its name
    opened(f"hf:{tmp_path / 'C:tars'}")
    assert seen == [
        ("user/pets", None, True),
        ("user/pets", "small", False),
        (str(tmp_path / "C:tars"), None, True),
    ]
    assert hub.config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:9/x.tar",
        "hf://datasets/evil/x/*.tar",
        "s3://evil/x.tar",
        "zip://x.csv::http://127.0.0.1:9/x.zip",
        "filecache::http://127.0.0.1:9/x.tar",
    ],
)
@pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
def test_a_folder_may_not_send_for_images(hub, address, file, tmp_path, monkeypatch):
    """Only with --data.download; `load_dataset` would ask the address before it looks at its offline setting."""
    folder, loaded = tmp_path / "tars", []
    folder.mkdir()
    configs = f"configs:\n- config_name: default\n  data_files:\n  - {{split: train, path: '{address}'}}\n"
    (folder / file).write_text(f"---\n{configs}---\n" if file == "README.md" else configs)
    monkeypatch.setattr(
        hub, "load_dataset", lambda name, config: loaded.append(name) or rows_of(hub, [0, 1] * 5)
    )
    with refusal("other addresses", "--data.download true"):
        opened(f"hf:{folder}")
    assert not loaded
    opened(f"hf:{folder}", download=True)
    (folder / file).write_text(
        "---\nhomepage: http://127.0.0.1:9\n---\n" if file == "README.md" else ""
    )
    opened(f"hf:{folder}")
    assert loaded == [str(folder)] * 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("_format_type", kind) for kind in ("arrow", "torch", "custom")),
        ("_format_columns", ["img"]),
        ("_output_all_columns", True),
        ("_format_kwargs", {"transform": "os.system"}),
    ],
)
def test_the_format_of_a_saved_dataset_changes_nothing(hub, name, value, tmp_path):
    """Rows are plain values whatever `state.json` says; a function can't be named there."""
    rows_of(hub, [0, 1] * 5).save_to_disk(tmp_path)
    expected = opened(tmp_path)
    state = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**state, name: value}))
    if value == "custom" or name == "_format_kwargs":
        with refusal("can't be read", "save it anew"):
            opened(tmp_path)
    else:
        found = opened(tmp_path)
        assert (found.class_names, found.samples) == (expected.class_names, expected.samples)


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "state.json").write_text(json.dumps({}))
    with refusal("pip install datasets"):
        opened(tmp_path)


def test_classes_that_are_written_alike_are_refused(hub, tmp_path):
    """One é is one character, the other an e with an accent."""
    alike = hub.ClassLabel(names=["caf\xe9", "cafe\u0301"])
    rows_of(hub, [0, 1] * 5, alike).save_to_disk(tmp_path / "alike")
    with refusal("caf\xe9", "look the same", "rename"):
        opened(tmp_path / "alike")
