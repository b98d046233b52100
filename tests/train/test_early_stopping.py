"""Early stopping: when it stops, what summary.md says, and that a resumed run stops where the whole one does."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from moevision.config import EarlyStoppingConfig
from moevision.train.health import StopEarly, Stopwatch
from moevision.train.resume import ResumePoint
from tests.shared import missing, succeeded
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
    cli, tiny, drawn_pets, stopped, where, monkeypatch, own_folder
):
    if where == "in the second epoch":
        real, name, owner = Stopwatch.on_train_batch_end, "on_train_batch_end", Stopwatch
        due = lambda trainer: trainer.global_step == 5  # noqa: E731
    else:  # the checkpoint of the last epoch is written, and the training has not ended yet
        real, name, owner = ResumePoint.save, "save", ResumePoint
        due = lambda trainer: trainer.should_stop  # noqa: E731

    def once(self, trainer, *rest):
        real(self, trainer, *rest)
        if due(trainer):
            monkeypatch.setattr(owner, name, real)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(owner, name, once)
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
