"""Which score finds wrong labels, and does a training without the suspects get better? Planted ones: runs and report.

    nice -n 19 python -m benchmarks label_noise run --cifar DIR --cats DIR --pretrained FILE --limit 0
    python -m benchmarks label_noise status
    python -m benchmarks label_noise report                                    # README.md's tables

`run` takes the next run that has no record and that no other queue is at: it draws images and flips, trains by
`moevision fit`, and asks each score which labels were flipped; or it leaves out what one of these trainings makes
suspect, and trains again. The same command goes on with a run that was stopped. Two queues may run side by side.

Axes: n images, C classes.
"""

from __future__ import annotations

import csv
import functools
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.curve.shares import schedule, with_interval
from benchmarks.harness import HERE, about, argument_parser, count, positive, print_table
from benchmarks.queue import add_study, do_runs, fill_readme, is_dirty, read_records, refuse_changes
from benchmarks.study import drawn
from benchmarks.timing import rounded
from moevision import package_version
from moevision.analysis.collect import network_input
from moevision.analysis.good_data import RunImages, class_doubt, examine, images_of
from moevision.cli import main as run_moevision
from moevision.data import ImageDataModule
from moevision.data.scores import FILE, KEEP, YES, Scores, prune
from moevision.data.synthetic import SyntheticPets
from moevision.data.transforms import square_pixels
from moevision.errors import UserError, csv_name
from moevision.files import write_text_atomic
from moevision.layers.routing import evaluating
from moevision.models.io import SavedModel, load_model
from moevision.models.safe_files import read_json, read_yaml
from moevision.stats import Gap

FOLDER = HERE / "label_noise"
SHARE, SEEDS, TOP, BATCH = 0.1, (0, 1, 2), 0.1, 256
# Between similar classes, as arXiv:1609.03683 flips CIFAR-10; cat and dog both ways.
SIMILAR = {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}
DRAWN_SIDE, DRAWN_TEST = 32, 800


@dataclass(frozen=True)
class Noise:
    """What is trained on, and which labels are wrong.

    Attributes:
        data: cifar10, cats_vs_dogs, or drawn, a folder that is drawn.
        images: of the training set that are used.
        epochs: of a training.
        fit: options of it.
        arms: what is trained.
        title: in the report.
    """

    data: str
    images: int
    epochs: int
    fit: tuple[str, ...]
    arms: tuple[str, ...]
    title: str


NOISES = {
    "random": Noise("cifar10", 20_000, 5, ("--config", "cifar10"), ("moe", "dropped", "drawn", "dense"),
                    "CIFAR-10, random flips"),
    "similar": Noise("cifar10", 20_000, 5, ("--config", "cifar10"), ("moe", "dense"),
                     "CIFAR-10, flips between similar classes"),
    "cats": Noise("cats_vs_dogs", 1_000, 3, ("--config", "cats_vs_dogs", "--data.image_size", "112"), ("moe",),
                  "cats_vs_dogs, from a pretrained ViT"),
    "folder": Noise("drawn", 2_400, 10, ("--config", "cifar10"), ("moe",), "A folder of drawn animals"),
}  # fmt: skip
# `dropped` and `drawn` train as `moe` without a tenth of the images: those of lowest AUM in `moe`, or any.
ARMS = {"moe": (), "dropped": (), "drawn": (), "dense": ("--model.arch.twin", "active_flops")}
DROPS = {"dropped": "aum", "drawn": "random"}


@dataclass(frozen=True)
class Job:
    """A run: which labels are wrong, what is trained, and the seed of images, flips and training."""

    noise: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """What its record and its run folder are called."""
        return f"{self.noise}-{self.arm}-s{self.seed}"


def jobs(_: object, options: Namespace) -> Iterator[Job]:
    """All runs, an arm after the other: what is left out is known by `moe`."""
    for arm in ARMS:
        for seed in options.seeds:
            for noise in options.noise:
                if arm in NOISES[noise].arms and arm in options.arm:
                    yield Job(noise, arm, seed)


# ---- flips


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


def plant(job: Job, options: Namespace) -> tuple[list[str], list[str], set[str]]:
    """Write what is trained on, unless it is there: lists, or a folder; the same for all arms.

    Returns:
        Options of fit: where the data are, and lists of them; the images with wrong labels, as `csv_name` writes them.
    """
    noise, wrong = NOISES[job.noise], options.work / f"{job.noise}-s{job.seed}-flips.csv"
    if noise.data == "drawn":
        folder = options.work / f"{job.noise}-s{job.seed}"
        if not wrong.exists():
            write_text_atomic(wrong, "image\n" + "".join(f"{name}\n" for name in draw_folder(folder, job, options)))
        return _found_in(folder), [], _images_in(wrong)
    keep, data = options.work / f"{job.noise}-s{job.seed}-images.csv", getattr(options, noise.data)
    if data is None:
        raise UserError(f"{job.name} needs images: say where {noise.data} is, see --help.")
    if not (keep.exists() and wrong.exists()):
        module = ImageDataModule(str(data), image_size=32, cache_mb=0)
        module.setup()
        train, names = module.contents.datasets["train"].samples, module.class_names
        some = drawn([sample.label for sample in train], options.images or noise.images, job.seed)
        flips = flipped([train[index].label for index in some], job.noise, names, job.seed)
        write_text_atomic(keep, "image\n" + "".join(f"{csv_name(train[index].sample_id)}\n" for index in some))
        rows = [f"{csv_name(train[some[place]].sample_id)},{csv_name(names[to])}\n" for place, to in flips.items()]
        write_text_atomic(wrong, "image,new_label\n" + "".join(rows))
    return _found_in(data), ["--data.keep", str(keep), "--data.relabel", str(wrong)], _images_in(wrong)


def _found_in(folder: Path) -> list[str]:
    return ["--data.path", str(folder), "--data.download", "false"]


def draw_folder(folder: Path, job: Job, options: Namespace) -> list[str]:
    """Draw animals into train/ and test/; names of the training images that lie in the folder of another class."""
    wrong = []
    for split, many in (("train", options.images or NOISES[job.noise].images), ("test", DRAWN_TEST)):
        pets = SyntheticPets(many, DRAWN_SIDE, job.seed, split)
        labels = [pets.label(index) for index in range(many)]
        flips = flipped(labels, job.noise, pets.classes, job.seed) if split == "train" else {}
        for index, label in enumerate(labels):
            file = folder / split / pets.classes[flips.get(index, label)] / f"{index:05d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pets[index][0].save(file)
            if index in flips:
                wrong.append(csv_name(file.relative_to(folder).as_posix()))
    return wrong


def _images_in(file: Path) -> set[str]:
    with file.open(newline="", encoding="utf-8") as rows:
        return {row["image"] for row in csv.DictReader(rows) if row.get(KEEP, YES) == YES}


# ---- one run


def run_one(job: Job, options: Namespace) -> dict[str, Any]:
    """Train and ask; the record."""
    origin = {**about(), "command": "python -m benchmarks label_noise run"}  # without this machine's folders
    noise = NOISES[job.noise]
    epochs, folder = options.epochs or noise.epochs, options.work / job.name
    data, lists, wrong = plant(job, options)
    length = ["--trainer.max_epochs", str(epochs)]
    if job.arm in DROPS:
        lists, length = without(job, options, relabelled=bool(lists))
    if "cats_vs_dogs" in noise.fit and options.pretrained:
        data += ["--pretrained", str(options.pretrained)]
    code = run_moevision([
        "fit", *noise.fit, "--name", job.name, "--runs_root", str(options.work), "--resume", "auto", *data, *lists,
        "--data.scores", "true", "--seed_everything", str(job.seed), *length,
        "--trainer.enable_progress_bar", "false", *ARMS[job.arm], *options.fit,
    ])  # fmt: skip
    if code:
        raise UserError(f"{job.name} ended with code {code}, see above: the same command goes on.")
    summary = read_json(folder / "summary.json")
    test, spent = summary["test"], round(summary["cpu_s"], 1)  # of all its sessions
    record = {**vars(job), "epochs": epochs, "test_top1": test["correct"] / test["total"], "cpu_s": spent}
    if job.arm in DROPS:
        kept = _images_in(options.work / f"{job.name}.csv")
        return {**record, "images": len(kept), "flips": len(wrong & kept), **origin}
    suspicion, truth = suspicions(folder, wrong)
    found = {name: finds(value, truth) for name, value in suspicion.items()}
    return {**record, "images": len(truth), "flips": int(truth.sum()), "scores": found,
            "cleanlab": package_version("cleanlab"), **origin}  # fmt: skip


def without(job: Job, options: Namespace, *, relabelled: bool) -> tuple[list[str], list[str]]:
    """Write the list of what stays; options of fit that name it, and for as many steps as `moe` took.

    Raises:
        UserError: if `moe` isn't finished in this work folder.
    """
    whole = options.work / f"{job.noise}-moe-s{job.seed}"
    if not (whole / "summary.json").exists():
        raise UserError(f"{job.name} leaves out what {whole.name} found: run that first, with the same --work.")
    scores, keep = Scores.read(whole / FILE), options.work / f"{job.name}.csv"
    plan = prune(scores, DROPS[job.arm], 1 - SHARE, seed=job.seed)
    plan.write(keep, scores, relabelled=relabelled)
    steps, epoch = schedule(read_yaml(whole / "config.yaml"), len(scores.images))
    return ["--data.keep", str(keep), *(("--data.relabel", str(keep)) if relabelled else ())], [
        "--trainer.max_steps", str(steps), "--trainer.max_epochs", "-1", "--trainer.val_check_interval", str(epoch),
        "--trainer.check_val_every_n_epoch", "null",
    ]  # fmt: skip


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
    torch.set_num_threads(options.threads)
    do_runs(functools.partial(jobs, options=options), run_one, _told, options)


def _told(job: Job, record: Mapping[str, Any]) -> str:
    found = f", AUM {record['scores']['aum']}" if "scores" in record else ""
    return f"{job.name}: top-1 {record['test_top1']:.2%}{found}, {record['cpu_s']:.0f} s CPU"


def table(records: Sequence[dict[str, Any]], noise: str) -> list[str]:
    """Lines of Markdown: a row per score, mean ± SD over seeds, for each arm that has scores."""
    own = {
        arm: [run["scores"] for run in records if (run["noise"], run["arm"]) == (noise, arm)]
        for arm in NOISES[noise].arms
        if arm not in DROPS
    }
    names = list(dict.fromkeys(name for runs in own.values() for scores in runs for name in scores))
    head = [f"{what}, {arm}" for arm in own for what in ("AUROC", f"top {TOP:.0%}")]
    lines = [f"| score | {' | '.join(head)} |", "|---|" + "---|" * len(head)]
    for name in names:
        cells = [_cell([scores[name][what] for scores in own[arm] if name in scores])
                 for arm in own for what in ("auroc", "precision")]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def dropping(records: Sequence[dict[str, Any]], noise: str) -> list[str]:
    """Lines of Markdown: test accuracy without the suspects, beside all images and beside any tenth less."""
    by_arm = {
        arm: {run["seed"]: run for run in records if (run["noise"], run["arm"]) == (noise, arm)}
        for arm in ("moe", *DROPS)
    }
    if not by_arm["dropped"]:
        return []
    said = {
        "moe": "all images",
        "dropped": "without the tenth of lowest AUM",
        "drawn": "without a tenth drawn at random",
    }
    lines = ["| training | wrong labels left | seeds | top-1, % | beside all, points | beside drawn |",
             "|---|--:|--:|---|---|---|"]  # fmt: skip
    for arm, runs in by_arm.items():
        if runs:
            beside = [_beside(runs, by_arm[other]) if other != arm else "" for other in ("moe", "drawn")]
            wrong = statistics.fmean(run["flips"] for run in runs.values())
            top1 = _cell([100 * run["test_top1"] for run in runs.values()], ".2f")
            lines.append(f"| {said[arm]} | {wrong:.0f} | {len(runs)} | {top1} | {' | '.join(beside)} |")
    return lines


def _beside(mine: Mapping[int, Any], other: Mapping[int, Any]) -> str:
    common = sorted(mine.keys() & other.keys())
    return with_interval(Gap.of([100 * (mine[seed]["test_top1"] - other[seed]["test_top1"]) for seed in common]))


def _cell(values: Sequence[float], form: str = ".3f") -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{spread}"


def parts_of(records: Sequence[dict[str, Any]]) -> list[str]:
    """What stands in the README: a table for each kind of noise; runs from a changed tree are left out."""
    clean = [record for record in records if not is_dirty(record)]
    parts = []
    for noise, its in NOISES.items():
        own = [record for record in clean if record["noise"] == noise]
        if own:
            accuracy = _cell([100 * run["test_top1"] for run in own if run["arm"] == "moe"], ".1f")
            head = f"**{its.title}** (test top-1 of the MoE: {accuracy} %)"
            parts += ["\n\n".join([head, "\n".join(table(own, noise))])]
            parts += ["\n".join(lines)] if (lines := dropping(own, noise)) else []
    return parts or ["Not run yet."]


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
    add("--cifar", dest="cifar10", type=Path, metavar="DIR", help="CIFAR-10 as a folder")
    add("--cats", dest="cats_vs_dogs", type=Path, metavar="DIR", help="photos of cats and dogs as a folder")
    add("--pretrained", type=Path, metavar="FILE", help="safetensors of the pretrained ViT-S/14, for these photos")
    add("--noise", nargs="+", choices=tuple(NOISES), default=tuple(NOISES), help="(all)")
    add("--arm", nargs="+", choices=tuple(ARMS), default=tuple(ARMS), help="(all)")
    add("--seeds", nargs="+", type=count, default=SEEDS, metavar="N", help="(0 1 2)")
    add("--images", type=positive, metavar="N", help="training images (the protocol's)")
    add("--epochs", type=positive, metavar="N", help="(the protocol's)")
    add("--fit", action="append", default=[], metavar="OPTION", help="one more option of fit: --fit=--data.cache_mb=0")
    add("--threads", type=positive, default=1, help="(%(default)s)")
    add_study(known, FOLDER)
    return known


def main() -> None:
    """Run, tell or report."""
    options = parser().parse_args()
    {"run": run, "status": status, "report": report}[options.verb](options)
