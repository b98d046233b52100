"""Two numbers that say early that a sparse training goes wrong, and advice when experts collapse.

- update norm: ‖Δw‖ of one applied update over all weights that learn, and its ratio to ‖w‖. It jumps before the loss
  does.
- max violation: `max load / mean load - 1` of the experts of one layer in one update (MaxVio, Wang et al. 2024,
  arXiv:2408.15664, §2.2); 0 is perfect balance, E/K - 1 is all tokens on K experts.

Axes: E experts.
"""

from __future__ import annotations

from typing import Any, cast

import lightning as L
import torch
from torch import Tensor

from moevision.layers import MoEMlp, moe_layers
from moevision.train.processes import sum_over_processes, tell
from moevision.train.task import ClassificationTask

_PATIENCE = 100  # updates that are summed before a layer is judged
_STARVED = 0.1  # of the mean load: an expert below it hardly learns


class RouterHealth(L.Callback):
    """Logs `train/update_norm`, `train/update_ratio`, `moe/<layer>/max_violation`; warns of collapse once per layer."""

    def __init__(self) -> None:
        self._before: list[Tensor] = []
        self._loads: list[Tensor] = []
        self._updates = 0
        self._warned: set[int | None] = set()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the weights of a step that will be logged."""
        if (trainer.global_step + 1) % cast(Any, trainer).log_every_n_steps == 0:
            self._before = [parameter.detach().clone() for parameter in _learning(pl_module)]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, and judge the loads of the last updates."""
        task = cast(ClassificationTask, pl_module)
        before, self._before = self._before, []
        if not task.update_applied:
            return
        if before:
            self._log_update(task, before)
        layers = moe_layers(task.net)
        counts = [count.detach() for count in task.window_counts]
        self._loads = [sum_ + count for sum_, count in zip(self._loads, counts, strict=True)] if self._loads else counts
        if trainer.global_step % cast(Any, trainer).log_every_n_steps == 0:
            for layer, count in zip(layers, counts, strict=True):
                load = sum_over_processes(count.clone()).double()
                task.log(f"moe/{layer.layer_index}/max_violation", (load.max() / load.mean() - 1).float())
        self._updates += 1
        if self._updates % _PATIENCE == 0:
            for layer, count in zip(layers, self._loads, strict=True):
                self._judge(task, layer, sum_over_processes(count.clone()).double())
            self._loads = []

    @torch.no_grad()
    def _log_update(self, task: ClassificationTask, before: list[Tensor]) -> None:
        after = _learning(task)
        update = torch.nn.utils.get_total_norm(torch._foreach_sub([p.detach() for p in after], before))
        task.log("train/update_norm", update)
        task.log("train/update_ratio", update / torch.nn.utils.get_total_norm(before))

    def _judge(self, task: ClassificationTask, layer: MoEMlp, load: Tensor) -> None:
        advice = _advice(layer)
        starved = (load < _STARVED * load.mean()).nonzero().flatten().tolist()
        if advice is None or not starved or layer.layer_index in self._warned:
            return
        self._warned.add(layer.layer_index)
        if task.trainer.is_global_zero:
            tell(
                f"warning: experts collapse in block {layer.layer_index}: {len(starved)} of {len(load)} experts "
                f"({', '.join(map(str, starved))}) got less than a tenth of the mean load in the last {_PATIENCE} "
                f"updates, so they hardly learn. {advice}"
            )


def _advice(layer: MoEMlp) -> str | None:
    """What balances this kind of router; None where balance is by construction or by hand."""
    if getattr(layer.router, "bias_rate", None) is not None:
        return "Give the bias a larger --model.arch.bias_rate."
    if not layer.router.losses - {"z"}:
        return None
    names = " or ".join(f"--model.aux.{name}" for name in sorted(layer.router.losses - {"z"}))
    return f"Give {names} more weight, lower --model.optim.lr, or use --model.arch.router bias_balanced."


def _learning(module: L.LightningModule) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
