"""`--mirror` and `--sets` of `predict` and `test`: recomputed from the model's own logits, and what is refused."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import softmax

from moevision.analysis.collect import network_input
from moevision.models.convert import with_mirror
from moevision.models.io import load_model, save_model
from moevision.models.ood import pooled
from moevision.stats import accuracy_interval
from tests.shared import assert_names, refused, succeeded

# By hand: of 9 scores the rank of 0.8 is 8, and the eighth smallest is 1 - 0.2; of 0.9 it is 9, of 0.95 too high.
NINE = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def drawn(pets, count):
    return sorted(pets.rglob("*.png"))[:count]


def as_json(cli, *arguments):
    return json.loads(succeeded(cli("predict", *arguments, "--format=json")).out)


def changed_config(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


@pytest.fixture
def nine_scores(saved_model):
    """The tiny run's model, whose sets rest on `NINE` at a temperature of 0.5."""
    sets = {"temperature": 0.5, "true_probabilities": NINE}
    changed_config(saved_model, lambda config: config.update(prediction_sets=sets))
    return saved_model


def views_of(model, files):
    """Logits [2, n, C] of the images, and of those that are mirrored before anything is done to them."""
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    with torch.inference_mode():
        return [
            model.net(network_input(model, views)).double().numpy()
            for views in (pixels, pixels[:, :, ::-1].copy())
        ]


# ---- predict --mirror


def test_the_mean_of_an_image_and_its_mirror_image(cli, tiny_run, drawn_pets):
    """The mean of two probabilities, then softmax(log p / T) with the stored temperature."""
    files, model = drawn(drawn_pets, 5), load_model(str(tiny_run))
    mean = sum(softmax(logits, axis=1) for logits in views_of(model, files)) / 2
    expected = softmax(np.log(mean) / model.temperature, axis=1)
    rows = as_json(cli, tiny_run, *files, "--mirror")
    for row, probabilities in zip(rows, expected, strict=True):
        said = {entry["class"]: entry["probability"] for entry in row["top5"]}
        assert [said[name] for name in model.class_names] == pytest.approx(probabilities, abs=1e-5)
        assert (row["mirror"], row["calibrated"], "set" in row) == (True, True, False)
    plain = as_json(cli, tiny_run, *files)
    assert all("mirror" not in row for row in plain)
    assert [row["top5"] for row in plain] != [row["top5"] for row in rows]


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.parametrize("size", [(47, 32), (32, 47), (33, 33)])
def test_a_file_and_its_mirrored_copy_get_the_same_answer(
    cli, saved_model, drawn_pets, tmp_path, fit, size
):
    """However an image is made square: what is mirrored is what the model sees. A crop may lie a pixel aside."""
    changed_config(
        saved_model,
        lambda config: config["pretrained_cfg"].update(
            crop_mode={"crop": "center", "pad": "border", "squash": "squash"}[fit]
        ),
    )
    image = Image.open(drawn(drawn_pets, 1)[0]).convert("RGB").resize(size)
    image.save(tmp_path / "a.png")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "b.png")
    first, second = as_json(cli, saved_model, tmp_path / "a.png", tmp_path / "b.png", "--mirror")
    assert first["probability"] == pytest.approx(second["probability"], abs=0.02)


def test_a_mirror_leaves_features_distances_and_heat_of_the_image(
    cli, distant_model, tiny_run, drawn_pets, tmp_path
):
    files = drawn(drawn_pets, 3)
    options = ("--features", tmp_path / "f.npy", "--heat", tmp_path / "heat")
    rows = as_json(cli, distant_model, *files, "--mirror", *options)
    features = np.load(tmp_path / "f.npy")["feature"]
    heat = [path.read_bytes() for path in sorted((tmp_path / "heat").iterdir())]
    plain = as_json(cli, distant_model, *files, *options)
    assert [row["distance"] for row in rows] == [row["distance"] for row in plain]
    model = load_model(str(tiny_run))
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    with torch.inference_mode():
        expected = pooled(model.net, network_input(model, pixels)).numpy()
    assert features == pytest.approx(expected, abs=1e-5)
    assert heat == [path.read_bytes() for path in sorted((tmp_path / "heat").iterdir())]


def test_a_mirror_in_bf16_and_beside_an_unreadable_file(cli, tiny_run, drawn_pets, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"x")
    files = (*drawn(drawn_pets, 2), tmp_path / "bad.png")
    exact = as_json(cli, tiny_run, *files, "--mirror")
    rough = as_json(cli, tiny_run, *files, "--mirror", "--precision=bf16")
    for a, b in zip(exact[:2], rough[:2], strict=True):
        assert a["top5"][0]["probability"] == pytest.approx(b["top5"][0]["probability"], abs=0.03)
    assert exact[2]["error"]
    assert (exact[2]["class"], exact[2]["top5"]) == (None, [])


def test_the_mean_of_several_labels():
    """logit((sigmoid(a) + sigmoid(b)) / 2), label by label, also where both are certain."""
    images = torch.tensor([[-2.0, 0.5, 90.0], [1.0, 3.0, -90.0]]).reshape(2, 1, 1, 3)
    net = torch.nn.Flatten()  # the logits of a mirrored image are its own, from the right
    logits = with_mirror(net, images, net(images), several_labels=True).numpy()
    a, b = images.flatten(1).double().numpy(), images.flatten(1).flip(1).double().numpy()
    mean = (1 / (1 + np.exp(-a)) + 1 / (1 + np.exp(-b))) / 2
    assert logits == pytest.approx(np.log(mean / (1 - mean)), rel=1e-5)


# ---- predict --sets


def test_a_set_has_the_classes_above_the_threshold(cli, nine_scores, drawn_pets):
    """Both formats, from softmax(z / 0.5) and thresholds by hand: 0.2, 0.1, and 0 where nine scores are too few."""
    files, model = drawn(drawn_pets, 12), load_model(str(nine_scores))
    probabilities = softmax(views_of(model, files)[0] / 0.5, axis=1)
    for coverage, threshold in ((0.1, 0.9), (0.5, 0.5), (0.8, 0.2), (0.9, 0.1), (0.95, 0.0)):
        expected = [
            [name for name, p in zip(model.class_names, row, strict=True) if p >= threshold]
            for row in probabilities
        ]
        rows = as_json(cli, nine_scores, *files, "--sets", str(coverage))
        assert [row["set"] for row in rows] == expected
        assert {row["coverage"] for row in rows} == {coverage}
        table = list(
            csv.DictReader(
                cli("predict", nine_scores, *files, f"--sets={coverage}").out.split("\n")
            )
        )
        assert [row["set"].split("; ") for row in table] == [names or [""] for names in expected]
        assert [*table[0]][-3:] == ["distance", "coverage", "set"]


def test_sets_do_not_change_the_answer(cli, nine_scores, drawn_pets):
    rows = as_json(cli, nine_scores, drawn_pets, "--sets=0.8", "--unsure=0.5")
    for row, plain in zip(rows, as_json(cli, nine_scores, drawn_pets, "--unsure=0.5"), strict=True):
        assert row == plain | {"coverage": 0.8, "set": row["set"]}


def test_too_few_scores_are_told(cli, nine_scores, drawn_pets):
    outcome = succeeded(cli("predict", nine_scores, *drawn(drawn_pets, 1), "--sets=.999"))
    assert_names(outcome.err, "all classes", "9 validation images", "0.999")
    assert "all classes" not in cli("predict", nine_scores, drawn_pets, "--sets=0.9").err


@pytest.mark.parametrize("coverage", ["0", "1", "1.5", "-0.5", "nan", "inf", "many", ""])
def test_a_coverage_that_can_not_be(cli, tiny_run, drawn_pets, coverage):
    for arguments in (("predict", tiny_run, drawn_pets), ("test", tiny_run)):
        outcome = cli(*arguments, f"--sets={coverage}")
        assert outcome.code == 2
        assert_names(outcome.err.splitlines()[-1], "moevision", "--sets")


def test_a_model_without_scores(cli, saved_model, drawn_pets):
    changed_config(saved_model, lambda config: config.pop("prediction_sets"))
    refused(
        cli("predict", saved_model, drawn_pets, "--sets=0.9"),
        *("no scores", "train it again", "moevision test RUN --sets 0.9"),
    )
    succeeded(cli("predict", saved_model, drawn_pets))


def test_sets_know_no_mirror(cli, tiny_run, drawn_pets):
    refused(cli("predict", tiny_run, drawn_pets, "--sets=0.9", "--mirror"), "--mirror", "leave")


@pytest.mark.parametrize(
    "content",
    [
        3,
        {},
        [],
        {"temperature": 1.0},
        {"true_probabilities": [0.5]},
        {"temperature": 0.0, "true_probabilities": [0.5]},
        {"temperature": float("nan"), "true_probabilities": [0.5]},
        {"temperature": 1e9, "true_probabilities": [0.5]},
        {"temperature": "1", "true_probabilities": [0.5]},
        {"temperature": 1.0, "true_probabilities": 0.5},
        {"temperature": 1.0, "true_probabilities": "0.5"},
        {"temperature": 1.0, "true_probabilities": [1.5]},
        {"temperature": 1.0, "true_probabilities": [-0.1]},
        {"temperature": 1.0, "true_probabilities": [float("nan")]},
        {"temperature": 1.0, "true_probabilities": [10**400]},
        {"temperature": 1.0, "true_probabilities": [None]},
        {"temperature": 1.0, "true_probabilities": [[0.5]]},
        {"temperature": 1.0, "true_probabilities": {"0.5": 1}},
    ],
    ids=str,
)
def test_scores_that_can_not_be(cli, saved_model, drawn_pets, content):
    changed_config(saved_model, lambda config: config.update(prediction_sets=content))
    refused(cli("predict", saved_model, drawn_pets), "prediction_sets", "mend or remove")


def test_class_names_with_commas_quotes_and_formulas(cli, nine_scores, drawn_pets):
    names = ['=cmd|"x", y', "dog, spotted"]
    changed_config(nine_scores, lambda config: config.update(label_names=names))
    file = drawn(drawn_pets, 1)[0]
    (row,) = csv.DictReader(
        succeeded(cli("predict", nine_scores, file, "--sets=0.95")).out.splitlines()
    )
    assert row["set"].lstrip("'") == "; ".join(names)
    assert not row["set"].startswith("=")
    (row,) = as_json(cli, nine_scores, file, "--sets=0.95")
    assert row["set"] == names


def test_a_table_with_sets_may_be_overwritten_but_no_other_file(
    cli, nine_scores, drawn_pets, tmp_path
):
    out = tmp_path / "a.csv"
    for options in (("--sets=0.8",), (), ("--mirror",), ("--sets=0.8", "--format=json"), ()):
        if "--format=json" in options:
            out = tmp_path / "a.json"
        elif out.suffix == ".json":
            out = tmp_path / "a.csv"
        succeeded(cli("predict", nine_scores, *drawn(drawn_pets, 1), *options, "--out", out))
    out.write_text("path,other\n")
    refused(cli("predict", nine_scores, drawn_pets, "--sets=0.8", "--out", out), "a.csv")


def test_an_unreadable_file_has_no_set(cli, nine_scores, drawn_pets, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"x")
    files = (tmp_path / "bad.png", *drawn(drawn_pets, 1))
    bad, good = as_json(cli, nine_scores, *files, "--sets=0.95")
    assert ("set" in bad, len(good["set"])) == (False, 2)
    table = csv.DictReader(cli("predict", nine_scores, *files, "--sets=0.95").out.splitlines())
    assert [row["set"] for row in table] == ["", "; ".join(good["set"])]


def test_scores_travel_with_a_model_that_is_saved_again(nine_scores, tmp_path):
    model = load_model(str(nine_scores))
    save_model(model, tmp_path / "again")
    assert load_model(str(tmp_path / "again")).sets == model.sets == (0.5, NINE)


# ---- what fit saves, and test


def test_fit_saves_scores_of_the_images_that_the_temperature_has_not_seen(tiny_run):
    """Four validation images: two for the temperature, two scores, each of the true class."""
    sets = json.loads((tiny_run / "model" / "config.json").read_text())["prediction_sets"]
    assert len(sets["true_probabilities"]) == 2
    with open(tiny_run / "splits.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "val"]
    model = load_model(str(tiny_run))
    files = [tiny_run.parents[1] / "pets" / row["path"] for row in rows]
    labels = [model.class_names.index(row["class"]) for row in rows]
    p = softmax(views_of(model, files)[0] / sets["temperature"], axis=1)[range(4), labels]
    scored = np.array_split(np.random.default_rng(0).permutation(4), 2)[1]
    assert sets["true_probabilities"] == pytest.approx(p[scored], abs=0.02)  # fit's is in bf16


def said_by_test(cli, run, tmp_path, *options):
    return succeeded(cli("test", run, *options, f"--runs_root={tmp_path}")).out


def test_test_tells_coverage_and_size_of_sets(cli, tiny_run, tmp_path):
    """Of two validation scores the rank of 0.5 is 2: the smaller probability. Coverage and size by hand."""
    said = said_by_test(cli, tiny_run, tmp_path, "--sets=0.5", "--trainer.precision=32-true")
    covered, low, high, size = map(
        float,
        re.search(
            r"sets at 0.5, by 2 validation images: ([\d.]+) % .* interval ([\d.]+) % to ([\d.]+) %\), "
            r"with ([\d.]+) of 2",
            said,
        ).groups(),
    )
    with open(tiny_run / "splits.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    model = load_model(str(tiny_run))
    files = [tiny_run.parents[1] / "pets" / row["path"] for row in rows]
    labels = [model.class_names.index(row["class"]) for row in rows]
    p = softmax(views_of(model, files)[0] / model.sets.temperature, axis=1)
    members = p >= min(model.sets.true_probabilities)
    right = members[range(len(labels)), labels]
    assert covered == pytest.approx(100 * right.mean(), abs=0.06)
    assert [low, high] == pytest.approx(
        [100 * bound for bound in accuracy_interval(int(right.sum()), len(labels))], abs=0.06
    )
    assert size == pytest.approx(members.sum(1).mean(), abs=0.006)


def test_test_by_two_views(cli, tiny_run, drawn_pets, tmp_path):
    """The loss is that of the mean of two probabilities; the settings beside it say so, and sets go with it."""
    said = said_by_test(
        cli, tiny_run, tmp_path, "--mirror", "--sets=0.5", "--trainer.precision=32-true"
    )
    assert "sets at 0.5" in said
    assert "mirror: true" in next(tmp_path.glob("*/config.yaml")).read_text()
    with open(tiny_run / "splits.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    model = load_model(str(tiny_run))
    files = [tiny_run.parents[1] / "pets" / row["path"] for row in rows]
    labels = [model.class_names.index(row["class"]) for row in rows]
    mean = sum(softmax(logits, axis=1) for logits in views_of(model, files)) / 2
    loss = -np.log(mean[range(len(labels)), labels]).mean()
    assert float(re.search(r"test/loss +([\d.]+)", said)[1]) == pytest.approx(loss, abs=1e-4)


def test_where_second_opinions_do_nothing(cli, tiny, tiny_run, drawn_pets, tmp_path):
    for options in (("--mirror",), ("--sets=0.9",)):
        refused(cli("validate", tiny_run, *options, f"--runs_root={tmp_path}"), "leave them out")
        refused(
            cli("fit", drawn_pets, *tiny, *options, f"--runs_root={tmp_path}"), "leave them out"
        )
    other = shutil.copytree(drawn_pets, tmp_path / "other")
    for number, file in enumerate(sorted(other.rglob("*.png"))):
        file.rename(file.with_name(f"new{number}.png"))
    outcome = cli("test", tiny_run, "--data.path", other, "--sets=.9", f"--runs_root={tmp_path}")
    refused(outcome, "validation images", "leave --data.path out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]
    succeeded(
        cli("test", tiny_run, "--data.path", other, "--mirror", f"--runs_root={tmp_path / 'runs'}")
    )
