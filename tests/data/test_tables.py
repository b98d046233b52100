"""Datasets given as a table: CSV manifests, and Hugging Face datasets (saved Arrow folders; nothing is fetched)."""

import io
import json
import pickle
import shutil
import tarfile
from itertools import chain

import numpy as np
import pytest
from PIL import Image

from moevision.data.named import count_images, open_collection
from moevision.data.scores import keys_of
from moevision.data.splits import SplitSettings, make_splits
from moevision.errors import escape_csv_cell
from moevision.train.recipe import run_name
from tests.data.conftest import listed, names, opened, ready, refusal


@pytest.fixture
def pictures(image_folder):
    return image_folder({"cat": 10, "dog": 10})


def all_rows(root, extra=lambda number: ""):
    files = sorted(root.glob("*/*.png"))
    return [
        f"{file.relative_to(root).as_posix()},{file.parent.name}{extra(i)}"
        for i, file in enumerate(files)
    ]


# ---- CSV manifests


def test_a_manifest_is_split_as_the_folder_that_it_lists(pictures):
    table = ready(listed(pictures, all_rows(pictures)))
    folder = ready(pictures)
    assert table.class_names == folder.class_names
    assert table.file_list_sha256() == folder.file_list_sha256()
    assert table.file_sizes_sha256() == folder.file_sizes_sha256()
    assert [split.samples for split in table.contents.datasets.values()] == [
        split.samples for split in folder.contents.datasets.values()
    ]


def test_splits_and_groups_of_a_manifest(pictures):
    splits = ["train"] * 6 + ["valid"] * 2 + ["TEST"] * 2
    rows = all_rows(pictures, lambda i: f",{splits[i % 10]},{i % 10 // 2}")
    data = ready(listed(pictures, rows, "path,label,split,group"))
    assert data.class_counts == {
        split: {"cat": count, "dog": count}
        for split, count in (("train", 6), ("val", 2), ("test", 2))
    }
    names(data.split_note, "in one split", "'group'", "5 groups")
    # without given splits the groups decide
    rows = all_rows(pictures, lambda i: f",{i % 10 // 2}")
    for head, options in (
        ("path,label,group", {}),
        ("path,label,patient", {"group_by": "patient"}),
    ):
        data = ready(listed(pictures, rows, head), val_fraction=0.2, test_fraction=0.2, **options)
        side = {}
        for split, dataset in data.contents.datasets.items():
            for sample in dataset.samples:
                side.setdefault(int(sample.sample_id[4:7]) // 2, set()).add(split)
        assert all(len(sides) == 1 for sides in side.values())
        assert head.rpartition(",")[2] in data.split_note
    ungrouped = ready(listed(pictures, rows, "path,label,patient"))
    assert "in one split" not in ungrouped.split_note


def test_columns_of_another_case_or_name_are_used_or_named(pictures):
    """Kaggle's lists say `Split` or `data set`: their test images must not become training images in silence."""
    splits = ["train"] * 6 + ["valid"] * 2 + ["test"] * 2
    rows = all_rows(pictures, lambda i: f",{splits[i % 10]},{i % 10 // 2}")
    data = ready(listed(pictures, rows, "path,label,Split,Group"))
    assert data.class_counts["train"] == {"cat": 6, "dog": 6}
    names(data.split_note, "the same 'Group'", "5 groups")
    unused = opened(listed(pictures, rows, "path,label,data set,patient"))
    assert [note.partition(" of ")[0] for note in unused.notes] == ["the column 'data set'"]
    names(unused.notes[0], "not used", "call it split")
    assert opened(listed(pictures, rows, "path,label,split,patient")).notes == []


def test_folders_and_patterns_are_named_too(pictures):
    names(ready(pictures, group_by=r"(\d\d)\.png").split_note, "path agrees in", r"(\d\d)\.png")
    for index, file in enumerate(sorted(pictures.glob("*/*.png"))):
        (file.parent / f"{index % 3}").mkdir(exist_ok=True)
        file.rename(file.parent / f"{index % 3}" / file.name)
    data = ready(pictures, group_by="parent", val_fraction=0.3, test_fraction=0.3)
    names(data.split_note, "one folder", "--data.group_by parent", "6 groups")


def test_paths_start_at_the_csv_and_may_be_absolute(pictures, tmp_path):
    elsewhere = tmp_path / "lists"
    elsewhere.mkdir()
    rows = [f"../pictures/{row}" for row in all_rows(pictures)]
    assert {sample.sample_id for sample in opened(listed(elsewhere, rows)).samples["all"]} == {
        row.split(",")[0] for row in rows
    }
    rows = [f"{pictures}/{row}" for row in all_rows(pictures)]
    ids = {sample.sample_id for sample in opened(listed(pictures, rows)).samples["all"]}
    assert ids == {
        row.split(",")[0] for row in all_rows(pictures)
    }  # no folder of this machine is in them
    collection = opened(listed(elsewhere, rows))
    assert collection.open(collection.samples["all"][0]).size == (16, 16)


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
    collection = opened(listed(pictures, all_rows(pictures)))
    names = [sample.sample_id for sample in collection.samples["all"]]
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


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The package `datasets`, kept from the network and from the user's cache."""
    pytest.importorskip("datasets")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return datasets


def stored(seed, size=16):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return {"bytes": out.getvalue(), "path": None}


def rows_of(hub, labels, feature=None, start=0, **more):
    feature = feature or hub.ClassLabel(names=["dog", "cat", "never used"])
    features = hub.Features(
        {"img": hub.Image(), "label": feature, **{name: kind for name, (kind, _) in more.items()}}
    )
    columns = {name: values for name, (_, values) in more.items()}
    images = [stored(start + number) for number in range(len(labels))]
    return hub.Dataset.from_dict({"img": images, "label": labels, **columns}, features=features)


needs_datasets = pytest.mark.needs("datasets")


@needs_datasets
def test_a_saved_dataset_without_splits(hub, tmp_path):
    rows_of(hub, [0, 1] * 10).save_to_disk(tmp_path / "pets")
    data = ready(tmp_path / "pets")
    assert data.class_names == ["dog", "cat"]
    assert data.class_counts == {
        split: {"dog": count, "cat": count}
        for split, count in (("train", 8), ("val", 1), ("test", 1))
    }
    dataset = data.contents.datasets["train"]
    sample = dataset.samples[3]
    row = int(sample.sample_id.removeprefix("all/"))
    assert sample.label == row % 2
    expected = np.asarray(Image.open(io.BytesIO(stored(row)["bytes"])))
    np.testing.assert_array_equal(dataset.collection.open(sample), expected)
    assert dataset.collection.size_bytes(sample) == len(stored(row)["bytes"])
    assert count_images(tmp_path / "pets") == 20
    copy = pickle.loads(pickle.dumps(dataset.collection))  # as worker processes get it
    np.testing.assert_array_equal(copy.open(sample), expected)


@needs_datasets
def test_tars_in_the_webdataset_format_are_a_dataset(hub, tmp_path, monkeypatch):
    """KEY.png and KEY.cls; the split is a word in a tar's name."""
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "wds").mkdir()
    for split, number in (("train", 8), ("validation", 4)):
        with tarfile.open(tmp_path / "wds" / f"pets-{split}-000.tar", "w") as archive:
            for row in range(number):
                for ending, data in (("png", stored(row)["bytes"]), ("cls", str(row % 2).encode())):
                    member = tarfile.TarInfo(f"{row:04d}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    with refusal("WebDataset format", f"hf:{tmp_path}"):
        ready(tmp_path / "wds")
    pets = open_collection(f"hf:{tmp_path / 'wds'}")
    assert {split: len(samples) for split, samples in pets.samples.items()} == {
        "train": 8,
        "val": 4,
    }
    assert pets.class_names == ["0", "1"]
    expected = np.asarray(Image.open(io.BytesIO(stored(3)["bytes"])))
    np.testing.assert_array_equal(pets.open(pets.samples["train"][3]), expected)
    assert pets.samples["train"][3].label == 1


@needs_datasets
def test_a_folder_becomes_a_dataset(hub, tmp_path, monkeypatch, image_folder):
    """As docs/guides/many-images.md has it: the files byte by byte, the folder's classes and splits."""
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "photos"
    for split, number in (("train", 6), ("validation", 2), ("test", 2)):
        image_folder({"cat": number, "dog": number}, name=f"photos/{split}")
    hub.load_dataset("imagefolder", data_dir=str(root)).save_to_disk(tmp_path / "saved")
    stored_in = {}
    for path in (root, tmp_path / "saved"):
        pets = open_collection(str(path))
        assert pets.class_names == ["cat", "dog"]
        stored_in[path] = {
            split: sorted((sample.label, pets.stored(sample)) for sample in samples)
            for split, samples in pets.samples.items()
        }
    shutil.rmtree(root)
    assert stored_in[root] == stored_in[tmp_path / "saved"]
    assert {split: len(rows) for split, rows in stored_in[root].items()} == {
        "train": 12,
        "val": 4,
        "test": 4,
    }


@needs_datasets
def test_copies_are_found_among_rows_that_name_files(hub, tmp_path, monkeypatch, image_folder):
    """A dataset's folder of images has paths in its rows, and no bytes; the hub has many of these."""
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "photos"
    for split in ("train", "test"):
        image_folder({"cat": 6, "dog": 6}, name=f"photos/{split}")
    shutil.copy(root / "train/cat/000.png", root / "test/cat/001.png")
    pets = open_collection(f"hf:{root}")
    sizes = sorted(file.stat().st_size for file in root.rglob("*.png"))
    assert sorted(map(pets.size_bytes, chain.from_iterable(pets.samples.values()))) == sizes
    for data in (pets, open_collection(str(root))):
        (warning,) = make_splits(data, SplitSettings()).warnings
        names(warning, "train images", "not used", "byte-identical copies")


@needs_datasets
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


@needs_datasets
def test_copies_and_groups_stay_on_one_side(hub, tmp_path):
    table = rows_of(
        hub, [0, 1] * 10, patient=(hub.Value("int64"), [number // 4 for number in range(20)])
    )
    table.save_to_disk(tmp_path / "pets")
    data = ready(tmp_path / "pets", group_by="patient", val_fraction=0.2, test_fraction=0.2)
    sides = {}
    for split, dataset in data.contents.datasets.items():
        for sample in dataset.samples:
            sides.setdefault(int(sample.sample_id[4:]) // 4, set()).add(split)
    assert all(len(side) == 1 for side in sides.values())
    names(data.split_note, "the same 'patient'", "5 groups")
    patients = ["p1" if number in (0, 5) else None for number in range(20)]
    ages = [30.0 if number in (0, 5) else float("nan") for number in range(20)]
    rows_of(
        hub, [0, 1] * 10, patient=(hub.Value("string"), patients), age=(hub.Value("float64"), ages)
    ).save_to_disk(tmp_path / "unknown")
    for name, value in (
        ("patient", "p1"),
        ("age", "30.0"),
    ):  # images without a value are in no group, as in a CSV
        column = opened(tmp_path / "unknown").column(name)
        assert {row: cell for row, cell in column.items() if cell} == {
            "all/000000": value,
            "all/000005": value,
        }
    twice = hub.concatenate_datasets([rows_of(hub, [0, 1] * 5), rows_of(hub, [0, 1] * 5)])
    twice.save_to_disk(tmp_path / "twice")
    data = ready(tmp_path / "twice", val_fraction=0.2)
    of = {
        sample.sample_id: split
        for split, d in data.contents.datasets.items()
        for sample in d.samples
    }
    assert all(of[f"all/{row:06d}"] == of[f"all/{row + 10:06d}"] for row in range(10))


@needs_datasets
@pytest.mark.parametrize(
    ("kind", "values"), [("string", ["cat", "dog"]), ("int64", [2, 10]), ("bool", [False, True])]
)
def test_labels_without_names(hub, tmp_path, kind, values):
    rows_of(hub, values * 6, hub.Value(kind)).save_to_disk(tmp_path / "pets")
    assert opened(tmp_path / "pets").class_names == list(map(str, values))


@needs_datasets
def test_labels_in_words_may_be_missing_or_of_another_case(hub, tmp_path):
    rows_of(hub, ["cat", "dog", "", None, "Dog"] * 2, hub.Value("string")).save_to_disk(
        tmp_path / "pets"
    )
    found = opened(tmp_path / "pets")
    assert (found.class_names, len(found.samples["all"])) == (["Dog", "cat", "dog"], 6)
    assert "4 of 10 all images" in found.notes[0]
    names(found.notes[1], "'Dog', 'dog'", "upper and lower")


@needs_datasets
def test_columns_must_be_clear(hub, tmp_path):
    names = hub.ClassLabel(names=["a", "b"])
    table = rows_of(
        hub,
        [0, 1] * 5,
        coarse=(names, [1, 1, 0, 0, 0] * 2),
        size=(hub.Value("float32"), [0.5] * 10),
    )
    table.save_to_disk(tmp_path / "two")
    with refusal("coarse (ClassLabel)", "--data.label_column"):
        opened(tmp_path / "two")
    assert opened(tmp_path / "two", columns=(None, "coarse")).class_names == ["a", "b"]
    with refusal("no 'fine'", "--data.label_column"):
        opened(tmp_path / "two", columns=(None, "fine"))
    with refusal("'label'", "no images", "ClassLabel"):
        opened(tmp_path / "two", columns=("label", "coarse"))
    with refusal("'size'", "holds measures"):
        opened(tmp_path / "two", columns=(None, "size"))
    table.remove_columns("img").save_to_disk(tmp_path / "blind")
    with refusal("--data.image_column"):
        opened(tmp_path / "blind")


@needs_datasets
def test_multi_label_data_are_refused_in_words(hub, tmp_path):
    lists = hub.Sequence(hub.ClassLabel(names=["a", "b"]))
    for number, (feature, labels) in enumerate(
        [
            (lists, [[0], [0, 1]]),
            (hub.Sequence(hub.Value("string")), [["a"], ["a", "b"]]),
            (hub.Value("string"), ["a|b", "b"]),
        ]
    ):
        rows_of(hub, labels * 4, feature).save_to_disk(tmp_path / f"{number}")
        with refusal("multi-label data", "one model"):
            opened(tmp_path / f"{number}")
    table = rows_of(hub, [0, 1] * 4, objects=(lists, [[0], [1]] * 4)).remove_columns("label")
    table.save_to_disk(tmp_path / "objects")
    with refusal("'objects'", "multi-label data"):
        opened(tmp_path / "objects")


@needs_datasets
def test_other_columns_are_not_decoded(hub, tmp_path):
    """A mask that is cut short is no reason to lose its image."""
    masks = [{"bytes": stored(number)["bytes"][:40], "path": None} for number in range(20)]
    rows_of(hub, [0, 1] * 10, mask=(hub.Image(), masks)).save_to_disk(tmp_path / "pets")
    data = ready(tmp_path / "pets", image_column="img")
    assert len(data.contents.datasets["train"]) == 16
    batch = next(iter(data.train_dataloader()))
    assert len(batch["image"]) == 8
    assert data.bad_images == []


@needs_datasets
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
    train, test = (
        data.contents.datasets[split].samples[0].sample_id for split in ("train", "test")
    )
    other = {"cat": "dog", "dog": "cat"}

    def corrected(name):
        cells = [row.split(",") for row in rows]
        return listed(
            pictures, [f"{path},{other[label] if path == name else label}" for path, label in cells]
        )

    ready(corrected(train), run_dir=tmp_path)
    with refusal(f"lists {test}"):
        ready(corrected(test), run_dir=tmp_path)


@needs_datasets
def test_rows_without_pixels_are_bad_images(hub, tmp_path):
    table = rows_of(hub, [0, 1] * 10)
    images = [*[stored(number) for number in range(18)], {"bytes": b"no image", "path": None}, None]
    table = hub.Dataset.from_dict(
        {"img": images, "label": table["label"][:]}, features=table.features
    )
    table.save_to_disk(tmp_path / "pets")
    data = ready(tmp_path / "pets", max_bad_fraction=1)
    reasons = {name: reason for name, reason, _ in data.bad_images}
    assert set(reasons) == {"all/000018", "all/000019"}
    assert "it is not a JPEG" in reasons["all/000018"]


@needs_datasets
def test_a_dataset_that_is_not_there(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with refusal(
        "user/none can't", "fit hf:user/none", "--data.download true", "hf:user/none:CONFIG"
    ):
        opened("hf:user/none")
    rows_of(hub, [0, 1] * 4).save_to_disk(tmp_path / "pets")
    (tmp_path / "pets" / "dataset_info.json").write_text("{")
    with refusal("can't be read", "save it anew"):
        opened(tmp_path / "pets")


@needs_datasets
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


ADDRESSES = (
    "http://127.0.0.1:9/x.tar",
    "hf://datasets/evil/x/*.tar",
    "s3://evil/x.tar",
    "zip://x.csv::http://127.0.0.1:9/x.zip",
    "filecache::http://127.0.0.1:9/x.tar",
)


@needs_datasets
@pytest.mark.parametrize("address", ADDRESSES)
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


@needs_datasets
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_format_type", "arrow"),
        ("_format_type", "torch"),
        ("_format_columns", ["img"]),
        ("_output_all_columns", True),
        ("_format_type", "custom"),
        ("_format_kwargs", {"transform": "os.system"}),
    ],
)
def test_the_format_of_a_saved_dataset_changes_nothing(hub, name, value, tmp_path):
    """Rows are plain values whatever `state.json` says; a function can't be named there."""
    rows_of(hub, [0, 1] * 5).save_to_disk(str(tmp_path / "saved"))
    expected = opened(tmp_path / "saved")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    (tmp_path / "saved" / "state.json").write_text(json.dumps({**state, name: value}))
    if value == "custom" or name == "_format_kwargs":
        with refusal("can't be read", "save it anew"):
            opened(tmp_path / "saved")
    else:
        found = opened(tmp_path / "saved")
        assert found.class_names == expected.class_names
        assert found.samples == expected.samples


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "state.json").write_text(json.dumps({}))
    with refusal("pip install datasets"):
        opened(tmp_path)


@needs_datasets
def test_classes_that_are_written_alike_are_refused(hub, tmp_path):
    """One é is one character, the other an e with an accent."""
    alike = hub.ClassLabel(names=["caf\xe9", "cafe\u0301"])
    rows_of(hub, [0, 1] * 5, alike).save_to_disk(tmp_path / "alike")
    with refusal("caf\xe9", "look the same", "rename"):
        opened(tmp_path / "alike")
