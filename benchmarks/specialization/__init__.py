"""Do classes go to different experts, does training add to it, and do the experts differ? A table of arms.

    nice -n 19 python -m benchmarks specialization run --cifar DIR --cats DIR --pretrained FILE --limit 0
    python -m benchmarks specialization run --list       # what is left, with an estimate
    python -m benchmarks specialization trunk --cats DIR --pretrained FILE --only cats_vs_dogs
    python -m benchmarks specialization report           # README.md's tables

`run` takes the next run of protocol.md that has no record; two such processes may share the work, and a stopped one is
started again with the same command. It makes trunks and tokens as they are needed; `trunk` makes trunks alone, and
--trunk FILE takes another one for photos.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness import HERE, argument_parser, positive, print_line, print_table
from benchmarks.queue import add_study, do_runs, fill_readme, read_records, refuse_changes
from benchmarks.specialization import training
from benchmarks.specialization.arms import DATA_SETS, SEEDS, Job, Record, queue
from benchmarks.specialization.report import parts_of
from benchmarks.specialization.rule import CHOOSING, chosen
from benchmarks.specialization.trunk import trunk_of
from moevision.errors import UserError
from moevision.limits import keep_freed_memory

FOLDER = HERE / "specialization"


def jobs(records: Sequence[Record], options: Namespace) -> Iterator[Job]:
    """The queue, as far as it is decided: what confirms comes when the rule has chosen."""
    setting = chosen(records)
    return queue({CHOOSING: None if setting is None else setting.arm}, options.only)


def run(options: Namespace) -> None:
    """Do the next runs, `limit` of them or all."""
    refuse_changes(training.PROTOCOL, allowed=options.allow_dirty)
    do_runs(partial(jobs, options=options), training.run, _told, options)


def _told(job: Job, record: Record) -> str:
    return f"{job.name}: top-1 {record['top1']:.3f}, {sum(record['cpu_s'].values()):.0f} s CPU"


def make_trunks(options: Namespace) -> None:
    """Train the trunks that aren't there yet."""
    refuse_changes(training.PROTOCOL, allowed=options.allow_dirty)
    for name in options.only:
        for seed in sorted({Job(name, "", seed, "").trunk_seed for seed in SEEDS}):
            record = trunk_of(name, seed, options).record
            print(f"trunk of {name}, seed {seed}: top-1 {record.get('top1', 'not measured')}", flush=True)


def print_left(options: Namespace) -> None:
    """The runs without a record, and how long they take."""
    records = read_records(options.out)
    done = {record["name"] for record in records}
    left = [job for job in jobs(records, options) if job.name not in done]
    print_table("runs that are left", ["run", "CPU s"], [[job.name, str(job.seconds)] for job in left])
    trunks = {
        (job.data, job.trunk_seed) for job in left
        if not (options.work / f"trunk-{job.data}-s{job.trunk_seed}.json").exists()
    }  # fmt: skip
    seconds = sum(job.seconds for job in left) + sum(DATA_SETS[name].trunk_s for name, _ in trunks)
    print_line(
        f"{len(left)} runs and {len(trunks)} trunks are left, about {seconds / 60:.0f} minutes of one core; on photos "
        f"{len(SEEDS)} more once the rule has chosen one of {len(DATA_SETS[CHOOSING].arms)} arms."
    )


def parser() -> ArgumentParser:
    """The command line."""
    found = argument_parser("specialization", __doc__)
    found.add_argument("verb", choices=("run", "trunk", "report"))
    found.add_argument("--cifar", type=Path, metavar="DIR", help="CIFAR-10 as a folder")
    found.add_argument("--cats", type=Path, metavar="DIR", help="cats_vs_dogs as a folder")
    found.add_argument("--pretrained", type=Path, metavar="FILE", help="safetensors of the pretrained ViT-S/14")
    found.add_argument("--trunk", type=Path, metavar="FILE", help="a dense ViT-S/14 of cats against dogs, as the trunk")
    found.add_argument("--only", nargs="+", choices=DATA_SETS, default=tuple(DATA_SETS), metavar="DATA", help="(all)")
    found.add_argument("--list", action="store_true", help="run: print what is left, with the estimate, and do nothing")
    found.add_argument("--threads", type=positive, default=1, help="the protocol has %(default)s")
    add_study(found, FOLDER)
    return found


def main() -> None:
    """Run, train trunks, list or report."""
    options = parser().parse_args()
    if options.verb == "report":
        fill_readme(options.readme, parts_of(read_records(options.out)))
        return
    if options.list:
        print_left(options)
        return
    missing = [name for name, flag in (("cifar10", "cifar"), ("cats_vs_dogs", "cats"))
               if name in options.only and getattr(options, flag) is None]  # fmt: skip
    if missing:
        raise UserError(f"Say where {' and '.join(missing)} is (--cifar DIR, --cats DIR), or name the others: --only.")
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    {"run": run, "trunk": make_trunks}[options.verb](options)
