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

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCalibrationError,
    MulticlassF1Score,
    MulticlassPrecision,
)

from moevision.config import AuxLossWeights, Model, MoEConfig, OptimizerConfig
from moevision.errors import ABOVE_0, AT_LEAST_0, AT_LEAST_1, SHARE, UserError, check_ranges
from moevision.layers import LayerLoad, Routing, forward_routing, moe_layers, update_router_bias
from moevision.losses import AuxLoss, RoutingStatistics
from moevision.models.config import build_model
from moevision.models.vit_moe import (
    checkpoint_blocks,
    num_patches,
    set_fused_attention,
    trains_unfused,
)
from moevision.train.checkpoint import plain
from moevision.train.optim import LOCAL, build_optimizer, freeze_parameters, hold_frozen_statistics
from moevision.train.processes import mean_over_processes, print_rank0, sums_over_processes

Batch = dict[str, Tensor]
UpdateGate = Callable[[Tensor], bool]
"""Whether the update of this step is refused, by the norm of its gradients; asked once per optimizer step."""
Observer = Callable[[Batch, Tensor, Sequence[Routing]], None]
"""Is told of every training batch: the batch, its logits [B, C] and what each MoE layer decided, detached."""


def check_trainer(trainer: L.Trainer) -> None:
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


class ClassificationTask(L.LightningModule):
    """Train and evaluate an image classifier with MoE layers.

    Args are those of `moevision.config.Model`, which says what they are.
    """

    net: nn.Module

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
        self.compile_blocks, self.grad_checkpointing = compile, grad_checkpointing
        check_ranges(self, [(*SHARE, ("label_smoothing",))], "--model.")
        parts = self.arch, self.optim, self.aux_weights
        given = Model(*parts, label_smoothing, compile, grad_checkpointing, num_classes, image_size)
        self.save_hyperparameters(asdict(given), logger=False)
        self.aux_loss = AuxLoss(self.aux_weights)
        self.tensors = LOCAL  # `parallel.strategy` has another one, for parts
        self.window_counts: list[Tensor] = []
        # What the micro-batches of this optimizer step computed, by name: the stability guard judges by it.
        self.evidence: list[dict[str, Tensor]] = []
        self.update_gate: UpdateGate | None = None
        self.observer: Observer | None = None
        self.update_refused = self.update_applied = False
        self.class_weight: Tensor | None = None
        self._processes_before: int | None = None  # of the run that goes on
        self.val_outputs: list[dict[str, Tensor]] = []  # of the last validation
        self.test_outputs: list[dict[str, Tensor]] = []
        self.test_loads: list[LayerLoad] = []
        self.test_by_class: dict[str, list[float]] = {}  # precision, f1, auroc: [C] each
        self.calibration: Any = None  # a `stats.Calibration`, once the temperature is fitted
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
        self.aux_loss.check(self.net, num_classes)
        experts = {
            cast(int, layer.layer_index): layer.router.num_experts for layer in moe_layers(self.net)
        }
        self.routing_statistics = (
            RoutingStatistics([*experts], [*experts.values()]) if experts else None
        )
        self.val_metrics = _metrics(num_classes, "val/")
        self.test_metrics = _metrics(num_classes, "test/")
        kinds = {
            "precision": MulticlassPrecision,
            "f1": MulticlassF1Score,
            "auroc": MulticlassAUROC,
        }
        self.class_metrics = MetricCollection(
            {name: kind(num_classes, average="none") for name, kind in kinds.items()}
        )
        # By default a MeanMetric leaves NaN out, and a loss that isn't finite would pass as a good one. Under "disable"
        # torchmetrics 1.9 ignores weights, such as the size of a batch: `_evaluate` hands over the loss of every image.
        self.val_loss, self.test_loss = (
            MeanMetric(nan_strategy="disable"),
            MeanMetric(nan_strategy="disable"),
        )

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if not hasattr(self, "net"):
            if data is None:
                raise UserError(
                    "Give ClassificationTask num_classes and image_size, or train it with ImageDataModule."
                )
            self.build(data.num_classes, data.image_size, load_pretrained=stage == "fit")
        elif data is not None:
            known = self.hparams["num_classes"], self.hparams["image_size"]
            if (data.num_classes, data.image_size) != known:
                raise UserError(
                    f"The model is of {known[0]} classes and images of {known[1]} px, the data has {data.num_classes} "
                    f"and {data.image_size} px: use the data that it was trained on, with --data.image_size {known[1]}."
                )
        if data is not None:
            self.class_weight = data.class_weight_tensor()
        if self.compile_blocks and stage == "fit":
            for block in cast(Any, self.net).blocks:
                block.compile()

    def on_train_start(self) -> None:
        self.choose_attention()
        planned = self.trainer.estimated_stepping_batches
        before, now = self._processes_before, self.trainer.world_size
        cause = "the training images (or, from Python, the epochs) are others than then. Put them back as they were"
        if before not in (None, now):
            cause = (
                f"it began with {before} processes and goes on with {now}. Go on with a number of processes that "
                "divides the one before"
            )
        for config in self.trainer.lr_scheduler_configs:
            known = getattr(config.scheduler, "total_steps", planned)
            lengths = f"checkpoint's learning rate ends after {known:,} steps and this training has {planned:,}"
            if known < planned:
                raise UserError(
                    f"The {lengths}: {cause}, or start a new run from its weights with --pretrained runs/NAME/model."
                )
            if known > max(2, planned):
                print_rank0(
                    f"warning: the {lengths}, so that it does not come down to its end: {cause}."
                )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._processes_before = checkpoint.get("ImageDataModule", {}).get("world_size")

    def choose_attention(self) -> None:
        """Attention as it trains fastest; again after each evaluation, which uses the fused kernel."""
        tokens, dtype = (
            num_patches(self.net),
            torch.bfloat16 if self._in_bfloat16 else torch.float32,
        )
        set_fused_attention(
            self.net, tokens is None or not trains_unfused(self.device, dtype, tokens)
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for part in checkpoint.keys() - {"state_dict"}:  # a state has metadata as an attribute
            checkpoint[part] = plain(
                checkpoint[part]
            )  # NumPy's numbers, given in Python, would make it unreadable

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode and hasattr(self, "net"):
            hold_frozen_statistics(self.net)
        return self

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, C] of images [B, 3, H, W]."""
        return cast(Tensor, self.net(image))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy (soft targets under Mixup/CutMix) plus weighted losses of the routers."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.start_window()
        logits, routings = forward_routing(self.net, batch["image"])
        counts = [routing.requested_counts() for routing in routings]  # [E] for each layer
        earlier = self.window_counts or [torch.zeros_like(count) for count in counts]
        self.window_counts = [before + count for before, count in zip(earlier, counts, strict=True)]
        if self.observer is not None:
            self.observer(batch, logits.detach(), [routing.detach() for routing in routings])
        target = batch.get("target", batch["label"])  # [B] or soft [B, C]
        cross_entropy = self._cross_entropy(logits, target)
        shares = target if target.ndim == 2 else F.one_hot(target, logits.shape[-1])  # [B, C]
        aux, values = self.aux_loss(
            routings, shares
        )  # a scalar, or None without losses of routers; each loss by name
        loss = cross_entropy if aux is None else cross_entropy + aux
        self.evidence.append(
            {f"router of block {routing.layer}": routing.logits.detach() for routing in routings}
            | {f"{name} loss": value for name, value in values.items()}
            | {"cross-entropy": cross_entropy.detach(), "loss": loss.detach()}
        )
        size = len(batch["label"])
        top1 = (
            (logits.argmax(-1) == batch["label"]).float().mean()
        )  # of labels [B], also under Mixup
        means = mean_over_processes(
            {"train/loss": loss, "train/cross_entropy": cross_entropy, "train/top1": top1}
        )
        self.log("train/loss", means.pop("train/loss"), prog_bar=True, batch_size=size)
        self.log_dict(means, batch_size=size)
        self.log_dict(
            {f"train/{name}_loss": value for name, value in values.items()}, batch_size=size
        )
        return loss

    @property
    def _in_bfloat16(self) -> bool:
        return self.trainer.precision in ("bf16-mixed", "bf16-true")

    def start_window(self) -> None:
        """Forget what earlier micro-batches computed: the next one is the first of an optimizer step."""
        self.aux_loss.start_window()
        self.window_counts, self.evidence = [], []
        self.update_refused = self.update_applied = False

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Apply the update; if it was not refused, move the routers' biases by what it asked of every expert."""
        scaler: torch.amp.GradScaler | None = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = None if scaler is None else scaler.get_scale()
        super().optimizer_step(*args, **kwargs)
        # Where fp16 gradients overflow, the scaler leaves the update out.
        overflowed = scaler is not None and scale is not None and scaler.get_scale() < scale
        self.update_applied = not (self.update_refused or overflowed)
        if self.update_applied and any(layer.router.needs_load for layer in moe_layers(self.net)):
            update_router_bias(self.net, sums_over_processes(self.window_counts))

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        if self.update_applied:
            super().lr_scheduler_step(scheduler, metric)

    def _cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """A scalar, from logits [B, C] and target [B] or soft [B, C]."""
        if self.class_weight is None:
            return F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing)
        # Over the number of images, not over the sum of their weights (torch's mean): that differs from one micro-batch
        # or process to the next, and a step would depend on how its images are divided.
        weight = self.class_weight.to(logits.device, torch.float32)
        each = F.cross_entropy(
            logits.float(), target, weight, label_smoothing=self.label_smoothing, reduction="none"
        )
        return each.mean()

    def on_validation_epoch_start(self) -> None:
        self.val_outputs = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits, loss = self._evaluate(batch, self.val_metrics, self.val_loss)
        correct = logits.argmax(-1) == batch["label"]
        self.val_outputs.append(
            {"index": batch["index"], "label": batch["label"], "correct": correct, "loss": loss}
        )

    def on_validation_epoch_end(self) -> None:
        self._log_epoch("val", self.val_metrics, self.val_loss)

    def on_validation_end(self) -> None:
        self.choose_attention()

    def on_test_epoch_start(self) -> None:
        self.test_outputs = []

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        logits, _ = self._evaluate(batch, self.test_metrics, self.test_loss)
        self.class_metrics.update(logits.float().softmax(-1), batch["label"])
        temperature = 1.0 if self.calibration is None else self.calibration.temperature
        probability, prediction = (logits.float() / temperature).softmax(-1).max(-1)  # [B], [B]
        rows = {**batch, "prediction": prediction, "probability": probability}
        kept = ("index", "label", "prediction", "probability")
        self.test_outputs.append({name: rows[name].cpu() for name in kept})

    def on_test_epoch_end(self) -> None:
        self.test_loads = self._log_epoch("test", self.test_metrics, self.test_loss)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No (positive|negative) samples in targets")
            self.test_by_class = {
                name: found.tolist() for name, found in self.class_metrics.compute().items()
            }
        self.class_metrics.reset()

    def _evaluate(
        self, batch: Batch, metrics: MetricCollection, mean_loss: MeanMetric
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, C] and the cross-entropy [B] of a batch, of which the metrics take note."""
        set_fused_attention(self.net, True)
        logits, routings = forward_routing(self.net, batch["image"])
        metrics.update(logits.float().softmax(-1), batch["label"])
        loss = F.cross_entropy(logits.float(), batch["label"], reduction="none")  # [B]
        mean_loss.update(loss)
        if self.routing_statistics is not None:
            self.routing_statistics.update(routings)
        return logits, loss

    def _log_epoch(
        self, split: str, metrics: MetricCollection, mean_loss: MeanMetric
    ) -> list[LayerLoad]:
        values: dict[str, Any] = {**metrics.compute(), f"{split}/loss": mean_loss.compute()}
        metrics.reset()
        mean_loss.reset()
        self.log(f"{split}/top1", values.pop(f"{split}/top1"), prog_bar=True)
        self.log_dict(values)
        if self.routing_statistics is None:
            return []
        loads = self.routing_statistics.layer_loads()
        self.routing_statistics.reset()
        for load in loads:
            found = {
                "load_max": load.max_over_mean,
                "load_cv2": load.cv_squared,
                "entropy": load.entropy_bits,
            }
            found["dead"] = float(load.dead)
            self.log_dict({f"moe/{load.layer}/{name}": value for name, value in found.items()})
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
        gradients = [
            p.grad
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        norm = self.tensors.total_norm(gradients)
        self.log("train/grad_norm", norm)
        if self.update_gate is not None and self.update_gate(norm):
            self.update_refused = True
            optimizer.zero_grad(
                set_to_none=True
            )  # zeros would still decay weights and move moments
        elif gradient_clip_val:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self.tensors.clip(parameters, gradient_clip_val, norm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer (fused, except under fp16 loss scaling) and a one-cycle schedule over all optimizer steps."""
        # With a loss scaler the fused step unscales by itself, and clipping would see scaled gradients.
        fused = self.trainer.precision != "16-mixed"
        steps = int(self.trainer.estimated_stepping_batches)
        optimizer, schedule = build_optimizer(
            self.net,
            self.optim,
            total_steps=steps,
            fused=fused,
            bfloat16=self._in_bfloat16,
            kinds=self.tensors.optimizers,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class MacroRecall(MulticlassAccuracy):
    """The mean of the recalls of those classes that have images.

    torchmetrics also counts a class without images as 0 as soon as one image is taken for it. A small class may have
    none among the validation images.
    """

    def compute(self) -> Tensor:
        """A scalar in [0, 1]."""
        right, _, _, wrong = self._final_state()  # [C] each: true positives, ..., false negatives
        images = right + wrong
        share = (images > 0) / (images > 0).sum()  # [C]
        return (right / images.clamp_min(1) * share).sum()


def _metrics(num_classes: int, prefix: str) -> MetricCollection:
    metrics: dict[str, Metric | MetricCollection] = {
        "top1": MulticlassAccuracy(num_classes, average="micro"),
        "balanced_acc": MacroRecall(num_classes, average="macro"),
        "ece": MulticlassCalibrationError(num_classes, n_bins=15),
    }
    if num_classes > 5:  # with fewer, everything is among the five likeliest
        metrics["top5"] = MulticlassAccuracy(num_classes, average="micro", top_k=5)
    return MetricCollection(metrics, prefix=prefix, compute_groups=False)
