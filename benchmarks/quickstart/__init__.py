"""What the first run costs on plain cores: CPU seconds of all of `moevision fit --config quickstart`, and its accuracy.

    python -m benchmarks quickstart --seeds 0 1 2                              # a line each in runs.jsonl
    python -m benchmarks quickstart --config emoji --name emoji                # pages of emoji, with its experts' names
    python -m benchmarks quickstart --seeds 0 --checkout OTHER --name before   # the same of an earlier commit

float32 and no instructions beyond AVX2, on one thread: what a processor without bfloat16 does. CPU seconds are those of
the whole process, from `import torch` to the summary; other work on the machine moves them far less than it moves the
time on the clock.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

from benchmarks.accuracy import record_of
from benchmarks.harness import HERE, argument_parser
from benchmarks.lines import put_run

FOLDER = HERE / "quickstart"
RUNS = FOLDER / "runs.jsonl"
PLAIN = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}


def experts_lines(summary: Path) -> list[str]:
    """What a run on pages of emoji says of its experts, line by line; empty for other images."""
    _, _, section = summary.read_text(encoding="utf-8").partition("## What its experts take")
    return section.replace("```", "").strip().splitlines()


def main() -> None:
    """Run with command-line arguments."""
    parser = argument_parser("quickstart", __doc__)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--config", default="quickstart", help="the shipped configuration (%(default)s)")
    add("--checkout", type=Path, default=HERE.parent, help="whose code runs (%(default)s)")
    add("--name", default="now", help="what its records begin with (%(default)s)")
    add("--work", type=Path, default=Path("runs/quickstarts"), help="run folders (%(default)s)")
    add("--out", type=Path, default=RUNS, help="records (%(default)s)")
    options = parser.parse_args()
    checkout, work = options.checkout.resolve(), options.work.resolve()
    environment = {**os.environ, **PLAIN, "PYTHONPATH": str(checkout)}
    for seed in options.seeds:
        name = f"{options.name}-s{seed}"
        fit = [sys.executable, "-m", "moevision", "fit", "--config", options.config]
        words = ("--trainer.precision", "32-true", "--seed_everything", str(seed))
        places = ("--name", name, "--runs_root", str(work))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        # -m looks where it is called, first.
        subprocess.run([*fit, *words, *places], check=True, env=environment, cwd=checkout)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        command_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        record = record_of(work / name) | {
            "command_cpu_s": round(command_s, 1),
            "environment": PLAIN,
        }
        if experts := experts_lines(work / name / "summary.md"):
            record["experts"] = experts
        put_run(options.out, record)
        print(
            f"{name}: {command_s:.0f} CPU s, {record['test']['correct']} of {record['test']['total']}",
            flush=True,
        )
