"""Train on fewer images, chosen by several methods, and compare with training on all.

    python -m benchmarks curve of runs/pets
    python -m benchmarks curve of runs/pets --shares 0.7 --by random ccs --seeds 5

Every training is the recipe of the run's config.yaml with its number of steps: fewer images are seen more often, and
are validated after as many steps, so that less data is not less training. A seed draws initial weights, order,
augmentation and, where the method draws, the images; differences are between trainings of one seed, on the same test
images. The scores are those of the one run.

OUT/lists/      what each training keeps
OUT/log.txt     what the trainings said
OUT/records/    a JSON for each finished training, by which the same command goes on
OUT/curve.csv   a row for each method and share

Accuracies are fractions, differences are percentage points.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import shutil
import statistics
from argparse import ArgumentParser, ArgumentTypeError
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import argument_parser, positive
from benchmarks.lines import write_lines
from moevision.analysis.images import data_settings
from moevision.commands.data import run_of
from moevision.config import parse_args
from moevision.data.scores import FILE, Scores, prune
from moevision.errors import UserError, escape_controls
from moevision.files import refuse_foreign, write_text_atomic
from moevision.models.safe_files import read_json, read_yaml
from moevision.stats import Gap
from moevision.train import fit as training
from moevision.train.processes import Interrupted, print_rank0
from moevision.train.resume import is_finished

ALL: Final = "all"
HARDEST: Final = 0.1  # what ccs drops first, or all that is dropped
METHODS: Final = ("random", "ccs", "aum", "el2n", "forgetting", "loss")
_HEAD: Final = (
    "by,share,images,seeds,accuracy,accuracy_sd,beside_all,beside_all_low,beside_all_high,"
)
_ASKED: Final = 0.7  # the share that a sentence is about, or the one nearest to it
Json = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One training: which share of the images, chosen by what, under which seed."""

    by: str
    share: float
    seed: int

    @property
    def name(self) -> str:
        """What its record is called."""
        return f"{self.by}-{self.share:g}-s{self.seed}"


def jobs(methods: Sequence[str], shares: Sequence[float], seeds: int) -> list[Job]:
    """All trainings, a seed after the other; that on all images is the same for all methods."""
    kinds = [(ALL, 1.0), *product(methods, sorted(shares, reverse=True))]
    return list(dict.fromkeys(Job(by, share, seed) for seed in range(seeds) for by, share in kinds))


def schedule(config: Mapping[str, Any], images: int) -> tuple[int, int]:
    """Steps of a recipe on so many images, and steps of one of its epochs, after which it is validated.

    Raises:
        UserError: for a recipe whose steps can't be kept equal.
    """
    trainer, epoch = config["trainer"], max(1, images // config["data"]["batch_size"])
    if trainer["devices"] not in (1, "1") or trainer.get("num_nodes", 1) != 1:
        raise UserError(
            "The run was trained by several processes, and the curve is trained by one: train the run with "
            "--trainer.devices 1."
        )
    if trainer["accumulate_grad_batches"] != 1:
        raise UserError(
            "The run accumulates gradients, and its steps can't be kept equal on fewer images."
        )
    ends = [epoch * (trainer["max_epochs"] or 0), trainer.get("max_steps") or 0]
    if not any(end > 0 for end in ends):
        raise UserError(
            "The run's config.yaml says neither max_epochs nor max_steps: train it with an end."
        )
    return min(end for end in ends if end > 0), epoch


# ---- the command line


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise ArgumentTypeError(f"{text!r} is no share above 0 and below 1")
    return share


def parser() -> ArgumentParser:
    """The command line."""
    known = argument_parser(
        "curve of",
        """\
Train RUN's recipe on all of its training images and on shares of them, chosen as `moevision data prune`
does, with several seeds. All trainings take as many steps, so that less data is not less training. It first
says how many trainings these are and how long they take; the same command goes on where it was stopped.

OUT/curve.csv holds accuracy on the test images, and its difference from training on all,
paired by seed, with a 95 % t interval over the seeds. A sentence for each method says whether 70 % (or the
share nearest to it) are shown to be as good as all, that is less than --margin worse.""",
        """\
  python -m benchmarks curve of runs/pets
  python -m benchmarks curve of runs/pets --shares 0.7 --by random ccs --seeds 5""",
    )
    add = known.add_argument
    add("run", metavar="RUN", help="a finished run with scores.csv")
    add(
        "--by",
        nargs="+",
        choices=METHODS,
        default=list(METHODS[:3]),
        metavar="METHOD",
        help=f"what chooses, of {', '.join(METHODS)} (random ccs aum)",
    )
    add(
        "--shares",
        nargs="+",
        type=_share,
        default=[0.9, 0.7, 0.5, 0.3],
        metavar="SHARE",
        help="shares of the images (0.9 0.7 0.5 0.3)",
    )
    add("--seeds", type=positive, default=3, metavar="N", help="seeds 0 to N - 1 (%(default)s)")
    add(
        "--margin",
        type=float,
        default=1.0,
        metavar="POINTS",
        help="loss of accuracy, in percentage points, that counts as none (%(default)s)",
    )
    add("--out", type=Path, metavar="DIR", help="folder to write to (RUN/curve)")
    return known


# ---- trainings


def run(arguments: Sequence[str]) -> None:
    """Do what has no record yet, then write and print the results.

    Raises:
        UserError: if the run has no scores, isn't finished, or a training fails.
    """
    chosen = parser().parse_args(arguments)
    run_dir = run_of(chosen.run)
    out = chosen.out or run_dir / "curve"
    refuse_foreign(out / "curve.csv", _HEAD.encode())
    scores, config = Scores.read(run_dir / FILE), read_yaml(run_dir / "config.yaml")
    if not is_finished(run_dir, with_twin=False):
        raise UserError(
            f"{run_dir} has no summary.json: finish it first, its scores and its time are needed."
        )
    planned = jobs(chosen.by, chosen.shares, chosen.seeds)
    recipe = hashlib.sha256(
        (run_dir / "config.yaml").read_bytes() + (run_dir / FILE).read_bytes()
    ).hexdigest()
    steps, epoch = schedule(config, len(scores.images))
    done = {job: record for job in planned if (record := _read(out, job, recipe)) is not None}
    summary = read_json(run_dir / "summary.json")
    if (took_steps := summary["steps"] + summary.get("refused", 0)) != steps:
        raise UserError(
            f"The run took {took_steps:,} steps, and its config.yaml says {steps:,}: fewer images are compared with a "
            "training that went to its end, without early stopping, max_time or limit_train_batches."
        )
    took = summary["duration_s"]
    shares = ", ".join(map(_percent, sorted(chosen.shares, reverse=True)))
    print(
        f"{len(planned)} trainings of {steps:,} steps, {len(done)} of them done: all {len(scores.images):,} images, "
        f"and {shares} by {', '.join(chosen.by)}, with the seeds {', '.join(map(str, range(chosen.seeds)))}\n"
        f"The run took {_time(took)}, so that the rest takes about {_time(took * (len(planned) - len(done)))} on the "
        f"same machine\n{escape_controls(str(out / 'records'))} has a record of each; the same command goes on",
        flush=True,
    )
    try:
        for job in planned:
            if job in done:
                continue
            done[job] = _train(job, run_dir, out, scores, steps, epoch) | {"recipe": recipe}
            write_lines(out / "records" / f"{job.name}.json", done[job])
            shutil.rmtree(out / "trainings" / job.name)
            each = statistics.fmean(record["duration_s"] for record in done.values())
            print(
                f"[{len(done)}/{len(planned)}] {job.name}: {100 * done[job]['correct'] / done[job]['total']:.2f} % of "
                f"{done[job]['total']:,} test images; {_time(each * (len(planned) - len(done)))} left",
                flush=True,
            )
    except Interrupted:
        print_rank0("The curve goes on by the same command, in the training that was stopped.")
        raise
    rows = table(list(done.values()), chosen.by)
    write_text_atomic(out / "curve.csv", _csv(rows))
    print("\n".join(["", *lines(rows), "", *sentences(rows, list(done.values()), chosen.margin)]))
    print(f"\n{escape_controls(str(out / 'curve.csv'))} has every number")


def _read(out: Path, job: Job, recipe: str) -> Json | None:
    file = out / "records" / f"{job.name}.json"
    if not file.is_file():
        return None
    record: Json = read_json(file)
    if record["recipe"] != recipe:
        raise UserError(
            f"{file} is of another config.yaml or scores.csv of the run: give --out another folder."
        )
    return record


def _train(job: Job, run_dir: Path, out: Path, scores: Scores, steps: int, epoch: int) -> Json:
    """Train, or go on training; what a record says."""
    by = "random" if job.by == ALL else job.by
    plan = prune(scores, by, job.share, hardest=min(HARDEST, 1 - job.share), seed=job.seed)
    keep, folder = out / "lists" / f"{job.name}.csv", out / "trainings" / job.name
    settings = data_settings(run_dir)
    relabelled = bool(settings.get("relabel"))
    plan.write(keep, scores, relabelled=relabelled)
    options: dict[str, object] = {
        "config": run_dir / "config.yaml",
        "name": job.name,
        "runs_root": out / "trainings",
        "resume": "auto",
        "seed_everything": job.seed,
        "data.order_seed": job.seed,
        "data.keep": keep,
        "data.scores": "false",
        "trainer.max_steps": steps,
        "trainer.max_epochs": -1,
        "trainer.min_epochs": "null",
        "trainer.limit_train_batches": "null",
        "trainer.max_time": "null",
        "early_stopping.patience": "null",
        "trainer.val_check_interval": epoch,
        "trainer.check_val_every_n_epoch": "null",
        "trainer.logger": "null",
        "trainer.enable_progress_bar": "false",
        "record_routing.images": "null",
    } | {f"data.{name}": settings[name] for name in ("path", "root") if name in settings}
    if relabelled:
        options["data.relabel"] = keep
    if not is_finished(folder, with_twin=False):
        with (
            (out / "log.txt").open("a", encoding="utf-8") as log,
            redirect_stdout(log),
            redirect_stderr(log),
        ):
            training.fit(
                parse_args(
                    "fit",
                    [*(f"--{name}={value}" for name, value in options.items()), "--without-twin"],
                )
            )
    summary = read_json(folder / "summary.json")
    kept = {
        "images": int(plan.keep.sum()),
        "steps": summary["steps"],
        "duration_s": summary["duration_s"],
    }
    return {
        **vars(job),
        **kept,
        **{name: summary["test"][name] for name in ("correct", "total", "loss")},
    }


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ---- results


@dataclass(frozen=True)
class Row:
    """One method at one share; accuracies by seed, and points beside all images and beside as many random ones."""

    by: str
    share: float
    images: int
    accuracy: dict[int, float]
    beside_all: Gap
    beside_random: Gap

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return statistics.fmean(self.accuracy.values())

    @property
    def sd(self) -> float:
        """Standard deviation over seeds; NaN for one."""
        return statistics.stdev(self.accuracy.values()) if len(self.accuracy) > 1 else math.nan


def beside(mine: Mapping[int, float], other: Mapping[int, float]) -> Gap:
    """Points between accuracies of common seeds."""
    common = sorted(mine.keys() & other.keys())
    return Gap.of([100 * (mine[seed] - other[seed]) for seed in common])


def table(records: Sequence[Json], methods: Sequence[str]) -> list[Row]:
    """A row for all images, then one for each method and share."""
    accuracy: dict[tuple[str, float], dict[int, float]] = defaultdict(dict)
    images = {}
    for record in records:
        kind = record["by"], record["share"]
        accuracy[kind][record["seed"]] = record["correct"] / record["total"]
        images[kind] = record["images"]
    rows = []
    for kind in sorted(accuracy, key=lambda kind: ([ALL, *methods].index(kind[0]), -kind[1])):
        by, share = kind
        own = accuracy[kind]
        to_all = beside({} if by == ALL else own, accuracy.get((ALL, 1.0), {}))
        random = accuracy.get(("random", share), {})
        to_random = beside({} if by in (ALL, "random") else own, random)
        rows.append(Row(by, share, images[kind], own, to_all, to_random))
    return rows


def with_interval(gap: Gap) -> str:
    """`-0.40 (-1.20 to +0.40)`."""
    if math.isnan(gap.mean):
        return "-"
    ends = "" if math.isnan(gap.low) else f" ({gap.low:+.2f} to {gap.high:+.2f})"
    return f"{gap.mean:+.2f}{ends}"


def verdict(gap: Gap, margin: float) -> str:
    """What an interval shows, if what is less than `margin` points worse counts as good."""
    if gap.low > -margin:
        return f"is shown to be as good as training on all, to within {margin:g} points"
    worse = "is shown to be worse than training on all"
    return worse if gap.high < 0 else "isn't shown to be as good as training on all"


def sentences(rows: Sequence[Row], records: Sequence[Json], margin: float) -> list[str]:
    """What was found, in plain words."""
    chosen = [row for row in rows if row.by != ALL]
    asked = min((row.share for row in chosen), key=lambda share: abs(share - _ASKED), default=0)
    found = []
    for row in chosen:
        if row.share == asked:
            how = "drawn at random" if row.by == "random" else f"chosen by {row.by}"
            found.append(
                f"Training on {_percent(row.share)} of the images, {how}, {verdict(row.beside_all, margin)}: "
                f"{with_interval(row.beside_all)} points."
            )
    seeds, total = len({record["seed"] for record in records}), records[0]["total"]
    level = f"In brackets: 95 % t intervals over {seeds} seeds, on the same {total:,} test images."
    return [*found, level if seeds > 1 else "One seed has no interval."]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def lines(rows: Sequence[Row]) -> list[str]:
    """The table as text."""
    text = [
        "by            kept     images  accuracy     sd  beside all                beside random"
    ]
    for row in rows:
        gaps = f"{with_interval(row.beside_all):<26}{with_interval(row.beside_random)}"
        counts = f"{row.by:<10} {_percent(row.share):>7} {row.images:>10,}"
        text.append(f"{counts} {100 * row.mean:>7.1f} % {100 * row.sd:>6.2f}  {gaps}")
    return text


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    text.write(_HEAD + "beside_random,beside_random_low,beside_random_high\n")
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        gaps = [(gap.mean, gap.low, gap.high) for gap in (row.beside_all, row.beside_random)]
        numbers = [row.mean, row.sd, *gaps[0], *gaps[1]]
        cells = ["" if math.isnan(number) else f"{number:.6g}" for number in numbers]
        writer.writerow([row.by, f"{row.share:g}", row.images, len(row.accuracy), *cells])
    return text.getvalue()
