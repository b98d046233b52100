"""What a finished `fit` leaves: test of the best checkpoint, exported model, plots, predictions, summary."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np

from moevision.data import ImageDataModule
from moevision.efficiency import measure_cost
from moevision.files import write_json_atomic, write_text_atomic
from moevision.models.io import SavedModel, save_model
from moevision.names import csv_name
from moevision.train.callbacks import Stopwatch
from moevision.train.card import model_card
from moevision.train.card_facts import gather_facts
from moevision.train.checkpoint_io import final_checkpoint
from moevision.train.confusion import plot_confusion
from moevision.train.data_wait import data_wait_advice
from moevision.train.ema import WeightEMA
from moevision.train.guard import StabilityGuard
from moevision.train.intervals import paired_difference
from moevision.train.manifest import sha256_of
from moevision.train.plan import describe_model, device_name
from moevision.train.plots import plot_curves
from moevision.train.processes import gather
from moevision.train.provenance import collect_provenance
from moevision.train.report import write_summary
from moevision.train.run_summary import RunSummary, TestScores, TwinComparison
from moevision.train.task import ClassificationTask


@dataclass(frozen=True)
class RunResult:
    """A finished run: its summary, and what a comparison with another run needs.

    Attributes:
        summary: what summary.md says.
        run_dir: the run folder.
        correct: for each test image, by its stable id, whether it was classified correctly.
    """

    summary: RunSummary
    run_dir: Path
    correct: dict[str, bool]

    @property
    def headline(self) -> str:
        """The result in one line."""
        test = self.summary.test
        loads = [layer.max_over_mean for layer in self.summary.layers]
        balance = f", busiest expert at {max(loads):.2f} x the mean load" if loads else ""
        return f"test/top1 {test.correct / test.total:.4f} on {test.total:,} test images{balance}"


def finish_run(
    *,
    task: ClassificationTask,
    data: ImageDataModule,
    trainer: L.Trainer,
    run_dir: Path,
    command: Sequence[str],
    started: datetime,
    seed: int | None,
    duration_s: float,
    train_s: float,
    images: int,
) -> RunResult | None:
    """Test the best checkpoint, export the model, and write every file of the run folder.

    Several processes test together; the first one writes, and the others get None.

    Args:
        task: the trained task.
        data: its data module.
        trainer: its trainer, after `fit`.
        run_dir: the run folder.
        command: the command line as typed.
        started: when the run began.
        seed: seed of the run.
        duration_s: seconds that the run took, interruptions left out.
        train_s: seconds of training without validation.
        images: training images seen.
    """
    watched = StabilityGuard.record_of(trainer)
    stopwatch = Stopwatch.of(trainer)
    data_wait = None if stopwatch is None else stopwatch.data_wait
    epochs, steps = trainer.current_epoch, trainer.global_step - watched.not_applied
    checkpoint, weights = final_checkpoint(run_dir / "checkpoints", cast(Any, trainer.strategy.checkpoint_io))
    trainer.test(task, data, ckpt_path=checkpoint, weights_only=True, verbose=False)
    rows = _predictions(task, data)
    bad_images = list(dict.fromkeys(chain.from_iterable(gather(data.bad_images))))
    if not trainer.is_global_zero:
        return None
    _export(task, data, run_dir)
    _write_predictions(rows, data.class_names, run_dir / "predictions_test.csv")
    plot_curves(run_dir / "metrics.csv", run_dir / "curves.png")
    labels, predictions = np.array([row.label for row in rows]), np.array([row.prediction for row in rows])
    plot_confusion(labels, predictions, data.class_names, run_dir / "confusion.png")
    _write_provenance(task, data, run_dir, command, started, seed)
    summary = RunSummary(
        name=run_dir.name,
        model=describe_model(task),
        data=data.path,
        image_size=data.image_size,
        split_note=data.split_note,
        class_counts=data.class_counts,
        test=replace(
            _scores(rows, data, trainer.callback_metrics),
            weights=weights if WeightEMA.of(trainer) is None else f"the moving average (EMA) of {weights}",
        ),
        cost=measure_cost(task.net, data.image_size),
        epochs=epochs,
        steps=steps,
        batch_size=data.batch_size * trainer.accumulate_grad_batches * trainer.world_size,
        duration_s=duration_s,
        images_per_s=images / train_s if train_s else 0.0,
        device=device_name(trainer) + (f", {trainer.world_size} processes" if trainer.world_size > 1 else ""),
        precision=str(trainer.precision),
        seed=seed,
        data_wait=data_wait,
        layers=task.test_loads,
        bad_images=bad_images,
        notes=[*data.warnings, *watched.sentences(), *data_wait_advice(data_wait, data)],
    )
    _write_summary(summary, run_dir)
    return RunResult(summary, run_dir, {row.sample: row.prediction == row.label for row in rows})


def write_comparison(result: RunResult, twin: RunResult, match: str) -> RunResult:
    """Write the paired comparison with the dense twin into the run's summary.

    Args:
        result: the run.
        twin: the run of its twin, on the same test images.
        match: what the two have in common, e.g. "active FLOPs".

    Returns:
        The result with the comparison in it.
    """
    common = [sample for sample in result.correct if sample in twin.correct]
    difference = paired_difference(
        np.array([result.correct[sample] for sample in common]),
        np.array([twin.correct[sample] for sample in common]),
    )
    other = twin.summary
    comparison = TwinComparison(
        difference=difference,
        match=match,
        correct=other.test.correct,
        cost=other.cost,
        duration_s=other.duration_s,
        images_per_s=other.images_per_s,
    )
    summary = replace(result.summary, twin=comparison)
    _write_summary(summary, result.run_dir)
    return replace(result, summary=summary)


def _write_summary(summary: RunSummary, run_dir: Path) -> None:
    write_summary(summary, run_dir / "summary.md")
    write_text_atomic(run_dir / "model" / "README.md", model_card(gather_facts(run_dir, summary=summary)))
    # Last: a run that has it is finished (`resume.is_finished`).
    write_json_atomic(run_dir / "summary.json", json.loads(json.dumps(asdict(summary), default=list)))


@dataclass(frozen=True)
class _Prediction:
    sample: str
    label: int
    prediction: int
    probability: float


def _predictions(task: ClassificationTask, data: ImageDataModule) -> list[_Prediction]:
    """Of all processes, in the order of the test images."""
    names = ("index", "label", "prediction", "probability")
    own = [row for batch in task.test_outputs for row in zip(*(batch[name].tolist() for name in names), strict=True)]
    return [
        _Prediction(data.sample_id("test", index), label, prediction, probability)
        for index, label, prediction, probability in sorted(chain.from_iterable(gather(own)))
    ]


def _write_predictions(rows: Sequence[_Prediction], class_names: Sequence[str], out: Path) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "label", "prediction", "probability", "correct"])
    for row in rows:
        words = class_names[row.label], class_names[row.prediction]
        names = map(csv_name, (row.sample, *words))
        writer.writerow([*names, f"{row.probability:.4f}", int(row.label == row.prediction)])
    write_text_atomic(out, text.getvalue())


def _scores(rows: Sequence[_Prediction], data: ImageDataModule, metrics: dict[str, Any]) -> TestScores:
    train = data.class_counts["train"]
    majority = max(train, key=lambda name: train[name])
    per_class = []
    for label, name in enumerate(data.class_names):
        own = [row for row in rows if row.label == label]
        per_class.append((name, sum(row.prediction == label for row in own), len(own)))
    return TestScores(
        correct=sum(row.prediction == row.label for row in rows),
        total=len(rows),
        majority_class=majority,
        majority_correct=per_class[data.class_names.index(majority)][2],
        loss=float(metrics["test/loss"]),
        balanced_accuracy=float(metrics["test/balanced_acc"]),
        ece=float(metrics["test/ece"]),
        top5=float(metrics["test/top5"]) if data.num_classes > 5 else None,
        per_class=per_class,
    )


def _export(task: ClassificationTask, data: ImageDataModule, run_dir: Path) -> None:
    mean, std = cast(Any, data.mean), cast(Any, data.std)
    save_model(SavedModel(task.net, data.class_names, data.image_size, mean, std), run_dir / "model")


def _write_provenance(
    task: ClassificationTask,
    data: ImageDataModule,
    run_dir: Path,
    command: Sequence[str],
    started: datetime,
    seed: int | None,
) -> None:
    provenance = collect_provenance(
        command=list(command),
        seed=seed,
        data_sha256=data.file_list_sha256(),
        started=started,
        extra={
            "backend": task.arch.backend or "auto",
            "compile": task.compile_blocks,
            "model_sha256": sha256_of(run_dir / "model" / "model.safetensors"),
        },
    )
    write_json_atomic(run_dir / "provenance.json", provenance)
