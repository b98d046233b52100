"""Recompute every measured number of README.md from runs.jsonl.

Question: `fit` in 2 and 4 processes under DDP, FSDP2 and expert parallelism: does the same training come out as in one
process?

Code: commit 61c22735 ran the trainings in one process and under the layouts, commit 0b29c9e0 those that take a batch in
parts.

    python benchmarks/layouts/recompute.py
"""

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any


def spread(values: list[float], digits: int) -> str:
    """The lowest and the highest, or the one value of a single seed."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def statements() -> dict[str, list[str]]:
    """Page -> its texts with measured numbers."""
    text = Path(__file__).with_name("runs.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    by_title: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_title.setdefault(record["title"], []).append(record)
    one_process = [record["loss"] for record in by_title["one process"]]
    rows = []
    for title, runs in by_title.items():
        losses = [run["loss"] for run in runs]
        top1 = spread([100 * run["top1"] for run in runs], 1)
        distance = (
            ""
            if title == "one process"
            else f"{(fmean(losses) - fmean(one_process)) / stdev(one_process):+.1f}"
        )
        rows.append(
            f"| {title} | {len(runs)} | {runs[0]['steps']} | {top1} | {spread(losses, 3)} | {distance} |"
        )
    return {"benchmarks/layouts/README.md": rows}


if __name__ == "__main__":
    print(json.dumps(statements(), indent=1, ensure_ascii=False))
