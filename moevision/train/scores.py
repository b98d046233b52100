"""Scores of the training images from the forward passes of the training itself; what they are, says `data.scores`.

The task hands over the logits and routings of each micro-batch. They count when the update of their window is applied;
where the stability guard takes updates back, it takes their scores back too. Under Mixup and CutMix no output belongs
to one image: no scores are kept (`ImageDataModule.keeps_scores`).

Axes: B images, C classes, E experts, H = sum of E over the MoE layers.
"""

# ruff: noqa: D102 (Lightning's hooks, whose `task` is the `ClassificationTask`)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from moevision.data import ImageDataModule
from moevision.data.scores import FILE, MEASURES, Scores, ScoreSums, keys_of
from moevision.layers import Routing, moe_layers
from moevision.train.processes import data_of, gather_objects, is_trial, print_rank0
from moevision.train.task import Batch
from moevision.types import State


class ExampleScores(Callback):
    """Keeps scores of the images of an `ImageDataModule` and writes `scores.csv` when training ends.

    In the list of callbacks it comes before the `StabilityGuard`, whose snapshots hold the rows. Every process has all
    rows, so that the checkpoint of the first one is complete. `sums` are None where no scores are kept.
    """

    def __init__(self) -> None:
        self.sums: ScoreSums | None = None
        # By the checkpoint that is resumed; {}: it has no scores.
        self._saved: Mapping[str, Any] | None = None
        # Indices [B] and measures [B, 5 or 5 + H] of each micro-batch.
        self._window: list[tuple[Tensor, Tensor]] = []
        self._routed_from = float("inf")  # the step at which counting of experts begins

    def on_load_checkpoint(self, trainer: Trainer, task: Any, checkpoint: State) -> None:
        if trainer.state.fn is TrainerFn.FITTING:
            self._saved = checkpoint["callbacks"].get(self.state_key, {})

    def on_fit_start(self, trainer: Trainer, task: Any) -> None:
        data = data_of(trainer)
        saved, self._saved = self._saved, None
        self.sums = None
        if not data.keeps_scores:
            if data.multilabel:
                print_rank0("note: no scores of the training images: they have several labels.")
            elif data.mixes and data.scores is None:
                print_rank0(
                    "note: no scores of the training images: under Mixup and CutMix no output belongs to one image."
                )
            return
        images = range(len(data.contents.datasets["train"]))
        keys = keys_of(data.sample_id("train", image) for image in images)
        layers = moe_layers(task.net)
        experts = {cast(int, layer.layer_index): layer.router.num_experts for layer in layers}
        sums = ScoreSums(keys, experts)
        is_resumed = saved is not None
        if is_resumed and not (saved and sums.load_state_dict(saved)):
            print_rank0(
                "note: no scores of the training images: the checkpoint has none, and those of the rest mislead."
            )
            return
        self.sums = sums
        task.observer = partial(self._observe, trainer)

    def teardown(self, trainer: Trainer, task: Any, stage: str) -> None:
        if stage == "fit":
            task.observer = None

    def on_train_start(self, trainer: Trainer, task: Any) -> None:
        # Experts hardly change in the last third; a training without an end has none.
        steps = trainer.estimated_stepping_batches if self.sums is not None else float("inf")
        self._routed_from = steps
        if isfinite(steps):
            self._routed_from = steps - steps // 3

    def on_train_batch_start(self, trainer: Trainer, task: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._window = []

    @torch.no_grad()
    def _observe(
        self, trainer: Trainer, batch: Batch, logits: Tensor, routings: Sequence[Routing]
    ) -> None:
        measures = [visit_measures(logits, batch["label"])]
        if trainer.global_step >= self._routed_from:
            measures += [visit_shares(routing) for routing in routings]
        self._window.append((batch["index"], torch.cat(measures, 1)))

    def on_train_batch_end(self, trainer: Trainer, task: Any, *_: Any) -> None:
        if self.sums is None or not task.update_applied:
            return
        for visits in self._window:
            processes = gather_objects([part.cpu() for part in visits])
            indices = torch.cat([index for index, _ in processes])
            values = torch.cat([values for _, values in processes])
            measures, shares = values.tensor_split([len(MEASURES)], dim=1)
            has_shares = shares.shape[1] > 0
            self.sums.add(indices.numpy(), measures.numpy(), shares.numpy() if has_shares else None)
        self._window = []

    def on_fit_end(self, trainer: Trainer, task: Any) -> None:
        """Write the table, after the guard's last check."""
        if self.sums is not None and trainer.is_global_zero and not is_trial(trainer):
            table = self.table(data_of(trainer))
            table.write(Path(trainer.default_root_dir) / FILE)

    def table(self, data: ImageDataModule) -> Scores:
        """The scores so far."""
        samples = data.contents.datasets["train"].samples
        labels = [data.class_names[sample.label] for sample in samples]
        return cast(ScoreSums, self.sums).table([sample.sample_id for sample in samples], labels)

    def state_dict(self) -> State:
        """The rows; a rollback of the guard changes them in place while a checkpoint is being made."""
        return {} if self.sums is None else self.sums.state_dict()


def visit_measures(logits: Tensor, label: Tensor) -> Tensor:
    """[B, 5] float32: `MEASURES` of one visit, of each image with logits [B, C] and its label [B]."""
    logits, label = logits.float(), label.unsqueeze(1)  # [B, C], [B, 1]
    own_logit = logits.gather(1, label)
    best_other = logits.scatter(1, label, -torch.inf).amax(1, keepdim=True)
    margin = own_logit - best_other

    log_p = logits.log_softmax(1)
    loss = -log_p.gather(1, label)
    error = log_p.exp().scatter_add(1, label, -torch.ones_like(loss))  # p - onehot(y)
    error_norm = error.norm(dim=1, keepdim=True)
    correct = (logits.argmax(1, keepdim=True) == label).float()
    return torch.cat([margin, error_norm, loss, (-loss).exp(), correct], 1)


def visit_shares(routing: Routing) -> Tensor:
    """[B, E] float32: share of each image's choices that each expert computes; with slots, of its tokens' weights."""
    amounts = routing.image_counts()
    if routing.kind == "soft":
        # All slots are always computed; images differ in how much of each their tokens take.
        amounts = routing.expert_weights().sum(1)
    amounts = amounts.float()
    total = amounts.sum(1, keepdim=True)
    return amounts / total.clamp_min(torch.finfo(torch.float32).tiny)  # 0 where all were dropped
