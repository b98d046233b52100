"""What is to be recognised in an image: its one class, or any of several labels; all that differs stands here.

The task chooses by its data. With several labels each has a sigmoid and a binary cross-entropy of its own, and an image
counts as right if it gets its labels and no other (exact match, or subset accuracy). During a training a label is given
above a probability of 0.5, as the names of these metrics say; a finished run has a threshold for each label.

Axes: B images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    BinaryCalibrationError,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCalibrationError,
    MulticlassF1Score,
    MulticlassPrecision,
    MultilabelAUROC,
    MultilabelAveragePrecision,
    MultilabelExactMatch,
    MultilabelF1Score,
)

from moevision.types import Keywords


class OneClass:
    """Targets are classes [B]: softmax and cross-entropy."""

    shown = ("top1", "balanced_acc")  # the metrics of a line about a validation, the main one first

    def loss(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, smoothing: float
    ) -> Tensor:
        """A scalar, from logits [B, C] and target [B] or soft [B, C]; `weight` is [C]."""
        if weight is None:
            return F.cross_entropy(logits, target, label_smoothing=smoothing)
        # Over the number of images, not over the sum of their weights (torch's mean): that differs from one micro-batch
        # or process to the next, and a step would depend on how its images are divided.
        losses = F.cross_entropy(
            logits, target, weight, label_smoothing=smoothing, reduction="none"
        )  # [B]
        return losses.mean()

    def losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """[B], without weights and smoothing."""
        return F.cross_entropy(logits, target, reduction="none")

    def shares(self, target: Tensor, num_classes: int) -> Tensor:
        """[B, C], whose rows sum to 1, of targets [B] or soft [B, C]."""
        if target.ndim == 2:
            return target
        return F.one_hot(target, num_classes)

    def probabilities(self, logits: Tensor) -> Tensor:
        """[B, C] of logits [B, C]."""
        return logits.softmax(-1)

    def answers(self, probabilities: Tensor, thresholds: Sequence[float] = ()) -> Tensor:
        """[B] the likeliest class."""
        return probabilities.argmax(-1)

    def are_right(self, answers: Tensor, target: Tensor) -> Tensor:
        """[B] bool."""
        return answers == target

    def metrics(self, num_classes: int) -> MetricCollection:
        """Of a validation or test, by probabilities [B, C] and targets."""
        metrics: Keywords = {
            "top1": MulticlassAccuracy(num_classes, average="micro"),
            "balanced_acc": MacroRecall(num_classes, average="macro"),
            "ece": MulticlassCalibrationError(num_classes, n_bins=15),
        }
        if num_classes > 5:  # with fewer, everything is among the five likeliest
            metrics["top5"] = MulticlassAccuracy(num_classes, average="micro", top_k=5)
        return MetricCollection(metrics, compute_groups=False)

    def class_metrics(self, num_classes: int) -> MetricCollection:
        """Of a test, [C] each."""
        return MetricCollection(
            {
                "precision": MulticlassPrecision(num_classes, average="none"),
                "f1": MulticlassF1Score(num_classes, average="none"),
                "auroc": MulticlassAUROC(num_classes, average="none"),
            }
        )


class SeveralLabels(OneClass):
    """Targets are multi-hot [B, C]: a sigmoid and binary cross-entropy for each label."""

    shown = ("map", "f1_micro_at_half")

    def loss(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, smoothing: float
    ) -> Tensor:
        """A scalar; `weight` [C] is that of images with a label beside those without, smoothing is towards 1/2."""
        target = target.float() + smoothing * (0.5 - target.float())
        return F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)

    def losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """[B], means over the labels."""
        losses = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
        return losses.mean(-1)

    def shares(self, target: Tensor, num_classes: int) -> Tensor:
        """[B, C]: the labels of an image have equal shares."""
        return target / target.sum(-1, keepdim=True)

    def probabilities(self, logits: Tensor) -> Tensor:
        """[B, C] of logits [B, C]."""
        return logits.sigmoid()

    def answers(self, probabilities: Tensor, thresholds: Sequence[float] = ()) -> Tensor:
        """[B, C] bool: the labels whose probability is above their threshold."""
        return probabilities > torch.tensor(thresholds or [0.5], device=probabilities.device)

    def are_right(self, answers: Tensor, target: Tensor) -> Tensor:
        """[B] bool: whether an image gets all its labels and no other."""
        return (answers == (target > 0.5)).all(-1)

    def metrics(self, num_classes: int) -> MetricCollection:
        """Of a validation or test, by probabilities [B, C] and targets [B, C]."""
        metrics: Keywords = {
            "map": MultilabelAveragePrecision(num_classes, average="macro"),
            "f1_micro_at_half": MultilabelF1Score(num_classes, average="micro"),
            "f1_macro_at_half": MultilabelF1Score(num_classes, average="macro"),
            "exact_at_half": MultilabelExactMatch(num_classes),
            "ece": BinaryCalibrationError(n_bins=15),  # over all pairs of image and label
        }
        return MetricCollection(metrics, compute_groups=False)

    def class_metrics(self, num_classes: int) -> MetricCollection:
        """Of a test, [C] each: what no threshold changes."""
        return MetricCollection(
            {
                "auroc": MultilabelAUROC(num_classes, average="none"),
                "ap": MultilabelAveragePrecision(num_classes, average="none"),
            }
        )


class MacroRecall(MulticlassAccuracy):
    """The mean of the recalls of those classes that have images.

    torchmetrics also counts a class without images as 0 as soon as one image is taken for it. A small class may have
    none among the validation images.
    """

    def compute(self) -> Tensor:
        """A scalar in [0, 1]."""
        true_positives, _, _, false_negatives = self._final_state()  # [C] each
        images = true_positives + false_negatives
        recall = true_positives / images.clamp_min(1)
        has_images = images > 0
        return (recall * (has_images / has_images.sum())).sum()
