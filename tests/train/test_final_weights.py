"""Which weights of a finished training are tested: the last, unless the best epoch's are shown to be better."""

import json
import math
import shutil
import statistics
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from moevision.errors import UserError
from moevision.models.history import FILE, RoutingHistory
from moevision.train import finish
from moevision.train.checkpoint import BEST, LAST, SafeCheckpointIO
from moevision.train.finish import (
    Validated,
    checkpoint_of_run,
    choose_weights,
    final_checkpoint,
    gain_of,
)
from moevision.train.processes import Interrupted
from moevision.train.report import BALANCED, LOSS, read_summary
from tests.shared import missing, succeeded
from tests.train.quiet import logged

EPOCHS = ("--trainer.max_epochs=3",)
GOOD, BAD = (
    Validated(np.array(right, dtype=bool), np.zeros(4), np.array([0, 0, 1, 1]))
    for right in ([1] * 4, [0] * 4)
)


@pytest.mark.parametrize(("only_best", "shown"), [(40, False), (60, False), (62, True)])
def test_better_is_more_than_a_standard_error_of_the_paired_difference(only_best, shown):
    """Against 50 of 3,000 images, by hand: b - c over sqrt(b + c - (b - c)² / n) is .95 and 1.13 at 60 and 62."""
    cells = (
        np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], [2_500, only_best, 50, 450 - only_best], axis=0)
        > 0
    )
    zeros = np.zeros(len(cells), dtype=int)
    gain, error = gain_of(*(Validated(right, zeros, zeros) for right in cells.T), "val/top1")
    assert gain == pytest.approx((only_best - 50) / 3_000)
    by_hand = math.sqrt(only_best + 50 - (only_best - 50) ** 2 / 3_000) / 3_000
    assert error == pytest.approx(by_hand, rel=0.03)  # Tango's interval is a little wider
    assert (gain > error) == shown == (only_best - 50 > 3_000 * by_hand)


def test_a_small_class_makes_the_balanced_accuracy_uncertain():
    """One image of a class of 12 is 4 points of the mean of two classes, and its standard error is larger."""
    labels = np.repeat([0, 1], [300, 12])
    right = np.ones(312, dtype=bool)
    fewer = right.copy()
    fewer[-1] = False
    best, last = (Validated(each, np.zeros(312), labels) for each in (right, fewer))
    gain, error = gain_of(best, last, BALANCED)
    assert gain == pytest.approx(1 / 24)
    assert gain < error


def test_the_loss_is_better_where_it_is_lower():
    """The standard error of the mean of four paired differences, by hand."""
    losses = np.array([[0.2, 0.1, 0.9, 0.4], [0.5, 0.2, 0.8, 0.9]])
    best, last = (
        Validated(np.ones(4, dtype=bool), each, np.zeros(4, dtype=int)) for each in losses
    )
    gaps = losses[1] - losses[0]
    assert gain_of(best, last, LOSS) == pytest.approx((0.2, statistics.stdev(gaps) / 2))
    one = Validated(best.correct[:1], np.array([0.1]), best.labels[:1])
    other = one._replace(loss=np.array([5.0]))
    assert gain_of(one, other, LOSS) == (pytest.approx(4.9), math.inf)  # one image has no spread


def let_first_be_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """best.ckpt is the first epoch's, whatever its validation says."""

    def is_first(self, trainer, current=None):
        return trainer.current_epoch == 0

    monkeypatch.setattr(ModelCheckpoint, "check_monitor_top_k", is_first)


@pytest.fixture(scope="module")
def stopped(cli, tiny, drawn_pets, tmp_path_factory):
    """Run folder of a training that was stopped while it chose; each is trained once, and not to be changed."""

    def stop(*given):
        raise Interrupted(15)

    @cache
    def train(*options):
        home = tmp_path_factory.mktemp("choosing")
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(home)
            let_first_be_best(patched)
            patched.setattr(finish, "_validate", stop)
            assert cli("fit", drawn_pets, *tiny, *EPOCHS, *options).code == 143
        return home / "runs" / "pets"

    return train


@pytest.fixture
def choose(cli, stopped, monkeypatch, own_folder):
    """The run folder of such a training that went on, where `validate` stands for each of the two passes."""

    def go_on(validate, *options):
        run = Path(shutil.copytree(stopped(*options), "runs/pets"))
        let_first_be_best(monkeypatch)
        monkeypatch.setattr(finish, "_validate", validate)
        succeeded(cli("fit", "--resume", run))
        return run

    return go_on


def is_exported(run: Path, name: str) -> bool:
    """Whether `model/` has the weights of this checkpoint."""
    weights = torch.load(run / "checkpoints" / name, weights_only=True)["state_dict"]
    model = load_file(run / "model" / "model.safetensors")
    return all(torch.equal(value, weights[f"net.{key}"]) for key, value in model.items())


@pytest.mark.parametrize("average", [(), ("--ema.decay=0.5",)])
def test_the_last_weights_are_tested_unless_the_best_are_better(choose, average):
    """What the two passes find is what the training's own validations of these epochs logged."""
    known: list[Validated] = []
    real = finish._validate

    def validate(*given):
        known.append(real(*given))
        return GOOD

    run = choose(validate, *average)
    accuracy = logged(run, "val/top1")
    assert len(accuracy) == 3  # the passes are no validations of the training
    assert [each.correct.mean() for each in known] == pytest.approx([accuracy[0], accuracy[-1]])
    assert not is_exported(run, BEST)
    assert is_exported(run, LAST)
    summary = read_summary(run / "summary.json")
    assert summary.test.checkpoint == LAST
    text = (run / "summary.md").read_text()
    measured = (
        "4 validation images",
        "the accuracy",
        "step 3 of 9",
        "by +0.0 points",
        "(standard error ",
    )
    assert not missing(text, "the last epoch: ", *measured)
    assert text.count("moving average (EMA)") == len(average)
    assert f"test --ckpt_path {run}/checkpoints/last.ckpt" in text


def test_an_image_that_one_of_the_two_passes_can_not_read_leaves_the_best_epoch(
    cli, tiny, drawn_pets, monkeypatch, tmp_path
):
    """A file that is damaged between them makes their results of different length."""
    let_first_be_best(monkeypatch)
    pets, real = shutil.copytree(drawn_pets, tmp_path / "pets"), finish._validate

    def damage(training, checkpoint):
        validated = real(training, checkpoint)
        (pets / training.data.sample_id("val", 0)).write_bytes(b"no image")
        return validated

    monkeypatch.setattr(finish, "_validate", damage)
    options = ("--data.cache_mb=0", "--data.max_bad_fraction=1", f"--runs_root={tmp_path}/runs")
    succeeded(cli("fit", pets, *tiny, *EPOCHS, *options))
    summary = read_summary(tmp_path / "runs/pets/summary.json")
    assert summary.test.checkpoint == BEST
    assert not missing(summary.test.weights, "4 and 3 validation images")


def test_the_best_epoch_is_tested_where_it_is_shown_to_be_better(choose):
    answers = [GOOD, BAD]
    run = choose(lambda *given: answers.pop(0))
    assert is_exported(run, BEST)
    assert not is_exported(run, LAST)
    text = (run / "summary.md").read_text()
    assert not missing(text, "best validation epoch: ", "4 validation images", "by +100.0 points")
    assert RoutingHistory.load(run / FILE).steps[-1] == 3  # what came after isn't shown
    assert checkpoint_of_run(run) == run / "checkpoints" / BEST


def test_test_and_validate_of_a_run_take_what_was_tested(tmp_path):
    """By summary.json, of which only the name last.ckpt counts: nothing else is opened."""
    run = tmp_path / "run"
    fixture = (
        Path(__file__).parents[1]
        / "fixtures"
        / "formats"
        / "0.1"
        / "runs"
        / "finished"
        / "summary.json"
    )
    known = json.loads(fixture.read_text())
    for name in (BEST, LAST):
        SafeCheckpointIO().save_checkpoint({"global_step": 1}, run / "checkpoints" / name)
    (tmp_path / "other.ckpt").touch()
    names = {
        None: BEST,
        BEST: BEST,
        LAST: LAST,
        "../../other.ckpt": BEST,
        str(tmp_path / "other.ckpt"): BEST,
    }
    for name, expected in names.items():
        known["test"]["checkpoint"] = name
        (run / "summary.json").write_text(json.dumps(known))
        assert checkpoint_of_run(run) == run / "checkpoints" / expected, name
    (run / "summary.json").write_text("[]")
    with pytest.raises(UserError, match=r"summary\.json.*summary of a run"):
        checkpoint_of_run(run)
    (run / "summary.json").unlink()
    assert checkpoint_of_run(run) == run / "checkpoints" / BEST


def test_the_lowest_loss_may_choose(cli, tiny, drawn_pets, tmp_path):
    """Early stopping goes by it too: it ends at the first loss that isn't the lowest so far."""
    options = (
        "--checkpoint.monitor=val/loss",
        "--trainer.max_epochs=6",
        "--early_stopping.patience=1",
    )
    succeeded(cli("fit", drawn_pets, *tiny, *options, f"--runs_root={tmp_path}"))
    run = tmp_path / "pets"
    losses = logged(run, "val/loss")
    lowest_so_far = [loss == min(losses[: place + 1]) for place, loss in enumerate(losses)]
    assert all(lowest_so_far[:-1])
    assert len(losses) == 6 or not lowest_so_far[-1]
    assert len(losses) > 2  # the highest would have ended it
    saved = torch.load(run / "checkpoints" / BEST, weights_only=True)
    state = next(
        state for name, state in saved["callbacks"].items() if name.startswith("ModelCheckpoint")
    )
    assert float(state["best_model_score"]) == pytest.approx(min(losses))


def test_a_damaged_best_is_replaced_by_the_last(tmp_path):
    files = SafeCheckpointIO()
    for name in (LAST, BEST):
        files.save_checkpoint({"global_step": 1, "weight": torch.ones(64)}, tmp_path / name)
    path, words, _ = final_checkpoint(tmp_path)
    assert path == tmp_path / BEST
    assert "best validation epoch" in words
    whole = (tmp_path / BEST).read_bytes()
    place = whole.index(torch.ones(64).numpy().tobytes())
    (tmp_path / BEST).write_bytes(whole[:place] + b"\x01" + whole[place + 1 :])
    path, words, _ = final_checkpoint(tmp_path)
    assert path == tmp_path / LAST
    assert not missing(words, "best.ckpt", "damaged")
    (tmp_path / BEST).unlink()
    path, words, _ = final_checkpoint(tmp_path)
    assert path == tmp_path / LAST
    assert "no best.ckpt" in words


def test_equal_losses_are_no_reason_for_the_best_epoch(monkeypatch, tmp_path):
    """The gain and its standard error are 0."""
    for name, step in ((BEST, 1), (LAST, 2)):
        state = {"global_step": step, "hyper_parameters": {"arch": {}}}
        SafeCheckpointIO().save_checkpoint(state, tmp_path / "checkpoints" / name)
    monkeypatch.setattr(finish, "schedule_ended", lambda trainer: True)
    monkeypatch.setattr(finish, "_validate", lambda *given: GOOD)
    settings = SimpleNamespace(checkpoint=SimpleNamespace(monitor=LOSS))
    training = SimpleNamespace(run_dir=tmp_path, trainer=None, settings=settings)
    assert choose_weights(training).checkpoint.name == LAST
