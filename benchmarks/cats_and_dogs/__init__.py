"""'Expert 1 focuses on cats, expert 2 on dogs': what a gate finds by itself, and what only supervision gives.

    nice -n 19 python -m benchmarks cats-and-dogs run --cats DIR --pretrained FILE --limit 0
    python -m benchmarks cats-and-dogs report                     # README.md's tables and figure

`run` takes the next run of protocol.md that has no record; a stopped one is started again with the same command. It
computes the tokens of the frozen blocks once, as they are needed.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.cats_and_dogs import training
from benchmarks.cats_and_dogs.gates import Job, Record, queue
from benchmarks.cats_and_dogs.report import draw, parts_of
from benchmarks.harness import HERE, argument_parser
from benchmarks.queue import add_study, do_runs, fill_readme, read_records, refuse_changes
from moevision.limits import keep_freed_memory

FOLDER = HERE / "cats_and_dogs"


def main() -> None:
    """Run or report."""
    parser = argument_parser("cats-and-dogs", __doc__)
    parser.add_argument("verb", choices=("run", "report"))
    parser.add_argument("--cats", type=Path, metavar="DIR", help="cats_vs_dogs as a folder")
    parser.add_argument("--pretrained", type=Path, metavar="FILE", help="safetensors of the pretrained ViT-S/14")
    add_study(parser, FOLDER)
    options = parser.parse_args()
    records = read_records(options.out)
    if options.verb == "report":
        fill_readme(options.readme, parts_of(records))
        draw(records, options.readme.with_name("gates.png"))
        return
    if options.cats is None or options.pretrained is None:
        parser.error("run needs --cats DIR and --pretrained FILE")
    refuse_changes(training.PROTOCOL, allowed=options.allow_dirty)
    torch.set_num_threads(1)
    keep_freed_memory()
    do_runs(queue, training.run_job, told, options)


def told(job: Job, record: Record) -> str:
    """A line about a finished run."""
    return f"{job.name}: {100 * record['top1']:.1f} %, {sum(record['cpu_s'].values()):.0f} s CPU"
