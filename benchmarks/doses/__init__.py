"""How the gain of experts depends on what must be remembered. Arms and rules: `protocol.md`.

python benchmarks/doses/glyphs.py …                  # the characters, once
python -m benchmarks doses price                     # ms a step of every arm, in turns, once
nice -n 19 python -m benchmarks doses run --photos tiny_imagenet32.tar.xz
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks.doses import arms, runs
from benchmarks.harness import HERE, about, argument_parser
from benchmarks.queue import do_runs, refuse_changes
from moevision.limits import keep_freed_memory

FOLDER = HERE / "doses"
PROTOCOL = FOLDER / "protocol.md"
AGAIN = (
    *(("textures", arm) for arm in ("dense-2", "dense-4", "moe-16-half", "moe-32-half")),
    *(("textures", arm) for arm in ("moe-64-half", "moe-32-full", "moe-8-full-k2")),
    *(("textures", "moe-32-half-hash"), ("characters", "dense-2"), ("characters", "moe-32-half")),
)


def main() -> None:
    """Measure prices, or do the runs that are left."""
    parser = argument_parser("doses", __doc__)
    add = parser.add_argument
    work = Path("runs/doses")
    add("verb", choices=("price", "run"))
    add("--rounds", type=int, default=10, help="in which all arms take turns (%(default)s)")
    add("--limit", type=int, default=0, help="runs to do; 0: all that are left")
    add("--out", type=Path, default=FOLDER / "runs.jsonl", help="records (%(default)s)")
    add("--prices", type=Path, default=FOLDER / "prices.json", help="(%(default)s)")
    add("--work", type=Path, default=work, help="locks, decoded photos (%(default)s)")
    add("--glyphs", type=Path, default=work / "glyphs.npz", help="(%(default)s)")
    add("--photos", type=Path, help="Tiny-ImageNet at 32 px, a tar archive of folders")
    add("--allow-dirty", action="store_true", help="try things out on an uncommitted tree")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as in `moevision fit`

    refuse_changes(PROTOCOL, allowed=options.allow_dirty)
    if options.verb == "price" and options.prices.exists():
        price_more(options.prices, options.rounds)
        return
    if options.verb == "price":
        step_ms = arms.measure_prices(runs.priced_arms(), steps=6, rounds=options.rounds)
        record = {"step_ms": step_ms, **about()}
        options.prices.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(step_ms)
        return
    step_ms = json.loads(options.prices.read_text(encoding="utf-8"))["step_ms"]
    do_runs(
        runs.next_runs,
        lambda run, given: {**runs.record_of(run, step_ms, given), **about()},
        lambda run, record: f"{run.name}: {record.get('test_top1', record.get('val_top1')):.1%}",
        options,
    )


def price_more(prices: Path, rounds: int) -> None:
    """Arms without a price: in turns with a dense arm of their task, whose price times the ratio it is.

    Where all have one, some are measured again, and no price changes: how far is a busy machine's ratio off?
    """
    record = json.loads(prices.read_text(encoding="utf-8"))
    known = record["step_ms"]
    new = [pair for pair in runs.priced_arms() if " ".join(pair) not in known]
    beside = {task: runs.HIDDEN if task in ("mosaics", "photos") else "dense-2" for task, _ in new}
    found = arms.measure_prices([*beside.items(), *new] or list(AGAIN), steps=6, rounds=rounds)
    for task, arm in new:
        base = f"{task} {beside[task]}"
        known[f"{task} {arm}"] = round(found[f"{task} {arm}"] / found[base] * known[base], 2)
    times = sum(name.startswith("later") for name in record)
    record[f"later {times + 1}" if times else "later"] = {"step_ms": found, **about()}
    prices.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(found)
