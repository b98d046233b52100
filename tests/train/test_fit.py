"""One whole tiny `fit --with-twin`: every promised file of the run folder exists and says what it should."""

import hashlib
import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from moevision.analysis.collect import network_input
from moevision.analysis.images import open_pictures, read_images
from moevision.config import flatten, options, parse_args, to_settings
from moevision.data.named import contains_path
from moevision.errors import UserError
from moevision.files import read_csv
from moevision.layers import moe_layers
from moevision.models.config import MoEConfig, build_model
from moevision.models.io import load_model
from moevision.models.ood import answers
from moevision.train import fit as fit_module
from moevision.train import recipe
from moevision.train.lightning_internals import hide_unknown_epoch_total
from moevision.train.recipe import (
    choose_recipe,
    default_precision,
    find_config,
    read_config,
    read_request,
    resolve_settings,
)
from moevision.train.resume import lock_run_folder
from moevision.train.start import epochs_for
from tests.shared import assert_names, refused, succeeded

pytestmark = pytest.mark.usefixtures("own_folder")


def same_metrics(run, other):
    """All logged numbers of two runs, but for none: nothing in metrics.csv depends on the clock."""
    return (run / "metrics.csv").read_text() == (other / "metrics.csv").read_text()


def test_the_output_says_what_happens(tiny_run):
    text = (tiny_run.parent.parent / "output.txt").read_text()
    assert re.search(r"^cat +12 +2 +6$", text, re.MULTILINE), text
    assert_names(text, "4 experts, 2 per", "noisy_top_k", "blocks 1, 3", "32-true, batch 8")
    assert_names(text, "plan: 2 epochs", "of 25 images", "images/s (by a")
    assert_names(text, "start: from scratch (--model.arch.name", "dog/broken.png")
    told = re.findall(r"^epoch (\d) of 2: validation ([\d.]+) %.*, (\d+) s left$", text, re.M)
    assert [epoch for epoch, _, _ in told][:2] == ["1", "2"]
    assert told[1][2] == "0"
    rows = read_csv(tiny_run / "metrics.csv")
    shares = [float(row["val/top1"]) for row in rows if row["val/top1"]]
    assert [float(share) for _, share, _ in told[:2]] == [round(100 * x, 1) for x in shares]
    assert "litlogger" not in text


FILES = """
config.yaml metrics.csv summary.md summary.json provenance.json predictions_test.csv scores.csv splits.csv
bad_images.csv curves.png confusion.png mistakes.png checkpoints/best.ckpt checkpoints/last.ckpt
model/config.json model/model.safetensors
"""


def test_every_file_of_the_run_folder(tiny_run):
    files = set(FILES.split())
    for run in (tiny_run, tiny_run / "twin"):
        assert {
            path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()
        } >= files
    for name in ("curves.png", "confusion.png", "mistakes.png"):
        with Image.open(tiny_run / name) as picture:
            assert min(picture.size) > 200
    recorded = json.loads((tiny_run / "provenance.json").read_text())["run"]["model_sha256"]
    assert (
        recorded
        == hashlib.sha256((tiny_run / "model" / "model.safetensors").read_bytes()).hexdigest()
    )


def test_metrics_have_rows_of_training_and_validation(tiny_run):
    logged = read_csv(tiny_run / "metrics.csv")
    assert (
        len([row for row in logged if row["train/loss"]]) == 6
    )  # 25 images, one of them broken: 3 steps an epoch
    validated = [row for row in logged if row["val/top1"]]
    assert [row["epoch"] for row in validated] == ["0", "1"]
    for layer in (1, 3):
        for name in ("load_max", "load_cv2", "entropy", "dead"):
            assert all(float(row[f"moe/{layer}/{name}"]) >= 0 for row in validated)
    # Four experts, two choices: the busiest has between 1 and 4 / 2 times the mean load.
    assert all(1 <= float(row["moe/1/load_max"]) <= 2 for row in validated)
    assert "val/top5" not in validated[0], "two classes have no top-5"


def test_predictions_agree_with_the_summary(tiny_run):
    predictions = read_csv(tiny_run / "predictions_test.csv")
    right = sum(row["label"] == row["prediction"] for row in predictions)
    assert [row["correct"] for row in predictions] == [
        str(int(r["label"] == r["prediction"])) for r in predictions
    ]
    assert [row["image"] for row in predictions] == [
        row["path"] for row in read_csv(tiny_run / "splits.csv") if row["split"] == "test"
    ]
    summary = (tiny_run / "summary.md").read_text()
    assert f"recognised** ({right} of {len(predictions)};" in summary
    tested = next(row for row in reversed(read_csv(tiny_run / "metrics.csv")) if row["test/top1"])
    assert float(tested["test/top1"]) == pytest.approx(right / len(predictions))
    wrong = Counter(
        (row["label"], row["prediction"])
        for row in predictions
        if row["label"] != row["prediction"]
    )
    sizes = Counter(row["label"] for row in predictions)
    (label, answer), times = wrong.most_common(1)[0]
    sentence = f"{times} of {sizes[label]} test images of “{label}” were taken for “{answer}”"
    assert sentence in summary
    validated = [row["val/top1"] for row in read_csv(tiny_run / "metrics.csv") if row["val/top1"]]
    told = json.loads((tiny_run / "summary.json").read_text())["validations"]
    assert told == list(map(float, validated))


def test_summary_has_loads_twin_and_next_commands(tiny_run):
    summary = (tiny_run / "summary.md").read_text()
    assert "images per step | 2; 6; 8 |" in summary  # whole epochs have no decimal
    tested = next(row for row in reversed(read_csv(tiny_run / "metrics.csv")) if row["test/top1"])
    for layer in (1, 3):
        assert f"| block {layer} | 4 | {float(tested[f'moe/{layer}/load_max']):.2f} |" in summary
    ours = {
        row["image"]: int(row["correct"]) for row in read_csv(tiny_run / "predictions_test.csv")
    }
    twin = {
        row["image"]: int(row["correct"])
        for row in read_csv(tiny_run / "twin" / "predictions_test.csv")
    }
    assert ours.keys() == twin.keys()
    points = 100 * (sum(ours.values()) - sum(twin.values())) / len(ours)
    found = re.search(
        r"\*\*([+−-][\d.]+) percentage points\*\*, 95 % interval (\S+) to (\S+)", summary
    )
    assert found, summary
    difference, low, high = (float(text.replace("−", "-")) for text in found.groups())
    assert difference == pytest.approx(points, abs=0.051)
    assert low < difference < high
    checkpoint = json.loads((tiny_run / "summary.json").read_text())["test"]["checkpoint"]
    for command in (
        f"moevision predict {tiny_run}/model IMAGE_OR_FOLDER",
        f"moevision info {tiny_run}/model",
        f"moevision test --ckpt_path {tiny_run}/checkpoints/{checkpoint}",
    ):
        assert command in summary
    assert_names(summary, "train: 25 images", "by class, seed 0.")
    assert re.search(r"\| waiting for data \| [\d.]+ % of the training steps' time \|", summary)


def test_scores_by_class_are_scikit_learns(cli, tiny_run):
    from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

    known = {row["image"]: row for row in read_csv(tiny_run / "predictions_test.csv")}
    pets = tiny_run.parent.parent / "pets"
    said = json.loads(
        cli("predict", tiny_run, *(pets / name for name in known), "--format=json").out
    )
    of_dog = [
        next(each["probability"] for each in row["top5"] if each["class"] == "dog") for row in said
    ]
    labels, answers = ([row[name] for row in known.values()] for name in ("label", "prediction"))
    names = ["cat", "dog"]
    expected = precision_recall_fscore_support(labels, answers, labels=names, zero_division=0)
    auroc = roc_auc_score([label == "dog" for label in labels], of_dog)
    summary = (tiny_run / "summary.md").read_text()
    for row, name, *shares, images in zip(
        read_csv(tiny_run / "classes_test.csv"), names, *expected, strict=True
    ):
        assert (row["class"], int(row["images"])) == (name, images)
        found = [float(row[column]) for column in ("precision", "recall", "f1", "auroc")]
        assert found == pytest.approx([*shares, auroc], abs=1e-4)
        assert (
            f"| {name} | {100 * shares[1]:.1f} % | {100 * shares[0]:.1f} % | {100 * shares[2]:.1f} % |"
            in summary
        )


def test_the_config_runs_again_to_the_same_numbers(cli, tiny_run):
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    succeeded(cli("fit", "--config", tiny_run / "config.yaml", "--without-twin"))
    again = tiny_run.with_name("pets-2")
    assert same_metrics(tiny_run, again)
    assert (again / "predictions_test.csv").read_text() == (
        tiny_run / "predictions_test.csv"
    ).read_text()
    assert not (again / "twin").exists()
    assert {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")} == before, (
        "an earlier run is never touched"
    )


def test_evaluating_the_checkpoint_again(cli, tiny_run):
    """The run's own config.yaml says all the rest, given or not: 32 px is not the default."""
    logged, config = read_csv(tiny_run / "metrics.csv"), tiny_run / "config.yaml"
    for verb, split, given in (("test", "test", ()), ("validate", "val", ("--config", config))):
        outcome = succeeded(
            cli(
                verb,
                *given,
                "--runs_root=again",
                "--ckpt_path",
                tiny_run / "checkpoints" / "best.ckpt",
            )
        )
        assert f"2 classes from {tiny_run.parents[1] / 'pets'}\n" in outcome.out
        folder = Path("again") / f"pets-{verb}"
        (found,) = [row for row in read_csv(folder / "metrics.csv") if row[f"{split}/top1"]]
        scores = [float(row[f"{split}/top1"]) for row in logged if row[f"{split}/top1"]]
        assert float(found[f"{split}/top1"]) == max(scores), (
            "best.ckpt is the epoch of the best validation"
        )
        assert (folder / "splits.csv").read_text() == (tiny_run / "splits.csv").read_text()


def test_evaluation_takes_the_test_images_of_the_run(cli, tiny_run, own_folder):
    """Also of a copy, whole or not, since a split of its own would test with images of the training."""
    given = (
        "--runs_root=again",
        "--ckpt_path",
        tiny_run / "checkpoints" / "best.ckpt",
        "--data.max_bad_fraction=0.2",
    )
    other = Path(shutil.copytree(tiny_run.parents[1] / "pets", "other photos"))
    lost = next(row["path"] for row in read_csv(tiny_run / "splits.csv") if row["split"] == "train")
    for vanished in (0, 1):
        outcome = succeeded(cli("test", other, *given))
        assert_names(outcome.out, "test: 12 images", "listed in splits.csv).")
        assert outcome.out.count("1 images listed in") == vanished
        (other / lost).unlink(missing_ok=True)


def test_the_config_of_an_evaluation(tiny_run, drawn_pets, monkeypatch, tmp_path):
    """What is typed comes after the run's own and so wins; another --config takes its place.

    A run of many processes is evaluated by one, on whatever machine; `--trainer.num_nodes` is no option of `test`.
    """
    config = yaml.safe_load((tiny_run / "config.yaml").read_text())
    config["trainer"] |= {"devices": 2, "num_nodes": 2}
    run = tmp_path / "many"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    checkpoint = str(run / "checkpoints" / "best.ckpt")
    given = ["--ckpt_path", checkpoint, "--data.batch_size=4"]
    one_process = {"trainer.devices": 1, "trainer.num_nodes": 1}
    own = with_defaults(read_config(run / "config.yaml") | one_process)
    typed = {"ckpt_path": checkpoint, "data.batch_size": 4}
    assert resolved("test", *given) == own | typed
    assert resolved("test", drawn_pets, *given) == own | typed | {"data.path": str(drawn_pets)}
    quickstart = quickstart_options()
    assert resolved("validate", "--config=quickstart", *given) == quickstart | typed
    assert resolved("test", "quickstart", *given) == quickstart | typed
    monkeypatch.chdir(tmp_path)
    Path("quickstart").mkdir()  # a folder of images that has the name of a recipe
    assert resolved("test", "quickstart", *given) == own | typed | {"data.path": "quickstart"}
    beside = {"data.path": "pics", "ckpt_path": f"{run}/model/best.ckpt"}
    beside["trainer.precision"] = default_precision()
    assert resolved("test", "pics", "--ckpt_path", beside["ckpt_path"]) == with_defaults(beside)
    monkeypatch.chdir(run / "checkpoints")
    assert resolved("test", "--ckpt_path=best.ckpt") == own | {"ckpt_path": "best.ckpt"}
    with pytest.raises(UserError, match=r"--ckpt_path runs/NAME/"):
        resolved("test")
    with pytest.raises(UserError, match=r"config.yaml in .*typo: correct --ckpt_path"):
        resolved("test", "--ckpt_path", "typo/checkpoints/best.ckpt")


def unfinished_copy(run: Path) -> Path:
    """A copy of a finished run as if it had been killed before the report."""
    copy = Path(shutil.copytree(run, "runs/copy"))
    (copy / "summary.json").unlink()
    return copy


def test_the_split_of_the_run_is_used_again(cli, tiny_run):
    """Pictures that came after the first start are in no split of the run that goes on."""
    pets = Path(shutil.copytree(tiny_run.parent.parent / "pets", "pets"))
    shutil.copy(pets / "cat" / "0000.png", pets / "cat" / "new.png")
    run = unfinished_copy(tiny_run)
    outcome = succeeded(cli("fit", "--resume", run, "--data.path=./pets", "--without-twin"))
    assert_names(outcome.out, "warning: 1 images", "splits.csv was written", "left out")
    assert "came after" not in outcome.err  # said once
    assert_names(outcome.err, "changed: --data.path")
    listed = [tuple(row.values()) for row in read_csv(run / "splits.csv")]
    assert listed == [tuple(row.values()) for row in read_csv(tiny_run / "splits.csv")]
    assert same_metrics(run, tiny_run)


@pytest.fixture
def dense(own_folder) -> tuple[str, ...]:
    """A model in the folder `dense`, and options of a short training that starts from it."""
    net = timm.create_model("test_vit", img_size=32, num_classes=3)
    timm.models.save_for_hf(net, "dense", safe_serialization=True)
    options = ("--data.image_size=32", "--trainer.max_epochs=1", "--trainer.precision=32-true")
    return ("--pretrained=dense", "--name=up", "--trainer.enable_progress_bar=false", *options)


@pytest.mark.deep
def test_a_pretrained_run_goes_on_without_the_weights_it_started_from(cli, drawn_pets, dense):
    """Everything is in the checkpoint or beside it: neither a network nor the dense model's folder is needed again."""
    succeeded(cli("fit", drawn_pets, *dense))
    shutil.rmtree("dense")
    Path("runs/up/summary.json").unlink()
    best = "runs/up/checkpoints/best.ckpt"
    for arguments in (
        ["fit", "--resume=runs/up"],
        ["test", "--ckpt_path", best],
        ["predict", best, drawn_pets],
    ):
        succeeded(cli(*arguments))


def test_the_model_is_the_one_of_config_yaml(cli, drawn_pets, dense):
    """With a configuration that names another architecture: its name is not recorded, and its sizes are refused."""
    arch = {"name": "vit_moe", "base": "vit_tiny_patch16_224", "depth": 4}
    arch |= {"num_experts": 3, "global_pool": "avg"}
    Path("mine.yaml").write_text(
        yaml.safe_dump({"model": {"arch": arch}, "data": {"image_size": 32, "batch_size": 8}})
    )
    fit = ("fit", drawn_pets, "--config=mine.yaml", *dense)
    refused(
        cli(*fit, "--model.arch.patch_size=8", "--model.arch.stem=conv"),
        *("--model.arch.stem null", "is conv", "--model.arch.patch_size null"),
    )
    assert not Path("runs/up").exists()
    succeeded(cli(*fit))
    recorded = yaml.safe_load(Path("runs/up/config.yaml").read_text())["model"]["arch"]
    assert recorded["name"] is recorded["base"] is None
    again, trained = build_model(MoEConfig(**recorded), 2, 32), load_model("runs/up").net
    assert str(again) == str(trained)
    experts = moe_layers(trained)[0].router.num_experts
    assert (len(trained.blocks), trained.global_pool, experts) == (4, "avg", 3)


def test_a_pretrained_start_and_its_twin(cli, drawn_pets, dense):
    outcome = succeeded(cli("fit", drawn_pets, *dense, "--with-twin"))
    assert "from scratch" not in outcome.out + outcome.err
    arguments = json.loads(Path("runs/up/model/config.json").read_text())["model_args"]
    # 3 x width: test_vit's own MLP
    assert (arguments["base"], arguments["expert_hidden"]) == ("test_vit", 192)
    assert_names(Path("runs/up/summary.md").read_text(), "same pretrained weights", "active FLOPs")
    assert not moe_layers(load_model("runs/up/twin").net)
    without_recipe = build_model(MoEConfig(pretrained="dense"), 3, 32)
    assert [layer.layer_index for layer in moe_layers(without_recipe)] == [1, 3, 5]
    moe = ("--pretrained=runs/up/model", "--name=moe")
    refused(
        cli("fit", drawn_pets, *dense, *moe, "--with-twin"),
        "--with-twin or --dense",
        "leave it out",
    )
    assert not Path("runs/moe").exists()


def resolved(verb, *arguments):
    """What a command line asks for and gets chosen, by dotted names."""
    settings = resolve_settings(read_request(verb, parse_args(verb, list(map(str, arguments)))))
    return flatten(asdict(settings))


def with_defaults(options):
    return flatten(asdict(to_settings(options)))


def quickstart_options():
    precision = {"trainer.precision": default_precision()}
    return with_defaults(read_config(find_config("quickstart")) | precision)


@pytest.mark.parametrize("where", ["beside", "afresh"])
def test_a_run_folder_among_the_images_is_refused(cli, tiny, drawn_pets, monkeypatch, where):
    monkeypatch.chdir(shutil.copytree(drawn_pets, "photos"))
    refused(
        cli("fit", ".", *tiny, *(["--resume=auto"] if where == "afresh" else [])),
        "runs/photos",
        "start elsewhere",
        "another --runs_root",
    )
    assert not Path("runs").exists()


def test_images_below_a_run_are_not_always_read(draw):
    """Those beside train and val are left out, and so are hidden folders."""
    draw(Path("split/train"), per_class=1)
    draw(Path("plain"), per_class=1)
    assert contains_path("split", Path("split/train/runs/a"))
    assert contains_path("./plain", Path("plain/cat/runs"))
    for path, place in (
        ("split", "split/runs/a"),
        ("plain", "plain/.runs/a"),
        ("plain", "runs/a"),
        ("cifar10", "a"),
    ):
        assert not contains_path(path, Path(place))


def test_no_weights_are_looked_for_where_there_are_no_images(draw, monkeypatch):
    """They may be 88 MB; on a terminal somebody would be asked whether to fetch them."""
    monkeypatch.setattr(recipe, "choose_start", lambda *_: pytest.fail("looked for weights"))
    with pytest.raises(UserError, match="no folder nofolder"):
        choose_recipe("nofolder", "auto")
    with pytest.raises(UserError, match="one class folder"):
        choose_recipe(str(draw(Path("photos"), classes=("cat",))))


def test_a_limit_beyond_every_number_of_batches_is_none(cli, tiny, drawn_pets, own_folder):
    limits = [f"--trainer.limit_{split}_batches=1e30" for split in ("train", "val", "test")]
    succeeded(cli("fit", drawn_pets, *tiny, "--trainer.max_epochs=1", *limits))
    assert json.loads(Path("runs/pets/summary.json").read_text())["steps"] == 3


def test_recipe_of_a_small_folder(drawn_pets, monkeypatch):
    monkeypatch.setattr(recipe, "available_memory_bytes", lambda: 8 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    scratch = choose_recipe(str(drawn_pets), "none")
    assert scratch["data.image_size"] == 64
    assert scratch["data.cache_mb"] == 2048  # a quarter of the free memory
    assert scratch["model.arch.name"] == "vit_moe_hybrid_patch8_32"
    assert scratch["model.optim.name"] == "muon"


@pytest.mark.parametrize(
    ("typed", "rate"),
    [
        ([], 6e-3),
        (["--model.optim.name=adamw"], 1e-3),
        (["--model.arch.name=test_vit_moe"], 1e-3),
        (["--model.arch.name", "test_vit_moe", "--model.optim.name", "muon"], 6e-3),
    ],
)
def test_the_learning_rate_from_scratch_is_that_of_the_optimizer(drawn_pets, typed, rate):
    """6e-3 is the recipes' for Muon (`configs/cifar10.yaml`), 1e-3 AdamW's default here."""
    assert (
        choose_recipe(str(drawn_pets), "none", parse_args("fit", typed).options)["model.optim.lr"]
        == rate
    )


@pytest.mark.parametrize(
    ("images", "epochs", "batch"),
    [
        (0, 100, 8),
        (400, 100, 20),
        (10_000, 20, 64),
        (50_000, 10, 64),
    ],  # 200 000 images, 10 to 100 epochs
)
def test_recipe_follows_the_number_of_images(monkeypatch, images, epochs, batch):
    monkeypatch.setattr(recipe, "count_images", lambda _: images)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    picked = choose_recipe("pictures", "none")
    assert picked["trainer.max_epochs"] == epochs
    assert picked["data.batch_size"] == batch


def test_who_names_the_cpu_gets_what_suits_a_cpu(monkeypatch):
    """Beside a GPU of 80 GB, which must not be asked for anything."""
    monkeypatch.setattr(recipe, "count_images", lambda _: 10_000)
    monkeypatch.setattr(recipe, "available_memory_bytes", lambda: 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    alone = resolved("fit", "pictures", "--pretrained=none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(recipe, "default_precision", lambda: alone["trainer.precision"])
    assert resolved(
        "fit", "pictures", "--pretrained=none", "--trainer.accelerator=cpu"
    ) == alone | {"trainer.accelerator": "cpu"}
    assert resolved("fit", "pictures", "--pretrained=none")["data.batch_size"] == 256


@pytest.mark.parametrize(
    ("devices", "workers"),
    [([], 8), (["1"], 8), (["2"], 7), (["[0,3,5]"], 3), (["-1"], 3), (["auto"], 3)],
)
def test_processes_share_the_cores_for_data_workers(monkeypatch, devices, workers):
    """16 cores, one of them for the first process; -1, auto and lists are taken for all of the four GPUs."""
    monkeypatch.setattr(recipe, "count_images", lambda _: 10_000)
    monkeypatch.setattr(recipe, "usable_cores", lambda: 16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    given = parse_args("fit", [f"--gpus={each}" for each in devices]).options
    assert choose_recipe("synthetic_pets", "none", given)["data.num_workers"] == workers


def test_the_help_says_what_is_chosen_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fewest, most = (epochs_for(images) for images in (10**9, 1))
    assert options()["trainer.max_epochs"].auto_default.endswith(f", on a GPU {fewest} to {most}")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert options()["trainer.precision"].auto_default.endswith(f", on a GPU {default_precision()}")


def test_a_trial_leaves_no_folder_and_counts_its_own_memory(cli, tiny, drawn_pets, monkeypatch):
    """The folder is no longer claimed when it is removed: Windows removes no file that is open."""
    real, calls = shutil.rmtree, []

    def removed(folder, **options):
        calls.append(lock_run_folder(Path(folder)).release())
        real(folder, **options)

    monkeypatch.setattr("moevision.train.resume._PATIENCE_S", 0.0)
    monkeypatch.setattr(shutil, "rmtree", removed)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("peak"))
    succeeded(cli("fit", drawn_pets, *tiny, "--trainer.fast_dev_run=1"))
    assert calls == ["peak", None]
    assert cli("fit", drawn_pets, *tiny, "--model.arch.top_k=9").code == 2
    assert calls == ["peak", None] * 2
    assert not list(Path("runs").iterdir())


def test_recipe_of_a_named_dataset_knows_its_size(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    picked = choose_recipe("synthetic_pets")
    assert picked["trainer.max_epochs"] == 12  # 200 000 / 16 000
    assert picked["data.batch_size"] == 64
    assert picked["data.crop"] == "auto"


@pytest.mark.deep
@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_a_training_in_another_type_is_tested_too(cli, tiny, drawn_pets, precision):
    """Calibration, the test and the timing of one image take images of that type."""
    succeeded(
        cli("fit", drawn_pets, *tiny, "--trainer.max_epochs=1", f"--trainer.precision={precision}")
    )
    (run,) = Path("runs").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["precision"] == precision
    assert summary["ms_per_image"] > 0


@pytest.mark.deep
def test_seeds_that_are_drawn(cli, tiny, drawn_pets):
    """`true` draws a seed and keeps it, so that the run can be made again; `false` sets none."""
    seeds = []
    for asked in ("true", "true", "false"):
        succeeded(
            cli("fit", drawn_pets, *tiny, "--trainer.max_epochs=1", "--seed_everything", asked)
        )
    for run in sorted(Path("runs").iterdir()):
        seeds.append(json.loads((run / "summary.json").read_text())["seed"])
    assert seeds[0] != seeds[1]
    assert seeds[2] is None


def test_a_run_without_validation_is_validated_by_one_more_option(cli, tiny, drawn_pets):
    assert (
        cli(
            "fit", drawn_pets, *tiny, "--trainer.max_epochs=1", "--trainer.limit_val_batches=0"
        ).code
        == 0
    )
    outcome = refused(
        cli("validate", "runs/pets"),
        "--trainer.limit_val_batches 0",
        "nothing to validate",
        "say 1.0",
    )
    outcome = succeeded(cli("validate", "runs/pets", "--trainer.limit_val_batches=1.0"))
    assert "val images right" in outcome.out


def test_steps_that_are_asked_for_are_not_cut_by_epochs_that_nobody_gave(drawn_pets, tmp_path):
    """Neither by the recipe's, the default or those of a configuration below; both that one source gives limit."""

    def end(*arguments):
        options = resolved("fit", *arguments)
        return options["trainer.max_epochs"], options["trainer.max_steps"]

    steps = "--trainer.max_steps=5000"
    assert end(drawn_pets, "--pretrained=none", steps) == (None, 5000)
    assert end("--config=quickstart", steps) == (None, 5000)
    assert end("--config=quickstart", steps, "--epochs=7") == (7, 5000)
    (tmp_path / "steps.yaml").write_text("trainer: {max_steps: 5000}")
    assert end(f"--config={tmp_path / 'steps.yaml'}") == (None, 5000)
    assert end(f"--config={tmp_path / 'steps.yaml'}", "--epochs=7") == (7, 5000)
    assert end(drawn_pets, "--pretrained=none") == (100, -1)


def test_of_steps_alone_epochs_are_counted_and_no_last_one(cli, tiny, drawn_pets, monkeypatch):
    """Lightning's own bar says "Epoch 0/-2"; a file has lines in its place, though nobody asked for none."""
    options = [each for each in tiny if "max_epochs" not in each and "progress_bar" not in each]
    outcome = succeeded(cli("fit", drawn_pets, *options, "--trainer.max_steps=6"))
    assert re.search(r"^epoch 1: validation .* left$", outcome.out, re.M)
    assert "Epoch 0" not in outcome.out
    trainer = L.Trainer(max_steps=1, logger=False, enable_checkpointing=False)
    hide_unknown_epoch_total(trainer)
    assert trainer.progress_bar_callback._get_train_description(0).strip() == "Epoch 0"


@pytest.mark.parametrize(("shown", "bar"), [("true", True), ("false", False)])
def test_a_terminal_has_a_bar_unless_nobody_wants_one(tiny, drawn_pets, monkeypatch, shown, bar):
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    options = [drawn_pets, *tiny, f"--trainer.enable_progress_bar={shown}"]
    settings = to_settings(resolved("fit", *options))
    trainer = fit_module._trainer(settings, Path(), {}, [])
    assert (trainer.progress_bar_callback is not None) is bar


def test_a_config_replaces_the_recipe(drawn_pets):
    quickstart = quickstart_options()
    # The weights bring their own architecture: that of the configuration is left out, and what is typed is not.
    weights = {"model.arch.pretrained": "x", "model.arch.name": None, "model.arch.base": None}
    found = resolved("fit", drawn_pets, "--config=quickstart", "--pretrained=x")
    assert found == quickstart | weights | {"data.path": str(drawn_pets)}
    typed = resolved("fit", "--config=quickstart", "--pretrained=x", "--model.arch.name=vit_moe")
    assert typed == quickstart | weights | {"model.arch.name": "vit_moe"}
    assert resolved("fit", "quickstart") == quickstart


def test_a_run_measures_how_far_strangers_lie(cli, draw, tiny, tmp_path):
    """A twentieth of the run's validation images is refused, and most noise; of its test images as many as it says."""
    succeeded(
        cli(
            "fit",
            draw(tmp_path / "pets", per_class=80),
            *tiny,
            "--data.val_fraction=0.25",
            "--name=far",
        )
    )
    model = load_model("runs/far")
    val = open_pictures(tmp_path / "pets", 32, split="val", run_dir="runs/far")
    assert len(val) == 40

    def distances(images):
        with torch.inference_mode():
            return answers(model.net, model.strangers, network_input(model, images))[1].numpy()

    assert (distances(read_images(val, range(40))) > 1).sum() == 2
    test = open_pictures(tmp_path / "pets", 32, split="test", run_dir="runs/far")
    refused = int((distances(read_images(test, range(len(test)))) > 1).sum())
    summary = json.loads(Path("runs/far/summary.json").read_text())
    assert summary["strangers"] == [refused, len(test)]
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    assert (distances(noise) > 1).mean() > 0.5


@pytest.mark.needs("tensorboard")
def test_a_run_with_tensorboard_keeps_its_own_files(cli, tiny, drawn_pets):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = ("--trainer.logger={class_path: TensorBoardLogger, init_args: {save_dir: logs}}",)
    succeeded(cli("fit", drawn_pets, *tiny, *logger))
    run = Path("runs/pets")
    assert {"config.yaml", "metrics.csv", "curves.png", "summary.md"} <= {
        file.name for file in run.iterdir()
    }
    (folder,) = {
        file.parent for file in Path("logs").rglob("events.out.*")
    }  # a file for fit, one for the test
    found = EventAccumulator(str(folder))
    found.Reload()
    tags = set(found.Tags()["scalars"])
    assert {"val/top1", "train/loss", "moe/1/load_max", "moe/3/entropy"} <= tags
    rows = [row for row in read_csv(run / "metrics.csv") if row["val/top1"]]
    assert len(rows) == len(found.Scalars("val/top1")) == 2
    load = [float(row["moe/1/load_max"]) for row in rows]
    # the test adds a value of its own at the end
    assert [event.value for event in found.Scalars("moe/1/load_max")][:2] == pytest.approx(
        load, rel=1e-6
    )


def test_a_run_folder_that_leads_nowhere_is_one_sentence(cli, tiny, tmp_path, monkeypatch):
    """A link to a disk that isn't there: each of runs/NAME, runs/NAME-2, ... seems to exist."""
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to("gone")
    outcome = cli("fit", "synthetic_pets", *tiny, "--runs_root", "runs")
    assert outcome.code == 2
    assert "runs: " in outcome.err
