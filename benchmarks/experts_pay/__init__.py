"""Pages of emoji: do experts pay, have they names, and are they missed? Arms and rules: `protocol.md`.

python -m benchmarks experts-pay price                 # ms a step of every arm, in turns; an idle machine, once
nice -n 19 python -m benchmarks experts-pay run        # tuning, then eight seeds; stop it at will
python -m benchmarks experts-pay table                 # the verdict and its tables
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import torch

from benchmarks.experts_pay import arms, report, runs
from benchmarks.harness import HERE, about, argument_parser
from benchmarks.queue import do_runs, read_records, refuse_changes
from moevision.limits import keep_freed_memory

FOLDER = HERE / "experts_pay"
PROTOCOL = FOLDER / "protocol.md"


def main() -> None:
    """Measure prices, do the runs that are left, or print the tables."""
    parser = argument_parser("experts-pay", __doc__)
    add = parser.add_argument
    add("verb", choices=("price", "run", "table"))
    add("--limit", type=int, default=0, help="runs to do; 0: all that are left")
    add("--out", type=Path, default=FOLDER / "runs.jsonl", help="records (%(default)s)")
    add("--prices", type=Path, default=FOLDER / "prices_conv_patch.json", help="(%(default)s)")
    add("--work", type=Path, default=Path("runs/experts_pay"), help="locks (%(default)s)")
    add("--allow-dirty", action="store_true", help="try things out on an uncommitted tree")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as in `moevision fit`

    if options.verb == "table":
        print(report.tables(read_records(options.out)))
        return
    refuse_changes(PROTOCOL, allowed=options.allow_dirty)
    if options.verb == "price":
        amended = [arm for arm in arms.ARMS if arms.stem_of(arm) == "conv_patch"]
        record = {"step_ms": arms.measure_prices([arms.REFERENCE, *amended]), **about()}
        options.prices.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(record["step_ms"])
    else:
        run_queue(options)


def run_queue(options: Namespace) -> None:
    """Tuning runs, then the seeds of the arms that the tuning chose."""
    first, amended = (
        json.loads(path.read_text(encoding="utf-8"))["step_ms"]
        for path in (FOLDER / "prices.json", options.prices)
    )
    step_ms = arms.prices_of_all(first, amended)
    do_runs(
        runs.next_runs,
        lambda run, _: {**runs.record_of(run, step_ms), **about()},
        lambda run, record: f"{run.name}: test {record['test_top1']:.1%}",
        options,
    )
