"""A run that was interrupted and gone on with is the run that never was, and every change of it is said or refused."""

import csv
import errno
import itertools
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from enum import Enum
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import moevision
from moevision.analysis.images import find_images
from moevision.config import Settings, parse_args, to_settings
from moevision.data.loader import PositionSampler
from moevision.errors import UserError
from moevision.train import fit as training
from moevision.train import resume
from moevision.train.checkpoint import SafeCheckpointIO, newest_valid, plain
from moevision.train.fit import quiet_lightning
from moevision.train.health import Stopwatch
from moevision.train.recipe import read_request
from moevision.train.resume import (
    CheckpointConfig,
    Session,
    begin,
    changed_options,
    is_free,
    lock_run_folder,
    without_resume,
)
from tests.shared import assert_names, refused, signal_after, succeeded
from tests.train import resume_matrix as matrix

COMPARED = (
    "metrics.csv",
    "predictions_test.csv",
    "model/model.safetensors",
    "config.yaml",
    "splits.csv",
    "scores.csv",
)
# 24 training images, batches of 8, two epochs: six steps.
LATE, LAST = 5, 6
GO_ON = "moevision fit --resume runs/pets"
OTHER = matrix.Setting("other", arch={"proj_drop_rate": 0.2})


pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture(scope="module")
def stopped_runs(cli, tiny, drawn_pets, tmp_path_factory):
    """Run folder of a training that was asked to stop after a step; each is trained once, and not to be changed."""

    @cache
    def train(step, *options):
        home = tmp_path_factory.mktemp("stopped")
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(home)
            signal_after(patched, step)
            outcome = cli("fit", drawn_pets, *tiny, *options)
        assert outcome.code == 143, outcome.err
        assert_names(outcome.err, "Stopped by SIGTERM.", GO_ON)
        return home / "runs" / "pets"

    return train


@pytest.fixture
def stopped(stopped_runs):
    """A copy of such a run as runs/pets."""

    def copy(step, *options):
        return Path(shutil.copytree(stopped_runs(step, *options), "runs/pets"))

    return copy


@pytest.fixture
def interrupted(stopped) -> Path:
    """A run folder whose training was asked to stop in the second epoch."""
    return stopped(LATE)


def differing(run: Path, other: Path) -> list[str]:
    def content(path):
        text = path.read_bytes()
        return (
            re.sub(rb"(?m)^ *(runs_root|cache_mb): .*$", b"", text)
            if path.suffix == ".yaml"
            else text
        )

    return [name for name in COMPARED if content(run / name) != content(other / name)]


# `python -m benchmarks resume` runs the whole matrix; this is its hardest part.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """State at the end of an uninterrupted training of the matrix, by its setting's name; each is trained once."""
    settings = {setting.name: setting for setting in (*matrix.SETTINGS, OTHER)}

    @cache
    def train(name):
        with quiet_lightning():
            return matrix.train(tmp_path_factory.mktemp("matrix"), settings[name])

    return train


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("EMA, bias, bf16, accumulate 2, mixup", "mid-epoch"),
        ("EMA, bias, bf16, accumulate 2, mixup", "last batch of an epoch"),
        ("EMA, bias, bf16, accumulate 2, mixup", "epoch 1"),
        ("0 workers, then 2", "epoch 1"),
        ("hybrid, Muon", "mid-epoch"),
        ("validation twice an epoch", "at a validation"),
        ("plain", "in validation"),
        ("by image", "mid-epoch"),
        ("max_steps", "last batch of an epoch"),
        ("max_steps", "in validation"),
        ("max_steps", "epoch 1"),
        ("max_steps", "epoch 2"),
        ("max_steps, accumulate 3, rest of 2", "last batch of epoch 1"),
        ("max_steps, validation twice an epoch", "last batch of an epoch"),
    ],
)
def test_interrupted_and_resumed_is_uninterrupted(name, place, trained, tmp_path):
    setting = next(each for each in matrix.SETTINGS if each.name == name)
    with quiet_lightning():
        found = matrix.run_cell(setting, place, trained(name), tmp_path)
    assert (found["differs"], found["leaked"]) == ([], [])
    assert matrix.unequal(matrix.compared(trained(name)), matrix.compared(trained(OTHER.name))), (
        "it can fail"
    )


@pytest.mark.deep
@pytest.mark.parametrize("step", [3, 5, 8], ids=["an epoch's end", "within one", "the last step"])
def test_a_training_that_ends_by_its_steps(cli, tiny, drawn_pets, send_signal, step):
    """Three steps an epoch, eight in all: scores and predictions too are those of the run that nobody interrupted."""
    options = (*tiny, "--trainer.max_epochs=null", "--trainer.max_steps=8", "--data.scores=true")
    assert cli("fit", drawn_pets, *options, "--name=whole").code == 0
    send_signal(step)
    assert cli("fit", drawn_pets, *options).code == 143
    outcome = succeeded(cli("fit", "--resume", "runs/pets"))
    assert_names(outcome.err, f"last.ckpt, step {step} (verified)")
    assert differing(Path("runs/pets"), Path("runs/whole")) == ["config.yaml"], (
        "which has another name"
    )
    run, alone = (
        json.loads(Path(f"runs/{name}/summary.json").read_text()) for name in ("pets", "whole")
    )
    assert (
        (run["epochs"], run["steps"]) == (alone["epochs"], alone["steps"]) == (round(8 / 3, 1), 8)
    )


@pytest.mark.deep
def test_the_last_line_goes_on_with_the_run(cli, interrupted, whole):
    config = (interrupted / "config.yaml").read_bytes()
    outcome = succeeded(cli(*shlex.split("fit --resume runs/pets")))
    assert_names(outcome.err, "with runs/pets", f"from last.ckpt, step {LATE} (verified).")
    assert "bit-identical" not in outcome.err
    assert differing(interrupted, whole) == []
    assert (interrupted / "config.yaml").read_bytes() == config
    first, second = json.loads((interrupted / "sessions.json").read_text())
    assert first["from"] is None
    assert second["from"]["step"] == LATE
    assert second["command"] == ["moevision", "fit", "--resume", "runs/pets"]
    assert json.loads((interrupted / "provenance.json").read_text())["command"] == first["command"]
    assert [path.name for path in Path("runs").iterdir()] == ["pets"], "the same run folder"
    again = succeeded(cli("fit", "--resume", "runs/pets"))
    assert "is finished" in again.err


def test_a_training_that_runs_out_of_time_goes_on_later(cli, tiny, drawn_pets, whole, monkeypatch):
    """Between two steps, as after a signal: nothing is lost, and the rate comes down to its end."""
    real = Stopwatch.on_train_batch_end

    def slow(self, trainer, *rest):
        real(self, trainer, *rest)
        time.sleep(1.1 * (trainer.global_step == LATE))

    with monkeypatch.context() as patched:
        patched.setattr(Stopwatch, "on_train_batch_end", slow)
        outcome = cli("fit", drawn_pets, *tiny, "--trainer.max_time=00:00:00:01")
    assert outcome.code == 143, outcome.err
    assert_names(outcome.err, "Stopped by --trainer.max_time.", GO_ON)
    assert outcome.err.splitlines()[-1] == GO_ON
    assert not Path("runs/pets/summary.json").exists()
    outcome = succeeded(cli("fit", "--resume=runs/pets", "--trainer.max_time=00:01:00:00"))
    assert "last.ckpt, step " in outcome.err
    assert differing(Path("runs/pets"), whole) == ["config.yaml"]


def test_auto_starts_afresh_then_goes_on_then_rests(cli, tiny, drawn_pets, send_signal, whole):
    command = ("fit", drawn_pets, *tiny, "--resume", "auto")
    send_signal(2, signal.SIGINT)
    outcome = cli(*command)
    assert outcome.code == 130
    assert_names(outcome.err, "runs/pets has no", "starting afresh.")
    outcome = succeeded(cli(*command))
    assert "last.ckpt, step 2" in outcome.err
    assert "changed:" not in outcome.err, "a recipe that would choose otherwise today is no change"
    assert differing(Path("runs/pets"), whole) == []
    summary = json.loads(Path("runs/pets/summary.json").read_text())
    assert 2 * 24 / summary["images_per_s"] < summary["duration_s"], (
        "two epochs of 24 images took a part of the time"
    )
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    outcome = cli(*command)
    assert (outcome.code, {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}) == (
        0,
        before,
    )
    assert "nothing to do" in outcome.err


@pytest.mark.deep
def test_a_training_that_begins_keeps_nothing_of_an_attempt_that_saved_no_step(
    cli, tiny, drawn_pets, interrupted
):
    """Neither its rows of metrics.csv nor its split, probe and lists: options of another split are what counts."""
    for file in (interrupted / "checkpoints").iterdir():
        file.unlink()
    assert (interrupted / "metrics.csv").read_bytes().count(b"\n") > 2
    left = [interrupted / name for name in ("probe.json", "config-2.yaml", "bad_images.csv")]
    for file in left:
        file.write_text("of the earlier attempt")
    options = (*tiny, "--data.val_fraction=0.3")
    assert "starting afresh" in succeeded(cli("fit", drawn_pets, *options, "--resume", "auto")).err
    succeeded(cli("fit", drawn_pets, *options, "--name", "new"))
    assert differing(interrupted, Path("runs/new")) == ["config.yaml"], "which has another name"
    assert not any(file.exists() for file in left)


def test_a_signal_before_the_first_step_leaves_nothing(cli, tiny, drawn_pets, monkeypatch):
    monkeypatch.setattr(
        "moevision.train.fit.describe_plan",
        lambda *_: os.kill(os.getpid(), signal.SIGTERM) or "never seen",
    )
    outcome = cli("fit", drawn_pets, *tiny)
    assert outcome.code == 143
    assert_names(outcome.err, "Stopped by SIGTERM.", "Nothing was saved")
    assert not list(Path("runs").iterdir())


def test_changes_are_listed_or_refused(cli, interrupted, monkeypatch, send_signal):
    before = {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    for option in (
        "--data.batch_size=4",
        "--model.optim.lr=0.1",
        "--seed_everything=3",
        "--data.mixup=0.2",
    ):
        outcome = refused(
            cli("fit", "--resume", interrupted, option),
            f"moevision: {option.split('=')[0]} is ",
            "with --pretrained",
        )
    assert {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()} == before
    threads = torch.get_num_threads()
    with (
        monkeypatch.context() as patched
    ):  # not really: two threads on a busy core wait for each other
        patched.setattr(torch, "get_num_threads", lambda: threads + 1)
        send_signal(LAST)
        outcome = cli("fit", "--resume", interrupted, "--data.num_workers=1", "--data.seed=0")
    assert outcome.code == 143, outcome.err
    assert outcome.err.count("changed:") == 1
    change = "--data.num_workers was 0, now 1"
    assert_names(outcome.err, change, f"(OMP_NUM_THREADS) was {threads}")
    notes = json.loads((interrupted / "sessions.json").read_text())[1]["notes"]
    assert notes[0] == change
    assert "num_workers: 0" in (interrupted / "config.yaml").read_text()
    assert "num_workers: 1" in (interrupted / "config-2.yaml").read_text()


def test_where_memory_is_too_small_what_may_change_is_named(cli, interrupted, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("moevision.train.recipe.seconds_per_batch", fail)
    outcome = refused(cli("fit", "--resume", interrupted))
    options = re.findall(r"--([\w.]+)", outcome.err.splitlines()[-1])
    assert options
    assert all(map(is_free, options))


def test_the_next_command_says_the_changes_again(whole):
    """The run's config.yaml doesn't: it stays what the run began with."""
    for notes, more in (
        ([], ""),
        (["--data.path was pets, now my pets"], " --data.path 'my pets'"),
    ):
        session = Session(["moevision", "fit", "--data.path", "my pets", "--resume", str(whole)])
        session.run_dir, session.notes = whole, notes
        assert session.resume_command == f"moevision fit --resume {whole}{more}"


@pytest.mark.parametrize("how", ["by its folder", "auto"])
def test_a_finished_run_is_not_another_training(cli, tiny, drawn_pets, whole, how):
    command = ["--resume", whole]
    if how == "auto":
        command = [drawn_pets, *tiny, f"--runs_root={whole.parent}", "--resume=auto"]
    outcome = refused(
        cli("fit", *command, "--trainer.max_epochs=30"), "--trainer.max_epochs is 2", "become 30"
    )
    outcome = cli("fit", *command, "--data.num_workers=1")
    assert (outcome.code, "is finished" in outcome.err) == (0, True)


def test_another_seed_is_another_order_but_not_of_a_run_of_an_earlier_version(
    cli, tiny, drawn_pets, whole, send_signal, monkeypatch
):
    seeds = []
    real = PositionSampler.__init__

    def heard(self, *args, seed, **options):
        seeds.append(seed)
        real(self, *args, seed=seed, **options)

    monkeypatch.setattr(PositionSampler, "__init__", heard)
    send_signal(LATE)
    assert cli("fit", drawn_pets, *tiny, "--seed_everything=3").code == 143
    run = Path("runs/pets")
    config = (run / "config.yaml").read_text()
    assert (seeds, config.count("  order_seed: 3\n")) == ([3], 1)
    assert (run / "splits.csv").read_bytes() == (whole / "splits.csv").read_bytes()
    # There the order followed --data.seed, and nothing else was written down.
    (run / "config.yaml").write_text(config.replace("  order_seed: 3\n", ""))
    send_signal(LAST)
    assert cli("fit", "--resume", run).code == 143
    assert seeds == [3, 0]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(cli, interrupted, whole):
    last = interrupted / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    outcome = succeeded(cli("fit", "--resume", interrupted))
    assert_names(outcome.err, "last.ckpt is no", "previous.ckpt, step 3")
    assert differing(interrupted, whole) == []


def test_nothing_valid(cli, interrupted, tiny, drawn_pets):
    for path in (interrupted / "checkpoints").glob("*.ckpt"):
        path.write_bytes(b"")
    refused(cli("fit", "--resume", interrupted), "Nothing in runs/pets", "be resumed")
    assert interrupted.is_dir(), "a run is never deleted"


def test_a_run_folder_may_move_and_pictures_may_vanish(cli, tiny, drawn_pets, send_signal, whole):
    pets = Path(shutil.copytree(drawn_pets, "pets"))
    send_signal(LATE)
    assert cli("fit", "./pets", *tiny).code == 143
    moved = Path(shutil.move("runs/pets", "elsewhere"))
    with (moved / "splits.csv").open(newline="") as file:
        gone = next(row["path"] for row in csv.DictReader(file) if row["split"] == "test")
    (pets / gone).unlink()
    pets = Path(shutil.move(pets, "photos"))
    outcome = refused(cli("fit", "--resume", moved), "; --data.path", "images are now.")
    outcome = succeeded(cli("fit", "--resume", moved, "--data.path", pets))
    (command,) = re.findall(
        r"^    moevision (test .*)$", (moved / "summary.md").read_text(), re.MULTILINE
    )
    assert cli(*shlex.split(command)).code == 0
    assert find_images(str(moved)).path == "photos"
    assert_names(outcome.err, "list of images", "another one")
    states = torch.load(moved / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    (best,) = (state for name, state in states.items() if name.startswith("ModelCheckpoint"))
    assert best["best_model_score"] is not None


def test_other_images_under_the_same_names_are_said(cli, tiny, drawn_pets, send_signal):
    """By the sizes of their files: contents aren't read again."""
    pets = Path(shutil.copytree(drawn_pets, "pets"))
    send_signal(LATE)
    assert cli("fit", "./pets", *tiny).code == 143
    changed = sorted(pets.rglob("*.png"))[0]
    changed.write_bytes(changed.read_bytes() + b"0")
    send_signal(LAST)
    outcome = cli("fit", "--resume", "runs/pets")
    assert outcome.code == 143
    assert_names(outcome.err, "image files", "other sizes")


@pytest.mark.parametrize(
    ("steps", "options"),
    [(1, ()), (2, ("--dense", "--trainer.log_every_n_steps=10")), (5, ())],
    ids=["1", "2", "5"],
)
def test_a_training_of_few_steps(cli, tiny, drawn_pets, steps, options):
    """Five are the ones of which a fifth, the warm-up, is one step; two may end before anything is logged.

    An epoch is three batches of 8 images. The summary says how to test it, also within the first epoch.
    """
    succeeded(cli("fit", drawn_pets, *tiny, f"--trainer.max_steps={steps}", *options))
    summary = Path("runs/pets/summary.md").read_text()
    assert f"images per step | {steps / 3:.1f}; {steps}; 8 |" in summary
    (command,) = re.findall(r"^    moevision (test .*)$", summary, re.MULTILINE)
    succeeded(cli(*shlex.split(command)))
    no_epoch = "the weights of the last step, because there is no best.ckpt" in summary
    assert (no_epoch, Path("runs/pets/curves.png").exists()) == (steps < 3, not options)
    found, _ = newest_valid(Path("runs/pets/checkpoints"))
    assert found.step == steps


def test_a_full_disk(cli, tiny, drawn_pets, monkeypatch, whole):
    """At the second save: one sentence, whose command ends in the run that had room."""
    real, calls = SafeCheckpointIO.save_checkpoint, itertools.count()

    def save(files, *given, **named):
        if next(calls) == 2:
            raise OSError(
                errno.ENOSPC, "No space left on device", "runs/pets/checkpoints/last.ckpt"
            )
        real(files, *given, **named)

    with monkeypatch.context() as patched:
        patched.setattr(SafeCheckpointIO, "save_checkpoint", save)
        outcome = cli("fit", drawn_pets, *tiny)
    refused(outcome, "No space left", "last.ckpt: mend that", f"{GO_ON}.")
    assert cli("fit", "--resume", "runs/pets").code == 0
    assert differing(Path("runs/pets"), whole) == []


def test_a_twin_is_gone_on_with(cli, tiny, tiny_run):
    """Stopped within it, and compared with the same training that nobody stopped."""
    options = (*tiny, "--with-twin", "--data.max_bad_fraction=0.2", "--runs_root=runs")
    real, calls = Stopwatch.on_train_batch_end, iter(range(100))

    def in_the_twin(self, trainer, *rest):
        real(self, trainer, *rest)
        if next(calls) == 6 + 3:  # the run's six steps, and four of its twin
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Stopwatch, "on_train_batch_end", in_the_twin)
        outcome = cli("fit", tiny_run.parents[1] / "pets", *options)
    assert outcome.code == 143
    assert outcome.err.splitlines()[-1] == GO_ON
    outcome = succeeded(cli("fit", "--resume", "runs/pets"))
    assert_names(outcome.err, "with runs/pets/twin", "last.ckpt, step 4")

    def command(run):
        words = json.loads((run / "twin" / "provenance.json").read_text())["command"]
        return [word for word in words if not word.startswith("--runs_root=")]

    run = Path("runs/pets")
    assert command(run) == command(tiny_run)
    for name in ("metrics.csv", "predictions_test.csv", "model/model.safetensors"):
        for folder in ("", "twin"):
            assert (run / folder / name).read_bytes() == (tiny_run / folder / name).read_bytes()
    assert "is finished" in cli("fit", "--resume", run).err


def change_checkpoint(run, change):
    """Change what last.ckpt holds."""
    last = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, last)


def test_an_image_that_is_gone_is_why_there_are_fewer_steps(cli, tiny, drawn_pets, send_signal):
    """23 images are two batches of 8 an epoch in place of three; the number of processes is the one before."""
    pets = Path(shutil.copytree(drawn_pets, "pets"))
    send_signal(1)
    assert cli("fit", "./pets", *tiny).code == 143
    with Path("runs/pets/splits.csv").open(newline="") as file:
        gone = next(row["path"] for row in csv.DictReader(file) if row["split"] == "train")
    (pets / gone).unlink()
    send_signal(2)
    outcome = cli("fit", "--resume", "runs/pets")
    assert outcome.code == 143
    assert_names(outcome.err, "warning: ", "after 6 steps", "training has 4", "not come down")
    assert_names(outcome.err, "training images (or", "Put them back")
    assert "processes" not in outcome.err


@pytest.mark.parametrize(
    ("before", "causes"),
    [
        (2, ["with 2 processes", "divides the one"]),
        (1, ["training images (or", "Put them back"]),
    ],
)
def test_a_learning_rate_that_has_come_down_names_the_cause(cli, stopped, before, causes):
    """The checkpoint is of a training of five steps, and there are six."""

    def of_five_steps(state):
        state["lr_schedulers"][0]["total_steps"] = 5
        state["ImageDataModule"]["world_size"] = before

    change_checkpoint(stopped(1), of_five_steps)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the run began with world_size 2")
        refused(cli("fit", "--resume", "runs/pets"), "after 5 steps", "training has 6: ", *causes)


@pytest.mark.filterwarnings("ignore:the run began with world_size 2")
def test_a_twin_has_the_images_of_a_step_of_a_run_gone_on_with_by_fewer_processes(cli, stopped):
    """The run was begun by two processes of 8 images each; by one, each step of it and of its twin has two batches."""

    def by_two_processes(state):
        state["ImageDataModule"]["world_size"] = 2
        state["moevision"]["fingerprint"] |= {"world_size": 2, "images_per_step": 16}

    change_checkpoint(stopped(1, "--with-twin"), by_two_processes)
    succeeded(cli("fit", "--resume", "runs/pets"))
    run, twin = (
        json.loads(Path(f"runs/pets/{folder}summary.json").read_text()) for folder in ("", "twin/")
    )
    assert (run["batch_size"], twin["batch_size"]) == (16, 16)


def test_a_twin_has_the_recipe_and_the_seed_of_a_run_gone_on_with_by_the_same_command(
    cli, drawn_pets, send_signal
):
    """A job script repeats it: the recipe was chosen at the first start, and `true` has drawn its seed there."""
    options = (
        "--pretrained=none",
        "--data.image_size=32",
        "--trainer.max_steps=4",
        "--seed_everything=true",
    )
    command = ("fit", drawn_pets, *options, "--with-twin", "--resume=auto")
    send_signal(2)
    assert cli(*command).code == 143
    outcome = succeeded(cli(*command))
    run, twin = (
        yaml.safe_load(Path(f"runs/pets/{folder}config.yaml").read_text())
        for folder in ("", "twin/")
    )
    assert twin["model"]["arch"] == {**run["model"]["arch"], "twin": "active_flops"}
    for part in ("trainer", "data", "seed_everything"):
        assert twin[part] == run[part]
    assert twin["model"]["optim"] == run["model"]["optim"]
    outcome = cli(*command)
    assert (outcome.code, "is finished" in outcome.err) == (0, True)


def test_which_options_may_change():
    """Arguments of Lightning's own defaults stand in no config.yaml unless they were given; a drawn seed stays."""
    limited, seeded = to_settings({"trainer.limit_train_batches": 2}), Settings(seed_everything=3)
    drawn, without = Settings(seed_everything=True), Settings(seed_everything=False)
    for before, after, said in (
        (Settings(), limited, "limit_train_batches"),
        (limited, Settings(), "limit_train_batches"),
        (seeded, Settings(seed_everything=4), "--seed_everything is 3"),
        (seeded, without, "--seed_everything is 3"),
        (without, drawn, "--seed_everything is False"),
    ):
        with pytest.raises(UserError, match=said):
            changed_options(before, after)
    assert changed_options(seeded, drawn) == []
    (change,) = changed_options(Settings(), Settings(checkpoint=CheckpointConfig(every_steps=3)))
    assert_names(change, "--checkpoint.every_steps was null", "now 3")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Nothing here is killed a moment before its folder is asked for, but where a test says so."""
    monkeypatch.setattr(resume, "_PATIENCE_S", 0.1)


def start_real(*arguments, code, **streams):
    """Code in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(moevision.__file__).parents[1])}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **streams}
    return subprocess.Popen(command, env=environment, text=True, **streams)


@pytest.mark.deep
def test_a_claim_ends_with_its_process_and_a_fork_is_waited_for(tmp_path, monkeypatch):
    """A training with workers is killed; they find out seconds later."""
    claimed, tell = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.setsid()
            held = lock_run_folder(tmp_path)
            parent = os.getpid()
            if os.fork() == 0:  # a worker
                os.write(tell, b".")
                while os.getppid() == parent:
                    time.sleep(0.1)
                time.sleep(1)
                os._exit(0)
            time.sleep(60)
            held.release()
        finally:
            os._exit(1)
    try:
        os.close(tell)
        assert os.read(claimed, 1) == b"."
        with pytest.raises(UserError, match="Another process"):
            lock_run_folder(tmp_path)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        monkeypatch.setattr(resume, "_PATIENCE_S", 30)
        lock_run_folder(tmp_path).release()
    finally:
        os.close(claimed)


# The process stops itself when it is about to sync a file beside its first checkpoint, which is unfinished then.
COMMAND_LINE = """
import sys
from moevision.cli import main
sys.exit(main(sys.argv[1:]))
"""
STOPS_WHILE_SAVING = (
    """
import os, signal
from pathlib import Path
real, checkpoints = os.fsync, Path("runs/pets/checkpoints")
def fsync(descriptor):
    if (checkpoints / "last.ckpt").is_file() and list(checkpoints.glob(".*.tmp")):
        os.fsync = real
        os.kill(os.getpid(), signal.SIGSTOP)
    real(descriptor)
os.fsync = fsync
"""
    + COMMAND_LINE
)


def stopped_while_saving(process, run):
    """Wait until the process has stopped; its unfinished files."""
    found = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert found.si_code == os.CLD_STOPPED, process.communicate()[0]
    return list((run / "checkpoints").glob(".*.tmp"))


def files_of(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.deep
def test_a_refused_resume_touches_nothing(cli, tiny, drawn_pets, whole):
    """A watchdog repeats its command while the training that it started still lives: that one doesn't notice."""
    command = ("fit", drawn_pets, *tiny, "--checkpoint.every_steps=1")
    process, run = start_real(*command, code=STOPS_WHILE_SAVING), Path("runs/pets")
    try:
        (unfinished,) = stopped_while_saving(process, run)
        before = files_of(run)
        shutil.copytree(run, "runs/killed")  # what SIGKILL would leave at this moment
        for again in (["--resume", run], ["--resume", run, "--data.num_workers=1"]):
            outcome = cli("fit", *again)
            assert (outcome.code, files_of(run)) == (2, before)
            assert_names(outcome.err.splitlines()[-1], "Another process", "in runs/pets:")
        outcome = cli(*command, "--resume=auto")
        assert (outcome.code, files_of(run)) == (2, before)
        assert unfinished in before
        process.send_signal(signal.SIGCONT)
        said, _ = process.communicate(timeout=300)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, said
    assert "can't be written" not in said
    assert differing(run, whole) == ["config.yaml"], "which has another --checkpoint.every_steps"
    assert cli("fit", "--resume", "runs/killed").code == 0
    assert differing(Path("runs/killed"), whole) == ["config.yaml"], (
        "scores.csv is exact over a kill, too"
    )


def test_a_refused_resume_leaves_a_training_twin_alone(cli, whole):
    """The run is finished, and somebody trains in its twin's folder."""
    twin = Path(shutil.copytree(whole, "runs/pets")) / "twin"
    twin.mkdir()
    (twin / ".metrics.csv.7.tmp").write_text("of another process")
    (twin / "splits.csv").write_text("as it was")
    held = lock_run_folder(twin)
    before = files_of(twin)
    outcome = cli("fit", "--resume", "runs/pets", "--with-twin")
    held.release()
    assert (outcome.code, files_of(twin)) == (2, before)
    assert_names(outcome.err, "Another process", "in runs/pets/twin")


def test_a_new_folder_that_another_process_took_is_left_alone(cli, tiny, drawn_pets, monkeypatch):
    """Between the making of a folder and the claim on it `--resume auto` may begin there."""
    real, held = training.new_run_folder, []

    def taken(name, root):
        folder = real(name, root)
        held.append(lock_run_folder(folder))
        (folder / "metrics.csv").write_text("of another process")
        return folder

    monkeypatch.setattr(training, "new_run_folder", taken)
    outcome = cli("fit", drawn_pets, *tiny)
    held[0].release()
    assert outcome.code == 2
    assert Path("runs/pets/metrics.csv").read_text() == "of another process"


@pytest.mark.deep
def test_a_closed_terminal(drawn_pets, tiny):
    """The terminal is closed while steps are done: the run is saved and ends with 129."""
    master, slave = pty.openpty()
    # The bar goes on writing.
    options = (*tiny, "--trainer.max_epochs=5000", "--trainer.enable_progress_bar=true")
    streams = {
        "stdin": slave,
        "stdout": slave,
        "stderr": slave,
        "start_new_session": True,
        "preexec_fn": _own,
    }
    process = start_real("fit", drawn_pets, *options, code=COMMAND_LINE, **streams)
    os.close(slave)
    last, until = Path("runs/pets/checkpoints/last.ckpt"), time.monotonic() + 600
    try:
        while not last.is_file() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        os.close(master)
        assert process.wait(timeout=600) == 129
    finally:
        process.kill()
        process.wait()
    found, refused = newest_valid(Path("runs/pets/checkpoints"))
    assert (found.path.name, refused) == ("last.ckpt", [])


def _own() -> None:
    """Make the terminal the process's own, so that its end is heard, also where nohup started the tests."""
    import fcntl
    import termios

    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_the_argument():
    assert without_resume(["a", "--resume", "runs/x", "-b"]) == ["a", "-b"]
    assert without_resume(["--resume=runs/x", "--resume=auto"]) == []


@pytest.mark.parametrize(
    "typed", [["quickstart"], ["--config", "quickstart"], ["pets", "--name=quickstart"]]
)
def test_auto_finds_the_folder_of_the_command(monkeypatch, typed):
    """By its --name, that of its configuration, or its images."""
    looked = []

    def none(folder):
        looked.append(folder)
        raise UserError("far enough")

    monkeypatch.setattr(resume, "newest_valid", none)
    given = parse_args("fit", [*typed, "--resume=auto"])
    with pytest.raises(UserError, match="far enough"):
        begin(Session(given.command), read_request("fit", given))
    assert looked == [Path("runs/quickstart/checkpoints")]


class Colour(Enum):
    RED = "red"


def test_plain_data():
    given = {
        "a": np.float64(1.5),
        "b": [Path("x/y"), np.arange(2)],
        "c": (Colour.RED, None),
        3: {"d": np.int64(4)},
    }
    assert plain(given) == {"a": 1.5, "b": ["x/y", [0, 1]], "c": ("red", None), 3: {"d": 4}}
    tensor = torch.ones(2)
    assert plain({"t": tensor})["t"] is tensor


def test_the_config_is_on_the_disk_before_the_first_step(cli, tiny, drawn_pets, monkeypatch):
    """After a power cut a checkpoint is worth nothing without it."""
    happened = []
    write, step = training.write_text_atomic, Stopwatch.on_train_batch_end
    monkeypatch.setattr(
        training,
        "write_text_atomic",
        lambda path, text: (happened.append(Path(path).name), write(path, text)),
    )
    monkeypatch.setattr(
        Stopwatch, "on_train_batch_end", lambda *given: (happened.append("step"), step(*given))
    )
    assert cli("fit", drawn_pets, *tiny, "--trainer.max_steps=1").code == 0
    assert happened[:2] == ["config.yaml", "step"]


def test_a_checkpoint_names_what_it_was_computed_with(tiny_run):
    found = torch.load(tiny_run / "checkpoints" / "last.ckpt", weights_only=True)["moevision"][
        "fingerprint"
    ]
    assert {name: found[name] for name in ("torch", "numpy")} == {
        name: version(name) for name in ("torch", "numpy")
    }
    assert (found["world_size"], found["precision"], found["threads"]) == (
        1,
        "32-true",
        torch.get_num_threads(),
    )
