"""What fewer, chosen training images cost a run of yours: its recipe on shares of its images, in equally many steps.

    python -m benchmarks curve of runs/pets
    python -m benchmarks curve of runs/pets --shares 0.7 --by random ccs --seeds 5

Shares are chosen as `moevision data prune` does, by the scores of the run. Fewer images are seen more often and
validated after as many steps, so that less data is not less training. A seed draws initial weights, order, augmentation
and, where the method draws, the images; differences are between trainings of one seed, on the same test images. A share
is as good as all if the 95 % t interval over seeds excludes a loss of --margin points.

OUT/lists/       what each training keeps
OUT/log.txt      what the trainings said
OUT/record.json  an entry for each finished training, by which the same command goes on

The study of CIFAR-10 is frozen: README.md, record.json, recompute.py.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import defaultdict
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.harness import Record, argument_parser, positive
from benchmarks.markdown import table
from moevision.analysis.images import data_settings
from moevision.commands.data import run_of
from moevision.config import parse_args
from moevision.data.scores import FILE, Scores, prune
from moevision.errors import UserError
from moevision.models.safe_files import read_json, read_yaml
from moevision.stats import Gap
from moevision.train import fit as training
from moevision.train.resume import is_finished
from moevision.words import points

HARDEST = 0.1  # what ccs drops first, or all that is dropped
METHODS = ("random", "ccs", "aum", "el2n", "forgetting", "loss")
ALL = "all-1"
Json = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One training: which share of the images, chosen by what, under which seed."""

    by: str
    share: float
    seed: int

    @property
    def row(self) -> str:
        """What its row of the table is called."""
        return f"{self.by}-{self.share:g}"


def jobs(methods: Sequence[str], shares: Sequence[float], seeds: int) -> list[Job]:
    """All trainings, a seed after the other; that on all images is the same for all methods."""
    kinds = [("all", 1.0), *product(methods, sorted(shares, reverse=True))]
    return [Job(by, share, seed) for seed in range(seeds) for by, share in kinds]


def train(job: Job, run_dir: Path, out: Path, scores: Scores, steps: int) -> Json:
    """Train, or go on training; what a record says."""
    config = read_yaml(run_dir / "config.yaml")
    by = "random" if job.by == "all" else job.by
    plan = prune(scores, by, job.share, hardest=min(HARDEST, 1 - job.share), seed=job.seed)
    name = f"{job.row}-s{job.seed}"
    keep, folder = out / "lists" / f"{name}.csv", out / "trainings" / name
    settings = data_settings(run_dir)
    relabelled = bool(settings.get("relabel"))
    plan.write(keep, scores, relabelled=relabelled)
    options: dict[str, object] = {
        "config": run_dir / "config.yaml",
        "name": name,
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
        "trainer.val_check_interval": max(1, len(scores.images) // config["data"]["batch_size"]),
        "trainer.check_val_every_n_epoch": "null",
        "trainer.logger": "null",
        "trainer.enable_progress_bar": "false",
        "record_routing.images": "null",
    } | {f"data.{name}": settings[name] for name in ("path", "root") if name in settings}
    if relabelled:
        options["data.relabel"] = keep
    if not is_finished(folder, with_twin=False):
        arguments = [f"--{name}={value}" for name, value in options.items()]
        with (
            (out / "log.txt").open("a", encoding="utf-8") as log,
            redirect_stdout(log),
            redirect_stderr(log),
        ):
            training.fit(parse_args("fit", [*arguments, "--without-twin"]))
    summary = read_json(folder / "summary.json")
    shutil.rmtree(folder)
    test = {name: summary["test"][name] for name in ("correct", "total", "loss")}
    return {**vars(job), "images": int(plan.keep.sum()), "steps": summary["steps"], **test}


def shown(gap: Gap, margin: float) -> str:
    """What an interval beside all images shows, if a loss of less than `margin` points counts as none."""
    if 100 * gap.low > -margin:
        return f"as good to within {margin:g} points"
    return "worse" if gap.high < 0 else "not shown to be as good"


def gap_of(first: dict[int, float], second: dict[int, float]) -> Gap:
    """The first minus the second, of the seeds that both have."""
    return Gap.of([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


def text_of(gap: Gap) -> str:
    """`+1.6 (+0.2 to +2.9)`, in points; of one seed the mean alone."""
    interval = f" ({points(gap.low)} to {points(gap.high)})" if gap.seeds > 1 else ""
    return points(gap.mean) + interval


def results(runs: Sequence[Json], margin: float) -> str:
    """A row for all images, then one for each method and share."""
    accuracies: dict[str, dict[int, float]] = defaultdict(dict)
    images = {}
    for run in runs:
        row = Job(run["by"], run["share"], run["seed"]).row
        accuracies[row][run["seed"]] = run["correct"] / run["total"]
        images[row] = run["images"]
    rows = []
    for row, own in accuracies.items():
        to_all = gap_of(own, accuracies[ALL])
        to_random = gap_of(own, accuracies.get(f"random-{row.rpartition('-')[2]}", {}))
        cells = [text_of(to_all), shown(to_all, margin)] if row != ALL else ["", ""]
        is_chosen = to_random.seeds and not row.startswith("random-")
        cells.append(text_of(to_random) if is_chosen else "")
        rows.append([row, f"{images[row]:,}", _mean(own), *cells])
    heads = ["share", "images", "test top-1, %", "points beside all", "is", "beside random"]
    return table(heads, rows)


def _mean(accuracies: dict[int, float]) -> str:
    return f"{100 * sum(accuracies.values()) / len(accuracies):.1f}"


def main() -> None:
    """Do what has no record yet, then print the results.

    Raises:
        UserError: if the run has no scores, isn't finished, or was trained in a way that can't be repeated.
    """
    parser = argument_parser("curve", __doc__)
    add = parser.add_argument
    add("verb", choices=("of",))
    add("run", metavar="RUN", help="a finished run with scores.csv")
    add("--by", nargs="+", choices=METHODS, default=list(METHODS[:3]), help="(random ccs aum)")
    add("--shares", nargs="+", type=float, default=[0.9, 0.7, 0.5, 0.3], help="(0.9 0.7 0.5 0.3)")
    add("--seeds", type=positive, default=3, metavar="N", help="seeds 0 to N - 1 (%(default)s)")
    add(
        "--margin",
        type=float,
        default=1.0,
        help="points of accuracy that don't count (%(default)s)",
    )
    add("--out", type=Path, metavar="DIR", help="folder to write to (RUN/curve)")
    options = parser.parse_args()
    run_dir = run_of(options.run)
    if not is_finished(run_dir, with_twin=False):
        raise UserError(f"{run_dir} has no summary.json: finish it first, its steps are needed.")
    trainer = read_yaml(run_dir / "config.yaml")["trainer"]
    if trainer["devices"] not in (1, "1") or trainer["accumulate_grad_batches"] != 1:
        raise UserError(
            "The curve is trained in one process without accumulating gradients: train the run with "
            "--trainer.devices 1 --trainer.accumulate_grad_batches 1."
        )
    out = options.out or run_dir / "curve"
    scores, summary = Scores.read(run_dir / FILE), read_json(run_dir / "summary.json")
    steps = summary["steps"] + summary.get("refused", 0)
    recipe = b"".join((run_dir / name).read_bytes() for name in ("config.yaml", FILE))
    record = Record(out / "record.json", {"recipe": hashlib.sha256(recipe).hexdigest()})
    planned = jobs(options.by, options.shares, options.seeds)
    left = [job for job in planned if record.find(**vars(job)) is None]
    print(
        f"{len(planned)} trainings of {steps:,} steps, {len(planned) - len(left)} of them done; the run took "
        f"{summary['duration_s']:.0f} s, each takes about as long. The same command goes on.",
        flush=True,
    )
    for job in left:
        entry = train(job, run_dir, out, scores, steps)
        record.add(entry)
        share = entry["correct"] / entry["total"]
        print(f"{job.row}, seed {job.seed}: {share:.1%} of {entry['total']:,}", flush=True)
    print(results(record.read()["runs"], options.margin))
