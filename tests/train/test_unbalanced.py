"""Where classes differ in size, macro recall chooses best.ckpt, stops early and heads the result; also under resume."""

from pathlib import Path

import pytest
import torch
import yaml

from moevision.train import fit as training
from moevision.train.report import read_summary
from moevision.train.task import MacroRecall
from moevision.words import percent
from tests.shared import succeeded
from tests.train.quiet import logged

BALANCED = "val/balanced_acc"
# A learning rate of next to nothing: no epoch is better than the first.
STOPS = ("--trainer.max_epochs=4", "--model.optim.lr=1e-30", "--early_stopping.patience=1")


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
    outcome = succeeded(cli("fit", two_to_one, *tiny, *STOPS, f"--runs_root={tmp_path}"))
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
        cli("fit", two_to_one, *tiny, *STOPS, asked, "val/top1", f"--runs_root={tmp_path}")
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
    refused = cli(
        "fit",
        "--resume",
        run,
        f"--checkpoint.monitor={'val/top1' if first == BALANCED else BALANCED}",
    )
    assert refused.code == 2
    assert "--checkpoint.monitor" in refused.err
    succeeded(cli("fit", "--resume", run))
    assert best_of(run) == (first, pytest.approx(max(logged(run, first))))
    assert read_summary(run / "summary.json").monitor == first


def test_a_class_without_images_is_left_out():
    """Labels 0 0 0 1 and no image of class 2: (2/3 + 1) / 2, although one image is taken for class 2."""
    metric = MacroRecall(3, average="macro")
    metric.update(torch.tensor([0, 0, 2]), torch.tensor([0, 0, 0]))
    metric.update(torch.tensor([1]), torch.tensor([1]))
    assert float(metric.compute()) == pytest.approx((2 / 3 + 1) / 2)
