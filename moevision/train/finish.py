"""A training, and what a finished one leaves in its run folder.

The checkpoint that `final_weights` names is tested and its model exported; predictions, plots, provenance, model card
and summary are written, with the comparison with the dense twin.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from torchmetrics.functional.classification import binary_calibration_error

from moevision.config import Settings
from moevision.data import ImageDataModule
from moevision.efficiency import measure_cost
from moevision.errors import escape_csv_cell
from moevision.files import csv_text, file_sha256, write_json_atomic, write_text_atomic
from moevision.layers import moe_layers
from moevision.models.io import SavedModel, save_model
from moevision.models.ood import IMAGES, MahalanobisOOD, fit_ood, linear_head
from moevision.stats import paired_difference
from moevision.train.checkpoint import PRETRAINED_CONFIG, check_checkpoint
from moevision.train.final_weights import choose_weights
from moevision.train.guard import StabilityGuard
from moevision.train.health import RecordRouting, StopEarly, Stopwatch, WeightEMA, data_wait_advice
from moevision.train.plots import plot_confusion, plot_curves
from moevision.train.processes import callback_of, gather_objects, parallel_strategy, print_rank0
from moevision.train.provenance import collect_provenance, device_name
from moevision.train.recipe import describe_model
from moevision.train.report import (
    BALANCED,
    PROBE,
    ClassScores,
    ComparedModel,
    RunSummary,
    TestScores,
    TwinComparison,
    choose,
    gather_facts,
    model_card,
    write_summary,
)
from moevision.train.resume import RunStart, Session
from moevision.train.start import features_of, read_probe, weights_file
from moevision.train.task import ClassificationTask
from moevision.words import percent

BadImages = Sequence[tuple[str, str, str]]  # path, reason, split


@dataclass
class Training:
    """A training and what it is made of; `start` is None afresh, in a folder of its own, `started` in UTC."""

    settings: Settings
    session: Session
    start: RunStart | None
    run_dir: Path
    task: ClassificationTask
    data: ImageDataModule
    trainer: L.Trainer
    stopwatch: Stopwatch
    started: datetime
    expected_s: float | None = None

    @property
    def fresh(self) -> bool:
        """Whether training begins, and doesn't go on from a checkpoint."""
        return self.start is None or self.start.checkpoint is None

    @property
    def trial(self) -> bool:
        """Whether this only tests that everything runs."""
        return bool(cast(Any, self.trainer).fast_dev_run)

    @property
    def kept(self) -> Path:
        """Where what the pretrained weights are of is kept for the run's checkpoints."""
        return self.run_dir / "checkpoints" / PRETRAINED_CONFIG

    @property
    def clusters(self) -> bool:
        """Whether the routers begin with clusters of their input."""
        return self.settings.router_start == "cluster" and bool(moe_layers(self.task.net))

    @property
    def device_before(self) -> torch.device:
        """Where the first process computes before the training begins."""
        return torch.device("cpu") if self.divided else self.trainer.strategy.root_device

    @property
    def divided(self) -> Any:
        """The strategy by which processes share the model, so that it may not fit a device; None: they don't."""
        return parallel_strategy(self.trainer)


@dataclass(frozen=True)
class RunResult:
    """A finished run, and of each test image, by its stable id, whether it was classified correctly and its class."""

    summary: RunSummary
    run_dir: Path
    correct: dict[str, bool]
    labels: dict[str, int]

    @property
    def headline(self) -> str:
        """The result in one line."""
        test = self.summary.test
        loads = [layer.max_over_mean for layer in self.summary.layers]
        balance = f", busiest expert at {max(loads):.2f} x the mean load" if loads else ""
        choice = "" if self.summary.choice is None else f"\n{self.summary.choice.sentence}"
        low, high = map(percent, test.interval)
        scores = f"{percent(test.accuracy)} of {test.total:,} test images right (95 % interval {low} to {high})"
        if self.summary.unbalanced:
            scores = f"balanced accuracy {percent(test.balanced_accuracy)}; {scores}"
        return f"{scores}{balance}{choice}"


class Effort(NamedTuple):
    """What a training took, without the test after it; `steps` were applied, `refused` weren't."""

    duration_s: float
    cpu_s: float | None
    epochs: float
    steps: int
    refused: int
    notes: list[str]  # on how it ended, and what the stability guard did


class TestedImages(NamedTuple):
    """What the tested weights say of the n test images, in their order."""

    samples: list[str]  # stable ids
    labels: npt.NDArray[np.int64]  # [n]
    predictions: npt.NDArray[np.int64]  # [n]
    confidence: npt.NDArray[np.float64]  # [n] the calibrated probability of the prediction

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether each was classified correctly, [n]."""
        return cast(npt.NDArray[np.bool_], self.labels == self.predictions)


def finish(training: Training, command: Sequence[str]) -> RunResult | None:
    """Test the checkpoint that `choose_weights` names, export the model, and write every file of the run folder.

    Several processes test together; the first one writes, and the others get None. The run began with `command`.
    """
    task, data, trainer, run_dir = training.task, training.data, training.trainer, training.run_dir
    effort = _effort(training)

    # All processes test
    monitor = cast(str, training.settings.checkpoint.monitor)
    checkpoint, weights = choose_weights(trainer, task, data, run_dir / "checkpoints", monitor)
    trainer.test(task, data, ckpt_path=checkpoint, weights_only=True, verbose=False)
    tested = _gather_tested_images(task, data)
    bad_images = list(dict.fromkeys(chain.from_iterable(gather_objects(data.bad_images))))
    if training.divided is not None:
        training.divided.gather()
    if not trainer.is_global_zero:
        return None

    # The first one writes
    _export_model(training, checkpoint)
    _write_predictions(run_dir, tested, data.class_names)
    plot_curves(run_dir / "metrics.csv", run_dir / "curves.png")
    plot_confusion(tested.labels, tested.predictions, data.class_names, run_dir / "confusion.png")
    _write_provenance(training, command)
    scores = _test_scores(training, tested, checkpoint, weights)
    _write_class_table(run_dir, scores.per_class)
    summary = _summarize(training, effort, scores, bad_images)
    by_image = (
        dict(zip(tested.samples, each.tolist(), strict=True))
        for each in (tested.correct, tested.labels)
    )
    result = _with_choice(RunResult(summary, run_dir, *by_image))
    _write_summary(result.summary, run_dir)
    return result


def _effort(training: Training) -> Effort:
    trainer, stopwatch = training.trainer, training.stopwatch
    guarded = (callback_of(trainer, StabilityGuard) or StabilityGuard()).record
    steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    stop = callback_of(trainer, StopEarly)
    return Effort(
        duration_s=stopwatch.run_s,
        cpu_s=stopwatch.cpu_s,
        epochs=round(trainer.global_step / steps_per_epoch, 1),
        steps=trainer.global_step - guarded.not_applied,
        refused=guarded.not_applied,
        notes=[*([] if stop is None else stop.sentences(trainer)), *guarded.sentences()],
    )


def _gather_tested_images(task: ClassificationTask, data: ImageDataModule) -> TestedImages:
    """The answers of all processes, after a test."""
    names = ("index", "label", "prediction", "probability")
    of_process = [
        row
        for batch in task.test_outputs
        for row in zip(*(batch[name].tolist() for name in names), strict=True)
    ]
    rows = sorted(chain.from_iterable(gather_objects(of_process)))
    indices, *columns = map(np.array, zip(*rows, strict=True))
    return TestedImages([data.sample_id("test", index) for index in indices.tolist()], *columns)


def _export_model(training: Training, checkpoint: Path) -> None:
    task, data, trainer = training.task, training.data, training.trainer
    model = SavedModel(
        net=task.net,
        class_names=data.class_names,
        image_size=data.image_size,
        mean=data.mean,
        std=data.std,
        temperature=None if task.calibration is None else task.calibration.temperature,
        strangers=_strangers(training),
        fit=data.fit,
    )
    save_model(model, training.run_dir / "model")
    recorder = callback_of(trainer, RecordRouting)
    if recorder is not None:
        recorder.finish(trainer, task, check_checkpoint(str(checkpoint))["global_step"])


def _write_predictions(run_dir: Path, tested: TestedImages, classes: Sequence[str]) -> None:
    rows = [
        (
            escape_csv_cell(sample),
            escape_csv_cell(classes[label]),
            escape_csv_cell(classes[prediction]),
            f"{confidence:.4f}",
            int(label == prediction),
        )
        for sample, label, prediction, confidence in zip(*tested, strict=True)
    ]
    header = ("image", "label", "prediction", "probability", "correct")
    write_text_atomic(run_dir / "predictions_test.csv", csv_text(header, rows))


def _write_provenance(training: Training, command: Sequence[str]) -> None:
    arch, run_dir = training.task.arch, training.run_dir
    extra: dict[str, Any] = {
        "backend": arch.backend or "auto",
        "compile": training.task.compile_blocks,
        "model_sha256": file_sha256(run_dir / "model" / "model.safetensors"),
    }
    if arch.pretrained is not None:
        origin = weights_file(arch.pretrained)
        extra["pretrained_sha256"] = None if origin is None else file_sha256(origin)
    provenance = collect_provenance(
        command=list(command),
        seed=_seed(training),
        data_sha256=training.data.file_list_sha256(),
        started=training.started,
        extra=extra,
    )
    write_json_atomic(run_dir / "provenance.json", provenance)


def _seed(training: Training) -> int | None:
    seed: int | None = training.settings.seed_everything
    return None if seed is False else seed


def _test_scores(
    training: Training, tested: TestedImages, checkpoint: Path, weights: str
) -> TestScores:
    task, data, metrics = training.task, training.data, training.trainer.callback_metrics
    train_counts = data.class_counts["train"]
    majority = max(train_counts, key=lambda name: train_counts[name])
    has_average = callback_of(training.trainer, WeightEMA) is not None
    return TestScores(
        correct=int(tested.correct.sum()),
        total=len(tested.samples),
        majority_class=majority,
        majority_correct=int((tested.labels == data.class_names.index(majority)).sum()),
        loss=float(metrics["test/loss"]),
        balanced_accuracy=float(metrics["test/balanced_acc"]),
        ece=float(metrics["test/ece"]),
        temperature=None if task.calibration is None else task.calibration.temperature,
        calibrated_on=0 if task.calibration is None else task.calibration.images,
        calibrated_ece=None if task.calibration is None else _calibration_error(tested),
        top5=float(metrics["test/top5"]) if data.num_classes > 5 else None,
        per_class=_class_scores(task, tested, data.class_names),
        weights=f"the moving average (EMA) of {weights}" if has_average else weights,
        checkpoint=checkpoint.name,
    )


def _calibration_error(tested: TestedImages) -> float | None:
    """The expected calibration error of the calibrated confidence, as test/ece has it; None if one isn't finite."""
    if not np.isfinite(tested.confidence).all():
        return None
    confidence, correct = torch.from_numpy(tested.confidence), torch.from_numpy(tested.correct)
    return float(binary_calibration_error(confidence, correct, n_bins=15))


def _class_scores(
    task: ClassificationTask, tested: TestedImages, classes: Sequence[str]
) -> list[ClassScores]:
    scores = []
    for label, name in enumerate(classes):
        is_class = tested.labels == label
        measures: dict[str, Any] = {
            key: values[label] for key, values in task.test_by_class.items()
        }
        if not is_class.any():
            measures = dict.fromkeys(measures)
        if is_class.all():  # no image of another class to tell it from
            measures["auroc"] = None
        scores.append(
            ClassScores(
                name, int((tested.correct & is_class).sum()), int(is_class.sum()), **measures
            )
        )
    return scores


def _write_class_table(run_dir: Path, scores: Sequence[ClassScores]) -> None:
    def cell(share: float | None) -> str:
        return "" if share is None else f"{share:.4f}"

    rows = [
        (
            escape_csv_cell(each.name),
            each.images,
            *map(cell, (each.precision, each.recall, each.f1, each.auroc)),
        )
        for each in scores
    ]
    header = ("class", "images", "precision", "recall", "f1", "auroc")
    write_text_atomic(run_dir / "classes_test.csv", csv_text(header, rows))


def _summarize(
    training: Training, effort: Effort, scores: TestScores, bad_images: BadImages
) -> RunSummary:
    task, data, trainer, run_dir = training.task, training.data, training.trainer, training.run_dir
    stopwatch, monitor = training.stopwatch, training.settings.checkpoint.monitor
    device = device_name(trainer)
    if trainer.world_size > 1:
        device += f", {trainer.world_size} processes"
    chosen_by = (
        ["best.ckpt is the epoch with the best balanced accuracy on val."]
        if monitor == BALANCED
        else []
    )
    return RunSummary(
        name=run_dir.name,
        model=describe_model(task),
        data=data.path,
        image_size=data.image_size,
        split_note=data.split_note,
        class_counts=data.class_counts,
        test=scores,
        cost=measure_cost(task.net, data.image_size),
        epochs=int(effort.epochs) if effort.epochs.is_integer() else effort.epochs,
        steps=effort.steps,
        refused=effort.refused,
        batch_size=data.batch_size * trainer.accumulate_grad_batches * trainer.world_size,
        duration_s=effort.duration_s,
        cpu_s=effort.cpu_s,
        images_per_s=stopwatch.images / stopwatch.train_s if stopwatch.train_s else 0.0,
        device=device,
        precision=str(trainer.precision),
        seed=_seed(training),
        data_wait=stopwatch.data_wait,
        gpu_peak_bytes=torch.cuda.max_memory_allocated() or None,  # 0 without CUDA
        layers=task.test_loads,
        bad_images=bad_images,
        expected_s=training.expected_s,
        monitor=monitor,
        ms_per_image=_ms_per_image(training),
        mbytes=(run_dir / "model" / "model.safetensors").stat().st_size / 1e6,
        notes=[
            *data.warnings,
            *chosen_by,
            *effort.notes,
            *data_wait_advice(stopwatch.data_wait, data),
        ],
    )


def _strangers(training: Training) -> MahalanobisOOD | None:
    """What the model takes for a stranger: classes by training images, the threshold by validation images."""
    net, data = training.task.net, training.data
    if training.divided or linear_head(net) is None:  # a divided model may not fit one device
        return None
    most = {"train": max(IMAGES, 10 * data.num_classes), "val": IMAGES}
    count = sum(min(most[split], len(data.contents.datasets[split])) for split in most)
    print_rank0(
        f"measuring on {count:,} images what is unlike them, for the distance that predict tells"
    )
    found = features_of(net, data, most, training.trainer.strategy.root_device)
    (features, labels, *_), validation = found["train"], found["val"][0]
    return fit_ood(features, labels, validation)


def _with_choice(result: RunResult, twin: RunResult | None = None) -> RunResult:
    """The run beside the linear probe of the weights that it started from, and beside its dense twin."""
    probe = read_probe(result.run_dir)
    tested = [each.correct for each in (result, twin) if each is not None]
    tested += [] if probe is None else [probe.test_correct]
    common = [sample for sample in result.correct if all(sample in each for each in tested)]
    if (probe is None and twin is None) or not common:
        return result

    def entry(name: str, run: RunResult) -> ComparedModel:
        made = run.summary
        correct = np.array([run.correct[sample] for sample in common])
        return ComparedModel(name, correct, made.ms_per_image, made.mbytes or 0.0, made.duration_s)

    dense = "dense fine-tune" if probe is not None else "dense twin"
    rows = [] if twin is None else [entry(dense, twin)]
    rows.append(entry("Mixture of Experts" if result.summary.layers else dense, result))
    if probe is not None:
        correct = np.array([probe.test_correct[sample] for sample in common])
        # The model that training began with, which is the one of the first row; else its time isn't known.
        speed = (
            rows[0].ms_per_image if twin or probe.of_experts or not result.summary.layers else None
        )
        rows.insert(0, ComparedModel(PROBE, correct, speed, probe.mbytes, probe.seconds))
    labels = np.array([result.labels[sample] for sample in common])
    given = probe is not None and probe.of_experts
    choice = choose(rows, labels, unbalanced=result.summary.unbalanced, experts_given=given)
    return replace(result, summary=replace(result.summary, choice=choice))


@torch.no_grad()
def _ms_per_image(training: Training) -> float | None:
    """Milliseconds of one image at a time: the median of at most 20 passes in two seconds, after one that warms up."""
    if training.divided:  # it may not fit one device
        return None
    side, device = training.data.image_size, training.trainer.strategy.root_device
    net = training.task.net.to(device).eval()
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    image = image.to(
        device, next(net.parameters()).dtype
    )  # of a training in bf16-true or 64-true, its own
    times: list[float] = []
    while len(times) < 4 or (len(times) < 21 and sum(times) < 2):
        began = time.perf_counter()
        net(image).cpu()  # a GPU is waited for
        times.append(time.perf_counter() - began)
    return float(1000 * np.median(times[1:]))


def write_comparison(result: RunResult, twin: RunResult, match: str) -> RunResult:
    """Write the paired comparison with the dense twin into the run's summary; the result with it.

    `match` is what the two have in common, e.g. "active FLOPs".
    """
    common = [sample for sample in result.correct if sample in twin.correct]
    both = (np.array([run.correct[sample] for sample in common]) for run in (result, twin))
    other = twin.summary
    comparison = TwinComparison(
        paired_difference(*both),
        match,
        other.test.correct,
        other.cost,
        other.duration_s,
        other.images_per_s,
        other.test.weights,
    )
    result = _with_choice(replace(result, summary=replace(result.summary, twin=comparison)), twin)
    _write_summary(result.summary, result.run_dir)
    return result


def _write_summary(summary: RunSummary, run_dir: Path) -> None:
    write_summary(summary, run_dir / "summary.md")
    write_text_atomic(run_dir / "model" / "README.md", model_card(gather_facts(run_dir, summary)))
    # Last: a run that has it is finished (`resume.is_finished`).
    text = json.dumps(asdict(summary), default=list)
    # JSON has neither NaN nor infinity: null.
    write_json_atomic(run_dir / "summary.json", json.loads(text, parse_constant=lambda name: None))
