"""`predict`: its two formats, what it finds, and what it says about files and models that can't be used."""

import csv
import errno
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from moevision.analysis.collect import network_input
from moevision.analysis.plots import BELOW_ABOVE, heat_image
from moevision.commands.predict import HEAT_SIDE, NO_NUMBER
from moevision.models.io import SavedModel, load_model, save_model
from moevision.models.ood import FILE, pooled
from tests.shared import assert_names, refused, succeeded


def table(text):
    return list(csv.DictReader(text.splitlines()))


def drawn(pets, count):
    return sorted(pets.rglob("*.png"))[:count]


def as_json(cli, *arguments):
    return json.loads(succeeded(cli("predict", *arguments, "--format=json")).out)


def test_csv_and_json_say_the_same(cli, tiny_run, drawn_pets):
    files = drawn(drawn_pets, 3)
    outcome = cli("predict", tiny_run / "model", *files)
    assert (outcome.code, outcome.err) == (0, "")
    names = ["path", "class", "probability", "top5", "error", "distance"]
    assert outcome.out.splitlines()[0] == ",".join(names)
    for row, told, file in zip(
        table(outcome.out), as_json(cli, tiny_run, *files), files, strict=True
    ):
        assert list(told) == [*names[:3], "calibrated", "unsure", *names[3:]]
        assert (told["calibrated"], told["unsure"]) == (True, False)
        assert row["path"] == told["path"] == str(file)
        pairs = {entry["class"]: entry["probability"] for entry in told["top5"]}
        assert set(pairs) == {"cat", "dog"}
        assert sum(pairs.values()) == pytest.approx(1)
        assert list(pairs.values()) == sorted(pairs.values(), reverse=True)
        assert row["class"] == told["class"] == max(pairs, key=lambda name: pairs[name])
        assert told["probability"] == pairs[told["class"]]
        assert row["top5"] == "; ".join(f"{name}={share:.4f}" for name, share in pairs.items())
        assert row["probability"] == f"{told['probability']:.4f}"
        # Of 4 validation images there is no twentieth.
        assert (row["error"], row["distance"], told["error"], told["distance"]) == (
            "",
            "",
            None,
            None,
        )


def test_a_column_tells_how_far_a_stranger_is(cli, distant_model, tiny_run, drawn_pets, tmp_path):
    """The smallest distance from a class, recomputed in float64 from the stored numbers; the classes stay."""
    rng = np.random.default_rng(0)
    files = drawn(drawn_pets, 3)
    for number in range(2):
        files.append(tmp_path / f"noise{number}.png")
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(files[-1])
    (tmp_path / "bad.png").write_bytes(b"x")
    outcome = succeeded(cli("predict", distant_model, *files, tmp_path / "bad.png"))
    *rows, bad = table(outcome.out)
    assert (bad["distance"], bool(bad["error"])) == ("", True)
    model, stored = load_model(str(tiny_run)), load_file(distant_model / FILE)
    mean, whitening, centers = (
        stored[name].double().numpy() for name in ("mean", "whitening", "centers")
    )
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    with torch.no_grad():
        features = pooled(model.net, network_input(model, pixels)).double().numpy()
    expected = [
        min(np.linalg.norm(whitening @ (x - mean) - center) for center in centers) for x in features
    ]
    assert [float(row["distance"]) for row in rows] == pytest.approx(expected, rel=1e-3)
    strangers = sum(far > 1 for far in expected)
    assert_names(outcome.err, f"{strangers} of 6", "unlike the training")
    assert strangers >= 2, "noise is far from drawn pets"
    plain = table(cli("predict", tiny_run, *files).out)
    assert [row["class"] for row in rows] == [row["class"] for row in plain]
    told = as_json(cli, distant_model, files[-1])
    assert told[0]["distance"] == pytest.approx(expected[-1], rel=1e-3)


def test_folders_are_searched_to_the_bottom_and_the_order_is_kept(
    cli, tiny_run, drawn_pets, tmp_path
):
    picture = next((drawn_pets / "cat").iterdir())
    for name in ("b/deep/1.png", "b/0.png", "a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, tmp_path / name)
    (tmp_path / "b" / "notes.txt").touch()
    rows = table(
        cli("predict", tiny_run, tmp_path / "b", tmp_path / "a.png", tmp_path / "b" / "0.png").out
    )
    assert [Path(row["path"]).relative_to(tmp_path).as_posix() for row in rows] == [
        *("b/0.png", "b/deep/1.png", "a.png", "b/0.png")
    ]
    assert len({row["top5"] for row in rows}) == 1  # four times the same image


def test_an_unreadable_file_gets_a_row_that_says_why(cli, tiny_run, drawn_pets, tmp_path):
    good = next((drawn_pets / "dog").iterdir())
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:300])
    empty = tmp_path / "empty.jpg"
    empty.touch()
    outcome = succeeded(cli("predict", tiny_run, cut, good, empty))
    first, middle, last = table(outcome.out)
    assert (first["class"], first["probability"], first["top5"]) == ("", "", "")
    assert first["error"]
    assert "empty" in last["error"]
    assert middle["class"]
    assert not middle["error"]
    assert_names(outcome.err, "2 of 3", "be read")
    (row,) = json.loads(cli("predict", tiny_run, cut, "--format=json", "--unsure=1").out)
    assert (row["class"], row["unsure"]) == (None, False)


def test_a_folder_that_can_not_be_read_is_told(cli, tiny_run, tmp_path, drawn_pets, monkeypatch):
    shutil.copytree(drawn_pets, tmp_path / "all")
    locked = next(path for path in (tmp_path / "all").iterdir() if path.is_dir())
    real = os.scandir

    def scandir(path):
        if str(path) == str(locked):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    outcome = succeeded(cli("predict", tiny_run, tmp_path / "all"))
    assert_names(outcome.err, "1 folders in", "be read", "left out")


def test_out_writes_a_file(cli, tiny_run, drawn_pets, tmp_path):
    out = tmp_path / "new" / "answers.csv"
    outcome = cli("predict", tiny_run, drawn_pets, "--out", out, "--batch_size=16")
    assert (outcome.code, outcome.out) == (0, "")
    assert out.read_text() == cli("predict", tiny_run, drawn_pets).out
    for _ in range(2):  # an empty file, and answers of before
        out.with_suffix(".json").touch()
        assert (
            cli(
                "predict", tiny_run, drawn_pets, "--format=json", "--out", out.with_suffix(".json")
            ).code
            == 0
        )
    assert cli("predict", tiny_run, drawn_pets, "--out", out).code == 0


def test_features_are_what_the_classifier_reads(cli, tiny_run, drawn_pets, tmp_path):
    files = drawn(drawn_pets, 5)
    (tmp_path / "bad.png").write_bytes(b"x")
    out = tmp_path / "features.npy"
    told = cli(
        "predict",
        tiny_run,
        files[0],
        tmp_path / "bad.png",
        *files[1:],
        "--batch-size=2",
        "--features",
        out,
    )
    assert (told.code, len(table(told.out))) == (0, 6)
    found, model = np.load(out), load_model(str(tiny_run))
    assert found["path"].tolist() == list(map(str, files))
    with torch.no_grad():
        expected = pooled(
            model.net,
            network_input(model, np.stack([np.asarray(Image.open(file)) for file in files])),
        )
    np.testing.assert_allclose(found["feature"], expected.numpy(), rtol=0, atol=1e-5)
    assert (
        cli("predict", tiny_run, files[0], "--features", out).code == 0
    )  # its own file may be replaced
    np.save(tmp_path / "mine.npy", np.zeros(3))
    refused(
        cli("predict", tiny_run, files[0], "--features", tmp_path / "mine.npy"),
        "give --features another place",
    )


def test_out_is_tried_before_images_are_classified(
    cli, tiny_run, drawn_pets, tmp_path, monkeypatch
):
    """And only answers are replaced: `--out a.png b.png` names an image."""
    monkeypatch.setattr(
        "moevision.commands.predict.predict_batch", lambda *batch, **more: pytest.fail("too late")
    )
    image = Path(shutil.copy(next((drawn_pets / "cat").iterdir()), tmp_path / "a.png"))
    before = image.read_bytes()
    for out in (image, tmp_path, image / "answers.csv"):
        refused(cli("predict", tiny_run, drawn_pets, "--out", out), "another place")
    assert image.read_bytes() == before
    assert list(tmp_path.iterdir()) == [image]


def test_a_run_that_is_not_finished(cli, tiny_run, drawn_pets, tmp_path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "my run"))
    shutil.rmtree(run / "model")
    (run / "checkpoints" / "best.ckpt").unlink()
    last = run / "checkpoints" / "last.ckpt"
    refused(
        cli("predict", run, drawn_pets),
        f"{run} isn't finished",
        f"fit --resume '{run}'",
        f"takes {last}",
    )
    assert table(cli("predict", last, drawn_pets).out)


def test_photos_of_other_formats_are_told(cli, tiny_run, drawn_pets, tmp_path):
    """Half a folder of a phone's photos had no row, and nothing said so."""
    folder = Path(shutil.copytree(drawn_pets, tmp_path / "new"))
    count = len(table(cli("predict", tiny_run, folder).out))
    (folder / "cat" / "IMG_1.HEIC").write_bytes(b"no picture")
    (folder / "cat" / ".DS_Store").touch()
    outcome = cli("predict", tiny_run, folder)
    assert len(table(outcome.out)) == count
    assert_names(outcome.err, f"warning: files in {folder}", "left out: 1 x .heic;")
    alone = tmp_path / "alone"
    alone.mkdir()
    (folder / "cat" / "IMG_1.HEIC").rename(alone / "IMG_1.HEIC")
    refused(
        cli("predict", tiny_run, alone),
        "holds no image",
        "1 x .heic; convert photos to JPEG or PNG",
    )


def test_a_model_that_answers_with_no_number_says_so_in_both_formats(cli, saved_model, drawn_pets):
    """The first class had a row with the probability nan, as if it had been chosen; JSON was a traceback."""
    weights, files = (
        load_file(saved_model / "model.safetensors"),
        drawn(drawn_pets, 2),
    )
    weights["head.weight"].fill_(
        3e38
    )  # the largest float32 is 3.4e38; a weight that is no number is refused
    save_file(weights, saved_model / "model.safetensors")
    for form in ("csv", "json"):
        options = ("--format", form, "--unsure", "0.5", "--heat", "heat")
        outcome = succeeded(cli("predict", saved_model, *files, *options))
        assert_names(outcome.err, "2 of 2", "no answer")
        assert not list(Path("heat").iterdir())
        assert "files" not in outcome.err
        for row in json.loads(outcome.out) if form == "json" else table(outcome.out):
            assert row["error"] == NO_NUMBER
            assert {row[key] or None for key in ("class", "probability", "distance")} == {None}
            assert not row["top5"]


def test_bf16_says_nearly_the_same(cli, tiny_run, drawn_pets):
    """bfloat16 keeps 8 bits: probabilities move by a hundredth, not by nothing."""
    files = drawn(drawn_pets, 8)
    exact = as_json(cli, tiny_run, *files)
    rounded = as_json(cli, tiny_run, *files, "--precision=bf16")
    moved = []
    for row, other in zip(exact, rounded, strict=True):
        by_class = {entry["class"]: entry["probability"] for entry in other["top5"]}
        moved += [abs(entry["probability"] - by_class[entry["class"]]) for entry in row["top5"]]
    assert 0 < max(moved) < 0.02


def changed_config(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def test_probabilities_are_calibrated_by_the_stored_temperature(cli, saved_model, drawn_pets):
    """softmax(z / T) from softmax(z): p^(1/T), normalised."""
    temperature = json.loads((saved_model / "config.json").read_text())["calibration"][
        "temperature"
    ]
    (said,) = as_json(cli, saved_model, *drawn(drawn_pets, 1))
    changed_config(saved_model, lambda config: config.pop("calibration"))
    outcome = succeeded(cli("predict", saved_model, *drawn(drawn_pets, 1), "--format=json"))
    assert_names(outcome.err, "not calibrated", "without a temperature")
    (plain,) = json.loads(outcome.out)
    assert (plain["calibrated"], said["calibrated"]) == (False, True)
    powers = {entry["class"]: entry["probability"] ** (1 / temperature) for entry in plain["top5"]}
    for entry in said["top5"]:
        assert entry["probability"] == pytest.approx(
            powers[entry["class"]] / sum(powers.values()), rel=1e-4
        )


@pytest.mark.parametrize(
    "calibration", [3, {}, {"temperature": 0}, {"temperature": "1"}, {"temperature": 1e9}]
)
def test_a_temperature_that_can_not_be(cli, saved_model, drawn_pets, calibration):
    changed_config(saved_model, lambda config: config.update(calibration=calibration))
    refused(cli("predict", saved_model, drawn_pets), "calibration")


def test_unsure_answers(cli, tiny_run, drawn_pets):
    sure = as_json(cli, tiny_run, drawn_pets)
    threshold = sorted(row["probability"] for row in sure)[len(sure) // 2]
    options = ("--unsure", f"{threshold:.6f}")
    outcome = succeeded(cli("predict", tiny_run, drawn_pets, "--format=json", *options))
    rows = json.loads(outcome.out)
    doubted = [row for row in rows if row["unsure"]]
    assert 0 < len(doubted) < len(rows)
    assert f"{len(doubted)} of {len(rows)} images are unsure" in outcome.err
    for row, before in zip(rows, sure, strict=True):
        assert row["unsure"] == (before["probability"] < float(options[1]))
        assert row["class"] == ("unsure" if row["unsure"] else before["class"])
        assert (row["probability"], row["top5"]) == (before["probability"], before["top5"])
    by_csv = table(cli("predict", tiny_run, drawn_pets, *options).out)
    assert [row["class"] for row in by_csv] == [row["class"] for row in rows]


def test_heat_writes_an_image_for_each_and_the_table_stays(cli, tiny_run, drawn_pets, tmp_path):
    files = drawn(drawn_pets, 3)
    (tmp_path / "bad.png").write_bytes(b"x")
    folder = tmp_path / "new" / "heat"
    told = succeeded(cli("predict", tiny_run, *files, tmp_path / "bad.png", "--heat", folder))
    assert told.out == cli("predict", tiny_run, *files, tmp_path / "bad.png").out
    names = sorted(file.name for file in folder.iterdir())
    assert names == sorted(f"{file.name}.png" for file in files), "and none of the unreadable one"
    for name in names:
        with Image.open(folder / name) as image:
            assert (image.size, image.mode) == ((HEAT_SIDE, HEAT_SIDE), "RGB")
    succeeded(cli("predict", tiny_run, *files, "--heat", folder))  # its own files may be replaced


def test_heat_is_blue_for_the_answer_and_brown_for_the_second_class(
    cli, tiny_run, drawn_pets, tmp_path
):
    """Shares recomputed from the pooled tokens: the strongest patch, and on which side of grey each is."""
    (file,) = drawn(drawn_pets, 1)
    succeeded(cli("predict", tiny_run, file, "--heat", tmp_path / "heat"))
    net = load_model(str(tiny_run)).net
    x = network_input(load_model(str(tiny_run)), np.array(Image.open(file))[None])
    with torch.no_grad():
        tokens = net.forward_features(x)[0, net.num_prefix_tokens :]
        best, second = net(x)[0].topk(2).indices.tolist()
        tokens = tokens - tokens.mean(-1, keepdim=True)
        if isinstance(net.fc_norm, torch.nn.LayerNorm):
            tokens = tokens * net.fc_norm.weight
        shares = tokens @ (net.head.weight[best] - net.head.weight[second])
    rows, columns = net.patch_embed.grid_size
    with Image.open(tmp_path / "heat" / f"{file.name}.png") as image:
        cells = np.asarray(image, np.int64).reshape(
            rows, HEAT_SIDE // rows, columns, HEAT_SIDE // columns, 3
        )
    red_green_blue = cells.mean((1, 3)).reshape(-1, 3)
    blueness = torch.from_numpy(red_green_blue[:, 2] - red_green_blue[:, 0])
    strong = shares.abs() > shares.abs().max() / 10
    assert (blueness[strong].sign() == shares[strong].sign()).all()
    assert blueness.abs().argmax() == shares.abs().argmax()


def test_heat_keeps_to_its_folder_whatever_files_are_called(cli, tiny_run, drawn_pets, tmp_path):
    """Alike in two folders, alike but for case, hostile, long, and no Unicode: as many images, none elsewhere."""
    (source,) = drawn(drawn_pets, 1)
    names = [
        "a/cat.png",
        "b/cat.png",
        "c/CAT.png",
        "a/cat.png~2.png",
        "a/..png",
        "a/-rf \x1b[2J\n.png",
    ]
    names += [f"a/{'é' * 120}.png", f"b/{'é' * 120}.png", "a/%2e%2e%2f$(x).png", "a/猫.png"]
    files = [tmp_path / "in" / name for name in names]
    files.append(tmp_path / "in" / "a" / os.fsdecode(b"caf\xe9.png"))
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, file)
    folder = tmp_path / "out" / "heat"
    succeeded(cli("predict", tiny_run, *files, files[0], "--heat", folder))
    written = [file.name for file in folder.iterdir()]
    assert len({name.casefold() for name in written}) == len(written) == len(files)
    assert {"cat.png.png", "cat.png~2.png", "CAT.png~3.png", "猫.png.png"} <= {*written}
    assert all(re.fullmatch(r"[\w.~-]+\.png", name) for name in written), written
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["heat"]


def test_heat_is_tried_before_images_are_classified(
    cli, tiny_run, saved_model, drawn_pets, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "moevision.commands.predict.predict_batch", lambda *batch, **more: pytest.fail("too late")
    )
    (file,) = drawn(drawn_pets, 1)
    folder = tmp_path / "heat"
    folder.mkdir()
    own = folder / f"{file.name}.png"
    shutil.copy(file, own)
    before = own.read_bytes()
    refused(cli("predict", tiny_run, file, "--heat", folder), str(own), "give --heat another place")
    assert own.read_bytes() == before
    for place in (file, file / "heat"):
        refused(cli("predict", tiny_run, file, "--heat", place), "another place")
    for place in (drawn_pets, drawn_pets / "heat"):
        told = refused(cli("predict", tiny_run, drawn_pets, "--heat", place), "among the images")
        assert not told.out
    assert not (drawn_pets / "heat").exists()


def test_heat_of_a_folder_that_can_not_be_written(cli, tiny_run, drawn_pets, tmp_path, monkeypatch):
    def write(path, data):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("moevision.commands.predict.write_bytes_atomic", write)
    (file,) = drawn(drawn_pets, 1)
    told = cli("predict", tiny_run, file, "--heat", tmp_path / "heat")
    refused(told, f"{file.name}.png: Permission denied", "another place")


def test_heat_of_a_model_that_reads_the_class_token(cli, drawn_pets, tmp_path):
    net = timm.create_model(
        "test_vit_moe", num_classes=2, global_pool="token", class_token=True
    ).eval()
    save_model(SavedModel(net, ["cat", "dog"], 32, (0.5,) * 3, (0.5,) * 3), tmp_path / "model")
    told = cli("predict", tmp_path / "model", *drawn(drawn_pets, 1), "--heat", tmp_path / "heat")
    refused(told, "VisionTransformerMoE has global_pool='token'", "--model.arch.global_pool avg")
    assert not (tmp_path / "heat").exists()


@pytest.mark.parametrize("shares", [[0.0] * 4, [1.0, -1.0, 0.5, 0.0]])
def test_a_heat_image_by_hand(shares):
    """Grey where a patch has no share; else opacity .85 of the largest, of blue or of brown."""
    photo = np.full((4, 4, 3), 100, np.uint8)
    image = np.asarray(heat_image(photo, np.array(shares, np.float32), (2, 2)), np.float64)
    colours = {1: BELOW_ABOVE(5 / 6), -1: BELOW_ABOVE(1 / 6), 0: (0, 0, 0)}
    for place, share in enumerate(shares):
        row, column = divmod(place, 2)
        opacity = 0.85 * abs(share)
        colour = 255 * np.array(colours[int(np.sign(share))][:3])
        expected = opacity * colour + (1 - opacity) * 100
        np.testing.assert_allclose(image[2 * row, 2 * column], expected, atol=1.5)
