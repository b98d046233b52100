"""`kill -9` at random moments, again and again: is the run that comes out the one that was never killed?

    python -m benchmarks kill --kills 50                # of each form, a few seconds of CPU each
    python -m benchmarks kill --kills 50 --only DDP     # of one

The same command, `moevision fit ... --resume auto`, is started over and over and killed a random time after its start:
while it reads, trains, validates, saves or writes the report. Of two processes the one that started them is killed, the
first or the second. Every third step is saved. A run that has come to its end is compared with one that was left alone
(weights of the exported model, predictions, metrics.csv, byte for byte) and is a line of the record; the next begins,
until there are enough kills. Commands are forks of a process that has imported torch (`tests/forks.py`).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, cast

from benchmarks.harness import HERE, about, argument_parser, count
from moevision.train.checkpoint import newest_valid
from moevision.train.resume import is_finished
from tests.forks import Forked

OPTIONS = (
    *(
        "--model.arch.name=test_vit_moe",
        "--model.arch.proj_drop_rate=0.1",
        "--model.arch.router=bias_balanced",
    ),
    *("--data.image_size=32", "--data.batch_size=8", "--data.train_size=160", "--data.val_size=64"),
    *("--data.test_size=64", "--data.augment=trivialaugment", "--trainer.precision=32-true"),
    *(
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        "--checkpoint.every_steps=3",
    ),
    *("--trainer.accelerator=cpu", "--trainer.max_epochs=6"),
)
TWO = "--trainer.devices=2"
FORMS: dict[str, tuple[str, ...]] = {
    "one process": (),
    "Muon": ("--model.optim.name=muon",),
    "moving average": ("--ema.decay=0.9",),
    "accumulation": ("--trainer.accumulate_grad_batches=2",),
    "max_steps": ("--trainer.max_steps=110",),  # to the middle of the sixth epoch
    "DDP": (TWO, "--trainer.strategy=ddp"),
    "expert parallelism": (TWO, "--parallel=fsdp", "--parallel.expert=2"),
}
SAME = ("model/model.safetensors", "predictions_test.csv", "metrics.csv")


def start(root: Path, name: str, form: str) -> Forked:
    """Start or go on with the run `name`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    command = ["-m", "moevision", "fit", "synthetic_pets", *OPTIONS, *FORMS[form]]
    others = 2 if TWO in FORMS[form] else 0
    command += [f"--runs_root={root}", f"--name={name}", "--resume=auto"]
    return Forked(command, root, environment, others)


def finish(root: Path, name: str, form: str) -> float:
    """Let a run come to its end; the seconds that this took."""
    began = time.monotonic()
    process = start(root, name, form)
    words, _ = process.communicate()
    assert process.returncode == 0, words[-3000:]
    return time.monotonic() - began


def kill_once(
    root: Path, name: str, form: str, longest_s: float, draw: random.Random
) -> dict[str, Any]:
    """Start, wait a random time, kill; what was found afterwards."""
    process = start(root, name, form)
    wait_s = draw.uniform(0, 0.7 * longest_s)  # what is left takes less
    victims = ["the command"]
    if TWO in FORMS[form]:
        victims += ["the first process", "the second process"]
    place = draw.randrange(len(victims))
    try:
        process.wait(wait_s)
    except subprocess.TimeoutExpired:
        listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
        began = sorted(map(int, listed.stdout.split()))
        victim = process.pid if place == 0 or len(began) < 2 else began[place - 1]
        os.kill(cast(int, victim), signal.SIGKILL)
    words, _ = process.communicate()
    assert process.returncode in (0, 2, -9), words[-3000:]
    found, refused = newest_valid(root / name / "checkpoints")
    return {
        "killed": process.returncode != 0,
        "victim": victims[place],
        "wait_s": round(wait_s, 2),
        "step_after": None if found is None else found.step,
        "damaged": [f"{other.path.name} {other.fault}" for other in refused],
    }


def killed_run(
    root: Path, name: str, form: str, kills: int, longest_s: float, draw: random.Random
) -> dict[str, Any]:
    """Kill a run up to so many times, let it end if it still can't, and compare it; its record."""
    found: list[dict[str, Any]] = []
    while sum(each["killed"] for each in found) < kills and not is_finished(
        root / name, with_twin=False
    ):
        found.append(kill_once(root, name, form, longest_s, draw))
        print(f"{form}, {name}: step {found[-1]['step_after']}", flush=True)
    if not is_finished(root / name, with_twin=False):
        finish(root, name, form)
    run, alone = root / name, root / "alone"
    differs = [file for file in SAME if (run / file).read_bytes() != (alone / file).read_bytes()]
    leaked = [str(path.relative_to(run)) for path in run.rglob("*.tmp")]
    return {"form": form, "kills": found, "differs": differs, "leaked": leaked}


def main() -> None:
    """Kill as often as the command line asks for."""
    parser = argument_parser("kill", __doc__)
    add = parser.add_argument
    add("--kills", type=count, default=50, help="of each form (%(default)s)")
    add("--only", choices=FORMS, nargs="+", default=list(FORMS), help="(all)")
    add("--seed", type=int, default=0)
    add(
        "--out",
        type=Path,
        default=HERE / "reliability" / "kills.jsonl",
        help="records (%(default)s)",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        wrong = sum(
            _wrong(form, Path(work) / form.replace(" ", "-"), options) for form in options.only
        )
    print(f"{wrong} runs differ, or a checkpoint was damaged")
    sys.exit(bool(wrong))


def _wrong(form: str, root: Path, options: Namespace) -> int:
    """Add the records of a form; how many of its runs aren't as they should be."""
    root.mkdir()
    longest_s, draw = finish(root, "alone", form), random.Random(f"{form} {options.seed}")
    killed = wrong = 0
    for number in range(options.kills):
        if killed >= options.kills:
            break
        record = killed_run(root, f"killed-{number}", form, options.kills - killed, longest_s, draw)
        shutil.rmtree(root / f"killed-{number}")
        killed += sum(each["killed"] for each in record["kills"])
        damaged = [each for each in record["kills"] if each["damaged"]]
        wrong += bool(record["differs"] or record["leaked"] or damaged)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**record, **about()}) + "\n")
    return wrong
