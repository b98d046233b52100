"""Which score finds wrong labels? Planted flips on CIFAR-10: the queue of runs, and their report.

    nice -n 19 python -m benchmarks label_noise run --data path/to/cifar10 --limit 0    # two such queues may run
    python -m benchmarks label_noise status
    python -m benchmarks label_noise report                                             # README.md's table

`run` takes the next run that has no record and that no other queue is at: it draws images and flips, trains by
`moevision fit --config cifar10 --data.keep --data.relabel`, and asks each score which labels were flipped. The same
command goes on with a run that was stopped.

Axes: n images, C classes.
"""

from __future__ import annotations

import csv
import functools
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import HERE, about, argument_parser, count, positive, print_table
from benchmarks.queue import fill_readme, is_dirty, next_run, read_records, refuse_changes, release_if, write_run
from benchmarks.timing import rounded
from moevision import package_version
from moevision.analysis.collect import evaluating, network_input
from moevision.analysis.good_data.examine import RunImages, examine, images_of
from moevision.cli import main as run_moevision
from moevision.data import ImageDataModule
from moevision.data.doubt import class_doubt
from moevision.data.scores import FILE, Scores
from moevision.data.transforms import square_pixels
from moevision.errors import UserError
from moevision.files import write_text_atomic
from moevision.models.io import SavedModel, load_model
from moevision.models.safe_files import read_json
from moevision.names import csv_name

FOLDER = HERE / "label_noise"
IMAGES, SHARE, EPOCHS, SEEDS, TOP, BATCH = 20_000, 0.1, 5, (0, 1, 2), 0.1, 256
ARMS = {"moe": (), "dense": ("--model.arch.twin", "active_flops")}
# Between similar classes, as arXiv:1609.03683 flips CIFAR-10; cat and dog both ways.
SIMILAR = {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}
NOISES = ("random", "similar")


@dataclass(frozen=True)
class Job:
    """A run: which labels are flipped, what is trained, and the seed of images, flips and training."""

    noise: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """What its record and its run folder are called."""
        return f"{self.noise}-{self.arm}-s{self.seed}"


def jobs(_: object, options: Namespace) -> Iterator[Job]:
    """All runs: every arm of a seed before the next seed."""
    for seed in options.seeds:
        for noise in options.noise:
            for arm in options.arm:
                yield Job(noise, arm, seed)


# ---- flips


def drawn(labels: Sequence[int], images: int, seed: int) -> list[int]:
    """Indices of at most `images` images, in order, as many of each class as it has room for."""
    label, generator = np.array(labels), np.random.default_rng(seed)
    each = images // (label.max() + 1)
    return sorted(
        int(index) for c in range(label.max() + 1) for index in generator.permutation(np.flatnonzero(label == c))[:each]
    )


def flipped(labels: Sequence[int], noise: str, class_names: Sequence[str], seed: int) -> dict[int, int]:
    """Index -> wrong class of a share `SHARE` of the images.

    Args:
        labels: [n].
        noise: `random`: every image alike, to any other class alike; `similar`: images of the classes of `SIMILAR`.
        class_names: [C].
        seed: of what is drawn.
    """
    label, generator = np.array(labels), np.random.default_rng([seed, 1])
    able = np.arange(len(label))
    if noise == "similar":
        able = np.flatnonzero(np.isin(label, [class_names.index(name) for name in SIMILAR]))
    chosen = generator.choice(able, round(SHARE * len(label)), replace=False)
    if noise == "similar":
        return {int(i): class_names.index(SIMILAR[class_names[label[i]]]) for i in chosen}
    shift = generator.integers(1, len(class_names), len(chosen))
    return {int(i): int((label[i] + by) % len(class_names)) for i, by in zip(chosen, shift, strict=True)}


def plant(job: Job, options: Namespace) -> tuple[Path, Path]:
    """Write the lists of the images and of their flips, unless they are there; the same for both arms."""
    keep, relabel = (options.work / f"{job.noise}-s{job.seed}-{what}.csv" for what in ("images", "flips"))
    if keep.exists() and relabel.exists():
        return keep, relabel
    data = ImageDataModule(str(options.data), image_size=32, cache_mb=0)
    data.setup()
    train, names = data.contents.datasets["train"].samples, data.class_names
    some = drawn([sample.label for sample in train], options.images, job.seed)
    flips = flipped([train[index].label for index in some], job.noise, names, job.seed)
    write_text_atomic(keep, "image\n" + "".join(f"{csv_name(train[index].sample_id)}\n" for index in some))
    rows = [f"{csv_name(train[some[place]].sample_id)},{csv_name(names[wrong])}\n" for place, wrong in flips.items()]
    write_text_atomic(relabel, "image,new_label\n" + "".join(rows))
    return keep, relabel


# ---- one run


def run_one(job: Job, options: Namespace) -> dict[str, Any]:
    """Train and ask; the record."""
    origin = {**about(), "command": "python -m benchmarks label_noise run"}  # without this machine's folders
    keep, relabel = plant(job, options)
    began = time.process_time()
    code = run_moevision([
        "fit", "--config", options.config, "--name", job.name, "--runs_root", str(options.work), "--resume", "auto",
        "--data.path", str(options.data), "--data.download", "false", "--data.scores", "true",
        "--data.keep", str(keep), "--data.relabel", str(relabel), "--seed_everything", str(job.seed),
        "--trainer.max_epochs", str(options.epochs), "--trainer.enable_progress_bar", "false",
        *ARMS[job.arm], *options.fit,
    ])  # fmt: skip
    if code:
        raise UserError(f"{job.name} ended with code {code}, see above: the same command goes on.")
    spent, folder = time.process_time() - began, options.work / job.name
    with relabel.open(newline="", encoding="utf-8") as file:
        wrong = {row["image"] for row in csv.DictReader(file)}
    suspicion, truth = suspicions(folder, wrong)
    test = read_json(folder / "summary.json")["test"]
    return {
        **vars(job), "images": len(truth), "flips": int(truth.sum()), "epochs": options.epochs,
        "test_top1": test["correct"] / test["total"],
        "scores": {name: finds(value, truth) for name, value in suspicion.items()},
        "cpu_s": round(spent, 1), "cleanlab": package_version("cleanlab"), **origin,
    }  # fmt: skip


def suspicions(run_dir: Path, wrong: set[str]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Score -> [n], the higher the more suspicious, and [n] whether the label was flipped."""
    scores, images = Scores.read(run_dir / FILE), images_of(run_dir)
    known = examine(images, scores, load_model(str(run_dir)))
    truth = np.array([csv_name(sample.sample_id) in wrong for sample in images.samples["train"]])
    labels, value = images.labels[: len(truth)], known.scores
    found = {
        "aum": -value["aum"], "el2n": value["el2n"], "loss_mean": value["loss_mean"], "loss_last": value["loss_last"],
        "p_mean": -value["p_mean"], "p_std": value["p_std"], "forgetting": value["forgetting"],
        "correct": -value["correct"],
    }  # fmt: skip
    for block, shares in known.experts.items():
        found[f"experts L{block}"] = class_doubt(shares, labels)
    if known.experts:
        found["experts"] = known.unlike_class
    found |= final_scores(labels, probabilities(images, load_model(str(run_dir))))
    if known.features is not None:
        found["features"] = class_doubt(known.features[: len(truth)].astype(np.float32), labels)
    return found, truth


def probabilities(images: RunImages, model: SavedModel) -> np.ndarray:
    """[n, C] what the finished model says of the training images, without augmentation."""
    train, found = images.samples["train"], []
    with evaluating(model.net), torch.inference_mode():
        for start in range(0, len(train), BATCH):
            opened = [images.collection.open(sample, model.image_size) for sample in train[start : start + BATCH]]
            pixels = np.stack([square_pixels(image, model.image_size) for image in opened])
            found.append(model.net(network_input(model, pixels)).float().softmax(-1).numpy())
    return np.concatenate(found)


def final_scores(labels: np.ndarray, p: np.ndarray) -> dict[str, np.ndarray]:
    """The finished model's p of the label; and what cleanlab, if it is installed, makes of the same p [n, C]."""
    found = {"p_final": -p[np.arange(len(p)), labels]}
    if find_spec("cleanlab") is not None:
        from cleanlab.rank import get_label_quality_scores

        for method in ("self_confidence", "normalized_margin", "confidence_weighted_entropy"):
            found[f"cleanlab {method}"] = -get_label_quality_scores(labels, p, method=method)
        found["cleanlab adjusted"] = -get_label_quality_scores(labels, p, adjust_pred_probs=True)
    return found


def finds(suspicion: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """How well a score finds the flips: area under the ROC curve, and their share among the first `TOP` of the images.

    An image without a score counts as the least suspicious one.
    """
    from sklearn.metrics import roc_auc_score

    value = np.where(np.isfinite(suspicion), suspicion, -np.inf)
    value = np.where(np.isneginf(value), np.min(value[np.isfinite(value)]) - 1, value).astype(np.float64)
    first = np.argsort(-value, kind="stable")[: round(TOP * len(value))]
    return {
        "auroc": rounded(float(roc_auc_score(truth, value)), 4),
        "precision": rounded(float(truth[first].mean()), 4),
    }


# ---- the queue and the report


def run(options: Namespace) -> None:
    """Do the next runs."""
    refuse_changes(FOLDER / "README.md", allowed=options.allow_dirty)
    done = 0
    while not options.limit or done < options.limit:
        job, held = next_run(functools.partial(jobs, options=options), options.out, options.work)
        if job is None:
            print("Nothing is left to do here.", file=sys.stderr)
            return
        torch.set_num_threads(options.threads)
        try:
            record = run_one(job, options)
            write_run(options.out, job.name, record)
        finally:
            release_if(held)
        done += 1
        print(f"{job.name}: AUM {record['scores']['aum']}, {record['cpu_s']:.0f} s CPU", flush=True)


def table(records: Sequence[dict[str, Any]], noise: str) -> list[str]:
    """Lines of Markdown: a row per score, mean ± SD over seeds, both arms."""
    own = {arm: [run["scores"] for run in records if (run["noise"], run["arm"]) == (noise, arm)] for arm in ARMS}
    names = list(dict.fromkeys(name for runs in own.values() for scores in runs for name in scores))
    head = [f"{what}, {arm}" for arm in ARMS for what in ("AUROC", f"top {TOP:.0%}")]
    lines = [f"| score | {' | '.join(head)} |", "|---|" + "---|" * len(head)]
    for name in names:
        cells = [_cell([scores[name][what] for scores in own[arm] if name in scores])
                 for arm in ARMS for what in ("auroc", "precision")]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def parts_of(records: Sequence[dict[str, Any]]) -> list[str]:
    """What stands in the README: a table for each kind of noise; runs from a changed tree are left out."""
    clean = [record for record in records if not is_dirty(record)]
    noises = [noise for noise in NOISES if any(record["noise"] == noise for record in clean)]
    return [f"**{noise} flips**\n\n" + "\n".join(table(clean, noise)) for noise in noises] or ["Not run yet."]


def report(options: Namespace) -> None:
    """Put the tables into the README."""
    fill_readme(options.readme, parts_of(read_records(options.out)))


def status(options: Namespace) -> None:
    """Print what is done."""
    rows = [[job.name, "done" if (options.out / f"{job.name}.json").exists() else ""] for job in jobs([], options)]
    print_table("runs of the study of label noise", ["run", "state"], rows)


def parser() -> ArgumentParser:
    """The command line."""
    known = argument_parser("label_noise", __doc__)
    add = known.add_argument
    add("verb", choices=("run", "status", "report"))
    add("--data", type=Path, metavar="DIR", help="CIFAR-10 as a folder")
    add("--noise", nargs="+", choices=NOISES, default=NOISES, help="(both)")
    add("--arm", nargs="+", choices=tuple(ARMS), default=tuple(ARMS), help="(both)")
    add("--seeds", nargs="+", type=count, default=SEEDS, metavar="N", help="(0 1 2)")
    add("--limit", type=count, default=1, help="runs to do; 0: until none is left (%(default)s)")
    add("--images", type=positive, default=IMAGES, metavar="N", help="training images (%(default)s)")
    add("--epochs", type=positive, default=EPOCHS, metavar="N", help="(%(default)s)")
    add("--config", default="cifar10", help="recipe (%(default)s)")
    add("--fit", action="append", default=[], metavar="OPTION", help="one more option of fit: --fit=--data.cache_mb=0")
    add("--threads", type=positive, default=1, help="(%(default)s)")
    add("--work", type=Path, default=Path("runs/label_noise"), help="run folders and lists (%(default)s)")
    add("--out", type=Path, default=FOLDER / "runs", help="records (%(default)s)")
    add("--readme", type=Path, default=FOLDER / "README.md", help="where tables go (%(default)s)")
    add("--allow-dirty", action="store_true", help="run: try it out; the report leaves the run out")
    return known


def main() -> None:
    """Run, tell or report."""
    options = parser().parse_args()
    if options.verb == "run" and options.data is None:
        raise UserError("Say where CIFAR-10 is: --data path/to/cifar10.")
    {"run": run, "status": status, "report": report}[options.verb](options)
