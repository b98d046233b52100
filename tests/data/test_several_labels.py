"""Several labels of an image, `cat|outdoor` in a manifest: their splits, what batches have, what is refused."""

import csv
from collections import Counter

import pytest
import torch

from moevision.data.splits import read_splits
from moevision.errors import DataWarning
from tests.data.conftest import listed, opened, ready, refusal, samples_of

LABELS = ["cat|outdoor", "cat", "dog|outdoor", "dog", "outdoor", "cat|dog"]


@pytest.fixture
def table(image_folder):
    """60 images, ten of each of `LABELS`: 30 have cat, 30 dog, 30 outdoor."""
    root = image_folder({"photos": 60})
    return listed(root, [f"photos/{n:03d}.png,{LABELS[n % 6]}" for n in range(60)])


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_targets_are_multi_hot(table):
    data = ready(table)
    assert (data.class_names, data.multilabel) == (["cat", "dog", "outdoor"], True)
    batch = next(iter(data.val_dataloader()))
    assert batch["target"].dtype == torch.float32
    for index, target in zip(batch["index"].tolist(), batch["target"], strict=True):
        number = int(data.sample_id("val", index)[7:10])
        written = set(LABELS[number % 6].split("|"))
        assert target.tolist() == [float(name in written) for name in ("cat", "dog", "outdoor")]


def test_an_image_counts_for_each_of_its_labels(table):
    data = ready(table)
    counts = Counter()
    for split in data.class_counts.values():
        counts.update(split)
    assert counts == {"cat": 30, "dog": 30, "outdoor": 30}
    assert "all labels" in data.describe()


def test_the_rarest_label_is_what_splits_and_sampling_go_by(image_folder):
    """30 images have outdoor, 20 of them cat, 10 dog: the rarest of `cat|outdoor` is cat, of `dog|outdoor` dog."""
    root = image_folder({"photos": 30})
    names = ["cat", "cat", "dog"]
    data = ready(listed(root, [f"photos/{n:03d}.png,outdoor|{names[n % 3]}" for n in range(30)]))
    for split, samples in samples_of(data).items():
        share = {"train": (16, 8), "val": (2, 1), "test": (2, 1)}[split]
        labels = Counter(data.class_names[sample.label] for sample in samples)
        assert (labels["cat"], labels["dog"]) == share
    data.balanced_sampling = True
    drawn = [
        data.contents.datasets["train"].samples[index].label
        for _, index in data.train_dataloader().sampler
    ]
    assert Counter(drawn) == {0: 12, 1: 12}


def test_labels_are_cleaned(image_folder):
    """Spaces and repeats go; a name with control characters is escaped."""
    root = image_folder({"photos": 40})
    cells = [" cat | outdoor|cat ", "dog", "b\ad|cat", "dog|outdoor"]
    collection = opened(listed(root, [f"photos/{n:03d}.png,{cells[n % 4]}" for n in range(40)]))
    assert collection.class_names == ["b\\x07d", "cat", "dog", "outdoor"]
    assert [sample.labels for sample in collection.samples["all"][:4]] == [
        (1, 3),
        (2,),
        (0, 1),
        (2, 3),
    ]


def test_a_label_that_is_only_repeated_is_one(image_folder):
    root = image_folder({"photos": 20})
    collection = opened(
        listed(root, [f"photos/{n:03d}.png,{'ab'[n % 2]}|{'ab'[n % 2]}" for n in range(20)])
    )
    assert not collection.multilabel
    assert collection.samples["all"][0] == ("photos/000.png", 0, ())


@pytest.mark.parametrize(
    ("rare", "named"), [(["elk"], "'elk'"), (list(map(str, range(5000))), "4995 more")]
)
def test_labels_of_one_image_are_refused(table, rare, named):
    text = table.read_text().replace("cat|outdoor", "|".join(["cat", *rare]), 1)
    table.write_text(text)
    with refusal(named, "too few", "remove the class"):
        ready(table)


def test_the_split_is_written_and_read_again(table, tmp_path):
    first = ready(table, run_dir=tmp_path)
    again = ready(table, run_dir=tmp_path, seed=1)
    assert samples_of(again) == samples_of(first)
    assert again.file_list_sha256() == first.file_list_sha256()
    assert {row["class"] for row in rows_of(tmp_path / "splits.csv")} == set(LABELS)


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_that_have_changed_since_are_refused(table, tmp_path, split):
    data = ready(table, run_dir=tmp_path)
    sample = next(s for s in samples_of(data)[split] if len(s.labels) == 2)
    text = table.read_text().splitlines()
    row = next(n for n, line in enumerate(text) if line.startswith(sample.sample_id))
    text[row] = text[row].rpartition("|")[0]
    table.write_text("\n".join(text))
    with refusal(sample.sample_id, "other labels"):
        read_splits(tmp_path / "splits.csv", opened(table))


def test_copies_and_groups_stay_on_one_side(table):
    root = table.parent
    for number in range(0, 60, 2):  # each image twice, under labels that differ
        (root / f"photos/{number + 1:03d}.png").write_bytes(
            (root / f"photos/{number:03d}.png").read_bytes()
        )
    with pytest.warns(DataWarning, match="30 images stand in several classes"):
        data = ready(table, val_fraction=0.2, test_fraction=0.2)
    sides = {sample.sample_id: split for split, part in samples_of(data).items() for sample in part}
    assert all(
        sides[f"photos/{n:03d}.png"] == sides[f"photos/{n + 1:03d}.png"] for n in range(0, 60, 2)
    )


def test_weights_are_of_images_with_a_label_beside_those_without(table):
    """auto: (N - n) / n of the training images; what is given stays as it is."""
    data = ready(table, class_weights="auto")
    train = len(data.contents.datasets["train"])
    counts = torch.tensor(list(data.class_counts["train"].values()))
    torch.testing.assert_close(data.class_weight_tensor(), (train - counts) / counts)
    assert ready(table, class_weights={"dog": 3.0}).class_weight_tensor().tolist() == [1, 3, 1]


def test_mixing_mixes_the_labels(table):
    """CutMix of multi-hot rows a and b is share a + (1 - share) b: between 0 and 1, and no label comes from nowhere."""
    data = ready(table, cutmix=1.0, batch_size=16)
    batch = next(iter(data.train_dataloader()))
    samples = data.contents.datasets["train"].samples
    own = torch.zeros(16, 3)
    for row, index in enumerate(batch["index"].tolist()):
        own[row, list(samples[index].labels)] = 1
    other = own.roll(1, 0)
    assert bool((batch["target"] <= torch.maximum(own, other) + 1e-6).all())
    assert bool((batch["target"] >= torch.minimum(own, other) - 1e-6).all())
    assert float((batch["target"] % 1).sum()) > 0


def test_lists_keep_images_and_do_not_relabel_them(table, tmp_path):
    data = ready(table)
    train = [sample.sample_id for sample in samples_of(data)["train"]]
    keep = tmp_path / "keep.csv"
    keep.write_text("image,keep\n" + "".join(f"{name},yes\n" for name in train[1:]))
    kept = samples_of(ready(table, keep=str(keep)))["train"]
    assert kept == samples_of(data)["train"][1:]
    relabel = tmp_path / "relabel.csv"
    relabel.write_text(f"image,new_label\n{train[0]},cat\n")
    with refusal("--data.relabel", "several labels"):
        ready(table, relabel=str(relabel))


def test_no_scores_of_images_are_kept(table):
    assert not ready(table).keeps_scores
