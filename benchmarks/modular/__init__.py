"""Experts trained apart and joined: what they bring over a head for each domain on the frozen trunk (protocol.md).

nice -n 19 python -m benchmarks modular run --cats DIR --imagenette DIR --cifar10 DIR --pretrained FILE --limit 0
python -m benchmarks modular report                                                           # README.md's tables

`run` takes the next run of protocol.md that has no record; a stopped one is started again with the same command. It
computes the tokens of the frozen blocks once, as they are needed.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.harness import HERE, argument_parser
from benchmarks.modular import training
from benchmarks.modular.domains import Job, queue
from benchmarks.modular.report import accuracy, parts_of
from benchmarks.queue import add_study, do_runs, fill_readme, read_records, refuse_changes
from moevision.limits import keep_freed_memory

FOLDER = HERE / "modular"


def main() -> None:
    """Run or report."""
    parser = argument_parser("modular", __doc__)
    parser.add_argument("verb", choices=("run", "report"))
    for name in ("cats", "imagenette", "cifar10"):
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help="its folder")
    parser.add_argument("--pretrained", type=Path, metavar="FILE", help="safetensors of the pretrained ViT-S/14")
    add_study(parser, FOLDER)
    options = parser.parse_args()
    if options.verb == "report":
        fill_readme(options.readme, parts_of(read_records(options.out)))
        return
    if None in (options.cats, options.imagenette, options.cifar10, options.pretrained):
        parser.error("run needs --cats, --imagenette, --cifar10 and --pretrained")
    refuse_changes(training.PROTOCOL, allowed=options.allow_dirty)
    torch.set_num_threads(1)
    keep_freed_memory()
    do_runs(queue, training.run_job, told, options)


def told(job: Job, record: training.Record) -> str:
    """A line about a finished run."""
    found = ", ".join(f"{arm} {100 * accuracy(record, arm):.1f}" for arm in record["predicted"])
    return f"{job.name}: {found} %; {sum(record['cpu_s'].values()):.0f} s CPU"
