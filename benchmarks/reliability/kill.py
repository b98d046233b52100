"""`kill -9` at random moments, again and again: is the run that comes out the one that was never killed?

    python -m benchmarks kill --kills 50                      # about 20 s of CPU each
    python -m benchmarks kill --kills 50 --tmpdir /dev/shm    # TMPDIR on another file system
    python -m benchmarks kill --kills 50 --one-run            # all of them over one and the same long run

The same command, `moevision fit ... --resume auto`, is started over and over and killed a random time after its start:
while it imports, reads, trains, validates, saves or writes the report. Every third step is saved.
When a run has come to its end it is compared with one that was left alone (weights of the exported model, predictions,
metrics.csv, byte for byte), and the next begins, until enough kills are made. With --one-run one run, long enough, is
killed every time and then left to end. The record is written after each kill, and the same command goes on with it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import HERE, about, argument_parser
from moevision.files import write_json_atomic
from moevision.train.checkpoint import newest_valid
from moevision.train.resume import is_finished

STARTED = "run folder:"  # printed right before the first step
OPTIONS = (
    *("--model.arch.name=test_vit_moe", "--model.arch.proj_drop_rate=0.1", "--model.arch.router=bias_balanced"),
    *("--data.image_size=32", "--data.batch_size=8", "--data.train_size=320", "--data.val_size=64"),
    *("--data.test_size=64", "--data.augment=trivialaugment", "--trainer.precision=32-true"),
    *("--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false", "--checkpoint.every_steps=3"),
)
EPOCHS, EPOCHS_OF_ONE_RUN = 12, 120  # of 40 steps
SAME = ("model/model.safetensors", "predictions_test.csv", "metrics.csv")


def start(root: Path, name: str, tmpdir: Path, epochs: int) -> subprocess.Popen[str]:
    """Start or go on with the run `name`."""
    command = [sys.executable, "-m", "moevision", "fit", "synthetic_pets", *OPTIONS, f"--trainer.max_epochs={epochs}"]
    return subprocess.Popen(
        [*command, f"--runs_root={root}", f"--name={name}", "--resume=auto"],
        env={**os.environ, "TMPDIR": str(tmpdir)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_once(root: Path, name: str, tmpdir: Path, epochs: int, draw: random.Random) -> dict[str, Any]:
    """Start, wait a random time, kill; what was found afterwards. Nine of ten kills come after the first step began."""
    process = start(root, name, tmpdir, epochs)
    assert process.stdout is not None
    said: list[str] = []
    if draw.random() < 0.9:
        for line in process.stdout:
            said.append(line)
            if line.startswith(STARTED):
                break
    wait_s = draw.uniform(0, 4)
    try:
        process.wait(wait_s)
    except subprocess.TimeoutExpired:
        process.kill()
    said += process.stdout.readlines()
    process.wait()
    found, refused = newest_valid(root / name / "checkpoints")
    return {
        "killed": process.returncode == -9,
        "exit": process.returncode,
        "wait_s": round(wait_s, 2),
        "step_after": None if found is None else found.step,
        "damaged": [f"{other.path.name} {other.fault}" for other in refused],
        "went_on": next((line.strip() for line in said if line.startswith(("Going on", str(root)))), ""),
        "last_words": "".join(said)[-2000:] if process.returncode not in (0, -9) else "",
    }


def compare(run: Path, alone: Path) -> dict[str, Any]:
    """Files that differ from those of the run that was left alone, and temporary files that are left."""
    differs = [name for name in SAME if (run / name).read_bytes() != (alone / name).read_bytes()]
    return {"differs": differs, "leaked": [str(path.relative_to(run)) for path in run.rglob("*.tmp")]}


def main() -> None:
    """Kill as often as the command line asks for."""
    parser = argument_parser("kill", __doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tmpdir", type=Path, help="TMPDIR of the training; a folder inside is made and looked at")
    parser.add_argument("--one-run", action="store_true", help="all kills over one and the same run")
    parser.add_argument(
        "--epochs", type=int, help=f"of a run; {EPOCHS} unless told, {EPOCHS_OF_ONE_RUN} with --one-run"
    )
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "moevision-kill-loop")
    parser.add_argument("--out", type=Path, default=HERE / "reliability" / "kill.json")
    options = parser.parse_args()
    name = "own file system" if options.tmpdir is None else f"TMPDIR in {options.tmpdir}"
    name += ", one run" if options.one_run else ""
    epochs = options.epochs or (EPOCHS_OF_ONE_RUN if options.one_run else EPOCHS)
    record = json.loads(options.out.read_text()) if options.out.is_file() else {}
    part = record.setdefault(name, {"epochs": epochs, "kills": [], "runs": [], "leaked_in_tmpdir": []})
    root = options.work / (("own" if options.tmpdir is None else "other") + ("-one" if options.one_run else ""))
    root.mkdir(parents=True, exist_ok=True)
    tmpdir = (options.tmpdir or options.work) / f"moevision-tmp-{root.name}"
    tmpdir.mkdir(parents=True, exist_ok=True)
    if not is_finished(root / "alone", with_twin=False):
        shutil.rmtree(root / "alone", ignore_errors=True)
        process = start(root, "alone", tmpdir, epochs)
        words, _ = process.communicate()
        assert process.returncode == 0, words
    while len([kill for kill in part["kills"] if kill["killed"]]) < options.kills or _under_way(root, part):
        run = f"killed-{len(part['runs'])}"
        begun = time.monotonic()
        enough = len([kill for kill in part["kills"] if kill["killed"]]) >= options.kills
        if enough:
            process = start(root, run, tmpdir, epochs)
            words, _ = process.communicate()
            assert process.returncode == 0, words
        else:
            found = kill_once(root, run, tmpdir, epochs, random.Random(1000 * options.seed + len(part["kills"])))
            part["kills"].append(found)
            print(f"{len(part['kills'])}: {found['went_on'] or 'fresh'} -> step {found['step_after']}", flush=True)
            assert found["exit"] in (0, -9), found["last_words"]
            assert found["killed"] or not options.one_run, "the run ended before all kills: give it more --epochs"
        if is_finished(root / run, with_twin=False):
            part["runs"].append(compare(root / run, root / "alone"))
            print(f"finished: {part['runs'][-1]}", flush=True)
        part["leaked_in_tmpdir"] = sorted(path.name for path in tmpdir.iterdir())
        part["wall_s"] = round(part.get("wall_s", 0) + time.monotonic() - begun)
        record["provenance"] = about()
        write_json_atomic(options.out, record)
    kills = [kill for kill in part["kills"] if kill["killed"]]
    damaged = sum(bool(kill["damaged"]) for kill in kills)
    wrong = [run for run in part["runs"] if run["differs"] or run["leaked"]]
    print(
        f"{len(kills)} kills in {len(part['runs'])} runs: {len(wrong)} runs differ, "
        f"a damaged checkpoint after {damaged} kills"
    )
    sys.exit(bool(wrong or damaged))


def _under_way(root: Path, part: dict[str, Any]) -> bool:
    """Whether a run was killed and has not come to its end yet, or none has at all."""
    return (root / f"killed-{len(part['runs'])}").is_dir() or not part["runs"]
