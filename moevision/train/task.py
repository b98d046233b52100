"""The training task: cross-entropy plus losses of the routers on a model that `MoEConfig` describes.

`loss = cross-entropy + Σ_j w_j · mean over MoE layers of router loss j`. The model is built when the number of
classes is known (from the data module, or given); everything needed to build it again is plain data in `hparams`,
or lies beside the checkpoint (`keep_start`), so a checkpoint needs nothing else and loads under `weights_only=True`.

Axes: B images, C classes, E experts.
"""

# ruff: noqa: D102 (Lightning's hooks)

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
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

from moevision.config import AuxLossWeights, Model, MoEConfig, OptimizerConfig
from moevision.errors import ABOVE_0, AT_LEAST_0, AT_LEAST_1, SHARE, UserError, check_ranges
from moevision.layers import LayerLoad, Routing, forward_routing, moe_layers
from moevision.losses import Balance, RoutingStatistics
from moevision.models.config import build_model
from moevision.models.convert import set_members, with_mirror
from moevision.models.vit_moe import (
    checkpoint_blocks,
    num_patches,
    set_fused_attention,
    trains_unfused,
)
from moevision.stats import Calibration
from moevision.train.checkpoint import plain
from moevision.train.optim import LOCAL, build_optimizer, freeze_parameters, hold_frozen_statistics
from moevision.train.processes import mean_over_processes, print_rank0
from moevision.types import Keywords, State

Batch = dict[str, Tensor]
UpdateGate = Callable[[Tensor], bool]
"""Whether the update of this step is refused, by the norm of its gradients; called once per optimizer step."""
Observer = Callable[[Batch, Tensor, Sequence[Routing]], None]
"""Called with every training batch: the batch, its logits [B, C] and what each MoE layer decided, detached."""


# ---- what is to be recognised in an image: its one class, or any of several labels. All that differs stands here.


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
    """Targets are multi-hot [B, C]: a sigmoid and binary cross-entropy for each label.

    An image counts as right if it gets its labels and no other (exact match, or subset accuracy). During a training a
    label is given above a probability of 0.5, as the names of these metrics say; a finished run has thresholds.
    """

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


# ---- the task


def check_trainer(trainer: Trainer) -> None:
    """Refuse options of the Trainer that mean nothing for this task."""
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise UserError(
            "The learning rate falls until training ends: give --trainer.max_epochs or --trainer.max_steps; "
            "--trainer.max_time may stop it before, to be resumed."
        )
    for name in ("max_epochs", "max_steps", "limit_train_batches", "limit_test_batches"):
        if getattr(trainer, name) == 0:
            raise UserError(
                f"--trainer.{name} 0 leaves nothing to train on or to test: use 1 or more."
            )
    ranges = (
        (*AT_LEAST_1, ("accumulate_grad_batches", "check_val_every_n_epoch")),
        (*AT_LEAST_0, ("gradient_clip_val",)),
        (*ABOVE_0, ("val_check_interval",)),
    )
    check_ranges(trainer, ranges, "--trainer.")


class ClassificationTask(LightningModule):
    """Train and evaluate an image classifier with MoE layers.

    Args are those of `moevision.config.Model`, which says what they are.
    """

    net: nn.Module
    balance: Balance

    def __init__(
        self,
        arch: MoEConfig = MoEConfig(),  # noqa: B008 (never changed)
        optim: OptimizerConfig = OptimizerConfig(),  # noqa: B008
        aux: AuxLossWeights = AuxLossWeights(),  # noqa: B008
        label_smoothing: float = 0.1,
        compile: bool = False,
        grad_checkpointing: bool | list[int] = False,
        num_classes: int | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        # Typed as what the command line accepts, so that a mistyped key is refused; a checkpoint hands back dicts.
        self.arch = arch if isinstance(arch, MoEConfig) else MoEConfig.from_checkpoint(arch)
        self.optim = optim if isinstance(optim, OptimizerConfig) else OptimizerConfig(**optim)
        self.aux_weights = aux if isinstance(aux, AuxLossWeights) else AuxLossWeights(**aux)
        self.label_smoothing = label_smoothing
        self.compile_blocks = compile
        self.grad_checkpointing = grad_checkpointing
        check_ranges(self, [(*SHARE, ("label_smoothing",))], "--model.")
        hyperparameters = Model(
            arch=self.arch,
            optim=self.optim,
            aux=self.aux_weights,
            label_smoothing=label_smoothing,
            compile=compile,
            grad_checkpointing=grad_checkpointing,
            num_classes=num_classes,
            image_size=image_size,
        )
        self.save_hyperparameters(asdict(hyperparameters), logger=False)
        self.tensors = LOCAL  # `parallel` has another one, for divided tensors
        # What the micro-batches of this optimizer step computed, by name: the stability guard judges by it.
        self.evidence: list[dict[str, Tensor]] = []
        self.update_gate: UpdateGate | None = None
        self.observer: Observer | None = None
        self.update_refused = False
        self.update_applied = False
        self.class_weight: Tensor | None = None
        self._resumed_world_size: int | None = None  # of the checkpoint that is resumed
        self.val_outputs: list[dict[str, Tensor]] = []  # of the last validation
        self.test_outputs: list[dict[str, Tensor]] = []
        self.test_loads: list[LayerLoad] = []
        self.test_by_class: dict[str, list[float]] = {}  # such as auroc: [C] each
        self.calibration: Any = None  # a `stats.Calibration`, once the temperature is fitted
        self.mirror = False  # evaluate the mean over an image and its mirror image
        self.coverage: float | None = None  # of prediction sets, if a test is to make them
        self.sets: Any = None  # a `stats.SetScores`, fitted with the temperature
        if num_classes is not None and image_size is not None:
            self.build(num_classes, image_size, load_pretrained=False)

    def build(
        self,
        num_classes: int,
        image_size: int,
        *,
        load_pretrained: bool = True,
        kept: Path | None = None,
    ) -> None:
        """Make the network and its metrics; arguments as those of `build_model`."""
        self.hparams.update(num_classes=num_classes, image_size=image_size)
        net = build_model(
            self.arch,
            num_classes,
            image_size,
            load_pretrained=load_pretrained,
            pretrained_config_dir=kept,
        )
        self.net = freeze_parameters(net, self.optim.freeze)
        checkpoint_blocks(self.net, self.grad_checkpointing)
        self.balance = Balance(self.net, self.aux_weights, num_classes)

        layers = moe_layers(self.net)
        self.routing_statistics: RoutingStatistics | None = None
        if layers:
            self.routing_statistics = RoutingStatistics(
                [cast(int, layer.layer_index) for layer in layers],
                [layer.router.num_experts for layer in layers],
            )
        self.choose_targets(multilabel=False)  # `setup` knows the data
        # By default a MeanMetric leaves NaN out, and a loss that isn't finite would pass as a good one. Under "disable"
        # torchmetrics 1.9 ignores weights, such as the size of a batch: `_evaluate` hands over the loss of every image.
        self.mean_loss = MeanMetric(nan_strategy="disable")

    def choose_targets(self, *, multilabel: bool) -> None:
        """Learn one class of an image, or several labels."""
        num_classes = self.hparams["num_classes"]
        self.targets = OneClass()
        if multilabel:
            self.targets = SeveralLabels()
        self.metrics = self.targets.metrics(num_classes)  # of a validation or test
        self.class_metrics = self.targets.class_metrics(num_classes)

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if not hasattr(self, "net"):
            if data is None:
                raise UserError(
                    "Give ClassificationTask num_classes and image_size, or train it with ImageDataModule."
                )
            self.build(data.num_classes, data.image_size, load_pretrained=stage == "fit")
        elif data is not None:
            num_classes, side = self.hparams["num_classes"], self.hparams["image_size"]
            if (data.num_classes, data.image_size) != (num_classes, side):
                raise UserError(
                    f"The model is of {num_classes} classes and images of {side} px, the data has {data.num_classes} "
                    f"and {data.image_size} px: use the data that it was trained on, with --data.image_size {side}."
                )
        if data is not None:
            self.class_weight = data.class_weight_tensor()
            self.choose_targets(multilabel=data.multilabel)
        if self.compile_blocks and stage == "fit":
            for block in cast(Any, self.net).blocks:
                block.compile()

    def on_train_start(self) -> None:
        self.choose_attention()
        planned: Any = self.trainer.estimated_stepping_batches
        for config in self.trainer.lr_scheduler_configs:
            self._check_schedule(getattr(config.scheduler, "total_steps", planned), planned)

    def _check_schedule(self, steps: int, planned: float) -> None:
        """Compare the length of the schedule, which a checkpoint restores, with that of this training."""
        if planned <= steps <= max(2, planned):
            return
        cause = (
            "the training images (or, from Python, the epochs) are others than then. "
            "Put them back as they were"
        )
        before, now = self._resumed_world_size, self.trainer.world_size
        if before not in (None, now):
            cause = (
                f"it began with {before} processes and goes on with {now}. Go on with a number of processes that "
                "divides the one before"
            )
        lengths = f"checkpoint's learning rate ends after {steps:,} steps and this training has {planned:,}"
        if steps < planned:
            raise UserError(
                f"The {lengths}: {cause}, or start a new run from its weights with --pretrained runs/NAME/model."
            )
        print_rank0(f"warning: the {lengths}, so that it does not come down to its end: {cause}.")

    def on_load_checkpoint(self, checkpoint: State) -> None:
        self._resumed_world_size = checkpoint.get("ImageDataModule", {}).get("world_size")

    def choose_attention(self) -> None:
        """Attention as it trains fastest; again after each evaluation, which uses the fused kernel."""
        tokens = num_patches(self.net)
        dtype = torch.bfloat16 if self._in_bfloat16 else torch.float32
        is_unfused = tokens is not None and trains_unfused(self.device, dtype, tokens)
        set_fused_attention(self.net, not is_unfused)

    def on_save_checkpoint(self, checkpoint: State) -> None:
        # A state dict stays one: it has metadata as an attribute.
        for part in checkpoint.keys() - {"state_dict"}:
            # NumPy's numbers, given in Python, would make the checkpoint unreadable.
            checkpoint[part] = plain(checkpoint[part])

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode and hasattr(self, "net"):
            hold_frozen_statistics(self.net)
        return self

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, C] of images [B, 3, H, W]."""
        logits: Tensor = self.net(image)
        return self._opinions(image, logits)

    def _opinions(self, image: Tensor, logits: Tensor) -> Tensor:
        if self.mirror:
            several_labels = isinstance(self.targets, SeveralLabels)
            return with_mirror(self.net, image, logits, several_labels=several_labels)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy (soft targets under Mixup/CutMix) plus weighted losses of the routers."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.start_window()
        target = batch.get("target", batch["label"])  # [B], or soft or multi-hot [B, C]
        logits, routings = forward_routing(self.net, batch["image"])  # [B, C]
        if self.observer is not None:
            self.observer(batch, logits.detach(), [routing.detach() for routing in routings])

        cross_entropy = self._cross_entropy(logits, target)
        shares = self.targets.shares(target, logits.shape[-1])  # [B, C]
        loss = cross_entropy + self.balance.loss(routings, shares)
        self._note_evidence(routings, cross_entropy, loss)
        self._log_training(logits, batch, cross_entropy, loss)
        return loss

    def _note_evidence(
        self, routings: Sequence[Routing], cross_entropy: Tensor, loss: Tensor
    ) -> None:
        """Keep the numbers of a micro-batch in the order in which they were computed."""
        evidence = {f"router of block {r.layer}": r.logits.detach() for r in routings}
        evidence |= {f"{name} loss": value for name, value in self.balance.values.items()}
        evidence |= {"cross-entropy": cross_entropy.detach(), "loss": loss.detach()}
        self.evidence.append(evidence)

    def _log_training(
        self, logits: Tensor, batch: Batch, cross_entropy: Tensor, loss: Tensor
    ) -> None:
        scalars = {"train/loss": loss, "train/cross_entropy": cross_entropy}
        if "top1" in self.targets.shown:
            is_correct = logits.argmax(-1) == batch["label"]  # [B], of labels also under Mixup
            scalars["train/top1"] = is_correct.float().mean()
        means = mean_over_processes(scalars)
        size = len(logits)
        self.log("train/loss", means.pop("train/loss"), prog_bar=True, batch_size=size)
        self.log_dict(means, batch_size=size)
        for name, value in self.balance.values.items():
            self.log(f"train/{name}_loss", value, batch_size=size)

    @property
    def _in_bfloat16(self) -> bool:
        return self.trainer.precision in ("bf16-mixed", "bf16-true")

    def start_window(self) -> None:
        """Forget what earlier micro-batches computed: the next one is the first of an optimizer step."""
        self.balance.start_window()
        self.evidence = []
        self.update_refused = False
        self.update_applied = False

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Apply the update; if it was not refused, update the routers' biases by the load of the step."""
        scaler: torch.amp.GradScaler | None = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = 0.0 if scaler is None else scaler.get_scale()
        super().optimizer_step(*args, **kwargs)
        # Where fp16 gradients overflow, the scaler leaves the update out and lowers its scale.
        overflowed = scaler is not None and scaler.get_scale() < scale
        self.update_applied = not (self.update_refused or overflowed)
        self.balance.step(self.update_applied)

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        if self.update_applied:
            super().lr_scheduler_step(scheduler, metric)

    def _cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """A scalar, from logits [B, C] and target [B] or [B, C]."""
        weight = self.class_weight
        if weight is not None:
            weight = weight.to(logits.device, torch.float32)
        return self.targets.loss(logits.float(), target, weight, self.label_smoothing)

    def on_validation_epoch_start(self) -> None:
        self.val_outputs = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits, loss = self._evaluate(batch)
        answers = self.targets.answers(self.targets.probabilities(logits))
        correct = self.targets.are_right(answers, batch.get("target", batch["label"]))
        self.val_outputs.append(
            {"index": batch["index"], "label": batch["label"], "correct": correct, "loss": loss}
        )

    def on_validation_epoch_end(self) -> None:
        self._log_epoch("val")

    def on_validation_end(self) -> None:
        self.choose_attention()

    def on_test_epoch_start(self) -> None:
        self.test_outputs = []

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        logits, _ = self._evaluate(batch)
        target = batch.get("target", batch["label"]).long()
        self.class_metrics.update(self.targets.probabilities(logits.float()), target)
        calibration = self.calibration or Calibration(1.0, 0)
        probabilities = self.targets.probabilities(
            logits.float() / calibration.temperature
        )  # [B, C]
        prediction = self.targets.answers(probabilities, calibration.thresholds)
        output = {
            "index": batch["index"],
            "label": target,
            "prediction": prediction,
            "probability": probabilities,
        }
        if target.ndim == 1:
            output["probability"] = probabilities.amax(-1)  # of the prediction
        if self.coverage is not None:
            output["members"] = set_members(logits, self.sets, self.coverage)
        self.test_outputs.append({name: value.cpu() for name, value in output.items()})

    def on_test_epoch_end(self) -> None:
        self.test_loads = self._log_epoch("test")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No (positive|negative) samples in targets")
            by_class = self.class_metrics.compute()
        self.test_by_class = {name: values.tolist() for name, values in by_class.items()}
        self.class_metrics.reset()

    def _evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [B, C] and cross-entropy [B] of a batch; updates the metrics."""
        set_fused_attention(self.net, True)
        logits, routings = forward_routing(self.net, batch["image"])
        logits = self._opinions(batch["image"], logits)
        target = batch.get("target", batch["label"])
        self.metrics.update(self.targets.probabilities(logits.float()), target.long())
        loss = self.targets.losses(logits.float(), target)  # [B]
        self.mean_loss.update(loss)
        if self.routing_statistics is not None:
            self.routing_statistics.update(routings)
        return logits, loss

    def _log_epoch(self, split: str) -> list[LayerLoad]:
        values: dict[str, Any] = {**self.metrics.compute(), "loss": self.mean_loss.compute()}
        self.metrics.reset()
        self.mean_loss.reset()
        main = self.targets.shown[0]
        main_value = values.pop(main)
        self.log(f"{split}/{main}", main_value, prog_bar=True)
        self.log_dict({f"{split}/{name}": value for name, value in values.items()})
        if self.routing_statistics is None:
            return []
        loads = self.routing_statistics.layer_loads()
        self.routing_statistics.reset()
        for load in loads:
            measures = {
                "load_max": load.max_over_mean,
                "load_cv2": load.cv_squared,
                "entropy": load.entropy_bits,
                "dead": float(load.dead),
            }
            self.log_dict({f"moe/{load.layer}/{name}": value for name, value in measures.items()})
        return loads

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the global norm of all gradients and log it; an update that the stability guard refuses has none.

        Lightning's own clipping refuses fused optimizers, for the sake of loss scaling, which they don't meet here.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = self.tensors.total_norm([p.grad for p in parameters if p.grad is not None])
        self.log("train/grad_norm", norm)
        if self.update_gate is not None and self.update_gate(norm):
            self.update_refused = True
            # Zeros instead of None would still decay weights and move moments.
            optimizer.zero_grad(set_to_none=True)
        elif gradient_clip_val:
            self.tensors.clip(parameters, gradient_clip_val, norm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer (fused, except under fp16 loss scaling) and a one-cycle schedule over all optimizer steps."""
        optimizer, schedule = build_optimizer(
            self.net,
            self.optim,
            total_steps=int(self.trainer.estimated_stepping_batches),
            # With a loss scaler the fused step unscales by itself, and clipping would see scaled gradients.
            fused=self.trainer.precision != "16-mixed",
            bfloat16=self._in_bfloat16,
            optimizer_classes=self.tensors.optimizers,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
