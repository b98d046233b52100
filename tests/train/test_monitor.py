"""What best.ckpt is the best of, and when a training stops early: said in summary.md, and the same when it is resumed.

Where classes differ in size, macro recall chooses best.ckpt, stops early and heads the result.
"""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from moevision.config import EarlyStoppingConfig
from moevision.train import fit as training
from moevision.train.health import StopEarly
from moevision.train.report import read_summary
from moevision.train.resume import ResumePoint
from moevision.train.task import MacroRecall
from moevision.words import percent
from tests.shared import missing, refused, succeeded
from tests.train.quiet import logged

# A learning rate of next to nothing: no epoch is better than the first, so a patience of 2 stops after the third.
STOPS = ("--trainer.max_epochs=6", "--model.optim.lr=1e-30", "--early_stopping.patience=2")
COMPARED = ("metrics.csv", "predictions_test.csv", "model/model.safetensors", "summary.md")


@pytest.fixture(scope="module")
def stopped(cli, tiny, drawn_pets, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stopped")
    outcome = succeeded(cli("fit", drawn_pets, *tiny, *STOPS, f"--runs_root={root}"))
    assert not missing(outcome.out + outcome.err, "3 of 6 epochs", "val/top1")
    return root / "pets"


def test_it_stops_and_says_so(stopped):
    assert len(logged(stopped, "val/top1")) == 3
    summary = (stopped / "summary.md").read_text()
    assert not missing(summary, "Stopped early", "3 of 6 epochs: val/top1", "no better than")


@pytest.mark.deep
@pytest.mark.parametrize("where", ["in the second epoch", "after the decision"])
def test_a_resumed_run_stops_where_the_whole_one_does(
    cli, tiny, drawn_pets, stopped, where, monkeypatch, send_signal, own_folder
):
    real = ResumePoint.save

    def once(self, trainer):
        real(self, trainer)
        if trainer.should_stop:
            monkeypatch.setattr(ResumePoint, "save", real)
            os.kill(os.getpid(), signal.SIGTERM)

    if where == "in the second epoch":
        send_signal(5)
    else:  # the checkpoint of the last epoch is written, and the training has not ended yet
        monkeypatch.setattr(ResumePoint, "save", once)
    assert cli("fit", drawn_pets, *tiny, *STOPS).code == 143
    succeeded(cli("fit", "--resume", "runs/pets"))
    run = Path("runs/pets")
    assert len(logged(run, "val/top1")) == 3
    for file in COMPARED[:3]:
        assert (run / file).read_bytes() == (stopped / file).read_bytes(), file
    assert "3 of 6 epochs" in (run / "summary.md").read_text()


@pytest.mark.parametrize(
    ("done", "said"), [(24, ["Stopped early after 24 of 30 steps: val/top1 was"]), (30, [])]
)
def test_a_training_that_is_measured_in_steps_says_it_too(done, said):
    stop = StopEarly(EarlyStoppingConfig(2))
    stop.wait_count = 2
    trainer = SimpleNamespace(
        max_epochs=-1,
        max_steps=30,
        current_epoch=3,
        global_step=done,
        estimated_stepping_batches=30,
    )
    assert [sentence.partition(" no better")[0] for sentence in stop.sentences(trainer)] == said


BALANCED = "val/balanced_acc"
STOPS_AFTER_2 = ("--trainer.max_epochs=4", "--model.optim.lr=1e-30", "--early_stopping.patience=1")


@pytest.fixture(scope="module")
def two_to_one(draw, tmp_path_factory) -> Path:
    """12 cats and 24 dogs."""
    root = tmp_path_factory.mktemp("unbalanced") / "pets"
    draw(root, ("dog",), per_class=24)
    return draw(root, ("cat",), per_class=12)


def best_of(run):
    """(what best.ckpt is the best of, that value)."""
    saved = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["callbacks"]
    name, state = next(
        (name, state) for name, state in saved.items() if name.startswith("ModelCheckpoint")
    )
    return next(each for each in ("val/top1", BALANCED) if f"'{each}'" in name), float(
        state["best_model_score"]
    )


def recorded(run):
    return yaml.safe_load((run / "config.yaml").read_text())["checkpoint"]["monitor"]


def test_macro_recall_chooses_the_epoch_and_heads_the_result(cli, tiny, two_to_one, tmp_path):
    outcome = succeeded(cli("fit", two_to_one, *tiny, *STOPS_AFTER_2, f"--runs_root={tmp_path}"))
    assert outcome.out.count("chosen by val/balanced_acc") == 1
    assert f"2 of 4 epochs: {BALANCED} was" in outcome.out + outcome.err
    run = tmp_path / "pets"
    assert recorded(run) == BALANCED
    assert best_of(run) == (BALANCED, pytest.approx(max(logged(run, BALANCED))))
    summary = read_summary(run / "summary.json")
    assert summary.monitor == BALANCED
    assert summary.unbalanced
    assert (
        f"\nbalanced accuracy {percent(summary.test.balanced_accuracy)}; "
        in outcome.out + outcome.err
    )
    assert "best balanced accuracy" in (run / "summary.md").read_text()


@pytest.mark.parametrize(
    ("asked", "best"),
    [("--checkpoint.monitor", "val/top1"), ("--early_stopping.monitor", BALANCED)],
)
def test_what_was_asked_for_goes_first(cli, tiny, two_to_one, asked, best, tmp_path):
    outcome = succeeded(
        cli("fit", two_to_one, *tiny, *STOPS_AFTER_2, asked, "val/top1", f"--runs_root={tmp_path}")
    )
    said = outcome.out + outcome.err
    assert "2 of 4 epochs: val/top1" in said
    assert ("is chosen by" in said) == ("\nbalanced accuracy " in said) == (best == BALANCED)
    assert best_of(tmp_path / "pets")[0] == best


def test_balanced_classes_go_by_accuracy(tiny_run):
    assert "chosen by" not in (tiny_run.parents[1] / "output.txt").read_text()
    assert recorded(tiny_run) == "val/top1" == best_of(tiny_run)[0]


@pytest.mark.parametrize("earlier_version", [False, True])
def test_a_run_that_goes_on_keeps_its_choice(
    cli, tiny, two_to_one, earlier_version, monkeypatch, send_signal, own_folder
):
    if earlier_version:
        monkeypatch.setattr(training, "is_unbalanced", lambda counts: False)
    send_signal(3)  # of 4, two an epoch
    assert cli("fit", two_to_one, *tiny).code == 143
    run, first = Path("runs/pets"), "val/top1" if earlier_version else BALANCED
    assert recorded(run) == first
    if earlier_version:  # which knew no such option
        config = yaml.safe_load((run / "config.yaml").read_text())
        del config["checkpoint"]["monitor"]
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    # Images have come or gone: the rule would answer otherwise.
    monkeypatch.setattr(training, "is_unbalanced", lambda counts: earlier_version)
    other = "val/top1" if first == BALANCED else BALANCED
    refused(cli("fit", "--resume", run, f"--checkpoint.monitor={other}"), "--checkpoint.monitor")
    succeeded(cli("fit", "--resume", run))
    assert best_of(run) == (first, pytest.approx(max(logged(run, first))))
    assert read_summary(run / "summary.json").monitor == first


def test_a_class_without_images_is_left_out():
    """Labels 0 0 0 1 and no image of class 2: (2/3 + 1) / 2, although one image is taken for class 2."""
    metric = MacroRecall(3, average="macro")
    metric.update(torch.tensor([0, 0, 2]), torch.tensor([0, 0, 0]))
    metric.update(torch.tensor([1]), torch.tensor([1]))
    assert float(metric.compute()) == pytest.approx((2 / 3 + 1) / 2)
