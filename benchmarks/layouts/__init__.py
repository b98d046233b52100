"""`fit` on real photos in 2 and 4 processes under every layout, beside one process with several seeds.

    OMP_NUM_THREADS=1 nice -n 19 python -m benchmarks layouts run --data path/to/cats_vs_dogs --limit 0
    python -m benchmarks layouts report                                  # README.md's table

A batch has as many images in all, whatever the number of processes: the training is the same but for the order of the
images, the noise of routers and augmentation, which every process draws for itself, and BatchNorm in the stem, which
sees a process's part of a batch. So one process that accumulates as many parts of a batch is trained, too. That a step
is the same to rounding is tested with float64 (tests/train/test_parallel.py).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import HERE, about, argument_parser, positive
from benchmarks.planner.formulas import Layout
from benchmarks.queue import add_study, do_runs, fill_readme, is_dirty, read_records, refuse_changes
from moevision.errors import UserError
from moevision.models.safe_files import read_json

FOLDER = HERE / "layouts"
SEEDS, SEEDS_OF_PARTS, BATCH, EPOCHS = 5, 3, 64, 3
LAYOUTS = [
    (processes, Layout(parallel, expert))
    for processes in (2, 4)
    for parallel in ("ddp", "fsdp")
    for expert in (1, 2, 4)
    if expert <= processes
]


@dataclass(frozen=True)
class Job:
    """One training; one process has no layout, and takes a batch in `parts`."""

    processes: int
    layout: Layout
    seed: int
    parts: int = 1

    @property
    def name(self) -> str:
        """What its record and its run folder are called."""
        how = f"-parts{self.parts}" if self.parts > 1 else ""
        how += f"-{self.layout.parallel}-expert{self.layout.expert}" if self.processes > 1 else ""
        return f"w{self.processes}{how}-s{self.seed}"

    @property
    def title(self) -> str:
        """In the report."""
        if self.processes > 1:
            return f"{self.processes} processes, {self.layout.name}"
        return "one process" + (f", a batch in {self.parts} parts" if self.parts > 1 else "")


def jobs(_: object) -> Iterator[Job]:
    """All trainings."""
    yield from (Job(1, Layout(), seed) for seed in range(SEEDS))
    yield from (Job(processes, layout, 0) for processes, layout in LAYOUTS)
    yield from (Job(1, Layout(), seed, parts) for parts in (2, 4) for seed in range(SEEDS_OF_PARTS))


def run_one(job: Job, options: Namespace) -> dict[str, Any]:
    """Train; the record.

    Raises:
        UserError: if the training fails, or leaves more than one run folder.
    """
    origin = {**about(), "command": "python -m benchmarks layouts run"}  # without this machine's folders
    parallel = ["--parallel", job.layout.parallel, "--parallel.expert", str(job.layout.expert)]
    done = subprocess.run([
        sys.executable, "-m", "moevision", "fit", str(options.data), "--data.download", "false", "--pretrained", "none",
        "--name", job.name, "--runs_root", str(options.work), "--resume", "auto", "--seed_everything", str(job.seed),
        "--data.order_seed", str(job.seed), "--data.image_size", "32", "--data.batch_size",
        str(BATCH // job.processes // job.parts), "--trainer.accumulate_grad_batches", str(job.parts),
        "--model.arch.name", "vit_moe_hybrid_patch8_32", "--model.arch.router", "vmoe_top_k",
        "--model.optim.name", "muon", "--model.optim.lr", "2e-3", "--trainer.max_epochs", str(options.epochs),
        "--trainer.precision", "32-true", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
        "--trainer.devices", str(job.processes), *(parallel if job.processes > 1 else ()), *options.fit,
    ], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    if done.returncode:
        raise UserError(f"{job.name} ended with code {done.returncode}:\n{done.stdout[-2000:]}")
    found = sorted(path.name for path in options.work.glob(f"{job.name}*") if path.is_dir())
    if found != [job.name]:
        raise UserError(f"{job.name} left {', '.join(found)}: one run folder is wanted.")
    summary = read_json(options.work / job.name / "summary.json")
    test = summary["test"]
    return {
        **{name: getattr(job, name) for name in ("processes", "seed", "title")}, "parallel": job.layout.parallel,
        "expert": job.layout.expert, "steps": summary["steps"], "images": test["total"],
        "top1": test["correct"] / test["total"], "loss": test["loss"], **origin,
    }  # fmt: skip


def run(options: Namespace) -> None:
    """Do the next trainings."""
    refuse_changes(FOLDER / "README.md", allowed=options.allow_dirty)
    do_runs(jobs, run_one, _told, options)


def _told(job: Job, record: dict[str, Any]) -> str:
    return f"{job.title}, seed {job.seed}: top-1 {record['top1']:.2%}, loss {record['loss']:.4f}"


def table(records: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: one process with its seeds, then everything else beside it."""
    lines = ["| training | seeds | steps | top-1, % | test loss | from one process's mean, in its SDs |",
             "|---|--:|--:|--:|--:|--:|"]  # fmt: skip
    groups: dict[str, list[dict[str, Any]]] = {}
    order = sorted(records, key=lambda each: (each["processes"], each["parallel"], each["expert"], each["title"]))
    for record in order:
        groups.setdefault(record["title"], []).append(record)
    alone = [record["loss"] for record in groups["one process"]]
    mean, spread = statistics.fmean(alone), statistics.stdev(alone) if len(alone) > 1 else float("nan")
    for title, own in groups.items():
        losses = [record["loss"] for record in own]
        apart = "" if title == "one process" else f"{(statistics.fmean(losses) - mean) / spread:+.1f}"
        lines.append(
            f"| {title} | {len(own)} | {own[0]['steps']} | {_span([100 * record['top1'] for record in own], '.1f')} "
            f"| {_span(losses, '.3f')} | {apart} |"
        )
    return lines


def _span(values: Sequence[float], form: str) -> str:
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"


def report(options: Namespace) -> None:
    """Put the table into the README; trainings from a changed tree are left out."""
    clean = [record for record in read_records(options.out) if not is_dirty(record)]
    fill_readme(options.readme, ["\n".join(table(clean)) if clean else "Not run yet."])


def parser() -> ArgumentParser:
    """The command line."""
    known = argument_parser("layouts", __doc__)
    add = known.add_argument
    add("verb", choices=("run", "report"))
    add("--data", type=Path, metavar="DIR", help="a folder of photos, such as cats_vs_dogs")
    add("--epochs", type=positive, default=EPOCHS, metavar="N", help="(%(default)s)")
    add("--fit", action="append", default=[], metavar="OPTION", help="one more option of fit: --fit=--data.cache_mb=0")
    add_study(known, FOLDER)
    return known


def main() -> None:
    """Run or report."""
    options = parser().parse_args()
    if options.verb == "run" and options.data is None:
        raise UserError("Say where photos are: --data path/to/cats_vs_dogs.")
    {"run": run, "report": report}[options.verb](options)
