"""Recompute every measured number of README.md from runs.jsonl.

Question: under expert parallelism a layer is done when the process with the most rows is. How much do processes wait
for it where load is uneven, and does the balance loss take that away?

Code: commit d58aa810 ran it. It counted the rows that processes sent and timed how long they waited for them: means
over the processes and over the last 100 of 1,000 steps, of the ratio to `even` the median of these steps.

    python benchmarks/waiting/recompute.py
"""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

ARMS = ("even", "forced", "no loss", "loss")


def spread(rows: list[dict[str, Any]], digits: int) -> str:
    """Waiting as a multiple of that under an even load: the lowest and the highest run."""
    ratios = [row["wait_over_even"] for row in rows]
    return f"{min(ratios):.{digits}f} to {max(ratios):.{digits}f}"


def statements() -> dict[str, list[str]]:
    """Page -> its texts with measured numbers."""
    text = Path(__file__).with_name("runs.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    measured = [row for record in records for row in record["rows"]]
    by_arm = {arm: [row for row in measured if row["arm"] == arm] for arm in ARMS}
    without, with_loss = by_arm["no loss"], by_arm["loss"]
    pairs = list(zip(without, with_loss, strict=True))
    longer = sum(a["wait_ms"] > b["wait_ms"] for a, b in pairs)
    milliseconds = ", ".join(f"{a['wait_ms']:.1f} and {b['wait_ms']:.1f}" for a, b in pairs)
    # By both measures: milliseconds run by run, and all ratios.
    least, most = (
        pick(row["wait_over_even"] for row in rows)
        for pick, rows in ((min, without), (max, with_loss))
    )
    is_shown = longer == len(pairs) and least > most
    readme = [
        f"**Answer.** {'Yes, in every run and by both measures' if is_shown else 'Not shown'}.",
        f"computes {without[0]['busiest_over_mean']:.2f} times the mean rows, and the other waits {spread(without, 1)} "
        f"times as long as under an even load; with the loss {with_loss[0]['busiest_over_mean']:.2f} times the rows "
        f"and {spread(with_loss, 1)} times the wait.",
        f"In milliseconds the waits are {milliseconds} ms without and with the loss: longer without it in {longer} of "
        f"{len(records)} runs.",
    ]
    for arm, rows in by_arm.items():  # rows and bytes are counts, the same in every run
        kilobytes = rows[0]["bytes_sent"] / 1000
        readme.append(
            f"| `{arm}` | {rows[0]['busiest_over_mean']:.2f} | {kilobytes:.0f} | {spread(rows, 2)} |"
        )
    busiest = [
        f"{fmean(row['busiest_over_mean'] for row in rows):.2f}" for rows in (without, with_loss)
    ]
    results = (
        f"| Uneven experts make others wait | {'yes' if is_shown else 'not shown'} | Without a balance loss the busier "
        f"of two processes computes {busiest[0]} times the mean rows, with one {busiest[1]}; waits are longer without "
        f"in {longer} of {len(records)} runs by mean ms ([waiting](../benchmarks/waiting/README.md)). |"
    )
    return {"benchmarks/waiting/README.md": readme, "docs/results.md": [results]}


if __name__ == "__main__":
    print(json.dumps(statements(), indent=1, ensure_ascii=False))
