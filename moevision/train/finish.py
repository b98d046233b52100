"""The end of a training: which checkpoint is tested, and what a finished run leaves in its folder.

The chosen checkpoint is tested and its model exported; predictions, plots, provenance, model card and summary are
written, with the comparison with the dense twin.

One rule for every model chooses the checkpoint. If the learning-rate schedule was completed, the last weights are
tested, unless those of the best validation epoch are better by more than one standard error of the paired difference on
the validation images. For the best of several noisy values is biased upwards, and a best epoch that comes early has
weights from the time of a high learning rate (benchmarks/checkpoint_choice has what each rule costs). If training ended
before its schedule, the weights of the best epoch are tested.

Axes: n images of a split, C classes, D width of a feature.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import chain, compress
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from lightning import Trainer
from scipy.stats import sem
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multilabel_f1_score,
    multilabel_precision,
    multilabel_recall,
)

from moevision.config import Settings
from moevision.data import ImageDataModule
from moevision.efficiency import measure_cost
from moevision.errors import escape_csv_cell
from moevision.files import csv_text, file_sha256, write_json_atomic, write_text_atomic
from moevision.layers import moe_layers
from moevision.models.io import SavedModel, save_model
from moevision.models.ood import IMAGES, MahalanobisOOD, fit_ood, linear_head
from moevision.stats import (
    PairedDifference,
    accuracy_interval,
    paired_difference,
    paired_macro_difference,
)
from moevision.train.checkpoint import BEST, LAST, PRETRAINED_CONFIG, verify
from moevision.train.guard import StabilityGuard
from moevision.train.health import StopEarly, Stopwatch, data_wait_advice
from moevision.train.plots import plot_confusion, plot_curves, plot_examples, read_metrics
from moevision.train.processes import (
    broadcast_from_rank0,
    callback_of,
    gather_objects,
    is_trial,
    parallel_strategy,
    print_rank0,
)
from moevision.train.provenance import collect_provenance, device_name
from moevision.train.recipe import describe_model
from moevision.train.report import (
    BALANCED,
    LOSS,
    MAP,
    PROBE,
    ClassScores,
    ComparedModel,
    RunSummary,
    TestScores,
    TwinComparison,
    choose,
    gather_facts,
    model_card,
    read_summary,
    write_summary,
)
from moevision.train.resume import RunStart, Session
from moevision.train.start import features_of, read_probe, weights_file
from moevision.train.task import ClassificationTask
from moevision.types import Array, Flags, Floats, Ints, Json, Keywords
from moevision.words import percent, points

# mAP is no mean over images: by it the best epoch is found, and compared with the last one by the loss.
_MONITOR_TEXTS = {"val/top1": "accuracy", BALANCED: "balanced accuracy", LOSS: "loss", MAP: "loss"}

BadImages = Sequence[tuple[str, str, str]]  # path, reason, split
_NUM_MISTAKES, _IMAGES_OF_MISTAKE = 3, 5  # most frequent mistakes in summary.md, and images of each


@dataclass
class Training:
    """The objects that the steps of one training share.

    `start` is where a resumed run or a dense twin begins, None for a new run. `started` is in UTC, `expected_s` the
    predicted duration.
    """

    settings: Settings
    session: Session
    start: RunStart | None
    run_dir: Path
    task: ClassificationTask
    data: ImageDataModule
    trainer: Trainer
    stopwatch: Stopwatch
    started: datetime
    expected_s: float | None = None

    @property
    def is_fresh(self) -> bool:
        """Whether training begins at step 0, not from a checkpoint of this run."""
        return self.start is None or self.start.checkpoint is None

    @property
    def is_trial(self) -> bool:
        """Whether a few batches only test that everything runs (`fast_dev_run`)."""
        return is_trial(self.trainer)

    @property
    def pretrained_config_dir(self) -> Path:
        """The folder that keeps the pretrained model's config.json, beside the run's checkpoints."""
        return self.run_dir / "checkpoints" / PRETRAINED_CONFIG

    @property
    def starts_from_clusters(self) -> bool:
        """Whether the routers are initialised with cluster centroids of the tokens that they route."""
        return self.settings.router_start == "cluster" and bool(moe_layers(self.task.net))

    @property
    def starting_device(self) -> torch.device:
        """The device of what is computed before the first step (linear probe, clusters)."""
        if self.sharded_strategy:
            return torch.device("cpu")
        return self.trainer.strategy.root_device

    @property
    def sharded_strategy(self) -> Any:
        """The strategy that shards the model over processes; None if every process holds the whole model."""
        return parallel_strategy(self.trainer)


@dataclass(frozen=True)
class RunResult:
    """A finished run. For each test image, by its stable id: whether it was classified correctly, and its label."""

    summary: RunSummary
    run_dir: Path
    correct: dict[str, bool]
    labels: dict[str, int]

    @property
    def headline(self) -> str:
        """The result in one line."""
        test = self.summary.test
        low, high = map(percent, test.interval)
        text = f"{percent(test.accuracy)} of {test.total:,} test images right (95 % interval {low} to {high})"
        if test.multilabel:
            text = f"mAP {percent(test.multilabel['map'])}; all labels: {text}"
        if self.summary.unbalanced:
            text = f"balanced accuracy {percent(test.balanced_accuracy)}; {text}"
        if self.summary.layers:
            load = max(layer.max_over_mean for layer in self.summary.layers)
            text += f", busiest expert at {load:.2f} x the mean load"
        if self.summary.choice is not None:
            text += f"\n{self.summary.choice.sentence}"
        return text


class Effort(NamedTuple):
    """Time and optimizer steps of a training, without its test.

    `steps` changed the weights; the stability guard kept `refused` others from doing so.
    """

    duration_s: float
    cpu_s: float | None
    epochs: float
    steps: int
    refused: int
    notes: list[str]  # on how it ended, and what the stability guard did


class TestedImages(NamedTuple):
    """Predictions of the tested weights for the n test images, in the order of the test set.

    Where images have several labels, all but `samples` have a column for each label: [n, C].
    """

    samples: list[str]  # stable ids
    labels: Ints  # [n], or multi-hot
    predictions: Ints  # [n], or whether the label is given
    confidence: Floats  # [n] the calibrated probability of the prediction, or of each label

    @property
    def correct(self) -> Flags:
        """[n]: whether each image was classified correctly, in all its labels."""
        are_equal: Flags = self.labels == self.predictions
        if are_equal.ndim == 2:
            are_equal = np.all(are_equal, axis=1)
        return are_equal

    def of_class(self, label: int) -> tuple[Flags, Flags]:
        """[n] each: which images have this label, and which get it."""
        if self.labels.ndim == 2:
            return self.labels[:, label] > 0, self.predictions[:, label] > 0
        return self.labels == label, self.predictions == label


def finish(training: Training, command: Sequence[str]) -> RunResult | None:
    """Test the checkpoint that `choose_weights` names, export the model, and write every file of the run folder.

    All processes share the test; rank 0 writes, and the others return None. `command` is the command line of the run.
    """
    task, data, trainer, run_dir = training.task, training.data, training.trainer, training.run_dir
    effort = _effort(training)  # before validations and test change the counters

    # All processes test. The network then has the tested weights, which all below reads.
    weights = choose_weights(training)
    trainer.test(task, data, ckpt_path=weights.checkpoint, weights_only=True, verbose=False)
    tested = _gather_tested_images(task, data)
    bad_images = list(dict.fromkeys(chain.from_iterable(gather_objects(data.bad_images))))
    if training.sharded_strategy is not None:
        training.sharded_strategy.gather()  # all weights, to rank 0
    if not trainer.is_global_zero:
        return None

    # Rank 0 writes.
    detector = _fit_ood(training)
    _export_model(training, detector)
    _write_predictions(run_dir, tested, data.class_names)
    plot_curves(run_dir / "metrics.csv", run_dir / "curves.png")
    mistakes = []
    if not data.multilabel:
        plot_confusion(
            tested.labels, tested.predictions, data.class_names, run_dir / "confusion.png"
        )
        mistakes = _most_frequent_mistakes(data, tested, run_dir / "mistakes.png")
    _write_provenance(training, command)

    scores = _test_scores(training, tested, weights)
    _write_class_table(run_dir, scores.per_class)
    strangers = _count_strangers(training, detector)
    summary = _summarize(training, effort, scores, bad_images)
    summary = replace(summary, mistakes=mistakes, strangers=strangers)

    correct = dict(zip(tested.samples, tested.correct.tolist(), strict=True))
    label_of = {sample.sample_id: sample.label for sample in data.contents.datasets["test"].samples}
    labels = {sample: label_of[sample] for sample in tested.samples}
    result = _add_recommendation(RunResult(summary, run_dir, correct, labels))
    _write_summary(result.summary, run_dir)
    return result


def _effort(training: Training) -> Effort:
    trainer, stopwatch = training.trainer, training.stopwatch
    # Without a guard an empty record.
    guard_record = (callback_of(trainer, StabilityGuard) or StabilityGuard()).record
    steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    early_stopping = callback_of(trainer, StopEarly)
    notes = [] if early_stopping is None else early_stopping.sentences(trainer)
    return Effort(
        duration_s=stopwatch.run_s,
        cpu_s=stopwatch.cpu_s,
        epochs=round(trainer.global_step / steps_per_epoch, 1),
        steps=trainer.global_step - guard_record.not_applied,
        refused=guard_record.not_applied,
        notes=[*notes, *guard_record.sentences()],
    )


def _gather_tested_images(task: ClassificationTask, data: ImageDataModule) -> TestedImages:
    """The test predictions of all processes."""
    columns = _gather_columns(task.test_outputs)
    return TestedImages(
        samples=[data.sample_id("test", index) for index in columns["index"].tolist()],
        labels=columns["label"],
        predictions=columns["prediction"],
        confidence=columns["probability"].astype(np.float64),
    )


def _gather_columns(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Array]:
    """Concatenate the batches of all processes: an array [n] per output name, sorted by the images' `index`."""
    arrays = [{name: x.cpu().numpy() for name, x in batch.items()} for batch in batches]
    gathered = list(chain.from_iterable(gather_objects(arrays)))
    columns = {name: np.concatenate([batch[name] for batch in gathered]) for name in gathered[0]}
    order = np.argsort(columns["index"])
    return {name: column[order] for name, column in columns.items()}


def describe_sets(task: ClassificationTask) -> str:
    """What a test with prediction sets found out; on all processes."""
    columns = _gather_columns(task.test_outputs)
    members, labels = columns["members"], columns["label"]  # [n, C], [n]
    covered, sizes = members[np.arange(len(labels)), labels], members.sum(1)
    low, high = map(percent, accuracy_interval(covered.sum(), len(labels)))
    return (
        f"sets at {task.coverage:g}, by {len(task.sets.true_probabilities):,} validation images: "
        f"{percent(covered.mean())} have the true class (95 % interval {low} to {high}), with {sizes.mean():.2f} of "
        f"{members.shape[1]} classes on average (± {1.96 * sem(sizes):.2f})"
    )


def _export_model(training: Training, detector: MahalanobisOOD | None) -> None:
    """Write `model/` with the tested weights."""
    task, data = training.task, training.data
    model = SavedModel(
        net=task.net,
        class_names=data.class_names,
        image_size=data.image_size,
        mean=data.mean,
        std=data.std,
        temperature=None if task.calibration is None else task.calibration.temperature,
        strangers=detector,
        fit=data.fit,
        thresholds=_thresholds(training),
        sets=task.sets,
    )
    save_model(model, training.run_dir / "model")


def _thresholds(training: Training) -> tuple[float, ...]:
    """Of each label; empty where images have one."""
    data, calibration = training.data, training.task.calibration
    if not data.multilabel:
        return ()
    if calibration is None:
        return (0.5,) * data.num_classes
    return cast(tuple[float, ...], calibration.thresholds)


def _write_predictions(run_dir: Path, tested: TestedImages, classes: Sequence[str]) -> None:
    names = [escape_csv_cell(name) for name in classes]
    rows: list[tuple[Any, ...]] = []
    header = ["image", "label", "prediction", "probability", "correct"]
    if tested.labels.ndim == 2:
        # Each label has a column of its own behind the correct ones.
        header = ["image", "label", "prediction", "correct", *(f"p {name}" for name in names)]
        for row, sample in enumerate(tested.samples):
            labels, given = (
                "|".join(compress(names, flags[row]))
                for flags in (tested.labels, tested.predictions)
            )
            shares = [f"{share:.6f}" for share in tested.confidence[row]]
            rows.append((escape_csv_cell(sample), labels, given, int(tested.correct[row]), *shares))
        write_text_atomic(run_dir / "predictions_test.csv", csv_text(header, rows))
        return
    # The fields of TestedImages are parallel columns.
    for sample, label, prediction, confidence in zip(*tested, strict=True):
        is_correct = int(label == prediction)
        image = escape_csv_cell(sample)
        rows.append((image, names[label], names[prediction], f"{confidence:.4f}", is_correct))
    write_text_atomic(run_dir / "predictions_test.csv", csv_text(header, rows))


def _write_provenance(training: Training, command: Sequence[str]) -> None:
    arch, run_dir = training.task.arch, training.run_dir
    extra: Json = {
        "backend": arch.backend or "auto",
        "compile": training.task.compile_blocks,
        "model_sha256": file_sha256(run_dir / "model" / "model.safetensors"),
    }
    if arch.pretrained is not None:
        weights = weights_file(arch.pretrained)
        extra["pretrained_sha256"] = None if weights is None else file_sha256(weights)
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
    return None if seed is False else seed  # False: the generators were not seeded


def _test_scores(training: Training, tested: TestedImages, weights: FinalWeights) -> TestScores:
    task, data, metrics = training.task, training.data, training.trainer.callback_metrics
    train_counts = data.class_counts["train"]
    majority = max(train_counts, key=lambda name: train_counts[name])
    always = np.array(data.class_names.index(majority))
    multilabel: dict[str, float] = {}
    if data.multilabel:
        always = np.arange(data.num_classes) == always
        multilabel = _label_scores(tested, float(metrics["test/map"]))
    description = weights.description
    if training.settings.ema.decay is not None:
        description = f"the moving average (EMA) of {description}"
    top5 = None
    if "test/top5" in metrics:
        top5 = float(metrics["test/top5"])
    scores = TestScores(
        correct=int(tested.correct.sum()),
        total=len(tested.samples),
        majority_class=majority,
        majority_correct=int(tested._replace(predictions=always).correct.sum()),
        loss=float(metrics["test/loss"]),
        balanced_accuracy=multilabel.get("recall") or float(metrics.get("test/balanced_acc", 0.0)),
        ece=float(metrics["test/ece"]),
        top5=top5,
        per_class=_class_scores(training, tested),
        multilabel=multilabel,
        weights=description,
        checkpoint=weights.checkpoint.name,
    )
    if task.calibration is None:
        return scores
    return replace(
        scores,
        temperature=task.calibration.temperature,
        calibrated_on=task.calibration.images,
        calibrated_ece=_calibration_error(tested),
    )


def _label_scores(tested: TestedImages, mean_average_precision: float) -> dict[str, float]:
    """Scores of several labels, by the thresholds; `precision` and `recall` are means over the labels, as macro F1."""
    given, labels = torch.from_numpy(tested.predictions).int(), torch.from_numpy(tested.labels)
    count = labels.shape[1]
    return {
        "map": mean_average_precision,
        "chance": float(tested.labels.mean()),
        "f1_micro": float(multilabel_f1_score(given, labels, count, average="micro")),
        "f1_macro": float(multilabel_f1_score(given, labels, count)),
        "precision": float(multilabel_precision(given, labels, count)),
        "recall": float(multilabel_recall(given, labels, count)),
    }


def _calibration_error(tested: TestedImages) -> float | None:
    """The ECE of the calibrated confidence, binned as for test/ece; None if a confidence isn't finite."""
    if not np.isfinite(tested.confidence).all():
        return None
    is_right: Array = tested.correct
    if tested.labels.ndim == 2:
        is_right = tested.labels
    confidence = torch.from_numpy(tested.confidence)
    target = torch.from_numpy(is_right)
    error = binary_calibration_error(confidence, target, n_bins=15)
    return float(error)


def _class_scores(training: Training, tested: TestedImages) -> list[ClassScores]:
    scores = []
    thresholds = _thresholds(training)
    for label, name in enumerate(training.data.class_names):
        is_class, is_given = tested.of_class(label)
        measures: Keywords = {
            measure: values[label] for measure, values in training.task.test_by_class.items()
        }
        recognised = int((is_given & is_class).sum())
        if thresholds:
            measures["threshold"] = thresholds[label]
            measures["precision"] = recognised / max(1, int(is_given.sum()))
            measures["f1"] = 2 * recognised / max(1, int(is_given.sum() + is_class.sum()))
        if not is_class.any():
            measures = dict.fromkeys(measures)  # all None
        if is_class.all():  # AUROC needs images of other classes
            measures["auroc"] = None
        scores.append(ClassScores(name, recognised, int(is_class.sum()), **measures))
    return scores


def _write_class_table(run_dir: Path, scores: Sequence[ClassScores]) -> None:
    header = ["class", "images", "precision", "recall", "f1", "auroc", "ap", "threshold"]
    if scores[0].threshold is None:
        del header[-2:]
    rows = []
    for score in scores:
        shares = (score.precision, score.recall, score.f1, score.auroc, score.ap, score.threshold)
        cells = ["" if share is None else f"{share:.4f}" for share in shares]
        rows.append((escape_csv_cell(score.name), score.images, *cells)[: len(header)])
    write_text_atomic(run_dir / "classes_test.csv", csv_text(header, rows))


def _summarize(
    training: Training, effort: Effort, scores: TestScores, bad_images: BadImages
) -> RunSummary:
    task, data, trainer, run_dir = training.task, training.data, training.trainer, training.run_dir
    stopwatch, monitor = training.stopwatch, training.settings.checkpoint.monitor
    device = device_name(trainer)
    if trainer.world_size > 1:
        device += f", {trainer.world_size} processes"
    notes = [*data.warnings]
    if monitor == BALANCED:
        notes.append("best.ckpt is the epoch with the best balanced accuracy on val.")
    notes += [*effort.notes, *data_wait_advice(stopwatch.data_wait, data)]
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
        notes=notes,
        validations=_validations(run_dir),
    )


def _validations(run_dir: Path) -> list[float]:
    """The accuracy, or mAP, at each validation of the training; empty if it ended before one."""
    curves = read_metrics(run_dir / "metrics.csv")
    curve = curves.get("val/top1", curves.get(MAP))
    return [] if curve is None else curve.values.tolist()


def _most_frequent_mistakes(
    data: ImageDataModule, tested: TestedImages, out: Path
) -> list[tuple[str, str, int, int]]:
    """The pairs of classes for `RunSummary.mistakes`; the most certain of these mistakes are drawn to `out`."""
    dataset = data.contents.datasets["test"]
    row_of = {sample.sample_id: row for row, sample in enumerate(dataset.samples)}
    wrong = np.flatnonzero(~tested.correct)
    pairs = zip(tested.labels[wrong].tolist(), tested.predictions[wrong].tolist(), strict=True)

    mistakes, examples = [], {}  # examples: title -> images
    for (label, answer), times in Counter(pairs).most_common(_NUM_MISTAKES):
        name, taken_for = data.class_names[label], data.class_names[answer]
        mistakes.append((name, taken_for, times, int((tested.labels == label).sum())))

        indices = wrong[(tested.labels[wrong] == label) & (tested.predictions[wrong] == answer)]
        most_certain = indices[np.argsort(-tested.confidence[indices])][
            :_IMAGES_OF_MISTAKE
        ].tolist()
        images = [dataset.pixels(row_of[tested.samples[index]]) for index in most_certain]
        examples[f"{name}, taken for {taken_for}"] = images
    plot_examples(examples, out)
    return mistakes


def _fit_ood(training: Training) -> MahalanobisOOD | None:
    """Fit the out-of-distribution detector to training images, and its threshold to validation images.

    None for a model that is sharded, since it may not fit one device, for one without a linear head, and where images
    have several labels, so that no class has a mean of its own.
    """
    net, data = training.task.net, training.data
    if training.sharded_strategy or linear_head(net) is None or data.multilabel:
        return None
    max_images = {"train": max(IMAGES, 10 * data.num_classes), "val": IMAGES}
    datasets = data.contents.datasets
    count = sum(min(most, len(datasets[split])) for split, most in max_images.items())
    print_rank0(
        f"measuring on {count:,} images what is unlike them, for the distance that predict tells"
    )
    features = features_of(net, data, max_images, training.trainer.strategy.root_device)
    train, val = features["train"], features["val"]
    return fit_ood(train.features, train.labels, val.features)


def _count_strangers(training: Training, detector: MahalanobisOOD | None) -> tuple[int, int] | None:
    """How many test images the detector calls out of distribution, and of how many; None without a detector."""
    if detector is None:
        return None
    device = training.trainer.strategy.root_device
    test = features_of(training.task.net, training.data, {"test": IMAGES}, device)["test"]
    distances = detector(torch.from_numpy(test.features))
    return int((distances > 1).sum()), len(distances)  # 1 is the detector's threshold


def _add_recommendation(result: RunResult, twin: RunResult | None = None) -> RunResult:
    """Add to the summary which model to use: this one, its dense twin, or a linear probe of the pretrained weights.

    They are compared on the test images that all of them classified. Without a probe and a twin nothing is added.
    """
    probe = read_probe(result.run_dir)
    if probe is None and twin is None:
        return result
    samples = [sample for sample in result.correct if twin is None or sample in twin.correct]
    if probe is not None:
        samples = [sample for sample in samples if sample in probe.test_correct]
    if not samples:
        return result

    dense = "dense twin" if probe is None else "dense fine-tune"
    models = [_compared_model(dense, twin, samples)] if twin is not None else []
    name = "Mixture of Experts" if result.summary.layers else dense
    models.append(_compared_model(name, result, samples))
    if probe is not None:
        correct = np.array([probe.test_correct[sample] for sample in samples])
        # The probe predicts as fast as the network that it sits on. models[0] is such a network, unless the probe sits
        # on a dense one and only the MoE model was trained: then that time isn't known.
        same_network_was_timed = twin is not None or probe.of_experts or not result.summary.layers
        ms_per_image = models[0].ms_per_image if same_network_was_timed else None
        models.insert(0, ComparedModel(PROBE, correct, ms_per_image, probe.mbytes, probe.seconds))

    choice = choose(
        models,
        labels=np.array([result.labels[sample] for sample in samples]),
        unbalanced=result.summary.unbalanced,
        experts_given=probe is not None and probe.of_experts,
    )
    return replace(result, summary=replace(result.summary, choice=choice))


def _compared_model(name: str, run: RunResult, samples: Sequence[str]) -> ComparedModel:
    summary = run.summary
    correct = np.array([run.correct[sample] for sample in samples])
    return ComparedModel(
        name, correct, summary.ms_per_image, summary.mbytes or 0.0, summary.duration_s
    )


@torch.no_grad()
def _ms_per_image(training: Training) -> float | None:
    """Median milliseconds of a forward pass with one image; None for a sharded model, which may not fit one device."""
    if training.sharded_strategy:
        return None
    device = training.trainer.strategy.root_device
    net = training.task.net.to(device).eval()
    dtype = next(net.parameters()).dtype  # not float32 under bf16-true or 64-true
    side = training.data.image_size
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, side, side, generator=generator).to(device, dtype)

    # A warm-up pass, then at least 3 and at most 20 that count; after two seconds in all no further one begins.
    times: list[float] = []
    while len(times) < 4 or (len(times) < 21 and sum(times) < 2):
        start_s = time.perf_counter()
        net(image).cpu()  # the copy waits until a GPU is done
        times.append(time.perf_counter() - start_s)
    return float(1000 * np.median(times[1:]))


def write_comparison(result: RunResult, twin: RunResult, match: str) -> RunResult:
    """Add the paired comparison with the dense twin to the run's summary, and return the result with it.

    `match` is the quantity that is equal in both models, e.g. "active FLOPs".
    """
    samples = [sample for sample in result.correct if sample in twin.correct]
    correct = np.array([result.correct[sample] for sample in samples])
    twin_correct = np.array([twin.correct[sample] for sample in samples])
    comparison = TwinComparison(
        difference=paired_difference(correct, twin_correct),
        match=match,
        correct=twin.summary.test.correct,
        cost=twin.summary.cost,
        duration_s=twin.summary.duration_s,
        images_per_s=twin.summary.images_per_s,
        weights=twin.summary.test.weights,
    )
    result = replace(result, summary=replace(result.summary, twin=comparison))
    result = _add_recommendation(result, twin)
    _write_summary(result.summary, result.run_dir)
    return result


def _write_summary(summary: RunSummary, run_dir: Path) -> None:
    write_summary(summary, run_dir / "summary.md")
    write_text_atomic(run_dir / "model" / "README.md", model_card(gather_facts(run_dir, summary)))
    # Written last: `resume.is_finished` takes this file for the sign that the run is complete.
    text = json.dumps(asdict(summary), default=list)
    # Again through JSON, which has neither NaN nor infinity: they become null.
    write_json_atomic(run_dir / "summary.json", json.loads(text, parse_constant=lambda name: None))


# ---- which weights are tested


class FinalWeights(NamedTuple):
    """The checkpoint that is tested, a description of its weights for the summary, and their optimizer step."""

    checkpoint: Path
    description: str
    step: int


class Validated(NamedTuple):
    """Results of one checkpoint on the n validation images, in the order of the validation set."""

    correct: Flags  # [n]
    loss: Floats  # [n]
    labels: Ints  # [n]


def choose_weights(training: Training) -> FinalWeights:
    """Choose the checkpoint to test, by the rule at the top of this file; every process must call it.

    If best.ckpt and last.ckpt were saved at different steps, both classify the validation images once more.
    """
    folder = training.run_dir / "checkpoints"
    best, last = folder / BEST, folder / LAST

    # Without a choice: there is one checkpoint, or the schedule isn't completed.
    default: FinalWeights = broadcast_from_rank0(lambda: final_checkpoint(folder))
    if default.checkpoint != best or not schedule_ended(training.trainer):
        return default
    verified_last = broadcast_from_rank0(lambda: verify(last))
    if verified_last.fault is not None:
        return default

    monitor = cast(str, training.settings.checkpoint.monitor)
    best_step, last_step = default.step, verified_last.step
    if best_step == last_step:
        description = f"the weights of the last epoch, which are the best by {monitor} too"
        return FinalWeights(last, description, last_step)

    # Compare both on the validation images.
    print_rank0(
        f"The last weights, or the best epoch's (step {best_step:,})? Both classify the validation images."
    )
    best_images, last_images = _validate(training, best), _validate(training, last)
    num_best, num_last = len(best_images.labels), len(last_images.labels)
    if num_best != num_last:  # a file that was damaged in between
        return default._replace(
            description="the weights of the best validation epoch, because only "
            f"{num_best:,} and {num_last:,} validation images could be read for them and for the last ones"
        )
    gain, error = gain_of(best_images, last_images, monitor)

    difference_text, error_text = f"{points(gain)} points", f"{100 * error:.1f}"
    if monitor in (LOSS, MAP):  # a gain is a lower loss
        difference_text, error_text = f"{-gain:+.3f}", f"{error:.3f}"
    comparison = (
        f"on {num_last:,} validation images the {_MONITOR_TEXTS[monitor]} of the best epoch, step "
        f"{best_step:,} of {last_step:,}, differs by {difference_text} from that of the last (standard error "
        f"{error_text})"
    )
    if gain > error:
        return default._replace(description=f"{default.description}: {comparison}")
    return FinalWeights(last, f"the weights of the last epoch: {comparison}", last_step)


def gain_of(best: Validated, last: Validated, monitor: str) -> tuple[float, float]:
    """How much better `best` is than `last` by `monitor`, paired by image, and the standard error of that.

    Positive if `best` is better, for a loss too.
    """
    if monitor in (LOSS, MAP):
        decrease = last.loss - best.loss  # [n]
        error = float(sem(decrease)) if len(decrease) > 1 else math.inf
        return float(decrease.mean()), error
    pair: PairedDifference = paired_difference(best.correct, last.correct)
    if monitor == BALANCED:
        pair = paired_macro_difference(best.correct, last.correct, best.labels)
    return pair.difference, pair.standard_error


def schedule_ended(trainer: Trainer) -> bool:
    """Whether training did all its epochs or steps, so that the learning-rate schedule was completed."""
    return trainer.current_epoch == trainer.max_epochs or trainer.global_step == trainer.max_steps


def _validate(training: Training, checkpoint: Path) -> Validated:
    """Classify the validation images with the weights of a checkpoint."""
    task, data, trainer = training.task, training.data, training.trainer
    # No loggers: metrics.csv is for validations during the training only.
    loggers, trainer.loggers = trainer.loggers, []
    try:
        trainer.validate(task, data, ckpt_path=checkpoint, weights_only=True, verbose=False)
    finally:
        trainer.loggers = loggers
    columns = _gather_columns(task.val_outputs)
    return Validated(columns["correct"], columns["loss"].astype(np.float64), columns["label"])


def final_checkpoint(folder: Path) -> FinalWeights:
    """The checkpoint to test if nothing is compared: best.ckpt, or last.ckpt if that one is missing or damaged."""
    best, last = folder / BEST, folder / LAST
    if best.exists():
        verified = verify(best)
        if verified.fault is None:
            return FinalWeights(best, "the weights of the best validation epoch", verified.step)
        print_rank0(f"warning: {best} {verified.fault}: {LAST} is tested instead.")
        description = "the weights of the last epoch, because best.ckpt was damaged"
    else:  # a training that ends within its first epoch
        description = "the weights of the last step, because there is no best.ckpt"
    return FinalWeights(last, description, verify(last).step)


def checkpoint_of_run(run_dir: Path) -> Path:
    """The checkpoint that a run was tested with, by summary.json; without one, `final_checkpoint`."""
    summary, folder = run_dir / "summary.json", run_dir / "checkpoints"
    name = read_summary(summary).test.checkpoint if summary.is_file() else None
    if name == LAST and (folder / LAST).is_file():
        return folder / LAST
    return final_checkpoint(folder).checkpoint
