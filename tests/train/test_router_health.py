"""What is logged about updates and loads, and when a collapse of experts is said."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from moevision.layers import moe_layers
from moevision.train.health import RouterHealth
from moevision.train.optim import freeze_parameters
from tests.train.guarded import BIASED, NOISY, Run, batches, tiny_task


class Seen(L.Callback):
    """Weights and counts around every update."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.loads: list[list[Tensor]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._keep(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._keep(pl_module)
        self.loads.append([count.clone() for count in pl_module.balance.counts])

    def _keep(self, pl_module: L.LightningModule) -> None:
        self.weights.append(
            torch.cat([p.detach().double().flatten() for p in pl_module.parameters()])
        )


def test_the_logged_numbers_by_hand(tmp_path):
    """‖w₃ - w₂‖, its share of ‖w₂‖, and max / mean - 1 of the counts of the third update."""
    seen = Seen()
    run = Run(tmp_path, batches(3), callbacks=(seen, RouterHealth()), log_every_n_steps=3)
    logged = {name: float(value) for name, value in run.trainer.callback_metrics.items()}
    update = float((seen.weights[3] - seen.weights[2]).norm())
    assert logged["train/update_norm"] == pytest.approx(update, rel=1e-4)
    assert logged["train/update_ratio"] == pytest.approx(
        update / float(seen.weights[2].norm()), rel=1e-4
    )
    for block, load in zip((1, 3), seen.loads[2], strict=True):
        assert logged[f"moe/{block}/max_violation"] == pytest.approx(
            float(load.max() / load.double().mean() - 1)
        )


def test_nothing_is_logged_every_0_steps(tmp_path):
    """As in Lightning, 0 means never; the guard of this training would log too."""
    run = Run(tmp_path, batches(1), callbacks=(RouterHealth(),), log_every_n_steps=0)
    assert run.trainer.global_step == 1
    assert not [
        name for name in run.trainer.callback_metrics if "update" in name or "guard" in name
    ]


@pytest.mark.parametrize(
    ("router", "freeze", "advice"),
    [
        (NOISY, None, "--model.aux.importance or --model.aux.load"),
        (BIASED, None, "--model.arch.bias_rate"),
        (NOISY, "all_but_head", ""),
    ],
)
def test_a_collapse_is_said_with_advice(router, freeze, advice, monkeypatch, capsys):
    """Of loads 50, 52, 0, 2 the last two lie below a tenth of the mean, 26; it is said once for the layer.

    No advice balances a router that keeps its weights.
    """
    task = tiny_task(**router)
    freeze_parameters(task.net, freeze)
    monkeypatch.setattr("moevision.train.health._PATIENCE", 2)
    task.trainer = L.Trainer(
        logger=False, enable_checkpointing=False, accelerator="cpu", log_every_n_steps=10**6
    )
    task.update_applied = True
    task.balance.counts = [torch.tensor([25, 26, 0, 1]), torch.tensor([13, 13, 13, 13])]
    assert len(moe_layers(task.net)) == 2
    health = RouterHealth()
    monkeypatch.setattr(task, "log", lambda *_: None)
    for _ in range(4):
        health.on_train_batch_end(task.trainer, task, None, None, 0)
    said = capsys.readouterr().err
    if freeze is not None:
        assert said == ""
        return
    assert said.count("collapse in block 1: 2 of 4 experts (2, 3)") == 1
    assert "block 3" not in said
    assert advice in said
