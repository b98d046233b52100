"""A run on images with several labels: colours of the two halves, from training to predict, export and refusals."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, average_precision_score, f1_score

from moevision.files import read_csv
from moevision.models.io import load_model
from moevision.train.report import read_summary
from tests.shared import assert_names, refused, succeeded

COLOURS = {"blue": (0, 0, 255), "green": (0, 160, 0), "red": (255, 0, 0)}
OPTIONS = (
    *("--data.image_size=32", "--model.arch.depth=2", "--epochs=2", "--trainer.accelerator=cpu"),
    *("--data.cutmix=0.2", "--data.class_weights=auto", "--data.balanced_sampling=true"),
)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """120 images, left and right half of a colour each."""
    root = tmp_path_factory.mktemp("halves")
    rng = np.random.default_rng(0)
    lines = ["path,label"]
    for number in range(120):
        names = rng.choice(list(COLOURS), 2)
        pixels = rng.integers(0, 220, (32, 32, 3))
        for half, name in enumerate(names):
            pixels[:, 16 * half : 16 * half + 16] += np.array(COLOURS[name]) // 9
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{number:03d}.png")
        lines.append(f"{number:03d}.png,{'|'.join(names)}")
    (root / "list.csv").write_text("\n".join(lines))
    return root / "list.csv"


@pytest.fixture(scope="module")
def run(cli, labelled, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    outcome = cli("fit", labelled, *OPTIONS, f"--runs_root={root}", "--name=halves", "--with-twin")
    assert_names(succeeded(outcome).out + outcome.err, "validation mAP", "no scores", "all labels:")
    return root / "halves"


def test_the_files_have_the_numbers_of_scikit_learn(run):
    rows = read_csv(run / "predictions_test.csv")
    names = list(COLOURS)
    labels, given = (
        np.array([[name in row[column].split("|") for name in names] for row in rows])
        for column in ("label", "prediction")
    )
    shares = np.array([[float(row[f"p {name}"]) for name in names] for row in rows])
    test = read_summary(run / "summary.json").test
    expected = average_precision_score(labels, shares, average="macro")
    assert test.multilabel["map"] == pytest.approx(expected, abs=1e-4)
    for average in ("micro", "macro"):
        score = f1_score(labels, given, average=average)
        assert test.multilabel[f"f1_{average}"] == pytest.approx(score, abs=1e-6)
    assert test.accuracy == pytest.approx(accuracy_score(labels, given))
    thresholds = load_model(str(run)).thresholds
    np.testing.assert_array_equal(given, shares > thresholds)
    by_class = read_csv(run / "classes_test.csv")
    np.testing.assert_allclose(
        [float(row["f1"]) for row in by_class], f1_score(labels, given, average=None), atol=1e-4
    )
    assert [float(row["threshold"]) for row in by_class] == pytest.approx(thresholds, abs=1e-4)


def test_the_summary_and_the_card_say_so(run):
    assert_names((run / "summary.md").read_text(), "mAP", "F1, micro", "all labels right", "AP |")
    assert_names(
        (run / "model/README.md").read_text(), "any of 3 labels", "sigmoid()", "thresholds"
    )
    assert not (run / "confusion.png").exists()
    assert "paired" in (run / "summary.md").read_text()  # beside the twin, by exact match


def test_predict_prints_the_labels_above_their_threshold(cli, run, labelled):
    image = labelled.parent / "000.png"
    model = load_model(str(run))
    row = json.loads(succeeded(cli("predict", run, image, "--format=json")).out)[0]
    shares = {entry["class"]: entry["probability"] for entry in row["top5"]}
    assert set(shares) == set(COLOURS)
    given = {
        name
        for name, threshold in zip(model.class_names, model.thresholds, strict=True)
        if shares[name] > threshold
    }
    assert set(row["labels"]) == given
    assert row["class"] == "|".join(row["labels"])
    # A checkpoint of the training has no thresholds yet: 0.5.
    unfinished = json.loads(
        succeeded(cli("predict", run / "checkpoints/last.ckpt", image, "--format=json")).out
    )[0]
    expected = {entry["class"] for entry in unfinished["top5"] if entry["probability"] > 0.5}
    assert set(unfinished["labels"]) == expected


@pytest.mark.needs("onnx")
def test_the_exported_file_says_how_to_decide(cli, run, tmp_path):
    import onnxruntime

    file = tmp_path / "halves.onnx"
    printed = succeeded(cli("export", run, "--out", file)).out
    assert_names(printed, 'about["thresholds"]', "np.exp(-logit")
    model = load_model(str(run))
    session = onnxruntime.InferenceSession(file)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["multilabel"]) is True
    assert json.loads(facts["thresholds"]) == list(model.thresholds)
    assert json.loads(facts["temperature"]) == model.temperature
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = session.run(["logits"], {"image": images.numpy()})[0]
    np.testing.assert_allclose(logits, model.net(images).detach(), atol=1e-4)


def test_what_asks_for_one_class_is_refused_in_a_sentence(cli, run, labelled, tmp_path):
    image = labelled.parent / "000.png"
    refused(cli("analyze", run, "--out", tmp_path / "report"), "several labels", "moevision demo")
    refused(cli("cut", run, "--classes", "red", "--out", tmp_path / "cut"), "several labels")
    refused(
        cli("upcycle", run / "model", "--out", tmp_path / "up"), "several labels", "--num-classes"
    )
    refused(cli("data", "score", run), "several labels")
    refused(cli("predict", run, image, "--heat", tmp_path / "heat"), "several labels", "--heat")
    monitor = ("--checkpoint.monitor=val/top1", f"--runs_root={tmp_path}")
    refused(cli("fit", labelled, *OPTIONS, *monitor), "val/top1", "val/map", "Leave")


@pytest.mark.parametrize(
    "thresholds", [[0.5], [0.5, 0.5, 2], [0.5, "0.5", 0.5], "0.5", None, [0.5, float("nan"), 0.5]]
)
def test_thresholds_that_are_none_are_refused(cli, run, labelled, tmp_path, thresholds):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (run / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"thresholds": thresholds}))
    refused(cli("predict", folder, labelled.parent / "000.png"), "thresholds", "mend them")


def test_a_run_is_tested_again_at_a_half(cli, run, labelled, tmp_path):
    said = succeeded(cli("test", run, f"--runs_root={tmp_path}")).out
    assert_names(said, "test/map", "test/f1_micro_at_half")
    single = tmp_path / "single.csv"
    rows = [
        line.replace("|green", "").replace("|red", "").replace("|blue", "")
        for line in labelled.read_text().splitlines()
    ]
    single.write_text("\n".join([rows[0], *(f"{labelled.parent}/{row}" for row in rows[1:])]))
    refused(
        cli("test", run, f"--data.path={single}", f"--runs_root={tmp_path}"), "one label or several"
    )
