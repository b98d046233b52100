"""summary.md of a run folder: one page that a student can read without knowing the code.

`write_summary` adds nothing to what its RunSummary says, except intervals and chance levels that follow
from the counts. Parts without data (no twin, no bad image) are left out or said to be absent.
"""

import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from moevision.efficiency import ModelCost
from moevision.files import write_text_atomic
from moevision.metrics import LayerLoad
from moevision.names import shown
from moevision.train.intervals import accuracy_interval
from moevision.train.markdown import cell, duration, flops, percent, points, table
from moevision.train.run_summary import RunSummary, TestScores, TwinComparison

_MAX_LISTED = 20  # classes; beyond that the page names only the weakest
_MAX_LISTED_BAD_IMAGES = 10

RUN_FILES = {
    "config.yaml": "every setting of this run",
    "curves.png": "loss, accuracy, expert load and learning rate over training",
    "confusion.png": "which class was taken for which on the test images",
    "predictions_test.csv": "every test image with its label and the model's answer",
    "model": "the trained model: weights (safetensors), config.json with class names and preprocessing, its card",
    "checkpoints": "training states to resume from",
    "metrics.csv": "all logged numbers, one row per logging step",
    "splits.csv": "which image is in which split; reused when the run goes on",
    "guard.csv": "updates that were left out and returns to an earlier state, with the reason and the images",
    "bad_images.csv": "files that could not be read, with the reason",
    "twin": "the dense twin's own run",
    "provenance.json": "version, commit, command, seed, machine and libraries behind these numbers",
}
"""What may lie in a run folder and what it is, in the order in which a reader needs it."""

_READING_LOADS = """\
Max/mean load is 1.00 when every expert gets the same work; CV² (variance ÷ mean² of the loads) is 0 then.
A perfectly balanced router would still give about the CV² by chance on so many images: choices of one image go
together, so it follows from how much the images' own loads differ. A dead expert was chosen by no token. Entropy
is near its maximum when the router hardly prefers any expert, and near 0 when each token has one clear choice."""

_READING_TWIN = """\
One seed: no ranking. The interval says what other test images could change; another seed can move both
models as well."""


def write_summary(summary: RunSummary, out: Path) -> None:
    """Write summary.md, whole or not at all; the files it lists are those that lie beside `out` by then.

    Raises:
        OSError: the folder can't be written.
    """
    run = Path(out).parent
    sections = [
        _headline(summary),
        _what_was_trained(summary),
        scores_section(summary.test),
        experts_section(summary.layers),
        cost_section(summary),
        twin_section(summary, summary.twin) if summary.twin else "",
        _left_out(summary),
        _files(run),
        _next(summary.next_commands or default_next_commands(run)),
    ]
    write_text_atomic(out, "\n\n".join(filter(None, sections)) + "\n")


def default_next_commands(run: Path) -> list[tuple[str, str]]:
    """What a person wants after a run, as (purpose, command) with this run's own paths."""
    config, best, model = (shlex.quote(str(run / name)) for name in ("config.yaml", "checkpoints/best.ckpt", "model"))
    return [
        ("Classify your own pictures", f"moevision predict {model} IMAGE_OR_FOLDER"),
        ("See size and cost beside a dense model", f"moevision info {model}"),
        ("Test once more", f"moevision test --config {config} --ckpt_path {best}"),
    ]


def _headline(summary: RunSummary) -> str:
    test = summary.test
    low, high = accuracy_interval(test.correct, test.total)
    return (
        f"# {cell(summary.name)}\n\n"
        f"**{percent(test.correct / test.total)} of the test images recognised** ({test.correct:,} of "
        f"{test.total:,}; 95 % interval {percent(low)} to {percent(high)}). Always answering "
        f"“{cell(test.majority_class)}”, the most frequent class in training, gets "
        f"{percent(test.majority_correct / test.total)}."
    )


def _what_was_trained(summary: RunSummary) -> str:
    counts = summary.class_counts
    classes = list(dict.fromkeys(name for split in counts.values() for name in split))
    images = ", ".join(f"{sum(split.values()):,} {name}" for name, split in counts.items())
    lines = [
        "## What was trained on what\n",
        f"- Model: {cell(summary.model)}",
        f"- Data: {cell(summary.data)}, seen at {summary.image_size} × {summary.image_size} pixels",
        f"- Images: {images}; {len(classes)} classes",
        f"- Seed: {'none' if summary.seed is None else summary.seed}",
        f"\n{summary.split_note.strip()}",
    ]
    if len(classes) <= _MAX_LISTED:
        rows = [[name, *(f"{split.get(name, 0):,}" for split in counts.values())] for name in classes]
        lines.append("\n" + table(["class", *counts], rows))
    return "\n".join(lines)


def scores_section(test: TestScores) -> str:
    """Accuracy with its interval, the chance level, and every class; the model card has it too."""
    low, high = accuracy_interval(test.correct, test.total)
    interval = f"{percent(low)} to {percent(high)} (Wilson, 95 %): how far other test images could move it"
    rows = [["top-1 accuracy", percent(test.correct / test.total), interval]]
    if test.top5 is not None:
        rows.append(["top-5 accuracy", percent(test.top5), "the right class is among the five likeliest"])
    majority = f"always answering “{test.majority_class}”"
    rows += [
        ["majority-class baseline", percent(test.majority_correct / test.total), majority],
        [
            "balanced accuracy",
            percent(test.balanced_accuracy),
            "mean over classes, so rare ones count alike",
        ],
        ["calibration error (ECE)", percent(test.ece), "mean gap between stated confidence and accuracy"],
        ["loss", f"{test.loss:.3f}", "cross-entropy in nats"],
    ]
    text = f"## Test results\n\nTested: {test.weights}.\n\n" + table(["measure", "value", "meaning"], rows, "lrl")
    if not test.per_class:
        return text
    shown, caption = list(test.per_class), "Recognised per class:"
    if len(shown) > _MAX_LISTED:
        shown = sorted((row for row in shown if row[2]), key=lambda row: row[1] / row[2])[:10]
        caption = f"The weakest {len(shown)} of {len(test.per_class)} classes:"
    recalls = [[name, percent(right / n) if n else "–", f"{right:,} of {n:,}"] for name, right, n in shown]
    return f"{text}\n\n{caption}\n\n" + table(["class", "recall", "test images"], recalls)


def experts_section(layers: Sequence[LayerLoad]) -> str:
    """Load of every MoE layer beside its chance floor; the model card has it too."""
    if not layers:
        return "## Experts\n\nThis model has no Mixture-of-Experts layer."
    rows = [
        [
            f"block {layer.layer}",
            str(len(layer.counts)),
            f"{layer.max_over_mean:.2f}",
            f"{layer.cv_squared:.2g}",
            f"{layer.cv_squared_floor:.1g}",
            str(layer.dead),
            f"{layer.entropy_bits:.2f} of {math.log2(len(layer.counts)):.2f}",
        ]
        for layer in layers
    ]
    heads = ["layer", "experts", "max/mean load", "CV²", "CV² by chance", "dead", "router entropy (bits)"]
    counted = "Hard counts over the whole test split, no noise."
    return f"## Experts\n\n{counted}\n\n{table(heads, rows)}\n\n{_READING_LOADS}"


def cost_rows(cost: ModelCost) -> list[list[str]]:
    """(quantity, value) of a model's size and cost."""
    return [
        ["parameters, total", f"{cost.total_parameters:,}"],
        ["parameters, active per token", f"{cost.active_parameters:,}"],
        ["FLOPs per image (active, without routers)", flops(cost.flops_per_image)],
        ["FLOPs per image of the routers", flops(cost.router_flops_per_image)],
    ]


def cost_section(summary: RunSummary) -> str:
    """Parameters, FLOPs and how the training went; the model card has it too."""
    rows = [
        *cost_rows(summary.cost),
        ["training time", duration(summary.duration_s)],
        ["training speed", f"{summary.images_per_s:,.0f} images/s"],
        ["waiting for data", _data_wait(summary.data_wait)],
        [
            "epochs; optimizer steps; images per step",
            f"{summary.epochs}; {summary.steps:,}; {summary.batch_size:,}",
        ],
        ["device; precision", f"{summary.device}; {summary.precision}"],
    ]
    return "## Size, cost and time\n\n" + table(["quantity", "value"], rows)


def _data_wait(share: float | None) -> str:
    return "not measured" if share is None else f"{percent(share)} of the training steps' time"


def twin_section(summary: RunSummary, twin: TwinComparison) -> str:
    """The paired comparison with the dense twin; the model card has it too."""
    pair, costs = twin.difference, (summary.cost, twin.cost)
    rows = [
        ["test accuracy", *(percent(correct / pair.n) for correct in (summary.test.correct, twin.correct))],
        ["parameters, total", *(f"{cost.total_parameters:,}" for cost in costs)],
        ["parameters, active per token", *(f"{cost.active_parameters:,}" for cost in costs)],
        ["FLOPs per image", *(flops(cost.flops_per_image + cost.router_flops_per_image) for cost in costs)],
        [
            "training speed",
            *(f"{speed:,.0f} images/s" for speed in (summary.images_per_s, twin.images_per_s)),
        ],
        ["training time", *(duration(seconds) for seconds in (summary.duration_s, twin.duration_s))],
    ]
    return "\n\n".join(
        [
            "## Beside its dense twin",
            "The twin has an ordinary MLP wherever this model has experts. It has the same "
            f"{twin.match}, was trained by the same recipe\nand tested on the same images.",
            table(["", "this model", "dense twin"], rows),
            "Difference in test accuracy (this model − twin): "
            f"**{points(pair.difference)} percentage points**, {100 * pair.level:.0f} % interval "
            f"{points(pair.low)} to {points(pair.high)}\n(Tango's score interval for paired proportions, "
            f"{pair.n:,} images; only this model right: {pair.only_a:,}, only the twin right: "
            f"{pair.only_b:,};\nexact McNemar p = {pair.p_value:.2g}).",
            _READING_TWIN,
        ]
    )


def _left_out(summary: RunSummary) -> str:
    bad = list(summary.bad_images)
    lines = [f"- {cell(note)}" for note in summary.notes]
    if bad:
        files = "1 file" if len(bad) == 1 else f"{len(bad):,} files"
        lines.append(f"- {files} could not be read and took no part (all in bad_images.csv):")
        lines += [f"  - {cell(f'{path} ({split}): {reason}')}" for path, reason, split in bad[:_MAX_LISTED_BAD_IMAGES]]
    else:
        lines.append("- Bad images: none.")
    return "## Skipped or not as usual\n\n" + "\n".join(lines)


def _files(run: Path) -> str:
    lines = [f"- `{name}`: {text}" for name, text in RUN_FILES.items() if (run / name).exists()]
    return "## In this folder\n\n" + "\n".join(lines) if lines else ""


def _next(commands: Iterable[tuple[str, str]]) -> str:
    return "## What next\n\n" + "\n\n".join(f"{purpose}:\n\n    {shown(command)}" for purpose, command in commands)
