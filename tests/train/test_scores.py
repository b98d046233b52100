"""Scores of the training images: the papers' formulas, what counts as a visit, and that training doesn't notice.

Run as a script (`python test_scores.py FOLDER`, with torch's MASTER_ADDR and MASTER_PORT) it trains in two processes,
which write `FOLDER/RANK.pt`.
"""

import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from moevision.data import ImageDataModule, module
from moevision.data.scores import FILE, SCORES, Scores
from moevision.errors import UserError
from moevision.models.config import MoEConfig
from moevision.train.guard import GuardConfig, StabilityGuard
from moevision.train.optim import OptimizerConfig
from moevision.train.scores import ExampleScores, visit_measures
from moevision.train.task import ClassificationTask
from tests.forks import run_script
from tests.shared import missing
from tests.train.faults import FaultInjector
from tests.train.quiet import quiet_trainer

IMAGES, BATCH = 24, 8


class Visit(NamedTuple):
    """An image in an applied update: logits, label, and the experts chosen by its tokens in each layer (maybe none)."""

    image: int
    logits: list[float]
    label: int
    experts: dict[int, list[int]]


class Witness(L.Callback):
    """Writes down what the task hands over, batch by batch, in plain numbers."""

    def __init__(self) -> None:
        self.batches: list[list[Visit]] = []
        self.applied: list[bool] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        told = pl_module.observer

        def observer(batch: dict[str, Tensor], logits: Tensor, routings: Sequence[Any]) -> None:
            assert not logits.requires_grad
            chosen = [
                {r.layer: r.expert_index[image][r.kept[image]].tolist() for r in routings}
                for image in range(len(logits))
            ]
            parts = (batch["index"].tolist(), logits.tolist(), batch["label"].tolist(), chosen)
            self.batches.append([Visit(*each) for each in zip(*parts, strict=True)])
            if told is not None:
                told(batch, logits, routings)

        pl_module.observer = observer

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.applied.append(pl_module.update_applied)


class Fit:
    """A finished training of a tiny MoE on drawn pets; its scores, and what a witness saw."""

    def __init__(
        self,
        folder: Path,
        *,
        faults: str = "",
        guard: GuardConfig = GuardConfig(snapshot_every=4),  # noqa: B008
        callbacks: Sequence[L.Callback] = (),
        resume: Path | None = None,
        data: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        L.seed_everything(0, verbose=False)
        sizes = {
            "image_size": 32,
            "batch_size": BATCH,
            "train_size": IMAGES,
            "val_size": 8,
            "test_size": 8,
        }
        self.data = ImageDataModule("synthetic_pets", **(sizes | (data or {})))
        arch = {
            "name": "test_vit_moe",
            "stem": "patch",
            "proj_drop_rate": 0.1,
            "drop_path_rate": 0.1,
        }
        self.task = ClassificationTask(MoEConfig(**arch), OptimizerConfig(lr=1e-2))
        self.scores, self.witness = ExampleScores(), Witness()
        watching = [FaultInjector(faults), self.scores, StabilityGuard(guard), self.witness]
        defaults = {
            "precision": "32-true",
            "max_epochs": 4,
            "limit_val_batches": 0,
            "gradient_clip_val": 1.0,
            "default_root_dir": folder,
        }
        self.trainer = quiet_trainer(**(defaults | options), callbacks=[*watching, *callbacks])
        self.trainer.fit(self.task, self.data, ckpt_path=resume, weights_only=True)
        self.random = torch.get_rng_state()

    @property
    def table(self) -> Scores:
        return self.scores.table(self.data)


def transcribed(visits: Sequence[Visit], routed: Sequence[Visit]) -> dict[str, float | list[float]]:
    """Scores of one image by its visits, written from the papers in plain Python, in double precision."""
    margins, errors, losses, likely, right = [], [], [], [], []
    for _, logits, label, _ in visits:
        total = sum(math.exp(z) for z in logits)
        p = [math.exp(z) / total for z in logits]
        # arXiv:2001.10528, §3: "assigned logit minus largest other logit".
        margins.append(logits[label] - max(z for c, z in enumerate(logits) if c != label))
        # arXiv:2107.07075, §2: ‖p(w, x) - y‖₂, y one-hot.
        errors.append(math.sqrt(sum((q - (c == label)) ** 2 for c, q in enumerate(p))))
        losses.append(-math.log(p[label]))
        likely.append(p[label])
        right.append(p.index(max(p)) == label)
    # arXiv:1812.05159, algorithm 1: prev_acc = 0; T += prev_acc > acc.
    forgotten, earlier = 0, False
    for now in right:
        forgotten += earlier > now
        earlier = now
    count, mean = len(visits), sum(likely) / len(visits)
    found: dict[str, float | list[float]] = {
        "aum": sum(margins) / count,
        "el2n": sum(errors) / count,
        "loss_mean": sum(losses) / count,
        "loss_last": losses[-1],
        "p_mean": mean,
        "p_std": math.sqrt(sum((q - mean) ** 2 for q in likely) / count),
        "forgetting": forgotten / count,
        "correct": sum(right) / count,
    }
    for block, experts in ((1, 4), (3, 4)):
        shares = []
        for visit in routed:
            counts = Counter(visit.experts[block])
            shares.append([counts[expert] / len(visit.experts[block]) for expert in range(experts)])
        found[f"L{block}"] = [sum(each) / len(routed) for each in zip(*shares, strict=True)]
    return found


def assert_transcribed(table: Scores, batches: Sequence[Sequence[Visit]], routed_from: int) -> None:
    """The table is that of these batches, those from `routed_from` on with experts."""
    for image in range(len(table.images)):
        visits = [visit for batch in batches for visit in batch if visit.image == image]
        routed = [
            visit for batch in batches[routed_from:] for visit in batch if visit.image == image
        ]
        assert table.visits[image] == len(visits)
        if not visits:
            assert all(np.isnan(table.scores[name][image]) for name in SCORES)
            continue
        expected = transcribed(visits, routed)
        for name in SCORES:
            assert table.scores[name][image] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), (
                name
            )
        for block, shares in table.experts.items():
            if routed:
                np.testing.assert_allclose(
                    shares[image], cast(list[float], expected[f"L{block}"]), atol=1e-3
                )
            else:
                assert np.isnan(shares[image]).all()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """24 images in 3 steps an epoch, 4 epochs."""
    return Fit(tmp_path_factory.mktemp("whole"))


def test_a_visit_by_hand():
    """Logits ln 4, ln 2, ln 1, ln 1: p = 1/2, 1/4, 1/8, 1/8; the label is the second class. In bfloat16, too."""
    logits, expected = (
        torch.tensor([[4.0, 2.0, 1.0, 1.0]]).log(),
        [-math.log(2), 0.9185, math.log(4), 0.25, 0],
    )
    assert expected[1] == pytest.approx(math.sqrt(9 / 16 + 1 / 4 + 2 / 64), abs=1e-4)
    assert visit_measures(logits, torch.tensor([1]))[0].tolist() == pytest.approx(
        expected, rel=1e-4
    )
    half = visit_measures(logits.bfloat16(), torch.tensor([1]))  # computed in fp32 all the same
    assert half.dtype is torch.float32
    assert half[0, 3].item() == pytest.approx(0.25, rel=0.01)


def test_scores_are_those_of_the_papers(whole):
    """Over 12 steps; the experts over the last third, from step 8 on: every image once, and a third of them twice."""
    assert len(whole.witness.batches) == 12
    assert all(whole.witness.applied)
    assert_transcribed(whole.table, whole.witness.batches, 8)
    assert whole.table.scores["forgetting"].max() > 0, "or forgetting was not tested"
    file = Scores.read(Path(whole.trainer.default_root_dir) / FILE)
    assert file.images == [whole.data.sample_id("train", image) for image in range(IMAGES)]
    np.testing.assert_allclose(file.scores["aum"], whole.table.scores["aum"], rtol=1e-4)


def test_training_is_the_same_without_scores(whole, tmp_path):
    """Weights, moments and the random generator, bit for bit."""
    other = Fit(tmp_path, data={"scores": False})
    assert (other.scores.sums, (tmp_path / FILE).exists()) == (None, False)
    assert torch.equal(whole.random, other.random)
    for name, tensor in other.task.net.state_dict().items():
        assert torch.equal(whole.task.net.state_dict()[name], tensor), name
    moments = [fit.trainer.optimizers[0].state.values() for fit in (whole, other)]
    assert moments[0]
    for mine, theirs in zip(*moments, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in ("exp_avg", "exp_avg_sq"))


def test_a_refused_window_counts_as_a_whole(tmp_path):
    """Two micro-batches in each of 6 updates; batch 4 of 12 (from 1) is not finite, so 3 and 4 are no visits."""
    fit = Fit(
        tmp_path,
        faults="nan_loss@4",
        accumulate_grad_batches=2,
        max_epochs=3,
        data={"train_size": 32},
    )
    windows = [fit.witness.batches[first : first + 2] for first in range(0, 12, 2)]
    applied = fit.witness.applied[1::2]
    assert applied.count(False) == 1
    left = [
        batch for window, good in zip(windows, applied, strict=True) if good for batch in window
    ]
    assert fit.table.visits.sum() == 10 * BATCH
    # Experts count in the last two of six updates: from the ninth batch on, of which two are missing.
    assert_transcribed(fit.table, left, 6)


def test_a_return_of_the_guard_takes_scores_back(tmp_path):
    """Batch 7 (from 1) computes NaN: back to the snapshot after four updates; 5 and 6 are taken back, 7 is left out."""
    fit = Fit(tmp_path, faults="nan_weight@7")
    left = [*fit.witness.batches[:4], *fit.witness.batches[7:]]
    assert fit.table.visits.sum() == 9 * BATCH
    assert_transcribed(fit.table, left, 5)  # step 8 is the fifth that is left


def test_a_return_while_saving_is_in_the_checkpoint(tmp_path):
    """After six updates a weight turns bad and a checkpoint is asked for: it holds the state after four."""

    class Poison(L.Callback):
        def on_train_batch_start(
            self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 6:
                with torch.no_grad():
                    pl_module.net.head.weight[0] = torch.nan
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    fit = Fit(tmp_path, callbacks=[Poison()])
    state = torch.load(tmp_path / "saved.ckpt", weights_only=True)["callbacks"]["ExampleScores"]
    assert fit.table.visits.sum() == (4 + 6) * BATCH
    assert fit.scores.sums.load_state_dict(state)
    assert fit.table.visits.sum() == 4 * BATCH


def test_mixed_images_have_no_scores(tmp_path, capsys):
    fit = Fit(tmp_path, max_epochs=1, data={"mixup": 0.4})
    assert fit.scores.sums is None
    assert not (tmp_path / FILE).exists()
    assert not missing(capsys.readouterr().err, "no scores", "Mixup and CutMix")
    with pytest.raises(UserError, match=r"--data\.scores"):
        ImageDataModule("synthetic_pets", cutmix=1.0, scores=True)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_scores_of_half_a_training_are_none(tmp_path, capsys):
    """A checkpoint without scores, as of an earlier version, is gone on with without them."""
    file = tmp_path / "saved.ckpt"

    class Save(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(file)

    Fit(tmp_path, max_epochs=2, data={"scores": False}, callbacks=[Save()])
    fit = Fit(tmp_path, max_epochs=2, resume=file)
    assert fit.trainer.global_step == 6
    assert (fit.scores.sums, (tmp_path / FILE).exists()) == (None, False)
    assert not missing(capsys.readouterr().err, "no scores", "checkpoint has none")


def test_many_images_are_scored_if_asked_for(monkeypatch):
    """Many are 200,000, or here 20."""
    assert module._MAX_SCORED == 200_000
    monkeypatch.setattr(module, "_MAX_SCORED", 20)
    few, many = ({"train_size": size} for size in (19, 20))
    for options, keeps in (
        (few, True),
        (many, False),
        ({**many, "scores": True}, True),
        ({**few, "scores": False}, False),
        ({**few, "cutmix": 1.0}, False),
    ):
        data = ImageDataModule("synthetic_pets", val_size=1, test_size=1, **cast(Any, options))
        data.setup("fit")
        assert data.keeps_scores is keeps, options


@pytest.mark.deep
def test_two_processes_have_the_scores_of_all(tmp_path):
    """25 images over two processes, 4 x 3 each an epoch: one is left out, another one each epoch."""
    run_script(__file__, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert torch.equal(first["rows"], second["rows"])
    together = [
        [Visit(*visit) for visit in (*one, *other)]
        for one, other in zip(first["batches"], second["batches"], strict=True)
    ]
    table = Scores.read(tmp_path / FILE)
    assert table.visits.sum() == 3 * 24
    assert_transcribed(table, together, 6)


def one_of_two(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    warnings.simplefilter("ignore")  # Lightning's advice
    torch.set_num_threads(1)
    fit = Fit(
        folder,
        max_epochs=3,
        devices=2,
        strategy="ddp",
        accelerator="cpu",
        use_distributed_sampler=False,
        data={"train_size": 25, "batch_size": 4},
    )
    torch.save(
        {
            "rows": fit.scores.sums.state_dict()["rows"],
            "batches": [list(map(tuple, b)) for b in fit.witness.batches],
        },
        folder / f"{rank}.pt",
    )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":  # forks, so that torch and Lightning are imported once for both
    torch.multiprocessing.start_processes(
        one_of_two, (Path(sys.argv[1]),), nprocs=2, start_method="fork"
    )
